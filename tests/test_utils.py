"""Loading and saving: what TensorFlow writes is mapped, and what is saved, TensorFlow reads."""

import hashlib
import json
import os
import pathlib
import subprocess
import threading

import numpy as np
import pytest
from conftest import (
    GENUINE,
    HPARAMS,
    REPO,
    assert_one_line_error,
    command,
    hold_for_a_moment,
    leaves,
    link,
    needs_posix,
    optional,
    wild_params,
    write_model,
)
from flaky_server import serving

import utils
from files import bundle, checkpoint, sums
from files.checkpoint import DATA, INDEX


def load(model_dir):
    return utils.load_encoder_hparams_and_params(model_dir.name, model_dir.parent)


def assert_same(params, expected):
    for (name, ours), (expected_name, theirs) in zip(leaves(params), leaves(expected), strict=True):
        assert name == expected_name
        np.testing.assert_array_equal(ours, theirs, strict=True, err_msg=name)


def shape_tree(node):
    if isinstance(node, dict):
        return {key: shape_tree(value) for key, value in node.items()}
    return [shape_tree(value) for value in node] if isinstance(node, list) else list(node.shape)


def save(model_dir, tensors, prefix="model.ckpt"):
    """Has TensorFlow write a checkpoint of exactly these tensors, in this order."""
    optional("tensorflow").raw_ops.SaveV2(
        prefix=str(model_dir / prefix),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=list(tensors.values()),
    )


def tensors_of(model_dir):
    reader = optional("tensorflow").train.load_checkpoint(str(model_dir / "model.ckpt"))
    return {name: reader.get_tensor(name) for name in sorted(reader.get_variable_to_shape_map())}


# What is loaded


def test_params_have_the_names_shapes_and_type_of_the_tutorial(model_dir):
    _, hparams, params = load(model_dir)
    assert hparams == HPARAMS
    block = {
        "ln_1": {"g": [80], "b": [80]},
        "attn": {"c_attn": {"w": [80, 240], "b": [240]}, "c_proj": {"w": [80, 80], "b": [80]}},
        "ln_2": {"g": [80], "b": [80]},
        "mlp": {"c_fc": {"w": [80, 320], "b": [320]}, "c_proj": {"w": [320, 80], "b": [80]}},
    }
    assert shape_tree(params) == {
        "wte": [500, 80],
        "wpe": [64, 80],
        "blocks": [block] * 3,
        "ln_f": {"g": [80], "b": [80]},
    }
    assert {array.dtype for _, array in leaves(params)} == {np.dtype(np.float32)}


def test_params_are_the_weights_that_were_saved(model_dir, params):
    assert_same(load(model_dir)[2], params)
    assert_same(load(model_dir)[2], params)  # this time SHA256SUMS vouches for them


def test_eleven_blocks_come_in_the_order_of_their_numbers(tmp_path):
    hparams = {"n_vocab": 300, "n_ctx": 8, "n_embd": 8, "n_head": 2, "n_layer": 11}
    params = checkpoint.random_params(hparams)
    write_model(tmp_path, hparams, params)
    assert_same(checkpoint.load_params(tmp_path, hparams), params)
    assert_same(checkpoint.load_params(tmp_path, hparams), params)


def test_the_encoder_is_the_models_own(model_dir):
    encoder, hparams, _ = load(model_dir)
    assert len(encoder.encoder) == hparams["n_vocab"]
    assert encoder.decode(encoder.encode("the end")) == "the end"


def test_a_checkpoint_is_loaded_without_what_downloads(model_dir):
    code = """if True:
        import sys, utils
        utils.load_encoder_hparams_and_params("tiny", sys.argv[1])
        print({"tensorflow", "requests", "files.download", "tqdm"} & {*sys.modules})"""
    assert command(model_dir.parent, code=code, cwd=REPO).stdout == "set()\n"


def test_weights_are_mapped_and_changes_to_them_stay_in_memory(model_dir, params):
    load(model_dir)
    mine = load(model_dir)[2]
    mine["wte"][:] = 0
    assert isinstance(mine["wte"], np.memmap)
    assert_same(load(model_dir)[2], params)


