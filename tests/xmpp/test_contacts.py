from __future__ import annotations

import re

import pytest

from syncd.errors import OfflineError, StanzaError
from syncd.xmpp.contacts import MAX_RESOURCES, Contacts
from syncd.xmpp.disco import Info
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import NS_CLIENT, make

SI = "http://jabber.org/protocol/si"
SYNC = "urn:syncd:sync:1"
BOB = JID.parse("bob@example.org")
CAROL = JID.parse("carol@example.org/phone")


def contacts() -> Contacts:
    """Bob at any resource, Carol at her phone only."""
    return Contacts([BOB, CAROL], required=frozenset({SI}), preferred=SYNC)


def come(them: Contacts, jid: str, *, priority: str | None = None) -> JID | None:
    presence = make(f"{{{NS_CLIENT}}}presence", {"from": jid})
    if priority is not None:
        presence.append(make(f"{{{NS_CLIENT}}}priority", text=priority))
    return them.presence_received(presence)


def go(them: Contacts, jid: str, kind: str = "unavailable") -> JID | None:
    return them.presence_received(make(f"{{{NS_CLIENT}}}presence", {"from": jid, "type": kind}))


def tell(them: Contacts, jid: str, *features: str) -> None:
    info = Info(identities=frozenset(), features=frozenset(features))
    them.info_received(JID.parse(jid), info)


def arrive(them: Contacts, jid: str, *features: str, priority: str | None = None) -> None:
    """Come, and tell what the client can."""
    come(them, jid, priority=priority)
    tell(them, jid, *features)


def chosen(them: Contacts, peer: JID = BOB) -> str:
    return them.choose(peer).jid.resource


def test_the_peers_are_those_of_the_configuration() -> None:
    them = contacts()
    assert them.peers == (BOB, CAROL.bare)
    assert them.is_peer(JID.parse("bob@example.org/any"))
    assert them.is_peer(CAROL.bare)
    assert not them.is_peer(JID.parse("mallory@example.org"))


def test_a_peer_counts_as_online_once_its_client_is_known_to_take_files() -> None:
    them = contacts()
    assert come(them, "bob@example.org/pc") == JID.parse("bob@example.org/pc")
    assert them.online() == frozenset()
    tell(them, "bob@example.org/pc", SI)
    assert them.online() == {BOB}
    go(them, "bob@example.org/pc")
    assert them.online() == frozenset()


def test_a_client_is_asked_what_it_can_until_it_has_told() -> None:
    them = contacts()
    first = come(them, "bob@example.org/pc")
    assert come(them, "bob@example.org/pc") == first
    tell(them, "bob@example.org/pc", SI)
    assert come(them, "bob@example.org/pc") is None
    assert them.online() == {BOB}
    go(them, "bob@example.org/pc")
    assert come(them, "bob@example.org/pc") == first


def test_syncd_comes_before_priority_and_priority_before_the_latest() -> None:
    them = contacts()
    arrive(them, "bob@example.org/low", SI, priority="1")
    assert chosen(them) == "low"
    arrive(them, "bob@example.org/high", SI, priority="5")
    arrive(them, "bob@example.org/mid", SI, priority="4")
    assert chosen(them) == "high"
    arrive(them, "bob@example.org/also", SI, priority="5")
    assert chosen(them) == "also"
    come(them, "bob@example.org/high", priority="5")
    assert chosen(them) == "high"
    arrive(them, "bob@example.org/syncd", SI, SYNC, priority="-1")
    assert chosen(them) == "syncd"
    arrive(them, "bob@example.org/chat", priority="127")
    assert chosen(them) == "syncd"
    go(them, "bob@example.org/syncd")
    assert chosen(them) == "high"


