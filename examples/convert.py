"""Turns GPT-2 models of other programs into models of this project, and back, and into llama.cpp's, bit for bit.

    python examples/convert.py FOLDER --name mine
    python examples/convert.py ckpt.pt --name mine
    python examples/convert.py models/mine --to transformers OUT
    python examples/convert.py models/mine --to gguf OUT.gguf

It takes what transformers, nanoGPT, minGPT and llm.c write: see formats.py. Nothing is unpickled but tensors.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

if __name__ == "__main__":
    from cli import start

    start("numpy", "regex", "tqdm")

import formats
import numpy as np
from formats import ARCHITECTURE, END, EPSILON, SIZES, fail

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
from files.transformers import transformers_name
from utils import (
    MODEL_SIZES,
    MODELS_DIR,
    NEW_NAME,
    ModelError,
    load_encoder,
    load_encoder_hparams_and_params,
    unlike_published,
)

# from others


def write_tokenizer(folder, tokens, merges):
    """Writes encoder.json and vocab.bpe, in the very form in which OpenAI did."""
    with contextlib.suppress(TypeError):  # get_encoder() says what is wrong with ids that cannot be sorted
        tokens = dict(sorted(tokens.items(), key=lambda item: item[1]))
    with open(os.path.join(folder, ENCODER), "w", encoding="utf-8", newline="\n") as f:
        json.dump(tokens, f)
    with open(os.path.join(folder, VOCAB), "w", encoding="utf-8", newline="\n") as f:
        f.write("\n".join(["#version: 0.2", *merges, ""]))


def convert(path, name, models_dir):
    """Makes a model in models_dir/name of a folder or file of another program's. Returns notes for the user.

    On a fault ends with one line, and leaves nothing.
    """
    config, arrays = formats.read(path)
    hparams, weights, notes = formats.to_openai(config, arrays, path)
    del arrays
    tokenizer = formats.read_tokenizer(path if os.path.isdir(path) else os.path.dirname(path))
    if tokenizer is None:
        tokenizer = formats.gpt2_tokenizer(models_dir, path, hparams["n_vocab"])
        notes.append(f"{path} has no tokenizer: it got GPT-2's own")
    tokens, weights["wte"], more = formats.fit_tokenizer(tokenizer, weights["wte"], config.get("eos_token_id"), path)
    hparams["n_vocab"] = len(weights["wte"])
    with new(os.path.join(models_dir, name), os.mkdir, shutil.rmtree) as model_dir:
        try:
            write_tokenizer(model_dir, tokens, tokenizer[1])
            load_encoder(os.path.basename(model_dir), models_dir, hparams["n_vocab"])  # finds what its uses would
            save_checkpoint(model_dir, hparams, nest(weights))
        except (CheckpointError, ModelError, UnicodeEncodeError) as error:
            fail(cli.one_line(error).replace(model_dir, path))
        for file in (HPARAMS, ENCODER, VOCAB, DATA) if name in MODEL_SIZES else ():
            if fault := unlike_published(name, file, os.path.join(model_dir, file)):
                fail(f"{path} is not OpenAI's {name}: {file}: {fault}: choose another --name")
    return notes + more


def make_file(path):
    open(path, "xb").close()


@contextlib.contextmanager
def new(path, make, remove):
    """The path of a new file or folder beside `path`, which it becomes when all that follows has been done.

    If that fails, or is stopped by Ctrl-C, it is removed. Ends with one line if there is one already.
    """
    path = os.path.normpath(path)
    part = f"{path}.part-{os.getpid()}"
    with contextlib.suppress(OSError):  # a download that got nothing leaves a folder with its lock alone
        if os.listdir(path) == [".lock"]:
            os.remove(os.path.join(path, ".lock"))
        os.rmdir(path)  # an empty folder is as good as none
    if os.path.lexists(path):
        fail(f"{path} exists: choose another name, or delete it")
    with cli.on_ctrl_c(signal.default_int_handler):
        try:
            make(part)
            yield part
            if os.path.lexists(path):
                fail(f"{path} exists by now: choose another name, or delete it")
            os.rename(part, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                remove(part)
            if isinstance(error, KeyboardInterrupt):
                sys.exit(130)
            if isinstance(error, OSError):
                fail(f"{path} cannot be written: {cli.one_line(error)}")
            raise


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


def special_tokens(encoder):
    """{id: text} of the tokens that no merge makes, which no text is ever cut into."""
    made = {*encoder.byte_decoder, *(pair.replace(" ", "") for pair in encoder.ranks)}
    return {i: encoder.decode([i]) for token, i in encoder.encoder.items() if token not in made}


def save_as_transformers(out, encoder, hparams, params):
    """Writes a model into the folder `out`, for transformers' GPT2LMHeadModel and AutoTokenizer."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    end, special = encoder.encoder[END], special_tokens(encoder)
    ids = {"bos_token_id": end, "eos_token_id": end}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32", **ids}
    config |= {theirs: hparams[ours] for ours, (theirs, *_) in SIZES.items()}
    config |= {key: values[0] for key, values in ARCHITECTURE.items() if values[0] is not None}
    config |= {"layer_norm_epsilon": EPSILON, "tie_word_embeddings": True}
    roles = {"bos_token": END, "eos_token": END, "unk_token": END}
    roles |= {"additional_special_tokens": [text for text in special.values() if text != END]}
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": hparams["n_ctx"]}
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer |= {"added_tokens_decoder": {str(i): {"content": text, **kind} for i, text in special.items()}}
    merges = "\n".join(["#version: 0.2", *encoder.ranks, ""])
    for name, content in {
        "config.json": config,
        "generation_config.json": ids,
        "tokenizer_config.json": tokenizer | roles,
        "special_tokens_map.json": roles,
        "vocab.json": {special.get(i, token): i for token, i in encoder.encoder.items()},
        "merges.txt": merges,
    }.items():
        with open(os.path.join(out, name), "w", encoding="utf-8", newline="\n") as f:
            f.write(content if isinstance(content, str) else json.dumps(content))
    arrays = {f"transformer.{transformers_name(name)}": array for name, array in flat(params, hparams).items()}
    weights = os.path.join(out, "model.safetensors")
    with cli.mistakes(SafetensorError, f"{weights} cannot be written: "):
        save_file(arrays, weights, {"format": "pt"})  # which makes it its owner's alone
    shutil.copymode(os.path.join(out, "config.json"), weights)


