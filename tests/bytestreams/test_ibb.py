import base64
import math
from contextlib import suppress
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.bytestreams import ibb
from syncd.bytestreams.ibb import Block, Ended, Incoming, Opening, Outgoing, State
from syncd.errors import BytestreamError, ErrorType, StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import serialise

PEER = JID.parse("romeo@montague.net/orchard")
OTHER = JID.parse("juliet@capulet.com/balcony")
BUSY = StanzaError(ErrorType.WAIT, "resource-constraint")
# XEP-0047 section 2.2, as it stands there.
EXAMPLE = """<data xmlns='http://jabber.org/protocol/ibb' seq='0' sid='i781hf64'>
    qANQR1DBwU4DX7jmYZnncmUQB/9KuKBddzQH+tZ1ZywKK0yHKnq57kWq+RFtQdCJ
    WpdWpR0uQsuJe7+vh3NWn59/gTc5MDlX8dS9p0ovStmNcyLhxVgmqS8ZKhsblVeu
    IpQ0JgavABqibJolc3BKrVtVV1igKiX/N7Pi8RtY1K18toaMDhdEfhBRzO/XB0+P
    AQhYlRjNacGcslkhXqNjK5Va4tuOAPy2n1Q8UUrHbUd0g+xJ9Bm0G0LZXyvCWyKH
    kuNEHFQiLuCY6Iv0myq6iX6tjuHehZlFSh80b5BVV9tNLwNR5Eqz1klxMhoghJOA
  </data>"""


def written(element: Element) -> str:
    return serialise(element).decode().replace("'", '"')


def data(text: str, seq: str = "0", sid: str = "s") -> Element:
    return fromstring(f"<data xmlns='{ibb.NS}' seq='{seq}' sid='{sid}'>{text}</data>")


def block(seq: int, content: bytes = b"abc") -> Element:
    return ibb.make_data(Block(sid="s", seq=seq, data=content))


def refusal(error: StanzaError | None) -> tuple[str, str]:
    assert error is not None
    return error.type, error.condition


def an_incoming(length: int = 100, *, block_size: int = 9, stanza: str = "iq") -> Incoming:
    """A stream that the peer has just opened."""
    incoming = Incoming(length)
    opening = fromstring(
        f"<open xmlns='{ibb.NS}' sid='s' block-size='{block_size}' stanza='{stanza}'/>"
    )
    incoming.open(ibb.read_open(opening), ibb.MAX_BLOCK, now=0)
    return incoming


def an_outgoing(*, window: int = 1, block_size: int = 3) -> Outgoing:
    """A stream that the peer has just agreed to."""
    outgoing = Outgoing("s", block_size=block_size, window=window)
    outgoing.opened()
    return outgoing


# --- On the wire


def test_stanzas_are_written_as_in_the_specification() -> None:
    """XEP-0047 sections 2.1 to 2.3; the order of attributes means nothing."""
    ns = f'xmlns="{ibb.NS}"'
    assert written(ibb.make_open("i781hf64", 4096)) == (
        f'<open {ns} block-size="4096" sid="i781hf64" stanza="iq"/>'
    )
    assert written(ibb.make_data(Block(sid="i781hf64", seq=7, data=b"ab"))) == (
        f'<data {ns} seq="7" sid="i781hf64">YWI=</data>'
    )
    assert written(ibb.make_close("i781hf64")) == f'<close {ns} sid="i781hf64"/>'


def test_a_block_of_ours_fits_where_the_standard_lets_any_stanza_through() -> None:
    """RFC 6120 section 13.12 promises 10000 bytes; we use 8 KiB of them at most."""
    assert len(serialise(block(65535, bytes(ibb.BLOCK_SIZE)))) + ibb.OVERHEAD < 8192
    assert ibb.BLOCK_SIZE % 3 == 0
    assert ibb.BLOCK_SIZE <= 4096


