"""The sending end: one file to one resource of a peer, from offer to receipt."""

from __future__ import annotations

import contextlib
import os
import secrets
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import blake3
import trio

from syncd.bytestreams import s5b
from syncd.disk import paths
from syncd.disk.beneath import open_source
from syncd.disk.partial import Identity, identity_of
from syncd.errors import (
    BytestreamError,
    ChangedError,
    DeclinedError,
    ErrorType,
    IntegrityError,
    OfflineError,
    StanzaError,
    SyncdError,
    TransferError,
)
from syncd.transfer import pump, si
from syncd.xmpp.xml import is_writable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.bytestreams.sockets import Listener
    from syncd.xmpp.jid import JID
    from syncd.xmpp.stanza import Iq, IqType

# A person may be asked there.
ANSWER_TIMEOUT = 180.0  # seconds
# A program looks at its disk. The server of a peer that vanished keeps its session for minutes
# (XEP-0198), and nobody answers then.
SYNCD_ANSWER_TIMEOUT = 45.0  # seconds
# The target tries our streamhosts one after the other, some clients for 7 s each.
USED_TIMEOUT = 120.0  # seconds
# The receiver has to bring the whole file to a slow disk first.
RECEIPT_TIMEOUT = 300.0  # seconds
# Each dead one costs some clients 7 s; Psi reads no more.
MAX_STREAMHOSTS = 5  # streamhosts
# How often the receipt is asked for when the stream breaks in between.
RECEIPT_TRIES = 3  # tries
# How long a broken stream may take to come back, before the delivery starts anew later.
RECONNECT_TIMEOUT = 60.0  # seconds


class Request(Protocol):
    """Sends an iq and returns its result; raises `StanzaError` or `OfflineError`."""

    async def __call__(  # noqa: D102 - the class says it
        self, kind: IqType, to: JID | None, payload: Element, timeout: float
    ) -> Iq: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The file to send.

    Attributes:
      root: Its folder on disk.
      folder: The folder's id.
      path: Below the folder, as on disk.
      version: Only this version is sent.
    """

    root: Path
    folder: str
    path: str
    version: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who gets it.

    Attributes:
      jid: A full JID.
      is_syncd: It takes ``<sync/>`` and gives receipts.
    """

    jid: JID
    is_syncd: bool


@dataclass(frozen=True, slots=True)
class Sent:
    """How a transfer ended well.

    Attributes:
      confirmed: The receiver holds it durably, and said so.
      digest: BLAKE3 of the file, 32 bytes.
    """

    confirmed: bool
    digest: bytes


class Sender:
    """Sends files.

    Args:
      request: Sends an iq.
      own_jid: Our full JID, or None while we are offline.
      wait_online: Returns when we are online.
      listener: Where targets connect to; None if direct connections are off.
      streamhosts: What we offer: host and port as others reach them.
      watch: Shows a running transfer to whoever asks for the status.
    """

    def __init__(
        self,
        *,
        request: Request,
        own_jid: Callable[[], JID | None],
        wait_online: Callable[[], Awaitable[None]],
        listener: Listener | None,
        streamhosts: Callable[[], list[tuple[str, int]]],
        watch: Callable[
            [Target, Source, pump.Progress], contextlib.AbstractContextManager[None]
        ],
    ) -> None:
        self._request = request
        self._own_jid = own_jid
        self._wait_online = wait_online
        self._listener = listener
        self._streamhosts = streamhosts
        self._watch = watch

    async def send(self, source: Source, target: Target) -> Sent:
        """Send one file.

        Returns:
          How it ended.

        Raises:
          ChangedError: The file is not the version that was to be sent.
          DeclinedError: The peer does not want it.
          BytestreamError, StalledError: No way there, or it broke.
          OfflineError: We, or the peer, went away.
        """
        offer = _make_offer(source, target)
        async with _opened(source) as fd:
            answer = await self._offer(offer, target)
            progress = pump.Progress(answer.offset)
            hasher = blake3.blake3()
            with self._watch(target, source, progress):
                await pump.hash_prefix(fd, answer.offset, hasher)
                # Nothing left to send needs no bytestream between syncds: an empty file,
                # or one that has arrived whole before its receipt was lost. A plain client
                # waits for a stream all the same.
                if answer.offset < source.version.size or not target.is_syncd:
                    await self._stream(fd, offer, answer, target, hasher, progress)
                await _check_unchanged(source)
                digest = hasher.digest()
                if target.is_syncd:
                    await self._finish(offer, target, digest)
        return Sent(confirmed=target.is_syncd, digest=digest)

    async def _offer(self, offer: si.Offer, target: Target) -> si.Answer:
        patience = SYNCD_ANSWER_TIMEOUT if target.is_syncd else ANSWER_TIMEOUT
        try:
            result = await self._request(
                "set", target.jid, si.make_offer(offer), patience
            )
        except StanzaError as error:
            raise explain(error, target.jid) from error
        return si.read_answer(result.payload, offer)

    async def _stream(
        self,
        fd: int,
        offer: si.Offer,
        answer: si.Answer,
        target: Target,
        hasher: blake3.blake3,
        progress: pump.Progress,
    ) -> None:
        stream = await self._open_bytestream(offer.sid, target)
        try:
            await pump.send(
                stream,
                fd,
                offset=answer.offset,
                length=(offer.size or 0) - answer.offset,
                hasher=hasher,
                progress=progress,
            )
        finally:
            # Right after the last byte: a proxy may keep the tail back until we close.
            await trio.aclose_forcefully(stream)

    async def _open_bytestream(self, sid: str, target: Target) -> trio.SocketStream:
        own = self._own_jid()
        if own is None:
            raise OfflineError("not connected to the server")
        if self._listener is None:
            raise BytestreamError(
                "direct connections are switched off, and no other way is open",
                hint="set bytestreams.direct = true",
            )
        # COMPAT(Psi): reads only five.
        reachable = self._streamhosts()[:MAX_STREAMHOSTS]
        hosts = [s5b.Streamhost(own, host, port) for host, port in reachable]
        address = s5b.dstaddr(sid, own, target.jid)
        aliases = s5b.dstaddr_aliases(sid, own, target.jid)
        with self._listener.expect(address, *aliases) as slot:
            query = s5b.make_query(sid, hosts)
            try:
                result = await self._request("set", target.jid, query, USED_TIMEOUT)
            except StanzaError as error:
                where = ", ".join(f"{host.host}:{host.port}" for host in hosts) or "no address"
                raise BytestreamError(
                    f"{target.jid.bare} cannot connect to us at {where} [{error.condition}]",
                    hint="name the address that the peer reaches in bytestreams.advertise",
                ) from error
            s5b.read_used(result.payload, hosts)
            return await slot.winner()

    async def _finish(self, offer: si.Offer, target: Target, digest: bytes) -> None:
        assert offer.size is not None
        finish = si.Finish(sid=offer.sid, size=offer.size, digest=digest)
        for attempt in range(1, RECEIPT_TRIES + 1):
            try:
                question = si.make_finish(finish)
                result = await self._request("set", target.jid, question, RECEIPT_TIMEOUT)
            except OfflineError:
                # The bytes are over there; only the question or the receipt was lost.
                if attempt == RECEIPT_TRIES:
                    raise
                with trio.move_on_after(RECONNECT_TIMEOUT):
                    await self._wait_online()
            except StanzaError as error:
                if error.condition == "item-not-found":
                    raise TransferError(
                        f"{target.jid.bare} has given this transfer up; it is offered again"
                    ) from error
                raise explain(error, target.jid) from error
            else:
                if si.read_receipt(result.payload) != finish:
                    raise IntegrityError(
                        f"{target.jid.bare} stored something else than was sent"
                    )
                return


