"""TensorFlow's checkpoints as they lie on disk, read and written without TensorFlow, which calls them tensor bundles.

PREFIX.data-00000-of-00001 holds the bytes of tensors, one after another. PREFIX.index says where each lies. It is a
table as LevelDB has them (its table_format.md): blocks of keys and values in the order of the keys; a block of handles,
which say where these blocks lie; and a footer with the handle of that one. Keys are the names of tensors, behind an
empty one for the whole; values are protocol buffers (TensorFlow's tensor_bundle.proto). An index is not trusted.
"""

import struct
from typing import NamedTuple

import numpy as np

from files.crc32c import crc32c

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
FOOTER = 48  # bytes: two handles, padding, MAGIC
TRAILER = 5  # bytes behind a block: how it is compressed, and the CRC-32C of all that
BLOCK = 2**18  # bytes after which TensorFlow begins another block
LARGEST_INDEX = 2**20  # bytes: ten times that of GPT-2's largest model with an optimizer's two slots for each weight
LONGEST_NAME = 1000
DTYPES = {1: "float32", 2: "float64", 3: "int32", 4: "uint8", 7: "string", 9: "int64", 10: "bool", 14: "bfloat16",
          19: "float16"}  # fmt: skip

# fields of protocol buffers by their tags: the number of the field, and the kind of its value in the lowest three bits
NUMBER, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
N_SHARDS, ENDIANNESS, VERSION = 1 << 3 | NUMBER, 2 << 3 | NUMBER, 3 << 3 | BYTES  # BundleHeaderProto
PRODUCER = 1 << 3 | NUMBER  # VersionDef
DTYPE, SHAPE, SHARD, OFFSET, SIZE, CRC, SLICES = (  # BundleEntryProto
    1 << 3 | NUMBER, 2 << 3 | BYTES, 3 << 3 | NUMBER, 4 << 3 | NUMBER, 5 << 3 | NUMBER, 6 << 3 | FOUR_BYTES,
    7 << 3 | BYTES,
)  # fmt: skip
DIM, DIM_SIZE = 2 << 3 | BYTES, 1 << 3 | NUMBER  # TensorShapeProto


class Entry(NamedTuple):
    """A tensor: what it is, in which data file and where it lies there, in bytes, and their checksum."""

    dtype: str
    shape: tuple
    shard: int
    offset: int
    size: int
    checksum: int


def checksum(data):
    """A CRC-32C, but not as it is: LevelDB rotates it and adds to it, since data that hold their own CRC spoil it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# reading


def read_index(path):
    """An index -> (the number of data files, {name: Entry}). Raises ValueError if it is damaged, OSError.

    Every byte is looked at once, so an index of the largest size takes at most some seconds and 500 MB. What an Entry
    says may be anything that fits its type.
    """
    with open(path, "rb") as f:
        data = f.read(LARGEST_INDEX + 1)
    if len(data) > LARGEST_INDEX:
        raise ValueError("it is larger than any of its kind")
    if len(data) < FOOTER or data[-len(MAGIC) :] != MAGIC:
        raise ValueError("it does not end as an index does")
    _, i = read_handle(data, len(data) - FOOTER)  # of a block that tells more of the others, if it is not empty
    (start, stop), _ = read_handle(data, i)

    n_shards, entries, last, end = 0, {}, None, 0
    for _, handle in read_block(data, start, stop):
        (start, stop), _ = read_handle(handle, 0)
        if start < end:
            raise ValueError("its blocks overlap")
        end = stop
        for key, value in read_block(data, start, stop):
            if last is not None and key <= last:
                raise ValueError("its names are not in order")
            if last is None:
                n_shards = read_header(key, value)
            else:
                entries[key.decode("utf-8", "replace")] = read_entry(value)
            last = key
    if last is None:
        raise ValueError("it is empty")
    return n_shards, entries


def read_block(data, start, stop):
    """Yields (key, value) of a block, each key told by how it differs from the one before."""
    if stop + TRAILER > len(data) or stop - start < 4:
        raise ValueError("a block lies beyond its end")
    kind, said = struct.unpack_from("<BI", data, stop)
    if said != checksum(data[start : stop + 1]):
        raise ValueError("the checksum of a block is wrong")
    if kind != 0:
        raise ValueError("it is compressed, which TensorFlow's never are")
    (n_restarts,) = struct.unpack_from("<I", data, stop - 4)  # behind the entries, where to begin a search
    block = data[start : max(start, stop - 4 - 4 * n_restarts)]

    i, key = 0, b""
    while i < len(block):
        n_shared, i = read_number(block, i)
        n_key, i = read_number(block, i)
        n_value, i = read_number(block, i)
        if n_shared > len(key) or n_shared + n_key > LONGEST_NAME or i + n_key + n_value > len(block):
            raise ValueError("a name or what it stands for lies beyond its block")
        key = key[:n_shared] + block[i : i + n_key]
        i += n_key + n_value
        yield key, block[i - n_value : i]


def read_handle(data, i):
    """((start, stop) of a block, where the next handle is)"""
    offset, i = read_number(data, i)
    size, i = read_number(data, i)
    return (offset, offset + size), i


def read_number(data, i):
    """(the number that begins at i, where the next thing is): seven bits a byte, the lowest first."""
    number = 0
    for n, byte in enumerate(data[i : i + 10]):
        number |= (byte & 127) << 7 * n
        if byte < 128:
            return number, i + n + 1
    raise ValueError("a number has no end")


def read_message(message):
    """Yields (tag, value) of a protocol buffer's fields."""
    i = 0
    while i < len(message):
        tag, i = read_number(message, i)
        kind = tag & 7
        if kind == NUMBER:
            value, i = read_number(message, i)
            yield tag, value
            continue
        if kind == BYTES:
            n, i = read_number(message, i)
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            n = 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError("a field is of no known kind")
        if i + n > len(message):
            raise ValueError("a field has no end")
        yield tag, message[i : i + n]
        i += n


