"""generate: its pipeline, seeds, batches, stopping, the sliding window, JAX; against plain loops without a cache."""

import contextlib
import itertools

import numpy as np
import pytest
from conftest import HPARAMS, hugging_face, optional, prompts_of_lengths, taken_for_gpus, wild_params
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2
import sampling
from backends import devices, lookup, with_cache
from backends.arrays import n_weights
from backends.cache import empty_cache
from files import checkpoint

jax, jnp, torch = optional("jax"), optional("jax.numpy"), optional("torch")
on_jax, transformers = optional("backends.on_jax", needs="jax"), optional("transformers")

N_HEAD, N_VOCAB, N_CTX = HPARAMS["n_head"], HPARAMS["n_vocab"], HPARAMS["n_ctx"]
TAME = checkpoint.random_params(HPARAMS)  # soon says the same token over and over


@pytest.fixture
def generate(params):
    return lambda inputs, n, **options: gpt2.generate(inputs, params, N_HEAD, n, **options)


def test_numpys_cache_is_one_piece_of_memory_which_its_parts_share_out(params):
    views = [view for cache in empty_cache(params, N_HEAD, 2, 5) for view in (cache.k, cache.v)]
    assert len({id(view.base) for view in views}) == 1
    assert not any(itertools.starmap(np.shares_memory, itertools.combinations(views, 2)))


# The pipeline: decode, at most n, until stop


class Counting:
    """A Model that says the number of its row's tokens next, up to n_ahead steps at once, and notes what it is fed."""

    def __init__(self, n_ahead):
        self.n_ahead, self.fed = n_ahead, []

    def next_ids(self, rows, n_past, n_steps, sampler):
        self.fed.append((rows, n_past))
        n_seen = [n + len(row) for row, n in zip(rows, n_past, strict=True)]
        return [[n + step for n in n_seen] for step in range(min(n_steps, self.n_ahead))]


def decoding(n_ctx, n_steps, n_ahead=1):
    """(what decode yields, what it feeds) for two prompts and that model."""
    model = Counting(n_ahead)
    return list(gpt2.decode([[5, 6, 7], [8]], model, None, n_ctx, n_steps)), model.fed


def test_decode_feeds_every_row_its_own_prompt_and_then_its_newest_id():
    yielded, fed = decoding(n_ctx=20, n_steps=3)
    assert yielded == [[3, 1], [4, 2], [5, 3]]
    assert fed == [([[5, 6, 7], [8]], [0, 0]), ([[3], [1]], [3, 1]), ([[4], [2]], [4, 2])]


def test_decode_reads_the_newest_half_of_a_row_whose_context_is_full():
    yielded, fed = decoding(n_ctx=4, n_steps=4)
    assert yielded == [[3, 1], [4, 2], [2, 3], [3, 4]]
    assert fed[2:] == [([[3, 4], [2]], [0, 2]), ([[2], [3]], [2, 3])]


def test_decode_takes_several_steps_at_once_as_many_as_fit_the_context_and_are_wanted():
    yielded, fed = decoding(n_ctx=20, n_steps=7, n_ahead=3)
    assert yielded == [[i + 3, i + 1] for i in range(7)]
    assert [n_past for _, n_past in fed] == [[0, 0], [5, 3], [8, 6]]
    yielded, fed = decoding(n_ctx=4, n_steps=4, n_ahead=9)
    assert yielded == [[3, 1], [4, 2], [2, 3], [3, 4]]
    assert fed[1:] == [([[3, 4], [2]], [0, 2])]


def test_until_shows_none_for_rows_that_have_stopped_and_ends_with_the_last():
    steps = iter([[1, 2], [3, 4], [5, 6], [7, 8]])
    assert list(gpt2.until(lambda ids: ids[-1] in (2, 5), steps, 2)) == [[1, 2], [3, None], [5, None]]
    assert next(steps) == [7, 8]  # nothing more was asked for


# Seeds


def test_the_same_seed_gives_the_same_ids_and_another_seed_others(generate):
    draws = [generate([1, 2, 3], 20, temperature=1, seed=seed) for seed in (7, 7, 8)]
    assert draws[0] == draws[1] != draws[2]


