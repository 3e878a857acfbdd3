"""C-21: no secret is ever told: not in a log, an answer, an argument, or a failure.

Secrets are planted, a whole life of two daemons is lived (login by password and by token,
sealed deliveries, a wrong password, a password that cannot be used, a crash), everything that
came out is kept, and then looked through for them in every form in which they could hide.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from syncd.link import keyring
from syncd.xmpp.jid import JID
from tests.support.processes import Process, free_ports, until
from tests.support.servers import DOMAIN, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemons import Daemon, Daemons

# Found nowhere by chance, and long enough to be found if only a part of one is told.
SECRETS = {"alice": "Xq7-alice-Zk3v9TgP-planted", "bob": "Vw5-bob-Hj8m2RsN-planted"}
WRONG = "Lp4-wrong-Bn6c1YdF-planted"
# How much of a secret must never be seen in one piece.
PART = 12  # characters


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Our own, which knows every way to log in."""
    [port] = free_ports(1)
    accounts = [f"--account={user}:{secret}" for user, secret in SECRETS.items()]
    argv = [sys.executable, "-m", "syncd.demo", "--all", f"--domain={DOMAIN}", *accounts]
    process = Process(
        "the server",
        [*argv, f"--port={port}", f"--directory={tmp_path}"],
        log_file=tmp_path / "server.log",
        env={"PATH": os.environ.get("PATH", os.defpath)},
    )
    process.spawn()
    try:
        until(lambda: "port" in process.tail(), "the server listens")
        yield Server(
            kind="demo",
            host="127.0.0.1",
            port=port,
            tls_port=port,
            proxy_port=port,
            ca_file=tmp_path / "ca.pem",
            domain=DOMAIN,
            process=process,
            ready_line=None,
        )
    finally:
        process.kill()


