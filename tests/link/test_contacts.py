from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import pytest

from syncd.errors import OfflineError, StanzaError
from syncd.link.contacts import (
    MAX_RESOURCES,
    SUBSCRIPTIONS,
    SUBSCRIPTIONS_WINDOW,
    Contacts,
    Resource,
    Subscriptions,
)
from syncd.xmpp.caps import make_caps
from syncd.xmpp.disco import Identity, make_info
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import NS_CLIENT, make

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

SI = "http://jabber.org/protocol/si"
SYNC = "urn:syncd:sync:1"
BOB = JID.parse("bob@example.org")
CAROL = JID.parse("carol@example.org/phone")


def contacts() -> Contacts:
    """Bob at any resource, Carol at her phone only."""
    return Contacts([BOB, CAROL], required=frozenset({SI}), preferred=SYNC)


def come(
    them: Contacts, jid: str, *, priority: str | None = None, caps: Element | None = None
) -> JID | None:
    presence = make(f"{{{NS_CLIENT}}}presence", {"from": jid})
    if priority is not None:
        presence.append(make(f"{{{NS_CLIENT}}}priority", text=priority))
    if caps is not None:
        presence.append(caps)
    return them.presence_received(presence)


def go(them: Contacts, jid: str, kind: str = "unavailable") -> JID | None:
    return them.presence_received(make(f"{{{NS_CLIENT}}}presence", {"from": jid, "type": kind}))


def asked(them: Contacts, jid: str) -> Resource:
    """The resource as it is asked what it can."""
    resource = them.unknown(JID.parse(jid))
    assert resource is not None
    return resource


def info(*features: str) -> Element:
    return make_info(Identity("client", "pc"), features)


def tell(them: Contacts, jid: str, *features: str) -> None:
    assert them.info_received(asked(them, jid), info(*features))


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
    assert them.online() == {CAROL}
    assert them.choose(CAROL).jid == CAROL
    assert them.choose(CAROL.bare).jid == CAROL


def test_two_resources_of_one_account_are_two_peers() -> None:
    laptop = CAROL.with_resource("laptop")
    them = Contacts([CAROL, laptop], required=frozenset({SI}), preferred=SYNC)
    assert them.peers == (CAROL.bare,)
    arrive(them, "carol@example.org/laptop", SI, SYNC)
    assert come(them, "carol@example.org/pc") is None
    assert them.online() == {laptop}
    with pytest.raises(OfflineError, match=r"^carol@example\.org/phone is offline$"):
        them.choose(CAROL)
    arrive(them, "carol@example.org/phone", SI)
    assert them.online() == {CAROL, laptop}
    assert them.choose(CAROL).jid == CAROL
    assert them.choose(laptop).jid == laptop


def test_an_account_may_be_a_peer_as_a_whole_and_in_part() -> None:
    them = Contacts([CAROL, CAROL.bare], required=frozenset({SI}), preferred=SYNC)
    arrive(them, "carol@example.org/laptop", SI)
    assert them.online() == {CAROL.bare}
    assert chosen(them, CAROL.bare) == "laptop"


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
    assert them.unknown(JID.parse("mallory@example.org/pc")) is None
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
    question = asked(them, "bob@example.org/pc")
    go(them, "bob@example.org/pc")
    assert them.info_received(question, info(SI))
    assert them.online() == frozenset()
    assert come(them, "bob@example.org/pc") is not None


def test_a_client_that_does_not_tell_is_asked_again_when_it_comes_again() -> None:
    them = contacts()
    come(them, "bob@example.org/pc")
    question = asked(them, "bob@example.org/pc")
    them.info_refused(question)
    them.info_refused(question)
    assert them.unknown(question.jid) is None
    with pytest.raises(OfflineError, match="no client there takes files"):
        them.choose(BOB)
    assert come(them, "bob@example.org/pc") is not None
    # That was said by the one that has gone.
    them.info_refused(question)
    tell(them, "bob@example.org/pc", SI)
    assert chosen(them) == "pc"


