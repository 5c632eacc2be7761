"""gpt2() on JAX's arrays, under jit, which compiles the model for every shape it meets, in seconds each.

So there are few: numbers of slots, and of ids in a prompt, are rounded up. What pads a prompt or a draft lies behind
all queries: by the one rule none sees it, and later tokens are written over it. Arrays never change, but jit lets the
model write into those that nobody else will read (donated).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from backends.arrays import n_weights, on_processor, round_up
from backends.cache import Cache
from backends.devices import cache_sharding, check_memory, free_memory, gibibytes, spread

READ_OF_EACH = 64  # ids of each of several prompts: one block of queries, for padding may pass the last slot
STEPS_AHEAD = 16  # steps that a GPU takes in one call, at most: the call alone takes as long as one or two

jax.tree_util.register_pytree_node(Cache, lambda cache: ((cache.k, cache.v), None), lambda _, arrays: Cache(*arrays))


class Model:
    """See backends. Several devices share the rows, of which the last is repeated until they divide.

    One row has no axis of rows: on processors, XLA would copy its values, all of them, in every step.
    """

    def __init__(self, gpt2, params, n_head, n_rows, n_slots):
        wte, n_blocks = params["wte"], len(params["blocks"])
        self.gpt2, self.params, self.n_head, self.n_rows = gpt2, params, n_head, n_rows
        self.n_slots = min(-(-n_slots // 128) * 128, len(params["wpe"]))
        check_memory(params, n_rows, self.n_slots)
        # room for a copy of the weights, and for what is computed
        self.turn = n_rows == 1 and free_memory(wte) > 2 * gibibytes(n_weights(params), wte.dtype.itemsize)
        sharding = cache_sharding(params, n_head, n_rows)
        self.n_more = -n_rows % sharding.mesh.shape["rows"] if sharding and "rows" in sharding.spec else 0
        shape = n_head, self.n_slots, wte.shape[-1] // n_head
        shape = (n_rows + self.n_more, *shape) if n_rows > 1 else shape
        self.kv_cache = compiled_zeros(n_blocks, shape, wte.dtype, sharding)()

    def next_ids(self, rows, n_past, n_steps, sampler):
        if on_processor(self.params["wte"]) or sampler.sees_logits:  # one step: each id is shown when known
            return [sampler.pick(self.logits(rows, n_past))]
        n_steps, (rows, n_past) = min(n_steps, STEPS_AHEAD), self.read_before(rows, n_past, 1)
        points = sampler.points(n_steps)
        if points is not None:  # 0 for steps that are not taken, and for rows that repeat the last
            points = np.pad(points, [(0, STEPS_AHEAD - n_steps), (0, self.n_more)])  # [STEPS_AHEAD, n_rows]
        ahead = compiled_ahead(self.gpt2, sampler.draw, self.turn)
        ids = self.run(ahead, rows, n_past, n_steps=n_steps, points=points, **sampler.options)
        return np.asarray(ids)[:, :n_steps].T.tolist()  # [n_rows, STEPS_AHEAD] -> [n_steps, n_rows]

    def logits(self, rows, n_past, n_last=1):
        rows, n_past = self.read_before(rows, n_past, n_last)
        if n_last == 1:
            return self.run(compiled(self.gpt2), rows, n_past, n_last=1)
        rows = padded(rows, round_up(n_last, self.n_slots))
        return self.run(compiled(self.gpt2), rows, n_past, n_last=None)[:, :n_last]

    def read_before(self, rows, n_past, n_last):
        """Reads all but the last n_last ids of each row into the cache; returns these, and n_past at them.

        Of several prompts a part at a time: all would take much memory.
        """
        n_before = [len(row) - n_last for row in rows]
        n_read = round_up(max(n_before), self.n_slots if self.n_rows == 1 else min(READ_OF_EACH, self.n_slots))
        for start in range(0, max(n_before), n_read):
            parts = [row[start : min(start + n_read, n)] for row, n in zip(rows, n_before, strict=True)]
            self.run(compiled(self.gpt2), padded(parts, n_read), [past + start for past in n_past], n_last=1)
        return [row[-n_last:] for row in rows], [past + n for past, n in zip(n_past, n_before, strict=True)]

    def run(self, function, rows, n_past, **options):
        """Calls a compiled function on rows of one length, with the cache, which it gives back."""
        # NumPy's, since jit takes them over faster than JAX's
        ids, n_past = (np.asarray(x + x[-1:] * self.n_more, np.int32) for x in (rows, n_past))
        if self.n_rows > 1:
            ids, n_past = spread(ids, self.params), spread(n_past, self.params)
        else:
            ids, n_past = ids[0], n_past[0]
        out, self.kv_cache = function(ids, self.params, self.n_head, self.kv_cache, n_past, **options)
        return out[: self.n_rows] if self.n_more else out


@functools.lru_cache
def compiled_zeros(n_blocks, shape, dtype, sharding):
    """Makes n_blocks Caches in one call: two dozen calls would take longer than a GPU takes for a token."""

    def zeros():
        return [Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(n_blocks)]

    return jax.jit(zeros, out_shardings=sharding)


@functools.lru_cache
def compiled(gpt2):
    """gpt2() under jit, which returns (logits, kv_cache)."""

    def run(ids, params, n_head, kv_cache, n_past, n_last):
        logits = gpt2(ids, **params, n_head=n_head, kv_cache=kv_cache, n_past=n_past, n_last=n_last)
        return logits.reshape(-1, *logits.shape[-2:]), kv_cache  # [n_rows, n_last, n_vocab]

    return jax.jit(run, static_argnames=("n_head", "n_last"), donate_argnames="kv_cache")


@functools.lru_cache
def compiled_ahead(gpt2, draw, turn):
    """gpt2() under jit, fed n_steps times with what sampling.draw makes of its logits: (ids, kv_cache).

    Compiled anew for every top_k and top_p. The shapes are those of a batch; those of one row leave out n_rows.
    turn: copy the weights of the blocks, each w as w.T, which XLA reads faster for a product with one row.
    """

    def run(ids, params, n_head, kv_cache, n_past, n_steps, points, temperature, top_k, top_p):
        blocks = turned(params["blocks"]) if turn else params["blocks"]
        if turn:  # without a barrier, XLA would see that w.T.T is w
            blocks = jax.lax.optimization_barrier(blocks)

        def step(i, state):
            ids, kv_cache, n_past, drawn = state
            weights = params | {"blocks": turned(blocks) if turn else blocks}
            logits = gpt2(ids, **weights, n_head=n_head, kv_cache=kv_cache, n_past=n_past, n_last=1)
            point = None if points is None else points[i].reshape(*logits.shape[:-1], 1)  # [n_rows] -> [n_rows, 1, 1]
            ids = draw(logits, point, temperature, top_k, top_p).astype(ids.dtype)  # [n_rows, 1]
            return ids, kv_cache, n_past + 1, drawn.at[i].set(ids.reshape(-1))

        drawn = jnp.zeros((STEPS_AHEAD, ids.size), ids.dtype)  # [STEPS_AHEAD, n_rows]
        _, kv_cache, _, drawn = jax.lax.fori_loop(0, n_steps, step, (ids, kv_cache, n_past, drawn))
        return drawn.T, kv_cache

    return jax.jit(run, static_argnames=("n_head", "top_k", "top_p"), donate_argnames="kv_cache")


def turned(blocks):
    """Blocks whose matrices are transposed: [in, out] <-> [out, in]."""
    return jax.tree.map(lambda x: x.T if x.ndim == 2 else x, blocks)


def padded(rows, n_seq):  # n_rows lists of at most n_seq -> [n_rows, n_seq]
    return [row + [0] * (n_seq - len(row)) for row in rows]
