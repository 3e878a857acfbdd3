"""Conversations on the wire: a script for the sans-IO stream, a server for a transport.

`play` leads a `ClientStream` through a written conversation and fails at the first byte that
the client says otherwise. `Server` is the other end of a transport, led by the test line by
line. It reads with `xml.etree`, so that it does not share the mistakes of our own parser.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, XMLPullParser

import trio

from syncd.xmpp.jid import JID
from syncd.xmpp.login import Credentials
from syncd.xmpp.stream import (
    Bound,
    ClientStream,
    Event,
    KeyWanted,
    Resumed,
    StanzaReceived,
    StreamEnded,
    TLSWanted,
)
from syncd.xmpp.xml import serialise

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Iterator, Sequence

    from syncd.xmpp.sm import StreamManagement

USER = JID.parse("user@example.org")
LAPTOP = JID.parse("user@example.org/laptop")
PASSWORD = "pencil"
# The client's nonce in the example of RFC 5802 section 5.
NONCE = "fyko+d2lbbFgONRv9qkxdawL"
CREDENTIALS = Credentials(password=PASSWORD, nonce=NONCE)

_NAMESPACES = "xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'"

C_HEADER = (
    "<?xml version='1.0'?><stream:stream to='example.org' version='1.0' xml:lang='en' "
    f"{_NAMESPACES}>"
)
C_HEADER_SECURE = C_HEADER.replace(
    " version='1.0' x", " from='user@example.org' version='1.0' x"
)
C_STARTTLS = "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
C_FOOTER = "</stream:stream>"
C_BIND = (
    "<iq type='set' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'>"
    "<resource>laptop</resource></bind></iq>"
)

S_HEADER = (
    "<?xml version='1.0'?><stream:stream from='example.org' id='s1' version='1.0' "
    f"{_NAMESPACES}>"
)
S_PROCEED = "<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
S_BOUND = (
    "<iq type='result' id='bind'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'>"
    "<jid>user@example.org/laptop</jid></bind></iq>"
)
S_FOOTER = "</stream:stream>"

# XEP-0198, whose parts are alike in both directions.
_SM = "xmlns='urn:xmpp:sm:3'"
SM_FEATURE = f"<sm {_SM}/>"
C_ENABLE = f"<enable {_SM} resume='true'/>"
S_ENABLED = f"<enabled {_SM} id='s1' resume='true' max='600'/>"
ASK_ACK = f"<r {_SM}/>"


def ack(h: int) -> str:
    """How many stanzas were handled."""
    return f"<a {_SM} h='{h}'/>"


def resume(h: int, previous: str = "s1") -> str:
    """What the client sends to resume a session."""
    return f"<resume {_SM} h='{h}' previd='{previous}'/>"


def resumed(h: int, previous: str = "s1") -> str:
    """What the server says to that if it knows the session."""
    return f"<resumed {_SM} previd='{previous}' h='{h}'/>"


def features(*children: str) -> str:
    """The server's features."""
    return f"<stream:features>{''.join(children)}</stream:features>"


def mechanisms(*names: str) -> str:
    """The feature that lists the ways to log in."""
    listed = "".join(f"<mechanism>{name}</mechanism>" for name in names)
    return f"<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'>{listed}</mechanisms>"


STARTTLS_FEATURE = "<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls>"
BIND_FEATURE = "<bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'/>"
S_STARTTLS_FEATURES = features(STARTTLS_FEATURE)
S_BIND_FEATURES = features(BIND_FEATURE)


def sasl(name: str, text: str = "", **attributes: str) -> str:
    """A SASL element that carries this text in base64."""
    data = base64.b64encode(text.encode()).decode()
    extra = "".join(f" {key}='{value}'" for key, value in attributes.items())
    return f"<{name} xmlns='urn:ietf:params:xml:ns:xmpp-sasl'{extra}>{data}</{name}>"


# RFC 5802 section 5, message by message.
C_AUTH = sasl("auth", f"n,,n=user,r={NONCE}", mechanism="SCRAM-SHA-1")
S_CHALLENGE = sasl("challenge", f"r={NONCE}3rfcNHYJY1ZVvWVs7j,s=QSXCR+Q6sek8bf92,i=4096")
C_RESPONSE = sasl(
    "response", f"c=biws,r={NONCE}3rfcNHYJY1ZVvWVs7j,p=v0X8v3Bz2T0CJGbJQyF0X+HI4Ts="
)
S_SUCCESS = sasl("success", "v=rmF9pqV8S7suAoZWja4dJRkFsKQ=")

