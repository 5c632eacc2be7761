"""The house: which file may import which, read from the files themselves."""

import ast
import graphlib

import pytest
from conftest import REPO

import cli

MAY_IMPORT = {
    "encoder": set(),
    "download": set(),
    "checkpoint": set(),
    "cli": set(),
    "lookup": set(),
    "threads": set(),
    "devices": {"threads"},
    "arrays": {"devices", "threads"},
    "sampling": {"arrays"},
    "utils": {"encoder", "download", "checkpoint", "cli"},
    "gpt2": {"arrays", "lookup", "sampling", "devices", "utils", "cli"},
}


def parsed(name):
    return ast.parse((REPO / f"{name}.py").read_text("utf-8"))


def imported(tree):
    """The names of all modules that are imported anywhere in it, in functions too."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_the_house_has_these_files_and_no_others():
    assert {path.stem for path in REPO.glob("*.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_file_imports_those_below_it_alone(name):
    assert imported(parsed(name)) & MAY_IMPORT.keys() <= MAY_IMPORT[name]


def test_no_file_imports_one_that_imports_it():
    graph = {name: imported(parsed(name)) & MAY_IMPORT.keys() for name in MAY_IMPORT}
    assert [*graphlib.TopologicalSorter(graph).static_order()]  # raises CycleError


@pytest.mark.parametrize(("name", "outside"), [("gpt2", {"utils", "cli", "devices"}), ("utils", {"cli"})])
def test_only_main_meets_what_commands_need(name, outside):
    tree = parsed(name)
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) or getattr(node, "name", "") == "main")
    ]  # the If is that of __name__ == "__main__"
    assert not imported(tree) & outside


def test_the_packages_of_requirements_txt_are_those_that_the_command_names():
    lines = (REPO / "requirements.txt").read_text("utf-8").splitlines()
    assert [line.partition(">")[0] for line in lines] == [*cli.BASIC]


def test_the_model_brings_no_array_library_of_its_own():
    top = {alias.name for node in parsed("gpt2").body if isinstance(node, ast.Import) for alias in node.names}
    assert not top & {"numpy", "jax", "cupy"}


def test_gpt2_py_is_read_in_one_sitting():
    lines = (REPO / "gpt2.py").read_text("utf-8").splitlines()
    functions = {node.name: node for node in parsed("gpt2").body if isinstance(node, ast.FunctionDef)}
    assert len(lines) <= 330
    assert functions["gpt2"].end_lineno - functions["gelu"].lineno < 150
