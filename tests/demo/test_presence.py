"""Rosters and presence, with sessions that only remember what they were sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from syncd.demo import presence
from syncd.demo.presence import GROUP, ITEM, ROSTER, Presences, Session, Sessions
from syncd.errors import StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import PRESENCE, make_iq, make_presence, read_iq
from syncd.xmpp.xml import NS_CLIENT, make

if TYPE_CHECKING:
    from collections.abc import Mapping
    from xml.etree.ElementTree import Element

BOTH = {"alice": {"bob": "both"}, "bob": {"alice": "both"}}
ALICE, BOB = JID.parse("alice@demo.example"), JID.parse("bob@demo.example")


class World:
    """A server's presence, and what each session has heard since last asked."""

    def __init__(self, rosters: Mapping[str, Mapping[str, str]]) -> None:
        self.sessions = Sessions()
        accounts: dict[str, Mapping[str, str]] = {"alice": {}, "bob": {}, "carol": {}}
        self.presences = Presences(
            "demo.example", self.sessions, self._sent, {**accounts, **rosters}
        )
        self._heard: dict[JID, list[Element]] = {}

    def _sent(self, stanza: Element, session: Session) -> None:
        self._heard.setdefault(session.jid, []).append(stanza)

    def join(self, jid: str, *, interested: bool = False, available: bool = True) -> Session:
        session = Session(
            JID.parse(jid), lambda _: None, lambda _: None, lambda: None, interested=interested
        )
        self.sessions.add(session)
        if available:
            self.say(session)
        return session

    def say(self, session: Session, kind: str | None = None, to: JID | None = None) -> None:
        stanza = make_presence(kind, to)
        stanza.set("from", str(session.jid))
        self.presences.receive(session, stanza, to)

    def heard(self, session: Session) -> list[str]:
        """What a session was sent, in words."""
        return [self._word(stanza) for stanza in self._heard.pop(session.jid, [])]

    @staticmethod
    def _word(stanza: Element) -> str:
        if stanza.tag == PRESENCE:
            return f"{stanza.get('from')} {stanza.get('type', 'available')}"
        item = stanza.find(f"{ROSTER}/{ITEM}")
        assert item is not None
        ask = " asked" if item.get("ask") else ""
        return f"push {item.get('jid')} {item.get('subscription')}{ask}"

    def roster(self, session: Session) -> list[tuple[str, str]]:
        iq = read_iq(make_iq("get", "1", None, make(ROSTER)))
        items = self.presences.get_roster(session, iq)
        return [(item.get("jid", ""), item.get("subscription", "")) for item in items]

    def set_roster(self, session: Session, **attributes: str) -> None:
        groups = [make(GROUP, text=g) for g in attributes.pop("groups", "").split()]
        query = make(ROSTER, None, make(ITEM, attributes, *groups))
        self.presences.set_roster(session, read_iq(make_iq("set", "1", None, query)))


def test_initial_presence_goes_out_and_the_others_comes_in() -> None:
    world = World(BOTH)
    alice = world.join("alice@demo.example/a")
    assert world.heard(alice) == [
        "alice@demo.example/a available",
        "bob@demo.example unavailable",
    ]
    bob = world.join("bob@demo.example/b")
    assert world.heard(alice) == ["bob@demo.example/b available"]
    assert world.heard(bob) == [
        "bob@demo.example/b available",
        "alice@demo.example/a available",
    ]


def test_later_presence_is_not_answered_with_everybodys() -> None:
    world = World(BOTH)
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    world.heard(alice), world.heard(bob)
    world.say(alice)
    assert world.heard(alice) == ["alice@demo.example/a available"]
    assert world.heard(bob) == ["alice@demo.example/a available"]


def test_ones_own_other_sessions_see_each_other() -> None:
    world = World({})
    first, second = world.join("alice@demo.example/1"), world.join("alice@demo.example/2")
    assert world.heard(first)[1:] == ["alice@demo.example/2 available"]
    assert world.heard(second)[1:] == ["alice@demo.example/1 available"]


