"""Sampling, batches, stopping and the sliding window, against exact probabilities, transformers and plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from conftest import HPARAMS, wild_params
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2
import utils

N_HEAD, N_VOCAB, N_CTX = HPARAMS["n_head"], HPARAMS["n_vocab"], HPARAMS["n_ctx"]
LOGITS = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -3.0], np.float32)


def prompts_of_lengths(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, N_VOCAB, length).tolist() for length in lengths]


@pytest.fixture
def generate(params):
    return lambda inputs, n, **options: gpt2.generate(inputs, params, N_HEAD, n, **options)


# sample


def exact(temperature, kept):
    p = np.exp(LOGITS.astype(float) / temperature)
    p[[i for i in range(len(p)) if i not in kept]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({"temperature": 1}, exact(1, range(6))),
        ({"temperature": 0.5}, exact(0.5, range(6))),
        ({"temperature": 2}, exact(2, range(6))),
        ({"temperature": 1, "top_k": 1}, exact(1, [0])),
        ({"temperature": 1, "top_k": 3}, exact(1, [0, 1, 2])),
        ({"temperature": 1, "top_k": 100}, exact(1, range(6))),
        ({"temperature": 1, "top_p": 0.7}, exact(1, [0, 1])),  # 0.45 + 0.28 reach 0.7
        ({"temperature": 1, "top_p": 0.75}, exact(1, [0, 1, 2])),  # and do not reach 0.75: the third crosses it
        ({"temperature": 1, "top_p": 1e-9}, exact(1, [0])),
        ({"temperature": 2, "top_k": 4, "top_p": 0.6}, exact(2, [0, 1])),  # of four: 0.36 + 0.28 = 0.64
        ({"temperature": 2, "top_p": 0.6}, exact(2, [0, 1, 2])),  # of all six: 0.32 + 0.25 = 0.57
    ],
    ids=str,
)
def test_frequencies_of_draws_are_the_exact_probabilities(options, probabilities):
    n = 20_000
    draws = gpt2.sample(np.tile(LOGITS, (n, 1)), np.random.default_rng(0), **options)
    observed = np.bincount(draws, minlength=6)
    possible = probabilities > 0
    assert (observed[~possible] == 0).all()
    expected = n * probabilities[possible]
    chi_square = ((observed[possible] - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 99.9 % of the chi-square distribution with 5 degrees of freedom, and more for fewer


def kept_by(logits, **options):
    """The tokens that can be drawn: a generator of evenly spaced points finds every one of them."""

    class Evenly:
        def random(self, shape):
            return np.linspace(0, 1, shape[0], endpoint=False).reshape(shape)

    flat = np.where(np.isfinite(logits), logits, -np.inf)
    return set(gpt2.sample(np.tile(flat, (20_000, 1)), Evenly(), temperature=1, **options).tolist())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0.05, 0.99))
def test_filters_keep_what_transformers_keep(seed, top_k, top_p):
    logits = np.random.default_rng(seed).standard_normal(30).astype(np.float32)
    tensor = torch.tensor(logits)[None]
    by_k = transformers.TopKLogitsWarper(top_k)(None, tensor)
    by_both = transformers.TopPLogitsWarper(top_p)(None, by_k)
    for options, filtered in (({"top_k": top_k}, by_k), ({"top_k": top_k, "top_p": top_p}, by_both)):
        assert kept_by(logits, **options) == set(torch.isfinite(filtered[0]).nonzero().flatten().tolist())


def test_temperature_0_takes_the_likeliest_token():
    assert gpt2.sample(LOGITS[::-1]) == 5
    assert gpt2.sample(np.stack([LOGITS, LOGITS[::-1]])).tolist() == [0, 5]


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_do_not_overflow(temperature):
    draws = gpt2.sample(np.tile(LOGITS, (2000, 1)), np.random.default_rng(0), temperature=temperature)
    assert set(draws) == ({0} if temperature < 1 else set(range(6)))


def test_the_last_token_is_drawn_when_the_random_point_is_as_large_as_can_be():
    class Largest:
        def random(self, shape):
            return np.full(shape, np.nextafter(1, 0))

    assert gpt2.sample(np.zeros(50257, np.float32), Largest(), temperature=1) == 50256


# generate: seeds


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


# generate: batches


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**6))
def test_a_ragged_batch_is_its_prompts_one_by_one(params, lengths, seed):
    prompts = prompts_of_lengths(*lengths, seed=seed)
    batch = gpt2.generate(prompts, params, N_HEAD, 15)
    assert batch == [gpt2.generate(prompt, params, N_HEAD, 15) for prompt in prompts]


def test_logits_of_a_padded_row_are_those_of_the_row_alone(params):
    short, long = prompts_of_lengths(5, 9)
    cache = [np.zeros((2, 2, N_HEAD, 10, 16), np.float32) for _ in params["blocks"]]
    _, n_pad = gpt2.read_prompts([short, long], params, N_HEAD, cache)
    assert n_pad.tolist() == [4, 0]
    logits = gpt2.gpt2([[3], [4]], **params, n_head=N_HEAD, kv_cache=cache, n_past=9, n_pad=n_pad)
    for row, ids in enumerate([[*short, 3], [*long, 4]]):
        np.testing.assert_allclose(logits[row, 0], gpt2.gpt2(ids, **params, n_head=N_HEAD)[-1], rtol=1e-4, atol=2e-4)


def test_padding_needs_no_cache(params):
    short, long = prompts_of_lengths(5, 9)
    logits = gpt2.gpt2([[0, 0, 0, 0, *short], long], **params, n_head=N_HEAD, n_pad=np.array([4, 0]))
    for row, ids in enumerate([short, long]):
        alone = gpt2.gpt2(ids, **params, n_head=N_HEAD)
        np.testing.assert_allclose(logits[row, -len(ids) :], alone, rtol=1e-4, atol=2e-4)


def test_equal_prompts_are_read_once(generate, monkeypatch):
    passes, forward = [], gpt2.gpt2
    monkeypatch.setattr(
        gpt2, "gpt2", lambda ids, *args, **kwargs: passes.append(np.shape(ids)) or forward(ids, *args, **kwargs)
    )
    generate([[1, 2, 3]] * 4, 3)
    assert passes == [(3,), (4, 1), (4, 1)]


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


# generate: stopping


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


# generate: what repeats itself is looked up, and checked many tokens at a time


TAME = utils.random_params(HPARAMS)  # soon says the same token over and over
CIRCLING = wild_params({**HPARAMS, "n_ctx": 256}, seed=3)  # goes in circles of several tokens: it has
CIRCLING["wpe"] = (0.05 * CIRCLING["wpe"]).astype(np.float32)  # little idea of positions


def plainly(prompt, n, params):
    """The greedy ids of passes over one token each."""
    cache = [np.zeros((2, N_HEAD, len(params["wpe"]), 16), np.float32) for _ in params["blocks"]]
    inputs, n_past, ids = prompt, 0, []
    for _ in range(n):
        logits = gpt2.gpt2(inputs, **params, n_head=N_HEAD, kv_cache=cache, n_past=n_past, only_last=True)
        n_past, inputs = n_past + len(inputs), [int(logits.argmax())]
        ids += inputs
    return ids


@pytest.fixture
def passes(monkeypatch):
    """Filled with the number of tokens of every pass through the model."""
    sizes, forward = [], gpt2.gpt2
    monkeypatch.setattr(gpt2, "gpt2", lambda ids, **rest: sizes.append(np.shape(ids)[-1]) or forward(ids, **rest))
    return sizes


@pytest.mark.parametrize("make", [utils.random_params, wild_params])
@pytest.mark.parametrize("seed", range(5))
def test_the_ids_are_those_of_one_token_passes(make, seed):
    params = make(HPARAMS, seed)
    for prompt in (*prompts_of_lengths(1, 3, 10, 20, seed=seed), [7] * 12, [1, 2, 3] * 8, list(range(15)) * 2):
        n = N_CTX - len(prompt)
        assert gpt2.generate(prompt, params, N_HEAD, n) == plainly(prompt, n, params)


def test_text_that_repeats_itself_takes_few_passes(passes):
    ids = gpt2.generate([5, 6, 7], TAME, N_HEAD, 60)
    assert len(set(ids[20:])) == 1  # it does
    assert len(passes) < 30
    assert max(passes) == 16


def test_text_that_does_not_repeat_itself_takes_a_pass_a_token(passes, params):
    ids = gpt2.generate([5, 6, 7], params, N_HEAD, 50)
    assert len(set(ids)) > 20
    assert passes == [3] + [1] * 49


def test_runs_of_the_prompt_are_looked_up_too(generate, monkeypatch):
    seen = []
    monkeypatch.setattr(gpt2, "lookup", lambda ids, runs, n_match: seen.append(dict(runs)) or [])
    generate([*range(20), *range(12)], 10)
    assert seen[0][tuple(range(8))] == 28  # the second time
    assert seen[0][tuple(range(12, 20))] == 20


def test_the_draft_is_what_followed_the_same_ids_the_last_time():
    ids = [*range(20), *range(100, 130), *range(20)]
    seen = {tuple(ids[i - 8 : i]): i for i in range(8, len(ids))}
    assert gpt2.lookup(ids, seen, 8) == list(range(100, 115))
    assert gpt2.lookup(ids, seen, 20) == list(range(100, 115))
    assert gpt2.lookup(ids, seen, 21) == []
    assert gpt2.lookup([*ids, 999], seen, 8) == []


def test_a_draft_longer_than_what_followed_repeats_it():
    ids = [1, 2, 3] * 4
    assert gpt2.lookup(ids, {tuple(ids[-8:]): 9}, 8) == [1, 2, 3] * 5


def test_a_draft_holds_up_to_its_first_wrong_id_which_the_model_puts_right():
    logits = np.eye(6, dtype=np.float32)[[4, 2, 5, 1]]
    assert gpt2.confirm(logits, [4, 2, 5]) == [4, 2, 5, 1]
    assert gpt2.confirm(logits, [4, 3, 5]) == [4, 2]
    assert gpt2.confirm(logits, [0, 2, 5]) == [4]


@pytest.mark.parametrize("scale", [0.1, 1, 1e6])
def test_a_draft_ends_where_two_tokens_are_too_close_to_call(scale):
    logits = np.eye(6, dtype=np.float32)[[4, 2, 5, 1]]
    logits[1, 0] = 0.999999
    assert gpt2.confirm(scale * logits, [4, 2, 5]) == [4]
    logits[0, 0] = 0.999999
    assert gpt2.confirm(scale * logits, [4, 2, 5]) == []


def test_drafts_that_fail_ask_for_longer_and_longer_matches(passes):
    twins = {**TAME, "wte": np.concat([TAME["wte"][:250], TAME["wte"][:250]])}  # always too close to call
    ids = gpt2.generate([5, 6, 7], twins, N_HEAD, 60)
    assert ids == plainly([5, 6, 7], 60, twins)
    assert len(set(ids[-20:])) == 1
    assert passes.count(16) == 3  # for matches of 8, 16 and 32


def test_a_draft_that_comes_true_makes_short_matches_enough_again(monkeypatch):
    confirm, lookup, drafts, matches = gpt2.confirm, gpt2.lookup, [], []

    def confirm_but_the_first(logits, draft=()):
        drafts.extend([draft] if draft else [])
        return [] if draft and len(drafts) == 1 else confirm(logits, draft)

    monkeypatch.setattr(gpt2, "confirm", confirm_but_the_first)
    monkeypatch.setattr(gpt2, "lookup", lambda *args: matches.append(args[-1]) or lookup(*args))
    gpt2.generate([5, 6, 7], TAME, N_HEAD, 60)
    assert len(drafts) > 1
    assert [n for i, n in enumerate(matches) if i == 0 or n != matches[i - 1]] == [8, 16, 8]


def test_what_drafts_left_in_the_cache_does_not_decide_between_two_that_are_close():
    ids = plainly([5, 6, 7], 250, CIRCLING)
    twin = next(i for i in range(N_VOCAB - 1, 0, -1) if i not in ids)
    for token in sorted(set(ids[60:])):
        wte = CIRCLING["wte"].copy()
        wte[twin] = wte[token] * (1 + 1e-7 * np.random.default_rng(3).standard_normal(80)).astype(np.float32)
        close = {**CIRCLING, "wte": wte}
        assert gpt2.generate([5, 6, 7], close, N_HEAD, 250) == plainly([5, 6, 7], 250, close)


def test_samples_and_batches_look_nothing_up(passes):
    gpt2.generate([5, 6, 7], TAME, N_HEAD, 40, temperature=1e-3, seed=0)
    gpt2.generate([[5, 6, 7], [6, 7]], TAME, N_HEAD, 40)
    assert set(passes) == {3, 2, 1}


def test_a_stop_within_a_draft_that_came_true_ends_there():
    ids = gpt2.generate([5, 6, 7], TAME, N_HEAD, 60)
    assert gpt2.generate([5, 6, 7], TAME, N_HEAD, 60, stop=lambda ids: len(ids) == 37) == ids[:37]


# generate: the sliding window


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


# generate: errors


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
