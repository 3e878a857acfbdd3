from __future__ import annotations

from syncd.sync.limits import Limits, Rates

BOB, CAROL = "bob@example.org", "carol@example.org"


def limits() -> tuple[Limits, list[tuple[str, Rates]]]:
    told: list[tuple[str, Rates]] = []
    made = Limits(
        Rates(up=1000), {BOB: Rates(down=500)}, lambda peer, rates: told.append((peer, rates))
    )
    return made, told


def test_what_is_configured_holds() -> None:
    made, told = limits()
    assert made.of() == Rates(up=1000, down=0)
    assert made.of(BOB) == Rates(up=0, down=500)
    assert made.of(CAROL) == Rates()
    assert told == []


def test_a_change_leaves_what_it_does_not_name() -> None:
    made, told = limits()
    assert made.set(up=2000) == Rates(up=2000, down=0)
    assert made.set(BOB, up=7) == Rates(up=7, down=500)
    assert made.set(CAROL, down=9) == Rates(down=9)
    assert (made.of(), made.of(BOB)) == (Rates(up=2000), Rates(up=7, down=500))
    assert told == [
        ("", Rates(up=2000)),
        (BOB, Rates(up=7, down=500)),
        (CAROL, Rates(down=9)),
    ]


def test_a_limit_can_be_lifted() -> None:
    made, told = limits()
    assert made.set(up=0) == Rates()
    assert told == [("", Rates())]


def test_what_is_set_as_it_is_tells_nobody() -> None:
    made, told = limits()
    assert made.set(up=1000, down=0) == Rates(up=1000)
    assert made.set(BOB) == Rates(down=500)
    assert made.set(CAROL) == Rates()
    assert told == []
