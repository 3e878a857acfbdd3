from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.errors import ErrorType, RemoteProtocolError, StanzaError
from syncd.transfer import schema, si
from syncd.trust.signing import write_base64
from syncd.xmpp.xml import is_writable, serialise
from tests.support.peers import carried

if TYPE_CHECKING:
    from collections.abc import Callable

BOTH = (si.BYTESTREAMS, si.IBB)
SYNC = si.Sync(folder="photos", path="2031/a.raw", mtime_ns=1_930_000_000_123_456_789)
OFFER = si.Offer(sid="a0", name="test.txt", size=1022, methods=BOTH)
FINISH = si.Finish(sid="a0", size=1022, digest=bytes(range(32)))
SIGNED = {"signature": "B" * 86 + "=="}
SEALED_FINISH = replace(FINISH, digest=b"", seal={"sealed": "A" * 1_600, **SIGNED})
SEALED_RECEIPT = replace(FINISH, digest=b"", seal=SIGNED)


def form(inside: str, attributes: str = "type='form'") -> str:
    return (
        f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' {attributes}>{inside}</x>"
        "</feature>"
    )


def field(*values: str, kind: str = "type='list-single'") -> str:
    options = "".join(f"<option><value>{value}</value></option>" for value in values)
    return f"<field var='stream-method' {kind}>{options}</field>"


def file(attributes: str, inside: str = "") -> str:
    return f"<file xmlns='{si.NS_FILE}' {attributes}>{inside}</file>"


FILE = file("name='test.txt' size='1022'")
FEATURE = form(field(*BOTH))


def offer(*children: str, attributes: str = f"id='a0' profile='{si.NS_FILE}'") -> Element:
    return fromstring(f"<si xmlns='{si.NS_SI}' {attributes}>{''.join(children)}</si>")


def answer(*children: str) -> Element:
    return fromstring(f"<si xmlns='{si.NS_SI}'>{''.join(children)}</si>")


def submit(*values: str, kind: str = "") -> str:
    inside = "".join(f"<value>{value}</value>" for value in values)
    return form(f"<field var='stream-method' {kind}>{inside}</field>", "type='submit'")


def written(element: Element) -> str:
    return serialise(element).decode()


# Offers as they are written


def test_offer_is_compact_and_file_comes_before_feature() -> None:
    """Clients that go by position find what they need, and no white space between."""
    assert written(si.make_offer(OFFER)) == (
        f"<si xmlns='{si.NS_SI}' id='a0' profile='{si.NS_FILE}'"
        " mime-type='application/octet-stream'>"
        f"<file xmlns='{si.NS_FILE}' name='test.txt' size='1022'/>"
        f"<feature xmlns='{si.NS_FEATURE}'><x xmlns='{si.NS_DATA}' type='form'>"
        "<field var='stream-method' type='list-single'>"
        f"<option><value>{si.BYTESTREAMS}</value></option>"
        f"<option><value>{si.IBB}</value></option>"
        "</field></x></feature></si>"
    )


def test_offer_always_says_the_size() -> None:
    """Openfire refuses an offer without."""
    file_element = si.make_offer(replace(OFFER, size=0)).find(si.FILE)
    assert file_element is not None
    assert file_element.get("size") == "0"


def test_offer_between_two_syncds_carries_a_childless_sync_at_its_end() -> None:
    element = si.make_offer(replace(OFFER, ranged=True, sync=SYNC))
    assert [child.tag for child in element] == [si.FILE, si.FEATURE, si.SYNC]
    assert [child.tag for child in element[0]] == [si.RANGE]
    assert written(element[2]) == (
        "<sync xmlns='urn:syncd:sync:1' folder='photos' path='2031/a.raw'"
        " mtime-ns='1930000000123456789'/>"
    )


