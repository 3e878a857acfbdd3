"""Which proxies are known, how good they are, and what to offer to whom. Sans-IO.

`Proxies` is told what was found out (`found`, `tested`, `refused`, `unusable`) and what came
of using it (`worked`, `failed`, `swallowed`, `busy`), says what is to be found out next
(`due_servers`, `due_proxies`), and from all that puts an offer together (`choose`).

There is no way to know where a peer is, so the way that worked is remembered. To a stranger our
own addresses come first: a connection inside a network is the fastest there is, and costs
nobody else anything. Where that led nowhere, a proxy comes first for a day. And where it led to
the peer, but no byte got through, it is not offered at all for a while, nor is a proxy of which
that is known: whoever connects to it uses it.

Every time here is in seconds since 1970, as it must outlive a restart; so a clock that is set
back or ahead makes something known too old or too young, and never wrong for long.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal

import msgspec

from syncd.bytestreams.s5b import MAX_HOST, Streamhost
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Policy = Literal["auto"] | tuple[JID, ...]
"""What the user wants: to find proxies, or these and no others (perhaps none)."""

# COMPAT(psi): reads five. COMPAT(qxmpp): each dead one costs it 7 s.
MAX_STREAMHOSTS = 5
# Of ours, in front of the first proxy: so that a proxy is at the third place at the latest.
MAX_NEAR = 2  # streamhosts
# COMPAT(openfire): a proxy may list every address of its machine; an IPv4 and an IPv6 one do.
MAX_PER_PROXY = 2  # streamhosts in an offer
# How many of these are looked at; the rest of a long list is of container bridges.
MAX_TESTED = 4  # streamhosts of a proxy

# Our own and those of peers; each is asked for all that it has.
MAX_SERVERS = 16  # servers
# A server has one proxy, seldom two.
MAX_FOUND = 4  # proxies of a server
# More than anybody has recently sent to; the one not sent to for longest is forgotten.
MAX_PEERS = 256  # peers
# A peer's ways: directly, or by a proxy.
MAX_FAILED = 8  # ways of a peer
# Peers and proxies at their most; more was not written by us.
MAX_MEMORY = 262_144  # bytes

# Proxies move seldom, but networks do; what is down now may be up soon.
REFRESH = 3600.0  # seconds
# Doubling from the first to the last: a server that has just started has its proxy in a moment.
RETRY_FIRST = 2.0  # seconds
RETRY = 300.0  # seconds
# What a server's administrator has decided.
REFUSED_FOR = 86_400.0  # seconds
# As long as a visit to a café: then the peer may be in another network.
FAILED_FOR = 3600.0  # seconds
# How long a way that worked comes first; then a direct connection gets another chance.
TRUSTED_FOR = 86_400.0  # seconds
# Until one of the transfers that fill a proxy up has ended.
BUSY_FOR = 30.0  # seconds

# After so many failures in a row more of them say nothing.
_MANY = 3  # failures

_ADMINISTRATOR = (
    "its administrator must set the proxy's external address (Openfire: xmpp.proxy.externalip; "
    "Prosody: proxy65_address; ejabberd: hostname of mod_proxy65) and open its port"
)


@dataclass(frozen=True, slots=True)
class Probed:
    """An address of a proxy, as it is seen from here.

    Attributes:
      streamhost: Where, and whom to tell to activate.
      latency: How long connecting and greeting took, seconds; None: it cannot be reached.
      reason: Why not, in words.
    """

    streamhost: Streamhost
    latency: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is known of a proxy, or of a server that should have one, for the user.

    Attributes:
      jid: Whom it is about.
      usable: Whether it can be offered to peers.
      text: A sentence.
      hint: What to do about it; empty if nothing.
    """

    jid: JID
    usable: bool
    text: str
    hint: str = ""


@dataclass(slots=True, eq=False)
class _Server:
    proxies: tuple[JID, ...] = ()
    due: float = 0.0
    problem: str = ""
    misses: int = 0  # looks that found nothing, in a row


