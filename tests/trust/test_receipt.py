"""Finish and receipt: who said it, about what, and what others learn of it."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest

from syncd.errors import IntegrityError, RemoteProtocolError
from syncd.trust.kem import Ephemeral, Kem
from syncd.trust.receipt import Content, Said, check, open_finish, seal_finish, sign
from syncd.trust.signing import Identity, digest, statement, verify, write_base64
from tests.support.sealing import ALICE, BOB, MALLORY, TERMS, Agreed, agree

CONTENT = Content(digest=bytes(range(32)), salt=bytes(range(32, 64)))
AGREED = agree()
ANSWER = AGREED.answer
ABOUT = ANSWER.transcript, TERMS.sid, TERMS.sender, TERMS.receiver, TERMS.size
both = pytest.mark.parametrize("said", Said)
kems = pytest.mark.parametrize("kem", Kem)


def finish(agreed: Agreed = AGREED, content: Content = CONTENT) -> dict[str, str]:
    return seal_finish(agreed.answer, content, agreed.sender)


def opened(attributes: dict[str, str], agreed: Agreed = AGREED) -> Content:
    return open_finish(agreed.answer, attributes, agreed.ephemeral)


def flipped(data: bytes, bit: int) -> bytes:
    return (int.from_bytes(data, "big") ^ 1 << bit).to_bytes(len(data), "big")


# The finish


@kems
def test_the_receiver_learns_what_the_whole_file_is(kem: Kem) -> None:
    agreed = agree(kem=kem)
    attributes = finish(agreed)
    assert opened(attributes, agreed) == CONTENT
    # With what stands beside it, far below the 10,000 bytes that a stanza may have.
    assert {name: len(text) for name, text in attributes.items()} == {
        "sealed": 152 if kem is Kem.X25519 else 1_600,
        "signature": 88,
    }


def test_the_same_file_looks_different_each_time() -> None:
    one, other = finish(), finish()
    assert not set(one.values()) & set(other.values())


def test_every_bit_of_what_is_sealed_matters() -> None:
    """Also those that X25519 does not look at."""
    attributes = finish()
    sealed = base64.b64decode(attributes["sealed"])
    for bit in range(8 * len(sealed)):
        changed = attributes | {"sealed": write_base64(flipped(sealed, bit))}
        with pytest.raises(IntegrityError, match="the finish was not signed"):
            opened(changed)


def test_every_bit_of_its_signature_matters() -> None:
    attributes = finish()
    signature = base64.b64decode(attributes["signature"])
    for bit in range(8 * len(signature)):
        changed = attributes | {"signature": write_base64(flipped(signature, bit))}
        with pytest.raises(IntegrityError, match="the finish was not signed"):
            opened(changed)


@pytest.mark.parametrize("identity", [BOB, MALLORY])
def test_nobody_else_can_say_what_the_file_is(identity: Identity) -> None:
    """Anybody can seal to the receiver's key; that is why it is signed."""
    forged = seal_finish(ANSWER, CONTENT, identity)
    with pytest.raises(IntegrityError, match="the finish was not signed"):
        opened(forged)


def test_two_finishes_of_one_transfer_cannot_be_mixed() -> None:
    """The signature of one counts for nothing that another has sealed, be it the same."""
    one = finish()
    for other in (finish(), finish(content=replace(CONTENT, salt=bytes(32)))):
        with pytest.raises(IntegrityError, match="the finish was not signed"):
            opened(one | {"sealed": other["sealed"]})


@pytest.mark.parametrize(
    "other",
    [
        agree(offset=1),
        agree(terms=replace(TERMS, sid="another")),
        agree(terms=replace(TERMS, path="another")),
        agree(size=6),
        agree(ephemeral=Ephemeral.generate(Kem.X25519)),
    ],
    ids=["offset", "sid", "path", "size", "key"],
)
def test_the_finish_of_another_transfer_is_none(other: Agreed) -> None:
    with pytest.raises(IntegrityError, match="the finish was not signed"):
        opened(finish(other))


def test_a_peer_that_signs_what_it_cannot_have_sealed_is_refused() -> None:
    """What somebody else has sealed for another transfer, with the same ephemeral key."""
    stolen = base64.b64decode(finish(agree(sender=MALLORY))["sealed"])
    signature = write_base64(ALICE.sign(statement("finish", *ABOUT, stolen)))
    with pytest.raises(IntegrityError, match="for another transfer"):
        opened({"sealed": write_base64(stolen), "signature": signature})


