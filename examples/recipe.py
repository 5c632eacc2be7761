"""The flags of train.py, finetune.py and classify.py, once, and the recipe that they make."""

import functools
import inspect
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from cli import fail
from utils import MODELS_DIR

# {flag: (its type, its default, what it is)}: of all three, and of the two that begin with a model
FLAGS = {
    "name": (str, "", "the result is saved in the folder of this name in models_dir"),
    "models_dir": (str, MODELS_DIR, "the folder that holds the models"),
    "n_steps": (int, 500, "updates of the weights"),
    "batch_size": (int, 8, "windows of n_ctx tokens, pairs or texts that an update learns from"),
    "accumulate": (int, 1, "parts of a batch that are computed one after another: less memory, the same result"),
    "learning_rate": (
        *(float, None),
        "the highest; it rises to that over the first 2 % of the steps and falls to 0 along a cosine",
    ),
    "weight_decay": (float, 0.01, "AdamW's, of all weights but biases and layer norms"),
    "dropout": (float, 0.0, "the part of the features behind each layer norm that training silences"),
    "dtype": (str, "float32", "float32, or bfloat16 to compute in; the weights stay float32"),
    "recompute": (bool, False, "keep fewer activations, and compute them again: less memory, a third more time"),
    "evaluate_every": (
        *(int, None),
        "steps from one evaluation to the next (by default 10 or more: there are 16 at most, and one before the first "
        "step); each saves the run, and the model if it is the best yet",
    ),
    "backend": (
        *(str, None),
        "what computes the gradients: numpy, or jax on all its devices (by default jax, if it and optax are installed)",
    ),
    "seed": (int, 0, "of what learns, of what is held out at random, and of the order of the texts"),
    "distributed": (
        bool,
        False,
        "be one of several processes that each take some rows of a batch (see examples/README.md)",
    ),
    "resume": (bool, False, "go on with a run with the same arguments; more n_steps lengthen it"),
}
BASE_FLAGS = {
    "model_size": (
        *(str, "124M"),
        "124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint",
    ),
    "held_out": (str, "", "a file, folder or glob to evaluate on, instead of a part of files"),
    "learn": (
        *(str, ""),
        "only weights learn that have this in their names, such as mlp, ln_1, b, blocks.11 or blocks.0.attn.c_attn.w; "
        "several with commas between (by default all)",
    ),
    "lora_rank": (int, 0, "learn adapters of this rank instead of all weights (0)"),
    "lora_alpha": (float, None, "adapters are scaled by lora_alpha / lora_rank (by default, 2)"),
    "lora_on": (
        *(str, "c_attn"),
        "which matrices get an adapter: c_attn, c_proj, c_fc, or several with commas between",
    ),
    "n_ctx": (
        *(int, None),
        "tokens in a window, or read of a text (by default 256, or what the model sees at once, if that is less)",
    ),
}
BASE_FLAGS |= FLAGS | {
    "learning_rate": (
        *(float, None),
        f"{FLAGS['learning_rate'][2]} (by default 1e-4, and 1e-3 for adapters or a head alone)",
    ),
}
NO_SETTINGS = "name", "models_dir", "held_out", "distributed", "resume"  # what does not make a run another
MAY_BE_0 = "weight_decay", "dropout", "seed", "lora_rank", "lora_alpha"


def with_flags(flags, **defaults):
    """Decorates a command that takes **recipe: its signature and its help get these flags in the place of that."""
    return functools.partial(add_flags, flags, defaults)


def add_flags(flags, defaults, command):
    signature = inspect.signature(command)
    *own, _ = signature.parameters.values()
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name, default), annotation=kind)
        for name, (kind, default, _) in flags.items()
    ]
    command.__signature__ = signature.replace(parameters=[*own, *shared])
    command.__doc__ = inspect.cleandoc(command.__doc__) + "".join(
        f"\n    {name}: {text}" for name, (_, _, text) in flags.items()
    )
    return command


def complete(command, recipe):
    """{flag: value} of all that with_flags gave a command: as given in recipe, else its default.

    Raises TypeError for what it does not take.
    """
    shared = {
        name: option.default
        for name, option in inspect.signature(command).parameters.items()
        if name in BASE_FLAGS and option.kind is inspect.Parameter.KEYWORD_ONLY
    }
    if unknown := recipe.keys() - shared.keys():
        raise TypeError(f"{command.__name__}() takes no {', '.join(sorted(unknown))}")
    return shared | recipe


def check(options):
    """Ends with one line for flags of a recipe, {flag: value}, that cannot be; other numbers are whole."""
    for key, value in options.items():
        kind, may_be_0 = BASE_FLAGS.get(key, (int,))[0], key in MAY_BE_0
        if kind in (str, bool) or value is None:
            continue
        if type(value) not in {int, kind} or not 0 <= value < math.inf or (value == 0 and not may_be_0):
            least = ", 0 or more," if may_be_0 else " above 0,"
            fail(f"--{key} must be a {'number' if kind is float else 'whole number'}{least} not {value!r}")
    if options["seed"] >= 2**32:
        fail(f"--seed must be below 2**32, not {options['seed']}")
    if options["dtype"] not in ("float32", "bfloat16"):
        fail(f"--dtype must be float32 or bfloat16, not {options['dtype']!r}")
    if options["backend"] not in (None, "numpy", "jax"):
        fail(f"--backend must be numpy or jax, not {options['backend']!r}")
    if options["dropout"] >= 1:
        fail(f"--dropout must be below 1, not {options['dropout']!r}")
    if options["batch_size"] % options["accumulate"]:
        fail(f"a --batch_size of {options['batch_size']} cannot be cut into {options['accumulate']} equal parts")
