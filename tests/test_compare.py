"""tests/reference/compare.py, with a clone written here in TensorFlow 1's style and a docker that answers by rote."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO, command, needs_posix

import utils
from encoder import bytes_to_unicode
from files import checkpoint
from gpt2 import generate, gpt2

COMMIT = "9b63575ef42771a015060c964af2c3da4cf7c8ab"
HPARAMS = {"n_vocab": 257, "n_ctx": 48, "n_embd": 32, "n_head": 4, "n_layer": 2}

MODEL_PY = """
import numpy as np
import tensorflow as tf
from tensorflow.contrib.training import HParams


def default_hparams():
    return HParams(n_vocab=0, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)


def norm(x, scope):
    with tf.variable_scope(scope):
        g, b = tf.get_variable("g", [x.shape[-1].value]), tf.get_variable("b", [x.shape[-1].value])
    mean, variance = tf.nn.moments(x, [-1], keep_dims=True)
    return tf.nn.batch_normalization(x, mean, variance, b, g, 1e-5)


def dense(x, scope, n_out):
    with tf.variable_scope(scope):
        w, b = tf.get_variable("w", [1, x.shape[-1].value, n_out]), tf.get_variable("b", [n_out])
    return tf.tensordot(x, w[0], 1) + b


def attention(x, n_head):
    n_embd = x.shape[-1].value
    parts = tf.split(dense(x, "c_attn", 3 * n_embd), 3, axis=-1)
    q, k, v = (tf.stack(tf.split(part, n_head, axis=-1), axis=1) for part in parts)
    scores = tf.matmul(q, k, transpose_b=True) / np.sqrt(n_embd // n_head)
    hidden = 1 - tf.matrix_band_part(tf.ones_like(scores), -1, 0)
    heads = tf.matmul(tf.nn.softmax(scores - 1e10 * hidden), v)
    return dense(tf.concat(tf.unstack(heads, axis=1), axis=-1), "c_proj", n_embd)


def gelu(x):
    return x * tf.sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3))


def model(hparams, X, past=None, scope="model", reuse=False):
    with tf.variable_scope(scope, reuse=reuse):
        wte = tf.get_variable("wte", [hparams.n_vocab, hparams.n_embd])
        wpe = tf.get_variable("wpe", [hparams.n_ctx, hparams.n_embd])
        x = tf.gather(wte, X) + wpe[: tf.shape(X)[1]]
        for i in range(hparams.n_layer):
            with tf.variable_scope("h%d" % i):
                a = norm(x, "ln_1")
                with tf.variable_scope("attn"):
                    x += attention(a, hparams.n_head)
                m = norm(x, "ln_2")
                with tf.variable_scope("mlp"):
                    x += dense(gelu(dense(m, "c_fc", 4 * hparams.n_embd)), "c_proj", hparams.n_embd)
        return {"logits": tf.tensordot(norm(x, "ln_f"), wte, [[2], [1]])}
"""

SAMPLE_PY = """
import model
import tensorflow as tf

SLIP = None  # the token for which the second best is chosen


def sample_sequence(*, hparams, length, start_token=None, batch_size=None, context=None, temperature=1, top_k=0):
    tokens = context
    for i in range(length):
        logits = model.model(hparams, tokens, reuse=tf.AUTO_REUSE)["logits"][:, -1] / tf.to_float(temperature)
        if i == SLIP:
            logits -= 1e10 * tf.one_hot(tf.argmax(logits, axis=-1), hparams.n_vocab)
        best = tf.nn.top_k(logits, k=top_k)[0][:, -1:]
        logits -= 1e10 * tf.to_float(logits < best)
        tokens = tf.concat([tokens, tf.multinomial(logits, 1, output_dtype=tf.int32)], axis=1)
    return tokens
"""

ENCODER_PY = """
class Encoder:
    encoder = {"<|endoftext|>": 256}

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def get_encoder(model_name, models_dir):
    return Encoder()
"""

DOCKER_PY = """#!{python}
import json, sys

folder = {folder!r}
if sys.argv[1] == "build":
    with open(sys.argv[-1] + "/Dockerfile") as f:
        typed = f.read().splitlines()
else:
    typed = sys.stdin.buffer.read().decode("utf-8").split("\\n")[:-1]
