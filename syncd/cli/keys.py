"""``syncctl peer`` and ``syncctl key``: keys to look at and to decide about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from syncd.cli.exits import Exit
from syncd.control.client import ask
from syncd.control.escape import printable
from syncd.control.messages import KeyRequest, PeerRequest
from syncd.errors import ControlError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from syncd.control.messages import Key, Keys

# The daemon may have to write to its disk.
_PATIENCE = 15.0  # seconds

_MEANINGS = {
    "unverified": "trusted on first use; nobody has compared it yet",
    "verified": "compared by a person",
    "blocked": "blocked: nothing goes to or comes from this peer",
    "changed": "CHANGED: nothing moves until a person has decided",
}


def run(
    socket: Path,
    action: Literal["list", "show", "verify", "reset-key", "block"],
    peer: str,
    *,
    fingerprint: str,
    confirm: Callable[[str], bool] | None,
) -> Exit:
    """Show keys, or decide about one.

    Args:
      socket: Of the daemon.
      action: As in `PeerRequest`.
      peer: Whose: a bare JID; empty to list.
      fingerprint: For ``verify``: what the peer's own syncd shows, if it is at hand.
      confirm: Asks the person at the terminal; None if there is nobody.

    Raises:
      NotFoundError: The peer has never shown a key.
      SyncdError: It is not the key that was expected, or the daemon does not answer.
    """
    if action == "verify":
        shown = ask(socket, PeerRequest(action="show", peer=peer), timeout=_PATIENCE)
        seen = _only(shown, peer)
        if not _is_confirmed(seen, fingerprint, confirm):
            print("not verified")
            return Exit.FAILED
        # Not another key that came in between.
        fingerprint = seen.fingerprint
    request = PeerRequest(action=action, peer=peer, fingerprint=fingerprint)
    keys = ask(socket, request, timeout=_PATIENCE)
    if action == "list":
        print(f"our own key: {printable(keys.own)}")
    elif action == "reset-key":
        print(f"{printable(peer)}: forgotten; its next key is trusted on first use")
    for key in keys.keys:
        print("\n".join(_lines(key)))
    if action == "show":
        _only(keys, peer)
    return Exit.OK


def run_own(socket: Path, action: Literal["show", "rotate"]) -> Exit:
    """Show our own key, or replace it.

    Args:
      socket: Of the daemon.
      action: As in `KeyRequest`.

    Raises:
      SyncdError: It cannot be replaced, or the daemon does not answer.
    """
    keys = ask(socket, KeyRequest(action=action), timeout=_PATIENCE)
    print(f"our own key: {printable(keys.own)}")
    if action == "rotate":
        print("the old one has signed it: who knows that one takes this one over by itself")
    return Exit.OK


def _is_confirmed(seen: Key, fingerprint: str, confirm: Callable[[str], bool] | None) -> bool:
    if fingerprint:
        if _digits(fingerprint) != _digits(seen.fingerprint):
            raise ControlError(
                f"{seen.peer} shows another key: {seen.fingerprint}",
                hint="somebody may be in between; ask them for the fingerprint once more",
            )
        return True
    if confirm is None:
        raise ControlError(
            "there is nobody to ask whether the words are the same at both ends",
            hint="use --fingerprint with what the other end's syncctl peer list prints",
        )
    print("\n".join(_lines(seen)))
    return confirm("Does the other end show the same words? [y/N] ")


def _only(keys: Keys, peer: str) -> Key:
    # Of one peer the daemon shows one; it may write the address in another way than we do.
    if keys.keys:
        return keys.keys[0]
    raise NotFoundError(f"{peer} has never shown a key", hint="it does at the first transfer")


def _digits(fingerprint: str) -> str:
    """Whatever groups it is written in."""
    return "".join(character for character in fingerprint.lower() if character.isalnum())


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"


def _lines(key: Key) -> list[str]:
    lines = [
        f"{printable(key.peer)}: {_MEANINGS[key.state]}",
        f"  fingerprint: {printable(key.fingerprint)}",
        f"  words: {printable(' '.join(key.words))}",
        f"  seen: {_day(key.first_seen)} to {_day(key.last_seen)}",
    ]
    if key.offered:
        lines.insert(2, f"  it shows now: {printable(key.offered)}")
    return lines
