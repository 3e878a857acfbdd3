"""Two of our ends back to back in one process, and between them what a network does to them.

::

    Sender ── Relay ══ SOCKS5 over loopback TCP ══ Receiver
       └───── Server: iqs as bytes, with faults ──────┘

The ends are the real ones, with real files below a temporary directory. `Server` carries each
iq as bytes through the writer and the parser of XML, and does with a request what a test asked
for: refuse it, hold it, deliver it twice, or let the stream break at the worst moment. `Relay`
stands between the listener and whoever connects to it, and cuts, holds, or forges the bytes.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import socket
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

import pytest
import trio
import trio.testing

from syncd.bytestreams import ibb, s5b
from syncd.bytestreams.inband import Inband
from syncd.bytestreams.outgoing import Requester
from syncd.bytestreams.proxies import Proxies
from syncd.bytestreams.sockets import Listener, open_listener
from syncd.disk import partial
from syncd.errors import DeclinedError, OfflineError, StanzaError, TransferError
from syncd.transfer import si
from syncd.transfer.incoming import Arriving, Inbox, Incoming, Known, Present
from syncd.transfer.receiver import Receiver
from syncd.transfer.sealing import Seals
from syncd.transfer.sender import Sender, Sent, Source, Target
from syncd.trust.pins import Pin, Policy
from syncd.trust.signing import Identity
from syncd.wiring.allowances import Allowances
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import Iq, make_error_reply, make_iq, read_error, read_iq
from syncd.xmpp.xml import NS_CLIENT, NS_STREAMS, StreamParser, serialise

if TYPE_CHECKING:
    from syncd.transfer.pump import Progress
    from syncd.xmpp.stanza import IqType

Handler = Callable[[Iq], Awaitable[Element | None]]

ALICE = JID.parse("alice@example.org/laptop")
BOB = JID.parse("bob@example.org/desk")
MALLORY = JID.parse("mallory@example.org/cellar")

FOLDER = "photos"

LONG_AGO = 1_234_567_890_123_456_789  # nanoseconds since 1970

# A lost wake-up shall end its test, not the run.
PATIENCE = 30.0  # seconds

# Small enough that a sender cannot put a whole test file into the kernel at once.
_RELAY_BUFFER = 65_536  # bytes


class Fault(enum.Enum):
    """What becomes of one request."""

    LOSE_REQUEST = enum.auto()  # the stream breaks before it gets there
    LOSE_ANSWER = enum.auto()  # it is handled, then the stream breaks
    BREAK_MEANWHILE = enum.auto()  # the stream breaks once the handler waits for something
    TWICE = enum.auto()  # it gets there twice; the requester sees the first answer


@dataclass(slots=True)
class Exchange:
    """One request that got to a handler.

    Attributes:
      tag: Of the payload.
      payload: As it was delivered.
      answers: Stanzas that came back; exactly one unless the stream broke meanwhile.
      broken: The stream broke while the handler was running.
    """

    tag: str
    payload: Element
    answers: list[Element] = field(default_factory=list)
    broken: bool = False


class Server:
    """Carries iqs between ends, one stream for all of them.

    Args:
      nursery: Handlers run there, as they do in a session: not in the requester's task.

    Attributes:
      exchanges: Everything that got to a handler, in order.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._handlers: dict[JID, Mapping[str, Handler]] = {}
        self._faults: defaultdict[str, deque[Fault | StanzaError | trio.Event]] = defaultdict(
            deque
        )
        self._changes: dict[str, Callable[[Element], None]] = {}
        self._waiters: set[_Waiter] = set()
        self._running: set[trio.CancelScope] = set()
        self._ended = trio.Event()
        self._online = trio.Event()
        self._online.set()
        self._asked: defaultdict[str, trio.Event] = defaultdict(trio.Event)
        self.exchanges: list[Exchange] = []

    def attach(self, jid: JID, handlers: Mapping[str, Handler]) -> None:
        """Let a resource answer requests from now on."""
        self._handlers[jid] = handlers

    def detach(self, jid: JID) -> None:
        """Let a resource go offline."""
        del self._handlers[jid]

    def inject(self, tag: str, *faults: Fault | StanzaError | trio.Event) -> None:
        """Decide over the next requests with this payload; an event holds one until set."""
        self._faults[tag].extend(faults)

    def change(self, tag: str, changing: Callable[[Element], None]) -> None:
        """Change every request with this payload on its way, as a hostile server may."""
        self._changes[tag] = changing

    def tags(self) -> list[str]:
        """The payloads that got to a handler, in order."""
        return [exchange.tag for exchange in self.exchanges]

    async def asked(self, tag: str) -> None:
        """Wait until a request with this payload is on its way."""
        await self._asked[tag].wait()

    def break_stream(self, *, come_back: bool = True) -> None:
        """End the stream: requests fail, handlers are cancelled."""
        if not come_back:
            self._online = trio.Event()
        for waiter in self._waiters:
            waiter.finish(OfflineError("the stream to the server ended"))
        for scope in self._running:
            scope.cancel()

    async def idle(self) -> None:
        """Wait until no handler runs any more, not even one that the disk keeps."""
        await trio.testing.wait_all_tasks_blocked()
        while self._running:
            await self._ended.wait()

    def come_back(self) -> None:
        """End an outage."""
        self._online.set()

    async def wait_online(self) -> None:
        """Return as soon as there is a stream."""
        await self._online.wait()

    async def request(
        self, sender: JID, kind: IqType, to: JID | None, payload: Element, timeout: float
    ) -> Iq:
        """Ask like `Client.request`, for a given sender."""
        if not self._online.is_set():
            raise OfflineError("not connected to the server")
        assert to is not None
        waiter = _Waiter()
        self._waiters.add(waiter)
        element = carried(make_iq(kind, f"id{id(waiter)}", to, payload))
        element.set("from", str(sender))
        if changing := self._changes.get(payload.tag):
            changing(element[0])
        self._deliver(read_iq(element), to, waiter)
        try:
            with trio.move_on_after(timeout):
                return await waiter.finished()
        finally:
            self._waiters.discard(waiter)
        raise OfflineError(f"{to} gave no answer for {timeout:.0f} s")

    def _deliver(self, iq: Iq, to: JID, waiter: _Waiter) -> None:
        """Let a request arrive, in the order in which they were sent."""
        assert iq.payload is not None
        tag = iq.payload.tag
        fault = self._faults[tag].popleft() if self._faults[tag] else None
        self._asked[tag].set()
        match fault:
            case StanzaError():
                waiter.finish(read_iq(carried(make_error_reply(iq.element, fault))))
                return
            case Fault.LOSE_REQUEST:
                self.break_stream()
                return
            case Fault.TWICE:
                self._nursery.start_soon(self._answer, waiter, self._called(iq, to))
            case Fault.BREAK_MEANWHILE:
                self._nursery.start_soon(self._break_meanwhile)
            case _:
                pass
        if isinstance(fault, trio.Event):
            self._nursery.start_soon(self._hold, fault, iq, to, waiter)
            return
        losing = fault is Fault.LOSE_ANSWER
        self._nursery.start_soon(self._answer, waiter, self._called(iq, to), losing)

    async def _hold(self, until: trio.Event, iq: Iq, to: JID, waiter: _Waiter) -> None:
        await until.wait()
        await self._answer(waiter, self._called(iq, to))

    async def _answer(
        self, waiter: _Waiter, handling: Awaitable[Element | None], losing: bool = False
    ) -> None:
        reply = await handling
        if losing:
            self.break_stream()
        elif reply is not None:
            waiter.finish(read_iq(reply))

    async def _break_meanwhile(self) -> None:
        await trio.testing.wait_all_tasks_blocked(0.02)
        self.break_stream()

    def _called(self, iq: Iq, to: JID) -> Awaitable[Element | None]:
        """Call the handler at once, as a session does, and wait for it later."""
        assert iq.payload is not None
        handler = self._handlers.get(to, {}).get(iq.payload.tag, _nobody)
        exchange = Exchange(iq.payload.tag, iq.payload)
        self.exchanges.append(exchange)
        try:
            answering: Awaitable[Element | None] | StanzaError = handler(iq)
        except StanzaError as error:
            answering = error
        return self._handle(iq, exchange, answering)

    async def _handle(
        self, iq: Iq, exchange: Exchange, answering: Awaitable[Element | None] | StanzaError
    ) -> Element | None:
        with trio.CancelScope() as scope:
            self._running.add(scope)
            try:
                if isinstance(answering, StanzaError):
                    raise answering
                payload = await answering
                children = [] if payload is None else [payload]
                reply = make_iq("result", iq.id, iq.sender, *children)
            except StanzaError as error:
                reply = make_error_reply(iq.element, error)
            finally:
                self._running.discard(scope)
                self._ended.set()
                self._ended = trio.Event()
            exchange.answers.append(carried(reply))
            return exchange.answers[-1]
        exchange.broken = True
        return None