texts = st.text(min_size=1, max_size=40).filter(is_writable)
syncs = st.builds(
    si.Sync,
    folder=st.from_regex(r"[A-Za-z0-9._\-]{1,64}", fullmatch=True),
    path=texts,
    mtime_ns=st.integers(0, si.MAX_SIZE),
)
seals = st.dictionaries(st.sampled_from(["v", "key", "signature"]), texts)
offers = st.builds(
    si.Offer,
    sid=texts,
    name=texts,
    size=st.none() | st.integers(0, si.MAX_SIZE),
    methods=st.sampled_from([BOTH, BOTH[::-1], BOTH[:1], BOTH[1:]]),
    ranged=st.booleans(),
    md5=st.just("") | st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    date=st.sampled_from(["", "2031-05-04T12:00:00Z"]),
    sync=st.none() | syncs,
    seal=st.none() | seals,
)
ends = st.builds(si.Finish, sid=texts, size=st.integers(0, si.MAX_SIZE), beside=st.booleans())
hashes = st.builds(replace, ends, digest=st.binary(min_size=32, max_size=32))
written_64 = st.binary(min_size=64, max_size=64).map(write_base64)
hidden = st.sampled_from([112, 1_200]).flatmap(
    lambda size: st.binary(min_size=size, max_size=size).map(write_base64)
)
finishes = hashes | st.builds(
    replace, ends, seal=st.fixed_dictionaries({"sealed": hidden, "signature": written_64})
)
receipts = hashes | st.builds(
    replace, ends, seal=st.fixed_dictionaries({"signature": written_64})
)


@settings(deadline=None)
@given(offers)
def test_offer_that_is_written_is_read_the_same(original: si.Offer) -> None:
    element = carried(si.make_offer(original))
    schema.check(element)
    assert si.read_offer(element) == original


@settings(deadline=None)
@given(offers, st.data())
def test_answer_that_is_written_is_read_the_same(
    original: si.Offer, data: st.DataObject
) -> None:
    last = original.size if original.size is not None else si.MAX_SIZE
    offset = data.draw(st.integers(0, last)) if original.ranged else 0
    made = si.Answer(
        method=data.draw(st.sampled_from(original.methods)),
        offset=offset,
        seal=data.draw(st.none() | seals),
    )
    assert si.read_answer(carried(si.make_answer(made, original)), original) == made


@settings(deadline=None)
@given(finishes, receipts)
def test_finish_and_receipt_that_are_written_are_read_the_same(
    question: si.Finish, receipt: si.Finish
) -> None:
    asked, given = carried(si.make_finish(question)), carried(si.make_receipt(receipt))
    schema.check(asked)
    schema.check(given)
    assert (si.read_finish(asked), si.read_receipt(given)) == (question, receipt)
    assert (list(asked), list(given)) == ([], [])


# Offers as they are read


def test_examples_of_the_specification_are_read() -> None:
    """XEP-0096 section 4, the simple and the complete offer."""
    complete = file(
        "name='test.txt' size='1022' hash='552da749930852c69ae5d2141d3766b1'"
        " date='1969-07-21T02:56:15Z'",
        "<desc>This is a test. If this were a real file...</desc>",
    )
    described = replace(
        OFFER, md5="552da749930852c69ae5d2141d3766b1", date="1969-07-21T02:56:15Z"
    )
    for element, expected in ((FILE, OFFER), (complete, described)):
        schema.check(offer(element, FEATURE))
        assert si.read_offer(offer(element, FEATURE)) == expected


def test_recorded_offer_with_feature_before_file_is_read() -> None:
    """An XIFF client over Openfire, as it was written down with all its white space."""
    element = fromstring(f"""
      <si profile="{si.NS_FILE}" mime-type="text/plain"
          id="82B0C697-C1DE-93F9-103E-481C8E7A3BD8" xmlns="{si.NS_SI}">
        <feature xmlns="http://jabber.org/protocol/feature-neg">
            <x xmlns="jabber:x:data" type="form">
                <field var="stream-method" type="list-single">
                    <option><value>http://jabber.org/protocol/bytestreams</value></option>
                    <option><value>http://jabber.org/protocol/ibb</value></option>
                </field>
            </x>
        </feature>
        <file xmlns="{si.NS_FILE}" name="img0545.png" size="152443"><desc>send</desc></file>
      </si>""")
    schema.check(element)
    assert si.read_offer(element) == si.Offer(
        sid="82B0C697-C1DE-93F9-103E-481C8E7A3BD8",
        name="img0545.png",
        size=152443,
        methods=BOTH,
    )


