"""The demo: its parts, then all of it with real daemons."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from syncd import config
from syncd.cli import demo
from syncd.cli.demo import DemoError, Party, Setup, compare, find_room, make_files, run_demo
from syncd.cli.exits import Exit
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1024 * 1024


class Usage(NamedTuple):
    """As `shutil.disk_usage` gives it."""

    total: int
    used: int
    free: int


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where demos run, which must leave nothing there; pytest's own paths are too long."""
    with tempfile.TemporaryDirectory() as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)
        assert list(Path(name).iterdir()) == []


def fake_daemon(text: str) -> Setup:
    """A setup whose daemon is some Python."""
    return Setup(daemon=(sys.executable, "-c", text), size=1, deadline=1.0)


@pytest.mark.parametrize(
    ("name", "peer", "send_to", "accept_from"),
    [("alice", "bob", ["bob"], []), ("bob", "alice", [], ["alice"])],
)
def test_the_configurations_are_good(
    name: str, peer: str, send_to: list[str], accept_from: list[str], tmp_path: Path
) -> None:
    party = Party(name, tmp_path / 'with "quotes"' / name)
    demo.prepare(party, peer, "secret", 5222, b"PEM")
    read = config.load(party.config, environ={})
    assert read.account.jid == JID.parse(f"{name}@demo.example")
    assert read.account.password.read() == "secret"
    assert str(read.account.server) == "127.0.0.1:5222"
    assert read.control_socket == party.socket
    assert read.warnings == ()
    (folder,) = read.folders
    assert folder.path == party.folder
    assert [jid.local for jid in folder.send_to] == send_to
    assert [jid.local for jid in folder.accept_from] == accept_from


def test_the_files_are_as_announced(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    drops = make_files(staging, 3 * MIB + 5)
    announced = {path: size for drop in drops for path, size in drop.files.items()}
    found = {
        str(path.relative_to(staging)): path.stat().st_size
        for path in staging.rglob("*")
        if path.is_file()
    }
    assert announced == found
    assert len(found) == 22
    assert [drop.name for drop in drops] == ["hello.txt", "album", "film.bin"]
    film = (staging / "film.bin").read_bytes()
    assert len({film[:MIB], film[MIB : 2 * MIB], film[2 * MIB : 3 * MIB]}) == 3


def test_every_difference_is_found(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        make_files(place, 10)
        (place / "film.bin").write_bytes(b"film")
    assert compare(one, other, ["hello.txt", "album/2001/00.txt", "film.bin"]) == []
    (other / "film.bin").write_bytes(b"fiLm")
    assert compare(one, other, ["hello.txt", "film.bin"]) == ["film.bin"]


def test_a_long_tmpdir_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The path of a control socket must be short."""
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    assert find_room(1) in ("/tmp", "/var/tmp")


def test_without_room_there_is_no_demo(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 0))
    with pytest.raises(DemoError, match=r"needs 600\.0 MiB") as caught:
        demo.run(keep=False)
    assert "TMPDIR" in caught.value.hint


def test_a_daemon_that_dies_is_reported_at_once(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "import sys; print('one'); sys.exit('\\x1bwhy I died')"
    assert run_demo(fake_daemon(script), keep=False) == Exit.FAILED
    error = capsys.readouterr().err
    assert "daemon ended by itself, with exit code 1" in error
    assert "log ends:\n" in error
    assert "  \\x1bwhy I died\n" in error


def test_daemons_that_never_answer_are_given_up(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(fake_daemon("import time; time.sleep(99)"), keep=False) == Exit.FAILED
    expected = (
        "syncctl: the daemons did not find each other: alice: no answer; bob: no answer\n"
    )
    assert capsys.readouterr().err == expected


def test_a_daemon_that_cannot_even_be_started(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        run_demo(Setup(daemon=("/no/such/program",), size=1), keep=False)
    assert caught.group_contains(FileNotFoundError)


def test_files_go_across(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, with real daemons, and a smaller large file."""
    assert run_demo(Setup(size=5 * MIB), keep=False) == Exit.OK
    said, complaints = capsys.readouterr()
    assert complaints == ""
    for title in ("hello.txt", "album/ (20 files)", "film.bin (5.0 MiB)"):
        assert f" s  {title}\n" in said
    assert "All 22 files are at bob's" in said
    assert "alice$ syncctl status\nOK: " in said
    assert "bob$ syncctl status\nOK: " in said
    assert said.endswith("syncctl --config config.toml status\n")


def test_an_answer_too_late_is_a_failure(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(Setup(size=5 * MIB, deadline=0.0), keep=False) == Exit.FAILED
    assert "syncctl: the daemons did not find each other" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_it_is_kept_until_it_is_told_to_end(number: signal.Signals, place: Path) -> None:
    """Then nothing is left: no process, no file."""
    script = (
        "import sys; from syncd.cli.demo import *;"
        f"sys.exit(run_demo(Setup(size={MIB}), keep=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )
    with process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        kept = next(line for line in lines if line.startswith("Drop files into "))
        next(line for line in lines if line.startswith("Ctrl-C"))
        folder = Path(kept.removeprefix("Drop files into ").strip())
        assert folder.is_relative_to(place)
        assert sorted(path.name for path in folder.iterdir()) == [
            "album",
            "film.bin",
            "hello.txt",
        ]
        os.kill(process.pid, number)
        assert process.wait(20) == Exit.INTERRUPTED
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if str(place) in command_line(pid)]


def command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:  # it ended meanwhile
        return ""
