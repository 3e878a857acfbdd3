"""Who of the configured peers is there, where, and what they can; and who may see whom.

A peer is configured as a bare JID; an offer must go to a full one (sent to the bare JID it
never reaches the peer: the server answers 503 itself). So: presence says which resources
there are, caps or disco#info what each can, and `Contacts.choose` picks one.

To see each other's presence takes a subscription each way, or else presence that is directed
at the peer (RFC 6121 sections 3 and 4.6): that is for `Subscriptions`. Sans-IO.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from syncd.errors import OfflineError
from syncd.xmpp.caps import Capabilities, Caps, read_caps
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import make_presence, read_from
from syncd.xmpp.xml import NS_CLIENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from xml.etree.ElementTree import Element

    from syncd.xmpp.disco import Info

# A person has a handful of clients; a hostile server could invent any number.
MAX_RESOURCES = 64  # resources of one peer
# A resource can have 1023 bytes; a sentence for people has no room for many of these.
MAX_NAMES = 200  # characters
# COMPAT(ejabberd): mod_pres_counter drops what is more than 5 in 60 s, silently; Debian
# switches it on. A little longer, because its clock counts whole seconds.
SUBSCRIPTIONS = 5  # stanzas
SUBSCRIPTIONS_WINDOW = 65.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One client of a peer, seen by its presence.

    Attributes:
      jid: Its full JID.
      priority: From the presence, -128 to 127.
      order: Counts up with each presence: the latest has the highest.
      caps: What its presences told of its abilities, if anything.
      info: What it can; None until that is known.
      mute: It refused to tell what it can.
      gone: A request came back as if it were not there, whatever its presence said.
    """

    jid: JID
    priority: int
    order: int
    caps: Caps | None = None
    info: Info | None = None
    mute: bool = False
    gone: bool = False


class Subscriptions:
    """Who of the configured peers sees whom, and what is to be said about it.

    We ask to see every peer once, let every peer see us who asks, and ignore everybody else:
    even a refusal would tell that we are there.

    Args:
      peers: As configured; a full JID fixes the resource.
    """

    def __init__(self, peers: Iterable[JID]) -> None:
        self._peers = tuple(dict.fromkeys(peers))
        self._accounts = frozenset(peer.bare for peer in self._peers)
        self._denied: set[JID] = set()
        self._sent: deque[float] = deque(maxlen=SUBSCRIPTIONS)
        self.clear()

    def clear(self) -> None:
        """Our session has ended; the server forgets what we directed at whom."""
        self._has_roster = False
        self._sees_us: set[JID] = set()
        self._greeted: set[JID] = set()
        self._queue: dict[tuple[str, JID], None] = {}

    def roster_received(self, query: Element | None, own: JID) -> None:
        """Take the roster, at the beginning of a session.

        Args:
          query: The payload of the result; None if the server does not give it.
          own: Our bare JID: one's own clients see each other anyway.
        """
        asked = self._denied | {own}
        for peer, subscription, ask in self._items(query):
            self._push(peer, subscription)
            if subscription in ("to", "both") or ask == "subscribe":
                asked.add(peer)
        self._sees_us.add(own)
        self._has_roster = True
        if query is not None:
            for peer in self._peers:
                if peer.bare not in asked:
                    self._queue["subscribe", peer.bare] = None

    def roster_pushed(self, query: Element) -> None:
        """Take a change of the roster from our own account."""
        for peer, subscription, _ in self._items(query):
            self._push(peer, subscription)

    def presence_received(self, kind: str | None, sender: JID) -> JID | None:
        """Take the type of a presence.

        Returns:
          Whom our presence is to be directed at now, if anybody.
        """
        peer = sender.bare
        if peer not in self._accounts:
            return None
        match kind:
            case "subscribe":
                # A second time as well: the first answer may have been lost.
                self._queue["subscribed", peer] = None
                self._denied.discard(peer)
            case "subscribed":
                self._denied.discard(peer)
            case "unsubscribed":
                # Not asked again before they turn to us: it was a person who said no.
                self._denied.add(peer)
            case "unavailable" | "error":
                self._greeted.discard(sender)
            case None if self._is_to_greet(sender):
                self._greeted.add(sender)
                return sender
            case _:
                pass
        return None

    def unseen(self) -> tuple[JID, ...]:
        """The peers, as configured, who will not hear of us unless we direct presence at them.

        So they see us without a subscription, and the server tells us when they cannot any
        more, and them when our link dies.
        """
        return tuple(peer for peer in self._peers if peer.bare not in self._sees_us)

    def next(self, now: float) -> tuple[Element | None, float]:
        """What to send about subscriptions, not more than any server takes.

        Args:
          now: Seconds, of any clock that only goes forward.

        Returns:
          The presence to send now, if any, and when to ask again (`math.inf`: only when
          something has come).
        """
        if not self._queue:
            return None, math.inf
        if len(self._sent) == SUBSCRIPTIONS and now < self._sent[0] + SUBSCRIPTIONS_WINDOW:
            return None, self._sent[0] + SUBSCRIPTIONS_WINDOW
        kind, peer = next(iter(self._queue))
        del self._queue[kind, peer]
        self._sent.append(now)
        return make_presence(kind, peer), now

    def _items(self, query: Element | None) -> Iterator[tuple[JID, str, str]]:
        """Peer, subscription and question of the items that are about a peer."""
        for item in query if query is not None else ():
            try:
                jid = JID.parse(item.get("jid", ""))
            except ValueError:
                continue
            if jid in self._accounts:
                yield jid, item.get("subscription", "none"), item.get("ask", "")

    def _push(self, peer: JID, subscription: str) -> None:
        if subscription in ("from", "both"):
            self._sees_us.add(peer)
        else:
            self._sees_us.discard(peer)

    def _is_to_greet(self, sender: JID) -> bool:
        """Whether this resource came after our presence went out, and had none from us."""
        # Before the roster is here nobody knows who sees us; then `unseen` is for all.
        if not self._has_roster or not sender.resource or sender.bare in self._sees_us:
            return False
        if sender in self._greeted or not {sender, sender.bare} & set(self._peers):
            return False
        # A peer whose resources are more than that gets no answer to each new one.
        return sum(known.bare == sender.bare for known in self._greeted) < MAX_RESOURCES


