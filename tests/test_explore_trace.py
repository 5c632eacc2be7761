"""The tracer: gpt2() gives the same logits with and without it, and every value is the one that a line made."""

import itertools
import pathlib
import sys

import numpy as np
import pytest
from conftest import HPARAMS, prompts_of_lengths

import gpt2
from backends import arrays
from explorer import source, trace

N_HEAD = HPARAMS["n_head"]
(IDS,) = prompts_of_lengths(12)


@pytest.fixture(scope="module")
def run(params):
    return trace.record(IDS, **params, n_head=N_HEAD)


def naive(params):
    """The residual stream after each block, and each block's attention weights [n_head, n_seq, n_seq]."""
    x = params["wte"][IDS] + params["wpe"][: len(IDS)]
    streams, all_weights = [x], []
    for block in params["blocks"]:
        qkv = gpt2.linear(gpt2.layer_norm(x, **block["ln_1"]), **block["attn"]["c_attn"])
        qkv = [np.split(part, N_HEAD, axis=-1) for part in np.split(qkv, 3, axis=-1)]
        weights, heads = [], []
        for q, k, v in zip(*qkv, strict=True):
            scores = q @ k.T / np.sqrt(q.shape[-1]) + (1 - np.tri(len(IDS))) * -1e10
            weights.append(np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True))
            heads.append(weights[-1] @ v)
        x = x + gpt2.linear(np.hstack(heads), **block["attn"]["c_proj"])
        x = x + gpt2.ffn(gpt2.layer_norm(x, **block["ln_2"]), **block["mlp"])
        streams.append(x)
        all_weights.append(np.array(weights))
    return streams, all_weights


@pytest.mark.parametrize("n", [1, 2, 12, 64])
def test_logits_are_equal_bit_for_bit_with_and_without_the_tracer(params, n):
    (ids,) = prompts_of_lengths(n, seed=n)
    assert np.array_equal(trace.record(ids, **params, n_head=N_HEAD).logits, gpt2.gpt2(ids, **params, n_head=N_HEAD))


def test_the_attention_of_a_head_is_one_line(run, params):
    _, weights = naive(params)
    for i in range(HPARAMS["n_layer"]):
        np.testing.assert_allclose(run[f"block {i}", "attention", "weights"], weights[i], atol=1e-4)


def test_the_residual_stream_after_each_block_is_that_of_the_naive_model(run, params):
    streams, _ = naive(params)
    values = [value.array for value in run.root.values if value.name == "x"]  # embeddings, a block each, the last norm
    assert len(values) == HPARAMS["n_layer"] + 2
    for x, stream in zip(values, streams, strict=False):
        np.testing.assert_allclose(x, stream, atol=2e-3)


def test_a_value_is_as_it_was_when_its_line_ended_though_later_lines_write_in_place(run, params):
    call = run.call("block 0", "linear c_attn")
    product, with_bias = (value.array for value in call.values if value.name == "x" and not value.is_argument)
    b = params["blocks"][0]["attn"]["c_attn"]["b"]
    assert np.array_equal(product + b, with_bias)
    assert not np.array_equal(product, with_bias)


def test_what_a_call_returns_is_what_its_caller_assigns(run):
    assert np.array_equal(run["block 1", "mha", "return"], run["block 1", "a"])
    assert np.array_equal(run["return"], run.logits)


def test_the_weights_of_a_long_text_are_put_together_from_their_parts(params, monkeypatch):
    monkeypatch.setattr(arrays, "QUERY_BLOCK", 5)
    run = trace.record(IDS, **params, n_head=N_HEAD)
    _, weights = naive(params)
    np.testing.assert_allclose(trace.attention_weights(run, 1), weights[1], atol=1e-4)


def test_paths_name_the_block_and_what_tells_two_calls_of_a_function_apart(run):
    labels = [" › ".join(call.path) for call in run.root.walk()]
    assert len(labels) == len({*labels})
    for path in ["block 2 › layer_norm ln_1", "block 2 › mha › linear c_attn", "block 2 › ffn › linear c_proj"]:
        assert f"gpt2 › {path}" in labels
    assert "gpt2 › layer_norm" in labels


def test_a_name_that_fits_several_calls_is_an_error_that_names_them(run):
    with pytest.raises(KeyError, match=r"block 0.*block 1"):
        run["attention", "weights"]
    with pytest.raises(KeyError, match="nowhere"):
        run["block 1", "attention", "nonsense"]
    with pytest.raises(KeyError, match="fits 0 calls"):
        run.call("block 7")


