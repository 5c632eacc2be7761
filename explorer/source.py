"""What gpt2.py says of itself: what each statement assigns and calls, and the axes that its comments name."""

import ast
import collections
import dataclasses
import io
import keyword
import re
import tokenize


@dataclasses.dataclass
class Statement:
    """One statement, or the first lines of one that holds others."""

    first: int  # its lines, counted from 1
    last: int
    names: list  # that it assigns
    calls: list  # (function, what tells it from other calls of the same function), in the order of the text
    reads: list  # the names that it reads
    before: list  # axes named left of the arrow in its comment, a list of names each
    after: list  # and right of it
    body: range = range(0)  # the lines that a loop repeats


@dataclasses.dataclass
class Function:
    name: str
    first: int
    last: int
    doc: list  # the first and the last line of its docstring, or none
    head: Statement  # the line of its def: the axes of its arguments and of what it returns
    statements: dict  # {line: Statement}


def functions(source):
    """{name: Function} of all functions at the top of a file's text."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: function(node, comments) for node in nodes}


def function(node, comments):
    calls = [call for part in node.body for call in calls_in(part)]
    often = {name for name, n in collections.Counter(name for name, _ in calls).items() if n > 1}
    head = statement(node.lineno, node.body[0].lineno - 1, [], [], [], comments)
    statements = {}
    for part in ast.walk(ast.Module(node.body, [])):
        if isinstance(part, ast.stmt):
            last = part.body[0].lineno - 1 if hasattr(part, "body") else part.end_lineno
            inside = [child for child in ast.iter_child_nodes(part) if not isinstance(child, ast.stmt)]
            names = [name for child in inside for name in names_in(child, ast.Store)]
            reads = [name for child in inside for name in names_in(child, ast.Load)]
            known = [(name, hint if name in often else "") for child in inside for name, hint in calls_in(child)]
            made = statement(part.lineno, last, names, known, reads, comments)
            if isinstance(part, ast.For):
                made.body = range(part.body[0].lineno, part.body[-1].end_lineno + 1)
            statements |= dict.fromkeys(range(part.lineno, last + 1), made)
    doc = [node.body[0].lineno, node.body[0].end_lineno] if ast.get_docstring(node) else []
    return Function(node.name, node.lineno, node.end_lineno, doc, head, statements)


def statement(first, last, names, calls, reads, comments):
    comment = next((comments[line] for line in range(first, last + 1) if line in comments), "")
    before, _, after = comment.rpartition("->")
    return Statement(first, last, names, calls, reads, axes_in(before), axes_in(after))


def names_in(node, context):
    """The names that are stored or loaded there, each as often as it stands."""
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)]


def calls_in(node):
    """(function, name of the first **argument, or "") for each call of a plain name."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    return [
        (call.func.id, next((k.value.id for k in call.keywords if not k.arg and isinstance(k.value, ast.Name)), ""))
        for call in calls
    ]


def axes_in(comment):
    """The shapes in a comment: "2 of [n_head, d], [n_seq]" -> [["n_head", "d"], ["n_head", "d"], ["n_seq"]]."""
    found = re.findall(r"(?:(\d) of )?\[([\w*/+-]+(?:, [\w*/+-]+)*)\]", comment)
    return [names.split(", ") for times, names in found for _ in range(int(times or 1))]


def size_of(name, sizes):
    """The number that the name of an axis stands for, such as n_embd/n_head; None where it is not known."""
    total = 1
    for operator, factor in re.findall(r"([*/+-]?)(\w+)", name):
        number = int(factor) if factor.isdigit() else sizes.get(factor)
        if number is None or operator in ("+", "-"):
            return None
        total = total // number if operator == "/" else total * number
    return total


def fits(names, shape, sizes):
    """Whether these names can be those of the last axes of an array."""
    pairs = zip(reversed(names), reversed(shape), strict=False)
    return len(names) <= len(shape) and all(size_of(name, sizes) in (None, n) for name, n in pairs)


def named(shape, names, sizes, over_keys=False):
    """A name for each axis: those given, where they fit, else what has this size.

    over_keys: the last axis is one of keys, as that of the attention's weights is.
    """
    if not names or not fits(names, shape, sizes):
        names = []
    kinds = ["n_embd", "3*n_embd", "4*n_embd", "n_embd/n_head", "n_vocab", "n_seq"]
    by_place = [["n_k"], ["n_q"], ["n_head"]] if over_keys else [kinds, ["n_seq"], ["n_head"]]
    guessed = []
    for place, n in enumerate(reversed(shape)):
        if place < len(names):
            guessed.append(names[-1 - place])
            continue
        likely = by_place[place] if place < len(by_place) else []
        guessed.append(next((kind for kind in likely if n > 1 and size_of(kind, sizes) in (None, n)), str(n)))
    return guessed[::-1]


def highlighted(source):
    """For each line of a file a list of [kind, text]: "keyword", "string", "comment", "number", "name" or ""."""
    lines = [[] for _ in source.splitlines()]
    ends, docstrings = source.splitlines(keepends=True), docstring_lines(source)
    at = (1, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.ENDMARKER, tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.NL):
            continue
        add(lines, "", between(ends, at, token.start), at[0])
        kind = {tokenize.STRING: "string", tokenize.COMMENT: "comment", tokenize.NUMBER: "number"}.get(token.type, "")
        if token.start[0] in docstrings and kind == "string":
            kind = "comment"
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        add(lines, kind, between(ends, token.start, token.end), token.start[0])
        at = token.end
    return lines


def docstring_lines(source):
    """Where strings begin that are statements of their own."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    return {node.lineno for node in nodes if isinstance(node.value, ast.Constant)}


def between(lines, start, end):
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    middle = lines[start[0] : end[0] - 1]
    return "".join([lines[start[0] - 1][start[1] :], *middle, lines[end[0] - 1][: end[1]]])


def add(lines, kind, text, first):
    for i, part in enumerate(text.split("\n")):
        if part:
            lines[first - 1 + i].append([kind, part])
