"""Download, verify and load models: files -> (encoder, hparams, params).

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
import sys

import numpy as np

from encoder import get_encoder

MODEL_SIZES = ("124M", "355M", "774M", "1558M")
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
HPARAMS, ENCODER, VOCAB = "hparams.json", "encoder.json", "vocab.bpe"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
FILES = ("checkpoint", HPARAMS, ENCODER, VOCAB, INDEX, "model.ckpt.meta", DATA)
SUMS = "SHA256SUMS"


class ModelError(Exception):
    """Something is wrong with a model's files or their download: one line for the user, who can mend it."""


def load_encoder_hparams_and_params(model_size, models_dir):
    """Loads a model, downloading it first if it is one of MODEL_SIZES and not there yet.

    model_size: the name of a folder in models_dir. Returns (encoder, hparams, params), where params is the nested dict
    {"wte", "wpe", "blocks": [{"ln_1", "attn", "ln_2", "mlp"}], "ln_f"} of float32 arrays, mapped copy-on-write: changes
    to them stay in memory. Raises ModelError.
    """
    if model_size in ("", ".", "..") or re.search(r"[/\\:\0]", model_size):
        raise ModelError(f"{model_size!r} is no model name: it must be a folder inside {models_dir}")
    model_dir = os.path.join(models_dir, model_size)
    needed = (HPARAMS, ENCODER, VOCAB, INDEX, DATA)
    missing = [name for name in needed if not os.path.exists(os.path.join(model_dir, name))]
    if missing and model_size in MODEL_SIZES:
        download_gpt2_files(model_size, model_dir)
    elif missing and os.path.isdir(model_dir):
        raise ModelError(f"{model_dir} is no complete checkpoint: it lacks {', '.join(missing)}")
    elif missing:
        raise ModelError(f"no model {model_size!r}: choose {', '.join(MODEL_SIZES)} or a folder in {models_dir}")

    hparams = load_hparams(os.path.join(model_dir, HPARAMS))
    try:
        encoder = get_encoder(model_size, models_dir)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_dir}: the tokenizer cannot be read: {error}") from error
    return encoder, hparams, load_params(model_dir, hparams)


def download_gpt2_files(model_size, model_dir):
    """Downloads the files of one of MODEL_SIZES that model_dir lacks. Raises ModelError."""
    import requests
    from tqdm import tqdm

    os.makedirs(model_dir, exist_ok=True)
    for name in FILES:
        path, url = os.path.join(model_dir, name), f"{BASE_URL}/{model_size}/{name}"
        if os.path.exists(path):
            continue
        try:
            with requests.get(url, stream=True, timeout=30) as response, open(path + ".part", "wb") as f:
                response.raise_for_status()
                n_bytes = int(response.headers["content-length"])
                with tqdm(desc=f"Fetching {name}", total=n_bytes, unit="B", unit_scale=True, disable=None) as bar:
                    for chunk in response.iter_content(chunk_size=2**16):
                        f.write(chunk)
                        bar.update(len(chunk))
                if f.tell() != n_bytes:
                    raise requests.ConnectionError(f"{f.tell()} of {n_bytes} bytes arrived")
        except (requests.RequestException, OSError) as error:
            raise ModelError(f"{name} could not be downloaded from {url}: {error}") from error
        os.replace(path + ".part", path)


def load_hparams(path):
    """Reads hparams.json: {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"}. Raises ModelError."""
    try:
        with open(path, encoding="utf-8") as f:
            hparams = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    for key in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        value = hparams.get(key) if isinstance(hparams, dict) else None
        if type(value) is not int or value < 1:
            raise ModelError(f"{path}: {key} must be a positive integer, not {value!r}")
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
    """The weights of a checkpoint as params, mapped into memory once it is verified. Raises ModelError."""
    data_path = os.path.join(model_dir, DATA)
    n_bytes, expected = os.path.getsize(data_path), 4 * n_params(hparams)
    if n_bytes < expected:
        raise ModelError(f"{data_path} has {n_bytes} bytes where {HPARAMS} implies {expected}: delete it to start anew")

    # "c" is copy-on-write: readers may change weights, files stay as they are
    mapped = split(np.memmap(data_path, np.float32, mode="c"), hparams) if n_bytes == expected else None
    if mapped and is_verified(model_dir):
        return nest(mapped)
    as_saved = read_checkpoint(model_dir, hparams)
    if mapped and all(np.array_equal(array.view(np.uint32), mapped[name].view(np.uint32)) for name, array in as_saved):
        write_sums(model_dir)
        return nest(mapped)
    print(f"{model_dir}: laid out unlike OpenAI's models, so TensorFlow reads it at every start", file=sys.stderr)
    return nest(dict(read_checkpoint(model_dir, hparams)))


