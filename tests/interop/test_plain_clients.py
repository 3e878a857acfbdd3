"""Files from and to a client that is not syncd: slixmpp, over real servers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.daemons import DELIVERY_TIMEOUT, digests
from tests.support.pair import MIB, ODD_NAMES, noise
from tests.support.plain_client import open_plain_client
from tests.support.processes import free_ports, until
from tests.support.servers import DOMAIN
from tests.support.ways import WAYS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemons import Daemon, Daemons
    from tests.support.plain_client import PlainClient
    from tests.support.servers import Server

SIZES = {"empty": 0, "one byte": 1, "large": 5 * MIB}

# As the client offers it, and as it is called in the inbox.
NAMES = {
    " a space at each end ": "a space at each end",
    "two  words.txt": "two  words.txt",
    "ümläut 日本語 🎉.txt": "ümläut 日本語 🎉.txt",
    'it\'s "quoted".txt': 'it\'s "quoted".txt',
    "a&b<c>d;&amp;.xml": "a&b<c>d;&amp;.xml",
    "]]>.xml": "]]>.xml",
    "100%41.txt": "100%41.txt",
    "back\\slash": "slash",
    "/etc/passwd": "passwd",
    "../../up": "up",
    "-rf": "-rf",
    "C: is no drive": "C: is no drive",
    "x" * 255: "x" * 255,
    "y" * 300: "y" * 255,
}

# By what it can offer: it has no address of its own to be connected to.
METHODS = {"proxy": "s5b", "ibb": "ibb"}


@pytest.fixture(params=METHODS)
def way(request: pytest.FixtureRequest) -> str:
    """One way after the other."""
    name: str = request.param
    return name


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Iterator[PlainClient]:
    """Carol, who uses another client."""
    directory = tmp_path / "carol"
    directory.mkdir()
    with open_plain_client(server, "carol", directory) as carol:
        yield carol


@pytest.fixture
def alice(server: Server, daemons: Daemons, tmp_path: Path, way: str) -> Daemon:
    """Alice, who uses syncd, and has only this one way; not started."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    return daemons.make(
        "alice",
        server,
        send_to=["carol"],
        bytestreams=WAYS[way],
        extra=f'[inbox]\npath = "{inbox}"\naccept_from = ["carol@{DOMAIN}"]\n',
    )


def port_of(server: Server, way: str) -> int:
    return server.proxy_port if way == "proxy" else 0


# --- From it


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_what_it_sends_lies_in_the_inbox(
    server: Server, alice: Daemon, client: PlainClient, tmp_path: Path, way: str, size: int
) -> None:
    alice.start()
    alice.wait_connected()
    file = tmp_path / "file"
    file.write_bytes(noise(size))
    sent = client.send(f"alice@{DOMAIN}/test", file, method=METHODS[way])
    assert (sent["event"], sent["why"]) == ("sent", "")
    assert sent["port"] == port_of(server, way)
    inbox = tmp_path / "inbox"
    until(lambda: (inbox / "file").exists(), "it is in the inbox", DELIVERY_TIMEOUT)
    until(lambda: not alice.status().transfers, "nothing is on its way")
    assert (inbox / "file").read_bytes() == noise(size)
    assert set(digests(inbox)) == {"file"}


def test_its_names_are_kept_as_far_as_they_are_harmless(
    alice: Daemon, client: PlainClient, tmp_path: Path, way: str
) -> None:
    alice.start()
    alice.wait_connected()
    inbox = tmp_path / "inbox"
    for number, (offered, name) in enumerate(NAMES.items()):
        file = tmp_path / "file"
        file.write_bytes(noise(100 + number, number))
        sent = client.send(f"alice@{DOMAIN}/test", file, method=METHODS[way], name=offered)
        assert (sent["event"], sent["why"]) == ("sent", "")
        until((inbox / name).exists, f"{name} is there")
        assert (inbox / name).read_bytes() == noise(100 + number, number)
    until(lambda: not alice.status().transfers, "nothing is on its way")
    assert set(digests(inbox)) == set(NAMES.values())


# --- To it


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_what_is_sent_to_it_arrives(
    server: Server, alice: Daemon, client: PlainClient, way: str, size: int
) -> None:
    alice.drop("some/where/file", noise(size))
    alice.start()
    got = client.next()
    assert (got["event"], got["name"], got["size"]) == ("received", "file", size)
    assert (got["method"], got["port"]) == (METHODS[way], port_of(server, way))
    assert Path(got["file"]).read_bytes() == noise(size)
    alice.wait_delivered()
    assert (alice.peer("carol").sent, alice.peer("carol").delivered) == (1, 0)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_what_is_sent_to_it_directly_arrives(
    server: Server, daemons: Daemons, client: PlainClient, size: int
) -> None:
    [port] = free_ports(1)
    alice = daemons.make("alice", server, send_to=["carol"], listen=port, only_direct=True)
    alice.drop("file", noise(size))
    alice.start()
    got = client.next()
    assert (got["event"], got["method"], got["port"]) == ("received", "s5b", port)
    assert Path(got["file"]).read_bytes() == noise(size)
    alice.wait_delivered()
    assert alice.peer("carol").sent == 1


def test_names_reach_it_as_they_are(alice: Daemon, client: PlainClient) -> None:
    content = {}
    # What syncd sends to a client that knows no folders is the last part.
    for number, path in enumerate(ODD_NAMES):
        content[path.rpartition("/")[2]] = noise(100 + number, number)
        alice.drop(path, noise(100 + number, number))
    alice.start()
    received = {}
    for _ in ODD_NAMES:
        got = client.next()
        received[got["name"]] = Path(got["file"]).read_bytes()
    assert received == content
    alice.wait_delivered()
    assert alice.peer("carol").sent == len(ODD_NAMES)
