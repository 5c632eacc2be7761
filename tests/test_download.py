"""Downloads: from a server that misbehaves, with every kind of interruption, and by several processes at once."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import threading
import time
import types

import conftest
import pytest
from conftest import TIMEOUT, command, fifo, hold_for_a_moment, interrupt, needs_posix, wait_until
from flaky_server import PROBE, serving

from files import download, lock, web

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N_BYTES = 137_344  # of the large file
RANGE = 4096  # 34 ranges
RANGES = [f"bytes={i}-{min(i + RANGE, N_BYTES) - 1}" for i in range(0, N_BYTES, RANGE)]
GOES_ON = "if interrupted, the next run goes on from there"
RNG = random.Random(1)
ALL_PROXY = "all_proxy" if os.name == "nt" else "ALL_PROXY"  # Windows finds a variable by either, and the first is said
FILES = {"first": RNG.randbytes(1000), "second": RNG.randbytes(1010), "third": RNG.randbytes(1020)}
FILES["large"] = RNG.randbytes(N_BYTES)
SIZES = {"first": 1000, "second": 1010, "third": None, "large": N_BYTES}
SUMS = {name: hashlib.sha256(FILES[name]).hexdigest() for name in ("second", "large")}

# download.fetch in a process of its own; its arguments are in JSON, the check is for these SHA-256
SCRIPT = f"""
import hashlib, json, sys
sys.path.insert(0, {ROOT!r})
from files import download

def check(name, path):
    with open(path, "rb") as f:
        return None if hashlib.sha256(f.read()).hexdigest() == {SUMS}.get(name) or name not in {SUMS} else "wrong"

try:
    download.fetch(check=check, **json.loads(sys.argv[1]))
except download.DownloadError as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def server():
    with serving(dict(FILES)) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "models" / "tiny")


def check(name, path):
    with open(path, "rb") as f:
        digest = hashlib.sha256(f.read()).hexdigest()
    return "not what was published" if SUMS.get(name, digest) != digest else None


def fetch(sources, folder, files=SIZES, check=check, **tuning):
    sources = sources if isinstance(sources, list) else [getattr(sources, "url", sources)]
    tuning = {"request_bytes": RANGE, "timeout": 60, "pause": 0.005, **tuning}
    download.fetch(files, folder, sources, check, "tiny", **tuning)


def failure(*args, **kwargs):
    """What fetch fails with, which is one line."""
    with pytest.raises(download.DownloadError) as error:
        fetch(*args, **kwargs)
    assert str(error.value).isprintable()
    return str(error.value)


def contents(folder):
    found = {}
    for name in set(os.listdir(folder) if os.path.isdir(folder) else ()) - {".lock"}:
        with open(os.path.join(folder, name), "rb") as f:
            found[name] = f.read()
    return found


def files_in(folder):
    return {name: data for name, data in contents(folder).items() if name in FILES}


def start(server, folder, begin=conftest.start, **kwargs):
    """Begins a download in another process."""
    arguments = {"files": SIZES, "folder": folder, "sources": [server.url], "title": "tiny"}
    arguments |= {"request_bytes": RANGE, "timeout": 60, "pause": 0.01, **kwargs.pop("tuning", {})}
    return begin(json.dumps(arguments), code=SCRIPT, **kwargs)


def held(folder):
    """The ranges of the large file that are there for good."""
    ranges = []
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "large.part.ranges")) as f:
        for line in f:
            with contextlib.suppress(ValueError):  # an empty line, or one that is just being written
                ranges.append(tuple(json.loads(line)[:2]))
    return ranges


def n_held(folder):
    return sum(stop - start for start, stop in held(folder))


# what arrives


def test_every_file_arrives_as_the_server_has_it(server, folder):
    fetch(server, folder)
    assert contents(folder) == FILES


def test_a_large_file_arrives_in_ranges_over_several_connections(server, folder):
    server.seconds_per_block = 0.1  # in which even a slow machine asks for all that it asks for at once
    fetch(server, folder)
    assert sorted(server.asked("large")) == sorted(RANGES)
    assert server.most_at_once == 8


def test_files_that_are_there_are_not_fetched(server, folder):
    os.makedirs(folder)
    with open(os.path.join(folder, "second"), "wb") as f:
        f.write(FILES["second"])
    fetch(server, folder)
    assert "second" not in {name for _, name, _ in server.log}
    assert contents(folder) == FILES


def test_a_server_without_ranges_gives_one_plain_stream(server, folder):
    server.ranges = False
    fetch(server, folder)
    assert contents(folder) == FILES
    assert server.asked("large") == [None]


