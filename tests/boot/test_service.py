"""The units as they are shipped, under a real systemd: they start, are watched, and deliver."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.support.container import VENV, Machine
from tests.support.processes import until
from tests.support.service import (
    ALICE,
    CREDENTIAL,
    PHOTOS,
    SYSTEMD,
    TIMEOUT,
    Service,
    configuration,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.boot

# Of 10; what the best-kept daemons of a distribution have.
MAX_EXPOSURE = 1.6

# Between a request to stop and the end. The unit gives 20 s before it kills.
STOPS_WITHIN = 10.0  # seconds

ERROR, INFO = "3", "6"  # priorities of the journal, syslog(3)


# --- Starting and stopping


def test_a_start_returns_when_the_daemon_answers(service: Service) -> None:
    """Which is what Type=notify is for."""
    service.start()
    assert service.status()["schema"] == 1
    expected = {"ActiveState": "active", "SubState": "running", "Type": "notify"}
    assert expected == service.machine.unit(service.unit, *expected)


def test_the_shipped_unit_is_what_runs(running: Service) -> None:
    """With two drop-ins: for the password and for the folder."""
    fragment = running.machine.output("cat", running.show("FragmentPath"))
    assert (SYSTEMD / "syncd.service").read_text().strip() == fragment
    assert "credential.conf" in running.show("DropInPaths")
    assert len(running.show("DropInPaths").split()) == 2


@pytest.mark.parametrize("server", ["well", "frozen"])
def test_a_stop_ends_in_order_within_seconds(running: Service, server: str) -> None:
    """Also when the server does not answer the goodbye."""
    pid = running.machine.unit("server", "MainPID")["MainPID"]
    if server == "frozen":
        running.machine.run("kill", "-STOP", pid)
    try:
        running.machine.run("systemctl", "stop", running.unit, timeout=STOPS_WITHIN)
    finally:
        running.machine.run("kill", "-CONT", pid)
    expected = {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert expected == running.machine.unit(running.unit, *expected)


def test_directories_are_private_and_only_state_stays(running: Service) -> None:
    modes = ("stat", "--format", "%U:%G %a %n")
    paths = ("/var/lib/syncd", "/run/syncd", "/run/syncd/control.sock")
    expected = ["syncd:syncd 700", "syncd:syncd 700", "syncd:syncd 600"]
    expected = [f"{mode} {path}" for mode, path in zip(expected, paths, strict=True)]
    assert expected == running.machine.output(*modes, *paths).splitlines()
    state = running.machine.output("find", "/var/lib/syncd", "-type", "f", "-perm", "/077")
    assert state == ""
    running.machine.run("systemctl", "stop", running.unit)
    assert running.machine.run("test", "-e", "/run/syncd", check=False).returncode == 1
    assert running.machine.output("ls", "/var/lib/syncd") != ""


# --- Reloading


def test_a_reload_takes_the_new_configuration_into_the_same_process(running: Service) -> None:
    pid = running.pid
    running.configure(ALICE.replace('id = "photos"', 'id = "pictures"'))
    running.machine.run("systemctl", "reload", running.unit)
    until(
        lambda: [folder["id"] for folder in running.status()["folders"]] == ["pictures"],
        "the new folder is there",
        TIMEOUT,
    )
    until(lambda: running.show("ActiveState") == "active", "the reload is over", TIMEOUT)
    assert (pid, "0") == (running.pid, running.show("NRestarts"))


def test_a_reload_of_a_bad_configuration_changes_nothing(running: Service) -> None:
    pid = running.pid
    running.configure(ALICE.replace("settle", "setle"))
    running.machine.run("systemctl", "reload", running.unit)
    until(lambda: "the old configuration stays" in running.messages(), "a report", TIMEOUT)
    assert (pid, "active") == (running.pid, running.show("ActiveState"))
    assert [folder["id"] for folder in running.status()["folders"]] == ["photos"]


# --- Restarts


def test_the_watchdog_is_fed(service: Service) -> None:
    service.override(credential=CREDENTIAL, photos=PHOTOS, soon="[Service]\nWatchdogSec=2\n")
    service.start()
    seen: set[str] = set()

    def fed_often() -> bool:
        seen.add(service.show("WatchdogTimestampMonotonic"))
        return len(seen) > 5

    until(fed_often, "the watchdog has been fed for longer than it waits", TIMEOUT)
    assert service.show("NRestarts") == "0"


def test_the_watchdog_restarts_a_daemon_that_stands_still(service: Service) -> None:
    """With less patience than the unit's minute."""
    service.override(credential=CREDENTIAL, photos=PHOTOS, soon="[Service]\nWatchdogSec=3\n")
    service.start()
    pid = service.pid
    service.machine.run("kill", "-STOP", str(pid))
    service.wait_restarted(pid)
    service.wait_connected()
    journal = service.machine.output("journalctl", "-u", service.unit, "-n", "100")
    assert "Watchdog timeout" in journal


