"""How well a model predicts: figures that can be held against published ones.

    python examples/evaluate.py text.txt --model_size 124M
    python examples/evaluate.py lambada_test.jsonl --task lambada --model_size 124M

Everything rests on one number: -log of the probability that the model gives a token, in nats, summed over tokens.
"""

import functools
import html
import inspect
import itertools
import json
import math
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

if __name__ == "__main__":
    from cli import start

    start("numpy", "regex", "tqdm")

from texts import END, ids_of, read_documents, read_text

import cli
from backends import devices
from backends.arrays import is_jax, is_numpy, namespace, round_up
from backends.threads import each, n_available
from files.bar import Bar
from gpt2 import MODELS_DIR, gpt2
from languages import translated

# the model's part


def losses(params, windows, n_head, n_last=None):  # [..., n_seq+1] -> 2 of [..., n_last]
    """Of each of the last n_last tokens of windows (None: of all but the first), given those before: the cross-entropy
    in nats, -log of the probability that the model gives it; and whether the model finds it the likeliest.

    windows: ids, an array of the same library as the weights. Works under JAX's jit, grad and vmap.
    """
    logits = gpt2(windows[..., :-1], **params, n_head=n_head, n_last=n_last)  # [..., n_last, n_vocab]
    xp, ids = namespace(logits), windows[..., windows.shape[-1] - logits.shape[-2] :, None]  # [..., n_last, 1]
    logits = xp.astype(logits, xp.float32, copy=False)  # half precision would do for products, but not for sums
    logits -= xp.max(logits, axis=-1, keepdims=True)
    likeliest = xp.argmax(logits, axis=-1)  # [..., n_last]
    right = xp.take_along_axis(logits, ids, axis=-1)[..., 0]  # [..., n_last]
    return xp.log(xp.sum(xp.exp(logits), axis=-1)) - right, likeliest == ids[..., 0]


@functools.cache
def compiled_losses():
    import jax

    return jax.jit(losses, static_argnames=("n_head", "n_last"))


