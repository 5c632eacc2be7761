"""python gpt2.py, run as a subprocess on small models."""

import inspect
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import (
    HPARAMS,
    REPO,
    TIMEOUT,
    N,
    assert_one_line_error,
    command,
    copy_code,
    interrupt,
    link,
    needs_posix,
    on_a_terminal,
    running,
    wait_until,
    write_model,
)

import cli
import gpt2
import utils
from files import checkpoint

# Text


def test_stdout_gets_the_text_and_a_newline_and_stderr_nothing(run, continuation):
    result = run("Hello", "--n_tokens_to_generate", "12", n=None)
    assert result.stdout == continuation("Hello", 12) + "\n"
    assert (result.stderr, result.returncode) == ("", 0)


def test_forty_tokens_are_the_default(run, continuation):
    assert run("Hello", n=None).stdout == continuation("Hello", 40) + "\n"


PROMPTS = [
    "Hello, world",
    "1984",
    "True",
    "None",
    "[1, 2]",
    "{}",
    "(",
    "'q'",
    '"',
    "-5",
    "a=b",
    "#",
    "1e3",
    "0x1F",
]
PROMPTS += ["two\nlines\\n", " spaces ", "平方 é 😀", "<|endoftext|>", 'it\'s "quoted"']


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_stays_the_text_that_was_typed(prompt, run, continuation):
    result = run(prompt)
    assert (result.stdout, result.stderr) == (continuation(prompt) + "\n", "")


@pytest.mark.parametrize("prompt", ["--hello", "-x", "--prompt=1", "True"])
def test_a_prompt_given_as_a_flag_may_begin_with_dashes(prompt, run, continuation):
    assert run(f"--prompt={prompt}").stdout == continuation(prompt) + "\n"


def test_an_empty_prompt_generates_from_endoftext(run, continuation):
    assert run("").stdout == continuation("") + "\n"


def test_nothing_to_generate_prints_an_empty_line(run):
    assert run("Hello", n=0).stdout == "\n"


def test_what_the_terminal_cannot_show_is_a_question_mark_and_no_error(run, continuation):
    text = continuation("é")
    assert not text.isascii()
    result = run("é", env={"PYTHONIOENCODING": "ascii"})
    assert result.stdout == re.sub("[^\0-\x7f]", "?", text) + "\n"
    assert (result.stderr, result.returncode) == ("", 0)


IN_CHINESE = """
import runpy, sys
for stream in (sys.stdin, sys.stdout, sys.stderr):
    stream.reconfigure(encoding="cp936", errors="strict")  # as files and pipes are on a Chinese Windows
sys.argv[0] = "gpt2.py"
runpy.run_path("gpt2.py", run_name="__main__")
"""


def test_files_and_pipes_are_utf8_whatever_the_systems_language(tiny, continuation):
    assert not continuation("é").isascii()
    result = command("é", code=IN_CHINESE, cwd=REPO, model=tiny, n=N)
    assert (result.stdout, result.stderr) == (continuation("é") + "\n", "")


def test_so_is_what_is_said_of_a_mistake(models_dir):
    assert_one_line_error(command("Hello", code=IN_CHINESE, cwd=REPO, model=models_dir / "模型"), "no model '模型'")


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "cp936"}, {"PYTHONUTF8": "0"}], ids=str)
@pytest.mark.parametrize("args", [["é"], []], ids=["as an argument", "in a pipe"])
def test_unless_the_user_says_otherwise(env, args, tiny, continuation):
    with running(*args, code=IN_CHINESE, cwd=REPO, model=tiny, n=N, env=env) as process:
        stdout, _ = process.communicate(b"" if args else "é".encode("cp936"), TIMEOUT)
    assert stdout.decode("cp936").replace(os.linesep, "\n") == known_to("cp936", continuation("é")) + "\n"


def known_to(encoding, text):
    return text.encode(encoding, "replace").decode(encoding)


# Models


def test_models_are_found_beside_gpt2_py_from_any_working_directory(models_dir, tmp_path, continuation):
    copy_code(tmp_path)
    link(tmp_path / "models", models_dir)
    result = command("Hello", "--model_size", "tiny", script=tmp_path / "gpt2.py", n=N, cwd="/")
    assert result.stdout == continuation("Hello") + "\n"


