"""What an accepted offer asks for, and the requests about it."""

from __future__ import annotations

from dataclasses import replace
from xml.etree.ElementTree import Element

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from syncd.errors import ErrorType, StanzaError
from syncd.transfer import si
from syncd.transfer.incoming import MAX_ASKED, OVERLAP, Mailbox, is_resumable

OFFER = si.Offer(
    sid="s", name="a", size=2 * OVERLAP + 1, methods=(si.BYTESTREAMS,), ranged=True
)
SYNC = si.Sync(folder="photos", path="a", mtime_ns=1)

ENDED = StanzaError(ErrorType.WAIT, "item-not-found", "that transfer has ended")


@pytest.mark.parametrize(
    ("offer", "expected"),
    [
        (OFFER, True),
        (replace(OFFER, size=2 * OVERLAP), False),
        (replace(OFFER, size=None), False),
        (replace(OFFER, ranged=False), False),
        (replace(OFFER, size=1, sync=SYNC), True),
        (replace(OFFER, ranged=False, sync=SYNC), True),
    ],
    ids=["plain", "small", "no size", "no range", "syncd, small", "syncd, no range"],
)
def test_what_a_later_offer_can_go_on_from(offer: si.Offer, expected: bool) -> None:
    assert is_resumable(offer) is expected


class Asked:
    """Requests in a mailbox, and what came of each."""

    def __init__(self, mailbox: Mailbox, nursery: trio.Nursery) -> None:
        self.outcomes: dict[str, str] = {}
        self._mailbox = mailbox
        self._nursery = nursery

    def ask(self, name: str) -> None:
        self._nursery.start_soon(self._ask, name)

    async def _ask(self, name: str) -> None:
        try:
            self.outcomes[name] = (await self._mailbox.ask(Element(name))).tag
        except StanzaError as error:
            self.outcomes[name] = error.condition


async def test_first_answer_to_a_request_counts() -> None:
    mailbox = Mailbox()
    async with trio.open_nursery() as nursery:
        asked = Asked(mailbox, nursery)
        for name in ("a", "b"):
            asked.ask(name)
            call = await mailbox.next()
            answer, refuse = Element("yes"), StanzaError(ErrorType.CANCEL, "forbidden")
            if name == "a":
                call.answer(answer)
                call.fail(refuse)
            else:
                call.fail(refuse)
                call.answer(answer)
            assert call.payload.tag == name
    assert asked.outcomes == {"a": "yes", "b": "forbidden"}


async def test_end_refuses_what_waits_and_what_comes_later() -> None:
    mailbox = Mailbox()
    async with trio.open_nursery() as nursery:
        asked = Asked(mailbox, nursery)
        asked.ask("begun")
        await mailbox.next()
        asked.ask("waiting")
        await wait_all_tasks_blocked()
        mailbox.close(ENDED)
        asked.ask("late")
    assert asked.outcomes == dict.fromkeys(("begun", "waiting", "late"), "item-not-found")


async def test_end_may_be_told_more_than_once() -> None:
    """By the task that is cancelled, and by who cancels it."""
    mailbox = Mailbox()
    async with trio.open_nursery() as nursery:
        asked = Asked(mailbox, nursery)
        asked.ask("waiting")
        await wait_all_tasks_blocked()
        mailbox.close(ENDED)
        mailbox.close(ENDED)
        asked.ask("late")
    assert asked.outcomes == dict.fromkeys(("waiting", "late"), "item-not-found")


async def test_only_so_many_requests_wait() -> None:
    mailbox = Mailbox()
    async with trio.open_nursery() as nursery:
        asked = Asked(mailbox, nursery)
        for number in range(MAX_ASKED):
            asked.ask(f"r{number}")
        await wait_all_tasks_blocked()
        assert asked.outcomes == {}
        asked.ask("more")
        await wait_all_tasks_blocked()
        assert asked.outcomes == {"more": "item-not-found"}
        mailbox.close(ENDED)
    assert len(asked.outcomes) == MAX_ASKED + 1
