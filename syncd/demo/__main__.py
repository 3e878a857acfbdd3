"""``python -m syncd.demo``: the server as a process of its own, for tests to kill.

The certificate lies in the directory, so that clients trust the server that is started
again there. All else is forgotten.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from functools import partial
from pathlib import Path

import trio

from syncd.demo.certificate import Certificate, make_certificate
from syncd.demo.server import open_server


def main() -> None:
    """Serve until the process is ended; prints ``port N`` once it listens."""
    parser = argparse.ArgumentParser(prog="python -m syncd.demo", description=__doc__)
    parser.add_argument("--domain", default="demo.example")
    parser.add_argument(
        "--account", action="append", required=True, metavar="NAME:PASSWORD", type=_account
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument(
        "--directory", type=Path, required=True, help="for ca.pem and the server's key"
    )
    args = parser.parse_args()
    certificate = load_certificate(args.directory, args.domain)
    try:
        trio.run(partial(_serve, args.domain, dict(args.account), args.port, certificate))
    except* KeyboardInterrupt:
        sys.exit(130)  # as shells have it: 128 + SIGINT


def load_certificate(directory: Path, domain: str) -> Certificate:
    """Read the certificate of an earlier run, or make one and keep it."""
    paths = [directory / name for name in ("ca.pem", "certificate.pem", "key.pem")]
    if all(path.exists() for path in paths):
        ca, certificate, key = (path.read_bytes() for path in paths)
        return Certificate(ca_pem=ca, certificate_pem=certificate, key_pem=key)
    made = make_certificate(domain, datetime.datetime.now(datetime.UTC))
    directory.mkdir(parents=True, exist_ok=True)
    paths[2].touch(mode=0o600)
    for path, pem in zip(paths, (made.ca_pem, made.certificate_pem, made.key_pem), strict=True):
        path.write_bytes(pem)
    return made


async def _serve(
    domain: str, accounts: dict[str, str], port: int, certificate: Certificate
) -> None:
    async with open_server(
        domain=domain, accounts=accounts, port=port, certificate=certificate
    ) as server:
        sys.stdout.write(f"port {server.port}\n")
        sys.stdout.flush()
        await trio.sleep_forever()


def _account(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:PASSWORD")
    return name, password


if __name__ == "__main__":
    main()
