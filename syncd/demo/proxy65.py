"""The SOCKS5 bytestreams proxy (XEP-0065 sections 4 and 6)."""

from __future__ import annotations

import socket
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from syncd.bytestreams import s5b
from syncd.bytestreams.socks5 import Acceptor
from syncd.demo.faults import cut
from syncd.demo.routing import NS_INFO, NS_ITEMS, make_info
from syncd.errors import ErrorType, StanzaError
from syncd.transfer import si
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from syncd.demo.faults import Faults
    from syncd.xmpp.stanza import Iq

# Larger chunks gain nothing on loopback; smaller ones cost trio more turns.
CHUNK = 262_144  # bytes
# Two messages each way, on this machine.
HANDSHAKE_TIMEOUT = 30.0  # seconds
# As ejabberd has it.
ACTIVATION_TIMEOUT = 60.0  # seconds
# How long an end may take to read the rest and close, once the other is done.
LINGER = 10.0  # seconds
# Each may hold two chunks.
MAX_CONNECTIONS = 256
# What Prosody may keep back.
_TAIL = 4_096  # bytes
# Openfire's memory for offers that it saw.
_OFFER_LIFETIME = 600.0  # seconds
_MAX_OFFERS = 1_024


# How the death of a connection shows, from trio's streams and from its sockets.
_LOST = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


@dataclass(slots=True, eq=False)
class _Party:
    transport: trio.SocketStream
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(slots=True, eq=False)
class _Bytestream:
    """The parties, in the order in which they came; two at most."""

    address: str
    parties: list[_Party] = field(default_factory=list)
    activated: trio.Event = field(default_factory=trio.Event)
    finished: trio.Event = field(default_factory=trio.Event)

    def other(self, party: _Party) -> _Party:
        return self.parties[1 - self.parties.index(party)]