def test_the_first_run_verifies_the_checkpoint_without_a_word(model_dir, continuation):
    result = command("Hello", model=model_dir, n=N)
    assert (result.stdout, result.stderr) == (continuation("Hello") + "\n", "")


def test_an_unknown_model_is_an_error(models_dir):
    assert_one_line_error(
        command("Hello", model=models_dir / "nonsense"), "no model 'nonsense': choose 124M, 355M, 774M, 1558M"
    )


def test_a_broken_model_is_an_error(model_dir):
    (model_dir / "hparams.json").write_text("{")
    assert_one_line_error(command("Hello", model=model_dir), "hparams.json cannot be read")


# Mistakes


@pytest.mark.parametrize("n", ["-1", "2.5", "forty", "True", "[4]", "1e2"])
def test_a_number_of_tokens_that_is_no_whole_number_is_an_error(n, run):
    assert_one_line_error(run("Hello", n=n), "--n_tokens_to_generate must be a whole number")


def test_prompt_and_tokens_fill_the_context_exactly_and_no_further(run, models_dir):
    encoder = utils.load_encoder_hparams_and_params("tiny", models_dir)[0]
    n_prompt = len(encoder.encode("Hello, world"))
    room = HPARAMS["n_ctx"] - n_prompt
    assert run("Hello, world", n=room).returncode == 0
    message = f"prompt and continuation, {n_prompt} + {room + 1} tokens, are more than the model's context of 64 holds"
    assert_one_line_error(run("Hello, world", n=room + 1), message)


@pytest.mark.parametrize(
    ("n_digits", "said"), [(18, "more than the model's context of 64"), (50, "must be a whole number")]
)
def test_an_absurd_number_of_tokens_is_an_error(n_digits, said, run):
    assert_one_line_error(run("Hello", n="9" * n_digits), said)


@pytest.mark.parametrize("prompt", ["--hello world", "--hello", "-hello"])
def test_a_bare_prompt_that_begins_with_dashes_is_an_error_that_says_how_to_give_it(prompt, run):
    assert_one_line_error(run(prompt), f"is given as --prompt={prompt!r}")


def test_an_unknown_flag_is_an_error_before_anything_is_loaded(models_dir):
    result = command("Hello", "--temprature", "1", model=models_dir / "nonsense")
    assert_one_line_error(result, "unknown flag --temprature")


def test_a_flag_that_is_nearly_one_gets_a_hint(run):
    assert_one_line_error(run("Hello", "--temprature", "1"), "did you mean --temperature?")
    assert_one_line_error(run("Hello", "--model", "tiny"), "did you mean --model_size or --models_dir?")
    assert_one_line_error(run("Hello", "--prompt_file", "a"), "did you mean --prompts_file")


def test_a_flag_given_twice_is_an_error(run):
    assert_one_line_error(run("Hello", "--stop", "And", "--stop", "zzz"), "--stop is given twice")


@pytest.mark.parametrize("flag", ["--top_k=5", "--top_p=0.5", "--seed=1", "--n_samples=2"])
def test_a_flag_that_would_do_nothing_at_temperature_0_is_an_error(flag, run):
    name = flag.split("=")[0].removeprefix("--")
    assert_one_line_error(run("Hello", flag), f"gpt2.py: --{name} does nothing at a temperature of 0")


def test_what_a_terminal_would_obey_is_not_printed_raw(run, tmp_path):
    evil = "\x1b]0;owned\x07\x9b2J\x7f\u202e"
    for result in (run("Hello", f"--{evil}=1"), run("--prompts_file", tmp_path / evil)):
        assert_one_line_error(result, "?]0;owned??2J??")
        assert result.stderr.rstrip("\n").isprintable()


def test_a_text_is_printable_on_one_line():
    assert cli.printable("a\x1b[2Jé\n\u3000平\udcff") == "a?[2Jé  平?"


def test_words_without_quotes_around_them_are_an_error_that_says_so(run):
    assert_one_line_error(run("Alan", "Turing"), "in double quotes\n")
    assert_one_line_error(run("", "Turing"), "in double quotes\n")
    assert_one_line_error(run("“Alan", "Turing”"), "for a letter: use straight ones, as in code\n")


