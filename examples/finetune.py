"""Fine-tunes a GPT-2 on your texts, all of its weights or adapters to them (LoRA), and saves a model of its own.

    python examples/finetune.py my_text.txt --model_size 124M --name mine
    python examples/finetune.py my_chats.jsonl --model_size 124M --name mine --lora_rank 8
    python gpt2.py "..." --model_size mine

LoRA leaves the weights as they are and learns small matrices A and B, whose product is added to some of them. They lie
beside the model under the names of PEFT, a library for PyTorch, and can be applied to a model again:

    python examples/finetune.py --merge models/mine --model_size 124M --name again
"""

import inspect
import json
import os
import shutil
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: during the imports, too

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import training
from formats import read_adapter

from cli import fail, mistakes, note, one_line, run
from files.checkpoint import ENCODER, VOCAB, save_checkpoint
from utils import MODELS_DIR, ModelError, load_encoder_hparams_and_params

LAYERS = {"c_attn": ("attn/c_attn",), "c_proj": ("attn/c_proj", "mlp/c_proj"), "c_fc": ("mlp/c_fc",)}
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

# LoRA (https://arxiv.org/abs/2106.09685)


def with_adapters(params, adapters, scale):
    """Params with scale * A @ B added to the weights w that have an adapter, A [in, rank] and B [rank, out].

    adapters: for every block {"attn/c_attn": {"A", "B"}, ...}. scale: alpha / rank.
    """

    def adapted(block, adapter):
        for path, matrices in adapter.items():
            sublayer, layer = path.split("/")
            w = block[sublayer][layer]["w"] + scale * matrices["A"] @ matrices["B"]  # [in, out]
            block = {**block, sublayer: {**block[sublayer], layer: {**block[sublayer][layer], "w": w}}}
        return block

    return {**params, "blocks": [adapted(*pair) for pair in zip(params["blocks"], adapters, strict=True)]}


def new_adapters(params, rank, names, seed=0):
    """Adapters that change nothing yet: A is random, B is zero. names: which of LAYERS have one."""
    rng = np.random.default_rng(seed)

    def adapter(w):
        n_in, n_out = w.shape
        a = rng.standard_normal((n_in, rank), dtype=np.float32) / np.float32(np.sqrt(n_in))
        return {"A": a, "B": np.zeros((rank, n_out), np.float32)}

    paths = [path.split("/") for name in names for path in LAYERS[name]]
    return [
        {f"{sublayer}/{layer}": adapter(block[sublayer][layer]["w"]) for sublayer, layer in paths}
        for block in params["blocks"]
    ]


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


def save_adapters(folder, adapters, alpha, names, model_size):
    """Writes adapters as PEFT does, whose matrices are the other way round: lora_A [rank, in], lora_B [out, rank]."""
    from safetensors.numpy import save_file

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
    save_file(tensors, os.path.join(folder, ADAPTER))
    with open(os.path.join(folder, ADAPTER_CONFIG), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)
    # save_file has made it its owner's alone
    shutil.copymode(os.path.join(folder, ADAPTER_CONFIG), os.path.join(folder, ADAPTER))


def load_adapters(folder, params):
    """(adapters, scale, the name of the model they were made for) as save_adapters or PEFT wrote them for a model like
    params. Ends with one line if they do not fit it, or are no plain LoRA of its matrices."""
    try:
        with open(os.path.join(folder, ADAPTER_CONFIG), encoding="utf-8") as f:
            config = json.load(f)
        tensors = read_adapter(folder)
        rank, alpha = config["r"], config["lora_alpha"]
        if config.get("alpha_pattern") or config.get("rank_pattern"):
            raise ValueError("they have ranks or scales of their own for some layers")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        fault = f"{ADAPTER_CONFIG} has no {error}" if isinstance(error, KeyError) else one_line(error)
        fail(f"the adapters in {folder} cannot be read: {fault}")
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
    return adapters, scale, config.get("base_model_name_or_path")


def peft_name(i, path):
    return f"base_model.model.transformer.h.{i}.{path.replace('/', '.')}"


# prompts and completions


