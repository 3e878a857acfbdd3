from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import tomli

from syncd.config import (
    TABLES,
    Account,
    Address,
    Bytestreams,
    Config,
    Folder,
    Inbox,
    Peer,
    Transfer,
    find_socket,
    load,
    parse,
)
from syncd.errors import ConfigError
from syncd.settings.password import PasswordSource
from syncd.xmpp.jid import JID

EXAMPLE = Path(__file__).parent.parent / "config.example.toml"
ENVIRON = {
    "HOME": "/home/alice",
    "RUNTIME_DIRECTORY": "/run/syncd",
    "STATE_DIRECTORY": "/var/lib/syncd",
}
ACCOUNT = '[account]\njid = "alice@example.org"\npassword_file = "/etc/syncd/password"\n'
WHERE = "/etc/syncd/config.toml"


def parsed(text: str, environ: dict[str, str] = ENVIRON) -> Config:
    return parse(text, where=WHERE, environ=environ)


def refused(text: str, environ: dict[str, str] = ENVIRON) -> str:
    """The message, without the name of the file at the beginning of each line."""
    with pytest.raises(ConfigError) as caught:
        parsed(text, environ)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(WHERE + ":") for line in lines)
    return "\n".join(line.removeprefix(WHERE + ":").strip() for line in lines)


def folder(**changes: object) -> str:
    """A [[folder]] in TOML; a change to None leaves the key away."""
    values: dict[str, object] = {
        "id": "photos",
        "path": "/srv/photos",
        "send_to": ["bob@example.org"],
        **changes,
    }
    lines = [f"{name} = {value!r}" for name, value in values.items() if value is not None]
    return "\n".join(["[[folder]]", *lines, ""])


# --- What good files give


def test_the_least_configuration_has_every_default() -> None:
    assert parsed(ACCOUNT) == Config(
        account=Account(
            jid=JID("alice", "example.org"),
            password=PasswordSource(file=Path("/etc/syncd/password")),
            server=None,
            tls="auto",
            ca_file=None,
            certificate_fingerprint=None,
            allow_plain=False,
        ),
        state_dir=Path("/var/lib/syncd"),
        control_socket=Path("/run/syncd/control.sock"),
        bytestreams=Bytestreams(
            listen=None, advertise=(), direct=True, proxies="auto", ibb=True
        ),
        transfer=Transfer(
            encryption="preferred", parallel=4, answer_timeout=180, limit_up=0, limit_down=0
        ),
        folders=(),
        inbox=None,
        peers=(),
        warnings=(),
    )


