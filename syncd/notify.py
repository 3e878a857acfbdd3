"""Tell systemd how the daemon is doing: sd_notify(3), in a few lines of our own.

Without systemd, that is without ``NOTIFY_SOCKET``, everything here is silent.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

# The watchdog is fed twice in its time, as sd_watchdog_enabled(3) advises.
_FEEDINGS = 2
_MICROSECONDS = 1_000_000  # in a second


class Notifier:
    """Sends states to the service manager; never blocks and never fails.

    Args:
      environ: The environment; names the socket.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        # unix(7): an abstract address begins with a NUL; systemd writes it as @.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self) -> None:
        """Say that start-up, or a reload, is complete."""
        self._send("READY=1")

    def stopping(self) -> None:
        """Say that shutdown has begun."""
        self._send("STOPPING=1")

    def reloading(self, monotonic_usec: int) -> None:
        """Say that a reload has begun; `ready` ends it.

        Args:
          monotonic_usec: CLOCK_MONOTONIC now, in microseconds.
        """
        self._send(f"RELOADING=1\nMONOTONIC_USEC={monotonic_usec}")

    def status(self, text: str) -> None:
        """Show one line in ``systemctl status``."""
        self._send(f"STATUS={' '.join(text.splitlines())}")

    def watchdog(self) -> None:
        """Say that the daemon is alive."""
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        try:
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.sendto(state.encode(errors="replace"), self._address)
        except OSError as error:
            # The service goes on; systemd notices what it was not told.
            log.warning("systemd was not told %r: %s", state, error)


def watchdog_interval(environ: Mapping[str, str]) -> float | None:
    """How often `Notifier.watchdog` is to be called.

    Returns:
      Seconds; None when systemd does not watch this process.
    """
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # it watches a process that started us
    usec = environ.get("WATCHDOG_USEC", "")
    if not (usec.isascii() and usec.isdecimal()) or int(usec) == 0:
        return None
    return int(usec) / _MICROSECONDS / _FEEDINGS
