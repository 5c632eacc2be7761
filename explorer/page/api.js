// Questions to explore.py, and the numbers that its answers name. A page that was saved as a file has both inside.

import { t } from "./words.js";

const inside = document.getElementById("inside");
const saved = inside ? JSON.parse(inside.textContent) : null;
const secret = location.hash.slice(1);
const fetched = new Map(); // key: a promise of the numbers

export const isFile = saved !== null;

export async function ask(kind, question = {}) {
  if (saved) {
    if (kind in saved) return saved[kind];
    throw new Error(t("needsProgram"));
  }
  return (await post(kind, question)).json();
}

// The float32 numbers of an array, which are fetched once.
export function numbers(key) {
  if (!fetched.has(key)) fetched.set(key, saved ? decoded(saved.arrays[key]) : download(key));
  return fetched.get(key);
}

export const forget = () => saved || fetched.clear();

async function download(key) {
  return floats(await (await post("array", { key })).arrayBuffer());
}

async function decoded(base64) {
  return floats(Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer);
}

const isLittle = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1; // as the numbers that travel are

function floats(buffer) {
  if (isLittle) return new Float32Array(buffer);
  const view = new DataView(buffer);
  return Float32Array.from({ length: buffer.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

async function post(kind, question) {
  let response;
  try {
    const headers = { "Content-Type": "application/json", "X-Secret": secret };
    response = await fetch(`/api/${kind}`, { method: "POST", headers, body: JSON.stringify(question) });
  } catch {
    throw new Error(t("gone"));
  }
  if (response.ok) return response;
  throw new Error((await response.json().catch(() => ({}))).error ?? response.statusText);
}
