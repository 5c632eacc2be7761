// Numbers as a picture: a heat map, the bars of one of its rows, and a table with the same numbers.

import { counted, el, number, scroller } from "./dom.js";
import { t } from "./words.js";

const LABEL = 16; // pixels of text
const COLUMNS = 12; // of a table, at a time

// The page's colours, and its font for code: asked for once, since each time the browser brings all styles up to date.
const theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["zero", "more", "less", "plus", "minus", "line", "ink", "accent", "mono"]) theme[name] = style.getPropertyValue(`--${name}`).trim();
}

readTheme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readTheme); // before main.js hears of it

// { data, n_rows, n_columns, rows: names or null, first: where they are tokens, the place of the first, columns: names or null, row: the chosen one, onrow, about,
//   told: what is said of a row's numbers, its sum and length unless given }
export function heatMap(map) {
  map.scale = scaleOf(map.data, map.n_columns);
  map.isHidden = map.data.includes(-Infinity);
  Object.assign(map, layout(map));
  const readout = el("p", { class: "readout", "aria-live": "polite" }, t("pointAt"));
  const canvas = el("canvas", { class: "heat", tabindex: "0", role: "img", "aria-label": `${map.about}. ${t("heatKeys")}` });
  canvas.style.height = `${Math.round(map.top + map.height + map.foot)}px`;
  const picture = el("figure", { class: "picture" }, canvas, legend(map), readout, el("div", { class: "row" }), table(map));
  const paint = () => drawHeat(canvas, map);
  const point = (row, column) => {
    [row, column] = [clamp(row, map.n_rows), clamp(column, map.n_columns)];
    canvas.cell = [row, column];
    const x = map.data[row * map.n_columns + column];
    readout.textContent = `${name(map.rows, row, t("row"), map.first)} → ${name(map.columns, column, t("column"), 0)}: ${number(x)}`;
  };
  canvas.point = point; // and its cell, where somebody points: place() hands them on to the map that is made in its place
  const choose = (row) => {
    map.row = row;
    paint();
    picture.querySelector(".row").replaceChildren(...rowBars(map));
    map.onrow?.(row);
  };
  const at = (event) => {
    return [Math.floor(((event.offsetY - map.top) / map.height) * map.n_rows), Math.floor(((event.offsetX - map.left) / widthOf(canvas, map)) * map.n_columns)];
  };
  canvas.addEventListener("mousemove", (event) => point(...at(event)));
  canvas.addEventListener("click", (event) => choose(clamp(at(event)[0], map.n_rows)));
  canvas.addEventListener("keydown", (event) => {
    const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [];
    if (down === undefined && event.key !== "Enter") return;
    event.preventDefault();
    const [row, column] = canvas.cell ?? [map.row ?? 0, 0];
    if (event.key === "Enter") choose(row);
    else point(row + down, column + right);
  });
  new ResizeObserver(paint).observe(canvas);
  picture.querySelector(".row").replaceChildren(...rowBars(map));
  return picture;
}

const clamp = (i, n) => Math.max(0, Math.min(n - 1, i));
const name = (names, i, kind, first) => (names ? `${names[i]}${first === undefined ? "" : ` (${first + i})`}` : `${kind} ${i}`);

// How a map is coloured: from 0 up in one direction, or to both sides of 0. Shares of 1, such as the weights of attention,
// are the smaller the more share in them, so that each row has a scale of its own, up to its largest.
export function scaleOf(data, n_columns) {
  let least = 0;
  let most = 0;
  for (const x of data) {
    if (!Number.isFinite(x)) continue;
    least = Math.min(least, x);
    most = Math.max(most, x);
  }
  if (least >= 0) return { low: 0, high: most, ends: most, byRow: areShares(data, n_columns) };
  const every = Math.ceil(data.length / 5000); // of many numbers, some will do
  const some = Float32Array.from({ length: Math.ceil(data.length / every) }, (_, i) => Math.abs(data[i * every]));
  const sizes = some.filter(Number.isFinite).sort();
  const ends = sizes[Math.floor(0.995 * (sizes.length - 1))] || 1; // a few outliers would leave all else pale
  return { low: least, high: most, ends, signed: true };
}

const areShares = (data, n_columns) => rowsOf(data, n_columns).every((row) => Math.abs(row.reduce((sum, x) => sum + x, -1)) < 0.01);
const rowsOf = (data, n_columns) => Array.from({ length: data.length / n_columns }, (_, i) => data.subarray(i * n_columns, (i + 1) * n_columns));

