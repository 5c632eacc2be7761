"""Puts plausible bugs into the code, one at a time, and says which ones no test notices.

    python tests/mutate.py --n_mutants 150 --seed 0                  # of all files; takes hours
    python tests/mutate.py sampling.py backends/lookup.py            # of these

A mutant is a copy of the repository in which one comparison, operator, number, argument, condition or statement is
another. For each, the tests of its file run until one fails. What survives is printed as a diff; whether it is a bug
(some change nothing that anyone could see) is for a reader to judge.
"""

import argparse
import ast
import difflib
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

REPO = pathlib.Path(__file__).parent.parent
ROOMS = ".", "backends", "files", "explorer", "examples", "languages"
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
TESTS = {  # beside test_NAME.py, where those of a file have another name, or others
    "gpt2": "generation cli_generation",
    "sampling": "generation cli_generation",
    "utils": "untrusted download",
    "cli": "cli_generation",
    "cache": "generation gpt2",
    "arrays": "gpt2 generation devices",
    "checks": "generation gpt2 cli",
    "on_numpy": "generation threads finetune",
    "on_jax": "generation devices train",
    "checkpoint": "utils untrusted saving",
    "sums": "utils untrusted",
    "together": "saving utils",
    "lock": "download saving",
    "web": "download",
    "crc32c": "bundle",
    "training": "train finetune",
    "recipe": "train finetune",
    "texts": "train finetune",
    "saving": "train finetune",
    "lora": "finetune",
    "formats": "convert",
    "trace": "explore_trace",
    "attribution": "explore",
    "__init__": "languages house",
    "session": "explore",
    "server": "explore",
    "source": "explore_trace explore",
    "single_file": "explore",
}
SECONDS = 900  # of a mutant's tests: one that takes longer has made something endless, and is noticed


def span(lines, first, last):
    """(start, stop) in the source of two places, (line, column in bytes), as ast counts them."""
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    return tuple(starts[row - 1] + len(lines[row - 1].encode()[:column].decode()) for row, column in (first, last))


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
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield begin(node), end(node), repr(node.value + 1)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield begin(node), begin(node.operand), ""
        elif isinstance(node, ast.If | ast.While | ast.IfExp):
            yield begin(node.test), begin(node.test), "not "
        elif isinstance(node, ast.Call):
            for before, argument in zip([*node.args, *node.keywords], [*node.args, *node.keywords][1:], strict=False):
                yield end(before), end(argument), ""
        elif isinstance(node, ast.Expr | ast.AugAssign) and not isinstance(getattr(node, "value", None), ast.Constant):
            yield begin(node), end(node), "pass"
        elif isinstance(node, ast.Return) and node.value is not None:
            yield begin(node.value), end(node.value), "None"


def mutants_of(path):
    """The texts of all mutants of a file that are Python."""
    text = path.read_text("utf-8")
    lines = text.splitlines(keepends=True)
    for first, last, new in mutations(ast.parse(text)):
        start, stop = span(lines, first, last)
        before, after = text[:start].count("(") - text[:start].count(")"), text[start:stop]
        if after.count("(") != after.count(")") and before >= 0:
            continue  # a bracket stands between: the text around would not fit
        mutant = text[:start] + new + text[stop:]
        try:
            compile(mutant, path, "exec")
        except SyntaxError:
            continue
        if mutant != text:
            yield mutant


def tests_of(path):
    names = [path.stem, *TESTS.get(path.stem, "").split()]
    return [f"tests/test_{name}.py" for name in dict.fromkeys(names) if (REPO / f"tests/test_{name}.py").exists()]


def passes(folder, tests):
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        return not subprocess.run(command, cwd=folder, capture_output=True, timeout=SECONDS).returncode
    except subprocess.TimeoutExpired:
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    parser.add_argument("--n_mutants", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = [path.resolve() for path in options.files]
    files = files or sorted(path for room in ROOMS for path in (REPO / room).glob("*.py") if tests_of(path))
    rng, survivors = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "repo"
        shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        for i in range(options.n_mutants):
            path = rng.choice(files)
            mutant, name = rng.choice([*mutants_of(path)]), path.relative_to(REPO)
            (copy / name).write_text(mutant, "utf-8")
            survived = passes(copy, tests_of(path))
            shutil.copy(path, copy / name)
            survivors += survived
            print(f"{i + 1}: {name}: {'SURVIVED' if survived else 'noticed'}", flush=True)
            lines = path.read_text("utf-8").splitlines(), mutant.splitlines()
            print(*difflib.unified_diff(*lines, lineterm="", n=1 if survived else 0), sep="\n", flush=True)
    print(f"{options.n_mutants - survivors} of {options.n_mutants} were noticed")


if __name__ == "__main__":
    main()
