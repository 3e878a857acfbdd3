from __future__ import annotations

import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.control import messages
from syncd.control.messages import (
    MAX_REPLY,
    MAX_REQUEST,
    Key,
    KeyRequest,
    Keys,
    Limited,
    LimitRequest,
    LimitStatus,
    PeerRequest,
    PingRequest,
    Pong,
    Refusal,
    Reply,
    Request,
    Rescanned,
    RescanRequest,
    SendRequest,
    Standing,
    StandingRequest,
    StatusRequest,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from syncd.errors import ControlError
from tests.support.statuses import BOB, DECLINED, NOW, PHOTOS, SENDING, but, status

REQUESTS = [
    StatusRequest(),
    RescanRequest(),
    PingRequest(),
    LimitRequest(peer="bob@example.org", up=1024, down=0),
    SendRequest(path="/srv/a.pdf", peer="bob@example.org"),
    StandingRequest(path="/srv/a.pdf", peer="bob@example.org"),
    PeerRequest(action="reset-key", peer="bob@example.org"),
    KeyRequest(action="rotate"),
]
REPLIES = [
    status(transfers=(SENDING,), errors=(DECLINED,)),
    Rescanned(files=3),
    Pong(version="1.2.3", pid=77),
    Limited(peer="", limit=LimitStatus(up=1024)),
    Standing(state="parked", online=True, error="declined", hint="ask bob"),
    Keys(
        own="aa",
        keys=(
            Key(
                peer="bob@example.org",
                state="unverified",
                fingerprint="bb",
                words=("one", "two"),
                first_seen=NOW,
                last_seen=NOW,
            ),
        ),
    ),
    Refusal(code="busy", message="syncd is busy", hint="try again"),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_arrives_as_it_was_sent(request_: Request) -> None:
    assert decode_request(encode_request(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES)
def test_a_reply_arrives_as_it_was_sent(reply: Reply) -> None:
    assert decode_reply(encode_reply(reply)) == reply


def test_the_wire_is_what_others_may_rely_on() -> None:
    assert json.loads(encode_request(StatusRequest())) == {"schema": 1, "command": "status"}

    wire = json.loads(encode_reply(status(transfers=(SENDING,), errors=(DECLINED,))))

    assert wire["schema"] == 1
    assert wire["state"] == "ok"
    assert {"state", "jid", "server"} <= wire["connection"].keys()
    assert {"id", "path", "files", "pending"} <= wire["folders"][0].keys()
    assert wire["peers"][0].keys() >= {
        "jid", "online", "resource", "encryption", "pending", "delivered", "last_error",
    }  # fmt: skip
    assert wire["transfers"][0].keys() >= {
        "direction", "peer", "folder", "path", "size", "offset", "method", "rate",
    }  # fmt: skip
    assert wire["errors"][0]["hint"] == DECLINED.hint
    assert re.fullmatch(r"[\d-]{10}T[\d:.]{8,15}Z", wire["errors"][0]["time"])


def test_what_a_newer_end_adds_is_ignored() -> None:
    assert decode_request(b'{"schema":1,"command":"status","folder":"x"}') == StatusRequest()
    assert decode_reply(b'{"schema":1,"kind":"rescanned","files":3,"bytes":9}') == Rescanned(
        files=3
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "malformed"),
        (b"null", "malformed"),
        (b"[]", "malformed"),
        (b'"\xff"', "malformed"),
        (b"[" * 60_000, "malformed"),
        (b'{"schema":1}', "malformed"),
        (b'{"schema":"1","command":"status"}', "malformed"),
        (b'{"schema":1,"command":"status"} {}', "malformed"),
        (b'{"schema":2,"command":"status"}', "schema 1, not 2"),
        (b'{"schema":1,"command":"exp\\u001blode"}', r'no command "exp\x1blode"'),
        (b" " * (MAX_REQUEST + 1), f"at most {MAX_REQUEST} bytes"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(data: bytes, said: str) -> None:
    with pytest.raises(ControlError, match=re.escape(said)):
        decode_request(data)


@given(st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
    lambda value: json.dumps(value).encode()
))  # fmt: skip
def test_garbage_is_never_more_than_a_control_error(data: bytes) -> None:
    with pytest.raises(ControlError):
        decode_request(data)
    with pytest.raises(ControlError):
        decode_reply(data)


@given(st.sampled_from(REPLIES), st.data())
def test_a_damaged_reply_is_a_reply_or_a_control_error(
    reply: Reply, data: st.DataObject
) -> None:
    wire = bytearray(encode_reply(reply))
    wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))

    try:
        outcome: object = decode_reply(bytes(wire))
    except ControlError as error:
        outcome = error

    assert isinstance(outcome, (type(reply), ControlError))


def test_a_reply_of_another_schema_is_refused() -> None:
    with pytest.raises(ControlError, match="schema 2, not 1"):
        decode_reply(b'{"schema":2,"kind":"rescanned","files":3}')


def test_a_file_name_that_is_no_utf8_does_not_break_the_status() -> None:
    name = b"caf\xe9.txt".decode(errors="surrogateescape")

    reply = decode_reply(encode_reply(status(transfers=(but(SENDING, path=name),))))

    assert reply == status(transfers=(but(SENDING, path=r"caf\xe9.txt"),))


def test_a_reply_that_no_client_would_take_is_refused_here() -> None:
    long = tuple(but(BOB, last_error="x" * 100_000) for _ in range(MAX_REPLY // 100_000 + 1))

    with pytest.raises(ControlError, match="longer than"):
        encode_reply(status(peers=long))


def test_the_commands_are_those_of_the_request_types() -> None:
    tags = {type(request).__struct_config__.tag for request in REQUESTS}

    assert tags == messages.COMMANDS


def test_a_negative_count_is_no_status() -> None:
    wire = msgspec.to_builtins(status(folders=(but(PHOTOS, files=-1),)))

    with pytest.raises(ControlError, match="files"):
        decode_reply(json.dumps(wire).encode())
