"""The model: its layers against the tutorial and PyTorch, the whole against Hugging Face, JAX and itself."""

import functools
import sys
import types

import numpy as np
import pytest
from conftest import HPARAMS, hugging_face, new_cache, optional, taken_for_gpus, wild_params
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gpt2
from backends import arrays
from backends.cache import Cache

jax, jnp, torch = optional("jax"), optional("jax.numpy"), optional("torch")
on_jax = optional("backends.on_jax", needs="jax")  # where it is imported, jit and vmap take a Cache

N_HEAD = HPARAMS["n_head"]
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4)  # for logits, which reach +-8 here
matrices = hnp.arrays(np.float32, (3, 8), elements=st.floats(-30, 30, width=32))
sentences = st.lists(st.integers(0, HPARAMS["n_vocab"] - 1), min_size=2, max_size=HPARAMS["n_ctx"])
few = settings(max_examples=20)


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, HPARAMS["n_vocab"], shape)


@pytest.fixture(scope="module")
def jax_params(params):
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture
def small_query_blocks(monkeypatch):
    """So that a sentence of the tiny model takes several blocks, the last of them not full."""
    monkeypatch.setattr(arrays, "QUERY_BLOCK", 12)


# Layers: the values printed in the tutorial


def test_gelu_prints_what_the_tutorial_shows():
    np.testing.assert_allclose(
        gpt2.gelu(np.array([[1, 2], [-2, 0.5]])), [[0.84119, 1.9546], [-0.0454, 0.34571]], atol=5e-6
    )


def test_softmax_prints_what_the_tutorial_shows():
    x = gpt2.softmax(np.array([[2, 100], [-5, 0]]))
    np.testing.assert_allclose(x, [[0.0, 1.0], [0.00669, 0.99331]], atol=5e-6)
    np.testing.assert_allclose(x.sum(axis=-1), [1, 1])


def test_layer_norm_prints_what_the_tutorial_shows():
    x = np.array([[2, 2, 3], [-5, 0, 1]])
    x = gpt2.layer_norm(x, g=np.ones(3), b=np.zeros(3))
    np.testing.assert_allclose(x, [[-0.70709, -0.70709, 1.41418], [-1.397, 0.508, 0.889]], atol=6e-4)
    np.testing.assert_allclose(x.var(axis=-1), [0.99996, 1.0], atol=5e-6)
    np.testing.assert_allclose(x.mean(axis=-1), [0, 0], atol=1e-9)


def test_linear_projects_the_last_axis():
    x, w, b = np.random.normal(size=(64, 784)), np.random.normal(size=(784, 10)), np.random.normal(size=10)
    np.testing.assert_allclose(gpt2.linear(x, w, b), x @ w + b)


# Layers: PyTorch


@given(matrices)
def test_gelu_is_pytorchs_tanh_approximation(x):
    expected = torch.nn.functional.gelu(torch.tensor(x), approximate="tanh")
    np.testing.assert_allclose(gpt2.gelu(x), expected, rtol=1e-5, atol=1e-6)


@given(matrices)
def test_softmax_is_pytorchs(x):
    np.testing.assert_allclose(gpt2.softmax(x), torch.softmax(torch.tensor(x), -1), rtol=1e-5, atol=1e-7)


@given(matrices, matrices)
def test_layer_norm_is_pytorchs(x, gb):
    g, b = gb[0], gb[1]
    expected = torch.nn.functional.layer_norm(torch.tensor(x), (8,), torch.tensor(g), torch.tensor(b), eps=1e-5)
    np.testing.assert_allclose(gpt2.layer_norm(x, g, b), expected, rtol=1e-3, atol=1e-3)


@given(matrices, matrices, matrices)
def test_attention_is_pytorchs(q, k, v):
    mask = (1 - np.tri(3, dtype=np.float32)) * -1e10
    tensors = (torch.tensor(x)[None] for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)[0]
    np.testing.assert_allclose(gpt2.attention(q, k, v, mask), expected, rtol=1e-3, atol=1e-3)


