"""Each README.md and its README.zh-CN.md: one document in two languages; what commands are said to print, they do."""

import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import REPO

from cli import as_typed

FOLDERS = [".", "models", "models/shakespeare", "models/tangshi", "examples", "benchmarks", "tests/reference"]
FENCED, INDENTED = r"^```\w*\n(?:(?!```)[^\n]*\n)*```$", r"(?:^    [^\n]*\n|^\n(?=    ))+"


def read(folder):
    """(English, Chinese)"""
    return [(REPO / folder / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md")]


def sections(text):
    """[(level of the heading, the text behind it)]"""
    parts = re.split(r"^(#+) .*\n", re.sub(FENCED, lambda m: m[0].replace("\n#", "\n "), text, flags=re.M), flags=re.M)
    return [(len(level), body) for level, body in zip(parts[1::2], parts[2::2], strict=True)]


def code(text):
    """The lines of all blocks of code, less their comments."""
    blocks = re.findall(f"{FENCED}|{INDENTED}", text, re.M)
    return [re.sub(r"\s+# .*", "", line).rstrip() for block in blocks for line in block.splitlines() if line.strip()]


def prose(text):
    return re.sub(f"{FENCED}|{INDENTED}", "", text, flags=re.M)


def figures(text):
    """All numbers of the text, but for those in names, code, and addresses."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|GPT-2|60行|60 Lines|CTranslate2", "", prose(text))
    text = re.sub(r"([\d.,]+)\s(million|万)", lambda m: counted(m[1], 10**6 if m[2] == "million" else 10**4), text)
    return {*re.findall(r"(?<![A-Za-z])\d+(?:[.,]\d+)*", text)}


def counted(number, unit):
    return f"{round(float(number.replace(',', '')) * unit):,}"


def links(text):
    return {link.replace(".zh-CN", "") for link in re.findall(r"\]\(([^)]*)\)", text)}


def names(text):
    return {" ".join(name.replace(".zh-CN", "").split()) for name in re.findall(r"`([^`]+)`", prose(text))}


COUNTERPARTS = {  # commands of README.zh-CN.md, whose first model writes Chinese: those of README.md in their place
    'python gpt2.py "春眠不觉晓，" --model_size tangshi': 'python gpt2.py "ROMEO:" --model_size shakespeare',
    'python gpt2.py "ROMEO:" --model_size shakespeare': 'python gpt2.py "春眠不觉晓，" --model_size tangshi',
    'python explore.py "春眠不觉晓，处处闻啼" --model_size tangshi': (
        'python explore.py "My lord, the king is dead; my lord, the" --model_size shakespeare'
    ),
    "python examples/finetune.py dufu.txt --model_size tangshi --name dufu": (
        "python examples/finetune.py my_text.txt --model_size shakespeare --name mine"
    ),
    r'python gpt2.py "国破山河在，" --model_size dufu --temperature 0.8 --stop "\n\n"': (
        'python gpt2.py "Once upon a time" --model_size mine'
    ),
}
ENGLISH, CHINESE = read(".")
PAIRS = {
    f"{folder}-{i}": pair
    for folder in FOLDERS
    for i, pair in enumerate(zip(*map(sections, read(folder)), strict=False))
}
KINDS = code, figures, links, names
COMPARED = [  # what either has some of: two that have none would be the same in any case
    (name, what) for name, pair in PAIRS.items() for what in KINDS if any(what(body) for _, body in pair)
]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_every_folder_that_has_a_readme_has_one_in_each_language():
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    found = {path.rpartition("/")[0] or "." for path in tracked if path.endswith(("README.md", "README.zh-CN.md"))}
    assert found == {*FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS)
def test_both_have_headings_of_the_same_levels_in_the_same_order(folder):
    english, chinese = map(sections, read(folder))
    assert [level for level, _ in english] == [level for level, _ in chinese]


@pytest.mark.parametrize(("pair", "what"), COMPARED)
def test_a_section_has_the_same_in_both(pair, what):
    (_, english), (_, chinese) = PAIRS[pair]
    theirs = what(chinese)
    if what is code and pair.startswith(".-"):
        theirs = [line.replace(line.strip(), COUNTERPARTS.get(line.strip(), line.strip())) for line in theirs]
    assert what(english) == theirs


def test_the_parts_that_are_compared_are_there():
    for what in KINDS:
        assert len(what(ENGLISH)) > 10


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_figure_is_left_to_be_filled_in(folder):
    assert not [left for page in read(folder) for left in re.findall("@[A-Z_]+@", page)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_links_to_the_other_at_its_top(folder):
    english, chinese = read(folder)
    assert "](README.zh-CN.md)" in "".join(english.splitlines()[:4])
    assert "](README.md)" in "".join(chinese.splitlines()[:4])


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_links_into_the_repository_lead_somewhere(folder, name):
    text = (REPO / folder / name).read_text("utf-8")
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert link.startswith("https://") or (REPO / folder / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_chinese_page_leads_to_chinese_pages(folder):
    _, chinese = read(folder)
    for link in re.findall(r"\]\(([^)]*)\)", chinese.partition("](README.md)")[2]):
        path = REPO / folder / link.partition("#")[0]
        assert link.startswith("https://") or not path.with_suffix(f".zh-CN{path.suffix}").exists(), link


def test_the_files_that_it_lists_are_all_that_there_are():
    first_cells = re.findall(r"^\| (\[.*?) \|", ENGLISH, re.M)
    listed = {REPO / name for cell in first_cells for name in re.findall(r"\[([\w/]+\.py)\]", cell)}
    there = {path for room in ("", "backends", "files") for path in (REPO / room).glob("*.py")}
    assert listed == {path for path in there if path.stem != "__init__"}


def test_the_table_has_every_flag():
    help_text = subprocess.run(
        [sys.executable, "gpt2.py", "--help"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    rows = "".join(line for line in ENGLISH.splitlines(keepends=True) if line.startswith("| `--"))
    assert {*re.findall(r"--(\w+)", rows)} == {*re.findall(r"--(\w+)", help_text)} - {"help", "prompt"}


def shown():
    """[(command, what it is said to print)] for all that is shown behind a $."""
    blocks = [textwrap.dedent(block).strip("\n") for block in re.findall(INDENTED, ENGLISH, re.M)]
    parts = re.split(r"^\$ (.*)\n", "\n".join(block for block in blocks if block.startswith("$ ")), flags=re.M)
    return [*zip(parts[1::2], parts[2::2], strict=True)]


def test_three_commands_are_shown_with_what_they_print():
    assert len(shown()) == 3


@pytest.mark.parametrize(("command", "printed"), shown())
def test_a_command_prints_what_the_readme_shows(command, printed, tmp_path):
    (tmp_path / "prompts.txt").write_text("To be\nMy lord\n")
    command = command.replace("python gpt2.py", as_typed([sys.executable, str(REPO / "gpt2.py")]))
    result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)  # noqa: S602
    assert result.stdout.strip() == printed.strip()
