"""Which of a peer's clients a delivery goes to, and what the engine hears of who is there.

The part of `syncd.daemon` that needs no process of its own; the rest is in its twin.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from syncd.config import load, parse
from syncd.disk.partial import Identity as FileIdentity
from syncd.errors import ErrorType, OfflineError, StanzaError
from syncd.sync.engine import Engine as SyncEngine
from syncd.sync.journal import open_journal
from syncd.sync.plan import Delivery, FileVersion
from syncd.transfer import si
from syncd.transfer.incoming import Arriving, Inbox, Known, Present
from syncd.transfer.sender import Sent, Source, Target
from syncd.wiring.links import MAX_RESOURCES_TRIED, Links
from syncd.wiring.status import Transfers
from syncd.xmpp.disco import Identity, make_info
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import PRESENCE
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

CONFIG = """\
[account]
jid = "alice@example.org/laptop"
password_file = "password"
[state]
dir = "state"
[control]
socket = "control.sock"
[[folder]]
id = "photos"
path = "photos"
send_to = ["bob@example.org", "carol@example.org/desk", "carol@example.org/lap"]
"""


class Engine:
    """Hears who is there."""

    def __init__(self) -> None:
        self.online: frozenset[str] = frozenset()
        self.came: list[str] = []
        self.anew: list[str] = []

    def set_online(self, peers: frozenset[str], anew: frozenset[str] = frozenset()) -> None:
        self.anew += sorted(anew)
        self.came += sorted(peers - self.online)
        self.online = peers


class Sender:
    """Notes who gets the file; most are not there, whatever their presence says."""

    def __init__(self, *there: str, refused: bool = True) -> None:
        self._there = there
        self._refused = refused
        self.tried: list[str] = []
        self.targets: list[Target] = []

    async def send(self, _: Source, target: Target) -> Sent:
        self.tried.append(target.jid.resource)
        self.targets.append(target)
        if target.jid.resource in self._there:
            return Sent(confirmed=target.is_syncd, digest=bytes(32))
        if self._refused:
            raise OfflineError("gone") from StanzaError(ErrorType.CANCEL, "service-unavailable")
        raise OfflineError("we are offline")


@pytest.fixture
def links(tmp_path: Path) -> Links:
    (tmp_path / "photos").mkdir()
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "config.toml").write_text(CONFIG)
    config = load(tmp_path / "config.toml", environ={"HOME": str(tmp_path)})
    new = Links(config, "resource", Transfers())
    new.engine = Engine()  # type: ignore[assignment] # all that is asked of it here
    return new


def test_what_a_folder_and_a_peer_are_allowed_is_what_counts(tmp_path: Path) -> None:
    text = (
        CONFIG
        + """
