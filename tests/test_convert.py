"""examples/convert.py: models come out of other formats, and go into them, bit for bit."""

import json
import pathlib
import re
import shutil
import sys
import zipfile

import conftest
import gguf
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import GENUINE, HPARAMS, REPO, assert_one_line_error, command, interrupt, running, wait_until

sys.path.insert(0, str(REPO / "examples"))
import convert
import formats

from encoder import get_encoder
from files.checkpoint import DATA, ENCODER, VOCAB
from files.checkpoint import HPARAMS as HPARAMS_FILE
from gpt2 import gelu, gpt2
from utils import load_encoder_hparams_and_params

SCRIPT = "examples/convert.py"
FILES = (HPARAMS_FILE, ENCODER, VOCAB, DATA)
TEXT = "To be, or naïve café 東京 🙂\r\n\tnot  to be's"
(IDS,) = conftest.prompts_of_lengths(HPARAMS["n_ctx"])


@pytest.fixture(scope="module")
def theirs(tiny, tmp_path_factory):
    """The tiny model as a transformers folder, made by the command."""
    path = tmp_path_factory.mktemp("converted") / "theirs"
    done = command(tiny, "--to", "transformers", path, script=SCRIPT)
    said = f"convert.py: wrote {path}: GPT2LMHeadModel.from_pretrained({str(path)!r}), and AutoTokenizer likewise\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)
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
    said = f'wrote {models / "1984"}: python gpt2.py "..." --model_size 1984 --models_dir {models}\n'
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"convert.py: {said}")
    assert [path.name for path in models.iterdir()] == ["1984"]
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


def test_the_config_says_what_other_readers_than_transformers_have_no_default_for(theirs):
    config = json.loads((theirs / "config.json").read_text("utf-8"))
    assert config["layer_norm_epsilon"] == 1e-5  # as of gpt2(): llama.cpp's convert_hf_to_gguf.py takes it from here
    assert config["tie_word_embeddings"] is True


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
        tokens, merges, _, _ = formats.read_tokenizer(folder)
        convert.write_tokenizer(tmp_path, tokens, merges)
        for name in (ENCODER, VOCAB):
            assert (tmp_path / name).read_bytes() == (GENUINE / name).read_bytes()


# special tokens, and vocabularies of other sizes


def add_rows(folder, n, **added_tokens):
    """Gives a folder n rows of wte more, and tokens {token: id} for some of them."""
    tensors, config = weights(folder), json.loads((folder / "config.json").read_text("utf-8"))
    wte = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = torch.cat([wte, torch.zeros(n, wte.shape[1])])
    save_weights(folder, tensors)
    change_json(folder / "config.json", vocab_size=config["vocab_size"] + n)
    (folder / "added_tokens.json").write_text(json.dumps(added_tokens), "utf-8")


@pytest.mark.parametrize("token", ["[PAD]", "<pad>", "<|user|>", "pad", " <填充>"])
def test_a_special_token_of_any_spelling_survives_there_and_back(folder, models, token, tmp_path):
    add_rows(folder, 1, **{token: 500})
    converted(folder, models)
    encoder = get_encoder("mine", models)
    assert encoder.decode([500]) == token
    assert 500 not in encoder.encode(token)
    convert.main(str(models / "mine"), str(tmp_path / "back"), to="transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer(f"be{token}be").input_ids == [*encoder.encode("be"), 500, *encoder.encode("be")]
    assert tokenizer.decode([500], skip_special_tokens=True) == ""
    assert_same_files(converted(tmp_path / "back", models, "again"), models / "mine")


def test_what_transformers_adds_and_saves_itself_survives(folder, models):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]})
    tokenizer.add_tokens(["東京"])
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    for path in (model, tokenizer):
        path.save_pretrained(folder)
    (folder / "vocab.json").unlink(missing_ok=True)
    converted(folder, models)
    encoder, hparams, params = load_encoder_hparams_and_params("mine", models)
    assert [encoder.decode([i]) for i in (500, 501, 502)] == ["[PAD]", "<|user|>", "東京"]
    assert hparams["n_vocab"] == 503
    np.testing.assert_array_equal(params["wte"], model.transformer.wte.weight.detach().numpy()[:503])


