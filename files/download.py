"""Files from servers and networks that cannot be trusted: in verified pieces that survive slow and broken links.

What fetch() is to get arrives as FILE.part, in requests of several megabytes over several connections. Whatever came is
on disk within about half a second, and FILE.part.ranges then has a line with its SHA-256: so after Ctrl-C, SIGKILL or a
power cut the next call goes on from there, and damage to either file costs no more than fetching those bytes again.
A file gets its name once its length, the caller's check and the MD5 that the server may state are right.
"""

import base64
import collections
import contextlib
import functools
import hashlib
import ipaddress
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
import urllib.parse
from typing import NamedTuple

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


class DownloadError(Exception):
    """A download failed: one line for the user, with the file, its URL and the cause."""


class PassingError(DownloadError):
    """A failure that may pass: worth another attempt; retry_after: the header of that name."""

    def __init__(self, message, retry_after=""):
        super().__init__(message)
        self.retry_after = retry_after


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
        os.makedirs(folder, exist_ok=True)
        with locked(folder):
            for source in sources:
                if not (missing := missing_of(files, folder)):
                    return
                announce(title, missing, source)
                try:
                    return fetch_from(source.rstrip("/"), files, folder, check, title, tuning)
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
    say(f"Fetching {title} from {source}: {len(missing)} {'file' if len(missing) == 1 else 'files'}{n_bytes}")


def say(text):
    print(one_line(text), file=sys.stderr, flush=True)


def one_line(text):
    """A text without line breaks, and without the control characters of whoever sent it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))


@contextlib.contextmanager
def locked(folder):
    """Keeps other processes from downloading into folder; the system takes the lock back from one that dies."""
    with open(plain_file(os.path.join(folder, ".lock")), "a") as f:
        if not try_lock(f):
            say(f"waiting for another process that downloads into {folder}")
            while not try_lock(f):
                time.sleep(0.1)
        yield


def try_lock(f):
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # as POSIX and Windows say that another process has it
        return False
    return True


def plain_file(path):
    """path, which may be opened. Raises OSError if it leads to anything but a file: to open a FIFO takes for ever."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is no file: remove it")
    return path


class Progress:
    """What is seen of a download: a bar for all files with notes beside it, or, without a terminal, a note at times."""

    def __init__(self, title):
        from tqdm import tqdm

        self.title, self.n, self.noted, self.closed = title, 0, -math.inf, False
        self.bar = tqdm(desc=f"Fetching {title}", unit="B", unit_scale=True, disable=None)  # None: as stderr has it

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
            self.bar.set_postfix_str(text)
        elif time.monotonic() - self.noted >= QUIET:
            self.noted = time.monotonic()
            say(f"{self.title}: {text}")

    def close(self):
        self.closed = True
        self.bar.close()


def fetch_from(source, files, folder, check, title, tuning):
    """Fetches what is missing from one source. Raises DownloadError for its faults, OSError for those at this end."""
    import requests  # takes its time

    missing, paths = missing_of(files, folder), {name: os.path.join(folder, name) for name in files}
    progress = Progress(title)
    with requests.Session() as session, contextlib.closing(progress):
        session.get_redirect_target = lambda response: None  # open_url() follows them
        ask = functools.partial(open_url, session, tuning, progress.note)

        def plan(name):
            # less patience than later, and least before any answer: most likely this machine is offline
            n_attempts, pause = (4, tuning.pause) if plans else (3, tuning.pause / 2)
            attempt = functools.partial(describe, ask, f"{source}/{name}", missing[name], tuning.largest)
            remote = persist(attempt, n_attempts, pause, progress)
            return remote, gaps(remote, paths[name])

        plans = {}
        for name in missing:
            with named(name, source):
                plans[name] = plan(name)
        n_left = sum(n_bytes(todo) for _, todo in plans.values())
        if n_left > (n_free := shutil.disk_usage(folder).free):
            raise OSError(f"{n_left:,} bytes are still to come, and that disk has {n_free:,} free")
        n_there = sum(os.path.getsize(paths[name]) for name in files.keys() - missing.keys())
        progress.begin(n_there + sum(remote.size for remote, _ in plans.values()), n_left)
        for name, planned in plans.items():
            with named(name, source):
                fetch_file(ask, name, paths[name], planned, functools.partial(plan, name), check, progress, tuning)


