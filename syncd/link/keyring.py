"""What is remembered of earlier logins, in the state directory.

The file ``login`` holds how strong they were, so that nobody talks us into a weaker one; the
file ``token`` (mode 0600) what the server takes instead of the password (XEP-0484); the file
``agent`` by what the server knows this installation among others of the account (XEP-0388). All
may be deleted at any time: the next login only knows less, is slower, or is somebody new's. All
functions block on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from syncd.xmpp.sasl import Token

if TYPE_CHECKING:
    from pathlib import Path

    from syncd.xmpp.jid import JID

_AGENT = "agent"
_PIN = "login"
_TOKEN = "token"  # noqa: S105 - the name of a file
# Beyond what `login.MAX_TOKEN` could fill, each of its characters escaped: no file of ours.
_MAX_FILE = 65_536  # bytes


@dataclass(frozen=True, slots=True)
class Pin:
    """How strong the strongest login was that the account's server has let us use.

    Attributes:
      mechanism: Of SASL; empty: there was none.
      sasl2: Whether SASL2 (XEP-0388) was used.
    """

    mechanism: str = ""
    sasl2: bool = False


def read_pin(state_dir: Path, account: JID) -> Pin:
    """Read it; an empty one where nothing is known of this account."""
    try:
        words = _read(state_dir / _PIN).split()
    except (OSError, ValueError):
        return Pin()
    if len(words) < 2 or words[0] != str(account.bare):
        return Pin()
    return Pin(words[1], "sasl2" in words[2:])


def write_pin(state_dir: Path, account: JID, pin: Pin) -> None:
    """Keep it. Where it cannot be kept, the next start only knows less."""
    words = [str(account.bare), pin.mechanism, *(["sasl2"] if pin.sasl2 else [])]
    with contextlib.suppress(OSError):
        _write(state_dir / _PIN, " ".join(words) + "\n")


def read_agent(state_dir: Path) -> str:
    """Read the UUID that stays ours; a new one, which is kept, where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return str(uuid.UUID(_read(state_dir / _AGENT).strip()))
    agent = str(uuid.uuid4())
    write_agent(state_dir, agent)
    return agent


def write_agent(state_dir: Path, agent: str) -> None:
    """Keep it. Where it cannot be kept, the next start makes another."""
    with contextlib.suppress(OSError):
        _write(state_dir / _AGENT, f"{agent}\n")


def read_token(state_dir: Path, account: JID) -> Token | None:
    """Read the token of this account; None if there is none that could be used."""
    try:
        kept = json.loads(_read(state_dir / _TOKEN))
        token = Token(
            account=kept["account"],
            mechanism=kept["mechanism"],
            secret=kept["secret"],
            expires=datetime.fromisoformat(kept["expires"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    texts = (token.account, token.mechanism, token.secret)
    good = all(isinstance(text, str) for text in texts) and token.expires.tzinfo is not None
    return token if good and token.account == str(account.bare) else None


def write_token(state_dir: Path, token: Token | None) -> None:
    """Keep a token instead of the one before; None: keep none.

    Where it cannot be kept, the next login is by the password.
    """
    path = state_dir / _TOKEN
    with contextlib.suppress(OSError):
        if token is None:
            path.unlink(missing_ok=True)
            return
        kept = {
            "account": token.account,
            "mechanism": token.mechanism,
            "secret": token.secret,
            "expires": token.expires.isoformat(),
        }
        _write(path, json.dumps(kept) + "\n")


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MAX_FILE).decode()


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole; nobody else may read it, at no moment.

    It is not forced to the disk: after a power failure an older one does, or none.
    """
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)  # of a crash; its mode may be another
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)