def test_a_special_token_that_is_named_without_an_id_gets_the_next(folder, models):
    add_rows(folder, 8)
    (folder / "added_tokens.json").unlink()
    change_json(folder / "tokenizer_config.json", **{"pad_token": "[PAD]"})
    converted(folder, models)
    encoder = get_encoder("mine", models)
    assert encoder.encoder["[PAD]"] == transformers.AutoTokenizer.from_pretrained(folder).pad_token_id == 500


def test_rows_that_only_pad_the_vocabulary_are_left_out(tiny, folder, models, capsys):
    add_rows(folder, 12)
    assert_same_files(converted(folder, models), tiny)
    assert "left out, since no token has them: the last 12 of 512 rows of wte" in capsys.readouterr().err


def test_an_added_token_that_the_model_has_no_row_for_is_left_out(tiny, folder, models, capsys):
    add_rows(folder, 0, **{"[PAD]": 500})
    assert_same_files(converted(folder, models), tiny)
    assert "left out, since the model has no weights for them: [PAD]" in capsys.readouterr().err


def test_an_id_without_a_token_is_never_the_likeliest(folder, models):
    add_rows(folder, 12, **{"[PAD]": 503})
    converted(folder, models)
    encoder, hparams, params = load_encoder_hparams_and_params("mine", models)
    assert [encoder.decoder[i] for i in range(500, 504)] == ["<|unused500|>", "<|unused501|>", "<|unused502|>", "[PAD]"]
    logits = gpt2(IDS, **params, n_head=hparams["n_head"])
    assert (logits[:, 500:503].max(axis=1) < logits.max(axis=1)).all()


def test_whatever_ends_a_text_is_called_endoftext_here(folder, models, capsys):
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    tokens = [*vocab][:-1]  # without <|endoftext|>
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps({"</s>": 0} | {token: i + 1 for i, token in enumerate(tokens)}))
    converted(folder, models)
    assert get_encoder("mine", models).encoder["<|endoftext|>"] == 0
    assert "</s> ends a text, and is called <|endoftext|> here" in capsys.readouterr().err


def test_two_tokens_of_one_text_are_refused(folder, models):
    add_rows(folder, 1, **{" the": 500})
    assert "are the same text, ' the'" in refusal(folder, models)


# what transformers loads, if it is saved otherwise


@pytest.mark.parametrize("tied", [True, False])
def test_one_matrix_may_lie_under_the_name_of_the_other(tiny, folder, models, tied):
    tensors = weights(folder)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_weights(folder, tensors)
    change_json(folder / "config.json", tie_word_embeddings=tied)
    assert_same_files(converted(folder, models), tiny)


