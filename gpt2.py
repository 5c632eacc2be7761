"""GPT-2 inference in plain NumPy: the model, the generation loop and the command line.

The shapes at the end of a line leave out leading batch axes, which every function takes: [..., n_seq, n_embd] as well.
Each array brings its own namespace (the Python array API standard), so the same lines run on NumPy, on CuPy and on JAX
(under jit, grad and vmap); that is why no array library is imported here.
"""

import inspect
import math
import os
import re
import signal
import sys

MODELS_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
QUERY_BLOCK = 256  # rows of queries that attend together: their scores fit the processor's cache


def gelu(x):
    """Gaussian error linear unit, in the tanh approximation GPT-2 was trained with (https://arxiv.org/abs/1606.08415)."""
    xp = x.__array_namespace__()
    # x * x * x: in float32, NumPy's x**3 is a hundred times slower
    return 0.5 * x * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Turns real numbers into probabilities that sum to 1 over the last axis."""
    xp = x.__array_namespace__()
    exp_x = xp.exp(x - xp.max(x, axis=-1, keepdims=True))  # the largest becomes exp(0): nothing overflows
    return exp_x / xp.sum(exp_x, axis=-1, keepdims=True)


def layer_norm(x, g, b, eps: float = 1e-5):
    """Normalizes the last axis to mean 0 and variance 1, then scales by g and shifts by b (https://arxiv.org/abs/1607.06450)."""
    xp = x.__array_namespace__()
    x = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(x * x, axis=-1, keepdims=True)
    return g * (x / xp.sqrt(variance + eps)) + b


def linear(x, w, b):  # [m, in], [in, out], [out] -> [m, out]
    """Projects the last axis of x from in to out features."""
    return matmul(x, w) + b


def matmul(x, w):  # [m, in], [in, out] -> [m, out]
    # one product for all rows of a batch: x @ w would read w again for every sequence in it
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def ffn(x, c_fc, c_proj):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """Position-wise feed-forward network: two linear layers with a GELU between them."""
    # project up
    a = gelu(linear(x, **c_fc))  # [n_seq, n_embd] -> [n_seq, 4*n_embd]

    # project back down
    return linear(a, **c_proj)  # [n_seq, 4*n_embd] -> [n_seq, n_embd]


def attention(q, k, v, mask):  # [n_q, d_k], [n_k, d_k], [n_k, d_v], [n_q, n_k] -> [n_q, d_v]
    """Scaled dot-product attention (https://arxiv.org/abs/1706.03762, equation 1); mask is added to the scores."""
    return softmax(q / math.sqrt(q.shape[-1]) @ k.mT + mask) @ v


def mha(x, c_attn, c_proj, n_head, kv_cache=None):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """Multi-head causal self-attention, all heads in one product.

    kv_cache: [2, n_head, n_k, n_embd/n_head], the keys and values of the n_k tokens so far; those of x, the last n_seq
    of them, are written here. Without it the tokens of x attend to each other alone.
    """
    xp = x.__array_namespace__()

    # qkv projection
    x = linear(x, **c_attn)  # [n_seq, n_embd] -> [n_seq, 3*n_embd]

    # split into qkv and into heads
    x = x.reshape(*x.shape[:-1], 3, n_head, -1)  # [n_seq, 3*n_embd] -> [n_seq, 3, n_head, n_embd/n_head]
    q, k, v = (x[..., i, :, :].swapaxes(-3, -2) for i in range(3))  # 3 of [n_head, n_seq, n_embd/n_head]

    # keys and values of earlier tokens come from the cache
    n_seq = q.shape[-2]
    if kv_cache is not None:
        kv_cache[0][..., -n_seq:, :], kv_cache[1][..., -n_seq:, :] = k, v
        k, v = kv_cache[0], kv_cache[1]  # 2 of [n_head, n_k, n_embd/n_head]
    n_past = k.shape[-2] - n_seq

    # perform causal attention, a block of queries at a time: keys behind the block's last query are never touched
    out = []
    for start in range(0, n_seq, QUERY_BLOCK):
        q_block = q[..., start : start + QUERY_BLOCK, :]  # [n_head, n_q, n_embd/n_head]
        n_q, n_k = q_block.shape[-2], n_past + start + q_block.shape[-2]
        # causal mask to hide future inputs from being attended to
        causal_mask = xp.triu(xp.full((n_q, n_k), -1e10, dtype=x.dtype), k=n_k - n_q + 1)  # [n_q, n_k]
        out.append(attention(q_block, k[..., :n_k, :], v[..., :n_k, :], causal_mask))  # [n_head, n_q, n_embd/n_head]
    x = xp.concat(out, axis=-2)  # [n_head, n_seq, n_embd/n_head]

    # merge heads
    x = x.swapaxes(-3, -2)  # [n_head, n_seq, n_embd/n_head] -> [n_seq, n_head, n_embd/n_head]
    x = x.reshape(*x.shape[:-2], -1)  # [n_seq, n_head, n_embd/n_head] -> [n_seq, n_embd]

    # out projection
    return linear(x, **c_proj)  # [n_seq, n_embd] -> [n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kv_cache=None):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """One pre-norm decoder block; each sublayer is added to its own input (a residual connection)."""
    # multi-head causal self attention
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv_cache=kv_cache)  # [n_seq, n_embd] -> [n_seq, n_embd]

    # position-wise feed forward network
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # [n_seq, n_embd] -> [n_seq, n_embd]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, kv_cache=None, n_past=0, only_last=False):
    """The logits of the next token at every position: [n_seq] -> [n_seq, n_vocab].

    inputs: token ids, a list or an array of the same library as the weights.
    kv_cache: for every block an array [2, ..., n_head, n_ctx, n_embd/n_head], of which the first n_past positions are
        filled. inputs are then the tokens from position n_past on, and their keys and values are written into it.
    only_last: project the last position alone to the vocabulary: [n_seq] -> [1, n_vocab].
    Raises ValueError for more positions than wpe has.
    """
    inputs = wte.__array_namespace__().asarray(inputs)
    n_seen = n_past + inputs.shape[-1]
    if n_seen > len(wpe):
        raise ValueError(f"{n_seen} tokens do not fit the model's context of {len(wpe)}")

    # token + positional embeddings
    x = wte[inputs] + wpe[n_past:n_seen]  # [n_seq] -> [n_seq, n_embd]

    # forward pass through n_layer transformer blocks
    for i, block in enumerate(blocks):
        seen = None if kv_cache is None else kv_cache[i][..., :n_seen, :]
        x = transformer_block(x, **block, n_head=n_head, kv_cache=seen)  # [n_seq, n_embd] -> [n_seq, n_embd]

    # projection to vocab
    if only_last:
        x = x[..., -1:, :]  # [n_seq, n_embd] -> [1, n_embd]
    x = layer_norm(x, **ln_f)  # [n_seq, n_embd] -> [n_seq, n_embd]
    return matmul(x, wte.T)  # [n_seq, n_embd] -> [n_seq, n_vocab]


