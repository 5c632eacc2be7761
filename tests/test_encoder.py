"""The tokenizer against tiktoken on GPT-2's genuine vocabulary, and its merges against the textbook's loop."""

import itertools
import pydoc_data.topics
import random
import string
import time
import unicodedata

import pytest
import tiktoken
from conftest import GENUINE, REPO, command
from hypothesis import given
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

import encoder

NASTY = [
    "",
    " ",
    "\n\n \t  x",
    "a  b   c    ",
    " \u00a0\u2003\u3000 x \u200b\u200d",
    "I'm you're he'll they've she'd it's 'tis isn't",
    "I'M YOU'RE HE'LL THEY'VE SHE'D IT'S ISN'T",
    "''s 's's'' '",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇳 👍🏽 😀😀😀",
    "六十行代码手搓一个GPT，真的神清气爽。",
    "日本語とひらがな 한국어 ภาษาไทย हिन्दी العربية עברית",
    "e\u0301 n\u0303 Z\u0351\u036b\u0343 ﷺ ﬀ ß ẞ İ ı",
    "x²³ ½ Ⅷ 一二三 ٣٤٥ 1234567890",
    "<|endoftext|> and <|endoftext|><|endoftext|>",
    "def f(x):\n\treturn x ** 2  # 平方\r\n",
    "\x00\x01\x7f\x80\xa0\xad\xff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010fffd",
    "a" * 5000,
    "ab" * 3000,
    " " * 5000 + "x",
    "\n" * 3000,
    "🙂" * 2000,
    "!?" * 2000,
    "".join(map(chr, range(256))),
]


def assigned(character):
    """Whether Python's own, older, Unicode tables know a character: on newer ones the two libraries may differ."""
    return unicodedata.category(character) != "Cn"


texts = st.text(st.characters(codec="utf-8").filter(assigned))
near_the_pattern = st.text("aB1'stremvdl \n\t.,Ġé中 😀", max_size=60)


@pytest.fixture(scope="module")
def genuine():
    return encoder.get_encoder(GENUINE.name, GENUINE.parent)


@pytest.fixture(scope="module")
def openai():
    """tiktoken's GPT-2, built from the local files: by name it would download them."""
    ranks = data_gym_to_mergeable_bpe_ranks(str(GENUINE / "vocab.bpe"), str(GENUINE / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def test_encode_prints_what_the_tutorial_shows(genuine):
    ids = genuine.encode("Not all heroes wear capes.")
    assert ids == [3673, 477, 10281, 5806, 1451, 274, 13]
    assert genuine.decode(ids) == "Not all heroes wear capes."
    assert [genuine.decoder[i] for i in ids] == ["Not", "Ġall", "Ġheroes", "Ġwear", "Ġcap", "es", "."]
    assert [genuine.decoder[i] for i in genuine.encode("zjqfl")] == ["z", "j", "q", "fl"]
    assert len(genuine.decoder) == 50257


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:20]))
def test_ids_of_nasty_text_are_openais_and_decode_to_it(text, genuine, openai):
    ids = genuine.encode(text)
    assert ids == openai.encode_ordinary(text)
    assert genuine.decode(ids) == text


@given(texts | near_the_pattern)
def test_ids_of_any_text_are_openais_and_decode_to_it(genuine, openai, text):
    ids = genuine.encode(text)
    assert ids == openai.encode_ordinary(text)
    assert genuine.decode(ids) == text


@given(st.lists(st.integers(0, 50255), max_size=20))
def test_any_ids_decode_as_openais_with_replacement_characters(genuine, openai, ids):
    assert genuine.decode(ids) == openai.decode(ids, errors="replace")


def test_all_256_bytes_have_a_token_of_their_own(genuine):
    ids = [genuine.encoder[character] for character in genuine.byte_encoder.values()]
    assert sorted(ids) == list(range(256))
    assert {genuine.byte_decoder[genuine.decoder[i]] for i in ids} == set(range(256))


