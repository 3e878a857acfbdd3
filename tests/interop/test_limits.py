"""Servers that limit how much, and how fast, their clients send."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from syncd.errors import OfflineError, StanzaError, StreamError
from syncd.link import session
from syncd.xmpp.stanza import LEAST_MAX_BYTES
from syncd.xmpp.xml import make
from tests.support import servers
from tests.support.couple import PATIENCE, QUERY, together

if TYPE_CHECKING:
    from pathlib import Path

# No stanza longer than this; for Prosody it counts as well what is read with it.
_SIZE = {
    "prosody": [("daemonize", f"c2s_stanza_size_limit = {LEAST_MAX_BYTES}\n")],
    "ejabberd": [("    access: all", f"    max_stanza_size: {LEAST_MAX_BYTES}\n")],
}

RATE = 8_000  # bytes/s
BURST = 2 * RATE  # bytes

# Far more than the burst.
QUESTIONS = 80

_RATE = {
    "prosody": [
        (
            "daemonize",
            f'limits = {{ c2s = {{ rate = "{RATE // 1000}kb/s"; burst = "2s" }} }}\n',
        ),
        ('"smacks"', '"limits"; '),
    ],
    "ejabberd": [
        ("    access: all", "    shaper: c2s_shaper\n"),
        (
            "listen:",
            f"shaper: {{slow: {{rate: {RATE}, burst_size: {BURST}}}}}\n"
            "shaper_rules: {c2s_shaper: {slow: all}}\n",
        ),
    ],
}


async def test_a_stanza_that_is_too_long_for_a_server_is_not_sent(
    kind: str, tmp_path: Path
) -> None:
    """Neither of them says what it takes, so it is what every server must take."""
    with servers.configured(kind, tmp_path, _SIZE[kind]) as server:
        async with together(server) as couple:
            client, peer = couple.alice.client, couple.bob.client.jid
            since = client.since
            empty = len(b"<query xmlns='urn:syncd:test'></query>")
            with pytest.raises(StanzaError, match="need not take more than 10000"):
                await client.request("get", peer, make(QUERY, text="x" * LEAST_MAX_BYTES))
            # As long as can be: the rest is what is around it, and the server adds an address.
            longest = make(QUERY, text="x" * (LEAST_MAX_BYTES - empty - 300))
            answer = await client.request("get", peer, longest, PATIENCE)
            assert (answer.type, client.since) == ("result", since)


async def test_a_server_that_has_been_sent_too_much_is_quoted_and_left_in_peace(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with servers.configured(kind, tmp_path, _SIZE[kind]) as server:
        async with together(server) as couple:
            # Bob's, because the gate may hang up before the server's last words are through.
            client, peer = couple.bob.client, couple.alice.client.jid
            # As if it took more than it does; it can only be told of that by ending the stream.
            monkeypatch.setattr("syncd.xmpp.stanza.LEAST_MAX_BYTES", 10 * LEAST_MAX_BYTES)
            with pytest.raises(OfflineError, match="ended before the answer came"):
                await client.request(
                    "get", peer, make(QUERY, text="x" * 5 * LEAST_MAX_BYTES), PATIENCE
                )
            await couple.bob.until(lambda: client.problem is not None)
            problem = client.problem
            assert isinstance(problem, StreamError)
            assert problem.condition == "policy-violation"
            assert "limits how much" in problem.hint
            assert client.jid is None
            # The peer has nothing to do with it.
            assert couple.alice.client.connected


async def test_a_server_that_takes_only_so_much_a_second_is_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost or done twice, and nobody takes the slow server for a dead one.

    Who waits for an answer here waits behind all that was sent before; so does the ping that
    asks whether the server is there. The times of the keep-alive are cut short.
    """
    with servers.configured(kind, tmp_path, _RATE[kind]) as server:
        async with together(server) as couple:
            monkeypatch.setattr(session, "PING_AFTER", 2.0)
            monkeypatch.setattr(session, "PING_TIMEOUT", 4.0)
            # The keep-alive sleeps already: a new connection is the first to be asked so soon.
            await couple.break_off()
            await couple.come_back()
            client, peer = couple.alice.client, couple.bob.client.jid
            since, links = client.since, len(couple.gate.passed)
            answers = []

            async def ask(number: int) -> None:
                question = make(QUERY, {"number": str(number)}, text="x" * 1_000)
                answers.append(await client.request("get", peer, question, PATIENCE))

            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                for number in range(QUESTIONS):
                    nursery.start_soon(ask, number)
            # Else there was no limit, and nothing was shown here.
            assert trio.current_time() - began >= (QUESTIONS * 1_000 - BURST) / RATE - 1
            assert {answer.type for answer in answers} == {"result"}
            assert (len(answers), couple.asked) == (QUESTIONS, QUESTIONS)
            assert (client.since, len(couple.gate.passed)) == (since, links)
