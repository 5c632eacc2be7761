"""What commands say to those who read Chinese: which locales are Chinese, and that the catalogue lacks nothing."""

import ast
import ctypes
import importlib
import json
import os
import re
import time
import types

import fire
import pytest
from conftest import REPO, assert_one_line_error, command

import languages

HAN = re.compile("[\u4e00-\u9fff]")
CHINESE = {"LC_ALL": "", "LC_MESSAGES": "", "LANG": "zh_CN.UTF-8", "LANGUAGE": ""}
FILES = [path for room in ("", "backends", "files", "examples") for path in sorted((REPO / room).glob("*.py"))]
FILES += [REPO / "explorer/session.py"]
SAY = "fail", "note", "say", "mistakes", "translated", "run", "print"  # functions that show their last argument
WORDS = r"(^| )[a-z']{3,}[,;:.]? |[ (][a-z']{3,}([ ,;:.)?]|$)"  # and not the like of " --name {}"
COMMANDS = [
    ("gpt2", "main"),
    ("utils", "main"),
    ("encoder", "main"),
    ("explore", "main"),
    ("examples.train", "main"),
    ("examples.finetune", "main"),
    ("examples.evaluate", "main"),
    ("examples.convert", "main"),
    ("examples.generate_many", "main"),
    ("examples.classify", "train"),
    ("examples.classify", "evaluate"),
    ("examples.classify", "predict"),
    ("benchmarks.bench", "main"),
    ("benchmarks.gpu", "main"),
    ("benchmarks.explorer", "main"),
    ("reference.compare", "main"),
]


def escaped(text):
    """A text as str.format takes it; the {0} of a template is {}, too."""
    return re.sub(r"\{\{\d\}\}", "{}", text.replace("{", "{{").replace("}", "}}"))


