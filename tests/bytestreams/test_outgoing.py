"""The requester against scripted targets, and the demo server's proxy with its faults."""

from __future__ import annotations

import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, fromstring

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from syncd.bytestreams import outgoing, s5b
from syncd.bytestreams.outgoing import Opened, Place, Requester
from syncd.bytestreams.proxies import Probed, Proxies
from syncd.bytestreams.s5b import Streamhost
from syncd.bytestreams.sockets import connect_first, connect_streamhost, open_listener
from syncd.demo.faults import Faults, cut
from syncd.demo.proxy65 import Proxy65
from syncd.errors import ErrorType, OfflineError, OpeningError, StanzaError, TransferError
from syncd.transfer import si
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import Iq, make_iq, read_iq
from syncd.xmpp.xml import make
from tests.support.steps import cancelled_at, open_sockets

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from syncd.bytestreams.sockets import Listener
    from syncd.xmpp.stanza import IqType

    Target = Callable[[s5b.Query], Awaitable[Element | None]]

OWN = JID.parse("alice@example.org/laptop")
BOB = JID.parse("bob@example.org/desk")
PROXY = JID.parse("proxy.example.org")
SECOND = JID.parse("proxy2.example.org")
SID = "vxf9n471bn46"
DATA = bytes(range(256)) * 64


@dataclass
class Bench:
    """A requester, proxies to use, and a target in the hands of the test."""

    requester: Requester
    known: Proxies
    listener: Listener
    faults: dict[JID, Faults]
    proxies: dict[JID, Proxy65]
    target: Target = field(init=False)
    said: list[str] = field(default_factory=list)  # what happened, in order
    streams: list[trio.SocketStream] = field(default_factory=list)  # the target's
    online: bool = True
    answers: dict[JID, StanzaError | OfflineError | None] = field(default_factory=dict)

    async def request(
        self, kind: IqType, to: JID | None, payload: Element, timeout: float
    ) -> Iq:
        assert to is not None
        assert kind == "set"
        iq = make_iq(kind, "1", to, payload)
        if to == BOB:
            self.said.append("offer")
            answer = await self.target(s5b.read_query(payload))
            self.said.append("used")
        else:
            await trio.lowlevel.checkpoint()
            assert to.bare in self.proxies
            self.said.append(f"activate at {to}")
            if to.bare in self.answers:
                error = self.answers[to.bare]
                if error is None:
                    await trio.sleep_forever()
                raise error
            answer = self.proxies[to.bare].answer(read_iq(iq), OWN)
        return Iq("result", "1", to, answer, iq)

    async def use(self, streamhosts: tuple[Streamhost, ...]) -> Streamhost:
        """Connect as a target, in order."""
        used, stream = await connect_first(streamhosts, s5b.dstaddr(SID, OWN, BOB))
        self.streams.append(stream)
        return used

    async def polite(self, query: s5b.Query) -> Element:
        """Do as the book says."""
        used = await self.use(query.streamhosts)
        return s5b.make_used(query.sid, used.jid)

    async def by_proxy(self, query: s5b.Query) -> Element:
        """Do so from where we cannot be reached."""
        far = tuple(each for each in query.streamhosts if each.jid != OWN)
        used = await self.use(far)
        return s5b.make_used(query.sid, used.jid)

    async def open(self, sid: str = SID) -> Opened:
        async with self.requester.place(BOB) as place:
            return await place.open(sid)

    async def transfer(self) -> bytes:
        """Send something as a sender does; what arrives."""
        async with self.requester.place(BOB) as place:
            opened = await place.open(SID)
            async with opened.stream as stream:
                await stream.send_all(DATA)
            opened.carried(True)
        return await read_all(self.streams.pop())

    async def failure(self) -> OpeningError:
        before = open_sockets()
        with pytest.raises(OpeningError) as caught:
            await self.open()
        for stream in self.streams:
            await stream.aclose()
        await wait_all_tasks_blocked()
        assert open_sockets() <= before
        assert repr(self.requester._room) == "<Room held=0 waiting=0>"
        return caught.value


