"""Real daemons, each a process of its own; their server is a port where nobody listens.

What they do for files and with servers is for the tests of the parts, and for interop.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

import syncd
from syncd import daemon
from syncd.config import parse
from syncd.control.client import ask
from syncd.control.messages import PingRequest, RescanRequest, StatusRequest
from syncd.disk import room
from syncd.errors import ControlError, ErrorType, NotRunningError
from tests.support.disk import make_room, small_disk
from tests.support.processes import Process, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from syncd.control.messages import Status

# How long a daemon may take for anything; only reached when a test fails.
PATIENCE = 60.0  # seconds

CONFIG = """\
[account]
jid = "alice@example.org/test"
password_file = "password"
server = "127.0.0.1:1"
[state]
dir = "state"
[control]
socket = "{socket}"
[bytestreams]
listen = "127.0.0.1:0"
"""

FOLDER = """\
[[folder]]
id = "{id}"
path = "{id}"
send_to = ["bob@example.org"]
settle = 0.1
"""


def test_what_nobody_goes_on_with_is_cleared_up_also_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At every place where files arrive, though one of them cannot be looked through."""
    for name in ("broken", "photos", "inbox"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / ".syncd").symlink_to(tmp_path)
    config = parse(
        '[account]\njid = "alice@example.org"\npassword_file = "password"\n'
        + "".join(
            f'[[folder]]\nid = "{name}"\npath = "{name}"\naccept_from = ["bob@example.org"]\n'
            for name in ("broken", "photos")
        )
        + '[inbox]\npath = "inbox"\naccept_from = ["bob@example.org"]\n',
        where=str(tmp_path / "config.toml"),
        environ={"HOME": "/nowhere"},
    )
    left = []
    for name in ("photos", "inbox"):
        (tmp_path / name / ".syncd").mkdir(mode=0o700)
        left.append(tmp_path / name / ".syncd" / "who-what.part")
        left[-1].write_bytes(b"x")
    monkeypatch.setattr(room, "MAX_AGE", -1.0)  # all of it is old
    clock = trio.testing.MockClock(autojump_threshold=0.05)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon._expire, config)
            await trio.sleep(daemon.EXPIRE_EVERY - 1)
            assert all(file.exists() for file in left)
            with trio.fail_after(100 * daemon.EXPIRE_EVERY):
                while any(file.exists() for file in left):  # noqa: ASYNC110 - a disk tells nobody
                    await trio.sleep(daemon.EXPIRE_EVERY)
            nursery.cancel_scope.cancel()

    trio.run(run, clock=clock)
    assert "is a link or a file, not syncd's own directory" in caplog.text


