// The page begins here: it asks for the model and a first run, and wires what changes to what shows it.

import { app, callAt, change, shows } from "./app.js";
import { ask, forget, isFile, Refusal } from "./api.js";
import { forgetPictures, markHead, showBlock, showHabits, showHead, showStream, showThumbs } from "./block.js";
import { showCache, showGoing, startOver } from "./cache.js";
import { say } from "./dom.js";
import { makeExperiments, makePatch, showOff } from "./experiments.js";
import { lookThrough } from "./lens.js";
import { makeControls, showNext } from "./next.js";
import { narrow, openCall, showPicture, showSource } from "./source.js";
import { showChips, showToken } from "./tokens.js";
import { placeWalk, showWalk, walk } from "./walk.js";
import { showWhy } from "./why.js";
import { language, setLanguage, t, translate } from "./words.js";

let n_busy = 0; // runs and renderers that are not done

function busy(n) {
  n_busy += n;
  document.getElementById("status").toggleAttribute("data-busy", n_busy > 0);
}

// Calls render whenever one of these has changed. What it asked of a run that another has replaced may be refused.
function when(names, render) {
  const show = async () => {
    const { run } = app;
    busy(1);
    try {
      await render();
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      if (run === app.run) say(error.message, true);
    } finally {
      busy(-1);
    }
  };
  shows(names, show);
}

let isRunning = false;
let waiting = null; // the run that was asked for while another went on: of several, the newest

// Runs the model, and shows what it made: at the call that was open before, where there is one.
async function run(question, path, pick) {
  waiting = { question, path, pick };
  if (isRunning) return;
  isRunning = true;
  busy(1);
  while (waiting) {
    const next = waiting;
    waiting = null;
    await runOne(next);
  }
  busy(-1);
  isRunning = false;
}

async function runOne({ question, path = app.path, pick }) {
  say(t("running"));
  const began = performance.now();
  try {
    const answer = await ask("run", question);
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    forget();
    forgetPictures();
    const isFirst = !app.run;
    const isSame = app.run && String(app.run.ids) === String(answer.ids);
    Object.assign(app, { run: answer, block: answer.block, path: callAt(path, answer.root) ? path : ["gpt2"] });
    if (!isSame) Object.assign(app, { token: answer.ids.length - 1, why: { token: null, other: null } });
    if (question.ids) showText(answer.text);
    const opened = app.value && callAt(app.path).values.findLast((value) => value.name === app.value.name && value.line === app.value.line);
    const pictured = openCall(app.path, pick ?? ((value) => value === opened || (!opened && value.name === "return")));
    try {
      if (isFirst) { // what is in view at first does not wait for all that lies below
        showChips();
        showToken();
        await pictured;
        await painted();
      }
    } finally {
      change({ run: answer });
    }
    say(isFile ? isSaved() : cutNote() + t("ran", answer.ids.length, seconds));
    if (!isSame) {
      makePatch();
      startOver();
    }
  } catch (error) {
    say(error.message, true);
  }
}

const painted = () => new Promise((go) => {
  requestAnimationFrame(() => setTimeout(go));
  setTimeout(go, 500); // a page that is not in view is not painted
});

const hasValues = (block) => callAt(["gpt2", `block ${block}`])?.values.some((value) => value.key !== undefined);

const cutNote = () => (app.run.n_cut ? `${t("wasCut", app.about.n_tokens, app.run.n_cut)} ` : "");

// What a page that was saved has.
function isSaved() {
  const blocks = app.run.habits.map((_, i) => i);
  const kept = blocks.filter(hasValues);
  return cutNote() + (kept.length === blocks.length ? t("isFile") : t("isPart", kept.join(", ")));
}

async function goTo({ detail: { block, path, pick } }) {
  if (hasValues(block) || isFile) {
    change({ block });
    openCall(path, pick);
  } else await run({ ids: app.run.ids, block }, path, pick);
}

async function begin() {
  setLanguage(language());
  document.body.classList.toggle("file", isFile);
  document.getElementById("prompt").readOnly = isFile;
  let first;
  try {
    [app.about, first] = await Promise.all([ask("about"), ask("first")]);
  } catch (error) {
    return say(error.message, true);
  }
  document.getElementById("model").textContent = app.about.model;
  document.getElementById("calls").open = !narrow.matches;
  makeControls();
  makeExperiments();
  when(["path", "value"], showSource);
  when(["path", "value"], placeWalk); // which may stand among the lines that were shown
  when(["value", "head", "token"], showPicture);
  when(["run"], showChips);
  when(["run", "token"], showToken);
  when(["run", "block", "head"], showBlock);
  when(["run"], showHabits);
  when(["run", "block"], showThumbs);
  when(["block", "head"], markHead);
  when(["run", "block", "head", "token"], showHead);
  when(["run", "block"], showStream);
  when(["run", "settings"], showNext);
  when(["run", "why"], showWhy);
  when(["settings"], showGoing);
  when(["run", "token"], lookThrough);
  when(["run"], showOff);
  when(["off"], () => showOff(true));
  document.addEventListener("go", goTo);
  document.addEventListener("take", ({ detail }) => run({ ids: [...app.run.ids, detail].slice(-app.about.n_tokens), block: app.block }));
  showText(first.text);
  const attention = ["gpt2", `block ${first.block}`, "mha", "causal_attention", "attention"];
  await run({ text: first.text, block: first.block }, attention, (value) => value.name === "weights");
}

document.getElementById("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run({ text: document.getElementById("prompt").value, block: app.block });
});

function showText(text) {
  document.getElementById("prompt").value = text;
  fitPrompt();
}

// As high as its text, where the browser cannot do that by itself.
function fitPrompt() {
  const prompt = document.getElementById("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, 0.4 * innerHeight)}px`;
}

document.getElementById("prompt").addEventListener("input", fitPrompt);
document.getElementById("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isFile) {
    event.preventDefault();
    document.getElementById("ask").requestSubmit();
  }
});

document.getElementById("start").addEventListener("click", () => walk(0));
document.addEventListener("keydown", (event) => event.key === "Escape" && document.body.classList.contains("walking") && walk(-1));

// Within the page a link scrolls, and leaves the address alone: behind its # is the key, which is needed when it is loaded anew.
for (const link of document.querySelectorAll("a[href^='#']")) {
  const section = link.getAttribute("href");
  if (location.hash) link.href = location.hash; // in another tab, the page with its key
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const heading = document.querySelector(`${section} h2`);
    heading.parentElement.scrollIntoView();
    heading.tabIndex = -1;
    heading.focus({ preventScroll: true });
  });
  link.addEventListener("focus", () => link.scrollIntoView({ block: "nearest" })); // on a narrow screen not all are in view
}

for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    setLanguage(button.dataset.language);
    if (!app.run) return;
    makeControls();
    makeExperiments();
    makePatch();
    change({ run: app.run, value: app.value });
    showCache();
    showWalk();
    say(isFile ? isSaved() : cutNote());
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  forgetPictures(); // they have the other colours
  if (!app.run) return;
  change({ run: app.run, value: app.value });
  showCache();
});
translate();
begin();
