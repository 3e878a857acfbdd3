"""A target for names: whatever a peer calls its file, it lies below the folder, or nowhere.

From the command line, for as long as wanted; each failure is shrunk, and printed with what is
needed to see it again::

    python -m tests.fuzz.names --seconds 3600 [--seed 7]

`one_input` is the same for a fuzzer that knows bytes only, such as atheris, which is used by
``--atheris`` where it is installed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import unicodedata
from pathlib import Path

from hypothesis import strategies as st

from syncd.control.escape import printable
from syncd.disk import beneath, paths
from syncd.errors import DeclinedError, ErrorType, TransferError
from tests.fuzz import loop
from tests.support.hostile import corpus

pieces = st.sampled_from([
    "/", "\\", ".", "..", "a", "A", "\u00e9", "e\u0301", "canary", "outside", ".syncd",
    ".SYNCD", "CON", "nul.txt", ":", " ", "\0", "\n", "\x1b[2J", "\u202e", "\u2028", "\ud800",
    "\uffff", "%2e", "\uff0e", "\u2024", "x" * 255, "d/" * 40, "\U0001f4c1" * 64,
])  # fmt: skip
texts = st.text(st.characters(exclude_categories=[]), max_size=30)
likely = st.lists(pieces | texts, max_size=8).map("".join)
inputs = likely | st.sampled_from(corpus()) | texts


def check(name: str, around: Path) -> None:
    """Judge a name, and make a file that is called so.

    Args:
      name: As a peer sent it.
      around: An empty directory.

    Raises:
      AssertionError: Something happened that must not.
    """
    folder = around / "folder"
    folder.mkdir(exist_ok=True)
    last = paths.last_component(name)
    assert paths.split(last) == (last,)
    assert not last.startswith(".")
    _write(folder, (last,))
    components = _judged(name)
    if components is not None:
        assert "/".join(components) == name
        assert len(name.encode()) <= paths.MAX_PATH
        _write(folder, components)
    # Whatever the judges say, the last step does not lead out.
    with contextlib.suppress(OSError, ValueError, TransferError):
        _write(folder, tuple(name.split("/")))
    assert list(around.iterdir()) == [folder]


def _judged(name: str) -> tuple[str, ...] | None:
    taken, reasons = [], []
    for portable in (True, False):
        try:
            taken.append(paths.split(name, portable=portable))
        except DeclinedError as declined:
            reasons.append(declined)
    for reason in reasons:
        assert reason.type is ErrorType.CANCEL
        assert len(str(reason)) <= 1_000
        assert printable(str(reason)) == str(reason)
    assert len(set(taken)) <= 1
    if not taken:
        return None
    components = taken[0]
    assert components[0] != paths.PRIVATE
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
    if len(taken) == 2:
        # What is portable has no other meaning where a backslash separates, or case is nothing.
        assert "\\" not in name
        assert paths.fold(components[0]) != paths.PRIVATE
    return components


def _write(folder: Path, components: tuple[str, ...]) -> None:
    """Make a file, read it, and take it away with its directories."""
    with contextlib.suppress(FileExistsError):
        with beneath.open_parent(folder, components, create=True) as (directory, name):
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
            os.close(os.open(name, flags, dir_fd=directory))
        assert (folder / "/".join(components)).is_file()
        os.close(beneath.open_source(folder, components))
        with beneath.open_parent(folder, components) as (directory, name):
            os.unlink(name, dir_fd=directory)
    for depth in range(len(components) - 1, 0, -1):
        with beneath.open_directory(folder, components[: depth - 1]) as directory:
            os.rmdir(components[depth - 1], dir_fd=directory)
    assert list(folder.iterdir()) == []


def one_input(data: bytes) -> None:
    """The same for a fuzzer that makes bytes; they may be no UTF-8."""
    with tempfile.TemporaryDirectory() as around:
        check(data.decode(errors="surrogateescape"), Path(around))


def _check_apart(drawn: str) -> None:
    with tempfile.TemporaryDirectory() as around:
        check(drawn, Path(around))


if __name__ == "__main__":
    loop.run(__doc__, inputs, _check_apart, one_input)
