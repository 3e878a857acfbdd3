"""A stream's life on trio: one pump, one writer, requests and their answers.

More than 400 lines: what is read, written, handled and waited for are four sides of one state,
and each bounds another.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from types import MappingProxyType
from xml.etree.ElementTree import Element

import trio

from syncd.errors import ErrorType, OfflineError, StanzaError, SyncdError
from syncd.link import connect
from syncd.xmpp.disco import PING
from syncd.xmpp.jid import JID
from syncd.xmpp.sm import StreamManagement
from syncd.xmpp.stanza import (
    IQ,
    MESSAGE,
    PRESENCE,
    Iq,
    IqType,
    make_error_reply,
    make_iq,
    read_error,
    read_from,
    read_iq,
)
from syncd.xmpp.stream import StanzaReceived, StreamEnded
from syncd.xmpp.xml import make, namespace

log = logging.getLogger(__name__)

Handler = Callable[[Iq], Awaitable[Element | None]]
"""Takes a request and returns the payload of its result; raises `StanzaError` to refuse.

Called in the order in which the requests came; what it returns is awaited beside the others.
"""

Answer = Callable[[Iq], Element | None]
"""The same for what is answered at once, without waiting for anything."""

MessageHandler = Callable[[JID, Element], None]
"""Takes the sender of a message and one child of it; raises `StanzaError` to refuse."""

# The answer comes from a program, through two servers. A person is asked nowhere here.
REQUEST_TIMEOUT = 60.0  # seconds
# A handler waits for disk and network. An honest peer has one request out for each transfer,
# of which it runs 64 at most; the rest of our places are everybody else's.
MAX_HANDLING_OF_ONE = 64  # requests of one bare JID
MAX_HANDLING = 256  # requests in all
# More at a time than `parallel` peers could need; a limit, not a target.
MAX_WAITING = 4_096  # requests
# A silent connection is asked after this, and given up after PING_TIMEOUT more: a link that
# died without a word is found within a minute.
PING_AFTER = 30.0  # seconds
PING_TIMEOUT = 20.0  # seconds
# What the server has not taken of us yet, beyond which we take nothing of it: else it could
# make us answer, and never read. An honest one takes that much in a moment. What came in one
# read is answered on top; of the shortest requests, the refusals are 40 times as long.
MAX_UNWRITTEN = 1 << 20  # bytes
# At a time, so that a server that takes them slowly is seen to take them.
WRITE = 65_536  # bytes
# How long the server may take to read our footer.
CLOSE_TIMEOUT = 5.0  # seconds


Reconnect = Callable[[StreamManagement], Awaitable[connect.Connection | None]]
"""Connects again to go on with a session; None when that has become pointless.

