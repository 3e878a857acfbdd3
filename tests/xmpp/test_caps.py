from __future__ import annotations

import base64
import hashlib
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.xmpp.caps import (
    MAX_NODE,
    MAX_VER,
    NODE,
    NS,
    C,
    Capabilities,
    Caps,
    make_caps,
    read_caps,
    verification,
)
from syncd.xmpp.disco import INFO, NS_INFO, Identity, make_info
from syncd.xmpp.xml import LANG, make

FEATURES = "".join(
    f"<feature var='http://jabber.org/protocol/{name}'/>"
    for name in ("caps", "disco#info", "disco#items", "muc")
)
PC = "<identity category='client' name='Exodus 0.9.1' type='pc'/>"
# XEP-0115 section 5.2.
SIMPLE = PC + FEATURES
SIMPLE_VER = "QgayPKawpkPSDYmwT/WM94uAlu0="
SIMPLE_CAPS = Caps("http://code.google.com/p/exodus", SIMPLE_VER, "sha-1")
# XEP-0115 section 5.3.
SOFTWARE = (
    "<field var='FORM_TYPE' type='hidden'>"
    "<value>urn:xmpp:dataforms:softwareinfo</value></field>"
)
COMPLEX = f"""
    <identity xml:lang='en' category='client' name='Psi 0.11' type='pc'/>
    <identity xml:lang='el' category='client' name='Ψ 0.11' type='pc'/>{FEATURES}
    <x xmlns='jabber:x:data' type='result'>
      <field var='ip_version' type='text-multi'><value>ipv6</value><value>ipv4</value></field>
      {SOFTWARE}
      <field var='software_version'><value>0.11</value></field>
      <field var='os'><value>Mac</value></field>
      <field var='os_version'><value>10.5.1</value></field>
      <field var='software'><value>Psi</value></field>
    </x>
"""
COMPLEX_VER = "q07IKJEyjvHSyhy//CH0CxmKi8w="


def query(children: str) -> Element:
    return fromstring(f"<query xmlns='{NS_INFO}'>{children}</query>")


def form(*fields: str) -> str:
    return f"<x xmlns='jabber:x:data' type='result'>{''.join(fields)}</x>"


def sha1(text: str) -> str:
    return base64.b64encode(hashlib.sha1(text.encode()).digest()).decode()


def learnt(children: str, text: str) -> int:
    """How many answers are remembered after this one, whose hash is that of the text."""
    known = Capabilities()
    known.answered(Caps("n", sha1(text), "sha-1"), query(children))
    return len(known)


def test_the_simple_example_of_the_xep() -> None:
    assert verification(query(SIMPLE)) == SIMPLE_VER


def test_the_complex_example_of_the_xep() -> None:
    assert verification(query(COMPLEX)) == COMPLEX_VER


def test_the_order_in_the_answer_does_not_count() -> None:
    children = list(query(COMPLEX))
    assert verification(make(INFO, None, *reversed(children))) == COMPLEX_VER


@given(
    st.sets(st.text("-/a", max_size=2), max_size=4),
    st.sets(st.tuples(*[st.text("-a", max_size=2)] * 4), max_size=4),
)
def test_any_answer_is_hashed_as_the_xep_says(
    features: set[str], identities: set[tuple[str, str, str, str]]
) -> None:
    told = [make(f"{{{NS_INFO}}}feature", {"var": feature}) for feature in features]
    told += [
        make(
            f"{{{NS_INFO}}}identity",
            dict(zip(("category", "type", LANG, "name"), identity, strict=True)),
        )
        for identity in identities
    ]
    text = "".join(f"{'/'.join(identity)}<" for identity in sorted(identities))
    text += "".join(f"{feature}<" for feature in sorted(features))
    assert verification(make(INFO, None, *told)) == sha1(text)


@pytest.mark.parametrize(
    ("algorithm", "name"), [("sha-1", "sha1"), ("sha-256", "sha256"), ("sha-512", "sha512")]
)
def test_the_hash_is_of_the_kind_that_the_presence_names(algorithm: str, name: str) -> None:
    digest = hashlib.new(name, b"client/pc//<urn:a<").digest()
    answer = make_info(Identity("client", "pc"), {"urn:a"})
    assert verification(answer, algorithm) == base64.b64encode(digest).decode()


@pytest.mark.parametrize("algorithm", ["md5", "SHA-1", "sha1", ""])
def test_no_other_kind_of_hash_is_known(algorithm: str) -> None:
    assert verification(query(SIMPLE), algorithm) is None


@pytest.mark.parametrize(
    "children",
    [
        PC + PC,
        "<feature var='urn:a'/>" * 2,
        form(SOFTWARE) * 2,
        form("<field var='FORM_TYPE' type='hidden'><value>a</value><value>b</value></field>"),
    ],
)
def test_an_ill_formed_answer_has_no_hash(children: str) -> None:
    """XEP-0115 section 5.4."""
    assert verification(query(children)) is None
    with pytest.raises(ValueError, match="twice"):
        make_caps(query(children))


@pytest.mark.parametrize(
    "ignored",
    [
        form("<field var='FORM_TYPE'><value>urn:a</value></field>"),
        form("<field var='FORM_TYPE' type='hidden'/>"),
        form("<field var='os'><value>Mac</value></field>"),
        form(),
        "<x xmlns='urn:b'/>",
    ],
)
def test_a_form_without_a_hidden_type_does_not_count(ignored: str) -> None:
    assert verification(query(SIMPLE + ignored)) == SIMPLE_VER