# The whole way from header to what is offered after the login, inside TLS already.
AUTHENTICATION = f"""
    C: {C_HEADER_SECURE}
    S: {S_HEADER}{features(mechanisms("SCRAM-SHA-1", "PLAIN"))}
    C: {C_AUTH}
    S: {S_CHALLENGE}
    C: {C_RESPONSE}
    S: {S_SUCCESS}
    C: {C_HEADER_SECURE}
"""
# And on to bound.
LOGIN = f"""{AUTHENTICATION}
    S: {S_HEADER}{S_BIND_FEATURES}
    C: {C_BIND}
    S: {S_BOUND}
"""
# The same with a server that manages the stream, whose session is s1.
MANAGED_LOGIN = f"""{AUTHENTICATION}
    S: {S_HEADER}{features(BIND_FEATURE, SM_FEATURE)}
    C: {C_BIND}
    S: {S_BOUND}
    C: {C_ENABLE}
    S: {S_ENABLED}
"""


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Cut bytes into pieces of these sizes, the rest in one."""
    for size in sizes:
        if not data:
            return
        yield data[:size]
        data = data[size:]
    if data:
        yield data


def play(stream: ClientStream, script: str, *, sizes: Sequence[int] = ()) -> list[Event]:
    """Lead a stream through a conversation.

    Args:
      stream: Every byte of its output must stand in the script.
      script: Lines ``C: what the client must say`` and ``S: what the server says``, the
        latter also ``(hangs up)``.
      sizes: How what the server says is cut into reads.

    Returns:
      All events; TLS and the key are given to the stream when it wants them.
    """
    events: list[Event] = []
    said = ""
    for line in filter(None, map(str.strip, script.splitlines())):
        who, _, text = line.partition(": ")
        said += stream.data_to_send().decode()
        if who == "C":
            assert text == said, f"not in the script: {said}"
            said = ""
        else:
            assert said == "", f"not in the script: {said}"
            hung_up = text == "(hangs up)"
            for data in [b""] if hung_up else cut(text.encode(), sizes):
                new = stream.receive_data(data)
                events += new
                for event in new:
                    if isinstance(event, TLSWanted):
                        stream.tls_started()
                    elif isinstance(event, KeyWanted):
                        stream.key_derived(event.key.derive(PASSWORD))
    said += stream.data_to_send().decode()
    assert said == "", f"not in the script: {said}"
    return events


def told(events: Iterable[Event]) -> list[str]:
    """Events as short texts, to be compared."""
    return [_tell(event) for event in events]


def _tell(event: Event) -> str:
    match event:
        case TLSWanted():
            return "TLS wanted"
        case KeyWanted():
            return "key wanted"
        case Bound(jid):
            return f"bound {jid}"
        case Resumed():
            return "resumed"
        case StanzaReceived(stanza):
            return serialise(stanza).decode()
        case StreamEnded(None):
            return "ended in peace"
        case StreamEnded(error):
            return f"ended by {type(error).__name__}: {error}"


def new_stream(jid: JID = LAPTOP, *, secure: bool, allow_plain: bool = False) -> ClientStream:
    """A stream that has just begun."""
    return ClientStream(jid, replace(CREDENTIALS, allow_plain=allow_plain), secure=secure)


def open_stream(offered: str = "") -> ClientStream:
    """A stream of `LAPTOP` that has just been bound.

    Args:
      offered: The features that say how to log in; empty: the usual ones.
    """
    stream = new_stream(secure=True)
    usual = mechanisms("SCRAM-SHA-1", "PLAIN")
    play(stream, LOGIN.replace(usual, offered or usual))
    return stream


def managed_stream() -> ClientStream:
    """A stream of `LAPTOP` that has just been bound, and can be resumed."""
    stream = new_stream(secure=True)
    play(stream, MANAGED_LOGIN)
    return stream


def kept(stream: ClientStream) -> StreamManagement:
    """What is kept of a managed stream when its connection breaks."""
    assert stream.sm is not None
    return stream.sm


def resuming_stream(former: StreamManagement, *, said: str = "") -> ClientStream:
    """A stream that asks to resume the session of another.

    Args:
      former: Of the one whose connection broke.
      said: The server's answer to that, if it has answered.
    """
    stream = ClientStream(LAPTOP, CREDENTIALS, secure=True, resume=former)
    script = f"""{AUTHENTICATION}
        S: {S_HEADER}{features(BIND_FEATURE, SM_FEATURE)}
        C: {resume(former.handled, former.id)}
    """
    play(stream, script)
    if said:
        stream.receive_data(said.encode())
    return stream


def tree(element: Element) -> tuple[object, ...]:
    """An element as nested tuples, which compare by value; its own tail is left out."""
    return (
        element.tag,
        dict(element.attrib),
        element.text or "",
        tuple((tree(child), child.tail or "") for child in element),
    )


class ClientGoneError(Exception):
    """The client hung up."""


class Server:
    """The server's end of a transport.

    Args:
      transport: To be closed by whoever made it.
      opened: The client's header is over already.

    Attributes:
      heard: Every byte that came, in clear or from inside TLS, since the last `start_tls`.
    """

    def __init__(self, transport: trio.abc.Stream, *, opened: bool = False) -> None:
        self.transport = transport
        self.heard = bytearray()
        self._restart()
        if opened:
            self._parser.feed(C_HEADER.encode())
            next(self._parser.read_events())

    async def send(self, text: str) -> None:
        """Say something."""
        await self.transport.send_all(text.encode())

    async def header(self) -> dict[str, str]:
        """Read the client's header."""
        self._restart()
        event, element = await self._next()
        assert event == "start"
        return dict(element.attrib)

    async def stanza(self) -> Element:
        """Read the client's next whole stanza.

        Raises:
          EOFError: The footer came.
          ClientGoneError: It hung up instead.
        """
        depth = 0
        while True:
            event, element = await self._next()
            depth += 1 if event == "start" else -1
            if depth < 0:
                raise EOFError("the client closed its stream")
            if depth == 0:
                return element

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Do the server's side of the handshake."""
        tls = trio.SSLStream(self.transport, context, server_side=True, https_compatible=True)
        await tls.do_handshake()
        self.transport = tls
        self.heard.clear()

    async def scram(
        self, *, password: str = PASSWORD, iterations: int = 4096, binding: bytes = b""
    ) -> bool:
        """Let the client log in by SCRAM-SHA-256; tell whether its proof was right.

        Args:
          password: The right one.
          iterations: Asked of the client.
          binding: What it must bind to, if it says that it binds to the channel.
        """
        gs2, _, first = _decoded(await self.stanza()).partition(",,")
        bound = binding if gs2.startswith("p=") else b""
        channel = base64.b64encode(f"{gs2},,".encode() + bound).decode()
        nonce = first.partition(",r=")[2] + "server"
        challenge = f"r={nonce},s={base64.b64encode(b'salt').decode()},i={iterations}"
        await self.send(sasl("challenge", challenge))
        without_proof, _, proof = _decoded(await self.stanza()).rpartition(",p=")
        assert without_proof.startswith(f"c={channel},r=")
        auth = f"{first},{challenge},{without_proof}".encode()
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), b"salt", iterations)
        client_key = hmac.digest(salted, b"Client Key", "sha256")
        signature = hmac.digest(hashlib.sha256(client_key).digest(), auth, "sha256")
        right = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        server_key = hmac.digest(salted, b"Server Key", "sha256")
        verifier = base64.b64encode(hmac.digest(server_key, auth, "sha256")).decode()
        if base64.b64decode(proof) != right:
            await self.send(
                "<failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><not-authorized/></failure>"
            )
            return False
        await self.send(sasl("success", f"v={verifier}"))
        return True

    async def let_in(self, *, behind: str = "") -> None:
        """Go the whole way from the client's first header, inside TLS, to the bind.

        Args:
          behind: What the server says in the same breath as the result of the bind.
        """
        await self.header()
        await self.send(S_HEADER + features(mechanisms("SCRAM-SHA-256")))
        assert await self.scram()
        await self.header()
        await self.send(S_HEADER + S_BIND_FEATURES)
        await self.stanza()
        await self.send(S_BOUND + behind)

    async def answer(self, request: Element, payload: str = "", *, sender: str = "") -> None:
        """Send the result of a request, from whom it went to unless told otherwise."""
        sender = sender or request.get("to", "")
        origin = f" from='{sender}'" if sender else ""
        await self.send(f"<iq type='result' id='{request.get('id')}'{origin}>{payload}</iq>")

    def _restart(self) -> None:
        self._parser: XMLPullParser[Element] = XMLPullParser(("start", "end"))

    async def _next(self) -> tuple[str, Element]:
        while True:
            for item in self._parser.read_events():
                event, element = item[0], item[-1]
                assert isinstance(element, Element)
                return event, element
            data = await self.transport.receive_some(65_536)
            if not data:
                raise ClientGoneError
            self.heard += data
            self._parser.feed(data)
            if hasattr(self._parser, "flush"):
                self._parser.flush()


def _decoded(element: Element) -> str:
    assert element.text is not None
    assert re.fullmatch(r"[A-Za-z0-9+/]+=*", element.text)
    return base64.b64decode(element.text).decode()
