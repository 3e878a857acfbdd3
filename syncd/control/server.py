"""The daemon's end of the control socket: one ROUTER, owned by one task.

The file descriptor of a ZeroMQ socket is edge-triggered: it tells that something changed,
once, to whoever next touches the socket. Two tasks that both receive, send and wait lose
each other's wake-ups. So `_Desk.run` alone touches it, in a fixed order: send what is
answered, take what has come until there is no more, and only then wait; answers are made by
tasks that hand them over and cut the wait short.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import stat
from collections import Counter, deque
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import trio
import zmq

from syncd.control import lock
from syncd.control.messages import (
    MAX_REQUEST,
    KeyRequest,
    LimitRequest,
    PeerRequest,
    PingRequest,
    Refusal,
    RescanRequest,
    SendRequest,
    StandingRequest,
    StatusRequest,
    decode_request,
    encode_reply,
)
from syncd.errors import ControlError, ErrorType, LockedError, NotFoundError, SyncdError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from syncd.control.messages import Reply, Request

log = logging.getLogger(__name__)

# CVE-2021-20235 and its elders: heap overflows reachable by whoever may connect.
MIN_LIBZMQ = (4, 3, 4)

# Messages that wait for us from one client; syncctl asks one thing at a time.
_RECEIVE_QUEUE = 16

# Answers that wait for a client to take them, before more are dropped. ZeroMQ counts them as
# taken only by the half, so this is more than twice what one who takes them can have waiting.
_SEND_QUEUE = 64

# How long a connection may take to say its ZeroMQ greeting.
_HANDSHAKE = 5000  # milliseconds

# Requests taken before the other tasks of the daemon get their turn.
_BATCH = 32

# A client that looks who is there holds the lock for an instant; a daemon holds it for good.
_LOCK_TRIES = 10
_LOCK_PAUSE = 0.02  # seconds

# Identity, delimiter, body: what a REQ socket sends. More is garbage, and is not kept.
_FRAMES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Limit:
    """How much of the daemon one command may take.

    Attributes:
      at_once: How many of them are answered at a time; each command has its own places, so
        that none crowds out another.
      seconds: How long an answer may take.
    """

    at_once: int
    seconds: float


_LIMITS: dict[type[Request], _Limit] = {
    PingRequest: _Limit(at_once=16, seconds=5),
    StatusRequest: _Limit(at_once=16, seconds=30),
    # Millions of files on a slow disk.
    RescanRequest: _Limit(at_once=4, seconds=3600),
    LimitRequest: _Limit(at_once=4, seconds=5),
    # Until it is on disk, which may be slow.
    SendRequest: _Limit(at_once=16, seconds=60),
    StandingRequest: _Limit(at_once=16, seconds=30),
    PeerRequest: _Limit(at_once=4, seconds=30),
    KeyRequest: _Limit(at_once=4, seconds=30),
}


async def serve(
    path: Path,
    answer: Callable[[Request], Awaitable[Reply]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on a control socket until cancelled; then nothing of it is left behind.

    Args:
      path: Where the socket shall be. Its directory is made, for us alone, if there is none.
      answer: Makes the answer; runs in several tasks at once. It may raise a `SyncdError`
        to refuse; any other exception is a bug and ends the server with it.
      task_status: Told when questions are answered from now on.

    Raises:
      LockedError: Another daemon serves this path.
      ControlError: The socket cannot be made there; says why.
    """
    if zmq.zmq_version_info() < MIN_LIBZMQ:
        raise ControlError(
            f"libzmq {zmq.zmq_version()} is too old: its known holes are closed in 4.3.4",
            hint="update libzmq, or install pyzmq as a wheel",
        )
    path = _usable(path)
    _make_directory(path.parent)
    async with _locked(path):
        with _bound(path) as router:
            task_status.started()
            await _Desk(router, answer).run()


