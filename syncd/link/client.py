"""Our presence on the network: connect, run, back off, again; and which peers are there.

`Client` is what the rest of syncd talks to; it survives every reconnection.
"""

from __future__ import annotations

import logging
import random
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
from syncd.link import connect
from syncd.link.session import MAX_WAITING, REQUEST_TIMEOUT, Handler, Session
from syncd.xmpp import sasl
from syncd.xmpp.disco import INFO, PING, make_info, read_info
from syncd.xmpp.stanza import Iq, IqType, make_presence, read_from
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from xml.etree.ElementTree import Element

    from syncd.xmpp.contacts import Contacts
    from syncd.xmpp.disco import Identity
    from syncd.xmpp.jid import JID
    from syncd.xmpp.sm import StreamManagement

log = logging.getLogger(__name__)

# Half of them: presences that flood in leave the other half to everybody else.
MAX_ASKING = MAX_WAITING // 2  # resources
# Doubling from the first to the last; the jitter keeps a thousand daemons from coming back
# to a restarted server in the same instant.
BACK_OFF_FIRST = 1.0  # seconds
BACK_OFF_LAST = 120.0  # seconds
# Wrong credentials stay wrong until somebody changes them, and fail2ban counts.
BACK_OFF_LOGIN = 300.0  # seconds
BACK_OFF_LOGIN_LAST = 3_600.0  # seconds

# XEP-0198 lets the server keep it to itself for how long it keeps a session; Prosody and
# Openfire keep one for 600, ejabberd for 300.
DEFAULT_RESUME = 300.0  # seconds

# RFC 6121 section 4.7.2.3: below 0, no message to the bare JID lands here.
PRIORITY = -1

NS_ROSTER = "jabber:iq:roster"
ROSTER = f"{{{NS_ROSTER}}}query"


