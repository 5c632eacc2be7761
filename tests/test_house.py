"""The house: which file may import which, read from the files themselves."""

import ast
import graphlib
import importlib
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import REPO, TIMEOUT, assert_one_line_error, command, interrupt, needs_posix, running
from packaging.requirements import Requirement

import cli

MAY_IMPORT = {
    "backends.products": set(),
    "backends.arrays": {"backends.products"},
    "backends.checks": set(),
    "backends.lookup": set(),
    "backends.cache": {"backends.arrays"},
    "backends.threads": {"backends.arrays", "backends.products"},
    "backends.devices": {"backends.arrays", "backends.threads"},
    "backends.on_numpy": {
        "backends.arrays",
        "backends.cache",
        "backends.devices",
        "backends.products",
        "backends.threads",
    },
    "backends.on_jax": {"backends.arrays", "backends.cache", "backends.devices"},
    "backends": {"backends.arrays", "backends.lookup", "backends.on_jax", "backends.on_numpy"},
    "languages": set(),
    "files": set(),
    "files.bar": {"languages"},
    "files.lock": {"languages"},
    "files.web": set(),
    "files.download": {"files.bar", "files.lock", "files.web", "languages"},
    "files.crc32c": set(),
    "files.bundle": {"files.crc32c"},
    "files.sums": {"files.lock"},
    "files.together": {"files.lock"},
    "files.checkpoint": {"files.bundle", "files.sums", "files.together", "languages"},
    "files.safetensors": set(),
    "files.transformers": {
        "files.checkpoint",
        "files.download",
        "files.lock",
        "files.safetensors",
        "files.sums",
        "files.together",
    },
    "encoder": {"files"},
    "sampling": {"backends.arrays"},
    "cli": {"backends.checks", "files.bar", "files.lock", "languages"},
    "utils": {
        "encoder",
        "files",
        "files.checkpoint",
        "files.download",
        "files.sums",
        "files.together",
        "files.transformers",
        "languages",
    },
    "gpt2": {"backends", "backends.arrays", "backends.checks", "files", "files.bar", "sampling"},
    "backward": {"backends.arrays", "gpt2"},
    "explorer": set(),
    "explorer.source": set(),
    "explorer.trace": {"explorer.source", "gpt2"},
    "explorer.attribution": {"explorer.trace"},
    "explorer.session": {
        "explorer.attribution",
        "explorer.source",
        "explorer.trace",
        "backends.arrays",
        "backends.cache",
        "encoder",
        "gpt2",
        "sampling",
    },
    "explorer.server": {"explorer.session"},
    "explorer.single_file": {"explorer.server", "explorer.session"},
    "explore": {"explorer.server", "explorer.session", "explorer.single_file", "gpt2", "languages", "utils"},
}
MAIN_MAY_IMPORT = {
    "encoder": {"cli"},
    "utils": {"cli"},
    "gpt2": {"backends.devices", "backends.threads", "utils", "cli"},
    "explore": {"cli"},
}
ROOMS = "", "backends", "files", "languages", "explorer"
TOML = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # which pytest brings
PYPROJECT = TOML.loads((REPO / "pyproject.toml").read_text("utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def path_of(module):
    path = REPO / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def parsed(module):
    return ast.parse(path_of(module).read_text("utf-8"))


def imported(tree):
    """The names of all that is imported anywhere in it, in functions too; `from a import b`: a.b if that is a file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner if inner <= MAY_IMPORT.keys() else {node.module, *inner}
    return names


def is_command(node):
    """Whether a node at the top of a file is its main(), or the `if __name__ == "__main__"` that runs it."""
    return isinstance(node, ast.If) or getattr(node, "name", "") == "main"


def test_the_house_has_these_files_and_no_others():
    there = {path for room in ROOMS for path in (REPO / room).glob("*.py")}
    assert there == {*map(path_of, MAY_IMPORT)}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_file_imports_those_below_it_alone(module):
    tree = parsed(module)
    main = imported(ast.Module([node for node in tree.body if is_command(node)]))
    rest = imported(ast.Module([node for node in tree.body if not is_command(node)]))
    assert rest & MAY_IMPORT.keys() <= MAY_IMPORT[module]
    assert main & MAY_IMPORT.keys() <= MAY_IMPORT[module] | MAIN_MAY_IMPORT.get(module, set())


def test_no_file_imports_one_that_imports_it():
    graph = {module: imported(parsed(module)) & MAY_IMPORT.keys() for module in MAY_IMPORT}
    assert [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_no_state_hides_in_closures(module):
    assert not [node.lineno for node in ast.walk(parsed(module)) if isinstance(node, ast.Nonlocal)]


def commands():
    """All files that are run as python FILE, from the folder of the project."""
    rooms = "", "examples", "benchmarks", "tests/reference"
    texts = {path: path.read_text("utf-8") for room in rooms for path in (REPO / room).glob("*.py")}
    runs = re.compile(r"^ +(cli\.)?run\(", re.MULTILINE)
    return sorted(path.relative_to(REPO).as_posix() for path, text in texts.items() if runs.search(text))


LATER = {"benchmarks/bench.py", "benchmarks/explorer.py"}  # these import nothing that takes time before they run


def test_the_commands_are_found():
    assert {"gpt2.py", "encoder.py", "utils.py", "explore.py", "examples/train.py", "benchmarks/bench.py"} <= {
        *commands()
    }


@pytest.mark.parametrize("script", commands())
def test_a_command_runs_where_python_leaves_its_folder_out_of_the_path(script, tmp_path):
    result = command("--help", script=script, env={"PYTHONSAFEPATH": "1", "PYTHONPATH": ""}, cwd=tmp_path)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr


@pytest.mark.parametrize("version", ["3.8", "3.9"])
@pytest.mark.parametrize("script", commands())
def test_a_command_says_first_of_all_that_python_is_too_old(script, version):
    here = pathlib.Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
    if not (old := next(here, None) or shutil.which(f"python{version}")):
        pytest.skip(f"there is no Python {version} here")
    result = subprocess.run([old, REPO / script, "Hello"], capture_output=True, text=True, cwd="/")
    assert_one_line_error(result, f"{script.rpartition('/')[2]}: needs Python 3.10 or newer, and this is {version}")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A folder with packages that take a minute to import, which they begin with a word on stdout."""
    folder = tmp_path_factory.mktemp("slow")
    for name in ("numpy", "regex"):
        (folder / f"{name}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    return folder


@pytest.mark.parametrize("script", [script for script in commands() if script not in LATER])
def test_a_command_that_imports_is_ended_quietly_by_ctrl_c_unless_it_is_ignored(script, slow):
    needs_posix("signals")
    for through, status in ((), 130), (["sh", "-c", 'trap "" INT; exec "$@"', "-"], None):
        with running("x", script=script, through=through, env={"PYTHONPATH": slow}) as process:
            assert process.stdout.readline() == b"importing\n"
            interrupt(process)
            if status:
                assert process.communicate(timeout=TIMEOUT)[1] == b""
            else:
                time.sleep(0.2)
            assert process.poll() == status


@pytest.mark.parametrize("script", commands())
def test_a_command_says_which_light_packages_are_missing(script, tmp_path):
    bare = [sys.executable, "-S", REPO / script, "predict" if "classify" in script else "x"]  # without its environment
    result = subprocess.run(bare, capture_output=True, text=True, cwd=tmp_path)
    assert_one_line_error(
        result, "not installed here: activate its environment, or pip install numpy regex requests tqdm fire"
    )


@pytest.mark.parametrize(
    "script", [script for script in commands() if script not in ("gpt2.py", "encoder.py", "benchmarks/bench.py")]
)
def test_a_command_says_that_numpy_is_too_old(script, tmp_path):
    (tmp_path / "numpy.py").write_text("__version__ = '1.26.4'")
    result = command(
        "predict" if "classify" in script else "x", script=script, env={"PYTHONPATH": tmp_path}, cwd=tmp_path
    )
    assert_one_line_error(result, "NumPy 2.0 or newer is needed, and this is 1.26.4: pip install -U numpy")


def git(*args):
    return subprocess.run(["git", *args], cwd=REPO, capture_output=True, text=True, check=True).stdout


def opened(tree):
    """(line, mode, names of keywords) of each open() of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            mode = next(iter(node.args[1:]), ast.Constant("r"))
            if ast.unparse(node.args[0]) not in ("os.devnull", "os.dup(2)"):
                yield node.lineno, ast.unparse(mode), {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize("room", [*ROOMS, "examples", "benchmarks"])
def test_files_of_text_are_the_same_bytes_on_every_system(room):
    """Windows' own encoding and line breaks are left to terminals."""
    for path in (REPO / room).glob("*.py"):
        for line, mode, names in opened(ast.parse(path.read_text("utf-8"))):
            needed = set() if "b" in mode else {"encoding"} if mode == "'r'" else {"encoding", "newline"}
            assert needed <= names, f"{path}:{line}"


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git here")
def test_scripts_keep_their_line_breaks_on_every_system():
    names = git("ls-files", ".ci/run", "*.sh").split()
    assert git("check-attr", "eol", *names) == "".join(f"{name}: eol: lf\n" for name in names)


def test_the_dependencies_of_the_project_are_those_that_the_command_names():
    assert [re.match(r"[\w-]+", dependency)[0] for dependency in PROJECT["dependencies"]] == [*cli.BASIC]


def requirements(name):
    """What a file of requirements asks for, and the files that it names."""
    lines = [line.partition("#")[0].strip() for line in (REPO / name).read_text("utf-8").splitlines()]
    asked = [line for line in lines if line and not line.startswith("-r ")]
    for other in [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]:
        asked += requirements(other)
    return asked


def test_the_light_packages_are_the_dependencies_of_the_project():
    assert requirements("requirements-light.txt") == PROJECT["dependencies"]


@pytest.mark.parametrize("purpose", ["ray", "train", "tour"])
def test_what_trains_or_shows_brings_the_light_packages_and_neither_tensorflow_nor_pytorch(purpose):
    names = {Requirement(each).name for each in requirements(f"requirements-{purpose}.txt")}
    assert {*cli.BASIC} < names
    assert not names & {"tensorflow", "torch", "transformers"}


PACKAGED = {  # where a requirement is left out, since nobody packages it, and pip would fail
    ("linux", "x86_64", "3.12"): set(),
    ("win32", "AMD64", "3.12"): set(),
    ("darwin", "arm64", "3.12"): set(),
    ("linux", "x86_64", "3.14"): {"tensorflow"},
    ("win32", "ARM64", "3.12"): {"tensorflow", "torch", "jax", "optax", "peft", "ray"},
    ("darwin", "x86_64", "3.12"): {"tensorflow", "torch", "jax", "optax", "peft", "ray"},
}


@pytest.mark.parametrize("machine", PACKAGED, ids=" ".join)
def test_what_is_not_packaged_for_a_platform_is_not_asked_for_there(machine):
    environment = dict(zip(("sys_platform", "platform_machine", "python_version"), machine, strict=True))
    found = [Requirement(each) for each in requirements("requirements-dev.txt")]
    assert {each.name for each in found if each.marker and not each.marker.evaluate(environment)} == PACKAGED[machine]


def test_pip_installs_what_the_house_has():
    names = {*SETUPTOOLS["py-modules"], *SETUPTOOLS["packages"]}
    assert names == {module.partition(".")[0] for module in MAY_IMPORT}


def test_the_model_brings_no_array_library_of_its_own():
    for module in ("gpt2", "backends.arrays", "backends.cache"):
        at_first = [node for node in parsed(module).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not {name.partition(".")[0] for name in imported(ast.Module(at_first))} & {"numpy", "jax", "cupy"}


def test_gpt2_py_is_read_in_one_sitting():
    lines = path_of("gpt2").read_text("utf-8").splitlines()
    functions = {node.name: node for node in parsed("gpt2").body if isinstance(node, ast.FunctionDef)}
    assert len(lines) <= 330
    assert functions["gpt2"].end_lineno - functions["gelu"].lineno < 150
