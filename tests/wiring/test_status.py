"""A real engine on real folders, a client that mostly never runs, a real configuration."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import memory_stream_pair

import syncd
from syncd import config as configuration
from syncd.control.messages import (
    LimitRequest,
    LimitStatus,
    SendRequest,
    Standing,
    decode_reply,
    encode_reply,
)
from syncd.errors import (
    AuthenticationError,
    DeclinedError,
    NotFoundError,
    OfflineError,
    RemoteProtocolError,
    StreamError,
    SyncdError,
)
from syncd.link import connect
from syncd.link.connect import Connection
from syncd.link.resolve import Target
from syncd.sync.engine import Engine, FolderRule, Sent
from syncd.sync.journal import open_journal
from syncd.sync.limits import Limits, Rates
from syncd.transfer.pump import Progress
from syncd.trust.pins import Policy
from syncd.trust.signing import Identity
from syncd.wiring import status as status_module
from syncd.wiring.keys import PeerKeys
from syncd.wiring.links import FEATURES, IDENTITY, Links
from syncd.wiring.status import SLOW_DISK, Reporter, Transfers
from syncd.xmpp.disco import make_info
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import NS_CLIENT, make
from tests.support.wire import LAPTOP, open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from syncd.config import Config
    from syncd.control.messages import PeerStatus, Status
    from syncd.link.client import Client
    from syncd.sync.plan import Delivery

NOW = 2_000_000_000.0  # seconds since 1970, in 2033: the engine's clock
PATIENCE = 60.0  # seconds

CONFIG = """
[account]
jid = "alice@example.org"
password = "secret"
{account}
[state]
dir = "{home}/state"
[control]
socket = "{home}/control.sock"
[[folder]]
id = "photos"
path = "{home}/photos"
send_to = ["bob@example.org", "carol@example.org/desk"]
accept_from = ["carol@example.org", "dave@example.org"]
settle = 3600
[[folder]]
id = "music"
path = "{home}/music"
accept_from = ["bob@example.org", "erin@example.org"]
settle = 3600
[inbox]
path = "{home}/inbox"
accept_from = ["dave@example.org", "frank@example.org"]
"""


def parse(home: Path, account: str = "") -> Config:
    text = CONFIG.format(home=home, account=account)
    return configuration.parse(text, where=str(home / "config.toml"), environ={})


@dataclass
class World:
    """A reporter and all that it asks."""

    home: Path
    client: Client
    engine: Engine
    transfers: Transfers
    reporter: Reporter

    async def until(self, true: Callable[[Status], object]) -> Status:
        with trio.fail_after(PATIENCE):
            while not true(status := await self.reporter.status()):  # noqa: ASYNC110 - a status tells nobody of a change
                await trio.sleep(0.005)
        return status

    def drop(self, path: str, content: bytes = b"x") -> None:
        """Rename a file into a folder; it was written a while ago."""
        made = self.home / "being-made"
        made.write_bytes(content)
        os.utime(made, (time.time() - 60, time.time() - 60))
        made.rename(self.home / path)

    def arrive(self, jid: str) -> None:
        """Let a peer's syncd come online."""
        contacts = self.client.contacts
        contacts.presence_received(make(f"{{{NS_CLIENT}}}presence", {"from": jid}))
        resource = contacts.unknown(JID.parse(jid))
        assert resource is not None
        contacts.info_received(resource, make_info(IDENTITY, FEATURES))


@contextlib.asynccontextmanager
async def reporting(
    home: Path, *outcomes: SyncdError | Sent, account: str = ""
) -> AsyncIterator[World]:
    """Report on folders that are watched; `outcomes` are those of the deliveries."""
    config = parse(home, account)
    for folder in config.folders:
        folder.path.mkdir(exist_ok=True)
    left = list(outcomes)

    async def send(_: Delivery) -> Sent:
        outcome = left.pop(0)
        if isinstance(outcome, Sent):
            return outcome
        raise outcome

    async with open_journal(config.state_dir) as journal, trio.open_nursery() as nursery:
        rules = [
            FolderRule(
                id=folder.id,
                path=folder.path,
                send_to=tuple(str(peer) for peer in folder.send_to),
                settle=folder.settle,
            )
            for folder in config.folders
        ]
        engine = Engine(journal, rules, send, limit_of=lambda _: 1, places=8, clock=lambda: NOW)
        transfers = Transfers()
        limits = Limits(Rates(up=1 << 20), {}, lambda peer, rates: None)
        keys = PeerKeys(
            Identity.generate(),
            config.account.jid.bare,
            journal.pins,
            [],
            Policy.PREFERRED,
            decided=engine.decided,
            against=lambda _: None,
            replace=trio.sleep_forever,
        )
        links = Links(config, "syncd-1", transfers)
        links.engine, client = engine, links.client
        await nursery.start(engine.run)
        await engine.rescan()  # so that it watches
        yield World(
            home,
            client,
            engine,
            transfers,
            Reporter(config, client, engine, transfers, limits, keys, links.proxies),
        )
        nursery.cancel_scope.cancel()


