"""The configuration: config.toml -> a frozen `Config`, or one error that names all faults.

`TABLES` describes every key: what it holds, what it does, its default. The rest is what a
single key cannot know: where paths start, which keys exclude each other, which folders
overlap. `parse` judges the text, `places.check_paths` the disk, `load` both.

More than 400 lines, because each key has six of them and all keys belong side by side.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from syncd.errors import ConfigError
from syncd.settings import places
from syncd.settings.password import KEYS as PASSWORD_KEYS
from syncd.settings.password import PasswordSource, choose_source

# Part of this module's interface, too: syncctl looks where the daemon looks.
from syncd.settings.places import default_config_paths as default_config_paths
from syncd.settings.places import default_socket as default_socket
from syncd.settings.places import default_state_dir as default_state_dir
from syncd.settings.toml_keys import (
    Key,
    Place,
    Report,
    UnfitError,
    argument_list,
    boolean,
    byte_count,
    byte_rate,
    check_table_names,
    expected,
    list_of,
    number,
    one_of,
    path,
    read_table,
    read_text,
    secret,
    whole_number,
)
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# A folder's id travels in every offer and stands in messages and file names.
_FOLDER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# As openssl and browsers show it, or without the colons.
_SHA_256 = re.compile(r"[0-9A-Fa-f]{2}(?::?[0-9A-Fa-f]{2}){31}")

MAX_SETTLE = 3600.0  # seconds; a file that takes an hour's pause belongs renamed into place
MAX_PARALLEL = 64  # transfers; each is a thread
MAX_FILES = 1 << 32  # in a day; as many inodes as most file systems can have
# Below it nobody could read the question; above it somebody has gone home.
ANSWER_TIMEOUTS = (10.0, 3600.0)  # seconds


# --- What the daemon gets


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a TCP port.

    Attributes:
      host: A name, an IPv4 address, or an IPv6 address without brackets.
      port: 0 stands for any free one (to listen), or for the listener's (to advertise).
    """

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        """Read ``host:port`` or ``[IPv6]:port``.

        Raises:
          ValueError: It is neither.
        """
        found = re.fullmatch(r"(?:\[([^\]]+)\]|([^\s:/@\[\]]+)):([0-9]{1,5})", text)
        if not found or int(found[3]) > 0xFFFF:
            raise ValueError(f"{text!r} is not host:port")
        if found[1]:
            return Address(str(ipaddress.IPv6Address(found[1])), int(found[3]))
        return Address(found[2], int(found[3]))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Who we are, and how the server is reached.

    Attributes:
      jid: Our address; without a resource the daemon picks a stable one.
      password: Where the password comes from.
      server: Replaces the look-up of SRV records.
      tls: "auto" prefers direct TLS where SRV records offer it.
      ca_file: Further trust anchors, PEM.
      certificate_fingerprint: SHA-256 of the server's certificate, which is then the only one
        to be trusted, whatever else it says.
      allow_plain: SASL PLAIN may be used, inside TLS only.
    """

    jid: JID
    password: PasswordSource
    server: Address | None
    tls: Literal["starttls", "direct", "auto"]
    ca_file: Path | None
    certificate_fingerprint: bytes | None
    allow_plain: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytestreams:
    """The ways that bytes may take, tried in this order: direct, proxies, IBB.

    Attributes:
      listen: Where the SOCKS5 server listens; port 0 is any free one. None: at every address
        of IPv6 and IPv4, at any free port.
      advertise: Our addresses as others reach them; empty: the non-loopback ones. Port 0
        is the port that the listener got.
      direct: Whether direct connections are offered and tried.
      proxies: XEP-0065 proxies to use; "auto" asks the server for its own.
      ibb: Whether bytes may go through the server as a last resort.
    """

    listen: Address | None
    advertise: tuple[Address, ...]
    direct: bool
    proxies: Literal["auto"] | tuple[JID, ...]
    ibb: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """How files travel.

    Attributes:
      encryption: Whether a file is sealed end to end.
      parallel: Transfers at a time to one peer.
      answer_timeout: How long an ordinary client may take to answer an offer, seconds.
      limit_up: Bytes per second that leave, all peers together; 0: no limit.
      limit_down: Bytes per second that come in, likewise.
    """

    encryption: Literal["preferred", "required", "off"]
    parallel: int
    answer_timeout: float
    limit_up: int
    limit_down: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """What holds for one peer only.

    Attributes:
      jid: A bare JID. A peer that no folder names can still be sent single files.
      parallel: Transfers at a time to it; None: as for all.
      limit_up: Bytes per second to it; 0: no limit of its own.
      limit_down: Bytes per second from it, likewise.
      max_file: The longest file that is accepted from it, bytes; 0: any.
      quota: Bytes that are accepted from it within 24 hours; 0: any number.
      max_files: Files, and directories made for them, likewise.
    """

    jid: JID
    parallel: int | None
    limit_up: int
    limit_down: int
    max_file: int
    quota: int
    max_files: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A watched folder.

    Attributes:
      id: Its name on the wire, the same at both ends.
      path: Where it is, absolute.
      send_to: Who gets what is dropped into it; a full JID fixes the resource.
      accept_from: Bare JIDs whose files land in it.
      settle: Seconds that a file written in place must rest before it is sent.
      names: Which names of others' files are taken: any that Linux can hold, or only those
        that Windows and macOS can hold, and tell apart, too.
      accept_hidden: Whether names that begin with a dot are taken from others.
    """

    id: str
    path: Path
    send_to: tuple[JID, ...]
    accept_from: tuple[JID, ...]
    settle: float
    names: Literal["any", "portable"]
    accept_hidden: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Inbox:
    """Where files go that are offered without a folder.

    Attributes:
      path: Where it is, absolute.
      accept_from: Bare JIDs whose files land in it.
    """

    path: Path
    accept_from: tuple[JID, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything that the user decides; checked, and complete.

    Attributes:
      state_dir: Where the journal, the identity and partial files live.
      control_socket: Where syncctl finds the daemon.
      inbox: None when files without a folder are declined.
      peers: Each at most once.
      warnings: What works and should still be changed, a sentence each.
    """

    account: Account
    state_dir: Path
    control_socket: Path
    bytestreams: Bytestreams
    transfer: Transfer
    folders: tuple[Folder, ...]
    inbox: Inbox | None
    peers: tuple[Peer, ...]
    warnings: tuple[str, ...]


# --- What the file may say


def _jid(*, local: bool, resource: bool) -> Callable[[object], JID]:
    example = "alice@example.org" if local else "proxy.example.org"

    def read(value: object) -> JID:
        what = expected(f'a JID such as "{example}"', value, text=True)
        if not isinstance(value, str):
            raise UnfitError(what)
        try:
            jid = JID.parse(value)
        except ValueError as error:
            raise UnfitError(f"{what}: {error}") from error
        if local and not jid.local:
            raise UnfitError(f"{what}: it has nothing before an @")
        if jid.resource and not resource:
            raise UnfitError(f'{what}: it must not have a resource; write "{jid.bare}"')
        return jid

    return read


def _address(*, any_port: bool = False) -> Callable[[object], Address]:
    def read(value: object) -> Address:
        what = expected('"host:port" or "[IPv6]:port"', value, text=True)
        if not isinstance(value, str):
            raise UnfitError(what)
        try:
            address = Address.parse(value)
        except ValueError as error:
            raise UnfitError(what) from error
        if not address.port and not any_port:
            raise UnfitError(f"{what}: nobody can connect to port 0")
        return address

    return read


def _proxies(value: object) -> Literal["auto"] | tuple[JID, ...]:
    if value == "auto":
        return "auto"
    if not isinstance(value, list):
        raise UnfitError(expected('"auto" or a list such as ["proxy.example.org"]', value))
    proxy = _jid(local=False, resource=True)
    found: tuple[JID, ...] = list_of(proxy, example='["proxy.example.org"]')(value)
    return found


def _folder_id(value: object) -> str:
    if not isinstance(value, str) or not _FOLDER_ID.fullmatch(value):
        raise UnfitError(
            expected("1 to 64 of the characters A-Z a-z 0-9 . _ -", value, text=True)
        )
    return value


def _fingerprint(value: object) -> bytes:
    what = 'a SHA-256 fingerprint of 64 hexadecimal digits, such as "9F:86:D0:..."'
    if not isinstance(value, str) or not _SHA_256.fullmatch(value):
        raise UnfitError(expected(what, value, text=True))
    return bytes.fromhex(value.replace(":", ""))


_SENDERS = list_of(_jid(local=True, resource=False), example='["carol@example.org"]')
_INBOX_SENDERS = list_of(
    _jid(local=True, resource=False), example='["dave@example.org"]', least=1
)

TABLES: Final[Mapping[str, tuple[Key, ...]]] = {
    "account": (
        Key(
            "jid",
            _jid(local=True, resource=True),
            required=True,
            doc="The XMPP address to log in with; without a resource syncd picks a stable one.",
        ),
        Key(
            "password_file",
            path,
            doc="A file that holds the password and nothing else; only you may read it.",
        ),
        Key(
            "password_command",
            argument_list,
            doc="A program and its arguments that print the password within 30 seconds.",
        ),
        Key("password", secret, doc="The password itself; this warns."),
        Key(
            "server",
            _address(),
            doc="Connect to this host and port instead of looking the domain up in the DNS.",
        ),
        Key(
            "tls",
            one_of("starttls", "direct", "auto"),
            default="auto",
            doc="How encryption to the server starts; it is never left out.",
        ),
        Key(
            "ca_file",
            path,
            doc="Also trust the certificates in this PEM file, for a server of your own.",
        ),
        Key(
            "certificate_fingerprint",
            _fingerprint,
            doc="Trust exactly the server's certificate with this SHA-256 fingerprint, "
            "whatever its names, dates and issuer are, and no other.",
        ),
        Key(
            "allow_plain",
            boolean,
            default=False,
            doc="Show the server the password itself (SASL PLAIN, inside TLS only) "
            "when it knows nothing better.",
        ),
    ),
    "state": (Key("dir", path, doc="Where the journal and half-received files are kept."),),
    "control": (Key("socket", path, doc="The Unix socket through which syncctl asks."),),
    "bytestreams": (
        Key(
            "listen",
            _address(any_port=True),
            doc="Where to wait for direct connections of peers; port 0 is any free one.",
        ),
        Key(
            "advertise",
            list_of(_address(any_port=True), example='["files.example.org:5280"]'),
            default=[],
            doc="The addresses at which peers reach this machine, when it does not know them "
            "itself (NAT); port 0 is the port of listen.",
        ),
        Key(
            "direct",
            boolean,
            default=True,
            doc="Whether peers may be connected directly, which is the fastest way.",
        ),
        Key(
            "proxies",
            _proxies,
            default="auto",
            doc="The SOCKS5 proxies (XEP-0065) to use when no direct connection succeeds.",
        ),
        Key(
            "ibb",
            boolean,
            default=True,
            doc="Whether bytes may go through the XMPP server when nothing else works; slow.",
        ),
    ),
    "transfer": (
        Key(
            "encryption",
            one_of("preferred", "required", "off"),
            default="preferred",
            doc="Whether files are encrypted from end to end.",
        ),
        Key(
            "parallel",
            whole_number(1, MAX_PARALLEL),
            default=4,
            doc="How many files go to one peer at the same time, 1 to 64.",
        ),
        Key(
            "answer_timeout",
            number(*ANSWER_TIMEOUTS, "seconds"),
            default=180.0,
            doc="How many seconds an ordinary XMPP client, which may ask a person, has to "
            "answer an offer, 10 to 3600.",
        ),
        Key(
            "limit_up",
            byte_rate,
            default=0,
            doc="How many bytes per second may leave, to all peers together; 0 is no limit.",
        ),
        Key(
            "limit_down",
            byte_rate,
            default=0,
            doc="How many bytes per second may come in, from all peers together; "
            "0 is no limit.",
        ),
    ),
    "folder": (
        Key(
            "id",
            _folder_id,
            required=True,
            doc="The folder's name, the same at both ends: 1 to 64 of A-Z a-z 0-9 . _ -",
        ),
        Key("path", path, required=True, doc="Where the folder is; it must exist."),
        Key(
            "send_to",
            list_of(_jid(local=True, resource=True), example='["bob@example.org"]'),
            default=[],
            doc="Who gets every file that is dropped into the folder.",
        ),
        Key("accept_from", _SENDERS, default=[], doc="Whose files land in the folder."),
        Key(
            "settle",
            number(0, MAX_SETTLE, "seconds"),
            default=1.0,
            doc="How many seconds a file must rest unchanged before it is sent, 0 to 3600.",
        ),
        Key(
            "names",
            one_of("any", "portable"),
            default="any",
            doc="Which names of files are accepted: any that Linux can hold, "
            "or only those that Windows and macOS can hold and tell apart, too.",
        ),
        Key(
            "accept_hidden",
            boolean,
            doc="Whether files and directories whose names begin with a dot are accepted.",
        ),
    ),
    "inbox": (
        Key("path", path, required=True, doc="Where the files go; it must exist."),
        Key(
            "accept_from",
            _INBOX_SENDERS,
            required=True,
            doc="Who may send files without naming a folder.",
        ),
    ),
    "peer": (
        Key(
            "jid",
            _jid(local=True, resource=False),
            required=True,
            doc="Whom this is about: an address without a resource.",
        ),
        Key(
            "parallel",
            whole_number(1, MAX_PARALLEL),
            doc="How many files go to this peer at the same time, 1 to 64.",
        ),
        Key(
            "limit_up",
            byte_rate,
            default=0,
            doc="How many bytes per second may go to this peer; 0 is no limit of its own.",
        ),
        Key(
            "limit_down",
            byte_rate,
            default=0,
            doc="How many bytes per second may come from this peer; 0 is no limit of its own.",
        ),
        Key(
            "max_file",
            byte_count,
            default=0,
            doc="The longest file that is accepted from this peer, in bytes; 0 is no limit.",
        ),
        Key(
            "quota",
            byte_count,
            default=0,
            doc="How many bytes are accepted from this peer within 24 hours; 0 is no limit.",
        ),
        Key(
            "max_files",
            whole_number(0, MAX_FILES),
            default=0,
            doc="How many files are accepted from this peer within 24 hours; 0 is no limit.",
        ),
    ),
}
"""Every key, by table; ``folder`` and ``peer`` are arrays of tables."""


# --- Reading


def load(file: Path, *, environ: Mapping[str, str]) -> Config:
    """Read the configuration and look whether its paths are there; blocks on the disk.

    Args:
      file: The configuration file.
      environ: The environment, for defaults and ``~``.

    Raises:
      ConfigError: It cannot be used; the message has one line for each fault.
    """
    text, mode = read_text(file)
    config = parse(text, where=str(file), environ=environ)
    warnings = places.check_paths(config, where=str(file), text=text)
    if config.account.password.inline is not None and mode & places.OTHERS:
        warnings += (
            f"{file}: others may read the password in it; chmod 600 {shlex.quote(str(file))}",
        )
    return replace(config, warnings=config.warnings + warnings)


def parse(text: str, *, where: str, environ: Mapping[str, str]) -> Config:
    """Judge the text of a configuration; whether its paths exist is not asked.

    Args:
      text: TOML.
      where: Path of the file, for messages; relative paths in it start beside it.
      environ: The environment, for defaults and ``~``.

    Raises:
      ConfigError: It cannot be used; the message has one line for each fault.
    """
    report = Report(where=where, text=text)
    check_table_names(report, TABLES)
    beside = Path(where).absolute().parent
    tables = _read_tables(report, places.resolver(beside, environ))
    account = tables["account"]
    source = choose_source(report, account, environ)
    state_dir = _or_default(report, ("state", "dir"), tables, default_state_dir, environ)
    socket = _or_default(report, ("control", "socket"), tables, default_socket, environ)
    places.check_socket(report, socket)
    places.check_overlaps(report, tables["folder"], tables["inbox"], state_dir)
    warnings = places.check_secrets(report, tables["folder"], account, Path(where), socket)
    warnings += places.decide_hidden(report, tables["folder"], environ)
    _check_folders(report, tables["folder"])
    _check_peers(report, tables["peer"])
    _check_trust(report, account)
    _check_ways(report, tables["bytestreams"])
    report.raise_if_any()

    if source.inline is not None:
        warnings.append(
            f"{report.at(('account', 'password'))}: the password stands in the configuration; "
            "better put it into a file of its own and set password_file"
        )
    login = {name: value for name, value in account.items() if name not in PASSWORD_KEYS}
    assert state_dir is not None
    assert socket is not None
    return Config(
        account=Account(password=source, **login),
        state_dir=state_dir,
        control_socket=socket,
        bytestreams=Bytestreams(**tables["bytestreams"]),
        transfer=Transfer(**tables["transfer"]),
        folders=tuple(Folder(**folder) for folder in tables["folder"]),
        inbox=Inbox(**tables["inbox"]) if tables["inbox"] else None,
        peers=tuple(Peer(**peer) for peer in tables["peer"]),
        warnings=tuple(warnings),
    )


def _read(
    report: Report, place: Place, data: object, resolve: Callable[[Path], Path]
) -> dict[str, Any]:
    """Read one table; its paths become absolute."""
    values = read_table(report, place, data, TABLES)
    for name, value in list(values.items()):
        if isinstance(value, Path):
            try:
                values[name] = resolve(value)
            except UnfitError as error:
                report.problem((*place, name), *error.args)
                del values[name]
    return values


def _read_tables(report: Report, resolve: Callable[[Path], Path]) -> dict[str, Any]:
    """Read every table, with its defaults when it is not in the file (inbox: None)."""

    def read(data: object, *place: str | int) -> dict[str, Any]:
        return _read(report, place, data, resolve)

    data = report.data
    tables: dict[str, Any] = {
        name: read(data.get(name, {}), name)
        for name in ("state", "control", "bytestreams", "transfer")
    }
    if "account" not in data:
        report.problem(("account",), "missing; at least jid and a password must be in it")
    tables["account"] = read(data["account"], "account") if "account" in data else {}
    tables["inbox"] = read(data["inbox"], "inbox") if "inbox" in data else None
    for name in ("folder", "peer"):
        several = data.get(name, [])
        if not isinstance(several, list):
            report.problem(
                (name,), f"write [[{name}]], in double brackets: there may be several"
            )
            several = []
        tables[name] = [read(raw, name, index) for index, raw in enumerate(several)]
    return tables


def _or_default(
    report: Report,
    place: tuple[str, str],
    tables: Mapping[str, Any],
    default: Callable[[Mapping[str, str]], Path],
    environ: Mapping[str, str],
) -> Path | None:
    table, key = place
    if (given := tables[table].get(key, ...)) is not None:
        return given if isinstance(given, Path) else None  # it was wrong, and is reported
    try:
        return default(environ)
    except ConfigError as error:
        report.problem(place, f"{error}; set it here")
        return None


def _check_trust(report: Report, account: Mapping[str, Any]) -> None:
    if account.get("ca_file") and account.get("certificate_fingerprint"):
        report.problem(
            ("account", "ca_file"),
            "it has no say beside certificate_fingerprint, which trusts one certificate and "
            "no issuer; leave one of the two out",
        )


def _check_ways(report: Report, bytestreams: Mapping[str, Any]) -> None:
    ways = [bytestreams.get(way, True) for way in ("direct", "proxies", "ibb")]
    if not any(ways):
        report.problem(
            ("bytestreams",),
            "direct, proxies and ibb are all off, so no byte could travel; turn one on",
        )


def _check_folders(report: Report, folders: list[dict[str, Any]]) -> None:
    first: dict[str, int] = {}
    for index, folder in enumerate(folders):
        id_ = folder.get("id")
        if id_ in first:
            report.problem(
                ("folder", index, "id"), f"folder {first[id_] + 1} has the same; ids are unique"
            )
        elif id_ is not None:
            first[id_] = index
        if folder.get("send_to") == folder.get("accept_from") == ():
            report.problem(
                ("folder", index),
                "neither send_to nor accept_from: it would do nothing; give at least one",
            )


def _check_peers(report: Report, peers: list[dict[str, Any]]) -> None:
    first: dict[JID, int] = {}
    for index, peer in enumerate(peers):
        jid = peer.get("jid")
        if jid in first:
            report.problem(
                ("peer", index, "jid"),
                f"peer {first[jid] + 1} is the same; put all its keys below one [[peer]]",
            )
        elif jid is not None:
            first[jid] = index


def find_socket(environ: Mapping[str, str], file: Path | None = None) -> Path:
    """Where syncctl finds the daemon, which may run as another user or as a service.

    Args:
      environ: The environment of syncctl, which lacks what systemd gives to the daemon.
      file: The daemon's configuration. Only its ``[control]`` counts: whether its password
        and folders are there concerns the daemon alone.

    Raises:
      ConfigError: The file cannot be read, or its ``[control]`` not be understood.
    """
    if file is not None:
        text, _ = read_text(file)
        report = Report(where=str(file), text=text)
        resolve = places.resolver(file.absolute().parent, environ)
        control = _read(report, ("control",), report.data.get("control", {}), resolve)
        report.raise_if_any()
        if isinstance(socket := control["socket"], Path):
            return socket
    return places.likely_socket(environ)