class Client:
    """Our presence on the network: keeps a session, and knows which peers are there.

    Args:
      account: Whom to log in as, and where.
      contacts: The configured peers.
      identity: What we say we are (disco#info).
      features: What we say we can.
      handlers: For requests, by the tag of the payload; disco#info and ping are added.
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
        features: frozenset[str],
        handlers: Mapping[str, Handler],
        changed: Callable[[], None] = lambda: None,
        logged_in: Callable[[str], None] = lambda mechanism: None,
    ) -> None:
        self._account = account
        self._contacts = contacts
        self._identity = identity
        self._features = features
        self._handlers = {
            INFO: self._on_info,
            PING: _on_ping,
            ROSTER: self._on_roster,
            **handlers,
        }
        self._changed = changed
        self._logged_in = logged_in
        self._session: Session | None = None
        self._nursery: trio.Nursery | None = None
        self._online = trio.Event()
        self._offline = trio.Event()
        self._successor: connect.Connection | None = None
        self._asking: dict[JID, int] = {}  # presences since disco#info is under way
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

    async def run(self) -> None:
        """Stay online for ever: connect, run, back off, again."""
        failures = 0
        while True:
            started = trio.current_time()
            try:
                await self._run_once()
            except SyncdError as error:
                self.problem = error
                log.warning("offline: %s", error)
            finally:
                if self._session is not None:
                    self.since = time.time()
                    self._online = trio.Event()  # a failed attempt keeps it: tasks wait for it
                self._session = self._nursery = None
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
        connection = self._successor or await connect.connect(self._account)
        self._successor = None
        self._remember(connection.stream.mechanism)
        session = Session(connection, self._handlers, self._on_presence)

        def begin(nursery: trio.Nursery) -> None:
            self._session, self._nursery, self.problem = session, nursery, None
            self._offline, self.since = trio.Event(), time.time()
            log.info("online as %s", session.jid)
            with suppress(OfflineError):  # it may have ended with what came behind the bind
                session.send(make_presence(priority=PRIORITY))
            self._online.set()
            nursery.start_soon(self._subscribe)
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

    async def _reconnect(self, sm: StreamManagement) -> connect.Connection | None:
        """Connect again to resume a session, for as long as the server keeps it."""
        log.info("the connection broke; resuming")
        self._changed()
        with trio.move_on_after(sm.max_seconds or DEFAULT_RESUME):
            failures = 0
            while True:
                try:
                    connection = await connect.connect(self._account, resume=sm)
                except AuthenticationError:
                    return None
                except SyncdError as error:
                    self.problem = error
                    log.info("not resumed yet: %s", error)
                else:
                    self.problem = None
                    self._changed()
                    return connection
                failures += 1
                await trio.sleep(back_off(failures, self.problem, random.random()))  # noqa: S311 - jitter
        return None

    async def _subscribe(self) -> None:
        """Ask for the presence of the peers whom we cannot see yet (RFC 6121 section 3.1)."""
        assert self._session is not None
        try:
            roster = await self.request("get", None, make(ROSTER))
        except (StanzaError, OfflineError) as error:
            log.info("no roster: %s", error)
            return
        items = roster.payload if roster.payload is not None else make(ROSTER)
        seen = {
            item.get("jid", "")
            for item in items
            if item.get("subscription") in ("to", "both") or item.get("ask") == "subscribe"
        }
        with suppress(OfflineError):  # the stream may have ended behind the roster
            for peer in self._contacts.peers:
                if str(peer) not in seen:
                    self._session.send(make_presence("subscribe", peer))

    def _on_presence(self, presence: Element) -> None:
        kind, sender = presence.get("type"), read_from(presence)
        assert self._session is not None
        assert self._nursery is not None
        if kind == "subscribe":
            # Only those whom the user configured may see when we are there.
            if sender is not None and self._contacts.is_peer(sender):
                self._session.send(make_presence("subscribed", sender.bare))
            return
        before = self._contacts.online()
        unknown = self._contacts.presence_received(presence)
        if unknown is not None and unknown in self._asking:
            self._asking[unknown] += 1
        elif unknown is not None and len(self._asking) < MAX_ASKING:
            self._asking[unknown] = 1
            self._nursery.start_soon(self._discover, unknown)
        if self._contacts.online() != before:
            self._changed()

    async def _discover(self, jid: JID) -> None:
        """Learn what a peer's resource can do, for as long as it is there."""
        delay = BACK_OFF_FIRST
        try:
            while self._contacts.is_there(jid):
                presences = self._asking[jid]
                try:
                    answer = await self.request("get", jid, make(INFO))
                except StanzaError as error:
                    log.info("%s does not tell what it can do: %s", jid, error)
                    # A resource that went and came back is another client: ask it as well.
                    if error.type is not ErrorType.WAIT and presences == self._asking[jid]:
                        return
                except OfflineError as error:
                    log.info("%s does not tell what it can do: %s", jid, error)
                else:
                    self._contacts.info_received(jid, read_info(answer.payload))
                    self._changed()
                    return
                await trio.sleep(delay)
                delay = min(2 * delay, BACK_OFF_LAST)
        finally:
            del self._asking[jid]

    async def _on_info(self, iq: Iq) -> Element:
        assert iq.payload is not None
        if iq.type != "get":
            raise StanzaError(ErrorType.MODIFY, "bad-request", "disco#info is asked by get")
        return make_info(self._identity, self._features, iq.payload.get("node"))

    async def _on_roster(self, iq: Iq) -> None:
        # RFC 6121 section 2.1.6: a push from anybody but our own account is an attack
        # (CVE-2015-8688). We keep no copy of the roster, so there is nothing to update.
        if self.jid is None or iq.sender not in (None, self.jid.bare):
            raise StanzaError(ErrorType.CANCEL, "service-unavailable")


async def _on_ping(iq: Iq) -> None:
    if iq.type != "get":
        raise StanzaError(ErrorType.MODIFY, "bad-request", "a ping is a get")


def back_off(failures: int, problem: SyncdError | None, jitter: float) -> float:
    """How long to wait before the next attempt to connect.

    Args:
      failures: Attempts in a row that failed.
      problem: Why the last one did.
      jitter: 0 to 1.

    Returns:
      Seconds.
    """
    if isinstance(problem, AuthenticationError):
        first, last = BACK_OFF_LOGIN, BACK_OFF_LOGIN_LAST
    elif isinstance(problem, StreamError) and problem.condition == "conflict":
        # Somebody took our resource over: coming straight back would start a war.
        first, last = BACK_OFF_LAST, BACK_OFF_LOGIN_LAST
    else:
        first, last = BACK_OFF_FIRST, BACK_OFF_LAST
    delay = first
    for _ in range(failures - 1):
        if delay >= last:
            break
        delay *= 2
    return min(delay, last) * (0.5 + jitter / 2)
