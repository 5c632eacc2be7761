"""NumPy's, CuPy's and JAX's arrays where they differ: whose an array is, how one is written to, how the model runs.

NumPy's and CuPy's are written in place, and every shape is as good as another. JAX's never change, but `jit` compiles
the model for every shape it meets, in seconds each, and lets it write into arrays that nobody else will read (donated).
"""

import collections
import contextlib
import functools
import itertools
import math
import operator
import os
import sys

from backends.devices import cache_sharding, spread
from backends.threads import PART, Watched, each, in_parts, n_weights, paced, thread_counts

QUERY_BLOCK = 64  # queries that attend together: their scores fit the processor's cache
READ_AT_ONCE = 512  # ids of several prompts: more would be no faster, and take memory
READ_OF_EACH = 64  # ids of each of several prompts, under JAX: one block of queries, for padding may pass the last slot
STEPS_AHEAD = 16  # steps that a GPU takes in one call, at most: the call alone takes as long as one or two


def namespace(x):
    """The library that an array belongs to, as the Python array API standard has it."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules[type(x).__module__]  # CuPy 14 does not follow the standard in this


def is_jax(x):
    return hasattr(x, "at")


def is_numpy(x):
    return type(x).__module__ == "numpy"


def on_processor(x):
    """Whether an array lies in this machine's memory: it is NumPy's, or JAX's and not on a GPU or TPU."""
    if not is_jax(x):
        return is_numpy(x)
    import jax

    if isinstance(x, jax.core.Tracer):  # which will lie where all do that nobody has put elsewhere
        return jax.default_backend() == "cpu"
    return all(device.platform == "cpu" for device in x.devices())


def query_block(q):
    """How many queries attend together. On a GPU more: fewer are no faster there, and JAX compiles every block anew."""
    return QUERY_BLOCK if on_processor(q) else 8 * QUERY_BLOCK


def write(cache, slots, new):  # [n_head, n_slots, d], [n_seq], [n_head, n_seq, d] -> [n_head, n_slots, d]
    """The cache of keys, or of values, with new ones in their slots: in place where arrays can be changed.

    slots follow one another; they may differ from row to row of a batch: [n_rows, n_seq].
    """
    if slots.ndim > 1:  # indices with a slice between them come first: [n_rows, n_seq, n_head, d]
        rows = namespace(slots).arange(len(slots))[:, None]  # [n_rows, 1]
        where, new = (rows, slice(None), slots), new.swapaxes(-3, -2)
    elif is_numpy(cache):  # which copies to a slice in half the time; a GPU would be waited for, to know the numbers
        where = (..., slice(int(slots[0]), int(slots[-1]) + 1), slice(None))
    else:
        where = (..., slots, slice(None))
    if is_jax(cache):
        return cache.at[where].set(new, mode="drop")  # padding may reach beyond the last slot
    cache[where] = new
    return cache


def in_float32(x, w):  # [m, in], [in, out] -> [m, out]
    """x @ w, of JAX's bfloat16 too: that rounds to steps of 0.5 near -100, where GPT-2's logits lie."""
    if is_jax(x) and x.dtype.itemsize < 4:
        return namespace(x).matmul(x, w, preferred_element_type="float32")
    return x @ w


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


def check_bounds(ids, n_past, wte, wpe, kv_cache):
    """Raises ValueError for ids that are not in the vocabulary, and for more tokens than wpe or the cache has room for.

    NumPy would count from the end, and JAX take the nearest that there is. What JAX traces has no values yet: only the
    number of ids is then known to fit.
    """
    if 0 in ids.shape:
        raise ValueError("there are no token ids")
    check_ids(*extremes(ids), len(wte))
    n_slots = min([len(wpe), *(cache["k"].shape[-2] for cache in kv_cache or [])])
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


def check_room(n_prompt, n_tokens_to_generate, n_ctx, sliding_window=False):
    """Raises ValueError unless the context has room for the prompt and for what is to follow, or slides."""
    if n_prompt + n_tokens_to_generate > n_ctx and not sliding_window:
        tokens = f"the prompt's {n_prompt} tokens and the {n_tokens_to_generate} to generate"
        raise ValueError(f"{tokens} are more than the model's context of {n_ctx} tokens holds (see sliding_window)")


