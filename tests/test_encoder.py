"""The tokenizer against tiktoken on GPT-2's genuine vocabulary, and its merges against the textbook's loop."""

import concurrent.futures
import copy
import itertools
import json
import multiprocessing
import os
import pickle
import pydoc_data.topics
import random
import string
import time
import unicodedata

import pytest
import tiktoken
from conftest import GENUINE, REPO, assert_one_line_error, command, needs_posix, write_tokenizer
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
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


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


@given(st.text("aein中😀", min_size=40, max_size=200))
def test_ids_of_long_words_are_openais(genuine, openai, word):
    assert genuine.encode(word) == openai.encode_ordinary(word)


@given(st.lists(st.integers(0, 50256), max_size=20))
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


@given(st.lists(st.sampled_from(["<|endoftext|>", "<|endof", "|>", "<|x|>", "a", " ", "\n", "  b", "'s", "中"])))
def test_ids_of_endoftext_where_it_is_allowed_are_openais(genuine, openai, parts):
    text = "".join(parts)
    ids = openai.encode(text, allowed_special="all")
    assert genuine.encode(text, allowed_special="all") == ids
    assert genuine.encode(text, allowed_special={"<|endoftext|>"}) == ids
    assert genuine.decode(ids) == text


@pytest.fixture
def chat(tmp_path):
    """A vocabulary with special tokens of its own, one within another: 400 tokens, and two."""
    write_tokenizer(tmp_path, 400)
    path = tmp_path / "encoder.json"
    tokens = [*json.loads(path.read_text("utf-8")), "<|user|>", "<|user|>s|>"]
    path.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    return encoder.get_encoder(tmp_path.name, tmp_path.parent)


def test_any_token_in_bars_and_brackets_may_be_allowed_and_the_others_stay_text(chat):
    text = "<|user|>Hi<|endoftext|>"
    assert chat.special_tokens == {"<|user|>", "<|user|>s|>", "<|endoftext|>"}
    assert chat.encode(text, "all") == [400, *chat.encode("Hi"), 399]
    assert chat.encode(text, ["<|user|>"]) == [400, *chat.encode("Hi<|endoftext|>")]
    assert chat.encode("<|endoftext|>", ["<|user|>"]) == chat.encode("<|endoftext|>")
    assert not {399, 400} & {*chat.encode(text)}


def test_a_token_that_merges_make_or_without_bars_and_brackets_is_not_special():
    bytes_of_text = [*encoder.bytes_to_unicode().values()]
    tokens = [*bytes_of_text, "<|", "|>", "<||>", "<|endoftext|>", "[PAD]", "</s>"]
    made = encoder.Encoder({token: i for i, token in enumerate(tokens)}, ["< |", "| >", "<| |>"])
    assert made.special_tokens == {"<|endoftext|>"}
    assert made.encode("[PAD]</s>", "all") == made.encode("[PAD]</s>")
    assert made.encode("x<||>>", "all") == made.encode("x<||>>")


def test_of_two_special_tokens_the_longer_one_is_read(chat):
    assert chat.encode("<|user|>s|>", "all") == [401]


@pytest.mark.parametrize("allowed", [{"<|endoftext|>", "<|pad|>"}, ["the"], "<|endoftext|>"])
def test_to_allow_what_is_no_special_token_of_the_vocabulary_is_an_error(genuine, allowed):
    with pytest.raises(ValueError, match=r"is no special token of this vocabulary, which has <\|endoftext\|>"):
        genuine.encode("Hi", allowed)


def test_a_lone_surrogate_is_an_error(genuine):
    with pytest.raises(UnicodeEncodeError):
        genuine.encode("caf\udce9")


def test_bpe_ranks_hold_the_merges_in_order(genuine):
    assert len(genuine.bpe_ranks) == 50000
    assert genuine.bpe_ranks["Ġ", "t"] == 0
    assert genuine.bpe_ranks["Ġ", "a"] == 1


