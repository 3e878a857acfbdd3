from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from syncd.errors import ConfigError
from syncd.settings.password import MAX_PASSWORD, PasswordSource, choose_source
from syncd.settings.toml_keys import Report


@pytest.mark.parametrize(
    ("content", "password"),
    [
        ("s3cret", "s3cret"),
        ("s3cret\n", "s3cret"),
        ("s3cret\r\n", "s3cret"),
        (" with spaces \n", " with spaces "),
        ("p\xe4ssword\n", "p\xe4ssword"),
        ("x" * MAX_PASSWORD, "x" * MAX_PASSWORD),
    ],
)
def test_a_file_holds_the_password(tmp_path: Path, content: str, password: str) -> None:
    file = tmp_path / "password"
    file.write_bytes(content.encode())
    assert PasswordSource(file=file).read() == password


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"s3cret\nuser: alice\n", "has more than one line"),
        (b"s3cret\n\n", "has more than one line"),
        (b"s3\0cret\n", "has a NUL in it"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"x" * (MAX_PASSWORD + 1), "is longer than 4096 bytes: not a password"),
    ],
)
def test_what_is_no_password_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        PasswordSource(file=file).read()
    assert str(caught.value) == f"password_file {file} {what}"
    assert caught.value.hint == f"put the password, and nothing else, into {file}"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "password"
    with pytest.raises(ConfigError) as caught:
        PasswordSource(file=file).read()
    assert (
        str(caught.value) == f"password_file {file} cannot be read: No such file or directory"
    )


def test_a_missing_credential_tells_what_the_unit_lacks(tmp_path: Path) -> None:
    file = tmp_path / "password"
    with pytest.raises(ConfigError) as caught:
        PasswordSource(file=file, credential=True).read()
    assert str(caught.value) == (
        f"the systemd credential {file} cannot be read: No such file or directory"
    )
    assert caught.value.hint == (
        "give the service LoadCredential=password:/etc/syncd/password, "
        "or set password_file in [account]"
    )


def test_a_command_prints_the_password() -> None:
    assert PasswordSource(command=("printf", "%s\\n", "s3cret")).read() == "s3cret"


def test_a_command_runs_without_a_shell() -> None:
    assert PasswordSource(command=("echo", "$HOME; ls")).read() == "$HOME; ls"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("sh", "-c", "exit 3"), "password_command sh failed with exit status 3"),
        (("true",), "password_command true is empty"),
        (
            ("/nonexistent/pass", "x"),
            "password_command /nonexistent/pass cannot be started: No such file or directory",
        ),
    ],
)
def test_a_failing_command_is_named(command: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PasswordSource(command=command).read()
    assert str(caught.value) == message
    assert caught.value.hint != ""


def test_a_command_cannot_flood_us() -> None:
    """`yes` never ends: it is stopped as soon as it has printed too much."""
    with pytest.raises(ConfigError) as caught:
        PasswordSource(command=("yes",)).read()
    assert str(caught.value) == "password_command yes is longer than 4096 bytes: not a password"


@pytest.mark.parametrize("closing", ["", "exec >&-;"], ids=["silent", "output closed"])
def test_a_command_that_hangs_is_ended_with_its_children(tmp_path: Path, closing: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # The child holds the write end of a second pipe, whose end of file proves its death.
    child = f"{closing} sleep 1000 3>{fifo} & exec 3>{fifo}; wait"
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(ConfigError) as caught:
            PasswordSource(command=("sh", "-c", child)).read(time_limit=0.5)
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)
    assert str(caught.value) == "password_command sh did not answer within 0.5 seconds"


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (PasswordSource(inline="s3cret"), "<PasswordSource: password in the configuration>"),
        (
            PasswordSource(command=("pass", "s3cret")),
            "<PasswordSource: password_command pass>",
        ),
    ],
)
def test_the_secret_is_never_shown(source: PasswordSource, shown: str) -> None:
    assert repr(source) == shown
    assert str(source) == shown


def test_an_empty_inline_password_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        PasswordSource(inline="").read()
    assert str(caught.value) == "password in the configuration is empty"
    assert caught.value.hint == "correct password in [account]"


def test_an_inline_password_is_itself() -> None:
    assert PasswordSource(inline="s3cret").read() == "s3cret"


# --- Which source the configuration names


def chosen(text: str, environ: dict[str, str], **account: Any) -> tuple[PasswordSource, str]:
    """The source, and what was reported."""
    report = Report(where="c.toml", text=text)
    source = choose_source(report, account, environ)
    try:
        report.raise_if_any()
    except ConfigError as error:
        return source, str(error)
    return source, ""


@pytest.mark.parametrize(
    ("key", "value", "source"),
    [
        ("password", "s3cret", PasswordSource(inline="s3cret")),
        ("password_file", Path("/p"), PasswordSource(file=Path("/p"))),
        ("password_command", ("pass",), PasswordSource(command=("pass",))),
    ],
)
def test_a_key_goes_before_the_credential(
    key: str, value: object, source: PasswordSource
) -> None:
    text = f"[account]\n{key} = 1"
    environ = {"CREDENTIALS_DIRECTORY": "/run/credentials"}
    assert chosen(text, environ, **{key: value}) == (source, "")


def test_without_a_key_the_credential_is_taken() -> None:
    environ = {"CREDENTIALS_DIRECTORY": "/run/credentials"}
    source = PasswordSource(file=Path("/run/credentials/password"), credential=True)
    assert chosen("[account]", environ) == (source, "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "[account]",
            "c.toml:1: [account]: no password; set password_file or password_command, "
            'or give the service the systemd credential "password"',
        ),
        (
            "[account]\npassword = 1\npassword_file = 1",
            "c.toml:2: [account] password: password_file is given, too; keep one of them",
        ),
        ("", ""),  # that the whole table is missing is said elsewhere
        ("account = 1", ""),
    ],
)
def test_none_and_several_are_reported(text: str, problem: str) -> None:
    assert chosen(text, {}) == (PasswordSource(), problem)
