from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from syncd.sync.database import open_database
from syncd.sync.pins import Pin, Pins

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

BOB, CAROL = "bob@example.org", "carol@example.org"
KEY, OTHER_KEY = b"k" * 32, b"o" * 32


@dataclass
class Clock:
    """Stands still until told."""

    now: float = 1000.0  # seconds since 1970

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def pins(tmp_path: Path, clock: Clock) -> AsyncIterator[Pins]:
    async with open_database(tmp_path) as database:
        yield Pins(database, clock=clock)


async def test_who_never_showed_a_key_has_no_pin(pins: Pins) -> None:
    assert await pins.pin(BOB) is None
    assert await pins.pins() == []


async def test_a_key_is_kept_as_it_was_first_seen(pins: Pins, clock: Clock) -> None:
    first = await pins.set_pin(BOB, KEY, "unverified")
    assert first == Pin(
        peer=BOB, public_key=KEY, state="unverified", first_seen=1000.0, last_seen=1000.0
    )
    clock.now = 2000.0
    again = await pins.set_pin(BOB, KEY, "unverified")
    assert (again.first_seen, again.last_seen) == (1000.0, 2000.0)
    assert await pins.pin(BOB) == again


async def test_when_a_key_was_verified_stays_known_while_it_is(
    pins: Pins, clock: Clock
) -> None:
    await pins.set_pin(BOB, KEY, "unverified")
    clock.now = 2000.0
    await pins.set_pin(BOB, KEY, "verified")
    clock.now = 3000.0
    pin = await pins.set_pin(BOB, KEY, "verified")
    assert (pin.first_seen, pin.last_seen, pin.verified_at) == (1000.0, 3000.0, 2000.0)
    blocked = await pins.set_pin(BOB, KEY, "blocked")
    assert (blocked.state, blocked.verified_at) == ("blocked", None)


async def test_another_key_has_nothing_of_the_one_before(pins: Pins, clock: Clock) -> None:
    await pins.set_pin(BOB, KEY, "verified")
    clock.now = 2000.0
    pin = await pins.set_pin(BOB, OTHER_KEY, "unverified")
    assert pin == Pin(
        peer=BOB, public_key=OTHER_KEY, state="unverified", first_seen=2000.0, last_seen=2000.0
    )
    assert await pins.pins() == [pin]


async def test_a_key_can_be_forgotten(pins: Pins) -> None:
    await pins.set_pin(CAROL, OTHER_KEY, "blocked")
    await pins.set_pin(BOB, KEY, "verified")
    assert [pin.peer for pin in await pins.pins()] == [BOB, CAROL]
    assert await pins.forget_pin(BOB) is True
    assert await pins.forget_pin(BOB) is False
    assert await pins.pin(BOB) is None
    assert [pin.peer for pin in await pins.pins()] == [CAROL]


async def test_pins_survive_a_restart(tmp_path: Path) -> None:
    async with open_database(tmp_path) as database:
        pin = await Pins(database).set_pin(BOB, KEY, "verified")
    async with open_database(tmp_path) as database:
        assert await Pins(database).pins() == [pin]


async def test_who_never_showed_a_key_can_be_blocked(pins: Pins, clock: Clock) -> None:
    first = await pins.set_pin(BOB, None, "blocked")
    assert await pins.pin(BOB) == first
    clock.now = 2000.0
    again = await pins.set_pin(BOB, None, "blocked")
    assert (again.public_key, again.first_seen, again.last_seen) == (None, 1000.0, 2000.0)
