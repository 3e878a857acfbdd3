"""A session, and the client that keeps having one, against a server in memory."""

from __future__ import annotations

import random
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from syncd.errors import (
    AuthenticationError,
    OfflineError,
    StreamError,
    SyncdError,
)
from syncd.link import client as client_module
from syncd.link import connect
from syncd.link.client import (
    BACK_OFF_LAST,
    BACK_OFF_LOGIN,
    BACK_OFF_LOGIN_LAST,
    ROSTER,
    Client,
    back_off,
)
from syncd.link.connect import Account, Connection
from syncd.link.session import PING_AFTER, PING_TIMEOUT, REQUEST_TIMEOUT
from syncd.xmpp.contacts import Contacts
from syncd.xmpp.disco import INFO, NS_INFO, PING, Identity
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import PRESENCE, Iq
from syncd.xmpp.stream import Event, StreamEnded
from syncd.xmpp.xml import make
from tests.support.asking import Asked, but_pings, condition, refusal
from tests.support.wire import LAPTOP, PASSWORD, S_FOOTER, Server, open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from xml.etree.ElementTree import Element

    from trio.testing import MockClock

    from syncd.link.session import Handler

BOB = JID.parse("bob@example.org/pc")
CAROL = JID.parse("carol@example.org")
PROXY = JID.parse("proxy.example.org")
DOMAIN = JID.parse("example.org")

QUERY = "{urn:a}query"
A_QUERY = "<query xmlns='urn:a'/>"
SI = "http://jabber.org/protocol/si"


class Network:
    """Servers in memory, one for each attempt to connect that succeeds.

    Attributes:
      failures: Raised by the next attempts, one each.
      behind: What the next server says in the same breath as the bind.
      attempts: When somebody tried to connect.
    """

    def __init__(self) -> None:
        self.failures: list[SyncdError] = []
        self.behind: list[Event] = []
        self.attempts: list[float] = []
        self._put, self._get = trio.open_memory_channel[Server](100)

    async def connect(self, _: Account) -> Connection:
        await trio.lowlevel.checkpoint()
        self.attempts.append(trio.current_time())
        if self.failures:
            raise self.failures.pop(0)
        ours, theirs = memory_stream_pair()
        self._put.send_nowait(Server(theirs, opened=True))
        behind, self.behind = self.behind, []
        return Connection(ours, open_stream(), behind)

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


def new_client(changed: Changes | None = None, **handlers: Handler) -> Client:
    return Client(
        Account(jid=LAPTOP, password=lambda: PASSWORD),
        Contacts([BOB.bare, CAROL], required=frozenset({SI}), preferred="urn:syncd:sync:1"),
        identity=Identity("automation", "file-transfer", "syncd"),
        features=frozenset({SI, "urn:b"}),
        handlers={f"{{urn:a}}{name}": handler for name, handler in handlers.items()},
        changed=changed or Changes(),
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
    "<item jid='carol@example.org' subscription='to'/>"
)


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
    ("roster", "subscribed"),
    [
        ("", ["bob@example.org", "carol@example.org"]),
        (KNOWN, []),
        (
            "<item jid='bob@example.org' subscription='from'/>",
            ["bob@example.org", "carol@example.org"],
        ),
        (
            "<item jid='bob@example.org' subscription='none' ask='subscribe'/>",
            ["carol@example.org"],
        ),
        ("<item jid='carol@example.org' subscription='both'/><item/>", ["bob@example.org"]),
    ],
)
async def test_the_presence_of_peers_is_asked_for_once(
    network: Network, roster: str, subscribed: list[str]
) -> None:
    """RFC 6121 section 3.1: whom the roster already shows, or will, is left in peace."""
    async with running(new_client()):
        server = await network.accept()
        await greet(server, roster)
        await server.send("<iq type='get' id='last'><ping xmlns='urn:xmpp:ping'/></iq>")
        sent = []
        while (stanza := await server.stanza()).tag == PRESENCE:
            assert stanza.get("type") == "subscribe"
            sent.append(stanza.get("to"))
        assert sent == subscribed


async def test_without_a_roster_the_client_stays_online(network: Network) -> None:
    client = new_client()
    async with running(client):
        server = await network.accept()
        await server.stanza()
        await server.send(refusal(await server.stanza(), "cancel", "service-unavailable"))
        await show(server, BOB, SI)
        assert client.jid == LAPTOP