@dataclass(slots=True, eq=False)
class _Proxy:
    tested: tuple[Probed, ...] = ()
    due: float = 0.0
    problem: str = ""
    refused: str = ""  # the condition
    refused_until: float = 0.0
    busy_until: float = 0.0
    failures: int = 0  # since it worked
    misses: int = 0  # looks that could not reach it, in a row
    worked_at: float = 0.0

    def reachable(self) -> list[Probed]:
        """Its addresses that can be reached, those that others can reach first."""
        able = [each for each in self.tested if each.latency is not None]
        return sorted(able, key=lambda each: (_reach(each.streamhost.host), each.latency))


@dataclass(slots=True, eq=False)
class _Peer:
    via: JID | None = None  # the proxy that worked last, or directly
    host: str = ""  # which of our addresses it was
    worked_at: float = 0.0  # 0: never
    failed: dict[JID | None, float] = field(default_factory=dict)  # until when
    swallowed: dict[JID | None, float] = field(default_factory=dict)  # until when


class Proxies:
    """Everything that is known of proxies, and of the ways to peers.

    Args:
      policy: Which proxies are wanted.
      own_domain: Our account's server.
      peer_domains: The servers of the peers, which may have proxies too.
    """

    def __init__(
        self, policy: Policy, own_domain: str, peer_domains: Iterable[str] = ()
    ) -> None:
        self._configured = () if policy == "auto" else tuple(each.bare for each in policy)
        domains = dict.fromkeys([own_domain, *peer_domains]) if policy == "auto" else {}
        self._own_domain = own_domain
        self._servers = {domain: _Server() for domain in list(domains)[:MAX_SERVERS]}
        self._proxies = {jid: _Proxy() for jid in self._configured}
        self._peers: dict[JID, _Peer] = {}

    def __repr__(self) -> str:
        usable = sum(bool(proxy.reachable()) for proxy in self._proxies.values())
        return f"<Proxies known={len(self._proxies)} reachable={usable}>"

    # --- What is to be found out

    def due_servers(self, now: float) -> list[str]:
        """The servers to be asked now what they have; our own first."""
        return [domain for domain, server in self._servers.items() if _is_due(server.due, now)]

    def due_proxies(self, now: float) -> list[JID]:
        """The proxies to be asked now where they are."""
        return [
            jid
            for jid in self._listed()
            if _is_due(self._proxies[jid].due, now) and not self._is_refused(jid, now)
        ]

    def next_due(self, now: float) -> float:
        """How long nothing is due, seconds; at most `REFRESH`."""
        dues = [server.due for server in self._servers.values()]
        dues += [
            self._proxies[jid].due for jid in self._listed() if not self._is_refused(jid, now)
        ]
        waits = (0.0 if _is_due(due, now) else due - now for due in dues)
        return min(waits, default=REFRESH)

    def expire(self) -> None:
        """Let everything be found out anew: we may be in another network now."""
        for server in self._servers.values():
            server.due = 0.0
        for proxy in self._proxies.values():
            proxy.due = 0.0

    def is_own(self, jid: JID) -> bool:
        """Whether the user or our own server named it, and not the server of a peer."""
        own = self._servers.get(self._own_domain)
        return jid in self._configured or (own is not None and jid in own.proxies)

    def worth_testing(
        self, jid: JID, streamhosts: Sequence[Streamhost]
    ) -> tuple[Streamhost, ...]:
        """Choose from what a proxy said where it is.

        Args:
          jid: The proxy.
          streamhosts: Its answer.

        Returns:
          At most four, those that others can reach first. None under another JID: the
          activation would go to somebody else; and from the proxy of a peer's server none
          on this machine.
        """
        worst = _LOOPBACK if self.is_own(jid) else _PRIVATE
        meant = [
            each for each in streamhosts if each.jid.bare == jid and _reach(each.host) <= worst
        ]
        return tuple(sorted(meant, key=lambda each: _reach(each.host))[:MAX_TESTED])

    # --- What was found out

    def found(self, domain: str, jids: Sequence[JID], now: float) -> None:
        """Note which proxies a server has, perhaps none."""
        server = self._servers[domain]
        server.proxies = tuple(dict.fromkeys(jid.bare for jid in jids))[:MAX_FOUND]
        server.problem = ""
        server.due = now + self._pause(domain, server, found=bool(jids))
        listed = self._listed()
        self._proxies = {jid: self._proxies.get(jid) or _Proxy() for jid in listed}

    def not_found(self, domain: str, reason: str, now: float) -> None:
        """Note that a server did not tell what it has; what it told before still counts."""
        server = self._servers[domain]
        server.problem = reason
        server.due = now + self._pause(domain, server, found=False)

    def _pause(self, domain: str, server: _Server, *, found: bool) -> float:
        server.misses = 0 if found else server.misses + 1
        # A peer's server is asked on a guess.
        if found or domain != self._own_domain:
            return REFRESH
        return _retry(server.misses)

    def tested(self, jid: JID, results: Sequence[Probed], now: float) -> None:
        """Note where a proxy is, and whether it can be reached there."""
        proxy = self._proxies.get(jid)
        if proxy is None:
            return  # its server has taken it back meanwhile
        reachable = any(each.latency is not None for each in results)
        proxy.tested = tuple(results[:MAX_TESTED])
        proxy.problem = proxy.refused = ""
        proxy.refused_until = 0.0
        proxy.misses = 0 if reachable else proxy.misses + 1
        proxy.due = now + (REFRESH if reachable else _retry(proxy.misses))

    def refused(self, jid: JID, condition: str, now: float) -> None:
        """Note that a proxy does not serve us; it is left in peace for a day."""
        if proxy := self._proxies.get(jid.bare):
            proxy.tested, proxy.problem = (), ""
            proxy.refused, proxy.refused_until = condition, now + REFUSED_FOR

    def unusable(self, jid: JID, reason: str, now: float) -> None:
        """Note that a proxy did not tell where it is."""
        if proxy := self._proxies.get(jid.bare):
            proxy.tested, proxy.problem = (), reason
            proxy.misses += 1
            proxy.due = now + _retry(proxy.misses)

    # --- What came of it

    def lost(self, jid: JID, reason: str) -> None:
        """Note that we could not reach a proxy when it was needed; it is to be looked at."""
        if proxy := self._proxies.get(jid.bare):
            proxy.tested, proxy.problem = (), reason
            proxy.failures += 1
            proxy.due = 0.0

    def worked(self, peer: JID, via: JID | None, now: float, *, host: str = "") -> None:
        """Note which way led to a peer.

        Args:
          peer: Whom.
          via: The proxy's JID, or None for a direct connection.
          now: The time.
          host: The address of ours that it used, if it is known.
        """
        way = via.bare if via else None
        known = self._remember(peer)
        known.via, known.host, known.worked_at = way, host, now
        known.failed.pop(way, None)
        known.swallowed.pop(way, None)
        if way in self._proxies:
            self._proxies[way].failures = 0
            self._proxies[way].worked_at = now

    def failed(self, peer: JID, ways: Iterable[JID | None], now: float) -> None:
        """Note which ways did not lead to a peer; None is a direct connection."""
        known = self._remember(peer)
        for way in dict.fromkeys(jid.bare if jid else None for jid in ways):
            known.failed.pop(way, None)
            known.failed[way] = now + FAILED_FOR
            if way in self._proxies:
                self._proxies[way].failures += 1
        while len(known.failed) > MAX_FAILED:
            del known.failed[next(iter(known.failed))]

    def swallowed(self, peer: JID, way: JID | None, now: float) -> None:
        """Note that a way led to a peer, and that none of the bytes on it arrived.

        Something in between lets the handshakes through and not the data: mostly a tunnel that
        drops large packets without a word (RFC 4821 section 1), or a firewall.
        """
        self.failed(peer, [way], now)
        known = self._remember(peer)
        known.swallowed = {
            way: until for way, until in known.swallowed.items() if way in known.failed
        }
        known.swallowed[way.bare if way else None] = now + FAILED_FOR

    def busy(self, jid: JID, now: float) -> None:
        """Note that a proxy takes no more transfers just now."""
        if proxy := self._proxies.get(jid.bare):
            proxy.busy_until = now + BUSY_FOR

    # --- What it is good for

    def usable(self, now: float, peer: JID | None = None) -> bool:
        """Whether there is any proxy to offer, to a certain peer."""
        known = self._peers.get(peer.bare) if peer else None
        return any(not _has_swallowed(known, jid, now) for jid in self._ranked(known, now))

    def swallows_direct(self, peer: JID, now: float) -> bool:
        """Whether direct connections to a peer are known to carry nothing."""
        return _has_swallowed(self._peers.get(peer.bare), None, now)

    def prefers_proxy(self, peer: JID, now: float) -> bool:
        """Whether a proxy will probably be the way to a peer, if we are open to all."""
        known = self._peers.get(peer.bare)
        ranked = self._ranked(known, now)
        if known is None or not ranked or _has_failed(known, ranked[0], now):
            return False
        by_proxy = known.via is not None and _within(known.worked_at, now, TRUSTED_FOR)
        return by_proxy or _has_failed(known, None, now)

    def choose(
        self, peer: JID, direct: Sequence[Streamhost], now: float, *, mediated: bool = True
    ) -> tuple[Streamhost, ...]:
        """Put an offer together (XEP-0065 section 5.3.1).

        Ways that carried nothing are left out, unless there are no others at all.

        Args:
          peer: To whom.
          direct: Our own addresses, the likeliest first.
          now: The time.
          mediated: Whether proxies may be used.

        Returns:
          At most five, each address once, those that probably work first. If there is a
          proxy, it is among the first three.
        """
        known = self._peers.get(peer.bare)
        ranked = self._ranked(known, now)
        able = [jid for jid in ranked if not _has_swallowed(known, jid, now)]
        if _has_swallowed(known, None, now):
            direct = direct if not able else []
        elif direct:
            ranked = able
        ranked = able or ranked
        near = [each for each in direct if _reach(each.host) <= _LOOPBACK]
        if known is not None and known.via is None:
            near.sort(key=lambda each: each.host != known.host)
        ways = [
            [each.streamhost for each in self._proxies[jid].reachable()[:MAX_PER_PROXY]]
            for jid in (ranked if mediated else ())
        ]
        best, others = (ways[0] if ways else []), list(chain(*ways[1:]))
        first, rest = near[:MAX_NEAR], [*others, *near[MAX_NEAR:]]
        swap = mediated and self.prefers_proxy(peer, now)
        order = [*best, *first, *rest] if swap else [*first, *best, *rest]
        once: dict[tuple[str, int], Streamhost] = {}
        for each in order:
            once.setdefault((each.host, each.port), each)
        return tuple(once.values())[:MAX_STREAMHOSTS]

    def report(self, now: float) -> tuple[Report, ...]:
        """Tell the user about each proxy, and if our own server has none."""
        found = [_report(jid, self._proxies[jid], now) for jid in self._listed()]
        own = self._servers.get(self._own_domain)
        if own is not None and not own.proxies and (own.due or own.problem):
            text = f"{self._own_domain} offers no proxy for file transfers"
            if own.problem:
                text = f"{self._own_domain} did not say whether it has a proxy: {own.problem}"
            hint = "" if found else 'name one in bytestreams.proxies = ["proxy.example.org"]'
            jid = JID("", self._own_domain)
            found.insert(0, Report(jid=jid, usable=False, text=text, hint=hint))
        return tuple(found)

    # --- Between two runs

    def dump(self) -> bytes:
        """Everything worth to be remembered, for `restore`."""
        saved = _Saved(
            servers={name: list(map(str, s.proxies)) for name, s in self._servers.items()},
            proxies=[_save_proxy(jid, proxy) for jid, proxy in self._proxies.items()],
            peers=[
                _SavedPeer(str(jid), str(peer.via or ""), peer.host, peer.worked_at)
                for jid, peer in self._peers.items()
                if peer.worked_at
            ],
        )
        return msgspec.json.encode(saved)

    def restore(self, data: bytes) -> None:
        """Remember what `dump` gave in an earlier run; everything is due all the same.

        Raises:
          ValueError: It is no such thing; nothing is remembered then.
        """
        if len(data) > MAX_MEMORY:
            raise ValueError(f"more than {MAX_MEMORY} bytes")
        saved = msgspec.json.decode(data, type=_Saved)  # its errors are ValueErrors
        servers = {
            name: tuple(map(JID.parse, jids))[:MAX_FOUND]
            for name, jids in saved.servers.items()
        }
        proxies = {JID.parse(each.jid): _load_proxy(each) for each in saved.proxies}
        peers = {JID.parse(each.jid): _load_peer(each) for each in saved.peers[-MAX_PEERS:]}
        for name, server in self._servers.items():
            server.proxies = servers.get(name, ())
        self._proxies = {jid: proxies.get(jid) or _Proxy() for jid in self._listed()}
        self._peers = peers

    # ---

    def _listed(self) -> dict[JID, None]:
        """Those that are named by somebody, the user's and our own server's first."""
        found = chain.from_iterable(server.proxies for server in self._servers.values())
        return dict.fromkeys(chain(self._configured, found))

    def _is_refused(self, jid: JID, now: float) -> bool:
        return now < self._proxies[jid].refused_until <= now + REFUSED_FOR

    def _ranked(self, known: _Peer | None, now: float) -> list[JID]:
        """Those that can be reached, best first."""

        def key(jid: JID) -> tuple[object, ...]:
            proxy = self._proxies[jid]
            best = proxy.reachable()[0]
            return (
                known is not None and _has_failed(known, jid, now),
                now < proxy.busy_until <= now + BUSY_FOR,
                known is None or known.via != jid,
                _reach(best.streamhost.host) == _LOOPBACK,
                not self.is_own(jid) if self._servers else self._configured.index(jid),
                min(proxy.failures, _MANY),
                not proxy.worked_at,
                best.latency,
            )

        able = (jid for jid in self._listed() if self._proxies[jid].reachable())
        return sorted((jid for jid in able if not self._is_refused(jid, now)), key=key)

    def _remember(self, peer: JID) -> _Peer:
        """Make a peer the most recent one."""
        known = self._peers.pop(peer.bare, None) or _Peer()
        while len(self._peers) >= MAX_PEERS:
            del self._peers[next(iter(self._peers))]
        self._peers[peer.bare] = known
        return known


