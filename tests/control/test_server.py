"""The server with real sockets, asked by real clients in threads."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import stat
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import zmq

from syncd.control import lock, server
from syncd.control.client import ask
from syncd.control.messages import (
    MAX_REPLY,
    MAX_REQUEST,
    LimitRequest,
    PingRequest,
    Pong,
    Reply,
    Request,
    Rescanned,
    RescanRequest,
    StatusRequest,
    encode_request,
)
from syncd.errors import (
    ControlError,
    ErrorType,
    JournalError,
    LockedError,
    NotFoundError,
    NotRunningError,
)
from tests.support.statuses import BOB, but, status

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PONG = Pong(version="0.1.0", pid=1)

# A bound for tests that hang, never reached by one that works.
PATIENCE = 30.0  # seconds


async def answer_all(request: Request) -> Reply:
    await trio.lowlevel.checkpoint()
    match request:
        case StatusRequest():
            return status()
        case RescanRequest():
            return Rescanned(files=3)
        case PingRequest():
            return PONG
        case _:
            raise NotFoundError("nobody of that name", hint="look again")


async def test_what_is_not_found_and_what_may_pass_keep_their_meaning(path: Path) -> None:
    """A program tells them apart, by the exit code of syncctl."""

    async def answer(request: Request) -> Reply:
        if isinstance(request, StatusRequest):
            raise JournalError("the disk is full", hint="make room", type=ErrorType.WAIT)
        return await answer_all(request)

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer)
        with pytest.raises(NotFoundError, match="nobody of that name") as missing:
            await ask_in_thread(path, LimitRequest(peer="eve@example.org"))
        with pytest.raises(ControlError, match="the disk is full") as full:
            await ask_in_thread(path, StatusRequest())
        nursery.cancel_scope.cancel()
    assert (missing.value.hint, full.value.hint) == ("look again", "make room")
    assert full.value.type is ErrorType.WAIT


async def ask_in_thread(path: Path, request: Any, timeout: float = PATIENCE) -> Any:
    return await trio.to_thread.run_sync(partial(ask, path, request, timeout=timeout))


async def raw(path: Path, talk: Callable[[zmq.Socket[bytes]], Any]) -> Any:
    """Talk to the server through a bare ZeroMQ socket, in a thread."""

    def run() -> Any:
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.rcvtimeo = int(1000 * PATIENCE)
            dealer.connect(f"ipc://{path}")
            return talk(dealer)

    return await trio.to_thread.run_sync(run)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


async def test_every_command_is_answered(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)

        assert await ask_in_thread(path, StatusRequest()) == status()
        assert await ask_in_thread(path, RescanRequest()) == Rescanned(files=3)
        assert await ask_in_thread(path, PingRequest()) == PONG
        nursery.cancel_scope.cancel()


async def test_only_the_owner_can_reach_the_socket(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)

        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(lock.lock_path(path).stat().st_mode) == 0o600
        nursery.cancel_scope.cancel()


async def test_a_cancelled_server_leaves_no_file(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)
        assert path.exists()
        nursery.cancel_scope.cancel()

    assert list(path.parent.iterdir()) == []
    with pytest.raises(NotRunningError):
        await ask_in_thread(path, PingRequest())


async def test_a_server_can_follow_another(path: Path) -> None:
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, path, answer_all)
            assert await ask_in_thread(path, PingRequest()) == PONG
            nursery.cancel_scope.cancel()


async def test_a_second_server_is_refused_and_the_first_still_answers(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)

        with pytest.raises(LockedError, match=f"process {os.getpid()}") as info:
            await server.serve(path, answer_all)

        assert f"kill {os.getpid()}" in info.value.hint
        assert await ask_in_thread(path, PingRequest()) == PONG
        nursery.cancel_scope.cancel()


async def test_a_glance_at_the_lock_does_not_keep_a_server_from_starting(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A client holds the lock for an instant to see whether anybody else does."""
    path.parent.mkdir(mode=0o700)
    fd = os.open(lock.lock_path(path), os.O_RDWR | os.O_CREAT, 0o600)
    assert lock._locked(fd, fcntl.LOCK_SH)

    started = trio.Event()

    async with trio.open_nursery() as nursery:

        async def start() -> None:
            await nursery.start(server.serve, path, answer_all)
            started.set()

        nursery.start_soon(start)
        await trio.testing.wait_all_tasks_blocked()
        assert not path.exists()
        os.close(fd)
        with trio.fail_after(server._LOCK_PAUSE * server._LOCK_TRIES):
            await started.wait()
        nursery.cancel_scope.cancel()