def template(parts):
    """An f-string as the catalogue has it: {} for what is put in."""
    return "".join(escaped(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)


def wordings(node, assigned):
    """Yields all texts that an expression may be, and those within them. assigned: {name: [what it may be]}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield escaped(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield template(node.values)
        for part in node.values:
            yield from wordings(getattr(part, "value", None), assigned) if not isinstance(part, ast.Constant) else ()
    elif isinstance(node, ast.IfExp):
        yield from [*wordings(node.body, assigned), *wordings(node.orelse, assigned)]
    elif isinstance(node, ast.BoolOp):
        yield from (text for value in node.values for text in wordings(value, assigned))
    elif isinstance(node, ast.Call):
        yield from (text for value in node.args for text in wordings(value, assigned))
    elif isinstance(node, ast.Name):
        others = {name: values for name, values in assigned.items() if name != node.id}
        yield from (text for value in assigned.get(node.id, ()) for text in wordings(value, others))


def is_said(node):
    """Whether a call shows its last argument to the user, there and then, or as an error."""
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    to_stderr = any(isinstance(k.value, ast.Attribute) and k.value.attr == "stderr" for k in node.keywords)
    return name.endswith("Error") or (name in SAY and (name != "print" or to_stderr))


def assigned_in(nodes):
    found = {}
    for node in nodes:
        for target in node.targets if isinstance(node, ast.Assign) else ():
            found.setdefault(getattr(target, "id", None), []).append(node.value)
    return found


def messages(path):
    """All that a file says, in the catalogue's wording. What ends in a colon has something put behind it."""
    tree, found = ast.parse(path.read_text("utf-8")), set()
    for function in [node for node in tree.body if not isinstance(node, ast.FunctionDef)] + [*functions(tree)]:
        assigned = assigned_in([*tree.body, *ast.walk(function)])
        for call in [node for node in ast.walk(function) if isinstance(node, ast.Call) and node.args and is_said(node)]:
            shown = call.args[0 if getattr(call.func, "id", "") == "QuestionError" else -1]
            found |= {*wordings(shown, assigned)}
    return {text + "{}" * text.endswith(": ") for text in found if re.search(WORDS, text)}


def sentences_in_sentences(path):
    """All that a file says, each with "it is empty" where a sentence may stand, or what an error says."""
    tree, said = ast.parse(path.read_text("utf-8")), messages(path)
    errors = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    for function in functions(tree):
        assigned = assigned_in([*tree.body, *ast.walk(function)])
        for node in [node for node in ast.walk(function) if isinstance(node, ast.JoinedStr)]:
            before = {name: [v for v in values if node not in ast.walk(v)] for name, values in assigned.items()}
            puts = [part for part in node.values if isinstance(part, ast.FormattedValue)]
            for i, put in enumerate(puts if template(node.values) in said else ()):
                is_error = any(getattr(name, "id", None) in errors for name in ast.walk(put))
                is_error &= "__name__" not in ast.dump(put)
                if is_error or any(re.search(WORDS, text) for text in wordings(put.value, before)):
                    yield template(node.values).format(*("it is empty" if j == i else "" for j in range(len(puts))))


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def all_texts(path):
    """Every text in a file, whether it is said or not."""
    nodes = [*ast.walk(ast.parse(path.read_text("utf-8")))]
    return {text for node in nodes for text in wordings(node, {}) if isinstance(node, ast.Constant | ast.JoinedStr)}


def help_of(command):
    module, function = command
    if module == "examples.generate_many":
        pytest.importorskip("ray")
    function = getattr(importlib.import_module(module), function)
    return fire.helptext.HelpText(function, trace=fire.trace.FireTrace(function, f"{module}.py"))


@pytest.fixture
def in_chinese(monkeypatch):
    for name, value in CHINESE.items():
        monkeypatch.setenv(name, value)


# the catalogue


def filled(wording):
    """A wording with something in the place of every {}."""
    wording = re.sub(r"\{[sw]\}", "{}", wording)
    return wording.format(*(f"<{i}>" for i in range(wording.count("{}"))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_the_catalogue_has_all_that_a_file_says(path):
    lacking = {text for text in messages(path) if not HAN.search(languages.look_up(filled(text)))}
    assert lacking == set()


def test_the_files_say_much():
    assert len(set().union(*map(messages, FILES))) > 300


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_the_catalogue_says_where_a_sentence_may_stand_in_another(path):
    lacking = {text for text in sentences_in_sentences(path) if "它是空的" not in languages.look_up(text)}
    assert lacking == set()


@pytest.mark.parametrize("command", COMMANDS, ids=".".join)
def test_the_catalogue_has_every_line_of_a_commands_help(command, in_chinese):
    is_name = r"\s*(-\w, )?(--\w+=\w+|[A-Z_]+)?( \(required\))?|\s*\w*:?\.\.\."  # a path that Fire has no room for
    lines = [line for line in help_of(command).splitlines() if not re.fullmatch(is_name, line)]
    assert len(lines) > 8
    assert [line for line in lines if not HAN.search(languages.translated_lines(line))] == []


@pytest.mark.parametrize("wording", languages.catalogue())
def test_a_translation_has_in_it_what_is_put_into_the_english(wording):
    english = filled(wording)
    chinese = languages.look_up(english)
    assert HAN.search(chinese) or wording in ("{}: {s}", "{} - {s}")
    assert "<0>" not in english or re.search(r"<\d>", chinese)


def test_the_catalogue_has_nothing_twice():
    text = (REPO / "languages/zh.po").read_text("utf-8")
    assert text.count("\nmsgid ") == len(languages.catalogue()) + 1  # its head


def test_what_the_catalogue_has_is_said_somewhere():
    text = (REPO / "languages/zh.po").read_text("utf-8")
    own = {english for english in languages.catalogue() if repr_of(english) in text.partition("# put together")[0]}
    assert len(own) > 300
    said = "\n".join({text for path in FILES for text in all_texts(path)})
    parts = {part for english in own for part in re.split(r"\{[sw]?\}", english) if re.search("[a-z]{3}", part)}
    assert {part for part in parts if part not in said} == set()


def repr_of(english):
    return "msgid " + json.dumps(english, ensure_ascii=False) + "\n"


# whose language is Chinese


@pytest.mark.parametrize(
    ("variables", "is_chinese"),
    [
        ("", False),
        ("LANG=zh_CN.UTF-8", True),
        ("LANG=zh_CN", True),
        ("LANG=zh", True),
        ("LANG=zh_TW.UTF-8", True),
        ("LANG=en_US.UTF-8", False),
        ("LANG=fr_FR.UTF-8", False),
        ("LANG=en_US.UTF-8 LC_MESSAGES=zh_CN.UTF-8", True),
        ("LANG=zh_CN.UTF-8 LC_MESSAGES=en_US.UTF-8", False),
        ("LANG=en_US.UTF-8 LC_ALL=zh_CN.UTF-8", True),
        ("LC_MESSAGES=zh_CN.UTF-8 LC_ALL=en_US.UTF-8", False),
        ("LANG=zh_CN.UTF-8 LC_ALL=", True),
        ("LANG=zh_CN.UTF-8 LANGUAGE=en", False),
        ("LANG=en_US.UTF-8 LANGUAGE=zh_CN:en", True),
        ("LANG=de_DE.UTF-8 LANGUAGE=de:zh_CN", True),
        ("LANG=de_DE.UTF-8 LANGUAGE=de:en:zh_CN", False),
        ("LC_ALL=C LANG=zh_CN.UTF-8 LANGUAGE=zh_CN", False),
        ("LC_ALL=C.UTF-8 LANG=zh_CN.UTF-8 LANGUAGE=zh_CN", False),
        ("LC_ALL=POSIX LANG=zh_CN.UTF-8", False),
    ],
)
def test_the_variables_that_gettext_asks_say_which_language_it_is(variables, is_chinese, monkeypatch):
    for name in CHINESE:
        monkeypatch.delenv(name, raising=False)
    for name, value in (variable.split("=") for variable in variables.split()):
        monkeypatch.setenv(name, value)
    assert languages.is_chinese() == is_chinese


@pytest.mark.parametrize(("locale", "is_chinese"), [("zh_CN", True), ("en_US", False)])
def test_where_no_variable_is_set_the_system_says(locale, is_chinese, monkeypatch):
    for name in CHINESE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(languages, "system_locale", lambda: locale)
    assert languages.is_chinese() == is_chinese


@pytest.mark.parametrize(("number", "locale"), [(0x0804, "zh_CN"), (0x0404, "zh_TW"), (0x0409, "en_US"), (0xFFFF, "C")])
def test_windows_has_numbers_for_languages(number, locale, monkeypatch):
    kernel32 = types.SimpleNamespace(GetUserDefaultUILanguage=lambda: number)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        patch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel32), raising=False)
        said = languages.system_locale()
    assert said == locale


def test_nothing_is_read_for_those_who_read_english(monkeypatch):
    monkeypatch.setattr(languages, "CATALOGUE", "is not there")
    languages.wordings.cache_clear()
    assert languages.translated("no token ids") == "no token ids"


def test_neither_importing_nor_a_message_changes_the_programs_locale():
    code = (
        "import locale; before = locale.setlocale(locale.LC_ALL)\n"
        "import cli, encoder, explore, gpt2, utils, languages, files.download, backends.devices\n"
        "assert languages.translated('it is empty') != 'it is empty'\n"
        "assert locale.setlocale(locale.LC_ALL) == before"
    )
    result = command(code=code, env=CHINESE | {"PYTHONIOENCODING": "utf-8"}, cwd=REPO)
    assert (result.returncode, result.stderr) == (0, "")


# what is said


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("it is empty", "它是空的"),
        ("a.txt cannot be read: it is empty", "无法读取 a.txt：它是空的"),
        ("this is not in the catalogue", "this is not in the catalogue"),
        (
            "'it is empty' is no model name: it must be a folder inside 'm'",
            "'it is empty' 不是模型名：它必须是 'm' 里的一个文件夹",
        ),
        ("FLAGS cannot be read: it is empty", "无法读取 FLAGS：它是空的"),
        (
            '3 of 10 prompts could not be continued: their lines have an "error"',
            '10 条提示中有 3 条无法续写：输出里相应的行有 "error"',
        ),
        ("step 3: held out 1.2 nats per token", "第 3 步：留出部分：每词元 1.2 nats"),
        ("{0} {} is given twice", "{0} {} 给了两次"),
        (
            "could not download a from http://h/a: 'http://h/a' is refused: files are fetched over https only, or from "
            "this machine; nor a from https://m/a: 12 bytes are missing; run it again to go on from here (mirrors, and "
            "by hand: see models/README.md)",
            "下载失败：a，来自 http://h/a：'http://h/a' 被拒绝：只通过 https 下载，或者从本机下载；"
            "还试了 a，来自 https://m/a：12 字节没有收到；再运行一次就会接着下载"
            "（镜像和手工下载见 models/README.zh-CN.md）",
        ),
    ],
)
def test_a_text_is_translated_and_what_stands_in_it_too_but_for_names_and_what_was_typed(english, chinese, in_chinese):
    assert languages.translated(english) == chinese


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        (
            "more than one prompt, 'a and b' and 'c, d and e': put one of several words in double quotes",
            "prompt 只能有一个，却给了 'a and b' 和 'c, d and e'：文本里若有空格，请用双引号括起来",
        ),
        (
            "more than one prompt, \"it's a and b\" and 'a\\'s \" and c': put one of several words in double quotes",
            "prompt 只能有一个，却给了 \"it's a and b\" 和 'a\\'s \" and c'：文本里若有空格，请用双引号括起来",
        ),
        ("'a has b' cannot be read: 'it is empty'", "无法读取 'a has b'：'it is empty'"),
        ("'a' cannot be read: its header is no object", "无法读取 'a'：它的文件头不是对象"),
        ('5" cannot be read: it is empty', '无法读取 5"：它是空的'),
        ("'s cannot be read: it is empty", "无法读取 's：它是空的"),
    ],
)
def test_what_is_in_quotes_is_one_thing_and_is_never_translated(english, chinese, in_chinese):
    assert languages.translated(english) == chinese


