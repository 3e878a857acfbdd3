"""C-01: names. Whatever a peer calls its file, it lies below the folder, or nowhere.

More than 2,000 names at every place where one comes in, or where one could come in if a check
before it had failed. Around the folder lies a tree that never changes, not even its times.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

import blake3
import pytest
import trio

from syncd.disk import paths
from syncd.disk.beneath import check_twins, open_source
from syncd.disk.partial import PartialFile, clean, identity_of, key_of
from syncd.disk.room import MAX_AGE
from syncd.errors import DeclinedError, StanzaError, SyncdError
from syncd.sync.walk import look_at, walk
from syncd.transfer import si
from syncd.xmpp.stanza import Iq, make_iq
from tests.support.hostile import corpus, tree_state
from tests.support.peers import ALICE, FOLDER, LONG_AGO, Peers, open_peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from syncd.transfer.sender import Source

    Work = Callable[[Path, str, tuple[str, ...]], None]

NAMES = corpus()
PARTS = 3  # of the names, where each takes some milliseconds
CONTENT = b"content"
DIGEST = blake3.blake3(CONTENT).digest()


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of files, of which none has to be there after a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder, and around it what every climb would reach first."""
    for path in ("canary", "outside/canary", "etc/passwd", ".syncd/canary", "tmp/canary"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"alive")
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def only_within(*folders: Path) -> Iterator[None]:
    """Nothing changes but in these, which lie beside one another."""
    around = folders[0].parent

    def state() -> dict[str, tuple[object, ...]]:
        tree = tree_state(around).items()
        inside = tuple(f"{folder}/" for folder in folders)
        mine = {str(folder) for folder in folders}
        return {
            path: found
            for path, found in tree
            if path not in mine and not path.startswith(inside)
        }

    before = state()
    yield
    assert state() == before


def names(root: Path) -> list[str]:
    """All names, and those that are absolute and right."""
    return [*NAMES, f"{root.parent}/canary", f"a/{root.parent}/canary", str(root.parent)]


