"""A session, and the client that keeps having one, against a server in memory."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

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
from syncd.link import session
from syncd.link.connect import MAX_RECV, Connection
from syncd.link.resolve import Target
from syncd.link.session import (
    MAX_HANDLING,
    MAX_HANDLING_OF_ONE,
    MAX_UNWRITTEN,
    PING_AFTER,
    PING_TIMEOUT,
    REQUEST_TIMEOUT,
    Session,
)
from syncd.xmpp import sm
from syncd.xmpp.disco import INFO, NS_INFO, PING, Identity, make_info
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import IQ, MESSAGE, PRESENCE, Iq, Limits
from syncd.xmpp.stream import Event, Resumed, StanzaReceived, StreamEnded, TLSWanted
from syncd.xmpp.xml import make
from tests.support.asking import Asked, but_pings, condition, refusal
from tests.support.tcp import connection
from tests.support.wire import (
    LAPTOP,
    S_FOOTER,
    ClientGoneError,
    Server,
    kept,
    managed_stream,
    open_stream,
    resumed,
    resuming_stream,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
    from xml.etree.ElementTree import Element

    from trio.testing import MockClock

    from syncd.link.session import Answer, Handler, MessageHandler
    from syncd.xmpp.sm import StreamManagement
    from syncd.xmpp.stream import ClientStream

BOB = JID.parse("bob@example.org/pc")
CAROL = JID.parse("carol@example.org")
PROXY = JID.parse("proxy.example.org")
DOMAIN = JID.parse("example.org")

QUERY = "{urn:a}query"
A_QUERY = "<query xmlns='urn:a'/>"
SI = "http://jabber.org/protocol/si"


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
    messages: Mapping[str, MessageHandler] | None = None,
    bounded: frozenset[str] = frozenset(),
    answers: Mapping[str, Answer] | None = None,
    pair: tuple[trio.abc.Stream, trio.abc.Stream] | None = None,
) -> AsyncIterator[Life]:
    """Run a session with a server: in memory, or at the other end of a pair."""
    ours, theirs = pair or (lockstep_stream_pair() if lockstep else memory_stream_pair())
    presences: list[Element] = []
    subject = Session(
        Connection(ours, open_stream(), list(early), Target("h.example.org", 5222, False)),
        handlers or {},
        presences.append,
        answers=answers or {},
        messages=messages or {},
        bounded=bounded,
    )
    async with trio.open_nursery() as nursery:
        life = Life(subject, Server(theirs, opened=True), nursery)
        life.presences = presences
        nursery.start_soon(life.run)
        yield life
        nursery.cancel_scope.cancel()


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


async def test_whoever_left_is_not_waited_for() -> None:
    """Others are, on the same account and elsewhere, and so is an answer that has come."""
    tv = BOB.with_resource("tv")
    async with living() as life:
        asked = {}
        for to in (BOB, tv, BOB.bare, None, CAROL):
            asked[to] = life.ask(to)
            request = await life.server.stanza()
            if to == tv:
                await life.server.answer(request)
                await wait_all_tasks_blocked()
        life.session.left(tv)
        life.session.left(BOB)
        with pytest.raises(OfflineError, match=f"{BOB} went offline before the answer came"):
            await asked[BOB].answer()
        assert (await asked[tv].answer()).sender == tv
        await wait_all_tasks_blocked()
        assert not any(asked[to].done for to in (BOB.bare, None, CAROL))


async def test_the_session_knows_where_its_server_is() -> None:
    async with living() as life:
        assert life.session.server == "h.example.org:5222"


# Messages


class Mail:
    """Takes messages, and refuses them if it has a reason to."""

    def __init__(self, refusal: SyncdError | None = None) -> None:
        self.got: list[tuple[str, str | None]] = []
        self._refusal = refusal

    def __call__(self, sender: JID, child: Element) -> None:
        self.got.append((str(sender), child.text))
        if self._refusal:
            raise self._refusal


DATA = "{urn:a}data"


async def test_a_message_is_given_to_whoever_takes_its_kind() -> None:
    """In order; the rest of it, and the rest of the messages, are left alone."""
    mail = Mail()
    async with living(messages={DATA: mail}) as life:
        await life.server.send(
            f"<message from='{BOB}'><x xmlns='u'/><data xmlns='urn:a'>1</data></message>"
            f"<message from='{BOB}'><body>hello</body></message>"
            f"<message from='{BOB}' type='error'><data xmlns='urn:a'>no</data></message>"
            "<message><data xmlns='urn:a'>2</data><data xmlns='urn:a'>3</data></message>"
            "<message from='@'><body>hello</body></message>"
            "<iq type='get' id='8'><query xmlns='urn:a'/></iq>"
        )
        # Nothing was said before the answer to this.
        assert (await life.server.stanza()).get("id") == "8"
        own = str(LAPTOP.bare)
        assert mail.got == [(str(BOB), "1"), (own, "2"), (own, "3")]


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (StanzaError(ErrorType.CANCEL, "item-not-found"), "cancel item-not-found"),
        (JournalError("the disk is full"), "cancel internal-server-error"),
    ],
)
@pytest.mark.parametrize("ident", [" id='7'", ""])
async def test_a_message_that_is_refused_is_answered_with_the_reason(
    refusal: SyncdError, told: str, ident: str
) -> None:
    """Once, by an error (RFC 6121 section 8.1); what is behind it is not looked at."""
    mail = Mail(refusal)
    data = "<data xmlns='urn:a'>1</data>"
    async with living(messages={DATA: mail}) as life:
        await life.server.send(f"<message from='{BOB}'{ident}>{data}{data}</message>")
        await life.server.send(f"<message from='{BOB}' type='error'{ident}>{data}</message>")
        error = await life.server.stanza()
        assert (error.tag, error.get("type"), error.get("to")) == (MESSAGE, "error", str(BOB))
        assert error.get("id") == ("7" if ident else None)
        assert condition(error) == told
        await life.server.send("<iq type='get' id='8'><query xmlns='urn:a'/></iq>")
        assert (await life.server.stanza()).get("id") == "8"
        assert len(mail.got) == 1


async def test_a_message_from_nowhere_is_not_given_to_anybody() -> None:
    """Nor refused, for nobody could be told."""
    mail = Mail()
    async with living(messages={DATA: mail}) as life:
        await life.server.send("<message from='@'><data xmlns='urn:a'/></message>")
        await life.server.send("<iq type='get' id='8'><query xmlns='urn:a'/></iq>")
        assert (await life.server.stanza()).get("id") == "8"
        assert mail.got == []


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


def _fall_over(*_: object) -> NoReturn:
    raise KeyError("a bug")


async def _fall_over_later(_: Iq) -> None:
    await trio.lowlevel.checkpoint()
    _fall_over()


async def _answer_with_nonsense(_: Iq) -> Element:
    return make(QUERY, text="\x1b")


@pytest.mark.parametrize(
    ("answers", "handlers"),
    [
        ({QUERY: _fall_over}, {}),
        ({}, {QUERY: _fall_over}),
        ({}, {QUERY: _fall_over_later}),
        ({}, {QUERY: _answer_with_nonsense}),
    ],
)
async def test_a_bug_that_a_request_leads_to_ends_nothing_but_that_request(
    answers: dict[str, Answer], handlers: dict[str, Handler], caplog: pytest.LogCaptureFixture
) -> None:
    """A peer that has found one could stop us with it again and again; the log has it all."""
    async with living(handlers, answers=answers) as life:
        for ident in ("7", "8"):
            await life.server.send(f"<iq type='get' id='{ident}' from='{BOB}'>{A_QUERY}</iq>")
            reply = await life.server.stanza()
            assert (reply.get("id"), reply.get("to")) == (ident, str(BOB))
            assert condition(reply) == "cancel internal-server-error"
            (record,) = caplog.records
            caplog.clear()
            assert record.exc_info is not None
            assert str(BOB) in record.getMessage()
        assert "a bug" not in life.server.heard.decode()
        assert not life.ended.is_set()


async def test_a_bug_that_another_stanza_leads_to_ends_nothing_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Presences come again with each login, so one of them could stop us for good."""
    async with living(messages={DATA: _fall_over}) as life:
        life.session._presence_received = _fall_over
        data = "<data xmlns='urn:a'/>"
        await life.server.send(
            f"<presence from='{BOB}'/><message id='1' from='{BOB}'>{data}</message>"
            f"<message id='2' type='error' from='{BOB}'>{data}</message>"
            f"<iq type='get' id='3'>{A_QUERY}</iq>"
        )
        error, reply = await life.server.stanza(), await life.server.stanza()
        assert (error.tag, error.get("id"), reply.get("id")) == (MESSAGE, "1", "3")
        assert condition(error) == "cancel internal-server-error"
        assert [record.exc_info is not None for record in caplog.records] == [True, True]


