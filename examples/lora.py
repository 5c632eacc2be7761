"""LoRA (https://arxiv.org/abs/2106.09685): small matrices A and B, whose product is added to a model's weights.

They lie beside the model under the names of PEFT, a library for PyTorch.
"""

import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from formats import read_adapter

from cli import fail, one_line

LAYERS = {"c_attn": ("attn/c_attn",), "c_proj": ("attn/c_proj", "mlp/c_proj"), "c_fc": ("mlp/c_fc",)}
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def with_adapters(params, adapters, scale):
    """Params with scale * A @ B added to the weights w that have an adapter, A [in, rank] and B [rank, out].

    adapters: for every block {"attn/c_attn": {"A", "B"}, ...}. scale: alpha / rank.
    """
    blocks = [adapted(block, adapter, scale) for block, adapter in zip(params["blocks"], adapters, strict=True)]
    return {**params, "blocks": blocks}


def adapted(block, adapter, scale):
    for path, matrices in adapter.items():
        sublayer, layer = path.split("/")
        w = block[sublayer][layer]["w"] + scale * matrices["A"] @ matrices["B"]  # [in, out]
        block = {**block, sublayer: {**block[sublayer], layer: {**block[sublayer][layer], "w": w}}}
    return block


def adapters_backward(d, adapters, scale):
    """The gradients of adapters; d: those of the params that they were merged into. Of A @ B, A has that @ B.T."""
    return [
        {path: adapter_backward(block, path, scale, **adapter[path]) for path in adapter}
        for block, adapter in zip(d["blocks"], adapters, strict=True)
    ]


def adapter_backward(block, path, scale, A, B):  # noqa: N803
    sublayer, layer = path.split("/")
    d = scale * block[sublayer][layer]["w"]  # [in, out]
    return {"A": d @ B.T, "B": A.T @ d}  # [in, rank], [rank, out]


