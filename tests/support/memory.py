"""How much memory a process has."""

from __future__ import annotations

import os
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


def resident(pid: int | None = None) -> int:
    """Bytes in memory now, of this process unless another is named."""
    statm = Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="ascii")
    return int(statm.split()[1]) * _PAGE
