"""The model at work, in a browser: each line of gpt2.py beside the shape and the numbers that it made of your text.

    python explore.py "My lord, the king is dead; my lord, the" --model_size shakespeare

In a notebook: explore.show("My lord, the king", model_size="shakespeare").
"""

import html
import os
import sys
import threading
import webbrowser

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out
    import cli

    cli.start("numpy", "regex")

import gpt2
from explorer import single_file
from explorer.server import Server
from explorer.session import QuestionError, Session
from languages import translated
from utils import ModelError, load_encoder_hparams_and_params

EXAMPLE = "My lord, the king is dead; my lord, the"


class Shown:
    """A page with a run in it, as a notebook shows it."""

    def __init__(self, page, height):
        self.page, self.height = page, height

    def _repr_html_(self):
        style = f"width: 100%; height: {self.height}px; border: 1px solid gray"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(self.page)}"></iframe>'


def show(prompt=EXAMPLE, model_size="124M", models_dir=gpt2.MODELS_DIR, block=0, height=900):
    """The page with a run of this prompt in it, for a notebook cell. Raises ModelError, ValueError."""
    session = Session(model_size, *load_encoder_hparams_and_params(model_size, models_dir), prompt, block)
    return Shown(single_file.page(session), height)


def main(
    prompt: str = EXAMPLE,
    model_size: str = "124M",
    models_dir: str = gpt2.MODELS_DIR,
    block: int = 0,
    out: str = None,
    text: bool = False,
    no_browser: bool = False,
):
    """Shows GPT-2 at work on a prompt: python explore.py "My lord, the king is dead" --model_size shakespeare

    Args:
        prompt: the text to look at, or - for standard input; of a long one, the first 128 tokens
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        models_dir: the folder that holds the models
        block: the block that is open at first, counted from 0
        out: write the page, with the run in it, to this file, which opens without Python
        text: print tokens, what comes next and a head's attention instead, for a terminal
        no_browser: only print the page's address
    """
    import cli

    if out is not None and text:
        cli.fail("--out and --text do not go together")
    if out is not None:
        cli.check_writable(out)
    prompt = cli.open_prompts(prompt, False, None) if prompt == "-" else prompt
    with cli.mistakes(ModelError):
        model = load_encoder_hparams_and_params(model_size, models_dir)
    session = Session(model_size, *model, prompt, block)
    with cli.mistakes(QuestionError):
        if text:
            return print_text(session)
        page = single_file.page(session) if out is not None else None
        if page is None:
            session.answer("run", {"text": prompt, "block": block})
    if out is not None:
        try:
            with open(out, "w", encoding="utf-8", newline="\n") as file:
                file.write(page)
        except OSError as error:
            cli.fail(f"{out} cannot be written: {error.strerror}")
        return cli.note(f"{out} holds the page: open it in a browser ({len(page.encode()) / 1e6:.1f} MB)")
    server = Server(session)
    print(server.url, flush=True)
    cli.note("the page is at this address, for you alone; Ctrl-C ends it")
    if not no_browser:  # beside the server: a browser in the terminal keeps whoever opens it
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    server.serve_forever()


def print_text(session):
    """Tokens with ids, the ten likeliest next tokens, and the head that most looks at the token before."""
    told = session.answer("run", {"text": session.text, "block": session.block})
    ids = told["ids"]
    if told["n_cut"]:
        said = f"only the first {len(ids)} tokens of {len(ids) + told['n_cut']}"
        print(translated(said), file=sys.stderr)
    print(translated("tokens, with their ids:", sys.stdout))
    print("  " + "  ".join(f"{session.readable(i)} {i}" for i in ids))
    p = gpt2.softmax(session.array(told["logits"]))
    print("\n" + translated("what comes next:", sys.stdout))
    for i in (-p).argsort()[:10].tolist():
        print(f"  {p[i]:6.1%}  {session.readable(i)}")
    if len(ids) == 1:  # which can look at itself alone
        return
    shares = {(b, h): share for b, row in enumerate(told["habits"]) for h, share in enumerate(row["before"])}
    block, head = max(shares, key=shares.get)
    weights = session.array(told["weights"][block])[head]
    said = (
        f"block {block}, head {head}, of all heads the one that gives the token before most, "
        f"{shares[block, head]:.0%} on average: where it looks"
    )
    print("\n" + translated(said, sys.stdout))
    width = max(len(session.readable(i)) for i in ids)
    for row, i in zip(weights, ids, strict=True):
        best = (-row).argsort()[:3]
        seen = "  ".join(f"{session.readable(ids[j])} ({j}) {row[j]:.0%}" for j in best.tolist() if row[j] > 0)
        print(f"  {session.readable(i):>{width}} -> {seen}")


if __name__ == "__main__":
    cli.run(main)