def test_pytorch_model_bin_in_several_files_comes_back(tiny, folder, models):
    tensors, files = weights(folder), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert_same_files(converted(folder, models), tiny)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.transformer.", "_orig_mod.module.model."]
)
@pytest.mark.parametrize("where", [None, "state_dict", "model", "model_state_dict"])
def test_wrappers_are_taken_off(tiny, folder, models, where, prefix):
    tensors = {prefix + name: tensor for name, tensor in weights(folder).items()}
    torch.save({"epoch": 3, where: tensors} if where else tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same_files(converted(folder, models), tiny)


def test_heads_for_other_tasks_are_left_out(tiny, folder, models, capsys):
    save_weights(folder, weights(folder) | {"v_head.summary.weight": torch.ones(1, 80)})
    assert_same_files(converted(folder, models), tiny)
    assert "left out, since gpt2() has no such head: v_head.summary.weight" in capsys.readouterr().err


@pytest.mark.parametrize("architectures", [None, ["GPT2LMHeadModel"]])
def test_a_config_without_a_model_type_is_gpt2s_unless_it_says_otherwise(tiny, folder, models, architectures):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["model_type"]
    config["architectures"] = architectures
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_files(converted(folder, models), tiny)
    change_json(folder / "config.json", architectures=["GPTNeoForCausalLM"])
    assert "'GPTNeoForCausalLM'" in refusal(folder, models, "other")


def test_every_activation_that_differs_by_rounding_alone_is_taken_and_no_other():
    x = np.linspace(-10, 10, 10001, dtype=np.float32)
    same = set()
    for name in transformers.activations.ACT2CLS:
        if "gelu" in name:
            theirs = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
            same |= {name} if np.allclose(theirs, gelu(x), rtol=1e-5, atol=1e-6) else set()
    assert same == {*formats.GELUS}


# nanoGPT's, minGPT's and llm.c's


def linear(folder):
    """The weights of a folder as PyTorch's Linear has them: [out, in]."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in weights(folder).items()}
    return {
        name: tensor.T.contiguous() if re.search(r"c_\w+\.weight", name) else tensor for name, tensor in tensors.items()
    }


def nanogpt(folder, bias=True):
    """Makes a nanoGPT checkpoint of a folder: ckpt.pt instead of its config and weights."""
    tensors = {f"_orig_mod.transformer.{name}": tensor for name, tensor in linear(folder).items()}
    tensors["_orig_mod.lm_head.weight"] = tensors["_orig_mod.transformer.wte.weight"]
    tensors = {name: tensor for name, tensor in tensors.items() if bias or not name.endswith(".bias")}
    args = {"n_layer": 3, "n_head": 5, "n_embd": 80, "block_size": 64, "bias": bias, "vocab_size": 500, "dropout": 0.1}
    more = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "iter_num": 7, "config": {"dataset": "mine"}}
    torch.save({"model": tensors, "model_args": args, **more, "best_val_loss": torch.tensor(1.0)}, folder / "ckpt.pt")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()


@pytest.mark.parametrize("file", ["", "ckpt.pt"])
def test_nanogpts_checkpoint_comes_back(tiny, folder, models, file, capsys):
    nanogpt(folder)
    assert_same_files(converted(folder / file, models), tiny)
    assert "gelu is by tanh here" in capsys.readouterr().err


def test_nanogpts_models_without_biases_have_biases_of_zero(folder, models, params):
    nanogpt(folder, bias=False)
    converted(folder, models)
    got = dict(conftest.leaves(load_encoder_hparams_and_params("mine", models)[2]))
    for name, array in conftest.leaves(params):
        np.testing.assert_array_equal(got[name], 0 * array if name.endswith(".b") else array)


@pytest.mark.parametrize("config", [{"n_head": 5}, {"model": {"n_head": 5, "n_layer": None, "model_type": None}}])
def test_mingpts_checkpoint_comes_back_with_its_heads_from_config_json(tiny, folder, models, config):
    tensors = {f"transformer.{name}": tensor for name, tensor in linear(folder).items()}
    tensors |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    torch.save(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, folder / "model.pt")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    assert 'put {"n_head": 12}, say, into a config.json beside it' in refusal(folder, models)
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_files(converted(folder / "model.pt", models), tiny)


def test_mingpts_names_of_2020_come_back(tiny, folder, models):
    tensors = {}
    for name, tensor in linear(folder).items():
        name = name.replace("h.", "blocks.", 1) if name.startswith("h.") else name
        name = re.sub(r"ln_(\d)", r"ln\1", name).replace("mlp.c_fc", "mlp.0").replace("mlp.c_proj", "mlp.2")
        name = name.replace("attn.c_proj", "attn.proj").replace("wte.", "tok_emb.").replace("wpe.weight", "pos_emb")
        if "c_attn" in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[name.replace("c_attn", part)] = third.clone()
        else:
            tensors[name] = tensor[None] if name == "pos_emb" else tensor
    tensors |= {"head.weight": tensors["tok_emb.weight"], "blocks.0.attn.mask": torch.ones(1, 1, 64, 64)}
    torch.save(tensors, folder / "model.pt")
    (folder / "model.safetensors").unlink()
    assert_same_files(converted(folder, models), tiny)


def llmc(folder, dtype=torch.float32, n_rows=512):
    """Makes llm.c's model.bin of a folder, as its write_model lays it out."""
    tensors = {name: tensor.to(dtype) for name, tensor in linear(folder).items()}
    padding = torch.zeros(n_rows - 500, 80, dtype=dtype)
    layers = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = [f"h.{i}.{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias") for i in range(3)]
    ordered = [tensors["wte.weight"], padding, *(tensors[name] for name in ("wpe.weight", *names))]
    ordered += [tensors["ln_f.weight"], tensors["ln_f.bias"]]
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, 3 if dtype == torch.float32 else 5, 64, 500, 3, 5, 80, n_rows
    data = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in ordered)
    (folder / "model.bin").write_bytes(header.tobytes() + data)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def test_llmcs_model_comes_back_without_the_rows_that_pad_it(tiny, folder, models):
    llmc(folder)
    assert_same_files(converted(folder / "model.bin", models), tiny)


