"""What is opened is a sound journal of ours, whatever lay there; else somebody is told why."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
from typing import TYPE_CHECKING

import pytest

from syncd.errors import ErrorType, JournalError, LockedError
from syncd.sync import database as database_module
from syncd.sync.database import SCHEMA_VERSION, open_database
from syncd.sync.journal import Counts, Journal, PeerCount, open_journal
from syncd.sync.plan import Delivery, FileVersion

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

NOW = 1_000_000.0  # seconds since 1970
BOB, CAROL = "bob@example.org", "carol@example.org"
DIGEST = "d1" * 32

VERSION = FileVersion(folder="photos", path="a/1.raw", size=10, mtime_ns=111, inode=7)


def named(path: str) -> FileVersion:
    return FileVersion(folder="photos", path=path, size=10, mtime_ns=111, inode=7)


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with open_journal(tmp_path / "state") as journal:
        yield journal


async def owed(journal: Journal, *peers: str) -> list[Delivery]:
    return await journal.pending(peers or (BOB,), 100)


async def only(journal: Journal, peer: str = BOB) -> Delivery:
    [delivery] = await owed(journal, peer)
    return delivery


# --- Ours alone


async def test_what_is_written_is_synced(journal: Journal) -> None:
    """A power cut cannot be had here, so what SQLite promises has to do."""
    pragmas = [
        journal._database.connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous")
    ]
    assert pragmas == ["wal", 2]  # 2 is FULL


async def test_only_we_may_read_it(tmp_path: Path) -> None:
    state = tmp_path / "below" / "state"
    async with open_journal(state) as journal:
        await journal.owe([VERSION], [BOB])
        modes = {each.name: each.stat().st_mode & 0o777 for each in state.iterdir()}
    assert state.stat().st_mode & 0o777 == 0o700
    assert set(modes) >= {"journal.db", "journal.db-wal", "lock"}
    assert set(modes.values()) == {0o600}


async def test_two_daemons_cannot_share_it(tmp_path: Path) -> None:
    async with open_journal(tmp_path):
        with pytest.raises(LockedError) as caught:
            async with open_journal(tmp_path):
                pass
    assert str(caught.value) == (
        f"another syncd (process {os.getpid()}) uses the state directory {tmp_path}"
    )
    assert caught.value.hint == "stop it, or give this one its own state.dir"
    async with open_journal(tmp_path) as journal:
        assert await owed(journal) == []


# --- An older schema


# As syncd 0.1 made it.
SCHEMA_1 = """
CREATE TABLE file (folder TEXT NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, origin TEXT, digest TEXT,
  source_size INTEGER, source_mtime_ns INTEGER, PRIMARY KEY (folder, path)) WITHOUT ROWID;
CREATE TABLE arriving (id INTEGER PRIMARY KEY, folder TEXT NOT NULL, path TEXT NOT NULL,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
  origin TEXT NOT NULL, digest TEXT NOT NULL, source_size INTEGER NOT NULL,
  source_mtime_ns INTEGER NOT NULL, UNIQUE (folder, path));
CREATE TABLE owed (id INTEGER PRIMARY KEY, folder TEXT NOT NULL, path TEXT NOT NULL,
  peer TEXT NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
  inode INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  not_before REAL NOT NULL DEFAULT 0, parked INTEGER NOT NULL DEFAULT 0,
  error TEXT NOT NULL DEFAULT '', hint TEXT NOT NULL DEFAULT '',
  UNIQUE (folder, path, peer));
CREATE INDEX owed_next ON owed (peer, parked, size > 4194304, not_before, id);
CREATE TABLE done (folder TEXT NOT NULL, path TEXT NOT NULL, peer TEXT NOT NULL,
  size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
  outcome TEXT NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (folder, path, peer)) WITHOUT ROWID;
PRAGMA application_id = 0x73796364;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
INSERT INTO file VALUES ('photos', 'a', 10, 111, 7, 'bob@example.org', 'd1', 10, 9);
INSERT INTO arriving VALUES (3, 'photos', 'b', 11, 111, 8, 'bob@example.org', 'd2', 11, 9);
INSERT INTO owed VALUES (5, 'photos', 'a', 'carol@example.org', 10, 111, 7, 0, 0, 0, '', '');
INSERT INTO owed VALUES (6, 'photos', 'c', 'carol@example.org', 30, 111, 9, 2, 0, 1,
  'declined', 'ask carol');
INSERT INTO owed VALUES (7, 'photos', 'c', 'bob@example.org', 30, 111, 9, 1, 1000005.0, 0,
  'offline', '');
