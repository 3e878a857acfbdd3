import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest
import trio
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from syncd.bytestreams import ibb, inband
from syncd.bytestreams.ibb import Block
from syncd.bytestreams.inband import Inband, Sending, Slot
from syncd.errors import (
    BytestreamError,
    ErrorType,
    IntegrityError,
    OfflineError,
    StalledError,
    StanzaError,
    TruncatedError,
)
from syncd.transfer import pump
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import Iq, IqType, Request
from syncd.xmpp.xml import serialise
from tests.support.steps import cancelled_at, open_sockets

ALICE = JID.parse("alice@example.org/a")
BOB = JID.parse("bob@example.org/b")
EVE = JID.parse("eve@example.org/e")
SID = "s1"

Answer = Callable[[Iq], Awaitable[object]]
"""One end of the wire: answers a request, or raises `StanzaError`."""

BUSY = StanzaError(ErrorType.WAIT, "resource-constraint")


class Wire:
    """Carries requests from one end to another: in order, as text, and with a time limit."""

    def __init__(self) -> None:
        self.ends: dict[JID, Answer] = {}
        self.sent: list[tuple[JID, Element]] = []
        self.under_way = 0
        self.most_under_way = 0
        self.cut = False
        self.latency = 0.0  # seconds, of an answer

    def request_of(self, own: JID) -> Request:
        async def request(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
            if self.cut:
                raise OfflineError("not connected to the server")
            assert to is not None
            received = fromstring(serialise(payload))
            self.sent.append((own, received))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            try:
                if to not in self.ends:  # as the server says of who is not there
                    raise StanzaError(ErrorType.CANCEL, "service-unavailable")
                with trio.move_on_after(timeout):
                    await self.ends[to](an_iq(received, own, kind))
                    await trio.sleep(self.latency)
                    return Iq("result", "id", to, None, Element("iq"))
            finally:
                self.under_way -= 1
            raise OfflineError(f"{to} gave no answer for {timeout:.0f} s")

        return request

    def join(self, own: JID, max_block: int = ibb.MAX_BLOCK) -> Inband:
        """A new end that speaks as we do."""
        end = Inband(self.request_of(own), max_block=lambda: max_block)
        self.ends[own] = lambda iq: answer(end, iq)
        return end

    def said_by(self, who: JID) -> list[str]:
        """What an end has sent: ``open 4095``, ``data 0``, ``close``."""
        return [
            " ".join(
                filter(
                    None,
                    [each.tag.rpartition("}")[2], each.get("block-size"), each.get("seq")],
                )
            )
            for sender, each in self.sent
            if sender == who
        ]


def answer(end: Inband, iq: Iq) -> Awaitable[None]:
    assert iq.payload is not None
    handlers = {ibb.OPEN: end.on_open, ibb.DATA: end.on_data, ibb.CLOSE: end.on_close}
    return handlers[iq.payload.tag](iq)


def an_iq(payload: Element, sender: JID | None = ALICE, kind: IqType = "set") -> Iq:
    return Iq(kind, "id", sender, payload, Element("iq"))


async def refused(end: Inband, payload: Element | str, sender: JID | None = ALICE) -> str:
    """Let an end take a request that it must refuse; returns why it does."""
    element = fromstring(payload) if isinstance(payload, str) else payload
    with pytest.raises(StanzaError) as caught:
        await answer(end, an_iq(element, sender))
    return f"{caught.value.type} {caught.value.condition}"


async def ask(end: Inband, payload: Element | str, sender: JID = ALICE) -> None:
    """Let an end take a request that it must not refuse."""
    element = fromstring(payload) if isinstance(payload, str) else payload
    await answer(end, an_iq(element, sender))


def opening(sid: str = SID, block_size: int = 4096, stanza: str = "iq") -> str:
    return f"<open xmlns='{ibb.NS}' sid='{sid}' block-size='{block_size}' stanza='{stanza}'/>"


def data(seq: int, content: bytes = b"abc", sid: str = SID) -> Element:
    return ibb.make_data(Block(sid=sid, seq=seq, data=content))


CLOSE = ibb.make_close(SID)


def pattern(size: int) -> bytes:
    """Bytes of which no two places look alike."""
    return blake3(b"pattern").digest(size)


async def read_all(stream: trio.SocketStream) -> bytes:
    async with stream:
        return b"".join([piece async for piece in stream])


async def received(end: Inband, content: bytes, sid: str = SID, sender: JID = ALICE) -> None:
    """Receive a stream, and compare it with what it should be."""
    async with end.expect(sender, sid, len(content)) as slot:
        assert await read_all(await slot.opened(10)) == content


async def sent(end: Inband, content: bytes, to: JID = BOB, window: int = 1) -> bool:
    """Send a stream; returns whether it was confirmed."""
    async with end.open(to, SID, window=window) as sending:
        await sending.stream.send_all(content)
        return await sending.finish()


async def never() -> None:
    await trio.sleep_forever()


async def answer_no_block(payload: Element) -> None:
    """A habit of a peer that opens and closes."""
    if payload.tag == ibb.DATA:
        await never()


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def alice(wire: Wire) -> Inband:
    return wire.join(ALICE)


@pytest.fixture
def bob(wire: Wire) -> Inband:
    return wire.join(BOB)


# --- From one end to the other


async def test_bytes_go_from_one_end_to_the_other(
    wire: Wire, alice: Inband, bob: Inband
) -> None:
    """Every block but the last is as big as may be."""
    content = pattern(10_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(received, bob, content)
        await wait_all_tasks_blocked()
        assert await sent(alice, content)
    assert wire.said_by(ALICE) == ["open 4095", "data 0", "data 1", "data 2", "close"]
    assert wire.said_by(BOB) == []
    assert wire.most_under_way == 1


async def test_an_empty_stream_is_opened_and_closed(
    wire: Wire, alice: Inband, bob: Inband
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(received, bob, b"")
        await wait_all_tasks_blocked()
        assert await sent(alice, b"")
    assert wire.said_by(ALICE) == ["open 4095", "close"]


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(0, 60_000),
    pieces=st.lists(st.integers(1, 20_000), max_size=10),
    window=st.integers(1, 20),
    block_size=st.integers(255, 9_000),
    most=st.integers(600, 9_000),
)
def test_no_cut_window_or_block_size_changes_the_bytes(
    size: int, pieces: list[int], window: int, block_size: int, most: int
) -> None:
    content, wire = pattern(size), Wire()
    alice, bob = wire.join(ALICE), wire.join(BOB, max_block=most)

    async def sending() -> None:
        async with alice.open(BOB, SID, window=window, block_size=block_size) as stream:
            at = 0
            for piece in [*pieces, size]:
                await stream.stream.send_all(content[at : at + piece])
                at += piece
            assert await stream.finish()

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(received, bob, content)
            await wait_all_tasks_blocked()
            nursery.start_soon(sending)

    trio.run(both)
    assert wire.most_under_way <= window


async def test_several_streams_share_the_way(wire: Wire, alice: Inband, bob: Inband) -> None:
    """In both directions, also under the same sid."""
    contents = [pattern(20_000)[n:] for n in range(4)]

    async def sending(end: Inband, to: JID, sid: str, content: bytes) -> None:
        async with end.open(to, sid, window=4) as stream:
            await stream.stream.send_all(content)
            assert await stream.finish()

    async with trio.open_nursery() as nursery:
        for number, content in enumerate(contents):
            nursery.start_soon(received, bob, content, f"s{number}")
            nursery.start_soon(received, alice, content, f"s{number}", BOB)
        await wait_all_tasks_blocked()
        for number, content in enumerate(contents):
            nursery.start_soon(sending, alice, BOB, f"s{number}", content)
            nursery.start_soon(sending, bob, ALICE, f"s{number}", content)


async def test_a_window_is_used_and_kept_in_order(
    wire: Wire, alice: Inband, bob: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    """As many blocks as fit are sent in the time of one answer."""
    wire.latency = 1
    content = pattern(50 * ibb.BLOCK_SIZE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(received, bob, content)
        await wait_all_tasks_blocked()
        assert await sent(alice, content, window=16)
    assert wire.said_by(ALICE)[1:-1] == [f"data {seq}" for seq in range(50)]
    assert wire.most_under_way == 16
    assert trio.current_time() == 1 + 4 + 1  # opening, 50 blocks, close


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Make files, open for reading and writing."""
    fds = []

    def make(name: str, content: bytes = b"") -> int:
        (tmp_path / name).write_bytes(content)
        fds.append(os.open(tmp_path / name, os.O_RDWR))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("window", [1, 16])
async def test_a_file_is_pumped_through(
    alice: Inband, bob: Inband, open_file: Callable[..., int], window: int
) -> None:
    whole, offset = pattern(300_001), 1_234
    source, target = open_file("source", whole), open_file("target", whole[:offset])
    length = len(whole) - offset

    async def receive() -> None:
        async with bob.expect(ALICE, SID, length) as slot:
            stream = await slot.opened(10)
            await pump.receive(
                stream, target, offset=offset, length=length, hasher=None, progress=progress
            )
            await stream.aclose()

    progress = pump.Progress()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        async with alice.open(BOB, SID, window=window) as sending:
            await pump.send(
                sending.stream,
                source,
                offset=offset,
                length=length,
                hasher=None,
                progress=pump.Progress(),
            )
            assert await sending.finish()
    assert os.pread(target, 1 << 20, 0) == whole
    assert progress.offset == len(whole)


async def test_a_receiver_of_a_file_sees_a_stream_that_ends_early(
    alice: Inband, bob: Inband, open_file: Callable[..., int]
) -> None:
    target = open_file("target")

    async def receive() -> None:
        async with bob.expect(ALICE, SID, 10_000) as slot:
            stream = await slot.opened(10)
            await pump.receive(
                stream, target, offset=0, length=10_000, hasher=None, progress=pump.Progress()
            )

    with pytest.RaisesGroup(pytest.RaisesExc(TruncatedError, match="5,000 of 10,000")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            await sent(alice, pattern(5_000))


async def test_a_receiver_of_a_file_sees_a_surplus(
    alice: Inband, bob: Inband, open_file: Callable[..., int]
) -> None:
    """The sender hears of it as well: its block was not taken."""
    target = open_file("target")

    async def send() -> None:
        with pytest.raises(BytestreamError, match="not-acceptable"):
            await sent(alice, pattern(5_001))

    async with trio.open_nursery() as nursery, bob.expect(ALICE, SID, 5_000) as slot:
        nursery.start_soon(send)
        stream = await slot.opened(10)
        with pytest.raises(IntegrityError):
            await pump.receive(
                stream, target, offset=0, length=5_000, hasher=None, progress=pump.Progress()
            )


# --- A slow reader


async def test_a_block_is_acknowledged_when_the_reader_has_room(
    wire: Wire, alice: Inband, bob: Inband
) -> None:
    """So that what the sender counts is about what has arrived."""
    async with trio.open_nursery() as nursery, bob.expect(ALICE, SID, 10**6) as slot:
        sending = await nursery.start(_send_for_ever, alice)
        stream = await slot.opened(10)
        await wait_all_tasks_blocked()
        before = len(wire.said_by(ALICE))
        assert before * ibb.BLOCK_SIZE < 3 * 2 * inband.SOCKET_BUFFER
        await stream.receive_some(8 * ibb.BLOCK_SIZE)
        await wait_all_tasks_blocked()
        assert len(wire.said_by(ALICE)) > before
        nursery.cancel_scope.cancel()
    assert repr(sending).startswith("<Sending <Outgoing")


async def _send_for_ever(
    end: Inband, task_status: trio.TaskStatus[Sending] = trio.TASK_STATUS_IGNORED
) -> None:
    async with end.open(BOB, SID) as sending:
        task_status.started(sending)
        while True:
            await sending.stream.send_all(bytes(10_000))


async def test_a_reader_that_takes_nothing_is_given_up_after_a_minute(
    bob: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    async with bob.expect(ALICE, SID, 10**6) as slot:
        await ask(bob, opening(block_size=65535))
        await slot.opened(10)
        begin = trio.current_time()
        assert await refused(bob, data(0, bytes(65535))) == "cancel item-not-found"
        assert trio.current_time() - begin == inband.TAKE_TIMEOUT
        assert isinstance(slot.reason(), StalledError)


async def test_a_reader_that_has_gone_ends_the_stream(wire: Wire, bob: Inband) -> None:
    wire.ends[ALICE] = _silent_about_nothing
    async with bob.expect(ALICE, SID, 100) as slot:
        await ask(bob, opening())
        await (await slot.opened(10)).aclose()
        assert await refused(bob, data(0)) == "cancel item-not-found"
        assert await refused(bob, data(1)) == "cancel item-not-found"
    assert wire.said_by(BOB) == ["close"]


async def _silent_about_nothing(iq: Iq) -> None:
    """Take everything, as slixmpp does."""
    await trio.lowlevel.checkpoint()


async def test_all_blocks_at_once_are_taken_in_order(bob: Inband) -> None:
    """COMPAT(gloox): 75 outstanding for a file of 300000 bytes."""
    content = pattern(300_000)
    pieces = [content[at : at + 4096] for at in range(0, len(content), 4096)]
    assert len(pieces) > 70
    async with bob.expect(ALICE, SID, len(content)) as slot:
        await ask(bob, opening())
        stream = await slot.opened(10)
        answers = [bob.on_data(an_iq(data(seq, each))) for seq, each in enumerate(pieces)]
        answers.append(bob.on_close(an_iq(CLOSE)))
        got = []
        async with trio.open_nursery() as nursery:
            for each in answers:
                nursery.start_soon(_await, each)
            got.append(await read_all(stream))
    assert got == [content]


async def _await(answer: Awaitable[None]) -> None:
    await answer


async def test_what_waits_for_a_slow_reader_is_limited(bob: Inband) -> None:
    """The block that was too much is not lost: it may come again."""
    block = bytes(65535)
    async with trio.open_nursery() as nursery, bob.expect(ALICE, SID, 10**7) as slot:
        await ask(bob, opening(block_size=65535))
        stream = await slot.opened(10)
        seq = 0
        with pytest.raises(StanzaError) as caught:  # noqa: PT012 - until it is too much
            while True:
                nursery.start_soon(_await, bob.on_data(an_iq(data(seq, block))))
                seq += 1
        assert (caught.value.type, caught.value.condition) == ("wait", "resource-constraint")
        assert seq * 65535 < inband.MAX_PENDING + 3 * 65535
        left = seq * 65535
        while left:
            left -= len(await stream.receive_some(left))
        await wait_all_tasks_blocked()
        nursery.start_soon(_await, bob.on_data(an_iq(data(seq, block))))
        assert await stream.receive_some(10) == bytes(10)
        nursery.cancel_scope.cancel()


async def test_blocks_that_wait_for_a_slow_reader_are_limited_however_small(
    bob: Inband,
) -> None:
    count = 0
    async with trio.open_nursery() as nursery, bob.expect(ALICE, SID, 10**7) as slot:
        await ask(bob, opening())
        stream = await slot.opened(10)
        while "pending=0" in repr(slot):
            nursery.start_soon(_await, bob.on_data(an_iq(data(count, bytes(4095)))))
            count += 1
        with pytest.raises(StanzaError) as caught:  # noqa: PT012 - until it is too much
            for seq in range(count, count + 2 * inband.MAX_BLOCKS):
                nursery.start_soon(_await, bob.on_data(an_iq(data(seq, b"x"))))
        assert (caught.value.type, caught.value.condition) == ("wait", "resource-constraint")
        assert seq == count - 1 + inband.MAX_BLOCKS
        left = count * 4095 + inband.MAX_BLOCKS - 1
        while left:
            left -= len(await stream.receive_some(left))
        await wait_all_tasks_blocked()
        nursery.start_soon(_await, bob.on_data(an_iq(data(seq, b"y"))))
        assert await stream.receive_some(10) == b"y"
        nursery.cancel_scope.cancel()


# --- Hostile and broken peers


async def test_without_an_agreement_nothing_is_opened(bob: Inband) -> None:
    """Neither for a stranger nor under another sid nor from another resource."""
    before = open_sockets()
    async with bob.expect(ALICE, SID, 100) as slot:
        others = [EVE, ALICE.bare.with_resource("other")]
        for sender in others:
            assert await refused(bob, opening(), sender) == "cancel not-acceptable"
            assert await refused(bob, data(0), sender) == "cancel item-not-found"
            assert await refused(bob, CLOSE, sender) == "cancel item-not-found"
        assert await refused(bob, opening("s2")) == "cancel not-acceptable"
        assert await refused(bob, opening(), ALICE.bare) == "auth forbidden"
        assert await refused(bob, opening(), None) == "auth forbidden"
        assert open_sockets() == before
        assert repr(slot) == "<Slot <Incoming NEW 0 of 100> pending=0>"
    assert repr(bob) == "<Inband slots=0 sendings=0>"


async def test_a_stranger_cannot_speak_in_a_stream_of_others(bob: Inband) -> None:
    async with bob.expect(ALICE, SID, 3) as slot:
        await ask(bob, opening())
        stream = await slot.opened(10)
        assert await refused(bob, data(0, b"bad"), EVE) == "cancel item-not-found"
        assert await refused(bob, CLOSE, EVE) == "cancel item-not-found"
        with pytest.raises(StanzaError, match="item-not-found"):
            bob.on_message(EVE, data(0, b"bad"))
        await ask(bob, data(0, b"abc"))
        await ask(bob, CLOSE)
        assert await read_all(stream) == b"abc"


async def test_data_and_close_before_the_opening_are_refused(bob: Inband) -> None:
    async with bob.expect(ALICE, SID, 3) as slot:
        assert await refused(bob, data(0)) == "cancel item-not-found"
        assert await refused(bob, CLOSE) == "cancel item-not-found"
        await ask(bob, opening())
        await ask(bob, data(0))
        await ask(bob, CLOSE)
        assert await read_all(await slot.opened(10)) == b"abc"


async def test_a_second_opening_is_refused_and_changes_nothing(bob: Inband) -> None:
    before = open_sockets()
    async with bob.expect(ALICE, SID, 3) as slot:
        await ask(bob, opening())
        assert await refused(bob, opening()) == "cancel not-acceptable"
        await ask(bob, data(0))
        await ask(bob, CLOSE)
        assert await refused(bob, opening()) == "cancel not-acceptable"
        assert await read_all(await slot.opened(10)) == b"abc"
    assert await refused(bob, opening()) == "cancel not-acceptable"
    assert open_sockets() == before


async def test_data_behind_the_close_is_refused(bob: Inband) -> None:
    async with bob.expect(ALICE, SID, 100) as slot:
        await ask(bob, opening())
        await ask(bob, data(0))
        await ask(bob, CLOSE)
        assert await refused(bob, data(1)) == "cancel item-not-found"
        assert await read_all(await slot.opened(10)) == b"abc"


async def test_only_a_set_is_a_request_of_ours(bob: Inband) -> None:
    for payload in (fromstring(opening()), data(0), CLOSE):
        with pytest.raises(StanzaError, match="bad-request"):
            await answer(bob, an_iq(payload, kind="get"))


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (data(0), "cancel unexpected-request"),
        (data(2), "cancel unexpected-request"),
        (data(1, bytes(4097)), "cancel bad-request"),
        (f"<data xmlns='{ibb.NS}' sid='s1' seq='1'>QUJD====</data>", "cancel bad-request"),
        (f"<data xmlns='{ibb.NS}' sid='s1' seq='1'>AB==</data>", "cancel bad-request"),
        (data(1, bytes(98)), "cancel not-acceptable"),
    ],
    ids=["repeated", "gap", "oversized", "padding", "loose bits", "surplus"],
)
async def test_a_bad_block_ends_the_stream_for_both(
    wire: Wire, bob: Inband, bad: Element | str, expected: str
) -> None:
    """XEP-0047 section 2.2: it is refused, the stream closed, and what came before kept."""
    wire.ends[ALICE] = _silent_about_nothing
    with pytest.raises(BytestreamError, match=r"bytestream failed: .*\[") as caught:  # noqa: PT012 - the context ends in it
        async with bob.expect(ALICE, SID, 100) as slot:
            await ask(bob, opening())
            stream = await slot.opened(10)
            await ask(bob, data(0))
            assert await refused(bob, bad) == expected
            assert await refused(bob, data(1)) == "cancel item-not-found"
            got = await read_all(stream)
            assert got[:3] == b"abc"
            raise TruncatedError("as the pump says it")
    assert isinstance(caught.value.__cause__, TruncatedError)
    assert wire.said_by(BOB) == ["close"]
    await ask(bob, CLOSE)  # COMPAT(slixmpp, libpurple): both close after an error


async def test_blocks_before_a_bad_one_are_still_acknowledged(wire: Wire, bob: Inband) -> None:
    """Those that a slow reader has no room for yet come before the end that it sees."""
    wire.ends[ALICE] = _silent_about_nothing
    content = pattern(65535)
    async with bob.expect(ALICE, SID, 10**6) as slot, trio.open_nursery() as nursery:
        await ask(bob, opening(block_size=65535))
        stream = await slot.opened(10)
        nursery.start_soon(_await, bob.on_data(an_iq(data(0, content))))
        assert await refused(bob, data(5)) == "cancel unexpected-request"
        assert await read_all(stream) == content


async def test_the_first_reason_is_what_is_told(bob: Inband) -> None:
    """A reader that goes away afterwards is a consequence."""
    async with bob.expect(ALICE, SID, 10**6) as slot:
        await ask(bob, opening(block_size=65535))
        stream = await slot.opened(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused, bob, data(0, bytes(65535)))
            await wait_all_tasks_blocked()
            assert await refused(bob, data(5)) == "cancel unexpected-request"
            await stream.aclose()
        assert "unexpected-request" in str(slot.reason())


async def test_a_surplus_stays_what_it_is(bob: Inband) -> None:
    """Only what a broken stream looks like from outside gives way to the reason."""
    with pytest.raises(IntegrityError):  # noqa: PT012 - the context ends in it
        async with bob.expect(ALICE, SID, 2):
            await ask(bob, opening())
            assert await refused(bob, data(0)) == "cancel not-acceptable"
            raise IntegrityError("as the pump says it")


async def test_a_close_is_answered_when_all_before_it_is_handed_on(bob: Inband) -> None:
    """XEP-0047 section 2.3: flush first."""
    content = pattern(65535)
    answered = trio.Event()

    async def close() -> None:
        await ask(bob, CLOSE)
        answered.set()

    async with trio.open_nursery() as nursery, bob.expect(ALICE, SID, 65535) as slot:
        await ask(bob, opening(block_size=65535))
        stream = await slot.opened(10)
        nursery.start_soon(ask, bob, data(0, content))
        await wait_all_tasks_blocked()
        nursery.start_soon(close)
        await wait_all_tasks_blocked()
        assert not answered.is_set()
        assert await read_all(stream) == content
        await answered.wait()


async def test_a_close_means_the_stream_of_its_sender_first(wire: Wire, bob: Inband) -> None:
    """Two streams may have one sid, if they go opposite ways."""
    wire.ends[ALICE] = _silent_about_nothing
    async with bob.expect(ALICE, SID, 3) as slot, bob.open(ALICE, SID) as sending:
        await ask(bob, opening())
        await sending.stream.send_all(bytes(sending.block_size))
        await wait_all_tasks_blocked()
        await ask(bob, data(0))
        await ask(bob, CLOSE)
        assert await read_all(await slot.opened(10)) == b"abc"
        await ask(bob, CLOSE)  # COMPAT(libpurple): also a receiver closes, when it has all
        assert await sending.finish()
    assert wire.said_by(BOB) == ["open 4095", "data 0"]


async def test_a_cancelled_stream_is_closed_all_the_same(
    wire: Wire, bob: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    heard = []

    async def slow(iq: Iq) -> None:
        await trio.sleep(1)
        heard.append(iq.payload)

    wire.ends[ALICE] = slow
    with trio.move_on_after(10):
        async with bob.expect(ALICE, SID, 3):
            await ask(bob, opening())
            await trio.sleep_forever()
    assert len(heard) == 1
    assert trio.current_time() == 11


async def test_a_stream_that_is_given_up_here_is_closed(wire: Wire, bob: Inband) -> None:
    """The body's own error is what is raised: nothing was wrong with the stream."""
    wire.ends[ALICE] = _silent_about_nothing
    with pytest.raises(IntegrityError):  # noqa: PT012 - the context ends in it
        async with bob.expect(ALICE, SID, 100):
            await ask(bob, opening())
            raise IntegrityError("something of the body's")
    assert wire.said_by(BOB) == ["close"]
    assert await refused(bob, data(0)) == "cancel item-not-found"


async def test_a_stream_that_was_never_opened_is_not_closed(wire: Wire, bob: Inband) -> None:
    async with bob.expect(ALICE, SID, 100):
        pass
    assert wire.sent == []
    assert await refused(bob, CLOSE) == "cancel item-not-found"


async def test_a_complete_stream_waits_for_no_close(wire: Wire, bob: Inband) -> None:
    """COMPAT(qxmpp): hangs when the receiver closes; so that is left to the sender."""
    async with bob.expect(ALICE, SID, 3) as slot:
        await ask(bob, opening())
        await ask(bob, data(0))
        assert await (await slot.opened(10)).receive_some(3) == b"abc"
    assert wire.sent == []
    await ask(bob, CLOSE)


async def test_a_close_is_answered_for_a_minute_more(
    bob: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    async with bob.expect(ALICE, SID, 0):
        await ask(bob, opening())
        await ask(bob, CLOSE)
        await ask(bob, CLOSE)
    await trio.sleep(59)
    await ask(bob, CLOSE)
    await trio.sleep(2)
    assert await refused(bob, CLOSE) == "cancel item-not-found"


async def test_bigger_blocks_than_the_server_carries_are_refused(wire: Wire) -> None:
    bob = wire.join(BOB, max_block=ibb.largest_block(10_000))
    async with bob.expect(ALICE, SID, 3) as slot:
        assert await refused(bob, opening(block_size=8192)) == "modify resource-constraint"
        await ask(bob, opening(block_size=4096))
        assert (await slot.opened(10)).socket.fileno() > 0


async def test_a_peer_that_opens_nothing_is_not_waited_for(
    bob: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    async with bob.expect(ALICE, SID, 3) as slot:
        with pytest.raises(BytestreamError, match="opened no in-band bytestream for 30 s"):
            await slot.opened(30)
    assert trio.current_time() == 30


async def test_a_peer_that_sends_nothing_more_is_given_up_after_a_minute(
    wire: Wire, bob: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    wire.ends[ALICE] = _silent_about_nothing
    with pytest.raises(StalledError, match="sent nothing for 60 seconds"):  # noqa: PT012 - the context ends in it
        async with bob.expect(ALICE, SID, 100) as slot:
            await ask(bob, opening())
            stream = await slot.opened(10)
            await trio.sleep(50)
            await ask(bob, data(0))
            assert await read_all(stream) == b"abc"
            raise TruncatedError("as the pump says it")
    assert trio.current_time() == 110
    assert wire.said_by(BOB) == ["close"]


async def test_a_sid_is_expected_once(bob: Inband) -> None:
    async with bob.expect(ALICE, SID, 3), bob.expect(EVE, SID, 3):
        with pytest.raises(ValueError, match="expected already"):
            async with bob.expect(ALICE, SID, 3):
                pass
    async with bob.expect(ALICE, SID, 3):  # finished sids may come again
        await ask(bob, opening())


async def test_without_descriptors_a_peer_may_come_later(
    bob: Inband, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pair() -> None:
        raise OSError(24, "Too many open files")

    async with bob.expect(ALICE, SID, 3):
        with monkeypatch.context() as patch:
            patch.setattr("socket.socketpair", no_pair)
            assert await refused(bob, opening()) == "wait internal-server-error"
        await ask(bob, opening())


# --- Data in messages


async def test_blocks_may_come_in_messages(bob: Inband) -> None:
    """COMPAT(vacuum-im): asks for it where it likes."""
    content = pattern(50_000)
    async with bob.expect(ALICE, SID, len(content)) as slot:
        await ask(bob, opening(stanza="message"))
        stream = await slot.opened(10)
        for seq, at in enumerate(range(0, len(content), 4096)):
            bob.on_message(ALICE, data(seq, content[at : at + 4096]))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, bob, CLOSE)
            assert await read_all(stream) == content


async def test_a_message_in_a_stream_of_iqs_is_refused(bob: Inband) -> None:
    async with bob.expect(ALICE, SID, 3):
        await ask(bob, opening())
        with pytest.raises(StanzaError, match="unexpected-request"):
            bob.on_message(ALICE, data(0))
        await ask(bob, data(0))


async def test_messages_that_come_too_fast_end_the_stream(wire: Wire, bob: Inband) -> None:
    """Nobody waits for an answer there, so that the next block would leave a gap."""
    wire.ends[ALICE] = _silent_about_nothing
    block = bytes(65535)
    async with bob.expect(ALICE, SID, 10**7) as slot:
        await ask(bob, opening(block_size=65535, stanza="message"))
        with pytest.raises(StanzaError, match="item-not-found"):  # noqa: PT012 - until it is too much
            for seq in range(30):
                bob.on_message(ALICE, data(seq, block))
        assert "faster" in str(slot.reason())


async def test_a_bad_block_in_a_message_ends_the_stream(wire: Wire, bob: Inband) -> None:
    wire.ends[ALICE] = _silent_about_nothing
    async with bob.expect(ALICE, SID, 100) as slot:
        await ask(bob, opening(stanza="message"))
        with pytest.raises(StanzaError, match="unexpected-request"):
            bob.on_message(ALICE, data(7))
        assert await read_all(await slot.opened(10)) == b""
    assert wire.said_by(BOB) == ["close"]


# --- Sending to peers with habits


class Peer:
    """A receiver with a habit: takes everything, but for what the test says otherwise."""

    def __init__(self, wire: Wire, habit: Callable[[Element], Awaitable[None]]) -> None:
        self.got = b""
        self._habit = habit
        wire.ends[BOB] = self._answer

    async def _answer(self, iq: Iq) -> None:
        assert iq.payload is not None
        if iq.payload.tag == ibb.DATA:
            self.got += ibb.read_data(iq.payload, ibb.MAX_BLOCK).data
        await self._habit(iq.payload)


async def test_a_peer_that_never_answers_a_close_has_it_all(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    """COMPAT(libpurple): every block was answered, so nothing is in doubt."""

    async def habit(payload: Element) -> None:
        if payload.tag == ibb.CLOSE:
            await never()

    peer = Peer(wire, habit)
    assert await sent(alice, pattern(5_000))
    assert peer.got == pattern(5_000)
    assert trio.current_time() == inband.CLOSE_TIMEOUT


async def test_a_peer_that_closes_when_it_has_all_is_not_closed_again(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    """COMPAT(libpurple): its close comes right behind the answer to the last block."""

    async def habit(payload: Element) -> None:
        if payload.get("seq") == "1":
            await ask(alice, CLOSE, BOB)

    peer = Peer(wire, habit)
    assert await sent(alice, pattern(5_000))
    assert peer.got == pattern(5_000)
    assert wire.said_by(ALICE) == ["open 4095", "data 0", "data 1"]


async def test_a_peer_that_answers_a_close_with_an_error_has_it_all(
    wire: Wire, alice: Inband
) -> None:
    """COMPAT(libpurple, gloox): they have forgotten the stream when it was complete."""

    async def habit(payload: Element) -> None:
        if payload.tag == ibb.CLOSE:
            raise StanzaError(ErrorType.CANCEL, "item-not-found")

    peer = Peer(wire, habit)
    assert await sent(alice, pattern(5_000))
    assert peer.got == pattern(5_000)


async def test_a_peer_that_does_not_answer_the_end_leaves_it_in_doubt(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    """COMPAT(xmppframework): neither the last block nor the close."""

    async def habit(payload: Element) -> None:
        if payload.get("seq") == "1" or payload.tag == ibb.CLOSE:
            await never()

    peer = Peer(wire, habit)
    assert not await sent(alice, pattern(5_000))
    assert peer.got == pattern(5_000)
    assert trio.current_time() == ibb.LAST_ACK_TIMEOUT + inband.CLOSE_TIMEOUT


async def test_a_close_that_is_answered_speaks_for_the_last_block(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    async def habit(payload: Element) -> None:
        if payload.get("seq") == "1":
            await never()

    Peer(wire, habit)
    assert await sent(alice, pattern(5_000))
    assert trio.current_time() == ibb.LAST_ACK_TIMEOUT


async def test_a_peer_that_closes_without_an_answer_to_the_last_block_has_it_all(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    """COMPAT(xmppframework)."""

    async def habit(payload: Element) -> None:
        if payload.get("seq") == "1":
            await ask(alice, CLOSE, BOB)
            await never()

    Peer(wire, habit)
    assert await sent(alice, pattern(5_000))
    assert trio.current_time() == 0


async def test_a_last_block_that_is_refused_late_is_no_success(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    async def habit(payload: Element) -> None:
        if payload.get("seq") == "1":
            await trio.sleep(12)
            raise StanzaError(ErrorType.CANCEL, "item-not-found")
        if payload.tag == ibb.CLOSE:
            await never()

    Peer(wire, habit)
    with pytest.raises(BytestreamError, match="item-not-found"):
        await sent(alice, pattern(5_000))


async def test_a_peer_that_closes_early_has_not_got_all(wire: Wire, alice: Inband) -> None:
    async def habit(payload: Element) -> None:
        if payload.get("seq") == "1":
            await ask(alice, CLOSE, BOB)

    Peer(wire, habit)
    with pytest.raises(BytestreamError, match="before it had everything"):
        await sent(alice, pattern(50_000))
    assert wire.said_by(ALICE) == ["open 4095", "data 0", "data 1"]
    await ask(alice, CLOSE, BOB)


@pytest.mark.parametrize("kind", [ErrorType.MODIFY, ErrorType.WAIT, ErrorType.CANCEL])
async def test_smaller_blocks_are_tried_under_the_same_sid(
    wire: Wire, alice: Inband, kind: ErrorType
) -> None:
    """COMPAT(qxmpp, slixmpp, xmppframework): with whatever type they refuse."""

    async def habit(payload: Element) -> None:
        if int(payload.get("block-size", "0")) > 2048:
            raise StanzaError(kind, "resource-constraint")

    peer = Peer(wire, habit)
    assert await sent(alice, pattern(5_000))
    assert wire.said_by(ALICE)[:3] == ["open 4095", "open 2046", "data 0"]
    assert {each.get("sid") for _, each in wire.sent} == {SID}
    assert peer.got == pattern(5_000)


async def test_a_refused_opening_says_why_and_leaves_nothing(wire: Wire, alice: Inband) -> None:
    async def habit(payload: Element) -> None:
        raise StanzaError(ErrorType.CANCEL, "not-acceptable")

    Peer(wire, habit)
    before = open_sockets()
    with pytest.raises(BytestreamError, match=r"takes no in-band bytestream \[not-acceptable"):
        await sent(alice, b"")
    assert wire.said_by(ALICE) == ["open 4095"]
    assert open_sockets() == before
    assert repr(alice) == "<Inband slots=0 sendings=0>"


async def test_an_opening_without_an_answer_is_given_up(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    Peer(wire, lambda payload: never())
    with pytest.raises(OfflineError, match="no answer for 10 s"):
        async with alice.open(BOB, SID, timeout=10):
            pass
    assert trio.current_time() == 10
    assert wire.said_by(ALICE) == ["open 4095"]


async def test_an_opening_that_is_cancelled_is_taken_back(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    """The peer may have opened it by then, and would wait for bytes."""

    async def habit(payload: Element) -> None:
        if payload.tag == ibb.OPEN:
            await never()

    Peer(wire, habit)
    with trio.move_on_after(3):
        async with alice.open(BOB, SID):
            pass
    assert wire.said_by(ALICE) == ["open 4095", "close"]
    assert repr(alice) == "<Inband slots=0 sendings=0>"


async def test_a_busy_peer_gets_the_same_block_again_later(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    """Or a busy server on the way; nothing overtakes the block meanwhile."""
    times: list[float] = []
    got = b""

    async def busy(iq: Iq) -> None:
        nonlocal got
        payload = iq.payload
        assert payload is not None
        if payload.get("seq") == "1":
            times.append(trio.current_time())
            if len(times) < 4:
                raise BUSY
        if payload.tag == ibb.DATA:
            got += ibb.read_data(payload, 4095).data

    wire.ends[BOB] = busy
    assert await sent(alice, pattern(10_000))
    assert times == [0, 1, 3, 7]
    assert got == pattern(10_000)


async def test_a_peer_that_stays_busy_is_given_up(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    async def habit(payload: Element) -> None:
        if payload.tag == ibb.DATA:
            raise BUSY

    Peer(wire, habit)
    with pytest.raises(BytestreamError, match="resource-constraint") as caught:
        await sent(alice, pattern(10_000))
    assert caught.value.type is ErrorType.WAIT
    assert trio.current_time() == sum(ibb.RETRY_DELAYS)
    assert wire.said_by(ALICE) == ["open 4095", *["data 0"] * 6, "close"]


async def test_a_refused_block_breaks_the_stream_and_closes_it(
    wire: Wire, alice: Inband, open_file: Callable[..., int]
) -> None:
    """Whoever fills the stream hears the reason, and not only that it broke."""

    async def habit(payload: Element) -> None:
        if payload.get("seq") == "3":
            raise StanzaError(ErrorType.CANCEL, "unexpected-request", "a gap")

    Peer(wire, habit)
    source = open_file("source", pattern(500_000))
    with pytest.raises(BytestreamError, match=r"a gap \[unexpected-request\]") as caught:
        async with alice.open(BOB, SID) as sending:
            await pump.send(
                sending.stream,
                source,
                offset=0,
                length=500_000,
                hasher=None,
                progress=pump.Progress(),
            )
    assert isinstance(caught.value.__cause__, TruncatedError)
    assert wire.said_by(ALICE)[-2:] == ["data 3", "close"]


async def test_a_block_without_an_answer_ends_the_stream_after_a_minute(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    Peer(wire, answer_no_block)
    with pytest.raises(OfflineError, match="no answer for 60 s"):
        await sent(alice, pattern(5_000))
    assert trio.current_time() == inband.ACK_TIMEOUT


async def test_a_lost_connection_ends_the_stream(wire: Wire, alice: Inband) -> None:
    async def habit(payload: Element) -> None:
        wire.cut = payload.get("seq") == "2"

    Peer(wire, habit)
    with pytest.raises(OfflineError, match="not connected"):
        await sent(alice, pattern(50_000))


async def test_leaving_without_a_finish_breaks_the_stream_off(
    wire: Wire, alice: Inband, bob: Inband
) -> None:
    """Even one whose end was closed in order: the receiver must not take it for whole."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(received, bob, b"")
        await wait_all_tasks_blocked()
        async with alice.open(BOB, SID) as sending:
            await sending.stream.aclose()
    assert wire.said_by(ALICE) == ["open 4095", "close"]


async def test_an_error_of_the_body_comes_out_bare(wire: Wire, alice: Inband) -> None:
    Peer(wire, _nothing)
    with pytest.raises(KeyError, match="mine"):
        async with alice.open(BOB, SID):
            raise KeyError("mine")
    assert wire.said_by(ALICE) == ["open 4095", "close"]


async def _nothing(payload: Element) -> None:
    await trio.lowlevel.checkpoint()


async def test_a_stream_is_open_once(wire: Wire, alice: Inband) -> None:
    Peer(wire, _nothing)
    async with alice.open(BOB, SID):
        with pytest.raises(ValueError, match="open already"):
            async with alice.open(BOB, SID):
                pass
    assert await sent(alice, b"abc")  # finished sids may come again


async def test_data_to_a_stream_that_we_send_in_is_refused(wire: Wire, alice: Inband) -> None:
    """XEP-0047 section 3 would allow it; nobody does it, and we have no use for it."""
    Peer(wire, _nothing)
    async with alice.open(BOB, SID) as sending:
        assert await refused(alice, data(0), BOB) == "cancel item-not-found"
        assert await refused(alice, opening(), BOB) == "cancel not-acceptable"
        assert sending.block_size == 4095
        assert await sending.finish()


async def test_without_descriptors_no_stream_is_had(
    wire: Wire, alice: Inband, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pair() -> None:
        raise OSError(24, "Too many open files")

    Peer(wire, _nothing)
    monkeypatch.setattr("socket.socketpair", no_pair)
    with pytest.raises(BytestreamError, match="Too many open files"):
        await sent(alice, b"")
    assert wire.said_by(ALICE) == ["open 4095", "close"]


# --- Cancelled anywhere


async def test_cancelling_leaves_nothing_open_at_any_step() -> None:
    """Both ends hear of it, or had all."""
    content = pattern(9_000)
    wire = Wire()
    alice, bob = wire.join(ALICE), wire.join(BOB)

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_receive_some, bob)
            nursery.start_soon(_send_when_expected, alice, bob, content)

    before = open_sockets()
    step = 0
    while await cancelled_at(step := step + 1, both):
        assert open_sockets() == before
        assert (repr(alice), repr(bob)) == ("<Inband slots=0 sendings=0>",) * 2
    assert step > 20
    assert open_sockets() == before


async def _receive_some(end: Inband) -> None:
    async with end.expect(ALICE, SID, 9_000) as slot:
        await read_all(await slot.opened(10))


async def _send_when_expected(end: Inband, other: Inband, content: bytes) -> None:
    while "slots=0" in repr(other):
        await trio.lowlevel.checkpoint()
    await sent(end, content, window=2)


def test_slots_show_where_they_are() -> None:
    async def main() -> None:
        assert repr(Slot(5)) == "<Slot <Incoming NEW 0 of 5> pending=0>"

    trio.run(main)


# --- On one slow line


SLOWEST = 3_072  # bytes per second


def slow_line(habit: Callable[[JID, Element], Awaitable[None]]) -> Request:
    """A stream to the server that takes its time, with peers behind it that have habits."""
    free_at = 0.0

    async def request(kind: IqType, to: JID | None, payload: Element, timeout: float) -> Iq:
        nonlocal free_at
        assert to is not None
        free_at = max(free_at, trio.current_time()) + (len(serialise(payload)) + 200) / SLOWEST
        with trio.move_on_after(timeout):
            await trio.sleep_until(free_at)
            await habit(to, payload)
            return Iq("result", "id", to, None, Element("iq"))
        raise OfflineError(f"{to} gave no answer for {timeout:.0f} s")

    return request


async def test_four_streams_on_a_slow_line_wait_for_each_other_and_finish(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What waits behind other blocks is no silence; and none is slower than the others."""

    async def habit(to: JID, payload: Element) -> None:
        await trio.sleep(0.1)

    alice = Inband(slow_line(habit), max_block=lambda: ibb.MAX_BLOCK)
    ended: list[float] = []

    async def send(sid: str) -> None:
        async with alice.open(BOB, sid, window=16) as sending:
            await sending.stream.send_all(pattern(50 * ibb.BLOCK_SIZE))
            await sending.finish()
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(send, f"s{number}")
    assert min(ended) > 300
    assert max(ended) - min(ended) < 40


async def test_the_last_block_is_not_given_up_before_it_has_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Behind those of others it waits longer than a client may take to answer it."""

    async def habit(to: JID, payload: Element) -> None:
        await trio.lowlevel.checkpoint()
        if to == BOB and payload.tag == ibb.DATA:
            raise StanzaError(ErrorType.CANCEL, "not-acceptable", "the disk is full")

    alice = Inband(slow_line(habit), max_block=lambda: ibb.MAX_BLOCK)

    async def keep_busy() -> None:
        async with alice.open(EVE, "busy", window=16) as sending:
            await sending.stream.send_all(pattern(1_000 * ibb.BLOCK_SIZE))

    async def send_one_block() -> None:
        async with alice.open(BOB, SID, window=1) as sending:
            await sending.stream.send_all(pattern(1_000))
            await sending.finish()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_busy)
        await trio.sleep(100)
        with pytest.raises(BytestreamError, match="the disk is full"):
            await send_one_block()
        assert trio.current_time() > 100 + ibb.LAST_ACK_TIMEOUT
        nursery.cancel_scope.cancel()


async def test_a_peer_that_is_silent_is_noticed_while_others_take_blocks(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def habit(to: JID, payload: Element) -> None:
        if to == BOB and payload.tag == ibb.DATA:
            await never()

    alice = Inband(slow_line(habit), max_block=lambda: ibb.MAX_BLOCK)

    async def keep_busy() -> None:
        async with alice.open(EVE, "busy", window=16) as sending:
            await sending.stream.send_all(pattern(1_000 * ibb.BLOCK_SIZE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_busy)
        await trio.sleep(100)
        with pytest.raises(OfflineError, match="no answer for 60 s"):
            async with alice.open(BOB, SID, window=16) as sending:
                await sending.stream.send_all(pattern(500_000))
        assert 160 < trio.current_time() < 240
        nursery.cancel_scope.cancel()


async def test_streams_share_one_window_and_each_has_a_part_of_it(
    wire: Wire, alice: Inband
) -> None:
    Peer(wire, answer_no_block)
    counts: list[int] = []

    async def fill(sid: str) -> None:
        async with alice.open(BOB, sid, window=16) as sending:
            await opened.wait()
            await sending.stream.send_all(pattern(500_000))

    for streams in (1, 2, 5, 20):
        wire.under_way, opened = 0, trio.Event()
        async with trio.open_nursery() as nursery:
            for number in range(streams):
                nursery.start_soon(fill, f"s{number}")
            await wait_all_tasks_blocked()
            opened.set()
            await wait_all_tasks_blocked()
            counts.append(wire.under_way)
            nursery.cancel_scope.cancel()
    assert counts == [16, 16, 15, 20]


async def test_a_stream_that_is_alone_again_has_the_whole_window(
    wire: Wire, alice: Inband
) -> None:
    Peer(wire, answer_no_block)

    async def fill(sid: str, scope: trio.CancelScope) -> None:
        with scope:
            async with alice.open(BOB, sid, window=16) as sending:
                await wait_all_tasks_blocked()
                await sending.stream.send_all(pattern(500_000))

    first, second = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill, "first", first)
        nursery.start_soon(fill, "second", second)
        await wait_all_tasks_blocked(0.05)
        assert wire.under_way == 16
        first.cancel()
        await wait_all_tasks_blocked(0.05)
        assert wire.under_way == 16
        second.cancel()


@pytest.mark.parametrize("slack", [0.0, 720.0])
async def test_a_peer_has_time_for_what_it_must_do_first(
    wire: Wire, alice: Inband, autojump_clock: trio.testing.MockClock, slack: float
) -> None:
    """To prove what it has of the file; a few blocks go into its sockets meanwhile."""

    async def habit(payload: Element) -> None:
        if payload.tag == ibb.DATA and payload.get("seq") not in ("0", "1"):
            await trio.sleep_until(700)

    Peer(wire, habit)
    failing = pytest.raises(OfflineError, match="60 s") if not slack else nullcontext()
    with failing:
        async with alice.open(BOB, SID, window=4, slack=slack) as sending:
            await sending.stream.send_all(pattern(50_000))
            assert await sending.finish()
    assert trio.current_time() == (700 if slack else 60)


async def test_blocks_wait_for_a_reader_that_has_not_come_yet(
    bob: Inband, autojump_clock: trio.testing.MockClock
) -> None:
    """It proves what it has; and then the sender has its full time for the next block."""
    async with bob.expect(ALICE, SID, 200_000) as slot, trio.open_nursery() as nursery:
        await ask(bob, opening(block_size=65535))
        nursery.start_soon(ask, bob, data(0, bytes(65535)))
        await trio.sleep(700)
        stream = await slot.opened(10)
        assert len(await read_some(stream, 65535)) == 65535
        await trio.sleep(ibb.IDLE_TIMEOUT - 1)
        assert slot.reason() is None
        await trio.sleep(2)
        assert isinstance(slot.reason(), StalledError)


async def read_some(stream: trio.SocketStream, count: int) -> bytes:
    came = b""
    while len(came) < count:
        came += await stream.receive_some(count - len(came))
    return came
