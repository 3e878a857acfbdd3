"""Real processes for tests: watched, ended for certain, their output kept in a file."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

# Between two looks at something that another process does: soon enough to stop a transfer in
# its middle, seldom enough to leave a small machine to those who are looked at.
LOOK = 0.02  # seconds

# How long a process may take to end once it was asked to: Prosody waits a second for its
# clients, syncd says goodbye to its server; the rest is for a busy machine.
END_TIMEOUT = 20.0  # seconds

# How much of a log a failed test shows.
TAIL = 16_384  # bytes

# Linux hands out 32768 and up to whoever connects somewhere, so a port from there may be
# taken while a server is being restarted. Nobody is handed one from here.
_PORTS = range(20_000, 32_000)


def until(true: Callable[[], object], what: str, timeout: float = 30.0) -> None:
    """Look again and again until something holds; not before it does is the test to go on.

    Args:
      true: Looks; the wait ends when it returns something true. What it raises ends the test.
      what: What is waited for, for the report.
      timeout: Seconds; generous, for it is only reached when the test fails.
    """
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(LOOK)


def free_ports(count: int) -> list[int]:
    """Find TCP ports of the loopback that nobody uses, all different."""
    found: list[int] = []
    choice = random.SystemRandom()
    for _ in range(1000):
        if len(found) == count:
            return found
        port = choice.choice(_PORTS)
        with socket.socket() as probe:
            # As the servers do; else a port that a connection left in TIME_WAIT looks taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    raise AssertionError("no free ports on the loopback")


class Process:
    """A program that runs in the background.

    Args:
      name: What to call it in reports.
      argv: The program and its arguments.
      log_file: Gets stdout and stderr, of all runs one after the other.
      env: The whole environment.

    Attributes:
      name: As given.
      log_file: As given.
    """

    def __init__(
        self, name: str, argv: Sequence[str], *, log_file: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log_file = log_file
        self._argv = _tied(argv)
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs, and before it was started."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def spawn(self) -> None:
        """Start it; whether it is of use yet is for the caller to find out."""
        assert self._process is None, f"{self.name} runs already"
        self._log = self.log_file.open("ab")
        self._process = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._env,
            # A group of its own, so that its children are found when it must be killed, and
            # Ctrl-C reaches only pytest, which then ends everything in order.
            start_new_session=True,
        )

    def check_running(self) -> None:
        """Fail with the log when it has ended by itself."""
        if (code := self.returncode) is not None:
            raise AssertionError(f"{self.name} ended with {code}:\n{self.tail()}")

    def wait(self, timeout: float = END_TIMEOUT) -> int:
        """Wait until it ends by itself.

        Returns:
          Its exit code; negative when a signal killed it.
        """
        assert self._process is not None, f"{self.name} was not started"
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"{self.name} did not end within {timeout:g} s:\n{self.tail()}"
            ) from None
        self._reap()
        return code

    def terminate(self) -> int:
        """Ask it to end, and wait until it has.

        Returns:
          Its exit code.
        """
        self.signal(signal.SIGTERM)
        return self.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it, and not its children, a signal."""
        assert self._process is not None, f"{self.name} was not started"
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it and its children at once, as a power cut would; nothing if it has ended."""
        if self._process is None:
            return
        self._kill_group()
        self._process.wait()
        self._reap()

    def tail(self) -> str:
        """The end of what it has said."""
        if not self.log_file.exists():
            return "(it said nothing)"
        with self.log_file.open("rb") as log:
            log.seek(max(0, self.log_file.stat().st_size - TAIL))
            return log.read().decode(errors="backslashreplace")

    def _kill_group(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):  # it and all its children have ended
            os.killpg(self._process.pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Forget a process that has ended, and see that no child outlives it."""
        self._kill_group()
        if self._log is not None:
            self._log.close()
        self._process = self._log = None


def _tied(argv: Sequence[str]) -> list[str]:
    """Make a program end with us, even when we are killed and no `finally` runs."""
    program = shutil.which(argv[0])
    assert program is not None, f"there is no program {argv[0]}"
    setpriv = shutil.which("setpriv")
    tie = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    return [*tie, program, *argv[1:]]
