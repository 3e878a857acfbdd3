"""The one line that answers "is everything delivered?". Sans-IO.

`summarise` is for the daemon, which knows; `outstanding` for whoever waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from syncd.control.escape import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from syncd.control.messages import (
        Connection,
        ErrorStatus,
        FolderStatus,
        PeerStatus,
        State,
        Status,
        TransferStatus,
    )

# How many peers a line can name before nobody reads it to its end.
_MAX_NAMED = 2

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

# A unit of time is used until there are so many of it that the next one says enough.
_DURATIONS = ((1, 90, "s"), (60, 90, "min"), (3600, 48, "h"))


def summarise(
    *,
    connection: Connection,
    folders: Sequence[FolderStatus],
    peers: Sequence[PeerStatus],
    transfers: Sequence[TransferStatus],
    errors: Sequence[ErrorStatus],
    now: datetime,
) -> tuple[State, str]:
    """Judge a state: is everything delivered, will it be, or must a person act?

    A problem outweighs everything, since nothing else reveals it; errors that pass by
    themselves are no problem.

    Args:
      connection: Ours.
      folders: All of them.
      peers: All of them.
      transfers: What moves now.
      errors: The last ones, newest first: where a parked delivery's reason is found.
      now: The clock, in UTC.

    Returns:
      The state, and one printable line that begins with it.
    """
    problems = _problems(connection, folders, peers, errors)
    if problems:
        more = f" (and {quantity(len(problems) - 1, 'more problem')})" if problems[1:] else ""
        return "problem", f"PROBLEM: {problems[0]}{more}"

    away = _away(connection, now)
    owed = [peer for peer in peers if peer.pending]
    if owed:
        return "waiting", f"WAITING: {_owed(owed, transfers, away, now)}"
    unseen = _unseen(folders)
    if unseen:
        return "waiting", f"WAITING: {unseen}"
    if away:
        return "waiting", f"WAITING: nothing to deliver, but {away}"
    return "ok", f"OK: {_delivered(folders, transfers)}"


def outstanding(status: Status) -> bool:
    """Whether something is still owed, moving from here, or not yet known.

    Parked deliveries are owed. A lost connection alone is nothing to wait for.
    """
    return (
        any(peer.pending for peer in status.peers)
        or any(
            folder.pending or folder.settling or folder.scanning or folder.problem
            for folder in status.folders
        )
        or any(transfer.direction == "send" for transfer in status.transfers)
    )


def quantity(count: int, noun: str) -> str:
    """Count things: ``1 file``, ``12,481 files``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def amount(size: int) -> str:
    """Write a number of bytes for people: ``512 B``, ``1.2 GiB``."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in _UNITS:
        value /= 1024
        # What would round to 1024.0 is 1.0 of the next unit.
        if value < 1023.95:
            return f"{value:.1f} {unit}"
    return f"{value:.1f} {_UNITS[-1]}"


def duration(seconds: float) -> str:
    """Write a time span for people, in the largest unit that still says enough: ``3 min``.

    Args:
      seconds: How long; less than none is none.
    """
    for length, limit, unit in _DURATIONS:
        if seconds < limit * length:
            return f"{max(0, round(seconds / length))} {unit}"
    return quantity(round(seconds / 86400), "day")


def _problems(
    connection: Connection,
    folders: Sequence[FolderStatus],
    peers: Sequence[PeerStatus],
    errors: Sequence[ErrorStatus],
) -> list[str]:
    """What a person must act on, the gravest first."""
    found = []
    if connection.state in {"unauthorized", "refused"}:
        text = connection.reason or f"{connection.server} refuses {connection.jid}"
        found.append(_advice(text, connection.hint))
    found += [
        _advice(f"folder {folder.id}: {folder.problem}", folder.hint)
        for folder in folders
        if folder.problem
    ]
    for peer in peers:
        if peer.problem:
            found.append(_advice(f"{peer.jid}: {peer.problem}", peer.hint))
        elif peer.parked:
            error = next((e for e in errors if e.hint and _is(e.peer, peer.jid)), None)
            text = (error.text if error else peer.last_error) or "see the errors of syncd"
            what = f"{quantity(peer.parked, 'file')} cannot be delivered to {peer.jid}: {text}"
            found.append(_advice(what, error.hint if error else ""))
    return found


def _advice(text: str, hint: str) -> str:
    text = printable(text).rstrip(".")
    return f"{text}; {printable(hint)}" if hint else text


def _away(connection: Connection, now: datetime) -> str:
    """Why and since when there is no connection; empty if there is one."""
    if connection.state == "connected":
        return ""
    away = f"not connected to {printable(connection.server)}"
    if connection.since is not None:
        away += f" for {_span(connection.since, now)}"
    return f"{away}: {printable(connection.reason)}" if connection.reason else away


def _owed(
    owed: list[PeerStatus], transfers: Sequence[TransferStatus], away: str, now: datetime
) -> str:
    parts = []
    for peer in owed[:_MAX_NAMED]:
        size = f" ({amount(peer.pending_bytes)})" if peer.pending_bytes else ""
        part = f"{quantity(peer.pending, 'file')}{size} for {printable(peer.jid)}"
        parts.append(part if away else f"{part}, {_why(peer, transfers, now)}")
    if owed[_MAX_NAMED:]:
        files = quantity(sum(peer.pending for peer in owed[_MAX_NAMED:]), "file")
        parts.append(f"{files} for {quantity(len(owed) - _MAX_NAMED, 'more peer')}")
    return "; ".join([*parts, away] if away else parts)


def _why(peer: PeerStatus, transfers: Sequence[TransferStatus], now: datetime) -> str:
    """Why the files of a peer are not there yet, although we are connected."""
    if not peer.online:
        return f"offline for {_span(peer.since, now)}" if peer.since else "offline"
    rates = [t.rate for t in transfers if t.direction == "send" and _is(t.peer, peer.jid)]
    if rates:
        return f"sending at {amount(sum(rates))}/s" if sum(rates) else "sending"
    if peer.next_try is not None and peer.next_try > now:
        reason = f" ({printable(peer.last_error)})" if peer.last_error else ""
        return f"next try in {_span(now, peer.next_try)}{reason}"
    return "about to be sent"


def _unseen(folders: Sequence[FolderStatus]) -> str:
    """What may be owed soon, but is not yet known to be."""
    settling = sum(folder.settling for folder in folders)
    if settling:
        return f"{quantity(settling, 'file')} still being written"
    scanning = [folder.id for folder in folders if folder.scanning]
    if scanning:
        return f"looking through {printable(', '.join(scanning[:_MAX_NAMED]))}"
    pending = sum(folder.pending for folder in folders)
    return f"{quantity(pending, 'file')} to be delivered" if pending else ""


def _delivered(folders: Sequence[FolderStatus], transfers: Sequence[TransferStatus]) -> str:
    files = sum(folder.files for folder in folders if folder.send_to)
    text = "nothing to deliver"
    if files:
        text = f"all {quantity(files, 'file')} delivered" if files > 1 else "1 file delivered"
    arriving = sum(transfer.direction == "receive" for transfer in transfers)
    return f"{text}; receiving {quantity(arriving, 'file')}" if arriving else text


def _span(start: datetime, end: datetime) -> str:
    return duration((end - start).total_seconds())


def _is(address: str, jid: str) -> bool:
    """Whether an address is this peer, or a resource of it."""
    return address == jid or address.startswith(f"{jid}/")
