"""How many bytes per second may go up and down, in all and with each peer. Sans-IO.

Kept here is what is wanted; whoever moves bytes is told of every change. What the user sets
while we run holds until the end of the process: the configuration is the user's file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Limits for both directions.

    Attributes:
      up: Bytes per second from here; 0: no limit.
      down: Bytes per second to here; 0: no limit.
    """

    up: int = 0
    down: int = 0


class Limits:
    """The limits in force; each byte is under those of all peers and those of its own.

    Args:
      everybody: For all peers together.
      peers: For one peer only, by bare JID.
      changed: Told the new rates, and whose: a bare JID, or empty for everybody's.
    """

    def __init__(
        self,
        everybody: Rates,
        peers: Mapping[str, Rates],
        changed: Callable[[str, Rates], None],
    ) -> None:
        self._rates = {"": everybody, **peers}
        self._changed = changed

    def of(self, peer: str = "") -> Rates:
        """The limits of one peer (a bare JID), or of everybody together."""
        return self._rates.get(peer, Rates())

    def set(self, peer: str = "", *, up: int | None = None, down: int | None = None) -> Rates:
        """Change limits.

        Args:
          peer: Whose: a bare JID, or empty for everybody's.
          up: Bytes per second; 0 lifts the limit, None leaves it.
          down: Likewise.

        Returns:
          What holds now.
        """
        old = self.of(peer)
        new = Rates(up=old.up if up is None else up, down=old.down if down is None else down)
        if new != old:
            self._rates[peer] = new
            self._changed(peer, new)
        return new
