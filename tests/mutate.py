"""Puts plausible bugs into the code, one at a time, and says which ones no test notices.

    python -m pytest --junitxml=tests.xml                   # tells how long each test takes
    python tests/mutate.py tests.xml --n_mutants 150        # of all files
    python tests/mutate.py tests.xml sampling.py backends/lookup.py

A mutant is a copy of the repository in which one comparison, operator, number, argument, condition or statement is
another. They are taken evenly from all that could be, in an order that a seed shuffles: the same seed, the same ones.
For each, the tests of its file run until one fails: those first that name the function that is another, and then the
fastest; slow ones are left out where all would take too long. What survives is printed as a diff; whether it is a bug
(some change nothing that anyone could see) is for readers to judge. On POSIX, by processes that fork.
"""

import argparse
import ast
import contextlib
import difflib
import faulthandler
import importlib
import inspect
import itertools
import math
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
import xml.etree.ElementTree as ET

import pytest

REPO = pathlib.Path(__file__).parent.parent
ROOMS = ".", "backends", "files", "explorer", "examples", "languages", "benchmarks", "tests/reference"
TESTS = {  # in the order in which they are asked, where a file's are not just test_NAME.py
    "gpt2": "gpt2 generation cli_generation",
    "sampling": "sampling generation cli_generation",
    "utils": "utils untrusted transformers",
    "cli": "cli cli_generation",
    "backends/__init__": "lookup generation",
    "backends/arrays": "gpt2 generation devices",
    "backends/cache": "gpt2 generation",
    "backends/checks": "generation gpt2 cli",
    "backends/on_numpy": "threads generation",
    "backends/on_jax": "generation devices",
    "files/__init__": "cli",
    "files/checkpoint": "utils untrusted",
    "files/sums": "utils untrusted",
    "files/together": "utils saving",
    "files/lock": "utils saving download",
    "files/web": "download",
    "files/crc32c": "bundle",
    "explorer/attribution": "explore",
    "explorer/server": "explore",
    "explorer/session": "explore",
    "explorer/single_file": "explore",
    "explorer/source": "explore_trace explore",
    "explorer/trace": "explore_trace explore",
    "examples/formats": "convert",
    "examples/lora": "finetune",
    "examples/on_jax": "finetune classify on_numpy train",
    "examples/recipe": "train finetune",
    "examples/saving": "saving train",
    "examples/texts": "texts finetune classify",
    "examples/training": "train finetune classify saving",
    "languages/__init__": "languages",
    "benchmarks/gpu": "bench",
}
COMPARED = {"Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Eq": "!=", "NotEq": "==", "In": "not in", "NotIn": "in"}
COMPARED |= {"Is": "is not", "IsNot": "is"}
COMPUTED = {
    "Add": "-",
    "Sub": "+",
    "Mult": "/",
    "Div": "*",
    "FloorDiv": "*",
    "Mod": "//",
    "MatMult": "*",
    "BitAnd": "|",
}
HEAVY = "jax", "matplotlib.figure", "optax", "scipy", "tensorflow", "torch", "transformers.models.gpt2.modeling_gpt2"


# mutants


def begin(node):
    return node.lineno, node.col_offset


def end(node):
    return node.end_lineno, node.end_col_offset