class Contacts:
    """The presence of the configured peers.

    Args:
      peers: As configured; a full JID fixes the resource.
      required: Features without which a resource is of no use to us.
      preferred: A feature that wins over priority: syncd's own.

    Attributes:
      capabilities: What each kind of client can.
      subscriptions: Who sees whom.
    """

    def __init__(
        self, peers: Iterable[JID], *, required: frozenset[str], preferred: str
    ) -> None:
        self._configured = tuple(dict.fromkeys(peers))
        # The resources that count, by account; an empty one stands for all.
        self._wanted: dict[JID, set[str]] = {}
        for peer in self._configured:
            self._wanted.setdefault(peer.bare, set()).add(peer.resource)
        self._required = required
        self._preferred = preferred
        self._resources: dict[JID, dict[JID, Resource]] = {}
        self._order = 0
        self.capabilities = Capabilities()
        self.subscriptions = Subscriptions(self._configured)

    @property
    def peers(self) -> tuple[JID, ...]:
        """The configured peers, bare, each once."""
        return tuple(self._wanted)

    def is_peer(self, jid: JID) -> bool:
        """Whether the address belongs to a configured peer."""
        return jid.bare in self._wanted

    def presence_received(self, presence: Element) -> JID | None:
        """Take a presence.

        Returns:
          The full JID whose disco#info is to be asked now, if any.

        Raises:
          StanzaError: The sender's address is malformed.
        """
        sender = read_from(presence)
        kind = presence.get("type")
        # COMPAT(prosody): an offline contact is announced as unavailable from the BARE JID,
        # which is no news about a resource.
        if sender is None or not sender.resource or not self.is_peer(sender):
            return None
        resources = self._resources.setdefault(sender.bare, {})
        if kind in ("unavailable", "error"):
            resources.pop(sender, None)
            return None
        if kind is not None or not self._wanted[sender.bare] & {"", sender.resource}:
            return None
        known = resources.get(sender)
        if known is None and len(resources) >= MAX_RESOURCES:
            return None
        # Section 8.4 of XEP-0115: a server may leave caps out that have not changed.
        caps = read_caps(presence) or (known.caps if known else None)
        info = self.capabilities.get(caps) if caps else None
        if info is None and known is not None and known.caps == caps:
            info = known.info
        self._order += 1
        resources[sender] = Resource(
            jid=sender, priority=_priority(presence), order=self._order, caps=caps, info=info
        )
        return sender if info is None else None

    def unknown(self, jid: JID) -> Resource | None:
        """This resource, if it is there, or may be, and is to be asked what it can."""
        resource = self._resources.get(jid.bare, {}).get(jid)
        if resource is None or resource.info is not None or resource.mute:
            return None
        return resource

    def info_received(self, asked: Resource, query: Element | None) -> bool:
        """Take the answer to disco#info.

        Args:
          asked: From `unknown`, at the time of the question.
          query: The payload of the answer.

        Returns:
          Whether it is known now what this resource can. If not, it told of other abilities
          meanwhile.
        """
        now = self.unknown(asked.jid)
        if now is None:
            return True
        if now.caps != asked.caps:
            return False
        info = self.capabilities.answered(now.caps, query)
        self._put(replace(now, info=info, gone=False))
        if now.caps is not None and self.capabilities.get(now.caps) is not None:
            self._share(now.caps, info)
        return True

    def info_refused(self, asked: Resource) -> None:
        """A resource does not tell what it can; if it comes again, it is asked again."""
        now = self.unknown(asked.jid)
        if now is not None and now.order == asked.order:
            self._put(replace(now, mute=True))

    def gone(self, chosen: Resource) -> None:
        """A request to this resource came back as unavailable: do not choose it again.

        Its next presence brings it back, or its next answer. One that has come since it was
        chosen says more than the refusal.
        """
        now = self._resources.get(chosen.jid.bare, {}).get(chosen.jid)
        if now is not None and now.order == chosen.order:
            self._put(replace(now, info=None, gone=True))

    def clear(self) -> None:
        """Our own stream has ended, so nothing is known any more."""
        self._resources.clear()
        self.subscriptions.clear()

    def is_there(self, jid: JID) -> bool:
        """Whether this very resource has said that it is available."""
        return jid in self._resources.get(jid.bare, {})

    def online(self) -> frozenset[JID]:
        """The peers, as configured, that an offer could be sent to now."""
        return frozenset(peer for peer in self._configured if self._usable(peer))

    def choose(self, peer: JID) -> Resource:
        """Pick the resource for an offer: syncd first, then priority, then the latest.

        Args:
          peer: As configured; of a full JID it is this resource or none.

        Raises:
          OfflineError: None of the peer's clients is there, or none takes files; says which.
        """
        usable = self._usable(peer)
        if usable:
            return max(usable, key=self._rank)
        present = [resource for resource in self._present(peer) if not resource.gone]
        if not present:
            raise OfflineError(f"{peer} is offline")
        if any(resource.info is None and not resource.mute for resource in present):
            raise OfflineError(f"{peer} is online; syncd is asking what its client can do")
        names = ", ".join(sorted(resource.jid.resource for resource in present))
        if len(names) > MAX_NAMES:
            names = f"{names[:MAX_NAMES]}…"
        raise OfflineError(
            f"{peer} is online ({names}), but no client there takes files by stream initiation",
            hint="start syncd, or a client with SI file transfer, on that account",
        )

    def _present(self, peer: JID) -> list[Resource]:
        resources = self._resources.get(peer.bare, {})
        if peer.resource:
            return [resources[peer]] if peer in resources else []
        return list(resources.values())

    def _usable(self, peer: JID) -> list[Resource]:
        return [
            resource
            for resource in self._present(peer)
            if resource.info is not None and self._required <= resource.info.features
        ]

    def _share(self, caps: Caps, info: Info) -> None:
        """A verified answer is the answer of all who tell the same."""
        for resources in self._resources.values():
            for jid, resource in resources.items():
                if resource.caps == caps and resource.info is None and not resource.gone:
                    resources[jid] = replace(resource, info=info, mute=False)

    def _put(self, resource: Resource) -> None:
        self._resources[resource.jid.bare][resource.jid] = resource

    def _rank(self, resource: Resource) -> tuple[bool, int, int]:
        assert resource.info is not None
        return (
            self._preferred in resource.info.features,
            resource.priority,
            resource.order,
        )


def _priority(presence: Element) -> int:
    try:
        value = int((presence.findtext(f"{{{NS_CLIENT}}}priority") or "0").strip()[:8])
    except ValueError:
        return 0
    return max(-128, min(127, value))
