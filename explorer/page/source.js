// gpt2.py as it stands on disk, each line that ran beside what it made; the way about; the picture of one value.

import { app, callAt, change } from "./app.js";
import { isFile, numbers } from "./api.js";
import { axesText, choice, counted, el, number, place, tokenText } from "./dom.js";
import { heatMap, skyline } from "./heat.js";
import { t } from "./words.js";

const QUERIES = ["n_seq", "n_q", "n_last", "stop-start", "m"]; // axes whose places are the tokens of the text
const KEYS = ["n_k", "end", "n_slots"];
let wholeFile = false;
let wholeDoc = false;
let chosen = []; // on each axis but the last two of what is pictured

export const call = () => callAt(app.path);

// Opens a call, and of its values the one asked for, or the one that it returns.
export function openCall(path, pick = (value) => value.name === "return") {
  const opened = callAt(path);
  if (!opened) return undefined;
  const value = opened.values.findLast(pick) ?? opened.values.at(-1) ?? null;
  return change({ path, value });
}

export function showSource() {
  showPath();
  showTree();
  showCode();
}

function showPath() {
  const crumbs = app.path.map((label, i) => el("li", {}, choice(label, i === app.path.length - 1, () => openCall(app.path.slice(0, i + 1)))));
  const children = call().calls.filter((child) => child.function !== "transformer_block");
  const below = children.map((child) => el("li", {}, choice(child.label, false, () => openCall([...app.path, child.label]))));
  place("path", el("ol", { class: "crumbs" }, ...crumbs), ...(below.length ? [el("p", { class: "hint" }, t("callsBelow")), el("ul", { class: "crumbs below" }, ...below)] : []));
}

function showTree() {
  place("tree", el("ul", {}, branch(app.run.root, [])));
}

function branch(node, above) {
  const path = [...above, node.label];
  const isOpen = path.every((label, i) => label === app.path[i]) || (path[1] === app.path[1] && path.length > 1 && app.path.length > 1);
  const here = path.length === app.path.length && isOpen && path.every((label, i) => label === app.path[i]);
  const button = el("button", { type: "button", class: "node", "aria-current": here ? "true" : undefined, onclick: () => go(path) }, node.label);
  const children = isOpen || path.length === 1 ? node.calls.map((child) => branch(child, path)) : [];
  return el("li", {}, button, ...(children.length ? [el("ul", {}, ...children)] : []));
}

// To a call of any block: that of another than the open one runs the model again, for its values.
export function go(path, pick) {
  const block = path[1]?.startsWith("block ") ? Number(path[1].slice(6)) : app.block;
  if (block === app.block) openCall(path, pick);
  else document.dispatchEvent(new CustomEvent("go", { detail: { block, path, pick } }));
}

let shownPath = null; // of the call whose lines are shown, which stay where they are scrolled to

function showCode() {
  const opened = call();
  const scrolled = shownPath === String(app.path) ? document.querySelector("#code .lines")?.scrollTop : 0;
  shownPath = String(app.path);
  const { first, last } = app.about.functions[opened.function];
  const [docFirst, docLast] = app.about.functions[opened.function].doc;
  const isFolded = (line) => !wholeDoc && !wholeFile && line > docFirst && line <= docLast;
  const all = wholeFile ? app.about.lines.map((_, i) => i + 1) : Array.from({ length: last - first + 1 }, (_, i) => first + i);
  const lines = all.filter((line) => !isFolded(line));
  const toggle = el("input", { type: "checkbox", id: "whole", onchange: () => { wholeFile = toggle.checked; change({ path: app.path }); } });
  toggle.checked = wholeFile;
  const rows = lines.map((line) => codeLine(line, line >= first && line <= last ? opened : null));
  const picture = document.getElementById("picture"); // which may be among the lines that go
  if (lines.length < all.length) rows[docFirst - first].querySelector("code").append(unfold(docLast - docFirst));
  place("code",
    el("p", { class: "what" }, t(`about_${opened.function}`), ...inParts(opened)),
    el("div", { class: "lines", role: "region", tabindex: "0", "aria-label": t("sourceOf", app.about.file, opened.function) }, ...rows),
    el("p", { class: "hint" }, el("label", {}, toggle, ` ${t("wholeFile", app.about.file)}`)));
  putPicture(picture);
  const top = wholeFile ? document.querySelector(`[data-line="${first}"]`).offsetTop - 40 : 0;
  document.querySelector("#code .lines").scrollTop = scrolled || top;
}

