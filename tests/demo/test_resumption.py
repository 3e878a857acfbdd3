"""What the server counts of one stream, and hands to the next."""

from __future__ import annotations

import pytest

from syncd.demo.resumption import RESUME_WITHIN, Management, no_session
from syncd.errors import ErrorType, RemoteProtocolError, StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.sm import NS, StreamManagement
from syncd.xmpp.xml import make, serialise

ALICE = JID.parse("alice@demo.example/a")
ENABLE = make(f"{{{NS}}}enable", {"resume": "true"})


def make_management(*, able: bool = True) -> Management:
    return Management(able=able, token=lambda: "id", resume=no_session)


def failed(condition: str) -> str:
    stanzas = "urn:ietf:params:xml:ns:xmpp-stanzas"
    return f"<failed xmlns='{NS}'><{condition} xmlns='{stanzas}'/></failed>"


def test_a_stream_is_made_resumable() -> None:
    management = make_management()
    assert not management.resumable
    answer = management.enable(ALICE, ENABLE)
    assert serialise(answer).decode() == (
        f"<enabled xmlns='{NS}' id='id' resume='true' max='{RESUME_WITHIN}'/>"
    )
    assert management.resumable


def test_a_stream_may_be_counted_only() -> None:
    management = make_management()
    answer = management.enable(ALICE, make(f"{{{NS}}}enable"))
    assert serialise(answer).decode() == f"<enabled xmlns='{NS}'/>"
    assert management.kept is not None
    assert not management.resumable


def test_it_is_enabled_once_and_only_by_who_can() -> None:
    management = make_management()
    management.enable(ALICE, ENABLE)
    assert serialise(management.enable(ALICE, ENABLE)).decode() == failed("unexpected-request")
    unable = make_management(able=False)
    assert serialise(unable.enable(ALICE, ENABLE)).decode() == failed("unexpected-request")


def resume(h: str = "0") -> dict[str, str]:
    return {"previd": "id", "h": h}


def test_a_session_goes_on() -> None:
    former = StreamManagement(ALICE)
    former.id = "id"
    former.sent(b"<message/>")
    former.sent(b"<iq/>")
    former.received()

    def hand_over(account: JID, previous: str) -> StreamManagement:
        assert (account, previous) == (ALICE.bare, "id")
        return former

    management = Management(able=True, token=str, resume=hand_over)
    answer, resumed = management.resume(ALICE.bare, make(f"{{{NS}}}resume", resume("1")))
    assert resumed
    assert serialise(answer).decode() == f"<resumed xmlns='{NS}' previd='id' h='1'/>"
    assert management.kept is former
    assert former.unacked == (b"<iq/>",)


@pytest.mark.parametrize(
    ("able", "attributes", "condition"),
    [
        (False, resume(), "unexpected-request"),
        (True, resume(), "item-not-found"),
        (True, resume("many"), "bad-request"),
        (True, {"previd": "id"}, "bad-request"),
    ],
)
def test_what_cannot_go_on(*, able: bool, attributes: dict[str, str], condition: str) -> None:
    management = make_management(able=able)
    answer, resumed = management.resume(ALICE.bare, make(f"{{{NS}}}resume", attributes))
    assert not resumed
    assert serialise(answer).decode() == failed(condition)
    assert management.kept is None


def test_who_got_more_than_was_sent_is_told() -> None:
    former = StreamManagement(ALICE)
    management = Management(able=True, token=str, resume=lambda *_: former)
    element = make(f"{{{NS}}}resume", resume("3"))
    assert management.too_high(element).get("send-count") == "0"
    with pytest.raises(RemoteProtocolError):
        management.resume(ALICE.bare, element)
    assert serialise(management.too_high(element)).decode() == (
        f"<handled-count-too-high xmlns='{NS}' h='3' send-count='0'/>"
    )


def test_where_there_never_was_a_session_there_is_none() -> None:
    with pytest.raises(StanzaError) as caught:
        no_session(ALICE, "id")
    assert (caught.value.type, caught.value.condition) == (ErrorType.CANCEL, "item-not-found")
