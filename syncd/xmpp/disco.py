"""Service discovery (XEP-0030): what an address is and can; its version (XEP-0092). Sans-IO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import Iterable
    from xml.etree.ElementTree import Element

NS_INFO = "http://jabber.org/protocol/disco#info"
NS_ITEMS = "http://jabber.org/protocol/disco#items"
NS_PING = "urn:xmpp:ping"
NS_VERSION = "jabber:iq:version"

INFO = f"{{{NS_INFO}}}query"
ITEMS = f"{{{NS_ITEMS}}}query"
PING = f"{{{NS_PING}}}ping"
VERSION = f"{{{NS_VERSION}}}query"

# A busy client lists some 120 features, a server some 60 items.
MAX_FEATURES = 1_024  # features
MAX_ITEMS = 256  # items


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """What an address is, such as category ``proxy``, type ``bytestreams``."""

    category: str
    type: str
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What an address tells of itself (XEP-0030 section 3)."""

    identities: frozenset[Identity]
    features: frozenset[str]

    def is_a(self, category: str, kind: str) -> bool:
        """Whether one of the identities has this category and type."""
        return any((i.category, i.type) == (category, kind) for i in self.identities)


def make_info(identity: Identity, features: Iterable[str], node: str | None = None) -> Element:
    """Build the answer to a disco#info request; `node` is echoed (section 3.2)."""
    attributes = {
        "category": identity.category,
        "type": identity.type,
        "name": identity.name or None,
    }
    return make(
        INFO,
        {"node": node},
        make(f"{{{NS_INFO}}}identity", attributes),
        *(make(f"{{{NS_INFO}}}feature", {"var": feature}) for feature in sorted(features)),
    )


def make_version(name: str, version: str) -> Element:
    """Build the answer to a question for our version (XEP-0092 section 3).

    The operating system is nobody's business (section 5).
    """
    return make(
        VERSION,
        None,
        make(f"{{{NS_VERSION}}}name", text=name),
        make(f"{{{NS_VERSION}}}version", text=version),
    )


def read_info(query: Element | None) -> Info:
    """Read a disco#info result; what is missing or too much is left out."""
    if query is None or query.tag != INFO:
        return Info(identities=frozenset(), features=frozenset())
    identities = [
        Identity(e.get("category", ""), e.get("type", ""), e.get("name", ""))
        for e in query.iterfind(f"{{{NS_INFO}}}identity")
    ]
    features = [e.get("var", "") for e in query.iterfind(f"{{{NS_INFO}}}feature")]
    return Info(
        identities=frozenset(identities[:MAX_ITEMS]),
        features=frozenset(features[:MAX_FEATURES]) - {""},
    )


def read_items(query: Element | None) -> tuple[JID, ...]:
    """Read the addresses of a disco#items result; broken ones are left out."""
    found: dict[JID, None] = {}
    if query is not None:
        for item in list(query.iterfind(f"{{{NS_ITEMS}}}item"))[:MAX_ITEMS]:
            try:
                found[JID.parse(item.get("jid", ""))] = None
            except ValueError:
                continue
    return tuple(found)
