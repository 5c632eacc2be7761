"""examples/finetune.py: it makes the same steps as PyTorch, transformers and PEFT, and takes data for what they are."""

import functools
import json
import re
import sys

import jax
import numpy as np
import pytest
import torch
from conftest import REPO, command, hugging_face, leaves, wild_params, write_tokenizer

sys.path.insert(0, str(REPO / "examples"))
import finetune
import lora
import on_jax
import texts

from encoder import get_encoder
from files.checkpoint import save_checkpoint
from gpt2 import gpt2
from utils import load_encoder_hparams_and_params

torch.set_num_threads(1)  # for such small matrices more are slower
ODD = {"n_vocab": 307, "n_ctx": 24, "n_embd": 35, "n_head": 5, "n_layer": 2}
LAYERS = ["c_attn", "c_proj", "c_fc"]
TEXT_FILE = str(REPO / "tests" / "data" / "tinyshakespeare_heldout.txt")
DATA = "model.ckpt.data-00000-of-00001"
RECIPE = {"n_steps": 20, "learning_rate": 1e-3, "weight_decay": 0.1}


def some_rows(hparams, n_rows=4, n_seq=17, seed=0):
    """Random ids, of which those of some prompts do not count."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, hparams["n_vocab"], (n_rows, n_seq + 1))
    return {"ids": ids, "counted": (np.arange(n_seq) >= rng.integers(0, n_seq // 2, (n_rows, 1))).astype(np.float32)}


def loss_of(n_head, dtype="float32", recompute=False):
    options = {"n_head": n_head, "scale": 2.0, "dtype": dtype, "recompute": recompute}
    return functools.partial(on_jax.loss, **options)


def steps(learned, frozen, loss, all_rows, accumulate=1, recipe=RECIPE):
    """(losses, learned) of as many steps as there are rows, by the loop's own update."""
    optimizer, losses = on_jax.optimizer(learned, **recipe), []
    update = jax.jit(functools.partial(on_jax.update, loss=loss, optimizer=optimizer))
    state = optimizer.init(learned)
    for rows in all_rows:
        rows = {name: array.reshape(accumulate, -1, array.shape[-1]) for name, array in rows.items()}
        mean, learned, state = update(learned, state, frozen, rows)
        losses.append(float(mean))
    return losses, learned


def torch_steps(model, all_rows, recipe=RECIPE, dtype=torch.float32):
    """The losses of the same steps in PyTorch, which change model: AdamW, warm-up and cosine, clipping at 1."""
    named = [(name, weights) for name, weights in model.named_parameters() if weights.requires_grad]
    matrices, others = ([w for _, w in named if (w.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": recipe["weight_decay"]}, {"params": others, "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, lr=recipe["learning_rate"], betas=(0.9, 0.99))
    n_steps, warm_up = recipe["n_steps"], recipe["n_steps"] // 50

    def share(step):
        if step < warm_up:
            return step / warm_up
        return 0.5 * (1 + np.cos(np.pi * (step - warm_up) / (n_steps - warm_up)))

    schedule, losses = torch.optim.lr_scheduler.LambdaLR(adamw, share), []
    for rows in all_rows:
        ids = torch.tensor(rows["ids"])
        labels = torch.where(torch.nn.functional.pad(torch.tensor(rows["counted"]), (1, 0)) > 0, ids, -100)
        cast = {name: weights.to(dtype) for name, weights in model.named_parameters()}
        loss = torch.func.functional_call(model, cast, (ids,), {"labels": labels}).loss
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w for _, w in named], 1.0)
        adamw.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def with_peft(model, rank, adapters):
    """transformers' model with PEFT's LoRA of the same matrices A and B."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LAYERS, fan_in_fan_out=True)
    model = peft.get_peft_model(model, config).eval()
    for name, weights in model.named_parameters():
        if "lora_" in name:
            _, _, _, _, i, sublayer, layer, which, *_ = name.split(".")
            weights.data = torch.tensor(np.array(adapters[int(i)][f"{sublayer}/{layer}"][which[-1]]).T.copy())
    return model


def bundled():
    _, hparams, params = load_encoder_hparams_and_params("shakespeare", str(REPO / "models"))
    return hparams, params


def nearly_same(ours, theirs, gradient):
    """To 1e-5 of the largest, but for weights whose gradient is mere rounding: Adam makes a whole step of it."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    is_sure = np.abs(np.asarray(gradient)) > 1e-6
    np.testing.assert_allclose(ours[is_sure], theirs[is_sure], rtol=0, atol=1e-5 * np.abs(theirs).max())
    return is_sure.sum()


