"""``python -m syncd.demo`` as a process."""

from __future__ import annotations

import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support.rawclient import NS_TLS, connect, log_in

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Process:
    """The server as its own process."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "syncd.demo", "--directory", str(directory)]
        self.process = subprocess.Popen(
            [*command, "--account", "alice:secret", *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        word, number = self.process.stdout.readline().split()
        assert word == "port"
        self.port = int(number)
        self.ca_pem = (directory / "ca.pem").read_bytes()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, "--domain", "x.example")
    yield process
    process.kill()


async def test_it_serves_under_its_domain(process: Process) -> None:
    async with log_in(process.port, process.ca_pem, "alice@x.example/a", "secret") as alice:
        assert str(alice.jid) == "alice@x.example/a"


async def test_it_can_do_all_that_there_is(tmp_path: Path) -> None:
    process = Process(tmp_path, "--all")
    try:
        async with connect(process.port) as client:
            await client.open("demo.example")
            await client.write(f"<starttls xmlns='{NS_TLS}'/>")
            await client.next()
            await client.start_tls("demo.example", process.ca_pem)
            features = await client.open("demo.example")
            assert features.find("{urn:xmpp:sasl:2}authentication") is not None
    finally:
        process.kill()


async def test_a_killed_server_comes_back_on_its_port_with_its_certificate(
    process: Process, tmp_path: Path
) -> None:
    async with log_in(process.port, process.ca_pem, "alice@x.example/a", "secret") as alice:
        process.kill()
        assert await alice.until_end()
    again = Process(tmp_path, "--domain", "x.example", "--port", str(process.port))
    try:
        assert again.port == process.port
        async with log_in(again.port, process.ca_pem, "alice@x.example/a", "secret"):
            pass
    finally:
        again.kill()


def test_the_key_is_private(process: Process, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


@pytest.mark.parametrize("account", ["alice", "alice:", ":secret"])
def test_an_account_needs_a_name_and_a_password(account: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "syncd.demo", "--account", account, "--directory", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"'{account}' is not NAME:PASSWORD" in done.stderr