OOB = "jabber:iq:oob"
RANGED = file("name='test.txt' size='1022'", "<range/>")
QXMPP = file("date='2031-05-04T12:00:00Z' hash='552d' name='test.txt' size='1022'", "<desc/>")
TUNE = "<si-multiple xmlns='http://telepathy.freedesktop.org/xmpp/si-multiple'/>"
THUMBNAIL = "<thumbnail xmlns='urn:xmpp:thumbs:0' cid='a@b' width='8'/>"


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        pytest.param(
            offer(
                FILE, form(field(si.BYTESTREAMS, si.IBB, OOB, "", kind="type='text-single'"))
            ),
            replace(OFFER, methods=(*BOTH, OOB)),
            id="gloox: text-single, out-of-band option, empty value",
        ),
        pytest.param(
            offer(QXMPP, form(field(si.IBB, si.BYTESTREAMS))),
            replace(OFFER, methods=BOTH[::-1], date="2031-05-04T12:00:00Z"),
            id="QXmpp: in-band first, date, and a hash that is none",
        ),
        pytest.param(
            offer(file("name='test.txt'"), FEATURE),
            replace(OFFER, size=None),
            id="Smack, QXmpp: a size of 0 is left out",
        ),
        pytest.param(offer(RANGED, FEATURE), replace(OFFER, ranged=True), id="Psi: range"),
        pytest.param(offer(FEATURE, TUNE, FILE), OFFER, id="gabble: si-multiple"),
        pytest.param(
            offer(file("name='test.txt' size='1022'", THUMBNAIL), FEATURE), OFFER, id="Psi"
        ),
        pytest.param(
            offer(FILE, form(field(*BOTH, kind=""), attributes="")), OFFER, id="no types"
        ),
        pytest.param(
            offer(
                FILE,
                form(
                    "<title>t</title><field var='FORM_TYPE' type='hidden'><value>x</value>"
                    "</field>" + field(*BOTH)
                ),
            ),
            OFFER,
            id="other fields",
        ),
        pytest.param(
            offer(FILE, form(field(f"\n  {si.BYTESTREAMS}\t", f" {si.IBB} "))),
            OFFER,
            id="white space in values",
        ),
        pytest.param(
            offer("<range/>", FILE, FEATURE), OFFER, id="Libervia: range at the wrong place"
        ),
        pytest.param(
            offer(file(f"name='test.txt' size='1022' hash=' {'aB' * 16}'"), FEATURE),
            replace(OFFER, md5="ab" * 16),
            id="a hash in capitals, padded",
        ),
        pytest.param(
            offer(file("name='test.txt' size=' 1022&#10;'"), FEATURE), OFFER, id="padded size"
        ),
    ],
)
def test_offers_of_real_clients_are_read(element: Element, expected: si.Offer) -> None:
    schema.check(element)
    assert si.read_offer(element) == expected


@pytest.mark.parametrize(
    "size", ["", "x", "1e3", "12.0", "1_000", "\u0661\u0662", "0x10", "9" * 99]
)
def test_size_that_is_no_number_counts_as_unknown(size: str) -> None:
    assert si.read_offer(offer(file(f"name='n' size='{size}'"), FEATURE)).size is None


def test_no_more_methods_are_read_than_anybody_has() -> None:
    many = [f"urn:x:{number}" for number in range(100)]
    assert si.read_offer(offer(FILE, form(field(*many)))).methods == tuple(
        many[: si.MAX_METHODS]
    )


def test_sync_without_a_folder_is_for_the_inbox() -> None:
    element = offer(FILE, FEATURE, SYNC_TEXT.format("", "p", "1"))
    schema.check(element)
    assert si.read_offer(element).sync == si.Sync(folder="", path="p", mtime_ns=1)


SYNC_TEXT = "<sync xmlns='urn:syncd:sync:1' folder='{}' path='{}' mtime-ns='{}'/>"
LONG = "x" * 5_000


