"""A login from the server's features to its success, by SASL and by SASL2."""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest

from syncd.errors import AuthenticationError, OfflineError, RemoteProtocolError
from syncd.xmpp import sasl, sm
from syncd.xmpp.jid import JID
from syncd.xmpp.login import (
    AUTHENTICATE,
    NS_BIND2,
    NS_FAST,
    NS_SASL,
    NS_SASL2,
    RESPONSE,
    Credentials,
    Inline,
    Login,
    make_authenticate,
    read_failure,
    read_inline,
    read_offered,
    read_success,
    read_token,
)
from syncd.xmpp.sm import StreamManagement
from syncd.xmpp.xml import serialise

ACCOUNT = JID.parse("user@example.org")
AGENT = "d4565fa7-4d72-4749-b3d3-740edbf87770"
NONCE = "fyko+d2lbbFgONRv9qkxdawL"
OLD = f"<mechanisms xmlns='{NS_SASL}'><mechanism>SCRAM-SHA-1</mechanism></mechanisms>"
PLAIN = OLD.replace("SCRAM-SHA-1", "PLAIN")
NEW = (
    f"<authentication xmlns='{NS_SASL2}'><mechanism>SCRAM-SHA-256</mechanism>"
    "<inline><bind xmlns='urn:xmpp:bind:0'/></inline></authentication>"
)


def login(offered: str, *, agent: str = "", allow_plain: bool = False) -> Login:
    credentials = Credentials(
        password="pencil", nonce=NONCE, allow_plain=allow_plain, agent=agent
    )
    features = fromstring(f"<features>{offered}</features>")
    return Login(ACCOUNT, credentials, features, None)


def said(ns: str, name: str, text: bytes) -> Element:
    return fromstring(f"<{name} xmlns='{ns}'>{base64.b64encode(text).decode()}</{name}>")


# RFC 5802 section 5.
CHALLENGE = f"r={NONCE}3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096".encode()
PROOF = b"c=biws,r=fyko+d2lbbFgONRv9qkxdawL3rfcNHYJY1ZVvWVs7j,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts="
VERIFIER = b"v=rmF9pqV8S7suAoZWja4dJRkFsKQ="


def prove(one: Login, ns: str) -> Element:
    """Go as far as the proof."""
    wanted = one.challenged(said(ns, "challenge", CHALLENGE))
    assert isinstance(wanted, sasl.KeyWanted)
    response = one.key_derived(wanted.derive("pencil"))
    assert response is not None
    return response


def test_a_login_by_the_rfc() -> None:
    one = login(OLD, agent=AGENT)
    first = one.begin(None)
    assert (first.tag, first.get("mechanism")) == (f"{{{NS_SASL}}}auth", "SCRAM-SHA-1")
    assert base64.b64decode(first.text or "") == f"n,,n=user,r={NONCE}".encode()
    response = prove(one, NS_SASL)
    assert response.tag == f"{{{NS_SASL}}}response"
    assert base64.b64decode(response.text or "") == PROOF
    assert one.succeeded(said(NS_SASL, "success", VERIFIER)) is None


def test_the_last_words_may_come_as_a_challenge() -> None:
    one = login(OLD)
    prove(one, NS_SASL)
    empty = one.challenged(said(NS_SASL, "challenge", VERIFIER))
    assert isinstance(empty, Element)
    assert empty.text == "="
    assert one.succeeded(fromstring(f"<success xmlns='{NS_SASL}'/>")) is None


