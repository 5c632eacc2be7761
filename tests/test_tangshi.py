"""models/tangshi, the model in the repository that writes Tang poems: it is what its README.md says."""

import re

import pytest
from conftest import REPO, command

from gpt2 import generate
from utils import load_encoder_hparams_and_params

FOLDER = REPO / "models" / "tangshi"
HELD_OUT = "tests/data/tangshi_heldout.txt"
PROMPT = "春眠不觉晓，"


@pytest.fixture(scope="module")
def model():
    return load_encoder_hparams_and_params("tangshi", str(REPO / "models"))


def in_form(poem):
    """Pairs of lines, all of five characters or all of seven, with ， within a pair and 。 behind it."""
    return re.fullmatch(r"(\w{5}，\w{5}。\n)+|(\w{7}，\w{7}。\n)+", poem)


def read(name):
    return (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_greedy_continuation_is_the_one_in_its_readme(name):
    done = command(PROMPT, "--model_size", "tangshi")
    assert (done.returncode, done.stderr) == (0, "")
    assert f'`python gpt2.py "{PROMPT}" --model_size tangshi`\n\n```text\n{done.stdout}```' in read(name)


def test_most_poems_behind_a_title_and_an_author_are_in_form(model):
    encoder, hparams, params = model
    held_out = (REPO / HELD_OUT).read_text("utf-8").split("\n\n")
    prompts = [encoder.encode("".join(f"{line}\n" for line in poem.split("\n")[:2])) for poem in held_out[:20]]
    outputs = generate(prompts, params, hparams["n_head"], 80, temperature=0.8, seed=0)
    # a poem ends before an empty line; where there is none yet, its last line may not be whole
    texts = map(encoder.decode, outputs)
    poems = [text[: text.find("\n\n") + 1 or text.rfind("\n") + 1] for text in texts]
    assert sum(map(bool, map(in_form, poems))) >= 18
    assert len({*poems}) == 20


def test_the_loss_on_poems_held_out_is_the_one_in_its_readme():
    done = command(REPO / HELD_OUT, "--model_size", "tangshi", script="examples/evaluate.py")
    assert done.returncode == 0, done.stderr
    measured = float(re.search(r"nats per character\s+([\d.]+)", done.stdout)[1])
    stated = re.search(rf"`{HELD_OUT}`.*?(\d\.\d+) nats per character", read("README.md"), re.DOTALL)
    assert measured == pytest.approx(float(stated[1]), abs=0.002)


def test_a_common_character_is_one_token_and_no_token_holds_two(model):
    encoder, _, _ = model
    assert [len(encoder.encode(character)) for character in "春眠不觉晓，处闻啼鸟。\n"] == [1] * 12
    texts = [encoder.decode_bytes([i]).decode(errors="ignore") for i in range(len(encoder.decoder))]
    assert [text for text in texts if len(text.strip()) > 1] == ["<|endoftext|>"]


def test_weights_and_tokenizer_take_at_most_9_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.suffix not in (".md", ".png")) <= 9e6