MODELS = pytest.mark.parametrize("model", [lambda: (ODD, wild_params(ODD)), bundled], ids=["odd", "bundled"])
# peft reads what transformers has renamed: with pytest -W error, that is no fault of ours
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@MODELS
def test_a_step_of_full_fine_tuning_is_that_of_pytorch(model):
    hparams, params = model()
    theirs, rows = hugging_face(hparams, params), some_rows(hparams)
    (loss,), learned = steps({"params": params}, {}, loss_of(hparams["n_head"]), [rows])
    (their_loss,) = torch_steps(theirs, [rows])
    assert loss == pytest.approx(their_loss, rel=1e-5)

    weights, n_sure, n = dict(theirs.named_parameters()), 0, 0
    for name, array in leaves(
        {"h" if key == "blocks" else key: node for key, node in learned["params"].items()}, "transformer"
    ):
        stem, _, leaf = name.rpartition(".")
        other = weights[{"g": f"{stem}.weight", "w": f"{stem}.weight", "b": f"{stem}.bias"}.get(leaf, f"{name}.weight")]
        n_sure, n = n_sure + nearly_same(array, other.detach(), other.grad), n + other.numel()
    assert n_sure > 0.9 * n


@peft_warns
@MODELS
def test_a_step_of_lora_is_that_of_peft_and_moves_the_adapters_alone(model):
    hparams, params = model()
    rows, rng = some_rows(hparams), np.random.default_rng(1)
    adapters = lora.new_adapters(params, 3, LAYERS)
    for matrices in (matrices for adapter in adapters for matrices in adapter.values()):  # B = 0 leaves A still
        matrices["B"] = 0.1 * rng.standard_normal(matrices["B"].shape, dtype=np.float32)
    theirs = with_peft(hugging_face(hparams, params), 3, adapters)
    (loss,), learned = steps({"adapters": adapters}, {"params": params}, loss_of(hparams["n_head"]), [rows])
    (their_loss,) = torch_steps(theirs, [rows])
    assert loss == pytest.approx(their_loss, rel=1e-5)

    n_sure, n = 0, 0
    for name, weights in theirs.named_parameters():
        if "lora_" in name:
            _, _, _, _, i, sublayer, layer, which, *_ = name.split(".")
            ours = np.asarray(learned["adapters"][int(i)][f"{sublayer}/{layer}"][which[-1]]).T
            n_sure, n = n_sure + nearly_same(ours, weights.detach(), weights.grad), n + ours.size
    assert n_sure > 0.9 * n == 0.9 * on_jax.size(learned)


def test_fifty_steps_in_bfloat16_are_as_near_to_float32_as_in_pytorch():
    recipe, params, n_head = RECIPE | {"n_steps": 50}, wild_params(ODD), ODD["n_head"]
    rows = [some_rows(ODD, seed=step % 5) for step in range(50)]
    ours, _ = steps({"params": params}, {}, loss_of(n_head), rows, recipe=recipe)
    ours_half, learned = steps({"params": params}, {}, loss_of(n_head, "bfloat16"), rows, recipe=recipe)
    theirs = torch_steps(hugging_face(ODD, params), rows, recipe)
    theirs_half = torch_steps(hugging_face(ODD, params), rows, recipe, torch.bfloat16)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert np.abs(np.subtract(ours_half, ours)).max() < 2 * np.abs(np.subtract(theirs_half, theirs)).max()
    assert ours_half[-1] < 0.8 * ours_half[0]
    assert {array.dtype.name for array in jax.tree.leaves(learned)} == {"float32"}


