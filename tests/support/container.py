"""A machine for tests that runs a real systemd: a container of the oldest Debian we support.

The operating system is made once by debootstrap and kept in a cache; every machine is that
tree, read-only, below a tmpfs that is gone with it. syncd lies in it as the README installs it,
in a venv of Debian's own Python, with the sources of this checkout.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.processes import Process, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]

# The oldest Debian that has a Python we run on, and the systemd that our units must do with.
SUITE = "bookworm"
PYTHON = "3.11"
_PACKAGES = (
    "acl",  # setfacl lets a service into a folder
    "dbus",
    "iproute2",
    "libpam-systemd",  # user managers
    "procps",  # /bin/kill, by which units reload
    "python3",
    "python3-venv",
    "systemd",
    "systemd-sysv",
)
# The C libraries that wheels may be made for: up to glibc 2.36, which bookworm has.
_GLIBC = range(36, 4, -1)  # minor versions

VENV = "/opt/syncd"
PACKAGE = f"{VENV}/lib/python{PYTHON}/site-packages/syncd"

# Making the tree takes one to three minutes; a slow mirror more.
_MAKE_TIMEOUT = 1200.0  # seconds
# Booting takes two seconds; on a busy machine more.
_BOOT_TIMEOUT = 90.0  # seconds
# A command in the machine answers at once; one that starts or stops a service may take longer.
RUN_TIMEOUT = 60.0  # seconds

# Puts itself into control groups, given up to a "--", and becomes the command behind it.
_ENTER = 'while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@"'

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str:
    """Why no machine can be had here; empty if one can."""
    if os.geteuid() != 0:
        return "only root can boot a systemd in a container"
    needed = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container"}
    lacking = [package for program, package in needed.items() if not _find(program)]
    return f"to boot a systemd: apt-get install {' '.join(lacking)}" if lacking else ""


class Machine:
    """A running container.

    Args:
      process: systemd-nspawn.
      leader: The process that is number 1 inside.

    Attributes:
      process: As given; its log is the console.
    """

    def __init__(self, process: Process, leader: int) -> None:
        self.process = process
        self._leader = leader

    def run(
        self,
        *argv: str,
        input: str = "",  # noqa: A002 - as subprocess calls it
        check: bool = True,
        timeout: float = RUN_TIMEOUT,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, as its root.

        Args:
          argv: The command.
          input: For its standard input.
          check: Whether the test fails when the command does.
          timeout: Seconds.
        """
        done = subprocess.run(
            [
                *("nsenter", "--target", str(self._leader), "--all", "--root", "--wd=/", "--"),
                *("env", "-i", f"PATH={_PATH}", "LANG=C.UTF-8", "SYSTEMD_PAGER=cat"),
                *argv,
            ],
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            said = f"{done.stdout}{done.stderr}"
            assert done.returncode == 0, f"{' '.join(argv)}: {done.returncode}: {said}"
        return done

    def output(self, *argv: str) -> str:
        """Run a command that succeeds, and tell what it printed."""
        return self.run(*argv).stdout.strip()

    def write(
        self, path: str, text: str, *, mode: str = "644", owner: str = "root:root"
    ) -> None:
        """Make a file in the machine, and the directories above it.

        Args:
          path: Absolute.
          text: All of it.
          mode: In octal.
          owner: User and group with a colon between.
        """
        user, _, group = owner.partition(":")
        place = ("install", "-D", "-m", mode, "-o", user, "-g", group, "/dev/stdin", path)
        self.run(*place, input=text)

    def unit(self, name: str, *properties: str) -> dict[str, str]:
        """Tell properties of a unit, as `systemctl show` does."""
        lines = self.output("systemctl", "show", "-p", ",".join(properties), name).splitlines()
        return dict(line.split("=", 1) for line in lines)


@contextlib.contextmanager
def open_image(cache: Path) -> Iterator[Path]:
    """Lend the operating system's tree, which is made unless the cache has it.

    Args:
      cache: A directory of root's, which several processes may use at a time.

    Yields:
      The tree; nobody may write to it.

    Raises:
      AssertionError: It cannot be made; the message ends with what was said.
    """
    project = (ROOT / "pyproject.toml").read_text()
    exact = (ROOT / "tests" / "constraints.txt").read_text()
    base = _named(cache, "base", SUITE, *_PACKAGES, inspect.getsource(_bootstrap))
    tree = _named(cache, "tree", base.name, project, exact, inspect.getsource(_install))
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for other in cache.glob("[a-z]*-*"):  # beside them are the locks of systemd
                if other not in (base, tree):
                    _discard(other)
            if not base.is_dir():
                with _making(base) as unfinished:
                    _bootstrap(unfinished)
            if not tree.is_dir():
                with _making(tree) as unfinished:
                    _command("cp", "--archive", "--reflink=auto", f"{base}/.", str(unfinished))
                    _install(unfinished)
            _lock(tree, fcntl.LOCK_SH, stack)
        yield tree


@contextlib.contextmanager
def boot(tree: Path, directory: Path) -> Iterator[Machine]:
    """Run a machine for as long as the block lasts.

    Args:
      tree: Its operating system; is not changed.
      directory: For the sources that it runs, and for its console's log.

    Yields:
      The machine, all of whose services have started.
    """
    sources = directory / "syncd"
    # A copy that all users may read, whatever the umask of this checkout.
    shutil.copytree(ROOT / "syncd", sources, ignore=shutil.ignore_patterns("__pycache__"))
    _command("chmod", "--recursive", "u=rwX,go=rX", str(sources))
    groups = _control_groups(f"syncd-tests-{os.getpid()}")
    process = Process(
        "the machine",
        [
            *("sh", "-c", _ENTER, "sh", *map(str, groups), "--"),
            # Its end, even a sudden one, is the end of everything inside.
            *("unshare", "--mount-proc", "--pid", "--fork", "--kill-child"),
            *("systemd-nspawn", "--quiet", "--boot", "--console=read-only", "--settings=no"),
            *(f"--directory={tree}", "--volatile=overlay", f"--bind-ro={sources}:{PACKAGE}"),
            # No machined, no systemd and no network is needed outside.
            *("--register=no", "--keep-unit", "--private-network", "--resolv-conf=off"),
            *("--timezone=off", "--link-journal=no", f"--machine=syncd-{os.getpid()}"),
        ],
        log_file=directory / "console",
        env={"PATH": _PATH},
    )
    for group in groups:
        group.mkdir(exist_ok=True)  # one of our number that was killed left it
    process.spawn()
    try:
        found: list[int] = []

        def has_leader() -> bool:
            process.check_running()
            found[:] = _leaders(groups)
            return bool(found)

        until(has_leader, "the machine has a process 1", _BOOT_TIMEOUT)
        machine = Machine(process, found[0])

        def has_booted() -> bool:
            process.check_running()
            state = machine.run("systemctl", "is-system-running", check=False).stdout.strip()
            assert state != "degraded", machine.output("systemctl", "--failed", "--no-legend")
            return state == "running"

        until(has_booted, "the machine has booted", _BOOT_TIMEOUT)
        yield machine
    finally:
        process.kill()
        for group in groups:
            until(functools.partial(_is_gone, group), f"{group} is empty", _BOOT_TIMEOUT)


def _named(cache: Path, kind: str, *made_of: str) -> Path:
    """Where a tree is that is made of these."""
    key = hashlib.sha256(repr([platform.machine(), *made_of]).encode()).hexdigest()
    return cache / f"{kind}-{key[:16]}"


def _lock(tree: Path, how: int, stack: contextlib.ExitStack) -> None:
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, fd)
    fcntl.flock(fd, how)


