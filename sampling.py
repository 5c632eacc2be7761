"""Sampling: logits -> id. The likeliest token, or one drawn at random, as likely as the model says."""

import math
import numbers

from backends.arrays import is_jax, namespace, on_processor


def sample(logits, rng=None, temperature=0, top_k=0, top_p=1):  # [..., n_vocab] -> [...]
    """Picks a token: the likeliest at temperature 0, else one drawn from softmax(logits / temperature).

    rng: a NumPy Generator. top_k keeps the k likeliest tokens (https://arxiv.org/abs/1805.04833), 0 all of them; of
    these, top_p keeps the smallest set whose probabilities reach p (nucleus sampling, https://arxiv.org/abs/1904.09751).
    Tokens exactly as likely as the last one kept stay, too.
    """
    point = rng.random((*logits.shape[:-1], 1)) if temperature else None
    return draw(logits, point, temperature, top_k, top_p)


def draw(logits, point, temperature=0, top_k=0, top_p=1):  # [..., n_vocab], [..., 1] -> [...]
    """The token on which a point from 0 to 1 falls, or without one the likeliest: see sample."""
    xp = namespace(logits)
    if point is None:
        return xp.argmax(logits, axis=-1)  # greedy sampling
    # sums over 50,257 tokens drift in float32, but JAX has nothing longer unless told to
    logits = xp.astype(logits, xp.float32 if is_jax(logits) else xp.float64)
    # [..., n_vocab], the probability of each token but for a common factor
    p = xp.exp((logits - xp.max(logits, axis=-1, keepdims=True)) / temperature)
    best = p
    if 0 < top_k < p.shape[-1]:
        # the part above the next best, for which JAX does not sort the other part
        best = xp.partition(p, -top_k - 1, axis=-1)[..., -top_k:]  # [..., top_k]
        p = xp.where(p < xp.min(best, axis=-1, keepdims=True), 0, p)
    if top_p < 1:
        falling = xp.flip(xp.sort(best, axis=-1), axis=-1)
        before = xp.cumsum(falling, axis=-1) - falling
        needed = before < top_p * xp.sum(p, axis=-1, keepdims=True)  # those before do not reach p
        p = xp.where(p < xp.min(xp.where(needed, falling, xp.inf), axis=-1, keepdims=True), 0, p)
    # each token owns a stretch of a line, as long as its probability: where on the line is the point?
    ends = xp.cumsum(p, axis=-1)
    if is_jax(p):  # whose sums are sums of parts: they may rise a little where p is 0, and the last be not the largest
        ends = xp.where(p > 0, ends, 0)
    point = xp.minimum(xp.asarray(point, dtype=p.dtype), 1 - xp.finfo(p.dtype).eps)  # 1 would be on no token
    return xp.argmax(ends > point * xp.max(ends, axis=-1, keepdims=True), axis=-1)


def penalize(logits, ids, repetition_penalty=1, no_repeat_ngram=0):  # [n_vocab], [n_seq]
    """Holds back, in the logits of the token that follows ids, what stands there already. In place, on NumPy.

    repetition_penalty: a token of ids has its logit divided by it, or multiplied where that is below 0 (CTRL,
    https://arxiv.org/abs/1909.05858, section 4.1). no_repeat_ngram: no token may end a sequence of so many that stands
    in ids already (https://arxiv.org/abs/1705.04304, section 2.5).
    """
    if repetition_penalty != 1:
        for i in {*ids}:
            logits[i] *= repetition_penalty if logits[i] < 0 else 1 / repetition_penalty
    if no_repeat_ngram:
        n = no_repeat_ngram - 1
        newest = ids[len(ids) - n :]
        for i in range(len(ids) - n):
            if ids[i : i + n] == newest:
                logits[ids[i + n]] = -math.inf


def log_probability(logits, i, n_best):  # [n_vocab] -> a number, {id: number}
    """The log-probability of token i, and those of the n_best likeliest tokens, these first. On NumPy, in float64."""
    import numpy as np

    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())  # log(softmax(x)), where none becomes log(0)
    k = max(1, min(n_best, len(x)))
    best = np.flatnonzero(x >= np.partition(x, -k)[-k])  # as likely as the k-th: few, to sort
    best = best[np.argsort(-x[best], kind="stable")][:n_best]  # of equals, as with argmax, the first is first
    return x[i].item(), {j: x[j].item() for j in best.tolist()}


