// What the page shows now.

export const app = {
  about: null, // the model and its vocabulary, the source
  run: null, // the newest run: see told() in session.py
  block: 0, // whose values are here
  path: ["gpt2"], // of the call that is open
  value: null, // of that call, that is pictured
  token: 0, // the place in the text that is looked at
  head: 0,
  settings: { temperature: 1, top_k: 0, top_p: 1 },
  why: { token: null, other: null }, // whose logit is explained, null: the likeliest's; ahead of which, null: the mean
  off: [], // heads and neurons to switch off
};

const renderers = []; // [names of what is shown, what shows it]

export const shows = (names, render) => renderers.push([names, render]);

// What shows one of these is called, once. A promise of the end of all that.
export function change(values) {
  Object.assign(app, values);
  return Promise.all(renderers.filter(([names]) => names.some((name) => name in values)).map(([, render]) => render()));
}

// Whether the newest run is of these ids: of another block, what the model says is the same.
export const isOfRun = (ids) => String(ids) === String(app.run.ids);

// The call at a path of labels, or undefined.
export function callAt(path, root = app.run.root) {
  if (path[0] !== root.label) return undefined;
  return path.slice(1).reduce((call, label) => call?.calls.find((child) => child.label === label), root);
}

// A call within the open block, by what its labels begin with, wherever it is: inBlock("mha", "attention").
export function inBlock(...names) {
  let call = app.run.root.calls.find((child) => child.label === `block ${app.block}`);
  let path = ["gpt2", `block ${app.block}`];
  for (const name of names) {
    const found = within(call, name, path);
    if (!found) return undefined;
    [call, path] = found;
  }
  return { call, path };
}

function within(call, name, path) {
  for (const child of call?.calls ?? []) {
    if (child.label === name || child.function === name) return [child, [...path, child.label]];
    const found = within(child, name, [...path, child.label]);
    if (found) return found;
  }
  return undefined;
}

export const lastValue = (call, name) => call?.values.findLast((value) => value.name === name);
