"""Byte-pair encoding: text <-> token ids, with the same ids as OpenAI's encoder for every string.

A pattern cuts the text into words, and a word is its UTF-8 bytes, the first tokens. Then neighbours are joined to one
token, always the pair that training joined first, until no two are left that it ever joined: merge() is that loop.
Each of the 256 bytes is shown as a printable character (a space as Ġ), so that tokens can be stored as text.

    python encoder.py "Not all heroes wear capes." --merges

shows how a text is cut into tokens, step by step.
"""

import array
import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out
    import cli

    cli.start("regex")

import regex

from files import MODELS_DIR

SHA256 = {  # of GPT-2's own vocabulary, which is the same for all four sizes
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

# contractions, then letters, digits or anything else with the space before them, then white space on its own
PATTERN = regex.compile(r"'(?:[stdm]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SPECIAL = re.compile(r"<\|[!-~]*\|>")  # tokens that stand for no text, such as <|endoftext|>
SHORT = 12  # bytes of a word up to which the plain loop is the faster one


def bytes_to_unicode():
    """{byte: character}: the printable ones of Latin-1 stand for themselves, the others for those from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merge(word, ranks):
    """Cuts a word into tokens: joins the pair of lowest rank wherever it stands, and again, until no pair has a rank.

    word: a string; its characters are the first tokens. ranks: {"left right": rank}, in the order in which training
    joined them. Returns a list of strings. (Sennrich et al., https://arxiv.org/abs/1508.07909)
    """
    tokens = [*word]
    while pair := best_pair(tokens, ranks):
        tokens = join(tokens, pair)
    return tokens


def best_pair(tokens, ranks):
    """The neighbours "left right" of lowest rank, or None where none have one."""
    known = [pair for pair in map(" ".join, itertools.pairwise(tokens)) if pair in ranks]
    return min(known, key=ranks.get, default=None)


def join(tokens, pair):
    """The tokens, with the pair made one wherever it stands, from left to right."""
    left, right = pair.split(" ")
    joined = []
    for token in tokens:
        if token == right and joined and joined[-1] == left:
            joined[-1] = left + right
        else:
            joined.append(token)
    return joined


def merge_long(word, ranks):
    """merge(), in time that grows as the word does, not as its square: for a clause of Chinese, or a megabyte of it.

    merge() looks at the whole word again after every pair. Here a queue holds the ranks, each with the places where
    pairs of it begin, from left to right; a merge looks at its two neighbours alone, and places whose pair has changed
    since are skipped.
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
        for i in places.pop(rank):
            j = i + len(tokens[i])
            if not is_first[i] or ranks.get(f"{tokens[i]} {tokens[j]}") != rank:
                continue  # another merge has taken one of the two
            end, is_first[j] = j + len(tokens[j]), 0
            tokens[i] = tokens[end - 1] = sys.intern(tokens[i] + tokens[j])  # one copy of each
            if i > 0:
                look(i - len(tokens[i - 1]), i)
            look(i, end)
    return [token for token, first in zip(tokens, is_first) if first]  # noqa: B905  (tokens has one more)


def split(text, special):
    """Cuts a text at some of its special tokens: [text, token, text, token, ..., text]."""
    longest_first = sorted(special, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if special else [text]


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

    def __reduce__(self):  # pickled and copied as what it is made from, without the words that it has met
        return type(self), (self.encoder, [*self.ranks], self.errors)

    @functools.cached_property
    def bpe_ranks(self):
        """{(left, right): rank}, as OpenAI's encoder has them; only when asked: it takes as long as all the rest."""
        return {tuple(pair.split(" ")): rank for pair, rank in self.ranks.items()}

    @functools.cached_property
    def special_tokens(self):
        """The tokens in <|...|> that the vocabulary has, and no merge makes, as a set."""
        made = {pair.replace(" ", "") for pair in self.ranks}
        return {token for token in self.encoder.keys() - made if SPECIAL.fullmatch(token)}

    def characters(self, word):
        """A word of the text as a string with a character for each of its bytes."""
        return word.encode("utf-8").decode("latin-1").translate(self.byte_encoder)

    def bpe(self, word):
        """The ids of one word of the text."""
        word = self.characters(word)
        tokens = merge(word, self.ranks) if len(word) <= SHORT else merge_long(word, self.ranks)
        return [self.encoder[token] for token in tokens]

    def encode(self, text, allowed_special=()):
        """str -> list of ids. <|endoftext|> is text like any other, unless it is allowed to be a token.

        allowed_special: the tokens in <|...|> that are read as such, or "all" of special_tokens, as tiktoken has it.
        Raises ValueError for one that the vocabulary lacks, UnicodeEncodeError for lone surrogates.
        """
        ids = []
        for i, part in enumerate(split(text, self.allowed(allowed_special))):
            ids += [self.encoder[part]] if i % 2 else self.encode_ordinary(part)
        return ids

    def encode_ordinary(self, text):
        """encode() for text without special tokens."""
        ids = []
        for word in PATTERN.findall(text):
            ids += self.bpe_of_short_word(word) if len(word) <= 32 else self.bpe(word)
        return ids

    def allowed(self, allowed_special):
        """The special tokens that encode() allows, as a set."""
        if not allowed_special:
            return set()
        allowed = self.special_tokens if allowed_special == "all" else {*allowed_special}
        if unknown := allowed - self.special_tokens:
            known = ", ".join(sorted(self.special_tokens))
            raise ValueError(f"{min(unknown)!r} is no special token of this vocabulary, which has {known}")
        return allowed

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
        if not SPECIAL.fullmatch(token) and (encoder[token] in among or not {*token} <= characters)
    ]
    if lost:
        raise ValueError(f"vocab.bpe has no merge for {len(lost)} tokens of encoder.json, such as {lost[0]!r}")


def shown(data):
    """Bytes of a text, for any terminal: in quotes and escaped as in Python, or in hex where they are no text."""
    try:
        return repr(data.decode("utf-8"))
    except UnicodeDecodeError:
        return data.hex()


def steps(word, encoder):
    """Yields a line for each step of merge() with a word of the text."""
    tokens, said = [*encoder.characters(word)], ""
    while True:
        in_bytes = [bytes(encoder.byte_decoder[character] for character in token) for token in tokens]
        yield f"{'':8}{' '.join(map(shown, in_bytes))}{said}"
        pair = best_pair(tokens, encoder.ranks)
        if pair is None:
            return
        tokens, said = join(tokens, pair), f"  (merge {encoder.ranks[pair]})"


def lines(word, ids, encoder):
    """Yields a line for each token of a word: its id, and its text, or its bytes and of which characters they are."""
    place, start = [i for i, character in enumerate(word) for _ in character.encode("utf-8")], 0
    for i in ids:
        data = encoder.decode_bytes([i])
        stop = start + len(data)
        characters = word[place[start] : place[stop - 1] + 1]
        yield f"{i:>6}  {shown(data)}" + (f" of {characters!r}" if data != characters.encode("utf-8") else "")
        start = stop


def main(
    text: str = None,
    model_size: str = None,
    models_dir: str = MODELS_DIR,
    merges: bool = False,
    special: bool = False,
):
    """Shows how a text is cut into tokens: python encoder.py "Not all heroes wear capes."

    A line a token: its id, then its text in quotes; or its bytes in hex, where they are no whole characters.

    Args:
        text: the text to cut; - reads standard input, as does no text in a pipe
        model_size: the folder in models_dir that has the vocabulary; by default 124M or, where that is not, shakespeare
        models_dir: the folder that holds the models
        merges: show, word by word, how bytes become tokens; merge 0 is the first one in vocab.bpe
        special: <|endoftext|> in the text is that token, and not a text like any other
    """
    import cli

    text = cli.open_prompts(text, interactive=False, prompts_file=None)
    if model_size is None:
        model_size = "124M" if has_vocabulary(models_dir, "124M") else "shakespeare"
        cli.note("124M is not here, so this is how shakespeare cuts it" if model_size == "shakespeare" else "")
    if os.path.basename(model_size) != model_size:
        cli.fail(f"{model_size!r} is no model name: it must be a folder inside {models_dir!r}")
    if not has_vocabulary(models_dir, model_size):
        cli.fail(f"no encoder.json and vocab.bpe in {os.path.join(models_dir, model_size)!r}; shakespeare has its own")
    with cli.mistakes((OSError, ValueError)):
        encoder = get_encoder(model_size, models_dir)
        allowed = encoder.special_tokens if special else ()
        n_tokens = len(encoder.encode(text, allowed))
    for i, part in enumerate(split(text, allowed)):
        for word in [part] if i % 2 else PATTERN.findall(part):
            if merges and not i % 2:
                print(*steps(word, encoder), sep="\n")
            print(*lines(word, [encoder.encoder[word]] if i % 2 else encoder.bpe(word), encoder), sep="\n")
    cli.note(f"characters: {len(text)}; tokens: {n_tokens}")


def has_vocabulary(models_dir, model_size):
    return all(os.path.isfile(os.path.join(models_dir, model_size, name)) for name in SHA256)


if __name__ == "__main__":
    cli.run(main)
