"""Stream management (XEP-0198): what the other end has not confirmed yet. Sans-IO.

Both ends count stanzas, from the moment the server enabled it; nothing else counts. What the
server has not acknowledged is kept as bytes, and sent again in order when the stream is
resumed on another connection.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from syncd.errors import RemoteProtocolError
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from syncd.xmpp.jid import JID

NS = "urn:xmpp:sm:3"

# XEP-0198 section 4: counters are unsigned 32-bit and wrap.
_WRAP = 2**32
# Section 3: at most 4,000 bytes, which is for the server to know.
MAX_ID = 4_000  # characters
# A name in the DNS has 253, a port behind it 6.
MAX_LOCATION = 300  # characters
# How many stanzas may go out before an acknowledgement is asked for. Prosody and Openfire
# ask us after 5.
REQUEST_AFTER = 5  # stanzas
# What a server that never acknowledges may make us keep; then the stream is given up, since
# resuming it would lose something.
MAX_UNACKED = 8_192  # stanzas
MAX_UNACKED_BYTES = 16 * 1024 * 1024  # bytes


class StreamManagement:
    """The counters and the queue of one session, on however many connections.

    Args:
      jid: The full JID that was bound.

    Attributes:
      jid: As given.
      id: Of the session, to resume it; empty if the server cannot.
      max_seconds: How long the server keeps it after a break.
      location: Where the server wants it to be resumed, as it said; empty if anywhere.
    """

    def __init__(self, jid: JID) -> None:
        self.jid = jid
        self.id = ""
        self.max_seconds = 0
        self.location = ""
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._acked = 0
        self._handled = 0
        self._since_request = 0

    def enabled(self, element: Element) -> None:
        """Take the server's ``<enabled/>`` (section 3)."""
        if element.get("resume") in ("true", "1"):
            self.id = element.get("id", "")[:MAX_ID]
        text = element.get("max", "")
        self.max_seconds = (
            int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        )
        location = element.get("location", "")
        self.location = location if len(location) <= MAX_LOCATION else ""

    def forgotten(self, failed: Element | None) -> None:
        """The server cannot resume the session, but may know how far it had got.

        Args:
          failed: Its ``<failed/>`` (section 5), if it said that. A count that cannot be is no
            reason to refuse the new session: then `unacked` is what may be lost.
        """
        self.id = ""
        if failed is not None and failed.get("h") is not None:
            with suppress(RemoteProtocolError):
                self.acknowledged(read_h(failed))

    @property
    def handled(self) -> int:
        """Our ``h``: how many stanzas of the server's we have handled."""
        return self._handled

    @property
    def sent_count(self) -> int:
        """How many stanzas of ours have gone out; what the server's ``h`` may reach."""
        return (self._acked + len(self._queue)) % _WRAP

    @property
    def acked_count(self) -> int:
        """How many stanzas of ours the server has acknowledged; wraps as its ``h`` does."""
        return self._acked

    @property
    def unacked(self) -> tuple[bytes, ...]:
        """What the server has not acknowledged, in order."""
        return tuple(self._queue)

    @property
    def full(self) -> bool:
        """Whether the server has left too much unacknowledged."""
        return len(self._queue) > MAX_UNACKED or self._queued_bytes > MAX_UNACKED_BYTES

    def sent(self, stanza: bytes) -> bool:
        """Remember a stanza that goes out.

        Returns:
          Whether an acknowledgement is to be asked for behind it.
        """
        self._queue.append(stanza)
        self._queued_bytes += len(stanza)
        self._since_request += 1
        if self._since_request >= REQUEST_AFTER:
            self._since_request = 0
            return True
        return False

    def received(self) -> None:
        """Count a stanza of the server's."""
        self._handled = (self._handled + 1) % _WRAP

    def make_answer(self) -> Element:
        """Build the ``<a/>`` that tells the server what we have handled (section 4)."""
        return make(f"{{{NS}}}a", {"h": self._handled})

    def acknowledged(self, h: int) -> int:
        """Take the server's ``h``.

        Returns:
          How many stanzas it newly acknowledges.

        Raises:
          RemoteProtocolError: It acknowledges what was never sent (section 4).
        """
        newly = (h - self._acked) % _WRAP
        if newly > len(self._queue):
            raise RemoteProtocolError(
                f"the server acknowledges {h} stanzas, but only {self.sent_count} were sent"
            )
        for _ in range(newly):
            self._queued_bytes -= len(self._queue.popleft())
        self._acked = h
        return newly


def read_h(element: Element) -> int:
    """Read the counter of an ``<a/>`` or ``<resumed/>``.

    Raises:
      RemoteProtocolError: There is none.
    """
    text = element.get("h", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < _WRAP):
        raise RemoteProtocolError("the server acknowledges stanzas without a count")
    return int(text)
