"""The cores: counted as the machine allows, used as they are free, and prompts read by several threads at once."""

import gc
import os
import pathlib
import threading
import time

import numpy as np
import pytest
from conftest import (
    HPARAMS,
    REPO,
    TIMEOUT,
    assert_one_line_error,
    command,
    interrupt,
    leaves,
    needs_posix,
    prompts_of_lengths,
    running,
    wait_until,
    wild_params,
)

import gpt2
from backends import arrays, on_numpy, threads, with_cache
from backends.products import here, shared_by

N_HEAD = HPARAMS["n_head"]
LONG = HPARAMS | {"n_ctx": 400}

two_cores = pytest.mark.skipif(threads.n_cores() < 2 or not threads.blas(), reason="needs two cores and OpenBLAS")


@pytest.fixture(scope="module")
def long_params():
    return wild_params(LONG)


@pytest.fixture(autouse=True)
def _blas():
    """All threads, as outside of tests. No test leaves BLAS, or what is wanted, as others do not expect it."""
    before = threads.blas() and threads.blas()[0]()
    yield
    threads.use_threads(None)
    assert not threads.blas() or threads.blas()[0]() == before


def n_blas():
    return threads.blas()[0]()


# how many

TUNE = "from backends import threads; threads.tune_openblas()"


def tuned(root="/", machine="", **env):
    """What OpenBLAS is told, of another machine where it is given."""
    code = f"""
import os, sys, types
from backends import threads
if {machine!r}:
    os.uname = lambda: types.SimpleNamespace(machine={machine!r})
threads.tune_openblas({str(root)!r})
print(os.environ.get("OPENBLAS_CORETYPE"))
"""
    return command(code=code, cwd=REPO, env=env).stdout.strip()


@pytest.mark.parametrize("chosen", [None, "Haswell"])
def test_openblas_is_told_of_avx512_where_linux_says_the_processor_has_it_unless_told_otherwise(chosen, monkeypatch):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # an emulated arm64 may see that of an x86, and so does Wine
    is_there = os.name == "posix" and os.uname().machine == "x86_64" and cpuinfo.exists()
    flags = set(cpuinfo.read_text().split()) if is_there else set()
    expected = "SkylakeX" if flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl"} else None
    assert tuned(**({"OPENBLAS_CORETYPE": chosen} if chosen else {})) == f"{chosen or expected}"


@pytest.mark.parametrize(("machine", "expected"), [("x86_64", "SkylakeX"), ("aarch64", "None")])
def test_what_linux_says_of_an_x86_counts_on_an_x86_alone(machine, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "cpuinfo").write_text("flags : fpu avx512f avx512dq avx512bw avx512vl\n")  # as an emulator may
    assert tuned(tmp_path, machine) == expected


def test_the_openblas_that_numpys_wheels_bring_is_found():
    if np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"] != "scipy-openblas":
        pytest.skip("this NumPy has another BLAS")
    assert threads.blas()


def test_the_command_does_so_before_numpy_is_imported(run):
    code = """
import sys
class Finder:  # asked for each module that is imported
    def find_spec(name, *_):
        if name in ("numpy", "backends.threads"):
            print(name)
sys.meta_path.insert(0, Finder)
sys.argv = ["gpt2.py", "Hello", "--model_size=none", "--models_dir=."]
import gpt2, cli
from backends import threads
threads.tune_openblas = lambda: print("tuned")
cli.run(gpt2.main)
"""
    assert command(code=code, cwd=REPO).stdout.split() == ["backends.threads", "tuned", "numpy"]


@pytest.mark.parametrize(
    "code", ["import gpt2, utils", "import numpy; from backends import threads; threads.tune_openblas()"]
)
def test_imports_leave_the_environment_as_it_is_and_so_does_what_would_come_too_late(code, monkeypatch):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    code = f"import os; before = {{**os.environ}}; {code}; print(os.environ == before)"
    assert command(code=code, cwd=REPO).stdout == "True\n"


