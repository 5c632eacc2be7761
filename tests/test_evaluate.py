"""examples/evaluate.py: its figures are those of transformers, and of the bundled model's README."""

import html
import importlib.util
import itertools
import json
import math
import os
import re

import conftest
import numpy as np
import pytest
from conftest import HPARAMS, REPO, assert_one_line_error, command

from gpt2 import gpt2, softmax
from utils import load_encoder_hparams_and_params

SCRIPT = "examples/evaluate.py"
HELD_OUT = REPO / "tests" / "data" / "tinyshakespeare_heldout.txt"
TEXT = HELD_OUT.read_text(encoding="utf-8")
N_CTX, N_HEAD = HPARAMS["n_ctx"], HPARAMS["n_head"]

spec = importlib.util.spec_from_file_location("evaluate", REPO / SCRIPT)
evaluate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluate)


@pytest.fixture(scope="module")
def encoder(models_dir):
    return load_encoder_hparams_and_params("tiny", models_dir)[0]


@pytest.fixture(scope="module")
def log_probs(params):
    """The tiny model's log-probabilities of the token behind each of some ids, as transformers computes them."""
    torch = conftest.optional("torch")
    model = conftest.hugging_face(HPARAMS, params)

    def log_probs(ids):  # [n_seq] -> [n_seq, n_vocab]
        with torch.no_grad():
            return model(torch.tensor([[*ids]])).logits[0].double().log_softmax(-1).numpy()

    return log_probs


@pytest.fixture(scope="module")
def jax_params(params):
    jax = conftest.optional("jax")
    return jax.tree.map(jax.numpy.asarray, params)


def random_rows(*lengths):
    """[(ids, n_scored)], of which the second half of each is scored."""
    return [(ids, len(ids) // 2) for ids in conftest.prompts_of_lengths(*lengths)]


def figures(done):
    """What the command printed: {name: number}."""
    assert done.returncode == 0
    assert re.fullmatch(r"(evaluate\.py: JAX .*\n)?", done.stderr)  # it says on what device it runs
    lines = (re.fullmatch(r"(.*?)  +([\d,.]+)", line) for line in done.stdout.splitlines())
    return {line[1]: float(line[2].replace(",", "")) for line in lines}


def write_lines(path, *objects):
    path.write_text("".join(json.dumps(line) + "\n" for line in objects), encoding="utf-8")
    return path


# texts


@pytest.mark.parametrize("stride", [1, 7, 32, 63, 64])
def test_a_text_takes_the_nats_that_transformers_gives_its_windows(params, log_probs, stride):
    (ids,) = conftest.prompts_of_lengths(100)
    expected, n_scored = [], 0
    for start in itertools.count(0, stride):  # as in transformers' guide to perplexity
        window = ids[start : start + N_CTX + 1]
        nats = -log_probs(window[:-1])[range(len(window) - 1), window[1:]]
        expected += [*nats[n_scored - start :]]
        n_scored = start + len(window) - 1
        if n_scored == len(ids) - 1:
            break
    got = np.concatenate([*evaluate.text_nats(params, ids, N_CTX, N_HEAD, stride)])
    assert got.sum() == pytest.approx(sum(expected), rel=1e-5)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_the_bundled_model_has_the_loss_that_its_readme_states():
    readme = (REPO / "models" / "shakespeare" / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"\*\*(\d\.\d+) nats per character\*\*, (\d\.\d+) nats per token", readme)
    got = figures(command(HELD_OUT, "--model_size", "shakespeare", script=SCRIPT))
    assert (f"{got['nats per character']:.3f}", f"{got['nats per token']:.3f}") == stated.groups()


def test_figures_per_token_character_and_byte_are_of_the_same_nats(tiny, tmp_path):
    text = "naïve café 東京 🙂\n" * 9
    (tmp_path / "text.txt").write_bytes(text.replace("\n", "\r\n").encode())  # which training does not see, either
    got = figures(command(tmp_path / "text.txt", model=tiny, script=SCRIPT))
    assert (got["characters"], got["bytes"]) == (len(text), len(text.encode()))
    nats = got["nats per token"] * got["tokens"]
    assert got["perplexity per token"] == pytest.approx(math.exp(got["nats per token"]), rel=1e-3)
    assert got["nats per character"] == pytest.approx(nats / len(text), rel=1e-3)
    assert got["bits per character"] == pytest.approx(nats / len(text) / math.log(2), rel=1e-3)
    assert got["bits per byte"] == pytest.approx(nats / len(text.encode()) / math.log(2), rel=1e-3)


def test_the_first_token_is_predicted_from_the_end_of_a_text(encoder, params, log_probs):
    _, ids, nats = evaluate.evaluate_text("Hello", encoder, params, N_HEAD)
    end = encoder.encoder["<|endoftext|>"]
    assert nats == pytest.approx([-log_probs([end, *ids[:i]])[-1][ids[i]] for i in range(len(ids))], rel=1e-4)


def test_jax_gives_the_same_figures_as_numpy(tiny, tmp_path):
    pytest.importorskip("jax")
    (tmp_path / "text.txt").write_text(TEXT[:1000], encoding="utf-8")
    numpy, jax = (
        figures(command(tmp_path / "text.txt", "--stride=20", *flags, model=tiny, script=SCRIPT))
        for flags in ([], ["--backend=jax"])
    )
    assert jax == pytest.approx(numpy, rel=1e-4)


# batches


def test_rows_of_a_batch_are_scored_as_each_alone(params):
    rows = random_rows(2, 3, 40, 5, 65, 17, 30, 30, 64)
    batch = [*evaluate.scores(params, rows, N_HEAD)]
    for row, (nats, likeliest) in zip(rows, batch, strict=True):
        ((alone, likeliest_alone),) = evaluate.scores(params, [row], N_HEAD)
        np.testing.assert_allclose(nats, alone, rtol=1e-3, atol=1e-4)
        assert len(nats) == len(alone) == row[1]
        assert likeliest.tolist() == likeliest_alone.tolist()


def test_jax_scores_rows_of_all_lengths_as_numpy_does(params, jax_params):
    rows = random_rows(2, 3, 40, 5, 65, 17, 30, 30, 64)
    for ours, theirs in zip(
        evaluate.scores(params, rows, N_HEAD), evaluate.scores(jax_params, rows, N_HEAD), strict=True
    ):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
        assert ours[1].tolist() == theirs[1].tolist()


def test_batches_side_by_side_give_the_same_in_the_same_order(params):
    rows = random_rows(*range(2, 66), *range(2, 66))
    one, four = ([nats for nats, _ in evaluate.scores(params, rows, N_HEAD, n)] for n in (1, 4))
    assert [len(nats) for nats in one] == [len(nats) for nats in four] == [n_scored for _, n_scored in rows]
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(four), rtol=1e-3, atol=1e-4)  # rows in their order


def test_a_batch_holds_no_more_tokens_than_told_unless_one_row_does():
    rows = [3, 5, 2, 9, 1, 1, 1, 20, 4]
    got = [*evaluate.batches(rows, lambda row: row, 10)]
    assert [*itertools.chain(*got)] == rows
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 10 for batch in got)
    assert got == [[3, 5], [2], [9], [1, 1, 1], [20], [4]]


