"""Holds this project against OpenAI's own GPT-2: the same prompts and models folder, greedily, token for token.

The official code is the user's clone of https://github.com/openai/gpt-2, used as it is. It was written for
TensorFlow 1: a container can provide that, otherwise today's TensorFlow stands in for it.
Exits with 1 if any output differs, and with 2 if there is nothing to compare.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
import unittest.mock

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

if __name__ == "__main__":
    from cli import start

    start("numpy", "regex", "tqdm")

import numpy as np

from backends.checks import check_room
from cli import fail, line_text, lines_of, mistakes, run
from gpt2 import generate, gpt2
from utils import MODELS_DIR, ModelError, load_encoder_hparams_and_params

COMMIT = "9b63575ef42771a015060c964af2c3da4cf7c8ab"  # of the clone: results are stated for it
IMAGE = "gpt-2-official"
# what the official scripts print in front of a text, and what the interactive one prints behind it
BEGIN = "=" * 40 + " SAMPLE 1 " + "=" * 40 + "\n"
END = "\n" + "=" * 80 + "\nModel prompt >>> "
ADVICE = {  # what to do, where an engine's complaint or the status it ends with is like this
    "permission denied while trying to connect": (
        "this user may not use Docker: sudo usermod -aG docker $USER and log in again, or install Podman"
    ),
    "daemon running|docker API|error during connect|onnect to Podman": (
        "the engine is not running: start Docker Desktop, or sudo systemctl start docker, or podman machine start"
    ),
    "registry-1.docker.io|dial tcp|failure in name resolution|from versions: none": (
        "TensorFlow's image or a package did not come: check the network, or give the engine a mirror or a proxy"
    ),
    "exec format error|compiled to use AVX|exit status 132": (
        "TensorFlow 1.15 needs an x86-64 processor with AVX or an emulator of one: on Arm without that, omit --docker"
    ),
    "exit status 137": (
        "the container was killed, most likely for want of memory: let the engine have more, or take a smaller model"
    ),
}


def main(
    *prompts: str,
    gpt2_repo: str = "",
    prompts_file: str = "",
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = MODELS_DIR,
    logits: bool = False,
    docker: bool = False,
):
    """Compares what this project and OpenAI's own code generate.

    Args:
        prompts: the texts to continue, each in quotes; "" generates from nothing
        gpt2_repo: your clone of https://github.com/openai/gpt-2
        prompts_file: a file with more prompts, one a line
        n_tokens_to_generate: how many tokens to append to each
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        models_dir: the folder that holds the models
        logits: compare the logits of every position of the prompts as well
        docker: run the official code on TensorFlow 1.15, in a container (of Docker or Podman)
    """
    if prompts_file:
        with mistakes(UnicodeDecodeError, f"{prompts_file} is "), lines_of(prompts_file) as lines:
            prompts = [*prompts, *map(line_text, lines)]
    check_arguments(prompts, gpt2_repo, n_tokens_to_generate, logits, docker)
    check_clone(gpt2_repo)
    if docker:
        build_image()
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    model_dir, n_head = os.path.join(models_dir, model_size), hparams["n_head"]
    if not os.path.exists(os.path.join(model_dir, "checkpoint")):
        fail(f"{model_dir} lacks the file named checkpoint, which the official code needs")
    prompt_ids = [encode(encoder, prompt) for prompt in prompts]
    for number, ids in enumerate(prompt_ids, 1):
        try:
            check_room(len(ids), n_tokens_to_generate, hparams["n_ctx"])
        except ValueError as error:
            fail(f"prompt {number}: {error}")

    def next_logits(context):  # [n_seq] -> [n_vocab]
        return gpt2(context, **params, n_head=n_head, n_last=1)[-1]

    if docker:
        texts = run_official(prompts, gpt2_repo, model_size, models_dir, n_tokens_to_generate)
    else:
        official_encoder, official_generate, official_logits = load_official(
            gpt2_repo, model_size, models_dir, n_tokens_to_generate
        )
    n_different = 0
    for i, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True)):
        print(f"prompt {i + 1} of {len(prompts)}: {len(ids)} tokens", file=sys.stderr)
        ours = generate(ids, params, n_head, n_tokens_to_generate)
        if docker:
            text = texts[i]
            difference = difference_of_texts(ids, ours, text, next_logits, encoder)
        else:
            official_ids = encode(official_encoder, prompt)
            theirs = official_generate(official_ids)
            text = official_encoder.decode(theirs)
            difference = difference_of_ids(ids, ours, theirs, next_logits, official_logits, encoder)
            if ids != official_ids:
                difference = f"the prompt's token ids differ: {ids}, officially {official_ids}"
            elif difference is None and encoder.decode(ours) != text:
                difference = f"the texts differ, though their ids are the same: {ours}"
        n_different += difference is not None
        print(f"{i + 1}. {prompt!r}\n   this project: {encoder.decode(ours)!r}\n   official:     {text!r}")
        print(f"   {difference or 'same'}")
        if logits:
            print(f"   {compare_logits(gpt2(ids, **params, n_head=n_head), official_logits(ids))}")
        sys.stdout.flush()
    print(f"{len(prompts)} prompts, {n_tokens_to_generate} tokens each: {n_different or 'none'} of them differ")
    if n_different:
        sys.exit(1)


def check_arguments(prompts, gpt2_repo, n_tokens_to_generate, logits, docker):
    """Exits with a line for the user unless everything is there to begin with."""
    if not prompts:
        fail("no prompts: give some, each in quotes, or a --prompts_file")
    if type(n_tokens_to_generate) is not int or n_tokens_to_generate < 1:
        fail(f"n_tokens_to_generate must be a whole number, 1 or more, not {n_tokens_to_generate!r}")
    if not os.path.isfile(os.path.join(gpt2_repo, "src", "model.py")):
        fail(
            f"--gpt2_repo={gpt2_repo!r} is no clone of OpenAI's repository, for it has no src/model.py: "
            "git clone https://github.com/openai/gpt-2"
        )
    if not docker:
        return
    if logits:
        fail("the official script prints no logits: use --logits without --docker")
    for number, prompt in enumerate(prompts, 1):
        if "\n" in prompt or "\r" in prompt:
            fail(f"prompt {number} has a line break, but the official script reads lines: omit --docker")
    if not engine():
        fail("--docker needs docker or podman, and neither is on the PATH: install one, or omit --docker")


def check_clone(gpt2_repo):
    """Says on stderr whether the clone is what OpenAI published and results are stated for."""

    def git(*arguments):  # without optional locks, status does not write to the clone
        command = ["git", "--no-optional-locks", "-C", gpt2_repo, *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout

    # a folder without .git may lie in another repository, of which git would speak
    has_git = shutil.which("git") and os.path.exists(os.path.join(gpt2_repo, ".git"))
    commit = git("rev-parse", "HEAD").strip() if has_git else ""
    if commit != COMMIT:
        print(f"note: the clone's commit is {commit or 'unknown'}, results are stated for {COMMIT}", file=sys.stderr)
    changed = [line[3:] for line in git("status", "--porcelain", "--", "src").splitlines()] if commit else []
    if changed:
        print(f"warning: the clone is modified, so it is not OpenAI's code: {', '.join(changed)}", file=sys.stderr)


def encode(encoder, prompt):
    """Either encoder's ids of a prompt. The official script for samples without one begins with <|endoftext|>, too."""
    try:
        return encoder.encode(prompt) if prompt else [encoder.encoder["<|endoftext|>"]]
    except UnicodeEncodeError:
        fail(f"the prompt {prompt!r} is not valid Unicode text")


