"""A daemon's transfers on a real session, and a peer of which every stanza and byte is written.

::

    Sender, Receiver ── Session ══ XML over memory ══ Script ── what the test lets the peer say
          └──────────── SOCKS5 over loopback TCP ══════ raw sockets in the hands of the test

Our end is the real one from the stream up, with real files. The peer is none of our code: its
stanzas are text as its client writes them, its sockets say bytes, and its base64, hashes and
XML come from the standard library. The proxies are those of the embedded server.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

import trio
import trio.testing
from trio.testing import memory_stream_pair

from syncd.bytestreams import ibb, s5b
from syncd.bytestreams.inband import BOUNDED, Inband
from syncd.bytestreams.outgoing import Requester
from syncd.bytestreams.proxies import Probed, Proxies
from syncd.bytestreams.s5b import Streamhost
from syncd.bytestreams.sockets import Listener, open_listener
from syncd.demo.faults import Faults
from syncd.demo.proxy65 import Proxy65
from syncd.disk.partial import Identity
from syncd.errors import DeclinedError, StanzaError, SyncdError
from syncd.link.connect import Connection
from syncd.link.resolve import Target as ServerTarget
from syncd.link.session import Answer, Handler, Session
from syncd.transfer import si
from syncd.transfer.incoming import Arriving, Inbox, Incoming, Known
from syncd.transfer.receiver import Receiver
from syncd.transfer.sender import Sender, Sent, Source, Target
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import make_error_reply, make_iq, read_iq
from syncd.xmpp.xml import serialise
from tests.support.peers import FOLDER, LONG_AGO, carried
from tests.support.wire import LAPTOP, ClientGoneError, Server, open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path

    from syncd.transfer.pump import Progress

US = str(LAPTOP)
PROXY = JID.parse("proxy.example.org")

NS_ERROR = "urn:ietf:params:xml:ns:xmpp-stanzas"

# RFC 1928 as XEP-0065 has it, for whoever connects.
GREETING = b"\x05\x01\x00"
GREETED = b"\x05\x00"

# A lost wake-up shall end its test, not the run.
PATIENCE = 30.0  # seconds


def sha1(sid: str, requester: str, target: str, encoding: str = "utf-8") -> bytes:
    """DST.ADDR by the book (XEP-0065 section 5.3.2), or in another encoding."""
    text = f"{sid}{requester}{target}".encode(encoding, "replace")
    return hashlib.sha1(text).hexdigest().encode()


def connect_request(address: bytes) -> bytes:
    """What a target sends behind the greeting."""
    return b"\x05\x01\x00\x03\x28" + address + b"\x00\x00"


def connect_reply(request: bytes) -> bytes:
    """The reply by the book: the request, but for its second byte."""
    return b"\x05\x00" + request[2:]


def open_inband(sid: str, block_size: int = 4096, stanza: str = " stanza='iq'") -> str:
    """The opening of an in-band bytestream."""
    return f"<open xmlns='{ibb.NS}' sid='{sid}' block-size='{block_size}'{stanza}/>"


def block(sid: str, seq: int, data: bytes, *, lines: bool = False) -> str:
    """A block of an in-band bytestream; with its base64 in lines of 76, if wanted."""
    text = (base64.encodebytes if lines else base64.b64encode)(data).decode()
    return f"<data xmlns='{ibb.NS}' sid='{sid}' seq='{seq}'>{text}</data>"


def blocks(sid: str, data: bytes, size: int = 4096, *, lines: bool = False) -> list[str]:
    """All blocks of an in-band bytestream."""
    starts = range(0, len(data), size)
    return [
        block(sid, number % 65_536, data[start : start + size], lines=lines)
        for number, start in enumerate(starts)
    ]


def close_inband(sid: str) -> str:
    """The end of an in-band bytestream."""
    return f"<close xmlns='{ibb.NS}' sid='{sid}'/>"


def query(
    sid: str, *hosts: tuple[str, str, int], attributes: str = "", inside: str = ""
) -> str:
    """The opening of a SOCKS5 bytestream: JID, host and port of each streamhost."""
    listed = "".join(
        f"<streamhost jid='{jid}' host='{host}' port='{port}'/>" for jid, host, port in hosts
    )
    return f"<query xmlns='{s5b.NS}' sid='{sid}'{attributes}>{listed}{inside}</query>"


def used(jid: str, sid: str = "") -> str:
    """Which streamhost a target uses; without the sid unless it is given."""
    named = f" sid='{sid}'" if sid else ""
    return f"<query xmlns='{s5b.NS}'{named}><streamhost-used jid='{jid}'/></query>"


def accepted(
    method: str,
    *,
    x: str = " type='submit'",
    field: str = "",
    file: str = "",
    behind: str = "",
    attributes: str = "",
) -> str:
    """The answer that takes an offer: attributes of ``x``, the field and ``si``, and more.

    Args:
      method: The one that is chosen.
      x: Attributes of the form.
      field: Attributes of its field.
      file: Comes before ``<feature/>``.
      behind: Comes behind it.
      attributes: Of the ``<si/>``.
    """
    return (
        f"<si xmlns='{si.NS_SI}'{attributes}>{file}<feature xmlns='{si.NS_FEATURE}'>"
        f"<x xmlns='{si.NS_DATA}'{x}><field var='stream-method'{field}>"
        f"<value>{method}</value></field></x></feature>{behind}</si>"
    )


def error(condition: str, kind: str = "cancel", *, code: str = "", inside: str = "") -> str:
    """An ``<error/>``; an empty condition leaves only the legacy code."""
    named = f"<{condition} xmlns='{NS_ERROR}'/>" if condition else ""
    coded = f" code='{code}'" if code else ""
    typed = f" type='{kind}'" if kind else ""
    return f"<error{coded}{typed}>{named}{inside}</error>"


def payload(iq: Element) -> Element:
    """What is in a stanza, which is one child."""
    [child] = iq
    return child


def refusal(iq: Element) -> tuple[str, str]:
    """The type and condition of an error answer."""
    found = iq.find("{jabber:client}error")
    assert iq.get("type") == "error"
    assert found is not None
    return found.get("type", ""), found[0].tag.partition("}")[2]


class Host:
    """A streamhost of the peer's: accepts, and says what the test tells it."""

    def __init__(self, listening: trio.SocketListener) -> None:
        self._listening = listening
        self.port: int = listening.socket.getsockname()[1]

    async def accept(
        self,
        reply: Callable[[bytes], bytes] = connect_reply,
        *,
        writes: Sequence[int] = (),
        behind: bytes = b"",
        address: bytes | None = None,
    ) -> trio.SocketStream:
        """Let our target connect; each of its messages must come in one piece.

        Args:
          reply: Makes the reply out of the request.
          writes: How the reply is cut into writes.
          behind: What is in the segment of the reply's end already.
          address: What it must ask for; None: anything.
        """
        stream = await self._listening.accept()
        # As the parsers of Openfire, ejabberd and gloox do it: what one read gives is all.
        assert bytes(await stream.receive_some(65_536)) == GREETING
        await stream.send_all(GREETED)
        request = bytes(await stream.receive_some(65_536))
        assert len(request) == 47
        if address is not None:
            assert request == connect_request(address)
        data = reply(request) + behind
        for size in writes:
            await stream.send_all(data[:size])
            data = data[size:]
            await trio.testing.wait_all_tasks_blocked()
        if data:
            await stream.send_all(data)
        return stream

    def close(self) -> None:
        """Take no further connection, as a listener for one transfer does."""
        self._listening.socket.close()