@pytest.mark.parametrize("flag", ["—temperature", "——temperature=1", "–n-samples"])
def test_a_flag_whose_hyphens_became_dashes_is_an_error_that_shows_it(flag, run):
    name = flag.strip("–—").partition("=")[0].replace("-", "_")
    assert_one_line_error(run("Hello", flag), f"gpt2.py: {flag}: flags begin with two hyphens: --{name}\n")
    assert run(f"{flag[0]}Temperature").returncode == 0  # a prompt may begin so


def test_a_flag_without_its_value_is_an_error():
    assert_one_line_error(command("Hello", "--model_size"), "--model_size needs a value")


def test_a_prompt_that_is_no_unicode_is_an_error(run):
    assert_one_line_error(run(b"caf\xe9"), "not valid Unicode")


def test_no_prompt_at_all_is_an_error(run):
    assert_one_line_error(run(), "no prompt: give one in quotes")


def test_help_explains_every_flag():
    result = command("--help")
    assert result.returncode == 0
    for name in inspect.signature(gpt2.main).parameters:
        flag = re.search(rf"--{name}=\w+\n(?: +(?:Type|Default).*\n)* +(.+)\n", result.stdout)
        assert flag, name
        assert len(flag[1]) > 20


def test_the_short_flag_of_help_is_offered_for_nothing_else():
    shown = command("--help", script="examples/evaluate.py").stdout
    assert "    --heatmap=" in shown
    assert "-h, " not in shown


def test_fire_which_draws_the_help_and_takes_long_to_import_is_not_imported_for_a_text(models_dir):
    code = f"""
import sys, cli, gpt2
sys.argv = ["gpt2.py", "Hello", "--model_size=tiny", "--models_dir", {str(models_dir)!r}]
cli.run(gpt2.main)
print([*{{"fire", "asyncio"}} & {{*sys.modules}}], file=sys.stderr)
"""
    assert command(code=code, cwd=REPO).stderr == "[]\n"


def plan(text: str, n: int, rate: float = 0.5, sizes: tuple = (), name: str = None, quiet: bool = False):
    pass


@pytest.mark.parametrize(
    ("line", "words", "flags"),
    [
        (["1984", "--n=3"], ["1984"], {"n": 3}),
        (["[1, 2]", "--n", "0x10", "--name", "7"], ["[1, 2]"], {"n": 16, "name": "7"}),
        (["x", "--n=1e3", "--sizes=(1, 2)", "--quiet"], ["x"], {"n": 1000.0, "sizes": (1, 2), "quiet": True}),
        (["x", "--n=ten", "--rate", "-1", "--quiet=False"], ["x"], {"n": "ten", "rate": -1, "quiet": False}),
        (["x", "--n={[]: 1}", "--sizes=" + "[" * 10_000], ["x"], {"n": "{[]: 1}", "sizes": "[" * 10_000}),
        (["x", "--n=__import__('os').getpid()"], ["x"], {"n": "__import__('os').getpid()"}),
    ],
)
def test_a_value_is_what_python_makes_of_it_or_the_text_and_of_a_text_always_that(line, words, flags):
    assert cli.arguments(line, plan) == (words, flags)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_the_shell_closed_is_no_error(closed, run):
    result = run("Hello", through=["bash", "-c", f'"$@" {closed}', "bash"])
    assert (result.stderr, result.returncode) == ("", 0)


def test_a_full_disk_is_an_error(run):
    needs_posix("/dev/full")
    with open("/dev/full", "w") as full:
        result = run("Hello", stdout=full)
    assert (result.stderr, result.returncode) == ("gpt2.py: no space left for the output\n", 1)


def test_a_flag_in_the_place_of_a_number_is_an_error(run):
    assert_one_line_error(run("Hello", "--temperature", "--seed", "1"), "--temperature needs a value")


def test_a_run_that_needs_more_memory_than_the_machine_has_is_an_error_beforehand(params):
    wpe = np.broadcast_to(np.float32(0), (10**6, HPARAMS["n_embd"]))
    with pytest.raises(MemoryError, match=r"1000 texts of 1000000 tokens at once need 1788.\d GiB, and there are \d+"):
        gpt2.generate([[1]] * 1000, params | {"wpe": wpe}, HPARAMS["n_head"], 10**6 - 1)


