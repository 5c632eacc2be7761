"""What train.py, finetune.py and classify.py share: what is learned from, and a loop that evaluates, saves and resumes.

The loop knows neither texts nor classes, nor whose arrays compute. It is handed numbers that learn and others that stay
as they are, and a task: rows to learn from (task.data), and a measure of how good the model is (task.evaluate). What
computes gradients and makes steps is a Learner: see on_jax.py.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import re
import signal
import sys
import textwrap
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import recipe
from evaluate import text_nats
from lora import save_adapters
from saving import STATE, alone, beside, copy_tokenizer, leaves, load_state, plot, replaced, save_state, with_leaves
from texts import END, checksum, checksums, kind_of, read_documents, text_ids

from backends.arrays import on_processor
from cli import as_typed, fail, mistakes, need, printable
from files.bar import Bar
from files.checkpoint import ENCODER, VOCAB, save_checkpoint, weight_files
from gpt2 import generate, layer_norm, linear
from languages import translated
from utils import MODEL_SIZES, NEW_NAME

HEAD = "classes.npz"

# how a run begins


def begin(options, *packages):
    """(the folder of the new model, or of the one to resume, settings): what a run needs before it looks at its data.

    options: the flags of a recipe and other numbers, by name. settings: those of them that make the run what it is.
    packages: what it needs besides.
    Ends with one line for what cannot be.
    """
    recipe.check(options)
    settings = {key: value for key, value in options.items() if key not in recipe.NO_SETTINGS}
    settings["evaluate_every"] = settings["evaluate_every"] or max(10, -(-settings["n_steps"] // 16))
    of_jax = ["jax", "optax"]
    settings["backend"] = options["backend"] or ("jax" if all(map(importlib.util.find_spec, of_jax)) else "numpy")
    need(*(of_jax if settings["backend"] == "jax" else []), *packages)
    model_dir, resume = new_model(options["name"], options["models_dir"]), options["resume"]
    n_devices, is_first = learner_module(settings["backend"]).begin(options)
    n_rows = settings["batch_size"] // settings["accumulate"]
    if n_rows % n_devices:
        fail(f"{n_rows} rows cannot be divided over {n_devices} devices: choose another --batch_size or --accumulate")
    if is_first and any(os.path.exists(beside(model_dir, kind)) for kind in ("lock", "old")):
        with alone(model_dir):
            pass  # ends if another process has it; else puts in order what one has left
    if resume and not os.path.exists(os.path.join(model_dir, STATE)):
        fail(f"there is no run to resume in {model_dir}")
    if not resume and is_first:
        refuse_existing(model_dir)
    return model_dir, settings


def learner_module(backend):
    """on_numpy or on_jax, each with a begin() and a Learner; only here: all before needs no library, and is done in no
    time."""
    return importlib.import_module(f"on_{backend}")


def new_model(name, models_dir):
    """The folder for a new model. Ends with one line for a name that cannot be one, or with nowhere to be."""
    if not name:
        fail("--name is needed (see --help)")
    if name in MODEL_SIZES:
        fail(f"{name!r} is the name of a model of OpenAI's: choose another for yours")
    if not re.fullmatch(NEW_NAME, name):
        fail(f"{name!r} is no name for a new model: use letters, digits, dashes, and dots but not at the end")
    there = os.path.abspath(models_dir)
    while not os.path.lexists(there):  # what is not there yet is made with the model
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        fail(f"{there} is no folder that can be written to")
    return os.path.join(models_dir, name)


def refuse_existing(model_dir):
    if os.path.exists(os.path.join(model_dir, STATE)):
        fail(f"{model_dir} exists: go on with --resume, choose another name, or delete it")
    if os.path.exists(model_dir) and not (os.path.isdir(model_dir) and not os.listdir(model_dir)):
        fail(f"{model_dir} exists: choose another name, or delete it")


def base_of(model_dir):
    """A checksum of the model that a run begins with, which is a setting."""
    _, data = weight_files(model_dir)
    return checksum([os.path.join(model_dir, name) for name in (ENCODER, VOCAB, *data)])


def read_data(files, held_out, *kinds):
    """(documents to learn from, those to be evaluated on, checksums of both, which are a setting): see read_documents.

    held_out: "" for none.
    """
    documents = read_documents(files, *kinds)
    others = read_documents([held_out], *kinds) if held_out else []
    if others and kind_of(others[0]) != kind_of(documents[0]):
        fail(f"{held_out} is of another kind than {files[0]}")
    return documents, others, checksums(files, held_out)


def context(n_ctx, hparams):
    """n_ctx as the user has it, or 256 tokens; ends with one line for more than the model sees at once."""
    if n_ctx is not None and n_ctx > hparams["n_ctx"]:
        fail(f"the model sees {hparams['n_ctx']} tokens at once, not {n_ctx}")
    return n_ctx or min(256, hparams["n_ctx"])


# rows: dicts of arrays [..., n], and the order in which an epoch takes them


class Windows:
    """The rows of a text: each epoch cuts it elsewhere, into windows of n_ctx+1 ids, and shuffles them.

    Ends with one line if there are fewer than batch_size.
    """

    def __init__(self, ids, n_ctx, batch_size):
        self.ids, self.n_ctx = ids, n_ctx
        self.n_windows = (len(ids) - 1) // n_ctx - 1  # one less: wherever the first begins, the last is whole
        if self.n_windows < batch_size:
            fail(
                f"the text is too short for {batch_size} windows of {n_ctx} tokens: it has {len(ids)}: "
                "choose a smaller --n_ctx or --batch_size"
            )

    def order(self, rng):  # where the windows of an epoch begin: [n_windows]
        return rng.integers(self.n_ctx) + self.n_ctx * rng.permutation(self.n_windows)

    def rows(self, starts):
        windows = self.ids[starts[..., None] + np.arange(self.n_ctx + 1)]
        return {"ids": windows, "counted": np.ones((*starts.shape, self.n_ctx), np.float32)}


class Rows:
    """Rows of arrays {name: [n_rows, ...]}, shuffled. Ends with one line if there are fewer than batch_size."""

    def __init__(self, arrays, batch_size):
        self.arrays = arrays
        (self.n_rows,) = {len(array) for array in arrays.values()}
        if self.n_rows < batch_size:
            fail(f"{self.n_rows} are too few to learn from {batch_size} at once: choose a smaller --batch_size")

    def order(self, rng):
        return rng.permutation(self.n_rows)

    def rows(self, which):
        return {name: array[which] for name, array in self.arrays.items()}


def batches(order, batch_size, seed, first_step, n_steps):
    """Yields which rows a step learns from, [batch_size], for every step from first_step to n_steps.

    They follow from seed and step alone, so that a resumed run sees what an uninterrupted one would have.
    """
    n_batches = len(order(np.random.default_rng(0))) // batch_size
    for step in range(first_step, n_steps):
        epoch, i = divmod(step, n_batches)
        if i == 0 or step == first_step:
            rows = order(np.random.default_rng([seed, epoch]))
        yield rows[i * batch_size : (i + 1) * batch_size]


def dropout_masks(rate, seed, step, n_rows, hparams):  # [n_rows, 2*n_layer+1, n_embd]
    """What the features behind each layer norm are multiplied by in a step: 0 for a random part of them.

    It is the same at all positions of a row (variational dropout, https://arxiv.org/abs/1512.05287).
    """
    rng = np.random.default_rng([seed, step, n_rows])  # not those of batches()
    shape = n_rows, 2 * hparams["n_layer"] + 1, hparams["n_embd"]
    return (rng.random(shape, np.float32) >= rate) / np.float32(1 - rate)


# the model


def hidden_states(ids, wte, wpe, blocks, ln_f, block):  # [n_seq] -> [n_seq, n_embd]
    """gpt2() up to its projection to the vocabulary. block: transformer_block, or what computes the same."""
    x = wte[ids] + wpe[: len(ids)]
    for weights in blocks:
        x = block(x, **weights)
    return layer_norm(x, **ln_f)


def with_dropout(params, masks):
    """Params whose layer norms silence features: gpt2() needs no flag for training. masks: dropout_masks', or None."""
    return params if masks is None else with_layer_norms(params, silenced, masks)


def with_layer_norms(params, function, masks):  # [..., 2*n_layer+1, n_embd]
    """Params with function(ln, mask) in the place of each layer norm."""
    of_norms = [masks[..., i, :] for i in range(masks.shape[-2])]
    blocks = [
        block | {name: function(block[name], mask) for name, mask in [("ln_1", ln_1), ("ln_2", ln_2)] if name in block}
        for block, ln_1, ln_2 in zip(params["blocks"], of_norms[:-1:2], of_norms[1::2], strict=True)
    ]
    return {**params, "blocks": blocks, "ln_f": function(params["ln_f"], of_norms[-1])}


def silenced(ln, mask):  # [n_embd], or [n_rows, n_embd] for a batch
    return {name: x * mask[..., None, :] for name, x in ln.items()}  # the same at all positions


def class_logits(params, head, ids, last, block):  # [n_seq], [] -> [n_classes]
    """What the head makes of the hidden state of the token at last; behind it is padding. Rows need JAX's vmap."""
    return linear(hidden_states(ids, **params, block=block)[last], **head)


def sigmoid(x):  # neither exp overflows: that is 1 / (1 + exp(-x))
    return np.exp(-np.logaddexp(0, -x))


class Texts:
    """A task: to predict texts, learned from windows of n_ctx tokens, measured on others that are held out."""

    unit = "nats per character"

    def __init__(self, encoder, texts, held_out, n_ctx, n_head, batch_size):
        self.encoder, self.n_ctx, self.n_head = encoder, n_ctx, n_head
        ids, self.held_out, self.n_chars = (
            text_ids(encoder, texts),
            text_ids(encoder, held_out),
            sum(map(len, held_out)),
        )
        self.data = Windows(ids, n_ctx, batch_size)
        self.scale = (len(ids) - 1) / sum(map(len, texts))  # tokens per character

    def evaluate(self, params, learned):
        """(nats per character of the texts held out, a line that says so, with a sample)."""
        params = in_small_batches(params)
        nats = sum(map(np.sum, text_nats(params, self.held_out, self.n_ctx, self.n_head)))
        per_token, per_character = nats / (len(self.held_out) - 1), nats / self.n_chars
        bits = per_character / math.log(2)
        line = f"held out {per_token:.4f} nats per token, {per_character:.4f} nats per character ({bits:.4f} bits)"
        return per_character, f"{line}\n{sample(self.encoder, params, self.n_head)}"


def on_numpy(params):
    return with_leaves(params, map(np.asarray, leaves(params)))


def in_small_batches(params):
    """Params to evaluate with: on the processor NumPy's, which take less at once, and so less memory."""
    return on_numpy(params) if on_processor(params["wte"]) else params


def sample(encoder, params, n_head, prompt="", n_tokens=40):
    """A text that the model makes of a prompt, or of the beginning of a line. On NumPy, which compiles nothing."""
    params, end, n_ctx = on_numpy(params), encoder.encoder[END], len(params["wpe"])
    ids, n_tokens = encoder.encode(prompt or "\n")[1 - n_ctx :], min(n_tokens, n_ctx // 2)
    options = {"temperature": 0.8, "seed": 0, "sliding_window": True, "stop": lambda ids: ids[-1] == end}
    ids = [i for i in generate(ids, params, n_head, n_tokens, bar=False, **options) if i != end]
    return indented(encoder.decode(ids))


def indented(text):
    return textwrap.indent("\n".join(map(printable, text.strip().split("\n"))), "    ", lambda _: True)


# the run


class Run:
    """A run of training: where it lies, how far it is, and what it has seen.

    settings: a run is resumed with the same ones only, but for saving.MAY_CHANGE. step: how many there have been;
    losses: of each since the last evaluation; history: [step, mean of losses or None, what task.evaluate found] of each
    evaluation. model_dir gets the tokenizer's files from tokenizer_dir.
    """

    def __init__(self, model_dir, tokenizer_dir, hparams, settings, learner, task):
        self.model_dir, self.tokenizer_dir, self.hparams, self.settings = model_dir, tokenizer_dir, hparams, settings
        self.learner, self.task, self.step, self.history, self.losses = learner, task, 0, [], []

    def start(self, resume):
        """Reads the state that it goes on from, and has the learner compile a step."""
        state, settings = None, self.settings
        if resume:
            found = load_state(os.path.join(self.model_dir, STATE), settings, self.learner.state)
            self.step, self.history, self.losses, state = found
        (any_batch,) = batches(self.task.data.order, settings["batch_size"], settings["seed"], 0, 1)
        n_learned, n, n_gb = self.learner.start(self.rows(any_batch), state)  # their shapes are all the same
        self.say(f"{n_learned:,} of {n:,} numbers learn" + (f"; a step needs about {n_gb:.2g} GB" if n_gb else ""))

    def learn(self):
        """Makes the steps that are left, evaluates and saves. Returns whether Ctrl-C ended it."""
        n_steps, first_step, seconds = self.settings["n_steps"], self.step, 0.0
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if not self.history:
                self.save()  # so that whatever ends the run, it can be resumed
                self.look()
            elif self.step > self.history[-1][0] and self.is_time_to_look():
                self.look()  # Ctrl-C came while that was done
            steps = batches(
                self.task.data.order, self.settings["batch_size"], self.settings["seed"], self.step, n_steps
            )
            for which in Bar(steps, "training", n_steps, initial=self.step, unit="step"):
                rows, started = self.rows(which), time.monotonic()
                with uninterrupted():  # the old weights are given away before the new ones are there
                    self.losses.append(self.learner.update(rows, self.step))
                    self.step += 1
                seconds += time.monotonic() - started
                if self.step == first_step + 10:
                    minutes = seconds / 10 * (n_steps - self.step) / 60
                    self.say(f"a step takes {seconds / 10:.2g} s: {minutes:.1f} minutes to go, and evaluations")
                if self.is_time_to_look():
                    self.look()
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt), uninterrupted():  # pressed again, it waits all the same
                self.save()
            return True
        finally:
            signal.signal(signal.SIGINT, before)
        return False

    def rows(self, which):
        """The part of a batch that this process learns from: {name: [accumulate, n_rows, ...]}."""
        rows, share = self.task.data.rows(self.learner.share(which)), self.learner.share(np.arange(len(which)))
        rate, seed = self.settings["dropout"], self.settings["seed"]
        masks = {"masks": dropout_masks(rate, seed, self.step, len(which), self.hparams)[share]} if rate else {}
        return rows | masks

    def is_time_to_look(self):
        return self.step % self.settings["evaluate_every"] == 0 or self.step == self.settings["n_steps"]

    def is_done(self):
        return self.step == self.settings["n_steps"] and self.history[-1][0] == self.step

    def look(self):
        """Evaluates; saves the run, and the model if it is the best yet."""
        params, learned = self.learner.model()
        value, line = self.task.evaluate(params, learned)
        self.say(f"step {self.step}: {line}")
        if not math.isfinite(value):
            fail(f"the loss is no number any more at step {self.step}: the --learning_rate is too high")
        with uninterrupted():
            is_best = all(value < earlier for _, _, earlier in self.history)
            mean = self.task.scale * float(np.mean(self.losses)) if self.losses else None
            self.history.append([self.step, mean, value])
            self.losses.clear()
            if is_best:
                self.save_model(params, learned)
            else:
                self.save()

    def save(self):
        """Writes the state of the run, and draws its losses: into the model's folder, or a new one without a model."""
        if not self.learner.is_first:
            return
        with mistakes(OSError, f"{self.model_dir} cannot be saved: "):
            if os.path.exists(os.path.join(self.model_dir, STATE)):
                self.write_state(self.model_dir)
                return
            with replaced(self.model_dir) as folder:
                copy_tokenizer(self.tokenizer_dir, folder)
                self.write_state(folder)

    def save_model(self, params, learned):
        """Writes the model, and all that belongs to it, with the state of the run."""
        if not self.learner.is_first:
            return
        with mistakes(OSError, f"{self.model_dir} cannot be saved: "), replaced(self.model_dir) as folder:
            copy_tokenizer(self.tokenizer_dir, folder)
            save_checkpoint(folder, self.hparams, params)
            if "head" in learned:
                arrays = {"labels": np.array(self.settings["labels"]), "activation": np.array(self.task.activation)}
                np.savez(os.path.join(folder, HEAD), **arrays, **learned["head"])
            elif "adapters" in learned:
                names = ("lora_alpha", "lora_on", "model_size")
                save_adapters(folder, learned["adapters"], *(self.settings[name] for name in names))
            self.write_state(folder)

    def write_state(self, folder):
        progress = self.settings, self.step, self.history, self.losses
        if self.step or not self.history:  # that before the first step is there already
            save_state(os.path.join(folder, STATE), *progress, self.learner.state)
        if self.history:
            plot(os.path.join(folder, "loss.png"), self.history, self.task.unit)

    def say(self, text):
        if self.learner.is_first:
            line, *sample = text.split("\n")
            Bar.write("\n".join([translated(line), *sample]), sys.stderr)


def train(model_dir, tokenizer_dir, hparams, learned, frozen, task, settings, resume):
    """Learns from the rows of task.data, and leaves the best model in model_dir.

    learned, frozen: see lora.merged. task: such as Texts. Others: see begin and Run.
    """
    learner = learner_module(settings["backend"]).Learner(learned, frozen, hparams["n_head"], settings)
    run = Run(model_dir, tokenizer_dir, hparams, settings, learner, task)
    with alone(model_dir) if learner.is_first else contextlib.nullcontext():
        if learner.is_first and not resume:
            refuse_existing(model_dir)  # it may have come meanwhile
        run.start(resume)
        if not importlib.util.find_spec("matplotlib"):
            run.say("matplotlib is not installed: the loss curve is not drawn")
        is_stopped = run.learn()
    n_steps = settings["n_steps"]
    if is_stopped and not run.is_done():
        run.say(f"stopped at step {run.step} of {n_steps}, which is saved; to go on: {command_to_resume()}")
        os._exit(130)
    step, _, value = min(run.history, key=lambda entry: entry[2])
    run.say(f"{model_dir} has the weights of step {step}: {value:.4f} {task.unit}")
    state = os.path.join(model_dir, STATE)
    if learner.is_first:
        run.say(f"{state}, of {max(1, os.path.getsize(state) // 10**6):,} MB, is for --resume alone: delete it if done")


def command_to_resume():
    return as_typed([*sys.orig_argv, *["--resume"][: "--resume" not in sys.argv]])


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits until what is within has been done; pressed again, it ends the program at once."""
    presses = []
    handler = signal.signal(signal.SIGINT, lambda *_: os._exit(130) if presses else presses.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if presses:
        raise KeyboardInterrupt
