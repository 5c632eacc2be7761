"""python gpt2.py, run as a subprocess on small models."""

import fcntl
import inspect
import os
import pathlib
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import HPARAMS, REPO, assert_one_line_error, command, write_tokenizer

import checkpoint
import gpt2
import utils

N = 12
COMMAND = [sys.executable, str(REPO / "gpt2.py")]


@pytest.fixture
def run(models_dir):
    """Runs gpt2.py on the tiny model; a later argument of the same name would be an error, so pass what differs."""

    def run(*args, model="tiny", **kwargs):
        options = ["--model_size", model, "--models_dir", models_dir]
        return command(*args, *options, **kwargs)

    return run


@pytest.fixture(scope="module")
def continuation(models_dir):
    """What greedy decoding appends to a prompt, computed in this process."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params("tiny", models_dir)

    def continuation(prompt, n=N):
        ids = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]
        return encoder.decode(gpt2.generate(ids, params, hparams["n_head"], n))

    return continuation


# Text


def test_stdout_gets_the_text_and_a_newline_and_stderr_nothing(run, continuation):
    result = run("Hello", "--n_tokens_to_generate", str(N))
    assert result.stdout == continuation("Hello") + "\n"
    assert (result.stderr, result.returncode) == ("", 0)


def test_forty_tokens_are_the_default(run, continuation):
    assert run("Hello").stdout == continuation("Hello", 40) + "\n"


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
    result = run(prompt, f"--n_tokens_to_generate={N}")
    assert (result.stdout, result.stderr) == (continuation(prompt) + "\n", "")


@pytest.mark.parametrize("prompt", ["--hello", "-x", "--prompt=1", "True"])
def test_a_prompt_given_as_a_flag_may_begin_with_dashes(prompt, run, continuation):
    assert run(f"--prompt={prompt}", f"--n_tokens_to_generate={N}").stdout == continuation(prompt) + "\n"


def test_an_empty_prompt_generates_from_endoftext(run, continuation):
    assert run("", "--n_tokens_to_generate", str(N)).stdout == continuation("") + "\n"


def test_nothing_to_generate_prints_an_empty_line(run):
    assert run("Hello", "--n_tokens_to_generate", "0").stdout == "\n"


def test_text_that_the_terminal_cannot_show_is_no_error(run):
    result = run("é", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (result.stderr, result.returncode) == ("", 0)


# Models


def test_models_are_found_beside_gpt2_py_from_any_working_directory(models_dir, tmp_path, continuation):
    for path in REPO.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "models").symlink_to(models_dir)
    program = [sys.executable, tmp_path / "gpt2.py", "Hello", "--n_tokens_to_generate", str(N), "--model_size", "tiny"]
    assert subprocess.check_output(program, cwd="/").decode() == continuation("Hello") + "\n"


def test_the_first_run_reads_the_checkpoint_without_a_word_from_tensorflow(model_dir, continuation):
    options = ["--n_tokens_to_generate", str(N), "--model_size", "tiny", "--models_dir", str(model_dir.parent)]
    result = command("Hello", *options)
    assert (result.stdout, result.stderr) == (continuation("Hello") + "\n", "")


def test_an_unknown_model_is_an_error(run):
    assert_one_line_error(run("Hello", model="nonsense"), "no model 'nonsense': choose 124M, 355M, 774M, 1558M")


def test_a_broken_model_is_an_error(model_dir):
    (model_dir / "hparams.json").write_text("{")
    result = command("Hello", "--model_size", "tiny", "--models_dir", str(model_dir.parent))
    assert_one_line_error(result, "hparams.json cannot be read")


# Mistakes


@pytest.mark.parametrize("n", ["-1", "2.5", "forty", "True", "[4]", "1e2", ""])
def test_a_number_of_tokens_that_is_no_whole_number_is_an_error(n, run):
    assert_one_line_error(run("Hello", f"--n_tokens_to_generate={n}"), "n_tokens_to_generate must be a whole number")


def test_prompt_and_tokens_fill_the_context_exactly_and_no_further(run, models_dir):
    encoder = utils.load_encoder_hparams_and_params("tiny", models_dir)[0]
    n_prompt = len(encoder.encode("Hello, world"))
    room = HPARAMS["n_ctx"] - n_prompt
    assert run("Hello, world", "--n_tokens_to_generate", str(room)).returncode == 0
    message = f"the prompt's {n_prompt} tokens and the {room + 1} to generate are more than the model's context of 64"
    assert_one_line_error(run("Hello, world", "--n_tokens_to_generate", str(room + 1)), message)


def test_an_absurd_number_of_tokens_is_an_error(run):
    assert_one_line_error(run("Hello", "--n_tokens_to_generate", "9" * 50), "more than the model's context of 64")


@pytest.mark.parametrize("prompt", ["--hello world", "--hello", "-hello"])
def test_a_bare_prompt_that_begins_with_dashes_is_an_error_that_says_how_to_give_it(prompt, run):
    assert_one_line_error(run(prompt), f"is given as --prompt={prompt!r}")


def test_an_unknown_flag_is_an_error_before_anything_is_loaded(run):
    assert_one_line_error(run("Hello", "--temprature", "1", model="nonsense"), "unknown flag --temprature")


def test_a_flag_that_is_nearly_one_gets_a_hint(run):
    assert_one_line_error(run("Hello", "--temprature", "1", model="nonsense"), "did you mean --temperature?")


def test_a_flag_given_twice_is_an_error(run):
    assert_one_line_error(run("Hello", "--stop", "And", "--stop", "zzz"), "--stop is given twice")


@pytest.mark.parametrize("flag", ["--top_k=5", "--top_p=0.5", "--seed=1", "--n_samples=2"])
def test_a_flag_that_would_do_nothing_at_temperature_0_is_an_error(flag, run):
    name = flag.split("=")[0]
    assert_one_line_error(run("Hello", flag), f"{name} does nothing at a temperature of 0")


def test_words_without_quotes_around_them_are_an_error_that_says_so(run):
    assert_one_line_error(run("Alan", "Turing"), "put quotes around")


def test_a_flag_without_its_value_is_an_error(models_dir):
    result = command("Hello", "--model_size")
    assert_one_line_error(result, "--model_size needs a value")


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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_the_shell_closed_is_no_error(closed, models_dir):
    options = ["--n_tokens_to_generate", "3", "--model_size", "tiny", "--models_dir", str(models_dir)]
    program = " ".join(map(shlex.quote, [*COMMAND, "Hello", *options]))
    result = subprocess.run(["bash", "-c", f"{program} {closed}"], capture_output=True, text=True)
    assert (result.stderr, result.returncode) == ("", 0)


def test_a_full_disk_is_an_error(models_dir):
    options = ["--n_tokens_to_generate", "3", "--model_size", "tiny", "--models_dir", str(models_dir)]
    with open("/dev/full", "w") as full:
        result = subprocess.run([*COMMAND, "Hello", *options], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.stderr, result.returncode) == ("gpt2.py: no space left for the output\n", 1)


def test_a_flag_in_the_place_of_a_number_is_an_error(run):
    assert_one_line_error(run("Hello", "--temperature", "--seed", "1"), "--temperature needs a value")


def test_a_bug_keeps_its_traceback(run, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import json; json.load = lambda f: 1 / 0")
    result = run("Hello", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


# Terminals, pipes and signals


def on_a_terminal(command, until=None):
    """Runs a command with stderr on a pseudo-terminal; sends it Ctrl-C's signal once `until` appears there."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    stderr = b""
    while True:
        try:
            stderr += os.read(master, 10_000)
        except OSError:  # the other end is closed
            break
        if until and until in stderr:
            process.send_signal(signal.SIGINT)
            until = None
    os.close(master)
    stdout = process.communicate(timeout=60)[0]
    return stdout, stderr.decode(), process.returncode


