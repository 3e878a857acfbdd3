"""SOCKS5 as XEP-0065 uses it: RFC 1928, only CONNECT, to an address that is a hash.

Both sides are one exchange whose order is ours, so each is written as one function (a
generator) that yields how many bytes it needs next and is sent exactly those:

    Connector                       Acceptor
    05 01 00                 ->                            version, methods
                             <-     05 00                  no authentication
    05 01 00 03 28 .. 00 00  ->                            CONNECT to 40 hex digits
                             <-     05 00 00 03 28 .. 00 00

The driver reads `bytes_wanted` and never more. So the first byte of the file, which may lie
in the same segment as the reply, stays in the socket, and greeting and request may come
glued together or one byte at a time. One loop drives either side::

    while True:
        if data := machine.data_to_send():
            write(data)
        if not machine.bytes_wanted:
            break
        machine.receive_data(read(machine.bytes_wanted))  # b"" = hung up

What the other end does wrong is told by `error`, not raised, with the answer to it already
in `data_to_send`. Sans-IO.
"""

from __future__ import annotations

import string
from collections.abc import Generator

from syncd.errors import BytestreamError, RemoteProtocolError

VERSION = 5  # RFC 1928 section 3
NO_AUTHENTICATION = 0x00  # RFC 1928 section 3
NO_ACCEPTABLE_METHODS = 0xFF
CONNECT = 0x01  # RFC 1928 section 4
IPV4, DOMAINNAME, IPV6 = 0x01, 0x03, 0x04  # RFC 1928 section 4, ATYP
SUCCEEDED = 0x00  # RFC 1928 section 6, REP
NOT_ALLOWED = 0x02
COMMAND_NOT_SUPPORTED = 0x07
ADDRESS_TYPE_NOT_SUPPORTED = 0x08

# SHA-1 in hexadecimal (XEP-0065 section 5.3.2).
ADDRESS_LENGTH = 40  # characters

# RFC 1928 section 6, in words that end "the streamhost refused: ...".
_REFUSALS = {
    0x01: "general failure",
    0x02: "it expects no such bytestream",
    0x03: "network unreachable",
    0x04: "host unreachable",
    0x05: "connection refused",
    0x06: "time to live expired",
    0x07: "it cannot connect",
    0x08: "it does not know this kind of address",
}

_Steps = Generator[int, bytes, None]


