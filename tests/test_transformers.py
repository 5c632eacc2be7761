"""OpenAI's models from transformers' files: from Hugging Face, from a mirror of it, or from transformers' cache."""

import hashlib
import os
import sys
import threading

import numpy as np
import pytest
from conftest import HPARAMS, REPO, assert_one_line_error, command, hugging_face, leaves, optional
from flaky_server import serving

sys.path.insert(0, str(REPO / "examples"))
import utils
from files.checkpoint import DATA, INDEX

WEIGHTS = "model.safetensors"
OURS = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA, "SHA256SUMS")


def load(folder):
    return utils.load_encoder_hparams_and_params(folder.name, folder.parent)


def saved(folder, hparams, params, as_published=True):
    """A model as transformers saves it, or as openai-community has it: without its head, but with the masks of old."""
    hugging_face(hparams, params).save_pretrained(folder)
    if as_published:
        torch, safetensors = optional("torch"), optional("safetensors.torch")
        tensors = safetensors.load_file(folder / WEIGHTS)
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for i in range(hparams["n_layer"]):
            n_ctx = hparams["n_ctx"]
            tensors[f"h.{i}.attn.bias"] = torch.tril(torch.ones(1, 1, n_ctx, n_ctx))
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        safetensors.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        data = (folder / WEIGHTS).read_bytes()
        n = int.from_bytes(data[:8], "little") + 3  # openai-community's weights are not aligned
        (folder / WEIGHTS).write_bytes(n.to_bytes(8, "little") + data[8 : n + 5] + b"   " + data[n + 5 :])
    return folder


