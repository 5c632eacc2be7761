"""backward.py: its gradients are those of finite differences, and of JAX."""

import ast
import functools
import math

import numpy as np
import pytest
from conftest import HPARAMS, REPO, optional, wild_params

import backward
import gpt2
from utils import load_encoder_hparams_and_params

jax = optional("jax")

RNG = np.random.default_rng(0)
SMALL = {"n_vocab": 11, "n_ctx": 7, "n_embd": 6, "n_head": 3, "n_layer": 2}
ODD = {"n_vocab": 301, "n_ctx": 150, "n_embd": 21, "n_head": 7, "n_layer": 3}  # three blocks of queries, the last short


def mapped(function, tree):
    """A tree of dicts and lists, with function of each of its arrays; what is no array stays as it is."""
    if isinstance(tree, dict):
        return {name: mapped(function, node) for name, node in tree.items()}
    if isinstance(tree, list):
        return [mapped(function, node) for node in tree]
    return function(tree) if isinstance(tree, np.ndarray) else tree


def leaves(tree, path=""):
    """{path: array} of a tree of dicts and lists."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {under: x for name, node in pairs for under, x in leaves(node, f"{path}/{name}").items()}


def in_float64(params):
    return mapped(np.float64, params)


def small_params():
    return in_float64(wild_params(SMALL))


def shuffled_layer_norms(params):
    """Params whose layer norms scale and shift, unlike those of a new model."""

    def changed(path, x):
        return x + np.float32(0.3) * RNG.standard_normal(x.shape, np.float32) if path[-1] in "gb" else x

    return functools.reduce(lambda tree, leaf: replaced(tree, leaf[0], changed(*leaf)), leaves(params).items(), params)


def replaced(tree, path, x):
    """The tree with x in the place of the array at a path."""
    _, name, *rest = path.split("/")
    node = tree[int(name) if isinstance(tree, list) else name]
    x = replaced(node, "/".join(["", *rest]), x) if rest else x
    return [x if i == int(name) else old for i, old in enumerate(tree)] if isinstance(tree, list) else tree | {name: x}


def assert_close(found, expected, tolerance):
    """Equal, within a part of the norm of each of the arrays."""
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for path, gradient in found.items():
        right = expected[path]
        assert gradient.shape == right.shape, path
        assert np.linalg.norm(gradient - right) <= tolerance * np.linalg.norm(right), path


def finite_differences(loss, arguments, names):
    """The gradient of loss(**arguments) by each of its numbers, those named, in turn."""

    def gradient(path, x):
        slopes = np.empty_like(x)
        for i in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[i] = 1e-5
            more, less = (loss(**replaced(arguments, path, x + sign * step)) for sign in (1, -1))
            slopes[i] = (more - less) / 2e-5
        return slopes

    wanted = {name: arguments[name] for name in names}
    return functools.reduce(lambda tree, leaf: replaced(tree, leaf[0], gradient(*leaf)), leaves(wanted).items(), wanted)


def normal(*shape):
    return RNG.standard_normal(shape)


def layer(n_in, n_out):
    return {"w": normal(n_in, n_out), "b": normal(n_out)}


def block():
    block = shuffled_layer_norms(small_params()["blocks"][0])
    return {name: block[name] for name in ("mlp", "attn", "ln_1", "ln_2")}


MASK = np.where(np.arange(5) > np.arange(3)[:, None] + 1, -math.inf, 0)
ALONE = {  # functions whose backward takes their own arguments
    "gelu": {"x": 3 * normal(2, 5, 4)},
    "layer_norm": {"x": normal(2, 5, 4), "g": normal(4), "b": normal(4)},
    "linear": {"x": normal(2, 5, 4), "w": normal(4, 3), "b": normal(3)},
    "attention": {"q": normal(2, 3, 4), "k": normal(2, 5, 4), "v": normal(2, 5, 6), "mask": MASK},
}
PAIRS = {  # functions that have a forward, which keeps
    "ffn": {"x": normal(2, 5, 4), "c_fc": layer(4, 16), "c_proj": layer(16, 4)},
    "mha": {"x": normal(2, 5, 6), "c_attn": layer(6, 18), "c_proj": layer(6, 6), "n_head": 3},
    "transformer_block": {"x": normal(2, 5, 6), **block(), "n_head": 3},
}


@pytest.mark.parametrize("name", ALONE)
def test_a_gradient_is_that_of_finite_differences(name):
    function, arguments = getattr(gpt2, name), ALONE[name]
    d = normal(*function(**arguments).shape)
    gradients = getattr(backward, f"{name}_backward")(d, **arguments)
    assert gradients.keys() == arguments.keys() - {"mask"}
    expected = finite_differences(lambda **arguments: (d * function(**arguments)).sum(), arguments, gradients)
    assert_close(gradients, expected, 1e-8)


@pytest.mark.parametrize("name", PAIRS)
def test_a_gradient_from_what_was_kept_is_that_of_finite_differences(name):
    function, arguments = getattr(gpt2, name), PAIRS[name]
    out, kept = getattr(backward, f"{name}_forward")(**arguments)
    np.testing.assert_array_equal(out, function(**arguments))
    d = normal(*out.shape)
    others = {key: value for key, value in arguments.items() if key != "x"}
    gradients = getattr(backward, f"{name}_backward")(d, kept, **others)
    assert gradients.keys() == arguments.keys() - {"n_head"}
    expected = finite_differences(lambda **arguments: (d * function(**arguments)).sum(), arguments, gradients)
    assert_close(gradients, expected, 1e-8)


def test_the_gradient_of_a_softmax_is_that_of_finite_differences():
    x, d = normal(2, 3, 5), normal(2, 3, 5)
    expected = finite_differences(lambda x: (d * gpt2.softmax(x)).sum(), {"x": x}, ["x"])
    assert_close(backward.softmax_backward(d, gpt2.softmax(x)), expected, 1e-8)


def test_the_gradient_of_causal_attention_is_that_of_finite_differences_in_blocks_of_queries(monkeypatch):
    for module in (gpt2, backward):
        monkeypatch.setattr(module, "query_block", lambda q: 2)
    arguments, slots = {name: normal(2, 5, 3) for name in "qkv"}, np.arange(5)
    d = normal(2, 5, 3)
    expected = finite_differences(
        lambda **arguments: (d * gpt2.causal_attention(**arguments, slots=slots)).sum(), arguments, "qkv"
    )
    assert_close(backward.causal_attention_backward(d, **arguments), expected, 1e-8)


def test_the_gradient_of_layer_norms_that_differ_from_row_to_row_is_theirs_alone():
    x, d, g, b = normal(2, 5, 4), normal(2, 5, 4), normal(2, 1, 4), normal(2, 1, 4)
    found = backward.layer_norm_backward(d, x, g, b)
    rows = [backward.layer_norm_backward(d[i], x[i], g[i], b[i]) for i in range(2)]
    for name in "xgb":
        np.testing.assert_allclose(found[name], np.stack([row[name] for row in rows]))


def test_the_loss_and_its_gradient_are_those_of_finite_differences():
    logits, targets, shares = 3 * normal(2, 3, 7), RNG.integers(7, size=(2, 3)), RNG.random((2, 3))

    def loss(logits):
        p = gpt2.softmax(logits)
        return sum(shares[i] * -math.log(p[i][targets[i]]) for i in np.ndindex(2, 3))

    found, gradient = backward.cross_entropy(logits.copy(), targets, shares)
    assert found == pytest.approx(loss(logits))
    assert_close({"logits": gradient}, finite_differences(loss, {"logits": logits}, ["logits"]), 1e-8)


def test_the_loss_of_an_impossible_token_is_finite():
    loss, gradient = backward.cross_entropy(np.float32([[1e4, 0, -1e4]]), np.array([2]), np.float32([1]))
    assert loss == 2e4
    np.testing.assert_array_equal(gradient, [[1, 0, -1]])


def test_the_loss_is_the_mean_of_minus_log_probabilities_and_its_gradient_that_of_finite_differences():
    params, inputs = shuffled_layer_norms(small_params()), [3, 1, 4, 1, 5]

    def loss(**params):
        p = gpt2.softmax(gpt2.gpt2(inputs[:-1], **params, n_head=3))
        return np.mean([-math.log(p[i, inputs[i + 1]]) for i in range(4)])

    found, gradients = backward.lm_loss_and_gradients(params, inputs, 3)
    assert found == pytest.approx(loss(**params))
    assert_close(gradients, finite_differences(loss, params, params), 1e-7)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_forward_pass_is_that_of_gpt2(batch):
    params, inputs = wild_params(ODD), RNG.integers(ODD["n_vocab"], size=(*batch, 133))
    logits, _ = backward.gpt2_forward(inputs, **params, n_head=7)
    np.testing.assert_array_equal(logits, gpt2.gpt2(inputs, **params, n_head=7))


def gradients_of_jax(params, inputs, n_head, shares):
    def loss(params):
        logits = gpt2.gpt2(inputs[..., :-1], **params, n_head=n_head)
        nats = -jax.nn.log_softmax(logits)
        nats = jax.numpy.take_along_axis(nats, inputs[..., 1:, None], axis=-1)[..., 0]
        return (nats * shares).sum()

    found, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return float(found), mapped(np.asarray, jax.tree.map(np.asarray, gradients))


def ragged(n_rows, n_seq, dtype):
    """Shares of the tokens of rows of other lengths, behind which is padding."""
    lengths = np.linspace(n_seq, 1, n_rows).astype(int)
    counted = (np.arange(n_seq) < lengths[:, None]).astype(dtype)
    return counted / counted.sum()


@pytest.mark.parametrize("rows", [(), (2,), "ragged"])
def test_gradients_are_those_of_jax(rows):
    params, n_head = shuffled_layer_norms(wild_params(ODD)), ODD["n_head"]
    inputs = RNG.integers(ODD["n_vocab"], size=(*((3,) if rows == "ragged" else rows), 134))
    with jax.enable_x64(True):
        for dtype, tolerance in [(np.float32, 1e-4), (np.float64, 1e-10)]:
            cast = mapped(dtype, params)
            shares = (
                np.full((*rows, 133), 1 / inputs[..., 1:].size, dtype) if rows != "ragged" else ragged(3, 133, dtype)
            )
            right, expected = gradients_of_jax(cast, inputs, n_head, shares)
            loss, gradients = backward.lm_loss_and_gradients(cast, inputs, n_head, shares)
            assert loss == pytest.approx(right, rel=tolerance)
            assert {x.dtype for x in leaves(gradients).values()} == {np.dtype(dtype)}
            assert_close(gradients, expected, tolerance)


def test_gradients_of_the_bundled_model_are_those_of_jax():
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", REPO / "models")
    text = (REPO / "tests" / "data" / "tinyshakespeare_heldout.txt").read_text("utf-8")
    inputs = np.array(encoder.encode(text[:4000])[: 2 * 257]).reshape(2, 257)
    with jax.enable_x64(True):
        for dtype, tolerance in [(np.float32, 1e-4), (np.float64, 1e-10)]:
            cast = mapped(dtype, params)
            shares = np.full((2, 256), 1 / 512, dtype)
            right, expected = gradients_of_jax(cast, inputs, hparams["n_head"], shares)
            loss, gradients = backward.lm_loss_and_gradients(cast, inputs, hparams["n_head"])
            assert loss == pytest.approx(right, rel=tolerance)
            assert_close(gradients, expected, tolerance)


def test_what_does_not_learn_gets_no_gradient_and_changes_none_of_the_others():
    params, inputs = wild_params(HPARAMS), RNG.integers(500, size=(2, 20))
    _, expected = backward.lm_loss_and_gradients(params, inputs, 5)
    c_fc = params["blocks"][1]["mlp"]["c_fc"]
    marked = replaced(params, "/blocks/1/mlp", params["blocks"][1]["mlp"] | {"c_fc": c_fc | {"frozen": True}})

    logits, kept = backward.gpt2_forward(inputs[:, :-1], **params, n_head=5)
    _, d = backward.cross_entropy(logits, inputs[:, 1:], np.full((2, 19), 1 / 38, np.float32))
    gradients = backward.gpt2_backward(d, kept, **marked, n_head=5, down_to=1)
    del expected["wte"], expected["wpe"], expected["blocks"][1]["mlp"]["c_fc"]["w"]
    expected["blocks"][0] = {}
    assert_close(gradients, expected, 1e-6)


def test_what_is_padded_has_no_gradient():
    params, inputs = wild_params(HPARAMS), RNG.integers(500, size=(3, 20))
    others, shares = inputs.copy(), ragged(3, 19, np.float32)
    others[:, 1:][shares == 0] = 7
    one, other = (backward.lm_loss_and_gradients(params, rows, 5, shares) for rows in (inputs, others))
    assert one[0] == other[0]
    assert_close(one[1], other[1], 1e-6)


def test_the_gradient_of_a_batch_is_the_mean_of_those_of_its_rows():
    params, inputs = small_params(), RNG.integers(11, size=(2, 6))
    loss, gradients = backward.lm_loss_and_gradients(params, inputs, 3)
    rows = [backward.lm_loss_and_gradients(params, row, 3) for row in inputs]
    assert loss == pytest.approx((rows[0][0] + rows[1][0]) / 2)
    one, other = (leaves(of_row) for _, of_row in rows)
    assert_close(leaves(gradients), {path: (one[path] + other[path]) / 2 for path in one}, 1e-12)


def test_the_weights_are_left_as_they_are():
    params = wild_params(HPARAMS)
    before = mapped(np.copy, params)
    backward.lm_loss_and_gradients(params, RNG.integers(500, size=(2, 20)), 5)
    assert_close(params, before, 0)


def test_the_chain_rule_is_read_in_one_sitting():
    text = (REPO / "backward.py").read_text("utf-8")
    assert len(text.splitlines()) <= 200
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    forward = ["gelu", "softmax", "layer_norm", "linear", "ffn", "attention", "causal_attention", "mha"]
    forward += ["transformer_block", "gpt2"]
    there = [name.removesuffix("_backward") for name in functions if name.endswith("_backward")]
    assert [name for name in there if name in forward] == forward
