"""backends/products.py: products of a few rows, by several threads, are those of x @ w."""

import contextlib
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from backends import products
from backends.products import by_tiles, here, product, shared_by


def matrix(k, n, is_transposed):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, k), np.float32).T if is_transposed else rng.standard_normal((k, n), np.float32)


def rows(m, k):
    return np.random.default_rng(1).standard_normal((m, k), np.float32)


def assert_product(y, x, w):
    np.testing.assert_allclose(y, x.astype(np.float64) @ w, rtol=0, atol=1e-6 * len(w))


@contextlib.contextmanager
def shared(n, small_kernels=False):
    """Has products shared in n."""
    with shared_by(products.Helpers(n - 1), small_kernels):
        here.n = n
        yield


@pytest.mark.parametrize("small_kernels", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("k", "n"), [(768, 2304), (3072, 768), (128, 5027), (80, 240), (1, 500), (97, 89), (33, 1)])
def test_shares_of_any_matrix_make_its_product_the_same_for_any_number_of_threads(k, n, is_transposed, small_kernels):
    w = matrix(k, n, is_transposed)
    for m in (1, 2, 4, 5, 24, 25):
        x, ys = rows(m, k), []
        for n_shares in (1, 2, 3, 16):
            with shared(n_shares, small_kernels):
                ys.append(product(x, w))
        assert_product(ys[0], x, w)
        assert all(np.array_equal(y, ys[0]) for y in ys)


@pytest.fixture
def sharers(monkeypatch):
    """The threads that multiply shares, as they begin."""
    names = []

    def noted(*args):
        names.append(threading.current_thread())
        return by_tiles(*args)

    monkeypatch.setattr(products, "by_tiles", noted)
    return names


def test_this_thread_takes_a_share_and_its_helpers_the_others(sharers):
    with shared(3):
        product(rows(2, 768), matrix(768, 768, False))
    assert sharers.count(threading.main_thread()) == 1
    assert len(sharers) == 3


@pytest.mark.parametrize(("m", "small_kernels"), [(1, False), (5, False), (1, True), (25, True)])
def test_one_row_and_many_rows_are_left_to_blas(m, small_kernels, sharers):
    with shared(2, small_kernels):
        product(rows(m, 768), matrix(768, 768, False))
    assert sharers == []


def test_neither_another_thread_shares_nor_this_one_afterwards(sharers):
    x, w = rows(2, 768), matrix(768, 768, False)
    with ThreadPoolExecutor(1) as pool, shared(2):
        pool.submit(product, x, w).result()
    product(x, w)
    assert sharers == []


def test_an_error_in_a_share_is_the_callers(monkeypatch):
    def fails(*args):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")
        return by_tiles(*args)

    monkeypatch.setattr(products, "by_tiles", fails)
    x, w = rows(2, 768), matrix(768, 768, False)
    with shared(2):
        with pytest.raises(MemoryError, match="no room"):
            product(x, w)
        monkeypatch.undo()
        assert_product(product(x, w), x, w)  # its helper is there as before


@pytest.mark.parametrize("small_kernels", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_tiles_are_read_where_they_lie(is_transposed, small_kernels):
    x, w = rows(4, 768), matrix(768, 3072, is_transposed)
    with shared(1, small_kernels):
        product(x, w)
        tracemalloc.start()
        product(x, w)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < w.nbytes / 8


@pytest.mark.parametrize("n_embd", [768, 1024, 1280, 1600])
def test_tiles_of_every_gpt2_are_small_enough_for_the_kernels_for_small_matrices(n_embd, monkeypatch):
    def checked(x, w, height, width, small_kernels):
        m = len(x)
        assert m * height * width <= 100**3
        if w.strides[0] == w.itemsize:
            assert m * width <= 1200
            assert height >= 32
        return by_tiles(x, w, height, width, small_kernels)

    monkeypatch.setattr(products, "by_tiles", checked)
    with shared(1, small_kernels=True):
        for k, n in ((1, 3), (1, 1), (1, 4), (4, 1)):
            product(rows(products.FEW, k * n_embd), np.ones((k * n_embd, n * n_embd), np.float32))
        product(rows(products.FEW, n_embd), np.ones((500, n_embd), np.float32).T)
