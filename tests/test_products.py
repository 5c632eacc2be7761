"""backends/products.py: products of a few rows, by several threads, are those of x @ w."""

import contextlib
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from backends import products
from backends.products import here, most_rows, product, shared_by
from backends.threads import blas_threads


def matrix(k, n, is_transposed):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, k), np.float32).T if is_transposed else rng.standard_normal((k, n), np.float32)


def rows(m, k):
    return np.random.default_rng(1).standard_normal((m, k), np.float32)


def assert_product(y, x, w):
    np.testing.assert_allclose(y, x.astype(np.float64) @ w, rtol=0, atol=1e-6 * len(w))


@contextlib.contextmanager
def shared(n, small_kernels=False):
    """Has products shared in n, with one of BLAS's threads in each, as the model has them."""
    with blas_threads(1), shared_by(products.Helpers(n - 1, small_kernels)):
        here.n = n
        yield


@pytest.mark.parametrize("small_kernels", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("k", "n"), [(192, 768), (480, 384), (128, 1003), (80, 240), (1, 500), (97, 89), (33, 1)])
def test_shares_of_any_matrix_make_its_product(k, n, is_transposed, small_kernels):
    w = matrix(k, n, is_transposed)
    for m in (1, 2, 4, 5, 24, 32):
        x, ys = rows(m, k), []
        for n_shares in (1, 2, 3, 16):
            with shared(n_shares, small_kernels):
                ys.append(product(x, w))
            assert_product(ys[-1], x, w)
        if is_transposed or small_kernels or m <= 4:  # the same for any number of threads
            assert all(np.array_equal(y, ys[0]) for y in ys)


def test_whole_rows_are_for_two_threads_and_tiles_for_any_number():
    assert [most_rows(n, "haswell") for n in (2, 3, 16)] == [32, 4, 4]
    assert [most_rows(n, kernels) for kernels in products.SMALL_KERNELS for n in (2, 16)] == 6 * [24]


def test_nothing_is_shared_with_kernels_with_which_that_was_never_tried():
    assert [most_rows(2, name) for name in ("armv8", "neoversen1", "")] == [0, 0, 0]


def test_where_dtypes_differ_the_product_has_that_of_numpy():
    w = matrix(768, 768, False)
    for m in (2, 5):
        with shared(2):
            y = product(rows(m, 768), w.astype(np.float64))
        assert y.dtype == np.float64
        assert_product(y, rows(m, 768), w)


class Noted(np.ndarray):
    """Rows that note (thread, rows, tiles) of each share of a product that is made of them, and that may fail."""

    seen, fails = [], staticmethod(lambda: False)

    def __array_ufunc__(self, ufunc, method, rows, tiles, out=None):
        if self.fails():
            raise MemoryError("no room")
        if out:
            self.seen.append((threading.current_thread(), np.asarray(rows), tiles))
        return ufunc(np.asarray(rows), tiles, *(out or ()))


@pytest.fixture
def seen():
    Noted.seen.clear()
    return Noted.seen


def noted(m, k):
    return rows(m, k).view(Noted)


@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_this_thread_takes_a_share_and_its_helpers_the_others(is_transposed, m, seen):
    with shared(3):
        product(noted(m, 768), matrix(768, 1536, is_transposed))
    assert [thread for thread, *_ in seen].count(threading.main_thread()) == 1
    assert len(seen) == 3


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("small_kernels", [False, True])
@pytest.mark.parametrize("m", [2, 4, 5, 24])
def test_few_rows_are_multiplied_one_at_a_time_but_for_kernels_for_small_matrices(
    m, small_kernels, is_transposed, seen
):
    with shared(2, small_kernels):
        product(noted(m, 768), matrix(768, 768, is_transposed))
    n_at_once = {some_rows.shape[-2] for _, some_rows, _ in seen}
    assert n_at_once == ({1} if m <= 4 and not small_kernels else {m})


def test_one_row_is_left_to_blas(seen):
    with shared(2):
        product(noted(1, 768), matrix(768, 768, False))
    assert seen == []


def test_neither_another_thread_shares_nor_this_one_afterwards(seen):
    x, w = noted(2, 768), matrix(768, 768, False)
    with ThreadPoolExecutor(1) as pool, shared(2):
        pool.submit(product, x, w).result()
    product(x, w)
    assert seen == []


def test_an_error_in_a_share_is_the_callers(monkeypatch):
    x, w = noted(2, 768), matrix(768, 768, False)
    monkeypatch.setattr(Noted, "fails", lambda _: threading.current_thread() is not threading.main_thread())
    with shared(2):
        with pytest.raises(MemoryError, match="no room"):
            product(x, w)
        monkeypatch.undo()
        assert_product(product(x, w), np.asarray(x), w)  # its helper is there as before


@pytest.mark.parametrize("small_kernels", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("m", [4, 8])
def test_tiles_are_read_where_they_lie(m, is_transposed, small_kernels):
    x, w = rows(m, 768), matrix(768, 3072, is_transposed)
    with shared(1, small_kernels):
        product(x, w)
        tracemalloc.start()
        product(x, w)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < w.nbytes / 8


@pytest.mark.parametrize("n_embd", [768, 1024, 1280, 1600])
def test_tiles_of_every_gpt2_are_small_enough_for_the_kernels_for_small_matrices(n_embd, seen):
    with shared(1, small_kernels=True):
        for k, n in ((1, 3), (1, 1), (1, 4), (4, 1)):
            product(noted(products.FEW_SMALL, k * n_embd), np.zeros((k * n_embd, n * n_embd), np.float32))
        product(noted(products.FEW_SMALL, n_embd), np.zeros((500, n_embd), np.float32).T)
    assert len(seen) == 5
    for _, some_rows, tiles in seen:
        m, (height, width) = some_rows.shape[-2], tiles.shape[-2:]
        assert m * height * width <= 100**3
        if tiles.strides[-2] == tiles.itemsize:
            assert m * width <= 1200
            assert height >= 32