def test_everything_can_be_set() -> None:
    config = parsed("""
        [account]
        jid = "Alice@Example.org/laptop"
        password_command = ["pass", "show", "xmpp"]
        server = "[::1]:5223"
        tls = "direct"
        ca_file = "ca.pem"
        allow_plain = true
        [state]
        dir = "$HOME/state"
        [control]
        socket = "~/control.sock"
        [bytestreams]
        listen = "[::]:5280"
        advertise = ["files.example.org:0", "192.0.2.1:5280"]
        direct = false
        proxies = ["proxy.example.org"]
        ibb = false
        [transfer]
        encryption = "off"
        parallel = 64
        answer_timeout = 600
        limit_up = 1048576
        limit_down = "5 MiB"
        [[folder]]
        id = "photos"
        path = "/srv/photos"
        send_to = ["bob@example.org", "carol@example.org/phone"]
        accept_from = ["carol@example.org"]
        settle = 0
        [[folder]]
        id = "a.B_c-9"
        path = "/srv/music"
        accept_from = ["bob@example.org"]
        names = "portable"
        accept_hidden = false
        [inbox]
        path = "/srv/inbox"
        accept_from = ["dave@example.org"]
        [[peer]]
        jid = "bob@example.org"
        [[peer]]
        jid = "eve@example.org"
        parallel = 2
        limit_up = "500 kB/s"
        limit_down = 2048
        max_file = "2 GiB"
        quota = 1000000
        max_files = 5000
        """)
    assert config == Config(
        account=Account(
            jid=JID("alice", "example.org", "laptop"),
            password=PasswordSource(command=("pass", "show", "xmpp")),
            server=Address("::1", 5223),
            tls="direct",
            ca_file=Path("/etc/syncd/ca.pem"),
            certificate_fingerprint=None,
            allow_plain=True,
        ),
        state_dir=Path("/home/alice/state"),
        control_socket=Path("/home/alice/control.sock"),
        bytestreams=Bytestreams(
            listen=Address("::", 5280),
            advertise=(Address("files.example.org", 0), Address("192.0.2.1", 5280)),
            direct=False,
            proxies=(JID("", "proxy.example.org"),),
            ibb=False,
        ),
        transfer=Transfer(
            encryption="off",
            parallel=64,
            answer_timeout=600,
            limit_up=1 << 20,
            limit_down=5 << 20,
        ),
        folders=(
            Folder(
                id="photos",
                path=Path("/srv/photos"),
                send_to=(JID("bob", "example.org"), JID("carol", "example.org", "phone")),
                accept_from=(JID("carol", "example.org"),),
                settle=0.0,
                names="any",
                accept_hidden=True,
            ),
            Folder(
                id="a.B_c-9",
                path=Path("/srv/music"),
                send_to=(),
                accept_from=(JID("bob", "example.org"),),
                settle=1.0,
                names="portable",
                accept_hidden=False,
            ),
        ),
        inbox=Inbox(path=Path("/srv/inbox"), accept_from=(JID("dave", "example.org"),)),
        peers=(
            Peer(
                jid=JID("bob", "example.org"),
                parallel=None,
                limit_up=0,
                limit_down=0,
                max_file=0,
                quota=0,
                max_files=0,
            ),
            Peer(
                jid=JID("eve", "example.org"),
                parallel=2,
                limit_up=500_000,
                limit_down=2048,
                max_file=2 << 30,
                quota=10**6,
                max_files=5_000,
            ),
        ),
        warnings=(),
    )


FINGERPRINT = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@pytest.mark.parametrize(
    "written",
    [FINGERPRINT, FINGERPRINT.upper(), bytes.fromhex(FINGERPRINT).hex(":").upper()],
)
def test_a_fingerprint_is_read_as_people_write_it(written: str) -> None:
    config = parsed(f'{ACCOUNT}certificate_fingerprint = "{written}"\n')
    assert config.account.certificate_fingerprint == bytes.fromhex(FINGERPRINT)


@pytest.mark.parametrize(
    "wrong",
    [
        FINGERPRINT[:40],  # SHA-1
        FINGERPRINT + "00",
        FINGERPRINT[:-1] + "g",
        FINGERPRINT[:-1] + "\N{FULLWIDTH DIGIT ONE}",
        ":" + FINGERPRINT,
        f"SHA256 Fingerprint={FINGERPRINT}",
    ],
)
def test_what_is_no_fingerprint_is_refused(wrong: str) -> None:
    message = refused(f'{ACCOUNT}certificate_fingerprint = "{wrong}"\n')
    assert "expected a SHA-256 fingerprint of 64 hexadecimal digits" in message


def test_a_ca_beside_the_one_certificate_would_have_no_say() -> None:
    message = refused(
        f'{ACCOUNT}certificate_fingerprint = "{FINGERPRINT}"\nca_file = "ca.pem"\n'
    )
    assert "[account] ca_file: it has no say beside certificate_fingerprint" in message


def test_a_relative_name_of_the_file_makes_absolute_paths() -> None:
    config = parse(ACCOUNT + folder(path="photos"), where="config.toml", environ=ENVIRON)
    assert config.folders[0].path == Path.cwd() / "photos"


def test_an_inline_password_warns_and_is_not_shown() -> None:
    config = parsed('[account]\njid = "alice@example.org"\npassword = "s3cret"\n')
    assert config.account.password == PasswordSource(inline="s3cret")
    assert "s3cret" not in repr(config)
    assert config.warnings == (
        "/etc/syncd/config.toml:3: [account] password: the password stands in the "
        "configuration; better put it into a file of its own and set password_file",
    )