async def read_all(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    async with stream:
        while chunk := await stream.receive_some(65_536):
            data += chunk
    return bytes(data)


@asynccontextmanager
async def bench(*jids: JID, direct: bool = True, port: int = 0) -> AsyncIterator[Bench]:
    """A bench with these proxies, all reachable.

    Args:
      jids: Of the proxies.
      direct: Whether we listen.
      port: What we say that our port is; 0: the truth.
    """
    known = Proxies("auto", "example.org")
    known.found("example.org", jids, trio.current_time())
    running: dict[JID, Proxy65] = {}
    faults: dict[JID, Faults] = {}

    async with open_listener("127.0.0.1", 0) as listener, trio.open_nursery() as nursery:
        for jid in jids:
            faults[jid] = Faults()
            proxy = running[jid] = Proxy65(jid, "127.0.0.1", faults[jid])
            [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            proxy.port = listening.socket.getsockname()[1]
            serve = partial(trio.serve_listeners, proxy.serve, [listening])
            nursery.start_soon(serve)
            streamhost = Streamhost(jid, "127.0.0.1", proxy.port)
            known.tested(jid, [Probed(streamhost, 0.1)], trio.current_time())

        async def request(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
            return await made.request(kind, to, payload, timeout)

        requester = Requester(
            request=request,
            own_jid=lambda: OWN if made.online else None,
            listener=listener if direct else None,
            advertised=lambda: [("127.0.0.1", port or listener.port)],
            proxies=known,
            clock=trio.current_time,
        )
        made = Bench(requester, known, listener, faults, running)
        made.target = made.polite
        yield made
        nursery.cancel_scope.cancel()


def refuse(condition: str, kind: ErrorType = ErrorType.CANCEL) -> Target:
    async def target(query: s5b.Query) -> Element:
        await trio.lowlevel.checkpoint()
        raise StanzaError(kind, condition, by=str(BOB))

    return target


# --- The two ways


async def test_a_target_that_reaches_us_is_connected_directly() -> None:
    async with bench(PROXY) as made:
        opened = await made.open()
        assert (opened.method, opened.via) == ("direct", f"127.0.0.1:{made.listener.port}")
        async with opened.stream as stream:
            await stream.send_all(DATA)
        assert await read_all(made.streams[0]) == DATA
        assert made.said == ["offer", "used"]
        assert made.known.choose(BOB, [], trio.current_time())[0].jid == PROXY
        assert not made.known.prefers_proxy(BOB, trio.current_time())


async def test_a_target_that_does_not_is_connected_through_the_proxy() -> None:
    async with bench(PROXY) as made:
        made.target = made.by_proxy
        opened = await made.open()
        assert (opened.method, opened.via) == ("proxy", "proxy.example.org")
        await opened.stream.aclose()
        await made.streams.pop().aclose()
        # That it was opened says nothing yet.
        assert not made.known.prefers_proxy(BOB, trio.current_time())
        opened.carried(True)
        assert made.known.prefers_proxy(BOB, trio.current_time())


async def test_bytes_go_through_the_proxy_whole() -> None:
    async with bench(PROXY, direct=False) as made:
        assert await made.transfer() == DATA


async def test_with_nothing_to_offer_nothing_is_said() -> None:
    async with bench(direct=False) as made:
        assert not await made.requester.ready()
        error = await made.failure()
        assert (error.reason, error.same_sid) == ("nothing", False)
        assert "no address to offer" in str(error)
        assert "bytestreams.proxies" in error.hint
        assert made.said == []
    async with bench(PROXY, direct=False) as made:
        assert await made.requester.ready()


async def test_whether_there_is_a_proxy_is_said_after_the_first_look() -> None:
    """What is to be sent at the start must neither fail nor take a worse way."""
    async with bench(PROXY, direct=False) as made:
        [known] = made.known.choose(BOB, [], trio.current_time(), mediated=True)
        fresh = Proxies("auto", OWN.domain)
        looked = trio.Event()

        async def look() -> None:
            await looked.wait()
            fresh.found(OWN.domain, [PROXY], trio.current_time())
            fresh.tested(PROXY, [Probed(known, 0.1)], trio.current_time())

        made.requester._proxies, made.requester._prepare = fresh, look
        answers = []

        async def ask() -> None:
            answers.append(await made.requester.ready())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            assert answers == []
            looked.set()
        assert answers == [True]


async def test_offline_there_is_no_way_at_all() -> None:
    async with bench(PROXY) as made:
        made.online = False
        with pytest.raises(OfflineError):
            await made.open()


# --- At the proxy, and what each of them does


async def test_the_proxy_is_joined_behind_the_target_and_once_and_then_activated() -> None:
    """Row 9: Openfire, ejabberd and Prosody tell the ends apart by their order."""
    async with bench(PROXY, direct=False) as made:
        joined = made.proxies[PROXY]._join

        def join(address: str, party: object) -> object:
            made.said.append("joined")
            return joined(address, party)  # type: ignore[arg-type]  # passed on as it is

        made.proxies[PROXY]._join = join  # type: ignore[method-assign,assignment]  # watched
        assert await made.transfer() == DATA
        assert made.said == [
            "offer",
            "joined",
            "used",
            "joined",
            "activate at proxy.example.org",
        ]


@pytest.mark.parametrize("fault", ["proxy_one_way", "proxy_keeps_tail"])
async def test_a_proxy_with_the_faults_of_real_ones_will_do(fault: str) -> None:
    """Openfire relays from the requester only; Prosody keeps the tail until we close."""
    async with bench(PROXY, direct=False) as made:
        setattr(made.faults[PROXY], fault, True)
        assert await made.transfer() == DATA


async def test_a_proxy_that_has_seen_the_offer_lets_us_in() -> None:
    """Openfire, which knows a stream by the sid of the file's offer."""
    async with bench(PROXY, direct=False) as made:
        made.faults[PROXY].proxy_requires_si = True
        file = make(si.FILE, {"name": "f", "size": "1"})
        offer = make(si.SI, {"id": SID, "profile": si.NS_FILE}, file)
        made.proxies[PROXY].inspect_offer(read_iq(make_iq("set", "1", BOB, offer)), OWN, BOB)
        assert await made.transfer() == DATA


async def test_a_proxy_is_activated_under_the_jid_that_it_gave() -> None:
    """Row 27: ejabberd's has the number of its node as a resource."""
    node = JID.parse("proxy.example.org/70306884")
    async with bench(PROXY, direct=False) as made:
        streamhost = Streamhost(node, "127.0.0.1", made.proxies[PROXY].port)
        made.known.tested(PROXY, [Probed(streamhost, 0.1)], trio.current_time())
        assert await made.transfer() == DATA
        assert made.said[-1] == "activate at proxy.example.org/70306884"
        assert made.known.prefers_proxy(BOB, trio.current_time())


async def test_of_a_proxy_with_many_addresses_one_is_joined() -> None:
    """Row 27: Openfire's have one JID, and do not say which of them the target has used."""
    async with bench(PROXY, direct=False) as made:
        [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        closed = listening.socket.getsockname()[1]
        await listening.aclose()
        both = [
            Probed(Streamhost(PROXY, "127.0.0.1", closed), 0.1),
            Probed(Streamhost(PROXY, "127.0.0.1", made.proxies[PROXY].port), 0.2),
        ]
        made.known.tested(PROXY, both, trio.current_time())
        assert await made.transfer() == DATA


async def test_nothing_is_sent_before_the_activation_is_confirmed() -> None:
    async with bench(PROXY, direct=False) as made:
        made.answers[PROXY] = None
        with trio.move_on_after(0.1) as scope:
            await made.open()
        assert scope.cancelled_caught
        assert made.proxies[PROXY].relayed == 0
        await wait_all_tasks_blocked()
        [stream] = made.proxies[PROXY]._bytestreams.values()
        assert len(stream.parties) == 1, "we have gone, the target has not"
        await made.streams.pop().aclose()


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("item-not-found", "it does not see both of them"),
        ("not-allowed", "does not want this transfer"),
        ("not-authorized", "it computes another address for this stream"),
        ("forbidden", "it does not serve this account"),
        ("resource-constraint", "it has too many transfers at once"),
        ("internal-server-error", "it failed"),
        ("bad-request", "it refused"),
    ],
)
async def test_an_activation_that_is_refused_is_told_in_words(
    condition: str, words: str
) -> None:
    async with bench(PROXY, SECOND, direct=False) as made:
        made.known.worked(BOB, PROXY, trio.current_time())
        made.answers[PROXY] = StanzaError(ErrorType.CANCEL, condition)
        error = await made.failure()
        assert (error.reason, error.same_sid) == ("activation", False)
        assert f"the proxy proxy.example.org did not join us and {BOB.bare}" in str(error)
        assert f"{words} [{condition}]" in str(error)
        # The next attempt begins with the other one.
        assert made.known.choose(BOB, [], trio.current_time())[0].jid == SECOND


async def test_a_proxy_that_does_not_serve_us_after_all_is_not_offered_again() -> None:
    """Prosody with Debian's patch asks for the account at the activation too."""
    async with bench(PROXY, direct=False) as made:
        made.answers[PROXY] = StanzaError(ErrorType.AUTH, "forbidden")
        await made.failure()
        assert not await made.requester.ready()


async def test_a_target_that_only_claims_to_be_at_the_proxy_is_found_out() -> None:
    async def liar(query: s5b.Query) -> Element:
        await trio.lowlevel.checkpoint()
        return s5b.make_used(query.sid, PROXY)

    async with bench(PROXY, direct=False) as made:
        made.target = liar
        error = await made.failure()
        assert error.reason == "activation"
        assert "[not-allowed]" in str(error)


async def test_a_proxy_that_does_not_answer_the_activation_is_given_up(
    autojump_clock: MockClock,
) -> None:
    async with bench(PROXY, direct=False) as made:
        made.answers[PROXY] = None
        error = await made.failure()
        assert error.reason == "activation"
        assert "it did not answer" in str(error)


async def test_a_proxy_that_we_cannot_reach_is_named_and_looked_at() -> None:
    """The target can: it may stand in the same network as the proxy."""
    async with bench(PROXY, direct=False) as made:
        [listening] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listening.socket.getsockname()[1]
        await listening.aclose()
        lost = Streamhost(PROXY, "127.0.0.1", port)
        made.known.tested(PROXY, [Probed(lost, 0.1)], trio.current_time())

        async def near(query: s5b.Query) -> Element:
            await trio.lowlevel.checkpoint()
            return s5b.make_used(query.sid, PROXY)

        made.target = near
        error = await made.failure()
        assert (error.reason, error.same_sid) == ("unreachable", False)
        assert str(error) == (
            "bob@example.org uses the proxy proxy.example.org, which cannot be reached from "
            f"here: 127.0.0.1:{port}: connection refused"
        )
        assert made.known.due_proxies(trio.current_time()) == [PROXY]
        assert not await made.requester.ready()


async def test_a_stream_that_ends_at_the_activation_is_not_the_proxys_fault() -> None:
    async with bench(PROXY, direct=False) as made:
        made.answers[PROXY] = OfflineError("the stream to the server ended")
        with pytest.raises(OfflineError):
            await made.open()
        await made.streams.pop().aclose()
        assert await made.requester.ready()
        assert len(made.requester._room) == 0


# --- What targets answer


@pytest.mark.parametrize(
    "condition",
    ["item-not-found", "remote-server-not-found", "undefined-condition"],
    ids=["by the book", "psi", "slixmpp"],
)
async def test_a_target_that_cannot_connect_is_told_with_all_addresses(condition: str) -> None:
    async with bench(PROXY) as made:
        made.target = refuse(condition)
        error = await made.failure()
        assert (error.reason, error.same_sid) == ("refused", True)
        port = made.proxies[PROXY].port
        assert str(error) == (
            f"bob@example.org cannot connect to us at 127.0.0.1:{made.listener.port} nor to "
            f"the proxy proxy.example.org at 127.0.0.1:{port} [{condition}]"
        )
        assert "bytestreams.advertise" in error.hint
        assert made.known._peers[BOB.bare].failed.keys() == {None, PROXY}


@pytest.mark.parametrize(
    "condition", ["not-acceptable", "service-unavailable", "forbidden", "bad-request"]
)
async def test_a_target_that_does_not_want_to_says_nothing_about_the_ways(
    condition: str,
) -> None:
    async with bench(PROXY) as made:
        made.target = refuse(condition)
        error = await made.failure()
        assert (error.reason, error.same_sid) == ("refused", True)
        assert "does not want a SOCKS5 bytestream" in str(error)
        assert f"[{condition}]" in str(error)
        assert made.known._peers == {}


async def test_the_404_of_a_proxy_inside_is_told_with_who_must_mend_it() -> None:
    """The proxy names an address of its own network; so it was not even offered."""
    async with bench(PROXY) as made:
        inside = Streamhost(PROXY, "10.0.0.5", 7777)
        timed_out = Probed(inside, None, "connection timed out")
        made.known.tested(PROXY, [timed_out], trio.current_time())
        made.target = refuse("item-not-found")
        error = await made.failure()
        assert "10.0.0.5" not in str(error)
        assert error.hint.startswith(
            "proxy.example.org names 10.0.0.5:7777, which cannot be reached from here: "
            "connection timed out; its administrator must set the proxy's external address"
        )


async def test_silence_is_another_failure_than_an_error(autojump_clock: MockClock) -> None:
    """Row 14: gloox says nothing when it cannot connect."""

    async def gloox(query: s5b.Query) -> Element:
        await trio.sleep_forever()
        raise AssertionError

    async with bench(PROXY) as made:
        made.target = gloox
        before = trio.current_time()
        error = await made.failure()
        assert trio.current_time() - before == pytest.approx(outgoing.USED_TIMEOUT)
        assert (error.reason, error.same_sid) == ("silent", False)
        assert "within 120 s" in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "<query xmlns='http://jabber.org/protocol/bytestreams'/>",
        "<query xmlns='http://jabber.org/protocol/bytestreams'>"
        "<streamhost-used jid='proxy.elsewhere.example'/></query>",
    ],
)
async def test_an_answer_without_meaning_is_a_third_kind(answer: str | None) -> None:
    async def confused(query: s5b.Query) -> Element | None:
        await trio.lowlevel.checkpoint()
        return None if answer is None else fromstring(answer)

    async with bench(PROXY) as made:
        made.target = confused
        error = await made.failure()
        assert (error.reason, error.same_sid) == ("nonsense", False)


