"""Statuses as a daemon might give them; every test changes only what it is about."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from syncd.control.messages import (
    Connection,
    ErrorStatus,
    FolderStatus,
    LimitStatus,
    PeerStatus,
    Status,
    TransferStatus,
)
from syncd.control.summary import summarise

NOW = datetime(2031, 5, 4, 12, 0, tzinfo=UTC)

CONNECTION = Connection(
    state="connected",
    jid="alice@example.org/laptop",
    server="example.org",
    since=NOW - timedelta(hours=3),
)
PHOTOS = FolderStatus(
    id="photos",
    path="/srv/photos",
    send_to=("bob@example.org",),
    accept_from=(),
    files=12481,
    pending=0,
)
BOB = PeerStatus(
    jid="bob@example.org",
    online=True,
    resource="syncd-1",
    encryption="plain",
    pending=0,
    delivered=12481,
)
SENDING = TransferStatus(
    direction="send",
    peer="bob@example.org/syncd-1",
    folder="photos",
    path="2031/a.raw",
    size=4 * 1024**3,
    offset=1024**3,
    method="direct",
    rate=16 * 1024**2,
)
DECLINED = ErrorStatus(
    time=NOW - timedelta(minutes=3),
    text="bob@example.org does not want the file [forbidden]",
    hint="ask bob to accept files from you",
    peer="bob@example.org/syncd-1",
    folder="photos",
    path="2031/a.raw",
)


def but(original: Any, **changes: Any) -> Any:
    """Copy a part of a status with other values."""
    return msgspec.structs.replace(original, **changes)


def status(
    *,
    connection: Connection = CONNECTION,
    folders: tuple[FolderStatus, ...] = (PHOTOS,),
    peers: tuple[PeerStatus, ...] = (BOB,),
    transfers: tuple[TransferStatus, ...] = (),
    errors: tuple[ErrorStatus, ...] = (),
    now: datetime = NOW,
    limit: LimitStatus = LimitStatus(),  # noqa: B008 - frozen
) -> Status:
    """Make a whole status, judged as the daemon judges it."""
    state, summary = summarise(
        connection=connection,
        folders=folders,
        peers=peers,
        transfers=transfers,
        errors=errors,
        now=now,
    )
    return Status(
        state=state,
        summary=summary,
        version="0.1.0",
        started=NOW - timedelta(days=3),
        connection=connection,
        folders=folders,
        peers=peers,
        transfers=transfers,
        errors=errors,
        limit=limit,
    )
