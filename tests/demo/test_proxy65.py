"""The bytestreams proxy over real connections."""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from syncd.bytestreams import s5b
from syncd.demo import proxy65
from syncd.demo.faults import Faults, cut
from syncd.demo.proxy65 import Proxy65
from syncd.errors import BytestreamError, RemoteProtocolError, StanzaError
from syncd.transfer import si
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import make_iq, read_iq
from syncd.xmpp.xml import make, serialise
from tests.support.rawclient import socks5

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from xml.etree.ElementTree import Element

ALICE, BOB = JID("alice", "demo.example", "a"), JID("bob", "demo.example", "b")
PROXY = JID("", "proxy.demo.example")
ADDRESS = s5b.dstaddr("sid", ALICE, BOB)
# More than the kernel's buffers and two chunks together.
MUCH = 16 * 1024 * 1024  # bytes


@dataclass
class Running:
    proxy: Proxy65
    faults: Faults

    def ask(self, kind: str, payload: Element, sender: JID = ALICE) -> Element | None:
        iq = make_iq("get", "1", PROXY, payload)
        iq.set("type", kind)
        return self.proxy.answer(read_iq(iq), sender)

    def activate(self, sid: str = "sid", sender: JID = ALICE) -> None:
        assert self.ask("set", make_activate(sid, str(BOB)), sender) is None

    def offer(self, sid: str = "sid", **attributes: str) -> None:
        file = make(si.FILE, attributes)
        offer = make(si.SI, {"id": sid, "profile": si.NS_FILE}, file)
        self.proxy.inspect_offer(read_iq(make_iq("set", "1", BOB, offer)), ALICE, BOB)

    async def join(self, address: str = ADDRESS) -> trio.SocketStream:
        return await socks5(self.proxy.port, address)


def make_activate(sid: str, target: str) -> Element:
    return make(s5b.TAG, {"sid": sid}, make(f"{{{s5b.NS}}}activate", text=target))


@asynccontextmanager
async def run_proxy() -> AsyncIterator[Running]:
    faults = Faults()
    proxy = Proxy65(PROXY, "127.0.0.1", faults)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(
            partial(trio.serve_listeners, proxy.serve, listeners, handler_nursery=nursery)
        )
        yield Running(proxy, faults)
        nursery.cancel_scope.cancel()