// Of a long text, which queries each call of attention has, where that is one of several.
function inParts(opened) {
  const whole = opened.function === "attention" ? callAt(app.path.slice(0, -1)) : opened;
  const parts = whole.calls.filter((child) => child.function === "attention");
  if (parts.length < 2) return [];
  let first = 0;
  const said = parts.map(({ label, values }) => {
    const n = values.find((value) => value.name === "q").axes.at(-2)[1];
    first += n;
    return t("partHas", label, first - n, first - 1);
  });
  return [" ", t("inParts", said.join(t("semicolon")))];
}

// Beside the code; on a narrow screen, under the line whose picture it is.
export const narrow = matchMedia("(max-width: 58rem)");
narrow.addEventListener("change", () => putPicture(document.getElementById("picture")));

function putPicture(picture) {
  const line = narrow.matches && document.querySelector("#code .line.here");
  if (line) line.after(picture);
  else document.querySelector(".desk").append(picture);
}

// A long docstring shows its first line until it is asked for.
function unfold(n) {
  const more = () => { wholeDoc = true; change({ path: app.path }); };
  return el("button", { type: "button", class: "unfold", onclick: more }, t("moreLines", n));
}

function codeLine(line, opened) {
  const values = opened ? opened.values.filter((value) => value.line === line) : [];
  const calls = opened ? opened.calls.filter((child) => child.line === line) : [];
  const text = el("code", {}, ...linked(app.about.lines[line - 1], calls));
  const indent = text.textContent.match(/^ */)[0].length + 4; // what does not fit goes on below, further in
  text.style.paddingLeft = `${indent}ch`;
  text.style.textIndent = `-${indent}ch`;
  const isHere = values.includes(app.value);
  const row = el("div", { class: `line${values.length ? " ran" : ""}${isHere ? " here" : ""}`, "data-line": line }, el("span", { class: "n", "aria-hidden": "true" }, String(line)), text);
  if (values.length) row.append(el("span", { class: "made" }, ...made(values)));
  else if (calls.length) row.append(el("span", { class: "made" }, ...calls.slice(0, 1).map((child) => returned(child))));
  return row;
}

// The names of functions that were called here lead to these calls.
function linked(spans, calls) {
  const left = [...calls];
  return spans.map(([kind, text]) => {
    const i = kind === "name" ? left.findIndex((child) => child.function === text) : -1;
    if (i < 0) return kind ? el("span", { class: kind }, text) : text;
    const [child] = left.splice(i, 1);
    const block = text === "transformer_block" ? left.find((other) => other.label === `block ${app.block}`) ?? child : child;
    return el("button", { type: "button", class: "called", title: t("openCall", block.label), onclick: () => openCall([...app.path, block.label]) }, text);
  });
}

// What a line made: a button for each value; of a loop's, all under one name.
function made(values) {
  const groups = new Map();
  for (const value of values) groups.set(value.name, [...(groups.get(value.name) ?? []), value]);
  return [...groups].map(([name, group]) => {
    const value = group.includes(app.value) ? app.value : group.at(-1);
    const button = valueButton(name, value);
    if (group.length === 1 || !value.axes.length) return button;
    const several = group.map((each, i) => choice(String(i), each === app.value, () => change({ value: each }), { "aria-label": `${name}, ${t("time")} ${i}` }));
    return el("span", {}, button, el("span", { class: "several" }, ...several));
  });
}

