"""Sampling: logits -> id. The likeliest token, or one drawn at random, as likely as the model says."""

import numbers

from arrays import is_jax, namespace


def sample(logits, rng=None, temperature=0, top_k=0, top_p=1):  # [..., n_vocab] -> [...]
    """Picks a token: the likeliest at temperature 0, else one drawn from softmax(logits / temperature).

    rng: a NumPy Generator. top_k keeps the k likeliest tokens (https://arxiv.org/abs/1805.04833), 0 all of them; of
    these, top_p keeps the smallest set whose probabilities reach p (nucleus sampling, https://arxiv.org/abs/1904.09751).
    Tokens exactly as likely as the last one kept stay, too.
    """
    if temperature == 0:
        return namespace(logits).argmax(logits, axis=-1)  # greedy sampling
    logits = on_host(logits)
    xp = namespace(logits)
    logits = xp.astype(logits, xp.float64)  # sums over 50,257 tokens would drift in float32
    # [..., n_vocab], the probability of each token but for a common factor
    p = xp.exp((logits - xp.max(logits, axis=-1, keepdims=True)) / temperature)
    if 0 < top_k < p.shape[-1]:
        p = xp.where(p < xp.sort(p, axis=-1)[..., -top_k, None], 0, p)
    if top_p < 1:
        falling = xp.flip(xp.sort(p, axis=-1), axis=-1)
        reached = xp.cumsum(falling, axis=-1)
        needed = reached - falling < top_p * reached[..., -1:]  # those before do not reach p
        p = xp.where(p < xp.min(xp.where(needed, falling, xp.inf), axis=-1, keepdims=True), 0, p)
    # each token owns a stretch of a line, as long as its probability: where does a random point of the line fall?
    ends = xp.cumsum(p, axis=-1)
    point = xp.asarray(rng.random((*p.shape[:-1], 1))) * ends[..., -1:]  # [..., 1]
    return xp.argmax(ends > point, axis=-1)


def on_host(logits):
    """JAX's arrays as NumPy's, for it has no float64 unless told to; others as they are."""
    if not is_jax(logits):
        return logits
    import numpy as np

    return np.asarray(logits)


def sampler(n_rows, temperature=0, top_k=0, top_p=1, seed=None, n_samples=None):
    """pick(logits), [n_rows, 1, n_vocab] -> n_rows ids, each drawn with a generator of its own.

    seed: row i draws with seed + i, or with seed[i] of a list; None: with no two runs alike. Options: see sample.
    """
    if n_samples is not None:
        raise TypeError("n_samples is a flag: for several samples of a prompt, give a batch, [ids] * 3")
    seeds = seed if isinstance(seed, list) else [seed if seed is None else seed + i for i in range(n_rows)]
    if len(seeds) != n_rows:
        raise ValueError(f"seed has {len(seeds)} numbers for {n_rows} prompts")
    if temperature == 0:
        return lambda logits: [next_id for (next_id,) in sample(logits).tolist()]

    from numpy.random import default_rng  # only here: its import takes as long as a token

    rngs = [default_rng(seed) for seed in seeds]

    def pick(logits):
        rows = on_host(logits)[:, 0]
        return [int(sample(row, rng, temperature, top_k, top_p)) for row, rng in zip(rows, rngs, strict=True)]

    return pick


def check_options(
    n_tokens_to_generate=0, n_samples=1, batch_size=1, temperature=0, top_k=0, top_p=1, seed=None, stop=None
):
    """Raises ValueError for a value that generate, or the command, cannot take, and TypeError for such a stop."""
    if stop is not None and not callable(stop):
        raise TypeError(f"stop must be a function of the ids so far, not {stop!r}")
    for name, value in {"n_tokens_to_generate": n_tokens_to_generate, "top_k": top_k}.items():
        if not is_whole(value):
            raise ValueError(f"{name} must be a whole number, 0 or more, not {value!r}")
    if not is_whole(n_samples) or not 1 <= n_samples <= 1000:
        raise ValueError(f"n_samples must be a whole number from 1 to 1000, not {n_samples!r}")
    if not is_whole(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number, 1 or more, not {batch_size!r}")
    if not is_number(temperature) or not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise ValueError(f"temperature must be 0, or a number from 1e-6 to 1e6, not {temperature!r}")
    if not is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number above 0 and at most 1, not {top_p!r}")
    if not all(value is None or is_whole(value) for value in (seed if isinstance(seed, list) else [seed])):
        raise ValueError(f"seed must be a whole number, 0 or more, not {seed!r}")


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value < 2**63
