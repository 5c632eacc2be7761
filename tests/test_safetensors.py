"""files/safetensors.py reads what the package of that name writes, and refuses what that refuses."""

import json
import random

import numpy as np
import pytest
from conftest import optional

from files.safetensors import read_safetensors

FLOATS = ("float64", "float32", "float16", "bfloat16")


def written(header, data=b"", n_header=None):
    """The bytes of a file; header: an object, or its bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if n_header is None else n_header).to_bytes(8, "little") + header + data


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_arrays_are_those_that_the_package_reads(path):
    torch, safetensors = optional("torch"), optional("safetensors.torch")
    numbers = torch.randn(3, 5)
    tensors = {dtype: numbers.to(getattr(torch, dtype)) for dtype in FLOATS}
    tensors |= {"one": torch.tensor(1.5), "none": torch.zeros(0, 3), "of three axes": torch.randn(2, 3, 4)}
    safetensors.save_file(tensors, path, {"format": "pt"})
    arrays = read_safetensors(path)
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(arrays[name], tensor.numpy(), strict=True)


def test_of_what_is_no_float_the_dtype_is_told(path):
    torch, safetensors = optional("torch"), optional("safetensors.torch")
    tensors = {"i": torch.arange(3), "b": torch.ones(2, 2).bool(), "u": torch.ones(3, dtype=torch.uint8)}
    safetensors.save_file(tensors, path)
    assert read_safetensors(path) == {"i": "I64", "b": "BOOL", "u": "U8"}


@pytest.mark.parametrize("n_odd", range(8))
def test_arrays_are_mapped_and_not_read_wherever_they_begin(path, n_odd):
    header = json.dumps({"a": entry([2], 0, 8)}).encode()
    path.write_bytes(written(header + b" " * n_odd, np.array([1, 2], "<f4").tobytes()))
    array = read_safetensors(path)["a"]
    assert isinstance(array, np.memmap)
    assert not array.flags.owndata
    assert array.tolist() == [1, 2]


BAD = {
    "nothing": b"",
    "less than a length": b"1234567",
    "a header that lies beyond the end": written({}, n_header=100),
    "a header of any length": written({}, n_header=2**64 - 1),
    "a header that is no JSON": written(b"{"),
    "a header that is no UTF-8": written(b'{"\xff": 1}'),
    "a header that is no object": written([]),
    "a header that is nested deep": written(b"[" * 100_000),
    "an entry that is no object": written({"a": 3}),
    "no dtype": written({"a": {"shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    "no shape": written({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "no offsets": written({"a": {"dtype": "F32", "shape": []}}, bytes(4)),
    "three offsets": written({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4, 4]}}, bytes(4)),
    "a shape that is a number": written({"a": entry(2, 0, 8)}, bytes(8)),
    "a shape of texts": written({"a": entry(["2"], 0, 8)}, bytes(8)),
    "a shape of fractions": written({"a": entry([2.0], 0, 8)}, bytes(8)),
    "a shape below 0": written({"a": entry([-1, -2], 0, 8)}, bytes(8)),
    "offsets that run back": written({"a": entry([0], 8, 0)}, bytes(8)),
    "offsets below 0": written({"a": entry([2], -8, 0)}, bytes(8)),
    "another size than its shape": written({"a": entry([3], 0, 8)}, bytes(8)),
    "a shape of ten to the hundredth": written({"a": entry([10**20] * 5, 0, 8)}, bytes(8)),
    "an array beyond the end": written({"a": entry([4], 0, 16)}, bytes(8)),
    "two arrays in one place": written({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "a hole": written({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "something behind the last": written({"a": entry([2], 0, 8)}, bytes(9)),
    "something before the first": written({"a": entry([1], 4, 8)}, bytes(8)),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_with_is_refused(what, path):
    path.write_bytes(BAD[what])
    with pytest.raises(ValueError, match=r"\w"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "what", ["another size than its shape", "a shape of ten to the hundredth", "offsets that run back"]
)
def test_what_is_said_of_a_size_is_ours(what, path):
    path.write_bytes(BAD[what])
    with pytest.raises(ValueError, match="'a' is of another size than its shape"):
        read_safetensors(path)


@pytest.mark.parametrize("what", BAD)
def test_the_package_refuses_it_too(what, path):
    path.write_bytes(BAD[what])
    safetensors = optional("safetensors")
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "numpy"):
        pass


def test_a_header_larger_than_any_of_its_kind_is_refused(path):
    path.write_bytes(written(b"{}" + b" " * 25_000_000))
    with pytest.raises(ValueError, match="larger than any of its kind"):
        read_safetensors(path)


def test_more_axes_than_any_weight_has_are_refused(path):
    path.write_bytes(written({"a": entry([1] * 9, 0, 4)}, bytes(4)))
    with pytest.raises(ValueError, match="cannot be"):
        read_safetensors(path)


def test_whatever_byte_is_changed_nothing_but_a_value_error_comes(path):
    good, rng = (
        written({"a": entry([2, 2], 0, 16), "b": entry([1], 16, 20), "__metadata__": {"a": "b"}}, bytes(20)),
        random.Random(0),
    )
    n_refused = 0
    for _ in range(2000):
        data = bytearray(good)
        data[rng.randrange(len(good) - 20)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_safetensors(path)
        except ValueError:
            n_refused += 1
    assert n_refused > 1000
