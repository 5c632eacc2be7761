"""Verify and load models: files -> (encoder, hparams, params). What is missing comes from download.py.

A model is a folder in OpenAI's format. Its weights stay where OpenAI's TensorFlow checkpoint has them: the data file is
nothing but float32 arrays, one after another in the order of their names, and is mapped into memory as it lies on disk.
TensorFlow reads a checkpoint once, to verify it; the file SHA256SUMS then vouches for it, and later starts take
milliseconds and do without TensorFlow.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys

import numpy as np

from encoder import SHA256, get_encoder

HPARAMS, ENCODER, VOCAB = "hparams.json", "encoder.json", "vocab.bpe"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
FILES = ("checkpoint", HPARAMS, ENCODER, VOCAB, INDEX, "model.ckpt.meta", DATA)
SUMS, SUMMED = "SHA256SUMS", (HPARAMS, ENCODER, VOCAB, INDEX, DATA)
LIMITS = {HPARAMS: 2**16, ENCODER: 2**24, VOCAB: 2**24, INDEX: 2**24, SUMS: 2**16}  # bytes; GPT-2's largest has 1 MB

MODEL_SIZES = {
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "355M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "774M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "1558M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48},
}


class ModelError(Exception):
    """Something is wrong with a model's files or their download: one line for the user, who can mend it."""


def load_encoder_hparams_and_params(model_size, models_dir):
    """Loads a model, downloading it first if it is one of MODEL_SIZES and not there yet.

    model_size: the name of a folder in models_dir, or of a link there to one elsewhere. Returns (encoder, hparams,
    params), where params is the nested dict {"wte", "wpe", "blocks": [{"ln_1", "attn", "ln_2", "mlp"}], "ln_f"} of
    float32 arrays, mapped copy-on-write: changes to them stay in memory. Raises ModelError.
    """
    if re.search(r"[/\\:\0]|[. ]$|^$", model_size):  # Windows drops dots and spaces at the end
        raise ModelError(f"{model_size!r} is no model name: it must be a folder inside {models_dir}")
    model_dir = os.path.join(models_dir, model_size)
    missing = missing_files(model_dir, SUMMED)
    if missing and model_size in MODEL_SIZES:
        from download import download_gpt2_files  # only here: most starts need no network

        download_gpt2_files(model_size, model_dir)
    elif missing and os.path.isdir(model_dir):
        raise ModelError(f"{model_dir} is no complete checkpoint: it lacks {', '.join(missing)}")
    elif missing:
        raise ModelError(f"no model {model_size!r}: choose {', '.join(MODEL_SIZES)} or a folder in {models_dir}")

    try:
        return load_files(model_size, models_dir)
    except OSError as error:
        raise ModelError(f"{model_dir} cannot be read: {error}") from error


def load_files(model_size, models_dir):
    """As load_encoder_hparams_and_params, for a model whose files are there. Raises OSError as well."""
    model_dir = os.path.join(models_dir, model_size)
    for name, limit in LIMITS.items():
        path = os.path.join(model_dir, name)
        if os.path.lexists(path) and (not os.path.isfile(path) or os.path.getsize(path) > limit):
            raise ModelError(f"{path} is no file, or larger than any of its kind")
        if model_size in MODEL_SIZES and (fault := unlike_published(model_size, name, path)):
            raise ModelError(f"{path} is damaged: {fault}: delete it to fetch it anew")
    hparams = load_hparams(os.path.join(model_dir, HPARAMS))
    try:
        encoder = get_encoder(model_size, models_dir)
    except ValueError as error:
        raise ModelError(f"{model_dir}: the tokenizer cannot be read: {one_line(error)}") from error
    if len(encoder.encoder) != hparams["n_vocab"]:
        n_tokens = len(encoder.encoder)
        raise ModelError(f"{model_dir}: {ENCODER} has {n_tokens} tokens, {HPARAMS} implies {hparams['n_vocab']}")
    return encoder, hparams, load_params(model_dir, hparams)


def missing_files(model_dir, names=FILES):
    return [name for name in names if not os.path.isfile(os.path.join(model_dir, name))]


def unlike_published(model_size, name, path):
    """What tells the file at path from the one that OpenAI published under that name, as far as is known; or None."""
    if name in SHA256 and sha256(path) != SHA256[name]:
        return "its SHA-256 is not that of OpenAI's file"
    if name == HPARAMS:
        try:
            hparams = load_hparams(path)
        except ModelError as error:
            return str(error)
        if any(hparams[key] != value for key, value in MODEL_SIZES[model_size].items()):
            return f"OpenAI's has {MODEL_SIZES[model_size]}"
    return None