async def test_who_claims_to_be_connected_to_us_and_is_not_is_found_out(
    autojump_clock: MockClock,
) -> None:
    async def liar(query: s5b.Query) -> Element:
        await trio.lowlevel.checkpoint()
        return s5b.make_used(query.sid, OWN)

    async with bench(PROXY) as made:
        made.target = liar
        error = await made.failure()
        assert error.reason == "unconnected"
        assert made.known.prefers_proxy(BOB, trio.current_time())


# --- Targets as they are, with the bytes that they send

ADDRESS = s5b.dstaddr(SID, OWN, BOB).encode()
GREETING = b"\x05\x01\x00"
CONNECT = b"\x05\x01\x00\x03\x28" + ADDRESS + b"\x00\x00"
REPLY = b"\x05\x00\x00\x03\x28" + ADDRESS + b"\x00\x00"


async def exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = bytes(await stream.receive_some(count - len(data)))
        assert more, "hung up early"
        data += more
    return data


def writing(made: Bench, *writes: bytes, reply: bytes = REPLY) -> Target:
    """A target that sends these bytes to us, each in a write of its own."""

    async def target(query: s5b.Query) -> Element:
        near = next(each for each in query.streamhosts if each.jid == OWN)
        stream = await trio.open_tcp_stream(near.host, near.port)
        made.streams.append(stream)
        for data in writes:
            await stream.send_all(data)
            await wait_all_tasks_blocked()
        assert await exactly(stream, 2) == b"\x05\x00"
        assert await exactly(stream, len(reply)) == reply
        # COMPAT(pidgin): without the sid.
        used = make(f"{{{s5b.NS}}}streamhost-used", {"jid": str(OWN)})
        return make(s5b.TAG, None, used)

    return target


