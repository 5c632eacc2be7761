"""The page and its questions, over HTTP on 127.0.0.1, for the one who has the address with its secret."""

import contextlib
import hmac
import http.server
import json
import pathlib
import secrets

from explorer.session import QuestionError, as_json

PAGE = pathlib.Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = {f"/{path.name}": path for path in PAGE.iterdir() if path.suffix in TYPES}
FILES["/"] = PAGE / "index.html"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
N_BYTES = 2**16  # of a question


class Server(http.server.ThreadingHTTPServer):
    """Serves the page of a Session on a free port, until shutdown(). url: where, with the secret behind the #."""

    daemon_threads = True

    def __init__(self, session):
        super().__init__(("127.0.0.1", 0), Handler)
        self.session, self.secret = session, secrets.token_urlsafe(32)
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}/#{self.secret}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "explore", ""
    timeout = 60  # seconds that a silent connection is kept

    def handle(self):
        with contextlib.suppress(ConnectionError, TimeoutError):  # a browser that has gone
            super().handle()

    def log_message(self, *_):
        """Says nothing: the terminal is the user's."""

    def do_GET(self):
        path = FILES.get(self.path.partition("?")[0])
        if self.headers.get("Host") not in self.server.hosts:  # a foreign name that was made to point here
            self.refuse(403, "this page is at 127.0.0.1")
        elif path is None:
            self.refuse(404, "there is no such page")
        else:
            self.reply(200, path.read_bytes(), f"{TYPES[path.suffix]}; charset=utf-8")

    def do_POST(self):
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        secret = self.headers.get("X-Secret", "").encode()
        if host not in self.server.hosts or origin != f"http://{host}":
            return self.refuse(403, "only this page may ask")
        if not hmac.compare_digest(secret, self.server.secret.encode()):
            return self.refuse(403, "open the address that explore.py printed: it has the key behind the #")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            return self.refuse(411, "a question needs a length")
        if len(length) > 9 or int(length) > N_BYTES:
            return self.refuse(413, "the text is too long: {0} KiB are the most", N_BYTES // 1024)
        try:
            question = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return self.refuse(400, "a question must be JSON")
        try:
            self.answer(self.path.removeprefix("/api/"), question)
        except QuestionError as error:
            self.refuse(400, error.template, *error.values)
        except MemoryError:
            self.refuse(500, "not enough memory: take a shorter text, or a smaller model")

    def answer(self, kind, question):
        session = self.server.session
        if kind == "array":
            key = question.get("key") if isinstance(question, dict) else None
            self.reply(200, session.array(key).tobytes(), "application/octet-stream")
        else:
            self.reply(200, as_json(session.answer(kind, question)).encode(), "application/json")

    def refuse(self, status, template, *values):
        """The answer is an error: see QuestionError."""
        self.close_connection = True  # whatever else it brings is not read
        told = {"error": template.format(*values), "template": template, "values": values}
        self.reply(status, json.dumps(told).encode(), "application/json")

    def reply(self, status, body, content_type):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
