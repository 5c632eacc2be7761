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


class Lookup:
    """A Model for one text and the likeliest ids: its next_ids() are those of model, often several at once.

    model: see backends.
    """

    def __init__(self, model):
        self.model = model

    def next_ids(self, rows, n_past, n_steps, sampler):
        (row,), (n_past,) = rows, n_past
        if n_past == 0:
            self.begin(row)
        # to check a draft of fewer would not pay
        draft = guess(self.ids, self.places, self.n_match)[: n_steps - 1] if n_past and n_steps > 4 else []
        ids = self.check(draft, n_past) if draft else []
        if not ids:
            ids = sampler.pick(self.logits_of_one(row, n_past))
        for next_id in ids:
            self.places[tuple(self.ids[-N_MATCH:])] = len(self.ids)
            self.ids.append(next_id)
        return [[next_id] for next_id in ids]

    def begin(self, prompt):
        self.ids, self.n_match = [*prompt], N_MATCH
        self.places = {tuple(prompt[i - N_MATCH : i]): i for i in range(N_MATCH, len(prompt))}  # behind N_MATCH ids
        self.drafted_from = None  # the first slot of the cache that a draft wrote

    def check(self, draft, n_past):
        """What comes true of a draft, in one pass, and the id behind that; [] where the first is too close to call."""
        ids = confirm(self.model.logits([self.ids[-1:] + draft], [n_past], n_last=1 + len(draft))[0], draft)
        self.n_match = N_MATCH if len(ids) > len(draft) // 2 else 2 * self.n_match  # a bad guess: harder to please
        if ids and self.drafted_from is None:
            self.drafted_from = n_past
        return ids

    def logits_of_one(self, row, n_past):  # -> [1, 1, n_vocab]
        logits = self.model.logits([row], [n_past])
        if self.drafted_from is not None and not confirm(logits[0]):
            # too close to call from what drafts wrote into the cache: write it anew, one id at a time
            for i in range(self.drafted_from, len(self.ids)):
                logits = self.model.logits([self.ids[i : i + 1]], [i])
            self.drafted_from = None
        return logits


def guess(ids, places, n_match):
    """The N_DRAFT ids behind the last place where the newest N_MATCH of ids stood before: {N_MATCH ids: place}.

    Returns [] unless the newest n_match of ids agree there.
    """
    i = places.get(tuple(ids[-N_MATCH:]))
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