def test_the_losses_can_be_differentiated_and_mapped(params, jax_params):
    import jax

    windows = np.array(conftest.prompts_of_lengths(9, 9))
    nats, _ = evaluate.losses(params, windows, N_HEAD)
    mapped = jax.jit(jax.vmap(lambda window: evaluate.losses(jax_params, window, N_HEAD)[0]))(windows)
    np.testing.assert_allclose(mapped, nats, rtol=1e-3, atol=1e-3)
    bias = jax.jit(jax.grad(lambda params: evaluate.losses(params, windows, N_HEAD)[0].sum()))(jax_params)["ln_f"]["b"]
    # the gradient of a row's loss to what the matrix wte multiplies is wte.T @ (probabilities - what was right)
    probabilities = softmax(gpt2(windows[:, :-1], **params, n_head=N_HEAD))
    wrong = probabilities - np.eye(HPARAMS["n_vocab"])[windows[:, 1:]]
    np.testing.assert_allclose(bias, (wrong @ params["wte"]).sum((0, 1)), rtol=1e-2, atol=1e-2)


# tasks

CONTEXT = ("activity_label", "ctx_a", "ctx_b")  # of HellaSwag
HELLASWAG = '{"activity_label": "a", "ctx_a": "a", "ctx_b": "a", "endings": %s}'


def ending_scores(encoder, log_probs, context, ending):
    """The nats of each token of an ending, and whether each is the likeliest."""
    ids, n = encoder.encode(f"{context} {ending}"), len(encoder.encode(context))
    rows = log_probs(ids[-N_CTX - 1 : -1])[n - len(ids) :]
    return -rows[range(len(rows)), ids[n:]], rows.argmax(-1) == ids[n:]


