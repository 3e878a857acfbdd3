import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from syncd.bytestreams import sockets
from syncd.bytestreams.addresses import own_addresses
from syncd.bytestreams.s5b import Streamhost
from syncd.bytestreams.sockets import (
    Listener,
    connect_first,
    connect_streamhost,
    greet_streamhost,
    open_listener,
)
from syncd.errors import BytestreamError, ConfigError
from syncd.xmpp.jid import JID
from tests.support.steps import cancelled_at, open_sockets

PEER = JID.parse("requester@example.com/foo")
PROXY = JID.parse("streamer.example.com")
ADDRESS, OTHER = "a" * 40, "b" * 40
REQUEST = b"\x05\x01\x00\x03\x28" + ADDRESS.encode() + b"\x00\x00"
REPLY = b"\x05\x00\x00\x03\x28" + ADDRESS.encode() + b"\x00\x00"

Script = Callable[[trio.SocketStream], Awaitable[None]]


def at(port: int, jid: JID = PEER) -> Streamhost:
    return Streamhost(jid, "127.0.0.1", port)


@asynccontextmanager
async def streamhost(script: Script) -> AsyncIterator[int]:
    """A streamhost that behaves as the script says; yields its port."""
    async with trio.open_nursery() as nursery:
        (listening,) = await nursery.start(
            partial(trio.serve_tcp, script, 0, host="127.0.0.1", backlog=16)
        )
        yield listening.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def closed_port() -> int:
    (listening,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listening.socket.getsockname()[1]
    await listening.aclose()
    return port


async def exactly(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await stream.receive_some(count - len(data))
        assert more, "hung up early"
        data += more
    return data


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other tasks do with real sockets, for at most a few real seconds."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - the kernel sets no Event
            await trio.sleep(0.001)


async def test_the_target_connects_and_the_requester_takes_the_connection() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with listener.expect(ADDRESS) as slot:
            used, theirs = await connect_first([at(listener.port)], ADDRESS)
            assert used == at(listener.port)
            ours = await slot.winner()
        async with ours, theirs:
            await ours.send_all(b"FILE")
            assert await exactly(theirs, 4) == b"FILE"
            for stream in (ours, theirs):
                assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


async def test_nobody_is_let_in_without_being_expected() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with pytest.raises(BytestreamError, match="it expects no such bytestream"):
            await connect_streamhost(at(listener.port), ADDRESS)
        with listener.expect(ADDRESS):
            pass
        with pytest.raises(BytestreamError, match="it expects no such bytestream"):
            await connect_streamhost(at(listener.port), ADDRESS)


async def test_a_wrong_address_is_refused_while_a_right_transfer_goes_on() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with listener.expect(ADDRESS) as slot:
            theirs = await connect_streamhost(at(listener.port), ADDRESS)
            ours = await slot.winner()
            async with ours, theirs:
                await ours.send_all(b"one ")
                with pytest.raises(BytestreamError, match="refused"):
                    await connect_streamhost(at(listener.port), OTHER)
                await ours.send_all(b"two")
                assert await exactly(theirs, 7) == b"one two"


async def test_case_and_aliases_lead_to_the_same_slot() -> None:
    """XEP-0065 says hexadecimal, not in which case; and some clients hash otherwise."""
    async with open_listener("127.0.0.1", 0) as listener:
        with listener.expect(ADDRESS, OTHER) as slot:
            for address in (ADDRESS.upper(), OTHER):
                theirs = await connect_streamhost(at(listener.port), address)
                ours = await slot.winner()
                async with ours, theirs:
                    await ours.send_all(b"F")
                    assert await exactly(theirs, 1) == b"F"


async def test_expecting_an_address_twice_is_our_own_mistake() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with (
            listener.expect(ADDRESS),
            pytest.raises(ValueError, match="already"),
            listener.expect(OTHER, ADDRESS),
        ):
            pytest.fail("was expected twice")
        with listener.expect(ADDRESS) as slot:
            assert repr(slot) == "<Slot open=True finished=0>"
        assert repr(slot) == "<Slot open=False finished=0>"


async def test_the_last_connection_that_is_still_open_wins_and_the_others_are_closed() -> None:
    """Psi and Gajim connect to all of our addresses at once, and close all but one."""
    async with open_listener("127.0.0.1", 0) as listener:
        with listener.expect(ADDRESS) as slot:
            first, second, third = [
                await connect_streamhost(at(listener.port), ADDRESS) for _ in range(3)
            ]
            await until(lambda: len(slot._finished) == 3)
            await third.aclose()
            ours = await slot.winner()
        async with ours, first, second:
            await ours.send_all(b"F")
            assert await exactly(second, 1) == b"F"
            assert await first.receive_some(1) == b""


async def test_no_more_than_four_connections_are_kept_for_one_bytestream() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with listener.expect(ADDRESS) as slot:
            kept = [await connect_streamhost(at(listener.port), ADDRESS) for _ in range(4)]
            await until(lambda: slot.full)
            with pytest.raises(BytestreamError, match="refused"):
                await connect_streamhost(at(listener.port), ADDRESS)
            await kept.pop().aclose()  # room again
            kept.append(await connect_streamhost(at(listener.port), ADDRESS))
        for stream in kept:
            assert await stream.receive_some(1) == b""
            await stream.aclose()


async def test_a_handshake_that_ends_after_the_slot_is_not_kept() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with listener.expect(ADDRESS) as slot:
            late = await connect_streamhost(at(listener.port), ADDRESS)
        assert not slot.add(late)
        await late.send_all(b"still ours, and open")
        await late.aclose()


async def test_the_winner_is_waited_for() -> None:
    """The peer's stanza may overtake our own task's turn."""
    async with open_listener("127.0.0.1", 0) as listener, trio.open_nursery() as nursery:
        with listener.expect(ADDRESS) as slot:
            winner = []

            async def take() -> None:
                winner.append(await slot.winner())

            nursery.start_soon(take)
            await wait_all_tasks_blocked()
            theirs = await connect_streamhost(at(listener.port), ADDRESS)
            await until(lambda: bool(winner))
            await theirs.aclose()
            await winner[0].aclose()


async def test_a_peer_that_only_claims_to_be_connected_is_told_so(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with (
            listener.expect(ADDRESS) as slot,
            pytest.raises(BytestreamError, match="no connection of it is open") as caught,
        ):
            await slot.winner()
    assert "bytestreams.direct" in caught.value.hint


async def test_who_says_nothing_is_closed_after_five_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        silent = await trio.open_tcp_stream("127.0.0.1", listener.port)
        slow = await trio.open_tcp_stream("127.0.0.1", listener.port)
        started = trio.current_time()
        async with silent, slow:
            for byte in b"\x05\x01\x00\x05\x01":
                await slow.send_all(bytes([byte]))
                await trio.sleep(0.9)
            await trio.sleep(0.6)
            assert await silent.receive_some(1) == b""
            assert await exactly(slow, 2) == b"\x05\x00"
            assert await slow.receive_some(1) == b""
        assert trio.current_time() - started == pytest.approx(5.1)
        assert "half_open=0" in repr(listener)


async def test_a_flood_of_silent_connections_drops_the_oldest_and_shuts_nobody_out() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        before = open_sockets()
        flood = [await trio.open_tcp_stream("127.0.0.1", listener.port) for _ in range(80)]
        with listener.expect(ADDRESS) as slot:
            theirs = await connect_streamhost(at(listener.port), ADDRESS)
            ours = await slot.winner()
            assert len(listener._half_open) <= sockets.MAX_HALF_OPEN
            assert open_sockets() - before <= 80 + sockets.MAX_HALF_OPEN + 2
            for oldest in flood[:16]:
                assert await oldest.receive_some(1) == b""
        for stream in (*flood, theirs, ours):
            await stream.aclose()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
        b"\x05",
        b"\x05\x01\x00\x05\x01\x00\x03\xff",
        b"\xff" * 9000,
    ],
)
async def test_nonsense_and_hanging_up_do_not_disturb_the_listener(said: bytes) -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        for linger in (False, True):
            stranger = await trio.open_tcp_stream("127.0.0.1", listener.port)
            if said:
                await stranger.send_all(said)
            if linger:  # a reset instead of an orderly end
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))
            await stranger.aclose()
        await until(lambda: not listener._half_open)
        with listener.expect(ADDRESS) as slot:
            theirs = await connect_streamhost(at(listener.port), ADDRESS)
            await (await slot.winner()).aclose()
            await theirs.aclose()


