"""What `syncctl status` shows, put together from everybody who knows a part of it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

import syncd
from syncd.control.messages import (
    Connection,
    ErrorStatus,
    FolderStatus,
    Limited,
    LimitStatus,
    PeerStatus,
    ProxyStatus,
    Standing,
    StandingRequest,
    Status,
    TransferStatus,
)
from syncd.control.summary import duration, quantity, summarise
from syncd.errors import AuthenticationError, NotFoundError, OfflineError, RemoteProtocolError
from syncd.sync.folder import RESCAN
from syncd.sync.journal import PeerCount
from syncd.transfer import si
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.bytestreams.proxies import Proxies
    from syncd.config import Config, Folder
    from syncd.control.messages import LimitRequest, SendRequest
    from syncd.link.client import Client
    from syncd.sync.engine import Engine, FolderState, Statistics
    from syncd.sync.limits import Limits
    from syncd.transfer.pump import Progress
    from syncd.wiring.keys import PeerKeys

# A disk that wakes up may take some seconds; this long, somebody should know.
SLOW_DISK = 10.0  # seconds
# The rate is that of the last few seconds: long enough not to jump, short enough to be true.
_RATE_WINDOW = 3.0  # seconds


@dataclass(slots=True)
class _Watched:
    """One running transfer."""

    direction: Literal["send", "receive"]
    peer: str
    folder: str
    path: str
    size: int
    progress: Progress
    marks: list[tuple[float, int]] = field(default_factory=list)

    def rate(self, now: float) -> int:
        """Bytes per second, lately."""
        if not self.marks or now - self.marks[-1][0] >= _RATE_WINDOW:
            self.marks = [*self.marks[-1:], (now, self.progress.offset)]
        start, offset = self.marks[0]
        return max(0, round((self.progress.offset - offset) / max(now - start, 0.001)))


class Transfers:
    """The transfers that run now, for the status."""

    def __init__(self) -> None:
        self._running: dict[int, _Watched] = {}
        self._next = 0

    @contextlib.contextmanager
    def watch(
        self,
        direction: Literal["send", "receive"],
        *,
        peer: str,
        folder: str,
        path: str,
        size: int,
        progress: Progress,
    ) -> Iterator[None]:
        """Show a transfer for as long as the block lasts.

        Args:
          direction: From here or to here.
          peer: Full JID of the other end.
          folder: Id of the folder, or empty.
          path: Below the folder.
          size: Of the whole file, bytes.
          progress: How far it is.
        """
        number = self._next = self._next + 1
        watched = _Watched(direction, peer, folder, path, size, progress)
        watched.marks.append((time.monotonic(), progress.offset))
        self._running[number] = watched
        try:
            yield
        finally:
            del self._running[number]

    def snapshot(self) -> tuple[TransferStatus, ...]:
        """All of them, oldest first."""
        now = time.monotonic()
        return tuple(
            TransferStatus(
                direction=watched.direction,
                peer=watched.peer,
                folder=watched.folder,
                path=watched.path,
                size=watched.size,
                offset=watched.progress.offset,
                method=watched.progress.method or None,
                rate=watched.rate(now),
            )
            for watched in self._running.values()
        )


class Reporter:
    """Puts the status together, and answers what else is asked about single peers.

    Args:
      config: What is configured.
      client: Knows the connection, and who is online.
      engine: Knows what is owed.
      transfers: What moves now.
      limits: Those in force.
      keys: How far the peers' keys are trusted.
      proxies: What is known of proxies.
    """

    def __init__(
        self,
        config: Config,
        client: Client,
        engine: Engine,
        transfers: Transfers,
        limits: Limits,
        keys: PeerKeys,
        proxies: Proxies,
    ) -> None:
        self._config = config
        self._client = client
        self._engine = engine
        self._transfers = transfers
        self._limits = limits
        self._keys = keys
        self._proxies = proxies
        self._started = datetime.now(UTC)

    async def status(self) -> Status:
        """How everything stands now."""
        statistics = await self._engine.statistics()
        connection = self._connection()
        folders = tuple(
            _folder(folder, statistics.folders[folder.id], statistics)
            for folder in self._config.folders
        )
        peers = tuple(self._peer(peer, statistics) for peer in peers_of(self._config))
        transfers = self._transfers.snapshot()
        errors = _errors(statistics)
        state, summary = summarise(
            connection=connection,
            folders=folders,
            peers=peers,
            transfers=transfers,
            errors=errors,
            now=datetime.now(UTC),
        )
        return Status(
            state=state,
            summary=summary,
            version=syncd.__version__,
            started=self._started,
            connection=connection,
            folders=folders,
            peers=peers,
            transfers=transfers,
            errors=errors,
            limit=self._limit(""),
            proxies=tuple(
                ProxyStatus(
                    jid=str(each.jid), usable=each.usable, text=each.text, hint=each.hint
                )
                for each in self._proxies.report(time.time())
            ),
            counted=datetime.now(UTC) - timedelta(seconds=statistics.counted),
        )

    def limit(self, request: LimitRequest) -> Limited:
        """Change how fast bytes may flow, and say how fast that is.

        Raises:
          NotFoundError: There is no such peer.
        """
        bare = str(self._find(request.peer).bare) if request.peer else ""
        self._limits.set(bare, up=request.up, down=request.down)
        return Limited(peer=bare, limit=self._limit(bare))

    async def send(self, request: SendRequest) -> Standing:
        """Owe a file outside any folder to a peer; on disk when this returns.

        Raises:
          NotFoundError: There is no such file or peer.
          SyncdError: The file cannot be sent, and why.
        """
        await self._engine.send_outside(request.path, str(self._find(request.peer)))
        return await self.standing(StandingRequest(path=request.path, peer=request.peer))

    async def standing(self, request: StandingRequest) -> Standing:
        """Say what has become of such a file.

        Raises:
          NotFoundError: There is no such peer.
        """
        peer = self._find(request.peer)
        standing = await self._engine.standing_outside(request.path, str(peer))
        return Standing(
            state=standing.state,
            online=peer in self._client.contacts.online(),
            error=standing.error,
            hint=standing.hint,
        )

    def _find(self, name: str) -> JID:
        """Find a configured peer; who is configured with a resource is also found without."""
        peers = peers_of(self._config)
        try:
            jid = JID.parse(name)
        except ValueError as error:
            raise NotFoundError(f"{name!r} is no JID: {error}") from error
        alike = [peer for peer in peers if jid in (peer, peer.bare)]
        if not alike:
            raise NotFoundError(
                f"the configuration names no peer {jid}",
                hint=f'add it:  [[peer]]  jid = "{jid.bare}"  and reload syncd',
            )
        return jid if jid in alike else alike[0]

    def _limit(self, peer: str) -> LimitStatus:
        rates = self._limits.of(peer)
        return LimitStatus(up=rates.up, down=rates.down)

    def _connection(self) -> Connection:
        jid, problem, account = self._client.jid, self._client.problem, self._config.account
        server = self._client.server or str(account.server or account.jid.domain)
        state: Literal["connected", "connecting", "offline", "unauthorized", "refused"]
        if self._client.connected:
            state = "connected"
        elif problem is None:
            state = "connecting"
        elif isinstance(problem, AuthenticationError):
            state = "unauthorized"
        elif isinstance(problem, RemoteProtocolError):
            state = "refused"
        else:
            state = "offline"
        return Connection(
            state=state,
            jid=str(jid or account.jid),
            server=server,
            since=_moment(self._client.since),
            reason=str(problem) if problem and not self._client.connected else "",
            hint=problem.hint if problem and not self._client.connected else "",
        )

    def _peer(self, jid: JID, statistics: Statistics) -> PeerStatus:
        count = statistics.counts.peers.get(str(jid), PeerCount())
        resource, can_seal = "", False
        with contextlib.suppress(OfflineError):
            chosen = self._client.contacts.choose(jid)
            resource = chosen.jid.resource
            can_seal = chosen.info is not None and si.NS_SEAL in chosen.info.features
        return PeerStatus(
            jid=str(jid),
            online=bool(resource),
            resource=resource,
            encryption=self._keys.standing(str(jid.bare), can_seal=can_seal),
            pending=count.pending,
            pending_bytes=count.pending_bytes,
            parked=count.parked,
            delivered=count.delivered,
            sent=count.sent,
            next_try=_moment(count.next_try) if count.next_try else None,
            last_error=count.error,
            problem=_parked(count),
            hint=count.hint if count.parked else "",
            limit=self._limit(str(jid.bare)),
        )


def peers_of(config: Config) -> tuple[JID, ...]:
    """All peers, as configured, each once; those who are sent to come first."""
    sent_to = dict.fromkeys(peer for folder in config.folders for peer in folder.send_to)
    bare = {peer.bare for peer in sent_to}
    others = [jid for folder in config.folders for jid in folder.accept_from]
    others += config.inbox.accept_from if config.inbox else ()
    others += [peer.jid for peer in config.peers]
    return (*sent_to, *dict.fromkeys(jid for jid in others if jid not in bare))


def _parked(count: PeerCount) -> str:
    if not count.parked:
        return ""
    return f"{quantity(count.parked, 'file')} cannot be delivered: {count.error}"


def _folder(folder: Folder, state: FolderState, statistics: Statistics) -> FolderStatus:
    return FolderStatus(
        id=folder.id,
        path=str(folder.path),
        send_to=tuple(str(peer) for peer in folder.send_to),
        accept_from=tuple(str(peer) for peer in folder.accept_from),
        files=state.files,
        pending=statistics.counts.pending.get(folder.id, 0),
        settling=state.settling if folder.send_to else 0,
        scanning=state.scanning,
        problem=state.problem,
        hint=state.hint,
    )


def _errors(statistics: Statistics) -> tuple[ErrorStatus, ...]:
    now = datetime.now(UTC)
    slow = [
        ErrorStatus(
            time=now,
            text="the disk of the state directory has not answered for "
            f"{duration(statistics.counted)}",
            hint="is it about to fail, or far away? nothing is sent before it answers",
        )
    ]
    failures = [
        ErrorStatus(
            time=_moment(failure.at),
            peer=failure.peer,
            folder=failure.folder,
            path=failure.path,
            text=failure.text,
            hint=failure.hint,
        )
        for failure in statistics.failures
    ]
    skipped = [
        ErrorStatus(
            time=now,
            folder=folder,
            path=path,
            text=f"not sent: {reason}",
            hint="rename it, or give syncd access to it",
        )
        for folder, state in statistics.folders.items()
        for path, reason in state.skipped
    ]
    unwatched = [
        ErrorStatus(
            time=now,
            folder=folder,
            text="the kernel watches no more directories (fs.inotify.max_user_watches); "
            f"what changes in some is found within {duration(RESCAN)}",
            hint="run: sysctl fs.inotify.max_user_watches=1048576, and restart syncd",
        )
        for folder, state in statistics.folders.items()
        if state.unwatched
    ]
    return (*unwatched, *(slow if statistics.counted > SLOW_DISK else ()), *failures, *skipped)


def _moment(seconds: float) -> datetime:
    """A point of the wall clock, from seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC)
