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


def test_paths_are_normalised_before_they_are_taken_apart() -> None:
    """What one system writes as two code points, another may write as one."""
    assert paths.split("e\u0301/A\u030a") == ("\u00e9", "\u00c5")


def test_a_name_that_is_too_long_only_before_it_is_normalised_is_taken() -> None:
    assert paths.split("e\u0301" * 127) == ("\u00e9" * 127,)


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
    assert unicodedata.is_normalized("NFC", "/".join(components))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test.txt", "test.txt"),
        ("/home/user/test.txt", "test.txt"),
        ("C:\\Users\\user\\test.txt", "test.txt"),
        ("a/b\\c", "c"),
        ("../../.bashrc", ".bashrc"),
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
        (".syncd", paths.UNNAMED),
        ("x/.sy\0ncd", paths.UNNAMED),
    ],
)
def test_the_name_of_a_plain_client_is_reduced_to_a_file_name(name: str, expected: str) -> None:
    assert paths.last_component(name) == expected


@settings(deadline=None)
@given(any_text | likely | st.sampled_from(REFUSED + HARMLESS))
def test_every_name_of_a_plain_client_leads_to_one_that_is_taken(name: str) -> None:
    last = paths.last_component(name)
    assert paths.split(last) == (last,)
