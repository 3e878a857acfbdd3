"""When a file is whole enough to be sent. Sans-IO.

Nobody tells when a writer is done: there may be no close event, and a close may not be the
last. So a file written in place must rest: size, both times and inode unchanged for a while.
A file that came by rename was whole before it came; whoever knows that says `complete`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Protocol, Self


class Stat(Protocol):
    """What `Look.of` needs of an `os.stat_result`."""

    @property
    def st_size(self) -> int: ...  # noqa: D102 - stat(2) says it
    @property
    def st_mtime_ns(self) -> int: ...  # noqa: D102
    @property
    def st_ctime_ns(self) -> int: ...  # noqa: D102
    @property
    def st_ino(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Look:
    """A file at one moment; if any of these differs, somebody is at work on it.

    Attributes:
      size: Bytes.
      mtime_ns: Time of the last write, nanoseconds since 1970.
      ctime_ns: Time of the last change of any kind, nanoseconds since 1970.
      inode: Number of the inode.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: Stat) -> Self:
        """Take it from a stat."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    @property
    def changed(self) -> float:
        """Time of the last change of any kind, seconds since 1970."""
        return max(self.mtime_ns, self.ctime_ns) / 1e9


class Settling:
    """The files that have changed and do not rest yet.

    Args:
      quiet: How long a file must rest, seconds.
    """

    def __init__(self, quiet: float) -> None:
        self._quiet = quiet
        # All rest equally long and a change goes to the end, so this is ordered by time.
        self._since: dict[str, tuple[Look, float]] = {}

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, path: str) -> bool:
        return path in self._since

    def looked(
        self, path: str, look: Look | None, now: float, *, complete: bool = False
    ) -> bool:
        """Take what a look at a file has shown.

        Args:
          path: The file.
          look: What is there; None if no regular file is.
          now: Of a clock that never jumps, seconds.
          complete: It came by rename, and nobody has it open for writing.

        Returns:
          Whether the file may be sent now; it is then forgotten here.
        """
        if look is None:
            self._since.pop(path, None)
            return False
        known = self._since.get(path)
        rested = known is not None and known[0] == look and now >= known[1] + self._quiet
        if complete or rested:
            self._since.pop(path, None)
            return True
        if known is None or known[0] != look:
            self._since.pop(path, None)
            self._since[path] = (look, now)
        return False

    def due(self, now: float) -> list[str]:
        """The files to look at again now."""
        resting = self._since.items()
        ripe = itertools.takewhile(lambda item: now >= item[1][1] + self._quiet, resting)
        return [path for path, _ in ripe]

    def next_look(self) -> float:
        """When the next file is due, by the same clock; `math.inf` if there is none."""
        return next((since for _, since in self._since.values()), math.inf) + self._quiet