def peer(status: Status, jid: str) -> PeerStatus:
    [found] = [each for each in status.peers if each.jid == jid]
    return found


# --- Folders and peers


async def test_everything_that_is_configured_is_shown(tmp_path: Path) -> None:
    async with reporting(tmp_path) as world:
        status = await world.reporter.status()
    photos, music = status.folders
    assert (photos.id, photos.path) == ("photos", str(tmp_path / "photos"))
    assert photos.send_to == ("bob@example.org", "carol@example.org/desk")
    assert photos.accept_from == ("carol@example.org", "dave@example.org")
    assert (music.id, music.send_to) == ("music", ())
    assert status.version == syncd.__version__
    assert timedelta(0) <= datetime.now(UTC) - status.started < timedelta(minutes=10)
    assert (status.transfers, status.errors) == ((), ())


async def test_each_peer_is_shown_once_and_those_who_are_sent_to_come_first(
    tmp_path: Path,
) -> None:
    """Carol, whose resource is fixed for sending, is not another one for accepting."""
    async with reporting(tmp_path) as world:
        status = await world.reporter.status()
    assert [each.jid for each in status.peers] == [
        "bob@example.org", "carol@example.org/desk",
        "dave@example.org", "erin@example.org", "frank@example.org",
    ]  # fmt: skip
    assert {(each.online, each.resource, each.pending) for each in status.peers} == {
        (False, "", 0)
    }


async def test_a_peer_is_online_when_a_client_of_it_takes_files(tmp_path: Path) -> None:
    async with reporting(tmp_path) as world:
        world.arrive("bob@example.org/syncd-1")
        status = await world.reporter.status()
    bob, carol = peer(status, "bob@example.org"), peer(status, "carol@example.org/desk")
    assert (bob.online, bob.resource) == (True, "syncd-1")
    assert (carol.online, carol.resource) == (False, "")


async def test_what_is_owed_is_counted_by_file_and_by_delivery(tmp_path: Path) -> None:
    async with reporting(tmp_path) as world:
        world.drop("photos/a", b"12345")
        world.drop("photos/b", b"1234567")
        status = await world.until(lambda now: now.folders[0].pending == 2)
    assert (status.folders[0].files, status.folders[1].pending) == (2, 0)
    bob, carol = peer(status, "bob@example.org"), peer(status, "carol@example.org/desk")
    assert (bob.pending, bob.pending_bytes, bob.delivered) == (2, 12, 0)
    assert (carol.pending, carol.pending_bytes) == (2, 12)
    assert status.state == "waiting"


async def test_what_only_arrives_is_no_file_still_being_written(tmp_path: Path) -> None:
    """Nothing of a folder that sends to nobody is waited for."""
    async with reporting(tmp_path) as world:
        for folder in ("photos", "music"):
            (tmp_path / folder / "growing").write_bytes(b"x")
        await world.engine.rescan()
        status = await world.reporter.status()
    assert [folder.settling for folder in status.folders] == [1, 0]
    assert [folder.files for folder in status.folders] == [1, 1]
    assert [folder.scanning for folder in status.folders] == [False, False]


async def test_a_folder_that_is_gone_is_a_problem_with_advice(tmp_path: Path) -> None:
    async with reporting(tmp_path) as world:
        (tmp_path / "music").rmdir()
        await world.engine.rescan()
        status = await world.reporter.status()
    photos, music = status.folders
    assert photos.problem == ""
    assert music.problem == f"{tmp_path / 'music'} is gone or was replaced"
    assert music.hint.startswith("is its disk mounted?")
    assert status.state == "problem"
    assert status.summary.startswith(f"PROBLEM: folder music: {music.problem}; {music.hint}")


# --- Deliveries


async def test_what_was_delivered_and_what_was_only_sent_is_counted(tmp_path: Path) -> None:
    outcomes = [Sent("delivered", "d1"), Sent("sent", "d2"), Sent("delivered", "d3")]
    async with reporting(tmp_path, *outcomes) as world:
        world.engine.set_online(frozenset({"bob@example.org"}))
        for number in range(3):
            world.drop(f"photos/{number}")
        status = await world.until(
            lambda now: (
                peer(now, "bob@example.org").pending == 0
                and peer(now, "carol@example.org/desk").pending == 3
            )
        )
    bob = peer(status, "bob@example.org")
    assert (bob.delivered, bob.sent, bob.last_error) == (2, 1, "")


