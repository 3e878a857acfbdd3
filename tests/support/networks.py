"""Three networks on one machine: a server in the middle, and two ends that are far apart.

::

    root ── server ── alice       Each has a network namespace of its own. Whether the server
                 └─── bob         passes packets on decides whether the ends reach each other.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENDS = ("alice", "bob")

# Linux hands out higher ones to whoever connects somewhere: what goes to a port up to this one
# is for a listener.
_LAST_LISTENING_PORT = 32_767

# One command of ip(8); it answers at once or hangs for a reason.
_TIMEOUT = 10.0  # seconds


def missing() -> str:
    """Why networks cannot be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "ip is not installed here: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces take root"
    name = f"syncd-{secrets.token_hex(3)}"
    done = _ip("netns", "add", name, check=False)
    if done.returncode:
        return f"network namespaces cannot be made here: {done.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """The namespaces.

    Attributes:
      address: Where the server is for everybody, whichever link they use.
      server, alice, bob: A command that runs another one inside.
    """

    address: str
    server: tuple[str, ...]
    alice: tuple[str, ...]
    bob: tuple[str, ...]

    def take_address(self, end: Literal["alice", "bob"]) -> None:
        """Take an end's address away, and its way out with that; nobody is told."""
        self._ip(end, "address", "flush", "dev", "uplink", "scope", "global")

    def give_address(self, end: Literal["alice", "bob"], last: int) -> None:
        """Give an end an address, and the way out.

        Args:
          end: One that has none.
          last: Its last part; 2 is the one that each end has at first, 1 is the server's.
        """
        net = _net(end)
        self._ip(end, "address", "add", f"{net}.{last}/24", "dev", "uplink")
        self._ip(end, "route", "add", "default", "via", f"{net}.1")

    def _ip(self, end: Literal["alice", "bob"], *arguments: str) -> None:
        _run(*(self.alice if end == "alice" else self.bob), "ip", *arguments)


@contextlib.contextmanager
def networks(*, routed: bool, closed: Literal["", "alice", "bob"] = "") -> Iterator[Networks]:
    """Make them for as long as the block lasts.

    Args:
      routed: Whether the two ends reach each other, through the server.
      closed: An end that can connect to others, and to which nobody can, as behind a home's
        router: what tries vanishes without a word. Its listeners must use ports below 32768.
    """
    mark = secrets.token_hex(3)
    names = {role: f"syncd-{mark}-{role}" for role in ("server", *_ENDS)}
    root_link = f"sd{mark}"
    # Of the root's own network only this is used: two runs at a time shall not meet there.
    net = f"10.77.{100 + secrets.randbelow(150)}"
    try:
        for name in names.values():
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        middle = names["server"]
        _ip("-n", middle, "address", "add", f"{net}.9/32", "dev", "lo")
        for number, role in enumerate(_ENDS, start=1):
            _join(middle, f"to-{role}", names[role], "uplink", number)
            _ip("-n", names[role], "route", "add", "default", "via", f"10.77.{number}.1")
        if closed:
            end = f"{_net(closed)}.2"
            ports = f"1-{_LAST_LISTENING_PORT}"
            rule = ("to", end, "ipproto", "tcp", "dport", ports, "blackhole")
            _ip("-n", middle, "rule", "add", *rule)
        # The tests themselves look at the server from outside.
        _ip("link", "add", root_link, "type", "veth", "peer", "name", "root", "netns", middle)
        _ip("address", "add", f"{net}.2/24", "dev", root_link)
        _ip("link", "set", root_link, "up")
        _ip("-n", middle, "address", "add", f"{net}.1/24", "dev", "root")
        _ip("-n", middle, "link", "set", "root", "up")
        _ip("route", "add", f"{net}.9/32", "via", f"{net}.1", "dev", root_link)
        forward = f"echo {int(routed)} > /proc/sys/net/ipv4/ip_forward"
        _run("ip", "netns", "exec", middle, "sh", "-c", forward)
        inside = {role: ("ip", "netns", "exec", name) for role, name in names.items()}
        yield Networks(address=f"{net}.9", **inside)
    finally:
        _ip("link", "delete", root_link, check=False)
        for name in names.values():
            _ip("netns", "delete", name, check=False)


def _net(end: str) -> str:
    """The first three parts of the addresses between an end and the server."""
    return f"10.77.{_ENDS.index(end) + 1}"


def _join(middle: str, here: str, name: str, there: str, number: int) -> None:
    _ip("-n", middle, "link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
    for namespace, link, last in ((middle, here, 1), (name, there, 2)):
        _ip("-n", namespace, "address", "add", f"10.77.{number}.{last}/24", "dev", link)
        _ip("-n", namespace, "link", "set", "dev", link, "up")


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return _run("ip", *arguments, check=check)


def _run(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    assert not check or done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
    return done
