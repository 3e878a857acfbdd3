"""A session, and the client that keeps having one, against a server in memory."""

from __future__ import annotations

import random
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from syncd.errors import (
    AuthenticationError,
    ErrorType,
    JournalError,
    OfflineError,
    RemoteProtocolError,
    StanzaError,
    StreamError,
    SyncdError,
)
from syncd.xmpp import connect, session
from syncd.xmpp.connect import Account, Connection
from syncd.xmpp.contacts import Contacts
from syncd.xmpp.disco import INFO, NS_INFO, PING, Identity
from syncd.xmpp.jid import JID
from syncd.xmpp.session import (
    BACK_OFF_LAST,
    BACK_OFF_LOGIN,
    BACK_OFF_LOGIN_LAST,
    MAX_HANDLING,
    PING_AFTER,
    PING_TIMEOUT,
    REQUEST_TIMEOUT,
    ROSTER,
    Client,
    Session,
    back_off,
)
from syncd.xmpp.stanza import ERROR, IQ, PRESENCE, Iq
from syncd.xmpp.stream import Event, StanzaReceived, StreamEnded, TLSWanted
from syncd.xmpp.xml import make
from tests.support.wire import LAPTOP, PASSWORD, S_FOOTER, ClientGoneError, Server, open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping
    from xml.etree.ElementTree import Element

    from trio.testing import MockClock

    from syncd.xmpp.session import Handler

BOB = JID.parse("bob@example.org/pc")
CAROL = JID.parse("carol@example.org")
PROXY = JID.parse("proxy.example.org")
DOMAIN = JID.parse("example.org")

QUERY = "{urn:a}query"
A_QUERY = "<query xmlns='urn:a'/>"
SI = "http://jabber.org/protocol/si"


class Asked:
    """A request under way."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._outcome: Iq | SyncdError

    async def ask(
        self, who: Session | Client, to: JID | None, payload: Element, timeout: float
    ) -> None:
        try:
            self._outcome = await who.request("get", to, payload, timeout)
        except SyncdError as error:
            self._outcome = error
        self._done.set()

    async def answer(self) -> Iq:
        """Wait for the answer; raise the error if it is one."""
        await self._done.wait()
        if isinstance(self._outcome, SyncdError):
            raise self._outcome
        return self._outcome

    @property
    def done(self) -> bool:
        return self._done.is_set()


class Life:
    """A session that runs, and the server at the other end."""

    def __init__(self, subject: Session, server: Server, nursery: trio.Nursery) -> None:
        self.session = subject
        self.server = server
        self.presences: list[Element] = []
        self.ended = trio.Event()
        self.error: SyncdError | None = None
        self._nursery = nursery

    async def run(self) -> None:
        try:
            await self.session.run()
        except SyncdError as error:
            self.error = error
        self.ended.set()

    def ask(
        self, to: JID | None, payload: Element | None = None, timeout: float = REQUEST_TIMEOUT
    ) -> Asked:
        """Let another task send a request."""
        asked = Asked()
        payload = make(QUERY) if payload is None else payload
        self._nursery.start_soon(asked.ask, self.session, to, payload, timeout)
        return asked


@asynccontextmanager
async def living(
    handlers: Mapping[str, Handler] | None = None,
    *,
    early: Iterable[Event] = (),
    lockstep: bool = False,
) -> AsyncIterator[Life]:
    """Run a session with a server in memory."""
    ours, theirs = lockstep_stream_pair() if lockstep else memory_stream_pair()
    presences: list[Element] = []
    subject = Session(
        Connection(ours, open_stream(), list(early)), handlers or {}, presences.append
    )
    async with trio.open_nursery() as nursery:
        life = Life(subject, Server(theirs, opened=True), nursery)
        life.presences = presences
        nursery.start_soon(life.run)
        yield life
        nursery.cancel_scope.cancel()


async def but_pings(server: Server) -> Element:
    """Read the next stanza that is no ping of the keep-alive; answer those."""
    while True:
        stanza = await server.stanza()
        if stanza.find(PING) is None:
            return stanza
        await server.answer(stanza)


def condition(stanza: Element) -> str:
    """The type and condition of a refusal."""
    error = stanza.find(ERROR)
    assert error is not None
    return f"{error.get('type')} {error[0].tag.partition('}')[2]}"


def refusal(request: Element, kind: str, name: str) -> str:
    """The server's refusal of a request."""
    origin = f" from='{request.get('to')}'" if request.get("to") else ""
    return (
        f"<iq type='error' id='{request.get('id')}'{origin}><error type='{kind}'>"
        f"<{name} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>"
    )


# Requests and their answers


async def test_a_request_gets_its_answer() -> None:
    async with living() as life:
        asked = life.ask(BOB)
        request = await life.server.stanza()
        assert (request.tag, request.get("type"), request.get("to")) == (IQ, "get", str(BOB))
        assert [child.tag for child in request] == [QUERY]
        assert request.get("from") is None
        await life.server.answer(request, "<answer xmlns='urn:a'/>")
        iq = await asked.answer()
        assert iq.payload is not None
        assert (iq.type, iq.sender, iq.payload.tag) == ("result", BOB, "{urn:a}answer")


