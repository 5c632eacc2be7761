"""Load models, OpenAI's or one's own: fetch what is missing, verify it: a folder -> (encoder, hparams, params).

    python utils.py 124M

fetches and verifies a model for later, or for another machine.
"""

import os
import re
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out
    import cli

    cli.start("numpy", "regex")

import numpy as np

from encoder import SHA256, get_encoder
from files import MODELS_DIR
from files.checkpoint import (
    DATA,
    ENCODER,
    HPARAMS,
    INDEX,
    MEND,
    TEXTS,
    VOCAB,
    CheckpointError,
    load_hparams,
    load_params,
    n_params,
    weight_files,
)
from files.sums import SUMS, hexdigest, read_sums, sums_of
from files.together import finish
from languages import translated

FILES = ("checkpoint", HPARAMS, ENCODER, VOCAB, INDEX, "model.ckpt.meta", DATA)  # as OpenAI publishes them
NEW_NAME = r"\w([\w.-]*[\w-])?"  # what a new model may be called, on every system
LIMITS = {HPARAMS: 2**16, ENCODER: 2**24, VOCAB: 2**24, SUMS: 2**16}  # bytes; GPT-2's largest has 1 MB

# OpenAI's models, and what is known of their files
MODEL_SIZES = {
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "355M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24},
    "774M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1280, "n_head": 20, "n_layer": 36},
    "1558M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48},
}
SOURCES = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",  # a mirror
)
REPOSITORIES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}  # of openai-community
TOKENIZER_BYTES = {ENCODER: 1_042_301, VOCAB: 456_318}  # the same for all four
BYTES = {
    "124M": {"checkpoint": 77, HPARAMS: 90, INDEX: 5_215, "model.ckpt.meta": 471_155},
    "355M": {"checkpoint": 77, HPARAMS: 91, INDEX: 10_399, "model.ckpt.meta": 926_519},
}
MD5 = {"124M": "f48b9cf1a525a603be52258f69bf9162"}  # of the data file


class ModelError(Exception):
    """Something is wrong with a model's files or their download: one printable line for the user, who can mend it."""

    def __init__(self, message):
        line = " ".join(str(message).splitlines())
        super().__init__("".join(c if c.isprintable() else "?" for c in line))


def load_encoder_hparams_and_params(model_size, models_dir):
    """Loads a model, downloading it first if it is one of MODEL_SIZES and not there yet.

    model_size: the name of a folder in models_dir, or of a link there to one elsewhere. Returns (encoder, hparams,
    params), where params is the nested dict {"wte", "wpe", "blocks": [{"ln_1", "attn", "ln_2", "mlp"}], "ln_f"} of
    float32 arrays, mapped copy-on-write: changes to them stay in memory. Raises ModelError.
    """
    if int(np.__version__.partition(".")[0]) < 2:
        raise ModelError(f"NumPy 2.0 or newer is needed, and this is {np.__version__}: pip install -U numpy")
    models_dir = os.path.expanduser(models_dir)
    if re.search(r"[/\\:\0]|[. ]$|^$", model_size):  # Windows drops dots and spaces at the end
        raise ModelError(f"{model_size!r} is no model name: it must be a folder inside {models_dir}")
    model_dir = os.path.join(models_dir, model_size)
    try:
        finish(model_dir)  # what a process that was killed was about to save
        missing = missing_files(model_dir)
        if missing and model_size in MODEL_SIZES:
            fetch_model(model_size, model_dir)
            missing = missing_files(model_dir)
        if missing and os.path.isdir(model_dir):
            raise ModelError(f"{model_dir} is no complete checkpoint: it lacks {', '.join(missing[:5])}")
        if missing:
            raise ModelError(f"no model {model_size!r}: choose {', '.join(MODEL_SIZES)} or {folders_in(models_dir)}")
        check_files(model_size, model_dir)
        hparams = load_hparams(os.path.join(model_dir, HPARAMS))
        encoder = load_encoder(model_size, models_dir, hparams["n_vocab"])
        return encoder, hparams, load_params(model_dir, hparams)
    except CheckpointError as error:
        raise ModelError(error) from error
    except OSError as error:
        raise ModelError(f"{model_dir} cannot be read: {error}") from error


def missing_files(model_dir):
    """The files that a model needs, less those that are there. Raises CheckpointError."""
    index, data = weight_files(model_dir)
    return [name for name in (*TEXTS, index, *data) if not os.path.isfile(os.path.join(model_dir, name))]


def is_model(model_dir):
    try:
        return not missing_files(model_dir)
    except (CheckpointError, OSError):
        return False


def folders_in(models_dir):
    """The models in models_dir, in words."""
    try:
        names = [name for name in sorted(os.listdir(models_dir)) if is_model(os.path.join(models_dir, name))]
    except OSError:
        names = []
    return f"a folder in {models_dir} ({', '.join(names) or 'there is none'})"