async def test_running_out_of_descriptors_pauses_the_listener(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so once, does not spin, and goes on by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_listener("127.0.0.1", 0) as listener:
        client = trio.socket.socket()
        highest = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208 - no path needed
        spare = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
            while True:  # fill the gaps below the limit
                try:
                    spare.append(socket.socket())
                except OSError:
                    break
            with caplog.at_level(logging.WARNING):
                await client.connect(("127.0.0.1", listener.port))
                await trio.sleep(10 * sockets.ACCEPT_PAUSE)
            assert [r.getMessage() for r in caplog.records] == [
                "cannot accept connections for now: Too many open files"
            ]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in spare:
                each.close()
        async with trio.SocketStream(client) as stream:
            await stream.send_all(b"\x05\x01\x00")
            assert await exactly(stream, 2) == b"\x05\x00"


async def test_an_address_in_use_is_a_sentence_about_the_configuration() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with pytest.raises(ConfigError, match="address already in use") as caught:
            async with open_listener("127.0.0.1", listener.port):
                pytest.fail("was bound twice")
    assert "bytestreams.listen" in caught.value.hint


async def test_the_listener_knows_where_it_can_be_reached() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        assert listener.addresses() == ["127.0.0.1"]
        assert f"port {listener.port}" in repr(listener)
    assert all(":" not in address for address in Listener("0.0.0.0", 1).addresses())
    assert Listener("::", 1).addresses() == own_addresses()


async def test_without_ipv6_the_listener_is_one_of_ipv4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    async with open_listener(None, 0) as listener:
        assert listener.host == "0.0.0.0"
        assert all(":" not in address for address in listener.addresses())


@pytest.mark.parametrize("address", ["::", None])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_the_listener_of_ipv6_is_reached_by_both_families(
    host: str, address: str | None
) -> None:
    async with open_listener(address, 0) as listener:
        with listener.expect(ADDRESS) as slot:
            streamhost = Streamhost(PEER, host, listener.port)
            theirs = await connect_streamhost(streamhost, ADDRESS)
            ours = await slot.winner()
            await ours.send_all(b"file")
            assert bytes(await theirs.receive_some(10)) == b"file"
            await theirs.aclose()
            await ours.aclose()


class TwoAddresses(trio.abc.HostnameResolver):
    """A resolver that knows one machine with two addresses."""

    async def getaddrinfo(self, host, port, family=0, type=0, proto=0, flags=0):  # type: ignore[no-untyped-def]  # noqa: A002 - the socket module's words
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (f"127.0.0.{n}", port)) for n in (1, 2)
        ]

    async def getnameinfo(self, sockaddr, flags):  # type: ignore[no-untyped-def]
        raise NotImplementedError


