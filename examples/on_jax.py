"""How a model learns with JAX, which compiles and differentiates the NumPy model as it stands, on all devices it sees.

The rows of a batch are divided over the devices, and over processes; the weights are on each. This is all that training
asks of a library: begin(), and Learner with its attributes and methods. Another that has the same can stand beside it.
"""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import lora
from training import class_logits, hidden_states, with_dropout

from backends.arrays import matmul
from backends.devices import DeviceError, check, keep_compiled
from cli import fail, mistakes
from gpt2 import transformer_block

# devices and processes


def begin(options):
    """(how many devices there are, whether this is the only process, or the one that writes).

    Ends with one line if there is no device, or if the processes cannot be joined.
    """
    if options["distributed"]:
        join_processes()
    with mistakes(DeviceError):
        check("jax")
    return jax.device_count(), jax.process_index() == 0


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


# losses: (their sum over what counts, how much that is)


def loss(learned, frozen, rows, n_head, scale, dtype, recompute):
    """That of texts or of classes, as the rows are; learned, frozen: see lora.merged.

    Rows may have "masks", [n_rows, 2*n_layer+1, n_embd]: see training.with_dropout.
    """
    params, options = lora.merged(learned, frozen, scale), (n_head, dtype, recompute)
    if "label" in rows:
        return class_loss(params, learned["head"], rows, *options)
    return text_loss(params, rows, *options)


def text_loss(params, rows, n_head, dtype, recompute):
    """(nats of the tokens that count, how many do).

    rows: {"ids": [n_rows, n_seq+1], "counted": [n_rows, n_seq] of 0 and 1}.
    """
    params, masks = jax.tree.map(lambda weights: weights.astype(dtype), (params, rows.get("masks")))
    losses = functools.partial(window_losses, n_head=n_head, recompute=recompute)
    nats = jax.vmap(losses, in_axes=(None, 0, 0))(params, rows["ids"], masks)  # [n_rows, n_seq]
    return (nats * rows["counted"]).sum(), rows["counted"].sum()


def window_losses(params, window, masks, n_head, recompute):  # [n_seq+1] -> [n_seq]
    """Of every token but the first, given those before it: the cross-entropy in nats."""
    params = with_dropout(params, masks)
    x = hidden_states(window[:-1], **params, block=block_of(n_head, recompute))
    logits = matmul(x, params["wte"].T, dtype="float32")  # [n_seq, n_vocab]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, window[1:, None], axis=-1)[:, 0]


def class_loss(params, head, rows, n_head, dtype, recompute):
    """(nats of the right classes, how many texts there are).

    rows: {"ids": [n_rows, n_seq], "last": [n_rows], "label": [n_rows], or, of several labels a text, [n_rows,
    n_classes] of 0 and 1}.
    """
    params, head, masks = jax.tree.map(lambda weights: weights.astype(dtype), (params, head, rows.get("masks")))
    losses = functools.partial(row_loss, n_head=n_head, recompute=recompute)
    nats = jax.vmap(losses, in_axes=(None, None, 0, 0, 0, 0))(
        params, head, rows["ids"], rows["last"], rows["label"], masks
    )
    return nats.sum(), float(len(nats))


def row_loss(params, head, ids, last, label, masks, n_head, recompute):
    """Of one label the cross-entropy; of several the binary cross-entropy, as on_numpy.py has it."""
    params = with_dropout(params, masks)
    logits = class_logits(params, head, ids, last, block_of(n_head, recompute)).astype("float32")
    if label.ndim:
        return optax.sigmoid_binary_cross_entropy(logits, label).mean()
    return -jax.nn.log_softmax(logits)[label]


def block_of(n_head, recompute):
    """transformer_block; with recompute, one of which grad keeps only what goes in, and computes the rest again.

    That (jax.checkpoint, https://arxiv.org/abs/1604.06174) takes less memory, and a third more time.
    """
    block = functools.partial(transformer_block, n_head=n_head)
    return jax.checkpoint(block) if recompute else block


@functools.cache
def compiled_class_logits(n_head):
    """classify's class_logits of rows of ids, [n_rows, n_seq], whose last tokens are at [n_rows]."""
    logits = functools.partial(class_logits, block=block_of(n_head, False))
    return jax.jit(jax.vmap(logits, in_axes=(None, None, 0, 0)))


# steps


