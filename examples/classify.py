"""Teaches a GPT-2 to tell classes of texts apart: a linear head on the hidden state of the last token.

    python examples/classify.py train data.jsonl --model_size 124M --name sections
    python examples/classify.py evaluate held_out.jsonl --name sections
    python examples/classify.py predict "some text" --name sections

Data are lines of {"text", "label"}. The last token is <|endoftext|>, which has seen the whole text and is the same for
all, as in the GPT paper (Improving Language Understanding by Generative Pre-Training, section 3.2).
"""

import functools
import importlib.util
import json
import os
import signal
import sys
import warnings

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: during the imports, too

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out
import lora
import training
from recipe import BASE_FLAGS, complete, with_flags
from saving import beside, is_left_half, read_arrays
from texts import END, ids_of, is_structured, note_parts_of_characters, read_documents, read_structured
from training import HEAD

from backends.arrays import is_jax, round_up
from cli import fail, line_text, mistakes, note, open_lines, run
from gpt2 import softmax, transformer_block
from utils import MODELS_DIR, ModelError, load_encoder_hparams_and_params

CONFUSION, MOST_NAMED = "confusion.png", 40  # classes
CHINESE = (  # fonts, of which one or the other comes with every system that shows Chinese
    "Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
)  # fmt: skip


def probabilities(params, head, rows, n_head):  # lists of ids -> [n_rows, n_classes]
    """On NumPy one by one; on JAX 32 at once, padded, of similar lengths, so that few shapes are compiled."""
    if not is_jax(params["wte"]):
        block = functools.partial(transformer_block, n_head=n_head)
        return np.array([softmax(training.class_logits(params, head, np.array(ids), -1, block)) for ids in rows])
    from on_jax import compiled_class_logits

    order, logits = sorted(range(len(rows)), key=lambda i: len(rows[i])), [None] * len(rows)
    for which in (order[i : i + 32] for i in range(0, len(rows), 32)):
        n_seq = round_up(len(rows[which[-1]]), len(params["wpe"]))
        batch = padded([rows[i] for i in which] + [[0]] * (32 - len(which)), n_seq)
        found = np.asarray(compiled_class_logits(n_head)(params, head, batch["ids"], batch["last"]))
        for i, row in zip(which, found, strict=False):
            logits[i] = row
    return softmax(np.array(logits))


def padded(rows, n_seq):  # lists of ids -> {"ids": [n_rows, n_seq], "last": [n_rows]}
    ids = np.zeros((len(rows), n_seq), int)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return {"ids": ids, "last": np.array([len(row) - 1 for row in rows])}


def encoded(encoder, texts, n_ctx):
    """Ids of texts and a last <|endoftext|>. Of a text that is longer than n_ctx, only the beginning: that is said."""
    rows = [ids_of(encoder, text) for text in texts]
    if n_cut := sum(len(row) >= n_ctx for row in rows):
        print(f"{n_cut} of {len(rows)} texts are longer than {n_ctx} tokens: their ends are left out", file=sys.stderr)
    return [[*row[: n_ctx - 1], encoder.encoder[END]] for row in rows]


def load(name, models_dir):
    """(encoder, hparams, params, head, labels) of a classifier. Ends with one line if it is none."""
    if not name:
        fail("--name is needed (see --help)")
    model_dir = os.path.join(models_dir, name)
    if is_left_half(model_dir):
        fail(
            f"the run of {model_dir} died while it saved a better classifier: end it with train and --resume, "
            f"or delete {beside(model_dir, 'new')} to use the one before"
        )
    path = os.path.join(model_dir, HEAD)
    with mistakes(ModelError):
        encoder, hparams, params = load_encoder_hparams_and_params(name, models_dir)
    with mistakes(ValueError, f"{name} is no classifier that train has made: {path}: "):
        saved = read_arrays(path)
        head, labels = {key: saved.get(key) for key in "wb"}, saved.get("labels", np.array(0))
        shapes = {"w": (hparams["n_embd"], labels.size), "b": (labels.size,)}
        if labels.ndim != 1 or labels.dtype.kind != "U" or any(np.shape(head[key]) != shapes[key] for key in "wb"):
            raise ValueError("it does not fit the model beside it")
        if any(head[key].dtype != np.float32 for key in "wb") or len({*labels.tolist()}) < labels.size:
            raise ValueError("it is damaged")
    return encoder, hparams, params, head, labels.tolist()


