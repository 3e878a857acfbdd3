"""Who is online and who may see it: sessions, rosters, subscriptions (RFC 6121). Sans-IO."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from syncd.errors import ErrorType, StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import PRESENCE, make_iq
from syncd.xmpp.xml import NS_CLIENT, make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from xml.etree.ElementTree import Element

    from syncd.xmpp.sm import StreamManagement
    from syncd.xmpp.stanza import Iq

NS_ROSTER = "jabber:iq:roster"
ROSTER = f"{{{NS_ROSTER}}}query"
ITEM = f"{{{NS_ROSTER}}}item"
GROUP = f"{{{NS_ROSTER}}}group"

# What one account may make the server remember.
MAX_CONTACTS = 1_000  # contacts of one account
MAX_DIRECTED = 1_000  # addresses of one session
_MAX_GROUPS = 16  # groups of one contact
_MAX_WORDS = 200  # characters of a name or a group


@dataclass(slots=True, eq=False)
class Session:
    """One client that is logged in and has its resource.

    Attributes:
      jid: Its full JID.
      send: Queues a written stanza for it.
      end: Ends its stream with a stream error; an empty condition: in peace.
      cut: Cuts its connection at once (TCP RST).
      replaced: Tells its connection that another one has taken it over (XEP-0198 section 5).
      managed: What makes it resumable; None if nothing does.
      presence: The last one it told everybody, or None while it is not available.
      interested: It asked for the roster, so it is told changes (RFC 6121 section 2.2).
      directed: Whom it has told its presence in particular (RFC 6121 section 4.6).
      moves: How often its connection has broken or changed.
    """

    jid: JID
    send: Callable[[bytes], None]
    end: Callable[[str], None]
    cut: Callable[[], None]
    replaced: Callable[[], None] = lambda: None
    managed: Callable[[], StreamManagement | None] = lambda: None
    presence: Element | None = None
    interested: bool = False
    directed: set[JID] = field(default_factory=set)
    moves: int = 0

    @property
    def priority(self) -> int:
        """Of its presence (RFC 6121 section 4.7.2.3); without one, below any other."""
        if self.presence is None:
            return -129
        try:
            return int(self.presence.findtext(f"{{{NS_CLIENT}}}priority") or "0")
        except ValueError:
            return 0


class Sessions:
    """Who is connected now, by address."""

    def __init__(self) -> None:
        self._by_account: dict[JID, dict[JID, Session]] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter([s for group in self._by_account.values() for s in group.values()])

    def __len__(self) -> int:
        return sum(map(len, self._by_account.values()))

    def add(self, session: Session) -> None:
        """Make a session reachable; there must be none with its address."""
        assert self.get(session.jid) is None
        self._by_account.setdefault(session.jid.bare, {})[session.jid] = session

    def remove(self, session: Session) -> bool:
        """Make a session unreachable; False if it was already."""
        group = self._by_account.get(session.jid.bare, {})
        if group.get(session.jid) is not session:
            return False
        del group[session.jid]
        if not group:
            del self._by_account[session.jid.bare]
        return True

    def get(self, jid: JID) -> Session | None:
        """The session with this full JID."""
        group = self._by_account.get(jid.bare)
        return group.get(jid) if group else None

    def matching(self, jid: JID) -> list[Session]:
        """The session with this full JID, or all of a bare JID's."""
        if jid.resource:
            session = self.get(jid)
            return [session] if session else []
        return list(self._by_account.get(jid, {}).values())

    def available(self, jid: JID) -> list[Session]:
        """Those of a bare JID's sessions that have told everybody their presence."""
        return [s for s in self.matching(jid) if s.presence is not None]


