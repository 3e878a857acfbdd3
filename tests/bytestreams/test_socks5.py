import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.bytestreams.socks5 import Acceptor, Connector, Greeter, is_address
from syncd.errors import BytestreamError, RemoteProtocolError

# XEP-0065 examples: the stream id and JIDs of the direct connection.
ADDRESS = hashlib.sha1(
    b"vxf9n471bn46" + b"requester@example.com/foo" + b"target@example.org/bar"
).hexdigest()

GREETING = b"\x05\x01\x00"  # RFC 1928 section 3: one method, none
METHOD = b"\x05\x00"
REQUEST = b"\x05\x01\x00\x03\x28" + ADDRESS.encode() + b"\x00\x00"  # RFC 1928 section 4
REPLY = b"\x05\x00\x00\x03\x28" + ADDRESS.encode() + b"\x00\x00"  # RFC 1928 section 6
NO_ADDRESS = b"\x00\x01" + bytes(6)

cuts = st.lists(st.integers(1, 20))


def feed(
    machine: Connector | Greeter | Acceptor, wire: bytes, cuts: list[int] | None = None
) -> bytes:
    """Give a machine what it wants of the wire, cut up; returns what it leaves."""
    sizes = iter(cuts or [])
    while wire and machine.bytes_wanted:
        size = min(next(sizes, len(wire)), machine.bytes_wanted)
        machine.receive_data(wire[:size])
        wire = wire[size:]
    return wire


def test_the_example_address_is_what_other_implementations_compute() -> None:
    assert ADDRESS == "98b8d688d0f5d895fd41c5e7309a2e9e33ba32ff"


def test_connector_says_each_message_in_one_piece_and_in_turn() -> None:
    """XEP-0065 section 5.3.2; Prosody parses one read at a time."""
    connector = Connector(ADDRESS)
    assert connector.data_to_send() == GREETING
    assert connector.data_to_send() == b""
    feed(connector, METHOD)
    assert connector.data_to_send() == REQUEST
    feed(connector, REPLY)
    assert connector.data_to_send() == b""
    assert connector.done
    assert connector.error is None


bound_addresses = st.one_of(
    st.just(b"\x00"),
    st.binary(min_size=4, max_size=4).map(lambda raw: b"\x01" + raw),
    st.binary(max_size=255).map(lambda raw: b"\x03" + bytes([len(raw)]) + raw),
    st.binary(min_size=16, max_size=16).map(lambda raw: b"\x04" + raw),
)


@given(cuts, bound_addresses, st.binary(min_size=2, max_size=2))
def test_connector_takes_any_bound_address_in_any_cut_and_leaves_the_file(
    cuts: list[int], bound: bytes, port: bytes
) -> None:
    """The file's first byte may lie right behind the reply, and stays in the socket."""
    connector = Connector(ADDRESS)
    left = feed(connector, METHOD + b"\x05\x00\x00" + bound + port + b"FILE", cuts)
    assert connector.done
    assert left == b"FILE"


@given(cuts, st.binary(max_size=600))
def test_connector_survives_any_bytes(cuts: list[int], wire: bytes) -> None:
    connector = Connector(ADDRESS)
    left = feed(connector, wire, cuts)
    assert len(wire) - len(left) <= 264
    assert connector.bytes_wanted >= 0
    assert not (connector.done and connector.error)


@pytest.mark.parametrize(
    ("wire", "error", "words"),
    [
        (b"HT", RemoteProtocolError, "does not speak SOCKS5"),
        (b"\x05\xff", BytestreamError, "demands a login"),
        (b"\x05\x02", BytestreamError, "demands a login"),
        (METHOD + b"\x05\x02", BytestreamError, "refused: it expects no such bytestream"),
        (METHOD + b"\x05\x01\x00\x03\x00\x00\x00", BytestreamError, "general failure"),
        (METHOD + b"\x05\x63", BytestreamError, "refused: reply 99"),
        (METHOD + b"\x04\x00", RemoteProtocolError, "does not speak SOCKS5"),
        (METHOD + b"\x05\x00\x00\x02", RemoteProtocolError, "address type 2"),
    ],
)
def test_connector_tells_why_it_failed(wire: bytes, error: type, words: str) -> None:
    connector = Connector(ADDRESS)
    feed(connector, wire)
    assert isinstance(connector.error, error)
    assert words in str(connector.error)
    assert connector.bytes_wanted == 0
    assert not connector.done


@pytest.mark.parametrize("wire", [b"", b"\x05", METHOD, METHOD + b"\x05\x00\x00"])
def test_connector_tells_when_the_streamhost_hangs_up(wire: bytes) -> None:
    connector = Connector(ADDRESS)
    feed(connector, wire)
    connector.receive_data(b"")
    assert isinstance(connector.error, RemoteProtocolError)
    assert "closed during the handshake" in str(connector.error)


def test_only_an_unanswered_request_leaves_doubt() -> None:
    """Whether the streamhost may count us as connected decides if it may be asked again."""
    doubts = []
    for wire in (b"", METHOD, METHOD + b"\x05\x00", METHOD + b"\x05\x02", METHOD + REPLY):
        connector = Connector(ADDRESS)
        feed(connector, wire)
        doubts.append(connector.in_doubt)
    assert doubts == [False, True, True, False, False]


def test_a_streamhost_that_hangs_up_on_the_request_leaves_doubt() -> None:
    connector = Connector(ADDRESS)
    feed(connector, METHOD)
    connector.receive_data(b"")
    assert connector.in_doubt


@pytest.mark.parametrize("address", ["", "0" * 39, "g" * 40, "0" * 41, "\u0660" * 40])
def test_connector_takes_only_an_address(address: str) -> None:
    with pytest.raises(ValueError, match="40 hexadecimal"):
        Connector(address)


