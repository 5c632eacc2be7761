"""gpt2() with a cache, by the library of its arrays: on_numpy.py has NumPy's and CuPy's, on_jax.py has JAX's.

Each has one class, Model, of the same shape:

    Model(gpt2, params, n_head, n_rows, n_slots)      a cache of n_slots tokens for each of n_rows texts
    .logits(rows, n_past, n_last=1)                   -> [n_rows, n_last, n_vocab]
    .next_ids(rows, n_past, n_steps, sampler)         -> the ids that follow: [n_rows] a step, for 1 to n_steps steps

rows: n_rows lists of ids, which follow the first n_past[row] tokens that the cache has of each. Of several rows, those
that bring more than one id are new: they begin at slot 0.
"""

from backends.arrays import is_jax, on_processor


def with_cache(gpt2, params, n_head, n_rows, n_slots, greedy=False):
    """A Model of the library that params are of. Raises MemoryError where it would not fit.

    greedy: only the likeliest ids will be asked for; for one text on a processor, prompt lookup then finds them faster.
    """
    if is_jax(params["wte"]):
        from backends.on_jax import Model
    else:
        from backends.on_numpy import Model
    model = Model(gpt2, params, n_head, n_rows, n_slots)
    if greedy and n_rows == 1 and on_processor(params["wte"]) and params["wte"].dtype.itemsize >= 4:
        from backends.lookup import Lookup

        return Lookup(model)
    return model
