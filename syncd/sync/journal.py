"""What must survive a crash: which version of which file is owed to whom, and what is known.

It stores "this is owed", "this was delivered" and "this is about to arrive", never "I am
connected" or "this is being sent": those are found out again after a crash, and doing
something twice is harmless because both ends recognise a version. Nothing is deleted from
``owed`` except by a delivery, by a newer version, or because the file is gone.

What a person sends outside any folder is owed under the folder `OUTSIDE`, by its absolute
path. All SQL about files is here; `syncd.sync.database` makes the tables.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from syncd.sync.database import Database, open_database
from syncd.sync.pins import Pins
from syncd.sync.plan import SMALL, Delivery, FileVersion

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
    from pathlib import Path

T = TypeVar("T")

# No folder can have this id.
OUTSIDE = ""

# Files that arrive and are gone before anybody has looked leave a row each; so long after,
# nobody will look.
_MAX_ARRIVING = 10_000  # rows

# Copies of one file that lie beside it: more of them somebody has long lost sight of.
_MAX_BESIDE = 64  # rows

# The id of a delivery that is gone may be given to another, even to one of the same inode.
_THIS_DELIVERY = (
    "folder = ? AND path = ? AND peer = ? AND size = ? AND mtime_ns = ? AND inode = ?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A file that a peer has sent us.

    Attributes:
      version: What lies, or is about to lie, under its final name.
      peer: Who sent it: a bare JID.
      digest: BLAKE3 of the content, hexadecimal.
      source_size: Size as the sender gave it, bytes.
      source_mtime_ns: Time of the last change as the sender gave it, nanoseconds since 1970.
      source_path: Where the sender wanted it, if it is kept beside another file there; None
        if it lies where it was wanted.
    """

    version: FileVersion
    peer: str
    digest: str
    source_size: int
    source_mtime_ns: int
    source_path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCount:
    """The deliveries to one peer.

    Attributes:
      pending: How many are owed, parked ones included.
      pending_bytes: The length of their files together.
      parked: How many of them wait for a person.
      delivered: How many the peer has confirmed.
      sent: How many went to a client that does not confirm.
      next_try: When the first of those that failed is tried again, seconds since 1970, or None.
      error: The last error of one that is owed, or empty.
      hint: What to do about it.
    """

    pending: int = 0
    pending_bytes: int = 0
    parked: int = 0
    delivered: int = 0
    sent: int = 0
    next_try: float | None = None
    error: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Everything that the status counts.

    Attributes:
      peers: By peer.
      pending: By folder: files that are owed to at least one peer.
    """

    peers: dict[str, PeerCount]
    pending: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What has become of one file that was owed to one peer.

    Attributes:
      state: ``pending``; ``parked``: a person must act; ``delivered`` or ``sent``, as for
        `Journal.done`; ``dropped``: the file went away, or never was owed.
      attempts: How many have failed.
      error: The last error, or empty.
      hint: What to do about it.
    """

    state: Literal["pending", "parked", "delivered", "sent", "dropped"]
    attempts: int = 0
    error: str = ""
    hint: str = ""


@contextlib.asynccontextmanager
async def open_journal(state_dir: Path) -> AsyncIterator[Journal]:
    """Open, or make, the journal of a state directory.

    Args:
      state_dir: Made if missing, for us alone.

    Raises:
      LockedError: Another daemon has it open.
      JournalError: It cannot be read, or is of a newer syncd; of type WAIT if the disk is
        full, which may pass.
    """
    async with open_database(state_dir) as database:
        counts = await database.run(lambda: database.transact(_count, changes=False))
        yield Journal(database, counts)