def _discard(tree: Path) -> None:
    """Remove a tree of another checkout's needs, 400 MB, unless a machine runs on it."""
    with contextlib.ExitStack() as stack, contextlib.suppress(BlockingIOError):
        _lock(tree, fcntl.LOCK_EX | fcntl.LOCK_NB, stack)
        shutil.rmtree(tree)


@contextlib.contextmanager
def _making(tree: Path) -> Iterator[Path]:
    """A directory for a tree, which gets its name when it is whole."""
    unfinished = Path(tempfile.mkdtemp(prefix="making-", dir=tree.parent))
    unfinished.chmod(0o755)
    try:
        yield unfinished
        unfinished.rename(tree)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _bootstrap(tree: Path) -> None:
    """Make Debian as it comes, with our packages."""
    _command(
        *("debootstrap", "--variant=minbase", "--force-check-gpg"),
        *(f"--include={','.join(_PACKAGES)}", SUITE, str(tree), *_mirror()),
    )
    shutil.rmtree(tree / "var" / "cache" / "apt")
    # Timers and logins are of no use to a machine that lives for a minute.
    for unit in ("apt-daily.timer", "apt-daily-upgrade.timer", "console-getty.service"):
        (tree / "etc" / "systemd" / "system" / unit).symlink_to("/dev/null")