async def test_a_refusal_whose_reason_xml_cannot_carry_is_told_without_it() -> None:
    """As with a name on our disk that is no UTF-8."""

    async def on_query(_: Iq) -> None:
        raise StanzaError(ErrorType.WAIT, "resource-constraint", "no room for \udcff")

    async with living({QUERY: on_query}) as life:
        await life.server.send(f"<iq type='get' id='7'>{A_QUERY}</iq>")
        assert condition(await life.server.stanza()) == "wait resource-constraint"


async def test_requests_that_are_bounded_elsewhere_neither_are_refused_nor_let_others_be() -> (
    None
):
    may_answer = trio.Event()
    taken: list[str] = []

    async def answer() -> None:
        await may_answer.wait()

    def on_block(iq: Iq) -> Awaitable[None]:
        taken.append(iq.id)
        return answer()

    async def on_query(_: Iq) -> None:
        await trio.lowlevel.checkpoint()

    block = "{urn:example:block}block"
    handlers: dict[str, Handler] = {block: on_block, QUERY: on_query}
    async with living(handlers, bounded=frozenset({block})) as life:
        numbers = [str(number) for number in range(MAX_HANDLING + 1)]
        for number in numbers:
            element = "<block xmlns='urn:example:block'/>"
            await life.server.send(f"<iq type='set' id='{number}'>{element}</iq>")
        await life.server.send(f"<iq type='get' id='other'>{A_QUERY}</iq>")
        reply = await life.server.stanza()
        assert (reply.get("id"), reply.get("type")) == ("other", "result")
        assert taken == numbers
        may_answer.set()
        assert {(await life.server.stanza()).get("id") for _ in numbers} == set(numbers)


