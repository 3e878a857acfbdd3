"""The other end of the control socket: asks one thing and waits. Without trio.

ZeroMQ connects to anything and queues in silence, so only the lock beside the socket tells
"not running" from "does not answer".
"""

from __future__ import annotations

import os
import signal
import stat
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, overload

import zmq

from syncd.control import lock
from syncd.control.messages import (
    MAX_REPLY,
    KeyRequest,
    Keys,
    Limited,
    LimitRequest,
    PeerRequest,
    PingRequest,
    Pong,
    Refusal,
    Rescanned,
    RescanRequest,
    SendRequest,
    Standing,
    StandingRequest,
    Status,
    StatusRequest,
    decode_reply,
    encode_request,
)
from syncd.errors import ControlError, ErrorType, NotFoundError, NotRunningError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from syncd.control.messages import Reply, Request

# How often we look whether the daemon still lives while it owes us an answer, or whether
# it has made its socket by now; and whether somebody has pressed Ctrl-C.
_LOOK = 0.2  # seconds

# Before asking again a daemon that has its hands full.
_BUSY_PAUSE = 0.05  # seconds

_START = "start it with: syncd --config FILE, or: systemctl start syncd"
_PERMISSION = "run syncctl as the user that runs syncd, or as root"

_T = TypeVar("_T")

_ANSWERS: dict[type[Request], type[Reply]] = {
    StatusRequest: Status,
    RescanRequest: Rescanned,
    PingRequest: Pong,
    LimitRequest: Limited,
    SendRequest: Standing,
    StandingRequest: Standing,
    PeerRequest: Keys,
    KeyRequest: Keys,
}


@overload
def ask(path: Path, request: StatusRequest, *, timeout: float) -> Status: ...
@overload
def ask(path: Path, request: RescanRequest, *, timeout: float) -> Rescanned: ...
@overload
def ask(path: Path, request: PingRequest, *, timeout: float) -> Pong: ...
@overload
def ask(path: Path, request: LimitRequest, *, timeout: float) -> Limited: ...
@overload
def ask(path: Path, request: SendRequest | StandingRequest, *, timeout: float) -> Standing: ...
@overload
def ask(path: Path, request: PeerRequest | KeyRequest, *, timeout: float) -> Keys: ...
def ask(path: Path, request: Request, *, timeout: float) -> Reply:
    """Ask the daemon one thing.

    Args:
      path: The control socket.
      request: The question.
      timeout: How many seconds the answer may take; `math.inf` for ever. That nobody
        serves the socket, or stopped to, is found out at once.

    Returns:
      The answer.

    Raises:
      NotRunningError: No daemon serves the socket.
      NotFoundError: The daemon knows no file or peer of that name.
      ControlError: The daemon refused, or of type AUTH: we may not ask, or of type WAIT: it
        runs, but has not answered in time.
    """
    path = path.absolute()
    deadline = time.monotonic() + timeout
    pid = _require_server(path)
    while not _is_there(path):
        if time.monotonic() >= deadline:
            raise _silent(path, pid, timeout)
        time.sleep(_LOOK)
        _require_same(path, pid)
    with _interrupted_later():
        return _exchange(path, request, pid, deadline, timeout)


@contextmanager
def _interrupted_later() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the context.

    An exception in the middle of making a ZeroMQ socket leaves one that nobody can close, and
    its context then waits for it for ever; one in a finaliser is swallowed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exchange(path: Path, request: Request, pid: int, deadline: float, timeout: float) -> Reply:
    """Ask who serves the socket; on its own, so that ZeroMQ's objects end where it does."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY)
        socket.connect(f"ipc://{path}")
        busy: Reply | None = None
        while True:
            socket.send(encode_request(request))
            reply = _receive(socket, path, pid, deadline) or busy
            if reply is None:
                raise _silent(path, pid, timeout)
            if not _is_busy(reply) or time.monotonic() >= deadline:
                return _wanted(request, reply)
            busy = reply
            time.sleep(_BUSY_PAUSE)


def _receive(socket: zmq.Socket[bytes], path: Path, pid: int, deadline: float) -> Reply | None:
    """Wait for an answer as long as there is somebody to give it."""
    while True:
        left = deadline - time.monotonic()
        if socket.poll(max(0, round(1000 * min(left, _LOOK)))):
            return decode_reply(socket.recv())
        if left <= 0 or signal.SIGINT in signal.sigpending():
            return None
        _require_same(path, pid)


def _is_busy(reply: Reply) -> bool:
    return isinstance(reply, Refusal) and reply.code == "busy"


def _wanted(request: Request, reply: Reply) -> Reply:
    if isinstance(reply, Refusal):
        if reply.code == "not-found":
            raise NotFoundError(reply.message, hint=reply.hint)
        again = reply.code in {"busy", "too-slow", "waiting"}
        raise ControlError(
            reply.message,
            hint=reply.hint,
            type=ErrorType.WAIT if again else ErrorType.CANCEL,
        )
    if not isinstance(reply, _ANSWERS[type(request)]):
        raise ControlError("syncd answered something else than it was asked")
    return reply


def _require_server(path: Path) -> int:
    """Find who serves the socket."""
    pid = _looking(path, lambda: lock.holder(path))
    if pid is None:
        raise NotRunningError(f"syncd is not running: nobody serves {path}", hint=_START)
    return pid


def _require_same(path: Path, pid: int) -> None:
    """See that who was asked still lives."""
    now = _looking(path, lambda: lock.holder(path))
    if now is None:
        raise NotRunningError("syncd stopped before it answered", hint=_START)
    if lock.UNKNOWN not in {pid, now} and pid != now:
        raise NotRunningError("syncd was restarted before it answered", hint="ask again")


def _is_there(path: Path) -> bool:
    """Whether the socket exists, and is one that we may trust and use."""
    try:
        found = _looking(path, path.lstat)
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(found.st_mode):
        raise ControlError(f"{path} is not a socket", hint="name another with --socket")
    # Root may ask anybody's daemon. Nobody else is answered by a daemon of another user, and
    # a socket of another user in our daemon's place would only tell lies.
    if os.geteuid() not in {0, found.st_uid}:
        raise ControlError(
            f"not permitted: {path} belongs to another user",
            hint=_PERMISSION,
            type=ErrorType.AUTH,
        )
    return True


def _looking(path: Path, look: Callable[[], _T]) -> _T:
    """Translate what goes wrong when looking at files."""
    try:
        return look()
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise ControlError(
            f"not permitted to use {path}", hint=_PERMISSION, type=ErrorType.AUTH
        ) from error
    except OSError as error:
        raise ControlError(f"cannot look at {path}: {error.strerror}") from error


def _silent(path: Path, pid: int, timeout: float) -> ControlError:
    who = f"process {pid}" if pid else "its process"
    return ControlError(
        f"syncd ({who}) runs, but has not answered on {path} within {timeout:g} s",
        hint="look into its log (journalctl -u syncd); if it hangs, restart it",
        type=ErrorType.WAIT,
    )