def _install(tree: Path) -> None:
    """Install syncd as the README does, but from wheels that were fetched out here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wheels = tree / "wheels"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _command(*pip, "wheel", "--no-deps", f"--wheel-dir={wheels}", str(ROOT))
    _command(
        *(*pip, "download", f"--dest={wheels}", "--only-binary=:all:"),
        *("--implementation=cp", f"--python-version={PYTHON}"),
        *(f"--platform=manylinux_2_{minor}_{platform.machine()}" for minor in _GLIBC),
        f"--platform=manylinux2014_{platform.machine()}",
        f"--constraint={ROOT / 'tests' / 'constraints.txt'}",
        *project["dependencies"],
    )
    inside = ("chroot", str(tree), "env", "-i", f"PATH={_PATH}", "LANG=C.UTF-8")
    _command(*inside, "python3", "-m", "venv", VENV)
    _command(
        *(*inside, f"{VENV}/bin/pip", "--quiet", "install", "--no-index"),
        *("--find-links=/wheels", "syncd"),
    )
    shutil.rmtree(wheels)


def _mirror() -> Sequence[str]:
    """The one that this machine takes the same Debian from; else debootstrap knows one."""
    if not _find("apt-get"):
        return ()
    asked = ("apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)")
    lines = _command(*asked, "Created-By: Packages").splitlines()
    wanted = f"{SUITE} main "
    return [line.removeprefix(wanted) for line in lines if line.startswith(wanted)][:1]


def _control_groups(name: str) -> list[Path]:
    """Directories below our own control groups, for what systemd tracks its services with."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        top = Path("/sys/fs/cgroup")
        if controllers == "name=systemd":
            found.append(top / "systemd" / path[1:] / name)
        elif not controllers:
            # cgroups(7): version 2, which a machine with version 1 has beside that.
            unified = top / "unified"
            found.append((unified if unified.is_dir() else top) / path[1:] / name)
    return found


def _leaders(groups: Sequence[Path]) -> list[int]:
    """The processes in the groups that are number 1 in a machine."""
    found = []
    for members in (each for group in groups for each in group.rglob("cgroup.procs")):
        for number in members.read_text().split():
            with contextlib.suppress(OSError):  # one that has ended meanwhile
                status = Path(f"/proc/{number}/status").read_text()
                # Once it is systemd, the mounts are all there.
                if re.search(r"\AName:\tsystemd\n(.*\n)*NSpid:.*\t1\n", status):
                    found.append(int(number))
    return found


def _is_gone(group: Path) -> bool:
    """Remove a control group and those below it; whether that could be done."""
    below = sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True)
    try:
        for path in [*below, group]:
            path.rmdir()
    except OSError:  # the last process is not gone yet
        return False
    return True


def _command(*argv: str) -> str:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
        timeout=_MAKE_TIMEOUT,
        check=False,
    )
    said = f"{done.stdout[-4096:]}{done.stderr[-4096:]}"
    assert done.returncode == 0, f"{argv[0]} failed with {done.returncode}:\n{said}"
    return done.stdout


def _find(program: str) -> str | None:
    # Debian puts such programs where only root's PATH looks.
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
