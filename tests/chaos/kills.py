"""``python -m tests.chaos.kills``: kill everything, at many seeded points of many transfers.

Who is killed and behind which byte comes from the seed. At each point the gate stops exactly
there, somebody is killed (SIGKILL) or the connection is reset, and it is looked at what lies
in the receiver's folder: the file is absent or right, and nothing else has appeared. Then what
was killed is started again, and the transfer must go on by itself. Each file is met ten times;
in the end it is right, delivered once, nothing is left over, and what went over the wire more
than once is counted against what one kill may cost.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from syncd.bytestreams.ibb import BLOCK_SIZE
from syncd.disk.blocks import FIRST_BYTES, MIN_BLOCK
from tests.chaos.world import Way, World, open_world
from tests.support.daemons import Daemons, digests
from tests.support.pair import MIB, visible
from tests.support.processes import until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Victim = Literal["sender", "receiver", "server", "proxy", "line"]

KILLS_PER_FILE = 10
SIZES: dict[Way, range] = {  # bytes
    "direct": range(48 * MIB, 64 * MIB),
    "proxy": range(48 * MIB, 64 * MIB),
    # Slow, and not for large files.
    "ibb": range(12 * MIB, 16 * MIB),
}

# The greetings of SOCKS5, the header of the seal and the first bytes behind it: many a state
# lies within so few bytes, that hardly any kill would meet one by chance.
OPENING = 2_048  # bytes
# Behind the last byte come the receipt, the fsync, the rename and the journal.
ENDING = 0.03  # seconds

# What goes over a line beside the file: greetings and the header of the seal for each stream,
# and a tag for each segment of 64 KiB (16 bytes; some segments are shorter).
STREAM_OVERHEAD = 2_048  # bytes
SEALED_PART = 2_048  # bytes of the file per byte of tags

# In-band: a login, with presence and questions, for each connection; an offer and an answer for
# each connection and each kill; and around each block, which is longer in base64, a stanza and
# a record of TLS.
LOGIN = 16_384  # bytes
OFFER = 8_192  # bytes
BLOCK = (BLOCK_SIZE, 4 * BLOCK_SIZE // 3 + 250)  # bytes of the file, bytes on the wire

# More than greetings, which who only looks at a proxy exchanges, too; or than a login.
_GREETING: dict[Way, int] = {"direct": 200, "proxy": 200, "ibb": LOGIN}  # bytes

# Reached only by what fails: the longest that a daemon waits by itself are the 45 s for an
# answer of a peer whose session the server still holds.
_MEET_TIMEOUT = 60.0  # seconds
_LOOK = 0.002  # seconds
# Far longer than the server is busy with a few blocks.
_REST = 0.2  # seconds
# What has been read is written, and its digest noted, within that.
_WRITTEN = 0.02  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where somebody is killed.

    Attributes:
      number: Of the whole run, from 0.
      way: Which the bytes take.
      victim: Who is killed; ``line``: the connection is reset.
      after: Behind how many bytes of the bytestream that is open then; None: behind the last.
      delay: How long behind the last byte, seconds.
      read: The receiver has read all that came before; else some of it is in flight.
    """

    number: int
    way: Way
    victim: Victim
    after: int | None
    delay: float = 0.0
    read: bool = False

    def __str__(self) -> str:
        where = f"{self.delay * 1000:.0f} ms behind the end"
        if self.after is not None:
            where = f"behind byte {self.after}, {'read' if self.read else 'in flight'}"
        return f"point {self.number}: {self.victim}, {self.way}, {where}"


@dataclass(slots=True, kw_only=True)
class Struck:
    """What came of one point.

    Attributes:
      point: Which.
      in_flight: What the receiver had not read when it happened, bytes.
      began: Whether it was within the first bytes of the file, which have no digests yet.
      killed: When, on the monotonic clock, seconds.
      back: When what was killed was there again.
      moving: When bytes moved again, or the file was there; None before.
    """

    point: Point
    in_flight: int
    began: bool
    killed: float
    back: float
    moving: float | None = None

    @property
    def costs(self) -> bool:
        """Whether bytes that were on their way are gone."""
        return self.point.victim != "server" or self.point.way == "ibb"


