import hashlib
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.bytestreams import s5b
from syncd.bytestreams.s5b import Streamhost
from syncd.errors import ErrorType, RemoteProtocolError, StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import serialise

REQUESTER = JID.parse("requester@example.com/foo")
TARGET = JID.parse("target@example.org/bar")
PROXY = JID.parse("streamer.example.com")
SID = "vxf9n471bn46"


def written(element: Element) -> str:
    return serialise(element).decode().replace("'", '"')


def query(inside: str, attributes: str = "sid='s'") -> s5b.Query:
    return s5b.read_query(fromstring(f"<query xmlns='{s5b.NS}' {attributes}>{inside}</query>"))


def streamhost(host: str = "192.168.4.1", port: str = "5086", jid: str = "a@b/c") -> str:
    return f"<streamhost jid='{jid}' host='{host}' port='{port}'/>"


def test_address_is_the_hash_of_sid_requester_and_target() -> None:
    """XEP-0065 section 5.3.2, with the values of its examples."""
    assert s5b.dstaddr(SID, REQUESTER, TARGET) == "98b8d688d0f5d895fd41c5e7309a2e9e33ba32ff"


def test_aliases_are_what_careless_clients_compute() -> None:
    requester, target = JID.parse("ré@example.com/rж"), JID.parse("b@example.org/UP")
    latin = hashlib.sha1(b"Sr\xe9@example.com/r?b@example.org/UP").hexdigest()
    lower = hashlib.sha1("Sré@example.com/rжb@example.org/up".encode()).hexdigest()
    assert s5b.dstaddr_aliases("S", requester, target) == (latin, lower)
    assert s5b.dstaddr_aliases(SID, REQUESTER, TARGET) == ()


def test_query_is_written_as_in_the_specification() -> None:
    """XEP-0065 section 5.3.1."""
    element = s5b.make_query(SID, [Streamhost(REQUESTER, "192.168.4.1", 5086)])
    assert written(element) == (
        f'<query xmlns="{s5b.NS}" sid="vxf9n471bn46" mode="tcp">'
        '<streamhost jid="requester@example.com/foo" host="192.168.4.1" port="5086"/></query>'
    )


hosts = st.builds(
    Streamhost,
    st.sampled_from([REQUESTER, TARGET, PROXY]),
    st.one_of(
        st.ip_addresses(v=4).filter(lambda a: not a.is_unspecified and not a.is_multicast),
        st.ip_addresses(v=6).filter(lambda a: not a.is_unspecified and not a.is_multicast),
        st.just("proxy.example.com"),
    ).map(str),
    st.integers(1, 65535),
)


@given(st.lists(hosts, max_size=16, unique_by=lambda each: (each.host, each.port)))
def test_what_is_written_is_read_back(streamhosts: list[Streamhost]) -> None:
    read = s5b.read_query(s5b.make_query(SID, streamhosts))
    assert read == s5b.Query(sid=SID, streamhosts=tuple(streamhosts))


def test_the_order_of_the_streamhosts_is_kept() -> None:
    """XEP-0065 section 5.3.2: to be tried in the order of the children."""
    read = query(streamhost("z.example") + streamhost("a.example") + streamhost("m.example"))
    assert [each.host for each in read.streamhosts] == ["z.example", "a.example", "m.example"]


@pytest.mark.parametrize(
    "broken",
    [
        streamhost(host=""),
        streamhost(host="0.0.0.0"),
        streamhost(host="::"),
        streamhost(host="224.0.0.1"),
        streamhost(host="fe80::1%eth0"),
        streamhost(host="a b"),
        streamhost(host="a&#10;b"),
        streamhost(host="x" * 256),
        streamhost(port="0"),
        streamhost(port="65536"),
        streamhost(port="-1"),
        streamhost(port="+80"),
        streamhost(port="8_0"),
        streamhost(port="\u0668\u0660"),
        streamhost(port="9" * 5000),
        streamhost(port="x"),
        streamhost(jid=""),
        streamhost(jid="@"),
        "<streamhost host='192.0.2.1' port='1'/>",
        "<streamhost jid='a@b/c' port='1'/>",
        "<streamhost jid='a@b/c' zeroconf='_jabber.bytestreams'/>",
        "<streamhost xmlns='other' jid='a@b/c' host='192.0.2.1' port='1'/>",
        "<fast xmlns='http://affinix.com/jabber/stream'/>",
    ],
)
def test_what_cannot_be_used_is_left_out(broken: str) -> None:
    read = query(broken + streamhost("good.example"))
    assert [each.host for each in read.streamhosts] == ["good.example"]


def test_a_doubled_streamhost_counts_once() -> None:
    read = query(streamhost("a") + streamhost("a", jid="d@e/f") + streamhost("a", port="1"))
    assert [(str(each.jid), each.port) for each in read.streamhosts] == [
        ("a@b/c", 5086),
        ("a@b/c", 1),
    ]


