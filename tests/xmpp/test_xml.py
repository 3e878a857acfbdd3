from __future__ import annotations

import xml.parsers.expat
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given

from syncd.xmpp.xml import (
    _SLICE,
    LANG,
    MAX_ATTRIBUTES,
    MAX_DEPTH,
    MAX_ELEMENTS,
    MAX_NAME,
    MAX_NAMES,
    MAX_STANZA,
    NS_CLIENT,
    NS_STREAMS,
    Closed,
    Malformed,
    Opened,
    StreamParser,
    is_writable,
    local_name,
    make,
    namespace,
    serialise,
)
from tests.support.strategies import cuts, elements, xml_texts
from tests.support.wire import cut, tree

OPEN = f"<stream:stream xmlns='{NS_CLIENT}' xmlns:stream='{NS_STREAMS}' version='1.0'>"
IQ = f"{{{NS_CLIENT}}}iq"
HEADER = f"<?xml version='1.0'?>{OPEN}"
OPENED = Opened({"version": "1.0"})

# One stream with everything that matters to a cut: a declaration, keep-alives, ">" inside
# attributes and text, CDATA, characters of two to four bytes, references, the footer.
CONVERSATION = (
    f"<?xml version='1.0' encoding='utf-8'?>\n{OPEN} \n"
    "<iq type='get' id='a>  b' xml:lang='de'>"
    "<query xmlns='urn:a' ><![CDATA[<x> ]]></query></iq>  <presence/>\n"
    "<message to = 'b@c'  ><body>\u00e4\u5b57\U0001f600 &lt;>&#x20AC;</body></message>"
    "\t</stream:stream >"
).encode()


def parser(**limits: int) -> StreamParser:
    """A parser behind its header."""
    new = StreamParser(**limits)
    assert new.feed(HEADER.encode()) == [OPENED]
    return new


def shapes(events: list[Opened | Element | Closed | Malformed]) -> list[object]:
    """Events that compare by value."""
    return [tree(event) if isinstance(event, Element) else event for event in events]


def conditions(events: list[Opened | Element | Closed | Malformed]) -> list[object]:
    """Events by kind, malformed ones by their condition."""
    return [e.condition if isinstance(e, Malformed) else type(e).__name__ for e in events]


def test_a_stream_is_its_header_its_elements_and_its_footer() -> None:
    assert shapes(StreamParser().feed(CONVERSATION)) == [
        OPENED,
        (
            "{jabber:client}iq",
            {"type": "get", "id": "a>  b", LANG: "de"},
            "",
            ((("{urn:a}query", {}, "<x> ", ()), ""),),
        ),
        ("{jabber:client}presence", {}, "", ()),
        (
            "{jabber:client}message",
            {"to": "b@c"},
            "",
            ((("{jabber:client}body", {}, "\u00e4\u5b57\U0001f600 <>\u20ac", ()), ""),),
        ),
        Closed(),
    ]


@given(cuts)
def test_no_cut_of_the_bytes_changes_what_they_mean(sizes: list[int]) -> None:
    whole = shapes(StreamParser().feed(CONVERSATION))
    cutting = StreamParser()
    assert shapes([e for data in cut(CONVERSATION, sizes) for e in cutting.feed(data)]) == whole


def test_no_pair_of_reads_changes_what_they_mean() -> None:
    """Every place to cut once, so that none is left to chance."""
    whole = shapes(StreamParser().feed(CONVERSATION))
    for place in range(1, len(CONVERSATION)):
        cutting = StreamParser()
        events = cutting.feed(CONVERSATION[:place]) + cutting.feed(CONVERSATION[place:])
        assert shapes(events) == whole


def test_white_space_alone_in_a_read_may_belong_to_a_tag() -> None:
    cutting = parser()
    assert shapes(
        cutting.feed(b"<presence/><iq") + cutting.feed(b" ") + cutting.feed(b"id='>")
    ) == [("{jabber:client}presence", {}, "", ())]
    assert shapes(cutting.feed(b" ") + cutting.feed(b"'/>")) == [
        ("{jabber:client}iq", {"id": "> "}, "", ())
    ]


def test_a_stanza_is_delivered_with_its_last_byte() -> None:
    """Read byte by byte, with a token long enough for expat's deferral (expat 2.6)."""
    stanza = f"<iq id='1' to='{'x' * 3_000}'><q>a</q></iq>".encode()
    bytewise = parser()
    counts = [len(bytewise.feed(bytes([byte]))) for byte in stanza]
    assert counts == [0] * (len(stanza) - 1) + [1]