async def read_all(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    async with stream:
        while chunk := await stream.receive_some(65_536):
            data += chunk
    return bytes(data)


async def read_exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = bytes(await stream.receive_some(count - len(data)))
        assert chunk, f"the stream ended after {len(data)} bytes"
        data += chunk
    return data


async def ended(stream: trio.SocketStream, say: bytes = b"") -> bool:
    """Whether the other end has closed, in peace or not, and reads no more."""
    async with stream:
        try:
            for _ in range(10):
                await stream.send_all(say)
                if not say and not await stream.receive_some(100):
                    return True
                await trio.sleep(0.1)
        except trio.BrokenResourceError:
            return True
    return False


async def waits(act: Callable[[], Awaitable[object]]) -> bool:
    """Whether something still waits when nothing moves any more."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(act)
            await wait_all_tasks_blocked(0.05)
            waiting = bool(nursery.child_tasks)
            scope.cancel()
    return waiting


def condition(running: Running, kind: str, payload: Element) -> str:
    with pytest.raises(StanzaError) as caught:
        running.ask(kind, payload)
    return caught.value.condition


async def test_it_says_what_and_where_it_is() -> None:
    async with run_proxy() as running:
        info = running.ask("get", make("{http://jabber.org/protocol/disco#info}query"))
        assert info is not None
        assert b"<identity category='proxy' type='bytestreams'" in serialise(info)
        items = running.ask("get", make("{http://jabber.org/protocol/disco#items}query"))
        assert items is not None
        assert len(items) == 0
        address = running.ask("get", make(s5b.TAG))
        assert address is not None
        assert [child.attrib for child in address] == [
            {"jid": str(PROXY), "host": "127.0.0.1", "port": str(running.proxy.port)}
        ]
        assert condition(running, "get", make("{urn:xmpp:ping}ping")) == "service-unavailable"


async def test_bytes_go_both_ways_after_the_activation() -> None:
    async with run_proxy() as running:
        target, requester = await running.join(), await running.join()
        running.activate()
        await requester.send_all(b"there")
        await target.send_all(b"back")
        assert await read_exactly(target, 5) == b"there"
        assert await read_exactly(requester, 4) == b"back"
        await requester.aclose()
        assert await read_all(target) == b""
        assert running.proxy.relayed == 9


async def test_much_arrives_whole_when_the_sender_closes_at_once() -> None:
    data = bytes(range(256)) * (MUCH // 256)
    async with run_proxy() as running:
        target, requester = await running.join(), await running.join()
        running.activate()

        async def send() -> None:
            async with requester:
                await requester.send_all(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            arrived = await read_all(target)
    assert hashlib.sha256(arrived).digest() == hashlib.sha256(data).digest()


async def test_a_slow_reader_slows_the_sender() -> None:
    """What nobody reads stays where it is, and not in the proxy's memory."""
    async with run_proxy() as running:
        target, requester = await running.join(), await running.join()
        running.activate()
        assert await waits(partial(requester.send_all, bytes(4 * MUCH)))
        assert running.proxy.relayed < 4 * MUCH
        await target.aclose()
        await requester.aclose()


async def test_what_is_sent_before_the_activation_is_kept() -> None:
    async with run_proxy() as running:
        target, requester = await running.join(), await running.join()
        await requester.send_all(b"early ")
        await wait_all_tasks_blocked()
        running.activate()
        await requester.send_all(b"late")
        await requester.aclose()
        assert await read_all(target) == b"early late"


async def test_the_order_of_the_parties_does_not_matter() -> None:
    async with run_proxy() as running:
        requester, target = await running.join(), await running.join()
        running.activate()
        await requester.send_all(b"file")
        await requester.aclose()
        assert await read_all(target) == b"file"


async def test_when_the_target_closes_the_requester_learns_it() -> None:
    async with run_proxy() as running:
        target, requester = await running.join(), await running.join()
        running.activate()
        await target.aclose()
        assert await requester.receive_some(1) == b""
        await requester.aclose()


async def test_a_death_on_one_side_is_a_plain_end_on_the_other() -> None:
    """So the end of the stream proves nothing; real proxies do the same."""
    async with run_proxy() as running:
        target, requester = await running.join(), await running.join()
        running.activate()
        await requester.send_all(b"half")
        assert await read_exactly(target, 4) == b"half"
        cut(requester)
        assert await read_all(target) == b""


async def test_a_death_before_the_activation_leaves_room() -> None:
    async with run_proxy() as running:
        cut(await running.join())
        async with await running.join(), await running.join():
            running.activate()


@pytest.mark.parametrize(
    ("sid", "to", "expected"),
    [
        ("other", "bob@demo.example/b", "item-not-found"),
        ("sid", "bob@demo.example/c", "item-not-found"),
        ("sid", "bob@demo.example/b", "not-allowed"),
        ("sid", "@", "jid-malformed"),
        ("sid", "", "jid-malformed"),
        ("", "bob@demo.example/b", "bad-request"),
    ],
)
async def test_activations_that_are_refused(sid: str, to: str, expected: str) -> None:
    async with run_proxy() as running, await running.join():  # one party of two
        assert condition(running, "set", make_activate(sid, to)) == expected


async def test_only_the_requester_may_activate_and_only_once() -> None:
    async with run_proxy() as running, await running.join(), await running.join():
        with pytest.raises(StanzaError) as caught:
            running.activate(sender=BOB)
        assert caught.value.condition == "item-not-found"
        running.activate()
        assert condition(running, "set", make_activate("sid", str(BOB))) == "conflict"


async def test_a_third_party_is_refused() -> None:
    async with run_proxy() as running, await running.join(), await running.join():
        with pytest.raises(BytestreamError, match="expects no such bytestream"):
            await running.join()


async def test_who_hangs_up_before_the_activation_leaves_room() -> None:
    async with run_proxy() as running:
        await (await running.join()).aclose()
        async with await running.join() as target, await running.join() as requester:
            running.activate()
            await requester.send_all(b"x")
            assert await read_exactly(target, 1) == b"x"


async def test_an_address_can_be_used_again_after_its_end() -> None:
    async with run_proxy() as running:
        for _ in range(2):
            target, requester = await running.join(), await running.join()
            running.activate()
            await requester.aclose()
            assert await read_all(target) == b""
            await wait_all_tasks_blocked()


async def test_other_protocols_are_shown_out() -> None:
    async with run_proxy() as running:
        stream = await trio.open_tcp_stream("127.0.0.1", running.proxy.port)
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        assert await ended(stream)


async def test_so_many_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy65, "MAX_CONNECTIONS", 1)
    async with run_proxy() as running:
        async with await running.join():
            with pytest.raises(RemoteProtocolError):
                await running.join()
        await wait_all_tasks_blocked()
        await (await running.join()).aclose()


