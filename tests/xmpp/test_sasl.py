from __future__ import annotations

import base64
import ssl
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import AuthenticationError
from syncd.xmpp.sasl import (
    END_POINT,
    MAX_ITERATIONS,
    MIN_ITERATIONS,
    HashedToken,
    KeyWanted,
    Offered,
    Scram,
    Token,
    choose,
    choose_for_token,
    decode,
    encode,
    plain,
    prepare_password,
    strength,
)

NONCE = "fyko+d2lbbFgONRv9qkxdawL"
SERVER_NONCE = f"{NONCE}3rfcNHYJY1ZVvWVs7j"
SERVER_FIRST = f"r={SERVER_NONCE},s=QSXCR+Q6sek8bf92,i=4096".encode()


@pytest.mark.parametrize(
    ("mechanism", "nonce", "server_first", "client_final", "server_final"),
    [
        pytest.param(
            "SCRAM-SHA-1",
            NONCE,
            SERVER_FIRST,
            f"c=biws,r={SERVER_NONCE},p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts=",
            b"v=rmF9pqV8S7suAoZWja4dJRkFsKQ=",
            id="RFC 5802 section 5",
        ),
        pytest.param(
            "SCRAM-SHA-256",
            "rOprNGfwEbeRWgbNEkqO",
            b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
            b"s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096",
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,"
            "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
            b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
            id="RFC 7677 section 3",
        ),
    ],
)
def test_the_examples_of_the_rfcs(
    mechanism: str, nonce: str, server_first: bytes, client_final: str, server_final: bytes
) -> None:
    scram = Scram(mechanism, "user", nonce)
    assert scram.first() == f"n,,n=user,r={nonce}".encode()
    wanted = scram.challenged(server_first)
    assert (wanted.hash_name, wanted.iterations) == (
        mechanism[6:].replace("-", "").lower(),
        4096,
    )
    keyed = [scram.keyed]
    assert scram.final(wanted.derive("pencil")).decode() == client_final
    assert [*keyed, scram.keyed] == [False, True]
    scram.finished(server_final)


def test_a_name_cannot_end_its_field() -> None:
    """RFC 5802 section 5.1: "=" and "," in a name are escaped."""
    assert Scram("SCRAM-SHA-1", "a=b,c=2C", "x").first() == b"n,,n=a=3Db=2Cc=3D2C,r=x"


def test_the_flag_of_channel_binding_is_part_of_what_is_signed() -> None:
    scram = Scram("SCRAM-SHA-1", "user", NONCE, gs2_flag="y")
    assert scram.first().startswith(b"y,,n=user")
    wanted = scram.challenged(SERVER_FIRST)
    gs2 = base64.b64encode(b"y,,")
    assert scram.final(wanted.derive("pencil")).startswith(b"c=" + gs2 + b",r=")


@pytest.mark.parametrize(
    ("challenge", "reason"),
    [
        pytest.param(b"", "nonce", id="empty"),
        pytest.param(b"hello", "nonce", id="no fields"),
        pytest.param(b"r=other3rfc,s=QSXCR+Q6,i=4096", "nonce", id="not our nonce"),
        pytest.param(f"r={NONCE},s=QSXCR+Q6,i=4096".encode(), "nonce", id="our nonce alone"),
        pytest.param(f"r={SERVER_NONCE},i=4096".encode(), "malformed", id="no salt"),
        pytest.param(f"r={SERVER_NONCE},s=QSXCR+Q6".encode(), "malformed", id="no count"),
        pytest.param(f"r={SERVER_NONCE},s=#,i=4096".encode(), "malformed", id="no base64"),
        pytest.param(f"r={SERVER_NONCE},s=\xfc,i=4096".encode(), "malformed", id="no ASCII"),
        pytest.param(f"r={SERVER_NONCE},s=QSXC,i=many".encode(), "malformed", id="no number"),
        pytest.param(f"r={SERVER_NONCE},s=,i=4096".encode(), "iterations", id="empty salt"),
        pytest.param(f"r={SERVER_NONCE},s=QSXC,i=-1".encode(), "iterations", id="negative"),
        pytest.param(b"m=x," + SERVER_FIRST, "extension", id="mandatory extension"),
        pytest.param(SERVER_FIRST + b",m=x", "extension", id="mandatory, at the end"),
        pytest.param(SERVER_FIRST + b"," + 4_096 * b"x", "too long", id="too long"),
        pytest.param(b"r=\xff", "UTF-8", id="no UTF-8"),
    ],
)
def test_a_challenge_that_is_none_ends_the_login(challenge: bytes, reason: str) -> None:
    with pytest.raises(AuthenticationError, match=reason):
        Scram("SCRAM-SHA-1", "user", NONCE).challenged(challenge)


