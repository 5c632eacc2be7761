"""Prompt lookup: the ids are those of passes over one id each, in fewer passes where a text repeats itself."""

import numpy as np
import pytest
from conftest import HPARAMS, prompts_of_lengths, wild_params

import gpt2
from backends import lookup, with_cache
from files import checkpoint
from sampling import Sampler

N_HEAD, N_VOCAB, N_CTX = HPARAMS["n_head"], HPARAMS["n_vocab"], HPARAMS["n_ctx"]

TAME = checkpoint.random_params(HPARAMS)  # soon says the same token over and over
CIRCLING = wild_params({**HPARAMS, "n_ctx": 256}, seed=3)  # goes in circles of several tokens: it has
CIRCLING["wpe"] = (0.05 * CIRCLING["wpe"]).astype(np.float32)  # little idea of positions


def plainly(prompt, n, params):
    """The greedy ids of passes over one token each."""
    model = with_cache(gpt2.gpt2, params, N_HEAD, 1, n_slots=len(params["wpe"]))
    ids, fed = [], prompt
    for n_past in [0, *range(len(prompt), len(prompt) + n - 1)]:
        fed = [int(model.logits([fed], [n_past])[0, -1].argmax())]
        ids += fed
    return ids


@pytest.fixture
def passes(monkeypatch):
    """Filled with the number of tokens of every pass through the model."""
    sizes, forward = [], gpt2.gpt2
    monkeypatch.setattr(gpt2, "gpt2", lambda ids, **rest: sizes.append(np.shape(ids)[-1]) or forward(ids, **rest))
    return sizes


@pytest.mark.parametrize("make", [checkpoint.random_params, wild_params])
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


class Reciting:
    """A Model that knows one text by heart, and notes what it is fed."""

    def __init__(self, text):
        self.text, self.passes = text, []

    def logits(self, rows, n_past, n_last=1):
        ((row,), (n_seen,)) = rows, n_past
        self.passes.append(row)
        return np.eye(100, dtype=np.float32)[self.text[n_seen + 1 : n_seen + len(row) + 1]][None, -n_last:]


def recite(text, n_prompt, n, n_ctx=1000):
    """The passes that it takes to continue the first n_prompt ids of text by n."""
    model = Reciting(text)
    steps = gpt2.decode([text[:n_prompt]], lookup.Lookup(model), Sampler([[]]), n_ctx, n)
    assert [*steps] == [[i] for i in text[n_prompt : n_prompt + n]]
    return model.passes


VERSE, OTHER = list(range(20)), list(range(30, 60))


def test_the_draft_is_what_followed_the_newest_eight_ids_the_last_time():
    passes = recite([*VERSE, *OTHER, *VERSE, *OTHER, *range(60, 70)], n_prompt=70, n=35)
    assert passes[:3] == [[*VERSE, *OTHER, *VERSE], OTHER[:16], [*OTHER[16:], *VERSE[:2]]]


def test_seven_ids_that_stood_before_are_not_enough():
    text = [*VERSE[:7], *OTHER, 70, *VERSE[:7], *OTHER]
    passes = recite(text, n_prompt=38, n=8)
    assert {len(row) for row in passes[1:]} == {1}


def test_a_text_that_comes_back_to_its_very_beginning_goes_on_from_there():
    passes = recite([*VERSE[:8], *OTHER, *VERSE[:8], *OTHER], n_prompt=45, n=17)
    assert [len(row) for row in passes] == [45, 16]


def test_a_draft_longer_than_what_followed_repeats_it():
    passes = recite([1, 2, 3] * 20, n_prompt=10, n=17)
    assert passes == [[1, 2, 3] * 3 + [1], ([2, 3, 1] * 6)[:16]]


def test_no_draft_is_longer_than_what_is_wanted():
    passes = recite([1, 2, 3] * 20, n_prompt=12, n=20)
    assert [len(row) for row in passes] == [12, 16, 1, 1, 1]
    passes = recite([1, 2, 3] * 20, n_prompt=12, n=10)
    assert [len(row) for row in passes] == [12, 9]


def test_no_draft_reaches_beyond_the_context():
    passes = recite([1, 2, 3] * 20, n_prompt=12, n=11, n_ctx=22)
    assert [len(row) for row in passes] == [12, 10]


def test_a_draft_holds_up_to_its_first_wrong_id_which_the_model_puts_right():
    logits = np.eye(6, dtype=np.float32)[[4, 2, 5, 1]]
    assert lookup.confirm(logits, [4, 2, 5]) == [4, 2, 5, 1]
    assert lookup.confirm(logits, [4, 3, 5]) == [4, 2]
    assert lookup.confirm(logits, [0, 2, 5]) == [4]


@pytest.mark.parametrize("scale", [0.1, 1, 1e6])
@pytest.mark.parametrize("shift", [0, -1.5, -100])  # GPT-2's logits lie near -100
def test_a_draft_ends_where_two_tokens_are_too_close_to_call(scale, shift):
    logits = np.eye(6, dtype=np.float32)[[4, 2, 5, 1]] + np.float32(shift)
    assert lookup.confirm(scale * logits, [4, 2, 5]) == [4, 2, 5, 1]
    logits[1, 0] += 0.99999
    assert lookup.confirm(scale * logits, [4, 2, 5]) == [4]
    logits[0, 0] += 0.99999
    assert lookup.confirm(scale * logits, [4, 2, 5]) == []


def test_drafts_that_fail_ask_for_longer_and_longer_matches(passes):
    twins = {**TAME, "wte": np.concat([TAME["wte"][:250], TAME["wte"][:250]])}  # always too close to call
    ids = gpt2.generate([5, 6, 7], twins, N_HEAD, 60)
    assert ids == plainly([5, 6, 7], 60, twins)
    assert len(set(ids[-20:])) == 1
    assert passes.count(16) == 3  # for matches of 8, 16 and 32


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
