"""What can be asked of a session, for a bounded number of inputs; see `tests.fuzz.session`."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings

from syncd.link.session import Session
from tests.fuzz import session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from xml.etree.ElementTree import Element

    from syncd.errors import StanzaError

# Some twenty seconds where time is set aside for it, and a few elsewhere.
EXAMPLES = 2_000 if os.environ.get("CI") else 300


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Of each bug that is planted there the log would have a traceback."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(session.inputs)
def test_whatever_comes_each_request_is_answered_once_and_nothing_else(
    drawn: session.Input,
) -> None:
    session.check(drawn)


@pytest.mark.parametrize("data", [b"", b"abcde", bytes(100), b"\xff" * 100, bytes(range(256))])
def test_any_bytes_are_an_input(data: bytes) -> None:
    """For fuzzers that know nothing else."""
    session.one_input(data)


ASKED = session.Said("iq", "get", "1", str(session.BOB), ("<what xmlns='urn:b'/>",))
_refuse = Session._refuse


def _refuse_twice(self: Session, request: Element, error: StanzaError) -> None:
    _refuse(self, request, error)
    _refuse(self, request, error)


@pytest.mark.parametrize("refuse", [lambda *_: None, _refuse_twice])
def test_a_request_that_is_not_answered_once_is_noticed(
    refuse: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    session.check((False, [ASKED], []))
    monkeypatch.setattr(Session, "_refuse", refuse)
    with pytest.raises(AssertionError):
        session.check((False, [ASKED], []))
