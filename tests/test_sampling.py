"""sample(): frequencies against exact probabilities, filters against transformers and exact sums."""

import bisect
import math

import numpy as np
import pytest
from conftest import optional
from hypothesis import given, settings
from hypothesis import strategies as st

from sampling import draw, log_probability, sample

jax, jnp, torch, transformers = map(optional, ("jax", "jax.numpy", "torch", "transformers"))

LOGITS = np.array([2.0, 1.5, 1.0, 0.0, -1.0, -3.0], np.float32)


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
        ({"temperature": 1, "top_p": 1 - 1e-9}, exact(1, range(6))),
        ({"temperature": 2, "top_k": 4, "top_p": 0.6}, exact(2, [0, 1])),  # of four: 0.36 + 0.28 = 0.64
        ({"temperature": 2, "top_p": 0.6}, exact(2, [0, 1, 2])),  # of all six: 0.32 + 0.25 = 0.57
    ],
    ids=str,
)
def test_frequencies_of_draws_are_the_exact_probabilities(options, probabilities):
    n = 20_000
    draws = sample(np.tile(LOGITS, (n, 1)), np.random.default_rng(0), **options)
    observed = np.bincount(draws, minlength=6)
    possible = probabilities > 0
    assert (observed[~possible] == 0).all()
    expected = n * probabilities[possible]
    chi_square = ((observed[possible] - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 99.9 % of the chi-square distribution with 5 degrees of freedom, and more for fewer


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.75, {0, 1}), (0.76, {0, 1, 2}), (0.25, {0})])
def test_top_p_keeps_no_token_beyond_those_that_reach_p_exactly(top_p, kept):
    logits = np.log([0.5, 0.25, 0.125, 0.125])  # in binary, all of these and their sums are exact
    points = np.linspace(0, 1, 97)[:, None]
    drawn = {int(i) for i in draw(np.tile(logits, (97, 1)), points, 1.0, 0, top_p)}
    assert drawn - {3} == kept  # the last two are alike: where one stays, so does the other


def kept_by(logits, **options):
    """The tokens that can be drawn: a generator of evenly spaced points finds every one of them."""

    class Evenly:
        def random(self, shape):
            return np.linspace(0, 1, shape[0], endpoint=False).reshape(shape)

    flat = np.where(np.isfinite(logits), logits, -np.inf)
    return set(sample(np.tile(flat, (20_000, 1)), Evenly(), temperature=1, **options).tolist())


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0.05, 0.99))
def test_filters_keep_what_transformers_keep(seed, top_k, top_p):
    logits = np.random.default_rng(seed).standard_normal(30).astype(np.float32)
    tensor = torch.tensor(logits)[None]
    by_k = transformers.TopKLogitsWarper(top_k)(None, tensor)
    by_both = transformers.TopPLogitsWarper(top_p)(None, by_k)
    for options, filtered in (({"top_k": top_k}, by_k), ({"top_k": top_k, "top_p": top_p}, by_both)):
        assert kept_by(logits, **options) == set(torch.isfinite(filtered[0]).nonzero().flatten().tolist())


def test_temperature_0_takes_the_likeliest_token():
    assert sample(LOGITS[::-1]) == 5
    assert sample(np.stack([LOGITS, LOGITS[::-1]])).tolist() == [0, 5]


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_extreme_temperatures_do_not_overflow(temperature):
    draws = sample(np.tile(LOGITS, (2000, 1)), np.random.default_rng(0), temperature=temperature)
    assert set(draws) == ({0} if temperature < 1 else set(range(6)))


def test_the_last_token_is_drawn_when_the_random_point_is_as_large_as_can_be():
    class Largest:
        def random(self, shape):
            return np.full(shape, np.nextafter(1, 0))

    assert sample(np.zeros(50257, np.float32), Largest(), temperature=1) == 50256


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 0.999])
def test_top_p_keeps_the_smallest_set_among_as_many_tokens_as_gpt2_has(top_p):
    logits = np.random.default_rng(0).standard_normal(50257).astype(np.float32)  # flat: thousands are needed
    p = np.exp(logits.astype(np.float64))
    falling = np.sort(p / math.fsum(p))[::-1].tolist()
    n_kept = bisect.bisect_left(range(50258), top_p, key=lambda n: math.fsum(falling[:n]))

    class AtTheEnd:  # of the line on which the tokens lie: the last of them that may be drawn
        def random(self, shape):
            return np.full(shape, np.nextafter(1, 0))

    order = np.argsort(-logits, kind="stable")
    assert sample(logits[order], AtTheEnd(), temperature=1, top_p=top_p) == n_kept - 1


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_jaxs_logits_are_drawn_from_as_numpys_are_under_jit_too(options):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((20, 50257), dtype=np.float32)  # as many as GPT-2 has
    expected = draw(logits, points := rng.random((20, 1)), 0.7, **options).tolist()
    assert draw(jnp.asarray(logits), points, 0.7, **options).tolist() == expected
    jitted = jax.jit(draw, static_argnames=("top_k", "top_p"))
    assert jitted(jnp.asarray(logits), points, 0.7, **options).tolist() == expected


def test_of_tokens_that_are_equally_likely_the_first_is_told_first():
    logits = np.log(np.array([0.1, 0.3, 0.3, 0.3], np.float32))
    logprob, best = log_probability(logits, 0, 2)
    assert (logprob, best) == (
        pytest.approx(math.log(0.1)),
        {1: pytest.approx(math.log(0.3)), 2: pytest.approx(math.log(0.3))},
    )
    assert [*log_probability(logits, 0, 99)[1]] == [1, 2, 3, 0]


def test_what_is_as_good_as_impossible_has_a_log_probability():
    assert log_probability(np.array([0, -5000], np.float32), 1, 0) == (-5000, {})


def test_tokens_as_likely_as_the_last_of_top_k_count_for_top_p_as_transformers_have_it():
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2], np.float32))
    tensor = transformers.TopKLogitsWarper(2)(None, torch.tensor(logits)[None])
    assert torch.isfinite(tensor).all()
    assert kept_by(logits, top_k=2, top_p=0.65) == {0, 1, 2, 3}


def test_tokens_that_stay_out_are_not_drawn_under_jax_where_its_sums_rise_at_them():
    logits = 3 * np.random.default_rng(0).standard_normal(50257)
    i = int(jax.jit(draw, static_argnames=("top_k", "top_p"))(jnp.asarray(logits), np.array([0.22304283]), 1, top_k=40))
    assert (logits > logits[i]).sum() < 40


def test_a_random_point_that_float32_rounds_to_1_falls_on_the_last_token_under_jax_too():
    assert draw(jnp.zeros(50257), np.array([np.nextafter(1, 0)]), 1) > 50_000