async def test_answers_may_come_in_any_order() -> None:
    async with living() as life:
        asked = []
        requests = []
        for _ in range(3):
            asked.append(life.ask(BOB))
            requests.append(await life.server.stanza())
        assert len({request.get("id") for request in requests}) == 3
        for number in (2, 0, 1):
            await life.server.answer(requests[number], f"<a{number} xmlns='u'/>")
        payloads = [(await each.answer()).payload for each in asked]
        assert [None if p is None else p.tag for p in payloads] == ["{u}a0", "{u}a1", "{u}a2"]


OWN = [None, LAPTOP, LAPTOP.bare, DOMAIN]


@pytest.mark.parametrize(
    ("asked", "sender"),
    [(BOB, BOB), (PROXY, PROXY)] + [(a, b) for a in (None, LAPTOP.bare, DOMAIN) for b in OWN],
)
async def test_the_answer_comes_from_whom_was_asked(
    asked: JID | None, sender: JID | None
) -> None:
    """Our own account answers by any of its names."""
    async with living() as life:
        answer = life.ask(asked)
        request = await life.server.stanza()
        origin = f" from='{sender}'" if sender else ""
        await life.server.send(f"<iq type='result' id='{request.get('id')}'{origin}/>")
        assert (await answer.answer()).sender == sender


@pytest.mark.parametrize("kind", ["result", "error"])
@pytest.mark.parametrize(
    ("asked", "sender"),
    [(BOB, s) for s in (*OWN, BOB.bare, JID.parse("bob@example.org/other"), CAROL, PROXY)]
    + [(PROXY, s) for s in (*OWN, BOB)]
    + [(None, s) for s in (BOB, BOB.bare, PROXY, JID.parse("example.org/x"))]
    + [(BOB.bare, s) for s in (BOB, *OWN)],
)
async def test_nobody_else_can_answer(asked: JID | None, sender: JID | None, kind: str) -> None:
    """Not even who knows the id (CVE-2013-6483, CVE-2014-0364)."""
    async with living() as life:
        answer = life.ask(asked)
        request = await life.server.stanza()
        origin = f" from='{sender}'" if sender else ""
        await life.server.send(
            f"<iq type='{kind}' id='{request.get('id')}'{origin}><spoof xmlns='u'/></iq>"
        )
        await life.server.answer(request, A_QUERY)
        payload = (await answer.answer()).payload
        assert payload is not None
        assert payload.tag == QUERY


async def test_an_answer_that_nobody_waits_for_is_dropped() -> None:
    async with living() as life:
        answer = life.ask(BOB)
        request = await life.server.stanza()
        await life.server.send(f"<iq type='result' id='other' from='{BOB}'/>")
        await wait_all_tasks_blocked()
        assert not answer.done
        await life.server.answer(request)
        await answer.answer()
        await life.server.answer(request)  # again: nobody waits any more
        await life.server.send("<presence/>")
        await wait_all_tasks_blocked()
        assert len(life.presences) == 1


async def test_a_refusal_is_raised() -> None:
    async with living() as life:
        asked = life.ask(BOB)
        await life.server.send(refusal(await life.server.stanza(), "cancel", "item-not-found"))
        with pytest.raises(StanzaError) as caught:
            await asked.answer()
        error = caught.value
        assert (error.condition, error.by) == ("item-not-found", str(BOB))


@pytest.mark.parametrize("refused_first", [True, False])
async def test_the_first_answer_counts(refused_first: bool) -> None:
    async with living() as life:
        asked = life.ask(BOB)
        request = await life.server.stanza()
        no = refusal(request, "cancel", "item-not-found")
        yes = f"<iq type='result' id='{request.get('id')}' from='{BOB}'/>"
        await life.server.send((no + yes if refused_first else yes + no) + S_FOOTER)
        if refused_first:
            with pytest.raises(StanzaError):
                await asked.answer()
        else:
            assert (await asked.answer()).type == "result"


async def test_who_gives_no_answer_is_not_waited_for_for_ever(
    autojump_clock: MockClock,
) -> None:
    async with living() as life:
        started = trio.current_time()
        asked = [life.ask(BOB), life.ask(None, timeout=45)]
        for expected in (
            "the server gave no answer for 45 s",
            f"{BOB} gave no answer for 60 s",
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_answer_pings, life.server)
                with pytest.raises(OfflineError, match=expected):
                    await asked.pop().answer()
                nursery.cancel_scope.cancel()
        assert trio.current_time() - started == REQUEST_TIMEOUT


async def _read_on(server: Server) -> None:
    while True:
        await server.stanza()


async def _answer_pings(server: Server) -> None:
    while True:
        await but_pings(server)


