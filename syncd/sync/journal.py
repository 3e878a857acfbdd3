"""What must survive a crash: which version of which file is owed to whom, and what is known.

One SQLite database in WAL mode with ``synchronous=FULL``: what a method has returned from is
on disk. It stores "this is owed", "this was delivered" and "this is about to arrive", never
"I am connected" or "this is being sent": those are found out again after a crash, and doing
something twice is harmless because both ends recognise a version. Nothing is deleted from
``owed`` except by a delivery, by a newer version, or because the file is gone.

Of the file system it assumes what SQLite does: a write that was fsynced stays. A lock file
beside it, held for as long as the journal is open, keeps two daemons from sharing it.

More than 400 lines of code, so that all SQL is here and nobody else knows of its tables.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import trio

from syncd.errors import ErrorType, JournalError, LockedError
from syncd.sync.plan import SMALL, Delivery, FileVersion

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
    from pathlib import Path

T = TypeVar("T")

# "sycd", so that file(1) and we know our own.
_APPLICATION_ID = 0x73796364
_SCHEMA_VERSION = 1

_SCHEMA = f"""
CREATE TABLE file (          -- what lies in our folders, as last seen
  folder TEXT NOT NULL, path TEXT NOT NULL,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
  origin TEXT,               -- who sent this very version; NULL: made here
  digest TEXT, source_size INTEGER, source_mtime_ns INTEGER,
  PRIMARY KEY (folder, path)
) WITHOUT ROWID;
-- What is about to lie there. Until it does, which a crash may prevent, the file that it
-- replaces keeps its row above.
CREATE TABLE arriving (
  id INTEGER PRIMARY KEY,
  folder TEXT NOT NULL, path TEXT NOT NULL,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
  origin TEXT NOT NULL,
  digest TEXT NOT NULL, source_size INTEGER NOT NULL, source_mtime_ns INTEGER NOT NULL,
  UNIQUE (folder, path)
);
CREATE TABLE owed (
  id INTEGER PRIMARY KEY,
  folder TEXT NOT NULL, path TEXT NOT NULL, peer TEXT NOT NULL,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0,
  not_before REAL NOT NULL DEFAULT 0,   -- seconds since 1970
  parked INTEGER NOT NULL DEFAULT 0,    -- 1: a person must act
  error TEXT NOT NULL DEFAULT '', hint TEXT NOT NULL DEFAULT '',
  UNIQUE (folder, path, peer)
);
CREATE INDEX owed_next ON owed (peer, parked, size > {SMALL}, not_before, id);
CREATE TABLE done (          -- the last version that each peer has of each file
  folder TEXT NOT NULL, path TEXT NOT NULL, peer TEXT NOT NULL,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
  outcome TEXT NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (folder, path, peer)
) WITHOUT ROWID;
"""

# Files that arrive and are gone before anybody has looked leave a row each; so long after,
# nobody will look.
_MAX_ARRIVING = 10_000  # rows

# The id of a delivery that is gone may be given to another, even to one of the same inode.
_THIS_DELIVERY = (
    "folder = ? AND path = ? AND peer = ? AND size = ? AND mtime_ns = ? AND inode = ?"
)

_DISK_HINT = "is the disk of the state directory full, or read-only?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A file that a peer has sent us.

    Attributes:
      version: What lies, or is about to lie, under its final name.
      peer: Who sent it: a bare JID.
      digest: BLAKE3 of the content, hexadecimal.
      source_size: Size as the sender gave it, bytes.
      source_mtime_ns: Time of the last change as the sender gave it, nanoseconds since 1970.
    """

    version: FileVersion
    peer: str
    digest: str
    source_size: int
    source_mtime_ns: int


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


@contextlib.asynccontextmanager
async def open_journal(state_dir: Path) -> AsyncIterator[Journal]:
    """Open, or make, the journal of a state directory.

    Args:
      state_dir: Made if missing, for us alone.

    Raises:
      LockedError: Another daemon has it open.
      JournalError: It cannot be read, or is of a newer syncd.
    """
    lock = _lock(state_dir)
    try:
        path = state_dir / "journal.db"
        connection = await trio.to_thread.run_sync(_open, path)
        journal = Journal(connection)
        try:
            yield journal
        finally:
            with trio.CancelScope(shield=True):
                await journal.close()
    finally:
        os.close(lock)


