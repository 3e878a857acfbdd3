"""Every error that syncd tells anybody about.

::

    SyncdError
    ├─ ConfigError · JournalError · NotFoundError
    ├─ ControlError ─ NotRunningError · LockedError
    ├─ XMPPError
    │  ├─ OfflineError                          we, or the peer, are not there now
    │  ├─ AuthenticationError                   the server does not take our credentials
    │  ├─ RemoteProtocolError                   the server broke the protocol
    │  ├─ StreamError(condition, text)          RFC 6120 4.9
    │  └─ StanzaError(type, condition, text)    RFC 6120 8.3
    └─ TransferError(type)
       ├─ DeclinedError                         the peer does not want the file
       ├─ BytestreamError                       no way to the peer; cause: a group, one each
       │  └─ OpeningError(reason)               not by this way; perhaps by another
       └─ StalledError · TruncatedError · IntegrityError · ChangedError

The message is a sentence for the user: what happened and why; `hint` is what to do. The
RFC's error type decides the retry: WAIT is tried again by itself, everything else needs a
person. Sans-IO. Our own misuse is AssertionError or ValueError and not in this tree.
"""

from __future__ import annotations

import enum
from typing import Literal


class ErrorType(enum.StrEnum):
    """What to do about an error (RFC 6120 section 8.3.2)."""

    AUTH = "auth"  # retry after providing credentials
    CANCEL = "cancel"  # do not retry
    CONTINUE = "continue"  # only a warning
    MODIFY = "modify"  # retry after changing what was sent
    WAIT = "wait"  # retry later


# Why a SOCKS5 bytestream did not come about; see `OpeningError`.
OpeningReason = Literal[
    "nothing", "refused", "silent", "nonsense", "unconnected", "unreachable", "activation"
]


class SyncdError(Exception):
    """The root of the tree.

    Args:
      message: A sentence for the user: what happened, and why.
      hint: What to do about it; empty when it passes by itself.
      type: Whether a retry can help; default: the class's.

    Attributes:
      hint: As given.
      type: As given.
    """

    default_type = ErrorType.CANCEL

    def __init__(self, message: str, *, hint: str = "", type: ErrorType | None = None) -> None:  # noqa: A002 - the RFC's word
        super().__init__(message)
        self.hint = hint
        self.type = type if type is not None else self.default_type


class ConfigError(SyncdError):
    """The configuration cannot be used; the user must change it."""


class JournalError(SyncdError):
    """The journal cannot be read or written."""


class NotFoundError(SyncdError):
    """There is no file, folder or peer of the name that was given."""


class ControlError(SyncdError):
    """The control socket was not answered, or answered with a refusal."""


class NotRunningError(ControlError):
    """No daemon serves the control socket."""


class LockedError(ControlError):
    """Another daemon already uses this state directory or control socket."""


class XMPPError(SyncdError):
    """Something between us and the XMPP server, or beyond it."""

    default_type = ErrorType.WAIT


class OfflineError(XMPPError):
    """We are not connected, or the peer is not."""


class AuthenticationError(XMPPError):
    """The server does not take our credentials, or cannot prove it knows them."""

    default_type = ErrorType.AUTH


class RemoteProtocolError(XMPPError):
    """The other end broke the protocol."""


class StreamError(XMPPError):
    """The stream has ended with an error (RFC 6120 section 4.9).

    Args:
      condition: The defined condition, such as ``conflict``.
      text: The other end's own words, if any.
      other_host: Where to go instead, as the other end wrote it, if it is ``see-other-host``.
      hint: As for `SyncdError`.

    Attributes:
      condition: As given.
      text: As given.
      other_host: As given.
    """

    def __init__(
        self, condition: str, text: str = "", *, other_host: str = "", hint: str = ""
    ) -> None:
        super().__init__(f"the stream ended: {text or condition} [{condition}]", hint=hint)
        self.condition = condition
        self.text = text
        self.other_host = other_host


class StanzaError(XMPPError):
    """A request was refused, or is to be refused (RFC 6120 section 8.3).

    Args:
      type: What the requester may do about it.
      condition: The defined condition, such as ``item-not-found``.
      text: The refuser's own words, if any.
      by: Who refused, if known: a JID.
      app: An application-specific condition as ``{namespace}name``, if any.
    """

    def __init__(
        self,
        type: ErrorType,  # noqa: A002 - the RFC's word
        condition: str,
        text: str = "",
        *,
        by: str = "",
        app: str = "",
    ) -> None:
        who = f"{by} refused" if by else "refused"
        super().__init__(f"{who}: {text or condition} [{condition}]", type=type)
        self.condition = condition
        self.text = text
        self.by = by
        self.app = app


class TransferError(SyncdError):
    """A file did not reach the other end.

    Attributes:
      began: At which byte of the file it began: all before that is kept there.
      moved: How many bytes went out before it ended; what has arrived of them is kept there.
    """

    default_type = ErrorType.WAIT
    began: int = 0
    moved: int = 0


class DeclinedError(TransferError):
    """The peer does not want the file."""

    default_type = ErrorType.CANCEL


class BytestreamError(TransferError):
    """No way led to the peer; the cause is a group with one error for each that was tried."""


class OpeningError(BytestreamError):
    """No bytestream came about.

    Args:
      reason: What stood in the way; see the attribute.
      message: As for `SyncdError`.
      hint: As for `SyncdError`.
      type: As for `SyncdError`.

    Attributes:
      reason: ``nothing``: we have no address to offer; ``refused``: the target answered with
        an error; ``silent``: the target did not answer; ``nonsense``: its answer has no
        meaning; ``unconnected``: it says that it is connected to us, and is not;
        ``unreachable``: we cannot connect to the proxy that it uses; ``activation``: the proxy
        does not join the two ends.
      crowded: Only our own addresses were tried, because other transfers had all places at
        proxies, one of which might have led there.
    """

    def __init__(
        self,
        reason: OpeningReason,
        message: str,
        *,
        hint: str = "",
        type: ErrorType | None = None,  # noqa: A002 - the RFC's word
    ) -> None:
        super().__init__(message, hint=hint, type=type)
        self.reason = reason
        self.crowded = False

    @property
    def later(self) -> bool:
        """Whether the target wants it tried again, and no other way instead."""
        cause = self.__cause__
        return isinstance(cause, StanzaError) and cause.type is ErrorType.WAIT

    @property
    def same_sid(self) -> bool:
        """Whether another method may be tried with the same sid.

        COMPAT(pidgin, slixmpp): only behind an error of theirs do they wait for it; after
        everything else they take a new offer with a new sid.
        """
        return self.reason == "refused" and not self.later


class StalledError(TransferError):
    """No byte moved for too long."""


class TruncatedError(TransferError):
    """The bytestream ended before the file did."""


class IntegrityError(TransferError):
    """What arrived is not what was sent."""


class ChangedError(TransferError):
    """The file changed, or went away, while it was being sent."""
