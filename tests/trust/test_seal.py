from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.errors import IntegrityError
from syncd.trust import seal
from syncd.trust.kem import Ephemeral, Kem
from syncd.trust.seal import (
    BATCH,
    MAX_SEGMENTS,
    SEGMENT,
    TAG,
    Opener,
    Sealer,
    header_size,
    sealed_length,
)
from tests.support.sealing import (
    ALICE,
    BOB,
    MALLORY,
    TERMS,
    Agreed,
    agree,
    opened,
    plaintext,
    sealed,
)

kems = pytest.mark.parametrize("kem", Kem)

# Small enough to try everything with a stream of many.
SMALL = 16  # bytes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 16 bytes; the protocol knows no other difference."""
    monkeypatch.setattr(seal, "SEGMENT", SMALL)


def refused(agreed: Agreed, stream: bytes, *, at_once: int = 1) -> bytes:
    """What was delivered of a stream before it was refused; fails if it was not."""
    delivered = b""
    opener = agreed.opener()
    with pytest.raises(IntegrityError):  # noqa: PT012 - what came before is looked at
        for part in opened(opener, stream, at_once=at_once):
            delivered += part
    with pytest.raises(ValueError, match="something was wrong before"):
        opener.open(b"", final=True)
    return delivered


# --- What is sealed is opened

SIZES = [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 3 * SEGMENT + 7]


@kems
@pytest.mark.parametrize("at_once", [1, 2, BATCH])
@pytest.mark.parametrize("size", SIZES)
def test_it_arrives_as_it_left(size: int, at_once: int, kem: Kem) -> None:
    agreed, data = agree(size, kem=kem), plaintext(size)
    stream = b"".join(sealed(agreed, data, at_once=at_once))
    assert len(stream) == header_size(kem) + sealed_length(size)
    opener = agreed.opener()
    assert b"".join(opened(opener, stream, at_once=at_once)) == data
    assert opener.complete
    assert opener.left == 0


def test_the_header_is_as_long_as_it_is_said_to_be() -> None:
    assert [header_size(Kem.X25519), header_size(Kem.HYBRID)] == [146, 1_234]


@pytest.mark.parametrize(("plain", "expected"), [(0, 16), (1, 17), (65_536, 65_552)])
def test_sealed_length(plain: int, expected: int) -> None:
    assert sealed_length(plain) == expected
    assert sealed_length(plain + SEGMENT) == expected + SEGMENT + TAG * (plain > 0)


@pytest.mark.parametrize("offset", [0, 1, SEGMENT, 2 * SEGMENT + 7])
def test_it_begins_at_the_offset(offset: int) -> None:
    size = 2 * SEGMENT + 7
    agreed, data = agree(size, offset), plaintext(size)[offset:]
    assert b"".join(opened(agreed.opener(), b"".join(sealed(agreed, data)))) == data


@pytest.mark.parametrize("size", [0, 5])
def test_nothing_left_is_one_segment_all_the_same(size: int) -> None:
    agreed = agree(size, size)
    header, segment = sealed(agreed, b"")
    assert len(segment) == TAG
    assert list(opened(agreed.opener(), header + segment)) == [b""]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_how_many_segments_are_moved_at_once_makes_no_difference(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 5 * SEGMENT))
    agreed, plain = agree(size), plaintext(size)
    sealer, opener = agreed.sealer(), agreed.opener()
    stream, start = bytearray(), 0
    while start < size or not stream:
        end = min(size, start + SEGMENT * data.draw(st.integers(1, 3)))
        stream += sealer.seal(memoryview(plain)[start:end], final=end == size)
        start = end
    opener.header(sealer.header)
    arrived, view = bytearray(), memoryview(stream)
    while not opener.complete:
        count = min(opener.left, SEGMENT * data.draw(st.integers(1, 3)))
        part, view = view[: sealed_length(count)], view[sealed_length(count) :]
        arrived += opener.open(part, final=count == opener.left)
    assert arrived == plain


