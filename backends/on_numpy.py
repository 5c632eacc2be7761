"""gpt2() on NumPy's arrays, and on CuPy's: the cache is written in place, and every shape is as good as another."""

import collections
import functools
import threading

from backends.arrays import namespace
from backends.cache import Cache, empty_cache
from backends.devices import check_memory
from backends.products import SMALL_KERNELS, Helpers, most_rows, shared_by
from backends.threads import Pace, blas_threads, each, kernels, thread_counts

PART = 64, 256  # ids of a prompt that a thread reads at a time: at least, so that products are fast, and at most
READ_AT_ONCE = 512  # ids of several prompts: more would be no faster, and take memory


class Model:
    """See backends."""

    def __init__(self, gpt2, params, n_head, n_rows, n_slots):
        check_memory(params, n_rows, n_slots)
        counts = thread_counts(params)
        self.gpt2, self.params, self.n_head, self.n_threads = gpt2, params, n_head, counts[0]
        self.paces = collections.defaultdict(functools.partial(Pace, counts))  # {shape of ids: Pace}
        shares_pay = n_rows > 1 and self.n_threads > 1 and n_rows <= most_rows(self.n_threads, kernels())
        may_start = threading.main_thread().is_alive()  # else Python 3.12 starts no thread any more
        self.helpers = Helpers(self.n_threads - 1, kernels() in SMALL_KERNELS) if shares_pay and may_start else None
        self.kv_cache = empty_cache(params, n_head, n_rows, n_slots)

    def next_ids(self, rows, n_past, n_steps, sampler):
        return [sampler.pick(self.logits(rows, n_past))]  # one step: each id is shown when it is known

    def logits(self, rows, n_past, n_last=1):
        if len(rows) > 1:
            rows, n_past = self.read_new(rows, n_past)
        if self.n_threads > 1 and n_last == 1 and len(rows[0]) >= 2 * PART[0]:
            return self.read_in_parts(rows[0], n_past[0])
        caches = [cache.up_to(max(n_past) + len(rows[0])) for cache in self.kv_cache]
        pace = self.paces[len(rows), len(rows[0])]
        with blas_threads(), shared_by(self.helpers):
            return self.run(rows, caches, n_past, n_last, blocks=pace.of(self.params["blocks"]))

    def run(self, rows, caches, n_past, n_last, **params):
        """gpt2() on rows of one length, with caches that end behind them; params: in place of the model's."""
        asarray = namespace(self.params["wte"]).asarray
        n_past = n_past[0] if len({*n_past}) == 1 else asarray(n_past)
        weights = self.params | params
        return self.gpt2(asarray(rows), **weights, n_head=self.n_head, kv_cache=caches, n_past=n_past, n_last=n_last)

    # a long prompt, by several threads: each runs the model on a part of it

    def read_in_parts(self, ids, n_past):
        n_parts = self.n_threads * -(-len(ids) // (self.n_threads * PART[1]))
        n_parts = max(1, min(n_parts, len(ids) // PART[0]))
        written = [[threading.Event() for _ in self.kv_cache] for _ in range(n_parts)]  # of a part, in a block
        parts, before = [], [None] * len(self.kv_cache)
        for i, events in enumerate(written):
            start, stop = (len(ids) * j // n_parts for j in (i, i + 1))
            whole = [cache.up_to(n_past + stop) for cache in self.kv_cache]
            caches = [PartOfCache(*group) for group in zip(whole, before, events, strict=True)]
            parts.append((ids[start:stop], caches, n_past + start, int(i == n_parts - 1)))
            before = events
        return each(self.read_part, parts, self.n_threads)[-1]

    def read_part(self, part):
        ids, caches, n_past, n_last = part
        try:
            return self.run([ids], caches, [n_past], n_last)
        finally:
            for cache in caches:  # if it failed: so that none waits for it
                cache.written.set()

    # the prompts of a batch: each is read once, but for its last id; with that, all rows bring one

    def read_new(self, rows, n_past):
        places = collections.defaultdict(list)  # {prompt: its rows}
        for i, row in enumerate(rows):
            if len(row) > 1:
                places[tuple(row[:-1])].append(i)
        if places:
            read_batch = functools.partial(self.read_batch, places)
            each(read_batch, self.batches(places), self.n_threads)
        return [row[-1:] for row in rows], [past + len(row) - 1 for past, row in zip(n_past, rows, strict=True)]

    def batches(self, prompts):
        """Lists of prompts of like length, the longest first."""
        waiting, batches = sorted(prompts, key=len), []
        n_at_once = min(READ_AT_ONCE, max(PART[0], sum(map(len, waiting)) // self.n_threads))
        while waiting:
            batches.append(waiting[-max(1, n_at_once // len(waiting[-1])) :])
            del waiting[-len(batches[-1]) :]
        return batches

    def read_batch(self, places, prompts):
        n_ids = len(prompts[-1])  # shorter ones are padded on their right, which by the one rule none sees
        rows = [[*prompt, *[0] * (n_ids - len(prompt))] for prompt in prompts]  # [n_prompts, n_ids]
        filled = empty_cache(self.params, self.n_head, len(rows), n_ids)
        self.run(rows, filled, [0], n_last=0)
        for cache, new in zip(self.kv_cache, filled, strict=True):
            for i, prompt in enumerate(prompts):
                for row in places[prompt]:
                    cache.k[row, :, : len(prompt)] = new.k[i, :, : len(prompt)]
                    cache.v[row, :, : len(prompt)] = new.v[i, :, : len(prompt)]


class PartOfCache(Cache):
    """A block's cache for a thread that reads a part of a prompt: update() waits for the part before.

    before, written: events, set when that part (None: there is none), or this, has put its keys and values there.
    """

    def __init__(self, cache, before, written):
        super().__init__(cache.k, cache.v)
        self.before, self.written = before, written

    def update(self, k, v, slots):
        k, v = super().update(k, v, slots)
        if self.before:
            self.before.wait()
        self.written.set()
        return k, v