def test_a_login_that_binds_inside() -> None:
    one = login(OLD + NEW, agent=AGENT)
    assert one.mechanism == "SCRAM-SHA-256"
    first = one.begin(None)
    assert first.tag == AUTHENTICATE
    wanted = one.challenged(said(NS_SASL2, "challenge", CHALLENGE))
    assert isinstance(wanted, sasl.KeyWanted)
    key = wanted.derive("pencil")
    response = one.key_derived(key)
    assert response is not None
    assert response.tag == RESPONSE
    proof = base64.b64decode(response.text or "")
    auth = b",".join((f"n=user,r={NONCE}".encode(), CHALLENGE, proof.rpartition(b",p=")[0]))
    server_key = hmac.digest(key, b"Server Key", hashlib.sha256)
    verifier = base64.b64encode(hmac.digest(server_key, auth, hashlib.sha256))
    success = one.succeeded(
        fromstring(
            f"<success xmlns='{NS_SASL2}'>"
            f"<additional-data>{base64.b64encode(b'v=' + verifier).decode()}</additional-data>"
            "<authorization-identifier>user@example.org/x</authorization-identifier>"
            "<bound xmlns='urn:xmpp:bind:0'/></success>"
        )
    )
    assert success is not None
    assert (success.bound, success.jid.resource) == (True, "x")


def test_without_an_agent_the_old_way_is_taken() -> None:
    assert login(OLD + NEW).mechanism == "SCRAM-SHA-1"


@pytest.mark.parametrize(
    ("offered", "success"),
    [
        (OLD, f"<success xmlns='{NS_SASL2}'/>"),
        (NEW, f"<success xmlns='{NS_SASL}'/>"),
    ],
)
def test_the_other_protocols_success_is_none(offered: str, success: str) -> None:
    one = login(offered, agent=AGENT)
    with pytest.raises(RemoteProtocolError, match="another protocol"):
        one.succeeded(fromstring(success))


@pytest.mark.parametrize("ns", [NS_SASL, NS_SASL2])
def test_who_proves_nothing_is_an_impostor(ns: str) -> None:
    one = login(OLD if ns == NS_SASL else NEW, agent=AGENT)
    text = "<authorization-identifier>user@example.org</authorization-identifier>"
    with pytest.raises(AuthenticationError, match="could not prove"):
        one.succeeded(
            fromstring(f"<success xmlns='{ns}'>{text if ns != NS_SASL else ''}</success>")
        )


def test_plain_needs_no_proof_and_takes_no_challenge() -> None:
    one = login(PLAIN, allow_plain=True)
    assert base64.b64decode(one.begin(None).text or "") == b"\0user\0pencil"
    assert one.key_derived(b"a key that nobody wanted") is None
    with pytest.raises(RemoteProtocolError, match="out of turn"):
        one.challenged(said(NS_SASL, "challenge", CHALLENGE))
    assert one.succeeded(fromstring(f"<success xmlns='{NS_SASL}'/>")) is None


def test_a_proof_is_given_once() -> None:
    one = login(OLD)
    prove(one, NS_SASL)
    assert one.key_derived(b"another") is None


@pytest.mark.parametrize(
    ("children", "expected"),
    [
        (f"<not-authorized xmlns='{NS_SASL}'/><text>no</text>", "[not-authorized]: no"),
        (f"<account-disabled xmlns='{NS_SASL}'/>", "[account-disabled]"),
        ("", "[not-authorized]"),
    ],
)
def test_a_refusal_says_why(children: str, expected: str) -> None:
    for ns in (NS_SASL, NS_SASL2):
        error = read_failure(fromstring(f"<failure xmlns='{ns}'>{children}</failure>"), ACCOUNT)
        assert isinstance(error, AuthenticationError)
        assert str(error).endswith(f"the login of user@example.org {expected}")


@pytest.mark.parametrize(
    ("offered", "bound"),
    [(OLD, False), (OLD.replace("SCRAM-SHA-1", "SCRAM-SHA-1-PLUS"), True)],
)
def test_where_the_proof_covers_the_certificate_a_refusal_may_be_about_that(
    offered: str, bound: bool
) -> None:
    """As behind a proxy that starts TLS anew, with a certificate of its own."""
    features = fromstring(f"<features>{BINDING if bound else ''}{offered}</features>")
    credentials = Credentials(password="pencil", nonce=NONCE)
    one = Login(ACCOUNT, credentials, features, CERTIFICATE)
    assert one.mechanism == ("SCRAM-SHA-1-PLUS" if bound else "SCRAM-SHA-1")
    with pytest.raises(AuthenticationError) as caught:
        one.refused(fromstring(f"<failure xmlns='{NS_SASL}'><not-authorized/></failure>"))
    assert caught.value.hint.startswith("check account.jid and the password")
    assert ("another certificate" in caught.value.hint) is bound


