"""The flags of python gpt2.py that change how text is made, where prompts come from, and how text is shown."""

import functools
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
import types

import pexpect
import pytest
from conftest import TIMEOUT, N, assert_one_line_error, fifo, interrupt, on_a_terminal, running, wait_until
from hypothesis import given
from hypothesis import strategies as st

import cli
import gpt2
import utils


@pytest.fixture(scope="module")
def encoder(models_dir):
    return utils.load_encoder_hparams_and_params("tiny", models_dir)[0]


# Sampling


def test_sampling_flags_are_those_of_generate(run, continuation):
    result = run("Hello", "--temperature=1.5", "--top_k=50", "--top_p=0.9", "--seed=3")
    assert result.stdout == continuation("Hello", temperature=1.5, top_k=50, top_p=0.9, seed=3) + "\n"
    assert result.stdout != continuation("Hello") + "\n"


def test_the_same_seed_prints_the_same_text(run):
    outputs = [run("Hello", "--temperature=1", f"--seed={seed}").stdout for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    "flag", ["--temperature=-1", "--temperature=hot", "--top_k=-1", "--top_p=0", "--top_p=2", "--seed=x", "--seed=-1"]
)
def test_a_value_out_of_range_is_an_error_that_names_it(flag, run):
    name, value = flag[2:].split("=")
    error = run("Hello", flag)
    assert_one_line_error(error, f"gpt2.py: --{name} must be")
    assert value in error.stderr


def test_samples_stand_under_numbered_headings_and_are_drawn_with_seeds_in_a_row(run, continuation):
    bar = "=" * 40
    expected = [f"{bar} SAMPLE {i} {bar}\n{continuation('Hello', temperature=1, seed=4 + i)}\n" for i in (1, 2, 3)]
    assert run("Hello", "--n_samples=3", "--temperature=1", "--seed=5").stdout == "".join(expected)


@pytest.mark.parametrize("n", ["0", "-1", "2.5", "x", "True", "9" * 20])
def test_n_samples_must_be_a_positive_whole_number(n, run):
    assert_one_line_error(run("Hello", f"--n_samples={n}"), "--n_samples must be a whole number from 1 to 1000, not")


# Stopping


def test_text_ends_before_the_stop_text(run, continuation):
    text = continuation("Hello")
    stop = text[7:10]
    assert run("Hello", "--stop", stop).stdout == text[: text.index(stop)] + "\n"


def test_the_first_of_several_stop_texts_ends_it(run, continuation):
    text = continuation("Hello")
    stops = [text[15:18], text[7:10], "never"]
    end = min(text.index(stop) for stop in stops[:2])
    assert run("Hello", "--stop", repr(stops)).stdout == text[:end] + "\n"


@pytest.mark.parametrize("typed", ["1984", "[1]", "[a, b]", "True", "User:"])
def test_a_stop_text_stays_the_text_that_was_typed(typed):
    assert cli.stop_texts(typed) == [typed]


def test_a_line_break_may_be_typed_as_in_a_list():
    assert cli.stop_texts(r"\n\nUser:") == ["\n\nUser:"]


@pytest.mark.parametrize("typed", ["['a', 1]", "['", '["a",', '["a"', "", '["a", ""]', "['a'] + ['b']"])
def test_a_stop_that_is_neither_a_text_nor_a_list_of_them_is_an_error(typed):
    with pytest.raises(SystemExit, match=r"--stop (must be|is not) a (text, or a )?list of texts"):
        cli.stop_texts(typed)


def test_a_list_of_texts_is_several():
    assert cli.stop_texts('["User:", "\\n"]') == ["User:", "\n"]


def test_a_stop_text_that_is_no_unicode_is_an_error(run):
    assert_one_line_error(run("Hello", "--stop", b"caf\xe9"), "stop is not valid Unicode")


def test_endoftext_stops_at_its_token(encoder):
    ids = [*encoder.encode("the end"), encoder.encoder["<|endoftext|>"], *encoder.encode("more")]
    assert "".join(cli.text_pieces(ids, encoder, ["<|endoftext|>"])) == "the end"


def test_endoftext_in_a_prompt_is_text_unless_special_tokens_are_asked_for(run, encoder, models_dir, continuation):
    assert run("one<|endoftext|>two").stdout == continuation("one<|endoftext|>two") + "\n"
    _, hparams, params = utils.load_encoder_hparams_and_params("tiny", models_dir)
    ids = [*encoder.encode("one"), encoder.encoder["<|endoftext|>"], *encoder.encode("two")]
    text = encoder.decode(gpt2.generate(ids, params, hparams["n_head"], N))
    assert run("one<|endoftext|>two", "--special").stdout == text + "\n"
    assert json.loads(run("--prompts_file=-", "--special", input="one<|endoftext|>two\n").stdout)["text"] == text


