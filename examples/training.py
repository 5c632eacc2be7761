"""What train.py, finetune.py and classify.py share: texts, windows, and one loop that evaluates, saves and resumes.

The loop knows neither text nor classes. It is handed numbers that learn and others that stay as they are, a loss of
both, rows to learn from, and what to do at an evaluation. JAX compiles and differentiates the NumPy model as it stands,
on one device or on all that JAX sees: the rows of a batch are divided over them, the weights are on each.
"""

import contextlib
import functools
import glob
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import zipfile
import zlib

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from evaluate import scores, text_nats

from backends.arrays import matmul
from backends.devices import keep_compiled
from cli import asks_for_help, fail, mistakes
from files.checkpoint import ENCODER, VOCAB
from gpt2 import generate, layer_norm, transformer_block
from utils import MODEL_SIZES, NEW_NAME


def missing(package):
    if not asks_for_help(sys.argv):  # which needs none
        fail(f"{package} is not installed here, which training needs: pip install -r requirements-dev.txt")


def need(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            missing(package)


try:
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
except ModuleNotFoundError as error:
    missing(error.name)

END, STATE = "<|endoftext|>", "state.npz"
MAY_CHANGE = ("n_steps", "evaluate_every", "accumulate", "recompute")  # when a run is resumed

# flags


def begin(name, models_dir, resume, distributed, settings):
    """(the folder of the new model, or of the one to resume, settings): what a run needs before it looks at its data.

    settings: the numbers of a recipe, by name. Ends with one line for what cannot be.
    """
    for key, value in settings.items():
        if key in ("dtype", "recompute") or value is None:
            continue
        kinds = (int, float) if key in ("learning_rate", "weight_decay", "dropout", "lora_alpha") else (int,)
        may_be_0 = key in ("weight_decay", "dropout", "seed", "lora_rank", "lora_alpha")
        if type(value) not in kinds or not 0 <= value < math.inf or (value == 0 and not may_be_0):
            least = ", 0 or more," if may_be_0 else " above 0,"
            fail(f"--{key} must be a {'number' if float in kinds else 'whole number'}{least} not {value!r}")
    if settings["seed"] >= 2**32:
        fail(f"--seed must be below 2**32, not {settings['seed']}")
    batch_size, accumulate = settings["batch_size"], settings["accumulate"]
    if settings["dtype"] not in ("float32", "bfloat16"):
        fail(f"--dtype must be float32 or bfloat16, not {settings['dtype']!r}")
    if settings["dropout"] >= 1:
        fail(f"--dropout must be below 1, not {settings['dropout']!r}")
    if batch_size % accumulate:
        fail(f"a --batch_size of {batch_size} cannot be cut into {accumulate} equal parts")
    model_dir = new_model(name, models_dir)
    if distributed:
        join_processes()
    n_rows, n_devices = batch_size // accumulate, jax.device_count()
    if n_rows % n_devices:
        fail(f"{n_rows} rows cannot be divided over {n_devices} devices: choose another --batch_size or --accumulate")
    if resume and not os.path.exists(os.path.join(model_dir, STATE)):
        fail(f"there is no run to resume in {model_dir}")
    if not resume and jax.process_index() == 0:  # it alone writes
        refuse_existing(model_dir)
    return model_dir, {**settings, "evaluate_every": settings["evaluate_every"] or -(-settings["n_steps"] // 16)}


def new_model(name, models_dir):
    """The folder for a new model. Ends with one line for a name that cannot be one, or if the model cannot be saved."""
    need("matplotlib")  # which draws the plot
    if not name:
        fail("--name is needed (see --help)")
    if name in MODEL_SIZES:
        fail(f"{name!r} is the name of a model of OpenAI's: choose another for yours")
    if not re.fullmatch(NEW_NAME, name):
        fail(f"{name!r} is no name for a new model: use letters, digits, dashes, and dots but not at the end")
    there = os.path.abspath(models_dir)
    while not os.path.lexists(there):  # what is not there yet is made with the model
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK):
        fail(f"{there} is no folder that can be written to")
    return os.path.join(models_dir, name)


def refuse_existing(model_dir):
    if os.path.exists(os.path.join(model_dir, STATE)):
        fail(f"{model_dir} exists: go on with --resume, choose another name, or delete it")
    if os.path.exists(model_dir) and not (os.path.isdir(model_dir) and {*os.listdir(model_dir)} <= {ENCODER, VOCAB}):
        fail(f"{model_dir} exists: choose another name, or delete it")


def join_processes():
    """Makes this process one of several: as JAX finds them itself (SLURM, Kubernetes, ...), or the environment says."""
    numbers = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        jax.distributed.initialize(
            **{key: int(os.environ[name]) for key, name in numbers.items() if name in os.environ}
        )
    except (ValueError, RuntimeError) as error:
        names = ", ".join(["JAX_COORDINATOR_ADDRESS", *numbers.values()])
        fail(f"the processes cannot be joined: {' '.join(str(error).split())}: see {names}")


def context(n_ctx, hparams):
    """n_ctx as the user has it, or 256 tokens; ends with one line for more than the model sees at once."""
    if n_ctx is not None and n_ctx > hparams["n_ctx"]:
        fail(f"the model sees {hparams['n_ctx']} tokens at once, not {n_ctx}")
    return n_ctx or min(256, hparams["n_ctx"])


# texts


def paths_of(patterns):
    """Files, folders and globs -> files, in order. Ends with one line for one that names no file, or one twice."""
    paths = []
    for pattern in patterns:
        inside = os.path.join(glob.escape(pattern), "**") if os.path.isdir(pattern) else pattern
        found = glob.glob(inside, recursive=True)
        found = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, found))
        if not found:
            fail(f"{pattern} cannot be read: there is no such file, and no files in such a folder")
        paths += found
    places = set()
    for path in paths:
        if (place := os.path.realpath(path)) in places:
            fail(f"{path} is given twice")
        places.add(place)
    return paths


