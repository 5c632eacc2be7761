"""Where the weights live: in NumPy's memory, on a GPU by CuPy, or on all that JAX sees: GPUs, TPUs or the processor.

One device holds all weights. Of several, each holds them, too, and takes some of the rows of a batch; or, with tensor
parallelism (https://arxiv.org/abs/1909.08053), groups of devices hold a part each. The model knows nothing of that:
JAX's compiler sees how its weights and rows are divided, and adds what the devices must tell each other.
"""

import contextlib
import importlib
import logging
import os

from threads import check_threads, use_threads

BACKENDS = {"numpy": "NumPy", "jax": "JAX", "cupy": "CuPy"}
DTYPES = {"numpy": ("float32",), "jax": ("float32", "bfloat16"), "cupy": ("float32",)}
INSTALL = {"jax": 'pip install jax, or "jax[cuda12]" for NVIDIA GPUs', "cupy": "pip install cupy-cuda12x"}
DIVIDED = {  # over "parts": columns of c_attn and c_fc, rows of both c_proj
    ("c_attn", "w"): (None, "parts"),
    ("c_attn", "b"): ("parts",),
    ("c_fc", "w"): (None, "parts"),
    ("c_fc", "b"): ("parts",),
    ("c_proj", "w"): ("parts", None),
}


class DeviceError(ValueError):
    """What was asked of arrays and devices cannot be had: one line for the user."""


def check(backend="numpy", dtype="float32", tensor_parallel=1, n_threads=None):
    """Raises DeviceError unless there is such a backend, installed and with a device, and ValueError for n_threads."""
    if backend not in BACKENDS:
        raise DeviceError(f"backend must be numpy, jax or cupy, not {backend!r}")
    if dtype not in DTYPES[backend]:
        raise DeviceError(f"dtype must be {' or '.join(DTYPES[backend])} with {BACKENDS[backend]}, not {dtype!r}")
    if type(tensor_parallel) is not int or tensor_parallel < 1:
        raise DeviceError(f"tensor_parallel must be a whole number, 1 or more, not {tensor_parallel!r}")
    if tensor_parallel > 1 and backend != "jax":
        raise DeviceError("tensor_parallel needs the backend jax")
    if n_threads is not None and backend != "numpy":
        raise DeviceError("n_threads needs the backend numpy")
    check_threads(n_threads)
    if backend == "numpy":
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA would tell of its memory at length, on stderr
    logging.getLogger("jax._src.xla_bridge").addFilter(in_one_line)
    try:
        library = importlib.import_module(backend)
    except ImportError as error:
        raise DeviceError(f"{BACKENDS[backend]} is not installed: {INSTALL[backend]}") from error
    try:
        n_devices = len(library.devices()) if backend == "jax" else library.cuda.runtime.getDeviceCount()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that JAX_PLATFORMS names one that is installed
        platforms = os.environ.get("JAX_PLATFORMS")
        reason = str(error) or f"JAX_PLATFORMS is {platforms}, which does not start or is missing; {INSTALL['jax']}"
        raise DeviceError(f"{BACKENDS[backend]} has no device to run on: {reason}") from error
    if n_devices % tensor_parallel:
        raise DeviceError(f"tensor_parallel {tensor_parallel} does not divide the devices that JAX sees: {n_devices}")


def in_one_line(record):
    """A filter for JAX's log, where the reason that no GPU can be used would be a traceback."""
    if record.exc_info:
        reason = " ".join(str(record.exc_info[1]).split())
        record.msg, record.args, record.exc_info = f"{record.getMessage()}: {reason}", (), None
    return True


def place(params, backend="numpy", dtype="float32", tensor_parallel=1, n_threads=None):
    """The params of a model, NumPy's, on the arrays and devices that are asked for, once for all that follows.

    backend: a key of BACKENDS. dtype: one of the backend's DTYPES; with JAX, float32 sets the precision of products for
    the whole process. tensor_parallel: how many devices share the weights of each block. n_threads: how many threads
    compute with NumPy; None: what is best. Raises as check does.
    """
    check(backend, dtype, tensor_parallel, n_threads)
    if backend == "numpy":
        use_threads(n_threads)
        return params
    return on_jax(params, dtype, tensor_parallel) if backend == "jax" else on_cupy(params)


def on_cupy(node):
    import cupy

    if isinstance(node, dict):
        return {key: on_cupy(value) for key, value in node.items()}
    return [*map(on_cupy, node)] if isinstance(node, list) else cupy.asarray(node)


def on_jax(params, dtype, tensor_parallel):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    keep_compiled(jax)
    if dtype == "float32" and jax.config.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "highest")  # else GPUs and TPUs round what goes into products
    if params["wte"].shape[-1] % tensor_parallel:
        raise DeviceError(f"tensor_parallel must divide the model's width of {params['wte'].shape[-1]}")
    devices = np.array(jax.devices()).reshape(-1, tensor_parallel)
    mesh = Mesh(devices, ("rows", "parts"))

    def put(path, x):
        layer = tuple(getattr(key, "key", None) for key in path[-2:])
        sharding = NamedSharding(mesh, PartitionSpec(*DIVIDED.get(layer, ())))
        return jax.device_put(x.astype(dtype), sharding if devices.size > 1 else devices[0, 0])

    return jax.tree.map_with_path(put, params)


def keep_compiled(jax):
    """Has JAX keep what it compiles in the user's cache folder, if that can be written to, for the next start."""
    folder = os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "gpt2-jax"
    )
    if jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR names another
        return
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def sharding(params, *axes):
    """How arrays with these axes ("rows", "parts" or None each) lie on JAX's devices that params are on.

    None where there is no more than one, or the arrays are another library's.
    """
    mesh = getattr(getattr(params["wte"], "sharding", None), "mesh", None)
    if mesh is None or mesh.size == 1:
        return None
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec(*axes))


def cache_sharding(params, n_head, n_rows):
    """How the cache of n_rows rows, [n_rows, n_head, ...], lies on the devices that params are on: see sharding.

    Fewer rows than devices are on all of them. The cache of one row is [n_head, ...].
    """
    lie = sharding(params)
    if lie is None:
        return None
    n = lie.mesh.shape
    heads = None if n_head % n["parts"] else "parts"
    return sharding(params, heads) if n_rows == 1 else sharding(params, "rows" if n_rows >= n["rows"] else None, heads)


def spread(x, params):  # [n_rows, ...] -> [n_rows, ...]
    """Rows divided evenly over the devices that params are on; as they are on one, or where they do not divide."""
    rows = sharding(params, "rows")
    if rows is None or len(x) % rows.mesh.shape["rows"]:
        return x
    import jax

    return jax.device_put(x, rows)


def described(params):
    """What params are on, in words for the user; nothing where that is NumPy, which needs no mention."""
    wte = params["wte"]
    backend = type(wte).__module__.partition(".")[0].removesuffix("lib")  # jaxlib has JAX's arrays
    if backend == "numpy":
        return ""
    library = importlib.import_module(backend)
    if backend == "jax":
        kind, n = min(device.device_kind for device in wte.devices()), len(wte.devices())
        what = f"{n} x {kind}" if n > 1 else "the CPU: it sees no GPU or TPU" if kind == "cpu" else kind
    else:
        what = library.cuda.runtime.getDeviceProperties(wte.device.id)["name"].decode()
    return f"{BACKENDS[backend]} {library.__version__} on {what}, {wte.dtype}"