@dataclass(slots=True)
class Contact:
    """One line of a roster (RFC 6121 section 2.1).

    Attributes:
      to: We get the contact's presence.
      from_: The contact gets ours.
      asked: We have asked for it, and wait.
      asks: The contact has asked for ours, and waits (RFC 6121 section 3.1.3).
      name: As the user calls it.
      groups: As the user sorts it.
    """

    to: bool = False
    from_: bool = False
    asked: bool = False
    asks: bool = False
    name: str = ""
    groups: tuple[str, ...] = ()

    @property
    def listed(self) -> bool:
        """Whether it is in the roster that clients see, and not only a waiting request."""
        return self.to or self.from_ or self.asked or bool(self.name or self.groups)

    def item(self, jid: JID) -> Element:
        """The line as clients see it."""
        names = {(True, True): "both", (True, False): "to", (False, True): "from"}
        attributes = {
            "jid": str(jid),
            "name": self.name or None,
            "subscription": names.get((self.to, self.from_), "none"),
            "ask": "subscribe" if self.asked else None,
        }
        return make(ITEM, attributes, *(make(GROUP, text=group) for group in self.groups))


class Rosters:
    """Everybody's contacts.

    Args:
      domain: The server's.
      rosters: By localpart of every account, then contact (localpart): both, to, from or
        none.
    """

    def __init__(self, domain: str, rosters: Mapping[str, Mapping[str, str]]) -> None:
        self._rosters: dict[JID, dict[JID, Contact]] = {
            JID.parse(f"{name}@{domain}"): {
                JID.parse(f"{contact}@{domain}"): Contact(
                    to=kind in ("both", "to"), from_=kind in ("both", "from"), name=contact
                )
                for contact, kind in contacts.items()
            }
            for name, contacts in rosters.items()
        }

    def of(self, user: JID) -> dict[JID, Contact]:
        """A user's contacts."""
        return self._rosters[user]

    def __contains__(self, user: JID) -> bool:
        return user in self._rosters

    def lets_see(self, user: JID, watcher: JID) -> bool:
        """Whether a user lets another see its presence."""
        contact = self._rosters.get(user, {}).get(watcher)
        return contact is not None and contact.from_

    def line(self, user: JID, contact: JID) -> Contact:
        """The line of a contact, made if need be.

        Raises:
          StanzaError: The roster is full.
        """
        roster = self.of(user)
        if contact not in roster:
            if len(roster) >= MAX_CONTACTS:
                raise StanzaError(ErrorType.WAIT, "resource-constraint", "too many contacts")
            roster[contact] = Contact()
        return roster[contact]


