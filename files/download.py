"""Files from servers and networks that cannot be trusted: in verified pieces that survive slow and broken links.

What fetch() is to get arrives as FILE.part, in requests of several megabytes over several connections. Whatever came is
on disk within about half a second, and FILE.part.ranges then has a line with its SHA-256: so after Ctrl-C, SIGKILL or a
power cut the next call goes on from there, and damage to either file costs no more than fetching those bytes again.
A file gets its name once its length, the caller's check and the MD5 that the server may state are right.
"""

import base64
import collections
import contextlib
import hashlib
import json
import math
import os
import queue
import random
import re
import shutil
import sys
import threading
import time
from typing import NamedTuple

if __name__ == "__main__":  # where files/ is no package
    arguments = " ".join(arg if arg.isprintable() else "?" for arg in sys.argv[1:])
    sys.exit(f"download.py: fetches nothing by itself: use python utils.py {arguments or 'MODEL_SIZE'}")

from files.lock import insist, locked, plain_file
from files.web import Client, DownloadError, PassingError, blocks, check_proxy, one_line, read
from languages import translated

PIECE = 2**18  # bytes of a connection that are on disk together with their SHA-256, if not earlier
LONGEST_PAUSE = 60  # seconds, also where a server asks for more
QUIET = 10  # seconds between two notes where there is no terminal

Remote = collections.namedtuple("Remote", "url size tag in_ranges md5")  # what a source says of a file


class Tuning(NamedTuple):
    """How a download goes about it; times are in seconds."""

    n_connections: int = 8
    request_bytes: int = 2**23  # asked for at a time
    save_after: float = 0.5  # what a connection has brought is put on disk so often
    timeout: float = 30  # to wait for the next bytes (for a connection, 10 at most)
    pause: float = 1  # before the first retry
    floor: float = 1000  # bytes a second: a connection that is slower is given up,
    floor_after: float = 30  # and tried again
    quiet: float = 3  # of silence until that is told
    patience: float = 180  # without any progress, until a source is given up
    largest: int = 2**24  # bytes that a file of unknown size may have


class DamagedError(DownloadError):
    """What arrived is not the file: worth fetching once more."""


def fetch(files, folder, sources, check, title, **tuning):
    """Fetches the files that folder lacks; after an interruption, the next call goes on.

    files: {name: its size in bytes, or None where that is not known}, in the order in which they are fetched.
    sources: base URLs, tried in turn; a file is at SOURCE/NAME.
    check(name, path): what is wrong with the file at path, as text, or None; asked before a file gets its name.
    title: what this is called on the bar and in notes. tuning: the fields of Tuning.
    Raises DownloadError, also where the disk is at fault.
    """
    tuning, failures = Tuning(**tuning), []
    try:
        with locked(folder):
            for source in sources:
                if not (missing := missing_of(files, folder)):
                    return
                check_proxy(source)
                announce(title, missing, source)
                try:
                    with contextlib.closing(
                        Download(source.rstrip("/"), files, folder, check, title, tuning)
                    ) as download:
                        return download.run()
                except DownloadError as error:
                    failures.append(str(error))
                    if source != sources[-1]:
                        say(f"{error}: trying another source")
    except OSError as error:
        raise DownloadError(one_line(f"{title} cannot be stored in {folder}: {error}")) from error
    raise DownloadError(one_line(f"could not download {'; nor '.join(failures)}"))


def missing_of(files, folder):
    return {name: size for name, size in files.items() if not os.path.isfile(os.path.join(folder, name))}


def announce(title, missing, source):
    sizes = missing.values()
    n_bytes = f", {sum(n or 0 for n in sizes):,} bytes{' or more' * (None in sizes)}" if any(sizes) else ""
    files = f"{len(missing)} {'file' if len(missing) == 1 else 'files'}{n_bytes}"
    say(f"Fetching {title} from {source}: {files}; if interrupted, the next run goes on from there")


def say(text):
    print(translated(one_line(text)), file=sys.stderr, flush=True)