@pytest.mark.parametrize(
    ("element", "app"),
    [
        pytest.param(
            offer(FILE, FEATURE, attributes="id='a0' profile='urn:x'"),
            "bad-profile",
            id="profile",
        ),
        pytest.param(
            offer(FILE, FEATURE, attributes="id='a0'"), "bad-profile", id="no profile"
        ),
        pytest.param(
            offer(FILE, FEATURE, attributes=f"profile='{si.NS_FILE}'"), "", id="no id"
        ),
        pytest.param(
            offer(FILE, FEATURE, attributes=f"id='' profile='{si.NS_FILE}'"), "", id="empty id"
        ),
        pytest.param(
            offer(FILE, FEATURE, attributes=f"id='{LONG}' profile='{si.NS_FILE}'"),
            "",
            id="long id",
        ),
        pytest.param(offer(FEATURE), "", id="no file"),
        pytest.param(offer("<file name='n' size='1'/>", FEATURE), "", id="file of nobody"),
        pytest.param(offer(file("size='1'"), FEATURE), "", id="no name"),
        pytest.param(offer(file("name='' size='1'"), FEATURE), "", id="empty name"),
        pytest.param(offer(file(f"name='{LONG}' size='1'"), FEATURE), "", id="long name"),
        pytest.param(offer(file("name='n' size='-1'"), FEATURE), "", id="negative size"),
        pytest.param(
            offer(file(f"name='n' size='{2**63}'"), FEATURE), "", id="larger than any file"
        ),
        pytest.param(offer(FILE), "no-valid-streams", id="no feature"),
        pytest.param(offer(FILE, form("")), "no-valid-streams", id="no field"),
        pytest.param(offer(FILE, form(field())), "no-valid-streams", id="no option"),
        pytest.param(offer(FILE, form(field("", " "))), "no-valid-streams", id="empty options"),
        pytest.param(
            offer(FILE, FEATURE.replace("stream-method", "method")),
            "no-valid-streams",
            id="other field",
        ),
        *(
            pytest.param(offer(FILE, FEATURE, SYNC_TEXT.format(*values)), "", id=f"sync {name}")
            for name, values in {
                "with long folder": ("f" * 65, "p", "1"),
                "without path": ("f", "", "1"),
                "with long path": ("f", LONG, "1"),
                "without time": ("f", "p", ""),
                "with time that is no number": ("f", "p", "1_0"),
                "before 1970": ("f", "p", "-1"),
                "after 2262": ("f", "p", str(2**63)),
                "with endless time": ("f", "p", "9" * 5_000),
            }.items()
        ),
    ],
)
def test_wrong_offers_are_refused_as_the_specification_wants(
    element: Element, app: str
) -> None:
    """XEP-0095 section 4.2: bad-request, with the condition of stream initiation if any."""
    with pytest.raises(StanzaError) as caught:
        si.read_offer(element)
    expected_type = ErrorType.CANCEL if app == "no-valid-streams" else ErrorType.MODIFY
    assert caught.value.condition == "bad-request"
    assert caught.value.type == expected_type
    assert caught.value.app == (f"{{{si.NS_SI}}}{app}" if app else "")


def test_method_is_chosen_in_our_order() -> None:
    backwards = replace(OFFER, methods=BOTH[::-1])
    assert si.choose_method(backwards, BOTH) == si.BYTESTREAMS
    assert si.choose_method(replace(OFFER, methods=(si.IBB,)), BOTH) == si.IBB


def test_offer_without_a_method_of_ours_is_refused() -> None:
    with pytest.raises(StanzaError) as caught:
        si.choose_method(replace(OFFER, methods=(OOB,)), BOTH)
    assert caught.value.condition == "bad-request"
    assert caught.value.app == f"{{{si.NS_SI}}}no-valid-streams"


# Answers


def test_answer_is_the_example_of_the_specification() -> None:
    """XEP-0096 section 4: no <file/>, which is fatal to Smack."""
    assert written(si.make_answer(si.Answer(method=si.BYTESTREAMS), OFFER)) == (
        f"<si xmlns='{si.NS_SI}'><feature xmlns='{si.NS_FEATURE}'>"
        f"<x xmlns='{si.NS_DATA}' type='submit'>"
        "<field var='stream-method' type='list-single'>"
        f"<value>{si.BYTESTREAMS}</value></field></x></feature></si>"
    )


def test_answer_names_an_offset_behind_the_feature() -> None:
    ranged = replace(OFFER, ranged=True)
    element = si.make_answer(si.Answer(method=si.BYTESTREAMS, offset=512), ranged)
    assert [child.tag for child in element] == [si.FEATURE, si.FILE]
    assert written(element[1]) == f"<file xmlns='{si.NS_FILE}'><range offset='512'/></file>"


def test_offset_that_was_not_offered_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        si.make_answer(si.Answer(method=si.BYTESTREAMS, offset=1), OFFER)


ONE = submit(si.BYTESTREAMS)


