// The cache at work: which keys and values are new in a step, which are used again, and whose query it is.

import { app } from "./app.js";
import { ask, numbers } from "./api.js";
import { choice, el, place, say, textOf, tokenText } from "./dom.js";
import { heatMap } from "./heat.js";
import { t } from "./words.js";

let ids = []; // of the text so far
let n_prompt = 0;
let step = null; // the newest answer
let head = 0;
let isGoing = false;

export function startOver() {
  ids = [...app.run.ids];
  n_prompt = ids.length;
  step = null;
  showCache();
}

export async function generate(n_steps) {
  if (isGoing) return;
  isGoing = true;
  try {
    for (let i = 0; i < n_steps && ids.length < Math.min(256, app.about.hparams.n_ctx); i++) {
      const { temperature, top_k, top_p } = app.settings;
      const asked = ids;
      const answer = await ask("step", { ids, block: app.block, temperature, top_k, top_p, point: Math.random() });
      if (ids !== asked) break; // it was started over meanwhile
      step = { ...answer, ids };
      ids = [...ids, step.next_id];
      await showCache();
    }
  } catch (error) {
    say(error.message, true);
  }
  isGoing = false;
}

// With which settings the next token is chosen, since these stand in another section.
function drawnHow() {
  const { temperature, top_k, top_p } = app.settings;
  return temperature === 0 ? t("takesLikeliest") : t("drawsAt", temperature, top_k, top_p);
}

export function showGoing() {
  const buttons = [1, 10].map((n) => el("button", { type: "button", class: "act", onclick: () => generate(n) }, t("steps", n)));
  const again = el("button", { type: "button", class: "plain", onclick: startOver }, t("startOver"));
  place("going", ...buttons, again, el("span", { class: "hint" }, drawnHow()));
}

export async function showCache() {
  showGoing();
  const made = ids.slice(n_prompt).map((id) => el("mark", {}, tokenText(id)));
  place("growing", textOf(ids.slice(0, n_prompt)), ...made);
  if (!step) return place("cached", el("p", { class: "hint" }, t("cacheStart")));
  const shown = step;
  const [q, k, v] = await Promise.all(["q", "k", "v"].map((name) => numbers(shown[name].key)));
  if (shown !== step) return;
  const { n_past, n_run } = step;
  const seen = step.ids;
  const [n_head, , d] = step.k.shape;
  head = Math.min(head, n_head - 1);
  const heads = Array.from({ length: n_head }, (_, i) => choice(String(i), i === head, () => { head = i; showCache(); }));
  const part = (data, n) => data.subarray(head * n * d, (head + 1) * n * d);
  const rows = seen.map((id, i) => `${i < n_past ? "" : `${t("new")} `}${tokenText(id)}`);
  const map = (name, data, n, names) => ({ data: part(data, n), n_rows: n, n_columns: d, first: seen.length - n, rows: names, columns: null, row: n - 1, about: t("cacheOf", name, step.block, head) });
  place("cached",
    el("p", { "aria-live": "polite" }, t("cacheSaid", n_past, n_run, seen.length, tokenText(seen.at(-1)), tokenText(step.next_id))),
    el("div", { class: "chooser", role: "group", "aria-label": t("head") }, el("span", {}, `${t("block")} ${step.block}, ${t("head")} `), ...heads),
    el("h3", {}, t("cacheQ")), heatMap(map("q", q, n_run, seen.slice(n_past).map(tokenText))),
    el("div", { class: "two" }, el("div", {}, el("h3", {}, t("cacheK")), heatMap(map("k", k, seen.length, rows))), el("div", {}, el("h3", {}, t("cacheV")), heatMap(map("v", v, seen.length, rows)))));
}
