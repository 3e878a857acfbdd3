"""Cancel a piece of async code at every one of its steps, and see what it leaves open."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator


class _CancelAt(trio.abc.Instrument):
    """Counts the steps of all tasks, and cancels a scope after one of them."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self.left = step
        self._scope = scope

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self._scope.cancel()


@contextmanager
def cancelling(scope: trio.CancelScope, step: int) -> Iterator[None]:
    """Cancel a scope, that of other tasks, after so many steps of the scheduler."""
    instrument = _CancelAt(scope, step)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)


async def cancelled_at(step: int, function: Callable[[], Awaitable[None]]) -> bool:
    """Run a function, and cancel it after so many steps of the scheduler.

    Returns:
      Whether it was cancelled; False means that it needs no more steps than that.
    """
    with trio.CancelScope() as scope, cancelling(scope, step):
        await function()
    return scope.cancelled_caught


def open_sockets() -> int:
    """How many sockets this process has open."""
    count = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = str(path.readlink())
        except FileNotFoundError:
            continue  # the descriptor that listed them
        count += target.startswith("socket:")
    return count