class Presences:
    """Rosters, and who is told what about whom.

    Args:
      domain: The server's; contacts elsewhere are kept, but never reached.
      sessions: Who is connected.
      send: Sends one stanza of the server's own to a session.
      rosters: As `Rosters` takes them.
    """

    def __init__(
        self,
        domain: str,
        sessions: Sessions,
        send: Callable[[Element, Session], None],
        rosters: Mapping[str, Mapping[str, str]],
    ) -> None:
        self._domain = domain
        self._sessions = sessions
        self._send = send
        self._push_id = itertools.count(1)
        self._rosters = Rosters(domain, rosters)
        self._handshake = {
            "subscribe": self._subscribe,
            "subscribed": self._subscribed,
            "unsubscribe": self._unsubscribe,
            "unsubscribed": self._unsubscribed,
        }

    def receive(self, session: Session, stanza: Element, to: JID | None) -> None:
        """Take a presence from a client, already stamped with its address.

        Raises:
          StanzaError: It cannot be done, and the client is to be told.
        """
        kind = stanza.get("type")
        if to is None:
            if kind is None:
                self._become_available(session, stanza)
            elif kind == "unavailable":
                self.end(session, stanza)
        elif to.domain != self._domain:
            raise StanzaError(ErrorType.CANCEL, "remote-server-not-found", by=str(to))
        elif kind in (None, "unavailable", "error"):
            self._direct(session, stanza, to)
        elif (
            kind in self._handshake and to.bare in self._rosters and to.bare != session.jid.bare
        ):
            # RFC 6121 section 3.1.3: about accounts that do not exist nothing is said.
            self._handshake[kind](session.jid.bare, to.bare, stanza)

    def end(self, session: Session, stanza: Element | None = None) -> None:
        """Tell everybody who knew of it that a session is no longer available.

        Args:
          session: Which.
          stanza: As its client said it; None: its link died (RFC 6121 section 4.5.2).
        """
        if stanza is None:
            stanza = make(PRESENCE, {"from": str(session.jid), "type": "unavailable"})
        told = dict.fromkeys(self._watchers(session) if session.presence is not None else ())
        for jid in session.directed:
            told.update(dict.fromkeys(self._reachable(jid)))
        session.presence = None
        session.directed.clear()
        for other in told:
            if other is not session:
                self._send(_copy(stanza, other.jid), other)

    def get_roster(self, session: Session, _: Iq) -> Element:
        """Answer the request for a roster (RFC 6121 section 2.1.3)."""
        session.interested = True
        contacts = self._rosters.of(session.jid.bare).items()
        return make(ROSTER, None, *(c.item(jid) for jid, c in contacts if c.listed))

    def set_roster(self, session: Session, iq: Iq) -> None:
        """Add, change or remove one contact (RFC 6121 sections 2.3 to 2.5).

        Raises:
          StanzaError: The request makes no sense, or there are too many contacts.
        """
        items = iq.payload.findall(ITEM) if iq.payload is not None else []
        if len(items) != 1:
            raise StanzaError(ErrorType.MODIFY, "bad-request", "one contact at a time")
        item, user = items[0], session.jid.bare
        try:
            jid = JID.parse(item.get("jid", "")).bare
        except ValueError as error:
            raise StanzaError(ErrorType.MODIFY, "jid-malformed", str(error)) from error
        if item.get("subscription") == "remove":
            self._remove(user, jid)
            return
        name, groups = item.get("name", ""), [g.text or "" for g in item.iterfind(GROUP)]
        if len(groups) > _MAX_GROUPS or any(len(w) > _MAX_WORDS for w in (name, *groups)):
            raise StanzaError(ErrorType.MODIFY, "not-acceptable", "too many or too long words")
        contact = self._rosters.line(user, jid)
        contact.name, contact.groups = name or jid.local, tuple(groups)
        self._push(user, jid)

    def _become_available(self, session: Session, stanza: Element) -> None:
        first = session.presence is None
        session.presence = stanza
        for other in self._watchers(session):
            self._send(_copy(stanza, other.jid), other)
        if not first:
            return
        # RFC 6121 section 4.3: the server probes for the user, once.
        user = session.jid.bare
        for other in self._sessions.available(user):
            if other is not session:
                self._tell(other, session)
        for jid, contact in self._rosters.of(user).items():
            if contact.to and jid.domain == self._domain:
                self._probe(jid, session)
            if contact.asks:
                self._send(
                    make(PRESENCE, {"from": str(jid), "to": str(user), "type": "subscribe"}),
                    session,
                )

    def _probe(self, contact: JID, session: Session) -> None:
        """Tell a session about a contact (RFC 6121 section 4.3.2)."""
        if not self._rosters.lets_see(contact, session.jid.bare):
            return
        others = self._sessions.available(contact)
        for other in others:
            self._tell(other, session)
        if not others:
            gone = {"from": str(contact), "to": str(session.jid), "type": "unavailable"}
            self._send(make(PRESENCE, gone), session)

    def _tell(self, about: Session, session: Session) -> None:
        if about.presence is not None:
            self._send(_copy(about.presence, session.jid), session)

    def _watchers(self, session: Session) -> list[Session]:
        """Who gets a presence that is for everybody: contacts, and the user's own sessions."""
        user = session.jid.bare
        contacts = [jid for jid, contact in self._rosters.of(user).items() if contact.from_]
        return [
            watcher for jid in (*contacts, user) for watcher in self._sessions.available(jid)
        ]

    def _reachable(self, jid: JID) -> list[Session]:
        return self._sessions.matching(jid) if jid.resource else self._sessions.available(jid)

    def _direct(self, session: Session, stanza: Element, to: JID) -> None:
        kind = stanza.get("type")
        if kind == "unavailable":
            session.directed.discard(to)
        elif kind is None:
            if len(session.directed) >= MAX_DIRECTED:
                raise StanzaError(ErrorType.WAIT, "resource-constraint", by=str(to))
            session.directed.add(to)
        for other in self._reachable(to):
            self._send(_copy(stanza, to), other)

    def _subscribe(self, user: JID, contact: JID, stanza: Element) -> None:
        line = self._rosters.line(user, contact)
        if self._rosters.lets_see(contact, user):
            # RFC 6121 section 3.1.3: agreed long ago.
            line.to, line.asked = True, False
            self._push(user, contact)
            agreed = {"from": str(contact), "to": str(user), "type": "subscribed"}
            self._broadcast(make(PRESENCE, agreed), user)
            self._show(contact, user, visible=True)
            return
        line.asked = True
        self._push(user, contact)
        self._rosters.line(contact, user).asks = True
        self._broadcast(_handshake(stanza, user, contact), contact)

    def _subscribed(self, user: JID, contact: JID, stanza: Element) -> None:
        line = self._rosters.line(user, contact)
        if not line.asks:
            return  # RFC 6121 section 3.1.5: nobody asked
        line.from_, line.asks = True, False
        self._push(user, contact)
        other = self._rosters.line(contact, user)
        if other.asked:
            other.to, other.asked = True, False
            self._broadcast(_handshake(stanza, user, contact), contact)
            self._push(contact, user)
            self._show(user, contact, visible=True)

    def _unsubscribe(self, user: JID, contact: JID, stanza: Element) -> None:
        line, other = self._rosters.line(user, contact), self._rosters.line(contact, user)
        line.to = line.asked = other.asks = False
        self._push(user, contact)
        if other.from_:
            other.from_ = False
            self._broadcast(_handshake(stanza, user, contact), contact)
            self._push(contact, user)
            self._show(contact, user, visible=False)

    def _unsubscribed(self, user: JID, contact: JID, stanza: Element) -> None:
        line, other = self._rosters.line(user, contact), self._rosters.line(contact, user)
        seen, line.from_, line.asks = line.from_, False, False
        self._push(user, contact)
        if other.to or other.asked:
            other.to = other.asked = False
            self._broadcast(_handshake(stanza, user, contact), contact)
            self._push(contact, user)
        if seen:
            self._show(user, contact, visible=False)

    def _remove(self, user: JID, contact: JID) -> None:
        line = self._rosters.of(user).get(contact)
        if line is None or not line.listed:
            raise StanzaError(ErrorType.CANCEL, "item-not-found", "no such contact")
        # RFC 6121 section 2.5.2: both subscriptions end with it.
        for kind in ("unsubscribe", "unsubscribed"):
            self._handshake[kind](user, contact, make(PRESENCE, {"type": kind}))
        del self._rosters.of(user)[contact]
        gone = make(ITEM, {"jid": str(contact), "subscription": "remove"})
        self._push_item(user, gone)

    def _show(self, about: JID, to: JID, *, visible: bool) -> None:
        """Bring an account's sessions into another account's sight, or out of it."""
        for session in self._sessions.available(about):
            gone = make(PRESENCE, {"from": str(session.jid), "type": "unavailable"})
            stanza = session.presence if visible and session.presence is not None else gone
            for watcher in self._sessions.available(to):
                self._send(_copy(stanza, watcher.jid), watcher)

    def _broadcast(self, stanza: Element, to: JID) -> None:
        for session in self._sessions.available(to):
            self._send(stanza, session)

    def _push(self, user: JID, contact: JID) -> None:
        """Tell a user's clients how a contact stands now (RFC 6121 section 2.1.6)."""
        line = self._rosters.of(user).get(contact)
        if line is not None and line.listed:
            self._push_item(user, line.item(contact))

    def _push_item(self, user: JID, item: Element) -> None:
        for session in self._sessions.matching(user):
            if session.interested:
                ident = f"push-{next(self._push_id)}"
                self._send(
                    make_iq("set", ident, session.jid, make(ROSTER, None, item)), session
                )


def _copy(stanza: Element, to: JID) -> Element:
    return make(stanza.tag, {**stanza.attrib, "to": str(to)}, *stanza)


def _handshake(stanza: Element, user: JID, contact: JID) -> Element:
    """RFC 6121 section 3.1.2: these go from bare JID to bare JID."""
    return make(stanza.tag, {**stanza.attrib, "from": str(user), "to": str(contact)}, *stanza)
