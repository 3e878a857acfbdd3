"""The gate: real clients' requests pass, wrong ones are refused with the reason."""

from __future__ import annotations

from xml.etree.ElementTree import Element

import pytest

from syncd.errors import StanzaError
from syncd.transfer import s5b, schema, si
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import NS_CLIENT, NS_STREAMS, StreamParser

OFFER = si.Offer(
    sid="a" * 32,
    name="x.txt",
    size=5,
    methods=(si.BYTESTREAMS, si.IBB),
    ranged=True,
    sync=si.Sync(folder="photos", path="a/b.txt", mtime_ns=5),
)
FILE = "<file xmlns='http://jabber.org/protocol/si/profile/file-transfer'"
FORM = (
    "<feature xmlns='http://jabber.org/protocol/feature-neg'><x xmlns='jabber:x:data'>"
    "<field var='stream-method'><option><value>http://jabber.org/protocol/bytestreams</value>"
    "</option></field></x></feature>"
)
SI = (
    "<si xmlns='http://jabber.org/protocol/si' id='a0'"
    " profile='http://jabber.org/protocol/si/profile/file-transfer'"
)
S5B = "<query xmlns='http://jabber.org/protocol/bytestreams'"
SYNC = "<sync xmlns='urn:syncd:sync:1'"


def parse(text: str) -> Element:
    """Read an element as it would come from a stream."""
    header = f"<stream:stream xmlns='{NS_CLIENT}' xmlns:stream='{NS_STREAMS}' version='1.0'>"
    _, element = StreamParser().feed(f"{header}{text}".encode())
    assert isinstance(element, Element), element
    return element


@pytest.mark.parametrize(
    "payload",
    [
        si.make_offer(OFFER),
        si.make_finish(si.Finish(sid="a", size=3, digest=b"x" * 32)),
        s5b.make_query("a", [s5b.Streamhost(JID.parse("a@b/c"), "192.0.2.1", 5)]),
    ],
    ids=["offer", "finish", "query"],
)
def test_what_syncd_sends_passes(payload: Element) -> None:
    schema.check(payload)


@pytest.mark.parametrize(
    "text",
    [
        # the article on Smack: no types but these, <feature/> in front of <file/>
        f"{SI} mime-type='text/plain'>{FORM}{FILE} name='img0545.png' size='152443'>"
        "<desc>send</desc></file></si>",
        # Smack and QXmpp leave a size of 0 out
        f"{SI}>{FILE} name='empty'/>{FORM}</si>",
        # XEP-0096, example 3
        f"{SI}>{FILE} name='test.txt' size='1022' hash='552da749930852c69ae5d2141d3766b1'"
        f" date='1969-07-21T02:56:15Z'><desc>This is a test.</desc></file>{FORM}</si>",
        # gloox: labels, an empty value behind the options, white space between
        f"{SI}>\n  {FILE} name='a' size='1'/>\n  <feature"
        " xmlns='http://jabber.org/protocol/feature-neg'><x xmlns='jabber:x:data' type='form'>"
        "<field type='list-single' var='stream-method'><option label='oob'><value>jabber:iq:oob"
        "</value></option><value/></field></x></feature></si>",
        # Psi: a thumbnail and a range in the file, attributes of nobody's namespace
        f"{SI} flavour='plum'>{FILE} name='a' size='1'><range offset='1' length='2'/>"
        f"<thumbnail xmlns='urn:xmpp:thumbs:1' cid='x'/></file>{FORM}</si>",
        # Psi's fast mode, Vacuum's dstaddr
        f"{S5B} sid='ft_0001' mode='tcp' dstaddr='x'><streamhost jid='a@b/c' host='h' port='1'>"
        "<proxy xmlns='http://affinix.com/jabber/stream'/></streamhost>"
        "<fast xmlns='http://affinix.com/jabber/stream'/></query>",
        # a streamhost that lacks everything is skipped later, not a reason to refuse the rest
        f"{S5B} sid='a'><streamhost/></query>",
    ],
)
def test_what_real_clients_send_passes(text: str) -> None:
    schema.check(parse(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{SI}>{FILE} name='a' size='-5'/>{FORM}</si>", "<file/>"),
        (f"{SI}>{FILE} name='a' size='9223372036854775808'/>{FORM}</si>", "<file/>"),
        (f"{SI}>{FILE} name='a' size='large'/>{FORM}</si>", "<file/>"),
        (f"{SI}>{FILE} name='' size='1'/>{FORM}</si>", "<file/>"),
        (f"{SI}>{FILE} name='a' size='1'><range offset='-1'/></file>{FORM}</si>", "<range/>"),
        (f"{SI.replace(' id=', ' di=')}>{FILE} name='a' size='1'/>{FORM}</si>", "<si/>"),
        (f"{SI.replace('a0', 'a' * 129)}>{FILE} name='a' size='1'/>{FORM}</si>", "<si/>"),
        (f"{SI}>{FORM}{SYNC} folder='../x' path='a' mtime-ns='1'/></si>", "<sync/>"),
        (f"{SI}>{FORM}{SYNC} folder='x' path='' mtime-ns='1'/></si>", "<sync/>"),
        (f"{SI}>{FORM}{SYNC} folder='x' path='a' mtime-ns='-1'/></si>", "<sync/>"),
        (f"{SI}>{FORM}{SYNC} folder='x' path='a' mtime-ns='1'><child/></sync></si>", "<sync/>"),
        (f"{S5B}><streamhost jid='a@b/c' host='h' port='1'/></query>", "<query/>"),
        (f"{S5B} sid='{'a' * 129}'/>", "<query/>"),
        (f"{S5B} sid='a'>{'<streamhost/>' * 257}</query>", "<query/>"),
        ("<finish xmlns='urn:syncd:sync:1' sid='a' size='1'/>", "<finish/>"),
        ("<finish xmlns='urn:syncd:sync:1' sid='a' size='1' blake3='&amp;'/>", "<finish/>"),
        ("<surprise xmlns='urn:syncd:sync:1'/>", "<surprise/>"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(StanzaError) as caught:
        schema.check(parse(text))
    assert caught.value.condition == "bad-request"
    assert caught.value.text.startswith(f"{reason}: ")


def test_all_schemas_load() -> None:
    schema.warm_up()