class Progress:
    """What is seen of a download: a bar for all files with notes beside it, or, without a terminal, a note at times."""

    def __init__(self, title):
        from files.bar import Bar  # only here: what is taken from a cache needs none

        self.title, self.n, self.noted, self.closed = title, 0, -math.inf, False
        self.bar = Bar(desc=f"Fetching {title}", unit="B", unit_scale=True)

    def begin(self, n_bytes, n_left):
        self.n = n_bytes - n_left
        self.bar.reset(n_bytes)
        self.bar.initial = self.bar.n = self.n
        self.bar.refresh()

    def add(self, n_new):  # below 0 for what has to come again
        self.n += n_new
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update(n_new)

    def note(self, text):
        if self.closed:  # by now; a thread that was left behind
            return
        if not self.bar.disable:
            self.bar.set_postfix_str(translated(one_line(text)))
        elif time.monotonic() - self.noted >= QUIET:
            self.noted = time.monotonic()
            say(f"{self.title}: {text}")

    def close(self):
        self.closed = True
        self.bar.close()


class Download:
    """What files lack in folder, on its way from one source, for as long as that goes well. Arguments: see fetch().

    All methods raise DownloadError for faults of the source, OSError for those at this end.
    """

    def __init__(self, source, files, folder, check, title, tuning):
        self.source, self.files, self.folder, self.check, self.tuning = source, files, folder, check, tuning
        self.progress = Progress(title)
        self.client = Client(tuning.timeout, tuning.quiet, self.progress)

    def close(self):
        self.progress.close()
        self.client.close()

    def path(self, name):
        return os.path.join(self.folder, name)

    def run(self):
        """Fetches every file that is missing, one after another."""
        plans = {}  # {name: (Remote, the ranges to fetch)}
        for name in missing_of(self.files, self.folder):
            with named(name, self.source):
                plans[name] = self.plan(name, is_first=not plans)
        n_left = sum(n_bytes(todo) for _, todo in plans.values())
        if n_left > (n_free := shutil.disk_usage(self.folder).free):
            raise OSError(f"{n_left:,} bytes are still to come, and that disk has {n_free:,} free")
        n_there = sum(os.path.getsize(self.path(name)) for name in self.files.keys() - plans.keys())
        self.progress.begin(n_there + sum(remote.size for remote, _ in plans.values()), n_left)
        for name, (remote, todo) in plans.items():
            with named(name, self.source):
                self.fetch_file(name, remote, todo)

    def plan(self, name, is_first=False):
        """(What the source says of a file, as Remote, the ranges of it to fetch)."""
        # less patience than later, and least before any answer: most likely this machine is offline
        n_attempts, pause = (3, self.tuning.pause / 2) if is_first else (4, self.tuning.pause)
        remote = self.persist(self.describe, name, n_attempts=n_attempts, pause=pause)
        return remote, gaps(remote, self.path(name))

    def describe(self, name):
        """What the source says of a file, as Remote.

        To ask for one byte tells more than a HEAD request, which some servers refuse: whether they keep to ranges.
        """
        url, size = f"{self.source}/{name}", self.files[name]
        with self.client.open("GET", url, {"Range": "bytes=0-0"}) as response:
            headers, in_ranges = response.headers, response.status_code == 206
            stated = headers.get("Content-Range" if in_ranges else "Content-Length", "")
            stated = re.fullmatch(("bytes 0-0/" if in_ranges else "") + "([0-9]{1,15})", stated)
            if not stated:
                raise DownloadError("the server does not say how long the file is")
            if in_ranges:
                read(response, 1)  # so that the connection can be used again
        stated = int(stated[1])
        if stated != size and (size is not None or stated > self.tuning.largest):
            raise DownloadError(f"it has {stated} bytes there, which cannot be right")
        # a Content-MD5 is that of the body alone
        return Remote(url, stated, tag(headers), in_ranges, "" if in_ranges else headers.get("Content-MD5", ""))

    def persist(self, attempt, *args, n_attempts, pause, stopped=None):
        """attempt(*args), again after growing pauses after a PassingError, n_attempts times without progress."""
        stopped, n_failures, furthest = stopped or threading.Event(), 0, self.progress.n
        while True:
            try:
                return attempt(*args)
            except PassingError as error:
                n_failures = 1 if self.progress.n - furthest >= 2**16 else n_failures + 1
                if n_failures == n_attempts or stopped.is_set():
                    raise
                furthest = max(furthest, self.progress.n)  # a plain stream begins at its start again
                seconds = pause_before(n_failures, pause, error.retry_after)
                self.progress.note(f"{error}: trying again in {seconds:.0f} s")
                stopped.wait(seconds)

    def fetch_file(self, name, remote, todo):
        """Fetches the gaps of a file, verifies and names it; once more if it is damaged or changes under way."""
        n_others = self.progress.n - remote.size + n_bytes(todo)
        try:
            self.fetch_gaps(name, remote, todo)
            return self.verify_and_name(name, remote)
        except DamagedError as error:
            message = f"{name} from {remote.url}: {error}: fetching it once more"
            self.progress.bar.write(translated(one_line(message)), file=sys.stderr)
        remote, todo = self.plan(name)
        self.progress.add(n_others + remote.size - n_bytes(todo) - self.progress.n)
        self.fetch_gaps(name, remote, todo)
        self.verify_and_name(name, remote)

    def fetch_gaps(self, name, remote, todo):
        """Fetches the ranges in todo into FILE.part, several at once; FILE.part.ranges tells what is there."""
        if todo and not remote.in_ranges:
            self.progress.add(n_bytes(todo) - remote.size)
            todo = [(0, remote.size)]
        step = self.tuning.request_bytes if remote.in_ranges else max(remote.size, 1)
        path = plain_file(self.path(name) + ".part")
        with (
            open(path, "r+b" if os.path.exists(path) else "w+b") as data,
            open(plain_file(path + ".ranges"), "a", encoding="ascii", newline="\n") as record,
        ):
            data.truncate(remote.size)
            part = Part(data, record, remote, self.progress)
            ranges = [Range(i, min(i + step, stop)) for start, stop in todo for i in range(start, stop, step)]
            try:
                results = in_threads(self.fetch_range, part, ranges, self.tuning.n_connections)
                for _ in ranges:
                    self.await_result(results)
            finally:
                part.stop()

    def await_result(self, results):
        """Waits until another range is there. Raises what went wrong with it; DownloadError if nothing comes at all."""
        n_before, since = self.progress.n, time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                if error := results.get(timeout=min(1, self.tuning.quiet)):
                    raise error
                return
            if self.progress.n != n_before:
                n_before, since = self.progress.n, time.monotonic()
            seconds = time.monotonic() - since
            if seconds >= self.tuning.patience:
                raise DownloadError(f"nothing has come for {self.tuning.patience:.0f} s")
            if seconds >= self.tuning.quiet:
                self.progress.note(f"nothing has come for {seconds:.0f} s")

    def fetch_range(self, part, wanted):
        """Fetches a Range of a file into its Part."""
        attempt = {"n_attempts": 6, "pause": self.tuning.pause, "stopped": part.stopped}
        self.persist(self.try_range, part, wanted, **attempt)

    def try_range(self, part, wanted):
        """Fetches what a Range still lacks; what came before a failure counts."""
        if not part.remote.in_ranges:  # from the start again
            part.count(wanted.start - wanted.position)
            wanted.position = wanted.start
        headers = {"Range": f"bytes={wanted.position}-{wanted.stop - 1}"} if part.remote.in_ranges else {}
        with self.client.open("GET", part.remote.url, headers) as response:
            check_answer(response, part.remote, wanted.position)
            piece, kept = bytearray(), time.monotonic()
            try:
                n_left = wanted.stop - wanted.position
                for block in blocks(response, n_left, self.tuning.floor, self.tuning.floor_after):
                    piece += block
                    part.count(len(block))
                    if len(piece) >= PIECE or time.monotonic() - kept >= self.tuning.save_after:
                        part.keep(wanted, piece)
                        piece, kept = bytearray(), time.monotonic()
            finally:
                part.keep(wanted, piece)

    def verify_and_name(self, name, remote):
        """Gives FILE.part its name if it is what it should be. Raises DamagedError, and forgets it, if not."""
        path = self.path(name)
        fault = self.check(name, path + ".part")
        stated = fault or remote.md5 or self.stated_md5(remote.url)
        if not fault and stated and stated != md5(path + ".part"):
            fault = "its MD5 is not that which the server states"
        if fault:
            insist(os.remove, path + ".part.ranges")
            insist(os.remove, path + ".part")
            raise DamagedError(fault)
        with open(path + ".part", "r+b") as f:
            os.fsync(f.fileno())  # so that not even a power cut can leave less under the final name
        insist(os.replace, path + ".part", path)
        insist(os.remove, path + ".part.ranges")

    def stated_md5(self, url):
        """The MD5 of the whole file as a Content-MD5 has it, or "" where a server states none or refuses HEAD."""
        with contextlib.suppress(DownloadError), self.client.open("HEAD", url) as response:
            return response.headers.get("Content-MD5", "")
        return ""


