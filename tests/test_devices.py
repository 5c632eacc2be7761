"""Backends and devices. XLA makes as many devices of this processor as it is told to."""

import importlib.util
import logging
import math
import os
import pathlib
import types

import jax
import numpy as np
import pytest
from conftest import HPARAMS, REPO, N, assert_one_line_error, command, leaves

import gpt2
from backends import arrays, devices

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("caches")), "JAX_PLATFORMS": "cpu"}


# as where nobody has told JAX what to keep, and where
BY_DEFAULT = {"JAX_COMPILATION_CACHE_DIR": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}


def test_numpys_params_stay_as_they_are(params):
    assert devices.place(params) is params


def test_jax_prints_numpys_text_and_says_first_on_what_it_runs(run, continuation, caches):
    result = run("Hello", "--backend=jax", env=caches)
    assert result.stdout == continuation("Hello") + "\n"
    assert result.stderr.startswith(f"gpt2.py: JAX {jax.__version__} on the CPU: it sees no GPU or TPU, float32\n")


def test_every_way_to_run_works_on_jax(run, continuation, caches):
    lines = run("--prompts_file=-", "--backend=jax", input="one\nanother\n", env=caches).stdout.splitlines()
    assert [continuation(prompt) in line for prompt, line in zip(("one", "another"), lines, strict=True)] == [True] * 2
    draws = ["--temperature=1", "--seed=5"]
    result = run("Hello", "--stream", "--backend=jax", *draws, env=caches)
    assert result.stdout == continuation("Hello", temperature=1, seed=5) + "\n"


def test_what_was_compiled_is_kept_for_the_next_start(run, tmp_path, caches):
    env = caches | BY_DEFAULT | {"XDG_CACHE_HOME": str(tmp_path)}
    kept = []
    for _ in range(2):
        assert run("Hello", "--backend=jax", env=env).returncode == 0
        kept.append({path.name for path in pathlib.Path(tmp_path / "gpt2-jax").iterdir() if "atime" not in path.name})
    assert kept[0] == kept[1] != set()