def _asking(count: int, sender: JID, element: str = A_QUERY) -> str:
    """So many requests, numbered from 0."""
    return "".join(
        f"<iq type='set' id='{number}' from='{sender}'>{element}</iq>"
        for number in range(count)
    )


async def test_only_so_many_requests_are_handled_at_a_time() -> None:
    """Whoever asks; each of them as many as an honest peer could have out."""
    may_answer = trio.Event()

    async def on_query(_: Iq) -> None:
        await may_answer.wait()

    several = MAX_HANDLING // MAX_HANDLING_OF_ONE
    async with living({QUERY: on_query}) as life:
        for number in range(several):
            sender = JID(f"peer{number}", "example.org", "pc")
            await life.server.send(_asking(MAX_HANDLING_OF_ONE, sender))
        await life.server.send(f"<iq type='get' id='x' from='{BOB}'>{A_QUERY}</iq>")
        reply = await life.server.stanza()
        assert reply.get("id") == "x"
        assert condition(reply) == "wait resource-constraint"
        may_answer.set()
        replies = [await life.server.stanza() for _ in range(MAX_HANDLING)]
        assert {reply.get("type") for reply in replies} == {"result"}
        await life.server.send(f"<iq type='get' id='again' from='{BOB}'>{A_QUERY}</iq>")
        assert (await life.server.stanza()).get("type") == "result"
        assert life.session._handling == {}


async def test_one_peer_does_not_take_the_places_of_others() -> None:
    """From whichever of its clients it asks; what waits for nothing is answered all the same.

    In the roster push of our account, for one, a server tells what it tells only once.
    """

    async def on_query(iq: Iq) -> None:
        if iq.sender != CAROL:
            await trio.sleep_forever()

    answers: dict[str, Answer] = {PING: lambda _: None}
    async with living({QUERY: on_query}, answers=answers) as life:
        await life.server.send(_asking(MAX_HANDLING_OF_ONE, BOB))
        for client in (BOB, BOB.with_resource("tv")):
            await life.server.send(f"<iq type='get' id='more' from='{client}'>{A_QUERY}</iq>")
            reply = await life.server.stanza()
            assert (reply.get("id"), reply.get("to")) == ("more", str(client))
            assert condition(reply) == "wait resource-constraint"
        await life.server.send(_asking(2 * MAX_HANDLING, CAROL))
        await life.server.send(_asking(2 * MAX_HANDLING, BOB, "<ping xmlns='urn:xmpp:ping'/>"))
        replies = [await life.server.stanza() for _ in range(4 * MAX_HANDLING)]
        assert {reply.get("type") for reply in replies} == {"result"}


@pytest.mark.parametrize("busy", [0, MAX_HANDLING_OF_ONE - 1, MAX_HANDLING_OF_ONE])
async def test_a_burst_of_requests_that_wait_for_nothing_takes_no_places(busy: int) -> None:
    """Strangers are refused by the handler, in its own words, however many they are at once.

    And so is what nobody handles.
    """

    async def on_query(iq: Iq) -> None:
        if iq.sender != BOB:
            raise StanzaError(ErrorType.AUTH, "forbidden")
        await trio.sleep_forever()

    count = MAX_HANDLING + 1
    async with living({QUERY: on_query}) as life:
        await life.server.send(_asking(busy, BOB))
        await life.server.send(_asking(count, CAROL))
        refusals = [condition(await life.server.stanza()) for _ in range(count)]
        assert refusals == count * ["auth forbidden"]
        for sender in (BOB, CAROL):
            await life.server.send(_asking(count, sender, "<query xmlns='urn:unknown'/>"))
            refusals = [condition(await life.server.stanza()) for _ in range(count)]
            assert refusals == count * ["cancel service-unavailable"]


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


async def test_a_presence_that_wants_an_answer_behind_our_footer_gets_none() -> None:
    async with living() as life:
        life.session._presence_received = lambda presence: life.session.send(presence)
        life.session.close()
        await life.server.send(f"<presence from='{BOB}'/>{S_FOOTER}")
        await life.ended.wait()
        assert life.error is None


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
    async with limited(Limits(max_bytes=2_000_000), lockstep=True) as life:
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


# A server that lets us answer, and does not read


