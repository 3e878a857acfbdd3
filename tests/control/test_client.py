"""What the client finds out alone; with a real server see test_server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import zmq

from syncd.control import lock
from syncd.control.client import ask
from syncd.control.messages import PingRequest, Pong, Reply, Request, Rescanned, encode_reply
from syncd.control.server import serve
from syncd.errors import ControlError, ErrorType, NotRunningError

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534

# Everything is imported before the rights are given up: the interpreter and its packages
# may lie where others cannot read.
BECOME = """
import os, pathlib, sys, zmq
from syncd.control.client import ask
from syncd.control.messages import PingRequest, encode_request
from syncd.errors import ControlError
user, path, patience = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
os.setgroups([])
os.setgid(user)
os.setuid(user)
"""
ASK = """
try:
    ask(pathlib.Path(path), PingRequest(), timeout=patience)
except ControlError as error:
    print(type(error).__name__, error.type, error, sep="|")
"""
TALK = """
with zmq.Context() as context, context.socket(zmq.REQ) as socket:
    socket.linger = 0
    socket.connect(f"ipc://{path}")
    socket.send(encode_request(PingRequest()))
    print(socket.poll(patience))
"""

# In a process of its own, since pytest and coverage trace as well. The server is the real one.
INTERRUPT = """
import os, pathlib, signal, sys, tempfile, threading, trio
from syncd.control.client import ask
from syncd.control.messages import PingRequest, Pong
from syncd.control.server import serve

def interrupted_at(line):
    left = line
    def trace(frame, event, argument):
        nonlocal left
        left -= event == "line"
        if left == 0:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace
    sys.settrace(trace)
    try:
        ask(path, PingRequest(), timeout=10)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    assert left > 0, f"swallowed before line {line}"
    return False

async def answer(request):
    return Pong(version="1", pid=os.getpid())

async def server():
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, answer)
        serving.set()
        await trio.to_thread.run_sync(done.wait)
        nursery.cancel_scope.cancel()

path = pathlib.Path(tempfile.mkdtemp(), "control.sock")
serving, done = threading.Event(), threading.Event()
thread = threading.Thread(target=trio.run, args=(server,))
thread.start()
serving.wait()
line = 1
while interrupted_at(line):
    line += 1
done.set()
thread.join()
print(line)
"""


async def run_as(user: int, code: str, path: Path, patience: int) -> str:
    """Run code as somebody else and return what it prints."""
    process = await trio.run_process(
        [sys.executable, "-c", BECOME + code, str(user), path, str(patience)],
        capture_stdout=True,
    )
    return process.stdout.decode()


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Hold the lock of a socket, as a daemon does."""
    fd = lock.take(path)
    assert fd is not None
    try:
        yield fd
    finally:
        if lock.holder(path) is not None:
            lock.release(fd, path)


@contextmanager
def bound(path: Path, reply: bytes) -> Iterator[None]:
    """A daemon that answers one request with whatever we like."""
    with zmq.Context() as context, context.socket(zmq.REP) as rep:
        rep.linger = 0
        rep.rcvtimeo = 30_000
        rep.bind(f"ipc://{path}")

        def answer() -> None:
            rep.recv()
            rep.send(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()


def test_no_daemon_is_told_at_once_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="is not running") as info:
        ask(tmp_path / "none" / "control.sock", PingRequest(), timeout=30)

    assert info.value.hint == "start it with: syncd --config FILE, or: systemctl start syncd"


def test_the_socket_of_a_dead_daemon_is_not_running(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    lock.lock_path(path).write_text("1\n")

    with pytest.raises(NotRunningError, match="is not running"):
        ask(path, PingRequest(), timeout=30)


def test_a_daemon_that_hangs_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as mute, held(path):
        mute.bind(str(path))
        mute.listen()

        with pytest.raises(ControlError, match=rf"\(process {os.getpid()}\) runs") as info:
            ask(path, PingRequest(), timeout=0.3)

    assert info.value.type is ErrorType.WAIT
    assert "restart it" in info.value.hint


def test_a_daemon_that_never_makes_its_socket_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with held(path), pytest.raises(ControlError, match="has not answered") as info:
        ask(path, PingRequest(), timeout=0.3)

    assert info.value.type is ErrorType.WAIT


def test_a_daemon_that_dies_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as mute, held(path) as fd:
        mute.bind(str(path))
        mute.listen()
        dying = threading.Timer(0.1, lock.release, (fd, path))
        dying.start()

        with pytest.raises(NotRunningError, match="stopped before it answered"):
            ask(path, PingRequest(), timeout=30)
        dying.join()


def test_a_daemon_that_was_restarted_meanwhile_is_noticed(tmp_path: Path) -> None:
    """The new one has never seen the question, so nobody will answer it."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as mute, held(path) as fd:
        mute.bind(str(path))
        mute.listen()

        def restart() -> None:
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"1\n", 0)

        timer = threading.Timer(0.1, restart)
        timer.start()

        with pytest.raises(NotRunningError, match="was restarted"):
            ask(path, PingRequest(), timeout=30)
        timer.join()


def test_a_file_in_the_socket_s_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    path.touch()

    with held(path), pytest.raises(ControlError, match="is not a socket"):
        ask(path, PingRequest(), timeout=30)


def test_a_path_through_a_file_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ControlError, match="Not a directory"):
        ask(tmp_path / "file" / "control.sock", PingRequest(), timeout=30)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"garbage", "does not understand"),
        (encode_reply(Rescanned(files=1)), "something else"),
    ],
)
def test_an_answer_that_makes_no_sense(tmp_path: Path, reply: bytes, said: str) -> None:
    path = tmp_path / "control.sock"
    with held(path), bound(path, reply), pytest.raises(ControlError, match=said):
        ask(path, PingRequest(), timeout=30)


async def pong(request: Request) -> Reply:
    await trio.lowlevel.checkpoint()
    return Pong(version=str(request), pid=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", [0o700, 0o755])
async def test_who_may_not_ask_is_told_so(mode: int) -> None:
    """Neither where the directory keeps others out, nor where it lets them look."""
    top = Path(tempfile.mkdtemp())  # pytest's own are closed to others further up
    top.chmod(0o755)
    path = top / "run" / "control.sock"
    path.parent.mkdir()
    path.parent.chmod(mode)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, pong)
        for file in path.parent.iterdir() if mode == 0o755 else ():
            file.chmod(0o666)  # as if a umask had opened everything

        printed = await run_as(NOBODY, ASK, path, 30)

        name, kind, text = printed.split("|")
        assert (name, kind) == ("ControlError", "auth")
        assert text.startswith("not permitted")
        nursery.cancel_scope.cancel()
    path.parent.rmdir()
    top.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_another_user_gets_no_answer_even_through_an_open_socket() -> None:
    """The kernel's word for the uid decides, should file modes ever fail."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    path = top / "control.sock"
    answers = []
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, pong)
        path.chmod(0o777)
        # First as root, with patience: the same lines do get an answer.
        for user, patience in ((0, 30_000), (NOBODY, 500)):  # milliseconds
            answers.append(await run_as(user, TALK, path, patience))
        nursery.cancel_scope.cancel()
    top.rmdir()

    assert answers == ["1\n", "0\n"]


def test_ctrl_c_at_any_moment_ends_the_question_and_nothing_hangs() -> None:
    """Inside of ZeroMQ's constructors, too, where it once left a socket that nobody closed."""
    command = [sys.executable, "-c", INTERRUPT]
    answered = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert answered.stderr == ""
    # Locking and looking come first; what is ZeroMQ's has some hundred lines.
    assert int(answered.stdout) > 100
