"""A step of training, here on NumPy and on JAX, and in PyTorch: the same random weights, texts and optimizer.

    python benchmarks/step.py                     # the 124M shape, 1 x 512 tokens
    python benchmarks/step.py shakespeare 8 256   # that of models/shakespeare, 8 x 256 tokens

Each contestant is a process of its own; they take turns, step by step, because a shared machine's speed drifts. The
first step of each, which compiles, does not count. Printed are the median seconds of a step, the median of its ratio to
NumPy's in the same turn, and the peak memory of the process.
"""

import json
import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHAPES = {
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "quarter": {"n_vocab": 12564, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 3},
    "shakespeare": {"n_vocab": 1024, "n_ctx": 256, "n_embd": 160, "n_head": 5, "n_layer": 4},
}
N_TURNS = 4
RATE, DECAY, BETAS = 1e-4, 0.01, (0.9, 0.99)


def of_numpy(hparams, params):
    from backward import lm_loss_and_gradients

    def step(ids):
        loss, gradients = lm_loss_and_gradients(params, ids, hparams["n_head"])
        return loss

    return step


def of_jax(hparams, params):
    import jax
    import jax.numpy as jnp
    import optax

    from gpt2 import gpt2

    def loss(params, ids):
        logits = gpt2(ids[:, :-1], **params, n_head=hparams["n_head"])
        nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return nats.mean()

    if os.environ.get("NOADAM"):
        vg = jax.jit(jax.value_and_grad(loss))
        params = jax.tree.map(jnp.asarray, params)

        def step(ids):
            l, g = vg(params, ids)
            jax.block_until_ready(g)
            return float(l)

        return step

    matrices = jax.tree.map(lambda x: x.ndim > 1, params)
    adamw = optax.adamw(RATE, *BETAS, weight_decay=DECAY, mask=matrices)
    adamw = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def update(params, state, ids):
        value, gradients = jax.value_and_grad(loss)(params, ids)
        updates, state = adamw.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    update = jax.jit(update, donate_argnums=(0, 1))
    learned = jax.tree.map(jnp.asarray, params), jax.jit(adamw.init)(params)

    def step(ids):
        nonlocal learned
        value, *learned = update(*learned, ids)
        jax.block_until_ready(learned)
        return float(value)

    return step


def of_torch(hparams, params):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    names = {
        "vocab_size": "n_vocab",
        "n_positions": "n_ctx",
        "n_embd": "n_embd",
        "n_head": "n_head",
        "n_layer": "n_layer",
    }
    config = {theirs: hparams[ours] for theirs, ours in names.items()}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**config, **off))
    own = model.state_dict()
    with torch.no_grad():
        own["transformer.wte.weight"].copy_(torch.from_numpy(params["wte"]))
        own["transformer.wpe.weight"].copy_(torch.from_numpy(params["wpe"]))
        for i, block in enumerate(params["blocks"]):
            for a, part in block.items():
                for b, value in part.items():
                    if isinstance(value, dict):
                        for c, name in (("w", "weight"), ("b", "bias")):
                            own[f"transformer.h.{i}.{a}.{b}.{name}"].copy_(torch.from_numpy(value[c]))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY)

    def step(ids):
        ids = torch.from_numpy(ids)
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not os.environ.get("NOADAM"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return loss.item()

    return step


CONTESTANTS = {"numpy": of_numpy, "jax": of_jax, "torch": of_torch}


def contestant(which, shape):
    """Makes a step for every line of ids that is read, and prints (seconds, loss, peak memory in GiB)."""
    sys.path.insert(0, ROOT)
    import resource

    from backends.threads import tune_openblas  # noqa: F401

    import numpy as np

    from files.checkpoint import random_params

    step = CONTESTANTS[which](SHAPES[shape], random_params(SHAPES[shape], 0))
    for line in sys.stdin:
        ids, started = np.array(json.loads(line)), (time.process_time if os.environ.get("CPU") else time.perf_counter)()
        loss = float(step(ids))
        seconds = (time.process_time if os.environ.get("CPU") else time.perf_counter)() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps([seconds, loss, peak]), flush=True)


def main(shape="124M", n_rows=1, n_seq=512, which=",".join(CONTESTANTS)):
    import random

    which = which.split(",")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([sys.executable, __file__, "--", name, shape], **pipes) for name in which}
    draw, turns = random.Random(0), []
    for turn in range(1 + N_TURNS):
        ids = [[draw.randrange(SHAPES[shape]["n_vocab"]) for _ in range(int(n_seq) + 1)] for _ in range(int(n_rows))]
        found = {}
        for name, process in running.items():
            print(json.dumps(ids), file=process.stdin, flush=True)
            found[name] = json.loads(process.stdout.readline())
        print(turn, found, file=sys.stderr)
        turns.append(found)
    for process in running.values():
        process.stdin.close()
        process.wait()
    for name in which:
        seconds = statistics.median(turn[name][0] for turn in turns[1:])
        ratio = statistics.median(turn[name][0] / turn[which[0]][0] for turn in turns[1:])
        print(f"{name:6} {seconds:8.3f} s  {ratio:6.2f}  {turns[-1][name][2]:6.2f} GiB")


if __name__ == "__main__":
    contestant(*sys.argv[2:]) if sys.argv[1:2] == ["--"] else main(*sys.argv[1:])