@contextlib.contextmanager
def named(name, source):
    """Puts the file and its URL before the cause of a DownloadError."""
    try:
        yield
    except DownloadError as error:
        raise DownloadError(f"{name} from {source}/{name}: {error}") from error


def n_bytes(ranges):
    return sum(stop - start for start, stop in ranges)


def fetch_file(ask, name, path, planned, plan, check, progress, tuning):
    """Fetches the gaps of a file, verifies and names it; once more if it is damaged or changes under way."""
    remote, todo = planned
    try:
        n_others = progress.n - remote.size + n_bytes(todo)
        fetch_gaps(ask, remote, todo, path, progress, tuning)
        return verify_and_name(ask, remote, name, path, check)
    except DamagedError as error:
        progress.bar.write(one_line(f"{name} from {remote.url}: {error}: fetching it once more"), file=sys.stderr)
    remote, todo = plan()
    progress.add(n_others + remote.size - n_bytes(todo) - progress.n)
    fetch_gaps(ask, remote, todo, path, progress, tuning)
    verify_and_name(ask, remote, name, path, check)


def describe(ask, url, size, largest):
    """What a source says of a file, as Remote. size: what the file is known to have, or None; then at most largest.

    To ask for one byte tells more than a HEAD request, which some servers refuse: whether they keep to ranges.
    """
    with ask("GET", url, {"Range": "bytes=0-0"}) as response:
        headers, in_ranges = response.headers, response.status_code == 206
        stated = headers.get("Content-Range" if in_ranges else "Content-Length", "")
        stated = re.fullmatch(("bytes 0-0/" if in_ranges else "") + "([0-9]{1,15})", stated)
        if not stated:
            raise DownloadError("the server does not say how long the file is")
        if in_ranges:
            read(response, 1)  # so that the connection can be used again
    stated = int(stated[1])
    if stated != size and (size is not None or stated > largest):
        raise DownloadError(f"it has {stated} bytes there, which cannot be right")
    # a Content-MD5 is that of the body alone
    return Remote(url, stated, tag(headers), in_ranges, "" if in_ranges else headers.get("Content-MD5", ""))


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


def fetch_gaps(ask, remote, todo, path, progress, tuning):
    """Fetches the ranges in todo into FILE.part, several at once; FILE.part.ranges tells what is there."""
    if todo and not remote.in_ranges:
        progress.add(n_bytes(todo) - remote.size)
        todo = [(0, remote.size)]
    step = tuning.request_bytes if remote.in_ranges else max(remote.size, 1)
    todo = [(i, min(i + step, stop)) for start, stop in todo for i in range(start, stop, step)]
    stopped, lock = threading.Event(), threading.Lock()
    again = functools.partial(persist, n_attempts=6, pause=tuning.pause, progress=progress, stopped=stopped)
    new = not os.path.exists(plain_file(path + ".part"))
    with open(path + ".part", "w+b" if new else "r+b") as part, open(plain_file(path + ".part.ranges"), "a") as record:
        part.truncate(remote.size)

        def take(n_new, position=0, piece=b""):  # what arrived, and what is to be kept of it
            digest = hashlib.sha256(piece).hexdigest() if piece else ""
            with lock:
                if stopped.is_set():
                    raise DownloadError("stopped")
                progress.add(n_new)
                if piece:
                    part.seek(position)
                    part.write(piece)
                    part.flush()
                    line = json.dumps([position, position + len(piece), digest, remote.url, remote.tag])
                    record.write("\n" + line)  # begins a line: the one before may have been cut short
                    record.flush()

        try:
            work = functools.partial(fetch_range, ask, remote, take, again, tuning)
            results = in_threads(work, todo, tuning.n_connections)
            for _ in todo:
                await_result(results, progress, tuning.quiet, tuning.patience)
        finally:
            with lock:
                stopped.set()