def difference_of_ids(ids, ours, theirs, next_logits, official_logits, encoder):
    """Where two continuations of the prompt ids part and by how much, or None."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    at = next((i for i, (our_id, their_id) in pairs if our_id != their_id), None)
    if at is None:
        return None
    context = ids + ours[:at]
    rows = {"this project": next_logits(context), "official": official_logits(context)[-1]}
    return describe(at, ours[at], theirs[at], rows, encoder)


def difference_of_texts(ids, ours, text, next_logits, encoder):
    """The same where only the official text is known: its token is the likeliest that goes on as the text does."""
    if encoder.decode(ours) == text:
        return None

    def agrees(tokens):  # what ends within a character is still open
        return text.startswith(encoder.decode(tokens).rstrip("\ufffd"))

    at = next((i for i in range(len(ours)) if not agrees(ours[: i + 1])), len(ours) - 1)
    row = next_logits(ids + ours[:at])
    others = (int(i) for i in np.argsort(-row) if i != ours[at])
    their_id = next((i for i in others if encoder.decode([i]).strip("\ufffd") and agrees([*ours[:at], i])), None)
    return describe(at, ours[at], their_id, {"this project": row}, encoder)


def describe(at, our_id, their_id, rows, encoder):
    """rows: {whose: logits [n_vocab]} of the position at, the first at which the two ids differ."""
    if their_id is None:
        return f"token {at + 1} differs: {encoder.decode([our_id])!r}, officially another"
    lines = [f"token {at + 1} differs: {encoder.decode([our_id])!r}, officially {encoder.decode([their_id])!r}"]
    for whose, row in rows.items():
        ours, theirs = row[our_id], row[their_id]
        lines.append(f"   logits, {whose}: {ours:.6f} and {theirs:.6f}, a gap of {ours - theirs:.2g}")
    return "\n".join(lines)


def compare_logits(ours, theirs):  # [n_seq, n_vocab], [n_seq, n_vocab]
    """Relative is to the largest logit of the position: single ones may be next to 0."""
    difference, scale = np.max(np.abs(ours - theirs), axis=-1), np.max(np.abs(theirs), axis=-1)  # [n_seq]
    largest, relative = np.max(difference), np.max(difference / scale)
    return f"logits of {len(ours)} positions: largest difference {largest:.2g}, relative {relative:.2g}"


class HParams(types.SimpleNamespace):
    """What the official code uses of tensorflow.contrib.training.HParams, which TensorFlow 2 has no longer."""

    def override_from_dict(self, values):
        self.__dict__.update(values)


def import_tensorflow():
    """TensorFlow as its version 1, imported without its chatter, which goes past Python's sys.stderr."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # JAX, if it came first, has made it 1
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import tensorflow.compat.v1
    except ImportError as error:
        fail(f"OpenAI's code needs TensorFlow: pip install -r requirements.txt, or add --docker: {error}")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
    return tensorflow.compat.v1


