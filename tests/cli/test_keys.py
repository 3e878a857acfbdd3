from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from syncd.cli import keys
from syncd.cli.exits import Exit
from syncd.control.messages import Key, KeyRequest, Keys, PeerRequest
from tests.support.syncctl import Script, syncctl

if TYPE_CHECKING:
    from pathlib import Path

BOB = "bob@example.org"
KEY = Key(
    peer=BOB,
    state="unverified",
    fingerprint="9f86 d081 884c",
    words=("one", "two", "three", "four", "five", "six"),
    first_seen=datetime(2031, 5, 1, 12, 0, tzinfo=UTC),
    last_seen=datetime(2031, 5, 4, 12, 0, tzinfo=UTC),
)
SHOWN = f"""\
{BOB}: trusted on first use; nobody has compared it yet
  fingerprint: 9f86 d081 884c
  words: one two three four five six
  seen: 2031-05-01 to 2031-05-04
"""
KNOWN = Keys(own="aa bb", keys=(KEY,))
NONE = Keys(own="aa bb", keys=())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


async def test_all_keys_are_listed_and_our_own(path: Path) -> None:
    script = Script(KNOWN)
    assert await syncctl(script.answer, path, "peer", "list") == (
        0,
        f"our own key: aa bb\n{SHOWN}",
        "",
    )
    assert script.asked == [PeerRequest(action="list")]


async def test_one_key_is_shown(path: Path) -> None:
    script = Script(KNOWN)
    assert await syncctl(script.answer, path, "peer", "show", BOB) == (0, SHOWN, "")
    assert script.asked == [PeerRequest(action="show", peer=BOB)]


async def test_a_peer_without_a_key_is_not_found(path: Path) -> None:
    code, _, err = await syncctl(Script(NONE).answer, path, "peer", "show", BOB)
    assert (code, err.splitlines()[0]) == (10, f"syncctl: {BOB} has never shown a key")


async def test_a_key_that_changed_shows_both_fingerprints(path: Path) -> None:
    changed = Keys(
        own="aa",
        keys=(
            Key(
                peer=BOB,
                state="changed",
                fingerprint="9f86",
                words=KEY.words,
                first_seen=KEY.first_seen,
                last_seen=KEY.last_seen,
                offered="ffff",
            ),
        ),
    )
    _, out, _ = await syncctl(Script(changed).answer, path, "peer", "show", BOB)
    assert out.splitlines()[:3] == [
        f"{BOB}: CHANGED: nothing moves until a person has decided",
        "  fingerprint: 9f86",
        "  it shows now: ffff",
    ]


async def test_a_fingerprint_that_fits_verifies_exactly_that_key(path: Path) -> None:
    script = Script(KNOWN)
    code, _, err = await syncctl(
        script.answer, path, "peer", "verify", BOB, "--fingerprint", "9F:86:D0:81:88:4C"
    )
    assert (code, err) == (0, "")
    assert script.asked == [
        PeerRequest(action="show", peer=BOB),
        PeerRequest(action="verify", peer=BOB, fingerprint="9f86 d081 884c"),
    ]


async def test_a_fingerprint_that_does_not_fit_verifies_nothing(path: Path) -> None:
    script = Script(KNOWN)
    code, _, err = await syncctl(
        script.answer, path, "peer", "verify", BOB, "--fingerprint", "9f86"
    )
    assert code == 1
    assert err.startswith(f"syncctl: {BOB} shows another key: 9f86 d081 884c\n")
    assert len(script.asked) == 1


async def test_without_a_person_nothing_is_verified_by_words(path: Path) -> None:
    script = Script(KNOWN)
    code, _, err = await syncctl(script.answer, path, "peer", "verify", BOB)
    assert code == 1
    assert err.startswith("syncctl: there is nobody to ask whether the words are the same")
    assert len(script.asked) == 1


@pytest.mark.parametrize(("same", "code"), [(True, Exit.OK), (False, Exit.FAILED)])
def test_a_person_compares_the_words(
    same: bool, code: Exit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[PeerRequest] = []

    def ask(_: object, request: PeerRequest, *, timeout: float) -> Keys:
        asked.append(request)
        return KNOWN

    monkeypatch.setattr(keys, "ask", ask)
    questions: list[str] = []

    def confirm(question: str) -> bool:
        # The words were shown before.
        assert capsys.readouterr().out == SHOWN
        questions.append(question)
        return same

    assert (
        keys.run(
            None,  # type: ignore[arg-type]  # nobody looks
            "verify",
            BOB,
            fingerprint="",
            confirm=confirm,
        )
        == code
    )
    assert questions == ["Does the other end show the same words? [y/N] "]
    assert [each.action for each in asked] == ["show", *["verify"] * same]


@pytest.mark.parametrize("action", ["reset-key", "block"])
async def test_a_person_can_decide_otherwise(path: Path, action: str) -> None:
    script = Script(NONE)
    code, _, err = await syncctl(script.answer, path, "peer", action, BOB)
    assert (code, err) == (0, "")
    assert script.asked == [PeerRequest(action=action, peer=BOB)]  # type: ignore[arg-type]  # two of them


async def test_a_peer_may_be_written_in_another_way_than_the_daemon_does(path: Path) -> None:
    shown = await syncctl(Script(KNOWN).answer, path, "peer", "show", "Bob@Example.org/desk")
    assert shown == (0, SHOWN, "")


@pytest.mark.parametrize("action", ["show", "rotate"])
async def test_our_own_key_is_shown_or_replaced(path: Path, action: str) -> None:
    script = Script(NONE)
    code, out, err = await syncctl(script.answer, path, "key", action)
    assert (code, out.splitlines()[0], err) == (0, "our own key: aa bb", "")
    assert len(out.splitlines()) == (2 if action == "rotate" else 1)
    assert script.asked == [KeyRequest(action=action)]  # type: ignore[arg-type]  # two of them
