// The text in tokens, with their ids and bytes; how a word became its tokens.

import { app, change } from "./app.js";
import { bytesOf, el, hex, place, readable, tokenText } from "./dom.js";
import { t } from "./words.js";

export function showChips() {
  const chips = app.run.ids.map((id, i) => el("button", { type: "button", class: "token", title: t("tokenLabel", i, tokenText(id), id), onclick: () => change({ token: i }) }, el("span", { class: "text" }, tokenText(id)), " ", el("span", { class: "id" }, String(id))));
  place("chips", ...chips);
}

export function showToken() {
  for (const [i, chip] of [...document.getElementById("chips").children].entries()) chip.setAttribute("aria-pressed", String(i === app.token));
  const id = app.run.ids[app.token];
  const bytes = bytesOf(app.about.tokens[id]);
  place("token", el("p", {}, t("tokenIs", app.token, tokenText(id), id), " ", el("span", { class: "mono" }, hex(bytes)), " ", t("bytes", bytes.length)), ...merges());
}

function merges() {
  const word = app.run.words.findLast((each) => each.first <= app.token);
  if (!word) return app.run.words.length ? [] : [el("p", { class: "hint" }, t("noMerges"))];
  const steps = word.steps.map((step, i) => {
    const symbols = step.symbols.map((symbol, j) => el("span", { class: `symbol${j === step.joined ? " joined" : ""}` }, readable(symbol)));
    const said = i === 0 ? t("asBytes") : t("mergeRank", readable(step.symbols[step.joined]), step.rank);
    return el("li", {}, el("span", { class: "symbols" }, ...symbols), " ", el("span", { class: "hint" }, said));
  });
  return [el("details", {}, el("summary", {}, t("howMerged", readable(word.steps[0].symbols.join("")))), el("ol", { class: "merges" }, ...steps), el("p", { class: "hint" }, t("mergeRule")))];
}
