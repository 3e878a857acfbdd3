"""The gate: real clients' requests pass, wrong ones are refused with the reason."""

from __future__ import annotations

import contextlib
import sys
from xml.etree.ElementTree import Element

import pytest

from syncd.bytestreams import s5b
from syncd.errors import StanzaError
from syncd.transfer import schema, si
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import MAX_ATTRIBUTES, NS_CLIENT, NS_STREAMS, StreamParser

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
FINISH = "<finish xmlns='urn:syncd:sync:1' sid='a' size='1'"
RECEIPT = "<receipt xmlns='urn:syncd:sync:1' sid='a' size='1'"
# What 32 + 64 + 16 bytes make in base64, and 1,120 + 64 + 16; a BLAKE3, and a signature.
HIDDEN, LATTICE = "A" * 150 + "==", "A" * 1_600
BLAKE3 = f"blake3='{'A' * 43}='"
SIGNED = {"signature": "A" * 86 + "=="}
SIGNATURE = f"signature='{SIGNED['signature']}'"


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
        si.make_finish(si.Finish(sid="a", size=3, seal={"sealed": HIDDEN, **SIGNED})),
        si.make_finish(si.Finish(sid="a", size=3, seal={"sealed": LATTICE, **SIGNED})),
        si.make_receipt(si.Finish(sid="a", size=3, digest=b"x" * 32, beside=True)),
        si.make_receipt(si.Finish(sid="a", size=3, seal=SIGNED, beside=True)),
        s5b.make_query("a", [s5b.Streamhost(JID.parse("a@b/c"), "192.0.2.1", 5)]),
    ],
    ids=[
        "offer",
        "finish",
        "sealed finish",
        "hybrid finish",
        "receipt",
        "signed receipt",
        "query",
    ],
)
def test_what_syncd_sends_passes(payload: Element) -> None:
    schema.check(payload)


NS_FORM = "xmlns='jabber:x:data'"
FEATURE = "<feature xmlns='http://jabber.org/protocol/feature-neg'>"
BYTESTREAMS = "<option><value>http://jabber.org/protocol/bytestreams</value></option>"
IBB = "<option><value>http://jabber.org/protocol/ibb</value></option>"
OOB = "<option><value>jabber:iq:oob</value></option>"
NINE = "<x xmlns='u'/>" * 9
OPEN = "<open xmlns='http://jabber.org/protocol/ibb'"


def form(*children: str, kind: str = " type='form'", field: str = " type='list-single'") -> str:
    """A form with one field for the stream methods."""
    return (
        f"{FEATURE}<x {NS_FORM}{kind}><field var='stream-method'{field}>{''.join(children)}"
        "</field></x></feature>"
    )


def offer(*children: str, sid: str = "a0", attributes: str = "") -> str:
    """An offer of a file."""
    return f"{SI.replace('a0', sid)}{attributes}>{''.join(children)}</si>"