async def test_the_socket_of_a_killed_daemon_is_replaced(path: Path) -> None:
    code = (
        "import os, pathlib, sys, trio; from syncd.control.server import serve\n"
        "async def main():\n"
        "  async with trio.open_nursery() as nursery:\n"
        "    await nursery.start(serve, pathlib.Path(sys.argv[1]), None)\n"
        "    os.write(1, b'serving')\n"
        "trio.run(main)"
    )
    async with trio.open_nursery() as nursery:
        daemon: trio.Process = await nursery.start(
            partial(
                trio.run_process,
                [sys.executable, "-c", code, path],
                stdout=-1,
                check=False,
            )
        )
        assert daemon.stdout is not None
        assert await daemon.stdout.receive_some() == b"serving"
        with pytest.raises(LockedError, match=f"process {daemon.pid}"):
            await server.serve(path, answer_all)
        daemon.send_signal(signal.SIGKILL)
    assert stat.S_ISSOCK(path.lstat().st_mode)
    with pytest.raises(NotRunningError):
        await ask_in_thread(path, PingRequest())

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)
        assert await ask_in_thread(path, PingRequest()) == PONG
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
async def test_what_is_not_our_socket_is_refused_and_left_alone(path: Path, kind: str) -> None:
    precious = path.parent / "precious"
    precious.parent.mkdir(mode=0o700)
    precious.write_text("data")
    match kind:
        case "file":
            path.write_text("data")
        case "link":
            path.symlink_to(precious)
        case _:
            path.mkdir()
    before = path.lstat()

    with pytest.raises(ControlError, match="not a socket of ours"):
        await server.serve(path, answer_all)

    assert path.lstat() == before
    assert precious.read_text() == "data"
    assert lock.holder(path) is None


async def test_a_socket_that_took_our_place_is_not_removed(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
        nursery.cancel_scope.cancel()

    assert path.exists()


async def test_a_socket_that_is_gone_already_is_nothing_to_remove(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)
        path.unlink()
        nursery.cancel_scope.cancel()

    assert list(path.parent.iterdir()) == []


async def test_a_lock_that_cannot_be_opened_is_named(path: Path) -> None:
    lock.lock_path(path).mkdir(parents=True)

    with pytest.raises(ControlError, match=r"cannot lock .*control.sock.lock: Is a directory"):
        await server.serve(path, answer_all)


async def test_a_directory_where_anybody_can_replace_files_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o777)

    with pytest.raises(ControlError, match="anybody may replace files") as info:
        await server.serve(path, answer_all)

    assert info.value.hint == f"chmod o-w {path.parent}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories to any group")
async def test_a_directory_where_a_group_can_replace_files_is_refused(path: Path) -> None:
    path.parent.mkdir()
    os.chown(path.parent, -1, 65534)
    path.parent.chmod(0o770)

    with pytest.raises(ControlError, match="a group may replace files") as info:
        await server.serve(path, answer_all)

    assert info.value.hint == f"chmod g-w {path.parent}"


@pytest.mark.skipif(os.geteuid() != 0, reason="not everybody has a group of their own")
@pytest.mark.parametrize(("gid", "mode"), [(0, 0o770), (65534, 0o1777), (65534, 0o750)])
async def test_who_cannot_replace_files_there_may_be_of_the_group(
    path: Path, gid: int, mode: int
) -> None:
    """A user's own group, as a umask of 002 needs it; the sticky bit; no right to write."""
    path.parent.mkdir()
    os.chown(path.parent, -1, gid)
    path.parent.chmod(mode)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)
        assert path.exists()
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make directories of others")
async def test_a_directory_of_somebody_else_is_refused(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    os.chown(path.parent, 65534, 65534)

    with pytest.raises(ControlError, match="belongs to somebody else"):
        await server.serve(path, answer_all)


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ControlError, match=r"cannot make .*/file/run for the control socket"):
        await server.serve(tmp_path / "file" / "run" / "control.sock", answer_all)


