"""examples/saving.py and the loop of training.py, on a learner of a few numbers: what is on disk, whatever happens."""

import errno
import json
import os
import pathlib
import signal
import sys

import numpy as np
import pytest
from conftest import REPO, assert_one_line_error, command, optional, running

sys.path.insert(0, str(REPO / "examples"))
import saving
import training

from files.checkpoint import DATA, ENCODER, VOCAB

jax, optax = optional("jax"), optional("optax")

SETTINGS = {"n_steps": 4, "batch_size": 2, "evaluate_every": 2, "seed": 0, "dropout": 0.0}


def files(folder):
    """{name: content} of all files in a folder, the hidden ones too."""
    return {path.name: path.read_text() for path in folder.iterdir()}


def write(folder, **content):
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)


# a folder


def test_a_folder_is_replaced_as_a_whole_and_keeps_what_others_have_put_there(tmp_path):
    write(tmp_path / "mine", model="old", notes="mine")
    with saving.alone(tmp_path / "mine"), saving.replaced(tmp_path / "mine") as folder:
        pathlib.Path(folder, "model").write_text("new")
        assert files(tmp_path / "mine") == {"model": "old", "notes": "mine"}
    assert files(tmp_path / "mine") == {"model": "new", "notes": "mine"}
    assert os.listdir(tmp_path) == ["mine"]


def fill_half(folder):
    pathlib.Path(folder, "model").write_text("ne")
    raise OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize("there", [False, True])
def test_what_fails_to_be_written_leaves_all_as_it_was(there, tmp_path):
    if there:
        write(tmp_path / "mine", model="old")
    with (
        pytest.raises(OSError, match="full"),
        saving.alone(tmp_path / "mine"),
        saving.replaced(tmp_path / "mine") as new,
    ):
        fill_half(new)
    assert os.listdir(tmp_path) == ["mine"] * there
    assert not there or files(tmp_path / "mine") == {"model": "old"}


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({".mine.new": {"model": "ne"}}, None),  # while the first was written
        ({"mine": {"model": "old"}, ".mine.new": {"model": "ne"}}, {"model": "old"}),  # while a better one was
        ({".mine.old": {"model": "old", "a": "b"}, ".mine.new": {"model": "new"}}, {"model": "new", "a": "b"}),
        ({"mine": {"model": "new"}, ".mine.old": {"model": "old", "a": "b"}}, {"model": "new", "a": "b"}),
        ({".mine.old": {"model": "old"}}, {"model": "old"}),
    ],
)
def test_what_a_process_leaves_that_is_killed_is_put_in_order_by_the_next(left, expected, tmp_path):
    for name, content in left.items():
        write(tmp_path / name, **content)
    with saving.alone(tmp_path / "mine"):
        pass
    assert os.listdir(tmp_path) == (["mine"] if expected else [])
    assert not expected or files(tmp_path / "mine") == expected


