"""How much memory both ends need for a huge file, and how long that takes.

::

    python -m tests.bench.large [--gib 20]

Two daemons over a real Prosody; the file is made of holes at the sender's, and written out at
the receiver's, so its disk needs the room.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

from tests.support import servers
from tests.support.daemons import Daemon, Daemons
from tests.support.processes import Process, until

GIB = 1 << 30  # bytes

# 20 GiB at 100 MiB/s take 200 s.
PATIENCE = 3600.0  # seconds


def peak(daemon: Daemon) -> int:
    """The most memory that a daemon ever had, in MiB."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) >> 10


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=20.0)
    size = int(parser.parse_args().gib * GIB)
    home = Path(tempfile.mkdtemp(prefix="sd"))
    processes: list[Process] = []
    daemons = Daemons(home, processes)
    (home / "server").mkdir()
    try:
        with servers.prosody(home / "server") as server:
            bob = daemons.make("bob", server, accept_from=["alice"])
            alice = daemons.make("alice", server, send_to=["bob"])
            bob.start()
            alice.start()
            alice.wait_connected()
            idle = peak(alice), peak(bob)
            made = home / "made"
            made.touch()
            os.truncate(made, size)
            begun = time.monotonic()
            made.rename(alice.folder / "huge")
            there = bob.folder / "huge"
            until(there.exists, "the file is there", PATIENCE)
            took = time.monotonic() - begun
            print(  # noqa: T201 - what it is for
                f"{size / GIB:g} GiB in {took:.0f} s, {size / took / (1 << 20):.0f} MiB/s\n"
                f"sender: {idle[0]} MiB idle, {peak(alice)} MiB at most\n"
                f"receiver: {idle[1]} MiB idle, {peak(bob)} MiB at most"
            )
            daemons.end_all()
    finally:
        daemons.end_all()
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
