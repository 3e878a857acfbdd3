"""SOCKS5 Bytestreams, the part that is said over XMPP: XEP-0065. Sans-IO.

The requester (for us always the sender) names streamhosts, the target connects to one of
them and says which; a proxy is then told to activate. The `make_` functions return the
``<query/>`` to put into an iq; the `read_` functions take one, ignore what they do not know,
and refuse what is missing.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.bytestreams import socks5
from syncd.errors import ErrorType, RemoteProtocolError, StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import Iterable
    from xml.etree.ElementTree import Element

NS = "http://jabber.org/protocol/bytestreams"
TAG = f"{{{NS}}}query"
_STREAMHOST = f"{{{NS}}}streamhost"
_USED = f"{{{NS}}}streamhost-used"

# Psi reads five streamhosts, others one; 16 leaves room for a proxy that lists every address
# of its machine, and bounds how long a target may be kept busy with dead ones.
MAX_STREAMHOSTS = 16

# RFC 1928 section 3 through XEP-0065 section 9.2: what a missing port means.
DEFAULT_PORT = 1080

# "Any character data" says XEP-0065; nobody sends more than a few dozen characters.
MAX_SID = 256  # characters

# RFC 1035 section 2.3.4: the longest name; IP addresses are shorter.
MAX_HOST = 255  # characters


@dataclass(frozen=True, slots=True)
class Streamhost:
    """Where a bytestream can be had: at the requester, or at a proxy (XEP-0065 section 9.2).

    Attributes:
      jid: Who it is over XMPP; for a proxy, whom to send the activation.
      host: IP address or DNS name.
      port: TCP port, 1 to 65535.
    """

    jid: JID
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A requester's opening of a bytestream (XEP-0065 section 5.3.1).

    Attributes:
      sid: The stream's id.
      streamhosts: To be tried in this order; none if none that was sent could be used.
      dstaddr: What to say to the streamhost instead of the computed hash, in the
        requester's own spelling, or None (XEP-0065 section 7). COMPAT(vacuum): always there.
    """

    sid: str
    streamhosts: tuple[Streamhost, ...]
    dstaddr: str | None = None


def dstaddr(sid: str, requester: JID, target: JID) -> str:
    """The address that stands for a bytestream in SOCKS5 (XEP-0065 section 5.3.2)."""
    return _sha1(f"{sid}{requester}{target}".encode())


def dstaddr_aliases(sid: str, requester: JID, target: JID) -> tuple[str, ...]:
    """What clients that compute the address in another way arrive at.

    COMPAT(qxmpp): hashes the JIDs as Latin-1, with ``?`` for what that lacks.
    COMPAT(ejabberd): lower-cases the JIDs.

    Returns:
      Addresses that differ from `dstaddr`; mostly none.
    """
    text = f"{sid}{requester}{target}"
    lower = f"{sid}{str(requester).lower()}{str(target).lower()}"
    forms = dict.fromkeys((_sha1(text.encode("latin-1", "replace")), _sha1(lower.encode())))
    forms.pop(dstaddr(sid, requester, target), None)
    return tuple(forms)


def _sha1(data: bytes) -> str:
    # XEP-0065 section 11.4: not security-critical here.
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def make_query(sid: str, streamhosts: Iterable[Streamhost]) -> Element:
    """The requester's opening (XEP-0065 section 5.3.1); goes in an iq of type set.

    COMPAT(qxmpp, xmppframework): dead streamhosts cost them 7 seconds each, or are the only
    one tried; name at most five, and the one most likely to work first.
    """
    children = [
        make(_STREAMHOST, {"jid": str(each.jid), "host": each.host, "port": each.port})
        for each in streamhosts
    ]
    return make(TAG, {"sid": sid, "mode": "tcp"}, *children)


def read_query(query: Element) -> Query:
    """Read a requester's opening.

    Streamhosts that cannot be used (broken, doubled, an unspecified address, an IPv6 scope
    that means nothing here) are left out, and so is every one after the sixteenth.

    Raises:
      StanzaError: To be sent back: no usable ``sid``, or another mode than TCP.
    """
    sid = query.get("sid", "")
    if query.tag != TAG or not 0 < len(sid) <= MAX_SID:
        raise StanzaError(ErrorType.MODIFY, "bad-request", "a bytestream needs a sid")
    if query.get("mode", "tcp") != "tcp":
        raise StanzaError(ErrorType.MODIFY, "not-acceptable", "only TCP bytestreams work here")
    # COMPAT(psi): <fast/>, and marks on its proxies, are passed over with all that is unknown.
    address = query.get("dstaddr", "")
    return Query(
        sid=sid,
        streamhosts=_streamhosts(query),
        dstaddr=address if socks5.is_address(address) else None,
    )


