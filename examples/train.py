"""Trains a GPT-2 from scratch on a text file, on the project's own gpt2(), and saves it in OpenAI's format.

    python examples/train.py text.txt --name mine
    python gpt2.py "Once upon a time" --model_size mine

JAX compiles and differentiates the NumPy model as it stands; it runs on a GPU where JAX sees one. The last tenth of the
text is held out: training never sees it, and the weights kept are those that predict it best. The defaults are the
recipe of models/shakespeare.
"""

import json
import math
import os
import re
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from checkpoint import random_params, save_checkpoint
from cli import fail, run
from encoder import bytes_to_unicode, get_encoder
from gpt2 import gpt2
from utils import MODEL_SIZES, MODELS_DIR


def train_tokenizer(text, n_vocab, model_dir):
    """Learns a byte-level BPE of n_vocab tokens from text and writes it as OpenAI has it: encoder.json, vocab.bpe."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # cuts words as GPT-2 does
    alphabet = sorted(bytes_to_unicode().values())  # every byte has a token: any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # ids in the order learned, as OpenAI's; two merges may give the same token
    tokens = dict.fromkeys([*alphabet, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"])
    with open(os.path.join(model_dir, "encoder.json"), "w", encoding="utf-8") as f:
        json.dump({token: i for i, token in enumerate(tokens)}, f)
    with open(os.path.join(model_dir, "vocab.bpe"), "w", encoding="utf-8") as f:
        f.write("\n".join(["#version: 0.2", *merges, ""]))


def initial_params(hparams, seed):
    """GPT-2's initialisation: random_params' spread of 0.02, but less for some, and biases of 0."""
    params = random_params(hparams, seed)
    params["wpe"] *= 0.5  # 0.01, as OpenAI's model.py has it
    for block in params["blocks"]:
        for sublayer in (block["attn"], block["mlp"]):  # what these add to the residual stream grows with the depth
            sublayer["c_proj"]["w"] /= math.sqrt(2 * hparams["n_layer"])
    return jax.tree.map_with_path(lambda path, x: jnp.asarray(x * (path[-1].key != "b")), params)


def batches(ids, n_ctx, batch_size, seed, first_step, n_steps):
    """Yields windows of ids, [batch_size, n_ctx+1], for every step from first_step to n_steps.

    Each epoch cuts the text elsewhere and shuffles it. The order follows from seed and step alone, so that a resumed
    run sees what an uninterrupted one would have.
    """
    n_windows = (len(ids) - 1) // n_ctx - 1  # one less: wherever the first begins, the last is whole
    for step in range(first_step, n_steps):
        epoch, i = divmod(step, n_windows // batch_size)
        rng = np.random.default_rng([seed, epoch])
        starts = rng.integers(n_ctx) + n_ctx * rng.permutation(n_windows)
        yield ids[starts[i * batch_size : (i + 1) * batch_size, None] + np.arange(n_ctx + 1)]


def with_dropout(params, rate, key):
    """Params whose layer norms silence a random part of their features: gpt2() needs no flag for training.

    The mask is the same at all positions of a window (variational dropout, https://arxiv.org/abs/1512.05287).
    """

    def drop(ln, key):
        mask = jax.random.bernoulli(key, 1 - rate, ln["g"].shape) / (1 - rate)
        return {"g": ln["g"] * mask, "b": ln["b"] * mask}

    key, *keys = jax.random.split(key, 1 + 2 * len(params["blocks"]))
    blocks = [
        {**block, "ln_1": drop(block["ln_1"], key_1), "ln_2": drop(block["ln_2"], key_2)}
        for block, key_1, key_2 in zip(params["blocks"], keys[::2], keys[1::2], strict=True)
    ]
    return {**params, "blocks": blocks, "ln_f": drop(params["ln_f"], key)}


def token_losses(params, windows, n_head):  # [..., n_ctx+1] -> [..., n_ctx]
    """Cross-entropy in nats: -log of the probability that the model gives each token of windows but the first."""
    log_probs = jax.nn.log_softmax(gpt2(windows[..., :-1], **params, n_head=n_head))  # [..., n_ctx, n_vocab]
    return -jnp.take_along_axis(log_probs, windows[..., 1:, None], axis=-1)[..., 0]


def mean_loss(params, windows, key, dropout, n_head):
    keys = jax.random.split(key, len(windows))  # a mask of its own for each window
    return jax.vmap(lambda window, key: token_losses(with_dropout(params, dropout, key), window, n_head))(
        windows, keys
    ).mean()


def held_out_nats(params, ids, n_ctx, n_head):
    """Nats that predicting all ids but the first takes, in total.

    A window of n_ctx tokens begins every n_ctx/2 and scores only what the one before did not reach, so that every token
    behind the first window is predicted from n_ctx/2 or more.
    """
    losses = jax.jit(token_losses, static_argnames="n_head")
    total, n_scored = 0.0, 0
    for start in range(0, max(1, len(ids) - 1 - n_ctx // 2), n_ctx // 2):
        window = ids[start : start + n_ctx + 1]
        n_tokens = len(window) - 1
        window = np.pad(window, (0, n_ctx - n_tokens))  # the last may be short, but one shape compiles once
        total += np.asarray(losses(params, window, n_head), np.float64)[n_scored - start : n_tokens].sum()
        n_scored = start + n_tokens
    return total


def save_state(path, settings, step, history, arrays):
    """Writes all that a resumed run needs into one .npz file. arrays: any tree of them."""
    leaves = {f"array_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(arrays))}
    with open(path + ".part", "wb") as f:
        np.savez(f, progress=json.dumps([settings, step, history]), **leaves)
    os.replace(path + ".part", path)


def load_state(path, settings, arrays):
    """(step, history, arrays) as save_state wrote them; arrays: a tree like it. Exits if the settings were others."""
    try:
        with np.load(path, allow_pickle=False) as state:
            saved_settings, step, history = json.loads(str(state["progress"]))
            leaves = [jnp.asarray(state[f"array_{i}"]) for i in range(len(jax.tree.leaves(arrays)))]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        fail(f"the run cannot be resumed from {path}: {error}")
    for key, value in settings.items():
        if saved_settings[key] != value:
            fail(f"the run to resume has {key}={saved_settings[key]}, not {value}")
    return step, history, jax.tree.unflatten(jax.tree.structure(arrays), leaves)


def plot(path, history):
    """Draws the loss curves; history: [step, training, held-out], the latter two in nats per character."""
    from matplotlib.figure import Figure

    steps, training, held_out = zip(*history, strict=True)
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.plot(steps, training, label=f"training: {training[-1]:.3f} at last")
    axes.plot(steps, held_out, label=f"held out: {min(held_out):.3f} at best")
    axes.set(xlabel="step", ylabel="nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


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
    learning_rate: float = 2e-3,
    weight_decay: float = 0.1,
    dropout: float = 0.15,
    evaluate_every: int = 500,
    seed: int = 0,
    resume: bool = False,
):
    """Trains a GPT-2 from scratch on a text file.

    Args:
        text_file: UTF-8; its last tenth is held out
        name: the model is saved in the folder of this name in models_dir
        models_dir: the folder that holds the models
        n_vocab: tokens in the vocabulary: the 256 bytes, what is learned from the text, and <|endoftext|>
        n_ctx: tokens that the model sees at once
        n_embd: width of the model
        n_head: attention heads in a block
        n_layer: blocks
        n_steps: updates of the weights
        batch_size: windows of n_ctx tokens that an update learns from
        learning_rate: the highest; it rises to that over the first 2 % of the steps and falls to 0 along a cosine
        weight_decay: AdamW's, of all weights but biases and layer norms
        dropout: the part of the features behind each layer norm that training silences
        evaluate_every: steps from one evaluation to the next; each saves the run, and the model if it is the best yet
        seed: of the first weights and of the order of the text
        resume: go on from the last evaluation of a run with the same arguments
    """
    if not re.fullmatch(r"\w([\w.-]*[\w-])?", name) or name in MODEL_SIZES:
        fail(f"{name!r} is no name for a new model: use letters, digits, dashes, and dots but not at the end")
    hparams = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    settings = {**hparams, "n_steps": n_steps, "batch_size": batch_size, "learning_rate": learning_rate}
    settings |= {"weight_decay": weight_decay, "dropout": dropout, "evaluate_every": evaluate_every, "seed": seed}
    for key, value in settings.items():
        is_number = type(value) is int or (type(value) is float and key in ("learning_rate", "weight_decay", "dropout"))
        if not is_number or value < 0 or (value == 0 and key not in ("weight_decay", "dropout", "seed")):
            fail(f"{key} must be a positive number, not {value!r}")
    if n_vocab < 257 or n_embd % n_head or n_ctx < 2 or dropout >= 1:
        fail("n_vocab must be 257 or more, n_ctx 2 or more, n_embd divisible by n_head, dropout below 1")
    model_dir = os.path.join(models_dir, name)
    state_path, plot_path = os.path.join(model_dir, "state.npz"), os.path.join(model_dir, "loss.png")

    # the text, in two parts
    try:
        with open(text_file, encoding="utf-8", newline="") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{text_file} cannot be read: {error}")
    n_train = len(text) - len(text) // 10
    train_text, held_out_text = text[:n_train], text[n_train:]

    # the tokenizer, learned from the first part alone
    if not resume:
        if os.path.exists(model_dir):
            fail(f"{model_dir} exists: choose another name, delete it, or, if it has a state.npz, --resume")
        os.makedirs(model_dir)
        train_tokenizer(train_text, n_vocab, model_dir)
    try:
        encoder = get_encoder(name, models_dir)
    except (OSError, ValueError) as error:
        fail(f"there is no run to resume: {error}")
    hparams["n_vocab"] = len(encoder.encoder)  # a short text may not yield as many as asked for
    end = encoder.encoder["<|endoftext|>"]  # begins a text: it is what generation from nothing starts from
    train_ids, held_out_ids = (np.array([end, *encoder.encode(part)]) for part in (train_text, held_out_text))
    chars_per_token = len(train_text) / (len(train_ids) - 1)
    if len(train_ids) <= (batch_size + 1) * n_ctx:
        fail(f"{text_file} is too short for {batch_size} windows of {n_ctx} tokens")

    # the model and its optimizer
    params = initial_params(hparams, seed)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, n_steps // 50, n_steps)
    matrices = jax.tree.map(lambda weights: weights.ndim > 1, params)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=weight_decay, mask=matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    optimizer_state, step, history = optimizer.init(params), 0, []
    if resume:
        step, history, (params, optimizer_state) = load_state(state_path, settings, (params, optimizer_state))

    @jax.jit
    def update(params, optimizer_state, windows, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        loss, gradients = jax.value_and_grad(mean_loss)(params, windows, key, dropout, n_head)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return loss, optax.apply_updates(params, updates), optimizer_state

    losses = []
    steps = batches(train_ids, n_ctx, batch_size, seed, step, n_steps)
    for windows in tqdm(steps, "training", n_steps, initial=step, unit="step"):
        loss, params, optimizer_state = update(params, optimizer_state, windows, step)
        step += 1
        losses.append(loss)
        if step % evaluate_every and step < n_steps:
            continue

        nats = held_out_nats(params, held_out_ids, n_ctx, n_head)
        per_token, per_char = nats / (len(held_out_ids) - 1), nats / len(held_out_text)
        tqdm.write(f"step {step}: held out {per_token:.4f} nats per token, {per_char:.4f} per character", sys.stderr)
        if all(per_char < earlier for _, _, earlier in history):
            save_checkpoint(model_dir, hparams, params)
        history.append([step, float(np.mean(losses)) / chars_per_token, per_char])
        losses = []
        plot(plot_path, history)
        save_state(state_path, settings, step, history, (params, optimizer_state))


if __name__ == "__main__":
    run(main, "train.py: stopped; the same command with --resume goes on from the last evaluation, if there was one")