class Range:
    """The bytes of a file from start to stop, of which those before position are on disk."""

    def __init__(self, start, stop):
        self.start, self.position, self.stop = start, start, stop


class Part:
    """FILE.part, which several threads fill, and FILE.part.ranges, its record, until stop()."""

    def __init__(self, data, record, remote, progress):
        self.data, self.record, self.remote, self.progress = data, record, remote, progress
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def stop(self):
        """After this, no thread that is left behind writes any more, or is counted."""
        with self.lock:
            self.stopped.set()

    def count(self, n_new):
        """Counts bytes that came, below 0 what has to come again."""
        with self.lock:
            if self.stopped.is_set():
                raise DownloadError("stopped")
            self.progress.add(n_new)

    def keep(self, wanted, piece):
        """Puts what came of a Range on disk, for good."""
        digest = hashlib.sha256(piece).hexdigest()
        with self.lock:
            if self.stopped.is_set():
                raise DownloadError("stopped")
            if piece:
                self.data.seek(wanted.position)
                self.data.write(piece)
                self.data.flush()
                stop = wanted.position + len(piece)
                line = json.dumps([wanted.position, stop, digest, self.remote.url, self.remote.tag])
                self.record.write("\n" + line)  # begins a line: the one before may have been cut short
                self.record.flush()
                wanted.position = stop


