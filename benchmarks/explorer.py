"""How long the explorer's page takes, in a real browser without a window, beside gpt2()'s own pass in the same process.

    python benchmarks/explorer.py                                            # the 124M shape, 100 tokens
    python benchmarks/explorer.py --models_dir models --model_size shakespeare --n_tokens 100

Needs playwright and Chromium: `chromium` in PATH, or --chromium. A time ends when the page has painted its last change
and waits for no answer. Each is measured in turns, with a pass of gpt2() in each; a line has the median of the times,
their least and most, the median of the times as a part of the pass of the same turn, and medians of the time to the
first change and of the processor's time that the page's own work took, which tells more where other programs run.

The goals, for the 124M shape at 100 tokens on two cores that do nothing else: the first picture in 2 s, a click in
100 ms, a run in the time of the pass and 500 ms. Behind a run come, in its line, the lens and what else it brings.
"""

import os
import shutil
import statistics
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [ROOT, HERE]

TEXT = "The king said to the queen that the war was over, and the queen said to the king that it was not. "
QUIET = 400  # milliseconds in which nothing changes: the page is at rest

# [milliseconds from an act to the last change of the page that was painted, and to the first]
UNTIL_REST = """async (act, quiet) => {
  const fetched = window.fetch;
  let waiting = 0, first = 0, last = performance.now();
  const painted = () => {
    waiting++;
    requestAnimationFrame(() => setTimeout(() => { waiting--; last = performance.now(); first ||= last; }));
  };
  window.fetch = async (...question) => {
    waiting++;
    try { return await fetched(...question); } finally { waiting--; painted(); }
  };
  const changes = new MutationObserver(painted);
  changes.observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
  const began = performance.now();
  act();
  await null; // until what it changed is told to the observer
  const isAtRest = () => !waiting && !document.querySelector("#status[data-busy]") && performance.now() - last > quiet;
  while (!isAtRest()) await new Promise((go) => setTimeout(go, 20));
  changes.disconnect();
  window.fetch = fetched;
  return [last - began, first - began];
}"""
FIRST_PICTURE = """async () => {
  while (!document.querySelector("#picture canvas")) await new Promise(requestAnimationFrame);
  await new Promise((go) => requestAnimationFrame(() => setTimeout(go)));
  return performance.now();
}"""


def click(selector, place=0):
    return f"[...document.querySelectorAll(`{selector}`)].at({place}).click();"


def choose(selector, value, event="input"):
    return f"const e = document.querySelector(`{selector}`); e.value = {value}; e.dispatchEvent(new Event(`{event}`));"


# What is done in a turn, in this order; what runs the model has "run" in its name.
ACTS = {
    "run: another text": "document.querySelector(`#prompt`).value = TEXT; " + click("#run"),
    "run: another block": click("#blocks button", -1),
    "run: a head switched off": click("#head .act"),
    "run: a step with the cache": click("#going .act"),
    "a call of the tree: mha": "[...document.querySelectorAll(`.node`)].find((e) => e.textContent === `mha`).click();",
    "a line: qkv": click(".line.ran .value", 2),
    "a line: what mha returns": click(".line.ran .value", -1),
    "a card of the block": click("#parts button", 11),
    "a head": click("#thumbs button", 3),
    "a token, with the lens there": click("#chips button", 3),
    "temperature": choose("#temperature", "0.7"),
    "top_p": choose("#controls .control:nth-child(3) input", "0.9"),
    "why, rather than another": choose("#whyOther", "document.querySelector(`#whyOther`).options[2].value", "change"),
    "a language": click("[data-language][aria-pressed=false]"),
}