def mutations(tree):
    """Yields (place, place, text in place of what stands between)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield end(node.left), begin(node.comparators[0]), f" {COMPARED[type(node.ops[0]).__name__]} "
        elif isinstance(node, ast.BinOp) and type(node.op).__name__ in COMPUTED:
            yield end(node.left), begin(node.right), f" {COMPUTED[type(node.op).__name__]} "
        elif isinstance(node, ast.BoolOp):
            yield end(node.values[0]), begin(node.values[1]), " or " if isinstance(node.op, ast.And) else " and "
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield begin(node), end(node), repr(not node.value)
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield begin(node), end(node), repr(node.value + 1)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield begin(node), begin(node.operand), ""
        elif isinstance(node, ast.If | ast.While | ast.IfExp):
            yield begin(node.test), begin(node.test), "not "
        elif isinstance(node, ast.Call):
            given = [*node.args, *node.keywords]  # without those that have no name, nearly nothing would run
            for before, argument in itertools.pairwise(given):
                if argument in node.keywords:
                    yield end(before), end(argument), ""
        elif isinstance(node, ast.Expr | ast.AugAssign | ast.Raise) and not is_docstring(node):
            yield begin(node), end(node), "pass"
        elif isinstance(node, ast.Return) and node.value is not None:
            yield begin(node.value), end(node.value), "None"


def is_docstring(node):
    return isinstance(getattr(node, "value", None), ast.Constant) and isinstance(node, ast.Expr)


def span(lines, first, last):
    """(start, stop) in the source of two places, (line, column in bytes), as ast counts them."""
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    return tuple(starts[row - 1] + len(lines[row - 1].encode()[:column].decode()) for row, column in (first, last))


def mutant_of(text, first, last, new):
    """The text with new between two places; None where that is no Python, or a bracket stands between."""
    start, stop = span(text.splitlines(keepends=True), first, last)
    mutant = text[:start] + new + text[stop:]
    try:
        compile(mutant, "mutant", "exec")
    except SyntaxError:
        return None
    return mutant if text[start:stop].count("(") == text[start:stop].count(")") and mutant != text else None


def mutants(texts, n, rng):
    """[(path, where, text)] of n mutants of {path: text}: a random one of every n-th part of all that could be.

    where: the names of the functions and classes that are others.
    """
    trees = {path: ast.parse(text) for path, text in texts.items()}
    places = [(path, place) for path, tree in trees.items() for place in mutations(tree)]
    chosen = []
    for i in range(n):
        k = int((i + rng.random()) * len(places) / n)
        while (mutant := mutant_of(texts[places[k][0]], *places[k][1])) is None:
            k = (k + 1) % len(places)
        path, ((row, _), *_) = places[k]
        chosen.append((path, names_around(trees[path], row), mutant))
    rng.shuffle(chosen)
    return chosen


def names_around(tree, row):
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name for node in nodes if node.lineno <= row <= node.end_lineno}


# tests


def tests_of(path):
    names = TESTS.get(path.relative_to(REPO).with_suffix("").as_posix(), path.stem).split()
    return [f"tests/test_{name}.py" for name in names if (REPO / f"tests/test_{name}.py").exists()]


def fault(folder, tests, order):
    """The first of these tests that fails, or what else is wrong; "" where all pass. In a process of its own."""
    said = folder.parent / "said"
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.dont_write_bytecode = True  # what is compiled of one mutant may be taken for the next, of the same second
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.path[0], sys.argv[:] = str(folder), ["pytest"]
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder.parent / 'tmp'}"]
        os._exit(pytest.main([*options, *tests], [order]))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a test that did not end has started
    if os.waitstatus_to_exitcode(status) == pytest.ExitCode.NO_TESTS_COLLECTED:
        sys.exit(f"no test is asked of {tests}: see TESTS and --seconds")
    found = re.search("^(?:FAILED|ERROR) (.*?)( - |$)", said.read_text("utf-8", "replace"), re.MULTILINE)
    return "" if status == 0 else found[1] if found else f"no end, or status {status}"


class Order:
    """A plugin of pytest: those tests first that have a word of names, then those of the first file, the fastest first.

    seconds: {(file, test): that it takes}; room: seconds for those of each file: what has no room is left out.
    """

    def __init__(self, seconds, room, names=()):
        self.seconds, self.room, self.names = seconds, room, {*names}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            item.seconds = self.seconds.get((item.path.stem, item.name), 0.1)  # 0.1: it is new
            item.is_near = not self.names.isdisjoint(re.findall(r"\w+", inspect.getsource(item.function)))
        files, kept = [*dict.fromkeys(item.path for item in items)], []
        left = dict.fromkeys(files, self.room)
        for item in sorted(items, key=lambda item: (not item.is_near, files.index(item.path), item.seconds)):
            if item.seconds <= left[item.path]:
                kept.append(item)
                left[item.path] -= item.seconds
        items[:] = kept

    def pytest_runtest_setup(self, item):
        """Ends all where a test takes thrice its time, and 90 s: it may be the first to want what others share."""
        faulthandler.dump_traceback_later(3 * item.seconds + 90, exit=True)


def times(report):
    """{(file, test): seconds} of JUnit's report."""
    cases = ET.parse(report).iter("testcase")  # noqa: S314  (which pytest has written)
    return {(case.get("classname", "").rpartition(".")[2], case.get("name")): float(case.get("time")) for case in cases}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=pathlib.Path, help="JUnit's, of a run of all tests")
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument("--n_mutants", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30, help="of each file of tests, as the report has them")
    options = parser.parse_args()
    for package in HEAVY:  # once for all: their imports take longer than most tests
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    files = [path.resolve() for path in options.files]
    files = files or sorted(path for room in ROOMS for path in (REPO / room).glob("*.py") if tests_of(path))
    texts, seconds = {path: path.read_text("utf-8") for path in files}, times(options.report)
    n_survivors, sound = 0, set()  # sound: tests that pass where there is no mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "repo"
        shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        for i, (path, names, mutant) in enumerate(mutants(texts, options.n_mutants, random.Random(options.seed)), 1):
            name = path.relative_to(REPO)
            (copy / name).write_text(mutant, "utf-8")
            noticed_by = fault(copy, tests_of(path), Order(seconds, options.seconds, names))
            (copy / name).write_text(texts[path], "utf-8")
            test = noticed_by.partition("[")[0]
            if "::" in test and test not in sound:
                if fault(copy, [test], Order(seconds, math.inf)):
                    noticed_by += ", WHICH FAILS WITHOUT IT, TOO"
                else:
                    sound.add(test)
            n_survivors += not noticed_by
            print(f"{i}: {name}: {noticed_by or 'SURVIVED'}")
            lines = texts[path].splitlines(), mutant.splitlines()
            print(*difflib.unified_diff(*lines, lineterm="", n=0 if noticed_by else 1), sep="\n", flush=True)
    print(f"{options.n_mutants - n_survivors} of {options.n_mutants} were noticed")


if __name__ == "__main__":
    main()
