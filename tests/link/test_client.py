"""A session, and the client that keeps having one, against a server in memory."""

from __future__ import annotations

import random
import re
import time
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from syncd.errors import (
    AuthenticationError,
    ErrorType,
    OfflineError,
    StanzaError,
    StreamError,
    SyncdError,
)
from syncd.link import connect, peers
from syncd.link.client import MAX_VAIN, SERVED, Client
from syncd.link.connect import Account, Connection
from syncd.link.contacts import Contacts
from syncd.link.peers import ROSTER
from syncd.link.resolve import Target
from syncd.link.retry import ASK_AGAIN, BACK_OFF_LAST, BACK_OFF_LOGIN, BACK_OFF_LOGIN_LAST
from syncd.link.session import (
    MAX_HANDLING,
    MAX_HANDLING_OF_ONE,
    PING_AFTER,
    PING_TIMEOUT,
    REQUEST_TIMEOUT,
)
from syncd.xmpp import sm
from syncd.xmpp.caps import read_caps, verification
from syncd.xmpp.disco import (
    INFO,
    ITEMS,
    NS_INFO,
    NS_ITEMS,
    NS_VERSION,
    PING,
    Identity,
    Info,
    read_info,
)
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import PRESENCE, Iq
from syncd.xmpp.stream import ClientStream, Event, StreamEnded
from syncd.xmpp.xml import make
from tests.support.asking import Asked, but_pings, condition, refusal
from tests.support.wire import (
    LAPTOP,
    PASSWORD,
    S_FOOTER,
    ClientGoneError,
    Server,
    kept,
    managed_stream,
    mechanisms,
    open_stream,
    resumed,
    resuming_stream,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from xml.etree.ElementTree import Element

    from trio.testing import MockClock

    from syncd.link.session import Handler, MessageHandler
    from syncd.xmpp.sm import StreamManagement

BOB = JID.parse("bob@example.org/pc")
CAROL = JID.parse("carol@example.org")
PROXY = JID.parse("proxy.example.org")
DOMAIN = JID.parse("example.org")

IDENTITY = Identity("automation", "file-transfer", "syncd")
QUERY = "{urn:a}query"
A_QUERY = "<query xmlns='urn:a'/>"
SI = "http://jabber.org/protocol/si"


class Network:
    """Servers in memory, one for each attempt to connect that succeeds.

    Attributes:
      failures: Raised by the next attempts, one each.
      behind: What the next server says in the same breath as the bind.
      attempts: When somebody tried to connect.
      accounts: And as whom, and where.
      managed: The servers manage the stream (XEP-0198), and get all that is sent.
      keeps: They know the session when it is to be resumed.
      location: Where they want sessions to be resumed.
      takes: What is sent to them again gets through to them.
      wrong_count: The next server that is to resume one says that it got more than was sent.
      connected: Called when an attempt has succeeded.
      patience: How long an attempt takes that fails, seconds.
      offered: The mechanisms in the features of those that manage nothing; empty: as ever.
    """

    def __init__(self) -> None:
        self.failures: list[SyncdError] = []
        self.behind: list[Event] = []
        self.attempts: list[float] = []
        self.accounts: list[Account] = []
        self.managed, self.keeps, self.wrong_count = False, True, False
        self.location, self.takes = "", True
        self.connected: Callable[[], None] = lambda: None
        self.patience, self.offered = 0.0, ""
        self._put, self._get = trio.open_memory_channel[Server](100)

    async def connect(
        self, account: Account, resume: StreamManagement | None = None
    ) -> Connection:
        await trio.lowlevel.checkpoint()
        self.attempts.append(trio.current_time())
        self.accounts.append(account)
        if self.failures:
            await trio.sleep(self.patience)
            raise self.failures.pop(0)
        stream = self._stream(resume)
        ours, theirs = memory_stream_pair()
        self._put.send_nowait(Server(theirs, opened=True))
        behind, self.behind = self.behind, []
        self.connected()
        host, port = account.server or ("xmpp.example.org", 5222)
        return Connection(ours, stream, behind, Target(host, port, direct=False))

    def _stream(self, former: StreamManagement | None) -> ClientStream:
        if not self.managed:
            return open_stream(self.offered)
        if former is None or not self.keeps:
            stream = managed_stream()
            kept(stream).location = self.location
            return stream
        if self.wrong_count:
            self.wrong_count = False
            (end,) = resuming_stream(former).receive_data(resumed(99).encode())
            assert isinstance(end, StreamEnded)
            assert end.error is not None
            raise end.error
        has = former.sent_count if self.takes else former.acked_count
        return resuming_stream(former, said=resumed(has))

    async def accept(self) -> Server:
        """The server of the next attempt that succeeds."""
        return await self._get.receive()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    new = Network()
    monkeypatch.setattr(connect, "connect", new.connect)
    return new


class Changes:
    """Counts how often the client said that something changed."""

    def __init__(self) -> None:
        self.count = 0
        self._event = trio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        await self._event.wait()


def new_client(
    changed: Changes | None = None,
    messages: Mapping[str, MessageHandler] | None = None,
    **handlers: Handler,
) -> Client:
    return Client(
        Account(jid=LAPTOP, password=lambda: PASSWORD),
        Contacts([BOB.bare, CAROL], required=frozenset({SI}), preferred="urn:syncd:sync:1"),
        identity=IDENTITY,
        version="1.2",
        features=frozenset({SI, "urn:b"}),
        handlers={f"{{urn:a}}{name}": handler for name, handler in handlers.items()},
        changed=changed or Changes(),
        messages=messages or {},
    )


@asynccontextmanager
async def running(client: Client) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        yield nursery
        nursery.cancel_scope.cancel()


def state(client: Client) -> tuple[JID | None, str | None]:
    """Whether a client is online, and if not, why."""
    return client.jid, str(client.problem) if client.problem else None


KNOWN = (
    "<item jid='bob@example.org' subscription='both'/>"
    "<item jid='carol@example.org' subscription='both'/>"
)


async def hold(server: Server, seconds: float) -> None:
    """Let a session last so long."""
    until = trio.current_time() + seconds
    while (left := until - trio.current_time()) > 0:
        await trio.sleep(min(left, PING_AFTER - 1))
        await server.send(" ")


async def greet(server: Server, roster: str = KNOWN, *, behind: str = "") -> None:
    """Take the first presence and give the roster."""
    presence = await server.stanza()
    assert (presence.tag, presence.get("type")) == (PRESENCE, None)
    assert presence.findtext("{jabber:client}priority") == "-1"
    request = await server.stanza()
    assert request.find(ROSTER) is not None
    await server.send(
        f"<iq type='result' id='{request.get('id')}'>"
        f"<query xmlns='jabber:iq:roster'>{roster}</query></iq>{behind}"
    )


@asynccontextmanager
async def online(
    network: Network, client: Client, roster: str = KNOWN
) -> AsyncIterator[Server]:
    """Run a client until it has come online and got its roster, and while the block lasts."""
    async with running(client):
        server = await network.accept()
        await greet(server, roster)
        yield server


async def show(server: Server, jid: JID, *features: str) -> None:
    """Let a peer's client come, and tell what it can when it is asked."""
    await server.send(f"<presence from='{jid}'/>")
    request = await but_pings(server)
    assert (request.get("to"), request[0].tag) == (str(jid), INFO)
    told = "".join(f"<feature var='{feature}'/>" for feature in features)
    await server.answer(request, f"<query xmlns='{NS_INFO}'>{told}</query>")


async def test_a_client_comes_online(network: Network) -> None:
    changed = Changes()
    client = new_client(changed)
    assert (client.jid, client.problem) == (None, None)
    with pytest.raises(OfflineError, match="not connected"):
        await client.request("get", BOB, make(QUERY))
    async with running(client) as nursery:
        server = await network.accept()
        await client.wait_online()
        assert client.jid == LAPTOP
        assert changed.count == 1
        await greet(server)
        asked = Asked()
        nursery.start_soon(asked.ask, client, BOB, make(QUERY), 5.0)
        await server.answer(await server.stanza())
        assert (await asked.answer()).sender == BOB
    assert client.jid is None


@pytest.mark.parametrize(
    ("roster", "sent"),
    [
        ("", ["available bob", "available carol", "subscribe bob", "subscribe carol"]),
        (KNOWN, []),
        (
            "<item jid='bob@example.org' subscription='from'/>",
            ["available carol", "subscribe bob", "subscribe carol"],
        ),
        (
            "<item jid='bob@example.org' subscription='none' ask='subscribe'/>",
            ["available bob", "available carol", "subscribe carol"],
        ),
        (
            "<item jid='carol@example.org' subscription='to'/><item/>",
            ["available bob", "available carol", "subscribe bob"],
        ),
    ],
)
async def test_the_presence_of_peers_is_asked_for_once_and_ours_is_shown_to_them(
    network: Network, roster: str, sent: list[str]
) -> None:
    """RFC 6121 sections 3.1 and 4.6: who sees whom already is left in peace."""
    async with online(network, new_client(), roster) as server:
        await wait_all_tasks_blocked()
        await server.send("<iq type='get' id='last'><ping xmlns='urn:xmpp:ping'/></iq>")
        heard = []
        while (stanza := await server.stanza()).tag == PRESENCE:
            to = stanza.get("to", "").removesuffix("@example.org")
            heard.append(f"{stanza.get('type', 'available')} {to}")
        assert heard == sent


async def test_without_a_roster_the_client_stays_online(network: Network) -> None:
    client = new_client()
    async with running(client):
        server = await network.accept()
        await server.stanza()
        await server.send(refusal(await server.stanza(), "cancel", "service-unavailable"))
        assert [(await server.stanza()).get("to") for _ in range(2)] == [
            "bob@example.org",
            "carol@example.org",
        ]
        await server.send(f"<presence from='{BOB}'/>")
        assert [(await server.stanza()).get("to") for _ in range(2)] == [str(BOB)] * 2
        assert client.jid == LAPTOP


async def test_an_empty_result_is_an_empty_roster(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await server.stanza()
        await server.answer(await server.stanza())
        kinds = [(await server.stanza()).get("type") for _ in range(4)]
        assert kinds == [None, None, "subscribe", "subscribe"]


async def test_peers_may_see_us_and_strangers_may_not(network: Network) -> None:
    async with online(network, new_client()) as server:
        await server.send("<presence type='subscribe' from='mallory@example.org'/>")
        await server.send("<presence type='subscribe'/>")
        await server.send("<presence type='subscribe' from='@'/>")
        await server.send("<presence type='subscribe' from='bob@example.org/pc'/>")
        stanza = await server.stanza()
        assert (stanza.get("type"), stanza.get("to")) == ("subscribed", "bob@example.org")


async def test_a_peer_is_online_once_its_client_has_told_that_it_takes_files(
    network: Network,
) -> None:
    changed = Changes()
    client = new_client(changed)
    async with online(network, client) as server:
        await show(server, BOB, SI)
        await changed.wait()
        assert client.contacts.online() == {BOB.bare}
        assert client.contacts.choose(BOB.bare).jid == BOB
        await server.send(f"<presence from='{BOB}' type='unavailable'/>")
        await changed.wait()
        assert client.contacts.online() == frozenset()


async def test_a_client_that_turned_out_to_be_gone_is_not_chosen_again(
    network: Network,
) -> None:
    changed = Changes()
    client = new_client(changed)
    async with online(network, client) as server:
        await show(server, BOB, SI)
        await wait_all_tasks_blocked()
        before = changed.count
        client.gone(client.contacts.choose(BOB.bare))
        assert changed.count == before + 1
        assert client.contacts.online() == frozenset()


async def test_a_presence_that_changes_nothing_is_not_told(network: Network) -> None:
    changed = Changes()
    client = new_client(changed)
    async with online(network, client) as server:
        await show(server, BOB, SI)
        await wait_all_tasks_blocked()
        before = changed.count
        await server.send(f"<presence from='{BOB}'><show>away</show></presence>")
        await server.send("<presence from='mallory@example.org/pc'/>")
        await wait_all_tasks_blocked()
        assert changed.count == before


async def test_a_client_that_comes_in_many_presences_is_asked_once(network: Network) -> None:
    async with online(network, new_client()) as server:
        await server.send(f"<presence from='{BOB}'/>" * 20)
        assert (await server.stanza()).get("to") == str(BOB)
        await show(server, CAROL.with_resource("x"), SI)


async def test_a_client_that_refuses_to_tell_is_asked_again_when_it_comes_again(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    async with online(network, new_client()) as server:
        await server.send(f"<presence from='{BOB}'/>")
        await server.send(refusal(await server.stanza(), "cancel", "service-unavailable"))
        for _ in range(4):
            ping = await server.stanza()
            assert ping[0].tag == PING
            await server.answer(ping)
        await show(server, BOB, SI)


async def test_a_client_that_came_back_meanwhile_is_asked_again(
    autojump_clock: MockClock, network: Network
) -> None:
    """The refusal was for the one that went."""
    client = new_client()
    async with online(network, client) as server:
        await server.send(f"<presence from='{BOB}'/>")
        request = await server.stanza()
        await server.send(
            f"<presence from='{BOB}' type='unavailable'/><presence from='{BOB}'/>"
        )
        await server.send(refusal(request, "cancel", "service-unavailable"))
        again = await server.stanza()
        assert (again.get("to"), again[0].tag) == (str(BOB), INFO)


async def test_a_client_that_went_is_not_asked_again(
    autojump_clock: MockClock, network: Network
) -> None:
    async with online(network, new_client()) as server:
        await server.send(f"<presence from='{BOB}'/>")
        request = await server.stanza()
        await server.send(f"<presence from='{BOB}' type='unavailable'/>")
        await server.send(refusal(request, "wait", "recipient-unavailable"))
        assert (await server.stanza())[0].tag == PING


async def test_a_client_that_cannot_tell_now_is_asked_later(
    autojump_clock: MockClock, network: Network
) -> None:
    """Ever more rarely, whether it refuses or says nothing."""
    async with online(network, new_client()) as server:
        await server.send(f"<presence from='{BOB}'/>")
        times = []
        for _ in range(3):
            request = await but_pings(server)
            times.append(trio.current_time())
            await server.send(refusal(request, "wait", "resource-constraint"))
        assert times == [0.0, 1.0, 3.0]
        for _ in range(2):
            await but_pings(server)
            times.append(trio.current_time())
        assert times[3:] == [7.0, 7.0 + REQUEST_TIMEOUT + 8.0]


async def test_only_so_many_clients_are_asked_at_a_time(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MAX_ASKING", 1)
    client = new_client()
    async with online(network, client) as server:
        await server.send(f"<presence from='{BOB}'/><presence from='{CAROL}/x'/>")
        request = await server.stanza()
        assert request.get("to") == str(BOB)
        await server.answer(request, f"<query xmlns='{NS_INFO}'><feature var='{SI}'/></query>")
        await show(server, CAROL.with_resource("x"), SI)
        await wait_all_tasks_blocked()
        assert client.contacts.online() == {BOB.bare, CAROL}


@pytest.mark.parametrize("sender", ["", "from='user@example.org'"])
async def test_a_roster_push_of_our_own_account_is_taken(network: Network, sender: str) -> None:
    async with online(network, new_client()) as server:
        push = "<query xmlns='jabber:iq:roster'><item jid='dave@example.org'/></query>"
        await server.send(f"<iq type='set' id='7' {sender}>{push}</iq>")
        assert (await server.stanza()).get("type") == "result"


@pytest.mark.parametrize(
    "sender",
    ["mallory@example.org/pc", "bob@example.org", "example.org", "user@example.org.evil.org"],
)
async def test_a_roster_push_of_anybody_else_is_refused(network: Network, sender: str) -> None:
    """CVE-2015-8688: nobody gets on the list of peers that way."""
    client = new_client()
    async with online(network, client) as server:
        push = f"<query xmlns='jabber:iq:roster'><item jid='{sender}'/></query>"
        await server.send(f"<iq type='set' id='7' from='{sender}'>{push}</iq>")
        assert condition(await server.stanza()) == "cancel service-unavailable"
        assert client.contacts.peers == (BOB.bare, CAROL)


async def ask(server: Server, payload: str, *, kind: str = "get") -> Element:
    """What the client answers to Bob."""
    await server.send(f"<iq type='{kind}' id='7' from='{BOB}'>{payload}</iq>")
    reply = await server.stanza()
    assert (reply.get("id"), reply.get("to")) == ("7", str(BOB))
    return reply


async def test_what_the_client_can_is_what_its_presence_promised(network: Network) -> None:
    """XEP-0115: asked at the node of the presence, and without one."""
    async with running(new_client()):
        server = await network.accept()
        presence = await server.stanza()
        promised = read_caps(presence)
        assert promised is not None
        await server.send(refusal(await server.stanza(), "cancel", "service-unavailable"))
        for _ in ("bob", "carol"):
            assert read_caps(await server.stanza()) == promised
        for node in ("", f" node='{promised.query_node}'"):
            (query,) = await ask(server, f"<query xmlns='{NS_INFO}'{node}/>")
            assert query.get("node", "") == (promised.query_node if node else "")
            assert verification(query) == promised.ver
            assert read_info(query) == Info(
                identities=frozenset({IDENTITY}), features=SERVED | {SI, "urn:b"}
            )


async def test_the_client_tells_its_name_and_version_and_no_more(network: Network) -> None:
    async with online(network, new_client()) as server:
        (query,) = await ask(server, f"<query xmlns='{NS_VERSION}'/>")
        told = [(child.tag.partition("}")[2], child.text) for child in query]
        assert told == [("name", "syncd"), ("version", "1.2")]


async def test_the_client_has_no_items(network: Network) -> None:
    async with online(network, new_client()) as server:
        (query,) = await ask(server, f"<query xmlns='{NS_ITEMS}'/>")
        assert (query.tag, len(query)) == (ITEMS, 0)


@pytest.mark.parametrize("name", [NS_INFO, NS_ITEMS])
async def test_a_node_that_the_client_does_not_have_is_not_found(
    network: Network, name: str
) -> None:
    async with online(network, new_client()) as server:
        reply = await ask(server, f"<query xmlns='{name}' node='https://syncd.invalid/#x'/>")
        assert condition(reply) == "cancel item-not-found"


QUESTIONS = [
    f"<query xmlns='{NS_INFO}'/>",
    f"<query xmlns='{NS_ITEMS}'/>",
    f"<query xmlns='{NS_VERSION}'/>",
    "<ping xmlns='urn:xmpp:ping'/>",
]


@pytest.mark.parametrize("payload", QUESTIONS)
async def test_what_is_asked_by_get_is_not_asked_by_set(network: Network, payload: str) -> None:
    async with online(network, new_client()) as server:
        assert (await ask(server, payload)).get("type") == "result"
        reply = await ask(server, payload, kind="set")
        assert condition(reply) == "modify bad-request"


async def busy(_: Iq) -> Element:
    """A handler that is never ready."""
    await trio.sleep_forever()
    raise AssertionError


async def test_a_client_that_is_busy_still_tells_what_it_is(network: Network) -> None:
    """Other clients ask while they wait for the answer to an offer, some for 5 s only."""
    async with online(network, new_client(query=busy)) as server:
        for number in range(MAX_HANDLING_OF_ONE):
            await server.send(f"<iq type='set' id='b{number}' from='{BOB}'>{A_QUERY}</iq>")
        assert condition(await ask(server, A_QUERY)) == "wait resource-constraint"
        for payload in QUESTIONS:
            assert (await ask(server, payload)).get("type") == "result"


async def test_a_client_that_is_busy_still_takes_its_roster(network: Network) -> None:
    """The server tells of each change once, and tells all of them in one breath."""
    async with online(network, new_client(query=busy)) as server:
        for number in range(MAX_HANDLING):
            await server.send(f"<iq type='set' id='7' from='p{number}@x.y/z'>{A_QUERY}</iq>")
        push = "<query xmlns='jabber:iq:roster'><item jid='dave@example.org'/></query>"
        await server.send(f"<iq type='set' id='push'>{push}</iq>" * 200)
        replies = [await server.stanza() for _ in range(200)]
        assert {(reply.get("id"), reply.get("type")) for reply in replies} == {
            ("push", "result")
        }


FORWARDED = (
    "<forwarded xmlns='urn:xmpp:forward:0'><message xmlns='jabber:client' "
    "from='bob@example.org/pc'><body>x</body></message></forwarded>"
)


@pytest.mark.parametrize(
    "message",
    [
        f"<received xmlns='urn:xmpp:carbons:2'>{FORWARDED}</received>",
        f"<sent xmlns='urn:xmpp:carbons:2'>{FORWARDED}</sent>",
        f"<result xmlns='urn:xmpp:mam:2' queryid='1' id='2'>{FORWARDED}</result>",
        "<event xmlns='http://jabber.org/protocol/pubsub#event'><items node='n'/></event>",
        "<x xmlns='http://jabber.org/protocol/rosterx'>"
        "<item action='add' jid='mallory@example.org'/></x>",
        "<data xmlns='http://jabber.org/protocol/ibb' sid='s' seq='0'>AAAA</data>",
        "<query xmlns='jabber:iq:roster'><item jid='mallory@example.org'/></query>",
    ],
)
@pytest.mark.parametrize("sender", [str(BOB), "mallory@example.org/pc", LAPTOP.bare, None])
async def test_nothing_that_comes_in_a_message_counts(
    network: Network, message: str, sender: str | None
) -> None:
    """CVE-2017-5589 and its family, CVE-2016-9928: messages are not even looked at."""
    asked: list[Iq] = []

    async def query(iq: Iq) -> None:
        asked.append(iq)

    client = new_client(query=query)
    async with online(network, client) as server:
        origin = f" from='{sender}'" if sender else ""
        await server.send(f"<message{origin}>{message}{A_QUERY}</message>")
        await server.send(f"<message{origin} type='error'>{message}</message>")
        # Nothing was said before the answer to this.
        assert (await ask(server, "<ping xmlns='urn:xmpp:ping'/>")).get("type") == "result"
        assert client.contacts.peers == (BOB.bare, CAROL)
        assert (client.contacts.online(), asked) == (frozenset(), [])


@pytest.mark.parametrize(
    ("stanza", "expected"),
    [
        ("<iq type='get' id='7' from='{0}'/>", "modify bad-request"),
        (
            "<iq type='set' id='7' from='{0}'><a xmlns='u'/><a xmlns='u'/></iq>",
            "modify bad-request",
        ),
        ("<iq type='ask' id='7' from='{0}'><a xmlns='u'/></iq>", "modify bad-request"),
        ("<iq id='7' from='{0}'><a xmlns='u'/></iq>", "modify bad-request"),
        ("<iq type='get' from='{0}'><a xmlns='u'/></iq>", "modify bad-request"),
        ("<iq type='get' id='7' from='{0}'><a xmlns='u'/></iq>", "cancel service-unavailable"),
        ("<iq type='set' id='7' from='{0}'><a xmlns='u'/></iq>", "cancel service-unavailable"),
        ("<iq type='get' id='7'><a xmlns='u'/></iq>", "cancel service-unavailable"),
        ("<iq type='get' id='7' from='@'><a xmlns='u'/></iq>", "modify jid-malformed"),
        (
            "<iq type='set' id='7' from='{0}'><query xmlns='jabber:iq:rpc'/></iq>",
            "cancel service-unavailable",
        ),
        (
            "<iq type='set' id='7' from='{0}'><command "
            "xmlns='http://jabber.org/protocol/commands' node='n'/></iq>",
            "cancel service-unavailable",
        ),
    ],
)
async def test_every_request_is_answered_once(
    network: Network, stanza: str, expected: str
) -> None:
    """RFC 6120 section 8.2.3; CVE-2016-10376: there are no commands."""
    async with online(network, new_client()) as server:
        await server.send(stanza.format(BOB))
        assert condition(await server.stanza()) == expected
        assert (await ask(server, "<ping xmlns='urn:xmpp:ping'/>")).get("type") == "result"


@pytest.mark.parametrize("kind", ["result", "error"])
@pytest.mark.parametrize("sender", ["", f" from='{BOB}'", " from='@'"])
async def test_no_answer_is_answered(network: Network, kind: str, sender: str) -> None:
    """RFC 6120 section 8.3.1: or two clients would go on for ever."""
    async with online(network, new_client()) as server:
        await server.send(f"<iq type='{kind}' id='7'{sender}><a xmlns='u'/></iq>")
        await server.send(f"<iq type='{kind}' id='8'{sender}/>")
        assert (await ask(server, "<ping xmlns='urn:xmpp:ping'/>")).get("type") == "result"


@pytest.mark.parametrize(
    ("sender", "ident"),
    [
        ("", "{0}"),
        (" from='mallory@example.org/pc'", "{0}"),
        (f" from='{BOB.bare}'", "{0}"),
        (f" from='{BOB}x'", "{0}"),
        (f" from='{LAPTOP}'", "{0}"),
        (" from='example.org'", "{0}"),
        (f" from='{BOB}'", "{0}0"),
        (f" from='{BOB}'", "1"),
    ],
)
async def test_nobody_answers_for_another(network: Network, sender: str, ident: str) -> None:
    """CVE-2013-6483, CVE-2014-0364: neither without the id nor with it from elsewhere."""
    client = new_client()
    async with running(client) as nursery:
        server = await network.accept()
        await greet(server)
        asked = Asked()
        nursery.start_soon(asked.ask, client, BOB, make(QUERY), 5.0)
        request = await server.stanza()
        ident = ident.format(request.get("id"))
        assert len(request.get("id", "")) == 32
        await server.send(f"<iq type='result' id='{ident}'{sender}><forged xmlns='u'/></iq>")
        await server.send(f"<iq type='error' id='{ident}'{sender}/>")
        await wait_all_tasks_blocked()
        assert not asked.done
        await server.answer(request)
        assert (await asked.answer()).payload is None


async def test_the_handlers_of_others_are_asked_as_well(network: Network) -> None:
    async def query(_: Iq) -> Element:
        return make("{urn:a}answer")

    async with online(network, new_client(query=query)) as server:
        await server.send(f"<iq type='set' id='7' from='{BOB}'>{A_QUERY}</iq>")
        assert [child.tag for child in await server.stanza()] == ["{urn:a}answer"]


async def test_after_the_connection_is_cut_the_client_comes_back(
    autojump_clock: MockClock, network: Network
) -> None:
    changed = Changes()
    client = new_client(changed)
    async with running(client) as nursery:
        server = await network.accept()
        await greet(server)
        await show(server, BOB, SI)
        await changed.wait()
        asked = Asked()
        nursery.start_soon(asked.ask, client, BOB, make(QUERY), 5.0)
        await server.stanza()
        await server.transport.aclose()
        with pytest.raises(OfflineError, match="ended before the answer came"):
            await asked.answer()
        await wait_all_tasks_blocked()
        assert state(client) == (None, "the server hung up")
        assert client.contacts.online() == frozenset()
        await client.wait_online()
        server = await network.accept()
        assert state(client) == (LAPTOP, None)
        await greet(server)
        await show(server, BOB, SI)
        await changed.wait()
        assert client.contacts.online() == {BOB.bare}


async def test_a_server_that_falls_silent_is_left_for_a_new_connection(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    client = new_client()
    async with running(client):
        await greet(await network.accept())
        await greet(await network.accept())
        assert len(network.attempts) == 2
        assert network.attempts[1] > PING_AFTER + PING_TIMEOUT


async def test_who_waits_for_the_client_waits_through_failures(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.failures = [OfflineError("no route"), OfflineError("still none")]
    client = new_client()
    async with running(client):
        await wait_all_tasks_blocked()
        assert str(client.problem) == "no route"
        await client.wait_online()
        assert network.attempts == [0.0, 1.0, 3.0]
        assert client.problem is None


async def test_a_session_that_held_for_a_while_makes_up_for_earlier_failures(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.failures = [OfflineError("no route")] * 3
    async with running(new_client()):
        server = await network.accept()
        for _ in range(5):
            await trio.sleep(PING_AFTER - 1)
            await server.send(" ")
        cut = trio.current_time()
        await server.transport.aclose()
        server = await network.accept()
        assert network.attempts == [0.0, 1.0, 3.0, 7.0, cut + 1.0]
        await server.transport.aclose()
        await network.accept()
        assert network.attempts[-1] == cut + 2.0


async def test_wrong_credentials_are_tried_rarely(
    autojump_clock: MockClock, network: Network
) -> None:
    network.failures = [AuthenticationError("wrong password")]
    async with running(new_client()):
        await network.accept()
        assert network.attempts[1] >= BACK_OFF_LOGIN / 2


@pytest.mark.parametrize("patience", [0.0, BACK_OFF_LAST + 5])
async def test_wrong_credentials_are_tried_ever_more_rarely_however_long_that_takes(
    autojump_clock: MockClock,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    patience: float,
) -> None:
    """Some servers of the domain may take connections and say nothing, before one refuses."""
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.failures = [AuthenticationError("wrong password")] * 5
    network.patience = patience
    async with running(new_client()):
        await network.accept()
        pauses = [after - before - patience for before, after in pairwise(network.attempts)]
        assert pauses == [BACK_OFF_LOGIN * factor for factor in (1, 2, 4, 8, 12)]


async def test_a_server_that_throws_us_out_each_time_sees_us_ever_more_rarely(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever we do to annoy it may take a while."""
    monkeypatch.setattr(random, "random", lambda: 1.0)
    async with running(new_client()):
        server, pauses = await network.accept(), []
        for held in (0, BACK_OFF_LAST + 5, BACK_OFF_LAST + 5, BACK_OFF_LOGIN_LAST + 5, 5, 5):
            await hold(server, held)
            ended = trio.current_time()
            await end(server, "policy-violation")
            server = await network.accept()
            pauses.append(network.attempts[-1] - ended)
        assert pauses == [BACK_OFF_LAST * factor for factor in (1, 2, 4, 1, 1, 2)]


async def test_the_time_without_a_connection_makes_no_session_good(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.managed = True
    network.failures = [OfflineError("no route")] * 4
    async with running(new_client()):
        server = await network.accept()
        await server.transport.aclose()
        broke = trio.current_time()
        network.failures = [OfflineError("no route")] * 10_000
        await trio.sleep(601)  # the server keeps the session for 600
        before = len(network.attempts)
        await trio.sleep(14.5)
        assert len(network.attempts) == before
        await trio.sleep(1)
        assert network.attempts[before:] == [broke + 600 + 16]


async def test_why_we_are_offline_is_told_once(
    autojump_clock: MockClock, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """Until it changes, or we were online."""
    caplog.set_level("DEBUG", "syncd.link.client")
    wrong, route = AuthenticationError("wrong password"), OfflineError("no route")
    network.failures = [wrong, wrong, wrong, wrong, route, route, route, wrong, wrong]
    async with running(new_client()):
        server = await network.accept()
        await wait_all_tasks_blocked()
        network.failures = [wrong, wrong, wrong]
        await server.transport.aclose()
        await network.accept()
    told = [
        (record.levelname, record.args[0])
        for record in caplog.records
        if record.msg == "offline: %s" and isinstance(record.args, tuple)
    ]
    again = [("DEBUG", str(wrong))]
    first = [("WARNING", str(wrong))]
    assert told == (
        first + again * 3
        + [("WARNING", str(route))] + [("DEBUG", str(route))] * 2
        + first + again
        + [("WARNING", "the server hung up")]
        + first + again * 2
    )  # fmt: skip


UNBOUND = (
    mechanisms("SCRAM-SHA-1", "SCRAM-SHA-1-PLUS")
    + "<sasl-channel-binding xmlns='urn:xmpp:sasl-cb:0'>"
    "<channel-binding type='tls-exporter'/></sasl-channel-binding>"
)


async def test_what_the_user_should_know_of_the_login_is_told_once(
    autojump_clock: MockClock, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    network.offered = UNBOUND
    async with running(new_client()):
        for _ in range(3):
            await (await network.accept()).transport.aclose()
    told = [record for record in caplog.records if "tls-exporter" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]


async def test_a_server_that_closes_the_stream_is_told_with_what_comes_next(
    autojump_clock: MockClock, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    client = new_client()
    async with online(network, client) as server:
        await server.send(S_FOOTER)
        await wait_all_tasks_blocked()
        said = "the server closed the stream, and did not say why"
        assert state(client) == (None, said)
        assert client.problem is not None
        assert "logs in again by itself" in client.problem.hint
        assert f"offline: {said}" in caplog.text
        await network.accept()
        await client.wait_online()
        assert state(client) == (LAPTOP, None)


async def test_a_stream_that_ends_behind_the_bind_is_an_ordinary_failure(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    network.behind = [StreamEnded(StreamError("conflict"))]
    client = new_client()
    async with running(client):
        await network.accept()
        await greet(await network.accept())
        assert len(network.attempts) == 2
        assert network.attempts[1] >= BACK_OFF_LAST / 2


async def test_a_stream_that_ends_behind_the_roster_is_an_ordinary_failure(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    async with running(new_client()):
        await greet(await network.accept(), roster="", behind=S_FOOTER)
        await greet(await network.accept())
        assert len(network.attempts) == 2


async def test_the_server_hears_when_we_go(network: Network) -> None:
    client = new_client()
    await client.goodbye()  # there is nobody to tell
    async with running(client) as nursery:
        server = await network.accept()
        await greet(server)
        gone = trio.Event()

        async def go() -> None:
            await client.goodbye()
            gone.set()

        nursery.start_soon(go)
        assert (await server.stanza()).get("type") == "unavailable"
        with pytest.raises(EOFError):
            await server.stanza()
        nursery.start_soon(client.goodbye)  # an impatient user
        await wait_all_tasks_blocked()
        assert not gone.is_set()
        # What is still asked is not answered any more.
        await server.send(f"<presence type='subscribe' from='{BOB}'/>{S_FOOTER}")
        await gone.wait()
        assert (client.jid, client.problem) == (None, None)


async def test_the_client_knows_since_when_it_is_as_it_is(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9 + trio.current_time())
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.failures = [OfflineError("no route")]
    client = new_client()
    async with running(client):
        await wait_all_tasks_blocked()
        assert client.since == 1e9
        server = await network.accept()
        await client.wait_online()
        assert client.since == 1e9 + 1
        await trio.sleep(5)
        await server.transport.aclose()
        await wait_all_tasks_blocked()
        assert client.since == 1e9 + 6


# A session that outlives its connections (XEP-0198)


async def test_a_break_is_not_seen_from_outside(network: Network) -> None:
    """The peers stay, a request under way is answered, and nobody says hello again."""
    network.managed = True
    client = new_client()
    async with running(client) as nursery:
        server = await network.accept()
        await greet(server)
        await show(server, BOB, SI)
        asked = Asked()
        nursery.start_soon(asked.ask, client, BOB, make(QUERY), REQUEST_TIMEOUT)
        request = await server.stanza()
        since = client.since
        await server.transport.aclose()
        server = await network.accept()
        assert (await server.stanza()).tag == f"{{{sm.NS}}}r"
        assert state(client) == (LAPTOP, None)
        assert client.contacts.online() == {BOB.bare}
        await server.answer(request)
        assert (await asked.answer()).sender == BOB
        assert client.since == since


async def test_in_another_network_an_open_connection_is_asked_at_once(
    autojump_clock: MockClock, network: Network
) -> None:
    """And given up if that is too much for it: the address that it came from may be gone."""
    network.managed = True
    client = new_client()
    client.network_changed(lambda host: True)  # nothing can be asked yet
    async with online(network, client) as server:
        for now in (1.0, 2.0):
            await trio.sleep(1)
            client.network_changed(lambda host: True)
            ping = await but_sm(server)
            assert (trio.current_time(), ping[0].tag) == (now, PING)
            await server.answer(ping)
        await trio.sleep(1)
        client.network_changed(lambda host: True)
        await network.accept()
        assert network.attempts == [0.0, 3.0 + PING_TIMEOUT]
        await wait_all_tasks_blocked()
        assert client.connected


@pytest.mark.parametrize("managed", [True, False])
async def test_another_network_ends_the_waiting(
    autojump_clock: MockClock,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    managed: bool,
) -> None:
    """And the pauses begin anew: a name server may come after the address."""
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.managed = managed
    client = new_client()
    async with online(network, client) as server:
        network.failures = [OfflineError("no route")] * 100
        await server.transport.aclose()
        await trio.sleep(200)  # within a pause from 127 s to 247 s
        before = len(network.attempts)
        client.network_changed(lambda host: True)
        await wait_all_tasks_blocked()
        assert network.attempts[before:] == [200.0]
        await trio.sleep(10)
        assert network.attempts[before:] == [200.0, 201.0, 203.0, 207.0]
        network.failures.clear()
        client.network_changed(lambda host: True)
        await network.accept()
        assert network.attempts[-1] == 210.0


async def test_another_network_that_comes_during_an_attempt_makes_for_the_next(
    autojump_clock: MockClock, network: Network
) -> None:
    network.failures = [OfflineError("no route")]
    network.patience = 10.0
    client = new_client()
    async with running(client):
        await trio.sleep(5)
        client.network_changed(lambda host: True)
        await network.accept()
        assert network.attempts == [0.0, 10.0]


async def test_another_network_is_no_reason_to_try_wrong_credentials_sooner(
    autojump_clock: MockClock, network: Network
) -> None:
    network.failures = [AuthenticationError("wrong password")]
    client = new_client()
    async with running(client):
        await trio.sleep(5)
        client.network_changed(lambda host: True)
        await network.accept()
        assert network.attempts[1] >= BACK_OFF_LOGIN / 2


async def but_sm(server: Server) -> Element:
    """The next stanza that is not about stream management."""
    while (element := await server.stanza()).tag.startswith(f"{{{sm.NS}}}"):
        pass
    return element


async def test_in_the_gap_the_client_is_not_connected_and_the_peers_are_kept(
    autojump_clock: MockClock, network: Network
) -> None:
    network.managed = True
    changed = Changes()
    client = new_client(changed)
    async with online(network, client) as server:
        await show(server, BOB, SI)
        await wait_all_tasks_blocked()
        before = changed.count
        network.failures = [OfflineError("no route")]
        await server.transport.aclose()
        await wait_all_tasks_blocked()
        assert changed.count > before
        connected = [client.connected]
        assert state(client) == (LAPTOP, "no route")
        assert client.contacts.online() == {BOB.bare}
        asked = trio.current_time()
        await network.accept()
        assert 0.5 <= trio.current_time() - asked <= 1.0
        await wait_all_tasks_blocked()
        assert [*connected, client.connected] == [False, True]
        assert state(client) == (LAPTOP, None)


async def test_a_forgotten_session_is_followed_by_another_without_delay(
    autojump_clock: MockClock, network: Network
) -> None:
    """It is bound already; the peers are asked about anew."""
    network.managed = True
    client = new_client()
    async with online(network, client) as server:
        await show(server, BOB, SI)
        await wait_all_tasks_blocked()
        network.keeps = False
        await server.transport.aclose()
        server = await network.accept()
        await greet(server)
        assert len(network.attempts) == 2
        assert trio.current_time() == 0.0
        assert client.contacts.online() == frozenset()
        assert state(client) == (LAPTOP, None)


async def test_a_session_is_resumed_only_as_long_as_the_server_keeps_it(
    autojump_clock: MockClock, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    network.managed = True
    client = new_client()
    async with online(network, client) as server:
        await show(server, BOB, SI)
        await wait_all_tasks_blocked()
        network.failures = [OfflineError("no route")] * 10_000
        await server.transport.aclose()
        await trio.sleep(599)
        assert client.jid == LAPTOP
        await trio.sleep(2)
        assert state(client) == (None, "no route")
        assert client.contacts.online() == frozenset()
        assert 5 < len(network.attempts) < 30
        # The presence, what asks for the roster, and what asks bob.
        assert "the session is given up: 3 stanzas may be lost" in caplog.messages


async def test_a_server_that_counts_wrongly_is_not_asked_to_resume_again(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say the same for as long as it keeps the session."""
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.managed = True
    client = new_client()
    async with online(network, client) as server:
        network.wrong_count = True
        await server.transport.aclose()
        await wait_all_tasks_blocked()
        assert not client.connected
        server = await network.accept()
        await greet(server)
        assert network.attempts == [0.0, 0.0, 1.0]


LOCATION = ("node7.example.org", 9222)


async def test_a_session_is_resumed_where_the_server_wants_it(network: Network) -> None:
    """Each time; the certificate is still that of the account's domain (XEP-0198 section 5)."""
    network.managed, network.location = True, "node7.example.org:9222"
    client = new_client()
    async with online(network, client) as server:
        assert client.server == "xmpp.example.org:5222"
        for _ in range(2):
            await server.transport.aclose()
            server = await network.accept()
            assert (await server.stanza()).tag == f"{{{sm.NS}}}r"
            assert client.server == "node7.example.org:9222"
        assert [each.server for each in network.accounts] == [None, LOCATION, LOCATION]
        assert {each.jid for each in network.accounts} == {LAPTOP}


async def test_where_the_server_cannot_be_reached_it_is_resumed_as_ever(
    autojump_clock: MockClock, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """And if that helps, there is no second attempt there."""
    network.managed, network.location = True, "node7.example.org:9222"
    client = new_client()
    async with online(network, client) as server:
        network.failures = [OfflineError("no route")] * 3
        with caplog.at_level("INFO"):
            await server.transport.aclose()
            server = await network.accept()
        assert "node7.example.org:9222" in caplog.text
        assert (await server.stanza()).tag == f"{{{sm.NS}}}r"
        await server.transport.aclose()
        await network.accept()
        expected = [None, LOCATION, None, LOCATION, None, None]
        assert [each.server for each in network.accounts] == expected


async def test_wrong_credentials_are_not_tried_elsewhere(
    autojump_clock: MockClock, network: Network
) -> None:
    network.managed, network.location = True, "node7.example.org:9222"
    client = new_client()
    async with online(network, client) as server:
        network.failures = [AuthenticationError("wrong password")]
        await server.transport.aclose()
        await network.accept()
        assert [each.server for each in network.accounts] == [None, LOCATION, None]
        assert network.attempts[2] - network.attempts[1] >= BACK_OFF_LOGIN / 2


async def test_in_the_gap_there_is_no_server(network: Network) -> None:
    network.managed = True
    client = new_client()
    assert client.server == ""
    async with online(network, client) as server:
        network.failures = [OfflineError("no route")] * 100
        await server.transport.aclose()
        await wait_all_tasks_blocked()
        assert (client.jid, client.server) == (LAPTOP, "")


async def test_a_request_to_a_peer_that_leaves_fails_at_once(network: Network) -> None:
    """So nobody waits for the answer of a client that has been closed."""
    client = new_client()
    async with running(client) as nursery:
        server = await network.accept()
        await greet(server)
        await show(server, BOB, SI)
        asked = Asked()
        nursery.start_soon(asked.ask, client, BOB, make(QUERY), REQUEST_TIMEOUT)
        await server.stanza()
        await server.send(f"<presence from='{BOB.bare}' type='unavailable'/>")
        await wait_all_tasks_blocked()
        assert not asked.done
        await server.send(f"<presence from='{BOB}' type='unavailable'/>")
        with pytest.raises(OfflineError, match="went offline"):
            await asked.answer()


async def test_messages_of_a_kind_that_somebody_takes_are_given_to_them(
    network: Network,
) -> None:
    got: list[JID] = []
    client = new_client(messages={QUERY: lambda sender, child: got.append(sender)})
    async with online(network, client) as server:
        await server.send(f"<message from='{BOB}'>{A_QUERY}</message>")
        await wait_all_tasks_blocked()
        assert got == [BOB]


async def test_wrong_credentials_end_the_session(
    autojump_clock: MockClock, network: Network
) -> None:
    """They are not tried again as soon as the session would need it."""
    network.managed = True
    client = new_client()
    async with online(network, client) as server:
        network.failures = [AuthenticationError("wrong password")]
        await server.transport.aclose()
        await network.accept()
        assert network.attempts[2] - network.attempts[1] >= BACK_OFF_LOGIN / 2


async def test_connections_that_keep_breaking_are_made_ever_more_rarely(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the server falls over whatever it was that we are sending again."""
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.managed = True
    async with running(new_client()):
        for _ in range(6):
            await (await network.accept()).transport.aclose()
        assert network.attempts == [0.0, 0.0, 1.0, 3.0, 7.0, 15.0]
        server = await network.accept()
        for _ in range(5):
            await trio.sleep(PING_AFTER - 1)
            await server.send(" ")
        await server.transport.aclose()
        await network.accept()
        assert network.attempts[-1] == trio.current_time()  # that one was good for a while


async def test_a_server_that_falls_over_what_it_is_sent_gets_it_no_more(
    autojump_clock: MockClock,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The next session begins without it."""
    caplog.set_level("INFO")
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.managed, network.takes = True, False
    client = new_client()
    async with running(client) as nursery:
        server = await network.accept()
        await greet(server)
        asked = Asked()
        nursery.start_soon(asked.ask, client, BOB, make(QUERY), REQUEST_TIMEOUT)
        for _ in range(MAX_VAIN + 1):
            while (await server.stanza()).find(QUERY) is None:
                pass
            await server.transport.aclose()
            server, old = await network.accept(), server
            assert server is not old
        with pytest.raises(OfflineError, match="ended before the answer came"):
            await asked.answer()
        assert caplog.messages.count("the session is given up: 3 stanzas may be lost") == 1
        await greet(server)
        assert network.attempts == [0.0, 0.0, 1.0, 3.0, 4.0]


async def test_a_server_that_gets_on_is_resumed_however_often_it_breaks(
    autojump_clock: MockClock, network: Network
) -> None:
    network.managed, network.takes = True, False
    client = new_client()
    async with running(client):
        server = await network.accept()
        since = client.since
        await greet(server)
        for count in range(2 * MAX_VAIN):
            # One more of the two that it had, and of those that are asked for here.
            await server.send("<iq type='get' id='8'><ping xmlns='urn:xmpp:ping'/></iq>")
            await server.send(f"<a xmlns='{sm.NS}' h='{count}'/>")
            await wait_all_tasks_blocked()
            await server.transport.aclose()
            server = await network.accept()
        assert client.since == since


async def test_whom_the_server_forgets_each_time_is_not_bound_in_a_loop(
    autojump_clock: MockClock, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    network.managed, network.keeps = True, False
    async with running(new_client()):
        for _ in range(5):
            await (await network.accept()).transport.aclose()
        assert network.attempts == [0.0, 0.0, 1.0, 3.0, 7.0]


async def test_going_in_the_gap_ends_the_session_at_once(
    autojump_clock: MockClock, network: Network
) -> None:
    network.managed = True
    client = new_client()
    async with online(network, client) as server:
        network.failures = [OfflineError("no route")] * 100
        await server.transport.aclose()
        await wait_all_tasks_blocked()
        await client.goodbye()
        assert trio.current_time() == 0.0
        assert client.jid is None


async def test_a_client_that_is_cancelled_with_a_successor_leaves_no_connection(
    network: Network,
) -> None:
    network.managed, network.keeps = True, False
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(new_client().run)
            server = await network.accept()
            await greet(server)
            network.connected = scope.cancel
            await server.transport.aclose()
            await trio.sleep_forever()
    left = await network.accept()
    with pytest.raises(ClientGoneError):
        await left.stanza()


# Why the server ended the stream (RFC 6120 section 4.9.3)


async def end(server: Server, condition: str, text: str = "") -> None:
    """End the stream with an error."""
    await server.send(
        f"<stream:error><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-streams'>{text}"
        f"</{condition}></stream:error>{S_FOOTER}"
    )


async def test_after_a_conflict_the_client_is_somebody_else(
    autojump_clock: MockClock, network: Network
) -> None:
    """Two with the same resource would throw each other out for ever."""
    client = new_client()
    async with running(client):
        for _ in range(3):
            server = await network.accept()
            await greet(server)
            await end(server, "conflict")
            await wait_all_tasks_blocked()
            assert client.problem is not None
            assert "another client" in client.problem.hint
        await network.accept()
        first, *others = [account.jid for account in network.accounts]
        assert first == LAPTOP
        assert {jid.bare for jid in others} == {LAPTOP.bare}
        assert len({jid.resource for jid in others}) == 3
        for jid in others:
            assert re.fullmatch("laptop-[0-9a-f]{8}", jid.resource)
        pauses = [b - a for a, b in pairwise(network.attempts)]
        assert min(pauses) >= BACK_OFF_LAST / 2


async def test_a_bind_that_is_refused_for_a_conflict_is_one(
    autojump_clock: MockClock, network: Network
) -> None:
    """The server has not even let us have a resource of its own choice."""
    network.failures = [StanzaError(ErrorType.CANCEL, "conflict")] * 3
    async with running(new_client()):
        await network.accept()
        first, *others = [account.jid.resource for account in network.accounts]
        assert first == "laptop"
        assert len(set(others)) == 3
        assert all(re.fullmatch("laptop-[0-9a-f]{8}", other) for other in others)
        assert network.attempts[1] >= BACK_OFF_LAST / 2


async def test_long_after_a_conflict_the_name_that_the_user_wants_is_asked_for_again(
    autojump_clock: MockClock, network: Network
) -> None:
    """By a login that is due anyway; and if it is still taken, that is the same once more."""
    async with running(new_client()):
        await end(await network.accept(), "conflict")
        server = await network.accept()
        conflict_at = trio.current_time() - network.attempts[1]
        await hold(server, ASK_AGAIN / 2)
        await server.transport.aclose()
        server = await network.accept()
        await hold(server, ASK_AGAIN / 2)
        assert trio.current_time() - conflict_at > ASK_AGAIN
        await server.transport.aclose()
        await end(await network.accept(), "conflict")
        await network.accept()
        asked = [account.jid.resource for account in network.accounts]
        assert [name == "laptop" for name in asked] == [True, False, False, True, False]
        assert asked[1] == asked[2] != asked[4]


@pytest.mark.parametrize("managed", [True, False])
async def test_a_server_that_goes_down_is_given_time(
    autojump_clock: MockClock, network: Network, managed: bool
) -> None:
    network.managed = managed
    client = new_client()
    async with online(network, client) as server:
        network.failures = [OfflineError("Connection refused")] * 3
        await end(server, "system-shutdown")
        await network.accept()
        pauses = [b - a for a, b in pairwise(network.attempts)]
        for pause, least in zip(pauses, (0.5, 1.0, 2.0, 4.0), strict=True):
            assert least <= pause <= 2 * least
        assert network.accounts[-1].jid == LAPTOP


async def test_a_server_that_has_enough_of_us_is_left_in_peace(
    autojump_clock: MockClock, network: Network
) -> None:
    network.managed = True
    client = new_client()
    async with online(network, client) as server:
        await end(server, "policy-violation")
        await wait_all_tasks_blocked()
        assert client.problem is not None
        assert "the server limits how much" in client.problem.hint
        await network.accept()
        assert network.attempts[1] >= BACK_OFF_LAST / 2


async def test_where_the_server_sends_us_we_go_once(
    autojump_clock: MockClock, network: Network
) -> None:
    """The account, and so the domain that the certificate must be for, stays."""
    network.failures = [
        StreamError("see-other-host", other_host="b.example.org:9222"),
        StreamError("see-other-host", other_host="c.example.org"),
    ]
    async with running(new_client()):
        await network.accept()
        servers = [account.server for account in network.accounts]
        assert servers == [None, ("b.example.org", 9222), None]
        assert network.attempts[0] == network.attempts[1] < network.attempts[2]
        assert {account.jid for account in network.accounts} == {LAPTOP}


async def test_an_open_stream_may_be_sent_elsewhere_too(
    autojump_clock: MockClock, network: Network
) -> None:
    async with online(network, new_client()) as server:
        await end(server, "see-other-host", "b.example.org")
        network.failures = [OfflineError("nobody there")]
        await network.accept()
        servers = [account.server for account in network.accounts]
        assert servers == [None, ("b.example.org", 5222), None]


async def test_a_server_that_sends_us_nowhere_is_an_ordinary_failure(
    autojump_clock: MockClock, network: Network
) -> None:
    network.failures = [StreamError("see-other-host", other_host="")]
    async with running(new_client()):
        await network.accept()
        assert [account.server for account in network.accounts] == [None, None]
        assert network.attempts[1] > 0