def checksums(files, held_out):
    """[of all that a run learns from, of what it is evaluated on]. held_out: "" for a part of files."""
    held_out = [held_out] if held_out else []
    paths_of([*files, *held_out])  # ends if a file is in both
    return [checksum(paths_of(patterns)) for patterns in (files, held_out)]


def checksum(paths):
    total = 0
    for path in paths:
        with mistakes(OSError), open(path, "rb") as f:
            total = zlib.crc32(f.read(), total)
    return total


def read_text(path):
    """Ends with one line for a file that cannot be read, is not UTF-8, or has nothing in it."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read: {error}")
    if not text:
        fail(f"{path} is empty")
    return text


def read_documents(patterns, *kinds):
    """The documents in files: dicts of texts with the keys of one of kinds, and "where" each is from.

    A file in .jsonl has one on every line, whose other fields are left out. Any other file holds {"text"}, several of
    them parted by <|endoftext|>. Ends with one line that names bad lines by file and number.
    """
    documents = []
    if not patterns:
        fail("no files to learn from (see --help)")
    for path in paths_of(patterns):
        if path.lower().endswith(".jsonl"):
            documents += read_jsonl(path, kinds)
        elif ("text",) in kinds:
            documents += [{"text": text, "where": path} for text in read_text(path).split(END) if text]
        else:
            fail(f"{path} is no .jsonl file")
    if not documents:
        fail(f"{patterns[0]} has no text")
    if odd := [document for document in documents if document.keys() != documents[0].keys()]:
        fail(f"{odd[0]['where']} is of another kind than {documents[0]['where']}")
    return documents


def read_jsonl(path, kinds):
    documents, faults = [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            fields = next((kind for kind in kinds if isinstance(found, dict) and {*kind} <= found.keys()), None)
            if fields is None:
                wanted = " or ".join("{" + ", ".join(f'"{field}"' for field in kind) + "}" for kind in kinds)
                raise ValueError(f"no object with {wanted}")
            document = {field: found[field] for field in fields}
            for field, text in document.items():
                if not isinstance(text, str) or not (text or field in ("prompt", "text")):
                    raise ValueError(f'"{field}" is {text!r:.40}, not a text')
                text.encode()
            documents.append({**document, "where": f"{path}, line {number}"})
        except (ValueError, RecursionError) as error:
            faults[number] = "not valid Unicode text" if isinstance(error, UnicodeError) else error
    if faults:
        (number, fault), *others = faults.items()
        more = f" (lines {', '.join(str(n) for n, _ in others[:10])} are bad, too)" if others else ""
        fail(f"{path}, line {number}: {fault}{more}")
    return documents


def hold_out(texts):
    """(texts to learn from, texts held out): the last tenth of all characters, even if it begins within a text."""
    texts, held_out, n_left = [*texts], [], sum(map(len, texts)) // 10
    if not n_left:
        fail("the text is too short to hold out a tenth of it")
    while n_left:
        text = texts.pop()
        n = min(n_left, len(text))
        held_out.append(text[len(text) - n :])
        texts += [text[:-n]] if n < len(text) else []
        n_left -= n
    return texts, held_out[::-1]


def text_ids(encoder, texts):
    """All ids of texts in one array; <|endoftext|> begins each, as it begins what is generated from nothing."""
    return np.array([i for text in texts for i in (encoder.encoder[END], *encoder.encode(text))])


# rows: a dict of arrays [n_rows, ...], and the order in which epochs take them


def windows_of(ids, n_ctx, batch_size):
    """(order, rows) for batches(): each epoch cuts the text elsewhere, into windows of n_ctx+1 ids, and shuffles them.

    Ends with one line if there are fewer than batch_size.
    """
    n_windows = (len(ids) - 1) // n_ctx - 1  # one less: wherever the first begins, the last is whole
    if n_windows < batch_size:
        fail(
            f"the text is too short for {batch_size} windows of {n_ctx} tokens: it has {len(ids)}: "
            "choose a smaller --n_ctx or --batch_size"
        )

    def rows(starts):
        windows = ids[starts[..., None] + np.arange(n_ctx + 1)]
        return {"ids": windows, "counted": np.ones((*starts.shape, n_ctx), np.float32)}

    return lambda rng: rng.integers(n_ctx) + n_ctx * rng.permutation(n_windows), rows


def shuffled(arrays, batch_size):
    """(order, rows) for batches() of arrays {name: [n_rows, ...]}."""
    (n_rows,) = {len(array) for array in arrays.values()}
    if n_rows < batch_size:
        fail(f"{n_rows} are too few to learn from {batch_size} at once: choose a smaller --batch_size")
    return lambda rng: rng.permutation(n_rows), lambda which: {name: array[which] for name, array in arrays.items()}


def batches(order, batch_size, seed, first_step, n_steps):
    """Yields which rows a step learns from, [batch_size], for every step from first_step to n_steps.

    They follow from seed and step alone, so that a resumed run sees what an uninterrupted one would have.
    """
    n_batches = len(order(np.random.default_rng(0))) // batch_size
    for step in range(first_step, n_steps):
        epoch, i = divmod(step, n_batches)
        if i == 0 or step == first_step:
            rows = order(np.random.default_rng([seed, epoch]))
        yield rows[i * batch_size : (i + 1) * batch_size]


# the model


def hidden_states(ids, wte, wpe, blocks, ln_f, n_head, recompute=False):  # [n_seq] -> [n_seq, n_embd]
    """gpt2() up to its projection to the vocabulary.

    recompute: under JAX's grad, keep only what goes into a block, and compute what is within it again (jax.checkpoint,
    https://arxiv.org/abs/1604.06174): less memory, a third more time.
    """
    run = functools.partial(transformer_block, n_head=n_head)
    run = jax.checkpoint(run) if recompute else run
    x = wte[ids] + wpe[: ids.shape[-1]]
    for block in blocks:
        x = run(x, **block)
    return layer_norm(x, **ln_f)


def token_losses(params, windows, n_head, recompute=False):  # [..., n_seq+1] -> [..., n_seq]
    """Cross-entropy in nats: -log of the probability that the model gives each token of windows but the first."""
    x = hidden_states(windows[..., :-1], **params, n_head=n_head, recompute=recompute)
    logits = matmul(x, params["wte"].T, dtype="float32")  # [..., n_seq, n_vocab]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, windows[..., 1:, None], axis=-1)[..., 0]


def text_loss(params, rows, keys, n_head, dropout, dtype, recompute):
    """(nats of the tokens that count, how many do).

    rows: {"ids": [n_rows, n_seq+1], "counted": [n_rows, n_seq] of 0 and 1}; keys: [n_rows], for dropout.
    """
    params = jax.tree.map(lambda weights: weights.astype(dtype), params)

    def losses(window, key):
        return token_losses(with_dropout(params, dropout, key), window, n_head, recompute)

    return (jax.vmap(losses)(rows["ids"], keys) * rows["counted"]).sum(), rows["counted"].sum()


def with_dropout(params, rate, key):
    """Params whose layer norms silence a random part of their features: gpt2() needs no flag for training.

    The mask is the same at all positions of a window (variational dropout, https://arxiv.org/abs/1512.05287).
    """
    if not rate:
        return params

    def drop(ln, key):
        mask = (jax.random.bernoulli(key, 1 - rate, ln["g"].shape) / (1 - rate)).astype(ln["g"].dtype)
        return {"g": ln["g"] * mask, "b": ln["b"] * mask}

    key, *keys = jax.random.split(key, 1 + 2 * len(params["blocks"]))
    blocks = [
        {**block, "ln_1": drop(block["ln_1"], key_1), "ln_2": drop(block["ln_2"], key_2)}
        for block, key_1, key_2 in zip(params["blocks"], keys[::2], keys[1::2], strict=True)
    ]
    return {**params, "blocks": blocks, "ln_f": drop(params["ln_f"], key)}


def text_evaluator(encoder, texts, n_ctx, n_head):
    """evaluate(params) -> (nats per character of texts held out, a line that says so, with a sample)."""
    ids, n_chars = text_ids(encoder, texts), sum(map(len, texts))

    def evaluate(params):
        params = on_numpy(params) if jax.default_backend() == "cpu" else params  # in smaller batches: less memory
        nats = sum(map(np.sum, text_nats(params, ids, n_ctx, n_head)))
        line = f"held out {nats / (len(ids) - 1):.4f} nats per token, {nats / n_chars:.4f} per character"
        return nats / n_chars, f"{line}\n{sample(encoder, params, n_head)}"

    return evaluate


def completion_evaluator(encoder, examples, n_head):
    """evaluate(params) -> (nats per token of the completions in examples, a line that says so, with a sample)."""
    examples = sorted(examples, key=lambda example: len(example[0]))
    prompt = encoder.decode(examples[0][0][: -examples[0][1]])

    def evaluate(params):
        params = on_numpy(params) if jax.default_backend() == "cpu" else params
        nats = np.concatenate([nats for nats, _ in scores(params, examples, n_head)]).mean()
        line = f"held out {nats:.4f} nats per token\n{indented(prompt)}"
        return nats, f"{line}\n{sample(encoder, params, n_head, prompt)}"

    return evaluate


def on_numpy(params):
    return jax.tree.map(np.asarray, params)


def sample(encoder, params, n_head, prompt="", n_tokens=40):
    """A text that the model makes of a prompt, or of nothing. On NumPy, which compiles nothing."""
    params, end, n_ctx = on_numpy(params), encoder.encoder[END], len(params["wpe"])
    ids, n_tokens = encoder.encode(prompt)[1 - n_ctx :] or [end], min(n_tokens, n_ctx // 2)
    options = {"temperature": 0.8, "seed": 0, "sliding_window": True, "stop": lambda ids: ids[-1] == end}
    ids = [i for i in generate(ids, params, n_head, n_tokens, bar=False, **options) if i != end]
    return indented(encoder.decode(ids))


def indented(text):
    return textwrap.indent(text.strip(), "    ", lambda _: True)


# the loop


def optimizer(learned, n_steps, learning_rate, weight_decay):
    """AdamW (https://arxiv.org/abs/1711.05101) with warm-up and cosine, for gradients clipped at a norm of 1."""
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, n_steps // 50, n_steps)
    matrices = jax.tree.map(lambda weights: weights.ndim > 1, learned)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def update_of(loss, optimizer, seed, accumulate):
    """update(learned, optimizer_state, frozen, rows, step) -> (mean loss, learned, optimizer_state), to be compiled.

    rows: {name: [accumulate, n_rows, ...]}; the parts are computed one after another, and only their sums are kept.
    """

    def update(learned, optimizer_state, frozen, rows, step):
        n_rows = jax.tree.leaves(rows)[0].shape[1]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), accumulate * n_rows)
        parts = (rows, keys.reshape(accumulate, n_rows))

        def add(sums, part):
            (total, n), gradients = jax.value_and_grad(loss, has_aux=True)(learned, frozen, *part)
            return jax.tree.map(jnp.add, sums, (total, n, gradients)), None

        nothing = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, learned)
        (total, n, gradients), _ = jax.lax.scan(add, nothing, parts)
        gradients = jax.tree.map(lambda gradient: gradient / n, gradients)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, learned)
        return total / n, optax.apply_updates(learned, updates), optimizer_state

    return update


