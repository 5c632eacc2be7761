"""x @ w for a few rows, by threads of ours: those of a batch of a few texts.

Before it multiplies more than one row, OpenBLAS copies w, part by part, into an order that suits many. For a few rows
that takes longer than all else. So each thread of ours has a share of w, and reads it as it lies, in tiles that stay in
its core's cache:

- up to VECTORS rows, for one row at a time: the product of one row and a matrix copies nothing.
- Where OpenBLAS has kernels for small matrices, which copy nothing either, up to FEW rows, for all at once. On x86
  those are for AVX-512, for m * k * n <= 100**3, and if w is transposed, as wte.T is, m * n <= 1200 and k >= 32 (its
  interface/gemm.c, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c).

With more, `x @ w` by BLAS's threads is as fast. What comes out is the same for any number of ours. BLAS's rest
meanwhile: between two products they stay awake for a while, and would be in the way.
"""

import contextlib
import queue
import threading
import weakref

VECTORS, FEW = 4, 24  # rows
TILE = 96, 384  # rows and columns of w at most: 144 KiB, of which a core's second cache has room for two
TILE_T = 24  # columns of a transposed w, which lie one after another: 72 to 150 KiB in GPT-2's
LEAST = 16  # rows or columns of a tile: to call BLAS for fewer takes longer than the product


class Helpers:
    """n threads that multiply shares, as long as somebody has this object, and no longer than the program runs."""

    def __init__(self, n):
        self.shares = queue.SimpleQueue()  # of (its number, where its product goes, arguments of by_tiles)
        for _ in range(n):
            threading.Thread(target=multiply, args=[self.shares], daemon=True).start()
        weakref.finalize(self, stop, self.shares, n)


def multiply(shares):
    """Multiplies one share after another, until None comes."""
    for number, products, share in iter(shares.get, None):
        try:
            products.put((number, by_tiles(*share)))
        except Exception as error:
            products.put((number, error))


def stop(shares, n):
    for _ in range(n):
        shares.put(None)


class Shares(threading.local):
    """How this thread multiplies a few rows, unless helpers is None: in n shares, its own and those of helpers."""

    n, helpers, small_kernels = 1, None, False


here = Shares()


@contextlib.contextmanager
def shared_by(helpers, small_kernels):
    """Has this thread multiply a few rows in shares for a while, here.n of them; helpers=None: as elsewhere."""
    here.helpers, here.small_kernels = helpers, small_kernels
    try:
        yield
    finally:
        here.n, here.helpers, here.small_kernels = 1, None, False


def most_rows(small_kernels):
    """Up to how many rows shares are faster than BLAS's threads."""
    return FEW if small_kernels else VECTORS


def product(x, w):  # [m, k], [k, n] -> [m, n]
    """x @ w, of any library; of NumPy and a few rows, within shared_by(), in shares."""
    if not here.helpers or not 1 < len(x) <= most_rows(here.small_kernels):
        return x @ w
    import numpy as np  # only here: gpt2.py imports this file before OpenBLAS is told which kernels to use

    (k, n), is_transposed = w.shape, w.strides[0] == w.itemsize
    height, width = (k, TILE_T) if is_transposed else (divisor(k, TILE[0]), divisor(n, TILE[1]))
    if min(height, width) < LEAST or n < width:
        return x @ w
    if is_transposed:  # shares of its columns
        shares = [(x, w[:, part]) for part in parts(n, width)]
    else:  # shares of its rows, whose products add up
        shares = [(x[:, part], w[part]) for part in parts(k, height)]
    ys = in_shares([(*share, height, width, here.small_kernels) for share in shares])
    return np.concatenate(ys, axis=2)[0] if is_transposed else np.concatenate(ys).sum(axis=0)


def in_shares(shares):
    """[by_tiles(*share), ...], the first by this thread, the others by its helpers."""
    products = queue.SimpleQueue()
    for number, share in enumerate(shares[1:], 1):
        here.helpers.shares.put((number, products, share))
    ys = {0: by_tiles(*shares[0])}
    for number, y in (products.get() for _ in shares[1:]):
        if isinstance(y, Exception):
            raise y
        ys[number] = y
    return [ys[number] for number in range(len(shares))]


def parts(n, tile):
    """Slices of n for at most here.n shares, of whole tiles; the last has what is left, too."""
    step = tile * -(-(n // tile) // here.n)
    starts = range(0, n - n % tile, step)
    return [slice(start, n if start == starts[-1] else start + step) for start in starts]


def by_tiles(x, w, height, width, small_kernels):  # [m, k], [k, n] -> [k/height, m, n]
    """The products of parts of x and w, k cut by height, which add up to x @ w."""
    import numpy as np

    (m, k), n = x.shape, w.shape[1]
    n_tiled = n - n % width
    tiles = w[:, :n_tiled].reshape(k // height, height, -1, width).swapaxes(1, 2)  # [.., n/width, height, width]
    rows = x.reshape(m, -1, height).swapaxes(0, 1)[:, None]  # [k/height, 1, m, height]
    if not small_kernels:  # one row after another
        rows, tiles = rows[..., None, :], tiles[:, :, None]  # [.., m, 1, height], [.., 1, height, width]
    y = (rows @ tiles).reshape(-1, n_tiled // width, m, width)  # [k/height, n/width, m, width]
    y = y.swapaxes(1, 2).reshape(-1, m, n_tiled)
    return y if n_tiled == n else np.concatenate([y, (x @ w[:, n_tiled:])[None]], axis=2)


def divisor(n, most):
    """The largest number, up to most, that divides n."""
    return next(i for i in range(most, 0, -1) if n % i == 0)
