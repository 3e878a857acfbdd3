from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from syncd.disk.beneath import open_directory
from syncd.errors import NotFoundError, SyncdError
from syncd.sync import walk as walk_module
from syncd.sync.settle import Look
from syncd.sync.walk import (
    BATCH,
    MAX_PROBLEMS,
    count_files,
    is_ignored,
    look_at,
    look_outside,
    missing,
    walk,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# Beyond the year 2262, which is further than 63 bits of nanoseconds reach.
FAR = 9_300_000_000  # seconds since 1970
# And the other way, before 1678.
EARLY = -(10**19)  # nanoseconds since 1970


def walked(root: Path, skipped: list[tuple[str, str]] | None = None) -> dict[str, Look]:
    found: dict[str, Look] = {}
    for batch in walk(root, [] if skipped is None else skipped):
        assert 0 < len(batch) <= BATCH
        found.update(batch)
    return found


def put(file: Path, content: bytes = b"x") -> Path:
    """Make a file whose times show that it was not written since it got its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    os.utime(file, ns=(0, 10**18))
    return file


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shut() -> Iterator[Path]:
    """A folder that anybody can read, in it a file and a directory that nobody can."""
    root = Path(tempfile.mkdtemp(prefix="sd"))
    root.chmod(0o755)
    put(root / "open").chmod(0o644)
    put(root / "shut" / "file")
    (root / "shut").chmod(0)
    yield root
    (root / "shut").chmod(0o700)
    shutil.rmtree(root)


@pytest.mark.parametrize(
    "path",
    [
        ".syncd", ".syncd/x", ".syncd/x/y", "a~", "b/a~", "file.part", "x.crdownload", ".a.swp",
        ".a.swx", ".~lock.a.odt#", ".goutputstream-1A2B", ".nfs000123", "~$a.docx", ".#a",
        "#a#", "a.tmp", "x.partial", "film.part/1.raw", ".~tmp~/a",
    ],
)  # fmt: skip
def test_nobodys_files_are_ignored(path: str) -> None:
    assert is_ignored(path)


@pytest.mark.parametrize(
    "path",
    [
        "a", "a/b", ".hidden", "a/.syncd", "syncd", ".syncd2", "part", "a.parts", "tmp", "a~b",
        "4913", "A.TMP", ".", "new\nline", "\udce9",
    ],
)  # fmt: skip
def test_everything_else_is_not(path: str) -> None:
    assert not is_ignored(path)


def test_a_walk_finds_every_file_as_it_is(tmp_path: Path) -> None:
    files = [put(tmp_path / path, path.encode()) for path in ("a", "b/c", "b/d/e", "b/d/.f")]
    (tmp_path / "empty").mkdir()
    expected = {str(file.relative_to(tmp_path)): Look.of(file.stat()) for file in files}
    assert walked(tmp_path) == expected
    assert count_files(tmp_path) == 4


def test_a_walk_passes_by_all_that_is_no_file(tmp_path: Path) -> None:
    """It follows no link, and blocks on nothing."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    put(elsewhere / "secret")
    put(root / "a")
    (root / "link").symlink_to(elsewhere / "secret")
    (root / "directory").symlink_to(elsewhere)
    (root / "dangling").symlink_to(elsewhere / "nothing")
    (root / "round").symlink_to(root)
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        skipped: list[tuple[str, str]] = []
        assert set(walked(root, skipped)) == {"a"}
    assert skipped == []


def test_a_walk_passes_by_nobodys_files(tmp_path: Path) -> None:
    for path in ("a", ".syncd/partial", "b/c~", "d.tmp/e", "f/g"):
        put(tmp_path / path)
    assert set(walked(tmp_path)) == {"a", "f/g"}


def test_a_walk_comes_in_batches(tmp_path: Path) -> None:
    for number in range(2 * BATCH + 1):
        (tmp_path / f"{number}").touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "last").touch()
    assert len(walked(tmp_path)) == count_files(tmp_path) == 2 * BATCH + 2


def test_what_cannot_be_sent_is_noted_and_the_rest_is_found(tmp_path: Path) -> None:
    put(tmp_path / "good")
    put(tmp_path / os.fsdecode(b"caf\xe9"))
    put(tmp_path / os.fsdecode(b"d\xff") / "below")
    os.utime(put(tmp_path / "far"), (FAR, FAR))
    if (tmp_path / "far").stat().st_mtime != FAR:
        pytest.skip(f"the file system of {tmp_path} knows no such times")
    skipped: list[tuple[str, str]] = []
    assert set(walked(tmp_path, skipped)) == {"good"}
    assert sorted(skipped) == [
        ("caf\udce9", "the name is no valid UTF-8"),
        ("d\udcff", "the name is no valid UTF-8"),
        ("far", "its time is not between 1678 and 2262"),
    ]