// The data as pixels, one a number.
export function pixels(data, n_rows, n_columns, scale = scaleOf(data, n_columns)) {
  const [zero, more, less] = [theme.zero, theme.more, theme.less].map((colour) => colour.split(" ").map(Number));
  const image = new ImageData(n_columns, n_rows);
  const ends = scale.byRow && rowsOf(data, n_columns).map((row) => row.reduce((most, x) => Math.max(most, x)));
  for (let i = 0; i < n_rows * n_columns; i++) {
    const x = data[i];
    const share = Number.isFinite(x) ? Math.min(1, Math.abs(x) / ((scale.byRow ? ends[Math.floor(i / n_columns)] : scale.ends) || 1)) : 0;
    const to = x < 0 ? less : more;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = zero[c] + share * (to[c] - zero[c]);
    image.data[4 * i + 3] = x === -Infinity ? 0 : 255; // what is hidden is left to the pattern behind
  }
  const small = el("canvas", { width: n_columns, height: n_rows });
  small.getContext("2d").putImageData(image, 0, 0);
  return small;
}

// A small picture, without names.
export function thumbnail(data, n_rows, n_columns, width = 120, height = 64) {
  const canvas = el("canvas", { class: "thumbnail", width: 2 * width, height: 2 * height, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = n_rows > height || n_columns > width;
  context.drawImage(pixels(data, n_rows, n_columns), 0, 0, 2 * width, 2 * height);
  return canvas;
}

const rowHeight = (map) => (map.n_rows <= 24 ? 26 : Math.max(6, 520 / map.n_rows));

// Where the cells are: what is left of them, above and below, and their height.
function layout(map) {
  const labels = (names) => Math.min(110, Math.max(...names.map((text) => 9.7 * [...text].length)) + 14);
  return { left: map.rows ? labels(map.rows) : 36, top: Math.max(2, (LABEL - rowHeight(map)) / 2), foot: map.columns ? labels(map.columns) : 26, height: rowHeight(map) * map.n_rows };
}

const widthOf = (canvas, map) => Math.max(40, canvas.clientWidth - map.left - 2);

function drawHeat(canvas, map) {
  if (!canvas.clientWidth) return;
  const { left, top, height } = map;
  const width = widthOf(canvas, map);
  const sharp = devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * sharp);
  canvas.height = Math.round(canvas.clientHeight * sharp);
  const context = canvas.getContext("2d");
  context.scale(sharp, sharp);
  if (map.isHidden) {
    context.fillStyle = hatch(context, theme.line);
    context.fillRect(left, top, width, height);
  }
  context.imageSmoothingEnabled = map.n_columns > 2 * width;
  map.pixels ??= pixels(map.data, map.n_rows, map.n_columns, map.scale);
  context.drawImage(map.pixels, left, top, width, height);
  context.strokeStyle = theme.line;
  context.strokeRect(left, top, width, height);
  context.font = `${LABEL}px ${theme.mono}`;
  context.textBaseline = "middle";
  drawNames(context, map, width);
}

function hatch(context, colour) {
  const tile = el("canvas", { width: 6, height: 6 });
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour;
  pen.moveTo(0, 6);
  pen.lineTo(6, 0);
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

function drawNames(context, map, width) {
  const { left, top, height } = map;
  const h = height / map.n_rows;
  const w = width / map.n_columns;
  const text = (i, names) => shortened(names ? names[i] : String(i));
  context.textAlign = "right";
  const every = Math.ceil((LABEL + 3) / h);
  for (let i = 0; i < map.n_rows; i++) {
    const chosen = i === map.row;
    const nearChosen = Math.abs(i - map.row) * h < LABEL + 2;
    if (!chosen && (i % every || nearChosen)) continue;
    context.fillStyle = chosen ? theme.accent : theme.ink;
    context.fillText((chosen ? "▸" : "") + text(i, map.rows), left - 6, top + (i + 0.5) * h);
  }
  if (map.row !== undefined && map.row < map.n_rows) {
    context.strokeStyle = theme.accent;
    context.lineWidth = 2;
    context.strokeRect(left, top + map.row * h, width, h);
  }
  context.fillStyle = theme.ink;
  const step = map.columns ? Math.ceil((LABEL + 3) / w) : Math.ceil(map.n_columns / Math.max(2, Math.floor(width / 70)));
  for (let i = 0; i < map.n_columns; i += step) {
    context.save();
    context.translate(left + (i + 0.5) * w, top + height + 6);
    if (map.columns) context.rotate(-Math.PI / 2);
    else context.translate(0, LABEL / 2 + 2);
    context.textAlign = map.columns ? "right" : i === 0 ? "left" : "center";
    context.fillText(text(i, map.columns), 0, 0);
    context.restore();
  }
}

const shortened = (text) => ([...text].length > 10 ? `${[...text].slice(0, 9).join("")}…` : text);

function legend({ isHidden, scale }) {
  const from = scale.signed ? `≤ ${number(-scale.ends)}` : "0";
  const to = scale.byRow ? t("rowsLargest") : `${scale.signed && scale.high > scale.ends ? "≥ " : ""}${number(scale.ends)}`;
  const hidden = isHidden ? el("span", {}, " · ", el("span", { class: "hatch" }), ` ${t("hidden")}`) : "";
  return el("figcaption", { class: "legend" }, el("span", {}, from), el("span", { class: scale.signed ? "ramp signed" : "ramp" }), el("span", {}, to), hidden);
}

// The chosen row: as bars with names where the columns have them, else as a skyline.
function rowBars(map) {
  if (map.row === undefined || map.row >= map.n_rows) return [];
  const row = map.data.slice(map.row * map.n_columns, (map.row + 1) * map.n_columns);
  const seen = row.filter(Number.isFinite);
  const told = map.told ?? (map.scale.byRow ? sumOf : sumAndLength);
  const heading = el("p", { class: "rowsum" }, `${name(map.rows, map.row, t("row"), map.first)}: ${told(seen)}`);
  if (!map.columns || row.length === 1) return [heading, skyline(row)];
  const order = Array.from(seen.keys()).sort((i, j) => Math.abs(row[j]) - Math.abs(row[i])).slice(0, 6);
  const most = Math.abs(row[order[0]]) || 1;
  return [heading, el("ol", { class: "bars" }, ...order.map((i) => bar(`${map.columns[i]} (${i})`, number(row[i]), Math.abs(row[i]) / most)))];
}

const sumOf = (row) => `${t("sumIs")} ${sumOfRow(row).toFixed(3).replace("-", "−")}`;
const sumAndLength = (row) => `${sumOf(row)} · ${t("sizeIs")} ${number(Math.sqrt(sumOfRow(row.map((x) => x * x))))} (${t("rootOfSquares")})`;
export const sumOfRow = (row) => row.reduce((sum, x) => sum + x, 0);

// A line with a bar: its name, its length from 0 to 1, its number.
export function bar(name, text, length, kind = "") {
  const filled = el("span", { class: "fill" });
  filled.style.width = `${100 * Math.max(0, Math.min(1, length))}%`;
  return el("li", { class: `bar ${kind}` }, el("span", { class: "name" }, name), el("span", { class: "track" }, filled), el("span", { class: "amount" }, text));
}

// Bars of many numbers, up and down from 0; many share a pixel's column, where the largest is seen.
export function skyline(row) {
  const [width, height] = [720, 120];
  const canvas = el("canvas", { class: "skyline", width, height, role: "img", "aria-label": t("skyline", row.length) });
  const context = canvas.getContext("2d");
  const most = row.reduce((size, x) => (Number.isFinite(x) ? Math.max(size, Math.abs(x)) : size), 0) || 1;
  const negative = row.some((x) => x < 0);
  const zero = negative ? height / 2 : height;
  for (let i = 0; i < row.length; i++) {
    if (!Number.isFinite(row[i])) continue;
    const long = (row[i] / most) * (negative ? height / 2 : height);
    context.fillStyle = row[i] < 0 ? theme.minus : theme.plus;
    context.fillRect((i / row.length) * width, long > 0 ? zero - long : zero, Math.max(1, width / row.length - 1), Math.max(1, Math.abs(long)));
  }
  return canvas;
}

// The same numbers, to be read or read aloud: some columns at a time.
function table(map) {
  const shown = el("div");
  const details = el("details", { class: "numbers" }, el("summary", {}, t("asTable")), shown);
  let first = 0;
  const turnBy = (by) => {
    first += by;
    fill();
    const buttons = [...shown.querySelectorAll(".turns button")];
    buttons.sort((a, b) => a.disabled - b.disabled || (a.value === String(by) ? -1 : 1))[0].focus(); // the one that was pressed, unless it led to the end
  };
  const fill = () => {
    const last = Math.min(first + COLUMNS, map.n_columns);
    const columns = Array.from({ length: last - first }, (_, i) => first + i);
    const head = el("tr", {}, el("td", {}), ...columns.map((i) => el("th", { scope: "col" }, name(map.columns, i, "", 0))));
    const rows = Array.from({ length: map.n_rows }, (_, r) =>
      el("tr", {}, el("th", { scope: "row" }, name(map.rows, r, "", map.first)), ...columns.map((i) => el("td", {}, number(map.data[r * map.n_columns + i])))));
    const turn = (by) => el("button", { type: "button", value: by, onclick: () => turnBy(by), disabled: first + by < 0 || first + by >= map.n_columns }, by < 0 ? "←" : "→");
    const turns = map.n_columns > COLUMNS ? [el("p", { class: "turns" }, turn(-COLUMNS), ` ${t("columnsOf", first, last - 1, counted(map.n_columns))} `, turn(COLUMNS))] : [];
    const caption = el("caption", {}, map.about);
    shown.replaceChildren(...turns, scroller(map.about, el("table", {}, caption, el("thead", {}, head), el("tbody", {}, ...rows))));
  };
  details.addEventListener("toggle", () => details.open && !details.querySelector("table") && fill());
  return details;
}