def save_as_gguf(out, encoder, hparams, params, dtype="float32"):
    """Writes a model into the file `out`, for llama.cpp.

    dtype: of the matrices, float32 or float16; norms, biases and wpe stay float32, as llama.cpp has them. Ends with one
    line for weights that float16 cannot hold.
    """
    import gguf

    writer = gguf.GGUFWriter(out, "gpt2")
    writer.add_context_length(hparams["n_ctx"])
    writer.add_embedding_length(hparams["n_embd"])
    writer.add_feed_forward_length(4 * hparams["n_embd"])
    writer.add_block_count(hparams["n_layer"])
    writer.add_head_count(hparams["n_head"])
    writer.add_layer_norm_eps(EPSILON)
    writer.add_file_type({"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}[dtype])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # how text is cut into words
    special, ids = special_tokens(encoder), range(hparams["n_vocab"])
    writer.add_token_list([special.get(i, encoder.decoder[i]) for i in ids])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in ids])
    writer.add_token_merges([*encoder.ranks])
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
            with np.errstate(over="ignore"):
                smaller = array.astype(dtype)
            if np.isinf(smaller).sum() > np.isinf(array).sum():
                fail(f"{name} has numbers too large for float16, which ends at 65,504: leave out --dtype")
            array = np.ascontiguousarray(smaller.T if leaf else smaller)  # [in, out] -> [out, in]
        writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(*paths: str, name: str = None, to: str = None, dtype: str = "float32", models_dir: str = MODELS_DIR):
    """Turns a GPT-2 of another program into a model of this project; or a model into a transformers folder or GGUF.

    Args:
        paths: a transformers folder, or a checkpoint of nanoGPT, minGPT or llm.c; or with --to the folder of a model,
            and what to make of it
        name: the model is made in the folder of this name in models_dir, which must be new
        to: transformers, which makes a folder, or gguf, which makes a file, for llama.cpp
        dtype: of the matrices in a gguf file, float32 or float16, which takes half the space
        models_dir: the folder that holds the models
    """
    if to not in (None, "transformers", "gguf"):
        fail(f"--to must be transformers or gguf, not {to!r}")
    if to and (name is not None or models_dir != MODELS_DIR):
        fail(f"--{'models_dir' if name is None else 'name'} does nothing with --to, whose result is made where you say")
    if dtype not in ("float32", "float16"):
        fail(f"--dtype must be float32 or float16, not {dtype!r}")
    if dtype != "float32" and to != "gguf":
        fail("--dtype is for --to gguf: all else is float32")
    if len(paths) != (2 if to else 1):
        wanted = f"the folder of a model, and what to make for {to}" if to else "one transformers folder or checkpoint"
        fail(f"needs {wanted}, not {len(paths)} paths (see --help)")
    path, out = paths[0], paths[-1]
    if not os.path.isdir(path) and (to or not os.path.isfile(path)):
        fail(f"there is no folder {path}")
    if to:
        return export(path, out, to, dtype)
    if not re.fullmatch(NEW_NAME, name or ""):
        fail("--name must name the new model with letters, digits, dashes, and dots but not at the end")
    for line in convert(path, name, models_dir):
        cli.note(line)
    where = f" --models_dir {cli.as_typed([models_dir])}" if models_dir != MODELS_DIR else ""
    cli.note(f'wrote {os.path.join(models_dir, name)}: python gpt2.py "..." --model_size {name}{where}')


def export(folder, out, to, dtype):
    """Makes a transformers folder or a GGUF file of a model."""
    with cli.mistakes(ModelError):
        model = load_encoder_hparams_and_params(*os.path.split(os.path.abspath(folder))[::-1])
    package = "safetensors" if to == "transformers" else "gguf"
    with cli.mistakes(ImportError, f"--to {to} needs {package}: pip install {package}: "):
        if to == "transformers":
            with new(out, os.mkdir, shutil.rmtree) as part:
                save_as_transformers(part, *model)
            cli.note(f"wrote {out}: GPT2LMHeadModel.from_pretrained({out!r}), and AutoTokenizer likewise")
        else:
            with new(out, make_file, os.remove) as part:
                save_as_gguf(part, *model, dtype)
            cli.note(f'wrote {out}: llama-completion -m {cli.as_typed([out])} -p "..."')


if __name__ == "__main__":
    cli.run(main)
