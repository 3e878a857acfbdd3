"""How much memory a stream needs for what a server sends: `python tests/fuzz/memory.py WHAT`.

Prints by how many KiB the process has grown at its peak, and how many bytes and events that
took. Run by `tests/xmpp/test_hostile.py`, one process for each, since memory once taken may
stay with a process.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from syncd.xmpp.stream import StreamEnded
from tests.support.wire import open_stream

if TYPE_CHECKING:
    from collections.abc import Iterator

# What is legal may go on for ever; everything else ends long before.
MOST = 10**9  # bytes
STANZAS = 100_000
# What one read may bring.
READ = 65_536  # bytes


def stanzas(text: str, count: int = STANZAS) -> Iterator[bytes]:
    """Stanzas, a number in each, in reads of some size."""
    for start in range(0, count, 500):
        yield "".join(text.replace("#", str(n)) for n in range(start, start + 500)).encode()


def endless(start: bytes, filler: bytes) -> Iterator[bytes]:
    """The same bytes until somebody has had enough."""
    yield start
    yield from itertools.repeat(filler * (READ // len(filler)))


def numbered(start: bytes, text: str) -> Iterator[bytes]:
    """Inside one stanza, something new each time."""
    yield start
    for n in itertools.count(0, 1_000):
        yield "".join(text.replace("#", str(i)) for i in range(n, n + 1_000)).encode()


WHAT = {
    # for ever
    "white space": endless(b" ", b" \n\t\r"),
    "presences": stanzas(
        "<presence from='bob@example.org/#'><priority>#</priority></presence>"
    ),
    "names": stanzas("<message a#='' ><n# xmlns='u'/></message>"),
    "namespaces": stanzas("<message xmlns:p#='urn:#'><p#:a/></message>"),
    "long names": stanzas(f"<message><{'n' * 900}#/></message>", STANZAS // 5),
    "extensions": stanzas("<e# xmlns='urn:e'/>"),
    # until it is too much
    "garbage": endless(b" ", bytes(range(256))),
    "text": endless(b"<message><body>", b"x"),
    "open tags": endless(b"<message>", b"<a>"),
    "attribute": endless(b"<message a='", b">"),
    "attributes": numbered(b"<message", " a#=''"),
    "elements": endless(b"<message>", b"<a/>"),
    "new elements": numbered(b"<message>", "<a#/>"),
    "declarations": numbered(b"<message", " xmlns:a#='u'"),
    "cdata": endless(b"<message>", b"<![CDATA[x]]>"),
    "references": endless(b"<message>", b"&amp;"),
}


def peak() -> int:
    """The most that this process has had, KiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def main() -> None:
    """Send it, and tell what it took."""
    stream = open_stream()
    # What is loaded and compiled once is not meant.
    stream.receive_data(b"<message><body>" + b"x" * READ + b"</body></message>")
    before, sent, count = peak(), 0, 0
    for data in WHAT[sys.argv[1]]:
        sent += len(data)
        events = stream.receive_data(data)
        count += len(events)
        if sent >= MOST or any(isinstance(event, StreamEnded) for event in events):
            break
    sys.stdout.write(f"{peak() - before} KiB more for {sent} bytes, {count} events\n")


if __name__ == "__main__":
    main()