class _Waiter:
    """One pending request."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._outcome: Iq | OfflineError | None = None

    def finish(self, outcome: Iq | OfflineError) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._event.set()

    async def finished(self) -> Iq:
        await self._event.wait()
        assert self._outcome is not None
        if isinstance(self._outcome, OfflineError):
            raise self._outcome
        if self._outcome.type == "error":
            raise read_error(self._outcome.element)
        return self._outcome


async def _nothing(_: Arriving) -> None:
    pass


async def _nobody(iq: Iq) -> None:
    raise StanzaError(read_error(iq.element).type, "service-unavailable")


def carried(element: Element) -> Element:
    """What is left of an element after its way over a stream."""
    parser = StreamParser()
    parser.feed(f"<s:stream xmlns='{NS_CLIENT}' xmlns:s='{NS_STREAMS}'>".encode())
    [event] = parser.feed(serialise(element))
    assert isinstance(event, Element)
    return event


class Relay:
    """Stands between a listener and its peers; what comes from the listener can be treated.

    Attributes:
      port: Where it listens, on the loopback.
      reached: Set when `hold_at` bytes of the file have passed.
      passed: Bytes of the file that were passed on, over all connections.
    """

    # What socks5 says before the file: the method, and the reply with the address.
    GREETING = 2 + 5 + 40 + 2  # bytes

    def __init__(self, listener: Listener) -> None:
        self._to = listener
        self._cut_at: int | None = None
        self._hold_at: int | None = None
        self._flip_at: int | None = None
        self._surplus = b""
        self._copy: bytearray | None = None
        self.port = 0
        self.passed = 0
        self.reached = trio.Event()
        self.resume = trio.Event()

    def cut_at(self, count: int | None) -> None:
        """Close both sides once so many bytes of a file have passed."""
        self._cut_at = count

    def hold_at(self, count: int | None) -> None:
        """Stand still once so many bytes of a file have passed, until `resume` is set."""
        self._hold_at = count
        self.reached, self.resume = trio.Event(), trio.Event()

    def flip_at(self, position: int) -> None:
        """Forge one byte of a file."""
        self._flip_at = position

    def add(self, surplus: bytes) -> None:
        """Let more bytes follow than were sent."""
        self._surplus = surplus

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Relay until cancelled."""
        [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listening.socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._carry, [listening])
            task_status.started()
            await trio.sleep_forever()

    async def _carry(self, target: trio.SocketStream) -> None:
        upstream = trio.socket.socket()
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RELAY_BUFFER)
        await upstream.connect(("127.0.0.1", self._to.port))
        requester = trio.SocketStream(upstream)
        async with target, requester, trio.open_nursery() as nursery:
            nursery.start_soon(self._back, target, requester)
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._forth(requester, target)
            nursery.cancel_scope.cancel()

    async def _back(self, target: trio.SocketStream, requester: trio.SocketStream) -> None:
        try:
            async for data in target:
                await requester.send_all(data)
            await requester.send_eof()
        except trio.BrokenResourceError:
            # Passed on, or the requester would wait for the rest of a handshake.
            await trio.aclose_forcefully(requester)

    async def _forth(self, requester: trio.SocketStream, target: trio.SocketStream) -> None:
        position = -self.GREETING
        while data := await requester.receive_some(_RELAY_BUFFER):
            stops = [stop for stop in (self._cut_at, self._hold_at) if stop is not None]
            for part in _parts(data, [stop - position for stop in stops]):
                await target.send_all(self._forged(part, position))
                if self._copy is not None and position >= 0:
                    self._copy += part
                position += len(part)
                self.passed += max(0, min(len(part), position))
                if position == self._cut_at:
                    return
                if position == self._hold_at:
                    self.reached.set()
                    await self.resume.wait()
        await target.send_all(self._surplus)

    def listen_in(self) -> bytearray:
        """Keep a copy of what passes from now on, without the greeting."""
        self._copy = bytearray()
        return self._copy

    def _forged(self, data: bytes, position: int) -> bytes:
        if self._flip_at is None or not position <= self._flip_at < position + len(data):
            return data
        forged = bytearray(data)
        forged[self._flip_at - position] ^= 0xFF
        return bytes(forged)