IDENTITY = Identity("client", "bot", "syncd")
FEATURES = [f"urn:xmpp:feature:{number}" for number in range(18)]
FLOODED: dict[str, Answer] = {
    PING: lambda _: None,
    INFO: lambda _: make_info(IDENTITY, FEATURES),
}
# One read is answered on top of the limit, by what may be longer than the requests.
MOST_QUEUED = MAX_UNWRITTEN + 40 * MAX_RECV


async def _flood(life: Life, stanza: str) -> None:
    block = stanza * (MAX_RECV // len(stanza))
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while True:
            await life.server.send(block)


@pytest.mark.parametrize(
    "stanza",
    [
        "<iq type='get' id='a' from='x@y/z'><ping xmlns='urn:xmpp:ping'/></iq>",
        "<iq type='get' id='a'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>",
        "<iq type='get' id='a'><query xmlns='urn:unknown'/></iq>",
        "<iq type='get' id='a'><query xmlns='urn:a'/></iq>",
        "<message><data xmlns='urn:a'/></message>",
        "<iq/>",
    ],
)
async def test_c15_who_reads_nothing_is_not_answered_for_ever(
    stanza: str, autojump_clock: MockClock
) -> None:
    """Nor waited for: a server that reads only when we do must not hold us up."""

    async def on_query(_: Iq) -> None:
        raise StanzaError(ErrorType.AUTH, "forbidden", "for strangers")

    mail = Mail(StanzaError(ErrorType.CANCEL, "item-not-found", "of an unknown stream"))
    async with (
        living(
            {QUERY: on_query}, answers=FLOODED, messages={DATA: mail}, lockstep=True
        ) as life,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_flood, life, stanza)
        await life.ended.wait()
        queued = life.session._stream.queued
        assert MAX_UNWRITTEN < queued <= MOST_QUEUED
        assert isinstance(life.error, OfflineError)
        assert str(life.error) == "the server took nothing for 50 s"
        assert trio.current_time() == PING_AFTER + PING_TIMEOUT + session.CLOSE_TIMEOUT


async def test_c15_who_asks_for_our_count_for_ever_gets_the_last() -> None:
    """XEP-0198 section 4: it counts up, so that one answers all."""
    ours, theirs = lockstep_stream_pair()
    stream = managed_stream()
    subject = Session(Connection(ours, stream, []), {}, lambda _: None)
    request = f"<presence/><r xmlns='{sm.NS}'/>"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(subject.run)
        server = Server(theirs, opened=True)
        for _ in range(100):
            await server.send(request * 1_000)
            await wait_all_tasks_blocked()
            assert stream.queued <= len(f"<a xmlns='{sm.NS}' h='{2**32 - 1}'/>")
        # The first is being written since the first of them came.
        counts = [(await server.stanza()).get("h") for _ in range(2)]
        assert counts == ["1000", "100000"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("pause", [0.0, PING_AFTER / 3])
async def test_who_takes_its_time_to_read_gets_everything(
    autojump_clock: MockClock, pause: float
) -> None:
    """And is not given up while it takes something, nor kept waiting."""
    count = 3_000
    asking = _asking(count, BOB, f"<query xmlns='{NS_INFO}'/>")
    async with (
        living(answers=FLOODED, lockstep=True) as life,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(life.server.send, asking)
        server, started = life.server, trio.current_time()
        ids: list[str | None] = []
        while len(ids) < count:
            stanza = await server.stanza()
            assert life.session._stream.queued <= MOST_QUEUED
            if stanza.find(PING) is None:
                ids.append(stanza.get("id"))
            if len(ids) % 100 == 0:  # about one write
                await trio.sleep(pause)
        assert ids == [str(number) for number in range(count)]
        assert trio.current_time() - started == count / 100 * pause
        assert not life.ended.is_set()


async def test_a_connection_that_breaks_while_nothing_is_read_ends_at_once(
    autojump_clock: MockClock,
) -> None:
    async with living(answers=FLOODED, lockstep=True) as life, trio.open_nursery() as nursery:
        nursery.start_soon(_flood, life, "<iq/>")
        await wait_all_tasks_blocked()
        await life.server.transport.aclose()
        await life.ended.wait()
        assert str(life.error).startswith("the connection to the server broke")
        assert trio.current_time() == 0


async def test_behind_our_footer_everything_is_read(autojump_clock: MockClock) -> None:
    """Nothing of it is answered, and the server's footer is among it."""
    async with living(answers=FLOODED, lockstep=True) as life, trio.open_nursery() as nursery:

        async def talk() -> None:
            await life.server.send("<iq/>" * 20_000 + f"<presence/>{S_FOOTER}")

        nursery.start_soon(talk)
        await wait_all_tasks_blocked()
        assert life.presences == []
        life.session.close()
        await life.ended.wait()
        assert (life.error, len(life.presences)) == (None, 1)
        assert trio.current_time() == session.CLOSE_TIMEOUT


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


async def test_a_connection_whose_own_address_has_gone_is_left_at_once() -> None:
    """No answer could come; one whose address stays is only asked."""
    asked: list[str] = []

    def stays(host: str) -> bool:
        asked.append(host)
        return True

    async with connection() as pair, living(pair=pair) as life:
        life.session.check(stays)
        await life.server.answer(await life.server.stanza())
        life.session.check(lambda host: not stays(host))
        await life.ended.wait()
        assert str(life.error) == "this machine has no longer the address it had"
        assert asked == ["127.0.0.1"] * 2


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


# A session outlives its connection (XEP-0198)


class Mobile:
    """A session whose connections break, and the servers that it meets in turn.

    Attributes:
      session: Runs until `ended`, with `error`.
      server: The other end of the present connection.
      gaps: One for each time that a connection broke, as the session asked for another.
    """

    def __init__(self, nursery: trio.Nursery, handlers: Mapping[str, Handler]) -> None:
        ours, theirs = memory_stream_pair()
        self._stream = managed_stream()
        self.presences: list[Element] = []
        self.session = Session(
            Connection(ours, self._stream, []), handlers, self.presences.append
        )
        self.server = Server(theirs, opened=True)
        self.ended = trio.Event()
        self.error: SyncdError | None = None
        self.gaps = 0
        self._nursery = nursery
        self._in_gap = trio.Event()
        self._put, self._get = trio.open_memory_channel[Connection | SyncdError | None](1)

    async def run(self) -> None:
        try:
            await self.session.run(reconnect=self._reconnect)
        except SyncdError as error:
            self.error = error
        self.ended.set()

    async def _reconnect(self, sm: StreamManagement) -> Connection | None:
        assert sm is self._stream.sm
        self.gaps += 1
        self._in_gap.set()
        found = await self._get.receive()
        self._in_gap = trio.Event()
        if isinstance(found, SyncdError):
            raise found
        return found

    def ask(self, to: JID | None, timeout: float = REQUEST_TIMEOUT) -> Asked:
        """Let another task send a request."""
        asked = Asked()
        self._nursery.start_soon(asked.ask, self.session, to, make(QUERY), timeout)
        return asked

    async def gap(self) -> None:
        """Wait until the session is between two connections."""
        await self._in_gap.wait()

    async def break_off(self) -> None:
        """Break the connection, as a reset or a cut cable does."""
        await self.server.transport.aclose()
        await self.gap()

    async def resume(self, h: int, *, behind: str = "", lockstep: bool = False) -> None:
        """Give the session a connection on which the server has resumed it.

        Args:
          h: How many stanzas of the client's the server says that it has.
          behind: What it says in the same breath.
          lockstep: The connection takes only what the server reads.
        """
        stream = resuming_stream(kept(self._stream))
        event, *early = stream.receive_data((resumed(h) + behind).encode())
        assert event == Resumed()
        self._give(stream, early, lockstep=lockstep)

    def forget(self, h: int | None = None) -> None:
        """Give the session a connection whose server knows nothing of it, or only a count."""
        failed = {} if h is None else {"h": str(h)}
        kept(self._stream).forgotten(make(f"{{{sm.NS}}}failed", failed))
        self._give(open_stream(), [])

    def give_up(self, error: SyncdError | None = None) -> None:
        """Give the session nothing, or a reason to end."""
        self._put.send_nowait(error)

    def _give(
        self, stream: ClientStream, early: list[Event], *, lockstep: bool = False
    ) -> None:
        ours, theirs = lockstep_stream_pair() if lockstep else memory_stream_pair()
        self._stream, self.server = stream, Server(theirs, opened=True)
        self._put.send_nowait(Connection(ours, stream, early))

    async def heard(self, count: int) -> list[str]:
        """The ids of the next stanzas that the server hears, and other elements by name."""
        elements = [await self.server.stanza() for _ in range(count)]
        return [element.get("id") or element.tag.rpartition("}")[2] for element in elements]


@asynccontextmanager
async def mobile(handlers: Mapping[str, Handler] | None = None) -> AsyncIterator[Mobile]:
    """Run a session that can be resumed."""
    async with trio.open_nursery() as nursery:
        life = Mobile(nursery, handlers or {})
        nursery.start_soon(life.run)
        yield life
        nursery.cancel_scope.cancel()


async def test_a_request_under_way_is_answered_on_the_next_connection() -> None:
    async with mobile() as life:
        asked = life.ask(BOB)
        request = await life.server.stanza()
        connected = [life.session.connected]
        await life.break_off()
        connected.append(life.session.connected)
        await life.resume(1)
        assert await life.heard(1) == ["r"]  # the server has it: it is not sent again
        await life.server.answer(request)
        assert (await asked.answer()).sender == BOB
        assert [*connected, life.session.connected] == [True, False, True]
        assert not life.ended.is_set()


async def test_a_request_that_was_lost_is_sent_again() -> None:
    async with mobile() as life:
        asked = [life.ask(BOB) for _ in range(3)]
        requests = [await life.server.stanza() for _ in range(3)]
        await life.break_off()
        await life.resume(1)
        ids = [request.get("id") for request in requests]
        assert await life.heard(3) == [*ids[1:], "r"]
        for request in requests:
            await life.server.answer(request)
        for each in asked:
            assert (await each.answer()).type == "result"


async def test_at_the_end_the_server_learns_what_we_have_handled() -> None:
    """XEP-0198 section 4: else it refuses to its sender what was answered long ago."""
    async with mobile() as life:
        await life.server.send("<presence/><presence/>")
        await wait_all_tasks_blocked()
        life.session.close()
        counted = await life.server.stanza()
        assert (counted.tag, counted.get("h")) == (f"{{{sm.NS}}}a", "2")
        with pytest.raises(EOFError):
            await life.server.stanza()
        # Behind our footer there is nothing to be said.
        await life.server.send(f"<r xmlns='{sm.NS}'/>{S_FOOTER}")
        await life.ended.wait()
        assert life.server.heard.endswith(f"h='2'/>{S_FOOTER}".encode())


async def test_what_is_sent_in_the_gap_goes_out_behind_it_in_order() -> None:
    async with mobile() as life:
        life.session.send(make(PRESENCE, {"id": "1"}))
        assert await life.heard(1) == ["1"]
        await life.break_off()
        life.session.send(make(PRESENCE, {"id": "2"}))
        asked = life.ask(BOB)
        await wait_all_tasks_blocked()
        life.session.send(make(PRESENCE, {"id": "4"}))
        await life.resume(1)
        assert (await life.server.stanza()).get("id") == "2"
        request = await life.server.stanza()
        assert await life.heard(2) == ["4", "r"]
        await life.server.answer(request)
        assert (await asked.answer()).type == "result"


async def test_a_handler_survives_the_break_and_answers_once() -> None:
    may_answer = trio.Event()

    async def on_query(_: Iq) -> None:
        await may_answer.wait()

    request = f"<iq type='get' id='{{}}' from='{BOB}'>{A_QUERY}</iq>"
    async with mobile({QUERY: on_query}) as life:
        await life.server.send(request.format("7"))
        await wait_all_tasks_blocked()
        await life.break_off()
        await life.resume(0, behind=request.format("8"))
        assert await life.heard(1) == ["r"]
        await wait_all_tasks_blocked()
        may_answer.set()
        assert sorted(await life.heard(2)) == ["7", "8"]
        await life.server.send(f"<r xmlns='{sm.NS}'/>")
        counted = await life.server.stanza()
        assert (counted.tag, counted.get("h")) == (f"{{{sm.NS}}}a", "2")


async def test_an_answer_given_in_the_gap_goes_out_once() -> None:
    may_answer = trio.Event()

    async def on_query(_: Iq) -> None:
        await may_answer.wait()

    async with mobile({QUERY: on_query}) as life:
        await life.server.send(f"<iq type='get' id='7' from='{BOB}'>{A_QUERY}</iq>")
        await wait_all_tasks_blocked()
        await life.break_off()
        may_answer.set()
        await wait_all_tasks_blocked()
        await life.resume(0)
        assert await life.heard(2) == ["7", "r"]
        await life.server.send(f"<a xmlns='{sm.NS}' h='1'/>")
        await wait_all_tasks_blocked()
        await life.break_off()
        await life.resume(1)
        assert await life.heard(1) == ["r"]


async def test_a_session_survives_many_breaks() -> None:
    async with mobile() as life:
        asked = life.ask(BOB)
        request = await life.server.stanza()
        for number in range(1, 6):
            await life.break_off()
            await life.resume(0)
            assert await life.heard(2) == [request.get("id"), "r"]
            assert life.gaps == number
        await life.server.answer(request)
        assert (await asked.answer()).type == "result"


async def test_a_server_that_writes_before_it_reads_is_heard_out_when_it_resumes() -> None:
    """However much each of them has for the other: neither waits for the other to begin."""
    async with mobile() as life:
        await life.break_off()
        for number in range(2_000):
            life.session.send(make(PRESENCE, {"id": f"{number}-{'x' * 1_000}"}))
        await life.resume(0, lockstep=True)
        assert life._stream.queued > session.MAX_UNWRITTEN
        for _ in range(50):
            await life.server.send("<presence/>" * 100)  # returns when it was read
        elements = await life.heard(2)
        assert elements[0].startswith("0-x")


async def test_nothing_is_lost_between_the_break_and_the_gap(
    autojump_clock: MockClock,
) -> None:
    """The writer may hang in a dead connection for a while, and other tasks go on."""
    async with mobile() as life:
        await life.break_off()
        await life.resume(0, lockstep=True)  # nobody reads there, so the writer hangs
        await wait_all_tasks_blocked()
        assert isinstance(life.server.transport, trio.StapledStream)
        await life.server.transport.send_stream.aclose()
        await wait_all_tasks_blocked()
        assert (life.session.connected, life.gaps) == (False, 1)
        life.session.send(make(PRESENCE, {"id": "1"}))
        await life.gap()
        assert trio.current_time() == session.CLOSE_TIMEOUT
        await life.resume(0)
        assert await life.heard(2) == ["1", "r"]


async def _never(_: Iq) -> None:
    await trio.sleep_forever()


async def test_the_server_gets_its_count_while_all_handlers_are_busy() -> None:
    """XEP-0198 section 4: a server that waits for it takes us for dead."""
    async with mobile({QUERY: _never}) as life:
        await life.server.send(_asking(MAX_HANDLING_OF_ONE, BOB))
        await life.server.send(f"<r xmlns='{sm.NS}'/>")
        counted = await life.server.stanza()
        assert (counted.tag, counted.get("h")) == (f"{{{sm.NS}}}a", str(MAX_HANDLING_OF_ONE))


async def test_a_forgotten_session_ends_and_the_new_one_is_handed_over() -> None:
    async with mobile({QUERY: _never}) as life:
        asked = [life.ask(BOB), life.ask(None)]
        for _ in asked:
            await life.server.stanza()
        await life.server.send(f"<iq type='get' id='7' from='{BOB}'>{A_QUERY}</iq>")
        await wait_all_tasks_blocked()
        await life.break_off()
        life.forget()
        for each in asked:
            with pytest.raises(OfflineError, match="ended before the answer came"):
                await each.answer()
        await life.ended.wait()
        assert isinstance(life.error, OfflineError)
        assert "forgotten the session" in str(life.error)
        assert life.session.successor is not None
        assert life.session.successor.stream is life._stream
        with pytest.raises(OfflineError, match="not connected"):
            life.session.send(make(PRESENCE))
        await life.session.successor.transport.send_all(b"x")  # it is open still
        await trio.aclose_forcefully(life.session.successor.transport)


@pytest.mark.parametrize(("h", "lost"), [(None, 3), (0, 3), (2, 1), (3, 0)])
async def test_of_a_forgotten_session_only_what_the_server_had_not_is_lost(
    h: int | None, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with mobile() as life:
        for number in range(3):
            life.session.send(make(PRESENCE, {"id": str(number)}))
        assert await life.heard(3) == ["0", "1", "2"]
        await life.break_off()
        with caplog.at_level("INFO"):
            life.forget(h)
            await life.ended.wait()
        assert (f"{lost} stanzas may be lost" in caplog.text) == (lost > 0)
        assert ("may be lost" in caplog.text) == (lost > 0)
        assert life.session.successor is not None
        await trio.aclose_forcefully(life.session.successor.transport)


async def test_a_session_that_nobody_could_resume_ends() -> None:
    async with mobile() as life:
        asked = life.ask(BOB)
        await life.server.stanza()
        await life.break_off()
        life.give_up()
        with pytest.raises(OfflineError, match="ended before the answer came"):
            await asked.answer()
        await life.ended.wait()
        assert (str(life.error), life.session.successor) == ("the server hung up", None)


async def test_why_it_could_not_be_resumed_is_why_it_ended() -> None:
    async with mobile() as life:
        await life.break_off()
        life.give_up(AuthenticationError("wrong password"))
        await life.ended.wait()
        assert str(life.error) == "wrong password"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (S_FOOTER, type(None)),
        (
            "<stream:error><system-shutdown xmlns='urn:ietf:params:xml:ns:xmpp-streams'/>"
            "</stream:error>",
            StreamError,
        ),
        ("<!-- x -->", RemoteProtocolError),
        (f"<a xmlns='{sm.NS}' h='7'/>", RemoteProtocolError),
    ],
)
async def test_what_the_server_ended_is_not_resumed(said: str, kind: type) -> None:
    async with mobile() as life:
        await life.server.send(said)
        with pytest.raises(EOFError):
            await _read_on(life.server)
        await life.server.transport.aclose()
        await life.ended.wait()
        assert (type(life.error), life.gaps) == (kind, 0)


async def test_a_session_without_an_id_is_not_resumed() -> None:
    async with mobile() as life:
        assert life._stream.sm is not None
        life._stream.sm.id = ""
        await life.server.transport.aclose()
        await life.ended.wait()
        assert (str(life.error), life.gaps) == ("the server hung up", 0)


async def test_without_a_way_to_reconnect_nothing_waits_in_a_gap() -> None:
    ours, theirs = memory_stream_pair()
    subject = Session(Connection(ours, managed_stream(), []), {}, lambda _: None)
    await theirs.aclose()
    with pytest.raises(OfflineError, match="the server hung up"):
        await subject.run()
    with pytest.raises(OfflineError, match="not connected"):
        subject.send(make(PRESENCE))


async def test_a_server_that_acknowledges_nothing_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sm, "MAX_UNACKED", 3)
    async with mobile() as life:
        for _ in range(4):
            life.session.send(make(PRESENCE))
        with pytest.raises(OfflineError, match="not connected"):
            life.session.send(make(PRESENCE))
        with pytest.raises(EOFError):
            await _read_on(life.server)
        await life.server.transport.aclose()
        await life.ended.wait()
        assert str(life.error) == "the server acknowledges nothing any more"
        assert life.gaps == 0


async def test_only_so_much_waits_in_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm, "MAX_UNACKED", 3)
    async with mobile() as life:
        await life.break_off()
        for number in range(4):
            life.session.send(make(PRESENCE, {"id": str(number)}))
        with pytest.raises(OfflineError, match="much waits to be sent"):
            await life.ask(BOB).answer()
        await life.resume(0)
        assert await life.heard(5) == ["0", "1", "2", "3", "r"]


