"""What the program says, in the language of whoever reads it: English, or Chinese where the locale is Chinese.

The sources say everything in English, whole sentences with their numbers and paths in them. Where one is shown, it is
looked up here by its wording: the catalogue, zh.po, has {} for what changes from one time to the next, and {s} where
that may be a sentence, too, which is then looked up in its turn. What stands in quotes is left as it is, whatever it
says. So what raises an error need not know of languages.
"""

import functools
import json
import os
import re
import sys

CATALOGUE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "zh.po")  # as gettext's tools read it, too
LONGEST = 2000  # characters: what is longer is not the program's
QUOTED = re.compile(r"""(?<!\w)(["'])(?:\\.?|(?!\1)[^\\])*(\1|$)""", re.DOTALL)  # as repr has it
NO_SPACE = "\uffff"  # for a space in quotes, where no wording shall be found; no text has this character
VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


def translated(text, stream=None):
    """A text for stream, or stderr, in the user's language; as it is if long or not in the stream's encoding."""
    if not is_chinese() or len(text) > LONGEST:
        return text
    chinese = look_up(text)
    try:
        chinese.encode(getattr(stream or sys.stderr, "encoding", None) or "utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text
    return chinese


def translated_lines(text, stream=None):
    """The same of each line by itself, whether it is indented, bold or neither."""
    line = r"^(\s*(?:\x1b\[\d+m)*)(.*?)((?:\x1b\[\d+m)*)$"
    return re.sub(line, lambda match: match[1] + translated(match[2], stream) + match[3], text, flags=re.MULTILINE)


def is_chinese():
    """Whether Chinese is what the user reads, by the variables that gettext asks; on Windows, where none is set, by it.

    The program's own locale is neither asked nor set.
    """
    locale = next(filter(None, map(os.environ.get, VARIABLES)), None) or system_locale()
    if re.match(r"(C|POSIX)(\.|$)", locale):
        return False
    languages = (os.environ.get("LANGUAGE") or locale).split(":")  # the first that there is
    return next((language[:2] for language in languages if language[:2] in ("en", "zh")), "en") == "zh"


def system_locale():
    if os.name != "nt":
        return "C"
    import ctypes
    import locale

    return locale.windows_locale.get(ctypes.windll.kernel32.GetUserDefaultUILanguage(), "C")


def look_up(text):
    """A text in Chinese as far as the catalogue has it, else as it is; in time linear in its length."""
    return in_chinese(QUOTED.sub(as_one_word, text), depth=8).replace(NO_SPACE, " ")


def as_one_word(quoted):
    return quoted[0].replace(" ", NO_SPACE) if quoted[2] else quoted[0]  # as it is if the quotes do not close


def in_chinese(text, depth):
    """By the most special wording that makes up the text. depth: how many sentences there may be, each in another."""
    for literals, kinds, chinese in wordings() if depth else ():
        parts = between(literals, text)
        if parts is not None and not any(kind == "w" and " " in part for kind, part in zip(kinds, parts, strict=True)):
            pairs = zip(kinds, parts, strict=True)
            return chinese.format(*(in_chinese(part, depth - 1) if kind == "s" else part for kind, part in pairs))
    return text


def between(literals, text):
    """What stands between literals that make up a text, each taken where it first comes; None if they do not."""
    if not literals[1:]:
        return [] if text == literals[0] else None
    if not (text.startswith(literals[0]) and text.endswith(literals[-1])):
        return None
    parts, start, end = [], len(literals[0]), len(text) - len(literals[-1])
    for literal in literals[1:-1]:
        at = text.find(literal, start, end)
        if at < 0:
            return None
        parts.append(text[start:at])
        start = at + len(literal)
    return [*parts, text[start:end]] if start <= end else None


@functools.lru_cache(None)  # .cache is newer than Python 3.8, which is told here that it is too old
def wordings():
    """[(literals, the kind of what is between each two, translation)], those with the longest literals first."""
    split = [(re.split(r"{([sw]?)}", QUOTED.sub(as_one_word, english)), text) for english, text in catalogue().items()]
    found = [([literal.format() for literal in parts[::2]], parts[1::2], chinese) for parts, chinese in split]
    return sorted(found, key=lambda wording: -len("".join(wording[0])))


def catalogue():
    """{English: Chinese}, both as str.format takes them."""
    with open(CATALOGUE, encoding="utf-8") as f:
        entries = re.findall(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', f.read(), re.MULTILINE)
    return {unquoted(english): unquoted(chinese) for english, chinese in entries if english != '""\n'}


def unquoted(lines):
    return "".join(json.loads(line) for line in lines.splitlines())  # JSON's escapes are gettext's
