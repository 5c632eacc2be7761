"""Why a token was chosen: its logit, as the sum of what each part of the model gave to it.

The last x is a sum: two embeddings, and what each head and each mlp added. The final layer norm takes off the mean,
divides by the standard deviation and scales; then comes a product with the token's row of wte. With that deviation held
at what it is, all of this is linear: the logit is the sum of what it makes of each addend, and nothing is estimated.
What a part gave by way of later parts counts with those, not with it (direct logit attribution, as in
https://transformer-circuits.pub/2021/framework).
"""

import dataclasses

import numpy as np

from explorer.trace import attention_weights, block_call

EPS = 1e-5  # of layer_norm


@dataclasses.dataclass
class Attribution:
    """Addends of a logit, or of its lead over another."""

    heads: np.ndarray  # [n_layer, n_head, n_seq]: what each head brought from each token
    mlps: np.ndarray  # [n_layer]
    embeddings: np.ndarray  # [2]: of the last token, and of its position
    biases: float  # of attention's c_proj, and of ln_f

    @property
    def total(self):
        return float(self.heads.sum() + self.mlps.sum() + self.embeddings.sum() + self.biases)


def attribute(run, params, token, other=None):
    """The Attribution of a token's logit, as the next of a run's text, less that of another token, or the mean of all.

    run: record(inputs, keep, **params, n_head=...), where keep keeps at least what is_needed names.
    """
    wte, ln_f = params["wte"], params["ln_f"]
    shares = np.full(len(wte), 1 / len(wte), wte.dtype)  # with which a product is the mean, at the speed of BLAS
    ahead = wte[token] - (shares @ wte if other is None else wte[other])  # [n_embd]
    reads = ahead * ln_f["g"] / deviation(run, len(params["blocks"]))
    reads = reads - reads.mean()  # [n_embd]: the mean that x loses may as well be lost here; reads @ x is the lead
    heads, mlps, biases = [], [], ahead @ ln_f["b"]
    for i, block in enumerate(params["blocks"]):
        call, c_proj = block_call(run, i), block["attn"]["c_proj"]
        v = call.within("mha")[0].last("v")  # [n_head, n_seq, n_embd/n_head]
        of_heads = (c_proj["w"] @ reads).reshape(len(v), -1, 1)  # [n_head, n_embd/n_head, 1]
        heads.append(attention_weights(run, i)[:, -1] * (v @ of_heads)[..., 0])  # [n_head, n_seq]
        mlps.append(call.within("ffn")[0].last("return")[-1] @ reads)
        biases += c_proj["b"] @ reads
    rows = wte[run.root.last("inputs")[-1]], params["wpe"][run.root.last("slots")[-1]]
    return Attribution(np.array(heads), np.array(mlps), np.array(rows) @ reads, float(biases))


def deviation(run, n_layer):
    """By what the final layer norm divides the last x."""
    x = [value.array for value in run.root.values if value.name == "x"][n_layer][-1]
    return np.sqrt(x.var(dtype=np.float64) + EPS)


def is_needed(path, name):
    """For record: whether attribute() reads this value."""
    of_root = len(path) == 1 and name in ("inputs", "slots", "x")
    return of_root or name == "weights" or (path[-1], name) in (("mha", "v"), ("ffn", "return"))