@pytest.mark.parametrize(
    ("iterations", "taken"),
    [
        (1, False),
        (MIN_ITERATIONS - 1, False),
        (MIN_ITERATIONS, True),
        (MAX_ITERATIONS, True),
        (MAX_ITERATIONS + 1, False),
        (10**18, False),
    ],
)
def test_the_server_may_ask_for_neither_too_little_nor_too_much_work(
    iterations: int, taken: bool
) -> None:
    scram = Scram("SCRAM-SHA-256", "user", NONCE)
    challenge = f"r={SERVER_NONCE},s=QSXCR+Q6sek8bf92,i={iterations}".encode()
    if taken:
        salt = base64.b64decode("QSXCR+Q6sek8bf92")
        assert scram.challenged(challenge) == KeyWanted("sha256", salt, iterations)
    else:
        with pytest.raises(
            AuthenticationError, match=f"asks for {iterations} SCRAM iterations"
        ):
            scram.challenged(challenge)


def test_unknown_optional_extensions_are_ignored_and_the_first_of_each_letter_counts() -> None:
    scram = Scram("SCRAM-SHA-1", "user", NONCE)
    wanted = scram.challenged(SERVER_FIRST + b",x=y,i=1,r=other")
    assert wanted.iterations == 4096


def test_a_second_challenge_gets_no_second_proof() -> None:
    scram = Scram("SCRAM-SHA-1", "user", NONCE)
    scram.challenged(SERVER_FIRST)
    with pytest.raises(AuthenticationError, match="second SCRAM challenge"):
        scram.challenged(SERVER_FIRST)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"v=",
        b"v=#",
        b"v=\xc3\xbc",
        b"e=other-error",
        b"v=AAAApqV8S7suAoZWja4dJRkFsKQ=",
        b"v=rmF9pqV8S7suAoZWja4dJRkFsA==",
        b"m=x,v=rmF9pqV8S7suAoZWja4dJRkFsKQ=",
    ],
)
def test_a_server_that_does_not_know_the_password_is_an_impostor(message: bytes) -> None:
    scram = Scram("SCRAM-SHA-1", "user", NONCE)
    scram.final(scram.challenged(SERVER_FIRST).derive("pencil"))
    with pytest.raises(AuthenticationError):
        scram.finished(message)


@pytest.mark.parametrize("message", [b"", b"v=", b"v=rmF9pqV8S7suAoZWja4dJRkFsKQ="])
def test_a_proof_before_ours_proves_nothing(message: bytes) -> None:
    """An empty signature must not equal the one that we have not computed yet."""
    scram = Scram("SCRAM-SHA-1", "user", NONCE)
    scram.challenged(SERVER_FIRST)
    with pytest.raises(AuthenticationError, match="could not prove"):
        scram.finished(message)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ({"SCRAM-SHA-1", "SCRAM-SHA-256", "PLAIN", "SCRAM-SHA-512"}, "SCRAM-SHA-512"),
        ({"SCRAM-SHA-1", "SCRAM-SHA-256", "PLAIN", "SCRAM-SHA-256-PLUS"}, "SCRAM-SHA-256"),
        ({"SCRAM-SHA-1", "PLAIN", "DIGEST-MD5"}, "SCRAM-SHA-1"),
        ({"PLAIN", "X-OAUTH2"}, "PLAIN"),
    ],
)
def test_the_strongest_mechanism_of_both_is_chosen(offered: set[str], chosen: str) -> None:
    choice = choose(Offered(mechanisms=frozenset(offered)), end_point=False, allow_plain=True)
    assert (choice.mechanism, choice.gs2_flag) == (chosen, "n")


@pytest.mark.parametrize(
    ("offered", "allow_plain", "reason"),
    [
        ({"PLAIN"}, False, "only PLAIN"),
        (set(), True, "none at all"),
        ({"EXTERNAL", "DIGEST-MD5"}, True, "it lists: DIGEST-MD5, EXTERNAL"),
        ({"scram-sha-1"}, False, "no way to log in"),
    ],
)
def test_without_a_common_mechanism_the_user_learns_what_the_server_lists(
    offered: set[str], allow_plain: bool, reason: str
) -> None:
    with pytest.raises(AuthenticationError, match=reason) as caught:
        choose(Offered(mechanisms=frozenset(offered)), end_point=False, allow_plain=allow_plain)
    assert caught.value.hint


