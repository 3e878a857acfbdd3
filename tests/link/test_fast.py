"""Logins by SASL2, Bind 2 and tokens: our client against the demo server, over real TLS."""

from __future__ import annotations

import stat
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from syncd.demo.login import EVERYTHING, Abilities
from syncd.demo.server import Server, open_server
from syncd.errors import AuthenticationError
from syncd.link import connect, keyring, retry
from syncd.link.client import Client
from syncd.link.connect import Account, Connection, Tokens
from syncd.link.contacts import Contacts
from syncd.xmpp.disco import PING, Identity
from syncd.xmpp.jid import JID
from syncd.xmpp.login import NS_FAST, NS_SASL2
from syncd.xmpp.stanza import MESSAGE
from syncd.xmpp.stream import StanzaReceived, StreamEnded
from syncd.xmpp.xml import make
from tests.support.rawclient import log_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from syncd.demo.faults import Faults
    from syncd.xmpp.sm import StreamManagement

ACCOUNT = JID.parse("alice@demo.example")
AGENT = "d4565fa7-4d72-4749-b3d3-740edbf87770"
DAY = 86_400.0  # seconds
PATIENCE = 10.0  # seconds; only ends a test that hangs


@dataclass
class World:
    """A server that can everything, and what the client keeps on its disk."""

    server: Server
    account: Account
    state_dir: Path

    @asynccontextmanager
    async def login(
        self, resume: StreamManagement | None = None, **changes: object
    ) -> AsyncIterator[Connection]:
        account = replace(self.account, **changes)  # type: ignore[arg-type]  # of many types
        with trio.fail_after(PATIENCE):
            connection = await connect.connect(account, resume)
        try:
            yield connection
        finally:
            await trio.aclose_forcefully(connection.transport)

    async def mechanism(self, **changes: object) -> str:
        """Log in once, and tell by what."""
        async with self.login(**changes) as connection:  # type: ignore[arg-type]  # see above
            return connection.stream.mechanism

    def secret(self) -> str | None:
        """What the token that is kept holds."""
        token = keyring.read_token(self.state_dir, ACCOUNT)
        return token.secret if token else None


@asynccontextmanager
async def open_world(
    directory: Path, abilities: Abilities = EVERYTHING, faults: Faults | None = None
) -> AsyncIterator[World]:
    accounts = {"alice": "pw-a", "bob": "pw-b"}
    async with open_server(accounts=accounts, abilities=abilities, faults=faults) as server:
        ca_file = directory / "ca.pem"
        ca_file.write_bytes(server.ca_pem)
        account = Account(
            jid=ACCOUNT,
            password=lambda: "pw-a",
            server=("127.0.0.1", server.port),
            ca_file=ca_file,
            agent=AGENT,
            tokens=Tokens(
                partial(keyring.read_token, directory, ACCOUNT),
                partial(keyring.write_token, directory),
            ),
        )
        yield World(server, account, directory)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as running:
        yield running


async def received(connection: Connection, count: int) -> list[str]:
    """The ids of the next messages."""
    events, ids = list(connection.early), []
    with trio.fail_after(PATIENCE):
        while True:
            for event in events:
                assert not isinstance(event, StreamEnded), event
                if isinstance(event, StanzaReceived) and event.stanza.tag == MESSAGE:
                    ids.append(event.stanza.get("id", ""))
            if len(ids) >= count:
                return ids
            data = await connect.read(connection.transport)
            events = connection.stream.receive_data(data)


# Tokens


async def test_the_first_login_binds_inside_and_leaves_a_token(world: World) -> None:
    async with world.login() as connection:
        stream = connection.stream
        assert (stream.mechanism, stream.sasl2) == ("SCRAM-SHA-256-PLUS", True)
        assert stream.jid.resource.startswith("syncd/")
        assert stream.sm is not None
        assert stream.sm.id != ""
    token = keyring.read_token(world.state_dir, ACCOUNT)
    assert token is not None
    assert (token.account, token.mechanism) == (str(ACCOUNT), "HT-SHA-256-ENDP")
    assert stat.S_IMODE((world.state_dir / "token").stat().st_mode) == 0o600