def test_a_client_that_turned_out_to_be_gone_is_not_chosen_again_before_it_is_back() -> None:
    them = contacts()
    arrive(them, "bob@example.org/phone", SI, priority="1")
    arrive(them, "bob@example.org/pc", SI, priority="5")
    for resource in ("pc", "phone"):
        assert chosen(them) == resource
        them.gone(them.choose(BOB))
    # Its presence has not said so yet.
    assert them.is_there(JID.parse("bob@example.org/pc"))
    assert them.online() == frozenset()
    with pytest.raises(OfflineError, match=r"^bob@example\.org is offline$"):
        them.choose(BOB)
    assert come(them, "bob@example.org/pc") is not None
    tell(them, "bob@example.org/pc", SI)
    assert them.online() == {BOB}


def test_a_client_that_answers_is_not_gone() -> None:
    them = contacts()
    arrive(them, "bob@example.org/pc", SI)
    them.gone(them.choose(BOB))
    tell(them, "bob@example.org/pc", SI)
    assert chosen(them) == "pc"


def test_who_came_back_since_it_was_chosen_is_not_gone() -> None:
    them = contacts()
    arrive(them, "bob@example.org/pc", SI)
    resource = them.choose(BOB)
    come(them, "bob@example.org/pc")
    them.gone(resource)
    assert them.online() == {BOB}
    go(them, "bob@example.org/pc")
    them.gone(resource)
    assert them.online() == frozenset()


def test_a_kind_of_client_that_is_known_need_not_be_asked() -> None:
    """XEP-0115: whoever it is that has told."""
    them = contacts()
    caps = make_caps(info(SI))
    come(them, "bob@example.org/pc", caps=caps)
    come(them, "bob@example.org/tv", caps=caps)
    come(them, "carol@example.org/phone", caps=caps)
    come(them, "bob@example.org/other", caps=make_caps(info(SI, SYNC)))
    tell(them, "bob@example.org/pc", SI)
    assert them.online() == {BOB, CAROL}
    assert them.unknown(JID.parse("bob@example.org/tv")) is None
    assert them.unknown(JID.parse("bob@example.org/other")) is not None
    them.clear()
    assert come(them, "bob@example.org/pc", caps=caps) is None
    assert chosen(them) == "pc"


def test_an_answer_that_was_not_promised_is_of_its_sender_alone() -> None:
    them = contacts()
    caps = make_caps(info(SI))
    come(them, "bob@example.org/pc", caps=caps)
    come(them, "carol@example.org/phone", caps=caps)
    tell(them, "bob@example.org/pc", SI, SYNC)
    assert them.online() == {BOB}
    assert them.unknown(CAROL) is not None


def test_an_answer_to_an_older_question_does_not_count() -> None:
    them = contacts()
    come(them, "bob@example.org/pc", caps=make_caps(info(SI)))
    question = asked(them, "bob@example.org/pc")
    come(them, "bob@example.org/pc", caps=make_caps(info(SI, SYNC)))
    assert not them.info_received(question, info(SI))
    tell(them, "bob@example.org/pc", SI, SYNC)
    assert chosen(them) == "pc"


def test_a_client_that_learns_something_new_is_asked_again() -> None:
    them = contacts()
    come(them, "bob@example.org/pc", caps=make_caps(info()))
    tell(them, "bob@example.org/pc")
    # A server may leave out what has not changed (XEP-0115 section 8.4).
    assert come(them, "bob@example.org/pc") is None
    assert come(them, "bob@example.org/pc", caps=make_caps(info(SI))) is not None
    assert them.online() == frozenset()


