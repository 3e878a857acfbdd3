"""Paths that no peer may write to: what attackers of other programs have tried."""

from __future__ import annotations

from itertools import chain

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
