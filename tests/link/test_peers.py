"""Finding the peers; the session is played by the test, question by question."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from syncd.errors import ErrorType, OfflineError, StanzaError
from syncd.link.contacts import SUBSCRIPTIONS, SUBSCRIPTIONS_WINDOW, Contacts
from syncd.link.peers import CHECK_GONE, PRIORITY, ROSTER, SAME_KIND, Peers
from syncd.xmpp.caps import make_caps, read_caps
from syncd.xmpp.disco import INFO, Identity, make_info
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import IQ, PRESENCE, Iq, make_error, make_presence
from syncd.xmpp.xml import make
from tests.support.wire import LAPTOP

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from xml.etree.ElementTree import Element

    from trio.testing import MockClock

    from syncd.xmpp.stanza import IqType

SI = "http://jabber.org/protocol/si"
BOB = JID.parse("bob@example.org/pc")
TV = BOB.with_resource("tv")
CAROL = JID.parse("carol@example.org/pc")
INFO_OF_US = make_info(Identity("client", "bot", "syncd"), {"urn:us"})
TAKES_FILES = make_info(Identity("client", "pc"), {SI})
SEEN = make(
    ROSTER,
    None,
    *(
        make("{jabber:iq:roster}item", {"jid": jid, "subscription": "both"})
        for jid in ("bob@example.org", "carol@example.org")
    ),
)


class Question:
    """A request that waits for its answer."""

    def __init__(self, to: JID | None, payload: Element) -> None:
        self.to, self.payload = to, payload
        self._answer: Iq | Exception | None = None
        self._answered = trio.Event()

    def answer(self, outcome: Element | Exception | None = None) -> None:
        if isinstance(outcome, Exception):
            self._answer = outcome
        else:
            self._answer = Iq("result", "1", self.to, outcome, make(IQ))
        self._answered.set()

    async def wait(self) -> Iq:
        await self._answered.wait()
        assert self._answer is not None
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class Wire:
    """The session: what was asked and said on it.

    Attributes:
      sent: Type and address of every presence, after the first.
      left: Who was there and went.
      changes: How often somebody came or went.
      over: Nothing can be sent any more.
    """

    def __init__(self, *peers: JID) -> None:
        self.sent: list[str] = []
        self.presences: list[Element] = []
        self.times: list[float] = []
        self.left: list[JID] = []
        self.changes = 0
        self.over = False
        self._put, self._get = trio.open_memory_channel[Question](100)
        self.contacts = Contacts(
            peers or [BOB.bare, CAROL.bare], required=frozenset({SI}), preferred="urn:sync"
        )
        self.peers = Peers(
            self.contacts,
            make_caps(INFO_OF_US),
            request=self._request,
            send=self._send,
            left=self.left.append,
            changed=self._changed,
        )

    async def asked(self) -> Question:
        with trio.fail_after(1_000):
            return await self._get.receive()

    async def roster(self, payload: Element | None = SEEN) -> None:
        question = await self.asked()
        assert (question.to, question.payload.tag) == (None, ROSTER)
        question.answer(payload)
        await wait_all_tasks_blocked()

    async def meet(self, jid: JID, promised: Element | None = None) -> None:
        """Let a client come that takes files, and says so when it is asked."""
        self.come(jid, promised)
        (await self.asked()).answer(TAKES_FILES)
        await wait_all_tasks_blocked()

    async def nothing(self) -> None:
        """Assert that nothing is asked now."""
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):
            self._get.receive_nowait()

    def come(self, jid: JID, features: Element | None = None, kind: str | None = None) -> None:
        presence = make(PRESENCE, {"from": str(jid), "type": kind})
        if features is not None:
            presence.append(make_caps(features))
        self.peers.presence_received(presence)

    async def _request(self, kind: IqType, to: JID | None, payload: Element) -> Iq:
        assert kind == "get"
        question = Question(to, payload)
        self._put.send_nowait(question)
        return await question.wait()

    def _send(self, stanza: Element) -> None:
        if self.over:
            raise OfflineError("over")
        self.presences.append(stanza)
        self.times.append(trio.current_time())
        self.sent.append(f"{stanza.get('type', 'available')} {stanza.get('to', 'all')}")

    def _changed(self) -> None:
        self.changes += 1


@asynccontextmanager
async def session(wire: Wire) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        wire.peers.begin(nursery, LAPTOP)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def begun() -> AsyncIterator[Wire]:
    """A session that has its roster: everybody sees everybody."""
    wire = Wire()
    async with session(wire):
        await wire.roster()
        yield wire


def push(sender: JID | None, kind: IqType = "set") -> Iq:
    return Iq(kind, "1", sender, SEEN, make(IQ))


async def test_a_session_begins_with_our_presence_and_what_we_can() -> None:
    async with begun() as wire:
        (presence,) = wire.presences
        assert wire.sent == ["available all"]
        assert presence.findtext("{jabber:client}priority") == str(PRIORITY)
        assert read_caps(presence) is not None
        await wire.nothing()


async def test_peers_who_do_not_see_us_are_shown_the_same() -> None:
    wire = Wire()
    async with session(wire):
        await wire.roster(None)
        assert wire.sent[:3] == [
            "available all",
            "available bob@example.org",
            "available carol@example.org",
        ]
        assert {read_caps(presence) for presence in wire.presences[:3]} == {
            read_caps(wire.presences[0])
        }
        wire.come(BOB)
        assert wire.sent[-1] == f"available {BOB}"


@pytest.mark.parametrize(
    "error", [OfflineError("silence"), StanzaError(ErrorType.CANCEL, "service-unavailable")]
)
async def test_without_a_roster_nobody_is_asked_for_a_subscription(error: Exception) -> None:
    wire = Wire()
    async with session(wire):
        (await wire.asked()).answer(error)
        await wait_all_tasks_blocked()
        assert wire.sent == [
            "available all",
            "available bob@example.org",
            "available carol@example.org",
        ]


async def test_a_stream_that_has_ended_already_is_no_news() -> None:
    wire = Wire()
    wire.over = True
    async with session(wire):
        await wire.roster(None)
    assert wire.sent == []


async def test_many_subscriptions_are_not_a_burst(autojump_clock: MockClock) -> None:
    """COMPAT(ejabberd): it drops the sixth within 60 s without a word."""
    peers = [JID.parse(f"p{number}@example.org") for number in range(12)]
    wire = Wire(*peers)
    async with session(wire):
        await wire.roster(None)
        await trio.sleep(3 * SUBSCRIPTIONS_WINDOW)
        pairs = zip(wire.sent, wire.times, strict=True)
        times = [now for text, now in pairs if text.startswith("subscribe ")]
        assert times == [
            (number // SUBSCRIPTIONS) * SUBSCRIPTIONS_WINDOW for number in range(12)
        ]


async def test_whoever_comes_is_asked_under_the_node_of_the_presence() -> None:
    async with begun() as wire:
        wire.come(BOB, TAKES_FILES)
        question = await wire.asked()
        caps = read_caps(make_with(TAKES_FILES))
        assert caps is not None
        assert (question.to, question.payload.tag) == (BOB, INFO)
        assert question.payload.get("node") == caps.query_node
        question.answer(TAKES_FILES)
        await wait_all_tasks_blocked()
        assert wire.contacts.online() == {BOB.bare}
        assert wire.changes == 1
        wire.come(TV, TAKES_FILES)
        await wire.nothing()
        assert wire.contacts.unknown(TV) is None


def make_with(info: Element) -> Element:
    presence = make_presence()
    presence.append(make_caps(info))
    return presence


async def test_who_does_not_know_the_node_is_asked_without() -> None:
    async with begun() as wire:
        wire.come(BOB, TAKES_FILES)
        (await wire.asked()).answer(StanzaError(ErrorType.CANCEL, "item-not-found"))
        question = await wire.asked()
        assert question.payload.get("node") is None
        question.answer(TAKES_FILES)
        await wait_all_tasks_blocked()
        assert wire.contacts.online() == {BOB.bare}


async def test_of_many_clients_of_a_kind_one_is_asked() -> None:
    async with begun() as wire:
        for jid in (BOB, TV, CAROL):
            wire.come(jid, TAKES_FILES)
        question = await wire.asked()
        await wire.nothing()
        question.answer(TAKES_FILES)
        await wire.nothing()
        assert wire.contacts.online() == {BOB.bare, CAROL.bare}


@pytest.mark.parametrize("outcome", ["refusal", "lie"])
async def test_when_one_does_not_tell_the_truth_the_others_of_its_kind_are_asked(
    outcome: str,
) -> None:
    async with begun() as wire:
        for jid in (BOB, CAROL):
            wire.come(jid, TAKES_FILES)
        question = await wire.asked()
        refusal = StanzaError(ErrorType.CANCEL, "service-unavailable")
        question.answer(refusal if outcome == "refusal" else INFO_OF_US)
        question = await wire.asked()
        question.answer(TAKES_FILES)
        await wait_all_tasks_blocked()
        assert question.to is not None
        # Who promised the same and told nothing is known by it; who told a lie is its lie.
        both = {BOB.bare, CAROL.bare}
        assert wire.contacts.online() == (both if outcome == "refusal" else {question.to.bare})


async def test_a_silent_client_does_not_hold_up_the_others_of_its_kind(
    autojump_clock: MockClock,
) -> None:
    async with begun() as wire:
        for jid in (BOB, CAROL):
            wire.come(jid, TAKES_FILES)
        first = await wire.asked()
        second = await wire.asked()
        assert {first.to, second.to} == {BOB, CAROL}
        assert trio.current_time() == SAME_KIND
        second.answer(TAKES_FILES)
        await wait_all_tasks_blocked()
        assert wire.contacts.online() == {BOB.bare, CAROL.bare}
        first.answer(OfflineError("silence"))
        await wire.nothing()


async def test_an_answer_to_an_older_presence_is_asked_for_again(
    autojump_clock: MockClock,
) -> None:
    async with begun() as wire:
        wire.come(BOB, INFO_OF_US)
        question = await wire.asked()
        wire.come(BOB, TAKES_FILES)
        question.answer(INFO_OF_US)
        (await wire.asked()).answer(TAKES_FILES)
        await wait_all_tasks_blocked()
        assert wire.contacts.online() == {BOB.bare}


async def test_our_own_presence_and_that_of_strangers_are_nothing() -> None:
    wire = Wire(LAPTOP.bare, BOB.bare)
    async with session(wire):
        await wire.roster(None)
        before = list(wire.sent)
        wire.come(LAPTOP, TAKES_FILES)
        for kind in (None, "subscribe", "probe", "error"):
            wire.come(JID.parse("mallory@example.org/pc"), TAKES_FILES, kind)
        wire.peers.presence_received(make(PRESENCE))
        await wire.nothing()
        assert wire.sent == before
        # Another client of our own account is a peer like any other.
        wire.come(LAPTOP.with_resource("pc"), TAKES_FILES)
        assert (await wire.asked()).to == LAPTOP.with_resource("pc")


async def test_peers_who_ask_may_see_us() -> None:
    async with begun() as wire:
        wire.come(BOB.bare, kind="subscribe")
        await wait_all_tasks_blocked()
        assert wire.sent[1:] == ["subscribed bob@example.org"]


async def test_an_error_means_that_nobody_is_there_and_is_not_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with begun() as wire:
        await wire.meet(BOB, TAKES_FILES)
        error = StanzaError(ErrorType.CANCEL, "remote-server-not-found", "x" * 10_000)
        with caplog.at_level("INFO"):
            wire.peers.presence_received(
                make(PRESENCE, {"from": str(BOB), "type": "error"}, make_error(error))
            )
        assert "remote-server-not-found" in caplog.text
        assert len(caplog.text) < 1_000
        assert wire.contacts.online() == frozenset()
        assert wire.changes == 2
        await wire.nothing()
        assert wire.sent == ["available all"]


async def test_only_who_was_there_can_leave() -> None:
    """COMPAT(prosody): of who is offline the server says so once more, by the bare JID."""
    async with begun() as wire:
        wire.come(BOB, TAKES_FILES)
        for jid in (BOB.bare, TV, CAROL, JID.parse("mallory@example.org/pc")):
            wire.come(jid, kind="unavailable")
        assert wire.left == []
        for _ in range(2):
            wire.come(BOB, kind="unavailable")
        assert wire.left == [BOB]


@pytest.mark.parametrize("sender", [None, LAPTOP.bare])
async def test_a_roster_push_of_our_own_account_counts(sender: JID | None) -> None:
    wire = Wire()
    async with session(wire):
        await wire.roster(make(ROSTER))
        before = len(wire.sent)
        wire.peers.on_roster(push(sender))
        wire.come(BOB)
        assert wire.sent[before:] == []


@pytest.mark.parametrize("sender", [BOB, BOB.bare, LAPTOP, JID("", "example.org")])
async def test_a_roster_push_of_anybody_else_does_not_count(sender: JID) -> None:
    wire = Wire()
    with pytest.raises(StanzaError, match="service-unavailable"):
        wire.peers.on_roster(push(None))  # there is no session
    async with session(wire):
        await wire.roster(make(ROSTER))
        with pytest.raises(StanzaError, match="service-unavailable"):
            wire.peers.on_roster(push(sender))
        wire.come(BOB)
        assert wire.sent[-1] == f"available {BOB}"


async def test_nobody_gets_our_roster() -> None:
    wire = Wire()
    async with session(wire):
        with pytest.raises(StanzaError, match="bad-request"):
            wire.peers.on_roster(push(LAPTOP.bare, "get"))


async def test_who_is_said_to_be_gone_is_asked_later_whether_it_is(
    autojump_clock: MockClock,
) -> None:
    async with begun() as wire:
        await wire.meet(BOB)
        before = trio.current_time()
        wire.peers.gone(wire.contacts.choose(BOB.bare))
        assert wire.contacts.online() == frozenset()
        question = await wire.asked()
        assert trio.current_time() == before + CHECK_GONE
        question.answer(TAKES_FILES)
        await wait_all_tasks_blocked()
        assert wire.contacts.online() == {BOB.bare}
        assert wire.changes == 3


async def test_who_has_come_back_is_not_asked_whether_it_is_gone(
    autojump_clock: MockClock,
) -> None:
    async with begun() as wire:
        await wire.meet(BOB)
        chosen = wire.contacts.choose(BOB.bare)
        wire.come(BOB)
        wire.peers.gone(chosen)
        assert wire.contacts.online() == {BOB.bare}
        await trio.sleep(2 * CHECK_GONE)
        await wire.nothing()


async def test_after_the_session_nobody_is_asked() -> None:
    async with begun() as wire:
        await wire.meet(BOB)
        chosen = wire.contacts.choose(BOB.bare)
    wire.peers.gone(chosen)
    await wire.nothing()
    assert wire.contacts.online() == frozenset()


async def test_each_session_begins_anew() -> None:
    wire = Wire()
    for _ in range(2):
        async with session(wire):
            await wire.roster()
            await wire.meet(BOB)
            assert wire.contacts.online() == {BOB.bare}
        wire.contacts.clear()
