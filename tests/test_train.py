"""examples/train.py: a short run on a small text, and what it leaves behind."""

import collections
import importlib.util
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import tokenizers
from conftest import REPO, command

from checkpoint import random_params
from encoder import get_encoder
from gpt2 import generate, gpt2
from utils import load_encoder_hparams_and_params

TEXT_FILE = REPO / "tests" / "data" / "tinyshakespeare_heldout.txt"
TEXT = TEXT_FILE.read_text(encoding="utf-8")
SMALL = {"n_vocab": 300, "n_ctx": 32, "n_embd": 32, "n_head": 2, "n_layer": 1}
SETTINGS = {**SMALL, "n_steps": 120, "batch_size": 8, "learning_rate": 0.02, "evaluate_every": 60}
DATA = "model.ckpt.data-00000-of-00001"

spec = importlib.util.spec_from_file_location("train", REPO / "examples" / "train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with the model "small", trained by the command."""
    path = tmp_path_factory.mktemp("models")
    flags = [f"--{key}={value}" for key, value in SETTINGS.items()]
    done = command(TEXT_FILE, "--name", "small", "--models_dir", path, *flags, script="examples/train.py")
    assert done.returncode == 0, done.stderr
    return path


def progress(model_dir):
    with np.load(model_dir / "state.npz", allow_pickle=False) as state:
        return json.loads(str(state["progress"]))


def test_loss_falls_well_below_the_entropy_of_single_characters(models_dir):
    # the best that a model can do which knows how often each character occurs, but nothing of what came before
    counts = collections.Counter(TEXT)
    unigram_entropy = -sum(n / len(TEXT) * math.log(n / len(TEXT)) for n in counts.values())
    _, step, history = progress(models_dir / "small")
    assert step == 120
    assert min(held_out for _, _, held_out in history) < unigram_entropy - 0.3


def test_the_checkpoint_generates_through_the_command_line(models_dir):
    encoder, hparams, params = load_encoder_hparams_and_params("small", models_dir)
    done = command("KING", model=models_dir / "small", n=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == encoder.decode(generate(encoder.encode("KING"), params, hparams["n_head"], 20)) + "\n"


def test_a_trained_model_starts_without_tensorflow(models_dir):
    sums = (models_dir / "small" / "SHA256SUMS").read_text()
    assert {line.split()[1] for line in sums.splitlines()} == {
        *("hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index"),
        DATA,
    }


def test_the_loss_curve_is_drawn_beside_the_checkpoint(models_dir):
    assert (models_dir / "small" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_ends_as_an_uninterrupted_one_with_the_same_seed(models_dir, tmp_path, monkeypatch):
    def save_and_stop(*args):
        save_state(*args)
        raise KeyboardInterrupt

    save_state = train.save_state
    monkeypatch.setattr(train, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(TEXT_FILE, name="small", models_dir=tmp_path, **SETTINGS)
    monkeypatch.undo()
    assert progress(tmp_path / "small")[1] == 60
    train.main(TEXT_FILE, name="small", models_dir=tmp_path, resume=True, **SETTINGS)

    # compared with a run that never stopped, in another process
    assert progress(tmp_path / "small") == progress(models_dir / "small")
    assert (tmp_path / "small" / DATA).read_bytes() == (models_dir / "small" / DATA).read_bytes()


def test_another_seed_gives_other_first_weights_and_another_order():
    first, other = (train.initial_params(SMALL, seed)["wte"] for seed in (0, 1))
    assert not np.array_equal(first, other)
    first, other = (next(train.batches(np.arange(1000), 40, 7, seed, 0, n_steps=9)) for seed in (0, 1))
    assert not np.array_equal(first, other)


def test_the_model_kept_is_the_one_with_the_lowest_held_out_loss(tmp_path, monkeypatch):
    losses = iter([300.0, 200.0, 400.0])
    monkeypatch.setattr(train, "held_out_nats", lambda *args: next(losses))
    kept = []
    monkeypatch.setattr(train, "save_checkpoint", lambda model_dir, hparams, params: kept.append(params["ln_f"]["g"]))
    seen = []
    monkeypatch.setattr(train, "save_state", lambda path, settings, step, history, arrays: seen.append(arrays[0]))
    train.main(TEXT_FILE, name="small", models_dir=tmp_path, **{**SETTINGS, "n_steps": 3, "evaluate_every": 1})
    assert [np.array_equal(g, kept[-1]) for g in (params["ln_f"]["g"] for params in seen)] == [False, True, False]


def test_the_vocabulary_is_what_tokenizers_reads_and_encodes_alike(models_dir):
    folder = models_dir / "small"
    encoder = get_encoder("small", models_dir)
    reference = tokenizers.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    assert sorted(encoder.decoder) == list(range(300))
    assert encoder.decoder[299] == "<|endoftext|>"
    for text in (TEXT[:20_000], "naïve café 東京 🙂\r\n\tend"):
        assert encoder.encode(text) == reference.encode(text).ids
        assert encoder.decode(encoder.encode(text)) == text


def test_the_tokenizer_learns_from_the_first_nine_tenths_alone(tmp_path, monkeypatch):
    def stop(text, n_vocab, model_dir):
        assert text == TEXT[: -(len(TEXT) // 10)]
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_tokenizer", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(TEXT_FILE, name="small", models_dir=tmp_path, **SETTINGS)


def test_an_epoch_cuts_the_text_into_shuffled_windows_that_do_not_overlap():
    steps = train.batches(np.arange(1000), n_ctx=40, batch_size=7, seed=0, first_step=0, n_steps=6)
    epochs = [np.concatenate([next(steps) for _ in range(3)]) for _ in range(2)]  # 23 windows of 40, batches of 7
    for windows in epochs:
        assert windows.shape == (21, 41)
        assert (np.diff(windows, axis=1) == 1).all()  # consecutive ids
        assert len(np.unique(windows[:, :-1])) == 21 * 40
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("n_ids", [321, 330, 1000])
def test_every_window_lies_within_the_text(n_ids):  # 321: the shortest text that main accepts for 7 windows of 40
    for windows in train.batches(np.arange(n_ids), 40, 7, seed=0, first_step=0, n_steps=60):
        assert 0 <= windows.min() <= windows.max() < n_ids


def test_batches_go_on_at_any_step_as_if_they_had_begun_at_the_first():
    every = list(train.batches(np.arange(1000), 40, 7, seed=3, first_step=0, n_steps=40))
    for step in (1, 20, 35):
        resumed = train.batches(np.arange(1000), 40, 7, seed=3, first_step=step, n_steps=40)
        for expected, got in zip(every[step:], resumed, strict=True):
            np.testing.assert_array_equal(expected, got)


def test_dropout_silences_features_behind_each_layer_norm_and_scales_the_others():
    rng = np.random.default_rng(0)
    norms = [{name: train.jnp.asarray(rng.uniform(0.5, 1.5, 4000)) for name in ("g", "b")} for _ in range(5)]
    params = {"blocks": [dict(zip(("ln_1", "ln_2"), norms[i : i + 2], strict=True)) for i in (0, 2)], "ln_f": norms[4]}
    dropped = train.with_dropout(params, 0.25, train.jax.random.key(0))
    norms = [(params["ln_f"], dropped["ln_f"])]
    for before, after in zip(params["blocks"], dropped["blocks"], strict=True):
        norms += [(before["ln_1"], after["ln_1"]), (before["ln_2"], after["ln_2"])]
    masks = []
    for before, after in norms:
        mask = np.asarray(after["g"] / before["g"])
        masks.append(mask > 0)
        np.testing.assert_allclose(after["b"], before["b"] * mask, rtol=1e-5)
        np.testing.assert_allclose(mask[mask > 0], 1 / 0.75, rtol=1e-5)
        assert np.mean(mask > 0) == pytest.approx(0.75, abs=0.03)
    assert len({mask.tobytes() for mask in masks}) == 5  # each its own


def test_dropout_of_0_changes_nothing_and_each_window_has_a_mask_of_its_own():
    params = train.jax.tree.map(train.jnp.asarray, random_params(SMALL))
    params["wte"] *= 50  # far from uniform
    windows, key = np.tile(np.arange(33), (2, 1)), train.jax.random.key(1)
    plain, mean_loss = (train.jax.jit(loss, static_argnames="n_head") for loss in (train.token_losses, train.mean_loss))
    expected = float(plain(params, windows, n_head=2).mean())
    assert float(mean_loss(params, windows, key, 0.0, n_head=2)) == pytest.approx(expected, rel=1e-5)
    one, both = (mean_loss(params, windows[:n], key, 0.5, n_head=2) for n in (1, 2))
    assert not np.isclose(one, both, rtol=1e-4)


@pytest.mark.parametrize("n_ids", [2, 9, 10, 12, 13, 14, 30])
def test_held_out_loss_counts_every_token_once_with_at_least_half_a_context(n_ids):
    n_ctx, hparams = 8, {"n_vocab": 50, "n_ctx": 8, "n_embd": 16, "n_head": 2, "n_layer": 1}
    params = random_params(hparams)
    params["wte"] *= 50  # far from uniform
    ids = np.random.default_rng(0).integers(0, 50, n_ids)

    expected = 0.0
    for i in range(1, n_ids):  # by hand, a token at a time: windows begin at 0, 4, 8, ...
        start = 0 if i <= n_ctx else (i - n_ctx + 3) // 4 * 4
        logits = gpt2(ids[start:i], **params, n_head=2)[-1].astype(np.float64)
        expected += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[i]]
        assert i <= n_ctx or i - start > n_ctx // 2
    got = train.held_out_nats(train.jax.tree.map(train.jnp.asarray, params), ids, n_ctx, n_head=2)
    assert got == pytest.approx(expected, rel=1e-5)


def test_first_weights_have_the_spread_of_gpt2():
    params = train.initial_params({"n_vocab": 300, "n_ctx": 64, "n_embd": 64, "n_head": 2, "n_layer": 8}, seed=0)
    block = params["blocks"][3]
    for weights, spread in [
        (params["wte"], 0.02),
        (params["wpe"], 0.01),
        (block["attn"]["c_attn"]["w"], 0.02),
        (block["attn"]["c_proj"]["w"], 0.02 / 4),  # sqrt(2 * 8 layers) is 4
        (block["mlp"]["c_fc"]["w"], 0.02),
        (block["mlp"]["c_proj"]["w"], 0.02 / 4),
    ]:
        assert float(weights.std()) == pytest.approx(spread, rel=0.05)
    for layer in (*block["attn"].values(), *block["mlp"].values(), block["ln_1"], block["ln_2"], params["ln_f"]):
        assert not layer["b"].any()


def test_a_first_model_predicts_almost_uniformly():
    hparams = {"n_vocab": 300, "n_ctx": 64, "n_embd": 64, "n_head": 2, "n_layer": 2}
    windows = np.random.default_rng(0).integers(0, 300, (4, 65))
    losses = train.jax.jit(train.token_losses, static_argnames="n_head")
    loss = losses(train.initial_params(hparams, seed=0), windows, n_head=2).mean()
    assert float(loss) == pytest.approx(math.log(300), abs=0.05)


def message(*args, **settings):
    with pytest.raises(SystemExit) as error:
        train.main(*args, **settings)
    assert "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../small"}, "no name for a new model"),
        ({"name": "small."}, "no name for a new model"),
        ({"name": "124M"}, "no name for a new model"),
        ({"n_vocab": 256}, "n_vocab must be 257 or more"),
        ({"n_head": 3}, "n_embd divisible by n_head"),
        ({"n_ctx": 1}, "n_ctx 2 or more"),
        ({"dropout": 1.0}, "dropout below 1"),
        ({"n_steps": "many"}, "n_steps must be a positive number, not 'many'"),
        ({"n_layer": 1.5}, "n_layer must be"),
        ({"n_head": 0}, "n_head must be"),
        ({"learning_rate": -1}, "learning_rate must be"),
        ({"batch_size": 10_000}, "too short for 10000 windows"),
        ({"resume": True}, "no run to resume"),
    ],
)
def test_mistakes_are_told_in_one_line(change, said, tmp_path):
    assert said in message(TEXT_FILE, **{"name": "new", "models_dir": tmp_path, **SETTINGS, **change})


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["no.txt"], "no.txt cannot be read"),
        ([TEXT_FILE, "--step=5"], "unknown flag --step=5"),
        ([TEXT_FILE, TEXT_FILE], "more than one text_file"),
        ([TEXT_FILE, "--n_steps", "many"], "n_steps must be a positive number"),
    ],
)
def test_mistakes_of_the_command_are_told_in_one_line(args, said, tmp_path):
    done = command(*args, "--name", "1984", "--models_dir", tmp_path, script="examples/train.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"train\.py: {re.escape(said)}.*\n", done.stderr)
    assert not any(tmp_path.iterdir())


def test_a_model_is_never_overwritten(models_dir):
    before = (models_dir / "small" / DATA).read_bytes()
    assert "exists" in message(TEXT_FILE, name="small", models_dir=models_dir, **SETTINGS)
    assert (models_dir / "small" / DATA).read_bytes() == before


def test_a_run_is_resumed_with_its_own_settings_only(models_dir):
    changed = {**SETTINGS, "learning_rate": 0.5}
    said = message(TEXT_FILE, name="small", models_dir=models_dir, resume=True, **changed)
    assert "learning_rate=0.02, not 0.5" in said


def test_a_damaged_state_is_told_in_one_line(models_dir, tmp_path):
    shutil.copytree(models_dir / "small", tmp_path / "small")
    os.truncate(tmp_path / "small" / "state.npz", 1000)
    said = message(TEXT_FILE, name="small", models_dir=tmp_path, resume=True, **SETTINGS)
    assert "cannot be resumed from" in said


def test_the_best_checkpoint_is_the_one_that_loads(models_dir):
    encoder, hparams, params = load_encoder_hparams_and_params("small", str(models_dir))
    held_out = TEXT[-(len(TEXT) // 10) :]
    ids = np.array([encoder.encoder["<|endoftext|>"], *encoder.encode(held_out)])
    nats = train.held_out_nats(train.jax.tree.map(train.jnp.asarray, params), ids, hparams["n_ctx"], hparams["n_head"])
    best = min(held_out for _, _, held_out in progress(models_dir / "small")[2])
    assert nats / len(held_out) == pytest.approx(best, rel=1e-6)