def check_labels(documents, labels):
    """Ends with one line for a document of another class."""
    known, more = {*labels}, f" and {len(labels) - 20} others" if labels[20:] else ""
    for document in documents:
        if document["label"] not in known:
            names = ", ".join(map(printable, labels[:20]))
            fail(f"{document['where']}: {document['label']!r} is none of the classes {names}{more}")


def printable(label):
    """A label without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in label)


class Labelled:
    """A task: to tell classes of texts apart. rows, held_out: lists of ids; classes: the number of each one's class."""

    unit, scale = "nats per text", 1.0

    def __init__(self, rows, classes, held_out, held_out_classes, n_head, batch_size):
        arrays = padded(rows, max(map(len, rows))) | {"label": np.array(classes)}
        self.data, self.n_head = training.Rows(arrays, batch_size), n_head
        self.held_out, self.right = held_out, np.array(held_out_classes)

    def evaluate(self, params, learned):
        """(nats per text held out, a line that says so)."""
        found = probabilities(params, learned["head"], self.held_out, self.n_head)
        nats = float(-np.log(np.maximum(found[np.arange(len(found)), self.right], 1e-30)).mean())
        return nats, f"held out {nats:.4f} nats per text, accuracy {np.mean(found.argmax(-1) == self.right):.3f}"


@with_flags(BASE_FLAGS, batch_size=16)
def train(*files: str, head_only: bool = False, **recipe):
    """Teaches a GPT-2 to tell classes of texts apart.

    Args:
        files: .jsonl, .json (an array) or .csv with {"text", "label"}; folders with all that is in them, or globs; a
            random tenth is held out
        head_only: learn the head alone, and leave all weights as they are
    """
    options = complete(train, recipe)
    lora_rank, seed = options["lora_rank"], options["seed"]
    if head_only and lora_rank:
        fail("--head_only and --lora_rank do not go together")
    options = lora.complete(options, is_part=bool(head_only or lora_rank))
    model_dir, settings = training.begin(options)

    documents, others, settings["data"] = training.read_data(files, options["held_out"], ("text", "label"))
    labels = sorted({document["label"] for document in documents})
    if len(labels) < 2:
        fail(f"there is one class only, {labels[0]!r}: there must be two or more")
    settings |= {"head_only": head_only, "labels": labels}
    check_labels(others, labels)
    if not others:
        order = np.random.default_rng(seed).permutation(len(documents))
        n = max(1, len(documents) // 10)
        documents, others = [documents[i] for i in order[n:]], [documents[i] for i in order[:n]]
    model_size, models_dir = options["model_size"], options["models_dir"]
    with mistakes(ModelError):
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    settings["base"] = training.base_of(os.path.join(models_dir, model_size))
    n_ctx, n_head = training.context(options["n_ctx"], hparams), hparams["n_head"]
    rows, held_out = (encoded(encoder, [document["text"] for document in part], n_ctx) for part in (documents, others))
    ids = [i for row in rows for i in row]
    note_parts_of_characters(encoder, ids, f"the tokenizer of {model_size} is not for them")
    numbers = {label: i for i, label in enumerate(labels)}
    classes, right = ([numbers[document["label"]] for document in part] for part in (documents, others))
    task = Labelled(rows, classes, held_out, right, n_head, options["batch_size"])

    rng, n_classes = np.random.default_rng(seed), len(labels)
    head = {"w": 0.02 * rng.standard_normal((hparams["n_embd"], n_classes), dtype=np.float32)}
    head |= {"b": np.zeros(n_classes, np.float32)}
    learned, frozen = ({}, {"params": params}) if head_only else lora.parts_of(params, options, seed)
    learned = learned | {"head": head}
    tokenizer_dir = os.path.join(models_dir, model_size)
    training.train(model_dir, tokenizer_dir, hparams, learned, frozen, task, settings, options["resume"])


def evaluate(*files: str, name: str = "", models_dir: str = MODELS_DIR):
    """Prints how many of the labels a classifier finds, and draws which it takes for which.

    Args:
        files: .jsonl, .json or .csv with {"text", "label"}; folders or globs of such files
        name: the classifier: a folder in models_dir that train has made
        models_dir: the folder that holds the models
    """
    encoder, hparams, params, head, labels = load(name, models_dir)
    documents = read_documents(files, ("text", "label"))
    check_labels(documents, labels)
    rows = encoded(encoder, [document["text"] for document in documents], hparams["n_ctx"])
    found = probabilities(params, head, rows, hparams["n_head"]).argmax(-1)
    confusion = np.zeros((len(labels), len(labels)), int)  # [the right class, the class found]
    numbers = {label: i for i, label in enumerate(labels)}
    np.add.at(confusion, ([numbers[document["label"]] for document in documents], found), 1)

    print(f"accuracy {np.trace(confusion) / len(rows):.3f}")
    names = [*map(printable, labels)]
    width = max(5, *map(len, names))
    print(f"{'class':{width}}  precision  recall     f1  texts")
    for label, row, column, hits in zip(names, confusion, confusion.T, np.diag(confusion), strict=True):
        precision, recall = hits / max(1, column.sum()), hits / max(1, row.sum())
        f1 = 2 * hits / max(1, row.sum() + column.sum())
        print(f"{label:{width}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {row.sum():5}")
    path = os.path.join(models_dir, name, CONFUSION)
    if not importlib.util.find_spec("matplotlib"):
        return note("matplotlib is not installed: which class is taken for which is not drawn")
    draw_confusion(path, confusion, labels)
    print(f"which class is taken for which is drawn in {path}", file=sys.stderr)


def draw_confusion(path, confusion, labels):
    """Draws how many texts of each class are taken for which; of many a pixel each, for names would not fit."""
    shares, n = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True)), len(labels)
    if n > MOST_NAMED:
        from PIL import Image  # which comes with Matplotlib, and reads no fonts

        return Image.fromarray((255 * (1 - shares)).astype(np.uint8)).save(path, "PNG")  # the darker, the more
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.7 * n, 1 + 0.7 * n))
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(confusion):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, count, ha="center", va="center", color=color)
    axes.set(xlabel="found", ylabel="right")
    installed = {font.name for font in font_manager.fontManager.ttflist}
    text = {"parse_math": False, "fontfamily": ["DejaVu Sans", *(name for name in CHINESE if name in installed)]}
    names = [f"{printable(label):.40}" for label in labels]
    axes.set_yticks(range(n), names, **text)
    axes.set_xticks(range(n), names, **text, rotation=45, ha="right")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that no font has: they become boxes
        figure.savefig(path, dpi=100, bbox_inches="tight")


