"""examples/train.py: a short run on a small text, and what it leaves behind."""

import argparse
import collections
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import N_BLAS, REPO, TIMEOUT, assert_one_line_error, command, interrupt, running

sys.path.insert(0, str(REPO / "examples"))
import on_jax
import recipe
import texts
import train
import training

from backends import threads
from encoder import get_encoder
from files.checkpoint import random_params
from gpt2 import generate, gpt2
from utils import load_encoder_hparams_and_params

TEXT_FILE = str(REPO / "tests" / "data" / "tinyshakespeare_heldout.txt")
TEXT = pathlib.Path(TEXT_FILE).read_text(encoding="utf-8")
SMALL = {"n_vocab": 300, "n_ctx": 32, "n_embd": 32, "n_head": 2, "n_layer": 1}
SETTINGS = {**SMALL, "n_steps": 120, "batch_size": 8, "learning_rate": 0.02, "evaluate_every": 60, "backend": "numpy"}
DATA = "model.ckpt.data-00000-of-00001"


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with the model "small", trained by the command."""
    path = tmp_path_factory.mktemp("models")
    flags = [f"--{key}={value}" for key, value in SETTINGS.items()]
    done = command(TEXT_FILE, "--name", "small", "--models_dir", path, *flags, script="examples/train.py")
    assert done.returncode == 0, done.stderr
    (path / "stderr.txt").write_text(done.stderr, "utf-8")
    return path


def progress(model_dir):
    with np.load(model_dir / "state.npz", allow_pickle=False) as state:
        return json.loads(str(state["progress"]))


def losses_of(model_dir):  # [step, training, held-out]
    return progress(model_dir)[2]


def weights_of(model_dir):
    return np.fromfile(model_dir / DATA, np.float32)


def test_loss_falls_well_below_the_entropy_of_single_characters(models_dir):
    # the best that a model can do which knows how often each character occurs, but nothing of what came before
    counts = collections.Counter(TEXT)
    unigram_entropy = -sum(n / len(TEXT) * math.log(n / len(TEXT)) for n in counts.values())
    assert losses_of(models_dir / "small")[-1][0] == 120
    assert min(held_out for _, _, held_out in losses_of(models_dir / "small")) < unigram_entropy - 0.3


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


def test_the_loss_curve_is_drawn_beside_the_checkpoint_from_before_the_first_step(models_dir):
    assert (models_dir / "small" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _, _ in losses_of(models_dir / "small")] == [0, 60, 120]


def test_there_are_at_most_sixteen_evaluations_ten_steps_apart_or_more_unless_told_otherwise(tmp_path):
    for n_steps, expected in [(8000, 500), (500, 32), (160, 10), (20, 10), (3, 10)]:
        flags = {"name": "new", "models_dir": str(tmp_path), "n_steps": n_steps}
        _, settings = training.begin(recipe.complete(train.main, flags))
        assert settings["evaluate_every"] == expected


def test_a_resumed_run_ends_as_an_uninterrupted_one_with_the_same_seed(models_dir, tmp_path, monkeypatch):
    def look_and_stop(run):
        look(run)
        if run.step == 60:
            raise SystemExit

    threads.set_blas_threads(N_BLAS)  # as in a command: another number would round otherwise
    look = training.Run.look
    monkeypatch.setattr(training.Run, "look", look_and_stop)
    with pytest.raises(SystemExit):
        train.main(TEXT_FILE, name="small", models_dir=tmp_path, **SETTINGS)
    monkeypatch.undo()
    assert progress(tmp_path / "small")[1] == 60
    train.main(TEXT_FILE, name="small", models_dir=tmp_path, resume=True, **SETTINGS)

    # compared with a run that never stopped, in another process
    assert progress(tmp_path / "small") == progress(models_dir / "small")
    assert (tmp_path / "small" / DATA).read_bytes() == (models_dir / "small" / DATA).read_bytes()


def test_a_run_that_ends_before_its_first_evaluation_leaves_one_to_resume(tmp_path, monkeypatch):
    def stop(*args):
        raise SystemExit

    monkeypatch.setattr(training, "text_nats", stop)
    with pytest.raises(SystemExit):
        train.main(TEXT_FILE, name="small", models_dir=tmp_path, **SETTINGS)
    monkeypatch.undo()
    train.main(TEXT_FILE, name="small", models_dir=tmp_path, resume=True, **SETTINGS | {"n_steps": 2})
    assert [step for step, _, _ in losses_of(tmp_path / "small")] == [0, 2]


def test_ctrl_c_saves_at_once_and_names_the_command_that_goes_on(tmp_path):
    flags = [f"--{key}={value}" for key, value in (SETTINGS | {"n_steps": 100_000, "evaluate_every": 50_000}).items()]
    args = (TEXT_FILE, "--name", "small", "--models_dir", tmp_path, *flags)
    with running(*args, script="examples/train.py") as process:
        for line in process.stderr:
            if b"minutes to go" in line:
                break
        interrupt(process)
        last = process.stderr.read().decode().splitlines()[-1]
        assert process.wait() == 130
    step, resume = re.fullmatch(r"stopped at step (\d+) of 100000, which is saved; to go on: (.*)", last).groups()
    assert progress(tmp_path / "small")[1] == int(step) > 0
    assert shlex.split(resume) == [*map(str, process.args), "--resume"]


def test_a_finished_run_is_lengthened_by_more_steps(models_dir, tmp_path, capfd):
    shutil.copytree(models_dir / "small", tmp_path / "small")
    said = message(TEXT_FILE, name="small", models_dir=tmp_path, resume=True, **SETTINGS)
    assert "has made 120 steps already: to add some, give a larger --n_steps" in said
    train.main(TEXT_FILE, name="small", models_dir=tmp_path, resume=True, **SETTINGS | {"n_steps": 150})
    assert [step for step, _, _ in losses_of(tmp_path / "small")] == [0, 60, 120, 150]
    assert "the learning rate goes on as in a run of 150" in capfd.readouterr().err


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_a_loss_that_is_no_number_ends_the_run_in_one_line_and_is_never_the_best(backend, tmp_path, recwarn):
    settings = SETTINGS | {"learning_rate": 1e30, "weight_decay": 0, "evaluate_every": 5, "backend": backend}
    said = message(TEXT_FILE, name="small", models_dir=tmp_path, **settings)
    assert "the loss is no number any more at step 5: the --learning_rate is too high" in said
    assert np.isfinite(weights_of(tmp_path / "small")).all()
    assert [str(each) for each in recwarn if each.category is RuntimeWarning] == []


def test_nothing_is_on_stderr_that_the_run_does_not_say_itself(models_dir):
    said = (models_dir / "stderr.txt").read_text("utf-8")
    lines = [line for line in said.splitlines() if not line.startswith("    ")]  # those are samples
    expected = [r"[0-9,]+ of .* numbers learn", "step 0: held out .*", "a step takes .*"]
    expected += ["step 60: held out .*", "step 120: held out .*", ".* has the weights of step .*"]
    expected += [r".*state.npz, of \d+ MB, is for --resume alone: delete it if done"]
    assert len(lines) == len(expected)
    assert all(map(re.fullmatch, expected, lines))


# several devices, several processes


SHORT = {**SMALL, "n_steps": 20, "batch_size": 8, "learning_rate": 0.01, "evaluate_every": 10}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a model that one process has trained on one device."""
    path = tmp_path_factory.mktemp("one")
    train.main(TEXT_FILE, name="small", models_dir=path, **SHORT)
    return path / "small"