def test_ffn_is_two_linear_layers_of_pytorch_around_a_gelu(params):
    x, mlp = np.random.default_rng(0).standard_normal((7, 80), np.float32), params["blocks"][0]["mlp"]
    layers = {name: (torch.tensor(layer["w"]).T, torch.tensor(layer["b"])) for name, layer in mlp.items()}
    a = torch.nn.functional.linear(torch.tensor(x), *layers["c_fc"])
    expected = torch.nn.functional.linear(torch.nn.functional.gelu(a, approximate="tanh"), *layers["c_proj"])
    np.testing.assert_allclose(gpt2.ffn(x, **mlp), expected, rtol=1e-4, atol=1e-4)


# The whole model against Hugging Face


@pytest.mark.parametrize("n_seq", [1, 2, 33, 64])
def test_logits_of_every_position_are_hugging_faces(n_seq, params):
    ids = random_ids(n_seq)
    with torch.no_grad():
        expected = hugging_face(HPARAMS, params)(torch.tensor(ids)[None]).logits[0]
    close(gpt2.gpt2(ids, **params, n_head=N_HEAD), expected)


def test_logits_of_a_prompt_longer_than_a_block_of_queries_are_hugging_faces():
    hparams = HPARAMS | {"n_ctx": 600}
    params, ids = wild_params(hparams), random_ids(600)
    assert len(ids) > 8 * arrays.QUERY_BLOCK  # which is a block on a GPU
    with torch.no_grad():
        expected = hugging_face(hparams, params)(torch.tensor(ids)[None]).logits[0]
    close(gpt2.gpt2(ids, **params, n_head=N_HEAD), expected)
    with taken_for_gpus():
        close(gpt2.gpt2(ids, **jax.tree.map(jnp.asarray, params), n_head=N_HEAD), expected)


def test_greedy_ids_are_hugging_faces(params):
    model, prompts = hugging_face(HPARAMS, params), random_ids(5, 10)
    options = {"attention_mask": torch.ones(5, 10), "max_new_tokens": 54, "do_sample": False}
    expected = model.generate(torch.tensor(prompts), **options)[:, 10:].tolist()
    assert [gpt2.generate(prompt.tolist(), params, N_HEAD, 54) for prompt in prompts] == expected
    assert len(np.unique(expected)) > 40  # a model that repeats itself would prove little


# Properties


@few
@given(sentences, st.data())
def test_a_later_token_changes_no_earlier_logits(params, ids, data):
    i = data.draw(st.integers(1, len(ids) - 1))
    changed = [*ids[:i], (ids[i] + 1) % HPARAMS["n_vocab"], *ids[i + 1 :]]
    before, after = (gpt2.gpt2(x, **params, n_head=N_HEAD) for x in (ids, changed))
    close(before[:i], after[:i])
    assert not np.allclose(before[i:], after[i:], atol=2e-3)


@few
@given(sentences, st.data())
def test_logits_with_the_cache_are_those_without_however_the_tokens_are_dealt_out(params, ids, data):
    full = gpt2.gpt2(ids, **params, n_head=N_HEAD)
    cache, n_past = new_cache(params, N_HEAD, len(ids)), 0
    while n_past < len(ids):
        n = data.draw(st.integers(1, len(ids) - n_past))
        part = gpt2.gpt2(ids[n_past : n_past + n], **params, n_head=N_HEAD, kv_cache=cache, n_past=n_past)
        close(part, full[n_past : n_past + n])
        n_past += n


@pytest.mark.usefixtures("small_query_blocks")
@pytest.mark.parametrize("n_past", [0, 5, 12])
def test_blocks_of_queries_change_nothing(n_past, params):
    ids = random_ids(64)
    with torch.no_grad():
        expected = hugging_face(HPARAMS, params)(torch.tensor(ids)[None]).logits[0]
    cache = new_cache(params, N_HEAD, 64)
    if n_past:
        gpt2.gpt2(ids[:n_past], **params, n_head=N_HEAD, kv_cache=cache)
    close(gpt2.gpt2(ids[n_past:], **params, n_head=N_HEAD, kv_cache=cache, n_past=n_past), expected[n_past:])