# SHA256SUMS


def check_with_sha256sum(model_dir):
    needs_posix("sha256sum")
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=model_dir, check=True, capture_output=True)


def test_sums_are_the_same_bytes_on_every_system(model_dir):
    load(model_dir)
    names = ["hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA]
    digests = {name: hashlib.sha256((model_dir / name).read_bytes()).hexdigest() for name in names}
    assert (model_dir / "SHA256SUMS").read_bytes() == "".join(f"{digests[name]}  {name}\n" for name in names).encode()


def test_sums_are_what_sha256sum_checks(model_dir):
    load(model_dir)
    check_with_sha256sum(model_dir)


def verifies(model_dir):
    """Whether loading a model compares the checksums of its weights."""
    compared = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "checksum", lambda array: compared.append(array) or bundle.checksum(array))
        load(model_dir)
    assert len(compared) in (0, len(list(checkpoint.variables(HPARAMS))))
    return bool(compared)


def test_a_checkpoint_is_verified_once(model_dir):
    assert verifies(model_dir)
    assert not verifies(model_dir)


def test_missing_sums_are_made_anew(model_dir):
    load(model_dir)
    path, good = model_dir / "SHA256SUMS", (model_dir / "SHA256SUMS").read_text()
    path.unlink()
    assert verifies(model_dir)
    assert path.read_text() == good


