from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import blake3
import pytest

from syncd.disk import beneath
from syncd.errors import ChangedError, DeclinedError, ErrorType, TransferError
from tests.support.disk import small_disk
from tests.support.peers import snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a directory in it, beside a directory that nobody may reach."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary").write_bytes(b"alive")
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    return folder


def listed(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def bound(directory: Path, name: Path) -> Iterator[None]:
    """Give a directory a second name; skips the test if that cannot be."""
    mount = ["mount", "--bind", str(directory), str(name)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("SECOND NAMES NOT TESTED: that needs root, and a mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(name)], check=True)


# Directories


@pytest.mark.parametrize("components", [(), ("a",), ("a", "b")])
def test_descriptor_is_the_directory_at_the_end_of_the_path(
    root: Path, components: tuple[str, ...]
) -> None:
    expected = root.joinpath(*components).stat()
    with beneath.open_directory(root, components) as fd:
        assert listed(fd) == (expected.st_dev, expected.st_ino)


def test_the_folder_itself_may_be_a_link(root: Path) -> None:
    link = root.with_name("link")
    link.symlink_to(root)
    with beneath.open_directory(link, ("a",)) as fd:
        assert listed(fd) == (root.stat().st_dev, (root / "a").stat().st_ino)


def test_missing_directories_are_made_only_when_asked_for(root: Path) -> None:
    with pytest.raises(FileNotFoundError), beneath.open_directory(root, ("new", "deep")):
        pass
    assert not (root / "new").exists()
    with beneath.open_directory(root, ("new", "deep"), create=True) as fd:
        assert listed(fd)[1] == (root / "new" / "deep").stat().st_ino


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("components", [("link",), ("link", "x"), ("a", "link"), ("file",)])
def test_links_and_files_on_the_way_end_the_walk(
    root: Path, components: tuple[str, ...], create: bool
) -> None:
    for directory in (root, root / "a"):
        (directory / "link").symlink_to(root.parent / "outside")
    (root / "file").write_bytes(b"")
    before = snapshot(root.parent)
    with (
        pytest.raises(OSError, match=os.strerror(errno.ENOTDIR)),
        beneath.open_directory(root, components, create=create),
    ):
        pass
    assert snapshot(root.parent) == before


@pytest.mark.parametrize("components", [("a", "b"), ("a", "missing"), ("a", "b", "c", "d")])
def test_no_descriptor_stays_open(root: Path, components: tuple[str, ...]) -> None:
    before = open_descriptors()
    with suppress(FileNotFoundError), beneath.open_directory(root, components):
        pass
    assert open_descriptors() == before


def test_directory_that_is_swapped_for_a_link_all_the_time_never_leads_outside(
    root: Path,
) -> None:
    """Every file that is made under the path lands below the folder, or is not made."""
    stop = threading.Event()
    link = root / "spare"
    link.symlink_to(root.parent / "outside")

    def swap() -> None:
        with beneath.open_directory(root, ()) as fd:
            while not stop.is_set():
                beneath.exchange("a", fd, "spare", fd)

    attacker = threading.Thread(target=swap)
    attacker.start()
    made = refused = 0
    try:
        while not (made > 100 and refused > 100) and made + refused < 100_000:
            try:
                with beneath.open_directory(root, ("a", "b"), create=True) as fd:
                    os.close(os.open(f"f{made}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
                made += 1
            except (NotADirectoryError, FileNotFoundError):
                refused += 1
    finally:
        stop.set()
        attacker.join()
    assert snapshot(root.parent / "outside") == {
        str(root.parent / "outside" / "canary"): b"alive"
    }
    assert made > 0


@pytest.mark.parametrize("step", ["", ".", "..", "../outside", "a/b", "/", "/etc"])
def test_what_is_more_or_less_than_one_step_is_refused(root: Path, step: str) -> None:
    """Whatever a name has come through before."""
    for components in ((step,), (step, "x"), ("a", step), ("a", step, "x")):
        with pytest.raises(OSError, match="this is no name of a file"):
            beneath.open_directory(root, components, create=True).__enter__()
        with pytest.raises(OSError, match="this is no name of a file"):
            beneath.open_parent(root, components, create=True).__enter__()
        with pytest.raises(TransferError, match="this is no name of a file"):
            beneath.open_source(root, components)
    assert sorted(path.name for path in root.parent.rglob("*")) == [
        "a", "b", "canary", "folder", "outside",
    ]  # fmt: skip


def test_what_is_mounted_inside_is_not_the_folders(root: Path) -> None:
    with small_disk(root / "a"):
        (root / "a" / "file").write_bytes(b"x")
        with (
            pytest.raises(OSError, match="another file system is mounted here"),
            beneath.open_directory(root, ("a", "b"), create=True),
        ):
            pass
        with pytest.raises(TransferError, match="another file system is mounted") as caught:
            beneath.open_source(root, ("a", "file"))
        assert "a folder of its own" in caught.value.hint
        assert not (root / "a" / "b").exists()


def test_folder_that_is_mounted_itself_is_a_folder_like_any_other(root: Path) -> None:
    with small_disk(root), beneath.open_private(root) as fd:
        assert listed(fd)[1] == (root / ".syncd").stat().st_ino


def test_private_directory_is_known_by_any_name(root: Path) -> None:
    """As where case does not count, which a second name of the directory stands for here."""
    with beneath.open_private(root):
        (root / ".SYNCD").mkdir()
    with bound(root / ".syncd", root / ".SYNCD"):
        before = snapshot(root)
        for components in ((".SYNCD", "x.part"), (".SYNCD", "d", "x")):
            with pytest.raises(DeclinedError, match="syncd's own directory"):
                beneath.open_parent(root, components, create=True).__enter__()
        assert snapshot(root) == before


# The private directory


def test_private_directory_is_made_for_ourselves(root: Path) -> None:
    with beneath.open_private(root) as fd:
        status = os.fstat(fd)
    assert (status.st_mode & 0o777, status.st_uid) == (0o700, os.geteuid())
    with beneath.open_private(root, create=False) as fd:
        assert os.fstat(fd).st_ino == status.st_ino


def test_private_directory_is_made_only_when_asked_for(root: Path) -> None:
    with pytest.raises(FileNotFoundError), beneath.open_private(root, create=False):
        pass
    assert not (root / ".syncd").exists()


def linked(private: Path) -> None:
    private.symlink_to(private.parent / "a")


def dangling(private: Path) -> None:
    private.symlink_to("nowhere")


def a_file(private: Path) -> None:
    private.touch()


def given_away(private: Path) -> None:
    private.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to somebody else")
    os.chown(private, 12_345, -1)


def open_to_a_group(private: Path) -> None:
    private.mkdir()
    private.chmod(0o770)


def open_to_all(private: Path) -> None:
    private.mkdir()
    private.chmod(0o702)


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (linked, "is a link or a file, not syncd's own directory"),
        (dangling, "is a link or a file, not syncd's own directory"),
        (a_file, "is a link or a file, not syncd's own directory"),
        (given_away, r"belongs to another user \(uid 12345\)"),
        (open_to_a_group, "others may write to"),
        (open_to_all, "others may write to"),
    ],
)
def test_private_directory_that_is_not_ours_alone_is_refused_in_words(
    root: Path, prepare: Callable[[Path], None], words: str, create: bool
) -> None:
    prepare(root / ".syncd")
    before, files = snapshot(root), open_descriptors()
    with pytest.raises(TransferError, match=words) as caught:
        beneath.open_private(root, create=create).__enter__()
    # The one is told to the peer, too; the other only here.
    assert str(root) not in str(caught.value)
    assert str(root / ".syncd") in caught.value.hint
    assert caught.value.type == ErrorType.WAIT
    assert (snapshot(root), open_descriptors()) == (before, files)


def test_private_directory_on_another_file_system_is_refused_in_words(root: Path) -> None:
    """From there no file could get its name in one step."""
    (root / ".syncd").mkdir(mode=0o700)
    with small_disk(root / ".syncd"):
        (root / ".syncd").chmod(0o700)
        with pytest.raises(TransferError, match="another file system than its folder"):
            beneath.open_private(root).__enter__()


# Names that other systems take for one


@pytest.mark.parametrize(
    "path",
    [
        "README",
        "Readme",
        "e\u0301",
        "\u00c9",
        "DIR/new",
        "dir/FILE",
        "dir/sub/X/deep",
        "dir/Sub/n",
    ],
)
def test_twin_of_what_is_there_is_refused_in_words(root: Path, path: str) -> None:
    (root / "readme").touch()
    (root / "\u00e9").touch()
    (root / "dir" / "sub" / "x").mkdir(parents=True)
    (root / "dir" / "file").touch()
    with pytest.raises(DeclinedError, match="is the same name on many systems") as caught:
        beneath.check_twins(root, path.split("/"))
    # The sender is told of no other name than its own; we are.
    twins = ("readme", "\u00e9", "dir", "file", "sub", "x")
    told = [name for name in twins if repr(name) in str(caught.value)]
    assert told == []
    assert [name for name in twins if repr(name) in caught.value.hint] != []


@pytest.mark.parametrize(
    ("path", "count"), [("new", 1), ("dir/new", 1), ("dir/x/new", 2), ("x/y/z/new", 4)]
)
def test_what_has_to_be_made_for_a_file_is_counted(root: Path, path: str, count: int) -> None:
    (root / "dir").mkdir()
    assert beneath.count_new(root, path.split("/")) == count


def test_where_nothing_can_be_made_nothing_is_counted(root: Path) -> None:
    (root / "file").touch()
    for path in ("file/new", "file/x/new"):
        with pytest.raises(TransferError):
            beneath.count_new(root, path.split("/"))


@pytest.mark.parametrize(
    "path", ["readme", "a", "a/b", "a/b/c/d", "new", "new/A", "dir/Other", "A\u0308", "b/x"]
)
def test_what_has_no_twin_may_come(root: Path, path: str) -> None:
    """Also what had one before; that cannot be changed any more."""
    for name in ("readme", "README", "dir", "DIR"):
        (root / name).touch()
    (root / "dir").unlink()
    (root / "dir").mkdir()
    beneath.check_twins(root, path.split("/"))


def test_twins_are_not_looked_for_behind_links(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "outside")
    with pytest.raises(TransferError, match="a file or link stands where a directory is"):
        beneath.check_twins(root, ("link", "CANARY"))


# Sources


def test_source_is_opened_for_reading(root: Path) -> None:
    (root / "a" / "file").write_bytes(b"content")
    fd = beneath.open_source(root, ("a", "file"))
    try:
        assert os.read(fd, 100) == b"content"
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "components", [("gone",), ("gone", "x"), ("link",), ("linked", "canary"), ("a",), ("fifo",)]
)
def test_what_is_no_regular_file_any_more_has_changed(
    root: Path, components: tuple[str, ...]
) -> None:
    """A link is never followed: it could lead to a file that was not to be sent."""
    (root / "link").symlink_to(root.parent / "outside" / "canary")
    (root / "linked").symlink_to(root.parent / "outside")
    os.mkfifo(root / "fifo")
    before = open_descriptors()
    with pytest.raises(ChangedError):
        beneath.open_source(root, components)
    assert open_descriptors() == before


def test_socket_in_the_place_of_a_file_has_changed(root: Path) -> None:
    os.mknod(root / "socket", 0o140644)
    with pytest.raises(ChangedError):
        beneath.open_source(root, ("socket",))


def test_source_that_cannot_be_read_has_not_changed(root: Path) -> None:
    with pytest.raises(TransferError, match="File name too long") as caught:
        beneath.open_source(root, ("x" * 256,))
    assert type(caught.value) is TransferError


# Renaming


@pytest.fixture
def here(root: Path) -> int:
    (root / "new").write_bytes(b"new")
    (root / "old").write_bytes(b"old")
    return os.open(root, os.O_RDONLY)


class OldKernel:
    """A C library whose newer calls fail, as on an old kernel or a poor file system."""

    def __init__(self, code: int) -> None:
        self._code = code

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(self._code)
        return -1

    fallocate = renameat2


@pytest.fixture(params=[None, errno.EINVAL, errno.ENOSYS])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, a file system without the flags, a kernel without the call."""
    if request.param is not None:
        monkeypatch.setattr(beneath, "_libc", OldKernel(request.param))


@pytest.mark.usefixtures("kernel")
def test_renaming_never_replaces(root: Path, here: int) -> None:
    with pytest.raises(FileExistsError):
        beneath.rename_new("new", here, "old", here)
    assert ((root / "new").read_bytes(), (root / "old").read_bytes()) == (b"new", b"old")
    os.close(here)


@pytest.mark.usefixtures("kernel")
def test_renaming_moves_the_file_itself(root: Path, here: int) -> None:
    inode = (root / "new").stat().st_ino
    with beneath.open_directory(root, ("a",)) as directory:
        beneath.rename_new("new", here, "free", directory)
    assert not (root / "new").exists()
    assert (root / "a" / "free").stat().st_ino == inode
    os.close(here)


@pytest.mark.usefixtures("kernel")
def test_link_is_moved_as_a_link(root: Path, here: int) -> None:
    """And never becomes a second name of what it leads to."""
    canary = root.parent / "outside" / "canary"
    (root / "link").symlink_to(canary)
    beneath.rename_new("link", here, "free", here)
    assert (root / "free").is_symlink()
    assert not (root / "link").is_symlink()
    assert canary.stat().st_nlink == 1
    os.close(here)


@pytest.mark.usefixtures("kernel")
def test_renaming_never_goes_through_a_link(root: Path, here: int) -> None:
    (root / "link").symlink_to(root.parent / "outside" / "fresh")
    with pytest.raises(FileExistsError):
        beneath.rename_new("new", here, "link", here)
    assert not (root.parent / "outside" / "fresh").exists()
    os.close(here)


def test_other_failures_of_renaming_are_not_worked_around(
    root: Path, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beneath, "_libc", OldKernel(errno.EROFS))
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        beneath.rename_new("new", here, "free", here)
    assert not (root / "free").exists()
    os.close(here)


def test_exchange_swaps_two_files_in_one_step(root: Path, here: int) -> None:
    beneath.exchange("new", here, "old", here)
    assert ((root / "new").read_bytes(), (root / "old").read_bytes()) == (b"old", b"new")
    with pytest.raises(FileNotFoundError):
        beneath.exchange("new", here, "missing", here)
    os.close(here)


# Room


def test_reserved_blocks_do_not_count_as_arrived(root: Path, here: int) -> None:
    fd = os.open(root / "new", os.O_RDWR)
    beneath.reserve(fd, 1 << 20)
    status = os.fstat(fd)
    os.close(fd)
    os.close(here)
    assert status.st_size == 3
    assert status.st_blocks * 512 >= 1 << 20


def test_nothing_needs_no_room(root: Path, here: int) -> None:
    """The kernel itself refuses a length of 0."""
    beneath.reserve(here, 0)
    os.close(here)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_that_cannot_reserve_is_no_failure(
    here: int, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(beneath, "_libc", OldKernel(code))
    beneath.reserve(here, 1)
    os.close(here)


def test_file_larger_than_the_file_system_takes_is_an_error(root: Path, here: int) -> None:
    fd = os.open(root / "new", os.O_RDWR)
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        beneath.reserve(fd, 2**63 - 1)
    os.close(fd)
    os.close(here)


def test_writing_can_be_started_and_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    fd = os.open(tmp_path / "f", os.O_RDWR)
    beneath.start_writing(fd, 0, 0)
    beneath.start_writing(fd, 3, 2)
    os.close(fd)
    beneath.start_writing(fd, 0, 0)  # what fails is told by the fsync
    assert (tmp_path / "f").read_bytes() == b"content"


# Hashing


def test_file_is_hashed_but_never_through_a_link(root: Path) -> None:
    content = bytes(range(256)) * 8192  # two reads
    (root / "file").write_bytes(content)
    (root / "link").symlink_to(root / "file")
    with beneath.open_directory(root, ()) as directory:
        found = beneath.hash_file("file", directory, len(content))
        assert found == blake3.blake3(content).digest()
        with pytest.raises(OSError, match="symbolic links"):
            beneath.hash_file("link", directory, len(content))


def test_file_that_is_longer_than_it_should_be_is_not_hashed_to_its_end(root: Path) -> None:
    """It may grow for ever; its hash is then that of no file."""
    with (root / "file").open("wb") as file:
        file.truncate(1 << 40)
    with beneath.open_directory(root, ()) as directory:
        found = beneath.hash_file("file", directory, 5)
    assert found != blake3.blake3(bytes(5)).digest()


# Explanations


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, ErrorType.WAIT),
        (errno.EDQUOT, ErrorType.WAIT),
        (errno.EROFS, ErrorType.WAIT),
        (errno.EIO, ErrorType.WAIT),
        (errno.EACCES, ErrorType.WAIT),
        (errno.EPERM, ErrorType.WAIT),
        (errno.ENOENT, ErrorType.WAIT),
        (errno.EFBIG, ErrorType.CANCEL),
        (errno.EXDEV, ErrorType.CANCEL),
        (errno.ENOTDIR, ErrorType.CANCEL),
        (errno.ELOOP, ErrorType.CANCEL),
        (errno.EISDIR, ErrorType.CANCEL),
    ],
)
def test_errors_of_the_disk_become_sentences_and_say_whether_to_wait(
    code: int, kind: ErrorType
) -> None:
    error = beneath.explain(OSError(code, os.strerror(code)), "the file cannot be stored")
    assert error.type == kind
    assert str(error).startswith("the file cannot be stored: ")
    assert bool(error.hint) == (code != errno.ENOENT)
