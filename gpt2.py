"""GPT-2 inference in plain NumPy: the model and the generation loop (the command line is in cli.py).

The shapes at the end of a line leave out leading batch axes, which the model's functions take, too.
Each array brings its own library, so the same lines run on NumPy, on CuPy and on JAX (under jit, grad and vmap); that
is why none is imported here.
"""

import math
import numbers
import sys

QUERY_BLOCK = 64  # rows of queries that attend together: their scores fit the processor's cache
N_MATCH, N_DRAFT = 8, 15  # see lookup; a pass over 16 tokens takes about as long as three over one


def namespace(x):
    """The library that an array belongs to, as the Python array API standard has it."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules[type(x).__module__]  # CuPy 14 does not follow the standard in this


def gelu(x):
    """Gaussian error linear unit, in the tanh approximation GPT-2 was trained with (https://arxiv.org/abs/1606.08415)."""
    xp, c = namespace(x), math.sqrt(2 / math.pi)
    # 0.5 * x * (1 + tanh(c * (x + 0.044715 * x**3))), multiplied out: fewer large arrays, and NumPy's x**3 is slow
    return x * (0.5 + 0.5 * xp.tanh(x * (c + 0.044715 * c * x * x)))


def softmax(x):
    """Turns real numbers into probabilities that sum to 1 over the last axis."""
    xp = namespace(x)
    x = xp.exp(x - xp.max(x, axis=-1, keepdims=True))  # the largest becomes exp(0): nothing overflows
    x /= xp.sum(x, axis=-1, keepdims=True)  # in place, as in other lines below: large temporaries cost time
    return x


def layer_norm(x, g, b, eps: float = 1e-5):
    """Normalizes the last axis to mean 0 and variance 1, then scales by g and shifts by b (https://arxiv.org/abs/1607.06450)."""
    xp = namespace(x)
    x = x - xp.mean(x, axis=-1, keepdims=True)
    variance = (x[..., None, :] @ x[..., None])[..., 0] / x.shape[-1]  # the mean of x * x, without that array
    x /= xp.sqrt(variance + eps)
    x *= g
    x += b
    return x


def linear(x, w, b):  # [m, in], [in, out], [out] -> [m, out]
    """Projects the last axis of x from in to out features."""
    x = matmul(x, w)
    x += b
    return x


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
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT  # q is scaled, since it is smaller than the scores
    scores += mask
    return softmax(scores) @ v


def mha(x, c_attn, c_proj, n_head, kv_cache=None, pad_mask=None, only_last=False):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """Multi-head causal self-attention, all heads in one product.

    kv_cache: [2, n_head, n_k, n_embd/n_head], the keys and values of the n_k tokens so far; those of x, the last n_seq
    of them, are written here. Without it the tokens of x attend to each other alone.
    pad_mask: [n_rows, 1, 1, n_k] for a batch, added to the scores to hide keys that are no tokens.
    only_last: the output of the last position alone, [n_seq, n_embd] -> [1, n_embd], with the keys and values of all.
    """
    xp = namespace(x)

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
    if only_last:
        q = q[..., -1:, :]  # [n_head, 1, n_embd/n_head], and 1 for n_seq from here on
    n_past = k.shape[-2] - q.shape[-2]

    # perform causal attention, a block of queries at a time: keys behind the block's last query are never touched
    out = []
    for start in range(0, q.shape[-2], QUERY_BLOCK):
        q_block = q[..., start : start + QUERY_BLOCK, :]  # [n_head, n_q, n_embd/n_head]
        n_q, n_k = q_block.shape[-2], n_past + start + q_block.shape[-2]
        mask = 0 if pad_mask is None else pad_mask[..., :n_k]  # [n_rows, 1, 1, n_k]
        if n_q > 1:  # causal mask to hide future inputs from being attended to; a lone query is the newest input
            mask = mask + xp.triu(xp.full((n_q, n_k), -1e10, dtype=x.dtype), k=n_k - n_q + 1)  # [n_q, n_k]
        out.append(attention(q_block, k[..., :n_k, :], v[..., :n_k, :], mask))  # [n_head, n_q, n_embd/n_head]
    x = xp.concat(out, axis=-2)  # [n_head, n_seq, n_embd/n_head]

    # merge heads
    x = x.swapaxes(-3, -2)  # [n_head, n_seq, n_embd/n_head] -> [n_seq, n_head, n_embd/n_head]
    x = x.reshape(*x.shape[:-2], -1)  # [n_seq, n_head, n_embd/n_head] -> [n_seq, n_embd]

    # out projection
    return linear(x, **c_proj)  # [n_seq, n_embd] -> [n_seq, n_embd]


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, only_last=False, **cache):  # [n_seq, n_embd] -> [n_seq, n_embd]
    """One pre-norm decoder block; each sublayer is added to its own input (a residual connection). Options: see mha."""
    # multi-head causal self attention
    a = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, only_last=only_last, **cache)  # [n_seq, n_embd]
    x = (x[..., -1:, :] if only_last else x) + a  # [n_seq, n_embd] -> [n_seq, n_embd]

    # position-wise feed forward network
    return x + ffn(layer_norm(x, **ln_2), **mlp)  # [n_seq, n_embd] -> [n_seq, n_embd]


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, kv_cache=None, n_past=0, n_pad=None, only_last=False):
    """The logits of the next token at every position: [n_seq] -> [n_seq, n_vocab].

    inputs: token ids, a list or an array of the same library as the weights.
    kv_cache: for every block an array [2, ..., n_head, n_positions, n_embd/n_head], of which the first n_past positions
        are filled. inputs are then the tokens from position n_past on; their keys and values are written behind those.
    n_pad: [n_rows], for a batch [n_rows, n_seq]: how many of the first positions of each row are no tokens. So rows of
        different lengths end together.
    only_last: the logits of the last position alone, which skips most of the last block: [n_seq] -> [1, n_vocab].
    Raises ValueError for more positions than wpe or the cache has.
    """
    xp = namespace(wte)
    inputs = xp.asarray(inputs)
    n_seen = n_past + inputs.shape[-1]
    n_ctx = min([len(wpe), *(cache.shape[-2] for cache in kv_cache or [])])
    if n_seen > n_ctx:
        raise ValueError(f"{n_seen} tokens do not fit the context of {n_ctx}")

    # a row's own positions begin behind its padding, which no query may see
    positions, pad_mask = xp.arange(n_past, n_seen), None  # [n_seq]
    if n_pad is not None:
        positions = positions - n_pad[:, None]  # [n_rows, n_seq]
        pad_mask = -1e10 * xp.astype(xp.arange(n_seen) < n_pad[:, None, None, None], wte.dtype)  # [n_rows, 1, 1, n_k]

    # token + positional embeddings
    x = wte[inputs] + wpe[positions]  # [n_seq] -> [n_seq, n_embd]

    # forward pass through n_layer transformer blocks
    for i, block in enumerate(blocks):
        options = {"kv_cache": None if kv_cache is None else kv_cache[i][..., :n_seen, :], "pad_mask": pad_mask}
        options["only_last"] = only_last and i == len(blocks) - 1  # the blocks before the last need every position
        x = transformer_block(x, **block, n_head=n_head, **options)  # [n_seq, n_embd] -> [n_seq, n_embd]

    # projection to vocab
    if only_last:
        x = x[..., -1:, :]  # [1, n_embd], if there was no block
    x = layer_norm(x, **ln_f)  # [n_seq, n_embd] -> [n_seq, n_embd]
    return matmul(x, wte.T)  # [n_seq, n_embd] -> [n_seq, n_vocab]