@given(st.integers(1_500, 200_000))
def test_the_largest_block_fits_into_the_stanza(limit: int) -> None:
    size = ibb.largest_block(limit)
    assert len(serialise(block(65535, bytes(size)))) <= limit
    assert size <= ibb.MAX_BLOCK


def test_without_a_limit_blocks_may_be_as_big_as_the_standard_lets_them() -> None:
    assert ibb.largest_block(0) == 65_535
    assert ibb.largest_block(100) == 0


@given(st.integers(0, 65535), st.binary(max_size=200))
def test_what_is_written_is_read_back(seq: int, content: bytes) -> None:
    written_block = Block(sid="a1", seq=seq, data=content)
    assert ibb.read_data(ibb.make_data(written_block), 200) == written_block


def test_the_example_of_the_specification_is_read() -> None:
    """It has the white space that its own security section forbids."""
    read = ibb.read_data(fromstring(EXAMPLE), 4096)
    assert (read.sid, read.seq, len(read.data)) == ("i781hf64", 0, 240)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        # QXmpp, Smack, slixmpp, Vacuum-IM, as they write it.
        ("sid='a' block-size='4096'", Opening(sid="a", block_size=4096)),
        ("block-size='4096' sid='jsi_1' stanza='iq'", Opening(sid="jsi_1", block_size=4096)),
        ("block-size='8192' sid='a' stanza='iq'", Opening(sid="a", block_size=8192)),
        (
            "sid='a' block-size='65535' stanza='message'",
            Opening(sid="a", block_size=65535, stanza="message"),
        ),
    ],
)
def test_openings_of_real_clients_are_read(attributes: str, expected: Opening) -> None:
    assert ibb.read_open(fromstring(f"<open xmlns='{ibb.NS}' {attributes}/>")) == expected


@pytest.mark.parametrize(
    "attributes",
    [
        "",
        "sid='a'",
        "block-size='1'",
        "sid='' block-size='1'",
        f"sid='{'a' * 129}' block-size='1'",
        "sid='a' block-size='0'",
        "sid='a' block-size='-1'",
        "sid='a' block-size='65536'",
        "sid='a' block-size='4k'",
        "sid='a' block-size='\u0664'",
        f"sid='a' block-size='{'9' * 5000}'",
        "sid='a' block-size='1' stanza='presence'",
    ],
)
def test_an_opening_that_makes_no_sense_is_refused(attributes: str) -> None:
    with pytest.raises(StanzaError) as caught:
        ibb.read_open(fromstring(f"<open xmlns='{ibb.NS}' {attributes}/>"))
    assert refusal(caught.value) == ("cancel", "bad-request")


@pytest.mark.parametrize(
    "text",
    [
        "QUJD====",  # surplus padding, which Python's decoder lets pass
        "AB==",  # bits that mean nothing
        "QUI",  # padding is missing
        "=AAA",
        "BBBB=CCC",
        "QQ==QQ==",
        "QU-_",  # the other alphabet
        "QUJ\u00e9",
        "QU&#x2003;JD",  # white space, but of no encoder's
        "QUJD<x/>",
        "QUJDQUJDQUJDQQ==",  # ten bytes where nine were agreed upon
        "A" * 100_000,
        "!" * 8,
    ],
)
def test_what_is_no_base64_or_too_much_ends_the_stream(text: str) -> None:
    """XEP-0047 sections 2.2 and 6."""
    incoming = an_incoming()
    assert incoming.receive(data(text), now=0) == b""
    assert refusal(incoming.refusal) == ("cancel", "bad-request")
    with pytest.raises(StanzaError, match="item-not-found"):
        incoming.receive(block(0), now=0)


@pytest.mark.parametrize("seq", ["", "-1", "65536", "1.0", "+1", "\u0661", "0" * 6])
def test_a_number_that_is_none_ends_the_stream(seq: str) -> None:
    incoming = an_incoming()
    assert incoming.receive(data("QUJD", seq), now=0) == b""
    assert refusal(incoming.refusal) == ("cancel", "bad-request")