@pytest.fixture(scope="module", params=["as published", "as saved"])
def theirs(request, tmp_path_factory, tiny, params):
    """transformers' folder of the tiny model."""
    folder = tmp_path_factory.mktemp("theirs")
    saved(folder, HPARAMS, params, request.param == "as published")
    (folder / "vocab.json").write_bytes((tiny / "encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes((tiny / "vocab.bpe").read_bytes())
    return folder


@pytest.fixture
def known(tiny, monkeypatch):
    """All that is known of OpenAI's 124M is known of the tiny model."""
    files = {path.name: path.read_bytes() for path in tiny.glob("[!.]*")}
    monkeypatch.setattr(utils, "MODEL_SIZES", {"124M": HPARAMS})
    monkeypatch.setattr(utils, "SHA256", {name: hashlib.sha256(files[name]).hexdigest() for name in utils.SHA256})
    monkeypatch.setattr(utils, "TOKENIZER_BYTES", {name: len(files[name]) for name in utils.SHA256})
    monkeypatch.setattr(utils, "MD5", {"124M": hashlib.md5(files[DATA]).hexdigest()})  # noqa: S324


@pytest.fixture
def hub(theirs, known, monkeypatch):
    """A mirror of Hugging Face, which HF_ENDPOINT names."""
    with serving({name: (theirs / name).read_bytes() for name in (WEIGHTS, "vocab.json", "merges.txt")}) as server:
        server.headers = {"Content-MD5": None}
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "models" / "124M"


def cache(
    monkeypatch, tmp_path, theirs, names=(WEIGHTS, "vocab.json", "merges.txt"), repository="openai-community--gpt2"
):
    """A cache of transformers that HF_HUB_CACHE names, with files as it keeps them: links to blobs."""
    snapshot, blobs = (tmp_path / "hub" / f"models--{repository}" / kind for kind in ("snapshots/607a30d7", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in names:
        (blobs / f"of-{name}").write_bytes((theirs / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/of-{name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def asked(server):
    return {name for _, name, _ in server.log}


def assert_is_openais(folder, tiny):
    """Nothing but OpenAI's files, byte for byte as they are in the tiny model."""
    assert {path.name for path in folder.iterdir()} == {*OURS}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for name in OURS:
        assert (folder / name).read_bytes() == (tiny / name).read_bytes(), name


# from Hugging Face


def test_what_a_mirror_has_becomes_openais_checkpoint_byte_for_byte(hub, folder, tiny):
    load(folder)
    assert_is_openais(folder, tiny)
    assert hub.folders == {"/openai-community/gpt2/resolve/main"}


def test_it_is_the_checkpoint_that_convert_py_makes(hub, theirs, folder, tmp_path):
    import convert

    load(folder)
    (tmp_path / "converted").mkdir()
    convert.main(str(theirs), name="mine", models_dir=str(tmp_path / "converted"))
    for name in (INDEX, DATA, "hparams.json", "checkpoint"):
        assert (folder / name).read_bytes() == (tmp_path / "converted" / "mine" / name).read_bytes()


def test_it_computes_what_transformers_computes(hub, theirs, folder):
    from gpt2 import gpt2

    torch, transformers = optional("torch"), optional("transformers")
    model, ids = transformers.GPT2LMHeadModel.from_pretrained(theirs), [1, 2, 3, 400]
    _, hparams, params = load(folder)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(gpt2(ids, **params, n_head=hparams["n_head"]), expected, rtol=1e-4, atol=1e-4)


def test_redirects_to_another_host_are_followed(hub, theirs, folder, tiny):
    with serving(hub.files) as cdn:
        cdn.headers = {"Content-MD5": None}
        hub.elsewhere = {name: f"{cdn.url.replace('127.0.0.1', 'localhost')}/a1b2/{name}" for name in hub.files}
        load(folder)
        assert asked(cdn) == {*hub.files}
    assert_is_openais(folder, tiny)


def test_small_files_may_be_sent_to_another_path_of_the_same_host(hub, folder, tiny):
    with serving(hub.files) as cdn:
        cdn.headers = {"Content-MD5": None}
        hub.elsewhere = {WEIGHTS: f"{cdn.url}/{WEIGHTS}", "vocab.json": "/api/resolve-cache/models/vocab.json?etag=1"}
        hub.files["vocab.json?etag=1"] = hub.files["vocab.json"]
        load(folder)
    assert_is_openais(folder, tiny)


def test_an_interrupted_download_goes_on_where_it_was(hub, folder, tiny):
    weights = hub.files.pop(WEIGHTS)
    with pytest.raises(
        utils.ModelError, match=f"{WEIGHTS} from {hub.url}/openai-community/gpt2/resolve/main/{WEIGHTS}"
    ):
        load(folder)
    hub.files[WEIGHTS] = weights
    hub.faults[WEIGHTS] = [{"drop": 200_000}]
    load(folder)
    assert [start for start in hub.asked(WEIGHTS) if start.startswith("bytes=2")]
    assert_is_openais(folder, tiny)


def test_only_what_is_missing_is_fetched(hub, folder, tiny):
    load(folder)
    hub.log.clear()
    (folder / "encoder.json").unlink()
    (folder / "SHA256SUMS").unlink()
    load(folder)
    assert asked(hub) == {"vocab.json"}
    assert_is_openais(folder, tiny)


def damaged(data):
    return data[:-4] + bytes(4)


@pytest.mark.parametrize("name", [WEIGHTS, "vocab.json", "merges.txt"])
def test_what_is_not_openais_is_refused(name, hub, folder):
    hub.files[name] = damaged(hub.files[name])
    with pytest.raises(utils.ModelError, match="OpenAI's"):
        load(folder)
    assert not [file for file in (name, *OURS) if (folder / file).exists()]


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_tokenizer_of_another_size_is_not_even_fetched(name, hub, folder):
    hub.files[name] += bytes(1000)
    with pytest.raises(utils.ModelError, match=r"bytes there, which cannot be right"):
        load(folder)
    assert {what for _, which, what in hub.log if which == name} == {"bytes=0-0"}


def test_weights_of_another_shape_are_refused(hub, folder, monkeypatch):
    monkeypatch.setitem(utils.MODEL_SIZES, "124M", {**HPARAMS, "n_layer": 4})
    with pytest.raises(utils.ModelError, match=r"it lacks the weights h\.3\.attn\.c_attn\.b|h\.3\."):
        load(folder)


def test_where_no_md5_is_known_weights_of_the_right_shapes_are_taken(hub, folder, tiny, monkeypatch):
    monkeypatch.setattr(utils, "MD5", {})
    load(folder)
    assert_is_openais(folder, tiny)


def test_where_no_md5_is_known_weights_of_another_shape_are_refused(hub, folder, monkeypatch):
    monkeypatch.setattr(utils, "MD5", {})
    monkeypatch.setitem(utils.MODEL_SIZES, "124M", {**HPARAMS, "n_ctx": 32})
    with pytest.raises(utils.ModelError, match=r"wpe.weight is float32 of shape \[64, 80\], not float32 of shape \[32"):
        load(folder)


def test_two_processes_at_once_fetch_it_once(hub, folder, tiny):
    threads = [threading.Thread(target=load, args=(folder,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_is_openais(folder, tiny)
    wanted = [what for what in hub.asked(WEIGHTS) if what]
    assert len(wanted) == len({*wanted})


@pytest.mark.parametrize("url", ["http://mirror.example", "ftp://127.0.0.1", "no URL"])
def test_an_endpoint_that_is_not_https_is_refused(url, known, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", url)
    with pytest.raises(utils.ModelError, match="is refused: files are fetched over https only"):
        load(folder)


def test_gpt2_base_url_goes_before_it(hub, folder, monkeypatch):
    with serving({}) as openai:
        monkeypatch.setenv("GPT2_BASE_URL", openai.url)
        with pytest.raises(utils.ModelError, match="HTTP 404"):
            load(folder)
    assert hub.log == []


# from the cache


@pytest.mark.parametrize("repository", ["openai-community--gpt2", "gpt2"])
def test_what_transformers_has_in_its_cache_is_used_and_no_network(
    repository, hub, theirs, folder, tiny, tmp_path, monkeypatch
):
    cache(monkeypatch, tmp_path, theirs, repository=repository)
    load(folder)
    assert_is_openais(folder, tiny)
    assert hub.log == []


@pytest.mark.parametrize(
    ("variable", "where"),
    [
        ("HF_HUB_CACHE", "hub"),
        ("HUGGINGFACE_HUB_CACHE", "hub"),
        ("HF_HOME", "."),
        ("XDG_CACHE_HOME", ".."),
        ("HOME", "../.."),
    ],
)
def test_the_cache_is_where_the_variables_say(variable, where, hub, theirs, folder, tmp_path, monkeypatch):
    home = tmp_path / ".cache" / "huggingface"
    home.mkdir(parents=True)
    cache(monkeypatch, home, theirs)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, os.path.normpath(home / where))
    load(folder)
    assert hub.log == []


def test_what_the_cache_lacks_is_fetched(hub, theirs, folder, tiny, tmp_path, monkeypatch):
    cache(monkeypatch, tmp_path, theirs, names=[WEIGHTS])
    load(folder)
    assert_is_openais(folder, tiny)
    assert asked(hub) == {"vocab.json", "merges.txt"}


def test_other_weights_in_the_cache_are_told_and_not_used(hub, theirs, folder, tiny, tmp_path, monkeypatch, capsys):
    snapshot = cache(monkeypatch, tmp_path, theirs)
    (snapshot / WEIGHTS).resolve().write_bytes(damaged((theirs / WEIGHTS).read_bytes()))
    load(folder)
    assert f"{snapshot / WEIGHTS} is not used: its weights are not OpenAI's" in capsys.readouterr().err
    assert_is_openais(folder, tiny)
    assert asked(hub) == {WEIGHTS}


def test_the_cache_stays_as_it_is(hub, theirs, folder, tmp_path, monkeypatch):
    snapshot = cache(monkeypatch, tmp_path, theirs)
    _, _, params = load(folder)
    for _, array in leaves(params):
        array[:] = 0
    assert (snapshot / WEIGHTS).read_bytes() == (theirs / WEIGHTS).read_bytes()


# --source


def test_source_openai_asks_neither_the_cache_nor_hugging_face(hub, theirs, folder, tmp_path, monkeypatch):
    cache(monkeypatch, tmp_path, theirs)
    with serving({}) as openai:
        monkeypatch.setattr(utils, "SOURCES", [openai.url])
        with pytest.raises(SystemExit, match="HTTP 404"):
            utils.main("124M", str(folder.parent), source="openai")
    assert hub.log == []


def test_source_transformers_goes_before_gpt2_base_url(hub, folder, tiny, monkeypatch, capsys):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    utils.main("124M", str(folder.parent), source="transformers")
    assert "124M is verified" in capsys.readouterr().out
    assert_is_openais(folder, tiny)


def test_a_source_that_there_is_not_is_one_line(tmp_path):
    result = command("124M", "--source", "modelscope", "--models_dir", tmp_path, script="utils.py")
    assert_one_line_error(result, "--source must be openai or transformers, not 'modelscope'")


def test_a_source_of_a_model_that_is_not_openais_is_one_line(tiny):
    result = command("tiny", "--source", "openai", "--models_dir", tiny.parent, script="utils.py")
    assert_one_line_error(result, "--source is for 124M, 355M, 774M, 1558M, and not for 'tiny'")
