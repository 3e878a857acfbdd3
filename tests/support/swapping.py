"""A process that swaps directories for links in a folder, as fast as the kernel lets it.

It is a local user who may write to the folder, and wants what syncd writes, deletes or sends to
lie outside of it. `renameat2` exchanges two names in one step, so there is no moment in which
one of them is missing; between bursts it rests a little, at random, so that each of the two is
met by single steps and by whole walks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_EXCHANGE = 2  # renameat2(2)
_BURST = 16  # swaps, at most
_REST = 100e-6  # seconds, at most
_COUNTER = 8  # bytes
# A process that does not even begin has failed.
_PATIENCE = 20.0  # seconds


@contextlib.contextmanager
def swapping(folder: Path, pairs: dict[str, str]) -> Iterator[Callable[[], int]]:
    """Swap names at the top of a folder until the block ends.

    Args:
      folder: Where.
      pairs: Names that are exchanged all the time; in the end each is back at its place.

    Yields:
      What tells how many swaps were made so far.
    """
    counter = folder.with_name(f"{folder.name}.swaps")
    counter.write_bytes(bytes(_COUNTER))
    names = [name for pair in pairs.items() for name in pair]
    command = [sys.executable, "-m", __name__, str(folder), str(counter), *names]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as process,
        counter.open("r+b") as file,
        mmap.mmap(file.fileno(), _COUNTER) as shared,
    ):

        def count() -> int:
            if process.poll() is not None:
                raise RuntimeError("the process that swaps has failed")
            return int.from_bytes(shared[:], sys.byteorder)

        try:
            end = time.monotonic() + _PATIENCE
            while not count() and time.monotonic() < end:
                time.sleep(0.001)
            yield count
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    counter.unlink()
    if process.returncode != 0:
        raise RuntimeError("the process that swaps has failed")


def main() -> None:
    """Swap until the standard input is closed."""
    folder, counter, *names = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    encoded = [os.fsencode(name) for name in names]
    pairs = list(zip(encoded[::2], encoded[1::2], strict=True))
    os.set_blocking(0, False)
    number = 0
    with Path(counter).open("r+b") as file, mmap.mmap(file.fileno(), _COUNTER) as shared:
        while not _is_over():
            # Every pair an even number of times: then each is where it was.
            for one, other in random.sample(pairs, len(pairs)):
                for turn in range(2 * random.randrange(1, _BURST)):
                    # ENOENT: just then it is moved, or has just been replaced.
                    while libc.renameat2(fd, one, fd, other, _EXCHANGE) != 0:
                        code = ctypes.get_errno()
                        if code != errno.ENOENT:
                            raise OSError(code, os.strerror(code), one)
                    number += 1
                    if turn < 2:
                        time.sleep(random.random() * _REST)
            shared[:] = number.to_bytes(_COUNTER, sys.byteorder)


def _is_over() -> bool:
    with contextlib.suppress(BlockingIOError):
        return os.read(0, 1) == b""
    return False


if __name__ == "__main__":
    main()
