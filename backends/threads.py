"""The cores: how many this process has, and how many threads share the products of a block: NumPy's BLAS's, or ours.

Threads wait for each other in every product. While another process has one of the cores all of them wait, which costs
far more than that core. So how many there are follows from how long the blocks of the model take.
"""

import contextlib
import functools
import glob
import math
import os
import sys
import threading
import time

from backends.arrays import is_numpy, n_weights
from backends.products import here

SMALL = 2**24  # bytes of weights: those of smaller models stay in one core's cache
LATELY = 32  # blocks whose times count most
SOON, TRIAL = 32, 512  # blocks with a number of threads after which the others are tried again: once, and every so many
CLEARLY = 0.8  # fewer threads must take less than this part of the time with all: small leads come by chance

wanted = None  # a number of threads; None: what is best


def tune_openblas(root="/"):
    """Sets what OpenBLAS reads from the environment while NumPy is imported: to be called before, unless it has been.

    On processors that it does not know it takes its AVX2 kernels, half the speed for prompts: where Linux says that the
    processor has AVX-512, it shall use that, as it does on those it knows. What the user has set stays.
    """
    if "numpy" in sys.modules or not hasattr(os, "uname") or os.uname().machine != "x86_64":
        return
    with contextlib.suppress(OSError):
        flags = {*read_text(root, "proc", "cpuinfo", n_most=8192).split()}  # the first core's lines
        if flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl"}:
            os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def n_cores(root="/"):
    """How many cores this process may use: those that it may run on, or the share of time of its container, if less."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError):  # Linux's control groups: a limit counts for the groups within, too
        groups = read_text(root, "proc", "self", "cgroup").rpartition("0::")[2].strip().split("/")
        for i in range(len(groups)):
            with contextlib.suppress(OSError, ValueError):  # no limit: no file, or "max"
                quota, period = map(int, read_text(root, "sys", "fs", "cgroup", *groups[: i + 1], "cpu.max").split())
                n = min(n, max(quota // period, 1))
    return n


def read_text(*path, n_most=-1):
    with open(os.path.join(*path), encoding="utf-8", errors="replace") as f:
        return f.read(n_most)


@functools.cache
def blas():
    """(get, set) of the number of threads of NumPy's BLAS; None unless it is an OpenBLAS with threads of its own."""
    functions = openblas("get_parallel", "get_num_threads", "set_num_threads")
    return functions[1:] if functions and functions[0]() == 1 else None


@functools.cache
def kernels():
    """The name of the kernels that NumPy's OpenBLAS has taken for this processor, in small letters; "" of others."""
    import ctypes

    if not (functions := openblas("get_corename")):
        return ""
    functions[0].restype = ctypes.c_char_p
    return functions[0]().decode().lower()


def openblas(*names):
    """Functions of the OpenBLAS that NumPy has; () if it has another BLAS, or they are not in it."""
    import ctypes

    import numpy as np

    # NumPy's, which finds what it is linked with, too; but not on Windows, where that lies beside
    libraries = glob.glob(os.path.join(glob.escape(os.path.dirname(np.__file__)) + ".libs", "*openblas*.dll"))
    library = ctypes.CDLL(libraries[0] if libraries else np._core._multiarray_umath.__file__)
    for form in ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}"):
        with contextlib.suppress(AttributeError):
            return tuple(getattr(library, form.format(name)) for name in names)
    return ()


def n_available():
    """How many threads may compute at once: as many as there are cores, unless the program has BLAS use fewer."""
    return min(n_cores(), outside.n_blas()) if blas() else 1


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


def thread_counts(params):
    """The numbers of threads to choose from for passes through a model, the largest first: 6, 3, 1."""
    wte = params["wte"]
    if not is_numpy(wte) or not blas():
        return [1]
    n = wanted or (1 if n_weights(params) * wte.itemsize < SMALL else n_available())
    return [n] if wanted else [n >> i for i in range(n.bit_length())]


def set_blas_threads(n):
    if blas():  # which lets itself be told
        blas()[1](n)


class Outside:
    """The number of BLAS's threads that the program has outside of blas_threads(), in one thread or several."""

    def __init__(self):
        self.lock, self.n_inside, self.n_before = threading.Lock(), 0, 1

    def n_blas(self):
        return self.n_before if self.n_inside else blas()[0]()

    def enter(self):
        with self.lock:
            self.n_before = self.n_blas()
            self.n_inside += 1

    def leave(self):
        with self.lock:
            self.n_inside -= 1
            if not self.n_inside:
                set_blas_threads(self.n_before)


outside = Outside()


@contextlib.contextmanager
def blas_threads(n=None):
    """Has BLAS use n threads for a while, where it lets itself be told, or as many as outside; then those again."""
    if not blas():
        yield
        return
    outside.enter()
    try:
        set_blas_threads(n or outside.n_before)
        yield
    finally:
        outside.leave()


def use(n):
    """Has n threads multiply: BLAS's, or within shared_by() ours, with one of BLAS's in each."""
    here.n, n_blas = (n, 1) if here.helpers else (1, n)
    set_blas_threads(n_blas)


class Pace:
    """Gives each block of the model all threads, or fewer where those were clearly faster.

    counts: the numbers to choose from, all first. Each count keeps the mean time of the blocks that it was given: one
    that is untried gets two blocks, and what is known of the others is forgotten in a while, so that each is tried
    again: the neighbours may have gone. A single mishap says little: of the first two blocks the faster counts, later
    ones as four times the mean at most.
    """

    def __init__(self, counts):
        self.counts, self.taken = counts, {}  # {count: (blocks, mean seconds of a block)}

    def of(self, blocks):
        """Yields the blocks, as tqdm would, and times what is done with each. Within blas_threads()."""
        for block in blocks:
            n = self.fastest()
            use(n)
            start = time.perf_counter()
            yield block
            self.note(n, time.perf_counter() - start)
        use(self.fastest())  # for what follows the blocks

    def fastest(self):
        return min(self.counts, key=self.seconds)

    def seconds(self, n):
        n_blocks, mean = self.taken.get(n, (0, 0))
        if n_blocks < 2:
            return 0  # untried: it comes first
        return mean if n == self.counts[0] else mean / CLEARLY

    def note(self, n, seconds):
        n_blocks, mean = self.taken.get(n, (0, math.inf))
        n_blocks, seconds = n_blocks + 1, min(seconds, 4 * mean)
        mean = min(mean, seconds) if n_blocks <= 2 else mean + (seconds - mean) / min(n_blocks, LATELY)
        self.taken[n] = n_blocks, mean
        if n_blocks == SOON or n_blocks % TRIAL == 0:
            self.taken = {n: self.taken[n]}


def each(function, items, n_threads, n_blas=1):
    """[function(item), ...], by n_threads threads, which take one item after another; n_blas: of BLAS's in each."""
    if len(items) < 2:
        return [*map(function, items)]

    from concurrent.futures import ThreadPoolExecutor  # only here: its import takes milliseconds

    with blas_threads(n_blas), ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(function, items))
