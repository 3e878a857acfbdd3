"""What was done to other XMPP programs, done to this one.

Each test is named after the class of attack (path traversal and what else concerns files has
its own tests). Many of the inputs are in the twins of the modules as well, where they prove a
rule; here they come at a whole stream, or at a session.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from syncd.bytestreams import s5b
from syncd.errors import (
    AuthenticationError,
    OfflineError,
    RemoteProtocolError,
    StanzaError,
    SyncdError,
)
from syncd.link.connect import Connection
from syncd.link.session import Session
from syncd.transfer import schema, si
from syncd.xmpp import xml
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import Iq
from syncd.xmpp.stream import State, StreamEnded, TLSWanted
from syncd.xmpp.xml import MAX_ATTRIBUTES, MAX_DEPTH, MAX_STANZA, MIN_EXPAT, check_expat, make
from tests.fuzz import memory
from tests.support.wire import (
    C_FOOTER,
    C_HEADER,
    C_STARTTLS,
    LAPTOP,
    S_FOOTER,
    S_HEADER,
    S_PROCEED,
    S_STARTTLS_FEATURES,
    Server,
    features,
    mechanisms,
    new_stream,
    open_stream,
    play,
    told,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from xml.etree.ElementTree import Element

    from syncd.link.session import Handler

BOB = JID.parse("bob@example.org/pc")
LOL = (
    "<!DOCTYPE lolz [<!ENTITY lol0 'lol'>"
    + "".join(f"<!ENTITY lol{n + 1} '{f'&lol{n};' * 10}'>" for n in range(9))
    + "]><lolz>&lol9;</lolz>"
)


def last_words(text: str, *, opened: bool = True) -> str:
    """What a stream answers to what ends it."""
    stream = open_stream() if opened else new_stream(secure=True)
    stream.data_to_send()
    events = stream.receive_data(text.encode())
    assert isinstance(events[-1], StreamEnded)
    assert isinstance(events[-1].error, RemoteProtocolError)
    assert len(events) == 1, told(events)
    # Nothing is heard any more, so nothing can be smuggled in behind it.
    assert stream.receive_data(b"<presence/>") == []
    answer = stream.data_to_send().decode()
    assert answer.endswith(f"</stream:error>{C_FOOTER}")
    return answer.removeprefix("<stream:error><").partition(" ")[0]


# C-07: what one parser reads in another way than the next


@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE a>",
        "<!DOCTYPE stream:stream SYSTEM 'file:///etc/passwd'>",
        "<!DOCTYPE a [<!ENTITY b SYSTEM 'http://192.0.2.1/'>]>",
        "<!ENTITY a 'b'>",
        "<!-- x -->",
        "<?xml-stylesheet href='x'?>",
        "<message><body><!-- x --></body></message>",
        "<message><?x y?></message>",
        "<message><body>&xxe;</body></message>",
    ],
)
@pytest.mark.parametrize("opened", [True, False])
def test_c07_what_xmpp_leaves_out_of_xml_ends_the_stream(text: str, opened: bool) -> None:
    """RFC 6120 section 11.1; before the header, and among the stanzas."""
    condition = last_words(text, opened=opened)
    assert condition == ("restricted-xml" if opened or text[1] in "!?" else "bad-format")


@pytest.mark.parametrize(
    "text",
    [
        "<stream:stream>",
        "<message><body><stream:stream/></body></message>",
        "<message><stream:stream><iq type='set' id='1' from='example.org'/></stream:stream>",
        "<message><x:stream xmlns:x='http://etherx.jabber.org/streams'/></message>",
    ],
)
def test_c07_nested_stream_is_refused(text: str) -> None:
    """CVE-2022-20917: a parser that began anew there took the rest for stanzas."""
    assert last_words(text) == "bad-format"


@pytest.mark.parametrize(
    "text",
    [
        "<message><body>\xc0\xaf</body></message>",  # overlong "/"
        "<message><body>\xc0\xbciq/\xc0\xbe</body></message>",  # overlong "<" and ">"
        "<message><body>\xed\xa0\x80</body></message>",  # a surrogate
        "<message><body>\xf8\x88\x80\x80\x80</body></message>",
        "<message to='\xe3\x80'/>",
        "<message><body>\0</body></message>",
        "<message><body>&#0;</body></message>",
        "<message><body>&#xFFFE;</body></message>",
        "<message type='chat' type='error'/>",
        "<message xmlns:a='u' xmlns:b='u' a:x='1' b:x='2'/>",
        "<a:message xmlns:a='jabber:client}iq'/>",
        "<message/></message>",
        "<message><body></message></body>",
        "<message a='<iq/>'/>",
        "<message><body>]]></body></message>",
    ],
)
def test_c07_bytes_that_parsers_disagree_on_are_refused(text: str) -> None:
    """CVE-2022-25235 and 25236, CVE-2022-22784 to 22787."""
    stream = open_stream()
    events = stream.receive_data(text.encode("latin-1"))
    assert "not-well-formed" in told(events)[-1]
    assert not any("iq" in each for each in told(events)[:-1])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_c07_no_other_encoding_is_a_stream(encoding: str) -> None:
    stream = new_stream(secure=True)
    events = stream.receive_data(S_HEADER.encode(encoding))
    assert "[unsupported-encoding]" in told(events)[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-7", "iso-8859-1", "us-ascii", "x" * 200])
def test_c07_no_other_encoding_is_named(encoding: str) -> None:
    declared = f"<?xml version='1.0' encoding='{encoding}'?>"
    assert last_words(declared, opened=False) == "unsupported-encoding"


@pytest.mark.parametrize(
    "text",
    [
        "<message><body>&lt;/body>&lt;/message>&lt;iq type='set' id='1'/></body></message>",
        "<message><body><![CDATA[</body></message><iq type='set' id='1'/>]]></body></message>",
        "<message a='>&lt;/message>&lt;iq>'/>",
        "<message a=\"'>&lt;/message>'/>\"/>",
        "<message><message><iq type='set' id='1'/></message></message>",
        "<message><x:iq xmlns:x='jabber:client' type='set' id='1'/></message>",
        "<message><stream xmlns='urn:s'><iq xmlns='jabber:client'/></stream></message>",
    ],
)
def test_c07_a_stanza_inside_a_stanza_stays_there(text: str) -> None:
    """CVE-2019-1000007: only who counts the depth wrongly sees an iq here."""
    for data in ([text.encode()], [bytes([byte]) for byte in text.encode()]):
        stream = open_stream()
        events = [event for piece in data for event in stream.receive_data(piece)]
        assert [each[:8] for each in told(events)] == ["<message"]
        assert told(stream.receive_data(S_FOOTER.encode())) == ["ended in peace"]


@pytest.mark.parametrize("version", [(2, 4, 4), (2, 2, 10), (1, 95, 8)])
def test_c07_an_expat_with_known_holes_is_refused(version: tuple[int, int, int]) -> None:
    """CVE-2022-25235, CVE-2022-25236: what it lets through, another one reads otherwise."""
    with pytest.raises(SyncdError, match="is too old to read XMPP with") as caught:
        check_expat(version)
    assert ".".join(map(str, version)) in str(caught.value)
    assert "update libexpat" in caught.value.hint


@pytest.mark.parametrize("version", [MIN_EXPAT, (2, 5, 0), (3, 0, 0)])
def test_c07_an_expat_without_them_is_taken(version: tuple[int, int, int]) -> None:
    check_expat(version)
    check_expat()  # the one that reads here


def test_c07_no_stream_is_read_with_an_expat_that_has_known_holes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xml, "MIN_EXPAT", (99, 0, 0))
    with pytest.raises(SyncdError, match="too old"):
        open_stream()


async def test_c07_what_a_peer_said_is_written_back_as_text() -> None:
    """Its id and its address go out again, in the answer to its request."""
    async with living() as life:
        await life.server.send(
            "<iq type='get' id=\"'/>&lt;iq type='set'>&#10;\" from='bob@example.org/&lt;/iq>'>"
            "<q xmlns='u'/></iq><iq type='get' id='2'><q xmlns='u'/></iq>"
        )
        # Each is answered by a task of its own, in whatever order these run.
        answers = [await life.server.stanza() for _ in range(2)]
        to = {answer.get("id"): answer.get("to") for answer in answers}
        assert to == {"'/><iq type='set'>\n": "bob@example.org/</iq>", "2": None}


# C-08: bombs


def test_c08_billion_laughs_are_not_laughed() -> None:
    assert last_words(LOL, opened=False) == "restricted-xml"
    assert last_words(LOL) == "restricted-xml"
    assert last_words("<message>&lol9;</message>") == "restricted-xml"


@pytest.mark.parametrize(
    "bomb",
    [
        "<a>" * (MAX_DEPTH + 1),
        "<a" + "".join(f" a{number}=''" for number in range(MAX_ATTRIBUTES + 1)) + ">",
        "<a a='" + "x" * MAX_STANZA,
        "<a>" + "x" * MAX_STANZA,
        "<a>" + " " * MAX_STANZA,
        "<a " + " " * MAX_STANZA,
        "<a>" + "<a/>" * 10_000,
        "<" + "a" * MAX_STANZA,
        "<a>" + "".join(f"<a{number}/>" for number in range(10_000)),
        "<a xmlns:x='" + "u" * 20_000 + "'><x:a/></a>",
    ],
)
def test_c08_a_bomb_ends_the_stream(bomb: str) -> None:
    """XEP-0205 and the notice of 2014-04-04: what is small on the wire, or never ends."""
    assert last_words(bomb) == "policy-violation"


def test_c08_compression_is_not_asked_for() -> None:
    """XEP-0138 turns 4 KB into 4 MB; what is not negotiated cannot be used."""
    offered = features(
        "<compression xmlns='http://jabber.org/features/compress'><method>zlib</method>"
        "</compression>",
        mechanisms("X-NONE"),
    )
    stream = new_stream(secure=True)
    stream.receive_data((S_HEADER + offered).encode())
    assert b"compress" not in stream.data_to_send()


# C-05: answers from others


@contextlib.asynccontextmanager
async def living(handlers: Mapping[str, Handler] | None = None) -> AsyncIterator[Life]:
    """Run a session with a server in memory."""
    ours, theirs = memory_stream_pair()
    life = Life()
    life.session = Session(
        Connection(ours, open_stream(), []), handlers or {}, life.presences.append
    )
    life.server = Server(theirs, opened=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(life.run)
        life.nursery = nursery
        yield life
        nursery.cancel_scope.cancel()


class Life:
    """A session that runs, and the server at its other end."""

    session: Session
    server: Server
    nursery: trio.Nursery

    def __init__(self) -> None:
        self.presences: list[Element] = []
        self.answers: list[Iq | Exception] = []

    async def run(self) -> None:
        with contextlib.suppress(OfflineError, RemoteProtocolError):
            await self.session.run()

    async def ask(self, to: JID | None) -> Element:
        """Let a request go out, and return it as the server sees it."""

        async def wait() -> None:
            try:
                self.answers.append(await self.session.request("get", to, make("{u}q")))
            except (StanzaError, OfflineError) as error:
                self.answers.append(error)

        self.nursery.start_soon(wait)
        return await self.server.stanza()


@pytest.mark.parametrize(
    "sender",
    [
        None,
        "",
        "bob@example.org",
        "bob@example.org/other",
        "mallory@example.org/pc",
        "example.org",
        str(LAPTOP),
        str(LAPTOP.bare),
        "bob@example.org.evil.org/pc",
        "bob@example.org/PC",
        "not a jid@",
    ],
)
@pytest.mark.parametrize("kind", ["result", "error"])
async def test_c05_an_answer_from_somebody_else_is_none(sender: str | None, kind: str) -> None:
    """CVE-2013-6483, CVE-2014-0364: the right id, but not from whom it was asked of."""
    async with living() as life:
        request = await life.ask(BOB)
        origin = "" if sender is None else f" from='{sender}'"
        await life.server.send(f"<iq type='{kind}' id='{request.get('id')}'{origin}/>")
        await wait_all_tasks_blocked()
        assert life.answers == []
        await life.server.answer(request, "<right xmlns='u'/>")
        await wait_all_tasks_blocked()
        (answer,) = life.answers
        assert isinstance(answer, Iq)
        assert answer.payload is not None
        assert answer.payload.tag == "{u}right"


async def test_c05_an_id_cannot_be_guessed() -> None:
    """128 bits, new for each request; what answers another one is dropped."""
    async with living() as life:
        idents = [(await life.ask(BOB)).get("id", "") for _ in range(20)]
        assert len(set(idents)) == 20
        assert {len(ident) for ident in idents} == {32}
        for guess in ("", "1", "0" * 32, idents[0][:-1], idents[0].upper() + " "):
            await life.server.send(f"<iq type='result' id='{guess}' from='{BOB}'/>")
        await wait_all_tasks_blocked()
        assert life.answers == []


async def test_c05_only_the_first_answer_counts() -> None:
    async with living() as life:
        request = await life.ask(BOB)
        for name in ("first", "second"):
            await life.server.answer(request, f"<{name} xmlns='u'/>")
        await wait_all_tasks_blocked()
        (answer,) = life.answers
        assert isinstance(answer, Iq)
        assert answer.element[0].tag == "{u}first"


# C-06: others that speak for our account


@pytest.mark.parametrize(
    "text",
    [
        # carbons, CVE-2017-5589 and its family: nothing inside is looked at
        "<message from='{0}'><received xmlns='urn:xmpp:carbons:2'><forwarded"
        " xmlns='urn:xmpp:forward:0'><message xmlns='jabber:client' from='example.org'>"
        "<body>x</body></message></forwarded></received></message>",
        # MAM, CVE-2019-16235 and 16236
        "<message from='{0}'><result xmlns='urn:xmpp:mam:2' id='1'><forwarded"
        " xmlns='urn:xmpp:forward:0'><iq xmlns='jabber:client' type='set' id='1'>"
        "<q xmlns='urn:a'/></iq></forwarded></result></message>",
        # pubsub
        "<message from='{0}'><event xmlns='http://jabber.org/protocol/pubsub#event'>"
        "<items node='urn:syncd'><item/></items></event></message>",
        # an invitation, a command in words (CVE-2016-10376)
        "<message from='{0}'><x xmlns='jabber:x:conference' jid='a@b'/></message>",
        "<message from='{0}'><body>Send file: ../../.ssh/authorized_keys</body></message>",
    ],
)
@pytest.mark.parametrize("sender", ["mallory@evil.org/x", "example.org", str(LAPTOP.bare)])
async def test_c06_no_message_makes_anything_happen(text: str, sender: str) -> None:
    handled: list[Iq] = []

    async def handle(iq: Iq) -> None:
        await trio.lowlevel.checkpoint()
        handled.append(iq)

    async with living({"{urn:a}q": handle}) as life:
        await life.server.send(text.format(sender))
        await life.server.send("<iq type='get' id='probe' from='a@b/c'><x xmlns='u'/></iq>")
        # The first thing that is said is the answer to what came behind it.
        assert (await life.server.stanza()).get("id") == "probe"
        assert (handled, life.presences) == ([], [])


@pytest.mark.parametrize(
    ("request_text", "condition"),
    [
        # CVE-2015-8688: a push of the roster; who takes one is `Client`, see its tests
        ("<query xmlns='jabber:iq:roster'><item jid='m@evil.org'/></query>", None),
        ("<pubsub xmlns='http://jabber.org/protocol/pubsub'/>", None),
        ("<command xmlns='http://jabber.org/protocol/commands' node='exec'/>", None),
        ("<query xmlns='jabber:iq:rpc'/>", None),
        ("<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><jid>m@evil.org/x</jid></bind>", None),
        ("<session xmlns='urn:ietf:params:xml:ns:xmpp-session'/>", None),
        ("<a xmlns='u'/><b xmlns='u'/>", "bad-request"),
        ("", "bad-request"),
    ],
)
async def test_c06_what_nobody_handles_is_refused(
    request_text: str, condition: str | None
) -> None:
    async with living() as life:
        for kind in ("get", "set"):
            await life.server.send(
                f"<iq type='{kind}' id='1' from='mallory@evil.org/x'>{request_text}</iq>"
            )
            reply = await life.server.stanza()
            (error,) = reply
            assert (reply.get("type"), reply.get("to")) == ("error", "mallory@evil.org/x")
            assert error[0].tag.rpartition("}")[2] == (condition or "service-unavailable")


@pytest.mark.parametrize("sender", ["mallory@evil.org", "alice@example.org/x", "example.org"])
def test_c06_a_later_bind_does_not_make_us_somebody_else(sender: str) -> None:
    stream = open_stream()
    jid = stream.jid
    told(
        stream.receive_data(
            f"<iq type='result' id='bind' from='{sender}'><bind"
            " xmlns='urn:ietf:params:xml:ns:xmpp-bind'><jid>m@evil.org/x</jid></bind></iq>"
            "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>=</success>"
            "<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>".encode()
        )
    )
    assert (stream.jid, stream.state) == (jid, State.OPEN)
    assert stream.data_to_send() == b""


# C-04: what nobody offered


def test_c04_the_address_of_any_host_is_no_streamhost() -> None:
    query = s5b.make_query("a", [s5b.Streamhost(BOB, host, 1) for host in ("0.0.0.0", "::")])
    assert s5b.read_query(query).streamhosts == ()


@pytest.mark.parametrize("size", [-1, 2**63, 10**30])
def test_c04_no_size_is_taken_that_no_file_can_have(size: int) -> None:
    offer = make(
        si.SI,
        {"id": "a", "profile": si.NS_FILE},
        make(si.FILE, {"name": "a", "size": size}),
        si.make_offer(si.Offer(sid="a", name="a", size=1, methods=(si.IBB,)))[1],
    )
    with pytest.raises(StanzaError, match="<file/>"):
        schema.check(offer)


# C-10: STARTTLS


@pytest.mark.parametrize(
    "answer",
    [
        features(mechanisms("PLAIN", "SCRAM-SHA-256")),  # stripped
        features("<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls '/>"),
        features("<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>"),
        "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>",
        S_STARTTLS_FEATURES + "<failure xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
        S_STARTTLS_FEATURES + "<success xmlns='urn:ietf:params:xml:ns:xmpp-sasl'/>",
        S_STARTTLS_FEATURES + features(mechanisms("PLAIN")),
        S_STARTTLS_FEATURES + "<iq type='result' id='bind'/>",
        "<stream:error><see-other-host xmlns='urn:ietf:params:xml:ns:xmpp-streams'>evil.org"
        "</see-other-host></stream:error>",
    ],
)
def test_c10_without_tls_nothing_is_told(answer: str) -> None:
    """CVE-2016-10027: no name, no mechanism, no credential, whatever the server says."""
    stream = new_stream(secure=False, allow_plain=True)
    events = stream.receive_data((S_HEADER + answer).encode())
    said = stream.data_to_send().decode()
    assert isinstance(events[-1], StreamEnded)
    assert stream.state is State.CLOSED
    for secret in ("user", "pencil", "<auth", "n,,", "laptop"):
        assert secret not in said
    assert TLSWanted() not in events


@pytest.mark.parametrize(
    "injected",
    [
        features(mechanisms("PLAIN")),
        f"{S_HEADER}{features(mechanisms('PLAIN'))}",
        "<iq type='set' id='1' from='example.org'><q xmlns='urn:a'/></iq>",
        "<stream:error><conflict xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error>",
        S_FOOTER,
    ],
)
def test_c10_what_was_said_before_tls_is_forgotten_inside(injected: str) -> None:
    """CVE-2011-0411: together with ``<proceed/>``, in the same read."""
    stream = new_stream(secure=False, allow_plain=True)
    play(stream, f"C: {C_HEADER}\nS: {S_HEADER}{S_STARTTLS_FEATURES}\nC: {C_STARTTLS}")
    assert stream.receive_data((S_PROCEED + injected).encode()) == [TLSWanted()]
    stream.tls_started()
    assert (stream.state, stream.limits) == (State.HEADER, new_stream(secure=True).limits)
    assert b"PLAIN" not in stream.data_to_send()


# C-12: SASL


def test_c12_a_trimmed_list_of_mechanisms_does_not_lead_to_plain() -> None:
    events = play(
        new_stream(secure=True),
        f"""
        C: {C_HEADER.replace(" version='1.0' x", " from='user@example.org' version='1.0' x")}
        S: {S_HEADER}{features(mechanisms("PLAIN", "LOGIN", "ANONYMOUS", "DIGEST-MD5"))}
        C: {C_FOOTER}
        """,
    )
    assert isinstance(events[-1], StreamEnded)
    assert isinstance(events[-1].error, AuthenticationError)


# C-08, C-15: memory

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("what", memory.WHAT)
def test_c08_memory_stays_where_it_was(what: str) -> None:
    """Up to 1 GB, or until the stream ends; in a process of its own, to be measured."""
    script = [sys.executable, "tests/fuzz/memory.py", what]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert int(done.stdout.split()[0]) <= 10 * 1024, done.stdout  # KiB
