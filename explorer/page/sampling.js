// The cuts of sampling.py's draw, in the same order, over all logits: which tokens may be drawn, and how likely each is.

// logits -> { p: all probabilities, may: those that are left, 0 elsewhere (its sum is `left`), n: how many are left }
export function cut(logits, { temperature, top_k, top_p }) {
  const best = logits.reduce((most, x) => Math.max(most, x), -Infinity);
  const p = new Float64Array(logits).map((x) => Math.exp((x - best) / (temperature || 1))); // but for a common factor
  if (temperature === 0) {
    const first = logits.indexOf(best); // greedy
    return shares(p, p.map((x, i) => (i === first ? x : 0)));
  }
  let may = p;
  if (top_k > 0 && top_k < p.length) {
    const least = Float64Array.from(p).sort()[p.length - top_k];
    may = p.map((x) => (x < least ? 0 : x));
  }
  if (top_p < 1) {
    let falling = may.filter((x) => x > 0).sort().reverse();
    if (top_k > 0) falling = falling.slice(0, top_k); // of tokens as likely as the last one, no more than k count here
    const total = may.reduce((sum, x) => sum + x, 0);
    let least = Infinity;
    let before = 0;
    for (const x of falling) {
      if (before >= top_p * total) break; // those before reach p
      least = x;
      before += x;
    }
    may = may.map((x) => (x < least ? 0 : x));
  }
  return shares(p, may);
}

function shares(p, may) {
  const sum = p.reduce((total, x) => total + x, 0);
  const left = may.reduce((total, x) => total + x, 0);
  return { p: p.map((x) => x / sum), may: may.map((x) => x / sum), left: left / sum, n: may.reduce((n, x) => n + (x > 0), 0) };
}

// The token on which a point from 0 to 1 falls: each owns a stretch of a line, as long as its probability.
export function drawn({ may, left }, point) {
  let end = 0;
  let last = 0;
  for (let i = 0; i < may.length; i++) {
    if (may[i] === 0) continue;
    end += may[i];
    last = i;
    if (end > point * left) return i;
  }
  return last;
}

// The n likeliest ids, the likeliest first.
export function likeliest(p, n) {
  const best = [];
  for (let i = 0; i < p.length; i++) {
    if (best.length === n && p[i] <= p[best[n - 1]]) continue;
    const place = best.findIndex((other) => p[other] < p[i]);
    best.splice(place < 0 ? best.length : place, 0, i);
    if (best.length > n) best.pop();
  }
  return best;
}
