"""What a network can do to a sealed transfer, for a bounded number of inputs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings

from syncd.trust import seal
from syncd.trust.kem import Kem
from syncd.trust.receipt import seal_finish
from tests.fuzz.seal import CONTENT, Cut, check, inputs, one_input
from tests.support.sealing import ALICE, agree

if TYPE_CHECKING:
    from tests.fuzz.seal import Changes

# Ten seconds where time is set aside for it, and a few elsewhere.
EXAMPLES = 1_500 if os.environ.get("CI") else 400


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(inputs)
def test_whatever_is_changed_nothing_wrong_is_delivered(
    drawn: tuple[Kem, int, int, Changes, Changes, Changes, list[Cut]],
) -> None:
    """No other error than the documented ones; all of the file, or whole true segments."""
    check(*drawn)


@pytest.mark.parametrize("data", [b"", b"\5abc", bytes(300), b"\xff" * 300, bytes(range(256))])
def test_any_bytes_are_an_input(data: bytes) -> None:
    """For fuzzers that know nothing else."""
    one_input(data)


def test_the_target_notices_a_seal_that_opens_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "verify", lambda *_: True)
    monkeypatch.setattr(seal, "digest", lambda *_: b"")
    with pytest.raises(AssertionError):
        # A byte of the header's signature, which is bound by nothing else now.
        check(Kem.X25519, 5, 0, {}, {}, {}, [Cut(100 * 65_536 // 168 + 1, 1, b"x")])


def test_the_target_notices_an_offer_that_nobody_signed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("syncd.trust.handshake.verify", lambda *_: True)
    with pytest.raises(AssertionError):
        check(Kem.X25519, 5, 0, {"kems": "x25519"}, {}, {}, [])


@pytest.mark.parametrize("name", ["sealed", "signature"])
def test_the_target_notices_an_end_that_nobody_signed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Who believes anybody gets a receipt wrong, or a content that somebody else has sealed."""
    other = seal_finish(agree().answer, CONTENT, ALICE)
    monkeypatch.setattr("syncd.trust.receipt.verify", lambda *_: True)
    with pytest.raises(AssertionError):
        check(Kem.X25519, 5, 0, {}, {}, {name: other[name]}, [])