async def test_an_empty_result_is_an_empty_roster(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await server.stanza()
        await server.answer(await server.stanza())
        assert (await server.stanza()).get("to") == "bob@example.org"


async def test_peers_may_see_us_and_strangers_may_not(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
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
    async with running(client):
        server = await network.accept()
        await greet(server)
        await show(server, BOB, SI)
        await changed.wait()
        assert client.contacts.online() == {BOB.bare}
        assert client.contacts.choose(BOB.bare).jid == BOB
        await server.send(f"<presence from='{BOB}' type='unavailable'/>")
        await changed.wait()
        assert client.contacts.online() == frozenset()


async def test_a_presence_that_changes_nothing_is_not_told(network: Network) -> None:
    changed = Changes()
    client = new_client(changed)
    async with running(client):
        server = await network.accept()
        await greet(server)
        await show(server, BOB, SI)
        await wait_all_tasks_blocked()
        before = changed.count
        await server.send(f"<presence from='{BOB}'><show>away</show></presence>")
        await server.send("<presence from='mallory@example.org/pc'/>")
        await wait_all_tasks_blocked()
        assert changed.count == before


async def test_a_client_that_comes_in_many_presences_is_asked_once(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/>" * 20)
        assert (await server.stanza()).get("to") == str(BOB)
        await show(server, CAROL.with_resource("x"), SI)


async def test_a_client_that_refuses_to_tell_is_asked_again_when_it_comes_again(
    autojump_clock: MockClock,
    network: Network,
) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
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
    async with running(client):
        server = await network.accept()
        await greet(server)
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
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/>")
        request = await server.stanza()
        await server.send(f"<presence from='{BOB}' type='unavailable'/>")
        await server.send(refusal(request, "wait", "recipient-unavailable"))
        assert (await server.stanza())[0].tag == PING


async def test_a_client_that_cannot_tell_now_is_asked_later(
    autojump_clock: MockClock, network: Network
) -> None:
    """Ever more rarely, whether it refuses or says nothing."""
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
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
    monkeypatch.setattr(client_module, "MAX_ASKING", 1)
    client = new_client()
    async with running(client):
        server = await network.accept()
        await greet(server)
        await server.send(f"<presence from='{BOB}'/><presence from='{CAROL}/x'/>")
        request = await server.stanza()
        assert request.get("to") == str(BOB)
        await server.answer(request, f"<query xmlns='{NS_INFO}'><feature var='{SI}'/></query>")
        await show(server, CAROL.with_resource("x"), SI)
        await wait_all_tasks_blocked()
        assert client.contacts.online() == {BOB.bare, CAROL}


@pytest.mark.parametrize("sender", ["", "from='user@example.org'"])
async def test_a_roster_push_of_our_own_account_is_taken(network: Network, sender: str) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
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
    async with running(client):
        server = await network.accept()
        await greet(server)
        push = f"<query xmlns='jabber:iq:roster'><item jid='{sender}'/></query>"
        await server.send(f"<iq type='set' id='7' from='{sender}'>{push}</iq>")
        assert condition(await server.stanza()) == "cancel service-unavailable"
        assert client.contacts.peers == (BOB.bare, CAROL)


async def test_the_client_tells_what_it_is_and_can(network: Network) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        await server.send(
            f"<iq type='get' id='7' from='{BOB}'><query xmlns='{NS_INFO}' node='n'/></iq>"
        )
        (query,) = await server.stanza()
        assert query.get("node") == "n"
        assert [(child.get("category"), child.get("var")) for child in query] == [
            ("automation", None),
            (None, SI),
            (None, "urn:b"),
        ]


@pytest.mark.parametrize(
    "payload", [f"<query xmlns='{NS_INFO}'/>", "<ping xmlns='urn:xmpp:ping'/>"]
)
async def test_what_is_asked_by_get_is_not_asked_by_set(network: Network, payload: str) -> None:
    async with running(new_client()):
        server = await network.accept()
        await greet(server)
        for kind, expected in (("get", "result"), ("set", "error")):
            await server.send(f"<iq type='{kind}' id='7' from='{BOB}'>{payload}</iq>")
            reply = await server.stanza()
            assert reply.get("type") == expected
        assert condition(reply) == "modify bad-request"


async def test_the_handlers_of_others_are_asked_as_well(network: Network) -> None:
    async def query(_: Iq) -> Element:
        return make("{urn:a}answer")

    async with running(new_client(query=query)):
        server = await network.accept()
        await greet(server)
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


@pytest.mark.parametrize(
    ("failures", "problem", "jitter", "seconds"),
    [
        (0, None, 1.0, 1.0),
        (1, None, 1.0, 1.0),
        (1, None, 0.0, 0.5),
        (2, OfflineError("x"), 1.0, 2.0),
        (3, StreamError("system-shutdown"), 0.5, 3.0),
        (8, OfflineError("x"), 1.0, BACK_OFF_LAST),
        (10**9, OfflineError("x"), 1.0, BACK_OFF_LAST),
        (1, AuthenticationError("x"), 1.0, BACK_OFF_LOGIN),
        (99, AuthenticationError("x"), 0.0, BACK_OFF_LOGIN_LAST / 2),
        (0, StreamError("conflict"), 1.0, BACK_OFF_LAST),
        (99, StreamError("conflict"), 1.0, BACK_OFF_LOGIN_LAST),
    ],
)
def test_the_time_between_attempts_doubles_within_bounds(
    failures: int, problem: SyncdError | None, jitter: float, seconds: float
) -> None:
    assert back_off(failures, problem, jitter) == seconds
