from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from syncd.control.messages import Limited, LimitRequest, LimitStatus
from syncd.errors import NotFoundError
from tests.support.syncctl import Script, syncctl

if TYPE_CHECKING:
    from pathlib import Path

BOB = "bob@example.org"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


async def test_limits_are_shown(path: Path) -> None:
    script = Script(Limited(peer="", limit=LimitStatus(up=5 << 20)))
    assert await syncctl(script.answer, path, "limit") == (
        0,
        "all peers together: up 5.0 MiB/s, down no limit\n",
        "",
    )
    assert script.asked == [LimitRequest()]


async def test_the_limit_of_a_peer_is_changed(path: Path) -> None:
    script = Script(Limited(peer=BOB, limit=LimitStatus(up=1 << 20)))
    assert await syncctl(script.answer, path, "limit", BOB, "--up", "1MiB", "--down", "0") == (
        0,
        f"{BOB}: up 1.0 MiB/s, down no limit\n",
        "",
    )
    assert script.asked == [LimitRequest(peer=BOB, up=1 << 20, down=0)]


@pytest.mark.parametrize("rate", ["fast", "-1", "5", "5 miB"])
async def test_what_is_no_speed_is_a_mistake_of_usage(path: Path, rate: str) -> None:
    script = Script(Limited(peer="", limit=LimitStatus()))
    code, out, err = await syncctl(script.answer, path, "limit", f"--up={rate}")
    assert (code, out) == (2, "")
    assert "expected bytes per second (1 KiB to 1 TiB)" in err
    assert script.asked == []


async def test_a_peer_that_nobody_knows_is_not_found(path: Path) -> None:
    script = Script(NotFoundError("the configuration names no peer eve@example.org"))
    code, _, err = await syncctl(script.answer, path, "limit", "eve@example.org")
    assert (code, err) == (
        10,
        "syncctl: the configuration names no peer eve@example.org\n",
    )
