"""The paths of the configuration: where they start, whether they overlap, what is there.

What lies in two folders would be sent twice, or sent back to where it came from: so folders,
the inbox and syncd's own state never share a file. Nor does what the configuration names for
syncd's own use lie where it would be sent to others, or where others could put theirs.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncd.errors import ConfigError
from syncd.settings.toml_keys import Place, Report, UnfitError

if TYPE_CHECKING:
    from syncd.config import Config

Access = Callable[[Path, int], bool]
"""`os.access`: whether this user may read (R_OK), write (W_OK) or enter (X_OK) a path."""

# unix(7): sun_path has 108 bytes, and ZeroMQ ends it with a NUL.
MAX_SOCKET_PATH = 107  # bytes

OTHERS = stat.S_IRGRP | stat.S_IROTH
"""Mode bits of a file that somebody else may read."""

# What systemd/syncd.service uses.
SYSTEM_CONFIG = Path("/etc/syncd/config.toml")
SYSTEM_SOCKET = Path("/run/syncd/control.sock")


def resolver(base: Path, environ: Mapping[str, str]) -> Callable[[Path], Path]:
    """Make what turns a path of the file into an absolute one.

    Args:
      base: Where relative paths start, absolute.
      environ: Has HOME, which replaces ``~`` and ``$HOME`` at the beginning.
    """

    def resolve(path: Path) -> Path:
        first, *rest = path.parts or (".",)
        if first in ("~", "$HOME", "${HOME}"):
            if home := home_directory(environ):
                return Path(home, *rest)
            raise UnfitError(f"{first} cannot be replaced: HOME is not set")
        if first.startswith(("~", "$")):
            raise UnfitError(f"{first} is not replaced: only ~ and $HOME are, at the beginning")
        return base / path

    return resolve


def home_directory(environ: Mapping[str, str]) -> Path | None:
    """The user's home, if the environment names one."""
    home = Path(environ.get("HOME", ""))
    return home if home.is_absolute() else None


def check_socket(report: Report, socket: Path | None) -> None:
    """Report a control socket that the kernel would refuse."""
    if socket and (length := len(os.fsencode(socket))) > MAX_SOCKET_PATH:
        report.problem(
            ("control", "socket"),
            f"{socket} has {length} bytes, but a Unix socket's path at most "
            f"{MAX_SOCKET_PATH}: choose a shorter one",
        )


def check_overlaps(
    report: Report,
    folders: Sequence[Mapping[str, Any]],
    inbox: Mapping[str, Any] | None,
    state_dir: Path | None,
) -> None:
    """Report what lies in something else, symbolic links followed; paths may be missing."""
    named: list[tuple[str, Place, Path | None]] = [
        (f"folder {index + 1}", ("folder", index, "path"), folder.get("path"))
        for index, folder in enumerate(folders)
    ]
    named.append(("the inbox", ("inbox", "path"), inbox.get("path") if inbox else None))
    state = Path(os.path.realpath(state_dir)) if state_dir else None
    seen: list[tuple[str, Path]] = []
    for name, place, given in named:
        if given is None:
            continue
        real = Path(os.path.realpath(given))
        for other, theirs in seen:
            if real == theirs:
                report.problem(place, f"{given} is the path of {other}, too")
            elif real.is_relative_to(theirs):
                report.problem(place, f"{given} lies inside {other}, {theirs}")
            elif theirs.is_relative_to(real):
                report.problem(place, f"{other}, {theirs}, lies inside {given}")
        if state and state.is_relative_to(real):
            report.problem(
                place,
                f"syncd's own state, {state}, lies inside {given}; "
                "set dir in [state] to a place outside",
            )
        seen.append((name, real))


