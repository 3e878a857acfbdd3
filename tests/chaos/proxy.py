"""``python -m tests.chaos.proxy``: a SOCKS5 proxy as a process of its own, for tests to kill.

It is the proxy of the embedded server, joined to a real server as an external component
(XEP-0114). When the server goes it comes back as soon as that does, and what it relays
meanwhile flows on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from typing import TYPE_CHECKING, Any, cast
from xml.etree.ElementTree import Element, XMLPullParser
from xml.sax.saxutils import quoteattr

import trio

from syncd.demo.faults import Faults
from syncd.demo.proxy65 import Proxy65
from syncd.errors import StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import Iq, make_error
from syncd.xmpp.xml import serialise

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

NS = "jabber:component:accept"

# What the server is told; it listens on the loopback only.
SECRET = "of no value"

# The server is being started again, or about to be.
_AGAIN = 0.05  # seconds

_READ = 65_536  # bytes


async def serve(jid: JID, server_port: int, port: int, advertise: int) -> None:
    """Relay, and answer for the component, until the process is killed."""
    proxy = Proxy65(jid, "127.0.0.1", Faults())
    proxy.port = advertise
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, proxy.serve, listeners)
        while True:
            try:
                await _answer(proxy, server_port)
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
                sys.stderr.write(f"no server: {error!r}\n")
            await trio.sleep(_AGAIN)


async def _answer(proxy: Proxy65, server_port: int) -> None:
    """Answer requests on one stream, until it ends."""
    async with await trio.open_tcp_stream("127.0.0.1", server_port) as stream:
        await stream.send_all(
            f"<stream:stream xmlns='{NS}' xmlns:stream='http://etherx.jabber.org/streams'"
            f" to='{proxy.jid}'>".encode()
        )
        async for element in _elements(stream):
            if element.tag == f"{{{NS}}}handshake":
                sys.stderr.write("joined\n")
            elif element.tag == f"{{{NS}}}iq" and element.get("type") in ("get", "set"):
                await stream.send_all(_reply(proxy, element))


async def _elements(stream: trio.SocketStream) -> AsyncIterator[Element]:
    """Read the children of the stream; prove that we know the secret on the way."""
    parser: XMLPullParser[Any] = XMLPullParser(("start", "end"))
    depth = 0
    while data := bytes(await stream.receive_some(_READ)):
        parser.feed(data)
        events = cast("Iterator[tuple[str, Element]]", parser.read_events())
        for event, element in events:
            depth += 1 if event == "start" else -1
            if event == "start" and depth == 1:
                # XEP-0114 section 3.2
                proof = f"{element.get('id')}{SECRET}".encode()
                digest = hashlib.sha1(proof, usedforsecurity=False).hexdigest()
                await stream.send_all(f"<handshake>{digest}</handshake>".encode())
            elif event == "end" and depth == 1:
                yield element


def _reply(proxy: Proxy65, element: Element) -> bytes:
    sender, ident = element.get("from", ""), element.get("id", "")
    kind, content = "result", b""
    try:
        iq = Iq(
            type="set" if element.get("type") == "set" else "get",
            id=ident,
            sender=JID.parse(sender),
            payload=next(iter(element), None),
            element=element,
        )
        answer = proxy.answer(iq, JID.parse(sender))
        content = b"" if answer is None else serialise(answer, NS)
    except StanzaError as error:
        kind, content = "error", serialise(make_error(error), NS)
        # The error itself is in the namespace of the stream.
        content = content.replace(b"jabber:client", NS.encode())
    head = (
        f"<iq type='{kind}' id={quoteattr(ident)} from={quoteattr(str(proxy.jid))} "
        f"to={quoteattr(sender)}>"
    )
    return head.encode() + content + b"</iq>"


def main() -> None:
    """Serve until the process is killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.proxy", description=__doc__)
    parser.add_argument("--jid", required=True, type=JID.parse, help="of the component")
    parser.add_argument("--server-port", required=True, type=int, help="for components")
    parser.add_argument("--port", required=True, type=int, help="where to listen")
    parser.add_argument("--advertise", required=True, type=int, help="the port to tell others")
    args = parser.parse_args()
    trio.run(serve, args.jid, args.server_port, args.port, args.advertise)


if __name__ == "__main__":
    main()
