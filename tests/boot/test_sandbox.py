"""What the sandbox of the shipped unit holds back, tried from inside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.container import VENV
from tests.support.service import PHOTOS, SYSTEMD, Service

if TYPE_CHECKING:
    from tests.support.container import Machine

pytestmark = pytest.mark.boot

# Tries what a daemon that was taken over would, and prints what came of it: a value, or the
# name of the error. Each is let by a machine without the sandbox, or by its root.
_INTRUDER = r"""
import ctypes, errno, json, mmap, os, socket, stat, sys

libc = ctypes.CDLL(None, use_errno=True)
PTRACE_TRACEME, ADDR_NO_RANDOMIZE = 0, 0x0040000

def call(function, *arguments):
    if function(*arguments) == -1:
        raise OSError(ctypes.get_errno(), function.__name__)

def write(path):
    with open(path, "w") as file:
        file.write("x")

def make_setuid():
    path = os.path.join(os.environ["STATE_DIRECTORY"], "setuid")
    write(path)
    os.chmod(path, 0o4755)

def others():
    seen = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return [pid for pid in seen if pid != os.getpid()]

tries = {
    "write where anybody may": lambda: write("/srv/anybody/x"),
    "write to /etc": lambda: write("/etc/x"),
    "write to the program": lambda: write("/opt/syncd/bin/syncd"),
    "write to /dev/shm": lambda: write("/dev/shm/x"),
    "write to /tmp": lambda: write("/tmp/intruder"),
    "write to the state": lambda: write(os.environ["STATE_DIRECTORY"] + "/x"),
    "write to the folder": lambda: write("/srv/photos/x"),
    "homes": lambda: os.listdir("/home"),
    "root's home": lambda: os.listdir("/root"),
    "sessions": lambda: os.listdir("/run/user"),
    "shadow": lambda: open("/etc/shadow").read(),
    "other processes": others,
    "memory of the machine": lambda: open("/proc/meminfo").read(),
    "kernel setting": lambda: open("/proc/sys/net/core/somaxconn").read(),
    "packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "kernel's crypto socket": lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET),
    "user namespace": lambda: call(libc.unshare, 0x10000000),
    "writable code": lambda: mmap.mmap(-1, 4096, prot=7).close(),
    "setuid program": make_setuid,
    "become root": lambda: os.setuid(0),
    "trace": lambda: call(libc.ptrace, PTRACE_TRACEME, 0, 0, 0),
    "personality": lambda: call(libc.personality, ADDR_NO_RANDOMIZE),
    "mount": lambda: call(libc.mount, b"none", b"/tmp", b"tmpfs", 0, None),
    "clock": lambda: __import__("time").clock_settime(0, 0),
    "host name": lambda: socket.sethostname("x"),
    "device": lambda: os.mknod("/tmp/device", stat.S_IFCHR | 0o600, os.makedev(1, 1)),
    "real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "more priority": lambda: os.nice(-5),
    "resolve a user": lambda: __import__("pwd").getpwuid(os.getuid()).pw_name,
    "addresses": lambda: [name for _, name in socket.if_nameindex()],
}
found = {}
for name, attempt in tries.items():
    try:
        found[name] = attempt()
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
json.dump(found, sys.stdout, default=str)
"""


def intrude(machine: Machine, unit: str) -> dict[str, object]:
    """Run the intruder in the daemon's place in the shipped unit."""
    text = (SYSTEMD / unit).read_text()
    machine.write("/usr/local/lib/intruder.py", _INTRUDER)
    machine.run("install", "-d", "-m", "1777", "/srv/anybody")
    changes = {
        "Type": "oneshot",
        "Restart": "no",
        "ExecStart": f"{VENV}/bin/python /usr/local/lib/intruder.py",
        "StandardOutput": "truncate:/run/intruder.json",
    }
    lines = [line for line in text.splitlines() if line.split("=")[0] not in changes]
    at = lines.index("[Service]") + 1
    lines[at:at] = [f"{key}={value}" for key, value in changes.items()]
    lines.append("")
    machine.write("/etc/systemd/system/intruder.service", "\n".join(lines))
    machine.write("/etc/systemd/system/intruder.service.d/photos.conf", PHOTOS)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "intruder")
    found: dict[str, object] = json.loads(machine.output("cat", "/run/intruder.json"))
    return found


def test_an_intruder_gets_nowhere(service: Service) -> None:
    """But to what the daemon itself needs: its state, its folder, names and addresses."""
    found = intrude(service.machine, "syncd.service")
    expected = {
        "write where anybody may": "EROFS",
        "write to /etc": "EROFS",
        "write to the program": "EROFS",
        "write to /dev/shm": None,  # its own: PrivateIPC and PrivateDevices
        "write to /tmp": None,  # its own: PrivateTmp
        "write to the state": None,
        "write to the folder": None,
        "homes": [],
        "root's home": [],
        "sessions": [],
        "shadow": "EACCES",
        "other processes": [],
        "memory of the machine": "ENOENT",
        "kernel setting": "ENOENT",
        "packet socket": "EAFNOSUPPORT",
        "raw socket": "EPERM",
        "kernel's crypto socket": "EAFNOSUPPORT",
        "user namespace": "EPERM",
        "writable code": "EPERM",
        "setuid program": "EPERM",
        "become root": "EPERM",
        "trace": "EPERM",
        "personality": "EPERM",
        "mount": "EPERM",
        "clock": "EPERM",
        "host name": "EPERM",
        "device": "EPERM",
        "real time": "EPERM",
        "more priority": "EPERM",
        "resolve a user": "syncd",
        "addresses": ["lo"],
    }
    assert expected == found
    machine = service.machine
    assert machine.run("test", "-e", "/tmp/intruder", check=False).returncode == 1
    assert machine.output("ls", "/srv/anybody") == ""


def test_the_running_daemon_has_no_privileges(running: Service) -> None:
    lines = (line.split(":", 1) for line in running.file("status").splitlines())
    status = {key: value.split() for key, value in lines}
    capabilities = {
        key: int(status[f"Cap{key}"][0], 16) for key in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    }
    assert dict.fromkeys(capabilities, 0) == capabilities
    uid = running.machine.output("id", "-u", "syncd")
    assert [uid] * 4 == status["Uid"]
    assert status["NoNewPrivs"] == ["1"]
    assert status["Seccomp"] == ["2"]  # a filter, seccomp(2)


def test_the_daemon_lives_in_namespaces_of_its_own(running: Service) -> None:
    """All but the network, and the processes, of which it sees only its own."""
    machine = running.machine
    shared = {}
    for name in ("mnt", "user", "ipc", "uts", "net", "pid"):
        own, init = (
            machine.output("readlink", f"/proc/{pid}/ns/{name}") for pid in (running.pid, 1)
        )
        shared[name] = own == init
    expected = {
        "mnt": False,
        "user": False,
        "ipc": False,
        "uts": False,
        "net": True,
        "pid": True,
    }
    assert expected == shared