def test_without_a_seed_every_run_differs(generate):
    assert generate([1, 2, 3], 20, temperature=1) != generate([1, 2, 3], 20, temperature=1)


def test_place_i_of_a_batch_draws_with_seed_plus_i(generate):
    batch = generate([[1, 2, 3]] * 3, 20, temperature=1, seed=7)
    assert batch == [generate([1, 2, 3], 20, temperature=1, seed=7 + i) for i in range(3)]


def test_seeds_may_be_given_one_by_one(generate):
    batch = generate([[1, 2, 3]] * 2, 20, temperature=1, seed=[5, 5])
    assert batch == [generate([1, 2, 3], 20, temperature=1, seed=5)] * 2


# Batches


@settings(max_examples=10)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**6))
def test_a_ragged_batch_is_its_prompts_one_by_one(params, lengths, seed):
    prompts = prompts_of_lengths(*lengths, seed=seed)
    batch = gpt2.generate(prompts, params, N_HEAD, 15)
    assert batch == [gpt2.generate(prompt, params, N_HEAD, 15) for prompt in prompts]


def test_equal_prompts_are_read_once(generate, monkeypatch):
    passes, forward = [], gpt2.gpt2
    monkeypatch.setattr(
        gpt2, "gpt2", lambda ids, *args, **kwargs: passes.append(np.shape(ids)) or forward(ids, *args, **kwargs)
    )
    generate([[1, 2, 3]] * 4, 3)
    assert passes == [(1, 2), (4, 1), (4, 1), (4, 1)]


def test_prompts_of_like_length_are_read_in_one_pass(generate, monkeypatch):
    passes, forward = [], gpt2.gpt2
    monkeypatch.setattr(
        gpt2, "gpt2", lambda ids, *args, **kwargs: passes.append(np.shape(ids)) or forward(ids, *args, **kwargs)
    )
    generate(prompts_of_lengths(5, 3, 7, 1), 1)
    assert passes == [(3, 6), (4, 1)]


def test_prompts_may_be_arrays_of_any_library(generate):
    for array in (np.array, jnp.array, torch.tensor):
        assert generate(array([1, 2, 3]), 5) == generate([1, 2, 3], 5)
        assert generate(array([[1, 2, 3], [4, 5, 6]]), 5) == generate([[1, 2, 3], [4, 5, 6]], 5)


def test_numpys_numbers_are_numbers(generate):
    assert generate([1, 2, 3], np.int64(5), temperature=np.float32(1), seed=1) == generate(
        [1, 2, 3], 5, temperature=1, seed=1
    )


def test_a_batch_of_one_is_a_batch(generate):
    assert generate([[1, 2, 3]], 5) == [generate([1, 2, 3], 5)]
    assert generate([[1, 2, 3]], 0) == [[]]


# Stopping


def test_stop_ends_a_prompt_at_the_first_token_for_which_it_is_true(generate):
    ids = generate([1, 2, 3], 30)
    assert generate([1, 2, 3], 30, stop=lambda so_far: so_far == ids[:7]) == ids[:7]
    assert generate([1, 2, 3], 30, stop=lambda so_far: False) == ids


def test_prompts_of_a_batch_stop_each_on_its_own(generate):
    prompts = prompts_of_lengths(4, 8, 6)
    ends = {tuple(generate(prompt, 3 + i)) for i, prompt in enumerate(prompts[:2])}
    batch = generate(prompts, 20, stop=lambda so_far: tuple(so_far) in ends)
    assert [len(ids) for ids in batch] == [3, 4, 20]
    assert batch[2] == generate(prompts[2], 20)


def test_a_batch_that_has_stopped_computes_no_more(params):
    steps = gpt2.generate_ids([[1, 2], [3, 4]], params, N_HEAD, 50, stop=lambda so_far: len(so_far) == 2)
    assert len(list(steps)) == 2


# The sliding window