async def test_only_so_many_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_WAITING", 2)
    async with living() as life:
        first, second = life.ask(BOB), life.ask(BOB)
        requests = [await life.server.stanza(), await life.server.stanza()]
        with pytest.raises(OfflineError, match="over 2 requests are waiting"):
            await life.ask(BOB).answer()
        for request in requests:
            await life.server.answer(request)
        await first.answer()
        await second.answer()
        third = life.ask(BOB)
        await life.server.answer(await life.server.stanza())
        await third.answer()


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (S_FOOTER, type(None)),
        ("", OfflineError),
        (
            "<stream:error><conflict xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>"
            "</stream:error>",
            StreamError,
        ),
        ("<!-- x -->", RemoteProtocolError),
    ],
)
async def test_when_the_stream_ends_everybody_who_waits_learns_it(
    said: str, kind: type
) -> None:
    async with living() as life:
        asked = [life.ask(BOB), life.ask(None)]
        for _ in asked:
            await life.server.stanza()
        if said:
            await life.server.send(said)
            with pytest.raises(EOFError):  # our footer, whatever stands before it
                await _read_on(life.server)
        else:
            await life.server.transport.aclose()
        for each in asked:
            with pytest.raises(OfflineError, match="ended before the answer came"):
                await each.answer()
        await life.ended.wait()
        assert type(life.error) is kind
        with pytest.raises(OfflineError, match="not connected"):
            await life.ask(BOB).answer()
        with pytest.raises(OfflineError, match="not connected"):
            life.session.send(make(PRESENCE))


# Requests of others


@pytest.mark.parametrize("kind", ["get", "set"])
async def test_what_we_do_not_understand_is_answered_all_the_same(kind: str) -> None:
    """RFC 6120 section 8.4."""
    async with living() as life:
        await life.server.send(f"<iq type='{kind}' id='7' from='{BOB}'>{A_QUERY}</iq>")
        reply = await life.server.stanza()
        assert (reply.get("type"), reply.get("id"), reply.get("to")) == ("error", "7", str(BOB))
        assert condition(reply) == "cancel service-unavailable"


@pytest.mark.parametrize(
    ("attributes", "inside", "expected"),
    [
        ("type='get' id='7'", "", "modify bad-request"),
        ("type='get' id='7'", "<a xmlns='u'/><b xmlns='u'/>", "modify bad-request"),
        ("type='get'", A_QUERY, "modify bad-request"),
        ("type='want' id='7'", A_QUERY, "modify bad-request"),
        ("id='7'", A_QUERY, "modify bad-request"),
        ("type='get' id='7' from='@'", A_QUERY, "modify jid-malformed"),
    ],
)
async def test_a_malformed_request_is_refused(
    attributes: str, inside: str, expected: str
) -> None:
    async with living() as life:
        await life.server.send(f"<iq {attributes}>{inside}</iq>")
        assert condition(await life.server.stanza()) == expected


async def test_an_answer_is_never_answered() -> None:
    """RFC 6120 section 8.3.1; nor is what is no request at all."""
    async with living() as life:
        await life.server.send(
            "<iq type='result'/><iq type='error'/><iq type='result' id='7' from='@'/>"
            "<iq type='error' id='7'><error/></iq><iq type='result' id='7'/>"
            f"<message from='{BOB}'><body>hello</body></message><presence type='error'/>"
        )
        await life.server.send(f"<iq type='get' id='last'>{A_QUERY}</iq>")
        assert (await life.server.stanza()).get("id") == "last"


async def test_a_handler_answers() -> None:
    async def on_query(iq: Iq) -> Element | None:
        return make("{urn:a}answer", {"to": str(iq.sender)}) if iq.type == "get" else None

    async with living({QUERY: on_query}) as life:
        await life.server.send(f"<iq type='get' id='7' from='{BOB}'>{A_QUERY}</iq>")
        reply = await life.server.stanza()
        assert [reply.get(key) for key in ("type", "id", "to")] == ["result", "7", str(BOB)]
        assert [(child.tag, child.get("to")) for child in reply] == [
            ("{urn:a}answer", str(BOB))
        ]
        await life.server.send(f"<iq type='set' id='8'>{A_QUERY}</iq>")
        reply = await life.server.stanza()
        assert [reply.get(key) for key in ("type", "id", "to")] == ["result", "8", None]
        assert len(reply) == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StanzaError(ErrorType.AUTH, "forbidden", "not you"), "auth forbidden"),
        (JournalError("/home/me: disk full"), "cancel internal-server-error"),
        (OfflineError("gone"), "wait internal-server-error"),
    ],
)
async def test_a_handler_refuses(error: SyncdError, expected: str) -> None:
    async def on_query(_: Iq) -> None:
        raise error

    async with living({QUERY: on_query}) as life:
        await life.server.send(f"<iq type='get' id='7' from='{BOB}'>{A_QUERY}</iq>")
        reply = await life.server.stanza()
        assert condition(reply) == expected
        assert "/home/me" not in life.server.heard.decode()


async def test_a_bug_in_a_handler_is_not_hidden() -> None:
    """It ends the session, and with it the process: the journal makes that cheap."""

    async def on_query(_: Iq) -> None:
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with living({QUERY: on_query}) as life:
            await life.server.send(f"<iq type='get' id='7'>{A_QUERY}</iq>")
            await trio.sleep_forever()


