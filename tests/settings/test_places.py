from __future__ import annotations

import os
import pwd
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from syncd import config
from syncd.errors import ConfigError
from syncd.settings import places
from syncd.settings.password import PasswordSource
from syncd.settings.toml_keys import Report, UnfitError

if TYPE_CHECKING:
    from syncd.config import Config


# --- Where a path starts


@pytest.mark.parametrize(
    ("path", "absolute"),
    [
        ("/srv/x", "/srv/x"),
        ("x/y", "/etc/syncd/x/y"),
        (".", "/etc/syncd"),
        ("~", "/home/alice"),
        ("~/x", "/home/alice/x"),
        ("$HOME/x", "/home/alice/x"),
        ("${HOME}/x", "/home/alice/x"),
        ("x/~", "/etc/syncd/x/~"),
        ("/srv/$HOME", "/srv/$HOME"),
    ],
)
def test_a_path_becomes_absolute(path: str, absolute: str) -> None:
    resolve = places.resolver(Path("/etc/syncd"), {"HOME": "/home/alice"})
    assert resolve(Path(path)) == Path(absolute)


@pytest.mark.parametrize(
    ("path", "environ", "sentence"),
    [
        ("~/x", {}, "~ cannot be replaced: HOME is not set"),
        ("$HOME", {"HOME": ""}, "$HOME cannot be replaced: HOME is not set"),
        ("~bob/x", {}, "~bob is not replaced: only ~ and $HOME are, at the beginning"),
        ("$DATA/x", {}, "$DATA is not replaced: only ~ and $HOME are, at the beginning"),
    ],
)
def test_what_cannot_be_replaced_is_refused(
    path: str, environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UnfitError) as caught:
        places.resolver(Path("/etc/syncd"), environ)(Path(path))
    assert caught.value.args == (sentence,)


# --- What is syncd's own


def secrets(
    tmp_path: Path,
    *shares: str,
    account: dict[str, object] | None = None,
    file: str = "c.toml",
    socket: str = "",
) -> tuple[list[str], list[str]]:
    """What is refused, and what is warned of, in a folder ``shared``."""
    report = Report(where="c.toml", text="")
    (tmp_path / "shared").mkdir(exist_ok=True)
    folder = {
        "path": tmp_path / "shared",
        "send_to": ("bob",) if "send_to" in shares else (),
        "accept_from": ("bob",) if "accept_from" in shares else (),
    }
    warnings = places.check_secrets(
        report,
        [{}, folder],
        account or {},
        tmp_path / file,
        tmp_path / socket if socket else None,
    )
    try:
        report.raise_if_any()
    except ConfigError as error:
        return str(error).split("\n"), warnings
    return [], warnings


SHARES = [("send_to",), ("accept_from",), ("send_to", "accept_from")]


@pytest.mark.parametrize("shares", SHARES)
def test_what_lies_outside_is_nobodys_but_ours(tmp_path: Path, shares: tuple[str, ...]) -> None:
    account: dict[str, object] = {
        "password_file": tmp_path / "shared-not",
        "ca_file": Path("/etc/ca.pem"),
    }
    assert secrets(tmp_path, *shares, account=account, socket="run/c.sock") == ([], [])


@pytest.mark.parametrize("shares", SHARES)
def test_a_password_is_never_shared(tmp_path: Path, shares: tuple[str, ...]) -> None:
    """Also by a folder that a link leads to, and in the configuration itself."""
    (tmp_path / "link").symlink_to("shared")
    [refused], warnings = secrets(
        tmp_path, *shares, account={"password_file": tmp_path / "link" / "x" / "password"}
    )
    does = "which is sent to others" if "send_to" in shares else "where others could put theirs"
    assert refused == (
        f"c.toml: [account] password_file: the password, {tmp_path}/link/x/password, lies "
        f"inside folder 2, {tmp_path}/shared, {does}; move it out of there"
    )
    assert warnings == []
    [refused], _ = secrets(
        tmp_path, *shares, account={"password": "secret"}, file="shared/c.toml"
    )
    assert refused.startswith("c.toml: [folder 2] path: this configuration, ")


@pytest.mark.parametrize("shares", SHARES)
def test_the_control_socket_is_never_shared(tmp_path: Path, shares: tuple[str, ...]) -> None:
    [refused], _ = secrets(tmp_path, *shares, socket="shared/run/c.sock")
    assert refused.startswith("c.toml: [control] socket: the control socket, ")


