"""Fixtures for tests with real servers and real daemons, and their logs in the reports."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import servers
from tests.support.daemons import Daemons

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from tests.support.processes import Process

# A shell gives what it runs in the background a SIGINT that is ignored, and our processes would
# inherit that. What has a handler here is at its default there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_WATCHED = pytest.StashKey[list["Process"]]()


def _watched(item: pytest.Item) -> list[Process]:
    """The processes whose logs a failure of this test is to show."""
    return item.stash.setdefault(_WATCHED, [])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Append what the processes of a failed test have said."""
    report = yield
    if report.failed:
        report.sections += [
            (f"log of {process.name}", process.tail()) for process in _watched(item)
        ]
    return report


@pytest.fixture(
    scope="session",
    params=[pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in servers.KINDS],
)
def running_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[servers.Server]:
    """A real server of each kind, started once for all tests; better use `server`."""
    kind: str = request.param
    if lack := servers.missing(kind):
        # Where it is to be there, its absence is a fault and must not pass for green.
        if os.environ.get("CI"):
            pytest.fail(lack, pytrace=False)
        pytest.skip(lack)
    with servers.KINDS[kind](tmp_path_factory.mktemp(kind)) as server:
        yield server


@pytest.fixture
def server(request: pytest.FixtureRequest, running_server: servers.Server) -> servers.Server:
    """A real server, of each kind in turn, that runs when the test begins."""
    _watched(request.node).append(running_server.process)
    # A test that failed may have left it stopped; the next one shall not suffer from that.
    if not running_server.running:
        running_server.start()
    return running_server


@pytest.fixture
def daemons(request: pytest.FixtureRequest) -> Iterator[Daemons]:
    """Makes daemons that live in a short folder, and ends all that still run."""
    # Not tmp_path, which is named after the test: a Unix socket's path has 107 bytes at most.
    directory = Path(tempfile.mkdtemp(prefix="sd"))
    made = Daemons(directory, _watched(request.node))
    try:
        yield made
    finally:
        made.end_all()
        shutil.rmtree(directory)
