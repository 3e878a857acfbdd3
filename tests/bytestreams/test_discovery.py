from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, fromstring

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from syncd.bytestreams import discovery, proxies, s5b
from syncd.bytestreams.discovery import Discovery, MemoryFile
from syncd.bytestreams.proxies import Policy, Probed, Proxies
from syncd.bytestreams.s5b import Streamhost
from syncd.bytestreams.sockets import greet_streamhost, open_listener
from syncd.errors import BytestreamError, ErrorType, OfflineError, StanzaError
from syncd.xmpp import disco
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import Iq, make_iq

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from syncd.xmpp.stanza import IqType

OWN = JID.parse("alice@example.org/laptop")
BOB = JID.parse("bob@example.net/desk")
PROXY = JID.parse("proxy.example.org")
THEIRS = JID.parse("proxy.example.net")

FORBIDDEN = StanzaError(ErrorType.AUTH, "forbidden")
UNAVAILABLE = StanzaError(ErrorType.CANCEL, "service-unavailable")

# What answers a question: text of a payload, an error, or silence.
Answer = str | StanzaError | OfflineError | None


def items(*jids: str) -> str:
    inside = "".join(f"<item jid='{jid}'/>" for jid in jids)
    return f"<query xmlns='{disco.NS_ITEMS}'>{inside}</query>"


def info(category: str = "proxy", kind: str = "bytestreams") -> str:
    identity = f"<identity category='{category}' type='{kind}'/>"
    return f"<query xmlns='{disco.NS_INFO}'>{identity}</query>"


def address(*hosts: str, jid: str = "proxy.example.org") -> str:
    inside = "".join(f"<streamhost jid='{jid}' host='{host}' port='7777'/>" for host in hosts)
    return f"<query xmlns='{s5b.NS}'>{inside}</query>"


@dataclass
class Network:
    """Servers that answer as a test says, and ports that are open or not."""

    answers: dict[tuple[str, str], Answer]
    open: dict[str, float] = field(default_factory=dict)  # by host: how long it takes
    asked: list[tuple[str, str]] = field(default_factory=list)
    probed: list[str] = field(default_factory=list)
    online: trio.Event = field(default_factory=trio.Event)
    at_once: int = 0
    most_at_once: int = 0
    memory: bytes = b""
    saved: int = 0

    async def request(
        self, kind: IqType, to: JID | None, payload: Element, timeout: float
    ) -> Iq:
        assert kind == "get"
        key = str(to), payload.tag
        self.asked.append(key)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await trio.lowlevel.checkpoint()
            answer = self.answers.get(key, UNAVAILABLE)
            if answer is None:
                await trio.sleep(timeout)
                raise OfflineError(f"{to} gave no answer for {timeout:.0f} s")
            if isinstance(answer, Exception):
                raise answer
            element = fromstring(answer)
            return Iq("result", "1", to, element, make_iq("result", "1", OWN, element))
        finally:
            self.at_once -= 1

    async def probe(self, streamhost: Streamhost) -> float:
        self.probed.append(streamhost.host)
        if streamhost.host not in self.open:
            await trio.sleep(5)
            raise BytestreamError(f"{streamhost}: no answer within 5 seconds")
        await trio.sleep(self.open[streamhost.host])
        return self.open[streamhost.host]

    def own_jid(self) -> JID | None:
        return OWN if self.online.is_set() else None

    async def wait_online(self) -> None:
        await self.online.wait()

    async def load(self) -> bytes:
        return self.memory

    async def save(self, data: bytes) -> None:
        self.memory = data
        self.saved += 1


def network(**hosts: float) -> Network:
    """Our server has two items, one of them a proxy at 203.0.113.7; the peer's has none."""
    return Network(
        {
            ("example.org", disco.ITEMS): items("conference.example.org", "proxy.example.org"),
            ("example.net", disco.ITEMS): items(),
            ("conference.example.org", disco.INFO): info("conference", "text"),
            ("proxy.example.org", disco.INFO): info(),
            ("proxy.example.org", s5b.TAG): address("203.0.113.7"),
        },
        {"203.0.113.7": 0.1},
    )


@asynccontextmanager
async def discovering(
    world: Network, policy: Policy = "auto", *, online: bool = True
) -> AsyncIterator[tuple[Proxies, Discovery]]:
    """Let it run until nothing moves any more."""
    known = Proxies(policy, "example.org", ["example.net"])
    running = Discovery(
        known,
        own_domain="example.org",
        request=world.request,
        own_jid=world.own_jid,
        wait_online=world.wait_online,
        memory=world,
        clock=trio.current_time,
        probe=world.probe,
    )
    if online:
        world.online.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        yield known, running
        nursery.cancel_scope.cancel()


def offered(known: Proxies) -> list[str]:
    return [each.host for each in known.choose(BOB, [], trio.current_time())]


