"""Who sends to whom, how, and how fast: ``python -m tests.bench.ways [--direct MIB] ...``.

Daemon to daemon, and from and to another client (slixmpp), over each real server that is
installed, by each way on its own, on the loopback. The time is that from the file's
being dropped to its being there whole, offer and all; a file is compared before it counts as
there. Nothing is asserted here; a row that fails says so, and the next is run.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import servers
from tests.support.daemons import Daemons
from tests.support.pair import MIB, noise
from tests.support.plain_client import open_plain_client
from tests.support.processes import until
from tests.support.servers import DOMAIN
from tests.support.ways import WAYS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.daemons import Daemon
    from tests.support.processes import Process
    from tests.support.servers import Server

# Nothing here takes longer but what hangs.
PATIENCE = 300.0  # seconds

PLAIN = '[transfer]\nencryption = "off"\n'
METHODS = {"proxy": "s5b", "ibb": "ibb"}


@dataclass(frozen=True, slots=True)
class Row:
    """One file from one to the other.

    Attributes:
      sender: Who sends; ``syncd`` or ``slixmpp``.
      receiver: Who gets it.
      way: By which way, the only one that is open.
      size: Of the file, bytes.
      sealed: Whether it is encrypted end to end.
    """

    sender: str
    receiver: str
    way: str
    size: int
    sealed: bool = False

    def show(self, kind: str, result: str, taken: float) -> None:
        rate = f"{self.size / MIB / taken:9.1f} MiB/s" if taken and self.size >= MIB else ""
        print(  # noqa: T201 - what it is for
            f"{self.sender:8} {self.receiver:8} {kind:9} {self.way:7} "
            f"{'sealed' if self.sealed else 'plain':7} {self.size:12,} B  {result:6} "
            f"{taken:7.2f} s {rate}".rstrip(),
            flush=True,
        )


def rows(sizes: dict[str, int]) -> Iterator[Row]:
    """Everything that is run over each server."""
    for way, size in sizes.items():
        for sealed in (False, True):
            yield Row("syncd", "syncd", way, size, sealed)
    for way in METHODS:
        for size in (0, 1, 5 * MIB):
            yield Row("slixmpp", "syncd", way, size)
    for way in WAYS:
        for size in (0, 1, 5 * MIB):
            yield Row("syncd", "slixmpp", way, size)


def write(file: Path, size: int) -> bytes:
    """Write noise; its digest."""
    piece = noise(min(size, 16 * MIB))
    digest = hashlib.sha256()
    with file.open("wb") as out:
        for left in range(size, 0, -len(piece) or -1):
            out.write(piece[:left])
            digest.update(piece[:left])
    return digest.digest()


def is_there(file: Path, wanted: bytes) -> None:
    with file.open("rb") as content:
        assert hashlib.file_digest(content, "sha256").digest() == wanted, "other bytes"


@contextmanager
def timed(taken: list[float]) -> Iterator[None]:
    begin = time.monotonic()
    try:
        yield
    finally:
        taken.append(time.monotonic() - begin)


def between_daemons(
    server: Server, daemons: Daemons, home: Path, row: Row, taken: list[float]
) -> None:
    way, extra = WAYS[row.way], "" if row.sealed else PLAIN
    alice = daemons.make("alice", server, send_to=["bob"], bytestreams=way, extra=extra)
    bob = daemons.make("bob", server, accept_from=["alice"], bytestreams=way, extra=extra)
    for daemon in (bob, alice):
        daemon.start()
        daemon.wait_connected()
    until(lambda: alice.peer("bob").online, "they see each other")
    wanted = write(home / "file", row.size)
    with timed(taken):
        (home / "file").rename(alice.folder / "file")
        until((bob.folder / "file").exists, "it is there", PATIENCE)
    is_there(bob.folder / "file", wanted)


def _alice(server: Server, daemons: Daemons, home: Path, row: Row) -> Daemon:
    (home / "inbox").mkdir()
    inbox = f'[inbox]\npath = "{home / "inbox"}"\naccept_from = ["carol@{DOMAIN}"]\n'
    return daemons.make(
        "alice", server, send_to=["carol"], bytestreams=WAYS[row.way], extra=inbox
    )


def to_other(
    server: Server, daemons: Daemons, home: Path, row: Row, taken: list[float]
) -> None:
    alice = _alice(server, daemons, home, row)
    with open_plain_client(server, "carol", home) as carol:
        alice.start()
        until(lambda: alice.peer("carol").online, "they see each other")
        wanted = write(home / "file", row.size)
        with timed(taken):
            (home / "file").rename(alice.folder / "file")
            got = carol.next(PATIENCE)
        assert got["event"] == "received", got
        is_there(Path(got["file"]), wanted)


def from_other(
    server: Server, daemons: Daemons, home: Path, row: Row, taken: list[float]
) -> None:
    alice = _alice(server, daemons, home, row)
    alice.start()
    alice.wait_connected()
    with open_plain_client(server, "carol", home) as carol:
        wanted = write(home / "file", row.size)
        with timed(taken):
            sent = carol.send(f"alice@{DOMAIN}/test", home / "file", method=METHODS[row.way])
            assert sent["event"] == "sent", sent
            until((home / "inbox" / "file").exists, "it is there", PATIENCE)
        is_there(home / "inbox" / "file", wanted)


RUNS: dict[tuple[str, str], Callable[[Server, Daemons, Path, Row, list[float]], None]] = {
    ("syncd", "syncd"): between_daemons,
    ("syncd", "slixmpp"): to_other,
    ("slixmpp", "syncd"): from_other,
}


def run(server: Server, row: Row) -> bool:
    """Run one, and print it; whether it went well."""
    home = Path(tempfile.mkdtemp(prefix="sw"))
    watched: list[Process] = []
    daemons = Daemons(home, watched)
    taken: list[float] = []
    why = ""
    try:
        RUNS[row.sender, row.receiver](server, daemons, home, row, taken)
    except AssertionError as error:
        why = str(error)
    finally:
        daemons.end_all()
        shutil.rmtree(home)
    row.show(server.kind, "FAILED" if why else "ok", taken[0] if taken else 0.0)
    if why:
        print(f"    {why}", flush=True)  # noqa: T201
    return not why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--direct", type=int, default=512, help="size, MiB")
    parser.add_argument("--proxy", type=int, default=512, help="size, MiB")
    parser.add_argument("--ibb", type=int, default=8, help="size, MiB")
    arguments = parser.parse_args()
    sizes = {way: getattr(arguments, way) * MIB for way in WAYS}
    good = True
    for kind, start in servers.KINDS.items():
        if lack := servers.missing(kind):
            print(lack)  # noqa: T201
            continue
        with tempfile.TemporaryDirectory() as directory, start(Path(directory)) as server:
            for row in rows(sizes):
                good &= run(server, row)
    sys.exit(not good)


if __name__ == "__main__":
    main()