DAMAGE = {
    "nothing left": lambda lines: [],
    "nonsense": lambda lines: ["nonsense"],
    "no text": lambda lines: ["\0\xff"],
    "an empty line": lambda lines: [*lines, ""],
    "a line cut short": lambda lines: [*lines[:-1], lines[-1][:70]],
    "lines cut off": lambda lines: lines[:-1],
    "a line twice": lambda lines: [*lines, lines[0]],
    "another file": lambda lines: [*lines, "0" * 64 + "  README.md"],
    "a digit that is none": lambda lines: ["g" + lines[0][1:], *lines[1:]],
    "one digit less": lambda lines: [lines[0][1:], *lines[1:]],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_sums_are_an_error_that_says_to_delete_them(damage, model_dir):
    load(model_dir)
    path = model_dir / "SHA256SUMS"
    path.write_text("\n".join(DAMAGE[damage](path.read_text().splitlines())) + "\n", encoding="latin-1")
    assert f"{path} is damaged: delete it" in error_of(model_dir)
    path.unlink()
    load(model_dir)


def test_a_damaged_sums_does_not_let_another_number_of_heads_pass(model_dir):
    load(model_dir)
    (model_dir / "hparams.json").write_text(json.dumps(HPARAMS | {"n_head": 10}))
    with open(model_dir / "SHA256SUMS", "a") as f:
        f.write("\n")
    assert "SHA256SUMS is damaged" in error_of(model_dir)


def test_a_changed_checkpoint_is_verified_and_loaded_anew(model_dir, params):
    load(model_dir)
    save(model_dir, {name: 2 * tensor for name, tensor in tensors_of(model_dir).items()})
    assert verifies(model_dir)
    np.testing.assert_array_equal(load(model_dir)[2]["wte"], 2 * params["wte"])


def test_a_checkpoint_that_this_project_saved_is_verified_already(model_dir):
    checkpoint.save_checkpoint(model_dir, HPARAMS, wild_params(HPARAMS, seed=1))
    assert not verifies(model_dir)
    assert_same(load(model_dir)[2], wild_params(HPARAMS, seed=1))


def test_a_copied_checkpoint_is_recognised_by_its_contents(model_dir):
    load(model_dir)
    os.utime(model_dir / DATA)  # as after git clone or cp
    assert not verifies(model_dir)
    assert (model_dir / DATA).stat().st_mtime_ns == (model_dir / "SHA256SUMS").stat().st_mtime_ns


def test_what_is_appended_to_the_data_is_none_of_the_weights(model_dir, params):
    load(model_dir)
    time = (model_dir / "SHA256SUMS").stat().st_mtime_ns
    with open(model_dir / DATA, "ab") as f:
        f.write(b"!")
    os.utime(model_dir / DATA, ns=(time, time))
    assert_same(load(model_dir)[2], params)


def test_a_folder_that_cannot_be_written_to_works_and_says_so_once(model_dir, params, capsys, monkeypatch):
    def refuse(*args):
        raise PermissionError("Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)  # permissions would not stop root, who may be running this
    assert_same(load(model_dir)[2], params)
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "cannot be written to" in stderr
    assert not list(model_dir.glob("SHA256SUMS*"))


BESIDE = {  # variables that change nothing in the model
    "global_step": np.int64(7),
    "beta1_power": np.float32(0.9),
    "optimizer/model/h9/ln_1/g": np.ones(80, np.float32),
    "model/wte/Adam": np.ones((500, 80), np.float32),
    "modelling": np.ones(3),
}


@pytest.mark.parametrize("change", ["another order", *BESIDE])
def test_a_checkpoint_laid_out_otherwise_is_mapped_all_the_same(change, model_dir, params, capsys):
    tensors = tensors_of(model_dir)
    save(model_dir, {change: BESIDE[change], **tensors} if change in BESIDE else dict(reversed(tensors.items())))
    for _ in range(2):
        found = load(model_dir)[2]
        assert_same(found, params)
        assert isinstance(found["wte"], np.memmap)
    assert not verifies(model_dir)
    assert capsys.readouterr().err == ""


def test_weights_behind_an_odd_number_of_bytes_are_copied_to_where_they_compute_as_fast(model_dir, params):
    save(model_dir, {"flag": np.array([True]), **tensors_of(model_dir)})
    found = load(model_dir)[2]
    assert_same(found, params)
    assert all(array.flags.aligned for _, array in leaves(found))


def in_shards(model_dir, n):
    """Has TensorFlow write the checkpoint in several data files."""
    tf, tensors = optional("tensorflow"), list(tensors_of(model_dir).items())
    prefixes = [str(model_dir / f"part{i}") for i in range(n)]
    for i, prefix in enumerate(prefixes):
        save(model_dir, dict(tensors[i::n]), prefix=os.path.basename(prefix))
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=str(model_dir / "model.ckpt"))
    (model_dir / DATA).unlink()
    return [model_dir / f"model.ckpt.data-{i:05}-of-{n:05}" for i in range(n)]


def test_a_checkpoint_of_several_data_files_is_mapped(model_dir, params):
    shards = in_shards(model_dir, 3)
    assert all(path.exists() for path in shards)
    assert verifies(model_dir)
    assert not verifies(model_dir)
    assert_same(load(model_dir)[2], params)
    check_with_sha256sum(model_dir)


def test_a_changed_file_of_several_is_noticed_whatever_its_time(model_dir):
    _, shard, _ = in_shards(model_dir, 3)
    load(model_dir)
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    os.utime(shard, (0, 0))
    assert f"{shard} is damaged" in error_of(model_dir)


def test_one_of_several_data_files_that_is_not_there_is_named(model_dir):
    _, shard, _ = in_shards(model_dir, 3)
    shard.unlink()
    assert f"lacks {shard.name}" in error_of(model_dir)


def test_an_index_of_more_data_files_than_there_are_is_an_error(model_dir):
    data = (model_dir / DATA).read_bytes()
    for path in in_shards(model_dir, 3):
        path.unlink()
    (model_dir / DATA).write_bytes(data)
    assert f"{model_dir / INDEX} is of 3 data files" in error_of(model_dir)


def rename_checkpoint(model_dir, prefix):
    (model_dir / INDEX).rename(model_dir / f"{prefix}.index")
    (model_dir / DATA).rename(model_dir / f"{prefix}.data-00000-of-00001")
    (model_dir / "checkpoint").write_text(
        f'model_checkpoint_path: "{prefix}"\nall_model_checkpoint_paths: "{prefix}"\n'
    )


def test_the_file_checkpoint_names_the_checkpoint_as_it_does_for_openais_code(model_dir, params):
    rename_checkpoint(model_dir, "model-1000")
    assert verifies(model_dir)
    assert not verifies(model_dir)
    assert_same(load(model_dir)[2], params)
    assert "mine" in utils.folders_in(model_dir.rename(model_dir.with_name("mine")).parent)


def test_another_checkpoint_of_the_folder_is_verified_when_it_is_named(model_dir, params):
    load(model_dir)
    save(model_dir, {name: 2 * tensor for name, tensor in tensors_of(model_dir).items()}, prefix="model-7")
    (model_dir / "checkpoint").write_text('model_checkpoint_path: "model-7"\n')
    assert verifies(model_dir)
    np.testing.assert_array_equal(load(model_dir)[2]["wte"], 2 * params["wte"])


def test_a_named_checkpoint_that_is_not_there_is_an_error_that_says_what_is_missing(model_dir):
    (model_dir / "checkpoint").write_text('model_checkpoint_path: "model-7"\n')
    assert "lacks model-7.index, model-7.data-00000-of-00001" in error_of(model_dir)


@pytest.mark.parametrize("folder", ["/content/run1/", "../tiny/", "C:\\\\runs\\\\1\\\\"])
def test_where_a_checkpoint_was_trained_is_left_out_of_its_name(folder, model_dir, params):
    rename_checkpoint(model_dir, "model-1000")
    (model_dir / "checkpoint").write_text(f'model_checkpoint_path: "{folder}model-1000"\n')
    assert_same(load(model_dir)[2], params)


@pytest.mark.parametrize("path", ["..", "a/..", ".hidden", "/etc/", "C:x", "", 'x"y', "*", "a/*", r"\346\250\241"])
def test_the_file_checkpoint_leads_nowhere_outside_its_folder(path, model_dir):
    (model_dir / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
    assert f"{model_dir / 'checkpoint'} must begin with" in error_of(model_dir)


def test_without_the_file_checkpoint_it_is_model_ckpt(model_dir, params):
    (model_dir / "checkpoint").unlink()
    assert_same(load(model_dir)[2], params)


# Errors


def error_of(model_dir):
    with pytest.raises(utils.ModelError) as error:
        load(model_dir)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_variable_is_named(model_dir):
    tensors = tensors_of(model_dir)
    del tensors["model/h1/ln_2/g"]
    save(model_dir, tensors | {"other": np.zeros(80, np.float32)})
    assert f"{model_dir / INDEX} lacks the variable model/h1/ln_2/g" in error_of(model_dir)


EXTRA = ["model/h3/ln_1/g", "model/h0/attn/c_attn/w_1", "model/h0/extra", "model/lm_head", "model/h9/ln_1/g/Adam"]


@pytest.mark.parametrize("name", EXTRA)
def test_a_variable_of_the_model_that_hparams_do_not_imply_is_named(name, model_dir):
    save(model_dir, tensors_of(model_dir) | {name: np.zeros(80, np.float32)})
    assert f"{model_dir / INDEX} has the variable {name}, which hparams.json does not imply" in error_of(model_dir)


def test_fewer_blocks_than_the_checkpoint_holds_are_an_error(model_dir):
    (model_dir / "hparams.json").write_text(json.dumps(HPARAMS | {"n_layer": 2}))
    assert "has the variable model/h2/" in error_of(model_dir)


def test_a_variable_of_the_wrong_shape_is_named(model_dir):
    tensors = tensors_of(model_dir)
    save(model_dir, tensors | {"model/h1/attn/c_attn/w": tensors["model/h1/attn/c_attn/w"].reshape(1, 240, 80)})
    error = error_of(model_dir)
    assert str(model_dir / INDEX) in error
    assert "model/h1/attn/c_attn/w has shape [1, 240, 80], hparams.json implies [80, 240]" in error


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.float16])
def test_a_variable_of_the_wrong_type_is_named(dtype, model_dir):
    tensors = tensors_of(model_dir)
    tensors["padding"] = np.zeros(10**6, np.float32)  # so that the size of the file gives nothing away
    save(model_dir, tensors | {"model/wte": tensors["model/wte"].astype(dtype)})
    assert f"model/wte is {np.dtype(dtype).name}, not float32" in error_of(model_dir)


