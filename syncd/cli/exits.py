"""What the exit codes mean, and which error leads to which."""

from __future__ import annotations

import enum

from syncd.errors import (
    AuthenticationError,
    ConfigError,
    ErrorType,
    LockedError,
    NotFoundError,
    NotRunningError,
    OfflineError,
    SyncdError,
)


class Exit(enum.IntEnum):
    """The exit codes; scripts rely on them, so they are added to, never changed."""

    OK = 0
    FAILED = 1
    USAGE = 2
    TIMEOUT = 3
    PENDING = 4
    AUTHENTICATION = 6
    UNREACHABLE = 7
    NOT_RUNNING = 8
    NOT_FOUND = 10
    LOCKED = 11
    CONFIG = 78  # EX_CONFIG of sysexits.h
    INTERRUPTED = 130  # what a shell shows for SIGINT: 128 + 2


MEANINGS = {
    Exit.OK: "done; with status: everything is delivered",
    Exit.FAILED: "failed; with wait: a person must act",
    Exit.USAGE: "the command line is wrong",
    Exit.TIMEOUT: "it took too long",
    Exit.PENDING: "status: something is pending, or a person must act",
    Exit.AUTHENTICATION: "the server does not accept the account's credentials",
    Exit.UNREACHABLE: "a peer or server cannot be reached",
    Exit.NOT_RUNNING: "syncd is not running",
    Exit.NOT_FOUND: "no such file, folder or peer",
    Exit.LOCKED: "another syncd already runs",
    Exit.CONFIG: "the configuration is wrong",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
}

# The first that fits.
_BY_ERROR: tuple[tuple[type[SyncdError], Exit], ...] = (
    (ConfigError, Exit.CONFIG),
    (NotRunningError, Exit.NOT_RUNNING),
    (LockedError, Exit.LOCKED),
    (NotFoundError, Exit.NOT_FOUND),
    (AuthenticationError, Exit.AUTHENTICATION),
    (OfflineError, Exit.UNREACHABLE),
)


def exit_for(error: SyncdError) -> Exit:
    """Find the exit code for an error that ends a program."""
    for kind, code in _BY_ERROR:
        if isinstance(error, kind):
            return code
    # Above all a daemon that does not answer: trying again later may help.
    return Exit.TIMEOUT if error.type is ErrorType.WAIT else Exit.FAILED