def short_run(models_dir, *flags):
    settings = [f"--{key}={value}" for key, value in SHORT.items()]
    return (TEXT_FILE, "--name", "small", "--models_dir", models_dir, *settings, *flags)


def test_rows_divided_over_eight_devices_give_the_same_weights(short, tmp_path):
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = command(*short_run(tmp_path), script="examples/train.py", env=devices)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(weights_of(tmp_path / "small"), weights_of(short), atol=1e-4)

    done = command(*short_run(tmp_path / "new", "--accumulate=2"), script="examples/train.py", env=devices)
    assert_one_line_error(done, "4 rows cannot be divided over 8 devices")


def test_two_processes_that_each_take_half_of_the_rows_give_the_same_weights(short, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}

    def process(i):
        kwargs = {"env": environment | {"JAX_PROCESS_ID": str(i)}, "stderr": None if i else subprocess.PIPE}
        return running(*short_run(tmp_path, "--distributed"), script="examples/train.py", **kwargs)

    with process(0) as first, process(1) as second:
        said = first.communicate(timeout=TIMEOUT)[1].decode()
        assert (first.returncode, second.wait(TIMEOUT)) == (0, 0), said
    np.testing.assert_allclose(weights_of(tmp_path / "small"), weights_of(short), atol=1e-4)