def test_a_server_that_ignores_a_range_at_times_is_asked_again(server, folder):
    server.faults = {"large": [{"ignore_range": True}] * 3}
    fetch(server, folder)
    assert contents(folder) == FILES


def test_an_empty_file_is_a_file(server, folder):
    server.files["first"] = b""
    fetch(server, folder, {**SIZES, "first": None})
    assert contents(folder) == {**FILES, "first": b""}


@pytest.mark.parametrize("head", [{"status": 405}, {"status": 404}, {"status": 503}, {"headers": {"ETag": None}}])
def test_head_requests_need_not_be_answered(server, folder, head):
    server.head = head
    fetch(server, folder)
    assert contents(folder) == FILES


@pytest.mark.parametrize("etags", [('"1"', 'W/"1"'), ('"1"', None), (None, '"1"'), (None,)])
def test_an_etag_that_is_weak_or_absent_at_times_is_no_change(server, folder, etags, capsys):
    server.etags = itertools.cycle(etags)
    fetch(server, folder)
    assert contents(folder) == FILES
    assert "once more" not in capsys.readouterr().err


# faults that pass

PASSING = {
    "drops before the first byte": {"drop": 0},
    "drops in the middle": {"drop": 500},
    "drops before the last byte": {"drop": 1009},
    "stalls": {"stall": 300},
    "500": {"status": 500},
    "502": {"status": 502},
    "503": {"status": 503},
    "429": {"status": 429, "headers": {"Retry-After": "0"}},
    "408": {"status": 408},
    "promises more than it sends": {"length": 5000},
    "sends another range": {"headers": {"Content-Range": "bytes 5-9/10"}},
    "sends a byte now and then": {"drip": 0.02},
    "never ends its headers": {"trickle": 0.02},
}


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["second", "large"])
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_outlived(server, folder, fault, name, ranges):
    server.ranges, server.stall_seconds = ranges, 1
    server.faults = {name: [PASSING[fault]] * (2 if ranges else 1)}
    fetch(server, folder, timeout=0.25, floor_after=0.2)
    assert contents(folder) == FILES


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_probe_that_fails_is_repeated(server, folder, status):
    server.probe_faults = {"large": [{"status": status}] * 3}
    fetch(server, folder)
    assert contents(folder) == FILES


def test_a_dropped_range_goes_on_where_it_stopped(server, folder):
    server.faults = {"large": [{"drop": 60_000}]}
    fetch(server, folder, request_bytes=2**17, n_connections=1)
    again = [asked for asked in server.asked("large") if not asked.startswith(("bytes=0-", "bytes=131072-"))]
    assert [re.fullmatch(r"bytes=(\d+)-131071", asked) is not None for asked in again] == [True]
    assert 40_000 < int(again[0][6:-7]) <= 60_000
    assert contents(folder) == FILES


def test_a_network_that_drops_every_connection_after_a_while_is_outlived(server, folder):
    server.always = {"large": {"drop": 100_000}}
    fetch(server, folder, request_bytes=2**23)
    assert contents(folder) == FILES
    assert len(server.asked("large")) == 2


def test_retry_after_is_honoured(server, folder):
    server.faults = {"second": [{"status": 429, "headers": {"Retry-After": "1"}}]}
    begin = time.monotonic()
    fetch(server, folder)
    assert time.monotonic() - begin >= 1
    assert contents(folder) == FILES


def test_pauses_grow_and_differ_and_are_bounded():
    pauses = [[download.pause_before(n, 1) for _ in range(50)] for n in range(1, 6)]
    assert all(max(shorter) < min(longer) for shorter, longer in itertools.pairwise(pauses))
    assert all(len(set(some)) > 40 for some in pauses)
    assert 7 <= download.pause_before(1, 1, "7") <= 11
    assert download.pause_before(1, 1, "999999999") == 60
    assert download.pause_before(1, 1, "tomorrow") <= 1.5


# faults that do not pass


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416])
@pytest.mark.parametrize("probe", [True, False])
def test_other_4xx_are_not_repeated(server, folder, probe, status):
    server.probe_faults = {"large": [{"status": status}]} if probe else {}
    server.always = {} if probe else {"large": {"status": status}}
    assert failure(server, folder, n_connections=1).endswith(f"large from {server.url}/large: HTTP {status}")
    assert server.log.count(("GET", "large", PROBE)) == 1
    assert len(server.asked("large")) == (not probe)


def test_the_message_names_file_url_and_cause(server, folder):
    server.always = {"second": {"status": 503}}
    assert failure(server, folder) == f"could not download second from {server.url}/second: HTTP 503"
    assert len(server.asked("second")) == 6


def test_no_server_is_one_line(server, folder):
    server.server_close()
    assert re.fullmatch(
        r"could not download first from http://127.0.0.1:\d+/first: [^[]*refused", failure(server, folder)
    )


