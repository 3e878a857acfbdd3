"""The journal's database: opened, locked, brought to our schema, and used one at a time.

One SQLite database in WAL mode with ``synchronous=FULL``: what a transaction has returned from
is on disk. Of the file system it assumes what SQLite does: a write that was fsynced stays. A
lock file beside it, held for as long as it is open, keeps two daemons from sharing it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import time
from typing import TYPE_CHECKING, TypeVar

import trio

from syncd.errors import ErrorType, JournalError, LockedError
from syncd.sync.plan import SMALL

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

T = TypeVar("T")

# "sycd", so that file(1) and we know our own.
_APPLICATION_ID = 0x73796364

_FIRST = f"""
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

# The status counts after every change, so what it counts is kept, by triggers: no statement
# can forget it. They do not fire for the rows that INSERT OR REPLACE replaces; there is none.
_TALLIES = """
CREATE TABLE tally (         -- the deliveries to each peer
  peer TEXT PRIMARY KEY,
  pending INTEGER NOT NULL DEFAULT 0, pending_bytes INTEGER NOT NULL DEFAULT 0,
  parked INTEGER NOT NULL DEFAULT 0,
  delivered INTEGER NOT NULL DEFAULT 0, sent INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE folder_tally (  -- the files of each folder that somebody waits for
  folder TEXT PRIMARY KEY,
  pending INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX owed_error ON owed (peer, parked, id) WHERE error <> '';

CREATE TRIGGER owed_inserted AFTER INSERT ON owed BEGIN
  INSERT INTO tally (peer) SELECT new.peer
    WHERE NOT EXISTS (SELECT 1 FROM tally WHERE peer = new.peer);
  UPDATE tally SET pending = pending + 1, pending_bytes = pending_bytes + new.size,
    parked = parked + new.parked WHERE peer = new.peer;
END;
CREATE TRIGGER owed_updated AFTER UPDATE OF size, parked ON owed BEGIN
  UPDATE tally SET pending_bytes = pending_bytes + new.size - old.size,
    parked = parked + new.parked - old.parked WHERE peer = new.peer;
END;
CREATE TRIGGER owed_deleted AFTER DELETE ON owed BEGIN
  UPDATE tally SET pending = pending - 1, pending_bytes = pending_bytes - old.size,
    parked = parked - old.parked WHERE peer = old.peer;
END;
CREATE TRIGGER owed_first AFTER INSERT ON owed
WHEN (SELECT count(*) FROM owed WHERE folder = new.folder AND path = new.path) = 1 BEGIN
  INSERT INTO folder_tally (folder) SELECT new.folder
    WHERE NOT EXISTS (SELECT 1 FROM folder_tally WHERE folder = new.folder);
  UPDATE folder_tally SET pending = pending + 1 WHERE folder = new.folder;
END;
CREATE TRIGGER owed_last AFTER DELETE ON owed
WHEN NOT EXISTS (SELECT 1 FROM owed WHERE folder = old.folder AND path = old.path) BEGIN
  UPDATE folder_tally SET pending = pending - 1 WHERE folder = old.folder;
END;
CREATE TRIGGER done_inserted AFTER INSERT ON done BEGIN
  INSERT INTO tally (peer) SELECT new.peer
    WHERE NOT EXISTS (SELECT 1 FROM tally WHERE peer = new.peer);
  UPDATE tally SET delivered = delivered + (new.outcome = 'delivered'),
    sent = sent + (new.outcome = 'sent') WHERE peer = new.peer;
END;
CREATE TRIGGER done_updated AFTER UPDATE OF outcome ON done BEGIN
  UPDATE tally SET
    delivered = delivered + (new.outcome = 'delivered') - (old.outcome = 'delivered'),
    sent = sent + (new.outcome = 'sent') - (old.outcome = 'sent') WHERE peer = new.peer;
END;
CREATE TRIGGER done_deleted AFTER DELETE ON done BEGIN
  UPDATE tally SET delivered = delivered - (old.outcome = 'delivered'),
    sent = sent - (old.outcome = 'sent') WHERE peer = old.peer;
END;

INSERT INTO tally (peer, pending, pending_bytes, parked)
  SELECT peer, count(*), sum(size), sum(parked) FROM owed GROUP BY peer;
INSERT INTO tally (peer)
  SELECT DISTINCT peer FROM done WHERE peer NOT IN (SELECT peer FROM tally);
UPDATE tally SET
  delivered = (SELECT count(*) FROM done WHERE peer = tally.peer AND outcome = 'delivered'),
  sent = (SELECT count(*) FROM done WHERE peer = tally.peer AND outcome = 'sent');
INSERT INTO folder_tally
  SELECT folder, count(DISTINCT path) FROM owed GROUP BY folder;
"""

_SECOND = f"""
{_TALLIES}
CREATE TABLE pin (           -- the key that each peer has shown
  peer TEXT PRIMARY KEY,     -- a bare JID
  public_key BLOB,           -- NULL: blocked before it showed one
  state TEXT NOT NULL CHECK (state IN ('unverified', 'verified', 'blocked')),
  first_seen REAL NOT NULL, last_seen REAL NOT NULL,  -- seconds since 1970
  verified_at REAL           -- likewise
) WITHOUT ROWID;
"""