def import_official(gpt2_repo):
    """The official model.py, sample.py and encoder.py as modules, with today's TensorFlow in place of version 1."""
    tf = import_tensorflow()
    tf.logging.set_verbosity(tf.logging.ERROR)  # every other function is deprecated
    tf.disable_v2_behavior()
    training = types.ModuleType("tensorflow.contrib.training")
    training.HParams = HParams
    stand_ins = {"tensorflow": tf, "tensorflow.contrib": types.ModuleType("tensorflow.contrib")}
    stand_ins["tensorflow.contrib.training"] = training
    sys.dont_write_bytecode = True  # the clone stays as it is
    # only while they are imported: this project has an encoder.py too, and needs the real TensorFlow
    with unittest.mock.patch.dict(sys.modules, stand_ins):
        del sys.modules["encoder"]
        with unittest.mock.patch.object(sys, "path", [os.path.join(gpt2_repo, "src"), *sys.path]):
            return [importlib.import_module(name) for name in ("model", "sample", "encoder")]


def load_official(gpt2_repo, model_size, models_dir, n_tokens_to_generate):
    """Returns (encoder, generate, logits) of the official code.

    generate: ids -> n_tokens_to_generate ids, each the likeliest (of several that are equally so, one at random).
    logits: [n_seq] -> [n_seq, n_vocab].
    """
    model, sample, encoder = import_official(gpt2_repo)
    import tensorflow.compat.v1 as tf

    hparams = model.default_hparams()
    model_dir = os.path.join(models_dir, model_size)
    with open(os.path.join(model_dir, "hparams.json"), encoding="utf-8") as f:
        hparams.override_from_dict(json.load(f))
    session = tf.Session(graph=tf.Graph())
    with session.graph.as_default():
        context = tf.placeholder(tf.int32, [1, None])
        samples = sample.sample_sequence(
            hparams=hparams, length=n_tokens_to_generate, context=context, batch_size=1, top_k=1
        )
        all_logits = model.model(hparams=hparams, X=context, reuse=tf.AUTO_REUSE)["logits"]
        tf.train.Saver().restore(session, tf.train.latest_checkpoint(model_dir))

    def generate(ids):
        return session.run(samples, {context: [ids]})[0, len(ids) :].tolist()

    def logits(ids):
        return session.run(all_logits, {context: [ids]})[0]

    return encoder.get_encoder(model_size, models_dir), generate, logits


