// The logit lens: what gpt2() would say if it stopped before a block.

import { app, isOfRun } from "./app.js";
import { ask } from "./api.js";
import { counted, el, percent, place, scroller, tokenText } from "./dom.js";
import { go } from "./source.js";
import { t } from "./words.js";

const N = 8; // positions beside one another

let seen = null;

export async function lookThrough() {
  const n = app.run.ids.length;
  const last = Math.max(Math.min(n, N), Math.min(n, app.token + 1));
  const positions = Array.from({ length: Math.min(N, n) }, (_, i) => last - Math.min(N, n) + i);
  if (!seen || !isOfRun(seen.ids) || !seen.positions.includes(app.token)) {
    const { ids } = app.run;
    const answer = await ask("lens", { ids, positions });
    if (!isOfRun(ids) || !positions.includes(app.token)) return; // another text has run, or place was chosen, meanwhile
    const columns = positions.map((position) => answer.positions.indexOf(position)); // a file answers for all positions
    seen = { ids, positions, rows: answer.rows.map((row) => columns.map((column) => row[column])) };
  }
  showLens();
}

function showLens() {
  const { rows, positions, ids } = seen;
  const stage = (i) => (i === 0 ? t("embeddings") : t("afterBlock", i - 1));
  const cell = (view, i, column) => {
    const isFinal = view.final_rank === 1;
    const label = t("lensCell", stage(i), tokenText(ids[positions[column]]), tokenText(view.id), percent(view.p));
    const button = el("button", { type: "button", title: label, onclick: () => go(["gpt2", `block ${Math.max(0, i - 1)}`]) }, el("span", {}, `${isFinal ? "✓ " : ""}${tokenText(view.id)}`), " ", el("span", { class: "p" }, percent(view.p)));
    button.style.setProperty("--share", view.p);
    return el("td", { class: positions[column] === app.token ? "here" : "" }, button);
  };
  const head = el("tr", {}, el("td", {}), ...positions.map((i) => el("th", { scope: "col", class: "mono" }, tokenText(ids[i]))));
  const body = rows.map((row, i) => el("tr", {}, el("th", { scope: "row" }, stage(i)), ...row.map((view, column) => cell(view, i, column))));
  const some = positions.length < ids.length ? t("lensSome", positions.length, ids.length) : "";
  const caption = t("lensCaption") + some;
  place("seen", scroller(t("lensTitle"), el("table", { class: "grid lens" }, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, ...body))), ...rise());
  const [box, here] = ["#seen .scroll", "#seen .here"].map((selector) => document.querySelector(selector));
  // where not all columns are in view; in the next frame, so that all is laid out once
  if (here) requestAnimationFrame(() => { box.scrollLeft = here.offsetLeft + here.offsetWidth - box.clientWidth; });
}

// How the token that the model chose in the end rose, at the place looked at.
function rise() {
  const column = seen.positions.indexOf(app.token);
  if (column < 0) return [];
  const final = seen.rows.at(-1)[column].id;
  const steps = seen.rows.map((row, i) => el("li", {}, t("rise", i === 0 ? t("embeddings") : t("afterBlock", i - 1), counted(row[column].final_rank), percent(row[column].final_p))));
  return [el("h3", {}, t("riseOf", tokenText(final), tokenText(seen.ids[app.token]))), el("ol", { class: "rise" }, ...steps)];
}