def fetch_model(model_size, model_dir, source=None):
    """Gets those files of one of MODEL_SIZES that model_dir lacks. Raises ModelError, CheckpointError.

    source: openai, or transformers: its cache or, for what that lacks, Hugging Face. None: as the environment says:
    GPT2_BASE_URL names another server with files at GPT2_BASE_URL/<size>/<file>, HF_ENDPOINT a mirror of Hugging Face;
    where neither is set, transformers' cache and then OpenAI.
    """
    from files.download import DownloadError  # only here: most starts need no network
    from files.transformers import fetch_from_hub, take_cached

    base_url, endpoint = os.environ.get("GPT2_BASE_URL"), os.environ.get("HF_ENDPOINT")
    source = source or ("openai" if base_url else "transformers" if endpoint else "any")
    digests = {**SHA256, DATA: MD5.get(model_size)}
    theirs = {"repository": REPOSITORIES[model_size], "hparams": MODEL_SIZES[model_size], "digests": digests}
    try:
        if source != "openai":
            take_cached(model_dir=model_dir, **theirs)
        if missing_files(model_dir) and source == "transformers":
            fetch_from_hub(model_dir=model_dir, n_bytes=TOKENIZER_BYTES, title=model_size, **theirs)
        elif missing_files(model_dir):
            fetch_from_openai(model_size, model_dir)
    except OSError as error:
        raise ModelError(f"{model_size} cannot be stored in {model_dir}: {error}") from error
    except DownloadError as error:
        is_there = os.path.isdir(os.path.join(os.path.dirname(model_dir), "shakespeare"))
        said = f"{error}; run it again to go on from here (mirrors, and by hand: see models/README.md)"
        if is_there:
            said = f"{said}; --model_size shakespeare is here, and needs no network"
        raise ModelError(said) from error


def fetch_from_openai(model_size, model_dir):
    from files.download import fetch

    n_bytes = {**TOKENIZER_BYTES, **BYTES.get(model_size, {}), DATA: 4 * n_params(MODEL_SIZES[model_size])}
    sources = [os.environ["GPT2_BASE_URL"]] if os.environ.get("GPT2_BASE_URL") else SOURCES
    fetch(
        files={name: n_bytes.get(name) for name in FILES},  # those that are there already stay as they are
        folder=model_dir,
        sources=[f"{source.rstrip('/')}/{model_size}" for source in sources],
        check=lambda name, path: unlike_published(model_size, name, path),
        title=model_size,
    )


def check_files(model_size, model_dir):
    """Raises ModelError for what should not even be read, or is unlike what OpenAI published, as far as is known."""
    for name, limit in LIMITS.items():
        path = os.path.join(model_dir, name)
        if os.path.lexists(path) and (not os.path.isfile(path) or os.path.getsize(path) > limit):
            raise ModelError(f"{path} is no file, or larger than any of its kind")
        if model_size in MODEL_SIZES and (fault := unlike_published(model_size, name, path)):
            raise ModelError(f"{path} is damaged: {fault}: delete it to fetch it anew")


def unlike_published(model_size, name, path):
    """What tells the file at path from the one that OpenAI published under that name, as far as is known; or None."""
    if name in SHA256 and hexdigest(path) != SHA256[name]:
        return "its SHA-256 is not that of OpenAI's file"
    if name == DATA and model_size in MD5 and hexdigest(path, "md5") != MD5[model_size]:
        return "its MD5 is not that of OpenAI's file"
    if name == HPARAMS:
        try:
            hparams = load_hparams(path)
        except CheckpointError as error:
            return str(error)
        if any(hparams[key] != value for key, value in MODEL_SIZES[model_size].items()):
            return f"OpenAI's has {MODEL_SIZES[model_size]}"
    return None


def load_encoder(model_size, models_dir, n_vocab):
    """A model's tokenizer, which must have n_vocab tokens. Raises ModelError, OSError."""
    try:
        encoder = get_encoder(model_size, models_dir)
    except ValueError as error:
        raise ModelError(f"{os.path.join(models_dir, model_size)}: the tokenizer cannot be read: {error}") from error
    if len(encoder.encoder) != n_vocab:
        n_tokens, path = len(encoder.encoder), os.path.join(models_dir, model_size, ENCODER)
        raise ModelError(f"{path} has {n_tokens} tokens, {HPARAMS} implies {n_vocab}")
    return encoder


def main(model_size: str, models_dir: str = MODELS_DIR, source: str = None):
    """Fetches one of OpenAI's models, if it is not there yet, and verifies it.

    Args:
        model_size: 124M, 355M, 774M or 1558M, or any folder in models_dir
        models_dir: the folder that holds the models
        source: openai, or transformers: from its cache, or from Hugging Face or its mirror that HF_ENDPOINT names
    """
    import cli

    if source not in (None, "openai", "transformers"):
        cli.fail(f"--source must be openai or transformers, not {source!r}")
    if source and model_size not in MODEL_SIZES:
        cli.fail(f"--source is for {', '.join(MODEL_SIZES)}, and not for {model_size!r}")
    with cli.mistakes((ModelError, CheckpointError)):
        model_dir = os.path.abspath(os.path.join(models_dir, model_size))
        finish(model_dir)
        if source and is_model(model_dir):
            cli.note(f"{model_size} is here already: --source does nothing")
        elif source:
            fetch_model(model_size, model_dir, source)
        load_encoder_hparams_and_params(model_size, models_dir)
        index, data = weight_files(model_dir)
        # every byte: loading trusts weights whose file has the time that SHA256SUMS has
        recorded, sums = read_sums(model_dir), sums_of(model_dir, [*TEXTS, index, *data])
        if changed := [name for name, digest in sums.items() if recorded.get(name, digest) != digest]:
            raise ModelError(f"{model_dir}: {', '.join(changed)} is not as {SUMS} has it: {MEND}")
    names = ["checkpoint", *TEXTS, index, "model.ckpt.meta", *data, SUMS]
    names = [name for name in names if os.path.isfile(os.path.join(model_dir, name))]
    print(translated(f"{model_size} is verified, and lies in {model_dir}: {', '.join(names)}", sys.stdout))


if __name__ == "__main__":
    cli.run(main)
