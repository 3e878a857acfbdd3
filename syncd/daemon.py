"""The daemon: wires everything together, owns the nurseries, hears the signals.

::

    run_daemon
    └ services                 end last
      ├ control server         answers syncctl
      ├ listener               the one SOCKS5 port
      ├ client                 connect, run, back off, again
      ├ watchdog               tells systemd that the loop turns
      └ users
        ├ engine               one task per folder, one per delivery
        └ receiver             one task per accepted offer

On SIGTERM the users end first: a transfer that is cut goes on where it was, so there is
nothing to wait for. Then the server is told goodbye, and the services end. SIGHUP reads the
configuration anew: a good one takes the place of the old by ending the users and services
and beginning again, a bad one is reported and changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import secrets
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import trio

import syncd
from syncd import config as configuration
from syncd.bytestreams import s5b
from syncd.bytestreams.sockets import Listener, open_listener
from syncd.control import messages
from syncd.control.escape import printable, printable_lines
from syncd.control.server import serve
from syncd.disk.partial import Identity
from syncd.errors import (
    ConfigError,
    DeclinedError,
    LockedError,
    OfflineError,
    StanzaError,
    SyncdError,
)
from syncd.link.client import Client
from syncd.link.connect import Account
from syncd.link.contacts import Contacts
from syncd.log import set_up as set_up_log
from syncd.notify import Notifier, watchdog_interval
from syncd.status import Reporter, Transfers
from syncd.sync import engine as sync_engine
from syncd.sync.journal import Arrival, open_journal
from syncd.sync.plan import Delivery, FileVersion
from syncd.transfer import schema, si
from syncd.transfer.receiver import Arriving, Inbox, Incoming, Known, Receiver
from syncd.transfer.sender import Sender, Source, Target
from syncd.xmpp import disco
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from syncd.config import Config, Folder
    from syncd.transfer.pump import Progress

log = logging.getLogger("syncd")

EXIT_FAILED = 1
EXIT_LOCKED = 11
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h; systemd does not restart on it

IDENTITY = disco.Identity("client", "bot", "syncd")
# What we say we can do; each is served by a handler below.
FEATURES = frozenset({si.NS_SI, si.NS_FILE, si.NS_FEATURE, si.BYTESTREAMS, si.NS_SYNC})

# Each costs a question and its refusal; a person has a handful of clients.
MAX_RESOURCES_TRIED = 4  # resources of a peer, in one attempt

# How long the server may take to answer our goodbye.
GOODBYE = 2.0  # seconds


class Links:
    """Joins the layers, which know nothing of each other, with plain callables.

    Args:
      config: The user's decisions.
      resource: For our full JID, unless the user fixed one.
      transfers: Where running transfers show themselves.
    """

    def __init__(self, config: Config, resource: str, transfers: Transfers) -> None:
        self.config = config
        self._transfers = transfers
        self._folders = {folder.id: folder for folder in config.folders}
        peers = {peer: None for folder in config.folders for peer in folder.send_to}
        accepted = [jid for folder in config.folders for jid in folder.accept_from]
        accepted += config.inbox.accept_from if config.inbox else ()
        bare = {peer.bare for peer in peers}
        peers |= {jid: None for jid in accepted if jid not in bare}
        self.receiver = Receiver(
            own_jid=self.own_jid,
            inbox_for=self._inbox_for,
            known=self._known,
            arriving=self._arriving,
            watch=self._watch_incoming,
        )
        account = config.account
        jid, server = account.jid, account.server
        self.client = Client(
            Account(
                jid=jid if jid.resource else jid.with_resource(resource),
                password=account.password.read,
                server=(server.host, server.port) if server else None,
                tls=account.tls,
                ca_file=account.ca_file,
                allow_plain=account.allow_plain,
                fingerprint=account.certificate_fingerprint,
                least=_read_login(config.state_dir, jid),
                # A server that chooses the resource cannot keep the one that the user chose.
                agent="" if jid.resource else _kept(config.state_dir / "agent", _new_agent),
            ),
            Contacts(peers, required=si.REQUIRED_FEATURES, preferred=si.NS_SYNC),
            identity=IDENTITY,
            version=syncd.__version__,
            features=FEATURES,
            handlers={
                si.SI: self.receiver.on_offer,
                s5b.TAG: self.receiver.on_bytestream,
                si.FINISH: self.receiver.on_finish,
            },
            changed=self._contacts_changed,
            logged_in=lambda mechanism: _write_login(config.state_dir, jid, mechanism),
        )
        self.engine: sync_engine.Engine
        self.sender: Sender

    def own_jid(self) -> JID | None:
        """Our full JID while we are online."""
        return self.client.jid

    def streamhosts(self, listener: Listener) -> list[tuple[str, int]]:
        """Where targets can connect to: as configured, else our own addresses."""
        advertised = self.config.bytestreams.advertise
        if advertised:
            return [(address.host, address.port or listener.port) for address in advertised]
        return [(host, listener.port) for host in listener.addresses()]

    async def send(self, delivery: Delivery) -> sync_engine.Sent:
        """Send one delivery of the engine's."""
        version = delivery.version
        source = Source(
            root=self._folders[version.folder].path,
            folder=version.folder,
            path=version.path,
            version=Identity(version.size, version.mtime_ns, version.inode),
        )
        peer = JID.parse(delivery.peer)
        for _ in range(MAX_RESOURCES_TRIED):
            resource = self.client.contacts.choose(peer)
            assert resource.info is not None
            target = Target(jid=resource.jid, is_syncd=si.NS_SYNC in resource.info.features)
            try:
                sent = await self.sender.send(source, target)
            except OfflineError as error:
                if not isinstance(error.__cause__, StanzaError):
                    raise
                # The answer says that this client is not there; perhaps another one is.
                log.info("%s; trying the next of this peer's clients", error)
                self.client.gone(resource)
                continue
            outcome: Literal["delivered", "sent"] = "delivered" if sent.confirmed else "sent"
            log.info("%s %s to %s", outcome, printable(version.path), target.jid)
            return sync_engine.Sent(outcome=outcome, digest=sent.digest.hex())
        raise OfflineError(f"{peer} is offline, though its server says otherwise")

    def watch_outgoing(
        self, target: Target, source: Source, progress: Progress
    ) -> contextlib.AbstractContextManager[None]:
        """Show a transfer from here."""
        return self._transfers.watch(
            "send",
            peer=str(target.jid),
            folder=source.folder,
            path=source.path,
            size=source.version.size,
            progress=progress,
        )

    def _watch_incoming(self, incoming: Incoming) -> contextlib.AbstractContextManager[None]:
        return self._transfers.watch(
            "receive",
            peer=str(incoming.sender),
            folder=incoming.inbox.folder,
            path=incoming.path,
            size=incoming.size,
            progress=incoming.progress,
        )

    def _contacts_changed(self) -> None:
        online = self.client.contacts.online()
        # The engine knows peers as they are configured, a fixed resource included.
        self.engine.set_online(
            frozenset(
                str(peer)
                for folder in self.config.folders
                for peer in folder.send_to
                if peer in online
            )
        )

    def _inbox_for(self, sender: JID, folder: str) -> Inbox:
        if folder:
            found = self._folders.get(folder)
            if found is not None and sender in found.accept_from:
                return Inbox(root=found.path, folder=folder)
        elif self.config.inbox is not None and sender in self.config.inbox.accept_from:
            return Inbox(root=self.config.inbox.path, folder="")
        raise DeclinedError("not accepted from you here")

    async def _known(self, inbox: Inbox, path: str) -> Known | None:
        arrival = await self.engine.known_arrival(inbox.folder, path) if inbox.folder else None
        if arrival is None:
            return None
        version = arrival.version
        return Known(
            peer=JID.parse(arrival.peer),
            identity=Identity(version.size, version.mtime_ns, version.inode),
            source_size=arrival.source_size,
            source_mtime_ns=arrival.source_mtime_ns,
            digest=bytes.fromhex(arrival.digest),
        )

    async def _arriving(self, arriving: Arriving) -> None:
        if not arriving.inbox.folder:
            return  # nothing goes out from the inbox, so nothing can be echoed
        known = arriving.known
        version = FileVersion(
            folder=arriving.inbox.folder,
            path=arriving.path,
            size=known.identity.size,
            mtime_ns=known.identity.mtime_ns,
            inode=known.identity.inode,
        )
        await self.engine.arriving(
            Arrival(
                version=version,
                peer=str(known.peer),
                digest=known.digest.hex(),
                source_size=known.source_size,
                source_mtime_ns=known.source_mtime_ns,
            )
        )