def test_a_time_before_all_that_can_be_told_is_noted(tmp_path: Path) -> None:
    file = put(tmp_path / "early")
    os.utime(file, ns=(EARLY, EARLY))
    if file.stat().st_mtime_ns != EARLY:
        pytest.skip(f"the file system of {tmp_path} knows no such times")
    skipped: list[tuple[str, str]] = []
    assert walked(tmp_path, skipped) == {}
    assert skipped == [("early", "its time is not between 1678 and 2262")]
    assert look_at(tmp_path, {"early": False}, []) == {"early": (None, False)}


def test_a_walk_of_a_tree_tells_only_what_lies_below_it(tmp_path: Path) -> None:
    for path in ("a", "d/b", "d/e/c", "d-not/f"):
        put(tmp_path / path)
    [batch] = walk(tmp_path, [], "d")
    assert {path for path, _ in batch} == {"d/b", "d/e/c"}
    # It may have turned into a file meanwhile, or be gone.
    assert list(walk(tmp_path, [], "a")) == list(walk(tmp_path, [], "gone")) == []


def test_of_what_cannot_be_sent_only_some_is_noted(tmp_path: Path) -> None:
    for number in range(MAX_PROBLEMS + 5):
        put(tmp_path / os.fsdecode(b"\xff%d" % number))
    skipped: list[tuple[str, str]] = []
    assert walked(tmp_path, skipped) == {}
    assert len(skipped) == MAX_PROBLEMS


def test_a_directory_that_may_not_be_read_is_noted(shut: Path) -> None:
    skipped: list[tuple[str, str]] = []
    with as_nobody():
        assert set(walked(shut, skipped)) == {"open"}
    assert skipped == [("shut", "Permission denied")]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, shut: Path) -> None:
    with pytest.raises(FileNotFoundError):
        walked(tmp_path / "nothing")
    with pytest.raises(NotADirectoryError):
        walked(put(tmp_path / "file"))
    with as_nobody(), pytest.raises(PermissionError):
        count_files(shut / "shut")


def test_what_goes_away_during_a_walk_is_passed_by(tmp_path: Path) -> None:
    put(tmp_path / "directory" / "a")
    for number in range(BATCH):
        put(tmp_path / f"{number}")
    skipped: list[tuple[str, str]] = []
    batches = walk(tmp_path, skipped)
    first = next(batches)
    shutil.rmtree(tmp_path / "directory")
    assert {path for path, _ in (*first, *(pair for batch in batches for pair in batch))} == {
        f"{number}" for number in range(BATCH)
    }
    assert skipped == []


# --- Single looks


def test_a_renamed_file_is_complete_when_nobody_writes_to_it(tmp_path: Path) -> None:
    file = put(tmp_path / "a")
    look = Look.of(file.stat())
    assert look_at(tmp_path, {"a": True}, []) == {"a": (look, True)}
    assert look_at(tmp_path, {"a": False}, []) == {"a": (look, False)}
    with file.open("rb"):
        assert look_at(tmp_path, {"a": True}, []) == {"a": (look, True)}
    with file.open("ab"):
        assert look_at(tmp_path, {"a": True}, []) == {"a": (look, False)}
    assert look_at(tmp_path, {"a": True}, []) == {"a": (look, True)}


def test_a_file_that_was_written_since_it_got_its_name_is_not_complete(tmp_path: Path) -> None:
    """A write sets both times alike."""
    (tmp_path / "a").write_bytes(b"x")
    [(look, complete)] = look_at(tmp_path, {"a": True}, []).values()
    assert look is not None
    assert look.ctime_ns == look.mtime_ns
    assert complete is False


def test_a_file_of_somebody_else_is_not_known_to_be_complete(shut: Path) -> None:
    """Its lease is not ours to take; it rests like any other."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a file of somebody else")
    with as_nobody():
        [(look, complete)] = look_at(shut, {"open": True}, []).values()
    assert look is not None
    assert complete is False


def test_what_is_no_file_is_looked_at_as_nothing(tmp_path: Path) -> None:
    put(tmp_path / "directory" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "directory" / "a")
    os.mkfifo(tmp_path / "fifo")
    os.utime(put(tmp_path / "far"), (FAR, FAR))
    paths = ["directory", "link", "fifo", "nothing", "link/below"]
    if (tmp_path / "far").stat().st_mtime == FAR:
        paths.append("far")
    looks = look_at(tmp_path, dict.fromkeys(paths, True), [])
    assert looks == dict.fromkeys(paths, (None, False))


@pytest.mark.parametrize(
    ("code", "later"),
    [(errno.EMFILE, True), (errno.EIO, True), (errno.ESTALE, True), (errno.EXDEV, False)],
    ids=errno.errorcode.get,
)
def test_a_disk_that_fails_says_nothing_about_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, later: bool
) -> None:
    """What is owed of it stays owed; only what passes by itself is worth another look soon."""
    put(tmp_path / "a")
    put(tmp_path / "below" / "b")

    @contextlib.contextmanager
    def broken(root: Path, steps: list[str]) -> Iterator[int]:
        if steps:
            raise OSError(code, os.strerror(code))
        with open_directory(root, steps) as fd:
            yield fd

    monkeypatch.setattr(walk_module, "open_directory", broken)
    unseen: list[str] = []
    looks = look_at(tmp_path, {"a": False, "below/b": False, "gone": False}, unseen)
    assert looks == {
        "a": (Look.of((tmp_path / "a").stat()), False),
        "gone": (None, False),
    }
    assert unseen == (["below/b"] if later else [])
    assert missing(tmp_path, ["below/b"]) == []


def test_what_may_not_be_read_is_not_gone(shut: Path) -> None:
    """Until somebody gives us access, which the next scan finds."""
    unseen: list[str] = []
    with as_nobody():
        assert look_at(shut, {"shut/file": False, "x" * 300: False}, unseen) == {}
    assert unseen == []


def test_a_name_that_cannot_be_sent_is_not_even_looked_at(tmp_path: Path) -> None:
    put(tmp_path / "caf\udce9")
    assert look_at(tmp_path, {"caf\udce9": True}, []) == {}


_WRITER_BETWEEN = """
import fcntl, os, sys, types
from pathlib import Path
from syncd.sync import walk

