from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from syncd.control.answers import Answers, Experts
from syncd.control.messages import (
    KeyRequest,
    Keys,
    Limited,
    LimitRequest,
    LimitStatus,
    PeerRequest,
    PingRequest,
    Pong,
    Reply,
    Request,
    Rescanned,
    RescanRequest,
    SendRequest,
    Standing,
    StandingRequest,
    Status,
    StatusRequest,
)
from syncd.errors import ErrorType, JournalError, SyncdError
from tests.support.statuses import status

OWED = Standing(state="pending", online=False)
KEYS = Keys(own="aa", keys=())


class Knows:
    """Answers everything, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def status(self) -> Status:
        await trio.lowlevel.checkpoint()
        self.asked.append("status")
        return status()

    async def rescan(self) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append("rescan")

    def limit(self, request: LimitRequest) -> Limited:
        self.asked.append(request)
        return Limited(peer=request.peer, limit=LimitStatus(up=request.up or 0))

    async def send(self, request: SendRequest) -> Standing:
        await trio.lowlevel.checkpoint()
        self.asked.append(request)
        return OWED

    async def standing(self, request: StandingRequest) -> Standing:
        await trio.lowlevel.checkpoint()
        self.asked.append(request)
        return OWED

    async def keys(self, request: PeerRequest | KeyRequest) -> Keys:
        await trio.lowlevel.checkpoint()
        self.asked.append(request)
        return KEYS


def experts(knows: Knows, *, seals: bool = True) -> Experts:
    return Experts(
        status=knows.status,
        rescan=knows.rescan,
        limit=knows.limit,
        send=knows.send,
        standing=knows.standing,
        keys=knows.keys if seals else None,
    )


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (StatusRequest(), status()),
        (LimitRequest(up=5), Limited(peer="", limit=LimitStatus(up=5))),
        (SendRequest(path="/a", peer="bob@example.org"), OWED),
        (StandingRequest(path="/a", peer="bob@example.org"), OWED),
        (PeerRequest(action="list"), KEYS),
        (KeyRequest(action="show"), KEYS),
    ],
)
async def test_each_question_goes_to_who_knows(request_: Request, reply: Reply) -> None:
    answers, knows = Answers("1.2.3"), Knows()
    answers.begin(experts(knows))
    assert await answers.answer(request_) == reply
    assert len(knows.asked) == 1


async def test_a_rescan_is_done_before_the_files_are_counted() -> None:
    answers, knows = Answers("1.2.3"), Knows()
    answers.begin(experts(knows))
    assert await answers.answer(RescanRequest()) == Rescanned(files=12481)
    assert knows.asked == ["rescan", "status"]


async def test_a_ping_is_answered_at_once() -> None:
    reply = await Answers("1.2.3").answer(PingRequest())
    assert isinstance(reply, Pong)
    assert reply.version == "1.2.3"


async def test_everything_else_waits_until_somebody_knows() -> None:
    answers, replies = Answers("1.2.3"), list[Reply]()

    async def ask() -> None:
        replies.append(await answers.answer(StatusRequest()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        assert replies == []
        answers.begin(experts(Knows()))
    assert replies == [status(), status()]


async def test_who_waits_for_what_cannot_begin_is_told_why() -> None:
    answers = Answers("1.2.3")
    full = JournalError("the disk is full", hint="make room", type=ErrorType.WAIT)
    told: list[SyncdError] = []

    async def ask() -> None:
        with pytest.raises(SyncdError) as caught:
            await answers.answer(StatusRequest())
        told.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        answers.refuse(full)
    await ask()
    assert [(str(each), each.hint, each.type) for each in told] == 2 * [
        ("the disk is full", "make room", ErrorType.WAIT)
    ]
    answers.begin(experts(Knows()))
    assert await answers.answer(StatusRequest()) == status()


async def test_without_keys_there_is_nothing_to_decide_about() -> None:
    answers, knows = Answers("1.2.3"), Knows()
    answers.begin(experts(knows, seals=False))
    with pytest.raises(SyncdError, match="does not encrypt from end to end"):
        await answers.answer(PeerRequest(action="list"))