def check_secrets(
    report: Report,
    folders: Sequence[Mapping[str, Any]],
    account: Mapping[str, Any],
    file: Path,
    socket: Path | None,
) -> list[str]:
    """Report what is syncd's own, or secret, and lies where it is sent, or can be replaced.

    A peer may replace what it sent itself, and in a folder that also sends, what it got from
    us. Who can write the configuration can have syncd run commands (password_command); who can
    write ca_file chooses whom it trusts.

    Args:
      report: Takes what is wrong.
      folders: Values of the tables ``[[folder]]``.
      account: Values of the table ``[account]``.
      file: The configuration.
      socket: The control socket, if it is known where.

    Returns:
      Warnings: what is public, and may have been put there on purpose.
    """
    warnings: list[str] = []
    # What it is, where it stands in the configuration, where it lies, whether it is secret.
    named: list[tuple[str, Place | None, Path | None, bool]] = [
        ("the password", ("account", "password_file"), account.get("password_file"), True),
        ("ca_file", ("account", "ca_file"), account.get("ca_file"), False),
        ("this configuration", None, file.absolute(), bool(account.get("password"))),
        ("the control socket", ("control", "socket"), socket and socket.parent, True),
    ]
    for index, folder in enumerate(folders):
        if (path := folder.get("path")) is None:
            continue
        real = Path(os.path.realpath(path))
        takes = bool(folder.get("accept_from"))
        # The first is as bad, and easier to see.
        where = "which is sent to others"
        if not folder.get("send_to"):
            where = "where others could put theirs"
        for what, place, lies, secret in named:
            if lies is None or not Path(os.path.realpath(lies)).is_relative_to(real):
                continue
            place = place or ("folder", index, "path")
            sentence = f"{what}, {lies}, lies inside folder {index + 1}, {path}, {where}"
            if secret or takes:
                report.problem(place, f"{sentence}; move it out of there")
            else:
                warnings.append(f"{report.at(place)}: {sentence}; better move it out of there")
    return warnings


def decide_hidden(
    report: Report, folders: Sequence[dict[str, Any]], environ: Mapping[str, str]
) -> list[str]:
    """Decide for each folder without ``accept_hidden`` whether it takes hidden files.

    They do no harm in a folder of one's own (``.gitignore``), but in a home directory they are
    what programs obey: ``.bashrc``, ``.ssh/authorized_keys``.

    Args:
      report: Holds the file.
      folders: Values of the tables ``[[folder]]``, which get the missing ones.
      environ: Has HOME.

    Returns:
      Warnings about folders whose user may expect something else.
    """
    warnings = []
    for index, folder in enumerate(folders):
        if folder.get("accept_hidden") is not None:
            continue
        path = folder.get("path")
        folder["accept_hidden"] = path is None or not _is_home(path, environ)
        if not folder["accept_hidden"] and folder.get("accept_from"):
            warnings.append(
                f"{report.at(('folder', index, 'path'))}: {path} is a home directory, or holds "
                "one, so names that begin with a dot are refused from others there; "
                "set accept_hidden to true to take them, or to false to leave it at that"
            )
    return warnings


def _is_home(folder: Path, environ: Mapping[str, str]) -> bool:
    """Whether a folder is, or contains, the home of our user or of its owner."""
    homes = [home_directory(environ)]
    with contextlib.suppress(OSError, KeyError):  # nothing there yet, or nobody's
        homes.append(Path(pwd.getpwuid(folder.stat().st_uid).pw_dir))
    real = os.path.realpath(folder)
    return any(home and Path(os.path.realpath(home)).is_relative_to(real) for home in homes)


