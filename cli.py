"""The manners of a command: flags, prompts, stop texts, errors, signals, and text as it is made.

Text goes to stdout, everything else to stderr, in the user's language; a user's mistake is one line there and a status
that is not 0.
"""

import ast
import codecs
import contextlib
import errno
import functools
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import signal
import sys
import threading
import zlib

from backends.checks import check_room
from files.lock import try_lock
from languages import translated, translated_lines

ANSWERS = ("text", "samples", "error")  # what a line of prompts has when it is answered: one of these
ANSWERED = (*ANSWERS, "n_tokens", "finish_reason", "logprobs")  # all that an answer adds
BASIC = ("numpy", "regex", "requests", "tqdm", "fire")  # the packages that gpt2.py needs
CONTINUATION = bytes(range(0x80, 0xC0))  # what follows the first byte of a character in UTF-8
LONGEST = 2**24  # bytes of a prompt: a line of a file that was packed may have any number
# what the library's errors name without dashes, and where: not in what a user wrote
OPTIONS = "n_tokens_to_generate|temperature|top_k|top_p|seed|repetition_penalty|no_repeat_ngram|logprobs|n_samples"
OPTIONS += "|batch_size|sliding_window|backend|dtype|tensor_parallel|n_threads|num_workers|num_cpus|num_gpus|block"
OPTION = re.compile(rf"^(?:{OPTIONS})(?= must | needs | does | \d+ does | [一-鿿])")
WITHIN = r"(?<=see )sliding_window(?=\)$)|(?<=add )temperature(?==1$)|(?<=加上 )temperature(?==1$)"
WITHIN = re.compile(rf"{WITHIN}|(?<=，)(?:{OPTIONS})(?= [一-鿿])")
ON_WINDOWS = os.name == "nt"
CLOSED_PIPE = (errno.EPIPE, errno.EINVAL) if ON_WINDOWS else (errno.EPIPE,)  # what its system calls a pipe that closed
LEAVE = "Ctrl-Z and Enter leave" if ON_WINDOWS else "Ctrl-D leaves"


def fail(message):
    """Ends with one line on stderr and status 1."""
    sys.exit(shown(message))


def note(message):
    """One line on stderr, if there is something to say."""
    if message:
        print(shown(message), file=sys.stderr, flush=True)


def shown(message):
    """What a user reads on one line: the program, and a message in his language, with dashes before what are flags."""
    with_dashes = WITHIN.sub(r"--\g<0>", OPTION.sub(r"--\g<0>", translated(message)))
    return printable(f"{os.path.basename(sys.argv[0])}: {with_dashes}")


def printable(text):
    """A text on one line, without what a terminal would obey: names that come from files may hold anything."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


# before all that commands import besides, which an older Python cannot read
if sys.version_info < (3, 10):  # noqa: UP036  (which knows what pyproject.toml asks for, not what runs)
    fail(f"needs Python 3.10 or newer, and this is {sys.version.split()[0]}")


@contextlib.contextmanager
def mistakes(kind, where=""):
    """Turns errors of one kind, which are the user's, into one line on stderr and status 1."""
    try:
        yield
    except kind as error:
        fail(f"{where}{one_line(error)}")


def one_line(error):
    if isinstance(error, UnicodeDecodeError) and error.encoding == "utf-8":
        return "not valid Unicode text: it must be UTF-8"
    return "not valid Unicode text" if isinstance(error, UnicodeError) else " ".join(str(error).split())


def is_out_of_memory(error):
    """Whether memory has run out, here or, as JAX, CuPy or PyTorch say it, on a device."""
    said = re.search("RESOURCE_EXHAUSTED|out.of.memory|ALLOC_FAILED", str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(said))


# signals


@contextlib.contextmanager
def on_ctrl_c(handler):
    """Has handler answer Ctrl-C for a while. Not where it is ignored, nor in threads, which Python lets catch none."""
    before = signal.getsignal(signal.SIGINT)
    mine = threading.current_thread() is threading.main_thread() and before not in (signal.SIG_IGN, None)
    if mine:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGINT, before)


