"""The gradient of each function of gpt2.py, in its order: the chain rule, written out in NumPy.

The gradient of an array says for each of its numbers by how much the loss grows if that number does; it has the array's
shape. f_backward(d, ...) takes the gradient d of what f returned, and what f was called with, and returns the gradients
of that under the arguments' names. What f computed on the way is computed again where that is cheap; where it is not, in
matrix products, an f_forward returns it beside f's own result: (result, kept), for f_backward(d, kept, ...).

The shapes at the end of a line leave out leading batch axes, which all functions take, too.
"""

import math

import numpy as np

from backends.arrays import query_block
from gpt2 import causal_attention, gelu, layer_norm, linear, matmul, softmax


def gelu_backward(d, x):
    """gelu(x) = x * h, where h = (1 + tanh(u)) / 2, u = c * x + s * x, c = sqrt(2 / pi), s = 0.044715 * c * x**2.

    As tanh' = 1 - tanh**2, which is 4 * h * (1 - h), gelu' = h + x * h' = h * (1 + 2 * (1 - h) * x * u').
    """
    c = math.sqrt(2 / math.pi)
    s = x * x
    s *= 0.044715 * c  # in place, as in lines below: large temporaries cost time
    h = s + c
    h *= x  # u
    np.tanh(h, out=h)
    h += 1
    h *= 0.5
    s *= 3
    s += c  # u' = c + 3 * s
    s *= x
    s *= 2 - 2 * h
    s += 1
    s *= h
    s *= d
    return {"x": s}


def softmax_backward(d, p):
    """p = softmax(x): dp_i / dx_j = p_i * ((i == j) - p_j), so x_j gets p_j * (d_j - sum over i of d_i * p_i)."""
    return {"x": p * (d - (d * p).sum(axis=-1, keepdims=True))}


def layer_norm_backward(d, x, g, b, eps: float = 1e-5):
    """layer_norm(x) = g * z + b, where z = (x - mean) / std.

    To shift or to stretch x changes nothing in z, so what d * g has in the direction of 1 and of z is taken out.
    """
    x = x - x.mean(axis=-1, keepdims=True)
    std = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    z, d_z = x / std, d * g
    d_x = d_z - d_z.mean(axis=-1, keepdims=True) - z * (d_z * z).mean(axis=-1, keepdims=True)
    return {"x": d_x / std, "g": summed(d * z, g), "b": summed(d, b)}


def summed(d, x):
    """The gradient of x, which was broadcast to the shape of d: the sum of those of its copies."""
    n_new = d.ndim - x.ndim
    return d.sum(axis=(*range(n_new), *(n_new + i for i, n in enumerate(x.shape) if n == 1))).reshape(x.shape)


def linear_backward(d, x, w, b):  # [m, out], [m, in], [in, out], [out]
    """y[m, out] = sum over in of x[m, in] * w[in, out] + b[out]: each gradient sums over what it has no axis for."""
    rows, d_rows = x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1])  # all rows of a batch use the same w and b
    return {"x": matmul(d, w.T), "w": rows.T @ d_rows, "b": d_rows.sum(axis=0)}  # [m, in], [in, out], [out]


def ffn_forward(x, c_fc, c_proj):  # [n_seq, n_embd] -> [n_seq, n_embd]
    h = linear(x, **c_fc)  # [n_seq, n_embd] -> [n_seq, 4*n_embd]
    a = gelu(h)  # [n_seq, 4*n_embd]
    return linear(a, **c_proj), (x, h, a)  # [n_seq, 4*n_embd] -> [n_seq, n_embd]


def ffn_backward(d, kept, c_fc, c_proj):
    """The same steps, last first; each hands on the gradient of its x, and keeps those of its weights."""
    x, h, a = kept
    c_proj = linear_backward(d, a, **c_proj)  # [n_seq, n_embd] -> [n_seq, 4*n_embd]
    d = gelu_backward(c_proj.pop("x"), h)["x"]  # [n_seq, 4*n_embd]
    c_fc = linear_backward(d, x, **c_fc)  # [n_seq, 4*n_embd] -> [n_seq, n_embd]
    return {"x": c_fc.pop("x"), "c_fc": c_fc, "c_proj": c_proj}


