"""Download files, and make it boring: in verified ranges that survive slow and broken networks.

Files come from fetch(); whatever interrupts it, calling it again goes on where it was.
"""

import base64
import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import queue
import random
import re
import shutil
import sys
import threading
import time
import urllib.parse

LONGEST_PAUSE = 60  # seconds, also where a server asks for more


class DownloadError(Exception):
    """Files could not be fetched: one line for the user."""


class SourceError(Exception):
    """A source does not deliver a file: the message is the cause."""


class PassingError(SourceError):
    """A failure that may pass: worth another attempt; retry_after: the header of that name."""

    def __init__(self, message, retry_after=""):
        super().__init__(message)
        self.retry_after = retry_after


class DamagedError(SourceError):
    """What arrived is not the file: worth another download from its start."""


def fetch(files, folder, sources, check, title, n_connections=8, range_bytes=2**23, timeout=30, pause=1):
    """Downloads those of files that folder lacks; after an interruption, the next call goes on.

    files: {name: its size in bytes, or None where it is not known}, in the order to fetch. sources: base URLs, tried in
    turn; a file is at SOURCE/NAME. check: (name, path) -> what is wrong with a file, or None; asked before a file gets
    its name. title: for the bar.
    A file arrives in ranges of range_bytes, n_connections of them at once, as FILE.part, while FILE.part.ranges records
    those that are finished; it gets its name once it is verified.
    timeout: seconds to wait for the next bytes (for a connection, 10 at most). pause: seconds before the first retry.
    Raises DownloadError.
    """
    failures = []
    try:
        os.makedirs(folder, exist_ok=True)
        with locked(folder):
            for source in sources:
                try:
                    fetch_missing(source + "/", files, folder, check, title, n_connections, range_bytes, timeout, pause)
                    return
                except SourceError as error:
                    failures.append(one_line(error))
                    if source != sources[-1]:
                        print(f"{failures[-1]}: trying another source", file=sys.stderr)
    except OSError as error:
        raise DownloadError(f"{title} cannot be stored in {folder}: {error}") from error
    raise DownloadError(f"could not download {'; nor '.join(failures)}")


@contextlib.contextmanager
def locked(model_dir):
    """Keeps other processes from downloading into model_dir; the system takes the lock back from one that dies."""
    with open(os.path.join(model_dir, ".lock"), "w") as f:
        if not try_lock(f):
            print(f"waiting for another process that downloads into {model_dir}", file=sys.stderr, flush=True)
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


def fetch_missing(base_url, files, model_dir, check, title, n_connections, range_bytes, timeout, pause):
    """Fetches, verifies and names what model_dir lacks. Raises SourceError; OSError for faults at this end."""
    import requests
    from tqdm import tqdm

    paths = {name: os.path.join(model_dir, name) for name in files}
    with requests.Session() as session:
        request = functools.partial(open_url, session, timeout)

        def plan(name, in_ranges=True):  # what the source says of the file, and the ranges still to come
            with named(name, base_url):
                # less patience than later: most likely this machine is offline
                remote = persist(functools.partial(describe, request, base_url + name), 4, pause)
                size = remote["size"]
                if size != (files[name] if files[name] is not None else size):
                    raise SourceError(f"it has {size} bytes there, which cannot be right")
            remote["in_ranges"] &= in_ranges
            return remote, unfinished(remote, paths[name], range_bytes)

        plans = {name: plan(name) for name in files if not os.path.isfile(paths[name])}
        n_left = sum(stop - start for _, todo in plans.values() for start, stop in todo)
        n_bytes = sum(plans[name][0]["size"] if name in plans else os.path.getsize(paths[name]) for name in files)
        n_free = shutil.disk_usage(model_dir).free
        if n_left > n_free:
            raise OSError(f"{n_left:,} bytes are still to come, and that disk has {n_free:,} free")

        # one bar for the whole model; None: silent unless on a terminal
        options = {"initial": n_bytes - n_left, "unit": "B", "unit_scale": True, "disable": None}
        with tqdm(desc=f"Fetching {title}", total=n_bytes, **options) as bar:
            for name, (remote, todo) in plans.items():
                n_before = bar.n - remote["size"] + sum(stop - start for start, stop in todo)  # without this file
                for last_try in (False, True):
                    try:
                        with named(name, base_url):
                            fetch_file(request, remote, todo, paths[name], n_connections, pause, bar)
                            verify_and_name(check, name, paths[name], remote["md5"])
                        break
                    except DamagedError as error:
                        for suffix in (".part", ".part.ranges"):
                            os.remove(paths[name] + suffix)
                        if last_try:
                            raise
                        tqdm.write(f"{error}: fetching it once more", file=sys.stderr)
                        bar.update(n_before - bar.n)
                        remote, todo = plan(name, remote["in_ranges"])