def in_threads(work, jobs, n_threads):
    """Calls work(job) for every job; the queue it returns gets None for each that is done, or what went wrong.

    The threads are daemons, so that none that waits for the network keeps an interrupted process alive.
    """
    waiting, results = queue.SimpleQueue(), queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def run():
        try:
            while True:
                work(waiting.get_nowait())
                results.put(None)
        except queue.Empty:
            pass
        except Exception as error:  # raised anew in the main thread
            results.put(error)

    for _ in range(min(n_threads, len(jobs))):
        threading.Thread(target=run, daemon=True).start()
    return results


def await_result(results, progress, quiet, patience):
    """Waits until another job is done. Raises what went wrong with it; DownloadError if nothing comes at all."""
    n_before, since = progress.n, time.monotonic()
    while True:
        with contextlib.suppress(queue.Empty):
            if error := results.get(timeout=min(1, quiet)):
                raise error
            return
        if progress.n != n_before:
            n_before, since = progress.n, time.monotonic()
        seconds = time.monotonic() - since
        if seconds >= patience:
            raise DownloadError(f"nothing has come for {patience:.0f} s")
        if seconds >= quiet:
            progress.note(f"nothing has come for {seconds:.0f} s")


def fetch_range(ask, remote, take, again, tuning, wanted):
    """Fetches the range wanted, (start, stop), and hands what comes to take(n_new, position, piece)."""
    (start, stop), piece = wanted, bytearray()
    position = start

    def keep():
        nonlocal position, piece
        take(0, position, piece)
        position, piece = position + len(piece), bytearray()

    def attempt():
        nonlocal position
        if not remote.in_ranges:  # from the start again
            take(start - position)
            position = start
        headers = {"Range": f"bytes={position}-{stop - 1}"} if remote.in_ranges else {}
        with ask("GET", remote.url, headers) as response:
            check_answer(response, remote, position)
            kept = time.monotonic()
            try:
                for block in blocks(response, stop - position, tuning.floor, tuning.floor_after):
                    piece.extend(block)
                    take(len(block))
                    if len(piece) >= PIECE or time.monotonic() - kept >= tuning.save_after:
                        keep()
                        kept = time.monotonic()
            finally:  # what came before a failure counts
                keep()

    again(attempt)


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


def blocks(response, n_left, floor, floor_after):
    """Yields n_left bytes of a response as they come. Raises PassingError if they end, fail, or come too slowly."""
    begin, n_new = time.monotonic(), 0
    while n_left:
        block = read(response, min(n_left, 2**16))
        if not block:
            raise PassingError(f"{n_left} bytes are missing")
        yield block
        n_left, n_new = n_left - len(block), n_new + len(block)
        seconds = time.monotonic() - begin
        if seconds >= floor_after:
            if n_new < floor * seconds:
                raise PassingError(f"{n_new} bytes in {seconds:.0f} s are too few")
            begin, n_new = time.monotonic(), 0


def read(response, n_most):
    """The next bytes of a response, as soon as there are any; read(), which is what old urllib3 has, awaits n_most."""
    with network_errors():
        return getattr(response.raw, "read1", response.raw.read)(n_most)


@contextlib.contextmanager
def network_errors():
    """Turns what goes wrong in the libraries below into PassingError, or DownloadError where it is the URL's fault."""
    import urllib3

    try:
        yield
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        # a ValueError: a host that cannot be, a port that is no number, an unknown scheme
        raise (DownloadError if isinstance(error, ValueError) else PassingError)(root_cause(error)) from error


