"""The vectors, read by a second implementation that shares nothing but the primitives.

It follows docs/sealing.md only; then the first one has to open the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from syncd.trust import words
from syncd.trust.handshake import Answer, Offer, Terms
from syncd.trust.kem import Ephemeral, Kem
from syncd.trust.receipt import Content, Said, check, open_finish
from syncd.trust.seal import Opener
from syncd.trust.signing import predecessors
from tests.support.sealing import opened, plaintext

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("vectors.json").read_bytes())
transfers = pytest.mark.parametrize(
    "vector",
    VECTORS["transfers"],
    ids=lambda each: f"{each['answer']['attributes']['kem']}-{each['terms']['size']}",
)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


def field(value: str | int | bytes) -> bytes:
    """One field of a statement."""
    if isinstance(value, int):
        value = value.to_bytes(8, "big")
    data = value.encode() if isinstance(value, str) else value
    return len(data).to_bytes(4, "big") + data


def say(label: str, *values: str | int | bytes) -> bytes:
    return b"".join(map(field, ("urn:syncd:seal:1 " + label, *values)))


def assert_signed(public: bytes, signature: str, said: bytes) -> None:
    Ed25519PublicKey.from_public_bytes(public).verify(base64.b64decode(signature), said)


def test_a_statement() -> None:
    assert say("example", "ä", 258, b"\x00\xff", "") == unhex(VECTORS["statement"])


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_an_identity(who: str) -> None:
    vector = VECTORS[who]
    private = Ed25519PrivateKey.from_private_bytes(unhex(vector["private"]))
    public = private.public_key().public_bytes_raw()
    assert public == unhex(vector["public"])
    assert hashlib.sha256(public).hexdigest() == vector["fingerprint"].replace(" ", "")


def test_a_succession() -> None:
    vector = VECTORS["succession"]
    links = unhex(vector["successions"])
    old, new = links[:32], links[96:128]
    said = say("succession", old, new)
    assert said == unhex(vector["statement"])
    assert_signed(old, base64.b64encode(links[32:96]).decode(), said)
    assert (old, new) == predecessors(unhex(vector["public"]), links)


def test_words() -> None:
    vector = VECTORS["words"]
    sides = sorted(
        (jid.encode(), hashlib.sha256(unhex(VECTORS[who]["public"])).digest())
        for jid, who in zip(vector["jids"], ("sender", "receiver"), strict=True)
    )
    bits = hashlib.scrypt(
        say("words", *sides[0], *sides[1]),
        salt=b"urn:syncd:seal:1",
        n=32_768,
        r=8,
        p=1,
        dklen=12,
        maxmem=64 << 20,
    )
    spelt = [
        "bdfghjklmnprstvz"[number >> 12]
        + "aiou"[number >> 10 & 3]
        + "bdfghjklmnprstvz"[number >> 6 & 15]
        + "aiou"[number >> 4 & 3]
        + "bdfghjklmnprstvz"[number & 15]
        for number in (int.from_bytes(bits[i : i + 2], "big") for i in range(0, 12, 2))
    ]
    assert spelt == vector["words"]
    keys = [unhex(VECTORS[who]["public"]) for who in ("sender", "receiver")]
    alice, bob = vector["jids"]
    assert list(words.words(alice, keys[0], bob, keys[1])) == spelt


@transfers
def test_offer_and_answer(vector: dict[str, Any]) -> None:
    terms, offer, answer = vector["terms"], vector["offer"], vector["answer"]
    sender, receiver = (unhex(VECTORS[who]["public"]) for who in ("sender", "receiver"))
    values = [*terms.values()]
    values[-1] = unhex(values[-1])
    offered = say("offer", *values, sender, b"", offer["attributes"]["kems"])
    assert offered == unhex(offer["statement"])
    assert_signed(sender, offer["attributes"]["signature"], offered)
    signature = base64.b64decode(offer["attributes"]["signature"])
    offer_hash = hashlib.sha256(say("offer hash", offered, signature)).digest()
    assert offer_hash == unhex(offer["hash"])
    answered = say(
        "answer",
        offer_hash,
        terms["sid"],
        terms["sender"],
        terms["receiver"],
        vector["offset"],
        receiver,
        b"",
        answer["attributes"]["kem"],
        base64.b64decode(answer["attributes"]["key"]),
    )
    assert answered == unhex(answer["statement"])
    assert_signed(receiver, answer["attributes"]["signature"], answered)
    signature = base64.b64decode(answer["attributes"]["signature"])
    transcript = hashlib.sha256(say("transcript", answered, signature)).digest()
    assert transcript == unhex(answer["transcript"])


@transfers
def test_finish_and_receipt(vector: dict[str, Any]) -> None:
    ends, transcript = vector["ends"], unhex(vector["answer"]["transcript"])
    sender, receiver = (unhex(VECTORS[who]["public"]) for who in ("sender", "receiver"))
    names = ("sid", "sender", "receiver", "size")
    about = [transcript, *(vector["terms"][name] for name in names)]
    sealed = base64.b64decode(ends["finish"]["attributes"]["sealed"])
    said = say("finish", *about, sealed)
    assert said == unhex(ends["finish"]["statement"])
    assert_signed(sender, ends["finish"]["attributes"]["signature"], said)
    info = say("content", transcript)
    assert info == unhex(ends["finish"]["info"])
    content = hpke_open(unhex(vector["answer"]["ephemeral_private"]), sealed, info)
    digest, salt = content[:32], content[32:]
    assert (digest.hex(), salt.hex()) == (ends["blake3"], ends["salt"])
    size = vector["terms"]["size"]
    commitment = hashlib.sha256(say("commitment", transcript, size, digest, salt)).digest()
    assert commitment == unhex(ends["commitment"])
    for label in ("receipt", "beside"):
        said = say(label, *about, commitment)
        assert said == unhex(ends[label]["statement"])
        assert_signed(receiver, ends[label]["signature"], said)


def hpke_open(private: bytes, sealed: bytes, info: bytes) -> bytes:
    """What was sealed to the ephemeral key."""
    kdf, aead = hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM
    ecdh = X25519PrivateKey.from_private_bytes(private[-32:])
    if len(private) == 32:
        return hpke.Suite(hpke.KEM.X25519, kdf, aead).decrypt(sealed, ecdh, info=info)
    lattice = MLKEM768PrivateKey.from_seed_bytes(private[:64])
    hybrid = hpke.MLKEM768X25519PrivateKey(lattice, ecdh)
    return hpke.Suite(hpke.KEM.MLKEM768_X25519, kdf, aead).decrypt(sealed, hybrid, info=info)


@transfers
def test_the_stream(vector: dict[str, Any]) -> None:
    header, transcript = unhex(vector["header"]["bytes"]), unhex(vector["answer"]["transcript"])
    sealed_key, signature = header[2:-64], header[-64:]
    assert header[:2] == b"\x01\x10"
    said = say("header", transcript, header[:2], sealed_key)
    assert said == unhex(vector["header"]["statement"])
    sender = unhex(VECTORS["sender"]["public"])
    assert_signed(sender, base64.b64encode(signature).decode(), said)
    private = unhex(vector["answer"]["ephemeral_private"])
    info = say("content key", transcript, header[:2])
    assert info == unhex(vector["header"]["info"])
    key = hpke_open(private, sealed_key, info)
    assert key == unhex(vector["header"]["content_key"])
    associated = hashlib.sha256(say("segments", transcript, header)).digest()
    assert associated == unhex(vector["segments"]["associated"])
    data = plaintext(vector["terms"]["size"])[vector["offset"] :]
    starts = range(0, max(1, len(data)), 65_536)
    stream = b"".join(
        AESGCM(key).encrypt(
            number.to_bytes(11, "big") + bytes([start == starts[-1]]),
            data[start : start + 65_536],
            associated,
        )
        for number, start in enumerate(starts)
    )
    assert len(stream) == vector["segments"]["length"]
    assert hashlib.sha256(stream).hexdigest() == vector["segments"]["sha256"]
    assert vector["segments"].get("bytes", stream.hex()) == stream.hex()
    assert b"".join(opened(opener(vector), header + stream)) == data


@transfers
def test_the_first_implementation_takes_the_ends(vector: dict[str, Any]) -> None:
    answer, ends = answer_of(vector), vector["ends"]
    private = unhex(vector["answer"]["ephemeral_private"])
    content = open_finish(answer, ends["finish"]["attributes"], Ephemeral(answer.kem, private))
    assert content == Content(digest=unhex(ends["blake3"]), salt=unhex(ends["salt"]))
    for said in Said:
        check(said, answer, content, ends[said]["signature"])
    assert answer.transcript == unhex(vector["answer"]["transcript"])


def answer_of(vector: dict[str, Any]) -> Answer:
    terms = Terms(**vector["terms"] | {"extension": unhex(vector["terms"]["extension"])})
    offer = Offer.read(vector["offer"]["attributes"], terms)
    return Answer.read(vector["answer"]["attributes"], offer, vector["offset"])


def opener(vector: dict[str, Any]) -> Opener:
    answer = answer_of(vector)
    private = unhex(vector["answer"]["ephemeral_private"])
    return Opener(answer, Ephemeral(Kem(answer.kem), private))
