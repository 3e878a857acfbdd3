"""Which question goes to whom; there before there is anybody who could answer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from syncd.control.messages import (
    KeyRequest,
    Keys,
    Limited,
    LimitRequest,
    PeerRequest,
    PingRequest,
    Pong,
    Rescanned,
    RescanRequest,
    SendRequest,
    Standing,
    StandingRequest,
    Status,
    StatusRequest,
)
from syncd.errors import SyncdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from syncd.control.messages import Reply, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Who knows the answers; each may raise a `SyncdError` to refuse.

    Attributes:
      status: How everything stands.
      rescan: Looks through all folders.
      limit: Changes how fast bytes may flow.
      send: Owes a file.
      standing: What has become of one.
      keys: The keys of peers, and our own; None where nothing is encrypted from end to end.
    """

    status: Callable[[], Awaitable[Status]]
    rescan: Callable[[], Awaitable[None]]
    limit: Callable[[LimitRequest], Limited]
    send: Callable[[SendRequest], Awaitable[Standing]]
    standing: Callable[[StandingRequest], Awaitable[Standing]]
    keys: Callable[[PeerRequest | KeyRequest], Awaitable[Keys]] | None = None


class Answers:
    """Passes questions on; until `begin` all but a ping wait, or are refused with a reason.

    Args:
      version: The daemon's.
    """

    def __init__(self, version: str) -> None:
        self._version = version
        self._experts: Experts | None = None
        self._problem: SyncdError | None = None
        self._news = trio.Event()

    def refuse(self, problem: SyncdError) -> None:
        """Refuse with this reason until `begin`."""
        self._problem = problem
        self._tell()

    def begin(self, experts: Experts) -> None:
        """Answer from now on."""
        self._experts = experts
        self._tell()

    async def answer(self, request: Request) -> Reply:
        """Answer one question.

        Raises:
          SyncdError: It is refused, and why.
        """
        if isinstance(request, PingRequest):
            return Pong(version=self._version, pid=os.getpid())
        while (experts := self._experts) is None:
            if (problem := self._problem) is not None:
                # One that was raised before would drag its old traceback along.
                raise SyncdError(str(problem), hint=problem.hint, type=problem.type)
            await self._news.wait()
        match request:
            case StatusRequest():
                return await experts.status()
            case RescanRequest():
                await experts.rescan()
                status = await experts.status()
                return Rescanned(files=sum(folder.files for folder in status.folders))
            case LimitRequest():
                return experts.limit(request)
            case SendRequest():
                return await experts.send(request)
            case StandingRequest():
                return await experts.standing(request)
            case PeerRequest() | KeyRequest():
                if experts.keys is None:
                    raise SyncdError("this syncd does not encrypt from end to end")
                return await experts.keys(request)

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()
