"""How a model learns with NumPy alone: the gradients of backward.py, and AdamW. It has what on_jax.py has."""

import functools
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lora
from saving import leaves, with_leaves
from training import sigmoid, with_dropout, with_layer_norms

from backends.threads import blas_threads, each, n_available, thread_counts
from backward import (
    cross_entropy,
    gpt2_backward,
    gpt2_forward,
    hidden_states_backward,
    hidden_states_forward,
    linear_backward,
)
from cli import fail
from gpt2 import linear

PIECE = 2**15  # numbers that AdamW changes at a time: what it computes of so few stays in the processor's cache
BETAS, EPSILON = (0.9, 0.99), 1e-8


def begin(options):
    """(1 device, whether this is the process that writes). Ends with one line for what only JAX can do."""
    for key, usual in (("distributed", False), ("recompute", False), ("dtype", "float32")):
        if options[key] != usual:
            fail(f"--{key} needs --backend jax")
    return 1, True


# losses and gradients

silent = np.errstate(over="ignore", invalid="ignore")  # the run says itself when the loss is no number


@silent
def loss_and_gradients(learned, frozen, rows, n, n_head, scale):
    """(the loss of rows, which are a part of n that count, and its gradients, a tree like learned).

    rows: see on_jax.text_loss and on_jax.class_loss; learned, frozen: see lora.merged.
    """
    params, masks = with_dropout(lora.merged(learned, frozen, scale), rows.get("masks")), rows.get("masks")
    model = params | {"n_head": n_head}
    if "label" in rows:
        x, kept = hidden_states_forward(rows["ids"], **model)  # [n_rows, n_seq, n_embd]
        loss, head = class_loss(x, learned["head"], rows["last"], rows["label"], n)
        d, backward = head.pop("x"), hidden_states_backward
    else:
        logits, kept = gpt2_forward(rows["ids"][..., :-1], **model)  # [n_rows, n_seq, n_vocab]
        loss, d = cross_entropy(logits, rows["ids"][..., 1:], rows["counted"] / n)
        head, backward = None, gpt2_backward
    if learned.keys() == {"head"}:
        return loss, {"head": head}
    gradients = backward(d, kept, **model | needed(params, learned))
    if masks is not None:
        gradients = with_layer_norms(gradients, silenced_backward, masks)
    found = {"params": gradients, "head": head}
    if "weights" in learned:
        of_all = lora.named(gradients)
        found["weights"] = {name: of_all[name] for name in learned["weights"]}
    if "adapters" in learned:
        found["adapters"] = lora.adapters_backward(gradients, learned["adapters"], scale)
    return loss, {name: found[name] for name in learned}


def class_loss(x, head, last, labels, n):
    """(the loss, {"x", "w", "b"}: its gradients), of which the head sees the hidden states of last tokens alone."""
    rows, entropy = np.arange(len(x)), cross_entropy if labels.ndim == 1 else binary_cross_entropy
    loss, d = entropy(linear(x[rows, last], **head), labels, np.full(len(x), 1 / n, x.dtype))
    gradients = linear_backward(d, x[rows, last], **head)  # [n_rows, n_classes] -> [n_rows, n_embd]
    d = np.zeros_like(x)
    d[rows, last] = gradients["x"]
    return loss, gradients | {"x": d}


def binary_cross_entropy(logits, targets, shares):  # [n_classes], [n_classes], [] -> [], [n_classes]
    """(the loss, its gradient): the mean over classes of -t log(sigmoid(x)) - (1 - t) log(1 - sigmoid(x)), where t, the
    target, is 0 or 1, of each text times its share.

    That is log(1 + exp(x)) - t x: its gradient is sigmoid(x) - t.
    """
    shares = shares[..., None] / logits.shape[-1]  # [1]
    loss = (shares * (np.logaddexp(0, logits) - targets * logits)).sum()
    return loss, shares * (sigmoid(logits) - targets)


def needed(params, learned):
    """What backward.py leaves out: the arguments that say so, in the place of those of params."""
    if "params" in learned:
        return {}
    names = learned.get("weights", ()) or [
        f"blocks.{i}.{path.replace('/', '.')}.w" for i, adapter in enumerate(learned["adapters"]) for path in adapter
    ]
    blocks = [marked(block, f"blocks.{i}", names) for i, block in enumerate(params["blocks"])]
    numbers = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    return {"blocks": blocks, "down_to": None if {"wte", "wpe"} & {*names} else min(numbers, default=len(blocks))}


def marked(block, prefix, names):
    """A block, with "frozen": True in the layers whose w is not in names."""
    layers = {
        sublayer: {
            layer: weights | {"frozen": f"{prefix}.{sublayer}.{layer}.w" not in names}
            for layer, weights in block[sublayer].items()
        }
        for sublayer in ("attn", "mlp")
    }
    return block | layers


