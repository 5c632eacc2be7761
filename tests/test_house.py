"""The house: which file may import which, read from the files themselves."""

import ast
import graphlib
import importlib
import re
import sys

import pytest
from conftest import REPO

import cli

MAY_IMPORT = {
    "backends.arrays": set(),
    "backends.checks": set(),
    "backends.lookup": set(),
    "backends.cache": {"backends.arrays"},
    "backends.threads": {"backends.arrays"},
    "backends.devices": {"backends.arrays", "backends.threads"},
    "backends.on_numpy": {"backends.arrays", "backends.cache", "backends.devices", "backends.threads"},
    "backends.on_jax": {"backends.arrays", "backends.cache", "backends.devices"},
    "backends": {"backends.arrays", "backends.lookup", "backends.on_jax", "backends.on_numpy"},
    "files": set(),
    "files.lock": set(),
    "files.web": set(),
    "files.download": {"files.lock", "files.web"},
    "files.crc32c": set(),
    "files.bundle": {"files.crc32c"},
    "files.sums": set(),
    "files.together": {"files.lock"},
    "files.checkpoint": {"files.bundle", "files.sums", "files.together"},
    "encoder": set(),
    "sampling": {"backends.arrays"},
    "cli": {"backends.checks"},
    "utils": {"encoder", "files.checkpoint", "files.download", "files.sums", "files.together"},
    "gpt2": {"backends", "backends.arrays", "backends.checks", "sampling"},
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
    "explore": {"explorer.server", "explorer.session", "explorer.single_file", "gpt2", "utils"},
}
MAIN_MAY_IMPORT = {
    "encoder": {"cli"},
    "utils": {"cli"},
    "gpt2": {"backends.devices", "backends.threads", "utils", "cli"},
    "explore": {"cli"},
}
ROOMS = "", "backends", "files", "explorer"
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


def test_the_dependencies_of_the_project_are_those_that_the_command_names():
    assert [re.match(r"[\w-]+", dependency)[0] for dependency in PROJECT["dependencies"]] == [*cli.BASIC]


def test_requirements_txt_has_the_dependencies_of_the_project_and_tensorflow():
    lines = (REPO / "requirements.txt").read_text("utf-8").splitlines()
    *requirements, tensorflow = (line.partition("#")[0].strip() for line in lines if not line.startswith("#"))
    assert requirements == PROJECT["dependencies"]
    assert tensorflow.startswith("tensorflow>=")


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
