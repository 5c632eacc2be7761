"""Arrays in the safetensors format, read without the package of that name, and without trust.

A file is the length of its header, 8 bytes, the lowest first; the header, which is JSON: {name: {"dtype", "shape",
"data_offsets": [start, stop]}}; and, from where the offsets count, the arrays, one right behind the other
(https://huggingface.co/docs/safetensors).
"""

import json
import math
import os

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LARGEST_HEADER = 25_000_000  # bytes, as huggingface_hub has it: that of GPT-2's largest has less than 100,000
MOST_AXES = 8


def read_safetensors(path):
    """{name: array, mapped from the file}, with bfloat16 as float32, and the dtype's name for what is no float.

    Many a file has an odd number of bytes before its arrays, which are not aligned then. Raises ValueError if it is
    damaged, OSError.
    """
    n_bytes = os.path.getsize(path)
    with open(path, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if start > min(n_bytes, LARGEST_HEADER):
            raise ValueError("its header lies beyond its end, or is larger than any of its kind")
        try:
            header = json.loads(f.read(start - 8))
        except RecursionError as error:
            raise ValueError("its header is nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    entries = {name: entry_of(name, value) for name, value in header.items()}
    data = np.memmap(path, np.uint8, "r", start) if n_bytes > start else np.zeros(0, np.uint8)

    arrays, end = {}, 0
    for name, (dtype, shape, first, last) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if first != end or last > len(data):  # so that together they are no larger than the file
            raise ValueError(f"{name!r:.80} does not begin where the one before ends, or lies beyond its end")
        arrays[name], end = as_array(dtype, shape, data[first:last]), last
    if end != len(data):
        raise ValueError("it goes on behind its last array")
    return arrays


def entry_of(name, value):
    """(dtype, shape, first byte, the one behind the last) of what a header says of an array. Raises ValueError."""
    try:
        dtype, shape, (first, last) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, first, last]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{name!r:.80} has no dtype, shape and data_offsets") from error
    if (
        not isinstance(dtype, str)
        or not isinstance(shape, list)
        or len(shape) > MOST_AXES
        or {*map(type, numbers)} != {int}
        or min(numbers) < 0
    ):
        raise ValueError(f"{name!r:.80} has a dtype, shape or data_offsets that cannot be")
    if dtype in DTYPES and last - first != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"{name!r:.80} is of another size than its shape")
    return dtype, shape, first, last


def as_array(dtype, shape, data):
    if dtype not in DTYPES:
        return dtype
    array = data.view(DTYPES[dtype]).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array  # the first half of a float32
