"""What users, scripts and systemd are told: the status, the exit codes, the words.

The exit codes stand here as numbers, not as names: the numbers are what scripts rely on.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.pair import BIG, Pair
from tests.support.processes import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.daemons import Daemon, Daemons
    from tests.support.servers import Server


@dataclass(frozen=True, slots=True)
class OneOf:
    """Any of some values."""

    values: tuple[object, ...]


# The contract of ``syncctl status --json``: a type, some values, or what lists hold.
STATUS: dict[str, Any] = {
    "schema": OneOf((1,)),
    "state": OneOf(("ok", "waiting", "problem")),
    "summary": str,
    "connection": {"state": str, "jid": str, "server": str},
    "folders": [{"id": str, "path": str, "files": int, "pending": int}],
    "peers": [
        {
            "jid": str,
            "online": bool,
            "resource": str,
            "encryption": str,
            "pending": int,
            "delivered": int,
            "last_error": str,
        }
    ],
    "transfers": [
        {
            "direction": OneOf(("send", "receive")),
            "peer": str,
            "folder": str,
            "path": str,
            "size": int,
            "offset": int,
            "method": OneOf(("direct", "proxy", "ibb")),
            "rate": int,
        }
    ],
    "errors": [{"text": str, "hint": str}],
}


def faults(value: Any, contract: Any, where: str = "status") -> list[str]:
    """Tell where a value breaks the contract; more than it asks for is allowed."""
    match contract:
        case dict():
            if not isinstance(value, dict):
                return [f"{where} is no object"]
            lacking = [f"{where} lacks {key}" for key in contract.keys() - value.keys()]
            return lacking + [
                fault
                for key in contract.keys() & value.keys()
                for fault in faults(value[key], contract[key], f"{where}.{key}")
            ]
        case [element]:
            if not isinstance(value, list):
                return [f"{where} is no list"]
            return [
                fault
                for number, each in enumerate(value)
                for fault in faults(each, element, f"{where}[{number}]")
            ]
        case OneOf(values):
            return [] if value in values else [f"{where} is {value!r}"]
        case _:
            # Not isinstance: True is an int.
            return [] if type(value) is contract else [f"{where} is {value!r}"]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({}, "status lacks schema"),
        ({"schema": 2}, "status.schema is 2"),
        ({"folders": [{"files": True}]}, "status.folders[0].files is True"),
        ({"peers": {}}, "status.peers is no list"),
    ],
)
def test_the_contract_of_the_status_can_be_broken(value: Any, fault: str) -> None:
    assert fault in faults(value, STATUS)


def test_the_status_of_both_ends_keeps_the_contract(held: Pair) -> None:
    for daemon, direction in ((held.alice, "send"), (held.bob, "receive")):
        status = json.loads(daemon.ctl("status", "--json").stdout)
        assert faults(status, STATUS) == []
        [transfer] = status["transfers"]
        assert (transfer["direction"], transfer["method"]) == (direction, "direct")
        assert (transfer["folder"], transfer["path"]) == ("shared", "big.bin")
        assert transfer["size"] == BIG
        assert 0 < transfer["offset"] < BIG
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", status["started"])


def test_a_wrong_password_is_said_in_words(server: Server, daemons: Daemons) -> None:
    """And the daemon stays: the password can be mended on the server, too."""
    alice = daemons.make("alice", server, send_to=["bob"], password="wrong")
    alice.start()
    until(
        lambda: alice.status().connection.state == "unauthorized",
        "the server has refused the password",
    )
    shown = alice.ctl("status")
    assert shown.returncode == 6
    assert "password" in shown.stdout.lower()
    assert alice.status().state == "problem"
    assert alice.ctl("wait", "--timeout", "30").returncode == 0, "nothing is owed"
    alice.drop("file", b"content")
    assert alice.ctl("wait", "--timeout", "30").returncode == 6
    assert alice.process.returncode is None


def test_a_server_that_is_not_there_is_waited_for(daemons: Daemons) -> None:
    alice = daemons.make("alice", None, send_to=["bob"])
    alice.start()
    until(lambda: alice.status().connection.state == "offline", "it has tried to connect")
    assert alice.ctl("status").returncode == 4
    assert alice.status().state == "waiting"
    assert alice.process.returncode is None


def test_sigterm_ends_it_well_even_without_a_server(daemons: Daemons) -> None:
    alice = daemons.make("alice", None, send_to=["bob"])
    alice.start()
    assert alice.terminate() == 0


def test_sigterm_ends_it_well_while_connected(pair: Pair) -> None:
    pair.start()
    pair.alice.wait_connected()
    assert pair.alice.terminate() == 0


def test_without_a_daemon_syncctl_says_so(daemons: Daemons) -> None:
    alice = daemons.make("alice", None, send_to=["bob"])
    asked = alice.ctl("status")
    assert asked.returncode == 8
    assert "not running" in asked.stderr


def test_after_a_crash_syncctl_says_that_no_daemon_runs(daemons: Daemons) -> None:
    alice = daemons.make("alice", None, send_to=["bob"])
    alice.start()
    alice.kill9()
    assert alice.ctl("status").returncode == 8
    alice.start()
    assert alice.ctl("status").returncode == 4


def changed(daemon: Daemon, change: Callable[[str], str]) -> None:
    text = daemon.config_file.read_text(encoding="utf-8")
    new = change(text)
    assert new != text
    daemon.config_file.write_text(new, encoding="utf-8")


@pytest.mark.parametrize("shared", ["dir", "socket"])
def test_a_second_daemon_does_not_start(daemons: Daemons, shared: str) -> None:
    """Neither on the same state, nor on the same socket; the first one does not notice."""
    first = daemons.make("alice", None, send_to=["bob"])
    second = daemons.make("alice", None, send_to=["bob"])
    [line] = re.findall(
        f"^{shared} = .*$", first.config_file.read_text(encoding="utf-8"), re.MULTILINE
    )
    changed(second, lambda text: re.sub(f"(?m)^{shared} = .*$", line, text))
    first.start()
    second.process.spawn()
    assert second.process.wait() == 11
    assert "another" in second.process.tail().lower()
    assert first.status().state == "waiting"


def test_a_bad_configuration_is_refused_with_all_its_faults(daemons: Daemons) -> None:
    alice = daemons.make("alice", None, send_to=["bob"])
    changed(
        alice,
        lambda text: (
            text.replace("password_file", "pasword_file")
            .replace("settle = 0.1", 'settle = "soon"')
            .replace("bob@example.test", "bob@@")
        ),
    )
    alice.process.spawn()
    assert alice.process.wait() == 78
    said = alice.process.tail()
    assert "Traceback" not in said
    for fault in ("pasword_file", "password_file", "settle", "soon", "bob@@"):
        assert fault in said
