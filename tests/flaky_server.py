"""A web server on 127.0.0.1 that holds a few files and misbehaves as it is told to."""

import base64
import contextlib
import hashlib
import itertools
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROBE = "bytes=0-0"  # what a client asks for to learn of a file


class Server(ThreadingHTTPServer):
    """files: {name: bytes}, served under any folder.

    faults: {name: [fault, ...]}, spent on one GET after another; probe_faults, on those of PROBE; always: {name:
    fault}, on all other GETs; head: on every HEAD. A fault is a dict of some of:
        status, headers: what to answer instead; wait, trickle: to pause for so many seconds before the answer, or at
        every byte of its head; drop, stall: to stop, or to pause for stall_seconds, after that many bytes; drip: to
        send single bytes so many seconds apart; flip: to change that byte of the file; ignore_range; length: the
        Content-Length to claim.
    elsewhere: {name: URL}, where to be sent instead. etags: sent in turn. log: [(method, name, Range header or None),
    ...]; folders: those that were asked for; most_at_once: of GETs answered together.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files, ranges=True, seconds_per_block=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.seconds_per_block = files, ranges, seconds_per_block
        self.faults, self.probe_faults, self.always, self.head = {}, {}, {}, {}
        self.headers, self.stall_seconds, self.etags = {}, 30, itertools.repeat('"1"')
        self.elsewhere, self.folders = {}, set()
        self.log, self.lock, self.n_at_once, self.most_at_once = [], threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what this is about

    def fault(self, method, name, asked):
        if method == "HEAD":
            return self.head
        with self.lock:
            waiting = (self.probe_faults if asked == PROBE else self.faults).get(name)
            if waiting:
                return waiting.pop(0)
            return {} if asked == PROBE else self.always.get(name, {})

    def asked(self, name):
        """The ranges of a file that were asked for, but for probes."""
        return [what for how, which, what in self.log if (how, which) == ("GET", name) and what != PROBE]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, (folder, name) = self.server, self.path.rsplit("/", 1)
        server.folders.add(folder)
        asked = self.headers["Range"]
        with server.lock:
            server.log.append((self.command, name, asked))
            server.n_at_once += self.command == "GET"
            server.most_at_once = max(server.most_at_once, server.n_at_once)
        try:
            self.answer(server, name, asked, server.fault(self.command, name, asked))
        finally:
            with server.lock:
                server.n_at_once -= self.command == "GET"

    do_HEAD = do_GET  # noqa: N815

    def answer(self, server, name, asked, fault):
        time.sleep(fault.get("wait", 0))
        data = server.files.get(name)
        if name in server.elsewhere:
            fault = {"status": 302, "headers": {"Location": server.elsewhere[name]}}
        status = fault.get("status", 200 if data is not None else 404)
        headers = {"ETag": next(server.etags), **server.headers}
        if status != 200:
            self.close_connection = True
            self.reply(status, {"Content-Length": "0", "Connection": "close", **fault.get("headers", {})}, fault)
            return
        if "flip" in fault:
            data = bytes(byte ^ (i == fault["flip"]) for i, byte in enumerate(data))
        body = data
        if asked and data and server.ranges and not fault.get("ignore_range"):
            start, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            status, body = 206, data[start : last + 1]
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        else:
            digest = hashlib.md5(server.files[name]).digest()  # noqa: S324
            headers = {"Content-MD5": base64.b64encode(digest).decode(), **headers}
        headers["Content-Length"] = fault.get("length", len(body))
        self.reply(status, {**headers, **fault.get("headers", {})}, fault)
        if self.command == "GET":
            self.send(server, body, fault)

    def reply(self, status, headers, fault):
        self.send_response(status)
        for key, value in headers.items():
            if value is not None:
                self.send_header(key, str(value))
        for i in range(len(b"".join(self._headers_buffer)) if "trickle" in fault else 0):
            self.wfile.write(b"".join(self._headers_buffer)[i : i + 1])
            time.sleep(fault["trickle"])
        self.end_headers()

    def send(self, server, body, fault):
        if "drip" in fault:
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                time.sleep(fault["drip"])
            return
        for i in range(0, len(body), 1024):
            block = body[i : i + 1024]
            if "drop" in fault and i + len(block) > fault["drop"]:
                self.wfile.write(block[: fault["drop"] - i])
                self.close_connection = True
                return
            if "stall" in fault and i + len(block) > fault["stall"]:
                time.sleep(server.stall_seconds)
            time.sleep(server.seconds_per_block)
            self.wfile.write(block)
        if "length" in fault:
            self.close_connection = True


@contextlib.contextmanager
def serving(files, **kwargs):
    server = Server(files, **kwargs)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
