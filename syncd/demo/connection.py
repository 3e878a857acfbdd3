"""One client's connection: TLS, the pump that drives its stream, and its only writer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from syncd.demo.faults import cut
from syncd.demo.presence import Session
from syncd.demo.resumption import RESUME_WITHIN
from syncd.demo.stream import (
    Bound,
    ServerStream,
    StanzaReceived,
    State,
    StreamEnded,
    TLSWanted,
)
from syncd.xmpp.xml import serialise

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from xml.etree.ElementTree import Element

    from syncd.demo.faults import Faults
    from syncd.demo.login import Accounts
    from syncd.demo.routing import Router
    from syncd.xmpp.jid import JID
    from syncd.xmpp.sm import StreamManagement

# ejabberd's is 120 s; on this machine a login takes milliseconds.
LOGIN_TIMEOUT = 60.0  # seconds
# How long a client may take to read our last words and hang up.
CLOSE_TIMEOUT = 2.0  # seconds
# What may wait for a client that does not read, before it is dropped. Prosody and ejabberd
# have no such limit, and grow.
MAX_QUEUE = 16 * 1024 * 1024  # bytes
# TLS records have 16 KiB; several at a time save turns.
_READ = 65_536  # bytes
# Read in steps of this part of a second when the rate is limited.
_RATE_STEP = 0.25  # seconds


class Connection:
    """A client, from the acceptance of its connection to its end.

    Args:
      transport: Its connection.
      context: For TLS.
      accounts: Who may log in.
      router: Takes its stanzas.
      faults: What to do wrong.
      token: Gives a fresh random printable string of at least 128 bits.
      direct_tls: TLS comes first (XEP-0368), instead of STARTTLS.
      max_stanza: Limit, bytes.
      max_queue: What may wait for it, bytes.

    Attributes:
      bound: Whether it has logged in and has its address.
    """

    def __init__(
        self,
        transport: trio.SocketStream,
        *,
        context: ssl.SSLContext,
        accounts: Accounts,
        router: Router,
        faults: Faults,
        token: Callable[[], str],
        direct_tls: bool,
        max_stanza: int,
        max_queue: int,
    ) -> None:
        self.bound = False
        self._transport = transport
        self._wire: trio.SocketStream | trio.SSLStream[trio.SocketStream] = transport
        self._context = context
        self._router = router
        self._faults = faults
        self._direct_tls = direct_tls
        self._max_queue = max_queue
        self._session: Session | None = None
        self._gone = False  # the connection is over; its session may not be
        self._scope = trio.CancelScope()
        self._wake = trio.Event()
        self._writing = 0  # bytes taken from the stream, and not yet written
        self._last = False  # nothing more will be queued
        self._stream = ServerStream(
            accounts,
            token=token,
            bind=self._bind,
            secure=direct_tls,
            max_stanza=max_stanza,
            resume=self._resume,
            hidden=faults.hidden,
        )

    async def run(self) -> None:
        """Serve the client until either end closes."""
        try:
            with self._scope:
                await self._serve()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client hung up, or was cut off
        finally:
            self._gone = True
            self._stream.lose()
            if self._session is not None:
                self._leave(self._session)
            await trio.aclose_forcefully(self._wire)

    def _leave(self, session: Session) -> None:
        if self._stream.resumable:
            self._router.keep(session, RESUME_WITHIN)
        else:
            self._router.unbind(session)

    async def _serve(self) -> None:
        if self._direct_tls:
            await self._start_tls()
        with trio.move_on_after(LOGIN_TIMEOUT) as patience:
            going = True
            while going and not self.bound:
                going = await self._receive()
                await self._flush()
        if patience.cancelled_caught:
            self._end("connection-timeout")
            await self._flush()
        elif going:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                while await self._receive():
                    pass
                self._last = True
                self._wake.set()
        await self._wire.aclose()

    async def _receive(self) -> bool:
        """Read once, and act on it; False when the stream has ended."""
        rate = self._faults.rate
        size = min(_READ, max(1, int(rate * _RATE_STEP))) if rate else _READ
        data = bytes(await self._wire.receive_some(size))
        await self._faults.until_audible()
        ended = False
        for event in self._stream.receive_data(data):
            match event:
                case TLSWanted():
                    await self._flush()
                    await self._start_tls()
                    self._stream.tls_started()
                case Bound():
                    self.bound = True
                case StanzaReceived(stanza):
                    self._on_stanza(stanza)
                case StreamEnded(condition):
                    ended = not condition
                    # After an error of the client's we wait until it has read why.
                    self._scope.deadline = trio.current_time() + CLOSE_TIMEOUT
        self._wake.set()
        if rate := self._faults.rate:
            await trio.sleep(len(data) / rate)
        return not ended

    def _on_stanza(self, stanza: Element) -> None:
        # An earlier stanza of the same read may have ended the stream.
        if self._session is None or self._stream.state is not State.OPEN:
            return
        limit = self._faults.max_stanza
        if limit is not None and len(serialise(stanza)) > limit:
            self._end("policy-violation")
        else:
            self._router.route(self._session, stanza)

    async def _start_tls(self) -> None:
        # https_compatible: clients that hang up without TLS's own farewell are the rule.
        self._wire = trio.SSLStream(
            self._transport, self._context, server_side=True, https_compatible=True
        )
        await self._wire.do_handshake()

    async def _write(self) -> None:
        """Write what is queued; nobody else writes to this connection."""
        while True:
            self._wake = trio.Event()  # before the look, or a wake is lost
            if not await self._flush():
                if self._last:
                    return
                await self._wake.wait()

    async def _flush(self) -> bool:
        """Write what is queued now; False: nothing."""
        await self._faults.until_audible()
        data = memoryview(self._stream.data_to_send())
        self._writing = len(data)
        for start in range(0, len(data), _READ):
            chunk = data[start : start + _READ]
            await self._wire.send_all(chunk)
            self._writing -= len(chunk)
        return bool(data)

    def _bind(self, account: JID, resource: str) -> JID:
        self._session = self._router.bind(
            account,
            resource,
            send=self._send,
            end=self._end,
            cut=self._cut,
            replaced=self._replaced,
            managed=self._managed,
        )
        return self._session.jid

    def _resume(self, account: JID, previous: str) -> StreamManagement:
        ours = Session(account, self._send, self._end, self._cut, self._replaced, self._managed)
        self._session, managed = self._router.resume(account, previous, ours)
        return managed

    def _managed(self) -> StreamManagement | None:
        return self._stream.management.kept

    def _replaced(self) -> None:
        # Before the end, which would take the session along.
        self._session = None
        self._end("conflict")

    def _send(self, stanza: bytes) -> None:
        self._stream.send(stanza)
        if self._stream.queued + self._writing > self._max_queue:
            self._stream.close()
            self._cut()
        elif self._stream.state is not State.OPEN:
            self._end_soon()
        self._wake.set()

    def _end(self, condition: str) -> None:
        self._stream.close(condition)
        self._end_soon()
        self._wake.set()

    def _end_soon(self) -> None:
        """Give the client a moment to read why its stream has ended."""
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + CLOSE_TIMEOUT)
        if self._gone and self._session is not None and not self._stream.resumable:
            self._router.unbind(self._session)

    def _cut(self) -> None:
        self._stream.lose()
        self._scope.cancel()
        cut(self._transport)