async def test_closing_in_the_gap_ends_everything() -> None:
    async with mobile() as life:
        asked = life.ask(BOB)
        await life.server.stanza()
        await life.break_off()
        life.session.close()
        await life.ended.wait()
        assert life.error is None
        with pytest.raises(OfflineError, match="ended before the answer came"):
            await asked.answer()
        with pytest.raises(OfflineError, match="not connected"):
            life.session.send(make(PRESENCE))


async def test_closing_just_when_the_gap_is_over_tells_the_server() -> None:
    async with mobile() as life:
        await life.break_off()
        await life.resume(0)
        life.session._closing = True  # as if close() had come one step too late to cancel
        with pytest.raises(EOFError):
            await _read_on(life.server)
        await life.server.send(S_FOOTER)
        await life.ended.wait()
        assert life.error is None


async def test_closing_just_when_the_session_was_forgotten_leaves_no_connection() -> None:
    async with mobile() as life:
        await life.break_off()
        life.forget()
        life.session._closing = True
        await life.ended.wait()
        assert life.session.successor is None
        with pytest.raises(ClientGoneError):
            await life.server.stanza()


async def test_a_silent_connection_is_left_and_the_session_goes_on(
    autojump_clock: MockClock,
) -> None:
    """Found within a minute; what was sent into the silence is sent again."""
    async with mobile() as life:
        asked = life.ask(BOB, timeout=300.0)
        await life.gap()
        assert trio.current_time() == PING_AFTER + PING_TIMEOUT < 60.0
        request = await life.server.stanza()
        await trio.sleep(100)
        life.session.send(make(PRESENCE, {"id": "2"}))
        await life.resume(0)
        heard = await life.heard(4)
        assert (heard[0], heard[2:]) == (request.get("id"), ["2", "r"])  # [1] was the ping
        await life.server.answer(request)
        assert (await asked.answer()).sender == BOB
        assert life.error is None