def test_llmcs_bfloat16_is_widened_exactly(folder, models):
    halves = llmc(folder, torch.bfloat16)
    converted(folder, models)
    params = load_encoder_hparams_and_params("mine", models)[2]
    np.testing.assert_array_equal(params["wte"], halves["wte.weight"])
    np.testing.assert_array_equal(params["blocks"][2]["mlp"]["c_proj"]["w"], halves["h.2.mlp.c_proj.weight"].T)
    np.testing.assert_array_equal(params["ln_f"]["b"], halves["ln_f.bias"])


@pytest.mark.parametrize(
    ("place", "number", "said"),
    [
        (1, 1, "version 3 (float32) or 5 (bfloat16)"),
        (4, 2**31 - 1, "where its header implies"),
        (4, -3, "sizes that cannot be"),
        (5, 3, "n_embd 80 is not divisible by n_head 3"),
        (3, 600, "sizes that cannot be"),
        (7, 513, "where its header implies"),
    ],
)
def test_a_header_of_llmcs_that_is_not_true_is_refused(folder, models, place, number, said):
    llmc(folder)
    data = bytearray((folder / "model.bin").read_bytes())
    data[4 * place : 4 * place + 4] = int(number).to_bytes(4, "little", signed=True)
    (folder / "model.bin").write_bytes(data)
    assert said in refusal(folder / "model.bin", models)


def test_without_a_tokenizer_it_gets_gpt2s_own_from_a_model_that_has_it_and_says_so(tmp_path, models, capsys):
    config = transformers.GPT2Config(vocab_size=50304, n_positions=4, n_embd=4, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    assert "python utils.py 124M" in refusal(tmp_path / "theirs", models)
    (models / "124M").mkdir()
    for name in (ENCODER, VOCAB):
        shutil.copy(GENUINE / name, models / "124M")
    converted(tmp_path / "theirs", models)
    assert f"{tmp_path / 'theirs'} has no tokenizer: it got GPT-2's own\n" in capsys.readouterr().err
    assert (models / "mine" / ENCODER).read_bytes() == (GENUINE / ENCODER).read_bytes()
    assert json.loads((models / "mine" / HPARAMS_FILE).read_text())["n_vocab"] == 50257


def test_an_adapter_of_pefts_in_a_pickle_is_what_it_is_in_safetensors(tmp_path):
    tensors = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.rand(2, 80, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (before,) = formats.read_adapter(tmp_path).items()
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (after,) = formats.read_adapter(tmp_path).items()
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1], after[1])


# to llama.cpp


@pytest.fixture(scope="module")
def gguf_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    done = command(tiny, "--to", "gguf", path, script=SCRIPT)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f'convert.py: wrote {path}: llama-completion -m {path} -p "..."\n'
    return path


