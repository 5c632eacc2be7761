// Small helpers: elements, numbers and tokens as text.

import { app } from "./app.js";
import { t } from "./words.js";

// el("button", { class: "chip", onclick: f, "aria-pressed": true }, "text", child)
export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== null));
  return element;
}

// A button that is one of several, of which one is chosen.
export const choice = (text, chosen, onclick, properties = {}) =>
  el("button", { type: "button", class: "choice", "aria-pressed": String(Boolean(chosen)), onclick, ...properties }, text);

// Whoever works without a mouse stays where he was: the control that had the focus has it again, made anew, and in a map
// the cell that he had come to.
export function place(id, ...children) {
  const box = document.getElementById(id);
  const focused = box.contains(document.activeElement) ? document.activeElement : null;
  const nth = focused && alike(box, focused).indexOf(focused);
  box.replaceChildren(...children);
  const again = focused && alike(box, focused)[nth];
  if (!again) return;
  again.focus({ preventScroll: true });
  if (focused.cell) again.point(...focused.cell);
}

// Of the controls in a box those that read as this one does.
const alike = (box, control) => [...box.querySelectorAll(control.localName)].filter((other) => (control.id ? other.id === control.id : other.textContent === control.textContent));

// A table that may be wider than its place: it scrolls within itself, and where it does, a line says so.
export function scroller(label, table) {
  const box = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
  const sign = el("p", { class: "hint sign", hidden: true }, t("scrollsSideways"));
  new ResizeObserver(() => { sign.hidden = box.scrollWidth <= box.clientWidth; }).observe(box);
  return el("div", {}, sign, box);
}

// One line under the prompt: what was done, or what went wrong.
export function say(text, isError = false) {
  const status = document.getElementById("status");
  status.textContent = text;
  status.classList.toggle("error", isError);
}

export function number(x) {
  if (!Number.isFinite(x)) return x > 0 ? "∞" : Number.isNaN(x) ? "NaN" : "−∞";
  const size = Math.abs(x);
  const text = size === 0 || Number.isInteger(x) ? String(x) : size >= 1000 || size < 0.001 ? x.toExponential(2) : x.toPrecision(3);
  return text.replace("-", "−");
}

export const signed = (x) => (x < 0 ? number(x) : `+${number(x)}`);
export const percent = (p) => `${(100 * p).toFixed(p < 0.1 ? 2 : 1)} %`;
const thousands = new Intl.NumberFormat("en");
export const counted = (n) => thousands.format(n);

// The bytes that GPT-2's vocabulary writes as printable characters: those of Latin-1 as themselves, the rest from U+0100.
const byteOf = new Map();
for (let byte = 0, next = 256; byte < 256; byte++) {
  const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  byteOf.set(String.fromCharCode(printable ? byte : next++), byte);
}

export const bytesOf = (symbol) => Uint8Array.from(symbol, (character) => byteOf.get(character) ?? 63);
export const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");

// A symbol of the vocabulary as it is read: its text, with spaces and line breaks to see, or its bytes if it is a part.
export function readable(symbol) {
  const bytes = bytesOf(symbol);
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/\p{Cc}/gu, (c) => `‹${hex(bytesOfText(c))}›`);
  } catch {
    return `‹${hex(bytes)}›`;
  }
}

const bytesOfText = (text) => new TextEncoder().encode(text);

export const tokenText = (id) => readable(app.about.tokens[id]);

// The text of many ids as it is, parts of characters and all.
export function textOf(ids) {
  return new TextDecoder().decode(Uint8Array.from(ids.flatMap((id) => [...bytesOf(app.about.tokens[id])])));
}

export const axesText = (axes) => (axes.length ? `[${axes.map(([name, n]) => (name === String(n) ? name : `${name} ${n}`)).join(", ")}]` : "");