# By document and example, children and attributes in the order that stands there.
EXAMPLES = {
    "XEP-0020 offer": offer(
        f"""
    {FEATURE}
    <x {NS_FORM} type='form'>
      <field var='FORM_TYPE' type='hidden'>
        <value>romantic_meetings</value>
      </field>
      <field type='list-single' var='places-to-meet'>
         <option><value>Secret Grotto</value></option>
         <option><value>Verona Park</value></option>
      </field>
      <field type='list-single' var='times-to-meet'>
         <option><value>22:00</value></option>
         <option><value>22:30</value></option>
         <option><value>23:00</value></option>
      </field>
    </x>
    </feature>"""
    ),
    "XEP-0020 a feature is asked for": offer(
        f"{FEATURE}<x {NS_FORM} type='submit'><field var='muc-password'/></x></feature>"
    ),
    "XEP-0095 offer": offer(
        f"{FILE} name='test.txt' size='1022'><desc>This is info about the file.</desc></file>",
        form(BYTESTREAMS, OOB, IBB),
        attributes=" mime-type='text/plain'",
    ),
    "XEP-0096 simple": offer(
        f"""
    {FILE}
          name='test.txt'
          size='1022'/>
    {form(BYTESTREAMS, IBB)}
    """,
        attributes=" mime-type='text/plain'",
    ),
    "XEP-0096 complete": offer(
        f"{FILE} name='test.txt' size='1022' hash='552da749930852c69ae5d2141d3766b1'"
        " date='1969-07-21T02:56:15Z'><desc>This is a test. If this were a real file...</desc>"
        "</file>",
        form(BYTESTREAMS, IBB),
        attributes=" mime-type='text/plain'",
    ),
    "XEP-0096 range": offer(
        f"{FILE} name='test.txt' size='1022'><range/></file>", form(BYTESTREAMS, IBB)
    ),
    "XEP-0096 range of a length": offer(
        f"{FILE} name='a' size='1022'><range length='256'/></file>", form(BYTESTREAMS, IBB)
    ),
    "XEP-0096 range in the middle": offer(
        f"{FILE} name='a' size='1022'><range offset='128' length='256'/></file>", form(IBB)
    ),
    "XEP-0065 direct": f"{S5B} sid='vxf9n471bn46'><streamhost jid='requester@example.com/foo'"
    " host='192.168.4.1' port='5086'/></query>",
    "XEP-0065 mediated": f"{S5B} sid='vxf9n471bn46'><streamhost host='24.24.24.1'"
    " jid='streamer.example.com' port='7625'/></query>",
    "XEP-0065 through a room": f"{S5B} dstaddr='416781edf1ae50bad01cb8509ba35b43952bc345'"
    " sid='yia72g3v49j7'><streamhost host='24.24.24.1' jid='streamer.example.com' port='7625'/>"
    "</query>",
    # understood, and refused by the reader, which knows the better error
    "XEP-0065 udp": f"{S5B}\n\t mode='udp' sid='mySID'>\n<streamhost host='192.168.4.1'"
    " jid='requester@example.com/foo' port='5086'/>\n</query>",
    "XEP-0047 open": f"{OPEN}\n block-size='4096'\n sid='i781hf64'\n stanza='iq'/>",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_xeps_pass(name: str) -> None:
    schema.check(parse(EXAMPLES[name]))


NS_FAST = "xmlns='http://affinix.com/jabber/stream'"

# What each client was seen to send, or sends by its source.
CLIENTS = {
    # the article on Smack: no types but these, <feature/> in front of <file/>
    "Smack, article": offer(
        FORM,
        f"{FILE} name='img0545.png' size='152443'><desc>send</desc></file>",
        attributes=" mime-type='text/plain'",
    ),
    "Smack": offer(
        f"{FILE} name='a' size='5'><desc>d</desc></file>",
        form(BYTESTREAMS, IBB),
        sid="jsi_-1829",
        attributes=" mime-type='image/png'",
    ),
    "Smack, empty file": offer(f"{FILE} name='empty'/>", form(BYTESTREAMS, IBB), sid="jsi_1"),
    "Smack, streamhosts": f"{S5B} sid='jsi_1' mode='tcp'><streamhost jid='a@b/c' host='::1'"
    " port='7777'/><streamhost jid='proxy.b' host='proxy.b' port='7777'/></query>",
    "Smack, zeroconf": f"{S5B} sid='jsi_1'><streamhost jid='a@b/c' host='h'"
    " zeroconf='_jabber.bytestreams'/></query>",
    "Smack, IBB": f"{OPEN} block-size='4096' sid='jsi_1' stanza='iq'/>",
    "Openfire": f"{S5B} sid='a' mode='tcp'><streamhost jid='proxy.b' host='fe80::1%eth0'"
    " port='7777'/><streamhost jid='proxy.b' host='192.0.2.1' port='7777'/></query>",
    "XMPPFramework": offer(
        f"{FILE} name='a' size='5'><desc>d</desc></file>", form(BYTESTREAMS, IBB)
    ),
    "XMPPFramework, streamhosts": f"{S5B} sid='a' mode='tcp'><streamhost jid='a@b/c'"
    " host='0.0.0.0' port='50000'/></query>",
    "QXmpp": offer(
        f"{FILE} date='2020-01-02T03:04:05Z' hash='552da749930852c69ae5d2141d3766b1' name='a'"
        " size='5'><desc/></file>",
        form(IBB, BYTESTREAMS),
    ),
    "QXmpp, empty file": offer(
        f"{FILE} date='2020-01-02T03:04:05Z' name='a'"
        " hash='d41d8cd98f00b204e9800998ecf8427e'/>",
        form(IBB, BYTESTREAMS),
    ),
    "QXmpp, no name": offer(f"{FILE} size='5'/>", form(IBB)),  # refused by the reader
    "QXmpp, IBB": f"{OPEN} sid='a' block-size='4096'/>",
    "Psi": offer(
        f"{FILE} name='a' size='5'><range/><thumbnail xmlns='urn:xmpp:thumbs:1'"
        " cid='sha1+x@bob.xmpp.org' mime-type='image/png' width='64' height='64'/></file>",
        form(BYTESTREAMS, IBB),
        sid="ft_0001",
        attributes=" flavour='plum'",
    ),
    "Psi, fast": f"{S5B} sid='ft_0001' mode='tcp'><streamhost jid='a@b/c' host='192.0.2.1'"
    f" port='8010'/><streamhost jid='proxy.b' host='h' port='1'><proxy {NS_FAST}/></streamhost>"
    f"<fast {NS_FAST}/></query>",
    "libpurple": offer(f"{FILE} name='a' size='5'/>", form(BYTESTREAMS, IBB), sid="purple1a2b"),
    "libpurple, streamhosts": f"{S5B} sid='purple1a2b' mode='tcp'><streamhost jid='a@b/c'"
    " host='192.0.2.1' port='41234'/><streamhost jid='proxy.b' host='h' port='7777'/></query>",
    "libpurple, IBB": f"{OPEN} sid='purple1a2b' block-size='4096'/>",
    "gloox": offer(
        f"\n{FILE} name='/home/a/b' size='1'/>\n",
        form(
            IBB.replace("<option>", "<option label='ibb'>"),
            OOB.replace("<option>", "<option label='oob'>"),
            BYTESTREAMS.replace("<option>", "<option label='s5b'>"),
            "<value/>",
        ),
    ),
    "gloox, IBB": f"{OPEN} sid='a' block-size='4096' stanza='iq'/>",
    "slixmpp": offer(f"{FILE} name='a' size='5'/>", form(BYTESTREAMS, IBB, field="")),
    "slixmpp, no proxy": f"{S5B} sid='a'/>",
    "slixmpp, IBB": f"{OPEN} block-size='8192' sid='a' stanza='iq'/>",
    "Gajim": offer(f"{FILE} name='a' size='5'><desc/><range/></file>", form(BYTESTREAMS, IBB)),
    "Gajim, streamhosts": f"{S5B} sid='a' mode='tcp'><streamhost jid='a@b/c' host='192.0.2.1'"
    f" port='28011'/><fast {NS_FAST}/></query>",
    "Vacuum-IM": offer(
        f"{FILE} name='a' size='5' date='2020-01-02T03:04:05Z'"
        " hash='552da749930852c69ae5d2141d3766b1'><desc>d</desc><range/></file>",
        form(BYTESTREAMS, IBB),
    ),
    "Vacuum-IM, streamhosts": f"{S5B} sid='a' mode='tcp'"
    " dstaddr='416781edf1ae50bad01cb8509ba35b43952bc345'><streamhost jid='a@b/c' host='h'"
    " port='1'/></query>",
    "Vacuum-IM, IBB by messages": f"{OPEN} sid='a' block-size='4096' stanza='message'/>",
    "gabble": offer(
        form(BYTESTREAMS, IBB),
        "<si-multiple xmlns='http://telepathy.freedesktop.org/xmpp/si-multiple'/>",
        f"{FILE} name='a' size='5' hash='552da749930852c69ae5d2141d3766b1'><range/></file>",
    ),
    "Libervia": offer(
        f"{FILE} name='a' size='5'/>",
        "<range xmlns='http://jabber.org/protocol/si/profile/file-transfer'/>",
        form(BYTESTREAMS, IBB),
    ),
    "errol": f"{S5B} sid='a'><streamhost jid='proxy.b' host='h' port='5000'/></query>",
    # a streamhost that lacks everything is skipped later, not a reason to refuse the rest
    "nobody": f"{S5B} sid='a'><streamhost/></query>",
}


@pytest.mark.parametrize("name", CLIENTS)
def test_what_real_clients_send_passes(name: str) -> None:
    schema.check(parse(CLIENTS[name]))


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
        (f"{S5B} sid=''/>", "<query/>"),
        (f"{S5B} sid='a'><activate>a@b/c</activate></query>", "<query/>"),
        (f"{S5B} sid='a'><streamhost-used jid='a@b/c'/></query>", "<query/>"),
        (
            f"{S5B} sid='a'><streamhost>{NINE}</streamhost></query>",
            "<streamhost/>",
        ),
        ("<streamhost xmlns='http://jabber.org/protocol/bytestreams'/>", "<streamhost/>"),
        (f"{OPEN} block-size='4096'/>", "<open/>"),
        (f"{OPEN} sid='a'/>", "<open/>"),
        (f"{OPEN} sid='' block-size='4096'/>", "<open/>"),
        (f"{OPEN} sid='{'a' * 129}' block-size='4096'/>", "<open/>"),
        (f"{OPEN} sid='a' block-size='0'/>", "<open/>"),
        (f"{OPEN} sid='a' block-size='-1'/>", "<open/>"),
        (f"{OPEN} sid='a' block-size='65536'/>", "<open/>"),
        (f"{OPEN} sid='a' block-size='4k'/>", "<open/>"),
        (f"{OPEN} sid='a' block-size='{'9' * 5_000}'/>", "<open/>"),
        (f"{OPEN} sid='a' block-size='1' stanza='presence'/>", "<open/>"),
        (f"{OPEN} sid='a' block-size='1'><open sid='b' block-size='1'/></open>", "<open/>"),
        (f"{OPEN} sid='a' block-size='1'>{NINE}</open>", "<open/>"),
        ("<data xmlns='http://jabber.org/protocol/ibb' sid='a' seq='0'>QQ==</data>", "<data/>"),
        ("<close xmlns='http://jabber.org/protocol/ibb' sid='a'/>", "<close/>"),
        (offer(FORM.replace("x xmlns", "y xmlns").replace("/x>", "/y>")), "<feature/>"),
        (offer(f"{FEATURE}</feature>"), "<feature/>"),
        (offer(FORM.replace("<field", "<field/><surprise/><field")), "<x/>"),
        (offer(FORM.replace("<option>", "<option><value/>")), "<option/>"),
        (offer(form(BYTESTREAMS * 65)), "<field/>"),
        (offer(FORM.replace("<field", "<field/>" * 32 + "<field")), "<x/>"),
        (offer("<x xmlns='u'/>" * 33), "<si/>"),
        (offer(f"{FILE} name='a'>{'<range/>' * 33}</file>"), "<file/>"),
        (offer(f"{FILE} name='a'><surprise/></file>"), "<file/>"),
        (offer(f"{FILE} name='{'a' * 4_097}'/>"), "<file/>"),
        (offer(f"{FILE} name='a' size='{'9' * 5_000}'/>"), "<file/>"),
        (offer(f"{FILE} name='a'><range><x/></range></file>"), "<range/>"),
        (offer(f"{FILE} name='a'><range length='1.5'/></file>"), "<range/>"),
        ("<feature xmlns='http://jabber.org/protocol/si'/>", "<feature/>"),
        ("<finish xmlns='urn:syncd:sync:1' sid='a' size='1'/>", "<finish/>"),
        ("<finish xmlns='urn:syncd:sync:1' sid='a' size='1' blake3='&amp;'/>", "<finish/>"),
        (f"{FINISH} blake3='QQ=='/>", "<finish/>"),
        (f"{FINISH} blake3='{'A' * 4_096}'/>", "<finish/>"),
        (f"{FINISH} sealed='{HIDDEN}'/>", "<finish/>"),
        (f"{FINISH} {SIGNATURE}/>", "<finish/>"),
        (f"{FINISH} {BLAKE3} {SIGNATURE}/>", "<finish/>"),
        (f"{FINISH} {BLAKE3} sealed='{HIDDEN}'/>", "<finish/>"),
        (f"{FINISH} {BLAKE3} sealed='{HIDDEN}' {SIGNATURE}/>", "<finish/>"),
        (f"{FINISH} blake3='' sealed='{HIDDEN}' {SIGNATURE}/>", "<finish/>"),
        (f"{FINISH} sealed='' {SIGNATURE}/>", "<finish/>"),
        (f"{FINISH} sealed='QQ==' {SIGNATURE}/>", "<finish/>"),
        (f"{FINISH} sealed='{LATTICE}AAAA' {SIGNATURE}/>", "<finish/>"),
        (f"{FINISH} sealed='{HIDDEN}' signature='QQ=='/>", "<finish/>"),
        (f"{RECEIPT}/>", "<receipt/>"),
        (f"{RECEIPT} {BLAKE3} {SIGNATURE}/>", "<receipt/>"),
        (f"{RECEIPT} signature='QQ=='/>", "<receipt/>"),
        ("<surprise xmlns='urn:syncd:sync:1'/>", "<surprise/>"),
    ],
)
def test_what_is_wrong_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(StanzaError) as caught:
        schema.check(parse(text))
    assert caught.value.condition == "bad-request"
    assert caught.value.text.startswith(f"{reason}: ")


