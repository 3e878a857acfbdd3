"""In-Band Bytestreams: XEP-0047. Sans-IO.

The `make_` functions return what goes into an iq; the `read_` functions take it apart and
refuse what is not allowed. `Outgoing` and `Incoming` are the two ends of one stream. Bytes go
one way only, from whoever opened it::

    Outgoing                                     Incoming
    opening  -- <open block-size sid/> ------->  expected; unknown to it: not-acceptable
       ^------- resource-constraint ----------   smaller blocks, please, under the same sid
    open     <- result ----------------------   open
             -- <data seq=0/> <data seq=1/> ->   one for one in order, or it has failed
             <- result, one each -------------   the bytes are handed on
    ended    -- <close/> -------------------->   closed
             <- result ----------------------

Both only decide. Who drives them says what the clock shows, in seconds that only grow.
"""

from __future__ import annotations

import base64
import binascii
import enum
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from syncd.errors import BytestreamError, ErrorType, StanzaError
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from syncd.xmpp.jid import JID

NS = "http://jabber.org/protocol/ibb"
OPEN = f"{{{NS}}}open"
DATA = f"{{{NS}}}data"
CLOSE = f"{{{NS}}}close"

# XEP-0047 section 2.1: the most that any stream may have.
MAX_BLOCK = 65_535  # bytes before base64

# COMPAT(qxmpp): takes no more than 4096. COMPAT(xmppframework): counts three bytes for four
# characters of base64, padding or not, so every block but the last must be a multiple of 3.
# The stanza has 5.5 KiB then, where RFC 6120 section 13.12 promises 10000 bytes.
BLOCK_SIZE = 4_095  # bytes before base64

# After four halvings. Who finds even this too big does not mean the size.
MIN_BLOCK = 255  # bytes before base64

# COMPAT(smack): handles each block in a task of its own, and so may see two in the wrong
# order. XEP-0047 section 2.2 recommends to wait for each result.
WINDOW = 1  # blocks

# XEP-0047 section 2.2: 16 bits, and then from 0 again.
SEQ_MODULUS = 65_536

# As in our schema; the sids of real clients have at most 40.
MAX_SID = 128  # characters

# Addresses, ids, and the <data/> itself, in one stanza with a block. The longest JIDs have
# 3 KiB, but two like that mean nobody real; ordinary stanzas have 300 bytes of this.
OVERHEAD = 1_024  # bytes

# How long after a refused block the same is sent again: the peer, or a server on the way,
# wants it slower. Together less than the minute after which nobody waits any longer.
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds

# COMPAT(xmppframework): never acknowledges the last block.
LAST_ACK_TIMEOUT = 10.0  # seconds

# As everywhere: a peer that has sent nothing for a minute has gone.
IDLE_TIMEOUT = 60.0  # seconds

# How long a stream that is over is remembered, and how many of them: its peer may still have
# to say <close/>, and wants a result.
ENDED_TIME = 60.0  # seconds
MAX_ENDED = 1_024  # streams