def test_a_session_without_presence_hears_nothing() -> None:
    world = World(BOTH)
    alice = world.join("alice@demo.example/a", available=False)
    world.join("bob@demo.example/b")
    assert world.heard(alice) == []


@pytest.mark.parametrize("kind", ["to", "none"])
def test_who_may_not_see_does_not(kind: str) -> None:
    """Bob's roster does not let alice see him, whatever hers says."""
    world = World({"alice": {"bob": "both"}, "bob": {"alice": kind}})
    alice = world.join("alice@demo.example/a")
    world.join("bob@demo.example/b")
    assert world.heard(alice) == ["alice@demo.example/a available"]


def test_the_end_of_a_session_is_told_once_to_all_who_knew() -> None:
    world = World(BOTH)
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    carol = world.join("carol@demo.example/c")
    world.say(alice, to=carol.jid)
    world.say(alice, to=bob.jid)  # who also sees her anyway
    world.heard(bob), world.heard(carol)
    world.sessions.remove(alice)
    world.presences.end(alice)
    assert world.heard(bob) == ["alice@demo.example/a unavailable"]
    assert world.heard(carol) == ["alice@demo.example/a unavailable"]
    assert not world.sessions.available(ALICE)


def test_the_end_of_an_unavailable_session_is_told_only_to_whom_it_spoke() -> None:
    world = World(BOTH)
    alice = world.join("alice@demo.example/a", available=False)
    bob, carol = world.join("bob@demo.example/b"), world.join("carol@demo.example/c")
    world.say(alice, to=carol.jid)
    assert world.heard(carol)[-1] == "alice@demo.example/a available"
    world.heard(bob)
    world.presences.end(alice)
    assert world.heard(bob) == []
    assert world.heard(carol) == ["alice@demo.example/a unavailable"]


def test_who_says_goodbye_is_gone_for_everybody_else() -> None:
    world = World(BOTH)
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    world.heard(alice), world.heard(bob)
    world.say(alice, "unavailable")
    assert world.heard(bob) == ["alice@demo.example/a unavailable"]
    assert world.heard(alice) == []
    assert world.sessions.matching(ALICE) == [alice]
    assert world.sessions.available(ALICE) == []


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("probe", None),
        ("probe", "bob@demo.example"),
        ("subscribe", "nobody@demo.example"),
        ("subscribe", "demo.example"),
        ("subscribe", "alice@demo.example"),
        ("unsubscribe", "carol@demo.example"),
        ("unsubscribed", "carol@demo.example"),
        (None, "bob@demo.example/elsewhere"),
    ],
)
def test_presence_that_changes_nothing(kind: str | None, to: str | None) -> None:
    world = World(BOTH)
    alice = world.join("alice@demo.example/a", interested=True)
    carol = world.join("carol@demo.example/c", interested=True)
    bob = world.join("bob@demo.example/b", interested=True)
    for session in (alice, bob, carol):
        world.heard(session)
    world.say(alice, kind, JID.parse(to) if to else None)
    assert [world.heard(session) for session in (alice, bob)] == [[], []]
    assert world.roster(alice) == [("bob@demo.example", "both")]
    assert world.roster(carol) == []


def test_a_directed_unavailable_is_the_last_word() -> None:
    world = World({})
    alice, carol = world.join("alice@demo.example/a"), world.join("carol@demo.example/c")
    world.say(alice, to=carol.jid)
    world.say(alice, "unavailable", to=carol.jid)
    world.heard(carol)
    world.presences.end(alice)
    assert world.heard(carol) == []


def test_presence_to_a_bare_address_reaches_all_that_are_available() -> None:
    world = World({})
    alice = world.join("alice@demo.example/a")
    one = world.join("bob@demo.example/1")
    two = world.join("bob@demo.example/2", available=False)
    world.heard(one)
    world.say(alice, to=BOB)
    assert world.heard(one) == ["alice@demo.example/a available"]
    assert world.heard(two) == []