def examples_of(encoder, documents, n_ctx):
    """[(ids, how many of the last are learned)] of prompts and completions: only the latter are.

    A completion ends with <|endoftext|>, which also stands for an empty prompt. Ends with one line for those too long.
    """
    end, examples = encoder.encoder[training.END], []
    for document in documents:
        completion = [*encoder.encode(document["completion"]), end]
        examples.append(((encoder.encode(document["prompt"]) or [end]) + completion, len(completion)))
    too_long = [
        document["where"] for document, (ids, _) in zip(documents, examples, strict=True) if len(ids) > n_ctx + 1
    ]
    if too_long:
        more = f" (as are {len(too_long) - 1} others)" if too_long[1:] else ""
        fail(f"{too_long[0]} is longer than the {n_ctx} tokens that the model sees at once{more}")
    return examples


def padded(examples):
    """{"ids": [n_rows, n+1], "counted": [n_rows, n]} of examples: 1 for what is learned, 0 for prompts and padding."""
    n = max(len(ids) for ids, _ in examples)
    rows = {"ids": np.zeros((len(examples), n), int), "counted": np.zeros((len(examples), n - 1), np.float32)}
    for i, (ids, n_learned) in enumerate(examples):
        rows["ids"][i, : len(ids)] = ids
        rows["counted"][i, len(ids) - 1 - n_learned : len(ids) - 1] = 1
    return rows


