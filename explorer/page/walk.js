// A guided walk of ten steps: each shows a part of the page, and says what to look at there.

import { app, change, inBlock } from "./app.js";
import { isFile } from "./api.js";
import { el, place } from "./dom.js";
import { go, openCall } from "./source.js";
import { t } from "./words.js";

let at = -1;

const open = (names, pick) => {
  const found = inBlock(...names);
  if (found) go(found.path, pick);
};

// [the part of the page, what is opened there]; a page that was saved has no experiments, which are the last
const ALL = [
  ["ask", () => {}],
  ["tokens", () => change({ token: app.run.ids.length - 1 })],
  ["source", () => openCall(["gpt2"], (value) => value.name === "x" && value.before?.length === 1)],
  ["block", () => {}],
  ["source", () => open(["mha"], (value) => value.name === "x" && value.axes.length === 4)],
  ["source", () => open(["mha", "attention"], (value) => value.name === "weights")],
  ["heads", () => {}],
  ["next", () => {}],
  ["lens", () => {}],
  ["experiments", () => {}],
];
const STEPS = isFile ? ALL.slice(0, -1) : ALL;

export function walk(to) {
  document.querySelector(".walked")?.classList.remove("walked");
  at = to;
  const card = document.getElementById("walk");
  card.hidden = at < 0 || at >= STEPS.length;
  if (card.hidden) return document.getElementById("start").focus();
  const [id, act] = STEPS[at];
  act();
  const part = document.getElementById(id);
  part.classList.add("walked");
  part.scrollIntoView({ block: "start" });
  showWalk();
  card.focus({ preventScroll: true });
}

export function showWalk() {
  if (at < 0 || at >= STEPS.length) return;
  const button = (text, to, kind) => el("button", { type: "button", class: kind, onclick: () => walk(to) }, text);
  place("walk",
    el("p", { class: "hint" }, t("stepOf", at + 1, STEPS.length)),
    el("h2", {}, t(`walk${at + 1}`)),
    el("p", {}, t(`walk${at + 1}text`), at === 0 && !isFile ? ` ${t("changeIt")}` : ""),
    el("p", { class: "turns" }, ...(at > 0 ? [button(t("back"), at - 1, "plain")] : []), at < STEPS.length - 1 ? button(t("onward"), at + 1, "act") : button(t("finish"), -1, "act"), ...(at < STEPS.length - 1 ? [button(t("leave"), -1, "plain")] : [])));
}