def test_a_flipped_byte_of_the_data_is_found_and_its_variable_named(model_dir):
    load(model_dir)
    with open(model_dir / DATA, "r+b") as f:
        f.seek(-4, os.SEEK_END)  # wte is the last by name
        byte = f.read(1)[0]
        f.seek(-4, os.SEEK_END)
        f.write(bytes([byte ^ 1]))
    assert f"{model_dir / DATA} is damaged: model/wte is not what its checksum" in error_of(model_dir)


def test_truncated_data_is_an_error(model_dir):
    os.truncate(model_dir / DATA, 1000)
    assert f"{DATA} has 1000 bytes" in error_of(model_dir)


def test_a_file_that_cannot_be_read_is_an_error(model_dir, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(sums, "hexdigest", refuse)  # permissions would not stop root, who may be running this
    assert "cannot be read: [Errno 13] Permission denied" in error_of(model_dir)


def test_params_that_are_not_what_hparams_imply_are_not_saved(tmp_path, params):
    transposed = {**params, "wte": params["wte"].T}
    with pytest.raises(ValueError, match=r"wte has shape \(80, 500\), the hparams imply \(500, 80\)"):
        checkpoint.save_checkpoint(tmp_path, HPARAMS, transposed)
    with pytest.raises(ValueError, match="3 blocks, the hparams imply 2"):
        checkpoint.save_checkpoint(tmp_path, HPARAMS | {"n_layer": 2}, params)


def test_a_truncated_index_is_an_error(model_dir):
    os.truncate(model_dir / INDEX, 100)
    assert f"{model_dir / INDEX} is damaged" in error_of(model_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": None}, "n_head must be a positive integer below 2**31, not None"),
        ({"n_layer": 0}, "n_layer must be a positive integer below 2**31, not 0"),
        ({"n_ctx": -1}, "n_ctx must be a positive integer below 2**31, not -1"),
        ({"n_vocab": 500.0}, "n_vocab must be a positive integer below 2**31, not 500.0"),
        ({"n_layer": True}, "n_layer must be a positive integer below 2**31, not True"),
        ({"n_embd": "80"}, "n_embd must be a positive integer below 2**31, not '80'"),
        ({"n_head": 7}, "n_embd 80 is not divisible by n_head 7"),
    ],
)
def test_hparams_are_checked(change, message, model_dir):
    (model_dir / "hparams.json").write_text(json.dumps(HPARAMS | change))
    assert message in error_of(model_dir)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\xff"])
