"""Finding proxies, and looking whether they can be reached: XEP-0065 sections 4 and 6.

A server is asked for its items, each item what it is, each proxy where it is; then it is
connected to and greeted, and asked for nothing. All that happens in the background from the
moment when we are online, so that an offer never has to wait for it: some receivers give up
5 seconds after they have accepted a file.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

import trio

from syncd.bytestreams import s5b
from syncd.bytestreams.proxies import MAX_MEMORY, Probed
from syncd.bytestreams.sockets import greet_streamhost
from syncd.errors import BytestreamError, OfflineError, RemoteProtocolError, StanzaError
from syncd.xmpp import disco
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path
    from xml.etree.ElementTree import Element

    from syncd.bytestreams.proxies import Proxies
    from syncd.bytestreams.s5b import Streamhost
    from syncd.xmpp.stanza import Request

log = logging.getLogger(__name__)

# A program answers, perhaps of another server.
QUERY_TIMEOUT = 10.0  # seconds
# For all items of a server: some of them are gateways that died, and never answer.
SERVER_TIMEOUT = 30.0  # seconds
# A public server has some sixty items, and those that look like proxies are asked first.
MAX_ASKED = 32  # items of a server
# Prosody and ejabberd limit how much a client may say in a second.
MAX_QUERIES = 4  # at a time
# Each takes a socket for 5 seconds at most.
MAX_PROBES = 8  # at a time
# How long an offer may wait for the very first look at our own proxies.
PATIENCE = 3.0  # seconds
# How often what was learned is kept, and a proxy that was lost is looked at.
KEEP_EVERY = 60.0  # seconds
# Between two looks, whatever goes wrong.
PAUSE = 1.0  # seconds
# For one small file.
SAVE_TIMEOUT = 2.0  # seconds

# What a proxy says to those whom it does not serve (XEP-0065 section 4).
_REFUSALS = frozenset({"forbidden", "not-allowed", "not-authorized"})

_LIKELY = ("proxy", "socks", "bytestream", "s5b")


class Memory(Protocol):
    """Keeps some bytes from one run to the next; raises OSError if it cannot."""

    async def load(self) -> bytes:
        """What was saved last; empty if nothing was."""
        ...

    async def save(self, data: bytes) -> None:
        """Put this in its place."""
        ...


class MemoryFile:
    """A `Memory` on disk.

    Args:
      path: The file; another one beside it, with ``.new`` behind its name, is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # A thread of our own: that of others may be full of slow files.
        self._limiter = trio.CapacityLimiter(1)

    async def load(self) -> bytes:
        """What was saved last, cut off where it is longer than `MAX_MEMORY` allows."""
        return await trio.to_thread.run_sync(self._read, limiter=self._limiter)

    async def save(self, data: bytes) -> None:
        """Put this in its place; after a crash it is the old or the new one, or empty."""
        await trio.to_thread.run_sync(self._write, data, limiter=self._limiter)

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_MEMORY + 1)
        except FileNotFoundError:
            return b""

    def _write(self, data: bytes) -> None:
        # Not synced: what a power cut takes is found out again.
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_bytes(data)
        new.replace(self._path)