def told(known: Proxies) -> list[str]:
    return [each.text for each in known.report(trio.current_time())]


async def test_our_servers_proxy_is_found_by_what_it_says_it_is(
    autojump_clock: MockClock,
) -> None:
    """XEP-0065 section 4: items, what each is, and where."""
    world = network()
    async with discovering(world) as (known, running):
        await running.prepare()
        assert offered(known) == ["203.0.113.7"]
        first, *infos, last = world.asked[:4]
        assert first == ("example.org", disco.ITEMS)
        assert sorted(infos) == [
            ("conference.example.org", disco.INFO),
            ("proxy.example.org", disco.INFO),
        ]
        assert last == ("proxy.example.org", s5b.TAG)
        assert world.probed == ["203.0.113.7"]


async def test_nothing_is_asked_while_we_are_offline(autojump_clock: MockClock) -> None:
    world = network()
    async with discovering(world, online=False) as (known, running):
        before = trio.current_time()
        await running.prepare()
        assert trio.current_time() - before == discovery.PATIENCE
        assert world.asked == []
        world.online.set()
        await running.prepare()
        assert known.usable(trio.current_time())


async def test_an_offer_does_not_wait_for_a_server_that_is_silent(
    autojump_clock: MockClock,
) -> None:
    world = network()
    world.answers["example.org", disco.ITEMS] = None
    async with discovering(world) as (known, running):
        before = trio.current_time()
        await running.prepare()
        assert trio.current_time() - before == discovery.PATIENCE
        await trio.sleep(discovery.QUERY_TIMEOUT)
        await running.prepare()  # it has been looked at, with no result
        assert trio.current_time() - before == discovery.PATIENCE + discovery.QUERY_TIMEOUT
        assert told(known) == [
            "example.org did not say whether it has a proxy: "
            "example.org gave no answer for 10 s"
        ]


async def test_an_offer_waits_for_no_peers_server(autojump_clock: MockClock) -> None:
    world = network()
    world.answers["example.net", disco.ITEMS] = None
    async with discovering(world) as (known, running):
        before = trio.current_time()
        await running.prepare()
        assert trio.current_time() - before == pytest.approx(0.1)
        assert offered(known) == ["203.0.113.7"]


async def test_what_was_known_before_is_there_at_once(autojump_clock: MockClock) -> None:
    world = network()
    async with discovering(world) as (_, running):
        await running.prepare()
    assert world.saved == 1
    async with discovering(world) as (known, running):
        world.answers["example.org", disco.ITEMS] = None
        await wait_all_tasks_blocked()
        before = trio.current_time()
        await running.prepare()
        assert trio.current_time() == before
        assert offered(known) == ["203.0.113.7"]


async def test_the_peers_servers_proxy_comes_behind_ours(autojump_clock: MockClock) -> None:
    world = network()
    world.answers |= {
        ("example.net", disco.ITEMS): items("proxy.example.net"),
        ("proxy.example.net", disco.INFO): info(),
        ("proxy.example.net", s5b.TAG): address("203.0.113.9", jid="proxy.example.net"),
    }
    world.open["203.0.113.9"] = 0.01
    async with discovering(world) as (known, _):
        await trio.sleep(1)
        assert offered(known) == ["203.0.113.7", "203.0.113.9"]


async def test_a_configured_proxy_is_asked_for_its_address_at_once(
    autojump_clock: MockClock,
) -> None:
    world = network()
    async with discovering(world, (PROXY,)) as (known, running):
        await running.prepare()
        assert offered(known) == ["203.0.113.7"]
        assert world.asked == [("proxy.example.org", s5b.TAG)]


async def test_without_proxies_wanted_nothing_is_asked(autojump_clock: MockClock) -> None:
    world = network()
    async with discovering(world, ()) as (_, running):
        await running.prepare()
        await trio.sleep(10 * proxies.REFRESH)
        assert world.asked == []


@pytest.mark.parametrize("condition", ["forbidden", "not-allowed"])
async def test_a_proxy_that_does_not_serve_us_is_left_in_peace_for_a_day(
    condition: str, autojump_clock: MockClock
) -> None:
    world = network()
    world.answers["proxy.example.org", s5b.TAG] = StanzaError(ErrorType.AUTH, condition)
    async with discovering(world) as (known, _):
        await trio.sleep(proxies.REFUSED_FOR - 60)
        assert world.asked.count(("proxy.example.org", s5b.TAG)) == 1
        assert told(known) == [f"proxy.example.org does not serve this account [{condition}]"]
        await trio.sleep(120)
        assert world.asked.count(("proxy.example.org", s5b.TAG)) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (UNAVAILABLE, "service-unavailable"),
        (None, "gave no answer"),
        (address(), "did not say at which address"),
        (address("fe80::1%eth0", "0.0.0.0"), "did not say at which address"),
        (address("169.254.1.1"), "names no address that leads anywhere"),
        (address("203.0.113.7", jid="evil.example"), "names no address that leads anywhere"),
    ],
)
async def test_a_proxy_without_an_address_is_told_in_words(
    answer: Answer, words: str, autojump_clock: MockClock
) -> None:
    world = network()
    world.answers["proxy.example.org", s5b.TAG] = answer
    async with discovering(world) as (known, _):
        await trio.sleep(60)
        assert offered(known) == []
        assert words in told(known)[0]
        assert world.probed == []
        world.answers["proxy.example.org", s5b.TAG] = address("203.0.113.7")
        await trio.sleep(proxies.RETRY + discovery.KEEP_EVERY)
        assert offered(known) == ["203.0.113.7"]


