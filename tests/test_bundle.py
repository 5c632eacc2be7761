"""files/bundle.py: TensorFlow's checkpoints, held against TensorFlow; an index made with ill will ends in one line."""

import random
import struct
import time

import numpy as np
import pytest
from conftest import optional
from hypothesis import given
from hypothesis import strategies as st

import files.crc32c
from files import checkpoint
from files.bundle import LARGEST_INDEX, Entry, checksum, read_index, write_bundle
from files.crc32c import PLACES, SCALES, crc32c

FILES = ".index", ".data-00000-of-00001"
HPARAMS = {"n_vocab": 5, "n_ctx": 3, "n_embd": 4, "n_head": 2, "n_layer": 2}


def write_with_tensorflow(prefix, tensors):
    tf = optional("tensorflow")
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[*tensors.values()],
    )


def assert_written_as_tensorflow_does(tensors, folder):
    write_with_tensorflow(folder / "theirs", tensors)
    write_bundle(folder / "ours", tensors.items())
    for ending in FILES:
        assert (folder / f"ours{ending}").read_bytes() == (folder / f"theirs{ending}").read_bytes()


def weights(hparams):
    arrays = checkpoint.split(np.arange(checkpoint.n_params(hparams), dtype=np.float32), hparams)
    return {f"model/{name}": array for name, array in arrays.items()}


# CRC-32C


@pytest.mark.parametrize(  # RFC 3720, B.4, and the customary check value
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crcs_are_those_of_the_standard(data, crc):
    assert crc32c(data) == crc


def crc_bit_by_bit(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(st.integers(0, 6000), st.randoms(use_true_random=False))
def test_the_crc_of_any_number_of_bytes_is_that_of_the_definition(n, rng):
    data = rng.randbytes(n)
    assert crc32c(data) == crc_bit_by_bit(data)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=3), st.integers(0, 2000), st.integers(1, 999))
def test_it_does_not_depend_on_the_pieces_that_it_is_computed_in(scales, n, piece):
    data = random.Random(n).randbytes(n)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(files.crc32c, "SCALES", (*sorted(scales, reverse=True), 1))
        monkeypatch.setattr(files.crc32c, "PIECE", piece)
        assert crc32c(data) == crc_bit_by_bit(data)


def test_a_byte_is_taken_away_by_adding_a_multiple_of_the_polynomial():
    for scale in SCALES:
        assert scale & (scale - 1) == 0  # a power of 2, by which squaring leads from one multiple to the next
    multiple = 1 << PLACES[-1] | sum(1 << PLACES[-1] - place for place in PLACES)
    while multiple.bit_length() > 32:
        multiple ^= 0x11EDC6F41 << multiple.bit_length() - 33
    assert multiple == 0


# writing


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (1, 1, 1), (127,), (128,), (3, 128, 5)])
def test_a_tensor_of_any_shape_is_written_as_tensorflow_does(shape, tmp_path):
    assert_written_as_tensorflow_does({"x": np.ones(shape, np.float32)}, tmp_path)


@pytest.mark.parametrize("n_layer", [1, 2, 9, 10, 11, 12, 24, 36, 48])
def test_models_of_any_number_of_blocks_are_written_as_tensorflow_does(n_layer, tmp_path):
    assert_written_as_tensorflow_does(weights(HPARAMS | {"n_layer": n_layer}), tmp_path)


def test_an_index_is_cut_into_blocks_as_tensorflow_does(tmp_path):
    names = [f"{i:04}{'x' * 150}" for i in range(3600)]  # 600,000 bytes
    assert_written_as_tensorflow_does(dict.fromkeys(names, np.ones(1, np.float32)), tmp_path)
    assert [*read_index(tmp_path / "ours.index")[1]] == names


@given(st.sets(st.text("a\x7fé/0", max_size=40), min_size=1, max_size=60))
def test_names_of_any_kind_are_written_as_tensorflow_does(tmp_path_factory, names):
    names = sorted(names - {""}, key=str.encode) or ["a"]
    assert_written_as_tensorflow_does(dict.fromkeys(names, np.ones(1, np.float32)), tmp_path_factory.mktemp("names"))


