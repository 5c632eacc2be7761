"""Whose an array is, NumPy's, CuPy's or JAX's, and where it lies: what the model must know of that, and no more."""

import sys

from backends.products import product

QUERY_BLOCK = 64  # queries that attend together: their scores fit the processor's cache


def namespace(x):
    """The library that an array belongs to, as the Python array API standard has it."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules[type(x).__module__]  # CuPy 14 does not follow the standard in this


def is_jax(x):
    return hasattr(x, "at")


def is_numpy(x):
    return type(x).__module__ == "numpy"


def on_processor(x):
    """Whether an array lies in this machine's memory: it is NumPy's, or JAX's and not on a GPU or TPU."""
    if not is_jax(x):
        return is_numpy(x)
    import jax

    if isinstance(x, jax.core.Tracer):  # which will lie where all do that nobody has put elsewhere
        return jax.default_backend() == "cpu"
    return all(device.platform == "cpu" for device in x.devices())


def query_block(q):
    """How many queries attend together. On a GPU more: fewer are no faster there, and JAX compiles every block anew."""
    return QUERY_BLOCK if on_processor(q) else 8 * QUERY_BLOCK


def matmul(x, w, dtype=None):  # [..., in], [in, out] -> [..., out]
    """x @ w, in one product for all rows of a batch: x @ w would read w again for every sequence in it.

    dtype: of the result, where JAX would round it to half precision: to steps of 0.5 near -100, where logits lie.
    """
    rows = x.reshape(-1, x.shape[-1])  # [m, in]
    if dtype and is_jax(x) and x.dtype.itemsize < 4:
        y = namespace(x).matmul(rows, w, preferred_element_type=dtype)
    else:
        y = product(rows, w)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def n_weights(params):
    """The number of weights in the matrices that every token meets: all but wpe."""
    return params["wte"].size + 12 * len(params["blocks"]) * params["wte"].shape[-1] ** 2


def round_up(n, most):
    """The next power of 2 from 16 on, but no more than most: JAX compiles every shape anew, so there are to be few."""
    return min(max(16, 1 << (n - 1).bit_length()), most)
