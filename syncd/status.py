"""What `syncctl status` shows, put together from everybody who knows a part of it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import syncd
from syncd.control.messages import (
    Connection,
    ErrorStatus,
    FolderStatus,
    PeerStatus,
    Status,
    TransferStatus,
)
from syncd.control.summary import quantity, summarise
from syncd.errors import AuthenticationError, OfflineError, RemoteProtocolError
from syncd.sync.journal import PeerCount
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.config import Config, Folder
    from syncd.link.client import Client
    from syncd.sync.engine import Engine, FolderState, Statistics
    from syncd.transfer.pump import Progress

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
                method="direct",
                rate=watched.rate(now),
            )
            for watched in self._running.values()
        )


class Reporter:
    """Puts the status together.

    Args:
      config: What is configured.
      client: Knows the connection, and who is online.
      engine: Knows what is owed.
      transfers: What moves now.
    """

    def __init__(
        self, config: Config, client: Client, engine: Engine, transfers: Transfers
    ) -> None:
        self._config = config
        self._client = client
        self._engine = engine
        self._transfers = transfers
        self._started = datetime.now(UTC)

    async def status(self) -> Status:
        """How everything stands now."""
        statistics = await self._engine.statistics()
        connection = self._connection()
        folders = tuple(
            _folder(folder, statistics.folders[folder.id], statistics)
            for folder in self._config.folders
        )
        peers = tuple(self._peer(peer, statistics) for peer in self._peers())
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
        )

    def _connection(self) -> Connection:
        jid, problem, account = self._client.jid, self._client.problem, self._config.account
        server = str(account.server) if account.server else account.jid.domain
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

    def _peers(self) -> list[str]:
        """All peers, as configured, each once; those who are sent to come first."""
        folders = self._config.folders
        sent_to = dict.fromkeys(peer for folder in folders for peer in folder.send_to)
        bare = {peer.bare for peer in sent_to}
        accepted = [jid for folder in folders for jid in folder.accept_from]
        accepted += self._config.inbox.accept_from if self._config.inbox else ()
        only_accepted = dict.fromkeys(jid for jid in accepted if jid not in bare)
        return [str(peer) for peer in (*sent_to, *only_accepted)]

    def _peer(self, peer: str, statistics: Statistics) -> PeerStatus:
        count = statistics.counts.peers.get(peer, PeerCount())
        jid, resource = JID.parse(peer), ""
        with contextlib.suppress(OfflineError):
            resource = self._client.contacts.choose(jid).jid.resource
        return PeerStatus(
            jid=peer,
            online=bool(resource),
            resource=resource,
            encryption="plain",
            pending=count.pending,
            pending_bytes=count.pending_bytes,
            parked=count.parked,
            delivered=count.delivered,
            sent=count.sent,
            next_try=_moment(count.next_try) if count.next_try else None,
            last_error=count.error,
            problem=_parked(count),
            hint=count.hint if count.parked else "",
        )


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
    return (*failures, *skipped)


def _moment(seconds: float) -> datetime:
    """A point of the wall clock, from seconds since 1970."""
    return datetime.fromtimestamp(seconds, UTC)