def test_a_batch_in_parts_whose_activations_are_computed_again_gives_the_same_curve():
    params, n_head, rows = wild_params(ODD), ODD["n_head"], [some_rows(ODD, seed=step % 5) for step in range(20)]
    losses, _ = steps({"params": params}, {}, loss_of(n_head), rows)
    in_parts, _ = steps({"params": params}, {}, loss_of(n_head, recompute=True), rows, accumulate=4)
    np.testing.assert_allclose(in_parts, losses, rtol=1e-4)


def test_recomputation_takes_less_memory():
    params, rows = wild_params(ODD | {"n_layer": 4}), some_rows(ODD, n_rows=32)
    takes = []
    for recompute in (False, True):
        loss = loss_of(ODD["n_head"], recompute=recompute)
        gradient = jax.jit(jax.grad(lambda params, loss=loss: loss({"params": params}, {}, rows)[0]))
        takes.append(on_jax.compiled(gradient, recompute, params).memory_analysis().temp_size_in_bytes)
    assert takes[1] < 0.6 * takes[0]


# data


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model to begin with: base."""
    path = tmp_path_factory.mktemp("models")
    hparams = ODD | {"n_ctx": 40}
    save_checkpoint(path / "base", hparams, wild_params(hparams))
    write_tokenizer(path / "base", hparams["n_vocab"])
    return path


@pytest.fixture(scope="module")
def encoder(models):
    return get_encoder("base", models)


def test_a_file_a_folder_and_a_glob_hold_documents_and_endoftext_parts_them(tmp_path, encoder):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two", "utf-8")
    (tmp_path / "b.txt").write_text("thrée", "utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n\n{"text": "five", "id": 5}\n', "utf-8")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.txt").write_text("six", "utf-8")
    for patterns, expected in [
        ([f"{tmp_path}/a.txt"], ["one", "two"]),
        ([f"{tmp_path}/*.txt"], ["one", "two", "thrée"]),
        ([str(tmp_path)], ["one", "two", "thrée", "four", "five", "six"]),
        ([f"{tmp_path}/c.jsonl", f"{tmp_path}/b.txt"], ["four", "five", "thrée"]),
    ]:
        documents = texts.read_documents(patterns, ("text",))
        assert [document["text"] for document in documents] == expected
    end = encoder.encoder["<|endoftext|>"]
    assert texts.text_ids(encoder, ["one", "two"]).tolist() == [
        end, *encoder.encode("one"), end, *encoder.encode("two")
    ]  # fmt: skip


def test_the_last_tenth_of_the_characters_is_held_out_even_if_it_begins_within_a_text():
    assert texts.hold_out(["abcdefghij" * 2]) == (["abcdefghijabcdefgh"], ["ij"])
    assert texts.hold_out(["a" * 20, "b" * 9, "c"]) == (["a" * 20, "bbbbbbb"], ["bb", "c"])
    assert texts.hold_out(["a" * 18, "cc"]) == (["a" * 18], ["cc"])


def test_only_completions_are_learned_as_with_labels_of_minus_100_in_transformers(encoder):
    documents = [
        {"prompt": "What is this?", "completion": " It is a test.", "where": "line 1"},
        {"prompt": "", "completion": "No.", "where": "line 2"},
    ]
    rows = finetune.padded(finetune.examples_of(encoder, documents, 40))
    params, end = wild_params(ODD | {"n_ctx": 40}), encoder.encoder["<|endoftext|>"]
    loss = jax.jit(loss_of(ODD["n_head"]))
    total, n = loss({"params": params}, {}, rows)

    labels = np.full(rows["ids"].shape, -100)  # by hand
    for row, (prompt, completion) in enumerate([("What is this?", " It is a test."), ("", "No.")]):
        n_prompt, ids = len(encoder.encode(prompt) or [end]), [*encoder.encode(completion), end]
        labels[row, n_prompt : n_prompt + len(ids)] = ids
    model = hugging_face(ODD | {"n_ctx": 40}, params)
    expected = model(torch.tensor(rows["ids"]), labels=torch.tensor(labels)).loss.item()
    assert float(total / n) == pytest.approx(expected, rel=1e-5)


def message(*args, **settings):
    with pytest.raises(SystemExit) as error:
        finetune.main(*args, **settings)
    assert "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"text": "a"}\nno JSON', "line 2: Expecting value"),
        (
            '{"text": "a"}\n[]\n{"text": 5}\n{',
            'line 2: no object with {"text"} or {"prompt", "completion"} or {"messages"} (line 3, line 4',
        ),
        ('{"prompt": "a", "completion": ""}', "line 1: \"completion\" is ''"),
        ('{"prompt": "a"}', "line 1: no object with"),
        ('{"text": "\\ud800"}', "line 1: not valid Unicode text"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}', "line 2 is of another kind than"),
        ('{"prompt": "' + "long " * 50 + '", "completion": "b"}', "line 1 is longer than the 40 tokens"),
        ("", "is empty"),
        ("\n\n", "has no text"),
        ('{"text": "short"}', "too short"),
        ('{"prompt": "a", "completion": "b"}\n' * 5, "4 are too few to learn from 8 at once"),
    ],
)
def test_bad_data_are_named_in_one_line_and_leave_nothing_behind(lines, said, models, tmp_path):
    (tmp_path / "data.jsonl").write_text(lines, "utf-8")
    assert said in message(f"{tmp_path}/data.jsonl", model_size="base", name="new", models_dir=str(models))
    assert not (models / "new").exists()


@pytest.mark.parametrize(
    ("files", "change", "said"),
    [
        (["no.txt"], {}, "no.txt cannot be read"),
        ([], {}, "no files to learn from"),
        ([TEXT_FILE], {"name": ""}, "--name is needed"),
        ([TEXT_FILE], {"name": "355M"}, "'355M' is the name of a model of OpenAI's: choose another for yours"),
        ([TEXT_FILE], {"name": "base"}, "exists"),
        ([TEXT_FILE], {"model_size": "none"}, "no model 'none'"),
        ([TEXT_FILE], {"lora_alpha": 8}, "do nothing without --lora_rank"),
        ([TEXT_FILE], {"lora_rank": 8, "lora_on": "wte"}, "--lora_on takes c_attn, c_proj, c_fc, not wte"),
        ([TEXT_FILE], {"n_ctx": 41}, "the model sees 40 tokens at once, not 41"),
        ([TEXT_FILE], {"dtype": "int8"}, "--dtype must be float32 or bfloat16"),
        ([TEXT_FILE], {"accumulate": 3}, "a --batch_size of 8 cannot be cut into 3 equal parts"),
        ([TEXT_FILE], {"held_out": "no.txt"}, "no.txt cannot be read"),
        ([TEXT_FILE, TEXT_FILE], {}, f"{TEXT_FILE} is given twice"),
        ([TEXT_FILE], {"held_out": TEXT_FILE}, f"{TEXT_FILE} is given twice"),
        ([TEXT_FILE], {"lora_rank": 8, "lora_alpha": 0}, "--lora_alpha must be a number above 0"),
        ([TEXT_FILE], {"resume": True}, "no run to resume"),
        ([TEXT_FILE], {"merge": "models"}, "takes no files"),
        ([], {"merge": "models", "lora_rank": 4, "seed": 1}, "takes no --lora_rank, --seed"),
        ([], {"merge": "no-adapters"}, "the adapters in no-adapters cannot be read"),
        ([], {"merge": "no-adapters", "name": "base"}, "base exists: choose another name, or delete it"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing_behind(files, change, said, models):
    options = {"name": "new", "model_size": "base", "models_dir": str(models)} | change
    assert said in message(*files, **options)
    assert not (models / "new").exists()


# the command


def logits_of(model_size, models_dir, ids):
    _, hparams, params = load_encoder_hparams_and_params(model_size, str(models_dir))
    return gpt2(ids, **params, n_head=hparams["n_head"])


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory):
    """The folder of "mine", to which the command has fine-tuned base on prompts and completions by LoRA."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"{n} and {n}:", "completion": " two of them"}) for n in range(40)]
    path.write_text("\n".join(lines), "utf-8")
    flags = ["--lora_rank=3", f"--lora_on={','.join(LAYERS)}", "--n_steps=30", "--learning_rate=0.02", "--seed=1"]
    done = command(
        path, "--model_size=base", "--name=mine", "--models_dir", models, *flags, script="examples/finetune.py"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return models / "mine", done.stderr


def test_it_says_how_much_learns_how_long_it_takes_and_shows_samples(adapted):
    _, said = adapted
    n_adapters = 3 * 2 * sum(n_in + n_out for n_in, n_out in [(35, 105), (35, 35), (35, 140), (140, 35)])
    assert f"\n{n_adapters:,} of " in f"\n{said}"
    assert "numbers learn; a step needs about 0." in said
    assert "\na step takes " in said
    assert said.count("\n    36 and 36:\n    ") == 4  # before the first step, and after every ten
    assert "cuInit" not in said


def test_the_model_has_learned_the_completions(adapted):
    done = command("7 and 7:", model=adapted[0], n=5)
    assert done.stdout.startswith(" two of the")


@peft_warns
def test_peft_loads_the_adapters_onto_transformers_model_and_merged_they_give_the_same_logits(adapted, models):
    import peft

    _, hparams, params = load_encoder_hparams_and_params("base", str(models))
    _, _, merged = load_encoder_hparams_and_params("mine", str(models))
    ids = np.random.default_rng(0).integers(0, hparams["n_vocab"], 40)
    theirs = peft.PeftModel.from_pretrained(hugging_face(hparams, params), adapted[0])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids[None])).logits[0].numpy()
        in_transformers = hugging_face(hparams, merged)(torch.tensor(ids[None])).logits[0].numpy()
    np.testing.assert_allclose(logits_of("mine", models, ids), expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(in_transformers, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - logits_of("base", models, ids)).max() > 0.1 * np.abs(expected).max()


def test_who_may_read_their_configuration_may_read_the_adapters(adapted):
    files = lora.ADAPTER, lora.ADAPTER_CONFIG
    assert len({(adapted[0] / name).stat().st_mode for name in files}) == 1


@peft_warns
def test_merge_applies_adapters_of_ours_and_of_peft(adapted, models, tmp_path):
    finetune.main(merge=str(adapted[0]), model_size="base", name="again", models_dir=str(models))
    again, trained = (np.fromfile(model_dir / DATA, "<f4") for model_dir in (models / "again", adapted[0]))
    np.testing.assert_allclose(again, trained, rtol=1e-5, atol=1e-7)  # added up by NumPy, and by XLA

    _, hparams, params = load_encoder_hparams_and_params("base", str(models))
    adapters = lora.new_adapters(params, 2, LAYERS)
    theirs = with_peft(hugging_face(hparams, params), 2, adapters)
    for name, weights in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path)
    finetune.main(merge=str(tmp_path), model_size="base", name="peft", models_dir=str(models))
    ids = np.arange(40)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids[None])).logits[0].numpy()
    np.testing.assert_allclose(logits_of("peft", models, ids), expected, atol=1e-4 * np.abs(expected).max())


