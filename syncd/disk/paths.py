"""Names that come from the network, made safe or refused. Sans-IO.

A name is data until it went through here, after the last decoding: nothing is decoded behind
it. Nothing that passes can climb out of a folder, hold a control character, or meet our
private directory.

A path between syncds is taken as it is or not at all, never changed: of two names that only
look the same, or differ only in case, each is a file of its own, as at its sender. Where
others than Linux read the folder, its owner asks for *portable* names: then what Windows or
macOS could not hold is refused, and so is the second of such two (see `fold`). A plain
client's file comes without a folder, and gets a name in ours.
"""

from __future__ import annotations

import re
import unicodedata

from syncd.errors import DeclinedError

# Where partial files live, at the root of each folder.
PRIVATE = ".syncd"

# NAME_MAX of every Linux file system that we know.
MAX_COMPONENT = 255  # bytes
# No real tree is deeper; each level costs an open directory while a path is walked.
MAX_DEPTH = 64  # components
# PATH_MAX of Linux: syncd itself would reach a longer one, but no other program.
MAX_PATH = 4_096  # bytes

# A plain client's file whose name holds nothing usable still arrives.
UNNAMED = "unnamed"


# What Windows does not take, or takes for something else ("Naming Files, Paths, and
# Namespaces" of its manual): separators, streams, wildcards, quotes, redirections; and devices,
# whatever follows the first dot. Their superscript digits count as digits there.
_SPECIAL = re.compile(r'[\\:*?"<>|]')
_DEVICE = re.compile(
    r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9\u00b9\u00b2\u00b3]) *(?:\..*)?",
    re.IGNORECASE | re.DOTALL,
)

# Of a plain client's name: what would hide the file, and white space.
_LEADING = re.compile(r"\A[\s.]+")


def split(path: str, *, portable: bool = False, hidden: bool = True) -> tuple[str, ...]:
    """Take a relative path apart.

    Args:
      path: With ``/`` between the components.
      portable: Refuse also what another system could not hold.
      hidden: Take names that begin with a dot, too. In a home directory they are what programs
        obey: ``.bashrc``, ``.ssh/authorized_keys``, ``.git/hooks``.

    Returns:
      The components as they are, at least one.

    Raises:
      DeclinedError: The path is not one that syncd writes, and why.
    """
    if len(path.encode(errors="surrogatepass")) > MAX_PATH:
        raise DeclinedError(f"the path has more than {MAX_PATH} bytes")
    components = tuple(path.split("/"))
    if len(components) > MAX_DEPTH:
        raise DeclinedError(f"the path has more than {MAX_DEPTH} directories")
    for component in components:
        reason = _reason_against(component)
        if not reason and portable:
            reason = _reason_elsewhere(component)
        if reason:
            raise DeclinedError(
                f"the name {component[:80]!r} {reason}", hint="rename the file; it is sent then"
            )
        if component.startswith(".") and not hidden:
            raise DeclinedError(
                f"the name {component[:80]!r} begins with a dot, and hidden files are not "
                "accepted here; rename it, or ask for accept_hidden = true at this folder"
            )
    if components[0] == PRIVATE or (portable and fold(components[0]) == PRIVATE):
        raise DeclinedError(f"{PRIVATE} is syncd's own directory")
    return components


def fold(name: str) -> str:
    """Make names equal that are one name to a system that ignores case and normalisation.

    Canonical caseless matching (Unicode 3.13, D145).
    """
    folded = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFD", folded)


def without_special(text: str) -> str:
    """Replace what no portable name may hold; for a part of a name of ours."""
    return _SPECIAL.sub("_", text)


def last_component(name: str) -> str:
    """Reduce the name that a plain client sent to a file name, one that a person sees.

    A leading dot goes: nobody has sent ``.bashrc`` or ``.desktop`` on purpose to a person, and
    in an inbox it would lie hidden.

    COMPAT(gloox): sends whole paths, of whatever system.
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    cleaned = "".join(c for c in last if not _is_control(c))
    # Only now: what a control character kept apart may be one character together.
    cleaned = _LEADING.sub("", unicodedata.normalize("NFC", cleaned)).rstrip()
    while len(cleaned.encode(errors="replace")) > MAX_COMPONENT:
        cleaned = cleaned[:-1]
    return UNNAMED if _reason_against(cleaned) else cleaned


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


def _reason_elsewhere(component: str) -> str:
    if found := _SPECIAL.search(component):
        return f"holds {found[0]!r}, which is not portable"
    if component.endswith((" ", ".")):
        return "ends with a space or a dot, which is not portable"
    if _DEVICE.fullmatch(component):
        return "is the name of a device on Windows"
    return ""


def _is_control(character: str) -> bool:
    # Cc: control characters; Cs: lone surrogates, which no XML can carry.
    return unicodedata.category(character) in ("Cc", "Cs") or character in "\ufffe\uffff"