def test_the_credential_of_systemd_needs_no_key() -> None:
    config = parsed(
        '[account]\njid = "alice@example.org"', {**ENVIRON, "CREDENTIALS_DIRECTORY": "/run/c"}
    )
    assert config.account.password == PasswordSource(
        file=Path("/run/c/password"), credential=True
    )


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("example.org:5222", Address("example.org", 5222)),
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("[2001:DB8::1]:65535", Address("2001:db8::1", 65535)),
    ],
)
def test_an_address_is_host_and_port(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text.lower()


@pytest.mark.parametrize(
    "text",
    ["", ":5222", "example.org", "example.org:", "a:65536", "a:1x", "::1:5222", "[::1]",
     "[::1:5222", "[nonsense]:1", "a b:1", "a/b:1", "a:123456"],
)  # fmt: skip
def test_anything_else_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not host:port|is|Expected|At least"):
        Address.parse(text)


# --- What is wrong with others


def test_a_mistyped_key_is_named_with_the_right_one() -> None:
    text = ACCOUNT + folder(send_to=None, send_too=["bob@example.org"], accept_from=["c@d"])
    assert refused(text) == (
        '7: [folder 1 "photos"] send_too: unknown key; did you mean send_to?'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "[account]: missing; at least jid and a password must be in it"),
        (
            "[account]",
            "1: [account] jid: missing. The XMPP address to log in with; without a resource "
            "syncd picks a stable one.\n"
            "1: [account]: no password; set password_file or password_command, "
            'or give the service the systemd credential "password"',
        ),
        ("account = 5", "1: account: expected one table [account], found 5 (a whole number)"),
        (
            ACCOUNT.replace("alice@", ""),
            '2: [account] jid: expected a JID such as "alice@example.org", '
            'found "example.org": it has nothing before an @',
        ),
        (
            ACCOUNT.replace("alice@", "al ice@"),
            '2: [account] jid: expected a JID such as "alice@example.org", '
            'found "al ice@example.org": a space is not allowed before the @',
        ),
        (
            ACCOUNT.replace('"alice@example.org"', "5"),
            '2: [account] jid: expected a JID such as "alice@example.org", '
            "found 5 (a whole number)",
        ),
        (
            ACCOUNT + 'password = "s3cret"\npassword_command = ["pass"]',
            "4: [account] password: password_file is given, too; keep one of them\n"
            "5: [account] password_command: password_file is given, too; keep one of them",
        ),
        (
            '[account]\njid = "a@b"\npassword = 12345',
            "3: [account] password: expected a string, found a whole number",
        ),
        (
            ACCOUNT + 'tls = "start-tls"',
            '4: [account] tls: expected "starttls", "direct" or "auto", found "start-tls"; '
            'did you mean "starttls"?',
        ),
        (
            ACCOUNT + 'server = "example.org"',
            '4: [account] server: expected "host:port" or "[IPv6]:port", found "example.org"',
        ),
        (
            ACCOUNT + 'server = "example.org:0"',
            '4: [account] server: expected "host:port" or "[IPv6]:port", '
            'found "example.org:0": nobody can connect to port 0',
        ),
        (
            ACCOUNT + "server = 5222",
            '4: [account] server: expected "host:port" or "[IPv6]:port", '
            "found 5222 (a whole number)",
        ),
        (
            ACCOUNT + "[transfer]\nparallel = true",
            "5: [transfer] parallel: expected a whole number from 1 to 64, "
            "found true (a boolean)",
        ),
        (
            ACCOUNT + "[transfer]\nparallel = 65",
            "5: [transfer] parallel: expected a whole number from 1 to 64, "
            "found 65 (a whole number)",
        ),
        (
            ACCOUNT + "[bytestreams]\ndirect = false\nproxies = []\nibb = false",
            "4: [bytestreams]: direct, proxies and ibb are all off, so no byte could travel; "
            "turn one on",
        ),
        (
            ACCOUNT + '[bytestreams]\nproxies = "none"',
            '5: [bytestreams] proxies: expected "auto" or a list such as '
            '["proxy.example.org"], found "none" (a string)',
        ),
        (
            ACCOUNT + '[bytestreams]\nproxies = ["a b"]',
            "5: [bytestreams] proxies: item 1: expected a JID such as "
            '"proxy.example.org", found "a b": \'a b\' is not a domain name',
        ),
        (
            ACCOUNT + '[folder]\nid = "photos"',
            "4: [folder]: write [[folder]], in double brackets: there may be several",
        ),
        (
            ACCOUNT + folder(id="a/b"),
            '5: [folder 1 "a/b"] id: expected 1 to 64 of the characters A-Z a-z 0-9 . _ -, '
            'found "a/b"',
        ),
        (
            ACCOUNT + folder(send_to=None),
            '4: [folder 1 "photos"]: neither send_to nor accept_from: it would do nothing; '
            "give at least one",
        ),
        (
            ACCOUNT + folder(send_to="bob@example.org"),
            '7: [folder 1 "photos"] send_to: expected a list such as ["bob@example.org"], '
            'found "bob@example.org" (a string)',
        ),
        (
            ACCOUNT + folder(send_to=["example.org", "Bob@b", "bob@b"]),
            '7: [folder 1 "photos"] send_to: item 1: expected a JID such as '
            '"alice@example.org", found "example.org": it has nothing before an @\n'
            '7: [folder 1 "photos"] send_to: item 3: "bob@b" is in the list twice',
        ),
        (
            ACCOUNT + folder(accept_from=["bob@example.org/phone"]),
            '8: [folder 1 "photos"] accept_from: item 1: expected a JID such as '
            '"alice@example.org", found "bob@example.org/phone": it must not have a '
            'resource; write "bob@example.org"',
        ),
        (
            ACCOUNT + folder(settle=-1),
            '8: [folder 1 "photos"] settle: expected a number of seconds from 0 to 3600, '
            "found -1 (a whole number)",
        ),
        (
            ACCOUNT + folder() + folder(path="/srv/other"),
            '9: [folder 2 "photos"] id: folder 1 has the same; ids are unique',
        ),
        (
            ACCOUNT + folder(path="~bob/photos"),
            '6: [folder 1 "photos"] path: ~bob is not replaced: only ~ and $HOME are, '
            "at the beginning",
        ),
        (
            ACCOUNT + '[inbox]\npath = "/srv/inbox"\naccept_from = []',
            '6: [inbox] accept_from: expected a list such as ["dave@example.org"], '
            "found an empty list",
        ),
        (
            ACCOUNT + f'[control]\nsocket = "/{"x" * 107}"',
            f"5: [control] socket: /{'x' * 107} has 108 bytes, but a Unix socket's path at "
            "most 107: choose a shorter one",
        ),
        (
            ACCOUNT + "[state]\ndir = 5\n[control]\nsocket = []",
            "5: [state] dir: expected a string, found 5 (a whole number)\n"
            "7: [control] socket: expected a string, found an empty list",
        ),
        (
            'jid = "alice@example.org"\n' + ACCOUNT,
            "1: jid: unknown here; it belongs below [account]",
        ),
        (
            ACCOUNT + "[folders]",
            "4: [folders]: unknown table; did you mean [folder]?",
        ),
        (ACCOUNT + "x = y", "4: not TOML: Invalid value (column 5)"),
    ],
)
def test_a_fault_is_named_with_its_place_and_the_way_out(text: str, message: str) -> None:
    assert refused(text) == message