def test_a_kind_that_answered_does_not_bring_back_who_is_gone() -> None:
    them = contacts()
    caps = make_caps(info(SI))
    come(them, "bob@example.org/pc", caps=caps)
    come(them, "bob@example.org/tv", caps=caps)
    them.gone(asked(them, "bob@example.org/tv"))
    tell(them, "bob@example.org/pc", SI)
    assert chosen(them) == "pc"
    with pytest.raises(OfflineError, match="offline"):
        them.choose(JID.parse("bob@example.org/tv"))


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
    arrive(them, "bob@example.org/new")
    expected = "bob@example.org is online (chat, new), but no client there takes files"
    with pytest.raises(OfflineError, match=re.escape(expected)) as caught:
        them.choose(BOB)
    assert "SI file transfer" in caught.value.hint
    arrive(them, f"bob@example.org/{'n' * 1_000}")
    with pytest.raises(OfflineError) as caught:
        them.choose(BOB)
    assert len(str(caught.value)) < 400


def test_a_peer_whose_client_has_not_told_yet_is_waited_for() -> None:
    them = contacts()
    arrive(them, "bob@example.org/chat")
    come(them, "bob@example.org/new")
    expected = "bob@example.org is online; syncd is asking what its client can do"
    with pytest.raises(OfflineError, match=f"^{re.escape(expected)}$"):
        them.choose(BOB)


# Subscriptions

OWN = JID.parse("user@example.org")


def subscriptions(*items: str) -> Subscriptions:
    """With this roster: each item is jid, subscription and question."""
    them = Subscriptions([BOB, CAROL])
    them.roster_received(roster(*items), OWN)
    return them


def roster(*items: str) -> Element:
    query = make("{jabber:iq:roster}query")
    for item in items:
        jid, subscription, *ask = item.split()
        query.append(
            make(
                "{jabber:iq:roster}item",
                {"jid": jid, "subscription": subscription, "ask": ask[0] if ask else None},
            )
        )
    return query


def said(them: Subscriptions, now: float = 0.0) -> list[str]:
    """What is sent now, all of it."""
    sent = []
    while (stanza := them.next(now)[0]) is not None:
        sent.append(f"{stanza.get('type')} {stanza.get('to')}")
    return sent


@pytest.mark.parametrize(
    ("items", "asked_for", "unseen"),
    [
        ([], ["bob@example.org", "carol@example.org"], (BOB, CAROL)),
        (["bob@example.org both", "carol@example.org both"], [], ()),
        (["bob@example.org to", "carol@example.org none subscribe"], [], (BOB, CAROL)),
        (["bob@example.org from", "carol@example.org both"], ["bob@example.org"], ()),
        (["bob@example.org/x both", "@ both", "x@y both"], [BOB, CAROL.bare], (BOB, CAROL)),
    ],
)
def test_who_is_not_seen_is_asked_for_it_and_who_does_not_see_us_is_told(
    items: list[str], asked_for: list[str], unseen: tuple[JID, ...]
) -> None:
    them = subscriptions(*items)
    assert said(them) == [f"subscribe {jid}" for jid in asked_for]
    assert them.unseen() == unseen


def test_without_a_roster_nobody_is_asked_and_everybody_told() -> None:
    them = Subscriptions([BOB, CAROL])
    them.roster_received(None, OWN)
    assert said(them) == []
    assert them.unseen() == (BOB, CAROL)


def test_our_own_account_needs_no_subscription() -> None:
    them = Subscriptions([OWN])
    them.roster_received(roster(), OWN)
    assert said(them) == []
    assert them.unseen() == ()


def test_peers_are_let_in_each_time_they_ask_and_strangers_never() -> None:
    them = subscriptions("bob@example.org both", "carol@example.org both")
    mallory = JID.parse("mallory@example.org")
    for sender in (BOB, mallory, BOB.with_resource("x"), BOB):
        assert them.presence_received("subscribe", sender) is None
    assert said(them) == ["subscribed bob@example.org"]
    them.presence_received("subscribe", BOB)
    assert said(them) == ["subscribed bob@example.org"]
    assert them.presence_received(None, mallory.with_resource("pc")) is None