def test_a_block_without_a_number_ends_the_stream() -> None:
    incoming = an_incoming()
    incoming.receive(fromstring(f"<data xmlns='{ibb.NS}' sid='s'>QUJD</data>"), now=0)
    assert refusal(incoming.refusal) == ("cancel", "bad-request")


def test_base64_in_lines_is_read() -> None:
    """COMPAT(gajim): Python's own encoder for mails, a line break every 76 characters."""
    content = bytes(range(200))
    incoming = an_incoming(200, block_size=4096)
    lines = base64.encodebytes(content).decode().replace("\n", "\r\n\t ")
    assert incoming.receive(data(lines), now=0) == content


# --- Receiving


def test_blocks_are_taken_in_their_order() -> None:
    incoming = an_incoming(6)
    assert incoming.receive(block(0, b"abc"), now=0) == b"abc"
    assert (incoming.received, incoming.complete) == (3, False)
    assert incoming.receive(block(1, b"def"), now=0) == b"def"
    assert (incoming.received, incoming.complete) == (6, True)
    assert incoming.refusal is None
    incoming.closed()
    with pytest.raises(StanzaError, match="item-not-found"):
        incoming.receive(block(2), now=0)
    assert incoming.complete


@pytest.mark.parametrize("seq", [0, 2, 3, 65535], ids=["again", "gap", "wide gap", "before"])
def test_a_block_out_of_order_ends_the_stream(seq: int) -> None:
    """XEP-0047 section 2.2: neither it nor any that follows is processed."""
    incoming = an_incoming()
    incoming.receive(block(0), now=0)
    assert incoming.receive(block(seq, b"evil"), now=0) == b""
    assert refusal(incoming.refusal) == ("cancel", "unexpected-request")
    with pytest.raises(StanzaError, match="item-not-found"):
        incoming.receive(block(1), now=0)
    assert incoming.received == 3


def test_the_first_block_has_number_zero() -> None:
    incoming = an_incoming()
    incoming.receive(block(1), now=0)
    assert refusal(incoming.refusal) == ("cancel", "unexpected-request")


@pytest.mark.parametrize(
    ("numbers", "good"),
    [
        ([65534, 65535, 0, 1], True),
        ([65534, 0, 1], True),  # COMPAT(libervia): the last number is left out
        ([65534, 1], False),
        ([0], False),
    ],
)
def test_numbers_begin_again_behind_the_last(numbers: list[int], good: bool) -> None:
    incoming = an_incoming(1_000_000)
    for seq in range(65534):
        incoming.receive(block(seq, b"x"), now=0)
    for seq in numbers:
        incoming.receive(block(seq, b"x"), now=0)
    assert (incoming.refusal is None) == good


def test_one_byte_too_much_is_handed_on_and_the_rest_is_not() -> None:
    """Whoever counts the bytes then sees the surplus, and nobody can fill the disk."""
    incoming = an_incoming(5)
    incoming.receive(block(0, b"abc"), now=0)
    assert incoming.receive(block(1, b"defghi"), now=0) == b"def"
    assert refusal(incoming.refusal) == ("cancel", "not-acceptable")
    assert not incoming.complete


def test_a_stream_is_opened_once() -> None:
    incoming = an_incoming()
    with pytest.raises(StanzaError) as caught:
        incoming.open(Opening(sid="s", block_size=1), ibb.MAX_BLOCK, now=0)
    assert refusal(caught.value) == ("cancel", "not-acceptable")
    assert incoming.receive(block(0), now=0) == b"abc"


def test_smaller_blocks_may_be_asked_for_under_the_same_sid() -> None:
    """XEP-0047 section 2.1: resource-constraint, of type modify."""
    incoming = Incoming(10)
    with pytest.raises(StanzaError) as caught:
        incoming.open(Opening(sid="s", block_size=8192), 8191, now=0)
    assert refusal(caught.value) == ("modify", "resource-constraint")
    incoming.open(Opening(sid="s", block_size=4096), 8191, now=0)
    assert incoming.state is State.OPEN


