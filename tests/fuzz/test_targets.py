"""What strangers and peers can say beside XMPP, for a bounded number of inputs.

The targets are `tests.fuzz.socks`, `control` and `inband`; each is shown to find something that
is wrong before it is trusted to find nothing.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings

from syncd.bytestreams import ibb, socks5
from syncd.control import messages
from tests.fuzz import control, inband, socks

# Some ten seconds in all where time is set aside for it, and a few elsewhere.
EXAMPLES = 1_500 if os.environ.get("CI") else 500

bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ANY_BYTES = [b"", b"abc", bytes(100), b"\xff" * 100, bytes(range(256)), b"../\0\n" * 50]


@bounded
@given(socks.inputs)
def test_c13_no_handshake_takes_more_than_it_has(drawn: socks.Input) -> None:
    socks.check(drawn)


@bounded
@given(control.inputs)
def test_c18_garbage_is_refused_in_words(data: bytes) -> None:
    control.check(data)


@bounded
@given(inband.inputs)
def test_c17_no_block_is_more_than_it_says(drawn: inband.Input) -> None:
    inband.check(drawn)


@pytest.mark.parametrize("data", ANY_BYTES)
def test_any_bytes_are_an_input(data: bytes) -> None:
    """For fuzzers that know nothing else."""
    for target in (socks, control, inband):
        target.one_input(data)


def test_an_address_that_is_none_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socks5, "is_address", lambda _: True)
    request = socks.REQUEST.replace(socks.ADDRESS.encode(), b"\n" * 40)
    with pytest.raises(AssertionError):
        socks.check(("acceptor", socks.GREETING + request, []))


def test_a_refusal_that_acts_on_a_terminal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "printable", lambda text: text)
    with pytest.raises(AssertionError):
        control.check(b'{"schema": 1, "command": "\\u001b[2J"}')


def test_a_block_that_is_not_canonical_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibb, "_decode", lambda text, _: text.encode())
    opening = inband.Said("open", None, "", in_message=False)
    block = inband.Said("data", None, "QUJD", in_message=False)
    with pytest.raises(AssertionError):
        inband.check((4, [opening, block]))
