"""examples/evaluate.py: its figures are those of transformers, of EleutherAI's harness and of the bundled model's README."""

import importlib.util
import re

import numpy as np
import pytest
from conftest import REPO

from utils import load_encoder_hparams_and_params

HELD_OUT = REPO / "tests" / "data" / "tinyshakespeare_heldout.txt"
README = (REPO / "models" / "shakespeare" / "README.md").read_text(encoding="utf-8")

spec = importlib.util.spec_from_file_location("evaluate", REPO / "examples" / "evaluate.py")
evaluate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluate)


@pytest.fixture(scope="module")
def shakespeare():
    return load_encoder_hparams_and_params("shakespeare", str(REPO / "models"))


def test_the_bundled_model_has_the_loss_that_its_readme_states(shakespeare):
    import jax

    encoder, hparams, params = shakespeare
    params = jax.tree.map(jax.numpy.asarray, params)
    text = HELD_OUT.read_text(encoding="utf-8")
    ids = np.array([encoder.encoder["<|endoftext|>"], *encoder.encode(text)])
    nats = np.concatenate([*evaluate.text_nats(params, ids, hparams["n_ctx"], hparams["n_head"])])
    assert len(nats) == len(ids) - 1
    stated = re.search(r"\*\*(\d\.\d+) nats per character\*\*, (\d\.\d+) nats per token", README)
    assert (f"{nats.sum() / len(text):.3f}", f"{nats.mean():.3f}") == stated.groups()