def slid(prompt, n, params):
    """The window's definition, without a cache: past the end, the newest half of the context is the prompt."""
    ids, window = list(prompt), list(prompt)
    for _ in range(n):
        if len(window) > N_CTX:
            window = window[-(N_CTX // 2) :]
        window.append(int(gpt2.gpt2(window, **params, n_head=N_HEAD)[-1].argmax()))
        ids.append(window[-1])
    return ids[len(prompt) :]


@pytest.mark.parametrize("n_prompt", [3, N_CTX - 1, N_CTX, N_CTX + 5, 3 * N_CTX])
def test_past_the_end_the_newest_half_is_the_prompt(n_prompt, params, generate):
    prompt = prompts_of_lengths(n_prompt)[0]
    assert generate(prompt, 110, sliding_window=True) == slid(prompt, 110, params)


def test_a_text_that_repeats_itself_slides_too():
    assert gpt2.generate([5, 6, 7], TAME, N_HEAD, 200, sliding_window=True) == slid([5, 6, 7], 200, TAME)


def test_rows_of_a_batch_slide_each_at_its_own_time(params, generate):
    prompts = prompts_of_lengths(10, 50, 30)
    assert generate(prompts, 90, sliding_window=True) == [slid(prompt, 90, params) for prompt in prompts]


def test_within_the_context_the_window_changes_nothing(generate):
    assert generate([1, 2, 3], N_CTX - 3, sliding_window=True) == generate([1, 2, 3], N_CTX - 3)


def test_without_it_the_error_names_it(generate):
    with pytest.raises(ValueError, match="sliding_window"):
        generate([1, 2, 3], N_CTX)


# JAX's arrays


@pytest.fixture(scope="module")
def jax_params(params):
    return jax.tree.map(jnp.asarray, params)


OPTIONS = {
    "a prompt": {},
    "draws": {"temperature": 1, "seed": 3},
    "draws from the best": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
    "stop": {"stop": lambda ids: len(ids) == 7},
    "sliding window": {"sliding_window": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n_prompts", [None, 3])
def test_jax_gives_numpys_ids(options, n_prompts, params, jax_params):
    prompts = prompts_of_lengths(5, 40, 5)
    inputs = prompts if n_prompts else prompts[1]
    n = 60 if "sliding_window" in options else 20
    expected = gpt2.generate(inputs, params, N_HEAD, n, **options)
    assert gpt2.generate(inputs, jax_params, N_HEAD, n, **options) == expected


@pytest.fixture
def device():
    with taken_for_gpus():
        yield


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n_prompts", [None, 3])
def test_a_device_gives_numpys_ids(options, n_prompts, params, jax_params, device):
    test_jax_gives_numpys_ids(options, n_prompts, params, jax_params)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 20, "seed": 3}, {"top_p": 0.9, "seed": 3}], ids=str)
def test_a_device_draws_as_numpy_does_where_rows_slide_between_its_steps(options, params, jax_params, device):
    prompts, options = prompts_of_lengths(5, 40, 5), {"temperature": 0.8, "sliding_window": True, **options}
    expected = gpt2.generate(prompts, params, N_HEAD, 90, **options)
    assert gpt2.generate(prompts, jax_params, N_HEAD, 90, **options) == expected


def calls_ahead(monkeypatch):
    """[], which fills with (function, arguments, options) of each call of several steps."""
    calls, compiled_ahead = [], on_jax.compiled_ahead

    def noting(*args):
        run = compiled_ahead(*args)
        return lambda *inputs, **options: calls.append((run, inputs, options)) or run(*inputs, **options)

    monkeypatch.setattr(on_jax, "compiled_ahead", noting)
    return calls


def caches_of_calls(monkeypatch):
    """The caches that they were given, when asked."""
    calls = calls_ahead(monkeypatch)
    return lambda: [inputs[3] for _, inputs, _ in calls]


def test_a_device_is_called_once_for_many_tokens(jax_params, device, monkeypatch):
    caches = caches_of_calls(monkeypatch)
    assert len(gpt2.generate([1, 2, 3], jax_params, N_HEAD, 2 * on_jax.STEPS_AHEAD)) == 2 * on_jax.STEPS_AHEAD
    assert len(caches()) == 2


def test_a_device_takes_no_step_that_nobody_wants(jax_params, device, monkeypatch):
    passes, model = [], gpt2.gpt2

    def counting_passes(*args, **kwargs):
        jax.debug.callback(lambda: passes.append(1))
        return model(*args, **kwargs)

    monkeypatch.setattr(gpt2, "gpt2", counting_passes)
    assert len(gpt2.generate([1, 2, 3], jax_params, N_HEAD, on_jax.STEPS_AHEAD + 5)) == on_jax.STEPS_AHEAD + 5
    jax.effects_barrier()
    assert len(passes) == 1 + on_jax.STEPS_AHEAD + 5  # the prompt but for its last id, and the steps


@pytest.mark.parametrize(("there", "copies"), [(1.9, False), (2.1, True)])
def test_a_device_turns_weights_for_one_text_where_it_has_memory_for_them(
    there, copies, params, jax_params, device, monkeypatch
):
    calls, weights = calls_ahead(monkeypatch), devices.gibibytes(n_weights(params), 4)
    monkeypatch.setattr(on_jax, "free_memory", lambda x: there * weights)
    assert gpt2.generate([1, 2, 3], jax_params, N_HEAD, 9) == gpt2.generate([1, 2, 3], params, N_HEAD, 9)
    assert gpt2.generate([[1], [2]], jax_params, N_HEAD, 9) == gpt2.generate([[1], [2]], params, N_HEAD, 9)
    compiled = [run.lower(*inputs, **options).as_text() for run, inputs, options in calls]
    assert ["optimization_barrier" in text for text in compiled] == [copies, False]


def test_a_device_that_has_too_little_memory_says_so_beforehand(jax_params, device, monkeypatch):
    monkeypatch.setattr(devices, "memory", lambda x: 0.001)
    with pytest.raises(MemoryError, match=r"and there are 0\.0: take fewer"):
        gpt2.generate([1, 2, 3], jax_params, N_HEAD, 9)


def test_a_device_writes_over_its_cache(jax_params, device, monkeypatch):
    caches = caches_of_calls(monkeypatch)
    gpt2.generate([1, 2, 3], jax_params, N_HEAD, 2 * on_jax.STEPS_AHEAD)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(caches()))  # given away to those that came after it