INSERT INTO done VALUES ('photos', 'd', 'carol@example.org', 1, 1, 1, 'delivered', 'd3', 5.0);
INSERT INTO done VALUES ('photos', 'e', 'dave@example.org', 1, 1, 1, 'sent', 'd4', 5.0);
"""


def write_old(state: Path) -> Path:
    """The journal of an older syncd."""
    state.mkdir()
    with contextlib.closing(sqlite3.connect(state / "journal.db")) as database:
        database.executescript(SCHEMA_1)
    return state


def shape(file: Path) -> set[tuple[str, ...]]:
    """Tables, indices and triggers, without spaces and comments."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        names = database.execute("SELECT type, name FROM sqlite_master").fetchall()
        columns = database.execute(
            'SELECT m.name, c.name, c.type, c.pk, c."notnull" FROM sqlite_master AS m,'
            " pragma_table_info(m.name) AS c WHERE m.type = 'table'"
        ).fetchall()
    return {tuple(map(str, row)) for row in (*names, *columns)}


async def test_a_journal_of_an_older_syncd_is_brought_up_to_date(tmp_path: Path) -> None:
    """With all that is in it, and counted."""
    async with open_journal(write_old(tmp_path / "old")) as journal:
        assert journal.counts() == Counts(
            peers={
                BOB: PeerCount(pending=1, pending_bytes=30, next_try=NOW + 5, error="offline"),
                CAROL: PeerCount(
                    pending=2,
                    pending_bytes=40,
                    parked=1,
                    delivered=1,
                    error="declined",
                    hint="ask carol",
                ),
                "dave@example.org": PeerCount(sent=1),
            },
            pending={"photos": 2},
        )
        delivery = await only(journal, CAROL)
        assert (delivery.id, delivery.version.path) == (5, "a")
        assert [each.peer for each in await journal.arrivals("photos", "b")] == [BOB]
        await journal.done(delivery, "delivered", DIGEST)
        assert journal.counts().peers[CAROL].delivered == 2
        assert await journal.pins.pins() == []


