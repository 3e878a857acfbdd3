"""The requester's side of a SOCKS5 bytestream on trio: XEP-0065 sections 5 and 6.

A `Place` is taken before a file is offered, and kept until its last byte is gone::

    async with requester.place(peer, size) as place:
        with place.asking():
            ...                         # offer the file, wait for the answer
        opened = await place.open(sid)  # its stream belongs to the caller
        ...                             # send, and close right after the last byte
        opened.carried(True)            # once it is known that the bytes got through

What goes through a proxy is counted, as proxies limit it. Waiting for a place comes before the
offer, because a receiver that has accepted waits for the opening only 5 seconds. But a place is
not kept for a person who thinks about the offer, when somebody else could use it: such a one
waits again after the answer, as well as it goes.
"""

from __future__ import annotations

import math
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import trio

from syncd.bytestreams import s5b
from syncd.bytestreams.sockets import connect_first
from syncd.errors import (
    BytestreamError,
    OfflineError,
    OpeningError,
    RemoteProtocolError,
    StanzaError,
    TransferError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from xml.etree.ElementTree import Element

    from syncd.bytestreams.proxies import Proxies
    from syncd.bytestreams.s5b import Streamhost
    from syncd.bytestreams.sockets import Listener, Slot
    from syncd.xmpp.jid import JID
    from syncd.xmpp.stanza import Iq, Request

# The target tries our streamhosts one after the other, some clients for 7 s each.
USED_TIMEOUT = 120.0  # seconds
# The proxy has both connections already; between us and it are two servers at most.
ACTIVATE_TIMEOUT = 30.0  # seconds
# How much later than ours the request's own end comes, so that it is told which it was.
_LATER = 5.0  # seconds

# COMPAT(ejabberd): its sample configuration allows 5 to an account, which may have other
# clients.
MAX_MEDIATED = 4  # transfers
# The rest is for other peers.
MAX_MEDIATED_TO_ONE = 2  # transfers to one bare JID
# Of all places, and of those of a peer, one is for files up to this size: none waits for hours
# behind huge ones. As the plan has it, which starts the deliveries.
SMALL = 4 * 1024 * 1024  # bytes
# A program answers an offer in less; then a person is being asked.
ASKING_GRACE = 5.0  # seconds
# How long a target that has accepted is kept waiting for a place: half of what a syncd waits.
PLACE_TIMEOUT = 60.0  # seconds

# What targets answer when no streamhost let them in; other conditions have other reasons.
_NO_WAY = frozenset({
    "item-not-found",  # XEP-0065 section 5.3.2
    "remote-server-not-found",  # COMPAT(psi)
    "undefined-condition",  # COMPAT(slixmpp): a streamhost refused it
})  # fmt: skip

_OPEN_A_WAY = (
    "let the port of bytestreams.listen through your firewall and NAT and name the address "
    "that peers reach in bytestreams.advertise, or use a proxy that both ends reach "
    "(bytestreams.proxies)"
)

# XEP-0065 section 6.3.5, in words that end "the proxy ... did not join the two ends: ...".
_ACTIVATIONS = {
    "item-not-found": "it does not see both of them",
    # COMPAT(openfire): says this whatever is wrong.
    "not-allowed": "it does not see both of them, or does not want this transfer",
    "not-authorized": "it computes another address for this stream",
    "forbidden": "it does not serve this account",
    "resource-constraint": "it has too many transfers at once",
    "conflict": "they are joined already",
    "internal-server-error": "it failed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A bytestream to a target.

    Attributes:
      stream: It; to be closed right after the last byte.
      method: By which way.
      via: Our address that the target is connected to, or the proxy's JID.
      carried: To be told whether the bytes got through, which a connection alone does not say:
        the way comes first from then on, or is avoided for a while.
    """

    stream: trio.SocketStream
    method: Literal["direct", "proxy"]
    via: str
    carried: Callable[[bool], None]


class Requester:
    """Opens bytestreams to targets.

    Args:
      request: Sends an iq.
      own_jid: Our full JID, or None while we are offline.
      listener: Where targets connect to; None if direct connections are off.
      advertised: Our addresses and ports as others reach them, likeliest first.
      proxies: What is known of proxies; hears what came of it.
      prepare: Waits until `proxies` know something, but not for long.
      clock: The time, seconds since 1970.
      max_mediated: How many transfers may go through proxies at a time.
    """

    def __init__(
        self,
        *,
        request: Request,
        own_jid: Callable[[], JID | None],
        listener: Listener | None,
        advertised: Callable[[], list[tuple[str, int]]],
        proxies: Proxies,
        prepare: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
        clock: Callable[[], float] = time.time,
        max_mediated: int = MAX_MEDIATED,
    ) -> None:
        self._request = request
        self._own_jid = own_jid
        self._listener = listener
        self._advertised = advertised
        self._proxies = proxies
        self._prepare = prepare
        self._clock = clock
        self._room = Room(max_mediated)

    async def ready(self, to: JID | None = None) -> bool:
        """Whether there is anything to offer; may take a look at the proxies first.

        Args:
          to: The target: then a way counts only if it is not known to carry nothing to it.
        """
        if self._own_addresses() and not self._is_swallowed(to):
            await trio.lowlevel.checkpoint()
            return True
        await self._prepare()
        return self._proxies.usable(self._clock(), to)

    @asynccontextmanager
    async def place(self, to: JID, size: int = 0) -> AsyncIterator[Place]:
        """Get ready for a transfer; waits if it will need a proxy and they are all in use.

        COMPAT(smack): waits 5 s for the opening of what it has accepted, so that all there is
        to wait for comes before the offer.

        Args:
          to: The target, a full JID.
          size: Of the file, bytes.
        """
        await self._prepare()
        place = Place(self._room, partial(self._open, to), to.bare, small=size <= SMALL)
        now = self._clock()
        no_direct = not self._own_addresses() or self._is_swallowed(to)
        only_mediated = no_direct and self._proxies.usable(now, to)
        try:
            if only_mediated or self._proxies.prefers_proxy(to, now):
                await place.wait()
            yield place
        finally:
            place.leave()

    def _may_help(self, to: JID, error: OpeningError) -> bool:
        """Whether a proxy might have led to a target where our addresses did not."""
        cause = error.__cause__
        unwanted = isinstance(cause, StanzaError) and cause.condition not in _NO_WAY
        return not unwanted and self._proxies.usable(self._clock(), to)

    def _is_swallowed(self, to: JID | None) -> bool:
        return to is not None and self._proxies.swallows_direct(to, self._clock())

    def _own_addresses(self) -> list[tuple[str, int]]:
        return self._advertised() if self._listener is not None else []

    async def _open(self, to: JID, place: Place, sid: str, slack: float) -> Opened:
        own = self._own_jid()
        if own is None:
            raise OfflineError("not connected to the server")
        direct = [s5b.Streamhost(own, host, port) for host, port in self._own_addresses()]
        if not direct or self._is_swallowed(to):
            await place.wait_briefly()
        # With all places taken it is tried without a proxy: the target waits already.
        mediated = place.take()
        offer = self._proxies.choose(to, direct, self._clock(), mediated=mediated)
        if all(host.jid == own for host in offer):
            place.leave()
        if not offer:
            raise OpeningError(
                "nothing",
                "there is no address to offer for a bytestream: direct connections are off, or "
                "this machine has no network, and there is no proxy",
                hint=self._hint(),
            )
        try:
            opened = await self._negotiate(_Attempt(sid, own, to, offer, USED_TIMEOUT + slack))
        except OpeningError as error:
            place.leave()
            error.crowded = not mediated and self._may_help(to, error)
            raise
        except BaseException:
            place.leave()
            raise
        if opened.method == "direct":
            place.leave()
        return opened

    async def _negotiate(self, attempt: _Attempt) -> Opened:
        with self._expecting(attempt) as slot:
            used = await self._propose(attempt)
            if slot is not None and used[0].jid == attempt.own:
                return await self._take_direct(attempt, slot)
        # COMPAT(openfire, prosody, ejabberd): whoever comes first to a proxy is the target,
        # so that we come only now, and once.
        jid = used[0].jid
        try:
            _, stream = await connect_first(used, attempt.address)
        except BytestreamError as error:
            why = _each_reason(error)
            self._proxies.lost(jid, why)
            self._proxies.failed(attempt.to, [jid], self._clock())
            raise OpeningError(
                "unreachable",
                f"{attempt.to.bare} uses the proxy {jid}, which cannot be reached from here: "
                f"{why}",
                hint=self._hint(),
            ) from error
        try:
            await self._activate(attempt, jid)
        except BaseException:
            stream.socket.close()
            raise
        carried = partial(self._note, attempt.to, jid, "")
        return Opened(stream=stream, method="proxy", via=str(jid), carried=carried)

    def _note(self, to: JID, way: JID | None, host: str, worked: bool) -> None:
        """Remember whether bytes got through to a target."""
        if worked:
            self._proxies.worked(to, way, self._clock(), host=host)
        else:
            self._proxies.swallowed(to, way, self._clock())

    @contextmanager
    def _expecting(self, attempt: _Attempt) -> Iterator[Slot | None]:
        """Let the target connect to us as long as the context lasts, if that is offered."""
        if self._listener is None or all(host.jid != attempt.own for host in attempt.offer):
            yield None
            return
        aliases = s5b.dstaddr_aliases(attempt.sid, attempt.own, attempt.to)
        with self._listener.expect(attempt.address, *aliases) as slot:
            yield slot

    async def _propose(self, attempt: _Attempt) -> tuple[Streamhost, ...]:
        """Send the offer; which streamhost is used, under all its addresses."""
        to, query = attempt.to, s5b.make_query(attempt.sid, attempt.offer)
        try:
            answer = await self._ask(to, query, attempt.patience)
        except StanzaError as error:
            if error.condition in _NO_WAY:
                self._proxies.failed(to, attempt.ways, self._clock())
                text = f"{to.bare} cannot connect to {attempt} [{error.condition}]"
            else:
                text = f"{to.bare} does not want a SOCKS5 bytestream: {error}"
            raise OpeningError("refused", text, hint=self._hint()) from error
        if answer is None:
            # COMPAT(gloox): this is its way to say that it cannot connect.
            self._proxies.failed(to, attempt.ways, self._clock())
            raise OpeningError(
                "silent",
                f"{to.bare} did not say within {attempt.patience:.0f} s whether it can connect "
                f"to {attempt}",
                hint=self._hint(),
            )
        try:
            return s5b.read_used(answer.payload, attempt.offer)
        except RemoteProtocolError as error:
            raise OpeningError("nonsense", str(error)) from error

    async def _take_direct(self, attempt: _Attempt, slot: Slot) -> Opened:
        try:
            stream = await slot.winner()
        except BytestreamError as error:
            self._proxies.failed(attempt.to, [None], self._clock())
            raise OpeningError("unconnected", str(error), hint=error.hint) from error
        host, port = stream.socket.getsockname()[:2]
        # As a socket for both families calls what it has of IPv4 (RFC 4291 section 2.5.5.2).
        host = host.removeprefix("::ffff:")
        via = str(s5b.Streamhost(attempt.own, host, port))
        carried = partial(self._note, attempt.to, None, host)
        return Opened(stream=stream, method="direct", via=via, carried=carried)

    async def _activate(self, attempt: _Attempt, proxy: JID) -> None:
        """Have the two ends joined (XEP-0065 section 6.3.5).

        COMPAT(ejabberd): the proxy has a resource, and is told under just that JID.
        """
        request = s5b.make_activate(attempt.sid, attempt.to)
        now, why, cause = self._clock, "it did not answer", None
        try:
            if await self._ask(proxy, request, ACTIVATE_TIMEOUT) is not None:
                return
        except StanzaError as error:
            meaning = _ACTIVATIONS.get(error.condition, error.text or "it refused")
            why, cause = f"{meaning} [{error.condition}]", error
        match cause.condition if cause else "":
            case "forbidden":
                self._proxies.refused(proxy, "forbidden", now())
            case "resource-constraint":
                self._proxies.busy(proxy, now())
            case _:
                self._proxies.failed(attempt.to, [proxy], now())
        raise OpeningError(
            "activation",
            f"the proxy {proxy} did not join us and {attempt.to.bare}: {why}",
        ) from cause

    async def _ask(self, to: JID, payload: Element, patience: float) -> Iq | None:
        """Send a request; None if nobody answers, which is not our being offline."""
        with trio.move_on_after(patience):
            return await self._request("set", to, payload, patience + _LATER)
        return None

    def _hint(self) -> str:
        """What the user can do when there is no way: first of all mend the proxies."""
        reports = self._proxies.report(self._clock())
        if not any(each.usable for each in reports):
            for each in reports:
                if each.hint:
                    return f"{each.text}; {each.hint}"
        return _OPEN_A_WAY


class Place:
    """Room for one transfer, which may have to go through a proxy; from `Requester.place`."""

    def __init__(
        self,
        room: Room,
        opening: Callable[[Place, str, float], Awaitable[Opened]],
        peer: JID,
        *,
        small: bool,
    ) -> None:
        self._room = room
        self._opening = opening
        self.peer = peer
        self.small = small
        self.asking_since = math.inf  # when the target was asked that has not answered yet

    def __repr__(self) -> str:
        return f"<Place held={self._room.holds(self)}>"

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask the target; if that takes long, others may have the place meanwhile."""
        self.asking_since = trio.current_time()
        self._room.look_again()
        try:
            yield
        finally:
            self.asking_since = math.inf

    async def open(self, sid: str, slack: float = 0.0) -> Opened:
        """Open a bytestream, directly or by a proxy.

        Args:
          sid: The stream's id; never one that was used before.
          slack: How much longer than usual the target may take, in seconds.

        Returns:
          It; to be closed before the place is left.

        Raises:
          OpeningError: No way led to the target.
          OfflineError: We went away meanwhile.
          TransferError: Only a proxy leads there, and all places are taken.
        """
        return await self._opening(self, sid, slack)

    async def wait(self) -> None:
        """Wait until there is room at the proxies."""
        await self._room.wait(self)

    async def wait_briefly(self) -> None:
        """The same, while a target waits that has accepted."""
        with trio.move_on_after(PLACE_TIMEOUT) as waiting:
            await self.wait()
        if waiting.cancelled_caught and not self._room.holds(self):
            raise TransferError("as many transfers as proxies take are under way already")

    def take(self) -> bool:
        """Whether there is room at the proxies; if so it is ours."""
        return self._room.take(self)

    def leave(self) -> None:
        """Give the room back, if we have it."""
        self._room.leave(self)


class Room:
    """The places for transfers through proxies: some for each peer, and some for small files.

    Args:
      total: How many there are.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: dict[Place, None] = {}
        self._waiting: dict[Place, trio.Event] = {}  # in the order in which they came

    def __repr__(self) -> str:
        return f"<Room held={len(self._held)} waiting={len(self._waiting)}>"

    def __len__(self) -> int:
        """How many are held."""
        return len(self._held)

    def holds(self, place: Place) -> bool:
        """Whether a place is held."""
        return place in self._held

    def take(self, place: Place) -> bool:
        """Whether there is one; if so it is held."""
        self._take_back()
        if place not in self._held and self._has_room_for(place):
            self._held[place] = None
        return place in self._held

    async def wait(self, place: Place) -> None:
        """Wait until there is one."""
        try:
            while not self.take(place):
                self._waiting[place] = trio.Event()  # where it was in the order, if it was
                with trio.move_on_at(self._next_grace()):
                    await self._waiting[place].wait()
        finally:
            self._waiting.pop(place, None)

    def leave(self, place: Place) -> None:
        """Give it back, if it is held; those who can have it now do."""
        self._held.pop(place, None)
        self._give()

    def look_again(self) -> None:
        """Let those who wait see until when they do: one who holds a place asks a target."""
        for event in self._waiting.values():
            event.set()

    def _give(self) -> None:
        for waiting, event in self._waiting.items():
            if self._has_room_for(waiting):
                self._held[waiting] = None
                event.set()

    def _take_back(self) -> None:
        """Let those do without who have asked a person, and may wait for long."""
        now = trio.current_time()
        for place in [each for each in self._held if each.asking_since + ASKING_GRACE <= now]:
            self.leave(place)

    def _next_grace(self) -> float:
        since = min((each.asking_since for each in self._held), default=math.inf)
        return since + ASKING_GRACE

    def _has_room_for(self, place: Place) -> bool:
        if place in self._held:
            return False
        same = [each for each in self._held if each.peer == place.peer]
        if len(self._held) >= self._total or len(same) >= MAX_MEDIATED_TO_ONE:
            return False
        # Of one single place huge files must have their share.
        large = sum(not each.small for each in self._held)
        large_of_same = sum(not each.small for each in same)
        return place.small or (
            large < max(1, self._total - 1) and large_of_same < max(1, MAX_MEDIATED_TO_ONE - 1)
        )


@dataclass(frozen=True, slots=True)
class _Attempt:
    sid: str
    own: JID
    to: JID
    offer: tuple[Streamhost, ...]
    patience: float  # how long the target may try them, seconds

    @property
    def address(self) -> str:
        return s5b.dstaddr(self.sid, self.own, self.to)

    @property
    def ways(self) -> list[JID | None]:
        return [None if host.jid == self.own else host.jid for host in self.offer]

    def __str__(self) -> str:
        """Everything that was offered, as people write it."""
        near = [str(host) for host in self.offer if host.jid == self.own]
        far = [f"the proxy {host.jid} at {host}" for host in self.offer if host.jid != self.own]
        return " nor to ".join([f"us at {', '.join(near)}", *far] if near else far)


def _each_reason(error: BytestreamError) -> str:
    """Why each address failed, without what `connect_first` tells a target about it."""
    cause = error.__cause__
    return "; ".join(
        map(str, cause.exceptions if isinstance(cause, ExceptionGroup) else [error])
    )
