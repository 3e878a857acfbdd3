"""A target for all that a network can do to a sealed transfer: its messages and its stream.

From the command line, for as long as wanted; each failure is shrunk, and printed with what is
needed to see it again::

    python -m tests.fuzz.seal --seconds 3600 [--seed 7]

`one_input` is the same for a fuzzer that knows bytes only, such as atheris, which is used by
``--atheris`` where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from hypothesis import strategies as st

from syncd.errors import IntegrityError, RemoteProtocolError
from syncd.trust import seal
from syncd.trust.handshake import Answer, Offer
from syncd.trust.kem import Kem
from syncd.trust.receipt import Content, Said, open_finish, seal_finish, sign
from syncd.trust.receipt import check as check_receipt
from tests.fuzz import loop
from tests.support.sealing import BOB, TERMS, Agreed, agree, opened, plaintext, sealed

REFUSED = (IntegrityError, RemoteProtocolError)
NAMES = ("identity", "kems", "kem", "key", "signature", "sealed", "successions", "x")
KEMS = tuple(Kem)
CONTENT = Content(digest=bytes(range(32)), salt=bytes(range(32, 64)))


@dataclass(frozen=True, slots=True)
class Cut:
    """A change of bytes or text: what stands at a place is replaced.

    Attributes:
      place: Where, as a share of 65,536 of the length.
      gone: How many are taken out.
      new: What comes instead; None doubles what was taken out.
    """

    place: int
    gone: int
    new: bytes | None

    def apply(self, data: bytes) -> bytes:
        """Change it."""
        start = self.place * (len(data) + 1) >> 16
        old = data[start : start + self.gone]
        new = 2 * old if self.new is None else self.new
        return data[:start] + new + data[start + self.gone :]


cuts = st.builds(
    Cut, st.integers(0, 65_535), st.integers(0, 80_000), st.none() | st.binary(max_size=40)
)
changes = st.dictionaries(
    st.sampled_from(NAMES), st.none() | cuts | st.text(max_size=60), max_size=3
)
sizes = st.integers(0, 200) | st.sampled_from([65_535, 65_536, 65_537, 131_072, 200_000])
ends = st.dictionaries(
    st.sampled_from(("sealed", "signature", "x")),
    st.none() | cuts | st.text(max_size=60),
    max_size=2,
)
inputs = st.tuples(st.sampled_from(KEMS), sizes, sizes, changes, changes, ends, st.lists(cuts))

Changes: TypeAlias = Mapping[str, Cut | str | None]
"""Text replaces, None takes away."""


def check(
    kem: Kem,
    size: int,
    offset: int,
    offered: Changes,
    answered: Changes,
    ended: Changes,
    cut: Sequence[Cut],
) -> None:
    """Run one transfer over a network that changes things.

    Args:
      kem: Of the answer.
      size: Of the file.
      offset: Where it begins; beyond the end, it is the end.
      offered: What is changed in the offer: text replaces, None takes away.
      answered: What is changed in the answer.
      ended: What is changed in finish and receipt.
      cut: What is changed in the stream.
    """
    agreed = agree(size, min(offset, size), kem=kem)
    terms, true = agreed.answer.offer.terms, agreed.answer
    offer = attempt(true.offer.attributes(), offered, lambda each: Offer.read(each, terms))
    answer = attempt(
        true.attributes(), answered, lambda each: Answer.read(each, true.offer, true.offset)
    )
    # Whatever is taken for an offer or an answer is the true one.
    assert offer in (None, true.offer)
    assert answer in (None, true)
    data = plaintext(size - true.offset)
    stream = b"".join(sealed(agreed, data, at_once=2))
    changed = stream
    for each in cut:
        changed = each.apply(changed)
    run_stream(agreed, changed, data, whole=changed == stream)
    run_end(agreed, ended)


def attempt(
    attributes: dict[str, str], changes: Changes, reader: Callable[[dict[str, str]], object]
) -> object:
    """What a reader makes of changed attributes; None if it refuses."""
    for name, change in changes.items():
        match change:
            case None:
                attributes.pop(name, None)
            case str():
                attributes[name] = change
            case Cut():
                text = attributes.get(name, "").encode()
                attributes[name] = change.apply(text).decode("utf-8", "replace")
    try:
        return reader(attributes)
    except REFUSED as refused:
        why = str(refused)
    assert len(why) < 200
    return None


def run_stream(agreed: Agreed, stream: bytes, data: bytes, *, whole: bool) -> None:
    """Open a stream; all of it or a part of its segments arrives, and nothing else."""
    delivered = b""
    refused = False
    opener = agreed.opener()
    try:
        for part in opened(opener, stream, at_once=2):
            delivered += part
    except IntegrityError:
        refused = True
    assert refused is not whole
    assert data.startswith(delivered)
    assert not whole or delivered == data
    assert len(delivered) % seal.SEGMENT == 0 or delivered == data
    # Complete is only what has arrived; what came behind the end is an error beside it.
    assert not opener.complete or delivered == data


def run_end(agreed: Agreed, changes: Changes) -> None:
    """Ask for the receipt, and get it; whatever matters and is not the same is refused."""
    answer, matters = agreed.answer, ("sealed", "signature")
    true = seal_finish(answer, CONTENT, agreed.sender)
    came = dict(true)
    heard = attempt(came, changes, lambda each: open_finish(answer, each, agreed.ephemeral))
    same = all(came.get(name) == true[name] for name in matters)
    assert heard == (CONTENT if same else None)
    signed = {"signature": sign(Said.RECEIPT, answer, CONTENT, BOB)}

    def believe(attributes: dict[str, str]) -> bool:
        check_receipt(Said.RECEIPT, answer, CONTENT, attributes.get("signature"))
        return True

    came = dict(signed)
    believed = attempt(came, changes, believe)
    assert believed == (True if came.get("signature") == signed["signature"] else None)


def one_input(data: bytes) -> None:
    """The same for a fuzzer that makes bytes: they are attributes, receipt and stream."""
    size = data[0] if data else 0
    text = data[1:].decode("latin-1")
    agreed = agree(size)
    offer = dict.fromkeys(NAMES, text)
    terms = replace(TERMS, size=size)
    assert attempt(offer, {}, lambda each: Offer.read(each, terms)) is None
    for name in NAMES[:-2]:
        change: Changes = {name: text}
        check(KEMS[size % 2], size, 0, change, change, change, [Cut(0, size, data[1:])])
    assert data[1:] != b"".join(sealed(agreed, plaintext(size)))
    run_stream(agreed, data[1:], plaintext(size), whole=False)
    run_end(agreed, {"signature": text})
    run_end(agreed, {"sealed": text})


if __name__ == "__main__":
    loop.run(__doc__, inputs, lambda drawn: check(*drawn), one_input)