function valueButton(name, value) {
  const shape = axesText(value.axes);
  const least = value.hidden ? "−∞" : number(value.min);
  const range = value.min === undefined ? "" : least === number(value.max) ? least : `${least} … ${number(value.max)}`;
  const amount = value.number === undefined ? range : `= ${number(value.number)}`;
  const parts = [el("b", {}, name === "return" ? "→" : name), shape && el("span", { class: "shape" }, shape), amount && el("span", { class: "range" }, amount)];
  return el("button", { type: "button", class: "value", title: name === "return" ? t("returns") : undefined, "aria-pressed": String(value === app.value), onclick: () => change({ value }) }, ...parts.filter(Boolean).flatMap((part) => [part, " "]));
}

function returned(child) {
  const value = child.values.findLast((each) => each.name === "return");
  const open = () => openCall([...app.path, child.label]);
  return el("button", { type: "button", class: "value", onclick: open }, el("b", {}, `${child.label} →`), el("span", { class: "shape" }, value ? axesText(value.axes) : ""));
}

// The picture

export async function showPicture() {
  const value = app.value;
  if (!value) return place("picture");
  const named = value.name === "return" ? t("returns") : value.name;
  const head = [
    el("h3", {}, named, el("span", { class: "where" }, ` ${app.path.slice(1).join(" › ") || app.path[0]}, ${t("line")} ${value.line}`)),
    el("p", { class: "axes" }, ...axesLine(value.axes)),
    ...changeOfAxes(value),
    ...axisOfWork(value),
  ];
  if (value.number !== undefined) return place("picture", ...head, el("p", { class: "big" }, number(value.number)));
  if (value.key === undefined) return place("picture", ...head, el("p", { class: "hint" }, t(isFile ? "notSaved" : "notKept")));
  const data = await numbers(value.key);
  if (value === app.value) place("picture", ...head, ...drawing(value, data));
}

function axesLine(axes) {
  if (!axes.length) return [t("oneNumber")];
  return axes.flatMap(([name, n], i) => [i ? " × " : "", el("span", { class: "axis" }, name === String(n) ? name : `${name} = ${n}`)]);
}

function drawing(value, data) {
  const axes = value.axes.map(([name, n], i) => [name, i === value.axes.length - 1 ? value.shown : n]);
  const [outer, inner] = [axes.slice(0, -2), axes.slice(-2)];
  const [rows, columns] = inner.length === 2 ? inner : [["1", 1], inner[0]];
  chosen = outer.map(([name, n], i) => Math.min(name === "n_head" ? app.head : name === "n_seq" ? app.token : (chosen[i] ?? 0), n - 1));
  const place_ = outer.reduce((at, [, n], i) => at * n + chosen[i], 0);
  const n = rows[1] * columns[1];
  const part = data.subarray(place_ * n, (place_ + 1) * n);
  const choosers = outer.map(([name, size], i) => chooser(name, size, i)).filter(Boolean);
  const cut = value.shown < value.axes.at(-1)[1] ? [el("p", { class: "hint" }, t("firstColumns", value.shown, value.axes.at(-1)[1]))] : [];
  if (inner.length === 1) return [...cut, skyline(part), oneRow(part)];
  const first = firstQuery(value, rows[1]);
  const [rowNames, columnNames] = [namesOf(rows, first), namesOf(columns, first)];
  const areTokens = rowNames && rows[0] !== "n_head";
  const about = `${value.name}, ${axesText(value.axes)}`;
  const map = { data: part, n_rows: rows[1], n_columns: columns[1], first: areTokens ? first : undefined, rows: rowNames, columns: columnNames, about };
  map.row = rows[0] === "n_head" ? app.head : 0;
  if (areTokens) map.row = app.token >= first && app.token < first + rows[1] ? app.token - first : undefined;
  if (areTokens) map.onrow = (row) => first + row !== app.token && change({ token: first + row });
  return [...choosers, ...cut, heatMap(map)];
}