def test_endoftext_in_a_prompt_is_ordinary_text(genuine):
    assert genuine.encoder["<|endoftext|>"] == 50256
    assert 50256 not in genuine.encode("<|endoftext|>")
    assert genuine.decode([50256]) == "<|endoftext|>"


def test_a_lone_surrogate_is_an_error(genuine):
    with pytest.raises(UnicodeEncodeError):
        genuine.encode("caf\udce9")


def test_bpe_ranks_hold_the_merges_in_order(genuine):
    assert len(genuine.bpe_ranks) == 50000
    assert genuine.bpe_ranks["Ġ", "t"] == 0
    assert genuine.bpe_ranks["Ġ", "a"] == 1


def textbook_merge(symbols, ranks):
    """Sennrich et al., algorithm 1: find the best pair of the whole word, join it wherever it stands, start over."""
    while True:
        ranked = [(ranks[pair], pair) for pair in itertools.pairwise(symbols) if pair in ranks]
        if not ranked:
            return symbols
        _, (first, second) = min(ranked)
        joined, i = [], 0
        while i < len(symbols):
            if symbols[i : i + 2] == [first, second]:
                joined.append(first + second)
                i += 2
            else:
                joined.append(symbols[i])
                i += 1
        symbols = joined


pieces = st.text("ab", min_size=1, max_size=4)


@given(st.text("ab", max_size=30), st.lists(st.tuples(pieces, pieces), unique=True, max_size=20))
def test_merges_are_the_textbooks_for_any_ranks(word, pairs):
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    ranks_of_lines = {" ".join(pair): rank for pair, rank in ranks.items()}
    assert encoder.merge(word, ranks_of_lines) == textbook_merge(list(word), ranks)


@pytest.mark.parametrize("alphabet", ["a", "ab", string.ascii_lowercase, "é", "中文字"])
def test_a_word_ten_times_as_long_takes_about_ten_times_as_long(alphabet, genuine):
    word = "".join(random.Random(0).choices(alphabet, k=300_000))
    tenth, _ = timed(genuine.encode, word[:30_000])
    whole, ids = timed(genuine.encode, word)
    assert whole < 40 * tenth  # were it quadratic in the length, 100
    assert genuine.decode(ids) == word


@pytest.mark.parametrize("alphabet", ["a", string.ascii_lowercase])
def test_a_word_takes_at_most_twenty_times_its_size_in_memory(alphabet):
    code = f"""
import random, resource
from encoder import get_encoder
encoder = get_encoder({GENUINE.name!r}, {str(GENUINE.parent)!r})
word = "".join(random.Random(0).choices({alphabet!r}, k=5_000_000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encoder.encode(word)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(word))
"""
    result = command(code=code, cwd=REPO)
    assert float(result.stdout) < 20, result.stderr


def timed(function, text):
    """(seconds of this process, the result): other processes take none of them, so only ratios are held to limits."""
    start = time.process_time()
    result = function(text)
    return time.process_time() - start, result


def test_a_megabyte_of_english_takes_about_five_times_as_long_as_cutting_it_into_words(genuine):
    text = "\n".join(pydoc_data.topics.topics.values())  # 700 KB of prose and code that comes with Python
    text = (text + text.upper())[:1_000_000]
    fresh = encoder.get_encoder(GENUINE.name, GENUINE.parent)
    words, _ = timed(encoder.PATTERN.findall, text)
    whole, ids = timed(fresh.encode, text)
    assert whole < 25 * words
    assert fresh.decode(ids) == text


def test_the_cache_of_words_is_bounded(genuine):
    genuine.encode(" ".join(map("".join, itertools.product(string.ascii_letters, repeat=3))))  # 140,608 words
    cache = genuine.bpe_of_short_word.cache_info()
    assert cache.currsize == cache.maxsize == 2**16
    genuine.encode("averylongword" * 10)
    assert genuine.bpe_of_short_word.cache_info().misses == cache.misses  # long words do not enter it
