from __future__ import annotations

import pytest

from syncd.errors import IntegrityError, RemoteProtocolError
from syncd.trust.receipt import Said, check, sign
from tests.support.sealing import ALICE, BOB, MALLORY, agree

DIGEST = bytes(range(32))
ANSWER = agree().answer
SIGNERS = {Said.FINISH: ALICE, Said.RECEIPT: BOB, Said.BESIDE: BOB}
both = pytest.mark.parametrize("said", Said)


@both
def test_what_the_right_end_signed_is_good(said: Said) -> None:
    signature = sign(said, ANSWER, DIGEST, SIGNERS[said])
    check(said, ANSWER, DIGEST, signature)
    assert len(signature) == 88


@both
def test_nobody_else_can_sign_it(said: Said) -> None:
    wrong = {ALICE, BOB, MALLORY} - {SIGNERS[said]}
    for identity in wrong:
        with pytest.raises(IntegrityError, match=f"the {said} was not signed"):
            check(said, ANSWER, DIGEST, sign(said, ANSWER, DIGEST, identity))


@both
def test_it_is_for_one_content(said: Said) -> None:
    signature = sign(said, ANSWER, DIGEST, SIGNERS[said])
    with pytest.raises(IntegrityError):
        check(said, ANSWER, bytes(32), signature)


@both
def test_it_is_for_one_transfer(said: Said) -> None:
    signature = sign(said, ANSWER, DIGEST, SIGNERS[said])
    with pytest.raises(IntegrityError):
        check(said, agree(offset=1).answer, DIGEST, signature)


def test_a_question_is_no_answer() -> None:
    """Not even between two who are the same: a file to oneself."""
    own = agree(sender=ALICE, receiver=ALICE).answer
    with pytest.raises(IntegrityError):
        check(Said.RECEIPT, own, DIGEST, sign(Said.FINISH, own, DIGEST, ALICE))


@both
@pytest.mark.parametrize("signature", [None, "", "AAAA", "x" * 88])
def test_no_signature_is_not_enough(said: Said, signature: str | None) -> None:
    with pytest.raises((RemoteProtocolError, IntegrityError)):
        check(said, ANSWER, DIGEST, signature)