def test_a_cache_folder_that_cannot_be_made_is_done_without(run, continuation, caches, tmp_path):
    (tmp_path / "file").touch()
    result = run("Hello", "--backend=jax", env=caches | BY_DEFAULT | {"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert result.stdout == continuation("Hello") + "\n"
    assert len(result.stderr.splitlines()) == 1


def test_float32_is_not_rounded_in_products_as_gpus_would(params):
    wte = devices.place(params, "jax")["wte"]
    assert "precision = [HIGHEST, HIGHEST]" in jax.jit(lambda x: x @ x.T).lower(wte).as_text()


def on_devices(*stats):
    """What stands for JAX's array on devices with these memory_stats()."""
    gpus = [types.SimpleNamespace(platform="gpu", memory_stats=lambda each=each: each) for each in stats]
    return types.SimpleNamespace(at=None, devices=lambda: gpus)


GIB = {"bytes_limit": 2**30}


@pytest.mark.parametrize(
    ("stats", "expected"),
    [([GIB], 1), ([GIB, GIB], math.inf), ([None], math.inf), ([{}], math.inf), ([{"bytes_limit": -1}], math.inf)],
    ids=str,
)
def test_the_memory_of_a_device_is_what_it_says_and_else_without_bounds(stats, expected):
    assert devices.memory(on_devices(*stats)) == expected


@pytest.mark.parametrize(("limit", "expected"), [(f"{2**29}\n", 0.5), ("max\n", None), (f"{2**60}\n", None)])
def test_the_memory_of_a_container_is_its_limit_if_that_is_less_than_the_machines(limit, expected, tmp_path):
    (tmp_path / "memory.max").write_text(limit)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert devices.memory_of_machine(tmp_path / "memory.max") == (expected or machine)
    assert devices.memory_of_machine(tmp_path / "nothing") == machine


def test_the_memory_of_cupys_device_is_what_it_says():
    assert devices.memory(types.SimpleNamespace(device=types.SimpleNamespace(mem_info=(0, 2**30)))) == 1


@pytest.mark.parametrize(
    ("stats", "expected"),
    [([GIB, GIB | {"bytes_in_use": 2**29}], 0.5), ([GIB], 1), ([None], 0), ([{}], 0), ([{"bytes_limit": -1}, GIB], 0)],
    ids=str,
)
def test_free_memory_is_that_of_the_fullest_device_and_none_where_it_is_not_known(stats, expected):
    assert max(devices.free_memory(on_devices(*stats)), 0) == expected


def test_a_gpu_takes_more_queries_at_once_than_a_processor(params):
    assert arrays.query_block(params["wte"]) == arrays.query_block(jax.numpy.zeros(1)) == arrays.QUERY_BLOCK
    assert jax.jit(arrays.query_block)(jax.numpy.zeros(1)) == arrays.QUERY_BLOCK
    assert arrays.query_block(on_devices(GIB)) == 8 * arrays.QUERY_BLOCK


def test_jaxs_reason_for_no_gpu_is_one_line(caplog):
    devices.check("jax")
    try:
        raise RuntimeError("no\ndevice")
    except RuntimeError:
        logging.getLogger("jax._src.xla_bridge").exception("Exception when calling %s", "plugin")
    assert caplog.records[-1].getMessage() == "Exception when calling plugin: no device"
    assert not caplog.records[-1].exc_info


def test_bfloat16_is_near(params):
    ids = np.random.default_rng(0).integers(0, HPARAMS["n_vocab"], 20)
    half = devices.place(params, "jax", "bfloat16")
    assert {str(leaf.dtype) for _, leaf in leaves(half)} == {"bfloat16"}
    expected = gpt2.gpt2(ids, **params, n_head=HPARAMS["n_head"])
    logits = np.asarray(gpt2.gpt2(ids, **half, n_head=HPARAMS["n_head"]), np.float32)
    assert np.linalg.norm(logits - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend=torch"], "backend must be numpy, jax or cupy, not 'torch'"),
        (["--dtype=bfloat16"], "dtype must be float32 with NumPy, not 'bfloat16'"),
        (["--backend=jax", "--dtype=float16"], "dtype must be float32 or bfloat16 with JAX, not 'float16'"),
        (["--tensor_parallel=2"], "tensor_parallel needs the backend jax"),
        (["--backend=jax", "--tensor_parallel=0"], "tensor_parallel must be a whole number, 1 or more, not 0"),
        (["--backend=jax", "--tensor_parallel=3"], "tensor_parallel 3 does not divide the devices that JAX sees: 8"),
    ],
)
def test_what_cannot_be_had_is_an_error(flags, message, run, caches):
    assert_one_line_error(run("Hello", *flags, env=caches | EIGHT), message)


def test_threads_are_asked_of_numpy_alone_of_a_program_too(params):
    with pytest.raises(devices.DeviceError, match="n_threads needs the backend numpy"):
        devices.place(params, "jax", n_threads=1)


@pytest.mark.parametrize("platform", ["nonsense", "tpu"])
def test_a_platform_that_jax_does_not_find_is_an_error(platform, run, caches):
    assert_one_line_error(
        run("Hello", "--backend=jax", env=caches | {"JAX_PLATFORMS": platform}), "no device to run on"
    )


@pytest.mark.skipif(importlib.util.find_spec("cupy"), reason="CuPy is installed")
def test_a_backend_that_is_not_installed_is_an_error_before_anything_is_loaded(models_dir):
    result = command("Hello", "--backend=cupy", "--model_size=nowhere", "--models_dir", models_dir)
    assert_one_line_error(result, "CuPy is not installed: pip install cupy")


CODE = """
import json, sys
import jax, numpy as np
import gpt2
from backends import devices, with_cache
sys.path.insert(0, "tests")
from conftest import HPARAMS, prompts_of_lengths, taken_for_gpus, wild_params

HPARAMS = HPARAMS | {"n_layer": 2}
params, prompts = wild_params(HPARAMS), prompts_of_lengths(5, 1, 17, 3, 9, 2, 30, 8, 4, 11)
# fewer rows than devices, as many, and more; of those that share weights, fewer and more
for tensor_parallel, numbers in {1: (1, 3, 8, 10), 2: (3, 10), 4: (1, 10)}.items():
    placed = devices.place(params, "jax", tensor_parallel=tensor_parallel)
    for n in numbers:
        expected = gpt2.generate(prompts[:n], params, HPARAMS["n_head"], 12)
        assert gpt2.generate(prompts[:n], placed, HPARAMS["n_head"], 12) == expected, (tensor_parallel, n)
    with taken_for_gpus():  # which take several steps in a call
        for n, options in ((1, {}), (10, {"temperature": 1, "top_k": 20, "seed": 3})):
            expected = gpt2.generate(prompts[:n], params, HPARAMS["n_head"], 12, **options)
            assert gpt2.generate(prompts[:n], placed, HPARAMS["n_head"], 12, **options) == expected, tensor_parallel
    block = placed["blocks"][1]
    layers = {**block["attn"], **block["mlp"], "c_proj": block["mlp"]["c_proj"]}
    for name, axis in {"c_attn": 1, "c_fc": 1, "c_proj": 0}.items():
        whole = layers[name]["w"]
        parts = {str(shard.index): shard.data.shape[axis] for shard in whole.addressable_shards}
        assert len(whole.addressable_shards) == 8
        assert [*parts.values()] == [whole.shape[axis] // tensor_parallel] * tensor_parallel
    lie = devices.cache_sharding(placed, HPARAMS["n_head"], 8)
    model = with_cache(gpt2.gpt2, placed, HPARAMS["n_head"], 8, 5)
    assert all(array.sharding == lie for cache in model.kv_cache for array in (cache.k, cache.v))
x = devices.spread(np.zeros((16, 3)), devices.place(params, "jax"))
assert [shard.data.shape for shard in x.addressable_shards] == [(2, 3)] * 8
print("all as it should be")
"""


def test_eight_devices_share_rows_and_weights_and_give_numpys_ids(caches):
    result = command(code=CODE, cwd=REPO, env=caches | EIGHT | {"PYTHONPATH": "."})
    assert result.stdout == "all as it should be\n", result.stderr


def test_the_command_spreads_over_all_devices(run, continuation, caches):
    result = run("Hello", "--backend=jax", "--tensor_parallel=2", n=N, env=caches | EIGHT)
    assert result.stderr.startswith(f"gpt2.py: JAX {jax.__version__} on 8 x cpu, float32\n")
    assert result.stdout == continuation("Hello") + "\n"