# --- Addresses

# How far an address leads: to everywhere, through our own network, nowhere but here.
_ANYWHERE, _PRIVATE, _LOOPBACK, _NOWHERE = range(4)


def _reach(host: str) -> int:
    if "%" in host or not host:
        return _NOWHERE  # RFC 4007 section 11: a zone means something on one machine only
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return _LOOPBACK if host.lower() == "localhost" else _ANYWHERE
    if address.is_unspecified or address.is_multicast:
        return _NOWHERE
    if address.is_loopback:
        return _LOOPBACK
    # RFC 4862 section 5.3: every link has the same ones, and without a zone they lead nowhere.
    if address.is_link_local:
        return _NOWHERE
    return _ANYWHERE if address.is_global else _PRIVATE


# --- Times


def _retry(misses: int) -> float:
    """How long to wait after so many looks in vain, at least 1, seconds."""
    return min(RETRY, RETRY_FIRST * 2.0 ** min(misses - 1, 30))


def _is_due(due: float, now: float) -> bool:
    # One that lies further ahead than any can was set by another clock.
    return not now < due <= now + REFRESH


def _within(since: float, now: float, seconds: float) -> bool:
    return since <= now < since + seconds


def _has_failed(known: _Peer, way: JID | None, now: float) -> bool:
    return now < known.failed.get(way, 0.0) <= now + FAILED_FOR


