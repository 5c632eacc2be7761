"""The house: which file may import which, read from the files themselves."""

import ast
import graphlib

import pytest
from conftest import REPO

import cli

MAY_IMPORT = {
    "encoder": set(),
    "cli": set(),
    "backends.lookup": set(),
    "backends.threads": set(),
    "backends.devices": {"backends.threads"},
    "backends.arrays": {"backends.devices", "backends.threads"},
    "files.download": set(),
    "files.checkpoint": set(),
    "sampling": {"backends.arrays"},
    "utils": {"encoder", "files.download", "files.checkpoint", "cli"},
    "backward": {"gpt2", "backends.arrays"},
    "gpt2": {"backends.arrays", "backends.lookup", "backends.devices", "sampling", "utils", "cli"},
}
ROOMS = "", "backends", "files"


def path_of(module):
    return REPO / f"{module.replace('.', '/')}.py"


def parsed(module):
    return ast.parse(path_of(module).read_text("utf-8"))


def imported(tree):
    """The names of all modules that are imported anywhere in it, in functions too: of `from a import b`, a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_house_has_these_files_and_no_others():
    there = {path for room in ROOMS for path in (REPO / room).glob("*.py") if path.stem != "__init__"}
    assert there == {*map(path_of, MAY_IMPORT)}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_file_imports_those_below_it_alone(module):
    assert imported(parsed(module)) & MAY_IMPORT.keys() <= MAY_IMPORT[module]


def test_no_file_imports_one_that_imports_it():
    graph = {module: imported(parsed(module)) & MAY_IMPORT.keys() for module in MAY_IMPORT}
    assert [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError


@pytest.mark.parametrize(("module", "outside"), [("gpt2", {"utils", "cli", "backends.devices"}), ("utils", {"cli"})])
def test_only_main_meets_what_commands_need(module, outside):
    tree = parsed(module)
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) or getattr(node, "name", "") == "main")
    ]  # the If is that of __name__ == "__main__"
    assert not imported(tree) & outside


def test_the_packages_of_requirements_txt_are_those_that_the_command_names():
    lines = (REPO / "requirements.txt").read_text("utf-8").splitlines()
    assert [line.partition(">")[0] for line in lines] == [*cli.BASIC]


def test_the_model_brings_no_array_library_of_its_own():
    roots = {name.partition(".")[0] for node in parsed("gpt2").body for name in imported(node)}
    assert not roots & {"numpy", "jax", "cupy"}


def test_gpt2_py_is_read_in_one_sitting():
    lines = path_of("gpt2").read_text("utf-8").splitlines()
    functions = {node.name: node for node in parsed("gpt2").body if isinstance(node, ast.FunctionDef)}
    assert len(lines) <= 330
    assert functions["gpt2"].end_lineno - functions["gelu"].lineno < 150
