// The page begins here: it asks for the model and a first run, and wires what changes to what shows it.

import { app, callAt, change, when } from "./app.js";
import { ask, forget, isFile } from "./api.js";
import { forgetPictures, showBlock, showHeads, showStream } from "./block.js";
import { showCache, startOver } from "./cache.js";
import { say } from "./dom.js";
import { makeExperiments, showOff } from "./experiments.js";
import { lookThrough } from "./lens.js";
import { makeControls, showNext } from "./next.js";
import { openCall, showPicture, showSource } from "./source.js";
import { showTokens } from "./tokens.js";
import { showWalk, walk } from "./walk.js";
import { language, setLanguage, t, translate } from "./words.js";

// Runs the model, and shows what it made: at the call that was open before, where there is one.
async function run(question, path = app.path, pick = undefined) {
  const button = document.getElementById("run");
  const status = document.getElementById("status");
  button.disabled = true;
  status.dataset.busy = "yes";
  say(t("running"));
  const began = performance.now();
  try {
    const answer = await ask("run", question);
    forget();
    forgetPictures();
    const isSame = app.run && String(app.run.ids) === String(answer.ids);
    Object.assign(app, { run: answer, block: answer.block, path: callAt(path, answer.root) ? path : ["gpt2"] });
    if (!isSame) app.token = answer.ids.length - 1;
    if (question.ids) showText(answer.text);
    change({ run: answer });
    const opened = app.value && callAt(app.path).values.findLast((value) => value.name === app.value.name && value.line === app.value.line);
    openCall(app.path, pick ?? ((value) => value === opened || (!opened && value.name === "return")));
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say((answer.n_cut ? `${t("wasCut", app.about.n_tokens, answer.n_cut)} ` : "") + (isFile ? t("isFile", savedBlocks()) : t("ran", answer.ids.length, seconds)));
    if (!isSame) startOver();
  } catch (error) {
    say(error.message, true);
  }
  button.disabled = isFile;
  delete status.dataset.busy;
}

const hasValues = (block) => callAt(["gpt2", `block ${block}`])?.values.some((value) => value.key !== undefined);
const savedBlocks = () => app.run.root.calls.map((_, i) => i).filter(hasValues).join(", ");

async function goTo({ detail: { block, path, pick } }) {
  if (hasValues(block) || isFile) {
    change({ block });
    openCall(path, pick);
  } else await run({ ids: app.run.ids, block }, path, pick);
}

async function begin() {
  setLanguage(language());
  try {
    app.about = await ask("about");
  } catch (error) {
    return say(error.message, true);
  }
  document.getElementById("model").textContent = app.about.model;
  document.body.classList.toggle("file", isFile);
  makeControls();
  makeExperiments();
  when(["path", "value"], showSource);
  when(["value", "head", "token"], showPicture);
  when(["run", "token"], showTokens);
  when(["run", "block", "head"], showBlock);
  when(["run", "block", "head", "token"], showHeads);
  when(["run", "block"], showStream);
  when(["run", "settings"], showNext);
  when(["run", "token"], lookThrough);
  when(["run", "off"], showOff);
  document.addEventListener("go", goTo);
  document.addEventListener("take", ({ detail }) => run({ ids: [...app.run.ids, detail].slice(-app.about.n_tokens), block: app.block }));
  const first = await ask("first");
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
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    document.getElementById("ask").requestSubmit();
  }
});

document.getElementById("start").addEventListener("click", () => walk(0));
document.addEventListener("keydown", (event) => event.key === "Escape" && !document.getElementById("walk").hidden && walk(-1));

for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    setLanguage(button.dataset.language);
    if (!app.run) return;
    makeControls();
    makeExperiments();
    change({ run: app.run });
    change({ value: app.value });
    showCache();
    showWalk();
    say("");
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  forgetPictures(); // they have the other colours
  if (app.run) change({ run: app.run, value: app.value });
});
translate();
begin();
