"""Teaches a GPT-2 to tell classes of texts apart: a linear head on the hidden state of the last token.

    python examples/classify.py train data.jsonl --model_size 124M --name sections
    python examples/classify.py evaluate held_out.jsonl --name sections
    python examples/classify.py predict "some text" --name sections

Data are lines of {"text", "label"}. The last token is <|endoftext|>, which has seen the whole text and is the same for
all, as in the GPT paper (Improving Language Understanding by Generative Pre-Training, section 3.2). Labels that are
lists say that a text may have several, or none: each class then has a sigmoid, in the place of a softmax over all.
"""

import functools
import importlib.util
import json
import os
import sys
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

if __name__ == "__main__":
    from cli import start

    start("numpy", "regex", "tqdm")

import lora
import numpy as np
import training
from recipe import BASE_FLAGS, complete, with_flags
from saving import beside, is_left_half, read_arrays
from texts import END, ids_of, is_structured, note_parts_of_characters, read_documents, read_structured
from training import HEAD, sigmoid

from backends.arrays import is_jax, round_up
from backends.threads import blas_threads, thread_counts
from cli import check_writable, fail, line_text, lines_of, mistakes, note, printable, run
from gpt2 import softmax, transformer_block
from languages import translated, translated_lines
from utils import MODELS_DIR, ModelError, load_encoder_hparams_and_params

ACTIVATIONS = {"softmax": softmax, "sigmoid": sigmoid}  # of a head: for one label a text, and for several
CONFUSION, MOST_NAMED = "confusion.png", 40  # classes
CHINESE = (  # fonts, of which one or the other comes with every system that shows Chinese
    "Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
)  # fmt: skip


def probabilities(params, head, rows, n_head, activation="softmax"):  # lists of ids -> [n_rows, n_classes]
    """On NumPy one by one; on JAX 32 at once, padded, of similar lengths, so that few shapes are compiled."""
    if not is_jax(params["wte"]):
        block = functools.partial(transformer_block, n_head=n_head)
        with blas_threads(thread_counts(params)[0]):
            logits = [training.class_logits(params, head, np.array(ids), -1, block) for ids in rows]
        return ACTIVATIONS[activation](np.array(logits, np.float64))
    from on_jax import compiled_class_logits

    order, logits = sorted(range(len(rows)), key=lambda i: len(rows[i])), [None] * len(rows)
    for which in (order[i : i + 32] for i in range(0, len(rows), 32)):
        n_seq = round_up(len(rows[which[-1]]), len(params["wpe"]))
        batch = padded([rows[i] for i in which] + [[0]] * (32 - len(which)), n_seq)
        found = np.asarray(compiled_class_logits(n_head)(params, head, batch["ids"], batch["last"]))
        for i, row in zip(which, found, strict=False):
            logits[i] = row
    return ACTIVATIONS[activation](np.array(logits, np.float64))


def padded(rows, n_seq):  # lists of ids -> {"ids": [n_rows, n_seq], "last": [n_rows]}
    ids = np.zeros((len(rows), n_seq), int)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return {"ids": ids, "last": np.array([len(row) - 1 for row in rows])}


def encoded(encoder, texts, n_ctx):
    """Ids of texts and a last <|endoftext|>. Of a text that is longer than n_ctx, only the beginning: that is said."""
    rows = [ids_of(encoder, text) for text in texts]
    if n_cut := sum(len(row) >= n_ctx for row in rows):
        said = f"{n_cut} of {len(rows)} texts are longer than {n_ctx} tokens: their ends are left out"
        print(translated(said), file=sys.stderr)
    return [[*row[: n_ctx - 1], encoder.encoder[END]] for row in rows]


def load(name, models_dir):
    """(encoder, hparams, params, head, labels, activation) of a classifier. Ends with one line if it is none."""
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
        activation = str(saved.get("activation", "softmax"))  # heads of before have none
        is_odd = activation not in ACTIVATIONS or len({*labels.tolist()}) < labels.size
        if is_odd or any(head[key].dtype != np.float32 for key in "wb"):
            raise ValueError("it is damaged")
    return encoder, hparams, params, head, labels.tolist(), activation