with open(folder + "/calls", "a") as f:
    f.write(json.dumps([sys.argv[1:], typed]) + "\\n")
with open(folder + "/answers") as f:
    answers = json.load(f)
sample = "=" * 40 + " SAMPLE 1 " + "=" * 40 + "\\n"
output = ""
if sys.argv[1] == "build":
    print("sha256:0123456789abcdef")
elif "src/generate_unconditional_samples.py" in sys.argv:
    output = sample + answers[""] + "\\n"
else:
    for prompt in typed:
        output += "Model prompt >>> " + sample + answers[prompt] + "\\n" + "=" * 80 + "\\n"
    output += "Model prompt >>> "
    sys.stderr.write("Traceback (most recent call last):\\nEOFError: EOF when reading a line\\n")
sys.stdout.buffer.write(output.encode("utf-8"))
sys.exit("Model" in output)
"""


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """Holds a model called tiny: one token a byte, random weights, and only ASCII and line ends come out."""
    folder = tmp_path_factory.mktemp("models")
    params = checkpoint.random_params(HPARAMS)
    params["wpe"] *= 5  # GPT-2's own small spread would repeat one token
    for block in params["blocks"]:
        for layer in (*block["attn"].values(), *block["mlp"].values()):
            layer["w"] *= 10
    params["wte"][[i for i in range(257) if not (32 <= i < 127 or i in (10, 13))]] = 0
    checkpoint.save_checkpoint(folder / "tiny", HPARAMS, params)
    tokens = {**{character: byte for byte, character in bytes_to_unicode().items()}, "<|endoftext|>": 256}
    (folder / "tiny" / "encoder.json").write_text(json.dumps(tokens))
    (folder / "tiny" / "vocab.bpe").write_text("#version: 0.2\n")
    utils.load_encoder_hparams_and_params("tiny", str(folder))  # once verified, it loads without TensorFlow
    return folder


def write_clone(folder):
    (folder / "gpt-2" / "src").mkdir(parents=True)
    for name, source in (("model", MODEL_PY), ("sample", SAMPLE_PY), ("encoder", ENCODER_PY)):
        (folder / "gpt-2" / "src" / f"{name}.py").write_text(source)
    return folder / "gpt-2"


@pytest.fixture
def clone(tmp_path):
    return write_clone(tmp_path)


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A folder whose file answers, {prompt: text}, is what docker goes by and whose file calls it writes."""
    needs_posix("programs that begin with #!")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(DOCKER_PY.format(python=sys.executable, folder=str(folder)))
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def needs_tensorflow():
    if not importlib.util.find_spec("tensorflow"):
        pytest.skip("tensorflow is not installed")


def compare(*arguments):
    return command(*arguments, script="tests/reference/compare.py", env={"PYTHONIOENCODING": "utf-8"})


def flags(clone, models_dir, n=8):
    return f"--gpt2_repo={clone}", f"--models_dir={models_dir}", "--model_size=tiny", f"--n_tokens_to_generate={n}"


def continuation(models_dir, prompt, n=8):
    """(ids, the n ids that follow, the logits of every position of both) of the model called tiny."""
    _, hparams, params = utils.load_encoder_hparams_and_params("tiny", str(models_dir))
    ids = list(prompt.encode()) or [256]
    output_ids = generate(ids, params, hparams["n_head"], n)
    return ids, output_ids, gpt2(ids + output_ids, **params, n_head=hparams["n_head"])


def test_clone_that_agrees_is_the_same_for_every_prompt_and_left_as_it_is(models_dir, clone, tmp_path):
    needs_tensorflow()
    (tmp_path / "prompts.txt").write_text("\n日本 😀\n", encoding="utf-8")
    prompts_file = f"--prompts_file={tmp_path / 'prompts.txt'}"
    done = compare("--logits", "1984", "x\n    y", "--prompts=--hi", prompts_file, *flags(clone, models_dir))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\d\. (.*)", done.stdout, re.M) == [
        repr(prompt) for prompt in ("1984", "x\n    y", "--hi", "", "日本 😀")
    ]
    assert done.stdout.count("\n   same\n") == 5
    _, output_ids, _ = continuation(models_dir, "1984")
    assert done.stdout.count(repr(bytes(output_ids).decode())) == 2
    differences = re.findall(r"largest difference (\S+), relative (\S+)", done.stdout)
    assert len(differences) == 5
    assert all(float(absolute) < 1e-4 and float(relative) < 1e-4 for absolute, relative in differences)
    assert sorted(path.name for path in clone.rglob("*")) == ["encoder.py", "model.py", "sample.py", "src"]