class _Handshake:
    """Feeds one side's steps, in exactly the pieces that they ask for.

    Attributes:
      error: Why the handshake has failed, or None.
    """

    def __init__(self, steps: _Steps) -> None:
        self.error: BytestreamError | RemoteProtocolError | None = None
        self._in = bytearray()
        self._out = bytearray()
        self._steps = steps
        self._needed = next(steps)

    @property
    def bytes_wanted(self) -> int:
        """How many bytes to read now, at most; 0 when nothing more is to be read."""
        return self._needed - len(self._in)

    def data_to_send(self) -> bytes:
        """Take what is to be written, in one write (quirk of most proxies' parsers)."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def receive_data(self, data: bytes) -> None:
        """Tell what was read.

        Args:
          data: At most `bytes_wanted` bytes; none at all when the other end hung up.

        Raises:
          ValueError: More than `bytes_wanted` were read; they would be lost.
        """
        if len(data) > self.bytes_wanted or not self.bytes_wanted:
            raise ValueError(f"read {len(data)} bytes where {self.bytes_wanted} were wanted")
        if not data:
            self.error = RemoteProtocolError("the connection was closed during the handshake")
            self._stop()
            return
        self._in += data
        if self.bytes_wanted:
            return
        message = bytes(self._in)
        self._in.clear()
        try:
            self._needed = self._steps.send(message)
        except StopIteration:
            self._stop()
        except (BytestreamError, RemoteProtocolError) as error:
            self.error = error
            self._stop()

    def _stop(self) -> None:
        self._steps.close()
        self._in.clear()
        self._needed = 0


class Greeter(_Handshake):
    """The first half of connecting: asks whether there is a streamhost, and nothing of it.

    COMPAT(openfire): a request is remembered by the proxy, even one that it refuses.
    """

    def __init__(self) -> None:
        super().__init__(self._handshake())

    def _handshake(self) -> _Steps:
        self._out += bytes([VERSION, 1, NO_AUTHENTICATION])
        _check_greeting(*(yield 2))


class Connector(_Handshake):
    """The side that connects: the target, and at a proxy the requester too.

    Args:
      address: DST.ADDR, 40 hexadecimal digits (`s5b.dstaddr`).

    Raises:
      ValueError: `address` is not that.
    """

    def __init__(self, address: str) -> None:
        if not is_address(address):
            raise ValueError(f"{address!r} is not 40 hexadecimal digits")
        self._address = address.encode()
        self._asked = False
        self._refused = False
        super().__init__(self._handshake())

    def __repr__(self) -> str:
        return f"<Connector done={self.done} in_doubt={self.in_doubt} error={self.error!r}>"

    @property
    def done(self) -> bool:
        """Whether the streamhost has accepted; what it sends from now on is the file."""
        return not self._needed and self.error is None

    @property
    def in_doubt(self) -> bool:
        """Whether the request went out and no answer came: it may have been accepted."""
        return self._asked and not self.done and not isinstance(self.error, BytestreamError)

    @property
    def refused(self) -> bool:
        """Whether the streamhost does not expect this address, and said so."""
        return self._refused

    def _handshake(self) -> _Steps:
        self._out += bytes([VERSION, 1, NO_AUTHENTICATION])
        _check_greeting(*(yield 2))

        # COMPAT(prosody, ejabberd): the request must not follow the greeting before its
        # answer is here, nor come in two pieces; both are parsed one read at a time.
        self._out += _message(CONNECT, self._address, 0)
        self._asked = True

        # COMPAT(prosody): a refusal may be shorter than the RFC's form, so that only its
        # first two bytes are waited for.
        version, reply = yield 2
        _check_version(version)
        if reply != SUCCEEDED:
            self._refused = True
            why = _REFUSALS.get(reply, f"reply {reply}")
            raise BytestreamError(f"the streamhost refused: {why}")
        _, atyp = yield 2
        # XEP-0065 section 5.3.2 wants BND.ADDR to repeat DST.ADDR.
        # COMPAT(pidgin, xmppframework, old ejabberd): they send their own IP address in
        # some form, or none at all (ATYP 0); nothing here depends on it.
        match atyp:
            case 0x00:
                length = 0
            case 0x01:
                length = 4
            case 0x03:
                (length,) = yield 1
            case 0x04:
                length = 16
            case _:
                raise RemoteProtocolError(f"the streamhost's reply has the address type {atyp}")
        yield length + 2  # and BND.PORT


class Acceptor(_Handshake):
    """The side that listens: reads up to the request, then is told `accept` or `refuse`.

    It never takes more than 304 bytes: a greeting of 2 + 255 and a request of 4 + 1 + 40 + 2;
    anything longer is refused by its length, before it is read.

    Attributes:
      address: DST.ADDR in lower case once the request is here, or None.
    """

    def __init__(self) -> None:
        self.address: str | None = None
        self._asked = b""
        self._port = 0
        super().__init__(self._handshake())

    def __repr__(self) -> str:
        return f"<Acceptor address={self.address} error={self.error!r}>"

    def accept(self) -> None:
        """Queue the reply that lets the bytestream begin."""
        assert self.address is not None
        self._out += _message(SUCCEEDED, self._asked, self._port)

    def refuse(self) -> None:
        """Queue the reply that nobody expects a bytestream with this address."""
        assert self.address is not None
        self._out += _message(NOT_ALLOWED, self._asked, self._port)

    def _handshake(self) -> _Steps:
        version, count = yield 2
        _check_version(version)
        methods = (yield count) if count else b""
        if NO_AUTHENTICATION not in methods:
            self._out += bytes([VERSION, NO_ACCEPTABLE_METHODS])
            raise RemoteProtocolError(
                "the other end wants a login, which XEP-0065 does not have"
            )
        self._out += bytes([VERSION, NO_AUTHENTICATION])

        version, command, _, atyp = yield 4
        _check_version(version)
        if command != CONNECT:
            raise self._refused(COMMAND_NOT_SUPPORTED, f"sent the command {command}")
        if atyp != DOMAINNAME:
            raise self._refused(ADDRESS_TYPE_NOT_SUPPORTED, f"sent the address type {atyp}")
        (length,) = yield 1
        if length != ADDRESS_LENGTH:
            raise self._refused(NOT_ALLOWED, "asked for an address that is no SHA-1")
        rest = yield ADDRESS_LENGTH + 2
        address = rest[:ADDRESS_LENGTH].decode("latin-1")
        if not is_address(address):
            raise self._refused(NOT_ALLOWED, "asked for an address that is no SHA-1")
        # COMPAT(smack): the reply is compared byte for byte with the request, so that
        # case and port are kept as they came.
        self._asked = rest[:ADDRESS_LENGTH]
        self._port = int.from_bytes(rest[ADDRESS_LENGTH:], "big")
        self.address = address.lower()

    def _refused(self, reply: int, what: str) -> RemoteProtocolError:
        # RFC 1928 section 6 knows no reply without an address; this is 0.0.0.0:0.
        self._out += bytes([VERSION, reply, 0, IPV4]) + bytes(4 + 2)
        return RemoteProtocolError(f"the other end {what}")


def is_address(text: str) -> bool:
    """Whether a text is a DST.ADDR: 40 hexadecimal digits of either case."""
    return len(text) == ADDRESS_LENGTH and not set(text).difference(string.hexdigits)


def _message(code: int, address: bytes, port: int) -> bytes:
    """A request (`code` is CMD) or a reply (REP); RFC 1928 sections 4 and 6."""
    head = bytes([VERSION, code, 0, DOMAINNAME, len(address)])
    return head + address + port.to_bytes(2, "big")


def _check_greeting(version: int, method: int) -> None:
    _check_version(version)
    if method != NO_AUTHENTICATION:
        raise BytestreamError("the streamhost demands a login, which XEP-0065 does not have")


def _check_version(version: int) -> None:
    if version != VERSION:
        raise RemoteProtocolError("the other end does not speak SOCKS5")