def train(model_dir, tokenizer_dir, learned, frozen, loss, data, evaluate, save, settings, resume, unit, scale=1.0):
    """Learns from the rows of data, and leaves the best state in model_dir.

    learned, frozen: trees of arrays; loss(learned, frozen, rows, keys) -> (sum, number), whose ratio is to fall.
    data: (order, rows), see windows_of. evaluate(learned, frozen) -> (what is to fall, in units, and a line to show).
    save(learned, frozen): writes the model into model_dir, which has the tokenizer's files from tokenizer_dir.
    settings: a run is resumed with the same ones only, but for MAY_CHANGE. unit: what is plotted, scale * loss.
    """
    order, rows_of = data
    n_steps, batch_size, accumulate = (settings[key] for key in ("n_steps", "batch_size", "accumulate"))
    state_path, is_first = os.path.join(model_dir, STATE), jax.process_index() == 0
    mesh = Mesh(jax.devices(), ("rows",))
    everywhere, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "rows")))

    def put(tree, sharding):  # each process brings its own part
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)

    def here(tree):
        return jax.tree.map(lambda x: x.addressable_data(0), tree)

    def rows_at(which):
        which = which.reshape(accumulate, jax.process_count(), -1)[:, jax.process_index()]
        return put(rows_of(which), divided)

    def say(text):
        if is_first:
            tqdm.write(text, sys.stderr)

    # where it begins
    adamw = optimizer(learned, n_steps, settings["learning_rate"], settings["weight_decay"])
    step, history, losses = 0, [], []
    if resume:
        arrays = learned, jax.eval_shape(adamw.init, learned)
        step, history, losses, (learned, optimizer_state) = load_state(state_path, settings, arrays)
        optimizer_state = put(optimizer_state, everywhere)
    learned, frozen = put(learned, everywhere), put(frozen, everywhere)
    if not resume:
        optimizer_state = jax.jit(adamw.init, out_shardings=everywhere)(learned)
    keep_compiled(jax)
    update = update_of(loss, adamw, settings["seed"], accumulate)
    update = jax.jit(update, donate_argnums=(0, 1), out_shardings=everywhere)
    rows = rows_at(next(batches(order, batch_size, settings["seed"], 0, 1)))  # any: their shapes are all the same
    update = compiled(update, settings["recompute"], learned, optimizer_state, frozen, rows, np.int32(0))
    say(f"{size(learned):,} of {size((learned, frozen)):,} numbers learn; a step needs about {needs(update):.2g} GB")

    def save_run():
        if is_first:
            os.makedirs(model_dir, exist_ok=True)
            for name in (ENCODER, VOCAB):
                if not os.path.exists(os.path.join(model_dir, name)):
                    shutil.copyfile(os.path.join(tokenizer_dir, name), os.path.join(model_dir, name))
            save_state(state_path, settings, step, history, losses, here((learned, optimizer_state)))

    def look():
        value, line = evaluate(here(learned), here(frozen))
        say(f"step {step}: {line}")
        if not math.isfinite(value):
            fail(f"the loss is no number any more at step {step}: the --learning_rate is too high")
        with uninterrupted():
            if is_first and all(value < earlier for _, _, earlier in history):
                save(here(learned), here(frozen))
            history.append([step, scale * float(np.mean(losses)) if losses else None, value])
            losses.clear()
            if is_first:
                plot(os.path.join(model_dir, "loss.png"), history, unit)
            if step:
                save_run()

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if not history:
            save_run()  # so that whatever ends the run, it can be resumed
            look()
        elif step > history[-1][0] and (step % settings["evaluate_every"] == 0 or step == n_steps):
            look()  # Ctrl-C came while that was done
        first_step, seconds = step, 0.0
        steps = batches(order, batch_size, settings["seed"], step, n_steps)
        for rows in tqdm(map(rows_at, steps), "training", n_steps, initial=step, unit="step", disable=None):
            started = time.monotonic()
            with uninterrupted():  # the old weights are given away before the new ones are there
                mean, learned, optimizer_state = update(learned, optimizer_state, frozen, rows, np.int32(step))
                losses.append(float(mean))
                step += 1
            seconds += time.monotonic() - started
            if step == first_step + 10:
                minutes = seconds / 10 * (n_steps - step) / 60
                say(f"a step takes {seconds / 10:.2g} s: {minutes:.1f} minutes to go, and evaluations")
            if step % settings["evaluate_every"] == 0 or step == n_steps:
                look()
    except KeyboardInterrupt:
        with uninterrupted():
            save_run()
        say(f"stopped at step {step} of {n_steps}, which is saved; to go on: {command_to_resume()}")
        os._exit(130)
    step, _, value = min(history, key=lambda entry: entry[2])
    say(f"{model_dir} has the weights of step {step}: {value:.4f} {unit}")