def check_memory(params, n_rows, n_slots):
    """Raises MemoryError where weights, cache and logits are more than there is memory for: before it is busy."""
    n_vocab, n_embd = params["wte"].shape
    n_numbers = n_weights(params) + n_rows * 2 * len(params["blocks"]) * n_slots * n_embd
    needed = gibibytes(n_numbers, params["wte"].dtype.itemsize) + gibibytes(n_rows * 2 * n_vocab, 4)
    there = memory(params["wte"])
    if needed > there:
        raise MemoryError(
            f"{n_rows} texts of {n_slots} tokens at once need {needed:.1f} GiB, and there are {there:.1f}: "
            "take fewer at once, fewer tokens, or a smaller model"
        )


def gibibytes(n_numbers, itemsize):
    return n_numbers * itemsize / 2**30


def memory(x):
    """The memory, in GiB, of the device that an array lies on, or of this machine or the container that this runs in.

    Infinite where it is not known, and where several devices share the rows.
    """
    if not on_processor(x):
        sizes = [stats.get("bytes_limit", -1) for stats in memory_stats(x)] if is_jax(x) else [x.device.mem_info[1]]
        return sizes[0] / 2**30 if len(sizes) == 1 and sizes[0] > 0 else math.inf
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as f:
            limit = float(f.read().replace("max", "inf"))
    except (OSError, ValueError):
        limit = math.inf
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows does not say
        limit = min(limit, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return limit / 2**30


def free_memory(x):
    """The memory, in GiB, that is free on each of the devices that JAX's array lies on: 0 where it is not known."""
    return min(stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) for stats in memory_stats(x)) / 2**30


def memory_stats(x):
    return [device.memory_stats() or {} for device in x.devices()]


def empty_cache(params, n_head, n_rows, n_slots, sharding=None):
    """For every block {"k": [n_rows, n_head, n_slots, n_embd/n_head], "v": the same}.

    n_rows: None for a cache of one text, without the axis of rows. sharding: how JAX's are to lie on devices.
    """
    wte, n_layer = params["wte"], len(params["blocks"])
    shape = *([] if n_rows is None else [n_rows]), n_head, n_slots, wte.shape[-1] // n_head
    if is_jax(wte):
        pairs = compiled_zeros(n_layer, shape, wte.dtype, sharding)()
    else:  # views of one array: on Linux, NumPy puts those of 4 MiB and more in huge pages, which are faster to read
        pairs = namespace(wte).zeros((n_layer, 2, *shape), wte.dtype)
    return [{"k": k, "v": v} for k, v in pairs]


def cached(model, params, n_head, n_rows, n_slots):
    """The model as forward(rows, n_past, n_last=1) -> logits, with its own cache of n_slots tokens for n_rows rows.

    model: gpt2(). rows: n_rows lists of ids, which follow the first n_past[row] tokens that the cache has of each; of
    several rows, those that bring more than one id are new: they begin at slot 0, and n_last is 1.
    Returns the logits at the last n_last ids of each row: [n_rows, n_last, n_vocab].
    Under JAX, forward(rows, n_past, draw=sampling.draw, n_steps=up to STEPS_AHEAD, points=[n_steps, n_rows] or None,
    temperature=..., top_k=..., top_p=...) goes on by itself, and returns what it drew: [n_rows, n_steps].
    Raises MemoryError: see check_memory.
    """
    make = cached_under_jax if is_jax(params["wte"]) else cached_in_place
    return make(model, params, n_head, n_rows, n_slots)


