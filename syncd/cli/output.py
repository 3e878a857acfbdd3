"""A status, shown to people: colours and bars on a terminal, plain text elsewhere.

What peers and the configuration name is put into `rich.text.Text` through `printable`, never
into markup, so a file called ``[red]`` or one with an ESC in it is just shown.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TextIO

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from syncd.control.escape import printable
from syncd.control.summary import amount, duration, quantity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import RenderableType

    from syncd.control.messages import (
        ErrorStatus,
        FolderStatus,
        LimitStatus,
        PeerStatus,
        ProxyStatus,
        Status,
        TransferStatus,
    )
    from syncd.errors import SyncdError

# Without a terminal nobody tells how wide a line may be; the same everywhere is easy to read.
_PLAIN_WIDTH = 100  # columns

_BAR_WIDTH = 20  # columns

_STYLES = {"ok": "bold green", "waiting": "bold yellow", "problem": "bold red"}

_CONNECTIONS = {
    "connected": "connected",
    "connecting": "connecting",
    "offline": "not connected",
    "unauthorized": "credentials not accepted",
    "refused": "refused",
}

_ENCRYPTIONS = {
    "plain": "none from end to end; the server, or a proxy, could read along",
    "unverified": "from end to end; nobody has compared the key yet (syncctl peer show)",
    "verified": "from end to end, with a key that was compared",
    "changed": "STOPPED: the peer shows another key (syncctl peer show)",
    "blocked": "blocked: nothing goes there or comes from there",
    "impossible": "it is required, and the peer cannot",
}


def print_json(status: Status, *, file: TextIO) -> None:
    """Print a status as one line of JSON, in ASCII: nothing in it can act on a terminal."""
    text = json.dumps(msgspec.to_builtins(status), ensure_ascii=True)
    # The one control character that JSON leaves as it is; it can only be inside a string.
    print(text.replace("\x7f", "\\u007f"), file=file)


def print_status(
    status: Status, *, file: TextIO, environ: Mapping[str, str], now: datetime
) -> None:
    """Print a status for people; its first line is the summary, however long.

    Args:
      status: What to show.
      file: Where to; whether it is a terminal decides about colours and bars.
      environ: The environment, for NO_COLOR.
      now: The clock, in UTC.
    """
    console = _console(file, environ)
    # Not wrapped, so that `head -1` gives all of it.
    console.print(_summary(status), soft_wrap=True)
    if console.is_terminal:
        console.print(_details(status, now, bars=True))
        return
    with console.capture() as capture:
        console.print(_details(status, now, bars=False))
    # Rich fills up lines with spaces.
    file.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())


@contextmanager
def watching(
    *, file: TextIO, environ: Mapping[str, str]
) -> Iterator[Callable[[Status | SyncdError], None]]:
    """Show one status after the other, on a terminal always in the same place.

    Elsewhere one is printed below the other, whenever something has changed.

    Args:
      file: Where to.
      environ: The environment, for NO_COLOR.

    Yields:
      Shows a status, or why there is none.
    """
    console = _console(file, environ)
    if not console.is_terminal:
        yield _Changes(file, environ)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
        yield lambda seen: live.update(_picture(seen), refresh=True)


class _Changes:
    """Prints a status if it is not the one just printed."""

    def __init__(self, file: TextIO, environ: Mapping[str, str]) -> None:
        self._file = file
        self._environ = environ
        self._last: Status | str | None = None

    def __call__(self, seen: Status | SyncdError) -> None:
        new = str(seen) if isinstance(seen, Exception) else seen
        if new == self._last:
            return
        self._last = new
        if isinstance(seen, Exception):
            _console(self._file, self._environ).print(_failure(seen), soft_wrap=True)
        else:
            now = datetime.now(UTC)
            print_status(seen, file=self._file, environ=self._environ, now=now)
        self._file.flush()


def _console(file: TextIO, environ: Mapping[str, str]) -> Console:
    terminal = file.isatty()
    return Console(
        file=file,
        # What the file is decides, not what the environment wishes it were.
        force_terminal=terminal,
        color_system="auto" if terminal else None,
        no_color=bool(environ.get("NO_COLOR")),  # https://no-color.org: if not empty
        width=None if terminal else _PLAIN_WIDTH,
        markup=False,
        highlight=False,
        emoji=False,
    )


def _picture(seen: Status | SyncdError) -> RenderableType:
    if isinstance(seen, Exception):
        return _failure(seen)
    return Group(_summary(seen), _details(seen, datetime.now(UTC), bars=True))


def _failure(error: SyncdError) -> Text:
    hint = f"; {printable(error.hint)}" if error.hint else ""
    return Text(f"PROBLEM: {printable(str(error))}{hint}", style=_STYLES["problem"])


def _summary(status: Status) -> Text:
    return Text(printable(status.summary), style=_STYLES[status.state])


def _details(status: Status, now: datetime, *, bars: bool) -> RenderableType:
    sections = {
        "Connection": [_connection(status, now)],
        "Folders": [_folder(folder) for folder in status.folders],
        "Peers": [_peer(peer, now) for peer in status.peers],
        "Proxies": [_proxy(proxy) for proxy in status.proxies],
        "Transfers": [_transfer(transfer, bars=bars) for transfer in status.transfers],
        "Last errors": [_error(error, now) for error in status.errors],
    }
    return Group(
        *(
            Group(Text(f"\n{title}", style="bold"), *(_indented(entry) for entry in entries))
            for title, entries in sections.items()
            if entries
        )
    )


def _entry(head: Text, *details: RenderableType) -> RenderableType:
    return Group(head, *(_indented(detail) for detail in details))


def _indented(body: RenderableType) -> RenderableType:
    return Padding(body, (0, 0, 0, 2), expand=False)


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, overflow="fold")


def _head(name: str, rest: str = "", style: str = "") -> Text:
    return _text(name, "bold").append_text(_text(f"  {rest}" if rest else "", style))


def _connection(status: Status, now: datetime) -> RenderableType:
    connection = status.connection
    since = f" for {_since(connection.since, now)}" if connection.since else ""
    return _entry(
        _head(
            f"{connection.jid} at {connection.server}",
            f"{_CONNECTIONS[connection.state]}{since}",
            "green" if connection.state == "connected" else "red",
        ),
        *_why(connection.reason, connection.hint),
        *_limits("all peers together: ", status.limit),
        _text(f"syncd {status.version}, running for {_since(status.started, now)}", "dim"),
    )


def _proxy(proxy: ProxyStatus) -> RenderableType:
    state = ("usable", "green") if proxy.usable else ("not usable", "yellow")
    return _entry(_head(proxy.jid, *state), *_why(proxy.text, proxy.hint))


def _folder(folder: FolderStatus) -> RenderableType:
    notes = [quantity(folder.files, "file")]
    if folder.pending:
        notes.append(f"{folder.pending:,} pending")
    if folder.settling:
        notes.append(f"{folder.settling:,} being written")
    if folder.scanning:
        notes.append("looking through it")
    if not folder.send_to:
        notes.append("receives only")
    elif len(notes) == 1:
        notes.append("all delivered")
    return _entry(
        _head(folder.id, folder.path),
        _text(", ".join(notes)),
        *_why(folder.problem, folder.hint),
    )


def _peer(peer: PeerStatus, now: datetime) -> RenderableType:
    name = f"{peer.jid}/{peer.resource}" if peer.resource and "/" not in peer.jid else peer.jid
    state = "online" if peer.online else "offline"
    since = f" for {_since(peer.since, now)}" if peer.since else ""
    size = f" ({amount(peer.pending_bytes)})" if peer.pending_bytes else ""
    counts = [f"{peer.pending:,} pending{size}", f"{peer.delivered:,} delivered"]
    if peer.sent:
        counts.append(f"{peer.sent:,} sent without receipt")
    if peer.parked:
        counts.append(f"{peer.parked:,} need you")
    if peer.next_try is not None and peer.next_try > now:
        counts.append(f"next try in {_since(now, peer.next_try)}")
    last = [_text(f"last error: {peer.last_error}", "dim")] if peer.last_error else []
    return _entry(
        _head(name, f"{state}{since}", "green" if peer.online else "yellow"),
        _text(", ".join(counts)),
        _text(f"encryption: {_ENCRYPTIONS.get(peer.encryption, peer.encryption)}"),
        *_limits("", peer.limit),
        *last,
        *_why(peer.problem, peer.hint),
    )


def _limits(whose: str, limit: LimitStatus) -> list[Text]:
    ways = (("up", limit.up), ("down", limit.down))
    rates = [f"{way} {amount(rate)}/s" for way, rate in ways if rate]
    return [_text(f"{whose}limited to {', '.join(rates)}")] if rates else []


def _transfer(transfer: TransferStatus, *, bars: bool) -> RenderableType:
    to = "send to" if transfer.direction == "send" else "receive from"
    where = f"{transfer.folder}/{transfer.path}" if transfer.folder else transfer.path
    done = min(1.0, transfer.offset / transfer.size) if transfer.size else 1.0
    progress = Table.grid(padding=(0, 2, 0, 0))
    progress.add_row(
        _bar(done, bars=bars),
        _text(f"{int(100 * done):3} %"),
        _text(f"{amount(transfer.offset)} of {amount(transfer.size)}"),
        _text(f"{amount(transfer.rate)}/s"),
        _text(_left(transfer)),
        _text(transfer.method or "looking for a way", "dim"),
    )
    return _entry(_head(where), _text(f"{to} {transfer.peer}"), progress)


def _bar(done: float, *, bars: bool) -> RenderableType:
    if bars:
        return ProgressBar(total=1.0, completed=done, width=_BAR_WIDTH)
    full = int(_BAR_WIDTH * done)
    return Text(f"[{'#' * full}{'-' * (_BAR_WIDTH - full)}]")


def _left(transfer: TransferStatus) -> str:
    if not transfer.rate or transfer.offset >= transfer.size:
        return ""
    return f"{duration((transfer.size - transfer.offset) / transfer.rate)} left"


def _error(error: ErrorStatus, now: datetime) -> RenderableType:
    file = "/".join(filter(None, (error.folder, error.path)))
    about = ", ".join(filter(None, (error.peer, file)))
    head = _text(f"{_since(error.time, now)} ago", "dim")
    if about:
        head.append_text(_text(f"  {about}", "bold"))
    return _entry(head, *_why(error.text, error.hint))


def _why(text: str, hint: str) -> list[Text]:
    lines = [_text(text, "red")] if text else []
    if hint:
        lines.append(_text(f"hint: {hint}"))
    return lines


def _since(start: datetime, now: datetime) -> str:
    return duration((now - start).total_seconds())
