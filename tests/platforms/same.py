"""Whether another platform computes with models/shakespeare what this one does: the same ids, the same logits.

    python tests/platforms/same.py write figures.npz      here
    python tests/platforms/same.py compare figures.npz    there: a line, and status 1 where they differ

Logits may differ by rounding.
"""

import pathlib
import platform
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
import gpt2
import utils
from backends import threads

REPO = pathlib.Path(gpt2.__file__).parent
PROMPTS = ["ROMEO:", "My lord, the king is dead; my lord, the", "café 你好 😀"]
ROUNDING = 1e-4


def figures():
    """{name: array}: the ids of a text, its logits, and the ids that follow some prompts, greedy and drawn."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params("shakespeare", str(REPO / "models"))
    text = (REPO / "tests" / "data" / "tinyshakespeare_heldout.txt").read_text("utf-8")
    ids, n_head = encoder.encode(text[:2000])[: hparams["n_ctx"]], hparams["n_head"]
    prompts = [encoder.encode(prompt) for prompt in PROMPTS]
    return {
        "text": np.array(ids),
        "logits": gpt2.gpt2(ids, **params, n_head=n_head),
        "greedy": np.array(gpt2.generate(prompts, params, n_head, 40)),
        "drawn": np.array(gpt2.generate(prompts, params, n_head, 40, temperature=0.8, top_k=40, seed=1)),
    }


def main(what, path):
    if what == "write":
        return np.savez(path, **figures())
    ours, theirs = figures(), np.load(path, allow_pickle=False)
    other = [name for name in ("text", "greedy", "drawn") if not np.array_equal(ours[name], theirs[name])]
    apart = np.abs(ours["logits"] - theirs["logits"]).max()
    versions = f"Python {platform.python_version()}, NumPy {np.__version__} with {threads.n_available()} threads"
    ids = f"other ids: {', '.join(other)}" if other else "the same ids"
    print(f"{platform.system()}, {platform.machine()}, {versions}: {ids}; logits {apart:.1e} apart")
    sys.exit(bool(other) or not apart < ROUNDING)


if __name__ == "__main__":
    main(*sys.argv[1:])
