"""examples/generate_many.py: on a Ray cluster of two nodes, on this machine alone, and its parts by themselves."""

import contextlib
import gzip
import importlib.util
import inspect
import io
import json
import pathlib
import signal

import psutil
import pytest
from conftest import REPO, TIMEOUT, N, assert_one_line_error, command, interrupt, running, wait_until
from pyarrow.fs import LocalFileSystem
from ray.cluster_utils import Cluster

from gpt2 import generate
from gpt2 import main as gpt2_main
from utils import load_encoder_hparams_and_params

SCRIPT = "examples/generate_many.py"
GENERATION = {"n_tokens_to_generate": N, "sliding_window": False, "temperature": 0, "top_k": 0, "top_p": 1}

spec = importlib.util.spec_from_file_location("generate_many", REPO / SCRIPT)
many = importlib.util.module_from_spec(spec)
spec.loader.exec_module(many)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, as environment variables that lead to them."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RAY_worker_niceness", "0")  # or its workers wait until no other test computes
        cluster = Cluster()
        for _ in range(2):
            add_node(cluster)
    yield {"RAY_ADDRESS": cluster.address}
    cluster.shutdown()


def add_node(cluster, n_tries=3):
    """Ray gives a node 30 seconds to start, in which a busy machine may not have come to it."""
    for i in range(n_tries):
        with contextlib.suppress(Exception if i < n_tries - 1 else ()):
            return cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)


def workers(pid=None):
    """The processes that answer prompts, of all Ray nodes below a process: this one, unless told otherwise."""
    processes = psutil.Process(pid).children(recursive=True)
    return [process for process in processes if "ray::MapWorker" in " ".join(command_line(process))]


def command_line(process):
    try:
        return process.cmdline()
    except psutil.Error:  # it ended meanwhile
        return []


