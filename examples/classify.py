"""Teaches a GPT-2 to tell classes of texts apart: a linear head on the hidden state of the last token.

    python examples/classify.py train data.jsonl --model_size 124M --name sections
    python examples/classify.py evaluate held_out.jsonl --name sections
    python examples/classify.py predict "some text" --name sections

Data are lines of {"text", "label"}. The last token is <|endoftext|>, which has seen the whole text and is the same for
all, as in the GPT paper (Improving Language Understanding by Generative Pre-Training, section 3.2).
"""

import functools
import json
import os
import signal
import sys
import warnings
import zipfile

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: during the imports, too

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import finetune
import training

from backends.arrays import is_jax, round_up
from cli import fail, line_text, mistakes, open_lines, run
from files.checkpoint import save_checkpoint
from gpt2 import linear, softmax
from utils import MODELS_DIR, ModelError, load_encoder_hparams_and_params

HEAD, CONFUSION = "classes.npz", "confusion.png"
CHINESE = (  # fonts, of which one or the other comes with every system that shows Chinese
    "Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
)  # fmt: skip


def class_logits(params, head, ids, last, n_head, recompute=False):  # [n_seq], [] -> [n_classes]
    """What the head makes of the hidden state of the token at last; behind it is padding. Rows need JAX's vmap."""
    return linear(training.hidden_states(ids, **params, n_head=n_head, recompute=recompute)[last], **head)


@functools.cache
def compiled_logits():
    import jax

    rows = jax.vmap(class_logits, in_axes=(None, None, 0, 0, None))
    return jax.jit(rows, static_argnums=4)


def probabilities(params, head, rows, n_head):  # lists of ids -> [n_rows, n_classes]
    """On NumPy one by one; on JAX 32 at once, padded, of similar lengths, so that few shapes are compiled."""
    if not is_jax(params["wte"]):
        return np.array([softmax(class_logits(params, head, np.array(ids), -1, n_head)) for ids in rows])
    order, logits = sorted(range(len(rows)), key=lambda i: len(rows[i])), [None] * len(rows)
    for which in (order[i : i + 32] for i in range(0, len(rows), 32)):
        n_seq = round_up(len(rows[which[-1]]), len(params["wpe"]))
        batch = padded([rows[i] for i in which] + [[0]] * (32 - len(which)), n_seq)
        found = np.asarray(compiled_logits()(params, head, batch["ids"], batch["last"], n_head))
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
    rows = [encoder.encode(text) for text in texts]
    if n_cut := sum(len(row) >= n_ctx for row in rows):
        print(f"{n_cut} of {len(rows)} texts are longer than {n_ctx} tokens: their ends are left out", file=sys.stderr)
    return [[*row[: n_ctx - 1], encoder.encoder[training.END]] for row in rows]


def load(name, models_dir):
    """(encoder, hparams, params, head, labels) of a classifier. Ends with one line if it is none."""
    if not name:
        fail("--name is needed (see --help)")
    path = os.path.join(models_dir, name, HEAD)
    with mistakes(ModelError):
        encoder, hparams, params = load_encoder_hparams_and_params(name, models_dir)
    try:
        with np.load(path, allow_pickle=False) as saved:
            head, labels = {"w": saved["w"], "b": saved["b"]}, saved["labels"].tolist()
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        fail(f"{name} is no classifier that train has made: {path}: {error}")
    if head["w"].shape != (hparams["n_embd"], len(labels)) or head["b"].shape != (len(labels),):
        fail(f"{path} does not fit the model beside it")
    return encoder, hparams, params, head, labels


def read_labelled(patterns, labels=None):
    """(texts, labels) of files. labels: those that are known; ends with one line for a file with others."""
    documents = training.read_documents(patterns, ("text", "label"))
    for document in documents:
        if labels is not None and document["label"] not in labels:
            fail(f"{document['where']}: {document['label']!r} is none of the classes {', '.join(labels)}")
    return [document["text"] for document in documents], [document["label"] for document in documents]


