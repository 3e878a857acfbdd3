"""A target for a session: whatever stanzas come, each request is answered, and nothing else.

A peer that can make us answer twice, or not at all, or that can end the session by what it
asks, has found what this looks for. From the command line::

    python -m tests.fuzz.session --seconds 3600 [--seed 7]
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeAlias
from xml.sax.saxutils import quoteattr

import trio
from hypothesis import strategies as st
from trio.testing import MockClock, lockstep_stream_pair

from syncd.errors import ErrorType, JournalError, StanzaError
from syncd.link.connect import Connection
from syncd.link.peers import ROSTER
from syncd.link.session import MAX_HANDLING_OF_ONE, REQUEST_TIMEOUT, Session
from syncd.xmpp import sm
from syncd.xmpp.disco import PING
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import IQ, MAX_ID, MESSAGE
from syncd.xmpp.xml import local_name, make, namespace
from tests.fuzz import loop
from tests.support.asking import Asked, condition
from tests.support.wire import LAPTOP, S_FOOTER, Server, cut, managed_stream, open_stream

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from xml.etree.ElementTree import Element

    from syncd.link.session import Answer, Handler, MessageHandler
    from syncd.xmpp.stanza import Iq

BOB = JID.parse("bob@example.org/pc")
OWN_ID = "ours"
"""Stands for the id of the request that we have out to Bob."""

KINDS = ("get", "set", "result", "error", "want", "", None)
IDENTS = ("1", "1", "2", "<&'\" \u00e4", "x" * MAX_ID, "x" * (MAX_ID + 1), OWN_ID, "", None)
SENDERS = (str(BOB), "carol@example.org/pc", str(LAPTOP), str(LAPTOP.bare), None, "@", "")
PUSH = "<query xmlns='jabber:iq:roster'><item jid='dave@example.org'/></query>"
# What they ask, and the type and condition of the refusal; none: it is answered.
ASKED = {
    "<ping xmlns='urn:xmpp:ping'/>": "",
    PUSH: "",
    "<now xmlns='urn:a'/>": "",
    "<later xmlns='urn:a'/>": "",
    "<no xmlns='urn:a'/>": "auth forbidden",
    "<not-now xmlns='urn:a'/>": "wait internal-server-error",
    "<bug xmlns='urn:a'/>": "cancel internal-server-error",
    "<late-bug xmlns='urn:a'/>": "cancel internal-server-error",
    "<control xmlns='urn:a'/>": "cancel internal-server-error",
    "<what xmlns='urn:b'/>": "cancel service-unavailable",
}
# What a message holds, and how it is refused; empty: not at all.
TOLD = {
    "<body>hello</body>": "",
    "<take xmlns='urn:a'/>": "",
    "<no xmlns='urn:a'/>": "auth forbidden",
    "<bug xmlns='urn:a'/>": "cancel internal-server-error",
}
ERROR = "<error type='wait'><gone xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
CHILDREN = (*ASKED, *TOLD, ERROR)


@dataclass(frozen=True, slots=True)
class Said:
    """One stanza of the server's; None leaves an attribute out."""

    name: str
    kind: str | None
    ident: str | None
    sender: str | None
    children: tuple[str, ...]

    def text(self, own_id: str) -> str:
        """As it is sent."""
        ident = own_id if self.ident == OWN_ID else self.ident
        given = {"type": self.kind, "id": ident, "from": self.sender}
        attributes = "".join(
            f" {name}={quoteattr(value)}" for name, value in given.items() if value is not None
        )
        return f"<{self.name}{attributes}>{''.join(self.children)}</{self.name}>"

    @property
    def has_sender(self) -> bool:
        """Whether ``from`` is right, or left out."""
        return self.sender not in ("@", "")

    @property
    def is_asking(self) -> bool:
        """Whether it is a request, which wants an answer."""
        return self.name == "iq" and self.kind not in ("result", "error")

    @property
    def refusal(self) -> str | None:
        """How it is to be refused; empty: it is answered; None: in its own words."""
        if self.name == "message":
            return next((TOLD[each] for each in self.children if TOLD.get(each)), "")
        asked = [each for each in self.children if each != ERROR]
        usable = bool(self.ident) and len(self.ident or "") <= MAX_ID and self.has_sender
        if self.kind not in ("get", "set") or len(asked) != 1 or not usable:
            return None
        return ASKED.get(asked[0], "cancel service-unavailable")

    @property
    def is_answered(self) -> bool:
        """Whether we may say anything to it: once, then."""
        if self.name == "message":
            return self.kind != "error" and self.has_sender and bool(self.refusal)
        return self.is_asking