# into other processes and threads


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])  # noqa: S301
def test_an_encoder_that_was_pickled_or_copied_is_as_before(genuine, copied):
    ids = genuine.encode(NASTY[8])
    same = copied(genuine)
    assert same.bpe_of_short_word.cache_info().currsize == 0 < genuine.bpe_of_short_word.cache_info().currsize
    assert same.encode(NASTY[8]) == ids
    assert same.decode(ids) == NASTY[8]
    assert (same.encoder, same.bpe_ranks, same.errors) == (genuine.encoder, genuine.bpe_ranks, genuine.errors)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_of_processes_encodes_as_this_one(genuine, method):
    if method == "fork":
        needs_posix("fork")
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(genuine.encode, NASTY) == [*map(genuine.encode, NASTY)]


def test_threads_share_an_encoder(genuine):
    fresh = copy.copy(genuine)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert [*threads.map(fresh.encode, NASTY * 5)] == [genuine.encode(text) for text in NASTY] * 5


# the loop, and how long it takes


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


@given(word=st.text("ab", max_size=30), pairs=st.lists(st.tuples(pieces, pieces), unique=True, max_size=20))
@pytest.mark.parametrize("merge", [encoder.merge, encoder.merge_long])
def test_merges_are_the_textbooks_for_any_ranks(merge, word, pairs):
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    ranks_of_lines = {" ".join(pair): rank for pair, rank in ranks.items()}
    assert merge(word, ranks_of_lines) == textbook_merge(list(word), ranks)


@pytest.mark.parametrize("alphabet", ["a", "ab", string.ascii_lowercase, "é", "中文字"])
def test_a_word_ten_times_as_long_takes_at_most_thirty_times_as_long(alphabet, genuine):
    word = "".join(random.Random(0).choices(alphabet, k=100_000))
    ten_words = [word[:10_000]] * 10  # of one alone the clock of Windows, which ticks 64 times a second, says little
    assert fastest(genuine.encode, word) < 3 * fastest(lambda words: [*map(genuine.encode, words)], ten_words)
    assert genuine.decode(genuine.encode(word)) == word


@pytest.mark.parametrize("alphabet", ["a", string.ascii_lowercase])
def test_a_word_takes_at_most_twenty_times_its_size_in_memory(alphabet):
    needs_posix("getrusage")
    code = f"""
import random, resource
from encoder import get_encoder
encoder = get_encoder({GENUINE.name!r}, {str(GENUINE.parent)!r})
word = "".join(random.Random(0).choices({alphabet!r}, k=1_000_000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encoder.encode(word)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(word))
"""
    result = command(code=code, cwd=REPO)
    assert float(result.stdout) < 20, result.stderr


def test_a_megabyte_of_english_takes_at_most_twenty_times_as_long_as_cutting_it_into_words(genuine):
    text = "\n".join(pydoc_data.topics.topics.values())  # 700 KB of prose and code that comes with Python
    text = (text + text.upper())[:1_000_000]
    assert fastest(encoder.get_encoder(GENUINE.name, GENUINE.parent).encode, text, 1) < 20 * fastest(
        encoder.PATTERN.findall, text
    )
    assert genuine.decode(genuine.encode(text)) == text


def fastest(function, text, n=3):
    """Seconds of this process in the best of n calls: what else runs takes none but slows it, so ratios are held."""
    seconds = []
    for _ in range(n):
        start = time.process_time()
        function(text)
        seconds.append(time.process_time() - start)
    return min(seconds)


def test_the_cache_of_words_is_bounded(genuine):
    genuine.encode(" ".join(map("".join, itertools.product(string.ascii_letters, repeat=3))))  # 140,608 words
    cache = genuine.bpe_of_short_word.cache_info()
    assert cache.currsize == cache.maxsize == 2**16
    genuine.encode("averylongword" * 10)
    assert genuine.bpe_of_short_word.cache_info().misses == cache.misses  # long words do not enter it


@pytest.mark.parametrize(
    ("name", "whole", "damaged", "said"),
    [
        ("vocab.bpe", b"\nTh is\n", b"\n", "vocab.bpe has no merge for 1 tokens of encoder.json, such as 'This'"),
        ("encoder.json", b'"This":', b'"That is":', "vocab.bpe makes tokens that encoder.json lacks, such as 'This'"),
    ],
)
def test_a_damaged_file_of_gpt2s_vocabulary_is_an_error_beside_the_other_whole_one(
    name, whole, damaged, said, tmp_path
):
    for file in ("encoder.json", "vocab.bpe"):
        data = (GENUINE / file).read_bytes()
        (tmp_path / file).write_bytes(data.replace(whole, damaged) if file == name else data)
    with pytest.raises(ValueError, match=said):
        encoder.get_encoder(tmp_path.name, tmp_path.parent)


