from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import RemoteProtocolError
from syncd.trust.signing import (
    MAX_SUCCESSIONS,
    NS_SEAL,
    Identity,
    predecessors,
    read_base64,
    read_successions,
    statement,
    verify,
    write_base64,
)
from tests.support.sealing import ALICE, BOB, MALLORY

fields = st.lists(st.binary(max_size=20) | st.text(max_size=8) | st.integers(0, 2**63 - 1))


def keys(count: int) -> list[Identity]:
    """An identity and those that replaced it, one after the other."""
    chain = [ALICE]
    for number in range(count):
        chain.append(chain[-1].succeeded_by(bytes([number]) * 32))
    return chain


def test_a_statement_is_label_and_fields_each_behind_its_length() -> None:
    expected = (
        b"\0\0\0\x13urn:syncd:seal:1 ab\0\0\0\x02\xc3\xa4\0\0\0\x08\0\0\0\0\0\0\x01\x02\0\0\0\0"
    )
    assert expected == statement("ab", "ä", 258, b"")


@given(fields, fields)
def test_different_fields_never_make_the_same_statement(
    one: list[bytes | str | int], other: list[bytes | str | int]
) -> None:
    def flat(values: list[bytes | str | int]) -> list[bytes]:
        as_bytes = []
        for value in values:
            if isinstance(value, int):
                as_bytes.append(value.to_bytes(8, "big"))
            else:
                as_bytes.append(value.encode() if isinstance(value, str) else value)
        return as_bytes

    assert (flat(one) == flat(other)) == (statement("x", *one) == statement("x", *other))


def test_a_label_is_no_field() -> None:
    assert statement("a", "b") != statement("a b")
    assert statement("a").startswith(len(f"{NS_SEAL} a").to_bytes(4, "big"))


@pytest.mark.parametrize("field", [-1, 2**63, "\ud800"])
def test_what_cannot_be_written_is_refused(field: int | str) -> None:
    with pytest.raises(ValueError, match=r"no length|surrogates"):
        statement("x", field)


def test_a_signature_is_one_key_s_and_for_one_statement() -> None:
    signature = ALICE.sign(b"this")
    assert verify(ALICE.public, signature, b"this")
    assert not verify(ALICE.public, signature, b"that")
    assert not verify(BOB.public, signature, b"this")
    assert not verify(ALICE.public, signature[:-1], b"this")
    assert not verify(ALICE.public[:-1], signature, b"this")


def test_signatures_are_plain_ed25519() -> None:
    Ed25519PublicKey.from_public_bytes(ALICE.public).verify(ALICE.sign(b"x"), b"x")


def test_new_identities_differ() -> None:
    assert Identity.generate().public != Identity.generate().public


def test_a_private_key_makes_the_same_identity_again() -> None:
    identity = Identity.generate()
    assert identity.public == Identity(identity.private_bytes()).public


def test_its_repr_keeps_the_secret() -> None:
    assert ALICE.private_bytes().hex()[:8] not in repr(ALICE)
    assert ALICE.public.hex()[:8] in repr(ALICE)


def test_a_successor_proves_all_keys_before_it() -> None:
    first, second, third = keys(2)
    assert predecessors(first.public, first.successions) == ()
    assert (first.public,) == predecessors(second.public, second.successions)
    assert (first.public, second.public) == predecessors(third.public, third.successions)


def test_only_so_many_keys_are_remembered() -> None:
    chain = keys(MAX_SUCCESSIONS + 2)
    expected = tuple(key.public for key in chain[2:-1])
    assert expected == predecessors(chain[-1].public, chain[-1].successions)
    assert chain[-1].successions == read_successions(write_base64(chain[-1].successions))


def test_nobody_else_can_name_a_successor() -> None:
    claim = BOB.public + MALLORY.sign(statement("succession", BOB.public, MALLORY.public))
    assert predecessors(MALLORY.public, claim) == ()


def test_a_succession_is_for_one_successor() -> None:
    bobs = BOB.succeeded_by(bytes(32))
    assert predecessors(MALLORY.public, bobs.successions) == ()


def test_a_chain_counts_from_its_end_to_its_first_flaw() -> None:
    *_, third, fourth = keys(3)
    flawed = bytearray(fourth.successions)
    flawed[96 + 40] ^= 1  # in the signature by the second key
    assert (third.public,) == predecessors(fourth.public, bytes(flawed))


def test_base64_is_read_as_written() -> None:
    assert read_base64("x", write_base64(b"\xff" * 32), [32]) == b"\xff" * 32


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "AAAA",
        "ä" * 44,
        "A" * 43,
        "A" * 42 + "B=",  # spare bits
        "A" * 43 + "==",
        " " + "A" * 43 + "=",
        "A" * 43 + "=\n",
        "A" * 43 + "=AAAA",
        "A" * 1_000_000,
        "-" * 43 + "=",
    ],
)
def test_base64_that_is_anything_else_is_refused(text: str | None) -> None:
    with pytest.raises(RemoteProtocolError, match="bad or no 'key'"):
        read_base64("key", text, [32])


@pytest.mark.parametrize("size", [0, 95, 97, 96 * (MAX_SUCCESSIONS + 1)])
def test_successions_are_whole_and_few(size: int) -> None:
    with pytest.raises(RemoteProtocolError):
        read_successions(base64.b64encode(bytes(size)).decode())


def test_no_successions_are_none() -> None:
    assert read_successions(None) == b""