@pytest.mark.parametrize("attributes", ["", f"{BLAKE3} {SIGNATURE}"])
def test_a_refusal_does_not_tell_where_things_lie_in_memory(attributes: str) -> None:
    """Xmlschema names its own objects when a key is missing."""
    with pytest.raises(StanzaError) as caught:
        schema.check(parse(f"{RECEIPT} {attributes}/>"))
    assert "blake3|@signature" in caught.value.text
    assert "0x" not in caught.value.text


def test_all_schemas_load() -> None:
    schema.warm_up()


XSI = "{http://www.w3.org/2001/XMLSchema-instance}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("type", "xs:int"),  # xmlschema raised a KeyError, which would have ended the daemon
        ("type", "file"),
        ("nil", "true"),
        ("schemaLocation", "urn:x file:///etc/passwd"),
        ("noNamespaceSchemaLocation", "http://192.0.2.1/x.xsd"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        offer(f"{FILE} name='a' size='1'/>"),
        f"{S5B} sid='a'><streamhost jid='a@b/c' host='h' port='1'/></query>",
        f"{OPEN} sid='a' block-size='1'/>",
        f"{OPEN} sid='a' block-size='1'><x xmlns='u'/></open>",
        "<finish xmlns='urn:syncd:sync:1' sid='a' size='1' blake3='QQ=='/>",
    ],
)
def test_a_peer_gives_the_validator_no_orders(text: str, name: str, value: str) -> None:
    """On no element, be it one that nobody knows."""
    for which in (0, -1):
        payload = parse(text)
        list(payload.iter())[which].set(f"{XSI}{name}", value)
        with pytest.raises(StanzaError, match="for documents"):
            schema.check(payload)


