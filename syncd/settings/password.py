"""Where the account's password comes from; it is read when it is needed and never kept.

Best first: the systemd credential ``password``, a command (a password manager), a file of
mode 600, and the configuration itself, which warns.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from syncd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from syncd.settings.toml_keys import Report

KEYS = ("password_file", "password_command", "password")
"""The keys that exclude each other, best first."""

# Far above any password, far below what would hurt; a wrong file or command is noticed.
MAX_PASSWORD = 4096  # bytes

# A password manager may ask its agent; a human at a prompt is not expected of a daemon.
COMMAND_TIME_LIMIT = 30.0  # seconds


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class PasswordSource:
    """The one place that the configuration names; exactly one of the first three is set.

    Attributes:
      file: A file that holds the password and nothing else.
      command: A program and its arguments that print the password.
      inline: The password itself.
      credential: The file is the systemd credential ``password``.
    """

    file: Path | None = None
    command: tuple[str, ...] = ()
    inline: str | None = None
    credential: bool = False

    def __repr__(self) -> str:
        return f"<PasswordSource: {self.origin}>"

    @property
    def origin(self) -> str:
        """The place in words, without anything secret: arguments may be."""
        if self.inline is not None:
            return "password in the configuration"
        if self.command:
            return f"password_command {self.command[0]}"
        return f"{'the systemd credential' if self.credential else 'password_file'} {self.file}"

    def read(self, *, time_limit: float = COMMAND_TIME_LIMIT) -> str:
        """Fetch the password; blocks, so call it in a worker thread.

        Args:
          time_limit: How long a command may take, in seconds.

        Returns:
          The password, without the newline that ends it.

        Raises:
          ConfigError: There is none, or not one that can be used.
        """
        if self.inline is not None:
            data = self.inline.encode()
        elif self.command:
            data = self._output(time_limit)
        else:
            data = self._content()
        return self._checked(data)

    def _content(self) -> bytes:
        assert self.file is not None
        try:
            with self.file.open("rb") as file:
                return file.read(MAX_PASSWORD + 1)
        except OSError as error:
            raise ConfigError(
                f"{self.origin} cannot be read: {error.strerror}", hint=self._hint()
            ) from error

    def _output(self, time_limit: float) -> bytes:
        try:
            # Its own session: the time limit then ends what the command has started, too.
            # Its error output is left to go where the daemon's goes.
            process = subprocess.Popen(  # noqa: S603 - an argument list from the user's own file
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(
                f"{self.origin} cannot be started: {error.strerror}", hint=self._hint()
            ) from error
        deadline = time.monotonic() + time_limit
        with process:
            assert process.stdout is not None
            try:
                data = _read_all(process.stdout, deadline)
                if len(data) > MAX_PASSWORD:
                    return data  # refused by the caller; it may never end by itself
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except (TimeoutError, subprocess.TimeoutExpired):
                raise ConfigError(
                    f"{self.origin} did not answer within {time_limit:g} seconds",
                    hint="it must print the password without asking anybody",
                ) from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if status != 0:
            raise ConfigError(
                f"{self.origin} failed with exit status {status}",
                hint="run it by hand as the user that syncd runs as",
            )
        return data

    def _checked(self, data: bytes) -> str:
        if len(data) > MAX_PASSWORD:
            raise ConfigError(
                f"{self.origin} is longer than {MAX_PASSWORD} bytes: not a password",
                hint=self._hint(),
            )
        try:
            password = data.decode()
        except UnicodeDecodeError:
            raise ConfigError(f"{self.origin} is not UTF-8 text", hint=self._hint()) from None
        password = password.removesuffix("\n").removesuffix("\r")
        if not password:
            raise ConfigError(f"{self.origin} is empty", hint=self._hint())
        if "\n" in password:
            raise ConfigError(f"{self.origin} has more than one line", hint=self._hint())
        if "\0" in password:  # it ends the fields of SASL PLAIN, RFC 4616 section 2
            raise ConfigError(f"{self.origin} has a NUL in it", hint=self._hint())
        return password

    def _hint(self) -> str:
        if self.inline is not None:
            return "correct password in [account]"
        if self.command:
            return "correct password_command in [account]: it prints the password, nothing else"
        if self.credential:
            return (
                "give the service LoadCredential=password:/etc/syncd/password, "
                "or set password_file in [account]"
            )
        return f"put the password, and nothing else, into {self.file}"


def choose_source(
    report: Report, account: Mapping[str, Any], environ: Mapping[str, str]
) -> PasswordSource:
    """Find the one source that the configuration names, and report none or several.

    Args:
      report: Holds the file, and takes what is wrong.
      account: Values of the table ``[account]``, without those that are wrong.
      environ: Names the directory of systemd's credentials, which is used when no key is given.
    """
    written = report.data.get("account")
    named = [key for key in KEYS if isinstance(written, dict) and key in written]
    for other in named[1:]:
        report.problem(("account", other), f"{named[0]} is given, too; keep one of them")
    if not named:
        if directory := environ.get("CREDENTIALS_DIRECTORY"):
            return PasswordSource(file=Path(directory, "password"), credential=True)
        if isinstance(written, dict):
            report.problem(
                ("account",),
                "no password; set password_file or password_command, "
                'or give the service the systemd credential "password"',
            )
    return PasswordSource(
        file=account.get("password_file"),
        command=account.get("password_command") or (),
        inline=account.get("password"),
    )


def _read_all(stream: IO[bytes], deadline: float) -> bytes:
    """Read to the end, or to just beyond `MAX_PASSWORD`.

    Raises:
      TimeoutError: The deadline passed first.
    """
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while len(data) <= MAX_PASSWORD:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            chunk = os.read(stream.fileno(), MAX_PASSWORD + 1 - len(data))
            if not chunk:
                break
            data += chunk
    return bytes(data)