class Proxy65:
    """A component that relays bytes between two connections that name the same address.

    Args:
      jid: Its address.
      host: Its IP address, as told to clients.
      faults: What to do wrong.

    Attributes:
      jid: As given.
      port: Its TCP port; whoever listens sets it.
      relayed: How many bytes went through, in all.
    """

    def __init__(self, jid: JID, host: str, faults: Faults) -> None:
        self.jid = jid
        self.port = 0
        self.relayed = 0
        self._host = host
        self._faults = faults
        self._bytestreams: dict[str, _Bytestream] = {}
        self._connections = 0
        self._offers: OrderedDict[str, float] = OrderedDict()  # address: seen when

    def answer(self, iq: Iq, sender: JID) -> Element | None:
        """Answer a request to the component.

        Raises:
          StanzaError: It is refused.
        """
        assert iq.payload is not None  # a request has one child
        match iq.type, iq.payload.tag:
            case "get", tag if tag == f"{{{NS_INFO}}}query":
                return make_info("proxy", "bytestreams", "SOCKS5 Bytestreams", s5b.NS)
            case "get", tag if tag == f"{{{NS_ITEMS}}}query":
                return make(tag)
            case "get", s5b.TAG:
                streamhost = make(
                    f"{{{s5b.NS}}}streamhost",
                    {"jid": str(self.jid), "host": self._host, "port": self.port},
                )
                return make(s5b.TAG, None, streamhost)
            case "set", s5b.TAG:
                self._activate(iq.payload, sender)
                return None
            case _:
                raise StanzaError(ErrorType.CANCEL, "service-unavailable")

    def inspect_offer(self, iq: Iq, sender: JID, to: JID) -> None:
        """See an iq between two clients pass; remember it if it offers a file (XEP-0096).

        Raises:
          StanzaError: With `Faults.proxy_requires_si`, an offer without name and size.
        """
        offer = iq.payload
        if offer is None or offer.tag != si.SI:
            return
        file = offer.find(si.FILE)
        if file is not None and file.get("name") and file.get("size", "").isdecimal():
            address = s5b.dstaddr(offer.get("id", ""), sender, to)
            self._offers[address] = trio.current_time()
            self._offers.move_to_end(address)
            if len(self._offers) > _MAX_OFFERS:
                self._offers.popitem(last=False)
        elif self._faults.proxy_requires_si:
            raise StanzaError(ErrorType.CANCEL, "not-allowed")

    def _activate(self, query: Element, sender: JID) -> None:
        """XEP-0065 section 6.3.5."""
        try:
            target = JID.parse((query.findtext(f"{{{s5b.NS}}}activate") or "").strip())
        except ValueError as error:
            raise StanzaError(ErrorType.MODIFY, "jid-malformed", str(error)) from error
        sid = query.get("sid", "")
        if not sid:
            raise StanzaError(ErrorType.MODIFY, "bad-request", "a bytestream needs a sid")
        bytestream = self._bytestreams.get(s5b.dstaddr(sid, sender, target))
        if bytestream is None:
            raise StanzaError(ErrorType.CANCEL, "item-not-found")
        if bytestream.activated.is_set():
            raise StanzaError(ErrorType.CANCEL, "conflict")
        if len(bytestream.parties) < 2:
            raise StanzaError(ErrorType.CANCEL, "not-allowed", "only one party is connected")
        bytestream.activated.set()

    async def serve(self, transport: trio.SocketStream) -> None:
        """Serve one connection, from the handshake to the end of the relaying."""
        self._connections += 1
        try:
            async with transport:
                if self._connections <= MAX_CONNECTIONS:
                    await self._serve(transport)
        except _LOST:
            pass  # one end hung up; the other was told by the closing of its connection
        finally:
            self._connections -= 1

    async def _serve(self, transport: trio.SocketStream) -> None:
        if self._faults.proxy_silent:
            while await transport.receive_some(CHUNK):
                pass
            return
        party, bytestream = _Party(transport), None
        with trio.move_on_after(HANDSHAKE_TIMEOUT):
            bytestream = await self._admit(party)
        if bytestream is None:
            return
        try:
            if await _until_activated(bytestream, transport):
                await self._relay(bytestream, party)
        finally:
            self._leave(bytestream, party)

    async def _admit(self, party: _Party) -> _Bytestream | None:
        """Shake hands; None: it is none, or not wanted, and has been told so."""
        transport, acceptor = party.transport, Acceptor()
        while acceptor.bytes_wanted:
            acceptor.receive_data(bytes(await transport.receive_some(acceptor.bytes_wanted)))
            if answer := acceptor.data_to_send():
                await transport.send_all(answer)
        if acceptor.address is None:
            return None
        bytestream = self._join(acceptor.address, party)
        if bytestream is None:
            acceptor.refuse()
        else:
            acceptor.accept()
        try:
            await transport.send_all(acceptor.data_to_send())
        except BaseException:
            if bytestream is not None:
                self._leave(bytestream, party)
            raise
        return bytestream

    def _join(self, address: str, party: _Party) -> _Bytestream | None:
        if self._faults.proxy_requires_si:
            seen = self._offers.get(address)
            if seen is None or trio.current_time() - seen > _OFFER_LIFETIME:
                return None
        bytestream = self._bytestreams.setdefault(address, _Bytestream(address))
        if len(bytestream.parties) >= 2:
            return None
        bytestream.parties.append(party)
        return bytestream

    def _leave(self, bytestream: _Bytestream, party: _Party) -> None:
        if not bytestream.activated.is_set():
            bytestream.parties.remove(party)
        over = not bytestream.parties or bytestream.finished.is_set()
        if over and self._bytestreams.get(bytestream.address) is bytestream:
            del self._bytestreams[bytestream.address]

    async def _relay(self, bytestream: _Bytestream, party: _Party) -> None:
        """Relay what one party sends, then let both connections end: none has half-close."""
        if self._faults.proxy_one_way and party is bytestream.parties[0]:
            await bytestream.finished.wait()
            return
        other = bytestream.other(party)
        try:
            with party.scope:
                await self._pump(party.transport, other.transport)
        except _LOST:
            pass  # real proxies hide this: the other end sees a plain end of the stream
        finally:
            bytestream.finished.set()
            other.scope.deadline = min(other.scope.deadline, trio.current_time() + LINGER)
        await other.transport.send_eof()

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        """Write what is read until the source ends; what is not taken is not read."""
        await trio.lowlevel.wait_readable(source.socket)  # mostly one way stays unused
        buffer = memoryview(bytearray(CHUNK))
        held = passed = 0
        while count := await source.socket.recv_into(buffer[held:]):
            if self._spoil(buffer[held : held + count], passed):
                cut(source)
                cut(sink)
                return
            passed += count
            self.relayed += count
            held += count
            ready = max(0, held - _TAIL) if self._faults.proxy_keeps_tail else held
            if ready:
                await sink.send_all(buffer[:ready])
            held -= ready
            buffer[:held] = bytes(buffer[ready : ready + held])
        if held:
            await sink.send_all(buffer[:held])

    def _spoil(self, data: memoryview, passed: int) -> bool:
        """Do to the bytes behind the first `passed` what the faults demand; True: cut now."""
        at = self._faults.proxy_flip_at
        if at is not None and passed <= at < passed + len(data):
            data[at - passed] ^= 0x01
        limit = self._faults.proxy_cut_after
        return limit is not None and passed + len(data) > limit


async def _until_activated(bytestream: _Bytestream, transport: trio.SocketStream) -> bool:
    """Wait for the activation, as long as the party stays; tell whether it came."""

    async def watch() -> None:
        early = b""
        with suppress(*_LOST):
            # Peeked, so that what is sent early is still there for the relaying.
            early = await transport.socket.recv(1, socket.MSG_PEEK)
        if not early:
            nursery.cancel_scope.cancel()

    with trio.move_on_after(ACTIVATION_TIMEOUT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await bytestream.activated.wait()
            nursery.cancel_scope.cancel()
    return bytestream.activated.is_set()