@pytest.fixture(scope="module")
def wrong(models_dir, tmp_path_factory):
    """What comes of a clone that errs in the prompt Aha, in the fifth token after any, and in the scale of logits."""
    needs_tensorflow()
    clone = write_clone(tmp_path_factory.mktemp("wrong"))
    for name, right, wrong in (
        ("encoder", "text.encode", "text.replace('A', 'a').encode"),
        ("sample", "SLIP = None", "SLIP = 4"),
        ("model", "[[2], [1]])}", "[[2], [1]]) * 1.5}"),
    ):
        source = (clone / "src" / f"{name}.py").read_text()
        assert right in source
        (clone / "src" / f"{name}.py").write_text(source.replace(right, wrong))
    return compare("--logits", "hello", "Aha", *flags(clone, models_dir))


def test_difference_exits_with_1(wrong):
    assert wrong.returncode == 1, wrong.stderr
    assert wrong.stdout.splitlines()[-1] == "2 prompts, 8 tokens each: 2 of them differ"


def test_table_names_the_first_token_that_differs_and_both_logits_in_both_models(wrong, models_dir):
    ids, output_ids, logits = continuation(models_dir, "hello")
    row = logits[len(ids) + 3]  # from which token 5 is chosen
    second, best = np.argsort(row)[-2:]
    assert best == output_ids[4]
    assert f"token 5 differs: {chr(best)!r}, officially {chr(second)!r}\n" in wrong.stdout
    shown = re.findall(r"logits, (?:this project|official): (\S+) and (\S+), a gap of (\S+)", wrong.stdout)
    expected = np.array([row[best], row[second], row[best] - row[second]])
    np.testing.assert_allclose(np.array(shown, float), [expected, 1.5 * expected], rtol=0.06)


def test_prompt_that_the_encoders_take_for_different_ids_differs(wrong):
    assert "token ids differ: [65, 104, 97], officially [97, 104, 97]" in wrong.stdout


def test_logits_that_differ_are_measured(wrong, models_dir):
    ids, _, logits = continuation(models_dir, "hello")
    largest, relative = re.search(r"of 5 positions: largest difference (\S+), relative (\S+)", wrong.stdout).groups()
    assert float(largest) == pytest.approx(np.abs(logits[: len(ids)]).max() / 2, rel=0.06)
    assert float(relative) == pytest.approx(1 / 3, rel=0.06)


def answers(models_dir, prompts):
    return {prompt: bytes(continuation(models_dir, prompt)[1]).decode() for prompt in prompts}


def test_docker_runs_the_official_script_on_read_only_mounts(models_dir, clone, docker):
    prompts = ["hello", "日本 😀"]
    (docker / "answers").write_text(json.dumps(answers(models_dir, prompts)))
    done = compare("--docker", *prompts, *flags(clone, models_dir))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n   same\n") == 2
    (build, _), (run, typed) = map(json.loads, (docker / "calls").read_text().splitlines())
    assert build[0] == "build"
    assert os.path.samefile(build[-1], REPO / "tests" / "reference")
    image = build[build.index("--tag") + 1]
    script = run.index(image)
    assert run[:script] == [
        "run", "--rm", "--interactive", "--security-opt", "label=disable",
        "--volume", f"{clone}:/gpt-2:ro", "--volume", f"{models_dir}:/models:ro",
    ]  # fmt: skip
    assert run[script + 1 : script + 3] == ["python3", "src/interactive_conditional_samples.py"]
    assert set(run[script + 3 :]) == {"--model_name='tiny'", "--models_dir=/models", "--length=8", "--top_k=1"}
    assert typed == prompts