async def test_only_so_many_requests_are_handled_at_a_time() -> None:
    may_answer = trio.Event()

    async def on_query(_: Iq) -> None:
        await may_answer.wait()

    async with living({QUERY: on_query}) as life:
        for number in range(MAX_HANDLING + 1):
            await life.server.send(f"<iq type='get' id='{number}'>{A_QUERY}</iq>")
        reply = await life.server.stanza()
        assert reply.get("id") == str(MAX_HANDLING)
        assert condition(reply) == "wait resource-constraint"
        may_answer.set()
        answered = {(await life.server.stanza()).get("id") for _ in range(MAX_HANDLING)}
        assert answered == {str(number) for number in range(MAX_HANDLING)}
        await life.server.send(f"<iq type='get' id='again'>{A_QUERY}</iq>")
        assert (await life.server.stanza()).get("type") == "result"


@pytest.mark.parametrize("early", [True, False])
async def test_an_answer_that_comes_behind_our_footer_is_not_sent(early: bool) -> None:
    """Whether the request came before the footer or behind it."""
    may_answer = trio.Event()

    async def on_query(_: Iq) -> None:
        await may_answer.wait()

    request = f"<iq type='get' id='7'>{A_QUERY}</iq><iq type='get' id='8'/>"
    async with living({QUERY: on_query}) as life:
        if early:
            await life.server.send(f"<iq type='get' id='7'>{A_QUERY}</iq>")
            await wait_all_tasks_blocked()
        life.session.close()
        await life.server.send(request)
        await wait_all_tasks_blocked()
        may_answer.set()
        with pytest.raises(EOFError):
            await life.server.stanza()
        await life.server.send(S_FOOTER)
        await life.ended.wait()
        assert life.error is None
        assert life.server.heard.decode() == S_FOOTER


async def test_presences_go_to_who_asked_for_them() -> None:
    """If that refuses one, it is not answered, and the next is taken."""

    def refuse(_: Element) -> None:
        raise StanzaError(ErrorType.MODIFY, "jid-malformed")

    async with living() as life:
        await life.server.send("<presence from='a@b/c'/>")
        await wait_all_tasks_blocked()
        assert [presence.get("from") for presence in life.presences] == ["a@b/c"]
        life.session._presence_received = refuse
        await life.server.send("<presence from='@'/>")
        await life.server.send(f"<iq type='get' id='last'>{A_QUERY}</iq>")
        assert (await life.server.stanza()).get("id") == "last"


async def test_what_came_with_the_bind_is_handled_first() -> None:
    early: list[Event] = [
        StanzaReceived(make(PRESENCE)),
        StreamEnded(OfflineError("the server hung up")),
    ]
    async with living(early=early) as life:
        await life.ended.wait()
        assert len(life.presences) == 1
        assert str(life.error) == "the server hung up"


async def test_nothing_but_stanzas_comes_on_an_open_stream() -> None:
    with pytest.RaisesGroup(AssertionError, flatten_subgroups=True):
        async with living(early=[TLSWanted()]):
            await trio.sleep_forever()


# Writing


async def test_a_requester_that_is_cancelled_leaves_no_half_stanza() -> None:
    """One task writes; here it is in the middle of a stanza that nobody wants any more."""
    async with living(lockstep=True) as life:
        big = make(QUERY, text="x" * 1_000_000)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(life.session.request, "set", BOB, big)
                await wait_all_tasks_blocked()
                scope.cancel()
        life.session.send(make(PRESENCE, {"id": "behind"}))
        first, second = await life.server.stanza(), await life.server.stanza()
        assert len(first[0].text or "") == 1_000_000
        assert second.get("id") == "behind"


async def test_a_connection_that_takes_nothing_any_more_ends_when_it_is_read() -> None:
    async with living() as life:
        assert isinstance(life.server.transport, trio.StapledStream)
        await life.server.transport.receive_stream.aclose()
        life.session.send(make(PRESENCE))
        await wait_all_tasks_blocked()
        assert not life.ended.is_set()
        await life.server.transport.aclose()
        await life.ended.wait()
        assert str(life.error) == "the server hung up"


async def test_closing_is_a_handshake_of_footers() -> None:
    async with living() as life:
        life.session.send(make(PRESENCE))
        life.session.close()
        assert (await life.server.stanza()).tag == PRESENCE
        with pytest.raises(EOFError):
            await life.server.stanza()
        await life.server.send(f"<presence/>{S_FOOTER}")
        await life.ended.wait()
        assert (life.error, len(life.presences)) == (None, 1)


async def test_a_cancelled_session_closes_its_connection() -> None:
    async with living() as life:
        server = life.server
    with pytest.raises(ClientGoneError):
        await server.stanza()


