"""The released 124M weights give what they are published to give. Runs where models/124M lies; downloads nothing."""

import json
import os

import numpy as np
import pytest

from files.checkpoint import DATA, ENCODER, HPARAMS, INDEX, VOCAB
from gpt2 import generate, gpt2
from utils import MODELS_DIR, load_encoder_hparams_and_params

pytestmark = pytest.mark.weights

with open(os.path.join(os.path.dirname(__file__), "data", "published_gpt2_124M.json"), encoding="utf-8") as f:
    PUBLISHED = json.load(f)


@pytest.fixture(scope="module")
def model():
    files = (os.path.join(MODELS_DIR, "124M", name) for name in (HPARAMS, ENCODER, VOCAB, INDEX, DATA))
    missing = [path for path in files if not os.path.exists(path)]
    if missing:
        pytest.skip(f"{missing[0]} is not there: `python gpt2.py Hello` would download it")
    return load_encoder_hparams_and_params("124M", MODELS_DIR)


@pytest.mark.parametrize("published", PUBLISHED["greedy"], ids=lambda published: f"{published['prompt'][-20:]}")
def test_greedy_continuation_is_the_published_one(model, published):
    encoder, hparams, params = model
    ids = encoder.encode(published["prompt"]) or [encoder.encoder["<|endoftext|>"]]
    if "ids" in published:
        assert ids == published["ids"]
    output_ids = generate(ids, params, hparams["n_head"], published["n"])
    text = encoder.decode(output_ids)
    if "output_ids" in published:
        assert output_ids == published["output_ids"]
    if "text" in published:
        assert text == published["text"]
    if "startswith" in published:
        assert text.lstrip().startswith(published["startswith"])


@pytest.mark.parametrize("published", PUBLISHED["last_position_logits"], ids=lambda published: published["prompt"])
def test_logits_of_the_last_position_are_within_a_twentieth_of_the_published_ones(model, published):
    encoder, hparams, params = model
    assert encoder.encode(published["prompt"]) == published["ids"]
    logits = gpt2(published["ids"], **params, n_head=hparams["n_head"])[-1]
    best_ids, best = map(list, zip(*published["top10"], strict=True))
    np.testing.assert_allclose(logits[best_ids], best, rtol=0, atol=0.05)
    np.testing.assert_allclose(logits[:8], published["first8"], rtol=0, atol=0.05)
    assert np.delete(logits, best_ids).max() < best[-1] + 0.05  # these are the ten best
