from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.xmpp.jid import JID, MAX_JID, MAX_PART


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("example.org", ("", "example.org", "")),
        ("alice@example.org", ("alice", "example.org", "")),
        ("alice@example.org/laptop", ("alice", "example.org", "laptop")),
        ("example.org/laptop", ("", "example.org", "laptop")),
        # RFC 7622 section 3.2: the first slash ends the domain, whatever follows.
        ("example.org/a@b/c", ("", "example.org", "a@b/c")),
        ("alice@example.org/a@b/c", ("alice", "example.org", "a@b/c")),
        # RFC 7622 section 3.5, the table of valid addresses.
        ("juliet@example.com/foo bar", ("juliet", "example.com", "foo bar")),
        ("juliet@example.com/foo@bar", ("juliet", "example.com", "foo@bar")),
        ("foo\\20bar@example.com", ("foo\\20bar", "example.com", "")),
        ("fussball@example.com", ("fussball", "example.com", "")),
        ("fu\xdfball@example.com", ("fu\xdfball", "example.com", "")),
        ("\u03c0@example.com", ("\u03c0", "example.com", "")),
        ("\u03a3@example.com/foo", ("\u03c3", "example.com", "foo")),
        ("king@example.com/\u265a", ("king", "example.com", "\u265a")),
        ("a.example.com/b@example.net", ("", "a.example.com", "b@example.net")),
        # The hosts that tests and home networks have.
        ("alice@localhost", ("alice", "localhost", "")),
        ("alice@127.0.0.1", ("alice", "127.0.0.1", "")),
        ("alice@[::1]/x", ("alice", "[::1]", "x")),
        ("proxy.my_host.lan", ("", "proxy.my_host.lan", "")),
    ],
)
def test_an_address_has_three_parts(text: str, parts: tuple[str, str, str]) -> None:
    jid = JID.parse(text)
    assert (jid.local, jid.domain, jid.resource) == parts


@pytest.mark.parametrize(
    ("written", "prepared"),
    [
        ("Alice@Example.ORG/Laptop", "alice@example.org/Laptop"),  # a resource keeps its case
        ("alice@example.org.", "alice@example.org"),
        ("\xc9va@example.org", "\xe9va@example.org"),
        ("e\u0301va@example.org", "\xe9va@example.org"),  # NFC
        ("\uff41lice@example.org", "alice@example.org"),  # fullwidth
        ("alice@example.org/a\xa0b", "alice@example.org/a b"),  # OpaqueString: one space
        ("alice@M\xdcNCHEN.de", "alice@m\xfcnchen.de"),
        ("alice@xn--mnchen-3ya.de", "alice@m\xfcnchen.de"),
        ("alice@XN--MNCHEN-3YA.de.", "alice@m\xfcnchen.de"),
        ("alice@a\u3002example", "alice@a.example"),
        ("alice@[0:0::0001]", "alice@[::1]"),
        ("alice@[2001:DB8::A]", "alice@[2001:db8::a]"),
    ],
)
def test_writings_of_one_address_are_equal(written: str, prepared: str) -> None:
    assert JID.parse(written) == JID.parse(prepared)
    assert str(JID.parse(written)) == prepared


def test_a_sharp_s_does_not_lead_to_another_domain() -> None:
    """IDNA 2003, which Python has built in, made strasse.de of it: somebody else's."""
    assert JID.parse("alice@stra\xdfe.de").domain == "stra\xdfe.de"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not a domain name"),
        ("/x", "'' is not a domain name"),
        ("alice@", "'' is not a domain name"),
        ("@example.org", "'@example.org' has nothing before the @"),
        ("alice@example.org/", "'alice@example.org/' ends in a slash: the resource is missing"),
        ("a@b@c", "'b@c' is not a domain name"),
        ("a b@example.org", "a space is not allowed before the @"),
        ("a\x00@example.org", "control characters are not allowed in an address"),
        ("a@example.org/x\n", "control characters are not allowed in an address"),
        ("a@example.org/x\x7f", "control characters are not allowed in an address"),
        ('"a&b"@example.org', 'the part before the @ may not contain " &'),
        ("a@exam ple.org", "'exam ple.org' is not a domain name"),
        ("a@example.org ", "'example.org ' is not a domain name"),
        ("a@example..org", "'example..org' is not a domain name"),
        ("a@example.org..", "'example.org..' is not a domain name"),
        ("a@.", "'.' is not a domain name"),
        ("a@b'c", '"b\'c" is not a domain name'),
        ("a@" + "b" * 64, f"'{'b' * 64}' is not a domain name"),
        ("a@[::1", "'[::1' is not an IPv6 address in brackets"),
        ("a@[nonsense]", "'[nonsense]' is not an IPv6 address in brackets"),
        ("a@[fe80::1%eth0]", "'[fe80::1%eth0]' is not an IPv6 address in brackets"),
        ("a@example.org:5222", "'example.org:5222' is not a domain name"),
        ("a" * (MAX_PART + 1) + "@b", "the part before the @ must have 1 to 1023 bytes"),
        ("a@" + ".".join(["b" * 60] * 17), "the domain must have 1 to 1023 bytes"),
        ("a@b/" + "\xe9" * 512, "the resource must have 1 to 1023 bytes"),
        ("a" * (MAX_JID + 1), "an address has at most 3071 bytes, this has 3072"),
    ],
)
def test_a_bad_address_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(why)}$"):
        JID.parse(text)


@pytest.mark.parametrize("mark", "\"&'/:<>@")
def test_a_fullwidth_mark_does_not_smuggle_in_the_real_one(mark: str) -> None:
    """The preparation maps U+FF20 to @: printed and read again it would be somebody else."""
    fullwidth = chr(ord(mark) + 0xFEE0)
    with pytest.raises(ValueError, match=rf"^the part before the @ may not contain {mark}$"):
        JID.parse(f"admin{fullwidth}evil.example@example.org")


@pytest.mark.parametrize(
    "text",
    [
        "henry\u2163@example.com",  # RFC 7622 section 3.5: a compatibility character
        "\u265a@example.com",  # a symbol before the @
        "a@b/\u2028",
        "\ud800@example.org",
        "a@\ud800.org",
        "a@\u2603.org",  # a symbol in a U-label
        "a@xn--.org",
        "a@xn--n3h.org",
        "a@x\uff20y.org",
    ],
)
def test_what_precis_or_idna_forbid_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not (allowed in an address|a domain name): "):
        JID.parse(text)


def test_the_bare_address_has_no_resource() -> None:
    jid = JID.parse("alice@example.org/laptop")
    assert jid.bare == JID.parse("alice@example.org")
    assert jid.bare.bare == jid.bare


def test_another_resource_of_the_same_account() -> None:
    jid = JID.parse("alice@example.org/laptop")
    assert jid.with_resource("a\xa0b") == JID.parse("alice@example.org/a b")
    with pytest.raises(ValueError, match="the resource must have 1 to 1023 bytes"):
        jid.with_resource("")


@given(st.text(max_size=40) | st.from_regex(r"\A[^@/]{1,9}@[^@/]{1,9}(/.{1,9})?\Z"))
def test_a_prepared_address_is_stable(text: str) -> None:
    """Printing and reading again changes nothing, so that peers and journal agree."""
    try:
        jid = JID.parse(text)
    except ValueError:
        return
    assert JID.parse(str(jid)) == jid