def _lock(state_dir: Path) -> int:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalError(
            f"the state directory {state_dir} cannot be used: {error.strerror}",
            hint="set state.dir to a directory that syncd may write to",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        pid = os.pread(lock, 20, 0).decode(errors="replace").strip() or "?"
        os.close(lock)
        raise LockedError(
            f"another syncd (process {pid}) uses the state directory {state_dir}",
            hint="stop it, or give this one its own state.dir",
        ) from error
    except OSError as error:
        os.close(lock)
        raise JournalError(
            f"the state directory {state_dir} cannot be written: {error.strerror}",
            hint=_DISK_HINT,
        ) from error
    return lock


def _open(path: Path) -> sqlite3.Connection:
    hint = f"move {path} away: files are looked at anew, and what peers have is not sent again"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # The limiter of `Journal` lets one thread at a time in, not always the same one.
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise JournalError(
            f"the journal {path} cannot be opened: {reason}", hint=_DISK_HINT
        ) from error
    try:
        _prepare(connection, path, hint)
    except sqlite3.Error as error:
        connection.close()
        if _is_of_the_disk(error):
            raise JournalError(
                f"the journal {path} cannot be written: {error}", hint=_DISK_HINT
            ) from error
        raise JournalError(f"the journal {path} is damaged: {error}", hint=hint) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, hint: str) -> None:
    """Check that the database is a sound journal of ours; fill a new one."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    is_new = version == application == tables == 0
    # Looked at before anything is written: it may be another program's.
    if not is_new and application != _APPLICATION_ID:
        raise JournalError(f"{path} is no journal of syncd", hint=hint)
    if version > _SCHEMA_VERSION:
        raise JournalError(
            f"the journal {path} was written by a newer syncd (schema {version})",
            hint="install that version again, or give this one another state.dir",
        )
    if not is_new and version != _SCHEMA_VERSION:
        raise JournalError(
            f"the journal {path} is damaged: there is no schema {version}", hint=hint
        )
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    if is_new:
        connection.executescript(
            f"BEGIN; {_SCHEMA} PRAGMA application_id={_APPLICATION_ID};"
            f"PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;"
        )
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise JournalError(f"the journal {path} is damaged: {verdict}", hint=hint)


def _is_of_the_disk(error: sqlite3.Error) -> bool:
    """Whether the disk, or who else reads it, refuses us: no word about what is on it."""
    code: int = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one
    return code in {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }


class Journal:
    """The open journal; made by `open_journal`.

    Every method is one transaction, in a thread, durable when it returns. It raises
    `JournalError`, of type WAIT if the disk refuses to be written, which may pass.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._limiter = trio.CapacityLimiter(1)
        self._counts: Counts | None = None

    async def _run(self, work: Callable[[sqlite3.Connection], T], *, changes: bool = True) -> T:
        def transaction() -> T:
            try:
                with self._connection:
                    self._connection.execute("BEGIN IMMEDIATE" if changes else "BEGIN")
                    return work(self._connection)
            except sqlite3.Error as error:
                # A full disk has room again one day; what else there is, is damage.
                raise JournalError(
                    f"the journal cannot be written: {error}",
                    hint=_DISK_HINT,
                    type=ErrorType.WAIT if _is_of_the_disk(error) else ErrorType.CANCEL,
                ) from error

        if changes:
            self._counts = None
        try:
            return await trio.to_thread.run_sync(transaction, limiter=self._limiter)
        finally:
            if changes:
                self._counts = None

    async def close(self) -> None:
        """Close the database; the last thing that happens to it."""
        await trio.to_thread.run_sync(self._connection.close, limiter=self._limiter)

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
        return await self._run(
            lambda db: [d for peer in peers for d in _pending(db, peer, limit)],
            changes=False,
        )

    async def done(
        self, delivery: Delivery, outcome: Literal["delivered", "sent"], digest: str
    ) -> None:
        """The peer has this version; a newer one may be owed meanwhile, and stays so."""
        await self._run(lambda db: _done(db, delivery, outcome, digest, time.time()))

    async def failed(
        self, delivery: Delivery, error: str, hint: str, not_before: float | None
    ) -> None:
        """An attempt failed.

        Args:
          delivery: Which.
          error: A sentence.
          hint: What to do about it, or empty.
          not_before: When to try again, seconds since 1970; None: not until the file changes
            or somebody asks.
        """

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE owed SET attempts = attempts + 1, not_before = ?, parked = ?,"  # noqa: S608 - a constant
                f" error = ?, hint = ? WHERE {_THIS_DELIVERY}",
                (not_before or 0, not_before is None, error, hint, *_delivery(delivery)),
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

        return await self._run(work, changes=False)

    async def retry(self, peer: str) -> None:
        """Try everything that failed with this peer as soon as possible; not what is parked."""
        await self._run(
            lambda db: db.execute(
                "UPDATE owed SET not_before = 0"
                " WHERE peer = ? AND parked = 0 AND not_before > 0",
                (peer,),
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
        return await self._run(lambda db: _arrivals(db, folder, path), changes=False)

    async def counts(self) -> Counts:
        """Count everything for the status; remembered until something changes."""
        if self._counts is None:
            counts = await self._run(_count, changes=False)
            self._counts = counts
            return counts
        return self._counts


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
        "SELECT origin, digest, source_size, source_mtime_ns FROM arriving"
        " WHERE folder = ? AND path = ? AND (size, mtime_ns, inode) = (?, ?, ?)",
        (*key, *what),
    ).fetchone()
    if source is None:
        source = (None, None, None, None)
    else:
        db.execute("DELETE FROM arriving WHERE folder = ? AND path = ?", key)
    db.execute(
        "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*key, *what, *source)
    )
    origin: str | None = source[0]
    return origin


def _arriving(db: sqlite3.Connection, arrival: Arrival) -> None:
    version = arrival.version
    key, what = (version.folder, version.path), _identity(version)
    source = (arrival.peer, arrival.digest, arrival.source_size, arrival.source_mtime_ns)
    # If this very version lies there already, no look will find another.
    lies_there = db.execute(
        "UPDATE file SET (origin, digest, source_size, source_mtime_ns) = (?, ?, ?, ?)"
        " WHERE folder = ? AND path = ? AND (size, mtime_ns, inode) = (?, ?, ?)",
        (*source, *key, *what),
    ).rowcount
    db.execute("DELETE FROM arriving WHERE folder = ? AND path = ?", key)
    if not lies_there:
        last = db.execute(
            "INSERT INTO arriving (folder, path, size, mtime_ns, inode,"
            " origin, digest, source_size, source_mtime_ns)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, *what, *source),
        ).lastrowid
        assert last is not None
        db.execute("DELETE FROM arriving WHERE id <= ?", (last - _MAX_ARRIVING,))


def _arrivals(db: sqlite3.Connection, folder: str, path: str) -> list[Arrival]:
    rows = [
        row
        for table in ("arriving", "file")
        for row in db.execute(
            "SELECT size, mtime_ns, inode, origin, digest, source_size, source_mtime_ns"  # noqa: S608 - constants
            f" FROM {table} WHERE folder = ? AND path = ? AND origin IS NOT NULL",
            (folder, path),
        )
    ]
    return [
        Arrival(
            version=_version(folder, path, *identity),
            peer=origin,
            digest=digest,
            source_size=source_size,
            source_mtime_ns=source_mtime_ns,
        )
        for *identity, origin, digest, source_size, source_mtime_ns in rows
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
    db: sqlite3.Connection, delivery: Delivery, outcome: str, digest: str, at: float
) -> None:
    version, key = delivery.version, _delivery(delivery)
    db.execute(f"DELETE FROM owed WHERE {_THIS_DELIVERY}", key)  # noqa: S608 - a constant
    db.execute(
        "INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*key, outcome, digest, at),
    )
    # While this one was on its way, the version that the peer had before may have come back:
    # it was not owed then, and is now.
    row = db.execute(
        "SELECT size, mtime_ns, inode FROM file WHERE folder = ? AND path = ?",
        (version.folder, version.path),
    ).fetchone()
    if row is not None:
        _owe(db, [_version(version.folder, version.path, *row)], [delivery.peer])


def _count(db: sqlite3.Connection) -> Counts:
    peers: dict[str, dict[str, int | float | str | None]] = {}
    for peer, pending, size, parked, next_try in db.execute(
        "SELECT peer, count(*), sum(size), sum(parked),"
        " min(CASE WHEN not_before > 0 AND parked = 0 THEN not_before END)"
        " FROM owed GROUP BY peer"
    ):
        peers[peer] = {
            "pending": pending, "pending_bytes": size, "parked": parked, "next_try": next_try,
        }  # fmt: skip
    # Parked ones first: those need somebody to read them.
    for peer, error, hint in db.execute(
        "SELECT peer, error, hint FROM owed WHERE error <> '' ORDER BY parked, id"
    ):
        peers[peer] |= {"error": error, "hint": hint}
    for peer, outcome, number in db.execute(
        "SELECT peer, outcome, count(*) FROM done GROUP BY peer, outcome"
    ):
        peers.setdefault(peer, {})[outcome] = number
    pending = dict(
        db.execute("SELECT folder, count(DISTINCT path) FROM owed GROUP BY folder").fetchall()
    )
    return Counts(
        peers={peer: PeerCount(**values) for peer, values in peers.items()},  # type: ignore[arg-type]  # the columns above
        pending=pending,
    )