def test_docker_builds_on_what_was_seen_to_run_the_official_code(models_dir, clone, docker):
    (docker / "answers").write_text(json.dumps(answers(models_dir, ["hello"])))
    compare("--docker", "hello", *flags(clone, models_dir))
    _, lines = json.loads((docker / "calls").read_text().splitlines()[0])
    instructions = "\n".join(line for line in lines if not line.startswith("#"))
    # 1.12 has no tf.sort; its image exists for one kind of processor; Podman knows no registry but one that is named
    assert re.findall(r"^FROM (.*)$", instructions, re.M) == [
        "--platform=linux/amd64 docker.io/tensorflow/tensorflow:1.15.5-py3"
    ]
    # in this order: an older pip does not take regex as a wheel, and the image has no compiler
    installed = re.findall(r"pip install --no-cache-dir (.*?)(?= && |$)", instructions, re.M)
    assert installed == ["pip==21.3.1", "fire==0.4.0 regex==2022.10.31"]


def test_docker_generates_from_nothing_with_the_script_for_that(models_dir, clone, docker):
    (docker / "answers").write_text(json.dumps(answers(models_dir, ["", "hello"])))
    done = compare("--docker", "", "hello", "", *flags(clone, models_dir))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n   same\n") == 3
    calls = [json.loads(line) for line in (docker / "calls").read_text().splitlines()]
    assert [typed for _, typed in calls[1:]] == [["hello"], []]
    assert {"src/generate_unconditional_samples.py", "--nsamples=1"} < set(calls[2][0])


@pytest.mark.parametrize("officially", ["z", "\r"])
def test_docker_names_the_first_token_that_differs_and_its_gap(models_dir, clone, docker, officially):
    ids, output_ids, logits = continuation(models_dir, "hello")
    text = bytes(output_ids).decode()
    assert officially not in text
    (docker / "answers").write_text(json.dumps({"hello": text[:6] + officially + text[7:]}))
    done = compare("--docker", "hello", *flags(clone, models_dir))
    assert done.returncode == 1, done.stderr
    assert f"token 7 differs: {text[6]!r}, officially {officially!r}\n" in done.stdout
    row = logits[len(ids) + 5]
    gap = re.search(r"logits, this project: \S+ and \S+, a gap of (\S+)", done.stdout).group(1)
    assert float(gap) == pytest.approx(row[output_ids[6]] - row[ord(officially)], rel=0.06)


def assert_mistake(done, what):
    """One line for the user, which says what, and a status that is not the one for a difference."""
    assert done.returncode == 2
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("compare.py: ")
    assert what in line
    assert "Traceback" not in done.stderr


def test_podman_does_without_docker_and_without_git(models_dir, clone, docker, monkeypatch):
    (docker / "docker").rename(docker / "podman")
    monkeypatch.setenv("PATH", str(docker))
    (docker / "answers").write_text(json.dumps(answers(models_dir, ["hello"])))
    done = compare("--docker", "hello", *flags(clone, models_dir))
    assert done.returncode == 0, done.stderr


def test_no_engine_is_one_line(models_dir, clone, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_mistake(compare("--docker", "hello", *flags(clone, models_dir)), "neither is on the PATH: install one")


@pytest.mark.parametrize(
    ("verb", "status", "complaint", "advice"),
    [  # the complaints of Docker and of Podman, shortened
        ("build", 1, "NEW\nERROR: Cannot connect to the Docker daemon. Is the docker daemon running?", "start Docker"),
        ("build", 1, "ERROR: failed to connect to the docker API at unix:///run/docker.sock", "start Docker"),
        ("build", 125, "Cannot connect to Podman.\nError: unable to connect to Podman socket", "podman machine start"),
        ("build", 1, "permission denied while trying to connect to the Docker daemon socket", "usermod -aG docker"),
        ("build", 1, 'ERROR: failed to do request: Head "https://registry-1.docker.io": EOF\nView it', "the network"),
        ("build", 125, "Error: creating build container: Get: dial tcp: lookup: no such host", "the network"),
        ("build", 1, "ERROR: No version satisfies fire==0.4.0 (from versions: none)", "the network"),
        ("build", 1, "exec /bin/sh: exec format error", "on Arm"),
        ("build", 1, "ERROR: no space left on device", "could not be built: ERROR"),
        ("run", 134, "compiled to use AVX instructions, but these aren't available\nqemu: Aborted", "on Arm"),
        ("run", 132, "", "on Arm"),
        ("run", 137, "Your CPU supports instructions that were not compiled: AVX2", "memory"),
        (
            "run",
            125,
            "docker: Error response from daemon: no.\nSee 'docker run --help'.",
            "of 1 prompts: docker: Error",
        ),
    ],
)
def test_engine_that_fails_is_one_line_with_its_own_words_and_what_to_do(
    models_dir, clone, docker, verb, status, complaint, advice
):
    script = f'#!/bin/sh\n[ "$1" = {verb} ] || exit 0\necho {shlex.quote(complaint)} >&2\nexit {status}\n'
    (docker / "docker").write_text(script)
    done = compare("--docker", "hello", *flags(clone, models_dir))
    assert_mistake(done, advice)
    lines = complaint.splitlines() or ["no message"]
    own = next((line for line in lines if line.startswith(("ERROR: ", "Error: ", "docker: "))), lines[-1])
    assert f"{own}, exit status {status}" in done.stderr


def git(folder, *arguments):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, check=True, text=True).stdout