def group(root, path, limit):
    """A control group with a limit on its time, as Linux shows it."""
    folder = root / "sys" / "fs" / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{limit}\n")


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("max 100000", "max 100000", 8),
        ("max 100000", "300000 100000", 3),
        ("200000 100000", "300000 100000", 2),
        ("350000 100000", "max 100000", 3),
        ("50000 100000", "max 100000", 1),
        ("1600000 100000", "max 100000", 8),
    ],
)
def test_a_container_has_as_many_cores_as_all_its_groups_allow(outer, inner, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("1:name=systemd:/\n0::/outer/inner\n")
    group(tmp_path, "outer", outer)
    group(tmp_path, "outer/inner", inner)
    assert threads.n_cores(tmp_path) == expected


def test_a_process_that_may_run_on_one_core_has_one(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert threads.n_cores() == 1


def test_the_weights_that_every_token_meets_are_all_matrices_but_that_of_positions(long_params):
    matrices = {name: array for name, array in leaves(long_params) if array.ndim == 2}
    del matrices["params.wpe"]
    assert arrays.n_weights(long_params) == sum(array.size for array in matrices.values())


def test_a_model_that_fits_the_cache_takes_one_thread(long_params):
    assert threads.thread_counts(long_params) == [1]


@pytest.mark.parametrize(
    ("n_cores", "n_blas", "expected"), [(8, 8, [8, 4, 2, 1]), (6, 8, [6, 3, 1]), (8, 2, [2, 1]), (1, 8, [1])]
)
def test_a_larger_one_may_take_all_cores_that_blas_may_use_or_fewer(
    n_cores, n_blas, expected, long_params, monkeypatch
):
    monkeypatch.setattr(threads, "SMALL", 0)
    monkeypatch.setattr(threads, "blas", lambda: (None, None))
    monkeypatch.setattr(threads, "n_cores", lambda: n_cores)
    monkeypatch.setattr(threads.outside, "n_blas", lambda: n_blas)
    assert threads.thread_counts(long_params) == expected


def test_openblas_tells_which_kernels_it_has_taken():
    if os.name != "posix" or os.uname().machine != "x86_64" or not threads.blas():
        pytest.skip("there is no choice of kernels")
    code = "from backends import threads; print('kernels:', threads.kernels())"
    assert command(code=code, cwd=REPO, env={"OPENBLAS_CORETYPE": "Nehalem"}).stdout == "kernels: nehalem\n"
    flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    if flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl"}:
        assert command(code=code, cwd=REPO, env={"OPENBLAS_CORETYPE": "SkylakeX"}).stdout == "kernels: skylakex\n"


def test_kernels_are_named_in_small_letters(monkeypatch):
    monkeypatch.setattr(threads, "openblas", lambda *_: (lambda: b"COOPERLAKE",))
    assert threads.kernels.__wrapped__() == "cooperlake"


def test_a_blas_that_is_no_openblas_tells_of_no_kernels(monkeypatch):
    monkeypatch.setattr(threads, "openblas", lambda *_: ())
    assert threads.kernels.__wrapped__() == ""


@two_cores
def test_threads_that_the_user_denies_blas_are_not_used():
    code = "from backends import threads; print(threads.n_available())"
    assert command(code=code, cwd=REPO, env={"OPENBLAS_NUM_THREADS": "1"}).stdout == "1\n"
    assert command(code=code, cwd=REPO, env={"OPENBLAS_NUM_THREADS": "2"}).stdout == "2\n"


@two_cores
def test_a_number_that_the_program_sets_between_two_texts_stays_and_counts(long_params, monkeypatch):
    monkeypatch.setattr(threads, "SMALL", 0)
    before = n_blas()
    for n in (1, before):
        threads.set_blas_threads(n)
        gpt2.generate([1, 2, 3], long_params, N_HEAD, 3)
        assert n_blas() == threads.n_available() == n


@two_cores
def test_the_last_of_several_who_set_it_leaves_blas_as_the_first_found_it():
    before = n_blas()
    with threads.blas_threads(1):
        with threads.blas_threads(2):
            assert (n_blas(), threads.outside.n_blas()) == (2, before)
        assert threads.outside.n_blas() == before
    assert n_blas() == before


@two_cores
def test_the_number_that_is_wanted_is_taken_whatever_the_model(long_params):
    threads.use_threads(2)
    assert threads.thread_counts(long_params) == [2]


@pytest.mark.parametrize("n", [0, -1, 1.0, "2", True, 4096])
def test_a_number_of_threads_that_cannot_be_is_refused(n):
    with pytest.raises(ValueError, match="n_threads must be from 1 to"):
        threads.use_threads(n)


def test_a_blas_that_cannot_be_told_is_left_to_itself(long_params, monkeypatch):
    monkeypatch.setattr(threads, "SMALL", 0)
    monkeypatch.setattr(threads, "blas", lambda: None)
    assert threads.thread_counts(long_params) == [1]
    ids = prompts_of_lengths(300)[0]
    assert len(gpt2.generate(ids, long_params, N_HEAD, 3)) == 3
    with pytest.raises(ValueError, match="needs a NumPy with OpenBLAS"):
        threads.use_threads(1)


# as they are free


class Clock:
    """Blocks that take times[number of BLAS's threads], by a clock of their own, and the numbers that they had."""

    def __init__(self, monkeypatch, times):
        self.now, self.times, self.counts = 0.0, times, []
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)

    def n_now(self):
        return n_blas()

    def run(self, pace, n_blocks):
        with threads.blas_threads():
            for _ in pace.of(range(n_blocks)):
                self.counts.append(self.n_now())
                self.now += self.times[self.n_now()]


@two_cores
@pytest.mark.parametrize(
    ("times", "best"), [({1: 3, 2: 2}, 2), ({1: 3, 2: 40}, 1), ({1: 9, 2: 10}, 2), ({1: 7, 2: 10}, 1)]
)
def test_most_blocks_run_with_all_threads_or_with_fewer_where_those_are_clearly_faster(times, best, monkeypatch):
    clock = Clock(monkeypatch, times)
    clock.run(threads.Pace([2, 1]), 2000)
    assert clock.counts.count(best) > 0.95 * 2000
    assert {*clock.counts[1000:]} == {1, 2}  # the other is tried again


@two_cores
def test_when_a_neighbour_comes_or_goes_the_number_follows(monkeypatch):
    clock, pace = Clock(monkeypatch, {1: 3, 2: 2}), threads.Pace([2, 1])
    for slow, expected in ((40, 1), (2, 2)):
        clock.times[2] = slow
        clock.run(pace, 1000)
        clock.run(pace, 1000)
        assert clock.counts[-1] == clock.counts[-10] == expected


@two_cores
@pytest.mark.parametrize("n_before", [0, 1, 10, 100])
def test_a_single_mishap_changes_nothing(n_before, monkeypatch):
    clock, pace = Clock(monkeypatch, {1: 3, 2: 2}), threads.Pace([2, 1])
    for n_blocks, slow in ((n_before, 2), (1, 5000), (100, 2)):  # the machine slept
        clock.times[2] = slow
        clock.run(pace, n_blocks)
    assert clock.counts[n_before] == 2  # which it did
    assert clock.counts[n_before + 11 :].count(2) >= 88  # of 90: the other number is tried again


@two_cores
def test_a_bad_start_is_forgotten_soon(monkeypatch):
    clock, pace = Clock(monkeypatch, {1: 3, 2: 40}), threads.Pace([2, 1])
    clock.run(pace, 2)  # while another program starts, say
    clock.times[2] = 2
    clock.run(pace, 98)
    assert clock.counts[2:34] == [1] * 32
    assert clock.counts[34:].count(2) >= 64


@two_cores
def test_a_neighbour_that_stays_is_not_taken_for_a_mishap(monkeypatch):
    clock, pace = Clock(monkeypatch, {1: 3, 2: 2}), threads.Pace([2, 1])
    clock.run(pace, 100)
    clock.times[2] = 40
    clock.run(pace, 40)
    assert clock.counts[-10:].count(1) >= 8  # the other is tried again


class Sharing:
    """A stand-in for gpt2() that notes how many threads share its products: (ours, BLAS's in each)."""

    def __init__(self):
        self.seen = set()

    def __call__(self, ids, blocks, **_):
        for _ in blocks:
            self.seen.add((here.n, n_blas()))
        self.seen.add((here.n, n_blas()))  # and behind the blocks
        return np.zeros((*ids.shape[:-1], 1, 1))


@two_cores
@pytest.mark.parametrize(
    ("n_rows", "kernels", "expected"),
    [
        (1, "haswell", (1, 2)),
        (2, "haswell", (2, 1)),
        (32, "zen", (2, 1)),
        (33, "zen", (1, 2)),
        (24, "skylakex", (2, 1)),
        (25, "skylakex", (1, 2)),
        (2, "neoversen1", (1, 2)),
        (2, "", (1, 2)),
    ],
)
def test_threads_of_ours_share_the_products_of_a_few_texts(n_rows, kernels, expected, long_params, monkeypatch):
    monkeypatch.setattr(on_numpy, "kernels", lambda: kernels)
    model = with_threads(2, monkeypatch, long_params, n_rows, 40, sharing := Sharing())
    model.logits([[1]] * n_rows, [3] * n_rows)
    assert sharing.seen == {expected}
    assert model.helpers is None or model.helpers.small_kernels == (kernels == "skylakex")
    assert (here.n, here.helpers) == (1, None)


@two_cores
def test_they_are_fewer_where_those_are_clearly_faster(monkeypatch):
    clock, pace = Clock(monkeypatch, {1: 3}), threads.Pace([2, 1])
    clock.times = {(2, 1): 40, (1, 1): 3}
    monkeypatch.setattr(Clock, "n_now", lambda _: (here.n, n_blas()))
    with shared_by("helpers"):
        clock.run(pace, 100)
    assert clock.counts[4:].count((1, 1)) >= 94  # of 96: the others are tried again


def test_the_threads_of_a_model_end_with_it(long_params, monkeypatch):
    monkeypatch.setattr(on_numpy, "kernels", lambda: "haswell")
    before = {*threading.enumerate()}
    model = with_threads(3, monkeypatch, long_params, 2, 40)
    model.logits([[1]] * 2, [3] * 2)
    ours = {*threading.enumerate()} - before
    assert len(ours) == 2
    del model
    gc.collect()
    for thread in ours:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def test_a_thread_may_generate_a_few_texts_when_the_main_one_has_ended():
    code = """
import threading, gpt2, utils
from backends import on_numpy
on_numpy.thread_counts, on_numpy.kernels = lambda params: [2], lambda: "haswell"
_, hparams, params = utils.load_encoder_hparams_and_params("shakespeare", "models")
def late():
    threading.main_thread().join()
    print([*map(len, gpt2.generate([[1], [2, 3]], params, hparams["n_head"], 3))])
threading.Thread(target=late).start()
"""
    assert command(code=code, cwd=REPO).stdout == "[3, 3]\n"


@pytest.mark.parametrize("n_rows", [2, 4])
@pytest.mark.parametrize("kernels", ["haswell", "skylakex"])
def test_a_few_texts_have_the_logits_of_each_alone(n_rows, kernels, long_params, monkeypatch):
    monkeypatch.setattr(on_numpy, "kernels", lambda: kernels)
    prompts = prompts_of_lengths(5, 30, 1, 12)[:n_rows]
    logits = with_threads(3, monkeypatch, long_params, n_rows, 60).logits(prompts, [0] * n_rows)
    for row, prompt in zip(logits, prompts, strict=True):
        alone = gpt2.gpt2(prompt, **long_params, n_head=N_HEAD)
        np.testing.assert_allclose(row[-1], alone[-1], rtol=0, atol=1e-5 * np.abs(alone).max())


# parts of a prompt


def with_threads(n_threads, monkeypatch, params, n_rows, n_slots, model=gpt2.gpt2):
    monkeypatch.setattr(on_numpy, "thread_counts", lambda params: [n_threads])
    return with_cache(model, params, N_HEAD, n_rows, n_slots)


@pytest.mark.parametrize("n_ids", [128, 130, 257, 390])
@pytest.mark.parametrize("n_threads", [2, 3, 16])
def test_a_prompt_in_parts_has_the_logits_and_the_cache_of_one_read_at_once(n_ids, n_threads, long_params, monkeypatch):
    ids = prompts_of_lengths(n_ids)[0]
    model = with_threads(n_threads, monkeypatch, long_params, 1, n_ids + 1)
    logits = gpt2.gpt2([*ids, 7], **long_params, n_head=N_HEAD)
    scale = np.abs(logits).max()
    np.testing.assert_allclose(model.logits([ids], [0])[0], logits[-2:-1], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(model.logits([[7]], [n_ids])[0], logits[-1:], rtol=0, atol=1e-5 * scale)


def test_its_last_logits_are_all_there_when_more_are_asked_for(long_params, monkeypatch):
    ids = prompts_of_lengths(300)[0]
    logits = with_threads(2, monkeypatch, long_params, 1, 300).logits([ids], [0], n_last=200)
    assert logits.shape == (1, 200, LONG["n_vocab"])


@pytest.mark.parametrize("lengths", [(200, 200, 200), (3, 350, 90, 41), (2, 1)])
def test_prompts_of_a_batch_that_threads_share_are_as_if_each_were_alone(lengths, long_params, monkeypatch):
    prompts = prompts_of_lengths(*lengths)
    logits = with_threads(3, monkeypatch, long_params, len(prompts), 400).logits(prompts, [0] * len(prompts))
    for row, prompt in zip(logits, prompts, strict=True):
        alone = gpt2.gpt2(prompt, **long_params, n_head=N_HEAD)
        np.testing.assert_allclose(row[-1], alone[-1], rtol=0, atol=1e-5 * np.abs(alone).max())


def test_prompts_are_read_together_that_are_512_ids_at_most_the_longest_first(long_params, monkeypatch):
    model = with_threads(1, monkeypatch, long_params, 1, 1)
    batches = model.batches([(7,) * n for n in (300, 2, 100, 90, 310, 200)])
    assert [[*map(len, batch)] for batch in batches] == [[310], [300], [100, 200], [2, 90]]


class Reading:
    """A stand-in for gpt2() which notes when each part writes to each block of the cache, and when it goes on."""

    def __init__(self, n_blocks, bad=None):
        self.n_blocks, self.bad = n_blocks, bad
        self.written, self.early, self.now, self.most, self.n_blas = set(), [], set(), 0, set()

    def __call__(self, ids, kv_cache, n_past, n_last, **_):
        self.now.add(n_past)
        self.most = max(self.most, len(self.now))
        self.n_blas.add(n_blas() if threads.blas() else 1)
        time.sleep(0.01)  # in which all threads begin
        slots = np.arange(n_past, n_past + ids.shape[-1])
        new = np.zeros((1, *kv_cache[0].k.shape[1:2], ids.shape[-1], kv_cache[0].k.shape[-1]), np.float32)
        for block, cache in enumerate(kv_cache):
            if n_past == self.bad and block == 2:
                raise ZeroDivisionError(f"at {n_past}")
            self.written.add((n_past, block))
            if block == self.n_blocks - 1:
                self.now.discard(n_past)
            cache.update(new, new, slots)
            starts = {start for start, _ in self.written if start < n_past}
            self.early += [(n_past, block) for start in starts if (start, block) not in self.written]
        return np.zeros((1, n_last, 1))


@pytest.mark.parametrize(("n_threads", "n_parts"), [(2, 8), (5, 10)])
def test_in_every_block_a_part_goes_on_when_all_before_it_have_written_and_only_n_threads_read(
    n_threads, n_parts, monkeypatch
):
    params = wild_params(LONG | {"n_ctx": 2000, "n_layer": 4})
    reading = Reading(4)
    with_threads(n_threads, monkeypatch, params, 1, 2000, reading).logits([[1] * 2000], [0])
    assert {start for start, _ in reading.written} == {2000 * i // n_parts for i in range(n_parts)}
    assert reading.early == []
    assert reading.most <= n_threads


@pytest.mark.parametrize("bad", [0, 100, 300])
def test_an_error_in_a_part_reaches_the_caller_and_nobody_waits_for_it(bad, monkeypatch, long_params):
    model = with_threads(4, monkeypatch, long_params, 1, 400, Reading(3, bad))
    with pytest.raises(ZeroDivisionError, match=f"at {bad}"):
        model.logits([[1] * 400], [0])


@two_cores
def test_blas_has_one_thread_while_they_read_and_then_as_many_as_before(monkeypatch, long_params):
    before, reading = n_blas(), Reading(3)
    with_threads(2, monkeypatch, long_params, 1, 400, reading).logits([[1] * 400], [0])
    assert reading.n_blas == {1}
    assert n_blas() == before


LONG_PROMPT = """
import os, sys, utils, gpt2
from backends import on_numpy, with_cache
on_numpy.thread_counts = lambda params: [2]
_, hparams, params = utils.load_encoder_hparams_and_params("long", sys.argv[1])
def model(*args, **kwargs):
    os.write(1, b"reading\\n")  # in one piece: print() lets other threads in before the end of the line
    return gpt2.gpt2(*args, **kwargs)
with_cache(model, params, hparams["n_head"], 1, 150_000).logits([[1] * 150_000], [0])
print("read")
"""


def test_ctrl_c_in_a_notebook_ends_all_threads_as_soon_as_they_have_read_their_parts(long):
    with running(long.parent, code=LONG_PROMPT, cwd=REPO) as process:
        assert process.stdout.readline() == b"reading\n"
        interrupt(process)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert set(stdout.split()) <= {b"reading"}
    assert stderr.splitlines()[-1] == b"KeyboardInterrupt"


@two_cores
def test_ctrl_c_ends_the_command_while_threads_read_a_prompt(long):
    needs_posix("/proc")
    with running("-", "--n_threads=2", model=long, n=10, env={"OPENBLAS_NUM_THREADS": "1"}) as process:
        process.stdin.write(b"Hi " * 60_000)
        process.stdin.close()
        wait_until(lambda: len(os.listdir(f"/proc/{process.pid}/task")) > 2)  # OPENBLAS_NUM_THREADS=1: no others
        interrupt(process)
        assert process.stdout.read() + process.stderr.read() == b""
        assert process.wait(TIMEOUT) == 130


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n_threads=0"], "n_threads must be from 1 to"),
        (["--n_threads=1", "--backend=jax"], "needs the backend numpy"),
    ],
)
def test_a_number_of_threads_that_does_nothing_or_cannot_be_ends_with_one_line(flags, said, run):
    assert_one_line_error(run("Hello", *flags), said)


@two_cores
@pytest.mark.parametrize("n", [1, 2])
def test_n_threads_gives_the_same_text(n, run, continuation):
    assert run("Hello", f"--n_threads={n}").stdout == continuation("Hello") + "\n"