@pytest.mark.parametrize("new", [True, False])
def test_expat_is_told_not_to_hold_stanzas_back(
    new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it can be told: expat 2.6 has this switch, and older ones need none."""
    told: list[bool] = []
    create = xml.parsers.expat.ParserCreate

    class Expat:
        def __init__(self, *args: Any) -> None:
            self.__dict__["real"] = create(*args)
            if new:
                self.__dict__["SetReparseDeferralEnabled"] = told.append

        def __getattr__(self, name: str) -> object:
            if name == "SetReparseDeferralEnabled":
                raise AttributeError(name)
            return getattr(self.real, name)

        def __setattr__(self, name: str, value: object) -> None:
            setattr(self.real, name, value)

    monkeypatch.setattr(xml.parsers.expat, "ParserCreate", Expat)
    assert shapes(parser().feed(b"<iq/>")) == [("{jabber:client}iq", {}, "", ())]
    assert told == ([False] if new else [])


@pytest.mark.parametrize(
    "start", [f"\n {HEADER}", f"{HEADER} \n\t", f"<?xml version='1.0'?>\n{OPEN}", OPEN]
)
def test_white_space_around_the_header_means_nothing(start: str) -> None:
    assert StreamParser().feed(start.encode()) == [OPENED]


def test_white_space_alone_in_front_of_the_header_means_nothing() -> None:
    new = StreamParser()
    assert new.feed(b"\n") + new.feed(b" ") + new.feed(HEADER.encode()) == [OPENED]


def test_keep_alives_never_add_up_to_too_much() -> None:
    quiet = parser(max_stanza=1_000)
    for _ in range(100):
        assert quiet.feed(b" \n" * 500) == []
    assert conditions(quiet.feed(b"<iq>" + b" " * 900 + b"</iq>")) == ["Element"]
    assert len(quiet._held) <= 1_000


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        # RFC 6120 section 11.1
        ("<!-- x -->", "restricted-xml"),
        ("<?php x?>", "restricted-xml"),
        ("<iq><!-- x --></iq>", "restricted-xml"),
        ("<iq><?php x?></iq>", "restricted-xml"),
        ("<iq>&nbsp;</iq>", "restricted-xml"),
        ("<iq id='&nbsp;'/>", "restricted-xml"),
        # XML 1.0 and its namespaces
        ("<!DOCTYPE a>", "not-well-formed"),
        ("<a:iq/>", "bad-namespace-prefix"),
        ("<iq a:b='c'/>", "bad-namespace-prefix"),
        ("<iq a='1' a='2'/>", "not-well-formed"),
        ("<iq xmlns:a='u' xmlns:b='u' a:x='1' b:x='2'/>", "not-well-formed"),
        ("<iq></presence>", "not-well-formed"),
        ("<iq></stream:stream>", "not-well-formed"),
        ("<iq a=1/>", "not-well-formed"),
        ("<iq a='<'/>", "not-well-formed"),
        ("<iq>&#1;</iq>", "not-well-formed"),
        ("<iq>\x01</iq>", "not-well-formed"),
        ("<iq>]]></iq>", "not-well-formed"),
        ("</presence>", "not-well-formed"),
        # CVE-2022-25236: expat's separator in a name would move its border.
        ("<a:iq xmlns:a='jabber:client}iq'/>", "not-well-formed"),
        # only stanzas and white space stand in a stream
        ("hello<iq/>", "bad-format"),
        ("<iq/>hello<iq/>", "bad-format"),
        ("<![CDATA[hello]]><iq/>", "bad-format"),
        ("\u00a0<iq/>", "bad-format"),
        # CVE-2022-20917
        ("<stream:stream>", "bad-format"),
        ("<iq><a><stream:stream/></a></iq>", "bad-format"),
        (f"<x:stream xmlns:x='{NS_STREAMS}'/>", "bad-format"),
    ],
)
def test_what_a_stream_may_not_contain_ends_it(text: str, condition: str) -> None:
    bad = parser()
    assert conditions(bad.feed(f"<presence/>{text}".encode()))[-1] == condition
    assert bad.feed(b"<presence/>") == []


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("<!DOCTYPE a>" + OPEN, "restricted-xml"),
        (f"<!DOCTYPE a [<!ENTITY b 'c'>]>{OPEN}<iq>&b;</iq>", "restricted-xml"),
        (f"<!DOCTYPE a SYSTEM 'file:///etc/passwd'>{OPEN}", "restricted-xml"),
        (f"<!-- x -->{OPEN}", "restricted-xml"),
        (f"<?xml version='1.0' encoding='ISO-8859-1'?>{OPEN}", "unsupported-encoding"),
        (f"<?xml version='1.0' encoding='UTF-16'?>{OPEN}", "unsupported-encoding"),
        (OPEN.replace("stream:stream ", "stream:streams "), "bad-format"),
        ("<html>", "bad-format"),
        ("HTTP/1.1 400 Bad Request\r\n\r\n<html>", "not-well-formed"),
        (f"<?xml version='1.0'?> <?xml version='1.0'?>{OPEN}", "not-well-formed"),
    ],
)
def test_what_is_no_stream_is_refused_before_it_opens(text: str, condition: str) -> None:
    assert conditions(StreamParser().feed(text.encode())) == [condition]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_only_utf_8_is_a_stream(encoding: str) -> None:
    assert conditions(StreamParser().feed(HEADER.encode(encoding))) == ["unsupported-encoding"]


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"\xc0\xbe", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xb8", b"\xef\xbf\xbf"],
)
def test_bytes_that_are_no_utf_8_end_the_stream(data: bytes) -> None:
    assert conditions(parser().feed(b"<iq>" + data + b"</iq>")) == ["not-well-formed"]


@pytest.mark.parametrize("junk", ["<iq/>", "hello>", "<!-- x -->", "</stream:stream>", OPEN])
@pytest.mark.parametrize("gap", [0, 2 * _SLICE])
def test_what_stands_behind_the_footer_is_not_looked_at(junk: str, gap: int) -> None:
    closed = parser()
    assert closed.feed(f"</stream:stream>{' ' * gap}{junk}".encode()) == [Closed()]
    assert closed.feed(junk.encode()) == []


def nested(depth: int) -> bytes:
    return b"<a>" * depth + b"</a>" * depth


def attributes(count: int) -> bytes:
    return b"<iq" + b"".join(b" a%d=''" % number for number in range(count)) + b"/>"


def children(count: int) -> bytes:
    return b"<iq>" + b"<a/>" * (count - 1) + b"</iq>"


def names(count: int) -> bytes:
    """This many names that the parser behind its header has not seen."""
    return b"".join(b"<n%d/>" % number for number in range(count))


def prefixes(count: int) -> bytes:
    """One new prefix, and so one new name, for each two."""
    return b"".join(b"<p%d:n xmlns:p%d='u'/>" % (n, n) for n in range(count // 2))


def long_name(length: int) -> bytes:
    return b"<" + b"n" * (length - len("{}") - len(NS_CLIENT) + 1) + b"/>"


# Those of the header: the default namespace, its prefix, "stream", "version".
_HEADER_NAMES = 4


@pytest.mark.parametrize(
    ("build", "limit"),
    [
        (nested, MAX_DEPTH),
        (attributes, MAX_ATTRIBUTES),
        (children, MAX_ELEMENTS),
        (names, MAX_NAMES - _HEADER_NAMES),
        (prefixes, MAX_NAMES - _HEADER_NAMES),
        (long_name, MAX_NAME),
    ],
)
def test_each_limit_is_the_last_that_is_taken(build: Any, limit: int) -> None:
    assert "policy-violation" not in conditions(parser().feed(build(limit)))
    assert conditions(parser().feed(build(limit + 2)))[-1] == "policy-violation"


def test_the_limit_of_elements_is_for_each_stanza() -> None:
    busy = parser()
    for _ in range(3):
        assert conditions(busy.feed(children(MAX_ELEMENTS))) == ["Element"]


@given(cuts)
def test_a_stanza_of_the_largest_size_is_taken_however_it_comes(sizes: list[int]) -> None:
    full = parser(max_stanza=40_000)
    stanza = b"<iq>" + b"x" * (40_000 - len(b"<iq></iq>")) + b"</iq>"
    data = 3 * (b" \n" + stanza)
    assert conditions([e for piece in cut(data, sizes) for e in full.feed(piece)]) == 3 * [
        "Element"
    ]


@pytest.mark.parametrize("size", [1, 100, 5_000, 10**9])
@pytest.mark.parametrize("filler", [b"x", b"<a/>", b">", b" "])
def test_a_stanza_too_large_ends_the_stream_soon(filler: bytes, size: int) -> None:
    """What is kept unparsed is bounded by the same limit, and so counts twice at most."""
    greedy = parser(max_stanza=30_000)
    data = b"<iq>" + (filler * 80_000)[:80_000]
    taken, events = 0, []
    for piece in cut(data, [size] * (len(data) // size)):
        events += greedy.feed(piece)
        assert len(greedy._held) <= 30_000 + size
        if events:
            break
        taken += len(piece)
    assert conditions(events) == ["policy-violation"]
    assert taken <= 30_000 + 2 * _SLICE + 30_000


def test_a_header_too_large_ends_the_stream() -> None:
    header = OPEN.replace(">", f" a='{'x' * 60_000}'>").encode()
    assert conditions(StreamParser(max_stanza=20_000).feed(header)) == ["policy-violation"]


def test_a_long_token_in_small_reads_is_scanned_once() -> None:
    """Before its end nothing reaches expat, which would start over each time."""
    patient = parser()
    before = patient._fed
    token = b"<iq a='" + b"x" * (MAX_STANZA - 10)
    for start in range(0, len(token), 100):
        assert patient.feed(token[start : start + 100]) == []
    assert patient._fed == before
    assert conditions(patient.feed(b"'/>")) == ["Element"]


def test_what_came_before_a_mistake_is_still_told() -> None:
    assert conditions(parser().feed(b"<iq/><presence/><oops></iq>")) == [
        "Element",
        "Element",
        "not-well-formed",
    ]


@given(elements())
def test_what_is_written_is_read_back(element: Element) -> None:
    assert shapes(parser().feed(serialise(element))) == [tree(element)]


@given(elements())
def test_any_other_parser_reads_the_same(element: Element) -> None:
    assert tree(fromstring(serialise(element, outer=""))) == tree(element)


@given(xml_texts)
def test_writing_leaves_no_character_that_could_end_a_text(text: str) -> None:
    """So nothing in a value can become markup, a keep-alive, or a lost line break."""
    data = serialise(make("a", {"b": text}, text=text), outer="").decode()
    inside = [
        data.partition("'")[2].partition("'")[0],
        data.partition(">")[2].rpartition("<")[0],
    ]
    assert [set(part) & set("<>'\"\t\r\n") for part in inside] == [set(), set()]


@pytest.mark.parametrize(
    ("element", "text"),
    [
        (make(IQ), "<iq/>"),
        (make(IQ, {"id": 5, "to": None}), "<iq id='5'/>"),
        (make(IQ, {"a": "\t\r\n"}), "<iq a='&#9;&#13;&#10;'/>"),
        (make(IQ, {"a": "&<>'\""}), "<iq a='&amp;&lt;&gt;&apos;&quot;'/>"),
        (make(IQ, None, make("{u}q", None, make("{u}r"))), "<iq><q xmlns='u'><r/></q></iq>"),
        (make(IQ, None, make("q")), "<iq><q xmlns=''/></iq>"),
        (make(IQ, {"a": "1", "{u}b": "2"}), "<iq a='1' xmlns:a1='u' a1:b='2'/>"),
        (make(IQ, {LANG: "de"}), "<iq xml:lang='de'/>"),
        (make(IQ, text="x"), "<iq>x</iq>"),
    ],
)
def test_writing_adds_nothing(element: Element, text: str) -> None:
    assert serialise(element).decode() == text


def test_the_tail_of_the_element_itself_is_not_written() -> None:
    element = make(IQ)
    element.tail = "behind"
    assert serialise(element) == b"<iq/>"


@pytest.mark.parametrize("bad", ["\0", "\x1b", "\x0b", "\ufffe", "\uffff", "\ud800"])
def test_what_xml_cannot_carry_is_our_own_mistake(bad: str) -> None:
    assert not is_writable(f"a{bad}b")
    for element in (make("a", text=bad), make("a", {"b": bad}), make(f"{{{bad}}}a")):
        with pytest.raises(ValueError, match="XML cannot carry"):
            serialise(element)


def test_a_tag_has_a_namespace_and_a_name() -> None:
    assert (namespace("{urn:a}b"), local_name("{urn:a}b")) == ("urn:a", "b")
    assert (namespace("b"), local_name("b")) == ("", "b")