def test_data_before_the_opening_changes_nothing() -> None:
    incoming = Incoming(10)
    with pytest.raises(StanzaError, match="item-not-found"):
        incoming.receive(block(0), now=0)
    assert incoming.refusal is None
    incoming.open(Opening(sid="s", block_size=9), 9, now=0)
    assert incoming.receive(block(0), now=0) == b"abc"


def test_messages_are_for_streams_that_were_opened_so() -> None:
    by_iq, by_message = an_incoming(), an_incoming(stanza="message")
    with pytest.raises(StanzaError, match="unexpected-request"):
        by_iq.receive(block(0), now=0, in_message=True)
    assert by_iq.receive(block(0), now=0) == b"abc"
    assert by_message.receive(block(0), now=0, in_message=True) == b"abc"


def test_a_silent_peer_is_given_up_after_a_minute() -> None:
    """Blocks without bytes do not count as a word."""
    incoming = Incoming(4)
    assert incoming.give_up_at == math.inf
    incoming.open(Opening(sid="s", block_size=9), 9, now=100)
    assert incoming.give_up_at == 160
    incoming.receive(block(0, b"abc"), now=130)
    incoming.receive(block(1, b""), now=150)
    assert incoming.give_up_at == 190
    incoming.receive(block(2, b"d"), now=170)
    assert incoming.give_up_at == math.inf


def test_an_empty_stream_is_complete_at_once() -> None:
    assert an_incoming(0).complete


def test_a_negative_length_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="negative"):
        Incoming(-1)


@given(
    content=st.binary(max_size=200),
    sizes=st.lists(st.integers(0, 20), max_size=50),
    block_size=st.integers(1, 20),
)
def test_any_cut_gives_the_same_bytes(
    content: bytes, sizes: list[int], block_size: int
) -> None:
    incoming, got, rest = an_incoming(len(content), block_size=block_size), b"", content
    for seq, size in enumerate([*sizes, *[block_size] * 200]):
        piece, rest = rest[: min(size, block_size)], rest[min(size, block_size) :]
        got += incoming.receive(block(seq, piece), now=0)
    assert got == content
    assert incoming.complete


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=12)), max_size=12))
def test_no_peer_gets_more_through_than_was_due(blocks: list[tuple[int, bytes]]) -> None:
    incoming, got = an_incoming(10), b""
    for seq, content in blocks:
        with suppress(StanzaError):  # it has failed already
            got += incoming.receive(block(seq, content), now=0)
    assert len(got) <= 11
    assert incoming.received == len(got)
    assert incoming.complete == (len(got) == 10 and incoming.refusal is None)


# --- Sending


def test_no_more_is_sent_than_the_window_lets() -> None:
    outgoing = an_outgoing(window=2)
    may_send = [outgoing.may_send]
    outgoing.next_block(b"abc", now=0)
    may_send.append(outgoing.may_send)
    number, _ = outgoing.next_block(b"def", now=0)
    may_send.append(outgoing.may_send)
    outgoing.acked(number, now=1)
    may_send.append(outgoing.may_send)
    assert may_send == [True, True, False, True]


def test_nothing_is_sent_before_the_opening_or_behind_the_end() -> None:
    outgoing = Outgoing("s")
    may_send = [outgoing.may_send]
    outgoing.opened()
    may_send.append(outgoing.may_send)
    outgoing.end(now=0)
    may_send.append(outgoing.may_send)
    assert may_send == [False, True, False]
    assert outgoing.settled
    assert outgoing.acknowledged


def test_our_numbers_begin_again_behind_65535() -> None:
    outgoing, numbers = an_outgoing(), []
    for _ in range(65538):
        number, element = outgoing.next_block(b"x", now=0)
        outgoing.acked(number, now=0)
        numbers.append(element.get("seq"))
    assert numbers[:2] == ["0", "1"]
    assert numbers[-3:] == ["65535", "0", "1"]


