from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from syncd.errors import IntegrityError, RemoteProtocolError
from syncd.trust.handshake import MAX_KEMS, Answer, Offer, Terms
from syncd.trust.kem import Ephemeral, Kem
from syncd.trust.signing import write_base64
from tests.support.sealing import ALICE, BOB, MALLORY, PRIVATE, TERMS, agree

KEMS = [Kem.HYBRID, Kem.X25519]
OFFER = Offer.make(TERMS, ALICE, KEMS)
kems = pytest.mark.parametrize("kem", Kem)

OTHER_TERMS: dict[str, Any] = {
    "sid": "0",
    "sender": "alice@example.org/phone",
    "receiver": "bob@example.net/other",
    "profile": "urn:syncd:bundle:1",
    "folder": "",
    "path": "2024/Zürich/see.png",
    "size": 6,
    "mtime_ns": 0,
    "extension": b"delta",
}
all_terms = pytest.mark.parametrize("name", OTHER_TERMS)


def other(name: str) -> Terms:
    """Terms that differ in one thing."""
    return replace(TERMS, **{name: OTHER_TERMS[name]})


def test_every_term_has_a_test() -> None:
    assert list(OTHER_TERMS) == [field.name for field in fields(Terms)]
    assert len(TERMS.fields()) == len(OTHER_TERMS)


def test_an_offer_is_read_as_made() -> None:
    assert Offer.read(OFFER.attributes(), TERMS) == OFFER
    assert ALICE.public == OFFER.identity


@all_terms
def test_an_offer_is_for_its_terms_only(name: str) -> None:
    with pytest.raises(IntegrityError, match="the offer was changed"):
        Offer.read(OFFER.attributes(), other(name))


@kems
def test_an_answer_is_read_as_made(kem: Kem) -> None:
    answer = Answer.make(OFFER, 3, BOB, Ephemeral(kem, PRIVATE[kem]))
    assert answer == Answer.read(answer.attributes(), OFFER, 3)
    assert (BOB.public, kem, 2) == (answer.identity, answer.kem, answer.length)


@all_terms
def test_an_answer_is_for_its_offer_only(name: str) -> None:
    answer = agree(TERMS.size).answer
    with pytest.raises(IntegrityError, match="the answer was changed"):
        Answer.read(answer.attributes(), Offer.make(other(name), ALICE, KEMS), 0)


def test_an_answer_is_for_its_sender_only() -> None:
    """Somebody repeats an offer under his own key: the answer to it is of no use to Alice."""
    stolen = agree(sender=MALLORY).answer
    with pytest.raises(IntegrityError):
        Answer.read(stolen.attributes(), OFFER, 0)


def test_an_answer_is_for_its_offset_only() -> None:
    answer = agree(offset=3).answer
    with pytest.raises(IntegrityError):
        Answer.read(answer.attributes(), answer.offer, 2)


@pytest.mark.parametrize("offset", [-1, 6])
def test_an_offset_outside_the_file_is_refused(offset: int) -> None:
    answer = agree().answer
    with pytest.raises(RemoteProtocolError, match="behind the end"):
        Answer.read(answer.attributes(), answer.offer, offset)
    with pytest.raises(ValueError, match="no answer"):
        agree(offset=offset)


def flipped(text: str) -> str:
    """The same length, another value."""
    return text.replace(text[5], "A" if text[5] != "A" else "B", 1)


@pytest.mark.parametrize("name", ["identity", "signature", "kems"])
def test_a_changed_offer_is_refused(name: str) -> None:
    attributes = OFFER.attributes()
    attributes[name] = flipped(attributes[name])
    with pytest.raises((IntegrityError, RemoteProtocolError)):
        Offer.read(attributes, TERMS)


@kems
@pytest.mark.parametrize("name", ["identity", "signature", "key", "kem"])
def test_a_changed_answer_is_refused(name: str, kem: Kem) -> None:
    answer = agree(kem=kem).answer
    attributes = answer.attributes()
    attributes[name] = flipped(attributes[name])
    with pytest.raises((IntegrityError, RemoteProtocolError)):
        Answer.read(attributes, answer.offer, 0)


@pytest.mark.parametrize("name", ["identity", "signature", "kems"])
def test_an_offer_that_lacks_something_is_refused(name: str) -> None:
    attributes = OFFER.attributes()
    del attributes[name]
    with pytest.raises(RemoteProtocolError, match=name):
        Offer.read(attributes, TERMS)


@pytest.mark.parametrize("name", ["identity", "signature", "key", "kem"])
def test_an_answer_that_lacks_something_is_refused(name: str) -> None:
    answer = agree().answer
    attributes = answer.attributes()
    del attributes[name]
    with pytest.raises(RemoteProtocolError, match=name):
        Answer.read(attributes, answer.offer, 0)


def test_the_hybrid_cannot_be_taken_out_of_an_offer() -> None:
    with pytest.raises(IntegrityError):
        Offer.read(OFFER.attributes() | {"kems": "x25519"}, TERMS)