class Sampler:
    """Picks the next ids of a batch: its options are those of sample() and penalize(), and logprobs.

    prompts: [n_rows] lists of ids. seed: row i draws with seed + i, or with seed[i] of a list; None: with no two runs
    alike. logprobs: see with_logprobs; of how many of the likeliest tokens, 0 for the id alone.
    """

    draw = staticmethod(draw)  # here, too, so that backends/ is handed it and need not import this file

    def __init__(
        self,
        prompts,
        temperature=0,
        top_k=0,
        top_p=1,
        seed=None,
        repetition_penalty=1,
        no_repeat_ngram=0,
        logprobs=None,
        n_samples=None,
    ):
        if n_samples is not None:
            raise TypeError("n_samples is a flag: for several samples of a prompt, give a batch, [ids] * 3")
        penalties = {"repetition_penalty": repetition_penalty, "no_repeat_ngram": no_repeat_ngram}
        check_options(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, logprobs=logprobs, **penalties)
        seeds = seed if isinstance(seed, list) else [seed if seed is None else seed + i for i in range(len(prompts))]
        if len(seeds) != len(prompts):
            raise ValueError(f"seed has {len(seeds)} numbers for {len(prompts)} prompts")
        self.options = {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
        self.penalties = penalties if repetition_penalty != 1 or no_repeat_ngram else {}
        self.logprobs, self.newest = logprobs, []  # newest: log_probability() of each row's newest id
        self.sees_logits = bool(self.penalties) or logprobs is not None  # of each step: the ids alone are not enough
        self.is_greedy = temperature == 0 and not self.sees_logits
        self.texts, self.rngs = [[*prompt] for prompt in prompts], []
        if temperature:
            from numpy.random import default_rng  # only here: its import takes as long as a token

            self.rngs = [default_rng(seed) for seed in seeds]  # of each row, so that it draws as it would alone

    def points(self, n_steps):
        """A number from 0 to 1 for every step and row, [n_steps, n_rows]; None for the likeliest ids."""
        if not self.rngs:
            return None
        import numpy as np

        return np.array([[rng.random() for rng in self.rngs] for _ in range(n_steps)])

    def pick(self, logits):  # [n_rows, 1, n_vocab] -> [n_rows]
        """The next id of each row, in a list."""
        unchanged = logits
        if self.penalties:
            logits = self.penalized(logits)
        points = self.points(1)  # [1, n_rows]
        if points is None:
            ids = draw(logits, None)[:, 0].tolist()
        elif on_processor(logits):  # row by row, in little memory, by NumPy, which sorts faster than JAX
            rows = zip(as_numpy(logits), points[0], strict=True)
            ids = [draw(row, point, **self.options).item() for row, point in rows]
        else:
            ids = draw(logits, points.T[..., None], **self.options)[:, 0].tolist()  # [n_rows, 1, 1]
        for text, next_id in zip(self.texts, ids, strict=True):
            text.append(next_id)
        if self.logprobs is not None:
            rows = zip(as_numpy(unchanged)[:, 0], ids, strict=True)
            self.newest = [log_probability(row, next_id, self.logprobs) for row, next_id in rows]
        return ids

    def with_logprobs(self, steps):
        """Passes on steps as they are picked, each id with its log_probability(): (id, number, {id: number})."""
        for ids in steps:
            yield [i if i is None else (i, *told) for i, told in zip(ids, self.newest, strict=True)]

    def penalized(self, logits):  # [n_rows, 1, n_vocab]
        logits = as_numpy(logits).copy()
        for row, text in zip(logits[:, 0], self.texts, strict=True):
            penalize(row, text, **self.penalties)
        return logits


def as_numpy(x):
    """An array of any library as NumPy's."""
    import numpy as np

    return np.asarray(x.get() if hasattr(x, "get") else x)  # CuPy's come from their device when asked


def check_options(
    n_tokens_to_generate=0,
    n_samples=1,
    batch_size=None,
    temperature=0,
    top_k=0,
    top_p=1,
    seed=None,
    stop=None,
    repetition_penalty=1,
    no_repeat_ngram=0,
    logprobs=None,
):
    """Raises ValueError for a value that generate, or the command, cannot take, and TypeError for such a stop."""
    if stop is not None and not callable(stop):
        raise TypeError(f"stop must be a function of the ids so far, not {stop!r}")
    whole = {"n_tokens_to_generate": n_tokens_to_generate, "top_k": top_k, "no_repeat_ngram": no_repeat_ngram}
    for name, value in whole.items():
        if not is_whole(value):
            raise ValueError(f"{name} must be a whole number, 0 or more, not {value!r}")
    if not is_number(repetition_penalty) or not 0.01 <= repetition_penalty <= 100:
        raise ValueError(f"repetition_penalty must be a number from 0.01 to 100, not {repetition_penalty!r}")
    if not is_whole(n_samples) or not 1 <= n_samples <= 1000:
        raise ValueError(f"n_samples must be a whole number from 1 to 1000, not {n_samples!r}")
    if logprobs is not None and not is_whole(logprobs):
        raise ValueError(f"logprobs must be a whole number, 0 or more, not {logprobs!r}")
    if batch_size is not None and (not is_whole(batch_size) or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number, 1 or more, not {batch_size!r}")
    if not is_number(temperature) or not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise ValueError(f"temperature must be 0, or a number from 1e-6 to 1e6, not {temperature!r}")
    if not is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number above 0 and at most 1, not {top_p!r}")
    seeds = [value for value in (seed if isinstance(seed, list) else [seed]) if value is not None]
    if not all(map(is_whole, seeds)):
        raise ValueError(f"seed must be a whole number, 0 or more, not {seed!r}")
    for name, given in {"top_k": top_k > 0, "top_p": top_p < 1, "seed": seeds}.items():
        if given and temperature == 0:
            raise ValueError(
                f"{name} does nothing at a temperature of 0, which takes the likeliest token: add temperature=1"
            )


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value < 2**63