def test_what_the_user_should_know_of_the_choice_is_handed_on() -> None:
    other = BINDING.replace("tls-server-end-point", "tls-exporter")
    assert "tls-exporter" in fast(other + PLUS).caveat
    assert fast(BINDING + PLUS).caveat == ""


def test_a_server_that_cannot_just_now_is_asked_again() -> None:
    text = f"<failure xmlns='{NS_SASL}'><temporary-auth-failure/></failure>"
    assert isinstance(read_failure(fromstring(text), ACCOUNT), OfflineError)


def test_bindings_are_read_where_they_are_listed() -> None:
    listed = (
        "<sasl-channel-binding xmlns='urn:xmpp:sasl-cb:0'>"
        "<channel-binding type='tls-exporter'/></sasl-channel-binding>"
    )
    features = fromstring(f"<features>{listed}{OLD}</features>")
    assert read_offered(features) == sasl.Offered(
        mechanisms=frozenset({"SCRAM-SHA-1"}), bindings=frozenset({"tls-exporter"})
    )


def test_credentials_never_show_themselves() -> None:
    assert "pencil" not in repr(Credentials(password="pencil", nonce=NONCE))


# What SASL2 carries

# XEP-0386 section 3.1, and XEP-0388 section 2.1.
FEATURES = """
<features xmlns='http://etherx.jabber.org/streams'>
  <authentication xmlns='urn:xmpp:sasl:2'>
    <mechanism>SCRAM-SHA-1</mechanism>
    <mechanism>SCRAM-SHA-1-PLUS</mechanism>
    <inline>
      <bind xmlns='urn:xmpp:bind:0'>
        <inline>
          <feature var='urn:xmpp:carbons:2'/>
          <feature var='urn:xmpp:sm:3'/>
        </inline>
      </bind>
      <sm xmlns='urn:xmpp:sm:3'/>
    </inline>
  </authentication>
</features>
"""


def test_what_the_server_takes_inside_the_login() -> None:
    assert read_inline(fromstring(FEATURES)) == Inline(
        mechanisms=frozenset({"SCRAM-SHA-1", "SCRAM-SHA-1-PLUS"}),
        bind=True,
        enable=True,
        resume=True,
    )


def test_a_server_may_take_nothing_inside() -> None:
    text = (
        "<features xmlns='http://etherx.jabber.org/streams'>"
        "<authentication xmlns='urn:xmpp:sasl:2'><mechanism>PLAIN</mechanism></authentication>"
        "</features>"
    )
    assert read_inline(fromstring(text)) == Inline(
        mechanisms=frozenset({"PLAIN"}), bind=False, enable=False, resume=False
    )


def test_a_server_without_sasl2_offers_nothing() -> None:
    assert (
        read_inline(fromstring("<features xmlns='http://etherx.jabber.org/streams'/>")) is None
    )


def test_the_login_carries_bind_and_resumption() -> None:
    former = StreamManagement(JID.parse("user@example.org/old"))
    former.id = "previous"
    element = make_authenticate(
        "SCRAM-SHA-1", b"n,,n=user", agent=AGENT, bind=True, enable=True, resume=former
    )
    assert (
        serialise(element)
        == (
            f"<authenticate xmlns='{NS_SASL2}' mechanism='SCRAM-SHA-1'>"
            "<initial-response>biwsbj11c2Vy</initial-response>"
            f"<user-agent id='{AGENT}'><software>syncd</software></user-agent>"
            f"<resume xmlns='{sm.NS}' h='0' previd='previous'/>"
            f"<bind xmlns='{NS_BIND2}'><tag>syncd</tag>"
            f"<enable xmlns='{sm.NS}' resume='true'/></bind></authenticate>"
        ).encode()
    )