class Journal:
    """The open journal; made by `open_journal`.

    Every async method is one transaction, in a thread, durable when it returns. It raises
    `JournalError`, of type WAIT if the disk refuses to be written, which may pass.

    Attributes:
      pins: The keys of peers, in the same database.
    """

    def __init__(self, database: Database, counts: Counts) -> None:
        self.pins = Pins(database)
        self._database = database
        self._counts = counts

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def changed(db: sqlite3.Connection) -> tuple[T, Counts]:
            return work(db), _count(db)

        def job() -> T:
            # Set here, where nobody else runs, or a later change might be counted earlier.
            result, self._counts = self._database.transact(changed)
            return result

        return await self._database.run(job)

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await self._database.run(lambda: self._database.transact(work, changes=False))

    @property
    def busy_since(self) -> float | None:
        """Since when the disk is at work for us, as `Database.busy_since`."""
        return self._database.busy_since

    def counts(self) -> Counts:
        """Everything for the status, as of the last change that is on disk.

        From memory: whoever asks must not wait for a disk that hangs.
        """
        return self._counts

    async def owe(self, versions: Sequence[FileVersion], peers: Collection[str]) -> None:
        """Owe these versions to these peers, except to who has them already.

        A version that a peer sent us is not owed to that peer. A newer version takes the
        place of an older one that is still owed, and lifts its parking.
        """
        await self._run(lambda db: _owe(db, versions, peers))

    async def pending(self, peers: Collection[str], limit: int) -> list[Delivery]:
        """What is owed to these peers and not parked.

        What never failed comes first, the oldest of it before the others; then what is to be
        tried again, in the order of its times, due or not.

        Args:
          peers: Only theirs.
          limit: How many at most for each peer, of the small and of the large ones.
        """
        return await self._read(
            lambda db: [d for peer in peers for d in _pending(db, peer, limit)]
        )

    async def done(
        self,
        delivery: Delivery,
        outcome: Literal["delivered", "sent"],
        digest: str,
        *,
        in_place: bool = False,
    ) -> None:
        """The peer has this version; a newer one may be owed meanwhile, and stays so.

        Args:
          delivery: Which.
          outcome: Whether the peer has confirmed it.
          digest: BLAKE3 of the content, hexadecimal.
          in_place: It lies under this very path there, and beside no other file.
        """
        await self._run(lambda db: _done(db, delivery, outcome, digest, time.time(), in_place))

    async def failed(
        self,
        delivery: Delivery,
        error: str,
        hint: str,
        not_before: float | None,
        *,
        counts: bool = True,
    ) -> None:
        """An attempt failed.

        Args:
          delivery: Which.
          error: A sentence.
          hint: What to do about it, or empty.
          not_before: When to try again, seconds since 1970; None: not until the file changes
            or somebody asks.
          counts: It is one of the `Delivery.attempts`; not if it was only put off.
        """

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE owed SET attempts = attempts + ?, not_before = ?, parked = ?,"  # noqa: S608 - a constant
                f" error = ?, hint = ? WHERE {_THIS_DELIVERY}",
                (
                    counts,
                    not_before or 0,
                    not_before is None,
                    error,
                    hint,
                    *_delivery(delivery),
                ),
            )

        await self._run(work)

    async def gone(self, folder: str, paths: Sequence[str]) -> None:
        """These files are not there any more: nothing of them is owed.

        What is about to arrive in their place is not there yet, and stays known.
        """
        keys = [(folder, path) for path in paths]

        def work(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM owed WHERE folder = ? AND path = ?", keys)
            db.executemany("DELETE FROM file WHERE folder = ? AND path = ?", keys)

        await self._run(work)

    async def owed_paths(self, folder: str, after: str, limit: int) -> list[str]:
        """Files of a folder that are owed to somebody, in order.

        Args:
          folder: Its id.
          after: Only paths that sort behind this one.
          limit: How many at most.
        """

        def work(db: sqlite3.Connection) -> list[str]:
            rows = db.execute(
                "SELECT DISTINCT path FROM owed WHERE folder = ? AND path > ?"
                " ORDER BY path LIMIT ?",
                (folder, after, limit),
            )
            return [path for (path,) in rows]

        return await self._read(work)

    async def retry(self, peer: str) -> None:
        """Try everything that failed with this peer as soon as possible; not what is parked."""
        await self._run(
            lambda db: db.execute(
                "UPDATE owed SET not_before = 0"
                " WHERE peer = ? AND parked = 0 AND not_before > 0",
                (peer,),
            )
        )

    async def unpark(self, account: str) -> None:
        """A person has decided about a peer: try what waited for that.

        Args:
          account: A bare JID; all that is owed to it, or to one of its resources.
        """
        await self._run(
            lambda db: db.execute(
                "UPDATE owed SET parked = 0, not_before = 0, attempts = 0"
                " WHERE peer = ? OR substr(peer, 1, length(?) + 1) = ? || '/'",
                (account, account, account),
            )
        )

    async def forget_others(self, folder_peers: dict[str, Iterable[str]]) -> None:
        """Owe nothing to whom the configuration does not name any more."""

        def work(db: sqlite3.Connection) -> None:
            rows = db.execute("SELECT DISTINCT folder, peer FROM owed").fetchall()
            for folder, peer in rows:
                if peer not in folder_peers.get(folder, ()):
                    db.execute("DELETE FROM owed WHERE folder = ? AND peer = ?", (folder, peer))

        await self._run(work)

    async def arriving(self, arrival: Arrival) -> None:
        """A file is about to get its final name; it shall not be sent back to its origin."""
        await self._run(lambda db: _arriving(db, arrival))

    async def arrivals(self, folder: str, path: str) -> list[Arrival]:
        """What is known of a file that arrived, the newest first; empty if it was made here.

        There are two as long as nobody has looked whether the newer one has got its name.
        """
        return await self._read(lambda db: _arrivals(db, "path", folder, path))

    async def beside(self, folder: str, path: str) -> list[Arrival]:
        """What arrived for this path and was kept beside the file there; a few of them."""
        return await self._read(lambda db: _arrivals(db, "source_path", folder, path))

    async def held(self, folder: str, path: str, account: str) -> FileVersion | None:
        """Which version of ours a peer is known to have had under this very path, lately.

        Args:
          folder: Its id.
          path: Below it.
          account: The peer's bare JID.
        """

        def work(db: sqlite3.Connection) -> FileVersion | None:
            row = db.execute(
                "SELECT size, mtime_ns, inode FROM done WHERE folder = ? AND path = ?"
                " AND (peer = ? OR substr(peer, 1, length(?) + 1) = ? || '/')"
                " AND in_place = 1 ORDER BY at DESC LIMIT 1",
                (folder, path, account, account, account),
            ).fetchone()
            return None if row is None else _version(folder, path, *row)

        return await self._read(work)

    async def send_anew(
        self, version: FileVersion, peer: str, *, not_before: float = 0.0
    ) -> None:
        """Owe a version to a peer although it may have it, or may not have wanted it.

        Args:
          version: What is owed; nobody else is owed it because of this.
          peer: To whom.
          not_before: When it may be sent, seconds since 1970.
        """

        def work(db: sqlite3.Connection) -> None:
            key = (version.folder, version.path, peer)
            for table in ("done", "owed"):
                db.execute(
                    f"DELETE FROM {table} WHERE folder = ? AND path = ? AND peer = ?",  # noqa: S608 - constants
                    key,
                )
            db.execute(
                "INSERT INTO owed (folder, path, peer, size, mtime_ns, inode, not_before)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*key, *_identity(version), not_before),
            )

        await self._run(work)

    async def standing(self, folder: str, path: str, peer: str) -> Standing:
        """Say what has become of a file that was owed to a peer."""
        return await self._read(lambda db: _standing(db, (folder, path, peer)))


def _owe(
    db: sqlite3.Connection, versions: Sequence[FileVersion], peers: Collection[str]
) -> None:
    for version in versions:
        key = (version.folder, version.path)
        what = _identity(version)
        row = db.execute(
            "SELECT size, mtime_ns, inode, origin FROM file WHERE folder = ? AND path = ?", key
        ).fetchone()
        origin = row[3] if row is not None and row[:3] == what else _see_file(db, version)
        for peer in peers:
            had = db.execute(
                "SELECT size, mtime_ns, inode FROM done"
                " WHERE folder = ? AND path = ? AND peer = ?",
                (*key, peer),
            ).fetchone()
            if had == what or (origin is not None and peer.partition("/")[0] == origin):
                # It has this version, so another one that is still owed lies nowhere any more.
                db.execute(
                    "DELETE FROM owed WHERE folder = ? AND path = ? AND peer = ?", (*key, peer)
                )
                continue
            db.execute(
                "INSERT INTO owed (folder, path, peer, size, mtime_ns, inode)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (folder, path, peer) DO UPDATE SET"
                " size = excluded.size, mtime_ns = excluded.mtime_ns, inode = excluded.inode,"
                " attempts = 0, not_before = 0, parked = 0, error = '', hint = ''"
                " WHERE (size, mtime_ns, inode)"
                " <> (excluded.size, excluded.mtime_ns, excluded.inode)",
                (*key, peer, *what),
            )


def _identity(version: FileVersion) -> tuple[int, int, int]:
    """Size, time and inode as SQLite can keep them.

    Its integers have a sign; the inodes of overlayfs and some network file systems use all of
    their 64 bits.
    """
    inode = version.inode - (version.inode >> 63 << 64)
    return version.size, version.mtime_ns, inode


def _version(folder: str, path: str, size: int, mtime_ns: int, inode: int) -> FileVersion:
    """What `_identity` made, and SQLite kept, as it was."""
    return FileVersion(
        folder=folder, path=path, size=size, mtime_ns=mtime_ns, inode=inode % (1 << 64)
    )


def _delivery(delivery: Delivery) -> tuple[str | int, ...]:
    """What `_THIS_DELIVERY` asks for."""
    version = delivery.version
    return version.folder, version.path, delivery.peer, *_identity(version)


def _see_file(db: sqlite3.Connection, version: FileVersion) -> str | None:
    """Note that another version lies there now; returns who sent it, if anybody did."""
    key, what = (version.folder, version.path), _identity(version)
    source = db.execute(
        "SELECT origin, digest, source_size, source_mtime_ns, source_path FROM arriving"
        " WHERE folder = ? AND path = ? AND (size, mtime_ns, inode) = (?, ?, ?)",
        (*key, *what),
    ).fetchone()
    if source is None:
        source = (None, None, None, None, None)
    else:
        db.execute("DELETE FROM arriving WHERE folder = ? AND path = ?", key)
    db.execute(
        "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*key, *what, *source),
    )
    origin: str | None = source[0]
    return origin


def _arriving(db: sqlite3.Connection, arrival: Arrival) -> None:
    version = arrival.version
    key, what = (version.folder, version.path), _identity(version)
    source = (
        arrival.peer,
        arrival.digest,
        arrival.source_size,
        arrival.source_mtime_ns,
        arrival.source_path,
    )
    # If this very version lies there already, no look will find another.
    lies_there = db.execute(
        "UPDATE file SET (origin, digest, source_size, source_mtime_ns, source_path)"
        " = (?, ?, ?, ?, ?)"
        " WHERE folder = ? AND path = ? AND (size, mtime_ns, inode) = (?, ?, ?)",
        (*source, *key, *what),
    ).rowcount
    db.execute("DELETE FROM arriving WHERE folder = ? AND path = ?", key)
    if not lies_there:
        last = db.execute(
            "INSERT INTO arriving (folder, path, size, mtime_ns, inode,"
            " origin, digest, source_size, source_mtime_ns, source_path)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, *what, *source),
        ).lastrowid
        assert last is not None
        db.execute("DELETE FROM arriving WHERE id <= ?", (last - _MAX_ARRIVING,))


def _arrivals(
    db: sqlite3.Connection, column: Literal["path", "source_path"], folder: str, path: str
) -> list[Arrival]:
    rows = [
        row
        for table in ("arriving", "file")
        for row in db.execute(
            "SELECT path, size, mtime_ns, inode,"  # noqa: S608 - constants
            " origin, digest, source_size, source_mtime_ns, source_path"
            f" FROM {table} WHERE folder = ? AND {column} = ? AND origin IS NOT NULL"
            " ORDER BY mtime_ns DESC LIMIT ?",
            (folder, path, _MAX_BESIDE),
        )
    ]
    return [
        Arrival(
            version=_version(folder, lies_at, *identity),
            peer=origin,
            digest=digest,
            source_size=source_size,
            source_mtime_ns=source_mtime_ns,
            source_path=source_path,
        )
        for (
            lies_at,
            *identity,
            origin,
            digest,
            source_size,
            source_mtime_ns,
            source_path,
        ) in rows
    ]


def _pending(db: sqlite3.Connection, peer: str, limit: int) -> list[Delivery]:
    rows: list[tuple[float, int, str, str, int, int, int, int]] = []
    for large in (False, True):
        # In the words of the index, or it is not used.
        rows += db.execute(
            "SELECT not_before, id, folder, path, size, mtime_ns, inode, attempts FROM owed"  # noqa: S608 - a constant
            f" WHERE peer = ? AND parked = 0 AND (size > {SMALL}) = ?"
            " ORDER BY not_before, id LIMIT ?",
            (peer, large, limit),
        ).fetchall()
    return [
        Delivery(
            id=id_,
            version=_version(folder, path, size, mtime_ns, inode),
            peer=peer,
            attempts=attempts,
            not_before=not_before,
        )
        for not_before, id_, folder, path, size, mtime_ns, inode, attempts in sorted(rows)
    ]


def _done(
    db: sqlite3.Connection,
    delivery: Delivery,
    outcome: str,
    digest: str,
    at: float,
    in_place: bool,
) -> None:
    version, key = delivery.version, _delivery(delivery)
    db.execute(f"DELETE FROM owed WHERE {_THIS_DELIVERY}", key)  # noqa: S608 - a constant
    db.execute(
        "INSERT INTO done VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        # Not OR REPLACE, which no trigger sees.
        " ON CONFLICT (folder, path, peer) DO UPDATE SET size = excluded.size,"
        " mtime_ns = excluded.mtime_ns, inode = excluded.inode, outcome = excluded.outcome,"
        " digest = excluded.digest, at = excluded.at, in_place = excluded.in_place",
        (*key, outcome, digest, at, in_place),
    )
    # While this one was on its way, the version that the peer had before may have come back:
    # it was not owed then, and is now.
    row = db.execute(
        "SELECT size, mtime_ns, inode FROM file WHERE folder = ? AND path = ?",
        (version.folder, version.path),
    ).fetchone()
    if row is not None:
        _owe(db, [_version(version.folder, version.path, *row)], [delivery.peer])


def _standing(db: sqlite3.Connection, key: tuple[str, str, str]) -> Standing:
    owed = db.execute(
        "SELECT parked, attempts, error, hint FROM owed"
        " WHERE folder = ? AND path = ? AND peer = ?",
        key,
    ).fetchone()
    if owed is not None:
        parked, attempts, error, hint = owed
        state: Literal["pending", "parked"] = "parked" if parked else "pending"
        return Standing(state=state, attempts=attempts, error=error, hint=hint)
    done = db.execute(
        "SELECT outcome FROM done WHERE folder = ? AND path = ? AND peer = ?", key
    ).fetchone()
    return Standing(state="dropped" if done is None else done[0])


def _count(db: sqlite3.Connection) -> Counts:
    """Read what the triggers have counted: a few searches for each peer, after every change."""
    peers: dict[str, PeerCount] = {}
    for peer, pending, size, parked, delivered, sent in db.execute(
        "SELECT peer, pending, pending_bytes, parked, delivered, sent FROM tally"
        " WHERE pending > 0 OR delivered > 0 OR sent > 0"
    ):
        error, hint = _last_error(db, peer) if pending else ("", "")
        peers[peer] = PeerCount(
            pending=pending,
            pending_bytes=size,
            parked=parked,
            delivered=delivered,
            sent=sent,
            next_try=_next_try(db, peer) if pending > parked else None,
            error=error,
            hint=hint,
        )
    folders = db.execute("SELECT folder, pending FROM folder_tally WHERE pending > 0")
    return Counts(peers=peers, pending=dict(folders.fetchall()))


def _last_error(db: sqlite3.Connection, peer: str) -> tuple[str, str]:
    # Parked ones first: those need somebody to read them.
    row: tuple[str, str] | None = db.execute(
        "SELECT error, hint FROM owed WHERE peer = ? AND error <> ''"
        " ORDER BY parked DESC, id DESC LIMIT 1",
        (peer,),
    ).fetchone()
    return row or ("", "")


def _next_try(db: sqlite3.Connection, peer: str) -> float | None:
    first = [
        not_before
        for large in (False, True)
        # In the words of the index, or it is not used.
        for (not_before,) in db.execute(
            "SELECT not_before FROM owed"  # noqa: S608 - a constant
            f" WHERE peer = ? AND parked = 0 AND (size > {SMALL}) = ? AND not_before > 0"
            " ORDER BY not_before LIMIT 1",
            (peer, large),
        )
    ]
    return min(first, default=None)
