"""Texts to learn from and to be evaluated on: files -> documents -> ids."""

import csv
import glob
import io
import json
import os
import sys
import zlib

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from cli import fail, lines_of, mistakes, note, one_line

END = "<|endoftext|>"
BAR = "|"  # parts the labels of a text in .csv, which has no lists


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
            while chunk := f.read(2**20):
                total = zlib.crc32(chunk, total)
    return total


def read_text(path):
    """The text of a file, or of standard input for -, past a byte order mark, its lines ended by \\n alone.

    All that reads a text of the user's, to learn it or to measure it, reads it here. Ends with one line for a file that
    cannot be read, is neither UTF-8 nor UTF-16 that says so, or has nothing in it.
    """
    with mistakes((OSError, UnicodeDecodeError), f"{path} cannot be read: "), lines_of(path) as lines:
        text = plain(b"".join(lines).decode())
    if not text:
        fail(f"{path} is empty")
    return text


def plain(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_documents(patterns, *kinds):
    """The documents in files: dicts of texts with the keys of one of kinds, and "where" each is from.

    A file in .jsonl has an object on every line, in .json an array of them, in .csv a row each below their names; other
    fields are left out. Any other file holds {"text"}. Of {"text"}, <|endoftext|> parts several. Where kinds have
    {"prompt", "completion"}, {"messages"} become such: see pairs_of. A "label" may be a whole number, or a list, empty
    or not, of several labels: what parts those in .csv is |, and a file where it is in any label has several in each.
    Ends with one line that names what is bad by file and number.
    """
    documents = []
    if not patterns:
        fail("no files to learn from (see --help)")
    for path in paths_of(patterns):
        if is_structured(path):
            documents += [part for document in read_structured(path, kinds) for part in parted(document)]
        elif ("text",) in kinds:
            documents += parted({"text": read_text(path), "where": path})
        else:
            fail(f"{path} is none of {', '.join(READERS)}, and needs to be")
    if not documents:
        fail(f"{patterns[0]} has no text")
    if odd := [document for document in documents if kind_of(document) != kind_of(documents[0])]:
        fail(f"{odd[0]['where']} is of another kind than {documents[0]['where']}")
    return documents


def kind_of(document):
    """The names of its fields, and whether a label is one or a list."""
    return {field: type(value) for field, value in document.items()}


def parted(document):
    """The documents that one is, if it is {"text"}: <|endoftext|> parts them."""
    if document.keys() != {"text", "where"}:
        return [document]
    return [document | {"text": text} for text in document["text"].split(END) if text]


# readers of files: each yields (where in the file, a value that should be a document, or what is wrong with it)


def jsonl_values(path):
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"line {number}", json_value(line)


def json_values(path):
    values = json_value(read_text(path))
    if not isinstance(values, list):
        fail(f"{path} is no JSON array of objects{f': {values}' if isinstance(values, ValueError) else ''}")
    for number, value in enumerate(values, 1):
        yield f"element {number}", value


def json_value(text):
    try:
        return json.loads(text)
    except ValueError as error:
        return error
    except RecursionError:
        return ValueError("it is nested too deep")


def csv_values(path):
    text = read_text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        found = [(f"line {rows.line_num}", row) for row in rows]
    except csv.Error as error:
        fail(f"{path}, behind line {rows.line_num}: {error}")
    has_several = any(BAR in (row.get("label") or "") for _, row in found)
    for where, row in found:
        if None in row or None in row.values():
            row = ValueError("it has not as many fields as the first")
        elif has_several:
            row["label"] = [label.strip() for label in row["label"].split(BAR) if label.strip()]
        yield where, row


READERS = {".jsonl": jsonl_values, ".json": json_values, ".csv": csv_values}


def ending(path):
    """Of its name, with or without .gz, which cli.open_lines unpacks."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def is_structured(path):
    return ending(path) in READERS


def read_structured(path, kinds):
    """The documents in a file that READERS know, as they stand there. Ends with one line that names what is none."""
    documents, faults = [], {}
    for where, value in READERS[ending(path)](path):
        try:
            document = document_of(value, kinds)
        except ValueError as error:
            faults[where] = one_line(error)
            continue
        pairs = pairs_of(document["messages"]) if "messages" in document else [document]
        documents += [pair | {"where": f"{path}, {where}"} for pair in pairs]
    if faults:
        (where, fault), *others = faults.items()
        more = f" ({', '.join(other for other, _ in others[:10])} are bad, too)" if others else ""
        fail(f"{path}, {where}: {fault}{more}")
    return documents


def document_of(value, kinds):
    """The fields of one of kinds, {name: text}, of a value from JSON or CSV. Raises ValueError if it has none."""
    if isinstance(value, ValueError):
        raise value
    kinds = (*kinds, ("messages",)) if ("prompt", "completion") in kinds else kinds
    fields = next((kind for kind in kinds if isinstance(value, dict) and {*kind} <= value.keys()), None)
    if fields is None:
        wanted = " or ".join("{" + ", ".join(f'"{field}"' for field in kind) + "}" for kind in kinds)
        raise ValueError(f"no object with {wanted}")
    if fields == ("messages",):
        return {"messages": [{"role": role, "content": text} for role, text in turns(value["messages"])]}
    return {field: field_of(field, value[field]) for field in fields}


def field_of(field, value):
    """What a field holds: a text, or a list of several labels. Raises ValueError for what it may not be."""
    if field == "label":
        return [*map(label_of, value)] if isinstance(value, list) else label_of(value)
    return text_of(field, value, may_be_empty=field in ("prompt", "text"))


def label_of(value):
    return text_of("label", f"{value}" if type(value) is int else value)


def text_of(field, text, may_be_empty=False):
    if not isinstance(text, str) or not (text or may_be_empty):
        raise ValueError(f'"{field}" is {text!r:.40}, not a text')
    text.encode()  # lone surrogates are no text
    return plain(text)


# chats


def turns(messages):
    """Yields (role, text) of [{"role", "content"}]. Raises ValueError unless they are a chat that an assistant ends."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('"messages" is no list of {"role", "content"}')
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("the last of the messages is not the assistant's")
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ("user", "assistant") and (role != "system" or i):
            raise ValueError(f'"role" is {role!r:.40}, not user or assistant, or at first system')
        yield role, text_of("content", message.get("content"))


def pairs_of(messages):
    """A {"prompt", "completion"} for each answer in a chat. The prompt holds all before, as the template has it:

    the system's text and an empty line, then "User: " or "Assistant: " and the text of each turn, on a line of its own.
    """
    pairs, text = [], ""
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            pairs.append({"prompt": f"{text}Assistant:", "completion": f" {content}"})
        text += f"{content}\n\n" if message["role"] == "system" else f"{message['role'].capitalize()}: {content}\n"
    return pairs


# parts and ids


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


def ids_of(encoder, text):
    """The ids of a text in which <|endoftext|> is the one token that it is."""
    first, *others = text.split(END)
    return [*encoder.encode(first), *(i for part in others for i in (encoder.encoder[END], *encoder.encode(part)))]


def text_ids(encoder, texts):
    """All ids of texts in one array; <|endoftext|> begins each, as it begins what is generated from nothing."""
    return np.array([i for text in texts for i in (encoder.encoder[END], *ids_of(encoder, text))])


def note_parts_of_characters(encoder, ids, advice):
    """Says so, with what to do, if the vocabulary has no tokens for the characters of a text, whose ids these are."""
    is_part = np.array([not is_text(encoder.decode_bytes([i])) for i in range(len(encoder.encoder))])
    share = is_part[ids].mean()
    if share > 0.2:
        note(f"{share:.0%} of the tokens are mere parts of characters, and little is learned from those: {advice}")


def is_text(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