def read_checkpoint(model_dir, hparams):
    """Yields (name, array) of every variable, read and checked (CRC32C) by TensorFlow. Raises ModelError."""
    tf, prefix = import_tensorflow(), os.path.join(model_dir, "model.ckpt")
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise ModelError(f"{prefix}.index is damaged: {one_line(error)}") from error
    for name, shape in variables(hparams):
        variable = f"model/{name}"
        if variable not in shapes:
            raise ModelError(f"{prefix}.index lacks the variable {variable}")
        if dtypes[variable] != tf.float32:
            raise ModelError(f"{prefix}.index: {variable} is {dtypes[variable].name}, not float32")
        if tuple(shapes[variable]) not in (shape, (1, *shape)):  # OpenAI's w have a leading 1
            raise ModelError(f"{prefix}.index: {variable} has shape {shapes[variable]}, {HPARAMS} implies {[*shape]}")
        try:
            yield name, reader.get_tensor(variable).reshape(shape)
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            raise ModelError(f"{os.path.join(model_dir, DATA)}: {variable} is damaged: {one_line(error)}") from error


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
    return " ".join(str(error).split())


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def is_verified(model_dir):
    """Whether SHA256SUMS, as `sha256sum` writes it, vouches for the checkpoint as it is now.

    The data file is hashed only when its time differs from that of SHA256SUMS, which is set to it after a success.
    """
    data_path, sums_path = os.path.join(model_dir, DATA), os.path.join(model_dir, SUMS)
    try:
        with open(sums_path, encoding="ascii") as f:
            sums = dict(line.split("  ")[::-1] for line in f.read().splitlines())
    except (OSError, ValueError):
        return False
    if any(sums.get(name) != sha256(os.path.join(model_dir, name)) for name in (HPARAMS, INDEX)):
        return False
    changed = os.stat(data_path).st_mtime_ns
    if os.stat(sums_path).st_mtime_ns != changed:
        if sums.get(DATA) != sha256(data_path):
            return False
        with contextlib.suppress(OSError):  # a read-only folder: hashed at every start
            os.utime(sums_path, ns=(changed, changed))
    return True


def write_sums(model_dir):
    """Records in SHA256SUMS that the checkpoint is whole."""
    changed, path = os.stat(os.path.join(model_dir, DATA)).st_mtime_ns, os.path.join(model_dir, SUMS)
    lines = (f"{sha256(os.path.join(model_dir, name))}  {name}\n" for name in (HPARAMS, INDEX, DATA))
    try:
        with open(f"{path}.{os.getpid()}", "w", encoding="ascii") as f:
            f.writelines(lines)
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
    """
    tf = import_tensorflow()
    os.makedirs(model_dir, exist_ok=True)
    with open(os.path.join(model_dir, HPARAMS), "w", encoding="utf-8") as f:
        json.dump(hparams, f)
    names, tensors = [], []
    for name, shape in sorted(variables(hparams)):
        array = params
        for key in name.split("/"):
            array = array["blocks"][int(key[1:])] if re.fullmatch(r"h\d+", key) else array[key]
        names.append(f"model/{name}")
        tensors.append(np.asarray(array, np.float32).reshape((1, *shape) if name.endswith("/w") else shape))
    prefix = os.path.join(model_dir, "model.ckpt")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    with open(os.path.join(model_dir, "checkpoint"), "w", encoding="utf-8") as f:
        f.write('model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n')
