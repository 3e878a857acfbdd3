"""When to come back to the server, where to, and as whom. Sans-IO.

The constants have a reason each, and the reasons are other people's: the operator whose
server comes up again, the administrator whose log counts failed logins, and the other client
with our resource, which is a person's too.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

from syncd.errors import AuthenticationError, StanzaError, StreamError

if TYPE_CHECKING:
    from syncd.errors import SyncdError
    from syncd.xmpp.jid import JID
    from syncd.xmpp.sm import StreamManagement

# Doubling from the first to the last; the jitter keeps a thousand daemons from coming back
# to a restarted server in the same instant.
BACK_OFF_FIRST = 1.0  # seconds
BACK_OFF_LAST = 120.0  # seconds
# Wrong credentials stay wrong until somebody changes them, and fail2ban counts.
BACK_OFF_LOGIN = 300.0  # seconds
BACK_OFF_LOGIN_LAST = 3_600.0  # seconds

# RFC 6120 section 4.9.3: the server has something against us, not just now a problem of its
# own. With conflict, somebody took our resource over: coming straight back would be a war.
AGAINST_US = frozenset({"conflict", "not-authorized", "policy-violation"})

# A resource that somebody else has taken is asked for again only then: with a server that lets
# the newcomer have it, whoever has it is thrown out. Once in a day that is an accident, as at
# a restart, and who wants to stay takes another name; more often it would be a war.
ASK_AGAIN = 86_400.0  # seconds since the last conflict

# XEP-0198 lets the server keep it to itself for how long it keeps a session; Prosody and
# Openfire keep one for 600, ejabberd for 300.
DEFAULT_RESUME = 300.0  # seconds
# However long the server keeps it: who hears nothing of us for so long waits no longer, and
# what is queued for them is out of date.
MAX_RESUME = 3_600.0  # seconds

_HOST_AND_PORT = re.compile(r"(\[[^\[\]]{2,64}\]|[^\s:\[\]/@]{1,255})(?::([0-9]{1,5}))?")


def back_off(failures: int, problem: SyncdError | None, jitter: float) -> float:
    """How long to wait before the next attempt to connect.

    Args:
      failures: Attempts in a row that failed.
      problem: Why the last one did.
      jitter: 0 to 1.

    Returns:
      Seconds.
    """
    first, last = _bounds(problem)
    delay = first
    for _ in range(failures - 1):
        if delay >= last:
            break
        delay *= 2
    return min(delay, last) * (0.5 + jitter / 2)


def _bounds(problem: SyncdError | None) -> tuple[float, float]:
    """The first and the last pause after such a problem, seconds."""
    if isinstance(problem, AuthenticationError):
        return BACK_OFF_LOGIN, BACK_OFF_LOGIN_LAST
    # A bind can be refused for a conflict as well.
    if isinstance(problem, StreamError | StanzaError) and problem.condition in AGAINST_US:
        return BACK_OFF_LAST, BACK_OFF_LOGIN_LAST
    return BACK_OFF_FIRST, BACK_OFF_LAST


def is_of_network(problem: SyncdError | None) -> bool:
    """Whether another network may help; not where the server has something against us."""
    first, _ = _bounds(problem)
    return first == BACK_OFF_FIRST


class Pauses:
    """How long to wait before each login, by how the ones before went."""

    def __init__(self) -> None:
        self._failures = 0  # in a row

    def forgive(self) -> None:
        """Begin anew: what was in the way is not there any more."""
        self._failures = 0

    def after(self, problem: SyncdError | None, held: float, jitter: float) -> float:
        """Decide when to log in again.

        A session that held longer than the longest pause makes up for the failures before it.
        So a server that throws us out each time, however slowly, sees us ever more rarely.

        Args:
          problem: Why the last attempt failed, or its session ended.
          held: For how long there was a session, seconds; 0 if there was none, however long
            that took to turn out.
          jitter: 0 to 1.

        Returns:
          Seconds.
        """
        _, longest = _bounds(problem)
        self._failures = 0 if held > longest else self._failures + 1
        return back_off(self._failures, problem, jitter)


def resume_within(sm: StreamManagement) -> float:
    """For how many seconds after a break it is worth trying to resume a session."""
    return min(sm.max_seconds or DEFAULT_RESUME, MAX_RESUME)


def other_server(problem: SyncdError | None, default_port: int) -> tuple[str, int] | None:
    """Where a server sends us instead of serving us (RFC 6120 section 4.9.3.19).

    Args:
      problem: Why the stream ended.
      default_port: If it names none.

    Returns:
      Host and port; None if it does not send us anywhere that could be.
    """
    if not isinstance(problem, StreamError) or problem.condition != "see-other-host":
        return None
    return read_host(problem.other_host, default_port)


def read_host(text: str, default_port: int) -> tuple[str, int] | None:
    """Read a host as servers write it to clients (RFC 6120 section 4.9.3.19).

    Args:
      text: A name or an address, and perhaps a port.
      default_port: If there is none.

    Returns:
      Host and port; None if it is nowhere that could be.
    """
    try:
        # An IPv6 address belongs in brackets; alone it is no host with a port either.
        return str(ipaddress.IPv6Address(text)), default_port
    except ValueError:
        pass
    if (found := _HOST_AND_PORT.fullmatch(text)) is None:
        return None
    port = int(found[2]) if found[2] else default_port
    return (found[1].strip("[]"), port) if 0 < port < 65_536 else None


def other_resource(jid: JID, problem: SyncdError | None, suffix: str) -> JID | None:
    """As whom to come back after a conflict: not as the one that somebody else is now.

    Args:
      jid: As whom the user wanted us to log in, not what became of it.
      problem: Why the stream ended, or the bind was refused.
      suffix: Random, so that the other one does not come to the same.

    Returns:
      Whom to log in as; None if it was no conflict.
    """
    # RFC 6120 sections 4.9.3.3 and 7.7.2.2
    if isinstance(problem, StreamError | StanzaError) and problem.condition == "conflict":
        return jid.with_resource(f"{jid.resource[:64]}-{suffix}" if jid.resource else suffix)
    return None