async def test_an_older_journal_comes_to_the_same_schema_as_a_new_one(tmp_path: Path) -> None:
    for state in (write_old(tmp_path / "old"), tmp_path / "new"):
        async with open_journal(state):
            pass
    new = tmp_path / "new" / "journal.db"
    assert shape(tmp_path / "old" / "journal.db") == shape(new)
    with contextlib.closing(sqlite3.connect(new)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


async def test_a_step_that_fails_leaves_the_older_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash in its middle: the next start does it again."""
    state = write_old(tmp_path / "old")
    before = shape(state / "journal.db")
    steps = database_module._STEPS
    with monkeypatch.context() as patched:
        patched.setattr(
            database_module, "_STEPS", (steps[0], f"{steps[1]} INSERT INTO nowhere VALUES (1);")
        )
        with pytest.raises(JournalError, match="no such table: nowhere"):
            async with open_journal(state):
                pass
    assert shape(state / "journal.db") == before
    async with open_journal(state) as journal:
        assert journal.counts().pending == {"photos": 2}


# --- What cannot be used


async def refusal(state: Path) -> JournalError:
    """Why a journal cannot be opened."""
    with pytest.raises(JournalError) as caught:
        async with open_journal(state):
            pass
    return caught.value


async def filled(state: Path) -> Path:
    """A journal with something in every table, of several pages, and closed."""
    async with open_journal(state) as journal:
        await journal.owe([named(f"{number:0200}") for number in range(200)], [BOB])
        for delivery in (await owed(journal))[:50]:
            await journal.done(delivery, "delivered", DIGEST)
    return state / "journal.db"


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = await filled(tmp_path)
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA user_version = 99")
    before = file.read_bytes()
    error = await refusal(tmp_path)
    assert str(error) == f"the journal {file} was written by a newer syncd (schema 99)"
    assert error.hint == "install that version again, or give this one another state.dir"
    assert file.read_bytes() == before


@pytest.mark.parametrize("application", [0, 1234])
async def test_a_database_of_another_program_is_refused_and_left_alone(
    tmp_path: Path, application: int
) -> None:
    file = tmp_path / "journal.db"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.executescript(
            f"PRAGMA application_id = {application}; CREATE TABLE theirs (x)"
        )
    before = file.read_bytes()
    error = await refusal(tmp_path)
    assert str(error) == f"{file} is no journal of syncd"
    assert error.hint.startswith(f"move {file} away")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"??", b"no database" * 500, b"SQLite format 3\0" + 4080 * b"\xff"]
)
async def test_what_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "journal.db"
    file.write_bytes(content)
    error = await refusal(tmp_path)
    assert str(error).startswith(f"the journal {file} is damaged: ")
    assert error.hint.startswith(f"move {file} away")
    assert file.read_bytes() == content


async def test_no_damage_to_the_header_ends_in_a_traceback(tmp_path: Path) -> None:
    """Each byte of the first 100: it opens and works, or says what to do."""
    sound = (await filled(tmp_path / "sound")).read_bytes()
    refused, hints = set(), set()
    for position in range(100):
        state = tmp_path / str(position)
        state.mkdir()
        broken = bytearray(sound)
        broken[position] ^= 0xFF
        (state / "journal.db").write_bytes(broken)
        try:
            async with open_journal(state) as journal:
                assert len(await journal.pending([BOB], 1000)) == 150
                await journal.owe([VERSION], [BOB])
        except JournalError as error:
            refused.add(position)
            hints.add(error.hint)
    magic, page_size, user_version, application = (
        range(16), range(16, 18), range(60, 64), range(68, 72),
    )  # fmt: skip
    assert "" not in hints
    assert refused >= {*magic, *page_size, *user_version, *application}


async def test_a_journal_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    file = await filled(tmp_path)
    whole = file.read_bytes()
    for size in (50, 100, 4096, len(whole) // 2, len(whole) - 4096):
        file.write_bytes(whole[:size])
        error = await refusal(tmp_path)
        assert str(error).startswith(f"the journal {file} is damaged: ")
        assert error.hint.startswith(f"move {file} away")


async def test_a_journal_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    """As the hint says."""
    file = await filled(tmp_path)
    file.write_bytes(b"damaged" * 1000)
    await refusal(tmp_path)
    file.rename(tmp_path / "away")
    async with open_journal(tmp_path) as journal:
        assert await owed(journal) == []


async def test_damage_that_shows_later_is_an_error_of_the_journal(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as database:
            database.execute("DROP TABLE owed")
        with pytest.raises(JournalError, match="no such table: owed") as caught:
            await journal.owe([VERSION], [BOB])
        assert caught.value.type is ErrorType.CANCEL
        # Nothing of it was kept.
        assert await journal.arrivals("photos", VERSION.path) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
async def test_a_state_directory_that_cannot_be_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    error = await refusal(tmp_path / place)
    assert str(error).startswith(f"the state directory {tmp_path / place} cannot be used: ")
    assert error.hint == "set state.dir to a directory that syncd may write to"


async def test_a_journal_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.db").mkdir()
    error = await refusal(tmp_path)
    assert str(error) == (
        f"the journal {tmp_path / 'journal.db'} cannot be opened: Is a directory"
    )
    assert error.hint != ""


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for little."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=32", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk to fill it, and not in every container")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Leave so many bytes on a disk."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


@pytest.mark.parametrize("leave", [0, 4096, 8192, 16384])
async def test_a_full_disk_is_told_as_such(tiny_disk: Path, leave: int) -> None:
    """At whichever step of the opening it fills up; and it works once there is room."""
    ballast = fill(tiny_disk, leave=leave)
    error = await refusal(tiny_disk)
    assert "damaged" not in str(error)
    assert error.hint == "is the disk of the state directory full, or read-only?"
    # Worth waiting for.
    assert error.type is ErrorType.WAIT
    ballast.unlink()
    resize(tiny_disk, "4m")
    async with open_journal(tiny_disk) as journal:
        await journal.owe([VERSION], [BOB])
        assert (await only(journal)).version == VERSION


async def test_a_disk_that_fills_up_later_loses_nothing_that_was_written(
    tiny_disk: Path,
) -> None:
    resize(tiny_disk, "1m")
    async with open_journal(tiny_disk) as journal:
        await journal.owe([VERSION], [BOB])
        ballast = fill(tiny_disk)
        many = [named(f"{number:01000}") for number in range(100)]
        with pytest.raises(JournalError) as caught:
            await journal.owe(many, [CAROL])
        assert caught.value.hint == "is the disk of the state directory full, or read-only?"
        assert caught.value.type is ErrorType.WAIT
        assert (await only(journal)).version == VERSION
        assert await owed(journal, CAROL) == []
        ballast.unlink()
        await journal.owe([named("b")], [BOB])
        assert len(await owed(journal)) == 2


async def test_a_disk_that_refuses_may_take_it_later(journal: Journal) -> None:
    """The type of the error says that it is worth another try."""
    journal._database.connection.execute("PRAGMA query_only = 1")
    with pytest.raises(JournalError) as caught:
        await journal.owe([VERSION], [BOB])
    assert caught.value.type is ErrorType.WAIT
    assert await owed(journal) == []
    journal._database.connection.execute("PRAGMA query_only = 0")
    await journal.owe([VERSION], [BOB])
    assert (await only(journal)).version == VERSION


async def test_how_long_the_disk_has_been_at_work_is_known(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database:
        assert await database.run(lambda: database.busy_since) is not None
        assert database.busy_since is None
