"""Models folders that are damaged or made with ill will: each ends in a clear error or in the right output."""

import collections
import json
import os
import pickle
import random
import shutil
import struct

import numpy as np
import pytest
from conftest import assert_one_line_error, command, fifo, link

import utils
from encoder import bytes_to_unicode, get_encoder
from files import bundle, checkpoint
from files.sums import hexdigest

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("é", "in")]
TOKENS = [*bytes_to_unicode().values(), *map("".join, MERGES), "<|endoftext|>"]
HPARAMS = {"n_vocab": len(TOKENS), "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 1}
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
TEXTS = ["hparams.json", "encoder.json", "vocab.bpe"]
READ = [*TEXTS, INDEX, DATA, "SHA256SUMS"]


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return checkpoint.split(rng.standard_normal(checkpoint.n_params(HPARAMS), dtype=np.float32), HPARAMS)


@pytest.fixture(scope="module")
def pristine(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    checkpoint.save_checkpoint(str(folder), HPARAMS, checkpoint.nest(weights))
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    lines = ["#version: 0.2", *map(" ".join, MERGES)]
    (folder / "vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")
    utils.load_encoder_hparams_and_params("small", str(folder.parent))
    assert (folder / "SHA256SUMS").exists()
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "models" / "small")


def load(folder):
    return utils.load_encoder_hparams_and_params(folder.name, str(folder.parent))


def load_or_error(folder):
    """The model, or None after an error, which must be one line."""
    try:
        return load(folder)
    except utils.ModelError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000
    return None


def check(folder, weights):
    """Whether the model loads; it must then be the right one."""
    model = load_or_error(folder)
    if model is None:
        return False
    encoder, hparams, params = model
    assert hparams == HPARAMS
    assert list(encoder.encoder.items()) == [(token, i) for i, token in enumerate(TOKENS)]
    assert encoder.bpe_ranks == {pair: i for i, pair in enumerate(MERGES)}
    flat = {**params["blocks"][0], "wte": params["wte"], "wpe": params["wpe"], "ln_f": params["ln_f"]}
    for name, array in weights.items():
        found = flat
        for key in name.removeprefix("h0/").split("/"):
            found = found[key]
        assert np.array_equal(found, array)
    return True


def flipped(data, rng):
    bit = rng.randrange(8 * len(data))
    return bytes(byte ^ ((i == bit // 8) << bit % 8) for i, byte in enumerate(data))


def test_the_pristine_model_is_right_and_nothing_is_written_to_its_folder(folder, weights):
    before = sorted(os.listdir(folder))
    assert check(folder, weights)
    assert sorted(os.listdir(folder)) == before


# damage


@pytest.mark.parametrize("name", READ)
def test_a_flipped_bit_after_the_first_start_is_an_error_or_harmless(pristine, folder, weights, name):
    good, rng = (folder / name).read_bytes(), random.Random(name)
    for _ in range(150):
        (folder / name).write_bytes(flipped(good, rng))
        check(folder, weights)
        shutil.copy(pristine / "SHA256SUMS", folder)


@pytest.mark.parametrize("name", READ)
def test_a_file_cut_anywhere_after_the_first_start_is_an_error_or_harmless(pristine, folder, weights, name):
    good = (folder / name).read_bytes()
    for length in [*range(0, len(good), max(1, len(good) // 150)), len(good) - 1]:
        (folder / name).write_bytes(good[:length])
        assert check(folder, weights) == (name == "SHA256SUMS" and length == len(good) - 1)  # less its last line break
        shutil.copy(pristine / "SHA256SUMS", folder)


@pytest.mark.parametrize("name", [INDEX, DATA])
def test_a_flipped_bit_before_the_first_start_is_an_error_or_harmless(folder, weights, name):
    good, rng = (folder / name).read_bytes(), random.Random(name)
    outcomes = []
    for _ in range(150):
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        (folder / name).write_bytes(flipped(good, rng))
        outcomes.append(check(folder, weights))
    assert not all(outcomes)
    assert name == INDEX or not any(outcomes)  # parts of an index are never looked at


@pytest.mark.parametrize("name", [*TEXTS, INDEX, DATA])
def test_a_file_cut_anywhere_before_the_first_start_is_an_error(folder, weights, name):
    good = (folder / name).read_bytes()
    for length in [*range(0, len(good), max(1, len(good) // 150)), len(good) - 1]:
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        (folder / name).write_bytes(good[:length])
        assert not check(folder, weights)


@pytest.mark.parametrize("name", TEXTS)
def test_a_flipped_bit_in_a_text_before_the_first_start_never_crashes(folder, name):
    good, rng = (folder / name).read_bytes(), random.Random(name)
    for _ in range(300):
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        (folder / name).write_bytes(flipped(good, rng))
        if model := load_or_error(folder):  # a well-formed change: it must at least be a working model
            encoder, hparams, _ = model
            assert len(encoder.decode(range(hparams["n_vocab"]))) > 256
            encoder.encode("the thin end, été")


@pytest.mark.parametrize("name", [*TEXTS, INDEX, DATA])
def test_random_bytes_are_an_error(folder, name):
    rng = random.Random(name)
    for n_bytes in (0, 1, 48, 1000, (folder / name).stat().st_size):
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        (folder / name).write_bytes(rng.randbytes(n_bytes))
        with pytest.raises(utils.ModelError):
            load(folder)


# what SHA256SUMS is for


@pytest.mark.parametrize("name", TEXTS)
def test_a_changed_text_is_an_error_until_sha256sums_is_deleted(folder, weights, name):
    with (folder / name).open("a") as f:
        f.write(" " if name.endswith("json") else "")
    if name == "vocab.bpe":
        (folder / name).write_bytes((folder / name).read_bytes().replace(b"0.2", b"0.3"))
    with pytest.raises(utils.ModelError, match=f"{name} is not as SHA256SUMS has it: restore it, or delete SHA256SUMS"):
        load(folder)
    (folder / "SHA256SUMS").unlink()
    assert check(folder, weights)


def test_new_weights_are_accepted(folder, weights):
    new = {name: array + 1 for name, array in weights.items()}
    checkpoint.save_checkpoint(str(folder), HPARAMS, checkpoint.nest(new))
    assert check(folder, new)


def test_weights_changed_in_place_are_noticed(folder):
    with (folder / DATA).open("r+b") as f:
        f.write(b"\0\0\0\0")
    with pytest.raises(utils.ModelError, match="is damaged: "):
        load(folder)


# crafted files

BOMB = "[" * 10**6

BAD_HPARAMS = {
    "10 GB": json.dumps({**HPARAMS, "n_vocab": 10**10}),
    "a 2 GB context": json.dumps({**HPARAMS, "n_ctx": 2**31 - 1}),
    "many layers": json.dumps({**HPARAMS, "n_layer": 2**31 - 1}),
    "4000 digits": json.dumps({**HPARAMS, "n_embd": 10**4000, "n_ctx": 10**4000}),
    "100000 digits": '{"n_vocab": ' + "9" * 60000 + "}",
    "zero": json.dumps({**HPARAMS, "n_layer": 0}),
    "negative": json.dumps({**HPARAMS, "n_embd": -4}),
    "no heads": json.dumps({**HPARAMS, "n_head": 0}),
    "heads that do not divide": json.dumps({**HPARAMS, "n_head": 3}),
    "true": json.dumps({**HPARAMS, "n_layer": True}),
    "a float": json.dumps({**HPARAMS, "n_layer": 1.0}),
    "infinity": '{"n_vocab": 1e999}',
    "NaN": '{"n_vocab": NaN}',
    "a long string": json.dumps({**HPARAMS, "n_layer": "x" * 60000}),
    "a number missing": json.dumps({"n_vocab": 262}),
    "a list": "[1, 2]",
    "null": "null",
    "empty": "",
    "a byte order mark": "\ufeff" + json.dumps(HPARAMS),
    "nested deeply": BOMB[:60000],
    "larger than any": " " * 10**6 + json.dumps(HPARAMS),
    "fewer tokens than encoder.json": json.dumps({**HPARAMS, "n_vocab": HPARAMS["n_vocab"] - 1}),
}


@pytest.mark.parametrize("case", BAD_HPARAMS)
def test_bad_hparams_are_a_clear_error(folder, weights, case):
    (folder / "SHA256SUMS").unlink()
    (folder / "hparams.json").write_text(BAD_HPARAMS[case], encoding="utf-8")
    assert not check(folder, weights)


IDS = {token: i for i, token in enumerate(TOKENS)}


def renamed(old, new):
    return {(new if token == old else token): i for token, i in IDS.items()}


BAD_ENCODERS = {
    "an id twice": {**IDS, "th": 0},
    "an id too large": {**IDS, "th": len(IDS)},
    "a negative id": {**IDS, "th": -1},
    "a huge id": {**IDS, "th": 10**4000},
    "a float": {**IDS, "!": 0.0},
    "true": {**IDS, TOKENS[1]: True},
    "a string": {**IDS, "th": "256"},
    "null": {**IDS, "th": None},
    "a list as id": {**IDS, "th": [1]},
    "a byte missing": renamed("q", "xx"),
    "no <|endoftext|>": renamed("<|endoftext|>", "<|end|>"),
    "a character that stands for no byte": renamed("th", "\u2028"),
    "half a surrogate pair": renamed("th", "\ud800"),
    "an empty token": renamed("th", ""),
    "a special token that stands for no bytes": renamed("th", "<|日|>"),
    "a token that no merge makes": renamed("th", "zz"),
    "no object": [*IDS],
    "nothing": {},
}


@pytest.mark.parametrize("case", BAD_ENCODERS)
def test_a_bad_encoder_json_is_a_clear_error(folder, weights, case):
    (folder / "SHA256SUMS").unlink()
    (folder / "encoder.json").write_text(json.dumps(BAD_ENCODERS[case]))
    assert not check(folder, weights)


@pytest.mark.parametrize(
    "text", [BOMB, '{"a":' * 10**5, "", "{", "\ufeff{}", '{"!": ' + "9" * 5000 + "}", "NaN", '"x"']
)
def test_an_encoder_json_that_is_no_vocabulary_is_a_clear_error(folder, weights, text):
    (folder / "SHA256SUMS").unlink()
    (folder / "encoder.json").write_text(text, encoding="utf-8")
    assert not check(folder, weights)


GOOD_MERGES = "#version: 0.2\nt h\nth e\nĠ the\ni n\né in\n"
BAD_MERGES = {
    "a part that is no token": GOOD_MERGES.replace("i n", "i zz"),
    "parts that make no token": GOOD_MERGES.replace("i n", "i q"),
    "three parts": GOOD_MERGES.replace("i n", "i n n"),
    "one part": GOOD_MERGES.replace("i n", "in"),
    "two spaces": GOOD_MERGES.replace("i n", "i  n"),
    "an empty line": GOOD_MERGES.replace("i n", ""),
    "an empty line at the end": GOOD_MERGES + "\n",
    "a merge missing": GOOD_MERGES.replace("th e\n", ""),
    "a merge twice": GOOD_MERGES + "th e\n",
    "a token used before it is made": GOOD_MERGES.replace("t h\nth e\n", "th e\nt h\n"),
    "a special token in a merge": GOOD_MERGES.replace("i n", "i <|endoftext|>"),
    "no version": GOOD_MERGES.removeprefix("#version: 0.2\n"),
    "no last line break": GOOD_MERGES[:-1],
    "a byte order mark": "\ufeff" + GOOD_MERGES,
    "nothing": "",
    "a line break": "\n",
    "larger than any": GOOD_MERGES * 10**6,
}


@pytest.mark.parametrize("case", BAD_MERGES)
def test_a_bad_vocab_bpe_is_a_clear_error(folder, weights, case):
    (folder / "SHA256SUMS").unlink()
    (folder / "vocab.bpe").write_text(BAD_MERGES[case], encoding="utf-8")
    assert not check(folder, weights)


def test_windows_line_breaks_in_vocab_bpe_change_nothing(folder, weights):
    (folder / "SHA256SUMS").unlink()
    (folder / "vocab.bpe").write_bytes(GOOD_MERGES.replace("\n", "\r\n").encode())
    assert check(folder, weights)


def test_a_vocabulary_may_have_other_special_tokens(folder):
    (folder / "encoder.json").write_text(json.dumps({**IDS, "<|pad|>": len(IDS)}))
    assert get_encoder("small", str(folder.parent)).decode([len(IDS)]) == "<|pad|>"


def test_special_tokens_before_and_behind_all_others_may_have_any_spelling(folder):
    behind = {token: i + 1 for token, i in IDS.items()} | {"<s>": 0, "Ġ[PAD]": len(IDS) + 1}
    (folder / "encoder.json").write_text(json.dumps(behind))
    assert get_encoder("small", str(folder.parent)).decode([0, len(IDS) + 1]) == "<s> [PAD]"


def test_a_character_that_stands_for_no_byte_is_in_no_special_token(folder):
    (folder / "encoder.json").write_text(json.dumps({**IDS, "日": len(IDS)}))
    with pytest.raises(ValueError, match="no merge for 1 tokens"):
        get_encoder("small", str(folder.parent))


class Mark:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", [*READ, "checkpoint"])
@pytest.mark.parametrize("form", ["pickle", "npy"])
def test_pickled_objects_are_never_run(folder, tmp_path, name, form):
    mark = str(tmp_path / "mark")
    if form == "npy":
        np.save(tmp_path / "objects.npy", np.array([Mark(mark)], dtype=object), allow_pickle=True)
        data = (tmp_path / "objects.npy").read_bytes()
    else:
        data = pickle.dumps(Mark(mark))
    (folder / name).write_bytes(data)
    try:
        load(folder)
    except utils.ModelError:
        pass
    else:
        pytest.fail("it was loaded")
    assert not os.path.exists(mark)


@pytest.mark.parametrize("name", [*TEXTS, INDEX, DATA])
@pytest.mark.parametrize("kind", ["folder", "pipe", "endless", "dangling", "circle"])
def test_what_is_no_file_is_a_clear_error(folder, name, kind):
    (folder / name).unlink()
    {
        "folder": os.mkdir,
        "pipe": fifo,
        "endless": lambda path: link(path, "/dev/zero"),
        "dangling": lambda path: link(path, "nowhere"),
        "circle": lambda path: link(path, name),
    }[kind](folder / name)
    with pytest.raises(utils.ModelError, match=f"lacks {name}"):
        load(folder)


@pytest.mark.parametrize("make", [os.mkdir, fifo, lambda path: link(path, "/dev/zero")])
def test_a_sha256sums_that_is_no_file_is_a_clear_error(folder, make):
    (folder / "SHA256SUMS").unlink()
    make(folder / "SHA256SUMS")
    with pytest.raises(utils.ModelError, match="SHA256SUMS is no file"):
        load(folder)


# OpenAI's sizes are known


def official(folder, monkeypatch):
    monkeypatch.setattr(utils, "MODEL_SIZES", {"small": HPARAMS})
    monkeypatch.setattr(utils, "SHA256", {name: hexdigest(folder / name) for name in TEXTS[1:]})
    (folder / "SHA256SUMS").unlink()


def test_files_of_openais_sizes_are_recognized(folder, weights, monkeypatch):
    official(folder, monkeypatch)
    assert check(folder, weights)


@pytest.mark.parametrize("name", TEXTS)
def test_a_flipped_bit_in_a_text_of_openais_sizes_is_an_error_even_at_the_first_start(
    folder, weights, monkeypatch, name
):
    official(folder, monkeypatch)
    good, rng = (folder / name).read_bytes(), random.Random(name)
    for _ in range(100):
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        (folder / name).write_bytes(flipped(good, rng))
        loaded = check(folder, weights)
        assert not loaded or name == "hparams.json"


def test_another_number_of_heads_is_noticed_for_openais_sizes(folder, monkeypatch):
    official(folder, monkeypatch)
    (folder / "hparams.json").write_text(json.dumps({**HPARAMS, "n_head": 4}))
    with pytest.raises(utils.ModelError, match=r"hparams\.json is damaged: .*delete it to fetch it anew"):
        load(folder)


@pytest.mark.parametrize("name", [INDEX, DATA])
@pytest.mark.parametrize("damage", [bytes, lambda data: data[:-1], lambda data: bytes(len(data))])
def test_a_file_of_openais_sizes_that_cannot_be_read_is_named_with_what_mends_it(folder, monkeypatch, name, damage):
    official(folder, monkeypatch)
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(damage(good) if damage is not bytes else b"")
    with pytest.raises(utils.ModelError) as error:
        load(folder)
    assert str(error.value).startswith(str(folder / name))
    assert str(error.value).endswith("if it is OpenAI's, delete it to fetch it anew")


# an index whose checksums are right, while what it says may be anything

NUMBERS = [0, 1, 3, 4, 16, 64, 4000, 5396, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 4, 2**64 - 1]
FIELDS = [bundle.DTYPE, bundle.SHARD, bundle.OFFSET, bundle.SIZE, bundle.N_SHARDS, bundle.ENDIANNESS]


def pairs_of(data):
    """An index of one block -> its [(key, value)]."""
    _, i = bundle.read_handle(data, len(data) - bundle.FOOTER)
    [(_, handle)] = bundle.read_block(data, *bundle.read_handle(data, i)[0])
    return list(bundle.read_block(data, *bundle.read_handle(handle, 0)[0]))


def table_of(block, kind=0, handle=None):
    """An index of one block, as it is."""
    data = bytearray(block + bytes([kind]))
    data += struct.pack("<I", bundle.checksum(data))
    handle = handle or bundle.number(0) + bundle.number(len(block))
    about = bundle.append(data, bundle.pack([])[1])
    footer = about + bundle.append(data, bundle.pack([(b"z", handle)])[1])
    return bytes(data + footer.ljust(40, b"\0") + bundle.MAGIC)


def crafted(good, rng):
    """An index with one fault or another, most of them behind right checksums."""
    pairs = pairs_of(good)
    i, how = rng.randrange(len(pairs)), rng.randrange(10)
    key, value = pairs[i]
    if how == 0:
        return flipped(good, rng)
    if how == 1:
        return good[: rng.randrange(len(good))]
    if how == 2:
        pairs[i] = key, flipped(value, rng)
    if how == 3:
        pairs[i] = key, value + b"".join(bundle.field(rng.choice(FIELDS), rng.choice(NUMBERS)) for _ in range(3))
    if how == 4:
        pairs[i] = key, value[: rng.randrange(len(value))] + rng.randbytes(rng.randrange(20))
    if how == 5:
        pairs[i] = flipped(key, rng) if key else b"a", value
    if how == 6:
        pairs.insert(rng.randrange(len(pairs)), pairs.pop(i) if rng.random() < 0.5 else pairs[i])
    if how == 7:
        pairs[i] = key, value.replace(pairs[-1][1][-5:], b"") + pairs[rng.randrange(len(pairs))][1]
    _, block = bundle.pack(pairs)
    if how == 8:
        return table_of(flipped(block, rng), rng.choice([0, 0, 0, 1]))
    if how == 9:
        return table_of(block, handle=b"".join(bundle.number(rng.choice(NUMBERS)) for _ in range(rng.randrange(3))))
    return table_of(block)


def outcomes(folder, weights, n):
    """How n crafted indices ended at a first start: {"loaded" or the first words of an error: how often}."""
    good, rng, counts = (folder / INDEX).read_bytes(), random.Random(0), collections.Counter()
    for _ in range(n):
        (folder / "SHA256SUMS").unlink(missing_ok=True)
        (folder / INDEX).write_bytes(crafted(good, rng))
        counts["loaded" if check(folder, weights) else "refused"] += 1
    return counts


def test_an_index_made_anew_of_its_parts_is_the_same(folder):
    good = (folder / INDEX).read_bytes()
    assert pairs_of(table_of(bundle.pack(pairs_of(good))[1])) == pairs_of(good)


def test_a_crafted_index_is_an_error_in_one_line_or_harmless(folder, weights):
    counts = outcomes(folder, weights, 1000)
    assert counts["refused"] > 700


def test_two_variables_in_one_place_are_an_error(folder):
    pairs = pairs_of((folder / INDEX).read_bytes())
    (folder / INDEX).write_bytes(
        table_of(
            bundle.pack(
                [(key, value + bundle.field(bundle.OFFSET, 16)) if key else (key, value) for key, value in pairs]
            )[1]
        )
    )
    with pytest.raises(utils.ModelError, match="two variables in one place"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (bundle.OFFSET, 10**6, "lies beyond the end"),
        (bundle.OFFSET, 2**64 - 16, "lies beyond the end"),
        (bundle.SIZE, 12, "another size than its shape"),
        (bundle.SIZE, 2**62, "another size than its shape"),
        (bundle.SHARD, 1, "another size than its shape"),
        (bundle.DTYPE, 99, "is of type 99, not float32"),
    ],
)
def test_what_an_index_says_of_a_variable_must_be_possible(field, value, message, folder):
    pairs = [
        (key, old + bundle.field(field, value) if key == b"model/ln_f/b" else old)
        for key, old in pairs_of((folder / INDEX).read_bytes())
    ]
    (folder / INDEX).write_bytes(table_of(bundle.pack(pairs)[1]))
    with pytest.raises(utils.ModelError, match=message):
        load(folder)


# names of models

ODD_NAMES = [
    "", ".", "..", "...", "a/b", "../small", "../../x", "small/", "small/.", "/", "/etc", "a\\b", "..\\x", "C:", "C:x",
    "C:\\x", "small\0", "\0", "small.", "small ", ".. ", "small/../small", "~/../x\0",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_could_leave_the_folder_is_refused(folder, name):
    with pytest.raises(utils.ModelError, match="is no model name"):
        utils.load_encoder_hparams_and_params(name, str(folder.parent))
    assert os.listdir(folder.parent) == ["small"]


@pytest.mark.parametrize("name", ["nothing", "~", "$HOME", "-x", "x" * 5000, "日本", "\udcff", "a\nb", "*", "124m"])
def test_a_name_that_is_no_model_is_an_error(folder, name):
    with pytest.raises(utils.ModelError, match=r"no model .*choose 124M, 355M, 774M, 1558M or a folder in"):
        utils.load_encoder_hparams_and_params(name, str(folder.parent))
    assert os.listdir(folder.parent) == ["small"]


def test_a_link_to_a_folder_elsewhere_is_a_model(folder, weights, tmp_path):
    (tmp_path / "linked").mkdir()
    link(tmp_path / "linked" / "mine", folder)
    assert check(tmp_path / "linked" / "mine", weights)


@pytest.mark.parametrize("name", ["../../x", "/etc", "a\\b", "C:x"])
def test_the_command_says_so_in_one_line(folder, name):
    result = command("Hi", "--model_size", name, "--models_dir", folder.parent)
    assert_one_line_error(result, f"gpt2.py: {name!r} is no model name: it must be a folder inside {folder.parent}\n")


def test_the_command_says_in_one_line_that_a_file_is_damaged(folder):
    (folder / "encoder.json").write_bytes(b"[" * 10**6)
    assert_one_line_error(command("Hi", model=folder), "encoder.json")
