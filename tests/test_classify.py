"""examples/classify.py: classes that are learned, told apart, counted and drawn."""

import json
import sys

import numpy as np
import pytest
from conftest import REPO, assert_one_line_error, command, hugging_face, leaves, optional, wild_params, write_tokenizer

sys.path.insert(0, str(REPO / "examples"))
import classify
import training

from files.checkpoint import save_checkpoint
from utils import load_encoder_hparams_and_params

jax, jnp, torch = optional("jax"), optional("jax.numpy"), optional("torch")
image, metrics = optional("PIL.Image"), optional("sklearn.metrics")

HPARAMS = {"n_vocab": 307, "n_ctx": 24, "n_embd": 35, "n_head": 5, "n_layer": 1}
WORDS = {"colours": ["red", "green", "blue"], "numbers": ["one", "two", "three"], "ünits": ["mile", "foot", "inch"]}
RECIPE = {"n_steps": 40, "batch_size": 8, "evaluate_every": 40, "n_ctx": 8}


def write_lines(path, n, seed):
    """n lines of {"text", "label"}: three words of a class each."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([*WORDS], n)
    lines = [{"text": " ".join(rng.choice(WORDS[label], 3)), "label": str(label)} for label in labels]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with models/base, train.jsonl and held_out.jsonl."""
    path = tmp_path_factory.mktemp("data")
    save_checkpoint(path / "models" / "base", HPARAMS, wild_params(HPARAMS))
    write_tokenizer(path / "models" / "base", HPARAMS["n_vocab"])
    write_lines(path / "train.jsonl", 120, seed=0)
    write_lines(path / "held_out.jsonl", 50, seed=1)
    return path


def learn(data, name, **settings):
    models_dir = str(data / "models")
    classify.train(f"{data}/train.jsonl", model_size="base", name=name, models_dir=models_dir, **RECIPE | settings)
    return classify.load(name, models_dir)


@pytest.fixture(scope="module")
def words(data):
    """The classifier "words", of which all weights have learned: what load returns."""
    return learn(data, "words", learning_rate=3e-3)


def test_all_weights_learn_to_tell_classes_apart(data, words, capsys):
    classify.evaluate(f"{data}/held_out.jsonl", name="words", models_dir=str(data / "models"))
    assert float(capsys.readouterr().out.split()[1]) > 0.95


def test_the_logits_are_a_linear_function_of_transformers_last_hidden_state(words):
    encoder, hparams, params, head, *_ = words
    ids = classify.encoded(encoder, ["red two mile", "x"], 24)
    assert [row[-1] for row in ids] == [encoder.encoder["<|endoftext|>"]] * 2
    model = hugging_face(hparams, params).transformer
    for row, found in zip(ids, classify.probabilities(params, head, ids, hparams["n_head"]), strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([row])).last_hidden_state[0, -1].numpy()
        expected = torch.softmax(torch.tensor(hidden @ head["w"] + head["b"]), -1).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_jax_finds_in_padded_batches_what_numpy_finds_one_by_one(words):
    _, hparams, params, head, *_ = words
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 307, n).tolist() for n in rng.integers(1, 25, 40)]
    on_jax = jax.tree.map(jnp.asarray, params)
    expected = classify.probabilities(params, head, rows, hparams["n_head"])
    np.testing.assert_allclose(classify.probabilities(on_jax, head, rows, hparams["n_head"]), expected, atol=1e-4)


def test_the_head_alone_leaves_the_weights_as_they_are_and_adapters_change_some(data):
    _, _, base = load_encoder_hparams_and_params("base", str(data / "models"))
    _, _, params, head, *_ = learn(data, "head", head_only=True)
    for (_, ours), (_, theirs) in zip(leaves(params), leaves(base), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert head["b"].any()

    _, _, params, *_ = learn(data, "adapted", lora_rank=2, learning_rate=1e-2)
    pairs = zip(leaves(params), leaves(base), strict=True)
    changed = [name for (name, ours), (_, theirs) in pairs if not np.array_equal(ours, theirs)]
    assert changed == ["params.blocks.0.attn.c_attn.w"]


def test_evaluate_prints_what_scikit_learn_computes_and_draws_a_confusion_matrix(data, capsys, tmp_path):
    learn(data, "poor", head_only=True, n_steps=2, evaluate_every=2)  # so that there are mistakes
    lines = [json.loads(line) for line in (data / "held_out.jsonl").read_text("utf-8").splitlines()]
    classify.predict(*(line["text"] for line in lines), name="poor", models_dir=str(data / "models"))
    found = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]

    classify.evaluate(f"{data}/held_out.jsonl", name="poor", models_dir=str(data / "models"))
    first, _, *rows = capsys.readouterr().out.splitlines()
    right, labels = [line["label"] for line in lines], sorted(WORDS)
    accuracy = metrics.accuracy_score(right, found)
    assert first == f"accuracy {accuracy:.3f}"
    assert accuracy < 1
    columns = metrics.precision_recall_fscore_support(right, found, labels=labels, zero_division=0)
    for label, row, *expected in zip(labels, rows, *columns, strict=True):
        assert row.split()[0] == label
        np.testing.assert_allclose([*map(float, row.split()[1:])], expected, atol=6e-4)
    assert (data / "models" / "poor" / "confusion.png").read_bytes().startswith(b"\x89PNG")