def test_lambada_is_the_accuracy_and_perplexity_of_the_last_word(tiny, encoder, log_probs, tmp_path):
    texts = [" ".join(TEXT[start:].split()[:n]) for start, n in [(100, 9), (900, 12), (2000, 5), (3000, 2)]]
    context = "Good morrow"
    likeliest = encoder.decode([log_probs(encoder.encode(context))[-1].argmax()])
    while not re.fullmatch(r" \w+", likeliest):  # a context whose likeliest token is a word
        context += "." if len(context) % 2 else " and"
        likeliest = encoder.decode([log_probs(encoder.encode(context))[-1].argmax()])
    texts.append(context + likeliest)

    results = [ending_scores(encoder, log_probs, *text.rsplit(" ", 1)) for text in texts]
    right = [all(right) for _, right in results]
    assert 0 < sum(right) < len(right)
    got = figures(
        command(
            write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts)),
            "--task=lambada",
            model=tiny,
            script=SCRIPT,
        )
    )
    assert got["examples"] == 5
    assert got["accuracy"] == pytest.approx(np.mean(right), abs=1e-4)
    assert got["perplexity"] == pytest.approx(math.exp(np.mean([nats.sum() for nats, _ in results])), rel=1e-3)


def test_cloze_takes_the_ending_of_the_fewest_nats_and_acc_norm_those_per_character(tiny, encoder, log_probs, tmp_path):
    rng, words = np.random.default_rng(0), TEXT.split()
    examples = []
    for start in range(0, 200, 20):
        endings = [" ".join(words[i : i + 1 + i % 4]) for i in rng.integers(0, 5000, 4)]
        examples.append(
            {"context": " ".join(words[start : start + 9]), "endings": endings, "label": int(rng.integers(4))}
        )
    right, right_per_character = [], []
    for example in examples:
        nats = [ending_scores(encoder, log_probs, example["context"], end)[0].sum() for end in example["endings"]]
        right.append(np.argmin(nats) == example["label"])
        lengths = [len(ending) for ending in example["endings"]]
        right_per_character.append(np.argmin(np.divide(nats, lengths)) == example["label"])
    assert np.mean(right) != np.mean(right_per_character)
    got = figures(command(write_lines(tmp_path / "a.jsonl", *examples), "--task=cloze", model=tiny, script=SCRIPT))
    assert got == pytest.approx(
        {"examples": 10, "acc": np.mean(right), "acc_norm": np.mean(right_per_character)}, abs=1e-4
    )


def test_hellaswag_is_cleaned_of_the_marks_of_wikihow():
    context, endings, label = evaluate.hellaswag(
        activity_label="Baking",
        ctx_a=" How to bake [title] Mix. [step] Take flour.",
        ctx_b="THEN you",
        endings=[" [step] Stir  it. ", "rest [substeps] now"],
        label="1",
    )
    assert context == "Baking: How to bake. Mix. Take flour. Then you"
    assert (endings, label) == ([" Stir it.", "rest now"], 1)


def test_spaces_before_an_ending_belong_to_it(encoder):
    for context in ("To be", "To be  ", "To be\n"):
        ids, n_scored = evaluate.encode_pair(encoder, context, "or not")
        assert encoder.decode(ids) == f"{context} or not"
        assert encoder.decode(ids[:-n_scored]) == "To be"


def test_without_a_context_an_ending_is_what_begins_a_text(encoder):
    ids, n_scored = evaluate.encode_pair(encoder, "", "or not")
    assert (ids[0], encoder.decode(ids[1:]), n_scored) == (encoder.encoder["<|endoftext|>"], " or not", len(ids) - 1)


