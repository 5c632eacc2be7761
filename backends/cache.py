"""The cache of keys and values, and its one rule: a token's slot is its position, in every row of a batch.

A key in slot j is hidden from a query in slot s if and only if j > s. That is the causal mask, the end of a row that is
shorter than others, the unfilled part of the cache, padding on the right, and a draft that was refused.
"""

from backends.arrays import is_jax, is_numpy, namespace


class Cache:
    """The keys and values of one block: k, v: [..., n_head, n_slots, n_embd/n_head]."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def update(self, k, v, slots):  # 2 of [n_head, n_seq, d], [n_seq] -> 2 of [n_head, n_slots, d]
        """Puts new keys and values into their slots, and returns all. slots: [n_rows, n_seq] where rows differ."""
        self.k, self.v = write(self.k, slots, k), write(self.v, slots, v)
        return self.k, self.v

    def up_to(self, slot):
        """A view of what lies before a slot: the model need not look at what is not filled yet."""
        return Cache(self.k[..., :slot, :], self.v[..., :slot, :])


def write(array, slots, new):  # [n_head, n_slots, d], [n_seq], [n_head, n_seq, d] -> [n_head, n_slots, d]
    """The array with new in its slots, which follow one another: in place where arrays can be changed."""
    if slots.ndim > 1:  # indices with a slice between them come first: [n_rows, n_seq, n_head, d]
        rows = namespace(slots).arange(len(slots))[:, None]  # [n_rows, 1]
        where, new = (rows, slice(None), slots), new.swapaxes(-3, -2)
    elif is_numpy(array):  # which copies to a slice in half the time; a GPU would be waited for, to know the numbers
        where = (..., slice(int(slots[0]), int(slots[-1]) + 1), slice(None))
    else:
        where = (..., slots, slice(None))
    if is_jax(array):
        return array.at[where].set(new, mode="drop")  # padding may reach beyond the last slot
    array[where] = new
    return array


def empty_cache(params, n_head, n_rows, n_slots):
    """A Cache for every block, of [n_rows, n_head, n_slots, n_embd/n_head], on NumPy or CuPy."""
    wte = params["wte"]
    shape = len(params["blocks"]), 2, n_rows, n_head, n_slots, wte.shape[-1] // n_head
    # views of one array: on Linux, NumPy puts those of 4 MiB and more in huge pages, which are faster to read
    return [Cache(k, v) for k, v in namespace(wte).zeros(shape, wte.dtype)]