def test_reading_more_than_wanted_is_our_own_mistake() -> None:
    connector = Connector(ADDRESS)
    with pytest.raises(ValueError, match="2 were wanted"):
        connector.receive_data(METHOD + REPLY)
    feed(connector, METHOD + REPLY)
    with pytest.raises(ValueError, match="0 were wanted"):
        connector.receive_data(b"")


@given(cuts)
def test_acceptor_takes_greeting_and_request_in_any_cut_or_glued(cuts: list[int]) -> None:
    acceptor = Acceptor()
    left = feed(acceptor, GREETING + REQUEST + b"DATA", cuts)
    assert left == b"DATA"
    assert acceptor.address == ADDRESS
    acceptor.accept()
    assert acceptor.data_to_send() == METHOD + REPLY


def test_acceptor_answers_step_by_step() -> None:
    acceptor = Acceptor()
    feed(acceptor, GREETING)
    assert acceptor.data_to_send() == METHOD
    feed(acceptor, REQUEST)
    assert acceptor.data_to_send() == b""
    acceptor.refuse()
    assert acceptor.data_to_send() == b"\x05\x02" + REPLY[2:]


def test_acceptor_repeats_case_and_port_as_they_came() -> None:
    """XEP-0065 section 5.3.2; Smack compares the reply with its request byte for byte."""
    acceptor = Acceptor()
    asked = ADDRESS.upper().encode() + b"\x12\x34"
    feed(acceptor, GREETING + b"\x05\x01\x00\x03\x28" + asked)
    assert acceptor.address == ADDRESS
    acceptor.accept()
    assert acceptor.data_to_send() == METHOD + b"\x05\x00\x00\x03\x28" + asked


@pytest.mark.parametrize(
    ("wire", "answer", "words"),
    [
        (b"GE", b"", "does not speak SOCKS5"),
        (b"\x04\x01", b"", "does not speak SOCKS5"),
        (b"\x05\x00", b"\x05\xff", "wants a login"),
        (b"\x05\x02\x01\x02", b"\x05\xff", "wants a login"),
        (GREETING + b"\x04\x01\x00\x03", METHOD, "does not speak SOCKS5"),
        (GREETING + b"\x05\x02\x00\x03", METHOD + b"\x05\x07" + NO_ADDRESS, "command 2"),
        (GREETING + b"\x05\x01\x00\x01", METHOD + b"\x05\x08" + NO_ADDRESS, "type 1"),
        (GREETING + b"\x05\x01\x00\x03\xff", METHOD + b"\x05\x02" + NO_ADDRESS, "no SHA-1"),
        (
            GREETING + b"\x05\x01\x00\x03\x28" + b"\xff" * 42,
            METHOD + b"\x05\x02" + NO_ADDRESS,
            "no SHA-1",
        ),
    ],
)
def test_acceptor_refuses_in_the_words_of_the_rfc(
    wire: bytes, answer: bytes, words: str
) -> None:
    """RFC 1928 sections 3 and 6."""
    acceptor = Acceptor()
    feed(acceptor, wire)
    assert acceptor.data_to_send() == answer
    assert isinstance(acceptor.error, RemoteProtocolError)
    assert words in str(acceptor.error)
    assert acceptor.address is None
    assert acceptor.bytes_wanted == 0


@given(cuts, st.binary(max_size=600))
def test_acceptor_never_takes_more_than_a_handshake(cuts: list[int], wire: bytes) -> None:
    acceptor = Acceptor()
    left = feed(acceptor, b"\x05" + wire, cuts)
    assert 1 + len(wire) - len(left) <= 304
    assert (acceptor.address is None) or is_address(acceptor.address)


def test_acceptor_takes_the_longest_greeting() -> None:
    acceptor = Acceptor()
    assert feed(acceptor, b"\x05\xff" + bytes(255) + REQUEST) == b""
    assert acceptor.address == ADDRESS


@given(st.text("0123456789abcdefABCDEF", min_size=40, max_size=40), cuts, cuts)
def test_the_two_sides_understand_each_other(
    address: str, one: list[int], other: list[int]
) -> None:
    connector, acceptor = Connector(address), Acceptor()
    feed(acceptor, connector.data_to_send(), one)
    feed(connector, acceptor.data_to_send(), other)
    feed(acceptor, connector.data_to_send(), one)
    acceptor.accept()
    assert feed(connector, acceptor.data_to_send() + b"F", other) == b"F"
    assert connector.done
    assert acceptor.address == address.lower()


def test_repr_tells_the_state() -> None:
    assert repr(Acceptor()) == "<Acceptor address=None error=None>"
    assert repr(Connector(ADDRESS)) == "<Connector done=False in_doubt=False error=None>"


def test_greeter_says_its_greeting_and_nothing_more() -> None:
    greeter = Greeter()
    assert greeter.data_to_send() == b"\x05\x01\x00"
    assert feed(greeter, b"\x05\x00more") == b"more"
    assert greeter.error is None
    assert greeter.data_to_send() == b""


@pytest.mark.parametrize(("wire", "words"), [(b"HT", "SOCKS5"), (b"\x05\xff", "a login")])
def test_greeter_tells_what_is_no_streamhost(wire: bytes, words: str) -> None:
    greeter = Greeter()
    feed(greeter, wire)
    assert words in str(greeter.error)


@pytest.mark.parametrize("reply", range(256))
def test_connector_tells_a_refusal_from_every_other_end(reply: int) -> None:
    connector = Connector(ADDRESS)
    feed(connector, bytes([5, 0, 5, reply]))
    assert connector.refused == (reply != 0)
    hung_up = Connector(ADDRESS)
    feed(hung_up, b"\x05\x00")
    hung_up.receive_data(b"")
    assert not hung_up.refused
