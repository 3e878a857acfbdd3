"""Our presence on the network: connect, run, back off, again; and which peers are there.

`Client` is what the rest of syncd talks to; it survives every reconnection.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from syncd.errors import (
    AuthenticationError,
    ErrorType,
    OfflineError,
    StanzaError,
    StreamError,
    SyncdError,
)
from syncd.link import connect, resolve
from syncd.link.peers import ROSTER, Peers
from syncd.link.retry import (
    BACK_OFF_LAST,
    back_off,
    other_resource,
    other_server,
    resume_within,
)
from syncd.link.session import REQUEST_TIMEOUT, Answer, Handler, Session
from syncd.xmpp import caps, sasl
from syncd.xmpp.disco import (
    INFO,
    ITEMS,
    NS_INFO,
    NS_ITEMS,
    NS_PING,
    NS_VERSION,
    PING,
    VERSION,
    make_info,
    make_version,
)
from syncd.xmpp.stanza import PRESENCE, Iq, IqType, make_presence
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from xml.etree.ElementTree import Element

    from syncd.link.contacts import Contacts, Resource
    from syncd.xmpp.disco import Identity
    from syncd.xmpp.jid import JID
    from syncd.xmpp.sm import StreamManagement

log = logging.getLogger(__name__)

# What is answered here, whatever handlers there are.
SERVED = frozenset({NS_INFO, NS_ITEMS, NS_PING, NS_VERSION, caps.NS})


class Client:
    """Our presence on the network: keeps a session, and knows which peers are there.

    Args:
      account: Whom to log in as, and where.
      contacts: The configured peers.
      identity: What we say we are (disco#info); its name is our name (XEP-0092).
      version: Which one of it.
      features: What we say we can, beside what is answered here.
      handlers: For requests, by the tag of the payload; questions about ourselves, pings and
        the roster are answered here.
      changed: Called when the connection or the peers that are online changed.
      logged_in: Gets the SASL mechanism when a stronger one than before was used, to be kept.

    Attributes:
      problem: Why we are offline; None while online, or before the first attempt has failed.
      since: When we came online or went offline last, seconds since 1970.
    """

    def __init__(
        self,
        account: connect.Account,
        contacts: Contacts,
        *,
        identity: Identity,
        version: str,
        features: frozenset[str],
        handlers: Mapping[str, Handler],
        changed: Callable[[], None] = lambda: None,
        logged_in: Callable[[str], None] = lambda mechanism: None,
    ) -> None:
        self._account = account
        self._contacts = contacts
        self._identity = identity
        self._version = version
        self._features = features | SERVED
        own_info = make_info(identity, self._features)
        self._caps = caps.make_caps(own_info)
        # Who says the same as we do need not be asked.
        contacts.capabilities.answered(
            caps.read_caps(make(PRESENCE, None, self._caps)), own_info
        )
        self._peers = Peers(
            contacts, self._caps, request=self.request, send=self._send, changed=changed
        )
        self._handlers = {ROSTER: self._peers.on_roster, **handlers}
        self._answers: dict[str, Answer] = {
            INFO: self._on_info,
            ITEMS: _on_items,
            PING: _on_ping,
            VERSION: self._on_version,
        }
        self._changed = changed
        self._logged_in = logged_in
        self._session: Session | None = None
        self._online = trio.Event()
        self._offline = trio.Event()
        self._successor: connect.Connection | None = None
        self._asked_for = account.jid  # before any conflict
        self._elsewhere: tuple[str, int] | None = None  # where the server has sent us
        self._connected_at = -math.inf  # on the clock of the event loop
        self._breaks = 0  # in a row, each soon after the connection was made
        self.problem: SyncdError | None = None
        self.since = time.time()

    @property
    def jid(self) -> JID | None:
        """Our full JID while we are online, else None."""
        return self._session.jid if self._session else None

    @property
    def connected(self) -> bool:
        """Whether there is a connection just now; a session may outlive one."""
        return self._session is not None and self._session.connected

    @property
    def contacts(self) -> Contacts:
        """Who is there."""
        return self._contacts

    def gone(self, chosen: Resource) -> None:
        """A request to this client of a peer came back as unavailable: choose another now."""
        self._peers.gone(chosen)

    async def run(self) -> None:
        """Stay online for ever: connect, run, back off, again."""
        try:
            await self._run()
        finally:
            if self._successor is not None:
                await trio.aclose_forcefully(self._successor.transport)

    async def _run(self) -> None:
        failures = 0
        while True:
            started = trio.current_time()
            try:
                await self._run_once()
            except SyncdError as error:
                self.problem = error
                log.warning("offline: %s", error)
                self._learn(error)
            finally:
                if self._session is not None:
                    self.since = time.time()
                    self._online = trio.Event()  # a failed attempt keeps it: tasks wait for it
                self._session = None
                self._offline.set()
                self._contacts.clear()
                self._changed()
            if self._successor is not None:
                continue  # bound already
            # A session that held for a while was a good one: begin anew.
            failures = 0 if trio.current_time() - started > BACK_OFF_LAST else failures + 1
            await trio.sleep(back_off(failures, self.problem, random.random()))  # noqa: S311 - jitter

    async def request(
        self, kind: IqType, to: JID | None, payload: Element, timeout: float = REQUEST_TIMEOUT
    ) -> Iq:
        """Send a request and wait for its result; see `Session.request`."""
        if self._session is None:
            raise OfflineError("not connected to the server")
        return await self._session.request(kind, to, payload, timeout)

    async def wait_online(self) -> None:
        """Return as soon as there is a session."""
        while self._session is None:
            await self._online.wait()

    async def goodbye(self) -> None:
        """Tell the server that we go, if it is there; returns when it has heard.

        `run` comes back after a while, so cancel it then.
        """
        if self._session is not None:
            with suppress(OfflineError):
                self._session.send(make_presence("unavailable"))
            self._session.close()
            await self._offline.wait()

    async def _run_once(self) -> None:
        """Live one session; the one that comes instead of a forgotten one is the next."""
        connection = self._successor or await self._connect()
        self._successor, self._connected_at = None, trio.current_time()
        self._remember(connection.stream.mechanism)
        session = Session(
            connection, self._handlers, self._peers.presence_received, self._answers
        )

        def begin(nursery: trio.Nursery) -> None:
            self._session, self.problem = session, None
            self._offline, self.since = trio.Event(), time.time()
            log.info("online as %s", session.jid)
            self._peers.begin(nursery, session.jid)
            self._online.set()
            self._changed()

        try:
            await session.run(begin, self._reconnect)
        finally:
            self._successor = session.successor

    def _remember(self, mechanism: str) -> None:
        """Never be talked into a weaker login than this server has let us use before."""
        if sasl.strength(mechanism) > sasl.strength(self._account.least):
            self._account = replace(self._account, least=mechanism)
            self._logged_in(mechanism)

    async def _connect(self, sm: StreamManagement | None = None) -> connect.Connection:
        """Connect; where the server sends us instead is tried, but from there we go nowhere.

        Its certificate must be good for the same domain (RFC 6120 section 13.7.2).
        """
        account, self._elsewhere, sent_by = self._account, None, self._elsewhere
        if sent_by is None:
            try:
                return await connect.connect(account, sm)
            except StreamError as error:
                sent_by = other_server(error, _default_port(account))
                if sent_by is None:
                    raise
        log.info("the server sends us to %s:%d", *sent_by)
        return await connect.connect(replace(account, server=sent_by), sm)

    def _learn(self, error: SyncdError) -> None:
        """Come back elsewhere, or as somebody else, if that is why the session ended."""
        if self._session is not None:
            self._elsewhere = other_server(error, _default_port(self._account))
        other = other_resource(self._asked_for, error, secrets.token_hex(4))
        if other is not None:
            self._account = replace(self._account, jid=other)

    async def _reconnect(self, sm: StreamManagement) -> connect.Connection | None:
        """Connect again to resume a session, for as long as the server keeps it."""
        log.info("the connection broke; resuming")
        self._changed()
        held = trio.current_time() - self._connected_at
        # The first break after a while is nobody's fault: come back at once.
        self._breaks = 0 if held > BACK_OFF_LAST else self._breaks + 1
        failures = self._breaks - 1
        with trio.move_on_after(resume_within(sm)):
            while sm.id:
                if failures > 0:
                    await trio.sleep(back_off(failures, self.problem, random.random()))  # noqa: S311 - jitter
                try:
                    connection = await self._connect(sm)
                except AuthenticationError:
                    raise  # each further attempt counts against us
                except SyncdError as error:
                    self.problem = error
                    log.info("not resumed yet: %s", error)
                    self._changed()
                    failures = max(failures, 0) + 1
                else:
                    log.info("resumed" if connection.stream.sm is sm else "not resumed: bound")
                    self.problem, self._connected_at = None, trio.current_time()
                    self._changed()
                    return connection
        return None

    def _send(self, stanza: Element) -> None:
        if self._session is None:
            raise OfflineError("not connected to the server")
        self._session.send(stanza)

    def _on_info(self, iq: Iq) -> Element:
        node = _asked(iq).get("node")
        # XEP-0115 section 6.2: under this node our presence promised the answer.
        if node not in (None, "", f"{caps.NODE}#{self._caps.get('ver')}"):
            raise StanzaError(ErrorType.CANCEL, "item-not-found")
        return make_info(self._identity, self._features, node)

    def _on_version(self, iq: Iq) -> Element:
        _asked(iq)
        return make_version(self._identity.name, self._version)


def _on_items(iq: Iq) -> Element:
    query = _asked(iq)
    if query.get("node"):
        raise StanzaError(ErrorType.CANCEL, "item-not-found")
    # XEP-0030 section 7: who has none says so.
    return make(ITEMS)


def _on_ping(iq: Iq) -> None:
    _asked(iq)


def _asked(iq: Iq) -> Element:
    """The payload of a question, which is a get."""
    assert iq.payload is not None
    if iq.type != "get":
        raise StanzaError(ErrorType.MODIFY, "bad-request", "this is asked by get")
    return iq.payload


def _default_port(account: connect.Account) -> int:
    return resolve.DIRECT_TLS_PORT if account.tls == "direct" else resolve.STARTTLS_PORT
