"""An accepted offer, and the requests about it that its task answers.

The iq handlers run as children of the stream and are cancelled with it; the transfer's task
runs beside. A `Mailbox` carries a request from the one to the other, and the answer back.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import trio

from syncd.errors import ErrorType, StanzaError, TransferError
from syncd.transfer import pump

if TYPE_CHECKING:
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.disk.partial import Identity, PartialFile
    from syncd.transfer import si
    from syncd.transfer.sealing import Seal
    from syncd.trust import handshake
    from syncd.xmpp.jid import JID

log = logging.getLogger(__name__)

# What a stranger is told, and the sender's user is told what to do about. Another word would
# tell which folders there are.
NOT_ACCEPTED = "not accepted from you here"
# How much of what we have a plain client is asked to send again: it may ignore where to begin,
# and then these bytes are those of the beginning.
OVERLAP = 65_536  # bytes
# A bytestream is opened once, and once more when the first way failed; a receipt is asked for
# again when the stream broke. More at a time is no honest peer's.
MAX_ASKED = 4  # requests about one transfer that wait for its task


class Allowance(Protocol):
    """What one bare JID may take of us."""

    def admit(self) -> None:
        """Count an offer; raises a `StanzaError` if there were too many."""

    def check(self, size: int) -> None:
        """See that a file may have so many bytes; raises a `StanzaError` if not."""

    def reserve(self, wanted: int, *, known: bool, entries: int) -> int:
        """Set bytes aside, fewer if it is not known that there are so many; may raise."""

    def settle(self, granted: int, came: int, *, entries: int, made: int) -> None:
        """Give back what was set aside, and count what came of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inbox:
    """Where a peer's files go.

    Attributes:
      root: The folder on disk.
      folder: Its id; empty for the inbox of ordinary clients.
      portable: Names that another system could not hold, or tell apart, are declined.
      hidden: Names that begin with a dot are taken.
    """

    root: Path
    folder: str
    portable: bool = False
    hidden: bool = True


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
      source_path: Where the sender wanted it, if it is kept beside another file there.
    """

    inbox: Inbox
    path: str
    known: Known
    source_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """A version that came before, and still lies where it was put.

    Attributes:
      path: Below the folder.
      known: What the journal knows of it.
    """

    path: str
    known: Known


@dataclass(slots=True)
class Call:
    """A request that a transfer's task answers."""

    payload: Element
    done: trio.Event = field(default_factory=trio.Event)
    result: Element | None = None
    error: StanzaError | None = None

    def answer(self, result: Element) -> None:
        """Answer it; the first answer counts."""
        if not self.done.is_set():
            self.result = result
            self.done.set()

    def fail(self, error: StanzaError) -> None:
        """Refuse it, unless it is answered already."""
        if not self.done.is_set():
            self.error = error
            self.done.set()


