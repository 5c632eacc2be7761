"""The gradient of each function of gpt2.py, in its order: the chain rule, written out in NumPy.

The gradient of an array says how much the loss grows with each of its numbers, and has its shape. f_backward(d, ...)
takes the gradient d of what f returned, and f's arguments; it returns {"x": the gradient of x, ...}, by their names.
pop("x") hands one on to the step before; the rest stay, such as d_c_fc, a dict like c_fc. f_forward returns what f does
and kept, which f_backward takes in the place of x. The shapes at the end of a line leave out leading batch axes.

All follows from four rules. What is multiplied gets d times the other factor; what is broadcast, or used twice, a sum;
what is moved, d moved back; a row that is looked up, what comes to it. Whether f_backward is right, a small e tells:
(d * (f(x + e) - f(x - e))).sum() is 2 * (d_x * e).sum().
"""

import math

import numpy as np

from backends.arrays import matmul, query_block
from gpt2 import causal_attention, gelu, layer_norm, linear, softmax


def gelu_backward(d, x):
    """gelu(x) = x * h, where h = (1 + tanh(u)) / 2, u = (c + s) * x, c = sqrt(2 / pi), s = 0.044715 * c * x**2.

    tanh' = 1 - tanh**2 = 4 * h * (1 - h), so h' = 2 * h * (1 - h) * u', where u' = c + 3 * s, and gelu' = h + x * h'.
    """
    c = math.sqrt(2 / math.pi)
    s = 0.044715 * c * x * x
    h = 0.5 + 0.5 * np.tanh((c + s) * x)
    s *= 3  # from here on s becomes d * gelu', in place: large temporaries cost time
    s += c  # u'
    s *= x * (2 - 2 * h)
    s += 1  # gelu' / h = 1 + 2 * (1 - h) * x * u'
    s *= d * h
    return {"x": s}


def softmax_backward(d, p):
    """Takes p = softmax(x). dp_i/dx_j = p_i * ((i == j) - p_j): x_j gets p_j * (d_j - the sum over i of d_i * p_i)."""
    return {"x": p * (d - (d * p).sum(axis=-1, keepdims=True))}


def layer_norm_backward(d, x, g, b, eps: float = 1e-5):
    """g * z + b, z = (x - mean) / std: dstd/dx_j = z_j / n, so dz_i/dx_j = ((i == j) - (1 + z_i * z_j) / n) / std."""
    x = x - x.mean(axis=-1, keepdims=True)
    std = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    z, d_z = x / std, d * g
    d_x = d_z - d_z.mean(axis=-1, keepdims=True) - z * (d_z * z).mean(axis=-1, keepdims=True)
    rows = -2 if g.ndim > 1 else tuple(range(d.ndim - 1))  # all have one g; or each text its own, [n_rows, 1, n]
    return {"x": d_x / std, "g": (d * z).sum(axis=rows).reshape(g.shape), "b": d.sum(axis=rows).reshape(b.shape)}


def linear_backward(d, x, w, b, frozen=False):  # [m, out], [m, in], [in, out], [out]
    """y = x @ w + b: d times what each is multiplied by (b: 1), summed over the axis that it lacks. frozen: no "w"."""
    d_x = matmul(d, w.T)  # [m, in]
    x, d = x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1])  # all rows of a batch have the same w and b
    gradients = {"x": d_x, "b": d.sum(axis=0)}  # [m, in], [out]
    return gradients if frozen else gradients | {"w": x.T @ d}  # [in, out]


def ffn_forward(x, c_fc, c_proj):  # [n_seq, n_embd] -> [n_seq, n_embd]
    h = linear(x, **c_fc)  # [n_seq, n_embd] -> [n_seq, 4*n_embd]
    a = gelu(h)  # [n_seq, 4*n_embd]
    return linear(a, **c_proj), (x, h, a)  # [n_seq, 4*n_embd] -> [n_seq, n_embd]


def ffn_backward(d, kept, c_fc, c_proj):
    """The same steps, last first. Each hands the gradient of its x on to the one before; those of its weights stay."""
    x, h, a = kept
    d_c_proj = linear_backward(d, a, **c_proj)  # [n_seq, n_embd] -> [n_seq, 4*n_embd]
    d_h = gelu_backward(d_c_proj.pop("x"), h)["x"]  # [n_seq, 4*n_embd]
    d_c_fc = linear_backward(d_h, x, **c_fc)  # [n_seq, 4*n_embd] -> [n_seq, n_embd]
    return {"x": d_c_fc.pop("x"), "c_fc": d_c_fc, "c_proj": d_c_proj}