def test_a_gguf_file_holds_every_weight_bit_for_bit(gguf_file, params):
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(gguf_file).tensors}
    assert len(tensors) == 4 + 12 * HPARAMS["n_layer"]
    np.testing.assert_array_equal(tensors["token_embd.weight"], params["wte"])
    np.testing.assert_array_equal(tensors["position_embd.weight"], params["wpe"])
    np.testing.assert_array_equal(tensors["blk.2.ffn_up.weight"], params["blocks"][2]["mlp"]["c_fc"]["w"].T)
    np.testing.assert_array_equal(tensors["blk.0.attn_qkv.bias"], params["blocks"][0]["attn"]["c_attn"]["b"])


def test_float16_is_for_matrices_and_not_for_norms_biases_and_positions(tiny, params, tmp_path):
    convert.main(str(tiny), str(tmp_path / "half.gguf"), to="gguf", dtype="float16")
    reader = gguf.GGUFReader(tmp_path / "half.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_F16
    for tensor in reader.tensors:
        is_matrix = tensor.name.endswith(".weight") and "norm" not in tensor.name and "position" not in tensor.name
        assert tensor.tensor_type.name == ("F16" if is_matrix else "F32"), tensor.name
    (wte,) = (tensor.data for tensor in reader.tensors if tensor.name == "token_embd.weight")
    np.testing.assert_array_equal(wte, params["wte"].astype(np.float16))


def test_what_float16_cannot_hold_is_refused(params, models_dir, tmp_path):
    encoder, params = get_encoder("tiny", models_dir), {**params, "wte": params["wte"] + np.float32(1e5)}
    with pytest.raises(SystemExit, match="wte has numbers too large for float16"):
        convert.save_as_gguf(str(tmp_path / "out"), encoder, HPARAMS, params, "float16")


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
        ("transformer.wpe.weight", torch.ones(65, 80), "wpe.weight has shape [65, 80], its config implies [64, 80]"),
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


def test_code_in_a_checkpoint_is_named_and_what_to_save_instead(folder, models):
    (folder / "model.safetensors").unlink()
    torch.save({"model": {}, "config": pathlib.PurePosixPath("a")}, folder / "pytorch_model.bin")
    assert "it holds pathlib.PurePosixPath, code that is not run: save model.state_dict()" in refusal(folder, models)


def test_a_tensor_larger_than_its_file_is_refused(folder, models):
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": torch.zeros(1, dtype=torch.float16).expand(10**9, 80)}, folder / "pytorch_model.bin")
    assert "its tensors are larger than it is" in refusal(folder, models)


def test_a_zip_that_unpacks_to_more_than_it_is_is_refused(folder, models):
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(2**24))
    assert "it is larger inside than outside" in refusal(folder, models)


def test_names_from_a_file_cannot_steer_a_terminal(folder, models):
    save_weights(folder, weights(folder) | {"\x1b[31mred\n": torch.ones(1)})
    assert "has the weights ?[31mred" in refusal(folder, models)


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
    assert "weight_map must name a .safetensors or .bin file of this folder" in refusal(folder, models)


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


def test_a_text_that_the_model_has_no_row_for_is_refused(folder, models):
    change_json(folder / "vocab.json", **{"th": 500})
    assert "the tokenizer has the ids 0 to 500, the model has 0 to 499" in refusal(folder, models)


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
        wait_until(lambda: any(models.iterdir()))
        interrupt(process)
        _, stderr = process.communicate(timeout=conftest.TIMEOUT)
    assert (process.returncode, stderr) == (130, b"")
    assert not any(models.iterdir())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{folder}"], "--name must name the new model"),
        (["{folder}", "--name=../mine"], "--name must name the new model"),
        (["{folder}", "--name=mine."], "--name must name the new model"),
        (["{folder}", "{folder}", "--name=mine"], "one transformers folder or checkpoint, not 2 paths"),
        (["--name=mine"], "one transformers folder or checkpoint, not 0 paths"),
        (["{folder}", "--name=mine", "--dtype=float16"], "--dtype is for --to gguf"),
        (["{folder}", "--to=gguf", "out", "--dtype=float64"], "--dtype must be float32 or float16, not 'float64'"),
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
    assert (converted(theirs, models) / DATA).exists()