async def run_daemon(config: Config, notifier: Notifier, stop: trio.Event) -> None:
    """Run until `stop` is set.

    Args:
      config: Checked.
      notifier: Tells systemd.
      stop: Ends everything in order.

    Raises:
      LockedError: Another daemon uses the state directory or the control socket.
      SyncdError: Something that is needed to run cannot be had.
    """
    transfers = Transfers()
    async with (
        open_journal(config.state_dir) as journal,
        _maybe_listener(config) as listener,
        trio.open_nursery() as services,
    ):
        links = Links(config, _kept(config.state_dir / "resource", _new_resource), transfers)
        links.engine = sync_engine.Engine(
            journal,
            [_rule(folder) for folder in config.folders],
            links.send,
            parallel=config.transfer.parallel,
        )
        links.sender = Sender(
            request=links.client.request,
            own_jid=links.own_jid,
            wait_online=links.client.wait_online,
            listener=listener,
            streamhosts=lambda: links.streamhosts(listener) if listener else [],
            watch=links.watch_outgoing,
        )
        reporter = Reporter(config, links.client, links.engine, transfers)

        async def answer(request: messages.Request) -> messages.Reply:
            match request:
                case messages.StatusRequest():
                    return await reporter.status()
                case messages.RescanRequest():
                    await links.engine.rescan()
                    status = await reporter.status()
                    return messages.Rescanned(files=sum(f.files for f in status.folders))
                case messages.PingRequest():
                    return messages.Pong(version=syncd.__version__, pid=os.getpid())

        await services.start(serve, config.control_socket, answer)
        async with trio.open_nursery() as users:
            await users.start(links.engine.run)
            users.start_soon(links.receiver.run)
            services.start_soon(links.client.run)
            services.start_soon(_feed_watchdog, notifier)
            if any(folder.accept_from for folder in config.folders) or config.inbox:
                services.start_soon(trio.to_thread.run_sync, schema.warm_up)
            notifier.ready()
            log.info("syncd %s is up, at %s", syncd.__version__, config.control_socket)
            await stop.wait()
            users.cancel_scope.cancel()
        with trio.move_on_after(GOODBYE):
            await links.client.goodbye()
        services.cancel_scope.cancel()


