"""OpenAI's checkpoints: what they hold, how they are cut up, verified, read and saved. Only this file uses TensorFlow.

The data file of a checkpoint is nothing but float32 arrays, one after another in the order of their names, and is
mapped into memory as it lies on disk. TensorFlow reads it once, to verify it; the file SHA256SUMS then vouches for the
whole model, and later starts take milliseconds and do without TensorFlow.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import sys

import numpy as np

HPARAMS, ENCODER, VOCAB = "hparams.json", "encoder.json", "vocab.bpe"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
SUMS, SUMMED = "SHA256SUMS", (HPARAMS, ENCODER, VOCAB, INDEX, DATA)
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

    What SHA256SUMS vouches for is used as it is. If the checkpoint has changed since, TensorFlow reads it again, whose
    own checksums tell damage from new weights. The other files have no checksums of their own: if one has changed, that
    is an error until the user restores it or accepts it by deleting SHA256SUMS. Unnoticed go: well-formed changes
    to those before there is a SHA256SUMS; and weights that change while their file's time does not, since hashing them
    takes longer than all the rest. Raises CheckpointError, OSError.
    """
    data_path = os.path.join(model_dir, DATA)
    n_bytes, expected = os.path.getsize(data_path), 4 * n_params(hparams)
    if n_bytes < expected:
        raise CheckpointError(f"{data_path} has {n_bytes} bytes where {HPARAMS} implies {expected}: {MEND}")

    recorded, changed = read_sums(model_dir), os.stat(data_path).st_mtime_ns
    is_unchanged = changed == recorded_time(model_dir) and n_bytes == expected
    sums = sums_of(model_dir, {DATA: recorded[DATA]} if is_unchanged else {})
    if not is_vouched_for(model_dir, recorded, sums) and not verify_apart(model_dir):
        print(f"{model_dir}: laid out unlike OpenAI's models, so TensorFlow reads it at every start", file=sys.stderr)
        return nest(dict(read_checkpoint(model_dir, hparams)))
    if recorded != sums or not is_unchanged:
        write_sums(model_dir, sums, changed)
    return nest(map_data(data_path, hparams))


def is_vouched_for(model_dir, recorded, sums):
    """Whether SHA256SUMS, as recorded, has the weights as they are. Raises CheckpointError if it has other texts."""
    for name in (HPARAMS, ENCODER, VOCAB):
        if name in recorded and recorded[name] != sums.get(name):
            path = os.path.join(model_dir, name)
            raise CheckpointError(f"{path} is not as {SUMS} has it: restore it, or delete {SUMS} to accept it")
    return all(recorded.get(name) == sums.get(name) for name in (HPARAMS, INDEX, DATA))


def map_data(data_path, hparams):
    # "c" is copy-on-write: readers may change weights, files stay as they are
    return split(np.memmap(data_path, np.float32, mode="c"), hparams)


def verify(model_dir):
    """Has TensorFlow read a checkpoint: whether its data file holds the weights just as map_data() cuts them.

    Raises CheckpointError if it is damaged, or holds other variables than hparams imply.
    """
    hparams, data_path = load_hparams(os.path.join(model_dir, HPARAMS)), os.path.join(model_dir, DATA)
    mapped = os.path.getsize(data_path) == 4 * n_params(hparams) and map_data(data_path, hparams)
    return all([mapped and same_bits(array, mapped[name]) for name, array in read_checkpoint(model_dir, hparams)])


def same_bits(a, b):  # NaNs too
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def verify_apart(model_dir):
    """As verify(), in a process of its own, which runs the end of this file: a crafted index can crash TensorFlow."""
    import subprocess

    command = [sys.executable, os.path.abspath(__file__), model_dir]
    child = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")  # noqa: S603
    if child.returncode == 1:  # a bug: Python has printed its traceback
        raise RuntimeError(child.stderr)
    if child.returncode != 0:
        path = os.path.join(model_dir, INDEX)
        raise CheckpointError(f"{path}: TensorFlow crashes on it, as it does on some damaged ones: {MEND}")
    verdict = json.loads(child.stdout)
    if "error" in verdict:
        raise CheckpointError(verdict["error"])
    return verdict["can_be_mapped"]


def read_checkpoint(model_dir, hparams):
    """Yields (name, array) of every variable, read and checked (CRC32C) by TensorFlow. Raises CheckpointError."""
    tf, prefix = import_tensorflow(), os.path.join(model_dir, "model.ckpt")
    try:
        reader = tf.train.load_checkpoint(prefix)
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    except Exception as error:  # besides its own, TensorFlow raises IndexError, TypeError, MemoryError and others
        raise CheckpointError(f"{prefix}.index is damaged: {error}: {MEND}") from error
    check_variables(f"{prefix}.index", shapes, {key: dtype.name for key, dtype in dtypes.items()}, hparams)
    for name, shape in variables(hparams):
        try:
            array = reader.get_tensor(f"model/{name}").reshape(shape)
        except Exception as error:
            path = os.path.join(model_dir, DATA)
            raise CheckpointError(f"{path} is damaged: model/{name}: {error}: {MEND}") from error
        yield name, array


