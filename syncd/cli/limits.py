"""``syncctl limit``: how fast bytes may flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from syncd.cli.exits import Exit
from syncd.control.client import ask
from syncd.control.escape import printable
from syncd.control.messages import LimitRequest
from syncd.control.summary import amount

if TYPE_CHECKING:
    from pathlib import Path

# It is answered from memory.
_PATIENCE = 5.0  # seconds


def run(socket: Path, *, peer: str, up: int | None, down: int | None) -> Exit:
    """Show limits, after having changed them.

    Args:
      socket: Of the daemon.
      peer: Of this peer: a bare JID; empty: of all together.
      up: Bytes per second from the daemon; 0 lifts the limit, None leaves it.
      down: Bytes per second to the daemon, likewise.

    Raises:
      SyncdError: The daemon knows no such peer, or does not answer.
    """
    limited = ask(socket, LimitRequest(peer=peer, up=up, down=down), timeout=_PATIENCE)
    whose = printable(limited.peer) or "all peers together"
    print(f"{whose}: up {_rate(limited.limit.up)}, down {_rate(limited.limit.down)}")
    return Exit.OK


def _rate(rate: int) -> str:
    return f"{amount(rate)}/s" if rate else "no limit"