def test_memory_that_runs_out_is_an_error(long):
    limited = ["bash", "-c", 'ulimit -v 4000000; exec "$@"', "-"]
    samples = ["--n_samples=300", "--temperature=1"]  # 7 GB of cache
    result = command("Hello", *samples, model=long, n=190_000, through=limited, env={"OPENBLAS_NUM_THREADS": "1"})
    assert_one_line_error(result, "not enough memory")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 640B"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("INTERNAL: a bug"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_memory_that_runs_out_has_many_names(error, expected):
    assert cli.is_out_of_memory(error) is expected


def test_memory_that_runs_out_on_jaxs_device_is_an_error():
    pytest.importorskip("jax")
    code = "import cli, jax\ndef fill(n: int = 2**50):\n    jax.numpy.zeros(n).block_until_ready()\ncli.run(fill)"
    result = command(code=code, cwd=REPO, env={"JAX_PLATFORMS": "cpu"})
    assert_one_line_error(result, "not enough memory on the device: take fewer at once, or a smaller model: RESOURCE")


def test_a_package_that_is_not_installed_is_an_error_that_names_it():
    bare = [sys.executable, "-S", REPO / "gpt2.py", "Hello"]  # without those of its environment
    result = subprocess.run(bare, capture_output=True, text=True)
    assert_one_line_error(
        result, "gpt2.py: numpy is not installed here: activate its environment, or pip install numpy regex requests"
    )


def test_a_command_needs_numpy_2(monkeypatch):
    cli.need("numpy")
    monkeypatch.setattr(np, "__version__", "1.26.4")
    with pytest.raises(SystemExit, match=r"NumPy 2\.0 or newer is needed, and this is 1\.26\.4: pip install -U numpy"):
        cli.need("numpy")


def test_a_python_that_is_too_old_is_an_error():
    code = """
import collections, sys
sys.version_info = collections.namedtuple("version", "major minor")(3, 9)
sys.argv = ["gpt2.py", "Hello"]
import cli, gpt2
cli.run(gpt2.main)
"""
    result = command(code=code, cwd=REPO)
    assert_one_line_error(result, "gpt2.py: needs Python 3.10 or newer, and this is ")


def test_cli_py_is_no_command_and_says_where_to_go():
    assert_one_line_error(command(script="cli.py"), "see python gpt2.py --help")


def test_a_bug_keeps_its_traceback(run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import json; json.load = lambda f: 1 / 0")
    result = run("Hello", env={"PYTHONPATH": str(tmp_path)})
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    ("system", "line"),
    [("posix", "python 'C:\\a b\\x.py' '--name=it'\"'\"'s'"), ("nt", 'python "C:\\a b\\x.py" --name=it\'s')],
)
def test_a_command_to_be_typed_is_quoted_as_its_systems_shell_has_it(system, line, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "name", system)
        typed = cli.as_typed(["python", r"C:\a b\x.py", "--name=it's"])
    assert typed == line


# Terminals, pipes and signals


def test_an_error_of_the_system_that_is_no_closed_pipe_keeps_its_traceback():
    code = """
import cli, sys
sys.argv[1:] = ["x"]
def main(prompt: str):
    raise OSError(5, "Input/output error")
cli.run(main)
"""
    result = command(code=code, cwd=REPO)
    assert result.stderr.splitlines()[-1] == "OSError: [Errno 5] Input/output error"


def test_a_bar_named_generating_shows_on_a_terminal(tiny, continuation):
    with on_a_terminal("Hello", model=tiny, n=N, stdout=subprocess.PIPE) as (process, terminal):
        terminal.expect(f"generating: 100%.* {N}/{N} ")
        assert process.communicate(timeout=TIMEOUT)[0].decode() == continuation("Hello") + "\n"
    assert process.returncode == 0


def test_a_bar_is_left_out_where_tqdms_variable_says_so_and_speaks_the_users_language(tiny):
    chinese = {"LANG": "zh_CN.UTF-8", "LC_ALL": "", "LC_MESSAGES": "", "LANGUAGE": "", "PYTHONIOENCODING": "utf-8"}
    for env, seen in ({"TQDM_DISABLE": "1"}, ""), (chinese, "正在生成: 100%"):
        with on_a_terminal("Hello", model=tiny, n=N, stdout=subprocess.PIPE, env=env) as (process, terminal):
            assert process.communicate(timeout=TIMEOUT)[0]
            said = terminal.read()
        assert seen in said if seen else said == ""


