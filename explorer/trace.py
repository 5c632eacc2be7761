"""gpt2() as it runs: every value that a line of gpt2.py makes, by its call path. gpt2() itself is not changed.

run = record(ids, **params, n_head=n_head)
run["block 1", "attention", "weights"][2]  # [n_seq, n_seq], of head 2
run.logits  # as gpt2() returns them, bit for bit

record(ids, **without_head(params, n_head, block=1, head=2), n_head=n_head).logits
"""

import dataclasses
import sys

import numpy as np

import gpt2
from explorer import source

FILE = gpt2.gpt2.__code__.co_filename
with open(FILE, encoding="utf-8") as file:  # once: this is the code that runs, even if the file is edited meanwhile
    SOURCE = file.read()
FUNCTIONS = source.functions(SOURCE)


@dataclasses.dataclass
class Value:
    """What a statement made. array: a copy, a number as an array of no axes, or None where it was not kept."""

    name: str  # "return" for what a call returns
    line: int
    shape: tuple
    array: np.ndarray | None
    statement: source.Statement
    is_argument: bool = False
    is_weight: bool = False  # of the model, or a view of one: array is no copy


@dataclasses.dataclass
class Call:
    """A call of one of the functions of gpt2.py."""

    function: source.Function
    label: str  # its name in its path, such as "linear c_attn" or "block 3"
    path: tuple  # the labels from "gpt2" to this one
    line: int  # of the caller's statement, 0 for gpt2() itself
    values: list = dataclasses.field(default_factory=list)
    calls: list = dataclasses.field(default_factory=list)
    statement: source.Statement | None = None  # that runs now

    def last(self, name):
        """The array of the last value of this name. Raises KeyError."""
        arrays = [value.array for value in self.values if value.name == name]
        if not arrays or arrays[-1] is None:
            raise KeyError(f"{name} {'was not kept: see keep' if arrays else 'is made nowhere there'}")
        return arrays[-1]

    def walk(self):
        """This call, and all within it, in the order in which they began."""
        yield self
        for call in self.calls:
            yield from call.walk()

    def within(self, function):
        """The calls of a function within this one."""
        return [call for call in self.walk() if call.function.name == function]


class Run:
    """root: the Call of gpt2(); logits: what it returned."""

    def __init__(self, root, logits):
        self.root, self.logits = root, logits

    def __getitem__(self, path):
        """The array of a name by its call path, of which parts may be left out, if only one call fits the rest.

        A part is a label, or the name of a function. Of a name that is assigned more than once, the last value; of
        calls that fit, the one that the last part names, before those within it. Raises KeyError that names those.
        """
        *parts, name = (path,) if isinstance(path, str) else path
        calls = [call for call in self.calls(*parts) if any(value.name == name for value in call.values)]
        calls = [call for call in calls if is_called(parts[-1] if parts else "gpt2", call.label)] or calls
        if len(calls) != 1:
            places = "; ".join(" › ".join(call.path) for call in calls)
            raise KeyError(f"{name} is in several calls: {places}" if calls else f"{name} is made nowhere there")
        return calls[0].last(name)

    def calls(self, *parts):
        """All calls whose path has these parts, in this order, and maybe others between and after them."""
        return [call for call in self.root.walk() if leads_to(call.path, parts)]

    def call(self, *parts):
        """The one call that the last part names. Raises KeyError."""
        calls = [call for call in self.calls(*parts) if is_called(parts[-1], call.label)]
        if len(calls) != 1:
            raise KeyError(f"{' › '.join(parts)} fits {len(calls)} calls")
        return calls[0]


def leads_to(path, parts):
    labels = iter(path)
    return all(any(is_called(part, label) for label in labels) for part in parts)


def is_called(part, label):
    return part in (label, label.split(" ")[0])


def block_call(run, block):
    """The Call of a block, which Run.call finds, too, but among all calls."""
    return [call for call in run.root.calls if call.function.name == "transformer_block"][block]


def attention_weights(run, block):  # -> [n_head, n_seq, n_keys]
    """The weights of a block's heads, of which causal_attention makes those of some queries at a time."""
    calls = block_call(run, block).within("attention")
    parts = [value.array for call in calls for value in call.values if value.name == "weights"]
    whole = np.zeros((*parts[0].shape[:-2], sum(part.shape[-2] for part in parts), parts[-1].shape[-1]), np.float32)
    start = 0
    for part in parts:
        whole[..., start : start + part.shape[-2], : part.shape[-1]] = part
        start += part.shape[-2]
    return whole


