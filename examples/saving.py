"""What training leaves on disk: a model that is there whole or not at all, and the state from which its run goes on.

All files of a model are written into the folder .NAME.new beside it, which then takes its name, while the one before
waits as .NAME.old. What a process has left that died at any moment of this, settle() tells from what it holds.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from cli import fail, mistakes, note, one_line
from files.checkpoint import ENCODER, VOCAB
from files.lock import insist, is_at, try_lock

STATE = "state.npz"
MAY_CHANGE = ("n_steps", "evaluate_every", "accumulate", "recompute")  # when a run is resumed

# folders


def beside(model_dir, kind):
    """The path of .NAME.kind beside a model; no name of a model begins with a dot."""
    parent, name = os.path.split(os.path.realpath(model_dir))
    return os.path.join(parent, f".{name}.{kind}")


@contextlib.contextmanager
def alone(model_dir):
    """Keeps other processes from writing the same model, and puts in order what one that died has left.

    Ends with one line if another process has it: the system takes the lock back from one that dies.
    """
    path = beside(model_dir, "lock")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab") as f:
        if not try_lock(f) or not is_at(f, path):
            fail(f"another process is writing {model_dir}: wait until it has ended, or choose another name")
        try:
            settle(model_dir)
            yield
        finally:
            if os.name == "nt":
                f.close()  # Windows removes no file that is open, here or in another process
            with contextlib.suppress(OSError):
                os.remove(path)


def settle(model_dir):
    """Ends what a process has begun that died while it saved a model: what was whole stays, the rest goes."""
    model_dir, new, old = os.path.realpath(model_dir), beside(model_dir, "new"), beside(model_dir, "old")
    if os.path.isdir(old) and not os.path.exists(model_dir):  # the new one is whole, or the old one were still in place
        insist(os.rename, new if os.path.isdir(new) else old, model_dir)
    if os.path.isdir(old):
        for name in {*os.listdir(old)} - {*os.listdir(model_dir)}:  # a state, and what others have put there
            insist(os.rename, os.path.join(old, name), os.path.join(model_dir, name))
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)


def is_left_half(model_dir):
    """Whether a process died while it saved a model: nobody is at work, and yet there is a part of a new one."""
    if not os.path.exists(beside(model_dir, "new")):
        return False
    try:
        with open(beside(model_dir, "lock"), "rb") as f:
            return try_lock(f)
    except OSError:
        return True


@contextlib.contextmanager
def replaced(model_dir):
    """Yields an empty folder, which takes the place of model_dir once it is filled, with what it lacks from there.

    Where it cannot be filled, it is gone, and model_dir is as it was. To be used within alone().
    """
    model_dir, new, old = os.path.realpath(model_dir), beside(model_dir, "new"), beside(model_dir, "old")
    os.mkdir(new)
    try:
        yield new
        for name in os.listdir(new):
            with open(os.path.join(new, name), "r+b") as f:
                os.fsync(f.fileno())  # so that not even a power cut can leave less under the final name
        if os.path.exists(model_dir):
            insist(os.rename, model_dir, old)
        insist(os.rename, new, model_dir)
    finally:
        settle(model_dir)


def copy_tokenizer(source, folder):
    for name in (ENCODER, VOCAB):
        shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))


# the state of a run


def leaves(tree):
    """The arrays in a tree of dicts, lists and tuples, in the order in which JAX has them."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [leaf for node in tree for leaf in leaves(node)]
    return [tree]


def with_leaves(tree, arrays):
    """A tree like this one, of other arrays: an iterator of them, in the order of leaves()."""
    if isinstance(tree, dict):
        return {key: with_leaves(tree[key], arrays) for key in sorted(tree)}
    if isinstance(tree, list | tuple):
        nodes = [with_leaves(node, arrays) for node in tree]
        return type(tree)(*nodes) if hasattr(tree, "_fields") else type(tree)(nodes)
    return next(arrays)