def test_what_was_sealed_for_the_header_is_no_content() -> None:
    """Not even if the peer itself puts it there."""
    sealed = ANSWER.seal("content key", CONTENT.digest + CONTENT.salt)
    signature = write_base64(ALICE.sign(statement("finish", *ABOUT, sealed)))
    with pytest.raises(IntegrityError, match="for another transfer"):
        opened({"sealed": write_base64(sealed), "signature": signature})


@pytest.mark.parametrize("name", ["sealed", "signature"])
@pytest.mark.parametrize("value", [None, "", "AAAA", "x" * 152, "é" * 152, "A" * 2_000])
def test_a_finish_that_is_not_understood_is_refused(name: str, value: str | None) -> None:
    attributes = finish()
    attributes.pop(name)
    if value is not None:
        attributes[name] = value
    with pytest.raises((RemoteProtocolError, IntegrityError)):
        opened(attributes)


@kems
def test_what_the_other_way_of_sealing_makes_is_not_taken(kem: Kem) -> None:
    [other] = set(Kem) - {kem}
    with pytest.raises(RemoteProtocolError, match="'sealed'"):
        opened(finish(agree(kem=other)), agree(kem=kem))


@pytest.mark.parametrize(
    "content", [replace(CONTENT, digest=b"x" * 31), replace(CONTENT, salt=b"")]
)
def test_without_a_whole_salt_nothing_is_said(content: Content) -> None:
    with pytest.raises(ValueError, match="no digest, or no salt"):
        finish(content=content)


# The receipt


@both
def test_what_the_receiver_signed_is_good(said: Said) -> None:
    signature = sign(said, ANSWER, CONTENT, BOB)
    check(said, ANSWER, CONTENT, signature)
    assert len(signature) == 88


@both
def test_nobody_else_can_sign_it(said: Said) -> None:
    for identity in (ALICE, MALLORY):
        with pytest.raises(IntegrityError, match=f"the {said} was not signed"):
            check(said, ANSWER, CONTENT, sign(said, ANSWER, CONTENT, identity))


@both
@pytest.mark.parametrize("field", ["digest", "salt"])
def test_it_is_for_one_content(said: Said, field: str) -> None:
    other = replace(CONTENT, **{field: bytes(32)})
    with pytest.raises(IntegrityError):
        check(said, ANSWER, other, sign(said, ANSWER, CONTENT, BOB))


@both
def test_it_is_for_one_transfer(said: Said) -> None:
    signature = sign(said, ANSWER, CONTENT, BOB)
    with pytest.raises(IntegrityError):
        check(said, agree(offset=1).answer, CONTENT, signature)


def test_beside_is_another_receipt() -> None:
    for said, other in ((Said.RECEIPT, Said.BESIDE), (Said.BESIDE, Said.RECEIPT)):
        with pytest.raises(IntegrityError):
            check(said, ANSWER, CONTENT, sign(other, ANSWER, CONTENT, BOB))


@both
def test_a_question_is_no_answer(said: Said) -> None:
    """Not even between two who are the same: a file to oneself."""
    own = agree(sender=ALICE, receiver=ALICE)
    with pytest.raises(IntegrityError):
        check(said, own.answer, CONTENT, finish(own)["signature"])


@both
@pytest.mark.parametrize("signature", [None, "", "AAAA", "x" * 88])
def test_no_signature_is_not_enough(said: Said, signature: str | None) -> None:
    with pytest.raises((RemoteProtocolError, IntegrityError)):
        check(said, ANSWER, CONTENT, signature)


# Who does not know the salt


@both
def test_a_guess_cannot_be_tried_on_a_signature(said: Said) -> None:
    """Not even the right content, with all that a server sees."""
    signatures = [finish()["signature"], sign(said, ANSWER, CONTENT, BOB)]
    for salt in (b"", bytes(32)):
        guess = digest("commitment", ANSWER.transcript, TERMS.size, CONTENT.digest, salt)
        for label in ("finish", *Said):
            for guessed in (CONTENT.digest, guess):
                tried = statement(str(label), *ABOUT, guessed)
                for signature in signatures:
                    for key in (ALICE.public, BOB.public):
                        assert not verify(key, base64.b64decode(signature), tried)


def test_the_guess_of_who_knows_the_salt_is_right() -> None:
    """What the test above is worth."""
    guess = digest("commitment", ANSWER.transcript, TERMS.size, CONTENT.digest, CONTENT.salt)
    signature = base64.b64decode(sign(Said.RECEIPT, ANSWER, CONTENT, BOB))
    assert verify(BOB.public, signature, statement("receipt", *ABOUT, guess))