def test_processes_that_cannot_find_one_another_are_told_of_in_one_line(tmp_path):
    done = command(*short_run(tmp_path, "--distributed"), script="examples/train.py")
    assert_one_line_error(done, "the processes cannot be joined")


# the parts


def test_by_default_a_model_is_trained_as_the_bundled_one_was():
    told = " ".join((REPO / "models" / "shakespeare" / "README.md").read_text("utf-8").split())
    options = recipe.complete(train.main, {})
    assert f"AdamW at {options['learning_rate']} with weight decay {options['weight_decay']}" in told
    assert f"{options['n_steps']:,} steps and cosine decay to 0" in told
    assert f"({options['batch_size']} windows of 256), seed {options['seed']}" in told
    assert f"Dropout of {options['dropout']}" in told


def test_another_seed_gives_other_first_weights_and_another_order():
    first, other = (train.initial_params(SMALL, seed)["wte"] for seed in (0, 1))
    assert not np.array_equal(first, other)
    first, other = (windows_of_steps(1000, seed, 0, 9)[0] for seed in (0, 1))
    assert not np.array_equal(first, other)


def test_the_model_kept_is_the_one_with_the_lowest_held_out_loss(tmp_path, monkeypatch):
    def save_and_see(*args):
        seen.append(np.array(args[-1][0]["params"]["ln_f"]["g"]))
        save_state(*args)

    losses, save_state = iter([500.0, 300.0, 200.0, 400.0]), training.save_state
    monkeypatch.setattr(training, "text_nats", lambda *args: [next(losses)])
    kept, seen = [], []
    monkeypatch.setattr(
        training, "save_checkpoint", lambda folder, hparams, params: kept.append(np.array(params["ln_f"]["g"]))
    )
    monkeypatch.setattr(training, "save_state", save_and_see)
    train.main(TEXT_FILE, name="small", models_dir=tmp_path, **{**SETTINGS, "n_steps": 3, "evaluate_every": 1})
    assert [np.array_equal(g, kept[-1]) for g in seen] == [False, False, True, False]


def test_the_vocabulary_is_what_tokenizers_reads_and_encodes_alike(models_dir):
    folder = models_dir / "small"
    encoder = get_encoder("small", models_dir)
    reference = tokenizers.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    assert sorted(encoder.decoder) == list(range(300))
    assert encoder.decoder[299] == "<|endoftext|>"
    for text in (TEXT[:20_000], "naïve café 東京 🙂\r\n\tend"):
        assert encoder.encode(text) == reference.encode(text).ids
        assert encoder.decode(encoder.encode(text)) == text


def test_a_tokenizer_learned_from_chinese_joins_letters_but_no_two_characters(tmp_path):
    train.train_tokenizer(["明月几时有，明月几时有。" * 10 + "to be or not to be " * 10], 300, tmp_path)
    encoder = get_encoder("", tmp_path)
    assert [encoder.decode([i]) for i in encoder.encode("明月几时有，to be")] == [*"明月几时有，", "to", " be"]