def test_hparams_that_are_no_object_are_an_error(text, model_dir):
    (model_dir / "hparams.json").write_text(text, encoding="latin-1")
    assert "hparams.json" in error_of(model_dir)


def test_an_unknown_model_is_an_error_that_names_the_choices(tmp_path, models_dir):
    for folder in ("mine", "shakespeare"):
        link(tmp_path / folder, models_dir / "tiny")
    (tmp_path / "124M").mkdir()  # of which nothing could be fetched
    choices = f"choose 124M, 355M, 774M, 1558M or a folder in {tmp_path} (mine, shakespeare)"
    assert f"no model 'nonsense': {choices}" in error_of(tmp_path / "nonsense")


def test_an_unknown_model_where_there_are_no_models_is_an_error(tmp_path):
    assert f"or a folder in {tmp_path / 'models'} (there is none)" in error_of(tmp_path / "models" / "nonsense")


def test_a_line_break_in_the_name_of_a_folder_stays_one_line(model_dir):
    needs_posix("line breaks in names")
    folder = model_dir.rename(model_dir.with_name("models\nof\r\x1bmine"))
    (folder / DATA).unlink()
    assert "models of ?mine is no complete checkpoint" in error_of(folder)


def test_a_numpy_that_is_too_old_is_an_error(models_dir, monkeypatch):
    monkeypatch.setattr(utils.np, "__version__", "1.26.4")
    with pytest.raises(utils.ModelError, match=r"NumPy 2\.0 or newer is needed, and this is 1\.26\.4"):
        utils.load_encoder_hparams_and_params("tiny", models_dir)


