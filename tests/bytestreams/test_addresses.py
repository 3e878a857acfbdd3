import ipaddress
import socket

import pytest

from syncd.bytestreams import addresses
from syncd.bytestreams.addresses import own_addresses


def test_only_addresses_that_others_may_reach_are_listed() -> None:
    found = own_addresses()
    assert len(found) == len(set(found))
    for text in found:
        address = ipaddress.ip_address(text)
        assert not address.is_loopback
        assert not address.is_link_local
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family) as probe:
            probe.bind((text, 0))  # it is really ours


def test_the_kernel_lists_the_address_of_the_default_route() -> None:
    assert set(addresses._facing_outside()) <= set(addresses._from_kernel())


def test_a_sandbox_without_netlink_leaves_the_default_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with RestrictAddressFamilies=AF_INET AF_INET6 in a unit."""
    monkeypatch.setattr(socket, "AF_NETLINK", 12345)
    assert own_addresses() == addresses._likeliest_first(addresses._facing_outside(), [])


PUBLIC_4, PUBLIC_6 = "8.8.8.8", "2a00:1450::1"
HOME, BRIDGE, ULA = "192.168.1.5", "172.17.0.1", "fd00::1"


@pytest.mark.parametrize(
    ("facing", "others", "expected"),
    [
        # Behind a NAT of IPv4: who has IPv6 gets through, who has not is told so at once.
        ([HOME, PUBLIC_6], [BRIDGE, HOME], [PUBLIC_6, HOME, BRIDGE]),
        # Not everybody has IPv6.
        ([PUBLIC_4, PUBLIC_6], [], [PUBLIC_4, PUBLIC_6]),
        ([HOME, ULA], [BRIDGE], [HOME, ULA, BRIDGE]),
        ([], [ULA, BRIDGE, PUBLIC_6], [PUBLIC_6, BRIDGE, ULA]),
    ],
)
def test_what_a_peer_reaches_most_likely_comes_first(
    facing: list[str], others: list[str], expected: list[str]
) -> None:
    """Peers try one after the other, some only the first (RFC 6724 section 2.1)."""
    assert addresses._likeliest_first(facing, others) == expected


def test_a_machine_without_a_network_has_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_NETLINK", 12345)
    monkeypatch.setattr(addresses, "_OUTSIDE", ((12345, "203.0.113.1"),))
    assert own_addresses() == []


def test_a_list_that_never_ends_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_MAX_READS", 0)
    assert addresses._from_kernel() == []


def message(family: int, flags: int, scope: int, *attributes: tuple[int, bytes]) -> bytes:
    body = addresses._ADDRESS.pack(family, 24, flags, scope, 2)
    for kind, value in attributes:
        body += addresses._ATTRIBUTE.pack(4 + len(value), kind) + value
        body += bytes(-len(body) % 4)
    return body


V4, V6 = bytes([192, 0, 2, 1]), ipaddress.ip_address("2001:db8::1").packed


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (message(socket.AF_INET, 0, 0, (1, V4), (2, V4), (3, b"eth0\0")), "192.0.2.1"),
        (message(socket.AF_INET6, 0x80, 0, (1, V6)), "2001:db8::1"),
        (message(socket.AF_INET, 0, 0, (1, bytes(4)), (2, V4)), "192.0.2.1"),  # to a peer
        (message(socket.AF_INET, 0, 254, (1, V4)), None),  # loopback
        (message(socket.AF_INET6, 0, 253, (1, V6)), None),  # link-local
        (message(socket.AF_INET6, 0x20, 0, (1, V6)), None),  # deprecated
        (message(socket.AF_INET6, 0x40, 0, (1, V6)), None),  # tentative
        (message(socket.AF_INET6, 0x08, 0, (1, V6)), None),  # a duplicate
        (message(socket.AF_UNIX, 0, 0, (1, V4)), None),
        (message(socket.AF_INET, 0, 0), None),
    ],
)
def test_scope_and_state_decide_about_an_address(body: bytes, expected: str | None) -> None:
    """The bytes are those of linux/if_addr.h."""
    assert addresses._address(body) == expected