async def test_a_server_that_reads_nothing_does_not_hold_up_the_end(
    autojump_clock: MockClock,
) -> None:
    async with living(lockstep=True) as life:
        life.session.send(make(PRESENCE))
        await wait_all_tasks_blocked()
        started = trio.current_time()
    assert trio.current_time() - started <= session.CLOSE_TIMEOUT


# Keep-alive


async def test_a_silent_server_is_asked_and_then_given_up(autojump_clock: MockClock) -> None:
    async with living() as life:
        ping = await life.server.stanza()
        assert trio.current_time() == PING_AFTER
        assert (ping.get("type"), ping.get("to"), ping[0].tag) == ("get", None, PING)
        await life.ended.wait()
        assert trio.current_time() == PING_AFTER + PING_TIMEOUT
        assert isinstance(life.error, OfflineError)
        assert str(life.error) == "the server was silent for 50 s"


@pytest.mark.parametrize("refused", [True, False])
async def test_a_server_that_answers_is_alive(autojump_clock: MockClock, refused: bool) -> None:
    async with living() as life:
        for number in range(1, 4):
            ping = await life.server.stanza()
            assert trio.current_time() == number * PING_AFTER
            if refused:
                await life.server.send(refusal(ping, "cancel", "service-unavailable"))
            else:
                await life.server.answer(ping)
        assert not life.ended.is_set()


async def test_a_server_that_talks_is_not_asked(autojump_clock: MockClock) -> None:
    async with living() as life:
        for _ in range(10):
            await trio.sleep(PING_AFTER - 1)
            await life.server.send(" ")
        await wait_all_tasks_blocked()
        assert life.server.heard == b""
        ping = await life.server.stanza()
        assert ping[0].tag == PING


async def test_whatever_comes_while_the_ping_is_out_is_a_sign_of_life(
    autojump_clock: MockClock,
) -> None:
    """It may be queued behind much else, in either direction."""
    async with living() as life:
        for _ in range(3):
            await life.server.stanza()
            await trio.sleep(PING_TIMEOUT - 1)
            await life.server.send(" ")
        await trio.sleep(PING_AFTER - 1)
        assert not life.ended.is_set()
        await life.ended.wait()
        assert str(life.error) == "the server was silent for 50 s"


