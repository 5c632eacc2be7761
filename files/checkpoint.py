"""OpenAI's checkpoints: what they hold, how they are cut up, verified, mapped and saved.

The data file of a checkpoint is nothing but float32 arrays, and is mapped into memory as it lies on disk. At the first
load its checksums are compared; SHA256SUMS then vouches for the whole model, and later starts take milliseconds.
"""

import glob
import itertools
import json
import math
import os
import re
import sys

import numpy as np

from files.bundle import checksum, read_index, write_bundle
from files.sums import SUMS, read_sums, recorded_time, sums_of, write_sums
from files.together import replacing
from languages import translated

HPARAMS, ENCODER, VOCAB = "hparams.json", "encoder.json", "vocab.bpe"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"  # unless the file `checkpoint` has another prefix
TEXTS = HPARAMS, ENCODER, VOCAB
MEND = "replace it, or if it is OpenAI's, delete it to fetch it anew"


class CheckpointError(Exception):
    """A checkpoint cannot be used: what is wrong with which file, and what to do, for the user."""


# what a checkpoint holds


def load_hparams(path):
    """Reads hparams.json: {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"}. Raises CheckpointError."""
    try:
        with open(path, encoding="utf-8") as f:
            hparams = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for key in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        value = hparams.get(key) if isinstance(hparams, dict) else None
        if type(value) is not int or not 0 < value < 2**31:
            raise CheckpointError(f"{path}: {key} must be a positive integer below 2**31, not {value!r:.40}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise CheckpointError(f"{path}: n_embd {hparams['n_embd']} is not divisible by n_head {hparams['n_head']}")
    return hparams


def variables(hparams):
    """Yields (name, shape) of every variable in a checkpoint, under OpenAI's names less their "model/"."""
    n_embd = hparams["n_embd"]
    block = {
        "ln_1": {"g": (n_embd,), "b": (n_embd,)},
        "attn/c_attn": {"w": (n_embd, 3 * n_embd), "b": (3 * n_embd,)},
        "attn/c_proj": {"w": (n_embd, n_embd), "b": (n_embd,)},
        "ln_2": {"g": (n_embd,), "b": (n_embd,)},
        "mlp/c_fc": {"w": (n_embd, 4 * n_embd), "b": (4 * n_embd,)},
        "mlp/c_proj": {"w": (4 * n_embd, n_embd), "b": (n_embd,)},
    }
    yield "wte", (hparams["n_vocab"], n_embd)
    yield "wpe", (hparams["n_ctx"], n_embd)
    for i in range(hparams["n_layer"]):
        for layer, shapes in block.items():
            for name, shape in shapes.items():
                yield f"h{i}/{layer}/{name}", shape
    yield "ln_f/g", (n_embd,)
    yield "ln_f/b", (n_embd,)


def n_params(hparams):
    """The number of weights that hparams imply, in closed form: they may be anything."""
    n_vocab, n_ctx, n_embd, n_layer = (hparams[key] for key in ("n_vocab", "n_ctx", "n_embd", "n_layer"))
    return (n_vocab + n_ctx + 2) * n_embd + n_layer * (12 * n_embd + 13) * n_embd


def split(weights, hparams):  # [n_params] -> {name: array}
    """Cuts one vector of all weights into views, in the order in which OpenAI's checkpoints hold them: by name."""
    arrays, start = {}, 0
    for name, shape in sorted(variables(hparams)):
        stop = start + math.prod(shape)
        arrays[name] = weights[start:stop].reshape(shape)
        start = stop
    return arrays


def nest(arrays):  # {"h0/attn/c_attn/w": array, ...} -> {"blocks": [{"attn": {"c_attn": {"w": array}}}], ...}
    """Turns the checkpoint's flat names into the nested dict of params."""
    params = {"blocks": [{} for name in arrays if re.fullmatch(r"h\d+/ln_1/g", name)]}
    for name, array in arrays.items():
        *path, leaf = name.split("/")
        node = params
        for key in path:
            node = params["blocks"][int(key[1:])] if re.fullmatch(r"h\d+", key) else node.setdefault(key, {})
        node[leaf] = array
    return params


def random_params(hparams, seed=0):
    """Params of the right shapes with GPT-2's initial spread (normal, 0.02): for tests, benchmarks and training."""
    rng = np.random.default_rng(seed)
    arrays = split(0.02 * rng.standard_normal(n_params(hparams), dtype=np.float32), hparams)
    for name, array in arrays.items():
        if name.endswith("/g"):
            array += 1
    return nest(arrays)


# loading


def load_params(model_dir, hparams):
    """The weights of a checkpoint as params, mapped copy-on-write once they are verified.

    What SHA256SUMS vouches for is used as it is. New weights are held against the checksums in their index. The other
    files have none: if one has changed, that is an error until the user restores it, or accepts it by deleting
    SHA256SUMS. Unnoticed go: well-formed changes to those before there is a SHA256SUMS; and weights that change while
    their file's time does not, since hashing them takes longer than all the rest. Raises CheckpointError, OSError.
    """
    index, data = weight_files(model_dir)
    paths = [os.path.join(model_dir, name) for name in data]
    entries = find_weights(os.path.join(model_dir, index), paths, hparams)
    arrays = map_weights(paths, entries, hparams)

    try:
        recorded = read_sums(model_dir)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    changed = max(os.stat(path).st_mtime_ns for path in paths)
    is_recorded = changed == recorded_time(model_dir)
    known = recorded if is_recorded and len(paths) == 1 else {}  # of several, the time tells of the newest alone
    known = {name: known[name] for name in data if name in known}
    if not recorded:
        from concurrent.futures import ThreadPoolExecutor  # only here: its import takes milliseconds

        with ThreadPoolExecutor(1) as pool:  # hashes take one core, checksums another
            hashing = pool.submit(sums_of, model_dir, data)
            verify(paths, entries, arrays)
        known = hashing.result()
    sums = sums_of(model_dir, [*TEXTS, index, *data], known)

    others = [name for name in TEXTS if name in recorded and recorded[name] != sums.get(name)]
    if others:
        path = os.path.join(model_dir, others[0])
        raise CheckpointError(f"{path} is not as {SUMS} has it: restore it, or delete {SUMS} to accept it")
    if recorded and any(recorded.get(name) != sums[name] for name in (index, *data)):
        verify(paths, entries, arrays)
    if recorded != sums or not is_recorded:
        try:
            write_sums(model_dir, sums, changed)
        except OSError as error:
            warning = f"{model_dir}: cannot be written to, so it is verified at every start: {error}"
            print(translated(warning), file=sys.stderr)
    return nest(arrays)


def weight_files(model_dir):
    """(the name of a checkpoint's index, [those of its data files]), whether they are there or not.

    The file `checkpoint` may name another checkpoint in its folder than model.ckpt: training with OpenAI's code leaves
    such as model-1000. Raises CheckpointError if it names none.
    """
    path, prefix = os.path.join(model_dir, "checkpoint"), "model.ckpt"
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            # a path of folders is of where it was trained, and is left out: here it lies beside this file
            match = re.match(r'\s*model_checkpoint_path: *"(?:[^"]*(?:/|\\\\))?(\w[\w.-]*)"(?:\s|$)', f.read(2**16))
        if not match:
            raise CheckpointError(
                f'{path} must begin with model_checkpoint_path: "model.ckpt", or another plain name in its folder: '
                "mend it, or delete it"
            )
        prefix = match[1]
    first = glob.glob(os.path.join(glob.escape(model_dir), f"{prefix}.data-00000-of-[0-9][0-9][0-9][0-9][0-9]"))
    n = int(min(first, default="00001")[-5:])
    return f"{prefix}.index", [f"{prefix}.data-{i:05}-of-{n:05}" for i in range(n)]


def find_weights(index, paths, hparams):
    """{name: Entry} of every variable: where an index says that it lies in the data files at paths, and may lie.

    Others may lie beside them: global_step, or what an optimizer notes of a variable, such as model/wte/Adam.
    Raises CheckpointError.
    """
    sizes, expected = [os.path.getsize(path) for path in paths], 4 * n_params(hparams)
    if sum(sizes) < expected:
        raise CheckpointError(f"{', '.join(paths)} has {sum(sizes)} bytes where {HPARAMS} implies {expected}: {MEND}")
    try:
        n_files, found = read_index(index)
    except ValueError as error:
        raise CheckpointError(f"{index} is damaged: {error}: {MEND}") from error
    if n_files != len(paths):
        raise CheckpointError(f"{index} is of {n_files} data files, and here is one of {len(paths)}: {MEND}")

    entries = {}
    for name, shape in variables(hparams):
        entry, where = found.get(f"model/{name}"), f"{index}: model/{name}"
        if entry is None:
            raise CheckpointError(f"{index} lacks the variable model/{name}: {MEND}")
        if entry.dtype != "float32":
            raise CheckpointError(f"{where} is {entry.dtype}, not float32: {MEND}")
        if entry.shape not in (shape, (1, *shape)):  # OpenAI's w have a leading 1
            raise CheckpointError(f"{where} has shape {[*entry.shape]!s:.80}, {HPARAMS} implies {[*shape]}: {MEND}")
        if entry.size != 4 * math.prod(shape) or entry.shard >= n_files:
            raise CheckpointError(f"{where} is of another size than its shape: {MEND}")
        if entry.offset + entry.size > sizes[entry.shard]:
            raise CheckpointError(f"{where} lies beyond the end of {paths[entry.shard]}: {MEND}")
        entries[name] = entry
    in_order = sorted(entries.values(), key=lambda entry: (entry.shard, entry.offset))
    for before, after in itertools.pairwise(in_order):
        if before.shard == after.shard and before.offset + before.size > after.offset:
            raise CheckpointError(f"{index} has two variables in one place: {MEND}")
    for name in found:
        of = name.removeprefix("model/")
        if of != name and of not in entries and os.path.dirname(of) not in entries:
            raise CheckpointError(f"{index} has the variable {name:.80}, which {HPARAMS} does not imply: {MEND}")
    return entries


def map_weights(paths, entries, hparams):
    # "c" is copy-on-write: readers may change weights, files stay as they are
    files = {shard: np.memmap(paths[shard], np.uint8, "c") for shard in {entry.shard for entry in entries.values()}}
    arrays = {}
    for name, shape in variables(hparams):
        _, _, shard, start, size, _ = entries[name]
        array = files[shard][start : start + size].view(np.float32).reshape(shape)
        arrays[name] = np.require(array, requirements=["ALIGNED"])  # a copy where an odd number of bytes lies before it
    return arrays


def verify(paths, entries, arrays):
    """Raises CheckpointError unless the weights have the checksums that the index has."""
    for name, array in arrays.items():
        if checksum(array) != entries[name].checksum:
            path = paths[entries[name].shard]
            raise CheckpointError(f"{path} is damaged: model/{name} is not what its checksum in the index says: {MEND}")


# saving


def save_checkpoint(model_dir, hparams, params):
    """Writes hparams.json and a checkpoint under OpenAI's variable names and shapes, as TensorFlow does.

    With encoder.json and vocab.bpe beside them, the folder is a model that this project and OpenAI's code can load. A
    crash or a full disk leaves what was there before. Raises ValueError for params that are not what hparams imply, and
    OSError where there is no space left.
    """
    if len(params["blocks"]) != hparams["n_layer"]:
        raise ValueError(f"params have {len(params['blocks'])} blocks, the hparams imply {hparams['n_layer']}")
    tensors = []
    for name, shape in sorted(variables(hparams)):
        array = params
        for key in name.split("/"):
            array = array["blocks"][int(key[1:])] if re.fullmatch(r"h\d+", key) else array[key]
        if np.shape(array) != shape:
            raise ValueError(f"{name} has shape {np.shape(array)}, the hparams imply {shape}")
        tensors.append((f"model/{name}", np.asarray(array, np.float32).reshape((1,) * name.endswith("/w") + shape)))

    with replacing(model_dir) as new:
        with open(os.path.join(new, HPARAMS), "w", encoding="utf-8", newline="\n") as f:
            json.dump(hparams, f)
        write_bundle(os.path.join(new, "model.ckpt"), tensors)
        with open(os.path.join(new, "checkpoint"), "w", encoding="utf-8", newline="\n") as f:
            f.write('model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n')
        sums = sums_of(new, [HPARAMS]) | sums_of(model_dir, [ENCODER, VOCAB]) | sums_of(new, [INDEX, DATA])
        write_sums(new, sums, os.stat(os.path.join(new, DATA)).st_mtime_ns)
