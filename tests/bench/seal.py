"""How fast sealing is: `python -m tests.bench.seal [--mib N]`.

Three tables: AES-GCM alone by segment size, which is why segments are 64 KiB; one end alone;
and both ends as two processes with a TCP connection between them, by how many segments are
moved at once, beside the same without a seal. Figures are the best of some runs, MiB/s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from syncd.trust.handshake import Answer, Offer, Terms
from syncd.trust.kem import Ephemeral, Kem
from syncd.trust.seal import BATCH, SEGMENT, TAG, Opener, Sealer, sealed_length
from syncd.trust.signing import Identity

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
RUNS = 3


def agree(size: int) -> tuple[Answer, Identity, Ephemeral]:
    """Two peers that have agreed on a transfer."""
    sender, ephemeral = Identity.generate(), Ephemeral.generate(Kem.X25519)
    terms = Terms(
        sid="s",
        sender="alice@example.org/a",
        receiver="bob@example.org/b",
        profile="p",
        folder="f",
        path="p",
        size=size,
        mtime_ns=0,
    )
    offer = Offer.make(terms, sender, [Kem.X25519])
    return Answer.make(offer, 0, Identity.generate(), ephemeral), sender, ephemeral


def rate(size: int, job: Callable[[], object]) -> int:
    """The best of some runs, MiB/s."""
    best = 0.0
    for _ in range(RUNS):
        start = time.perf_counter()
        job()
        best = max(best, size / MIB / (time.perf_counter() - start))
    return round(best)


def ciphers(size: int) -> None:
    """AES-GCM alone."""
    cipher, nonce = AESGCM(AESGCM.generate_key(256)), bytes(12)
    for segment in (1 << bits for bits in range(14, 21, 2)):
        plain, sealed = bytearray(segment), bytearray(segment + TAG)

        def seal() -> None:
            for _ in range(size // segment):  # noqa: B023 - called at once
                cipher.encrypt_into(nonce, plain, nonce, sealed)  # noqa: B023 - as above

        def unseal() -> None:
            for _ in range(size // segment):  # noqa: B023 - as above
                cipher.decrypt_into(nonce, sealed, nonce, plain)  # noqa: B023 - as above

        line = f"{segment >> 10:5} KiB: seal {rate(size, seal):6}, open {rate(size, unseal):6}"
        sys.stdout.write(f"{line}\n")


def run_sealer(size: int, count: int, put: Callable[[memoryview], object]) -> None:
    """Seal so many bytes, `count` segments at a time."""
    answer, identity, _ = agree(size)
    sealer, data = Sealer(answer, identity), memoryview(bytearray(count * SEGMENT))
    while sealer.left:
        part = data[: sealer.left]
        put(sealer.seal(part, final=len(part) == sealer.left))


def ends(size: int) -> None:
    """Sealing alone, and sealing and opening in one thread."""
    for count in (1, BATCH):
        seals = rate(size, lambda: run_sealer(size, count, len))  # noqa: B023 - called at once

        def both() -> None:
            answer, identity, ephemeral = agree(size)
            sealer, opener = Sealer(answer, identity), Opener(answer, ephemeral)
            opener.header(sealer.header)
            data = memoryview(bytearray(count * SEGMENT))  # noqa: B023 - called at once
            while sealer.left:
                part = data[: sealer.left]
                final = len(part) == sealer.left
                opener.open(sealer.seal(part, final=final), final=final)

        sys.stdout.write(f"{count:3} at once: seal {seals:6}, both {rate(size, both):6}\n")


def send(connection: socket.socket, size: int, count: int, sealer: Sealer | None) -> None:
    """Read a file, hash it, seal it or not, send it; as the pump does it."""
    chunk, hasher = memoryview(bytearray(count * SEGMENT)), blake3.blake3()
    with tempfile.TemporaryFile() as file:
        file.truncate(MIB)
        if sealer is not None:
            connection.sendall(sealer.header)
        left = size
        while left:
            part = chunk[:left]
            os.preadv(file.fileno(), [part], 0)
            hasher.update(part)
            left -= len(part)
            connection.sendall(sealer.seal(part, final=not left) if sealer else part)
    connection.close()


def receive(connection: socket.socket, size: int, count: int, opener: Opener | None) -> None:
    """Receive, open or not, write, hash."""
    buffer, hasher = memoryview(bytearray(count * (SEGMENT + TAG))), blake3.blake3()
    if opener is not None:
        header = bytearray(opener.header_size)
        fill(connection, memoryview(header))
        opener.header(memoryview(header))
    with tempfile.TemporaryFile() as file:
        while size:
            plain = min(size, count * SEGMENT)
            part = buffer[: sealed_length(plain) if opener else plain]
            fill(connection, part)
            size -= plain
            # Always to the same place: the disk is not what is measured.
            data = opener.open(part, final=not size) if opener else part
            os.pwrite(file.fileno(), data, 0)
            hasher.update(data)


def fill(connection: socket.socket, view: memoryview) -> None:
    """Receive exactly so many bytes."""
    while view:
        count = connection.recv_into(view)
        assert count
        view = view[count:]


def pair() -> tuple[socket.socket, socket.socket]:
    """A TCP connection to ourselves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return one, other


def wire(size: int) -> None:
    """Both ends, each a process."""
    fork = multiprocessing.get_context("fork")

    def run(count: int, *, sealed: bool) -> None:
        answer, identity, ephemeral = agree(size)
        sealer = Sealer(answer, identity) if sealed else None
        opener = Opener(answer, ephemeral) if sealed else None
        one, other = pair()
        process = fork.Process(target=send, args=(one, size, count, sealer))
        process.start()
        one.close()
        receive(other, size, count, opener)
        other.close()
        process.join()

    for count in (1, 4, BATCH):
        before = cpu_seconds()
        plain = rate(size, lambda: run(count, sealed=False))  # noqa: B023 - called at once
        between = cpu_seconds()
        sealed = rate(size, lambda: run(count, sealed=True))  # noqa: B023 - as above
        cpu = [(then - when) / RUNS * 2**30 / size for when, then in
               ((before, between), (between, cpu_seconds()))]  # fmt: skip
        sys.stdout.write(
            f"{count:3} at once: plain {plain:6}, sealed {sealed:6} = {sealed / plain:.0%}; "
            f"CPU seconds per GiB {cpu[0]:.2f}, {cpu[1]:.2f} = {cpu[0] / cpu[1]:.0%}\n"
        )


def cpu_seconds() -> float:
    """What this process and those that have ended took; a busy machine changes it little."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1_024, help="how much is moved")
    size = parser.parse_args().mib * MIB
    for title, measure in (("AES-GCM", ciphers), ("One thread", ends), ("TCP", wire)):
        sys.stdout.write(f"{title}\n")
        measure(size)


if __name__ == "__main__":
    main()