BOTH = frozenset({"SCRAM-SHA-1", "SCRAM-SHA-256", "SCRAM-SHA-1-PLUS", "SCRAM-SHA-256-PLUS"})
PLAINLY = frozenset({"SCRAM-SHA-1", "SCRAM-SHA-256"})


@pytest.mark.parametrize(
    ("mechanisms", "bindings", "end_point", "mechanism", "flag"),
    [
        # listed, offered, and we can
        (BOTH, {END_POINT, "tls-exporter"}, True, "SCRAM-SHA-256-PLUS", f"p={END_POINT}"),
        # a certificate whose hash is not defined (RFC 5929 section 4.1)
        (BOTH, {END_POINT}, False, "SCRAM-SHA-256", "n"),
        # only what we cannot do: "y" would be a lie
        (BOTH, {"tls-exporter"}, True, "SCRAM-SHA-256", "n"),
        # ejabberd 23.01 does not say which, and takes only one that we cannot do
        (BOTH, None, True, "SCRAM-SHA-256", "n"),
        # Prosody 0.12 on TLS 1.3: nothing is announced, so whoever removed it is found out
        (PLAINLY, None, True, "SCRAM-SHA-256", "y"),
        (PLAINLY, None, False, "SCRAM-SHA-256", "n"),
        # the stronger hash without the binding is weaker than the other with it
        (
            frozenset({"SCRAM-SHA-512", "SCRAM-SHA-1-PLUS"}),
            {END_POINT},
            True,
            "SCRAM-SHA-1-PLUS",
            f"p={END_POINT}",
        ),
    ],
)
def test_the_login_is_bound_to_the_channel_where_both_can(
    mechanisms: frozenset[str],
    bindings: set[str] | None,
    end_point: bool,
    mechanism: str,
    flag: str,
) -> None:
    """The rules of XEP-0440 section 4, and what real servers make of them."""
    offered = Offered(
        mechanisms=mechanisms, bindings=None if bindings is None else frozenset(bindings)
    )
    choice = choose(offered, end_point=end_point, allow_plain=False)
    assert (choice.mechanism, choice.gs2_flag) == (mechanism, flag)


@pytest.mark.parametrize(
    ("mechanisms", "bindings", "caveat"),
    [
        (BOTH, {"tls-exporter", "tls-\x1b[2J"}, "('tls-\\x1b[2J', 'tls-exporter')"),
        (
            BOTH,
            {f"tls-{number}" for number in range(99)},
            "'tls-0', 'tls-1', 'tls-10', 'tls-11')",
        ),
        (BOTH, set(), "(it names none)"),
        (BOTH, {END_POINT, "tls-exporter"}, None),
        (BOTH, None, None),
        (PLAINLY, None, None),
    ],
)
def test_a_server_that_binds_only_in_ways_that_we_cannot_is_used_and_that_is_told(
    mechanisms: frozenset[str], bindings: set[str] | None, caveat: str | None
) -> None:
    """XEP-0440 section 4 has us abort; Prosody 13 as it comes is such a server."""
    listed = None if bindings is None else frozenset(bindings)
    offered = Offered(mechanisms=mechanisms, bindings=listed)
    choice = choose(offered, end_point=True, allow_plain=False)
    assert choice.mechanism.startswith("SCRAM-SHA-256")
    if caveat is None:
        assert choice.caveat == ""
    else:
        assert caveat in choice.caveat
        assert "enable tls-server-end-point" in choice.caveat


def test_a_server_that_has_bound_us_once_is_not_used_without() -> None:
    """So whoever changes the list is found out, but for the first time."""
    offered = Offered(mechanisms=BOTH, bindings=frozenset({"tls-exporter"}))
    with pytest.raises(AuthenticationError, match="SCRAM-SHA-256-PLUS before"):
        choose(offered, end_point=True, allow_plain=False, least="SCRAM-SHA-256-PLUS")


def test_bindings_without_a_mechanism_for_them_were_tampered_with() -> None:
    offered = Offered(mechanisms=PLAINLY, bindings=frozenset({END_POINT}))
    with pytest.raises(AuthenticationError, match="may have removed it"):
        choose(offered, end_point=True, allow_plain=False)


