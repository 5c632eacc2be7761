"""GPT-2 as transformers has it: where it keeps one on disk or on Hugging Face, and what it calls the weights.

They are OpenAI's, bit for bit: what is made of them here is OpenAI's checkpoint.
"""

import contextlib
import glob
import hashlib
import os
import re
import shutil

import numpy as np

from files.checkpoint import DATA, ENCODER, HPARAMS, VOCAB, n_params, nest, save_checkpoint, variables, weight_files
from files.download import fetch, say
from files.lock import insist, locked
from files.safetensors import read_safetensors
from files.sums import hexdigest
from files.together import replacing

HUB = "https://huggingface.co"
FILES = {ENCODER: "vocab.json", VOCAB: "merges.txt", DATA: "model.safetensors"}  # OpenAI's name: the name there


def take_cached(repository, model_dir, hparams, digests):
    """Makes what a model lacks of what transformers has in its cache, if that is there. Arguments, errors: see take."""
    for folder in cached_folders(repository):
        take(folder, model_dir, hparams, digests)


def fetch_from_hub(repository, model_dir, hparams, digests, n_bytes, title):
    """Makes what a model lacks of files from Hugging Face, or from the mirror of it that HF_ENDPOINT names.

    n_bytes: {name: that of OpenAI's file, where it is the same there}. title: see fetch. Raises DownloadError. Other
    arguments, errors: see take.
    """
    parent, name = os.path.split(os.path.abspath(model_dir))
    with locked(os.path.join(parent, f".{name}.transformers")):  # else one process would take away what another reads
        wanted = lacking(model_dir)
        fetch(
            files={FILES[name]: n_bytes.get(name) for name in wanted},
            folder=model_dir,
            sources=[
                f"{(os.environ.get('HF_ENDPOINT') or HUB).rstrip('/')}/openai-community/{repository}/resolve/main"
            ],
            check=lambda name, path: fault_of(name, path, hparams, digests),
            title=title,
            largest=8 * n_params(hparams),  # bytes: twice those of the weights, beside which there may be causal masks
        )
        take(model_dir, model_dir, hparams, digests)
        for name in wanted:
            insist(os.remove, os.path.join(model_dir, FILES[name]))


def take(folder, model_dir, hparams, digests):
    """Makes what a model lacks of transformers' files in folder, if they are what they should be.

    hparams: what OpenAI's are. digests: {name: that of OpenAI's file, as far as it is known}, the data file's MD5 and
    the others' SHA-256. Raises OSError, CheckpointError.
    """
    paths = {name: os.path.join(folder, FILES[name]) for name in lacking(model_dir)}
    paths = {name: path for name, path in paths.items() if os.path.isfile(path)}
    for name, path in [*paths.items()]:
        if fault := fault_of(FILES[name], path, hparams, digests):
            say(f"{path} is not used: {fault}")
            del paths[name]
    if paths and folder != model_dir:
        say(f"{model_dir} is made of what transformers has in {folder}")
    texts = paths.keys() - {DATA}
    with replacing(model_dir) if texts else contextlib.nullcontext() as new:
        for name in texts:
            shutil.copyfile(paths[name], os.path.join(new, name))
    if DATA in paths:
        save_checkpoint(model_dir, hparams, nest(openai_weights(paths[DATA], hparams)))


def lacking(model_dir):
    """Which of FILES a model lacks; the data file stands for all that is made with it."""
    index, data = weight_files(model_dir)
    needed = {ENCODER: [ENCODER], VOCAB: [VOCAB], DATA: [HPARAMS, index, *data]}
    return [name for name in FILES if not all(os.path.isfile(os.path.join(model_dir, file)) for file in needed[name])]


def fault_of(name, path, hparams, digests):
    """What tells one of transformers' files from what OpenAI published, as far as that is known; or None."""
    (ours,) = (ours for ours, theirs in FILES.items() if theirs == name)
    expected = digests.get(ours)
    if ours != DATA:
        return "its SHA-256 is not that of OpenAI's file" if hexdigest(path) != expected else None
    try:
        weights = openai_weights(path, hparams)
    except ValueError as error:
        return str(error)
    md5 = hashlib.md5(usedforsecurity=False)
    for weight in sorted(weights) if expected else ():  # as they lie in OpenAI's
        md5.update(weights[weight])
    return "its weights are not OpenAI's" if expected and md5.hexdigest() != expected else None


def cached_folders(repository):
    """The folders, newest first, in which transformers keeps what it has downloaded of one of openai-community's."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    hub = os.path.expandvars(os.path.expanduser(hub))
    names = f"models--openai-community--{repository}", f"models--{repository}"  # as it is called now, and was
    folders = [path for name in names for path in glob.glob(os.path.join(glob.escape(hub), name, "snapshots", "*"))]
    return sorted(filter(os.path.isdir, folders), key=os.path.getmtime, reverse=True)


def transformers_name(name):  # h0/attn/c_attn/w -> h.0.attn.c_attn.weight
    name = re.sub(r"^h(\d+)", r"h/\1", name)
    return re.sub("/[gw]$|(?<=^w[tp]e)$", "/weight", re.sub("/b$", "/bias", name)).replace("/", ".")


def openai_weights(path, hparams):
    """{OpenAI's name: array} of a safetensors file, with the shapes that hparams imply, mapped from the file.

    Its w are [in, out], too. What else it holds, such as causal masks, is left out. Raises ValueError, OSError.
    """
    arrays = {name.removeprefix("transformer."): array for name, array in read_safetensors(path).items()}
    weights = {}
    for ours, shape in variables(hparams):
        theirs = transformers_name(ours)
        array = arrays.get(theirs)
        if array is None:
            raise ValueError(f"it lacks the weights {theirs}")
        if isinstance(array, str) or array.dtype != np.float32 or array.shape != shape:
            what = array if isinstance(array, str) else f"{array.dtype} of shape {[*array.shape]}"
            raise ValueError(f"{theirs} is {what:.80}, not float32 of shape {[*shape]}")
        weights[ours] = array
    return weights
