"""What people compare: the fingerprint of one key, and six words for two peers. Sans-IO.

Both ends print the same six words if each holds the other's real key. They are read out over
a channel on which one recognises the other: by phone, or face to face.

Six words carry 96 bits. Who stands in between has to find two keys, one to show to each end,
that lead to the same words, and may look for them in advance: a birthday problem of 2**48
tries, not 2**96. So the words are derived by scrypt, which makes each try take 32 MiB and as
long as a person does not notice: 2**48 of them are some hundred thousand years of a core. That
is no wall for somebody who has machines built for it; the whole fingerprint is.
Words are not asked for by a machine, so this costs nobody anything.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from syncd.trust.signing import NS_SEAL, statement

WORDS = 6
# RFC 7914 section 2: 128 * N * r bytes of memory; about a tenth of a second here.
_N, _R, _P = 1 << 15, 8, 1

# Proquints (Wilkerson, arXiv:0901.4016): 16 bits in five letters that most people can say.
_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aiou"


def fingerprint(public: bytes) -> str:
    """Show a public key: its SHA-256 in hexadecimal, in groups of four."""
    digest = hashlib.sha256(public).hexdigest()
    return " ".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def is_fingerprint(text: str, public: bytes) -> bool:
    """Whether a person has written the whole fingerprint of this key, in whatever groups."""
    return text.translate(_NO_GROUPS).lower() == hashlib.sha256(public).hexdigest()


def words(own_jid: str, own_key: bytes, peer_jid: str, peer_key: bytes) -> tuple[str, ...]:
    """Derive the six words for two peers; takes a tenth of a second, so call it in a thread.

    Args:
      own_jid: Our bare JID.
      own_key: Our public key.
      peer_jid: The peer's bare JID.
      peer_key: The peer's public key, as we hold it.
    """
    ends = ((own_jid, own_key), (peer_jid, peer_key))
    # In the same order at both ends.
    sides = sorted((jid.encode(), hashlib.sha256(key).digest()) for jid, key in ends)
    scrypt = Scrypt(salt=NS_SEAL.encode(), length=2 * WORDS, n=_N, r=_R, p=_P)
    bits = scrypt.derive(statement("words", *sides[0], *sides[1]))
    return tuple(
        _word(int.from_bytes(bits[start : start + 2], "big"))
        for start in range(0, len(bits), 2)
    )


def is_words(text: str, expected: tuple[str, ...]) -> bool:
    """Whether a person has written these words, with whatever between them."""
    return tuple(text.replace("-", " ").replace(",", " ").lower().split()) == expected


_NO_GROUPS = str.maketrans("", "", " :-\t\n")


def _word(number: int) -> str:
    return "".join(
        alphabet[number >> shift & len(alphabet) - 1]
        for alphabet, shift in (
            (_CONSONANTS, 12),
            (_VOWELS, 10),
            (_CONSONANTS, 6),
            (_VOWELS, 4),
            (_CONSONANTS, 0),
        )
    )