def check_labels(documents, labels):
    """Ends with one line for a document of another class."""
    known, more = {*labels}, f" and {len(labels) - 20} others" if labels[20:] else ""
    for document in documents:
        for label in labels_of(document):
            if label not in known:
                names = ", ".join(map(printable, labels[:20]))
                fail(f"{document['where']}: {label!r} is none of the classes {names}{more}")


def labels_of(document):
    """All labels of a text, of which there may be one or several."""
    return document["label"] if isinstance(document["label"], list) else [document["label"]]


def targets(documents, labels):
    """The number of each text's class, [n_rows]; of several a text, whether it has each, [n_rows, n_classes]."""
    numbers = {label: i for i, label in enumerate(labels)}
    if not isinstance(documents[0]["label"], list):
        return np.array([numbers[document["label"]] for document in documents])
    right = np.zeros((len(documents), len(labels)), np.float32)
    for row, document in zip(right, documents, strict=True):
        row[[numbers[label] for label in document["label"]]] = 1
    return right


def figures_of_several(found, right):  # 2 of [n_rows, n_classes]: probabilities, and 0 or 1
    """(mean binary cross-entropy, micro F1, exact matches: the part of texts that get their labels and no others)."""
    nats = -np.log(np.maximum(np.where(right, found, 1 - found), 1e-30)).mean()
    chosen = found > 0.5
    f1 = 2 * (chosen * right).sum() / max(1, chosen.sum() + right.sum())
    return float(nats), f1, (chosen == right).all(axis=-1).mean()


class Labelled:
    """A task: to tell classes of texts apart. rows, held_out: lists of ids; classes: see targets."""

    scale = 1.0

    def __init__(self, rows, classes, held_out, held_out_classes, n_head, batch_size):
        arrays = padded(rows, max(map(len, rows))) | {"label": classes}
        self.data, self.n_head = training.Rows(arrays, batch_size), n_head
        self.held_out, self.right = held_out, held_out_classes
        self.activation, self.unit = (
            ("softmax", "nats per text") if classes.ndim == 1 else ("sigmoid", "nats per label")
        )

    def evaluate(self, params, learned):
        """(nats per text held out, or per label that it may have; a line that says so)."""
        found = probabilities(params, learned["head"], self.held_out, self.n_head, self.activation)
        if self.activation == "sigmoid":
            nats, f1, exact = figures_of_several(found, self.right)
            return nats, f"held out {nats:.4f} nats per label, micro F1 {f1:.3f}, exact matches {exact:.3f}"
        nats = float(-np.log(np.maximum(found[np.arange(len(found)), self.right], 1e-30)).mean())
        return nats, f"held out {nats:.4f} nats per text, accuracy {np.mean(found.argmax(-1) == self.right):.3f}"


@with_flags(BASE_FLAGS, batch_size=16)
def train(*files: str, head_only: bool = False, **recipe):
    """Teaches a GPT-2 to tell classes of texts apart.

    Args:
        files: .jsonl, .json (an array) or .csv with {"text", "label"}; folders with all that is in them, or globs; a
            random tenth is held out; for several labels a text, label is a list (in .csv, | parts them)
        head_only: learn the head alone, and leave all weights as they are
    """
    options = complete(train, recipe)
    lora_rank, seed = options["lora_rank"], options["seed"]
    if head_only and lora_rank:
        fail("--head_only and --lora_rank do not go together")
    options = lora.complete(options, is_part=bool(head_only or lora_rank))
    model_dir, settings = training.begin(options)

    documents, others, settings["data"] = training.read_data(files, options["held_out"], ("text", "label"))
    labels = sorted({label for document in documents for label in labels_of(document)})
    if not labels:
        fail("no text has a label: there must be some")
    if len(labels) < 2 and not isinstance(documents[0]["label"], list):
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
    classes, right = (targets(part, labels) for part in (documents, others))
    task = Labelled(rows, classes, held_out, right, n_head, options["batch_size"])

    rng, n_classes = np.random.default_rng(seed), len(labels)
    head = {"w": 0.02 * rng.standard_normal((hparams["n_embd"], n_classes), dtype=np.float32)}
    head |= {"b": np.zeros(n_classes, np.float32)}
    learned, frozen = ({}, {"params": params}) if head_only else lora.parts_of(params, options, seed)
    learned = learned | {"head": head}
    tokenizer_dir = os.path.join(models_dir, model_size)
    training.train(model_dir, tokenizer_dir, hparams, learned, frozen, task, settings, options["resume"])