def save_state(path, settings, step, history, losses, arrays):
    """Writes all that a resumed run needs into one .npz file, or leaves the one that is there. arrays: any tree."""
    named = {f"array_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves(arrays))}
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            np.savez(f, progress=json.dumps([settings, step, history, losses]), **named)
        insist(os.replace, part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise OSError(error.errno, error.strerror, path) from error


def read_arrays(path):
    """{name: array} of an .npz file, of which nothing is unpickled. Raises ValueError if it cannot be read."""
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as arrays:  # one that load opens may stay open
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # of a damaged file, NumPy, zipfile and zlib raise whatever comes
        raise ValueError(one_line(error) or type(error).__name__) from error


def progress_of(text):
    """(settings, step, history, losses) as save_state wrote them. Raises ValueError if they are no such thing."""
    try:
        settings, step, history, losses = json.loads(text)
        is_whole = isinstance(settings, dict) and type(settings.get("n_steps")) is type(step) is int and step >= 0
        entries = [(type(n), type(mean) in (float, type(None)), type(value)) for n, mean, value in history]
        are_right = {*entries} <= {(int, True, float)} and {*map(type, losses)} <= {float}
    except (TypeError, RecursionError) as error:
        raise ValueError(f"its progress is damaged: {one_line(error)}") from error
    if not is_whole or not are_right:
        raise ValueError("its progress is damaged")
    return settings, step, history, losses


def refuse_others(settings, saved):
    """Ends with one line unless a run was saved with the same settings, but for MAY_CHANGE."""
    for key, value in settings.items():
        if key in MAY_CHANGE or saved.get(key) == value:
            continue
        if key == "data":
            fail("the run to resume learned from other data, or was made by another version")
        if key == "base":
            fail(f"the run to resume began from another model: {settings['model_size']} has changed since")
        fail(f"the run to resume has {key}={saved.get(key)!r:.80}, not {value!r:.80}")


def load_state(path, settings, arrays):
    """(step, history, losses, arrays) as save_state wrote them; arrays: a tree of what has their shapes and dtypes.

    Ends with one line if it cannot be read, if the settings were others, or if there are no steps left to make.
    """
    expected = leaves(arrays)
    with mistakes(ValueError, f"the run cannot be resumed from {path}: "):
        found = read_arrays(path)
        saved, step, history, losses = progress_of(str(found.pop("progress", None)))
        refuse_others(settings, saved)
        if found.keys() != {f"array_{i}" for i in range(len(expected))}:
            raise ValueError(f"it has {len(found)} arrays, and this run has {len(expected)}")
        found = [found[f"array_{i}"] for i in range(len(expected))]
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                raise ValueError(
                    f"array_{i} is {ours.dtype} of shape {[*ours.shape]}, "
                    f"and that of this run {theirs.dtype} of {[*theirs.shape]}"
                )
    was, now = saved["n_steps"], settings["n_steps"]
    if now <= step and (now < step or (history and history[-1][0] == step)):
        fail(f"the run has made {step} steps already: to add some, give a larger --n_steps")
    if now != was:
        note(f"{now} steps instead of {was}: the learning rate goes on as in a run of {now}")
    return step, history, losses, with_leaves(arrays, iter(found))


# the loss curve


def plot(path, history, unit):
    """Draws the loss curves, where matplotlib is installed; history: [step, training or None, held-out]."""
    if not importlib.util.find_spec("matplotlib"):
        return

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    training = [(step, loss) for step, loss, _ in history if loss is not None]
    if training:
        axes.plot(*zip(*training, strict=True), ".-", label=f"training: {training[-1][1]:.3f} at last")
    steps, _, held_out = zip(*history, strict=True)
    axes.plot(steps, held_out, ".-", label=f"held out: {min(held_out):.3f} at best")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    png = io.BytesIO()  # drawn, before anything is written
    figure.savefig(png, dpi=100, bbox_inches="tight")
    with open(f"{path}.part", "wb") as f:
        f.write(png.getvalue())
    insist(os.replace, f"{path}.part", path)