def hook(fd, command, argument=0):
    result = fcntl.fcntl(fd, command, argument)
    if (command, argument) == (fcntl.F_SETLEASE, fcntl.F_RDLCK):
        try:
            os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
        except BlockingIOError:
            print("made to wait")
    return result

walk.fcntl = types.SimpleNamespace(**{**vars(fcntl), "fcntl": hook})
path = Path(sys.argv[1])
[(look, complete)] = walk.look_at(path.parent, {path.name: True}, []).values()
print("complete" if complete else "not complete")
os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
"""


def test_a_writer_that_comes_while_we_hold_the_lease_does_not_kill_us(tmp_path: Path) -> None:
    """By default the kernel would tell us of it by SIGIO, which ends a process."""
    file = put(tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-c", _WRITER_BETWEEN, str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "made to wait\ncomplete\n"


def test_where_there_are_no_leases_nothing_is_known_to_be_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems; and the file is closed again."""

    def refuse(fd: int, command: int, argument: int) -> None:
        raise OSError("no leases here")

    put(tmp_path / "a")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only to be counted
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    [(_, complete)] = look_at(tmp_path, {"a": True}, []).values()
    assert complete is False
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - only to be counted


def test_missing_is_what_is_no_file_any_more(tmp_path: Path) -> None:
    put(tmp_path / "there")
    put(tmp_path / "directory" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    paths = ["there", "gone", "directory", "link", "there/below", "x" * 300]
    # Whoever cannot be looked at now, as the last one, may be there for all we know.
    assert missing(tmp_path, paths) == ["gone", "directory", "link", "there/below"]


def test_a_directory_that_may_not_be_read_now_has_lost_nothing(shut: Path) -> None:
    with as_nobody():
        assert missing(shut, ["open", "shut/file", "shut/gone"]) == []


# --- A file that may lie anywhere


def test_a_file_outside_is_seen_as_it_is(tmp_path: Path) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"12345")
    assert look_outside(letter) == Look.of(letter.stat())


def outside(kind: str, place: Path) -> Path:
    """Something that cannot be sent."""
    path = place / "x"
    match kind:
        case "link":
            (place / "file").touch()
            path.symlink_to("file")
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        case "name":
            path = place / os.fsdecode(b"\xff")
            path.touch()
        case "below a file":
            path.touch()
            path = path / "y"
        case _:
            path = place / "nothing"
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("link", "is a symbolic link, which syncd does not follow"),
        ("directory", "is no regular file"),
        ("fifo", "is no regular file"),
        ("socket", "is no regular file"),
        ("name", "the name is no valid UTF-8"),
    ],
)
def test_what_cannot_be_sent_is_refused_in_words(tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(SyncdError, match=words) as caught:
        look_outside(outside(kind, tmp_path))
    assert caught.value.hint != ""
    assert not isinstance(caught.value, NotFoundError)


@pytest.mark.parametrize("kind", ["nothing", "below a file"])
def test_what_is_not_there_is_not_found(tmp_path: Path, kind: str) -> None:
    with pytest.raises(NotFoundError, match="there is no file"):
        look_outside(outside(kind, tmp_path))


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    """By who may read everything it is not refused, so by somebody else."""
    letter = tmp_path / "letter.pdf"
    letter.touch()
    letter.chmod(0)
    code = (
        "import os, pathlib, sys\n"
        "from syncd.sync.walk import look_outside\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "look_outside(pathlib.Path(sys.argv[1]))\n"
    )
    for directory in tmp_path.parents[:-2]:
        if directory.stat().st_uid == os.geteuid():
            directory.chmod(0o755)
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, letter], capture_output=True, text=True, check=False
    )
    assert f"SyncdError: syncd may not read {letter}" in done.stderr