def test_a_missing_port_is_1080() -> None:
    """XEP-0065 section 9.2."""
    (only,) = query("<streamhost jid='a@b/c' host='h'/>").streamhosts
    assert only.port == 1080


def test_no_more_than_sixteen_streamhosts_are_read() -> None:
    read = query("".join(streamhost(f"h{n}") for n in range(100)))
    assert [each.host for each in read.streamhosts] == [f"h{n}" for n in range(16)]


def test_an_address_from_the_requester_is_kept_in_its_spelling() -> None:
    """XEP-0065 section 7."""
    address = "416781edf1ae50bad01cb8509ba35b43952bc345".upper()
    assert query("", f"sid='s' dstaddr='{address}'").dstaddr == address
    assert query("", "sid='s' dstaddr='evil'").dstaddr is None
    assert query("").dstaddr is None


@pytest.mark.parametrize(
    ("attributes", "condition"),
    [
        ("", "bad-request"),
        ("sid=''", "bad-request"),
        (f"sid='{'x' * 257}'", "bad-request"),
        ("sid='s' mode='udp'", "not-acceptable"),
        ("sid='s' mode='carrier-pigeon'", "not-acceptable"),
    ],
)
def test_an_opening_that_cannot_be_served_is_refused(attributes: str, condition: str) -> None:
    """XEP-0065 section 5.3.1."""
    with pytest.raises(StanzaError) as caught:
        query(streamhost(), attributes)
    assert (caught.value.type, caught.value.condition) == (ErrorType.MODIFY, condition)


def test_another_element_is_refused() -> None:
    with pytest.raises(StanzaError):
        s5b.read_query(fromstring("<query xmlns='other' sid='s'/>"))


def test_the_target_says_which_streamhost_it_uses() -> None:
    """XEP-0065 section 5.3.3."""
    own, proxy = Streamhost(REQUESTER, "192.168.4.1", 5086), Streamhost(PROXY, "24.24.24.1", 7)
    answer = s5b.make_used(SID, PROXY)
    assert written(answer) == (
        f'<query xmlns="{s5b.NS}" sid="vxf9n471bn46">'
        '<streamhost-used jid="streamer.example.com"/></query>'
    )
    assert s5b.read_used(answer, [own, proxy]) == (proxy,)


def test_a_streamhost_with_several_addresses_is_named_with_all_of_them() -> None:
    both = [Streamhost(PROXY, "192.0.2.1", 7777), Streamhost(PROXY, "2001:db8::1", 7777)]
    answer = fromstring(f"<query xmlns='{s5b.NS}'><streamhost-used jid='{PROXY}'/></query>")
    assert s5b.read_used(answer, both) == tuple(both)


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("", "did not say"),
        ("<streamhost-used/>", "did not say"),
        ("<streamhost-used jid='@'/>", "did not say"),
        ("<streamhost-used jid='evil.example'/>", "was not offered"),
    ],
)
def test_a_target_that_names_no_offered_streamhost_is_wrong(inside: str, words: str) -> None:
    offered = [Streamhost(PROXY, "192.0.2.1", 7777)]
    answer = fromstring(f"<query xmlns='{s5b.NS}'>{inside}</query>")
    with pytest.raises(RemoteProtocolError, match=words):
        s5b.read_used(answer, offered)
    with pytest.raises(RemoteProtocolError):
        s5b.read_used(None, offered)


def test_a_proxy_is_asked_where_it_is_and_told_to_activate() -> None:
    """XEP-0065 sections 4 and 6.3.5."""
    assert written(s5b.make_address_request()) == f'<query xmlns="{s5b.NS}"/>'
    assert written(s5b.make_activate(SID, TARGET)) == (
        f'<query xmlns="{s5b.NS}" sid="vxf9n471bn46">'
        "<activate>target@example.org/bar</activate></query>"
    )


def test_a_proxy_answers_with_addresses_and_its_own_jid() -> None:
    """That of ejabberd has a resource, the machine of Openfire several addresses."""
    answer = fromstring(
        f"<query xmlns='{s5b.NS}'>"
        "<streamhost host='24.24.24.1' jid='proxy.example.com/70306884' port='7625'/>"
        "<streamhost host='fe80::1%eth0' jid='proxy.example.com/70306884' port='7625'/>"
        "</query>"
    )
    jid = JID.parse("proxy.example.com/70306884")
    assert s5b.read_addresses(answer) == (Streamhost(jid, "24.24.24.1", 7625),)


def test_a_proxy_without_an_address_is_no_use() -> None:
    for answer in (None, fromstring(f"<query xmlns='{s5b.NS}'/>")):
        with pytest.raises(RemoteProtocolError, match="did not say"):
            s5b.read_addresses(answer)


def test_a_streamhost_is_shown_as_people_write_it() -> None:
    assert str(Streamhost(PROXY, "h", 1)) == "h:1"
    assert str(Streamhost(PROXY, "2001:db8::1", 1)) == "[2001:db8::1]:1"