def silenced_backward(d, mask):  # {name: [n_rows, 1, n_embd]}, [n_rows, n_embd] -> {name: [n_embd]}
    """All rows of a batch have one layer norm, each with a mask of its own: its gradient sums over them."""
    return {name: (x[:, 0] * mask).sum(axis=0) for name, x in d.items()}


# steps


def learning_rate(step, highest, n_steps):
    """It rises to the highest over the first 2 % of the steps, and falls to 0 along a cosine."""
    n_rising = n_steps // 50
    if step < n_rising:
        return highest * step / n_rising
    return highest * (1 + math.cos(math.pi * (step - n_rising) / (n_steps - n_rising))) / 2


@silent
def adamw(piece, step, rate, norm):
    """A step of AdamW (https://arxiv.org/abs/1711.05101, algorithm 2), in place; steps are counted from 0.

    piece: (x, its gradient, mean, square, decay), where mean and square are the running means of gradients and of their
    squares. These began at 0, and are divided by what their weights sum to. norm: that of all gradients, clipped at 1.
    """
    (x, gradient, mean, square, decay), (b1, b2) = piece, BETAS
    gradient = gradient / max(1, norm)
    mean += (1 - b1) * (gradient - mean)
    square += (1 - b2) * (gradient * gradient - square)
    change = np.sqrt(square / (1 - b2 ** (step + 1)))
    change += EPSILON
    np.divide(mean, change, out=change)
    change *= rate / (1 - b1 ** (step + 1))
    x *= 1 - rate * decay
    x -= change


class Learner:
    """What learns in a run, and how: one step of AdamW after another. See on_jax.Learner, whose names it has."""

    is_first = True

    def __init__(self, learned, frozen, n_head, settings):
        self.learned = with_leaves(learned, map(np.array, leaves(learned)))  # copies, which steps write to
        self.means, self.squares = (with_leaves(learned, map(np.zeros_like, leaves(learned))) for _ in range(2))
        self.frozen, self.n_head, self.scale, self.settings = frozen, n_head, lora.scale_of(settings), settings
        self.n_blas = thread_counts(self.model()[0])[0]  # of BLAS's threads, where one thread computes

    @property
    def state(self):
        return self.learned, self.means, self.squares

    def start(self, rows, state=None):
        """state: that of the run to resume. Returns (how many numbers learn, of how many, None)."""
        if state:
            self.learned, self.means, self.squares = state
        n_learned, n_frozen = (sum(x.size for x in leaves(tree)) for tree in (self.learned, self.frozen))
        return n_learned, n_learned + n_frozen, None

    def share(self, which):  # [batch_size] -> [accumulate, n_rows]
        return which.reshape(self.settings["accumulate"], -1)

    def update(self, rows, step):
        """The mean loss of a step, a number, which changes what learns. rows: {name: [accumulate, n_rows, ...]}."""
        n = rows["counted"].sum() if "counted" in rows else rows["last"].size
        options = {"n": n, "n_head": self.n_head, "scale": self.scale}
        backward = functools.partial(loss_and_gradients, self.learned, self.frozen, **options)
        loss, gradients = 0.0, None
        for i in range(self.settings["accumulate"]):
            parts = divided({name: array[i] for name, array in rows.items()})
            with blas_threads(self.n_blas):
                for more, found in each(backward, parts, n_available()):
                    loss, gradients = loss + float(more), added(gradients, leaves(found))
        self.change(gradients, step)
        return loss

    @silent
    def change(self, gradients, step):
        """A step of AdamW, with warm-up and cosine, for gradients clipped at a norm of 1; biases do not decay."""
        with blas_threads(self.n_blas):
            norm = math.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients))
        rate = learning_rate(step, self.settings["learning_rate"], self.settings["n_steps"])
        pieces = []
        for x, *others in zip(leaves(self.learned), gradients, leaves(self.means), leaves(self.squares), strict=True):
            decay = self.settings["weight_decay"] if x.ndim > 1 else 0
            flat = [array.reshape(-1) for array in (x, *others)]
            pieces += [(*(a[i : i + PIECE] for a in flat), decay) for i in range(0, x.size, PIECE)]

        each(functools.partial(adamw, step=step, rate=rate, norm=norm), pieces, n_available())

    def model(self):
        """(params, learned) as they are now, to evaluate and to save."""
        return lora.merged(self.learned, self.frozen, self.scale), self.learned


def divided(rows):
    """Rows in parts, one for each core, whose threads then need not wait for each other; one row is left to BLAS's."""
    n_rows = len(rows["ids"])
    parts = np.array_split(np.arange(n_rows), min(n_available(), n_rows))
    return [{name: array[part] for name, array in rows.items()} for part in parts]


def added(sums, arrays):
    """Lists of arrays, summed in place of the first; None for nothing yet."""
    if sums is None:
        return arrays
    for total, array in zip(sums, arrays, strict=True):
        total += array
    return sums