def test_how_many_blocks_a_file_takes() -> None:
    assert [ibb.blocks_needed(size) for size in (0, 1, 4095, 4096)] == [0, 1, 1, 2]
    assert ibb.blocks_needed(65536 * 4095) == ibb.SEQ_MODULUS


def test_a_refused_size_is_halved_until_it_makes_no_sense() -> None:
    """COMPAT(qxmpp, slixmpp): both want the smaller blocks under the same sid."""
    outgoing, tried = Outgoing("s"), []
    for _ in range(4):
        tried.append(outgoing.block_size)
        outgoing.open_refused(BUSY)
    with pytest.raises(BytestreamError, match="resource-constraint") as caught:
        outgoing.open_refused(BUSY)
    tried.append(outgoing.block_size)
    assert tried == [4095, 2046, 1023, 510, 255]
    assert all(size % 3 == 0 for size in tried)
    assert caught.value.type is ErrorType.WAIT


def test_another_refusal_of_the_opening_is_final() -> None:
    error = StanzaError(ErrorType.CANCEL, "not-acceptable", "no, thanks")
    with pytest.raises(BytestreamError) as caught:
        Outgoing("s").open_refused(error)
    assert str(caught.value) == (
        "the peer takes no in-band bytestream: no, thanks [not-acceptable]"
    )
    assert caught.value.type is ErrorType.CANCEL


def test_a_busy_peer_gets_the_same_block_again_but_not_for_ever() -> None:
    outgoing, delays = an_outgoing(window=4), []
    number, _ = outgoing.next_block(b"abc", now=0)
    for _ in range(5):
        delays.append(outgoing.block_refused(number, BUSY))
        assert not outgoing.may_send  # nothing overtakes it
    with pytest.raises(BytestreamError, match="resource-constraint"):
        outgoing.block_refused(number, BUSY)
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_after_a_block_got_through_the_next_one_has_all_its_tries() -> None:
    outgoing = an_outgoing()
    for now in range(10):
        number, _ = outgoing.next_block(b"abc", now=now)
        assert outgoing.block_refused(number, BUSY) == 1.0
        outgoing.acked(number, now=now)


def test_a_gap_cannot_be_repaired() -> None:
    """The later block is under way already, and is out of order now."""
    outgoing = an_outgoing(window=2)
    first, _ = outgoing.next_block(b"abc", now=0)
    outgoing.next_block(b"def", now=0)
    with pytest.raises(BytestreamError):
        outgoing.block_refused(first, BUSY)


@pytest.mark.parametrize(
    ("kind", "condition"),
    [
        (ErrorType.CANCEL, "item-not-found"),  # XEP-0047; QXmpp, gloox
        (ErrorType.CANCEL, "unexpected-request"),  # Smack, slixmpp
        (ErrorType.CANCEL, "bad-request"),
        (ErrorType.CANCEL, "resource-constraint"),
        (ErrorType.WAIT, "recipient-unavailable"),
        (ErrorType.CANCEL, "service-unavailable"),
    ],
)
def test_another_refusal_of_a_block_is_final(kind: ErrorType, condition: str) -> None:
    outgoing = an_outgoing()
    number, _ = outgoing.next_block(b"abc", now=0)
    with pytest.raises(BytestreamError, match=condition) as caught:
        outgoing.block_refused(number, StanzaError(kind, condition))
    assert caught.value.type is ErrorType.WAIT  # the file is offered again later


def test_only_the_answer_to_the_last_block_is_given_up() -> None:
    """COMPAT(xmppframework): never acknowledges it."""
    outgoing = an_outgoing(window=2)
    first, _ = outgoing.next_block(b"abc", now=100)
    outgoing.next_block(b"d", now=101)
    outgoing.end(now=102)
    assert (outgoing.settled, outgoing.give_up_at) == (False, math.inf)
    outgoing.acked(first, now=120)
    assert (outgoing.settled, outgoing.give_up_at) == (False, 130)