def engine():
    return shutil.which("docker") or shutil.which("podman")


def build_image():
    print("building the image for the container: this takes minutes the first time", file=sys.stderr)
    folder = os.path.dirname(os.path.abspath(__file__))
    built = subprocess.run([engine(), "build", "--quiet", "--tag", IMAGE, folder], capture_output=True)
    if built.returncode:
        fail(f"the image could not be built: {reason(built)}")


def run_official(prompts, gpt2_repo, model_size, models_dir, n_tokens_to_generate):
    """The texts with which the official scripts, in a container, continue the prompts."""
    mounts = {gpt2_repo: "/gpt-2", models_dir: "/models"}
    # SELinux, where there is one, would hide the two folders from the container
    command = [engine(), "run", "--rm", "--interactive", "--security-opt", "label=disable"]
    for path, inside in mounts.items():
        command += ["--volume", f"{os.path.abspath(path)}:{inside}:ro"]
    flags = [f"--model_name={model_size!r}", "--models_dir=/models", f"--length={n_tokens_to_generate}", "--top_k=1"]
    print(f"the official scripts continue {len(prompts)} prompts, which takes a while", file=sys.stderr)

    # the interactive script refuses an empty prompt, the other one starts from nothing
    asked = [prompt for prompt in prompts if prompt]
    texts, from_nothing = [], ""
    if asked:
        script = [*command, IMAGE, "python3", "src/interactive_conditional_samples.py", *flags]
        output, error = run_script(script, asked)
        texts = [sample.partition(BEGIN)[2] for sample in output.split(END)[:-1]]
        if len(texts) != len(asked):
            fail(f"the official script continued {len(texts)} of {len(asked)} prompts: {error}")
    if len(asked) < len(prompts):
        script = [*command, IMAGE, "python3", "src/generate_unconditional_samples.py", *flags, "--nsamples=1"]
        output, error = run_script(script, [])
        if BEGIN not in output:
            fail(f"the official script generated nothing: {error}")
        from_nothing = output.partition(BEGIN)[2].removesuffix("\n")
    texts = iter(texts)
    return [next(texts) if prompt else from_nothing for prompt in prompts]


def run_script(command, prompts):
    """Types the prompts and returns (output, how it ended). The interactive script always ends in an EOFError."""
    done = subprocess.run(command, input="".join(f"{prompt}\n" for prompt in prompts).encode(), capture_output=True)
    return done.stdout.decode(errors="replace"), reason(done)


def reason(done):
    """What went wrong in one line, and before it what to do, if that is known."""
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
    # an engine's own line goes before its hints, Python's is the last
    said = next((line for line in lines if line.startswith(("docker: ", "ERROR: ", "Error: "))), lines[-1])
    said = f"{said}, exit status {done.returncode}"
    advice = next((advice for sign, advice in ADVICE.items() if re.search(sign, "\n".join([*lines, said]))), None)
    return f"{advice} ({said})" if advice else said


if __name__ == "__main__":
    try:
        run(main)
    except ModelError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        print(error.code, file=sys.stderr)
        sys.exit(2)  # 1 says that an output differs
