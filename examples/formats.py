"""What other programs write of a GPT-2, read without trust: their weights under OpenAI's names, and their tokenizers.

    transformers   config.json; model.safetensors or pytorch_model.bin, or several such files with an index
    nanoGPT        ckpt.pt: {"model", "model_args", ...}
    minGPT         model.pt, with the heads in the config.json beside it; until 2022 under names of its own
    llm.c          a .bin file: 256 whole numbers, then the weights, one after another

Nothing is unpickled but tensors, and nothing is as large as a file says unless the file is as large, too.
"""

import glob
import json
import math
import os
import re
import sys
import zipfile

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from cli import fail, one_line, why_not
from encoder import SHA256, bytes_to_unicode
from files import safetensors
from files.checkpoint import ENCODER, VOCAB, n_params, variables
from files.sums import hexdigest
from files.transformers import transformers_name
from utils import MODEL_SIZES

END, N_VOCAB = "<|endoftext|>", 50257  # of GPT-2's own vocabulary
SIZES = {  # what each of our sizes is called, transformers' own name first
    "n_vocab": ("vocab_size", "n_vocab"),
    "n_ctx": ("n_positions", "n_ctx", "block_size", "max_position_embeddings"),
    "n_embd": ("n_embd", "hidden_size"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_layer": ("n_layer", "num_hidden_layers"),
}
GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate")  # but for rounding, one
ARCHITECTURE = {  # what gpt2() computes: every key of config.json that would change it, and the values it may have
    "activation_function": GELUS,
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
EPSILON = 1e-5  # of layer norms
# what a folder may hold its weights in, in the order in which transformers looks for it
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHTS += ("ckpt.pt", "model.pt")
NESTED = ("state_dict", "model_state_dict", "model", "module")  # where a checkpoint may keep its weights
WRAPPERS = {"module", "_orig_mod", "transformer", "model", "gpt2", "base_model", "pretrained_model", "state_dict"}
WRAPPERS |= {"model_state_dict", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OTHER_HEADS = r"(multiple_choice_head|v_head)\..+"  # they read what the blocks compute, and change nothing of it
MASKS = r"h\.\d+\.attn\.(bias|masked_bias|mask)"  # kept among the weights, by some
MINGPT_NAMES = {  # of 2020
    r"^tok_emb\.": "wte.",
    r"^pos_emb$": "wpe.weight",
    r"^blocks\.(\d+)\.": r"h.\1.",
    r"^(h\.\d+\.ln)([12])\.": r"\1_\2.",
    r"^(h\.\d+\.attn)\.proj\.": r"\1.c_proj.",
    r"^(h\.\d+\.mlp)\.0\.": r"\1.c_fc.",
    r"^(h\.\d+\.mlp)\.2\.": r"\1.c_proj.",
    r"^head\.": "lm_head.",
}
MINGPT_HEADS = {"gpt2": 12, "gpt2-medium": 16, "gpt2-large": 20, "gpt2-xl": 25, "openai-gpt": 12}
MINGPT_HEADS |= {"gopher-44m": 16, "gpt-mini": 6, "gpt-micro": 4, "gpt-nano": 3}
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LLMC_MAGIC, LLMC_HEADER = 20240326, 1024  # bytes
JSON_BYTES = 2**26  # more than any tokenizer.json of GPT-2's kind has


# weights


def read(path):
    """({"n_head": 12, ...} as far as it is said, {name: array in float32}) of a file of weights, or of a folder.

    The array of a weight that is no float is the name of its dtype. Ends with one line on a fault.
    """
    file, folder = (weights_file(path), path) if os.path.isdir(path) else (path, os.path.dirname(path))
    beside = os.path.join(folder, "config.json")
    config = read_json(beside) if os.path.exists(beside) else {}
    with open_file(file) as f:
        is_llmc = f.read(4) == LLMC_MAGIC.to_bytes(4, "little")
    if is_llmc:
        return read_llmc(file)
    if file.endswith(".index.json"):
        return config, read_shards(folder, file)
    if file.endswith(".safetensors"):
        return config, read_safetensors(file)
    said, arrays = read_pytorch(file)
    if isinstance(config.get("model"), dict):  # minGPT's
        config = {key: value for key, value in config["model"].items() if value is not None}
        if heads := MINGPT_HEADS.get(str(config.pop("model_type", ""))):
            config.setdefault("n_head", heads)
    return config | said, arrays


def open_file(path):
    try:
        return open(path, "rb")
    except OSError as error:
        fail(f"{path} cannot be read: {why_not(path, error)}")


def weights_file(folder):
    for name in WEIGHTS:
        if os.path.exists(os.path.join(folder, name)):
            return os.path.join(folder, name)
    others = [name for end in ("bin", "pt", "pth", "ckpt") for name in glob.glob(f"{glob.escape(folder)}/*.{end}")]
    if len(others) == 1:
        return others[0]
    fail(f"{folder} has neither {WEIGHTS[0]} nor {WEIGHTS[2]} nor ckpt.pt: name the file that holds the weights")


def read_json(path):
    """The object in a file of JSON. Ends with one line if there is none."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        fail(f"{path} cannot be read: {one_line(error):.200}")
    return value if isinstance(value, dict) else fail(f"{path} does not hold an object")


def read_text(path):
    try:
        if os.path.getsize(path) > JSON_BYTES:
            fail(f"{path} is larger than any of its kind")
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {one_line(error)}")


def read_shards(folder, index):
    files = read_json(index).get("weight_map")
    files = [*files.values()] if isinstance(files, dict) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.(safetensors|bin)", name) for name in files):
        fail(f"{index}: weight_map must name a .safetensors or .bin file of this folder for each weight")
    arrays = {}
    for name in sorted({*files}):
        path = os.path.join(folder, name)
        arrays |= read_safetensors(path) if name.endswith(".safetensors") else read_pytorch(path)[1]
    return arrays


def read_safetensors(path):
    try:
        arrays = safetensors.read_safetensors(path)
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read: {one_line(error):.200}")
    return {name: x if isinstance(x, str) else x.astype(np.float32, copy=False) for name, x in arrays.items()}


def read_pytorch(path):
    """(what a checkpoint says of its model, {name: array}) of a file that torch.save wrote."""
    try:
        import torch
    except ImportError as error:
        fail(f"{path} cannot be read: {error}: pip install torch, or use a model.safetensors")
    try:
        n_bytes, is_zip = os.path.getsize(path), zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > n_bytes:
                    raise ValueError("it is larger inside than outside, as nothing is that torch.save wrote")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)  # tensors, and no code
        state = checkpoint
        for _ in range(3):  # {"state_dict": {"model": ...}}
            key = next((key for key in NESTED if isinstance(state, dict) and isinstance(state.get(key), dict)), None)
            state = state[key] if key else state
        if not isinstance(state, dict):
            raise ValueError("it holds no weights by name")
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
        # two names may share one tensor, as lm_head and wte do, but a hundred may not be made of one
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 2 * n_bytes:
            raise ValueError("its tensors are larger than it is")
        arrays = {}
        for name, tensor in tensors.items():
            is_float = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
            arrays[str(name)] = tensor.detach().float().numpy() if is_float else str(tensor.dtype)
        said = checkpoint.get("model_args", checkpoint.get("config"))
        said = said if isinstance(said, dict) and "n_head" in said else {}
    except Exception as error:  # of pickle, zipfile, torch and others: whatever the file makes of itself
        if code := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            fail(f"{path} cannot be read: it holds {code[1]:.80}, code that is not run: save model.state_dict() alone")
        fail(f"{path} cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0]:.200}")
    if not arrays:
        fail(f"{path} holds no weights: save model.state_dict()")
    return {key: value for key, value in said.items() if isinstance(value, int | float | str)}, arrays


def read_adapter(folder):
    """{name: array} of an adapter that PEFT saved, today or before 2024. Ends with one line on a fault."""
    path = os.path.join(folder, "adapter_model.safetensors")
    pickled = os.path.join(folder, "adapter_model.bin")
    return read_safetensors(path) if os.path.exists(path) or not os.path.exists(pickled) else read_pytorch(pickled)[1]


def read_llmc(path):
    """(sizes, {name: array}) of a file that llm.c's write_model (train_gpt2.py) or gpt2_write_to_checkpoint wrote."""
    header = [int(number) for number in np.fromfile(path, "<i4", LLMC_HEADER // 4)]
    if len(header) < LLMC_HEADER // 4 or header[1] not in (3, 5):
        fail(f"{path} is no model of llm.c of version 3 (float32) or 5 (bfloat16): write it anew with today's llm.c")
    n_ctx, n_vocab, n_layer, n_head, n_embd, n_rows = header[2:8]
    config = {"vocab_size": n_vocab, "n_positions": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    if min(*config.values(), n_rows) < 1 or n_vocab > n_rows:
        fail(f"{path}: its header has sizes that cannot be: {config}")
    dtype = np.dtype("<f4" if header[1] == 3 else "<u2")
    n_bytes = LLMC_HEADER + dtype.itemsize * n_params({**config, "n_vocab": n_rows, "n_ctx": n_ctx})
    if os.path.getsize(path) != n_bytes:
        fail(f"{path} has {os.path.getsize(path)} bytes where its header implies {n_bytes}: copy it anew")
    layers = {"ln_1": (n_embd,), "attn.c_attn": (3 * n_embd, n_embd), "attn.c_proj": (n_embd, n_embd)}
    layers |= {"ln_2": (n_embd,), "mlp.c_fc": (4 * n_embd, n_embd), "mlp.c_proj": (n_embd, 4 * n_embd)}
    stacks = {"wte.weight": (n_rows, n_embd), "wpe.weight": (n_ctx, n_embd)}
    for layer, shape in layers.items():  # each of all blocks lies together
        stacks |= {f"h.*.{layer}.weight": (n_layer, *shape), f"h.*.{layer}.bias": (n_layer, shape[0])}
    stacks |= {"ln_f.weight": (n_embd,), "ln_f.bias": (n_embd,)}
    weights, start, arrays = np.memmap(path, dtype, "r", LLMC_HEADER), 0, {}
    for name, shape in stacks.items():
        stack, start = weights[start : start + math.prod(shape)].reshape(shape), start + math.prod(shape)
        if dtype.itemsize == 2:  # bfloat16 is the first half of float32
            stack = (stack.astype(np.uint32) << 16).view(np.float32)
        blocks = stack if "*" in name else [stack]
        arrays |= {name.replace("*", str(i)): block for i, block in enumerate(blocks)}
    arrays["wte.weight"] = arrays["wte.weight"][:n_vocab]  # the others pad it to a multiple of 128
    return config, arrays


# from their names to ours


def unwrapped(arrays, where):
    """{transformers' name: array} of arrays whose names wrappers have lengthened, or which minGPT named."""
    found = {}
    for name, array in arrays.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        for pattern, theirs in MINGPT_NAMES.items():
            short = re.sub(pattern, theirs, short)
        if short in found:
            fail(f"{where} has the weights {short:.80} twice, as {name:.80}, too")
        found[short] = array
    for name in [name for name in found if re.fullmatch(r"h\.\d+\.attn\.query\.(weight|bias)", name)]:
        parts = [found.pop(name.replace("query", part), None) for part in ("query", "key", "value")]
        if len({*map(np.shape, parts)}) > 1 or isinstance(parts[0], str):
            fail(f"{where}: {name} has no key and value of its shape")
        found[name.replace("query", "c_attn")] = np.concatenate(parts)
    return {name: array for name, array in found.items() if not re.fullmatch(MASKS, name)}


def to_openai(config, arrays, where):
    """(hparams, {our name: array}, notes for the user) of what read() gave.

    Ends with one line unless it is a GPT-2 that gpt2() computes rightly.
    """
    notes = []
    if "bias" in config or any(".attn.query." in name for name in arrays):  # in nanoGPT's model_args, in minGPT's names
        notes.append("gelu is by tanh here: logits differ a little if it was by erf, as in nanoGPT since May 2023")
    arrays = unwrapped(arrays, where)
    head = arrays.pop("lm_head.weight", None)
    if head is not None:
        arrays.setdefault("wte.weight", head)  # one matrix, under whichever name
    if others := sorted(name for name in arrays if re.fullmatch(OTHER_HEADS, name)):
        notes.append(f"{where}: left out, since gpt2() has no such head: {', '.join(others):.80}")
    arrays = {name: array for name, array in arrays.items() if name not in others}
    hparams = read_sizes(config, arrays, where)
    is_linear = np.shape(arrays.get("h.0.attn.c_attn.weight"))[:1] == (3 * hparams["n_embd"],)  # PyTorch's: [out, in]
    has_biases = any(name.endswith(".bias") for name in arrays)
    weights = {}
    for ours, shape in variables(hparams):
        theirs = transformers_name(ours)
        if theirs in arrays:
            array = arrays.pop(theirs)
        elif ours.endswith("/b") and is_linear and not has_biases:  # nanoGPT's bias=False
            array = np.zeros(shape, np.float32)
        else:
            fail(f"{where} lacks the weights {theirs}")
        if isinstance(array, str):
            fail(f"{where}: {theirs} is {array}, not float32, float16 or bfloat16")
        if is_linear and ours.endswith("/w"):
            array = np.ascontiguousarray(array.T)
        if array.shape not in (shape, (1, *shape)):
            fail(f"{where}: {theirs} has shape {[*array.shape]}, its config implies {[*shape]}")
        weights[ours] = array.reshape(shape)
    if arrays:
        fail(f"{where} has the weights {min(arrays):.80}, for which gpt2() has no use")
    if config.get("tie_word_embeddings", True) is not True and head is None:
        fail(f"{where}: tie_word_embeddings is not true, but gpt2() has one matrix for both, and there is no other")
    if head is not None and not np.array_equal(head, weights["wte"], equal_nan=True):
        fail(f"{where}: lm_head.weight is not wte.weight, but gpt2() has one matrix for both: train it with both tied")
    return hparams, weights, notes


def read_sizes(config, arrays, where):
    """hparams, from the config and, where that says nothing, from the shapes.

    Ends with one line for a model that gpt2() would compute wrongly.
    """
    kind = config["model_type"] if "model_type" in config else config.get("architectures") or "gpt2"
    if not re.match(r"gpt2$|\['GPT2", str(kind)):
        fail(f"{where}: model_type is {kind!r:.80}, not 'gpt2', and gpt2() computes no other")
    wte, wpe = (np.shape(arrays.get(f"{name}.weight")) for name in ("wte", "wpe"))
    blocks = {name.split(".")[1] for name in arrays if re.match(r"h\.\d+\.", name)}
    shapes = {"n_vocab": wte[:1], "n_embd": wte[1:], "n_ctx": wpe[-2:-1], "n_layer": (len(blocks),), "n_head": ()}
    hparams = {}
    for ours, theirs in SIZES.items():
        said = [config[name] for name in theirs if config.get(name) is not None] or [*shapes[ours]]
        if not said and ours == "n_head":
            fail(f'{where} does not say how many heads it has: put {{"n_head": 12}}, say, into a config.json beside it')
        hparams[ours] = value = said[0] if said else None
        if type(value) is not int or not 0 < value < 2**31:
            fail(f"{where}: {theirs[0]} must be a positive whole number, not {value!r:.80}")
    n_embd = hparams["n_embd"]
    if n_embd % hparams["n_head"]:
        fail(f"{where}: n_embd {n_embd} is not divisible by n_head {hparams['n_head']}")
    if config.get("activation_function") in ("gelu", "gelu_python"):
        fail(f"{where}: activation_function is 'gelu', by erf, another function than gpt2()'s gelu_new, by tanh")
    for key, values in {**ARCHITECTURE, "n_inner": (4 * n_embd, None)}.items():
        if config.get(key, values[-1]) not in values:
            fail(f"{where}: {key} is {config[key]!r:.80}, but gpt2() computes {values[0]!r}")
    epsilon = config.get("layer_norm_epsilon", EPSILON)
    if type(epsilon) is not float or not math.isclose(epsilon, EPSILON, rel_tol=1e-6):
        fail(f"{where}: layer_norm_epsilon is {epsilon!r:.80}, but gpt2() computes {EPSILON!r}")
    return hparams


# tokenizers


def read_tokenizer(folder):
    """(tokens, merges, special, end) of a folder, or None if it has none. Ends with one line for another kind of them.

    tokens: {token: id}, spelled in bytes. merges: ["left right"]. special: {token: id}, as they read. end: the one that
    ends a text, or None where that is not said.
    """
    names = ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json", ENCODER, VOCAB)
    vocab, merges, both, added, ours, our_merges = (os.path.join(folder, name) for name in names)
    tokenizer, said = (read_json(both) if os.path.exists(both) else {}), {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if os.path.exists(os.path.join(folder, name)):
            said |= read_json(os.path.join(folder, name))
    try:
        if os.path.exists(vocab) and os.path.exists(merges):
            tokens, merges = read_json(vocab), read_merges(merges)
        elif tokenizer:
            tokens, merges = model_of(tokenizer, both)
        elif os.path.exists(ours) and os.path.exists(our_merges):
            tokens, merges = read_json(ours), read_merges(our_merges)
        else:
            return None
        special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        special |= {token["content"]: int(i) for i, token in (said.get("added_tokens_decoder") or {}).items()}
        special |= read_json(added) if os.path.exists(added) else {}
        named = [said[role] for role in ROLES if said.get(role)] + [*(said.get("additional_special_tokens") or [])]
        for token in named:  # one without an id gets the next, as in transformers
            text = token["content"] if isinstance(token, dict) else token
            if text not in special:
                special[text] = tokens[text] if text in tokens else 1 + max(*tokens.values(), *special.values())
        end = said.get("eos_token")
        return tokens, merges, special, end["content"] if isinstance(end, dict) else end
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"the tokenizer in {folder} cannot be understood: {type(error).__name__}: {error!s:.80}")


def read_merges(path):
    lines = read_text(path).split("\n")
    return [line for line in lines[lines[0].startswith("#version") :] if line]


def model_of(tokenizer, path):
    """(tokens, merges) of a tokenizer.json."""
    model, cut = tokenizer["model"], tokenizer["pre_tokenizer"]
    if cut["type"] == "Sequence" and len(cut["pretokenizers"]) == 1:
        cut = cut["pretokenizers"][0]
    kind = model["type"], cut["type"], cut["add_prefix_space"], cut.get("use_regex", True), tokenizer["normalizer"]
    affixes = [model.get(key) for key in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")]
    if kind != ("BPE", "ByteLevel", False, True, None) or any(affixes):
        fail(f"{path} is not GPT-2's kind of tokenizer: BPE of bytes, of words as GPT-2 cuts them")
    return dict(model["vocab"]), [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]


def gpt2_tokenizer(models_dir, where, n_rows):
    """GPT-2's own, as read_tokenizer() has it, from a model in models_dir. Ends with one line if none has it."""
    if not N_VOCAB <= n_rows < N_VOCAB + 1024:  # padded, at most
        fail(
            f"{where} has no tokenizer for its {n_rows} tokens: put vocab.json and merges.txt, or tokenizer.json, there"
        )
    others = sorted(os.listdir(models_dir)) if os.path.isdir(models_dir) else []
    for name in (*MODEL_SIZES, *others):
        paths = {file: os.path.join(models_dir, name, file) for file in SHA256}
        if all(os.path.isfile(path) and hexdigest(path) == SHA256[file] for file, path in paths.items()):
            return read_json(paths[ENCODER]), read_merges(paths[VOCAB]), {}, END
    fail(
        f"{where} has no tokenizer: `python utils.py 124M` fetches GPT-2's own; another's vocab.json must lie beside it"
    )


def spelled(text):
    """A text as the token of its bytes, which decodes to it."""
    return "".join(map(bytes_to_unicode().get, text.encode("utf-8", errors="replace")))


def fit_tokenizer(tokenizer, wte, eos_id, where):
    """({token: id}, wte [n_vocab, n_embd], notes for the user): a token for each row, and a row for each token.

    Rows behind the last token pad a vocabulary to a round number: they are left out, so that none is ever generated.
    An id between others that no token has gets one, and the mean of all rows, whose logit is never the highest.
    """
    tokens, merges, special, end = tokenizer
    n_rows, notes = len(wte), []
    if {*map(type, [*tokens.values(), *special.values()])} - {int} or {*map(type, special)} - {str}:
        fail(f"{where}: the tokenizer must give whole numbers to texts")
    made = {*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)}
    first = min((tokens[token] for token in made if token in tokens), default=0)
    for token, i in tokens.items():  # not all are declared
        if token not in made and (re.fullmatch(r"<\|.*\|>", token) or not first <= i < n_rows):
            special.setdefault(token, i)
    if beyond := sorted(text for text, i in special.items() if i >= n_rows):
        notes.append(f"{where}: left out, since the model has no weights for them: {', '.join(beyond):.80}")
    special = {text: i for text, i in special.items() if i < n_rows}
    if END not in special:
        names = [end, *(text for text, i in special.items() if i == eos_id), "</s>"]
        name = next((name for name in names if isinstance(name, str) and name in special), None)
        if name is None:
            fail(f'{where}: no token is said to end a text: name it in special_tokens_map.json, as its "eos_token"')
        special[END] = special.pop(name)
        notes.append(f"{where}: {name:.80} ends a text, and is called {END} here")
        tokens = {token: i for token, i in tokens.items() if token != name}
    fitted = {token: i for token, i in tokens.items() if token in made or not (token in special or i >= n_rows)}
    for text, i in special.items():
        token = spelled(text)
        if fitted.setdefault(token, i) != i:
            fail(f"{where}: the tokens {i} and {fitted[token]} are the same text, {text!r:.80}")
    used = {*fitted.values()}
    n_vocab = max(used) + 1
    if n_vocab > n_rows or min(used) < 0:
        fail(f"{where}: the tokenizer has the ids {min(used)} to {max(used)}, the model has 0 to {n_rows - 1}")
    if n_vocab < n_rows:
        notes.append(f"{where}: left out, since no token has them: the last {n_rows - n_vocab} of {n_rows} rows of wte")
    unused = sorted({*range(n_vocab)} - used)
    if unused:
        wte = wte.copy()
        wte[unused] = wte[sorted(used)].mean(axis=0)
        notes.append(f"{where}: {len(unused)} ids have no token, and are called <|unused{unused[0]}|> and so on")
    return fitted | {f"<|unused{i}|>": i for i in unused}, wte[:n_vocab], notes
