// Questions to explore.py, and the numbers that its answers name. A page that was saved as a file has both inside.

import { fault, t } from "./words.js";

const MOST = 2 ** 24; // numbers that are kept here
const inside = document.getElementById("inside");
const saved = inside ? JSON.parse(inside.textContent) : null;
const secret = location.hash.slice(1);
const fetched = new Map(); // key: a promise of the numbers; the newest last
const sizes = new Map(); // key: how many, of those that are there

export const isFile = saved !== null;

// What explore.py does not answer, and why.
export class Refusal extends Error {}

export async function ask(kind, question = {}) {
  if (saved) {
    if (kind in saved) return saved[kind];
    throw new Refusal(t("needsProgram"));
  }
  return (await post(kind, question)).json();
}

// The float32 numbers of an array, which are fetched once.
export function numbers(key) {
  if (!fetched.has(key)) fetched.set(key, load(key));
  return fetched.get(key);
}

export function forget() {
  fetched.clear();
  sizes.clear();
}

async function load(key) {
  try {
    const data = saved ? await unpacked(saved.packed[saved.arrays[key]]) : floats(await (await post("array", { key })).arrayBuffer());
    if (!fetched.has(key)) return data; // it was forgotten meanwhile
    sizes.set(key, data.length);
    forgetOldest();
    return data;
  } catch (error) {
    fetched.delete(key); // it may be asked for again
    throw error;
  }
}

function forgetOldest() {
  let total = [...sizes.values()].reduce((sum, n) => sum + n, 0);
  for (const [key, n] of sizes) {
    if (total <= MOST || sizes.size === 1) return;
    total -= n;
    sizes.delete(key);
    fetched.delete(key);
  }
}

// See pack() in single_file.py.
async function unpacked(text) {
  const binary = atob(text.slice(1));
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  if (text[0] === "4") return floats(buffer);
  const view = new DataView(buffer);
  return Float32Array.from({ length: buffer.byteLength / 2 }, (_, i) => half(view.getUint16(2 * i, true)));
}

// A number of half precision: a sign, 5 bits of an exponent, 10 of a fraction.
function half(bits) {
  const fraction = bits & 1023;
  const exponent = (bits >> 10) & 31;
  const sign = bits >> 15 ? -1 : 1;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
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
    throw new Refusal(t("gone"));
  }
  if (response.ok) return response;
  const { template = response.statusText, values = [] } = await response.json().catch(() => ({}));
  throw new Refusal(fault(template, values));
}
