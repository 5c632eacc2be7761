"""Prompt lookup: greedy text that repeats itself, in fewer passes through the model.

Where the newest ids stood before, what followed them there is likely to follow again. That is a draft, and one pass
over the newest id and its draft tells how much of it comes true, in the time of three passes over one id
(https://github.com/apoorvumang/prompt-lookup-decoding). The ids are those of passes over one id each.
"""

N_MATCH, N_DRAFT = 8, 15  # ids that must have stood before, and ids in a draft
# Where two logits are closer than this part of the largest, the rounding errors of a pass over 16 ids may decide. Those
# changed a gap by up to 4.5e-6 in models/shakespeare, 2.6e-6 in random weights of GPT-2's four shapes, and 1.3e-5 in
# ones of four times the spread. All of that on processors: with GPUs, which add in other orders, nothing is looked up.
MARGIN = 5e-5


def decode(prompt, forward, n_slots, n_ctx):
    """Yields what gpt2.decode yields for a batch of this one prompt and the likeliest ids: [id] after [id].

    forward: see arrays.cached. n_slots: how many ids its cache holds. n_ctx: how many the model's context holds.
    """
    ids, n_past = list(prompt), 0
    while True:
        if len(ids) > n_ctx:
            ids, n_past = ids[-max(n_ctx // 2, 1) :], 0
        if n_past == 0:  # a prompt, which is about to be read
            seen = {tuple(ids[i - N_MATCH : i]): i for i in range(N_MATCH, len(ids))}
            n_match, first_drafted = N_MATCH, n_slots  # the first slot that a draft wrote: none so far

        # check a draft, all of it in one pass
        room = n_slots - n_past - 1
        draft = guess(ids, seen, n_match)[:room] if n_past and room > 3 else []  # to check fewer would not pay
        next_ids = []
        if draft:
            next_ids = confirm(forward([ids[-1:] + draft], [n_past], n_last=1 + len(draft))[0], draft)
            n_match = N_MATCH if len(next_ids) > len(draft) // 2 else 2 * n_match  # a bad guess makes harder to please
        if next_ids:
            first_drafted = min(first_drafted, n_past)

        # or feed the newest id alone
        else:
            logits = forward([ids[n_past:]], [n_past])[0]  # [1, n_vocab]
            if first_drafted < n_past and not confirm(logits):
                # too close to call from what drafts wrote into the cache: write it anew, one id at a time
                for i in range(first_drafted, len(ids)):
                    logits = forward([ids[i : i + 1]], [i])[0]
                first_drafted = n_slots
            next_ids = logits.argmax(axis=-1).tolist()

        for next_id in next_ids:
            n_past = len(ids)  # the newest id is not in the cache yet
            seen[tuple(ids[-N_MATCH:])] = n_past
            ids.append(next_id)
            yield [next_id]


def is_exact(params):
    """Whether passes over several ids and over one agree within MARGIN: not in half precision."""
    return params["wte"].dtype.itemsize >= 4


def guess(ids, seen, n_match):
    """The N_DRAFT ids behind the last place where the newest N_MATCH of ids stood before, {N_MATCH ids: place} = seen.

    Returns [] unless the newest n_match of ids agree there.
    """
    i = seen.get(tuple(ids[-N_MATCH:]))
    if i is None or ids[max(i - n_match, 0) : i] != ids[-n_match:]:
        return []
    return (ids[i : i + N_DRAFT] * N_DRAFT)[:N_DRAFT]  # where fewer followed: those, over and over


def confirm(logits, draft=()):  # [n_draft+1, n_vocab], [n_draft] -> [at most n_draft+1]
    """The likeliest ids of a pass over an id and its draft, for as long as the draft comes true.

    They end before two logits that are closer than MARGIN, since passes over one id add in another order.
    """
    best = logits.max(axis=-1, keepdims=True)  # [n_draft+1, 1]
    margin = MARGIN * abs(logits).max(axis=-1, keepdims=True)
    n_best = (logits >= best - margin).sum(axis=-1)  # [n_draft+1]
    ids = []
    for next_id, n, drafted in zip(logits.argmax(axis=-1).tolist(), n_best.tolist(), [*draft, None], strict=True):
        if n != 1:
            break
        ids.append(next_id)
        if next_id != drafted:
            break
    return ids
