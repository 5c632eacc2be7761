"""Turns GPT-2 models into other formats, bit for bit: from transformers' to OpenAI's, and back, and to llama.cpp's.

    python examples/convert.py FOLDER --name mine
    python examples/convert.py models/mine --to transformers OUT
    python examples/convert.py models/mine --to gguf OUT.gguf

A transformers folder has config.json, the weights in model.safetensors (or in several such files with an index; or in
the older pytorch_model.bin, for which PyTorch is needed), and the tokenizer in vocab.json and merges.txt, or
in tokenizer.json. Nothing is unpickled but tensors.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: during the imports, too

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cli
from files.checkpoint import (
    DATA,
    ENCODER,
    HPARAMS,
    VOCAB,
    CheckpointError,
    nest,
    save_checkpoint,
    variables,
)
from utils import (
    MODEL_SIZES,
    MODELS_DIR,
    NEW_NAME,
    ModelError,
    load_encoder,
    load_encoder_hparams_and_params,
    unlike_published,
)

END = "<|endoftext|>"
SIZES = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
ARCHITECTURE = {  # what gpt2() computes: every key of config.json that would change it, and the values it may have
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}


# from transformers


def read_json(path):
    """The object in a file of JSON. Ends with one line if there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        cli.fail(f"{path} cannot be read: {cli.one_line(error)}")
    return value if isinstance(value, dict) else cli.fail(f"{path} does not hold an object")


def read_config(path):
    """hparams from transformers' config.json. Ends with one line for a model that gpt2() would compute wrongly."""
    config = read_json(path)
    if config.get("model_type") != "gpt2":
        cli.fail(f"{path}: model_type is {config.get('model_type')!r}, not 'gpt2'")
    hparams = {ours: config.get(theirs, config.get(ours)) for ours, theirs in SIZES.items()}
    for name, value in hparams.items():
        if type(value) is not int or not 0 < value < 2**31:
            cli.fail(f"{path}: {SIZES[name]} must be a positive whole number, not {value!r}")
    if hparams["n_embd"] % hparams["n_head"]:
        cli.fail(f"{path}: n_embd {hparams['n_embd']} is not divisible by n_head {hparams['n_head']}")
    for key, values in {**ARCHITECTURE, "n_inner": (None, 4 * hparams["n_embd"])}.items():
        if config.get(key, values[0]) not in values:
            cli.fail(f"{path}: {key} is {config[key]!r}, but gpt2() computes {values[-1]!r}")
    return hparams