def test_the_cache_of_one_text_has_no_axis_of_rows_under_jax(jax_params, device, monkeypatch):
    caches = caches_of_calls(monkeypatch)
    gpt2.generate([[1, 2, 3]], jax_params, N_HEAD, 1)
    gpt2.generate([[1, 2, 3], [4]], jax_params, N_HEAD, 1)
    assert [cache[0].k.ndim for cache in caches()] == [3, 4]


def test_a_device_compiles_its_steps_once_for_texts_of_any_length(jax_params, device, monkeypatch):
    compiled, model = compiling()
    monkeypatch.setattr(gpt2, "gpt2", model)
    for n in range(1, 50):
        assert len(gpt2.generate([5, 6, 7], jax_params, N_HEAD, n, temperature=0.1 * n)) == n
    assert sorted(compiled) == [(1, 64), (16, 64)]  # steps, and the prompt


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "top_k": 20, "seed": 3}], ids=str)
def test_arrays_that_are_not_jaxs_are_drawn_from_all_rows_at_once_on_a_device(options, params, monkeypatch):
    prompts = prompts_of_lengths(5, 40, 5)
    expected = gpt2.generate(prompts, params, N_HEAD, 20, **options)
    monkeypatch.setattr(sampling, "on_processor", lambda x: False)  # as CuPy's are, which are NumPy's but for that
    assert gpt2.generate(prompts, params, N_HEAD, 20, **options) == expected


def compiling():
    """([], gpt2()), where the list fills with (n_seq, n_slots) whenever JAX compiles: it calls a function only then."""
    compiled, forward = [], gpt2.gpt2

    def model(ids, *args, kv_cache, **kwargs):
        compiled.append((ids.shape[-1], kv_cache[0].k.shape[-2]))
        return forward(ids, *args, kv_cache=kv_cache, **kwargs)

    return compiled, model


