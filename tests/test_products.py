"""backends/products.py: products of a few rows, by several threads, are those of x @ w."""

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from backends import products
from backends.products import by_tiles, here, product, sharing


def matrix(k, n, is_transposed):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, k), np.float32).T if is_transposed else rng.standard_normal((k, n), np.float32)


def rows(m, k):
    return np.random.default_rng(1).standard_normal((m, k), np.float32)


def assert_product(y, x, w):
    np.testing.assert_allclose(y, x.astype(np.float64) @ w, rtol=0, atol=1e-6 * len(w))


@pytest.mark.parametrize("small_kernels", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("k", "n"), [(768, 2304), (3072, 768), (128, 50_257), (80, 240), (1, 500), (97, 89), (33, 1)])
@pytest.mark.parametrize("n_shares", [2, 3, 16])
def test_shares_of_any_matrix_make_its_product_with_2_to_33_rows(k, n, is_transposed, n_shares, small_kernels):
    w = matrix(k, n, is_transposed)
    with ThreadPoolExecutor(n_shares) as pool, sharing(pool, small_kernels):
        here.n = n_shares
        for m in (1, 2, 4, 5, 32, 33):
            x = rows(m, k)
            assert_product(product(x, w), x, w)


@pytest.fixture
def sharers(monkeypatch):
    """The threads that multiply shares, as they begin."""
    names = []

    def noted(*args):
        names.append(threading.current_thread().name.partition("_")[0])
        return by_tiles(*args)

    monkeypatch.setattr(products, "by_tiles", noted)
    return names


def test_this_thread_takes_a_share_and_those_of_the_pool_the_others(sharers):
    with ThreadPoolExecutor(2, "ours") as pool, sharing(pool, False):
        here.n = 3
        product(rows(2, 768), matrix(768, 768, False))
    assert sorted(sharers) == ["MainThread", "ours", "ours"]


@pytest.mark.parametrize(("m", "n_shares"), [(1, 2), (33, 2), (2, 1)])
def test_one_row_and_many_rows_and_one_share_are_left_to_blas(m, n_shares, sharers):
    with ThreadPoolExecutor(2) as pool, sharing(pool, False):
        here.n = n_shares
        product(rows(m, 768), matrix(768, 768, False))
    assert sharers == []


def test_neither_another_thread_shares_nor_this_one_afterwards(sharers):
    x, w = rows(2, 768), matrix(768, 768, False)
    with ThreadPoolExecutor(2) as pool, sharing(pool, False):
        here.n = 2
        pool.submit(product, x, w).result()
    product(x, w)
    assert sharers == []


def test_an_error_in_a_share_is_the_callers(monkeypatch):
    def fails(x, w, small_kernels):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")
        return by_tiles(x, w, small_kernels)

    monkeypatch.setattr(products, "by_tiles", fails)
    x, w = rows(2, 768), matrix(768, 768, False)
    with ThreadPoolExecutor(1) as pool, sharing(pool, False):
        here.n = 2
        with pytest.raises(MemoryError, match="no room"):
            product(x, w)
    assert (here.n, here.pool) == (1, None)


@pytest.mark.parametrize(
    ("m", "is_transposed", "small_kernels"), [(4, False, False), (8, False, True), (8, True, False)]
)
def test_tiles_are_read_where_they_lie(m, is_transposed, small_kernels):
    x, w = rows(m, 768), matrix(768, 3072, is_transposed)
    by_tiles(x, w, small_kernels)
    tracemalloc.start()
    by_tiles(x, w, small_kernels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < w.nbytes / 8


def test_tiles_of_gpt2_are_small_enough_for_kernels_of_small_matrices():
    """With 20 rows: m * k * n <= 100**3, and m * n <= 1200 for wte.T, as OpenBLAS has it."""
    (height, width), m = products.TILE, 20
    assert m * height * width <= 100**3
    assert m * 1536 * products.TILE_T <= 100**3
    assert m * products.TILE_T <= 1200
