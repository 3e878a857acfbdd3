"""Real syncd daemons for tests, each a process of its own with its own little world."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from syncd.control.client import ask
from syncd.control.messages import PingRequest, StatusRequest
from syncd.errors import ControlError
from tests.support.processes import Process, until
from tests.support.servers import DOMAIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from syncd.control.messages import PeerStatus, Status
    from tests.support.servers import Server

# How long a daemon may take until it answers: 0.5 s on an idle machine, most of it imports.
START_TIMEOUT = 30.0  # seconds

# How long a daemon may take to say goodbye behind a test; a test may have left it hanging.
_GOODBYE_TIMEOUT = 5.0  # seconds

# How long the daemon may take for one answer.
_ASK_TIMEOUT = 10.0  # seconds

# How long a delivery may take, with all reconnecting and trying again.
DELIVERY_TIMEOUT = 60.0  # seconds

# A file written in place is sent soon; the default would only make the tests slower.
SETTLE = 0.1  # seconds

_CONFIG = """\
[account]
jid = {jid}
password_file = {password_file}
{account}
[state]
dir = {state}
[control]
socket = {socket}
[bytestreams]
{listening}
{bytestreams}
[[folder]]
id = "shared"
path = {folder}
send_to = {send_to}
accept_from = {accept_from}
settle = {settle}
"""


class Daemon:
    """One daemon, and the folder that it watches.

    Args:
      user: Whose account it uses.
      directory: For everything of it; short, for the socket's sake.
      config: What its configuration says.
      inside: A command that runs another one, in a network of its own.

    Attributes:
      user: As given.
      folder: The one that it watches.
      config_file: Its configuration; may be changed until it is started.
      socket: Its control socket.
      process: The daemon itself.
    """

    def __init__(
        self, user: str, directory: Path, config: str, inside: Sequence[str] = ()
    ) -> None:
        self.user = user
        self.folder = directory / "folder"
        self.config_file = directory / "config.toml"
        self.socket = directory / "control" / "control.sock"
        self.config_file.write_text(config, encoding="utf-8")
        self.process = Process(
            f"syncd of {user}",
            [
                *inside,
                sys.executable,
                "-m",
                "syncd",
                "--verbose",
                "--config",
                str(self.config_file),
            ],
            log_file=directory / "log",
            env=_environment(directory),
        )

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process.spawn()

        def answers() -> bool:
            self.process.check_running()
            try:
                return ask(self.socket, PingRequest(), timeout=_ASK_TIMEOUT).pid > 0
            except ControlError:
                return False

        until(answers, f"{self.process.name} answers", START_TIMEOUT)

    def terminate(self) -> int:
        """Stop it as systemd does.

        Returns:
          Its exit code.
        """
        return self.process.terminate()

    def kill9(self) -> None:
        """End it as a power cut would."""
        self.process.kill()

    def status(self) -> Status:
        """How it says everything stands."""
        return ask(self.socket, StatusRequest(), timeout=_ASK_TIMEOUT)

    def peer(self, user: str) -> PeerStatus:
        """What it says of one peer."""
        jid = f"{user}@{DOMAIN}"
        [peer] = [peer for peer in self.status().peers if peer.jid == jid]
        return peer

    def wait_connected(self) -> None:
        """Wait until it is logged in."""
        until(
            lambda: self.status().connection.state == "connected",
            f"{self.process.name} is connected",
        )

    def wait_delivered(self, timeout: float = DELIVERY_TIMEOUT) -> None:
        """Wait until nothing is owed, files dropped just before included."""
        done = self.ctl("wait", "--timeout", str(timeout))
        assert done.returncode == 0, f"syncctl wait: {done.returncode}: {done.stderr}"

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run syncctl, as installed, on this daemon."""
        return subprocess.run(
            [Path(sys.executable).with_name("syncctl"), "--socket", self.socket, *arguments],
            capture_output=True,
            text=True,
            timeout=2 * DELIVERY_TIMEOUT,
            env=_environment(self.folder.parent),
            check=False,
        )

    def drop(self, path: str, content: bytes) -> Path:
        """Put a whole file into the folder at once, by renaming it into place."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        made = self.folder.parent / "being-written"
        made.write_bytes(content)
        return made.rename(file)


class Daemons:
    """Makes daemons, and ends those that still run.

    Args:
      directory: For everything of theirs.
      watched: Gets each process, for the reports of failures.
    """

    def __init__(self, directory: Path, watched: list[Process]) -> None:
        self._directory = directory
        self._watched = watched
        self._made: list[Daemon] = []

    def make(
        self,
        user: str,
        server: Server | None,
        *,
        send_to: Sequence[str] = (),
        accept_from: Sequence[str] = (),
        password: str | None = None,
        listen: int = 0,
        advertise: int = 0,
        only_direct: bool = False,
        bytestreams: str = "",
        inside: Sequence[str] = (),
        extra: str = "",
    ) -> Daemon:
        """Make a daemon with one folder; it is not started.

        Args:
          user: Whose account, one of the server's.
          server: None: a port where nobody listens.
          send_to: Users that get what is dropped into the folder.
          accept_from: Users whose files land in it.
          password: Instead of the right one.
          listen: Port for direct connections; 0 is any.
          advertise: Port that peers are told; 0 is that of the listener.
          only_direct: No bytes go by proxies or through the server.
          bytestreams: More of that part of the configuration.
          inside: A command that runs another one, in a network of its own; there the daemon
            listens everywhere, and offers the addresses that it finds.
          extra: More of the configuration, at its end.
        """
        # One folder of its own for each, also for two of one user.
        home = self._directory / f"{len(self._made)}{user[0]}"
        home.mkdir()
        (home / "folder").mkdir()
        for private in ("state", "control"):
            (home / private).mkdir(mode=0o700)
        secret = home / "password"
        secret.touch(mode=0o600)
        secret.write_text(password or (server.password(user) if server else "none"))
        account = [
            f'server = "{_at(server.host)}:{server.port}"'
            if server
            else 'server = "127.0.0.1:1"'
        ]
        account += ['tls = "starttls"']
        account += [f"ca_file = {_toml(server.ca_file)}"] if server else []
        made = Daemon(
            user,
            home,
            _CONFIG.format(
                # A resource that is always the same: a session that the server keeps for a
                # killed daemon of an earlier test is taken over, and cannot pass for a peer.
                jid=_toml(f"{user}@{DOMAIN}/test"),
                password_file=_toml(secret),
                account="\n".join(account),
                state=_toml(home / "state"),
                socket=_toml(home / "control" / "control.sock"),
                listening=f'listen = "0.0.0.0:{listen}"'
                if inside
                else f'listen = "127.0.0.1:{listen}"\nadvertise = ["127.0.0.1:{advertise}"]',
                bytestreams=bytestreams + ("proxies = []\nibb = false" if only_direct else ""),
                folder=_toml(home / "folder"),
                send_to=_toml([f"{peer}@{DOMAIN}" for peer in send_to]),
                accept_from=_toml([f"{peer}@{DOMAIN}" for peer in accept_from]),
                settle=SETTLE,
            )
            + extra,
            inside,
        )
        self._made.append(made)
        self._watched.append(made.process)
        return made

    def end_all(self) -> None:
        """End all that still run.

        In peace: the server keeps the session of one that is killed (XEP-0198), and shows it
        to the next test as a peer who is there.
        """
        running = [daemon.process for daemon in self._made if daemon.process.running]
        for process in running:
            process.signal(signal.SIGTERM)
        for process in running:
            with contextlib.suppress(AssertionError):  # one that hangs is killed
                process.wait(_GOODBYE_TIMEOUT)
        for daemon in self._made:
            daemon.kill9()


def digests(root: Path) -> dict[str, str]:
    """Tell what all files below a folder hold, hidden ones and leftovers included.

    A daemon may be at work there: what it renames or deletes between the listing and the look
    is not there any more.

    Returns:
      SHA-256 by relative path.
    """
    found = {}
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
                found[path.relative_to(root).as_posix()] = digest.hexdigest()
    return found


def identities(root: Path) -> dict[str, tuple[int, int, int]]:
    """Tell which files lie below a folder: other numbers mean that somebody wrote there.

    What vanishes meanwhile is not there, as with `digests`.

    Returns:
      Inode, and nanoseconds of the last change of content and of inode, by relative path.
    """
    found = {}
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                seen = path.stat()
                numbers = seen.st_ino, seen.st_mtime_ns, seen.st_ctime_ns
                found[path.relative_to(root).as_posix()] = numbers
    return found


def _environment(home: Path) -> dict[str, str]:
    """Nothing of the user's own configuration."""
    return {
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PATH": os.environ.get("PATH", os.defpath),
        # A warning about a coroutine never awaited or a file never closed is in the log.
        "PYTHONWARNINGS": "default",
    }


def _at(host: str) -> str:
    """As it stands in front of a port."""
    return f"[{host}]" if ":" in host else host


def _toml(value: object) -> str:
    # What JSON and TOML both know, they write the same way.
    return json.dumps(str(value) if isinstance(value, Path) else value)