def predict(*texts: str, name: str = "", texts_file: str = "", models_dir: str = MODELS_DIR):
    """Prints for every text a JSON object with its label and the probability of each.

    Args:
        texts: the texts, each in quotes; - reads standard input, a text a line
        name: the classifier: a folder in models_dir that train has made
        texts_file: a file of more texts, one a line, or .jsonl, .json or .csv with {"text"}; - reads standard input
        models_dir: the folder that holds the models
    """
    if "-" in texts:
        if texts_file or len(texts) > 1:
            fail("- stands for standard input: give it alone")
        texts, texts_file = (), "-"
    texts = [*texts]
    if is_structured(texts_file):
        texts += [document["text"] for document in read_structured(texts_file, [("text",)])]
    elif texts_file:
        with mistakes(UnicodeDecodeError, f"{texts_file} is "):
            texts += map(line_text, open_lines(texts_file))
    if not texts:
        fail("no texts: give some, each in quotes, or a --texts_file")
    encoder, hparams, params, head, labels = load(name, models_dir)
    with mistakes(UnicodeEncodeError):
        rows = encoded(encoder, texts, hparams["n_ctx"])
    for text, row in zip(texts, rows, strict=True):
        (found,) = probabilities(params, head, [row], hparams["n_head"])
        shares = {label: round(float(p), 6) for label, p in zip(labels, found, strict=True)}
        answer = {"text": text, "label": labels[found.argmax()], "probabilities": shares}
        print(json.dumps(answer, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    commands = {"train": train, "evaluate": evaluate, "predict": predict}
    which = sys.argv.pop(1) if sys.argv[1:] else "nothing"
    if which in ("-h", "--help"):
        print(__doc__)
    elif which not in commands:
        fail(f"{which} is none of {', '.join(commands)} (see --help)")
    else:
        run(
            commands[which],
            "classify.py: stopped before the first step: nothing was written" if which == "train" else "",
        )
