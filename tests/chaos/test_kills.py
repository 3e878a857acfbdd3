"""Kill everything, at some seeded points; ``python -m tests.chaos.kills`` does so at 200.

``SYNCD_CHAOS_POINTS`` and ``SYNCD_CHAOS_SEED`` choose others; a failure says which they were.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import product
from pathlib import Path
from tempfile import gettempdir
from typing import get_args

import pytest

from tests.chaos.kills import (
    BLOCK,
    LOGIN,
    OFFER,
    STREAM_OVERHEAD,
    Point,
    Sent,
    Struck,
    Victim,
    run_points,
    schedule,
)
from tests.chaos.world import Way
from tests.support.pair import MIB

POINTS = int(os.environ.get("SYNCD_CHAOS_POINTS", "24"))
SEED = int(os.environ.get("SYNCD_CHAOS_SEED", "1"))

# A test for each so many, so that none takes minutes.
TOGETHER = 8


@pytest.mark.prosody
@pytest.mark.parametrize("first", range(0, POINTS, TOGETHER))
def test_whatever_is_killed_every_file_arrives_right_and_hardly_a_byte_twice(
    first: int,
) -> None:
    """What is looked at after each kill, and in the end, is in `Run`."""
    points = schedule(POINTS, SEED)[first : first + TOGETHER]
    runs = list(run_points(points, SEED, Path(gettempdir())))
    files = [file for run in runs for file in run.files]
    assert [each.point for file in files for each in file.struck] == points
    assert all(file.wire >= file.size for file in files)


def test_every_point_follows_from_the_seed() -> None:
    assert schedule(50, 7) == schedule(50, 7)
    assert schedule(50, 7) != schedule(50, 8)


def test_two_hundred_points_meet_everybody_on_every_way() -> None:
    """Only where bytes go through a proxy can it be killed."""
    met = Counter((point.way, point.victim) for point in schedule(200, 1))
    without = {("direct", "proxy"), ("ibb", "proxy")}
    assert set(met) == set(product(get_args(Way), get_args(Victim))) - without
    assert min(met.values()) >= 10


def test_a_kill_may_cost_a_hundredth_of_the_file_and_what_was_in_flight() -> None:
    file = Sent(name="0", size=100 * MIB, way="direct", before=0, streams=0)
    victims: list[tuple[Victim, int]] = [("line", 0), ("receiver", 5000), ("server", 7000)]
    for victim, in_flight in victims:
        point = Point(number=0, way="direct", victim=victim, after=1)
        file.struck.append(
            Struck(point=point, in_flight=in_flight, began=False, killed=0.0, back=0.0)
        )
    assert file.allowed() == 2 * MIB + 5000


def test_a_server_that_bytes_go_through_takes_some_along() -> None:
    file = Sent(name="0", size=100 * MIB, way="ibb", before=0, streams=0)
    point = Point(number=0, way="ibb", victim="server", after=1)
    file.struck.append(Struck(point=point, in_flight=7000, began=False, killed=0.0, back=0.0))
    assert file.allowed() == MIB + 7000


@pytest.mark.parametrize("way", get_args(Way))
def test_a_second_time_shows_on_every_way(way: Way) -> None:
    """What is around the bytes is not taken for bytes of the file, nor the reverse."""
    file = Sent(name="0", size=6 * MIB, way=way, before=0, streams=0)
    wire = file.size + STREAM_OVERHEAD
    if way == "ibb":
        wire = file.size * BLOCK[1] // BLOCK[0] + LOGIN + 2 * OFFER
    assert abs(file.went(wire, streams=1) - file.size) <= 4096
    assert file.went(wire + 2 * MIB, streams=1) - file.size > MIB