def test_a_machine_that_is_offline_waits_less_than_five_seconds_in_all(folder, monkeypatch):
    waits, pause_before = [], download.pause_before
    monkeypatch.setattr(download, "pause_before", lambda *args: waits.append(pause_before(*args)) or 0)
    with socket.socket() as deaf:  # a port that refuses: bound, and nobody listens
        deaf.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        error = failure([f"{url}/a", f"{url}/b"], folder, pause=download.Tuning().pause)
    assert re.fullmatch(
        f"could not download first from {url}/a/first: .*refused; nor first from {url}/b/.*refused", error
    )
    assert len(waits) == 4
    assert sum(waits) < 5


def test_a_server_that_never_answers_is_one_line(server, folder):
    server.always, server.stall_seconds = {"second": {"stall": 0}}, 2
    assert re.search("second.*timed out", failure(server, folder, timeout=0.05))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_below_the_floor_is_given_up(server, folder, ranges):
    server.ranges, server.always = ranges, {"large": {"drip": 0.01}}
    assert re.search(r"large.*: \d+ bytes in \d+ s are too few", failure(server, folder, floor_after=0.05))


class Dripping:
    """A response that brings so many bytes in every second of a clock of its own."""

    def __init__(self, rate):
        self.raw, self.rate, self.now = self, rate, 0.0

    def monotonic(self):
        return self.now

    def read(self, n_most):
        self.now += 1
        return bytes(min(self.rate, n_most))

    read1 = read


def test_the_floor_is_a_number_of_bytes_a_second(monkeypatch):
    enough, too_few = Dripping(1001), Dripping(999)
    monkeypatch.setattr(web, "time", enough)
    assert sum(map(len, web.blocks(enough, 100_000, floor=1000, floor_after=30))) == 100_000
    monkeypatch.setattr(web, "time", too_few)
    with pytest.raises(web.PassingError, match="29970 bytes in 30 s are too few"):
        list(web.blocks(too_few, 100_000, floor=1000, floor_after=30))


def test_a_download_that_gets_nowhere_is_given_up(server, folder):
    server.always = {"large": {"stall": 2000}}
    assert re.search("large.*nothing has come", failure(server, folder, quiet=0.1, patience=0.3))


def test_a_stream_that_begins_again_and_again_is_given_up(server, folder):
    server.ranges, server.faults = False, {"large": [{"drop": 1000}, {"drop": 100_000}] * 20}
    assert re.search("large.*(expected|missing)", failure(server, folder))
    assert len(server.asked("large")) == 7


def test_headers_that_never_end_are_given_up(server, folder):
    server.probe_faults = {"first": [{"trickle": 0.05}] * 4}
    assert re.search("first.*no answer", failure(server, folder, timeout=0.15))


def test_failing_at_one_file_keeps_those_before_it(server, folder):
    server.always = {"large": {"status": 404}}
    assert "404" in failure(server, folder)
    assert files_in(folder) == {name: data for name, data in FILES.items() if name != "large"}


# what is wrong gets no final name


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_noticed_and_the_file_fetched_once_more(server, folder, name, ranges, capsys):
    server.ranges = ranges
    server.faults = {name: [{"flip": 20}]}
    fetch(server, folder, n_connections=1)
    assert contents(folder) == FILES
    message = capsys.readouterr().err.splitlines()[1:]
    assert re.fullmatch(f"{name} from {server.url}/{name}: .*: fetching it once more", *message)


def test_what_stays_wrong_is_given_up_and_removed(server, folder):
    server.headers = {"Content-MD5": None}
    server.files["second"] = FILES["second"][::-1]
    assert failure(server, folder).endswith(": not what was published")
    assert not {"second", "second.part", "second.part.ranges"} & contents(folder).keys()


def test_the_check_sees_every_file_before_it_gets_its_name(server, folder):
    seen = []

    def check(name, path):
        assert not os.path.exists(os.path.join(folder, name))
        with open(path, "rb") as f:
            seen.append((name, f.read()))

    fetch(server, folder, check=check)
    assert seen == list(FILES.items())


def test_a_wrong_content_md5_is_noticed(server, folder):
    server.head = {"headers": {"Content-MD5": "AAAA"}}
    assert re.search("first from .*MD5", failure(server, folder))
    assert not {"first", "first.part"} & contents(folder).keys()


