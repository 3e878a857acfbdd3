"""The sending end: one file to one resource of a peer, from offer to receipt.

More than 400 lines: it is one story, whose later steps depend on what the earlier ones found
out of the file, of the peer and of the way.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import secrets
import sys
import termios
import unicodedata
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import blake3
import trio

from syncd.bytestreams import ibb, inband
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
    OpeningError,
    RemoteProtocolError,
    StalledError,
    StanzaError,
    SyncdError,
    TransferError,
    TruncatedError,
)
from syncd.transfer import pump, si
from syncd.transfer.incoming import NOT_ACCEPTED
from syncd.xmpp.xml import is_writable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from syncd.bytestreams.inband import Inband
    from syncd.bytestreams.outgoing import Place, Requester
    from syncd.transfer.sealing import Seal, Seals
    from syncd.xmpp.jid import JID
    from syncd.xmpp.stanza import Request

log = logging.getLogger(__name__)

# A person may be asked there.
ANSWER_TIMEOUT = 180.0  # seconds
# A program looks at its disk. The server of a peer that vanished keeps its session for minutes
# (XEP-0198), and nobody answers then.
SYNCD_ANSWER_TIMEOUT = 45.0  # seconds
# The receiver has to bring the whole file to a slow disk first.
RECEIPT_TIMEOUT = 300.0  # seconds
# In-band blocks on their way to a syncd, which takes them in order; others get one at a time.
SYNCD_WINDOW = 16  # blocks
# An in-band opening behind another way's failure, on its sid: who takes that takes it at once.
SAME_SID_TIMEOUT = 10.0  # seconds
# More of them some clients cannot count.
MAX_BLOCKS = 65_535  # blocks
# A hash of this much takes some 10 ms; larger files would keep the offer waiting.
MD5_UP_TO = 8 * 1024 * 1024  # bytes
# How long the end of a direct stream may take to be acknowledged: as long as TCP sends again
# what was lost twice or three times.
LINGER_TIMEOUT = 15.0  # seconds
LINGER_CHUNK = 4_096  # bytes
# How often the receipt is asked for when the stream breaks in between.
RECEIPT_TRIES = 3  # tries
# What kernels may keep of what they took, when none of it arrives: ours, and one in between
# that ends the connection and makes another (tcp(7): up to 4 and 6 MiB each). When more than
# that has gone, something did, even if the peer has nothing of it any more.
MAX_BUFFERED = 16 << 20  # bytes
# The same for a client that has to begin anew each time, and so never says what it had: only
# where a packet too large for the path gets lost, and no kernel in between takes anything.
MAX_IN_FLIGHT = 1 << 20  # bytes
# Transfers that broke, of which it is not known yet whether their way carried anything.
MAX_DOUBTS = 256  # transfers
# Who breaks off sooner was killed, or hung up: what swallows bytes keeps both ends waiting, for
# as long as they have patience. A firewall that resets connections is found the second time.
SWALLOWED_AFTER = 30.0  # seconds
# How long a broken stream may take to come back, before the delivery starts anew later.
RECONNECT_TIMEOUT = 60.0  # seconds


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
      can_seal: It has the feature ``urn:syncd:seal:1``.
    """

    jid: JID
    is_syncd: bool
    can_seal: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """How a transfer ended well.

    Attributes:
      confirmed: The receiver holds it durably, and said so.
      digest: BLAKE3 of the file, 32 bytes.
      sealed: Nobody in between could read or change it.
      beside: The receiver had another file there, and keeps both.
    """

    confirmed: bool
    digest: bytes
    sealed: bool = False
    beside: bool = False


