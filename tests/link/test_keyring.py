"""What is remembered of logins, in real files."""

from __future__ import annotations

import json
import stat
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from syncd.link.keyring import (
    Pin,
    read_agent,
    read_pin,
    read_token,
    write_agent,
    write_pin,
    write_token,
)
from syncd.xmpp.jid import JID
from syncd.xmpp.sasl import Token

if TYPE_CHECKING:
    from pathlib import Path

USER = JID.parse("user@example.org/laptop")
OTHER_AGENT = "d4565fa7-4d72-4749-b3d3-740edbf87770"
TOKEN = Token(
    account="user@example.org",
    mechanism="HT-SHA-256-ENDP",
    secret='geheim " \n ü',
    expires=datetime(2026, 12, 1, tzinfo=UTC),
)


def test_nothing_is_known_at_first(tmp_path: Path) -> None:
    assert read_pin(tmp_path, USER) == Pin()
    assert read_token(tmp_path, USER) is None


@pytest.mark.parametrize("pin", [Pin("SCRAM-SHA-1"), Pin("SCRAM-SHA-256-PLUS", sasl2=True)])
def test_a_pin_is_kept_for_its_account_alone(tmp_path: Path, pin: Pin) -> None:
    write_pin(tmp_path, USER, pin)
    assert read_pin(tmp_path, USER) == pin
    assert read_pin(tmp_path, JID.parse("other@example.org")) == Pin()


def test_a_pin_of_an_earlier_version_still_counts(tmp_path: Path) -> None:
    (tmp_path / "login").write_text("user@example.org SCRAM-SHA-256\n")
    assert read_pin(tmp_path, USER) == Pin("SCRAM-SHA-256")


def test_a_file_of_one_word_is_no_pin(tmp_path: Path) -> None:
    (tmp_path / "login").write_text("user@example.org\n")
    assert read_pin(tmp_path, USER) == Pin()


def test_a_token_is_kept_for_its_account_alone_and_from_everybody_else(tmp_path: Path) -> None:
    write_token(tmp_path, TOKEN)
    assert read_token(tmp_path, USER) == TOKEN
    assert read_token(tmp_path, JID.parse("other@example.org")) is None
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["token"]


def test_a_token_takes_the_place_of_another_whatever_its_mode(tmp_path: Path) -> None:
    for name in ("token", "token.new"):
        (tmp_path / name).write_text("something else")
        (tmp_path / name).chmod(0o644)
    write_token(tmp_path, TOKEN)
    assert read_token(tmp_path, USER) == TOKEN
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("")
    (tmp_path / "token").symlink_to(elsewhere)
    write_token(tmp_path, TOKEN)
    assert elsewhere.read_text() == ""
    assert read_token(tmp_path, USER) == TOKEN


def test_a_token_can_be_dropped_and_dropped_again(tmp_path: Path) -> None:
    write_token(tmp_path, TOKEN)
    for _ in range(2):
        write_token(tmp_path, None)
        assert read_token(tmp_path, USER) is None


def test_where_nothing_can_be_kept_nothing_is_known(tmp_path: Path) -> None:
    nowhere = tmp_path / "missing"
    write_token(nowhere, TOKEN)
    write_pin(nowhere, USER, Pin("SCRAM-SHA-1"))
    assert read_token(nowhere, USER) is None
    assert read_pin(nowhere, USER) == Pin()


def test_the_agent_stays_until_another_is_kept(tmp_path: Path) -> None:
    agent = read_agent(tmp_path)
    assert str(uuid.UUID(agent)) == agent
    assert read_agent(tmp_path) == agent
    write_agent(tmp_path, OTHER_AGENT)
    assert read_agent(tmp_path) == OTHER_AGENT != agent


@pytest.mark.parametrize("kept", [b"", b"\xff", b"laptop\n", b"d4565fa7" * 9_999])
def test_a_file_that_is_no_agent_is_replaced(tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "agent").write_bytes(kept)
    agent = read_agent(tmp_path)
    assert (tmp_path / "agent").read_text() == f"{agent}\n"


def test_an_agent_that_cannot_be_kept_is_made_each_time(tmp_path: Path) -> None:
    nowhere = tmp_path / "missing"
    assert read_agent(nowhere) != read_agent(nowhere)


GOOD = {
    "account": "user@example.org",
    "mechanism": "HT-SHA-256-ENDP",
    "secret": "x",
    "expires": "2026-12-01T00:00:00+00:00",
}


@pytest.mark.parametrize(
    "kept",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{",
        b"null",
        json.dumps(GOOD | {"expires": "2026-12-01T00:00:00"}).encode(),
        json.dumps(GOOD | {"expires": 7}).encode(),
        json.dumps(GOOD | {"secret": 7}).encode(),
        json.dumps({"account": "user@example.org"}).encode(),
        json.dumps(GOOD | {"secret": "x" * 100_000}).encode(),
    ],
)
def test_a_file_that_is_no_token_is_as_good_as_none(tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "token").write_bytes(kept)
    assert read_token(tmp_path, USER) is None


def test_the_good_one_of_these_is_one(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(json.dumps(GOOD))
    assert read_token(tmp_path, USER) is not None