def test_a_content_md5_is_not_needed(server, folder):
    server.headers = {"Content-MD5": None}
    fetch(server, folder)
    assert contents(folder) == FILES


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("difference", [-100, -1, 1, 100])
def test_a_server_that_lies_about_the_length_is_noticed(server, folder, difference, ranges):
    server.ranges = ranges
    n_bytes = len(FILES["third"]) + difference
    headers = {"Content-Range": f"bytes 0-0/{n_bytes}"} if ranges else {"Content-Length": n_bytes}
    server.probe_faults = {"third": [{"headers": headers}] * 2}
    assert re.search(r"third from .*length", failure(server, folder))
    assert "third" not in contents(folder)


@pytest.mark.parametrize("length", [None, "-5", "many", "9" * 400])
@pytest.mark.parametrize("header", ["Content-Length", "Content-Range"])
def test_an_answer_without_a_sensible_length_is_a_clear_error(server, folder, header, length):
    server.ranges = header == "Content-Range"
    length = f"bytes 0-0/{length}" if server.ranges and length else length
    server.probe_faults = {"second": [{"headers": {header: length}}]}
    assert re.search(r"second from .*how long", failure(server, folder))


@pytest.mark.parametrize("difference", [-4, 4])
@pytest.mark.parametrize("name", ["first", "large"])
def test_a_file_of_the_wrong_size_is_an_error_before_anything_is_fetched(server, folder, name, difference):
    server.files[name] += b"more"
    message = failure(server, folder, {**SIZES, name: SIZES[name] + 4 + difference})
    assert f"{name} from {server.url}/{name}: it has {SIZES[name] + 4} bytes there" in message
    assert all(server.asked(name) == [] for name in FILES)


def test_a_file_of_unknown_size_may_not_be_large(server, folder):
    assert "it has 137344 bytes there" in failure(server, folder, {"large": None}, largest=100_000)
    assert server.asked("large") == []


def test_a_compressed_answer_is_refused(server, folder):
    server.headers = {"Content-Encoding": "gzip"}
    assert "'gzip'" in failure(server, folder)


# going on after an interruption


def interrupted(server, folder):
    server.faults = {"large": [{}] * 10 + [{"status": 404}]}
    failure(server, folder, n_connections=1)
    server.log.clear()
    return os.path.join(folder, "large.part"), os.path.join(folder, "large.part.ranges")


def test_a_second_call_fetches_only_what_is_missing(server, folder):
    interrupted(server, folder)
    assert n_held(folder) == 10 * RANGE
    fetch(server, folder)
    assert sorted(server.asked("large")) == sorted(RANGES[10:])
    assert contents(folder) == FILES


def test_a_file_that_changed_on_the_server_is_fetched_anew(server, folder):
    interrupted(server, folder)
    server.etags = itertools.repeat('"2"')
    server.files["large"] = FILES["large"][::-1]
    fetch(server, folder, check=lambda name, path: None)
    assert contents(folder)["large"] == FILES["large"][::-1]
    assert len(server.asked("large")) == 34


def test_a_file_that_changes_during_the_download_is_fetched_anew(server, folder, capsys):
    server.faults = {"large": [{}] * 10 + [{"headers": {"ETag": '"2"'}}]}
    fetch(server, folder)
    assert contents(folder) == FILES
    assert "changes on the server" in capsys.readouterr().err


def test_an_odd_answer_costs_nothing_of_what_is_there(server, folder):
    interrupted(server, folder)
    server.faults = {"large": [{"headers": {"ETag": '"of a stranger"'}}]}
    fetch(server, folder, n_connections=1)
    assert contents(folder) == FILES
    assert server.asked("large") == [RANGES[10], *RANGES[10:]]


def test_another_source_goes_on_where_the_first_gave_up(server, folder):
    interrupted(server, folder)
    with serving(FILES) as mirror:
        mirror.etags = itertools.repeat('"of the mirror"')
        fetch(mirror, folder)
        assert len(mirror.asked("large")) == 24
    assert contents(folder) == FILES


def test_a_record_that_is_damaged_never_spoils_the_file(server, folder):
    part, record = interrupted(server, folder)
    good, half = (pathlib.Path(path).read_bytes() for path in (record, part))
    rng = random.Random(2)
    for i in range(30):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        with open(record, "wb") as f:
            f.write(bad if i % 2 else good[: rng.randrange(len(good))])
        with open(part, "wb") as f:
            f.write(half)
        fetch(server, folder)
        assert contents(folder) == FILES
        os.remove(os.path.join(folder, "large"))


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
        b'[0, 1e9, "", "", ""]\n[NaN, 4, "", "", ""]\n[0.0, 4.0, "", "", ""]\n[-4, 4, "", "", ""]',
        b'[0, 999999999999999999999, "", "", ""]\n[1, 0, "", "", ""]',
    ],
)
def test_a_record_of_nonsense_counts_for_nothing(server, folder, record):
    _, path = interrupted(server, folder)
    with open(path, "wb") as f:
        f.write(record)
    fetch(server, folder)
    assert contents(folder) == FILES
    assert len(server.asked("large")) == 34