async def test_the_next_login_is_by_the_token_and_has_the_same_address(world: World) -> None:
    async with world.login() as first:
        jid = first.stream.jid
    secret = world.secret()
    async with world.login() as second:
        assert second.stream.mechanism == "HT-SHA-256-ENDP"
        assert second.stream.jid == jid
        assert second.stream.sm is not None
    assert world.secret() == secret


async def test_a_token_that_is_old_is_renewed_without_asking(world: World) -> None:
    await world.mechanism()
    first = world.secret()
    world.server.faults.clock_ahead = 2 * DAY
    assert await world.mechanism() == "HT-SHA-256-ENDP"
    second = world.secret()
    assert second not in (None, first)
    assert await world.mechanism() == "HT-SHA-256-ENDP"


async def test_a_new_token_that_never_arrived_takes_nothing_away(world: World) -> None:
    """The server keeps the old one until the new one is used."""
    await world.mechanism()
    old = keyring.read_token(world.state_dir, ACCOUNT)
    world.server.faults.clock_ahead = 2 * DAY
    await world.mechanism()
    keyring.write_token(world.state_dir, old)
    assert await world.mechanism() == "HT-SHA-256-ENDP"
    await world.mechanism()
    keyring.write_token(world.state_dir, old)
    assert await world.mechanism() == "SCRAM-SHA-256-PLUS"


async def test_an_expired_token_gives_way_to_the_password_on_the_same_stream(
    world: World,
) -> None:
    await world.mechanism()
    first = world.secret()
    world.server.faults.clock_ahead = 22 * DAY
    assert await world.mechanism() == "SCRAM-SHA-256-PLUS"
    assert world.secret() not in (None, first)


async def test_a_token_that_we_know_is_over_is_not_tried(world: World) -> None:
    await world.mechanism()
    token = keyring.read_token(world.state_dir, ACCOUNT)
    assert token is not None
    past = replace(token, expires=token.expires.replace(year=2020))
    keyring.write_token(world.state_dir, past)
    assert await world.mechanism() == "SCRAM-SHA-256-PLUS"


async def test_a_revoked_token_is_dropped_and_the_next_login_asks_for_another(
    world: World, tmp_path: Path
) -> None:
    await world.mechanism()
    async with open_world(tmp_path) as other:  # which has given out none
        assert await other.mechanism() == "SCRAM-SHA-256-PLUS"
        assert other.secret() is None
        assert await other.mechanism() == "SCRAM-SHA-256-PLUS"
        assert await other.mechanism() == "HT-SHA-256-ENDP"


async def test_a_wrong_password_behind_a_dead_token_drops_the_token(world: World) -> None:
    await world.mechanism()
    world.server.faults.clock_ahead = 22 * DAY
    with pytest.raises(AuthenticationError, match="not-authorized"):
        await world.mechanism(password=lambda: "wrong")
    assert world.secret() is None


async def test_a_server_that_cannot_just_now_takes_no_token_away(world: World) -> None:
    await world.mechanism()
    first = world.secret()
    world.server.faults.refuse_login = "temporary-auth-failure"
    with pytest.raises(Exception, match="temporary-auth-failure"):
        await world.mechanism()
    assert world.secret() == first


async def test_who_keeps_no_tokens_asks_for_none(world: World) -> None:
    assert await world.mechanism(tokens=None) == "SCRAM-SHA-256-PLUS"
    assert world.secret() is None