@contextlib.contextmanager
def named(name, base_url):
    """Puts the file and its URL before the cause of a SourceError."""
    try:
        yield
    except SourceError as error:
        raise type(error)(f"{name} from {base_url}{name}: {error}") from error


@contextlib.contextmanager
def open_url(session, timeout, method, url, headers=()):
    """The response to an HTTP request, redirects followed. Raises SourceError, PassingError where a retry may help."""
    import requests

    try:
        for _ in range(6):
            local = check_url(url)
            headers = {"Accept-Encoding": "identity", **dict(headers)}
            proxies = {"http": None, "https": None, "all": None} if local else None  # None: as the environment says
            options = {"stream": True, "timeout": (min(timeout, 10), timeout), "allow_redirects": False}
            with session.request(method, url, headers=headers, proxies=proxies, **options) as response:
                if not response.is_redirect:
                    code = response.status_code
                    if code in (408, 429) or code >= 500:
                        raise PassingError(f"HTTP {code}", response.headers.get("Retry-After", ""))
                    if code not in (200, 206):
                        raise SourceError(f"HTTP {code}")
                    yield response
                    return
                url = urllib.parse.urljoin(url, response.headers["Location"])
        raise SourceError("too many redirects")
    except requests.RequestException as error:
        lasting = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)
        raise (SourceError if isinstance(error, lasting) else PassingError)(root_cause(error)) from error


def check_url(url):
    """Whether url leads to this machine. Raises SourceError unless it is https, or http to this machine."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise SourceError(f"{url!r} is no URL: {error}") from error
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    # parsers differ in what they make of odd characters
    if not host or re.search(r"[^!-~]|\\", url) or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise SourceError(f"{url!r} is refused: files are fetched over https only, or from this machine")
    return local


def root_cause(error):
    """One short line from the bottom of a chain of exceptions: requests' own texts are long."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return one_line(error) or type(error).__name__


def persist(attempt, n_attempts, pause, stopped=None, progress=lambda: 0):
    """attempt(), repeated after growing pauses while it raises PassingError, n_attempts times without progress."""
    stopped, n_failures = stopped or threading.Event(), 0
    while True:
        before = progress()
        try:
            return attempt()
        except PassingError as error:
            n_failures = 1 if progress() - before >= 2**16 else n_failures + 1
            if n_failures == n_attempts or stopped.is_set():
                raise
            stopped.wait(pause_before(n_failures, pause, error.retry_after))


