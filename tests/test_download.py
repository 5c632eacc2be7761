"""Downloads: from a server that misbehaves, with every kind of interruption, and by several processes at once."""

import fcntl
import functools
import hashlib
import itertools
import json
import os
import pty
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
import unittest.mock

import pytest
from flaky_server import serving

import download
import utils

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HPARAMS = {"n_vocab": 261, "n_ctx": 16, "n_embd": 32, "n_head": 2, "n_layer": 2}
N_BYTES = 4 * ((261 + 16 + 2) * 32 + 2 * (12 * 32 * 32 + 13 * 32))  # 137,344
RANGE = 4096  # 34 ranges
DATA = "model.ckpt.data-00000-of-00001"

# the command itself, where "124M" is the small model of these tests, and pauses are short
COMMAND = """
import json, runpy, sys
root, facts, timeout, *arguments = sys.argv[1:]
sys.path.insert(0, root)
import download, utils
for module in (download, utils):
    vars(module).update({name: fact for name, fact in json.loads(facts).items() if hasattr(module, name)})
download.fetch.__defaults__ = (8, 4096, float(timeout), 0.01)
sys.argv[:] = ["gpt2.py", *arguments]
runpy.run_path(root + "/gpt2.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def files():
    rng = random.Random(1)
    files = {name: rng.randbytes(1000 + 10 * i) for i, name in enumerate(utils.FILES)}
    return {**files, "hparams.json": json.dumps(HPARAMS).encode(), DATA: rng.randbytes(N_BYTES)}


@pytest.fixture
def facts(files):
    return {
        "MODEL_SIZES": {"124M": HPARAMS},
        "SHA256": {name: hashlib.sha256(files[name]).hexdigest() for name in ("encoder.json", "vocab.bpe")},
        "TOKENIZER_BYTES": {},
        "BYTES": {},
        "MD5": {"124M": hashlib.md5(files[DATA]).hexdigest()},  # noqa: S324
    }


@pytest.fixture
def server(files, facts, monkeypatch):
    for name, value in facts.items():
        for module in (download, utils):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    with serving(dict(files)) as server:
        monkeypatch.setenv("GPT2_BASE_URL", server.url)
        yield server


@pytest.fixture
def model_dir(tmp_path):
    return str(tmp_path / "models" / "124M")


def fetch(model_dir, **kwargs):
    options = {"range_bytes": RANGE, "timeout": 0.5, "pause": 0.005, **kwargs}
    with unittest.mock.patch("download.fetch", functools.partial(download.fetch, **options)):
        utils.fetch_model("124M", model_dir)


def contents(model_dir):
    folder = {}
    for name in set(os.listdir(model_dir)) - {".lock"}:
        with open(os.path.join(model_dir, name), "rb") as f:
            folder[name] = f.read()
    return folder


def start(server, facts, model_dir, timeout=5, **kwargs):
    command = [sys.executable, "-c", COMMAND, ROOT, json.dumps(facts), str(timeout)]
    command += ["Hi", "--models_dir", os.path.dirname(model_dir)]
    env = {**os.environ, "GPT2_BASE_URL": server.url}
    return subprocess.Popen(command, env=env, **{"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, **kwargs})


def finished_ranges(model_dir):
    try:
        with open(os.path.join(model_dir, DATA + ".part.ranges")) as f:
            return {f"bytes={start}-{stop - 1}" for start, stop, *_ in map(json.loads, f.read().split("\n")[1:])}
    except FileNotFoundError:
        return set()


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# what arrives


def test_every_file_arrives_as_the_server_has_it(server, files, model_dir):
    fetch(model_dir)
    assert contents(model_dir) == files


def test_a_large_file_arrives_in_ranges_over_several_connections(server, model_dir):
    server.seconds_per_block = 0.01
    fetch(model_dir)
    asked = server.asked(DATA)
    assert sorted(asked) == sorted(f"bytes={i}-{min(i + RANGE, N_BYTES) - 1}" for i in range(0, N_BYTES, RANGE))
    assert server.most_at_once == 8


def test_files_that_are_there_are_not_fetched(server, files, model_dir):
    os.makedirs(model_dir)
    with open(os.path.join(model_dir, "vocab.bpe"), "wb") as f:
        f.write(files["vocab.bpe"])
    fetch(model_dir)
    assert "vocab.bpe" not in {name for _, name, _ in server.log}
    assert contents(model_dir) == files


def test_a_server_without_ranges_gives_one_plain_stream(server, files, model_dir):
    server.ranges = False
    fetch(model_dir)
    assert contents(model_dir) == files
    assert server.asked(DATA) == [None]


def test_a_server_that_promises_ranges_and_ignores_them_gives_one_plain_stream(server, files, model_dir, capsys):
    server.always["*"] = {"ignore_range": True}
    fetch(model_dir)
    assert contents(model_dir) == files
    assert server.asked(DATA)[-1] is None
    assert "the server ignores ranges" in capsys.readouterr().err


def test_an_empty_file_is_a_file(server, files, model_dir):
    server.files["checkpoint"] = b""
    fetch(model_dir)
    assert contents(model_dir) == {**files, "checkpoint": b""}


# faults that pass

PASSING = {
    "drops before the first byte": {"drop": 0},
    "drops in the middle": {"drop": 500},
    "drops before the last byte": {"drop": 1029},
    "stalls": {"stall": 300},
    "500": {"status": 500},
    "502": {"status": 502},
    "503": {"status": 503},
    "429": {"status": 429, "headers": {"Retry-After": "0"}},
    "408": {"status": 408},
    "promises more than it sends": {"length": 5000},
}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["vocab.bpe", DATA])
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_outlived(server, files, model_dir, fault, name, ranges):
    server.ranges, server.stall_seconds = ranges, 1
    server.faults = {name: [PASSING[fault]] * (2 if ranges else 1)}
    fetch(model_dir)
    assert contents(model_dir) == files


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_head_request_that_fails_is_repeated(server, files, model_dir, status):
    server.head_faults = {DATA: [{"status": status}] * 3}
    fetch(model_dir)
    assert contents(model_dir) == files


def test_a_dropped_range_goes_on_where_it_stopped(server, files, model_dir):
    server.faults = {DATA: [{"drop": 60_000}]}
    fetch(model_dir, range_bytes=2**17)
    again = [asked for asked in server.asked(DATA) if not asked.startswith(("bytes=0-", "bytes=131072-"))]
    assert [re.fullmatch(r"bytes=(\d+)-131071", asked) is not None for asked in again] == [True]
    assert 40_000 < int(again[0][6:-7]) <= 60_000
    assert contents(model_dir) == files


def test_a_network_that_drops_every_connection_after_a_while_is_outlived(server, files, model_dir):
    server.always = {DATA: {"drop": 100_000}}
    fetch(model_dir, range_bytes=2**23)
    assert contents(model_dir) == files
    assert len(server.asked(DATA)) == 2


def test_retry_after_is_honoured(server, files, model_dir):
    server.faults = {"vocab.bpe": [{"status": 429, "headers": {"Retry-After": "1"}}]}
    begin = time.monotonic()
    fetch(model_dir)
    assert 1 <= time.monotonic() - begin < 5
    assert contents(model_dir) == files


def test_pauses_grow_and_differ_and_are_bounded():
    pauses = [[download.pause_before(n, 1) for _ in range(50)] for n in range(1, 6)]
    assert all(max(shorter) < min(longer) for shorter, longer in itertools.pairwise(pauses))
    assert all(len(set(some)) > 40 for some in pauses)
    assert 7 <= download.pause_before(1, 1, "7") <= 11
    assert download.pause_before(1, 1, "999999999") == 60
    assert download.pause_before(1, 1, "tomorrow") <= 1.5


# faults that do not pass


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_other_4xx_are_not_repeated(server, model_dir, method, status):
    server.head_faults = {DATA: [{"status": status}]} if method == "HEAD" else {}
    server.always = {DATA: {"status": status}} if method == "GET" else {}
    with pytest.raises(utils.ModelError, match=f"{DATA} from {server.url}/124M/{DATA}: HTTP {status};"):
        fetch(model_dir, n_connections=1)
    assert len(server.asked(DATA, method)) == 1


def test_the_message_names_file_url_cause_and_what_to_do(server, model_dir):
    server.always = {"vocab.bpe": {"status": 503}}
    with pytest.raises(utils.ModelError) as failure:
        fetch(model_dir)
    message = str(failure.value)
    assert f"vocab.bpe from {server.url}/124M/vocab.bpe: HTTP 503" in message
    assert "run it again" in message
    assert f"put vocab.bpe, model.ckpt.index, model.ckpt.meta, {DATA} into {model_dir} by hand" in message
    assert "shakespeare" not in message
    assert "\n" not in message
    assert len(server.asked("vocab.bpe")) == 6


def test_the_message_offers_the_bundled_model_where_there_is_one(server, model_dir):
    os.makedirs(os.path.join(os.path.dirname(model_dir), "shakespeare"))
    del server.files["checkpoint"]
    with pytest.raises(utils.ModelError, match="--model_size shakespeare"):
        fetch(model_dir)


def test_no_server_is_one_line(server, model_dir):
    server.server_close()
    with pytest.raises(utils.ModelError, match=r"checkpoint from http://127.0.0.1:\d+/124M/checkpoint: .*refused;"):
        fetch(model_dir)


def test_a_server_that_never_answers_is_one_line(server, model_dir):
    server.always, server.stall_seconds = {"vocab.bpe": {"stall": 0}}, 2
    with pytest.raises(utils.ModelError, match=r"vocab\.bpe.*timed out"):
        fetch(model_dir, timeout=0.05)


def test_failing_at_one_file_keeps_those_before_it(server, files, model_dir):
    server.always = {DATA: {"status": 404}}
    with pytest.raises(utils.ModelError, match="404"):
        fetch(model_dir)
    kept = contents(model_dir)
    assert {name: kept.get(name) for name in files} == {**files, DATA: None}


# what is wrong gets no final name


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", utils.FILES)
def test_a_flipped_byte_is_noticed_and_the_file_fetched_once_more(server, files, model_dir, name, ranges, capsys):
    server.ranges = ranges
    server.faults = {name: [{"flip": 20}]}
    fetch(model_dir, n_connections=1)
    assert contents(model_dir) == files
    message = capsys.readouterr().err
    assert message.startswith(f"{name} from {server.url}/124M/{name}: ")
    assert message.endswith(": fetching it once more\n")
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe", "hparams.json", DATA])
def test_what_stays_wrong_is_given_up_and_removed(server, model_dir, name):
    server.headers = {"Content-MD5": None}
    server.files[name] = b"{" + server.files[name][1:-1] + b" "
    if name == "hparams.json":
        server.files[name] = json.dumps({**HPARAMS, "n_head": 4}).encode()
    with pytest.raises(utils.ModelError, match=re.escape(f"{name} from ") + ".*OpenAI's"):
        fetch(model_dir)
    assert not {name, name + ".part", name + ".part.ranges"} & contents(model_dir).keys()


def test_a_wrong_content_md5_is_noticed(server, model_dir):
    server.always = {"model.ckpt.meta": {}}
    server.head_faults = {"model.ckpt.meta": [{"headers": {"Content-MD5": "AAAA"}}] * 2}
    with pytest.raises(utils.ModelError, match=r"model\.ckpt\.meta from .*MD5"):
        fetch(model_dir)
    assert not {"model.ckpt.meta", "model.ckpt.meta.part"} & contents(model_dir).keys()


def test_a_content_md5_is_not_needed(server, files, model_dir):
    server.head_faults = {name: [{"headers": {"Content-MD5": None}}] for name in files}
    fetch(model_dir)
    assert contents(model_dir) == files


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("difference", [-100, -1, 1, 100])
def test_a_head_that_lies_about_the_length_is_noticed(server, model_dir, difference, ranges):
    server.ranges = ranges
    length = len(server.files["vocab.bpe"]) + difference
    server.head_faults = {"vocab.bpe": [{"length": length}] * 2}
    with pytest.raises(utils.ModelError, match=r"vocab\.bpe from .*length"):
        fetch(model_dir)
    assert not {"vocab.bpe", "vocab.bpe.part"} & contents(model_dir).keys()


@pytest.mark.parametrize("length", [None, "-5", "many", "9" * 400])
def test_a_head_without_a_sensible_length_is_a_clear_error(server, model_dir, length):
    server.head_faults = {"vocab.bpe": [{"headers": {"Content-Length": length}}] * 9}
    with pytest.raises(utils.ModelError, match=r"vocab\.bpe from .*how long"):
        fetch(model_dir)


def test_a_data_file_of_the_wrong_size_is_not_even_begun(server, model_dir):
    server.files[DATA] = server.files[DATA][:-4]
    with pytest.raises(utils.ModelError, match=f"{DATA}: it has {N_BYTES - 4} bytes there"):
        fetch(model_dir)
    assert server.asked(DATA) == []


def test_more_bytes_than_asked_for_are_refused(server, model_dir):
    server.always = {"vocab.bpe": {"headers": {"Content-Range": "bytes 0-9/10"}}}
    with pytest.raises(utils.ModelError, match=r"vocab\.bpe from "):
        fetch(model_dir)
    assert "vocab.bpe" not in contents(model_dir)


# going on after an interruption


def test_a_second_call_fetches_only_what_is_missing(server, files, model_dir):
    server.faults = {DATA: [{}] * 10 + [{"status": 404}]}
    with pytest.raises(utils.ModelError, match="404"):
        fetch(model_dir, n_connections=1)
    assert len(finished_ranges(model_dir)) == 10
    server.log.clear()
    fetch(model_dir)
    assert sorted(server.asked(DATA)) == sorted(
        f"bytes={i}-{min(i + RANGE, N_BYTES) - 1}" for i in range(10 * RANGE, N_BYTES, RANGE)
    )
    assert contents(model_dir) == files


def interrupted(server, model_dir):
    server.faults = {DATA: [{}] * 10 + [{"status": 404}]}
    with pytest.raises(utils.ModelError):
        fetch(model_dir, n_connections=1)
    server.log.clear()
    return os.path.join(model_dir, DATA + ".part"), os.path.join(model_dir, DATA + ".part.ranges")


def test_a_file_that_changed_on_the_server_is_fetched_anew(server, files, facts, model_dir):
    interrupted(server, model_dir)
    server.etag = '"2"'
    server.files[DATA] = files[DATA][::-1]
    facts["MD5"]["124M"] = hashlib.md5(files[DATA][::-1]).hexdigest()  # noqa: S324
    fetch(model_dir)
    assert contents(model_dir)[DATA] == files[DATA][::-1]
    assert len(server.asked(DATA)) == 34


def test_a_file_that_changes_during_the_download_is_fetched_anew(server, files, model_dir, capsys):
    server.faults = {DATA: [{}] * 10 + [{"headers": {"ETag": '"2"'}}]}
    fetch(model_dir)
    assert contents(model_dir) == files
    assert "changes on the server" in capsys.readouterr().err


def test_another_source_goes_on_where_the_first_gave_up(server, files, model_dir):
    interrupted(server, model_dir)
    with serving(files) as mirror:
        mirror.etag = '"of the mirror"'
        os.environ["GPT2_BASE_URL"] = mirror.url
        fetch(model_dir)
        assert len(mirror.asked(DATA)) == 24
    assert contents(model_dir) == files


def test_a_record_that_is_damaged_never_spoils_the_file(server, files, model_dir):
    part, record = interrupted(server, model_dir)
    good, half = open(record, "rb").read(), open(part, "rb").read()  # noqa: SIM115
    rng = random.Random(2)
    for i in range(40):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        with open(record, "wb") as f:
            f.write(bad if i % 2 else good[: rng.randrange(len(good))])
        with open(part, "wb") as f:
            f.write(half)
        fetch(model_dir)
        assert contents(model_dir) == files
        os.remove(os.path.join(model_dir, DATA))


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"start": 0}',
        b"[]\n1\nnull",
        b"[[], {}, 1, 2, 3]",
        b'{"start": [], "stop": {}}',
    ],
)
def test_a_record_of_nonsense_counts_for_nothing(server, files, model_dir, record):
    _, path = interrupted(server, model_dir)
    with open(path, "wb") as f:
        f.write(record)
    fetch(model_dir)
    assert contents(model_dir) == files
    assert len(server.asked(DATA)) == 34


@pytest.mark.parametrize(
    "damage", [lambda f: f.truncate(9999), lambda f: f.write(b"other bytes"), lambda f: f.truncate(0)]
)
def test_a_part_that_is_damaged_is_fetched_again_where_it_is(server, files, model_dir, damage):
    part, _ = interrupted(server, model_dir)
    with open(part, "r+b") as f:
        damage(f)
    fetch(model_dir)
    assert contents(model_dir) == files


def test_kill_9_at_any_moment_loses_only_the_ranges_in_flight(server, files, facts, model_dir):
    server.seconds_per_block = 0.03
    rng, n_kills, done = random.Random(), 0, set()
    while not os.path.exists(os.path.join(model_dir, DATA)):
        process = start(server, facts, model_dir)
        wait_until(lambda process=process: server.asked(DATA) or process.poll() is not None)
        if n_kills < 8:
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
            n_kills += 1
        process.communicate()
        assert done.isdisjoint(server.asked(DATA))
        done = finished_ranges(model_dir)
        wait_until(lambda: server.n_at_once == 0)
        server.log.clear()
    assert n_kills > 2
    assert {name: data for name, data in contents(model_dir).items() if name in files} == files


def test_ctrl_c_ends_at_once_even_if_the_server_stalls(server, files, facts, model_dir):
    server.faults = {DATA: [{}] * 12 + [{"stall": 2000}] * 99}
    process = start(server, facts, model_dir, timeout=60)
    wait_until(lambda: len(finished_ranges(model_dir)) == 12)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert time.monotonic() - begin < 3
    assert process.returncode == 130
    assert (stdout, stderr) == (b"", b"")
    server.log.clear()
    server.faults = {}
    fetch(model_dir)
    assert len(server.asked(DATA)) == 34 - 12
    assert contents(model_dir) == files


# several processes


def test_of_two_processes_one_downloads_and_the_other_waits(server, files, facts, model_dir):
    server.seconds_per_block = 0.5
    first = start(server, facts, model_dir)
    wait_until(lambda: server.log)
    second = start(server, facts, model_dir)
    assert b"waiting for another process" in second.stderr.readline()
    server.seconds_per_block = 0
    assert b"waiting" not in first.communicate()[1]
    second.communicate()
    assert {name: data for name, data in contents(model_dir).items() if name in files} == files
    assert len(server.asked(DATA)) == len(set(server.asked(DATA))) == 34


def test_processes_that_start_together_fetch_everything_once(server, files, facts, model_dir):
    for process in [start(server, facts, model_dir) for _ in range(3)]:
        process.communicate()
    assert {name: data for name, data in contents(model_dir).items() if name in files} == files
    assert len(server.asked(DATA)) == len(set(server.asked(DATA))) == 34


def test_one_that_waits_goes_on_when_the_other_is_killed(server, files, facts, model_dir):
    server.seconds_per_block = 0.5
    first = start(server, facts, model_dir)
    wait_until(lambda: server.asked(DATA))
    second = start(server, facts, model_dir)
    assert b"waiting for another process" in second.stderr.readline()
    first.kill()
    first.communicate()
    server.seconds_per_block = 0
    second.communicate()
    assert {name: data for name, data in contents(model_dir).items() if name in files} == files


def test_a_lock_that_is_free_is_taken_at_once(model_dir, capsys):
    os.makedirs(model_dir)
    with download.locked(model_dir):
        pass
    with open(os.path.join(model_dir, ".lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert capsys.readouterr().err == ""


# where from


def test_the_mirror_is_tried_after_the_first_source(server, files, model_dir, monkeypatch, capsys):
    monkeypatch.delenv("GPT2_BASE_URL")
    with serving({}) as broken:
        monkeypatch.setattr(utils, "SOURCES", (broken.url, server.url))
        fetch(model_dir)
    assert contents(model_dir) == files
    message = f"checkpoint from {broken.url}/124M/checkpoint: HTTP 404: trying another source\n"
    assert capsys.readouterr().err == message


def test_the_sources_are_openais_and_the_mirror():
    assert utils.SOURCES == (
        "https://openaipublic.blob.core.windows.net/gpt-2/models",
        "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
    )


def test_when_all_sources_fail_each_is_named(server, model_dir, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL")
    del server.files["checkpoint"]
    with serving({}) as other:
        monkeypatch.setattr(utils, "SOURCES", (other.url, server.url))
        with pytest.raises(
            utils.ModelError, match=f"{other.url}/124M/checkpoint: HTTP 404; nor checkpoint from {server.url}"
        ):
            fetch(model_dir)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com", "http://127.0.0.1.example.com", "http://127.0.0.1@example.com", "ftp://127.0.0.1",
        "file:///etc", "http://[::1", "https://", "/models", "x", "http://example.com\\@127.0.0.1", "http://10.0.0.1",
        "http://127.0.0.1:99999999",
    ],
)  # fmt: skip
def test_only_https_or_this_machine(model_dir, monkeypatch, url):
    monkeypatch.setenv("GPT2_BASE_URL", url)
    with pytest.raises(utils.ModelError, match=r"checkpoint from .*(is refused|is no URL|port)"):
        fetch(model_dir)


@pytest.mark.parametrize(
    "url", ["https://example.com/x", "http://localhost:1/x", "http://127.8.9.1/x", "http://[::1]:8/x"]
)
def test_https_anywhere_and_http_on_this_machine_are_allowed(url):
    assert download.check_url(url) == (not url.startswith("https"))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server, files, model_dir, status):
    with serving({}) as front:
        for name in files:
            redirect = {"status": status, "headers": {"Location": f"{server.url}/124M/{name}"}}
            front.always[name], front.head_faults[name] = redirect, [redirect]
        os.environ["GPT2_BASE_URL"] = front.url
        fetch(model_dir)
    assert contents(model_dir) == files


@pytest.mark.parametrize(
    "location", ["http://example.com/x", "file:///etc/passwd", "//example.com/x", "ftp://127.0.0.1/x"]
)
def test_a_redirect_to_where_files_may_not_come_from_is_refused(server, model_dir, location):
    server.head_faults = {"checkpoint": [{"status": 302, "headers": {"Location": location}}]}
    with pytest.raises(utils.ModelError, match="is refused"):
        fetch(model_dir)


def test_redirects_in_a_circle_end(server, model_dir):
    server.head_faults = {"checkpoint": [{"status": 302, "headers": {"Location": "/124M/checkpoint"}}] * 99}
    with pytest.raises(utils.ModelError, match="too many redirects"):
        fetch(model_dir)


def test_proxies_are_not_asked_for_this_machine(server, files, model_dir, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    fetch(model_dir)
    assert contents(model_dir) == files


# the disk


def test_a_full_disk_is_noticed_before_the_download(server, model_dir, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("usage", (), {"free": 100_000}))
    with pytest.raises(utils.ModelError, match="100,000 free"):
        fetch(model_dir)
    assert server.asked(DATA) == []


def test_only_the_bytes_still_to_come_need_room(server, files, model_dir, monkeypatch):
    interrupted(server, model_dir)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("usage", (), {"free": 100_000}))
    fetch(model_dir)
    assert contents(model_dir) == files


def test_a_disk_that_fills_up_is_one_line(server, facts, model_dir):
    limit = (100_000, 100_000)
    process = start(server, facts, model_dir, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    stderr = process.communicate()[1]
    assert process.returncode == 1
    assert re.fullmatch(rb"gpt2.py: 124M cannot be stored in \S+: \[Errno \d+\] .*\n", stderr)


def test_a_folder_that_cannot_be_made_is_one_line(server, tmp_path):
    (tmp_path / "models").write_text("a file")
    with pytest.raises(utils.ModelError, match="cannot be stored in"):
        fetch(str(tmp_path / "models" / "124M"))


# what is shown


def on_a_terminal(server, facts, model_dir, until):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    process = start(server, facts, model_dir, stderr=theirs)
    os.close(theirs)
    wait_until(until)
    shown = os.read(ours, 2**16).decode()
    process.kill()
    process.communicate()
    os.close(ours)
    return shown


def test_one_bar_shows_the_whole_model_and_goes_on_where_it_was(server, files, facts, model_dir):
    total = f"{sum(map(len, files.values())) / 1000:.0f}k"
    server.seconds_per_block = 0.1
    shown = on_a_terminal(server, facts, model_dir, lambda: len(finished_ranges(model_dir)) >= 16)
    assert re.search(rf"\d+%.*/{total} \[\d\d:\d\d<\d\d:\d\d, *[\d.]+kB/s\]", shown)
    n_done = 16 * RANGE / 1000
    server.log.clear()
    shown = on_a_terminal(server, facts, model_dir, lambda: server.asked(DATA))
    first = re.search(rf"\| *([\d.]+)k/{total}", shown)
    assert float(first[1]) >= n_done


def test_nothing_is_shown_unless_on_a_terminal(server, model_dir, capsys):
    fetch(model_dir)
    assert capsys.readouterr().err == ""
