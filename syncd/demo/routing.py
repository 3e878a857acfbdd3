"""Where each stanza goes (RFC 6120 section 10, RFC 6121 section 8); no I/O of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from syncd.demo.presence import ROSTER, Presences, Session, Sessions
from syncd.demo.stream import NS_SESSION
from syncd.errors import ErrorType, StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import (
    IQ,
    PRESENCE,
    Iq,
    make_error_reply,
    make_iq,
    read_iq,
)
from syncd.xmpp.xml import (
    NS_CLIENT,
    NS_STREAMS,
    Closed,
    Malformed,
    Opened,
    StreamParser,
    make,
    serialise,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from xml.etree.ElementTree import Element

    from syncd.demo.faults import Faults
    from syncd.xmpp.sm import StreamManagement

NS_INFO = "http://jabber.org/protocol/disco#info"
NS_ITEMS = "http://jabber.org/protocol/disco#items"
NS_PING = "urn:xmpp:ping"

# More clients of one account than anybody has; each costs a connection.
MAX_RESOURCES = 64  # sessions of one account

Component = Callable[[Iq, JID], "Element | None"]
"""Takes a request and its sender, and gives the payload of the result.

Raises `StanzaError` to refuse.
"""


class Router:
    """Takes every stanza of every client, and hands it on, answers it or refuses it.

    Args:
      domain: The server's name.
      rosters: As `Presences` takes them.
      components: Who answers for the addresses that are no account.
      inspect_offer: Sees each iq of type set between two clients before it is handed on;
        raises `StanzaError` to refuse it.
      faults: What to do wrong.
      later: Calls something after that many seconds.
      token: Gives a fresh random printable string.
      changed: Is called when somebody came, went, or changed its presence.

    Attributes:
      sessions: Who is connected.
    """

    def __init__(
        self,
        domain: str,
        rosters: Mapping[str, Mapping[str, str]],
        *,
        components: Mapping[JID, Component],
        inspect_offer: Callable[[Iq, JID, JID], None],
        faults: Faults,
        later: Callable[[float, Callable[[], None]], None],
        token: Callable[[], str],
        changed: Callable[[], None],
    ) -> None:
        self.sessions = Sessions()
        self._domain = JID("", domain)
        self._components = components
        self._inspect_offer = inspect_offer
        self._faults = faults
        self._later = later
        self._token = token
        self._changed = changed
        self._presences = Presences(domain, self.sessions, self._send, rosters)
        # What the server answers for a user's account, then for itself.
        self._for_account: dict[tuple[str, str], Callable[[Session, Iq], Element | None]] = {
            ("get", ROSTER): self._presences.get_roster,
            ("set", ROSTER): self._presences.set_roster,
            ("set", f"{{{NS_SESSION}}}session"): _done,
            ("get", f"{{{NS_PING}}}ping"): _done,
            ("get", f"{{{NS_INFO}}}query"): _account_info,
            ("get", f"{{{NS_ITEMS}}}query"): _no_items,
        }
        self._for_server: dict[tuple[str, str], Callable[[Session, Iq], Element | None]] = {
            ("set", f"{{{NS_SESSION}}}session"): _done,
            ("get", f"{{{NS_PING}}}ping"): _done,
            ("get", f"{{{NS_INFO}}}query"): _server_info,
            ("get", f"{{{NS_ITEMS}}}query"): self._server_items,
        }

    def bind(
        self,
        account: JID,
        resource: str,
        *,
        send: Callable[[bytes], None],
        end: Callable[[str], None],
        cut: Callable[[], None],
        replaced: Callable[[], None] = lambda: None,
        managed: Callable[[], StreamManagement | None] = lambda: None,
    ) -> Session:
        """Give a client its address (RFC 6120 section 7).

        A resource that is taken goes to the newcomer, and the old session ends with
        conflict, as Prosody and ejabberd do it.

        Args:
          account: Who logged in.
          resource: What was asked for, or an empty string.
          send: As `Session` has it, and so are the others.
          end: Likewise.
          cut: Likewise.
          replaced: Likewise.
          managed: Likewise.

        Raises:
          StanzaError: The resource is none, or there are too many.
        """
        try:
            jid = account.with_resource(resource or self._token())
        except ValueError as error:
            raise StanzaError(ErrorType.MODIFY, "bad-request", str(error)) from error
        old = self.sessions.get(jid)
        if old is not None:
            self.unbind(old)
            old.end("conflict")
        elif len(self.sessions.matching(account)) >= MAX_RESOURCES:
            raise StanzaError(ErrorType.WAIT, "resource-constraint", "too many resources")
        session = Session(jid, send, end, cut, replaced, managed)
        self.sessions.add(session)
        self._changed()
        return session

    def resume(
        self, account: JID, previous: str, successor: Session
    ) -> tuple[Session, StreamManagement]:
        """Hand a session over to another connection (XEP-0198 section 5).

        Args:
          account: Who logged in.
          previous: The id of the session.
          successor: What reaches the client now; the rest of it does not count.

        Returns:
          The session as it was, and what is to be sent again.

        Raises:
          StanzaError: There is no such session of this account.
        """
        for session in self.sessions.matching(account):
            managed = session.managed()
            if managed is None or not managed.id or managed.id != previous:
                continue
            if self._faults.forget_sessions:
                continue
            session.replaced()
            session.moves += 1
            session.send, session.end = successor.send, successor.end
            session.cut, session.replaced = successor.cut, successor.replaced
            session.managed = successor.managed
            return session, managed
        raise StanzaError(ErrorType.CANCEL, "item-not-found", "no such session")

    def keep(self, session: Session, seconds: float) -> None:
        """Keep a session whose connection broke, until it is resumed or the time is over."""
        session.moves += 1
        moves = session.moves

        def expire() -> None:
            if session.moves == moves and self.sessions.get(session.jid) is session:
                self.unbind(session)
                self._return_unacknowledged(session)

        self._later(seconds, expire)

    def _return_unacknowledged(self, session: Session) -> None:
        """Tell the senders what the session has never got (XEP-0198 section 4)."""
        managed = session.managed()
        parser = StreamParser()
        parser.feed(f"<s:stream xmlns:s='{NS_STREAMS}' xmlns='{NS_CLIENT}'>".encode())
        unavailable = StanzaError(ErrorType.CANCEL, "service-unavailable", "the session ended")
        for stanza in parser.feed(b"".join(managed.unacked if managed is not None else ())):
            assert not isinstance(stanza, Opened | Closed | Malformed), "we wrote it ourselves"
            sender = self.sessions.get(JID.parse(stanza.get("from") or str(self._domain)))
            if sender is not None and stanza.tag != PRESENCE:
                self._refuse(sender, stanza, session.jid, unavailable)

    def unbind(self, session: Session) -> None:
        """Forget a session whose stream has ended, and tell who knew of it."""
        if self.sessions.remove(session):
            if not self._faults.forget_presence:
                self._presences.end(session)
            self._changed()

    def route(self, session: Session, stanza: Element) -> None:
        """Take one stanza from a client."""
        if not _may_be_from(stanza.get("from"), session.jid):
            # RFC 6120 section 8.1.2.1, and ejabberd's way.
            session.end("invalid-from")
            return
        stanza.set("from", str(session.jid))
        text = stanza.get("to")
        try:
            to = JID.parse(text) if text is not None else None
        except ValueError as error:
            refusal = StanzaError(ErrorType.MODIFY, "jid-malformed", str(error))
            self._refuse(session, stanza, self._domain, refusal)
            return
        if stanza.tag == PRESENCE and to is None:
            self._handle(session, stanza, to)  # its copies meet the faults
            return
        for seconds in self._faults.copies(stanza, session.jid, to):
            if seconds:
                self._later(seconds, lambda: self._handle(session, stanza, to))
            else:
                self._handle(session, stanza, to)

    def _handle(self, session: Session, stanza: Element, to: JID | None) -> None:
        try:
            if stanza.tag == IQ:
                self._on_iq(session, stanza, to)
            elif stanza.tag == PRESENCE:
                # A delayed one may come after its session's end.
                if self.sessions.get(session.jid) is session:
                    self._presences.receive(session, stanza, to)
                    self._changed()
            else:
                self._on_message(session, stanza, to)
        except StanzaError as error:
            self._refuse(session, stanza, to or session.jid.bare, error)

    def _on_iq(self, session: Session, stanza: Element, to: JID | None) -> None:
        iq = read_iq(stanza)
        if to is not None and to.resource and to.domain == self._domain.domain:
            # RFC 6121 section 8.5.3: to that session, or to nobody.
            other = self.sessions.get(to)
            if other is not None:
                if iq.type == "set":
                    self._inspect_offer(iq, session.jid, to)
                other.send(serialise(stanza))
                return
        if iq.type in ("result", "error"):
            return
        if to is None or to == session.jid.bare:
            self._answer(session, iq, self._for_account)
        elif to == self._domain:
            self._answer(session, iq, self._for_server)
        elif to in self._components:
            self._reply(session, iq, self._components[to](iq, session.jid))
        elif to.domain == self._domain.domain:
            # RFC 6121 sections 8.5.1, 8.5.2.1.3: who asks learns nothing from it.
            raise StanzaError(ErrorType.CANCEL, "service-unavailable")
        else:
            raise StanzaError(ErrorType.CANCEL, "remote-server-not-found")

    def _answer(
        self,
        session: Session,
        iq: Iq,
        handlers: Mapping[tuple[str, str], Callable[[Session, Iq], Element | None]],
    ) -> None:
        assert iq.payload is not None  # read_iq saw to it
        handler = handlers.get((iq.type, iq.payload.tag))
        if handler is None:
            raise StanzaError(ErrorType.CANCEL, "service-unavailable")
        self._reply(session, iq, handler(session, iq))

    def _reply(self, session: Session, iq: Iq, payload: Element | None) -> None:
        result = make_iq(
            "result", iq.id, session.jid, *([payload] if payload is not None else [])
        )
        result.set("from", iq.element.get("to") or str(session.jid.bare))
        self._send(result, session)

    def _refuse(
        self, session: Session, stanza: Element, sender: JID, error: StanzaError
    ) -> None:
        # RFC 6120 section 8.3.1: never answer an error with an error.
        if stanza.get("type") in ("error", "result"):
            return
        reply = make_error_reply(stanza, error)
        reply.set("from", str(sender))
        self._send(reply, session)

    def _on_message(self, session: Session, stanza: Element, to: JID | None) -> None:
        kind = stanza.get("type", "normal")
        to = to if to is not None else session.jid.bare
        if to.domain != self._domain.domain:
            raise StanzaError(ErrorType.CANCEL, "remote-server-not-found")
        other = self.sessions.get(to)
        if other is not None:
            other.send(serialise(stanza))
            return
        if kind == "error":
            return
        # RFC 6121 section 8.5.2.1.1: to everybody there who wants messages.
        wanting = [s for s in self.sessions.available(to.bare) if s.priority >= 0]
        if kind == "groupchat" or (not wanting and kind != "headline"):
            raise StanzaError(ErrorType.CANCEL, "service-unavailable")
        if to.resource and kind == "headline":
            return
        for other in wanting:
            other.send(serialise(stanza))

    def _server_items(self, _: Session, __: Iq) -> Element:
        items = [make(f"{{{NS_ITEMS}}}item", {"jid": str(jid)}) for jid in self._components]
        return make(f"{{{NS_ITEMS}}}query", None, *items)

    def _send(self, stanza: Element, session: Session) -> None:
        """Send a stanza of the server's own."""
        text = stanza.get("from")
        sender = JID.parse(text) if text is not None else None
        written = serialise(stanza)
        for seconds in self._faults.copies(stanza, sender, session.jid):
            if seconds:
                self._later(seconds, lambda: session.send(written))
            else:
                session.send(written)


def make_info(category: str, kind: str, name: str, *features: str) -> Element:
    """Build the answer to disco#info (XEP-0030 section 3)."""
    return make(
        f"{{{NS_INFO}}}query",
        None,
        make(f"{{{NS_INFO}}}identity", {"category": category, "type": kind, "name": name}),
        *(make(f"{{{NS_INFO}}}feature", {"var": var}) for var in (NS_INFO, *features)),
    )


def _may_be_from(text: str | None, jid: JID) -> bool:
    try:
        return text is None or JID.parse(text) in (jid, jid.bare)
    except ValueError:
        return False


def _done(_: Session, __: Iq) -> None:
    """An empty result says it all."""


def _account_info(_: Session, __: Iq) -> Element:
    return make_info("account", "registered", "", NS_ITEMS, NS_PING)


def _server_info(_: Session, __: Iq) -> Element:
    return make_info("server", "im", "syncd demo", NS_ITEMS, NS_PING)


def _no_items(_: Session, __: Iq) -> Element:
    return make(f"{{{NS_ITEMS}}}query")
