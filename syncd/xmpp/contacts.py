"""Who of the configured peers is there, at which resource, and what that resource can.

A peer is configured as a bare JID; an offer must go to a full one (sent to the bare JID it
never reaches the peer: the server answers 503 itself). So: presence says which resources
there are, disco#info what each can, and `Contacts.choose` picks one. Sans-IO.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from syncd.errors import OfflineError
from syncd.xmpp.stanza import read_from
from syncd.xmpp.xml import NS_CLIENT

if TYPE_CHECKING:
    from collections.abc import Iterable
    from xml.etree.ElementTree import Element

    from syncd.xmpp.disco import Info
    from syncd.xmpp.jid import JID

# A person has a handful of clients; a hostile server could invent any number.
MAX_RESOURCES = 64  # resources of one peer


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One client of a peer, seen by its presence.

    Attributes:
      jid: Its full JID.
      priority: From the presence, -128 to 127.
      order: Counts up with each presence: the latest has the highest.
      info: What disco#info said; None until it has.
    """

    jid: JID
    priority: int
    order: int
    info: Info | None = None


class Contacts:
    """The presence of the configured peers.

    Args:
      peers: As configured; a full JID fixes the resource.
      required: Features without which a resource is of no use to us.
      preferred: A feature that wins over priority: syncd's own.
    """

    def __init__(
        self, peers: Iterable[JID], *, required: frozenset[str], preferred: str
    ) -> None:
        self._peers = {peer.bare: peer for peer in peers}
        self._required = required
        self._preferred = preferred
        self._resources: dict[JID, dict[JID, Resource]] = {}
        self._order = 0

    @property
    def peers(self) -> tuple[JID, ...]:
        """The configured peers, bare."""
        return tuple(self._peers)

    def is_peer(self, jid: JID) -> bool:
        """Whether the address belongs to a configured peer."""
        return jid.bare in self._peers

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
        if kind is not None:
            return None
        wanted = self._peers[sender.bare]
        if wanted.resource and wanted != sender:
            return None
        known = resources.get(sender)
        if known is None and len(resources) >= MAX_RESOURCES:
            return None
        self._order += 1
        resource = Resource(
            jid=sender,
            priority=_priority(presence),
            order=self._order,
            info=known.info if known else None,
        )
        resources[sender] = resource
        return sender if resource.info is None else None

    def info_received(self, jid: JID, info: Info) -> None:
        """Take the disco#info of a resource; ignored if it has gone meanwhile."""
        resources = self._resources.get(jid.bare, {})
        if jid in resources:
            resources[jid] = replace(resources[jid], info=info)

    def gone(self, jid: JID) -> None:
        """A request to this resource came back as unavailable: do not choose it again.

        Its next presence brings it back.
        """
        self._resources.get(jid.bare, {}).pop(jid, None)

    def clear(self) -> None:
        """Our own stream has ended, so nothing is known any more."""
        self._resources.clear()

    def is_there(self, jid: JID) -> bool:
        """Whether this very resource is available."""
        return jid in self._resources.get(jid.bare, {})

    def online(self) -> frozenset[JID]:
        """The peers (bare) that an offer could be sent to now."""
        return frozenset(bare for bare in self._peers if self._usable(bare))

    def choose(self, peer: JID) -> Resource:
        """Pick the resource for an offer: syncd first, then priority, then the latest.

        Raises:
          OfflineError: None of the peer's clients is there, or none takes files; says which.
        """
        usable = self._usable(peer.bare)
        if usable:
            return max(usable, key=self._rank)
        present = self._resources.get(peer.bare)
        if not present:
            raise OfflineError(f"{peer} is offline")
        names = ", ".join(sorted(str(jid.resource) for jid in present))
        raise OfflineError(
            f"{peer} is online ({names}), but no client there takes files by stream initiation",
            hint="start syncd, or a client with SI file transfer, on that account",
        )

    def _usable(self, bare: JID) -> list[Resource]:
        return [
            resource
            for resource in self._resources.get(bare, {}).values()
            if resource.info is not None and self._required <= resource.info.features
        ]

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