class Home:
    """A directory with all that a daemon needs.

    Attributes:
      path: The directory.
      config: The configuration file.
      socket: The control socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.socket = path / "control.sock"
        (path / "password").touch(mode=0o600)
        (path / "password").write_text("secret\n")
        self.write("photos")
        self._made: list[Process] = []

    def write(self, *folders: str) -> None:
        """Write a good configuration with these folders, and make them."""
        text = CONFIG.format(socket=self.socket)
        for name in folders:
            (self.path / name).mkdir(exist_ok=True)
            text += FOLDER.format(id=name)
        self.config.write_text(text)

    def environment(self, **more: str) -> dict[str, str]:
        """Nothing of the user's own."""
        return {
            "HOME": str(self.path),
            "LANG": "C.UTF-8",
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONWARNINGS": "default",
            **more,
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run syncd until it ends by itself."""
        return subprocess.run(
            [sys.executable, "-m", "syncd", *arguments],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=self.environment(),
            check=False,
        )

    def start(self, **environment: str) -> Process:
        """Start a daemon, and wait until it answers."""
        process = Process(
            "syncd",
            [sys.executable, "-m", "syncd", "--config", str(self.config)],
            log_file=self.path / "log",
            env=self.environment(**environment),
        )
        self._made.append(process)
        process.spawn()

        def answers() -> bool:
            process.check_running()
            try:
                return ask(self.socket, PingRequest(), timeout=PATIENCE).pid == process.pid
            except ControlError:
                return False

        until(answers, "syncd answers", PATIENCE)
        return process

    def status(self) -> Status:
        return ask(self.socket, StatusRequest(), timeout=PATIENCE)

    def folders(self) -> list[str]:
        """The ids of the folders, while a daemon is there to tell them."""
        try:
            return [folder.id for folder in self.status().folders]
        except ControlError:
            return []

    def log(self) -> str:
        return (self.path / "log").read_text()

    def end(self) -> None:
        for process in self._made:
            process.kill()


@pytest.fixture
def home() -> Iterator[Home]:
    # Not tmp_path, which is named after the test: a Unix socket's path has 107 bytes at most.
    made = Home(Path(tempfile.mkdtemp(prefix="sd")))
    try:
        yield made
    finally:
        made.end()
        shutil.rmtree(made.path)


# --- Without running


def test_the_version_is_told(home: Home) -> None:
    done = home.run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"syncd {syncd.__version__}\n",
        "",
    )


def test_an_unknown_option_is_a_usage_error(home: Home) -> None:
    done = home.run("--chekc")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--chekc" in done.stderr


def test_a_good_configuration_passes_its_check_and_nothing_is_made(home: Home) -> None:
    done = home.run("--check", "--config", str(home.config))
    assert (done.returncode, done.stdout, done.stderr) == (
        0, f"{home.config}: good; 1 folders\n", "",
    )  # fmt: skip
    assert not (home.path / "state").exists()
    assert not home.socket.exists()


@pytest.mark.parametrize("arguments", [["--check"], []])
def test_a_bad_configuration_is_refused_with_all_its_faults(
    home: Home, arguments: list[str]
) -> None:
    """Checked or started, it is the same."""
    home.config.write_text(
        home.config.read_text()
        .replace('jid = "alice', 'jidd = "alice')
        .replace("settle = 0.1", 'settle = "soon"')
        .replace('["bob@example.org"]', '["not a jid"]')
        + '[transfer]\nparallel = 1000\n[bytestream]\nibb = "yes"\n'
    )
    done = home.run(*arguments, "--config", str(home.config))
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("syncd: ")
    assert "Traceback" not in done.stderr
    for fault in ("jidd", "settle", "send_to", "parallel", "bytestream"):
        assert fault in done.stderr, fault
    assert not (home.path / "state").exists()


def test_a_configuration_that_is_not_there_is_told_with_advice(home: Home) -> None:
    named = home.run("--config", "nowhere.toml")
    assert (named.returncode, named.stdout) == (78, "")
    assert "nowhere.toml" in named.stderr
    found = home.run()
    assert (found.returncode, found.stdout) == (78, "")
    assert str(home.path / ".config" / "syncd" / "config.toml") in found.stderr
    assert "--config FILE" in found.stderr
    assert "Traceback" not in named.stderr + found.stderr


def test_a_warning_of_the_configuration_is_told(home: Home) -> None:
    (home.path / "password").chmod(0o644)
    done = home.run("--check", "--config", str(home.config))
    assert done.returncode == 0
    assert done.stderr.startswith("syncd: warning: ")
    assert "password" in done.stderr


# --- Running


def test_without_its_server_it_runs_watches_and_ends_when_told_to(home: Home) -> None:
    daemon = home.start()
    (home.path / "photos" / "a").write_bytes(b"x")
    assert ask(home.socket, RescanRequest(), timeout=PATIENCE).files == 1
    until(lambda: home.status().folders[0].pending == 1, "the file is owed", PATIENCE)
    until(lambda: home.status().connection.state == "offline", "it has tried", PATIENCE)
    status = home.status()
    assert status.connection.server == "127.0.0.1:1"
    assert status.connection.reason != ""
    assert (status.state, status.peers[0].pending) == ("waiting", 1)
    assert daemon.terminate() == 0
    assert "Traceback" not in home.log()
    assert not home.socket.exists()
    with pytest.raises(NotRunningError):
        home.status()
    # What it owed it still owes.
    daemon = home.start()
    until(lambda: home.status().peers[0].pending == 1, "the file is still owed", PATIENCE)
    daemon.signal(signal.SIGINT)
    assert daemon.wait() == 0


def test_a_second_daemon_of_the_same_state_is_refused(home: Home) -> None:
    first = home.start()
    other = home.path / "other.toml"
    other.write_text(home.config.read_text().replace("control.sock", "other.sock"))
    second = home.run("--config", str(other))
    assert (second.returncode, second.stdout) == (11, "")
    # The first line is the listener's or the reason; the log stamps its lines.
    assert f"another syncd (process {first.pid})" in second.stderr
    assert "give this one its own state.dir" in second.stderr
    assert "Traceback" not in second.stderr
    assert home.folders() == ["photos"]


def test_a_second_daemon_of_the_same_socket_is_refused(home: Home) -> None:
    first = home.start()
    other = home.path / "other.toml"
    other.write_text(home.config.read_text().replace('"state"', '"other"'))
    second = home.run("--config", str(other))
    assert (second.returncode, second.stdout) == (11, "")
    assert str(home.socket) in second.stderr
    assert "Traceback" not in second.stderr
    assert ask(home.socket, PingRequest(), timeout=PATIENCE).pid == first.pid


def test_a_journal_that_is_damaged_is_told_with_advice(home: Home) -> None:
    (home.path / "state").mkdir(mode=0o700)
    (home.path / "state" / "journal.db").write_bytes(b"not a database" * 100)
    done = home.run("--config", str(home.config))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"the journal {home.path / 'state' / 'journal.db'} is damaged" in done.stderr
    assert f"move {home.path / 'state' / 'journal.db'} away" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_is_full_at_the_start_is_waited_for(home: Home) -> None:
    """And told to whoever asks; to start again and again would not make room."""
    state = home.path / "state"
    state.mkdir(mode=0o700)
    with small_disk(state):
        with (
            (state / "ballast").open("wb", buffering=0) as ballast,
            contextlib.suppress(OSError),
        ):
            while ballast.write(bytes(4096)):
                pass
        daemon = home.start()
        with pytest.raises(ControlError) as caught:
            home.status()
        assert caught.value.type is ErrorType.WAIT
        assert caught.value.hint == "is the disk of the state directory full, or read-only?"
        make_room(state)
        until(lambda: home.folders() == ["photos"], "it has begun", PATIENCE)
        assert daemon.terminate() == 0
    assert home.log().count("is the disk of the state directory full") == 1


def test_a_daemon_that_waits_for_its_disk_can_be_stopped(home: Home) -> None:
    state = home.path / "state"
    state.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(state / "journal.db")) as database:
        database.execute("BEGIN EXCLUSIVE")
        daemon = home.start()
        until(lambda: "database is locked" in home.log(), "it has tried", PATIENCE)
        assert daemon.terminate() == 0


def test_a_reload_takes_a_good_configuration_and_leaves_a_bad_one(home: Home) -> None:
    daemon = home.start()
    good = home.config.read_text()
    home.config.write_text(good.replace("settle = 0.1", "settel = 0.1"))
    daemon.signal(signal.SIGHUP)
    until(lambda: "the old configuration stays" in home.log(), "it has read it", PATIENCE)
    assert "settel" in home.log()
    assert home.folders() == ["photos"]
    # The same process, with its new folder, and with what is to be said about it.
    home.write("photos", "music")
    (home.path / "password").chmod(0o644)
    daemon.signal(signal.SIGHUP)
    until(lambda: home.folders() == ["photos", "music"], "it has the folder", PATIENCE)
    assert ask(home.socket, PingRequest(), timeout=PATIENCE).pid == daemon.pid
    assert f"chmod 600 {home.path / 'password'}" in home.log()
    (home.path / "music" / "a").write_bytes(b"x")
    until(lambda: home.status().folders[1].pending == 1, "it watches it", PATIENCE)
    assert daemon.terminate() == 0
    assert "Traceback" not in home.log()


@pytest.mark.parametrize(
    ("listen", "expected"), [("", "::"), ('listen = "0.0.0.0:0"', "0.0.0.0")]
)
def test_it_listens_at_all_addresses_unless_told_otherwise(
    home: Home, listen: str, expected: str
) -> None:
    """A machine without IPv6 has only those of IPv4."""
    if not socket.has_dualstack_ipv6():
        expected = "0.0.0.0"
    text = home.config.read_text()
    home.config.write_text(text.replace('listen = "127.0.0.1:0"', listen))
    daemon = home.start()
    # It answers before it listens.
    until(lambda: "SOCKS5 listener on " in home.log(), "it listens", PATIENCE)
    assert f"SOCKS5 listener on {expected} port " in home.log()
    assert daemon.terminate() == 0


def test_systemd_is_told_how_it_is_doing(home: Home) -> None:
    """Also that a reload is one: what it took for our end it would enforce."""
    told: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(home.path / "notify"))
        systemd.settimeout(PATIENCE)

        def hear(wanted: bytes) -> None:
            while not told or not told[-1].startswith(wanted):
                told.append(systemd.recv(4096))

        daemon = home.start(NOTIFY_SOCKET=str(home.path / "notify"), WATCHDOG_USEC="200000")
        hear(b"READY=1")
        hear(b"WATCHDOG=1")
        daemon.signal(signal.SIGHUP)
        hear(b"RELOADING=1\nMONOTONIC_USEC=")
        hear(b"READY=1")
        hear(b"WATCHDOG=1")
        assert b"STOPPING=1" not in told
        daemon.signal(signal.SIGTERM)
        hear(b"STOPPING=1")
        assert daemon.wait() == 0


def test_its_resource_stays_the_same(home: Home) -> None:
    """So that an offer finds us again; it is made once, of ASCII."""
    home.config.write_text(home.config.read_text().replace("/test", ""))
    home.start().terminate()
    resource = (home.path / "state" / "resource").read_text()
    assert resource.startswith("syncd-")
    home.start().terminate()
    assert (home.path / "state" / "resource").read_text() == resource