def load_hparams(path):
    """Reads hparams.json: {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"}. Raises ModelError."""
    try:
        with open(path, encoding="utf-8") as f:
            hparams = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    for key in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        value = hparams.get(key) if isinstance(hparams, dict) else None
        if type(value) is not int or not 0 < value < 2**31:
            raise ModelError(f"{path}: {key} must be a positive integer below 2**31, not {value!r:.40}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise ModelError(f"{path}: n_embd {hparams['n_embd']} is not divisible by n_head {hparams['n_head']}")
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
    n_vocab, n_ctx, n_embd, _, n_layer = (hparams[k] for k in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"))
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


def load_params(model_dir, hparams):
    """The weights of a checkpoint as params, mapped into memory once it is verified. Raises ModelError.

    What SHA256SUMS vouches for is used as it is. If the checkpoint has changed since, TensorFlow reads it again, whose
    own checksums tell damage from new weights. The other files have no checksums of their own: if one has changed, that
    is an error until the user restores it or accepts it by deleting SHA256SUMS. Unnoticed go: well-formed changes
    to those before there is a SHA256SUMS, except in MODEL_SIZES; and weights that change while their file's time does
    not, since hashing them takes longer than all the rest.
    """
    data_path, sums_path = os.path.join(model_dir, DATA), os.path.join(model_dir, SUMS)
    n_bytes, expected = os.path.getsize(data_path), 4 * n_params(hparams)
    if n_bytes < expected:
        raise ModelError(f"{data_path} has {n_bytes} bytes where {HPARAMS} implies {expected}: delete it to start anew")

    recorded = read_sums(model_dir)
    sums = {name: sha256(os.path.join(model_dir, name)) for name in (HPARAMS, ENCODER, VOCAB, INDEX)}
    for name in (HPARAMS, ENCODER, VOCAB):
        if recorded.get(name, sums[name]) != sums[name]:
            raise ModelError(f"{model_dir}: {name} is not as {SUMS} has it: restore it, or delete {SUMS} to accept it")
    # the data file is hashed only if its time is not that of SHA256SUMS, which was set to it after the last success
    changed = os.stat(data_path).st_mtime_ns
    unchanged = DATA in recorded and os.stat(sums_path).st_mtime_ns == changed
    sums[DATA] = recorded[DATA] if unchanged else sha256(data_path)
    verified = n_bytes == expected and all(recorded.get(name) == sums[name] for name in (HPARAMS, INDEX, DATA))
    if not verified and not is_mappable(model_dir):
        print(f"{model_dir}: laid out unlike OpenAI's models, so TensorFlow reads it at every start", file=sys.stderr)
        return nest(dict(read_checkpoint(model_dir, hparams)))
    if recorded != sums:
        write_sums(model_dir, sums, changed)
    elif not unchanged:
        with contextlib.suppress(OSError):  # a read-only folder: hashed at every start
            os.utime(sums_path, ns=(changed, changed))
    return nest(map_data(data_path, hparams))


def map_data(data_path, hparams):
    # "c" is copy-on-write: readers may change weights, files stay as they are
    return split(np.memmap(data_path, np.float32, mode="c"), hparams)


def is_mappable(model_dir):
    """Whether the data file holds the weights just as map_data() cuts them. Raises ModelError for a damaged checkpoint.

    TensorFlow reads it in a process of its own, which runs the end of this file: a crafted index can crash TensorFlow.
    """
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"}
    command = [sys.executable, os.path.abspath(__file__), model_dir]
    child = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", errors="surrogateescape")  # noqa: S603
    if child.returncode == 1:  # a traceback
        raise RuntimeError(child.stderr)
    if child.returncode == 2:
        raise ModelError(child.stdout)
    if child.returncode not in (0, 3):
        raise ModelError(f"{model_dir}: TensorFlow crashes on this checkpoint, as it does on some damaged ones")
    return child.returncode == 0


def agrees_with_tensorflow(model_dir):
    """As is_mappable(), in this process."""
    hparams, data_path = load_hparams(os.path.join(model_dir, HPARAMS)), os.path.join(model_dir, DATA)
    mapped = os.path.getsize(data_path) == 4 * n_params(hparams) and map_data(data_path, hparams)
    agree = [mapped and same_bits(array, mapped[name]) for name, array in read_checkpoint(model_dir, hparams)]
    return all(agree)


def same_bits(a, b):  # NaNs too
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def read_checkpoint(model_dir, hparams):
    """Yields (name, array) of every variable, read and checked (CRC32C) by TensorFlow. Raises ModelError."""
    tf, prefix = import_tensorflow(), os.path.join(model_dir, "model.ckpt")
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except Exception as error:  # besides its own, TensorFlow raises IndexError, TypeError, MemoryError and others
        raise ModelError(f"{prefix}.index is damaged and must be replaced: {one_line(error)}") from error
    for name, shape in variables(hparams):
        variable = f"model/{name}"
        if variable not in shapes:
            raise ModelError(f"{prefix}.index lacks the variable {variable}")
        if dtypes[variable] != tf.float32:
            raise ModelError(f"{prefix}.index: {variable} is {dtypes[variable].name}, not float32")
        if tuple(shapes[variable]) not in (shape, (1, *shape)):  # OpenAI's w have a leading 1
            raise ModelError(f"{prefix}.index: {variable} has shape {shapes[variable]}, {HPARAMS} implies {[*shape]}")
        try:
            array = reader.get_tensor(variable).reshape(shape)
        except Exception as error:
            path = os.path.join(model_dir, DATA)
            raise ModelError(f"{path} is damaged and must be replaced: {variable}: {one_line(error)}") from error
        yield name, array


def import_tensorflow():
    """TensorFlow, imported without its chatter, which goes past Python's sys.stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import tensorflow
    except ImportError as error:
        raise ModelError(f"TensorFlow is needed to read a checkpoint for the first time: {error}") from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
    return tensorflow


def one_line(error):
    """The text of an error without line breaks, and without the control characters of whoever sent it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))