class _Desk:
    """Takes questions, has them answered, and sends the answers.

    Args:
      router: Bound; from now on touched by `run` alone.
      answer: As for `serve`.
    """

    def __init__(
        self, router: zmq.Socket[bytes], answer: Callable[[Request], Awaitable[Reply]]
    ) -> None:
        self._router = router
        self._answer = answer
        # At most one entry for each running answer and each message of a batch.
        self._outbox: deque[tuple[bytes, bytes]] = deque()
        self._running: Counter[type[Request]] = Counter()
        self._nap = trio.CancelScope()

    async def run(self) -> None:
        """Do so until cancelled."""
        async with trio.open_nursery() as answering:
            while True:
                self._send()
                if self._receive(answering):
                    await trio.lowlevel.checkpoint()
                elif not self._outbox:
                    # Nothing may happen between the last look and this wait; all is sync.
                    with trio.CancelScope() as self._nap:
                        await trio.lowlevel.wait_readable(self._router.FD)

    def _send(self) -> None:
        while self._outbox:
            identity, data = self._outbox.popleft()
            try:
                self._router.send_multipart([identity, b"", data], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno not in {zmq.EAGAIN, zmq.EHOSTUNREACH}:
                    raise
                log.debug("an answer is dropped: its client has gone, or does not read")

    def _receive(self, answering: trio.Nursery) -> bool:
        """Take what has come.

        Returns:
          Whether there may be more; if not, it is safe to wait for the file descriptor.
        """
        for _ in range(_BATCH):
            try:
                frames = self._receive_frames()
            except zmq.Again:
                return False
            self._take(frames, answering)
        return True

    def _receive_frames(self) -> list[bytes]:
        frames = [self._router.recv(zmq.NOBLOCK)]
        while self._router.getsockopt(zmq.RCVMORE):
            frame = self._router.recv(zmq.NOBLOCK)
            # One more than is allowed is enough to see that it is garbage.
            if len(frames) <= _FRAMES:
                frames.append(frame)
        return frames

    def _take(self, frames: list[bytes], answering: trio.Nursery) -> None:
        identity = frames[0]
        try:
            request = _read(frames)
        except ControlError as error:
            refusal = Refusal(code="bad-request", message=str(error), hint=error.hint)
            self._outbox.append((identity, encode_reply(refusal)))
            return
        kind = type(request)
        if self._running[kind] >= _LIMITS[kind].at_once:
            refusal = Refusal(code="busy", message="syncd is busy", hint="try again")
            self._outbox.append((identity, encode_reply(refusal)))
            return
        self._running[kind] += 1
        answering.start_soon(self._answer_one, identity, request)

    async def _answer_one(self, identity: bytes, request: Request) -> None:
        reply: Reply = Refusal(
            code="too-slow", message="the answer took syncd too long", hint="try again"
        )
        try:
            with trio.move_on_after(_LIMITS[type(request)].seconds):
                reply = await self._answer(request)
            data = encode_reply(reply)
        except SyncdError as error:
            data = encode_reply(_refusal(error))
        finally:
            self._running[type(request)] -= 1
        self._outbox.append((identity, data))
        self._nap.cancel()


def _refusal(error: SyncdError) -> Refusal:
    code: Literal["not-found", "waiting", "failed"] = "failed"
    if isinstance(error, NotFoundError):
        code = "not-found"
    elif error.type is ErrorType.WAIT:
        code = "waiting"
    return Refusal(code=code, message=str(error), hint=error.hint)


def _read(frames: list[bytes]) -> Request:
    if len(frames) != _FRAMES or frames[1]:
        raise ControlError("a request is one frame behind an empty one")
    return decode_request(frames[2])


def _usable(path: Path) -> Path:
    # An absolute path cannot be one of ZeroMQ's own names, such as "@abstract" or "*".
    path = path.absolute()
    if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
        raise ControlError(
            f"the control socket's path is longer than {zmq.IPC_PATH_MAX_LEN} bytes: {path}",
            hint="set a shorter one: socket in [control]",
        )
    return path


def _make_directory(directory: Path) -> None:
    """See to it that nobody else can put something in the socket's place."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as error:
        raise ControlError(
            f"cannot make {directory} for the control socket: {error.strerror}",
            hint="create it for the user that runs syncd, or set socket in [control]",
        ) from error
    if found.st_uid != os.geteuid():
        raise ControlError(
            f"the directory of the control socket, {directory}, belongs to somebody else",
            hint="set socket in [control] to a path in a directory of the user that runs syncd",
        )
    if found.st_mode & stat.S_ISVTX:
        return  # as in /tmp: others can add files but not replace ours
    if found.st_mode & stat.S_IWOTH:
        raise ControlError(
            f"anybody may replace files in the directory of the control socket, {directory}",
            hint=f"chmod o-w {directory}",
        )
    if found.st_mode & stat.S_IWGRP and not _is_of_us_alone(found.st_gid):
        raise ControlError(
            f"a group may replace files in the directory of the control socket, {directory}",
            hint=f"chmod g-w {directory}",
        )


def _is_of_us_alone(gid: int) -> bool:
    """Whether it is the group that many systems give each user, to be alone in (useradd(8))."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    others = set(group.gr_mem) - {user.pw_name}
    return (user.pw_gid, user.pw_name, others) == (gid, group.gr_name, set())


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    fd = None
    try:
        for attempt in range(_LOCK_TRIES):
            if attempt:
                await trio.sleep(_LOCK_PAUSE)
            if (fd := lock.take(path)) is not None:
                break
        else:
            raise _held(path, lock.holder(path))
    except OSError as error:
        raise ControlError(
            f"cannot lock {lock.lock_path(path)}: {error.strerror}",
            hint="remove it, or set another socket in [control]",
        ) from error
    try:
        yield
    finally:
        lock.release(fd, path)


def _held(path: Path, pid: int | None) -> LockedError:
    who = f"process {pid}" if pid else "another process"
    how = f"stop it first (systemctl stop syncd, or kill {pid})" if pid else "stop it first"
    return LockedError(
        f"another syncd ({who}) already serves {path}",
        hint=f"{how}, or give this one its own socket in [control]",
    )


@contextmanager
def _bound(path: Path) -> Iterator[zmq.Socket[bytes]]:
    """Bind a ROUTER that serves us and root; close it and remove its file at the end."""
    _refuse_to_replace(path)
    context = zmq.Context()
    try:
        router = context.socket(zmq.ROUTER)
        router.linger = 0
        router.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST)
        router.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        router.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        # Or answers would be dropped without a word.
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE)
        # The kernel's word for who connects; each call adds one who may.
        router.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())
        router.setsockopt(zmq.IPC_FILTER_UID, 0)
        try:
            router.bind(f"ipc://{path}")
            path.chmod(0o600)
            ours = path.lstat()
        except (zmq.ZMQError, OSError) as error:
            raise ControlError(
                f"cannot make the control socket {path}: {error.strerror}",
                hint="set another socket in [control]",
            ) from error
        try:
            yield router
        finally:
            router.close()
            _remove(path, ours)
    finally:
        context.destroy(linger=0)


def _refuse_to_replace(path: Path) -> None:
    """ZeroMQ would replace any file there, so look first."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise ControlError(
            f"{path} is not a socket of ours; syncd does not replace it",
            hint="remove it, or set another socket in [control]",
        )


def _remove(path: Path, ours: os.stat_result) -> None:
    """Remove the socket's file, unless something else has come in its place."""
    try:
        if os.path.samestat(path.lstat(), ours):
            path.unlink()
    except OSError as error:
        log.debug("the control socket's file is not removed: %s", error)