def read_weights(folder):
    """{transformers' name: array} of all that a folder holds, half precision widened. Ends with one line on a fault."""
    single, index, pickled = (
        os.path.join(folder, name)
        for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    )
    if os.path.exists(single):
        return read_safetensors(single)
    if os.path.exists(index):
        files = read_json(index).get("weight_map")
        files = [*files.values()] if isinstance(files, dict) else [None]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
            cli.fail(f"{index}: weight_map must name a .safetensors file of this folder for each weight")
        arrays = {}
        for name in sorted({*files}):
            arrays |= read_safetensors(os.path.join(folder, name))
        return arrays
    if os.path.exists(pickled):
        return read_pytorch(pickled)
    cli.fail(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def read_safetensors(path):
    try:
        import ml_dtypes  # noqa: F401  (has NumPy know bfloat16)
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        cli.fail(f"{path} cannot be read: {error}: pip install -r requirements-dev.txt")
    arrays = {}
    try:
        with safe_open(path, "numpy") as f:
            for name in f.keys():  # noqa: SIM118  (it is no dict)
                dtype = f.get_slice(name).get_dtype()
                if dtype in ("F32", "F16", "BF16"):
                    arrays[name] = f.get_tensor(name).astype(np.float32, copy=False)
                else:
                    arrays[name] = dtype
    except (OSError, SafetensorError) as error:
        cli.fail(f"{path} cannot be read: {cli.one_line(error)}")
    return arrays


def read_pytorch(path):
    try:
        import torch
    except ImportError as error:
        cli.fail(f"{path} cannot be read: {error}: pip install torch, or use a model.safetensors")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # tensors, and no code
        arrays = {}
        for name, tensor in state.items():
            is_float = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
            arrays[name] = tensor.float().numpy() if is_float else str(tensor.dtype)
    except Exception as error:  # of pickle, zipfile, torch and others: whatever the file makes of itself
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        cli.fail(f"{path} cannot be read: {reason}")
    return arrays


def from_transformers(arrays, hparams, folder):
    """{our name: array} of {transformers' name: array}. Ends with one line unless they are what hparams imply."""
    # the older generation of names lacks the prefix, and keeps masks among the weights
    arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    arrays = {name: array for name, array in arrays.items() if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)}
    head, weights = arrays.pop("lm_head.weight", None), {}
    for ours, shape in variables(hparams):
        theirs = transformers_name(ours)
        if theirs not in arrays:
            cli.fail(f"{folder} lacks the weights {theirs}")
        weights[ours] = array = arrays.pop(theirs)
        if isinstance(array, str):
            cli.fail(f"{folder}: {theirs} is {array}, not float32, float16 or bfloat16")
        if array.shape != shape:
            cli.fail(f"{folder}: {theirs} has shape {[*array.shape]}, config.json implies {[*shape]}")
    if arrays:
        cli.fail(f"{folder} has the weights {min(arrays)}, for which gpt2() has no use")
    if head is not None and not np.array_equal(head, weights["wte"]):
        cli.fail(f"{folder}: lm_head.weight is not wte.weight, but gpt2() has one matrix for both")
    return weights


def transformers_name(name):  # h0/attn/c_attn/w -> h.0.attn.c_attn.weight
    name = re.sub(r"^h(\d+)", r"h/\1", name)
    return re.sub("/[gw]$|(?<=^w[tp]e)$", "/weight", re.sub("/b$", "/bias", name)).replace("/", ".")