def test_tensorflow_reads_what_was_written(tmp_path):
    tensors = weights(HPARAMS)
    write_bundle(tmp_path / "ours", tensors.items())
    reader = optional("tensorflow").train.load_checkpoint(str(tmp_path / "ours"))
    assert sorted(reader.get_variable_to_shape_map()) == sorted(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(reader.get_tensor(name), tensor, strict=True)


def test_what_is_no_float32_or_lies_otherwise_in_memory_is_written_as_float32(tmp_path):
    tensor = np.arange(6.0).reshape(2, 3)
    write_bundle(tmp_path / "one", [("x", tensor.T)])
    write_bundle(tmp_path / "other", [("x", np.ascontiguousarray(tensor.T, np.float32))])
    for ending in FILES:
        assert (tmp_path / f"one{ending}").read_bytes() == (tmp_path / f"other{ending}").read_bytes()


# reading


def test_an_index_that_tensorflow_wrote_says_what_lies_where(tmp_path):
    tensors = {"b": np.arange(3, dtype=np.int64), "a": np.float32([[1, 2]]), "c": np.float16(1), "d": np.array([True])}
    write_with_tensorflow(tmp_path / "x", tensors)
    data = (tmp_path / "x.data-00000-of-00001").read_bytes()
    n_files, entries = read_index(tmp_path / "x.index")
    assert n_files == 1
    assert {name: (entry.dtype, entry.shape, entry.shard) for name, entry in entries.items()} == {
        "a": ("float32", (1, 2), 0),
        "b": ("int64", (3,), 0),
        "c": ("float16", (), 0),
        "d": ("bool", (1,), 0),
    }
    for name, entry in entries.items():
        there = data[entry.offset : entry.offset + entry.size]
        assert there == tensors[name].tobytes()
        assert entry.checksum == checksum(there)


def test_what_was_written_is_read(tmp_path):
    write_bundle(tmp_path / "x", [("a", np.float32([[1, 2]])), ("b", np.float32(3))])
    assert read_index(tmp_path / "x.index") == (
        1,
        {
            "a": Entry("float32", (1, 2), 0, 0, 8, checksum(struct.pack("<2f", 1, 2))),
            "b": Entry("float32", (), 0, 8, 4, checksum(struct.pack("<f", 3))),
        },
    )


# indices that are damaged, or made with ill will


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def block_of(pairs):
    """A block of (key, value), or (number of bytes shared with the key before, the rest of it, value)."""
    block = bytearray()
    for *shared, key, value in pairs:
        block += varint(shared[0] if shared else 0) + varint(len(key)) + varint(len(value)) + key + value
    return bytes(block) + struct.pack("<II", 0, 1)


def index_of(*blocks, kind=0, handles=None):
    """An index of these blocks, with right checksums."""
    data, places = bytearray(), []
    for block in [*blocks, block_of([])]:
        places.append(varint(len(data)) + varint(len(block)))
        data += block + bytes([kind]) + struct.pack("<I", checksum(block + bytes([kind])))
    handles = handles or [(b"%05d" % i, place) for i, place in enumerate(places[:-1])]
    block = block_of(handles)
    footer = places[-1] + varint(len(data)) + varint(len(block))
    data += block + b"\0" + struct.pack("<I", checksum(block + b"\0"))
    return bytes(data) + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


HEADER = (b"", b"\x08\x01\x1a\x02\x08\x01")
ENTRY = b"\x08\x01\x12\x04\x12\x02\x08\x04\x28\x10"  # float32, of shape [4], 16 bytes


def test_the_crafted_index_is_one_to_tensorflow_too(tmp_path):
    (tmp_path / "x.index").write_bytes(index_of(block_of([HEADER, (b"a", ENTRY)])))
    assert read_index(tmp_path / "x.index") == (1, {"a": Entry("float32", (4,), 0, 0, 16, 0)})
    reader = optional("tensorflow").train.load_checkpoint(str(tmp_path / "x"))
    assert reader.get_variable_to_shape_map() == {"a": [4]}


def test_big_endian_data_are_refused(tmp_path):
    (tmp_path / "x.index").write_bytes(index_of(block_of([(b"", b"\x08\x01\x10\x01"), (b"a", ENTRY)])))
    with pytest.raises(ValueError, match="big-endian"):
        read_index(tmp_path / "x.index")


GOOD = block_of([HEADER, (b"a", ENTRY)])
CRAFTED = {
    "nothing": (b"", "does not end as an index does"),
    "a table of another kind": (index_of(GOOD)[:-1] + b"\0", "does not end as an index does"),
    "larger than any": (bytes(LARGEST_INDEX) + index_of(GOOD), "larger than any"),
    "no header": (index_of(block_of([(b"a", ENTRY)])), "no header"),
    "no entries": (index_of(block_of([])), "it is empty"),
    "no blocks": (index_of(handles=[]), "it is empty"),
    "a wrong checksum": (index_of(GOOD).replace(b"a" + ENTRY, b"b" + ENTRY), "checksum of a block is wrong"),
    "a block compressed by Snappy": (index_of(GOOD, kind=1), "compressed"),
    "a block behind the end": (index_of(GOOD, handles=[(b"b", varint(10**6) + varint(100))]), "beyond its end"),
    "a block of 2**62 bytes": (index_of(GOOD, handles=[(b"b", b"\0" + varint(2**62))]), "beyond its end"),
    "a block of no bytes": (index_of(GOOD, handles=[(b"b", b"\0\0")]), "beyond its end"),
    "a block twice": (index_of(GOOD, handles=2 * [(b"b", b"\0" + varint(len(GOOD)))]), "blocks overlap"),
    "a handle cut short": (index_of(GOOD, handles=[(b"b", b"\0")]), "a number has no end"),
    "more restarts than bytes": (index_of(GOOD[:-4] + b"\xff" * 4), "it is empty"),
    "keys out of order": (index_of(block_of([HEADER, (b"b", ENTRY), (b"a", ENTRY)])), "not in order"),
    "a key twice": (index_of(block_of([HEADER, (b"a", ENTRY), (b"a", ENTRY)])), "not in order"),
    "two headers": (index_of(block_of([HEADER, HEADER])), "not in order"),
    "a second block that begins anew": (index_of(GOOD, GOOD), "not in order"),
    "more shared than there is": (index_of(block_of([HEADER, (1, b"a", ENTRY)])), "beyond its block"),
    "a long name": (index_of(block_of([HEADER, (b"a" * 1001, ENTRY)])), "beyond its block"),
    "a name that grows": (index_of(block_of([HEADER, *((i, b"a", ENTRY) for i in range(1002))])), "beyond its block"),
    "a value beyond its block": (index_of(GOOD.replace(b"\x0aa", b"\x7fa")), "beyond its block"),
    "a number without end": (index_of(block_of([HEADER, (b"a", b"\x08" + b"\xff" * 20)])), "a number has no end"),
    "a number cut short": (index_of(block_of([HEADER, (b"a", b"\x08\xff")])), "a number has no end"),
    "a block of numbers without end": (index_of(b"\xff" * 20 + bytes(4) + b"\x01\0\0\0"), "a number has no end"),
    "a field without end": (index_of(block_of([HEADER, (b"a", b"\x12\x7f")])), "a field has no end"),
    "a field of no kind": (index_of(block_of([HEADER, (b"a", b"\x0b")])), "no known kind"),
    "a checksum cut short": (index_of(block_of([HEADER, (b"a", b"\x35\0\0")])), "a field has no end"),
    "a shape that is none": (index_of(block_of([HEADER, (b"a", b"\x12\x01\x12")])), "a number has no end"),
    "slices": (index_of(block_of([HEADER, (b"a", ENTRY + b"\x3a\0")])), "slices"),
}  # fmt: skip


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_index_is_an_error_that_says_why(case, tmp_path):
    data, message = CRAFTED[case]
    (tmp_path / "x.index").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path / "x.index")


