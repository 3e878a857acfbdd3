"""Where a plain client begins, and what it hears when no streamhost of its leads to it.

How its stream is opened is played in `tests/compat`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from syncd.disk.partial import PartialFile
from syncd.errors import IntegrityError, StalledError, TruncatedError
from syncd.transfer import taking
from tests.support.tcp import connection, pattern

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = pattern(100_000)
HAD = 60_000
START = 40_000
OVERLAP = HAD - START


@pytest.fixture
def partial(tmp_path: Path) -> Iterator[PartialFile]:
    """A file of which some has come."""
    made = PartialFile(tmp_path, "some.part", len(DATA))
    os.pwrite(made.fd, DATA[:HAD], 0)
    made.blocks.update(memoryview(DATA[:HAD]))
    made.offset = HAD
    yield made
    made.close()


def content(partial: PartialFile) -> bytes:
    return os.pread(partial.fd, len(DATA), 0)


async def test_client_that_begins_where_it_was_asked_goes_on(partial: PartialFile) -> None:
    async with connection() as (client, ours):
        await client.send_all(DATA[START:])
        assert await taking.check_overlap(ours, partial, START)
        assert (partial.offset, content(partial)) == (HAD, DATA[:HAD])
        assert bytes(await ours.receive_some(1)) == DATA[HAD : HAD + 1]


async def test_client_that_begins_anew_goes_on_behind_what_was_read(
    partial: PartialFile,
) -> None:
    async with connection() as (client, ours):
        await client.send_all(DATA)
        assert not await taking.check_overlap(ours, partial, START)
        assert (partial.offset, content(partial)) == (OVERLAP, DATA[:OVERLAP])
        assert bytes(await ours.receive_some(1)) == DATA[OVERLAP : OVERLAP + 1]


async def test_client_that_sends_something_else_voids_what_was_there(
    tmp_path: Path, partial: PartialFile
) -> None:
    async with connection() as (client, ours):
        await client.send_all(DATA[START - 1 :])
        with pytest.raises(IntegrityError, match="another file"):
            await taking.check_overlap(ours, partial, START)
    assert list(tmp_path.glob(".syncd/*.part")) == []


@pytest.mark.parametrize("count", [0, 1, OVERLAP - 1])
async def test_client_that_hangs_up_before_anything_new_leaves_what_was_there(
    partial: PartialFile, count: int
) -> None:
    async with connection() as (client, ours):
        await client.send_all(DATA[START : START + count])
        await client.aclose()
        with pytest.raises(TruncatedError):
            await taking.check_overlap(ours, partial, START)
    assert (partial.offset, content(partial)) == (HAD, DATA[:HAD])


async def test_client_that_falls_silent_leaves_what_was_there(
    partial: PartialFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking, "OVERLAP_TIMEOUT", 0.05)
    async with connection() as (client, ours):
        await client.send_all(DATA[START : START + 1])
        with pytest.raises(StalledError):
            await taking.check_overlap(ours, partial, START)
    assert (partial.offset, content(partial)) == (HAD, DATA[:HAD])