def test_a_name_that_reads_like_a_sentence_stays(in_chinese):
    said = "no encoder.json and vocab.bpe in the output; shakespeare has its own"
    assert languages.translated(said) == "the output 里没有 encoder.json 和 vocab.bpe；shakespeare 有自己的"


@pytest.mark.parametrize(
    "part",
    [
        "a is b: c has d ",
        "a cannot be read: ",
        "' ",
        "\" ' ",
        "\\' ",
        "a: ",
        " and ",
        "{} ",
        "a from b/c/",
        "; nor could not ",
    ],
)
@pytest.mark.parametrize("last", ["", "\\", ": trying another source"])
def test_a_long_text_of_whatever_kind_takes_no_time(part, last):
    languages.look_up("the catalogue is read")
    text = part * (100_000 // len(part)) + last
    start = time.process_time()
    languages.look_up(text)
    assert time.process_time() - start < 0.5


def test_a_text_of_more_than_2000_characters_is_as_it_was(in_chinese):
    def said(length):
        return "x cannot be read: it is empty".replace("x", "x" * (length - 28))

    assert HAN.search(languages.translated(said(2000)))
    assert languages.translated(said(2001)) == said(2001)


MISTAKES = {
    "--nope": "没有 --nope 这个参数",
    "--temperatur 1": "是不是想写 --temperature？",
    "hello world": "请用双引号括起来",
    "a --top_k 3": "温度为 0 时总取最可能的词元，--top_k 不起作用",
    "a --temperature x": "temperature 必须是 0",
    "a --n_samples 2": "请加上 --temperature=1",
    "a --model_size nowhere": "没有模型 'nowhere'：可以选",
    "a --model_size ../up": "不是模型名",
    "a --out b": "没有 --prompts_file，--out 不起作用",
    "--prompts_file none.txt": "无法读取 none.txt：没有这个文件或文件夹",
    "a --stop ": "后面要有一个值",
    "a --stop ['']": "--stop 必须是一段文本",
    "a --backend torch": "backend 只能是 numpy、jax 或 cupy，不能是 'torch'",
    "a --n_tokens_to_generate -1": "必须是不小于 0 的整数，不能是 -1",
    "a --n_tokens_to_generate 70": "超出了模型 64 个词元的上下文",
    "a --stream --interactive --n_samples 3": "不能一起用",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_one_line_in_chinese(flags, tiny):
    given = {} if "--model_size" in flags else {"model": tiny}
    result = command(*flags.split(" "), env=CHINESE, **given)
    assert_one_line_error(result, MISTAKES[flags])
    assert result.stderr.startswith("gpt2.py: ")


def test_a_flag_of_the_explorer_has_its_dashes_in_chinese_too(tiny):
    result = command("--block=3", script="explore.py", model=tiny, env=CHINESE)
    assert_one_line_error(result, "explore.py: --block 必须是 0 到 2 之间的整数，不能是 3")


def test_the_text_that_is_generated_is_the_same_in_every_language(run):
    assert run("hello", env=CHINESE).stdout == run("hello").stdout


def test_a_note_and_the_answer_of_a_command_are_in_chinese(tiny):
    assert command("hi", script="encoder.py", env=CHINESE, model=tiny).stderr == "encoder.py: 2 个字符，2 个词元\n"
    flags = "--model_size", tiny.name, "--models_dir", tiny.parent
    assert "已核对无误" in command(*flags, script="utils.py", env=CHINESE).stdout


def test_help_is_in_chinese(tiny):
    assert "续写多少个词元" in command("--help", env=CHINESE).stdout
    assert "how many tokens to append" in command("--help").stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_stream_cannot_show_stays_english(encoding):
    result = command("--nope", env=CHINESE | {"PYTHONIOENCODING": encoding})
    assert_one_line_error(result, "unknown flag --nope")
    assert "how many tokens to append" in command("--help", env=CHINESE | {"PYTHONIOENCODING": encoding}).stdout
