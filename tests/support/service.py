"""syncd as a service of a booted machine, and what tests do to it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.support.container import ROOT, VENV
from tests.support.processes import until

if TYPE_CHECKING:
    from tests.support.container import Machine

SYSTEMD = ROOT / "systemd"

# How long a file may take from one service to another, or a service until it has restarted.
TIMEOUT = 60.0  # seconds

CREDENTIAL = "[Service]\nLoadCredential=password:/etc/syncd/password\n"
PHOTOS = "[Service]\nReadWritePaths=-/srv/photos\n"


def configuration(
    user: str, folder: str, *, send_to: str = "", accept_from: str = "", account: str = ""
) -> str:
    """A configuration with one folder, ``photos``."""
    send, accept = (
        [f"{peer}@demo.example" for peer in each.split()] for each in (send_to, accept_from)
    )
    return f"""\
[account]
jid = "{user}@demo.example/test"
server = "127.0.0.1:5222"
tls = "starttls"
ca_file = "/etc/syncd/ca.pem"
{account}
[bytestreams]
listen = "127.0.0.1:0"
advertise = ["127.0.0.1:0"]
[[folder]]
id = "photos"
path = "{folder}"
send_to = {json.dumps(send)}
accept_from = {json.dumps(accept)}
settle = 0.1
"""


ALICE = configuration("alice", "/srv/photos", send_to="bob carol", accept_from="bob")


class Service:
    """The system service ``syncd``, the account alice, and what the tests do to it.

    Args:
      machine: Where it runs.
    """

    unit = "syncd.service"
    socket = "/run/syncd/control.sock"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def configure(self, config: str = ALICE) -> None:
        """Write its configuration, as the unit's head says."""
        owner = "root:syncd"
        self.machine.write("/etc/syncd/config.toml", config, mode="640", owner=owner)

    def override(self, **drop_ins: str) -> None:
        """Replace its drop-ins, by name; they count from the next start on."""
        self.machine.run("rm", "-rf", f"/etc/systemd/system/{self.unit}.d")
        for name, text in drop_ins.items():
            self.machine.write(f"/etc/systemd/system/{self.unit}.d/{name}.conf", text)
        self.machine.run("systemctl", "daemon-reload")

    def start(self) -> None:
        """Start it; returns once it has said that it is ready."""
        self.machine.run("systemctl", "start", self.unit)

    def show(self, name: str) -> str:
        """Tell one property of the unit."""
        return self.machine.unit(self.unit, name)[name]

    @property
    def pid(self) -> int:
        """Of the daemon, as seen in the machine."""
        return int(self.show("MainPID"))

    def file(self, name: str) -> str:
        """Tell what is in a file of /proc about the daemon."""
        return self.machine.output("cat", f"/proc/{self.pid}/{name}")

    def status(self) -> dict[str, Any]:
        """What syncctl tells."""
        done = self.machine.run(
            *(f"{VENV}/bin/syncctl", "--socket", self.socket, "status", "--json"), check=False
        )
        # Delivered, not yet, or the server refuses the login; but it answered.
        assert done.returncode in {0, 4, 6}, f"{done.returncode}: {done.stderr}"
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    def wait_connected(self) -> None:
        """Wait until it is logged in."""
        until(lambda: self.status()["connection"]["state"] == "connected", "logged in", TIMEOUT)

    def wait_restarted(self, pid: int) -> None:
        """Wait until systemd has started another in the place of this process."""

        def restarted() -> bool:
            found = self.machine.unit(self.unit, "ActiveState", "MainPID", "NRestarts")
            return found["ActiveState"] == "active" and found["MainPID"] not in {"0", str(pid)}

        until(restarted, "systemd has restarted syncd", TIMEOUT)

    def log(self) -> list[dict[str, str]]:
        """What the journal has of the last start: the daemon's words, and systemd's."""
        invocation = self.show("InvocationID")
        terms = [f"_SYSTEMD_INVOCATION_ID={invocation}", "+", f"INVOCATION_ID={invocation}"]
        self.machine.run("journalctl", "--sync")
        return [
            json.loads(line)
            for line in self.machine.output("journalctl", "-o", "json", *terms).splitlines()
        ]

    def messages(self) -> str:
        """The same as text."""
        return "\n".join(line["MESSAGE"] for line in self.log())

    def wait_file(self, path: str, content: str) -> None:
        """Wait until a file is in the machine, and see that it is right."""
        until(
            lambda: self.machine.run("test", "-e", path, check=False).returncode == 0,
            f"{path} is there",
            TIMEOUT,
        )
        assert content == self.machine.output("cat", path)