def test_what_is_public_may_be_sent_but_not_be_replaced(tmp_path: Path) -> None:
    """By whom it names commands to, and by whom it is to trust."""

    def public(*shares: str) -> tuple[list[str], list[str]]:
        account: dict[str, object] = {"ca_file": tmp_path / "shared" / "ca"}
        return secrets(tmp_path, *shares, account=account, file="shared/c.toml")

    refused, warnings = public("send_to")
    assert refused == []
    assert [warning.split(",")[0] for warning in warnings] == [
        "c.toml: [account] ca_file: ca_file",
        "c.toml: [folder 2] path: this configuration",
    ]
    assert all(warning.endswith("; better move it out of there") for warning in warnings)
    for shares in SHARES[1:]:
        refused, warnings = public(*shares)
        assert (len(refused), warnings) == (2, [])


# --- Hidden files


def hidden(folder: dict[str, object], home: Path | str = "/nowhere") -> tuple[object, int]:
    """What is decided for a folder, and how many warnings there are."""
    report = Report(where="c.toml", text="")
    warnings = places.decide_hidden(report, [folder], {"HOME": str(home)})
    return folder["accept_hidden"], len(warnings)


def test_hidden_files_are_taken_but_not_into_a_home(tmp_path: Path) -> None:
    home = tmp_path / "home" / "alice"
    (home / "photos").mkdir(parents=True)
    (tmp_path / "link").symlink_to("home")
    taking: dict[str, object] = {"accept_from": ("bob",)}
    assert hidden({"path": home / "photos", **taking}, home) == (True, 0)
    for path in (home, home.parent, tmp_path / "link" / "alice", Path("/")):
        assert hidden({"path": path, **taking}, home) == (False, 1)
        # Who takes nothing expects nothing.
        assert hidden({"path": path, "accept_from": ()}, home) == (False, 0)
    assert hidden({"path": tmp_path / "missing", **taking}, home) == (True, 0)
    assert hidden(dict(taking), home) == (True, 0)


@pytest.mark.parametrize("decision", [True, False])
def test_who_decides_about_hidden_files_is_not_asked(tmp_path: Path, decision: bool) -> None:
    folder: dict[str, object] = {
        "path": tmp_path, "accept_from": ("bob",), "accept_hidden": decision,
    }  # fmt: skip
    assert hidden(folder, tmp_path) == (decision, 0)


def test_the_home_of_somebody_else_is_one_too() -> None:
    """A service has another home than whose folder it is."""
    owner = Path(pwd.getpwuid(os.getuid()).pw_dir)
    if not owner.is_dir() or owner.stat().st_uid != os.getuid():
        pytest.skip("NO HOME: whoever runs this has none")
    assert hidden({"path": owner, "accept_from": ("bob",)}) == (False, 1)


# --- What must not overlap


def overlaps(
    *folders: Path | None, inbox: Path | None = None, state: Path | None = None
) -> list[str]:
    report = Report(where="c.toml", text="")
    places.check_overlaps(
        report,
        [{} if folder is None else {"path": folder} for folder in folders],
        {"path": inbox} if inbox else None,
        state,
    )
    try:
        report.raise_if_any()
    except ConfigError as error:
        return str(error).split("\n")
    return []


def test_neighbours_do_not_overlap() -> None:
    folders = [Path("/srv/a"), Path("/srv/ab"), None, Path("/srv/b")]
    assert overlaps(*folders, inbox=Path("/srv/inbox"), state=Path("/srv/state")) == []


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        ("/srv/a", "/srv/a", "/srv/a is the path of folder 1, too"),
        ("/srv/a", "/srv/b/../a", "/srv/b/../a is the path of folder 1, too"),
        ("/srv/a", "/srv/a/b/c", "/srv/a/b/c lies inside folder 1, /srv/a"),
        ("/srv/a/b", "/srv/a", "folder 1, /srv/a/b, lies inside /srv/a"),
    ],
)
def test_folders_may_not_overlap(first: str, second: str, sentence: str) -> None:
    assert overlaps(Path(first), Path(second)) == [f"c.toml: [folder 2] path: {sentence}"]


