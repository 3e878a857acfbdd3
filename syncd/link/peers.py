"""Finding the peers, on a session: roster, subscriptions, presence, and what each client can.

What it all means is decided in `syncd.link.contacts`; here it is asked and told.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import trio

from syncd.errors import ErrorType, OfflineError, StanzaError
from syncd.link.session import MAX_WAITING
from syncd.xmpp.disco import INFO
from syncd.xmpp.stanza import make_presence, read_error, read_from
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import Callable
    from xml.etree.ElementTree import Element

    from syncd.link.contacts import Contacts, Resource
    from syncd.xmpp.caps import Caps
    from syncd.xmpp.jid import JID
    from syncd.xmpp.stanza import Iq, IqType

log = logging.getLogger(__name__)

NS_ROSTER = "jabber:iq:roster"
ROSTER = f"{{{NS_ROSTER}}}query"

# RFC 6121 section 4.7.2.3: below 0, no message to the bare JID lands here.
PRIORITY = -1
# Half of them: presences that flood in leave the other half to everybody else.
MAX_ASKING = MAX_WAITING // 2  # resources
# Who cannot tell yet what it can is asked ever more rarely.
ASK_AGAIN_FIRST = 1.0  # seconds
ASK_AGAIN_LAST = 120.0  # seconds
# A fleet of the same client comes online with us: one is asked, and the others are not unless
# that one is silent for so long.
SAME_KIND = 5.0  # seconds
# A server may say of a client that is there that it is not, once.
CHECK_GONE = 300.0  # seconds


class Request(Protocol):
    """Sends an iq and returns its result; raises `StanzaError` or `OfflineError`."""

    async def __call__(  # noqa: D102 - the class says it
        self, kind: IqType, to: JID | None, payload: Element
    ) -> Iq: ...


class Peers:
    """Keeps the contacts true to what a session tells.

    Args:
      contacts: Of the configured peers.
      caps: What our presence tells of us (XEP-0115).
      request: Sends a request on the session.
      send: Sends a stanza on the session; raises `OfflineError`.
      left: Called with the full JID of a peer that was there and is not any more.
      changed: Called when the peers that are online changed.
    """

    def __init__(
        self,
        contacts: Contacts,
        caps: Element,
        *,
        request: Request,
        send: Callable[[Element], None],
        left: Callable[[JID], None],
        changed: Callable[[], None],
    ) -> None:
        self._contacts = contacts
        self._caps = caps
        self._request = request
        self._send = send
        self._left = left
        self._changed = changed
        self._own: JID | None = None
        self._nursery: trio.Nursery | None = None
        self._asking: set[JID] = set()
        self._kinds: dict[Caps, trio.Event] = {}  # somebody is being asked
        self._to_say = trio.Event()

    def begin(self, nursery: trio.Nursery, own: JID) -> None:
        """A session has begun: show ourselves, and look for the peers.

        Args:
          nursery: For tasks that end with this session.
          own: Our full JID on it.
        """
        self._nursery, self._own = nursery, own
        with suppress(OfflineError):  # it may have ended with what came behind the bind
            self._show()
        nursery.start_soon(self._say)
        nursery.start_soon(self._read_roster, own.bare)

    def presence_received(self, presence: Element) -> None:
        """Take a presence from the session.

        Raises:
          StanzaError: Its sender's address is malformed.
          OfflineError: The stream ended.
        """
        sender, kind = read_from(presence), presence.get("type")
        # Strangers hear nothing: even a refusal would tell that we are there.
        if sender is None or sender == self._own or not self._contacts.is_peer(sender):
            return
        if kind == "error":
            log.info("no presence at %s: %s", sender, read_error(presence))
        before, was_there = self._contacts.online(), self._contacts.is_there(sender)
        unknown = self._contacts.presence_received(presence)
        if unknown is not None:
            self._ask(unknown)
        if kind == "unavailable" and was_there:
            self._left(sender)
        if self._contacts.online() != before:
            self._changed()
        to_greet = self._contacts.subscriptions.presence_received(kind, sender)
        self._to_say.set()
        if to_greet is not None:
            self._show(to_greet)

    def on_roster(self, iq: Iq) -> None:
        """Take a change of the roster, if it comes from our own account.

        Raises:
          StanzaError: It comes from anybody else.
        """
        # RFC 6121 section 2.1.6: such a push is an attack (CVE-2015-8688).
        if self._own is None or iq.sender not in (None, self._own.bare):
            raise StanzaError(ErrorType.CANCEL, "service-unavailable")
        assert iq.payload is not None
        if iq.type != "set":
            raise StanzaError(ErrorType.MODIFY, "bad-request", "a roster push is a set")
        self._contacts.subscriptions.roster_pushed(iq.payload)

    def gone(self, chosen: Resource) -> None:
        """A request to this client came back as unavailable: the next one is chosen.

        It is asked later whether it is there after all, in case no presence tells.
        """
        self._contacts.gone(chosen)
        if self._contacts.unknown(chosen.jid) is not None:
            self._ask(chosen.jid, CHECK_GONE)
        self._changed()

    def _show(self, to: JID | None = None) -> None:
        """Send our presence, to all who may see it or to one (RFC 6121 section 4.6)."""
        presence = make_presence(None, to, PRIORITY)
        presence.append(self._caps)
        self._send(presence)

    async def _read_roster(self, own: JID) -> None:
        """Find out who sees whom; then ask to see the others, and show ourselves to them."""
        subscriptions = self._contacts.subscriptions
        try:
            roster = await self._request("get", None, make(ROSTER))
        except (StanzaError, OfflineError) as error:
            log.info("no roster: %s", error)
            subscriptions.roster_received(None, own)
        else:
            payload = roster.payload if roster.payload is not None else make(ROSTER)
            subscriptions.roster_received(payload, own)
        self._to_say.set()
        with suppress(OfflineError):  # the stream may have ended behind the roster
            for peer in subscriptions.unseen():
                self._show(peer)

    async def _say(self) -> None:
        """Say what there is to say about subscriptions, not in bursts."""
        try:
            while True:
                self._to_say = trio.Event()  # before the look, or a wake is lost
                stanza, again = self._contacts.subscriptions.next(trio.current_time())
                if stanza is not None:
                    self._send(stanza)
                    continue
                with trio.move_on_at(again):
                    await self._to_say.wait()
        except OfflineError:
            pass  # what is left to say is said on the next session
        finally:
            self._nursery = None  # it ends with us, and `gone` is called from outside

    def _ask(self, jid: JID, after: float = 0.0) -> None:
        if self._nursery is None:
            return  # the session is ending, and with it what we know of anybody
        if jid not in self._asking and len(self._asking) < MAX_ASKING:
            self._asking.add(jid)
            self._nursery.start_soon(self._discover, jid, after)

    async def _discover(self, jid: JID, after: float) -> None:
        """Learn what a client can do, for as long as it is there and does not tell."""
        delay = ASK_AGAIN_FIRST
        try:
            await trio.sleep(after)
            while (resource := self._contacts.unknown(jid)) is not None:
                try:
                    await self._learn(resource)
                except (StanzaError, OfflineError) as error:
                    log.info("%s does not tell what it can do: %s", jid, error)
                    if isinstance(error, StanzaError) and error.type is not ErrorType.WAIT:
                        self._contacts.info_refused(resource)
                if self._contacts.unknown(jid) is not None:
                    await trio.sleep(delay)
                    delay = min(2 * delay, ASK_AGAIN_LAST)
        finally:
            self._asking.discard(jid)

    async def _learn(self, resource: Resource) -> None:
        """Ask a client what it can do, unless another one of its kind tells first."""
        caps = resource.caps
        if caps in self._kinds:
            with trio.move_on_after(SAME_KIND):
                await self._kinds[caps].wait()
            if self._contacts.unknown(resource.jid) is None:
                return
        told = trio.Event()
        if caps is not None:
            self._kinds.setdefault(caps, told)
        try:
            answer = await self._ask_for_info(resource.jid, caps)
            if self._contacts.info_received(resource, answer.payload):
                self._changed()
        finally:
            told.set()
            if caps is not None and self._kinds.get(caps) is told:
                del self._kinds[caps]

    async def _ask_for_info(self, jid: JID, caps: Caps | None) -> Iq:
        if caps is not None:
            try:
                return await self._request("get", jid, make(INFO, {"node": caps.query_node}))
            except StanzaError as error:
                if error.condition != "item-not-found":
                    raise
                # COMPAT(any): its presence was written when it could do something else.
        return await self._request("get", jid, make(INFO))
