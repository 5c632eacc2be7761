"""The page as one file, with a run in it: it opens from disk, asks nobody, and may be sent to a friend."""

import base64
import hashlib
import re

from explorer.server import PAGE
from explorer.session import as_json

MODULES = [  # each after those it imports
    *("app", "words", "api", "dom", "sampling", "heat", "source", "tokens"),
    *("block", "next", "cache", "experiments", "lens", "walk", "main"),
]
N_BYTES = 24_000_000  # of numbers: the values of as many blocks as fit


def page(session):
    """The HTML. Raises QuestionError."""
    script, style = joined(), (PAGE / "page.css").read_text("utf-8")
    arrays, inside = {}, session.everything(N_BYTES)
    for key in keys_in(inside):
        arrays[key] = base64.b64encode(session.array(key).tobytes()).decode()
    data = as_json({**inside, "arrays": arrays}).replace("<", r"\u003c")  # no tag ends it early
    policy = f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; img-src data:"
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    tail = (
        f'<script type="application/json" id="inside">{data}</script>\n<script type="module">{script}</script>\n</body>'
    )
    text = (PAGE / "index.html").read_text("utf-8")
    text = text.replace('<script type="module" src="main.js"></script>\n', "")
    return text.replace('<link rel="stylesheet" href="page.css">', head).replace("</body>", tail)


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