accept_from = ["bob@example.org"]
[[folder]]
id = "music"
path = "music"
accept_from = ["bob@example.org"]
names = "portable"
accept_hidden = false
[[peer]]
jid = "bob@example.org"
max_file = 10
max_files = 2
"""
    )
    config = parse(text, where=str(tmp_path / "c.toml"), environ={"HOME": "/home/alice"})
    (tmp_path / "state").mkdir()
    joined = Links(config, "resource", Transfers())
    bob = JID.parse("bob@example.org")
    assert [joined._inbox_for(bob, folder) for folder in ("photos", "music")] == [
        Inbox(root=tmp_path / "photos", folder="photos"),
        Inbox(root=tmp_path / "music", folder="music", portable=True, hidden=False),
    ]
    allowed = joined.receiver._allowance(bob)
    allowed.check(10)
    with pytest.raises(StanzaError, match="10 are accepted"):
        allowed.check(11)
    assert allowed.reserve(10, known=True, entries=2) == 10
    with pytest.raises(StanzaError, match="as many files"):
        allowed.reserve(10, known=True, entries=1)


@contextlib.asynccontextmanager
async def remembering(links: Links) -> AsyncIterator[Links]:
    """With a journal, as it is after a start of the daemon."""
    async with open_journal(links.config.state_dir) as journal:
        links.engine = SyncEngine(journal, [], links.send, limit_of=links.limit_of, places=1)
        yield links


def come(links: Links, *jids: str, features: frozenset[str] = si.REQUIRED_FEATURES) -> None:
    """Later ones are chosen first."""
    for jid in jids:
        unknown = links.client.contacts.presence_received(make(PRESENCE, {"from": jid}))
        assert unknown is not None
        resource = links.client.contacts.unknown(unknown)
        assert resource is not None
        info = make_info(Identity("client", "pc"), features)
        assert links.client.contacts.info_received(resource, info)
    links._contacts_changed()


async def send(links: Links, sender: Sender, peer: str = "bob@example.org") -> str:
    links.sender = sender  # type: ignore[assignment] # all that is asked of it here
    version = FileVersion(folder="photos", path="a", size=1, mtime_ns=1, inode=1)
    return (await links.send(Delivery(id=1, version=version, peer=peer))).outcome


def online(links: Links) -> frozenset[str]:
    assert isinstance(links.engine, Engine)
    return links.engine.online


async def test_when_a_client_is_not_there_the_next_one_is_tried(links: Links) -> None:
    come(links, "bob@example.org/tv", "bob@example.org/pc")
    sender = Sender("tv")
    assert await send(links, sender) == "sent"
    assert sender.tried == ["pc", "tv"]
    assert await send(links, sender) == "sent"
    assert sender.tried == ["pc", "tv", "tv"]
    assert online(links) == {"bob@example.org"}


async def test_when_none_is_there_the_peer_is_offline(links: Links) -> None:
    come(links, "bob@example.org/tv", "bob@example.org/pc")
    with pytest.raises(OfflineError, match=r"^bob@example\.org is offline$"):
        await send(links, Sender())
    assert online(links) == frozenset()


async def test_only_so_many_clients_are_tried(links: Links) -> None:
    come(links, *(f"bob@example.org/{number}" for number in range(20)))
    sender = Sender()
    with pytest.raises(OfflineError, match="its server says otherwise") as caught:
        await send(links, sender)
    assert caught.value.type is ErrorType.WAIT
    assert len(sender.tried) == MAX_RESOURCES_TRIED


async def test_when_we_are_offline_nobody_else_is_tried(links: Links) -> None:
    come(links, "bob@example.org/tv", "bob@example.org/pc")
    sender = Sender(refused=False)
    with pytest.raises(OfflineError, match="we are offline"):
        await send(links, sender)
    assert sender.tried == ["pc"]
    assert online(links) == {"bob@example.org"}


async def test_syncd_that_comes_beside_another_client_has_come(links: Links) -> None:
    """What would not go to the other client waited for it."""
    assert isinstance(links.engine, Engine)
    come(links, "bob@example.org/phone")
    come(links, "bob@example.org/tablet")
    assert links.engine.came == ["bob@example.org"]
    come(links, "bob@example.org/server", features=si.REQUIRED_FEATURES | {si.NS_SYNC})
    assert links.engine.came == 2 * ["bob@example.org"]
    assert links.engine.anew == ["bob@example.org"]
    assert online(links) == {"bob@example.org"}


@pytest.mark.parametrize(
    ("features", "can_seal"),
    [({si.NS_SYNC, si.NS_SEAL}, True), ({si.NS_SYNC}, False), ({si.NS_SEAL}, False)],
)
async def test_only_a_syncd_is_offered_a_seal(
    links: Links, features: set[str], can_seal: bool
) -> None:
    come(links, "bob@example.org/pc", features=si.REQUIRED_FEATURES | features)
    sender = Sender("pc")
    await send(links, sender)
    assert [target.can_seal for target in sender.targets] == [can_seal]


async def test_two_clients_of_one_account_are_two_peers(links: Links) -> None:
    come(links, "carol@example.org/lap", features=si.REQUIRED_FEATURES | {si.NS_SYNC})
    assert online(links) == {"carol@example.org/lap"}
    come(links, "carol@example.org/desk")
    assert online(links) == {"carol@example.org/lap", "carol@example.org/desk"}
    sender = Sender("lap", "desk")
    assert await send(links, sender, "carol@example.org/desk") == "sent"
    assert await send(links, sender, "carol@example.org/lap") == "delivered"
    assert sender.tried == ["desk", "lap"]


async def test_the_receiver_hears_which_clients_of_its_peers_are_there(links: Links) -> None:
    come(links, "bob@example.org/tv")
    assert links.receiver._is_there(JID.parse("bob@example.org/tv"))
    assert not links.receiver._is_there(JID.parse("bob@example.org/pc"))


async def test_the_sender_waits_for_an_answer_as_long_as_is_configured(
    tmp_path: Path, links: Links
) -> None:
    text = f"{CONFIG}[transfer]\nanswer_timeout = 600\n"
    config = parse(text, where=str(tmp_path / "config.toml"), environ={"HOME": str(tmp_path)})
    others = Links(config, "resource", Transfers())
    assert [each.make_sender(None)._answer_timeout for each in (links, others)] == [180, 600]


@pytest.mark.parametrize("folder", ["", "photos"])
async def test_what_arrived_is_known_after_a_restart_wherever_it_lies(
    links: Links, folder: str
) -> None:
    """The inbox as well: a receipt that was lost must not cost the whole file again."""
    inbox = Inbox(root=links.config.state_dir, folder=folder)
    known = Known(
        peer=JID.parse("bob@example.org"),
        identity=FileIdentity(size=3, mtime_ns=4, inode=5),
        source_size=3,
        source_mtime_ns=6,
        digest=bytes(range(32)),
    )
    async with remembering(links):
        await links._arriving(Arriving(inbox=inbox, path="a", known=known))
        beside = Arriving(inbox=inbox, path="a.conflict", known=known, source_path="a")
        await links._arriving(beside)
    async with remembering(links):
        assert await links._known(inbox, "a") == known
        assert await links._known(inbox, "b") is None
        assert await links._beside(inbox, "a") == [Present(path="a.conflict", known=known)]
        other = Inbox(root=inbox.root, folder="other")
        assert await links._known(other, "a") is None
        assert await links._beside(other, "a") == []