def make_used(sid: str, used: JID) -> Element:
    """The target's answer: to which streamhost it has connected (XEP-0065 section 5.3.3)."""
    return make(TAG, {"sid": sid}, make(_USED, {"jid": str(used)}))


def read_used(
    query: Element | None, streamhosts: Iterable[Streamhost]
) -> tuple[Streamhost, ...]:
    """Read a target's answer.

    COMPAT(pidgin): the ``sid`` is not repeated, so it is not looked at; the iq's id is
    enough.

    Args:
      query: The payload of the result, if it had any.
      streamhosts: What the target was offered.

    Returns:
      Those of the offered streamhosts that it may mean, at least one: a proxy can have
      several addresses under one JID (COMPAT(openfire)).

    Raises:
      RemoteProtocolError: It does not name a streamhost, or one that was not offered.
    """
    used = query.find(_USED) if query is not None else None
    jid = _jid(used.get("jid", "")) if used is not None else None
    if jid is None:
        raise RemoteProtocolError("the peer did not say to which address it has connected")
    meant = tuple(each for each in streamhosts if each.jid == jid)
    if not meant:
        raise RemoteProtocolError(f"the peer has connected to {jid}, which was not offered")
    return meant


def make_activate(sid: str, target: JID) -> Element:
    """The requester's word to a proxy that both ends are there (XEP-0065 section 6.3.5)."""
    return make(TAG, {"sid": sid}, make(f"{{{NS}}}activate", text=str(target)))


def make_address_request() -> Element:
    """The question to a proxy where it is; goes in an iq of type get (XEP-0065 section 4)."""
    return make(TAG)


def read_addresses(query: Element | None) -> tuple[Streamhost, ...]:
    """Read a proxy's answer to `make_address_request`.

    Args:
      query: The payload of the result, if it had any.

    Returns:
      At least one streamhost; several when the proxy's machine has several addresses. Each
      has the JID that the proxy calls itself, which is the one to activate
      (COMPAT(ejabberd): it adds a resource).

    Raises:
      RemoteProtocolError: It names no streamhost that can be used.
    """
    streamhosts = _streamhosts(query) if query is not None else ()
    if not streamhosts:
        raise RemoteProtocolError("the proxy did not say at which address it can be reached")
    return streamhosts


def _streamhosts(query: Element) -> tuple[Streamhost, ...]:
    found: dict[tuple[str, int], Streamhost] = {}
    for child in query.iterfind(_STREAMHOST):
        if streamhost := _streamhost(child):
            found.setdefault((streamhost.host, streamhost.port), streamhost)
        if len(found) == MAX_STREAMHOSTS:
            break
    return tuple(found.values())


def _streamhost(element: Element) -> Streamhost | None:
    jid = _jid(element.get("jid", ""))
    host = element.get("host", "").strip()
    port = _port(element.get("port", str(DEFAULT_PORT)).strip())
    if jid is None or port is None or not _usable(host):
        return None
    return Streamhost(jid, host, port)


def _usable(host: str) -> bool:
    # COMPAT(openfire): lists link-local addresses with the %scope of its own machine.
    if not 0 < len(host) <= MAX_HOST or "%" in host or not host.isprintable() or " " in host:
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True  # a name; whether it exists, the connection attempt will tell
    # COMPAT(xmppframework): 0.0.0.0 stands for "ask me elsewhere"; it would lead to us.
    return not (address.is_unspecified or address.is_multicast)


def _port(text: str) -> int | None:
    # COMPAT(smack): port 0 marks a zeroconf streamhost, which has no address.
    if not (text.isascii() and text.isdecimal() and len(text) <= 5):
        return None
    return int(text) if 0 < int(text) < 65536 else None


def _jid(text: str) -> JID | None:
    try:
        return JID.parse(text)
    except ValueError:
        return None
