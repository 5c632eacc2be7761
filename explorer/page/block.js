// A block, opened: its parts in order, each with its picture; all its heads; the residual stream through all blocks.

import { app, change, inBlock, lastValue } from "./app.js";
import { isFile, numbers } from "./api.js";
import { axesText, choice, el, number, percent, place, scroller, tokenText } from "./dom.js";
import { heatMap, thumbnail, sumOfRow } from "./heat.js";
import { go } from "./source.js";
import { t } from "./words.js";

const HABITS = ["before", "first", "self", "copy", "after"];
let habit = "before";

// What is shown of a block: [what it is, which calls lead to it, the value's name]
const PARTS = [
  ["partIn", [], "x", true],
  ["partNorm", ["layer_norm"], "return"],
  ["partQ", ["mha"], "q"],
  ["partK", ["mha"], "k"],
  ["partV", ["mha"], "v"],
  ["partScores", ["mha", "attention"], "scores"],
  ["partWeights", ["mha", "attention"], "weights"],
  ["partHeads", ["mha", "causal_attention"], "return"],
  ["partMha", ["mha"], "return"],
  ["partAdded", [], "x"],
  ["partNorm2", ["layer_norm ln_2"], "return"],
  ["partUp", ["ffn"], "a"],
  ["partFfn", ["ffn"], "return"],
  ["partOut", [], "return"],
];

const pictures = new Map(); // of the numbers that are shown: a key and a place among them -> what was drawn and measured

// Of a run that is gone, nothing is kept.
export const forgetPictures = () => pictures.clear();

function pictured(key, at, make) {
  const name = `${key} ${at}`;
  if (!pictures.has(name)) pictures.set(name, make());
  return pictures.get(name);
}

export async function showBlock() {
  const blocks = Array.from({ length: app.about.hparams.n_layer }, (_, i) => choice(String(i), i === app.block, () => go(["gpt2", `block ${i}`])));
  place("blocks", el("span", {}, `${t("block")} `), ...blocks);
  const { run, block, head } = app;
  const cards = await Promise.all(PARTS.map(card));
  if (run === app.run && block === app.block && head === app.head) place("parts", ...cards.filter(Boolean));
}

async function card([what, names, name, first]) {
  const found = inBlock(...names);
  const value = first ? found?.call.values.find((each) => each.name === name) : lastValue(found?.call, name);
  if (!value) return null;
  const open = () => {
    go(found.path, (each) => each === value);
    document.getElementById("source").scrollIntoView();
  };
  const parts = [el("span", { class: "title" }, t(what)), el("span", { class: "mono" }, `${name === "return" ? found.call.label : name} ${axesText(value.axes)}`)];
  if (value.key !== undefined) {
    const data = await numbers(value.key);
    const n = value.axes.slice(-2).reduce((product, [, size]) => product * size, 1);
    const at = value.axes.length > 2 ? Math.min(app.head, value.axes[0][1] - 1) * n : 0;
    const { picture, size } = pictured(value.key, at, () => ({
      picture: thumbnail(data.subarray(at, at + n), value.axes.at(-2)[1], value.axes.at(-1)[1], 150, 48),
      size: value.axes.length === 2 ? meanSize(data, value.axes) : null,
    }));
    parts.splice(1, 0, picture);
    if (size !== null) parts.push(el("span", { class: "hint" }, `${t("sizeIs")} ${number(size)}`));
  }
  return el("li", { class: ["partIn", "partAdded", "partOut"].includes(what) ? "stream" : "" }, el("button", { type: "button", class: "card", onclick: open }, ...parts));
}

// The length of a row, on average: how loud a part speaks into the residual stream.
function meanSize(data, [[, n_rows], [, n_columns]]) {
  let total = 0;
  for (let r = 0; r < n_rows; r++) {
    let sum = 0;
    for (let c = 0; c < n_columns; c++) sum += data[r * n_columns + c] ** 2;
    total += Math.sqrt(sum);
  }
  return total / n_rows;
}

// The weights of the open block; isCurrent: whether it is still open once they have come. A file has no room for all blocks'.
async function weights() {
  const key = app.run.weights[app.block];
  const data = key === null ? null : await numbers(key);
  const n = app.run.ids.length;
  return { key, n, of: (head) => data.subarray(head * n * n, (head + 1) * n * n), isCurrent: key === app.run.weights[app.block] };
}

export async function showThumbs() {
  const { key, n, of, isCurrent } = await weights();
  if (!isCurrent) return;
  if (key === null) return place("thumbs");
  const told = app.run.habits[app.block];
  const thumbs = Array.from({ length: app.about.hparams.n_head }, (_, head) => el("button", { type: "button", class: "card", "data-head": `${app.block} ${head}`, onclick: () => change({ head }) },
    el("span", { class: "title" }, `${t("head")} ${head}`), pictured(key, `head ${head}`, () => thumbnail(of(head), n, n, 100, 100)), el("span", { class: "hint" }, told[habit] ? `${t(`short_${habit}`)} ${percent(told[habit][head])}` : "")));
  place("thumbs", ...thumbs);
  markHead();
}