def read_header(key, value):
    """The number of data files."""
    header = dict(read_message(value))
    if key != b"":
        raise ValueError("it has no header")
    if header.get(ENDIANNESS, 0) != 0:
        raise ValueError("its numbers are big-endian")
    return header.get(N_SHARDS, 0)


def read_entry(value):
    fields = dict(read_message(value))
    if SLICES in fields:
        raise ValueError("it has a tensor in slices")
    dims = [dict(read_message(dim)) for tag, dim in read_message(fields.get(SHAPE, b"")) if tag == DIM]
    return Entry(
        DTYPES.get(fields.get(DTYPE, 0), f"of type {fields.get(DTYPE, 0)}"),
        tuple(dim.get(DIM_SIZE, 0) for dim in dims),
        *(fields.get(tag, 0) for tag in (SHARD, OFFSET, SIZE)),
        int.from_bytes(fields.get(CRC, b""), "little"),
    )


# writing


def write_bundle(prefix, tensors):
    """Writes PREFIX.index and its one data file, byte for byte as TensorFlow does.

    tensors: (name, float32 array), one or more, in the order of their names. Raises OSError.
    """
    header = field(N_SHARDS, 1) + field(VERSION, field(PRODUCER, 1))
    pairs = [(b"", header)]
    with open(f"{prefix}.data-00000-of-00001", "wb") as f:
        for name, array in tensors:
            array = np.asarray(array, "<f4", order="C")
            pairs.append((name.encode(), entry(array.shape, f.tell(), array.nbytes, checksum(array))))
            f.write(array)
    with open(f"{prefix}.index", "wb") as f:
        f.write(table(pairs))


def entry(shape, offset, size, said):
    """The value of a float32 tensor in an index."""
    dims = b"".join(field(DIM, field(DIM_SIZE, n)) for n in shape)
    fields = field(DTYPE, 1), field(SHAPE, dims), field(OFFSET, offset), field(SIZE, size)
    return b"".join(fields) + number(CRC) + struct.pack("<I", said)


def field(tag, value):
    """A field of a protocol buffer; a number of 0 is what it has without one."""
    if tag & 7 == BYTES:
        return number(tag) + number(len(value)) + value
    return number(tag) + number(value) if value else b""


def number(n):
    """What read_number() reads."""
    data = bytearray()
    while n > 127:
        data.append(n & 127 | 128)
        n >>= 7
    return bytes([*data, n])


def table(pairs):
    """An index of (key, value), in the order of their keys."""
    data, handles = bytearray(), []
    while pairs:
        n, block = pack(pairs, BLOCK)
        (last, _), pairs = pairs[n - 1], pairs[n:]
        handles.append((separator(last, pairs[0][0] if pairs else None), append(data, block)))
    about = append(data, pack([])[1])
    footer = about + append(data, pack(handles, search_every=1)[1])
    return bytes(data + footer.ljust(FOOTER - len(MAGIC), b"\0") + MAGIC)


def pack(pairs, size=None, search_every=16):
    """(how many of (key, value) it holds, a block) of at least so many bytes, if there is enough to fill it.

    search_every: after how many a key stands in full, where a search may begin.
    """
    block, starts, last, n = bytearray(), [], b"", 0
    for key, value in pairs:
        n_shared = n_alike(last, key)
        if n % search_every == 0:
            n_shared = 0
            starts.append(len(block))
        block += number(n_shared) + number(len(key) - n_shared) + number(len(value)) + key[n_shared:] + value
        last, n = key, n + 1
        if size and len(block) + 4 * len(starts) + 4 >= size:
            break
    starts = starts or [0]
    return n, bytes(block) + struct.pack(f"<{len(starts) + 1}I", *starts, len(starts))


def append(data, block):
    """Adds a block to data, with its trailer, and returns its handle."""
    handle = number(len(data)) + number(len(block))
    data += block + b"\0"
    data += struct.pack("<I", checksum(block + b"\0"))
    return handle


def separator(last, following):
    """LevelDB's short key that is not before last, but before the one that follows, if there is one."""
    if following is None:
        return bytes([last[0] + 1])
    n = n_alike(last, following)
    if n < len(last) and last[n] + 1 < following[n]:
        return last[:n] + bytes([last[n] + 1])
    return last


def n_alike(a, b):
    """How many bytes a and b begin with are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
