// A guided walk of ten steps: each shows a part of the page, and says what to look at there.

import { app, change, inBlock } from "./app.js";
import { isFile } from "./api.js";
import { el } from "./dom.js";
import { go, narrow, openCall } from "./source.js";
import { t } from "./words.js";

const walkCard = document.getElementById("walk");
const small = matchMedia("(max-width: 58rem), (max-height: 52rem)");
let at = -1;
let line; // of the source, if one is looked at

const open = (names, pick) => {
  const found = inBlock(...names);
  if (found) go(found.path, pick);
};

// [what is looked at, what is opened before, what is said besides where a program answers]; a page that was saved has no experiments, which are the last
const ALL = [
  ["#ask", () => {}, "walk1live"],
  ["#tokens", () => change({ token: app.run.ids.length - 1 })],
  [".line.here", () => openCall(["gpt2"], (value) => value.name === "x" && value.before?.length === 1)],
  ["#blocks", () => {}],
  [".line.here", () => open(["mha"], (value) => value.name === "x" && value.axes.length === 4)],
  [".line.here", () => open(["mha", "attention"], (value) => value.name === "weights")],
  ["#habits", () => {}],
  ["#controls", () => {}, "walk8live"],
  ["#seen", () => {}],
  ["#experiments", () => {}],
];
const STEPS = isFile ? ALL.slice(0, -1) : ALL;

export function walk(to) {
  document.querySelector(".walked")?.classList.remove("walked");
  at = to;
  walkCard.hidden = at < 0 || at >= STEPS.length;
  document.body.classList.toggle("walking", !walkCard.hidden); // room for the card below the last part
  if (walkCard.hidden) return document.getElementById("start").focus();
  const [part, act] = STEPS[at];
  act();
  showWalk();
  const subject = document.querySelector(part);
  subject.classList.add("walked");
  line = subject.dataset.line;
  placeWalk();
  bring(subject);
  walkCard.focus({ preventScroll: true });
}

// On a large screen the card floats below; on a small one, where it would cover half of all, it stands before its subject.
export function placeWalk() {
  if (walkCard.hidden) return;
  const part = line === undefined ? STEPS[at][0] : `[data-line="${line}"]`;
  const found = document.querySelector(part) ?? document.querySelector(".desk"); // another function's lines are shown
  const subject = narrow.matches ? found : found.closest(".desk") ?? found; // beside a line stands its picture
  const [parent, after] = small.matches ? [subject.parentElement, subject] : [document.body, null];
  if (walkCard.parentElement === parent && walkCard.nextElementSibling === after) return;
  const focused = walkCard.contains(document.activeElement) ? document.activeElement : null; // which what is moved loses
  parent.insertBefore(walkCard, after);
  focused?.focus({ preventScroll: true });
}

narrow.addEventListener("change", placeWalk);
small.addEventListener("change", placeWalk);

// The card to the top, or what is looked at; of a line, on a wide screen, the picture beside it, and then the line, too.
function bring(subject) {
  const desk = narrow.matches ? null : subject.closest(".desk");
  subject.scrollIntoView({ block: "start" }); // in its list, which scrolls by itself
  (small.matches ? walkCard : desk ?? subject).scrollIntoView({ block: "start" });
  const hidden = subject.getBoundingClientRect().bottom - (small.matches ? innerHeight : walkCard.getBoundingClientRect().top);
  if (desk && hidden > 0) scrollBy(0, hidden + 12);
}

export function showWalk() {
  if (at < 0 || at >= STEPS.length) return;
  const [, , live] = STEPS[at];
  const button = (text, to, kind) => el("button", { type: "button", class: kind, onclick: () => walk(to) }, text);
  walkCard.replaceChildren(
    el("p", { class: "hint" }, t("stepOf", at + 1, STEPS.length)),
    el("h2", {}, t(`walk${at + 1}`)),
    el("p", {}, t(`walk${at + 1}text`), isFile || !live ? "" : ` ${t(live)}`),
    el("p", { class: "turns" }, ...(at > 0 ? [button(t("back"), at - 1, "plain")] : []), at < STEPS.length - 1 ? button(t("onward"), at + 1, "act") : button(t("finish"), -1, "act"), ...(at < STEPS.length - 1 ? [button(t("leave"), -1, "plain")] : [])));
}