def test_a_batch_is_its_sentences_one_by_one(params):
    ids = random_ids(2, 3, 20)
    logits = gpt2.gpt2(ids, **params, n_head=N_HEAD)
    assert logits.shape == (2, 3, 20, HPARAMS["n_vocab"])
    for i in np.ndindex(2, 3):
        close(logits[i], gpt2.gpt2(ids[i], **params, n_head=N_HEAD))


@pytest.mark.parametrize("n_last", [1, 3, 20])
@pytest.mark.parametrize("rows", [(), (2, 3)])
def test_n_last_gives_the_last_rows_of_logits(n_last, rows, params):
    ids = random_ids(*rows, 20)
    last = gpt2.gpt2(ids, **params, n_head=N_HEAD, n_last=n_last)
    assert last.shape == (*rows, n_last, HPARAMS["n_vocab"])
    close(last, gpt2.gpt2(ids, **params, n_head=N_HEAD)[..., -n_last:, :])


def test_n_last_holds_without_any_block(params):
    logits = gpt2.gpt2([1, 2, 3], **{**params, "blocks": []}, n_head=N_HEAD)
    close(gpt2.gpt2([1, 2, 3], **{**params, "blocks": []}, n_head=N_HEAD, n_last=1), logits[-1:])


def test_n_last_holds_for_blocks_that_are_one_and_the_same(params):
    shared = {**params, "blocks": params["blocks"][:1] * 3}
    logits = gpt2.gpt2(random_ids(20), **shared, n_head=N_HEAD)
    close(gpt2.gpt2(random_ids(20), **shared, n_head=N_HEAD, n_last=1), logits[-1:])