def test_all_faults_are_told_at_once() -> None:
    text = (
        '[acount]\njid = "alice@example.org"\n'
        + folder(id=7, settle="fast")
        + folder(path="/srv/photos/2024", sendto=[])
    )
    assert refused(text) == (
        "[account]: missing; at least jid and a password must be in it\n"
        "1: [acount]: unknown table; did you mean [account]?\n"
        '4: [folder 1 "7"] id: expected 1 to 64 of the characters A-Z a-z 0-9 . _ -, '
        "found 7 (a whole number)\n"
        '7: [folder 1 "7"] settle: expected a number of seconds from 0 to 3600, '
        'found "fast" (a string)\n'
        '10: [folder 2 "photos"] path: /srv/photos/2024 lies inside folder 1, /srv/photos\n'
        '12: [folder 2 "photos"] sendto: unknown key; did you mean send_to?'
    )


@pytest.mark.parametrize(
    ("table", "name"), [(table, key.name) for table, keys in TABLES.items() for key in keys]
)
@pytest.mark.parametrize(
    "value", ["[{}]", "{a = 1}", "[[]]", "[true]", "2024-02-29", "inf", '""']
)
def test_no_value_of_any_key_is_taken_by_surprise(table: str, name: str, value: str) -> None:
    """None of these fits anywhere, and each is refused in words."""
    header = f"[[{table}]]" if table in ("folder", "peer") else f"[{table}]"
    message = refused(f"{header}\n{name} = {value}")
    assert re.search(rf"^2: \[{table}.*\] {name}: (item 1: )?expected", message, re.MULTILINE)


