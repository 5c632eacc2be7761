"""The command line of gpt2.py: what was typed -> prompts -> text on stdout, everything else on stderr."""

import ast
import codecs
import contextlib
import errno
import inspect
import itertools
import json
import os
import re
import signal
import sys

from gpt2 import check_options, check_room, generate, generate_ids

MODELS_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
BATCH = 8  # prompts of a file that are continued at a time


def main(
    prompt: str | None = None,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = MODELS_DIR,
    temperature: float = 0,
    top_k: int = 0,
    top_p: float = 1,
    seed: int | None = None,
    n_samples: int = 1,
    stop: str | None = None,
    prompts_file: str | None = None,
    stream: bool = False,
    interactive: bool = False,
    sliding_window: bool = False,
):
    """Continues a prompt with GPT-2.

    Args:
        prompt: the text to continue; "" generates from nothing, - reads standard input, as does no prompt in a pipe
        n_tokens_to_generate: how many tokens to append
        model_size: 124M, 355M, 774M or 1558M (downloaded on first use), or any folder in models_dir with a checkpoint
        models_dir: the folder that holds the models
        temperature: 0 always takes the likeliest token; 1 draws from the model's probabilities; more is more random
        top_k: with a temperature, draw from the k likeliest tokens only (0: from all)
        top_p: with a temperature, draw from the smallest set of likeliest tokens whose probabilities reach p
        seed: with a temperature, makes the draws repeatable
        n_samples: with a temperature, how many continuations to draw at once
        stop: end before this text appears; several are given as a list, '["User:", "Bot:"]'
        prompts_file: continue every line of this file (-: of standard input); prints a JSON object a line
        stream: print the text as it is made
        interactive: ask for prompt after prompt; Ctrl-C stops a text, Ctrl-D leaves
        sliding_window: past the end of the model's context, go on with the newest half of it as the prompt
    """
    from utils import ModelError, load_encoder_hparams_and_params

    # what is wrong without looking at a model
    with mistakes(ValueError):
        check_options(n_tokens_to_generate, temperature, top_k, top_p)
    if seed is not None and (type(seed) is not int or seed < 0):
        fail(f"seed must be a whole number, 0 or more, not {seed!r}")
    if type(n_samples) is not int or not 1 <= n_samples <= 1000:
        fail(f"n_samples must be a whole number from 1 to 1000, not {n_samples!r}")
    modes = {"interactive": interactive, "prompts_file": prompts_file, "stream": stream, "n_samples": n_samples > 1}
    modes = [mode for mode, wanted in modes.items() if wanted and not (mode == "stream" and interactive)]
    if len(modes) > 1:
        fail(f"--{modes[0]} and --{modes[1]} do not go together")
    if prompt is not None and (interactive or prompts_file):
        fail(f"--{modes[0]} brings its own prompts, so {prompt!r} is one too many")
    if prompts_file:
        lines = read_lines(prompts_file)
    elif not interactive:
        prompt = read_prompt(prompt)
    stop = stop_texts(stop)

    # load encoder, hparams, and params from the released open-ai gpt-2 files
    with mistakes(ModelError):
        encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)

    def encode(prompt, where=""):
        # encode the input string using the BPE tokenizer
        try:
            ids = encoder.encode(prompt) if prompt else [encoder.encoder["<|endoftext|>"]]
        except UnicodeEncodeError:
            fail(f"{where}the prompt is not valid Unicode text")
        # make sure we are not surpassing the max sequence length of our model
        with mistakes(ValueError, where):
            if not sliding_window:
                check_room(len(ids), n_tokens_to_generate, hparams["n_ctx"])
        return ids

    def decode(ids):
        # decode the ids back into a string
        return "".join(text_pieces(ids, encoder, stop))

    model = {"params": params, "n_head": hparams["n_head"], "n_tokens_to_generate": n_tokens_to_generate}
    model |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    model |= {"stop": stop_rule(stop, encoder), "sliding_window": sliding_window}

    if interactive:
        return converse(lambda prompt: text_pieces(generate_ids(encode(prompt), **model), encoder, stop))
    if prompts_file:
        return continue_lines(lines, encode, decode, model)
    if stream:
        return show(text_pieces(generate_ids(encode(prompt), **model), encoder, stop))
    outputs = generate([encode(prompt)] * n_samples, **model)
    if n_samples == 1:
        return decode(outputs[0])
    for i, output_ids in enumerate(outputs, 1):
        print(f"{'=' * 40} SAMPLE {i} {'=' * 40}\n{decode(output_ids)}")


def fail(message):
    """Ends with one line on stderr and status 1."""
    sys.exit(f"{os.path.basename(sys.argv[0])}: {message}")


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
        starts = [text[:n] for text in stop for n in range(len(text)) if i is not None]
        n_held = max((len(start) for start in starts if held.endswith(start)), default=0)
        yield held[: len(held) - n_held]
        held = held[len(held) - n_held :]


def stop_rule(stop, encoder):
    """The function that tells generate_ids, after each token, whether a stop text has appeared."""
    n_bytes = max((len(text.encode()) for text in stop), default=0)  # so the last n_bytes tokens hold it, if any do
    return lambda ids: any(text in encoder.decode(ids[-n_bytes:]) for text in stop)