@pytest.mark.parametrize(
    ("least", "mechanisms"),
    [
        ("SCRAM-SHA-256", {"SCRAM-SHA-1", "PLAIN"}),
        ("SCRAM-SHA-1", {"PLAIN"}),
        ("SCRAM-SHA-1-PLUS", {"SCRAM-SHA-512"}),
    ],
)
def test_nothing_weaker_than_before_is_used(least: str, mechanisms: set[str]) -> None:
    offered = Offered(mechanisms=frozenset(mechanisms))
    with pytest.raises(AuthenticationError, match=f"by {least} before") as caught:
        choose(offered, end_point=False, allow_plain=True, least=least)
    assert "delete the file login" in caught.value.hint


def test_the_same_or_more_than_before_is_used() -> None:
    offered = Offered(mechanisms=BOTH, bindings=frozenset({END_POINT}))
    for least in ("", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS", "X-UNHEARD-OF"):
        choice = choose(offered, end_point=True, allow_plain=False, least=least)
        assert choice.mechanism == "SCRAM-SHA-256-PLUS"


def test_mechanisms_are_ordered_by_strength() -> None:
    ranked = [
        "X-UNHEARD-OF",
        "PLAIN",
        "SCRAM-SHA-1",
        "SCRAM-SHA-256",
        "SCRAM-SHA-512",
        "SCRAM-SHA-1-PLUS",
        "SCRAM-SHA-256-PLUS",
        "SCRAM-SHA-512-PLUS",
    ]
    assert sorted(ranked, key=strength) == ranked
    assert len({strength(name) for name in ranked}) == len(ranked)


# XEP-0474 section 5.3: what the server of its example offers, and the hash it sends.
XEP_0474 = Offered(
    mechanisms=frozenset({"SCRAM-SHA-1", "SCRAM-SHA-1-PLUS"}),
    bindings=frozenset({END_POINT, "tls-exporter"}),
)
XEP_0474_NONCE = "12C4CD5C-E38E-4A98-8F6D-15C38F51CCC6"
XEP_0474_FIRST = (
    f"r={XEP_0474_NONCE}a09117a6-ac50-4f2f-93f1-93799c2bddf6,s=QSXCR+Q6sek8bf92,i=4096,"
    "h=G6k/rBLDqgOhRRaCuuatSDFkJ08="
).encode()


def test_the_lists_that_the_server_sent_are_those_that_we_saw() -> None:
    scram = Scram("SCRAM-SHA-1", "user", XEP_0474_NONCE, offered=XEP_0474)
    assert scram.challenged(XEP_0474_FIRST).iterations == 4096


@pytest.mark.parametrize(
    "seen",
    [
        Offered(mechanisms=frozenset({"SCRAM-SHA-1"}), bindings=XEP_0474.bindings),
        Offered(mechanisms=XEP_0474.mechanisms, bindings=frozenset({END_POINT})),
        Offered(mechanisms=XEP_0474.mechanisms),
    ],
)
def test_a_list_that_was_shortened_on_its_way_ends_the_login(seen: Offered) -> None:
    scram = Scram("SCRAM-SHA-1", "user", XEP_0474_NONCE, offered=seen)
    with pytest.raises(AuthenticationError, match="was changed on its way"):
        scram.challenged(XEP_0474_FIRST)


def test_the_channel_is_part_of_the_proof() -> None:
    """RFC 5802 section 7: ``c`` is the header and the data behind it."""
    scram = Scram("SCRAM-SHA-1-PLUS", "user", NONCE, f"p={END_POINT}", b"\x01\x02")
    assert scram.first().startswith(b"p=tls-server-end-point,,n=user,")
    key = scram.challenged(SERVER_FIRST).derive("pencil")
    channel = base64.b64encode(b"p=tls-server-end-point,,\x01\x02").decode()
    assert scram.final(key).startswith(f"c={channel},".encode())


def test_plain_is_one_message() -> None:
    assert plain("tim", "tanstaaftanstaaf") == b"\0tim\0tanstaaftanstaaf"


@given(st.binary())
def test_base64_there_and_back(data: bytes) -> None:
    assert decode(encode(data)) == data


def test_an_empty_message_is_an_equals_sign() -> None:
    """RFC 6120 section 6.4.2; none at all is taken as well."""
    assert encode(b"") == "="
    assert [decode("="), decode(""), decode(None), decode(" \n")] == [b""] * 4


@pytest.mark.parametrize("text", ["#", "abc", "YQ==YQ==", "\u00fc", "YQ= ="])
def test_what_is_no_base64_ends_the_login(text: str) -> None:
    with pytest.raises(AuthenticationError, match="no base64"):
        decode(text)


@pytest.mark.parametrize(
    ("password", "prepared"),
    [
        # RFC 4013 section 3
        ("I\u00adX", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        # section 2.1: other spaces become the one of ASCII
        ("correct\u00a0horse", "correct horse"),
        ("a b", "a b"),
        ("p\u0308", "p\u0308"),
        ("u\u0308", "\u00fc"),
        # right to left throughout (RFC 3454 section 6)
        ("\u0627\u0031\u0628", "\u0627\u0031\u0628"),
        ("\u0627", "\u0627"),
    ],
)
def test_a_password_is_prepared(password: str, prepared: str) -> None:
    assert prepare_password(password) == prepared


@pytest.mark.parametrize(
    ("password", "reason"),
    [
        # RFC 4013 section 3
        ("\u0007", "character"),
        ("\u0627\u0031", "right-to-left"),
        # section 2.3
        ("pass\nword", "character"),
        ("a\u0080", "character"),
        ("a\ue000", "character"),
        ("a\ufffe", "character"),
        (f"a{chr(0xD800)}", "character"),
        ("a\ufffd", "character"),
        ("a\u2ff0", "character"),
        ("a\u200e", "character"),
        ("a\U000e0001", "character"),
        ("\u00ad", "character"),
        ("\u0627a\u0628", "right-to-left"),
        ("1\u0627", "right-to-left"),
    ],
)
def test_what_no_password_may_hold_is_refused(password: str, reason: str) -> None:
    with pytest.raises(AuthenticationError, match=reason):
        prepare_password(password)


# Tokens

TOKEN = Token(
    account="user@example.org",
    mechanism="HT-SHA-256-ENDP",
    secret="the token",
    expires=datetime(2026, 12, 1, tzinfo=UTC),
)


@pytest.mark.parametrize(
    ("offered", "end_point", "must_bind", "expected"),
    [
        ({"HT-SHA-256-NONE", "HT-SHA-256-ENDP", "HT-SHA-256-EXPR"}, True, False, "ENDP"),
        ({"HT-SHA-256-NONE", "HT-SHA-256-ENDP"}, False, False, "NONE"),
        ({"HT-SHA-256-NONE", "HT-SHA-256-EXPR"}, True, False, "NONE"),
        ({"HT-SHA-256-NONE"}, True, True, ""),
        ({"HT-SHA-256-EXPR", "HT-SHA-256-UNIQ"}, True, False, ""),
        (set(), True, False, ""),
    ],
)
def test_a_token_is_bound_to_the_channel_where_that_can_be(
    offered: set[str], *, end_point: bool, must_bind: bool, expected: str
) -> None:
    choice = choose_for_token(frozenset(offered), end_point=end_point, must_bind=must_bind)
    assert choice == (f"HT-SHA-256-{expected}" if expected else "")


def test_a_token_is_proved_by_its_hash_over_the_channel() -> None:
    """draft-schmaus-kitten-sasl-ht section 3; computed by other means."""
    hashed = HashedToken(TOKEN, "user", b"channel")
    name, _, proof = hashed.first().partition(b"\0")
    assert name == b"user"
    # printf 'Initiatorchannel' | openssl dgst -sha256 -hmac 'the token'
    assert proof.hex() == "558eaf1340d84272f00a4408bd2f9db42cc6d827ba72bc0eb00bf57a528e083f"
    hashed.finished(
        bytes.fromhex("ad54812bde7c02bc9c422e8a39e1f65a3613ca89e3b54f71fc99dfcbf15e54b6")
    )


@pytest.mark.parametrize("answer", [b"", b"x" * 32])
def test_who_does_not_know_the_token_is_an_impostor(answer: bytes) -> None:
    hashed = HashedToken(TOKEN, "user", b"")
    with pytest.raises(AuthenticationError, match="knows the token"):
        hashed.finished(answer)


def test_python_exports_no_keying_material_yet() -> None:
    """The day it does, tls-exporter belongs into `sasl.TOKEN_MECHANISMS` and `sasl.choose`."""
    assert "tls-exporter" not in ssl.CHANNEL_BINDING_TYPES
    assert not hasattr(ssl.SSLObject, "export_keying_material")