class Sender:
    """Sends files.

    Args:
      request: Sends an iq.
      wait_online: Returns when we are online.
      requester: Opens SOCKS5 bytestreams; None if they are switched off.
      inband: Sends through the server; None if that is switched off.
      watch: Shows a running transfer to whoever asks for the status.
      throttle: Slows down what goes to this bare JID; None for no limit.
      own_jid: Our full JID, or None while we are offline.
      seals: Decides what is sealed; None: nothing ever.
      answer_timeout: How long a client that is no syncd may take to answer an offer, seconds;
        None: `ANSWER_TIMEOUT`.
    """

    def __init__(
        self,
        *,
        request: Request,
        wait_online: Callable[[], Awaitable[None]],
        requester: Requester | None,
        inband: Inband | None,
        watch: Callable[
            [Target, Source, pump.Progress], contextlib.AbstractContextManager[None]
        ],
        own_jid: Callable[[], JID | None],
        throttle: Callable[[JID], pump.Throttle | None] = pump.unlimited,
        seals: Seals | None = None,
        answer_timeout: float | None = None,
    ) -> None:
        self._request = request
        self._wait_online = wait_online
        self._requester = requester
        self._inband = inband
        self._watch = watch
        self._own_jid = own_jid
        self._throttle = throttle
        self._seals = seals
        self._answer_timeout = answer_timeout
        # Where a transfer that broke had begun, and whom to tell what became of its way.
        self._doubts: dict[tuple[JID, Source], _Doubt] = {}

    async def send(self, source: Source, target: Target) -> Sent:
        """Send one file, by the first way that works.

        Returns:
          How it ended.

        Raises:
          ChangedError: The file is not the version that was to be sent.
          DeclinedError: The peer does not want it.
          BytestreamError, StalledError: No way there, or it broke.
          OfflineError: We, or the peer, went away.
          TransferError: A person has decided against the peer meanwhile.
        """
        if self._seals is None:
            return await self._send(source, target)
        with trio.CancelScope() as scope, self._seals.ending(target.jid, scope):
            return await self._send(source, target)
        raise TransferError(f"{target.jid.bare} was blocked, or its key was forgotten")

    async def _send(self, source: Source, target: Target) -> Sent:
        methods = await self._methods(source.version.size, target)
        async with _opened(source) as (fd, changed):
            offer = await _make_offer(source, target, methods, fd)
            try:
                return await self._transfer(fd, changed, source, target, offer)
            except DeclinedError as error:
                if not _is_of_methods(error) or not self._may_offer_more(methods):
                    raise
                # Not for ever: what it can do may be what we cannot just now.
                raise BytestreamError(str(error), hint=error.hint) from error
            except BytestreamError as error:
                later = isinstance(error, OpeningError) and error.later
                if later or error.moved or methods == (si.IBB,) or si.IBB not in methods:
                    raise
                # Over there its sid may be half used up, so the next way is a new offer.
                log.info("%s; offering %s anew, through the server", error, source.path)
                failure = error
            offer = replace(offer, sid=_new_sid(), methods=(si.IBB,))
            try:
                return await self._transfer(fd, changed, source, target, offer)
            except DeclinedError as error:
                if not _is_of_methods(error):
                    raise
                # It takes nothing through the server; the first way may lead there later.
                raise failure from error

    def _may_offer_more(self, methods: tuple[str, ...]) -> bool:
        """Whether another time there may be a way that was not offered now."""
        return self._requester is not None and si.BYTESTREAMS not in methods

    async def _methods(self, size: int, target: Target) -> tuple[str, ...]:
        """What can be offered now (XEP-0096 section 3.1)."""
        methods = []
        # A way that is known to carry nothing is better than none.
        to = target.jid if self._inband is not None else None
        if self._requester is not None and await self._requester.ready(to):
            methods.append(si.BYTESTREAMS)
        if self._inband is not None:
            methods.append(si.IBB)
        # COMPAT(QXmpp, Gajim): their block counters do not wrap.
        countless = not target.is_syncd and size > MAX_BLOCKS * ibb.BLOCK_SIZE
        if len(methods) == 2 and not target.is_syncd:
            if not size:
                # COMPAT(QXmpp, libpurple, gloox): a SOCKS5 bytestream without a byte hangs.
                methods.remove(si.BYTESTREAMS)
            elif countless:
                methods.remove(si.IBB)
        elif methods == [si.IBB] and countless:
            log.warning("%s may be unable to count the blocks of %d bytes", target.jid, size)
        if not methods:
            raise BytestreamError(
                "no way to send is open: no address of ours, no proxy, not through the server",
                hint="set bytestreams.direct, proxies or ibb, or wait for a proxy to be found",
            )
        return tuple(methods)

    async def _transfer(
        self, fd: int, changed: int, source: Source, target: Target, offer: si.Offer
    ) -> Sent:
        hasher = blake3.blake3()
        async with self._place(offer, target) as place:
            with place.asking() if place else contextlib.nullcontext():
                answer, seal = await self._offer(offer, target)
            if place is not None and answer.method != si.BYTESTREAMS:
                place.leave()  # somebody else may need it
            job = _Job(offer, answer, target, pump.Progress(answer.offset), hasher, seal)
            job.suspect = await self._judge(source, target, offer, answer)
            # Who asks for less than the rest has the others; we cannot know their hash.
            whole = answer.length is None
            with self._watch(target, source, job.progress), self._doubting(source, job):
                if whole:
                    await pump.hash_prefix(fd, answer.offset, hasher, target.jid.bare)
                # Nothing left to send needs no bytestream between syncds: an empty file, or
                # one that has arrived whole before its receipt was lost. A plain client waits
                # for a stream all the same.
                if answer.offset < source.version.size or not target.is_syncd:
                    await self._stream(fd, job, place)
                job.through = True
                await _check_unchanged(fd, changed, source)
                digest = hasher.digest() if whole else b""
                beside = target.is_syncd and await self._finish(job, digest)
        return Sent(
            confirmed=target.is_syncd, digest=digest, sealed=seal is not None, beside=beside
        )

    @contextlib.asynccontextmanager
    async def _place(self, offer: si.Offer, target: Target) -> AsyncIterator[Place | None]:
        """Wait, before the offer goes out, for what its bytestream will need."""
        if self._requester is None or si.BYTESTREAMS not in offer.methods:
            yield None
            return
        assert offer.size is not None
        async with self._requester.place(target.jid, offer.size) as place:
            yield place

    @contextlib.contextmanager
    def _doubting(self, source: Source, job: _Job) -> Iterator[None]:
        """Tell the way that it works when all has arrived; when it broke, the next answer does.

        What the kernel took says nothing: where large packets get lost without a word (a path
        MTU black hole), a connection comes about, takes some 100 KiB, and carries none of it.
        """
        try:
            yield
        except (ChangedError, IntegrityError, DeclinedError):
            raise
        except TransferError as error:
            if (doubt := _doubt(job, error)) is not None:
                while len(self._doubts) >= MAX_DOUBTS:
                    del self._doubts[next(iter(self._doubts))]
                self._doubts[job.target.jid.bare, source] = doubt
            raise
        if job.carried is not None:
            job.carried(True)

    async def _judge(
        self, source: Source, target: Target, offer: si.Offer, answer: si.Answer
    ) -> bool:
        """See from an answer whether anything had arrived by the way that broke before.

        Returns:
          Whether nothing had, but that may have had another reason.

        Raises:
          BytestreamError: None of the ways that were just offered carries anything.
        """
        doubt = self._doubts.pop((target.jid.bare, source), None)
        if doubt is None or answer.offset > doubt.began:
            return False
        if not doubt.strong:
            return True
        doubt.carried(False)
        assert self._requester is not None
        others = si.IBB in offer.methods and answer.method == si.BYTESTREAMS
        if others and not await self._requester.ready(target.jid):
            raise BytestreamError(
                f"connections to {target.jid.bare} come about, but no byte gets through"
            )
        return False

    async def _offer(self, offer: si.Offer, target: Target) -> tuple[si.Answer, Seal | None]:
        offered = None
        if self._seals is not None:
            own = self._own_jid()
            if own is None:
                raise OfflineError("not connected to the server")
            offered = await self._seals.offer(offer, own, target.jid, can_seal=target.can_seal)
            if offered is not None:
                offer = replace(offer, seal=offered.attributes())
        patience = SYNCD_ANSWER_TIMEOUT
        if not target.is_syncd:
            patience = self._answer_timeout or ANSWER_TIMEOUT
        try:
            result = await self._request("set", target.jid, si.make_offer(offer), patience)
        except StanzaError as error:
            raise explain(error, target.jid) from error
        answer = si.read_answer(result.payload, offer)
        if target.is_syncd and answer.length is not None:
            raise RemoteProtocolError("the peer wants only a part of the file")
        if self._seals is None:
            return answer, None
        return answer, await self._seals.take_answer(offered, answer, target.jid)

    async def _stream(self, fd: int, job: _Job, place: Place | None) -> None:
        offset, progress = job.answer.offset, job.progress
        try:
            async with self._bytestream(job, place) as way:
                await pump.send(
                    way.stream,
                    fd,
                    offset=offset,
                    length=job.length,
                    hasher=job.hasher,
                    progress=progress,
                    throttle=self._throttle(job.target.jid.bare),
                    sealer=job.seal.sealer() if job.seal else None,
                    peer=job.target.jid.bare,
                )
                await way.finish()
        except TransferError as error:
            job.note_progress(error)
            raise
        except OfflineError as error:
            if progress.offset == offset:
                raise
            # Through the server: what went out may have arrived, so the rest can go at once.
            cut = TruncatedError(str(error), hint=error.hint)
            job.note_progress(cut)
            raise cut from error

    @contextlib.asynccontextmanager
    async def _bytestream(self, job: _Job, place: Place | None) -> AsyncIterator[_Way]:
        """Open what the peer has chosen; close it right after the last byte."""
        sid, target, patience = job.offer.sid, job.target, inband.OPEN_TIMEOUT
        if job.answer.method == si.BYTESTREAMS:
            assert place is not None
            try:
                opened = await place.open(sid, job.slack)
            except OpeningError as error:
                if error.crowded and target.is_syncd:
                    # It does not mind being asked again; a person who has accepted would.
                    raise TransferError(f"{error}; the proxies are in use just now") from error
                if not error.same_sid or si.IBB not in job.offer.methods:
                    raise
                # COMPAT(libpurple, slixmpp): they go on in-band on the same sid; others say
                # nothing to that.
                log.info("%s; trying through the server", error)
                patience = SAME_SID_TIMEOUT
            else:
                job.progress.method = opened.method
                job.carried, job.opened_at = opened.carried, trio.current_time()
                unsure = opened.method == "direct" and not target.is_syncd
                finish = _linger if unsure else trio.aclose_forcefully
                try:
                    yield _Way(opened.stream, functools.partial(finish, opened.stream))
                finally:
                    # COMPAT(prosody): its proxy keeps the tail back until we close.
                    # COMPAT(smack): the file ends there where the stream does.
                    await trio.aclose_forcefully(opened.stream)
                    place.leave()
                return
        assert self._inband is not None
        window = SYNCD_WINDOW if target.is_syncd else ibb.WINDOW
        opening = self._inband.open(
            target.jid, sid, window=window, timeout=patience, slack=job.slack
        )
        async with contextlib.AsyncExitStack() as stack:
            try:
                sending = await stack.enter_async_context(opening)
            except OfflineError as error:
                if job.answer.method == si.IBB:
                    raise
                # Silence about the same sid; should we be the ones who went, the new offer
                # that comes now says so.
                raise BytestreamError(f"{target.jid} took no other way: {error}") from error
            except BytestreamError as error:
                # It did accept the file: a stream that it knows nothing of may be one that it
                # forgot in a restart, so this is for now, whatever type the refusal has.
                raise BytestreamError(str(error), hint=error.hint) from error
            job.progress.method = "ibb"
            yield _Way(sending.stream, sending.finish)

    async def _finish(self, job: _Job, digest: bytes) -> bool:
        """Get the receipt; returns whether the file is kept beside another one."""
        # COMPAT(openfire, prosody, ejabberd): over a stream by their proxies nothing comes back
        # once we have closed, so that the receipt comes over XMPP.
        offer, target, seal = job.offer, job.target, job.seal
        assert offer.size is not None
        finish = si.Finish(sid=offer.sid, size=offer.size, digest=digest)
        if seal is not None:
            finish = seal.close_finish(finish)
        for attempt in range(1, RECEIPT_TRIES + 1):
            try:
                question = si.make_finish(finish)
                patience = RECEIPT_TIMEOUT + job.slack
                result = await self._request("set", target.jid, question, patience)
            except OfflineError:
                # The bytes are over there; only the question or the receipt was lost.
                if attempt == RECEIPT_TRIES:
                    raise
                with trio.move_on_after(RECONNECT_TIMEOUT):
                    await self._wait_online()
            except StanzaError as error:
                if error.condition == "item-not-found":
                    # It hung up, or came back as another, when our kernel had taken it all.
                    lost = TransferError(
                        f"{target.jid.bare} has given this transfer up; it is offered again"
                    )
                    job.note_progress(lost)
                    raise lost from error
                raise explain(error, target.jid) from error
            else:
                receipt = si.read_receipt(result.payload)
                stored = replace(receipt, seal=finish.seal, beside=False)
                if stored != finish:
                    raise IntegrityError(
                        f"{target.jid.bare} stored something else than was sent"
                    )
                if seal is not None:
                    seal.check_receipt(receipt)
                return receipt.beside
        raise AssertionError("the last try either returns or raises")