async def test_a_request_waits_no_longer_for_the_gap(autojump_clock: MockClock) -> None:
    async with mobile() as life:
        asked = life.ask(BOB)
        await wait_all_tasks_blocked()
        await life.break_off()
        with pytest.raises(OfflineError, match="gave no answer for 60 s"):
            await asked.answer()
        assert trio.current_time() == REQUEST_TIMEOUT


# Limits of the server (XEP-0478)


@asynccontextmanager
async def limited(
    limits: Limits, handlers: Mapping[str, Handler] | None = None, *, lockstep: bool = False
) -> AsyncIterator[Life]:
    async with living(handlers, lockstep=lockstep) as life:
        life.session._stream.limits = limits
        yield life


async def test_a_server_that_wants_to_hear_of_us_does(autojump_clock: MockClock) -> None:
    """Even if it talks all the time: then a space does, which nobody need answer."""
    async with limited(Limits(idle_seconds=20)) as life, trio.open_nursery() as nursery:

        async def talk() -> None:
            while True:
                await life.server.send(" ")
                await trio.sleep(1)

        nursery.start_soon(talk)
        heard = []
        for _ in range(3):
            data = await life.server.transport.receive_some(100)
            heard.append((trio.current_time(), bytes(data)))
        assert heard == [(10.0, b" "), (20.0, b" "), (30.0, b" ")]
        nursery.cancel_scope.cancel()


async def test_an_answer_that_is_too_long_is_refused_instead() -> None:
    async def on_query(_: Iq) -> Element:
        return make(QUERY, text="x" * 10_000)

    async with limited(Limits(max_bytes=10_000), {QUERY: on_query}) as life:
        await life.server.send(f"<iq type='get' id='7' from='{BOB}'>{A_QUERY}</iq>")
        assert condition(await life.server.stanza()) == "cancel internal-server-error"
        with pytest.raises(StanzaError, match="where our server takes 10000"):
            await life.ask(BOB, make(QUERY, text="x" * 10_000)).answer()
        assert not life.ended.is_set()


async def test_a_refusal_that_is_too_long_is_not_sent() -> None:
    """Only an id that is made for it gets so far."""
    async with limited(Limits(max_bytes=500)) as life:
        await life.server.send(f"<iq type='get' id='{'x' * 500}'>{A_QUERY}</iq>")
        await life.server.send(f"<iq type='get' id='8'>{A_QUERY}</iq>")
        assert (await life.server.stanza()).get("id") == "8"
