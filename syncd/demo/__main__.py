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
from typing import TYPE_CHECKING

import trio

from syncd.demo.login import EVERYTHING, NOTHING_MORE
from syncd.demo.server import Certificate, Server, make_certificate, open_server

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager


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
    parser.add_argument(
        "--all", action="store_true", help="SASL2, Bind 2, tokens, stream management as well"
    )
    args = parser.parse_args()
    abilities = EVERYTHING if args.all else NOTHING_MORE
    certificate = load_certificate(args.directory, args.domain)
    try:
        serve = partial(
            open_server,
            domain=args.domain,
            accounts=dict(args.account),
            port=args.port,
            certificate=certificate,
            abilities=abilities,
        )
        trio.run(_serve, serve)
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


async def _serve(serve: Callable[[], AbstractAsyncContextManager[Server]]) -> None:
    async with serve() as server:
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
