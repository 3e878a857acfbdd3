"""Make vectors.json anew: `python -m tests.trust.make_vectors > tests/trust/vectors.json`.

Offers, answers and receipts come out the same each time. Headers, streams and finishes do not,
for HPKE takes its randomness from the kernel: they are to be opened. Needs a `cryptography`
with the hybrid.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from typing import Any

from syncd.trust import words
from syncd.trust.handshake import _answer_statement, _offer_statement
from syncd.trust.kem import Kem
from syncd.trust.receipt import (
    Content,
    Said,
    _commitment,
    _finish_statement,
    _statement,
    seal_finish,
    sign,
)
from syncd.trust.seal import SEGMENT, _header_statement
from syncd.trust.signing import Identity, digest, statement
from tests.support.sealing import (
    ALICE,
    BOB,
    PRIVATE,
    TERMS,
    Agreed,
    agree,
    plaintext,
    sealed,
)

CASES = [
    (Kem.X25519, 5, 0),
    (Kem.X25519, 0, 0),
    (Kem.X25519, 2 * SEGMENT, 0),
    (Kem.X25519, 2 * SEGMENT + 9, 4),
    (Kem.HYBRID, 5, 0),
]
CONTENT = Content(digest=bytes(range(32)), salt=bytes(range(200, 232)))


def main() -> None:
    """Print them."""
    made = {
        "comment": "docs/sealing.md says what this is. Bytes are hexadecimal. The file of a "
        "transfer is the bytes 0, 1, ... 250, 0, 1, ... up to its size.",
        "statement": statement("example", "ä", 258, b"\x00\xff", "").hex(),
        "sender": identity(ALICE),
        "receiver": identity(BOB),
        "succession": succession(),
        "words": {
            "jids": ["alice@example.org", "bob@example.net"],
            "words": words.words(
                "alice@example.org", ALICE.public, "bob@example.net", BOB.public
            ),
        },
        "transfers": [transfer(*case) for case in CASES],
    }
    json.dump(made, sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")


def identity(of: Identity) -> dict[str, str]:
    """A key."""
    return {
        "private": of.private_bytes().hex(),
        "public": of.public.hex(),
        "fingerprint": words.fingerprint(of.public),
    }


def succession() -> dict[str, str]:
    """A key that replaced two others."""
    latest = ALICE.succeeded_by(bytes([1]) * 32).succeeded_by(bytes([2]) * 32)
    return {
        "public": latest.public.hex(),
        "statement": statement("succession", ALICE.public, latest.successions[96:128]).hex(),
        "successions": latest.successions.hex(),
    }


def transfer(kem: Kem, size: int, offset: int) -> dict[str, Any]:
    """One transfer from offer to receipt."""
    agreed = agree(size, offset, kem=kem)
    answer, offer = agreed.answer, agreed.answer.offer
    header, *segments = sealed(agreed, plaintext(size)[offset:])
    stream = b"".join(segments)
    prefix, key = header[:2], header[2:-64]
    offered = _offer_statement(offer.terms, offer.identity, offer.successions, offer.kems)
    answered = _answer_statement(
        offer, offset, answer.identity, answer.successions, kem, answer.key
    )
    return {
        "terms": {
            "sid": TERMS.sid,
            "sender": TERMS.sender,
            "receiver": TERMS.receiver,
            "profile": TERMS.profile,
            "folder": TERMS.folder,
            "path": TERMS.path,
            "size": size,
            "mtime_ns": TERMS.mtime_ns,
            "extension": "",
        },
        "offset": offset,
        "offer": {
            "statement": offered.hex(),
            "attributes": offer.attributes(),
            "hash": offer.digest().hex(),
        },
        "answer": {
            "ephemeral_private": PRIVATE[kem].hex(),
            "statement": answered.hex(),
            "attributes": answer.attributes(),
            "transcript": answer.transcript.hex(),
        },
        "header": {
            "bytes": header.hex(),
            "info": statement("content key", answer.transcript, prefix).hex(),
            "content_key": answer.open("content key", key, agreed.ephemeral, prefix).hex(),
            "statement": _header_statement(answer, key).hex(),
        },
        "segments": {
            "associated": digest("segments", answer.transcript, header).hex(),
            "length": len(stream),
            "sha256": hashlib.sha256(stream).hexdigest(),
            **({"bytes": stream.hex()} if len(stream) < 100 else {}),
        },
        "ends": ends(agreed),
    }


def ends(agreed: Agreed) -> dict[str, Any]:
    """How a transfer ends."""
    answer = agreed.answer
    attributes = seal_finish(answer, CONTENT, ALICE)
    hidden = base64.b64decode(attributes["sealed"])
    return {
        "blake3": CONTENT.digest.hex(),
        "salt": CONTENT.salt.hex(),
        "commitment": _commitment(answer, CONTENT).hex(),
        "finish": {
            "info": statement("content", answer.transcript).hex(),
            "statement": _finish_statement(answer, hidden).hex(),
            "attributes": attributes,
        },
        **{
            str(said): {
                "statement": _statement(said, answer, CONTENT).hex(),
                "signature": sign(said, answer, CONTENT, BOB),
            }
            for said in Said
        },
    }


if __name__ == "__main__":
    main()