def test_the_login_carries_only_what_was_offered() -> None:
    element = make_authenticate(
        "PLAIN", b"x", agent=AGENT, bind=False, enable=True, resume=None
    )
    assert element.tag == AUTHENTICATE
    assert [child.tag for child in element] == [
        f"{{{NS_SASL2}}}initial-response",
        f"{{{NS_SASL2}}}user-agent",
    ]
    bare = make_authenticate("PLAIN", b"x", agent=AGENT, bind=True, enable=False, resume=None)
    (bind,) = bare.iterfind(f"{{{NS_BIND2}}}bind")
    assert [child.tag for child in bind] == [f"{{{NS_BIND2}}}tag"]


def test_a_success_with_a_bound_resource() -> None:
    success = read_success(
        fromstring(
            f"<success xmlns='{NS_SASL2}'><additional-data>dj1tc1ZI</additional-data>"
            "<authorization-identifier>user@example.org/syncd.4232</authorization-identifier>"
            f"<bound xmlns='{NS_BIND2}'><enabled xmlns='{sm.NS}' id='x'/></bound></success>"
        ),
        ACCOUNT,
    )
    assert (success.data, success.bound, success.resumed) == (b"v=msVH", True, None)
    assert success.jid == JID.parse("user@example.org/syncd.4232")
    assert success.enabled is not None
    assert success.enabled.get("id") == "x"


def test_a_success_with_a_resumed_session() -> None:
    success = read_success(
        fromstring(
            f"<success xmlns='{NS_SASL2}'>"
            "<authorization-identifier>user@example.org</authorization-identifier>"
            f"<resumed xmlns='{sm.NS}' h='345' previd='124'/></success>"
        ),
        ACCOUNT,
    )
    assert (success.data, success.jid, success.bound, success.enabled) == (
        b"", ACCOUNT, False, None,
    )  # fmt: skip
    assert success.resumed is not None
    assert success.resumed.get("h") == "345"


@pytest.mark.parametrize(
    ("identifier", "bound"),
    [
        ("", ""),
        ("no jid at all@", ""),
        ("mallory@example.org", ""),
        ("user@example.net", ""),
        ("user@example.org", f"<bound xmlns='{NS_BIND2}'/>"),
    ],
)
def test_a_success_for_somebody_else_is_none(identifier: str, bound: str) -> None:
    text = (
        f"<success xmlns='{NS_SASL2}'>"
        f"<authorization-identifier>{identifier}</authorization-identifier>{bound}</success>"
    )
    with pytest.raises(RemoteProtocolError):
        read_success(fromstring(text), ACCOUNT)


def test_last_words_that_are_no_base64_are_refused() -> None:
    text = (
        f"<success xmlns='{NS_SASL2}'><additional-data>é</additional-data>"
        "<authorization-identifier>user@example.org</authorization-identifier></success>"
    )
    with pytest.raises(AuthenticationError):
        read_success(fromstring(text), ACCOUNT)


# FAST (XEP-0484)

FAST = (
    f"<authentication xmlns='{NS_SASL2}'>%s<inline><bind xmlns='urn:xmpp:bind:0'/>"
    f"<sm xmlns='{sm.NS}'/><fast xmlns='{NS_FAST}'>"
    "<mechanism>HT-SHA-256-NONE</mechanism><mechanism>HT-SHA-256-ENDP</mechanism>"
    "</fast></inline></authentication>"
)
SHA_1 = FAST % "<mechanism>SCRAM-SHA-1</mechanism>"
BINDING = (
    "<sasl-channel-binding xmlns='urn:xmpp:sasl-cb:0'>"
    "<channel-binding type='tls-server-end-point'/></sasl-channel-binding>"
)
PLUS = FAST % "<mechanism>SCRAM-SHA-1-PLUS</mechanism><mechanism>SCRAM-SHA-1</mechanism>"
EXPIRY = "2026-12-01T00:00:00Z"
ENDP, NONE = (
    sasl.Token(
        account="user@example.org",
        mechanism=f"HT-SHA-256-{suffix}",
        secret="s3cret",
        expires=datetime(2026, 12, 1, tzinfo=UTC),
    )
    for suffix in ("ENDP", "NONE")
)
CERTIFICATE = b"hash of the certificate"