def _has_swallowed(known: _Peer | None, way: JID | None, now: float) -> bool:
    return known is not None and now < known.swallowed.get(way, 0.0) <= now + FAILED_FOR


# --- In words


def _report(jid: JID, proxy: _Proxy, now: float) -> Report:
    reachable = proxy.reachable()
    if now < proxy.refused_until <= now + REFUSED_FOR:
        text = f"{jid} does not serve this account [{proxy.refused}]"
        hint = "ask its administrator, or name another one in bytestreams.proxies"
        return Report(jid=jid, usable=False, text=text, hint=hint)
    if proxy.problem:
        return Report(jid=jid, usable=False, text=f"{jid} cannot be used: {proxy.problem}")
    if not proxy.tested:
        if _is_due(proxy.due, now):
            return Report(jid=jid, usable=False, text=f"{jid} is being looked at")
        text = f"{jid} names no address that leads anywhere outside its own machine"
        return Report(jid=jid, usable=False, text=text, hint=_ADMINISTRATOR)
    if not reachable:
        where = " and ".join(str(each.streamhost) for each in proxy.tested)
        why = "; ".join(dict.fromkeys(each.reason for each in proxy.tested))
        text = f"{jid} names {where}, which cannot be reached from here: {why}"
        return Report(jid=jid, usable=False, text=text, hint=_ADMINISTRATOR)
    best = reachable[0]
    text = f"{jid} can be reached at {best.streamhost}"
    if _reach(best.streamhost.host) == _LOOPBACK:
        text += ", but only from this machine"
        return Report(jid=jid, usable=True, text=text, hint=_ADMINISTRATOR)
    return Report(jid=jid, usable=True, text=text)


