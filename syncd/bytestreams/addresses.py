"""The addresses of this machine, for the offer of a direct connection.

From the kernel itself, over netlink (rtnetlink(7)): it is what getifaddrs(3) asks too, needs
no name resolution, no dependency and no parsing of text meant for people, and tells the scope
and state of an address, so that loopback, link-local and deprecated ones need no guessing.
Which address comes first is told by the route to the outside, and by its own range.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from typing import Final

# linux/netlink.h, linux/rtnetlink.h, linux/if_addr.h; the socket module lacks them.
_NETLINK_ROUTE: Final = 0
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_RT_SCOPE_SITE = 200  # and below: reachable from other links
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_DADFAILED, _IFA_F_DEPRECATED, _IFA_F_TENTATIVE = 0x08, 0x20, 0x40

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix, flags, scope, interface
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type

# The kernel fills at most 32 KiB of a dump at once (rtnetlink(7)).
_BUFFER = 65536  # bytes

# A local question is answered at once; this is against a kernel that never ends the dump.
_MAX_READS = 256

# Addresses of documentation networks (RFC 5737, RFC 3849): routed like the rest of the
# world, and nobody's. Connecting a UDP socket asks the routing table and sends nothing.
_OUTSIDE = ((socket.AF_INET, "203.0.113.1"), (socket.AF_INET6, "2001:db8::1"))


def own_addresses() -> list[str]:
    """List this machine's addresses that others may reach.

    Returns:
      IPv4 and IPv6 addresses without loopback and link-local ones, each once; those that
      face the default route first, and of these as of the others those that all the world
      can reach. Empty on a machine without a network.
    """
    facing, others = _facing_outside(), []
    # A sandbox without AF_NETLINK: the addresses of the default routes must do.
    with contextlib.suppress(OSError):
        others = _from_kernel()
    return _likeliest_first(facing, others)


def _likeliest_first(facing: list[str], others: list[str]) -> list[str]:
    return list(dict.fromkeys([*sorted(facing, key=_rank), *sorted(others, key=_rank)]))


def _rank(text: str) -> int:
    """As RFC 6724 section 2.1 has it: global, then private IPv4 (RFC 1918), then ULA."""
    address = ipaddress.ip_address(text)
    if address.is_global:
        return 0
    return 1 if address.version == 4 else 2


def _facing_outside() -> list[str]:
    found = []
    for family, address in _OUTSIDE:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))
                found.append(probe.getsockname()[0])
        except OSError:
            continue  # no route, or no such family
    # Without a route to the outside the kernel may still name one of these.
    return [each for each in found if not _is_local(ipaddress.ip_address(each))]


def _is_local(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_loopback or address.is_link_local or address.is_unspecified


def _from_kernel() -> list[str]:
    found: list[str] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as kernel:
        kernel.settimeout(1.0)  # seconds; see _MAX_READS
        request = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        size = _HEADER.size + len(request)
        kernel.send(_HEADER.pack(size, _RTM_GETADDR, flags, 1, 0) + request)
        for _ in range(_MAX_READS):
            for kind, body in _messages(kernel.recv(_BUFFER)):
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    return found
                if kind == _RTM_NEWADDR and (address := _address(body)):
                    found.append(address)
    return found


def _messages(data: bytes) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        found.append((kind, data[_HEADER.size : length]))
        data = data[_aligned(max(length, _HEADER.size)) :]
    return found


def _address(body: bytes) -> str | None:
    family, _, flags, scope, _ = _ADDRESS.unpack_from(body)
    unusable = _IFA_F_DADFAILED | _IFA_F_DEPRECATED | _IFA_F_TENTATIVE
    if scope > _RT_SCOPE_SITE or flags & unusable or family not in _LENGTHS:
        return None
    attributes = {}
    rest = body[_ADDRESS.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        attributes[kind] = rest[_ATTRIBUTE.size : length]
        rest = rest[_aligned(max(length, _ATTRIBUTE.size)) :]
    # On a point-to-point link IFA_ADDRESS is the far end, and IFA_LOCAL is ours.
    raw = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS, b""))
    return socket.inet_ntop(family, raw) if len(raw) == _LENGTHS[family] else None


_LENGTHS = {socket.AF_INET: 4, socket.AF_INET6: 16}  # bytes


def _aligned(length: int) -> int:
    return (length + 3) & ~3  # NLMSG_ALIGN, RTA_ALIGN
