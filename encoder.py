"""Byte-pair encoding: text <-> token ids, with the same ids as OpenAI's encoder for every string.

A pattern cuts the text into words, and a word is its UTF-8 bytes; then neighbours are joined, the pair that training
met most often first, until no known pair is left. Each of the 256 bytes is shown as a printable character (a space as
Ġ), so that tokens can be stored as text.
"""

import array
import functools
import hashlib
import heapq
import json
import operator
import os
import re
import sys

import regex

SHA256 = {  # of GPT-2's own vocabulary, which is the same for all four sizes
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# contractions, then letters, digits or anything else with the space before them, then white space on its own
PATTERN = regex.compile(r"'(?:[stdm]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def bytes_to_unicode():
    """{byte: character}: the printable ones of Latin-1 stand for themselves, the others for those from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merge(word, ranks):
    """Cuts a word into tokens: joins neighbours, lowest rank first and from left to right, until no pair has a rank.

    word: a string; its characters are the first tokens. ranks: {"left right": rank}. Returns a list of strings.
    The usual loop looks at the whole word again after every merge, which takes time quadratic in its length. Here a
    merge looks at its two neighbours only: a queue holds the ranks, each with the places where pairs of it begin, and
    those that have changed since are skipped.
    """
    tokens = [*word, ""]  # each at its first place and at its last: what is beside one tells how far that reaches
    is_first = bytearray([1]) * len(word)
    queue, places = [], {}  # {rank: where its pairs begin}

    def look(i, j):  # at the tokens that begin at i and at j
        rank = ranks.get(f"{tokens[i]} {tokens[j]}")
        if rank is not None:
            if rank not in places:
                places[rank] = array.array("q")  # takes a fifth of a list's memory
                heapq.heappush(queue, rank)
            places[rank].append(i)

    for i in range(len(word)):
        look(i, i + 1)
    while queue:
        rank = heapq.heappop(queue)
        found = places.pop(rank)
        if len(found) > 1 and not all(map(operator.le, found, found[1:])):
            found = sorted(found)
        for i in found:
            j = i + len(tokens[i])
            if not is_first[i] or ranks.get(f"{tokens[i]} {tokens[j]}") != rank:
                continue  # another merge has taken one of the two
            end, is_first[j] = j + len(tokens[j]), 0
            tokens[i] = tokens[end - 1] = sys.intern(tokens[i] + tokens[j])  # one copy of each
            if i > 0:
                look(i - len(tokens[i - 1]), i)
            look(i, end)
    return [token for token, first in zip(tokens, is_first) if first]  # noqa: B905  (tokens has one more)


class Encoder:
    """encoder: {token: id}; merges: ["left right"], in the order learned; errors: as for bytes.decode."""

    def __init__(self, encoder, merges, errors="replace"):
        self.encoder = encoder
        self.decoder = {i: token for token, i in encoder.items()}
        self.errors = errors
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.bpe_of_short_word = functools.lru_cache(maxsize=2**16)(self.bpe)  # the words of a language come back

    @functools.cached_property
    def bpe_ranks(self):
        """{(left, right): rank}, as OpenAI's encoder has them; only when asked: it takes as long as all the rest."""
        return {tuple(pair.split(" ")): rank for pair, rank in self.ranks.items()}

    def bpe(self, word):
        """The ids of one word of the text."""
        word = word.encode("utf-8").decode("latin-1").translate(self.byte_encoder)  # a character for each byte
        return [self.encoder[token] for token in merge(word, self.ranks)]

    def encode(self, text):
        """str -> list of ids. <|endoftext|> is text like any other. Raises UnicodeEncodeError for lone surrogates."""
        ids = []
        for word in PATTERN.findall(text):
            ids += self.bpe_of_short_word(word) if len(word) <= 32 else self.bpe(word)
        return ids

    def decode(self, ids):
        """List of ids -> str. Bytes that are no UTF-8, such as half of an emoji, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors=self.errors)

    def decode_bytes(self, ids):
        """List of ids -> bytes: a token may hold a part of a character only."""
        return bytes(self.byte_decoder[character] for i in ids for character in self.decoder[i])


def get_encoder(model_size, models_dir):
    """Reads encoder.json and vocab.bpe of a model. Raises OSError, or ValueError that names the file and its fault."""
    data = {}
    for name in SHA256:
        with open(os.path.join(models_dir, model_size, name), "rb") as f:
            data[name] = f.read()
    genuine = all(hashlib.sha256(data[name]).hexdigest() == digest for name, digest in SHA256.items())
    try:
        encoder = json.loads(data["encoder.json"].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"encoder.json is no JSON: {error}") from error
    try:
        version, *merges, end = data["vocab.bpe"].decode("utf-8").replace("\r\n", "\n").split("\n")
    except ValueError as error:
        raise ValueError(f"vocab.bpe is empty or no UTF-8: {error}") from error
    if not version.startswith("#version") or end:
        raise ValueError("vocab.bpe must begin with a line #version and end with a line break: it is damaged")
    if not genuine:  # checks take as long as all the rest
        check_vocabulary(encoder)
        check_merges([tuple(pair.split(" ")) for pair in merges], encoder)
    return Encoder(encoder, merges)


def check_vocabulary(encoder):
    """Raises ValueError unless encoder, as it came from JSON, gives each id from 0 on to one token, {token: id}."""
    if type(encoder) is not dict or {*map(type, encoder.values())} != {int}:  # bool is no int here
        raise ValueError("encoder.json must hold an object of whole numbers")
    if "" in encoder:
        raise ValueError("encoder.json must not have an empty token")
    if sorted(encoder.values()) != [*range(len(encoder))]:
        raise ValueError("encoder.json must give each of the ids 0, 1, 2, ... to one token")
    if missing := {*bytes_to_unicode().values(), "<|endoftext|>"} - encoder.keys():
        raise ValueError(f"encoder.json lacks {len(missing)} of the 256 bytes and <|endoftext|>")


def check_merges(bpe_merges, encoder):
    """Raises ValueError unless the merges, [(left, right)], make just the tokens of the vocabulary.

    A token is then a byte, or two tokens joined, or a special one: in <|...|>, or with an id before or behind all those
    and <|endoftext|>, where fine-tuning adds them. So every token is made of known bytes.
    """
    if {*map(len, bpe_merges)} - {2}:
        raise ValueError("vocab.bpe must have two tokens on each line")
    if len({*bpe_merges}) < len(bpe_merges):
        raise ValueError("vocab.bpe has a merge twice")
    characters = {*bytes_to_unicode().values()}
    made = {*characters}
    for left, right in bpe_merges:
        if not {left, right} <= made:
            raise ValueError(f"vocab.bpe joins {left!r} and {right!r} before both are made")
        made.add(left + right)
    if unknown := made - encoder.keys():
        raise ValueError(f"vocab.bpe makes tokens that encoder.json lacks, such as {unknown.pop()!r}")
    ids = [encoder[token] for token in (*made, "<|endoftext|>")]
    among = range(min(ids), max(ids))
    lost = [
        token
        for token in encoder.keys() - made
        if not re.fullmatch(r"<\|[!-~]*\|>", token) and (encoder[token] in among or not {*token} <= characters)
    ]
    if lost:
        raise ValueError(f"vocab.bpe has no merge for {len(lost)} tokens of encoder.json, such as {lost[0]!r}")
