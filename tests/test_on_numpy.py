"""examples/on_numpy.py: what learns on NumPy alone learns as on JAX."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import N_BLAS, REPO, assert_one_line_error, command, optional, wild_params

sys.path.insert(0, str(REPO / "examples"))
import lora
import on_numpy
import saving
import training

from backends import threads
from gpt2 import generate
from utils import load_encoder_hparams_and_params

torch, on_jax = optional("torch"), optional("on_jax", needs="optax")

HPARAMS = {"n_vocab": 101, "n_ctx": 40, "n_embd": 15, "n_head": 3, "n_layer": 2}
RECIPE = {"n_steps": 60, "batch_size": 4, "accumulate": 1, "learning_rate": 3e-3, "weight_decay": 0.1, "dropout": 0.0}
RECIPE |= {"dtype": "float32", "recompute": False, "seed": 0, "lora_rank": 0, "lora_alpha": 0.0}
TEXT_FILE = REPO / "tests" / "data" / "tinyshakespeare_heldout.txt"


def text_rows(rng):
    """Windows, of which not all tokens count."""
    return {
        "ids": rng.integers(101, size=(4, 21)),
        "counted": (np.arange(20) >= rng.integers(0, 10, (4, 1))).astype(np.float32),
    }


def class_rows(rng):
    """Texts whose last tokens are at other places."""
    return {"ids": rng.integers(101, size=(4, 20)), "last": rng.integers(5, 20, 4), "label": rng.integers(3, size=4)}


def several_class_rows(rng):
    """Such texts, each with any number of three labels."""
    return class_rows(rng) | {"label": rng.integers(2, size=(4, 3)).astype(np.float32)}


def head():
    rng = np.random.default_rng(1)
    return {"w": rng.standard_normal((15, 3), np.float32), "b": rng.standard_normal(3, np.float32)}


def curve(module, learned, frozen, rows_of, recipe):
    """(the losses of 30 steps, what was learned) by the Learner of a module."""
    learner = module.Learner(learned, frozen, HPARAMS["n_head"], recipe)
    rng, losses = np.random.default_rng(0), []
    for step in range(30):
        rows = rows_of(rng)
        if recipe["dropout"]:
            rows["masks"] = training.dropout_masks(recipe["dropout"], 0, step, 4, HPARAMS)
        rows = {name: array[learner.share(np.arange(4))] for name, array in rows.items()}
        if step == 0:
            learner.start(rows)
        losses.append(learner.update(rows, step))
    return losses, numbers(*learner.model())


def assert_same_curve(learned, frozen, rows_of=text_rows, **recipe):
    (expected, right), (losses, weights) = (
        curve(module, learned, frozen, rows_of, RECIPE | recipe) for module in (on_jax, on_numpy)
    )
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    assert losses[-1] != losses[0]
    before = numbers(lora.merged(learned, frozen, lora.scale_of(RECIPE | recipe)), learned)
    assert np.linalg.norm(weights - right) < 0.01 * np.linalg.norm(right - before)


def numbers(params, learned):
    """All numbers of a model and of its head in a row, but the biases of keys.

    Softmax takes no notice of these: their gradient is rounding, of which Adam makes whole steps.
    """
    arrays = lora.named(params) | lora.named(learned.get("head", {}))
    biases = {name: np.delete(np.asarray(x), np.s_[15:30]) for name, x in arrays.items() if name.endswith("c_attn.b")}
    return np.concatenate([np.ravel(x) for x in (arrays | biases).values()])


def test_all_weights_learn_as_on_jax():
    assert_same_curve({"params": wild_params(HPARAMS)}, {})


def test_behind_dropout_they_learn_as_on_jax():
    assert_same_curve({"params": wild_params(HPARAMS)}, {}, dropout=0.3)


def test_from_a_batch_in_parts_they_learn_as_on_jax():
    assert_same_curve({"params": wild_params(HPARAMS)}, {}, accumulate=2, dropout=0.3)


def test_adapters_learn_as_on_jax():
    params = wild_params(HPARAMS)
    adapters = lora.new_adapters(params, 2, ["c_attn", "c_proj", "c_fc"])
    assert_same_curve({"adapters": adapters}, {"params": params}, lora_rank=2, lora_alpha=4.0)


@pytest.mark.parametrize("learn", ["blocks.1", "ln_1,ln_2,ln_f,b", "wpe,mlp", "ln_f", "c_proj"])
def test_chosen_weights_learn_as_on_jax_and_the_others_stay(learn):
    params = wild_params(HPARAMS)
    weights, others = lora.chosen(params, learn)
    assert_same_curve({"weights": weights}, {"params": others}, dropout=0.3)
    after = lora.named(lora.merged({"weights": {name: x + 1 for name, x in weights.items()}}, {"params": others}, 1.0))
    for name, x in lora.named(params).items():
        parts = name.split(".")
        is_chosen = any({*part.split(".")} <= {*parts} for part in learn.split(","))
        np.testing.assert_array_equal(after[name], x + 1 if is_chosen else x)


def test_a_classifier_learns_as_on_jax():
    assert_same_curve({"params": wild_params(HPARAMS), "head": head()}, {}, class_rows)


def test_a_classifier_of_several_labels_a_text_learns_as_on_jax():
    assert_same_curve({"params": wild_params(HPARAMS), "head": head()}, {}, several_class_rows, accumulate=2)


@pytest.mark.parametrize("size", [1, 1000])
def test_the_binary_cross_entropy_and_its_gradient_are_pytorchs(size):
    rng = np.random.default_rng(0)
    logits, targets = size * rng.standard_normal((4, 3)), rng.integers(2, size=(4, 3)).astype(float)
    loss, gradient = on_numpy.binary_cross_entropy(logits, targets, np.full(4, 1 / 4))
    x = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(x, torch.tensor(targets))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, x.grad.numpy(), rtol=1e-12, atol=1e-15)


def test_a_head_alone_learns_as_on_jax():
    assert_same_curve({"head": head()}, {"params": wild_params(HPARAMS)}, class_rows)


def test_a_head_and_adapters_learn_as_on_jax():
    params = wild_params(HPARAMS)
    learned = {"adapters": lora.new_adapters(params, 2, ["c_attn"]), "head": head()}
    assert_same_curve(learned, {"params": params}, class_rows, lora_rank=2, lora_alpha=4.0, dropout=0.3)


@pytest.mark.skipif(N_BLAS < 2, reason="needs two cores and OpenBLAS")
@pytest.mark.parametrize(("small", "expected"), [(threads.SMALL, {1}), (0, {N_BLAS})])
def test_one_row_of_a_model_that_fits_the_cache_takes_one_thread_of_blas_and_of_a_larger_one_all(
    small, expected, monkeypatch
):
    seen, loss_and_gradients = [], on_numpy.loss_and_gradients

    def watched(*args, **options):
        seen.append(threads.blas()[0]())
        return loss_and_gradients(*args, **options)

    monkeypatch.setattr(on_numpy, "loss_and_gradients", watched)
    monkeypatch.setattr(threads, "SMALL", small)
    threads.set_blas_threads(N_BLAS)
    before = threads.blas()[0]()
    learner = on_numpy.Learner({"params": wild_params(HPARAMS)}, {}, HPARAMS["n_head"], RECIPE)
    rows = {name: x[None, :1] for name, x in text_rows(np.random.default_rng(0)).items()}
    learner.update(rows, 0)
    assert {*seen} == expected
    assert threads.blas()[0]() == before


def test_what_it_is_handed_stays_as_it_is():
    params = wild_params(HPARAMS)
    before = [x.copy() for x in saving.leaves(params)]
    curve(on_numpy, {"params": params}, {}, text_rows, RECIPE)
    for x, was in zip(saving.leaves(params), before, strict=True):
        np.testing.assert_array_equal(x, was)


def test_without_jax_optax_and_matplotlib_a_model_is_fine_tuned_that_continues_text(tmp_path):
    flags = ["--model_size=shakespeare", "--name=mine", "--n_steps=20", "--evaluate_every=10"]
    flags += ["--n_ctx=32", "--learning_rate=1e-3"]
    shutil.copytree(REPO / "models" / "shakespeare", tmp_path / "shakespeare")
    code = f"import runpy, sys; sys.path.insert(0, {str(REPO / 'examples')!r})\n"
    code += "sys.modules |= dict.fromkeys(['jax', 'optax', 'matplotlib'])\n"
    code += f"runpy.run_path({str(REPO / 'examples' / 'finetune.py')!r}, run_name='__main__')"
    mistaken = command("nowhere.txt", "--models_dir", tmp_path, *flags, code=code)
    assert_one_line_error(mistaken, "nowhere.txt cannot be read")  # and no word of what it would do without
    mistaken = command(TEXT_FILE, "--models_dir", tmp_path, "--resume", *flags, code=code)
    assert_one_line_error(mistaken, "there is no run to resume")
    done = command(TEXT_FILE, "--models_dir", tmp_path, *flags, code=code)
    assert done.returncode == 0, done.stderr
    assert "matplotlib is not installed: the loss curve is not drawn" in done.stderr
    with np.load(tmp_path / "mine" / "state.npz", allow_pickle=False) as state:
        *_, history, _ = json.loads(str(state["progress"]))
    assert history[-1][0] == 20
    assert history[-1][2] < history[0][2]  # held out, nats per character
    encoder, hparams, params = load_encoder_hparams_and_params("mine", tmp_path)
    done = command("KING", model=tmp_path / "mine", n=8)
    assert done.stdout == encoder.decode(generate(encoder.encode("KING"), params, hparams["n_head"], 8)) + "\n"


def test_a_model_whose_weights_have_another_name_is_the_base_that_it_is(tmp_path):
    for name in ("model.ckpt", "model-1000"):
        shutil.copytree(REPO / "models" / "shakespeare", folder := tmp_path / name)
        for path in folder.glob("model.ckpt.*"):
            path.rename(folder / path.name.replace("model.ckpt", name))
        (folder / "checkpoint").write_text(f'model_checkpoint_path: "{name}"')
    assert training.base_of(tmp_path / "model-1000") == training.base_of(tmp_path / "model.ckpt")


@pytest.mark.parametrize("script", ["finetune", "train"])
@pytest.mark.parametrize("flag", ["--distributed", "--recompute", "--dtype=bfloat16"])
def test_what_only_jax_can_do_is_refused(tmp_path, flag, script):
    if script == "train":
        optional("tokenizers").Tokenizer  # noqa: B018  (skips where it is not installed)
    args = (TEXT_FILE, "--name=mine", "--models_dir", tmp_path, "--backend=numpy", flag)
    done = command(*args, script=f"examples/{script}.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{flag.partition('=')[0]} needs --backend jax" in done.stderr
