"""What the server can be told to do wrong; each switch is what some real server does."""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import trio

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from syncd.xmpp.jid import JID

Match = Callable[["Element", "JID | None", "JID | None"], bool]
"""Takes a stanza, its sender and its addressee (None: the server); says whether it is meant."""


@dataclass(slots=True)
class Rule:
    """One order about stanzas, and how often it was carried out.

    Attributes:
      action: What happens to those that match.
      match: Which are meant.
      seconds: For a delay, how long.
      left: For how many more it holds.
      hits: For how many it held so far.
    """

    action: Literal["drop", "delay", "duplicate"]
    match: Match
    seconds: float = 0.0
    left: float = math.inf
    hits: int = 0


@dataclass(slots=True, kw_only=True)
class Faults:
    """Switches, all off at first; they may be changed while the server runs.

    Each stanza is held against the rules once: a client's when it comes in (a presence to
    everybody: once for each copy), the server's own when it goes out. The first rule that
    matches decides.

    Attributes:
      refuse_login: Refuse every login with this SASL condition, such as ``not-authorized``
        or ``temporary-auth-failure``; an empty string: don't.
      max_stanza: Answer a larger stanza with policy-violation, and close (bytes; Prosody:
        262144). None: the server's own limit.
      rate: Read no faster than this from each client (bytes per second; Debian's
        ejabberd: 3000). None: as fast as it comes.
      hidden: Mechanisms, channel bindings and namespaces that the client does not see in the
        offer, as if somebody between had taken them out; the server believes that it does.
      clock_ahead: The server's clock is so far ahead of the truth, seconds: its tokens expire
        sooner.
      forget_sessions: No session can be resumed (XEP-0198), as after a restart.
      forget_presence: When a session ends, tell nobody that it is gone.
      proxy_silent: The proxy takes connections and never answers.
      proxy_one_way: The first party at the proxy is the target, the second the requester,
        and bytes go from the requester to the target only (Openfire).
      proxy_keeps_tail: The proxy keeps the last bytes, up to 4 KiB, back until the sender
        closes (Prosody).
      proxy_requires_si: The proxy takes only the bytestreams of offers that the server saw
        pass, with name and size; other offers are refused with not-allowed (Openfire).
      proxy_cut_after: The proxy cuts both connections hard before it would pass more than
        so many bytes on.
      proxy_flip_at: The proxy flips a bit of the byte at this offset.
    """

    refuse_login: str = ""
    max_stanza: int | None = None
    rate: int | None = None
    hidden: frozenset[str] = frozenset()
    clock_ahead: float = 0.0
    forget_sessions: bool = False
    forget_presence: bool = False
    proxy_silent: bool = False
    proxy_one_way: bool = False
    proxy_keeps_tail: bool = False
    proxy_requires_si: bool = False
    proxy_cut_after: int | None = None
    proxy_flip_at: int | None = None
    _rules: list[Rule] = field(default_factory=list, init=False)
    _audible: trio.Event | None = field(default=None, init=False)

    def drop(self, match: Match, *, times: float = math.inf) -> Rule:
        """Lose the next stanzas that match."""
        return self._add(Rule("drop", match, left=times))

    def delay(self, match: Match, seconds: float, *, times: float = math.inf) -> Rule:
        """Deliver the next stanzas that match that much later; others overtake them."""
        return self._add(Rule("delay", match, seconds, times))

    def duplicate(self, match: Match, *, times: float = math.inf) -> Rule:
        """Deliver the next stanzas that match twice."""
        return self._add(Rule("duplicate", match, left=times))

    def clear(self) -> None:
        """Take every rule about stanzas back; the switches stay."""
        self._rules.clear()

    @property
    def silent(self) -> bool:
        """Whether the server stands still: it accepts, and neither reads nor answers.

        As a stopped process does: bytes wait in the kernel, and go on when it is off again.
        """
        return self._audible is not None

    @silent.setter
    def silent(self, silent: bool) -> None:
        if self._audible is not None:
            self._audible.set()
        self._audible = trio.Event() if silent else None

    async def until_audible(self) -> None:
        """Wait while the server is `silent`; otherwise return at once, without a checkpoint."""
        while self._audible is not None:
            await self._audible.wait()

    def copies(self, stanza: Element, sender: JID | None, to: JID | None) -> tuple[float, ...]:
        """Decide about one stanza.

        Returns:
          After how many seconds to deliver it, once for each copy; nothing: it is lost.
        """
        for rule in self._rules:
            if rule.left > 0 and rule.match(stanza, sender, to):
                rule.left -= 1
                rule.hits += 1
                return {"drop": (), "delay": (rule.seconds,), "duplicate": (0.0, 0.0)}[
                    rule.action
                ]
        return (0.0,)

    def _add(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        return rule


def payload(tag: str, kind: str | None = None) -> Match:
    """Match stanzas whose first child is a ``{namespace}name``.

    Args:
      tag: The child's.
      kind: The stanza's type as well, such as ``set``; None: any.
    """

    def match(stanza: Element, sender: JID | None, to: JID | None) -> bool:
        return (
            len(stanza) > 0
            and stanza[0].tag == tag
            and (kind is None or stanza.get("type") == kind)
        )

    return match


def cut(transport: trio.SocketStream) -> None:
    """Cut a connection so that the other end sees an error (TCP RST), and not its end."""
    if transport.socket.fileno() >= 0:
        off_at_once = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds
        transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, off_at_once)
        transport.socket.close()
