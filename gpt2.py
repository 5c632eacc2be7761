"""GPT-2 in plain NumPy, from the prompt to the text: prompt -> ids -> logits -> id -> text.

The shapes at the end of a line leave out leading batch axes, which the model's functions take, too.
Each array brings its own library, so the same lines run on NumPy, on CuPy and on JAX (under jit, grad and vmap); that
is why none is imported here. Read xp as np.

Speed enters by two lines, `kv_cache.update(k, v, slots)` and `model.next_ids(...)`. Whoever takes the first for a list
that grows, and the second for the argmax of gpt2(), loses speed and nothing else: backends/ makes them fast.
"""

import math
import os
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out
    import cli

from backends import with_cache
from backends.arrays import matmul, namespace, query_block
from backends.checks import as_batch, check_bounds, check_room
from files import MODELS_DIR
from sampling import Sampler, check_options


def gelu(x):
    """Gaussian error linear unit, in the tanh approximation GPT-2 was trained with (https://arxiv.org/abs/1606.08415)."""
    xp, c = namespace(x), math.sqrt(2 / math.pi)
    # 0.5 * x * (1 + tanh(c * (x + 0.044715 * x**3))), multiplied out: fewer large arrays, and NumPy's x**3 is slow
    return x * (0.5 + 0.5 * xp.tanh(x * (c + 0.044715 * c * x * x)))


def softmax(x):
    """Turns real numbers into probabilities that sum to 1 over the last axis."""
    xp = namespace(x)  # of a few numbers, xp.max and xp.sum take twice the time of x.max and x.sum
    x = xp.exp(x - x.max(axis=-1, keepdims=True))  # the largest becomes exp(0): nothing overflows
    x /= x.sum(axis=-1, keepdims=True)  # in place, as in other lines below: large temporaries cost time
    return x


def layer_norm(x, g, b, eps: float = 1e-5):
    """Normalizes the last axis to mean 0 and variance 1, then scales by g and shifts by b (https://arxiv.org/abs/1607.06450)."""
    xp, n = namespace(x), x.shape[-1]
    x = x - x.sum(axis=-1, keepdims=True) / n  # the mean; NumPy's own takes twice the time for a token
    variance = (x[..., None, :] @ x[..., None])[..., 0] / n  # [1, n] @ [n, 1]: the mean of x * x, but faster
    x /= xp.sqrt(variance + eps)
    x *= g
    x += b
    return x


def linear(x, w, b):  # [m, in], [in, out], [out] -> [m, out]
    """Projects the last axis of x from in to out features."""
    x = matmul(x, w)
    x += b
    return x


def ffn(x, c_fc, c_proj):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """Position-wise feed-forward network: two linear layers with a GELU between them."""
    # project up
    a = gelu(linear(x, **c_fc))  # [n_seq, n_embd] -> [n_seq, 4*n_embd]

    # project back down
    return linear(a, **c_proj)  # [n_seq, 4*n_embd] -> [n_seq, n_embd]