def test_merge_never_overwrites_a_model(adapted, models):
    before = (adapted[0] / DATA).read_bytes()
    said = message(merge=str(adapted[0]), model_size="base", name="mine", models_dir=str(models))
    assert f"{adapted[0]} exists: go on with --resume, choose another name, or delete it" in said
    assert "exists: choose another name" in message(
        merge=str(adapted[0]), model_size="base", name="base", models_dir=str(models)
    )
    assert (adapted[0] / DATA).read_bytes() == before


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 32 / 16), (True, 32 / 4)])
def test_adapters_are_scaled_as_their_configuration_says(use_rslora, scale):
    # alpha / r, and of rsLoRA (https://arxiv.org/abs/2312.03732) alpha / sqrt(r)
    assert lora.rank_and_scale({"r": 16, "lora_alpha": 32, "use_rslora": use_rslora}) == (16, scale)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        *(("[" * 100_000, "recursion"), ("[]", "r must be"), ("{}", "r must be a whole number above 0, not None")),
        ('{"r": 0, "lora_alpha": 1}', "r must be a whole number above 0, not 0"),
        ('{"r": 2, "lora_alpha": 1' + "0" * 400 + "}", "lora_alpha must be a number, not 1000"),
        ('{"r": 2, "lora_alpha": 1, "rank_pattern": {"a": 1}}', "ranks or scales of their own"),
        ('{"r": 2, "lora_alpha": 1, "use_dora": true}', "DoRA"),
    ],
)
def test_a_configuration_of_no_plain_lora_is_told_in_one_line(config, said, tmp_path):
    (tmp_path / lora.ADAPTER_CONFIG).write_text(config)
    with pytest.raises(SystemExit, match=said) as error:
        lora.load_adapters(tmp_path, {"blocks": []})
    assert "\n" not in error.value.code


