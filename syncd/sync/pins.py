"""The keys that peers have shown, kept in the journal's database."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from syncd.sync.database import Database

PinState: TypeAlias = Literal["unverified", "verified", "blocked"]
"""``unverified``: trusted on first use; ``verified``: compared by a person; ``blocked``: a
person has said that nothing goes to or comes from this peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """The key of a peer, and how far it is trusted.

    Attributes:
      peer: A bare JID.
      public_key: As the peer showed it, raw; None if it was blocked before it showed one.
      state: How far it is trusted.
      first_seen: When the peer first showed it, seconds since 1970.
      last_seen: When it last did.
      verified_at: When a person has compared it, or None.
    """

    peer: str
    public_key: bytes | None
    state: PinState
    first_seen: float
    last_seen: float
    verified_at: float | None = None


_COLUMNS = "peer, public_key, state, first_seen, last_seen, verified_at"


class Pins:
    """The pins of all peers; each method is a transaction, durable when it returns.

    Args:
      database: Open.
      clock: Seconds since 1970.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    async def pins(self) -> list[Pin]:
        """All of them, in the order of their JIDs."""

        def work(db: sqlite3.Connection) -> list[Pin]:
            rows = db.execute(f"SELECT {_COLUMNS} FROM pin ORDER BY peer")  # noqa: S608 - a constant
            return [_pin(row) for row in rows]

        return await self._database.run(lambda: self._database.transact(work, changes=False))

    async def pin(self, peer: str) -> Pin | None:
        """The pin of a bare JID; None if it has never shown a key."""

        def work(db: sqlite3.Connection) -> Pin | None:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM pin WHERE peer = ?",  # noqa: S608 - a constant
                (peer,),
            ).fetchone()
            return None if row is None else _pin(row)

        return await self._database.run(lambda: self._database.transact(work, changes=False))

    async def set_pin(self, peer: str, public_key: bytes | None, state: PinState) -> Pin:
        """Note that a peer has this key now, and how far it is trusted.

        Of a key that is known already the first time is kept, and while it stays verified,
        when that was. It is the caller who decides whether a key may take another's place.

        Args:
          peer: A bare JID.
          public_key: Raw; None only to block who never showed one.
          state: How far it is trusted from now on.

        Returns:
          The pin as it is now.
        """
        now = self._clock()

        def work(db: sqlite3.Connection) -> Pin:
            old = db.execute(
                f"SELECT {_COLUMNS} FROM pin WHERE peer = ? AND public_key IS ?",  # noqa: S608 - a constant
                (peer, public_key),
            ).fetchone()
            known = None if old is None else _pin(old)
            verified_at = known.verified_at if known is not None else None
            pin = Pin(
                peer=peer,
                public_key=public_key,
                state=state,
                first_seen=now if known is None else known.first_seen,
                last_seen=now,
                verified_at=(verified_at or now) if state == "verified" else None,
            )
            db.execute(
                f"INSERT INTO pin ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"  # noqa: S608 - a constant
                " ON CONFLICT (peer) DO UPDATE SET public_key = excluded.public_key,"
                " state = excluded.state, first_seen = excluded.first_seen,"
                " last_seen = excluded.last_seen, verified_at = excluded.verified_at",
                (peer, public_key, state, pin.first_seen, now, pin.verified_at),
            )
            return pin

        return await self._database.run(lambda: self._database.transact(work))

    async def forget_pin(self, peer: str) -> bool:
        """Forget the key of a peer: the next one is trusted on first use again.

        Returns:
          Whether there was one.
        """

        def work(db: sqlite3.Connection) -> bool:
            return db.execute("DELETE FROM pin WHERE peer = ?", (peer,)).rowcount > 0

        return await self._database.run(lambda: self._database.transact(work))


def _pin(row: tuple[str, bytes | None, PinState, float, float, float | None]) -> Pin:
    peer, public_key, state, first_seen, last_seen, verified_at = row
    return Pin(
        peer=peer,
        public_key=public_key,
        state=state,
        first_seen=first_seen,
        last_seen=last_seen,
        verified_at=verified_at,
    )