def attention(q, k, v, mask):  # [n_q, d_k], [n_k, d_k], [n_k, d_v], [n_q, n_k] -> [n_q, d_v]
    """Scaled dot-product attention (https://arxiv.org/abs/1706.03762, equation 1); mask is added to the scores."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT  # transposed; q is scaled, since it is smaller than the scores
    scores += mask
    weights = softmax(scores)  # [n_q, n_k]
    return weights @ v


def causal_attention(q, k, v, slots):  # [n_head, n_q, d], 2 of [n_head, n_k, d], [n_q] -> [n_head, n_q, d]
    """Attention by the one rule: a key in slot j is hidden from a query in slot s if and only if j > s.

    Two new tokens behind two that the cache has, slots = [2, 3]:        key in slot    0  1  2  3
                                                                         query in 2     .  .  .  hidden
                                                                         query in 3     .  .  .  .
    """
    xp, n_q, n_k, out = namespace(q), q.shape[-2], k.shape[-2], []
    block_size = query_block(q)  # queries at a time: of few, the scores fit the processor's cache
    for start in range(0, max(n_q, 1), block_size):  # once for no queries: a prompt that only fills the cache
        stop = min(start + block_size, n_q)
        end = n_k - (n_q - stop)  # the last query's slot is at most the last key's: no query here sees from end on
        block_slots = slots[..., None, start:stop, None]  # [1, stop-start, 1]: the same for all heads, beside all keys
        hidden = xp.arange(end) > block_slots  # [1, stop-start, end]
        mask = xp.where(hidden, q.dtype.type(-math.inf), 0)  # [1, stop-start, end]
        out.append(attention(q[..., start:stop, :], k[..., :end, :], v[..., :end, :], mask))  # [n_head, stop-start, d]
    return xp.concat(out, axis=-2)


def mha(x, c_attn, c_proj, n_head, kv_cache=None, slots=None, n_skip=0):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """Multi-head causal self-attention, all heads in one product.

    kv_cache: a Cache with the keys and values of earlier tokens; without, x is all there is. See backends/cache.py.
    slots: the position of each token of x, and its place in the cache: [n_seq], or [n_rows, n_seq] for a batch.
    n_skip: leave out the output at so many of the first positions.
    """
    slots = namespace(x).arange(x.shape[-2]) if slots is None else slots

    # qkv projection
    x = linear(x, **c_attn)  # [n_seq, n_embd] -> [n_seq, 3*n_embd]

    # split into qkv and into heads
    x = x.reshape(*x.shape[:-1], 3, n_head, -1)  # [n_seq, 3*n_embd] -> [n_seq, 3, n_head, n_embd/n_head]
    q, k, v = (x[..., i, :, :].swapaxes(-3, -2) for i in range(3))  # 3 of [n_head, n_seq, n_embd/n_head]

    # keys and values of earlier tokens come from the cache
    if kv_cache is not None:
        k, v = kv_cache.update(k, v, slots)  # 2 of [n_head, n_slots, n_embd/n_head]

    # perform causal attention over all heads
    x = causal_attention(q[..., n_skip:, :], k, v, slots[..., n_skip:])  # -> [n_head, n_seq, n_embd/n_head]

    # merge heads
    x = x.swapaxes(-3, -2)  # [n_head, n_seq, n_embd/n_head] -> [n_seq, n_head, n_embd/n_head]
    x = x.reshape(*x.shape[:-2], n_head * x.shape[-1])  # [n_seq, n_head, n_embd/n_head] -> [n_seq, n_embd]

    # out projection
    return linear(x, **c_proj)  # [n_seq, n_embd] -> [n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, n_skip=0, **cache):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """One pre-norm decoder block; each sublayer is added to its own input (a residual connection). Options: see mha."""
    # multi-head causal self attention
    a = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, n_skip=n_skip, **cache)  # [n_seq, n_embd] -> [n_seq, n_embd]
    x = x[..., n_skip:, :] + a

    # position-wise feed forward network
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # [n_seq, n_embd] -> [n_seq, n_embd]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, kv_cache=None, n_past=0, n_last=None):  # [n_seq] -> [n_seq, n_vocab]
    """The logits of the next token at every position.

    inputs: token ids, a list or an array of the same library as the weights.
    kv_cache: a Cache for every block, of which n_past slots are filled; the keys and values of inputs go behind those.
    n_past: a number, or an array [n_rows] for the rows of a batch.
    n_last: for the last n_last positions alone, which skips most of the last block: [n_seq] -> [n_last, n_vocab].
    Raises ValueError for ids that are not in the vocabulary, and for more tokens than wpe or the cache has room for.
    """
    xp = namespace(wte)
    inputs = xp.asarray(inputs)
    check_bounds(inputs, n_past, wte, wpe, kv_cache)
    n_seq = inputs.shape[-1]
    n_last = n_seq if n_last is None else min(n_last, n_seq)

    # token + positional embeddings
    slots = xp.asarray(n_past)[..., None] + xp.arange(n_seq)  # [n_seq], or [n_rows, n_seq]
    x = wte[inputs] + wpe[slots]  # [n_seq] -> [n_seq, n_embd]

    # forward pass through n_layer transformer blocks, of which all but the last need every position
    caches = kv_cache or [None] * len(blocks)
    for i, (block, cache) in enumerate(zip(blocks, caches, strict=True), 1):
        n_skip = n_seq - n_last if i == len(caches) else 0
        x = transformer_block(x, **block, n_head=n_head, kv_cache=cache, slots=slots, n_skip=n_skip)

    # projection to vocab
    x = layer_norm(x[..., x.shape[-2] - n_last :, :], **ln_f)  # [n_seq, n_embd] -> [n_last, n_embd]
    return matmul(x, wte.T, dtype="float32")  # [n_last, n_embd] -> [n_last, n_vocab]


def decode(prompts, model, sampler, n_ctx, n_tokens):
    """Yields the next ids of all prompts, [n_rows], n_tokens times. A full context goes on as its newest half."""
    windows, n_past = [[*prompt] for prompt in prompts], [0] * len(prompts)
    while n_tokens > 0:  # auto-regressive
        for row, window in enumerate(windows):
            if len(window) > n_ctx:
                windows[row], n_past[row] = window[-max(n_ctx // 2, 1) :], 0
        rows = [window[n:] for window, n in zip(windows, n_past, strict=True)]  # what the cache does not have yet
        n_steps = n_ctx + 1 - max(map(len, windows))  # + 1: the newest ids need no slot until they are fed
        for ids in model.next_ids(rows, n_past, min(n_tokens, n_steps), sampler):  # gpt2(), once or more: see backends
            for window, next_id in zip(windows, ids, strict=True):
                window.append(next_id)
            n_tokens -= 1
            yield ids
        n_past = [len(window) - 1 for window in windows]  # the newest id is not in the cache yet


def until(stop, steps, n_rows):
    """Passes on steps of n_rows ids, with None for a row that ended in an earlier step: stop(its ids) was true."""
    outputs, running = [[] for _ in range(n_rows)], [True] * n_rows
    for ids in steps:
        yield [next_id if runs else None for next_id, runs in zip(ids, running, strict=True)]
        for row, next_id in enumerate(ids):
            if running[row]:
                outputs[row].append(next_id)
                running[row] = not stop(outputs[row])
        if not any(running):
            return


def generate_ids(inputs, params, n_head, n_tokens_to_generate, stop=None, sliding_window=False, **sampling):
    """Yields the ids that continue a prompt, as they are made, on the arrays that params are: NumPy's, CuPy's or JAX's.

    inputs: the ids of a prompt, or a batch, a list of several: that yields lists, with None for those that ended.
    stop: called with the ids generated so far for a prompt; a true result ends it.
    sliding_window: where the context is full, go on with the newest half of it as the prompt.
    sampling: temperature (0, the default, is greedy), top_k, top_p, seed, and others: see sampling.Sampler. With
        logprobs=k, each id comes as (id, its log-probability, {id: log-probability} of the k likeliest).
    Raises, before any work, TypeError for no ids, ValueError for what is out of range, MemoryError for too much.
    """
    prompts, is_batch = as_batch(inputs, len(params["wte"]))
    n_rows, longest, n_ctx = len(prompts), max(map(len, prompts)), len(params["wpe"])
    check_options(n_tokens_to_generate, stop=stop)
    check_room(longest, n_tokens_to_generate, n_ctx, sliding_window)

    sampler, n_slots = Sampler(prompts, **sampling), min(longest + n_tokens_to_generate, n_ctx)
    model = with_cache(gpt2, params, n_head, n_rows, n_slots, greedy=sampler.is_greedy)
    steps = decode(prompts, model, sampler, n_ctx, n_tokens_to_generate)
    steps = until(stop, steps, n_rows) if stop else steps
    steps = steps if sampler.logprobs is None else sampler.with_logprobs(steps)
    return steps if is_batch else (next_id for (next_id,) in steps)  # one prompt: ids, not lists of one


def generate(inputs, params, n_head, n_tokens_to_generate, bar=True, **options):
    """The ids that continue a prompt: greedy unless told otherwise, n_tokens_to_generate of them unless stopped.

    Returns a list, for a batch a list of lists. bar: show progress on a terminal. More options, errors: generate_ids.
    """
    prompts, is_batch = as_batch(inputs, len(params["wte"]))
    steps = generate_ids(prompts, params, n_head, n_tokens_to_generate, **options)
    if bar and sys.stderr.isatty():
        from files.bar import Bar  # only here: its import takes as long as a token or two

        steps = Bar(steps, "generating", total=n_tokens_to_generate)
    steps = list(steps)  # [n_steps, n_rows]
    outputs = [[ids[row] for ids in steps if ids[row] is not None] for row in range(len(prompts))]
    return outputs if is_batch else outputs[0]


def main(
    prompt: str = None,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = MODELS_DIR,
    temperature: float = 0,
    top_k: int = 0,
    top_p: float = 1,
    seed: int = None,
    repetition_penalty: float = 1,
    no_repeat_ngram: int = 0,
    n_samples: int = 1,
    stop: str = None,
    special: bool = False,
    stream: bool = False,
    interactive: bool = False,
    prompts_file: str = None,
    batch_size: int = None,
    out: str = None,
    logprobs: int = None,
    sliding_window: bool = False,
    backend: str = "numpy",
    dtype: str = "float32",
    tensor_parallel: int = 1,
    n_threads: int = None,
):
    """Continues a prompt with GPT-2: python gpt2.py "Alan Turing theorized that computers" --n_tokens_to_generate 40

    Args:
        prompt: the text to continue; "" generates from nothing, - reads standard input, as does no prompt in a pipe
        n_tokens_to_generate: how many tokens to append
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        models_dir: the folder that holds the models
        temperature: 0 always takes the likeliest token; 1 draws from the model's probabilities; more is more random
        top_k: with a temperature, draw from the k likeliest tokens only (0: from all)
        top_p: with a temperature, draw from the smallest set of likeliest tokens whose probabilities reach p
        seed: with a temperature, makes the draws repeatable
        repetition_penalty: above 1, tokens that stand in the text already are less likely to come again
        no_repeat_ngram: no run of so many tokens comes twice
        n_samples: with a temperature, how many continuations to draw at once
        stop: end before this text appears; \\n is a line break; several are given as a list, "['User:', 'Bot:']"
        special: <|endoftext|> in a prompt is that token, and not a text like any other; --stop knows it in any case
        stream: print the text as it is made
        interactive: ask for prompt after prompt, each continued alone; Ctrl-C stops it, Ctrl-D (Windows: Ctrl-Z) leaves
        prompts_file: continue every line (-: of standard input), in .jsonl every "prompt"; prints a JSON object a line
        batch_size: with prompts_file, how many texts are made at once, 32 unless told otherwise
        out: with prompts_file, append to this file; prompts that it answers already are passed over, whatever the flags
        logprobs: with prompts_file, tell the log-probability of each token, and of the so many likeliest in its place
        sliding_window: past the end of the model's context, go on with the newest half of it as the prompt
        backend: whose arrays to compute with: numpy, jax (on a GPU or TPU where it sees one), or cupy
        dtype: of the weights: float32, or bfloat16 with jax
        tensor_parallel: with jax, over how many devices to divide the weights of each block
        n_threads: with numpy, how many of the processor's cores to use, instead of those that are free
    """
    from backends import devices, threads

    threads.tune_openblas()  # before NumPy is imported
    import cli
    from utils import ModelError, load_encoder_hparams_and_params

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    sampling |= {"repetition_penalty": repetition_penalty, "no_repeat_ngram": no_repeat_ngram, "logprobs": logprobs}
    with cli.mistakes(ValueError):
        check_options(n_tokens_to_generate, n_samples, batch_size, **sampling)
        devices.check(backend, dtype, tensor_parallel, n_threads)
    cli.check_flags(prompt, interactive, prompts_file, stream, n_samples, batch_size, out, logprobs, seed, temperature)
    source, stop_texts = cli.open_prompts(prompt, interactive, prompts_file), cli.stop_texts(stop)

    # load encoder, hparams, and params from the released open-ai gpt-2 files
    with cli.mistakes((ModelError, devices.DeviceError)):
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
        params = devices.place(params, backend, dtype, tensor_parallel, n_threads)
    cli.note(devices.described(params))
    options = {"n_tokens_to_generate": n_tokens_to_generate, "sliding_window": sliding_window, **sampling}
    options |= {"params": params, "n_head": hparams["n_head"]}
    writer = cli.Writer(encoder, generate, generate_ids, stop_texts, special, **options)
    if interactive:
        return cli.converse(writer)
    if prompts_file:
        return cli.answer_file(writer, source, prompts_file, out, batch_size, n_samples, seed)

    # encode the input string using the BPE tokenizer
    with cli.mistakes(ValueError):
        ids = writer.encode(source)

    # generate output ids, and decode them back into a string
    if stream:
        return cli.show(writer.pieces(ids))
    with cli.ctrl_c_stops(writer):
        outputs = generate([ids] * n_samples, **writer.options)
        cli.show_samples([writer.decode(output) for output in outputs])


if __name__ == "__main__":
    cli.run(main)