def compiled(function, recompute, *arguments):
    """A function under jit, compiled for arguments like these."""
    # on CPUs, XLA drops the barriers that part what is computed again from what was, and then makes one of the two
    passes = "cse_barrier_expander" if recompute and jax.default_backend() == "cpu" else ""
    return function.lower(*arguments).compile(compiler_options={"xla_disable_hlo_passes": passes})


def size(tree):
    return sum(array.size for array in jax.tree.leaves(tree))


def needs(update):
    """GB that a compiled step takes: the numbers, their gradients and moments, and what is kept for the gradients."""
    memory = update.memory_analysis()
    n_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (n_bytes + memory.temp_size_in_bytes) / 1e9


def command_to_resume():
    return shlex.join([*sys.orig_argv, *["--resume"][: "--resume" not in sys.argv]])


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C waits until what is within has been done; pressed again, it ends the program at once."""
    presses = []
    handler = signal.signal(signal.SIGINT, lambda *_: os._exit(130) if presses else presses.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if presses:
        raise KeyboardInterrupt


def save_state(path, settings, step, history, losses, arrays):
    """Writes all that a resumed run needs into one .npz file. arrays: any tree of them."""
    leaves = {f"array_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(arrays))}
    try:
        with open(path + ".part", "wb") as f:
            np.savez(f, progress=json.dumps([settings, step, history, losses]), **leaves)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".part")
        raise OSError(error.errno, error.strerror, path) from error
    os.replace(path + ".part", path)


def refuse_others(settings, saved):
    """Ends with one line unless a run was saved with the same settings, but for MAY_CHANGE."""
    for key, value in settings.items():
        if key in MAY_CHANGE or saved.get(key) == value:
            continue
        if key == "data":
            fail("the run to resume learned from other data, or was made by another version")
        fail(f"the run to resume has {key}={saved.get(key)}, not {value}")


def load_state(path, settings, arrays):
    """(step, history, losses, arrays) as save_state wrote them; arrays: a tree like it.

    Ends with one line if it cannot be read, if the settings were others, or if there are no steps left to make.
    """
    try:
        with np.load(path, allow_pickle=False) as state:
            saved_settings, step, history, losses = json.loads(str(state["progress"]))
            refuse_others(settings, saved_settings)
            leaves = [state[f"array_{i}"] for i in range(len(jax.tree.leaves(arrays)))]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        fail(f"the run cannot be resumed from {path}: {error}")
    if settings["n_steps"] <= step and (settings["n_steps"] < step or (history and history[-1][0] == step)):
        fail(f"the run has made {step} steps already: to add some, give a larger --n_steps")
    if settings["n_steps"] != saved_settings["n_steps"]:
        was, now = saved_settings["n_steps"], settings["n_steps"]
        tqdm.write(f"{now} steps instead of {was}: the learning rate goes on as in a run of {now}", sys.stderr)
    return step, history, losses, jax.tree.unflatten(jax.tree.structure(arrays), leaves)


def plot(path, history, unit):
    """Draws the loss curves; history: [step, training or None, held-out]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    training = [(step, loss) for step, loss, _ in history if loss is not None]
    if training:
        axes.plot(*zip(*training, strict=True), ".-", label=f"training: {training[-1][1]:.3f} at last")
    steps, _, held_out = zip(*history, strict=True)
    axes.plot(steps, held_out, ".-", label=f"held out: {min(held_out):.3f} at best")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")