def named(tree, prefix=""):
    """{"wte": an array, "blocks.0.attn.c_attn.w": another, ...} of a tree of dicts and lists, such as params."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    nodes = tree.items() if isinstance(tree, dict) else enumerate(tree)
    parts = [named(node, f"{prefix}.{key}" if prefix else str(key)) for key, node in nodes]
    return {name: x for part in parts for name, x in part.items()}


def with_weights(tree, weights, prefix=""):
    """Params with weights, {name: an array}, in the place of those that have these names."""
    if isinstance(tree, dict):
        return {key: with_weights(node, weights, f"{prefix}{key}.") for key, node in tree.items()}
    if isinstance(tree, list):
        return [with_weights(node, weights, f"{prefix}{i}.") for i, node in enumerate(tree)]
    return weights.get(prefix[:-1], tree)


def chosen(params, learn):
    """(weights, the other params): those whose names have one of the parts that --learn lists, as it was typed.

    Ends with one line for a part that no name has.
    """
    weights = {}
    for part in learn.replace(" ", "").split(","):
        found = {name: x for name, x in named(params).items() if f".{part}." in f".{name}."}
        if not found:
            fail(
                f"--learn takes parts of names such as mlp, ln_1, b or blocks.{len(params['blocks']) - 1}, not {part!r}"
            )
        weights |= found
    return weights, with_weights(params, {name: np.zeros(0, np.float32) for name in weights})


def parts_of(params, options, seed):
    """(what learns, what does not) of a model, by the flags of a recipe: see merged."""
    if options["lora_rank"]:
        return {"adapters": new_adapters(params, options["lora_rank"], options["lora_on"], seed)}, {"params": params}
    if options["learn"]:
        weights, others = chosen(params, options["learn"])
        return {"weights": weights}, {"params": others}
    return {"params": params}, {}


def merged(learned, frozen, scale):
    """The params of a model of which a part learns: learned has all "params", or "weights" in the place of some of
    those in frozen, by name, or "adapters" to them.

    With none of these, the model is as it was; what else may learn, such as a "head", is no part of it.
    """
    if "adapters" in learned:
        return with_adapters(frozen["params"], learned["adapters"], scale)
    if "weights" in learned:
        return with_weights(frozen["params"], learned["weights"])
    return learned["params"] if "params" in learned else frozen["params"]


def scale_of(settings):
    """What adapters are scaled by, as a run has it in its settings."""
    return settings["lora_alpha"] / settings["lora_rank"] if settings.get("lora_rank") else 1.0


def new_adapters(params, rank, names, seed=0):
    """Adapters that change nothing yet: A is random, B is zero. names: which of LAYERS have one."""
    rng, paths = np.random.default_rng(seed), [path.split("/") for name in names for path in LAYERS[name]]
    return [
        {f"{sublayer}/{layer}": new_adapter(block[sublayer][layer]["w"], rank, rng) for sublayer, layer in paths}
        for block in params["blocks"]
    ]


def new_adapter(w, rank, rng):
    n_in, n_out = w.shape
    a = rng.standard_normal((n_in, rank), dtype=np.float32) / np.float32(np.sqrt(n_in))
    return {"A": a, "B": np.zeros((rank, n_out), np.float32)}


def lora_layers(lora_rank, lora_alpha, lora_on):
    """--lora_on, as it was typed -> which of LAYERS. Ends with one line for others, and for flags that do nothing."""
    names = lora_on.replace(" ", "").split(",")
    if not {*names} <= LAYERS.keys():
        fail(f"--lora_on takes {', '.join(LAYERS)}, not {lora_on}")
    if lora_rank and lora_alpha == 0:
        fail("--lora_alpha must be a number above 0: adapters are scaled by it")
    if not lora_rank and (lora_alpha is not None or lora_on != "c_attn"):
        fail("--lora_alpha and --lora_on do nothing without --lora_rank")
    return names


def complete(options, is_part):
    """A recipe's options with what follows from others: lora_on as names of LAYERS, lora_alpha and learning_rate.

    is_part: whether less than all weights learn. Ends with one line for flags of LoRA that cannot be.
    """
    if options["learn"] and is_part:
        fail("--learn chooses among the weights: it does not go with --lora_rank or --head_only")
    names = lora_layers(options["lora_rank"], options["lora_alpha"], options["lora_on"])
    usual = {"lora_alpha": 2 * options["lora_rank"], "learning_rate": 1e-3 if is_part else 1e-4}
    settled = {key: value if options[key] is None else options[key] for key, value in usual.items()}
    return options | settled | {"lora_on": names}


def save_adapters(folder, adapters, alpha, names, model_size):
    """Writes adapters as PEFT does, whose matrices are the other way round: lora_A [rank, in], lora_B [out, rank]."""
    from safetensors.numpy import save

    tensors = {
        f"{peft_name(i, path)}.lora_{which}.weight": np.ascontiguousarray(np.asarray(matrix).T)
        for i, adapter in enumerate(adapters)
        for path, matrices in adapter.items()
        for which, matrix in matrices.items()
    }
    rank = next(iter(tensors.values())).shape[0]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model_size, "bias": "none"}
    config |= {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": [*names]}
    config |= {"fan_in_fan_out": True, "inference_mode": True}  # GPT-2's w are [in, out] in transformers, too
    with open(os.path.join(folder, ADAPTER), "wb") as f:
        f.write(save(tensors))
    with open(os.path.join(folder, ADAPTER_CONFIG), "w", encoding="utf-8", newline="\n") as f:
        json.dump(config, f, indent=2)


def load_adapters(folder, params):
    """(adapters, scale, the name of the model they were made for) as save_adapters or PEFT wrote them for a model like
    params. Ends with one line if they do not fit it, or are no plain LoRA of its matrices."""
    try:
        with open(os.path.join(folder, ADAPTER_CONFIG), encoding="utf-8") as f:
            config = json.load(f)
        rank, scale = rank_and_scale(config)
    except (OSError, ValueError, RecursionError) as error:
        fail(f"the adapters in {folder} cannot be read: {ADAPTER_CONFIG}: {one_line(error)}")
    base, tensors = config.get("base_model_name_or_path"), read_adapter(folder)
    adapters = [{} for _ in params["blocks"]]
    for i, block in enumerate(params["blocks"]):
        for path in (path for paths in LAYERS.values() for path in paths):
            sublayer, layer = path.split("/")
            a, b = (tensors.pop(f"{peft_name(i, path)}.lora_{which}.weight", None) for which in "AB")
            if a is None and b is None:
                continue
            n_in, n_out = block[sublayer][layer]["w"].shape
            if np.shape(a) != (rank, n_in) or np.shape(b) != (n_out, rank):
                fail(f"the adapters in {folder} do not fit the model: {path} of block {i} is {n_in} x {n_out}")
            adapters[i][path] = {"A": a.T.astype(np.float32), "B": b.T.astype(np.float32)}
    if tensors or not any(adapters):
        fail(f"the adapters in {folder} do not fit the model: it has no {next(iter(tensors), 'adapters')}")
    return adapters, scale, base if isinstance(base, str) else None


def rank_and_scale(config):
    """Of what adapter_config.json holds. Raises ValueError if that is no plain LoRA."""
    rank, alpha = (config.get(key) if isinstance(config, dict) else None for key in ("r", "lora_alpha"))
    if type(rank) is not int or not 0 < rank < 2**31:
        raise ValueError(f"r must be a whole number above 0, not {rank!r:.40}")
    if type(alpha) not in (int, float) or not abs(alpha) < 2**31:
        raise ValueError(f"lora_alpha must be a number, not {alpha!r:.40}")
    if config.get("alpha_pattern") or config.get("rank_pattern"):
        raise ValueError("they have ranks or scales of their own for some layers")
    if config.get("use_dora"):
        raise ValueError("they are DoRA's, which are no plain sums")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def peft_name(i, path):
    return f"base_model.model.transformer.h.{i}.{path.replace('/', '.')}"
