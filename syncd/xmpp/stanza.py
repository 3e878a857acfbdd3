"""Stanzas: iq, presence and their errors (RFC 6120 section 8, RFC 6121). Sans-IO.

Also what a server says of the stream that carries them: its limits, and why it ends it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

from syncd.errors import ErrorType, StanzaError, StreamError
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import (
    NS_CLIENT,
    NS_STREAMS,
    is_writable,
    local_name,
    make,
    namespace,
    serialise,
)

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

NS_STANZAS = "urn:ietf:params:xml:ns:xmpp-stanzas"
NS_STREAM_ERRORS = "urn:ietf:params:xml:ns:xmpp-streams"
NS_LIMITS = "urn:xmpp:stream-limits:0"

IQ = f"{{{NS_CLIENT}}}iq"
PRESENCE = f"{{{NS_CLIENT}}}presence"
MESSAGE = f"{{{NS_CLIENT}}}message"
ERROR = f"{{{NS_CLIENT}}}error"

IqType = Literal["get", "set", "result", "error"]

# An id of a real client has 36 characters at most; ours have 32.
MAX_ID = 1_024  # characters
# A reason is one sentence; it ends up in the log and in the status.
MAX_TEXT = 500  # characters
# RFC 6120 section 13.12: no server may take less.
LEAST_MAX_BYTES = 10_000  # bytes

# RFC 6120 section 8.3.3: the type that goes with each condition that we send or meet.
_TYPES = {
    "bad-request": ErrorType.MODIFY,
    "conflict": ErrorType.CANCEL,
    "feature-not-implemented": ErrorType.CANCEL,
    "forbidden": ErrorType.AUTH,
    "internal-server-error": ErrorType.CANCEL,
    "item-not-found": ErrorType.CANCEL,
    "jid-malformed": ErrorType.MODIFY,
    "not-acceptable": ErrorType.MODIFY,
    "not-allowed": ErrorType.CANCEL,
    "not-authorized": ErrorType.AUTH,
    "recipient-unavailable": ErrorType.WAIT,
    "remote-server-not-found": ErrorType.CANCEL,
    "remote-server-timeout": ErrorType.WAIT,
    "resource-constraint": ErrorType.WAIT,
    "service-unavailable": ErrorType.CANCEL,
    "undefined-condition": ErrorType.CANCEL,
}


@dataclass(frozen=True, slots=True)
class Iq:
    """A request or its answer (RFC 6120 section 8.2.3).

    Attributes:
      type: One of get, set, result, error.
      id: The requester's.
      sender: Address in ``from``; None when the server left it out.
      payload: The first child that is no error, if any.
      element: The whole stanza.
    """

    type: IqType
    id: str
    sender: JID | None
    payload: Element | None
    element: Element


class Request(Protocol):
    """Sends an iq and returns its result; raises `StanzaError` or `OfflineError`.

    The iq is queued for the server before it waits for the first time: what is called first
    is sent first.
    """

    async def __call__(  # noqa: D102 - the class says it
        self, kind: IqType, to: JID | None, payload: Element, timeout: float
    ) -> Iq: ...


def read_iq(element: Element) -> Iq:
    """Read an iq.

    Raises:
      StanzaError: It is malformed, and bad-request (or jid-malformed) is the answer.
    """
    kind, ident = element.get("type", ""), element.get("id", "")
    if kind not in ("get", "set", "result", "error"):
        raise StanzaError(ErrorType.MODIFY, "bad-request", f"an iq of type {kind[:20]!r}")
    if not 0 < len(ident) <= MAX_ID:
        raise StanzaError(ErrorType.MODIFY, "bad-request", "an iq without a usable id")
    payloads = [child for child in element if child.tag != ERROR]
    # RFC 6120 section 8.2.3: a request has exactly one child.
    if kind in ("get", "set") and len(payloads) != 1:
        raise StanzaError(ErrorType.MODIFY, "bad-request", "an iq must have one child")
    return Iq(
        cast("IqType", kind),
        ident,
        read_from(element),
        payloads[0] if payloads else None,
        element,
    )


def read_from(element: Element) -> JID | None:
    """The sender of a stanza, None if not given.

    Raises:
      StanzaError: ``from`` is no JID.
    """
    text = element.get("from")
    if text is None:
        return None
    try:
        return JID.parse(text)
    except ValueError as error:
        raise StanzaError(ErrorType.MODIFY, "jid-malformed", str(error)) from error


def make_iq(kind: IqType, ident: str, to: JID | None, *children: Element) -> Element:
    """Build an iq; ``from`` is left to the server (RFC 6120 section 8.1.2.1)."""
    attributes = {"type": kind, "id": ident, "to": str(to) if to else None}
    return make(IQ, attributes, *children)


def make_presence(
    kind: str | None = None, to: JID | None = None, priority: int | None = None
) -> Element:
    """Build a presence (RFC 6121 section 4.7)."""
    element = make(PRESENCE, {"type": kind, "to": str(to) if to else None})
    if priority is not None:
        element.append(make(f"{{{NS_CLIENT}}}priority", text=str(priority)))
    return element


def make_error(error: StanzaError) -> Element:
    """Build the ``<error/>`` that tells a peer why (RFC 6120 section 8.3.2)."""
    element = make(ERROR, {"type": error.type}, make(f"{{{NS_STANZAS}}}{error.condition}"))
    # A sentence of ours may name a file as the disk has it, which XML cannot always carry.
    if error.text and is_writable(error.text[:MAX_TEXT]):
        element.append(make(f"{{{NS_STANZAS}}}text", text=error.text[:MAX_TEXT]))
    if error.app:
        element.append(make(error.app))
    return element


def make_error_reply(request: Element, error: StanzaError) -> Element:
    """Build the error answer to a request, whatever state that request is in."""
    return make(
        request.tag,
        {"type": "error", "id": request.get("id"), "to": request.get("from")},
        make_error(error),
    )


def read_error(stanza: Element) -> StanzaError:
    """Read a stanza of type error, however little the refuser said.

    COMPAT(old servers and clients): a missing condition is read from the legacy code, a
    missing type from the condition (XEP-0086).
    """
    sender = stanza.get("from", "")
    element = stanza.find(ERROR)
    if element is None:
        return StanzaError(ErrorType.CANCEL, "undefined-condition", by=sender)
    condition = text = app = ""
    for child in element:
        if namespace(child.tag) != NS_STANZAS:
            app = app or child.tag
        elif local_name(child.tag) == "text":
            text = (child.text or "").strip()[:MAX_TEXT]
        else:
            condition = condition or local_name(child.tag)
    if not condition:
        condition = _LEGACY.get(element.get("code", ""), "undefined-condition")
        text = text or (element.text or "").strip()[:MAX_TEXT]
    try:
        kind = ErrorType(element.get("type", ""))
    except ValueError:
        kind = _TYPES.get(condition, ErrorType.CANCEL)
    return StanzaError(kind, condition, text, by=sender, app=app)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes on a stream (XEP-0478).

    Attributes:
      max_bytes: How long one stanza may be; 0 if it does not say.
      idle_seconds: How long we may be silent; 0 if it does not say.
    """

    max_bytes: int = 0
    idle_seconds: int = 0

    def check(self, stanza: bytes) -> None:
        """Keep a stanza back that would end the stream, and everybody else's transfers with it.

        Most servers do not say what they take, and every one takes `LEAST_MAX_BYTES`.

        Raises:
          StanzaError: It is too long; the server would say policy-violation.
        """
        if len(stanza) > (self.max_bytes or LEAST_MAX_BYTES):
            takes = (
                f"where our server takes {self.max_bytes}"
                if self.max_bytes
                else f"where a server need not take more than {LEAST_MAX_BYTES}"
            )
            raise StanzaError(
                ErrorType.MODIFY,
                "policy-violation",
                f"a stanza of {len(stanza)} bytes, {takes}",
            )

    @property
    def speak_every(self) -> float:
        """How often to say something, seconds; twice as often as the server wants to hear."""
        return max(1.0, self.idle_seconds / 2) if self.idle_seconds else math.inf