def taken(root: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Those that pass, and their components."""
    found = []
    for name in names(root):
        with contextlib.suppress(DeclinedError):
            found.append((name, paths.split(name)))
    return found


def raw(root: Path) -> list[tuple[str, tuple[str, ...]]]:
    """As if nobody had looked at a name before."""
    return [(name, tuple(name.split("/"))) for name in names(root)]


# --- What the receiver is told


async def offer(peers: Peers, *, path: str | None, name: str) -> bool:
    """Offer an empty file, past the parser, and finish it; returns whether it is wanted."""
    sync = None if path is None else si.Sync(folder=FOLDER, path=path, mtime_ns=LONG_AGO)
    sid = secrets.token_hex(16)
    payload = si.make_offer(
        si.Offer(sid=sid, name=name, size=0, methods=(si.IBB,), ranged=True, sync=sync)
    )
    try:
        await peers.receiver.on_offer(
            Iq("set", "1", ALICE, payload, make_iq("set", "1", None, payload))
        )
    except StanzaError:
        return False
    if sync is not None:
        finish = si.make_finish(si.Finish(sid=sid, size=0, digest=blake3.blake3().digest()))
        # Refused where a file stands in the place of a directory.
        with contextlib.suppress(StanzaError):
            await peers.receiver.on_finish(
                Iq("set", "2", ALICE, finish, make_iq("set", "2", None, finish))
            )
    else:
        peers.incoming[-1].scope.cancel()
    await peers.incoming[-1].ended.wait()
    return True


@pytest.mark.parametrize("part", range(PARTS))
async def test_offers_of_a_syncd_stay_in_the_folder(
    tmp_path: Path, root: Path, part: int
) -> None:
    root.rmdir()
    async with open_peers(tmp_path) as peers:
        with only_within(peers.folder, peers.inbox):
            accepted = {
                name for name in NAMES[part::PARTS] if await offer(peers, path=name, name="x")
            }
        # Each as it is called, or beside what stands in its way; but not below a file.
        expected = {name for name, _ in taken(root)} & set(NAMES[part::PARTS])
        received = peers.received()
        below = {name for name in expected if name.rpartition("/")[0] in received}
        assert expected - below <= accepted <= expected
        assert len(received) > len(expected) * 9 // 10
        assert {name for name in received if ".conflict-alice-" not in name} <= expected
        assert all(path.name.endswith(".part") for path in peers.leftovers())


@pytest.mark.parametrize("part", range(PARTS))
async def test_offers_of_a_plain_client_are_for_one_visible_file(
    tmp_path: Path, root: Path, part: int
) -> None:
    root.rmdir()
    async with open_peers(tmp_path) as peers:
        with only_within(peers.folder, peers.inbox):
            # A name that is empty is none, which the reader of offers finds.
            wanted = [await offer(peers, path=None, name=name) for name in NAMES[part::PARTS]]
        assert wanted.count(False) == NAMES[part::PARTS].count("")
        for incoming in peers.incoming:
            [component] = incoming.components
            assert not component.startswith((".", " "))
            assert not {"/", "\\", "\0"} & set(component)
        assert peers.received() == {}
        assert peers.leftovers() == []


# --- What the disk is told, as if nobody had looked before


def arrived(root: Path, key: str) -> PartialFile:
    """A file that came in two attempts."""
    file = PartialFile(root, key, len(CONTENT))
    os.pwrite(file.fd, CONTENT[:3], 0)
    file.blocks.update(memoryview(CONTENT[:3]))
    file.close()
    file = PartialFile(root, key, len(CONTENT))
    file.prove()
    os.pwrite(file.fd, CONTENT, 0)
    file.seal(LONG_AGO)
    return file


def resume(root: Path, name: str, components: tuple[str, ...]) -> None:
    with contextlib.closing(arrived(root, key_of(name, name, name, len(name), 0))) as file:
        file.quarantine()


def receive(root: Path, name: str, components: tuple[str, ...]) -> None:
    with contextlib.closing(arrived(root, key_of("a", "b", name, 0, 0))) as file:
        file.publish(file.choose_place(components, None, DIGEST, name))
    look(root, name, components)


def conflict(root: Path, name: str, components: tuple[str, ...]) -> None:
    for who in (name, "alice"):
        with contextlib.closing(arrived(root, key_of("a", "b", name, 0, 0))) as file:
            place = file.choose_place(components, None, None, who)
            file.publish(place)


def replace(root: Path, name: str, components: tuple[str, ...]) -> None:
    with contextlib.closing(arrived(root, key_of("a", "b", name, 0, 0))) as file:
        known = identity_of(root, components)
        place = file.choose_place(components, known, None, name)
        file.publish(place)


def look(root: Path, name: str, components: tuple[str, ...]) -> None:
    check_twins(root, components)
    look, _ = look_at(root, {name: True}, []).get(name, (None, False))
    assert look is None or look.size == len(CONTENT)
    found = [path for batch in walk(root, [], name) for path, _ in batch]
    assert [path for path in found if not path.startswith(name)] == []
    with contextlib.suppress(SyncdError):
        fd = open_source(root, components)
        try:
            assert os.read(fd, 100) == CONTENT
        finally:
            os.close(fd)


WORKS = {work.__name__: work for work in (receive, resume, conflict, replace, look)}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
@pytest.mark.parametrize("judged", [True, False], ids=["judged", "not judged"])
def test_nothing_outside_is_reached_by_any_name(root: Path, work: Work, judged: bool) -> None:
    """Whether or not `paths` has looked at it."""
    count = 0
    with only_within(root):
        for name, components in (taken if judged else raw)(root):
            with contextlib.suppress(SyncdError, OSError, ValueError):
                work(root, name, components)
                count += 1
    assert count or not judged


def test_what_lies_in_our_own_directory_is_cleared_up_there(root: Path) -> None:
    """Whatever it is called, be it put there by hand or by another program."""
    PartialFile(root, "0.part", 1).close()
    private = root / ".syncd"
    for number, name in enumerate(names(root)):
        for end in ("", ".part", ".bad", ".part.blocks", ".part.swap.1.2.3.4", ".part.aside.1"):
            with contextlib.suppress(OSError, ValueError):
                fd = os.open(
                    private / f"{name.replace('/', '')}{end}", os.O_CREAT | os.O_EXCL, 0o600
                )
                os.close(fd)
            if number % 40 == 0:
                with contextlib.suppress(OSError, ValueError):
                    (private / f"x{number}{end}").symlink_to(root.parent / "outside" / "canary")
    assert len(list(private.iterdir())) > 2_000
    with only_within(root):
        found = clean(root, 0)
        # Each has a second of its own: there are no more than so many conflicts in one.
        clean(root, 10 * MAX_AGE)
    assert found


# --- Names that only look the same, or are one name to other systems

TWINS = ("readme", "README", "\u00e9", "e\u0301", "Dir/a", "dir/a", "dir/A")


async def test_names_that_are_two_for_the_sender_stay_two(tmp_path: Path) -> None:
    """Each came, and was promised to be kept: none may take the place of another."""
    sent = {name: name.encode() for name in TWINS}
    async with open_peers(tmp_path) as peers:
        for _ in range(2):
            for name, content in sent.items():
                await peers.send(peers.write(name, content))
        assert peers.received() == sent


async def test_portable_folder_refuses_the_second_of_them_in_words(tmp_path: Path) -> None:
    async with open_peers(tmp_path) as peers:
        peers.portable = True
        for name in ("readme", "\u00e9", "Dir/a"):
            await peers.send(peers.write(name, name.encode()))
        for name in ("README", "e\u0301", "dir/a", "dir/A", "DIR/b"):
            with pytest.raises(DeclinedError, match="is the same name on many systems"):
                await peers.send(peers.write(name, name.encode()))
        assert set(peers.received()) == {"readme", "\u00e9", "Dir/a"}
        # The first may change, and come again.
        await peers.send(peers.write("readme", b"changed"))
        assert peers.received()["readme"] == b"changed"
        with pytest.raises(DeclinedError, match="is the name of a device on Windows"):
            await peers.send(peers.write("nul.txt", b""))


async def test_who_is_refused_for_a_twin_does_not_learn_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a third's, and say much; our own log has it."""
    async with open_peers(tmp_path) as peers:
        peers.portable = True
        (peers.folder / "Report Of 2029").write_bytes(b"of a third")
        with caplog.at_level("INFO"), pytest.raises(DeclinedError) as caught:
            await peers.send(peers.write("report of 2029", b""))
    assert "Report Of 2029" not in f"{caught.value}{caught.value.hint}{caught.value.__cause__}"
    assert "'Report Of 2029' is there" in caplog.text


async def test_hidden_names_come_only_where_they_may(tmp_path: Path) -> None:
    """What comes as .bashrc into a home is run; its sender's user hears what to change."""
    hidden = (".bashrc", ".ssh/authorized_keys", "project/.git/hooks/post-commit")
    async with open_peers(tmp_path) as peers:
        peers.hidden = False
        before = tree_state(tmp_path / "folder")
        for name in hidden:
            with pytest.raises(DeclinedError, match="begins with a dot") as caught:
                await peers.send(peers.write(name, b"x"))
            assert "ask for accept_hidden = true at this folder" in str(caught.value)
            assert caught.value.hint == ""  # it is all said
        assert tree_state(tmp_path / "folder") == before
        await peers.send(peers.write("a.b/c.", b"x"))
        peers.hidden = True
        for name in hidden:
            await peers.send(peers.found(name))
        assert set(peers.received()) == {"a.b/c.", *hidden}


async def test_portable_folder_takes_one_of_those_that_come_at_once(tmp_path: Path) -> None:
    """None of them is there yet when they are offered."""
    names = ["a/File", "A/file", "a/FILE", "A/FILE"]
    refused: list[str] = []
    async with open_peers(tmp_path) as peers:
        peers.portable = True
        sources = [peers.write(name, name.encode()) for name in names]
        offered = trio.Event()

        async def wait_for_all(_: object) -> None:
            await offered.wait()

        peers.on_arriving = wait_for_all

        async def send(source: Source) -> None:
            try:
                await peers.send(source)
            except DeclinedError as error:
                refused.append(str(error))

        async with trio.open_nursery() as nursery:
            for source in sources:
                nursery.start_soon(send, source)
            while len(peers.incoming) < len(names):
                await trio.lowlevel.checkpoint()
            offered.set()
        assert len(peers.received()) == 1
    assert len(refused) == len(names) - 1