@pytest.mark.parametrize(
    "known",
    [
        "http://www.w3.org/1999/xhtml",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/09/xmldsig#",
        "http://schemas.xmlsoap.org/soap/envelope/",
    ],
)
def test_a_peer_makes_the_validator_load_nothing(known: str) -> None:
    """Xmlschema comes with schemas of its own, and loaded each that a stanza named."""
    before = set(schema._schema("si.xsd").maps.namespaces)
    schema.check(parse(offer(f"<html xmlns='{known}'/>", FORM)))
    assert set(schema._schema("si.xsd").maps.namespaces) == before


ATTRIBUTES = " ".join(f"a{number}=''" for number in range(MAX_ATTRIBUTES))

# Ways to keep the validator busy: how many elements, and what they make.
WORST = {
    "unknown": lambda count: offer(f"<x xmlns='u'>{'<y/>' * count}</x>"),
    "unknown and deep": lambda count: offer(
        ("<x xmlns='u'>" * 20 + "</x>" * 20) * (count // 20)
    ),
    "attributes": lambda count: offer(
        f"<x xmlns='u'>{f'<y {ATTRIBUTES}/>' * (count // (MAX_ATTRIBUTES + 1))}</x>"
    ),
    "options": lambda count: offer(form("<option/>" * count)),
    "values": lambda count: offer(form("<value/>" * count)),
    "features": lambda count: offer(f"{FEATURE}<x {NS_FORM}/></feature>" * (count // 2)),
    "ranges": lambda count: offer(f"{FILE} name='a'>{'<range/>' * count}</file>"),
    "streamhosts": lambda count: f"{S5B} sid='a'>{'<streamhost/>' * count}</query>",
}


def cost(payload: Element) -> int:
    """How many functions a check calls; a millisecond has some 10,000."""
    calls = 0

    def called(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        with contextlib.suppress(StanzaError):
            schema.check(payload)
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("name", WORST)
def test_what_a_check_costs_is_bounded(name: str) -> None:
    schema.warm_up()
    most = parse(WORST[name](schema.MAX_PARTS - 20))
    cost(most)  # the first one fills caches
    assert cost(most) <= 200_000
    for count in (2 * schema.MAX_PARTS, 4_000):
        # Counting them is all that is done.
        assert cost(parse(WORST[name](count))) <= 5 * schema.MAX_PARTS


@pytest.mark.parametrize("more", ["<y/>", "<y a=''/>"])
def test_too_many_parts_are_told(more: str) -> None:
    text = offer(
        f"<x xmlns='u'>{'<y/>' * (schema.MAX_PARTS - len(('si', 'id', 'p', 'x')))}</x>"
    )
    schema.check(parse(text))
    with pytest.raises(StanzaError, match=r"<si/>: over 512 elements and attributes"):
        schema.check(parse(text.replace("<y/>", more, 1).replace("</x>", "<y/></x>")))
