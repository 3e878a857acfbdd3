"""SOCKS5 bytestreams on trio: the daemon's one listener, and the way to a streamhost.

The requester holds a `Slot` open while it negotiates, and takes its winner; the target goes
through the streamhosts one after the other (`connect_first`)::

    async with open_listener(None, 0) as listener:
        with listener.expect(s5b.dstaddr(sid, us, peer)) as slot:
            ...  # send the <query/>, wait for <streamhost-used/>
            stream = await slot.winner()

A stranger who finds the port learns nothing and costs little: without an address that is
expected right now he is refused, and how many may be undecided, and for how long, is bounded.
The address is a hash over a random sid, so whoever knows it has read our stanzas; a lookup by
it in a dict (whose hashing is keyed) tells nothing by its timing.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import trio

from syncd.bytestreams import socks5
from syncd.bytestreams.addresses import own_addresses
from syncd.errors import BytestreamError, ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from syncd.bytestreams.s5b import Streamhost

log = logging.getLogger(__name__)

# From accept to the request: two round trips of a peer that has nothing else to do.
HANDSHAKE_TIMEOUT = 5.0  # seconds

# Sockets that have not yet said what they want. 64 peers do not connect within one round
# trip; a flood gets no more of our file descriptors (1024 by default) than this.
MAX_HALF_OPEN = 64  # sockets

# Clients that try all of our addresses at once (Psi, Gajim) have at most five to try, and
# close all but one.
MAX_PER_SLOT = 4  # sockets

# Out of file descriptors: the waiting connection keeps the listener readable, so accepting
# again at once would only spin. Something must be closed first, which takes a moment.
ACCEPT_PAUSE = 0.5  # seconds

# By the time the peer says that it uses us, its handshake is over, and only our own task's
# turn is missing. The stanza can hardly be faster than the socket by more than this.
WINNER_TIMEOUT = 10.0  # seconds

# Name, TCP and SOCKS together, for one streamhost. Long enough for two lost SYNs (sent again
# after 1 and 3 seconds); 16 dead streamhosts then take 80 of the 120 seconds that requesters
# wait at best. The field uses 5 (Pidgin) to 7 (QXmpp).
STREAMHOST_TIMEOUT = 5.0  # seconds


class Slot:
    """A bytestream that the listener expects; made by `Listener.expect`.

    COMPAT(psi, gajim, slixmpp): they connect to several of our addresses at once, so every
    finished handshake is kept until it is clear which one is used.
    """

    def __init__(self) -> None:
        self._finished: list[trio.SocketStream] = []
        self._changed = trio.Event()
        self._open = True

    def __repr__(self) -> str:
        return f"<Slot open={self._open} finished={len(self._finished)}>"

    @property
    def full(self) -> bool:
        """Whether no further handshake can be kept; forgets those that hung up."""
        self._forget_closed()
        return not self._open or len(self._finished) >= MAX_PER_SLOT

    async def winner(self) -> trio.SocketStream:
        """Take the connection that the peer uses; to be called once it said it uses ours.

        That is the one that finished its handshake last and is still open.

        Returns:
          A stream that belongs to the caller from now on.

        Raises:
          BytestreamError: There is none.
        """
        with trio.move_on_after(WINNER_TIMEOUT):
            while True:
                self._forget_closed()
                if self._finished:
                    return self._finished.pop()
                await self._changed.wait()
        raise BytestreamError(
            "the peer said it was connected to us, but no connection of it is open",
            hint="something between the two closes connections: check firewalls on the way, "
            "or set bytestreams.direct = false to use a proxy",
        )

    def add(self, stream: trio.SocketStream) -> bool:
        """Keep a connection whose handshake has finished.

        Returns:
          False when there is no more use for it; it then still belongs to the caller.
        """
        if self.full:
            return False
        self._finished.append(stream)
        self._changed.set()
        self._changed = trio.Event()
        return True

    def close(self) -> None:
        """Close every connection that was not taken; no further one is kept."""
        self._open = False
        for stream in self._finished:
            stream.socket.close()
        self._finished.clear()

    def _forget_closed(self) -> None:
        for stream in [each for each in self._finished if _hung_up(each)]:
            stream.socket.close()
            self._finished.remove(stream)


class Listener:
    """The daemon's one SOCKS5 port; made by `open_listener`.

    Attributes:
      host: The address that it is bound to.
      port: The TCP port.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._expected: dict[str, Slot] = {}
        # In the order of arrival, so that the first is the oldest.
        self._half_open: dict[trio.SocketStream, None] = {}

    def __repr__(self) -> str:
        return (
            f"<Listener {self.host} port {self.port} expected={len(self._expected)} "
            f"half_open={len(self._half_open)}>"
        )

    def addresses(self) -> list[str]:
        """Where others may reach the listener, likeliest first.

        Bound to a wildcard, these are the machine's own addresses, of IPv4 alone if it is that
        of IPv4; bound to one address, it is that one, even on the loopback: then the peers are
        on this machine.
        """
        if self.host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            return [self.host]
        return [each for each in own_addresses() if self.host == "::" or ":" not in each]

    @contextmanager
    def expect(self, address: str, *aliases: str) -> Iterator[Slot]:
        """Let a peer connect under an address, as long as the context lasts.

        Args:
          address: DST.ADDR (`s5b.dstaddr`).
          aliases: Other forms that lead to the same slot (`s5b.dstaddr_aliases`).

        Raises:
          ValueError: The address is expected already; sids must be unique.
        """
        keys = {each.lower() for each in (address, *aliases)}
        if not keys.isdisjoint(self._expected):
            raise ValueError(f"{address} is expected already")
        slot = Slot()
        self._expected |= dict.fromkeys(keys, slot)
        try:
            yield slot
        finally:
            for key in keys:
                del self._expected[key]
            slot.close()

    async def serve(self, listening: trio.SocketListener) -> None:
        """Accept and shake hands until cancelled; nothing that a peer does ends it."""
        async with trio.open_nursery() as nursery:
            await self._accept(listening, nursery)

    async def _accept(self, listening: trio.SocketListener, nursery: trio.Nursery) -> None:
        failing = False
        while True:
            try:
                stream = await listening.accept()
            except OSError as error:
                # Mostly out of file descriptors (EMFILE); nothing that may come here is
                # a reason to stop serving the others.
                if not failing:
                    log.warning("cannot accept connections for now: %s", error.strerror)
                failing = True
                await trio.sleep(ACCEPT_PAUSE)
                continue
            failing = False
            self._make_room()
            self._half_open[stream] = None
            nursery.start_soon(self._serve, stream)

    def _make_room(self) -> None:
        # The oldest goes, not the newest: a real peer is through after two round trips, so
        # it loses only if 64 others arrive meanwhile. Were the newest refused, 13 silent
        # connections a second would shut everybody out.
        while len(self._half_open) >= MAX_HALF_OPEN:
            oldest = next(iter(self._half_open))
            del self._half_open[oldest]
            oldest.socket.close()  # wakes its task with ClosedResourceError

    async def _serve(self, stream: trio.SocketStream) -> None:
        kept = False
        try:
            with trio.move_on_after(HANDSHAKE_TIMEOUT):
                kept = await self._shake_hands(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            log.debug("a SOCKS5 handshake broke off: %r", error)
        finally:
            self._half_open.pop(stream, None)
            if not kept:
                stream.socket.close()

    async def _shake_hands(self, stream: trio.SocketStream) -> bool:
        acceptor = socks5.Acceptor()
        await _drive(stream, acceptor)
        if acceptor.address is None:
            log.debug("a SOCKS5 handshake failed: %s", acceptor.error)
            return False
        slot = self._expected.get(acceptor.address)
        if slot is None or slot.full:
            acceptor.refuse()
        else:
            acceptor.accept()
        await stream.send_all(acceptor.data_to_send())
        # Nothing may be awaited behind this: from here on the slot owns the stream.
        return slot is not None and slot.add(stream)


@asynccontextmanager
async def open_listener(host: str | None, port: int) -> AsyncIterator[Listener]:
    """Listen for SOCKS5 connections until the context ends.

    Args:
      host: Address to bind to, such as ``0.0.0.0`` or ``::``; None: every address that the
        machine has, of IPv6 and IPv4, as far as the kernel knows them.
      port: TCP port; 0 lets the system choose one.

    Raises:
      ConfigError: The address cannot be bound; says why.
    """
    try:
        listening, *others = await _listen(host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host or 'any address'} port {port}: {_reason(error)}",
            hint="change bytestreams.listen, or stop the program that uses this port",
        ) from error
    # A name may stand for several addresses; a peer can be told only one port, and with port
    # 0 each has its own, so that the first address is the one.
    for other in others:
        other.socket.close()
    bound_host, bound_port = listening.socket.getsockname()[:2]
    listener = Listener(bound_host, bound_port)
    async with listening, trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, listening)
        try:
            yield listener
        finally:
            nursery.cancel_scope.cancel()