def write_prompts(path, n):
    """JSON lines of n prompts of 0 to 12 words, each with an id."""
    prompts = [" ".join(f"w{i * j % 97}" for j in range(i % 13)) for i in range(n)]
    path.write_text("".join(json.dumps({"id": i, "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts)))
    return prompts


def parts(out):
    return sorted(out.glob("part-*.jsonl"))


def answers(out):
    """The objects of all parts, in the order of the parts' names."""
    return [json.loads(line) for part in parts(out) for line in part.read_text("utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def expected(models_dir):
    """What gpt2.generate gives for a prompt, or for each of a list, in this process."""
    encoder, hparams, params = load_encoder_hparams_and_params("tiny", models_dir)

    def texts(prompts, n=N, **options):
        batch = [prompts] if isinstance(prompts, str) else prompts
        ids = [encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]] for prompt in batch]
        outputs = [encoder.decode(output) for output in generate(ids, params, hparams["n_head"], n, **options)]
        return outputs[0] if isinstance(prompts, str) else outputs

    return texts


# On a cluster


def test_a_worker_that_is_killed_is_replaced_and_every_prompt_of_a_packed_file_has_its_one_answer(
    cluster, tiny, tmp_path, expected
):
    prompts, out, folder = write_prompts(tmp_path / "p.jsonl", 2000), tmp_path / "out", tmp_path / "folder"
    folder.mkdir()
    (folder / "p.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    flags = ["--batch_size=8", "--temperature=0.8", "--top_k=50", "--seed=3", "--repetition_penalty=1.3"]
    args = [folder, out, *flags, "--logprobs=1"]
    with running(*args, script=SCRIPT, model=tiny, n=N, env=cluster) as process:
        wait_until(lambda: len(workers()) == 2, every=0.3)
        first, *others = workers()
        wait_until(lambda: len(parts(out)) >= 2)
        for worker in (first, *others):
            worker.suspend()  # or a fast machine may be done before one is killed
        n_before = len(parts(out))
        assert [other.ppid() for other in others] != [first.ppid()]  # each on a node of its own
        assert first.environ()["OPENBLAS_NUM_THREADS"] == "1"  # no more than its own core
        second = command(folder, out, "--batch_size=4", script=SCRIPT, model=tiny, n=N, env=cluster)
        assert_one_line_error(second, f"{out} cannot be written: another process writes to it: wait until it has ended")
        assert process.poll() is None
        first.kill()
        for other in others:
            other.resume()
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, stdout, stderr) == (0, b"", b"")
    assert 2 <= n_before < 32 == len(parts(out))
    options = {"temperature": 0.8, "top_k": 50, "repetition_penalty": 1.3}
    texts = expected(prompts, seed=[3 + i for i in range(2000)], **options)
    made = answers(out)
    assert {len(answer.pop("logprobs")) for answer in made} == {N}
    assert made == [
        {"id": i, "prompt": prompt, "text": text, "n_tokens": N, "finish_reason": "length"}
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]


def test_a_run_that_is_stopped_or_killed_goes_on_with_the_same_command_and_makes_what_lacks_alone(
    cluster, tiny, tmp_path, expected
):
    folder, out = tmp_path / "a b#c%20é", tmp_path / "out"
    folder.mkdir()
    (folder / "1.txt").write_bytes("\ufeffone\r\ntwo\n".encode() + b"caf\xe9\n" + b"x y " * 99)
    prompts = write_prompts(folder / "2.jsonl", 500)
    (folder / "2.jsonl").write_text((folder / "2.jsonl").read_text().replace("\n", "\n\n"))  # blank lines ask nothing
    args, run = [folder, out, "--batch_size=2"], {"script": SCRIPT, "model": tiny, "n": N}

    # on this machine alone, stopped by Ctrl-C: no worker stays
    with running(*args, **run, env={"RAY_ADDRESS": "local"}) as process:
        wait_until(lambda: len(parts(out)) >= 3)
        working = workers(process.pid)
        assert working
        interrupt(process)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, stdout) == (130, b"")
    assert stderr == b"\ngenerate_many.py: stopped; the same command goes on from here\n"
    wait_until(lambda: not any(map(command_line, working)))
    stopped = {part: part.stat().st_mtime_ns for part in parts(out)}
    assert 3 <= len(stopped) < 64

    # on the cluster, killed
    with running(*args, **run, env=cluster):
        wait_until(lambda: len(parts(out)) >= len(stopped) + 3)
    killed = {part: part.stat().st_mtime_ns for part in parts(out)}
    assert stopped.items() <= killed.items()
    assert len(killed) < 64

    # what has fewer answers than prompts, as no run of ours leaves it, is made anew, and nothing else
    empty, short, changed = [*killed][1:4]
    whole = {part: part.read_bytes() for part in killed}
    assert {data.count(b"\n") for data in [*whole.values()][1:]} == {8}
    empty.write_bytes(b"")
    short.write_bytes(b"".join(whole[short].splitlines(keepends=True)[:3]))
    changed.write_bytes(kept := whole[changed].replace(b'"prompt"', b'"kept": 1, "prompt"'))
    times = {part: part.stat().st_mtime_ns for part in killed.keys() - {empty, short}}
    done = command(*args, **run, env=cluster)
    assert (done.returncode, done.stdout) == (1, "")
    *notes, mistake = done.stderr.splitlines()
    assert sorted(notes) == [  # in the order in which Ray's tasks end
        f"generate_many.py: {part.name} had {n} answers, which were not all, and is answered anew"
        for part, n in ((empty, 0), (short, 3))
    ]
    assert mistake == f'generate_many.py: 2 of 504 prompts could not be continued: their lines in {out} have an "error"'
    assert {part: part.stat().st_mtime_ns for part in times} == times
    assert {part: part.read_bytes() for part in killed} == whole | {changed: kept}
    one, two, no_text, long, *others = answers(out)
    assert [(answer["prompt"], answer["text"]) for answer in (one, two)] == [
        (prompt, expected(prompt)) for prompt in ("one", "two")
    ]
    assert no_text == {"prompt": "caf\ufffd", "error": "not valid Unicode text: it must be UTF-8"}
    assert "more than the model's context" in long["error"]
    assert [(answer["id"], answer["text"]) for answer in others] == [*enumerate(expected(prompts))]


def test_what_a_worker_lacks_is_told_in_one_line(cluster, tiny, tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 3)
    args = [tmp_path / "prompts.jsonl", tmp_path / "out", "--backend=cupy"]
    assert_one_line_error(command(*args, script=SCRIPT, model=tiny, n=N, env=cluster), "CuPy is not installed")


# A part by itself


@pytest.fixture(scope="module")
def answer(tiny):
    """The objects that a worker answers a part of these lines with."""

    def answer(data, first=0, is_json=True, stop=(), batch_size=3, n_samples=1, seed=None, **options):
        model, arrays = (tiny.name, tiny.parent), ("numpy", "float32")
        worker = many.Worker(model, arrays, [*stop], batch_size, n_samples, seed, **GENERATION | options)
        answered = worker({"name": "part", "first": first, "data": data, "is_json": is_json})
        assert (answered["name"], answered["mistake"]) == ("part", "")
        return [json.loads(line) for line in answered["answers"].splitlines()]

    return answer


def lines(*objects):
    return "".join(json.dumps(value) + "\n" for value in objects).encode()


def test_the_fields_of_a_prompt_are_kept_but_for_those_of_an_earlier_answer(answer, expected):
    fields = {"id": [1, {"a": None}], "prompt": "one\0", "ü": "\ud83d"}
    assert answer(lines(fields | {"error": "earlier", "text": "earlier"})) == [
        fields | {"text": expected("one\0"), "n_tokens": N, "finish_reason": "length"}
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"{broken", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'["prompt"]', 'no object with a "prompt" that is a text'),
        (b'{"id": 1}', 'no object with a "prompt" that is a text'),
        (b'{"id": 1, "prompt": 5}', 'no object with a "prompt" that is a text'),
        (b'{"id": 1, "prompt": "\\ud83d"}', "not valid Unicode"),
        (b'{"id": 1, "prompt": "caf\xe9"}', "not valid Unicode"),
        (lines({"id": 1, "prompt": "x y " * 99})[:-1], "more than the model's context"),
    ],
    ids=range(8),
)
def test_a_bad_line_is_an_object_with_an_error_and_the_others_are_answered(line, error, answer, expected):
    one, bad, two = answer(lines({"prompt": "one"}) + line + b"\n" + lines({"prompt": "two"}))
    assert [one["text"], two["text"]] == [expected("one"), expected("two")]
    assert error in bad.pop("error")
    assert bad.keys() <= {"prompt", "id"}
    assert bad.get("id", 1) == 1


def test_blank_lines_of_jsonl_are_passed_over(answer, expected):
    answers = answer(b"\n" + lines({"prompt": "one"}) + b" \r\n" + lines({"prompt": "two"}))
    assert [answer["text"] for answer in answers] == [expected("one"), expected("two")]


def test_text_has_a_prompt_a_line_which_ends_at_a_line_break_and_nowhere_else(answer, expected):
    data = "\ufeffone\r\n\n{}\na\u2028b\x0cc\nlast\r".encode()
    prompts = ["one", "", "{}", "a\u2028b\x0cc", "last\r"]
    answers = answer(data, is_json=False)
    assert [(answer["prompt"], answer["text"]) for answer in answers] == [(p, expected(p)) for p in prompts]


def test_the_mark_before_the_first_line_of_a_file_is_text_before_another(answer):
    assert [answer(b"\xef\xbb\xbfone\n", first, is_json=False)[0]["prompt"] for first in (0, 9)] == [
        "one",
        "\ufeffone",
    ]


def parts_of(data, path="p.jsonl", **done):
    """The parts, of two lines each, that are to be answered of a file. done: {name: how many answers it has}."""
    reader = many.Parts.__new__(many.Parts)  # its own __init__ would start Ray
    reader.n_lines, reader.places, reader.done = 2, {path: 0}, {name: (n, 0) for name, n in done.items()}
    return [part for table in reader._read_stream(io.BytesIO(data), path) for part in table.to_pylist()]


NAMES = [f"part-00000-{first:012}.jsonl" for first in (0, 2, 4)]


@pytest.mark.parametrize(
    ("n", "asked"), [([1, 1, 1], []), ([0, 1, 1], [0]), ([1, 2, 1], [1]), ([1, 1, 0], [2]), ([1, 1], [2])], ids=str
)
def test_a_part_is_done_if_it_has_an_answer_for_each_prompt_and_blank_lines_are_none(n, asked):
    done = {f"{name}": n for name, n in zip(NAMES, n, strict=False)}
    assert [
        part["name"] for part in parts_of(b'\xef\xbb\xbf\n{"prompt": "a"}\n' + b'{"prompt": "a"}\n \n' * 2, **done)
    ] == [NAMES[i] for i in asked]


def test_every_line_of_a_text_is_a_prompt_and_a_blank_one_too():
    assert parts_of(b"\n\n", "p.txt", **{NAMES[0]: 2}) == []
    assert [part["name"] for part in parts_of(b"\n\n", "p.txt", **{NAMES[0]: 1})] == [NAMES[0]]


def test_a_packed_file_that_is_damaged_is_a_last_part_that_says_so(tmp_path):
    path = str(tmp_path / "p.jsonl.gz")
    pathlib.Path(path).write_bytes(gzip.compress(b'{"prompt": "one"}\n' * 3)[:-9])
    reader = many.Parts.__new__(many.Parts)
    reader.n_lines, reader.places, reader.done = 2, {path: 0}, {}
    with LocalFileSystem().open_input_stream(path, compression="gzip") as f:  # as Ray Data opens it
        *_, table = reader._read_stream(f, path)
    (part,) = table.to_pylist()
    worker = many.Worker.__new__(many.Worker)
    worker.mistake = ""
    assert worker(part)["mistake"].startswith(f"{path} cannot be read: ")


def test_samples_are_drawn_with_seeds_that_follow_from_the_line_alone(answer, expected):
    prompts = ["one", "a longer one", "two", "one"]
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95}
    got = answer(lines(*({"prompt": prompt} for prompt in prompts)), first=100, n_samples=2, seed=7, **options)
    seeds = [(prompt, 7 + (100 + i) * 2 + j) for i, prompt in enumerate(prompts) for j in (0, 1)]
    texts = [sample["text"] for answer in got for sample in answer["samples"]]
    assert texts == [expected(prompt, seed=seed, **options) for prompt, seed in seeds]
    alone = answer(b"\n" + lines({"prompt": "one"}), first=102, n_samples=2, seed=7, **options)  # blank lines count
    assert alone == got[3:]