def test_a_symbolic_link_does_not_hide_an_overlap(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert overlaps(tmp_path / "real", tmp_path / "link" / "x") == [
        f"c.toml: [folder 2] path: {tmp_path}/link/x lies inside folder 1, {tmp_path}/real"
    ]


def test_the_inbox_may_not_lie_in_a_folder() -> None:
    assert overlaps(Path("/srv/a"), inbox=Path("/srv/a/in")) == [
        "c.toml: [inbox] path: /srv/a/in lies inside folder 1, /srv/a"
    ]


def test_the_state_may_not_lie_in_a_folder_but_around_it() -> None:
    assert overlaps(Path("/home/a"), state=Path("/home/a/.local/state/syncd")) == [
        "c.toml: [folder 1] path: syncd's own state, /home/a/.local/state/syncd, lies inside "
        "/home/a; set dir in [state] to a place outside"
    ]
    assert overlaps(Path("/home/a/x"), state=Path("/home/a")) == []


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
def test_a_socket_has_at_most_107_bytes(length: int, fits: bool) -> None:
    report = Report(where="c.toml", text="")
    socket = Path("/" + "\xe9" * ((length - 1) // 2) + "x" * ((length - 1) % 2))
    places.check_socket(report, socket)
    if fits:
        report.raise_if_any()
    else:
        with pytest.raises(
            ConfigError, match="has 108 bytes, but a Unix socket's path at most"
        ):
            report.raise_if_any()
    assert len(os.fsencode(socket)) == length


# --- What is there


@pytest.fixture
def loaded(tmp_path: Path) -> Config:
    """A configuration whose paths are all there."""
    for directory in ("sent", "received", "inbox"):
        (tmp_path / directory).mkdir()
    for file in ("password", "ca.pem"):
        (tmp_path / file).touch(0o600)
    return config.parse(
        """
        [account]
        jid = "alice@example.org"
        password_file = "password"
        ca_file = "ca.pem"
        [state]
        dir = "state"
        [control]
        socket = "/run/s"
        [[folder]]
        id = "sent"
        path = "sent"
        send_to = ["bob@example.org"]
        [[folder]]
        id = "received"
        path = "received"
        accept_from = ["bob@example.org"]
        [inbox]
        path = "inbox"
        accept_from = ["dave@example.org"]
        """,
        where=str(tmp_path / "c.toml"),
        environ={},
    )


def test_what_is_not_named_is_not_looked_for(loaded: Config) -> None:
    account = replace(
        loaded.account, ca_file=None, password=PasswordSource(file=Path("/x"), credential=True)
    )
    least = replace(loaded, account=account, folders=(), inbox=None)
    assert places.check_paths(least, where="c.toml") == ()


def faults(loaded: Config, access: places.Access = os.access) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        places.check_paths(loaded, where="c.toml", access=access)
    return str(caught.value).split("\n")


def test_nothing_is_wrong_when_everything_is_there(loaded: Config) -> None:
    assert places.check_paths(loaded, where="c.toml") == ()


def test_everything_missing_is_told_at_once(loaded: Config, tmp_path: Path) -> None:
    for directory in ("sent", "received", "inbox"):
        (tmp_path / directory).rmdir()
    for file in ("password", "ca.pem"):
        (tmp_path / file).unlink()
    root = str(tmp_path)
    assert faults(loaded) == [
        f"c.toml: [folder 1] path: {root}/sent does not exist; create it: mkdir -p {root}/sent",
        f"c.toml: [folder 2] path: {root}/received does not exist; "
        f"create it: mkdir -p {root}/received",
        f"c.toml: [inbox] path: {root}/inbox does not exist; create it: mkdir -p {root}/inbox",
        f"c.toml: [account] ca_file: {root}/ca.pem is not a file that syncd may read",
        f"c.toml: [account] password_file: {root}/password: No such file or directory",
    ]


def test_a_file_is_no_folder(loaded: Config, tmp_path: Path) -> None:
    (tmp_path / "sent").rmdir()
    (tmp_path / "sent").touch()
    assert faults(loaded) == [f"c.toml: [folder 1] path: {tmp_path}/sent is not a directory"]


def test_a_folder_behind_a_file_cannot_be_looked_at(loaded: Config, tmp_path: Path) -> None:
    folder = replace(loaded.folders[0], path=tmp_path / "password" / "x")
    assert faults(replace(loaded, folders=(folder,))) == [
        f"c.toml: [folder 1] path: {tmp_path}/password/x cannot be looked at: Not a directory"
    ]


def test_the_command_that_creates_a_folder_can_be_pasted(
    loaded: Config, tmp_path: Path
) -> None:
    folder = replace(loaded.folders[0], path=tmp_path / "my photos")
    assert faults(replace(loaded, folders=(folder,))) == [
        f"c.toml: [folder 1] path: {tmp_path}/my photos does not exist; "
        f"create it: mkdir -p '{tmp_path}/my photos'"
    ]


def test_a_folder_must_be_readable_and_one_that_receives_writable(
    loaded: Config, tmp_path: Path
) -> None:
    def access(path: Path, mode: int) -> bool:
        return path.name != "sent" and mode != os.W_OK

    assert faults(loaded, access) == [
        f"c.toml: [folder 1] path: syncd may not read {tmp_path}/sent; "
        f"see: ls -ld {tmp_path}/sent",
        f"c.toml: [folder 2] path: syncd may not write into {tmp_path}/received; "
        f"see: ls -ld {tmp_path}/received "
        f"(the system service also needs ReadWritePaths={tmp_path}/received)",
        f"c.toml: [inbox] path: syncd may not write into {tmp_path}/inbox; "
        f"see: ls -ld {tmp_path}/inbox "
        f"(the system service also needs ReadWritePaths={tmp_path}/inbox)",
    ]


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_password_that_others_may_read_warns(
    loaded: Config, tmp_path: Path, mode: int
) -> None:
    (tmp_path / "password").chmod(mode)
    assert places.check_paths(loaded, where="c.toml", text="[account]\npassword_file = 1") == (
        f"c.toml:2: [account] password_file: others may read it; chmod 600 {tmp_path}/password",
    )


# --- Defaults


def test_a_configuration_is_looked_for_at_home_and_then_in_etc() -> None:
    system = Path("/etc/syncd/config.toml")
    assert places.default_config_paths({"HOME": "/h"}) == (
        Path("/h/.config/syncd/config.toml"),
        system,
    )
    assert places.default_config_paths({"XDG_CONFIG_HOME": "/c"}) == (
        Path("/c/syncd/config.toml"),
        system,
    )
    assert places.default_config_paths({}) == (system,)


@pytest.mark.parametrize(
    ("environ", "state"),
    [
        ({"STATE_DIRECTORY": "/s", "HOME": "/h"}, "/s"),
        ({"STATE_DIRECTORY": "/s:/t"}, "/s"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/syncd"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/syncd"),
        ({"HOME": "/h"}, "/h/.local/state/syncd"),
    ],
)
def test_state_has_its_place(environ: dict[str, str], state: str) -> None:
    assert places.default_state_dir(environ) == Path(state)


def test_without_a_home_there_is_no_default() -> None:
    with pytest.raises(ConfigError, match="no default is known: HOME is not set"):
        places.default_state_dir({})


def test_the_socket_is_where_systemd_says() -> None:
    environ = {"RUNTIME_DIRECTORY": "/r:/q", "XDG_RUNTIME_DIR": "/tmp", "HOME": "/h"}
    assert places.default_socket(environ) == Path("/r/control.sock")


def test_the_socket_is_in_the_runtime_directory_of_the_user(tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": "/h"}
    assert places.default_socket(environ) == tmp_path / "syncd" / "control.sock"


@pytest.mark.parametrize("runtime", ["/nonexistent", "relative"])
def test_without_a_runtime_directory_the_socket_is_with_the_state(runtime: str) -> None:
    environ = {"XDG_RUNTIME_DIR": runtime, "HOME": "/h"}
    assert places.default_socket(environ) == Path("/h/.local/state/syncd/control.sock")


def test_the_socket_of_a_running_service_is_likely_unless_the_user_has_his_own(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own" / "control.sock"
    system = tmp_path / "system" / "control.sock"
    environ = {"RUNTIME_DIRECTORY": str(own.parent)}
    assert places.likely_socket(environ, system=system) == own
    system.parent.mkdir()
    assert places.likely_socket(environ, system=system) == system
    own.parent.mkdir()
    own.touch()
    assert places.likely_socket(environ, system=system) == own