async def test_an_internal_address_is_found_out_beforehand(autojump_clock: MockClock) -> None:
    """An offer of it would be answered with item-not-found, after a long time."""
    world = network()
    world.answers["proxy.example.org", s5b.TAG] = address("10.0.0.5")
    async with discovering(world) as (known, _):
        await trio.sleep(60)
        [report] = known.report(trio.current_time())
    assert report.text == (
        "proxy.example.org names 10.0.0.5:7777, which cannot be reached from here: "
        "no answer within 5 seconds"
    )
    assert "xmpp.proxy.externalip" in report.hint


async def test_ejabberds_proxy_keeps_the_resource_of_its_node(
    autojump_clock: MockClock,
) -> None:
    world = network()
    world.answers["proxy.example.org", s5b.TAG] = address(
        "203.0.113.7", jid="proxy.example.org/70306884"
    )
    async with discovering(world) as (known, running):
        await running.prepare()
        [only] = known.choose(BOB, [], trio.current_time())
    assert str(only.jid) == "proxy.example.org/70306884"


async def test_of_openfires_many_addresses_those_that_answer_are_offered(
    autojump_clock: MockClock,
) -> None:
    """It lists all of its machine, in no order, with the scopes of that machine."""
    world = network()
    world.answers["proxy.example.org", s5b.TAG] = address(
        "fe80:0:0:0:5054:ff:fe12:3456%eth0", "172.17.0.1", "203.0.113.7", "10.8.0.1"
    )
    world.open["10.8.0.1"] = 0.05
    async with discovering(world) as (known, _):
        await trio.sleep(60)
        assert offered(known) == ["10.8.0.1", "203.0.113.7"]
        assert sorted(world.probed) == ["10.8.0.1", "172.17.0.1", "203.0.113.7"]


async def test_many_items_are_asked_a_few_at_a_time_likely_ones_first_and_not_all(
    autojump_clock: MockClock,
) -> None:
    world = network()
    crowd = [f"i{n}.example.org" for n in range(200)]
    world.answers["example.org", disco.ITEMS] = items(*crowd, "bytestreams.example.org")
    world.answers["bytestreams.example.org", disco.INFO] = info()
    async with discovering(world):
        await trio.sleep(1)
        asked = [to for to, tag in world.asked if tag == disco.INFO]
        assert len(asked) == discovery.MAX_ASKED
        assert "bytestreams.example.org" in asked[: discovery.MAX_QUERIES]
        assert world.most_at_once == discovery.MAX_QUERIES


async def test_rooms_and_users_among_the_items_are_not_asked(autojump_clock: MockClock) -> None:
    world = network()
    world.answers["example.org", disco.ITEMS] = items("room@conference.example.org", "@", "")
    async with discovering(world) as (known, _):
        await trio.sleep(1)
        assert [tag for _, tag in world.asked] == [disco.ITEMS, disco.ITEMS]
        assert told(known) == ["example.org offers no proxy for file transfers"]


async def test_items_that_never_answer_do_not_hide_the_proxy(autojump_clock: MockClock) -> None:
    world = network()
    dead = [f"gateway{n}.example.org" for n in range(31)]
    world.answers["example.org", disco.ITEMS] = items(*dead, "proxy.example.org")
    world.answers |= {(jid, disco.INFO): None for jid in dead}
    async with discovering(world) as (known, _):
        await trio.sleep(discovery.SERVER_TIMEOUT + 1)
        assert offered(known) == ["203.0.113.7"]


async def test_everything_is_looked_at_again_after_an_hour_and_after_a_reconnection(
    autojump_clock: MockClock,
) -> None:
    world = network()
    async with discovering(world) as (_, running):
        await trio.sleep(proxies.REFRESH - 60)
        assert world.asked.count(("example.org", disco.ITEMS)) == 1
        await trio.sleep(120)
        assert world.asked.count(("example.org", disco.ITEMS)) == 2
        running.refresh()
        await trio.sleep(1)
        assert world.asked.count(("example.org", disco.ITEMS)) == 3
        assert world.asked.count(("proxy.example.org", s5b.TAG)) == 3