def fast(
    offered: str,
    token: sasl.Token | None = None,
    *,
    end_point: bytes | None = CERTIFICATE,
    least: str = "",
    keeps: bool = True,
) -> Login:
    credentials = Credentials(
        password="pencil", nonce=NONCE, least=least, agent=AGENT, keeps_token=keeps, token=token
    )
    return Login(ACCOUNT, credentials, fromstring(f"<f>{offered}</f>"), end_point)


def wanted(one: Login) -> str | None:
    """For which mechanism a token is asked, if one is."""
    request = one.begin(None).find(f"{{{NS_FAST}}}request-token")
    return None if request is None else request.get("mechanism")


def failure(condition: str) -> Element:
    return fromstring(f"<failure xmlns='{NS_SASL2}'><{condition} xmlns='{NS_SASL}'/></failure>")


def let_in(token: sasl.Token, binding: bytes, inside: str = "") -> Element:
    """The success of a server that knows the token."""
    proof = hmac.digest(token.secret.encode(), b"Responder" + binding, "sha256")
    return fromstring(
        f"<success xmlns='{NS_SASL2}'>"
        f"<additional-data>{base64.b64encode(proof).decode()}</additional-data>"
        f"<authorization-identifier>{ACCOUNT}/x</authorization-identifier>"
        f"<bound xmlns='{NS_BIND2}'/>{inside}</success>"
    )


@pytest.mark.parametrize(
    ("offered", "options", "expected"),
    [
        (SHA_1, {}, "HT-SHA-256-ENDP"),
        (BINDING + PLUS, {}, "HT-SHA-256-ENDP"),
        (SHA_1, {"end_point": None}, "HT-SHA-256-NONE"),
        (BINDING + PLUS.replace("ENDP", "EXPR"), {}, None),
        (SHA_1.replace("ENDP", "EXPR"), {}, "HT-SHA-256-NONE"),
        (SHA_1, {"keeps": False}, None),
        (NEW, {}, None),
        (OLD, {}, None),
    ],
)
def test_a_token_is_asked_for_the_best_use(
    offered: str, options: dict[str, Any], expected: str | None
) -> None:
    assert wanted(fast(offered, **options)) == expected


def test_a_token_logs_in_with_one_message() -> None:
    one = fast(SHA_1, ENDP)
    assert one.mechanism == "HT-SHA-256-ENDP"
    first = one.begin(None)
    assert serialise(first).decode().endswith(f"<fast xmlns='{NS_FAST}'/></authenticate>")
    proof = hmac.digest(b"s3cret", b"Initiator" + CERTIFICATE, "sha256")
    sent = first.findtext(f"{{{NS_SASL2}}}initial-response") or ""
    assert base64.b64decode(sent) == b"user\0" + proof
    success = one.succeeded(let_in(ENDP, CERTIFICATE))
    assert success is not None
    assert success.bound
    assert one.token == ENDP


def test_a_token_without_binding_is_proved_without() -> None:
    one = fast(SHA_1, NONE, end_point=None)
    assert one.mechanism == "HT-SHA-256-NONE"
    assert one.succeeded(let_in(NONE, b"")) is not None


def test_a_token_takes_no_challenge_and_no_key() -> None:
    one = fast(SHA_1, ENDP)
    with pytest.raises(RemoteProtocolError, match="out of turn"):
        one.challenged(said(NS_SASL2, "challenge", CHALLENGE))
    assert one.key_derived(b"key") is None


@pytest.mark.parametrize(
    ("offered", "token", "least"),
    [
        (SHA_1, NONE, ""),  # a better use is offered now
        (SHA_1.replace("ENDP", "EXPR"), ENDP, ""),  # its own use is not
        (SHA_1.replace("NONE", "ELSE").replace("ENDP", "NONE"), ENDP, ""),
        (NEW, ENDP, ""),
        (OLD, ENDP, ""),
    ],
)
def test_a_token_that_does_not_fit_waits(offered: str, token: sasl.Token, least: str) -> None:
    one = fast(offered, token, least=least)
    assert one.mechanism.startswith("SCRAM")
    assert one.token == token


