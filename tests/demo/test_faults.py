from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from syncd.demo.faults import Faults, cut, payload
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import make_iq
from syncd.xmpp.xml import make

ALICE, BOB = JID("alice", "demo.example", "a"), JID("bob", "demo.example", "b")
PING = make_iq("get", "1", BOB, make("{urn:xmpp:ping}ping"))


def test_nothing_is_wrong_at_first() -> None:
    faults = Faults()
    assert faults.copies(PING, ALICE, BOB) == (0.0,)
    assert not faults.silent


def test_rules_hold_as_often_as_they_say() -> None:
    faults = Faults()
    rule = faults.drop(payload("{urn:xmpp:ping}ping"), times=2)
    assert [faults.copies(PING, ALICE, BOB) for _ in range(3)] == [(), (), (0.0,)]
    assert rule.hits == 2


def test_rules_can_be_taken_back() -> None:
    faults = Faults()
    faults.drop(lambda *_: True)
    faults.clear()
    assert faults.copies(PING, ALICE, BOB) == (0.0,)


def test_the_first_rule_that_matches_decides() -> None:
    faults = Faults()
    faults.drop(lambda _, __, to: to == ALICE)
    faults.delay(lambda _, sender, __: sender == ALICE, 2.5)
    faults.duplicate(lambda *_: True)
    assert faults.copies(PING, BOB, ALICE) == ()
    assert faults.copies(PING, ALICE, BOB) == (2.5,)
    assert faults.copies(PING, BOB, None) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("tag", "kind", "expected"),
    [
        ("{urn:xmpp:ping}ping", None, True),
        ("{urn:xmpp:ping}ping", "get", True),
        ("{urn:xmpp:ping}ping", "set", False),
        ("{other}ping", None, False),
    ],
)
def test_payloads_are_matched_by_tag_and_type(
    tag: str, kind: str | None, expected: bool
) -> None:
    assert payload(tag, kind)(PING, ALICE, BOB) is expected


def test_a_stanza_without_payload_matches_no_payload() -> None:
    assert not payload("{urn:xmpp:ping}ping")(make_iq("result", "1", BOB), ALICE, BOB)


async def test_silence_holds_everybody_until_it_ends() -> None:
    faults = Faults()
    await faults.until_audible()
    faults.silent = True
    heard = []

    async def listen() -> None:
        await faults.until_audible()
        heard.append(faults.silent)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await wait_all_tasks_blocked()
        faults.silent = True  # again, and still one silence
        await wait_all_tasks_blocked()
        assert heard == []
        faults.silent = False
    assert heard == [False]


async def test_a_cut_is_an_error_at_the_other_end() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listeners[0] as listener:
        port = listener.socket.getsockname()[1]
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        other = await listener.accept()
        cut(other)
        cut(other)  # twice is harmless
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some(1)
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        assert stream.socket.type == socket.SOCK_STREAM
        await stream.aclose()