_ALLOWED_SPACE = str.maketrans("", "", "\r\n\t ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a peer wants to open (XEP-0047 section 2.1).

    Attributes:
      sid: The stream's id.
      block_size: No block is bigger than this, in bytes before base64.
      stanza: What the blocks come in.
    """

    sid: str
    block_size: int
    stanza: Literal["iq", "message"] = "iq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A piece of a stream (XEP-0047 section 2.2).

    Attributes:
      sid: The stream's id.
      seq: Its number, modulo 65536.
      data: The bytes.
    """

    sid: str
    seq: int
    data: bytes


def blocks_needed(size: int, block_size: int = BLOCK_SIZE) -> int:
    """How many blocks so many bytes take.

    COMPAT(qxmpp, gajim): as receivers they do not begin with 0 again behind block 65535, so
    that nothing bigger than `SEQ_MODULUS` blocks arrives there (256 MiB, at our block size).
    """
    return -(-size // block_size)


def largest_block(stanza_limit: int) -> int:
    """The largest block that fits into a stanza.

    Args:
      stanza_limit: How long a stanza may be on its way to us, in bytes; 0 if nobody has said.
    """
    if not stanza_limit:
        return MAX_BLOCK
    return max(0, min(MAX_BLOCK, (stanza_limit - OVERHEAD) // 4 * 3))


def make_open(sid: str, block_size: int) -> Element:
    """The opening; goes in an iq of type set (XEP-0047 section 2.1)."""
    return make(OPEN, {"block-size": block_size, "sid": sid, "stanza": "iq"})


def make_data(block: Block) -> Element:
    """A block (XEP-0047 section 2.2).

    COMPAT(slixmpp, gloox): no white space in the base64; one refuses it, the other makes
    bytes of it.
    """
    text = base64.b64encode(block.data).decode("ascii")
    return make(DATA, {"seq": block.seq, "sid": block.sid}, text=text)


def make_close(sid: str) -> Element:
    """The end; goes in an iq of type set (XEP-0047 section 2.3)."""
    return make(CLOSE, {"sid": sid})


def read_sid(element: Element) -> str:
    """The stream that any of the three is about.

    Raises:
      StanzaError: To be sent back: it does not say, or at too great length.
    """
    sid = element.get("sid", "")
    if not 0 < len(sid) <= MAX_SID:
        raise _bad("a bytestream needs a sid")
    return sid


def read_open(element: Element) -> Opening:
    """Read an opening.

    Raises:
      StanzaError: To be sent back: no ``sid``, or no ``block-size`` from 1 to 65535, or a
        ``stanza`` that does not exist.
    """
    block_size = _number(element.get("block-size", ""))
    if block_size is None or not block_size:
        raise _bad(f"a block-size is a number from 1 to {MAX_BLOCK}")
    stanza = element.get("stanza", "iq")
    if stanza not in ("iq", "message"):
        raise _bad("data comes in stanzas of the kind iq or message")
    return Opening(
        sid=read_sid(element),
        block_size=block_size,
        stanza=cast('Literal["iq", "message"]', stanza),
    )


def read_data(element: Element, block_size: int) -> Block:
    """Read a block.

    Args:
      element: The ``<data/>``.
      block_size: No bigger one is taken apart, in bytes.

    Raises:
      StanzaError: To be sent back: it has no sid or number, is no base64, or is too big.
    """
    seq = _number(element.get("seq", ""))
    if seq is None:
        raise _bad(f"a seq is a number from 0 to {SEQ_MODULUS - 1}")
    if len(element):
        raise _bad("a block of data has no children")
    return Block(sid=read_sid(element), seq=seq, data=_decode(element.text or "", block_size))


def _decode(text: str, block_size: int) -> bytes:
    # COMPAT(gajim): breaks its base64 into lines; the document's own examples have even
    # indented ones. Everything else outside of the alphabet is refused (section 6).
    text = text.translate(_ALLOWED_SPACE)
    if len(text) > 4 * -(-block_size // 3):
        raise _bad(f"a block of over {block_size} bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad("this is no base64") from error
    # The decoder lets surplus padding pass (QUJD====), and bits that mean nothing (AB==):
    # RFC 4648 sections 3.5 and 12.
    if base64.b64encode(data) != text.encode("ascii"):
        raise _bad("this is no canonical base64")
    if len(data) > block_size:
        raise _bad(f"a block of over {block_size} bytes")
    return data


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5):
        return None
    return int(text) if int(text) < SEQ_MODULUS else None


def _bad(text: str) -> StanzaError:
    # Section 2.2 has bad-request with type cancel; what is so wrong is not sent any better.
    return StanzaError(ErrorType.CANCEL, "bad-request", text)


def unknown_sid() -> StanzaError:
    """The answer about a stream that is not there (XEP-0047 section 2.2)."""
    return StanzaError(ErrorType.CANCEL, "item-not-found", "there is no such bytestream")


class State(enum.Enum):
    """Where a stream is; it only ever moves on."""

    NEW = enum.auto()
    OPEN = enum.auto()
    ENDED = enum.auto()  # no further byte goes into it


class Outgoing:
    """The end that opened a stream and sends.

    Args:
      sid: The stream's id.
      block_size: What to open it with, in bytes.
      window: How many blocks may be unanswered at a time.

    Attributes:
      sid: As given.
      block_size: No block may be bigger; less than was given once the peer wants it so.
      window: As given, or as set since.
      state: `State.ENDED` when the last block has been made.
      closed_by_peer: It has said ``<close/>``.
    """

    def __init__(self, sid: str, *, block_size: int = BLOCK_SIZE, window: int = WINDOW) -> None:
        if not (0 < len(sid) <= MAX_SID and 0 < block_size <= MAX_BLOCK and window > 0):
            raise ValueError("a bytestream needs a sid, a block size and a window")
        self.sid = sid
        self.block_size = block_size
        self.state = State.NEW
        self.closed_by_peer = False
        self.window = window
        self._next = 0  # not modulo anything
        self._unanswered: dict[int, int] = {}  # block: how often it was refused
        self._waiting_since = math.inf

    def __repr__(self) -> str:
        return f"<Outgoing {self.state.name} next={self._next} of {self.block_size}>"

    def open_refused(self, error: StanzaError) -> None:
        """Take a refusal of the opening; afterwards a smaller `block_size` may be tried.

        COMPAT(qxmpp): 4096 at most. COMPAT(slixmpp): 8192, and refuses with type wait.

        Raises:
          BytestreamError: It is not about the size, or that is as small as it gets.
        """
        assert self.state is State.NEW
        smaller = self.block_size // 6 * 3  # half, and a multiple of 3
        if error.condition != "resource-constraint" or smaller < MIN_BLOCK:
            raise BytestreamError(
                f"the peer takes no in-band bytestream{_reason(error)}", type=error.type
            ) from error
        self.block_size = smaller

    def opened(self) -> None:
        """The peer has agreed."""
        assert self.state is State.NEW
        self.state = State.OPEN

    @property
    def may_send(self) -> bool:
        """Whether to call `next_block`, if there are any bytes left.

        Also when the peer has closed the stream: then it was too early, as that will say.
        """
        # A refused block is sent again before anything behind it.
        held_up = any(self._unanswered.values()) or len(self._unanswered) >= self.window
        return self.state is State.OPEN and (self.closed_by_peer or not held_up)

    def next_block(self, data: bytes, now: float) -> tuple[int, Element]:
        """Make the next block; only when `may_send`.

        Returns:
          By which number to speak of it here, and what goes in an iq of type set.

        Raises:
          BytestreamError: The peer has closed the stream already.
        """
        assert self.may_send
        assert 0 < len(data) <= self.block_size
        if self.closed_by_peer:
            raise _closed_early()
        number = self._next
        self._next += 1
        self._unanswered[number] = 0
        self._waiting_since = now
        block = Block(sid=self.sid, seq=number % SEQ_MODULUS, data=data)
        return number, make_data(block)

    def acked(self, number: int, now: float) -> None:
        """A block has arrived."""
        del self._unanswered[number]
        self._waiting_since = now

    def block_refused(self, number: int, error: StanzaError) -> float:
        """Take the refusal of a block.

        Returns:
          After how many seconds to send the same once more.

        Raises:
          BytestreamError: It is of no use to do so; the stream must be closed
            (XEP-0047 section 2.2).
        """
        tries = self._unanswered[number]
        # Policies on how much and how often, of the peer or of a server on the way. With a
        # later block sent already, the peer sees a gap: nothing can be repaired then.
        busy = error.type is ErrorType.WAIT and error.condition in (
            "resource-constraint",
            "policy-violation",
        )
        if not busy or number != self._next - 1 or tries == len(RETRY_DELAYS):
            raise BytestreamError(
                f"the peer did not take a block of an in-band bytestream{_reason(error)}"
            ) from error
        self._unanswered[number] += 1
        return RETRY_DELAYS[tries]

    def peer_closed(self) -> None:
        """The peer has said ``<close/>``.

        COMPAT(libpurple, xmppframework): close as soon as they have all they expect, before
        we do, and perhaps without an answer to the last block. So whether it was too early
        turns out at the next block, if there is one.

        Raises:
          BytestreamError: It was too early in any case.
        """
        self.closed_by_peer = True
        if len(self._unanswered) > 1:
            raise _closed_early()

    def end(self, now: float) -> None:
        """There are no more bytes."""
        assert self.state is State.OPEN
        self.state = State.ENDED
        if not self._unanswered:
            self._waiting_since = now

    @property
    def settled(self) -> bool:
        """Whether no answer to a block is worth waiting for any more."""
        return self.state is State.ENDED and (self.closed_by_peer or not self._unanswered)

    @property
    def acknowledged(self) -> bool:
        """Whether the peer has answered every block."""
        return not self._unanswered

    @property
    def give_up_at(self) -> float:
        """When to close without the answer to the last block; on the clock, or infinity.

        Before the last it is not ours to give up: an answer that does not come is an error
        of its own.
        """
        if self.state is State.ENDED and len(self._unanswered) == 1:
            return self._waiting_since + LAST_ACK_TIMEOUT
        return math.inf


class Incoming:
    """The end at which a stream is opened, and which receives.

    Args:
      length: How many bytes are due.

    Attributes:
      length: As given.
      received: How many have come.
      state: Where the stream is.
      refusal: Why it has failed, for the peer to hear; None if it has not.
    """

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError("a stream has no negative length")
        self.length = length
        self.received = 0
        self.state = State.NEW
        self.refusal: StanzaError | None = None
        self._opening = Opening(sid="", block_size=1)
        self._seq = 0
        self._quiet_since = math.inf

    def __repr__(self) -> str:
        return f"<Incoming {self.state.name} {self.received} of {self.length}>"

    def open(self, opening: Opening, max_block: int, now: float) -> None:
        """Let the peer open the stream.

        Args:
          opening: What it wants.
          max_block: No bigger blocks may be agreed upon, in bytes.
          now: The clock, in seconds.

        Raises:
          StanzaError: To be sent back: the blocks are too big (it may ask for smaller ones),
            or the stream was opened before.
        """
        if self.state is not State.NEW:
            raise not_acceptable("this bytestream was opened before")
        if opening.block_size > min(max_block, MAX_BLOCK):
            raise StanzaError(
                ErrorType.MODIFY,
                "resource-constraint",
                f"blocks may have {min(max_block, MAX_BLOCK)} bytes",
            )
        self.state = State.OPEN
        self._opening = opening
        self._quiet_since = now

    def receive(self, element: Element, now: float, *, in_message: bool = False) -> bytes:
        """Take a block.

        Never raises for what the peer did: `refusal` is set instead, and the stream is over.
        There may be bytes to hand on all the same: of what is beyond `length` there is one,
        for whoever counts to see.

        Args:
          element: The ``<data/>``.
          now: The clock, in seconds.
          in_message: It came in a message.

        Returns:
          The bytes to hand on.

        Raises:
          StanzaError: To be sent back, and without any consequence: the stream is not open,
            or the block came in a stanza of a kind that was not agreed upon.
        """
        if self.state is not State.OPEN:
            raise unknown_sid()
        if in_message and self._opening.stanza != "message":
            raise StanzaError(ErrorType.CANCEL, "unexpected-request", "data comes in iqs here")
        try:
            block = read_data(element, self._opening.block_size)
            self._count(block.seq)
            data = self._within_length(block.data)
        except StanzaError as error:
            self.fail(error)
            return b""
        if data:
            self._quiet_since = now
        self.received += len(data)
        return data

    def _count(self, seq: int) -> None:
        # COMPAT(libervia): counts modulo 65535, and so leaves out the last number.
        early_wrap = seq == 0 and self._seq == SEQ_MODULUS - 1
        if seq != self._seq and not early_wrap:
            raise StanzaError(
                ErrorType.CANCEL,
                "unexpected-request",
                f"block {seq} has come where {self._seq} was due",
            )
        self._seq = (seq + 1) % SEQ_MODULUS

    def _within_length(self, data: bytes) -> bytes:
        left = self.length - self.received
        if len(data) > left:
            self.fail(not_acceptable(f"more than the {self.length} bytes that were offered"))
        return data[: left + 1]

    def handed_on(self, now: float) -> None:
        """The reader has taken what it had no room for: only now can the peer go on."""
        self._quiet_since = now

    def closed(self) -> None:
        """The peer has said ``<close/>``, however early."""
        self.state = State.ENDED

    def fail(self, refusal: StanzaError) -> None:
        """The stream is over; the first reason counts."""
        self.state = State.ENDED
        self.refusal = self.refusal or refusal

    @property
    def complete(self) -> bool:
        """Whether all bytes have come, and nothing else.

        COMPAT(qxmpp): does not expect a ``<close/>`` from who receives; so it is only said
        to a stream that is given up, not to a complete one.
        """
        return self.refusal is None and self.received == self.length

    @property
    def give_up_at(self) -> float:
        """When to stop waiting for bytes; on the clock, or infinity."""
        if self.state is not State.OPEN or self.complete:
            return math.inf
        return self._quiet_since + IDLE_TIMEOUT


@dataclass(slots=True, eq=False)
class Flight:
    """A block on its way, from when it was sent to its answer.

    Attributes:
      peer: To whom.
      alive_at: When something last showed that its answer may still come; on the clock.
      passed: It has left our own stream to the server.
    """

    peer: JID
    alive_at: float
    passed: bool = False


class Line:
    """All blocks of an account on their way, which share its one stream to the server.

    On a slow line a block waits behind those of all other transfers, and that is nobody's
    silence: as long as any block is answered the line moves. But it keeps their order; once one
    behind ours was answered, ours has left it, and only its peer can still show to be alive.
    """

    def __init__(self) -> None:
        self._flights: dict[Flight, None] = {}  # in the order in which they were sent

    def __len__(self) -> int:
        return len(self._flights)

    def send(self, peer: JID, now: float) -> Flight:
        """A block goes out behind all others."""
        flight = Flight(peer, now)
        self._flights[flight] = None
        return flight

    def answered(self, answered: Flight, now: float) -> None:
        """An answer has come, whatever it says."""
        before = True
        for flight in self._flights:
            before = before and flight is not answered
            if not flight.passed or flight.peer == answered.peer:
                flight.alive_at = now
            flight.passed = flight.passed or before
        del self._flights[answered]

    def lost(self, flight: Flight) -> None:
        """Its stream is over; no answer is waited for, if there is none."""
        self._flights.pop(flight, None)


class Ended:
    """The streams that are over, as long as their peers may have something to say of them."""

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[JID, str], float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def add(self, peer: JID, sid: str, now: float) -> None:
        """Remember a stream; forgets those that are too old or too many."""
        self._until.pop((peer, sid), None)
        self._until[peer, sid] = now + ENDED_TIME
        while len(self._until) > MAX_ENDED or next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)

    def knows(self, peer: JID, sid: str, now: float) -> bool:
        """Whether there was such a stream a short while ago."""
        return self._until.get((peer, sid), -math.inf) > now


def not_acceptable(text: str) -> StanzaError:
    """The answer to what we do not want (XEP-0047 section 2.1)."""
    return StanzaError(ErrorType.CANCEL, "not-acceptable", text)


def _closed_early() -> BytestreamError:
    return BytestreamError("the peer closed the in-band bytestream before it had everything")


def _reason(error: StanzaError) -> str:
    said = f": {error.text}" if error.text else ""
    return f"{said} [{error.condition}]"
