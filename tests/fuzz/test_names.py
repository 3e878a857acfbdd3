"""What a peer can call its file, for a bounded number of inputs; see `tests.fuzz.names`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from syncd.disk import paths
from tests.fuzz.names import check, inputs, one_input

# Some seconds where time is set aside for it, and a few elsewhere.
EXAMPLES = 2_000 if os.environ.get("CI") else 1_000


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(inputs)
def test_whatever_a_file_is_called_it_stays_below_the_folder(name: str) -> None:
    """No other error than the documented ones; what is refused is refused in words."""
    with tempfile.TemporaryDirectory() as around:
        check(name, Path(around))


@pytest.mark.parametrize("data", [b"", b"\xed\xa0\x80", b"\xff/..", b"a/b", bytes(range(256))])
def test_any_bytes_are_an_input(data: bytes) -> None:
    """For fuzzers that know nothing else."""
    one_input(data)


@pytest.mark.parametrize(
    ("lost", "name"), [("_reason_against", "a/.."), ("_is_control", "a\n")]
)
def test_the_target_notices_a_judge_that_lets_all_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lost: str, name: str
) -> None:
    monkeypatch.setattr(paths, lost, lambda _: "")
    with pytest.raises((AssertionError, OSError)):
        check(name, tmp_path)
