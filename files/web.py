"""HTTP to servers, and over networks, that cannot be trusted: one session, whose failures are one line each.

Files come over https alone, or from this machine; no answer is waited for without end, and what fails is a
PassingError if another attempt may help, and else a DownloadError.
"""

import contextlib
import importlib.util
import ipaddress
import os
import re
import threading
import time
import urllib.parse

PROXIES = ("http", "https", "socks4", "socks4a", "socks5", "socks5h")  # what requests takes


class DownloadError(Exception):
    """A download failed: one line for the user, with the file, its URL and the cause."""


class PassingError(DownloadError):
    """A failure that may pass: worth another attempt; retry_after: the header of that name."""

    def __init__(self, message, retry_after=""):
        super().__init__(message)
        self.retry_after = retry_after


class Client:
    """A session with servers. timeout, quiet: seconds, see Tuning; progress: its note(text) tells of a long silence."""

    def __init__(self, timeout, quiet, progress):
        import requests  # takes its time

        self.session, self.timeout, self.quiet, self.progress = requests.Session(), timeout, quiet, progress
        self.session.get_redirect_target = lambda response: None  # open() follows them

    def close(self):
        self.session.close()

    @contextlib.contextmanager
    def open(self, method, url, headers=()):
        """The response to a request, redirects followed. Raises DownloadError, PassingError if a retry may help."""
        headers = {"Accept-Encoding": "identity", **dict(headers)}
        for _ in range(6):
            with self.answer(method, url, headers) as response:
                if not response.is_redirect:
                    check_status(response)
                    yield response
                    return
                location = response.headers["Location"]
            with network_errors():
                url = urllib.parse.urljoin(url, location)
        raise DownloadError("too many redirects")

    def answer(self, method, url, headers):
        """The response to one request; it is left behind in its thread if it takes longer than any timeout allows.

        A name server and trickling headers know none.
        """
        local, answers = check_url(url), []
        timeouts = (min(self.timeout, 10), self.timeout)
        options = {"headers": headers, "stream": True, "timeout": timeouts}
        options["proxies"] = dict.fromkeys(("http", "https", "all")) if local else None  # None: as the environment says
        thread = threading.Thread(target=self.request, args=(answers, method, url, options), daemon=True)
        thread.start()
        thread.join(min(self.quiet, sum(timeouts)))
        if thread.is_alive():
            self.progress.note("no answer yet")
            thread.join(max(sum(timeouts) - self.quiet, 0))
        if thread.is_alive():
            answers.append(PassingError(f"no answer in {sum(timeouts):.0f} s"))  # unless one comes at this moment
        with network_errors("" if local else url):
            if isinstance(answers[0], Exception):
                raise answers[0]
        return answers[0]

    def request(self, answers, method, url, options):
        """Puts the response into answers, or what went wrong. One that comes too late is closed."""
        try:
            response = self.session.request(method, url, **options)
            answers.append(response)
            if answers[0] is not response:
                response.close()
        except Exception as error:  # raised anew by answer()
            answers.append(error)


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
    local = is_local(host)
    # parsers differ in what they make of odd characters
    if not host or re.search(r"[^!-~]|\\", url) or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise DownloadError(f"{url!r} is refused: files are fetched over https only, or from this machine")
    return local


def is_local(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# proxies


def proxy_of(url):
    """The proxy that the environment or the system has for url, as SCHEME://HOST:PORT, or None."""
    from requests.utils import get_environ_proxies, select_proxy

    try:
        proxy = select_proxy(url, get_environ_proxies(url))
    except ValueError:  # no URL: see check_url
        proxy = None
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def check_proxy(url):
    """Raises DownloadError, which says what to do, if url would be fetched through what cannot be a proxy."""
    proxy = proxy_of(url)
    if not proxy or is_local(urllib.parse.urlsplit(url).hostname):
        return
    try:
        parts = urllib.parse.urlsplit(proxy)
        good = parts.scheme.lower() in PROXIES and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise DownloadError(f"{described(proxy)} is no proxy: it must be http://HOST:PORT or socks5://HOST:PORT")
    if parts.scheme.lower().startswith("socks") and not importlib.util.find_spec("socks"):
        raise DownloadError(f"{described(proxy)} needs PySocks, which is not installed: pip install pysocks")


def described(proxy):
    """A proxy in words: whose setting it is, and its URL without a name and password."""
    names = [name for name in ("https_proxy", "http_proxy", "all_proxy") for name in (name, name.upper())]
    named = [name for name in names if (os.environ.get(name) or "-") in (proxy, proxy.removeprefix("http://"))]
    return f"{' or '.join(named[:1]) or 'the proxy of the system'} ({one_line(re.sub('//.*@', '//', proxy)):.100})"


# errors


@contextlib.contextmanager
def network_errors(url=""):
    """Turns what goes wrong in the libraries below into PassingError, or DownloadError where it is the URL's fault.

    url: what was asked for, so that an error says through which proxy.
    """
    import urllib3

    try:
        yield
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
        proxy = proxy_of(url) if url else None
        through = f"through {described(proxy)}, which may not run, or be another one: " if proxy else ""
        # a ValueError: a host that cannot be, a port that is no number, an unknown scheme
        kind = DownloadError if isinstance(error, ValueError) else PassingError
        raise kind(through + root_cause(error)) from error


def root_cause(error):
    """One short line from the bottom of a chain of exceptions: requests' own texts are long."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__


def one_line(text):
    """A text without line breaks, and without the control characters of whoever sent it."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
