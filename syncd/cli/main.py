"""``syncctl``: reads the command line, asks the daemon, and says how it went.

Imports that take time are made where they are needed: most calls are a quick ``status``.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from syncd import __version__
from syncd.cli.exits import MEANINGS, Exit, exit_for
from syncd.control.escape import printable_lines
from syncd.errors import SyncdError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from syncd.control.messages import Status

    _Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - it has no other name

# How long a status may take; a daemon that is well answers in milliseconds, but may share a
# small machine with much else.
_PATIENCE = 5.0  # seconds

# Between two looks of ``wait``: a script should not notice, and the daemon neither.
_WAIT_LOOK = 0.25  # seconds

# Between two pictures of ``status --watch``.
_WATCH_LOOK = 1.0  # seconds


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run syncctl, and end the process with its exit code.

    Args:
      argv: The arguments; default: the process's.
    """
    # A name that the terminal's encoding lacks must not end in a traceback.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        code = _run(_parser().parse_args(argv))
        sys.stdout.flush()
    except SyncdError as error:
        _complain(str(error), error.hint)
        code = exit_for(error)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has seen enough. Python would complain once more when it flushes
        # stdout at its end, so give that something to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.FAILED
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    exits = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items())
    parser = argparse.ArgumentParser(
        prog="syncctl",
        description="Look at syncd, wait for it, have a file sent, or try it out.",
        epilog=f"exit codes:\n{exits}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"syncctl {__version__}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--socket", type=Path, metavar="PATH", help="the control socket of the daemon"
    )
    where.add_argument(
        "--config", type=Path, metavar="FILE", help="the daemon's config.toml, which names it"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    status = commands.add_parser("status", help="show how everything stands")
    style = status.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="print one JSON object")
    style.add_argument("--watch", action="store_true", help="keep showing it until Ctrl-C")

    wait = commands.add_parser(
        "wait", help="wait until all is delivered, files dropped just before included"
    )
    wait.add_argument(
        "--timeout",
        type=_seconds,
        default=math.inf,
        metavar="S",
        help="give up after S seconds",
    )

    _add_send(commands)
    _add_limit(commands)
    _add_peer(commands)
    _add_key(commands)

    demo = commands.add_parser("demo", help="let two daemons exchange a file on this machine")
    demo.add_argument("--keep", action="store_true", help="leave it running until Ctrl-C")

    commands.add_parser("version", help="print the version")
    return parser


def _add_send(commands: _Commands) -> None:
    send = commands.add_parser(
        "send",
        help="send one file to a peer, outside any folder",
        description="Send one file to a peer, outside any folder. It is delivered when the "
        "peer is online, after a restart as well.",
        epilog="With --timeout, exit code 7 says that the peer was offline, 3 that the time "
        "was too short; the file is still sent.",
    )
    send.add_argument("path", metavar="PATH", help="the file; not a link to one")
    send.add_argument("peer", metavar="JID", help="a peer that the configuration names")
    send.add_argument("--wait", action="store_true", help="return when it is delivered")
    send.add_argument(
        "--timeout",
        type=_seconds,
        default=math.inf,
        metavar="S",
        help="with --wait: give up waiting after S seconds",
    )


def _add_limit(commands: _Commands) -> None:
    limit = commands.add_parser(
        "limit",
        help="show or change how fast bytes may flow",
        description="Show how fast bytes may flow, or change it until syncd ends; the "
        "configuration has the keys limit_up and limit_down for good.",
    )
    limit.add_argument("peer", metavar="PEER", nargs="?", default="", help="only to this JID")
    for way, what in (("up", "leave"), ("down", "come in")):
        limit.add_argument(
            f"--{way}",
            type=_rate,
            metavar="N",
            help=f"bytes per second that may {what}, such as 1048576 or 5MiB; 0: no limit",
        )


def _add_peer(commands: _Commands) -> None:
    peer = commands.add_parser("peer", help="show the keys of peers, or decide about one")
    actions = peer.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="all keys, and our own").set_defaults(peer="")
    for name, what in (
        ("show", "the key of one peer"),
        ("verify", "say that both ends show the same words"),
        ("reset-key", "forget a key: the next one is trusted on first use"),
        ("block", "let nothing go to or come from a peer"),
    ):
        action = actions.add_parser(name, help=what)
        action.add_argument("peer", metavar="JID", help="a bare JID")
        if name == "verify":
            action.add_argument(
                "--fingerprint",
                default="",
                metavar="F",
                help="what the other end prints as its own key; then nobody is asked",
            )