def test_only_what_is_asked_for_is_kept_but_every_shape_is_known(params, run):
    sparse = trace.record(IDS, lambda path, name: name == "weights", **params, n_head=N_HEAD)
    pairs = [zip(a.values, b.values, strict=True) for a, b in zip(run.root.walk(), sparse.root.walk(), strict=True)]
    for full, kept in itertools.chain(*pairs):
        assert full.shape == kept.shape
        assert (kept.array is not None) == (kept.name == "weights")
    with pytest.raises(KeyError, match="not kept"):
        sparse["block 0", "attention", "scores"]


def test_the_tracer_that_was_there_before_is_put_back_after_an_error_too(params):
    def tracer(*_):
        return None

    before = sys.gettrace()
    try:
        sys.settrace(tracer)
        trace.record(IDS, **params, n_head=N_HEAD)
        after_a_run = sys.gettrace()
        with pytest.raises(ValueError, match=r"500|vocabulary"):
            trace.record([HPARAMS["n_vocab"]], **params, n_head=N_HEAD)
        after_an_error = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after_a_run is after_an_error is tracer


def test_a_run_leaves_the_weights_as_they_are(params):
    before = {name: params[name].copy() for name in ("wte", "wpe")}
    trace.record(IDS, **params, n_head=N_HEAD)
    assert all(np.array_equal(params[name], before[name]) for name in before)


def test_a_head_switched_off_adds_nothing_to_its_block(params):
    block, head, n = 1, 2, HPARAMS["n_embd"] // N_HEAD
    off = trace.without_head(params, N_HEAD, block, head)
    run = trace.record(IDS, **off, n_head=N_HEAD)
    heads = run[f"block {block}", "causal_attention", "return"].copy()
    heads[head] = 0
    c_proj = params["blocks"][block]["attn"]["c_proj"]
    expected = np.concatenate([*heads], axis=-1) @ c_proj["w"] + c_proj["b"]
    np.testing.assert_allclose(run[f"block {block}", "mha", "return"], expected, atol=1e-4)
    assert np.array_equal(
        run["block 0", "mha", "return"], trace.record(IDS, **params, n_head=N_HEAD)["block 0", "mha", "return"]
    )
    assert params["blocks"][block]["attn"]["c_proj"]["w"][head * n : (head + 1) * n].any()  # the arrays given stay


def test_a_neuron_switched_off_takes_its_row_from_the_output(params):
    block, neuron = 2, 17
    run = trace.record(IDS, **trace.without_neuron(params, block, neuron), n_head=N_HEAD)
    plain = trace.record(IDS, **params, n_head=N_HEAD)
    row = params["blocks"][block]["mlp"]["c_proj"]["w"][neuron]
    missing = plain[f"block {block}", "ffn", "a"][:, neuron, None] * row
    difference = plain[f"block {block}", "ffn", "return"] - run[f"block {block}", "ffn", "return"]
    np.testing.assert_allclose(difference, missing, atol=1e-3)


@pytest.mark.parametrize("head", [-1, N_HEAD, "0", None, True])
def test_a_head_that_is_not_there_is_an_error(params, head):
    with pytest.raises(ValueError, match="head must be a whole number from 0 to 4"):
        trace.without_head(params, N_HEAD, 0, head)


def test_the_rest_of_the_model_from_any_block_gives_the_same_logits(params, run):
    streams = [value.array for value in run.root.values if value.name == "x"]
    for first in range(HPARAMS["n_layer"] + 1):
        np.testing.assert_allclose(trace.forward_from(streams[first], params, N_HEAD, first), run.logits, atol=1e-3)


def test_comments_name_the_axes_and_are_believed_only_where_they_fit():
    sizes = {"n_seq": 12, "n_head": 5, "n_embd": 80, "n_vocab": 500}
    assert source.axes_in("2 of [n_head, n_k, d], [n_q]") == [["n_head", "n_k", "d"], ["n_head", "n_k", "d"], ["n_q"]]
    assert source.named((12, 3, 5, 16), ["n_seq", "3", "n_head", "n_embd/n_head"], sizes)[-1] == "n_embd/n_head"
    assert source.named((12, 240), ["n_seq", "n_embd"], sizes) == ["n_seq", "3*n_embd"]
    assert source.named((5, 12, 12), ["n_q", "n_k"], sizes) == ["n_head", "n_q", "n_k"]


def test_every_line_of_the_source_is_shown_as_it_is():
    text = pathlib.Path(gpt2.__file__).read_text("utf-8")
    assert ["".join(part for _, part in line) for line in source.highlighted(text)] == text.splitlines()