@dataclass(slots=True)
class _Job:
    """An accepted offer, and how far its bytes are.

    Attributes:
      carried: To be told whether the bytes got through, once they are on a SOCKS5 bytestream.
      opened_at: Since when they are, seconds.
      suspect: The last attempt broke off at once, with nothing arrived.
      through: All of them are gone.
    """

    offer: si.Offer
    answer: si.Answer
    target: Target
    progress: pump.Progress
    hasher: blake3.blake3
    seal: Seal | None
    carried: Callable[[bool], None] | None = None
    opened_at: float = 0.0
    suspect: bool = False
    through: bool = False

    @property
    def slack(self) -> float:
        """How much longer than usual the peer may take, to hash what it has; seconds."""
        return pump.hashing_time(self.answer.offset) if self.target.is_syncd else 0.0

    @property
    def length(self) -> int:
        """How much is to be sent, bytes."""
        assert self.offer.size is not None
        left = self.offer.size - self.answer.offset
        return left if self.answer.length is None else self.answer.length

    def note_progress(self, error: TransferError) -> None:
        """What has arrived is kept there, so the rest can go at once."""
        error.began = self.answer.offset
        error.moved = self.progress.offset - self.answer.offset


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A transfer that broke, and the way it had taken.

    Attributes:
      began: Where it had begun, bytes.
      carried: To be told whether the bytes got through.
      strong: If nothing had arrived, it was the way's fault.
    """

    began: int
    carried: Callable[[bool], None]
    strong: bool


def _doubt(job: _Job, error: TransferError) -> _Doubt | None:
    """Tell whether it may be the way's fault, should nothing have arrived, that it broke."""
    if job.carried is None or error.type is not ErrorType.WAIT:
        return None
    moved = job.progress.offset - job.answer.offset
    if moved > (MAX_BUFFERED if job.target.is_syncd else MAX_IN_FLIGHT):
        return None
    waited = trio.current_time() - job.opened_at >= SWALLOWED_AFTER
    # Not a disk, of ours or theirs.
    broke = isinstance(error, StalledError | TruncatedError)
    if not (waited and (broke or job.through)) and not (broke and job.target.is_syncd):
        return None
    return _Doubt(job.answer.offset, job.carried, strong=waited or job.suspect)


