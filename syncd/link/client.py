"""Our presence on the network: connect, run, back off, again; and which peers are there.

`Client` is what the rest of syncd talks to; it survives every reconnection.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
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
    ASK_AGAIN,
    BACK_OFF_LAST,
    Pauses,
    back_off,
    is_of_network,
    other_resource,
    other_server,
    read_host,
    resume_within,
)
from syncd.link.session import REQUEST_TIMEOUT, Answer, Handler, MessageHandler, Session
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
    from collections.abc import Callable, Collection, Mapping
    from xml.etree.ElementTree import Element

    from syncd.link.contacts import Contacts, Resource
    from syncd.xmpp.disco import Identity
    from syncd.xmpp.jid import JID
    from syncd.xmpp.sm import StreamManagement
    from syncd.xmpp.stream import ClientStream

log = logging.getLogger(__name__)

# Each resumption sends again what the server has not acknowledged. If it breaks the connection
# off over that, with its reason lost on the way, only a new session gets on.
MAX_VAIN = 3  # resumptions in a row, after which nothing more was acknowledged

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
      logged_in: Gets the strongest SASL mechanism that was used so far, and whether SASL2 was,
        when there is something new about that to be kept.
      messages: For messages, by the tag of a child; see `Session`.
      bounded: Tags of requests that bound themselves; see `Session`.

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
        logged_in: Callable[[str, bool], None] = lambda mechanism, sasl2: None,
        messages: Mapping[str, MessageHandler] = MappingProxyType({}),
        bounded: Collection[str] = (),
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
            contacts,
            self._caps,
            request=self.request,
            send=self._send,
            left=self._left,
            changed=changed,
        )
        self._handlers = handlers
        self._answers: dict[str, Answer] = {
            INFO: self._on_info,
            ITEMS: _on_items,
            PING: _on_ping,
            ROSTER: self._peers.on_roster,
            VERSION: self._on_version,
        }
        self._messages = messages
        self._bounded = bounded
        self._changed = changed
        self._logged_in = logged_in
        self._session: Session | None = None
        self._online = trio.Event()
        self._offline = trio.Event()
        self._successor: connect.Connection | None = None
        self._asked_for = account.jid  # before any conflict
        self._conflict_at = -math.inf  # on the clock of the event loop
        self._elsewhere: tuple[str, int] | None = None  # where the server has sent us
        self._began_at = self._connected_at = -math.inf  # likewise: session and connection
        self._broke_at = math.inf  # likewise, of the connection that is missing
        self._breaks = 0  # in a row, each soon after the connection was made
        self._acked = -1  # stanzas of this session, at its last break
        self._vain = 0  # breaks in a row between which nothing was acknowledged
        self._moved = trio.Event()  # the machine has other addresses than at the last attempt
        self._leaving = False  # the server has heard goodbye
        self._told = ""  # the last reason for being offline in the log
        self._caveat = ""  # the last one in the log
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
    def server(self) -> str:
        """Host and port of the server that we are connected to; empty if there is none."""
        return self._session.server if self._session and self._session.connected else ""

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
        pauses = Pauses()
        while True:
            held, ended = 0.0, None
            self._moved = trio.Event()
            try:
                await self._run_once()
            except SyncdError as error:
                self.problem = ended = error
                self._tell(str(error))
                if self._session is not None:
                    self._elsewhere = other_server(error, _default_port(self._account))
            finally:
                if self._session is not None:
                    self.since = time.time()
                    held = min(trio.current_time(), self._broke_at) - self._began_at
                    self._online = trio.Event()  # a failed attempt keeps it: tasks wait for it
                    self._moved = trio.Event()  # it has lived through that
                self._session = None
                self._offline.set()
                self._contacts.clear()
                self._changed()
            if self._successor is not None:
                continue  # bound already
            if other := other_resource(self._asked_for, ended, secrets.token_hex(4)):
                await self._become(other)
            if await self._pause(pauses.after(self.problem, held, random.random())):  # noqa: S311 - jitter
                pauses.forgive()

    async def _pause(self, seconds: float) -> bool:
        """Wait before the next attempt; tell whether another network has made that pointless.

        What has happened since the last attempt began counts as well.
        """
        with trio.move_on_after(seconds):
            if not is_of_network(self.problem):
                await trio.sleep_forever()
            await self._moved.wait()
            return True
        return False

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

    def network_changed(self, is_ours: Callable[[str], bool]) -> None:
        """See at once whether the server can be reached: this machine has other addresses.

        Args:
          is_ours: Tells whether an address is one of them.
        """
        self._moved.set()
        if self._session is not None:
            self._session.check(is_ours)

    async def goodbye(self) -> None:
        """Tell the server that we go, if it is there; returns when it has heard.

        `run` comes back after a while, so cancel it then.
        """
        if self._session is not None:
            self._leaving = True
            with suppress(OfflineError):
                self._session.send(make_presence("unavailable"))
            self._session.close()
            await self._offline.wait()

    async def _run_once(self) -> None:
        """Live one session; the one that comes instead of a forgotten one is the next."""
        connection = self._successor or await self._connect_as_asked()
        self._successor = None
        self._began_at = self._connected_at = trio.current_time()
        self._broke_at, self._leaving = math.inf, False
        self._acked, self._vain = -1, 0
        self._remember(connection.stream)
        session = Session(
            connection,
            self._handlers,
            self._peers.presence_received,
            self._answers,
            self._messages,
            self._bounded,
        )

        def begin(nursery: trio.Nursery) -> None:
            self._session, self.problem, self._told = session, None, ""
            self._offline, self.since = trio.Event(), time.time()
            log.info("online as %s", session.jid)
            self._peers.begin(nursery, session.jid)
            self._online.set()
            self._changed()

        try:
            await session.run(begin, self._reconnect)
        finally:
            self._successor = session.successor
        if not self._leaving:
            raise OfflineError(
                "the server closed the stream, and did not say why",
                hint="syncd logs in again by itself; the server's log may say more",
            )

    def _tell(self, reason: str) -> None:
        """Log why we are offline: once, for as long as it stays the reason."""
        level = logging.DEBUG if reason == self._told else logging.WARNING
        log.log(level, "offline: %s", reason)
        self._told = reason

    def _remember(self, stream: ClientStream) -> None:
        """Never be talked into a weaker login than this server has let us use before."""
        if stream.caveat not in ("", self._caveat):
            self._caveat = stream.caveat
            log.warning("%s", stream.caveat)
        # A token's mechanism has no strength of its own: a stronger login has earned it.
        known = self._account
        least = max(known.least, stream.mechanism, key=sasl.strength)
        sasl2 = known.sasl2 or stream.sasl2
        if (least, sasl2) != (known.least, known.sasl2):
            self._account = replace(known, least=least, sasl2=sasl2)
            self._logged_in(least, sasl2)

    async def _connect_as_asked(self) -> connect.Connection:
        """Connect; under the name that the user wants if a conflict about it is long past."""
        since_conflict = trio.current_time() - self._conflict_at
        if self._account.jid != self._asked_for and since_conflict >= ASK_AGAIN:
            log.info("asking for %s again", self._asked_for)
            self._account = replace(self._account, jid=self._asked_for)
        return await self._connect()

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

    async def _connect_again(self, sm: StreamManagement) -> connect.Connection:
        """Connect where the server wants a session to be resumed, else as ever.

        It is the one of many that keeps the session (XEP-0198 section 5), and held to the same
        certificate.
        """
        preferred = read_host(sm.location, _default_port(self._account))
        if preferred is not None:
            try:
                return await connect.connect(replace(self._account, server=preferred), sm)
            except AuthenticationError:
                raise  # each further attempt counts against us
            except SyncdError as error:
                log.info("not at %s:%d, where the server wants us: %s", *preferred, error)
        connection = await self._connect(sm)
        # If it goes without, whoever drops our packets there shall not hold the next time up.
        sm.location = ""
        return connection

    async def _become(self, other: JID) -> None:
        """Log in as another client from now on: one is there already that is as we are."""
        self._conflict_at = trio.current_time()
        account = self._account = replace(self._account, jid=other)
        if not account.agent:
            return
        # With Bind 2 the server makes the resource of the agent (XEP-0386 section 3.2.1), and
        # the other one has the same: of one image of a machine with all its state.
        self._account = replace(account, agent=str(uuid.uuid4()))
        await trio.to_thread.run_sync(account.keep_agent, self._account.agent)
        if account.tokens is not None:
            # It belongs to the agent that it was given to (XEP-0484 section 3.3).
            await trio.to_thread.run_sync(account.tokens.write, None)

    async def _reconnect(self, sm: StreamManagement) -> connect.Connection | None:
        """Connect again to resume a session; tell what may be lost if that is given up."""
        self._broke_at, connection = trio.current_time(), None
        try:
            connection = await self._connect_to_resume(sm)
        finally:
            if connection is None and (lost := len(sm.unacked)):
                log.info("the session is given up: %d stanzas may be lost", lost)
        return connection

    async def _connect_to_resume(self, sm: StreamManagement) -> connect.Connection | None:
        """Connect again, for as long as the server keeps the session."""
        self._check_progress(sm)
        log.info("the connection broke; resuming")
        self._changed()
        held = trio.current_time() - self._connected_at
        # The first break after a while is nobody's fault: come back at once.
        self._breaks = 0 if held > BACK_OFF_LAST else self._breaks + 1
        failures = self._breaks - 1
        with trio.move_on_after(resume_within(sm)):
            while sm.id:
                if failures > 0:
                    seconds = back_off(failures, self.problem, random.random())  # noqa: S311 - jitter
                    failures = 0 if await self._pause(seconds) else failures
                self._moved = trio.Event()
                try:
                    connection = await self._connect_again(sm)
                except AuthenticationError:
                    raise  # each further attempt counts against us
                except SyncdError as error:
                    self.problem = error
                    log.info("not resumed yet: %s", error)
                    self._changed()
                    failures = max(failures, 0) + 1
                else:
                    log.info("resumed" if connection.stream.sm is sm else "not resumed: bound")
                    self.problem, self._broke_at = None, math.inf
                    self._connected_at = trio.current_time()
                    self._changed()
                    return connection
        return None

    def _check_progress(self, sm: StreamManagement) -> None:
        """Do not send the same for ever to a server that falls over it.

        Raises:
          OfflineError: That is so.
        """
        before, self._acked = self._acked, sm.acked_count
        self._vain = self._vain + 1 if before == self._acked and sm.unacked else 0
        if self._vain >= MAX_VAIN:
            raise OfflineError(
                "the server broke off each connection over what was sent to it",
                hint="its log may say why; a limit on what clients send?",
            )

    def _send(self, stanza: Element) -> None:
        assert self._session is not None, "what finds the peers ends with the session"
        self._session.send(stanza)

    def _left(self, jid: JID) -> None:
        assert self._session is not None, "no presence comes without a session"
        self._session.left(jid)

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
