"""The real ``syncctl`` as a process, against a real control server with scripted answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from syncd import __version__
from syncd.cli.exits import MEANINGS
from syncd.control.messages import Pong, Reply, Request, Rescanned, RescanRequest, StatusRequest
from syncd.control.server import serve
from syncd.errors import JournalError
from tests.support.statuses import BOB, CONNECTION, PHOTOS, SENDING, but, status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from syncd.control.messages import Status

SYNCCTL = [sys.executable, "-m", "syncd.cli.main"]

OWED = status(peers=(but(BOB, pending=1, online=False),))
PARKED = status(peers=(but(BOB, pending=1, parked=1, last_error="no room"),))
UNAUTHORIZED = status(
    connection=but(CONNECTION, state="unauthorized", reason="the password is wrong"),
    peers=(but(BOB, pending=1),),
)


class Daemon:
    """Answers with one status after the other, the last one for ever.

    Attributes:
      asked: The types of the requests so far.
    """

    def __init__(self, *script: Status) -> None:
        self._script = list(script)
        self.asked: list[str] = []

    async def answer(self, request: Request) -> Reply:
        await trio.lowlevel.checkpoint()
        self.asked.append(type(request).__name__)
        match request:
            case StatusRequest():
                return self._script.pop(0) if self._script[1:] else self._script[0]
            case RescanRequest():
                return Rescanned(files=1)
            case _:
                return Pong(version="0.1.0", pid=1)


async def syncctl(*args: str | Path) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        [*SYNCCTL, *args], capture_stdout=True, capture_stderr=True, check=False
    )


async def against(
    answer: Callable[[Request], Awaitable[Reply]], path: Path, *args: str
) -> tuple[int, str, str]:
    """Run syncctl against a server; returns its exit code, stdout and stderr."""
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, answer)
        done = await syncctl("--socket", path, *args)
        nursery.cancel_scope.cancel()
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


@pytest.mark.parametrize(
    ("seen", "code"), [(status(), 0), (OWED, 4), (PARKED, 4), (UNAUTHORIZED, 6)]
)
async def test_status_says_how_it_stands_by_its_first_line_and_exit_code(
    path: Path, seen: Status, code: int
) -> None:
    returned, out, err = await against(Daemon(seen).answer, path, "status")

    assert (returned, out.splitlines()[0], err) == (code, seen.summary, "")


async def test_status_json_is_the_contract_s_object(path: Path) -> None:
    seen = status(transfers=(SENDING,))

    returned, out, err = await against(Daemon(seen).answer, path, "status", "--json")

    assert (returned, err) == (0, "")
    shown = json.loads(out)
    assert shown["summary"] == "OK: all 12,481 files delivered"
    assert shown["transfers"][0]["size"] == SENDING.size
    assert shown["started"] == "2031-05-01T12:00:00Z"


async def test_wait_rescans_first_and_returns_when_nothing_is_owed(path: Path) -> None:
    """A file that is settling, owed, and moving is waited for in turn."""
    settling = status(folders=(but(PHOTOS, settling=1),))
    daemon = Daemon(settling, OWED, status(transfers=(SENDING,)), status())

    assert await against(daemon.answer, path, "wait") == (0, "", "")
    assert daemon.asked == ["PingRequest", "RescanRequest", *["StatusRequest"] * 4]


async def test_wait_gives_up_after_its_timeout_and_says_for_what(path: Path) -> None:
    returned, out, err = await against(Daemon(OWED).answer, path, "wait", "--timeout", "0.5")

    assert (returned, out) == (3, "")
    assert err == (
        "syncctl: not everything is delivered after 0.5 s: "
        "WAITING: 1 file for bob@example.org, offline\n"
    )


async def test_wait_gives_up_on_a_scan_that_takes_longer_than_its_timeout(path: Path) -> None:
    daemon = Daemon(status())

    async def answer(request: Request) -> Reply:
        if isinstance(request, RescanRequest):
            await trio.sleep_forever()
        return await daemon.answer(request)

    returned, out, err = await against(answer, path, "wait", "--timeout", "0.5")

    assert (returned, out) == (3, "")
    assert err == "syncctl: the folders were not looked through within 0.5 s\n"


@pytest.mark.parametrize(("seen", "code"), [(PARKED, 1), (UNAUTHORIZED, 6)])
async def test_wait_ends_when_a_person_must_act(path: Path, seen: Status, code: int) -> None:
    assert await against(Daemon(seen).answer, path, "wait") == (
        code,
        "",
        f"syncctl: {seen.summary}\n",
    )


async def test_wait_needs_no_person_if_nothing_is_owed(path: Path) -> None:
    seen = status(connection=but(CONNECTION, state="unauthorized"))

    assert await against(Daemon(seen).answer, path, "wait") == (0, "", "")


async def test_a_daemon_that_refuses_fails_with_its_reason(path: Path) -> None:
    async def refuse(request: Request) -> Reply:
        raise JournalError("the journal\x1b[2J\nis broken", hint="see the log")

    assert await against(refuse, path, "status") == (
        1,
        "",
        "syncctl: the journal\\x1b[2J\n  is broken\n  hint: see the log\n",
    )


@pytest.mark.parametrize("command", ["status", "status --json", "status --watch", "wait"])
async def test_no_daemon_is_exit_code_8_with_what_to_do(path: Path, command: str) -> None:
    done = await syncctl("--socket", path, *command.split())

    assert (done.returncode, done.stdout) == (8, b"")
    assert done.stderr.decode() == (
        f"syncctl: syncd is not running: nobody serves {path}\n"
        "  hint: start it with: syncd --config FILE, or: systemctl start syncd\n"
    )


async def test_watch_shows_what_happens_until_ctrl_c(path: Path) -> None:
    out = b""
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, Daemon(OWED, status()).answer)
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*SYNCCTL, "--socket", path, "status", "--watch"],
                stdout=subprocess.PIPE,
                check=False,
            )
        )
        assert process.stdout is not None
        while b"OK: all" not in out:
            data = await process.stdout.receive_some()
            assert data != b""
            out += data
        process.send_signal(signal.SIGINT)
        code = await process.wait()
        nursery.cancel_scope.cancel()

    assert code == 130
    assert out.startswith(OWED.summary.encode())


async def test_ctrl_c_in_wait_is_exit_code_130_without_a_traceback(path: Path) -> None:
    daemon = Daemon(OWED)
    polled = trio.Event()

    async def answer(request: Request) -> Reply:
        if daemon.asked.count("StatusRequest"):
            polled.set()
        return await daemon.answer(request)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, answer)
        process: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [*SYNCCTL, "--socket", path, "wait"],
                stderr=subprocess.PIPE,
                check=False,
            )
        )
        await polled.wait()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = await process.stderr.receive_some()
        assert (await process.wait(), said) == (130, b"")
        nursery.cancel_scope.cancel()


async def test_a_reader_that_has_seen_enough_gets_no_traceback(path: Path) -> None:
    """As in ``syncctl status | head -0``: the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, Daemon(status()).answer)
        for style in ([], ["--json"]):
            done = await trio.run_process(
                [*SYNCCTL, "--socket", path, "status", *style],
                stdout=write,
                capture_stderr=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (1, b"")
        nursery.cancel_scope.cancel()
    os.close(write)


async def test_names_the_terminal_cannot_show_do_not_break_the_status(path: Path) -> None:
    seen = status(folders=(but(PHOTOS, id="写真", problem="weg"),))
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, Daemon(seen).answer)
        done = await trio.run_process(
            [*SYNCCTL, "--socket", path, "status"],
            capture_stdout=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            check=False,
        )
        nursery.cancel_scope.cancel()

    assert done.returncode == 4
    assert done.stdout.startswith(b"PROBLEM: folder \\u5199\\u771f: weg\n")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["dance"],
        ["--socket", "a", "--config", "b", "status"],
        ["status", "--json", "--watch"],
        ["wait", "--timeout", "soon"],
        ["wait", "--timeout", "nan"],
        ["wait", "--timeout", "0"],
    ],
)
async def test_a_wrong_command_line_is_exit_code_2(args: list[str]) -> None:
    done = await syncctl(*args)

    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"usage: syncctl")