def test_it_takes_all_flags_of_gpt2_that_make_text():
    of_one_text = {"prompt", "prompts_file", "out", "stream", "interactive", "tensor_parallel", "n_threads"}
    theirs, ours = (inspect.signature(main).parameters for main in (gpt2_main, many.main))
    assert theirs.keys() - ours.keys() == of_one_text


def test_repetition_is_held_back(answer, expected):
    options = {"repetition_penalty": 1.5, "no_repeat_ngram": 2}
    (one,) = answer(lines({"prompt": "one"}), **options)
    assert one["text"] == expected("one", **options) != expected("one")


def test_a_special_token_in_a_prompt_is_a_text_unless_told_otherwise(answer, expected):
    plain, special = (answer(lines({"prompt": "<|endoftext|>"}), special=special) for special in (False, True))
    assert special[0]["text"] == expected("") != plain[0]["text"]


def test_a_text_ends_before_a_stop_text(answer, expected):
    text = expected("one")
    stop = text[4:7]
    one, _ = answer(lines({"prompt": "one"}, {"prompt": "two"}), stop=[stop])
    assert (one["text"], one["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_the_sliding_window_goes_on_past_the_context(answer, expected):
    options = {"n_tokens_to_generate": 100, "sliding_window": True}
    (one,) = answer(lines({"prompt": "one"}), **options)
    assert (one["text"], one["n_tokens"]) == (expected("one", 100, sliding_window=True), 100)


# The folder of the answers


def test_what_is_written_is_whole_or_not_there(tmp_path):
    many.write(LocalFileSystem(), f"{tmp_path}/part", b"first")
    with pytest.raises(TypeError):
        many.write(LocalFileSystem(), f"{tmp_path}/part", None)  # as a crash midway
    assert (tmp_path / "part").read_bytes() == b"first"


def begin(out, **settings):
    return many.begin_or_resume(LocalFileSystem(), str(out), settings)


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    assert begin(tmp_path / "out", seed=1, files=[["a", 3]]) == {}
    assert begin(tmp_path / "out", seed=2, files=[["a", 3]]) == {}  # nothing was done with the others
    part = tmp_path / "out" / "part-00000-000000000000.jsonl"
    part.write_text('{"prompt": "a", "text": "b"}\n{"prompt": 1, "error": "c"}\n')
    assert begin(tmp_path / "out", seed=2, files=[["a", 3]]) == {part.name: (2, 1)}
    with pytest.raises(SystemExit, match="has seed=2, not 3: give another folder"):
        begin(tmp_path / "out", seed=3, files=[["a", 3]])
    with pytest.raises(SystemExit, match="has other files of prompts"):
        begin(tmp_path / "out", seed=2, files=[["a", 4]])


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(SystemExit, match=r"has files already, and no settings\.json"):
        begin(tmp_path, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_has_one_run_at_a_time_and_is_free_when_that_has_ended(tmp_path):
    for _ in range(2):
        with many.alone(LocalFileSystem(), str(tmp_path / "out")):
            begin(tmp_path / "out", seed=1)
            with (
                pytest.raises(SystemExit, match="out cannot be written: another process writes to it: wait until it"),
                many.alone(LocalFileSystem(), str(tmp_path / "out")),
            ):
                pytest.fail("two at once")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


def test_what_a_killed_run_left_is_no_file_of_another(tmp_path):
    begin(tmp_path, seed=1)
    for name in (".lock", "unfinished-77-part-00000-000000000000.jsonl"):
        (tmp_path / name).write_text("")
    assert begin(tmp_path, seed=1) == {}


@pytest.mark.parametrize(
    "odd",
    ['{"prompt": "a", "te', "5\n", "{}\n", '{"prompt": "a"}\n', "[]\n", "null\n", "[" * 100_000, "\xff\n"],
    ids=lambda odd: repr(odd[:15]),
)
def test_a_damaged_part_is_an_error_that_names_it(odd, tmp_path):
    begin(tmp_path, seed=1)
    (tmp_path / "part-00000-000000000000.jsonl").write_text(odd, "latin-1")
    with pytest.raises(SystemExit, match=r"part-00000-000000000000\.jsonl is damaged, delete it: "):
        begin(tmp_path, seed=1)


@pytest.mark.parametrize("odd", ["", "{", "[]", "5", "[" * 100_000, "\xff"], ids=lambda odd: repr(odd[:15]))
def test_damaged_settings_are_an_error_that_says_what_to_do(odd, tmp_path):
    (tmp_path / "settings.json").write_text(odd, "latin-1")
    (tmp_path / "part-00000-000000000000.jsonl").write_text('{"prompt": "a", "text": "b"}\n')
    with pytest.raises(SystemExit, match=r"settings\.json is damaged, give another folder: "):
        begin(tmp_path, seed=1)
    assert (tmp_path / "settings.json").read_text("latin-1") == odd


def test_a_folder_with_settings_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 12}')
    with pytest.raises(SystemExit, match=r"settings\.json is of no run: give another folder: it has other settings"):
        begin(tmp_path, seed=1)
    assert (tmp_path / "settings.json").read_text() == '{"editor.fontSize": 12}'


def test_a_run_ends_where_another_has_begun_with_other_settings(tmp_path):
    begin(tmp_path, seed=1)
    begin(tmp_path, seed=2)  # on another machine, say
    with pytest.raises(SystemExit, match="has seed=2, not 1: give another folder"):
        many.refuse_others(LocalFileSystem(), str(tmp_path), {"seed": 1})


# Mistakes


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["a"], "give files or folders of prompts, and last the folder for the answers"),
        (["a", "out", "--top_k=3"], "--top_k does nothing at a temperature of 0"),
        (["a", "out", "--batch_size=0"], "--batch_size must be a whole number, 1 or more, not 0"),
        (["a", "out", "--num_workers=x"], "--num_workers must be"),
        (["a", "out", "--num_gpus=1.5"], "--num_gpus must be"),
        (["a", "out", "--dtype=int8"], "no backend numpy with dtype int8: choose numpy with float32; jax"),
        (["a", "out", "--stop="], "--stop needs a value"),
        (["nowhere", "out"], "nowhere cannot be read: it is not there"),
        (["a", "a/out"], "a/out is within"),
        (["s3://b/a/", "s3://b/a"], "s3://b/a is within"),
        (["a", "ab", "--model_size=none"], "no model 'none'"),
        (["a", "out", "--model_size=none"], "no model 'none'"),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_line_before_ray_starts(args, said, models_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a").mkdir()
    monkeypatch.setattr(many, "silence_ray", lambda: pytest.fail("Ray starts"))
    monkeypatch.setattr("sys.argv", [SCRIPT, *args, f"--models_dir={models_dir}"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        many.cli.run(many.main)
    assert said in ended.value.code
    assert "\n" not in ended.value.code


def test_without_ray_one_line_says_what_to_install(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('no ray')")
    done = command("a", "out", script=SCRIPT, env={"PYTHONPATH": tmp_path})
    assert_one_line_error(done, "needs Ray Data: pip install -r requirements-ray.txt")


def test_a_cluster_that_is_not_there_is_an_error(tiny, tmp_path):
    done = command(tmp_path, "out", script=SCRIPT, model=tiny, env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert_one_line_error(done, "the Ray cluster at 127.0.0.1:1 cannot be reached")
