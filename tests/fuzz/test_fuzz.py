"""What can be said to a stream, for a bounded number of inputs; see `tests.fuzz.stream`."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.stream import STARTS, check, inputs, one_input

# About a minute in all where time is set aside for it, and a few seconds elsewhere. In parts,
# none of which lasts so long that it would be taken for hanging on a slow machine.
PARTS = 4
EXAMPLES = 3_000 if os.environ.get("CI") else 250


@pytest.mark.parametrize("part", range(PARTS))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn=inputs)
def test_whatever_is_said_only_what_is_promised_happens(
    part: int, drawn: tuple[str, bytes, list[int]]
) -> None:
    """No other error than the documented ones; any reads, the same events; sane answers."""
    check(*drawn)


@pytest.mark.parametrize("data", [b"", b"abc", bytes(100), b"\xff" * 100, bytes(range(256))])
def test_any_bytes_are_an_input(data: bytes) -> None:
    """For fuzzers that know nothing else; each start is among the first bytes."""
    for start in range(len(STARTS)):
        one_input(bytes([start]) + data)


@pytest.mark.parametrize("start", STARTS)
def test_the_target_notices_what_it_is_to_notice(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parser that forgets what it held would pass whole, and differ in pieces."""
    monkeypatch.setattr("syncd.xmpp.xml._Cutter.put", forgetful)
    with pytest.raises(AssertionError):
        check(start, b"<!-- x --><presence/>", [5])


def forgetful(cutter: object, data: bytes) -> None:
    """Take only what comes last."""
    cutter.__dict__.update(_held=bytearray(data), _start=0, _seen=0)
