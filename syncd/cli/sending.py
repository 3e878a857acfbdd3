"""``syncctl send``: one file to one peer, outside any folder."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from syncd.cli.exits import Exit
from syncd.control.client import ask
from syncd.control.escape import printable
from syncd.control.messages import SendRequest, StandingRequest, StatusRequest
from syncd.control.summary import duration

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from syncd.control.messages import Standing

# How long the daemon may take to answer; it writes to its disk before it does.
_PATIENCE = 15.0  # seconds

# Between two looks of ``--wait``: a script should not notice, and the daemon neither.
_LOOK = 0.25  # seconds


def run(
    socket: Path,
    file: str,
    peer: str,
    *,
    wait: bool,
    timeout: float,
    complain: Callable[[str, str], None],
) -> Exit:
    """Have a file sent.

    Args:
      socket: Of the daemon.
      file: Path; a relative one starts here.
      peer: JID, as configured.
      wait: Return when it is there, not when it is owed.
      timeout: How many seconds to wait for that.
      complain: Takes an error and a hint.

    Raises:
      SyncdError: The daemon does not take it, or runs no more.
    """
    deadline = time.monotonic() + timeout
    # Absolute for the daemon, which stands elsewhere; but a link stays one, and is refused.
    path = os.path.abspath(file)  # noqa: PTH100 - Path.absolute keeps ".."
    standing = ask(socket, SendRequest(path=path, peer=peer), timeout=_PATIENCE)
    if not wait:
        print(_owed(path, peer, standing))
        return Exit.OK
    while standing.state == "pending":
        if not standing.online and _is_unauthorized(socket):
            complain("the server does not accept the account's credentials", "")
            return Exit.AUTHENTICATION
        left = deadline - time.monotonic()
        if left <= 0:
            return _give_up(path, peer, timeout, standing, complain)
        time.sleep(min(left, _LOOK))
        standing = ask(socket, StandingRequest(path=path, peer=peer), timeout=_PATIENCE)
    return _ended(path, peer, standing, complain)


def _owed(path: str, peer: str, standing: Standing) -> str:
    if standing.online:
        return f"{printable(path)} is being sent to {printable(peer)}"
    return f"{printable(path)} will be sent to {printable(peer)} when they are online"


def _is_unauthorized(socket: Path) -> bool:
    status = ask(socket, StatusRequest(), timeout=_PATIENCE)
    return status.connection.state == "unauthorized"


def _give_up(
    path: str,
    peer: str,
    timeout: float,
    standing: Standing,
    complain: Callable[[str, str], None],
) -> Exit:
    span = duration(timeout)
    if not standing.online:
        complain(
            f"{peer} is offline, and was for {span}", "the file is sent when they are back"
        )
        return Exit.UNREACHABLE
    reason = f": {standing.error}" if standing.error else ""
    complain(f"{path} is not delivered to {peer} after {span}{reason}", "it still will be")
    return Exit.TIMEOUT


def _ended(
    path: str, peer: str, standing: Standing, complain: Callable[[str, str], None]
) -> Exit:
    match standing.state:
        case "delivered" | "sent":
            return Exit.OK
        case "dropped":
            complain(f"{path} went away before it was sent to {peer}", standing.hint)
            return Exit.NOT_FOUND
        case _:
            complain(f"{path} is not sent to {peer}: {standing.error}", standing.hint)
            return Exit.FAILED
