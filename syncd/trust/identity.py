"""The file that holds our identity, and the only place where it is ever written.

``identity.pem`` in the state directory, mode 0600, made at the first start: the private key as
PKCS #8, which `openssl pkey` reads too, and behind it the proofs for the keys it has replaced.
It is written beside, synced, and then given its name, so that a crash leaves the old one or
the new one and never half of one. Everything here blocks: call it in a thread. The caller
holds the lock of the state directory.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import stat
import textwrap
from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from syncd.errors import ConfigError
from syncd.trust.signing import Identity, predecessors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE = "identity.pem"
_NEW = ".identity.new"
# A key has 119 bytes, and the proofs of eight others 1,100; what is longer is something else.
_MAX_SIZE = 16_384  # bytes
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

_KEY = re.compile(rb"-----BEGIN PRIVATE KEY-----\n.*?-----END PRIVATE KEY-----\n", re.DOTALL)
_SUCCESSIONS = re.compile(
    rb"-----BEGIN SYNCD SUCCESSIONS-----\n(.*?)-----END SYNCD SUCCESSIONS-----\n", re.DOTALL
)


def load(directory: Path) -> Identity:
    """Read our identity; make one if there is none.

    Args:
      directory: The state directory.

    Raises:
      ConfigError: The file cannot be used: others may read it, or it is damaged.
    """
    with _explained(directory):
        found = _read(directory)
        if found is None:
            with contextlib.suppress(FileExistsError):  # made by another in this moment
                _create(directory, Identity.generate())
            found = _read(directory)
        if found is None:
            raise ConfigError(f"{directory / FILE} was deleted while syncd started")
        return found


def rotate(directory: Path) -> Identity:
    """Replace our identity; the old one signs the name of the new one.

    Peers that hold the old key take the new one over by that signature. What was verified
    stays verified.

    Args:
      directory: The state directory.

    Returns:
      The new one; the old private key is gone.

    Raises:
      ConfigError: There is none, or the file cannot be used.
    """
    with _explained(directory):
        old = _read(directory)
        if old is None:
            raise ConfigError(
                f"{directory / FILE} does not exist, so there is no key to replace",
                hint="start syncd once",
            )
        new = old.succeeded_by(Identity.generate().private_bytes())
        with _directory(directory) as home:
            _write(home, new)
            os.rename(_NEW, FILE, src_dir_fd=home, dst_dir_fd=home)
            os.fsync(home)
        return new


def _create(directory: Path, identity: Identity) -> None:
    with _directory(directory) as home:
        _write(home, identity)
        try:
            # Unlike a rename, this never replaces a key that peers may know already.
            os.link(_NEW, FILE, src_dir_fd=home, dst_dir_fd=home)
        finally:
            os.unlink(_NEW, dir_fd=home)
        os.fsync(home)


def _write(home: int, identity: Identity) -> None:
    """Write the new file beside the old one, durably."""
    with contextlib.suppress(FileNotFoundError):  # left by a crash
        os.unlink(_NEW, dir_fd=home)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(_NEW, flags, 0o600, dir_fd=home), "wb") as file:  # noqa: PTH123 - a descriptor
        file.write(_pem(identity))
        file.flush()
        os.fsync(file.fileno())


def _read(directory: Path) -> Identity | None:
    path = directory / FILE
    try:
        # O_NONBLOCK: a fifo of this name must not stop the start.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path} is no file", hint="move away what has this name")
        if status.st_mode & _OTHERS:
            raise ConfigError(
                f"{path} holds the private key, and others may read or change it: its mode is "
                f"{stat.S_IMODE(status.st_mode):04o}",
                hint=f"if nobody has read it, run `chmod 600 {path}`; otherwise delete it, "
                "and have your peers accept the new key",
            )
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigError(
                f"{path} holds the private key, and belongs to another user",
                hint=f"run syncd as the user {status.st_uid}, or give it the file (chown)",
            )
        data = file.read(_MAX_SIZE + 1)
    return _parse(path, data)


def _parse(path: Path, data: bytes) -> Identity:
    damaged = ConfigError(
        f"{path} is damaged: there is no identity in it",
        hint="restore it from a backup; if there is none, delete it, and have your peers "
        "accept the new key",
    )
    key, proofs = _KEY.search(data), _SUCCESSIONS.search(data)
    if key is None or len(data) > _MAX_SIZE:
        raise damaged
    try:
        private = load_pem_private_key(key[0], password=None)
        successions = (
            base64.b64decode(proofs[1].replace(b"\n", b""), validate=True) if proofs else b""
        )
    except (ValueError, TypeError, UnsupportedAlgorithm, binascii.Error) as error:
        raise damaged from error
    if not isinstance(private, Ed25519PrivateKey):
        raise damaged
    identity = Identity(private.private_bytes_raw(), successions)
    # What peers would not believe must not be shown to them.
    if successions and not predecessors(identity.public, successions):
        raise damaged
    return identity


def _pem(identity: Identity) -> bytes:
    private = Ed25519PrivateKey.from_private_bytes(identity.private_bytes())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    if not identity.successions:
        return pem
    lines = textwrap.fill(base64.b64encode(identity.successions).decode("ascii"), 64)
    name = "SYNCD SUCCESSIONS"
    return pem + f"-----BEGIN {name}-----\n{lines}\n-----END {name}-----\n".encode("ascii")


@contextlib.contextmanager
def _directory(directory: Path) -> Iterator[int]:
    home = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield home
    finally:
        os.close(home)


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{directory / FILE} cannot be read or made: {error.strerror}",
            hint="look at the permissions of the state directory, and at the disk",
        ) from error
