"""A relay on a connection's way, which holds the bytes back until a test has done its deed.

So a test meets a transfer in its middle for certain, however fast the machine is. It can also
break a connection, in the ways in which the network does.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CHUNK = 65_536  # bytes

# What the kernel may take from the target while the gate holds. By itself it would let this
# grow to tens of MiB, and take the whole file from a sender that then seems to be done.
_BUFFER = 262_144  # bytes

# Only ends a test whose relay hangs.
_JOIN_TIMEOUT = 10.0  # seconds


class Gate:
    """Passes bytes between whoever connects to `port` and whoever listens on `target`.

    As behind any proxy there is no half-close: when one end closes, both are closed.

    Args:
      port: Where to listen, on the loopback.
      target: The port on the loopback to connect to.
      both_ways: Bytes to the target are held back, too: at a proxy, half of those who connect
        have something to say.

    Attributes:
      port: As given.
      target: As given.
      passed: For each connection in turn, how many bytes of the target passed.
      taken: For each connection in turn, how many bytes to the target passed.
      refusing: Whether whoever connects is hung up on.
    """

    def __init__(self, port: int, target: int, *, both_ways: bool = False) -> None:
        self.port = port
        self.target = target
        self.passed: list[int] = []
        self.taken: list[int] = []
        self.refusing = False
        self._limit = math.inf
        self._both_ways = both_ways
        self._closed = False
        self._change = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._links: list[_Link] = []

    def hold_after(self, limit: int) -> None:
        """Let so many bytes of the target pass on each connection, and no more.

        With `both_ways` so many in each direction.
        """
        with self._change:
            self._limit = limit
            self._change.notify_all()

    def open(self) -> None:
        """Let everything pass from now on."""
        with self._change:
            self._limit = math.inf
            self._change.notify_all()

    def reset(self) -> None:
        """Break all connections, as a router does that has forgotten them (RST)."""
        for link in self._links:
            with self._change:
                link.cut = True
                self._change.notify_all()
            for end in link.ends:
                # Nothing is sent by that, but whoever reads here wakes up.
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RD)
        for link in self._links:
            for thread in link.threads:
                thread.join(_JOIN_TIMEOUT)
                assert not thread.is_alive()
            for end in link.ends:
                # To close without waiting for anything is to reset.
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
        self._links.clear()

    def fall_silent(self) -> None:
        """Let nothing pass any more on the connections that there are, and tell nobody."""
        for link in self._links:
            link.silent = True

    def now_passed(self) -> tuple[int, int]:
        """How many bytes to the target, and of the target, passed on the connections of now."""
        numbers = [link.number for link in self._links if not link.over]
        return sum(self.taken[each] for each in numbers), sum(
            self.passed[each] for each in numbers
        )

    def most(self) -> int:
        """How many bytes have passed one way on that connection of now that has had most."""
        numbers = [link.number for link in self._links if not link.over]
        return max((max(self.taken[each], self.passed[each]) for each in numbers), default=0)

    @property
    def holding(self) -> bool:
        """Whether on some connection all has passed that may."""
        return self.most() >= self._limit

    @property
    def idle(self) -> bool:
        """Whether all connections that there were have ended."""
        return all(link.over for link in self._links)

    def serve(self, listener: socket.socket) -> None:
        """Take connections until the listener is closed."""
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            if self.refusing:
                near.close()
                continue
            far = socket.socket()
            # Set before connecting, for it bounds the window that is told to the target.
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            try:
                far.connect(("127.0.0.1", self.target))
            except OSError:
                near.close()
                far.close()
                continue
            number = len(self.passed)
            self.passed.append(0)
            self.taken.append(0)
            link = _Link(number, (near, far))
            self._links.append(link)
            for source, sink, counts in ((near, far, self.taken), (far, near, self.passed)):
                thread = self.run(self._pass, link, source, sink, counts, number)
                link.threads.append(thread)

    def run(self, function: Callable[..., None], *arguments: object) -> threading.Thread:
        """Start a thread that `close` waits for."""
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def close(self) -> None:
        """End all connections."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        ends = [end for link in self._links for end in link.ends]
        for end in ends:
            _hang_up(end)
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT)
            assert not thread.is_alive()
        for end in ends:
            end.close()

    def _pass(
        self,
        link: _Link,
        source: socket.socket,
        sink: socket.socket,
        counts: list[int],
        number: int,
    ) -> None:
        """Pass bytes of one connection one way, and count them."""
        with contextlib.suppress(OSError):
            while data := source.recv(self._room(link, counts, number)):
                if link.cut:
                    break
                if link.silent:
                    continue  # taken from the one, and never given to the other
                sink.sendall(data)
                counts[number] += len(data)
        if link.cut or link.silent:
            return
        _hang_up(source)
        _hang_up(sink)

    def _room(self, link: _Link, counts: list[int], number: int) -> int:
        """Wait until bytes may pass; how many."""
        if counts is self.taken and not self._both_ways:
            return _CHUNK
        with self._change:
            self._change.wait_for(
                lambda: self._closed or link.cut or counts[number] < self._limit
            )
            return int(min(_CHUNK, max(1, self._limit - counts[number])))


@dataclass(slots=True)
class _Link:
    """One connection through the gate: its number, its two ends, and who passes the bytes."""

    number: int
    ends: tuple[socket.socket, socket.socket]
    threads: list[threading.Thread] = field(default_factory=list)
    cut: bool = False
    silent: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing passes any more, in either direction."""
        if self.cut or not self.threads:
            return self.cut
        return not any(thread.is_alive() for thread in self.threads)


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def open_gate(port: int, target: int, *, both_ways: bool = False) -> Iterator[Gate]:
    """Relay for as long as the block lasts; the arguments are those of `Gate`."""
    gate = Gate(port, target, both_ways=both_ways)
    with socket.create_server(("127.0.0.1", port)) as listener:
        gate.run(gate.serve, listener)
        try:
            yield gate
        finally:
            _hang_up(listener)
            gate.close()