@pytest.mark.parametrize(
    "kind", ["subscribed", "unsubscribed", "unsubscribe", "error", "probe"]
)
def test_what_else_is_said_about_subscriptions_is_not_answered(kind: str) -> None:
    """Or two programs would never come to an end."""
    them = subscriptions()
    said(them)
    for _ in range(3):
        assert them.presence_received(kind, BOB) is None
    assert said(them, 1e3) == []


def test_who_said_no_is_not_asked_on_the_next_session_unless_they_ask_us() -> None:
    them = subscriptions("carol@example.org both")
    assert said(them) == ["subscribe bob@example.org"]
    them.presence_received("unsubscribed", BOB)
    for now in (1e3, 2e3):
        them.clear()
        them.roster_received(roster("carol@example.org both"), OWN)
        assert said(them, now) == []
    them.presence_received("subscribe", BOB)
    assert said(them, 3e3) == ["subscribed bob@example.org"]
    them.clear()
    them.roster_received(roster("carol@example.org both"), OWN)
    assert said(them, 4e3) == ["subscribe bob@example.org"]


def test_who_changed_their_mind_may_be_asked_again() -> None:
    them = subscriptions("carol@example.org both")
    said(them)
    them.presence_received("unsubscribed", BOB)
    them.presence_received("subscribed", BOB)
    them.clear()
    them.roster_received(roster("carol@example.org both"), OWN)
    assert said(them) == ["subscribe bob@example.org"]


def test_no_more_is_said_in_a_while_than_every_server_takes() -> None:
    peers = [JID.parse(f"p{number}@example.org") for number in range(12)]
    them = Subscriptions(peers)
    assert them.next(0.0) == (None, math.inf)
    them.roster_received(roster(), OWN)
    times = []
    now = 100.0
    while now < math.inf:
        stanza, now = them.next(now)
        if stanza is not None:
            times.append(now)
    expected = [100.0] * 5 + [165.0] * 5 + [230.0] * 2
    assert (SUBSCRIPTIONS, SUBSCRIPTIONS_WINDOW) == (5, 65.0)
    assert times == expected


def test_the_pace_outlasts_the_session() -> None:
    them = Subscriptions([JID.parse(f"p{number}@example.org") for number in range(12)])
    for now in (0.0, 1.0):
        them.roster_received(roster(), OWN)
        assert len(said(them, now)) == (5 if now == 0.0 else 0)
        them.clear()


def test_a_client_that_comes_is_greeted_once_if_it_cannot_see_us() -> None:
    """RFC 6121 section 4.6: presence directed at it, for want of a subscription."""
    them = Subscriptions([BOB, CAROL])
    pc = BOB.with_resource("pc")
    assert them.presence_received(None, pc) is None  # all are told behind the roster
    them.roster_received(roster("carol@example.org from"), OWN)
    assert them.presence_received(None, pc) == pc
    assert them.presence_received(None, pc) is None
    assert them.presence_received(None, BOB) is None
    assert them.presence_received(None, CAROL) is None
    them.presence_received("unavailable", pc)
    assert them.presence_received(None, pc) == pc
    them.clear()
    them.roster_received(None, OWN)
    assert them.presence_received(None, pc) == pc
    # Not the one who is configured.
    assert them.presence_received(None, CAROL.with_resource("laptop")) is None
    assert them.presence_received(None, CAROL) == CAROL


def test_a_change_of_the_roster_changes_who_is_greeted() -> None:
    them = subscriptions()
    pc = BOB.with_resource("pc")
    them.roster_pushed(roster("bob@example.org both"))
    assert them.presence_received(None, pc) is None
    assert them.unseen() == (CAROL,)
    them.roster_pushed(roster("bob@example.org remove"))
    assert them.presence_received(None, pc) == pc


def test_only_so_many_clients_of_a_peer_are_greeted() -> None:
    them = subscriptions()
    greeted = [
        them.presence_received(None, BOB.with_resource(str(number)))
        for number in range(MAX_RESOURCES + 5)
    ]
    assert sum(jid is not None for jid in greeted) == MAX_RESOURCES
    assert them.presence_received(None, CAROL) == CAROL
