"""Fixtures of the tests of disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.disk import small_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of one MiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    with small_disk(folder):
        yield folder