@dataclass(slots=True, kw_only=True)
class Sent:
    """One file, and what it took to deliver it.

    Attributes:
      name: In the folder.
      size: Bytes.
      way: Which it takes.
      before: What had gone over the line before, bytes.
      streams: How many bytestreams there had been.
      struck: The kills on its way.
      wire: What went over the line for it, bytes; set at its end.
      twice: How much of that it had been sent before, bytes; likewise.
    """

    name: str
    size: int
    way: Way
    before: int
    streams: int
    struck: list[Struck] = field(default_factory=list)
    wire: int = 0
    twice: int = 0

    def went(self, wire: int, streams: int) -> int:
        """How much of the file went over the wire, bytes; at least.

        Args:
          wire: What went over it for the file in all, bytes.
          streams: How many bytestreams there have been by then.
        """
        streams -= self.streams
        if self.way == "ibb":
            talk = streams * LOGIN + (streams + len(self.struck) + 1) * OFFER
            return max(0, wire - talk) * BLOCK[0] // BLOCK[1]
        return wire - streams * STREAM_OVERHEAD - wire // SEALED_PART

    def allowed(self) -> int:
        """How much of it may go twice after these kills, bytes.

        A server that goes takes nothing along where no byte goes through it.
        """
        block = max(MIN_BLOCK, self.size // 100)
        return sum(
            max(block, FIRST_BYTES if each.began else 0) + each.in_flight
            for each in self.struck
            if each.costs
        )


def schedule(count: int, seed: int, ways: Sequence[Way] = get_args(Way)) -> list[Point]:
    """Choose where to strike: first all points of one way, then those of the next."""
    # Not a test of chance: everything about a point follows from the seed.
    choice = random.Random(seed)
    points = []
    # On each way everybody has a turn before anybody has the next.
    turns: dict[Way, list[Victim]] = {way: [] for way in ways}
    for number in range(count):
        way = ways[number * len(ways) // count]
        if not turns[way]:
            turns[way] += ["sender", "receiver", "server", "line"]
            if way == "proxy":
                turns[way] += ["proxy"]
            choice.shuffle(turns[way])
        victim = turns[way].pop()
        after: int | None = None
        delay = choice.uniform(0, ENDING)
        match choice.random():
            case low if low < 0.15:
                after = choice.randint(1, OPENING)
            case low if low < 0.9:
                after = choice.randint(1, 2 * SIZES[way].start // KILLS_PER_FILE)
        # Nobody sees what lies in a server.
        read = choice.random() < 0.7 and way != "ibb"
        points.append(
            Point(number=number, way=way, victim=victim, after=after, delay=delay, read=read)
        )
    return points


class Run:
    """Strikes at points of one way.

    Args:
      world: Where.
      seed: For the content of the files.

    Attributes:
      files: All that were sent, in turn.
      way: Which their bytes took.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.files: list[Sent] = []
        self.way = world.way
        self._greeting = _GREETING[world.way]
        self._world = world
        self._content = random.Random(seed)
        self._wanted: dict[str, str] = {}  # digests by name

    def strike_all(self, points: Iterable[Point]) -> None:
        """Start everything, strike at each point, and deliver the last file."""
        self._world.pair.start()
        for point in points:
            try:
                self._strike(point)
            except AssertionError as error:
                error.add_note(str(point))
                raise
        self._deliver()

    def _strike(self, point: Point) -> None:
        gate = self._world.gate
        if not self.files or self._is_done(self.files[-1]):
            # Nothing moves before it: the gate is set while it is shut.
            self._set(point)
            self._drop()
        else:
            self._set(point)
        file = self.files[-1]
        self._meet(point)
        sent = file.went(self._world.sent() - file.before, len(gate.passed))
        struck = Struck(
            point=point,
            in_flight=self._world.in_flight(),
            began=sent <= FIRST_BYTES + file.allowed(),
            killed=time.monotonic(),
            back=0.0,
        )
        # Shut until it is known where the next point is.
        gate.hold_after(0)
        self._kill(point.victim)
        file.struck.append(struck)
        self._check()
        self._start(point.victim)
        struck.back = time.monotonic()
        there = (self._world.pair.bob.folder / file.name).exists()
        if there or len(file.struck) == KILLS_PER_FILE:
            self._deliver()

    def _set(self, point: Point) -> None:
        """Let pass what passes before the point."""
        gate = self._world.gate
        if point.after is None:
            gate.open()
        else:
            gate.hold_after(gate.most() + point.after)

    def _meet(self, point: Point) -> None:
        """Wait for the moment; where the file ends before it, that is the moment."""
        world, file = self._world, self.files[-1]
        gate = world.gate
        last = file.struck[-1] if file.struck else None
        first, base = len(gate.passed), world.sent()
        deadline = time.monotonic() + _MEET_TIMEOUT
        ended = False
        while not ended and not gate.holding:
            assert time.monotonic() < deadline, f"nothing comes to {point}"
            world.check_running()
            there = (world.pair.bob.folder / file.name).exists()
            if last and last.moving is None and (there or world.sent() > base + self._greeting):
                last.moving = time.monotonic()
            moved = max(gate.passed[first:], default=0)
            # Where the gate is before the server, its connection lasts.
            ended = there or (moved > OPENING and gate.idle and self.way != "ibb")
            time.sleep(_LOOK)
        if last and last.moving is None:
            last.moving = time.monotonic()
        if ended:
            time.sleep(point.delay)
        elif point.read:
            until(lambda: world.in_flight() <= self._greeting, "the receiver has read it")
            time.sleep(_WRITTEN)

    def _kill(self, victim: Victim) -> None:
        world = self._world
        match victim:
            case "sender":
                world.pair.alice.kill9()
            case "receiver":
                world.pair.bob.kill9()
            case "server":
                world.server.kill()
            case "proxy":
                assert world.proxy is not None
                world.proxy.kill()
            case "line":
                if self.way == "ibb":
                    self._wait_at_rest()
        # What passes the gate ends where the one that was killed was an end of it.
        if victim != ("receiver" if self.way == "ibb" else "server"):
            world.gate.reset()

    def _wait_at_rest(self) -> None:
        """Let the server say all that it has to say.

        Prosody 0.12.3 hears nothing more in a session that is resumed after its connection
        broke in the middle of an answer: who resumes it again and again waits in vain. Our
        client gives such a session up after minutes, which no test has.
        """
        seen, since = -1, time.monotonic()
        while time.monotonic() < since + _REST:
            time.sleep(_LOOK)
            now = sum(self._world.gate.passed)
            if now != seen:
                seen, since = now, time.monotonic()

    def _start(self, victim: Victim) -> None:
        world = self._world
        match victim:
            case "sender":
                world.pair.alice.start()
            case "receiver":
                world.pair.bob.start()
            case "server":
                world.server.start()
            case "proxy":
                world.start_proxy()
            case "line":
                pass

    def _drop(self) -> None:
        world, number = self._world, len(self.files)
        size = self._content.choice(SIZES[self.way])
        file = Sent(
            name=f"{number}.bin",
            size=size,
            way=self.way,
            before=world.sent(),
            streams=len(world.gate.passed),
        )
        self.files.append(file)
        world.pair.alice.drop(file.name, self._content.randbytes(size))
        self._wanted = digests(world.pair.alice.folder)

    def _is_done(self, file: Sent) -> bool:
        return bool(file.wire)

    def _check(self) -> None:
        """Under the final name lies nothing, or the right file; and no other file."""
        there = {
            path: digest
            for path, digest in digests(self._world.pair.bob.folder).items()
            if path in visible(self._world.pair.bob)
        }
        assert there.items() <= self._wanted.items()
        done = {file.name for file in self.files if file.wire}
        assert done <= there.keys()

    def _deliver(self) -> None:
        """See the last file delivered: right, once, nothing left over, nothing sent twice."""
        world, file = self._world, self.files[-1]
        if file.wire:
            return
        pair, last = world.pair, file.struck[-1] if file.struck else None
        base = world.sent()
        world.gate.open()

        def there() -> bool:
            seen = (pair.bob.folder / file.name).exists()
            if last and last.moving is None and (seen or world.sent() > base + self._greeting):
                last.moving = time.monotonic()
            return seen

        until(there, f"{file.name} is there", _MEET_TIMEOUT)
        pair.alice.wait_delivered(_MEET_TIMEOUT)
        self._check()
        peer = pair.alice.peer("bob")
        assert (peer.pending, peer.delivered) == (0, len(self.files))
        until(lambda: digests(pair.bob.folder) == self._wanted, "nothing is left over")
        file.wire = world.sent() - file.before
        file.twice = file.went(file.wire, len(world.gate.passed)) - file.size
        assert file.twice <= file.allowed(), f"{file.name}: {file.twice} bytes went twice"


def run_points(points: Sequence[Point], seed: int, directory: Path) -> Iterator[Run]:
    """Strike at all points, each way in a world of its own.

    Yields:
      What came of each way.
    """
    for way in dict.fromkeys(point.way for point in points):
        home = Path(tempfile.mkdtemp(prefix="sk", dir=directory))
        daemons = Daemons(home, [])
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, home)
            world = stack.enter_context(open_world(way, home, daemons))
            run = Run(world, seed)
            try:
                run.strike_all([point for point in points if point.way == way])
            except BaseException as error:
                error.add_note(f"seed {seed}")
                for process in world.processes:
                    error.add_note(f"--- log of {process.name} ---\n{process.tail()}")
                raise
        yield run


def report(runs: Sequence[Run]) -> str:
    """Say what the kills cost, in bytes and in time."""
    files = [file for run in runs for file in run.files]
    struck = [each for file in files for each in file.struck]
    total = sum(file.size for file in files)
    wire = sum(file.wire for file in files)
    twice = sum(max(0, file.twice) for file in files)
    lost = [each for each in struck if each.costs]
    flying = sum(each.in_flight for each in lost)
    lines = [
        f"{len(struck)} kills, {len(files)} files, {total / MIB:.0f} MiB",
        f"on the wire {wire / MIB:.2f} MiB, {wire - total} bytes more than the files; sent "
        f"twice {twice}, {twice / len(struck):.0f} for each kill; allowed "
        f"{sum(file.allowed() for file in files)}, of these in flight {flying}",
        "sent twice of each file, for each kill: "
        + " ".join(
            f"{100 * max(0, file.twice) / file.size / max(1, len(file.struck)):.2f}%"
            for file in files
        ),
    ]
    for victim in get_args(Victim):
        of = [each for each in struck if each.point.victim == victim]
        for name, times in (
            ("until bytes moved", [e.moving - e.killed for e in of if e.moving]),
            ("of these from its start on", [e.moving - e.back for e in of if e.moving]),
        ):
            if times:
                times.sort()
                lines.append(
                    f"{victim:8} {len(times):3} kills, {name}: "
                    f"median {statistics.median(times):.2f} s, "
                    f"p90 {times[int(0.9 * (len(times) - 1))]:.2f} s, "
                    f"longest {times[-1]:.2f} s"
                )
    slowest = sorted(struck, key=lambda e: (e.moving or e.back) - e.back, reverse=True)[:8]
    lines += [f"  {(e.moving or e.back) - e.back:6.2f} s  {e.point}" for e in slowest]
    return "\n".join(lines)


def main() -> None:
    """Run as many points as asked for, and print what they cost."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kills", description=__doc__)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--way", choices=get_args(Way), action="append")
    args = parser.parse_args()
    points = schedule(args.points, args.seed, args.way or get_args(Way))
    runs: list[Run] = []
    for run in run_points(points, args.seed, Path(tempfile.gettempdir())):
        runs.append(run)
        sys.stdout.write(f"seed {args.seed}, {run.way}:\n{report([run])}\n")
    sys.stdout.write(f"in all:\n{report(runs)}\n")


if __name__ == "__main__":
    main()
