from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from syncd.control import lock
from syncd.errors import ControlError

if TYPE_CHECKING:
    from pathlib import Path


def test_who_has_it_is_known_until_it_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    assert lock.holder(path) is None

    fd = lock.take(path)

    assert fd is not None
    assert lock.holder(path) == os.getpid()
    assert lock.take(path) is None
    lock.release(fd, path)
    assert lock.holder(path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_lock_dies_with_its_process_and_is_free_again(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    code = (
        "import os, pathlib, sys; from syncd.control import lock;"
        "lock.take(pathlib.Path(sys.argv[1])); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert lock.lock_path(path).exists()

    assert lock.holder(path) is None
    fd = lock.take(path)

    assert fd is not None
    assert lock.holder(path) == os.getpid()
    lock.release(fd, path)


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    old = lock.take(path)
    assert old is not None
    lock.lock_path(path).unlink()
    assert not lock._is_at(old, lock.lock_path(path))

    new = lock.take(path)

    assert new is not None
    assert not lock._is_at(old, lock.lock_path(path))
    os.close(old)
    lock.release(new, path)


def test_a_holder_that_has_not_said_who_it_is(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    fd = lock.take(path)
    assert fd is not None
    os.ftruncate(fd, 0)

    assert lock.holder(path) == lock.UNKNOWN
    lock.release(fd, path)


def test_the_lock_file_is_not_followed_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    precious = tmp_path / "precious"
    precious.write_text("data")
    lock.lock_path(path).symlink_to(precious)

    with pytest.raises(OSError, match="symbolic links"):
        lock.take(path)
    assert precious.read_text() == "data"


def test_a_fifo_in_its_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    os.mkfifo(lock.lock_path(path))

    with pytest.raises(ControlError, match="not a file of ours"):
        lock.take(path)