def test_a_token_is_no_way_around_a_weakened_offer() -> None:
    with pytest.raises(AuthenticationError, match="before"):
        fast(SHA_1, ENDP, least="SCRAM-SHA-256")


def test_a_new_token_takes_the_place_of_the_old() -> None:
    one = fast(SHA_1, ENDP)
    inside = f"<token xmlns='{NS_FAST}' token='another' expiry='{EXPIRY}'/>"
    one.succeeded(let_in(ENDP, CERTIFICATE, inside))
    assert one.token == replace(ENDP, secret="another")


def test_an_impostor_gives_no_token() -> None:
    one = fast(SHA_1, ENDP)
    inside = f"<token xmlns='{NS_FAST}' token='another' expiry='{EXPIRY}'/>"
    with pytest.raises(AuthenticationError, match="knows the token"):
        one.succeeded(let_in(ENDP, b"another certificate", inside))
    assert one.token == ENDP


@pytest.mark.parametrize(
    ("condition", "again"),
    [
        ("credentials-expired", "HT-SHA-256-ENDP"),
        ("not-authorized", None),
        ("invalid-mechanism", None),
    ],
)
def test_a_token_that_is_refused_gives_way_to_the_password(
    condition: str, again: str | None
) -> None:
    former = StreamManagement(JID.parse("user@example.org/old"))
    former.id = "previous"
    one = fast(SHA_1, ENDP)
    one.begin(former)
    second = one.refused(failure(condition))
    assert (second.tag, second.get("mechanism")) == (AUTHENTICATE, "SCRAM-SHA-1")
    assert second.find(f"{{{sm.NS}}}resume") is not None
    request = second.find(f"{{{NS_FAST}}}request-token")
    assert (None if request is None else request.get("mechanism")) == again
    assert one.token is None
    assert one.mechanism == "SCRAM-SHA-1"
    with pytest.raises(AuthenticationError, match="not-authorized"):
        one.refused(failure("not-authorized"))


def test_a_server_in_trouble_takes_no_token_away() -> None:
    one = fast(SHA_1, ENDP)
    with pytest.raises(OfflineError):
        one.refused(failure("temporary-auth-failure"))
    assert one.token == ENDP


@pytest.mark.parametrize(
    "attributes",
    [
        f"token='' expiry='{EXPIRY}'",
        f"token='{'x' * 4_097}' expiry='{EXPIRY}'",
        f"expiry='{EXPIRY}'",
        "token='x'",
        "token='x' expiry='soon'",
        "token='x' expiry='2026-12-01T00:00:00'",
    ],
)
def test_a_token_that_cannot_be_used_is_none(attributes: str) -> None:
    success = fromstring(f"<success><token xmlns='{NS_FAST}' {attributes}/></success>")
    assert read_token(success, ACCOUNT, "HT-SHA-256-ENDP") is None


def test_a_session_that_is_resumed_behind_the_login_is_not_replaced_in_it() -> None:
    former = StreamManagement(JID.parse("user@example.org/old"))
    first = fast(NEW).begin(former)
    assert first.find(f"{{{sm.NS}}}resume") is None
    assert first.find(f"{{{NS_BIND2}}}bind") is None


# Somebody between


def test_sasl2_does_not_vanish_unnoticed() -> None:
    credentials = Credentials(password="pencil", nonce=NONCE, agent=AGENT, sasl2=True)
    with pytest.raises(AuthenticationError, match="SASL2") as caught:
        Login(ACCOUNT, credentials, fromstring(f"<f>{OLD}</f>"), None)
    assert "delete the file login" in caught.value.hint
    old = replace(credentials, agent="")  # the user wants it so
    assert Login(ACCOUNT, old, fromstring(f"<f>{OLD}</f>"), None).inline is None


def test_with_sasl2_the_list_of_bindings_does_not_vanish_unnoticed() -> None:
    with pytest.raises(AuthenticationError, match="not for which channel"):
        fast(PLUS)
