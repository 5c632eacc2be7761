"""x @ w for a few rows, by threads of ours: those of a batch of texts.

Before it multiplies more than one row, OpenBLAS copies w, part by part, into an order that suits many. For a few rows
that takes longer than all else. So each thread of ours has a share of w, and

- up to VECTORS rows it multiplies one at a time, since the product of one row and a matrix copies nothing: tile by tile
  of w, each of which stays in its core's cache for all rows.
- With more, it copies its share as it lies in memory, whole rows of w, where BLAS's own threads divide the columns, and
  copy in pieces from all over w. Of wte.T, whose columns lie one after another, it copies a tile at a time.
- Where OpenBLAS has kernels for small matrices, which copy nothing, tiles are so small that they are taken. On x86
  those are for AVX-512, for m * k * n <= 100**3, and if w is transposed, as wte.T is, m * n <= 1200 and k >= 32 (its
  interface/gemm.c, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c).

With other kernels, such as Arm's, nothing of this was tried: there NumPy multiplies as ever.

What comes out is the same for any number of threads, but where they copy whole rows: there it is as with BLAS's own.
BLAS's rest meanwhile: between two products they stay awake for a while, and would be in the way.
"""

import contextlib
import functools
import queue
import threading
import weakref

AVX2_KERNELS = {"haswell", "zen"}  # as OpenBLAS names them
SMALL_KERNELS = {"skylakex", "cooperlake", "sapphirerapids"}  # for AVX-512, beside which it has some for small matrices
VECTORS, FEW_SMALL, FEW = 4, 24, 32  # rows: up to which they go one at a time, in tiles for small kernels, in shares
FEW_THREADS = 2  # of whole rows: with more it has not been measured
TILE, TILE_SMALL = (48, 384), (96, 384)  # rows and columns of w at most: of 72 and of 144 KiB
TILE_T, TILE_T_COPIED = 24, 192  # columns of a transposed w: 72 and 576 KiB of 124M's
LEAST = 16  # rows or columns of a tile: to call BLAS for fewer takes longer than the product


class Helpers:
    """n threads that multiply shares, as long as somebody has this object, and no longer than the program runs.

    small_kernels: whether these shall be cut for kernels for small matrices.
    """

    def __init__(self, n, small_kernels):
        self.small_kernels = small_kernels
        self.shares = queue.SimpleQueue()  # of (a function that multiplies one, the queue of who waits for it)
        for _ in range(n):
            threading.Thread(target=multiply, args=[self.shares], daemon=True).start()
        weakref.finalize(self, stop, self.shares, n)


def multiply(shares):
    """Multiplies one share after another, until None comes."""
    for share, done in iter(shares.get, None):
        try:
            share()
            done.put(None)
        except Exception as error:
            done.put(error)


def stop(shares, n):
    for _ in range(n):
        shares.put(None)


class Here(threading.local):
    """How this thread multiplies several rows, unless helpers is None: in n shares, its own and those of helpers."""

    n, helpers = 1, None


here = Here()


@contextlib.contextmanager
def shared_by(helpers):
    """Has this thread multiply several rows in shares for a while, here.n of them; helpers=None: as elsewhere."""
    here.helpers = helpers
    try:
        yield
    finally:
        here.n, here.helpers = 1, None


def most_rows(n_threads, kernels):
    """Up to how many rows shares are faster than BLAS's threads; 0 with kernels with which that was never tried."""
    if kernels in SMALL_KERNELS:
        return FEW_SMALL
    if kernels not in AVX2_KERNELS:
        return 0
    return FEW if n_threads <= FEW_THREADS else VECTORS


def product(x, w):  # [m, k], [k, n] -> [m, n]
    """x @ w, of any library; of NumPy and several rows, within shared_by(), in shares. m: up to most_rows()."""
    if not here.helpers or len(x) < 2:
        return x @ w
    import numpy as np  # only here: gpt2.py imports this file before OpenBLAS is told which kernels to use

    (m, k), n, is_transposed = x.shape, w.shape[1], w.strides[0] == w.itemsize
    height, width, one_by_one = tile(m, k, n, is_transposed)
    if n < width or min(height, width) < LEAST:
        return x @ w

    n_tiled = n - n % width
    n_high, n_wide, dtype = k // height, n_tiled // width, np.result_type(x, w)
    if is_transposed:
        tiles = w[:, :n_tiled].T.reshape(n_wide, width, k).swapaxes(1, 2)  # [n_wide, k, width]
        y = np.empty((n_wide + 1, m, width), dtype)
        multiply_in_shares(x[None], tiles, y[:-1], one_by_one)
        y[-1, :, : n - n_tiled] = x @ w[:, n_tiled:]
        return y.swapaxes(0, 1).reshape(m, -1)[:, :n]

    tiles = w.reshape(n_high, height, n_wide, width).swapaxes(1, 2)  # [n_high, n_wide, height, width]
    rows = x.reshape(m, n_high, height).swapaxes(0, 1)[:, None]  # [n_high, 1, m, height]
    y = np.empty((n_high, n_wide, m, width), dtype)
    multiply_in_shares(rows, tiles, y, one_by_one)
    return y.sum(axis=0).swapaxes(0, 1).reshape(m, n)


def tile(m, k, n, is_transposed):
    """(rows, columns) of a tile of w, and whether the m rows of x go one by one."""
    small = here.helpers.small_kernels
    one_by_one = m <= VECTORS and not small
    if is_transposed:
        return k, TILE_T if one_by_one or small else TILE_T_COPIED, one_by_one
    if not one_by_one and not small:
        return divisor(k, max(k // here.n, 1)), n, one_by_one
    height, width = TILE_SMALL if small else TILE
    return divisor(k, height), divisor(n, width), one_by_one


def multiply_in_shares(rows, tiles, out, one_by_one):  # [1 or s, .., m, h], [s, .., h, w], [s, .., m, w]
    """out = rows @ tiles, in here.n shares of s: this thread's and its helpers'. one_by_one: one row after another."""
    import numpy as np

    if one_by_one:
        rows, tiles, out = rows[..., None, :], tiles[..., None, :, :], out[..., None, :]
    size, done = -(-len(tiles) // here.n), queue.SimpleQueue()
    parts = [slice(start, start + size) for start in range(0, len(tiles), size)]
    shares = [(rows[part] if len(rows) > 1 else rows, tiles[part], out[part]) for part in parts]
    first, *others = [functools.partial(np.matmul, *share) for share in shares]
    for share in others:
        here.helpers.shares.put((share, done))
    first()
    errors = [done.get() for _ in others]
    for error in filter(None, errors):
        raise error


@functools.lru_cache  # not cache, which Python 3.8 has not: it shall come as far as to be told that it is too old
def divisor(n, most):
    """The largest number, up to most, that divides n."""
    return next(i for i in range(most, 0, -1) if n % i == 0)
