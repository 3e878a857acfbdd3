"""Hears from the kernel when this machine gets or loses an address (rtnetlink(7)).

Nobody tells a connection that its network has gone, and who waits to try again may wait for
minutes although the way is free.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING

import trio

from syncd.bytestreams.addresses import own_addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

# RTMGRP_IPV4_IFADDR and RTMGRP_IPV6_IFADDR of linux/rtnetlink.h; `socket` does not have them.
_GROUPS = 0x10 | 0x100
# Routes and name servers come moments after the address, which is of no use without; and IPv6
# brings several addresses in a row.
SETTLE = 1.0  # seconds
# Only that something has changed is read; what does not fit is cut off.
_MAX_MESSAGE = 4_096  # bytes


def _listen() -> socket.socket:
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    try:
        kernel.bind((0, _GROUPS))
    except BaseException:
        kernel.close()
        raise
    return kernel


def is_ours(host: str) -> bool:
    """Whether this machine has an address.

    Asked by taking a port of it: so loopback and link-local addresses, and all that a system
    administrator has set up, count as the kernel sees them.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        return error.errno != errno.EADDRNOTAVAIL
    return True


async def watch(
    changed: Callable[[], None],
    *,
    addresses: Callable[[], Sequence[str]] = own_addresses,
    listen: Callable[[], socket.socket] = _listen,
) -> None:
    """Tell when the machine has other addresses than before, for as long as it runs.

    Where the kernel cannot be asked, this returns: then only trying finds the way.

    Args:
      changed: Called each time.
      addresses: Gives those of the machine.
      listen: Opens what gets a message from the kernel with each change, and with much that is
        none, such as an address that stays for longer.
    """
    try:
        opened = listen()
    except (OSError, AttributeError) as error:  # the latter: not Linux
        log.info("changes of this machine's addresses go unnoticed: %s", error)
        return
    with trio.socket.from_stdlib_socket(opened) as kernel:
        known = set(addresses())
        while True:
            await _message(kernel)
            await trio.sleep(SETTLE)
            before, known = known, set(addresses())
            if known != before:
                log.info("this machine has other addresses")
                changed()


async def _message(kernel: trio.socket.SocketType) -> None:
    try:
        await kernel.recv(_MAX_MESSAGE)
    except OSError as error:
        # ENOBUFS: more has changed than the kernel could keep for us.
        log.debug("some changes of addresses were lost: %s", error)