def test_jax_looks_up_what_repeats_itself_in_one_more_shape(monkeypatch):
    weights, lengths = jax.tree.map(jnp.asarray, TAME), (40, 55, 61)
    expected = [gpt2.generate([5, 6, 7], TAME, N_HEAD, n) for n in lengths]
    compiled, model = compiling()
    monkeypatch.setattr(gpt2, "gpt2", model)
    assert [gpt2.generate([5, 6, 7], weights, N_HEAD, n) for n in lengths] == expected
    assert sorted(compiled) == [(1, 64), (16, 64), (16, 64)]  # a step; prompts up to 16, and drafts


def test_jax_compiles_few_shapes_for_prompts_of_any_length(jax_params):
    compiled, model = compiling()
    for n in range(1, 65):
        with_cache(model, jax_params, N_HEAD, 1, n_slots=64).logits([prompts_of_lengths(n)[0]], [0])
    assert sorted(compiled) == [(1, 64), (16, 64), (32, 64), (64, 64)]  # a step, and prompts


@pytest.fixture(scope="module")
def long_params():  # whose context is no multiple of anything
    return wild_params(HPARAMS | {"n_ctx": 300})


def test_jax_compiles_few_shapes_for_texts_of_any_length(long_params):
    weights = jax.tree.map(jnp.asarray, long_params)
    compiled, model = compiling()
    for n_slots in range(3, 301, 9):
        with_cache(model, weights, N_HEAD, 1, n_slots).logits([[1]], [0])
    assert sorted(compiled) == [(1, 128), (1, 256), (1, 300)]


def test_jax_reads_several_long_prompts_a_part_at_a_time(long_params, monkeypatch):
    weights, prompts = jax.tree.map(jnp.asarray, long_params), prompts_of_lengths(240, 3, 64, 65, 130)
    expected = gpt2.generate(prompts, long_params, N_HEAD, 60)
    compiled, model = compiling()
    monkeypatch.setattr(gpt2, "gpt2", model)
    assert gpt2.generate(prompts, weights, N_HEAD, 60) == expected
    assert sorted(compiled) == [(1, 300), (64, 300)]


def test_jax_reads_one_long_prompt_at_once(long_params, monkeypatch):
    weights, (prompt,) = jax.tree.map(jnp.asarray, long_params), prompts_of_lengths(240)
    expected = gpt2.generate(prompt, long_params, N_HEAD, 60)
    compiled, model = compiling()
    monkeypatch.setattr(gpt2, "gpt2", model)
    assert gpt2.generate(prompt, weights, N_HEAD, 60, temperature=0) == expected
    assert (256, 300) in compiled


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be 0, or a number from 1e-6 to 1e6, not -1"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 1e-50}, "temperature must be"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be 0, or a number from 1e-6 to 1e6, not 'hot'"),
        ({"top_k": -1}, "top_k must be a whole number, 0 or more, not -1"),
        ({"top_k": 1.5}, "top_k must be"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
        ({"top_p": 1.1}, "top_p must be"),
    ],
)
def test_options_out_of_range_are_errors(options, message, generate):
    with pytest.raises(ValueError, match=message):
        generate([1, 2, 3], 5, **options)


@pytest.mark.parametrize("n", [-1, 2.5, "3", True, None])
def test_a_number_of_tokens_must_be_a_whole_number(n, generate):
    with pytest.raises(ValueError, match="n_tokens_to_generate must be"):
        generate([1, 2, 3], n)


def test_an_empty_prompt_in_a_batch_is_an_error(generate):
    with pytest.raises(ValueError, match="no tokens"):
        generate([[1], []], 5)


@pytest.mark.parametrize("inputs", ["1984", ["1", "2"], b"12", [1.0, 2.0], np.array([1.0]), [[1], ["a"]], None, 5])
def test_what_is_no_list_of_ids_is_an_error(inputs, generate):
    with pytest.raises(TypeError, match="a prompt is a list of token ids"):
        generate(inputs, 5)


@pytest.mark.parametrize("inputs", [[1, -1], [[1, 2], [500]], np.array([500])])
def test_ids_that_are_not_in_the_vocabulary_are_an_error_on_any_arrays(inputs, params, jax_params):
    for weights in (params, jax_params):
        with pytest.raises(ValueError, match=r"token ids must be from 0 to 499, not (-1|500)"):
            gpt2.generate(inputs, weights, N_HEAD, 5)