class Discovery:
    """Keeps what is known of proxies up to date.

    Args:
      proxies: What is known.
      own_domain: Our account's server.
      request: Sends an iq.
      own_jid: Our full JID, or None while we are offline.
      wait_online: Returns when we are online.
      memory: Where what was learned outlives a restart.
      clock: The time, seconds since 1970.
      probe: Connects to a streamhost and greets it; see `greet_streamhost`.
    """

    def __init__(
        self,
        proxies: Proxies,
        *,
        own_domain: str,
        request: Request,
        own_jid: Callable[[], JID | None],
        wait_online: Callable[[], Awaitable[None]],
        memory: Memory,
        clock: Callable[[], float] = time.time,
        probe: Callable[[Streamhost], Awaitable[float]] = greet_streamhost,
    ) -> None:
        self._proxies = proxies
        self._own_domain = own_domain
        self._request = request
        self._own_jid = own_jid
        self._wait_online = wait_online
        self._memory = memory
        self._clock = clock
        self._probe = probe
        self._saved = b""
        self._told: set[str] = set()
        self._looked = trio.Event()
        self._woken = trio.Event()
        self._querying = trio.CapacityLimiter(MAX_QUERIES)
        self._probing = trio.CapacityLimiter(MAX_PROBES)

    async def run(self) -> None:
        """Find out, and keep at it until cancelled."""
        await self._remember()
        try:
            while True:
                await self._wait_online()
                self._woken = trio.Event()  # before the look, or a wake is lost
                await self._look(own=True)
                if self._own_jid() is not None:
                    self._looked.set()
                await self._look(own=False)
                self._tell()
                await self._keep()
                pause = min(self._proxies.next_due(self._clock()), KEEP_EVERY)
                with trio.move_on_after(max(pause, PAUSE)):
                    await self._woken.wait()
        finally:
            with trio.move_on_after(SAVE_TIMEOUT, shield=True):
                await self._keep()

    def refresh(self) -> None:
        """Find everything out anew, because a new session has begun."""
        self._proxies.expire()
        self._woken.set()

    async def prepare(self) -> None:
        """Wait, but not for long, until our own proxies have been looked at once."""
        if self._proxies.usable(self._clock()):
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(PATIENCE):
            await self._looked.wait()

    def _tell(self) -> None:
        """Log what has changed: the same every five minutes would be read by nobody."""
        texts = {report.text for report in self._proxies.report(self._clock())}
        for text in sorted(texts - self._told):
            log.info("%s", text)
        self._told = texts

    # --- Asking

    async def _look(self, *, own: bool) -> None:
        """Ask whoever is due; our own first, as nothing is known without them."""
        async with trio.open_nursery() as nursery:
            for domain in self._proxies.due_servers(self._clock()):
                if (domain == self._own_domain) is own:
                    nursery.start_soon(self._ask_server, domain)
        async with trio.open_nursery() as nursery:
            for jid in self._proxies.due_proxies(self._clock()):
                if self._proxies.is_own(jid) is own:
                    nursery.start_soon(self._ask_proxy, jid)

    async def _ask_server(self, domain: str) -> None:
        try:
            answer = await self._query(JID("", domain), make(disco.ITEMS))
        except (StanzaError, OfflineError) as error:
            if self._own_jid() is not None:
                self._proxies.not_found(domain, str(error), self._clock())
            return
        items = [jid for jid in disco.read_items(answer) if not jid.local]
        items.sort(key=lambda jid: not any(word in jid.domain for word in _LIKELY))
        found: set[JID] = set()
        waiting = iter(items[:MAX_ASKED])
        with trio.move_on_after(SERVER_TIMEOUT):
            async with trio.open_nursery() as nursery:
                for _ in range(MAX_QUERIES):
                    nursery.start_soon(self._ask_items, waiting, found)
        if self._own_jid() is not None:
            named = [jid for jid in items if jid in found]
            self._proxies.found(domain, named, self._clock())

    async def _ask_items(self, waiting: Iterator[JID], found: set[JID]) -> None:
        """Ask one item after the other; several of these share the list, in its order."""
        for jid in waiting:
            try:
                info = disco.read_info(await self._query(jid, make(disco.INFO)))
            except (StanzaError, OfflineError) as error:
                log.debug("%s does not say what it is: %s", jid, error)
                continue
            # Only those that say it are asked for an address: others answer in every way
            # that there is.
            if info.is_a("proxy", "bytestreams"):
                found.add(jid)

    async def _ask_proxy(self, jid: JID) -> None:
        try:
            answer = await self._query(jid, s5b.make_address_request())
            named = s5b.read_addresses(answer)
        except (StanzaError, OfflineError, RemoteProtocolError) as error:
            if self._own_jid() is None:
                return
            if isinstance(error, StanzaError) and error.condition in _REFUSALS:
                self._proxies.refused(jid, error.condition, self._clock())
            else:
                self._proxies.unusable(jid, str(error), self._clock())
            return
        results: dict[Streamhost, Probed] = {}
        streamhosts = self._proxies.worth_testing(jid, named)
        async with trio.open_nursery() as nursery:
            for streamhost in streamhosts:
                nursery.start_soon(self._test, streamhost, results)
        self._proxies.tested(jid, [results[each] for each in streamhosts], self._clock())

    async def _test(self, streamhost: Streamhost, results: dict[Streamhost, Probed]) -> None:
        async with self._probing:
            try:
                results[streamhost] = Probed(streamhost, await self._probe(streamhost))
            except BytestreamError as error:
                reason = str(error).removeprefix(f"{streamhost}: ")
                results[streamhost] = Probed(streamhost, None, reason)

    async def _query(self, to: JID, payload: Element) -> Element | None:
        async with self._querying:
            return (await self._request("get", to, payload, QUERY_TIMEOUT)).payload

    # --- Between two runs

    async def _remember(self) -> None:
        try:
            if data := await self._memory.load():
                self._proxies.restore(data)
        except (OSError, ValueError) as error:
            # Everything in it can be found out again.
            log.warning("cannot read what was known of proxies: %s", error)

    async def _keep(self) -> None:
        data = self._proxies.dump()
        if data == self._saved:
            return
        try:
            await self._memory.save(data)
            self._saved = data
        except OSError as error:
            log.warning("cannot keep what is known of proxies: %s", error)