def test_presence_to_another_server_is_refused() -> None:
    world = World({})
    alice = world.join("alice@demo.example/a")
    with pytest.raises(StanzaError) as caught:
        world.say(alice, to=JID.parse("x@elsewhere.example"))
    assert caught.value.condition == "remote-server-not-found"


def test_directed_presence_is_remembered_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_DIRECTED", 1)
    world = World({})
    alice = world.join("alice@demo.example/a")
    world.say(alice, to=BOB)
    with pytest.raises(StanzaError) as caught:
        world.say(alice, to=ALICE.with_resource("x"))
    assert caught.value.condition == "resource-constraint"


def test_the_handshake_of_a_subscription() -> None:
    world = World({})
    alice = world.join("alice@demo.example/a", interested=True)
    bob = world.join("bob@demo.example/b", interested=True)
    world.heard(alice), world.heard(bob)
    world.say(alice, "subscribe", BOB)
    assert world.heard(alice) == ["push bob@demo.example none asked"]
    assert world.heard(bob) == ["alice@demo.example subscribe"]
    assert world.roster(bob) == []
    world.say(bob, "subscribed", ALICE)
    assert world.heard(bob) == ["push alice@demo.example from"]
    assert world.heard(alice) == [
        "bob@demo.example subscribed",
        "push bob@demo.example to",
        "bob@demo.example/b available",
    ]
    assert world.roster(alice) == [("bob@demo.example", "to")]


def test_a_request_can_be_denied_and_taken_back() -> None:
    world = World({})
    alice = world.join("alice@demo.example/a", interested=True)
    bob = world.join("bob@demo.example/b")
    for end, other in ((bob, ALICE), (alice, BOB)):
        world.say(alice, "subscribe", BOB)
        world.heard(alice), world.heard(bob)
        world.say(end, "unsubscribed" if end is bob else "unsubscribe", other)
        assert [line for line in world.heard(alice) if "subscri" in line] == (
            ["bob@demo.example unsubscribed"] if end is bob else []
        )
        assert world.roster(alice) == []
        world.say(bob, "subscribed", ALICE)
        assert world.heard(alice) == []


def test_a_request_waits_for_who_is_offline() -> None:
    world = World({})
    alice = world.join("alice@demo.example/a")
    world.say(alice, "subscribe", BOB)
    bob = world.join("bob@demo.example/b")
    assert world.heard(bob) == ["bob@demo.example/b available", "alice@demo.example subscribe"]


def test_an_agreement_of_long_ago_answers_at_once() -> None:
    world = World({"bob": {"alice": "from"}})
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    world.heard(alice), world.heard(bob)
    world.say(alice, "subscribe", BOB)
    assert world.heard(alice) == ["bob@demo.example subscribed", "bob@demo.example/b available"]
    assert world.heard(bob) == []
    assert world.roster(alice) == [("bob@demo.example", "to")]


def test_an_agreement_that_nobody_asked_for_is_nothing() -> None:
    world = World({})
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    world.heard(alice)
    world.say(bob, "subscribed", ALICE)
    assert world.heard(alice) == []
    assert world.roster(bob) == []


@pytest.mark.parametrize(
    ("kind", "roster_of_alice", "roster_of_bob", "gone_for"),
    [("unsubscribe", "from", "to", "alice"), ("unsubscribed", "to", "from", "bob")],
)
def test_the_end_of_a_subscription(
    kind: str, roster_of_alice: str, roster_of_bob: str, gone_for: str
) -> None:
    world = World(BOTH)
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    world.heard(alice), world.heard(bob)
    world.say(alice, kind, BOB)
    heard = {"alice": world.heard(alice), "bob": world.heard(bob)}
    other = {"alice": "bob@demo.example/b", "bob": "alice@demo.example/a"}[gone_for]
    assert f"{other} unavailable" in heard[gone_for]
    assert f"alice@demo.example {kind}" in heard["bob"]
    assert world.roster(alice) == [("bob@demo.example", roster_of_alice)]
    assert world.roster(bob) == [("alice@demo.example", roster_of_bob)]