async def test_a_refusal_is_a_problem_of_its_peer_and_among_the_errors(tmp_path: Path) -> None:
    refusal = DeclinedError("bob does not want it [forbidden]", hint="ask bob")
    async with reporting(tmp_path, refusal) as world:
        world.engine.set_online(frozenset({"bob@example.org"}))
        world.drop("photos/a")
        status = await world.until(lambda now: peer(now, "bob@example.org").parked)
    bob = peer(status, "bob@example.org")
    assert (bob.pending, bob.parked) == (1, 1)
    assert bob.last_error == "bob does not want it [forbidden]"
    assert bob.problem == "1 file cannot be delivered: bob does not want it [forbidden]"
    assert (bob.hint, bob.next_try) == ("ask bob", None)
    [error] = status.errors
    assert (error.peer, error.folder, error.path) == ("bob@example.org", "photos", "a")
    assert (error.text, error.hint) == ("bob does not want it [forbidden]", "ask bob")
    assert error.time == datetime.fromtimestamp(NOW, UTC)
    assert status.state == "problem"
    assert "ask bob" in status.summary


async def test_an_error_that_passes_by_itself_is_no_problem(tmp_path: Path) -> None:
    async with reporting(tmp_path, OfflineError("bob went offline")) as world:
        world.engine.set_online(frozenset({"bob@example.org"}))
        world.drop("photos/a")
        status = await world.until(lambda now: peer(now, "bob@example.org").last_error)
    bob = peer(status, "bob@example.org")
    assert (bob.last_error, bob.problem, bob.hint) == ("bob went offline", "", "")
    assert bob.next_try is not None
    assert bob.next_try > datetime.fromtimestamp(NOW, UTC)
    assert status.state == "waiting"


async def test_what_cannot_be_sent_is_among_the_errors(tmp_path: Path) -> None:
    """Its name, which is no text, can be told all the same."""
    async with reporting(tmp_path) as world:
        (tmp_path / "photos" / "caf\udce9").write_bytes(b"x")
        await world.engine.rescan()
        status = await world.reporter.status()
    [error] = status.errors
    assert (error.folder, error.path) == ("photos", "caf\udce9")
    assert error.text == "not sent: the name is no valid UTF-8"
    assert error.hint == "rename it, or give syncd access to it"
    told = decode_reply(encode_reply(status))
    assert isinstance(told, type(status))
    assert told.errors[0].text == error.text


# --- The connection


@pytest.mark.parametrize(
    ("problem", "state"),
    [
        (None, "connecting"),
        (OfflineError("no route to host"), "offline"),
        (StreamError("conflict"), "offline"),
        (AuthenticationError("the password is wrong", hint="change it"), "unauthorized"),
        (RemoteProtocolError("the server speaks HTTP", hint="look at the port"), "refused"),
    ],
)
async def test_why_there_is_no_connection_is_told(
    tmp_path: Path, problem: SyncdError | None, state: str
) -> None:
    async with reporting(tmp_path) as world:
        world.client.problem = problem
        connection = (await world.reporter.status()).connection
    assert (connection.state, connection.reason, connection.hint) == (
        state, str(problem or ""), problem.hint if problem else "",
    )  # fmt: skip
    assert (connection.jid, connection.server) == ("alice@example.org", "example.org")
    assert connection.since == datetime.fromtimestamp(world.client.since, UTC)


async def test_the_server_is_shown_as_configured(tmp_path: Path) -> None:
    async with reporting(tmp_path, account='server = "[::1]:5222"') as world:
        assert (await world.reporter.status()).connection.server == "[::1]:5222"


async def test_once_connected_the_full_jid_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _theirs = memory_stream_pair()

    async def connected(*_: object) -> Connection:
        await trio.lowlevel.checkpoint()
        return Connection(ours, open_stream(), [], Target("node7.example.org", 5223, True))

    monkeypatch.setattr(connect, "connect", connected)
    async with reporting(tmp_path) as world, trio.open_nursery() as nursery:
        world.client.problem = OfflineError("it was so until now", hint="wait")
        nursery.start_soon(world.client.run)
        status = await world.until(lambda now: now.connection.state == "connected")
        assert status.connection.jid == str(LAPTOP)
        # Not the domain: which of its servers it is says more.
        assert status.connection.server == "node7.example.org:5223"
        assert (status.connection.reason, status.connection.hint) == ("", "")
        assert status.state == "ok"
        nursery.cancel_scope.cancel()


# --- Transfers


