"""``syncctl demo``: a server and two daemons on this machine, and files that go across.

Everything is real but the network: two ``syncd`` processes, their configurations, XMPP with
TLS. It lives in a temporary directory and on the loopback interface, and leaves nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from blake3 import blake3
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from syncd.cli import output
from syncd.cli.exits import Exit
from syncd.control.client import ask
from syncd.control.escape import printable
from syncd.control.messages import Status, StatusRequest
from syncd.control.summary import amount, outstanding, quantity
from syncd.demo.login import EVERYTHING
from syncd.demo.server import open_server
from syncd.errors import ControlError, SyncdError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

DOMAIN = "demo.example"  # RFC 2606: nobody's
NAMES = ("alice", "bob")

# A path of a Unix socket must fit into sockaddr_un, its final zero included.
_MAX_SOCKET_PATH = 107  # bytes
_SOCKET = "control.sock"
# The large file lies at both ends, and once more while it arrives.
_COPIES = 3
_SMALL_FILES = 20  # files in the tree
_BLOCK = 1024 * 1024  # bytes
# Between two looks at both daemons; short against a second, long against an answer.
_LOOK = 0.1  # seconds
_ASK_TIMEOUT = 5.0  # seconds
# A daemon that is told to stop says goodbye to its server for at most 2 s.
_STOP_TIMEOUT = 5.0  # seconds
# The end of a daemon's log tells why it ended: a screenful, even of long lines.
_LOG_TAIL = 15  # lines
_LOG_TAIL_BYTES = 16_384

# What would make the children talk to somebody else's systemd.
_NOT_INHERITED = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})

_NEXT = """
Now with accounts of your own (any XMPP server will do). On one machine, in config.toml:

    [account]
    jid = "you@example.org"
    password_file = "password"        # chmod 600

    [[folder]]
    id = "photos"
    path = "/srv/photos"
    send_to = ["friend@example.net"]
    accept_from = ["friend@example.net"]

On the other the same, with the two addresses exchanged. Then, on both:

    syncd --config config.toml
    syncctl --config config.toml status
