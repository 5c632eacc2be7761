"""A step of training, as examples/ make it on NumPy and on JAX, and one in PyTorch with transformers.

    python benchmarks/step.py                        # the 124M shape, 1 x 512 tokens a step
    python benchmarks/step.py shakespeare 8 256      # the shape of models/shakespeare, 8 x 256 tokens
    python benchmarks/step.py 124M 1 512 numpy,jax   # these contestants alone

All begin with the same random weights, in processes of their own, and take turns, step by step, because a shared
machine's speed drifts. The first two steps, in which JAX compiles, do not count. A line has medians: of the seconds, of
those of all cores together, of both as a part of the first contestant's in the same turn; and the peak memory of the
process. The losses are on stderr: they must agree.
"""

import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "examples")]

SHAPES = {
    "124M": {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
    "shakespeare": {"n_vocab": 1024, "n_ctx": 256, "n_embd": 160, "n_head": 5, "n_layer": 4},
    "quarter": {"n_vocab": 12564, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 3},  # of 124M
}
N_TURNS = 7
RECIPE = {"n_steps": 10**6, "learning_rate": 1e-4, "weight_decay": 0.01, "accumulate": 1}  # so slow a rise is none
RECIPE |= {"dtype": "float32", "recompute": False}


def with_learner(module, hparams, params):
    """step(ids, i) by the Learner of a module of examples/."""
    import numpy as np

    learner = module.Learner({"params": params}, {}, hparams["n_head"], RECIPE)

    def step(ids, i):
        rows = {"ids": ids[None], "counted": np.ones((1, len(ids), ids.shape[1] - 1), np.float32)}
        if i == 0:
            learner.start(rows)
        return learner.update(rows, i)

    return step


def on_numpy(hparams, params):
    import on_numpy

    return with_learner(on_numpy, hparams, params)


def on_jax(hparams, params):
    import on_jax

    return with_learner(on_jax, hparams, params)


def in_pytorch(hparams, params):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": hparams["n_vocab"], "n_positions": hparams["n_ctx"], "bos_token_id": 0, "eos_token_id": 0}
    shape |= {name: hparams[name] for name in ("n_embd", "n_head", "n_layer")}
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    with torch.no_grad():
        for name, x in model.transformer.named_parameters():
            node = functools.reduce(inside, name.replace("h.", "blocks.").split("."), params)
            x.copy_(torch.from_numpy(node))
    matrices, others = ([x for x in model.parameters() if (x.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": RECIPE["weight_decay"]}, {"params": others, "weight_decay": 0}]
    adamw = torch.optim.AdamW(groups, lr=RECIPE["learning_rate"], betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(adamw, lambda i: i / (RECIPE["n_steps"] // 50))

    def step(ids, i):
        ids = torch.from_numpy(ids)
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        rate.step()
        return loss.item()

    return step


def inside(node, key):
    """What lies in params, or in a part of them, under a part of a name of transformers'."""
    if not isinstance(node, dict | list):
        return node  # of "wte.weight", wte is all
    return node[int(key) if key.isdigit() else {"weight": "g" if "g" in node else "w", "bias": "b"}.get(key, key)]


CONTESTANTS = {"numpy": on_numpy, "jax": on_jax, "pytorch": in_pytorch}


def contestant(which, shape):
    """Makes a step for every line of ids on stdin, and prints [seconds, of all cores, loss, peak memory in GiB]."""
    import resource

    from backends.threads import tune_openblas

    tune_openblas()

    import numpy as np

    from files.checkpoint import random_params

    step = CONTESTANTS[which](SHAPES[shape], random_params(SHAPES[shape], 0))
    for i, line in enumerate(sys.stdin):
        ids, started, busy = np.array(json.loads(line)), time.perf_counter(), time.process_time()
        loss = step(ids, i)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        print(json.dumps([seconds, busy, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]), flush=True)


def main(shape="124M", n_rows=1, n_seq=512, which=""):
    names = which.split(",") if which else [*CONTESTANTS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([sys.executable, __file__, "--", name, shape], **pipes) for name in names}  # noqa: S603
    draw, turns = random.Random(0), []  # noqa: S311
    for _ in range(2 + N_TURNS):
        ids = [[draw.randrange(SHAPES[shape]["n_vocab"]) for _ in range(int(n_seq) + 1)] for _ in range(int(n_rows))]
        found = {}
        for name, process in running.items():
            print(json.dumps(ids), file=process.stdin, flush=True)
            found[name] = json.loads(process.stdout.readline())
        print(
            {name: f"loss {loss:.4f}, {seconds:.2f} s" for name, (seconds, _, loss, _) in found.items()},
            file=sys.stderr,
        )
        turns.append(found)
    for process in running.values():
        process.stdin.close()
        process.wait()
    print("            seconds  of all cores  part  of all cores    GiB")
    for name in names:
        columns = [[turn[name][i] for turn in turns[2:]] for i in (0, 1)]
        parts = [[turn[name][i] / turn[names[0]][i] for turn in turns[2:]] for i in (0, 1)]
        seconds, busy, part, busy_part = map(statistics.median, (*columns, *parts))
        print(f"{name:10} {seconds:8.3f} {busy:13.3f} {part:5.2f} {busy_part:13.2f} {turns[-1][name][3]:6.2f}")


if __name__ == "__main__":
    contestant(*sys.argv[2:]) if sys.argv[1:2] == ["--"] else main(*sys.argv[1:])
