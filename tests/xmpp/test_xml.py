from __future__ import annotations

import random
import xml.parsers.expat
from contextlib import suppress
from itertools import pairwise
from typing import Any
from xml.etree.ElementTree import Element, ParseError, XMLPullParser, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.xmpp.xml import (
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
    Outgoing,
    StreamParser,
    _RefusedError,
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

    class Switched(Expat):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if new:
                self.__dict__["SetReparseDeferralEnabled"] = told.append

        def __getattr__(self, name: str) -> object:
            if name == "SetReparseDeferralEnabled":
                raise AttributeError(name)
            return super().__getattr__(name)

    monkeypatch.setattr(xml.parsers.expat, "ParserCreate", Switched)
    assert shapes(parser().feed(b"<iq/>")) == [("{jabber:client}iq", {}, "", ())]
    assert told == ([False] if new else [])


@pytest.mark.parametrize(
    "start",
    [
        f"{HEADER}<![CDATA[ ]]>",
        f"\n {HEADER}",
        f"{HEADER} \n\t",
        f"<?xml version='1.0'?>\n{OPEN}",
        OPEN,
    ],
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
    assert len(quiet._cutter) == 0


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
        ("<!DOCTYPE a>", "restricted-xml"),
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


@pytest.mark.parametrize(
    ("data", "condition"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "not-well-formed"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "not-well-formed"),  # an alert of TLS
        (b" \r\n220 smtp.example.org\r\n", "not-well-formed"),
        (b"* OK imap", "not-well-formed"),
        (b"\xef\xbbx", "not-well-formed"),
        (b"\xef\xbb\xbf hello", "not-well-formed"),
        (b"<?xml version='1.0'?>hello", "not-well-formed"),
        (b"\0\0", "unsupported-encoding"),
        (b"\xff\xfe<\0", "unsupported-encoding"),
        (b"<\0s", "unsupported-encoding"),
        (b"<s\0>", "not-well-formed"),
        (HEADER.encode() + b"HTTP/1.1 400", "bad-format"),
        (HEADER.encode() + b" \x15", "not-well-formed"),
        (HEADER.encode() + b"\xef\xbb\xbf", "bad-format"),
        (HEADER.encode() + b"\v<presence/>", "not-well-formed"),
    ],
)
def test_what_cannot_become_a_stream_is_told_by_its_first_byte(
    data: bytes, condition: str
) -> None:
    """Who sends it waits for us, so waiting for more would last until a timeout."""
    for sizes in ([], [1] * len(data)):
        new = StreamParser()
        events = [event for piece in cut(data, sizes) for event in new.feed(piece)]
        assert conditions(events)[-1:] == [condition]


@pytest.mark.parametrize(
    "start", [b"\xef\xbb\xbf", b"\n \xef\xbb\xbf", b"\xef\xbb\xbf\n\xef\xbb\xbf"]
)
def test_a_mark_of_the_byte_order_means_nothing(start: bytes) -> None:
    data = start + HEADER.encode()
    for sizes in ([], [1] * len(data)):
        new = StreamParser()
        assert [event for piece in cut(data, sizes) for event in new.feed(piece)] == [OPENED]


def test_white_space_of_other_alphabets_is_none() -> None:
    """Vertical tabs and form feeds are white space to Python, and no XML at all."""
    assert conditions(StreamParser().feed(b"\v\f" + HEADER.encode())) == ["not-well-formed"]


@pytest.mark.parametrize("markup", ["<!-- x -->", "<!DOCTYPE a [<!ENTITY b 'c'>]>", "<?x y?>"])
def test_expat_refuses_by_itself_what_no_stream_may_contain(markup: str) -> None:
    """The second wall, should our look at the bytes and expat's ever differ."""
    new = StreamParser()
    with pytest.raises(_RefusedError, match="forbids"):
        new._expat.Parse(markup, False)


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
@pytest.mark.parametrize("gap", [0, 32_768])
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
    return b"<iq>" + b"".join(b"<n%d/>" % number for number in range(count - 1)) + b"</iq>"


def prefixes(count: int) -> bytes:
    """The same; each prefix is one, and so is each name with it."""
    used = b"".join(b"<p%d:n xmlns:p%d='u'/>" % (n, n) for n in range((count - 1) // 2))
    return b"<iq>" + used + b"</iq>"


def long_name(length: int) -> bytes:
    return b"<" + b"n" * (length - len("{}") - len(NS_CLIENT) + 1) + b"/>"


@pytest.mark.parametrize(
    ("build", "limit"),
    [
        (nested, MAX_DEPTH),
        (attributes, MAX_ATTRIBUTES),
        (children, MAX_ELEMENTS),
        (names, MAX_NAMES),
        (prefixes, MAX_NAMES),
        (long_name, MAX_NAME),
    ],
)
def test_each_limit_is_the_last_that_is_taken(build: Any, limit: int) -> None:
    assert conditions(parser().feed(build(limit))) == ["Element"]
    assert conditions(parser().feed(build(limit + 2))) == ["policy-violation"]


class Expat:
    """A parser that counts what it scans: what it is given, and what it has to scan anew."""

    made = 0
    scanned = 0

    real: Any
    given: int

    def __init__(self, *args: Any) -> None:
        type(self).made += 1
        self.__dict__.update(real=CREATE(*args), given=0)

    def Parse(self, data: bytes, final: bool) -> None:  # noqa: N802 - pyexpat's name
        if self.given:
            # Where the token begins that is not complete yet.
            type(self).scanned += self.given - self.real.CurrentByteIndex
        type(self).scanned += len(data)
        self.__dict__["given"] += len(data)
        self.real.Parse(data, final)

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.real, name, value)


CREATE = xml.parsers.expat.ParserCreate


@pytest.fixture
def expat(monkeypatch: pytest.MonkeyPatch) -> type[Expat]:
    """Counts from 0 in each test."""
    monkeypatch.setattr(Expat, "made", 0)
    monkeypatch.setattr(Expat, "scanned", 0)
    monkeypatch.setattr(xml.parsers.expat, "ParserCreate", Expat)
    return Expat


def test_names_that_add_up_over_the_stream_do_not_end_it(expat: type[Expat]) -> None:
    """Libexpat forgets none, so a new parser goes on behind the stanza with too many."""
    long = parser()
    rounds = 3
    for number in range(rounds * MAX_NAMES):
        text = f"<iq n{number}=''><stream xmlns='urn:s'/></iq>"
        assert shapes(long.feed(text.encode())) == [
            (IQ, {f"n{number}": ""}, "", ((("{urn:s}stream", {}, "", ()), ""),))
        ]
        assert len(long._names) <= 2 * MAX_NAMES
    assert expat.made in (rounds, rounds + 1)
    assert long.feed(b"</stream:stream>") == [Closed()]
    assert expat.made in (rounds, rounds + 1)


@pytest.mark.parametrize(
    ("header", "stanza", "footer"),
    [
        ("<stream:stream xmlns='jabber:client' xmlns:stream='{}'>", "<iq/>", "stream:stream"),
        ("<stream xmlns='{}' xmlns:c='jabber:client'>", "<c:iq/>", "stream"),
        (
            "<b:stream xmlns:a='{0}' xmlns:b='{0}' xmlns='jabber:client'>",
            "<iq xmlns:a='urn:a'/>",
            "b:stream",
        ),
        ("<s:stream xmlns:s='{}' xmlns:c='jabber:client'>", "<c:iq/>", "s:stream"),
        ("<s:stream xmlns='' xmlns:s='{}' xmlns:i='a&apos;b'>", "<iq i:a='1'/>", "s:stream"),
    ],
)
def test_the_parser_that_goes_on_knows_what_the_header_declared(
    header: str, stanza: str, footer: str, expat: type[Expat]
) -> None:
    long = StreamParser()
    long.feed(header.format(NS_STREAMS).encode())
    before = shapes(long.feed(stanza.encode()))
    # In one read, so that the parsers change in its middle.
    long.feed(b"".join(b"<iq n%d=''/>" % number for number in range(2 * MAX_NAMES)))
    assert expat.made >= 2
    assert shapes(long.feed(stanza.encode())) == before
    assert isinstance(before[0], tuple)  # an element
    assert long.feed(f"</{footer}>".encode()) == [Closed()]


def test_when_a_new_parser_goes_on_does_not_depend_on_the_reads(expat: type[Expat]) -> None:
    """So neither does the limit on the new names of a stanza."""
    data = b"".join(names(500).replace(b"<n", b"<r%d-n" % number) for number in range(8))
    made = []
    for size in (7, 1_000, len(data)):
        before = expat.made
        long = parser()
        pieces = cut(data, [size] * (len(data) // size))
        events = [event for piece in pieces for event in long.feed(piece)]
        assert conditions(events) == ["Element"] * 8
        made.append(expat.made - before)
    assert made == [3, 3, 3]


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
@pytest.mark.parametrize("filler", [b"x", b"<a/>", b">", b" ", b"<a b='>", b"<![CDATA[", b"&x"])
def test_a_stanza_too_large_ends_the_stream_with_its_first_byte_too_many(
    filler: bytes, size: int
) -> None:
    greedy = parser(max_stanza=30_000)
    data = b"<iq>" + (filler * 80_000)[:80_000]
    taken, events = 0, []
    for piece in cut(data, [size] * (len(data) // size)):
        taken += len(piece)
        events += greedy.feed(piece)
        assert len(greedy._cutter) <= 30_000 + size
        if events:
            break
    if filler == b"<a b='>":
        assert conditions(events) == ["not-well-formed"]
    else:
        assert conditions(events) == ["policy-violation"]
        assert min(taken, 30_001) == 30_001
    assert taken <= 30_001 + size or size == 10**9


def test_a_header_too_large_ends_the_stream() -> None:
    header = OPEN.replace(">", f" a='{'x' * 60_000}'>").encode()
    assert conditions(StreamParser(max_stanza=20_000).feed(header)) == ["policy-violation"]


@pytest.mark.parametrize(
    ("start", "filler", "end"),
    [
        (b"<iq a='", b">", b"'/>"),  # the worst
        (b'<iq a="', b"'>", b'"/>'),
        (b"<iq ", b" ", b"/>"),
        (b"<iq>", b"x", b"</iq>"),
        (b"<iq>", b">", b"</iq>"),
        (b"<iq>", b"&gt;", b"</iq>"),
        (b"<iq><![CDATA[", b"]]", b"]]></iq>"),
        (b"<iq><![CDATA[", b"<a>", b"]]></iq>"),
        (b"<iq>", b"<![CDATA[>]]>", b"</iq>"),
        (b"<iq>", b"\xc3\xa4", b"</iq>"),
    ],
)
def test_c09_a_long_token_in_small_reads_is_scanned_once(
    start: bytes, filler: bytes, end: bytes, expat: type[Expat]
) -> None:
    """CVE-2023-52425: expat, given each byte as it comes, would start over each time.

    Counted is what expat scans, and how far our own look goes back.
    """
    patient = parser()
    expat.scanned = 0
    count = (20_000 - len(start) - len(end)) // len(filler)
    stanza = start + filler * count + end
    for position in range(len(stanza) - 1):
        assert patient.feed(stanza[position : position + 1]) == []
        cutter = patient._cutter
        assert len(cutter._held) - cutter._seen <= len("<![CDATA")
    assert conditions(patient.feed(stanza[-1:])) == ["Element"]
    assert expat.scanned == len(stanza)


def test_c09_so_is_the_longest_of_all(expat: type[Expat]) -> None:
    patient = parser()
    expat.scanned = 0
    stanza = b"<iq a='" + b">" * (MAX_STANZA - len(b"<iq a=''/>")) + b"'/>"
    counts = [len(patient.feed(stanza[place : place + 1])) for place in range(MAX_STANZA)]
    assert counts == [0] * (MAX_STANZA - 1) + [1]
    assert expat.scanned == MAX_STANZA


def test_the_count_of_what_expat_scans_is_right(expat: type[Expat]) -> None:
    """What it counts when each byte is given to expat as it comes."""
    naive = xml.parsers.expat.ParserCreate()
    for byte in b"<a b='>>>>>>":
        naive.Parse(bytes([byte]), False)
    assert expat.scanned == sum(range(1, 13))


def test_c09_a_stanza_is_delivered_with_its_last_byte_in_any_segments() -> None:
    """2 to 6 random segments, where expat 2.6 held some back; and byte by byte."""
    stanza = (
        f"<iq id='{'x' * 300}' a='>'><q b=\"'>\">a &gt; b<![CDATA[</iq>]]></q></iq >".encode()
    )
    whole = shapes(parser().feed(stanza))
    chance = random.Random(9)
    for _ in range(1_000):
        places = [0, *sorted(chance.sample(range(1, len(stanza)), chance.randint(1, 5)))]
        pieces = [stanza[a:b] for a, b in pairwise([*places, len(stanza)])]
        cutting = parser()
        assert [cutting.feed(piece) for piece in pieces[:-1]] == [[]] * (len(pieces) - 1)
        assert shapes(cutting.feed(pieces[-1])) == whole


@given(elements(), cuts)
def test_c09_any_stanza_is_delivered_with_its_last_byte(
    element: Element, sizes: list[int]
) -> None:
    stanza = b"<message>" + serialise(element) + b"</message>"
    *pieces, last = cut(stanza, sizes)
    cutting = parser()
    assert [cutting.feed(piece) for piece in pieces] == [[]] * len(pieces)
    assert conditions(cutting.feed(last)) == ["Element"]


# What means something to XML, and some that does not.
TOKENS = (
    "<iq> </iq> <iq\ta=' ' \" > /> < <a/> </a> <a> x <![CDATA[ ]]> <!-- --> <?x ?> <!D &lt; & ;"
    " \0 \u00e4 <presence/> <message> </message\t> </x:iq> <x:iq\txmlns:x='u'> </stream:stream>"
    " <stream:stream> = \ufeff <n1/><n2/><n3/>"
)
hostile = st.lists(st.sampled_from([*TOKENS.split(" "), " "]), max_size=30)


@given(hostile, st.booleans(), cuts)
def test_no_cut_changes_what_is_wrong(parts: list[str], opened: bool, sizes: list[int]) -> None:
    """Nor do the limits depend on it: read at once, byte by byte, and in any other way."""
    data = ((HEADER if opened else "") + "".join(parts)).encode()
    reads = ([len(data)], [1] * len(data), sizes)
    results = []
    for each in reads:
        cutting = StreamParser(max_stanza=150)
        results.append(shapes([e for piece in cut(data, each) for e in cutting.feed(piece)]))
    assert results == [results[0]] * 3


def read_by_another(data: bytes) -> list[object]:
    """The stanzas of a stream, up to the first mistake, as xml.etree reads it."""
    reader: XMLPullParser[Element] = XMLPullParser(("start", "end"))
    reader.feed(data)
    if hasattr(reader, "flush"):
        reader.flush()
    stanzas: list[object] = []
    depth = 0
    with suppress(ParseError):
        for item in reader.read_events():
            event, element = item[0], item[-1]
            assert isinstance(element, Element)
            depth += 1 if event == "start" else -1
            if depth == 1 and event == "end":
                stanzas.append(tree(element))
    return stanzas


@given(hostile, cuts)
def test_c07_another_parser_reads_the_same_stanzas(parts: list[str], sizes: list[int]) -> None:
    """None of them more, and no other: ours may only end the stream earlier."""
    data = (HEADER + "".join(parts)).encode()
    reading = StreamParser()
    events = [event for piece in cut(data, sizes) for event in reading.feed(piece)]
    stanzas = [tree(event) for event in events if isinstance(event, Element)]
    assert stanzas == read_by_another(data)[: len(stanzas)]
    if not isinstance(events[-1], Closed | Malformed):
        assert stanzas == read_by_another(data)


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


@given(
    st.lists(st.tuples(st.sampled_from(["put", "first", "take"]), st.integers(0, 30))),
    st.none() | st.integers(0, 60),
)
def test_what_goes_out_is_whole_and_in_order(
    steps: list[tuple[str, int]], most: int | None
) -> None:
    """Only what is to come first passes what waits, and only the last of it is left."""
    outgoing = Outgoing()
    waiting: list[bytes] = []
    first = b""
    for number, (step, length) in enumerate(steps):
        element = b"<%d>" % number + b"x" * length
        if step == "put":
            outgoing.put(element)
            waiting.append(element)
        elif step == "first":
            outgoing.put_first(element)
            first = element
        else:
            expected, first = first, b""
            while waiting and (most is None or len(expected) < most):
                expected += waiting.pop(0)
            assert expected == outgoing.take(most)
        assert len(first) + sum(map(len, waiting)) == len(outgoing)
    assert first + b"".join(waiting) == outgoing.take()
    assert (len(outgoing), outgoing.take()) == (0, b"")
