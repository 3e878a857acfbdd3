"""Stream management (XEP-0198), the server's side of one stream. Sans-IO."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from syncd.errors import ErrorType, RemoteProtocolError, StanzaError
from syncd.xmpp import sm
from syncd.xmpp.jid import JID
from syncd.xmpp.sm import StreamManagement
from syncd.xmpp.stanza import NS_STANZAS
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

# How long a session waits for its client to come back; Prosody's and Openfire's.
RESUME_WITHIN = 600  # seconds

Resume = Callable[[JID, str], StreamManagement]
"""Takes the account and the id of a session, and hands the session over.

Raises `StanzaError` where there is none such.
"""


class Management:
    """What one stream counts, and how it goes on with what another has counted.

    Args:
      able: The server can; else it refuses.
      token: Gives a fresh random printable string of at least 128 bits.
      resume: Hands a former session over.

    Attributes:
      kept: The counters and what the client has not acknowledged; None before it is enabled.
    """

    def __init__(self, *, able: bool, token: Callable[[], str], resume: Resume) -> None:
        self.kept: StreamManagement | None = None
        self._able = able
        self._token = token
        self._resume = resume

    @property
    def resumable(self) -> bool:
        """Whether another stream can go on with this one's session."""
        return self.kept is not None and bool(self.kept.id)

    def enable(self, jid: JID, element: Element) -> Element:
        """Take an ``<enable/>`` (section 3); gives the answer."""
        if not self._able or self.kept is not None:
            return _failed("unexpected-request")
        self.kept = StreamManagement(jid)
        if element.get("resume") not in ("true", "1"):
            return make(f"{{{sm.NS}}}enabled")
        self.kept.id, self.kept.max_seconds = self._token(), RESUME_WITHIN
        attributes = {"id": self.kept.id, "resume": "true", "max": str(RESUME_WITHIN)}
        return make(f"{{{sm.NS}}}enabled", attributes)

    def resume(self, account: JID, element: Element) -> tuple[Element, bool]:
        """Take a ``<resume/>`` (section 5).

        Returns:
          The answer, and whether the session goes on here; `kept` is then its own, and
          whatever is left there is to be sent again.

        Raises:
          RemoteProtocolError: The client says that it got more than was sent.
        """
        if not self._able:
            return _failed("unexpected-request"), False
        try:
            h = sm.read_h(element)
            kept = self._resume(account, element.get("previd", ""))
        except RemoteProtocolError:
            return _failed("bad-request"), False
        except StanzaError as error:
            return _failed(error.condition), False
        self.kept = kept
        kept.acknowledged(h)
        attributes = {"previd": kept.id, "h": str(kept.handled)}
        return make(f"{{{sm.NS}}}resumed", attributes), True

    def too_high(self, element: Element) -> Element:
        """What a client is told that acknowledges more than was sent (section 6)."""
        count = str(self.kept.sent_count if self.kept is not None else 0)
        attributes = {"h": element.get("h", ""), "send-count": count}
        return make(f"{{{sm.NS}}}handled-count-too-high", attributes)


def no_session(_: JID, __: str) -> StreamManagement:
    """Hand over no session: there never was one."""
    raise StanzaError(ErrorType.CANCEL, "item-not-found")


def _failed(condition: str) -> Element:
    return make(f"{{{sm.NS}}}failed", None, make(f"{{{NS_STANZAS}}}{condition}"))