def test_bars_leave_tqdm_and_what_outlives_a_process_that_is_killed_alone():
    code = """if True:
        from files.bar import Bar
        from tqdm import std
        Bar.write(str(len([*Bar(range(3))])))
        print(hasattr(std.TqdmDefaultWriteLock, "mp_lock"), hasattr(std.tqdm, "_lock"))"""
    assert command(code=code, cwd=REPO).stdout == "3\nFalse False\n"


def test_ctrl_c_while_generating_shows_what_there_is_and_ends_with_130(long):
    with on_a_terminal("Hello", model=long, n=190_000, stdout=subprocess.PIPE) as (process, terminal):
        terminal.expect(r"\| [1-9]")  # some of 190000
        terminal.send("\x03")
        assert len(process.communicate(timeout=TIMEOUT)[0]) > 1
        assert "Traceback" not in terminal.read()
    assert process.returncode == 130


def wait_for_numpy(process):
    """Until it is imported, as Linux tells."""
    needs_posix("/proc")
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "_multiarray_umath" in maps.read_text())


@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 0.6])
def test_ctrl_c_from_the_first_import_that_takes_time_on_leaves_no_traceback(seconds, long):
    with running("Hello", model=long, n=190_000) as process:
        wait_for_numpy(process)
        time.sleep(seconds)
        interrupt(process)
        assert process.communicate(timeout=TIMEOUT)[1] == b""
    assert process.returncode == 130


def test_ctrl_c_stays_ignored_where_it_was(long):
    with running("Hello", model=long, n=190_000, through=["sh", "-c", 'trap "" INT; exec "$@"', "-"]) as process:
        wait_for_numpy(process)
        interrupt(process)
        time.sleep(0.5)
        assert process.poll() is None


# In other programs


def test_main_prints_its_text_in_a_thread_and_leaves_signals_as_they_were(models_dir, continuation):
    code = """
import signal, sys, threading
import cli, gpt2
def main():
    gpt2.main("Hello", 20, "tiny", sys.argv[1])
thread = threading.Thread(target=main)
thread.start()
thread.join()
main()
sys.argv = ["gpt2.py", "Hello", "--n_tokens_to_generate=20", "--model_size=tiny", f"--models_dir={sys.argv[1]}"]
cli.run(gpt2.main)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    result = command(models_dir, code=code, cwd=REPO)
    assert result.stdout == 3 * (continuation("Hello") + "\n") + "True\n", result.stderr


def test_the_command_runs_where_stdout_is_not_a_file(models_dir, continuation):
    code = """
import contextlib, io, runpy, sys
sys.argv[0] = "gpt2.py"
with contextlib.redirect_stdout(io.StringIO()) as out:  # as in a notebook, by %run
    runpy.run_path("gpt2.py", run_name="__main__")
sys.stdout.write(out.getvalue())
"""
    result = command("Hello", model=models_dir / "tiny", n=N, code=code, cwd=REPO)
    assert result.stdout == continuation("Hello") + "\n", result.stderr


def test_a_home_folder_behind_an_equals_sign_is_found(models_dir, continuation):
    flags = ["--model_size=tiny", f"--models_dir=~/{models_dir.name}"]
    home = dict.fromkeys(("HOME", "USERPROFILE"), models_dir.parent)  # as POSIX and Windows call it
    result = command("Hello", *flags, n=N, env=home)
    assert result.stdout == continuation("Hello") + "\n", result.stderr


def test_a_closed_pipe_ends_silently(run):
    reader, writer = os.pipe()
    os.close(reader)
    result = run("Hello", stdout=writer)
    os.close(writer)
    assert (result.stderr, result.returncode) == ("", 1)


def test_a_genuine_prompt_of_a_genuine_vocabulary_runs(tmp_path):
    hparams = HPARAMS | {"n_vocab": 50257}
    write_model(tmp_path / "genuine", hparams, checkpoint.random_params(hparams))
    prompt = "Alan Turing theorized that computers would one day become"
    assert command(prompt, model=tmp_path / "genuine").returncode == 0