def stop_texts(stop):
    """--stop as it was typed -> its texts: a Python list of strings is several, anything else is one."""
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        texts = ast.literal_eval(stop)
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            stop = texts
    texts = [stop] if isinstance(stop, str) else stop or []
    if "" in texts:
        fail("stop must not be empty")
    with mistakes(UnicodeEncodeError, "stop is not valid Unicode text: "):
        "".join(texts).encode()
    return texts


def show(pieces):
    """Prints text as it is made."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def converse(continue_prompt):
    """Prompt after prompt, until Ctrl-D; Ctrl-C stops a text."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input its line editing)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(errors="surrogateescape")  # what is no text, encode says
    while True:
        try:
            prompt = input("Model prompt >>> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
            if prompt:
                show(continue_prompt(prompt))
        except KeyboardInterrupt:
            print()
        except SystemExit as mistake:  # in this prompt: the next may be better
            print(mistake, file=sys.stderr)
        except EOFError:
            return print() if sys.stdin.isatty() else None


def continue_lines(prompts, encode, decode, model):
    """Continues prompts in batches and prints a JSON object for each, in their order."""
    from tqdm import tqdm

    stop, seed = model["stop"], model["seed"]
    inputs = [encode(prompt, f"line {i}: ") for i, prompt in enumerate(prompts, 1)]
    with tqdm(desc="prompts", total=len(inputs), disable=None) as bar:
        for start in range(0, len(inputs), BATCH):
            batch = inputs[start : start + BATCH]
            # one seed for all, so that each is continued as it would be alone
            steps = list(generate_ids(batch, **model | {"seed": None if seed is None else [seed] * len(batch)}))
            for row, prompt in enumerate(prompts[start : start + BATCH]):
                ids = [step[row] for step in steps if step[row] is not None]
                reason = "stop" if ids and stop(ids) else "length"
                line = {"prompt": prompt, "text": decode(ids), "n_tokens": len(ids), "finish_reason": reason}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            bar.update(len(batch))


def read_prompt(prompt):
    """The prompt, or standard input in its place, less the newline at its end: for -, or for no prompt in a pipe."""
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        text = re.sub(r"\r?\n\Z", "", read_text("-"))
        prompt = text if text or prompt == "-" else None
    if prompt is None:
        fail("no prompt: give one in quotes, pipe one in, or see --help")
    return prompt


def read_text(path):
    """The text of a file, or of standard input for -."""
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as f:
            return f.read().decode("utf-8-sig")  # without the byte order mark that some editors write
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}")


def read_lines(path):
    """The lines of a file or of standard input; str.splitlines would also cut at odd characters within a line."""
    return re.split(r"\r?\n", re.sub(r"\r?\n\Z", "", text)) if (text := read_text(path)) else []


@contextlib.contextmanager
def mistakes(kind, where=""):
    """Turns errors of one kind, which are the user's, into one line on stderr and status 1."""
    try:
        yield
    except kind as error:
        fail(f"{where}{error}")


def fire_arguments(argv, function=main):
    """The command line as Python Fire must see it: every value behind its flag, and text in quotes.

    Words without a flag are function's first argument, or all of its *arguments; the flag of a bool needs no value.
    Fire reads values as Python literals, so that 1984 or [1, 2] would not stay text; the flag of a bool would take the
    word behind it; and Fire complains of what it cannot place only when function has run, so that ends here.
    """
    options = inspect.signature(function).parameters
    text = next(iter(options))
    many = options[text].kind is inspect.Parameter.VAR_POSITIONAL
    command, argv = [], iter(argv)
    for arg in argv:
        name, equals, value = arg.lstrip("-").partition("=")
        if not re.match("--|-[a-zA-Z]", arg):
            name, equals, value = text, "=", arg
        elif name in ("help", "h"):
            return ["--", "--help"]
        # one letter is short for the one option that begins with it
        names = [option for option in options if name.replace("-", "_") in (option, option[0])]
        if len(names) != 1:
            hint = f"a value that begins so is given as --{text}={arg!r}"
            fail(f"unknown flag {arg} (see --help); {hint}")
        kind = options[names[0]].annotation
        if not equals:
            value = "True" if kind is bool else next(argv, None)
        if value is None or (kind in (int, float) and not equals and value.startswith("--")):
            fail(f"{arg} needs a value")
        if kind is bool and value not in ("True", "False"):
            fail(f"{names[0]} must be True or False, not {value!r}")
        if names == [text] and many:
            command.append(repr(value))
            continue
        if names == [text] and any(word.startswith(f"--{text}=") for word in command):
            fail(f"more than one {text}: put quotes around a {text} of several words")
        command.append(f"--{names[0]}={value!r}" if kind in (str, str | None) else f"--{names[0]}={value}")
    return command


def take_avx512():
    """Has NumPy's OpenBLAS use AVX-512 where Linux says the processor has it; call it before NumPy is imported.

    On processors that it does not know, OpenBLAS takes its AVX2 kernels: half the speed for prompts.
    """
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
        if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= set(f.read(8192).split()):  # the first core's lines
            os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def run(function=main):
    """Runs a function as a command with Python Fire, with the manners of a command."""
    take_avx512()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: at once, wherever we are, without a traceback

    import fire

    for name in ("stdin", "stdout", "stderr"):  # None where the shell has closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character gets a question mark
        fire.Fire(function, command=fire_arguments(sys.argv[1:], function), name=os.path.basename(sys.argv[0]))
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush would complain
        if error.errno == errno.ENOSPC:
            fail("no space left for the output")
        sys.exit(1)
