"""The cores: how many this process has, how many of them NumPy's BLAS uses, and prompts that several read at once.

OpenBLAS's threads wait for each other in every product. While another process has one of the cores all of them wait,
which costs far more than that core. So how many there are follows from how long the blocks of the model take, and a
long prompt is read by threads of our own, which wait for each other once in a block.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
import threading
import time

PART = 64, 256  # ids of a prompt that a thread reads at a time: at least, so that products are fast, and at most
SMALL = 2**24  # bytes of weights: those of smaller models stay in one core's cache
LATELY = 32  # blocks whose times count most
TRIAL = 512  # blocks after which other numbers of threads are tried again
CLEARLY = 0.8  # fewer threads must take less than this part of the time with all: small leads come by chance

wanted = None  # a number of threads; None: what is best


def tune_openblas():
    """Sets what OpenBLAS reads from the environment while NumPy is imported, unless the user has.

    On processors that it does not know it takes its AVX2 kernels, half the speed for prompts: it shall use AVX-512
    where Linux says that the processor has it.
    """
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= set(f.read(8192).split()):  # the first core's lines
            os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


if "numpy" not in sys.modules:
    tune_openblas()


def n_cores(root="/"):
    """How many cores this process may use: those that it may run on, or the share of time of its container, if less."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def read(*path):
        with open(os.path.join(root, *path), encoding="utf-8") as f:
            return f.read()

    with contextlib.suppress(OSError):  # Linux's control groups: a limit counts for the groups within, too
        groups = read("proc", "self", "cgroup").rpartition("0::")[2].strip().split("/")
        for i in range(len(groups)):
            with contextlib.suppress(OSError, ValueError):  # no limit: no file, or "max"
                quota, period = map(int, read("sys", "fs", "cgroup", *groups[: i + 1], "cpu.max").split())
                n = min(n, max(quota // period, 1))
    return n


@functools.cache
def blas():
    """(get, set) of the number of threads of NumPy's BLAS; None unless it is an OpenBLAS with threads of its own."""
    import ctypes

    import numpy as np

    library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # finds what it is linked with, too
    for name in ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}"):
        with contextlib.suppress(AttributeError):
            if getattr(library, name.format("get_parallel"))() == 1:
                return tuple(getattr(library, name.format(do + "_num_threads")) for do in ("get", "set"))
    return None


@functools.cache
def at_first():
    """The number of BLAS's threads before this file changes it, for a while and in one thread or several."""
    return blas()[0]()


def use_threads(n):
    """From now on, have n threads compute, with NumPy; None: what is best. Raises ValueError for what cannot be."""
    global wanted
    check_threads(n)
    wanted = n


def check_threads(n):
    if n is None:
        return
    if type(n) is not int or not 1 <= n <= n_cores():
        raise ValueError(f"n_threads must be from 1 to {n_cores()}, the cores that this process may use, not {n!r}")
    if not blas():
        raise ValueError("n_threads needs a NumPy with OpenBLAS: other BLAS libraries do as they are built")


def n_weights(params):
    """The number of weights in the matrices that every token meets: all but wpe."""
    return params["wte"].size + 12 * len(params["blocks"]) * params["wte"].shape[-1] ** 2


def thread_counts(params):
    """The numbers of threads to choose from for passes through a model, the largest first: 6, 3, 1."""
    wte = params["wte"]
    if type(wte).__module__ != "numpy" or not blas():
        return [1]
    n = wanted or (1 if n_weights(params) * wte.itemsize < SMALL else min(n_cores(), at_first()))
    return [n] if wanted else [n >> i for i in range(n.bit_length())]


@contextlib.contextmanager
def blas_threads(n):
    """Has BLAS use n threads for a while, where it lets itself be told; yields a function that sets another number."""
    set_to = blas()[1] if blas() else lambda n: None
    before = at_first() if blas() else 1
    set_to(n)
    try:
        yield set_to
    finally:
        set_to(before)


class Watched(dict):
    """A block's cache, which calls written() when a pass has put its keys and values there."""

    def __init__(self, cache, written):
        super().__init__(cache)
        self.written = written

    def __setitem__(self, name, array):
        super().__setitem__(name, array)
        if name == "v":
            self.written()


def paced(read, counts, seen):
    """read(written), a pass with Watched caches, with all of BLAS's threads, or fewer where those were clearly faster.

    counts: the numbers to choose from, all first. seen: {count: (blocks, mean seconds of a block)}, kept from pass to
    pass. A count that is untried gets two blocks, and what is known of the others is forgotten in a while, so that
    each is tried again: the neighbours may have gone. A single mishap says little: of the first two blocks the faster
    counts, later ones as four times the mean at most.
    """

    def seconds(n):
        n_blocks, mean = seen.get(n, (0, 0))
        if n_blocks < 2:
            return 0  # untried: it comes first
        return mean if n == counts[0] else mean / CLEARLY

    n, start = min(counts, key=seconds), None

    def written():
        nonlocal n, start
        now = time.perf_counter()
        if start is not None:
            n_blocks, mean = seen.get(n, (0, math.inf))
            n_blocks, taken = n_blocks + 1, min(now - start, 4 * mean)
            seen[n] = n_blocks, min(mean, taken) if n_blocks <= 2 else mean + (taken - mean) / min(n_blocks, LATELY)
            if n_blocks % TRIAL == 0:
                for other in {*seen} - {n}:
                    del seen[other]
        n, start = min(counts, key=seconds), now
        set_to(n)

    with blas_threads(n) as set_to:
        return read(written)


def each(function, items, n_threads):
    """[function(item), ...], by n_threads threads, which take one item after another."""
    if len(items) == 1:
        return [function(items[0])]

    from concurrent.futures import ThreadPoolExecutor  # only here: its import takes milliseconds

    with blas_threads(1), ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(function, items))


class Read(Exception):  # noqa: N818
    """All has been read of a part of a prompt that other parts need."""


def in_parts(read, n_ids, n_blocks, n_threads):
    """read(start, stop, written), passes with Watched caches, of the parts of n_ids ids; returns that of the last.

    In every block a part needs the keys and values of all before it, and waits for them.
    """
    n_parts = max(1, min(n_threads * -(-n_ids // (n_threads * PART[1])), n_ids // PART[0]))
    bounds = [n_ids * i // n_parts for i in range(n_parts + 1)]
    ready = [threading.Semaphore(0) for _ in bounds]  # for blocks that hold all keys and values before bounds[i]
    ready[0].release(n_blocks)

    def read_part(i):
        n_written = itertools.count(1)

        def written():
            ready[i].acquire()
            ready[i + 1].release()
            if i + 1 < n_parts and next(n_written) == n_blocks:
                raise Read

        with contextlib.suppress(Read):
            try:
                return read(bounds[i], bounds[i + 1], written)
            finally:
                ready[i + 1].release(n_blocks)  # if it failed: so that none waits for it

    return each(read_part, range(n_parts), n_threads)[-1]
