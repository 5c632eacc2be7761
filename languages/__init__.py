"""What the program says, in the language of whoever reads it: English, or Chinese where the locale is Chinese.

The sources say everything in English, whole sentences with their numbers and paths in them. Where one is shown, it is
looked up here by its wording: the catalogue, zh.po, has {} for what changes from one time to the next, and what stood
there may be a sentence, too, which is then looked up in its turn. So what raises an error need not know of languages.
"""

import functools
import json
import os
import re
import string
import sys

CATALOGUE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "zh.po")  # as gettext's tools read it, too
VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


def translated(text, stream=None):
    """A text for stream, stderr if none is given, in the user's language; as it is if stream has no such characters."""
    if not is_chinese():
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
    """A text in Chinese as far as the catalogue has it, the most special wording first; else as it is."""
    for pattern, chinese in patterns():
        if match := pattern.fullmatch(text):
            return chinese.format(*(look_up(part) if is_sentence(part) else part for part in match.groups()))
    return text


def is_sentence(part):
    """Whether what stands in a text may be one of ours: not a name, nor what somebody typed, which is in quotes."""
    return " " in part and not (part[0] == part[-1] and part[0] in "'\"")


@functools.cache
def patterns():
    """[(what matches an English text, its translation)], those with the longest wording of their own first."""
    entries = sorted(catalogue().items(), key=lambda entry: -len(re.sub("{w?}", "", entry[0])))
    return [(re.compile(pattern(english), re.DOTALL), chinese) for english, chinese in entries]


def pattern(english):
    """The regular expression of a wording: {} is anything, {w} one word."""
    groups = {None: "", "": "(.*?)", "w": r"(\S*?)"}
    return "".join(re.escape(literal) + groups[field] for literal, field, *_ in string.Formatter().parse(english))


def catalogue():
    """{English: Chinese}, both as str.format takes them."""
    with open(CATALOGUE, encoding="utf-8") as f:
        entries = re.findall(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"\n)+)', f.read(), re.MULTILINE)
    return {unquoted(english): unquoted(chinese) for english, chinese in entries if english != '""\n'}


def unquoted(lines):
    return "".join(json.loads(line) for line in lines.splitlines())  # JSON's escapes are gettext's