def test_without_a_home_the_paths_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # who has no /run/user
    assert refused(ACCOUNT + folder(path="~/photos"), {}) == (
        "[state] dir: no default is known: HOME is not set; set it here\n"
        "[control] socket: no default is known: HOME is not set; set it here\n"
        '6: [folder 1 "photos"] path: ~ cannot be replaced: HOME is not set'
    )


# --- From the disk


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration that loads: with a password and a folder."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "password").write_text("s3cret\n")
    (tmp_path / "password").chmod(0o600)
    file = tmp_path / "config.toml"
    file.write_text(ACCOUNT.replace("/etc/syncd/", "") + folder(path="photos"))
    return file


def test_a_file_is_loaded(file: Path) -> None:
    config = load(file, environ=ENVIRON)
    assert config.folders[0].path == file.parent / "photos"
    assert config.account.password.read() == "s3cret"
    assert config.warnings == ()


def test_a_missing_folder_is_named_with_its_line(file: Path) -> None:
    (file.parent / "photos").rmdir()
    with pytest.raises(ConfigError) as caught:
        load(file, environ=ENVIRON)
    path = file.parent / "photos"
    assert str(caught.value) == (
        f'{file}:6: [folder 1 "photos"] path: {path} does not exist; create it: mkdir -p {path}'
    )


def test_a_mark_of_a_windows_editor_does_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert load(file, environ=ENVIRON).folders[0].id == "photos"


@pytest.mark.parametrize(
    ("mode", "warned"), [(0o600, False), (0o620, False), (0o640, True), (0o604, True)]
)
def test_who_else_may_read_an_inline_password_is_warned_of(
    file: Path, mode: int, warned: bool
) -> None:
    file.write_text('[account]\njid = "alice@example.org"\npassword = "s3cret"\n')
    file.chmod(mode)
    warning = f"{file}: others may read the password in it; chmod 600 {file}"
    assert (warning in load(file, environ=ENVIRON).warnings) == warned


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read: No such file"):
        load(tmp_path / "config.toml", environ=ENVIRON)


# --- For syncctl


def test_the_socket_is_found_in_the_daemons_file_whatever_else_is_wrong_there(
    tmp_path: Path,
) -> None:
    """The password may come from systemd, and the folders belong to another user."""
    file = tmp_path / "config.toml"
    file.write_text('[account]\njid = "alice@example.org"\n[control]\nsocket = "s"\n')
    assert find_socket({}, file) == tmp_path / "s"


