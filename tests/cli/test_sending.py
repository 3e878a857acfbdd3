from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from syncd.control.messages import SendRequest, Standing, StandingRequest, StatusRequest
from syncd.errors import NotFoundError, SyncdError
from tests.support.statuses import CONNECTION, but, status
from tests.support.syncctl import Script, syncctl

if TYPE_CHECKING:
    from pathlib import Path

BOB = "bob@example.org"
OWED = Standing(state="pending", online=True)
OFFLINE = Standing(state="pending", online=False)
DELIVERED = Standing(state="delivered", online=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


async def test_without_wait_it_is_enough_that_the_file_is_owed(path: Path) -> None:
    script = Script(OWED)
    assert await syncctl(script.answer, path, "send", "/srv/a.pdf", BOB) == (
        0,
        f"/srv/a.pdf is being sent to {BOB}\n",
        "",
    )
    assert script.asked == [SendRequest(path="/srv/a.pdf", peer=BOB)]


async def test_who_is_offline_gets_it_later(path: Path) -> None:
    assert await syncctl(Script(OFFLINE).answer, path, "send", "/srv/a.pdf", BOB) == (
        0,
        f"/srv/a.pdf will be sent to {BOB} when they are online\n",
        "",
    )


async def test_a_relative_path_starts_here_and_a_link_stays_one(
    path: Path, tmp_path: Path
) -> None:
    """The daemon stands elsewhere; and it is the daemon who refuses a link."""
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("a.pdf")
    script = Script(OWED)
    await syncctl(script.answer, path, "send", "../link", BOB, cwd=tmp_path / "here")
    assert script.asked == [SendRequest(path=str(tmp_path / "link"), peer=BOB)]


@pytest.mark.parametrize("last", [DELIVERED, Standing(state="sent", online=False)])
async def test_wait_returns_when_it_is_there(path: Path, last: Standing) -> None:
    script = Script(OWED, OWED, last)
    done = await syncctl(script.answer, path, "send", "--wait", "/srv/a.pdf", BOB)
    assert done == (0, "", "")
    assert script.asked[1:] == 2 * [StandingRequest(path="/srv/a.pdf", peer=BOB)]


async def test_wait_ends_when_a_person_must_act(path: Path) -> None:
    parked = Standing(state="parked", online=True, error="declined", hint="ask bob")
    done = await syncctl(Script(OWED, parked).answer, path, "send", "/a", BOB, "--wait")
    assert done == (
        1,
        "",
        f"syncctl: /a is not sent to {BOB}: declined\n  hint: ask bob\n",
    )


async def test_wait_ends_when_the_file_went_away(path: Path) -> None:
    dropped = Standing(state="dropped", online=True)
    done = await syncctl(Script(OWED, dropped).answer, path, "send", "/a", BOB, "--wait")
    assert done == (10, "", f"syncctl: /a went away before it was sent to {BOB}\n")


async def test_wait_gives_up_on_who_is_offline_with_a_code_of_its_own(path: Path) -> None:
    script = Script(OFFLINE, status(), OFFLINE, status(), OFFLINE)
    code, out, err = await syncctl(
        script.answer, path, "send", "/a", BOB, "--wait", "--timeout", "0.1"
    )
    assert (code, out) == (7, "")
    assert err.startswith(f"syncctl: {BOB} is offline")


async def test_wait_gives_up_after_its_timeout(path: Path) -> None:
    slow = Standing(state="pending", online=True, error="no byte moved for 60 s")
    code, out, err = await syncctl(
        Script(slow).answer, path, "send", "/a", BOB, "--wait", "--timeout", "0.1"
    )
    assert (code, out) == (3, "")
    assert err == (
        f"syncctl: /a is not delivered to {BOB} after 0 s: no byte moved for 60 s\n"
        "  hint: it still will be\n"
    )


async def test_without_credentials_there_is_nothing_to_wait_for(path: Path) -> None:
    unauthorized = status(connection=but(CONNECTION, state="unauthorized"))
    script = Script(OFFLINE, unauthorized)
    code, _, err = await syncctl(script.answer, path, "send", "/a", BOB, "--wait")
    assert code == 6
    assert err == "syncctl: the server does not accept the account's credentials\n"
    assert script.asked[1:] == [StatusRequest()]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("there is no file /a", hint="look again"), 10),
        (SyncdError("/a is a symbolic link", hint="name the file"), 1),
    ],
)
async def test_what_the_daemon_refuses_is_said_with_its_reason(
    path: Path, error: SyncdError, code: int
) -> None:
    done = await syncctl(Script(error).answer, path, "send", "/a", BOB, "--wait")
    assert done == (code, "", f"syncctl: {error}\n  hint: {error.hint}\n")
