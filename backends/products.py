"""x @ w for a few rows, by threads of ours: those of a batch, of several samples, of a prompt of a few ids.

Before it multiplies more than one row, OpenBLAS copies w, part by part, into an order that suits many. For a few rows
that takes longer than all else, and its threads are hardly faster than one. So each of ours has a share of w, and reads
it in tiles that stay in its core's cache:

- with up to VECTORS rows for one row at a time, since the product of a row and a matrix copies nothing;
- with more for all rows at once. Of wte.T that copies less at a time. And it copies nothing where OpenBLAS has kernels
  for small matrices: with AVX-512, for m * k * n <= 100**3, and m * n <= 1200 if w is transposed (its
  interface/gemm.c, kernel/x86_64/sgemm_small_kernel_permit_skylakex.c).
"""

import contextlib
import threading

FEW = 32  # rows: with more, the copy is a small part of the time
VECTORS = 4  # rows
TILE = 96, 384  # rows and columns of w at most: 144 KiB
TILE_T = 32  # columns of a transposed w, which lie one after another
LEAST = 16  # rows or columns of w that make a tile


class Sharing(threading.local):
    """How this thread multiplies: in n shares, of which the threads of pool take all but one."""

    n, pool, small_kernels = 1, None, False


here = Sharing()


@contextlib.contextmanager
def sharing(pool, small_kernels):
    """Meanwhile, here.n says how many shares a product of a few rows has; it begins with 1."""
    here.n, here.pool, here.small_kernels = 1, pool, small_kernels
    try:
        yield
    finally:
        here.n, here.pool = 1, None


def product(x, w):  # [m, k], [k, n] -> [m, n]
    """x @ w."""
    if here.n == 1 or not 1 < len(x) <= FEW:
        return x @ w
    if w.flags.c_contiguous:  # shares of its rows, whose products add up
        shares = [(x[:, part], w[part]) for part in parts(len(w), here.n)]
    else:  # shares of its columns
        shares = [(x, w[:, part]) for part in parts(w.shape[1], here.n)]
    rest = [here.pool.submit(by_tiles, *share, here.small_kernels) for share in shares[1:]]
    ys = [by_tiles(*shares[0], here.small_kernels)] + [share.result() for share in rest]
    if w.flags.c_contiguous:
        return sum(ys[1:], start=ys[0])
    import numpy as np

    return np.concatenate(ys, axis=1)


def parts(n, n_parts):
    """Slices of n, each of which begins at a multiple of 32."""
    step = -(-n // (32 * n_parts)) * 32
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def by_tiles(x, w, small_kernels):  # [m, k], [k, n] -> [m, n]
    """x @ w, tile by tile where that is faster."""
    import numpy as np

    (m, k), n = x.shape, w.shape[1]
    is_transposed = w.strides[0] == w.itemsize
    one_by_one = m <= VECTORS and not small_kernels
    height, width = (k, TILE_T) if is_transposed else (divisor(k, TILE[0]), divisor(n, TILE[1]))
    n_tiled = n - n % width
    if min(height, width, n_tiled) < LEAST or not (is_transposed or one_by_one or small_kernels):
        return x @ w
    if is_transposed:
        tiles = w[:, :n_tiled].T.reshape(1, -1, width, k).mT  # [1, n/width, k, width]
    else:
        tiles = w.reshape(k // height, height, -1, width).swapaxes(1, 2)  # [k/height, n/width, height, width]
    rows = x.reshape(m, -1, height).swapaxes(0, 1)[:, None]  # [k/height, 1, m, height]
    if one_by_one:
        rows, tiles = rows[..., None, :], tiles[:, :, None]  # [.., m, 1, height], [.., 1, height, width]
    y = (rows @ tiles).reshape(-1, n_tiled // width, m, width)  # [k/height, n/width, m, width]
    y = y.sum(axis=0).swapaxes(0, 1).reshape(m, n_tiled)
    return y if n_tiled == n else np.concatenate([y, x @ w[:, n_tiled:]], axis=1)


def divisor(n, most):
    """The largest number, up to most, that divides n."""
    return next(i for i in range(most, 0, -1) if n % i == 0)