function oneRow(part) {
  const shown = Array.from(part.slice(0, 24), number).join("  ");
  return el("p", { class: "some" }, part.length > 24 ? `${shown} …` : shown);
}

function chooser(name, n, i) {
  if (n === 1) return null;
  const pick = (j) => {
    chosen[i] = j;
    if (name === "n_head") change({ head: j });
    else if (name === "n_seq") change({ token: j });
    else showPicture();
  };
  const label = name === "n_head" ? t("head") : name;
  const parts = name === "3" ? ["q", "k", "v"] : Array.from({ length: Math.min(n, 64) }, (_, j) => String(j));
  const buttons = parts.map((text, j) => choice(text, j === chosen[i], () => pick(j)));
  return el("div", { class: "chooser", role: "group", "aria-label": label }, el("span", {}, `${label} `), ...buttons);
}

// Which token the first of n queries is: the last of them looks at itself last, so they end where keys do. Of a long text
// attention takes some queries at a time, with the keys up to these; where there are no keys, the newest tokens come last.
function firstQuery(value, n) {
  const values = call().values;
  const axes = [value, ...values.slice(values.indexOf(value)), ...values].flatMap((each) => each.axes);
  const keys = axes.find(([name, size]) => KEYS.includes(name) && name !== "n_slots" && size <= app.run.ids.length);
  return (keys ? keys[1] : app.run.ids.length) - n;
}

// The tokens along an axis, or null. first: that of queries.
function namesOf([name, n], first) {
  const ids = app.run.ids;
  if (QUERIES.includes(name) && n <= ids.length) return ids.slice(first, first + n).map(tokenText);
  if (KEYS.includes(name) && n <= ids.length) return ids.slice(0, n).map(tokenText);
  if (name === "n_head") return Array.from({ length: n }, (_, i) => `${t("head")} ${i}`);
  return null;
}

// What a line does to the axes, where its comment says from what to what.
function changeOfAxes(value) {
  const before = value.before;
  if (!before || value.name === "return" || String(before) === String(value.axes) || before.length + value.axes.length < 4) return [];
  const taken = takenAxis(before, value.axes);
  const left = before.filter((axis) => axis !== taken);
  const product = (axes) => axes.reduce((total, [, n]) => total * n, 1);
  if (product(left) !== product(value.axes)) return [];
  const names = (axes) => axes.map(([name]) => name);
  const links = isSwap(left, value.axes) ? swapLinks(before, value.axes) : groupLinks(before, value.axes);
  const swap = [names(left).join(", "), names(value.axes).join(", ")];
  const sentence = taken ? t("axesTaken", value.name, counted(taken[1]), taken[0], ...swap)
    : isSwap(before, value.axes) ? t("axesSwap", ...swap)
    : groupLinks(before, value.axes).filter(([from, to]) => from.length !== to.length).map(([from, to]) => (from.length < to.length
      ? t("axesSplit", names(from.map((i) => before[i])).join(" × "), names(to.map((i) => value.axes[i])).join(" × "))
      : t("axesMerge", names(from.map((i) => before[i])).join(" × "), names(to.map((i) => value.axes[i])).join(" × ")))).join(" ");
  return [el("div", { class: "change" }, axesDrawing(before, value.axes, links, taken), el("p", {}, sentence))];
}

// Along which axis a function works that takes each row apart.
const ROW_BY_ROW = ["layer_norm", "softmax"];

function axisOfWork(value) {
  const name = call().function;
  if (!ROW_BY_ROW.includes(name) || value.axes.length < 2 || value.axes.at(-1)[1] === 1) return [];
  const axes = value.axes.slice(-2);
  return [el("div", { class: "change along" }, alongDrawing(axes), el("p", {}, t(`along_${name}`, axes[1][0])))];
}