def test_a_roster_is_changed_and_told_to_who_asked_for_it() -> None:
    world = World({})
    alice = world.join("alice@demo.example/a", available=False)
    other = world.join("alice@demo.example/x", interested=True, available=False)
    world.set_roster(alice, jid="bob@demo.example", name="Bob", groups="g1 g2")
    assert world.heard(alice) == []
    assert world.heard(other) == ["push bob@demo.example none"]
    assert world.roster(alice) == [("bob@demo.example", "none")]


def test_a_contact_is_removed_with_both_subscriptions() -> None:
    world = World(BOTH)
    alice = world.join("alice@demo.example/a", interested=True)
    bob = world.join("bob@demo.example/b")
    world.heard(alice)
    world.set_roster(alice, jid="bob@demo.example", subscription="remove")
    assert world.heard(alice)[-1] == "push bob@demo.example remove"
    assert world.roster(alice) == []
    assert world.roster(bob) == [("alice@demo.example", "none")]


@pytest.mark.parametrize(
    ("attributes", "condition"),
    [
        ({"jid": "@"}, "jid-malformed"),
        ({"jid": "carol@demo.example", "subscription": "remove"}, "item-not-found"),
        ({"jid": "carol@demo.example", "name": "x" * 300}, "not-acceptable"),
        ({"jid": "carol@demo.example", "groups": "g " * 20}, "not-acceptable"),
    ],
)
def test_changes_that_are_refused(attributes: dict[str, str], condition: str) -> None:
    world = World(BOTH)
    alice = world.join("alice@demo.example/a")
    with pytest.raises(StanzaError) as caught:
        world.set_roster(alice, **attributes)
    assert caught.value.condition == condition


def test_one_contact_at_a_time() -> None:
    world = World({})
    alice = world.join("alice@demo.example/a")
    iq = read_iq(make_iq("set", "1", None, make(ROSTER)))
    with pytest.raises(StanzaError) as caught:
        world.presences.set_roster(alice, iq)
    assert caught.value.condition == "bad-request"


def test_a_roster_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MAX_CONTACTS", 1)
    world = World(BOTH)
    alice = world.join("alice@demo.example/a")
    with pytest.raises(StanzaError) as caught:
        world.set_roster(alice, jid="carol@demo.example")
    assert caught.value.condition == "resource-constraint"


@pytest.mark.parametrize(
    ("text", "expected"), [("-1", -1), (None, 0), ("much", 0)], ids=["set", "unset", "odd"]
)
def test_priority(text: str | None, expected: int) -> None:
    world = World({})
    alice = world.join("alice@demo.example/a", available=False)
    assert alice.priority < -128
    stanza = make_presence()
    if text is not None:
        stanza.append(make(f"{{{NS_CLIENT}}}priority", text=text))
    world.presences.receive(alice, stanza, None)
    assert alice.priority == expected


def test_sessions_are_found_by_full_and_by_bare_address() -> None:
    world = World({})
    one, two = world.join("bob@demo.example/1"), world.join("bob@demo.example/2")
    assert world.sessions.get(one.jid) is one
    assert world.sessions.matching(BOB) == [one, two]
    assert world.sessions.matching(two.jid) == [two]
    assert world.sessions.matching(BOB.with_resource("3")) == []
    assert (list(world.sessions), len(world.sessions)) == ([one, two], 2)
    assert world.sessions.remove(one)
    assert not world.sessions.remove(one)
    assert world.sessions.remove(two)
    assert world.sessions.matching(BOB) == []
