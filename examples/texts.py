"""Texts to learn from and to be evaluated on: files -> documents -> ids."""

import glob
import json
import os
import sys
import zlib

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from cli import fail, mistakes

END = "<|endoftext|>"


def paths_of(patterns):
    """Files, folders and globs -> files, in order. Ends with one line for one that names no file, or one twice."""
    paths = []
    for pattern in patterns:
        inside = os.path.join(glob.escape(pattern), "**") if os.path.isdir(pattern) else pattern
        found = glob.glob(inside, recursive=True)
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, found))
        if not found:
            fail(f"{pattern} cannot be read: there is no such file, and no files in such a folder")
        paths += found
    places = set()
    for path in paths:
        if (place := os.path.realpath(path)) in places:
            fail(f"{path} is given twice")
        places.add(place)
    return paths


def checksums(files, held_out):
    """[of all that a run learns from, of what it is evaluated on]. held_out: "" for a part of files."""
    held_out = [held_out] if held_out else []
    paths_of([*files, *held_out])  # ends if a file is in both
    return [checksum(paths_of(patterns)) for patterns in (files, held_out)]


def checksum(paths):
    total = 0
    for path in paths:
        with mistakes(OSError), open(path, "rb") as f:
            total = zlib.crc32(f.read(), total)
    return total


def read_text(path):
    """Ends with one line for a file that cannot be read, is not UTF-8, or has nothing in it."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {error}")
    if not text:
        fail(f"{path} is empty")
    return text


def read_documents(patterns, *kinds):
    """The documents in files: dicts of texts with the keys of one of kinds, and "where" each is from.

    A file in .jsonl has one on every line, whose other fields are left out. Any other file holds {"text"}, several of
    them parted by <|endoftext|>. Ends with one line that names bad lines by file and number.
    """
    documents = []
    if not patterns:
        fail("no files to learn from (see --help)")
    for path in paths_of(patterns):
        if path.lower().endswith(".jsonl"):
            documents += read_jsonl(path, kinds)
        elif ("text",) in kinds:
            documents += [{"text": text, "where": path} for text in read_text(path).split(END) if text]
        else:
            fail(f"{path} is no .jsonl file")
    if not documents:
        fail(f"{patterns[0]} has no text")
    if odd := [document for document in documents if document.keys() != documents[0].keys()]:
        fail(f"{odd[0]['where']} is of another kind than {documents[0]['where']}")
    return documents


def read_jsonl(path, kinds):
    documents, faults = [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            fields = next((kind for kind in kinds if isinstance(found, dict) and {*kind} <= found.keys()), None)
            if fields is None:
                wanted = " or ".join("{" + ", ".join(f'"{field}"' for field in kind) + "}" for kind in kinds)
                raise ValueError(f"no object with {wanted}")
            document = {field: found[field] for field in fields}
            for field, text in document.items():
                if not isinstance(text, str) or not (text or field in ("prompt", "text")):
                    raise ValueError(f'"{field}" is {text!r:.40}, not a text')
                text.encode()
            documents.append({**document, "where": f"{path}, line {number}"})
        except (ValueError, RecursionError) as error:
            faults[number] = "not valid Unicode text" if isinstance(error, UnicodeError) else error
    if faults:
        (number, fault), *others = faults.items()
        more = f" (lines {', '.join(str(n) for n, _ in others[:10])} are bad, too)" if others else ""
        fail(f"{path}, line {number}: {fault}{more}")
    return documents


def hold_out(texts):
    """(texts to learn from, texts held out): the last tenth of all characters, even if it begins within a text."""
    texts, held_out, n_left = [*texts], [], sum(map(len, texts)) // 10
    if not n_left:
        fail("the text is too short to hold out a tenth of it")
    while n_left:
        text = texts.pop()
        n = min(n_left, len(text))
        held_out.append(text[len(text) - n :])
        texts += [text[:-n]] if n < len(text) else []
        n_left -= n
    return texts, held_out[::-1]


def text_ids(encoder, texts):
    """All ids of texts in one array; <|endoftext|> begins each, as it begins what is generated from nothing."""
    return np.array([i for text in texts for i in (encoder.encoder[END], *encoder.encode(text))])