def test_left_counts_down() -> None:
    agreed = agree(SEGMENT + 1)
    sealer, opener = agreed.sealer(), agreed.opener()
    opener.header(sealer.header)
    counts = [(sealer.left, opener.left)]
    for part, final in ((bytes(SEGMENT), False), (b"x", True)):
        assert not opener.complete
        opener.open(sealer.seal(memoryview(part), final=final), final=final)
        counts.append((sealer.left, opener.left))
    assert counts == [(SEGMENT + 1,) * 2, (1, 1), (0, 0)]
    assert opener.complete


def test_no_two_streams_have_the_same_bytes() -> None:
    """Also of the same file to the same ephemeral key: the content key is always fresh."""
    one, other = sealed(agree(), plaintext(5)), sealed(agree(), plaintext(5))
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_no_nonce_is_used_twice_and_only_the_last_says_so(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nonces: list[bytes] = []

    class Recording:
        """AES-GCM, with a list of its nonces."""

        generate_key = AESGCM.generate_key

        def __init__(self, key: bytes) -> None:
            self.cipher = AESGCM(key)

        def encrypt_into(
            self, nonce: bytes, data: memoryview, associated: bytes, buf: memoryview
        ) -> int:
            nonces.append(nonce)
            return self.cipher.encrypt_into(nonce, data, associated, buf)

    monkeypatch.setattr(seal, "AESGCM", Recording)
    sealed(agree(3 * SMALL), plaintext(3 * SMALL))
    expected = [bytes(10) + bytes(end) for end in ([0, 0], [1, 0], [2, 1])]
    assert nonces == expected


# --- What was changed is refused, and nothing of it delivered


@kems
def test_every_bit_of_a_stream_matters(kem: Kem) -> None:
    agreed = agree(3, kem=kem)
    stream = b"".join(sealed(agreed, b"abc"))
    # All bits where that is quick; with the hybrid one of each byte.
    step, start = (1, 0) if kem is Kem.X25519 else (8, 3)
    for bit in range(start, 8 * len(stream), step):
        flipped = bytearray(stream)
        flipped[bit // 8] ^= 1 << bit % 8
        assert refused(agreed, bytes(flipped)) == b""


def test_every_byte_of_many_segments_matters(small: None) -> None:
    agreed, data = agree(4 * SMALL + 3), plaintext(4 * SMALL + 3)
    stream = b"".join(sealed(agreed, data))
    for place in range(146, len(stream)):
        flipped = bytearray(stream)
        flipped[place] ^= 0x80
        assert refused(agreed, bytes(flipped), at_once=BATCH) == b""
        # One by one, those before the first that was changed are good.
        before = (place - 146) // (SMALL + TAG) * SMALL
        assert refused(agreed, bytes(flipped)) == data[:before]


def test_a_stream_that_is_cut_anywhere_is_refused(small: None) -> None:
    agreed, data = agree(3 * SMALL + 3), plaintext(3 * SMALL + 3)
    stream = b"".join(sealed(agreed, data))
    for end in range(len(stream)):
        assert refused(agreed, stream[:end], at_once=BATCH) == b""
        good = max(0, end - 146) // (SMALL + TAG) * SMALL
        assert refused(agreed, stream[:end]) == data[:good]


def test_a_stream_that_is_cut_is_not_complete(small: None) -> None:
    agreed = agree(2 * SMALL)
    header, first, _ = sealed(agreed, plaintext(2 * SMALL))
    opener = agreed.opener()
    opener.header(header)
    opener.open(first, final=False)
    assert not opener.complete
    assert opener.left == SMALL


def test_a_segment_is_not_the_last_because_somebody_says_so(small: None) -> None:
    agreed = agree(2 * SMALL)
    header, first, _ = sealed(agreed, plaintext(2 * SMALL))
    opener = agreed.opener()
    opener.header(header)
    with pytest.raises(IntegrityError):
        opener.open(first, final=True)


def test_segments_in_another_order_are_refused(small: None) -> None:
    agreed, data = agree(3 * SMALL), plaintext(3 * SMALL)
    header, *segments = sealed(agreed, data)
    for order in list(permutations(range(3)))[1:]:
        stream = header + b"".join(segments[number] for number in order)
        good = next(n for n, number in enumerate(order) if n != number)
        assert refused(agreed, stream) == data[: good * SMALL]


@pytest.mark.parametrize("size", [0, SMALL - 1, SMALL, 3 * SMALL, 3 * SMALL + 3])
def test_a_segment_twice_is_refused(small: None, size: int) -> None:
    agreed = agree(size)
    header, *segments = sealed(agreed, plaintext(size))
    for place, segment in enumerate(segments):
        doubled = [*segments[:place], segment, *segments[place:]]
        delivered = refused(agreed, header + b"".join(doubled))
        assert delivered == plaintext(size)[: (place + 1) * SMALL]


def test_a_segment_that_is_missing_is_refused(small: None) -> None:
    agreed = agree(3 * SMALL)
    header, *segments = sealed(agreed, plaintext(3 * SMALL))
    for place in range(3):
        rest = segments[:place] + segments[place + 1 :]
        refused(agreed, header + b"".join(rest))


@pytest.mark.parametrize("more", [b"x", bytes(TAG), bytes(SMALL + TAG)])
@pytest.mark.parametrize("size", [0, 5, SMALL])
def test_anything_behind_the_end_is_refused(small: None, size: int, more: bytes) -> None:
    agreed = agree(size)
    stream = b"".join(sealed(agreed, plaintext(size)))
    # What is whole by then may be delivered; the transfer has failed all the same.
    assert refused(agreed, stream + more) in (b"", plaintext(size))


def test_segments_of_another_stream_are_refused(small: None) -> None:
    """Not even between two streams of the same agreement."""
    agreed, data = agree(3 * SMALL), plaintext(3 * SMALL)
    one, other = sealed(agreed, data), sealed(agreed, data)
    for place in range(1, 4):
        spliced = [*one[:place], other[place], *one[place + 1 :]]
        assert refused(agreed, b"".join(spliced)) == data[: (place - 1) * SMALL]
    assert refused(agreed, other[0] + b"".join(one[1:])) == b""


OTHERS = {
    "sid": {"terms": replace(TERMS, sid="ffff")},
    "sender": {"terms": replace(TERMS, sender="alice@example.org/phone")},
    "receiver": {"terms": replace(TERMS, receiver="bob@example.net/phone")},
    "profile": {"terms": replace(TERMS, profile="urn:syncd:bundle:1")},
    "folder": {"terms": replace(TERMS, folder="photo")},
    "path": {"terms": replace(TERMS, path="s2024/Zürich/see.jpg")},
    "mtime": {"terms": replace(TERMS, mtime_ns=1)},
    "extension": {"terms": replace(TERMS, extension=b"x")},
    "direction": {
        "terms": replace(TERMS, sender=TERMS.receiver, receiver=TERMS.sender),
        "sender": BOB,
        "receiver": ALICE,
    },
    "sender's identity": {"sender": MALLORY},
    "receiver's identity": {"receiver": MALLORY},
    "ephemeral key": {"ephemeral": Ephemeral(Kem.X25519, bytes(range(32)))},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_stream_is_for_one_transfer(other: dict[str, object]) -> None:
    stream = b"".join(sealed(agree(**other), plaintext(5)))  # type: ignore[arg-type]  # a table
    assert refused(agree(), stream) == b""


@pytest.mark.parametrize(
    ("size", "offset"), [(6, 1), (5, 1), (6, 0), (4, 0)], ids=["both", "offset", "size", "less"]
)
def test_a_stream_is_for_one_part_of_one_size(size: int, offset: int) -> None:
    stream = b"".join(sealed(agree(size, offset), plaintext(size - offset)))
    assert refused(agree(), stream) == b""


def test_a_stream_is_not_played_again() -> None:
    """To another run of the same transfer, whose ephemeral key is another."""
    stream = b"".join(sealed(agree(), plaintext(5)))
    again = agree(ephemeral=Ephemeral.generate(Kem.X25519))
    assert refused(again, stream) == b""


@kems
def test_only_the_sender_of_the_offer_can_seal(kem: Kem) -> None:
    """A server that has read offer and answer seals a file of its own to the answer's key."""
    agreed = agree(kem=kem)
    forger = Agreed(
        replace(agreed.answer, offer=replace(agreed.answer.offer, identity=MALLORY.public)),
        agreed.ephemeral,
        MALLORY,
    )
    assert refused(agreed, b"".join(sealed(forger, plaintext(5)))) == b""


def test_a_header_of_another_version_or_size_is_refused() -> None:
    agreed = agree()
    stream = b"".join(sealed(agreed, plaintext(5)))
    for place in (0, 1):
        for value in range(256):
            if value != stream[place]:
                changed = stream[:place] + bytes([value]) + stream[place + 1 :]
                assert refused(agreed, changed) == b""


@kems
def test_a_plain_stream_is_refused(kem: Kem) -> None:
    agreed = agree(100_000, kem=kem)
    assert refused(agreed, plaintext(100_000)) == b""


def test_what_was_opened_in_vain_is_wiped(small: None) -> None:
    """The first segment is good, but comes together with one that is not."""
    agreed = agree(2 * SMALL)
    header, first, second = sealed(agreed, b"secret!" * 4 + b"...!")
    opener = agreed.opener()
    opener.header(header)
    with pytest.raises(IntegrityError):
        opener.open(first + second[:-1] + b"x", final=True)
    assert bytes(opener._buffer) == bytes(2 * SMALL)


# --- Misuse of ours


def test_another_identity_than_offered_cannot_seal() -> None:
    with pytest.raises(ValueError, match="another identity"):
        Sealer(agree().answer, BOB)


def test_another_ephemeral_key_than_answered_cannot_open() -> None:
    with pytest.raises(ValueError, match="another ephemeral key"):
        Opener(agree().answer, Ephemeral.generate(Kem.X25519))


@pytest.mark.parametrize(
    ("length", "final"),
    [
        (0, False),
        (0, True),
        (1, False),
        (SEGMENT - 1, False),
        (SEGMENT, True),
        (SEGMENT + 5, False),
        (SEGMENT + 6, True),
        (2 * SEGMENT, False),
    ],
)
def test_other_lengths_than_agreed_are_not_sealed(length: int, final: bool) -> None:
    sealer = agree(SEGMENT + 5).sealer()
    with pytest.raises(ValueError, match="bytes, final="):
        sealer.seal(memoryview(bytes(length)), final=final)


def test_more_than_a_batch_is_not_sealed() -> None:
    size = (BATCH + 1) * SEGMENT
    sealer = agree(size).sealer()
    with pytest.raises(ValueError, match="bytes, final="):
        sealer.seal(memoryview(bytes(size)), final=True)


def test_nothing_is_sealed_behind_the_end() -> None:
    sealer = agree(0).sealer()
    sealer.seal(memoryview(b""), final=True)
    with pytest.raises(ValueError, match="bytes, final="):
        sealer.seal(memoryview(b""), final=True)


def test_there_is_one_header() -> None:
    agreed = agree()
    header, segment = sealed(agreed, plaintext(5))
    opener = agreed.opener()
    with pytest.raises(ValueError, match="no header"):
        opener.open(segment, final=True)
    opener.header(header)
    with pytest.raises(ValueError, match="one header"):
        opener.header(header)


def test_a_file_too_long_for_one_key_is_not_sealed() -> None:
    longest = MAX_SEGMENTS * SEGMENT
    assert agree(longest).sealer().left == longest
    with pytest.raises(ValueError, match="this long"):
        agree(longest + 1).sealer()
    with pytest.raises(ValueError, match="this long"):
        agree(longest + 1).opener()


@pytest.mark.parametrize(("size", "most"), [(0, 0), (5, 5), (SEGMENT * 100, SEGMENT * BATCH)])
def test_the_buffers_are_bounded_and_as_small_as_the_file(size: int, most: int) -> None:
    agreed = agree(size)
    assert len(agreed.opener()._buffer) == most
    assert len(agreed.sealer()._buffer) == sealed_length(most)


def test_the_buffer_is_used_again() -> None:
    sealer = agree(2 * SEGMENT).sealer()
    part = memoryview(bytes(SEGMENT))
    results = [sealer.seal(part, final=final) for final in (False, True)]
    assert all(one.obj is other.obj for one, other in pairwise(results))