@dataclass(frozen=True, slots=True)
class _Way:
    """An open bytestream.

    Attributes:
      stream: Takes the bytes.
      finish: To be called right after the last byte; returns when it has gone out, as far as
        that can be known.
    """

    stream: trio.SocketStream
    finish: Callable[[], Awaitable[object]]


async def _linger(stream: trio.SocketStream) -> None:
    """Close, and find out whether the other end's kernel took all of it.

    What a plain client says after a transfer is nothing, so a reset is the only sign that it
    has hung up in the middle of what the kernels still held.
    """
    try:
        await stream.send_eof()
        with trio.move_on_after(LINGER_TIMEOUT):
            while await stream.receive_some(LINGER_CHUNK):
                pass  # what a receiver says is of no meaning
            return
    except trio.BrokenResourceError as error:
        raise TruncatedError("the peer hung up before it had read everything") from error
    if _unsent(stream):
        raise StalledError(f"the peer has taken nothing for {LINGER_TIMEOUT:.0f} s")


def _unsent(stream: trio.SocketStream) -> int:
    """How many bytes the other end's kernel has not acknowledged (tcp(7), SIOCOUTQ)."""
    answer = fcntl.ioctl(stream.socket.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(answer, sys.byteorder)


def _new_sid() -> str:
    # 128 bits: nobody can claim a stream by guessing. Hexadecimal: an NMTOKEN, as XEP-0047
    # wants it.
    return secrets.token_hex(16)


async def _make_offer(
    source: Source, target: Target, methods: tuple[str, ...], fd: int
) -> si.Offer:
    if not is_writable(source.path):
        raise DeclinedError(
            f"the name {source.path!r} is no valid text", hint="rename the file to send it"
        )
    # The name is for other clients; between syncds a path stays as it is.
    name, size = unicodedata.normalize("NFC", paths.split(source.path)[-1]), source.version.size
    # A time before 1970 is a clock gone wrong, and no reason not to deliver.
    mtime_ns = max(0, source.version.mtime_ns)
    if target.is_syncd:
        sync = si.Sync(folder=source.folder, path=source.path, mtime_ns=mtime_ns)
        md5 = date = ""
    else:
        sync = None
        md5 = await pump.on_disk(_md5, fd, size) if size <= MD5_UP_TO else ""
        changed = datetime.fromtimestamp(mtime_ns // 1_000_000_000, UTC)
        date = changed.strftime("%Y-%m-%dT%H:%M:%SZ")  # XEP-0082
    return si.Offer(
        sid=_new_sid(),
        name=name,
        size=size,
        methods=methods,
        ranged=True,
        md5=md5,
        date=date,
        sync=sync,
    )


def _md5(fd: int, size: int) -> str:
    # XEP-0096 wants this one; it proves nothing against whoever wants to deceive.
    return hashlib.md5(os.pread(fd, size, 0), usedforsecurity=False).hexdigest()


@contextlib.asynccontextmanager
async def _opened(source: Source) -> AsyncIterator[tuple[int, int]]:
    """Open the file, and make sure that it is the version that was to be sent.

    Yields:
      Its descriptor, and its ctime before the first byte is read, nanoseconds since 1970.
    """
    fd = await pump.on_disk(open_source, source.root, source.path.split("/"))
    try:
        status = os.fstat(fd)
        if Identity.of(status) != source.version:
            raise ChangedError("the file has changed since it was found")
        yield fd, status.st_ctime_ns
    finally:
        os.close(fd)


async def _check_unchanged(fd: int, changed: int, source: Source) -> None:
    """Make sure that what was read is one version of the file, and not parts of two.

    The path is looked at, because our descriptor keeps a deleted file alive. The ctime is no
    part of a version, or a ``chmod -R`` would send everything again; but a program that writes
    in place and then puts the mtime back (``touch -r``, ``exiftool -P``) cannot put that one
    back. While a file is read, nothing of ours changes it.

    Raises:
      ChangedError: It is to be sent anew.
    """
    components = source.path.split("/")
    found = await pump.on_disk(identity_of, source.root, components)
    status = await pump.on_disk(os.fstat, fd)
    if found != source.version or status.st_ctime_ns != changed:
        raise ChangedError("the file changed, or went away, while it was being sent")


# RFC 6120's conditions. COMPAT(smack, psi, libpurple, gloox, slixmpp, openfire): what they are
# really answered with.
_GONE = frozenset({"service-unavailable", "recipient-unavailable", "item-not-found", "gone"})
_GONE |= {"remote-server-not-found", "remote-server-timeout"}  # names come back, links too
# XEP-0095 section 4.2.
_NO_WAYS = "}no-valid-streams"
_DECLINED = frozenset({"forbidden", "not-acceptable", "not-authorized", "policy-violation"})


def _is_of_methods(error: DeclinedError) -> bool:
    """Whether the peer declined the ways that were offered, and not the file."""
    cause = error.__cause__
    return isinstance(cause, StanzaError) and cause.app.endswith(_NO_WAYS)


def explain(error: StanzaError, peer: JID) -> SyncdError:
    """Say in words what a refused request means for the delivery."""
    reason = f": {error.text}" if error.text else ""
    if error.app.endswith(_NO_WAYS) or error.app.endswith("}bad-profile"):
        return DeclinedError(
            f"{peer} and syncd have no way of transfer in common{reason} [{error.condition}]"
        )
    if error.condition in _GONE:
        return OfflineError(
            f"{peer} is offline, or this resource is{reason} [{error.condition}]"
        )
    # A server that wants less in a minute says policy-violation as well, with type wait.
    if error.condition in _DECLINED and error.type is not ErrorType.WAIT:
        hint = "ask them why" if not reason or error.condition != "forbidden" else ""
        if error.condition == "forbidden" and error.text in ("", NOT_ACCEPTED):
            hint = "ask them to add you to accept_from, of the folder or of their [inbox]"
        return DeclinedError(
            f"{peer.bare} does not accept the file{reason} [{error.condition}]", hint=hint
        )
    # The condition counts before the type: many a client gives every refusal the same one.
    waits = error.type is ErrorType.WAIT or error.condition == "resource-constraint"
    return TransferError(
        f"{peer.bare} refused the file{reason} [{error.condition}]",
        type=ErrorType.WAIT if waits else ErrorType.CANCEL,
    )
