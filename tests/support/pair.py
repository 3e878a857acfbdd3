"""Alice and bob, each with a daemon: one sends, one receives, and nothing goes unseen."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support.daemons import DELIVERY_TIMEOUT, digests, identities
from tests.support.processes import until

if TYPE_CHECKING:
    from syncd.control.messages import TransferStatus
    from tests.support.daemons import Daemon
    from tests.support.gate import Gate

MIB = 1024 * 1024

# What is to be caught in its middle, and how much of it passes before the gate holds.
BIG = 24 * MIB  # bytes
FIRST = 8 * MIB  # bytes
# So much has certainly arrived then: the rest may lie in buffers on the way.
ARRIVED = 2 * MIB  # bytes

# Names that a file system takes, and that something on the way might not.
ODD_NAMES = [
    " a space at each end ",
    "two  words.txt",
    "ümläut 日本語 🎉.txt",
    'it\'s "quoted".txt',
    "a&b<c>d;&amp;.xml",
    "]]>.xml",
    "100%41.txt",
    "back\\slash",
    "-rf",
    "C: is no drive",
    "x" * 255,
    "ein Ordner mit Ä/unter & <drunter>/{leaf}.txt",
]


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that nobody can compress, and no two alike pieces of which could be swapped."""
    return random.Random(seed).randbytes(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Alice, who sends, and bob, who receives; all bytes go through the gate."""

    alice: Daemon
    bob: Daemon
    gate: Gate

    def start(self) -> None:
        self.bob.start()
        self.alice.start()


def offset(daemon: Daemon) -> int:
    """How far the only transfer of a daemon is; 0 when there is none."""
    return sum(transfer.offset for transfer in transfers(daemon))


def transfers(daemon: Daemon) -> tuple[TransferStatus, ...]:
    return daemon.status().transfers


def visible(daemon: Daemon) -> set[str]:
    """The names that a user would see in a folder."""
    return {path for path in identities(daemon.folder) if not path.startswith(".")}


def until_all_there(pair: Pair) -> None:
    """Wait until bob has what alice has; what shows up before is never half of it.

    Compared is by name and then by content, so a file that is wrong fails at once.
    """
    wanted = digests(pair.alice.folder)

    def all_there() -> bool:
        there = {
            path: digest
            for path, digest in digests(pair.bob.folder).items()
            if not path.startswith(".")
        }
        assert there.items() <= wanted.items()
        return there == wanted

    until(all_there, "bob has what alice has", DELIVERY_TIMEOUT)


def assert_delivered(pair: Pair) -> None:
    """Both hold the same, byte for byte, nothing is left over, and alice knows it."""
    pair.alice.wait_delivered()
    assert digests(pair.bob.folder) == digests(pair.alice.folder)
    peer = pair.alice.peer("bob")
    assert (peer.pending, peer.last_error, peer.problem) == (0, "", "")
    status = pair.alice.ctl("status")
    assert status.returncode == 0
    assert "OK" in status.stdout