def _rule(folder: Folder) -> sync_engine.FolderRule:
    return sync_engine.FolderRule(
        id=folder.id,
        path=folder.path,
        send_to=tuple(str(peer) for peer in folder.send_to),
        settle=folder.settle,
    )


@contextlib.asynccontextmanager
async def _maybe_listener(config: Config) -> AsyncIterator[Listener | None]:
    if not config.bytestreams.direct:
        yield None
        return
    async with open_listener(
        config.bytestreams.listen.host, config.bytestreams.listen.port
    ) as listener:
        log.info("SOCKS5 listener on %s port %d", listener.host, listener.port)
        yield listener


def _kept(file: Path, make: Callable[[], str]) -> str:
    """A name that is made once and stays ours.

    Args:
      file: Where it is kept.
      make: Makes one, of letters, digits and dashes.
    """
    try:
        name = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        name = ""
    if not re.fullmatch("[A-Za-z0-9-]{1,64}", name):
        name = make()
        # Where it cannot be kept, another one is made next time.
        with contextlib.suppress(OSError):
            file.write_text(f"{name}\n", encoding="ascii")
    return name


def _new_resource() -> str:
    # ASCII, because clients hash it in different encodings.
    return f"syncd-{secrets.token_hex(4)}"


def _new_agent() -> str:
    return str(uuid.uuid4())


