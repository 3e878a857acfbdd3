"""A target for the control socket: what a client may ask, and what a daemon may answer.

Each message is understood, or refused in one line that can be shown; nothing else happens.
From the command line::

    python -m tests.fuzz.control --seconds 3600 [--seed 7]
"""

from __future__ import annotations

import json

from hypothesis import strategies as st

from syncd.control.escape import printable
from syncd.control.messages import (
    COMMANDS,
    KeyRequest,
    LimitRequest,
    PeerRequest,
    PingRequest,
    RescanRequest,
    SendRequest,
    StandingRequest,
    StatusRequest,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from syncd.errors import ControlError
from tests.fuzz import loop
from tests.support.statuses import status

REQUESTS = (
    StatusRequest(),
    RescanRequest(),
    PingRequest(),
    LimitRequest(peer="bob@example.org", up=1),
    SendRequest(path="/a", peer="bob@example.org"),
    StandingRequest(path="/a", peer="bob@example.org"),
    PeerRequest(action="list"),
    KeyRequest(action="show"),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(sorted(COMMANDS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["schema", "command", "kind", "peer", "path", "up", "down", "action", "fingerprint", "x"]
)
questions = st.dictionaries(
    FIELDS, VALUES | st.sampled_from([1, *sorted(COMMANDS)]), max_size=6
).map(lambda fields: json.dumps(fields).encode())
STATUS = encode_reply(status())


@st.composite
def cut(draw: st.DrawFn) -> bytes:
    """A message with something put in, cut out, or doubled."""
    data = draw(st.sampled_from([STATUS, *(encode_request(each) for each in REQUESTS)]))
    for _ in range(draw(st.integers(1, 3))):
        here = draw(st.integers(0, len(data)))
        there = draw(st.integers(here, min(len(data), here + 20)))
        new = draw(
            st.binary(max_size=6) | st.sampled_from([data[here:there] * 2, b"[" * 5_000])
        )
        data = data[:here] + new + data[there:]
    return data


inputs = st.one_of(questions, cut(), st.binary(max_size=200))


def check(data: bytes) -> None:
    """Fail if these bytes do anything but be understood or refused."""
    try:
        request = decode_request(data)
    except ControlError as refusal:
        check_refusal(refusal)
    else:
        assert decode_request(encode_request(request)) == request
    try:
        reply = decode_reply(data)
    except ControlError as refusal:
        check_refusal(refusal)
    else:
        assert decode_reply(encode_reply(reply)) == reply


def check_refusal(refusal: ControlError) -> None:
    """It is a sentence on one line, of a length to be read."""
    text = str(refusal)
    assert printable(text) == text
    assert len(text) < 3_000


def one_input(data: bytes) -> None:
    """The same for a fuzzer that makes bytes."""
    check(data)


if __name__ == "__main__":
    loop.run(__doc__, inputs, check, one_input)
