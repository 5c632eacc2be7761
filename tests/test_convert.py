"""examples/convert.py: models come out of other formats, and go into them, bit for bit."""

import importlib.util
import json
import pathlib
import shutil
import signal

import conftest
import gguf
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import GENUINE, HPARAMS, REPO, assert_one_line_error, command, running, wait_until

from encoder import get_encoder
from files.checkpoint import DATA, ENCODER, VOCAB
from files.checkpoint import HPARAMS as HPARAMS_FILE
from gpt2 import gpt2
from utils import load_encoder_hparams_and_params

SCRIPT = "examples/convert.py"
FILES = (HPARAMS_FILE, ENCODER, VOCAB, DATA)
TEXT = "To be, or naïve café 東京 🙂\r\n\tnot  to be's"
(IDS,) = conftest.prompts_of_lengths(HPARAMS["n_ctx"])

spec = importlib.util.spec_from_file_location("convert", REPO / SCRIPT)
convert = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert)


@pytest.fixture(scope="module")
def theirs(tiny, tmp_path_factory):
    """The tiny model as a transformers folder, made by the command."""
    path = tmp_path_factory.mktemp("converted") / "theirs"
    done = command(tiny, "--to", "transformers", path, script=SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return path


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy of it, for tests to change."""
    return pathlib.Path(shutil.copytree(theirs, tmp_path / "folder"))


@pytest.fixture
def models(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def converted(folder, models, name="mine"):
    convert.main(str(folder), name=name, models_dir=str(models))
    return models / name


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def weights(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def save_weights(folder, tensors):
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def refusal(folder, models, name="mine"):
    """The line that a folder is refused with, which leaves nothing behind."""
    before = sorted(models.iterdir())
    with pytest.raises(SystemExit) as error:
        converted(folder, models, name)
    assert sorted(models.iterdir()) == before
    assert "\n" not in error.value.code
    return error.value.code


def assert_same_files(model_dir, other):
    for name in FILES:
        assert (model_dir / name).read_bytes() == (other / name).read_bytes(), name


# to transformers, and back


def test_there_and_back_every_bit_is_the_same(tiny, theirs, models):
    done = command(theirs, "--name=1984", "--models_dir", models, script=SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_same_files(models / "1984", tiny)


def test_transformers_loads_what_it_is_given(theirs, params, models_dir):
    model = transformers.GPT2LMHeadModel.from_pretrained(theirs)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits, gpt2(IDS, **params, n_head=HPARAMS["n_head"]), rtol=1e-4, atol=1e-3)

    tokenizer, encoder = transformers.AutoTokenizer.from_pretrained(theirs), get_encoder("tiny", models_dir)
    end = encoder.encoder["<|endoftext|>"]
    assert tokenizer(TEXT).input_ids == encoder.encode(TEXT)
    assert tokenizer("a<|endoftext|>").input_ids == [*encoder.encode("a"), end]
    assert tokenizer.decode(encoder.encode(TEXT)) == TEXT
    assert [tokenizer.eos_token_id, tokenizer.bos_token_id] == [end, end]
    assert [model.config.eos_token_id, model.generation_config.eos_token_id] == [end, end]


def test_who_may_read_the_other_files_may_read_the_weights(theirs):
    assert (theirs / "model.safetensors").stat().st_mode == (theirs / "config.json").stat().st_mode


def test_what_transformers_saves_itself_in_several_files_comes_back(tiny, theirs, models, tmp_path):
    model = transformers.GPT2LMHeadModel.from_pretrained(theirs)
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    transformers.AutoTokenizer.from_pretrained(theirs).save_pretrained(tmp_path / "saved")
    for name in ("vocab.json", "merges.txt"):  # some versions write them, some do not
        (tmp_path / "saved" / name).unlink(missing_ok=True)
    assert len([*(tmp_path / "saved").glob("*.safetensors")]) > 1
    assert_same_files(converted(tmp_path / "saved", models), tiny)


@pytest.mark.parametrize("with_head", [True, False])
def test_the_older_generation_of_names_in_pytorch_model_bin_comes_back(tiny, folder, models, with_head):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in weights(folder).items()}
    for i in range(HPARAMS["n_layer"]):
        tensors[f"h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64, dtype=torch.uint8))
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if with_head:
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same_files(converted(folder, models), tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pickled", [True, False])
def test_half_precision_is_widened_exactly(folder, models, dtype, pickled):
    halves = {name: tensor.to(dtype) for name, tensor in weights(folder).items()}
    save_weights(folder, halves)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(halves, folder / "pytorch_model.bin")
    converted(folder, models)
    got = load_encoder_hparams_and_params("mine", models)[2]
    np.testing.assert_array_equal(got["wte"], halves["transformer.wte.weight"].float().numpy())
    np.testing.assert_array_equal(
        got["blocks"][1]["attn"]["c_attn"]["w"], halves["transformer.h.1.attn.c_attn.weight"].float()
    )


def test_openais_vocabulary_is_written_as_openai_wrote_it(tmp_path):
    (tmp_path / "vocab").mkdir()
    shutil.copy(GENUINE / ENCODER, tmp_path / "vocab" / "vocab.json")
    shutil.copy(GENUINE / VOCAB, tmp_path / "vocab" / "merges.txt")
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path / "vocab")
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for folder in (tmp_path / "vocab", tmp_path):
        convert.write_tokenizer(tmp_path, *convert.read_tokenizer(folder))
        for name in (ENCODER, VOCAB):
            assert (tmp_path / name).read_bytes() == (GENUINE / name).read_bytes()


# to llama.cpp


@pytest.fixture(scope="module")
def gguf_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    done = command(tiny, "--to", "gguf", path, script=SCRIPT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return path


def test_a_gguf_file_holds_every_weight_bit_for_bit(gguf_file, params):
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(gguf_file).tensors}
    assert len(tensors) == 4 + 12 * HPARAMS["n_layer"]
    np.testing.assert_array_equal(tensors["token_embd.weight"], params["wte"])
    np.testing.assert_array_equal(tensors["position_embd.weight"], params["wpe"])
    np.testing.assert_array_equal(tensors["blk.2.ffn_up.weight"], params["blocks"][2]["mlp"]["c_fc"]["w"].T)
    np.testing.assert_array_equal(tensors["blk.0.attn_qkv.bias"], params["blocks"][0]["attn"]["c_attn"]["b"])


def test_transformers_computes_the_same_logits_from_a_gguf_file(gguf_file, params):
    # it does not read the length of the context
    sizes = {"n_positions": HPARAMS["n_ctx"]}
    model = transformers.GPT2LMHeadModel.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, **sizes)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits, gpt2(IDS, **params, n_head=HPARAMS["n_head"]), rtol=1e-4, atol=1e-3)


def test_a_gguf_file_has_the_tokens_and_knows_which_of_them_are_text(gguf_file, models_dir):
    encoder, fields = get_encoder("tiny", models_dir), gguf.GGUFReader(gguf_file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert dict(enumerate(tokens)) == encoder.decoder
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(pair) for pair in encoder.bpe_ranks]
    types = fields["tokenizer.ggml.token_type"].contents()
    assert [token for token, kind in zip(tokens, types, strict=True) if kind != gguf.TokenType.NORMAL] == [
        "<|endoftext|>"
    ]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == encoder.encoder["<|endoftext|>"]


# what is refused, in one line, with nothing left behind


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt_neo"},
        {"activation_function": "gelu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"add_cross_attention": True},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 80},
        {"n_head": 3},
        {"n_layer": 0},
        {"n_embd": "80"},
        {"quantization_config": {"bits": 4}},
    ],
    ids=str,
)
def test_another_architecture_is_refused(folder, models, change):
    change_json(folder / "config.json", **change)
    assert next(iter(change)) in refusal(folder, models)


def test_what_computes_the_same_is_not_refused(folder, models, tiny):
    change_json(folder / "config.json", n_inner=320, activation_function="gelu_pytorch_tanh", resid_pdrop=0.5)
    assert_same_files(converted(folder, models), tiny)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("score.weight", torch.ones(2, 80), "score.weight, for which gpt2() has no use"),
        ("transformer.ln_f.bias", None, "lacks the weights ln_f.bias"),
        ("transformer.wpe.weight", torch.ones(65, 80), "wpe.weight has shape [65, 80], config.json implies [64, 80]"),
        ("transformer.ln_f.bias", torch.ones(80, dtype=torch.int8), "ln_f.bias is "),
        ("lm_head.weight", torch.ones(500, 80), "lm_head.weight is not wte.weight"),
    ],
)
@pytest.mark.parametrize("pickled", [True, False])
def test_other_weights_than_gpt2_has_are_refused(folder, models, name, tensor, said, pickled):
    tensors = weights(folder) | {name: tensor}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_weights(folder, tensors)
    assert said in refusal(folder, models)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_what_a_pickle_would_run_is_not_run(folder, models, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read" in refusal(folder, models)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_cut_off_is_refused(folder, models, name):
    torch.save(weights(folder), folder / "pytorch_model.bin")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    assert f"{name} cannot be read" in refusal(folder, models)


def test_an_index_may_not_name_files_elsewhere(folder, models):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "weight_map must name a .safetensors file of this folder" in refusal(folder, models)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(folder, models, name):
    (folder / name).unlink()
    assert str(folder) in refusal(folder, models)


def test_a_tokenizer_that_cuts_words_otherwise_is_refused(folder, models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").unlink()
    assert "not GPT-2's kind of tokenizer" in refusal(folder, models)


def test_a_tokenizer_of_another_size_than_the_model_is_refused(folder, models):
    change_json(folder / "vocab.json", **{"<|pad|>": 500})
    assert "has 501 tokens" in refusal(folder, models)


def test_a_name_of_openais_is_for_openais_models(folder, models):
    assert "is not OpenAI's 124M" in refusal(folder, models, "124M")


def test_a_pickle_needs_pytorch_which_is_told_in_one_line(folder, models, tmp_path):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text("raise ImportError('this test has none')\n")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    env = {"PYTHONPATH": str(tmp_path / "stub")}
    done = command(folder, "--name=mine", "--models_dir", models, script=SCRIPT, env=env)
    assert_one_line_error(done, "pip install torch")
    assert not any(models.iterdir())


# what is there already, and what is stopped


def test_a_model_that_is_there_is_never_overwritten(folder, models):
    (models / "mine").mkdir()
    (models / "mine" / "file").write_text("mine")
    assert "exists" in refusal(folder, models)
    assert [path.name for path in (models / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize("to", ["transformers", "gguf"])
def test_a_file_or_folder_that_is_there_is_never_overwritten(tiny, tmp_path, to):
    (tmp_path / "out").write_text("mine")
    done = command(tiny, "--to", to, tmp_path / "out", script=SCRIPT)
    assert_one_line_error(done, "exists: choose another name")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(("to", "package"), [("transformers", "safetensors"), ("gguf", "gguf")])
def test_without_the_package_it_needs_one_line_says_what_to_install(tiny, tmp_path, to, package):
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / f"{package}.py").write_text("raise ImportError('this test has none')\n")
    done = command(tiny, "--to", to, tmp_path / "out", script=SCRIPT, env={"PYTHONPATH": tmp_path / "stub"})
    assert_one_line_error(done, f"--to {to} needs {package}: pip install {package}: ")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing_behind(theirs, models):
    with running(theirs, "--name=mine", "--models_dir", models, script=SCRIPT) as process:
        wait_until((models / "mine").exists)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=conftest.TIMEOUT)
    assert (process.returncode, stderr) == (130, b"")
    assert not any(models.iterdir())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{folder}"], "--name must name the new model"),
        (["{folder}", "--name=../mine"], "--name must name the new model"),
        (["{folder}", "--name=mine."], "--name must name the new model"),
        (["{folder}", "{folder}", "--name=mine"], "one transformers folder, not 2 paths"),
        (["--name=mine"], "one transformers folder, not 0 paths"),
        (["/nowhere", "--name=mine"], "there is no folder /nowhere"),
        (["{folder}", "--to=onnx", "out"], "--to must be transformers or gguf, not 'onnx'"),
        (["{folder}", "--to=gguf"], "the folder of a model, and what to make for gguf, not 1 paths"),
        (["{folder}", "--to=gguf", "out", "--name=mine"], "--name does nothing with --to"),
        (["{folder}", "--to=gguf", "/nowhere/out"], "folder is no complete checkpoint"),
    ],
)
def test_mistakes_are_told_in_one_line(args, said, theirs, tmp_path):
    shutil.copytree(theirs, tmp_path / "folder")
    args = [arg.format(folder=tmp_path / "folder") for arg in args]
    assert_one_line_error(command(*args, script=SCRIPT), said)


def test_what_a_download_that_got_nothing_leaves_is_no_model(theirs, models):
    (models / "mine").mkdir(parents=True)
    (models / "mine" / ".lock").touch()
    done = command(theirs, "--name", "mine", "--models_dir", models, script=SCRIPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert (models / "mine" / DATA).exists()