def check_room(n_prompt, n_tokens_to_generate, n_ctx):
    """Raises ValueError unless there is a prompt and the context has room for it and for what is to follow."""
    if n_prompt == 0:
        raise ValueError("the prompt has no tokens: begin with <|endoftext|> to generate from nothing")
    if n_prompt + n_tokens_to_generate > n_ctx:
        raise ValueError(
            f"the prompt's {n_prompt} tokens and the {n_tokens_to_generate} to generate are more than "
            f"the model's context of {n_ctx} tokens holds"
        )


def generate_ids(inputs, params, n_head, n_tokens_to_generate):
    """Yields n_tokens_to_generate ids one by one, each the likeliest after the prompt and the ids before it.

    The prompt goes through the model once; from then on every step feeds one token and finds the keys and values of the
    earlier ones in a cache. That is written in place, as NumPy's and CuPy's arrays can be, but not JAX's.
    Raises ValueError, before any work, for a prompt that is empty or leaves too little room in the context.
    """
    wte, wpe, n_past = params["wte"], params["wpe"], 0
    check_room(len(inputs), n_tokens_to_generate, len(wpe))

    # allocated once, for as many positions as this run fills: [2, n_head, n_positions, n_embd/n_head] for every block
    cache_shape = (2, n_head, len(inputs) + n_tokens_to_generate, wte.shape[-1] // n_head)
    kv_cache = [wte.__array_namespace__().empty(cache_shape, dtype=wte.dtype) for _ in params["blocks"]]

    for _ in range(n_tokens_to_generate):  # auto-regressive decode loop
        logits = gpt2(inputs, **params, n_head=n_head, kv_cache=kv_cache, n_past=n_past, only_last=True)  # [1, n_vocab]
        n_past += len(inputs)
        next_id = int(logits[-1].argmax())  # greedy sampling
        yield next_id
        inputs = [next_id]  # the cache knows the rest


def generate(inputs, params, n_head, n_tokens_to_generate):
    """The ids that greedy decoding appends to the ids in inputs: a list of n_tokens_to_generate. See generate_ids."""
    from tqdm import tqdm

    ids = generate_ids(inputs, params, n_head, n_tokens_to_generate)
    return list(tqdm(ids, "generating", total=n_tokens_to_generate, disable=None))  # None: silent unless on a terminal


def main(prompt: str, n_tokens_to_generate: int = 40, model_size: str = "124M", models_dir: str = MODELS_DIR):
    """Continues a prompt with GPT-2.

    Args:
        prompt: the text to continue; "" generates from nothing
        n_tokens_to_generate: how many tokens to append
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        models_dir: the folder that holds the models
    """
    from utils import ModelError, load_encoder_hparams_and_params

    if type(n_tokens_to_generate) is not int or n_tokens_to_generate < 0:
        sys.exit(f"gpt2.py: n_tokens_to_generate must be a whole number, 0 or more, not {n_tokens_to_generate!r}")

    # load encoder, hparams, and params from the released open-ai gpt-2 files
    try:
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    except ModelError as error:
        sys.exit(f"gpt2.py: {error}")

    # encode the input string using the BPE tokenizer
    try:
        input_ids = encoder.encode(prompt) if prompt else [encoder.encoder["<|endoftext|>"]]
    except UnicodeEncodeError:
        sys.exit("gpt2.py: the prompt is not valid Unicode text")

    # make sure we are not surpassing the max sequence length of our model
    try:
        check_room(len(input_ids), n_tokens_to_generate, hparams["n_ctx"])
    except ValueError as error:
        sys.exit(f"gpt2.py: {error}")

    # generate output ids
    output_ids = generate(input_ids, params, hparams["n_head"], n_tokens_to_generate)

    # decode the ids back into a string
    return encoder.decode(output_ids)


def fire_arguments(argv, function=main):
    """The command line as Python Fire must see it: every value behind its flag, and text in quotes.

    Words without a flag are function's first argument, or all of its *arguments; the flag of a bool needs no value.
    Fire reads values as Python literals, so that 1984 or [1, 2] would not stay text; the flag of a bool would take the
    word behind it; and Fire complains of what it cannot place only when function has run, so that ends here.
    """
    options = inspect.signature(function).parameters
    program, text = os.path.basename(function.__code__.co_filename), next(iter(options))
    many = options[text].kind is inspect.Parameter.VAR_POSITIONAL
    command, argv = [], iter(argv)
    for arg in argv:
        name, equals, value = arg.lstrip("-").partition("=")
        if not re.match("--|-[a-zA-Z]", arg):
            name, equals, value = text, "=", arg
        elif name in ("help", "h"):
            return ["--help"]
        # -n is short for the one option that begins with n
        names = [option for option in options if name.replace("-", "_") in (option, option[0])]
        if len(names) != 1:
            hint = f"a prompt that begins so is given as --{text}={arg!r}"
            sys.exit(f"{program}: unknown flag {arg} (see --help); {hint}")
        kind = options[names[0]].annotation
        if not equals:
            value = "True" if kind is bool else next(argv, None)
        if value is None:
            sys.exit(f"{program}: {arg} needs a value")
        if names == [text] and many:
            command.append(repr(value))
            continue
        if names == [text] and any(word.startswith(f"--{text}=") for word in command):
            sys.exit(f"{program}: more than one {text}: put quotes around a {text} of several words")
        command.append(f"--{names[0]}={value!r}" if kind is str else f"--{names[0]}={value}")
    return command


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: at once, wherever we are, without a traceback

    import fire

    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark
        fire.Fire(main, command=fire_arguments(sys.argv[1:]), name="gpt2.py")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush would complain
        sys.exit(1)
