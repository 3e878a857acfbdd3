"""The daemon: wires everything together, owns the nurseries, hears the signals.

::

    run_daemon
    ├ control server           answers syncctl, first and last
    ├ watchdog                 tells systemd that the loop turns
    └ services                 end when the users have
      ├ listener               the one SOCKS5 port
      ├ client                 connect, run, back off, again
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
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import trio

import syncd
from syncd import config as configuration
from syncd.bytestreams.sockets import Listener, open_listener
from syncd.control.answers import Answers, Experts
from syncd.control.escape import printable, printable_lines
from syncd.control.server import serve
from syncd.disk.partial import clean, expire
from syncd.errors import (
    ConfigError,
    ErrorType,
    JournalError,
    LockedError,
    SyncdError,
)
from syncd.log import set_up as set_up_log
from syncd.notify import Notifier, watchdog_interval
from syncd.sync import engine as sync_engine
from syncd.sync.journal import open_journal
from syncd.sync.limits import Limits, Rates
from syncd.transfer import pump, schema
from syncd.transfer.sealing import Seals
from syncd.trust.identity import load as load_identity
from syncd.trust.identity import rotate as rotate_identity
from syncd.trust.pins import Policy
from syncd.wiring import addresses
from syncd.wiring.keys import PeerKeys
from syncd.wiring.links import Links, kept_name, new_resource
from syncd.wiring.status import Reporter, Transfers
from syncd.wiring.throttles import Throttles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from syncd.config import Config, Folder
    from syncd.sync.journal import Journal
    from syncd.trust.signing import Identity

log = logging.getLogger("syncd")

EXIT_FAILED = 1
EXIT_LOCKED = 11
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h; systemd does not restart on it

# How often what nobody goes on with is cleared up; it is kept for a month.
EXPIRE_EVERY = 24 * 3600.0  # seconds
# How long the server may take to answer our goodbye.
GOODBYE = 2.0  # seconds


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
    transfers, answers = Transfers(), Answers(syncd.__version__)
    async with trio.open_nursery() as desk, contextlib.AsyncExitStack() as stack:
        await desk.start(serve, config.control_socket, answers.answer)
        desk.start_soon(_feed_watchdog, notifier)
        journal = await _journal(config, stack, answers, notifier, stop)
        if journal is not None:
            await _run_with(config, journal, transfers, answers, notifier, stop)
        desk.cancel_scope.cancel()


async def _journal(
    config: Config,
    stack: contextlib.AsyncExitStack,
    answers: Answers,
    notifier: Notifier,
    stop: trio.Event,
) -> Journal | None:
    """Open the journal, as soon as its disk has room; None if we are stopped before."""
    told = ""
    while not stop.is_set():
        try:
            journal = await stack.enter_async_context(open_journal(config.state_dir))
        except JournalError as error:
            if error.type is not ErrorType.WAIT:
                raise
            if str(error) != told:
                told = str(error)
                log.error("%s; %s", error, error.hint)  # noqa: TRY400 - no bug
            answers.refuse(error)
            # We run as well as can be; to be started again would not help.
            notifier.ready()
            notifier.status(str(error))
        else:
            if told:
                notifier.status("")
            return journal
        with trio.move_on_after(sync_engine.JOURNAL_RETRY):
            await stop.wait()
    return None


async def _run_with(
    config: Config,
    journal: Journal,
    transfers: Transfers,
    answers: Answers,
    notifier: Notifier,
    stop: trio.Event,
) -> None:
    async with _maybe_listener(config) as listener, trio.open_nursery() as services:
        links, experts = await _join(config, journal, listener, transfers)
        await _clear_up(config, _clean)
        answers.begin(experts)
        async with trio.open_nursery() as users:
            await users.start(links.engine.run)
            users.start_soon(links.receiver.run)
            services.start_soon(links.client.run)
            services.start_soon(addresses.watch, links.network_changed)
            services.start_soon(links.discovery.run)
            services.start_soon(_expire, config)
            if any(folder.accept_from for folder in config.folders) or config.inbox:
                services.start_soon(trio.to_thread.run_sync, schema.warm_up)
            notifier.ready()
            log.info("syncd %s is up, at %s", syncd.__version__, config.control_socket)
            await stop.wait()
            users.cancel_scope.cancel()
        with trio.move_on_after(GOODBYE):
            await links.client.goodbye()
        services.cancel_scope.cancel()


async def _join(
    config: Config, journal: Journal, listener: Listener | None, transfers: Transfers
) -> tuple[Links, Experts]:
    """Make all parts, and hand them to each other; nothing of it runs yet."""
    throttles = Throttles()
    keys = PeerKeys(
        await trio.to_thread.run_sync(load_identity, config.state_dir),
        config.account.jid.bare,
        journal.pins,
        await journal.pins.pins(),
        Policy(config.transfer.encryption),
        decided=lambda peer: links.engine.decided(peer),
        against=lambda peer: seals.end(peer),
        replace=lambda: _replace_identity(config, seals),
    )
    seals = Seals(
        keys.identity,
        keys.policy,
        read_pin=keys.read,
        write_pin=keys.write,
        shown=keys.shown,
    )
    links = Links(
        config,
        kept_name(config.state_dir / "resource", new_resource),
        transfers,
        seals=seals,
        throttles=throttles,
    )
    links.engine = sync_engine.Engine(
        journal,
        [_rule(folder) for folder in config.folders],
        links.send,
        limit_of=links.limit_of,
        places=pump.OUT_THREADS,
        others=[str(peer) for peer in links.peers],
    )
    links.sender = links.make_sender(listener)
    limits = _limits(config, throttles)
    reporter = Reporter(
        config, links.client, links.engine, transfers, limits, keys, links.proxies
    )
    experts = Experts(
        status=reporter.status,
        rescan=links.engine.rescan,
        limit=reporter.limit,
        send=reporter.send,
        standing=reporter.standing,
        keys=keys.answer,
    )
    return links, experts


async def _replace_identity(config: Config, seals: Seals) -> Identity:
    """Replace our key by one that it signs; on disk before anybody is shown it."""
    identity = await trio.to_thread.run_sync(rotate_identity, config.state_dir)
    seals.replace_identity(identity)
    return identity


def _arrive_at(config: Config) -> list[Path]:
    """Where files arrive."""
    roots = [folder.path for folder in config.folders if folder.accept_from]
    return [*roots, config.inbox.path] if config.inbox else roots


async def _clear_up(config: Config, job: Callable[[Path, float], object]) -> None:
    """Run a job where files arrive; what one disk refuses keeps none of the others from it."""
    for root in _arrive_at(config):
        try:
            await trio.to_thread.run_sync(job, root, time.time())
        except SyncdError as error:
            log.warning("%s; %s", error, error.hint)


async def _expire(config: Config) -> None:
    """Clear up, every day, what nobody goes on with."""
    while True:
        await trio.sleep(EXPIRE_EVERY)
        await _clear_up(config, expire)


def _clean(root: Path, now: float) -> None:
    """Clear up what a crash has left in a folder; blocks."""
    for name in clean(root, now):
        log.warning("%s: a crash had left a file without its name: %s", root, name)


def _limits(config: Config, throttles: Throttles) -> Limits:
    everybody = Rates(up=config.transfer.limit_up, down=config.transfer.limit_down)
    peers = {
        str(peer.jid): Rates(up=peer.limit_up, down=peer.limit_down) for peer in config.peers
    }
    for peer, rates in {"": everybody, **peers}.items():
        throttles.change(peer, rates)
    return Limits(everybody, peers, throttles.change)


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
    listen = config.bytestreams.listen
    host, port = (listen.host, listen.port) if listen else (None, 0)
    async with open_listener(host, port) as listener:
        log.info("SOCKS5 listener on %s port %d", listener.host, listener.port)
        yield listener


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
    for warning in config.warnings:
        log.warning("%s", warning)
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


def _take_all_descriptors() -> None:
    """Use as many descriptors as we may.

    The low limit that most systems begin with is for programs that use select(2). For us each
    transfer and each client is one; and libzmq ends the process when it cannot have another.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
        _take_all_descriptors()
        trio.run(supervise, path, config)
    except SyncdError as error:
        _fail(error)
    except BaseExceptionGroup as group:
        reason = _leaf(group)
        if isinstance(reason, SyncdError):
            _fail(reason)
        raise
