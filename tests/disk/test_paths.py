from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from syncd.disk import paths
from syncd.errors import DeclinedError, ErrorType, StanzaError
from syncd.xmpp.stanza import make_error
from tests.support.hostile import HARMLESS, REFUSED
from tests.support.peers import carried


@pytest.mark.parametrize("path", REFUSED, ids=ascii)
def test_hostile_paths_are_refused_for_good(path: str) -> None:
    with pytest.raises(DeclinedError) as caught:
        paths.split(path)
    assert caught.value.type == ErrorType.CANCEL


@pytest.mark.parametrize("path", REFUSED, ids=ascii)
def test_the_reason_can_be_sent_to_the_peer_whatever_the_path_holds(path: str) -> None:
    with pytest.raises(DeclinedError) as caught:
        paths.split(path)
    reason = str(caught.value)
    element = carried(make_error(StanzaError(ErrorType.CANCEL, "forbidden", reason)))
    assert reason.isprintable()
    assert len(element) == 2


@pytest.mark.parametrize("path", HARMLESS, ids=ascii)
def test_what_only_looks_dangerous_is_a_name_like_any_other(path: str) -> None:
    assert "/".join(paths.split(path)) == path


@pytest.mark.parametrize("portable", [False, True])
def test_paths_are_taken_as_they_are(portable: bool) -> None:
    """Two names that only look the same are two files at their sender, and stay two."""
    for path in ("e\u0301/A\u030a", "\u00e9/\u00c5"):
        assert paths.split(path, portable=portable) == tuple(path.split("/"))


def test_path_has_an_end() -> None:
    path = "/".join(["x" * 127] * 32)
    assert len(paths.split(path + "x")) == 32
    with pytest.raises(DeclinedError, match="more than 4096 bytes"):
        paths.split(path + "xx")


PORTABLE = [
    "a", "d/e/f.txt", ".hidden", " two  words", "ümläut 日本語 🎉.txt", "-rf", "100%41.txt",
    "it's.txt", "a&b;[c]{d}!$`", "console", "com", "com10", "lpt", "auxiliary.txt", "nul-1",
    "a.nul", "x" * 255, "..a", "a..b", "syncd", ".syncd2", "a/.syncd",
]  # fmt: skip


@pytest.mark.parametrize("path", PORTABLE, ids=ascii)
def test_what_every_system_can_hold_is_portable(path: str) -> None:
    assert "/".join(paths.split(path, portable=True)) == path


NOT_PORTABLE = [
    "a:b", "C:", "C:\\a", "a\\b", "a*", "?", 'a"b', "a<b", "a>b", "a|b", "d:e/f", "f/g?",
    "a.", "a ", "a. ", "d./f", "d /f", "...",
    "CON", "con", "PRN", "Aux", "nul", "NUL.txt", "nul.tar.gz", "nul .txt", "com0", "COM1.log",
    "lpt9", "LPT\u00b3", "conin$", "CONOUT$", "d/nul/f",
    ".SYNCD", ".Syncd/x", ".\u017fyncd",
]  # fmt: skip


@pytest.mark.parametrize("path", NOT_PORTABLE, ids=ascii)
def test_what_another_system_cannot_hold_is_refused_only_where_it_must_be(path: str) -> None:
    """The long s folds to s."""
    assert "/".join(paths.split(path)) == path
    with pytest.raises(DeclinedError) as caught:
        paths.split(path, portable=True)
    assert caught.value.type == ErrorType.CANCEL
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", REFUSED, ids=ascii)
def test_what_is_refused_is_portable_neither(path: str) -> None:
    with pytest.raises(DeclinedError):
        paths.split(path, portable=True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("readme", "README"),
        ("\u00e9", "e\u0301"),
        ("\u00c9", "e\u0301"),
        ("straße", "STRASSE"),
        ("\u212b", "a\u030a"),  # the sign of the angstrom
        ("ΌΣΟΣ", "όσος"),
    ],
)
def test_names_that_case_and_normalisation_tell_apart_are_one(one: str, other: str) -> None:
    assert paths.fold(one) == paths.fold(other)
    assert paths.fold(paths.fold(one)) == paths.fold(one)


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("a", "a "), ("e", "é"), ("1", "¹")])
def test_other_names_stay_two(one: str, other: str) -> None:
    assert paths.fold(one) != paths.fold(other)


any_text = st.text(st.characters(exclude_categories=[]), max_size=40)
likely = st.text(
    st.sampled_from("./\\~\0a\u0301é\u2024\uff0e\uff0f\ud800\x1b .syncd"), max_size=12
)


@settings(deadline=None)
@given(any_text | likely)
@example("/".join(["d"] * 65))
def test_whatever_passes_stays_below_the_folder(path: str) -> None:
    try:
        components = paths.split(path)
    except DeclinedError:
        return
    assert 0 < len(components) <= paths.MAX_DEPTH
    assert components[0] != paths.PRIVATE
    # Wherever a backslash separates as well, the path must stay below all the same.
    pieces = [piece for each in components for piece in each.split("\\")]
    assert [each for each in pieces if each in ("", ".", "..")] == []
    assert not {"/", "\0"} & {character for each in components for character in each}
    assert max(len(each.encode()) for each in components) <= paths.MAX_COMPONENT


@settings(deadline=None)
@given(any_text | likely)
def test_what_has_passed_passes_again_unchanged(path: str) -> None:
    """Both ends check, and must come to the same path."""
    try:
        components = paths.split(path)
    except DeclinedError:
        return
    assert paths.split("/".join(components)) == components
    assert "/".join(components) == path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test.txt", "test.txt"),
        ("/home/user/test.txt", "test.txt"),
        ("C:\\Users\\user\\test.txt", "test.txt"),
        ("a/b\\c", "c"),
        ("../../.bashrc", "bashrc"),
        (".ssh", "ssh"),
        ("...a", "a"),
        (" .\t. .a.b", "a.b"),
        ("\u2003.a", "a"),
        ("\x1b.a", "a"),
        ("  name \t", "name"),
        ("na\x1bme\n", "name"),
        ("na\ud800me", "name"),
        ("e\u0301", "é"),
        ("e\x1f\u0301", "é"),
        ("x" * 300, "x" * 255),
        ("é" * 300, "é" * 127),
        ("..", paths.UNNAMED),
        (".", paths.UNNAMED),
        ("", paths.UNNAMED),
        ("a/", paths.UNNAMED),
        ("\x01\x02", paths.UNNAMED),
        (".\x01.", paths.UNNAMED),
        (" .. ", paths.UNNAMED),
        (".syncd", "syncd"),
        ("x/.sy\0ncd", "syncd"),
    ],
)
def test_the_name_of_a_plain_client_is_reduced_to_a_file_name(name: str, expected: str) -> None:
    assert paths.last_component(name) == expected


@settings(deadline=None)
@given(any_text | likely | st.sampled_from(REFUSED + HARMLESS))
def test_every_name_of_a_plain_client_leads_to_one_that_is_taken(name: str) -> None:
    last = paths.last_component(name)
    assert paths.split(last) == (last,)
    assert unicodedata.is_normalized("NFC", last)
    assert not last.startswith(".")
