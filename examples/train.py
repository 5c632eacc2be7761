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
from encoder import bytes_to_unicode, get_encoder
from gpt2 import MODELS_DIR, gpt2
from utils import load_encoder_hparams_and_params, random_params, save_checkpoint


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


def batches(ids, n_ctx, batch_size, seed, step, n_steps):
    """Yields (windows, position) for every step from step to n_steps; each epoch cuts the text elsewhere, and shuffles.

    windows: ids, [4*batch_size, n_ctx/4 + 1] for the first half of the steps, [batch_size, n_ctx+1] for the second:
        short windows teach most of it, and faster (Shortformer, https://arxiv.org/abs/2012.15832).
    position: where in the context they lie, at random, so that short ones teach the model all of its positions.
    The order follows from seed and step alone, so that a resumed run sees what an uninterrupted one would have.
    """
    while step < n_steps:
        length, n_rows, i = n_ctx // 4, 4 * batch_size, step
        if step >= n_steps // 2:
            length, n_rows, i = n_ctx, batch_size, step - n_steps // 2
        n_windows = (len(ids) - 1) // length - 1  # one less: wherever the first begins, the last is whole
        epoch, i = divmod(i, n_windows // n_rows)
        rng = np.random.default_rng([seed, length, epoch])
        starts = rng.integers(length) + length * rng.permutation(n_windows)
        windows = ids[starts[i * n_rows : (i + 1) * n_rows, None] + np.arange(length + 1)]
        yield windows, np.random.default_rng([seed, step]).integers(n_ctx - length + 1)
        step += 1


def token_losses(params, windows, n_head):  # [..., n_ctx+1] -> [..., n_ctx]
    """Cross-entropy in nats: -log of the probability that the model gives each token of windows but the first."""
    log_probs = jax.nn.log_softmax(gpt2(windows[..., :-1], **params, n_head=n_head))  # [..., n_ctx, n_vocab]
    return -jnp.take_along_axis(log_probs, windows[..., 1:, None], axis=-1)[..., 0]


def mean_loss(params, windows, position, n_head):
    wpe = jax.lax.dynamic_slice_in_dim(params["wpe"], position, windows.shape[-1] - 1)
    return token_losses({**params, "wpe": wpe}, windows, n_head).mean()


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
        sys.exit(f"train.py: the run cannot be resumed from {path}: {error}")
    for key, value in settings.items():
        if saved_settings[key] != value:
            sys.exit(f"train.py: the run to resume has {key}={saved_settings[key]}, not {value}")
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
    text_file,
    *rest,
    name,
    models_dir=MODELS_DIR,
    n_vocab=512,
    n_ctx=256,
    n_embd=128,
    n_head=4,
    n_layer=4,
    n_steps=10_000,
    batch_size=2,
    learning_rate=3e-3,
    weight_decay=0.1,
    evaluate_every=1000,
    seed=0,
    resume=False,
    **unknown,
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
        batch_size: windows of n_ctx tokens that an update learns from, or four times as many of a quarter
        learning_rate: the highest; it rises to that over the first 2 % of the steps and falls to 0 along a cosine
        weight_decay: AdamW's, of all weights but biases and layer norms
        evaluate_every: steps from one evaluation to the next; each saves the run, and the model if it is the best yet
        seed: of the first weights and of the order of the text
        resume: go on from the last evaluation of a run with the same arguments
    """
    if rest or unknown:
        sys.exit(f"train.py: unknown argument {[*rest, *unknown][0]} (see --help)")
    name = str(name)  # Fire makes 1984 a number
    if not re.fullmatch(r"\w[\w.-]*", name):
        sys.exit(f"train.py: {name!r} is no model name: use letters, digits, dots and dashes")
    hparams = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    settings = {**hparams, "n_steps": n_steps, "batch_size": batch_size, "learning_rate": learning_rate}
    settings |= {"weight_decay": weight_decay, "evaluate_every": evaluate_every, "seed": seed}
    for key, value in settings.items():
        is_number = type(value) is int or (type(value) is float and key in ("learning_rate", "weight_decay"))
        if not is_number or value < 0 or (value == 0 and key not in ("weight_decay", "seed")):
            sys.exit(f"train.py: {key} must be a positive number, not {value!r}")
    if n_vocab < 257 or n_embd % n_head or n_ctx % 4:
        sys.exit("train.py: n_vocab must be 257 or more, n_embd divisible by n_head, and n_ctx by 4")
    model_dir = os.path.join(models_dir, name)
    state_path, plot_path = os.path.join(model_dir, "state.npz"), os.path.join(model_dir, "loss.png")

    # the text, in two parts
    try:
        with open(text_file, encoding="utf-8", newline="") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"train.py: {text_file} cannot be read: {error}")
    n_train = len(text) - len(text) // 10
    train_text, held_out_text = text[:n_train], text[n_train:]

    # the tokenizer, learned from the first part alone
    if not resume:
        if os.path.exists(model_dir):
            sys.exit(f"train.py: {model_dir} exists: choose another name, delete it, or go on with it by --resume")
        os.makedirs(model_dir)
        train_tokenizer(train_text, n_vocab, model_dir)
    try:
        encoder = get_encoder(name, models_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: there is no run to resume: {error}")
    hparams["n_vocab"] = len(encoder.encoder)  # a short text may not yield as many as asked for
    end = encoder.encoder["<|endoftext|>"]  # begins a text: it is what generation from nothing starts from
    train_ids, held_out_ids = (np.array([end, *encoder.encode(part)]) for part in (train_text, held_out_text))
    chars_per_token = len(train_text) / (len(train_ids) - 1)
    if len(train_ids) <= (batch_size + 1) * n_ctx:
        sys.exit(f"train.py: {text_file} is too short for {batch_size} windows of {n_ctx} tokens")

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
    def update(params, optimizer_state, windows, position):
        loss, gradients = jax.value_and_grad(mean_loss)(params, windows, position, n_head)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return loss, optax.apply_updates(params, updates), optimizer_state

    losses = []
    steps = batches(train_ids, n_ctx, batch_size, seed, step, n_steps)
    for windows, position in tqdm(steps, "training", n_steps, initial=step, unit="step"):
        loss, params, optimizer_state = update(params, optimizer_state, windows, position)
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

    load_encoder_hparams_and_params(name, models_dir)  # TensorFlow verifies the model: later starts need it no more


if __name__ == "__main__":
    import fire

    try:
        fire.Fire(main)
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command with --resume goes on from the last evaluation")