def test_a_context_that_is_too_long_loses_its_beginning_and_the_user_is_told(tiny, encoder, log_probs, tmp_path):
    text = TEXT[:600].replace("\n", " ") + " end"
    assert len(encoder.encode(text)) > N_CTX + 1
    done = command(write_lines(tmp_path / "a.jsonl", {"text": text}), "--task=lambada", model=tiny, script=SCRIPT)
    assert done.stderr == "1 contexts are longer than the model's, and lose their beginning\n"
    nats, _ = ending_scores(encoder, log_probs, *text.rsplit(" ", 1))
    assert float(done.stdout.split()[-1].replace(",", "")) == pytest.approx(math.exp(nats.sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("task", "line", "said"),
    [
        ("lambada", "no JSON", "it is no JSON"),
        ("lambada", "[" * 100_000, "it is no JSON"),
        ("lambada", '["text"]', "no example of lambada, which has text"),
        ("lambada", '{"context": "a b"}', "no example of lambada, which has text"),
        ("lambada", '{"text": 5}', "no example of lambada"),
        ("lambada", '{"text": "ends with a space "}', "one is empty"),
        ("lambada", '{"text": "half a pair \\ud800"}', "not valid Unicode text"),
        ("cloze", '{"context": "a", "endings": [], "label": 0}', "there are no endings"),
        ("cloze", '{"context": "a", "endings": ["b"], "label": 1}', "label must be from 0 to 0, not 1"),
        ("cloze", '{"context": "a", "endings": ["b"], "label": true}', "not True"),
        ("cloze", '{"context": "a", "endings": ["b", 5], "label": 0}', "no example of cloze"),
        ("cloze", '{"context": 5, "endings": ["b"], "label": 0}', "no example of cloze"),
        (
            "hellaswag",
            '{"ctx": "a"}',
            "which has activity_label, ctx_a, ctx_b, endings, label: it is no object with all",
        ),
        ("hellaswag", HELLASWAG % '5, "label": 0', "one of these is not of its kind"),
        ("hellaswag", HELLASWAG % '["b"], "label": "x"', "label must be from 0 to 0, not 'x'"),
        ("lambada", '{"text": null}', "one of these is not of its kind"),
    ],
)
def test_a_line_that_is_no_example_is_named_before_the_model_is_looked_at(task, line, said, tmp_path):
    good = json.dumps({"text": "a b", "context": "a", "endings": ["b"], "label": 0} | dict.fromkeys(CONTEXT, "a"))
    path = tmp_path / "examples.jsonl"
    path.write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    done = command(path, "--task", task, "--model_size=none", "--models_dir", tmp_path, script=SCRIPT)
    assert_one_line_error(done, f"{path}, line 3: ")
    assert said in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task=arc"], "no task 'arc': choose lambada, hellaswag, cloze"),
        (["--task=cloze", "--stride=5"], "--stride is for texts"),
        (["--task=cloze", "--heatmap=a.html"], "--heatmap is for texts"),
        (["--heatmap=/nowhere/a.html"], "no such folder"),
        (["--heatmap=/"], "/ cannot be written: it is a folder"),
        (["--heatmap="], "--heatmap needs a value"),
        (["--heatmap", HELD_OUT], "is the text itself"),
        (["--stride=0"], "--stride must be a whole number from 1 to the model's context of 64"),
        (["--stride=65"], "not 65"),
        (["--stride=half"], "not 'half'"),
        (["--backend=abacus"], "backend must be numpy, jax or cupy, not 'abacus'"),
        (["--dtype=bfloat16"], "dtype must be float32 with NumPy, not 'bfloat16'"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, said, tiny):
    assert_one_line_error(command(HELD_OUT, *flags, model=tiny, script=SCRIPT), said)


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"caf\xe9", "not valid Unicode text")])
def test_a_file_without_text_is_told_in_one_line(content, said, tiny, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    assert_one_line_error(command(tmp_path / "a.txt", model=tiny, script=SCRIPT), said)


# the heatmap


def test_a_bar_named_evaluating_shows_on_a_terminal(tiny, tmp_path):
    (tmp_path / "text.txt").write_text("one two", "utf-8")
    with conftest.on_a_terminal(tmp_path / "text.txt", model=tiny, script=SCRIPT) as (_, terminal):
        terminal.expect("evaluating: 100%.*nats per token=")


def test_a_file_whose_name_is_no_unicode_is_measured_and_shown(tiny, tmp_path):
    conftest.needs_posix("names of any bytes")
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as f:
        f.write("one two")
    figures(command(path, "--heatmap", tmp_path / "a.html", model=tiny, script=SCRIPT))
    assert "caf?.txt, tiny" in (tmp_path / "a.html").read_text("utf-8")


def test_the_heatmap_shows_the_text_as_it_is_with_the_nats_of_every_token(tiny, encoder, params, tmp_path):
    text = 'To <b>be</b> &amp; "not"\nnaïve 東京 🙂'
    path = tmp_path / ("i.txt" if os.name == "nt" else "<i>.txt")  # Windows has no such names
    path.write_text(text, encoding="utf-8")
    figures(command(path, "--heatmap", tmp_path / "a.html", model=tiny, script=SCRIPT))
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert set(re.findall(r"</?(\w+)", page)) == {"meta", "title", "style", "p", "pre", "span"}
    spans = re.findall(r'<span style="--nats:[\d.]+" title="([\d.]+)">(.*?)</span>', page.split("<pre>")[1], re.DOTALL)
    assert html.unescape("".join(shown for _, shown in spans)).replace("↵", "") == text
    _, _, nats = evaluate.evaluate_text(text, encoder, params, N_HEAD)
    assert sum(float(title) for title, _ in spans) == pytest.approx(sum(nats), abs=0.01 * len(spans))
    assert len(spans) < len(nats)  # tokens that are parts of a character are shown together