@pytest.mark.parametrize(
    ("element", "method", "offset"),
    [
        pytest.param(answer(ONE), si.BYTESTREAMS, 0, id="the specification"),
        pytest.param(answer(file(""), ONE), si.BYTESTREAMS, 0, id="complete example, Libervia"),
        pytest.param(answer(submit(*BOTH)), si.BYTESTREAMS, 0, id="Smack <= 4.3: two values"),
        pytest.param(answer(submit(si.IBB)), si.IBB, 0, id="slixmpp: in-band"),
        pytest.param(
            answer(submit(OOB, "", si.IBB)), si.IBB, 0, id="what was not offered is skipped"
        ),
        pytest.param(
            answer(submit(si.BYTESTREAMS, kind="type='text-single'")),
            si.BYTESTREAMS,
            0,
            id="gloox",
        ),
        pytest.param(answer(ONE.replace("type='submit'", "")), si.BYTESTREAMS, 0, id="no type"),
        pytest.param(
            offer(ONE, attributes=f"id='a0' profile='{si.NS_FILE}'"),
            si.BYTESTREAMS,
            0,
            id="QXmpp: attributes on the result",
        ),
        pytest.param(
            answer(file("", "<range offset='512'/>"), ONE),
            si.BYTESTREAMS,
            512,
            id="Psi: offset",
        ),
        pytest.param(
            answer(ONE, file("", "<range/>")), si.BYTESTREAMS, 0, id="range without offset"
        ),
        pytest.param(
            answer(ONE, file("", "<range offset='1022'/>")),
            si.BYTESTREAMS,
            1022,
            id="all there",
        ),
    ],
)
def test_answers_of_real_clients_are_read(element: Element, method: str, offset: int) -> None:
    assert si.read_answer(element, OFFER) == si.Answer(method=method, offset=offset)


def test_recorded_answer_with_two_values_is_read() -> None:
    """Spark 2.6.3, as it was written down."""
    element = fromstring("""
      <si xmlns="http://jabber.org/protocol/si">
        <feature xmlns="http://jabber.org/protocol/feature-neg">
            <x xmlns="jabber:x:data" type="submit">
                <field var="stream-method">
                     <value>http://jabber.org/protocol/bytestreams</value>
                     <value>http://jabber.org/protocol/ibb</value>
                </field>
             </x>
        </feature>
     </si>""")
    assert si.read_answer(element, OFFER) == si.Answer(method=si.BYTESTREAMS)


@pytest.mark.parametrize(
    "element",
    [
        pytest.param(None, id="nothing"),
        pytest.param(answer(), id="no feature"),
        pytest.param(answer(submit()), id="no value"),
        pytest.param(answer(submit(OOB)), id="not offered"),
        *(
            pytest.param(
                answer(ONE, file("", f"<range offset='{offset}'/>")), id=f"at {offset}"
            )
            for offset in ("-1", "1023", "x", "", "9" * 99)
        ),
    ],
)
def test_impossible_answers_are_the_peers_fault(element: Element | None) -> None:
    with pytest.raises(RemoteProtocolError):
        si.read_answer(element, OFFER)


@pytest.mark.parametrize(
    ("span", "length"),
    [
        ("offset='22' length='100'", 100),
        ("length='0'", 0),
        # Kopete says how much is left; that is all the rest.
        ("offset='22' length='1000'", None),
        ("offset='22' length='5000'", None),
        ("offset='22'", None),
    ],
)
def test_length_of_a_range_is_read(span: str, length: int | None) -> None:
    element = answer(submit(si.BYTESTREAMS), file("", f"<range {span}/>"))
    assert si.read_answer(element, OFFER).length == length


@pytest.mark.parametrize("length", ["-1", "many", ""])
def test_length_that_is_none_is_the_peers_fault(length: str) -> None:
    element = answer(submit(si.BYTESTREAMS), file("", f"<range length='{length}'/>"))
    with pytest.raises(RemoteProtocolError):
        si.read_answer(element, OFFER)


def test_seal_that_is_too_long_is_refused_in_offer_and_answer() -> None:
    seal = f"<seal xmlns='{si.NS_SEAL}' key='{'x' * 5000}'/>"
    with pytest.raises(StanzaError):
        si.read_offer(offer(FILE, FEATURE, seal))
    with pytest.raises(RemoteProtocolError):
        si.read_answer(answer(submit(si.BYTESTREAMS), seal), OFFER)