An error ends the session, and is why.
"""


class Session:
    """One bound session: routes what comes, writes what is queued, pairs answers.

    If the server manages the stream (XEP-0198), the session outlives its connection: what was
    under way when it broke goes on when it is resumed, and nobody else notices.

    Args:
      connection: From `connect.connect`.
      handlers: By the tag of the payload; for requests only.
      presence_received: Gets every presence.
      answers: By the tag of the payload; for requests that are answered at once, however many
        handlers are busy.
      messages: By the tag of a child of the message; called at once, in the order in which the
        messages came. Other messages are left alone (RFC 6121 section 5).
      bounded: Tags of requests whose handlers refuse by themselves what is too much: how many
        of them are handled is no reason to refuse one, nor any other request.

    Attributes:
      successor: Set when the session ended because the server had forgotten it: a new one is
        bound on this connection, which belongs to whoever takes it.
    """

    def __init__(
        self,
        connection: connect.Connection,
        handlers: Mapping[str, Handler],
        presence_received: Callable[[Element], None],
        answers: Mapping[str, Answer] = MappingProxyType({}),
        messages: Mapping[str, MessageHandler] = MappingProxyType({}),
        bounded: Collection[str] = (),
    ) -> None:
        self.successor: connect.Connection | None = None
        self._connection = connection
        self._stream = connection.stream
        self._handlers = handlers
        self._presence_received = presence_received
        self._answers = answers
        self._messages = messages
        self._bounded = bounded
        self._waiting: dict[str, _Waiter] = {}
        self._writable = trio.Event()
        self._most_unwritten = MAX_UNWRITTEN
        self._progress = trio.Event()  # the writer got on, or the pump need not wait for it
        self._broken: OfflineError | None = None  # why the writer did not
        self._handling: Counter[JID | None] = Counter()  # requests, by whose they are
        self._reconnect: Reconnect | None = None
        self._closing = False  # we want it to end
        self._ended: SyncdError | None = None  # why, once the connection has
        self._over = False  # nothing goes out any more
        self._gap: trio.CancelScope | None = None  # between two connections
        self._doubt = trio.Event()  # the server is to be asked without waiting for silence
        self._lost = False  # the connection's own address
        self._heard_at = trio.current_time()  # when the server last gave a sign of life

    @property
    def jid(self) -> JID:
        """Our full JID."""
        return self._stream.jid

    @property
    def server(self) -> str:
        """Host and port of the server, as far as it was looked for."""
        return str(self._connection.target or "")

    @property
    def connected(self) -> bool:
        """Whether there is a connection just now."""
        return self._ended is None and not self._over

    async def run(
        self,
        begin: Callable[[trio.Nursery], None] = lambda nursery: None,
        reconnect: Reconnect | None = None,
    ) -> None:
        """Live until the session ends; then every pending request has failed.

        Args:
          begin: Gets the nursery for tasks that shall end with this session.
          reconnect: How to get another connection when this one breaks; without it the
            session ends then.

        Raises:
          SyncdError: Why the session ended, if not by `close`.
        """
        self._reconnect = reconnect
        try:
            async with trio.open_nursery() as nursery:
                begin(nursery)
                await self._run_connection(nursery)
                while reconnect is not None and self._is_resumable():
                    if not await self._resume(reconnect):
                        break
                    await self._run_connection(nursery)
                self._end()
                nursery.cancel_scope.cancel()
        finally:
            self._end()
            await trio.aclose_forcefully(self._connection.transport)
        if self._ended is not None:
            raise self._ended

    def _end(self) -> None:
        self._over = True
        for waiter in self._waiting.values():
            waiter.fail(OfflineError("the stream to the server ended before the answer came"))

    def _is_resumable(self) -> bool:
        """Whether the connection has broken, and the session goes on with another."""
        if self._reconnect is None or self._closing or self._over:
            return False
        # A stream that was closed, or ended with an error, has taken the session with it.
        sm = self._stream.sm
        broke = isinstance(self._ended, OfflineError) and not self._stream.closing
        return broke and sm is not None and bool(sm.id)

    async def _resume(self, reconnect: Reconnect) -> bool:
        sm = self._stream.sm
        assert sm is not None
        connection = None
        try:
            with trio.CancelScope() as self._gap:
                connection = await reconnect(sm)
        except SyncdError as error:
            self._ended = error
            return False
        finally:
            self._gap = None
        if connection is None:
            if self._closing:
                self._ended = None  # in peace, even if the server cannot be told
            return False
        if connection.stream.sm is not sm and self._closing:
            await trio.aclose_forcefully(connection.transport)
            return False
        if connection.stream.sm is not sm:
            if lost := len(sm.unacked):
                log.info("the server has forgotten the session: %d stanzas may be lost", lost)
            self.successor = connection
            self._ended = OfflineError(
                "the server has forgotten the session; here is a new one"
            )
            return False
        self._connection, self._stream, self._ended = connection, connection.stream, None
        if self._closing:
            self._stream.close()
        return True

    async def _run_connection(self, handling: trio.Nursery) -> None:
        """Live on one connection until it ends; requests are handled in `handling`."""
        self._heard_at = trio.current_time()
        self._writable, self._progress, self._broken = trio.Event(), trio.Event(), None
        self._lost = False
        # What a resumption sends again counts for nothing here: a server that first writes what
        # it has for us, and then reads, must not wait for us while we wait for it.
        self._most_unwritten = self._stream.queued + MAX_UNWRITTEN
        writing = trio.CancelScope(shield=True)
        try:
            async with trio.open_nursery() as nursery:
                last_words = trio.Event()
                nursery.start_soon(self._write, writing, last_words)
                nursery.start_soon(self._keep_alive, nursery.cancel_scope)
                try:
                    await self._pump(handling)
                finally:
                    # Our last words are queued; the writer ends behind them, in its own scope:
                    # cancelled with the rest, it would have taken them and not written them.
                    writing.deadline = trio.current_time() + CLOSE_TIMEOUT
                    last_words.set()
                    self._writable.set()
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(self._connection.transport)

    def send(self, stanza: Element) -> None:
        """Queue a stanza for the writer; between two connections, for the next.

        Raises:
          OfflineError: The session has ended, or too much waits to be sent.
          StanzaError: The server takes no stanza as long as this one.
        """
        if self._is_resumable() and self._stream.sm is not None:
            if self._stream.sm.full:
                raise OfflineError("not connected to the server, and much waits to be sent")
            self._stream.send_later(stanza)
        elif self._stream.is_open and not self._over:
            self._stream.send(stanza)
            self._wake()
        else:
            raise OfflineError("not connected to the server")

    def check(self, is_ours: Callable[[str], bool]) -> None:
        """Ask the server at once whether it is there: our addresses have changed.

        Args:
          is_ours: Tells whether an address is still ours. To one that is not, nothing comes
            any more, and no answer needs to be waited for.
        """
        host = connect.own_host(self._connection.transport)
        self._lost = bool(host) and not is_ours(host)
        self._doubt.set()

    def close(self) -> None:
        """Say goodbye; `run` ends when the server has answered, or cannot be told."""
        self._closing = True
        self._stream.close()
        self._wake()
        if self._gap is not None:
            self._gap.cancel()

    def left(self, jid: JID) -> None:
        """The owner of a full JID has gone: fail the requests that wait for it.

        The server has told so by presence. One that keeps the session of a dead link for its
        owner answers nothing meanwhile, and perhaps never.
        """
        for waiter in self._waiting.values():
            if waiter.to == jid:
                waiter.fail(OfflineError(f"{jid} went offline before the answer came"))

    async def request(
        self, kind: IqType, to: JID | None, payload: Element, timeout: float = REQUEST_TIMEOUT
    ) -> Iq:
        """Send a request and wait for its result.

        Args:
          kind: ``get`` or ``set``.
          to: Whom; None is our own account at the server.
          payload: The one child.
          timeout: How long the answer may take, seconds.

        Returns:
          The result.

        Raises:
          StanzaError: It was refused.
          OfflineError: The stream ended first, or no answer came in time.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise OfflineError(f"over {MAX_WAITING} requests are waiting for their answers")
        # 128 random bits: nobody can answer for another by guessing (CVE-2013-6483).
        ident = secrets.token_hex(16)
        waiter = _Waiter(to, payload)
        self._waiting[ident] = waiter
        try:
            self.send(make_iq(kind, ident, to, payload))
            with trio.move_on_after(timeout):
                return await waiter.answered()
        finally:
            del self._waiting[ident]
        raise OfflineError(f"{to or 'the server'} gave no answer for {timeout:.0f} s")

    def _wake(self) -> None:
        self._writable.set()
        self._progress.set()

    async def _pump(self, nursery: trio.Nursery) -> None:
        events = self._connection.early
        while True:
            # All of them, whatever is unwritten: what the stream has counted is handled.
            for event in events:
                match event:
                    case StanzaReceived(stanza):
                        await self._route(stanza, nursery)
                    case StreamEnded(error):
                        self._ended = error
                        return
                    case _:
                        raise AssertionError(f"{event} on an open stream")
            while self._must_wait:
                if self._broken is not None:
                    self._ended = self._broken
                    return
                self._progress = trio.Event()
                await self._progress.wait()
            data = await connect.read(self._connection.transport)
            self._heard_at = trio.current_time()
            events = self._stream.receive_data(data)
            self._writable.set()

    @property
    def _must_wait(self) -> bool:
        """Whether the server has to take something of us before we take more of it.

        A server that waits for the same of us is given up like a silent one. Behind our footer
        nothing is answered any more.
        """
        return self._stream.is_open and self._stream.queued > self._most_unwritten

    async def _write(self, scope: trio.CancelScope, last_words: trio.Event) -> None:
        # The only task that writes: one cancelled inside send_all would leave half a stanza.
        try:
            with scope:
                while True:
                    self._writable = trio.Event()  # before the look, or a wake is lost
                    last = last_words.is_set()  # before the look: nothing comes behind them
                    await self._write_all()
                    if last:
                        return
                    await self._writable.wait()
        except OfflineError as error:
            # The pump reads the end, and says so; unless it does not read just now.
            self._broken = error
            self._progress.set()

    async def _write_all(self) -> None:
        while self._stream.queued:
            await connect.write(self._connection.transport, self._stream, WRITE)
            if self._stream.queued:
                # Of a server that takes much, and slowly, it is the only sign of life; the ping
                # is behind all that. Elsewhere it says no more than that the kernel has room.
                self._heard_at = trio.current_time()
            self._progress.set()

    async def _keep_alive(self, stream_scope: trio.CancelScope) -> None:
        """End the connection when the server falls silent (XEP-0199).

        Where only the server wants to hear something of us (XEP-0478), a space does.
        """
        spoke_at = trio.current_time()
        while True:
            ask_at = self._heard_at + (0.0 if self._doubt.is_set() else PING_AFTER)
            speak_by = spoke_at + self._stream.limits.speak_every
            if trio.current_time() < min(ask_at, speak_by):
                with trio.move_on_at(min(ask_at, speak_by)):
                    await self._doubt.wait()
                continue
            self._doubt = trio.Event()
            if self._lost:
                self._ended = OfflineError("this machine has no longer the address it had")
                stream_scope.cancel()  # not raised here, as below
                return
            spoke_at = asked_at = trio.current_time()
            if asked_at < ask_at:
                self._stream.keep_alive()
                self._writable.set()
                continue
            with trio.move_on_after(PING_TIMEOUT) as waiting:
                try:
                    with suppress(StanzaError):  # a refusal is a sign of life as well
                        await self.request("get", None, make(PING))
                except OfflineError:
                    # Our footer is out, or too many requests wait: listening has to do.
                    await trio.sleep_forever()
            # Whatever came meanwhile is a sign of life: the ping may be queued behind much.
            if waiting.cancelled_caught and self._heard_at < asked_at:
                did = "took nothing" if self._must_wait else "was silent"
                silence = trio.current_time() - self._heard_at
                self._ended = OfflineError(f"the server {did} for {silence:.0f} s")
                # Not raised here, where the nursery would wrap it in a group.
                stream_scope.cancel()
                return

    async def _route(self, stanza: Element, nursery: trio.Nursery) -> None:
        try:
            if stanza.tag == PRESENCE:
                self._presence_received(stanza)
            elif stanza.tag == IQ:
                await self._route_iq(read_iq(stanza), nursery)
            elif stanza.tag == MESSAGE and stanza.get("type") != "error":
                self._route_message(stanza)
        except StanzaError as error:
            log.info("refused a stanza from %s: %s", _sender(stanza), error)
            # RFC 6120 section 8.3.1: never answer an answer with an error.
            if stanza.tag == IQ and stanza.get("type") not in ("result", "error"):
                self._refuse(stanza, error)
        except OfflineError:
            log.debug("our footer is out: no answer to <%s/>", stanza.tag)
        except Exception:
            # What others ask of us is part of a transfer: a bug in that is told, and what led
            # to it refused. If it ended the process, a peer that has found one could end it
            # again and again, and a presence would do so after each login.
            log.exception("taking a stanza from %s", _sender(stanza))
            if stanza.tag != PRESENCE and stanza.get("type") not in ("result", "error"):
                self._refuse(stanza, _our_fault())

    async def _route_iq(self, iq: Iq, nursery: trio.Nursery) -> None:
        if iq.type in ("result", "error"):
            waiter = self._waiting.get(iq.id) or self._misnamed(iq)
            if waiter is None or not self._may_answer(iq.sender, waiter.to):
                log.info("dropped an answer that nobody waits for, from %s", iq.sender)
            else:
                waiter.answer(iq)
            return
        assert iq.payload is not None
        if answer := self._answers.get(iq.payload.tag):
            self._reply(iq, answer(iq))
            return
        handler = self._handlers.get(iq.payload.tag)
        if handler is None:
            # RFC 6120 section 8.4: what we do not understand is answered all the same.
            self._refuse(iq.element, StanzaError(ErrorType.CANCEL, "service-unavailable"))
            return
        counts = iq.payload.tag not in self._bounded
        if counts and self._is_busy(iq):
            # Requests that wait for nothing, such as those of strangers, which are refused,
            # take no places: all that were begun have got so far behind the second of these.
            # Not to be cancelled, for what comes behind this stanza is counted as handled.
            await trio.lowlevel.cancel_shielded_checkpoint()
            await trio.lowlevel.cancel_shielded_checkpoint()
            if self._is_busy(iq):
                raise StanzaError(ErrorType.WAIT, "resource-constraint", "too much at once")
        # Called here, in the order of the stanzas, which counts for some (XEP-0047); what it
        # then waits for is its own matter.
        answering = handler(iq)
        self._handling[_whose(iq)] += counts
        nursery.start_soon(self._handle, iq, answering, counts)

    def _is_busy(self, iq: Iq) -> bool:
        of_one, of_all = self._handling[_whose(iq)], self._handling.total()
        return of_one >= MAX_HANDLING_OF_ONE or of_all >= MAX_HANDLING

    def _route_message(self, message: Element) -> None:
        wanted = [child for child in message if child.tag in self._messages]
        if not wanted:
            return
        # RFC 6120 section 8.1.2.1: without an address it is of our own account.
        sender = read_from(message) or self.jid.bare
        try:
            for child in wanted:
                self._messages[child.tag](sender, child)
        except StanzaError as error:
            log.info("refused a message from %s: %s", sender, error)
            self._refuse(message, error)
        except SyncdError as error:
            log.warning("could not take a message from %s: %s", sender, error)
            self._refuse(message, _our_fault(error.type))

    def _misnamed(self, iq: Iq) -> _Waiter | None:
        """The one request that an error is about, if its id is none of ours.

        COMPAT(psi): refuses an offer under the offer's id. COMPAT(gajim): under an id of its
        own, but with a condition of what was asked. Nobody else than the full JID that was
        asked can end a request so, and only with an error.
        """
        if iq.type != "error" or iq.sender is None or not iq.sender.resource:
            return None
        names = {iq.id, *(child.get("id", "") for child in iq.element)}
        about = namespace(read_error(iq.element).app)
        found = [
            waiter
            for waiter in self._waiting.values()
            if waiter.to == iq.sender and (waiter.name in names or waiter.namespace == about)
        ]
        return found[0] if len(found) == 1 else None

    def _may_answer(self, sender: JID | None, asked: JID | None) -> bool:
        # COMPAT(prosody, ejabberd): the server answers for our account from nothing, from
        # our bare JID, from our full JID or from its domain.
        own = {None, self.jid, self.jid.bare, JID("", self.jid.domain)}
        return sender == asked or (sender in own and asked in own)

    async def _handle(self, iq: Iq, answering: Awaitable[Element | None], counts: bool) -> None:
        try:
            self._reply(iq, await answering)
        except StanzaError as error:
            self._refuse(iq.element, error)
        except SyncdError as error:
            # The sentence is for our own user: it may name files and folders here.
            log.warning("could not answer %s: %s", iq.sender, error)
            self._refuse(iq.element, _our_fault(error.type))
        except Exception:  # as in _route
            log.exception("answering %s", iq.sender)
            self._refuse(iq.element, _our_fault())
        finally:
            self._handling -= Counter({_whose(iq): counts})  # keeps nobody who has none

    def _reply(self, iq: Iq, payload: Element | None) -> None:
        children = [] if payload is None else [payload]
        try:
            self.send(make_iq("result", iq.id, iq.sender, *children))
        except StanzaError as error:
            log.warning("no answer to %s: %s", iq.sender, error)
            self._refuse(iq.element, _our_fault(text="too long"))
        except OfflineError:
            log.debug("no answer to %s: the session has ended", iq.sender)

    def _refuse(self, request: Element, error: StanzaError) -> None:
        # A refusal that is too long itself had an id and a sender made for that.
        with suppress(OfflineError, StanzaError):
            self.send(make_error_reply(request, error))