def check_variables(path, shapes, dtypes, hparams):
    """Raises CheckpointError unless an index, {name: shape} and {name: dtype}, has the variables that hparams imply.

    Others may lie beside them: global_step, or what an optimizer notes of a variable, such as model/wte/Adam.
    """
    implied = {f"model/{name}": shape for name, shape in variables(hparams)}
    for name, shape in implied.items():
        if name not in shapes:
            raise CheckpointError(f"{path} lacks the variable {name}: {MEND}")
        if dtypes[name] != "float32":
            raise CheckpointError(f"{path}: {name} is {dtypes[name]}, not float32: {MEND}")
        if tuple(shapes[name]) not in (shape, (1, *shape)):  # OpenAI's w have a leading 1
            raise CheckpointError(f"{path}: {name} has shape {shapes[name]}, {HPARAMS} implies {[*shape]}: {MEND}")
    for name in sorted(shapes):
        if name.startswith("model/") and name not in implied and os.path.dirname(name) not in implied:
            raise CheckpointError(f"{path} has the variable {name}, which {HPARAMS} does not imply: {MEND}")


def import_tensorflow():
    """TensorFlow, imported without its chatter, which goes past Python's sys.stderr. Raises CheckpointError."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # JAX, if it came first, has made it 1
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import tensorflow
    except ImportError as error:
        raise CheckpointError(
            "TensorFlow is needed to save a checkpoint, or to read one for the first time "
            f"(pip install -r requirements.txt): {error}"
        ) from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
    return tensorflow


# saving


def save_checkpoint(model_dir, hparams, params):
    """Writes hparams.json and, with TensorFlow, a checkpoint under OpenAI's variable names and shapes.

    With encoder.json and vocab.bpe beside them, the folder is a model that this project and OpenAI's code can load.
    Raises ValueError for params that are not what hparams imply, and OSError where there is no space left.
    """
    if len(params["blocks"]) != hparams["n_layer"]:
        raise ValueError(f"params have {len(params['blocks'])} blocks, the hparams imply {hparams['n_layer']}")
    tensors = {}
    for name, shape in sorted(variables(hparams)):
        array = params
        for key in name.split("/"):
            array = array["blocks"][int(key[1:])] if re.fullmatch(r"h\d+", key) else array[key]
        if np.shape(array) != shape:
            raise ValueError(f"{name} has shape {np.shape(array)}, the hparams imply {shape}")
        tensors[f"model/{name}"] = np.asarray(array, np.float32).reshape((1, *shape) if name.endswith("/w") else shape)

    tf = import_tensorflow()
    os.makedirs(model_dir, exist_ok=True)
    with open(os.path.join(model_dir, HPARAMS), "w", encoding="utf-8") as f:
        json.dump(hparams, f)
    prefix, names = os.path.join(model_dir, "model.ckpt"), [*tensors]
    arrays, slices = [*tensors.values()], [""] * len(names)
    try:
        tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=slices, tensors=arrays)
    except tf.errors.ResourceExhaustedError as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), model_dir) from error
    with open(os.path.join(model_dir, "checkpoint"), "w", encoding="utf-8") as f:
        f.write('model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n')
    if verify(model_dir):
        write_sums(model_dir, sums_of(model_dir), os.stat(os.path.join(model_dir, DATA)).st_mtime_ns)


# SHA256SUMS


def read_sums(model_dir):
    """SHA256SUMS, which is as `sha256sum` writes it, as {name: SHA-256}; {} where there is none.

    Raises CheckpointError if it is damaged: were it made anew, changes to what it vouched for would be accepted.
    """
    path = os.path.join(model_dir, SUMS)
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            lines = f.read().splitlines()
    except FileNotFoundError:
        return {}
    matches = [re.fullmatch("([0-9a-f]{64})  (.+)", line) for line in lines]
    sums = {match[2]: match[1] for match in matches if match and match[2] in SUMMED}
    if len(sums) < len(lines) or not {HPARAMS, INDEX, DATA} <= sums.keys():  # the tokenizer may come later
        raise CheckpointError(f"{path} is damaged: delete it to have the model verified anew")
    return sums


def write_sums(model_dir, sums, changed):
    """Records in SHA256SUMS that a model is whole, at the time, in ns, at which its data file changed."""
    path = os.path.join(model_dir, SUMS)
    part = f"{path}.{os.getpid()}"
    try:
        with open(part, "w", encoding="ascii") as f:
            f.writelines(f"{digest}  {name}\n" for name, digest in sums.items())
        os.utime(part, ns=(changed, changed))
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        print(f"{model_dir}: cannot be written to, so it is verified at every start: {error}", file=sys.stderr)


def recorded_time(model_dir):
    """When, in ns, the data file had changed that SHA256SUMS vouches for; None without SHA256SUMS."""
    path = os.path.join(model_dir, SUMS)
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def sums_of(model_dir, known=None):
    """{name: SHA-256} of those files of a model that are there. known: the same, of files that take long to hash."""
    paths = {name: os.path.join(model_dir, name) for name in SUMMED}
    known = known or {}
    return {name: known.get(name) or hexdigest(path) for name, path in paths.items() if os.path.exists(path)}


def hexdigest(path, algorithm="sha256"):
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":  # for verify_apart()
    try:
        verdict = {"can_be_mapped": verify(sys.argv[1])}
    except CheckpointError as error:
        verdict = {"error": str(error)}
    print(json.dumps(verdict))