async def test_a_name_with_several_addresses_is_listened_on_at_the_first() -> None:
    """A peer can be told one port only, and each address would get its own."""
    trio.socket.set_custom_hostname_resolver(TwoAddresses())
    async with open_listener("host.example", 0) as listener:
        assert listener.host == "127.0.0.1"
        with pytest.raises(OSError, match=r"127\.0\.0\.2:\d+ failed"):
            await trio.open_tcp_stream("127.0.0.2", listener.port)


async def test_the_file_may_lie_right_behind_the_reply() -> None:
    """Pidgin and gloox send without waiting."""

    async def eager(stream: trio.SocketStream) -> None:
        await exactly(stream, 3)
        await stream.send_all(b"\x05\x00")
        await exactly(stream, len(REQUEST))
        await stream.send_all(REPLY + b"FILE")

    async with streamhost(eager) as port:
        stream = await connect_streamhost(at(port), ADDRESS)
        assert await exactly(stream, 4) == b"FILE"
        assert await stream.receive_some(1) == b""
        await stream.aclose()


async def test_streamhosts_are_tried_in_order_and_one_at_a_time() -> None:
    """Pidgin's listener takes one connection in all."""
    seen: list[str] = []

    def refusing(name: str) -> Script:
        async def script(stream: trio.SocketStream) -> None:
            seen.append(f"{name} opened")
            await exactly(stream, 3)
            await stream.send_all(b"\x05\x00")
            await exactly(stream, len(REQUEST))
            await stream.send_all(b"\x05\x01" if name != "third" else REPLY)
            await stream.receive_some(1)
            seen.append(f"{name} closed")

        return script

    async with (
        streamhost(refusing("first")) as first,
        streamhost(refusing("second")) as second,
        streamhost(refusing("third")) as third,
        streamhost(refusing("fourth")) as fourth,
    ):
        hosts = [at(first), at(await closed_port()), at(second), at(third), at(fourth)]
        used, stream = await connect_first(hosts, ADDRESS)
        await stream.aclose()
        assert used == at(third)
        await until(lambda: "third closed" in seen)
    opened = [each for each in seen if "opened" in each]
    assert opened == ["first opened", "second opened", "third opened"]
    assert seen.index("first closed") < seen.index("third opened")


