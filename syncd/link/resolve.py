"""Where the server of a domain is: SRV records (RFC 6120 section 3.2, XEP-0368)."""

from __future__ import annotations

import ipaddress
import logging
import random
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import trio

from syncd.errors import OfflineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import dns.asyncresolver

log = logging.getLogger(__name__)

TLSMode = Literal["starttls", "direct", "auto"]

# RFC 6120 section 3.2.2: when the domain has no records.
STARTTLS_PORT = 5222
# By convention, when the user wants direct TLS and the domain has no records of it.
DIRECT_TLS_PORT = 5223
# Two questions, side by side; a silent name server must not hold the login up for longer.
LOOKUP_TIMEOUT = 5.0  # seconds
# Large providers have half a dozen. Each may cost a whole attempt to log in.
MAX_TARGETS = 8  # targets

# RFC 6120 section 3.2.1 and XEP-0368 section 3, by whether TLS begins with the first byte.
_SERVICES = {False: "_xmpp-client._tcp", True: "_xmpps-client._tcp"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One SRV record (RFC 2782), and which of the two services it is of.

    Attributes:
      host: A-labels without the final dot; empty: the service is not provided.
      direct: TLS from the first byte (``_xmpps-client``).
    """

    priority: int
    weight: int
    host: str
    port: int
    direct: bool


@dataclass(frozen=True, slots=True)
class Target:
    """A place to connect to.

    Attributes:
      host: A name as A-labels, or an IP address without brackets.
      direct: TLS from the first byte.
    """

    host: str
    port: int
    direct: bool

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def order(records: Iterable[Record], rng: Callable[[], float]) -> list[Target]:
    """Put records into the order in which they are to be tried.

    Those of both services are one set (XEP-0368 section 3): lowest priority first, within one
    priority by weighted chance, so that the load spreads as the administrator wants it.

    Args:
      records: As found; none says that the service is not provided.
      rng: Numbers from 0 to 1, 1 excluded.

    Returns:
      At most `MAX_TARGETS`.
    """
    # RFC 2782: any order, but those of weight 0 come first within their priority.
    left = sorted(records, key=lambda record: (record.priority, record.weight > 0, rng()))
    targets: list[Target] = []
    while left and len(targets) < MAX_TARGETS:
        group = [record for record in left if record.priority == left[0].priority]
        # RFC 2782: a whole number from 0 to the sum, both included; the first record at which
        # the running sum reaches it. So weight 0 has a chance, too, but a very small one.
        sums = list(accumulate(record.weight for record in group))
        chosen = group[bisect_left(sums, int(rng() * (sums[-1] + 1)))]
        left.remove(chosen)
        targets.append(Target(chosen.host, chosen.port, chosen.direct))
    return targets


def to_ascii(domain: str) -> str:
    """A domain as the DNS and certificates have it: A-labels (IDNA 2008).

    Args:
      domain: Of a JID: U-labels, or an IP literal, which loses its brackets.

    Raises:
      OfflineError: No name in the DNS can be so.
    """
    if domain.isascii():
        return domain.removeprefix("[").removesuffix("]")
    # Imported late: the tables cost memory, and nearly every domain is ASCII. The codec of
    # Python is IDNA 2003, which finds strasse.de for straße.de.
    import idna

    try:
        return idna.encode(domain).decode()
    except UnicodeError as error:
        raise OfflineError(
            f"{domain} is no name that the DNS could know: {error}", hint="mend account.jid"
        ) from error


async def find_server(
    domain: str,
    tls: TLSMode,
    *,
    resolver: dns.asyncresolver.Resolver | None = None,
    rng: Callable[[], float] = random.random,
) -> list[Target]:
    """Look up where the server of a domain is.

    Whoever can forge DNS can send us anywhere with this, so nothing depends on it: the
    certificate must be for the domain, wherever it leads.

    Args:
      domain: Of the JID.
      tls: Which service will do; "auto": both.
      resolver: Asks whom; default: the name servers of the system.
      rng: Numbers from 0 to 1, 1 excluded.

    Returns:
      Where to connect, in order, at least one: the domain itself if it has no records.

    Raises:
      OfflineError: The domain says that it has no such service.
    """
    name = to_ascii(domain)
    fallback = (
        Target(name, DIRECT_TLS_PORT, direct=True)
        if tls == "direct"
        else Target(name, STARTTLS_PORT, direct=False)
    )
    if _is_address(name):
        return [fallback]
    wanted = {"auto": (False, True), "starttls": (False,), "direct": (True,)}[tls]
    found: dict[bool, list[Record] | None] = dict.fromkeys(wanted)  # None: not known

    async def ask(direct: bool) -> None:
        found[direct] = await _ask(asking, name, direct=direct)

    # On the clock of trio: that of the resolver stands still, or jumps, with the system's.
    with trio.move_on_after(LOOKUP_TIMEOUT):
        # Anew each time: the network, and with it the name servers, may have changed.
        asking = resolver or await trio.to_thread.run_sync(_system_resolver)
        async with trio.open_nursery() as nursery:
            for direct in wanted:
                nursery.start_soon(ask, direct)
    records = [record for each in found.values() for record in each or ()]
    usable = [record for record in records if record.host]
    if records and not usable:
        # RFC 6120 section 3.2.1, XEP-0368: whoever says so must not be asked at his address.
        raise _not_provided(domain, tls, known=None not in found.values())
    if None in found.values():
        log.info("the name servers did not say all about where the server of %s is", name)
    return order(usable, rng) or [fallback]


def _not_provided(domain: str, tls: TLSMode, *, known: bool) -> OfflineError:
    if not known:
        return OfflineError(
            f"the name servers said only where the server of {domain} is not",
            hint="does the DNS work here? else name the server in account.server",
        )
    kind = "" if tls == "auto" else f' of the kind that account.tls = "{tls}" asks for'
    return OfflineError(
        f"{domain} says in the DNS that it has no XMPP service for clients{kind}",
        hint="is account.jid right? else name the server in account.server",
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _system_resolver() -> dns.asyncresolver.Resolver | None:
    # Imported late: 15 MiB, which an account with a configured server need not pay.
    import dns.asyncresolver
    import dns.resolver

    try:
        return dns.asyncresolver.Resolver()
    except dns.resolver.NoResolverConfiguration as error:
        log.info("no name server is known: %s", error)
        return None


async def _ask(
    resolver: dns.asyncresolver.Resolver | None, domain: str, *, direct: bool
) -> list[Record] | None:
    """The records of one service; None if nobody knows."""
    if resolver is None:
        return None
    import dns.exception
    import dns.resolver

    name = f"{_SERVICES[direct]}.{domain}."
    try:
        answer = await resolver.resolve(
            name, "SRV", lifetime=LOOKUP_TIMEOUT, raise_on_no_answer=False
        )
    except dns.resolver.NXDOMAIN:
        return []
    except dns.exception.DNSException as error:
        # Not a failure yet: /etc/hosts may know the domain, or the other service be known.
        log.debug("the name servers did not answer for %s: %s", name, error)
        return None
    return [
        Record(
            priority=rdata.priority,
            weight=rdata.weight,
            host=rdata.target.to_text(omit_final_dot=True).removesuffix("."),
            port=rdata.port,
            direct=direct,
        )
        for rdata in answer.rrset or ()
    ]
