"""Text of others, made fit for a terminal, a log, or one line. Sans-IO."""

from __future__ import annotations

import unicodedata

# What people read more easily than a number.
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# PEP 383: Python holds a byte that is no UTF-8 as the surrogate U+DC00 + byte.
_FIRST_RAW, _LAST_RAW = 0xDC80, 0xDCFF


def printable(text: str) -> str:
    r"""Show what cannot be seen: controls, line ends, bidi marks become ``\x1b`` and so on.

    A name or an error text that somebody else chose can move the cursor, forge a log line or
    turn the reading direction. Everything that is shown to people passes through here, once
    or often: the result is unchanged by a second pass. It is for the eye; programs read JSON.

    Args:
      text: Anything, lone surrogates of undecodable file names included.

    Returns:
      The same text on one line, where each escaped character reads as Python writes it.
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def printable_lines(text: str) -> str:
    r"""The same for text of our own that has several lines, such as a list of faults.

    Args:
      text: Anything; its line feeds are kept, so indent what follows the first line.
    """
    return "\n".join(map(printable, text.split("\n")))


def well_formed(text: str) -> str:
    r"""Only make text encodable as UTF-8: lone surrogates become ``\xff`` and the like.

    Args:
      text: Anything; usually a file name that is no UTF-8.

    Returns:
      The text itself wherever it can be encoded.
    """
    return "".join(_escaped(char) if "\ud800" <= char <= "\udfff" else char for char in text)


def _shown(char: str) -> str:
    # Spaces of other scripts (U+3000 in Japanese names) count as unprintable to Python, but
    # are harmless; Zl and Zp, which break lines, are not spaces.
    if char.isprintable() or unicodedata.category(char) == "Zs":
        return char
    return _escaped(char)


def _escaped(char: str) -> str:
    code = ord(char)
    if char in _NAMED:
        return _NAMED[char]
    if _FIRST_RAW <= code <= _LAST_RAW:
        return f"\\x{code - 0xDC00:02x}"
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
