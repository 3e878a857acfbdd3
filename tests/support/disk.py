"""Disks with faults."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Mount a file system of one MiB over a directory; skips the test if that cannot be."""
    if os.geteuid() != 0:
        pytest.skip("FULL DISK NOT TESTED: mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("FULL DISK NOT TESTED: this machine does not let root mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def make_room(directory: Path) -> None:
    """Let a small disk grow to 64 MiB."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(directory)], check=True)