def main(
    *files: str,
    model_size: str = "124M",
    name: str = "",
    models_dir: str = MODELS_DIR,
    held_out: str = "",
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    lora_on: str = "c_attn",
    n_ctx: int | None = None,
    n_steps: int = 500,
    batch_size: int = 8,
    accumulate: int = 1,
    learning_rate: float | None = None,
    weight_decay: float = 0.01,
    dropout: float = 0.0,
    dtype: str = "float32",
    recompute: bool = False,
    evaluate_every: int | None = None,
    seed: int = 0,
    distributed: bool = False,
    resume: bool = False,
    merge: str = "",
):
    """Fine-tunes a GPT-2 on texts.

    Args:
        files: UTF-8 texts, folders with all that is in them, or globs; documents are parted by <|endoftext|>, or one a
            file; or JSONL with {"text"}, or with {"prompt", "completion"}, of which only the completion is learned
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        name: the result is saved in the folder of this name in models_dir
        models_dir: the folder that holds the models
        held_out: a file, folder or glob to evaluate on, instead of the last tenth of files
        lora_rank: learn adapters of this rank instead of all weights (0)
        lora_alpha: adapters are scaled by lora_alpha / lora_rank (by default, 2)
        lora_on: which matrices get an adapter: c_attn, c_proj, c_fc, or several with commas between
        n_ctx: tokens in a window of text (by default 256, or what the model sees at once, if that is less)
        n_steps: updates of the weights
        batch_size: windows, or pairs of prompt and completion, that an update learns from
        accumulate: parts of a batch that are computed one after another: less memory, the same result
        learning_rate: the highest; it rises to that over the first 2 % of the steps and falls to 0 along a cosine (by
            default 1e-4, and 1e-3 for adapters)
        weight_decay: AdamW's, of all matrices
        dropout: the part of the features behind each layer norm that training silences
        dtype: float32, or bfloat16 to compute in; the weights stay float32
        recompute: keep fewer activations, and compute them again: less memory, a third more time
        evaluate_every: steps from one evaluation to the next (by default there are 16 at most, and one before the first
            step); each saves the run, and the model if it is the best yet
        seed: of the first adapters and of the order of the texts
        distributed: be one of several processes that each take some rows of a batch (see README.md)
        resume: go on with a run with the same arguments; more n_steps lengthen it
        merge: do not train, but apply the adapters in this folder to the model, and save the result
    """
    if merge:
        return save_merged(**locals())
    if lora_rank:
        training.need("safetensors")
    names = lora_layers(lora_rank, lora_alpha, lora_on)
    settings = {"lora_rank": lora_rank, "lora_alpha": 2 * lora_rank if lora_alpha is None else lora_alpha}
    settings |= {"n_steps": n_steps, "batch_size": batch_size, "accumulate": accumulate, "n_ctx": n_ctx}
    settings |= {"learning_rate": (1e-3 if lora_rank else 1e-4) if learning_rate is None else learning_rate}
    settings |= {"weight_decay": weight_decay, "dropout": dropout, "dtype": dtype, "recompute": recompute, "seed": seed}
    settings |= {"evaluate_every": evaluate_every}
    model_dir, settings = training.begin(name, models_dir, resume, distributed, settings)
    settings |= {"model_size": model_size, "lora_on": names}

    kinds = ("text",), ("prompt", "completion")
    documents = training.read_documents(files, *kinds)
    others = training.read_documents([held_out], *kinds) if held_out else []
    if others and others[0].keys() != documents[0].keys():
        fail(f"{held_out} is of another kind than {files[0]}")
    settings |= {"data": training.checksums(files, held_out)}
    with mistakes(ModelError):
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    n_head, n_ctx = hparams["n_head"], training.context(n_ctx, hparams)

    if "text" in documents[0]:
        texts, others = ([document["text"] for document in part] for part in (documents, others))
        texts, others = (texts, others) if others else training.hold_out(texts)
        ids = training.text_ids(encoder, texts)
        data, scale = training.windows_of(ids, n_ctx, batch_size), len(ids) / sum(map(len, texts))
        evaluate, unit = training.text_evaluator(encoder, others, n_ctx, n_head), "nats per character"
    else:
        examples, others = (examples_of(encoder, part, n_ctx or hparams["n_ctx"]) for part in (documents, others))
        n = 0 if others else max(1, len(examples) // 10)
        if len(examples) <= n:
            fail("there are too few pairs to learn from: give two or more")
        examples, others = examples[: len(examples) - n], others or examples[-n:]
        data, scale = training.shuffled(padded(examples), batch_size), 1.0
        evaluate, unit = training.completion_evaluator(encoder, others, n_head), "nats per token"

    if lora_rank:
        learned, frozen = new_adapters(params, lora_rank, names, seed), params
    else:
        learned, frozen = params, {}

    def model(learned, frozen):
        return with_adapters(frozen, learned, settings["lora_alpha"] / lora_rank) if lora_rank else learned

    def loss(learned, frozen, rows, keys):
        return training.text_loss(model(learned, frozen), rows, keys, n_head, dropout, dtype, recompute)

    def save(learned, frozen):
        save_checkpoint(model_dir, hparams, model(learned, frozen))
        if lora_rank:
            save_adapters(model_dir, learned, settings["lora_alpha"], names, model_size)

    training.train(
        model_dir,
        os.path.join(models_dir, model_size),
        learned=learned,
        frozen=frozen,
        loss=loss,
        data=data,
        evaluate=lambda learned, frozen: evaluate(model(learned, frozen)),
        save=save,
        settings=settings,
        resume=resume,
        unit=unit,
        scale=scale,
    )


def save_merged(merge, files, model_size, name, models_dir, **others):
    """Saves a model with the adapters in the folder merge applied to it. Ends with one line for flags of training."""
    usual = {key: option.default for key, option in inspect.signature(main).parameters.items()}
    if unused := ["files"][: len(files)] + [f"--{key}" for key, value in others.items() if value != usual[key]]:
        fail(f"--merge applies adapters and learns nothing: it takes no {', '.join(unused)}")
    training.need("safetensors")
    model_dir = training.new_model(name, models_dir)
    training.refuse_existing(model_dir)
    with mistakes(ModelError):
        _, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    adapters, scale, base = load_adapters(merge, params)
    if base and base != model_size and os.path.isdir(os.path.join(models_dir, base)):
        note(f"the adapters in {merge} were made for {base}, and are applied to {model_size}")
    os.makedirs(model_dir, exist_ok=True)
    for file in (ENCODER, VOCAB):
        shutil.copyfile(os.path.join(models_dir, model_size, file), os.path.join(model_dir, file))
    save_checkpoint(model_dir, hparams, with_adapters(params, adapters, scale))


if __name__ == "__main__":
    run(main, "finetune.py: stopped before the first step: nothing was written")