// Which head is looked at, among the small pictures and the habits.
export function markHead() {
  for (const button of document.querySelectorAll("[data-head]")) button.setAttribute("aria-pressed", String(button.dataset.head === `${app.block} ${app.head}`));
}

export async function showHead() {
  const { key, n, of, isCurrent } = await weights();
  if (!isCurrent) return;
  if (key === null) return place("head", el("p", { class: "hint" }, t(isFile ? "notSaved" : "notKept")));
  const names = app.run.ids.map(tokenText);
  const about = t("weightsOf", app.block, app.head);
  const map = { data: of(app.head), n_rows: n, n_columns: n, rows: names, first: 0, columns: names, row: app.token, about, onrow: (token) => change({ token }) };
  const off = el("button", { type: "button", class: "act", onclick: () => switchOff(app.block, app.head) }, t("switchOff", app.block, app.head));
  const see = el("button", { type: "button", class: "plain", onclick: () => openWeights() }, t("seeLine"));
  place("head", el("h3", {}, about), el("p", { class: "hint" }, t("readHead")), heatMap(map), el("p", {}, ...(isFile ? [] : [off, " "]), see));
}

function switchOff(block, head) {
  if (!app.off.some((part) => part.block === block && part.head === head)) change({ off: [...app.off, { block, head }] });
  document.getElementById("experiments").scrollIntoView();
}

function openWeights() {
  const found = inBlock("mha", "attention");
  if (found) go(found.path, (value) => value.name === "weights");
  document.getElementById("source").scrollIntoView();
}

// Which head has which habit: a number for each head of each block.
export function showHabits() {
  const kinds = HABITS.filter((kind) => app.run.habits[0][kind]);
  if (!kinds.length) return place("habits", el("p", { class: "hint" }, t("noHabits")));
  if (!kinds.includes(habit)) habit = kinds[0];
  const rows = app.run.habits.map((told) => told[habit]);
  const best = rows.flatMap((row, block) => row.map((share, head) => ({ block, head, share }))).sort((a, b) => b.share - a.share)[0];
  const chooser = kinds.map((kind) => choice(t(`habit_${kind}`), kind === habit, () => { habit = kind; showHabits(); showThumbs(); }));
  const cell = (share, block, head) => {
    const isBest = block === best.block && head === best.head;
    const button = el("button", { type: "button", "data-head": `${block} ${head}`, title: `${t("block")} ${block}, ${t("head")} ${head}: ${percent(share)}`, onclick: () => openHead(block, head) }, `${Math.round(100 * share)}${isBest ? " ★" : ""}`);
    button.style.setProperty("--share", Math.min(1, share / Math.max(best.share, 1e-9)));
    return el("td", {}, button);
  };
  const { n_head } = app.about.hparams;
  const head = el("tr", {}, el("td", {}), ...Array.from({ length: n_head }, (_, i) => el("th", { scope: "col" }, `${t("head")} ${i}`)));
  const body = rows.map((row, block) => el("tr", {}, el("th", { scope: "row" }, `${t("block")} ${block}`), ...row.map((share, i) => cell(share, block, i))));
  place("habits", el("div", { class: "chooser", role: "group", "aria-label": t("habits") }, ...chooser),
    el("p", {}, t("mostHabit", t(`habit_${habit}`), best.block, best.head, percent(best.share), percent(evenly(habit)))),
    scroller(t("habits"), el("table", { class: "grid" }, el("caption", {}, t("habitsCaption", t(`habit_${habit}`))), el("thead", {}, head), el("tbody", {}, ...body))));
  markHead();
}

export function openHead(block, head) {
  change({ head });
  if (block !== app.block) go(["gpt2", `block ${block}`]);
}

// How much a head would give to these tokens if it gave each that it sees the same.
function evenly(kind) {
  const ids = app.run.ids;
  const shares = ids.flatMap((id, i) => {
    const seen = ids.slice(0, i + 1);
    const n = { before: i > 0 ? 1 : 0, first: i > 1 ? 1 : 0, self: 1, copy: seen.slice(0, i).filter((other) => other === id).length, after: seen.filter((_, j) => j > 0 && ids[j - 1] === id && j - 1 < i).length }[kind];
    return n ? [n / (i + 1)] : [];
  });
  return shares.reduce((sum, share) => sum + share, 0) / shares.length;
}

// The residual stream: how long each token's row is before the first block and after each.
export function showStream() {
  const { norms, ids } = app.run;
  const data = Float32Array.from(norms.flat());
  const rows = norms.map((_, i) => (i ? `${t("block")} ${i - 1}` : t("embeddings")));
  const map = { data, n_rows: norms.length, n_columns: ids.length, rows, columns: ids.map(tokenText), row: app.block + 1, about: t("streamAbout"), told: meanLength, onrow: (row) => row > 0 && go(["gpt2", `block ${row - 1}`]) };
  place("stream", heatMap(map));
}

const meanLength = (row) => t("meanLength", number(sumOfRow(row) / row.length));
