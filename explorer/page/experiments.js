// What happens without a head or a neuron, or with a row of another text's residual stream.

import { app, change, isOfRun } from "./app.js";
import { ask, numbers, Refusal } from "./api.js";
import { el, percent, place, say, scroller, tokenText } from "./dom.js";
import { bar } from "./heat.js";
import { cut, likeliest } from "./sampling.js";
import { t } from "./words.js";

const PLAIN = { temperature: 1, top_k: 0, top_p: 1 };

const select = (id, n, name) => el("select", { id }, ...Array.from({ length: n }, (_, i) => el("option", { value: i }, name(i))));
const field = (label, input) => el("label", { class: "field" }, el("span", {}, label), input);

export function makeExperiments() {
  const { n_layer, n_head, n_embd } = app.about.hparams;
  const block = select("offBlock", n_layer, (i) => `${t("block")} ${i}`);
  const kind = el("select", { id: "offKind" }, el("option", { value: "head" }, t("head")), el("option", { value: "neuron" }, t("neuron")));
  const which = el("input", { id: "offWhich", type: "number", required: true, min: 0, max: n_head - 1, value: 0 });
  kind.addEventListener("change", () => { which.max = (kind.value === "head" ? n_head : 4 * n_embd) - 1; });
  const add = (event) => {
    event.preventDefault();
    change({ off: [...app.off, { block: Number(block.value), [kind.value]: Number(which.value) }] });
  };
  place("offForm", el("form", { class: "form", onsubmit: add }, field(t("block"), block), field(t("part"), kind), field(t("number"), which), el("button", { class: "act" }, t("switchThisOff"))));
}

export function makePatch() {
  const { n_layer } = app.about.hparams;
  const typed = document.getElementById("otherText")?.value ?? t("otherText");
  const text = el("input", { id: "otherText", type: "text", value: typed, maxlength: 2000 });
  const block = select("patchBlock", n_layer + 1, (i) => (i < n_layer ? t("intoBlock", i) : t("afterLast")));
  const { ids } = app.run;
  const position = select("patchTo", ids.length, (i) => `${i} ${tokenText(ids[i])}`);
  const from = el("input", { id: "patchFrom", type: "number", min: 0, max: app.about.n_tokens - 1, placeholder: t("lastOne") });
  const patchIn = (event) => {
    event.preventDefault();
    compare({ text: text.value, block: Number(block.value), position: Number(position.value), from: from.value === "" ? null : Number(from.value) }, true);
  };
  block.value = Math.floor(n_layer / 2);
  position.value = ids.length - 1; // whose row decides what comes next
  place("patchForm", el("form", { class: "form", onsubmit: patchIn }, field(t("theOther"), text), field(t("whereTo"), block), field(t("patchTo"), position), field(t("patchFrom"), from), el("button", { class: "act" }, t("patch"))));
}

// Which parts are off; with any, the comparison is made at once. isAsked: and brought into view.
export async function showOff(isAsked = false) {
  const parts = app.off.map((part, i) => el("li", {}, el("button", { type: "button", class: "choice", title: t("switchOn", said(part)), onclick: () => change({ off: app.off.filter((_, j) => j !== i) }) }, `${said(part)} ✕`)));
  place("off", ...(parts.length ? [el("p", { class: "hint" }, t("isOff")), el("ul", { class: "crumbs" }, ...parts)] : []));
  if (app.off.length) await compare(null, isAsked);
  else place("compared");
}

const said = (part) => `${t("block")} ${part.block}, ${"head" in part ? `${t("head")} ${part.head}` : `${t("neuron")} ${part.neuron}`}`;

let newest = null; // comparison: of which ids, off and patch, and the promise of its answer

async function compare(patch, isAsked) {
  const { run: { ids }, off } = app;
  const isKnown = newest && newest.off === off && newest.patch === patch && isOfRun(newest.ids);
  if (!isKnown) newest = { ids, off, patch, answer: ask("compare", { ids, off, patch }) };
  const mine = newest;
  const isCurrent = () => mine === newest && off === app.off && isOfRun(ids);
  try {
    const answer = await mine.answer;
    const [before, after] = (await Promise.all([numbers(answer.before), numbers(answer.after)])).map((logits) => cut(logits, PLAIN).p);
    if (!isCurrent()) return;
    const notes = patch ? [t("patched", tokenText(answer.other_ids.at(patch.from ?? -1)), tokenText(ids[patch.position]))] : [];
    const note = [...notes, ...(off.length ? [t("without", off.map(said).join("; "))] : [])].join(" · ");
    showCompared(before, after, note);
    if (isAsked) document.getElementById("compared").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (!isCurrent()) return;
    newest = null; // it may be asked again
    say(error.message, true);
  }
}

function showCompared(before, after, note) {
  const shown = [...new Set([...likeliest(before, 8), ...likeliest(after, 8)])].sort((i, j) => before[j] - before[i]);
  const most = shown.reduce((best, i) => Math.max(best, before[i], after[i]), 0);
  const distance = 0.5 * before.reduce((sum, p, i) => sum + Math.abs(p - after[i]), 0);
  const rows = shown.map((i) => {
    const change_ = after[i] - before[i];
    const sign = change_ > 0 ? "▲" : "▼";
    return el("tr", {}, el("th", { scope: "row", class: "mono" }, tokenText(i)), barCell(before[i], most), barCell(after[i], most), el("td", {}, `${sign} ${percent(Math.abs(change_))}`));
  });
  const head = el("tr", {}, ...["token", "beforeIt", "afterIt", "change"].map((key) => el("th", { scope: "col" }, t(key))));
  const [first, second] = [likeliest(before, 1)[0], likeliest(after, 1)[0]];
  place("compared", el("h3", {}, note),
    el("p", { "aria-live": "polite" }, first === second ? t("sameBest", tokenText(first)) : t("otherBest", tokenText(first), tokenText(second)), " ", t("moved", percent(distance))),
    scroller(note, el("table", { class: "compare" }, el("thead", {}, head), el("tbody", {}, ...rows))));
}

function barCell(p, most) {
  const line = bar("", percent(p), p / most);
  return el("td", {}, el("div", { class: "bar" }, ...line.childNodes));
}
