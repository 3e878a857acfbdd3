"""The receiving end: offers are judged, bytes become partial files, files get their names.

One task per accepted offer, in straight line: offer, bytestream, bytes, ``<finish/>``, place.
The iq handlers only carry requests to that task and its answers back (`incoming`), so a
stream that breaks takes no transfer with it: the sender asks again on the next one.

More than 400 lines: the handlers and the task are the two halves of one protocol, and each
is understood only beside the other.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import weakref
from collections import OrderedDict
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from syncd.bytestreams import s5b
from syncd.bytestreams.outgoing import SMALL
from syncd.disk import paths
from syncd.disk.beneath import check_twins, count_new, explain, open_parent
from syncd.disk.partial import (
    Action,
    Identity,
    PartialFile,
    Place,
    claim,
    identity_of,
    key_of,
)
from syncd.errors import (
    DeclinedError,
    ErrorType,
    IntegrityError,
    OfflineError,
    RemoteProtocolError,
    StalledError,
    StanzaError,
    SyncdError,
    TransferError,
)
from syncd.transfer import pump, schema, sealing, si, taking
from syncd.transfer.incoming import (
    Allowance,
    Arriving,
    Call,
    Inbox,
    Incoming,
    Known,
    Present,
    is_resumable,
    slot_of,
    start_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.bytestreams.inband import Inband, Slot
    from syncd.transfer.sealing import Seals
    from syncd.trust import handshake
    from syncd.xmpp.jid import JID
    from syncd.xmpp.stanza import Iq

log = logging.getLogger(__name__)

# A stream of no known length ends when its sender says so. More than this nobody sends
# without knowing how much it is.
MAX_UNKNOWN = 1 << 40  # bytes
# From the last byte to <finish/>: the sender's stream may have to come back first.
FINISH_TIMEOUT = 120.0  # seconds
# Each holds a descriptor and a task; senders run `parallel` at a time, 4 by default.
MAX_PER_PEER = 64  # accepted offers of one bare JID
MAX_OPEN = 256  # accepted offers in all
# Receipts that may have been lost on their way; later the journal knows.
MAX_RECEIPTS = 1_024  # receipts
# Two programs that create the same name all the time are not ours to wait for.
MAX_RACES = 10  # tries


async def _nothing_beside(_inbox: Inbox, _path: str) -> list[Present]:
    return []


async def _nothing_held(_inbox: Inbox, _path: str, _sender: JID) -> None:
    return None


class _Anything:
    """Whoever is accepted may send as much as it likes."""

    def admit(self) -> None:
        pass

    def check(self, size: int) -> None:
        pass

    def reserve(self, wanted: int, *, known: bool, entries: int) -> int:
        return wanted

    def settle(self, granted: int, came: int, *, entries: int, made: int) -> None:
        pass


class Receiver:
    """Takes files.

    Args:
      own_jid: Our full JID, or None while we are offline.
      inbox_for: Where the files of this bare JID for this folder id go ("" if the offer names
        none); raises `DeclinedError` for strangers.
      known: What the journal knows of this path of this folder.
      arriving: Tells the journal of a file before it gets its final name.
      watch: Shows a running transfer to whoever asks for the status.
      inband: Takes streams through the server; None if that way is switched off.
      throttle: Slows down what comes from this bare JID.
      seals: Decides what is sealed; None: nothing ever.
      allowance: What this bare JID, one that is accepted from, may take of us.
      beside: What the journal knows of files that were kept beside this path.
      held: Which version of ours this bare JID has had under this path, as it confirmed.
      is_there: Whether this full JID is known to be online.
    """

    def __init__(
        self,
        *,
        own_jid: Callable[[], JID | None],
        inbox_for: Callable[[JID, str], Inbox],
        known: Callable[[Inbox, str], Awaitable[Known | None]],
        arriving: Callable[[Arriving], Awaitable[None]],
        watch: Callable[[Incoming], AbstractContextManager[None]],
        inband: Inband | None = None,
        throttle: Callable[[JID], pump.Throttle | None] = pump.unlimited,
        seals: Seals | None = None,
        allowance: Callable[[JID], Allowance] = lambda _: _Anything(),
        beside: Callable[[Inbox, str], Awaitable[Sequence[Present]]] = _nothing_beside,
        held: Callable[[Inbox, str, JID], Awaitable[Identity | None]] = _nothing_held,
        is_there: Callable[[JID], bool] = lambda _: False,
    ) -> None:
        self._own_jid = own_jid
        self._inbox_for = inbox_for
        self._known = known
        self._arriving = arriving
        self._watch = watch
        self._inband = inband
        self._throttle = throttle
        self._seals = seals
        self._allowance = allowance
        self._beside = beside
        self._held = held
        self._is_there = is_there
        # What we can do, what we like best first (XEP-0096 section 3.1).
        self._methods = (si.BYTESTREAMS, si.IBB) if inband else (si.BYTESTREAMS,)
        self._incoming: dict[tuple[JID, str], Incoming] = {}
        self._receipts: OrderedDict[tuple[JID, str], si.Finish] = OrderedDict()
        # One file at a time comes to one place; the locks live as long as somebody waits.
        self._placing: weakref.WeakValueDictionary[tuple[str, str], trio.Lock] = (
            weakref.WeakValueDictionary()
        )
        # One at a time makes directories below one root, so that each counts once.
        self._making: weakref.WeakValueDictionary[Path, trio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._admission = pump.Admission()
        self._accepted, self._to_run = trio.open_memory_channel[Incoming](MAX_OPEN)

    async def run(self) -> None:
        """Run accepted transfers, for ever."""
        try:
            async with trio.open_nursery() as nursery:
                async for incoming in self._to_run:
                    nursery.start_soon(self._run_one, incoming)
        finally:
            self._accepted.close()
            # Accepted in the last instant, and never begun.
            for incoming in list(self._incoming.values()):
                await self._end(incoming, _ended())

    async def on_offer(self, iq: Iq) -> Element:
        """Answer an offer (XEP-0095 section 4.2)."""
        sender = self._check_sender(iq)
        assert iq.payload is not None
        try:
            # First who, then what: a stranger learns nothing and costs nothing, whatever the
            # rest of the offer says.
            inbox = self._inbox_for(sender.bare, si.folder_of(iq.payload))
            self._allowance(sender.bare).admit()
            offer = si.read_offer(iq.payload)
            incoming = await self._accept(sender, inbox, offer, iq.payload)
        except DeclinedError as error:
            log.info("declined a file from %s: %s", sender, _explained(error))
            raise StanzaError(ErrorType.CANCEL, "forbidden", str(error)) from error
        except TransferError as error:
            log.warning("cannot take a file from %s: %s", sender, _explained(error))
            raise _refusal(error) from error
        except StanzaError as error:
            log.info("refused an offer of %s: %s", sender, error)
            raise
        try:
            self._register(incoming)
        except StanzaError:
            self._settle(incoming)
            with trio.CancelScope(shield=True):
                await pump.on_disk(incoming.close)
            raise
        await incoming.listening.wait()
        if incoming.ended.is_set():
            raise _ended()
        answer = si.Answer(
            method=si.choose_method(offer, self._methods),
            offset=incoming.start,
            seal=incoming.seal.answer.attributes() if incoming.seal else None,
        )
        return si.make_answer(answer, offer)

    async def on_bytestream(self, iq: Iq) -> Element:
        """Answer the opening of a SOCKS5 bytestream (XEP-0065 section 6.3)."""
        sender = self._check_sender(iq)
        assert iq.payload is not None
        query = s5b.read_query(iq.payload)
        incoming = self._incoming.get((sender, query.sid))
        if incoming is None:
            # COMPAT(psi): as a receiver it opens one for a file of ours; refused, it goes on
            # by the book.
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

    async def _accept(
        self, sender: JID, inbox: Inbox, offer: si.Offer, payload: Element
    ) -> Incoming:
        schema.check(payload)
        si.choose_method(offer, self._methods)
        if offer.sync is not None:
            _check_sync(offer)
        if offer.sync is not None and inbox.folder:
            components = paths.split(
                offer.sync.path, portable=inbox.portable, hidden=inbox.hidden
            )
        else:
            # Of a syncd the name in <sync/>: the other one is not among what it signs.
            name = offer.sync.path if offer.sync is not None else offer.name
            components = (paths.last_component(name),)
        path = "/".join(components)
        self._check_sid(sender, offer.sid)
        sealed = await self._check_seal(sender, offer)
        slot = slot_of(sender, offer, inbox, path)
        if is_resumable(offer):
            await self._replace(sender, offer, slot)
        present = await self._find_present(sender, offer, inbox, components)
        if present is not None:
            return Incoming(sender, offer, inbox, components, None, present, sealed)
        self._check_limits(sender)
        self._check_threads(sender, offer)
        self._allowance(sender.bare).check(offer.size or 0)
        if inbox.portable:
            await pump.on_disk(check_twins, inbox.root, components)
        key = _key(offer, slot)
        # Now, and not when the file is whole: what the sender had when it made the offer.
        held = await self._held(inbox, path, sender.bare) if offer.sync else None
        # First whether it may come at all: a refused offer leaves nothing on the disk.
        claimed, entries = await pump.on_disk(
            _look_ahead, inbox.root, key, offer.size or 0, components
        )
        granted = self._reserve(sender, offer, start_of(offer, claimed), entries)
        incoming = None
        try:
            partial = await pump.on_disk(PartialFile, inbox.root, key, offer.size or 0)
            incoming = Incoming(sender, offer, inbox, components, partial, None, sealed, held)
            incoming.granted, incoming.entries = granted, entries
        finally:
            if incoming is None:
                self._allowance(sender.bare).settle(granted, 0, entries=entries, made=0)
        return incoming

    def _reserve(self, sender: JID, offer: si.Offer, start: int, entries: int) -> int:
        """Set aside what a file may still bring; raises if its sender may not send it."""
        most = MAX_UNKNOWN if offer.size is None else offer.size
        return self._allowance(sender.bare).reserve(
            most - start, known=offer.size is not None, entries=entries
        )

    async def _check_seal(self, sender: JID, offer: si.Offer) -> handshake.Offer | None:
        if self._seals is None:
            return None
        own = self._own_jid()
        if own is None:
            raise OfflineError("not connected to the server")
        try:
            return await self._seals.take_offer(offer, sender, own)
        except (RemoteProtocolError, IntegrityError) as error:
            raise StanzaError(ErrorType.MODIFY, "bad-request", str(error)) from error

    def _register(self, incoming: Incoming) -> None:
        """From here on the transfer has a task that cleans up behind it.

        Raises:
          StanzaError: It has none; the caller lets go of it.
        """
        # Looked at again: other offers came while the disk was asked.
        self._check_limits(incoming.sender)
        if incoming.partial is not None:
            self._check_threads(incoming.sender, incoming.offer)
        self._check_sid(incoming.sender, incoming.offer.sid)
        self._check_slot(incoming)
        try:
            self._accepted.send_nowait(incoming)
        except trio.ClosedResourceError as error:
            raise _ended() from error
        if incoming.sealed is not None:
            assert self._seals is not None
            incoming.seal = self._seals.answer(incoming.sealed, incoming.start)
        self._incoming[incoming.sender, incoming.offer.sid] = incoming
        if incoming.partial is not None:
            self._admission.begin(
                incoming,
                incoming.sender.bare,
                trio.current_time(),
                short=_is_short(incoming.offer),
            )

    def _settle(self, incoming: Incoming) -> None:
        """Count what came; what did not may come in another transfer."""
        self._allowance(incoming.sender.bare).settle(
            incoming.granted,
            incoming.progress.offset - incoming.began,
            entries=incoming.entries,
            made=incoming.made,
        )
        incoming.granted = incoming.entries = incoming.made = 0
        incoming.began = incoming.progress.offset

    def _check_sid(self, sender: JID, sid: str) -> None:
        # COMPAT(psi): its sids have 16 bits and come again; only two at a time are refused.
        if (sender, sid) in self._incoming:
            raise StanzaError(ErrorType.MODIFY, "not-acceptable", "this sid is in use")

    def _check_slot(self, incoming: Incoming) -> None:
        if not incoming.resumable:
            return  # each has a partial file of its own
        for other in self._incoming.values():
            if other.slot == incoming.slot and other.resumable:
                raise StanzaError(
                    ErrorType.WAIT, "resource-constraint", "this file was just offered twice"
                )

    def _check_limits(self, sender: JID) -> None:
        same = sum(incoming.sender.bare == sender.bare for incoming in self._incoming.values())
        if same >= MAX_PER_PEER or len(self._incoming) >= MAX_OPEN:
            raise StanzaError(
                ErrorType.WAIT, "resource-constraint", "too many transfers at once"
            )

    def _check_threads(
        self, sender: JID, offer: si.Offer, replaced: Incoming | None = None
    ) -> None:
        """Refuse what would wait for a thread longer than its sender does.

        That one offers it again later, and must not blame the way. But a plain client would
        never: one that has sent many small files at once has waited for its own share.
        """
        now, short = trio.current_time(), _is_short(offer)
        room = self._admission.has_room(now, short=short, replaced=replaced)
        if offer.sync is not None:
            room = room and self._admission.has_share(
                sender.bare, now, short=short, replaced=replaced
            )
        if not room:
            raise StanzaError(
                ErrorType.WAIT, "resource-constraint", "too many slow transfers at once"
            )

    async def _replace(self, sender: JID, offer: si.Offer, slot: tuple[str, str, str]) -> None:
        """End the former transfer of a file: who offers it again has given that up.

        Raises:
          StanzaError: There is no thread for another, and the former one goes on. Or another
            of the sender's resources is sending the file: were that one ended, it would offer
            the file again as well, and neither would ever get through.
        """
        for other in list(self._incoming.values()):
            if other.slot == slot and other.resumable:
                if other.sender != sender and self._is_there(other.sender):
                    raise StanzaError(
                        ErrorType.WAIT,
                        "resource-constraint",
                        "another client of yours is sending this file",
                    )
                if other.partial is not None:  # else nothing is to come, of this one either
                    self._check_threads(sender, offer, other)
                other.scope.cancel()
                await other.ended.wait()

    async def _find_present(
        self, sender: JID, offer: si.Offer, inbox: Inbox, components: tuple[str, ...]
    ) -> Present | None:
        """This very version, if it came from this sender before, and still lies there."""
        if offer.sync is None:
            return None
        version = sender.bare, offer.size, offer.sync.mtime_ns
        path = "/".join(components)
        known = await self._known(inbox, path)
        found = await pump.on_disk(identity_of, inbox.root, components)
        if known is not None and known.peer == sender.bare and known.identity == found:
            if _version(known) == version:
                return Present(path=path, known=known)
            if inbox.folder:
                return None  # another one of its own, whose place it takes
        if found is None:
            return None
        # It could only come beside what stands there; once is enough.
        for copy in await self._beside(inbox, path):
            if _version(copy.known) == version:
                parts = copy.path.split("/")
                lies = await pump.on_disk(identity_of, inbox.root, parts)
                if lies == copy.known.identity:
                    return copy
        return None

    async def _run_one(self, incoming: Incoming) -> None:
        refusal = _ended()
        try:
            with self._ending(incoming), incoming.scope, self._watch(incoming):
                await self._receive(incoming)
        except SyncdError as error:
            log.warning(
                "receiving %s from %s: %s", incoming.path, incoming.sender, _explained(error)
            )
            refusal = _refusal(error)
        except Exception:
            # A bug that one file brings to light must not end the transfers of all others.
            log.exception("receiving %s from %s", incoming.path, incoming.sender)
        finally:
            await self._end(incoming, refusal)

    def _ending(self, incoming: Incoming) -> AbstractContextManager[None]:
        if self._seals is None:
            return nullcontext()
        return self._seals.ending(incoming.sender, incoming.scope)

    async def _check_still(self, incoming: Incoming) -> None:
        if self._seals is not None:
            await self._seals.check_still(incoming.sender, incoming.seal)

    async def _end(self, incoming: Incoming, refusal: StanzaError) -> None:
        incoming.opening.close(refusal)
        incoming.finishing.close(refusal)
        with trio.CancelScope(shield=True):
            await pump.on_disk(incoming.close)
        self._settle(incoming)
        # Not before its file is let go of: the next offer of it may come now.
        del self._incoming[incoming.sender, incoming.offer.sid]
        self._admission.end(incoming)
        incoming.listening.set()  # nobody needs to wait for that any more
        incoming.ended.set()

    async def _receive(self, incoming: Incoming) -> None:
        async with self._listening(incoming) as slot:
            if incoming.present is not None:
                await self._confirm_present(incoming, incoming.present)
            else:
                await self._take(incoming, slot)

    @asynccontextmanager
    async def _listening(self, incoming: Incoming) -> AsyncIterator[Slot | None]:
        """Expect a stream through the server before the sender hears that it may open one."""
        if self._inband is None or incoming.present is not None:
            incoming.listening.set()
            yield None
            return
        due = incoming.seal.length if incoming.seal else _end(incoming) - incoming.start
        if incoming.offer.sync is None:
            # COMPAT(Gajim): in-band it sends all of the file, wherever it was asked to begin.
            due = _end(incoming)
        async with self._inband.expect(incoming.sender, incoming.offer.sid, due) as slot:
            incoming.listening.set()
            yield slot

    async def _take(self, incoming: Incoming, slot: Slot | None) -> None:
        offer, partial = incoming.offer, incoming.partial
        assert partial is not None
        await self._prove(incoming, partial)
        md5 = hashlib.md5(usedforsecurity=False) if offer.md5 else None
        # Between syncds nothing left to send needs no bytestream; a plain client opens one.
        if offer.sync is None or incoming.start < (offer.size or 0):
            await self._take_bytes(incoming, partial, md5, slot)
        digest = partial.blocks.digest()
        if offer.sync is None:
            if md5 is not None and md5.hexdigest() != offer.md5:
                await pump.on_disk(partial.quarantine)
                raise IntegrityError("what arrived has another MD5 than the sender gave")
            await self._check_still(incoming)
            await self._place(incoming, partial, digest)
            return
        call, finish = await _finish_of(incoming)
        try:
            finish = sealing.open_finish(incoming.seal, finish)
            await self._check_still(incoming)
            if (finish.size, finish.digest) != (offer.size, digest):
                # Forged on its way, or at its source: none of it can be gone on from.
                await pump.on_disk(partial.quarantine)
                raise IntegrityError("what arrived is not what was sent; it is sent anew")
            place = await self._place(incoming, partial, finish.digest)
        except SyncdError as error:
            call.fail(_refusal(error))
            raise
        beside = place.action is Action.CONFLICT
        self._give_receipt(incoming, call, finish, beside=beside)

    async def _prove(self, incoming: Incoming, partial: PartialFile) -> None:
        """Make sure of what has arrived before; the sender reads its part meanwhile.

        Raises:
          IntegrityError: It is less than was told to the sender.
        """
        claimed = partial.offset
        await pump.prove(partial, incoming.sender.bare)
        if partial.offset < claimed and incoming.start:
            raise IntegrityError("a part of what had arrived is damaged; that is sent again")

    async def _confirm_present(self, incoming: Incoming, present: Present) -> None:
        known, beside = present.known, present.path != incoming.path
        call, finish = await _finish_of(incoming)
        try:
            finish = sealing.open_finish(incoming.seal, finish)
            await self._check_still(incoming)
        except SyncdError as error:
            call.fail(_refusal(error))
            raise
        if (finish.size, finish.digest) != (known.source_size, known.digest):
            # Same size and time, other content: the next offer must not find this shortcut.
            call.fail(StanzaError(ErrorType.WAIT, "conflict", "not the content that lies here"))
            forgotten = replace(known, source_size=-1, source_mtime_ns=-1)
            await self._arriving(
                Arriving(
                    inbox=incoming.inbox,
                    path=present.path,
                    known=forgotten,
                    source_path=incoming.path if beside else None,
                )
            )
            return
        self._give_receipt(incoming, call, finish, beside=beside)

    async def _take_bytes(
        self,
        incoming: Incoming,
        partial: PartialFile,
        md5: pump.Hasher | None,
        slot: Slot | None,
    ) -> None:
        own = self._own_jid()
        if own is None:
            raise OfflineError("not connected to the server")
        async with taking.opened(incoming, own, slot) as stream:
            incoming.began = incoming.start
            if incoming.start < partial.offset:
                if incoming.start:
                    there = await taking.check_overlap(stream, partial, incoming.start)
                    if not there:
                        self._begin_anew(incoming, partial)
                    elif slot is not None:
                        slot.shorten(_end(incoming) - incoming.start)
                else:
                    await pump.on_disk(partial.restart)
                    incoming.progress.offset = partial.offset
            hashers: list[pump.Hasher] = [partial.blocks]
            if md5 is not None:
                peer = incoming.sender.bare
                await pump.hash_prefix(partial.fd, partial.offset, md5, peer)
                hashers.append(md5)
            try:
                await pump.receive(
                    stream,
                    partial.fd,
                    offset=partial.offset,
                    length=_end(incoming) - partial.offset,
                    until_end=incoming.size is None,
                    hasher=pump.Hashers(hashers),
                    progress=incoming.progress,
                    throttle=self._throttle(incoming.sender.bare),
                    opener=incoming.seal.opener() if incoming.seal else None,
                    peer=incoming.sender.bare,
                )
            except IntegrityError:
                # A plain client that sends too much has another file, or began it anew where
                # the overlap could not show it: the next time all of it is asked for.
                if incoming.offer.sync is None:
                    await pump.on_disk(partial.quarantine)
                raise

    def _begin_anew(self, incoming: Incoming, partial: PartialFile) -> None:
        """All of the file comes once more: then all of it counts, and not what was asked for.

        Raises:
          StanzaError: That is more than its sender may send today.
        """
        incoming.began, incoming.progress.offset = 0, partial.offset
        entries = incoming.entries
        self._settle(incoming)
        left = partial.offset  # which is counted already
        incoming.granted = self._reserve(incoming.sender, incoming.offer, left, entries)
        incoming.entries = entries

    async def _place(self, incoming: Incoming, partial: PartialFile, digest: bytes) -> Place:
        """Make it durable, tell the journal, give it its name; in this order."""
        sync = incoming.offer.sync
        sealed = await pump.on_disk(partial.seal, sync.mtime_ns if sync else None)
        who = incoming.sender.local or incoming.sender.domain
        portable = incoming.inbox.portable
        # Two that must not come together may lie anywhere in the tree: then one at a time.
        spot = incoming.inbox.folder, "" if portable else incoming.path
        async with self._placing.setdefault(spot, trio.Lock()):
            if portable:
                # Looked at again: another of the same name may have come meanwhile.
                root, components = incoming.inbox.root, incoming.components
                await pump.on_disk(check_twins, root, components)
            theirs = await self._replaceable(incoming)
            directories = await self._make_directories(incoming)
            for _ in range(MAX_RACES):
                incoming.made = directories
                place = await pump.on_disk(
                    partial.choose_place, incoming.components, theirs, digest, who
                )
                identity = place.existing if place.action is Action.SAME else sealed
                assert identity is not None
                await self._arriving(_arriving(incoming, place, identity, digest))
                if place.action is Action.SAME:
                    await pump.on_disk(partial.discard)
                    return place
                incoming.made += 1
                try:
                    await pump.on_disk(partial.publish, place)
                except FileExistsError:
                    continue
                log.info("received %s from %s", "/".join(place.components), incoming.sender)
                return place
        raise TransferError(f"{incoming.path} is created by another program all the time")

    async def _make_directories(self, incoming: Incoming) -> int:
        """Make those that the file still needs; those that others have made are not counted.

        Returns:
          How many.
        """
        most = incoming.entries - 1
        if most <= 0:
            return 0
        root = incoming.inbox.root
        async with self._making.setdefault(root, trio.Lock()):
            made = await pump.on_disk(_make_directories, root, incoming.components)
        return min(made, most)

    async def _replaceable(self, incoming: Incoming) -> Identity | None:
        """Which version the sender's own takes the place of, if that is what stands there.

        The last one that it put there; or the one of ours that it had, and has changed since.
        """
        if not incoming.inbox.folder:
            return None  # files that share no more than a name: all of them are kept
        sync, held = incoming.offer.sync, incoming.held
        # What is older than ours is no change of ours: it came to the sender from a third.
        if sync is not None and held is not None and sync.mtime_ns > held.mtime_ns:
            root, components = incoming.inbox.root, incoming.components
            if await pump.on_disk(identity_of, root, components) == held:
                return held
        before = await self._known(incoming.inbox, incoming.path)
        return before.identity if before and before.peer == incoming.sender.bare else None

    def _give_receipt(
        self, incoming: Incoming, call: Call, finish: si.Finish, *, beside: bool
    ) -> None:
        # One that is asked for again is the same.
        receipt = sealing.make_receipt(incoming.seal, finish, beside=beside)
        self._receipts[incoming.sender.bare, finish.sid] = receipt
        while len(self._receipts) > MAX_RECEIPTS:
            self._receipts.popitem(last=False)
        call.answer(si.make_receipt(receipt))


def _look_ahead(root: Path, key: str, size: int, components: Sequence[str]) -> tuple[int, int]:
    """How much of a file has come before, bytes, and what would have to be made for it."""
    return claim(root, key, size), count_new(root, components)


def _make_directories(root: Path, components: Sequence[str]) -> int:
    """Make what is missing on the way to a file; returns how many directories that was."""
    missing = count_new(root, components) - 1
    try:
        with open_parent(root, components, create=True):
            return missing
    except OSError as error:
        raise explain(error, "the file cannot be stored") from error


async def _finish_of(incoming: Incoming) -> tuple[Call, si.Finish]:
    patience = FINISH_TIMEOUT
    if incoming.offer.sync is not None:
        # With nothing left to send it may have to hash all of it yet.
        patience += pump.hashing_time(incoming.start)
    with trio.move_on_after(patience) as waiting:
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
        source_path=incoming.path if place.action is Action.CONFLICT else None,
    )


def _version(known: Known) -> tuple[JID, int, int]:
    """Whose version of the file it is, and which."""
    return known.peer, known.source_size, known.source_mtime_ns


def _is_short(offer: si.Offer) -> bool:
    """Whether a file can arrive soon, so that others may wait for its thread."""
    return offer.size is not None and offer.size <= SMALL


def _end(incoming: Incoming) -> int:
    """Where the last byte ends at the latest."""
    return incoming.start + incoming.granted if incoming.size is None else incoming.size


def _check_sync(offer: si.Offer) -> None:
    """See that a syncd says what its file needs.

    Raises:
      StanzaError: There is no size, or no ``<range/>``: a file that is there already, or in
        part, can only be answered with an offset.
    """
    if offer.size is None:
        raise StanzaError(ErrorType.MODIFY, "bad-request", "the size of the file is missing")
    if not offer.ranged:
        raise StanzaError(ErrorType.MODIFY, "bad-request", "<sync/> needs <range/> in <file/>")


def _key(offer: si.Offer, slot: tuple[str, str, str]) -> str:
    """Name the partial file of an offer."""
    if not is_resumable(offer):
        return f"{secrets.token_hex(24)}.part"
    assert offer.size is not None
    return key_of(*slot, offer.size, offer.sync.mtime_ns if offer.sync else 0)


def _ended() -> StanzaError:
    return StanzaError(ErrorType.WAIT, "item-not-found", "that transfer has ended")


def _explained(error: SyncdError) -> str:
    """For our own log; the hint is for our user, and not told to the sender."""
    return f"{error}; {error.hint}" if error.hint else str(error)


def _refusal(error: SyncdError) -> StanzaError:
    """What the sender hears when its file could not be taken."""
    if isinstance(error, StanzaError):
        return error
    kind = ErrorType.WAIT if error.type is ErrorType.WAIT else ErrorType.CANCEL
    condition = "resource-constraint" if kind is ErrorType.WAIT else "not-acceptable"
    return StanzaError(kind, condition, str(error))
