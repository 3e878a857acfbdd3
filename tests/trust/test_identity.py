from __future__ import annotations

import os
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest

from syncd.errors import ConfigError
from syncd.trust.identity import FILE, load, rotate
from syncd.trust.signing import predecessors

if TYPE_CHECKING:
    from pathlib import Path

if TYPE_CHECKING:
    from pathlib import Path


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_the_first_start_makes_a_key_and_later_ones_read_it(tmp_path: Path) -> None:
    first = load(tmp_path)
    assert first.public == load(tmp_path).public
    assert names(tmp_path) == [FILE]


def test_it_is_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_two_daemons_have_two_keys(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert load(tmp_path / "a").public != load(tmp_path / "b").public


def test_another_tool_reads_it(tmp_path: Path) -> None:
    identity = load(tmp_path)
    public = subprocess.run(
        ["openssl", "pkey", "-in", tmp_path / FILE, "-pubout", "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    assert public.endswith(identity.public)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o666])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    load(tmp_path)
    (tmp_path / FILE).chmod(mode)
    with pytest.raises(
        ConfigError, match=f"others may read or change it.*{mode:04o}"
    ) as caught:
        load(tmp_path)
    assert f"chmod 600 {tmp_path / FILE}" in caught.value.hint
    with pytest.raises(ConfigError):
        rotate(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    load(tmp_path)
    os.chown(tmp_path / FILE, 12_345, -1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        load(tmp_path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    load(tmp_path)
    (tmp_path / "state" / FILE).symlink_to(tmp_path / FILE)
    with pytest.raises(ConfigError):
        load(tmp_path / "state")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE, 0o600)
    with pytest.raises(ConfigError, match="no file"):
        load(tmp_path)


def test_a_directory_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory") as caught:
        load(tmp_path / "missing")
    assert caught.value.hint


OTHER_KEY = """-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VuBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\0" * 200,
        b"x" * 1_000_000,
        OTHER_KEY.encode(),
        OTHER_KEY.replace("MC4C", "AAAA").encode(),
    ],
    ids=["empty", "garbage", "zeros", "huge", "x25519", "no key"],
)
def test_a_damaged_file_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    """A new key in its place would be a stop at every peer."""
    file = tmp_path / FILE
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="damaged") as caught:
        load(tmp_path)
    assert "backup" in caught.value.hint
    with pytest.raises(ConfigError):
        rotate(tmp_path)
    assert content == file.read_bytes()


def test_a_file_that_was_cut_is_damaged(tmp_path: Path) -> None:
    load(tmp_path)
    file = tmp_path / FILE
    whole = file.read_bytes()
    for end in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:end])
        with pytest.raises(ConfigError, match="damaged"):
            load(tmp_path)


def test_what_a_crash_left_behind_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".identity.new").write_bytes(b"half")
    load(tmp_path)
    assert names(tmp_path) == [FILE]


def test_the_key_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that cannot promise to keep it: nothing must look as if it did."""

    def refuse(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ConfigError, match="Input/output error"):
        load(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_key_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    theirs = load(tmp_path / "other")
    link = os.link

    def late(old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if not (tmp_path / FILE).exists():
            link(tmp_path / "other" / FILE, tmp_path / FILE)
        link(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "link", late)
    assert theirs.public == load(tmp_path).public


def test_a_rotation_is_proved_to_those_who_know_the_old_key(tmp_path: Path) -> None:
    first = load(tmp_path)
    second = rotate(tmp_path)
    third = rotate(tmp_path)
    found = load(tmp_path)
    assert third.public == found.public
    assert (first.public, second.public) == predecessors(found.public, found.successions)
    assert names(tmp_path) == [FILE]
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_a_rotation_that_fails_keeps_the_old_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ConfigError, match="No space left"):
        rotate(tmp_path)
    assert first.public == load(tmp_path).public


def test_there_must_be_a_key_to_replace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key to replace"):
        rotate(tmp_path)
    assert names(tmp_path) == []


def test_proofs_that_nobody_would_believe_are_damage(tmp_path: Path) -> None:
    load(tmp_path)
    rotate(tmp_path)
    file = tmp_path / FILE
    text = file.read_text()
    start = text.index("SUCCESSIONS-----\n") + 30
    file.write_text(text[:start] + ("A" if text[start] != "A" else "B") + text[start + 1 :])
    with pytest.raises(ConfigError, match="damaged"):
        load(tmp_path)