def test_the_same_type_twice_in_one_form_is_one_and_an_empty_value_is_empty() -> None:
    fields = SOFTWARE.replace(
        "<value>", "<value>urn:xmpp:dataforms:softwareinfo</value><value>"
    )
    text = "urn:xmpp:dataforms:softwareinfo<os<<"
    told = form(fields, "<field var='os'><value/></field>")
    assert verification(query(told)) == sha1(text)


def test_a_presence_tells_what_its_sender_can() -> None:
    answer = make_info(Identity("client", "bot", "syncd"), {"urn:a", NS})
    element = make_caps(answer)
    ver = sha1(f"client/bot//syncd<{NS}<urn:a<")
    assert element.attrib == {"hash": "sha-1", "node": NODE, "ver": ver}
    caps = read_caps(make("{jabber:client}presence", None, make("{urn:x}c"), element))
    assert caps == Caps(NODE, ver, "sha-1")
    assert caps.query_node == f"{NODE}#{ver}"


@pytest.mark.parametrize(
    "attributes",
    [
        None,
        {},
        {"node": "n", "ver": "v"},
        {"node": "n", "hash": "sha-1"},
        {"ver": "v", "hash": "sha-1"},
        {"node": "n", "ver": "v" * (MAX_VER + 1), "hash": "sha-1"},
        {"node": "n", "ver": "v", "hash": "h" * (MAX_VER + 1)},
        {"node": "n" * (MAX_NODE + 1), "ver": "v", "hash": "sha-1"},
    ],
)
def test_a_presence_that_tells_nothing_of_use(attributes: dict[str, str] | None) -> None:
    children = [] if attributes is None else [make(C, attributes)]
    assert read_caps(make("{jabber:client}presence", None, *children)) is None


def test_a_verified_answer_is_that_of_everybody_who_tells_the_same() -> None:
    known = Capabilities()
    assert known.get(SIMPLE_CAPS) is None
    info = known.answered(SIMPLE_CAPS, query(SIMPLE))
    assert "http://jabber.org/protocol/muc" in info.features
    assert known.get(Caps("another program", SIMPLE_VER, "sha-1")) == info
    assert known.get(Caps(SIMPLE_CAPS.node, SIMPLE_VER, "sha-256")) is None


@pytest.mark.parametrize(
    ("caps", "children"),
    [
        (SIMPLE_CAPS, SIMPLE + "<feature var='urn:forged'/>"),
        (SIMPLE_CAPS, SIMPLE + PC),
        (Caps("n", SIMPLE_VER, "md5"), SIMPLE),
        (None, SIMPLE),
    ],
)
def test_an_answer_that_was_not_promised_is_only_that_of_its_sender(
    caps: Caps | None, children: str
) -> None:
    known = Capabilities()
    info = known.answered(caps, query(children))
    assert "http://jabber.org/protocol/muc" in info.features
    assert len(known) == 0


def test_no_answer_tells_nothing() -> None:
    known = Capabilities()
    assert known.answered(SIMPLE_CAPS, None).features == frozenset()
    assert len(known) == 0


# What an honest client hashes.
TEXT = "client/pc//X<http://jabber.org/protocol/si<urn:a<urn:b<"
HONEST = (
    "<identity category='client' type='pc' name='X'/>"
    "<feature var='http://jabber.org/protocol/si'/><feature var='urn:a'/><feature var='urn:b'/>"
)


@pytest.mark.parametrize(
    "children",
    [
        # Two features as one.
        HONEST.replace("urn:a'/><feature var='", "urn:a&lt;"),
        # The last feature as a form.
        HONEST.replace("<feature var='urn:b'/>", "")
        + form("<field var='FORM_TYPE' type='hidden'><value>urn:b</value></field>"),
        # The last two as a form with a field.
        HONEST.replace("<feature var='urn:a'/><feature var='urn:b'/>", "")
        + form(
            "<field var='FORM_TYPE' type='hidden'><value>urn:a</value></field>",
            "<field var='urn:b'/>",
        ),
        # The first one as an identity.
        HONEST.replace(
            "<feature var='http://jabber.org/protocol/si'/>",
            "<identity category='http:/' type='jabber.org' xml:lang='protocol' name='si'/>",
        ),
        HONEST.replace(
            "<feature var='http://jabber.org/protocol/si'/>",
            "<identity category='http:' type='' xml:lang='jabber.org' name='protocol/si'/>",
        ),
    ],
)
def test_an_answer_that_hides_features_in_the_same_hash_poisons_nobody(children: str) -> None:
    """XEP-0115 section 9.3: the hashed text is the same, but what it tells is less."""
    assert verification(query(HONEST)) == sha1(TEXT)
    assert verification(query(children)) == sha1(TEXT)
    assert learnt(HONEST, TEXT) == 1
    assert learnt(children, TEXT) == 0


def test_an_ordinary_form_is_remembered_and_one_of_nothing_else_is_not() -> None:
    told = HONEST + form(
        "<field var='FORM_TYPE' type='hidden'><value>urn:aa</value></field>",
        "<field var='os'><value>Mac</value></field>",
    )
    assert learnt(told, TEXT + "urn:aa<os<Mac<") == 1
    alone = form("<field var='FORM_TYPE' type='hidden'><value>urn:a</value></field>")
    assert learnt(alone, "urn:a<") == 0


def test_only_the_answers_used_last_are_remembered() -> None:
    known = Capabilities(size=2)
    kinds = []
    for name in "abc":
        answer = make_info(Identity("client", "pc", name), {"urn:a"})
        kinds.append(read_caps(make("p", None, make_caps(answer))))
        assert kinds[-1] is not None
        known.answered(kinds[-1], answer)
        assert kinds[0] is not None
        assert known.get(kinds[0]) is not None
    assert [caps is not None and known.get(caps) is not None for caps in kinds] == [
        True,
        False,
        True,
    ]
    assert len(known) == 2