def test_fields_of_another_kind_than_theirs_are_none(tmp_path):
    odd = b"\x0a\x01a" + b"\x10\x05" + b"\x1d\0\0\0\0" + b"\x30\x07" + b"\x19" + bytes(8)
    (tmp_path / "x.index").write_bytes(index_of(block_of([HEADER, (b"a", odd)])))
    assert read_index(tmp_path / "x.index") == (1, {"a": Entry("of type 0", (), 0, 0, 0, 0)})


def largest(kind):
    """An index of about the largest size, well-formed in each part, that takes as long and as much as it can."""
    n = LARGEST_INDEX - 200
    if kind == "the longest names":
        first = (b"a" * 994 + b"000000", b"")
        return index_of(block_of([HEADER, first, *((994, b"%06d" % i, b"") for i in range(1, n // 10 - 200))]))
    if kind == "many short names":
        return index_of(block_of([HEADER, *((0, i.to_bytes(3, "big"), b"") for i in range(1, n // 6))]))
    if kind == "a shape of many dimensions":
        return index_of(block_of([HEADER, (b"a", b"\x12" + varint(n // 2 * 2) + n // 2 * b"\x12\0")]))
    return index_of(block_of([HEADER]), *([block_of([])] * (n // 30)))


@pytest.mark.parametrize(
    "kind", ["the longest names", "many short names", "a shape of many dimensions", "many small blocks"]
)
def test_the_largest_index_takes_seconds(kind, tmp_path):
    (tmp_path / "x.index").write_bytes(data := largest(kind))
    assert 0.8 * LARGEST_INDEX < len(data) <= LARGEST_INDEX
    start = time.process_time()
    read_index(tmp_path / "x.index")
    assert time.process_time() - start < 20  # two, where nothing else runs