async def test_when_all_fail_each_is_named_with_its_reason(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await stream.receive_some(3)
        await trio.sleep_forever()

    async def web(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400\r\n\r\n")
        await stream.receive_some(3)

    async def rude(stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))

    closed = await closed_port()
    async with (
        open_listener("127.0.0.1", 0) as listener,
        streamhost(silent) as quiet,
        streamhost(web) as server,
        streamhost(rude) as reset,
    ):
        started = trio.current_time()
        ports = [closed, listener.port, quiet, server, reset]
        with pytest.raises(BytestreamError) as caught:
            await connect_first([at(port) for port in ports], ADDRESS)
        assert trio.current_time() - started == pytest.approx(5)
    message = str(caught.value)
    for port, reason in [
        (closed, "connection refused"),
        (listener.port, "the streamhost refused: it expects no such bytestream"),
        (quiet, "no answer within 5 seconds"),
        (server, "the other end does not speak SOCKS5"),
    ]:
        assert f"127.0.0.1:{port}: {reason}" in message
    assert f"127.0.0.1:{reset}: the connection was" in message  # closed, or reset
    assert "bytestreams.advertise" in caught.value.hint
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 5


async def test_a_proxy_in_doubt_is_not_asked_twice(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Openfire would take the second handshake for the other end's."""
    asked = []

    async def lost_reply(stream: trio.SocketStream) -> None:
        asked.append(stream)
        await exactly(stream, 3)
        await stream.send_all(b"\x05\x00")
        await exactly(stream, len(REQUEST))
        await trio.sleep_forever()

    async with streamhost(lost_reply) as one, streamhost(lost_reply) as two:
        hosts = [at(one, PROXY), at(two, PROXY), at(await closed_port(), PEER)]
        with pytest.raises(BytestreamError, match="left us waiting"):
            await connect_first(hosts, ADDRESS)
    assert len(asked) == 1


async def test_no_streamhost_at_all_is_a_failure_with_a_hint() -> None:
    with pytest.raises(BytestreamError, match="named no address") as caught:
        await connect_first([], ADDRESS)
    assert "bytestreams.listen" in caught.value.hint


@pytest.mark.parametrize("host", ["does-not-exist.invalid", "x" * 64 + ".example", "-..-"])
async def test_a_name_that_leads_nowhere_is_a_reason_too(host: str) -> None:
    with pytest.raises(BytestreamError, match=r"^" + host[:8]):
        await connect_streamhost(Streamhost(PEER, host, 1), ADDRESS)


async def test_a_name_with_several_addresses_tells_one_reason() -> None:
    trio.socket.set_custom_hostname_resolver(TwoAddresses())
    port = await closed_port()
    with pytest.raises(BytestreamError, match=f"^host.example:{port}: connection refused$"):
        await connect_streamhost(Streamhost(PEER, "host.example", port), ADDRESS)


async def test_cancelling_at_any_step_leaves_nothing_open() -> None:
    """Neither side leaks a socket or an expectation, wherever it is interrupted."""
    before = open_sockets()
    listeners: list[Listener] = []

    async def whole() -> None:
        async with open_listener("127.0.0.1", 0) as listener:
            listeners.append(listener)
            closed = await closed_port()
            with listener.expect(ADDRESS) as slot:
                hosts = [at(closed), at(listener.port)]
                _, theirs = await connect_first(hosts, ADDRESS)
                async with theirs, await slot.winner() as ours:
                    await ours.send_all(b"FILE")
                    await exactly(theirs, 4)

    step, cancelled = 0, True
    while cancelled:
        step += 1
        cancelled = await cancelled_at(step, whole)
        assert open_sockets() == before, f"cancelled at step {step}"
        assert not any(each._expected or each._half_open for each in listeners)
    assert step > 15


async def test_a_streamhost_is_greeted_without_being_asked_for_anything() -> None:
    """COMPAT(openfire): it remembers every request."""
    async with open_listener("127.0.0.1", 0) as listener:
        assert await greet_streamhost(at(listener.port)) >= 0
        await until(lambda: not listener._half_open)


async def test_what_does_not_greet_back_is_no_streamhost() -> None:
    async def web(stream: trio.SocketStream) -> None:
        await stream.receive_some(3)
        await stream.send_all(b"HTTP/1.1 400\r\n\r\n")

    async def guarded(stream: trio.SocketStream) -> None:
        await stream.receive_some(3)
        await stream.send_all(b"\x05\xff")

    async with streamhost(web) as server, streamhost(guarded) as proxy:
        with pytest.raises(BytestreamError, match="does not speak SOCKS5"):
            await greet_streamhost(at(server))
        with pytest.raises(BytestreamError, match="demands a login"):
            await greet_streamhost(at(proxy))
    with pytest.raises(BytestreamError, match="connection refused"):
        await greet_streamhost(at(await closed_port()))


async def test_a_streamhost_that_refuses_is_asked_in_another_spelling() -> None:
    """Row 26: QXmpp expects the hash of the JIDs in Latin-1."""
    async with open_listener("127.0.0.1", 0) as listener:
        with listener.expect(OTHER) as slot:
            _, theirs = await connect_first([at(listener.port)], ADDRESS, ["c" * 40, OTHER])
            async with theirs, await slot.winner() as ours:
                await ours.send_all(b"F")
                assert await exactly(theirs, 1) == b"F"


async def test_a_refusal_in_every_spelling_is_told_once() -> None:
    async with open_listener("127.0.0.1", 0) as listener:
        with pytest.raises(BytestreamError) as caught:
            await connect_first([at(listener.port)], ADDRESS, [OTHER])
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert len(caught.value.__cause__.exceptions) == 1


async def test_only_who_refuses_is_asked_in_another_spelling() -> None:
    """Who hangs up, or keeps silent, may have taken the first one for good."""
    asked = []

    async def rude(stream: trio.SocketStream) -> None:
        await exactly(stream, 3)
        await stream.send_all(b"\x05\x00")
        asked.append(await exactly(stream, len(REQUEST)))

    async with streamhost(rude) as port:
        with pytest.raises(BytestreamError):
            await connect_first([at(port)], ADDRESS, [OTHER])
    assert asked == [REQUEST]