HOLD = """
import sys; sys.path[:0] = [{0!r}, {1!r}]
from saving import alone, replaced
with alone({2!r}), replaced({2!r}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_in_one_line_and_a_dead_one_locks_nothing(tmp_path):
    code = HOLD.format(str(REPO), str(REPO / "examples"), str(tmp_path / "mine"))
    with running(code=code) as first:
        first.stdout.readline()
        assert not saving.is_left_half(tmp_path / "mine")
        assert_one_line_error(command(code=code), "another process is writing")
        first.kill()
        first.wait()
    assert saving.is_left_half(tmp_path / "mine")
    with saving.alone(tmp_path / "mine"):
        pass
    assert os.listdir(tmp_path) == []


# a state


def test_trees_have_their_leaves_in_the_order_of_jax():
    params = {"wte": np.ones(2), "blocks": [{"b": np.ones(3), "a": np.zeros(1)}], "ln": (np.ones(4), {})}
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1.0, 9)))
    tree = params, adamw.init(params)
    for ours, theirs in zip(saving.leaves(tree), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again = saving.with_leaves(tree, iter(range(len(saving.leaves(tree)))))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert jax.tree.leaves(again) == [*range(len(saving.leaves(tree)))]


TREE = {"a": np.zeros(3, np.float32), "b": [np.ones((2, 2), np.float32)]}


@pytest.fixture
def state(tmp_path):
    saving.save_state(tmp_path / "state.npz", SETTINGS, 2, [[0, None, 5.0], [2, 4.0, 3.0]], [2.5], TREE)
    return tmp_path / "state.npz"


def refusal(path, settings=SETTINGS, tree=TREE):
    with pytest.raises(SystemExit) as error:
        saving.load_state(path, settings, tree)
    assert "\n" not in error.value.code
    return error.value.code


def test_a_state_is_read_as_it_was_written(state):
    step, history, losses, tree = saving.load_state(state, SETTINGS, TREE)
    assert (step, history, losses) == (2, [[0, None, 5.0], [2, 4.0, 3.0]], [2.5])
    for ours, theirs in zip(saving.leaves(tree), saving.leaves(TREE), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (TREE | {"a": np.zeros(4, np.float32)}, "array_0 is float32 of shape [3], and that of this run float32 of [4]"),
        (TREE | {"a": np.zeros(3, np.int32)}, "array_0 is float32 of shape [3], and that of this run int32 of [3]"),
        ({"a": TREE["a"]}, "it has 2 arrays, and this run has 1"),
        (TREE | {"c": TREE["a"]}, "it has 2 arrays, and this run has 3"),
    ],
)
def test_a_state_of_other_shapes_or_kinds_is_refused_with_what_differs(state, tree, said):
    assert said in refusal(state, tree=tree)


@pytest.mark.parametrize(
    "progress",
    [
        *("5", "{}", "[", "[" * 100_000, "[1, 2, 3, 4]", '[{"n_steps": "4"}, 2, [], []]', "[{}, 2, [], []]"),
        *('[{"n_steps": 4}, -1, [], []]', '[{"n_steps": 4}, true, [], []]', '[{"n_steps": 4}, 1, [5], []]'),
        *('[{"n_steps": 4}, 1, [[0, "a", 1.0]], []]', '[{"n_steps": 4}, 1, [], ["a"]]', '[{"n_steps": 4}, 1, 5, []]'),
    ],
)
def test_progress_that_is_none_is_refused(state, progress):
    arrays = {f"array_{i}": array for i, array in enumerate(saving.leaves(TREE))}
    np.savez(state, progress=progress, **arrays)
    assert "cannot be resumed" in refusal(state, settings={"n_steps": 4})


def loaded_or_refused(path):
    try:
        return saving.load_state(path, SETTINGS, TREE)
    except SystemExit as error:
        return error.code


def test_no_bit_of_a_state_can_flip_unseen_and_none_gives_a_traceback(state):
    content, rng = state.read_bytes(), np.random.default_rng(0)
    expected = saving.load_state(state, SETTINGS, TREE)
    for at in rng.integers(0, 8 * len(content), 300):
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        state.write_bytes(damaged)
        found = loaded_or_refused(state)
        if isinstance(found, str):
            assert "\n" not in found
            continue
        assert found[:3] == expected[:3]  # a bit that says nothing, such as a file's time
        for ours, theirs in zip(saving.leaves(found[3]), saving.leaves(TREE), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_base_model_that_has_changed_under_its_name_is_told_of(state, tmp_path):
    folder = tmp_path / "base"
    write(folder, **{name: "old" for name in (ENCODER, VOCAB, DATA)})
    settings = SETTINGS | {"base": training.base_of(folder), "model_size": "base"}
    saving.save_state(state, settings, 2, [], [], TREE)
    saving.load_state(state, settings, TREE)
    for name in (ENCODER, VOCAB, DATA):
        (folder / name).write_text("new")
        said = refusal(state, settings | {"base": training.base_of(folder)})
        assert "the run to resume began from another model: base has changed since" in said
        (folder / name).write_text("old")


# the loop, on the least that can stand where on_jax.Learner does


class Learner:
    is_first = True

    def __init__(self):
        self.state = {"a": np.zeros(1, np.float32)}

    def start(self, rows, state):
        self.state = state or self.state
        return 1, 1, 0.0

    def share(self, which):
        return which[None]

    def update(self, rows, step):
        self.state = {"a": self.state["a"] + 1}
        return 1.0

    def model(self):
        return {"params": self.state["a"]}, {"params": self.state["a"]}


class Task:
    unit, scale = "nats", 1.0

    def __init__(self, values):
        self.data, self.values = training.Rows({"ids": np.zeros((4, 1))}, 2), values

    def evaluate(self, params, learned):
        value = self.values[int(params["params"][0])]
        return float(value), f"held out {value}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that makes a run of tmp_path/models/mine, of which evaluations find values by step."""

    def save_checkpoint(folder, hparams, params):
        pathlib.Path(folder, "model").write_text(f"{params['params'][0]:.0f}")

    monkeypatch.setattr(training, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(saving, "plot", lambda *args: None)
    monkeypatch.setattr(training, "plot", lambda *args: None)
    write(tmp_path / "base", **{"encoder.json": "{}", "vocab.bpe": ""})

    def start(values, resume=False):
        made = training.Run(
            str(tmp_path / "models" / "mine"), str(tmp_path / "base"), {}, SETTINGS, Learner(), Task(values)
        )
        os.makedirs(tmp_path / "models", exist_ok=True)
        made.start(resume)
        return made

    return start


def saved(tmp_path):
    """(the step of the model on disk, that of the state beside it)."""
    folder = tmp_path / "models" / "mine"
    with np.load(folder / "state.npz") as state:
        step = json.loads(str(state["progress"]))[1]
        assert state["array_0"] == step
    return int((folder / "model").read_text()), step


def test_the_best_model_stays_while_the_state_goes_on(run, tmp_path):
    assert run([3, 0, 1, 0, 2]).learn() is False
    assert saved(tmp_path) == (2, 4)
    assert {*os.listdir(tmp_path / "models" / "mine")} == {"model", "state.npz", "encoder.json", "vocab.bpe"}


def test_a_model_and_its_state_come_together_or_not_at_all(run, tmp_path, monkeypatch):
    made = run([3, 0, 2, 0, 1])
    monkeypatch.setattr(
        training.Run, "write_state", lambda run, folder: disk_is_full() if run.step == 4 else write_state(run, folder)
    )
    with pytest.raises(SystemExit) as error:
        made.learn()
    assert error.value.code.endswith("cannot be saved: [Errno 28] No space left on device")
    assert saved(tmp_path) == (2, 2)
    assert os.listdir(tmp_path / "models") == ["mine"]


write_state = training.Run.write_state


def disk_is_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", [2, 4])
def test_ctrl_c_while_a_run_saves_is_no_traceback_and_loses_nothing(step, run, tmp_path, monkeypatch):
    def write_and_press(run, folder):
        if run.step == step:
            signal.raise_signal(signal.SIGINT)
        write_state(run, folder)

    monkeypatch.setattr(training.Run, "write_state", write_and_press)
    before, made = signal.getsignal(signal.SIGINT), run([3, 0, 2, 0, 1])
    try:
        assert made.learn() is True  # in an evaluation, and again in the save that Ctrl-C brings
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C ended the run while it saved")
    assert saved(tmp_path) == (step, step)
    assert made.is_done() is (step == 4)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stopped_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    def press(learner, rows, step):
        signal.raise_signal(signal.SIGINT)
        return update(learner, rows, step)

    update = Learner.update
    monkeypatch.setattr(Learner, "update", press)
    assert run([3, 0, 2, 0, 1]).learn() is True
    assert saved(tmp_path) == (0, 1)
    monkeypatch.undo()
    monkeypatch.setattr(training, "save_checkpoint", lambda folder, *_: pathlib.Path(folder, "model").write_text("4"))
    assert run([3, 0, 2, 0, 1], resume=True).learn() is False
    assert saved(tmp_path) == (4, 4)


def test_samples_reach_a_terminal_without_what_it_would_obey():
    assert training.indented("a\x1b[2Jb\n\tc\x07é\ufffd") == "    a?[2Jb\n     c?é\ufffd"