# Both look for stop texts: Writer.ends in the last tokens, to end generation, and text_pieces in all, to cut the text.
texts = st.text("Usr:e é😀\n", max_size=30)


@given(texts, st.lists(st.text("Usr:e é😀\n", min_size=1, max_size=6), min_size=1, max_size=3), st.randoms())
def test_stop_texts_are_found_whatever_the_boundaries_of_tokens(encoder, text, stops, random):
    ids = in_random_tokens(text, encoder, random)
    assert "".join(cli.text_pieces(ids, encoder, stops)) == cut(text, stops)
    writer = cli.Writer(encoder, generate=None, generate_ids=None, stop=stops)
    stopped = next((n for n in range(1, len(ids) + 1) if writer.ends(ids[:n])), None)
    assert (stopped is not None) == (cut(text, stops) != text)
    if stopped:
        assert any(stop in encoder.decode(ids[:stopped]) for stop in stops)
        assert not any(stop in encoder.decode(ids[: stopped - 1]) for stop in stops)


def cut(text, stops):
    """The definition: letter by letter, until the text so far ends with a stop text."""
    for end in range(len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)]
    return text


def in_random_tokens(text, encoder, random):
    """The ids of text, cut into pieces anywhere between its bytes before the merges."""
    symbols, ids = [encoder.byte_encoder[byte] for byte in text.encode()], []
    while symbols:
        n = random.randint(1, 4)
        token = "".join(symbols[:n])
        n, token = (n, token) if token in encoder.encoder else (1, symbols[0])
        ids.append(encoder.encoder[token])
        del symbols[:n]
    return ids


# Streaming


@given(
    st.lists(st.integers(0, 498), max_size=40) | texts, st.lists(st.sampled_from(["é", "User:", "\n\n"])), st.randoms()
)
def test_streamed_pieces_make_up_the_text(encoder, ids, stops, random):
    ids = in_random_tokens(ids, encoder, random) if isinstance(ids, str) else ids
    pieces = list(cli.text_pieces(ids, encoder, stops))
    assert "".join(pieces) == cut(encoder.decode(ids), stops)


def test_a_piece_is_given_out_as_soon_as_it_cannot_change(encoder):
    ids = [encoder.encoder[encoder.byte_encoder[byte]] for byte in "a😀b\nU\n".encode()]
    pieces = list(cli.text_pieces(ids, encoder, ["\nUser:"]))
    assert pieces == ["a", "", "", "", "😀", "b", "", "", "\nU", "\n"]


def test_stream_prints_the_same_text(run, continuation):
    result = run("平方 é 😀", "--stream", "--temperature=1", "--seed=1")
    assert (result.stdout, result.stderr) == (continuation("平方 é 😀", temperature=1, seed=1) + "\n", "")


def test_stream_prints_text_as_it_is_made(long):
    with running("Hello", "--stream", model=long, n=190_000) as process:
        assert len(process.stdout.read(5)) == 5  # while 190,000 tokens are far from done
        interrupt(process)
        process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130


# Standard input


@pytest.mark.parametrize("args", [["-"], []], ids=["-", "no prompt"])
def test_the_prompt_may_come_from_standard_input(args, run, continuation):
    assert run(*args, input="two\nlines\n").stdout == continuation("two\nlines") + "\n"


@pytest.mark.parametrize(
    ("data", "encoding", "said"),
    [
        (b"caf\xe9", "utf-8", "gpt2.py: standard input is not UTF-8 text: convert it, or set PYTHONIOENCODING"),
        (b"\xff\n", "gbk", "cannot be read, as gbk: not valid Unicode text"),
        (b"a", "utf-16", "cannot be read, as utf-16: not valid Unicode text"),  # without the mark that it begins with
    ],
)
def test_standard_input_that_is_no_text_is_an_error(data, encoding, said, tiny):
    with running("-", model=tiny, n=N, env={"PYTHONIOENCODING": encoding}) as process:
        stdout, stderr = process.communicate(data, TIMEOUT)
    assert said in stderr.decode(encoding)
    assert (stderr.decode(encoding).count("\n"), stdout.strip(b"\xff\xfe"), process.returncode) == (1, b"", 1)


# A file of prompts


PROMPTS = ["Hello", "", "平方 é 😀", "a much longer prompt than the others of this file are", "1984", "Hello", "x" * 30]
PROMPTS += ["[1, 2]", "the ninth prompt begins another batch", "-"]


