from __future__ import annotations

import logging
import os
import socket
import uuid
from typing import TYPE_CHECKING

import pytest

from syncd.notify import Notifier, watchdog_interval

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    name = f"syncd-test-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}" if request.param == "abstract" else str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def notifier(systemd: socket.socket) -> Notifier:
    address = systemd.getsockname()
    if isinstance(address, bytes):
        address = "@" + address[1:].decode()
    return Notifier({"NOTIFY_SOCKET": address})


def test_each_state_is_one_datagram(systemd: socket.socket) -> None:
    told = notifier(systemd)
    told.ready()
    told.status("OK: all 3 files delivered")
    told.watchdog()
    told.reloading(1234567)
    told.stopping()
    assert [systemd.recv(4096) for _ in range(5)] == [
        b"READY=1",
        b"STATUS=OK: all 3 files delivered",
        b"WATCHDOG=1",
        b"RELOADING=1\nMONOTONIC_USEC=1234567",
        b"STOPPING=1",
    ]


def test_a_status_cannot_smuggle_in_another_state(systemd: socket.socket) -> None:
    notifier(systemd).status("fine\nMAINPID=1\r\nSTOPPING=1")
    assert systemd.recv(4096) == b"STATUS=fine MAINPID=1 STOPPING=1"


def test_a_file_name_that_is_no_text_can_be_told(systemd: socket.socket) -> None:
    notifier(systemd).status("sending caf\udce9.txt")
    assert systemd.recv(4096) == b"STATUS=sending caf?.txt"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_systemd_it_is_silent(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    Notifier(environ).ready()
    assert caplog.record_tuples == []


def test_a_socket_that_is_gone_is_logged_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    assert caplog.record_tuples == [
        (
            "syncd.notify",
            logging.WARNING,
            "systemd was not told 'READY=1': [Errno 2] No such file or directory",
        )
    ]


def test_a_manager_that_does_not_read_does_not_block_us(
    systemd: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """Its queue is full after some datagrams; we go on."""
    told = notifier(systemd)
    for _ in range(10_000):
        told.watchdog()
        if caplog.records:
            break
    assert caplog.messages == [
        "systemd was not told 'WATCHDOG=1': [Errno 11] Resource temporarily unavailable"
    ]


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "500000"}, 0.25),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": ""}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time(
    environ: dict[str, str], seconds: float | None
) -> None:
    assert watchdog_interval(environ) == seconds