@contextlib.contextmanager
def named(name, source):
    """Puts the file and its URL before the cause of a DownloadError."""
    try:
        yield
    except DownloadError as error:
        raise DownloadError(f"{name} from {source}/{name}: {error}") from error


def in_threads(work, part, jobs, n_threads):
    """Calls work(part, job) for every job; the queue it returns gets None for each that is done, or what went wrong.

    The threads are daemons, so that none that waits for the network keeps an interrupted process alive.
    """
    waiting, results = queue.SimpleQueue(), queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    for _ in range(min(n_threads, len(jobs))):
        threading.Thread(target=work_off, args=(work, part, waiting, results), daemon=True).start()
    return results


def work_off(work, part, waiting, results):
    try:
        while True:
            work(part, waiting.get_nowait())
            results.put(None)
    except queue.Empty:
        pass
    except Exception as error:  # raised anew in the main thread
        results.put(error)


def n_bytes(ranges):
    return sum(stop - start for start, stop in ranges)


def tag(headers):
    """What tells one version of a file from another; the W/ of weak ETags comes and goes with servers."""
    return headers.get("ETag", "").removeprefix("W/") or headers.get("Last-Modified", "")


def gaps(remote, path):
    """The ranges [(start, stop), ...] of a file that FILE.part does not hold yet."""
    todo, position = [], 0
    for start, stop in [*sorted(held(remote, path)), (remote.size, remote.size)]:
        if start > position:
            todo.append((position, start))
        position = max(position, stop)
    return todo


def held(remote, path):
    """Yields the ranges that FILE.part holds.

    A line [start, stop, SHA-256, URL, tag] of FILE.part.ranges is believed if its SHA-256 is right, whatever happened
    to the two files, unless the URL has another tag by now.
    """
    if not (os.path.isfile(path + ".part") and os.path.isfile(path + ".part.ranges")):
        return
    with open(path + ".part", "rb") as part, open(path + ".part.ranges", "rb") as record:
        for line in iter(lambda: record.readline(2**14), b""):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                start, stop, digest, url, version = json.loads(line)
                possible = 0 <= start < stop <= min(start + 2**23, remote.size)
                if possible and (url != remote.url or version == remote.tag):
                    part.seek(start)
                    if hashlib.sha256(part.read(stop - start)).hexdigest() == digest:
                        yield start, stop


def check_answer(response, remote, position):
    """Raises unless a response holds what follows position in the file that remote describes."""
    if tag(response.headers) and remote.tag and tag(response.headers) != remote.tag:
        raise DamagedError("the file changes on the server")
    length = response.headers.get("Content-Length")
    if remote.in_ranges:
        length = re.fullmatch(rf"bytes {position}-[0-9]+/([0-9]+)", response.headers.get("Content-Range", ""))
        if not length or response.status_code != 206:
            raise PassingError("the server sends other bytes than it was asked for")
        length = length[1]
    if length != str(remote.size):
        raise DamagedError("the file changes on the server, or it lies about its length")


def pause_before(n_failures, pause, retry_after=""):
    """Seconds to wait: twice as long after each failure, but as the server asks, and random, so that clients part."""
    asked = int(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else 0
    return min(max(pause * 2 ** (n_failures - 1), asked) * random.uniform(1, 1.5), LONGEST_PAUSE)  # noqa: S311


def md5(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return base64.b64encode(digest.digest()).decode()