def root_cause(error):
    """One short line from the bottom of a chain of exceptions: requests' own texts are long."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return one_line(error) or type(error).__name__


@contextlib.contextmanager
def open_url(session, tuning, note, method, url, headers=()):
    """The response to an HTTP request, redirects followed. Raises DownloadError, PassingError if a retry may help."""
    headers = {"Accept-Encoding": "identity", **dict(headers)}
    for _ in range(6):
        proxies = dict.fromkeys(("http", "https", "all")) if check_url(url) else None  # None: as the environment says
        timeouts = (min(tuning.timeout, 10), tuning.timeout)
        options = {"headers": headers, "proxies": proxies, "stream": True, "timeout": timeouts}
        with network_errors():
            request = functools.partial(session.request, method, url, **options)
            response = in_time(request, sum(timeouts), tuning.quiet, note)
        with response:
            if not response.is_redirect:
                check_status(response)
                yield response
                return
            location = response.headers["Location"]
        with network_errors():
            url = urllib.parse.urljoin(url, location)
    raise DownloadError("too many redirects")


def in_time(request, seconds, quiet, note):
    """request(), left behind in its thread if it takes longer: a name server or trickling headers know no timeout."""
    answers = []

    def work():
        try:
            answers.append(request())
        except Exception as error:  # raised anew below
            answers.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(min(quiet, seconds))
    if thread.is_alive():
        note("no answer yet")
        thread.join(max(seconds - quiet, 0))
    if not answers:
        raise PassingError(f"no answer in {seconds:.0f} s")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def check_status(response):
    code, encoding = response.status_code, response.headers.get("Content-Encoding", "")
    if code in (408, 429) or code >= 500:
        raise PassingError(f"HTTP {code}", response.headers.get("Retry-After", ""))
    if code not in (200, 206):
        raise DownloadError(f"HTTP {code}")
    if re.search("gzip|deflate|compress|br|zstd", encoding.lower()):
        raise DownloadError(f"the server compresses it ({encoding!r:.40}), which it was not asked for")


def check_url(url):
    """Whether url leads to this machine. Raises DownloadError unless it is https, or http to this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise DownloadError(f"{url!r} is no URL: {error}") from error
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    # parsers differ in what they make of odd characters
    if not host or re.search(r"[^!-~]|\\", url) or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise DownloadError(f"{url!r} is refused: files are fetched over https only, or from this machine")
    return local


def persist(attempt, n_attempts, pause, progress, stopped=None):
    """attempt(), repeated after growing pauses while it raises PassingError, n_attempts times without progress."""
    stopped, n_failures, furthest = stopped or threading.Event(), 0, progress.n
    while True:
        try:
            return attempt()
        except PassingError as error:
            n_failures = 1 if progress.n - furthest >= 2**16 else n_failures + 1
            if n_failures == n_attempts or stopped.is_set():
                raise
            furthest = max(furthest, progress.n)  # a plain stream begins at its start again
            seconds = pause_before(n_failures, pause, error.retry_after)
            progress.note(f"{error}: trying again in {seconds:.0f} s")
            stopped.wait(seconds)


def pause_before(n_failures, pause, retry_after=""):
    """Seconds to wait: twice as long after each failure, but as the server asks, and random, so that clients part."""
    asked = int(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else 0
    return min(max(pause * 2 ** (n_failures - 1), asked) * random.uniform(1, 1.5), LONGEST_PAUSE)  # noqa: S311


def verify_and_name(ask, remote, name, path, check):
    """Gives FILE.part its name if it is what it should be. Raises DamagedError, and forgets it, if not."""
    fault = check(name, path + ".part")
    stated = fault or remote.md5 or stated_md5(ask, remote.url)
    if not fault and stated and stated != md5(path + ".part"):
        fault = "its MD5 is not that which the server states"
    if fault:
        os.remove(path + ".part.ranges")
        os.remove(path + ".part")
        raise DamagedError(fault)
    with open(path + ".part", "r+b") as f:
        os.fsync(f.fileno())  # so that not even a power cut can leave less under the final name
    os.replace(path + ".part", path)
    os.remove(path + ".part.ranges")


def stated_md5(ask, url):
    """The MD5 of the whole file as a Content-MD5 has it, or "" where a server states none or refuses HEAD requests."""
    with contextlib.suppress(DownloadError), ask("HEAD", url) as response:
        return response.headers.get("Content-MD5", "")
    return ""


def md5(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return base64.b64encode(digest.digest()).decode()


if __name__ == "__main__":
    arguments = one_line(" ".join(sys.argv[1:]))
    sys.exit(f"download.py: fetches nothing by itself: use python utils.py {arguments or 'MODEL_SIZE'}")