def test_a_context_of_one_token_slides():
    params = checkpoint.random_params({**HPARAMS, "n_ctx": 1})
    prompts = [[3], [4, 5]]
    for inputs in (prompts[0], prompts):
        assert gpt2.generate(inputs, params, N_HEAD, 5, sliding_window=True)


def test_half_precision_looks_nothing_up(jax_params, monkeypatch):
    monkeypatch.setattr(lookup, "Lookup", None)
    half = jax.tree.map(lambda x: x.astype("bfloat16"), jax_params)
    assert len(gpt2.generate([1, 2, 3], half, N_HEAD, 5)) == 5


# Penalties


@pytest.mark.parametrize("seed", range(40))
def test_penalties_are_transformers(seed):
    rng = np.random.default_rng(seed)
    options = {"repetition_penalty": rng.choice([1, 1.3, 0.7, 5]), "no_repeat_ngram": int(rng.choice([0, 1, 2, 3, 4]))}
    for _ in range(5):
        ids = rng.integers(0, 6, rng.integers(1, 30)).tolist()
        logits = rng.normal(0, 3, 8).astype(np.float32)
        expected = torch.tensor(logits)[None]
        if options["repetition_penalty"] != 1:
            process = transformers.RepetitionPenaltyLogitsProcessor(float(options["repetition_penalty"]))
            expected = process(torch.tensor(ids)[None], expected)
        if options["no_repeat_ngram"]:
            process = transformers.NoRepeatNGramLogitsProcessor(options["no_repeat_ngram"])
            expected = process(torch.tensor(ids)[None], expected)
        sampling.penalize(logits, ids, **options)
        np.testing.assert_allclose(logits, expected[0], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "seed": 3}], ids=str)
@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.5}, {"no_repeat_ngram": 2}], ids=str)
def test_each_row_of_a_batch_is_penalized_for_what_its_own_text_says(penalty, options, params, jax_params):
    prompts, options = [[5, 6, 7], [1] * 10], options | penalty
    alone = [gpt2.generate(p, params, N_HEAD, 30, **options | ({"seed": 3 + i} if "seed" in options else {}))
             for i, p in enumerate(prompts)]  # fmt: skip
    assert gpt2.generate(prompts, params, N_HEAD, 30, **options) == alone
    assert gpt2.generate(prompts, jax_params, N_HEAD, 30, **options) == alone
    with taken_for_gpus():
        assert gpt2.generate(prompts, jax_params, N_HEAD, 30, **options) == alone


def test_greedy_text_that_repeats_itself_does_not_where_that_is_forbidden():
    for prompt in ([5, 6, 7], [5, 6, 7] * 4):
        ids = prompt + gpt2.generate(prompt, TAME, N_HEAD, 40, no_repeat_ngram=3)
        grams = [*zip(ids, ids[1:], ids[2:], strict=False)][len(prompt) - 2 :]
        assert len({*grams}) == len(grams)


@pytest.mark.parametrize(
    "option",
    [{"repetition_penalty": 0}, {"repetition_penalty": "x"}, {"no_repeat_ngram": -1}, {"no_repeat_ngram": 1.5}],
)
def test_penalties_out_of_range_are_errors(option, generate):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        generate([1, 2, 3], 5, **option)


# Log-probabilities

LOOPS = [5, 6, 7] * 6  # looked up by a model that was not asked for log-probabilities


def told(prompts, weights, n=20, **options):
    """[(ids, log-probabilities, [{id: log-probability}])], an entry for each prompt."""
    outputs = gpt2.generate(prompts, weights, N_HEAD, n, logprobs=3, **options)
    return [tuple(map(list, zip(*output, strict=True))) for output in outputs]


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "seed": 3}, {"repetition_penalty": 1.5}], ids=str)
@pytest.mark.parametrize("arrays", ["NumPy", "JAX", "GPU"])
def test_logprobs_are_pytorchs_of_the_model_alone_beside_the_ids_of_a_run_without(options, arrays, params, jax_params):
    weights, prompts = params if arrays == "NumPy" else jax_params, [LOOPS, [3], [8, 9]]
    model = hugging_face(HPARAMS, params)
    with taken_for_gpus() if arrays == "GPU" else contextlib.nullcontext():
        plain, outputs = gpt2.generate(prompts, weights, N_HEAD, 20, **options), told(prompts, weights, **options)
        (alone,) = told([LOOPS], weights, **options)
    assert [ids for ids, _, _ in outputs] == plain
    assert alone[0] == outputs[0][0]
    for prompt, (ids, logprobs, best) in zip(prompts, outputs, strict=True):
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.double(), -1).detach()  # [20, n_vocab]
        np.testing.assert_allclose(logprobs, expected[range(20), ids], atol=1e-3)
        values, _ = expected.topk(3)
        np.testing.assert_allclose([[*top.values()] for top in best], values, atol=1e-3)
        np.testing.assert_allclose(values, [expected[i][[*top]] for i, top in enumerate(best)], atol=1e-3)


