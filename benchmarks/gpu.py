"""Tokens per second on what JAX sees, a GPU or this processor: gpt2.py beside transformers on PyTorch.

    python benchmarks/gpu.py

Batches of prompts are continued greedily, by every contestant in turn, in one process and with the same random weights,
which need no file. The limit is what the memory of the device gives: how often in a second all weights, and all keys
and values, can be read.
"""

import importlib.util
import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples"))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -P leaves it out

if __name__ == "__main__":
    from cli import start

    start("numpy", "regex", "tqdm")

import numpy as np
from bench import SHAPES, greedy, processor
from convert import flat

import cli
from backends import devices
from backends.arrays import n_weights
from files.checkpoint import random_params
from files.transformers import transformers_name
from sampling import is_whole

HERE = os.path.dirname(os.path.abspath(__file__))
DTYPES = {"float32": 4, "bfloat16": 2}  # and their bytes


# Contestants: functions (prompts of one length, n) -> ids [n_rows, n]


def on(backend, dtype, hparams, params):
    generate = greedy(devices.place(params, backend, dtype), hparams["n_head"])
    return lambda prompts, n: np.array([*generate(prompts, n)]).T


def on_pytorch(dtype, hparams, params):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"]}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **{name: hparams[name] for name in ("n_embd", "n_head", "n_layer")}))
    arrays = {f"transformer.{transformers_name(name)}": array for name, array in flat(params, hparams).items()}
    arrays["lm_head.weight"] = params["wte"]
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    model = model.to(device, getattr(torch, dtype)).eval()
    model.generation_config.pad_token_id = 0

    def generate(prompts, n):
        ids = torch.tensor(prompts, device=device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n, "min_new_tokens": n}
        ids = model.generate(ids, **options, do_sample=False)[:, ids.shape[1] :].cpu().numpy()
        if device == "cuda":
            torch.cuda.empty_cache()  # others need the memory, too
        return ids

    return generate


def in_memory(function, *args):
    """The result of a function, or None where memory runs out, here or on the device."""
    try:
        return function(*args)
    except (RuntimeError, MemoryError) as error:
        if not cli.is_out_of_memory(error):
            raise
        return None


def bytes_per_second(n=2**28):
    """How fast the device that JAX computes on reads its memory: sums of n float32, ten in a row, the best time of all.

    n: many more than its caches hold, whose speed it would be otherwise.
    """
    import jax

    x, times = jax.numpy.ones(n, "float32"), []
    total = jax.jit(lambda x: x.sum())
    for _ in range(11):
        start = time.perf_counter()
        jax.block_until_ready([total(x) for _ in range(10)])
        times.append((time.perf_counter() - start) / 10)
    return 4 * n / min(times)


def limit(bandwidth, params, n_rows, n_slots, itemsize):
    """Tokens per second of n_rows rows with n_slots tokens each, were reading all there is to do."""
    n_numbers = n_weights(params) + n_rows * 2 * len(params["blocks"]) * n_slots * params["wte"].shape[-1]
    return n_rows * bandwidth / (itemsize * n_numbers)


def markdown(title, notes, rows, speeds, first, n_long):
    """speeds: {name: {n_rows: tokens per second}}. first: {name: seconds to the first token of n_long}."""
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    lines += ["| | " + " | ".join(f"{n} at once, tok/s" for n in rows) + f" | first token of {n_long}, ms |"]
    lines += ["| --- " * (len(rows) + 2) + "|"]
    for name, by_rows in speeds.items():
        cells = [f"{by_rows[n]:.1f}" if n in by_rows else "-" for n in rows]
        lines.append(" | ".join([f"| {name}", *cells, f"{1000 * first[name]:.0f}" if name in first else "-"]) + " |")
    return "\n".join(lines) + "\n"


def plot(path, title, rows, speeds):
    from plots import draw_lines  # and matplotlib, which --help can do without

    options = {"xlabel": "texts at once", "ylabel": "tokens per second", "xscale": "log", "yscale": "log"}
    draw_lines(path, speeds, title=title, **options, xticks=rows, xticklabels=rows)  # a scale takes ticks of its own


