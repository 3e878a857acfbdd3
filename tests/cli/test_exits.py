from __future__ import annotations

import pytest

from syncd.cli.exits import MEANINGS, Exit, exit_for
from syncd.errors import (
    AuthenticationError,
    ConfigError,
    ControlError,
    ErrorType,
    JournalError,
    LockedError,
    NotFoundError,
    NotRunningError,
    OfflineError,
    StalledError,
    SyncdError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 78),
        (NotRunningError("no"), 8),
        (LockedError("no"), 11),
        (AuthenticationError("no"), 6),
        (OfflineError("no"), 7),
        (ControlError("hangs", type=ErrorType.WAIT), 3),
        (StalledError("no byte moved"), 3),
        (ControlError("not permitted", type=ErrorType.AUTH), 1),
        (JournalError("no"), 1),
        (NotFoundError("no"), 10),
    ],
)
def test_every_error_has_its_exit_code(error: SyncdError, code: int) -> None:
    assert exit_for(error) == code


def test_every_exit_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(Exit)