def said_of_clone(clone, models_dir):
    """What compare.py says of a clone; a model that does not exist ends it there."""
    done = compare(
        "hello", "--model_size=huge", *[flag for flag in flags(clone, models_dir) if "model_size" not in flag]
    )
    assert "no model 'huge'" in done.stderr
    return done.stderr.splitlines()[:-1]


def test_clone_at_another_commit_is_noted_and_a_modified_one_warned_of(models_dir, clone):
    git(clone, "init")
    git(clone, "add", ".")
    git(clone, "commit", "-m", "clone")
    note = f"note: the clone's commit is {git(clone, 'rev-parse', 'HEAD').strip()}, results are stated for {COMMIT}"
    (clone / "models").mkdir()  # as the official README says
    (clone / "models" / "checkpoint").touch()
    assert said_of_clone(clone, models_dir) == [note]
    (clone / "src" / "sample.py").write_text(SAMPLE_PY + "\n")
    (clone / "src" / "fire.py").touch()
    warning = "warning: the clone is modified, so it is not OpenAI's code: src/sample.py, src/fire.py"
    assert said_of_clone(clone, models_dir) == [note, warning]


def test_clone_that_results_are_stated_for_needs_no_word(models_dir, clone, tmp_path, monkeypatch):
    needs_posix("programs that begin with #!")
    (clone / ".git").mkdir()
    (tmp_path / "git").write_text(f'#!/bin/sh\n[ "$4" = status ] || echo {COMMIT}\n')
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert said_of_clone(clone, models_dir) == []


def test_clone_without_git_in_a_repository_is_of_an_unknown_commit(models_dir, clone):
    git(clone.parent, "init")
    assert said_of_clone(clone, models_dir) == [f"note: the clone's commit is unknown, results are stated for {COMMIT}"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "no prompts"),
        (["hello", "--gpt2_repo="], "--gpt2_repo needs a value"),
        (["hello", "--gpt2_repo=/nowhere"], "'/nowhere' is no clone"),
        (["hello", "--model_size=huge"], "no model 'huge'"),
        (["hello", "--n_tokens_to_generate=0"], "must be a whole number, 1 or more, not 0"),
        (["hello", "--n_tokens_to_generate=some"], "not 'some'"),
        (["hello", "x" * 41], "prompt 2: prompt and continuation, 41 + 8"),
        (["hello", "--prompts_file=/nowhere"], "/nowhere cannot be read"),
        (["hello", "--top_k=1"], "unknown flag --top_k=1"),
        (["a\nb", "--docker"], "prompt 1 has a line break"),
        (["hello", "--docker", "--logits"], "without --docker"),
    ],
)
def test_mistake_is_one_line(models_dir, clone, arguments, what):
    given = [flag for flag in flags(clone, models_dir) if flag.split("=")[0] not in " ".join(arguments)]
    assert_mistake(compare(*arguments, *given), what)


def test_model_without_the_file_that_only_the_official_code_reads_is_one_line(models_dir, clone, tmp_path):
    shutil.copytree(models_dir / "tiny", tmp_path / "models" / "tiny")
    (tmp_path / "models" / "tiny" / "checkpoint").unlink()
    assert_mistake(compare("hello", *flags(clone, tmp_path / "models")), "lacks the file named checkpoint")
