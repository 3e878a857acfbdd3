"""A target for an in-band bytestream: what its other end may say, in any order.

Whatever it says, the bytes handed on are those of the blocks in order and no more than were
due; each refusal is a stanza error; and the state only moves on. From the command line::

    python -m tests.fuzz.inband --seconds 3600 [--seed 7]
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TypeAlias

from hypothesis import strategies as st

from syncd.bytestreams import ibb
from syncd.bytestreams.ibb import Incoming, State
from syncd.errors import StanzaError
from syncd.xmpp.xml import make
from tests.fuzz import loop

NUMBERS = st.sampled_from(
    ["0", "1", "2", "65535", "65536", "-1", "", "01", "٣", "1e0", "9" * 9]
)
TEXTS = st.binary(max_size=30).map(
    lambda data: base64.b64encode(data).decode()
) | st.sampled_from(
    [
        "",
        "====",
        "QUJD====",
        "AB==",
        "QUI",
        " Q U I = ",
        "QUJ\u00e9",
        "QUJD\0",
        "-_-_",
        "x" * 99,
    ]
)


@dataclass(frozen=True, slots=True)
class Said:
    """One stanza of the other end.

    Attributes:
      kind: ``open``, ``data`` or ``close``.
      number: Its ``block-size`` or ``seq``; None is the right one.
      text: What it holds.
      in_message: It came in a message.
    """

    kind: str
    number: str | None
    text: str
    in_message: bool


said = st.builds(
    Said,
    st.sampled_from(["open", "data", "data", "data", "close"]),
    st.none() | NUMBERS,
    TEXTS,
    st.booleans(),
)
inputs = st.tuples(st.integers(0, 100), st.lists(said, max_size=20))
Input: TypeAlias = tuple[int, list[Said]]


def check(drawn: Input) -> None:
    """Fail if a stream does anything but what is promised."""
    length, conversation = drawn
    incoming = Incoming(length)
    got, right = b"", 0
    for now, each in enumerate(conversation):
        before = incoming.state, incoming.refusal
        refused = ""
        try:
            data = hear(incoming, each, right, now)
        except StanzaError as refusal:
            data, refused = b"", str(refusal)
        if refused:  # without any consequence
            assert len(refused) < 300
            assert (incoming.state, incoming.refusal) == before
            continue
        right += each.kind == "data"
        got += data
        assert before[1] is None or incoming.refusal is before[1]
        assert incoming.state.value >= before[0].value
        assert incoming.received == len(got) <= length + 1
        # What was handed on is what stood there, canonically written, and nothing else.
        assert not data or base64.b64decode(each.text)[: len(data)] == data
        assert incoming.complete == (incoming.refusal is None and len(got) == length)
        if incoming.refusal is not None:
            assert incoming.state is State.ENDED


def hear(incoming: Incoming, each: Said, right: int, now: float) -> bytes:
    """Give a stream one stanza."""
    match each.kind:
        case "open":
            number = "24" if each.number is None else each.number
            kind = "message" if each.in_message else "iq"
            element = make(ibb.OPEN, {"sid": "s", "block-size": number, "stanza": kind})
            incoming.open(ibb.read_open(element), 4_096, now)
        case "data":
            number = str(right) if each.number is None else each.number
            element = make(ibb.DATA, {"sid": "s", "seq": number}, text=each.text)
            return incoming.receive(element, now, in_message=each.in_message)
        case _:
            incoming.closed()
    return b""


def one_input(data: bytes) -> None:
    """The same for a fuzzer that makes bytes: they are the text of a stream's blocks."""
    text = data.decode("latin-1")
    opening = Said("open", None, "", in_message=False)
    parts = [Said("data", None, part, in_message=False) for part in text.split("\n")]
    check((len(data), [opening, *parts]))


if __name__ == "__main__":
    loop.run(__doc__, inputs, check, one_input)