// A table, of which one row is worked on from end to end.
function alongDrawing([[rowName, n_rows], [columnName, n_columns]]) {
  const [left, top, width, row, n] = [120, 34, 280, 18, 5];
  const labels = [[columnName, n_columns], [rowName, n_rows]].map(([axis, size]) => (axis === String(size) ? axis : `${axis} ${size}`));
  const y = top + 2.5 * row;
  const rows = Array.from({ length: n }, (_, i) => svg("rect", { x: left, y: top + i * row, width, height: row, class: i === 2 ? "worked" : "" }));
  const arrow = svg("path", { d: `M ${left + 8} ${y} H ${left + width - 8} m -8 -5 l 8 5 l -8 5 M ${left + 16} ${y - 5} l -8 5 l 8 5` });
  return svg("svg", { viewBox: `0 0 420 ${top + n * row + 2}`, role: "img", "aria-label": t("worksAlong", columnName) }, ...rows, arrow,
    svg("text", { x: left + width / 2, y: 22, "text-anchor": "middle" }, labels[0]),
    svg("text", { x: left - 8, y: y + 5, "text-anchor": "end" }, labels[1]));
}

function svg(name, properties, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(properties)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Where all axes but one are still there, that one, of which a place was taken.
function takenAxis(before, after) {
  const gone = before.filter((axis) => !after.some((other) => String(other) === String(axis)));
  return before.length === after.length + 1 && gone.length === 1 ? gone[0] : null;
}

const isSwap = (before, after) => String(before.map(String).sort()) === String(after.map(String).sort());
const swapLinks = (before, after) => before.map((axis, i) => [[i], after.flatMap((other, j) => (String(other) === String(axis) ? [j] : []))]);

// Which axes become which, where they keep their order: groups of the same number of numbers.
function groupLinks(before, after) {
  const groups = [];
  for (let i = 0, j = 0; i < before.length || j < after.length; ) {
    const [from, to] = [[i], [j]];
    let [a, b] = [before[i++]?.[1] ?? 1, after[j++]?.[1] ?? 1];
    while (a !== b && (i < before.length || j < after.length)) {
      if (a < b && i < before.length) { from.push(i); a *= before[i++][1]; }
      else if (j < after.length) { to.push(j); b *= after[j++][1]; }
      else break;
    }
    groups.push([from.filter((k) => k < before.length), to.filter((k) => k < after.length)]);
  }
  return groups;
}

// taken: the axis of which a place was taken, which leads nowhere, or null.
function axesDrawing(before, after, links, taken) {
  const [width, box, row] = [420, 30, 34];
  const label = ([name, n]) => (name === String(n) ? name : `${name} ${n}`);
  const weight = (axis) => Math.max(4, label(axis).length + 1); // a box as wide as its name
  const whole = (axes) => axes.reduce((sum, axis) => sum + weight(axis), 0);
  const left = (axes, i) => (width * whole(axes.slice(0, i))) / whole(axes);
  const wide = (axes, i) => (width * weight(axes[i])) / whole(axes);
  const middle = (axes, i) => left(axes, i) + wide(axes, i) / 2;
  const boxes = (axes, y) => axes.flatMap((axis, i) => [
    svg("rect", { x: left(axes, i) + 3, y, width: wide(axes, i) - 6, height: box, rx: 4, class: axis === taken ? "taken" : "" }),
    svg("text", { x: middle(axes, i), y: y + 20, "text-anchor": "middle" }, label(axis)),
  ]);
  const lines = links.flatMap(([from, to]) => from.flatMap((i) => to.map((j) => svg("line", { x1: middle(before, i), y1: box + 1, x2: middle(after, j), y2: box + row }))));
  const said = t("axesFromTo", axesText(before), axesText(after));
  return svg("svg", { viewBox: `0 0 ${width} ${2 * box + row + 2}`, role: "img", "aria-label": said }, ...lines, ...boxes(before, 1), ...boxes(after, box + row));
}
