"""The receiving end: offers are judged, bytes become partial files, files get their names.

One task per accepted offer, in straight line: offer, bytestream, bytes, ``<finish/>``, place.
The iq handlers only carry requests to that task and its answers back, so a stream that
breaks takes no transfer with it: the sender asks again on the next one.

More than 400 lines: the handlers and the task are the two halves of one protocol, and each
is understood only beside the other.
"""

from __future__ import annotations

import logging
import secrets
import weakref
from collections import OrderedDict
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import blake3
import trio

from syncd.bytestreams import s5b
from syncd.bytestreams.sockets import connect_first
from syncd.disk import paths
from syncd.disk.partial import Action, Identity, PartialFile, Place, identity_of, key_of
from syncd.errors import (
    DeclinedError,
    ErrorType,
    IntegrityError,
    OfflineError,
    StalledError,
    StanzaError,
    SyncdError,
    TransferError,
)
from syncd.transfer import pump, schema, si

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.xmpp.jid import JID
    from syncd.xmpp.stanza import Iq

log = logging.getLogger(__name__)

# From our acceptance to the opening of the bytestream. Clients need a second; a syncd hashes
# the part that we have first (7 GiB/s from memory, 0.2 from a slow disk).
OPEN_TIMEOUT = 120.0  # seconds
# From the last byte to <finish/>: the sender's stream may have to come back first.
FINISH_TIMEOUT = 120.0  # seconds
# Each holds a descriptor and a task; senders run `parallel` at a time, 4 by default.
MAX_PER_PEER = 64  # accepted offers of one bare JID
MAX_OPEN = 256  # accepted offers in all
# Receipts that may have been lost on their way; later the journal knows.
MAX_RECEIPTS = 1_024  # receipts
# Two programs that create the same name all the time are not ours to wait for.
MAX_RACES = 10  # tries


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbox:
    """Where a peer's files go.

    Attributes:
      root: The folder on disk.
      folder: Its id; empty for the inbox of ordinary clients.
    """

    root: Path
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the journal knows of a file that lies in a folder because it arrived there.

    Attributes:
      peer: Who sent it, bare.
      identity: The file as we put it there.
      source_size, source_mtime_ns: The version as the sender described it.
      digest: BLAKE3, 32 bytes.
    """

    peer: JID
    identity: Identity
    source_size: int
    source_mtime_ns: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Arriving:
    """A file that is about to get its final name.

    Attributes:
      inbox: Where.
      path: Below the folder.
      known: What the journal shall know of it from now on.
    """

    inbox: Inbox
    path: str
    known: Known


@dataclass(slots=True)
class _Call:
    """A request that a transfer's task answers."""

    payload: Element
    done: trio.Event = field(default_factory=trio.Event)
    result: Element | None = None
    error: StanzaError | None = None

    def answer(self, result: Element) -> None:
        self.result = result
        self.done.set()

    def fail(self, error: StanzaError) -> None:
        if not self.done.is_set():
            self.error = error
            self.done.set()


class Incoming:
    """One accepted offer, from acceptance to receipt.

    Attributes:
      sender: Full JID.
      offer: As it came.
      size: Of the whole file, bytes.
      inbox: Where the file goes.
      components: Its path there, checked.
      partial: What has arrived.
      progress: How far it is.
      present: The journal knows the file to be there already.
    """

    def __init__(
        self,
        sender: JID,
        offer: si.Offer,
        inbox: Inbox,
        components: tuple[str, ...],
        partial: PartialFile | None,
        present: Known | None,
    ) -> None:
        assert offer.size is not None
        self.size = offer.size
        self.sender = sender
        self.offer = offer
        self.inbox = inbox
        self.components = components
        self.partial = partial
        self.present = present
        self.progress = pump.Progress(partial.offset if partial else offer.size)
        self.opening = _Mailbox()
        self.finishing = _Mailbox()
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    @property
    def path(self) -> str:
        """The path below the folder."""
        return "/".join(self.components)

    @property
    def slot(self) -> tuple[JID, str, str]:
        """What two transfers must not share: one sender's one file in one folder."""
        return self.sender.bare, self.inbox.folder, self.path

    def close(self) -> None:
        """Let go of the file; keep what has arrived, if it can be resumed."""
        if self.partial is not None:
            self.partial.close()
            if self.offer.sync is None:
                try:
                    self.partial.discard()
                except TransferError as error:
                    # The folder may be gone altogether, which must not end the daemon.
                    log.warning("%s", error)