def read_limits(features: Element) -> Limits:
    """Read the limits in a stream's features (XEP-0478); what makes no sense is no limit."""
    max_bytes = _number(features, "max-bytes")
    return Limits(
        max_bytes=max(max_bytes, LEAST_MAX_BYTES) if max_bytes else 0,
        idle_seconds=_number(features, "idle-seconds"),
    )


def _number(features: Element, name: str) -> int:
    found = features.findtext(f"{{{NS_LIMITS}}}limits/{{{NS_LIMITS}}}{name}", "").strip()
    return int(found) if found.isascii() and found.isdigit() and len(found) <= 10 else 0


# What the user can do; every other condition passes by itself or is a bug.
_STREAM_HINTS = {
    "conflict": "another client has logged in with the same resource; syncd comes back later "
    "under another one",
    "policy-violation": "the server limits how much or how often its clients send; syncd "
    "comes back, but slowly. Its log says which limit it was",
}


def read_stream_error(element: Element) -> StreamError:
    """Read why the server ends the stream (RFC 6120 section 4.9.2)."""
    condition, text, other_host = "undefined-condition", "", ""
    for child in element:
        if namespace(child.tag) != NS_STREAM_ERRORS:
            continue
        said = (child.text or "").strip()[:MAX_TEXT]
        if local_name(child.tag) == "text":
            text = said
        else:
            condition = local_name(child.tag)
            other_host = said if condition == "see-other-host" else ""
    hint = _STREAM_HINTS.get(condition, "")
    return StreamError(condition, text, other_host=other_host, hint=hint)


def write_stream_error(condition: str, *details: Element) -> bytes:
    """Write why we end the stream (RFC 6120 section 4.9.2), as it stands in front of a footer.

    Args:
      condition: The defined condition.
      details: Application-specific ones.
    """
    error = make(
        f"{{{NS_STREAMS}}}error", None, make(f"{{{NS_STREAM_ERRORS}}}{condition}"), *details
    )
    # The one place for a prefix: RFC 6120 section 4.8.5 declares it in the header.
    text = serialise(error, outer=NS_STREAMS)
    return text.replace(b"<error", b"<stream:error", 1).replace(b"</error", b"</stream:error")


# XEP-0086 section 3, the codes that real clients still send alone.
_LEGACY = {
    "400": "bad-request",
    "401": "not-authorized",
    "403": "forbidden",
    "404": "item-not-found",
    "405": "not-allowed",
    "406": "not-acceptable",
    "408": "remote-server-timeout",
    "409": "conflict",
    "500": "internal-server-error",
    "501": "feature-not-implemented",
    "503": "service-unavailable",
    "504": "remote-server-timeout",
}