def test_the_tokenizer_learns_from_the_first_nine_tenths_alone(tmp_path, monkeypatch):
    def stop(texts, n_vocab, model_dir):
        assert texts == [TEXT[: -(len(TEXT) // 10)]]
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_tokenizer", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(TEXT_FILE, name="small", models_dir=tmp_path, **SETTINGS)


def windows_of_steps(n_ids, seed, first_step, n_steps):
    """7 windows of 40 of consecutive ids for every step."""
    windows = training.Windows(np.arange(n_ids), 40, 7)
    return [windows.rows(which)["ids"] for which in training.batches(windows.order, 7, seed, first_step, n_steps)]


def test_an_epoch_cuts_the_text_into_shuffled_windows_that_do_not_overlap():
    steps = windows_of_steps(1000, 0, 0, 6)
    epochs = [np.concatenate(steps[:3]), np.concatenate(steps[3:])]  # 23 windows of 40, batches of 7
    for windows in epochs:
        assert windows.shape == (21, 41)
        assert (np.diff(windows, axis=1) == 1).all()  # consecutive ids
        assert len(np.unique(windows[:, :-1])) == 21 * 40
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("n_ids", [321, 330, 1000])
def test_every_window_lies_within_the_text(n_ids):  # 321: the shortest text that is accepted for 7 windows of 40
    for windows in windows_of_steps(n_ids, 0, 0, 60):
        assert 0 <= windows.min() <= windows.max() < n_ids


def test_batches_go_on_at_any_step_as_if_they_had_begun_at_the_first():
    every = windows_of_steps(1000, 3, 0, 40)
    for step in (1, 20, 35):
        for expected, got in zip(every[step:], windows_of_steps(1000, 3, step, 40), strict=True):
            np.testing.assert_array_equal(expected, got)


def test_dropout_silences_features_behind_each_layer_norm_and_scales_the_others():
    rng = np.random.default_rng(0)
    norms = [{name: jnp.asarray(rng.uniform(0.5, 1.5, 4000)) for name in ("g", "b")} for _ in range(5)]
    params = {"blocks": [dict(zip(("ln_1", "ln_2"), norms[i : i + 2], strict=True)) for i in (0, 2)], "ln_f": norms[4]}
    masks = training.dropout_masks(0.25, 0, 0, 1, {"n_layer": 2, "n_embd": 4000})
    dropped = training.with_dropout(params, masks[0])
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


def test_each_window_of_each_step_has_masks_of_its_own_which_follow_from_the_seed():
    hparams = {"n_layer": 2, "n_embd": 50}
    masks = [training.dropout_masks(0.5, seed, step, 2, hparams) for seed, step in [(0, 0), (0, 1), (1, 0)]]
    assert len({mask.tobytes() for pair in masks for mask in pair}) == 6
    np.testing.assert_array_equal(masks[1], training.dropout_masks(0.5, 0, 1, 2, hparams))


def test_dropout_of_0_changes_nothing_and_each_window_is_seen_through_its_own_mask():
    params = jax.tree.map(jnp.asarray, random_params(SMALL))
    params["wte"] *= 50  # far from uniform
    rows = {"ids": np.tile(np.arange(33), (2, 1)), "counted": np.ones((2, 32), np.float32)}
    masks = training.dropout_masks(0.5, 0, 0, 2, SMALL)

    loss = jax.jit(on_jax.text_loss, static_argnums=(2, 3, 4))

    def mean(n_rows, **masks):
        part = {name: array[:n_rows] for name, array in (rows | masks).items()}
        total, n = loss(params, part, 2, "float32", False)
        return float(total / n)

    logits = gpt2(rows["ids"][0, :-1], **random_params(SMALL) | {"wte": np.asarray(params["wte"])}, n_head=2)
    expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(32), np.arange(1, 33)]
    assert mean(2) == pytest.approx(expected.mean(), rel=1e-4)
    assert not np.isclose(mean(1, masks=masks), mean(2, masks=masks), rtol=1e-4)


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
    logits = gpt2(np.random.default_rng(0).integers(0, 300, 64), **train.initial_params(hparams, seed=0), n_head=2)
    losses = np.log(np.exp(logits).sum(-1)) - logits[:, 0]
    assert losses.mean() == pytest.approx(math.log(300), abs=0.05)


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
        ({"models_dir": TEXT_FILE}, f"{TEXT_FILE} is no folder that can be written to"),
        ({"models_dir": f"{TEXT_FILE}/models"}, f"{TEXT_FILE} is no folder that can be written to"),
        ({"name": "124M"}, "is the name of a model of OpenAI's"),
        ({"n_vocab": 256}, "n_vocab must be 257 or more"),
        ({"n_head": 3}, "--n_embd divisible by --n_head"),
        ({"n_ctx": 1}, "--n_ctx 2 or more"),
        ({"dropout": 1.0}, "--dropout must be below 1, not 1.0"),
        ({"n_steps": "many"}, "--n_steps must be a whole number above 0, not 'many'"),
        ({"n_layer": 1.5}, "n_layer must be"),
        ({"n_head": 0}, "n_head must be"),
        ({"seed": 2**32}, "--seed must be below 2**32, not 4294967296"),
        ({"seed": -1}, "--seed must be a whole number, 0 or more, not -1"),
        ({"learning_rate": -1}, "learning_rate must be"),
        ({"batch_size": 10_000}, "too short for 10000 windows"),
        ({"resume": True}, "no run to resume"),
    ],
)
def test_mistakes_are_told_in_one_line(change, said, tmp_path):
    assert said in message(TEXT_FILE, **{"name": "new", "models_dir": tmp_path, **SETTINGS, **change})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "said"), [("", "is empty"), ("short", "too short"), ("a " * 100, "too short")])
