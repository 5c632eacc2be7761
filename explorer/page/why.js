// Why a token was chosen: what each head and mlp gave to its logit. See attribution.py.

import { app, change, isOfRun } from "./app.js";
import { ask, isFile, numbers } from "./api.js";
import { openHead } from "./block.js";
import { el, number, place, signed, tokenText } from "./dom.js";
import { bar } from "./heat.js";
import { likeliest } from "./sampling.js";
import { go } from "./source.js";
import { t } from "./words.js";

const STRONGEST = 10; // parts, and tokens
const CHOICES = 20; // tokens to ask about: those that are shown as what comes next

let known = null; // the newest answer, to what was asked of which ids

export async function showWhy() {
  const { run, why } = app;
  if (!known || known.why !== why || !isOfRun(known.ids)) known = { why, ids: run.ids, answer: await ask("why", { ids: run.ids, ...why }) };
  const { answer } = known;
  const logits = await numbers(run.logits);
  if (run !== app.run || why !== app.why) return;
  const ids = likeliest(logits, CHOICES);
  place("reasons", whyForm(answer, ids), el("p", { "aria-live": "polite" }, ...summed(answer)),
    el("div", { class: "two" },
      el("div", {}, el("h3", {}, t("whyParts")), amounts(strongest(partsOf(answer)))),
      el("div", {}, el("h3", {}, t("whyTokens")), amounts(strongest(tokensOf(answer))), el("p", { class: "hint" }, t("whyTokensNote")))),
    el("p", { class: "hint" }, t("whyNote")));
}

// Which token, rather than which other one.
function whyForm(answer, ids) {
  if (isFile) return "";
  const { token, other } = answer;
  const which = tokenSelect("whyToken", ids.filter((id) => id !== other), token, (id) => ({ token: id, other }));
  const rather = tokenSelect("whyOther", [null, ...ids.filter((id) => id !== token)], other, (id) => ({ token, other: id }));
  return el("p", { class: "form" }, el("label", { class: "field" }, el("span", {}, t("whyToken")), which), el("label", { class: "field" }, el("span", {}, t("whyOther")), rather));
}

function tokenSelect(id, ids, chosen, question) {
  const options = ids.map((each) => el("option", { value: each ?? "", selected: each === chosen }, each === null ? t("meanOfAll") : tokenText(each)));
  const onchange = (event) => change({ why: question(event.target.value === "" ? null : Number(event.target.value)) });
  return el("select", { id, onchange }, ...options);
}

function summed({ token, other, lead, embeddings, heads, mlps, biases }) {
  const sum = (list) => list.flat().reduce((total, x) => total + x, 0);
  const names = [tokenText(token), other === null ? t("meanOfAll") : tokenText(other)];
  const said = other === null ? t("leadsMean", names[0], signed(lead)) : t("leadsOther", ...names, signed(lead), number(Math.exp(lead)));
  return [said, " ", t("leadIsSum", signed(sum(heads)), signed(sum(mlps)), signed(sum(embeddings)), signed(biases))];
}

// [{ name, amount, onclick }, ...]
function partsOf({ heads, from, mlps, embeddings }) {
  const { ids } = app.run;
  const ofHeads = heads.flatMap((row, block) => row.map((amount, head) => ({ amount, name: `${t("block")} ${block}, ${t("head")} ${head} ← ${tokenText(ids[from[block][head]])} (${from[block][head]})`, onclick: () => seeHead(block, head) })));
  const ofMlps = mlps.map((amount, block) => ({ amount, name: `${t("block")} ${block}, mlp`, onclick: () => seeMlp(block) }));
  const ofRows = embeddings.map((amount, i) => ({ amount, name: i === 0 ? `wte, ${tokenText(ids.at(-1))}` : `wpe, ${ids.length - 1}` }));
  return [...ofHeads, ...ofMlps, ...ofRows];
}

const tokensOf = ({ tokens }) => tokens.map((amount, i) => ({ amount, name: `${tokenText(app.run.ids[i])} (${i})`, onclick: () => change({ token: i }) }));

const strongest = (parts) => [...parts].sort((a, b) => Math.abs(b.amount) - Math.abs(a.amount)).slice(0, STRONGEST);

function amounts(parts) {
  const most = Math.abs(parts[0].amount) || 1;
  const lines = parts.map(({ name, amount, onclick }) => {
    const line = bar("", signed(amount), Math.abs(amount) / most, amount < 0 ? "less" : "");
    line.querySelector(".name").replaceChildren(onclick ? el("button", { type: "button", class: "plain", onclick }, name) : name);
    return line;
  });
  return el("ol", { class: "bars reasons" }, ...lines);
}

function seeHead(block, head) {
  openHead(block, head);
  document.getElementById("head").scrollIntoView();
}

function seeMlp(block) {
  go(["gpt2", `block ${block}`, "ffn"]);
  document.getElementById("source").scrollIntoView();
}