def sha256(path):
    return hashed(path, hashlib.sha256()).hexdigest()


def hashed(path, digest):
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return digest


def read_sums(model_dir):
    """SHA256SUMS as {name: SHA-256}; empty if it is missing or damaged. The file is as `sha256sum` writes it."""
    try:
        with open(os.path.join(model_dir, SUMS), encoding="ascii") as f:
            return dict(line.split("  ")[::-1] for line in f.read().splitlines())
    except (OSError, ValueError):
        return {}


def write_sums(model_dir, sums, changed):
    """Records in SHA256SUMS that a model is whole, at the time at which its data file changed, in ns."""
    path = os.path.join(model_dir, SUMS)
    try:
        with open(f"{path}.{os.getpid()}", "w", encoding="ascii") as f:
            f.writelines(f"{digest}  {name}\n" for name, digest in sums.items())
        os.utime(f.name, ns=(changed, changed))
        os.replace(f.name, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.{os.getpid()}")
        print(f"{model_dir}: cannot be written to, so TensorFlow reads it at every start: {error}", file=sys.stderr)


def random_params(hparams, seed=0):
    """Params of the right shapes with GPT-2's initial spread (normal, 0.02): for tests, benchmarks and training."""
    rng = np.random.default_rng(seed)
    weights = 0.02 * rng.standard_normal(n_params(hparams), dtype=np.float32)
    arrays = split(weights, hparams)
    for name, array in arrays.items():
        if name.endswith("/g"):
            array += 1
    return nest(arrays)


def save_checkpoint(model_dir, hparams, params):
    """Writes hparams.json and, with TensorFlow, a checkpoint under OpenAI's variable names and shapes.

    With encoder.json and vocab.bpe beside them, the folder is a model that this project and OpenAI's code can load.
    Raises ValueError for params that are not what hparams imply.
    """
    if len(params["blocks"]) != hparams["n_layer"]:
        raise ValueError(f"params have {len(params['blocks'])} blocks, the hparams imply {hparams['n_layer']}")
    tf = import_tensorflow()
    os.makedirs(model_dir, exist_ok=True)
    with open(os.path.join(model_dir, HPARAMS), "w", encoding="utf-8") as f:
        json.dump(hparams, f)
    names, tensors = [], []
    for name, shape in sorted(variables(hparams)):
        array = params
        for key in name.split("/"):
            array = array["blocks"][int(key[1:])] if re.fullmatch(r"h\d+", key) else array[key]
        if np.shape(array) != shape:
            raise ValueError(f"{name} has shape {np.shape(array)}, the hparams imply {shape}")
        names.append(f"model/{name}")
        tensors.append(np.asarray(array, np.float32).reshape((1, *shape) if name.endswith("/w") else shape))
    prefix = os.path.join(model_dir, "model.ckpt")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    with open(os.path.join(model_dir, "checkpoint"), "w", encoding="utf-8") as f:
        f.write('model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n')
    if agrees_with_tensorflow(model_dir):
        names = set(SUMMED) - set(missing_files(model_dir))  # the tokenizer may come later
        sums = {name: sha256(os.path.join(model_dir, name)) for name in SUMMED if name in names}
        write_sums(model_dir, sums, os.stat(os.path.join(model_dir, DATA)).st_mtime_ns)


if __name__ == "__main__":  # for is_mappable()
    try:
        sys.exit(0 if agrees_with_tensorflow(sys.argv[1]) else 3)
    except ModelError as error:
        print(error, end="")
        sys.exit(2)