async def test_what_zeromq_refuses_is_an_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here a path too long, which nobody has seen before."""
    monkeypatch.setattr(zmq, "IPC_PATH_MAX_LEN", 1000)

    with pytest.raises(ControlError, match=r"cannot make the control socket .* longer"):
        await server.serve(tmp_path / ("x" * 107), answer_all)

    assert list(tmp_path.iterdir()) == []


async def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="longer than 107 bytes"):
        await server.serve(tmp_path / ("x" * 107), answer_all)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"garbage"],
        [b"", b"garbage"],
        [b"", b""],
        [b"", encode_request(PingRequest()), b"more"],
        [b"not empty", encode_request(PingRequest())],
        [b"", b"x" * MAX_REQUEST],
        [b"x"] * 1000,
    ],
)
async def test_garbage_is_answered_with_an_error_and_disturbs_nobody(
    path: Path, frames: list[bytes]
) -> None:
    def talk(dealer: zmq.Socket[bytes]) -> list[bytes]:
        dealer.send_multipart(frames)
        return dealer.recv_multipart()

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)

        delimiter, body = await raw(path, talk)

        reply = json.loads(body)
        assert delimiter == b""
        assert (reply["kind"], reply["code"]) == ("refusal", "bad-request")
        assert await ask_in_thread(path, PingRequest()) == PONG
        nursery.cancel_scope.cancel()


async def test_an_oversized_message_is_dropped_and_others_are_served(path: Path) -> None:
    """The one who sent it is disconnected; what it sends after that, correctly, is served."""

    def talk(dealer: zmq.Socket[bytes]) -> bytes:
        dealer.send_multipart([b"", b"x" * (MAX_REQUEST + 1)])
        while True:
            dealer.send_multipart([b"", encode_request(PingRequest())])
            if dealer.poll(200):
                return dealer.recv_multipart()[1]

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)

        assert json.loads(await raw(path, talk))["kind"] == "pong"
        assert await ask_in_thread(path, PingRequest()) == PONG
        nursery.cancel_scope.cancel()


async def test_many_clients_at_once_are_all_answered(path: Path) -> None:
    async def slowly(request: Request) -> Reply:
        await trio.sleep(0.001)
        return await answer_all(request)

    answers = []

    async def client() -> None:
        answers.extend([await ask_in_thread(path, StatusRequest()) for _ in range(5)])

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, slowly)
        async with trio.open_nursery() as clients:
            for _ in range(30):
                clients.start_soon(client)
        nursery.cancel_scope.cancel()

    assert answers == [status()] * 150


@pytest.mark.parametrize("batch", [1, 2, server._BATCH])
async def test_pipelined_requests_of_one_client_are_all_answered(
    path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are taken at a time, no wake-up is lost."""
    monkeypatch.setattr(server, "_BATCH", batch)
    total = 1000

    def talk(dealer: zmq.Socket[bytes]) -> int:
        sent = got = 0
        while got < total:
            if sent < total and sent - got < server._RECEIVE_QUEUE:
                dealer.send_multipart([b"", encode_request(PingRequest())])
                sent += 1
            else:
                assert dealer.recv_multipart()[0] == b""
                got += 1
        return got

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer_all)
        assert await raw(path, talk) == total
        nursery.cancel_scope.cancel()


async def test_a_slow_answer_delays_no_other(path: Path) -> None:
    go = trio.Event()

    async def answer(request: Request) -> Reply:
        if isinstance(request, RescanRequest):
            await go.wait()
        return await answer_all(request)

    done = []

    async def rescan() -> None:
        done.append(await ask_in_thread(path, RescanRequest()))

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer)
        async with trio.open_nursery() as clients:
            clients.start_soon(rescan)
            assert await ask_in_thread(path, StatusRequest()) == status()
            assert done == []
            go.set()
        assert done == [Rescanned(files=3)]
        nursery.cancel_scope.cancel()


