"""An XMPP client for tests of servers: logs in over real TCP and TLS, then obeys the test.

It shares the parser and SCRAM with syncd, and nothing else: no state machine, no routing.
"""

from __future__ import annotations

import itertools
import ssl
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

import trio

from syncd.bytestreams.socks5 import Connector
from syncd.xmpp import sasl
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import make_iq
from syncd.xmpp.xml import (
    NS_CLIENT,
    NS_STREAMS,
    Closed,
    Malformed,
    Opened,
    StreamParser,
    make,
    serialise,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

NS_TLS = "urn:ietf:params:xml:ns:xmpp-tls"
NS_SASL = "urn:ietf:params:xml:ns:xmpp-sasl"
NS_BIND = "urn:ietf:params:xml:ns:xmpp-bind"

# Nothing on this machine takes so long; a test that waits for it has failed.
PATIENCE = 10.0  # seconds


class RawClient:
    """One end of a stream, in the hands of a test.

    Attributes:
      wire: What carries the bytes now.
      jid: Its full JID once bound.
    """

    def __init__(self, wire: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self.wire = wire
        self.jid = JID("", "unbound")
        self._parser = StreamParser(max_stanza=2_000_000)
        self._seen: deque[Element | Opened | Closed | Malformed] = deque()
        self._ids = itertools.count(1)

    async def write(self, text: str | bytes) -> None:
        await self.wire.send_all(text.encode() if isinstance(text, str) else text)

    async def send(self, *stanzas: Element) -> None:
        await self.write(b"".join(map(serialise, stanzas)))

    async def next_item(self) -> Element | Opened | Closed | Malformed | None:
        """What comes next; None: the server hung up."""
        with trio.fail_after(PATIENCE):
            while not self._seen:
                data = bytes(await self.wire.receive_some(65_536))
                if not data:
                    return None
                self._seen.extend(self._parser.feed(data))
        return self._seen.popleft()

    async def next(self) -> Element:
        """The next element; anything else fails the test."""
        item = await self.next_item()
        assert isinstance(item, Element), item
        return item

    async def until_end(self) -> bool:
        """Whether the connection ends, in whatever way, before our patience does."""
        try:
            while await self.next_item() is not None:
                pass
        except trio.BrokenResourceError:
            return True
        except trio.TooSlowError:
            return False
        return True

    async def until(self, meant: Callable[[Element], bool]) -> Element:
        """The next element that is meant; those before it stay for later."""
        passed = []
        while not meant(element := await self.next()):
            passed.append(element)
        self._seen.extendleft(reversed(passed))
        return element

    async def request(self, kind: str, to: str | None, *payload: Element) -> Element:
        """Send an iq and give its answer; other stanzas stay for later."""
        ident = f"raw-{next(self._ids)}"
        iq = make_iq("get", ident, JID.parse(to) if to else None, *payload)
        iq.set("type", kind)
        await self.send(iq)
        return await self.until(lambda element: element.get("id") == ident)

    async def forget(self) -> None:
        """Throw away what the server has sent so far."""
        await self.request("get", self.jid.domain, make("{urn:xmpp:ping}ping"))
        self._seen.clear()

    async def open(self, domain: str) -> Element:
        """Begin the stream anew, and give the features."""
        self._parser = StreamParser(max_stanza=2_000_000)
        self._seen.clear()
        await self.write(
            f"<?xml version='1.0'?><stream:stream to='{domain}' version='1.0'"
            f" xmlns='{NS_CLIENT}' xmlns:stream='{NS_STREAMS}'>"
        )
        assert isinstance(await self.next_item(), Opened)
        return await self.next()

    async def start_tls(self, domain: str, ca_pem: bytes) -> None:
        context = ssl.create_default_context(cadata=ca_pem.decode())
        assert isinstance(self.wire, trio.SocketStream)
        self.wire = trio.SSLStream(
            self.wire, context, server_hostname=domain, https_compatible=True
        )
        await self.wire.do_handshake()

    async def authenticate(self, name: str, password: str, mechanism: str) -> Element:
        """Log in; gives the ``<success/>`` or ``<failure/>``."""
        if mechanism == "PLAIN":
            await self.send_sasl("auth", sasl.plain(name, password), mechanism=mechanism)
            return await self.next()
        scram = sasl.Scram(mechanism, name, "a nonce of the tests")
        await self.send_sasl("auth", scram.first(), mechanism=mechanism)
        challenge = await self.next()
        if challenge.tag != f"{{{NS_SASL}}}challenge":
            return challenge
        key = scram.challenged(sasl.decode(challenge.text)).derive(password)
        await self.send_sasl("response", scram.final(key))
        outcome = await self.next()
        if outcome.tag == f"{{{NS_SASL}}}success":
            scram.finished(sasl.decode(outcome.text))
        return outcome

    async def send_sasl(self, name: str, data: bytes, **attributes: str) -> None:
        await self.send(make(f"{{{NS_SASL}}}{name}", attributes, text=sasl.encode(data)))

    async def bind(self, resource: str) -> Element:
        wanted = [make(f"{{{NS_BIND}}}resource", text=resource)] if resource else []
        return await self.request("set", None, make(f"{{{NS_BIND}}}bind", None, *wanted))


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[RawClient]:
    """A client that has only connected."""
    client = RawClient(await trio.open_tcp_stream("127.0.0.1", port))
    try:
        yield client
    finally:
        await trio.aclose_forcefully(client.wire)


@asynccontextmanager
async def log_in(
    port: int,
    ca_pem: bytes,
    jid: str,
    password: str,
    *,
    mechanism: str = "SCRAM-SHA-256",
    presence: bool = True,
) -> AsyncIterator[RawClient]:
    """A client that is logged in and, unless told otherwise, available."""
    account = JID.parse(jid)
    async with connect(port) as client:
        await client.open(account.domain)
        await client.write(f"<starttls xmlns='{NS_TLS}'/>")
        assert (await client.next()).tag == f"{{{NS_TLS}}}proceed"
        await client.start_tls(account.domain, ca_pem)
        await client.open(account.domain)
        outcome = await client.authenticate(account.local, password, mechanism)
        assert outcome.tag == f"{{{NS_SASL}}}success"
        await client.open(account.domain)
        bound = await client.bind(account.resource)
        text = bound.findtext(f"{{{NS_BIND}}}bind/{{{NS_BIND}}}jid")
        assert text is not None, bound.attrib
        client.jid = JID.parse(text)
        if presence:
            await client.write("<presence/>")
            # RFC 6121 section 4.4.2: our own comes back to us.
            await client.until(lambda element: element.get("from") == text)
        yield client


async def socks5(port: int, address: str) -> trio.SocketStream:
    """A connection to a streamhost, after its handshake.

    Raises:
      SyncdError: The streamhost refused.
    """
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    connector = Connector(address)
    with trio.fail_after(PATIENCE):
        while True:
            if data := connector.data_to_send():
                await stream.send_all(data)
            if not connector.bytes_wanted:
                break
            connector.receive_data(bytes(await stream.receive_some(connector.bytes_wanted)))
    if connector.error is not None:
        await stream.aclose()
        raise connector.error
    return stream