def test_a_transfer_is_shown_for_as_long_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    transfers, first, second = Transfers(), Progress(0), Progress(50)
    with transfers.watch(
        "send", peer="bob@example.org/pc", folder="photos", path="a", size=9_000, progress=first
    ):
        with transfers.watch(
            "receive", peer="carol@example.org/x", folder="", path="b", size=50, progress=second
        ):
            sending, receiving = transfers.snapshot()
            assert (sending.direction, sending.peer) == ("send", "bob@example.org/pc")
            assert (sending.folder, sending.path, sending.size) == ("photos", "a", 9_000)
            assert (sending.offset, sending.rate) == (0, 0)
            assert (receiving.direction, receiving.offset) == ("receive", 50)
        [sending] = transfers.snapshot()
        assert sending.path == "a"
    assert transfers.snapshot() == ()


def test_a_transfer_that_fails_is_not_shown_any_more() -> None:
    transfers = Transfers()

    def fail() -> None:
        with transfers.watch(
            "send", peer="b@c/d", folder="f", path="p", size=1, progress=Progress()
        ):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fail()
    assert transfers.snapshot() == ()


def test_the_rate_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the whole time; and what was there when it began was not sent by it."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    transfers, progress = Transfers(), Progress(1_000_000)

    def rate(seconds: float, offset: int) -> int:
        nonlocal now
        now += seconds
        progress.offset = offset
        [transfer] = transfers.snapshot()
        return transfer.rate

    with transfers.watch(
        "send", peer="b@c/d", folder="f", path="p", size=10**7, progress=progress
    ):
        assert rate(0, 1_000_000) == 0
        assert rate(1, 1_000_500) == 500
        assert rate(3, 1_004_000) == 1_000
        # Quiet from now on; after a few seconds that is all that counts.
        assert rate(3, 1_004_000) < 1_000
        assert rate(3, 1_004_000) == 0
        assert rate(4, 1_012_000) > 0


# --- Limits, and files outside any folder


async def test_limits_in_force_are_shown_and_changed(tmp_path: Path) -> None:
    async with reporting(tmp_path) as world:
        before = await world.reporter.status()
        changed = [
            world.reporter.limit(LimitRequest(down=4096)),
            world.reporter.limit(LimitRequest(peer="bob@example.org", up=2048)),
            # By its bare JID, though it is configured with a resource.
            world.reporter.limit(LimitRequest(peer="carol@example.org", up=1024)),
        ]
        after = await world.reporter.status()
        with pytest.raises(NotFoundError, match=r"names no peer eve@example\.org"):
            world.reporter.limit(LimitRequest(peer="eve@example.org", up=1024))
        with pytest.raises(NotFoundError, match="is no JID"):
            world.reporter.limit(LimitRequest(peer="@", up=1024))
    assert before.limit == LimitStatus(up=1 << 20)
    assert [(each.peer, each.limit) for each in changed] == [
        ("", LimitStatus(up=1 << 20, down=4096)),
        ("bob@example.org", LimitStatus(up=2048)),
        ("carol@example.org", LimitStatus(up=1024)),
    ]
    assert after.limit == LimitStatus(up=1 << 20, down=4096)
    assert peer(after, "bob@example.org").limit == LimitStatus(up=2048)
    assert peer(after, "carol@example.org/desk").limit == LimitStatus(up=1024)


async def test_a_file_outside_any_folder_is_owed_and_counted(tmp_path: Path) -> None:
    letter = tmp_path / "letter.pdf"
    letter.write_bytes(b"12345")
    async with reporting(tmp_path) as world:
        standing = await world.reporter.send(
            SendRequest(path=str(letter), peer="bob@example.org")
        )
        status = await world.reporter.status()
        with pytest.raises(NotFoundError):
            await world.reporter.send(SendRequest(path="/nowhere", peer="bob@example.org"))
    assert standing == Standing(state="pending", online=False)
    assert peer(status, "bob@example.org").pending_bytes == 5
    assert status.state == "waiting"


async def test_directories_that_nobody_watches_are_among_the_errors(tmp_path: Path) -> None:
    async with reporting(tmp_path) as world:
        world.engine._folders["photos"].unwatched = True
        [error] = (await world.reporter.status()).errors
    assert (error.folder, error.text) == (
        "photos",
        "the kernel watches no more directories (fs.inotify.max_user_watches); "
        "what changes in some is found within 10 min",
    )
    assert error.hint.startswith("run: sysctl fs.inotify.max_user_watches=")


async def test_a_disk_that_does_not_answer_is_among_the_errors(tmp_path: Path) -> None:
    async with reporting(tmp_path) as world:
        statistics = await world.engine.statistics()
        slow = replace(statistics, counted=SLOW_DISK + 2)
        [error] = status_module._errors(slow)
        status = await world.reporter.status()
    assert error.text == "the disk of the state directory has not answered for 12 s"
    assert status.errors == ()
    assert status.counted is not None
    assert timedelta(0) <= datetime.now(UTC) - status.counted < timedelta(minutes=10)
