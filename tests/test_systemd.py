from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from syncd.settings import places

UNITS = Path(__file__).parent.parent / "systemd"
SYSTEM = UNITS / "syncd.service"
INSTANCE = UNITS / "syncd@.service"
USER = UNITS / "user" / "syncd.service"
SYSUSERS = UNITS / "sysusers.d" / "syncd.conf"

MAX_EXPOSURE = 1.6  # of 10; what the best-kept daemons of a distribution have

each = pytest.mark.parametrize(
    "unit", [SYSTEM, INSTANCE, USER], ids=["system", "instance", "user"]
)
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not installed: THE UNITS ARE NOT VERIFIED",
)


def settings(unit: Path) -> dict[str, str]:
    """The settings of a unit; the last of several with one name."""
    return dict(line.split("=", 1) for line in all_settings(unit))


def all_settings(unit: Path) -> list[str]:
    """The lines of a unit that set something."""
    return [line for line in unit.read_text().splitlines() if re.match(r"[A-Z]\w+=", line)]


def analyze(*arguments: str, runtime: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime), "LC_ALL": "C.UTF-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


@needs_systemd
@each
def test_a_unit_verifies_without_a_word(unit: Path, tmp_path: Path) -> None:
    # By the name of an instance, which is what its %i becomes.
    copy = tmp_path / unit.name.replace("@", "@alice")
    # What it starts must exist to be verified, and is not installed here.
    copy.write_text(
        re.sub(r"^(Exec\w+=)\S+", rf"\1{sys.executable}", unit.read_text(), flags=re.MULTILINE)
    )
    scope = ["--user"] if unit == USER else []
    done = analyze("verify", "--man=no", *scope, str(copy), runtime=tmp_path)
    assert (done.stdout, done.returncode) == ("", 0)


@needs_systemd
@pytest.mark.parametrize("unit", [SYSTEM, INSTANCE], ids=["system", "instance"])
def test_a_system_unit_is_hardly_exposed(unit: Path, tmp_path: Path) -> None:
    done = analyze("security", "--offline=true", str(unit), runtime=tmp_path)
    found = re.search(r"Overall exposure level for syncd\S*\.service: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) <= MAX_EXPOSURE


def test_an_instance_has_the_sandbox_of_the_system_unit() -> None:
    """But for what a user's own files and programs need."""
    system, instance = all_settings(SYSTEM), all_settings(INSTANCE)
    only_system = [line for line in system if line not in instance]
    only_instance = [line for line in instance if line not in system]
    assert only_system == [
        "Description=File synchronisation over XMPP",
        "ExecStart=/opt/syncd/bin/syncd --config /etc/syncd/config.toml",
        "User=syncd",
        "StateDirectory=syncd",
        "StateDirectoryMode=0700",
        "RuntimeDirectory=syncd",
        "UMask=0077",
        "RemoveIPC=yes",
    ]
    assert only_instance == [
        "Description=File synchronisation over XMPP for %i",
        "ExecStart=/opt/syncd/bin/syncd --config /home/%i/.config/syncd/config.toml",
        "User=%i",
        "RuntimeDirectory=syncd-%i",
        "BindPaths=-/home/%i",
    ]


@each
def test_a_unit_keeps_the_contract_with_the_daemon(unit: Path) -> None:
    expected = {
        "Type": "notify",
        "NotifyAccess": "main",
        "WatchdogSec": "60",
        "Restart": "on-failure",
        "RestartPreventExitStatus": str(os.EX_CONFIG),
        "ExecReload": "/bin/kill -HUP $MAINPID",
        "RuntimeDirectoryMode": "0700",
        "SyslogLevel": "err",
    }
    assert settings(unit) | expected == settings(unit)


def test_the_system_unit_and_the_defaults_agree() -> None:
    found = settings(SYSTEM)
    assert found["ExecStart"] == f"/opt/syncd/bin/syncd --config {places.SYSTEM_CONFIG}"
    assert Path("/run", found["RuntimeDirectory"]) == places.SYSTEM_SOCKET.parent
    assert (found["User"], found["StateDirectory"]) == ("syncd", "syncd")
    kind, name, *_, home = shlex.split(SYSUSERS.read_text().splitlines()[-1])
    assert (kind, name, home) == ("u", "syncd", "/var/lib/syncd")


def test_the_user_unit_and_the_defaults_agree() -> None:
    """%E is $XDG_CONFIG_HOME; state is left to syncd, for systemd before 254 misplaces it."""
    found = settings(USER)
    own, _ = places.default_config_paths({"XDG_CONFIG_HOME": "/E"})
    assert found["ExecStart"] == f"%h/.local/bin/syncd --config %E{str(own)[2:]}"
    assert "StateDirectory" not in found
    assert found["RuntimeDirectory"] == "syncd"


@each
def test_no_secret_lands_in_a_core_dump(unit: Path) -> None:
    assert settings(unit)["LimitCORE"] == "0"


@each
def test_what_an_administrator_may_turn_on_starts_commented(unit: Path) -> None:
    """A LoadCredential= whose file is missing would keep the service from starting."""
    assert "LoadCredential" not in settings(unit)
    assert "\n#LoadCredential=password:" in unit.read_text()
