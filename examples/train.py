"""Trains a GPT-2 from scratch on texts, on the project's own model, and saves it in OpenAI's format.

    python examples/train.py text.txt --name mine
    python gpt2.py "Once upon a time" --model_size mine

The last tenth of the text is held out: training never sees it, and the weights kept are those that predict it best. The
defaults are the recipe of models/shakespeare.
"""

import json
import math
import os
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

if __name__ == "__main__":
    from cli import start

    start("numpy", "regex", "tqdm")

import training
from recipe import FLAGS, complete, with_flags
from texts import hold_out, note_parts_of_characters

from cli import fail, note, run
from encoder import bytes_to_unicode, get_encoder
from files.checkpoint import random_params


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
    with open(os.path.join(model_dir, "encoder.json"), "w", encoding="utf-8", newline="\n") as f:
        json.dump({token: i for i, token in enumerate(tokens)}, f)
    with open(os.path.join(model_dir, "vocab.bpe"), "w", encoding="utf-8", newline="\n") as f:
        f.write("\n".join(["#version: 0.2", *merges, ""]))


def initial_params(hparams, seed):
    """GPT-2's initialisation: random_params' spread of 0.02, but less for some, and biases of 0."""
    params = random_params(hparams, seed)
    params["wpe"] *= 0.5  # 0.01, as OpenAI's model.py has it
    for block in params["blocks"]:
        for sublayer in (block["attn"], block["mlp"]):  # what these add to the residual stream grows with the depth
            sublayer["c_proj"]["w"] /= math.sqrt(2 * hparams["n_layer"])
        for layer in (*block["attn"].values(), *block["mlp"].values(), block["ln_1"], block["ln_2"], params["ln_f"]):
            layer["b"][:] = 0
    return params


@with_flags(FLAGS, n_steps=8000, learning_rate=2e-3, weight_decay=0.1, dropout=0.15)
def main(
    text_file: str,
    *,
    n_vocab: int = 1024,
    n_ctx: int = 256,
    n_embd: int = 160,
    n_head: int = 5,
    n_layer: int = 4,
    **recipe,
):
    """Trains a GPT-2 from scratch on texts.

    Args:
        text_file: UTF-8; or .jsonl, .json (an array) or .csv with {"text"}; or a folder with all that is in it, or a
            glob; the last tenth is held out
        n_vocab: tokens in the vocabulary: the 256 bytes, what is learned from the text, and <|endoftext|>
        n_ctx: tokens that the model sees at once
        n_embd: width of the model
        n_head: attention heads in a block
        n_layer: blocks
    """
    hparams = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    options = complete(main, recipe) | hparams
    model_dir, settings = training.begin(options, "tokenizers")
    if n_vocab < 257 or n_embd % n_head or n_ctx < 2:
        fail("--n_vocab must be 257 or more, --n_ctx 2 or more, --n_embd divisible by --n_head")

    # the texts, in two parts, and a tokenizer learned from the first alone
    documents, _, settings["data"] = training.read_data([text_file], "", ("text",))
    texts, held_out = hold_out([document["text"] for document in documents])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_dir = model_dir if options["resume"] else folder
        if not options["resume"]:
            train_tokenizer(texts, n_vocab, folder)
        encoder = get_encoder("", tokenizer_dir)
        hparams["n_vocab"] = len(encoder.encoder)
        if hparams["n_vocab"] < n_vocab:
            note(f"the text yields {hparams['n_vocab']} tokens, not {n_vocab}")
        task = training.Texts(encoder, texts, held_out, n_ctx, n_head, settings["batch_size"])
        note_parts_of_characters(encoder, task.data.ids, f"give a larger --n_vocab than {n_vocab}")
        learned = {"params": initial_params(hparams, settings["seed"])}
        training.train(model_dir, tokenizer_dir, hparams, learned, {}, task, settings, options["resume"])


if __name__ == "__main__":
    run(main, "train.py: stopped before the first step: nothing was written")