def evaluate(*files: str, name: str = "", models_dir: str = MODELS_DIR):
    """Prints how many of the labels a classifier finds, and draws which it takes for which, if a text has one.

    Args:
        files: .jsonl, .json or .csv with {"text", "label"}, as train takes them; folders or globs of such files
        name: the classifier: a folder in models_dir that train has made
        models_dir: the folder that holds the models
    """
    encoder, hparams, params, head, labels, activation = load(name, models_dir)
    path = os.path.join(models_dir, name, CONFUSION)
    if activation == "softmax" and importlib.util.find_spec("matplotlib"):
        check_writable(path)
    documents = read_documents(files, ("text", "label"))
    if isinstance(documents[0]["label"], list) != (activation == "sigmoid"):
        has, learned = ("one label", "lists") if activation == "sigmoid" else ("a list of labels", "one label a text")
        fail(f"{documents[0]['where']} has {has}, and {name} has learned from {learned}")
    check_labels(documents, labels)
    rows = encoded(encoder, [document["text"] for document in documents], hparams["n_ctx"])
    right = targets(documents, labels)
    found = probabilities(params, head, rows, hparams["n_head"], activation)
    if activation == "sigmoid":
        nats, f1, exact = figures_of_several(found, right)
        print(f"micro F1 {f1:.3f}\nexact matches {exact:.3f}\nnats per label {nats:.4f}")
        chosen = found > 0.5
        return print_classes(labels, right.sum(axis=0), chosen.sum(axis=0), (chosen * right).sum(axis=0))
    confusion = np.zeros((len(labels), len(labels)), int)  # [the right class, the class found]
    np.add.at(confusion, (right, found.argmax(-1)), 1)

    print(f"accuracy {np.trace(confusion) / len(rows):.3f}")
    print_classes(labels, confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion))
    if not importlib.util.find_spec("matplotlib"):
        return note("matplotlib is not installed: which class is taken for which is not drawn")
    draw_confusion(path, confusion, labels)
    note(f"which class is taken for which is drawn in {path}")


def print_classes(labels, n_right, n_found, n_hits):  # 4 of [n_classes]
    """Prints a line for every class: how many texts have it, how many were said to, and for how many that was right."""
    names = [*map(printable, labels)]
    width = max(5, *map(len, names))
    print(f"{'class':{width}}  precision  recall     f1  texts")
    for label, right, found, hits in zip(names, n_right, n_found, n_hits, strict=True):
        precision, recall, f1 = hits / max(1, found), hits / max(1, right), 2 * hits / max(1, right + found)
        print(f"{label:{width}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {right:5.0f}")


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

    Where a text may have several, "label" is a list of those whose probability is above 0.5.

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
        with mistakes(UnicodeDecodeError, f"{texts_file} is "), lines_of(texts_file) as lines:
            texts += map(line_text, lines)
    if not texts:
        fail("no texts: give some, each in quotes, or a --texts_file")
    encoder, hparams, params, head, labels, activation = load(name, models_dir)
    with mistakes(UnicodeEncodeError):
        rows = encoded(encoder, texts, hparams["n_ctx"])
    for text, row in zip(texts, rows, strict=True):
        (found,) = probabilities(params, head, [row], hparams["n_head"], activation)
        shares = {label: round(float(p), 6) for label, p in zip(labels, found, strict=True)}
        several = [label for label, p in zip(labels, found, strict=True) if p > 0.5]
        label = several if activation == "sigmoid" else labels[found.argmax()]
        answer = {"text": text, "label": label, "probabilities": shares}
        print(json.dumps(answer, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    commands = {"train": train, "evaluate": evaluate, "predict": predict}
    if not sys.argv[1:]:
        fail(f"say what to do: {', '.join(commands)} (see --help)")
    which = sys.argv.pop(1)
    if which in ("-h", "--help"):
        print(translated_lines(__doc__, sys.stdout))
    elif which not in commands:
        fail(f"{which} is none of {', '.join(commands)} (see --help)")
    else:
        run(
            commands[which],
            "classify.py: stopped before the first step: nothing was written" if which == "train" else "",
        )
