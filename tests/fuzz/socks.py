"""A target for both ends of SOCKS5: what a peer, a stranger, or a proxy may send.

However it is cut into reads, each machine ends, good or bad, having taken no more than a
handshake has, and leaves every byte behind that. From the command line::

    python -m tests.fuzz.socks --seconds 3600 [--seed 7]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from hypothesis import strategies as st

from syncd.bytestreams.socks5 import Acceptor, Connector, Greeter, is_address
from syncd.errors import BytestreamError, RemoteProtocolError
from tests.fuzz import loop

if TYPE_CHECKING:
    from collections.abc import Sequence

ADDRESS = "a1" * 20
GREETING = b"\5\1\0"
REQUEST = b"\5\1\0\3\x28" + ADDRESS.encode() + b"\0\0"
PIECES = (
    *(GREETING, REQUEST, b"\5\0", REQUEST.replace(b"\1\0", b"\0\0", 1)),
    *(b"\5", b"\4", b"\0", b"\1", b"\3", b"\xff", b"\5\xff", b"\5\2\0\2", b"\5\0\0\1"),
    *(b"\5\1\0\3\xff", b"\5\1\0\4", b"\5\3\0\1", b"GET / HTTP/1.1\r\n\r\n", b"\x16\3\1"),
)
# A greeting with 255 methods and a request; the longest reply is shorter.
MOST = 304  # bytes
# The longest answer is that to a whole request.
MOST_SAID = 2 + 47  # bytes

inputs = st.tuples(
    st.sampled_from(["acceptor", "connector", "greeter"]),
    st.lists(st.sampled_from(PIECES) | st.binary(max_size=300), max_size=6).map(b"".join),
    st.lists(st.integers(1, 60), max_size=30),
)
Input: TypeAlias = tuple[str, bytes, list[int]]


def check(drawn: Input) -> None:
    """Fail if a machine does anything but what is promised."""
    kind, said, sizes = drawn
    whole = run(kind, said, [])
    assert run(kind, said, [1] * len(said)) == whole
    assert run(kind, said, sizes) == whole


def run(kind: str, said: bytes, sizes: Sequence[int]) -> tuple[object, ...]:
    """Let a machine hear something, in reads of these sizes; what came of it."""
    machine: Acceptor | Connector | Greeter
    match kind:
        case "acceptor":
            machine = Acceptor()
        case "connector":
            machine = Connector(ADDRESS)
        case _:
            machine = Greeter()
    out, taken, reads = machine.data_to_send(), 0, list(sizes)
    while wanted := machine.bytes_wanted:
        assert 0 < wanted <= MOST
        size = min(wanted, reads.pop(0) if reads else wanted)
        data = said[taken : taken + size]
        taken += len(data)
        machine.receive_data(data)
        out += machine.data_to_send()
    assert taken <= MOST
    assert len(out) <= MOST_SAID + 3
    assert machine.error is None or isinstance(
        machine.error, BytestreamError | RemoteProtocolError
    )
    assert len(str(machine.error)) < 200
    address = None
    if isinstance(machine, Acceptor):
        address = machine.address
        assert (address is None) == (machine.error is not None)
        assert address is None or (is_address(address) and address == address.lower())
    if isinstance(machine, Connector):
        assert machine.done == (machine.error is None)
        # It was let in only by a streamhost that said so.
        assert not machine.done or said.startswith(b"\5\0\5\0")
    return taken, out, str(machine.error), address


def one_input(data: bytes) -> None:
    """The same for a fuzzer that makes bytes: all of them go to each machine."""
    for kind in ("acceptor", "connector", "greeter"):
        check((kind, data[1:], [size + 1 for size in data[:20]]))


if __name__ == "__main__":
    loop.run(__doc__, inputs, check, one_input)