@pytest.mark.parametrize(
    "breaks_at", [disco.ITEMS, disco.INFO, s5b.TAG], ids=["items", "info", "address"]
)
async def test_a_connection_that_breaks_meanwhile_is_nobodys_fault(
    breaks_at: str, autojump_clock: MockClock
) -> None:
    world = network()

    async def request(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
        if payload.tag == breaks_at and world.online.is_set():
            world.online = trio.Event()
        if not world.online.is_set():
            raise OfflineError("the stream ended")
        return await world.request(kind, to, payload, timeout)

    async with discovering(world, online=False) as (known, running):
        running._request = request
        world.online.set()
        await trio.sleep(10)
        assert not running._looked.is_set()
        assert not any("ended" in text for text in told(known))
        running._request = world.request
        world.online.set()
        await trio.sleep(10)
        assert offered(known) == ["203.0.113.7"]


async def test_what_is_found_is_logged_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    world = network()
    world.answers["proxy.example.org", s5b.TAG] = UNAVAILABLE
    async with discovering(world):
        await trio.sleep(10 * proxies.RETRY)
        world.answers["proxy.example.org", s5b.TAG] = address("203.0.113.7")
        await trio.sleep(10 * proxies.RETRY)
    assert [record.getMessage() for record in caplog.records] == [
        "proxy.example.org cannot be used: refused: service-unavailable [service-unavailable]",
        "proxy.example.org can be reached at 203.0.113.7:7777",
    ]


async def test_a_proxy_that_was_lost_in_use_is_looked_at_within_a_minute(
    autojump_clock: MockClock,
) -> None:
    world = network()
    async with discovering(world) as (known, running):
        await running.prepare()
        await trio.sleep(1)
        known.lost(PROXY, "connection refused")
        assert offered(known) == []
        await trio.sleep(discovery.KEEP_EVERY)
        assert offered(known) == ["203.0.113.7"]


async def test_what_is_learned_is_kept_only_when_it_is_new(autojump_clock: MockClock) -> None:
    world = network()
    async with discovering(world) as (known, _):
        await trio.sleep(10 * discovery.KEEP_EVERY)
        assert world.saved == 1
        known.worked(BOB, PROXY, trio.current_time())
        await trio.sleep(discovery.KEEP_EVERY)
        assert world.saved == 2
        known.worked(BOB, None, trio.current_time())
    assert world.saved == 3  # on the way out


@pytest.mark.parametrize("memory", [b"nonsense", b'{"proxies": 1}'])
async def test_a_broken_memory_is_begun_anew(
    memory: bytes, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    world = network()
    world.memory = memory
    async with discovering(world) as (known, running):
        await running.prepare()
        assert offered(known) == ["203.0.113.7"]
        await trio.sleep(1)
    assert "cannot read what was known of proxies" in caplog.text
    assert world.memory != memory


async def test_a_full_disk_is_no_reason_to_stop(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    world = network()

    async def full(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    world.save = full  # type: ignore[method-assign]  # a disk that is full
    async with discovering(world) as (known, _):
        await trio.sleep(5 * discovery.KEEP_EVERY)
        assert offered(known) == ["203.0.113.7"]
    assert "No space left" in caplog.text


async def test_a_real_streamhost_is_greeted_and_asked_for_nothing() -> None:
    """COMPAT(openfire): a request leaves something behind there."""
    world = network()
    heard = bytearray()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            heard.extend(await stream.receive_some(100))
            await stream.send_all(b"\x05\x00")
            heard.extend(await stream.receive_some(100))

    probe: Callable[[Streamhost], Awaitable[float]] = greet_streamhost
    async with trio.open_nursery() as nursery:
        [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listening])
        port = listening.socket.getsockname()[1]
        assert await probe(Streamhost(PROXY, "127.0.0.1", port)) >= 0
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert bytes(heard) == b"\x05\x01\x00"
    async with open_listener("127.0.0.1", 0) as listener:
        assert await probe(Streamhost(PROXY, "127.0.0.1", listener.port)) >= 0
    assert world.asked == []
    assert Probed(Streamhost(PROXY, "127.0.0.1", port), 0.0).reason == ""


async def test_what_is_kept_in_a_file_is_the_last(tmp_path: Path) -> None:
    memory = MemoryFile(tmp_path / "proxies")
    assert await memory.load() == b""
    await memory.save(b"one")
    await memory.save(b"two")
    assert await MemoryFile(tmp_path / "proxies").load() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["proxies"]
    await memory.save(bytes(2 * proxies.MAX_MEMORY))
    assert len(await memory.load()) == proxies.MAX_MEMORY + 1


async def test_a_folder_that_went_away_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await MemoryFile(tmp_path / "gone" / "proxies").save(b"")