@pytest.mark.parametrize("closing", [True, False])
async def test_silence_is_found_even_if_no_ping_can_be_sent(
    autojump_clock: MockClock, closing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the server does not answer our footer."""
    async with living() as life:
        if closing:
            life.session.close()
        else:
            monkeypatch.setattr(session, "MAX_WAITING", 0)
        await life.ended.wait()
        assert trio.current_time() == PING_AFTER + PING_TIMEOUT
        assert str(life.error) == "the server was silent for 50 s"


# The client


class Network:
    """Servers in memory, one for each attempt to connect that succeeds.

    Attributes:
      failures: Raised by the next attempts, one each.
      behind: What the next server says in the same breath as the bind.
      attempts: When somebody tried to connect.
    """

    def __init__(self) -> None:
        self.failures: list[SyncdError] = []
        self.behind: list[Event] = []
        self.attempts: list[float] = []
        self._put, self._get = trio.open_memory_channel[Server](100)

    async def connect(self, _: Account) -> Connection:
        await trio.lowlevel.checkpoint()
        self.attempts.append(trio.current_time())
        if self.failures:
            raise self.failures.pop(0)
        ours, theirs = memory_stream_pair()
        self._put.send_nowait(Server(theirs, opened=True))
        behind, self.behind = self.behind, []
        return Connection(ours, open_stream(), behind)

    async def accept(self) -> Server:
        """The server of the next attempt that succeeds."""
        return await self._get.receive()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    new = Network()
    monkeypatch.setattr(connect, "connect", new.connect)
    return new


class Changes:
    """Counts how often the client said that something changed."""

    def __init__(self) -> None:
        self.count = 0
        self._event = trio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        await self._event.wait()


def new_client(changed: Changes | None = None, **handlers: Handler) -> Client:
    return Client(
        Account(jid=LAPTOP, password=lambda: PASSWORD),
        Contacts([BOB.bare, CAROL], required=frozenset({SI}), preferred="urn:syncd:sync:1"),
        identity=Identity("automation", "file-transfer", "syncd"),
        features=frozenset({SI, "urn:b"}),
        handlers={f"{{urn:a}}{name}": handler for name, handler in handlers.items()},
        changed=changed or Changes(),
    )


@asynccontextmanager
async def running(client: Client) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        yield nursery
        nursery.cancel_scope.cancel()


def state(client: Client) -> tuple[JID | None, str | None]:
    """Whether a client is online, and if not, why."""
    return client.jid, str(client.problem) if client.problem else None


KNOWN = (
    "<item jid='bob@example.org' subscription='both'/>"
    "<item jid='carol@example.org' subscription='to'/>"
)


async def greet(server: Server, roster: str = KNOWN, *, behind: str = "") -> None:
    """Take the first presence and give the roster."""
    presence = await server.stanza()
    assert (presence.tag, presence.get("type")) == (PRESENCE, None)
    assert presence.findtext("{jabber:client}priority") == "-1"
    request = await server.stanza()
    assert request.find(ROSTER) is not None
    await server.send(
        f"<iq type='result' id='{request.get('id')}'>"
        f"<query xmlns='jabber:iq:roster'>{roster}</query></iq>{behind}"
    )


async def show(server: Server, jid: JID, *features: str) -> None:
    """Let a peer's client come, and tell what it can when it is asked."""
    await server.send(f"<presence from='{jid}'/>")
    request = await but_pings(server)
    assert (request.get("to"), request[0].tag) == (str(jid), INFO)
    told = "".join(f"<feature var='{feature}'/>" for feature in features)
    await server.answer(request, f"<query xmlns='{NS_INFO}'>{told}</query>")


async def test_a_client_comes_online(network: Network) -> None:
    changed = Changes()
    client = new_client(changed)
    assert (client.jid, client.problem) == (None, None)
    with pytest.raises(OfflineError, match="not connected"):
        await client.request("get", BOB, make(QUERY))
    async with running(client) as nursery:
        server = await network.accept()
        await client.wait_online()
        assert client.jid == LAPTOP
        assert changed.count == 1
        await greet(server)
        asked = Asked()
        nursery.start_soon(asked.ask, client, BOB, make(QUERY), 5.0)
        await server.answer(await server.stanza())
        assert (await asked.answer()).sender == BOB
    assert client.jid is None


@pytest.mark.parametrize(
    ("roster", "subscribed"),
    [
        ("", ["bob@example.org", "carol@example.org"]),
        (KNOWN, []),
        (
            "<item jid='bob@example.org' subscription='from'/>",
            ["bob@example.org", "carol@example.org"],
        ),
        (
            "<item jid='bob@example.org' subscription='none' ask='subscribe'/>",
            ["carol@example.org"],
        ),
        ("<item jid='carol@example.org' subscription='both'/><item/>", ["bob@example.org"]),
    ],
)
async def test_the_presence_of_peers_is_asked_for_once(
    network: Network, roster: str, subscribed: list[str]
) -> None:
    """RFC 6121 section 3.1: whom the roster already shows, or will, is left in peace."""
    async with running(new_client()):
        server = await network.accept()
        await greet(server, roster)
        await server.send("<iq type='get' id='last'><ping xmlns='urn:xmpp:ping'/></iq>")
        sent = []
        while (stanza := await server.stanza()).tag == PRESENCE:
            assert stanza.get("type") == "subscribe"
            sent.append(stanza.get("to"))
        assert sent == subscribed


async def test_without_a_roster_the_client_stays_online(network: Network) -> None:
    client = new_client()
    async with running(client):
        server = await network.accept()
        await server.stanza()
        await server.send(refusal(await server.stanza(), "cancel", "service-unavailable"))
        await show(server, BOB, SI)
        assert client.jid == LAPTOP


async def test_an_empty_result_is_an_empty_roster(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await server.stanza()
        await server.answer(await server.stanza())
        assert (await server.stanza()).get("to") == "bob@example.org"


async def test_peers_may_see_us_and_strangers_may_not(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send("<presence type='subscribe' from='mallory@example.org'/>")
        await server.send("<presence type='subscribe'/>")
        await server.send("<presence type='subscribe' from='@'/>")
        await server.send("<presence type='subscribe' from='bob@example.org/pc'/>")
        stanza = await server.stanza()
        assert (stanza.get("type"), stanza.get("to")) == ("subscribed", "bob@example.org")


async def test_a_peer_is_online_once_its_client_has_told_that_it_takes_files(
    network: Network,
) -> None:
    changed = Changes()
    client = new_client(changed)
    async with running(client):
        server = await network.accept()
        await greet(server)
        await show(server, BOB, SI)
        await changed.wait()
        assert client.contacts.online() == {BOB.bare}
        assert client.contacts.choose(BOB.bare).jid == BOB
        await server.send(f"<presence from='{BOB}' type='unavailable'/>")
        await changed.wait()
        assert client.contacts.online() == frozenset()


async def test_a_presence_that_changes_nothing_is_not_told(network: Network) -> None:
    changed = Changes()
    client = new_client(changed)
    async with running(client):
        server = await network.accept()
        await greet(server)
        await show(server, BOB, SI)
        await wait_all_tasks_blocked()
        before = changed.count
        await server.send(f"<presence from='{BOB}'><show>away</show></presence>")
        await server.send("<presence from='mallory@example.org/pc'/>")
        await wait_all_tasks_blocked()
        assert changed.count == before


async def test_a_client_that_comes_in_many_presences_is_asked_once(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/>" * 20)
        assert (await server.stanza()).get("to") == str(BOB)
        await show(server, CAROL.with_resource("x"), SI)


async def test_a_client_that_refuses_to_tell_is_asked_again_when_it_comes_again(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/>")
        await server.send(refusal(await server.stanza(), "cancel", "service-unavailable"))
        for _ in range(4):
            ping = await server.stanza()
            assert ping[0].tag == PING
            await server.answer(ping)
        await show(server, BOB, SI)


async def test_a_client_that_came_back_meanwhile_is_asked_again(
    autojump_clock: MockClock, network: Network
) -> None:
    """The refusal was for the one that went."""
    client = new_client()
    async with running(client):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/>")
        request = await server.stanza()
        await server.send(
            f"<presence from='{BOB}' type='unavailable'/><presence from='{BOB}'/>"
        )
        await server.send(refusal(request, "cancel", "service-unavailable"))
        again = await server.stanza()
        assert (again.get("to"), again[0].tag) == (str(BOB), INFO)


async def test_a_client_that_went_is_not_asked_again(
    autojump_clock: MockClock, network: Network
) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/>")
        request = await server.stanza()
        await server.send(f"<presence from='{BOB}' type='unavailable'/>")
        await server.send(refusal(request, "wait", "recipient-unavailable"))
        assert (await server.stanza())[0].tag == PING


async def test_a_client_that_cannot_tell_now_is_asked_later(
    autojump_clock: MockClock, network: Network
) -> None:
    """Ever more rarely, whether it refuses or says nothing."""
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/>")
        times = []
        for _ in range(3):
            request = await but_pings(server)
            times.append(trio.current_time())
            await server.send(refusal(request, "wait", "resource-constraint"))
        assert times == [0.0, 1.0, 3.0]
        for _ in range(2):
            await but_pings(server)
            times.append(trio.current_time())
        assert times[3:] == [7.0, 7.0 + REQUEST_TIMEOUT + 8.0]


async def test_only_so_many_clients_are_asked_at_a_time(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_ASKING", 1)
    client = new_client()
    async with running(client):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/><presence from='{CAROL}/x'/>")
        request = await server.stanza()
        assert request.get("to") == str(BOB)
        await server.answer(request, f"<query xmlns='{NS_INFO}'><feature var='{SI}'/></query>")
        await show(server, CAROL.with_resource("x"), SI)
        await wait_all_tasks_blocked()
        assert client.contacts.online() == {BOB.bare, CAROL}


@pytest.mark.parametrize("sender", ["", "from='user@example.org'"])
async def test_a_roster_push_of_our_own_account_is_taken(network: Network, sender: str) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        push = "<query xmlns='jabber:iq:roster'><item jid='dave@example.org'/></query>"
        await server.send(f"<iq type='set' id='7' {sender}>{push}</iq>")
        assert (await server.stanza()).get("type") == "result"


@pytest.mark.parametrize(
    "sender",
    ["mallory@example.org/pc", "bob@example.org", "example.org", "user@example.org.evil.org"],
)
async def test_a_roster_push_of_anybody_else_is_refused(network: Network, sender: str) -> None:
    """CVE-2015-8688: nobody gets on the list of peers that way."""
    client = new_client()
    async with running(client):
        server = await network.accept()
        await greet(server)
        push = f"<query xmlns='jabber:iq:roster'><item jid='{sender}'/></query>"
        await server.send(f"<iq type='set' id='7' from='{sender}'>{push}</iq>")
        assert condition(await server.stanza()) == "cancel service-unavailable"
        assert client.contacts.peers == (BOB.bare, CAROL)


async def test_the_client_tells_what_it_is_and_can(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send(
            f"<iq type='get' id='7' from='{BOB}'><query xmlns='{NS_INFO}' node='n'/></iq>"
        )
        (query,) = await server.stanza()
        assert query.get("node") == "n"
        assert [(child.get("category"), child.get("var")) for child in query] == [
            ("automation", None),
            (None, SI),
            (None, "urn:b"),
        ]


@pytest.mark.parametrize(
    "payload", [f"<query xmlns='{NS_INFO}'/>", "<ping xmlns='urn:xmpp:ping'/>"]
)
async def test_what_is_asked_by_get_is_not_asked_by_set(network: Network, payload: str) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        for kind, expected in (("get", "result"), ("set", "error")):
            await server.send(f"<iq type='{kind}' id='7' from='{BOB}'>{payload}</iq>")
            reply = await server.stanza()
            assert reply.get("type") == expected
        assert condition(reply) == "modify bad-request"


async def test_the_handlers_of_others_are_asked_as_well(network: Network) -> None:
    async def query(_: Iq) -> Element:
        return make("{urn:a}answer")

    async with running(new_client(query=query)):
        server = await network.accept()
        await greet(server)
        await server.send(f"<iq type='set' id='7' from='{BOB}'>{A_QUERY}</iq>")
        assert [child.tag for child in await server.stanza()] == ["{urn:a}answer"]


async def test_after_the_connection_is_cut_the_client_comes_back(
    autojump_clock: MockClock, network: Network
) -> None:
    changed = Changes()
    client = new_client(changed)
    async with running(client) as nursery:
        server = await network.accept()
        await greet(server)
        await show(server, BOB, SI)
        await changed.wait()
        asked = Asked()
        nursery.start_soon(asked.ask, client, BOB, make(QUERY), 5.0)
        await server.stanza()
        await server.transport.aclose()
        with pytest.raises(OfflineError, match="ended before the answer came"):
            await asked.answer()
        await wait_all_tasks_blocked()
        assert state(client) == (None, "the server hung up")
        assert client.contacts.online() == frozenset()
        await client.wait_online()
        server = await network.accept()
        assert state(client) == (LAPTOP, None)
        await greet(server)
        await show(server, BOB, SI)
        await changed.wait()
        assert client.contacts.online() == {BOB.bare}


async def test_a_server_that_falls_silent_is_left_for_a_new_connection(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    client = new_client()
    async with running(client):
        await greet(await network.accept())
        await greet(await network.accept())
        assert len(network.attempts) == 2
        assert network.attempts[1] > PING_AFTER + PING_TIMEOUT


async def test_who_waits_for_the_client_waits_through_failures(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.failures = [OfflineError("no route"), OfflineError("still none")]
    client = new_client()
    async with running(client):
        await wait_all_tasks_blocked()
        assert str(client.problem) == "no route"
        await client.wait_online()
        assert network.attempts == [0.0, 1.0, 3.0]
        assert client.problem is None


async def test_a_session_that_held_for_a_while_makes_up_for_earlier_failures(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.failures = [OfflineError("no route")] * 3
    async with running(new_client()):
        server = await network.accept()
        for _ in range(5):
            await trio.sleep(PING_AFTER - 1)
            await server.send(" ")
        cut = trio.current_time()
        await server.transport.aclose()
        server = await network.accept()
        assert network.attempts == [0.0, 1.0, 3.0, 7.0, cut + 1.0]
        await server.transport.aclose()
        await network.accept()
        assert network.attempts[-1] == cut + 2.0


async def test_wrong_credentials_are_tried_rarely(
    autojump_clock: MockClock, network: Network
) -> None:
    network.failures = [AuthenticationError("wrong password")]
    async with running(new_client()):
        await network.accept()
        assert network.attempts[1] >= BACK_OFF_LOGIN / 2


async def test_a_stream_that_ends_behind_the_bind_is_an_ordinary_failure(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    network.behind = [StreamEnded(StreamError("conflict"))]
    client = new_client()
    async with running(client):
        await network.accept()
        await greet(await network.accept())
        assert len(network.attempts) == 2
        assert network.attempts[1] >= BACK_OFF_LAST / 2


async def test_a_stream_that_ends_behind_the_roster_is_an_ordinary_failure(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    async with running(new_client()):
        await greet(await network.accept(), roster="", behind=S_FOOTER)
        await greet(await network.accept())
        assert len(network.attempts) == 2


async def test_the_server_hears_when_we_go(network: Network) -> None:
    client = new_client()
    await client.goodbye()  # there is nobody to tell
    async with running(client) as nursery:
        server = await network.accept()
        await greet(server)
        gone = trio.Event()

        async def go() -> None:
            await client.goodbye()
            gone.set()

        nursery.start_soon(go)
        assert (await server.stanza()).get("type") == "unavailable"
        with pytest.raises(EOFError):
            await server.stanza()
        nursery.start_soon(client.goodbye)  # an impatient user
        await wait_all_tasks_blocked()
        assert not gone.is_set()
        # What is still asked is not answered any more.
        await server.send(f"<presence type='subscribe' from='{BOB}'/>{S_FOOTER}")
        await gone.wait()
        assert (client.jid, client.problem) == (None, None)


async def test_the_client_knows_since_when_it_is_as_it_is(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9 + trio.current_time())
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.failures = [OfflineError("no route")]
    client = new_client()
    async with running(client):
        await wait_all_tasks_blocked()
        assert client.since == 1e9
        server = await network.accept()
        await client.wait_online()
        assert client.since == 1e9 + 1
        await trio.sleep(5)
        await server.transport.aclose()
        await wait_all_tasks_blocked()
        assert client.since == 1e9 + 6


@pytest.mark.parametrize(
    ("failures", "problem", "jitter", "seconds"),
    [
        (0, None, 1.0, 1.0),
        (1, None, 1.0, 1.0),
        (1, None, 0.0, 0.5),
        (2, OfflineError("x"), 1.0, 2.0),
        (3, StreamError("system-shutdown"), 0.5, 3.0),
        (8, OfflineError("x"), 1.0, BACK_OFF_LAST),
        (10**9, OfflineError("x"), 1.0, BACK_OFF_LAST),
        (1, AuthenticationError("x"), 1.0, BACK_OFF_LOGIN),
        (99, AuthenticationError("x"), 0.0, BACK_OFF_LOGIN_LAST / 2),
        (0, StreamError("conflict"), 1.0, BACK_OFF_LAST),
        (99, StreamError("conflict"), 1.0, BACK_OFF_LOGIN_LAST),
    ],
)
def test_the_time_between_attempts_doubles_within_bounds(
    failures: int, problem: SyncdError | None, jitter: float, seconds: float
) -> None:
    assert back_off(failures, problem, jitter) == seconds
