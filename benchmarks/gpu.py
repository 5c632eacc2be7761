"""Tokens per second on what JAX sees, a GPU or this processor: gpt2.py beside transformers on PyTorch.

    python benchmarks/gpu.py

Batches of prompts are continued greedily, by every contestant in turn, with the same weights in the same process. The
limit is what the memory of the device gives: how often in a second all weights and all keys and values can be read.
"""

import json
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples"))
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np
from bench import MODELS_DIR, make_checkpoint, processor, transformers_folder

import cli
import devices
from gpt2 import generate
from threads import n_weights
from utils import load_encoder_hparams_and_params

HERE = os.path.dirname(os.path.abspath(__file__))


def on(backend, dtype, hparams, params):
    placed = devices.place(params, backend, dtype)
    return lambda prompts, n: np.array(generate(prompts, placed, hparams["n_head"], n, bar=False))


def on_pytorch(dtype, device, folder):
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(transformers_folder(folder), dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config.pad_token_id = 0

    def run(prompts, n):
        ids = torch.tensor(prompts, device=device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": n, "min_new_tokens": n}
        return model.generate(ids, **options, do_sample=False)[:, ids.shape[1] :].cpu().numpy()

    return run


def bytes_per_second():
    """How fast the device that JAX computes on reads its memory: the sum of 1 GiB, the best of ten."""
    import jax

    x, times = jax.numpy.ones(2**28, "float32"), []
    total = jax.jit(lambda x: x.sum())
    for _ in range(11):
        start = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2**30 / min(times)


def limit(bandwidth, params, n_rows, n_slots, itemsize):
    """Tokens per second of n_rows rows with n_slots tokens each, were reading all there is to do."""
    n_numbers = n_weights(params) + n_rows * 2 * len(params["blocks"]) * n_slots * params["wte"].shape[-1]
    return n_rows * bandwidth / (itemsize * n_numbers)


def plot(path, title, rows, speeds):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for i, (name, by_rows) in enumerate(speeds.items()):
        line = (":" if name.startswith("limit") else "-") + "osD^v<>P*X"[i]  # shapes, for who cannot see colours
        axes.plot(rows, [by_rows.get(n, np.nan) for n in rows], line, label=name, color=f"{0.08 * i:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="texts at once", ylabel="tokens per second", title=title)
    axes.set_xticks(rows, rows)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(
    model_size: str = "124M",
    models_dir: str = MODELS_DIR,
    out: str = HERE,
    rows: tuple = (1, 32, 256, 1024),
    n_prompt: int = 10,
    n_tokens_to_generate: int = 64,
    n_long: int = 1000,
    runs: int = 5,
):
    """Measures, prints a table and writes gpu.md, gpu.json and gpu.png.

    Args:
        model_size: 124M, 355M, 774M or 1558M (random weights, made if need be), or any folder in models_dir
        models_dir: the folder that holds the models
        out: the folder to write to
        rows: how many texts at once
        n_prompt: tokens in each prompt
        n_tokens_to_generate: for each
        n_long: tokens in the long prompt, of which the time to the first new token is taken
        runs: how often every contestant has its turn, after one that does not count
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the GPU's memory, too
    import jax
    import torch

    rows = [rows] if isinstance(rows, int) else [*rows]
    folder = os.path.join(os.path.abspath(models_dir), model_size)
    make_checkpoint(folder)
    _, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    is_gpu = jax.default_backend() != "cpu"
    device, dtypes = ("cuda" if torch.cuda.is_available() else "cpu"), ("float32", "bfloat16")
    contestants = {f"gpt2.py, JAX, {dtype}": on("jax", dtype, hparams, params) for dtype in dtypes}
    contestants |= {f"transformers, {dtype}": on_pytorch(dtype, device, folder) for dtype in dtypes}
    if not is_gpu:
        contestants["gpt2.py, NumPy"] = on("numpy", "float32", hparams, params)

    rng, seconds = np.random.default_rng(0), {}
    tasks = [(n, n_prompt, n_tokens_to_generate) for n in rows] + [(1, n_long, 1)]
    for n_rows, length, n_tokens in tasks:
        for run in range(runs + 1):
            prompts = rng.integers(0, hparams["n_vocab"], (n_rows, length)).tolist()
            for name, generated in contestants.items():
                start = time.perf_counter()
                ids = generated(prompts, n_tokens)
                if run:
                    seconds.setdefault((n_rows, length), {}).setdefault(name, []).append(time.perf_counter() - start)
                assert ids.shape == (n_rows, n_tokens), name  # noqa: S101
                print(f"{n_rows} of {length}, {name}: {time.perf_counter() - start:.3f} s", file=sys.stderr)

    medians = {task: {name: statistics.median(times) for name, times in all_.items()} for task, all_ in seconds.items()}
    speeds = {name: {n: n * n_tokens_to_generate / medians[n, n_prompt][name] for n in rows} for name in contestants}
    bandwidth, n_slots = bytes_per_second(), n_prompt + n_tokens_to_generate // 2
    for dtype, itemsize in zip(dtypes, (4, 2), strict=True):
        speeds[f"limit: memory, {dtype}"] = {n: limit(bandwidth, params, n, n_slots, itemsize) for n in rows}
    where = devices.described(devices.place(params, "jax")).rpartition(",")[0]
    lines = [f"# GPT-2 {model_size}: {where}", ""]
    lines += [f"- processor: {processor()}, {os.cpu_count()} cores; memory of the device: {bandwidth / 1e9:.0f} GB/s"]
    lines += [f"- {n_prompt} tokens in, {n_tokens_to_generate} out, the whole call; medians of {runs} turns", ""]
    lines += ["| | " + " | ".join(f"{n} at once, tok/s" for n in rows) + f" | first token of {n_long}, ms |"]
    lines += ["| --- " * (len(rows) + 2) + "|"]
    for name, by_rows in speeds.items():
        first = f"{1000 * medians[1, n_long][name]:.0f}" if name in contestants else "-"
        lines.append(f"| {name} | " + " | ".join(f"{by_rows[n]:.1f}" for n in rows) + f" | {first} |")
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "gpu.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    with open(os.path.join(out, "gpu.json"), "w", encoding="utf-8") as f:
        json.dump(
            {"where": where, "seconds": {f"{n} x {length}": s for (n, length), s in seconds.items()}}, f, indent=1
        )
    plot(os.path.join(out, "gpu.png"), f"GPT-2 {model_size}, {where}", rows, speeds)
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