def train(
    *files: str,
    model_size: str = "124M",
    name: str = "",
    models_dir: str = MODELS_DIR,
    held_out: str = "",
    head_only: bool = False,
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    lora_on: str = "c_attn",
    n_ctx: int | None = None,
    n_steps: int = 500,
    batch_size: int = 16,
    accumulate: int = 1,
    learning_rate: float | None = None,
    weight_decay: float = 0.01,
    dropout: float = 0.0,
    dtype: str = "float32",
    recompute: bool = False,
    evaluate_every: int | None = None,
    seed: int = 0,
    distributed: bool = False,
    resume: bool = False,
):
    """Teaches a GPT-2 to tell classes of texts apart.

    Args:
        files: JSONL with {"text", "label"}; folders with all that is in them, or globs
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        name: the result is saved in the folder of this name in models_dir
        models_dir: the folder that holds the models
        held_out: a file, folder or glob to evaluate on, instead of a random tenth of files
        head_only: learn the head alone, and leave all weights as they are
        lora_rank: learn adapters of this rank instead of all weights (0), and the head
        lora_alpha: adapters are scaled by lora_alpha / lora_rank (by default, 2)
        lora_on: which matrices get an adapter: c_attn, c_proj, c_fc, or several with commas between
        n_ctx: tokens that are read of a text (by default 256, or what the model sees at once, if that is less)
        n_steps: updates of the weights
        batch_size: texts that an update learns from
        accumulate: parts of a batch that are computed one after another: less memory, the same result
        learning_rate: the highest; it rises to that over the first 2 % of the steps and falls to 0 along a cosine (by
            default 1e-4, and 1e-3 for adapters or the head alone)
        weight_decay: AdamW's, of all matrices
        dropout: the part of the features behind each layer norm that training silences
        dtype: float32, or bfloat16 to compute in; the weights stay float32
        recompute: keep fewer activations, and compute them again: less memory, a third more time
        evaluate_every: steps from one evaluation to the next (by default there are 16 at most, and one before the first
            step); each saves the run, and the model if it is the best yet
        seed: of the head, of the adapters, of what is held out and of the order of the texts
        distributed: be one of several processes that each take some rows of a batch (see README.md)
        resume: go on with a run with the same arguments; more n_steps lengthen it
    """
    import jax

    names = finetune.lora_layers(lora_rank, lora_alpha, lora_on)
    if head_only and lora_rank:
        fail("--head_only and --lora_rank do not go together")
    settings = {"lora_rank": lora_rank, "lora_alpha": 2 * lora_rank if lora_alpha is None else lora_alpha}
    settings |= {"n_steps": n_steps, "batch_size": batch_size, "accumulate": accumulate, "n_ctx": n_ctx}
    usual = 1e-3 if lora_rank or head_only else 1e-4
    settings |= {"learning_rate": usual if learning_rate is None else learning_rate, "weight_decay": weight_decay}
    settings |= {"dropout": dropout, "dtype": dtype, "recompute": recompute, "evaluate_every": evaluate_every}
    model_dir, settings = training.begin(name, models_dir, resume, distributed, settings | {"seed": seed})
    settings |= {"model_size": model_size, "lora_on": names, "head_only": head_only}

    texts, classes = read_labelled(files)
    labels = sorted({*classes})
    if len(labels) < 2:
        fail(f"there is one class only, {labels[0]!r}: there must be two or more")
    settings |= {"data": training.checksums(files, held_out)}
    if held_out:
        others, other_classes = read_labelled([held_out], labels)
    else:
        order = np.random.default_rng(seed).permutation(len(texts))
        n = max(1, len(texts) // 10)
        others, other_classes = ([column[i] for i in order[:n]] for column in (texts, classes))
        texts, classes = ([column[i] for i in order[n:]] for column in (texts, classes))
    with mistakes(ModelError):
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    n_ctx, n_head = training.context(n_ctx, hparams), hparams["n_head"]
    rows, others = (encoded(encoder, part, n_ctx) for part in (texts, others))
    right = np.array([labels.index(label) for label in other_classes])
    arrays = padded(rows, max(map(len, rows))) | {"label": np.array([labels.index(label) for label in classes])}

    rng, n_classes = np.random.default_rng(seed), len(labels)
    head = {"w": 0.02 * rng.standard_normal((hparams["n_embd"], n_classes), dtype=np.float32)}
    learned, frozen = {"head": {**head, "b": np.zeros(n_classes, np.float32)}}, params
    if lora_rank:
        learned["adapters"] = finetune.new_adapters(params, lora_rank, names, seed)
    elif not head_only:
        learned["params"], frozen = params, {}

    def model(learned, frozen):
        if lora_rank:
            return finetune.with_adapters(frozen, learned["adapters"], settings["lora_alpha"] / lora_rank)
        return learned.get("params", frozen)

    def loss(learned, frozen, rows, keys):
        params, head = jax.tree.map(lambda x: x.astype(dtype), (model(learned, frozen), learned["head"]))

        def row_loss(ids, last, label, key):
            dropped = training.with_dropout(params, dropout, key)
            logits = class_logits(dropped, head, ids, last, n_head, recompute)
            return -jax.nn.log_softmax(logits.astype("float32"))[label]

        losses = jax.vmap(row_loss)(rows["ids"], rows["last"], rows["label"], keys)
        return losses.sum(), float(len(losses))

    def evaluate(learned, frozen):
        found = probabilities(model(learned, frozen), learned["head"], others, n_head)
        nats = float(-np.log(np.maximum(found[np.arange(len(right)), right], 1e-30)).mean())
        return nats, f"held out {nats:.4f} nats per text, accuracy {np.mean(found.argmax(-1) == right):.3f}"

    def save(learned, frozen):
        save_checkpoint(model_dir, hparams, model(learned, frozen))
        np.savez(os.path.join(model_dir, HEAD), labels=np.array(labels), **learned["head"])

    training.train(
        model_dir,
        os.path.join(models_dir, model_size),
        learned=learned,
        frozen=frozen,
        loss=loss,
        data=training.shuffled(arrays, batch_size),
        evaluate=evaluate,
        save=save,
        settings=settings | {"labels": labels},
        resume=resume,
        unit="nats per text",
    )


def evaluate(*files: str, name: str = "", models_dir: str = MODELS_DIR):
    """Prints how many of the labels a classifier finds, and draws which it takes for which.

    Args:
        files: JSONL with {"text", "label"}; folders or globs of such files
        name: the classifier: a folder in models_dir that train has made
        models_dir: the folder that holds the models
    """
    encoder, hparams, params, head, labels = load(name, models_dir)
    texts, classes = read_labelled(files, labels)
    found = probabilities(params, head, encoded(encoder, texts, hparams["n_ctx"]), hparams["n_head"]).argmax(-1)
    confusion = np.zeros((len(labels), len(labels)), int)  # [the right class, the class found]
    np.add.at(confusion, ([labels.index(label) for label in classes], found), 1)

    print(f"accuracy {np.trace(confusion) / len(texts):.3f}")
    width = max(5, *map(len, labels))
    print(f"{'class':{width}}  precision  recall     f1  texts")
    for label, row, column, hits in zip(labels, confusion, confusion.T, np.diag(confusion), strict=True):
        precision, recall = hits / max(1, column.sum()), hits / max(1, row.sum())
        f1 = 2 * hits / max(1, row.sum() + column.sum())
        print(f"{label:{width}}  {precision:9.3f}  {recall:6.3f}  {f1:5.3f}  {row.sum():5}")
    path = os.path.join(models_dir, name, CONFUSION)
    draw_confusion(path, confusion, labels)
    print(f"which class is taken for which is drawn in {path}", file=sys.stderr)


def draw_confusion(path, confusion, labels):
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.7 * len(labels), 1 + 0.7 * len(labels)))
    axes = figure.subplots()
    shares = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), n in np.ndenumerate(confusion):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, n, ha="center", va="center", color=color)
    axes.set(xlabel="found", ylabel="right")
    installed = {font.name for font in font_manager.fontManager.ttflist}
    text = {"parse_math": False, "fontfamily": ["DejaVu Sans", *(name for name in CHINESE if name in installed)]}
    axes.set_yticks(range(len(labels)), labels, **text)
    axes.set_xticks(range(len(labels)), labels, **text, rotation=45, ha="right")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that no font has: they become boxes
        figure.savefig(path, dpi=100, bbox_inches="tight")


def predict(*texts: str, name: str = "", texts_file: str = "", models_dir: str = MODELS_DIR):
    """Prints for every text a JSON object with its label and the probability of each.

    Args:
        texts: the texts, each in quotes; - reads standard input, a text a line
        name: the classifier: a folder in models_dir that train has made
        texts_file: a file of more texts, one a line, or JSONL with {"text"}; - reads standard input
        models_dir: the folder that holds the models
    """
    if "-" in texts:
        if texts_file or len(texts) > 1:
            fail("- stands for standard input: give it alone")
        texts, texts_file = (), "-"
    texts = [*texts]
    if texts_file.lower().endswith(".jsonl"):
        texts += [document["text"] for document in training.read_documents([texts_file], ("text",))]
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