def test_n_last_fills_the_cache_for_every_position(params):
    ids, caches = random_ids(20), [new_cache(params, N_HEAD, 20, fill=np.nan) for _ in range(2)]
    for cache, n_last in zip(caches, (None, 1), strict=True):
        gpt2.gpt2(ids, **params, n_head=N_HEAD, kv_cache=cache, n_last=n_last)
    for whole, last in zip(*caches, strict=True):
        for name in ("k", "v"):
            np.testing.assert_allclose(getattr(last, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


# The cache: a key in slot j is hidden from a query in slot s if and only if j > s


def ragged(params, prompts, n_slots, xp=np):
    """A cache that holds prompts of different lengths, a row each, and their lengths, [n_rows]."""
    cache = new_cache(params, N_HEAD, n_slots, rows=(len(prompts),))
    for row, prompt in enumerate(prompts):
        view = [Cache(block.k[row], block.v[row]) for block in cache]
        gpt2.gpt2(prompt, **params, n_head=N_HEAD, kv_cache=view)
    return [Cache(xp.asarray(block.k), xp.asarray(block.v)) for block in cache], xp.asarray(
        [len(prompt) for prompt in prompts]
    )


PROMPTS = [random_ids(n, seed=n).tolist() for n in (5, 9, 1)]


def assert_rows_are_alone(logits, params, new):
    for row, prompt in enumerate(PROMPTS):
        alone = gpt2.gpt2([*prompt, *new[row]], **params, n_head=N_HEAD)
        close(logits[row], alone[-len(new[row]) :])


@pytest.mark.parametrize("n_new", [1, 4])
@pytest.mark.parametrize("n_slots", [13, 30])
def test_rows_of_different_lengths_are_as_if_each_were_alone(n_new, n_slots, params):
    cache, n_past = ragged(params, PROMPTS, n_slots)
    new = random_ids(3, n_new)
    logits = gpt2.gpt2(new, **params, n_head=N_HEAD, kv_cache=cache, n_past=n_past)
    assert_rows_are_alone(logits, params, new)


def test_a_cache_with_room_to_spare_gives_the_same_logits(params):
    ids, cache = random_ids(20), new_cache(params, N_HEAD, 50, fill=1e3)  # what is in free slots must not be seen
    part = [gpt2.gpt2(ids[:12], **params, n_head=N_HEAD, kv_cache=cache)]
    part += [gpt2.gpt2(ids[i : i + 1], **params, n_head=N_HEAD, kv_cache=cache, n_past=i) for i in range(12, 20)]
    close(np.concatenate(part), gpt2.gpt2(ids, **params, n_head=N_HEAD))


def test_what_was_written_too_far_is_written_over(params):
    ids, cache = random_ids(20), new_cache(params, N_HEAD, 40)
    gpt2.gpt2([*ids[:10], *random_ids(30, seed=1)], **params, n_head=N_HEAD, kv_cache=cache)  # right but for ten
    close(
        gpt2.gpt2(ids[10:], **params, n_head=N_HEAD, kv_cache=cache, n_past=10),
        gpt2.gpt2(ids, **params, n_head=N_HEAD)[10:],
    )


def test_float16_weights_give_no_nan_in_a_ragged_batch(params):
    half = jax.tree.map(lambda x: x.astype(np.float16), params)
    cache, n_past = ragged(half, PROMPTS, 13)
    logits = gpt2.gpt2([[1], [2], [3]], **half, n_head=N_HEAD, kv_cache=cache, n_past=n_past)
    assert logits.dtype == np.float16
    np.testing.assert_allclose(
        logits[0, 0], gpt2.gpt2([*PROMPTS[0], 1], **params, n_head=N_HEAD)[-1], atol=0.2
    )  # float16 has 11 bits, and these logits reach 8


def test_generate_with_the_cache_is_the_plain_loop_without(params):
    prompt, ids = random_ids(5).tolist(), random_ids(5).tolist()
    for _ in range(20):
        ids.append(int(gpt2.gpt2(ids, **params, n_head=N_HEAD)[-1].argmax()))
    assert gpt2.generate(prompt, params, N_HEAD, 20) == ids[5:]


def test_generate_returns_plain_integers_and_leaves_the_callers_list_alone(params):
    prompt = [1, 2, 3]
    ids = gpt2.generate(prompt, params, N_HEAD, 4)
    assert [type(i) for i in ids] == [int] * 4
    assert prompt == [1, 2, 3]
    assert gpt2.generate(prompt, params, N_HEAD, 0) == []


def test_generate_ids_yields_them_one_by_one(params):
    ids = gpt2.generate_ids([1, 2, 3], params, N_HEAD, 6)
    assert [next(ids), *ids] == gpt2.generate([1, 2, 3], params, N_HEAD, 6)


def test_nothing_is_computed_in_float64(params):
    class Float32(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
            plain = [np.asarray(x) if isinstance(x, Float32) else x for x in inputs]
            if out is not None:
                kwargs["out"] = tuple(np.asarray(x) for x in out)
            result = getattr(ufunc, method)(*plain, **kwargs)
            assert result.dtype != np.float64, f"{ufunc.__name__} gives float64"
            return result.view(Float32)

    with pytest.raises(AssertionError, match="multiply gives float64"):
        np.ones(3, np.float32).view(Float32) * np.ones(3)
    wrapped = jax.tree.map(lambda x: x.view(Float32), params)
    logits = gpt2.gpt2(random_ids(64), **wrapped, n_head=N_HEAD)
    assert isinstance(logits, Float32)
    assert logits.dtype == np.float32
    cache = [
        Cache(*(x.view(Float32) for x in (block.k, block.v))) for block in new_cache(params, N_HEAD, 10, rows=(2,))
    ]
    gpt2.gpt2([[1, 2, 3], [4, 5, 6]], **wrapped, n_head=N_HEAD, kv_cache=cache)
    logits = gpt2.gpt2([[1], [2]], **wrapped, n_head=N_HEAD, kv_cache=cache, n_past=np.array([3, 2]))
    assert logits.dtype == np.float32


# Errors


def test_more_tokens_than_the_context_is_an_error(params):
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        gpt2.gpt2(random_ids(65), **params, n_head=N_HEAD)


@pytest.mark.parametrize("n_past", [8, np.array([1, 8])])
def test_more_tokens_than_the_cache_holds_is_an_error(n_past, params):
    cache = new_cache(params, N_HEAD, 10, rows=(2,))
    with pytest.raises(ValueError, match="11 tokens do not fit the context of 10"):
        gpt2.gpt2(random_ids(2, 3), **params, n_head=N_HEAD, kv_cache=cache, n_past=n_past)


@pytest.mark.parametrize("n_past", [-1, np.array([3, -2])])
def test_a_negative_n_past_is_an_error(n_past, params):
    cache = new_cache(params, N_HEAD, 10, rows=(2,))
    with pytest.raises(ValueError, match="n_past must be 0 or more, not -"):
        gpt2.gpt2(random_ids(2, 3), **params, n_head=N_HEAD, kv_cache=cache, n_past=n_past)


def test_no_ids_are_an_error(params):
    with pytest.raises(ValueError, match="no token ids"):
        gpt2.gpt2([], **params, n_head=N_HEAD)


def test_a_cache_of_too_few_slots_is_an_error_while_jax_traces_too(jax_params):
    jitted = jax.jit(lambda ids, cache: gpt2.gpt2(ids, **jax_params, n_head=N_HEAD, kv_cache=cache))
    with pytest.raises(ValueError, match="11 tokens do not fit the context of 10"):
        jitted(random_ids(11), new_cache(jax_params, N_HEAD, 10, xp=jnp))


@pytest.mark.parametrize("ids", [[1, -1], [500], [[3, 2], [1, 10**6]], np.array([-500])])
def test_ids_that_are_not_in_the_vocabulary_are_an_error(ids, params, jax_params):
    for weights in (params, jax_params):
        with pytest.raises(ValueError, match=f"token ids must be from 0 to 499, not ({np.min(ids)}|{np.max(ids)})$"):
            gpt2.gpt2(ids, **weights, n_head=N_HEAD)


def test_generate_fills_the_context_exactly_and_no_further(params):
    assert len(gpt2.generate(list(range(10)), params, N_HEAD, 54)) == 54
    with pytest.raises(ValueError, match=r"10 \+ 55 tokens, .* 64"):
        gpt2.generate(list(range(10)), params, N_HEAD, 55)


def test_generating_from_no_token_at_all_is_an_error(params):
    with pytest.raises(ValueError, match=r"no tokens.*<\|endoftext\|>"):
        gpt2.generate([], params, N_HEAD, 5)


# Other array libraries


def test_an_array_that_does_not_name_its_library_belongs_to_the_one_that_defines_it(monkeypatch):
    cupy = types.ModuleType("cupy")
    cupy.ndarray = type("ndarray", (), {"__module__": "cupy"})  # as CuPy 14 has it
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert arrays.namespace(cupy.ndarray()) is cupy
    assert arrays.namespace(np.zeros(1)) is np


def test_jit_gives_numpys_logits(params, jax_params):
    ids = random_ids(40)
    jitted = jax.jit(gpt2.gpt2, static_argnames="n_head")
    close(jitted(ids, **jax_params, n_head=N_HEAD), gpt2.gpt2(ids, **params, n_head=N_HEAD))


@pytest.mark.usefixtures("small_query_blocks")
def test_jit_gives_numpys_logits_in_blocks_of_queries(params, jax_params):
    ids = random_ids(40)
    jitted = jax.jit(lambda ids, params: gpt2.gpt2(ids, **params, n_head=N_HEAD))
    close(jitted(ids, jax_params), gpt2.gpt2(ids, **params, n_head=N_HEAD))


def test_vmap_batches_as_the_tutorial_says(params, jax_params):
    ids = random_ids(4, 20)
    p = jax_params
    batched = jax.vmap(gpt2.gpt2, in_axes=[0, None, None, None, None, None])
    logits = batched(ids, p["wte"], p["wpe"], p["blocks"], p["ln_f"], N_HEAD)
    close(logits, gpt2.gpt2(ids, **params, n_head=N_HEAD))


def jitted_steps(params, shapes=None):
    """gpt2() as a loop on a GPU calls it: one shape for every step, a cache that is given away and comes back.

    shapes: filled with the shapes of ids that are compiled.
    """

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(ids, cache, n_past):
        if shapes is not None:
            shapes.append(ids.shape)
        return gpt2.gpt2(ids, **params, n_head=N_HEAD, kv_cache=cache, n_past=n_past), cache

    return step


def test_jit_with_a_cache_of_fixed_size_gives_numpys_logits_and_compiles_one_step(params, jax_params):
    ids, cache, shapes = random_ids(40), new_cache(jax_params, N_HEAD, 64, xp=jnp), []
    step = jitted_steps(jax_params, shapes)
    expected = gpt2.gpt2(ids, **params, n_head=N_HEAD)
    padded = np.concatenate([ids[:30], np.zeros(2, int)])  # to a round length: no query sees what lies behind it
    logits, cache = step(padded, cache, 0)
    close(logits[:30], expected[:30])
    for i in range(30, 40):
        logits, cache = step(ids[i : i + 1], cache, i)
        close(logits, expected[i : i + 1])
    assert shapes == [(32,), (1,)]


def test_jit_takes_rows_of_different_lengths(params, jax_params):
    cache, n_past = ragged(params, PROMPTS, 64, xp=jnp)
    new = random_ids(3, 2)
    logits, _ = jitted_steps(jax_params)(new, cache, n_past)
    assert_rows_are_alone(logits, params, new)


def test_vmap_takes_rows_of_different_lengths(params, jax_params):
    cache, n_past = ragged(params, PROMPTS, 64, xp=jnp)
    new = random_ids(3, 2)
    step = jax.vmap(lambda ids, cache, n: gpt2.gpt2(ids, **jax_params, n_head=N_HEAD, kv_cache=cache, n_past=n))
    assert_rows_are_alone(jax.jit(step)(new, cache, n_past), params, new)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_under_jax_is_near_and_its_logits_are_not_rounded_to_it(dtype, params, jax_params):
    half = jax.tree.map(lambda x: x.astype(dtype), jax_params)
    logits = jax.jit(lambda ids: gpt2.gpt2(ids, **half, n_head=N_HEAD))(random_ids(40))
    assert logits.dtype == np.float32
    assert (logits != logits.astype(dtype)).mean() > 0.9
    expected = gpt2.gpt2(random_ids(40), **params, n_head=N_HEAD)
    error = np.abs(logits - expected)
    assert error.max() < np.abs(expected).max() / 8  # bfloat16 has 8 bits


@pytest.fixture
def float64_under_jax():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("float64_under_jax")
def test_float64_under_jax_stays_float64(params):
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    logits = jax.jit(lambda ids: gpt2.gpt2(ids, **exact, n_head=N_HEAD))(random_ids(40))
    assert logits.dtype == jnp.float64
    close(logits, gpt2.gpt2(random_ids(40), **params, n_head=N_HEAD))


def test_gradients_of_the_loss_are_pytorchs(params, jax_params):
    ids = random_ids(30)

    def lm_loss(params):
        log_probabilities = jax.nn.log_softmax(gpt2.gpt2(ids[:-1], **params, n_head=N_HEAD))
        return -log_probabilities[jnp.arange(29), ids[1:]].mean()

    model = hugging_face(HPARAMS, params)
    model(torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss.backward()
    gradients = jax.jit(jax.grad(lm_loss))(jax_params)
    named = dict(model.transformer.named_parameters())
    for ours, theirs in (
        (gradients["wte"], "wte.weight"),
        (gradients["wpe"], "wpe.weight"),
        (gradients["blocks"][0]["attn"]["c_attn"]["w"], "h.0.attn.c_attn.weight"),
        (gradients["blocks"][2]["mlp"]["c_proj"]["b"], "h.2.mlp.c_proj.bias"),
        (gradients["ln_f"]["g"], "ln_f.weight"),
    ):
        expected = named[theirs].grad.numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max(), err_msg=theirs)
