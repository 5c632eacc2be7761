"""NumPy's, CuPy's and JAX's arrays where they differ: whose an array is, how one is written to, how the model runs.

NumPy's and CuPy's are written in place, and every shape is as good as another. JAX's never change, but `jit` compiles
the model for every shape it meets, in seconds each, and lets it write into arrays that nobody else will read (donated).
"""

import functools
import operator
import sys

from devices import cache_sharding, spread


def namespace(x):
    """The library that an array belongs to, as the Python array API standard has it."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules[type(x).__module__]  # CuPy 14 does not follow the standard in this


def is_jax(x):
    return hasattr(x, "at")


def write(cache, slots, new):  # [n_head, n_slots, d], [n_seq], [n_head, n_seq, d] -> [n_head, n_slots, d]
    """The cache of keys, or of values, with new ones in their slots: in place where arrays can be changed.

    slots follow one another; they may differ from row to row of a batch: [n_rows, n_seq].
    """
    if slots.ndim > 1:  # indices with a slice between them come first: [n_rows, n_seq, n_head, d]
        rows = namespace(slots).arange(len(slots))[:, None]  # [n_rows, 1]
        where, new = (rows, slice(None), slots), new.swapaxes(-3, -2)
    elif is_jax(cache):
        where = (..., slots, slice(None))
    else:  # NumPy copies to a slice in half the time
        where = (..., slice(int(slots[0]), int(slots[-1]) + 1), slice(None))
    if is_jax(cache):
        return cache.at[where].set(new, mode="drop")  # padding may reach beyond the last slot
    cache[where] = new
    return cache


def as_batch(inputs, n_vocab):
    """(prompts, is_batch): the ids of one prompt or of several as lists of lists, and whether they were several.

    inputs: lists or arrays of any library. Raises TypeError for what is no ids, ValueError for ids that are not in the
    vocabulary and for a prompt without any.
    """
    inputs = inputs.tolist() if hasattr(inputs, "tolist") else inputs
    first = inputs[0] if isinstance(inputs, list | tuple) and inputs else None
    is_batch = hasattr(first, "__len__") and getattr(first, "ndim", 1) > 0  # arrays of no dimension are ids
    prompts = []
    for prompt in inputs if is_batch else [inputs]:
        try:
            if isinstance(prompt, bytes | set | dict):  # would look like ids
                raise TypeError
            ids = [operator.index(i) for i in prompt]
        except TypeError as error:
            raise TypeError(f"a prompt is a list of token ids, as encoder.encode gives, not {prompt!r:.40}") from error
        if not ids:
            raise ValueError("a prompt has no tokens: begin with that of <|endoftext|> to generate from nothing")
        check_ids(min(ids), max(ids), n_vocab)
        prompts.append(ids)
    return prompts, is_batch


def check_bounds(ids, n_past, n_vocab, n_slots):
    """Raises ValueError for ids that are not in the vocabulary, and for more tokens than there are slots.

    NumPy would count from the end, and JAX take the nearest that there is. What JAX traces has no values yet: only the
    number of ids is then known to fit.
    """
    if 0 in ids.shape:
        raise ValueError("there are no token ids")
    check_ids(*extremes(ids), n_vocab)
    first, last = extremes(n_past)
    if first < 0:
        raise ValueError(f"n_past must be 0 or more, not {first}")
    if last + ids.shape[-1] > n_slots:
        raise ValueError(f"{last + ids.shape[-1]} tokens do not fit the context of {n_slots}")


def check_ids(least, largest, n_vocab):
    if least < 0 or largest >= n_vocab:
        raise ValueError(f"token ids must be from 0 to {n_vocab - 1}, not {least if least < 0 else largest}")


def extremes(x):
    """The least and the largest of an array, or of a number; 0, 0 where they are not known."""
    try:
        return (x, x) if isinstance(x, int) else (int(x.min()), int(x.max()))
    except TypeError:  # from JAX, while it traces x
        return 0, 0


def empty_cache(params, n_head, n_rows, n_slots, **options):
    """For every block {"k": [n_rows, n_head, n_slots, n_embd/n_head], "v": the same}; options: of zeros."""
    wte = params["wte"]
    shape, options = (n_rows, n_head, n_slots, wte.shape[-1] // n_head), {"dtype": wte.dtype, **options}
    return [{name: namespace(wte).zeros(shape, **options) for name in ("k", "v")} for _ in params["blocks"]]


def cached(model, params, n_head, n_rows, n_slots):
    """The model as forward(rows, n_past, n_last=1) -> logits, with its own cache of n_slots tokens for n_rows rows.

    model: gpt2(). rows: n_rows lists of ids, which follow the first n_past[row] tokens that the cache has of each.
    Returns the logits at the last n_last ids of each row: [n_rows, n_last, n_vocab].
    """
    make = cached_under_jax if is_jax(params["wte"]) else cached_in_place
    return make(model, params, n_head, n_rows, n_slots)


def cached_in_place(model, params, n_head, n_rows, n_slots):
    xp, kv_cache = namespace(params["wte"]), empty_cache(params, n_head, n_rows, n_slots)

    def run(ids, n_past, n_last, which, n_seen):  # the model sees a view of the cache that ends at the newest slot
        views = [{name: array[which, :, :n_seen] for name, array in cache.items()} for cache in kv_cache]
        return model(ids, **params, n_head=n_head, kv_cache=views, n_past=n_past, n_last=n_last)

    def forward(rows, n_past, n_last=1):
        if max(map(len, rows)) == 1:  # the newest id of every row: one pass for all
            past = n_past[0] if len({*n_past}) == 1 else xp.asarray(n_past)
            return run(rows, past, n_last, slice(None), max(n_past) + 1)
        logits = []
        for i, (row, past) in enumerate(zip(rows, n_past, strict=True)):
            if i and past == n_past[i - 1] == 0 and row == rows[i - 1]:  # samples of one prompt share its pass
                for cache in kv_cache:
                    for array in cache.values():
                        array[i, :, : len(row)] = array[i - 1, :, : len(row)]
                logits.append(logits[-1])
            else:
                logits.append(run(row, past, n_last, i, past + len(row)))
        return xp.stack(logits)

    return forward


def cached_under_jax(model, params, n_head, n_rows, n_slots):
    """Compiles few shapes: numbers of slots, and of ids in a prompt, are rounded up.

    What pads a prompt or a draft lies behind all queries: by the one rule none sees it, and later tokens are written
    over it. Several devices share the rows, of which the last is repeated until they divide.
    """
    import numpy as np

    n_slots = round_up(n_slots, len(params["wpe"]))
    lie = cache_sharding(params, n_head, n_rows)
    n_more = -n_rows % lie.mesh.shape["rows"] if lie and lie.spec[0] else 0
    kv_cache = empty_cache(params, n_head, n_rows + n_more, n_slots, device=lie)

    def run(ids, n_past, n_last):
        nonlocal kv_cache
        # NumPy's, since jit takes them over faster than JAX's
        ids, n_past = (spread(np.asarray(x + x[-1:] * n_more, np.int32), params) for x in (ids, n_past))
        logits, kv_cache = compiled(model)(ids, params, n_head, kv_cache, n_past, n_last)
        return logits[:n_rows] if n_more else logits

    def forward(rows, n_past, n_last=1):
        n_before = [len(row) - n_last for row in rows]
        if any(n_before):  # a prompt, up to its last ids
            n_read = round_up(max(n_before), n_slots)
            run([row[:n] + [0] * (n_read - n) for row, n in zip(rows, n_before, strict=True)], n_past, 1)
        n_past = [past + n for past, n in zip(n_past, n_before, strict=True)]
        if n_last == 1:
            return run([row[-1:] for row in rows], n_past, 1)
        n_read = round_up(n_last, n_slots)
        return run([row[-n_last:] + [0] * (n_read - n_last) for row in rows], n_past, 0)[:, :n_last]

    return forward


@functools.cache
def compiled(model):
    """The model under jit, which returns (logits, kv_cache)."""
    import jax

    def run(ids, params, n_head, kv_cache, n_past, n_last):
        return model(ids, **params, n_head=n_head, kv_cache=kv_cache, n_past=n_past, n_last=n_last), kv_cache

    return jax.jit(run, static_argnames=("n_head", "n_last"), donate_argnames="kv_cache")


def round_up(n, most):
    """The next power of 2 from 16 on, but no more than most."""
    return min(max(16, 1 << (n - 1).bit_length()), most)