def _parts(data: bytes, stops: list[int]) -> Iterator[bytes]:
    edges = [0, *sorted({stop for stop in stops if 0 < stop < len(data)}), len(data)]
    for start, end in itertools.pairwise(edges):
        yield data[start:end]


class Peers:
    """Alice, who sends from a folder, and Bob, who receives into one and into an inbox.

    Attributes:
      server: Between them.
      relay: Between Alice's listener and everybody.
      listener: Alice's.
      sender: Alice's.
      receiver: Bob's.
      source: Alice's folder on disk.
      folder: Bob's, id `FOLDER`.
      inbox: Bob's, for plain clients.
      journal: What Bob knows of files that came, under folder id and path.
      held: Which versions in Bob's folder his journal knows Alice to have had, by path.
      arrived: Everything that Bob's journal was told, in order.
      incoming: Every transfer that Bob accepted, in order.
      sending: The progress of every transfer that Alice began, in order.
      online: What both ends know of themselves.
      there: Whose presence Bob sees.
      allowances: What Bob lets others send.
      pins: What each end has stored of the other's keys, by whose and about whom.
      seals: What each end decides by; empty if nothing is sealed.
      portable: Whether Bob takes only names that every system can hold and tell apart.
      hidden: Whether Bob takes names that begin with a dot.
      on_arriving: Run when Bob's journal is told of a file, right before it gets its name.
    """

    def __init__(
        self,
        root: Path,
        nursery: trio.Nursery,
        handling: trio.Nursery,
        listener: Listener,
        *,
        sealed: bool,
    ) -> None:
        self.source, self.folder, self.inbox = root / "source", root / "folder", root / "inbox"
        for path in (self.source, self.folder, self.inbox):
            path.mkdir()
        self._nursery = nursery
        self._receiving = trio.CancelScope()
        self.server = Server(handling)
        self.listener = listener
        self.relay = Relay(listener)
        self.journal: dict[tuple[str, str], Known] = {}
        self.held: dict[str, partial.Identity] = {}
        self.arrived: list[Arriving] = []
        self.incoming: list[Incoming] = []
        self.sending: list[Progress] = []
        self.online = True
        self.there: set[JID] = set()
        self.portable = False
        self.hidden = True
        self.allowances = Allowances(trio.current_time, {})
        self.on_arriving: Callable[[Arriving], Awaitable[None]] = _nothing
        self.pins: dict[tuple[JID, JID], Pin] = {}
        self.seals: dict[JID, Seals] = {}
        for jid in (ALICE.bare, BOB.bare) if sealed else ():
            self.seals[jid] = self.make_seals(jid)
        self.sender = self.make_sender(listener)
        self.receiver = self._start_receiver()

    def make_seals(
        self, own: JID, identity: Identity | None = None, policy: Policy = Policy.PREFERRED
    ) -> Seals:
        """What one end seals by, with a new key unless one is given."""

        async def read(peer: JID) -> Pin | None:
            await trio.lowlevel.checkpoint()
            return self.pins.get((own, peer))

        async def write(peer: JID, old: Pin | None, new: Pin) -> bool:
            await trio.lowlevel.checkpoint()
            if self.pins.get((own, peer)) != old:
                return False
            self.pins[own, peer] = new
            return True

        return Seals(identity or Identity.generate(), policy, read_pin=read, write_pin=write)

    def make_sender(self, listener: Listener | None, *, inband: bool = True) -> Sender:
        """Make a sending end at Alice's.

        Args:
          listener: For direct connections; None if there are none.
          inband: Whether it may go through the server.
        """

        async def request(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
            return await self.server.request(ALICE, kind, to, payload, timeout)

        requester = Requester(
            request=request,
            own_jid=lambda: ALICE if self.online else None,
            listener=listener,
            advertised=lambda: [("127.0.0.1", self.relay.port)],
            proxies=Proxies((), ALICE.domain),
        )
        return Sender(
            request=request,
            wait_online=self.server.wait_online,
            requester=requester,
            inband=Inband(request, max_block=lambda: ibb.MAX_BLOCK) if inband else None,
            watch=self._watch_outgoing,
            own_jid=lambda: ALICE if self.online else None,
            seals=self.seals.get(ALICE.bare),
        )

    async def restart_receiver(self) -> None:
        """Let Bob's daemon die and start anew; only his disk and journal stay."""
        await self.stop_receiver()
        self.receiver = self._start_receiver()

    async def stop_receiver(self) -> None:
        """Let Bob's transfers end as they do when his daemon stops."""
        self._receiving.cancel()
        await self._stopped.wait()

    def _start_receiver(self) -> Receiver:
        async def request(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
            return await self.server.request(BOB, kind, to, payload, timeout)

        inband = Inband(request, max_block=lambda: ibb.MAX_BLOCK)
        receiver = Receiver(
            own_jid=lambda: BOB if self.online else None,
            inbox_for=self._inbox_for,
            known=self._known,
            arriving=self._arriving,
            watch=self._watch_incoming,
            inband=inband,
            seals=self.seals.get(BOB.bare),
            allowance=lambda peer: self.allowances.of(peer),
            beside=self._beside,
            held=self._held,
            is_there=lambda jid: jid in self.there,
        )
        self.server.attach(
            BOB,
            {
                si.SI: receiver.on_offer,
                s5b.TAG: receiver.on_bytestream,
                si.FINISH: receiver.on_finish,
                ibb.OPEN: inband.on_open,
                ibb.DATA: inband.on_data,
                ibb.CLOSE: inband.on_close,
            },
        )
        self._receiving, self._stopped = trio.CancelScope(), trio.Event()
        self._nursery.start_soon(self._run, receiver, self._receiving, self._stopped)
        return receiver

    async def _run(
        self, receiver: Receiver, scope: trio.CancelScope, stopped: trio.Event
    ) -> None:
        with scope:
            await receiver.run()
        stopped.set()

    def _inbox_for(self, sender: JID, folder: str) -> Inbox:
        if sender == ALICE.bare and folder in ("", FOLDER):
            root = self.folder if folder else self.inbox
            return Inbox(root=root, folder=folder, portable=self.portable, hidden=self.hidden)
        raise DeclinedError("not accepted from you here")

    async def _known(self, inbox: Inbox, path: str) -> Known | None:
        await trio.lowlevel.checkpoint()
        return self.journal.get((inbox.folder, path))

    async def _beside(self, inbox: Inbox, path: str) -> list[Present]:
        await trio.lowlevel.checkpoint()
        told = {each.path: each for each in self.arrived if each.inbox == inbox}
        return [
            Present(path=each.path, known=each.known)
            for each in told.values()
            if each.source_path == path
        ]

    async def _held(self, inbox: Inbox, path: str, sender: JID) -> partial.Identity | None:
        await trio.lowlevel.checkpoint()
        return self.held.get(path) if inbox.folder and sender == ALICE.bare else None

    async def _arriving(self, arriving: Arriving) -> None:
        await trio.lowlevel.checkpoint()
        self.arrived.append(arriving)
        await self.on_arriving(arriving)
        self.journal[arriving.inbox.folder, arriving.path] = arriving.known

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

    def write(self, path: str, data: bytes) -> Source:
        """Put a file into Alice's folder."""
        file = self.source / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        # The clock of the kernel ticks in milliseconds: a change right now would not show.
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
        return self.found(path)

    def found(self, path: str) -> Source:
        """What Alice's folder has under a path now."""
        version = partial.Identity.of((self.source / path).stat())
        return Source(root=self.source, folder=FOLDER, path=path, version=version)

    async def send(self, source: Source, *, is_syncd: bool = True) -> Sent:
        """Send a file from Alice to Bob."""
        target = Target(jid=BOB, is_syncd=is_syncd, can_seal=is_syncd and bool(self.seals))
        return await self.sender.send(source, target)

    async def send_until_cut(self, source: Source, count: int) -> None:
        """Send a file from Alice to Bob, and have it cut behind so many bytes.

        So will be the next, until the relay is told otherwise.
        """
        self.relay.cut_at(count)
        with pytest.raises(TransferError):
            await self.send(source)
        await self.settled()

    async def settled(self) -> None:
        """Wait until every transfer that Bob accepted has ended."""
        for incoming in self.incoming:
            await incoming.ended.wait()

    async def ask(self, payload: Element, *, sender: JID = ALICE, kind: IqType = "set") -> Iq:
        """Ask Bob for something by hand."""
        return await self.server.request(sender, kind, BOB, payload, PATIENCE)

    def partials(self) -> list[Path]:
        """Partial files at Bob's, without what is noted about them."""
        return sorted(
            path for root in (self.folder, self.inbox) for path in root.glob(".syncd/*.part")
        )

    def leftovers(self) -> list[Path]:
        """Everything in Bob's private directories."""
        return sorted(
            path for root in (self.folder, self.inbox) for path in root.glob(".syncd/*")
        )

    def received(self) -> dict[str, bytes]:
        """Files at Bob's, without partial ones: content by path, inbox and folder alike."""
        return {
            str(path.relative_to(root)): path.read_bytes()
            for root in (self.folder, self.inbox)
            for path in sorted(root.rglob("*"))
            if path.is_file() and ".syncd" not in path.parts
        }


@contextlib.asynccontextmanager
async def open_peers(root: Path, *, sealed: bool = False) -> AsyncIterator[Peers]:
    """Set up both ends below a directory; the bytes between them are sealed, or plain.

    At the end every request must have had exactly one answer, unless its stream broke.
    """
    with trio.fail_after(PATIENCE):
        async with open_listener("127.0.0.1", 0) as listener, trio.open_nursery() as nursery:
            async with trio.open_nursery() as handling:
                peers = Peers(root, nursery, handling, listener, sealed=sealed)
                await nursery.start(peers.relay.serve)
                yield peers
                await peers.stop_receiver()
            counts = [
                (each.tag, len(each.answers))
                for each in peers.server.exchanges
                if not each.broken
            ]
            assert counts == [(tag, 1) for tag, _ in counts]
            nursery.cancel_scope.cancel()


def snapshot(root: Path) -> dict[str, bytes | str | None]:
    """Everything below a directory: content of files, targets of links, None for the rest."""
    found: dict[str, bytes | str | None] = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory, name)
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
            found[str(path)] = str(path.readlink()) if path.is_symlink() else content
    return found


def open_files() -> list[str]:
    """What the descriptors of this process lead to."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.append(str(path.readlink()))
    return sorted(found)