class _Mailbox:
    """Hands requests, one at a time, to the task that answers them."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[_Call](4)
        self._current: _Call | None = None

    async def ask(self, payload: Element) -> Element:
        """Called by the iq handler."""
        call = _Call(payload)
        try:
            self._send.send_nowait(call)
        except (trio.WouldBlock, trio.BrokenResourceError) as error:
            raise StanzaError(ErrorType.CANCEL, "item-not-found", "no such transfer") from error
        await call.done.wait()
        if call.result is None:
            assert call.error is not None
            raise call.error
        return call.result

    async def next(self) -> _Call:
        """Called by the task."""
        self._current = await self._receive.receive()
        return self._current

    def close(self, error: StanzaError) -> None:
        """Refuse what has no answer yet, also what the task was cancelled over."""
        if self._current is not None:
            self._current.fail(error)
        with suppress(trio.WouldBlock):
            while True:
                self._receive.receive_nowait().fail(error)
        self._receive.close()


class Receiver:
    """Takes files.

    Args:
      own_jid: Our full JID, or None while we are offline.
      inbox_for: Where the files of this bare JID for this folder id go ("" if the offer names
        none); raises `DeclinedError` for strangers.
      known: What the journal knows of this path of this folder.
      arriving: Tells the journal of a file before it gets its final name.
      watch: Shows a running transfer to whoever asks for the status.
    """

    def __init__(
        self,
        *,
        own_jid: Callable[[], JID | None],
        inbox_for: Callable[[JID, str], Inbox],
        known: Callable[[Inbox, str], Awaitable[Known | None]],
        arriving: Callable[[Arriving], Awaitable[None]],
        watch: Callable[[Incoming], AbstractContextManager[None]],
    ) -> None:
        self._own_jid = own_jid
        self._inbox_for = inbox_for
        self._known = known
        self._arriving = arriving
        self._watch = watch
        self._incoming: dict[tuple[JID, str], Incoming] = {}
        self._receipts: OrderedDict[tuple[JID, str], si.Finish] = OrderedDict()
        # One file at a time comes to one place; the locks live as long as somebody waits.
        self._placing: weakref.WeakValueDictionary[tuple[str, str], trio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._accepted, self._to_run = trio.open_memory_channel[Incoming](MAX_OPEN)

    async def run(self) -> None:
        """Run accepted transfers, for ever."""
        try:
            async with trio.open_nursery() as nursery:
                async for incoming in self._to_run:
                    nursery.start_soon(self._run_one, incoming)
        finally:
            # Accepted in the last instant, and never begun.
            for incoming in list(self._incoming.values()):
                self._end(incoming, _ended())

    async def on_offer(self, iq: Iq) -> Element:
        """Answer an offer (XEP-0095 section 4.2)."""
        sender = self._check_sender(iq)
        assert iq.payload is not None
        offer = si.read_offer(iq.payload)
        try:
            incoming = await self._accept(sender, offer, iq.payload)
        except DeclinedError as error:
            log.info("declined a file from %s: %s", sender, error)
            raise StanzaError(ErrorType.CANCEL, "forbidden", str(error)) from error
        except TransferError as error:
            log.warning("cannot take a file from %s: %s", sender, error)
            raise _refusal(error) from error
        self._register(incoming)
        offset = incoming.progress.offset if offer.ranged else 0
        return si.make_answer(si.Answer(method=si.BYTESTREAMS, offset=offset), offer)

    async def on_bytestream(self, iq: Iq) -> Element:
        """Answer the opening of a SOCKS5 bytestream (XEP-0065 section 6.3)."""
        sender = self._check_sender(iq)
        assert iq.payload is not None
        query = s5b.read_query(iq.payload)
        incoming = self._incoming.get((sender, query.sid))
        if incoming is None:
            raise StanzaError(
                ErrorType.MODIFY, "not-acceptable", "no such transfer was accepted"
            )
        schema.check(iq.payload)
        return await incoming.opening.ask(iq.payload)

    async def on_finish(self, iq: Iq) -> Element:
        """Answer the question for a receipt, when the file is durable."""
        sender = self._check_sender(iq)
        assert iq.payload is not None
        key = sender.bare, si.read_finish(iq.payload).sid
        if receipt := self._receipts.get(key):
            return si.make_receipt(receipt)
        incoming = self._incoming.get((sender, key[1]))
        if incoming is None:
            raise _ended()
        schema.check(iq.payload)
        try:
            return await incoming.finishing.ask(iq.payload)
        except StanzaError:
            # Asked a second time while the disk was busy with the first, whose stream broke.
            if receipt := self._receipts.get(key):
                return si.make_receipt(receipt)
            raise

    def _check_sender(self, iq: Iq) -> JID:
        if iq.type != "set":
            raise StanzaError(ErrorType.MODIFY, "bad-request", "this is asked by set")
        if iq.sender is None or not iq.sender.resource:
            raise StanzaError(ErrorType.AUTH, "forbidden")
        return iq.sender

    async def _accept(self, sender: JID, offer: si.Offer, payload: Element) -> Incoming:
        # First who, then what: a stranger learns nothing and costs nothing.
        inbox = self._inbox_for(sender.bare, offer.sync.folder if offer.sync else "")
        schema.check(payload)
        si.choose_method(offer, (si.BYTESTREAMS,))
        if offer.size is None:
            raise StanzaError(
                ErrorType.MODIFY, "bad-request", "the size of the file is missing"
            )
        if offer.sync is not None:
            components = paths.split(offer.sync.path)
        else:
            components = (paths.last_component(offer.name),)
        path = "/".join(components)
        self._check_sid(sender, offer.sid)
        if offer.sync is not None:
            await self._end_other((sender.bare, inbox.folder, path))
            if present := await self._is_there(sender, offer, inbox, components):
                return Incoming(sender, offer, inbox, components, None, present)
            mtime_ns = offer.sync.mtime_ns
            key = key_of(str(sender.bare), inbox.folder, path, offer.size, mtime_ns)
        else:
            key = f"{secrets.token_hex(24)}.part"
        self._check_limits(sender)
        partial = await trio.to_thread.run_sync(PartialFile, inbox.root, key, offer.size)
        if not offer.ranged and partial.offset:
            try:
                await trio.to_thread.run_sync(partial.restart)
            except BaseException:  # cancelled with its stream, or the disk refuses
                partial.close()
                raise
        return Incoming(sender, offer, inbox, components, partial, None)

    def _register(self, incoming: Incoming) -> None:
        """From here on the transfer has a task that cleans up behind it."""
        try:
            # Looked at again: other offers came while the disk was asked.
            self._check_limits(incoming.sender)
            self._check_sid(incoming.sender, incoming.offer.sid)
            self._check_slot(incoming)
        except StanzaError:
            incoming.close()
            raise
        self._incoming[incoming.sender, incoming.offer.sid] = incoming
        self._accepted.send_nowait(incoming)

    def _check_sid(self, sender: JID, sid: str) -> None:
        if (sender, sid) in self._incoming:
            raise StanzaError(ErrorType.MODIFY, "not-acceptable", "this sid is in use")

    def _check_slot(self, incoming: Incoming) -> None:
        if incoming.offer.sync is None:
            return  # never resumed, so each has a partial file of its own
        for other in self._incoming.values():
            if other.slot == incoming.slot and other.offer.sync is not None:
                raise StanzaError(
                    ErrorType.WAIT, "resource-constraint", "this file was just offered twice"
                )

    def _check_limits(self, sender: JID) -> None:
        same = sum(incoming.sender.bare == sender.bare for incoming in self._incoming.values())
        if same >= MAX_PER_PEER or len(self._incoming) >= MAX_OPEN:
            raise StanzaError(
                ErrorType.WAIT, "resource-constraint", "too many transfers at once"
            )

    async def _end_other(self, slot: tuple[JID, str, str]) -> None:
        """A sender that offers a file again has given its former transfer up."""
        for other in list(self._incoming.values()):
            if other.slot == slot and other.offer.sync is not None:
                other.scope.cancel()
                await other.ended.wait()

    async def _is_there(
        self, sender: JID, offer: si.Offer, inbox: Inbox, components: tuple[str, ...]
    ) -> Known | None:
        """Whether this very version came from this sender before, and still lies there."""
        known = await self._known(inbox, "/".join(components))
        if known is None or offer.sync is None or known.peer != sender.bare:
            return None
        if (known.source_size, known.source_mtime_ns) != (offer.size, offer.sync.mtime_ns):
            return None
        found = await trio.to_thread.run_sync(identity_of, inbox.root, components)
        return known if found == known.identity else None

    async def _run_one(self, incoming: Incoming) -> None:
        refusal = _ended()
        try:
            with incoming.scope, self._watch(incoming):
                await self._receive(incoming)
        except SyncdError as error:
            log.warning("receiving %s from %s: %s", incoming.path, incoming.sender, error)
            refusal = _refusal(error)
        except Exception:
            # A bug that one file brings to light must not end the transfers of all others.
            log.exception("receiving %s from %s", incoming.path, incoming.sender)
        finally:
            self._end(incoming, refusal)

    def _end(self, incoming: Incoming, refusal: StanzaError) -> None:
        del self._incoming[incoming.sender, incoming.offer.sid]
        incoming.opening.close(refusal)
        incoming.finishing.close(refusal)
        incoming.close()
        incoming.ended.set()

    async def _receive(self, incoming: Incoming) -> None:
        if incoming.present is not None:
            await self._confirm_present(incoming, incoming.present)
            return
        offer, partial = incoming.offer, incoming.partial
        assert partial is not None
        hasher = blake3.blake3()
        await pump.hash_prefix(partial.fd, partial.offset, hasher)
        # Between syncds nothing left to send needs no bytestream; a plain client opens one.
        if offer.sync is None or partial.offset < incoming.size:
            await self._take_bytes(incoming, partial, hasher)
        if offer.sync is None:
            await self._place(incoming, partial, hasher.digest())
            return
        call, finish = await _finish_of(incoming)
        try:
            if (finish.size, finish.digest) != (offer.size, hasher.digest()):
                # Resumed on a beginning that was not this file's: all of it is void.
                await trio.to_thread.run_sync(partial.discard)
                raise IntegrityError("what arrived is not what was sent; it is sent anew")
            await self._place(incoming, partial, finish.digest)
        except SyncdError as error:
            call.fail(_refusal(error))
            raise
        self._give_receipt(incoming, call, finish)

    async def _confirm_present(self, incoming: Incoming, known: Known) -> None:
        call, finish = await _finish_of(incoming)
        if (finish.size, finish.digest) != (known.source_size, known.digest):
            # Same size and time, other content: the next offer must not find this shortcut.
            call.fail(StanzaError(ErrorType.WAIT, "conflict", "not the content that lies here"))
            forgotten = replace(known, source_size=-1, source_mtime_ns=-1)
            await self._arriving(
                Arriving(inbox=incoming.inbox, path=incoming.path, known=forgotten)
            )
            return
        self._give_receipt(incoming, call, finish)

    async def _take_bytes(
        self, incoming: Incoming, partial: PartialFile, hasher: blake3.blake3
    ) -> None:
        own = self._own_jid()
        if own is None:
            raise OfflineError("not connected to the server")
        with trio.move_on_after(OPEN_TIMEOUT) as waiting:
            call = await incoming.opening.next()
        if waiting.cancelled_caught:
            raise StalledError(f"{incoming.sender} opened no stream for {OPEN_TIMEOUT:.0f} s")
        query = s5b.read_query(call.payload)
        address = query.dstaddr or s5b.dstaddr(query.sid, incoming.sender, own)
        try:
            used, stream = await connect_first(query.streamhosts, address)
        except TransferError as error:
            # XEP-0065 section 6.3.3
            call.fail(StanzaError(ErrorType.CANCEL, "item-not-found", str(error)))
            raise
        try:
            call.answer(s5b.make_used(query.sid, used.jid))
            await pump.receive(
                stream,
                partial.fd,
                offset=partial.offset,
                length=incoming.size - partial.offset,
                hasher=hasher,
                progress=incoming.progress,
            )
        finally:
            await trio.aclose_forcefully(stream)

    async def _place(self, incoming: Incoming, partial: PartialFile, digest: bytes) -> None:
        """Make it durable, tell the journal, give it its name; in this order."""
        sync = incoming.offer.sync
        sealed = await trio.to_thread.run_sync(partial.seal, sync.mtime_ns if sync else None)
        who = incoming.sender.local or incoming.sender.domain
        spot = incoming.inbox.folder, incoming.path
        async with self._placing.setdefault(spot, trio.Lock()):
            before = await self._known(incoming.inbox, incoming.path)
            theirs = before.identity if before and before.peer == incoming.sender.bare else None
            for _ in range(MAX_RACES):
                place = await trio.to_thread.run_sync(
                    partial.choose_place, incoming.components, theirs, digest, who
                )
                identity = place.existing if place.action is Action.SAME else sealed
                assert identity is not None
                await self._arriving(_arriving(incoming, place, identity, digest))
                if place.action is Action.SAME:
                    await trio.to_thread.run_sync(partial.discard)
                    return
                try:
                    await trio.to_thread.run_sync(partial.publish, place)
                except FileExistsError:
                    continue
                log.info("received %s from %s", "/".join(place.components), incoming.sender)
                return
        raise TransferError(f"{incoming.path} is created by another program all the time")

    def _give_receipt(self, incoming: Incoming, call: _Call, finish: si.Finish) -> None:
        self._receipts[incoming.sender.bare, finish.sid] = finish
        while len(self._receipts) > MAX_RECEIPTS:
            self._receipts.popitem(last=False)
        call.answer(si.make_receipt(finish))


async def _finish_of(incoming: Incoming) -> tuple[_Call, si.Finish]:
    with trio.move_on_after(FINISH_TIMEOUT) as waiting:
        call = await incoming.finishing.next()
    if waiting.cancelled_caught:
        raise StalledError(f"{incoming.sender} did not say that the file is complete")
    return call, si.read_finish(call.payload)


def _arriving(incoming: Incoming, place: Place, identity: Identity, digest: bytes) -> Arriving:
    sync = incoming.offer.sync
    return Arriving(
        inbox=incoming.inbox,
        path="/".join(place.components),
        known=Known(
            peer=incoming.sender.bare,
            identity=identity,
            source_size=identity.size,
            source_mtime_ns=sync.mtime_ns if sync else identity.mtime_ns,
            digest=digest,
        ),
    )


def _ended() -> StanzaError:
    return StanzaError(ErrorType.WAIT, "item-not-found", "that transfer has ended")


def _refusal(error: SyncdError) -> StanzaError:
    """What the sender hears when its file could not be taken."""
    if isinstance(error, StanzaError):
        return error
    kind = ErrorType.WAIT if error.type is ErrorType.WAIT else ErrorType.CANCEL
    condition = "resource-constraint" if kind is ErrorType.WAIT else "not-acceptable"
    return StanzaError(kind, condition, str(error))
