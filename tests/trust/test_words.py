from __future__ import annotations

import hashlib

import pytest

from syncd.trust.words import WORDS, _word, fingerprint, is_fingerprint, is_words, words
from tests.support.sealing import ALICE, BOB, MALLORY

HERE = words("alice@example.org", ALICE.public, "bob@example.net", BOB.public)


def test_both_ends_print_the_same() -> None:
    there = words("bob@example.net", BOB.public, "alice@example.org", ALICE.public)
    assert there == HERE
    assert len(HERE) == WORDS


@pytest.mark.parametrize(
    ("jid", "key", "peer", "peer_key"),
    [
        ("alice@example.org", MALLORY.public, "bob@example.net", BOB.public),
        ("alice@example.org", ALICE.public, "bob@example.net", MALLORY.public),
        ("alice@example.com", ALICE.public, "bob@example.net", BOB.public),
        ("alice@example.org", ALICE.public, "bob@example.com", BOB.public),
        ("alice@example.org", BOB.public, "bob@example.net", ALICE.public),
    ],
)
def test_other_keys_or_names_make_other_words(
    jid: str, key: bytes, peer: str, peer_key: bytes
) -> None:
    assert words(jid, key, peer, peer_key) != HERE


def test_a_peer_of_the_same_account_has_words_too() -> None:
    jid = "alice@example.org"
    one = words(jid, ALICE.public, jid, BOB.public)
    assert one == words(jid, BOB.public, jid, ALICE.public)


@pytest.mark.parametrize(
    # 127.0.0.1 and 63.84.220.193, as the proposal for proquints has them.
    ("number", "expected"),
    [(0x7F00, "lusab"), (0x0001, "babad"), (0x3F54, "gutih"), (0xDCC1, "tugad")],
)
def test_a_word_is_a_proquint(number: int, expected: str) -> None:
    assert expected == _word(number)


def test_each_number_has_its_own_word() -> None:
    assert len({_word(number) for number in range(1 << 16)}) == 1 << 16


def test_a_fingerprint_is_the_sha_256_in_groups() -> None:
    shown = fingerprint(ALICE.public)
    assert hashlib.sha256(ALICE.public).hexdigest() == shown.replace(" ", "")
    assert {4} == set(map(len, shown.split(" ")))


@pytest.mark.parametrize("between", ["", " ", ":", "-", "\n"])
def test_a_fingerprint_is_taken_in_any_groups(between: str) -> None:
    written = fingerprint(ALICE.public).replace(" ", between)
    assert is_fingerprint(written, ALICE.public)
    assert is_fingerprint(written.upper(), ALICE.public)
    assert not is_fingerprint(written, BOB.public)
    assert not is_fingerprint(written[:-1], ALICE.public)


@pytest.mark.parametrize("between", [" ", "-", ", ", "  "])
def test_words_are_taken_with_anything_between(between: str) -> None:
    assert is_words(between.join(HERE), HERE)
    assert is_words(between.join(HERE).upper(), HERE)
    assert not is_words(between.join(HERE[:-1]), HERE)
    assert not is_words(between.join(reversed(HERE)), HERE)


def test_nothing_is_no_fingerprint_and_no_words() -> None:
    assert not is_fingerprint("", ALICE.public)
    assert not is_words("", HERE)