@pytest.mark.parametrize("names", ["", "mlkem768-x25519", "x25519 " * 100, "X25519"])
def test_an_offer_without_the_kem_that_all_have_is_refused(names: str) -> None:
    assert MAX_KEMS < 700
    with pytest.raises(RemoteProtocolError, match="kems"):
        Offer.read(OFFER.attributes() | {"kems": names}, TERMS)


def test_kems_of_the_future_are_skipped() -> None:
    said = replace(OFFER, kems="new x25519 newer")
    assert said.choose(KEMS) == Kem.X25519


@pytest.mark.parametrize(
    ("theirs", "own", "expected"),
    [
        (KEMS, KEMS, Kem.HYBRID),
        (KEMS, [Kem.X25519], Kem.X25519),
        ([Kem.X25519], KEMS, Kem.X25519),
    ],
)
def test_both_ends_choose_the_best_they_have(
    theirs: list[Kem], own: list[Kem], expected: Kem
) -> None:
    assert expected == Offer.make(TERMS, ALICE, theirs).choose(own)


def test_an_answer_with_a_kem_that_was_not_offered_is_refused() -> None:
    offer = Offer.make(TERMS, ALICE, [Kem.X25519])
    ephemeral = Ephemeral(Kem.HYBRID, PRIVATE[Kem.HYBRID])
    with pytest.raises(ValueError, match="no answer"):
        Answer.make(offer, 0, BOB, ephemeral)
    attributes = agree(kem=Kem.HYBRID).answer.attributes()
    with pytest.raises(RemoteProtocolError, match="kem"):
        Answer.read(attributes, offer, 0)


def test_an_answer_with_a_key_of_the_other_kem_is_refused() -> None:
    answer = agree(kem=Kem.HYBRID).answer
    with pytest.raises(RemoteProtocolError, match="key"):
        Answer.read(answer.attributes() | {"kem": "x25519"}, answer.offer, 0)


def test_an_offer_is_no_answer() -> None:
    """A message sent back to where it came from proves nothing."""
    attributes = OFFER.attributes() | {
        "kem": "x25519",
        "key": write_base64(Ephemeral.generate(Kem.X25519).public),
    }
    with pytest.raises(IntegrityError):
        Answer.read(attributes, OFFER, 0)


def test_the_proofs_of_a_new_key_travel_and_are_signed() -> None:
    new = ALICE.succeeded_by(bytes(32))
    offer = Offer.make(TERMS, new, KEMS)
    assert new.successions == Offer.read(offer.attributes(), TERMS).successions
    without = offer.attributes()
    del without["successions"]
    with pytest.raises(IntegrityError):
        Offer.read(without, TERMS)
    answer = agree(receiver=new).answer
    assert answer == Answer.read(answer.attributes(), answer.offer, 0)


def test_unknown_attributes_are_ignored() -> None:
    assert Offer.read(OFFER.attributes() | {"later": "x"}, TERMS) == OFFER


def test_each_transfer_has_its_own_transcript() -> None:
    transcripts = {
        agree().answer.transcript,
        agree(offset=1).answer.transcript,
        agree(6).answer.transcript,
        agree(kem=Kem.HYBRID).answer.transcript,
        agree(sender=MALLORY).answer.transcript,
        agree(receiver=MALLORY).answer.transcript,
        agree(ephemeral=Ephemeral.generate(Kem.X25519)).answer.transcript,
        *(agree(terms=other(name)).answer.transcript for name in OTHER_TERMS if name != "size"),
    }
    assert 7 + len(OTHER_TERMS) - 1 == len(transcripts)


@kems
def test_what_is_sealed_to_an_answer_opens_for_one_purpose_in_one_transfer(kem: Kem) -> None:
    agreed, elsewhere = agree(kem=kem), agree(offset=1, kem=kem)
    sealed = agreed.answer.seal("this", b"secret", b"bound")
    assert agreed.answer.open("this", sealed, agreed.ephemeral, b"bound") == b"secret"
    for answer, purpose, bound in (
        (agreed.answer, "that", [b"bound"]),
        (agreed.answer, "this", []),
        (agreed.answer, "this", [b"bo", b"und"]),
        (agreed.answer, "this", [b"other"]),
        (elsewhere.answer, "this", [b"bound"]),
    ):
        with pytest.raises(IntegrityError, match="for another transfer"):
            answer.open(purpose, sealed, agreed.ephemeral, *bound)


def test_the_attributes_are_small() -> None:
    """A stanza of 10,000 bytes is what every server must take (RFC 6120 section 13.12)."""
    for identity in (BOB, BOB.succeeded_by(bytes(32))):
        answer = agree(kem=Kem.HYBRID, receiver=identity).answer
        assert sum(map(len, answer.attributes().values())) < 2_500
    assert sum(map(len, OFFER.attributes().values())) < 200
