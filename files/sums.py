"""SHA256SUMS, as `sha256sum` writes it: it vouches for a model that was once verified, so that it need not be again."""

import contextlib
import hashlib
import os
import re

from files.lock import insist

SUMS = "SHA256SUMS"
LINE = r"([0-9a-f]{64})  (hparams\.json|encoder\.json|vocab\.bpe|\w[\w.-]*\.(?:index|data-\d{5}-of-\d{5}))"


def read_sums(model_dir):
    """SHA256SUMS as {name: SHA-256}; {} where there is none.

    Raises ValueError if it is damaged: were it made anew, changes to what it vouched for would be accepted.
    """
    path = os.path.join(model_dir, SUMS)
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            lines = f.read().splitlines()
    except FileNotFoundError:
        return {}
    matches = [match for line in lines if (match := re.fullmatch(LINE, line))]
    sums = {match[2]: match[1] for match in matches}
    least = r"hparams\.json|.*\.index|.*\.data-.*"  # the tokenizer may come later
    if len(sums) < len(lines) or len([name for name in sums if re.fullmatch(least, name)]) < 3:
        raise ValueError(f"{path} is damaged: delete it to have the model verified anew")
    return sums


def write_sums(model_dir, sums, changed):
    """Records that a model is whole, at the time, in ns, at which its data file changed. Raises OSError."""
    path = os.path.join(model_dir, SUMS)
    part = f"{path}.{os.getpid()}"
    try:
        with open(part, "w", encoding="ascii", newline="\n") as f:
            f.writelines(f"{digest}  {name}\n" for name, digest in sums.items())
        os.utime(part, ns=(changed, changed))
        insist(os.replace, part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def recorded_time(model_dir):
    """When, in ns, the data file had changed that SHA256SUMS vouches for; None without SHA256SUMS."""
    path = os.path.join(model_dir, SUMS)
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None


def sums_of(model_dir, names, known=None):
    """{name: SHA-256} of those files of a model that are there. known: the same, of files that take long to hash."""
    known = known or {}
    paths = {name: os.path.join(model_dir, name) for name in names}
    return {name: known.get(name) or hexdigest(path) for name, path in paths.items() if os.path.exists(path)}


def hexdigest(path, algorithm="sha256"):
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