def test_a_peer_that_has_all_may_close_first() -> None:
    """COMPAT(libpurple, xmppframework): before we know that there is no more."""
    outgoing = an_outgoing()
    outgoing.next_block(b"abc", now=0)
    outgoing.peer_closed()
    assert not outgoing.settled
    assert outgoing.may_send  # that is: look whether there is any more
    outgoing.end(now=0)
    assert outgoing.settled


def test_a_peer_that_closes_early_has_not_got_all() -> None:
    outgoing = an_outgoing()
    outgoing.peer_closed()
    with pytest.raises(BytestreamError, match="before it had everything"):
        outgoing.next_block(b"abc", now=0)
    outgoing = an_outgoing(window=2)
    outgoing.next_block(b"abc", now=0)
    outgoing.next_block(b"abc", now=0)
    with pytest.raises(BytestreamError, match="before it had everything"):
        outgoing.peer_closed()


@pytest.mark.parametrize(
    ("sid", "block_size", "window"),
    [("", 1, 1), ("s" * 129, 1, 1), ("s", 0, 1), ("s", 65536, 1), ("s", 1, 0)],
)
def test_what_cannot_be_a_stream_is_our_own_mistake(
    sid: str, block_size: int, window: int
) -> None:
    with pytest.raises(ValueError, match="bytestream"):
        Outgoing(sid, block_size=block_size, window=window)


# --- Afterwards


def test_ended_streams_are_remembered_for_a_minute() -> None:
    ended = Ended()
    ended.add(PEER, "a", now=0)
    ended.add(PEER, "b", now=30)
    assert ended.knows(PEER, "a", now=59)
    assert not ended.knows(PEER, "a", now=60)
    assert not ended.knows(PEER.bare, "b", now=31)
    ended.add(PEER, "c", now=60)
    assert len(ended) == 2


def test_only_so_many_ended_streams_are_remembered() -> None:
    ended = Ended()
    for number in range(ibb.MAX_ENDED + 10):
        ended.add(PEER, str(number), now=0)
    assert len(ended) == ibb.MAX_ENDED
    assert ended.knows(PEER, str(ibb.MAX_ENDED + 9), now=0)
    assert not ended.knows(PEER, "9", now=0)


def test_a_sid_that_ends_twice_is_remembered_from_the_second_time() -> None:
    ended = Ended()
    for sid, now in (("a", 0), ("b", 10), ("a", 30), ("c", 75)):
        ended.add(PEER, sid, now=now)
    assert ended.knows(PEER, "a", now=80)
    assert len(ended) == 2


def test_machines_show_where_they_are() -> None:
    assert repr(an_outgoing()) == "<Outgoing OPEN next=0 of 3>"
    assert repr(an_incoming()) == "<Incoming OPEN 0 of 100>"


# --- On their way together


def test_any_answer_shows_that_the_line_moves() -> None:
    line = ibb.Line()
    first, second = line.send(PEER, 0), line.send(OTHER, 1)
    line.answered(first, 50)
    assert (second.alive_at, second.passed) == (50, False)
    assert len(line) == 1


def test_a_block_that_was_passed_by_is_kept_alive_by_its_peer_alone() -> None:
    line = ibb.Line()
    ours, others = line.send(PEER, 0), [line.send(OTHER, 1), line.send(OTHER, 2)]
    theirs = line.send(PEER, 3)
    line.answered(others[0], 50)
    assert (ours.alive_at, ours.passed) == (50, True)
    line.answered(others[1], 60)
    assert ours.alive_at == 50
    line.answered(theirs, 70)
    assert ours.alive_at == 70


def test_a_block_whose_stream_is_over_is_forgotten() -> None:
    line = ibb.Line()
    flight = line.send(PEER, 0)
    line.lost(flight)
    line.lost(flight)
    assert len(line) == 0