@pytest.mark.parametrize(
    "damage", [lambda f: f.truncate(9999), lambda f: f.write(b"other bytes"), lambda f: f.truncate(0)]
)
def test_a_part_that_is_damaged_is_fetched_again_where_it_is(server, folder, damage):
    part, _ = interrupted(server, folder)
    with open(part, "r+b") as f:
        damage(f)
    fetch(server, folder)
    assert contents(folder) == FILES


@pytest.mark.parametrize("how", [subprocess.Popen.kill, interrupt])
@pytest.mark.parametrize(("n_bytes", "at_risk", "save_after"), [(60_000, 0, 0), (3_000_000, 2**18 + 2**16, 1000)])
def test_what_came_before_an_interruption_counts(server, folder, how, n_bytes, at_risk, save_after):
    """Not whole ranges alone: all that a connection brought in time, and at any rate all but a quarter of a MiB."""
    server.files["large"] = FILES["large"] * 30
    server.always = {"large": {"stall": n_bytes}}
    n_bytes -= n_bytes % 1024  # of which the server sends whole blocks
    tuning = {"request_bytes": 2**23, "save_after": save_after, "n_connections": 1}
    process = start(server, folder, tuning={**tuning, "files": {"large": 30 * N_BYTES}})
    wait_until(lambda: n_held(folder) > n_bytes - at_risk - 20_000)
    time.sleep(0.2)
    how(process)
    process.communicate()
    n_kept = n_bytes - at_risk
    server.always, server.log = {}, []
    fetch(server, folder, {"large": 30 * N_BYTES}, check=lambda name, path: None, request_bytes=2**23)
    assert len(server.asked("large")) == 1
    assert n_kept <= int(re.match(r"bytes=(\d+)-", server.asked("large")[0])[1]) <= n_bytes
    assert contents(folder) == {"large": server.files["large"]}


def test_kill_9_at_any_moment_moves_forward(server, folder):
    server.seconds_per_block = 0.03
    rng, n_kills, before = random.Random(), 0, 0
    while not os.path.exists(os.path.join(folder, "large")):
        process = start(server, folder, tuning={"save_after": 0})
        wait_until(lambda process=process: server.asked("large") or process.poll() is not None)
        if n_kills < 8:
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
            n_kills += 1
        process.communicate()
        assert len(set(held(folder))) == len(held(folder))  # nothing twice
        assert n_held(folder) >= before or os.path.exists(os.path.join(folder, "large"))
        before = n_held(folder)
        wait_until(lambda: server.n_at_once == 0)
        server.log.clear()
    assert n_kills > 2
    assert contents(folder) == FILES


def test_ctrl_c_ends_at_once_even_if_the_server_stalls(server, folder):
    server.faults = {"large": [{}] * 12 + [{"stall": 2000}] * 99}
    process = start(server, folder, tuning={"timeout": 600})
    wait_until(lambda: n_held(folder) >= 12 * RANGE)
    interrupt(process)
    process.communicate(timeout=60)  # the server would take 30 s, the timeout is 600
    assert process.returncode == 130
    server.faults = {}
    fetch(server, folder)
    assert contents(folder) == FILES


# several processes


def test_of_two_processes_one_downloads_and_the_other_waits(server, folder):
    server.seconds_per_block = 0.5
    first = start(server, folder)
    wait_until(lambda: server.log)
    second = start(server, folder)
    assert b"waiting for another process" in second.stderr.readline()
    server.seconds_per_block = 0
    assert b"waiting" not in first.communicate()[1]
    assert second.communicate()[1] == b""
    assert files_in(folder) == FILES
    assert sorted(server.asked("large")) == sorted(RANGES)


def test_processes_that_lock_a_folder_over_and_over_and_leave_it_empty_do_not_trip_over_each_other(tmp_path):
    code = """if True:
        import sys
        from files.lock import locked
        for _ in range(500):
            with locked(sys.argv[1]):
                pass"""
    processes = [conftest.start(tmp_path / "folder", code=code, cwd=conftest.REPO) for _ in range(3)]
    assert [(process.communicate(timeout=TIMEOUT)[1].count(b"Error"), process.returncode) for process in processes] == [
        (0, 0)
    ] * 3


@pytest.mark.skipif(os.name == "nt", reason="POSIX's locks")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_folder_on_a_file_system_without_locks_is_filled_all_the_same(number, server, folder, monkeypatch):
    import fcntl

    def flock(*_):
        raise OSError(number, "as the system says it")

    monkeypatch.setattr(fcntl, "flock", flock)
    fetch(server, folder)
    assert contents(folder) == FILES