def sample(logits, rng=None, temperature=0, top_k=0, top_p=1):  # [..., n_vocab] -> [...]
    """Picks a token: the likeliest at temperature 0, else one drawn from softmax(logits / temperature).

    rng: a NumPy Generator. top_k keeps the k likeliest tokens (https://arxiv.org/abs/1805.04833), 0 all of them; of
    these, top_p keeps the smallest set whose probabilities reach p (nucleus sampling, https://arxiv.org/abs/1904.09751).
    Tokens exactly as likely as the last one kept stay, too.
    """
    xp = namespace(logits)
    if temperature == 0:
        return xp.argmax(logits, axis=-1)  # greedy sampling
    logits = (logits - xp.max(logits, axis=-1, keepdims=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = xp.sort(logits, axis=-1)[..., -top_k, None]  # [..., 1]
        logits = xp.where(logits < kth, -xp.inf, logits)
    if top_p < 1:
        p = softmax(logits)
        falling = xp.flip(xp.sort(p, axis=-1), axis=-1)
        likelier = xp.cumulative_sum(falling, axis=-1) - falling  # the probability of all tokens before this one
        least = xp.min(xp.where(likelier < top_p, falling, 1), axis=-1, keepdims=True)  # [..., 1]
        logits = xp.where(p < least, -xp.inf, logits)
    # each token owns a stretch of the line from 0 to 1, as long as its probability: where does a random point fall?
    ends = xp.cumulative_sum(softmax(logits), axis=-1, dtype=xp.float64)  # 50,257 float32 additions would drift
    point = xp.asarray(rng.random((*logits.shape[:-1], 1))) * ends[..., -1:]  # [..., 1]
    return xp.argmax(ends > point, axis=-1)


def check_options(n_tokens_to_generate, temperature=0, top_k=0, top_p=1):
    """Raises ValueError for a value that generate cannot take."""
    for name, value in {"n_tokens_to_generate": n_tokens_to_generate, "top_k": top_k}.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be a whole number, 0 or more, not {value!r}")
    if not isinstance(temperature, numbers.Real) or not (temperature == 0 or 1e-6 <= temperature <= 1e6):
        raise ValueError(f"temperature must be 0, or a number from 1e-6 to 1e6, not {temperature!r}")
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be a number above 0 and at most 1, not {top_p!r}")


def check_room(n_prompt, n_tokens_to_generate, n_ctx):
    """Raises ValueError unless the context has room for the prompt and for what is to follow."""
    if n_prompt + n_tokens_to_generate > n_ctx:
        raise ValueError(
            f"the prompt's {n_prompt} tokens and the {n_tokens_to_generate} to generate are more than the model's "
            f"context of {n_ctx} tokens holds (sliding_window goes on beyond it)"
        )


def read_prompts(prompts, params, n_head, kv_cache):  # n_rows prompts -> [n_rows, n_vocab], [n_rows]
    """Runs prompts, which may differ in length, through the model into one kv_cache, in which they end together.

    Returns the logits after each prompt, and n_pad for the steps to come (None where they are of one length).
    """
    xp, longest, logits = namespace(kv_cache[0]), max(map(len, prompts)), []
    for row, prompt in enumerate(prompts):
        if row and prompt == prompts[row - 1]:  # samples of one prompt share its pass
            for cache in kv_cache:
                cache[:, row, :, :longest] = cache[:, row - 1, :, :longest]
            logits.append(logits[-1])
        else:
            own = [cache[:, row, :, longest - len(prompt) :] for cache in kv_cache]
            logits.append(gpt2(prompt, **params, n_head=n_head, kv_cache=own, only_last=True)[-1])
    n_pad = [longest - len(prompt) for prompt in prompts]
    return xp.stack(logits), xp.asarray(n_pad) if any(n_pad) else None


def lookup(ids, seen, n_match):
    """Guesses what follows ids: the N_DRAFT ids behind the last place where their newest N_MATCH stood before.

    seen: {N_MATCH ids: the index behind their last occurrence}. Returns [] unless the newest n_match ids agree there.
    (Prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding)
    """
    i = seen.get(tuple(ids[-N_MATCH:]))
    if i is None or ids[max(i - n_match, 0) : i] != ids[-n_match:]:
        return []
    return (ids[i : i + N_DRAFT] * N_DRAFT)[:N_DRAFT]  # where fewer followed: those, over and over


def confirm(logits, draft=()):  # [n_draft+1, n_vocab], [n_draft] -> [at most n_draft+1]
    """The greedy ids of a pass over a token and its draft, for as long as the draft came true.

    They end before two logits so close that rounding decides: a pass over one token adds in another order.
    """
    xp, ids = namespace(logits), []
    margin = 4e-6 * xp.max(xp.abs(logits), axis=-1, keepdims=True)  # rounding errors of up to 2.4e-6 were seen
    n_best = xp.count_nonzero(logits >= xp.max(logits, axis=-1, keepdims=True) - margin, axis=-1)  # [n_draft+1]
    for next_id, n, drafted in zip(xp.argmax(logits, axis=-1).tolist(), n_best.tolist(), [*draft, None], strict=True):
        if n != 1:
            break
        ids.append(next_id)
        if next_id != drafted:
            break
    return ids


def is_batch(inputs):
    """Whether inputs are several prompts, not the ids of one."""
    return len(inputs) > 0 and (isinstance(inputs[0], list | tuple) or getattr(inputs[0], "ndim", 0) > 0)


def generate_ids(
    inputs,
    params,
    n_head,
    n_tokens_to_generate,
    temperature=0,
    top_k=0,
    top_p=1,
    seed=None,
    stop=None,
    sliding_window=False,
):
    """Yields the ids that continue a prompt, one at a time.

    inputs: the ids of a prompt, or a batch: a list of several, of any lengths. A batch yields lists with an id for each
        prompt, and None for those that have stopped. Equal prompts in a row are read once.
    temperature, top_k, top_p: see sample; temperature 0 is greedy.
    seed: of the draws; the prompt at place i of a batch draws with seed + i, or with seed[i] of a list.
    stop: called with the ids generated so far for a prompt; a true result ends it.
    sliding_window: where the context is full, go on with the newest half of it as the prompt (and read all prompts of a
        batch again).

    The prompt goes through the model once; from then on every step feeds one token and finds the keys and values of the
    earlier ones in a cache. That is written in place, as NumPy's and CuPy's arrays can be, but not JAX's. Where a lone
    prompt's greedy text repeats itself, one step checks N_DRAFT tokens that are likely to come; the ids are the same.
    Raises ValueError, before any work, for options out of range, an empty prompt, or one that leaves too little room.
    """
    from numpy.random import default_rng  # for the draws of sample alone

    check_options(n_tokens_to_generate, temperature, top_k, top_p)
    prompts = inputs if is_batch(inputs) else [inputs]
    windows = [[int(i) for i in prompt] for prompt in prompts]  # what the model sees of each
    outputs, running = [[] for _ in windows], [True for _ in windows]
    longest, n_ctx = max(map(len, windows)), len(params["wpe"])
    if not all(windows):
        raise ValueError("a prompt has no tokens: begin with <|endoftext|> to generate from nothing")
    if not sliding_window:
        check_room(longest, n_tokens_to_generate, n_ctx)
    seeds = seed if isinstance(seed, list) else [seed if seed is None else seed + i for i in range(len(windows))]
    rngs = [default_rng(seed) for seed in seeds]
    looks_up = len(windows) == 1 and temperature == 0

    # allocated once, for as many positions as will be filled: [2, n_rows, n_head, n_positions, n_embd/n_head] a block
    wte, n_positions = params["wte"], min(longest + n_tokens_to_generate, n_ctx)
    shape = (2, len(windows), n_head, n_positions, wte.shape[-1] // n_head)
    kv_cache = [namespace(wte).zeros(shape, dtype=wte.dtype) for _ in params["blocks"]]

    def decode_loop():
        n_past, n_pad, n_match, first_drafted = n_ctx, None, N_MATCH, n_ctx  # as if full: step one reads the prompts
        ready = []  # what has been decided but not yielded: lists with an id for each row

        def step(ids, n_past):  # [n_rows, n_new] -> [n_rows, n_new, n_vocab]
            return gpt2(ids, **params, n_head=n_head, kv_cache=kv_cache, n_past=n_past, n_pad=n_pad)

        def pick(logits):  # [n_rows, n_vocab] -> [n_rows]
            return [int(sample(row, rng, temperature, top_k, top_p)) for row, rng in zip(logits, rngs, strict=True)]

        for n_left in range(n_tokens_to_generate, 0, -1):  # auto-regressive
            # read the prompts: at the start, and when a window is full
            if not ready and n_past == n_ctx:
                windows[:] = [ids if len(ids) <= n_ctx else ids[-max(n_ctx // 2, 1) :] for ids in windows]
                logits, n_pad = read_prompts(windows, params, n_head, kv_cache)  # [n_rows, n_vocab], [n_rows]
                n_past, first_drafted, ready = max(map(len, windows)), n_ctx, [pick(logits)]
                seen = {tuple(windows[0][i - N_MATCH : i]): i for i in range(N_MATCH, len(windows[0]))}

            # check a guess at the next tokens, all in one pass
            room = min(n_left, n_ctx - n_past) - 1
            if not ready and looks_up and room > 3:  # fewer would not pay
                draft = lookup(windows[0], seen, n_match)[:room]
                if draft:
                    ready = [[next_id] for next_id in confirm(step([windows[0][-1:] + draft], n_past)[0], draft)]
                    first_drafted = min(first_drafted, n_past)
                    n_past += len(ready)  # what was written behind that is written anew
                    n_match = N_MATCH if len(ready) > len(draft) // 2 else 2 * n_match

            # or feed the newest token alone
            if not ready:
                logits = step([window[-1:] for window in windows], n_past)[:, -1]  # [n_rows, n_vocab]
                if first_drafted < n_past and not confirm(logits):
                    # too close to call from what drafts wrote into the cache: write it anew, one token at a time
                    for i in range(first_drafted, n_past + 1):
                        logits = step([windows[0][i : i + 1]], i)[:, -1]
                    first_drafted = n_ctx
                ready = [pick(logits)]
                n_past += 1

            seen[tuple(windows[0][-N_MATCH:])] = len(windows[0])
            for window, output, runs, next_id in zip(windows, outputs, running, ready.pop(0), strict=True):
                window.append(next_id)
                if runs:
                    output.append(next_id)
            yield [output[-1] if runs else None for output, runs in zip(outputs, running, strict=True)]
            running[:] = [runs and not (stop and stop(output)) for output, runs in zip(outputs, running, strict=True)]
            if not any(running):
                return

    return decode_loop() if is_batch(inputs) else (next_id for (next_id,) in decode_loop())


def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """The ids that continue a prompt: greedy unless told otherwise, n_tokens_to_generate of them unless stopped.

    Returns a list, or for a batch of prompts a list of lists. The options and errors are those of generate_ids.
    """
    steps = generate_ids(inputs, params, n_head, n_tokens_to_generate, **options)
    if sys.stderr.isatty():
        from tqdm import tqdm  # only here: its import takes as long as a token or two

        steps = tqdm(steps, "generating", total=n_tokens_to_generate)
    steps = list(steps)
    if not is_batch(inputs):
        return steps
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(inputs))]


if __name__ == "__main__":
    import os
    import signal

    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: during the imports of cli, too

    from cli import run

    run()