said = st.one_of(
    st.builds(
        Said,
        st.just("iq"),
        st.sampled_from(KINDS[:2] * 6 + KINDS),
        st.sampled_from(IDENTS),
        st.sampled_from(SENDERS),
        st.one_of(
            st.sampled_from(list(ASKED)).map(lambda each: (each,)),
            st.lists(st.sampled_from(CHILDREN), max_size=2).map(tuple),
        ),
    ),
    st.builds(
        Said,
        st.sampled_from(["message", "presence"]),
        st.sampled_from(["error", "chat", "unavailable", None]),
        st.sampled_from(IDENTS),
        st.sampled_from(SENDERS),
        st.lists(st.sampled_from(list(TOLD)), max_size=2).map(tuple),
    ),
)
Input: TypeAlias = tuple[bool, list[Said], list[int]]
inputs = st.tuples(
    st.booleans(),
    st.lists(said, max_size=MAX_HANDLING_OF_ONE // 2),
    st.lists(st.integers(1, 200), max_size=40),
)


def check(drawn: Input) -> None:
    """Fail if a session does anything but answer what asks."""
    trio.run(_check, *drawn, clock=MockClock(autojump_threshold=0))


async def _check(managed: bool, conversation: Sequence[Said], sizes: Sequence[int]) -> None:
    ours, theirs = lockstep_stream_pair()
    stream = managed_stream() if managed else open_stream()
    session = Session(Connection(ours, stream, []), HANDLERS, _take_presence, ANSWERS, MESSAGES)
    server, heard, own = Server(theirs, opened=True), _Heard(), Asked()
    ended = trio.Event()

    async def live() -> None:
        await session.run()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        nursery.start_soon(own.ask, session, BOB, make("{urn:own}query"), REQUEST_TIMEOUT)
        own_id = (await server.stanza()).get("id", "")
        nursery.start_soon(heard.listen, server)
        text = "".join(each.text(own_id) for each in conversation)
        for data in cut(text.encode(), sizes):
            await theirs.send_all(data)
        await server.send("<iq type='get' id='last'><ping xmlns='urn:xmpp:ping'/></iq>")
        await trio.sleep(2)  # all are answered then
        assert session.connected
        assert own.done == any(
            (each.name, each.ident, each.sender) == ("iq", OWN_ID, str(BOB))
            and each.kind in ("result", "error")
            for each in conversation
        )
        session.close()
        await heard.end.wait()
        await server.send(S_FOOTER)
        await ended.wait()
        nursery.cancel_scope.cancel()
    _compare(conversation, heard.stanzas, own_id)
    assert heard.counts == ([str(len(conversation) + 1)] if managed else [])


def _compare(conversation: Sequence[Said], replies: Sequence[Element], own_id: str) -> None:
    """Fail unless there is one reply for each that wants one, and the right one."""
    expected = Counter(
        (each.name, own_id if each.ident == OWN_ID else each.ident, each.sender)
        for each in conversation
        if each.is_answered
    )
    expected["iq", "last", None] += 1
    assert expected == Counter(
        (local_name(each.tag), each.get("id"), each.get("to")) for each in replies
    )
    assert {each.get("type") for each in replies} <= {"result", "error"}
    # How those are refused whose refusals are known; in any order, for some take longer.
    known = Counter(each.refusal for each in conversation if each.is_answered and each.refusal)
    refused = Counter(condition(each) for each in replies if each.get("type") == "error")
    assert known <= refused
    results = sum(each.is_asking and each.refusal == "" for each in conversation) + 1
    assert results == sum(each.get("type") == "result" for each in replies)


class _Heard:
    """What the server hears until our footer.

    Attributes:
      stanzas: Of them all.
      counts: Our counts (XEP-0198).
    """

    def __init__(self) -> None:
        self.stanzas: list[Element] = []
        self.counts: list[str | None] = []
        self.end = trio.Event()

    async def listen(self, server: Server) -> None:
        try:
            while True:
                element = await server.stanza()
                if element.tag in (IQ, MESSAGE):
                    self.stanzas.append(element)
                elif local_name(element.tag) == "a":
                    self.counts.append(element.get("h"))
                else:
                    assert namespace(element.tag) == sm.NS
        except EOFError:
            self.end.set()


def _take_presence(presence: Element) -> None:
    if presence.get("type") == "chat":
        raise KeyError("a bug")


async def _on_now(iq: Iq) -> Element:
    return make("{urn:a}answer", {"to": str(iq.sender)})


async def _on_later(_: Iq) -> None:
    await trio.sleep(1)


async def _on_no(_: Iq) -> None:
    raise StanzaError(ErrorType.AUTH, "forbidden", "not you")


async def _on_not_now(_: Iq) -> None:
    await trio.sleep(1)
    raise JournalError("/home/me: the disk is full", type=ErrorType.WAIT)


def _on_bug(_: Iq) -> NoReturn:
    raise KeyError("a bug")


async def _on_late_bug(_: Iq) -> None:
    await trio.sleep(1)
    raise AssertionError("a bug")


async def _on_control(_: Iq) -> Element:
    return make("{urn:a}answer", text="\x1b")


def _take(_: JID, __: Element) -> None:
    pass


def _refuse(_: JID, __: Element) -> NoReturn:
    raise StanzaError(ErrorType.AUTH, "forbidden")


def _fall_over(_: JID, __: Element) -> NoReturn:
    raise KeyError("a bug")


HANDLERS: Mapping[str, Handler] = {
    "{urn:a}now": _on_now,
    "{urn:a}later": _on_later,
    "{urn:a}no": _on_no,
    "{urn:a}not-now": _on_not_now,
    "{urn:a}bug": _on_bug,
    "{urn:a}late-bug": _on_late_bug,
    "{urn:a}control": _on_control,
}
ANSWERS: Mapping[str, Answer] = {PING: lambda _: None, ROSTER: lambda _: None}
MESSAGES: Mapping[str, MessageHandler] = {
    "{urn:a}take": _take,
    "{urn:a}no": _refuse,
    "{urn:a}bug": _fall_over,
}


def one_input(data: bytes) -> None:
    """The same for a fuzzer that makes bytes: five for each stanza, of a list each."""
    conversation = []
    for start in range(0, min(len(data), 5 * (MAX_HANDLING_OF_ONE // 2)) - 4, 5):
        name, kind, ident, sender, child = data[start : start + 5]
        conversation.append(
            Said(
                ("iq", "message", "presence")[name % 3],
                KINDS[kind % len(KINDS)],
                IDENTS[ident % len(IDENTS)],
                SENDERS[sender % len(SENDERS)],
                (CHILDREN[child % len(CHILDREN)],),
            )
        )
    check((len(data) % 2 == 0, conversation, [size + 1 for size in data[:40]]))


if __name__ == "__main__":
    logging.disable()  # of each bug that is planted here the log has a traceback
    loop.run(__doc__, inputs, check, one_input)