def attention_backward(d, q, k, v, mask):  # [n_q, d_v], [n_q, d_k], [n_k, d_k], [n_k, d_v], [n_q, n_k]
    """attention(q, k, v) = softmax(scores) @ v, scores = q @ k.T / sqrt(d_k): two products and a softmax between."""
    q = q / math.sqrt(q.shape[-1])
    weights = softmax(q @ k.mT + mask)  # [n_q, n_k]
    d_scores = softmax_backward(d @ v.mT, weights)["x"]  # [n_q, n_k]
    return {"q": d_scores @ k / math.sqrt(q.shape[-1]), "k": d_scores.mT @ q, "v": weights.mT @ d}


def causal_attention_backward(d, q, k, v):  # 4 of [n_head, n_seq, n_embd/n_head]
    """A key and its value are seen by the queries of several blocks: their gradients are summed."""
    slots, n_seq, n_block = np.arange(q.shape[-2]), q.shape[-2], query_block(q)
    gradients = {"q": np.empty_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
    for start in range(0, n_seq, n_block):
        stop = min(start + n_block, n_seq)
        mask = np.where(slots[:stop] > slots[start:stop, None], q.dtype.type(-math.inf), 0)  # [stop-start, stop]
        inputs = q[..., start:stop, :], k[..., :stop, :], v[..., :stop, :], mask
        of_block = attention_backward(d[..., start:stop, :], *inputs)
        gradients["q"][..., start:stop, :] = of_block["q"]
        gradients["k"][..., :stop, :] += of_block["k"]
        gradients["v"][..., :stop, :] += of_block["v"]
    return gradients


def heads(qkv, n_head):  # [n_seq, 3*n_embd] -> 3 of [n_head, n_seq, n_embd/n_head]
    qkv = qkv.reshape(*qkv.shape[:-1], 3, n_head, -1)  # [n_seq, 3, n_head, n_embd/n_head]
    return [qkv[..., i, :, :].swapaxes(-3, -2) for i in range(3)]


def mha_forward(x, c_attn, c_proj, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    qkv = linear(x, **c_attn)  # [n_seq, n_embd] -> [n_seq, 3*n_embd]
    a = causal_attention(*heads(qkv, n_head), np.arange(x.shape[-2]))  # -> [n_head, n_seq, n_embd/n_head]
    a = a.swapaxes(-3, -2).reshape(x.shape)  # [n_head, n_seq, n_embd/n_head] -> [n_seq, n_embd]
    return linear(a, **c_proj), (x, qkv, a)  # [n_seq, n_embd] -> [n_seq, n_embd]


def mha_backward(d, kept, c_attn, c_proj, n_head):
    x, qkv, a = kept
    c_proj = linear_backward(d, a, **c_proj)  # [n_seq, n_embd] -> [n_seq, n_embd]
    d = c_proj.pop("x").reshape(*x.shape[:-1], n_head, -1).swapaxes(-3, -2)  # -> [n_head, n_seq, n_embd/n_head]
    gradients = causal_attention_backward(d, *heads(qkv, n_head))  # 3 of [n_head, n_seq, n_embd/n_head]
    d = np.stack([gradients[name].swapaxes(-3, -2) for name in "qkv"], axis=-3)  # [n_seq, 3, n_head, n_embd/n_head]
    c_attn = linear_backward(d.reshape(qkv.shape), x, **c_attn)  # [n_seq, 3*n_embd] -> [n_seq, n_embd]
    return {"x": c_attn.pop("x"), "c_attn": c_attn, "c_proj": c_proj}


def transformer_block_forward(x, mlp, attn, ln_1, ln_2, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    a, kept_by_mha = mha_forward(layer_norm(x, **ln_1), **attn, n_head=n_head)
    y = x + a
    f, kept_by_ffn = ffn_forward(layer_norm(y, **ln_2), **mlp)
    return y + f, (x, kept_by_mha, y, kept_by_ffn)


def transformer_block_backward(d, kept, mlp, attn, ln_1, ln_2, n_head):
    """Of a residual connection y = x + f(x), x gets the gradient of y as it is, and what f hands on."""
    x, kept_by_mha, y, kept_by_ffn = kept
    mlp = ffn_backward(d, kept_by_ffn, **mlp)
    ln_2 = layer_norm_backward(mlp.pop("x"), y, **ln_2)
    d = d + ln_2.pop("x")
    attn = mha_backward(d, kept_by_mha, **attn, n_head=n_head)
    ln_1 = layer_norm_backward(attn.pop("x"), x, **ln_1)
    return {"x": d + ln_1.pop("x"), "mlp": mlp, "attn": attn, "ln_1": ln_1, "ln_2": ln_2}


def hidden_states_forward(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] -> [n_seq, n_embd]
    """gpt2() up to its projection to the vocabulary, which a classifier does without."""
    x, kept = wte[inputs] + wpe[: inputs.shape[-1]], []
    for block in blocks:
        x, kept_by_block = transformer_block_forward(x, **block, n_head=n_head)
        kept.append(kept_by_block)
    return layer_norm(x, **ln_f), (inputs, kept, x)


def hidden_states_backward(d, kept, wte, wpe, blocks, ln_f, n_head, d_wte=None):
    """Every use of a row of wte or wpe adds to its gradient. d_wte: that of other uses of wte, which is added to.

    What is kept is used up: each block's is let go when its gradient is there.
    """
    inputs, kept, x = kept
    ln_f = layer_norm_backward(d, x, **ln_f)
    d, gradients = ln_f.pop("x"), []
    for block in reversed(blocks):
        gradients.insert(0, transformer_block_backward(d, kept.pop(), **block, n_head=n_head))
        d = gradients[0].pop("x")
    d_wte, d_wpe = np.zeros(wte.shape, wte.dtype) if d_wte is None else d_wte, np.zeros(wpe.shape, wpe.dtype)
    np.add.at(d_wte, inputs, d)
    d_wpe[: d.shape[-2]] = d.reshape(-1, *d.shape[-2:]).sum(axis=0)
    return {"wte": d_wte, "wpe": d_wpe, "blocks": gradients, "ln_f": ln_f}


def gpt2_forward(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] -> [n_seq, n_vocab]
    """The logits, as gpt2() has them."""
    x, kept = hidden_states_forward(inputs, wte, wpe, blocks, ln_f, n_head)
    return matmul(x, wte.T), (x, kept)  # [n_seq, n_embd] -> [n_seq, n_vocab]


def gpt2_backward(d, kept, wte, wpe, blocks, ln_f, n_head):
    """wte is used twice, to embed and to project: its gradient is the sum of both."""
    x, kept = kept
    d_wte = d.reshape(-1, d.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # [n_vocab, n_embd]
    d = matmul(d, wte)  # [n_seq, n_vocab] -> [n_seq, n_embd]
    return hidden_states_backward(d, kept, wte, wpe, blocks, ln_f, n_head, d_wte)


def cross_entropy(logits, targets, shares):  # [n_seq, n_vocab], [n_seq], [n_seq] -> a number, [n_seq, n_vocab]
    """(the loss, its gradient): each target's -log(softmax(logits)[target]), times its share; 1/n makes that the mean.

    -log(softmax(x)[target]) = log(sum(exp(x))) - x[target]: its gradient is softmax(x), less 1 at the target. Logits are
    many: their gradient takes their place.
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
    """(the loss, its gradient by params, a dict like it): how badly each token is predicted by those before it.

    shares: what each token but the first counts, such as 0 for padding; by default all do, and the loss is their mean.
    """
    inputs = np.asarray(inputs)
    inputs, targets = inputs[..., :-1], inputs[..., 1:]  # [n_seq], [n_seq]
    shares = np.full(targets.shape, 1 / targets.size, params["wte"].dtype) if shares is None else shares
    logits, kept = gpt2_forward(inputs, **params, n_head=n_head)  # [n_seq] -> [n_seq, n_vocab]
    loss, d = cross_entropy(logits, targets, shares)
    return loss, gpt2_backward(d, kept, **params, n_head=n_head)