async def test_too_many_slow_requests_are_told_so_while_others_are_served(path: Path) -> None:
    places = server._LIMITS[RescanRequest].at_once
    send_channel, started = trio.open_memory_channel[None](places)
    go = trio.Event()

    async def answer(request: Request) -> Reply:
        if isinstance(request, RescanRequest):
            await send_channel.send(None)
            await go.wait()
        return await answer_all(request)

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer)
        async with trio.open_nursery() as clients:
            for _ in range(places):
                clients.start_soon(ask_in_thread, path, RescanRequest())
            for _ in range(places):
                await started.receive()

            with pytest.raises(ControlError, match="busy") as info:
                await ask_in_thread(path, RescanRequest(), 0.2)
            assert info.value.type is ErrorType.WAIT
            assert await ask_in_thread(path, StatusRequest()) == status()
            go.set()
        assert await ask_in_thread(path, RescanRequest()) == Rescanned(files=3)
        nursery.cancel_scope.cancel()


async def test_an_answer_that_never_comes_is_given_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = server._Limit(at_once=1, seconds=0.01)
    monkeypatch.setitem(server._LIMITS, RescanRequest, limit)

    async def never(request: Request) -> Reply:
        await trio.sleep_forever()
        raise AssertionError(request)

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, never)
        for _ in range(2):  # its place is free again
            with pytest.raises(ControlError, match="took syncd too long") as info:
                await ask_in_thread(path, RescanRequest())
            assert info.value.type is ErrorType.WAIT
        nursery.cancel_scope.cancel()


async def test_a_refusal_reaches_the_client_with_its_hint(path: Path) -> None:
    async def refuse(request: Request) -> Reply:
        raise ControlError(f"no {type(request).__name__} today", hint="come again")

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, refuse)
        with pytest.raises(ControlError, match="no PingRequest today") as info:
            await ask_in_thread(path, PingRequest())
        assert info.value.hint == "come again"
        assert info.value.type is ErrorType.CANCEL
        nursery.cancel_scope.cancel()


async def test_an_answer_too_long_to_send_is_an_error_for_the_client_only(path: Path) -> None:
    async def answer(request: Request) -> Reply:
        if isinstance(request, StatusRequest):
            return status(peers=(but(BOB, last_error="x" * MAX_REPLY),))
        return await answer_all(request)

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer)
        with pytest.raises(ControlError, match="longer than"):
            await ask_in_thread(path, StatusRequest())
        assert await ask_in_thread(path, PingRequest()) == PONG
        nursery.cancel_scope.cancel()


async def test_a_bug_in_an_answer_ends_the_server_and_cleans_up(path: Path) -> None:
    async def buggy(request: Request) -> Reply:
        raise ZeroDivisionError

    async def ask_in_vain() -> None:
        with pytest.raises(NotRunningError):
            await ask_in_thread(path, PingRequest())

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with trio.open_nursery() as clients, trio.open_nursery() as nursery:
            await nursery.start(server.serve, path, buggy)
            clients.start_soon(ask_in_vain)

    assert list(path.parent.iterdir()) == []


async def test_a_client_that_gives_up_leaves_the_server_well(path: Path) -> None:
    go = trio.Event()

    async def answer(request: Request) -> Reply:
        await go.wait()
        return await answer_all(request)

    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, answer)
        with pytest.raises(ControlError, match="has not answered"):
            await ask_in_thread(path, PingRequest(), 0.2)
        go.set()
        assert await ask_in_thread(path, PingRequest()) == PONG
        nursery.cancel_scope.cancel()


async def test_an_old_libzmq_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MIN_LIBZMQ", (99, 0, 0))

    with pytest.raises(ControlError, match="too old"):
        await server.serve(path, answer_all)

    assert not path.parent.exists()