def test_offset_in_a_file_of_unknown_size_has_a_limit_too() -> None:
    unknown = replace(OFFER, size=None)
    huge = answer(ONE, file("", f"<range offset='{2**63}'/>"))
    assert si.read_answer(answer(ONE, file("", "<range offset='7'/>")), unknown).offset == 7
    with pytest.raises(RemoteProtocolError):
        si.read_answer(huge, unknown)


# Receipts


def test_finish_and_receipt_are_written_as_attributes() -> None:
    digest = base64.b64encode(FINISH.digest).decode()
    attributes = f"xmlns='urn:syncd:sync:1' sid='a0' size='1022' blake3='{digest}'"
    assert written(si.make_finish(FINISH)) == f"<finish {attributes}/>"
    assert written(si.make_receipt(FINISH)) == f"<receipt {attributes}/>"


def test_of_a_sealed_file_neither_shows_the_hash() -> None:
    attributes = "xmlns='urn:syncd:sync:1' sid='a0' size='1022'"
    signature = f"signature='{'B' * 86}=='"
    question = f"<finish {attributes} sealed='{'A' * 1_600}' {signature}/>"
    assert written(si.make_finish(SEALED_FINISH)) == question
    assert written(si.make_receipt(SEALED_RECEIPT)) == f"<receipt {attributes} {signature}/>"
    # An iq adds two JIDs and an id to it: as much as every server lets pass (RFC 6120 13.12).
    assert len(question) < 2_000


def without(name: str) -> Callable[[Element], None]:
    def damage(element: Element) -> None:
        del element.attrib[name]

    return damage


def with_value(name: str, value: str) -> Callable[[Element], None]:
    return lambda element: element.set(name, value)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("sid"), id="no sid"),
        pytest.param(with_value("sid", ""), id="empty sid"),
        pytest.param(with_value("sid", LONG), id="long sid"),
        pytest.param(without("size"), id="no size"),
        pytest.param(with_value("size", "-1"), id="negative"),
        pytest.param(with_value("size", "x"), id="no number"),
        pytest.param(without("blake3"), id="no hash"),
        pytest.param(with_value("blake3", "AAAA"), id="short hash"),
        pytest.param(with_value("blake3", "A" * 5_000), id="long hash"),
        pytest.param(with_value("blake3", "!" * 44), id="no base64"),
        pytest.param(with_value("blake3", "é" * 44), id="not even ASCII"),
    ],
)
def test_damaged_finish_and_receipt_are_refused(damage: Callable[[Element], None]) -> None:
    question, receipt = si.make_finish(FINISH), si.make_receipt(FINISH)
    damage(question)
    damage(receipt)
    with pytest.raises(StanzaError) as caught:
        si.read_finish(question)
    assert caught.value.condition == "bad-request"
    with pytest.raises(RemoteProtocolError):
        si.read_receipt(receipt)


HASH = base64.b64encode(FINISH.digest).decode()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("sealed"), id="nothing sealed"),
        pytest.param(without("signature"), id="no signature"),
        pytest.param(with_value("sealed", "A" * 5_000), id="too much"),
        pytest.param(with_value("signature", "A" * 5_000), id="long signature"),
        pytest.param(with_value("blake3", HASH), id="the hash beside it"),
        pytest.param(with_value("blake3", ""), id="an empty hash beside it"),
    ],
)
def test_damaged_finish_of_a_sealed_file_is_refused(damage: Callable[[Element], None]) -> None:
    question = si.make_finish(SEALED_FINISH)
    damage(question)
    with pytest.raises(StanzaError, match="either blake3 or sealed and signature"):
        si.read_finish(question)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(without("signature"), id="no signature"),
        pytest.param(with_value("signature", "A" * 5_000), id="long signature"),
        pytest.param(with_value("blake3", HASH), id="the hash beside it"),
        pytest.param(with_value("blake3", ""), id="an empty hash beside it"),
    ],
)
def test_damaged_receipt_of_a_sealed_file_is_refused(damage: Callable[[Element], None]) -> None:
    receipt = si.make_receipt(SEALED_RECEIPT)
    damage(receipt)
    with pytest.raises(RemoteProtocolError, match="malformed"):
        si.read_receipt(receipt)


@pytest.mark.parametrize("element", [None, si.make_finish(FINISH)])
def test_other_payloads_are_no_receipt(element: Element | None) -> None:
    with pytest.raises(RemoteProtocolError):
        si.read_receipt(element)