@pytest.mark.parametrize(
    ("text", "priority"),
    [
        (None, 0),
        ("", 0),
        ("7", 7),
        (" -7\n", -7),
        ("128", 127),
        ("-129", -128),
        ("9" * 5_000, 127),
        ("high", 0),
    ],
)
def test_any_priority_is_one_of_the_rfcs(text: str | None, priority: int) -> None:
    them = contacts()
    arrive(them, "bob@example.org/pc", SI, priority=text)
    assert them.choose(BOB).priority == priority


def test_a_full_jid_fixes_the_resource() -> None:
    them = contacts()
    assert come(them, "carol@example.org/laptop") is None
    assert them.online() == frozenset()
    arrive(them, "carol@example.org/phone", SI)
    assert them.online() == {CAROL.bare}
    assert them.choose(CAROL).jid == CAROL
    assert them.choose(CAROL.bare).jid == CAROL


def test_unavailable_from_the_bare_jid_says_nothing_about_a_resource() -> None:
    them = contacts()
    arrive(them, "bob@example.org/pc", SI)
    assert go(them, "bob@example.org") is None
    assert them.online() == {BOB}


def test_an_error_means_that_the_resource_is_gone() -> None:
    them = contacts()
    arrive(them, "bob@example.org/pc", SI)
    go(them, "bob@example.org/pc", "error")
    assert not them.is_there(JID.parse("bob@example.org/pc"))


@pytest.mark.parametrize("kind", ["subscribe", "subscribed", "unsubscribed", "probe", "x"])
def test_other_presences_say_nothing_about_a_resource(kind: str) -> None:
    them = contacts()
    assert go(them, "bob@example.org/new", kind) is None
    assert not them.is_there(JID.parse("bob@example.org/new"))
    come(them, "bob@example.org/pc")
    go(them, "bob@example.org/pc", kind)
    assert them.is_there(JID.parse("bob@example.org/pc"))


def test_strangers_are_ignored() -> None:
    them = contacts()
    assert come(them, "mallory@example.org/pc") is None
    assert them.presence_received(make(f"{{{NS_CLIENT}}}presence")) is None
    tell(them, "mallory@example.org/pc", SI, SYNC)
    assert them.online() == frozenset()
    assert not them.is_there(JID.parse("mallory@example.org/pc"))
    with pytest.raises(StanzaError):
        come(them, "@")


def test_a_peer_cannot_have_more_clients_than_anybody_has() -> None:
    them = contacts()
    for number in range(MAX_RESOURCES):
        assert come(them, f"bob@example.org/{number}") is not None
    assert come(them, "bob@example.org/more") is None
    assert come(them, "bob@example.org/0") is not None
    go(them, "bob@example.org/0")
    assert come(them, "bob@example.org/more") is not None


def test_what_a_client_can_is_forgotten_when_it_goes() -> None:
    them = contacts()
    come(them, "bob@example.org/pc")
    go(them, "bob@example.org/pc")
    tell(them, "bob@example.org/pc", SI)
    assert them.online() == frozenset()


def test_a_client_that_turned_out_to_be_gone_is_not_chosen_again_before_it_is_back() -> None:
    them = contacts()
    arrive(them, "bob@example.org/pc", SI)
    them.gone(JID.parse("bob@example.org/pc"))
    them.gone(JID.parse("mallory@example.org/pc"))
    assert them.online() == frozenset()
    arrive(them, "bob@example.org/pc", SI)
    assert them.online() == {BOB}


def test_without_a_stream_nobody_is_there() -> None:
    them = contacts()
    arrive(them, "bob@example.org/pc", SI)
    them.clear()
    assert them.online() == frozenset()
    with pytest.raises(OfflineError, match=r"^bob@example\.org is offline$"):
        them.choose(BOB)


def test_a_peer_without_a_client_for_files_is_told_from_one_that_is_offline() -> None:
    them = contacts()
    arrive(them, "bob@example.org/chat")
    come(them, "bob@example.org/new")
    expected = "bob@example.org is online (chat, new), but no client there takes files"
    with pytest.raises(OfflineError, match=re.escape(expected)) as caught:
        them.choose(BOB)
    assert "SI file transfer" in caught.value.hint