@pytest.mark.parametrize("name", ["hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA])
def test_a_folder_that_lacks_a_file_is_an_error_that_names_it(name, model_dir):
    (model_dir / name).unlink()
    assert f"lacks {name}" in error_of(model_dir)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "C:x", "a\0b"])
def test_a_model_name_cannot_leave_the_models_folder(name, tmp_path):
    with pytest.raises(utils.ModelError, match="must be a folder inside"):
        utils.load_encoder_hparams_and_params(name, tmp_path / "models")


def test_models_dir_may_be_a_string_or_a_path(models_dir):
    for path in (str(models_dir), pathlib.Path(models_dir)):
        assert utils.load_encoder_hparams_and_params("tiny", path)[1] == HPARAMS


# Saving


def test_tensorflow_reads_what_was_saved(tmp_path, params):
    checkpoint.save_checkpoint(tmp_path / "new", HPARAMS, params)
    tensors = tensors_of(tmp_path / "new")
    assert sorted(tensors) == sorted(f"model/{name}" for name, _ in checkpoint.variables(HPARAMS))
    np.testing.assert_array_equal(tensors["model/wte"], params["wte"], strict=True)
    np.testing.assert_array_equal(tensors["model/h1/mlp/c_fc/w"], params["blocks"][1]["mlp"]["c_fc"]["w"][None])
    latest = optional("tensorflow").train.latest_checkpoint(str(tmp_path / "new"))
    assert latest == str(tmp_path / "new" / "model.ckpt")


def test_what_was_saved_is_byte_for_byte_what_tensorflow_writes(tmp_path, params):
    checkpoint.save_checkpoint(tmp_path / "new", HPARAMS, params)
    save(tmp_path, tensors_of(tmp_path / "new"))
    for name in (INDEX, DATA):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / name).read_bytes()


STEPS = """if True:  # saves one model over another, and is killed at each step in turn; prints what was then found
    import os, sys
    sys.path[:0] = [{repo!r}, {tests!r}]
    import numpy as np
    from conftest import HPARAMS, leaves, wild_params
    import utils
    from files import checkpoint

    folder, old, new = sys.argv[1], wild_params(HPARAMS), wild_params(HPARAMS, seed=1)
    n = status = 0
    while os.WEXITSTATUS(status) in (0, 9):
        n += 1
        if (child := os.fork()) == 0:
            steps = iter(range(n - 1))
            def count(event, args):
                if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.utime", "shutil.rmtree", "os.remove"):
                    if folder in str(args[0]) and next(steps, None) is None:
                        os._exit(9)
            sys.addaudithook(count)
            checkpoint.save_checkpoint(folder, HPARAMS, new)
            os._exit(7)
        status = os.waitpid(child, 0)[1]
        found = utils.load_encoder_hparams_and_params(os.path.basename(folder), os.path.dirname(folder))[2]
        is_new = [np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(found), leaves(new), strict=True)]
        is_old = [np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(found), leaves(old), strict=True)]
        left = [name for name in os.listdir(folder) if name == ".saved"]
        print("new" if all(is_new) else "old" if all(is_old) else "neither", *left)
        checkpoint.save_checkpoint(folder, HPARAMS, old)
        assert not {{".saving", ".saved"}} & {{*os.listdir(folder)}}
    print(os.WEXITSTATUS(status))
"""