# several labels a text, or none


def write_several(path, n, seed):
    """n lines of {"text", "label"}: a word of each class that a text is of, and one that is of none."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(n):
        labels = [label for label in WORDS if rng.random() < 0.5]
        words = ["of", *(str(rng.choice(WORDS[label])) for label in labels)]
        lines.append({"text": " ".join(rng.permutation(words)), "label": labels})
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return lines


def learn_several(data, name, **settings):
    write_several(data / "several.jsonl", 160, seed=0)
    models_dir, recipe = str(data / "models"), RECIPE | {"n_ctx": 16, "learning_rate": 3e-3, "n_steps": 80} | settings
    classify.train(f"{data}/several.jsonl", model_size="base", name=name, models_dir=models_dir, **recipe)
    return classify.load(name, models_dir)


@pytest.fixture(scope="module")
def several(data):
    """The classifier "several": what load returns."""
    return learn_several(data, "several")


def predicted(data, lines, name, capsys):
    classify.predict(*(line["text"] for line in lines), name=name, models_dir=str(data / "models"))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_names_all_labels_above_one_half_and_no_others(data, several, capsys):
    lines = write_several(data / "several_held_out.jsonl", 20, seed=1)
    answers = predicted(data, lines, "several", capsys)
    for answer in answers:
        assert [*answer["probabilities"]] == sorted(WORDS)
        assert answer["label"] == [label for label, p in answer["probabilities"].items() if p > 0.5]
    assert {len(answer["label"]) for answer in answers} > {1, 2}
    assert (
        np.mean([answer["label"] == sorted(line["label"]) for answer, line in zip(answers, lines, strict=True)]) > 0.7
    )


def test_each_probability_is_the_sigmoid_of_its_logit(several):
    encoder, hparams, params, head, _, activation = several
    ids = classify.encoded(encoder, ["red two mile", "x"], 24)
    model = hugging_face(hparams, params).transformer
    for row, found in zip(ids, classify.probabilities(params, head, ids, hparams["n_head"], activation), strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([row])).last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(found, torch.sigmoid(torch.tensor(hidden @ head["w"] + head["b"])), atol=1e-5)


@pytest.mark.parametrize("bar", [False, True])
def test_evaluate_prints_for_several_labels_what_scikit_learn_computes(bar, data, capsys, tmp_path):
    if not (data / "models" / "unsure").exists():
        learn_several(data, "unsure", head_only=True, n_steps=20)  # so that there are mistakes
    lines, path = write_several(tmp_path / "a.jsonl", 40, seed=2), tmp_path / "a.jsonl"
    if bar:
        path = tmp_path / "a.csv"
        rows = [f"{line['text']},{'|'.join(line['label'])}" for line in lines]
        path.write_text("\n".join(["text,label", *rows]), "utf-8")
    answers, labels = predicted(data, lines, "unsure", capsys), sorted(WORDS)
    classify.evaluate(str(path), name="unsure", models_dir=str(data / "models"))
    *figures, _, first, second, third = capsys.readouterr().out.splitlines()

    right = np.array([[label in line["label"] for label in labels] for line in lines], int)
    found = np.array([[*answer["probabilities"].values()] for answer in answers])
    chosen = (found > 0.5).astype(int)
    accuracy = metrics.accuracy_score(right, chosen)
    nats = np.mean([metrics.log_loss(y, p, labels=[0, 1]) for y, p in zip(right.T, found.T, strict=True)])
    f1 = metrics.f1_score(right, chosen, average="micro")
    assert figures == [f"micro F1 {f1:.3f}", f"exact matches {accuracy:.3f}", f"nats per label {nats:.4f}"]
    assert 0 < accuracy < 1
    columns = metrics.precision_recall_fscore_support(right, chosen, zero_division=0)
    for label, row, *expected in zip(labels, [first, second, third], *columns, strict=True):
        assert row.split()[0] == label
        np.testing.assert_allclose([*map(float, row.split()[1:])], expected, atol=6e-4)


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"learn": "mlp"}, {"head_only": True}])
def test_several_labels_go_with_what_else_learns_and_their_run_goes_on(options, data, tmp_path, capsys):
    name = "several-" + "".join(map(str, next(iter(options.items())))).replace("_", "-")
    options = options | {"backend": "numpy", "evaluate_every": 1}
    learn_several(data, name, n_steps=2, **options)
    *_, activation = learn_several(data, name, n_steps=4, resume=True, **options)
    assert activation == "sigmoid"
    said = capsys.readouterr().err
    assert "nats per label, micro F1" in said[said.index("step 4: held out") :]


def test_a_head_of_before_which_does_not_say_what_it_is_has_one_label_a_text(data, words):
    path = data / "models" / "words" / "classes.npz"
    content = path.read_bytes()
    try:
        arrays = dict(np.load(path))
        assert str(arrays.pop("activation")) == "softmax"
        np.savez(path, **arrays)
        *_, activation = classify.load("words", str(data / "models"))
    finally:
        path.write_bytes(content)
    assert activation == "softmax"


def test_one_label_a_text_and_several_are_not_mixed(data, words, several, tmp_path):
    models_dir, one, many = str(data / "models"), f"{data}/held_out.jsonl", f"{data}/several.jsonl"
    options = {"model_size": "base", "models_dir": models_dir, "name": "new"}
    assert "is of another kind than" in message(classify.train, one, many, **options)
    assert "is of another kind than" in message(classify.train, one, held_out=many, **options)
    said = message(classify.evaluate, many, name="words", models_dir=models_dir)
    assert "line 1 has a list of labels, and words has learned from one label a text" in said
    said = message(classify.evaluate, one, name="several", models_dir=models_dir)
    assert "line 1 has one label, and several has learned from lists" in said
    (tmp_path / "none.jsonl").write_text('{"text": "a", "label": []}', "utf-8")
    assert "no text has a label" in message(classify.train, f"{tmp_path}/none.jsonl", **options)
    (tmp_path / "other.jsonl").write_text('{"text": "a", "label": ["colours", "odd"]}', "utf-8")
    said = message(classify.evaluate, f"{tmp_path}/other.jsonl", name="several", models_dir=models_dir)
    assert "line 1: 'odd' is none of the classes colours" in said


def test_predict_prints_a_line_of_json_for_every_text_of_a_file(data, words):
    done = command(
        *("predict", "red green blue", "--texts_file", "-", "--name", "words", "--models_dir", data / "models"),
        input="one two three\nmile foot inch\n",
        script="examples/classify.py",
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == ["red green blue", "one two three", "mile foot inch"]
    assert [answer["label"] for answer in answers] == ["colours", "numbers", "ünits"]
    for answer in answers:
        assert [*answer["probabilities"]] == sorted(WORDS)
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert max(answer["probabilities"], key=answer["probabilities"].get) == answer["label"]


def test_predict_reads_standard_input_for_a_dash(data, words):
    args = "predict", "-", "--name", "words", "--models_dir", data / "models"
    done = command(*args, input="one two three\n", script="examples/classify.py")
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["one two three"]


def test_a_random_tenth_is_held_out_by_default_even_of_files_that_are_sorted(data, tmp_path, monkeypatch):
    def stop(model_dir, tokenizer_dir, hparams, learns, frozen, task, *args):
        learned.extend(task.data.rows(task.data.order(np.random.default_rng(0)))["label"].tolist())
        raise SystemExit

    learned, lines = [], (data / "train.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "sorted.jsonl").write_text(
        "\n".join(sorted(lines, key=lambda line: json.loads(line)["label"])), "utf-8"
    )
    monkeypatch.setattr(training, "train", stop)
    with pytest.raises(SystemExit):
        classify.train(f"{tmp_path}/sorted.jsonl", model_size="base", name="new", models_dir=str(data / "models"))
    last = sum(json.loads(line)["label"] == "ünits" for line in lines)
    assert len(learned) == 108
    assert last - 12 < learned.count(2) < last


def message(function, *args, **settings):
    with pytest.raises(SystemExit) as error:
        function(*args, **settings)
    assert "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"text": "a", "label": "b"}\n{"text": "a"}', 'line 2: no object with {"text", "label"}'),
        ('{"text": "a", "label": 5.5}', 'line 1: "label" is 5.5, not a text'),
        ('{"text": "a", "label": true}', 'line 1: "label" is True, not a text'),
        ('{"text": "a", "label": "b"}', "there is one class only, 'b'"),
        ('{"text": "a", "label": "b"}\n{"text": "a", "label": "c"}', "too few to learn from"),
    ],
)
def test_bad_data_are_named_in_one_line(lines, said, data, tmp_path):
    (tmp_path / "data.jsonl").write_text(lines, "utf-8")
    options = {"model_size": "base", "models_dir": str(data / "models")}
    assert said in message(classify.train, f"{tmp_path}/data.jsonl", name="new", **options)
    assert not (data / "models" / "new").exists()


def test_mistakes_are_told_in_one_line(data, words, tmp_path):
    models_dir, held_out = str(data / "models"), f"{data}/held_out.jsonl"
    (tmp_path / "other.jsonl").write_text('{"text": "a", "label": "odd"}', "utf-8")
    said = message(classify.evaluate, f"{tmp_path}/other.jsonl", name="words", models_dir=models_dir)
    assert "line 1: 'odd' is none of the classes colours, numbers, ünits" in said
    assert "base is no classifier" in message(classify.evaluate, held_out, name="base", models_dir=models_dir)
    assert "no texts" in message(classify.predict, name="words", models_dir=models_dir)
    for texts, more in ((("-", "more"), {}), (("-",), {"texts_file": held_out})):
        assert "give it alone" in message(classify.predict, *texts, name="words", models_dir=models_dir, **more)
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    said = message(classify.predict, name="words", models_dir=models_dir, texts_file=f"{tmp_path}/latin1.txt")
    assert said.endswith("latin1.txt is not valid Unicode text: it must be UTF-8")
    both = {"head_only": True, "lora_rank": 2}
    assert "do not go together" in message(classify.train, held_out, name="new", models_dir=models_dir, **both)
    assert_one_line_error(command("learn", script="examples/classify.py"), "learn is none of train, evaluate, predict")
    done = command(script="examples/classify.py")
    assert_one_line_error(done, "say what to do: train, evaluate, predict (see --help)")


def test_a_classifier_whose_run_died_while_it_saved_a_better_one_is_told_of(data, words):
    models_dir = data / "models"
    (models_dir / ".words.new").mkdir()
    try:
        said = message(classify.predict, "red", name="words", models_dir=str(models_dir))
    finally:
        (models_dir / ".words.new").rmdir()
    assert "died while it saved a better classifier: end it with train and --resume, or delete" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"w": np.zeros((35, 2), np.float32)}, "does not fit the model beside it"),
        ({"labels": np.array(["a", "a", "b"])}, "is damaged"),
        ({"labels": np.array([1, 2, 3])}, "does not fit"),
        ({"b": np.zeros(3, np.int32)}, "is damaged"),
        ({"labels": np.array(["a", None, 5], object)}, "Object arrays cannot be loaded"),
        ({"activation": np.array("tanh")}, "is damaged"),
    ],
)
def test_a_damaged_head_is_told_in_one_line(change, said, data, words):
    path = data / "models" / "words" / "classes.npz"
    content = path.read_bytes()
    try:
        np.savez(path, **(dict(np.load(path)) | change))
        assert said in message(classify.predict, "red", name="words", models_dir=str(data / "models"))
    finally:
        path.write_bytes(content)


def test_a_thousand_classes_are_drawn_as_pixels_without_a_font(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    classify.draw_confusion(tmp_path / "a.png", np.eye(1000, dtype=int), [f"L{i}" for i in range(1000)])
    pixels = np.asarray(image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels, 255 - 255 * np.eye(1000))


def test_labels_are_printed_without_what_a_terminal_would_obey():
    assert classify.printable("a\x1b[2Jé") == "a?[2Jé"


@pytest.mark.filterwarnings("error")
def test_labels_in_any_script_and_with_signs_of_mathematics_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    classify.draw_confusion(tmp_path / "a.png", np.eye(3, dtype=int), [r"$\frac{$", "爱情", "战争"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