@pytest.mark.parametrize(
    ("writes", "reply"),
    [
        ([GREETING, CONNECT], REPLY),
        ([GREETING + CONNECT], REPLY),
        ([b"\x05\x02\x00\x02", CONNECT], REPLY),
        ([bytes([byte]) for byte in GREETING + CONNECT], REPLY),
        ([GREETING, CONNECT.replace(ADDRESS, ADDRESS.upper())],
         REPLY.replace(ADDRESS, ADDRESS.upper())),
        ([GREETING, CONNECT[:-2] + b"\x1e\x61"], REPLY[:-2] + b"\x1e\x61"),
    ],
    ids=["smack", "pipelined", "pidgin", "byte by byte", "upper case", "with a port"],
)  # fmt: skip
async def test_every_form_of_handshake_leads_to_us(writes: list[bytes], reply: bytes) -> None:
    """Rows 5 and 6: in any pieces; and Smack compares our reply with its request."""
    async with bench() as made:
        made.target = writing(made, *writes, reply=reply)
        opened = await made.open()
        async with opened.stream as stream:
            await stream.send_all(DATA)
        assert await read_all(made.streams[0]) == DATA


async def test_of_several_handshakes_the_one_that_survives_is_used() -> None:
    """Row 8: Psi, Gajim and Libervia connect to all of our addresses at once."""

    async def psi(query: s5b.Query) -> Element:
        near = next(each for each in query.streamhosts if each.jid == OWN)
        connect = partial(connect_streamhost, near, ADDRESS.decode())
        first, second, third = [await connect() for _ in range(3)]
        made.streams.append(first)
        cut(second)
        await third.aclose()
        await wait_all_tasks_blocked()
        return s5b.make_used(query.sid, OWN)

    async with bench() as made:
        made.target = psi
        opened = await made.open()
        async with opened.stream as stream:
            await stream.send_all(DATA)
        assert await read_all(made.streams[0]) == DATA