def end(said, *_):
    """Ends the program at once, wherever it is, without a traceback; said: what the terminal shows."""
    if said and sys.stderr:
        line = f"\n{printable(translated(said))}\n"
        os.write(sys.stderr.fileno(), line.encode(sys.stderr.encoding, "backslashreplace"))
    os._exit(130)


# flags


def run(function, stopped=""):
    """Runs a function as a command, its parameters as flags, with the manners of a command.

    stopped: what Ctrl-C says before it ends the program.
    """
    try:
        with on_ctrl_c(functools.partial(end, stopped)):
            call(function)
    except ModuleNotFoundError as error:
        fail(how_to_install(error.name))
    except MemoryError as error:
        fail(f"not enough memory: {one_line(error) or 'take fewer at once, or a smaller model'}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fail(f"not enough memory on the device: take fewer at once, or a smaller model: {one_line(error):.200}")


def start(*packages):
    """What comes before the other imports of a command, which take a while: Ctrl-C ends it quietly; see need."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as behind nohup
        signal.signal(signal.SIGINT, functools.partial(end, ""))
    need(*packages)


def need(*packages):
    """Ends with one line that says what to do, unless these packages are installed here and NumPy is new enough."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        fail(how_to_install(*missing))
    if "numpy" in packages:
        import numpy

        if int(numpy.__version__.partition(".")[0]) < 2:
            fail(f"NumPy 2.0 or newer is needed, and this is {numpy.__version__}: pip install -U numpy")


def how_to_install(*missing):
    are, packages = "are" if missing[1:] else "is", BASIC if {*missing} & {*BASIC} else missing
    where = "activate its environment, or pip install"
    return f"{', '.join(missing)} {are} not installed here: {where} {' '.join(packages)}"


def call(function):
    """Calls a function with the command line, or shows its help, on streams that a command can write to."""
    for name in ("stdin", "stdout", "stderr"):  # None where the shell has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    try:
        for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
            if hasattr(stream, "reconfigure"):  # a notebook's has none
                stream.reconfigure(encoding=encoding_of(stream), errors=errors)  # what lacks a character gets a ?
        given = arguments(sys.argv[1:], function)
        if given is None:
            show_help(function)
        else:
            words, flags = given
            function(*words, **flags)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (*CLOSED_PIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush would complain
        if error.errno == errno.ENOSPC:
            fail(f"no space left for {error.filename or 'the output'}")
        sys.exit(1)


def show_help(function):
    import fire  # only here: its import takes two thirds of NumPy's time

    name = os.path.basename(sys.argv[0])
    text = fire.helptext.HelpText(function, trace=fire.trace.FireTrace(function, name))
    text = text.replace("-h, --", "--")  # -h is short for --help alone
    print(translated_lines(text, sys.stdout))


def encoding_of(stream):
    """A terminal's own; UTF-8 for files and pipes, which would be as the language of Windows has them.

    Unless PYTHONIOENCODING or PYTHONUTF8 in the environment say otherwise.
    """
    is_chosen = os.environ.get("PYTHONIOENCODING", "").partition(":")[0] or os.environ.get("PYTHONUTF8")
    return stream.encoding if is_chosen or stream.isatty() else "utf-8"


def asks_for_help(argv):
    return any(word in ("-h", "--help") for word in argv)


def is_text(option):
    return option.annotation is str


def arguments(argv, function):
    """(words, {name: value}) to call a function with; None for --help. Ends with one line where they do not fit it."""
    options = inspect.signature(function).parameters
    first, *_ = options.values()  # takes the words that have no flag
    values, words, rest = {}, [], iter(argv)  # values: {name: text}
    for word in rest:
        if not re.match("--|-[a-zA-Z]", word):
            check_dashes(word, options)
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag in ("-h", "--help"):
            return None
        option = option_of(word, flag, options)
        if not equals:
            value = "True" if option.annotation is bool else next(rest, None)
        check_value(flag, value, bool(equals), option, options)
        if option.name.endswith(("_dir", "_file", "out")):
            value = os.path.expanduser(value)  # behind =, the shell leaves ~ as it is
        if option is first:
            words.append(value)
        elif option.name in values:
            fail(f"--{option.name} is given twice")
        else:
            values[option.name] = value
    values = {name: value if is_text(options[name]) else literal(value) for name, value in values.items()}
    if first.kind is first.VAR_POSITIONAL:
        return words, values
    if len(words) > 1:
        if words[0].startswith(("“", "”", "„", "「")):
            fail(f"a shell takes the quote before {words[0]!r:.40} for a letter: use straight ones, as in code")
        fail(f"more than one {first.name}, {words[0]!r} and {words[1]!r}: put one of several words in double quotes")
    for name, option in options.items():
        if option.default is option.empty and name not in values and not (option is first and words):
            fail(f"--{name} is needed (see --help)")
    return words if is_text(first) else [*map(literal, words)], values


def check_dashes(word, options):
    """Ends with one line for a flag whose hyphens a word processor, or a Chinese keyboard, has made dashes."""
    name = word.lstrip("–—−").partition("=")[0].replace("-", "_")
    if name != word and name in options:
        fail(f"{word}: flags begin with two hyphens: --{name}")


def literal(text):
    """What Python makes of a text, such as 40, 0.8, True or [1, 2]; or the text."""
    with contextlib.suppress(SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def option_of(word, flag, options):
    """The parameter that a flag names; one letter is short for the only one that begins with it."""
    name = flag.lstrip("-").replace("-", "_")
    names = [name] if name in options else [option for option in options if name == option[0]]
    if len(names) != 1:
        import difflib

        near = [option for option in options if name and option.startswith(name)]
        near = near or difflib.get_close_matches(name, options, 2)
        first, *_ = options
        hint = " or ".join(f"--{option}" for option in near)
        hint = f"did you mean {hint}?" if near else f"text that begins so is given as --{first}={word!r}"
        fail(f"unknown flag {word} (see --help); {hint}")
    return options[names[0]]


def check_value(flag, value, has_equals, option, options):
    """Ends with one line for a flag without its value, or with one that is another flag."""
    if value is None or (value == "" and option is not next(iter(options.values()))):
        fail(f"{flag} needs a value")
    is_flag = value.startswith("--") and not has_equals
    if is_flag and (not is_text(option) or value[2:].partition("=")[0] in options):
        fail(f"{flag} needs a value")
    if option.annotation is bool and value not in ("True", "False"):
        fail(f"--{option.name} must be True or False, not {value!r}")


def check_writable(path):
    """Ends with one line if there can be no file at path: better now than when all is computed."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder):
        fail(f"{path} cannot be written: {'it is a folder' if os.path.isdir(path) else 'no such folder'}")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        fail(f"{path} cannot be written: permission denied")


# prompts and stop texts


def check_flags(prompt, interactive, prompts_file, stream, n_samples, batch_size, out, logprobs, seed, temperature):
    """Ends with one line for flags that contradict each other or would do nothing."""
    modes = {"interactive": interactive, "prompts_file": prompts_file, "stream": stream, "n_samples": n_samples > 1}
    modes = [mode for mode, wanted in modes.items() if wanted]
    for name, given in {"batch_size": batch_size, "out": out, "logprobs": logprobs}.items():
        if given is not None and not prompts_file:
            fail(f"--{name} does nothing without --prompts_file")
    if out == "-":
        fail("--out names a file: without it, answers go to standard output")
    if (out or "").lower().endswith(".gz"):
        fail(f"--out {out} would be text, and no file of gzip: choose another name")
    if isinstance(seed, list):
        fail(f"--seed must be a whole number, 0 or more, not {seed!r}")
    if len(modes) > 1 and modes not in (["interactive", "stream"], ["prompts_file", "n_samples"]):
        fail(f"--{modes[0]} and --{modes[1]} do not go together")
    if prompt is not None and (interactive or prompts_file):
        fail(f"--{modes[0]} brings its own prompts, so {prompt!r} is one too many")
    if n_samples > 1 and temperature == 0:
        fail("--n_samples does nothing at a temperature of 0, which takes the likeliest token: add --temperature=1")


def open_prompts(prompt, interactive, prompts_file):
    """The prompt as it was typed, or standard input for -, and for none in a pipe; or the lines of prompts_file."""
    if prompts_file:
        return open_lines(prompts_file)
    if prompt == "-" or (prompt is None and not interactive and not sys.stdin.isatty()):
        try:
            text = line_text(open_lines("-").read())
        except UnicodeDecodeError:
            fail("standard input is not UTF-8 text: convert it, or set PYTHONIOENCODING, which is of the output, too")
        prompt = text if text or prompt == "-" else None
    if prompt is None and not interactive:
        fail("no prompt: give one in quotes, pipe one in, or see --help")
    return prompt


def open_lines(path):
    """A file, or standard input for -, of lines of bytes, in UTF-8, past the byte order mark that some editors write.

    One in .gz is unpacked as it is read. Ends with one line if it cannot be read.
    """
    try:
        if path.lower().endswith(".gz"):
            import gzip  # takes longer than all other imports here

            lines = io.BufferedReader(Unpacked(gzip.GzipFile(path), path))
        else:
            lines = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
        encoding = encoding_of(sys.stdin) if path == "-" else "utf-8"
        if lines.peek(3).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"  # as Windows' PowerShell writes what stands before >
        if codecs.lookup(encoding).name != "utf-8":
            lines = io.BufferedReader(Recoded(lines, encoding, path))
        elif lines.peek(3).startswith(codecs.BOM_UTF8):
            lines.read(3)
        return lines
    except OSError as error:
        fail(f"{path} cannot be read: {why_not(path, error)}")


def why_not(path, error):
    """What an OSError says of a path, but for folders, of which each system says something else."""
    return "it is a folder" if os.path.isdir(path) else error.strerror


@contextlib.contextmanager
def lines_of(path):
    """open_lines() for a while: then a file is closed, and standard input, which others may read, is not."""
    lines = open_lines(path)
    try:
        yield lines
    finally:
        if path != "-":
            lines.close()


class Unpacked(io.RawIOBase):
    """What a file of gzip holds, unpacked as it is read. Ends with one line where the file is damaged."""

    def __init__(self, file, path):
        self.file, self.path = file, path

    def readable(self):
        return True

    def readinto(self, buffer):
        try:
            return self.file.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            fail(f"{self.path} cannot be read: it is no whole file of gzip: {one_line(error)}")

    def close(self):
        self.file.close()
        super().close()


class Recoded(io.RawIOBase):
    """A file of text in any encoding, read as UTF-8. Ends with one line where it is no such text."""

    def __init__(self, file, encoding, path):
        self.text, self.left, self.mark = io.TextIOWrapper(file, encoding, newline=""), b"", codecs.BOM_UTF8
        self.where = f"{'standard input' if path == '-' else path} cannot be read, as {encoding}: "

    def readable(self):
        return True

    def readinto(self, buffer):
        with mistakes(UnicodeError, self.where):
            self.left = self.left or self.text.readline(len(buffer)).encode()  # no more: a terminal gives line by line
        self.left, self.mark = self.left.removeprefix(self.mark), b""
        n = min(len(buffer), len(self.left))
        buffer[:n], self.left = self.left[:n], self.left[n:]
        return n

    def close(self):
        self.text.close()
        super().close()


def as_typed(words):
    """Words as a line for the user's shell: for cmd and PowerShell on Windows, for a POSIX one elsewhere."""
    if os.name == "nt":
        import subprocess

        return subprocess.list2cmdline(words)
    import shlex

    return shlex.join(words)


def line_text(line, errors="strict"):
    """bytes -> str, less the end of the line."""
    return re.sub(r"\r?\n\Z", "", line.decode("utf-8", errors))


def stop_texts(stop):
    """--stop as it was typed -> its texts: one, in which \\n is a line break, or a Python list of several."""
    texts = [] if stop is None else [stop.replace("\\n", "\n")]
    if stop and re.match(r"\[\s*['\"]", stop):
        with mistakes((ValueError, SyntaxError, MemoryError, RecursionError), "--stop is not a list of texts: "):
            texts = ast.literal_eval(stop)
    if not all(isinstance(text, str) and text for text in texts):
        fail("--stop must be a text, or a list of texts, none of them empty")
    with mistakes(UnicodeEncodeError, "--stop is not valid Unicode text: "):
        "".join(texts).encode()
    return texts


# text


def text_pieces(ids, encoder, stop=()):
    """Yields the text of ids as it grows, in whole characters, up to the stop text that is complete first.

    A token may hold a part of a character or of a stop text, so what could still become one is held back.
    """
    decoder, held = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
    for i in itertools.chain(ids, [None]):
        held += decoder.decode(encoder.decode_bytes([i])) if i is not None else decoder.decode(b"", final=True)
        found = [(held.index(text) + len(text), held.index(text)) for text in stop if text in held]
        if found:
            _, start = min(found)  # the one that was complete first
            yield held[:start]
            return
        n_held = 0 if i is None else max((n_begun(held, text) for text in stop), default=0)
        yield held[: len(held) - n_held]
        held = held[len(held) - n_held :]


def n_begun(text, stop):
    """How many characters at the end of text are the beginning of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def show(pieces):
    """Prints text as it is made."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def show_samples(texts):
    """Prints a text as it is, and several under headings."""
    for i, text in enumerate(texts, 1):
        print(text if len(texts) == 1 else f"{'=' * 40} SAMPLE {i} {'=' * 40}\n{text}")


class Writer:
    """Text in, text out: encodes prompts and continues them, up to a stop text.

    generate, generate_ids: those of gpt2.py. stop: texts to end before. special: whether special tokens in prompts are
    read as such. options: what generate takes, with params.
    """

    def __init__(self, encoder, generate, generate_ids, stop=(), special=False, **options):
        self.encoder, self.generate, self.generate_ids, self.stop = encoder, generate, generate_ids, stop
        self.allowed_special = "all" if special else ()
        self.options = {**options, "stop": self.ends}
        self.n_tail = max((len(text.encode()) for text in stop), default=0) + 3  # ids: 3 for the rest of a character
        self.has_begun, self.interrupted = False, False  # interrupted: by Ctrl-C, so that a text ends where it is

    def encode(self, prompt):
        """The ids of a prompt. Raises ValueError if it is no text, or the context has no room for what is to follow."""
        ids = self.encoder.encode(prompt, self.allowed_special) or [self.encoder.encoder["<|endoftext|>"]]
        n_ctx, n_tokens = len(self.options["params"]["wpe"]), self.options["n_tokens_to_generate"]
        check_room(len(ids), n_tokens, n_ctx, self.options["sliding_window"])
        return ids

    def ends(self, ids):
        """Whether a text is to end behind ids: a stop text has appeared, or Ctrl-C was pressed. Asked after each id."""
        self.has_begun = True
        return self.interrupted or self.has_stop(ids)

    def has_stop(self, ids):
        if not self.stop:
            return False
        data = self.encoder.decode_bytes(ids[-self.n_tail :])
        if len(ids) > self.n_tail:
            data = data.lstrip(CONTINUATION)  # of a character that began before
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)  # without a character that is not whole
        return any(stop_text in text for stop_text in self.stop)

    def decode(self, ids):
        return "".join(text_pieces(ids, self.encoder, self.stop))

    def pieces(self, ids):
        """Yields what continues a prompt, as it is made."""
        return text_pieces(self.generate_ids(ids, **self.options), self.encoder, self.stop)

    def answers(self, prompts, seeds):
        """What an answer says of the continuation of each of several prompts, ids, which are made in one batch."""
        outputs = self.generate(prompts, bar=False, **{**self.options, "seed": seeds})
        return [self.answer(ids) for ids in outputs]

    def answer(self, output):
        """output: ids; or with the option logprobs (id, its log-probability, {id: those of the likeliest})."""
        if self.options.get("logprobs") is None:
            ids, told = output, {}
        else:
            ids, told = [i for i, _, _ in output], {"logprobs": [self.told(*token) for token in output]}
        reason = "stop" if self.has_stop(ids) else "length"
        return {"text": self.decode(ids), "n_tokens": len(ids), "finish_reason": reason, **told}

    def told(self, i, logprob, best=None):
        """What JSON says of a token. best: those that it is told beside, {id: log-probability}."""
        token = {"id": i, "token": self.encoder.decode([i]), "logprob": round(logprob, 6)}
        return token if best is None else token | {"top": [self.told(*other) for other in best.items()]}


@contextlib.contextmanager
def ctrl_c_stops(writer):
    """Has Ctrl-C end what writer makes, so that what there is can be shown; then this ends with status 130.

    Before the first id, or pressed again, Ctrl-C ends the program at once.
    """
    with on_ctrl_c(functools.partial(interrupt, writer)):
        yield
    if writer.interrupted:
        sys.exit(130)


def interrupt(writer, *_):
    if writer.interrupted or not writer.has_begun:
        os._exit(130)
    writer.interrupted = True


def converse(writer):
    """Continues prompt after prompt, to their end; Ctrl-C stops a text. Nothing carries over from one to the next."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input its line editing)
    lines = None if sys.stdin.isatty() else open_lines("-")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        print(translated(f"Each prompt is continued on its own. Ctrl-C stops a text, {LEAVE}."), file=sys.stderr)
    with on_ctrl_c(signal.default_int_handler):
        while True:
            try:
                prompt = ask(lines, translated("Model prompt >>> ") if on_terminal else "")
                if prompt is None:
                    return
                continue_one(writer, prompt)
            except KeyboardInterrupt:
                print()


def ask(lines, sign):
    """The next prompt, from lines of bytes or, where they are None, as it is typed behind a sign; None at the end."""
    if lines is not None:
        line = lines.readline()
        return line_text(line, "surrogateescape") if line else None
    try:
        line = input(sign)
        return None if line == "\x04" else line  # Ctrl-D, which to Windows is a character like any other
    except EOFError:
        print()
        return None


def continue_one(writer, prompt):
    """Shows what continues a prompt, or one line that says what is wrong with it: the next may be better."""
    try:
        ids = writer.encode(prompt) if prompt else []
    except ValueError as error:
        return note(one_line(error))
    if ids:
        show(writer.pieces(ids))


def answer_file(writer, lines, path, out, batch_size, n_samples, seed):
    """Prints a JSON object for each of lines, which are bytes, in their order; at the end, fails if any has an "error".

    path: whose lines they are; those of a .jsonl are objects with a "prompt". out: the path of a file to append to
    instead; the lines that it answers already are passed over. Each prompt is continued as it would be alone.
    """
    from files.bar import Bar  # only here: its import takes as long as a token or two

    objects = prompt_objects(bounded(lines), path.lower().removesuffix(".gz").endswith(".jsonl"))
    file, done = open_out(out, path, objects) if out else (sys.stdout, [])
    batch_size = batch_size or 32
    n_done, n_errors, n_at_once = len(done), sum(done), max(1, batch_size // n_samples)
    seeds = [seed if seed is None else seed + i for i in range(n_samples)]
    stopped = f"gpt2.py: stopped; the same command goes on behind the last line of {out}" if out else ""
    with on_ctrl_c(functools.partial(end, stopped)), Bar(desc="prompts", initial=n_done) as bar:
        while window := list(itertools.islice(objects, 4 * n_at_once)):
            for batch in batches_by_length(window, writer.encode, n_at_once):
                rows = [ids for _, ids in batch for _ in range(n_samples)]
                add_answers(window, batch, writer.answers(rows, seeds * len(batch)))
                bar.update(len(batch))
            for line in window:
                Bar.write(json.dumps(line, ensure_ascii=False), file=file)  # clear of the bar
            file.flush()
            n_done, n_errors = n_done + len(window), n_errors + sum("error" in line for line in window)
    if out:
        file.close()  # which others may write to from here on
    if n_errors:
        fail(f'{n_errors} of {n_done} prompts could not be continued: their lines have an "error"')
    if n_done == len(done) > 0:
        note(f"{out} has answers to all of these prompts, and stays as it is")


def bounded(lines):
    """Yields lines, and of one that is longer than any prompt the beginning, LONGEST + 1 bytes, as a line."""
    while line := lines.readline(LONGEST + 1):
        is_cut = len(line) > LONGEST and not line.endswith(b"\n")
        yield line + b"\n" * is_cut
        while is_cut:
            line = lines.readline(LONGEST + 1)
            is_cut = bool(line) and not line.endswith(b"\n")


def prompt_objects(lines, is_json):
    """Yields what prompt_object makes of each line; blank lines of JSON are passed over."""
    return (prompt_object(line, is_json) for line in lines if line.strip() or not is_json)


def prompt_object(line, is_json):
    """A line of bytes -> {"prompt"} and, from JSON, what stands beside it; or with an "error"."""
    text = line_text(line, "replace")
    if len(line) > LONGEST:
        return {"prompt": text[:100], "error": f"more than {LONGEST:,} bytes are no prompt"}
    try:
        fields = json.loads(line_text(line)) if is_json else {"prompt": line_text(line)}
    except (ValueError, RecursionError) as error:
        what = "" if isinstance(error, UnicodeError) else "no JSON: "
        return {"prompt": text, "error": what + one_line(error)}
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        return {"prompt": text, "error": 'no object with a "prompt" that is a text'}
    return {key: value for key, value in fields.items() if key not in ANSWERED}


def batches_by_length(objects, encode, n_at_once):
    """Yields lists of n_at_once (place in objects, ids of its "prompt"); one that encode refuses gets an "error"."""
    waiting = []
    for i, fields in enumerate(objects):
        try:
            waiting += [] if "error" in fields else [(i, encode(fields["prompt"]))]
        except ValueError as error:
            fields["error"] = one_line(error)
    waiting.sort(key=lambda pair: len(pair[1]))  # a batch takes as long as its longest prompt
    for start in range(0, len(waiting), n_at_once):
        yield waiting[start : start + n_at_once]


def add_answers(objects, batch, answers):
    """Adds to those of objects that a batch has, [(place in objects, ids)], its answers, as many for each: samples."""
    n_samples = len(answers) // len(batch)
    for k, (i, _) in enumerate(batch):
        samples = answers[k * n_samples : (k + 1) * n_samples]
        objects[i] |= samples[0] if n_samples == 1 else {"samples": samples}


def open_out(out, path, objects):
    """(the file out to append to, for each line that it has whether that is an error), with objects past those lines.

    A last line that was cut short is removed. Ends with one line if the others do not answer these prompts, or if
    another process is writing them. What cannot seek, such as a pipe, has no lines.
    """
    if os.path.exists(out) and path != "-" and os.path.samefile(out, path):
        fail("--out and --prompts_file are the same file")
    try:
        # backslashes for what is no Unicode: \ud83d is half of an emoji to JSON, and a last line may be cut anywhere
        may_seek = os.path.isfile(out) or not os.path.exists(out)
        mode = "a+" if may_seek else "w"
        file = open(out, mode, encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
        if not may_seek:
            return file, []
        if not try_lock(file):
            fail(f"another process is writing {out}: wait until it has ended, or choose another file")
        file.seek(0)
        whole, done = 0, []
        for line in iter(file.readline, ""):
            if not line.endswith("\n"):
                break
            answered, asked = json.loads(line), next(objects, None)
            if asked is None or {**answered, **asked} != answered or not {*ANSWERS} & {*answered}:
                fail(f"{out} answers other prompts, from line {len(done) + 1} on: choose another file, or delete it")
            whole = file.tell()
            done.append("error" in answered)
        file.truncate(whole)
        return file, done
    except (OSError, ValueError, TypeError, RecursionError) as error:
        fail(f"{out} cannot be added to: {why_not(out, error) if isinstance(error, OSError) else 'it is no JSON'}")


if __name__ == "__main__":
    fail("does nothing by itself: see python gpt2.py --help")