def test_processes_that_start_together_fetch_everything_once(server, folder):
    for process in [start(server, folder) for _ in range(3)]:
        process.communicate()
    assert files_in(folder) == FILES
    assert sorted(server.asked("large")) == sorted(RANGES)


def test_one_that_waits_goes_on_when_the_other_is_killed(server, folder):
    server.always = {"large": {"stall": 0}}
    first = start(server, folder)
    wait_until(lambda: server.asked("large"))
    second = start(server, folder)
    assert b"waiting for another process" in second.stderr.readline()
    first.kill()
    first.communicate()
    server.always = {}
    second.communicate()
    assert files_in(folder) == FILES


def test_a_lock_that_is_free_is_taken_at_once(folder, capsys):
    os.makedirs(folder)
    with open(os.path.join(folder, ".lock"), "w") as f:  # which a process that was killed has left
        assert lock.try_lock(f)
    with download.locked(folder):
        open(os.path.join(folder, "first"), "w").close()
    assert os.listdir(folder) == ["first"]
    with download.locked(folder):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [".lock", "first.part", "first.part.ranges"])
def test_a_fifo_in_the_way_is_one_line_and_does_not_hang(server, folder, name):
    os.makedirs(folder)
    fifo(os.path.join(folder, name))
    assert f"tiny cannot be stored in {folder}: {folder}/{name} is no file" in failure(server, folder)


# where from


def test_another_source_is_tried_after_the_first(server, folder, capsys):
    with serving({}) as broken:
        fetch([broken.url, server.url], folder)
    assert contents(folder) == FILES
    assert f"first from {broken.url}/first: HTTP 404: trying another source\n" in capsys.readouterr().err


def test_when_all_sources_fail_each_is_named(server, folder):
    del server.files["first"]
    with serving({}) as other:
        message = (
            f"could not download first from {other.url}/first: HTTP 404; nor first from {server.url}/first: HTTP 404"
        )
        assert failure([other.url, server.url], folder) == message


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com", "http://127.0.0.1.example.com", "http://127.0.0.1@example.com", "ftp://127.0.0.1",
        "file:///etc", "http://[::1", "https://", "/models", "x", "http://example.com\\@127.0.0.1", "http://10.0.0.1",
        "http://127.0.0.1:99999999", "https://a..b", f"https://{'a' * 64}.example", "//[", "https://\xbd.example",
        "https://.", "https://a\nb", "https://\udc80",
    ],
)  # fmt: skip
def test_bad_urls_are_one_line_and_not_tried_again(folder, url):
    message = failure(url, folder, pause=60)
    assert re.search(r"first from .*(is refused|is no URL|port|label)", message)


@pytest.mark.parametrize(
    "url", ["https://example.com/x", "http://localhost:1/x", "http://127.8.9.1/x", "http://[::1]:8/x"]
)
def test_https_anywhere_and_http_on_this_machine_are_allowed(url):
    assert web.check_url(url) == (not url.startswith("https"))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server, folder, status):
    with serving({}) as front:
        for name in FILES:
            redirect = {"status": status, "headers": {"Location": f"{server.url}/{name}"}}
            front.always[name], front.probe_faults[name] = redirect, [redirect]
        fetch(front, folder)
    assert contents(folder) == FILES


@pytest.mark.parametrize(
    "location",
    [
        "http://example.com/x", "file:///etc/passwd", "//example.com/x", "ftp://127.0.0.1/x", "http://[bad", "//[",
        "/\xbd", "https://a..b", f"https://{'a' * 64}.example/x", "//127.0.0.1:x", "",
    ],
)  # fmt: skip
def test_a_redirect_to_where_files_may_not_come_from_is_one_line(server, folder, location):
    server.probe_faults = {"first": [{"status": 302, "headers": {"Location": location}}] * 9}
    message = failure(server, folder, pause=60)
    assert re.search(r"first from .*(is refused|Invalid|not appear|label|port|redirects)", message)


def test_redirects_in_a_circle_end(server, folder):
    server.probe_faults = {"first": [{"status": 302, "headers": {"Location": "/first"}}] * 99}
    assert "too many redirects" in failure(server, folder)