def _make_offer(source: Source, target: Target) -> si.Offer:
    path = unicodedata.normalize("NFC", source.path)
    if not is_writable(path):
        raise DeclinedError(
            f"the name {path!r} cannot be sent: it is no valid text", hint="rename the file"
        )
    components = paths.split(path)
    # A time before 1970 is a clock gone wrong, and no reason not to deliver.
    mtime_ns = max(0, source.version.mtime_ns)
    sync = si.Sync(folder=source.folder, path=path, mtime_ns=mtime_ns)
    return si.Offer(
        sid=secrets.token_hex(16),  # 128 bits: nobody can claim a stream by guessing
        name=components[-1],
        size=source.version.size,
        methods=(si.BYTESTREAMS,),
        ranged=target.is_syncd,
        sync=sync if target.is_syncd else None,
    )


@contextlib.asynccontextmanager
async def _opened(source: Source) -> AsyncIterator[int]:
    """Open the file, and make sure that it is the version that was to be sent."""
    fd = await trio.to_thread.run_sync(open_source, source.root, source.path.split("/"))
    try:
        if Identity.of(os.fstat(fd)) != source.version:
            raise ChangedError("the file has changed since it was found")
        yield fd
    finally:
        os.close(fd)


async def _check_unchanged(source: Source) -> None:
    """Look at the path, not at our descriptor: that keeps a deleted file alive."""
    components = source.path.split("/")
    if await trio.to_thread.run_sync(identity_of, source.root, components) != source.version:
        raise ChangedError("the file changed, or went away, while it was being sent")


# RFC 6120's conditions, and what clients really answer with them.
_GONE = frozenset({"service-unavailable", "recipient-unavailable", "item-not-found", "gone"})
_DECLINED = frozenset({"forbidden", "not-acceptable", "not-authorized", "policy-violation"})


def explain(error: StanzaError, peer: JID) -> SyncdError:
    """Say in words what a refused request means for the delivery."""
    reason = f": {error.text}" if error.text else ""
    if error.app.endswith("}no-valid-streams") or error.app.endswith("}bad-profile"):
        return DeclinedError(
            f"{peer} and syncd have no way of transfer in common{reason} [{error.condition}]"
        )
    if error.condition in _GONE:
        return OfflineError(
            f"{peer} is offline, or this resource is{reason} [{error.condition}]"
        )
    if error.condition in _DECLINED:
        return DeclinedError(
            f"{peer.bare} does not accept the file{reason} [{error.condition}]",
            hint="ask them to add you to accept_from of the folder",
        )
    return TransferError(
        f"{peer.bare} refused the file{reason} [{error.condition}]",
        type=ErrorType.WAIT if error.type is ErrorType.WAIT else ErrorType.CANCEL,
    )