# --- Between two runs


class _SavedHost(msgspec.Struct, array_like=True):
    jid: str
    host: str
    port: int
    latency: float


class _SavedProxy(msgspec.Struct):
    jid: str
    hosts: list[_SavedHost]
    worked_at: float
    failures: int
    refused: str
    refused_until: float


class _SavedPeer(msgspec.Struct, array_like=True):
    jid: str
    via: str
    host: str
    worked_at: float


class _Saved(msgspec.Struct):
    servers: dict[str, list[str]]
    proxies: list[_SavedProxy]
    peers: list[_SavedPeer]


def _save_proxy(jid: JID, proxy: _Proxy) -> _SavedProxy:
    hosts = [
        _SavedHost(str(host.jid), host.host, host.port, each.latency)
        for each in proxy.tested
        if each.latency is not None
        for host in [each.streamhost]
    ]
    return _SavedProxy(
        jid=str(jid),
        hosts=hosts,
        worked_at=proxy.worked_at,
        failures=proxy.failures,
        refused=proxy.refused,
        refused_until=proxy.refused_until,
    )


def _load_proxy(saved: _SavedProxy) -> _Proxy:
    tested = [
        Probed(Streamhost(JID.parse(each.jid), each.host, each.port), each.latency)
        for each in saved.hosts[:MAX_TESTED]
        if 0 < each.port < 65_536 and 0 < len(each.host) <= MAX_HOST
    ]
    return _Proxy(
        tested=tuple(tested),
        refused=saved.refused,
        refused_until=saved.refused_until,
        failures=saved.failures,
        worked_at=saved.worked_at,
    )


def _load_peer(saved: _SavedPeer) -> _Peer:
    via = JID.parse(saved.via) if saved.via else None
    return _Peer(via=via, host=saved.host, worked_at=saved.worked_at)