def test_a_text_too_short_leaves_no_folder_that_would_be_in_the_way(text, said, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    assert said in message(str(tmp_path / "text.txt"), name="new", models_dir=tmp_path / "models", **SETTINGS)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["no.txt"], "no.txt cannot be read"),
        ([TEXT_FILE, "--step=5"], "unknown flag --step=5"),
        ([TEXT_FILE, TEXT_FILE], "more than one text_file"),
        ([TEXT_FILE, "--n_steps", "many"], "--n_steps must be a whole number above 0"),
    ],
)
def test_mistakes_of_the_command_are_told_in_one_line(args, said, tmp_path):
    done = command(*args, "--name", "1984", "--models_dir", tmp_path, script="examples/train.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"train\.py: {re.escape(said)}.*\n", done.stderr)
    assert not any(tmp_path.iterdir())


def without(folder, *packages):
    """Variables for a command in whose Python these cannot be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({packages})")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "classify.py"])
def test_packages_that_are_missing_are_named_all_at_once_with_the_least_that_helps(script, tmp_path):
    env = without(tmp_path, "jax", "optax")
    done = command("train", "--name", "new", "--backend=jax", script=f"examples/{script}", env=env)
    assert_one_line_error(
        done, f"{script}: jax, optax are not installed here: activate its environment, or pip install jax optax"
    )


def test_each_step_of_a_run_silences_other_features():
    hparams, settings = {"n_layer": 2, "n_embd": 50}, {"dropout": 0.5, "seed": 0}
    task, learner = argparse.Namespace(data=training.Rows({"ids": np.zeros((2, 3))}, 2)), argparse.Namespace()
    learner.share = lambda which: which[None]  # [batch_size] -> [accumulate, n_rows]
    run = training.Run("", "", hparams, settings, learner, task)
    first = run.rows(np.arange(2))["masks"]
    assert first.shape == (1, 2, 5, 50)
    run.step = 1
    assert not np.array_equal(run.rows(np.arange(2))["masks"], first)


@pytest.mark.parametrize(("step", "evaluated", "is_done"), [(10, 10, True), (5, 5, False), (10, 5, False)])
def test_a_run_is_done_when_its_last_step_has_been_evaluated(step, evaluated, is_done):
    run = training.Run("", "", {}, {"n_steps": 10}, None, None)
    run.step, run.history = step, [[0, None, 2.0], [evaluated, 1.0, 1.0]]
    assert run.is_done() == is_done


@pytest.mark.parametrize(("step", "evaluated"), [(3, [0]), (5, [0]), (5, [0, 5]), (7, [0, 5])])
def test_a_run_that_goes_on_is_evaluated_where_an_uninterrupted_one_is_and_nowhere_twice(step, evaluated):
    settings = {"n_steps": 10, "evaluate_every": 5, "batch_size": 2, "seed": 0, "dropout": 0}
    learner = argparse.Namespace(is_first=False, share=lambda which: which, update=lambda rows, step: 1.0)
    learner.model = lambda: ({}, {})
    task = argparse.Namespace(
        data=training.Rows({"ids": np.zeros((4, 3))}, 2), scale=1.0, evaluate=lambda *_: (1.0, "")
    )
    run = training.Run("", "", {}, settings, learner, task)
    run.step, run.history = step, [[at, 1.0, 2.0] for at in evaluated]
    assert run.learn() is False
    assert [at for at, _, _ in run.history] == [0, 5, 10]


def test_nothing_but_on_jax_imports_jax():
    code = "import sys; sys.path[:0] = [{0!r}, {0!r} + '/examples']; import train, finetune, classify, evaluate\n"
    code += "print(*({{'jax', 'optax', 'tensorflow', 'matplotlib'}} & sys.modules.keys()))"
    assert command(code=code.format(str(REPO))).stdout == "\n"


def test_a_platform_that_jax_does_not_have_is_told_in_one_line(tmp_path):
    args = TEXT_FILE, "--name", "new", "--models_dir", tmp_path
    done = command(*args, script="examples/train.py", env={"JAX_PLATFORMS": "nonsense"})
    assert_one_line_error(done, "train.py: JAX has no device to run on")


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "classify.py"])
def test_help_needs_no_package_of_trainings(script, tmp_path):
    env = without(tmp_path, "jax", "optax", "matplotlib", "tensorflow", "tokenizers", "safetensors")
    done = command("train", "--help", script=f"examples/{script}", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--n_steps" in done.stdout


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "classify.py"])
def test_ctrl_c_during_the_imports_leaves_no_traceback(script):
    loud = {"PYTHONVERBOSE": "1"}  # says what is imported
    with running("train", TEXT_FILE, "--name", "new", script=f"examples/{script}", env=loud) as process:
        next(line for line in process.stderr if b"numpy" in line)
        interrupt(process)
        _, said = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in said


def test_a_model_is_never_overwritten(models_dir):
    before = (models_dir / "small" / DATA).read_bytes()
    assert "exists" in message(TEXT_FILE, name="small", models_dir=models_dir, **SETTINGS)
    assert (models_dir / "small" / DATA).read_bytes() == before


def test_a_run_is_resumed_with_its_own_settings_only(models_dir):
    changed = {**SETTINGS, "learning_rate": 0.5}
    said = message(TEXT_FILE, name="small", models_dir=models_dir, resume=True, **changed)
    assert "learning_rate=0.02, not 0.5" in said


def test_a_run_is_resumed_with_its_own_data_only(models_dir, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT + "One line more.")
    said = message(str(tmp_path / "other.txt"), name="small", models_dir=models_dir, resume=True, **SETTINGS)
    assert "the run to resume learned from other data" in said


def test_held_out_data_may_not_move_to_those_learned_from(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    assert texts.checksums([a], b) != texts.checksums([a, b], "")
    assert texts.checksums([a], b) == texts.checksums([a], b)


def test_a_run_that_died_at_its_first_save_leaves_no_tokenizer_to_the_next(tmp_path):
    (tmp_path / ".small.new").mkdir()
    for file, content in (("encoder.json", "{}"), ("vocab.bpe", "")):
        (tmp_path / ".small.new" / file).write_text(content)
    train.main(TEXT_FILE, name="small", models_dir=tmp_path, **SETTINGS | {"n_steps": 1})
    assert len(get_encoder("small", tmp_path).encoder) == 300
    assert load_encoder_hparams_and_params("small", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


def test_a_damaged_state_is_told_in_one_line(models_dir, tmp_path):
    shutil.copytree(models_dir / "small", tmp_path / "small")
    os.truncate(tmp_path / "small" / "state.npz", 1000)
    said = message(TEXT_FILE, name="small", models_dir=tmp_path, resume=True, **SETTINGS)
    assert "cannot be resumed from" in said


def test_the_best_checkpoint_is_the_one_that_loads(models_dir):
    encoder, hparams, params = load_encoder_hparams_and_params("small", str(models_dir))
    held_out = TEXT[-(len(TEXT) // 10) :]
    ids = np.array([encoder.encoder["<|endoftext|>"], *encoder.encode(held_out)])
    nats = sum(map(np.sum, training.text_nats(params, ids, hparams["n_ctx"], hparams["n_head"])))
    best = min(held_out for _, _, held_out in losses_of(models_dir / "small"))
    assert nats / len(held_out) == pytest.approx(best, rel=1e-5)
