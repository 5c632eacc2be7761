"""A model and what is asked about it: plain answers for the page, and the arrays that they name."""

import inspect
import itertools
import json
import math
import os
import threading

import numpy as np

import gpt2
from backends.arrays import matmul
from backends.cache import Cache
from encoder import PATTERN
from explorer import attribution, source, trace
from sampling import check_options, draw

N_TOKENS = 128  # of a prompt: longer ones are cut
N_GENERATED = 256  # tokens of a text that grows
N_LENS = 12  # positions that the lens looks at
N_SENT = 2**22  # numbers of an array that travel: of larger ones, the first columns
N_SAVED = 2**18  # the same, in a file


class QuestionError(ValueError):
    """What was asked cannot be answered.

    template: one line that says why, with {0} for the first of values. The page knows the templates in Chinese.
    """

    def __init__(self, template, *values):
        super().__init__(template.format(*values))
        self.template, self.values = template, [str(value) for value in values]


def as_json(answer):
    """Raises QuestionError for numbers that JSON does not have."""
    try:
        return json.dumps(answer, allow_nan=False)
    except ValueError as error:
        raise QuestionError("the model makes numbers that are not finite: its weights are damaged") from error


class Session:
    """answer(kind, question) -> a dict; array(key) -> the float32 array that an answer named. Threads may share it."""

    def __init__(self, model_size, encoder, hparams, params, text="", block=0):
        """text, block: what the page begins with."""
        self.text, self.block = text, block
        self.model_size, self.encoder, self.hparams, self.params = model_size, encoder, hparams, params
        self.n_head, self.n_layer, self.n_ctx = hparams["n_head"], hparams["n_layer"], hparams["n_ctx"]
        self.n_tokens = min(N_TOKENS, self.n_ctx)
        self.lines = source.highlighted(trace.SOURCE)
        self.n_sent, self.weights_too = N_SENT, True  # of the model, where a call has them as arguments
        self.lock, self.keys = threading.Lock(), itertools.count()
        self.kept = {}  # {kind of answer: {key: array}}, of the newest answer of each kind
        self.newest = self.newest_ids = self.ran_with = None  # the Run of the newest run, its ids, its weights
        self.streams = None  # and what comes into each block and leaves the last
        self.cached, self.caches = [], None  # the ids whose keys and values are in the caches
        self.answers = {"about": self.about, "first": self.first, "run": self.run, "lens": self.lens, "step": self.step}
        self.answers |= {"why": self.why, "compare": self.compare}

    def answer(self, kind, question):
        """One at a time. Raises QuestionError."""
        if kind not in self.answers:
            raise QuestionError("no such question: {0}", f"{kind!r:.40}")
        if not isinstance(question, dict):
            raise QuestionError("a question must be a JSON object")
        try:
            inspect.signature(self.answers[kind]).bind(**question)
        except TypeError as error:
            raise QuestionError("{0} is asked otherwise: {1}", kind, error) from error
        with self.lock:
            return self.answers[kind](**question)

    def array(self, key):
        """Raises QuestionError for one that is no longer kept."""
        for arrays in [*self.kept.values()]:
            if type(key) is int and key in arrays:
                return np.ascontiguousarray(arrays[key], "<f4")
        raise QuestionError("these numbers are no longer kept: another run has taken their place")

    def keep(self, kind, array):
        key = next(self.keys)
        self.kept[kind][key] = array
        return key

    # questions

    def about(self):
        """The model, the source of gpt2.py, and all tokens as the vocabulary writes them."""
        functions = {f.name: {"first": f.first, "last": f.last, "doc": f.doc} for f in trace.FUNCTIONS.values()}
        tokens = [self.encoder.decoder[i] for i in range(len(self.encoder.decoder))]
        about = {"model": self.model_size, "hparams": self.hparams, "n_tokens": self.n_tokens, "tokens": tokens}
        return about | {"file": os.path.basename(trace.FILE), "lines": self.lines, "functions": functions}

    def first(self):
        return {"text": self.text, "block": self.block}

    def run(self, text=None, ids=None, block=0, off=()):
        """gpt2() on a text or on ids, with the values of one block. off: see switched_off."""
        ids, n_cut = self.ids_of(text, ids)
        check_whole("block", block, 0, self.n_layer - 1)
        return self.recorded(ids, [block], off) | {"block": block, "n_cut": n_cut}

    def everything(self, n_bytes):
        """The answers that a page needs which can ask nobody, with the values of as many blocks as fit in n_bytes."""
        self.n_sent, self.weights_too = N_SAVED, False
        run = self.run(self.text, block=self.block)
        n_each = sum(array.nbytes for array in self.kept["run"].values())
        n_blocks = max(1, min(self.n_layer, n_bytes // max(n_each, 1)))
        others = [i for i in range(self.n_layer) if i != self.block]
        if n_blocks > 1:
            run |= self.recorded(run["ids"], [self.block, *others[: n_blocks - 1]])
        answers = {"about": self.about(), "first": self.first(), "run": run, "why": self.why(run["ids"])}
        return answers | {"lens": self.lens_of_all(run["ids"])}

    def recorded(self, ids, blocks, off=()):
        params = self.switched_off(off)
        run = trace.record(ids, lambda path, name: is_open(path, name, blocks), **params, n_head=self.n_head)
        self.newest, self.newest_ids, self.ran_with = run, ids, params
        return self.told(run, ids, off)

    def told(self, run, ids, off=()):
        self.kept["run"] = {}
        self.streams = [value.array for value in run.root.values if value.name == "x"][: self.n_layer + 1]
        all_weights = [trace.attention_weights(run, i) for i in range(self.n_layer)]
        return {
            "ids": ids,
            "text": self.encoder.decode(ids),
            "words": self.words(ids),
            "root": self.call(run.root, self.sizes(len(ids))),
            "weights": [self.keep("run", weights) for weights in all_weights],
            "habits": [habits(weights, ids) for weights in all_weights],
            "norms": [np.linalg.norm(x.astype(np.float64), axis=-1).round(3).tolist() for x in self.streams],
            "logits": self.keep("run", run.logits[-1]),
            "off": list(off),
        }

    def lens(self, ids, positions):
        """What gpt2() would say if it stopped before a block, for each block and these positions of the last run.

        ids: of that run.
        """
        if not isinstance(positions, list) or not 0 < len(positions) <= N_LENS:
            raise QuestionError("positions must be a list of 1 to {0}", N_LENS)
        self.check_newest(ids)
        for position in positions:
            check_whole("position", position, 0, len(self.streams[0]) - 1)
        x = np.stack([stream[positions] for stream in self.streams])  # [n_layer + 1, n_positions, n_embd]
        logits = matmul(gpt2.layer_norm(x, **self.params["ln_f"]), self.params["wte"].T)  # [..., n_vocab]
        final = logits[-1].argmax(axis=-1)
        return {
            "positions": positions,
            "rows": [[view(row, i) for row, i in zip(rows, final, strict=True)] for rows in logits],
        }

    def lens_of_all(self, ids):
        """What the lens sees at every position."""
        positions = [*range(len(ids))]
        starts = range(0, len(ids), N_LENS)
        parts = [self.lens(ids, positions[start : start + N_LENS])["rows"] for start in starts]
        return {
            "positions": positions,
            "rows": [[*itertools.chain(*rows)] for rows in zip(*parts, strict=True)],
        }

    def why(self, ids, token=None, other=None):
        """What each part gave, in the last run, to the logit of the next token, less that of another.

        ids: of that run. token: None for the likeliest. other: None for the mean of all.
        """
        self.check_newest(ids)
        for i in (token, other):
            if i is not None:
                check_whole("an id", i, 0, self.hparams["n_vocab"] - 1)
        token = int(self.newest.logits[-1].argmax()) if token is None else token
        parts = attribution.attribute(self.newest, self.ran_with, token, other)
        return {
            "token": token,
            "other": other,
            "lead": parts.total,
            "heads": parts.heads.sum(axis=-1).tolist(),
            "from": np.abs(parts.heads).argmax(axis=-1).tolist(),  # the token of which each head brought most
            "mlps": parts.mlps.tolist(),
            "embeddings": parts.embeddings.tolist(),
            "biases": parts.biases,
            "tokens": parts.heads.sum(axis=(0, 1)).tolist(),  # what all heads brought from each token
        }

    def step(self, ids, block=0, temperature=0, top_k=0, top_p=1, point=0.5):
        """The next id, with the cache: only those of the ids run that it has not seen, and their values are told."""
        self.check_ids(ids, min(N_GENERATED, self.n_ctx))
        check_whole("block", block, 0, self.n_layer - 1)
        self.check_sampling(temperature, top_k, top_p)
        if not is_number(point) or not 0 <= point <= 1:
            raise QuestionError("point must be a number from 0 to 1")
        n_past = len(self.cached)
        if n_past in (0, len(ids)) or ids[:n_past] != self.cached:  # another text
            self.caches, n_past = new_caches(self.params, self.n_head, min(N_GENERATED, self.n_ctx)), 0
        self.cached = []  # until it has run
        run = trace.record(
            ids[n_past:],
            lambda path, name: is_open(path, name, [block]),
            **self.params,
            n_head=self.n_head,
            kv_cache=[cache.up_to(len(ids)) for cache in self.caches],
            n_past=n_past,
        )
        self.cached = [*ids]
        self.kept["step"] = {}
        logits = run.logits[-1]
        next_id = draw(logits, [point] if temperature else None, temperature, top_k, top_p)
        arrays, mha = {}, run.call(f"block {block}", "mha")
        for name in "qkv":
            array = mha.last(name)
            arrays[name] = {"key": self.keep("step", array), "shape": array.shape}
        answer = {"n_past": n_past, "n_run": len(ids) - n_past, "next_id": int(next_id), **arrays, "block": block}
        return answer | {"logits": self.keep("step", logits)}

    def compare(self, ids, off=(), patch=None):
        """The logits of the next token as the model is, and with parts switched off or the residual stream patched.

        patch: {"text", "block", "position", "from"}: what came into the block at position comes from another text, from
            its token of this number, or its last if that is None.
        """
        self.check_ids(ids, self.n_tokens)
        self.kept["compare"] = {}
        params, answer = self.switched_off(off), {}
        if patch is None:
            after = gpt2.gpt2(ids, **params, n_head=self.n_head)[-1]
        else:
            other, x, block = self.patched(ids, params, patch)
            after, answer["other_ids"] = trace.forward_from(x, params, self.n_head, block)[-1], other
        if ids == self.newest_ids and self.ran_with is self.params:
            before = self.newest.logits[-1]
        else:
            before = gpt2.gpt2(ids, **self.params, n_head=self.n_head)[-1]
        return answer | {"before": self.keep("compare", before), "after": self.keep("compare", after)}

    def patched(self, ids, params, patch):
        """(the other text's ids, the residual stream that comes into a block with a row of theirs, the block)."""
        if not isinstance(patch, dict) or patch.keys() != {"text", "block", "position", "from"}:
            raise QuestionError('a patch has "text", "block", "position" and "from"')
        other, _ = self.ids_of(patch["text"], None)
        check_whole("block", patch["block"], 0, self.n_layer)
        check_whole("position", patch["position"], 0, len(ids) - 1)
        if patch["from"] is not None:
            check_whole("from", patch["from"], 0, len(other) - 1)
        x, theirs = (self.stream(some, params, patch["block"]) for some in (ids, other))
        x[patch["position"]] = theirs[-1 if patch["from"] is None else patch["from"]]
        return other, x, patch["block"]

    def stream(self, ids, params, block):  # -> [n_seq, n_embd]
        """The residual stream that comes into a block."""
        run = trace.record(ids, lambda path, name: path == ("gpt2",) and name == "x", **params, n_head=self.n_head)
        return [value.array for value in run.root.values if value.name == "x"][block]

    def readable(self, i):
        """A token as the page shows it: · is a space, ↵ a line break; its bytes, if it is a part of a character."""
        data = self.encoder.decode_bytes([i])
        try:
            return data.decode("utf-8").replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
        except UnicodeDecodeError:
            return f"‹{data.hex(' ').upper()}›"

    # what a question brings

    def ids_of(self, text, ids):
        """(the first n_tokens ids, how many were cut)."""
        if ids is None:
            if not isinstance(text, str):
                raise QuestionError("a text is needed, or ids")
            try:
                ids = self.encoder.encode(text) or [self.encoder.encoder["<|endoftext|>"]]
            except UnicodeEncodeError as error:
                raise QuestionError("the text is not valid Unicode") from error
            return ids[: self.n_tokens], max(0, len(ids) - self.n_tokens)
        self.check_ids(ids, self.n_tokens)
        return ids, 0

    def check_newest(self, ids):
        if self.newest is None:
            raise QuestionError("nothing has run yet")
        if ids != self.newest_ids:  # those of another tab
            raise QuestionError("another text has run since, perhaps in another tab: run this one again")

    def check_ids(self, ids, most):
        if not isinstance(ids, list) or not 0 < len(ids) <= most:
            raise QuestionError("ids must be a list of 1 to {0} token ids", most)
        for i in ids:
            check_whole("an id", i, 0, self.hparams["n_vocab"] - 1)

    def check_sampling(self, temperature, top_k, top_p):
        try:
            check_options(temperature=temperature, top_k=top_k if temperature else 0, top_p=top_p if temperature else 1)
        except ValueError as error:
            raise QuestionError("the settings cannot be used: {0}", error) from error

    def switched_off(self, off):
        """The weights, less some parts of the model: [{"block", "head"} or {"block", "neuron"}, ...]."""
        if not isinstance(off, list | tuple) or len(off) > 64:
            raise QuestionError("off must be a list of at most 64 heads and neurons")
        params = self.params
        for part in off:
            if not isinstance(part, dict) or part.keys() not in ({"block", "head"}, {"block", "neuron"}):
                raise QuestionError('a part has a "block", and a "head" or a "neuron"')
            check_whole("block", part["block"], 0, self.n_layer - 1)
            if "head" in part:
                check_whole("head", part["head"], 0, self.n_head - 1)
                params = trace.without_head(params, self.n_head, **part)
            else:
                check_whole("neuron", part["neuron"], 0, 4 * self.hparams["n_embd"] - 1)
                params = trace.without_neuron(params, **part)
        return params

    # what an answer tells

    def words(self, ids):
        """The words of a text, each with its first token and the merges that made its tokens; none of ids that are no
        tokens of their text, such as those that a model chose."""
        text = self.encoder.decode(ids)
        if self.encoder.encode(text) != ids:
            return []
        words, first = [], 0
        for word in PATTERN.findall(text):
            steps = merges(word, self.encoder)
            words.append({"first": first, "steps": steps})
            first += len(steps[-1]["symbols"])
        return words

    def sizes(self, n_seq):
        return {**self.hparams, "n_seq": n_seq}

    def call(self, call, sizes):
        """A call as plain lists: its values and the calls in it."""
        return {
            "label": call.label,
            "function": call.function.name,
            "line": call.line,
            "values": [self.value(call, value, sizes) for value in call.values],
            "calls": [self.call(child, sizes) for child in call.calls],
        }

    def value(self, call, value, sizes):
        told = {"name": value.name, "line": value.line, "argument": value.is_argument}
        told["axes"] = [[name, n] for name, n in zip(axes_of(call, value, sizes), value.shape, strict=True)]
        if before := axes_before(call, value, sizes):
            told["before"] = before
        if value.array is None or (value.is_weight and not self.weights_too):
            return told
        if not value.shape:
            return told | {"number": round(float(value.array), 6)}
        n_rows = max(math.prod(value.shape[:-1]), 1)
        shown = min(value.shape[-1], max(self.n_sent // n_rows, 1))  # columns
        array = value.array[..., :shown]
        is_finite = True if value.is_weight else np.isfinite(array)
        finite = array if np.all(is_finite) else array[is_finite]
        if finite.size and not value.is_weight:
            told |= {"min": float(finite.min()), "max": float(finite.max()), "hidden": finite.size < array.size}
        return told | {"key": self.keep("run", array), "shown": shown, "weight": value.is_weight}


def is_open(path, name, blocks):
    """Whether a value is kept: one outside of the blocks, in an open one, or one that shows what heads and mlps do."""
    of_block = len(path) > 1 and path[1].startswith("block ")
    return not of_block or int(path[1].split()[1]) in blocks or attribution.is_needed(path, name)


def axes_of(call, value, sizes):
    """The names of a value's axes, from the comments of gpt2.py, where they fit."""
    names = value.statement.after or []
    if value.name == "return" and not names:
        names = call.function.head.after
    if value.is_argument:
        arrays = [other.name for other in call.values if other.is_argument and other.shape]
        place = arrays.index(value.name) if value.name in arrays else 0
        names = call.function.head.before[place : place + 1]
    over_keys = value.name in ("scores", "weights", "mask", "hidden") or call.function.name == "softmax"
    return source.named(value.shape, names[0] if names else [], sizes, over_keys)


def axes_before(call, value, sizes):
    """The axes of what a line makes an array from, [[name, n], ...]: by its comment, or as it read them; or none."""
    if value.is_argument:
        return []
    for names in value.statement.before:
        if all(source.size_of(name, sizes) for name in names):
            return [[name, source.size_of(name, sizes)] for name in names]
    if value.statement.before:
        return []
    earlier = [*itertools.takewhile(lambda other: other.statement is not value.statement, call.values)]
    read = [other for other in earlier if other.name in value.statement.reads and other.shape]
    after = [*zip(axes_of(call, value, sizes), value.shape, strict=True)]
    before = [*zip(axes_of(call, read[-1], sizes), read[-1].shape, strict=True)] if read else []
    is_part = len(before) == len(after) + 1 > 1 and {*after} < {*before}  # such as q, one of three along an axis of x
    return [[*axis] for axis in before] if is_part else []


def habits(weights, ids):
    """For each head how much of its weight goes, on average over the tokens that have one, to certain tokens.

    weights: [n_head, n_seq, n_seq]. "before": the token before; "first": the first token, of those later than the
    second; "self": the token itself; "copy": earlier copies of it; "after": tokens after an earlier copy.
    """
    n = len(ids)
    i, j = np.arange(n)[:, None], np.arange(n)
    same = np.asarray(ids)[:, None] == np.asarray(ids)
    copy = same & (j < i)
    after = np.zeros_like(copy)
    after[:, 1:] = copy[:, :-1]
    masks = {"before": j == i - 1, "first": (j == 0) & (i > 1), "self": j == i, "copy": copy, "after": after}
    told = {}
    for name, mask in masks.items():
        rows = mask.any(axis=-1)
        shares = (weights * mask).sum(axis=-1, dtype=np.float64)[:, rows]  # [n_head, n_rows]
        told[name] = shares.mean(axis=-1).round(4).tolist() if rows.any() else None
    return told


def merges(word, encoder):
    """The tokens of a word as they are made: [{"symbols", "joined": place in the step before, "rank"}, ...]."""
    symbols = [encoder.byte_encoder[byte] for byte in word.encode("utf-8")]
    steps = [{"symbols": symbols}]
    while len(symbols) > 1:
        ranks = [encoder.ranks.get(f"{a} {b}", math.inf) for a, b in itertools.pairwise(symbols)]
        if min(ranks) == math.inf:
            break
        i = ranks.index(min(ranks))
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
        steps.append({"symbols": symbols, "joined": i, "rank": ranks[i]})
    return steps


def view(logits, final):
    """What the lens sees: the likeliest token and its probability, and those and the rank of the final one."""
    p = np.exp(logits - logits.max())
    total = p.sum(dtype=np.float64)
    best = int(logits.argmax())
    rank = int(np.count_nonzero(logits > logits[final])) + 1
    return {
        "id": best,
        "p": round(float(p[best] / total), 6),
        "final_p": round(float(p[final] / total), 6),
        "final_rank": rank,
    }


def new_caches(params, n_head, n_slots):
    shape = n_head, n_slots, params["wte"].shape[-1] // n_head
    return [Cache(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in params["blocks"]]


def check_whole(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise QuestionError("{0} must be a whole number from {1} to {2}, not {3}", name, low, high, f"{value!r:.40}")


def is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)
