"""models/shakespeare, the model in the repository: it is what its README.md says, and others compute the same."""

import functools
import os
import re
import shutil

import conftest
import numpy as np
import pytest
from conftest import REPO, command, optional

from gpt2 import gpt2
from utils import load_encoder_hparams_and_params

FOLDER = REPO / "models" / "shakespeare"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
HELD_OUT = (REPO / "tests" / "data" / "tinyshakespeare_heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return load_encoder_hparams_and_params("shakespeare", str(REPO / "models"))


@pytest.fixture(scope="module")
def hugging_face(model):
    """The same weights in Hugging Face's GPT-2."""
    _, hparams, params = model
    return conftest.hugging_face(hparams, params)


@pytest.fixture(scope="module")
def windows(model):
    """[4, n_ctx/2] ids from four places of the held-out text, and the logits that NumPy computes for them."""
    encoder, hparams, params = model
    ids = np.array(
        [encoder.encode(HELD_OUT[start:][:1000])[: hparams["n_ctx"] // 2] for start in range(0, 100_000, 25_000)]
    )
    return ids, gpt2(ids, **params, n_head=hparams["n_head"])


def samples(heading):
    """The text in the first block of code behind a heading of the README."""
    return re.search(rf"^#+ {re.escape(heading)}\n.*?^```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]


def test_the_greedy_continuation_is_the_one_in_its_readme_and_that_of_hugging_face(model, hugging_face):
    import torch

    encoder, _, _ = model
    done = command("ROMEO:", "--model_size", "shakespeare")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == samples("Temperature 0")

    prompt = torch.tensor([encoder.encode("ROMEO:")])
    output = hugging_face.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    assert done.stdout.rstrip("\n") == encoder.decode(output[0, prompt.shape[1] :].tolist()).rstrip("\n")


def test_the_loss_on_the_held_out_text_is_the_one_in_its_readme(model):
    encoder, hparams, params = model
    stated = float(re.search(r"\*\*(\d\.\d+) nats per character\*\*", README)[1])

    ids = np.array([encoder.encoder["<|endoftext|>"], *encoder.encode(HELD_OUT)])
    n_ctx, n_tokens = hparams["n_ctx"], len(ids) - 1
    # windows begin every half a context, and a window's first half counts in the first alone; what does not fill the
    # last one, less than half a context, is left out
    starts = range(0, n_tokens - n_ctx + 1, n_ctx // 2)
    total = n_scored = 0
    for batch in (starts[i : i + 16] for i in range(0, len(starts), 16)):
        window = np.array([ids[start : start + n_ctx + 1] for start in batch])  # [16, n_ctx+1]
        logits = gpt2(window[:, :-1], **params, n_head=hparams["n_head"])  # [16, n_ctx, n_vocab]
        logits -= logits.max(axis=-1, keepdims=True)
        right = np.take_along_axis(logits, window[:, 1:, None], axis=-1)[..., 0]  # [16, n_ctx]
        nats = np.log(np.exp(logits).sum(axis=-1)) - right
        counted = np.array([[start == 0] * (n_ctx // 2) + [True] * (n_ctx - n_ctx // 2) for start in batch])
        total, n_scored = total + nats[counted].sum(dtype=np.float64), n_scored + counted.sum()
    assert n_tokens - n_ctx // 2 < n_scored <= n_tokens
    assert total / n_scored * n_tokens / len(HELD_OUT) == pytest.approx(stated, abs=0.02)


def test_hugging_face_computes_the_same_logits(windows, hugging_face):
    import torch

    ids, logits = windows
    with torch.no_grad():
        np.testing.assert_allclose(logits, hugging_face(torch.tensor(ids)).logits.numpy(), rtol=1e-4, atol=1e-3)


def test_jax_computes_the_same_logits_compiled(model, windows):
    jax = optional("jax")

    (_, hparams, params), (ids, logits) = model, windows
    compiled = jax.jit(functools.partial(gpt2, n_head=hparams["n_head"]))
    np.testing.assert_allclose(logits, compiled(ids, **jax.tree.map(jax.numpy.asarray, params)), rtol=1e-4, atol=1e-3)


def test_jax_computes_the_same_logits_for_sequences_mapped_one_by_one(model, windows):
    jax = optional("jax")

    (_, hparams, params), (ids, logits) = model, windows
    params = jax.tree.map(jax.numpy.asarray, params)
    mapped = jax.vmap(lambda sequence: gpt2(sequence, **params, n_head=hparams["n_head"]))
    np.testing.assert_allclose(logits, jax.jit(mapped)(ids), rtol=1e-4, atol=1e-3)


@pytest.fixture
def no_tensorflow(tmp_path):
    """An environment in which whoever imports TensorFlow finds it broken."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "tensorflow.py").write_text("raise ImportError('this test has none')\n")
    return {"PYTHONPATH": str(tmp_path / "stub")}


def test_it_runs_without_tensorflow_as_it_comes_out_of_git(tmp_path, no_tensorflow):
    # git gives files the time of the checkout, whatever it was when the model was saved
    shutil.copytree(FOLDER, tmp_path / "shakespeare", copy_function=shutil.copyfile)
    for i, path in enumerate(sorted((tmp_path / "shakespeare").iterdir())):
        os.utime(path, (1e9 + i, 1e9 + i))
    before = {path.name: path.read_bytes() for path in (tmp_path / "shakespeare").iterdir()}
    args = ("ROMEO:", "--model_size", "shakespeare", "--n_tokens_to_generate", 5)
    for _ in range(2):
        done = command(*args, "--models_dir", tmp_path, env=no_tensorflow)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == command(*args, env=no_tensorflow).stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "shakespeare").iterdir()} == before


def test_a_damaged_copy_is_not_trusted(tmp_path, no_tensorflow):
    shutil.copytree(FOLDER, tmp_path / "shakespeare", copy_function=shutil.copyfile)
    data = tmp_path / "shakespeare" / "model.ckpt.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    done = command("ROMEO:", "--model_size", "shakespeare", "--models_dir", tmp_path, env=no_tensorflow)
    assert done.returncode == 1
    assert f"{data} is damaged" in done.stderr  # SHA256SUMS no longer vouches for it


def test_it_takes_less_than_8_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.name != "state.npz") < 8e6
