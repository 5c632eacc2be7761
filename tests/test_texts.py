"""examples/texts.py: what files hold, as every use of them reads it."""

import csv
import gzip
import json
import pathlib
import sys

import numpy as np
import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "examples"))
import evaluate
import finetune
import texts

from encoder import get_encoder
from files.checkpoint import random_params

TEXT, PAIR, LABELLED = ("text",), ("prompt", "completion"), ("text", "label")


@pytest.fixture(scope="module")
def encoder():
    return get_encoder("shakespeare", REPO / "models")


def read(path, content, *kinds):
    """The documents of a file with this content, less where they are from."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [
        {key: text for key, text in document.items() if key != "where"}
        for document in texts.read_documents([str(path)], *kinds)
    ]


def message(path, content, *kinds):
    """The one line in which reading such a file ends."""
    with pytest.raises(SystemExit) as error:
        read(path, content, *kinds)
    assert "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_do_not_reach_the_model(ends, mark, tmp_path):
    text, expected = f"one{ends}two{ends}", [{"text": "one\ntwo\n"}]
    assert read(tmp_path / "a.txt", mark + text, TEXT) == expected
    assert (
        read(tmp_path / "a.jsonl", mark + json.dumps({"text": text}) + ends.replace("\r", "\r\n")[-2:], TEXT)
        == expected
    )
    assert read(tmp_path / "a.json", mark + json.dumps([{"text": text}]), TEXT) == expected
    assert read(tmp_path / "a.csv", f'{mark}id,text{ends}1,"{text}"{ends}', TEXT) == expected


def test_utf_16_as_powershell_writes_it_is_read_like_utf_8(tmp_path):
    assert read(tmp_path / "a.txt", "one 平方\r\ntwo\r\n".encode("utf-16"), TEXT) == [{"text": "one 平方\ntwo\n"}]
    assert read(tmp_path / "a.jsonl", '{"text": "one"}\r\n'.encode("utf-16"), TEXT) == [{"text": "one"}]
    assert "a.txt cannot be read, as utf-16" in message(tmp_path / "a.txt", "one".encode("utf-16")[:-1], TEXT)


def test_endoftext_means_the_same_ids_in_every_file_in_training_and_in_evaluation(encoder, tmp_path, monkeypatch):
    text, end = "one two<|endoftext|>three", encoder.encoder["<|endoftext|>"]
    expected = [end, *encoder.encode("one two"), end, *encoder.encode("three")]
    for name, content in [("a.txt", text), ("a.jsonl", json.dumps({"text": text})), ("a.csv", f"text\n{text}\n")]:
        documents = read(tmp_path / name, content, TEXT)
        assert texts.text_ids(encoder, [document["text"] for document in documents]).tolist() == expected
    params = random_params({"n_vocab": len(encoder.encoder), "n_ctx": 32, "n_embd": 8, "n_head": 2, "n_layer": 1})
    figures, ids, _ = evaluate.evaluate_text(text, encoder, params, 2)
    assert ids == expected[1:]
    assert figures["characters"] == len("one twothree")


def test_endoftext_in_prompts_and_completions_is_the_token_and_ends_a_completion_once(encoder):
    documents = [{"prompt": "a<|endoftext|>b", "completion": " c<|endoftext|>", "where": "line 1"}]
    end = encoder.encoder["<|endoftext|>"]
    ((ids, n_learned),) = finetune.examples_of(encoder, documents, 256)
    assert ids == [*encoder.encode("a"), end, *encoder.encode("b"), *encoder.encode(" c"), end]
    assert n_learned == len(encoder.encode(" c")) + 1


def test_csv_and_json_arrays_hold_what_jsonl_holds(tmp_path):
    pairs = [{"prompt": 'say "a, b"\nagain', "completion": "ä"}, {"prompt": "", "completion": "x"}]
    with open(tmp_path / "written.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, ["id", *PAIR])
        writer.writeheader()
        writer.writerows({"id": i, **pair} for i, pair in enumerate(pairs))
    assert read(tmp_path / "a.csv", (tmp_path / "written.csv").read_bytes(), TEXT, PAIR) == pairs
    assert read(tmp_path / "a.json", json.dumps(pairs), TEXT, PAIR) == pairs
    assert read(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, pairs)), TEXT, PAIR) == pairs


def test_labels_may_be_whole_numbers(tmp_path):
    lines = '{"text": "a", "label": 5}\n{"text": "b", "label": "5"}'
    assert [document["label"] for document in read(tmp_path / "a.jsonl", lines, LABELLED)] == ["5", "5"]
    assert read(tmp_path / "a.csv", "label,text\n5,a\n", LABELLED) == [{"text": "a", "label": "5"}]


def test_a_text_may_have_several_labels_or_none_in_a_list(tmp_path):
    lines = '{"text": "a", "label": ["b", 5]}\n{"text": "c", "label": []}'
    documents = read(tmp_path / "a.jsonl", lines, LABELLED)
    assert documents == [{"text": "a", "label": ["b", "5"]}, {"text": "c", "label": []}]


def test_in_a_csv_file_in_which_a_bar_is_in_a_label_bars_part_several(tmp_path):
    several = read(tmp_path / "a.csv", "text,label\na,b | 5\nc,\nd,b\n", LABELLED)
    assert [document["label"] for document in several] == [["b", "5"], [], ["b"]]
    alone = read(tmp_path / "b.csv", "text,label\na,b|\n", LABELLED)
    assert [document["label"] for document in alone] == [["b"]]
    assert "line 3" in message(tmp_path / "c.csv", "text,label\na,b\nc,\n", LABELLED)


def test_one_label_a_text_and_lists_of_them_are_two_kinds(tmp_path):
    lines = '{"text": "a", "label": ["b"]}\n{"text": "c", "label": "b"}'
    assert "line 2 is of another kind than" in message(tmp_path / "a.jsonl", lines, LABELLED)


@pytest.mark.parametrize("label", ['[["b"]]', "[true]", '[""]', "[null]", '{"b": 1}'])
def test_labels_that_are_none_are_told_in_one_line(label, tmp_path):
    said = message(tmp_path / "a.jsonl", f'{{"text": "a", "label": {label}}}', LABELLED)
    assert 'line 1: "label" is ' in said


def test_a_chat_is_a_pair_for_each_answer_with_all_before_as_its_prompt(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "So long."),
    ]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert read(tmp_path / "a.jsonl", json.dumps(chat), TEXT, PAIR) == [
        {"prompt": "Be brief.\n\nUser: Hi\nAssistant:", "completion": " Hello."},
        {
            "prompt": "Be brief.\n\nUser: Hi\nAssistant: Hello.\nUser: Bye\nAssistant:",
            "completion": " So long.",
        },
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "{}", "is no JSON array of objects"),
        ("a.json", "[", "is no JSON array of objects: Expecting value"),
        ("a.json", "[" * 100_000, "nested too deep"),
        ("a.json", '[{"prompt": "a", "completion": "b"}, 5]', "element 2: no object with"),
        ("a.csv", "prompt,completion\na\n", "line 2: it has not as many fields as the first"),
        ("a.csv", "prompt,completion\na,b,c\n", "line 2: it has not as many fields as the first"),
        ("a.csv", 'prompt,completion\n"a,b\n', "behind line 1: unexpected end of data"),
        ("a.csv", "prompt\na\n", 'line 2: no object with {"prompt", "completion"} or {"messages"}'),
        ("a.csv", b"prompt,completion\n\xff,b\n", "cannot be read: not valid Unicode text: it must be UTF-8"),
        ("a.jsonl", '{"messages": 5}', '"messages" is no list'),
        ("a.jsonl", '{"messages": []}', "the last of the messages is not the assistant's"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "the last of the messages is not the assistant's",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}]}',
            "\"role\" is 'tool', not user or assistant",
        ),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": null}]}', '"content" is None, not a text'),
        ("a.txt", "text", "is none of .jsonl, .json, .csv"),
    ],
)
def test_bad_files_are_told_in_one_line_with_the_place(name, content, said, tmp_path):
    with pytest.raises(SystemExit) as error:
        read(tmp_path / name, content, PAIR)
    assert said in error.value.code
    assert "\n" not in error.value.code


@pytest.mark.parametrize("changed", ["a.txt", "b.txt", "c.txt"])
def test_the_checksums_of_a_run_are_of_all_its_files(changed, tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path in paths:
        path.write_text("as it was")
    files, held_out = [*map(str, paths[:2])], str(paths[2])
    before = texts.checksums(files, held_out)
    (tmp_path / changed).write_text("as it is!")
    assert texts.checksums(files, held_out) != before


def test_a_text_of_whose_characters_the_tokenizer_has_mere_parts_is_told_of(encoder, capsys):
    for text, is_told in [("To be, or not to be: café", False), ("东京的天气很好", True)]:
        texts.note_parts_of_characters(encoder, np.array(encoder.encode(text)), "so do this")
        assert ("of the tokens are mere parts of characters" in capsys.readouterr().err) == is_told


def test_read_text_is_the_only_reader_of_texts():
    for name in ("train", "finetune", "classify", "training", "evaluate"):
        assert ".read().decode()" not in pathlib.Path(REPO / "examples" / f"{name}.py").read_text("utf-8")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_packed_file_is_read_as_what_it_holds(name, tmp_path):
    text = {"a.txt": "one", "a.jsonl": '{"text": "one"}', "a.json": '[{"text": "one"}]', "a.csv": "text\none\n"}[name]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (document,) = texts.read_documents([str(tmp_path / f"{name}.gz")], ("text",))
    assert document["text"] == "one"