class _Waiter:
    """One pending request."""

    def __init__(self, to: JID | None, payload: Element) -> None:
        self.to = to
        self.name = payload.get("id") or None
        self.namespace = namespace(payload.tag)
        self._event = trio.Event()
        self._iq: Iq | None = None
        self._error: SyncdError | None = None

    def answer(self, iq: Iq) -> None:
        if iq.type == "error":
            self.fail(read_error(iq.element))
        elif not self._event.is_set():
            self._iq = iq
            self._event.set()

    def fail(self, error: SyncdError) -> None:
        if not self._event.is_set():  # the first answer counts
            self._error = error
            self._event.set()

    async def answered(self) -> Iq:
        await self._event.wait()
        if self._iq is None:
            assert self._error is not None
            raise self._error
        return self._iq


def _sender(stanza: Element) -> JID | str:
    """Whom the log is to name, as a JID if it is one."""
    try:
        return read_from(stanza) or "the server"
    except StanzaError:
        return "a malformed address"


def _whose(iq: Iq) -> JID | None:
    """Whose places a request takes: those of the account, whichever client of it asks."""
    return iq.sender.bare if iq.sender else None


def _our_fault(kind: ErrorType = ErrorType.CANCEL, text: str = "") -> StanzaError:
    return StanzaError(kind, "internal-server-error", text)