def test_a_process_that_is_killed_at_any_step_of_saving_leaves_the_old_model_or_the_new(model_dir):
    needs_posix("fork")
    code = STEPS.format(repo=str(REPO), tests=str(REPO / "tests"))
    *found, last, status = command(model_dir, code=code).stdout.splitlines()
    assert status == "7"  # it was not killed, having no more steps
    assert last == "new"
    assert found == sorted(found, reverse=True)  # "old" up to the one that counts, then "new"
    assert found.count("old") > 10
    assert found.count("new") > 4


def test_a_full_disk_leaves_the_old_model(model_dir, params, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = {path.name for path in model_dir.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        checkpoint.save_checkpoint(model_dir, HPARAMS, wild_params(HPARAMS, seed=1))
    assert error.value.filename == model_dir
    assert {path.name for path in model_dir.iterdir()} == before
    assert_same(load(model_dir)[2], params)


def test_a_file_that_may_not_grow_leaves_the_old_model(model_dir, params):
    needs_posix("limits")
    code = """if True:
        import resource, sys
        sys.path[:0] = sys.argv[2:]
        from conftest import HPARAMS, wild_params
        from files import checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
        checkpoint.save_checkpoint(sys.argv[1], HPARAMS, wild_params(HPARAMS, seed=1))"""
    assert "File too large" in command(model_dir, REPO, REPO / "tests", code=code).stderr
    assert not (model_dir / ".saving").exists()
    assert_same(load(model_dir)[2], params)


@pytest.mark.parametrize("name", ["rename", "replace", "rmdir"])
def test_what_another_program_has_for_a_moment_is_replaced_when_it_lets_go(name, model_dir, monkeypatch):
    held = hold_for_a_moment(monkeypatch, name)
    checkpoint.save_checkpoint(model_dir, HPARAMS, wild_params(HPARAMS, seed=1))
    assert_same(load(model_dir)[2], wild_params(HPARAMS, seed=1))
    assert not held


@pytest.mark.parametrize("name", [DATA, "SHA256SUMS"])
@pytest.mark.skipif(os.name != "nt", reason="elsewhere, what is open may be replaced in any case")
def test_so_is_what_another_reads(name, model_dir):
    load(model_dir)
    held = (model_dir / name).open("rb")  # on Windows, nobody may replace it
    threading.Timer(0.3, held.close).start()
    checkpoint.save_checkpoint(model_dir, HPARAMS, wild_params(HPARAMS, seed=1))
    assert_same(load(model_dir)[2], wild_params(HPARAMS, seed=1))


def test_a_link_in_place_of_a_saved_checkpoint_brings_nothing_in(model_dir, tmp_path, params):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "hparams.json").write_text("{}")
    link(model_dir / ".saved", tmp_path / "elsewhere")
    assert_same(load(model_dir)[2], params)
    assert (tmp_path / "elsewhere" / "hparams.json").exists()


# OpenAI's models


@pytest.fixture
def server(monkeypatch, models_dir):
    """A server that has the tiny model as 124M, and all that is known of OpenAI's is known of it."""
    files = {path.name: path.read_bytes() for path in (models_dir / "tiny").glob("[!.]*") if path.name != "SHA256SUMS"}
    files["model.ckpt.meta"] = b"a graph"
    monkeypatch.setattr(utils, "MODEL_SIZES", {"124M": HPARAMS})
    monkeypatch.setattr(utils, "SHA256", {name: hashlib.sha256(files[name]).hexdigest() for name in utils.SHA256})
    monkeypatch.setattr(utils, "TOKENIZER_BYTES", {name: len(files[name]) for name in utils.SHA256})
    monkeypatch.setattr(utils, "BYTES", {"124M": {name: len(files[name]) for name in utils.BYTES["124M"]}})
    monkeypatch.setattr(utils, "MD5", {"124M": hashlib.md5(files[DATA]).hexdigest()})  # noqa: S324
    with serving(files) as server:
        server.headers = {"Content-MD5": None}
        monkeypatch.setenv("GPT2_BASE_URL", server.url + "/")
        yield server


def test_one_of_openais_models_is_fetched_verified_and_loaded(server, tmp_path, params):
    assert_same(load(tmp_path / "models" / "124M")[2], params)
    assert {path.name for path in (tmp_path / "models" / "124M").glob("[!.]*")} == {*server.files, "SHA256SUMS"}
    server.log.clear()
    load(tmp_path / "models" / "124M")
    assert server.log == []


def test_the_sizes_of_the_vocabulary_are_those_of_the_genuine_one():
    assert {name: (GENUINE / name).stat().st_size for name in ("encoder.json", "vocab.bpe")} == utils.TOKENIZER_BYTES


@pytest.mark.parametrize(
    "name", ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX, "model.ckpt.meta", DATA]
)
def test_a_file_of_another_size_than_the_published_one_gets_no_name(name, server, tmp_path):
    server.files[name] += b" "
    assert f"{name} from {server.url}/124M/{name}" in error_of(tmp_path / "models" / "124M")
    assert not (tmp_path / "models" / "124M" / name).exists()