@pytest.mark.parametrize("shaken", [False, True], ids=["handshake", "activation"])
async def test_nobody_waits_for_ever(
    shaken: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with run_proxy() as running:
        before = trio.current_time()
        if shaken:
            stream = await running.join()
        else:
            stream = await trio.open_tcp_stream("127.0.0.1", running.proxy.port)
        assert await stream.receive_some(1) == b""
        limit = proxy65.ACTIVATION_TIMEOUT if shaken else proxy65.HANDSHAKE_TIMEOUT
        assert trio.current_time() - before == pytest.approx(limit, abs=1)
        await stream.aclose()


async def test_one_end_does_not_outlive_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A target that neither reads nor closes is cut off soon after its requester left."""
    async with run_proxy() as running:
        target, requester = await running.join(), await running.join()
        running.activate()
        await requester.aclose()
        assert await target.receive_some(1) == b""
        await trio.sleep(proxy65.LINGER + 1)
        assert await ended(target, say=b"anybody there?")


async def test_fault_one_way() -> None:
    """As Openfire: who comes first is the target, and is never read from."""
    async with run_proxy() as running:
        running.faults.proxy_one_way = True
        first, second = await running.join(), await running.join()
        running.activate()
        await first.send_all(b"lost")
        await second.send_all(b"file")
        assert await read_exactly(first, 4) == b"file"
        await wait_all_tasks_blocked()
        assert running.proxy.relayed == 4
        await second.aclose()
        await first.aclose()


async def test_fault_keeps_tail() -> None:
    """As Prosody: the last bytes come only when the sender closes."""
    async with run_proxy() as running:
        running.faults.proxy_keeps_tail = True
        target, requester = await running.join(), await running.join()
        running.activate()
        data = bytes(range(250)) * 40
        await requester.send_all(data)
        assert await read_exactly(target, len(data) - 4096) == data[:-4096]
        assert await waits(partial(target.receive_some, 1))
        await requester.aclose()
        assert await read_all(target) == data[-4096:]


async def test_fault_requires_si() -> None:
    """As Openfire: an offer must have passed, by name and size."""
    async with run_proxy() as running:
        running.faults.proxy_requires_si = True
        with pytest.raises(BytestreamError, match="expects no such bytestream"):
            await running.join()
        for attributes in ({"name": "f"}, {"size": "1"}, {"name": "f", "size": "big"}):
            with pytest.raises(StanzaError) as caught:
                running.offer(**attributes)
            assert caught.value.condition == "not-allowed"
        running.offer(name="f", size="1")
        async with await running.join(), await running.join():
            running.activate()


async def test_offers_are_forgotten(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(proxy65, "_MAX_OFFERS", 1)
    async with run_proxy() as running:
        running.offer("sid", name="f", size="1")
        running.offer("other", name="f", size="1")
        running.faults.proxy_requires_si = True
        with pytest.raises(BytestreamError):
            await running.join()
        running.offer("sid", name="f", size="1")
        await (await running.join()).aclose()
        await trio.sleep(601)
        with pytest.raises(BytestreamError):
            await running.join()


async def test_offers_without_name_pass_a_proxy_that_does_not_look() -> None:
    async with run_proxy() as running:
        running.offer(name="")
        running.proxy.inspect_offer(
            read_iq(make_iq("set", "1", BOB, make("{urn:xmpp:ping}ping"))), ALICE, BOB
        )
        await (await running.join()).aclose()


async def test_fault_cut_after() -> None:
    async with run_proxy() as running:
        running.faults.proxy_cut_after = 10
        target, requester = await running.join(), await running.join()
        running.activate()
        await requester.send_all(b"0123456789")
        assert await read_exactly(target, 10) == b"0123456789"
        await requester.send_all(b"x")
        for stream in (target, requester):
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
            await stream.aclose()


async def test_fault_flip() -> None:
    async with run_proxy() as running:
        running.faults.proxy_flip_at = 3
        target, requester = await running.join(), await running.join()
        running.activate()
        await requester.send_all(b"aa")
        assert await read_exactly(target, 2) == b"aa"
        await requester.send_all(b"aaa")
        await requester.aclose()
        assert await read_all(target) == b"a`a"


async def test_fault_silent() -> None:
    async with run_proxy() as running:
        running.faults.proxy_silent = True
        stream = await trio.open_tcp_stream("127.0.0.1", running.proxy.port)
        await stream.send_all(b"\x05\x01\x00")
        assert await waits(partial(stream.receive_some, 1))
        await stream.aclose()