async def _listen(host: str | None, port: int) -> list[trio.SocketListener]:
    if host is None:
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - what is meant
    if host != "::" or not socket.has_dualstack_ipv6():
        return list(await trio.open_tcp_listeners(port, host=host))
    # One port for both, as a peer is told only one; trio keeps the two apart.
    both = socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
    both.setblocking(False)
    return [trio.SocketListener(trio.socket.from_stdlib_socket(both))]


async def connect_streamhost(streamhost: Streamhost, address: str) -> trio.SocketStream:
    """Connect to one streamhost, and shake hands there.

    Args:
      streamhost: Where.
      address: DST.ADDR (`s5b.dstaddr`).

    Returns:
      The stream; what it delivers first is the file's first byte.

    Raises:
      BytestreamError: It cannot be reached, refuses, or does not speak SOCKS5.
    """
    return await _connect(streamhost, socks5.Connector(address))


async def greet_streamhost(streamhost: Streamhost) -> float:
    """Find out whether a streamhost can be reached, without asking for a bytestream.

    Args:
      streamhost: Where.

    Returns:
      How long it took, seconds.

    Raises:
      BytestreamError: It cannot be reached, or does not speak SOCKS5.
    """
    started = trio.current_time()
    stream = await _connect(streamhost, socks5.Greeter())
    stream.socket.close()
    return trio.current_time() - started


