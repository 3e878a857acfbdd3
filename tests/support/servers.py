"""Real XMPP servers for tests: as any user, from a temporary folder, without systemd.

Each has the accounts of `USERS`, all in each other's rosters, and a SOCKS5 proxy (XEP-0065).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import trustme

from tests.support.processes import Process, free_ports, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

DOMAIN = "example.test"
USERS = ("alice", "bob", "carol")

# How long a server may take until it can be used: 0.05 s (Prosody) and 1.3 s (ejabberd) on
# an idle machine.
START_TIMEOUT = 60.0  # seconds

# One step of a conversation with a server that is there.
_STEP_TIMEOUT = 5.0  # seconds

_MAX_ANSWER = 65_536  # bytes; stream features are a few hundred

_CERTIFICATE_LIFE = timedelta(days=30)

_PROSODY = """\
daemonize = false
data_path = "{dir}/data"
pidfile = "{dir}/prosody.pid"
-- Else it refuses as root, and hangs half started.
run_as_root = true
certificates = "{dir}"
interfaces = {{ "{address}" }}
c2s_ports = {{ {port} }}
c2s_direct_tls_ports = {{ {tls_port} }}
s2s_ports = {{}}
http_ports = {{}}
https_ports = {{}}
proxy65_ports = {{ {proxy_port} }}
proxy65_interfaces = {{ "{address}" }}
modules_enabled = {{ "disco"; "roster"; "saslauth"; "tls"; "ping"; "smacks"; }}
modules_disabled = {{ "s2s" }}
c2s_require_encryption = true
-- With the passwords in plain it offers every SCRAM.
authentication = "internal_plain"
log = {{ {{ levels = {{ min = "info" }}, to = "console" }} }}
ssl = {{ key = "{dir}/server.key"; certificate = "{dir}/server.pem" }}
VirtualHost "{domain}"
{components}
"""

# What comes in front of the former.
_LIMITS = 'limits = {{ c2s = {{ rate = "%dkb/s"; burst = "2s" }} }}\n'

_PROXY = """\
Component "proxy.{domain}" "proxy65"
    proxy65_address = "{address}"
"""

_EJABBERD = """\
hosts: ["{domain}"]
loglevel: info
certfiles: ["{dir}/both.pem"]
acme: {{auto: false}}
auth_method: internal
# With the passwords in plain it offers every SCRAM.
auth_password_format: plain
listen:
  - port: {port}
    ip: "127.0.0.1"
    module: ejabberd_c2s
    starttls: true
    starttls_required: true
    access: all
  - {{port: {tls_port}, ip: "127.0.0.1", module: ejabberd_c2s, tls: true, access: all}}
modules:
  mod_disco: {{}}
  mod_roster: {{}}
  mod_ping: {{}}
  mod_caps: {{}}
  mod_admin_extra: {{}}
  mod_stream_mgmt: {{}}
  mod_proxy65: {{host: "proxy.{domain}", ip: "127.0.0.1", port: {proxy_port}, access: all}}
