"""A booted machine with syncd installed as its unit files say, and three users of a server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import container
from tests.support.container import VENV, Machine
from tests.support.processes import until
from tests.support.service import CREDENTIAL, PHOTOS, SYSTEMD, TIMEOUT, Service

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# Trees of operating systems, which several checkouts may share.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncd-tests"

# What a failed test shows of the journal.
_LINES = 60

_MACHINE = pytest.StashKey[Machine]()
_LACK = pytest.StashKey[str]()

# The server, which is no part of what is tested, but lives on the same loopback.
_SERVER_UNIT = f"""\
[Service]
ExecStart={VENV}/bin/python -m syncd.demo --port 5222 --directory %S/server \
    --account alice:pw-alice --account bob:pw-bob --account carol:pw-carol
StateDirectory=server
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make the machine's operating system, for which the time of a test is too short."""
    lack = container.missing()
    if session.config.option.collectonly or lack:
        session.stash[_LACK] = lack
        return
    if any(item.get_closest_marker("boot") for item in session.items):
        writer = session.config.get_terminal_writer()
        writer.line(
            f"an operating system for tests of the units, unless {CACHE} has it: minutes"
        )
        try:
            with container.open_image(CACHE):
                pass
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            session.stash[_LACK] = f"no operating system can be made: {error}"
        else:
            session.stash[_LACK] = ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Append what the services of a failed test have said."""
    report = yield
    machine = item.session.stash.get(_MACHINE, None)
    if report.failed and machine is not None and machine.process.running:
        lines = machine.run("journalctl", "-n", str(_LINES), check=False).stdout
        report.sections.append(("journal of the machine", lines))
    return report


@pytest.fixture(scope="session")
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A booted machine with a server, and with syncd installed but not started."""
    if lack := request.session.stash[_LACK]:
        # Where it is to be there, its absence is a fault and must not pass for green.
        if os.environ.get("CI"):
            pytest.fail(lack, pytrace=False)
        pytest.skip(f"NO UNIT IS PROVED: {lack}")
    directory = tmp_path_factory.mktemp("machine")
    with container.open_image(CACHE) as tree, container.boot(tree, directory) as booted:
        request.session.stash[_MACHINE] = booted
        _install(booted)
        yield booted


def _install(machine: Machine) -> None:
    """As the heads of the unit files say."""
    for name in ("syncd.service", "syncd@.service"):
        machine.write(f"/etc/systemd/system/{name}", (SYSTEMD / name).read_text())
    sysusers = (SYSTEMD / "sysusers.d" / "syncd.conf").read_text()
    machine.write("/etc/sysusers.d/syncd.conf", sysusers)
    machine.run("systemd-sysusers")
    machine.write("/etc/syncd/password", "pw-alice\n", mode="600")
    machine.run("install", "-d", "/srv/photos")
    machine.run("sh", "-c", "setfacl -R -m u:syncd:rwX -m d:u:syncd:rwX /srv/photos")
    machine.write("/etc/systemd/system/server.service", _SERVER_UNIT)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "server")
    authority = "/var/lib/server/ca.pem"
    listening = f"test -e {authority} && ss -Hltn 'sport = 5222' | grep -q ."
    until(
        lambda: machine.run("sh", "-c", listening, check=False).returncode == 0,
        "the server listens",
        TIMEOUT,
    )
    machine.write("/etc/syncd/ca.pem", machine.output("cat", authority) + "\n")


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    """The system service, configured by the book and not started."""
    made = Service(machine)
    made.configure()
    made.override(credential=CREDENTIAL, photos=PHOTOS)
    yield made
    machine.run("systemctl", "stop", made.unit)
    machine.run("systemctl", "reset-failed", made.unit, check=False)
    machine.run("sh", "-c", "rm -rf /srv/photos/* /var/lib/syncd")


@pytest.fixture
def running(service: Service) -> Service:
    """The system service, started and logged in."""
    service.start()
    service.wait_connected()
    return service