def measured(session, url, texts, chromium, n_turns):
    """([milliseconds of gpt2()'s pass] * n_turns, {act: [[until rest, until the first change, busy], ...]})."""
    from playwright.sync_api import sync_playwright

    passes, found = [], {"the first picture": [], **{name: [] for name in ACTS}}
    with sync_playwright() as engines:
        browser = engines.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for turn in range(n_turns):
            passes.append(pass_of(session, texts[0]))
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(300_000)
            tools = page.context.new_cdp_session(page)
            tools.send("Performance.enable", {"timeDomain": "threadTicks"})  # of the processor, not of the clock
            page.goto(url, wait_until="commit")
            at = page.evaluate(FIRST_PICTURE)
            found["the first picture"].append([at, at, busy(tools)])
            page.wait_for_load_state("networkidle")
            for name, act in ACTS.items():
                act, before = act.replace("TEXT", f"`{texts[1]}`"), busy(tools)
                times = page.evaluate(f"({UNTIL_REST})(() => {{ {act} }}, {QUIET})")
                found[name].append([*times, busy(tools) - before])
            page.close()
            print(f"turn {turn + 1} of {n_turns}: pass {passes[-1]:.0f} ms", file=sys.stderr)
        browser.close()
    return passes, found


def busy(tools):
    """Milliseconds of a processor that the page's thread has had."""
    metrics = tools.send("Performance.getMetrics")["metrics"]
    return next(1000 * metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def pass_of(session, text):
    """Milliseconds of gpt2() itself, without the explorer."""
    import gpt2

    ids, n_head = session.encoder.encode(text), session.n_head
    started = time.perf_counter()
    gpt2.gpt2(ids, **session.params, n_head=n_head)
    return 1000 * (time.perf_counter() - started)


def text_of(encoder, n_tokens, first):
    """A text of so many tokens, or about as many where a cut moves the borders of its words' tokens."""
    return encoder.decode(encoder.encode(TEXT * n_tokens)[first : first + n_tokens])


def main(
    model_size: str = "124M",
    models_dir: str = os.path.join(HERE, "models"),
    n_tokens: int = 100,
    turns: int = 5,
    chromium: str = None,
):
    """Measures the explorer's page, and prints a table.

    Args:
        model_size: 124M, 355M, 774M or 1558M (random weights, made if need be), or any folder in models_dir
        models_dir: the folder that holds the models
        n_tokens: of the text, up to 128
        turns: how often everything is done
        chromium: the browser's program
    """
    from bench import make_checkpoint

    from cli import fail, mistakes, need
    from explorer.server import Server
    from explorer.session import Session
    from sampling import is_whole
    from utils import ModelError, load_encoder_hparams_and_params

    for name, value in (("n_tokens", n_tokens), ("turns", turns)):
        if not is_whole(value) or value < 1:
            fail(f"--{name} must be a whole number, 1 or more, not {value!r}")
    need("playwright")
    chromium = chromium or shutil.which("chromium")
    if chromium is None:
        fail("there is no chromium in PATH: name one with --chromium")
    make_checkpoint(os.path.join(os.path.abspath(models_dir), model_size))
    with mistakes(ModelError):
        model = load_encoder_hparams_and_params(model_size, models_dir)
    texts = [text_of(model[0], n_tokens, first) for first in (0, 1)]
    session = Session(model_size, *model, texts[0])
    pass_of(session, texts[0])  # which reads the weights from disk
    with Server(session) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        passes, found = measured(session, server.url, texts, chromium, turns)
        server.shutdown()
    print(f"gpt2() on {n_tokens} tokens: {statistics.median(passes):.0f} ms ({min(passes):.0f} to {max(passes):.0f})")
    print(f"{'':30} {'ms until rest':24} {'of the pass':>11} {'first change':>13} {'page busy':>10}")
    for name, times in found.items():
        rest, *others = zip(*times, strict=True)
        part = statistics.median(ms / of for ms, of in zip(rest, passes, strict=True))
        spread = f"({min(rest):.0f} to {max(rest):.0f})"
        first, own = map(statistics.median, others)
        print(f"{name:30} {statistics.median(rest):7.0f} {spread:16} {part:11.2f} {first:13.0f} {own:10.0f}")


if __name__ == "__main__":
    from cli import need, run

    need("numpy", "regex", "tqdm")
    run(main)