"""

# Printed by ejabberd, which opens its ports before it knows its users.
_READY = "SYNCD-TEST-READY"


@dataclass(kw_only=True, slots=True)
class Server:
    """A server that runs, or ran.

    Attributes:
      kind: ``prosody`` or ``ejabberd``.
      host: Where it listens.
      port: For clients that use STARTTLS.
      tls_port: For clients that use TLS from the first byte.
      proxy_port: Of its SOCKS5 proxy.
      ca_file: Who signed its certificate, PEM.
      domain: The one it serves.
      process: The server itself.
    """

    kind: str
    host: str
    port: int
    tls_port: int
    proxy_port: int
    ca_file: Path
    domain: str
    process: Process
    ready_line: str | None

    @property
    def log_file(self) -> Path:
        """What it has said, in all its runs."""
        return self.process.log_file

    @property
    def running(self) -> bool:
        """Whether it is there."""
        try:
            return self.process.pid > 0 and self.process.returncode is None
        except AssertionError:
            return False

    def password(self, user: str) -> str:
        """The password of one of `USERS`."""
        assert user in USERS
        return f"pw-{user}"

    def start(self) -> None:
        """Start it, and wait until a client can log in.

        An open port is not enough, and may even be somebody else's: so its features are
        read, and its certificate must be ours.
        """
        said = self.log_file.stat().st_size if self.log_file.exists() else 0
        self.process.spawn()

        def ready() -> bool:
            self.process.check_running()
            if self.ready_line is not None:
                with self.log_file.open("rb") as log:
                    log.seek(said)
                    if self.ready_line.encode() not in log.read():
                        return False
            try:
                with connect(self) as secured:
                    return b"<mechanisms" in open_stream(secured, self.domain)
            except (OSError, EOFError):
                return False

        try:
            until(ready, f"{self.kind} takes clients", START_TIMEOUT)
        except BaseException as error:
            self.process.kill()
            error.add_note(f"--- log of {self.kind} ---\n{self.process.tail()}")
            raise

    def stop(self) -> None:
        """Let it say goodbye to its clients, and end."""
        self.process.terminate()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()

    def restart(self) -> None:
        """Stop it, and start it with the accounts and rosters it had."""
        self.stop()
        self.start()


# --- The two kinds


@contextlib.contextmanager
def prosody(
    directory: Path,
    *,
    address: str = "127.0.0.1",
    inside: Sequence[str] = (),
    proxy: bool = True,
    rate: int = 0,
) -> Iterator[Server]:
    """Run Prosody for as long as the block lasts.

    Args:
      directory: For everything that it writes.
      address: Where it listens.
      inside: A command that runs another one, in a network of its own.
      proxy: Whether it has a SOCKS5 proxy.
      rate: How many bytes each client may send in a second, thousands; 0 is no limit.
    """
    data = directory / "data" / re.sub(r"[^a-z0-9]", lambda c: f"%{ord(c[0]):02x}", DOMAIN)
    for store in ("accounts", "roster"):
        (data / store).mkdir(parents=True)
    for user in USERS:
        (data / "accounts" / f"{user}.dat").write_text(
            f'return {{ ["password"] = "pw-{user}" }};\n'
        )
        others = "".join(
            f' ["{other}@{DOMAIN}"] = {{ subscription = "both"; groups = {{}}; }};'
            for other in USERS
            if other != user
        )
        (data / "roster" / f"{user}.dat").write_text(
            f"return {{{others} [false] = {{ version = 1 }} }};\n"
        )
    config = directory / "prosody.cfg.lua"
    template = _PROSODY
    if rate:
        template = _LIMITS % (rate // 1000) + template.replace('"smacks"', '"smacks"; "limits"')
    with _running(
        "prosody",
        directory,
        config,
        template.replace("{components}", _PROXY if proxy else ""),
        [*inside, "prosody", "-F", "--config", str(config)],
        {},
        address=address,
    ) as server:
        yield server


@contextlib.contextmanager
def ejabberd(directory: Path) -> Iterator[Server]:
    """Run ejabberd for as long as the block lasts.

    It is started by ``erl``: ``ejabberdctl`` refuses all users but root and its own. Without
    a node name it needs neither epmd nor a cookie, so several run side by side.

    Args:
      directory: For everything that it writes.
    """
    (directory / "db").mkdir()
    config = directory / "ejabberd.yml"
    host = f'<<"{DOMAIN}">>'
    setup = [
        f'ejabberd_auth:try_register(<<"{user}">>,{host},<<"pw-{user}">>)' for user in USERS
    ]
    setup += [
        f'mod_admin_extra:add_rosteritem(<<"{user}">>,{host},<<"{other}">>,{host},'
        f'<<"{other}">>,<<>>,<<"both">>)'
        for user, other in permutations(USERS, 2)
    ]
    # Busy waiting would take from the daemons what little CPU a small machine has.
    argv = ["erl", "-noinput", "+sbwt", "none", "+sbwtdcpu", "none", "+sbwtdio", "none"]
    argv += ["-mnesia", "dir", f'"{directory / "db"}"', "-s", "ejabberd"]
    argv += ["-eval", ",".join([*setup, f'io:format("{_READY}~n").'])]
    environment = {
        "ERL_LIBS": _erlang_libraries(),
        "EJABBERD_CONFIG_PATH": str(config),
        "EJABBERD_LOG_PATH": str(directory / "ejabberd.log"),
        "EJABBERD_PID_PATH": str(directory / "ejabberd.pid"),
        "ERL_CRASH_DUMP": str(directory / "erl_crash.dump"),
        "HOME": str(directory),  # for the cookie that Erlang may want to write
    }
    with _running(
        "ejabberd", directory, config, _EJABBERD, argv, environment, ready_line=_READY
    ) as server:
        yield server


KINDS: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Server]]] = {
    "prosody": prosody,
    "ejabberd": ejabberd,
}

# Of each: the file with its configuration.
_FILES = {"prosody": "prosody.cfg.lua", "ejabberd": "ejabberd.yml"}


@contextlib.contextmanager
def configured(
    kind: str, directory: Path, settings: Sequence[tuple[str, str]]
) -> Iterator[Server]:
    """Run one with more settings than all others have.

    Args:
      kind: Of `KINDS`.
      directory: For everything that it writes.
      settings: A word of its configuration each, and what is put before that.
    """
    with KINDS[kind](directory) as server:
        config = directory / _FILES[kind]
        text = config.read_text(encoding="utf-8")
        for word, setting in settings:
            before, found, behind = text.partition(word)
            assert found, f"{kind} has no {word} any more"
            text = before + setting + found + behind
        config.write_text(text, encoding="utf-8")
        server.restart()
        yield server


# What each needs: program, and the Debian packages that bring it.
_NEEDS = {
    "prosody": ("prosody", "prosody lua-sec"),
    "ejabberd": ("ejabberdctl", "ejabberd"),
}


def missing(kind: str) -> str:
    """Why a kind of server cannot be started here; empty if it can."""
    program, packages = _NEEDS[kind]
    if _find(program):
        return ""
    return f"{kind} is not installed here: apt-get install {packages}"


def _find(program: str) -> str | None:
    # Debian puts servers where only root's PATH looks.
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def _erlang_libraries() -> str:
    """Where ejabberd's code is, which only its own start script knows."""
    script = _find("ejabberdctl")
    assert script is not None
    found = re.search(
        r"^ERL_LIBS='(.*)'", Path(script).read_text(encoding="utf-8"), re.MULTILINE
    )
    return found[1] if found else ""