def test_a_pickle_of_adapters_gives_tensors_and_runs_nothing(tmp_path):
    params = wild_params(ODD)
    tensors = {
        f"{lora.peft_name(0, 'attn/c_attn')}.lora_{x}.weight": torch.ones(s)
        for x, s in (("A", (2, 35)), ("B", (105, 2)))
    }
    (tmp_path / lora.ADAPTER_CONFIG).write_text('{"r": 2, "lora_alpha": 4}')
    torch.save(tensors, tmp_path / "adapter_model.bin")
    adapters, scale, base = lora.load_adapters(tmp_path, params)
    assert (scale, base, [*adapters[0]]) == (2.0, None, ["attn/c_attn"])
    assert adapters[0]["attn/c_attn"]["A"].shape == (35, 2)

    torch.save({**tensors, "x": Payload(tmp_path / "run")}, tmp_path / "adapter_model.bin")
    with pytest.raises(SystemExit, match="cannot be read"):
        lora.load_adapters(tmp_path, params)
    assert not (tmp_path / "run").exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_all_weights_learn_slower_than_adapters_unless_told_otherwise():
    recipe = {"lora_rank": 0, "lora_alpha": None, "lora_on": "c_attn", "learning_rate": None, "learn": None}
    assert lora.complete(recipe, is_part=False)["learning_rate"] == 1e-4
    assert lora.complete(recipe | {"lora_rank": 4}, is_part=True) == {
        "lora_rank": 4, "lora_alpha": 8, "lora_on": ["c_attn"], "learning_rate": 1e-3, "learn": None
    }  # fmt: skip
    assert lora.complete(recipe | {"learning_rate": 0.5}, is_part=True)["learning_rate"] == 0.5


def test_adapters_of_another_model_are_refused(adapted, models):
    said = message(merge=str(adapted[0]), model_size="shakespeare", name="new", models_dir=str(REPO / "models"))
    assert "do not fit the model: attn/c_attn of block 0 is 160 x 480" in said


def test_a_model_fine_tuned_on_texts_predicts_them_better(models, capfd):
    options = {"n_steps": 20, "evaluate_every": 10, "learning_rate": 5e-3, "n_ctx": 16}
    finetune.main(TEXT_FILE, model_size="base", name="better", models_dir=str(models), **options)
    first, *_, last = re.findall(r"([\d.]+) nats per character", capfd.readouterr().err)
    assert float(last) < 0.8 * float(first)
    assert load_encoder_hparams_and_params("better", str(models))[1]["n_ctx"] == 40