def test_a_bar_named_generating_shows_on_a_terminal(models_dir, continuation):
    options = ["--n_tokens_to_generate", str(N), "--model_size", "tiny", "--models_dir", str(models_dir)]
    stdout, stderr, status = on_a_terminal([*COMMAND, "Hello", *options])
    assert (stdout, status) == (continuation("Hello") + "\n", 0)
    assert "generating: 100%" in stderr
    assert f"{N}/{N}" in stderr


def test_ctrl_c_while_generating_shows_what_there_is_and_ends_with_130(models_dir):
    options = ["--n_tokens_to_generate", "190000", "--model_size", "long", "--models_dir", str(models_dir)]
    stdout, stderr, status = on_a_terminal([*COMMAND, "Hello", *options], until=b"| 1")  # some of 190000
    assert status == 130
    assert len(stdout) > 1
    assert "Traceback" not in stderr


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.6])
def test_ctrl_c_at_any_moment_leaves_no_traceback(seconds, models_dir):
    options = ["--n_tokens_to_generate", "190000", "--model_size", "long", "--models_dir", str(models_dir)]
    process = subprocess.Popen([*COMMAND, "Hello", *options], stderr=subprocess.PIPE, text=True)
    while not catches_sigint(process.pid):
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 130)


def catches_sigint(pid):
    """Whether Python has started far enough to have a handler: until then, the signal itself ends the process."""
    caught = re.search(r"SigCgt:\s*(\w+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (signal.SIGINT - 1) & 1)


def test_a_closed_pipe_ends_silently(models_dir):
    reader, writer = os.pipe()
    os.close(reader)
    options = ["--n_tokens_to_generate", str(N), "--model_size", "tiny", "--models_dir", str(models_dir)]
    result = subprocess.run([*COMMAND, "Hello", *options], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.stderr == ""
    assert result.returncode == 1


def test_a_genuine_prompt_of_a_genuine_vocabulary_runs(tmp_path):
    hparams = HPARAMS | {"n_vocab": 50257}
    checkpoint.save_checkpoint(tmp_path / "genuine", hparams, checkpoint.random_params(hparams))
    write_tokenizer(tmp_path / "genuine", 50257)
    prompt = "Alan Turing theorized that computers would one day become"
    assert command(prompt, "--model_size", "genuine", "--models_dir", str(tmp_path)).returncode == 0


@pytest.mark.parametrize("chosen", [None, "Haswell"])
def test_openblas_is_told_of_avx512_where_linux_says_the_processor_has_it_unless_told_otherwise(chosen):
    code = "import os, cli; cli.take_avx512(); print(os.environ.get('OPENBLAS_CORETYPE'))"
    env = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    env |= {"OPENBLAS_CORETYPE": chosen} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True)
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    expected = "SkylakeX" if flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl"} else None
    assert done.stdout == f"{chosen or expected}\n"


def test_numpy_is_not_imported_before_that():
    code = "import sys, gpt2, cli; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "False\n"
