"""The page as one file, with a run in it: it opens from disk, asks nobody, and may be sent to a friend."""

import base64
import hashlib
import re
import zlib

import numpy as np

from explorer.server import PAGE
from explorer.session import as_json

MODULES = [  # each after those it imports
    *("app", "words", "api", "dom", "sampling", "heat", "source", "tokens"),
    *("block", "next", "why", "cache", "experiments", "lens", "walk", "main"),
]
N_BYTES = 8_800_000  # of the arrays in the file: what does not fit is left out, and the page says so
N_MADE = 60_000_000  # of the arrays to choose from: many are equal, and half of the precision takes half of the bytes


def page(session):
    """The HTML. Raises QuestionError."""
    script, style = joined(), (PAGE / "page.css").read_text("utf-8")
    inside = session.everything(N_MADE)
    arrays, packed = fitting(session, groups(inside["run"]), inside["run"]["logits"])
    data = as_json({**without(inside, arrays), "arrays": arrays, "packed": packed})
    data = data.replace("<", r"\u003c")  # no tag ends it early
    policy = f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; img-src data:"
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    tail = (
        f'<script type="application/json" id="inside">{data}</script>\n<script type="module">{script}</script>\n</body>'
    )
    text = (PAGE / "index.html").read_text("utf-8")
    text = text.replace('<script type="module" src="main.js"></script>\n', "")
    return text.replace('<link rel="stylesheet" href="page.css">', head).replace("</body>", tail)


def groups(run):
    """The keys of a run's arrays, those of most worth first, in lists that are of use as a whole."""
    blocks = [call for call in run["root"]["calls"] if call["function"] == "transformer_block"]
    rest = [call for call in run["root"]["calls"] if call not in blocks]
    first = [run["logits"], run["weights"][run["block"]], *run["weights"], *keys_in(blocks[run["block"]])]
    yield from ([key] for key in [*first, *keys_in({**run["root"], "calls": rest})])
    yield from ([*keys_in(block)] for block in blocks if any("key" in value for value in block["values"]))


def fitting(session, groups, logits):
    """({key: place}, what is there) of the arrays that N_BYTES has room for. Equal ones have the same place.

    logits: the key of those that become probabilities, which half precision would change by percents.
    """
    arrays, packed, places, room = {}, [], {}, N_BYTES
    for group in groups:
        new = {}  # {array, packed: its keys}
        for key in group:
            if key not in arrays:
                new.setdefault(pack(session.array(key), key != logits), []).append(key)
        size = sum(len(text) for text in new if text not in places)
        if size > room:
            continue
        room -= size
        for text, keys in new.items():
            if text not in places:
                places[text] = len(packed)
                packed.append(text)
            arrays |= dict.fromkeys(keys, places[text])
    return arrays, packed


def pack(array, may_be_half=True):
    """Numbers in half precision, some three digits, or in float32 where not, or too large for it; then zlib, base64.

    The first character is the number of bytes of one.
    """
    with np.errstate(over="ignore"):
        half = array.astype("<f2")
    array = half if may_be_half and np.array_equal(np.isfinite(half), np.isfinite(array)) else array
    return f"{array.itemsize}{base64.b64encode(zlib.compress(array.tobytes())).decode()}"


def without(node, arrays, under=None):
    """An answer, in which no array is named that is not among these."""
    if isinstance(node, dict):
        named = {name: child for name, child in node.items() if name != "key" or child in arrays}
        return {name: without(child, arrays, name) for name, child in named.items()}
    if isinstance(node, list):
        return [without(child, arrays, under) for child in node]
    return None if under == "weights" and node not in arrays else node


def joined():
    """All modules as one: their names differ, so that what one exports the next just uses."""
    texts = [(PAGE / f"{name}.js").read_text("utf-8") for name in MODULES]
    texts = [re.sub(r"^import .*\n", "", text, flags=re.MULTILINE) for text in texts]
    return re.sub(r"^export ", "", "\n".join(texts), flags=re.MULTILINE)


def digest(text):
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def keys_in(node, under=None):
    """Yields the keys of all arrays that an answer names."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from keys_in(child, name)
    elif isinstance(node, list):
        for child in node:
            yield from keys_in(child, under)
    elif under in ("key", "weights", "logits") and node is not None:
        yield node