def check_paths(
    config: Config, *, where: str, text: str = "", access: Access = os.access
) -> tuple[str, ...]:
    """Look whether what the configuration names is there and may be used; blocks.

    Args:
      config: What `syncd.config.parse` made.
      where: Name of the file, for messages.
      text: What `parse` was given; for the lines in messages.
      access: Looks at permissions.

    Returns:
      Warnings, a sentence each.

    Raises:
      ConfigError: Something is missing; the message has one line for each.
    """
    report = Report(where=where, text=text)
    for index, folder in enumerate(config.folders):
        faults = _directory_faults(folder.path, writes=bool(folder.accept_from), access=access)
        report.problem(("folder", index, "path"), *faults)
    if config.inbox:
        faults = _directory_faults(config.inbox.path, writes=True, access=access)
        report.problem(("inbox", "path"), *faults)
    ca_file = config.account.ca_file
    if ca_file and not (ca_file.is_file() and access(ca_file, os.R_OK)):
        report.problem(("account", "ca_file"), f"{ca_file} is not a file that syncd may read")
    warnings = []
    password = config.account.password
    if password.file and not password.credential:
        place = ("account", "password_file")
        try:
            mode = password.file.stat().st_mode
        except OSError as error:
            report.problem(place, f"{password.file}: {error.strerror}")
        else:
            if mode & OTHERS:
                quoted = shlex.quote(str(password.file))
                warnings.append(f"{report.at(place)}: others may read it; chmod 600 {quoted}")
    report.raise_if_any()
    return tuple(warnings)


def _directory_faults(path: Path, *, writes: bool, access: Access) -> list[str]:
    quoted = shlex.quote(str(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return [f"{path} does not exist; create it: mkdir -p {quoted}"]
    except OSError as error:
        return [f"{path} cannot be looked at: {error.strerror}"]
    if not stat.S_ISDIR(mode):
        return [f"{path} is not a directory"]
    if not access(path, os.R_OK | os.X_OK):
        return [f"syncd may not read {path}; see: ls -ld {quoted}"]
    if writes and not access(path, os.W_OK):
        return [
            f"syncd may not write into {path}; see: ls -ld {quoted} "
            f"(the system service also needs ReadWritePaths={path})"
        ]
    return []


# --- Defaults that depend on where we run


def default_config_paths(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """Where a configuration is looked for, best first: the user's own, the machine's."""
    own = _xdg(environ, "XDG_CONFIG_HOME", ".config")
    return (own / "syncd" / "config.toml", SYSTEM_CONFIG) if own else (SYSTEM_CONFIG,)


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Where state is kept: $STATE_DIRECTORY of systemd, else the XDG state home.

    Raises:
      ConfigError: Neither is known.
    """
    # systemd.exec(5): a list with colons when the unit names several.
    if directory := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(directory)
    if own := _xdg(environ, "XDG_STATE_HOME", ".local/state"):
        return own / "syncd"
    raise ConfigError("no default is known: HOME is not set")


def default_socket(environ: Mapping[str, str]) -> Path:
    """Where the control socket is: $RUNTIME_DIRECTORY, else the XDG runtime directory.

    Without either it is in the state directory, which is as private.

    Raises:
      ConfigError: That is not known either.
    """
    if directory := environ.get("RUNTIME_DIRECTORY", "").split(":")[0]:
        return Path(directory, "control.sock")
    # A cron job lacks the variable; it is to find the daemon of the session all the same.
    runtime = Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    if runtime.is_absolute() and runtime.is_dir():
        return runtime / "syncd" / "control.sock"
    return default_state_dir(environ) / "control.sock"


def likely_socket(environ: Mapping[str, str], *, system: Path = SYSTEM_SOCKET) -> Path:
    """Where a daemon probably listens: the user's own, or else the system service.

    Args:
      environ: The environment.
      system: The system service's socket.

    Raises:
      ConfigError: There is no system service, and no home either.
    """
    # Its directory exists only while it runs, and is all that another user can see.
    if not system.parent.is_dir():
        return default_socket(environ)
    with contextlib.suppress(ConfigError):
        if os.path.lexists(own := default_socket(environ)):
            return own
    return system


def _xdg(environ: Mapping[str, str], variable: str, below_home: str) -> Path | None:
    # XDG Base Directory Specification: a relative path is invalid and is ignored.
    directory = Path(environ.get(variable, ""))
    if directory.is_absolute():
        return directory
    home = home_directory(environ)
    return home / below_home if home else None