def main(
    model_size: str = "124M",
    out: str = HERE,
    rows: tuple = (1, 32, 256, 1024),
    n_prompt: int = 10,
    n_tokens_to_generate: int = 64,
    n_long: int = 1000,
    runs: int = 5,
):
    """Measures, prints a table and writes gpu.md, gpu.json and gpu.png.

    Args:
        model_size: 124M, 355M, 774M or 1558M, of random weights
        out: the folder to write to
        rows: how many texts at once: a number, or several with commas between
        n_prompt: tokens in each prompt
        n_tokens_to_generate: for each
        n_long: tokens in the long prompt, of which the time to the first new token is taken
        runs: how often every contestant has its turn, after one that does not count
    """
    rows = [*rows] if isinstance(rows, tuple | list) else [rows]
    numbers = {"n_prompt": n_prompt, "n_tokens_to_generate": n_tokens_to_generate, "n_long": n_long, "runs": runs}
    for name, value in [*numbers.items(), *(("rows", n) for n in rows)]:
        if not is_whole(value) or value == 0:
            cli.fail(f"--{name} must be a whole number, 1 or more, not {value!r}")
    if not rows:
        cli.fail("--rows needs a number, or several with commas between")
    if model_size not in SHAPES:
        cli.fail(f"--model_size must be {', '.join(SHAPES)}, not {model_size!r}")
    if max(n_prompt + n_tokens_to_generate, n_long + 1) > 1024:
        cli.fail("prompts, and what is generated, must fit the context of 1024 tokens")
    with cli.mistakes(OSError):
        os.makedirs(out, exist_ok=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the GPU's memory, too
    import jax
    import matplotlib  # noqa: F401  (before anything is measured)
    import torch

    if (jax.default_backend() == "gpu") != torch.cuda.is_available():
        which = ("PyTorch", "JAX") if torch.cuda.is_available() else ("JAX", "PyTorch")
        cli.fail(
            "{} sees a GPU, and {} does not: install both for it, or hide it by CUDA_VISIBLE_DEVICES=-1".format(*which)
        )

    n_embd, n_head, n_layer = SHAPES[model_size]
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    params = random_params(hparams)
    contestants = {f"gpt2.py, JAX, {dtype}": (on, "jax", dtype) for dtype in DTYPES}
    contestants |= {f"transformers, {dtype}": (on_pytorch, dtype) for dtype in DTYPES}
    if jax.default_backend() == "cpu":
        contestants["gpt2.py, NumPy"] = on, "numpy", "float32"
    elif importlib.util.find_spec("cupy"):
        contestants["gpt2.py, CuPy"] = on, "cupy", "float32"
    contestants = {name: in_memory(*make, hparams, params) for name, make in contestants.items()}

    where = devices.described(devices.place({"wte": params["wte"][:1]}, "jax")).rpartition(",")[0]
    title, bandwidth, first = f"GPT-2 {model_size}: {where}", bytes_per_second(), {}
    notes = [f"processor: {processor()}, {os.cpu_count()} cores; memory of the device: {bandwidth / 1e9:.0f} GB/s"]
    notes += [f"{n_prompt} tokens in, {n_tokens_to_generate} out, the whole call; medians of {runs} turns"]
    if jax.default_backend() != "cpu":
        from backends.on_jax import STEPS_AHEAD

        notes += [f"JAX makes up to {STEPS_AHEAD} tokens a call"]
    n_slots = n_prompt + n_tokens_to_generate // 2
    limits = {
        f"limit: memory, {dtype}": {n: limit(bandwidth, params, n, n_slots, itemsize) for n in rows}
        for dtype, itemsize in DTYPES.items()
    }
    notes += [f"{name}: not enough memory for the model" for name, generate in contestants.items() if not generate]
    tasks = {f"first token of {n_long}": (1, n_long, 1)}
    tasks |= {f"{n} at once": (n, n_prompt, n_tokens_to_generate) for n in rows}
    speeds, seconds, rng = {name: {} for name in contestants}, {}, np.random.default_rng(0)
    for task, (n_rows, length, n_tokens) in tasks.items():
        times = seconds[task] = {name: [] for name, generate in contestants.items() if generate}
        for run in range(runs + 1):
            prompts, expected = rng.integers(0, hparams["n_vocab"], (n_rows, length)).tolist(), None
            for name in [*times]:
                start = time.perf_counter()
                ids = in_memory(contestants[name], prompts, n_tokens)
                taken = time.perf_counter() - start
                if ids is None:
                    notes.append(f"{name}, {task}: not enough memory")
                    del times[name]
                    continue
                expected = ids if expected is None else expected
                same = (ids == expected).all(axis=-1).mean()
                cli.note(f"{task}, {name}: {taken:.3f} s, the same ids as the first in {same:.0%} of rows")
                times[name] += [taken] if run else []
        for name, all_ in times.items():
            if task.startswith("first"):
                first[name] = statistics.median(all_)
            else:
                speeds[name][n_rows] = n_rows * n_tokens / statistics.median(all_)
        # after every task, so that what ends the program leaves the others
        with open(os.path.join(out, "gpu.json"), "w", encoding="utf-8", newline="\n") as f:
            json.dump({"where": where, "notes": notes, "seconds": seconds}, f, indent=1)
        with open(os.path.join(out, "gpu.md"), "w", encoding="utf-8", newline="\n") as f:
            f.write(markdown(title, notes, rows, speeds | limits, first, n_long))
    print(markdown(title, notes, rows, speeds | limits, first, n_long), end="")
    plot(os.path.join(out, "gpu.png"), title, rows, speeds | limits)


if __name__ == "__main__":
    cli.run(main)