@pytest.mark.parametrize("text", ["", "[control]"])
def test_without_a_word_about_it_the_socket_is_the_default(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(text)
    environ = {"RUNTIME_DIRECTORY": str(tmp_path)}
    (tmp_path / "control.sock").touch()
    assert find_socket(environ, file) == tmp_path / "control.sock"
    assert find_socket(environ) == tmp_path / "control.sock"


def test_a_socket_that_cannot_be_understood_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[control]\nsocket = 5")
    with pytest.raises(ConfigError) as caught:
        find_socket({}, file)
    assert str(caught.value) == (
        f"{file}:2: [control] socket: expected a string, found 5 (a whole number)"
    )


# --- config.example.toml


def documented() -> dict[tuple[str, str], tuple[str, Any]]:
    """What the example says: (table, key) -> the comment above it, the value."""
    table = ""
    comment: list[str] = []
    found: dict[tuple[str, str], tuple[str, Any]] = {}
    for line in EXAMPLE.read_text().splitlines():
        if header := re.fullmatch(r"(?:# )?\[+(\w+)\]+", line):
            table, comment = header[1], []
        elif key := re.fullmatch(r"(?:# )?(\w+) = (.*)", line):
            value = tomli.loads(f"value = {key[2]}")["value"]
            found[table, key[1]] = (" ".join(comment), value)
            comment = []
        elif line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        else:
            comment = []
    return found


def test_a_home_directory_takes_no_hidden_files_unless_it_is_told_to() -> None:
    folder = (
        f'{ACCOUNT}[[folder]]\nid = "home"\npath = "~"\naccept_from = ["bob@example.org"]\n'
    )
    config = parsed(folder)
    assert [each.accept_hidden for each in config.folders] == [False]
    [warning] = config.warnings
    assert "/home/alice is a home directory, or holds one, so names that begin" in warning
    config = parsed(f"{folder}accept_hidden = true\n")
    assert ([each.accept_hidden for each in config.folders], config.warnings) == ([True], ())


def test_what_is_secret_is_in_no_folder() -> None:
    account = '[account]\njid = "alice@example.org"\npassword_file = "/srv/all/password"\n'
    folder = '[[folder]]\nid = "all"\npath = "/srv/all"\nsend_to = ["bob@example.org"]\n'
    with pytest.raises(ConfigError, match="which is sent to others; move it out of there"):
        parsed(account + folder)


def test_a_peer_is_described_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(
            ACCOUNT
            + '[[peer]]\njid = "bob@example.org"\n[[peer]]\njid = "bob@example.org"\n'
            + '[[peer]]\njid = "carol@example.org/desk"\nlimit_upp = 5\n'
        )
    assert [line.partition(": ")[2] for line in str(caught.value).splitlines()] == [
        "[peer 2] jid: peer 1 is the same; put all its keys below one [[peer]]",
        '[peer 3] jid: expected a JID such as "alice@example.org", found'
        ' "carol@example.org/desk": it must not have a resource; write "carol@example.org"',
        "[peer 3] limit_upp: unknown key; did you mean limit_up?",
    ]


def test_peers_stand_in_double_brackets() -> None:
    with pytest.raises(ConfigError, match=r"write \[\[peer\]\], in double brackets"):
        parsed(f'{ACCOUNT}[peer]\njid = "bob@example.org"\n')


def test_the_example_documents_every_key_and_nothing_else() -> None:
    keys = {(table, key.name) for table, keys in TABLES.items() for key in keys}
    assert set(documented()) == keys


@pytest.mark.parametrize(
    ("table", "name"), [(table, key.name) for table, keys in TABLES.items() for key in keys]
)
def test_the_example_says_what_a_key_does_and_its_default(table: str, name: str) -> None:
    key = next(key for key in TABLES[table] if key.name == name)
    comment, value = documented()[table, name]
    assert comment.startswith(key.doc)
    # A list that is empty by default may be shown with somebody in it.
    if key.default is not None and "Default: nobody." not in comment:
        assert value == key.default


def test_the_example_loads(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "password").write_text("s3cret\n")
    (tmp_path / "password").chmod(0o600)
    (tmp_path / "config.toml").write_text(EXAMPLE.read_text())
    config = load(tmp_path / "config.toml", environ={**ENVIRON, "HOME": str(tmp_path)})
    assert config.warnings == ()
    assert [folder.id for folder in config.folders] == ["photos"]
    assert config.inbox is None


def test_the_example_is_right_in_what_it_has_commented_out() -> None:
    text = re.sub(r"^# (\w+ = |\[)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    # What excludes something that stands there, too.
    text = re.sub(r"^(password(_command)?|ca_file) = .*\n", "", text, flags=re.MULTILINE)
    config = parsed(text)
    assert config.inbox == Inbox(
        path=Path("/home/alice/inbox"), accept_from=(JID("dave", "example.org"),)
    )
    assert config.account.server == Address("xmpp.example.org", 5222)
