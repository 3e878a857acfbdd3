"""Paths that no peer may write to: what attackers of other programs have tried."""

from __future__ import annotations

from itertools import chain, product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CLIMBING = (
    "..",
    "../canary",
    "../../canary",
    "../../../../../../../../tmp/canary",
    "./canary",
    "a/../../canary",
    "a/./b",
    "a/..",
    "a/.",
    "..//canary",
    "/../canary",
    "/canary",
    "//canary",
    "/",
    "",
    "a//b",
    "a/",
    "~/../../canary/..",
    "/etc/passwd",
    "//server/share/canary",
)
_ELSEWHERE = (  # separators of other systems
    "..\\canary",
    "a\\..\\..\\canary",
    "\\canary",
    "\\\\server\\share\\canary",
    "..\\../canary",
    "a/..\\canary",
    "a\\",
)
_UNPRINTABLE = (
    "canary\0",
    "\0../canary",
    "a\0/../../canary",
    "canary\n",
    "can\ry",
    "can\x1b[2Jary",
    "can\x7fary",
    "can\x9bary",
    "can\x85ary",
    "can\ud800ary",
    "\udcff/canary",
    "\udc2e\udc2e/canary",
    "can\ufffeary",
    "can\uffffary",
)
_TOO_LARGE = (
    "x" * 256,
    "é" * 128,
    "\U0001f4c1" * 64,
    "e\u0301" * 200,
    "/".join(["d"] * 65),
    "a/" + "x" * 256 + "/b",
    "x" * 4_096,
)
_PRIVATE = (".syncd", ".syncd/canary", ".syncd/x.part", ".syncd/../canary")

# A path of a syncd is refused when it is one of these.
REFUSED = tuple(chain(_CLIMBING, _ELSEWHERE, _UNPRINTABLE, _TOO_LARGE, _PRIVATE))

# These only look dangerous: nothing decodes or folds a path behind the check, so they are
# names like any other and have to stay below the folder.
HARMLESS = (
    "%2e%2e%2fcanary",
    "..%2fcanary",
    "%252e%252e%252fcanary",
    "..%c0%afcanary",
    "..%5ccanary",
    "&#46;&#46;&#47;canary",
    "+AC4ALgAv-canary",  # UTF-7
    "\uff0e\uff0e/canary",  # fullwidth full stops
    "\uff0e\uff0e\uff0fcanary",  # and a fullwidth solidus
    "\u2024\u2024/canary",  # one dot leaders
    "\u2025/canary",  # two dot leader
    "..\u2215canary",  # division slash
    "..\u29f8canary",
    "...",
    "..../canary",
    ". ./canary",
    ".. /canary",
    " ../canary",
    "~/canary",
    "~root",
    "$HOME/canary",
    "`id`",
    "$(touch canary)",
    ";touch canary",
    "| canary",
    "-rf",
    "--",
    "*",
    "?",
    "CON",
    "NUL.txt",
    "C:canary",
    "C:\\canary",
    "C:..\\canary",
    "a\\b",
    "canary:stream",
    "canary.",
    "canary ",
    " canary",
    ".hidden",
    ".syncd.txt",
    ".SYNCD",
    "a/.syncd",
    "\u202egnp.exe",  # right-to-left override; printing it is another matter
    "a\u200db",
    "\ufeffcanary",
    "'\"<&>",
    "%s%n%d",
    "{0.__class__}",
    "x" * 255,
    "é" * 127,
    "/".join(["d"] * 64),
)

# How a dot, and what separates directories, has been written to get past a check that looks
# before the last decoding, or that takes for equal what only looks alike.
_DOTS = (
    ".",
    "%2e",
    "%252E",
    "%u002e",
    "%c0%ae",  # overlong UTF-8
    "\xc0\xae",  # read as Latin-1
    "&#46;",
    "&#x2e;",
    "+AC4-",  # UTF-7
    "=2E",  # quoted-printable
    "\\56",
    "\\u002e",
    "\uff0e",  # fullwidth
    "\u2024",  # one dot leader
    "\u0701",  # Syriac
    ".\u200b",  # zero width space
    ".\0",
    ".\u202e",  # bidi
    ".\x7f",
    ".\u0301",  # combining
)
_SEPARATORS = (
    "/",
    "\\",
    "//",
    "/./",
    "\\/",
    "%2f",
    "%5C",
    "%252f",
    "%c0%af",
    "%e0%80%af",
    "\xc0\xaf",
    "&#47;",
    "&sol;",
    "+AC8-",
    "\uff0f",
    "\u2215",
    "\u29f8",
    "\u2044",
    "\uff3c",
    "\0/",
    ";/",
    ":",
    "/\u202e",
    "\n/",
)
_FORMS = (
    "{up}{up}canary",
    "a{sep}{up}{up}{up}canary",
    "{sep}canary",
    "outside{sep}{up}.syncd{sep}canary",
    "{dot}{dot}",
    "{dot}syncd{sep}canary",
)
_DEVICES = (
    "CON", "PRN", "AUX", "NUL", "COM1", "LPT9", "COM\u00b2", "CONIN$", "CLOCK$",
)  # fmt: skip
_SPELT = (".SYNCD", ".Syncd", ".\u017fyncd", ".syncd ", ".syncd.", "SYNCD~1", ".syncd::$DATA")
_ENDS = ("", ".", " ", ".txt", ":stream", "::$DATA", "/canary", "\\canary")


def corpus() -> tuple[str, ...]:
    """More than 2,000 names, each of which has got somewhere once, or is a relative of such."""
    climbing = (
        form.format(dot=dot, sep=separator, up=dot + dot + separator)
        for form, dot, separator in product(_FORMS, _DOTS, _SEPARATORS)
    )
    elsewhere = map("".join, product((*_DEVICES, *_SPELT), _ENDS))
    found = tuple(dict.fromkeys(chain(REFUSED, HARMLESS, climbing, elsewhere)))
    assert len(found) > LEAST
    return found


LEAST = 2_000  # names


def tree_state(directory: Path) -> dict[str, tuple[object, ...]]:
    """All that can be seen of a tree without changing it: content, modes, owners, times."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (directory, *sorted(directory.rglob("*"))):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        found[str(path)] = (
            content, status.st_ino, status.st_mode, status.st_uid, status.st_gid,
            status.st_nlink, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
        )  # fmt: skip
    return found