def read_tokenizer(folder):
    """({token: id}, merges as "left right") of a folder, from vocab.json and merges.txt or from tokenizer.json."""
    vocab, merges, both = (os.path.join(folder, name) for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if os.path.exists(vocab) and os.path.exists(merges):
        try:
            with open(merges, encoding="utf-8") as f:
                lines = f.read().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            cli.fail(f"{merges} cannot be read: {cli.one_line(error)}")
        tokens, added = read_json(vocab), os.path.join(folder, "added_tokens.json")
        tokens |= read_json(added) if os.path.exists(added) else {}
        return tokens, [line for line in lines[lines[0].startswith("#version") :] if line]
    if not os.path.exists(both):
        cli.fail(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json")
    tokenizer = read_json(both)
    try:
        model, cut = tokenizer["model"], tokenizer["pre_tokenizer"]
        kind = model["type"], cut["type"], cut["add_prefix_space"], cut.get("use_regex", True), tokenizer["normalizer"]
        if kind != ("BPE", "ByteLevel", False, True, None) or model.get("ignore_merges"):
            cli.fail(f"{both} is not GPT-2's kind of tokenizer: BPE of bytes, of words as GPT-2 cuts them")
        tokens = model["vocab"] | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        return tokens, [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    except (KeyError, TypeError, AttributeError) as error:
        cli.fail(f"{both} cannot be understood: {type(error).__name__}: {error}")


def write_tokenizer(folder, tokens, merges):
    """Writes encoder.json and vocab.bpe, in the very form in which OpenAI did."""
    with contextlib.suppress(TypeError):  # get_encoder() says what is wrong with ids that cannot be sorted
        tokens = dict(sorted(tokens.items(), key=lambda item: item[1]))
    with open(os.path.join(folder, ENCODER), "w", encoding="utf-8") as f:
        json.dump(tokens, f)
    with open(os.path.join(folder, VOCAB), "w", encoding="utf-8", newline="") as f:
        f.write("\n".join(["#version: 0.2", *merges, ""]))


def convert(folder, name, models_dir):
    """Makes a model in models_dir/name of a transformers folder. On a fault ends with one line, and leaves nothing."""
    hparams = read_config(os.path.join(folder, "config.json"))
    tokenizer = read_tokenizer(folder)
    weights = from_transformers(read_weights(folder), hparams, folder)
    model_dir = os.path.join(models_dir, name)
    with new(model_dir, make_folder, shutil.rmtree), cli.mistakes((CheckpointError, ModelError, UnicodeEncodeError)):
        write_tokenizer(model_dir, *tokenizer)
        load_encoder(name, models_dir, hparams["n_vocab"])  # finds the faults that every use of it would
        save_checkpoint(model_dir, hparams, nest(weights))
        for file in (HPARAMS, ENCODER, VOCAB, DATA) if name in MODEL_SIZES else ():
            if fault := unlike_published(name, file, os.path.join(model_dir, file)):
                cli.fail(f"{folder} is not OpenAI's {name}: {file}: {fault}: choose another --name")


def make_folder(path):
    with contextlib.suppress(OSError):  # a download that got nothing leaves a folder with its lock alone
        if os.listdir(path) == [".lock"]:
            os.remove(os.path.join(path, ".lock"))
        os.rmdir(path)  # an empty folder is as good as none
    os.mkdir(path)


@contextlib.contextmanager
def new(path, make, remove):
    """Makes a file or a folder that is not there yet, and removes it if what follows fails, or is stopped by Ctrl-C."""
    try:
        make(path)
    except FileExistsError:
        cli.fail(f"{path} exists: choose another name, or delete it")
    except OSError as error:
        cli.fail(f"{path} cannot be made: {error.strerror}")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except BaseException as error:
        remove(path)
        if isinstance(error, KeyboardInterrupt):
            sys.exit(130)
        if isinstance(error, OSError):
            cli.fail(f"{path} cannot be written: {cli.one_line(error)}")
        raise
    finally:
        signal.signal(signal.SIGINT, before)


# to others, from what load_encoder_hparams_and_params() gives


def flat(params, hparams):  # {"blocks": [{"attn": {"c_attn": {"w": array}}}], ...} -> {"h0/attn/c_attn/w": array, ...}
    """Params under the checkpoint's names: what checkpoint.nest() undoes."""
    arrays = {}
    for name, _ in variables(hparams):
        arrays[name] = params
        for key in name.split("/"):
            node = arrays[name]
            arrays[name] = node["blocks"][int(key[1:])] if re.fullmatch(r"h\d+", key) else node[key]
    return arrays


def save_as_transformers(out, encoder, hparams, params):
    """Writes a model into the folder `out`, for transformers' GPT2LMHeadModel and AutoTokenizer."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    end = encoder.encoder[END]
    ids = {"bos_token_id": end, "eos_token_id": end}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32", **ids}
    config |= {theirs: hparams[ours] for ours, theirs in SIZES.items()}
    config |= {key: values[0] for key, values in ARCHITECTURE.items() if values[0] is not None}
    special = {"bos_token": END, "eos_token": END, "unk_token": END}
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": hparams["n_ctx"]}
    merges = "\n".join(["#version: 0.2", *map(" ".join, encoder.bpe_ranks), ""])
    for name, content in {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer | special,
        "special_tokens_map.json": special,
        "vocab.json": encoder.encoder,
        "merges.txt": merges,
    }.items():
        with open(os.path.join(out, name), "w", encoding="utf-8", newline="") as f:
            f.write(content if isinstance(content, str) else json.dumps(content))
    arrays = {f"transformer.{transformers_name(name)}": array for name, array in flat(params, hparams).items()}
    weights = os.path.join(out, "model.safetensors")
    with cli.mistakes(SafetensorError, f"{weights} cannot be written: "):
        save_file(arrays, weights, {"format": "pt"})  # which makes it its owner's alone
    shutil.copymode(os.path.join(out, "config.json"), weights)


def save_as_gguf(out, encoder, hparams, params, dtype="float32"):
    """Writes a model into the file `out`, for llama.cpp. dtype: of the matrices, float32 or float16."""
    import gguf

    writer = gguf.GGUFWriter(out, "gpt2")
    writer.add_context_length(hparams["n_ctx"])
    writer.add_embedding_length(hparams["n_embd"])
    writer.add_feed_forward_length(4 * hparams["n_embd"])
    writer.add_block_count(hparams["n_layer"])
    writer.add_head_count(hparams["n_head"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # how text is cut into words
    tokens = [encoder.decoder[i] for i in range(hparams["n_vocab"])]
    made = {*encoder.byte_decoder, *map("".join, encoder.bpe_ranks)}
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL if token in made else gguf.TokenType.CONTROL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in encoder.bpe_ranks])
    writer.add_bos_token_id(encoder.encoder[END])
    writer.add_eos_token_id(encoder.encoder[END])
    writer.add_add_bos_token(False)
    names = {"wte": "token_embd.weight", "wpe": "position_embd.weight", "ln_f": "output_norm", "ln_1": "attn_norm"}
    names |= {"attn/c_attn": "attn_qkv", "attn/c_proj": "attn_output", "ln_2": "ffn_norm"}
    names |= {"mlp/c_fc": "ffn_up", "mlp/c_proj": "ffn_down", "g": "weight", "b": "bias", "w": "weight"}
    for name, array in flat(params, hparams).items():  # h0/attn/c_attn/w -> blk.0.attn_qkv.weight
        block, layer, leaf = re.fullmatch(r"(?:h(\d+)/)?(.*?)(?:/([gbw]))?", name).groups()
        theirs = ".".join([*(["blk", block] if block else []), names[layer], *([names[leaf]] if leaf else [])])
        if array.ndim == 2 and name != "wpe":
            array = (array.T if leaf else array).astype(dtype, order="C")  # [in, out] -> [out, in]
        writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(*paths: str, name: str = None, to: str = None, models_dir: str = MODELS_DIR):
    """Turns a transformers folder into a model of this project; or a model into a transformers folder or a GGUF file.

    Args:
        paths: a transformers folder; or with --to the folder of a model, and what to make of it
        name: the model is made in the folder of this name in models_dir, which must be new
        to: transformers, which makes a folder, or gguf, which makes a file, for llama.cpp
        models_dir: the folder that holds the models
    """
    if to not in (None, "transformers", "gguf"):
        cli.fail(f"--to must be transformers or gguf, not {to!r}")
    if to and (name is not None or models_dir != MODELS_DIR):
        cli.fail(
            f"--{'models_dir' if name is None else 'name'} does nothing with --to, whose result is made where you say"
        )
    if len(paths) != (2 if to else 1):
        wanted = f"the folder of a model, and what to make for {to}" if to else "one transformers folder"
        cli.fail(f"needs {wanted}, not {len(paths)} paths (see --help)")
    folder, out = paths[0], paths[-1]
    if not os.path.isdir(folder):
        cli.fail(f"there is no folder {folder}")
    if not to and not re.fullmatch(NEW_NAME, name or ""):
        cli.fail("--name must name the new model with letters, digits, dashes, and dots but not at the end")
    if not to:
        return convert(folder, name, models_dir)

    with cli.mistakes(ModelError):
        model = load_encoder_hparams_and_params(*os.path.split(os.path.abspath(folder))[::-1])
    package = "safetensors" if to == "transformers" else "gguf"
    with cli.mistakes(ImportError, f"--to {to} needs {package}: pip install {package}: "):
        if to == "transformers":
            with new(out, make_folder, shutil.rmtree):
                save_as_transformers(out, *model)
        else:
            with new(out, lambda path: open(path, "x").close(), os.remove):
                save_as_gguf(out, *model)


if __name__ == "__main__":
    cli.run(main)