def cached_in_place(model, params, n_head, n_rows, n_slots):
    check_memory(params, n_rows, n_slots)
    xp, kv_cache = namespace(params["wte"]), empty_cache(params, n_head, n_rows, n_slots)
    counts, seen = thread_counts(params), collections.defaultdict(dict)

    def read(prompts):  # {prompt: its rows}: those of like length together, padded on their right, as in JAX's case
        waiting, batches = sorted(prompts, key=len), []
        n_at_once = min(READ_AT_ONCE, max(PART[0], sum(map(len, waiting)) // counts[0]))
        while waiting:
            batches.append(waiting[-max(1, n_at_once // len(waiting[-1])) :])
            del waiting[-len(batches[-1]) :]

        def read_batch(some):
            n_ids = len(some[-1])
            ids = xp.asarray([[*prompt, *[0] * (n_ids - len(prompt))] for prompt in some])  # [n_some, n_ids]
            filled = empty_cache(params, n_head, len(some), n_ids)
            model(ids, **params, n_head=n_head, kv_cache=filled, n_last=1)
            for cache, new in zip(kv_cache, filled, strict=True):
                for i, prompt in enumerate(some):
                    for row, name in itertools.product(prompts[prompt], cache):
                        cache[name][row, :, : len(prompt)] = new[name][i, :, : len(prompt)]

        each(read_batch, batches, counts[0])

    def forward(rows, n_past, n_last=1):
        if len(rows) > 1:  # read each prompt once, but for its last id; with that, all rows bring one
            prompts = {}
            for i, row in enumerate(rows):
                if len(row) > 1:
                    prompts.setdefault(tuple(row[:-1]), []).append(i)
            if prompts:
                read(prompts)
            rows, n_past = (
                [row[-1:] for row in rows],
                [past + len(row) - 1 for row, past in zip(rows, n_past, strict=True)],
            )
        ids, past = xp.asarray(rows), n_past[0] if len({*n_past}) == 1 else xp.asarray(n_past)
        n_ids = ids.shape[-1]

        def run(start, stop, written):  # the model sees views of the cache that end at the newest slot
            n_seen = max(n_past) + stop
            views = [{name: array[:, :, :n_seen] for name, array in cache.items()} for cache in kv_cache]
            views = [Watched(view, written) for view in views]
            options = {"kv_cache": views, "n_past": past + start, "n_last": n_last}
            return model(ids[:, start:stop], **params, n_head=n_head, **options)

        if n_last == 1 and counts[0] > 1 and n_ids >= 2 * PART[0]:
            return in_parts(run, n_ids, len(kv_cache), counts[0])
        return paced(lambda written: run(0, n_ids, written), counts, seen[ids.shape])

    return forward


def cached_under_jax(model, params, n_head, n_rows, n_slots):
    """Compiles few shapes: numbers of slots, and of ids in a prompt, are rounded up.

    What pads a prompt or a draft lies behind all queries: by the one rule none sees it, and later tokens are written
    over it. Several devices share the rows, of which the last is repeated until they divide. One row has no axis of
    rows: on processors, XLA would copy its values, all of them, in every step.
    """
    import numpy as np

    n_slots = min(-(-n_slots // 128) * 128, len(params["wpe"]))
    check_memory(params, n_rows, n_slots)
    weights = gibibytes(n_weights(params), params["wte"].dtype.itemsize)
    turn = n_rows == 1 and free_memory(params["wte"]) > 2 * weights  # room for a copy, and for what is computed
    lie = cache_sharding(params, n_head, n_rows)
    n_more = -n_rows % lie.mesh.shape["rows"] if lie and "rows" in lie.spec else 0
    kv_cache = empty_cache(params, n_head, n_rows + n_more if n_rows > 1 else None, n_slots, lie)

    def run(function, ids, n_past, **options):
        nonlocal kv_cache
        # NumPy's, since jit takes them over faster than JAX's
        ids, n_past = (np.asarray(x + x[-1:] * n_more, np.int32) for x in (ids, n_past))
        ids, n_past = (spread(ids, params), spread(n_past, params)) if n_rows > 1 else (ids[0], n_past[0])
        out, kv_cache = function(ids, params, n_head, kv_cache, n_past, **options)
        return out[:n_rows] if n_more else out

    def forward(rows, n_past, n_last=1, draw=None, n_steps=1, points=None, **options):
        n_before = [len(row) - n_last for row in rows]
        if any(n_before):  # a prompt, up to its last ids; of several a part at a time: all would take much memory
            n_read = round_up(max(n_before), n_slots if n_rows == 1 else min(READ_OF_EACH, n_slots))
            for start in range(0, max(n_before), n_read):
                parts = [row[start : min(start + n_read, n)] for row, n in zip(rows, n_before, strict=True)]
                parts = [part + [0] * (n_read - len(part)) for part in parts]
                run(compiled(model), parts, [past + start for past in n_past], n_last=1)
        n_past = [past + n for past, n in zip(n_past, n_before, strict=True)]
        if draw:
            if points is not None:  # 0 for steps that are not taken, and for rows that repeat the last
                points = np.pad(points, [(0, STEPS_AHEAD - n_steps), (0, n_more)])  # [STEPS_AHEAD, n_rows]
            options |= {"n_steps": n_steps, "points": points}
            ids = run(compiled_ahead(model, draw, turn), [row[-1:] for row in rows], n_past, **options)
            return np.asarray(ids)[:, :n_steps]  # [n_rows, STEPS_AHEAD] -> [n_rows, n_steps]
        if n_last == 1:
            return run(compiled(model), [row[-1:] for row in rows], n_past, n_last=1)
        n_read = round_up(n_last, n_slots)
        ids = [row[-n_last:] + [0] * (n_read - n_last) for row in rows]
        return run(compiled(model), ids, n_past, n_last=0)[:, :n_last]

    return forward


@functools.lru_cache
def compiled_zeros(n_pairs, shape, dtype, sharding):
    """Makes n_pairs pairs of arrays in one call: two dozen calls would take longer than a GPU takes for a token."""
    import jax
    import jax.numpy as jnp

    def zeros():
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(n_pairs)]

    return jax.jit(zeros, out_shardings=sharding)


@functools.lru_cache
def compiled(model):
    """The model under jit, which returns (logits, kv_cache)."""
    import jax

    def run(ids, params, n_head, kv_cache, n_past, n_last):
        logits = model(ids, **params, n_head=n_head, kv_cache=kv_cache, n_past=n_past, n_last=n_last)
        return logits.reshape(-1, *logits.shape[-2:]), kv_cache  # [n_rows, n_last, n_vocab]

    return jax.jit(run, static_argnames=("n_head", "n_last"), donate_argnames="kv_cache")


@functools.lru_cache
def compiled_ahead(model, draw, turn):
    """The model under jit, fed n_steps times with what draw makes of its logits: (ids, kv_cache).

    Compiled anew for every top_k and top_p. The shapes are those of a batch; those of one row leave out n_rows.
    turn: copy the weights of the blocks, each w as w.T, which XLA reads faster for a product with one row.
    """
    import jax
    import jax.numpy as jnp

    def turned(blocks):  # each w: [in, out] <-> [out, in]
        return jax.tree.map(lambda x: x.T if x.ndim == 2 else x, blocks) if turn else blocks

    def run(ids, params, n_head, kv_cache, n_past, n_steps, points, temperature, top_k, top_p):
        blocks = turned(params["blocks"])
        if turn:  # without a barrier, XLA would see that w.T.T is w
            blocks = jax.lax.optimization_barrier(blocks)

        def step(i, state):
            ids, kv_cache, n_past, drawn = state
            weights = params | {"blocks": turned(blocks)}
            logits = model(ids, **weights, n_head=n_head, kv_cache=kv_cache, n_past=n_past, n_last=1)
            point = None if points is None else points[i].reshape(*logits.shape[:-1], 1)  # [n_rows] -> [n_rows, 1, 1]
            ids = draw(logits, point, temperature, top_k, top_p).astype(ids.dtype)  # [n_rows, 1]
            return ids, kv_cache, n_past + 1, drawn.at[i].set(ids.reshape(-1))

        drawn = jnp.zeros((STEPS_AHEAD, ids.size), ids.dtype)  # [STEPS_AHEAD, n_rows]
        _, kv_cache, _, drawn = jax.lax.fori_loop(0, n_steps, step, (ids, kv_cache, n_past, drawn))
        return drawn.T, kv_cache

    return jax.jit(run, static_argnames=("n_head", "top_k", "top_p"), donate_argnames="kv_cache")


def steps_ahead(params):
    """How many steps forward may take by itself: see cached. On a processor one: each id is shown when known."""
    return STEPS_AHEAD if is_jax(params["wte"]) and not on_processor(params["wte"]) else 1


def round_up(n, most):
    """The next power of 2 from 16 on, but no more than most."""
    return min(max(16, 1 << (n - 1).bit_length()), most)
