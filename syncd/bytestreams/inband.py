"""In-band bytestreams on trio: a socket at either end, stanzas in between.

What sends or receives a file gets an ordinary `trio.SocketStream`, one end of a socket pair,
and need not know what is behind it::

    file -> stream ==pair== Sending -> <data/> ... <data/> -> Slot ==pair== stream -> file

Nothing is promised to the peer that was not done: a block is acknowledged when its bytes are
in the socket, so a slow disk slows the sender down, and the sender reads no more from its
socket than a window of blocks. The sockets hold little, so that what the sender of a file has
got rid of is about what has arrived.

The handlers (`Inband.on_open`, `Inband.on_data`, `Inband.on_close`) do everything that depends
on the order of the stanzas when they are *called*, and wait only in what they return. Whoever
routes must therefore call them one after the other, as the stanzas come; what they return may
be awaited in any order.

More than 400 lines: the two ends are two halves of one protocol, and each is understood only
beside the other.
"""

from __future__ import annotations

import logging
import math
import socket
from collections import deque
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from syncd.bytestreams import ibb
from syncd.errors import (
    BytestreamError,
    ErrorType,
    OfflineError,
    StalledError,
    StanzaError,
    SyncdError,
    TransferError,
    TruncatedError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
    from xml.etree.ElementTree import Element

    from syncd.xmpp.jid import JID
    from syncd.xmpp.stanza import Iq, Request

log = logging.getLogger(__name__)

# How long a peer may think about an opening: a program, through two servers. On the slowest
# line, of 3 KiB/s, it waits half of this behind blocks of ours.
OPEN_TIMEOUT = 60.0  # seconds

# For how long nothing may show that the answer to a block still comes (`ibb.Line`): a disk may
# have to spin up over there.
ACK_TIMEOUT = 60.0  # seconds

# Blocks of all streams together that may be unanswered, beside one of each: some 90 KiB of
# stanzas, which hold up everything else that we say for half a minute on the slowest line, and
# fill one of 3 Mbit/s when the answers take a quarter of a second.
SHARED_WINDOW = 16  # blocks

# COMPAT(libpurple, xmppframework): never answer a close.
CLOSE_TIMEOUT = 5.0  # seconds

# How long the reader of an incoming stream may take nothing; it is a disk of our own.
TAKE_TIMEOUT = 60.0  # seconds

# Asked of the kernel, which doubles it: room for four blocks of the usual size. With its
# default, 208 KiB, a small file would be "sent" before the first block is.
SOCKET_BUFFER = 8_192  # bytes

# COMPAT(gloox): sends all blocks of a file without waiting for one answer. As far as they come
# faster than the disk takes them they wait here; an honest sender has one window out.
MAX_PENDING = 1 << 20  # bytes of one stream
# The same, however small they are: each has a task that waits for room.
MAX_BLOCKS = 512  # blocks of one stream

# What these limits bound, so that whoever routes requests need not.
BOUNDED = frozenset({ibb.DATA, ibb.CLOSE})  # tags of payloads


class Inband:
    """All in-band bytestreams of an account.

    Args:
      request: Sends an iq.
      max_block: What blocks may be sent to us, in bytes (`ibb.largest_block`).
    """

    def __init__(self, request: Request, *, max_block: Callable[[], int]) -> None:
        self._request = request
        self._max_block = max_block
        self._slots: dict[tuple[JID, str], Slot] = {}
        self._sendings: dict[tuple[JID, str], Sending] = {}
        self._line = ibb.Line()
        self._ended = ibb.Ended()

    def __repr__(self) -> str:
        return f"<Inband slots={len(self._slots)} sendings={len(self._sendings)}>"

    # --- Receiving

    @asynccontextmanager
    async def expect(self, peer: JID, sid: str, length: int) -> AsyncIterator[Slot]:
        """Let a peer open a stream, as long as the context lasts.

        A stream that is not complete at the end is closed. If it had failed, its own error
        takes the place of what the body made of the broken stream.

        Args:
          peer: Full JID; nobody else may open it or send into it.
          sid: The stream's id.
          length: How many bytes are due.

        Raises:
          ValueError: The stream is expected already; sids must be unique.
        """
        key = peer, sid
        if key in self._slots:
            raise ValueError(f"{sid} of {peer} is expected already")
        slot = self._slots[key] = Slot(length)
        try:
            async with _beside(slot.run, slot.reason):
                yield slot
        finally:
            given_up = slot.end()
            del self._slots[key]
            if slot.was_opened:
                self._ended.add(peer, sid, trio.current_time())
            if given_up:
                await _say_close(self._request, peer, sid)

    def expects(self, sender: JID | None, sid: str) -> bool:
        """Whether this full JID may open a stream under this sid now."""
        return (sender, sid) in self._slots

    def on_open(self, iq: Iq) -> Awaitable[None]:
        """Answer an opening (XEP-0047 section 2.1)."""
        sender, payload = _check(iq)
        opening = ibb.read_open(payload)
        slot = self._slots.get((sender, opening.sid))
        if slot is None:
            raise ibb.not_acceptable("no such bytestream was agreed upon")
        slot.open(opening, self._max_block())
        return _done()

    def on_data(self, iq: Iq) -> Awaitable[None]:
        """Answer a block, when its bytes are on their way to the file (section 2.2)."""
        sender, payload = _check(iq)
        return self._slot(sender, payload).receive(payload)

    def on_message(self, sender: JID, data: Element) -> None:
        """Take a block that came in a message (section 4); nobody waits for an answer.

        Raises:
          StanzaError: To be sent back: what is wrong with it.
        """
        self._slot(sender, data).receive_in_message(data)

    def _slot(self, sender: JID, data: Element) -> Slot:
        slot = self._slots.get((sender, ibb.read_sid(data)))
        if slot is None:
            raise ibb.unknown_sid()
        return slot

    def on_close(self, iq: Iq) -> Awaitable[None]:
        """Answer a close, when the bytes before it are on their way to the file (2.3)."""
        sender, payload = _check(iq)
        key = sender, ibb.read_sid(payload)
        slot, sending = self._slots.get(key), self._sendings.get(key)
        # Who sends is who closes. Only when there is nothing to close in that direction, a
        # stream of the same sid in the other one is meant.
        if slot is not None and slot.is_open:
            return slot.peer_closed()
        if sending is not None:
            sending.peer_closed()
        elif not (slot and slot.was_opened) and not self._ended.knows(
            *key, trio.current_time()
        ):
            raise ibb.unknown_sid()
        return _done()  # also for one that was closed by both at the same time, or twice

    # --- Sending

    @asynccontextmanager
    async def open(
        self,
        to: JID,
        sid: str,
        *,
        window: int = ibb.WINDOW,
        block_size: int = ibb.BLOCK_SIZE,
        timeout: float = OPEN_TIMEOUT,
        slack: float = 0.0,
    ) -> AsyncIterator[Sending]:
        """Open a stream to a peer, to send into.

        Leave the context by `Sending.finish`; without it the stream counts as broken off. If
        it had failed, its own error takes the place of what the body made of it.

        Args:
          to: Full JID.
          sid: The stream's id.
          window: How many blocks may be unanswered at a time, as far as the other streams
            leave room for them; more than one only towards a peer that is known to keep them
            in order.
          block_size: What to begin with, in bytes; halved as long as the peer wants less.
          timeout: How long the answer to the opening may take, in seconds.
          slack: How long after the opening the peer may take to begin with the blocks, in
            seconds.

        Raises:
          ValueError: There is such a stream already; sids must be unique.
          BytestreamError: The peer does not want it, or did not take all.
          OfflineError: We, or the peer, went away.
        """
        key = to, sid
        if key in self._sendings:
            raise ValueError(f"{sid} to {to} is open already")
        machine = ibb.Outgoing(sid, block_size=block_size, window=window)
        sending = self._sendings[key] = Sending(self._request, to, machine, self._line, slack)
        self._share_window()
        try:
            await sending.open(timeout)
            async with _beside(sending.run, sending.reason):
                yield sending
        finally:
            given_up = sending.end()
            del self._sendings[key]
            self._share_window()
            self._ended.add(to, sid, trio.current_time())
            if given_up:
                await _say_close(self._request, to, sid)

    def _share_window(self) -> None:
        """Give each stream the same part of the window, and each at least one block."""
        if self._sendings:
            share = max(1, SHARED_WINDOW // len(self._sendings))
            for sending in self._sendings.values():
                sending.limit(share)


class Slot:
    """A stream that is expected from a peer; made by `Inband.expect`."""

    def __init__(self, length: int) -> None:
        self._machine = ibb.Incoming(length)
        self._changed = trio.Event()
        self._error: TransferError | None = None
        self._ours: socket.socket | None = None
        self._theirs: trio.SocketStream | None = None
        self._pending = bytearray()
        self._ends: deque[int] = deque()  # of the blocks therein, as counted by `_handed_on`
        self._handed_on = 0
        self._has_reader = False
        self._peer_closed = False
        self.was_opened = False

    def __repr__(self) -> str:
        return f"<Slot {self._machine!r} pending={len(self._pending)}>"

    async def opened(self, timeout: float) -> trio.SocketStream:
        """Wait until the peer has opened the stream.

        Args:
          timeout: How long it may take, in seconds.

        Returns:
          What to read from; closed with the context at the latest. It ends where the stream
          does, however that came; whoever knows the length sees whether it was too early.

        Raises:
          BytestreamError: The peer has not opened it.
        """
        with trio.move_on_after(timeout):
            while self._theirs is None:
                await self._changed.wait()
        if self._theirs is None:
            raise BytestreamError(f"the peer opened no in-band bytestream for {timeout:g} s")
        self._has_reader = True
        self._notify()
        return self._theirs

    def shorten(self, length: int) -> None:
        """Let less be due than when the stream was expected, in bytes since its beginning."""
        self._machine.length = min(length, self._machine.length)

    # --- For `Inband`, in the order of the stanzas

    @property
    def is_open(self) -> bool:
        """Whether the peer has opened the stream, and not closed it yet."""
        return self.was_opened and not self._peer_closed

    def open(self, opening: ibb.Opening, max_block: int) -> None:
        """Take an opening; raises `StanzaError` to refuse."""
        try:
            ours, theirs = _pair()
        except OSError as error:
            log.warning("cannot take an in-band bytestream: %s", error.strerror)
            raise StanzaError(ErrorType.WAIT, "internal-server-error") from error
        try:
            self._machine.open(opening, max_block, trio.current_time())
        except StanzaError:
            ours.close()
            theirs.close()
            raise
        self._ours = ours
        self._theirs = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        self.was_opened = True
        self._notify()

    def receive(self, data: Element) -> Coroutine[None, None, None]:
        """Take a block; what is returned waits until the reader has room for it."""
        if self._is_full:
            # Not counted, so that it may be sent again.
            raise StanzaError(ErrorType.WAIT, "resource-constraint", "not so fast")
        taken = self._machine.receive(data, trio.current_time())
        count = self._take(taken)
        return self._handed(count, self._machine.refusal)

    def receive_in_message(self, data: Element) -> None:
        """Take a block that nobody waits for."""
        if self._is_full:
            # Here nobody is told in time, so that the next block would leave a gap.
            self._break(BytestreamError("the peer sends faster than the disk takes it"))
        taken = self._machine.receive(data, trio.current_time(), in_message=True)
        self._take(taken)
        if self._machine.refusal is not None:
            raise self._machine.refusal

    @property
    def _is_full(self) -> bool:
        return len(self._pending) > MAX_PENDING or len(self._ends) >= MAX_BLOCKS

    def peer_closed(self) -> Coroutine[None, None, None]:
        """Take a close; what is returned waits until the reader has room for all."""
        self._peer_closed = True
        self._machine.closed()
        self._notify()
        return self._flushed(self._handed_on + len(self._pending))

    # --- Inside

    def _take(self, data: bytes) -> int:
        """Begin to hand on; returns when it is done: at this count of bytes."""
        self._pending += data
        # Mostly there is room at once, and no other task needed.
        self._write()
        refusal = self._machine.refusal
        if refusal is not None and self._error is None:
            self._error = BytestreamError(
                f"the in-band bytestream failed: {refusal.text} [{refusal.condition}]"
            )
        if self._pending or refusal is not None:
            self._notify()
        end = self._handed_on + len(self._pending)
        if self._pending:
            self._ends.append(end)
        return end

    async def _handed(self, count: int, refusal: StanzaError | None) -> None:
        if refusal is not None:
            raise refusal
        await self._flushed(count)

    async def _flushed(self, count: int) -> None:
        while self._handed_on < count:
            if self._ours is None:
                raise ibb.unknown_sid()
            await self._changed.wait()

    async def run(self) -> None:
        """Hand on what the reader had no room for, and watch the clock."""
        while True:
            changed = self._changed
            if self._ours is None:
                await changed.wait()
            elif self._pending and not self._has_reader:
                # Who receives may have to prove first what it has; the peer knows that.
                await changed.wait()
            elif self._pending:
                await self._write_later(self._ours)
            elif self._machine.state is ibb.State.ENDED:
                self._close_socket()  # all is handed on: the reader may see the end
            elif self._machine.give_up_at <= trio.current_time():
                idle = ibb.IDLE_TIMEOUT
                self._break(StalledError(f"the peer has sent nothing for {idle:g} seconds"))
            else:
                with trio.move_on_at(self._machine.give_up_at):
                    await changed.wait()

    async def _write_later(self, ours: socket.socket) -> None:
        with trio.move_on_after(TAKE_TIMEOUT) as waiting, suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_writable(ours)
        if waiting.cancelled_caught:
            self._break(StalledError(f"no byte was taken for {TAKE_TIMEOUT:g} seconds"))
        else:
            self._write()
            self._machine.handed_on(trio.current_time())
            self._notify()

    def _write(self) -> None:
        try:
            while self._pending and self._ours is not None:
                count = self._ours.send(self._pending)
                del self._pending[:count]
                self._handed_on += count
                while self._ends and self._ends[0] <= self._handed_on:
                    self._ends.popleft()
        except BlockingIOError:
            pass
        except OSError:
            # The reader has gone; its own error, if it is one, says more.
            self._break(BytestreamError("the in-band bytestream was broken off here"))

    def _break(self, error: TransferError) -> None:
        """Give the stream up, with what is on its way in it."""
        self._error = self._error or error
        self._machine.fail(ibb.unknown_sid())
        self._pending.clear()
        self._ends.clear()
        self._close_socket()
        self._notify()

    def _close_socket(self) -> None:
        if self._ours is not None:
            trio.lowlevel.notify_closing(self._ours)
            self._ours.close()
            self._ours = None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def reason(self) -> TransferError | None:
        """Why the stream failed, if it did."""
        return self._error

    def end(self) -> bool:
        """Let go of everything; returns whether the peer must be told that it is over."""
        given_up = self.is_open and not self._machine.complete
        self._machine.closed()
        self._pending.clear()
        self._ends.clear()
        self._close_socket()
        if self._theirs is not None:
            self._theirs.socket.close()
        self._notify()
        return given_up


class Sending:
    """A stream to a peer; made by `Inband.open`.

    Attributes:
      stream: Where to send the bytes. Breaks as soon as the stream does.
    """

    stream: trio.SocketStream

    def __init__(
        self, request: Request, to: JID, machine: ibb.Outgoing, line: ibb.Line, slack: float
    ) -> None:
        self._request = request
        self._to = to
        self._machine = machine
        self._line = line
        self._slack = slack
        self._patient_until = 0.0
        self._most = machine.window
        self._flights: deque[ibb.Flight] = deque()  # in the order of their blocks
        self._changed = trio.Event()
        self._error: SyncdError | None = None
        self._running = trio.CancelScope()
        self._source: trio.SocketStream | None = None
        self._maybe_open = False
        self._finished = False

    def __repr__(self) -> str:
        return f"<Sending {self._machine!r} to {self._to}>"

    @property
    def block_size(self) -> int:
        """What the peer has agreed to, in bytes; see `ibb.blocks_needed`."""
        return self._machine.block_size

    async def finish(self) -> bool:
        """Close `stream`, wait until all of it has arrived, and close the bytestream.

        Returns:
          Whether the peer has shown that it has everything. False if the last block was not
          answered, and neither was the close: then it probably has.

        Raises:
          BytestreamError: It has not.
          OfflineError: We, or the peer, went away.
        """
        self.stream.socket.close()
        machine = self._machine
        await self._until(lambda: machine.state is ibb.State.ENDED)
        await self._until(lambda: machine.settled)
        confirmed = machine.acknowledged or machine.closed_by_peer
        if not machine.closed_by_peer:
            answered = await _say_close(self._request, self._to, machine.sid)
            confirmed = confirmed or answered or machine.acknowledged
        if self._error is not None:
            raise self._error
        self._finished = True
        return confirmed

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds, or for the last answer no longer."""
        while not condition() and trio.current_time() < self._give_up_at:
            if self._error is not None:
                raise self._error
            with trio.move_on_at(self._give_up_at):
                await self._changed.wait()

    @property
    def _give_up_at(self) -> float:
        # As long as the block is in our own stream, behind those of others, its peer has
        # nothing to answer.
        moving = max((each.alive_at for each in self._flights), default=-math.inf)
        return max(self._machine.give_up_at, moving + ibb.LAST_ACK_TIMEOUT)

    # --- For `Inband`

    async def open(self, timeout: float) -> None:
        """Ask the peer to open the stream, with smaller blocks if it wants that."""
        machine = self._machine
        opened = False
        while not opened:
            opening = ibb.make_open(machine.sid, machine.block_size)
            self._maybe_open = True  # stays, when we are cancelled meanwhile
            try:
                await self._request("set", self._to, opening, timeout)
                opened = True
            except StanzaError as error:
                self._maybe_open = False
                machine.open_refused(error)
            except OfflineError:
                self._maybe_open = False
                raise
        machine.opened()
        self._patient_until = trio.current_time() + self._slack
        try:
            ours, theirs = _pair()
        except OSError as error:
            raise BytestreamError(
                f"no in-band bytestream can be had: {error.strerror}",
                hint="if too many files are open, raise the limit (LimitNOFILE=)",
            ) from error
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self._source = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))

    def limit(self, window: int) -> None:
        """Have at most so many blocks unanswered from now on."""
        self._machine.window = min(window, self._most)
        self._notify()

    def peer_closed(self) -> None:
        """Take a close."""
        try:
            self._machine.peer_closed()
        except BytestreamError as error:
            self._fail(error)
        self._notify()

    async def run(self) -> None:
        """Make blocks of what comes out of the socket, until it ends or the stream breaks."""
        assert self._source is not None
        try:
            async with trio.open_nursery() as watching:
                watching.start_soon(self._watch)
                async with trio.open_nursery() as blocks:
                    with self._running:
                        await self._send_blocks(self._source, blocks)
                    if self._error is not None:
                        blocks.cancel_scope.cancel()
                watching.cancel_scope.cancel()
        finally:
            self._source.socket.close()
            for flight in self._flights:
                self._line.lost(flight)

    async def _send_blocks(self, source: trio.SocketStream, blocks: trio.Nursery) -> None:
        machine = self._machine
        # Read first, then wait: that the last block is the last shows only behind it, and its
        # answer may never come.
        while data := await _read_block(source, machine.block_size):
            while not machine.may_send:
                await self._changed.wait()
            try:
                number, block = machine.next_block(data, trio.current_time())
            except BytestreamError as error:
                self._fail(error)
                break
            blocks.start_soon(self._deliver, number, block, self._launched())
            # Tasks of one round of the scheduler run in any order; with this the block is in
            # the queue to the server before the next one is made.
            await trio.lowlevel.checkpoint()
        machine.end(trio.current_time())
        self._notify()

    async def _deliver(self, number: int, block: Element, flight: ibb.Flight) -> None:
        delivered = False
        while not delivered and self._error is None:
            try:
                # For how long is watched elsewhere: it depends on what else is on its way.
                await self._request("set", self._to, block, math.inf)
                delivered = True
            except StanzaError as error:
                self._landed(flight)
                try:
                    delay = self._machine.block_refused(number, error)
                except BytestreamError as failure:
                    self._fail(failure)
                else:
                    await trio.sleep(delay)
                    flight = self._launched()
            except OfflineError as error:
                self._fail(error)
        if delivered:
            self._landed(flight)
            self._machine.acked(number, trio.current_time())
            self._notify()

    def _launched(self) -> ibb.Flight:
        flight = self._line.send(self._to, trio.current_time())
        self._flights.append(flight)
        return flight

    def _landed(self, flight: ibb.Flight) -> None:
        self._flights.remove(flight)
        self._line.answered(flight, trio.current_time())

    async def _watch(self) -> None:
        """Give the stream up when nothing shows any more that an answer still comes."""
        while self._error is None:
            # The oldest block's comes first. What is sent later never is due earlier.
            waiting = self._flights[0].alive_at if self._flights else trio.current_time()
            deadline = max(waiting, self._patient_until) + ACK_TIMEOUT
            if deadline <= trio.current_time():
                self._fail(OfflineError(f"{self._to} gave no answer for {ACK_TIMEOUT:.0f} s"))
            await trio.sleep_until(deadline)

    def _fail(self, error: SyncdError) -> None:
        self._error = self._error or error
        self._running.cancel()  # closes the socket, so that whoever fills it notices as well
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def reason(self) -> SyncdError | None:
        """Why the stream failed, if it did."""
        return self._error

    def end(self) -> bool:
        """Let go of everything; returns whether the peer must be told that it is over."""
        if self._source is not None:
            self._source.socket.close()
            self.stream.socket.close()
        # A peer that is just being asked may open it yet, and would wait for bytes.
        return self._maybe_open and not self._finished and not self._machine.closed_by_peer


@asynccontextmanager
async def _beside(
    task: Callable[[], Awaitable[None]], reason: Callable[[], SyncdError | None]
) -> AsyncIterator[None]:
    """Run a task beside the body of the context, and let the body's errors out bare.

    Args:
      task: Cancelled at the end of the body.
      reason: Why the stream broke, if it did: what the body says of the broken stream is
        only its consequence.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        try:
            yield
        except Exception as error:
            failure = error  # raised inside the nursery it would become a group
        nursery.cancel_scope.cancel()
    if failure is None:
        return
    cause = reason()
    broken = isinstance(failure, StalledError | TruncatedError | trio.BrokenResourceError)
    if broken and cause is not None and cause is not failure:
        raise cause from failure
    raise failure


async def _read_block(source: trio.SocketStream, block_size: int) -> bytes:
    """Read a whole block; only the last may be smaller."""
    block = b""
    with suppress(trio.BrokenResourceError):  # reset: who writes has gone, as at an end
        while len(block) < block_size:
            data = await source.receive_some(block_size - len(block))
            if not data:
                break
            block += data
    return block


async def _say_close(request: Request, to: JID, sid: str) -> bool:
    """Tell the peer that a stream is over; returns whether it has heard.

    Shielded, because a peer that is not told waits for more: with its time limit, this is no
    longer than a goodbye may take.
    """
    with trio.CancelScope(shield=True):
        try:
            await request("set", to, ibb.make_close(sid), CLOSE_TIMEOUT)
        except (StanzaError, OfflineError) as error:
            # XEP-0047 section 2.3: closed in either case. COMPAT(libpurple): never answers,
            # and has closed it already when it has all.
            log.debug("close of %s at %s: %s", sid, to, error)
            return False
    return True


def _pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    for end in (one, other):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    return one, other


def _check(iq: Iq) -> tuple[JID, Element]:
    """The sender and the payload of a request that may be one of ours."""
    if iq.type != "set":
        raise StanzaError(ErrorType.MODIFY, "bad-request", "this is asked by set")
    if iq.sender is None or not iq.sender.resource:
        raise StanzaError(ErrorType.AUTH, "forbidden")
    assert iq.payload is not None
    return iq.sender, iq.payload


async def _done() -> None:
    """Nothing is left to wait for."""
    await trio.lowlevel.checkpoint()
