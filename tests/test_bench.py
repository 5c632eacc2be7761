"""The benchmarks on models of a few thousand weights: what they write, and what they do about missing contestants."""

import json
import re
import shutil

import pytest
from conftest import GENUINE, REPO, assert_one_line_error, command

from backends import threads
from files import checkpoint
from utils import MODEL_SIZES

BENCH = "benchmarks/bench.py"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A run of the command: (its result, the folder it wrote to)."""
    tmp_path = tmp_path_factory.mktemp("bench")
    hparams = {"n_vocab": 50257, "n_ctx": 64, "n_embd": 8, "n_head": 2, "n_layer": 2}
    checkpoint.save_checkpoint(tmp_path / "models" / "tiny", hparams, checkpoint.random_params(hparams))
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(GENUINE / name, tmp_path / "models" / "tiny")
    missing = tmp_path / "missing"  # packages that cannot be imported, as if they were not installed
    missing.mkdir()
    for package in ("transformers", "ctranslate2", "llama_cpp"):
        (missing / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package!r}')")
    args, env = (
        ["--runs=2", "--busy=1", "--cores", f"--out={tmp_path / 'out'}"],
        {"PATH": "", "PYTHONPATH": str(missing)},
    )
    done = command(*args, script=BENCH, model=tmp_path / "models" / "tiny", env=env)
    assert done.returncode == 0, done.stderr
    return done, tmp_path / "out"


def test_prints_the_table_that_it_writes_as_markdown(bench):
    done, out = bench
    assert done.stdout == (out / "results.md").read_text()
    assert "| | gpt2.py | limit: bus | limit: BLAS |" in done.stdout


def test_the_json_has_one_sample_of_every_figure_for_every_run(bench):
    samples = json.loads((bench[1] / "results.json").read_text())["samples"]
    figures = {
        "command",
        "memory",
        "memory, full context",
        "first 10",
        "decode 10",
        "batch 2",
        "batch 4",
        "batch 8",
        "batch 32",
    }
    assert set(samples["gpt2.py"]) == figures
    assert all(len(values) == 2 and min(values) > 0 for values in samples["gpt2.py"].values())


def test_the_limits_are_speeds_at_the_contexts_measured(bench):
    samples = json.loads((bench[1] / "results.json").read_text())["samples"]
    for name in ("limit: bus", "limit: BLAS"):
        assert set(samples[name]) == {"decode 10", "GB/s"}
        assert min(samples[name]["decode 10"]) > 0


@pytest.mark.parametrize("name", ["picoGPT", "fastGPT", "transformers", "CTranslate2", "llama.cpp"])
def test_a_contestant_that_is_not_there_is_left_out_with_a_note(bench, name):
    result = json.loads((bench[1] / "results.json").read_text())
    assert name not in result["samples"]
    assert any(note.startswith(f"{name} is left out: ") for note in result["notes"])


def test_says_of_which_code_and_beside_what_the_figures_are(bench):
    code = json.loads((bench[1] / "results.json").read_text())["machine"]["code"]
    assert re.fullmatch(r"\S+, \d{4}-\d\d-\d\d, beside 1 busy processes", code)


def test_on_cores_every_contestant_is_measured_on_1_2_4_as_many_as_there_are(bench):
    cores = json.loads((bench[1] / "results.json").read_text())["cores"]
    assert [*cores] == [str(2**i) for i in range(threads.n_cores().bit_length())]
    for by_name in cores.values():
        assert {*by_name["gpt2.py"]} == {"first 40, cores", "decode 40, cores"}
        assert all(len(values) == 2 and min(values) > 0 for values in by_name["gpt2.py"].values())


@pytest.mark.parametrize("name", ["decode.png", "command.png", "cores.png"])
def test_draws_a_plot(bench, name):
    assert (bench[1] / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("--rnus=2", "unknown flag --rnus=2"),
        ("--runs=0", "runs must be"),
        ("--runs=many", "runs must be"),
        ("--busy=-1", "busy must be"),
        ("--picogpt=/nowhere", "no folder"),
        ("tiny", "more than one model_size"),
    ],
)
def test_a_mistake_ends_with_one_line_before_anything_is_measured(arg, said, tmp_path):
    done = command(arg, script=BENCH, model=tmp_path / "tiny")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"bench\.py: .*\n", done.stderr)
    assert said in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_model_that_is_neither_there_nor_a_known_size_ends_with_one_line(tmp_path):
    done = command(script=BENCH, model=tmp_path / "nosuch")
    assert done.returncode == 1
    assert re.fullmatch(r"bench\.py: .*nosuch.*\n", done.stderr)


def test_the_shapes_that_can_be_made_are_those_of_openais_models():
    shapes = {name: [hparams[key] for key in ("n_embd", "n_head", "n_layer")] for name, hparams in MODEL_SIZES.items()}
    code = "import sys; sys.path[:0] = ['.', 'benchmarks']; import bench, json; print(json.dumps(bench.SHAPES))"
    assert json.loads(command(code=code, cwd=REPO).stdout) == shapes


# gpu.py

TINY = """
import sys
sys.path[:0] = [".", "benchmarks"]
import bench, cli, gpu
bench.SHAPES["tiny"] = (8, 2, 2)
on_pytorch, bytes_per_second = gpu.on_pytorch, gpu.bytes_per_second
def full(*_):
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
gpu.on_pytorch = lambda dtype, *model: full if dtype == "bfloat16" else on_pytorch(dtype, *model)
gpu.bytes_per_second = lambda: bytes_per_second(2**20)  # 1 GiB takes a processor as long as all else here
cli.run(gpu.main)
"""


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """A run of the command, where transformers has no memory for bfloat16: (its result, the folder it wrote to)."""
    out = tmp_path_factory.mktemp("gpu")
    few = ["--rows=1,3", "--n_prompt=20", "--n_tokens_to_generate=4", "--n_long=40", "--runs=1", f"--out={out}"]
    env = {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(out)}
    done = command("--model_size=tiny", *few, code=TINY, cwd=REPO, env=env)
    assert done.returncode == 0, done.stderr
    return done, out


def test_gpu_prints_the_table_that_it_writes_and_draws_it(gpu):
    done, out = gpu
    assert done.stdout == (out / "gpu.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    table = {name: figures for name, *figures in cells[2:]}
    assert {name.partition(",")[0] for name in table} == {"gpt2.py", "transformers", "limit: memory"}
    assert table.pop("transformers, bfloat16") == ["-", "-", "-"]
    assert min(float(figure) for figures in table.values() for figure in figures if figure != "-") > 0
    assert (out / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_does_not_hold_a_gpu_against_a_processor(tmp_path):
    code = TINY.replace("cli.run", "import torch; torch.cuda.is_available = lambda: True; cli.run")
    result = command(f"--out={tmp_path}", code=code, cwd=REPO, env={"JAX_PLATFORMS": "cpu"})
    assert_one_line_error(result, "PyTorch sees a GPU, and JAX does not: install both for it, or hide it")


def test_gpu_has_all_who_compute_in_float32_give_the_same_ids(gpu):
    ids = re.findall(
        r"^\S+: (.*), (gpt2.py.*float32|.*NumPy|trans.*float32): .* the same ids as the first in (\S+) of rows",
        gpu[0].stderr,
        re.MULTILINE,
    )
    assert len(ids) == 2 * 3 * 3  # turns, tasks, contestants
    assert {same for *_, same in ids} == {"100%"}


def test_gpu_goes_on_without_those_whose_memory_runs_out(gpu):
    assert "transformers, bfloat16, 3 at once: not enough memory" in gpu[0].stdout
    seconds = json.loads((gpu[1] / "gpu.json").read_text())["seconds"]
    assert [*seconds] == ["first token of 40", "1 at once", "3 at once"]
    assert "transformers, float32" in seconds["3 at once"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--rows=x", "--rows must be a whole number, 1 or more, not 'x'"),
        ("--rows=1,0", "--rows must be a whole number, 1 or more, not 0"),
        ("--runs=0", "--runs must be"),
        ("--n_long=1024", "must fit the context of 1024"),
        ("--model_size=large", "--model_size must be 124M, 355M, 774M, 1558M, not 'large'"),
        (f"--out={REPO / BENCH}", "File exists"),
    ],
)
def test_a_mistake_of_gpu_ends_with_one_line_before_anything_is_measured(flag, said):
    assert_one_line_error(command(flag, script="benchmarks/gpu.py"), said)