@pytest.mark.parametrize("args", [["--version"], ["version"]])
async def test_the_version(args: list[str]) -> None:
    done = await syncctl(*args)

    assert (done.returncode, done.stdout.decode()) == (0, f"syncctl {__version__}\n")


async def test_help_lists_the_exit_codes() -> None:
    done = await syncctl("--help")

    shown = done.stdout.decode()
    assert done.returncode == 0
    assert [code for code, text in MEANINGS.items() if f"{code:>3}  {text}" not in shown] == []


CONFIG = """
[account]
jid = "alice@example.org"
password_file = "/nonexistent"

[control]
socket = "{socket}"

[[folder]]
id = "photos"
path = "/srv/photos"
send_to = ["bob@example.org"]
"""


async def test_the_configuration_names_the_socket(path: Path, tmp_path: Path) -> None:
    """What is only the daemon's to read, such as the password, need not be there."""
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(socket=path))
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, Daemon(status()).answer)
        done = await syncctl("--config", config, "status")
        nursery.cancel_scope.cancel()

    assert (done.returncode, done.stderr) == (0, b"")


async def test_a_bad_configuration_is_exit_code_78(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[control]\nsokcet = "/run/x"\n')

    done = await syncctl("--config", config, "status")

    assert (done.returncode, done.stdout) == (78, b"")
    assert b"[control] sokcet: unknown key; did you mean socket?" in done.stderr


async def test_without_a_flag_the_default_socket_is_asked(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, Daemon(status()).answer)
        done = await trio.run_process(
            [*SYNCCTL, "status"],
            capture_stdout=True,
            env={**os.environ, "RUNTIME_DIRECTORY": str(path.parent)},
            check=False,
        )
        nursery.cancel_scope.cancel()

    assert done.returncode == 0
