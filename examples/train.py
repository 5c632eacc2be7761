"""Trains a GPT-2 from scratch on texts, on the project's own model, and saves it in OpenAI's format.

    python examples/train.py text.txt --name mine
    python gpt2.py "Once upon a time" --model_size mine

The last tenth of the text is held out: training never sees it, and the weights kept are those that predict it best. The
defaults are the recipe of models/shakespeare.
"""

import functools
import json
import math
import os
import signal
import sys
import tempfile

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: during the imports, too

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import training

from cli import fail, note, run
from encoder import bytes_to_unicode, get_encoder
from files.checkpoint import random_params, save_checkpoint
from utils import MODELS_DIR


def train_tokenizer(texts, n_vocab, model_dir):
    """Learns a byte-level BPE of n_vocab tokens from texts and writes it as OpenAI has it: encoder.json, vocab.bpe."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    characters = pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated")  # Chinese has no spaces: no token holds two
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)  # cuts words as GPT-2 does
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([characters, words])
    alphabet = sorted(bytes_to_unicode().values())  # every byte has a token: any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # ids in the order learned, as OpenAI's; two merges may give the same token
    tokens = dict.fromkeys([*alphabet, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"])
    with open(os.path.join(model_dir, "encoder.json"), "w", encoding="utf-8") as f:
        json.dump({token: i for i, token in enumerate(tokens)}, f)
    with open(os.path.join(model_dir, "vocab.bpe"), "w", encoding="utf-8") as f:
        f.write("\n".join(["#version: 0.2", *merges, ""]))


def initial_params(hparams, seed):
    """GPT-2's initialisation: random_params' spread of 0.02, but less for some, and biases of 0."""
    import jax

    params = random_params(hparams, seed)
    params["wpe"] *= 0.5  # 0.01, as OpenAI's model.py has it
    for block in params["blocks"]:
        for sublayer in (block["attn"], block["mlp"]):  # what these add to the residual stream grows with the depth
            sublayer["c_proj"]["w"] /= math.sqrt(2 * hparams["n_layer"])
    return jax.tree.map_with_path(lambda path, x: x * np.float32(path[-1].key != "b"), params)


def main(
    text_file: str,
    *,
    name: str,
    models_dir: str = MODELS_DIR,
    n_vocab: int = 1024,
    n_ctx: int = 256,
    n_embd: int = 160,
    n_head: int = 5,
    n_layer: int = 4,
    n_steps: int = 8000,
    batch_size: int = 8,
    accumulate: int = 1,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    dropout: float = 0.15,
    dtype: str = "float32",
    recompute: bool = False,
    evaluate_every: int | None = None,
    seed: int = 0,
    distributed: bool = False,
    resume: bool = False,
):
    """Trains a GPT-2 from scratch on texts.

    Args:
        text_file: UTF-8; or JSONL with {"text"}; or a folder with all that is in it, or a glob; the last tenth is held
            out
        name: the model is saved in the folder of this name in models_dir
        models_dir: the folder that holds the models
        n_vocab: tokens in the vocabulary: the 256 bytes, what is learned from the text, and <|endoftext|>
        n_ctx: tokens that the model sees at once
        n_embd: width of the model
        n_head: attention heads in a block
        n_layer: blocks
        n_steps: updates of the weights
        batch_size: windows of n_ctx tokens that an update learns from
        accumulate: parts of a batch that are computed one after another: less memory, the same result
        learning_rate: the highest; it rises to that over the first 2 % of the steps and falls to 0 along a cosine
        weight_decay: AdamW's, of all weights but biases and layer norms
        dropout: the part of the features behind each layer norm that training silences
        dtype: float32, or bfloat16 to compute in; the weights stay float32
        recompute: keep fewer activations, and compute them again: less memory, a third more time
        evaluate_every: steps from one evaluation to the next (by default there are 16 at most, and one before the first
            step); each saves the run, and the model if it is the best yet
        seed: of the first weights and of the order of the text
        distributed: be one of several processes that each take some rows of a batch (see README.md)
        resume: go on with a run with the same arguments; more n_steps lengthen it
    """
    hparams = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    settings = {**hparams, "n_steps": n_steps, "batch_size": batch_size, "accumulate": accumulate}
    settings |= {"learning_rate": learning_rate, "weight_decay": weight_decay, "dropout": dropout, "seed": seed}
    settings |= {"dtype": dtype, "recompute": recompute, "evaluate_every": evaluate_every}
    model_dir, settings = training.begin(name, models_dir, resume, distributed, settings)
    if n_vocab < 257 or n_embd % n_head or n_ctx < 2:
        fail("--n_vocab must be 257 or more, --n_ctx 2 or more, --n_embd divisible by --n_head")

    # the texts, in two parts, and a tokenizer learned from the first alone
    settings |= {"data": training.checksums([text_file], "")}
    texts = [document["text"] for document in training.read_documents([text_file], ("text",))]
    train_texts, held_out_texts = training.hold_out(texts)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_dir = model_dir if resume else folder
        if not resume:
            train_tokenizer(train_texts, n_vocab, folder)
        encoder = get_encoder("", tokenizer_dir)
        hparams["n_vocab"] = len(encoder.encoder)
        if hparams["n_vocab"] < n_vocab:
            note(f"the text yields {hparams['n_vocab']} tokens, not {n_vocab}")
        ids = training.text_ids(encoder, train_texts)
        evaluate = training.text_evaluator(encoder, held_out_texts, n_ctx, n_head)
        loss = functools.partial(training.text_loss, n_head=n_head, dropout=dropout, dtype=dtype, recompute=recompute)
        training.train(
            model_dir,
            tokenizer_dir,
            learned=initial_params(hparams, seed),
            frozen={},
            loss=lambda params, _, rows, keys: loss(params, rows, keys),
            data=training.windows_of(ids, n_ctx, batch_size),
            evaluate=lambda params, _: evaluate(params),
            save=lambda params, _: save_checkpoint(model_dir, hparams, params),
            settings=settings,
            resume=resume,
            unit="nats per character",
            scale=(len(ids) - 1) / sum(map(len, train_texts)),
        )


if __name__ == "__main__":
    run(main, "train.py: stopped before the first step: nothing was written")