async def test_a_target_that_hashes_in_latin1_is_let_in() -> None:
    """Row 26: QXmpp, at a JID that is not ASCII."""
    remy = JID.parse("rémy@example.org/desk")
    latin1 = s5b.dstaddr_aliases(SID, OWN, remy)[0]

    async with bench() as made:

        async def qxmpp(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
            query = s5b.read_query(payload)
            made.streams.append(await connect_streamhost(query.streamhosts[0], latin1))
            answer = s5b.make_used(query.sid, OWN)
            return Iq("result", "1", to, answer, payload)

        made.requester._request = qxmpp
        async with made.requester.place(remy) as place:
            opened = await place.open(SID)
        await opened.stream.aclose()
        assert await read_all(made.streams[0]) == b""


async def test_the_offer_is_the_first_thing_that_is_said() -> None:
    """Row 11: a Smack receiver waits 5 s for it, so that nothing may be asked before."""
    async with bench(PROXY) as made:
        await (await made.open()).stream.aclose()
        await made.streams.pop().aclose()
        assert made.said[0] == "offer"


async def test_a_target_gets_five_streamhosts_at_most() -> None:
    """Row 12: Psi reads no more, and QXmpp loses 7 s with each that is dead."""
    offered: list[Streamhost] = []

    async def psi(query: s5b.Query) -> Element:
        offered.extend(query.streamhosts)
        return await made.by_proxy(query)

    async with bench(PROXY, SECOND) as made:
        made.target = psi
        made.requester._advertised = lambda: [(f"192.168.1.{n}", 4000) for n in range(1, 99)]
        for _ in range(2):
            opened = await made.open()
            await opened.stream.aclose()
            opened.carried(True)
            await made.streams.pop().aclose()
            await wait_all_tasks_blocked()
        jids = [each.jid for each in offered]
        assert jids[:5] == [OWN, OWN, PROXY, SECOND, OWN]
        # What worked comes first the next time: XMPPFramework tries no other.
        assert jids[5:] == [PROXY, OWN, OWN, SECOND, OWN]


async def test_what_pidgin_is_sent_comes_in_the_order_of_the_offer() -> None:
    """Row 7: one handshake after the other; what hangs up at once is the end at Pidgin's."""
    async with bench(PROXY, port=9) as made:
        seen: list[str] = []

        async def pidgin(query: s5b.Query) -> Element:
            seen.extend(str(each.jid) for each in query.streamhosts)
            return await made.polite(query)

        made.target = pidgin
        opened = await made.open()
        assert (opened.method, seen) == ("proxy", [str(OWN), str(PROXY)])
        await opened.stream.aclose()
        await made.streams.pop().aclose()


async def test_data_may_come_before_the_activation_and_does_not_disturb() -> None:
    """Row 10 seen from here: whatever a target sends to us is not read."""

    async def eager(query: s5b.Query) -> Element:
        answer = await made.by_proxy(query)
        await made.streams[0].send_all(b"hello")
        return answer

    async with bench(PROXY) as made:
        made.target = eager
        opened = await made.open()
        await opened.stream.send_all(DATA)
        assert await exactly(made.streams[0], len(DATA)) == DATA
        await opened.stream.aclose()
        await made.streams.pop().aclose()


# --- Places


async def test_no_more_transfers_than_a_proxy_takes_and_the_next_waits_for_its_turn() -> None:
    async with bench(PROXY, direct=False) as made, trio.open_nursery() as nursery:
        done = trio.Event()
        inside: list[int] = []

        async def hold(number: int) -> None:
            async with made.requester.place(JID.parse(f"p{number}@example.org/r")):
                inside.append(number)
                await done.wait()

        for number in range(outgoing.MAX_MEDIATED + 1):
            nursery.start_soon(hold, number)
        await wait_all_tasks_blocked()
        assert len(inside) == outgoing.MAX_MEDIATED
        done.set()
        await wait_all_tasks_blocked()
        assert len(inside) == outgoing.MAX_MEDIATED + 1


async def fill(requester: Requester) -> list[Place]:
    """Hold all places, each for a small file to somebody else."""
    places = []
    for number in range(outgoing.MAX_MEDIATED):
        async with requester.place(JID.parse(f"p{number}@example.org/r")) as place:
            pass
        assert place.take()
        places.append(place)
    return places


@dataclass
class Queue:
    """Transfers by proxies, each to a peer, that want a place."""

    requester: Requester
    nursery: trio.Nursery
    inside: dict[str, Place] = field(default_factory=dict)
    leaving: dict[str, trio.Event] = field(default_factory=dict)

    async def join(self, name: str, size: int) -> None:
        """Come as ``a1``, to peer ``a``; returns when it is inside, or waits."""
        self.leaving[name] = trio.Event()
        self.nursery.start_soon(self._stay, name, size)
        await wait_all_tasks_blocked()

    async def leave(self, name: str) -> None:
        self.leaving[name].set()
        await wait_all_tasks_blocked()

    async def _stay(self, name: str, size: int) -> None:
        to = JID.parse(f"{name[0]}@example.org/{name}")
        async with self.requester.place(to, size) as place:
            self.inside[name] = place
            await self.leaving[name].wait()
            del self.inside[name]


HUGE = 1 << 34
TINY = 100


@asynccontextmanager
async def queue() -> AsyncIterator[Queue]:
    async with bench(PROXY, direct=False) as made, trio.open_nursery() as nursery:
        yield Queue(made.requester, nursery)
        nursery.cancel_scope.cancel()


async def test_huge_files_leave_room_for_small_ones_and_for_other_peers() -> None:
    async with queue() as waiting:
        for name in ("a1", "a2", "b1", "b2", "c1", "d1"):
            await waiting.join(name, HUGE)
        assert set(waiting.inside) == {"a1", "b1", "c1"}
        await waiting.join("e1", TINY)
        assert set(waiting.inside) == {"a1", "b1", "c1", "e1"}
        await waiting.join("e2", TINY)
        await waiting.join("a3", TINY)
        assert len(waiting.inside) == 4
        # Who came first and fits is next: not a2, beside which there is another huge one.
        await waiting.leave("c1")
        assert set(waiting.inside) == {"a1", "b1", "d1", "e1"}
        await waiting.leave("d1")
        assert set(waiting.inside) == {"a1", "b1", "e1", "e2"}
        await waiting.leave("e1")
        assert set(waiting.inside) == {"a1", "a3", "b1", "e2"}


async def test_whoever_waits_keeps_the_turn_whoever_else_looks_again() -> None:
    async with queue() as waiting:
        for name in ("a1", "b1", "c1", "d1", "e1", "f1", "g1", "h1"):
            await waiting.join(name, TINY)
        came = []
        for name in ("a1", "b1", "c1", "d1"):
            with waiting.inside[name].asking():  # all who wait see until when they do
                await wait_all_tasks_blocked()
            before = set(waiting.inside)
            await waiting.leave(name)
            came += sorted(set(waiting.inside) - before)
        assert came == ["e1", "f1", "g1", "h1"]


async def test_one_peer_has_no_more_than_its_places() -> None:
    async with queue() as waiting:
        for name in ("a1", "a2", "a3"):
            await waiting.join(name, TINY)
        assert set(waiting.inside) == {"a1", "a2"}
        await waiting.join("b1", TINY)
        assert set(waiting.inside) == {"a1", "a2", "b1"}
        await waiting.leave("a1")
        assert set(waiting.inside) == {"a2", "a3", "b1"}


async def test_a_place_is_not_kept_for_a_person_who_thinks(autojump_clock: MockClock) -> None:
    async with queue() as waiting:
        for name in ("a1", "b1", "c1", "d1"):
            await waiting.join(name, TINY)
        await waiting.join("e1", TINY)
        with waiting.inside["a1"].asking():
            began = trio.current_time()
            while "e1" not in waiting.inside:  # noqa: ASYNC110 - the clock is virtual
                await trio.sleep(0.5)
            assert trio.current_time() - began == pytest.approx(outgoing.ASKING_GRACE, abs=0.5)
        # The answer has come after all: it is as for one who comes now.
        place = waiting.inside["a1"]
        assert not place.take()
        with pytest.raises(TransferError, match="as many transfers") as caught:
            await place.open(SID)
        assert caught.value.type is ErrorType.WAIT
        await waiting.leave("e1")
        assert place.take()


async def test_a_place_is_kept_while_nobody_else_wants_it(autojump_clock: MockClock) -> None:
    async with queue() as waiting:
        await waiting.join("a1", HUGE)
        with waiting.inside["a1"].asking():
            await trio.sleep(100)
        assert repr(waiting.inside["a1"]) == "<Place held=True>"


async def test_a_place_that_is_given_to_somebody_who_goes_is_not_lost() -> None:
    async with bench(PROXY, direct=False) as made, trio.open_nursery() as nursery:
        places = await fill(made.requester)

        async def wait(scope: trio.CancelScope) -> None:
            with scope:
                async with made.requester.place(BOB):
                    await trio.sleep_forever()

        scope = trio.CancelScope()
        nursery.start_soon(wait, scope)
        await wait_all_tasks_blocked()
        places.pop().leave()
        scope.cancel()
        await wait_all_tasks_blocked()
        assert repr(made.requester._room) == "<Room held=3 waiting=0>"


# --- Ways that carry nothing


async def test_a_way_that_carries_nothing_is_not_offered_to_that_peer() -> None:
    """Whoever connects to it uses it, and every attempt would end like the last one."""
    async with bench(PROXY) as made:
        offered: list[list[JID]] = []

        async def target(query: s5b.Query) -> Element:
            offered.append([each.jid for each in query.streamhosts])
            return await made.polite(query)

        made.target = target
        opened = await made.open()
        await opened.stream.aclose()
        opened.carried(False)
        assert await made.requester.ready(BOB)
        opened = await made.open()
        await opened.stream.aclose()
        assert opened.method == "proxy"
        opened.carried(False)
        # Nothing is left for this peer; without any other way it is as before.
        assert not await made.requester.ready(BOB)
        assert await made.requester.ready()
        assert await made.requester.ready(JID.parse("carol@example.org/r"))
        opened = await made.open()
        await opened.stream.aclose()
        opened.carried(True)
        assert await made.requester.ready(BOB)
        assert offered == [[OWN, PROXY], [PROXY], [OWN, PROXY]]
        for stream in made.streams:
            await stream.aclose()


async def test_a_target_gets_the_time_that_it_needs_first(autojump_clock: MockClock) -> None:
    """To read again what it has, on a slow disk."""
    async with bench(PROXY) as made:

        async def target(query: s5b.Query) -> Element:
            await trio.sleep(700)
            raise StanzaError(ErrorType.CANCEL, "item-not-found")

        made.target = target
        async with made.requester.place(BOB) as place:
            with pytest.raises(OpeningError, match="within 120 s"):
                await place.open(SID)
            with pytest.raises(OpeningError, match="item-not-found"):
                await place.open("other", slack=720.0)
        assert trio.current_time() == 120 + 700


async def test_direct_connections_are_not_counted() -> None:
    async with bench(PROXY) as made, trio.open_nursery() as nursery:
        streams: list[trio.SocketStream] = []
        done = trio.Event()

        async def hold(sid: str) -> None:
            async with made.requester.place(BOB) as place:
                opened = await place.open(sid)
                streams.append(opened.stream)
                await done.wait()

        async def target(query: s5b.Query) -> Element:
            address = s5b.dstaddr(query.sid, OWN, BOB)
            used, stream = await connect_first(query.streamhosts, address)
            streams.append(stream)
            return s5b.make_used(query.sid, used.jid)

        made.target = target
        for number in range(3 * outgoing.MAX_MEDIATED):
            nursery.start_soon(hold, f"sid{number}")
        while len(streams) < 6 * outgoing.MAX_MEDIATED:  # noqa: ASYNC110 - real sockets
            await trio.sleep(0.001)
        assert len(made.requester._room) == 0
        done.set()
        for stream in streams:
            await stream.aclose()


async def test_with_all_places_taken_it_is_tried_without_a_proxy() -> None:
    """The target waits for the opening by then, and not for long."""
    async with bench(PROXY) as made:
        await fill(made.requester)
        offered: list[JID] = []

        async def target(query: s5b.Query) -> Element:
            offered.extend(each.jid for each in query.streamhosts)
            return await made.polite(query)

        made.target = target
        await (await made.open()).stream.aclose()
        await made.streams.pop().aclose()
        assert offered == [OWN]
        assert len(made.requester._room) == outgoing.MAX_MEDIATED
        # Once it is known that only the proxy leads there, it waits before the offer.
        made.known.failed(BOB, [None], trio.current_time())
        with trio.move_on_after(0.05) as scope:
            await made.open()
        assert scope.cancelled_caught
        assert offered == [OWN]


@pytest.mark.parametrize(
    ("condition", "crowded"), [("item-not-found", True), ("not-acceptable", False)]
)
async def test_a_target_that_only_a_proxy_might_have_reached_is_another_failure(
    condition: str, crowded: bool
) -> None:
    """Where the proxies had no place for it; not where it wants no SOCKS5 bytestream at all."""
    async with bench(PROXY) as made:
        made.target = refuse(condition)
        assert not (await made.failure()).crowded  # the proxy was offered
        made.known.worked(BOB, None, trio.current_time())
        places = await fill(made.requester)
        with pytest.raises(OpeningError) as caught:
            await made.open()
        assert caught.value.crowded == crowded
        for place in places:
            place.leave()


async def test_with_no_proxy_at_all_none_is_crowded() -> None:
    async with bench() as made:
        made.target = refuse("item-not-found")
        assert not (await made.failure()).crowded


async def test_a_place_is_given_back_after_the_transfer_and_not_before() -> None:
    async with bench(PROXY, direct=False) as made:
        async with made.requester.place(BOB) as place:
            opened = await place.open(SID)
            assert len(made.requester._room) == 1
            assert repr(place) == "<Place held=True>"
            await opened.stream.aclose()
        assert len(made.requester._room) == 0
        await made.streams.pop().aclose()


async def test_a_place_takes_a_second_attempt_with_a_new_sid() -> None:
    async with bench(PROXY, SECOND, direct=False) as made:
        made.answers[PROXY] = StanzaError(ErrorType.WAIT, "resource-constraint")

        async def target(query: s5b.Query) -> Element:
            address = s5b.dstaddr(query.sid, OWN, BOB)
            used, stream = await connect_first(query.streamhosts, address)
            made.streams.append(stream)
            return s5b.make_used(query.sid, used.jid)

        made.target = target
        made.known.worked(BOB, PROXY, trio.current_time())
        async with made.requester.place(BOB) as place:
            with pytest.raises(OpeningError) as caught:
                await place.open("one")
            assert caught.value.type is ErrorType.WAIT
            opened = await place.open("two")
            assert opened.via == "proxy2.example.org"
            await opened.stream.aclose()
        for stream in made.streams:
            await stream.aclose()


async def test_an_offer_waits_until_something_is_known() -> None:
    async with bench(PROXY) as made:
        prepared = trio.Event()
        made.requester._prepare = prepared.wait
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.open)
            await wait_all_tasks_blocked()
            assert made.said == []
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "proxy"])
async def test_cancelling_at_any_step_leaves_nothing_open(direct: bool) -> None:
    before = open_sockets()
    values: list[Requester] = []

    async def whole() -> None:
        async with bench(PROXY, direct=direct) as made:
            values.append(made.requester)
            try:
                opened = await made.open()
                await opened.stream.aclose()
            finally:
                for stream in made.streams:
                    stream.socket.close()

    step, cancelled = 0, True
    while cancelled:
        step += 1
        cancelled = await cancelled_at(step, whole)
        assert open_sockets() == before, f"cancelled at step {step}"
        assert not any(len(each._room) for each in values)
    assert step > 15


def test_the_bytes_of_these_tests_are_those_of_the_specification() -> None:
    """XEP-0065 section 5.3.2, RFC 1928 section 4."""
    assert struct.unpack("!BBBBB40sH", CONNECT) == (5, 1, 0, 3, 40, ADDRESS, 0)
