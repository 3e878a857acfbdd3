"""Names that come from the network, made safe or refused. Sans-IO.

A name is data until it went through here, after the last decoding. Nothing that passes can
climb out of a folder, hide in a terminal, or meet our private directory.
"""

from __future__ import annotations

import unicodedata

from syncd.errors import DeclinedError

# Where partial files live, at the root of each folder.
PRIVATE = ".syncd"

# NAME_MAX of every Linux file system that we know.
MAX_COMPONENT = 255  # bytes
# No real tree is deeper; each level costs an open directory while a path is walked.
MAX_DEPTH = 64  # components

# A plain client's file whose name holds nothing usable still arrives.
UNNAMED = "unnamed"


def split(path: str) -> tuple[str, ...]:
    """Take a relative path apart.

    Args:
      path: With ``/`` between the components.

    Returns:
      The components, normalised to NFC, at least one.

    Raises:
      DeclinedError: The path is not one that syncd writes, and why.
    """
    components = tuple(unicodedata.normalize("NFC", path).split("/"))
    if len(components) > MAX_DEPTH:
        raise DeclinedError(f"the path has more than {MAX_DEPTH} directories")
    for component in components:
        if reason := _reason_against(component):
            raise DeclinedError(
                f"the name {component[:80]!r} {reason}", hint="rename the file; it is sent then"
            )
    if components[0] == PRIVATE:
        raise DeclinedError(f"{PRIVATE} is syncd's own directory")
    return components


def last_component(name: str) -> str:
    """Reduce the name that a plain client sent to a file name.

    COMPAT(gloox): sends whole paths, of whatever system.
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    cleaned = "".join(c for c in last if not _is_control(c))
    # Only now: what a control character kept apart may be one character together.
    cleaned = unicodedata.normalize("NFC", cleaned).strip()
    while len(cleaned.encode(errors="replace")) > MAX_COMPONENT:
        cleaned = cleaned[:-1]
    if _reason_against(cleaned) or cleaned == PRIVATE:
        return UNNAMED
    return cleaned


def _reason_against(component: str) -> str:
    # A backslash is a character like others here, and kept. Where it separates directories
    # (a folder shared with Windows), what it separates must be as harmless.
    if any(piece in ("", ".", "..") for piece in component.split("\\")):
        return "is no file name"
    if "/" in component or any(_is_control(c) for c in component):
        return "holds a character that no file name should have"
    if len(component.encode(errors="surrogatepass")) > MAX_COMPONENT:
        return f"has more than {MAX_COMPONENT} bytes"
    return ""


def _is_control(character: str) -> bool:
    # Cc: control characters; Cs: lone surrogates, which no XML can carry.
    return unicodedata.category(character) in ("Cc", "Cs") or character in "\ufffe\uffff"