@dataclass
class Told:
    """Everything that came out, by where it came from."""

    texts: dict[str, bytes] = field(default_factory=dict)

    def add(self, where: str, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.texts[where] = self.texts.get(where, b"") + data

    def add_process(self, daemon: Daemon) -> None:
        """What any user of the machine may see of it, and what its children inherit."""
        for name in ("cmdline", "environ", "comm"):
            path = Path(f"/proc/{daemon.process.pid}/{name}")
            self.add(f"{name} of {daemon.user}", path.read_bytes())

    def ask_everything(self, daemon: Daemon) -> None:
        """What syncctl can find out."""
        for arguments in (
            ["status"],
            ["status", "--json"],
            ["peer", "list"],
            ["peer", "show", f"bob@{DOMAIN}"],
            ["peer", "show", f"alice@{DOMAIN}"],
            ["limit"],
            ["version"],
        ):
            done = daemon.ctl(*arguments)
            self.add(f"syncctl {arguments} of {daemon.user}", done.stdout + done.stderr)


def forms(secret: bytes) -> set[bytes]:
    """How a secret may look: as it is, in hexadecimal, in base64 at any place, in JSON."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode()}
    for start in range(3):
        text = base64.b64encode(b"\0" * start + secret)
        # What depends on the bytes around it is left out.
        found.add(text[4 if start else 0 : -4])
    found.add(json.dumps(secret.decode("latin-1")).strip('"').encode())
    return {each for each in found if len(each) >= PART}


def parts(form: bytes) -> Iterator[bytes]:
    """Pieces of which one is in every longer piece."""
    for start in range(0, len(form) - PART + 1, PART // 2):
        yield form[start : start + PART]


def found_in(told: Told, secrets: dict[str, bytes]) -> list[str]:
    return [
        f"{name} in {where}"
        for name, secret in secrets.items()
        for form in forms(secret)
        for part in parts(form)
        for where, text in told.texts.items()
        if part in text
    ]


def kept_secrets(daemon: Daemon) -> dict[str, bytes]:
    """The secrets that a daemon has made or been given, from its state directory."""
    secrets: dict[str, bytes] = {}
    state = daemon.socket.parent.parent / "state"
    for path in state.iterdir():
        if path.is_file() and b"PRIVATE KEY" in (text := path.read_bytes()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            key = load_pem_private_key(text, None)
            secrets[f"identity of {daemon.user}"] = key.private_bytes(
                Encoding.Raw, PrivateFormat.Raw, NoEncryption()
            )
    token = keyring.read_token(state, JID.parse(f"{daemon.user}@{DOMAIN}"))
    if token is not None:
        secrets[f"token of {daemon.user}"] = token.secret.encode()
    return secrets


def test_c21_no_secret_is_ever_told(daemons: Daemons, server: Server) -> None:
    told = Told()
    alice = daemons.make(
        "alice", server, send_to=["bob"], accept_from=["bob"], password=SECRETS["alice"]
    )
    bob = daemons.make(
        "bob", server, send_to=["alice"], accept_from=["alice"], password=SECRETS["bob"]
    )
    wrong = daemons.make("alice", server, send_to=["bob"], password=WRONG)
    ends = (alice, bob)
    for daemon in ends:
        # Tokens are for those who let their resource be chosen.
        text = daemon.config_file.read_text()
        daemon.config_file.write_text(text.replace(f'{DOMAIN}/test"', f'{DOMAIN}"', 1))
        daemon.start()
    for daemon in ends:
        daemon.wait_connected()
    alice.drop("one", b"1")
    bob.drop("two", b"2")
    for daemon in ends:
        daemon.wait_delivered()
        told.add_process(daemon)
        told.ask_everything(daemon)
    secrets = {name: secret.encode() for name, secret in SECRETS.items()}
    for daemon in ends:
        secrets |= kept_secrets(daemon)
    assert sorted(secrets) == [
        "alice",
        "bob",
        "identity of alice",
        "identity of bob",
        "token of alice",
        "token of bob",
    ]
    # The same with the tokens; and one is killed in the way that leaves a core.
    assert alice.terminate() == 0
    bob.process.signal(signal.SIGABRT)
    bob.process.wait()
    for daemon in ends:
        daemon.start()
        daemon.wait_connected()
        told.ask_everything(daemon)
        secrets |= kept_secrets(daemon)
    for daemon in ends:
        daemon.terminate()
    # What is wrong is as secret as what is right: it may be right elsewhere.
    wrong.start()
    until(lambda: wrong.status().connection.state == "unauthorized", "it is refused")
    told.add_process(wrong)
    told.ask_everything(wrong)
    secrets["wrong"] = WRONG.encode()
    wrong.terminate()
    for number, daemon in enumerate((*ends, wrong)):
        told.add(f"log {number}", daemon.process.log_file.read_bytes())
        for path in (daemon.socket.parent.parent / "state").rglob("journal*"):
            told.add(f"journal {number}", path.read_bytes())
    assert sum(map(len, told.texts.values())) > 10_000
    assert found_in(told, secrets) == []


@pytest.mark.parametrize(
    "form",
    [
        SECRETS["bob"],
        f"password={SECRETS['bob']!r}",
        SECRETS["bob"][:14],
        SECRETS["bob"].encode().hex(),
        base64.b64encode(f"\0bob\0{SECRETS['bob']}".encode()).decode(),
        base64.b64encode(f"\0b\0{SECRETS['bob']}".encode()).decode(),
        base64.b64encode(f"\0bo\0{SECRETS['bob']}".encode()).decode(),
    ],
)
def test_c21_a_secret_that_is_told_is_found(form: str) -> None:
    """In the log of an exchange by SASL PLAIN, for instance."""
    told = Told()
    told.add("log", f"2031-05-04 DEBUG sent <auth>{form}</auth>")
    assert found_in(told, {"bob": SECRETS["bob"].encode()})


def test_c21_a_password_that_others_may_read_is_warned_of(daemons: Daemons) -> None:
    """And not shown in the warning, nor in what says what is wrong with the rest."""
    daemon = daemons.make("alice", None, send_to=["bob"], password=WRONG)
    secret = daemon.config_file.parent / "password"
    secret.chmod(0o644)
    daemon.start()
    daemon.terminate()
    log = daemon.process.tail()
    assert "warning" in log
    assert str(secret) in log
    assert WRONG not in log


def test_c21_a_configuration_that_cannot_be_read_tells_no_password(daemons: Daemons) -> None:
    for fault in ("", '"', "x = 1\n", "[[["):
        daemon = daemons.make("alice", None, send_to=["bob"])
        text = daemon.config_file.read_text()
        secret = f'password = "{WRONG}"{fault}\npassword_file'
        daemon.config_file.write_text(text.replace("password_file", secret, 1))
        with pytest.raises(AssertionError, match="ended with 78"):
            daemon.start()
        assert WRONG[:PART] not in daemon.process.tail()
        assert f"syncd: {daemon.config_file}" in daemon.process.tail()
