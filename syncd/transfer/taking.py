"""How the bytes of an accepted offer come in: over whichever way its sender opens."""

from __future__ import annotations

import logging
import os
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Literal

import trio
from trio import SocketStream

from syncd.bytestreams import s5b
from syncd.bytestreams.sockets import connect_first
from syncd.errors import (
    BytestreamError,
    ErrorType,
    IntegrityError,
    StalledError,
    StanzaError,
    TransferError,
    TruncatedError,
)
from syncd.transfer import pump

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from syncd.bytestreams.inband import Slot
    from syncd.disk.partial import PartialFile
    from syncd.transfer.incoming import Call, Incoming
    from syncd.xmpp.jid import JID

log = logging.getLogger(__name__)

# From our acceptance to the opening of the bytestream. Clients need a second; a syncd hashes
# the part that we have first, for which it gets more (`pump.hashing_time`).
OPEN_TIMEOUT = 120.0  # seconds
# From our refusal of one way to the opening of the next. Pidgin tries it at once; gloox and
# others wait until their own patience with the first is over.
NEXT_WAY_TIMEOUT = 60.0  # seconds
# No byte of the overlap for so long: as for all the others, see the pump.
OVERLAP_TIMEOUT = 60.0  # seconds
# A sentence for each of 16 streamhosts whose names are honest ones.
MAX_LOGGED = 2_048  # characters


@asynccontextmanager
async def opened(
    incoming: Incoming, own: JID, slot: Slot | None
) -> AsyncIterator[SocketStream]:
    """Wait until the sender has opened a bytestream; close it in the end.

    COMPAT(libpurple, gloox, slixmpp): when one way has failed they open another with the same
    sid, also in-band when that was not chosen; who chose in-band may open the other.

    Args:
      incoming: The transfer; its progress is told the way.
      own: Our full JID.
      slot: Where a stream through the server is expected, or None.

    Raises:
      StalledError: The sender opened nothing, or fell silent.
      BytestreamError: No way that it opened leads to it, or the one that does failed.
    """
    method, stream = await _open(incoming, own, slot)
    incoming.progress.method = method
    try:
        yield stream
    finally:
        await trio.aclose_forcefully(stream)
    # Who does not know the size took the end for the end of the file. Of a direct connection
    # nothing else can be known than that it was no reset.
    if method == "ibb" and slot is not None and (failure := slot.reason()) is not None:
        raise failure


async def _open(
    incoming: Incoming, own: JID, slot: Slot | None
) -> tuple[Literal["direct", "proxy", "ibb"], SocketStream]:
    patience = OPEN_TIMEOUT
    if incoming.offer.sync is not None:
        patience += pump.hashing_time(incoming.start)
    failure: TransferError = StalledError(
        f"{incoming.sender} opened no stream for {patience:.0f} s"
    )
    while True:
        came = await _next(incoming, slot, patience)
        if came is None:
            raise failure
        if isinstance(came, SocketStream):
            return "ibb", came
        try:
            return await _connect(came, incoming.sender, own)
        except BytestreamError as error:
            log.info("%s: %s; waiting for another way", incoming.path, str(error)[:MAX_LOGGED])
            # Which of them refused, was silent or has no name is for us: whoever may send
            # files is not to look through us at the network that we are in.
            count = len(s5b.read_query(came.payload).streamhosts)
            told = f"no streamhost led to a bytestream ({count} tried)"
            # XEP-0065 section 6.3.3
            came.fail(StanzaError(ErrorType.CANCEL, "item-not-found", told))
            failure, patience = BytestreamError(told, hint=error.hint), NEXT_WAY_TIMEOUT


async def _connect(
    call: Call, sender: JID, own: JID
) -> tuple[Literal["direct", "proxy"], SocketStream]:
    """Connect to one of the streamhosts, and tell the sender to which."""
    query = s5b.read_query(call.payload)
    address = query.dstaddr or s5b.dstaddr(query.sid, sender, own)
    aliases = () if query.dstaddr else s5b.dstaddr_aliases(query.sid, sender, own)
    used, stream = await connect_first(query.streamhosts, address, aliases)
    # COMPAT(libpurple, gloox): the bytes may be on their way already; they wait in the socket.
    call.answer(s5b.make_used(query.sid, used.jid))
    return ("direct" if used.jid.bare == sender.bare else "proxy"), stream


async def _next(
    incoming: Incoming, slot: Slot | None, patience: float
) -> Call | SocketStream | None:
    """Wait for what the sender opens next, in either way; None if it opens nothing."""
    came: Call | SocketStream | None = None

    async def hear(nursery: trio.Nursery) -> None:
        nonlocal came
        call = await incoming.opening.next()
        # Both at once: the one that is open already. The other is refused in the end.
        if came is None:
            came = call
        nursery.cancel_scope.cancel()

    async def look(nursery: trio.Nursery) -> None:
        nonlocal came
        assert slot is not None
        with suppress(BytestreamError):  # not in time, which is said by returning nothing
            came = await slot.opened(patience)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + patience
        nursery.start_soon(hear, nursery)
        if slot is not None:
            nursery.start_soon(look, nursery)
    return came


async def check_overlap(stream: SocketStream, partial: PartialFile, start: int) -> bool:
    """Find out whether a plain client begins where it was asked to; then the rest may follow.

    COMPAT(Gajim, QXmpp, libpurple, gloox, slixmpp): some ignore the offset over one way or
    over all, and send the whole file. Then what has arrived is forgotten, but for the bytes
    that were read here.

    Args:
      stream: Opened, nothing read yet.
      partial: What is there, proved; its offset is where to go on afterwards.
      start: Where the client was asked to begin, bytes.

    Returns:
      Whether it begins there; otherwise at the beginning of the file.

    Raises:
      IntegrityError: What comes is neither; what was there is void.
      TruncatedError, StalledError: The client went away.
    """
    came = await _read(stream, partial.offset - start)
    if came == await pump.on_disk(os.pread, partial.fd, len(came), start):
        return True
    if came == await pump.on_disk(os.pread, partial.fd, len(came), 0):
        await pump.on_disk(partial.restart, len(came))
        return False
    await pump.on_disk(partial.discard)
    raise IntegrityError("the peer sends another file than the one it began")


async def _read(stream: SocketStream, count: int) -> bytes:
    came = b""
    while len(came) < count:
        try:
            with trio.move_on_after(OVERLAP_TIMEOUT) as waiting:
                data = await stream.receive_some(count - len(came))
        except trio.BrokenResourceError as error:
            raise TruncatedError("the sender hung up before anything new came") from error
        if waiting.cancelled_caught:
            raise StalledError(f"no byte has moved for {OVERLAP_TIMEOUT:g} seconds")
        if not data:
            raise TruncatedError("the sender hung up before anything new came")
        came += data
    return came
