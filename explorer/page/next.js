// What comes next: the probabilities over the whole vocabulary, and where temperature, top-k and top-p cut.

import { app, change } from "./app.js";
import { isFile, numbers } from "./api.js";
import { counted, el, percent, place, tokenText } from "./dom.js";
import { bar } from "./heat.js";
import { cut, drawn, likeliest } from "./sampling.js";
import { t } from "./words.js";

const SHOWN = 20;

export function makeControls() {
  const { n_vocab } = app.about.hparams;
  const control = (name, properties) => {
    const input = el("input", { type: "range", id: name, ...properties });
    const output = el("input", { type: "number", "aria-label": t(name), ...properties, max: name === "top_k" ? n_vocab : properties.max });
    input.value = output.value = app.settings[name];
    const set = (from, to) => {
      const value = Number(from.value);
      const isBad = from.value === "" || !(value >= Number(from.min)) || !(value <= Number(from.max));
      output.setAttribute("aria-invalid", String(isBad));
      if (isBad) return;
      to.value = value;
      change({ settings: { ...app.settings, [name]: value } });
    };
    input.addEventListener("input", () => set(input, output));
    output.addEventListener("input", () => set(output, input));
    output.addEventListener("change", () => { // what cannot be is not left standing
      output.value = app.settings[name];
      output.setAttribute("aria-invalid", "false");
    });
    return el("div", { class: "control" }, el("label", { for: name }, t(name)), input, output);
  };
  place("controls",
    control("temperature", { min: 0, max: 2, step: 0.05 }),
    control("top_k", { min: 0, max: Math.min(100, n_vocab), step: 1 }),
    control("top_p", { min: 0.01, max: 1, step: 0.01 }));
}

export async function showNext() {
  const logits = await numbers(app.run.logits);
  const { settings } = app;
  const chances = cut(logits, settings);
  const best = likeliest(chances.p, SHOWN);
  const n_shown = best.filter((id) => chances.may[id] > 0).length;
  const bars = best.map((id) => tokenBar(id, chances, chances.p[best[0]]));
  if (n_shown < best.length) bars.splice(n_shown, 0, el("li", { class: "cut" }, t("cutHere")));
  const said = settings.temperature === 0 ? t("greedy") : t("kept", counted(chances.n), counted(logits.length), percent(chances.left));
  const draw = el("button", { type: "button", class: "act", onclick: () => take(drawn(chances, Math.random())) }, t("drawOne"));
  place("chances", el("p", { "aria-live": "polite" }, said), el("ol", { class: "bars wide" }, ...bars), el("p", { class: "hint" }, t("restHas", counted(logits.length - best.length), percent(1 - best.reduce((sum, id) => sum + chances.p[id], 0)))), ...(isFile ? [] : [el("p", {}, draw)]));
}

function tokenBar(id, chances, most) {
  const kept = chances.may[id] > 0;
  const share = kept && chances.left < 1 ? ` → ${percent(chances.may[id] / chances.left)}` : "";
  const line = bar("", `${percent(chances.p[id])}${kept ? share : ` · ${t("isCut")}`}`, chances.p[id] / most, kept ? "" : "isCut");
  const button = el("button", { type: "button", class: "plain", "aria-label": t("take", tokenText(id)), onclick: () => take(id) }, tokenText(id));
  line.querySelector(".name").replaceChildren(isFile ? tokenText(id) : button);
  return line;
}

const take = (id) => document.dispatchEvent(new CustomEvent("take", { detail: id }));
