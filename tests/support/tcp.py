"""Two ends of a TCP connection in one process, and what goes over it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio
import trio.testing
from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


def pattern(size: int) -> bytes:
    """Bytes of which no two places look alike."""
    return blake3(b"pattern").digest(size)


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """Two ends of a TCP connection over the loopback."""
    (listening,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listening:
        one = await trio.testing.open_stream_to_socket_listener(listening)
        other = await listening.accept()
    async with one, other:
        yield one, other


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread or the kernel does, for at most some real seconds."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - a thread at work sets no Event
            await trio.sleep(0.001)