"""


class DemoError(SyncdError):
    """The demo did not come to its good end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the tests do differently.

    Attributes:
      daemon: The command that runs a daemon, up to ``--config``.
      size: Length of the large file, bytes.
      deadline: For everything up to the last file, seconds.
    """

    daemon: tuple[str, ...] = (sys.executable, "-m", "syncd")
    size: int = 200 * _BLOCK
    deadline: float = 60.0


@dataclass(frozen=True, slots=True)
class Party:
    """One of the two, and where everything of it lies.

    Attributes:
      name: Its localpart.
      home: Its part of the temporary directory.
    """

    name: str
    home: Path

    @property
    def folder(self) -> Path:
        """What it shares."""
        return self.home / "folder"

    @property
    def config(self) -> Path:
        """Its config.toml."""
        return self.home / "config.toml"

    @property
    def socket(self) -> Path:
        """Where it is controlled."""
        return self.home / _SOCKET

    @property
    def log(self) -> Path:
        """What it says."""
        return self.home / "log"


@dataclass(frozen=True, slots=True)
class Drop:
    """Something that is dropped into the folder at once: a file or a tree.

    Attributes:
      name: In the folder.
      title: As people are told of it.
      files: Length in bytes by path within the folder.
    """

    name: str
    title: str
    files: dict[str, int]


def run(*, keep: bool) -> int:
    """Run the demo.

    Args:
      keep: Let it run afterwards, until Ctrl-C.

    Returns:
      The exit code.

    Raises:
      SyncdError: There is no room for it.
    """
    return run_demo(Setup(), keep=keep)


def run_demo(setup: Setup, *, keep: bool) -> Exit:
    """Run the demo as set up; see `run`."""
    with tempfile.TemporaryDirectory(
        prefix="syncd-", dir=find_room(_COPIES * setup.size), ignore_cleanup_errors=True
    ) as name:
        directory, code = Path(name), Exit.FAILED
        try:
            code = trio.run(partial(_main, setup, directory, keep=keep))
        except* SyncdError as group:
            _report(_leaf(group), directory)
        except* (BrokenPipeError, SystemExit):
            pass  # nobody reads on (rich ends the program then); the clean-up is done
        return code


def find_room(size: int) -> str:
    """Find where temporary files may lie: with room for them, and for a socket's path.

    Raises:
      DemoError: There is no such place.
    """
    places = dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp"))  # noqa: S108 - mkdtemp is called there
    longest = f"/syncd-{'x' * 8}/{NAMES[0]}/{_SOCKET}"
    for place in places:
        fits = len(os.fsencode(place + longest)) < _MAX_SOCKET_PATH
        if fits and os.access(place, os.W_OK) and shutil.disk_usage(place).free >= size:
            return place
    raise DemoError(
        f"the demo needs {amount(size)} for a moment, and there is no room in "
        f"{' or '.join(places)}",
        hint="name a directory with room: TMPDIR=/some/where syncctl demo",
    )


async def _main(setup: Setup, directory: Path, *, keep: bool) -> Exit:
    code = Exit.INTERRUPTED
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                await anext(signals)
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop_on_signal)
            code = await _show(setup, directory, keep=keep)
            nursery.cancel_scope.cancel()
    return code


async def _show(setup: Setup, directory: Path, *, keep: bool) -> Exit:
    start = trio.current_time()
    passwords = {name: secrets.token_urlsafe(16) for name in NAMES}
    alice, bob = (Party(name, directory / name) for name in NAMES)
    async with open_server(domain=DOMAIN, accounts=passwords, abilities=EVERYTHING) as server:
        for party, peer in ((alice, bob), (bob, alice)):
            prepare(party, peer.name, passwords[party.name], server.port, server.ca_pem)
        print("Two daemons and an XMPP server, all on this machine, and gone at the end:")
        print(f"  alice sends what is in     {alice.folder}")
        print(f"  bob receives it in         {bob.folder}")
        print(f"  {DOMAIN} listens on  127.0.0.1:{server.port}", flush=True)
        async with _running(alice, setup.daemon), _running(bob, setup.daemon):
            deadline = start + setup.deadline
            await _until_online((alice, bob), deadline)
            print(f"Both are online after {trio.current_time() - start:.1f} s.")
            await _deliver(alice, bob, setup.size, directory / "staging", deadline)
            for party in (alice, bob):
                print(f"\n{party.name}$ syncctl status")
                status = await _status(party)
                if status is not None:
                    output.print_status(
                        status, file=sys.stdout, environ=os.environ, now=datetime.now(UTC)
                    )
            if keep:
                await _keep(alice, bob)
    print(_NEXT, end="")
    return Exit.OK


async def _keep(alice: Party, bob: Party) -> None:
    print(
        f"\nDrop files into {alice.folder}\nand see them in  {bob.folder}\n"
        f"How it is doing: syncctl --socket {alice.socket} status\n"
        "Ctrl-C ends it, and removes everything.",
        flush=True,
    )
    await trio.sleep_forever()


def prepare(party: Party, peer: str, password: str, port: int, ca_pem: bytes) -> None:
    """Write everything that a daemon needs; alice sends, bob receives."""
    party.folder.mkdir(parents=True)
    secret = party.home / "password"
    secret.touch(mode=0o600)
    secret.write_text(f"{password}\n")
    ca_file = party.home / "ca.pem"
    ca_file.write_bytes(ca_pem)
    role = "send_to" if party.name == NAMES[0] else "accept_from"
    party.config.write_text(
        textwrap.dedent(f"""\
            [account]
            jid = "{party.name}@{DOMAIN}"
            password_file = {_toml(secret)}
            server = "127.0.0.1:{port}"
            tls = "starttls"
            ca_file = {_toml(ca_file)}

            [state]
            dir = {_toml(party.home / "state")}

            [control]
            socket = {_toml(party.socket)}

            [bytestreams]
            listen = "127.0.0.1:0"
            advertise = ["127.0.0.1:0"]
            proxies = []

            [transfer]
            encryption = "preferred"

            [[folder]]
            id = "demo"
            path = {_toml(party.folder)}
            {role} = ["{peer}@{DOMAIN}"]
            """)
    )


def _toml(path: Path) -> str:
    return json.dumps(str(path))  # TOML's basic strings have JSON's escapes


@asynccontextmanager
async def _running(party: Party, command: tuple[str, ...]) -> AsyncIterator[None]:
    """Have a daemon run; its death is an error, our end is its end."""
    with party.log.open("ab") as log:
        process = await trio.lowlevel.open_process(
            [*command, "--config", str(party.config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={k: v for k, v in os.environ.items() if k not in _NOT_INHERITED},
            start_new_session=True,  # Ctrl-C is for us; we tell it then
        )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, party, process)
            yield
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(_STOP_TIMEOUT, shield=True):
            process.terminate()
            await process.wait()
        if process.returncode is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def _watch(party: Party, process: trio.Process) -> None:
    code = await process.wait()
    raise DemoError(f"{party.name}'s daemon ended by itself, with exit code {code}")


async def _until_online(parties: tuple[Party, ...], deadline: float) -> None:
    """Wait until both daemons are connected and see each other."""
    while True:
        statuses = [await _status(party) for party in parties]
        if all(status is not None and _sees_its_peers(status) for status in statuses):
            return
        if trio.current_time() >= deadline:
            raise DemoError(f"the daemons did not find each other: {_summaries(statuses)}")
        await trio.sleep(_LOOK)


def _sees_its_peers(status: Status) -> bool:
    return status.connection.state == "connected" and all(p.online for p in status.peers)


async def _status(party: Party) -> Status | None:
    """Ask a daemon how it is; None if it does not answer."""
    question = partial(ask, party.socket, StatusRequest(), timeout=_ASK_TIMEOUT)
    try:
        return await trio.to_thread.run_sync(question, abandon_on_cancel=True)
    except ControlError:
        return None


def _summaries(statuses: list[Status | None]) -> str:
    return "; ".join(
        f"{name}: {status.summary if status else 'no answer'}"
        for name, status in zip(NAMES, statuses, strict=True)
    )


async def _deliver(alice: Party, bob: Party, size: int, staging: Path, deadline: float) -> None:
    """Drop files at alice's end, and see that they come out at bob's."""
    drops = await trio.to_thread.run_sync(make_files, staging, size)
    start = trio.current_time()
    for drop in drops:
        # On one file system a file is there at once and whole, so it need not settle.
        (staging / drop.name).rename(alice.folder / drop.name)
    print(
        f"Dropped into alice's folder: {', '.join(drop.title for drop in drops)}.", flush=True
    )
    files = {path: length for drop in drops for path, length in drop.files.items()}
    await _until_delivered(alice, bob, drops, start, deadline)
    took = trio.current_time() - start
    differing = await trio.to_thread.run_sync(compare, alice.folder, bob.folder, list(files))
    if differing:
        raise DemoError(f"bob's {printable(differing[0])} is not what alice sent")
    total = sum(files.values())
    print(
        f"All {quantity(len(files), 'file')} are at bob's, the same to the last bit: "
        f"{amount(total)} in {took:.1f} s, {amount(round(total / max(took, 0.001)))}/s."
    )


async def _until_delivered(
    alice: Party, bob: Party, drops: list[Drop], start: float, deadline: float
) -> None:
    """Wait until everything has arrived, and alice knows it; tell what arrives."""
    waiting = list(drops)
    with _bars(sum(sum(drop.files.values()) for drop in drops)) as show:
        while True:
            statuses = [await _status(party) for party in (alice, bob)]
            missing, there = await trio.to_thread.run_sync(_look, waiting, drops, bob.folder)
            for drop in waiting:
                if drop not in missing:
                    print(f"  {trio.current_time() - start:4.1f} s  {drop.title}", flush=True)
            waiting = missing
            show(*(there + _moving(status) for status in statuses))
            if not waiting and statuses[0] is not None and not outstanding(statuses[0]):
                return
            if trio.current_time() >= deadline:
                raise DemoError(f"not everything arrived in time: {_summaries(statuses)}")
            await trio.sleep(_LOOK)


def _look(waiting: list[Drop], drops: list[Drop], folder: Path) -> tuple[list[Drop], int]:
    """What is not all there, and how many bytes are."""
    there = {path for drop in drops for path in drop.files if (folder / path).exists()}
    missing = [drop for drop in waiting if not there.issuperset(drop.files)]
    return missing, sum(
        length for drop in drops for path, length in drop.files.items() if path in there
    )


def _moving(status: Status | None) -> int:
    return sum(transfer.offset for transfer in status.transfers) if status else 0


@contextmanager
def _bars(total: int) -> Iterator[Callable[[int, int], None]]:
    """Show two bars on a terminal, and nothing elsewhere.

    Args:
      total: Length of all files, bytes.

    Yields:
      Takes how many bytes alice has sent, and how many bob has.
    """
    if not sys.stdout.isatty():
        yield lambda _, __: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(), transient=True) as progress:
        alice = progress.add_task("alice sends", total=total)
        bob = progress.add_task("bob receives", total=total)
        furthest = {alice: 0, bob: 0}

        def show(sent: int, received: int) -> None:
            for task, done in ((alice, sent), (bob, received)):
                # Between its last byte and its final name a file is in neither count.
                furthest[task] = max(furthest[task], min(done, total))
                progress.update(task, completed=furthest[task])

        yield show


def make_files(staging: Path, size: int) -> list[Drop]:
    """Make what will be dropped, outside the folder: a small file, a tree, a large file.

    Args:
      staging: A directory to be made, on the folder's file system.
      size: Length of the large file, bytes.
    """
    staging.mkdir()
    files = {"hello.txt": b"Hello Bob,\nyou need no cloud for this.\n"}
    for number in range(_SMALL_FILES):
        path = f"album/{2001 + number % 4}/{number:02}.txt"
        files[path] = f"picture {number}\n".encode() * 100 * number  # one is empty
    for path, content in files.items():
        place = staging / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    _write_large(staging / "film.bin", size)
    lengths = {path: len(content) for path, content in files.items()}
    hello = lengths.pop("hello.txt")
    return [
        Drop("hello.txt", "hello.txt", {"hello.txt": hello}),
        Drop("album", f"album/ ({_SMALL_FILES} files)", lengths),
        Drop("film.bin", f"film.bin ({amount(size)})", {"film.bin": size}),
    ]


def _write_large(path: Path, size: int) -> None:
    """Random bytes, but not as slowly: each block is numbered, so no two are the same."""
    block = bytearray(secrets.token_bytes(_BLOCK))
    with path.open("wb") as file:
        for start in range(0, size, _BLOCK):
            block[:8] = start.to_bytes(8, "big")
            file.write(block[: size - start])


def compare(one: Path, other: Path, paths: list[str]) -> list[str]:
    """Which of the files are not the same below both directories."""
    return [path for path in paths if _digest(one / path) != _digest(other / path)]


def _digest(path: Path) -> bytes:
    return blake3().update_mmap(path).digest()


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _report(error: BaseException, directory: Path) -> None:
    """Say what went wrong, and what the daemons said last."""
    print(f"syncctl: {printable(str(error))}", file=sys.stderr)
    for name in NAMES:
        lines = _tail(Party(name, directory / name).log)
        if lines:
            print(f"{name}'s log ends:", file=sys.stderr)
            for line in lines:
                print(f"  {printable(line)}", file=sys.stderr)


def _tail(log: Path) -> list[str]:
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        text = file.read().decode(errors="backslashreplace")
    return text.splitlines()[-_LOG_TAIL:]