def pause_before(n_failures, pause, retry_after=""):
    """Seconds to wait: twice as long after each failure, but as the server asks, and random, so that clients part."""
    asked = int(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else 0
    return min(max(pause * 2 ** (n_failures - 1), asked) * random.uniform(1, 1.5), LONGEST_PAUSE)  # noqa: S311


def describe(request, url):
    """What the source says of a file: its size, ETag and MD5 (as Content-MD5 has it), and whether it serves ranges."""
    with request("HEAD", url) as response:
        headers = response.headers
        if not re.fullmatch("[0-9]{1,15}", headers.get("Content-Length", "")):
            raise SourceError("the server does not say how long the file is")
        return {
            "url": url,
            "size": int(headers["Content-Length"]),
            "etag": headers.get("ETag") or headers.get("Last-Modified", ""),
            "md5": headers.get("Content-MD5", ""),
            "in_ranges": headers.get("Accept-Ranges") == "bytes",
        }


def unfinished(remote, path, range_bytes):
    """The ranges [(start, stop), ...] of a file that FILE.part does not hold yet.

    A line [start, stop, SHA-256, URL, ETag] of FILE.part.ranges is believed if its SHA-256 is right, whatever happened
    to the two files, unless the URL has another ETag by now.
    """
    step = range_bytes if remote["in_ranges"] else max(remote["size"], 1)
    todo = {(start, min(start + step, remote["size"])) for start in range(0, remote["size"], step)}
    if not (os.path.isfile(path + ".part") and os.path.isfile(path + ".part.ranges")):
        return sorted(todo)
    with open(path + ".part", "rb") as part, open(path + ".part.ranges", "rb") as record:
        for line in record.read(2**22).splitlines():
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                start, stop, digest, url, etag = json.loads(line)
                if (start, stop) in todo and (url != remote["url"] or etag == remote["etag"]):
                    part.seek(start)
                    if hashlib.sha256(part.read(stop - start)).hexdigest() == digest:
                        todo.remove((start, stop))
    return sorted(todo)


def fetch_file(request, remote, todo, path, n_connections, pause, bar):
    """Fetches the ranges in todo into FILE.part, n_connections at once; FILE.part.ranges tells of each that is there.

    The threads are daemons, so that none that waits for the network keeps an interrupted process alive; what they get
    after this function has ended is written nowhere.
    """
    jobs, results, stopped, lock = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event(), threading.Lock()
    for job in [*todo, *[None] * n_connections]:  # None: no more
        jobs.put(job)
    new = not os.path.exists(path + ".part")
    with open(path + ".part", "w+b" if new else "r+b") as part, open(path + ".part.ranges", "a") as record:
        part.truncate(remote["size"])

        def write(position, block, n_new):
            with lock:
                if stopped.is_set():
                    raise SourceError("stopped")
                part.seek(position)
                part.write(block)
                bar.update(n_new)

        def work():
            try:
                for start, stop in iter(jobs.get, None):
                    digest = fetch_range(request, remote, start, stop, write, pause, stopped)
                    results.put([start, stop, digest, remote["url"], remote["etag"]])
            except Exception as error:  # raised anew in the main thread
                results.put(error)

        try:
            for _ in range(min(n_connections, len(todo))):
                threading.Thread(target=work, daemon=True).start()
            for _ in todo:
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                with lock:
                    part.flush()
                record.write("\n" + json.dumps(result))  # begins a line: the one before may have been cut short
                record.flush()
        finally:
            with lock:
                stopped.set()


def fetch_range(request, remote, start, stop, write, pause, stopped):
    """Fetches bytes start to stop of a file, hands them to write() and returns their SHA-256."""
    digest, position = hashlib.sha256(), start

    def attempt():
        nonlocal digest, position
        if not remote["in_ranges"]:  # from the start again
            write(start, b"", start - position)
            digest, position = hashlib.sha256(), start
        headers = {"Range": f"bytes={position}-{stop - 1}"} if remote["in_ranges"] else {}
        with request("GET", remote["url"], headers=headers) as response:
            check_range(response, remote, position)
            for block in response.iter_content(2**14):
                if len(block) > stop - position:
                    raise DamagedError("more bytes came than were announced")
                write(position, block, len(block))
                digest.update(block)
                position += len(block)
        if position < stop:
            raise PassingError(f"{stop - position} bytes are missing")

    persist(attempt, 6, pause, stopped, lambda: position)
    return digest.hexdigest()


def check_range(response, remote, position):
    """Raises DamagedError unless a response holds what follows position in the file that remote describes."""
    headers = response.headers
    if remote["in_ranges"] and response.status_code == 200:
        remote["in_ranges"] = False
        raise DamagedError("the server ignores ranges")
    if remote["in_ranges"]:
        length = re.fullmatch(rf"bytes {position}-\d+/(\d+)", headers.get("Content-Range", ""), re.ASCII)
        length = length and length[1]
    else:
        length, remote["md5"] = headers.get("Content-Length"), headers.get("Content-MD5", remote["md5"])
    if length != str(remote["size"]) or (headers.get("ETag") or remote["etag"]) != remote["etag"]:
        raise DamagedError("the file changes on the server, or lies about its length")


def verify_and_name(check, name, path, content_md5):
    """Gives FILE.part its name if it is what it should be. Raises DamagedError."""
    fault = check(name, path + ".part")
    if content_md5:
        with open(path + ".part", "rb") as f:
            md5 = hashlib.md5(usedforsecurity=False)
            while chunk := f.read(2**20):
                md5.update(chunk)
        if base64.b64encode(md5.digest()).decode() != content_md5:
            fault = fault or "its MD5 is not that which the server states"
    if fault:
        raise DamagedError(fault)
    with open(path + ".part", "r+b") as f:
        os.fsync(f.fileno())  # so that not even a power cut can leave less under the final name
    os.replace(path + ".part", path)
    os.remove(path + ".part.ranges")


def one_line(error):
    """The text of an error without line breaks, and without the control characters of whoever sent it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
