"""What can be asked of a model, before any work begins: ids that it knows, and room in its context."""

import operator


def as_batch(inputs, n_vocab):
    """(prompts, is_batch): the ids of one prompt or of several as lists of lists, and whether they were several.

    inputs: lists or arrays of any library. Raises TypeError for what is no ids, ValueError for ids that are not in the
    vocabulary and for a prompt without any.
    """
    inputs = inputs.tolist() if hasattr(inputs, "tolist") else inputs
    first = inputs[0] if isinstance(inputs, list | tuple) and inputs else None
    is_batch = hasattr(first, "__len__") and getattr(first, "ndim", 1) > 0  # arrays of no dimension are ids
    return [prompt_ids(prompt, n_vocab) for prompt in (inputs if is_batch else [inputs])], is_batch


def prompt_ids(prompt, n_vocab):
    try:  # bytes, sets and dicts would look like ids
        ids = None if isinstance(prompt, bytes | set | dict) else [operator.index(i) for i in prompt]
    except TypeError:
        ids = None
    if ids is None:
        raise TypeError(f"a prompt is a list of token ids, as encoder.encode gives, not {prompt!r:.40}")
    if not ids:
        raise ValueError("a prompt has no tokens: begin with that of <|endoftext|> to generate from nothing")
    check_ids(min(ids), max(ids), n_vocab)
    return ids


def check_bounds(ids, n_past, wte, wpe, kv_cache):
    """Raises ValueError for ids that are not in the vocabulary, and for more tokens than wpe or the cache has room for.

    NumPy would count from the end, and JAX take the nearest that there is. What JAX traces has no values yet: only the
    number of ids is then known to fit.
    """
    if 0 in ids.shape:
        raise ValueError("there are no token ids")
    check_ids(*extremes(ids), len(wte))
    n_slots = min([len(wpe), *(cache.k.shape[-2] for cache in kv_cache or [])])
    first, last = extremes(n_past)
    if first < 0:
        raise ValueError(f"n_past must be 0 or more, not {first}")
    if last + ids.shape[-1] > n_slots:
        raise ValueError(f"{last + ids.shape[-1]} tokens do not fit the context of {n_slots}")


def check_ids(least, largest, n_vocab):
    if least < 0 or largest >= n_vocab:
        raise ValueError(f"token ids must be from 0 to {n_vocab - 1}, not {least if least < 0 else largest}")


def extremes(x):
    """The least and the largest of an array, or of a number; 0, 0 where they are not known."""
    try:
        return (x, x) if isinstance(x, int) else (int(x.min()), int(x.max()))
    except TypeError:  # from JAX, while it traces x
        return 0, 0


def check_room(n_prompt, n_tokens_to_generate, n_ctx, sliding_window=False):
    """Raises ValueError unless the context has room for the prompt and for what is to follow, or slides."""
    if n_prompt + n_tokens_to_generate > n_ctx and not sliding_window:
        tokens = f"prompt and continuation, {n_prompt} + {n_tokens_to_generate} tokens"
        raise ValueError(f"{tokens}, are more than the model's context of {n_ctx} holds (see sliding_window)")