# python encoder.py


def cut(*args, **kwargs):
    """What python encoder.py prints with GPT-2's own vocabulary."""
    done = command(*args, "--model_size", GENUINE.name, "--models_dir", GENUINE.parent, script="encoder.py", **kwargs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\n", "").isprintable()
    return done.stdout.splitlines()


def test_the_command_prints_each_token_with_its_id():
    assert cut("Not all heroes wear capes.") == [
        "  3673  'Not'",
        "   477  ' all'",
        " 10281  ' heroes'",
        "  5806  ' wear'",
        "  1451  ' cap'",
        "   274  'es'",
        "    13  '.'",
    ]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0").filter(assigned), max_size=30) | near_the_pattern)
def test_the_lines_of_a_word_are_its_tokens_and_spell_it(genuine, openai, text):
    for word in encoder.PATTERN.findall(text):
        ids = openai.encode_ordinary(word)
        lines = [line.split(maxsplit=1) for line in encoder.lines(word, ids, genuine)]
        assert [int(i) for i, _ in lines] == ids
        shown = [text.partition(" of ")[0] if text[0] not in "'\"" else text for _, text in lines]
        in_bytes = [eval(text).encode() if text[0] in "'\"" else bytes.fromhex(text) for text in shown]  # noqa: S307
        assert in_bytes == [openai.decode_single_token_bytes(i) for i in ids]


def test_the_command_shows_spaces_line_breaks_and_controls_and_prints_none_raw(openai):
    text = "a\x1b[31m  b\n\n\u202e\u009b"
    lines = [line.split(maxsplit=1) for line in cut(text)]
    assert [int(i) for i, _ in lines] == openai.encode_ordinary(text)
    assert [shown for _, shown in lines] == [
        *("'a'", "'\\x1b'", "'['", "'31'", "'m'", "' '", "' b'", "'\\n'", "'\\n'"),
        *("e280 of '\\u202e'", "ae of '\\u202e'", "c2 of '\\x9b'", "9b of '\\x9b'"),
    ]


def test_the_command_shows_the_merges_of_each_word_in_turn(genuine):
    ranks = genuine.bpe_ranks
    assert cut("the 六", "--merges") == [
        "        't' 'h' 'e'",
        f"        't' 'he'  (merge {ranks['h', 'e']})",
        f"        'the'  (merge {ranks['t', 'he']})",
        "  1169  'the'",
        "        ' ' e5 85 ad",
        f"        20e5 85 ad  (merge {ranks['Ġ', 'å']})",
        " 10263  20e5 of ' 六'",
        "   227  85 of '六'",
        "   255  ad of '六'",
    ]


@pytest.mark.parametrize(("flags", "ids"), [([], [27, 91, 437, 1659, 5239, 91, 29]), (["--special"], [50256])])
def test_the_command_reads_endoftext_as_a_token_where_it_is_told_to(flags, ids):
    assert [int(line.split()[0]) for line in cut("<|endoftext|>", *flags)] == ids


def test_the_command_reads_a_pipe():
    assert cut(input="Not all\n") == ["  3673  'Not'", "   477  ' all'"]


def test_without_124m_the_command_says_that_it_takes_shakespeare():
    done = command("Romeo", script="encoder.py")
    assert "124M is not here, so this is how shakespeare cuts it\n" in done.stderr
    assert done.stdout == command("Romeo", "--model_size=shakespeare", script="encoder.py").stdout != ""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ["x", "--model_size=124M", "--models_dir=/nowhere"],
            f"no encoder.json and vocab.bpe in {os.path.join('/nowhere', '124M')!r}",
        ),
        (["x", "--model_size=../models/shakespeare"], "'../models/shakespeare' is no model name"),
        ([b"caf\xe9", "--model_size=shakespeare"], "not valid Unicode text"),
        (["x", "--model_size=\x1b[31m"], repr(os.path.join("models", "\x1b[31m"))[1:]),
    ],
)
def test_mistakes_are_told_in_one_line(args, said):
    assert_one_line_error(command(*args, script="encoder.py"), said)