async def test_a_server_without_tokens_gets_the_password(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.mechanism()
        world.server.faults.hidden = frozenset({NS_FAST})
        first = world.secret()
        assert await world.mechanism() == "SCRAM-SHA-256-PLUS"
        assert world.secret() == first


async def test_a_login_that_binds_takes_no_token_that_does_not(world: World) -> None:
    world.server.faults.hidden = frozenset({"HT-SHA-256-ENDP"})
    assert await world.mechanism() == "SCRAM-SHA-256-PLUS"
    assert world.secret() is None


async def test_where_nothing_binds_a_token_without_is_better_than_none(tmp_path: Path) -> None:
    abilities = replace(EVERYTHING, bindings=(), tokens=("HT-SHA-256-NONE",))
    async with open_world(tmp_path, abilities) as world:
        assert await world.mechanism() == "SCRAM-SHA-256"
        assert await world.mechanism() == "HT-SHA-256-NONE"


async def test_a_token_may_be_used_only_as_it_was_asked_for(world: World) -> None:
    """The server's side of it: a man in the middle cannot loosen the token's binding."""
    await world.mechanism()
    token = keyring.read_token(world.state_dir, ACCOUNT)
    assert token is not None
    keyring.write_token(world.state_dir, replace(token, mechanism="HT-SHA-256-NONE"))
    hidden = frozenset({"HT-SHA-256-ENDP", "SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS"})
    world.server.faults.hidden = hidden | {"tls-server-end-point"}
    with pytest.raises(AuthenticationError):
        await world.mechanism()
    assert world.secret() is None


# Resumption


@pytest.mark.parametrize("abilities", [EVERYTHING, Abilities(managed=True)])
async def test_a_broken_session_is_resumed_and_nothing_is_lost(
    tmp_path: Path, abilities: Abilities
) -> None:
    async with open_world(tmp_path, abilities) as world, world.login() as first:
        stream = first.stream
        if stream.sm is None or not stream.sm.id:
            await connect.write(first.transport, stream)
            stream.receive_data(await connect.read(first.transport))
        assert stream.sm is not None
        sm, jid = stream.sm, stream.jid
        async with log_in(
            world.server.port, world.server.ca_pem, "bob@demo.example/b", "pw-b"
        ) as bob:
            await bob.write(f"<message to='{jid}' id='1'/>")
            assert await received(first, 1) == ["1"]
            await trio.aclose_forcefully(first.transport)
            await bob.write("".join(f"<message to='{jid}' id='{n}'/>" for n in "234"))
            await bob.forget()
            stream.send_later(make(MESSAGE, {"to": "bob@demo.example/b", "id": "back"}))
            async with world.login(sm) as second:
                assert second.stream.sm is sm
                assert second.stream.jid == jid
                await connect.write(second.transport, second.stream)
                assert await received(second, 3) == ["2", "3", "4"]
                back = await bob.until(lambda e: e.get("id") == "back")
                assert back.get("from") == str(jid)


async def test_a_session_is_resumed_while_the_server_thinks_it_is_alive(world: World) -> None:
    async with world.login() as first:
        assert first.stream.sm is not None
        async with world.login(first.stream.sm) as second:
            assert second.stream.sm is first.stream.sm
            assert len(world.server.sessions) == 1
            events = first.stream.receive_data(await connect.read(first.transport))
            ended = [event for event in events if isinstance(event, StreamEnded)]
            assert "conflict" in str(ended[-1].error)


async def test_a_forgotten_session_is_bound_anew_in_the_same_login(world: World) -> None:
    async with world.login() as first:
        sm = first.stream.sm
        assert sm is not None
    world.server.faults.forget_sessions = True
    async with world.login(sm) as second:
        assert second.stream.sm is not sm
        assert sm.id == ""
        assert second.stream.jid == sm.jid


async def test_a_resource_that_the_user_chose_takes_the_old_way(world: World) -> None:
    jid = ACCOUNT.with_resource("laptop")
    async with world.login(jid=jid, agent="") as connection:
        assert (connection.stream.jid, connection.stream.sasl2) == (jid, False)


# Somebody between


PLUS = {"SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS"}


@pytest.mark.parametrize(
    ("hidden", "changes", "words"),
    [
        ({NS_SASL2}, {"sasl2": True}, "SASL2 .* before"),
        (
            {"SCRAM-SHA-256", *PLUS, "tls-server-end-point"},
            {"least": "SCRAM-SHA-256"},
            "by SCRAM-SHA-256 before",
        ),
        (PLUS, {}, "lists channel bindings but no mechanism"),
        ({"tls-server-end-point"}, {}, "channel binding but not for which"),
        (
            {*PLUS, "tls-server-end-point"},
            {"least": "SCRAM-SHA-256-PLUS"},
            "by SCRAM-SHA-256-PLUS before",
        ),
        ({*PLUS, "tls-server-end-point"}, {}, "refused the login"),
        ({"SCRAM-SHA-1"}, {}, "was changed on its way"),
        ({"SCRAM-SHA-256-PLUS"}, {}, "was changed on its way"),
        ({NS_SASL2, "SCRAM-SHA-1"}, {}, "was changed on its way"),
    ],
)
async def test_who_weakens_the_offer_is_found_out(
    world: World, hidden: set[str], changes: dict[str, object], words: str
) -> None:
    world.server.faults.hidden = frozenset(hidden)
    with pytest.raises(AuthenticationError, match=words):
        await world.mechanism(**changes)


async def test_a_token_is_never_shown(world: World) -> None:
    await world.mechanism()
    token = keyring.read_token(world.state_dir, ACCOUNT)
    assert token is not None
    async with world.login() as connection:
        shown = repr((token, world.account, connection, connection.stream.token))
    assert "HT-SHA-256-ENDP" in shown
    assert token.secret not in shown


# The client that stays online


class Watched:
    """A client, and what it has told."""

    def __init__(self, account: Account) -> None:
        self.pins: list[tuple[str, bool]] = []
        self.jids: list[JID] = []  # one after the other
        self._change = trio.Event()
        self.client = Client(
            account,
            Contacts({}, required=frozenset(), preferred=""),
            identity=Identity("client", "bot", "syncd"),
            version="1",
            features=frozenset(),
            handlers={},
            changed=self._changed,
            logged_in=lambda *pin: self.pins.append(pin),
        )

    def _changed(self) -> None:
        jid = self.client.jid
        if jid is not None and jid not in self.jids:
            self.jids.append(jid)
        self._change.set()
        self._change = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._change.wait()


async def test_the_client_comes_back_by_its_token_and_resumes(world: World) -> None:
    watched = Watched(world.account)
    client, until = watched.client, watched.until
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await client.wait_online()
            jid = client.jid
            assert jid is not None
            await world.server.until(lambda: any(s.presence for s in world.server.sessions))
            world.server.cut(jid)
            await until(lambda: not client.connected)
            await until(lambda: client.connected)
            assert client.jid == jid
            assert len(world.server.sessions) == 1
            nursery.cancel_scope.cancel()
    assert watched.pins == [("SCRAM-SHA-256-PLUS", True)]


async def test_of_two_copies_of_one_installation_one_becomes_another(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an image with all its state: with Bind 2 both were the same resource for ever."""
    monkeypatch.setattr(retry, "BACK_OFF_LAST", 0.2)
    monkeypatch.setattr(retry, "BACK_OFF_LOGIN_LAST", 0.2)
    await world.mechanism()  # the one installation that is copied, with its token
    copies = [tmp_path / "one", tmp_path / "two"]
    for copy in copies:
        copy.mkdir()
        keyring.write_agent(copy, AGENT)
        keyring.write_token(copy, keyring.read_token(world.state_dir, ACCOUNT))
    one, two = (Watched(living_in(world.account, copy)) for copy in copies)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.client.run)
            await one.client.wait_online()
            nursery.start_soon(two.client.run)
            await two.client.wait_online()
            await one.until(lambda: len(one.jids) > 1 and one.client.connected)
            for watched in (one, two):
                assert (await watched.client.request("get", None, make(PING))).type == "result"
            assert len(world.server.sessions) == 2
            nursery.cancel_scope.cancel()
    assert two.jids == one.jids[:1]
    assert keyring.read_agent(copies[0]) != AGENT == keyring.read_agent(copies[1])
    # A token of the old agent would have been refused, and counted as a failed login: so the
    # second login of the one is by the password alone.
    assert one.pins == [("", True), ("SCRAM-SHA-256-PLUS", True)]
    assert two.pins == [("", True)]
    tokens = [keyring.read_token(copy, ACCOUNT) for copy in copies]
    assert None not in tokens
    assert tokens[0] != tokens[1]


def living_in(account: Account, state_dir: Path) -> Account:
    """The account of an installation with this state directory."""
    return replace(
        account,
        agent=keyring.read_agent(state_dir),
        keep_agent=partial(keyring.write_agent, state_dir),
        tokens=Tokens(
            partial(keyring.read_token, state_dir, ACCOUNT),
            partial(keyring.write_token, state_dir),
        ),
    )
