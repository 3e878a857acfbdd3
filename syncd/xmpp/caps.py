"""Entity capabilities (XEP-0115): disco#info once for each kind of client. Sans-IO.

A presence names a hash over what its sender would answer. Whoever has verified one answer
that gives this hash knows them all.
"""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.xmpp.disco import NS_INFO, Info, read_info
from syncd.xmpp.xml import LANG, make

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

NS = "http://jabber.org/protocol/caps"
C = f"{{{NS}}}c"
NS_DATA = "jabber:x:data"

# XEP-0115 section 4: who we are, for programs that keep a list of clients.
NODE = "https://syncd.invalid/"
# Kinds of clients whose answers are remembered; our peers run a handful.
MAX_KNOWN = 256  # answers
# The longest hash has 64 bytes, in base64; before version 1.4 it was a version number.
MAX_VER = 100  # characters
# A URL of somebody's home page.
MAX_NODE = 1_024  # characters

# XEP-0115 section 9.1: SHA-1 is mandatory. It is enough here: finding a second answer for a
# hash is as hard as ever, and two answers that collide both belong to the one who made them.
_HASHES = {"sha-1": "sha1", "sha-256": "sha256", "sha-512": "sha512"}


@dataclass(frozen=True, slots=True)
class Caps:
    """What a presence tells of its sender's abilities.

    Attributes:
      node: Names the program.
      ver: The hash, in base64.
      algorithm: Of the hash, as sent; perhaps one that we do not know.
    """

    node: str
    ver: str
    algorithm: str

    @property
    def query_node(self) -> str:
        """The ``node`` under which its sender is asked (section 6.2)."""
        return f"{self.node}#{self.ver}"


@dataclass(frozen=True, slots=True)
class _Parts:
    """What of an answer goes into the hash, each list in its order (section 5.1).

    Attributes:
      identities: Category, type, language and name of each.
      features: As they stand.
      forms: Of each (XEP-0128) its FORM_TYPE, then each field's name and values.
    """

    identities: list[tuple[str, str, str, str]]
    features: list[str]
    forms: list[list[str]]

    @property
    def is_ambiguous(self) -> bool:
        """Whether another answer with the same hash might tell of fewer features.

        Nothing in the hashed text says where the identities end and the forms begin, nor what
        is inside of one. Whoever answers first could hide the last features of everybody
        else's client in a form behind them, the first in an identity before them, or two in one
        (section 9.3). What might have been made so is believed of its sender alone.
        """
        strings = [part for parts in (*self.identities, *self.forms) for part in parts]
        if any("<" in string for string in (*strings, *self.features)):
            return True
        for category, kind, lang, _ in self.identities:
            if not category or not kind or "/" in category + kind + lang:
                return True
        last = self.features[-1] if self.features else ""
        return bool(self.forms) and self.forms[0][0] > last


def verification(query: Element, algorithm: str = "sha-1") -> str | None:
    """Compute the hash of a disco#info answer (section 5.1).

    Args:
      query: The ``<query/>`` of the answer.
      algorithm: As named in the presence.

    Returns:
      The hash in base64; None if the answer is ill-formed by section 5.4, or the algorithm
      is unknown.
    """
    parts = _read_parts(query)
    return _hash(parts, algorithm) if parts is not None else None


def make_caps(query: Element) -> Element:
    """Build the ``<c/>`` of a presence from the answer that its sender gives to disco#info.

    Raises:
      ValueError: The answer is ill-formed by section 5.4.
    """
    ver = verification(query)
    if ver is None:
        raise ValueError("an identity, feature or form is there twice")
    return make(C, {"hash": "sha-1", "node": NODE, "ver": ver})


def read_caps(presence: Element) -> Caps | None:
    """Read what a presence tells; None if it tells nothing of use.

    Without ``hash`` it is of the kind used before version 1.4, which cannot be verified.
    """
    element = presence.find(C)
    if element is None:
        return None
    node, ver = element.get("node", ""), element.get("ver", "")
    algorithm = element.get("hash", "")
    if not (0 < len(node) <= MAX_NODE and 0 < len(ver) <= MAX_VER):
        return None
    if not 0 < len(algorithm) <= MAX_VER:
        return None
    return Caps(node, ver, algorithm)


class Capabilities:
    """The answers that were verified, those used last.

    Args:
      size: How many are remembered.
    """

    def __init__(self, size: int = MAX_KNOWN) -> None:
        self._size = size
        self._known: OrderedDict[tuple[str, str], Info] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, caps: Caps) -> Info | None:
        """What a client that tells this can do; None if it must be asked."""
        key = (caps.algorithm, caps.ver)
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def answered(self, caps: Caps | None, query: Element | None) -> Info:
        """Take an answer, and remember it if it is what its sender's presence promised.

        Args:
          caps: From the presence of the one who answered; None if it told nothing.
          query: The payload of the answer.

        Returns:
          What the one who answered can do. Of nobody else unless `get` says so now.
        """
        info = read_info(query)
        if caps is None or query is None:
            return info
        parts = _read_parts(query)
        if parts is None or parts.is_ambiguous or _hash(parts, caps.algorithm) != caps.ver:
            return info
        # The first one stays: nobody changes what others have been found to be.
        info = self._known.setdefault((caps.algorithm, caps.ver), info)
        if len(self._known) > self._size:
            self._known.popitem(last=False)
        return info


def _hash(parts: _Parts, algorithm: str) -> str | None:
    if algorithm not in _HASHES:
        return None
    pieces = ["/".join(identity) for identity in parts.identities]
    pieces += parts.features
    pieces += [piece for form in parts.forms for piece in form]
    text = "".join(f"{piece}<" for piece in pieces)
    digest = hashlib.new(_HASHES[algorithm], text.encode(), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


def _read_parts(query: Element) -> _Parts | None:
    """Read an answer; None if it is ill-formed (section 5.4)."""
    # Code points sort as their UTF-8 does, which is what i;octet compares.
    identities = sorted(
        (e.get("category", ""), e.get("type", ""), e.get(LANG, ""), e.get("name", ""))
        for e in query.iterfind(f"{{{NS_INFO}}}identity")
    )
    features = sorted(e.get("var", "") for e in query.iterfind(f"{{{NS_INFO}}}feature"))
    if len(set(identities)) < len(identities) or len(set(features)) < len(features):
        return None
    forms: dict[str, list[str]] = {}
    for form in query.iterfind(f"{{{NS_DATA}}}x"):
        kinds, pieces = _read_form(form)
        if not kinds:
            continue
        (kind, *others) = kinds
        if others or kind in forms:
            return None
        forms[kind] = [kind, *pieces]
    return _Parts(identities, features, [forms[kind] for kind in sorted(forms)])


def _read_form(form: Element) -> tuple[set[str], list[str]]:
    """The values of its FORM_TYPE, none if the form does not count; and the fields."""
    kinds: set[str] = set()
    fields: list[tuple[str, list[str]]] = []
    for field in form.iterfind(f"{{{NS_DATA}}}field"):
        name = field.get("var", "")
        values = sorted(value.text or "" for value in field.iterfind(f"{{{NS_DATA}}}value"))
        if name != "FORM_TYPE":
            fields.append((name, values))
        elif field.get("type") == "hidden":
            kinds.update(values)
    return kinds, [piece for name, values in sorted(fields) for piece in (name, *values)]
