"""How well a model predicts: figures that can be held against published ones.

python examples/evaluate.py text.txt --model_size 124M
"""

import functools
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from arrays import is_jax, namespace, round_up
from devices import spread
from gpt2 import gpt2


def losses(params, windows, n_head, n_last=0):  # [..., n_seq+1] -> 2 of [..., n_last]
    """Of each of the last n_last tokens of windows (0: of all but the first), given those before it: the cross-entropy
    in nats, -log of the probability that the model gives it; and whether the model finds it the likeliest.

    windows: ids, an array of the same library as the weights. Works under JAX's jit, grad and vmap.
    """
    logits = gpt2(windows[..., :-1], **params, n_head=n_head, n_last=n_last)  # [..., n_last, n_vocab]
    xp, ids = namespace(logits), windows[..., 1:][..., -n_last:, None]  # [..., n_last, 1]
    logits = xp.astype(logits, xp.float32, copy=False)  # half precision would do for products, but not for sums
    logits -= xp.max(logits, axis=-1, keepdims=True)
    likeliest = xp.argmax(logits, axis=-1)  # [..., n_last]
    right = xp.take_along_axis(logits, ids, axis=-1)[..., 0]  # [..., n_last]
    return xp.log(xp.sum(xp.exp(logits), axis=-1)) - right, likeliest == ids[..., 0]


@functools.cache
def compiled_losses():
    import jax

    return jax.jit(losses, static_argnames=("n_head", "n_last"))


def scores(params, rows, n_head):
    """Yields for each of rows, (ids, n_scored): the losses of its last n_scored ids, float64, and which are likeliest.

    Rows that follow one another are a batch, padded at their ends to the longest: they should be of similar lengths.
    """
    xp, n_ctx, use_jax = namespace(params["wte"]), len(params["wpe"]), is_jax(params["wte"])
    n_rows_before = {}
    # JAX compiles every shape anew, so these are few; NumPy gains nothing from more than 1,024 tokens at once
    round_to_few, n_tokens = (round_up, 8192) if use_jax else (min, 1024)
    for batch in batches(rows, lambda row: round_to_few(len(row[0]) - 1, n_ctx), n_tokens):
        n_rows, n_seq = len(batch), round_to_few(max(len(ids) for ids, _ in batch) - 1, n_ctx)
        if use_jax:
            n_rows = n_rows_before[n_seq] = max(n_rows_before.get(n_seq, 0), 1 << (n_rows - 1).bit_length())
        n_last = round_to_few(n_seq - min(len(ids) - 1 - n_scored for ids, n_scored in batch), n_seq)
        windows = np.zeros((n_rows, n_seq + 1), np.int32)  # what pads a row is behind all that is scored
        for window, (ids, _) in zip(windows, batch, strict=False):
            window[: len(ids)] = ids
        run = compiled_losses() if use_jax else losses
        nats, likeliest = (x.tolist() for x in run(params, spread(xp.asarray(windows), params), n_head, n_last))
        for row, (ids, n_scored) in enumerate(batch):
            stop = len(ids) - 1 - (n_seq - n_last)
            yield np.array(nats[row][stop - n_scored : stop]), np.array(likeliest[row][stop - n_scored : stop])


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


def text_nats(params, ids, n_ctx, n_head, stride=0):
    """Yields the cross-entropy in nats of all ids but the first, in their order: arrays of float64, one a window.

    A window of n_ctx tokens begins every stride, n_ctx/2 unless told otherwise, and scores only what the one before did
    not reach: behind the first window, every token is predicted from n_ctx - stride others or more.
    """
    stride = stride or n_ctx // 2

    def windows():
        n_scored = 0
        for start in range(0, max(1, len(ids) - 1 - (n_ctx - stride)), stride):
            window = ids[start : start + n_ctx + 1]
            yield window, start + len(window) - 1 - n_scored
            n_scored = start + len(window) - 1

    return (nats for nats, _ in scores(params, windows(), n_head))