def attention_backward(d, q, k, v, mask):  # [n_q, d_v], [n_q, d_k], [n_k, d_k], [n_k, d_v], [n_q, n_k]
    """Of weights @ v, weights get d @ v.T, and v gets weights.T @ d; so for scores = q @ k.T. Hidden weights are 0."""
    scale = 1 / math.sqrt(q.shape[-1])
    q = scale * q  # scores = q @ k.T + mask
    weights = softmax(q @ k.mT + mask)  # [n_q, n_k]
    d_scores = softmax_backward(d @ v.mT, weights)["x"]  # [n_q, n_k]
    return {"q": scale * (d_scores @ k), "k": d_scores.mT @ q, "v": weights.mT @ d}


def causal_attention_backward(d, q, k, v):  # 4 of [n_head, n_seq, n_embd/n_head]
    """A key and its value are seen by queries of several blocks, and get the sum of what comes from each."""
    slots, block_size = np.arange(q.shape[-2]), query_block(q)
    gradients = {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
    for start in range(0, len(slots), block_size):
        stop = min(start + block_size, len(slots))
        mask = np.where(slots[:stop] > slots[start:stop, None], q.dtype.type(-math.inf), 0)  # [stop-start, stop]
        block, seen = np.s_[..., start:stop, :], np.s_[..., :stop, :]  # the queries; the keys and values they may see
        of_block = attention_backward(d[block], q[block], k[seen], v[seen], mask)
        gradients["q"][block] = of_block["q"]
        gradients["k"][seen] += of_block["k"]
        gradients["v"][seen] += of_block["v"]
    return gradients


def heads(x, n, n_head):  # [n_seq, n*n_embd] -> n of [n_head, n_seq, n_embd/n_head]
    x = x.reshape(*x.shape[:-1], n, n_head, -1)  # [n_seq, n, n_head, n_embd/n_head]
    return [x[..., i, :, :].swapaxes(-3, -2) for i in range(n)]


def mha_forward(x, c_attn, c_proj, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    qkv = linear(x, **c_attn)  # [n_seq, n_embd] -> [n_seq, 3*n_embd]
    a = causal_attention(*heads(qkv, 3, n_head), np.arange(x.shape[-2]))  # -> [n_head, n_seq, n_embd/n_head]
    a = a.swapaxes(-3, -2).reshape(x.shape)  # [n_head, n_seq, n_embd/n_head] -> [n_seq, n_embd]
    return linear(a, **c_proj), (x, qkv, a)  # [n_seq, n_embd] -> [n_seq, n_embd]


def mha_backward(d, kept, c_attn, c_proj, n_head):
    """Heads are split and merged by moving numbers: backwards, a merge is a split, and a split a merge."""
    x, qkv, a = kept
    d_c_proj = linear_backward(d, a, **c_proj)  # [n_seq, n_embd] -> [n_seq, n_embd]
    (d_out,) = heads(d_c_proj.pop("x"), 1, n_head)  # [n_seq, n_embd] -> [n_head, n_seq, n_embd/n_head]
    d_heads = causal_attention_backward(d_out, *heads(qkv, 3, n_head))  # q, k, v: 3 of [n_head, n_seq, n_embd/n_head]
    d_qkv = np.stack([d_heads[name].swapaxes(-3, -2) for name in "qkv"], axis=-3)  # [n_seq, 3, n_head, n_embd/n_head]
    d_c_attn = linear_backward(d_qkv.reshape(qkv.shape), x, **c_attn)  # [n_seq, 3*n_embd] -> [n_seq, n_embd]
    return {"x": d_c_attn.pop("x"), "c_attn": d_c_attn, "c_proj": d_c_proj}


def transformer_block_forward(x, mlp, attn, ln_1, ln_2, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    a, kept_by_mha = mha_forward(layer_norm(x, **ln_1), **attn, n_head=n_head)
    y = x + a
    f, kept_by_ffn = ffn_forward(layer_norm(y, **ln_2), **mlp)
    return y + f, (x, kept_by_mha, y, kept_by_ffn)


def transformer_block_backward(d, kept, mlp, attn, ln_1, ln_2, n_head):
    """Of a residual connection, out = x + f(x), x gets what out gets, and what comes back through f."""
    x, kept_by_mha, y, kept_by_ffn = kept
    d_mlp = ffn_backward(d, kept_by_ffn, **mlp)
    d_ln_2 = layer_norm_backward(d_mlp.pop("x"), y, **ln_2)
    d_y = d + d_ln_2.pop("x")
    d_attn = mha_backward(d_y, kept_by_mha, **attn, n_head=n_head)
    d_ln_1 = layer_norm_backward(d_attn.pop("x"), x, **ln_1)
    return {"x": d_y + d_ln_1.pop("x"), "mlp": d_mlp, "attn": d_attn, "ln_1": d_ln_1, "ln_2": d_ln_2}


def hidden_states_forward(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] -> [n_seq, n_embd]
    """gpt2() up to its projection to the vocabulary, in the place of which a classifier has its own."""
    x, kept_by_blocks = wte[inputs] + wpe[: inputs.shape[-1]], []
    for block in blocks:
        x, kept_by_block = transformer_block_forward(x, **block, n_head=n_head)
        kept_by_blocks.append(kept_by_block)
    return layer_norm(x, **ln_f), (inputs, kept_by_blocks, x)


def hidden_states_backward(d, kept, wte, wpe, blocks, ln_f, n_head, down_to=None, d_wte=None):
    """Uses up what is kept. Blocks before down_to, wte and wpe get none, if it is given. d_wte: of the projection."""
    inputs, kept_by_blocks, x = kept
    d_ln_f = layer_norm_backward(d, x, **ln_f)
    d_x, d_blocks = d_ln_f.pop("x"), [{} for _ in blocks]
    for i in reversed(range(down_to or 0, len(blocks))):
        d_blocks[i] = transformer_block_backward(d_x, kept_by_blocks.pop(), **blocks[i], n_head=n_head)
        d_x = d_blocks[i].pop("x")
    if down_to is not None:
        return {"blocks": d_blocks, "ln_f": d_ln_f}
    d_wte, d_wpe = (np.zeros(wte.shape, wte.dtype) if d_wte is None else d_wte), np.zeros(wpe.shape, wpe.dtype)
    np.add.at(d_wte, inputs, d_x)  # each use of a row adds to its gradient; d_wte[inputs] += d_x would count one
    d_wpe[: d_x.shape[-2]] = d_x.reshape(-1, *d_x.shape[-2:]).sum(axis=0)
    return {"wte": d_wte, "wpe": d_wpe, "blocks": d_blocks, "ln_f": d_ln_f}


def gpt2_forward(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] -> [n_seq, n_vocab]
    x, kept_by_rest = hidden_states_forward(inputs, wte, wpe, blocks, ln_f, n_head)
    return matmul(x, wte.T), (x, kept_by_rest)  # [n_seq, n_embd] -> [n_seq, n_vocab]


def gpt2_backward(d, kept, wte, wpe, blocks, ln_f, n_head, down_to=None):
    """wte embeds, and projects: it gets the sum of both."""
    x, kept_by_rest = kept
    d_wte = None if down_to is not None else d.reshape(-1, len(wte)).T @ x.reshape(-1, x.shape[-1])  # [n_vocab, n_embd]
    d_x = matmul(d, wte)  # [n_seq, n_vocab] -> [n_seq, n_embd]
    return hidden_states_backward(d_x, kept_by_rest, wte, wpe, blocks, ln_f, n_head, down_to, d_wte)


def cross_entropy(logits, targets, shares):  # [n_seq, n_vocab], [n_seq], [n_seq] -> [], [n_seq, n_vocab]
    """(the loss, its gradient): the sum of -log(softmax(logits)[target]), each times its share: 1/n for the mean.

    -log(softmax(x)[t]) = log(sum(exp(x))) - x_t: its gradient is softmax(x), less 1 at t. It overwrites logits.
    """
    targets, shares = targets[..., None], shares[..., None]  # [n_seq, 1]
    logits -= logits.max(axis=-1, keepdims=True)  # the largest becomes 0: exp does not overflow
    of_targets = np.take_along_axis(logits, targets, axis=-1)  # [n_seq, 1]
    np.exp(logits, out=logits)
    total = logits.sum(axis=-1, keepdims=True)  # [n_seq, 1]
    loss = (shares * (np.log(total) - of_targets)).sum()
    logits *= shares / total
    np.put_along_axis(logits, targets, shares * (np.exp(of_targets) / total - 1), axis=-1)
    return loss, logits


def lm_loss_and_gradients(params, inputs, n_head, shares=None):  # [n_seq+1], [n_seq]
    """(the loss, its gradients, a dict like params). shares: what each token counts, which is 1/n by default."""
    inputs, targets = np.asarray(inputs)[..., :-1], np.asarray(inputs)[..., 1:]  # [n_seq], [n_seq]
    shares = np.full(targets.shape, 1 / targets.size, params["wte"].dtype) if shares is None else shares
    logits, kept = gpt2_forward(inputs, **params, n_head=n_head)  # [n_seq] -> [n_seq, n_vocab]
    loss, d = cross_entropy(logits, targets, shares)
    return loss, gpt2_backward(d, kept, **params, n_head=n_head)