class Tracer:
    """What sys.settrace calls: for each call of a function, itself; then step, for each line of those of gpt2.py."""

    def __init__(self, keep, weights):
        self.keep, self.weights = keep, weights
        self.root, self.stack = None, []

    def __call__(self, frame, event, _):
        code = frame.f_code
        if code.co_filename != FILE or code.co_name not in FUNCTIONS:
            return None
        function, parent = FUNCTIONS[code.co_name], self.stack[-1] if self.stack else None
        label = label_of(function.name, parent)
        call = Call(
            function, label, (*parent.path, label) if parent else (label,), parent.statement.first if parent else 0
        )
        if parent:
            parent.calls.append(call)
        self.root = self.root or call
        self.stack.append(call)
        for name in code.co_varnames[: code.co_argcount]:
            self.note(call, function.head, name, frame.f_locals[name], is_argument=True)
        return self.step

    def step(self, frame, event, value):
        if event == "exception":
            return self.step
        call = self.stack[-1]
        statement = call.function.statements.get(frame.f_lineno)
        if event == "return" or statement is not call.statement:
            for name in call.statement.names if call.statement else ():
                has_ended = call.statement.body and frame.f_lineno not in call.statement.body  # a loop: nothing new
                if name in frame.f_locals and not has_ended:
                    self.note(call, call.statement, name, frame.f_locals[name])
        if event == "return":
            self.note(call, statement or call.function.head, "return", value)
            self.stack.pop()
        call.statement = statement
        return self.step

    def note(self, call, statement, name, value, is_argument=False):
        """Keeps a copy of an array or a number; weights, which no line changes, need none."""
        if isinstance(value, bool | int | float | np.generic):
            value = np.asarray(value)
        if isinstance(value, np.ndarray):
            is_weight, array = is_argument and self.is_weight(value), None
            if self.keep(call.path, name):
                array = value if is_weight else value.copy()
            call.values.append(Value(name, statement.first, value.shape, array, statement, is_argument, is_weight))

    def is_weight(self, array):
        return id(array) in self.weights or id(array.base) in self.weights


def label_of(name, parent):
    """A call's name in its path: with what tells it from the other calls of its caller."""
    if parent is None:
        return name
    before = [call for call in parent.calls if call.function.name == name]
    if name == "transformer_block":
        return f"block {len(before)}"
    hints = [hint for called, hint in parent.statement.calls if called == name] if parent.statement else []
    n_here = sum(call.line == parent.statement.first for call in before) if hints else 0
    label = f"{name} {hints[n_here]}" if n_here < len(hints) and hints[n_here] else name
    n_alike = sum(call.label.split(" #")[0] == label for call in before)
    return f"{label} #{n_alike + 1}" if n_alike else label


def keep_all(path, name):
    return True


def record(inputs, keep=keep_all, **arguments):
    """Runs gpt2.gpt2(inputs, **arguments) on NumPy, and returns a Run: what every line made, by its call path.

    keep: keep(path, name) -> bool says of which values to keep a copy, where all are too many: those of 124M at 1,024
    tokens take 4 GB. Of the others there is the shape. Another tracer, such as a debugger's, has a rest.
    """
    tracer, before = Tracer(keep, {*weight_ids(arguments)}), sys.gettrace()
    sys.settrace(tracer)
    try:
        logits = gpt2.gpt2(inputs, **arguments)
    finally:
        sys.settrace(before)
    return Run(tracer.root, logits)


def weight_ids(node):
    """The ids of all arrays in a nested dict, and of what they are views of."""
    if isinstance(node, np.ndarray):
        yield from (id(node), id(node.base)) if node.base is not None else (id(node),)
    elif isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            yield from weight_ids(child)


def without_head(params, n_head, block, head):
    """params, in which this head says nothing: its rows of the output projection are zero. The arrays given stay."""
    check_in_range("block", block, len(params["blocks"]))
    check_in_range("head", head, n_head)
    n = params["wte"].shape[-1] // n_head  # rows of a head
    return without_rows(params, block, "attn", slice(head * n, (head + 1) * n))


def without_neuron(params, block, neuron):
    """params, in which this neuron of the block's mlp says nothing: its row of the output projection is zero."""
    check_in_range("block", block, len(params["blocks"]))
    check_in_range("neuron", neuron, len(params["blocks"][block]["mlp"]["c_proj"]["w"]))
    return without_rows(params, block, "mlp", neuron)


def check_in_range(name, i, n):
    if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n:
        raise ValueError(f"{name} must be a whole number from 0 to {n - 1}, not {i!r}")


def without_rows(params, block, part, rows):
    blocks = [*params["blocks"]]
    c_proj = {**blocks[block][part]["c_proj"], "w": np.array(blocks[block][part]["c_proj"]["w"])}
    c_proj["w"][rows] = 0
    blocks[block] = {**blocks[block], part: {**blocks[block][part], "c_proj": c_proj}}
    return {**params, "blocks": blocks}


def forward_from(x, params, n_head, first):  # [n_seq, n_embd] -> [n_seq, n_vocab]
    """The rest of gpt2(), with x as the residual stream that comes into block first: what a patched stream leads to."""
    for block in params["blocks"][first:]:
        x = gpt2.transformer_block(x, **block, n_head=n_head)
    return gpt2.layer_norm(x, **params["ln_f"]) @ params["wte"].T
