from __future__ import annotations

from xml.etree.ElementTree import Element, fromstring

import pytest

from syncd.xmpp.disco import (
    INFO,
    ITEMS,
    MAX_FEATURES,
    MAX_ITEMS,
    NS_INFO,
    NS_ITEMS,
    Identity,
    Info,
    make_info,
    make_version,
    read_info,
    read_items,
)
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make, serialise

NOTHING = Info(identities=frozenset(), features=frozenset())
SYNCD = Identity("automation", "file-transfer", "syncd")


def test_what_is_told_is_read_the_same() -> None:
    query = make_info(SYNCD, {"urn:b", "urn:a"}, node="urn:x#1")
    assert query.get("node") == "urn:x#1"
    assert read_info(query) == Info(
        identities=frozenset({SYNCD}), features=frozenset({"urn:a", "urn:b"})
    )


def test_the_answer_is_what_the_xep_shows() -> None:
    assert serialise(make_info(Identity("client", "pc"), {"urn:b", "urn:a"})).decode() == (
        f"<query xmlns='{NS_INFO}'><identity category='client' type='pc'/>"
        "<feature var='urn:a'/><feature var='urn:b'/></query>"
    )


@pytest.mark.parametrize(
    "query",
    [
        None,
        make(INFO),
        make(ITEMS, None, make(f"{{{NS_INFO}}}feature", {"var": "urn:a"})),
        make(INFO, None, make(f"{{{NS_INFO}}}feature"), make("{u}feature", {"var": "urn:a"})),
    ],
)
def test_what_is_missing_is_left_out(query: Element | None) -> None:
    assert read_info(query) == NOTHING


def test_what_is_too_much_is_left_out() -> None:
    features = [make(f"{{{NS_INFO}}}feature", {"var": str(n)}) for n in range(MAX_FEATURES + 9)]
    identities = [
        make(f"{{{NS_INFO}}}identity", {"type": str(n)}) for n in range(MAX_ITEMS + 9)
    ]
    info = read_info(make(INFO, None, *identities, *features))
    assert (len(info.features), len(info.identities)) == (MAX_FEATURES, MAX_ITEMS)


def test_an_address_may_be_several_things() -> None:
    info = Info(
        identities=frozenset({SYNCD, Identity("proxy", "bytestreams")}), features=frozenset()
    )
    assert info.is_a("proxy", "bytestreams")
    assert info.is_a("automation", "file-transfer")
    assert not info.is_a("proxy", "file-transfer")


def test_items_are_addresses_each_once_in_order_and_broken_ones_are_left_out() -> None:
    query = fromstring(
        f"<query xmlns='{NS_ITEMS}'><item jid='proxy.example.org'/><item jid='a@b@c/'/><item/>"
        "<item jid='muc.example.org' name='Rooms'/><item jid='PROXY.example.org'/>"
        "<item xmlns='u' jid='x.example.org'/></query>"
    )
    assert read_items(query) == (JID.parse("proxy.example.org"), JID.parse("muc.example.org"))
    assert read_items(None) == ()


def test_only_so_many_items_are_read() -> None:
    items = [
        make(f"{{{NS_ITEMS}}}item", {"jid": f"n{n}.example.org"}) for n in range(MAX_ITEMS + 9)
    ]
    assert len(read_items(make(ITEMS, None, *items))) == MAX_ITEMS


def test_a_version_names_the_program_and_not_the_system() -> None:
    assert serialise(make_version("syncd", "1.2")).decode() == (
        "<query xmlns='jabber:iq:version'><name>syncd</name><version>1.2</version></query>"
    )