_THIRD = """
-- Where the sender wanted it, if something else stood there and this was kept beside it.
ALTER TABLE file ADD COLUMN source_path TEXT;
ALTER TABLE arriving ADD COLUMN source_path TEXT;
CREATE INDEX file_beside ON file (folder, source_path) WHERE source_path IS NOT NULL;
CREATE INDEX arriving_beside ON arriving (folder, source_path) WHERE source_path IS NOT NULL;
-- 1: the peer has it under this very path; 0: beside another file there, or it never said.
ALTER TABLE done ADD COLUMN in_place INTEGER NOT NULL DEFAULT 0;
"""

# Each brings a database to the next version, and a new one goes through all of them.
_STEPS = (_FIRST, _SECOND, _THIRD)
SCHEMA_VERSION = len(_STEPS)

_DISK_HINT = "is the disk of the state directory full, or read-only?"

# What a disk says that another day may take it; anything else needs a person.
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE})


@contextlib.asynccontextmanager
async def open_database(state_dir: Path) -> AsyncIterator[Database]:
    """Open, or make, the database of a state directory.

    Args:
      state_dir: Made if missing, for us alone.

    Raises:
      LockedError: Another daemon has it open.
      JournalError: It cannot be read, or is of a newer syncd; of type WAIT if the disk is
        full, which may pass.
    """
    lock = await trio.to_thread.run_sync(_lock, state_dir)
    try:
        database = Database(await trio.to_thread.run_sync(_open, state_dir / "journal.db"))
        try:
            yield database
        finally:
            with trio.CancelScope(shield=True):
                await database.run(database.connection.close)
    finally:
        os.close(lock)


class Database:
    """An open database, for one thread at a time; made by `open_database`.

    Attributes:
      connection: Only for what runs in `run`.
      busy_since: Since when the running job runs, in seconds of `time.monotonic`; None while
        there is none. A disk that hangs shows here first.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.busy_since: float | None = None
        self._limiter = trio.CapacityLimiter(1)

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job in a thread, when those before it have ended; never abandoned."""

        def timed() -> T:
            self.busy_since = time.monotonic()
            try:
                return job()
            finally:
                self.busy_since = None

        return await trio.to_thread.run_sync(timed, limiter=self._limiter)

    def transact(self, work: Callable[[sqlite3.Connection], T], *, changes: bool = True) -> T:
        """Do work in one transaction, on disk when this returns; blocks.

        Raises:
          JournalError: Of type WAIT if the disk refuses to be written, which may pass; what
            else there is, is damage.
        """
        try:
            with self.connection:
                self.connection.execute("BEGIN IMMEDIATE" if changes else "BEGIN")
                return work(self.connection)
        except sqlite3.Error as error:
            raise JournalError(
                f"the journal cannot be written: {error}",
                hint=_DISK_HINT,
                type=ErrorType.WAIT if _is_of_the_disk(error) else ErrorType.CANCEL,
            ) from error


def _lock(state_dir: Path) -> int:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        passing = error.errno in _PASSING
        raise JournalError(
            f"the state directory {state_dir} cannot be used: {error.strerror}",
            hint=_DISK_HINT
            if passing
            else "set state.dir to a directory that syncd may write to",
            type=_type(error),
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
            type=_type(error),
        ) from error
    return lock


def _type(error: OSError) -> ErrorType:
    return ErrorType.WAIT if error.errno in _PASSING else ErrorType.CANCEL


def _open(path: Path) -> sqlite3.Connection:
    hint = f"move {path} away: files are looked at anew, and what peers have is not sent again"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # `Database.run` lets one thread at a time in, not always the same one.
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    except OSError as error:
        raise JournalError(
            f"the journal {path} cannot be opened: {error.strerror}",
            hint=_DISK_HINT,
            type=_type(error),
        ) from error
    except sqlite3.Error as error:
        raise JournalError(
            f"the journal {path} cannot be opened: {error}",
            hint=_DISK_HINT,
            type=ErrorType.WAIT if _is_of_the_disk(error) else ErrorType.CANCEL,
        ) from error
    try:
        _prepare(connection, path, hint)
    except sqlite3.Error as error:
        connection.close()
        if _is_of_the_disk(error):
            raise JournalError(
                f"the journal {path} cannot be written: {error}",
                hint=_DISK_HINT,
                type=ErrorType.WAIT,
            ) from error
        raise JournalError(f"the journal {path} is damaged: {error}", hint=hint) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, hint: str) -> None:
    """Check that the database is a sound journal of ours; bring it to our schema."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    is_new = version == application == tables == 0
    # Looked at before anything is written: it may be another program's.
    if not is_new and application != _APPLICATION_ID:
        raise JournalError(f"{path} is no journal of syncd", hint=hint)
    if version > SCHEMA_VERSION:
        raise JournalError(
            f"the journal {path} was written by a newer syncd (schema {version})",
            hint="install that version again, or give this one another state.dir",
        )
    if not is_new and version < 1:
        raise JournalError(
            f"the journal {path} is damaged: there is no schema {version}", hint=hint
        )
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    # Before it is changed: what is damaged shall stay as it is, for whoever repairs it.
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise JournalError(f"the journal {path} is damaged: {verdict}", hint=hint)
    for number, step in enumerate(_STEPS[version:], version + 1):
        connection.executescript(
            f"BEGIN IMMEDIATE; {step} PRAGMA application_id={_APPLICATION_ID};"
            f"PRAGMA user_version={number}; COMMIT;"
        )


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