def test_a_killed_daemon_is_restarted_and_delivers_what_came_meanwhile(
    running: Service, bob: str
) -> None:
    pid = running.pid
    running.machine.run("kill", "-KILL", str(pid))
    running.machine.write("/srv/photos/meanwhile", "while nobody looked", owner="syncd:syncd")
    running.wait_restarted(pid)
    running.wait_file(f"{bob}/meanwhile", "while nobody looked")
    assert running.show("NRestarts") == "1"


def test_a_bad_configuration_is_not_tried_again(service: Service) -> None:
    service.configure(ALICE.replace("settle", "setle"))
    assert service.machine.run("systemctl", "start", service.unit, check=False).returncode
    expected = {
        "ActiveState": "failed",
        "SubState": "failed",
        "ExecMainStatus": "78",
        "NRestarts": "0",
    }
    assert expected == service.machine.unit(service.unit, *expected)
    assert "setle" in service.messages()


# --- The password


def test_the_password_is_a_credential_that_nobody_else_can_read(running: Service) -> None:
    """Neither the file that root keeps, nor the copy for the service, nor by another way."""
    credential = "/run/credentials/syncd.service/password"
    for path in ("/etc/syncd/password", credential):
        other = (
            "setpriv",
            "--reuid=nobody",
            "--regid=nogroup",
            "--clear-groups",
            "--no-new-privs",
        )
        done = running.machine.run(*other, "cat", path, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Permission denied" in done.stderr
    assert running.machine.output("cat", credential) == "pw-alice"
    told = running.file("environ") + running.file("cmdline") + running.messages()
    assert "pw-alice" not in told
    assert "/run/credentials/syncd.service" in told


def test_a_wrong_credential_keeps_the_daemon_up_and_says_why(service: Service) -> None:
    service.machine.write("/etc/syncd/wrong", "wrong\n", mode="600")
    wrong = CREDENTIAL.replace("/etc/syncd/password", "/etc/syncd/wrong")
    service.override(credential=wrong, photos=PHOTOS)
    service.start()
    until(lambda: service.status()["state"] == "problem", "it says so", TIMEOUT)
    assert service.show("ActiveState") == "active"


# --- Folders


@pytest.fixture
def bob(machine: Machine) -> Iterator[str]:
    """The folder of a user of the machine, served by ``syncd@bob``."""
    home = "/home/bob"
    machine.run("sh", "-c", "id bob 2>/dev/null || useradd --create-home bob")
    machine.run("install", "-d", "-o", "bob", "-g", "bob", f"{home}/Photos")
    config = configuration(
        "bob",
        "~/Photos",
        send_to="alice",
        accept_from="alice",
        account='password_file = "password"',
    )
    place = f"{home}/.config/syncd"
    machine.write(f"{place}/config.toml", config, owner="bob:bob")
    machine.write(f"{place}/password", "pw-bob\n", mode="600", owner="bob:bob")
    machine.run("chown", "-R", "bob:bob", f"{home}/.config")
    machine.run("systemctl", "start", "syncd@bob")
    yield f"{home}/Photos"
    machine.run("systemctl", "stop", "syncd@bob", timeout=STOPS_WITHIN)
    machine.run("rm", "-rf", f"{home}/Photos", f"{home}/.local")


@pytest.fixture
def carol(machine: Machine) -> Iterator[str]:
    """The folder of a user who runs syncd in her own systemd."""
    home = "/home/carol"
    machine.run("sh", "-c", "id carol 2>/dev/null || useradd --create-home carol")
    machine.run("loginctl", "enable-linger", "carol")
    config = configuration(
        "carol", "~/Photos", accept_from="alice", account='password_file = "password"'
    )
    place = f"{home}/.config/syncd"
    machine.write(f"{place}/config.toml", config)
    machine.write(f"{place}/password", "pw-carol\n", mode="600")
    unit = (SYSTEMD / "user" / "syncd.service").read_text()
    machine.write(f"{home}/.config/systemd/user/syncd.service", unit)
    machine.run("sh", "-c", f"mkdir -p {home}/Photos {home}/.local/bin")
    machine.run("ln", "-sf", f"{VENV}/bin/syncd", f"{home}/.local/bin/syncd")
    machine.run("chown", "-R", "carol:carol", home)
    uid = machine.output("id", "-u", "carol")
    machine.run("systemctl", "start", f"user@{uid}")  # wait for it
    own = (
        *("runuser", "-u", "carol", "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}"),
        *("systemctl", "--user"),
    )
    machine.run(*own, "daemon-reload")
    machine.run(*own, "start", "syncd")
    yield f"{home}/Photos"
    machine.run(*own, "stop", "syncd", timeout=STOPS_WITHIN)
    machine.run("loginctl", "disable-linger", "carol")


def test_files_travel_between_the_system_service_and_those_of_users(
    running: Service, bob: str, carol: str
) -> None:
    """Of all three shipped units; what arrives belongs to whose service it is."""
    machine = running.machine
    machine.write("/srv/photos/to all", "from alice", owner="syncd:syncd")
    running.wait_file(f"{bob}/to all", "from alice")
    running.wait_file(f"{carol}/to all", "from alice")
    machine.write(f"{bob}/to alice", "from bob", owner="bob:bob")
    running.wait_file("/srv/photos/to alice", "from bob")
    found = machine.output(
        *("stat", "--format=%U", f"{bob}/to all", f"{carol}/to all", "/srv/photos/to alice")
    )
    assert found.splitlines() == ["bob", "carol", "syncd"]


def test_a_user_s_service_sees_one_home_and_answers_that_user(
    running: Service, bob: str
) -> None:
    machine = running.machine
    machine.run("install", "-d", "-m", "755", "/home/dave")
    pid = machine.unit("syncd@bob", "MainPID")["MainPID"]
    seen = machine.output("nsenter", "-t", pid, "-m", "--", "ls", "/home")
    assert seen == "bob"
    asked = ("setpriv", "--reuid=bob", "--regid=bob", "--clear-groups", f"{VENV}/bin/syncctl")
    done = machine.run(*asked, "--socket", "/run/syncd-bob/control.sock", "status", check=False)
    assert done.returncode in {0, 4}, done.stderr
    assert bob.startswith("/home/bob")


def test_a_folder_without_a_drop_in_is_refused_with_what_to_do(service: Service) -> None:
    service.override(credential=CREDENTIAL)
    assert service.machine.run("systemctl", "start", service.unit, check=False).returncode
    assert "ReadWritePaths=/srv/photos" in service.messages()
    assert service.show("ExecMainStatus") == "78"


def test_a_home_directory_enters_through_a_window(service: Service, bob: str) -> None:
    """As the head of the unit says: BindPaths, and an ACL for the user syncd."""
    service.machine.run("install", "-d", "/home/dave/photos")
    service.machine.run(
        "setfacl", "-R", "-m", "u:syncd:rwX", "-m", "d:u:syncd:rwX", "/home/dave/photos"
    )
    window = "[Service]\nBindPaths=-/home/dave/photos\n"
    service.configure(ALICE.replace("/srv/photos", "/home/dave/photos"))
    service.override(credential=CREDENTIAL, photos=window)
    service.start()
    service.machine.write(f"{bob}/to dave", "from bob", owner="bob:bob")
    service.wait_file("/home/dave/photos/to dave", "from bob")


# --- The journal


def test_lines_have_priorities(running: Service) -> None:
    running.configure(ALICE.replace("settle", "setle"))
    running.machine.run("systemctl", "reload", running.unit)
    until(lambda: "the old configuration stays" in running.messages(), "a report", TIMEOUT)
    own = [line for line in running.log() if line.get("_SYSTEMD_UNIT") == running.unit]
    of = {line["MESSAGE"]: line["PRIORITY"] for line in own}
    up, *_ = [of[message] for message in of if "is up, at" in message]
    stays, *_ = [of[message] for message in of if "the old configuration stays" in message]
    assert (up, stays) == (INFO, ERROR)
    assert {line["SYSLOG_IDENTIFIER"] for line in own} == {"syncd"}


def test_why_it_does_not_start_is_an_error(service: Service) -> None:
    service.configure(ALICE.replace("settle", "setle"))
    service.machine.run("systemctl", "start", service.unit, check=False)
    priorities = {line["PRIORITY"] for line in service.log() if "setle" in line["MESSAGE"]}
    assert {ERROR} == priorities


# --- The sandbox


@pytest.mark.parametrize("unit", ["syncd.service", "syncd@bob.service"])
def test_the_exposure_is_small(machine: Machine, unit: str) -> None:
    said = machine.output("systemd-analyze", "security", "--no-pager", unit)
    found = re.search(rf"Overall exposure level for {re.escape(unit)}: ([0-9.]+)", said)
    assert found is not None, said
    assert float(found[1]) <= MAX_EXPOSURE
