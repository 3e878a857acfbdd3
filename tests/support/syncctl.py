"""The real ``syncctl`` as a process, against a real control server with scripted answers."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import trio

from syncd.control.server import serve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from syncd.control.messages import Reply, Request

SYNCCTL = [sys.executable, "-m", "syncd.cli.main"]


class Script:
    """Answers with one reply (or refusal) after the other, the last one for ever.

    Attributes:
      asked: The requests so far.
    """

    def __init__(self, *replies: Reply | Exception) -> None:
        self._replies = list(replies)
        self.asked: list[Request] = []

    async def answer(self, request: Request) -> Reply:
        await trio.lowlevel.checkpoint()
        self.asked.append(request)
        reply = self._replies.pop(0) if self._replies[1:] else self._replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply


async def syncctl(
    answer: Callable[[Request], Awaitable[Reply]],
    path: Path,
    *args: str,
    cwd: Path | None = None,
) -> tuple[int, str, str]:
    """Run syncctl against a server; returns its exit code, stdout and stderr."""
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, path, answer)
        done = await trio.run_process(
            [*SYNCCTL, "--socket", path, *args],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
        )
        nursery.cancel_scope.cancel()
    return done.returncode, done.stdout.decode(), done.stderr.decode()