@pytest.mark.parametrize("name", ["hparams.json", "encoder.json", "vocab.bpe", DATA])
def test_a_file_of_other_contents_than_the_published_one_gets_no_name(name, server, tmp_path):
    server.files[name] = server.files[name].replace(b"3", b"4") if name == "hparams.json" else server.files[name][::-1]
    assert "OpenAI's" in error_of(tmp_path / "models" / "124M")
    assert not (tmp_path / "models" / "124M" / name).exists()


def test_a_download_that_fails_says_what_else_there_is_to_do(server, tmp_path):
    (tmp_path / "models" / "shakespeare").mkdir(parents=True)
    del server.files["model.ckpt.meta"]
    folder = tmp_path / "models" / "124M"
    error = error_of(folder)
    assert error.startswith(f"could not download model.ckpt.meta from {server.url}/124M/model.ckpt.meta: HTTP 404; ")
    assert "run it again to go on from here" in error
    assert error.endswith("; --model_size shakespeare is here, and needs no network")


def test_a_damaged_file_is_fetched_anew_once_it_is_deleted(server, tmp_path, params):
    folder = tmp_path / "models" / "124M"
    load(folder)
    (folder / INDEX).write_bytes(b"")
    assert f"{folder / INDEX} is damaged" in error_of(folder)
    (folder / INDEX).unlink()
    assert_same(load(folder)[2], params)


def test_utils_py_fetches_a_model_and_says_where_it_lies(server, tmp_path, capsys):
    utils.main("124M", str(tmp_path / "models"))
    stdout = capsys.readouterr().out
    assert stdout.startswith(
        f"124M is verified, and lies in {tmp_path / 'models' / '124M'}: checkpoint, hparams.json, "
    )
    assert stdout.endswith(f"{DATA}, SHA256SUMS\n")


def test_utils_py_is_a_command(models_dir):
    done = command("tiny", "--models_dir", models_dir, script="utils.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(models_dir / "tiny") in done.stdout


def test_utils_py_finds_damage_that_left_the_time_of_the_file(model_dir):
    load(model_dir)
    path, time = model_dir / DATA, (model_dir / DATA).stat().st_mtime_ns
    with open(path, "r+b") as f:
        f.write(b"damage")
    os.utime(path, ns=(time, time))
    done = command(model_dir.name, "--models_dir", model_dir.parent, script="utils.py")
    assert_one_line_error(done, f"{DATA} is not as SHA256SUMS has it")


def test_the_errors_of_utils_py_are_one_line(tmp_path):
    with serving({}) as empty:
        done = command("124M", "--models_dir", tmp_path, script="utils.py", env={"GPT2_BASE_URL": empty.url})
    _, error = done.stderr.splitlines()  # what it fetches, then why it cannot
    assert error.startswith(f"utils.py: could not download checkpoint from {empty.url}/124M/checkpoint: HTTP 404")
    assert (done.returncode, done.stdout) == (1, "")


def test_the_heads_of_every_size_are_64_wide():
    for hparams in utils.MODEL_SIZES.values():  # as GPT-2's and GPT-3's papers have them
        assert hparams["n_embd"] == 64 * hparams["n_head"]
