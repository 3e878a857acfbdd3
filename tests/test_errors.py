from __future__ import annotations

import inspect

import pytest

from syncd import errors
from syncd.errors import (
    AuthenticationError,
    ConfigError,
    DeclinedError,
    ErrorType,
    OfflineError,
    StanzaError,
    StreamError,
    SyncdError,
    TransferError,
    XMPPError,
)

CLASSES = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, SyncdError)
]


def test_an_error_is_a_sentence_a_hint_and_a_type() -> None:
    error = ConfigError("the key is wrong", hint="correct it")
    assert str(error) == "the key is wrong"
    assert error.hint == "correct it"
    assert error.type is ErrorType.CANCEL
    assert ConfigError("the key is wrong").hint == ""


def test_the_type_can_be_given() -> None:
    assert OfflineError("gone").type is ErrorType.WAIT
    assert OfflineError("gone", type=ErrorType.CANCEL).type is ErrorType.CANCEL


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (XMPPError, ErrorType.WAIT),
        (OfflineError, ErrorType.WAIT),
        (TransferError, ErrorType.WAIT),
        (AuthenticationError, ErrorType.AUTH),
        (DeclinedError, ErrorType.CANCEL),
        (ConfigError, ErrorType.CANCEL),
    ],
)
def test_only_what_may_pass_by_itself_is_tried_again(
    kind: type[SyncdError], expected: ErrorType
) -> None:
    assert kind("why").type is expected


def test_a_stream_error_names_its_condition_and_the_servers_words() -> None:
    error = StreamError("conflict", "Replaced by new connection")
    assert (error.condition, error.text) == ("conflict", "Replaced by new connection")
    assert str(error) == "the stream ended: Replaced by new connection [conflict]"
    assert str(StreamError("conflict")) == "the stream ended: conflict [conflict]"


def test_a_stanza_error_names_who_refused_and_why() -> None:
    error = StanzaError(
        ErrorType.AUTH, "forbidden", "not for you", by="bob@example.org", app="{urn:a}b"
    )
    assert (error.type, error.condition) == (ErrorType.AUTH, "forbidden")
    assert (error.text, error.by, error.app) == ("not for you", "bob@example.org", "{urn:a}b")
    assert str(error) == "bob@example.org refused: not for you [forbidden]"
    assert str(StanzaError(ErrorType.WAIT, "conflict")) == "refused: conflict [conflict]"


def test_the_drawing_shows_the_whole_tree() -> None:
    drawn = errors.__doc__ or ""
    assert [each.__name__ for each in CLASSES if each.__name__ not in drawn] == []


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_described_for_people(kind: type[SyncdError]) -> None:
    assert (kind.__doc__ or "").splitlines()[0].endswith(".")