def test_logprobs_behind_a_window_that_slides_are_those_of_what_it_shows(params):
    ((ids, logprobs, _),) = told([[5, 6, 7]], params, 100, sliding_window=True)
    window = [5, 6, 7]
    for i, logprob in zip(ids, logprobs, strict=True):
        window = window[-(N_CTX // 2) :] if len(window) > N_CTX else window
        logits = gpt2.gpt2(window, **params, n_head=N_HEAD)[-1].astype(np.float64)
        assert logprob == pytest.approx(logits[i] - np.log(np.exp(logits).sum()), abs=1e-3)
        window = [*window, i]


def test_logprobs_end_where_a_text_is_stopped_and_stop_sees_ids_alone(params):
    prompts = [[5, 6, 7], [3]]
    plain = gpt2.generate(prompts, params, N_HEAD, 20)
    ends = plain[0][4]
    outputs = told(prompts, params, stop=lambda ids: ids[-1] == ends)
    expected = gpt2.generate(prompts, params, N_HEAD, 20, stop=lambda ids: ids[-1] == ends)
    assert [ids for ids, _, _ in outputs] == expected
    assert [len(logprobs) for _, logprobs, _ in outputs] == [*map(len, expected)]


def test_logprobs_of_one_prompt_come_one_by_one_and_0_are_those_of_the_ids_alone(params):
    plain = gpt2.generate(LOOPS, params, N_HEAD, 5)
    tokens = [*gpt2.generate_ids(LOOPS, params, N_HEAD, 5, logprobs=0)]
    assert [i for i, _, _ in tokens] == plain
    assert [best for _, _, best in tokens] == [{}] * 5


@pytest.mark.parametrize("k", [-1, 1.5, True, "3"])
def test_logprobs_must_be_a_whole_number(k, generate):
    with pytest.raises(ValueError, match="logprobs must be a whole number, 0 or more, not"):
        generate([1, 2, 3], 5, logprobs=k)


# Seeds


def test_there_must_be_a_seed_for_every_prompt(generate):
    with pytest.raises(ValueError, match="seed has 1 numbers for 2 prompts"):
        generate([[1], [2]], 5, temperature=1, seed=[1])


@pytest.mark.parametrize("seed", [-1, "a", 1.5, [1, -1]])
def test_a_seed_must_be_a_whole_number(seed, generate):
    with pytest.raises(ValueError, match="seed must be"):
        generate([1, 2, 3], 5, temperature=1, seed=seed)


def test_stop_must_be_a_function(generate):
    with pytest.raises(TypeError, match="stop must be a function"):
        generate([1, 2, 3], 5, stop="\n")


def test_mistakes_show_before_the_first_id_is_asked_for(params):
    with pytest.raises(ValueError, match="more than the model's context"):
        gpt2.generate_ids([1, 2, 3], params, N_HEAD, N_CTX)


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.5}, {"seed": 0}])
def test_what_would_do_nothing_at_temperature_0_is_an_error(option, params):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} does nothing at a temperature of 0"):
        gpt2.generate([1, 2], params, N_HEAD, 3, **option)


def test_samples_of_one_prompt_are_asked_for_as_a_batch(params):
    with pytest.raises(TypeError, match=r"n_samples is a flag: .* \[ids\] \* 3"):
        gpt2.generate([1, 2], params, HPARAMS["n_head"], 3, n_samples=2)