class Mailbox:
    """Hands requests, one at a time, to the task that answers them."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Call](MAX_ASKED)
        self._current: Call | None = None

    async def ask(self, payload: Element) -> Element:
        """Wait for the task's answer; called by the iq handler.

        Raises:
          StanzaError: The task refuses, has ended, or has too many requests already.
        """
        call = Call(payload)
        try:
            self._send.send_nowait(call)
        except (trio.WouldBlock, trio.BrokenResourceError) as error:
            raise StanzaError(ErrorType.CANCEL, "item-not-found", "no such transfer") from error
        await call.done.wait()
        if call.result is None:
            assert call.error is not None
            raise call.error
        return call.result

    async def next(self) -> Call:
        """Wait for a request; called by the task."""
        self._current = await self._receive.receive()
        return self._current

    def close(self, error: StanzaError) -> None:
        """Refuse what has no answer yet, also what the task was cancelled over.

        May be called again.
        """
        if self._current is not None:
            self._current.fail(error)
        with suppress(trio.WouldBlock, trio.ClosedResourceError):
            while True:
                self._receive.receive_nowait().fail(error)
        self._receive.close()


def is_resumable(offer: si.Offer) -> bool:
    """Whether another offer of the same file can go on where this one ends."""
    if offer.sync is not None:
        return True
    # Of a plain client the beginning is asked for twice, so it must be worth it.
    return offer.ranged and offer.size is not None and offer.size > 2 * OVERLAP


def slot_of(sender: JID, offer: si.Offer, inbox: Inbox, path: str) -> tuple[str, str, str]:
    """What two transfers must not share, in the words of `partial.key_of`.

    One sender's one file in one folder, whatever its version. A plain client only names its
    files, and may have several of one name: they are told apart by all that it says of them.
    """
    if offer.sync is not None:
        return str(sender.bare), inbox.folder, path
    # A slash is in no folder's id, and the zero character in no XML.
    version = f"{path}\0{offer.size}\0{offer.md5}\0{offer.date}"
    return str(sender.bare), f"{inbox.folder}/", version


def start_of(offer: si.Offer, offset: int) -> int:
    """Where a sender is asked to begin, bytes.

    Args:
      offer: Of the file.
      offset: How much of it has come before, bytes.
    """
    if not offer.ranged:
        return 0
    return offset if offer.sync else max(0, offset - OVERLAP)


class Incoming:
    """One accepted offer, from acceptance to receipt.

    Args:
      sender: Full JID.
      offer: As it came.
      inbox: Where the file goes.
      components: Its path there, checked.
      partial: What has arrived, or None if nothing is to come.
      present: The journal knows the file to be there already.
      sealed: The sender's signed half of the seal; None for plain bytes.
      held: Which version of ours the sender had when it made this offer: where that still
        stands, its own takes the place.

    Attributes:
      size: Of the whole file, bytes; None if the sender does not know.
      start: Where the sender is asked to begin, bytes.
      began: Where it did begin, bytes; until it does, where `progress` is.
      granted: How many bytes may come.
      entries: How many files and directories may be made for it.
      made: How many of them there are now.
      progress: How far it is.
      opening: Asks for a SOCKS5 bytestream wait here.
      finishing: Questions for the receipt wait here.
      seal: Both halves, once we have answered.
      listening: Set once the sender may open a bytestream, in whatever way.
      scope: Ends the transfer when it is cancelled.
      ended: Set when nothing of it runs any more.
    """

    def __init__(
        self,
        sender: JID,
        offer: si.Offer,
        inbox: Inbox,
        components: tuple[str, ...],
        partial: PartialFile | None,
        present: Present | None,
        sealed: handshake.Offer | None = None,
        held: Identity | None = None,
    ) -> None:
        self.sender = sender
        self.offer = offer
        self.inbox = inbox
        self.components = components
        self.partial = partial
        self.present = present
        self.size = offer.size
        self.start = start_of(offer, partial.offset) if partial else offer.size or 0
        self.granted = self.entries = self.made = 0
        self.progress = pump.Progress(partial.offset if partial else offer.size or 0)
        self.began = self.progress.offset
        self.opening = Mailbox()
        self.finishing = Mailbox()
        self.sealed = sealed
        self.held = held
        self.seal: Seal | None = None
        self.listening = trio.Event()
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    def __repr__(self) -> str:
        return f"<Incoming {self.path!r} from {self.sender}>"

    @property
    def path(self) -> str:
        """The path below the folder."""
        return "/".join(self.components)

    @property
    def slot(self) -> tuple[str, str, str]:
        """What two transfers must not share, see `slot_of`."""
        return slot_of(self.sender, self.offer, self.inbox, self.path)

    @property
    def resumable(self) -> bool:
        """Whether what has arrived is of use to a later offer."""
        return is_resumable(self.offer)

    def close(self) -> None:
        """Let go of keys and file; keep what has arrived, if it can be resumed."""
        if self.seal is not None:
            self.seal.forget()
        if self.partial is None:
            return
        self.partial.close()
        if not self.resumable:
            try:
                self.partial.discard()
            except TransferError as error:
                # The folder may be gone altogether, which must not end the daemon.
                log.warning("%s", error)