async def connect_first(
    streamhosts: Sequence[Streamhost], address: str, aliases: Sequence[str] = ()
) -> tuple[Streamhost, trio.SocketStream]:
    """Connect to the first streamhost that lets us, in the requester's order.

    Strictly one after the other. COMPAT(libpurple, gabble, vacuum): their listeners take one
    connection, or one handshake, in all. COMPAT(openfire): at its proxy the order of the
    handshakes decides who may send.

    Args:
      streamhosts: What the requester offers.
      address: DST.ADDR (`s5b.dstaddr`).
      aliases: What to say instead to a streamhost that refuses that
        (`s5b.dstaddr_aliases`).

    Returns:
      The streamhost to report as used, and the stream.

    Raises:
      BytestreamError: None does; names each and why, its cause is a group of all failures.
    """
    failures: list[BytestreamError] = []
    in_doubt = set()
    for streamhost in streamhosts:
        if streamhost.jid in in_doubt:
            # COMPAT(openfire): takes a second handshake with this address for the other end's.
            failures.append(BytestreamError(f"{streamhost}: the same host left us waiting"))
            continue
        connector = socks5.Connector(address)
        try:
            return streamhost, await _connect(streamhost, connector)
        except BytestreamError as error:
            failures.append(error)
        # COMPAT(qxmpp): expects another address if a JID is not ASCII.
        for alias in aliases:
            if not connector.refused:
                break
            connector = socks5.Connector(alias)
            with suppress(BytestreamError):  # the first refusal says it as well
                return streamhost, await _connect(streamhost, connector)
        if connector.in_doubt:
            in_doubt.add(streamhost.jid)
    if not failures:
        raise BytestreamError(
            "the peer named no address to connect to",
            hint="let the sender open a port (bytestreams.listen) or use a proxy",
        )
    raise BytestreamError(
        "no address of the peer led to it: " + "; ".join(map(str, failures)),
        hint="let the sender's port through its firewall and NAT (bytestreams.listen and "
        "bytestreams.advertise), or let its proxy announce an address that is reachable here",
    ) from ExceptionGroup("all streamhosts failed", failures)


async def _connect(
    streamhost: Streamhost, connector: socks5.Connector | socks5.Greeter
) -> trio.SocketStream:
    try:
        with trio.fail_after(STREAMHOST_TIMEOUT):
            stream = await trio.open_tcp_stream(streamhost.host, streamhost.port)
            try:
                await _drive(stream, connector)
            except BaseException:
                stream.socket.close()
                raise
    except (OSError, trio.BrokenResourceError, trio.TooSlowError, ValueError) as error:
        # ValueError: a name that the IDNA codec does not take.
        raise BytestreamError(f"{streamhost}: {_reason(error)}") from error
    if connector.error is not None:
        stream.socket.close()
        raise BytestreamError(f"{streamhost}: {connector.error}") from connector.error
    return stream


async def _drive(
    stream: trio.SocketStream, machine: socks5.Connector | socks5.Greeter | socks5.Acceptor
) -> None:
    """Run a handshake to its end, good or bad, reading nothing beyond it."""
    while True:
        if data := machine.data_to_send():
            await stream.send_all(data)
        if not machine.bytes_wanted:
            return
        machine.receive_data(await stream.receive_some(machine.bytes_wanted))


def _hung_up(stream: trio.SocketStream) -> bool:
    """Whether the other end has closed or reset a connection on which it sends nothing."""
    poll = select.poll()
    poll.register(stream.socket.fileno(), select.POLLRDHUP)  # errors are always reported
    return bool(poll.poll(0))


def _reason(error: Exception) -> str:
    """Why a connection failed, in few words."""
    match error:
        case trio.TooSlowError():
            return f"no answer within {STREAMHOST_TIMEOUT:g} seconds"
        case OSError(__cause__=BaseExceptionGroup(exceptions=[Exception() as first, *_])):
            return _reason(first)  # one for each address of a name; they rarely differ
        case OSError(errno=int(number)) if number > 0:
            # Not its strerror, into which trio writes the address as a tuple.
            return os.strerror(number).lower()
        case OSError(strerror=str(text)):
            return text.lower()  # of the resolver, whose numbers are its own
        case trio.BrokenResourceError():
            return "the connection was reset during the handshake"
        case _:
            return str(error)