def test_proxies_are_not_asked_for_this_machine(server, folder, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    fetch(server, folder)
    assert contents(folder) == FILES


@pytest.fixture
def proxy(monkeypatch):
    """Sets the proxy that the environment names."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return lambda url, name=ALL_PROXY: monkeypatch.setenv(name, url)


@pytest.mark.parametrize("url", ["socks5://127.0.0.1:9", "socks5h://me:secret@127.0.0.1:9", "socks4://127.0.0.1"])
def test_a_socks_proxy_without_pysocks_says_what_to_install_and_no_password(folder, proxy, monkeypatch, url, capsys):
    monkeypatch.setattr(web.importlib.util, "find_spec", lambda name: None)
    proxy(url)
    shown = url.replace("me:secret@", "")
    message = f"{ALL_PROXY} ({shown}) needs PySocks, which is not installed: pip install pysocks"
    assert failure(["https://example.com/a", "https://example.com/b"], folder) == message
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1:9", "vmess://127.0.0.1:9", "http://", "http://127.0.0.1:x", "//[", "\x1b[2J"]
)
def test_what_cannot_be_a_proxy_is_one_line(folder, proxy, url):
    proxy(url, "https_proxy")
    assert re.search(
        r"https_proxy \(.*\) is no proxy: it must be http://HOST:PORT", failure("https://example.com", folder)
    )


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "http://me:secret@127.0.0.1:9"])
def test_a_proxy_that_refuses_is_named_without_its_password(folder, proxy, url):
    proxy(url)
    message = failure("https://example.com", folder)
    assert f"through {ALL_PROXY} (http://127.0.0.1:9), which may not run, or be another one: " in message
    assert "refused" in message


def test_a_proxy_without_a_port_is_asked_at_the_port_of_its_scheme(folder, proxy):
    proxy("http://127.0.0.1")
    assert f"through {ALL_PROXY} (http://127.0.0.1), which may not run" in failure("https://example.com", folder)


# the disk


def test_a_download_that_got_nothing_leaves_no_folder(server, folder):
    server.probe_faults = {"first": [{"status": 404}]}
    failure(server, folder)
    assert not os.path.exists(folder)


def test_one_that_waited_for_a_download_that_got_nothing_makes_the_folder_anew(server, folder):
    server.probe_faults = {"first": [{"wait": 2, "status": 404}]}
    first = start(server, folder)
    wait_until(lambda: server.log)
    others = [start(server, folder) for _ in range(2)]
    for other in others:
        assert b"waiting for another process" in other.stderr.readline()
    assert b"404" in first.communicate()[1]
    for other in others:
        other.communicate()
        assert other.returncode == 0
    assert files_in(folder) == FILES
    assert sorted(server.asked("large")) == sorted(RANGES)


@pytest.mark.parametrize("name", ["replace", "remove"])
def test_a_file_that_another_program_holds_for_a_moment_gets_its_name(server, folder, monkeypatch, name):
    hold_for_a_moment(monkeypatch, name)
    fetch(server, folder)
    assert contents(folder) == FILES


def test_a_file_that_another_program_keeps_is_one_line(server, folder, monkeypatch):
    def kept(*paths):
        raise PermissionError(13, "held")

    monkeypatch.setattr(os, "replace", kept)
    assert f"tiny cannot be stored in {folder}: [Errno 13] held" in failure(server, folder)


def test_a_full_disk_is_noticed_before_the_download(server, folder, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("usage", (), {"free": 100_000}))
    assert "100,000 free" in failure(server, folder)
    assert server.asked("large") == []


def test_only_the_bytes_still_to_come_need_room(server, folder, monkeypatch):
    interrupted(server, folder)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("usage", (), {"free": 100_000}))
    fetch(server, folder)
    assert contents(folder) == FILES


def test_a_disk_that_fills_up_is_one_line(server, folder):
    process = start(server, folder, through=["bash", "-c", 'ulimit -f 97 && exec "$@"', "bash"])  # KiB
    stderr = process.communicate()[1]
    assert process.returncode == 1
    assert re.fullmatch(rb"Fetching .*\ntiny cannot be stored in \S+: \[Errno \d+\] .*\n", stderr)


def test_a_folder_that_cannot_be_made_is_one_line(server, tmp_path):
    (tmp_path / "models").write_text("a file")
    assert "tiny cannot be stored in" in failure(server, str(tmp_path / "models" / "tiny"))


def test_a_line_break_in_the_folder_makes_no_two_lines(server, tmp_path):
    needs_posix("line breaks in names")
    (tmp_path / "a\nb").write_text("a file")
    assert "/a?b/tiny:" in failure(server, str(tmp_path / "a\nb" / "tiny")).replace(" ", "?")


# what is shown


def on_a_terminal(server, folder, **kwargs):
    return start(server, folder, begin=conftest.on_a_terminal, **kwargs)


def test_one_bar_shows_the_whole_and_goes_on_where_it_was(server, folder):
    total = f"{sum(map(len, FILES.values())) / 1000:.0f}k"
    server.seconds_per_block = 0.05
    with on_a_terminal(server, folder) as (_, terminal):
        while n_held(folder) <= 60_000:
            terminal.expect(rf"\d+%.*?/{total} \[\d\d:\d\d<\d\d:\d\d, *[\d.]+kB/s\]")
    n_done = n_held(folder) / 1000
    with on_a_terminal(server, folder) as (_, terminal):
        terminal.expect(rf"\| *([\d.]+)k/{total}")
        assert float(terminal.match[1]) >= n_done


@pytest.mark.parametrize("fault", [{"ranges": False}, {"faults": {"large": [{"flip": 50_000}] * 3}}], ids=str)
def test_the_bar_ends_at_the_size_of_all_files_though_some_of_it_comes_again(fault, server, folder, monkeypatch):
    interrupted(server, folder)
    made, progress = [], download.Progress
    monkeypatch.setattr(download, "Progress", lambda title: made.append(progress(title)) or made[-1])
    vars(server).update(fault)
    fetch(server, folder, n_connections=1)
    assert made[-1].n == sum(map(len, FILES.values()))


def test_it_says_what_it_fetches_and_from_where_before_there_is_an_answer(server, folder):
    server.probe_faults = {"first": [{"wait": 30}]}
    line = f"Fetching tiny from {server.url}: 4 files, 139,354 bytes or more; {GOES_ON}"
    process = start(server, folder, tuning={"quiet": 0.2})
    assert process.stderr.readline().decode().rstrip() == line
    assert process.stderr.readline().decode().rstrip() == "tiny: no answer yet"
    process.kill()
    process.communicate()


def test_a_terminal_shows_each_wait_and_retry_beside_the_bar(server, folder):
    server.probe_faults = {"first": [{"status": 503}, {"wait": 30}]}
    tuning = {"quiet": 0.3}
    with on_a_terminal(server, folder, tuning=tuning) as (_, terminal):
        terminal.expect_exact("HTTP 503: trying again in 0 s")
        terminal.expect_exact("no answer yet")
    server.probe_faults, server.always = {}, {"large": {"stall": 2000}}
    with on_a_terminal(server, folder, tuning=tuning) as (_, terminal):
        terminal.expect_exact("nothing has come for")


def test_without_a_terminal_a_line_tells_of_retries_and_few_follow(server, folder, capsys):
    server.probe_faults = {name: [{"status": 503}] * 2 for name in FILES}
    fetch(server, folder, {"first": 1000, "large": N_BYTES})
    assert capsys.readouterr().err == (
        f"Fetching tiny from {server.url}: 2 files, 138,344 bytes; {GOES_ON}\ntiny: HTTP 503: trying again in 0 s\n"
    )


def test_what_a_note_quotes_has_no_control_characters(monkeypatch):
    shown = []
    progress = download.Progress("tiny")
    monkeypatch.setattr(progress.bar, "disable", False)
    monkeypatch.setattr(progress.bar, "set_postfix_str", shown.append)
    progress.note("\x1b]0;title\x07 of\na stranger")
    assert shown == ["?]0;title? of a stranger"]


def test_nothing_is_shown_where_nothing_is_missing(server, folder, capsys):
    fetch(server, folder)
    capsys.readouterr()
    fetch(server, folder)
    assert capsys.readouterr().err == ""


def test_as_a_command_it_says_where_to_go():
    result = command("124M", script="files/download.py")
    assert result.returncode != 0
    assert re.fullmatch("download.py: .*python utils.py 124M\n", result.stderr)


def test_a_thread_that_is_left_behind_writes_and_counts_no_more(tmp_path):
    counted, wanted = [], download.Range(0, 9)
    remote, progress = download.Remote("url", 9, "tag", True, ""), types.SimpleNamespace(add=counted.append)
    with open(tmp_path / "data", "wb") as data, open(tmp_path / "record", "w") as record:
        part = download.Part(data, record, remote, progress)
        part.count(3)
        part.keep(wanted, b"abc")
        part.stop()
        for late in (lambda: part.count(3), lambda: part.keep(wanted, b"def")):
            with pytest.raises(download.DownloadError, match="stopped"):
                late()
    assert ((tmp_path / "data").read_bytes(), wanted.position, counted) == (b"abc", 3, [3])


def test_an_answer_that_comes_when_nobody_waits_any_more_is_closed():
    given_up, closed = threading.Event(), threading.Event()
    client = web.Client(timeout=0.05, quiet=0.01, progress=types.SimpleNamespace(note=str))
    late = types.SimpleNamespace(close=closed.set)
    client.session = types.SimpleNamespace(request=lambda *_, **__: given_up.wait(TIMEOUT) and late)
    with pytest.raises(web.PassingError, match="no answer in 0 s"):
        client.answer("GET", "http://127.0.0.1/", {})
    assert not closed.is_set()
    given_up.set()
    assert closed.wait(TIMEOUT)