def _add_key(commands: _Commands) -> None:
    key = commands.add_parser("key", help="show our own key, or replace it")
    actions = key.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("show", help="what peers are to see as our key")
    actions.add_parser(
        "rotate",
        help="replace it by a new one",
        description="Replace our own key by a new one that it has signed. Peers who know the "
        "old one take the new one over by that, and what they have verified stays verified; "
        "the old one is deleted.",
    )


def _run(args: argparse.Namespace) -> int:
    match args.command:
        case "status" if args.watch:
            return _watch(_socket(args))
        case "status":
            return _status(_socket(args), as_json=args.json)
        case "wait":
            return _wait(_socket(args), timeout=args.timeout)
        case "send":
            from syncd.cli import sending

            return sending.run(
                _socket(args),
                args.path,
                args.peer,
                wait=args.wait,
                timeout=args.timeout,
                complain=_complain,
            )
        case "limit":
            from syncd.cli import limits

            return limits.run(_socket(args), peer=args.peer, up=args.up, down=args.down)
        case "peer":
            from syncd.cli import keys

            return keys.run(
                _socket(args),
                args.action,
                args.peer,
                fingerprint=getattr(args, "fingerprint", ""),
                confirm=_confirm if sys.stdin.isatty() else None,
            )
        case "key":
            from syncd.cli import keys

            return keys.run_own(_socket(args), args.action)
        case "demo":
            from syncd.cli import demo  # imports trio and a whole server

            return demo.run(keep=args.keep)
        case _:
            print(f"syncctl {__version__}")
            return Exit.OK


def _status(path: Path, *, as_json: bool) -> int:
    status = _ask_status(path, _PATIENCE)
    from syncd.cli import output  # rich takes longest of all to import

    if as_json:
        output.print_json(status, file=sys.stdout)
    else:
        now = datetime.now(UTC)
        output.print_status(status, file=sys.stdout, environ=os.environ, now=now)
    return _judge(status)


def _watch(path: Path) -> NoReturn:
    """Show the status again and again; a daemon that ends meanwhile may come back."""
    status = _ask_status(path, _PATIENCE)
    from syncd.cli import output

    with output.watching(file=sys.stdout, environ=os.environ) as show:
        show(status)
        while True:
            time.sleep(_WATCH_LOOK)
            try:
                show(_ask_status(path, _PATIENCE))
            except SyncdError as error:
                show(error)


def _wait(path: Path, *, timeout: float) -> int:
    from syncd.control.client import ask
    from syncd.control.messages import PingRequest, RescanRequest
    from syncd.control.summary import outstanding

    deadline = time.monotonic() + timeout
    # A scan may rightly take long, but a daemon that hangs shall be found out soon.
    ask(path, PingRequest(), timeout=_PATIENCE)
    try:
        ask(path, RescanRequest(), timeout=timeout)
    except SyncdError as error:
        if exit_for(error) is not Exit.TIMEOUT or time.monotonic() < deadline:
            raise
        _complain(f"the folders were not looked through within {timeout:g} s", "")
        return Exit.TIMEOUT
    while True:
        status = _ask_status(path, _PATIENCE)
        if not outstanding(status):
            return Exit.OK
        if status.state == "problem":
            _complain(status.summary, "")
            return Exit.AUTHENTICATION if _unauthorized(status) else Exit.FAILED
        left = deadline - time.monotonic()
        if left <= 0:
            _complain(f"not everything is delivered after {timeout:g} s: {status.summary}", "")
            return Exit.TIMEOUT
        time.sleep(min(left, _WAIT_LOOK))


def _ask_status(path: Path, timeout: float) -> Status:
    from syncd.control.client import ask
    from syncd.control.messages import StatusRequest

    return ask(path, StatusRequest(), timeout=timeout)


def _judge(status: Status) -> Exit:
    if status.state == "ok":
        return Exit.OK
    return Exit.AUTHENTICATION if _unauthorized(status) else Exit.PENDING


def _unauthorized(status: Status) -> bool:
    return status.connection.state == "unauthorized"


def _socket(args: argparse.Namespace) -> Path:
    """Find the daemon's socket: as named, from its configuration, or where it is by default."""
    if args.socket is not None:
        return Path(args.socket)
    from syncd import config  # with --socket it is not needed

    return config.find_socket(os.environ, args.config)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return seconds


def _rate(text: str) -> int:
    from syncd.settings.toml_keys import UnfitError, byte_rate

    try:
        return int(byte_rate(text))
    except UnfitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _confirm(question: str) -> bool:
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except EOFError:
        return False


def _complain(message: str, hint: str) -> None:
    lines = [f"syncctl: {message}", *([f"hint: {hint}"] if hint else [])]
    # Indented, so that nobody's text can look like a message of its own.
    print(printable_lines("\n".join(lines)).replace("\n", "\n  "), file=sys.stderr)


if __name__ == "__main__":
    main()