def optimizer(learned, n_steps, learning_rate, weight_decay):
    """AdamW (https://arxiv.org/abs/1711.05101) with warm-up and cosine, for gradients clipped at a norm of 1."""
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, n_steps // 50, n_steps)
    matrices = jax.tree.map(lambda weights: weights.ndim > 1, learned)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def update(learned, optimizer_state, frozen, rows, loss, optimizer):
    """(mean loss, learned, optimizer_state) behind a step, to be compiled.

    rows: {name: [accumulate, n_rows, ...]}; the parts are computed one after another, and only their sums are kept.
    """
    nothing = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, learned)
    (total, n, gradients), _ = jax.lax.scan(functools.partial(add_part, loss, learned, frozen), nothing, rows)
    gradients = jax.tree.map(lambda gradient: gradient / n, gradients)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, learned)
    return total / n, optax.apply_updates(learned, updates), optimizer_state


def add_part(loss, learned, frozen, sums, rows):
    (total, n), gradients = jax.value_and_grad(loss, has_aux=True)(learned, frozen, rows)
    return jax.tree.map(jnp.add, sums, (total, n, gradients)), None


class Learner:
    """What learns in a run, and how: one step of AdamW after another.

    learned, frozen: trees of arrays, see lora.merged. settings: the numbers of the recipe, by name.
    is_first: whether this process is the one that writes. state: all that a resumed run needs, a tree of arrays, or,
    before start(), of what has their shapes and dtypes.
    """

    def __init__(self, learned, frozen, n_head, settings):
        self.learned, self.frozen, self.scale = learned, frozen, lora.scale_of(settings)
        self.is_first, self.accumulate = jax.process_index() == 0, settings["accumulate"]
        self.recompute = settings["recompute"]
        options = {key: settings[key] for key in ("dtype", "recompute")}
        self.loss = functools.partial(loss, n_head=n_head, scale=self.scale, **options)
        self.optimizer = optimizer(learned, *(settings[key] for key in ("n_steps", "learning_rate", "weight_decay")))
        self.optimizer_state = jax.eval_shape(self.optimizer.init, learned)
        mesh = Mesh(jax.devices(), ("rows",))
        self.everywhere, self.divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "rows")))

    @property
    def state(self):
        return here((self.learned, self.optimizer_state))

    def start(self, rows, state=None):
        """Puts what there is on the devices, and compiles a step for rows like these.

        state: that of the run to resume. Returns (how many numbers learn, of how many, GB that a step needs).
        """
        keep_compiled(jax)
        if state:
            self.learned, self.optimizer_state = put(state, self.everywhere)
        else:
            self.learned = put(self.learned, self.everywhere)
            self.optimizer_state = jax.jit(self.optimizer.init, out_shardings=self.everywhere)(self.learned)
        self.frozen = put(self.frozen, self.everywhere)
        step = functools.partial(update, loss=self.loss, optimizer=self.optimizer)
        step = jax.jit(step, donate_argnums=(0, 1), out_shardings=self.everywhere)
        arguments = self.learned, self.optimizer_state, self.frozen, put(rows, self.divided)
        self.compiled = compiled(step, self.recompute, *arguments)
        return size(self.learned), size((self.learned, self.frozen)), needs(self.compiled)

    def share(self, which):  # [batch_size] -> [accumulate, n_rows]
        """Those rows of a batch that this process learns from, in parts."""
        return which.reshape(self.accumulate, jax.process_count(), -1)[:, jax.process_index()]

    def update(self, rows, step):
        """The mean loss of a step, a number, which changes what learns. rows: {name: [accumulate, n_rows, ...]}."""
        arguments = self.learned, self.optimizer_state, self.frozen, put(rows, self.divided)
        mean, self.learned, self.optimizer_state = self.compiled(*arguments)
        return float(mean)

    def model(self):
        """(params, learned) as they are now, to evaluate and to save: arrays of this process."""
        learned, frozen = here((self.learned, self.frozen))
        return lora.merged(learned, frozen, self.scale), learned


def put(tree, sharding):
    """NumPy's arrays on the devices; of what is divided, each process brings its own part."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def here(tree):
    """Arrays that are on all devices, as this process has them."""
    return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)


def compiled(function, recompute, *arguments):
    """A function under jit, compiled for arguments like these."""
    # on CPUs, XLA drops the barriers that part what is computed again from what was, and then makes one of the two
    passes = "cse_barrier_expander" if recompute and jax.default_backend() == "cpu" else ""
    return function.lower(*arguments).compile(compiler_options={"xla_disable_hlo_passes": passes})


def size(tree):
    return sum(array.size for array in jax.tree.leaves(tree))


def needs(step):
    """GB that a compiled step takes: the numbers, their gradients and moments, and what is kept for the gradients."""
    memory = step.memory_analysis()
    n_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (n_bytes + memory.temp_size_in_bytes) / 1e9