class Delivery:
    """A file on its way from us."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._outcome: Sent | SyncdError | None = None

    async def run(self, sender: Sender, source: Source, target: Target) -> None:
        """Send it."""
        try:
            self._outcome = await sender.send(source, target)
        except SyncdError as problem:
            self._outcome = problem
        self._done.set()

    async def sent(self) -> Sent:
        """Wait for the end; raise the error if it was one."""
        await self._done.wait()
        if isinstance(self._outcome, SyncdError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class Script:
    """Our end, and the peer that the test plays.

    Attributes:
      peer: The peer's full JID.
      server: The other end of our stream.
      session: Ours.
      requester: Ours.
      known: What we know of proxies.
      handlers: Ours, by the tag of the payload.
      inbox: Where the peer's files go.
      incoming: Every transfer that we accepted, in order.
      sending: The progress of every transfer that we began, in order.
      proxies: Those of the server, by JID.
      faults: What they do wrong.
    """

    def __init__(
        self,
        root: Path,
        peer: str,
        nursery: trio.Nursery,
        listener: Listener | None,
        *,
        inband: bool,
        answers: dict[str, Answer],
    ) -> None:
        self.source, self.inbox, self.folder = root / "source", root / "inbox", root / "folder"
        for path in (self.source, self.inbox, self.folder):
            path.mkdir()
        self.peer = peer
        self._nursery = nursery
        self.handlers: dict[str, Handler] = {}
        ours, theirs = memory_stream_pair()
        self.session = Session(
            Connection(ours, open_stream(), [], ServerTarget("h.example.org", 5222, False)),
            self.handlers,
            lambda _: None,
            answers,
            {ibb.DATA: lambda sender, data: self._inband.on_message(sender, data)},
            BOUNDED,
        )
        self.server = Server(theirs, opened=True)
        self.incoming: list[Incoming] = []
        self.sending: list[Progress] = []
        self.proxies: dict[JID, Proxy65] = {}
        self.faults: dict[JID, Faults] = {}
        self.known = Proxies("auto", LAPTOP.domain)
        self._inband = Inband(self.session.request, max_block=lambda: ibb.MAX_BLOCK)
        self.requester = Requester(
            request=self.session.request,
            own_jid=lambda: LAPTOP,
            listener=listener,
            advertised=lambda: [("127.0.0.1", listener.port)] if listener else [],
            proxies=self.known,
            clock=trio.current_time,
        )
        self.sender = Sender(
            request=self.session.request,
            wait_online=trio.lowlevel.checkpoint,
            requester=self.requester,
            inband=self._inband if inband else None,
            watch=self._watch_outgoing,
            own_jid=lambda: LAPTOP,
        )
        self._start_receiver(inband=inband)
        self._answers: dict[str, Element] = {}
        self._answered: defaultdict[str, trio.Event] = defaultdict(trio.Event)
        self._asked, self._asking = trio.open_memory_channel[Element](1_000)

    # --- Our end

    def _start_receiver(self, *, inband: bool = True) -> None:
        receiver = Receiver(
            own_jid=lambda: LAPTOP,
            inbox_for=self._inbox_for,
            known=self._known,
            arriving=self._arriving,
            watch=self._watch_incoming,
            inband=self._inband if inband else None,
        )
        self.handlers.update(
            {
                si.SI: receiver.on_offer,
                s5b.TAG: receiver.on_bytestream,
                si.FINISH: receiver.on_finish,
                ibb.OPEN: self._inband.on_open,
                ibb.DATA: self._inband.on_data,
                ibb.CLOSE: self._inband.on_close,
            }
        )
        self._receiving, self._stopped = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._receive, receiver, self._receiving, self._stopped)

    async def _receive(
        self, receiver: Receiver, scope: trio.CancelScope, stopped: trio.Event
    ) -> None:
        with scope:
            await receiver.run()
        stopped.set()

    async def restart(self) -> None:
        """Let our receiving end die and start anew; only the disk stays."""
        self._receiving.cancel()
        await self._stopped.wait()
        self._start_receiver()

    def _inbox_for(self, sender: JID, folder: str) -> Inbox:
        if sender == JID.parse(self.peer).bare and folder in ("", FOLDER):
            return Inbox(root=self.folder if folder else self.inbox, folder=folder)
        raise DeclinedError("not accepted from you here")

    async def _known(self, inbox: Inbox, path: str) -> Known | None:
        await trio.lowlevel.checkpoint()
        return None

    async def _arriving(self, arriving: Arriving) -> None:
        await trio.lowlevel.checkpoint()

    @contextlib.contextmanager
    def _watch_incoming(self, incoming: Incoming) -> Iterator[None]:
        self.incoming.append(incoming)
        yield

    @contextlib.contextmanager
    def _watch_outgoing(
        self, target: Target, source: Source, progress: Progress
    ) -> Iterator[None]:
        self.sending.append(progress)
        yield

    def send(self, data: bytes, *, name: str = "photo.jpg", is_syncd: bool = False) -> Delivery:
        """Let us send a file to the peer."""
        path = self.source / name
        path.write_bytes(data)
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
        version = Identity.of(path.stat())
        source = Source(root=self.source, folder=FOLDER, path=name, version=version)
        delivery = Delivery()
        target = Target(jid=JID.parse(self.peer), is_syncd=is_syncd)
        self._nursery.start_soon(delivery.run, self.sender, source, target)
        return delivery

    async def settled(self) -> dict[str, bytes]:
        """Wait until every transfer that we accepted has ended; the files that came."""
        await trio.testing.wait_all_tasks_blocked()
        for incoming in self.incoming:
            await incoming.ended.wait()
        return self.received()

    def received(self) -> dict[str, bytes]:
        """The files that came, without partial ones."""
        return {
            str(path.relative_to(root)): path.read_bytes()
            for root in (self.inbox, self.folder)
            for path in sorted(root.rglob("*"))
            if path.is_file() and ".syncd" not in path.parts
        }

    def kept(self, ending: str = "part") -> list[bytes]:
        """What is kept of files that have not come whole; or, as ``bad``, of wrong ones."""
        return [path.read_bytes() for path in sorted(self.inbox.glob(f".syncd/*.{ending}"))]

    def heard(self) -> str:
        """Every byte that we have said on the stream."""
        return self.server.heard.decode()

    async def offer_proxy(self, jid: JID = PROXY, faults: Faults | None = None) -> Proxy65:
        """Let the server have a proxy, of which we know."""
        self.faults[jid] = faults or Faults()
        proxy = self.proxies[jid.bare] = Proxy65(jid, "127.0.0.1", self.faults[jid])
        [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy.port = listening.socket.getsockname()[1]
        self._nursery.start_soon(partial(trio.serve_listeners, proxy.serve, [listening]))
        now = trio.current_time()
        self.known.found(LAPTOP.domain, list(self.proxies), now)
        streamhost = Streamhost(jid, "127.0.0.1", proxy.port)
        self.known.tested(jid.bare, [Probed(streamhost, 0.1)], now)
        return proxy

    # --- The peer on the stream

    async def run(self) -> None:
        """Sort what we say: answers, requests to proxies, and requests to the peer."""
        with contextlib.suppress(ClientGoneError, EOFError):
            while True:
                stanza = await self.server.stanza()
                if stanza.get("type") in ("result", "error"):
                    ident = stanza.get("id", "")
                    assert ident not in self._answers, "a second answer to one request"
                    self._answers[ident] = stanza
                    self._answered[ident].set()
                elif stanza.get("to") is None:
                    await self.server.answer(stanza)  # a ping of the session's
                elif JID.parse(stanza.get("to", "")).bare in self.proxies:
                    await self._by_proxy(stanza)
                else:
                    for proxy in self.proxies.values():
                        iq = read_iq(carried(stanza))
                        proxy.inspect_offer(iq, LAPTOP, JID.parse(stanza.get("to", "")))
                    self._asked.send_nowait(stanza)

    async def _by_proxy(self, stanza: Element) -> None:
        iq = read_iq(carried(stanza))
        to = JID.parse(stanza.get("to", ""))
        try:
            answer = self.proxies[to.bare].answer(iq, LAPTOP)
            reply = make_iq("result", iq.id, LAPTOP, *([] if answer is None else [answer]))
        except StanzaError as problem:
            reply = make_error_reply(iq.element, problem)
        reply.set("from", str(to))
        await self.server.send(serialise(reply).decode())

    async def say(self, inside: str, ident: str, kind: str = "set", sender: str = "") -> None:
        """Let the peer send an iq, without waiting for its answer."""
        sender = sender or self.peer
        await self.server.send(
            f"<iq type='{kind}' id='{ident}' from='{sender}' to='{US}'>{inside}</iq>"
        )

    async def answer_to(self, ident: str) -> Element:
        """Our answer to a request of the peer's."""
        await self._answered[ident].wait()
        return self._answers[ident]

    async def ask(self, inside: str, ident: str, kind: str = "set") -> Element:
        """Let the peer ask something; our answer."""
        await self.say(inside, ident, kind)
        return await self.answer_to(ident)

    async def asked(self, tag: str) -> Element:
        """The next request of ours to the peer, which has this payload."""
        stanza = await self._asking.receive()
        assert payload(stanza).tag == tag
        assert stanza.get("to") == self.peer
        return stanza

    def asked_nothing(self) -> bool:
        """Whether we have no request out that the test has not seen."""
        return not self._asking.statistics().current_buffer_used

    async def result(self, request: Element, inside: str = "") -> None:
        """Let the peer answer."""
        await self.server.answer(request, inside, sender=self.peer)

    async def refuse(
        self, request: Element, problem: str, *, ident: str | None = None, inside: str = ""
    ) -> None:
        """Let the peer refuse, under the request's id unless told otherwise."""
        named = request.get("id", "") if ident is None else ident
        await self.say(inside + problem, named, "error")

    async def take_blocks(self, opened: Element, *, answering: bool = True) -> bytes:
        """Let the peer take an in-band bytestream up to its close, one result for each.

        Args:
          opened: Our opening, to be answered first.
          answering: Whether the close gets a result.
        """
        await self.result(opened)
        data = b""
        while True:
            stanza = await self._asking.receive()
            found = payload(stanza)
            if found.tag == ibb.CLOSE:
                if answering:
                    await self.result(stanza)
                return data
            assert found.tag == ibb.DATA
            assert found.text is not None
            data += base64.b64decode(found.text, validate=True)
            await self.result(stanza)

    # --- The peer's sockets

    @contextlib.asynccontextmanager
    async def host(self) -> AsyncIterator[Host]:
        """A port of the peer's where our target can connect."""
        [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listening:
            yield Host(listening)

    async def join(
        self, opening: Element, number: int = 0, *, address: bytes | None = None
    ) -> trio.SocketStream:
        """Let the peer connect to one of our streamhosts, and shake hands by the book.

        Args:
          opening: Our request.
          number: Which streamhost.
          address: What to ask for, if not what the book says.
        """
        asked = payload(opening)
        host = asked[number]
        stream = await trio.open_tcp_stream(host.get("host", ""), int(host.get("port", "")))
        address = address or sha1(asked.get("sid", ""), US, self.peer)
        await stream.send_all(GREETING)
        assert await exactly(stream, 2) == GREETED
        await stream.send_all(connect_request(address))
        # Smack compares it with its request byte for byte.
        assert await exactly(stream, 47) == connect_reply(connect_request(address))
        return stream


async def exactly(stream: trio.SocketStream, count: int) -> bytes:
    """Read so many bytes."""
    data = b""
    while len(data) < count:
        more = bytes(await stream.receive_some(count - len(data)))
        assert more, f"hung up after {len(data)} of {count} bytes"
        data += more
    return data


async def to_end(stream: trio.SocketStream) -> bytes:
    """Read until the other end closes, and close."""
    data = bytearray()
    async with stream:
        while more := await stream.receive_some(65_536):
            data += more
    return bytes(data)


@contextlib.asynccontextmanager
async def open_script(
    root: Path,
    peer: str,
    *,
    direct: bool = True,
    inband: bool = True,
    answers: dict[str, Answer] | None = None,
) -> AsyncIterator[Script]:
    """Set up our end below a directory, and the peer.

    Args:
      root: Empty.
      peer: The peer's full JID.
      direct: Whether we listen for direct connections.
      inband: Whether bytes may go through the server.
      answers: What we answer at once, by the tag of the payload.
    """
    with trio.fail_after(PATIENCE):
        async with contextlib.AsyncExitStack() as stack:
            listener = None
            if direct:
                listener = await stack.enter_async_context(open_listener("127.0.0.1", 0))
            nursery = await stack.enter_async_context(trio.open_nursery())
            script = Script(root, peer, nursery, listener, inband=inband, answers=answers or {})
            nursery.start_soon(script.session.run)
            nursery.start_soon(script.run)
            try:
                yield script
            finally:
                nursery.cancel_scope.cancel()