@contextlib.contextmanager
def _running(
    kind: str,
    directory: Path,
    config: Path,
    template: str,
    argv: list[str],
    environment: dict[str, str],
    *,
    ready_line: str | None = None,
    address: str = "127.0.0.1",
) -> Iterator[Server]:
    port, tls_port, proxy_port = free_ports(3)
    _certify(directory)
    config.write_text(
        template.format(
            dir=directory,
            domain=DOMAIN,
            address=address,
            port=port,
            tls_port=tls_port,
            proxy_port=proxy_port,
        )
    )
    process = Process(
        kind,
        argv,
        log_file=directory / f"{kind}.out",
        env={"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **environment},
    )
    server = Server(
        kind=kind,
        host=address,
        port=port,
        tls_port=tls_port,
        proxy_port=proxy_port,
        ca_file=directory / "ca.pem",
        domain=DOMAIN,
        process=process,
        ready_line=ready_line,
    )
    server.start()
    try:
        yield server
    finally:
        if server.running:
            server.stop()
        process.kill()


def _certify(directory: Path) -> None:
    """Make a certificate for the domain, and the authority that signed it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    # trustme's own end, the year 3000, is more milliseconds ahead than an Erlang timer can
    # count: ejabberd then says it is well and refuses every STARTTLS.
    leaf = authority.issue_cert(DOMAIN, not_after=datetime.now(UTC) + _CERTIFICATE_LIFE)
    leaf.private_key_pem.write_to_path(directory / "server.key")
    leaf.cert_chain_pems[0].write_to_path(directory / "server.pem")
    leaf.private_key_and_cert_chain_pem.write_to_path(directory / "both.pem")


# --- The least of a client: enough to know that a server is there


@contextlib.contextmanager
def connect(server: Server, *, direct: bool = False) -> Iterator[ssl.SSLSocket]:
    """Connect as far as TLS; the certificate must be the server's.

    Args:
      server: To where.
      direct: TLS from the first byte (XEP-0368) instead of STARTTLS (RFC 6120 section 5).

    Raises:
      OSError: Nobody is there, or it is another one.
      EOFError: It does not want us.
    """
    context = _trust(server.ca_file, server.ca_file.stat().st_mtime_ns)
    port = server.tls_port if direct else server.port
    with socket.create_connection((server.host, port), timeout=_STEP_TIMEOUT) as plain:
        if not direct:
            if b"<starttls" not in open_stream(plain, server.domain):
                raise EOFError("it offers no STARTTLS")
            plain.sendall(b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
            read_until(plain, b"<proceed")
        with context.wrap_socket(plain, server_hostname=server.domain) as secured:
            yield secured


@functools.cache
def _trust(ca_file: Path, _changed: int) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(ca_file))


def open_stream(connection: socket.socket, domain: str) -> bytes:
    """Open a stream, and read the server's features (RFC 6120 section 4.3.2)."""
    connection.sendall(
        f"<?xml version='1.0'?><stream:stream to='{domain}' version='1.0' "
        "xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>".encode()
    )
    return read_until(connection, b"</stream:features>")


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Read until the server has said something.

    Raises:
      EOFError: It said something else, or too much.
      OSError: It hung up, or says nothing.
    """
    data = b""
    while end not in data:
        received = connection.recv(4096)
        data += received
        if not received or b"<failure" in data or len(data) > _MAX_ANSWER:
            raise EOFError(f"instead of {end!r} the server said {data!r}")
    return data
