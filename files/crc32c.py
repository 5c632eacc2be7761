"""CRC-32C (Castagnoli's, RFC 3720), by which TensorFlow's checkpoints tell damage, in NumPy.

Packages that compute it want installing, and lack wheels for one system or another; this takes less time than the
SHA-256 of the same bytes, which is wanted, too.

Data are a polynomial over GF(2), their first bit the highest power, and the CRC is what division by P leaves of it. To
add is to XOR, and to add a multiple of P changes nothing. One is x^299 + x^142 + x^134 + x^62 + x^21 + 1; and so, since
(a + b)^2 = a^2 + b^2 there, is the same with x^2 for x, or with x^8, which leads from byte to byte. So a byte is taken
away by XORing it to the bytes 157, 165, 237, 278 and 299 places behind it; or 4096 times as far behind, and then
643,072 bytes at once.
"""

import struct

import numpy as np

PLACES = (157, 165, 237, 278, 299)
SCALES = (4096, 256, 16, 1)
PIECE = 2**24  # bytes that are worked on at once, in a copy


def table():
    """The CRC of each byte, less the inversions: P is 0x11EDC6F41, or 0x82F63B78 read from its lowest power up."""
    crcs = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        crcs.append(crc)
    return crcs


TABLE = table()


def crc32c(data):
    """The CRC-32C of bytes, or of an array as it lies in memory."""
    data, state = np.frombuffer(data, np.uint8), 0xFFFFFFFF
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        if len(piece) > PLACES[-1]:
            piece = piece.copy()
            piece[:4] ^= np.frombuffer(struct.pack("<I", state), np.uint8)
            piece, state = fold(piece), 0
        for byte in piece.tolist():
            state = TABLE[(state ^ byte) & 255] ^ state >> 8
    return state ^ 0xFFFFFFFF


def fold(data):
    """The 299 last of these bytes, when all before were taken away in turn."""
    start = 0
    for scale in SCALES:
        while (n := min(PLACES[0] * scale, len(data) - PLACES[-1] * scale - start)) > 0:
            for place in PLACES:
                behind = start + place * scale
                data[behind : behind + n] ^= data[start : start + n]
            start += n
    return data[start:]
