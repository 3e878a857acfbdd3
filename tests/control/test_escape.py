from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.control.escape import printable, printable_lines, well_formed

# Lone surrogates included: that is how Python holds a file name that is no UTF-8.
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT)
def test_nothing_that_acts_on_a_terminal_or_a_line_is_left(text: str) -> None:
    """No control, format (bidi included), surrogate, private or line-breaking character."""
    shown = printable(text)

    left = {char for char in shown if unicodedata.category(char) in {"Zl", "Zp"}}
    left |= {char for char in shown if unicodedata.category(char).startswith("C")}
    assert left == set()
    assert len(shown.splitlines()) <= 1


@given(ANY_TEXT)
def test_a_second_pass_changes_nothing(text: str) -> None:
    assert printable(printable(text)) == printable(text)


@given(ANY_TEXT)
def test_shown_text_can_be_encoded(text: str) -> None:
    assert printable(text).encode().decode() == printable(text)
    assert well_formed(text).encode().decode() == well_formed(text)


@given(st.text())
def test_proper_text_is_well_formed_already(text: str) -> None:
    assert well_formed(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünïcode 写真 🎉", "plain, ünïcode 写真 🎉"),
        ("two\nlines\r\n\tand a tab", r"two\nlines\r\n\tand a tab"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("\x7f\x80\x9b31m", r"\x7f\x80\x9b31m"),
        ("exe.\u202egpj", r"exe.\u202egpj"),
        ("a\u2028b\u2029c\u200bd", r"a\u2028b\u2029c\u200bd"),
        ("tag \U000e0041", r"tag \U000e0041"),
        (b"caf\xe9.txt".decode(errors="surrogateescape"), r"caf\xe9.txt"),
        ("full\u3000width", "full\u3000width"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_of_our_own_stay_lines() -> None:
    assert printable_lines("two\nlines\r\x1b") == "two\nlines\\r\\x1b"