def _read_login(state_dir: Path, jid: JID) -> str:
    """The strongest SASL mechanism that the account's server has let us use, or empty."""
    try:
        account, _, mechanism = (state_dir / "login").read_text(encoding="utf-8").partition(" ")
    except (OSError, ValueError):
        return ""
    return mechanism.strip() if account == str(jid.bare) else ""


def _write_login(state_dir: Path, jid: JID, mechanism: str) -> None:
    # Where it cannot be kept, the next start only knows less.
    with contextlib.suppress(OSError):
        (state_dir / "login").write_text(f"{jid.bare} {mechanism}\n", encoding="utf-8")


async def _feed_watchdog(notifier: Notifier) -> None:
    """Tell systemd that the loop turns, as often as it wants to hear it."""
    interval = watchdog_interval(os.environ)
    while interval is not None:
        notifier.watchdog()
        await trio.sleep(interval)


async def supervise(path: Path, config: Config) -> None:
    """Run the daemon; end it on SIGTERM and SIGINT, begin anew on SIGHUP.

    Args:
      path: Of the configuration, read again on SIGHUP.
      config: What it says now.
    """
    notifier = Notifier(os.environ)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        while True:
            stop, upcoming = trio.Event(), None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_daemon, config, notifier, stop)
                async for number in signals:
                    if number == signal.SIGHUP:
                        upcoming = _reloaded(path, notifier)
                        if upcoming is None:
                            continue
                        log.info("SIGHUP: beginning anew")
                    else:
                        # Not for a reload: systemd would wait for our end, and force it.
                        notifier.stopping()
                        log.info("%s: stopping", signal.Signals(number).name)
                    stop.set()
                    break
            if upcoming is None:
                return
            config = upcoming


def _reloaded(path: Path, notifier: Notifier) -> Config | None:
    """Read the configuration anew; None, and the old one stays, if it is bad."""
    try:
        config = configuration.load(path, environ=os.environ)
    except ConfigError as error:
        log.error("SIGHUP: the old configuration stays: %s", error)  # noqa: TRY400 - no bug
        return None
    notifier.reloading(time.monotonic_ns() // 1000)
    return config


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="syncd",
        description="Delivers the files of watched folders to peers over XMPP.",
        epilog="Exit status: 0 stopped by a signal, 1 failed, 2 usage, 11 another syncd uses "
        "the same state or socket, 78 bad configuration. See syncctl for how it is doing.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration")
    parser.add_argument("--check", action="store_true", help="check the configuration, and end")
    parser.add_argument("--verbose", action="store_true", help="log more")
    parser.add_argument("--version", action="version", version=f"syncd {syncd.__version__}")
    return parser.parse_args()


def _find_config(given: Path | None) -> Path:
    if given is not None:
        return given
    places = configuration.default_config_paths(os.environ)
    for place in places:
        if place.exists():
            return place
    looked = " and ".join(str(place) for place in places)
    raise ConfigError(
        f"there is no configuration at {looked}",
        hint="copy config.example.toml there, or name yours with --config FILE",
    )


def _leaf(error: BaseException) -> BaseException:
    """What is inside groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _fail(error: SyncdError) -> NoReturn:
    print(f"syncd: {printable_lines(str(error))}", file=sys.stderr)  # noqa: T201 - for people
    if error.hint:
        print(f"  {printable(error.hint)}", file=sys.stderr)  # noqa: T201
    match error:
        case ConfigError():
            sys.exit(EXIT_CONFIG)
        case LockedError():
            sys.exit(EXIT_LOCKED)
        case _:
            sys.exit(EXIT_FAILED)


def main() -> None:
    """The command ``syncd``."""
    arguments = _parse_arguments()
    try:
        path = _find_config(arguments.config)
        config = configuration.load(path, environ=os.environ)
        for warning in config.warnings:
            print(f"syncd: warning: {printable(warning)}", file=sys.stderr)  # noqa: T201
        if arguments.check:
            print(f"{path}: good; {len(config.folders)} folders")  # noqa: T201
            return
        set_up_log(verbose=arguments.verbose)
        trio.run(supervise, path, config)
    except SyncdError as error:
        _fail(error)
    except BaseExceptionGroup as group:
        reason = _leaf(group)
        if isinstance(reason, SyncdError):
            _fail(reason)
        raise