def scores(params, rows, n_head, n_threads=1):
    """Yields for each of rows, (ids, n_scored): the losses of its last n_scored ids, float64, and which are likeliest.

    Rows that follow one another are a batch, padded at their ends to the longest: they should be of similar lengths.
    n_threads: how many batches NumPy works on at a time, each with its share of the cores: one batch on all of them
    would leave all but one idle between its matrix products. Other libraries' arrays take one batch after another.
    """
    scorer = Scorer(params, n_head)
    work = batches(rows, scorer.n_seq, scorer.n_tokens)
    if n_threads > 1 and is_numpy(params["wte"]):
        parts = each(scorer.scores, [*work], n_threads, n_blas=max(1, n_available() // n_threads))
    else:
        parts = map(scorer.scores, work)
    yield from itertools.chain.from_iterable(parts)


class Scorer:
    """The losses of batches of rows, (ids, n_scored), in shapes that suit the library that params are of.

    JAX compiles every shape anew, so these are few; NumPy gains nothing from more than 1,024 tokens at once.
    """

    def __init__(self, params, n_head):
        self.params, self.n_head, self.n_ctx = params, n_head, len(params["wpe"])
        self.use_jax, self.n_rows_before = is_jax(params["wte"]), {}  # {n_seq: the most rows so far}
        self.n_tokens = 8192 if self.use_jax else 1024

    def round_to_few(self, n, most):
        return round_up(n, most) if self.use_jax else min(n, most)

    def n_seq(self, row):
        ids, _ = row
        return self.round_to_few(len(ids) - 1, self.n_ctx)

    def scores(self, batch):
        """[(the losses of a row's last n_scored ids, which of these are likeliest), ...]"""
        import numpy as np

        n_rows, n_seq = len(batch), max(map(self.n_seq, batch))
        if self.use_jax:
            n_rows = max(self.n_rows_before.get(n_seq, 0), 1 << (n_rows - 1).bit_length())
            self.n_rows_before[n_seq] = n_rows
        n_last = self.round_to_few(n_seq - min(len(ids) - 1 - n_scored for ids, n_scored in batch), n_seq)
        windows = np.zeros((n_rows, n_seq + 1), np.int32)  # what pads a row is behind all that is scored
        for window, (ids, _) in zip(windows, batch, strict=False):
            window[: len(ids)] = ids
        windows = devices.spread(namespace(self.params["wte"]).asarray(windows), self.params)
        run = compiled_losses() if self.use_jax else losses
        nats, likeliest = (x.tolist() for x in run(self.params, windows, self.n_head, n_last))
        stops = [len(ids) - 1 - (n_seq - n_last) for ids, _ in batch]
        parts = [slice(stop - n_scored, stop) for stop, (_, n_scored) in zip(stops, batch, strict=True)]
        return [(np.array(nats[row][part]), np.array(likeliest[row][part])) for row, part in enumerate(parts)]


def batches(rows, length, n_tokens):
    """Yields lists of rows that follow one another, of n_tokens at most when padded to the longest, or of one row."""
    batch, longest = [], 0
    for row in rows:
        longest = max(longest, length(row))
        if batch and (len(batch) + 1) * longest > n_tokens:
            yield batch
            batch, longest = [], length(row)
        batch.append(row)
    if batch:
        yield batch


def text_nats(params, ids, n_ctx, n_head, stride=0, n_threads=1):
    """Yields the cross-entropy in nats of all ids but the first, in their order: arrays of float64, one a window.

    A window of n_ctx tokens begins every stride, n_ctx/2 unless told otherwise, and scores only what the one before did
    not reach: behind the first window, every token is predicted from n_ctx - stride others or more.
    """
    rows = windows_of(ids, n_ctx, stride or max(1, n_ctx // 2))
    return (nats for nats, _ in scores(params, rows, n_head, n_threads))


def windows_of(ids, n_ctx, stride):
    """Yields (window of ids, how many of its last ids to score)."""
    n_scored = 0
    for start in range(0, max(1, len(ids) - 1 - (n_ctx - stride)), stride):
        window = ids[start : start + n_ctx + 1]
        yield window, start + len(window) - 1 - n_scored
        n_scored = start + len(window) - 1


# the tasks' part: each turns an object of a file into an example, (context, endings, which of them is right)


def lambada(text, **_):
    """The last word of a text (https://arxiv.org/abs/1606.06031).

    As in lm-evaluation-harness's lambada_openai, that is what follows the last space.
    """
    context, _, word = text.rpartition(" ")
    return context, [word], 0


def hellaswag(activity_label, ctx_a, ctx_b, endings, label, **_):
    """The likeliest of four endings (https://arxiv.org/abs/1905.07830), cleaned as lm-evaluation-harness does."""
    context = without_notes(f"{activity_label}: {ctx_a} {ctx_b.capitalize()}")
    label = int(label) if isinstance(label, str) and label.isdecimal() else label
    return context, [*map(without_notes, endings)], label


def without_notes(text):
    """What comes from WikiHow has headings and notes in brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def cloze(context, endings, label, **_):
    """The likeliest of several endings."""
    return context, endings, label


TASKS = {"lambada": lambada, "hellaswag": hellaswag, "cloze": cloze}


def read_examples(path, task):
    """[(where it stands, example)] of a file with a JSON object a line. Ends with one line for what is no example."""
    needed = [name for name in inspect.signature(TASKS[task]).parameters if name != "_"]
    with cli.lines_of(path) as lines:
        places = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    examples = [(where, read_example(where, line, task, needed)) for where, line in places]
    return examples or cli.fail(f"{path} has no examples")


def read_example(where, line, task, needed):
    """An example of a line: (context, endings, label). needed: its fields. Ends with one line for what is none."""
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict) or not fields.keys() >= {*needed}:
            raise ValueError("it is no object with all of these")
        context, endings, label = TASKS[task](**fields)
        if not isinstance(endings, list) or not endings or not all(ending.strip() for ending in endings):
            raise ValueError("there are no endings, or one is empty")
        if type(label) is not int or not 0 <= label < len(endings):
            raise ValueError(f"label must be from 0 to {len(endings) - 1}, not {label!r}")
        "".join([context, *endings]).encode()  # lone surrogates are no text
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        cause = "it is no JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else cli.one_line(error)
        if isinstance(error, TypeError | AttributeError):
            cause = "one of these is not of its kind, such as a text"
        cli.fail(f"{where}: no example of {task}, which has {', '.join(needed)}: {cause}")
    return context, endings, label


def encode_pair(encoder, context, ending):
    """(ids, number of those that are the ending's), with a space between the two, as lm-evaluation-harness has it.

    A word begins with its space, so spaces at the end of the context belong to the ending. Where there is no context,
    <|endoftext|> is.
    """
    text, context = f"{context} {ending}", context.rstrip()
    if not context:
        ids = encoder.encode(text)
        return [encoder.encoder["<|endoftext|>"], *ids], len(ids)
    ids = encoder.encode(text)
    return ids, len(ids) - len(encoder.encode(context))


def evaluate_task(examples, encoder, params, n_head, task, **options):
    """{figure: value} of [(where it stands, (context, endings, label))]; options: see scores.

    Raises ValueError for an ending that is longer than the context.
    """
    n_ctx, encoded, n_cut = len(params["wpe"]), [], 0
    for where, (context, endings, label) in examples:
        rows = [encode_pair(encoder, context, ending) for ending in endings]
        if max(n_scored for _, n_scored in rows) > n_ctx:
            raise ValueError(f"{where}: an ending has more tokens than the model's context of {n_ctx}")
        n_cut += max(len(ids) for ids, _ in rows) > n_ctx + 1
        encoded.append(([(ids[-n_ctx - 1 :], n_scored) for ids, n_scored in rows], endings, label))
    if n_cut:
        said = f"{n_cut} contexts are longer than the model's, and lose their beginning"
        print(translated(said), file=sys.stderr)
    encoded.sort(key=lambda example: -max(len(ids) for ids, _ in example[0]))  # batches of similar lengths
    scored = scores(params, (row for rows, _, _ in encoded for row in rows), n_head, **options)

    totals, bar = {}, Bar(encoded, task, unit="example")
    for n, (_, endings, label) in enumerate(bar, 1):
        results = [next(scored) for _ in endings]
        nats = [result.sum() for result, _ in results]
        if task == "lambada":
            example = {"accuracy": results[0][1].all(), "nats": nats[0]}
        else:
            per_character = [total / len(ending) for total, ending in zip(nats, endings, strict=True)]
            example = {
                "acc": nats.index(min(nats)) == label,
                "acc_norm": per_character.index(min(per_character)) == label,
            }
        totals = {name: totals.get(name, 0) + value for name, value in example.items()}
        figures = {name: total / n for name, total in totals.items()}
        if "nats" in figures:
            figures["perplexity"] = exp(figures.pop("nats"))
        bar.set_postfix(figures, refresh=False)
    return {"examples": len(encoded), **figures}


# a text


def evaluate_text(text, encoder, params, n_head, **options):
    """({figure: value}, ids, nats of each), with the first id predicted from <|endoftext|>; options: see text_nats."""
    ids, parts, total = ids_of(encoder, text), [], 0.0
    windows = text_nats(params, [encoder.encoder[END], *ids], len(params["wpe"]), n_head, **options)
    with Bar(total=len(ids), desc="evaluating", unit="token") as bar:
        for part in windows:
            parts.append(part)
            total += part.sum()
            bar.update(len(part))
            bar.set_postfix({"nats per token": total / sum(map(len, parts))}, refresh=False)
    text = text.replace(END, "")  # which parts documents, and is no text
    n_bytes = len(text.encode())
    figures = {"tokens": len(ids), "characters": len(text), "bytes": n_bytes}
    figures |= {"nats per token": total / len(ids), "perplexity per token": exp(total / len(ids))}
    figures |= {"nats per character": total / len(text), "bits per character": total / len(text) / math.log(2)}
    figures |= {"bits per byte": total / n_bytes / math.log(2)}
    return figures, ids, [nats for part in parts for nats in part]


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ margin: 2em auto; max-width: 50em; padding: 0 1em; background: #fff; color: #000; font: 16px/1.7 serif; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; }}
span {{ background: rgb(255 90 0 / calc(var(--nats) * 10%)); }}
</style>
<p>{title}. The darker, the less expected: {legend} nats. ↵ is a line break.</p>
<pre>
{text}</pre>
"""


def as_html(title, encoder, ids, nats):
    """A page of HTML with the text of ids, each token on a colour that says how many nats it took.

    Tokens that hold parts of a character are shown together.
    """
    spans, data, total = [], b"", 0.0
    for token, n in zip(ids, nats, strict=True):
        data, total = data + encoder.decode_bytes([token]), total + n
        try:
            spans.append(span(data.decode(), total))
        except UnicodeDecodeError:
            continue
        data, total = b"", 0.0
    legend = " ".join(span(str(n), n) for n in (0, 2, 4, 6, 8)) + " " + span("10 or more", 10)
    return PAGE.format(title=html.escape(title), legend=legend, text="".join(spans))


def span(text, nats):
    text = html.escape(text).replace("\r", "␍").replace("\n", "↵\n")
    return f'<span style="--nats:{min(nats, 10):.1f}" title="{nats:.2f}">{text}</span>'


def exp(x):
    return math.exp(x) if x < 700 else math.inf


def main(
    file: str,
    *,
    task: str = None,
    model_size: str = "124M",
    models_dir: str = MODELS_DIR,
    stride: int = None,
    heatmap: str = None,
    backend: str = "numpy",
    dtype: str = "float32",
    tensor_parallel: int = 1,
):
    """Measures how well a model predicts a text, or how well it does a task.

    Args:
        file: a UTF-8 text, documents in it parted by <|endoftext|>, or .jsonl, .json or .csv with {"text"}; or the
            task's examples, a JSON object a line; - is standard input
        task: lambada, hellaswag, or cloze, whose lines have {"context", "endings", "label"}
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        models_dir: the folder that holds the models
        stride: tokens of a text from one window to the next, half the model's context unless told otherwise
        heatmap: write the text to this file, as HTML, each token on a colour that says how little it was expected
        backend: whose arrays to compute with: numpy, jax (on a GPU or TPU where it sees one), or cupy
        dtype: of the weights: float32, or bfloat16 with jax
        tensor_parallel: with jax, over how many devices to divide the weights of each block
    """
    from utils import ModelError, load_encoder_hparams_and_params

    if task is not None and task not in TASKS:
        cli.fail(f"no task {task!r}: choose {', '.join(TASKS)}")
    if task and (stride is not None or heatmap):
        cli.fail(f"--{'heatmap' if heatmap else 'stride'} is for texts, and does nothing for a task")
    with cli.mistakes(devices.DeviceError):
        devices.check(backend, dtype, tensor_parallel)
    if heatmap is not None:
        cli.check_writable(heatmap)
    if heatmap is not None and os.path.realpath(heatmap) == os.path.realpath(file):
        cli.fail(f"{heatmap} is the text itself: choose another file for --heatmap")
    if task:
        examples = read_examples(file, task)
    else:
        documents = [{"text": read_text(file)}] if file == "-" else read_documents([file], ("text",))
        text = END.join(document["text"] for document in documents)

    with cli.mistakes((ModelError, devices.DeviceError)):
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
        params = devices.place(params, backend, dtype, tensor_parallel)
    cli.note(devices.described(params))
    n_ctx, n_head = hparams["n_ctx"], hparams["n_head"]
    n_threads = min(n_available(), 8)  # each batch takes some hundred MB
    if stride is not None and (type(stride) is not int or not 0 < stride <= n_ctx):
        cli.fail(f"--stride must be a whole number from 1 to the model's context of {n_ctx}, not {stride!r}")

    if task:
        with cli.mistakes(ValueError):
            figures = evaluate_task(examples, encoder, params, n_head, task, n_threads=n_threads)
    else:
        figures, ids, nats = evaluate_text(text, encoder, params, n_head, stride=stride, n_threads=n_threads)
    for name, value in figures.items():
        print(f"{name:20}  {value:,}" if isinstance(value, int) else f"{name:20}  {value:,.4f}")
    if heatmap:
        mistakes = cli.mistakes(OSError, f"{heatmap} cannot be written: ")
        with mistakes, open(heatmap, "w", encoding="utf-8", newline="\n") as f:
            f.write(as_html(cli.printable(f"{file}, {model_size}"), encoder, ids, nats))


if __name__ == "__main__":
    cli.run(main)