def test_a_line_of_json_answers_each_line_as_if_it_were_alone(run, tmp_path, continuation):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", "utf-8")
    result = run("--prompts_file", tmp_path / "prompts.txt")
    assert result.stderr == ""
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"prompt": prompt, "text": continuation(prompt), "n_tokens": N, "finish_reason": "length"} for prompt in PROMPTS
    ]


def test_prompts_may_come_from_standard_input_and_be_sampled(run, continuation):
    result = run("--prompts_file=-", "--temperature=1", "--seed=2", input="one\ntwo\n")
    texts = [json.loads(line)["text"] for line in result.stdout.splitlines()]
    assert texts == [continuation(prompt, temperature=1, seed=2) for prompt in ("one", "two")]


def test_a_line_ends_at_a_line_break_and_nowhere_else(run):
    lines = run("--prompts_file=-", input="a\u2028b\x0cc\r\nd").stdout.rstrip("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == ["a\u2028b\x0cc", "d"]


def test_only_the_end_of_a_line_and_the_mark_before_the_first_are_left_out(run):
    lines = run("--prompts_file=-", input="\ufeffone\n\ufefftwo\nthree\r").stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "\ufefftwo", "three\r"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_as_powershell_writes_it_is_read(encoding, run, tmp_path, continuation):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n平方 é 😀\u2028\r\n".encode(encoding))
    lines = run("--prompts_file", tmp_path / "p.txt").stdout.rstrip("\n").split("\n")
    answers = [(answer["prompt"], answer["text"]) for answer in map(json.loads, lines)]
    assert answers == [(prompt, continuation(prompt)) for prompt in ("one", "平方 é 😀\u2028")]
    assert run("-", input=(tmp_path / "p.txt").read_bytes()).stdout == continuation("one\r\n平方 é 😀\u2028") + "\n"


def test_utf_16_that_is_cut_within_a_character_is_an_error(run, tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\n".encode("utf-16-le")[:-1])
    result = run("--prompts_file", tmp_path / "p.txt")
    assert_one_line_error(result, "p.txt cannot be read, as utf-16: not valid Unicode")


def test_an_empty_file_of_prompts_is_done_at_once(run):
    assert run("--prompts_file=-", input="").stdout == ""


def test_the_reason_for_stopping_is_told(run, continuation):
    stop = continuation("one")[4:7]
    first, second = map(json.loads, run("--prompts_file=-", "--stop", stop, input="one\ntwo\n").stdout.splitlines())
    assert first["finish_reason"] == "stop"
    assert first["n_tokens"] < N
    assert first["text"] == continuation("one").split(stop)[0]
    assert second["finish_reason"] == ("stop" if stop in continuation("two") else "length")


def test_a_line_that_cannot_be_continued_says_why_and_the_others_are(run, continuation):
    result = run("--prompts_file=-", input=b"one\n" + b"x y " * 99 + b"\ncaf\xe9\ntwo\n")
    one, long, no_text, two = map(json.loads, result.stdout.splitlines())
    assert (one["text"], two["text"]) == (continuation("one"), continuation("two"))
    assert "more than the model's context" in long["error"]
    assert no_text == {"prompt": "caf\ufffd", "error": "not valid Unicode text: it must be UTF-8"}
    assert result.stderr == 'gpt2.py: 2 of 4 prompts could not be continued: their lines have an "error"\n'
    assert result.returncode == 1


def test_a_file_is_read_as_it_is_needed(tiny):
    with running("--prompts_file=-", "--batch_size=2", model=tiny, n=N) as process:
        process.stdin.write(b"prompt\n" * 8)  # four batches, among which prompts are sorted by length
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["prompt"] == "prompt"  # while more may come


def test_a_file_that_is_not_there_is_an_error(run):
    assert_one_line_error(run("--prompts_file", "/nowhere"), "/nowhere cannot be read: No such file")


def test_a_folder_in_place_of_a_file_is_an_error_that_says_so(run, tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    error = run("--prompts_file", tmp_path / "p.txt", "--out", tmp_path)
    assert_one_line_error(error, f"{tmp_path} cannot be added to: it is a folder\n")
    assert_one_line_error(run("--prompts_file", tmp_path), f"{tmp_path} cannot be read: it is a folder\n")


def test_a_killed_job_loses_nothing_that_it_printed(long, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(200)))
    args, out = ["--prompts_file", tmp_path / "prompts.txt", "--batch_size=4"], tmp_path / "out"
    with out.open("wb") as stdout, running(*args, model=long, n=300, stdout=stdout):
        wait_until(lambda: out.read_bytes().count(b"\n") >= 20)
    lines = out.read_text("utf-8").splitlines()
    assert 20 <= len(lines) < 200
    assert [json.loads(line)["prompt"] for line in lines] == [f"prompt {i}" for i in range(len(lines))]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_come_in_the_order_of_the_prompts_whatever_the_batches(batch_size, run, continuation):
    result = run("--prompts_file=-", "--batch_size", batch_size, input="\n".join(PROMPTS))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(answer["prompt"], answer["text"]) for answer in answers] == [(p, continuation(p)) for p in PROMPTS]


def test_several_samples_of_each_prompt_are_drawn_with_seeds_in_a_row(run, continuation):
    draws = ["--n_samples=2", "--temperature=1", "--seed=3"]
    one, two = map(json.loads, run("--prompts_file=-", *draws, input="one\ntwo\n").stdout.splitlines())
    for answer in (one, two):
        texts = [continuation(answer["prompt"], temperature=1, seed=seed) for seed in (3, 4)]
        assert [sample["text"] for sample in answer["samples"]] == texts


def test_more_samples_than_a_batch_holds_are_made_all_the_same(run):
    result = run("--prompts_file=-", "--n_samples=3", "--batch_size=2", "--temperature=1", input="one\n")
    assert [len(json.loads(line)["samples"]) for line in result.stdout.splitlines()] == [3]


class Noting:
    """A Writer that says nothing, and notes how many texts are made at once."""

    def __init__(self):
        self.sizes = []

    def encode(self, prompt):
        return [0]

    def answers(self, prompts, seeds):
        self.sizes.append(len(prompts))
        return [{"text": ""}] * len(prompts)


@pytest.mark.parametrize(
    ("batch_size", "n_samples", "sizes"), [(None, 1, [32, 8]), (None, 5, [30] * 6 + [20]), (4, 1, [4] * 10)]
)
def test_thirty_two_texts_are_made_at_once_unless_told_otherwise(batch_size, n_samples, sizes, capsys):
    writer = Noting()
    cli.answer_file(writer, io.BytesIO(b"x\n" * 40), "prompts.txt", None, batch_size, n_samples, None)
    assert writer.sizes == sizes
    assert len(capsys.readouterr().out.splitlines()) == 40


def test_answers_of_an_earlier_run_do_not_stay_beside_new_ones(run, tmp_path):
    earlier = {"prompt": "one", "text": "old", "n_tokens": 1, "finish_reason": "stop", "samples": [{"text": "old"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(earlier) + "\n")
    (answer,) = map(json.loads, run("--prompts_file", tmp_path / "p.jsonl").stdout.splitlines())
    assert answer.keys() == {"prompt", "text", "n_tokens", "finish_reason"}
    assert (answer["n_tokens"], answer["finish_reason"]) == (N, "length")


@pytest.mark.parametrize("seed", ["[1,2]", "(1,2)", "1.5"])
def test_a_seed_that_is_no_whole_number_is_an_error(seed, run):
    result = run("Hello", "--temperature=1", f"--seed={seed}")
    assert_one_line_error(result, "seed must be a whole number, 0 or more, not")


def test_a_stop_text_that_falls_on_the_last_token_is_why_the_text_ended(run, continuation):
    stop = continuation("Hello")[-1]
    n = next(n for n in range(1, N + 1) if stop in continuation("Hello", n))
    (answer,) = map(json.loads, run("--prompts_file=-", "--stop", stop, input="Hello\n", n=n).stdout.splitlines())
    assert (answer["n_tokens"], answer["finish_reason"]) == (n, "stop")


def test_what_stands_beside_a_prompt_in_jsonl_is_carried_through(run, tmp_path, continuation):
    (tmp_path / "p.jsonl").write_text('{"id": 7, "prompt": "one", "of": [1, {"a": null}]}\n')
    (answer,) = map(json.loads, run("--prompts_file", tmp_path / "p.jsonl").stdout.splitlines())
    assert {key: answer[key] for key in ("id", "of")} == {"id": 7, "of": [1, {"a": None}]}
    assert answer["text"] == continuation("one")


@pytest.mark.parametrize(
    "line", ["no json", '"one"', '{"text": "one"}', '{"prompt": 1}', "[" * 100_000], ids=lambda line: line[:9]
)
def test_a_line_of_jsonl_that_holds_no_prompt_says_so(line, run, tmp_path, continuation):
    (tmp_path / "p.jsonl").write_text(line + '\n{"prompt": "one"}\n')
    result = run("--prompts_file", tmp_path / "p.jsonl")
    bad, good = map(json.loads, result.stdout.splitlines())
    assert bad["prompt"] == line
    assert "JSON" in bad["error"] or '"prompt"' in bad["error"]
    assert good["text"] == continuation("one")
    assert result.returncode == 1


def test_blank_lines_of_jsonl_are_passed_over(run, tmp_path, continuation):
    (tmp_path / "p.jsonl").write_text('\n{"prompt": "one"}\n \r\n{"prompt": "two"}\n\n')
    result = run("--prompts_file", tmp_path / "p.jsonl")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == [
        continuation("one"),
        continuation("two"),
    ]
    assert result.returncode == 0


def test_a_job_with_a_file_to_append_to_goes_on_where_it_was_killed(run, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS), "utf-8")
    args, out = ["--prompts_file", tmp_path / "p.txt", "--out", tmp_path / "out.jsonl"], tmp_path / "out.jsonl"
    assert run(*args).stdout == ""
    whole = out.read_text("utf-8")
    assert [json.loads(line)["prompt"] for line in whole.splitlines()] == PROMPTS
    first, *others = whole.splitlines()
    kept = json.dumps({**json.loads(first), "text": "kept"})
    out.write_text("\n".join([kept, *others[:3], '{"prompt": "19']), "utf-8")
    assert run(*args).returncode == 0
    assert out.read_text("utf-8").splitlines() == [kept, *others]  # what is done is not done again
    done = run(*args)
    assert done.stderr == f"gpt2.py: {out} has answers to all of these prompts, and stays as it is\n"
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_ctrl_c_says_where_a_job_with_a_file_to_append_to_goes_on(encoding, tiny, tmp_path):
    args, out = ["--prompts_file=-", "--batch_size=2", "--out", tmp_path / "诗.jsonl"], tmp_path / "诗.jsonl"
    with running(*args, model=tiny, n=N, env={"PYTHONIOENCODING": encoding}) as process:
        process.stdin.write(b"one\n" * 8)
        process.stdin.flush()
        wait_until(lambda: out.exists() and out.read_text("utf-8").count("\n") == 8)
        interrupt(process)
        _, stderr = process.communicate(timeout=TIMEOUT)
    said = f"\ngpt2.py: stopped; the same command goes on behind the last line of {out}\n"
    assert (process.returncode, stderr) == (130, said.encode(encoding, "backslashreplace"))


def test_what_is_no_unicode_comes_through_and_a_line_cut_within_a_character_is_done_again(run, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out"
    prompts.write_text('{"prompt": "one", "id": "\\ud83d"}\n{"prompt": "\u4f60"}\n', "utf-8")
    for _ in range(2):
        assert run("--prompts_file", prompts, "--out", out).returncode == 0
        first, second = out.read_bytes().splitlines()
        assert json.loads(first)["id"] == "\ud83d"
        assert json.loads(second)["prompt"] == "\u4f60"
        out.write_bytes(first + b"\n" + second[:14])


def test_answers_may_be_prompts_again(run, tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / "once.jsonl").write_text(run("--prompts_file", tmp_path / "p.txt").stdout, "utf-8")
    for _ in range(2):
        assert run("--prompts_file", tmp_path / "once.jsonl", "--out", tmp_path / "twice.jsonl").returncode == 0
    assert (tmp_path / "once.jsonl").read_text("utf-8") == (tmp_path / "twice.jsonl").read_text("utf-8")


def test_errors_that_were_there_before_still_count(run, tmp_path):
    (tmp_path / "p.jsonl").write_text("{}\n")
    for _ in range(2):
        result = run("--prompts_file", tmp_path / "p.jsonl", "--out", tmp_path / "out")
        assert "1 of 1 prompts could not be continued" in result.stderr
        assert result.returncode == 1
    assert (tmp_path / "out").read_text().count("\n") == 1


ODD = ['{"prompt": "another", "text": ""}\n', '{"prompt": "one"}\n', "no json\n", "[]\n", "5\n", "\xff\n", "{}\n" * 3]


@pytest.mark.parametrize("there", [*ODD, "[" * 100_000 + "\n"], ids=lambda there: there[:9])
def test_a_file_that_answers_other_prompts_is_left_alone(there, run, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    (tmp_path / "out").write_text(there, "latin-1")
    assert_one_line_error(run("--prompts_file", tmp_path / "p.txt", "--out", tmp_path / "out"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text("latin-1") == there


def test_prompts_are_not_written_into_their_own_file(run, tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    args = ["--prompts_file", tmp_path / "p.txt", "--out", tmp_path / "p.txt"]
    assert_one_line_error(run(*args), "the same file")
    assert (tmp_path / "p.txt").read_text() == "one\n"


def test_two_processes_with_one_file_to_append_to_do_not_mix(run, tiny, tmp_path, continuation):
    args, out = ["--prompts_file=-", "--batch_size=2", "--out", tmp_path / "out"], tmp_path / "out"
    with running(*args, model=tiny, n=N) as process:
        process.stdin.write(b"one\n" * 8)
        process.stdin.flush()
        wait_until(lambda: out.exists() and out.read_text("utf-8").count("\n") == 8)
        second = run(*args, input="one\n" * 9)
        assert_one_line_error(second, f"another process is writing {out}: wait until it has ended, or choose another")
        process.communicate(b"two\n", TIMEOUT)
    assert run(*args, input="one\n" * 8 + "two\nthree\n").returncode == 0
    expected = [(prompt, continuation(prompt)) for prompt in [*["one"] * 8, "two", "three"]]
    assert [(line["prompt"], line["text"]) for line in map(json.loads, out.read_text("utf-8").splitlines())] == expected


def test_answers_go_to_what_cannot_seek_too(run, tmp_path, continuation):
    fifo(tmp_path / "out")
    lines = [run("--prompts_file=-", "--out=/dev/stdout", input="one\n").stdout]
    with subprocess.Popen(["cat", tmp_path / "out"], stdout=subprocess.PIPE) as reader:
        assert run("--prompts_file=-", "--out", tmp_path / "out", input="one\n").stderr == ""
        lines.append(reader.communicate(timeout=TIMEOUT)[0].decode())
    assert [json.loads(line)["text"] for line in lines] == [continuation("one")] * 2


# A file of prompts that is packed


def test_prompts_that_are_packed_have_the_same_answers(run, tmp_path):
    plain = "".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(PROMPTS)).encode()
    for name, data in {
        "p.jsonl": plain,
        "p.JSONL.gz": gzip.compress(plain),
        "p.txt.gz": gzip.compress(b"one\r\n"),
    }.items():
        (tmp_path / name).write_bytes(data)
    results = [run("--prompts_file", tmp_path / name) for name in ("p.jsonl", "p.JSONL.gz", "p.txt.gz")]
    assert [result.returncode for result in results] == [0, 0, 0]
    assert results[0].stdout == results[1].stdout
    assert json.loads(results[2].stdout)["prompt"] == "one"


PACKED = gzip.compress(b"\xef\xbb\xbfone\ntwo\n", mtime=0)


@pytest.mark.parametrize(
    "data",
    [b"one\n", PACKED[:-5], PACKED[:15] + b"x" + PACKED[16:], PACKED + b"x", b"\x1f"],
    ids=["not packed", "cut short", "changed", "more behind it", "a byte"],
)
def test_a_damaged_packed_file_is_an_error(data, run, tmp_path):
    (tmp_path / "p.txt.gz").write_bytes(data)
    error = run("--prompts_file", tmp_path / "p.txt.gz")
    assert_one_line_error(error, "p.txt.gz cannot be read: it is no whole file of gzip: ")


def test_a_packed_file_is_unpacked_as_it_is_read(tmp_path):
    with gzip.open(tmp_path / "p.txt.gz", "wb", 1) as f:
        for _ in range(8):
            f.write(b"%1023d\n" % 1 * 2**10)  # lines of a KiB
    tracemalloc.start()
    lines = cli.prompt_objects(cli.bounded(cli.open_lines(str(tmp_path / "p.txt.gz"))), False)
    assert sum(len(line["prompt"]) == 1023 for line in lines) == 2**13
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21


def test_a_line_that_is_longer_than_any_prompt_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(cli, "LONGEST", 1000)
    lines = b"x" * 1000 + b"\n" + b"one\n" + b"y" * 5000 + b"\ntwo\n" + b"z" * 1001
    first, one, second, two, third = cli.prompt_objects(cli.bounded(io.BufferedReader(io.BytesIO(lines))), False)
    assert (one, two) == ({"prompt": "one"}, {"prompt": "two"})
    for long in (first, second, third):
        assert long["error"] == "more than 1,000 bytes are no prompt"
        assert len(long["prompt"]) == 100


# Log-probabilities


def test_logprobs_tell_of_each_token_and_of_the_likeliest_in_its_place(run, encoder, models_dir):
    _, hparams, params = utils.load_encoder_hparams_and_params("tiny", models_dir)
    plain = run("--prompts_file=-", "--temperature=1", "--seed=3", input="one\ntwo\n").stdout.splitlines()
    result = run(
        "--prompts_file=-", "--temperature=1", "--seed=3", "--logprobs=2", input="one\ntwo\n"
    ).stdout.splitlines()
    for line, answer in zip(map(json.loads, plain), map(json.loads, result), strict=True):
        tokens = answer.pop("logprobs")
        assert answer == line
        ids = encoder.encode(line["prompt"])
        options = {"temperature": 1, "seed": 3, "logprobs": 2}
        for token, (i, logprob, best) in zip(
            tokens, gpt2.generate(ids, params, hparams["n_head"], N, **options), strict=True
        ):
            assert (token["id"], token["token"]) == (i, encoder.decode([i]))
            assert token["logprob"] == pytest.approx(logprob, abs=1e-3)
            assert [top["id"] for top in token["top"]] == [*best]
            assert [top["logprob"] for top in token["top"]] == pytest.approx([*best.values()], abs=1e-3)


def test_logprobs_of_several_samples_are_each_ones_own_and_0_tells_of_no_others(run):
    flags = ["--n_samples=2", "--temperature=1", "--logprobs=0"]
    (answer,) = map(json.loads, run("--prompts_file=-", *flags, input="one\n").stdout.splitlines())
    for sample in answer["samples"]:
        assert len(sample["logprobs"]) == sample["n_tokens"] == N
        assert all(token["top"] == [] for token in sample["logprobs"])


def test_logprobs_of_an_earlier_answer_do_not_stay(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "logprobs": [1]}\n')
    (answer,) = map(json.loads, run("--prompts_file", tmp_path / "p.jsonl").stdout.splitlines())
    assert "logprobs" not in answer


@pytest.mark.parametrize("k", ["-1", "x", "1.5"])
def test_logprobs_that_are_no_whole_number_are_an_error(k, run):
    assert_one_line_error(
        run("--prompts_file=-", f"--logprobs={k}", input="one\n"), "--logprobs must be a whole number"
    )


@pytest.mark.parametrize("flag", ["--out=x", "--batch_size=8", "--batch_size=32", "--logprobs=0"])
def test_a_flag_for_files_of_prompts_is_an_error_without_one(flag, run):
    assert_one_line_error(run("Hello", flag), f"{flag.partition('=')[0]} does nothing without --prompts_file")


# The sliding window


def test_without_the_sliding_window_the_error_names_it(run):
    assert_one_line_error(run("Hello", n=150), "(see --sliding_window)")


def test_the_sliding_window_goes_on_past_the_context(run, continuation):
    result = run("Hello", "--sliding_window", n=150)
    assert result.stdout == continuation("Hello", 150, sliding_window=True) + "\n"


# Flags that do not go together


@pytest.mark.parametrize(
    "args",
    [
        ["Hello", "--stream", "--n_samples=2"],
        ["--interactive", "--n_samples=2"],
        ["--interactive", "--prompts_file=x"],
        ["--prompts_file=x", "--stream"],
        ["--interactive", "--stream", "--n_samples=2"],
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_an_error(args, run):
    assert_one_line_error(run(*args), "do not go together")


@pytest.mark.parametrize("flag", ["--interactive", "--prompts_file=x"])
def test_a_prompt_beside_another_source_of_prompts_is_an_error(flag, run):
    assert_one_line_error(run("Hello", flag), "brings its own prompts")


def test_a_switch_takes_no_word_behind_it(run, continuation):
    assert run("--stream", "Hello").stdout == continuation("Hello") + "\n"
    assert_one_line_error(run("Hello", "--stream=maybe"), "stream must be True or False, not 'maybe'")


# Interactive


PROMPT, CTRL_A, CTRL_C, CTRL_D, CTRL_V = "Model prompt >>> ", "\x01", "\x03", "\x04", "\x16"


@pytest.fixture
def conversation(tiny):
    return functools.partial(on_a_terminal, "--interactive", columns=200, model=tiny, n=N)


def shown(text):
    """A terminal shows a newline as return and newline."""
    return text.replace("\n", "\r\n")


def test_interactive_answers_prompt_after_prompt_until_ctrl_d(conversation, continuation):
    with conversation() as (process, terminal):
        for prompt in ("Hello", "[1, 2]", ""):
            terminal.expect_exact(PROMPT)
            terminal.send(prompt + "\n")
            if prompt:
                terminal.expect_exact(shown(continuation(prompt) + "\n"))
        terminal.expect_exact(PROMPT)
        terminal.send(CTRL_D)
        terminal.expect(pexpect.EOF)
        assert process.wait(TIMEOUT) == 0


def test_interactive_says_first_that_nothing_carries_over_and_how_to_leave(conversation):
    with conversation() as (_, terminal):
        terminal.expect_exact(PROMPT)
        assert re.search(r"\A[^\n]*on its own[^\n]*Ctrl-D leaves[^\n]*\r\n\Z", terminal.before)


def test_it_ends_as_its_system_ends_what_is_typed(tiny, monkeypatch, capsys):
    """The words, without a terminal, of which Windows has no pseudo ones."""
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True, readline=lambda: ""))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.converse(None)
    assert ("Ctrl-Z and Enter leave." if os.name == "nt" else "Ctrl-D leaves.") in capsys.readouterr().err


def test_ctrl_d_as_a_character_which_it_is_on_windows_leaves_too(conversation):
    with conversation() as (process, terminal):
        terminal.expect_exact(PROMPT)
        terminal.send(CTRL_V + CTRL_D + "\n")
        terminal.expect(pexpect.EOF)
        assert process.wait(TIMEOUT) == 0


def test_interactive_edits_the_line(conversation, continuation):
    with conversation() as (_, terminal):
        terminal.expect_exact(PROMPT)
        terminal.send(f"ello{CTRL_A}H\n")  # Ctrl-A goes to the beginning of the line
        terminal.expect_exact(shown(continuation("Hello") + "\n"))


def test_ctrl_c_stops_the_text_but_not_the_conversation(conversation, long):
    with conversation(model=long, n=190_000) as (process, terminal):
        for _ in range(2):
            terminal.expect_exact(PROMPT)
            terminal.send("Hello\n")
            terminal.expect("Hello\r\n.")
            terminal.send(CTRL_C)
        terminal.expect_exact(PROMPT)
        for _ in range(3):  # at the prompt: a new one. Python loses a Ctrl-C between its prompt and its wait for a key
            terminal.send(CTRL_C)
            if terminal.expect_exact([PROMPT, pexpect.TIMEOUT], timeout=20) == 0:
                break
        else:
            pytest.fail("Ctrl-C brings no new prompt")
        terminal.send(CTRL_D)
        assert "Traceback" not in terminal.read()
        assert process.wait(TIMEOUT) == 0


def test_a_mistake_in_one_prompt_does_not_end_the_conversation(conversation, continuation):
    with conversation() as (_, terminal):
        terminal.expect_exact(PROMPT)
        terminal.send("x y " * 99 + "\n")
        terminal.expect_exact("gpt2.py: prompt and continuation")
        terminal.expect_exact(PROMPT)
        terminal.send("Hello\n")
        terminal.expect_exact(shown(continuation("Hello")))


def test_a_line_that_is_no_text_does_not_end_the_conversation(run, continuation):
    result = run("--interactive", input=b"caf\xe9\nHello\n", env={"PYTHONIOENCODING": "utf-8:strict"})
    assert "not valid Unicode" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == continuation("Hello") + "\n"


@pytest.mark.parametrize("written", ["one\r\ntwo\r\n", "\ufeffone\ntwo", "one\n\ntwo\n"], ids=repr)
def test_interactive_reads_the_lines_of_a_pipe_however_they_end_and_the_file_begins(written, run, continuation):
    result = run("--interactive", input=written)
    assert result.stdout == continuation("one") + "\n" + continuation("two") + "\n"


def test_a_packed_file_that_is_not_there_is_an_error(run, tmp_path):
    assert_one_line_error(run("--prompts_file", tmp_path / "p.txt.gz"), "p.txt.gz cannot be read: No such file")


@pytest.mark.parametrize("encoding", ["utf-16-le", "gb18030"])
def test_a_mark_before_text_in_any_encoding_is_none_of_it(encoding):
    file = io.BytesIO("\ufeffone\n\ufefftwo\n".encode(encoding))
    assert io.BufferedReader(cli.Recoded(file, encoding, "-")).read().decode() == "one\n\ufefftwo\n"


def test_interactive_reads_a_pipe_without_showing_its_own_prompt(run, continuation):
    result = run("--interactive", input="Hello\nworld\n")
    assert (result.stdout, result.stderr) == (continuation("Hello") + "\n" + continuation("world") + "\n", "")


def test_a_stream_into_a_pipe_that_closes_ends_silently(long):
    reader, writer = os.pipe()
    with running("Hello", "--stream", model=long, n=190_000, stdout=writer) as process:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)  # as `| head -c 1` does
        assert process.communicate(timeout=TIMEOUT)[1] == b""
    assert process.returncode == 1
