"""The server's side of an XMPP stream, from header to footer (RFC 6120). Sans-IO.

::

    HEADER ──<stream>──▶ features ──┬─ no TLS yet ──▶ STARTTLS ──<starttls/>──▶ TLS
      ▲                             ├─ no login ────▶ AUTH ──proof──┐            │
      ├── new parser, new header ◀──┼───────────────────────────────┘            │
      ├── tls_started() ◀───────────┼────────────────────────────────────────────┘
      │                             └─ else ─▶ BIND ──<bind/> or <resume/>──▶ OPEN ──▶ CLOSED

With SASL2 (XEP-0388) the stream does not start anew: AUTH leads to OPEN at once if the client
asked for its resource or its former session inside the login, and else to BIND.

What the client does wrong is the last event, `StreamEnded`, and the stream error that
answers it is already in `data_to_send`.
"""

from __future__ import annotations

import enum
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.demo.login import (
    Exchange,
    LoginRefusedError,
    Request,
    Step,
    make_offer,
    make_success,
    read_request,
)
from syncd.demo.resumption import Management, no_session
from syncd.errors import AuthenticationError, RemoteProtocolError, StanzaError
from syncd.xmpp import sasl, sm
from syncd.xmpp.jid import JID
from syncd.xmpp.login import (
    AUTHENTICATE,
    CHALLENGE,
    FAILURE,
    NS_BIND2,
    NS_SASL,
    NS_SASL2,
    RESPONSE,
)
from syncd.xmpp.stanza import (
    IQ,
    MESSAGE,
    NS_STREAM_ERRORS,
    PRESENCE,
    make_error_reply,
    make_iq,
    read_iq,
)
from syncd.xmpp.stream import NS_BIND, NS_TLS
from syncd.xmpp.xml import (
    NS_CLIENT,
    NS_STREAMS,
    Closed,
    Malformed,
    Opened,
    StreamParser,
    make,
    namespace,
    serialise,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from xml.etree.ElementTree import Element

    from syncd.demo.login import Accounts
    from syncd.demo.resumption import Resume
    from syncd.xmpp.sm import StreamManagement

NS_SESSION = "urn:ietf:params:xml:ns:xmpp-session"

# Openfire's; Prosody's and Debian ejabberd's is a quarter of it.
MAX_STANZA = 1_048_576  # bytes
# Nobody's login is larger, and anybody may try one.
_MAX_STANZA_BEFORE_LOGIN = 16_384  # bytes
# RFC 6120 section 6.4.5: at least 2, at most 5.
_MAX_TRIES = 4


class State(enum.Enum):
    """Where the stream is; see the drawing at the top."""

    HEADER = enum.auto()
    STARTTLS = enum.auto()
    TLS = enum.auto()
    AUTH = enum.auto()
    BIND = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


@dataclass(frozen=True, slots=True)
class TLSWanted:
    """Write what is queued, start TLS, then call `ServerStream.tls_started`."""


@dataclass(frozen=True, slots=True)
class Bound:
    """The stream is open for stanzas."""


@dataclass(frozen=True, slots=True)
class StanzaReceived:
    """An iq, message or presence, as the client sent it."""

    stanza: Element


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """Nothing follows; write what is queued, then close the connection.

    Attributes:
      condition: The stream error that we sent; empty when the client closed its stream.
    """

    condition: str


Event = TLSWanted | Bound | StanzaReceived | StreamEnded


class _StreamEndedError(Exception):
    """Leaves the handlers below; never leaves this module."""

    def __init__(self, condition: str, *details: Element) -> None:
        super().__init__(condition)
        self.condition = condition
        self.details = details


class ServerStream:
    """One client's stream.

    Args:
      accounts: Who may log in.
      token: Gives a fresh random printable string of at least 128 bits.
      bind: Takes the account and the resource asked for (or an empty string), and gives
        the full JID; raises `StanzaError` to refuse.
      secure: The connection is inside TLS already (direct TLS, XEP-0368).
      max_stanza: Limit after the login, bytes.
      resume: Hands a former session over (XEP-0198).
      hidden: Mechanisms, bindings and namespaces that do not reach the client, as if somebody
        between took them out of the offer.

    Attributes:
      state: Where the stream is.
      management: What it counts, so that its session can be resumed (XEP-0198).
    """

    def __init__(
        self,
        accounts: Accounts,
        *,
        token: Callable[[], str],
        bind: Callable[[JID, str], JID],
        secure: bool = False,
        max_stanza: int = MAX_STANZA,
        resume: Resume = no_session,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self.state = State.HEADER
        self._abilities = accounts.abilities
        self.management = Management(able=self._abilities.managed, token=token, resume=resume)
        self._hidden = hidden
        self._accounts = accounts
        self._token = token
        self._bind = bind
        self._secure = secure
        self._max_stanza = max_stanza
        self._account: JID | None = None
        self._jid: JID | None = None
        self._exchange: Exchange | None = None
        self._request: Request | None = None  # with SASL2
        self._over = False  # the session ends with the stream
        self._tries = 0
        self._begun = False  # something of the client's header is here
        self._answered = False  # our header is out
        self._out = bytearray()
        self._events: list[Event] = []
        self._parser = StreamParser(max_stanza=_MAX_STANZA_BEFORE_LOGIN)
        # RFC 6120: which element may come in which state.
        self._table: dict[tuple[State, str], Callable[[Element], None]] = {
            # section 5.4.2
            (State.STARTTLS, f"{{{NS_TLS}}}starttls"): self._on_starttls,
            # section 6.5.4
            (State.STARTTLS, f"{{{NS_SASL}}}auth"): lambda _: self._refuse(
                "encryption-required"
            ),
            # section 6.4
            (State.AUTH, f"{{{NS_SASL}}}auth"): self._on_auth,
            (State.AUTH, f"{{{NS_SASL}}}response"): self._on_response,
            (State.AUTH, f"{{{NS_SASL}}}abort"): lambda _: self._refuse("aborted"),
            # XEP-0388 section 2
            (State.AUTH, AUTHENTICATE): self._on_authenticate,
            (State.AUTH, RESPONSE): self._on_response,
            (State.AUTH, f"{{{NS_SASL2}}}abort"): lambda _: self._refuse("aborted"),
            # section 7
            (State.BIND, IQ): self._on_bind,
            # XEP-0198 sections 3 to 5
            (State.BIND, f"{{{sm.NS}}}resume"): self._on_resume,
            (State.OPEN, f"{{{sm.NS}}}enable"): self._on_enable,
            (State.OPEN, f"{{{sm.NS}}}r"): self._on_ack_request,
            (State.OPEN, f"{{{sm.NS}}}a"): self._on_ack,
            # section 8
            **{(State.OPEN, tag): self._on_stanza for tag in (IQ, MESSAGE, PRESENCE)},
        }

    @property
    def queued(self) -> int:
        """How many bytes wait to be sent."""
        return len(self._out)

    def receive_data(self, data: bytes) -> list[Event]:
        """Take what the connection gave.

        Args:
          data: Any cut of the client's bytes; ``b""`` when it has hung up.

        Returns:
          What has happened, in order; `StreamEnded` is always the last.
        """
        if not data:
            self._end("")
        elif self.state is State.HEADER and not self._begins_well(data):
            self.close("not-well-formed")
            self._end("not-well-formed")
        for item in self._parser.feed(data):
            if self.state is State.CLOSED:
                break
            parser = self._parser
            try:
                self._receive(item)
            except _StreamEndedError as ended:
                self.close(ended.condition, *ended.details)
                self._end(ended.condition)
            # Bytes read before TLS or the login began must not count after it
            # (the injection of CVE-2011-0411).
            if self._parser is not parser or self.state is State.TLS:
                break
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> bytes:
        """Take the bytes that are to be written now, all of them, in order."""
        data, self._out = bytes(self._out), bytearray()
        return data

    def send(self, stanza: bytes) -> None:
        """Queue a written stanza; lost if the stream is not, or no longer, open.

        If the connection broke, and the session can be resumed, it waits for that.
        """
        if self.state is State.OPEN:
            self._out += stanza
        kept = self.management.kept
        if kept is None or not (self.state is State.OPEN or self.resumable):
            return
        if kept.sent(stanza) and self.state is State.OPEN:
            self._out += serialise(make(f"{{{sm.NS}}}r"))
        if kept.full:
            self.close("policy-violation")  # it acknowledges nothing, or is away too long
            self._over = True

    @property
    def resumable(self) -> bool:
        """Whether the stream broke, and its session waits for another."""
        broke = self.state is State.CLOSED and not self._over
        return broke and self.management.resumable

    def lose(self) -> None:
        """The connection is gone; nothing more can be said on it."""
        self.state = State.CLOSED

    def close(self, condition: str = "", *details: Element) -> None:
        """Queue a stream error, if there is a condition, and our footer; nothing follows."""
        self._over = True
        if self.state is State.CLOSED:
            return
        # RFC 6120 section 4.9.1.2: our header comes before any error.
        if not self._answered:
            self._answer()
        if condition:
            error = serialise(make(f"{{{NS_STREAM_ERRORS}}}{condition}"))
            error += b"".join(map(serialise, details))
            self._out += b"<stream:error>" + error + b"</stream:error>"
        self._out += b"</stream:stream>"
        self.state = State.CLOSED

    def tls_started(self) -> None:
        """The connection is inside TLS."""
        assert self.state is State.TLS, f"TLS started in state {self.state.name}"
        self._secure = True
        self._restart()

    def _begins_well(self, data: bytes) -> bool:
        """Whether this may be the beginning of a header, or what follows such a beginning.

        COMPAT(slixmpp): tries direct TLS on any port, and waits. A parser that waits for
        the end of a tag would wait with it.
        """
        if not self._begun:
            first = data.lstrip()[:1]
            self._begun = bool(first)
            return first in (b"", b"<")
        return True

    def _restart(self) -> None:
        # With SASL2 the parser that begins inside TLS stays the one of the open stream.
        known = self._account or (self._secure and self._abilities.sasl2)
        limit = self._max_stanza if known else _MAX_STANZA_BEFORE_LOGIN
        self._parser = StreamParser(max_stanza=limit)
        self._answered = self._begun = False
        self.state = State.HEADER

    def _end(self, condition: str) -> None:
        self.state = State.CLOSED
        self._events.append(StreamEnded(condition))

    def _receive(self, item: Opened | Element | Closed | Malformed) -> None:
        match item:
            case Opened(attributes):
                self._answer()
                # RFC 6120 section 4.9.3.6; COMPAT(clients): some leave `to` out.
                if attributes.get("to", self._accounts.domain) != self._accounts.domain:
                    raise _StreamEndedError("host-unknown")
                if not attributes.get("version", "").startswith("1."):
                    raise _StreamEndedError("unsupported-version")
                self._offer()
            case Malformed(condition):
                raise _StreamEndedError(condition)
            case Closed():
                self.close()
                self._end("")
            case element:
                handler = self._table.get((self.state, element.tag))
                if handler is None:
                    # RFC 6120 section 4.9.3.12
                    early = self.state is not State.OPEN
                    stanza = early and namespace(element.tag) == NS_CLIENT
                    raise _StreamEndedError(
                        "not-authorized" if stanza else "unsupported-stanza-type"
                    )
                handler(element)

    def _answer(self) -> None:
        self._answered = True
        self._out += (
            f"<?xml version='1.0'?><stream:stream from='{self._accounts.domain}'"
            f" id='{self._token()}' version='1.0' xml:lang='en'"
            f" xmlns='{NS_CLIENT}' xmlns:stream='{NS_STREAMS}'>"
        ).encode()

    def _offer(self) -> None:
        if not self._secure:
            features = [make(f"{{{NS_TLS}}}starttls", None, make(f"{{{NS_TLS}}}required"))]
            self.state = State.STARTTLS
        elif self._account is None:
            features = make_offer(self._accounts, self._hidden)
            self.state = State.AUTH
        else:
            # COMPAT(RFC 3921): the session that RFC 6121 abolished, for who still looks.
            optional = make(f"{{{NS_SESSION}}}optional")
            features = [
                make(f"{{{NS_BIND}}}bind"),
                make(f"{{{NS_SESSION}}}session", None, optional),
                *([make(f"{{{sm.NS}}}sm")] if self._abilities.managed else []),
            ]
            self.state = State.BIND
        self._features(features)

    def _features(self, features: list[Element]) -> None:
        shown = [each for each in features if namespace(each.tag) not in self._hidden]
        written = b"".join(map(serialise, shown))
        self._out += b"<stream:features>" + written + b"</stream:features>"

    def _on_starttls(self, _: Element) -> None:
        self._out += serialise(make(f"{{{NS_TLS}}}proceed"))
        self.state = State.TLS
        self._events.append(TLSWanted())

    def _on_auth(self, element: Element) -> None:
        if self._exchange is not None:
            raise _StreamEndedError("unsupported-stanza-type")
        try:
            mechanism = element.get("mechanism", "")
            self._exchange = Exchange(self._accounts, mechanism, self._token())
        except LoginRefusedError as refused:
            self._refuse(refused.condition)
        else:
            self._advance(element.text)

    def _on_authenticate(self, element: Element) -> None:
        if self._exchange is not None or not self._abilities.sasl2:
            raise _StreamEndedError("unsupported-stanza-type")
        self._request = Request(mechanism="", initial="")  # a refusal is one of SASL2
        try:
            request = self._request = read_request(element, self._abilities)
            agent = request.agent if request.fast else None
            self._exchange = Exchange(self._accounts, request.mechanism, self._token(), agent)
        except LoginRefusedError as refused:
            self._refuse(refused.condition)
        else:
            self._advance(request.initial)

    def _on_response(self, element: Element) -> None:
        if self._exchange is None or (element.tag == RESPONSE) != (self._request is not None):
            self._refuse("malformed-request")
        else:
            self._advance(element.text)

    def _advance(self, text: str | None) -> None:
        assert self._exchange is not None
        try:
            step = self._exchange.receive(sasl.decode(text))
        except LoginRefusedError as refused:
            self._refuse(refused.condition)
            return
        except AuthenticationError:
            self._refuse("incorrect-encoding")
            return
        if step.kind == "success":
            self._account = JID.parse(f"{self._exchange.name}@{self._accounts.domain}")
            self._succeed(self._account, self._exchange, step)
            return
        tag = CHALLENGE if self._request is not None else f"{{{NS_SASL}}}challenge"
        self._out += serialise(make(tag, text=sasl.encode(step.data)))

    def _succeed(self, account: JID, exchange: Exchange, step: Step) -> None:
        request, self._request, self._exchange = self._request, None, None
        if request is not None:
            self._grant(account, request, step, rotate=exchange.rotate)
            return
        # RFC 6120 section 6.4.6: an empty success has no text at all.
        text = sasl.encode(step.data) if step.data else None
        self._out += serialise(make(f"{{{NS_SASL}}}success", text=text))
        self._restart()

    def _grant(self, account: JID, request: Request, step: Step, *, rotate: bool) -> None:
        """Do what the client asked for inside SASL2, in the order of XEP-0386 section 3.2."""
        results: list[Element] = []
        jid, resumed = account, False
        if request.resume is not None:
            with self._counted(request.resume):
                answer, resumed = self.management.resume(account, request.resume)
            results.append(answer)
        if request.bind and not resumed:
            jid, bound = self._bind_inside(account, request)
            results += bound
        results += self._accounts.tokens.answer(account.local, request, rotate=rotate)
        self._out += serialise(make_success(step.data, jid, results))
        if resumed:
            # XEP-0198 section 6.2: no features then.
            self._go_on()
        elif jid.resource:
            self._features([])
            self._open(jid)
        else:
            self._offer()

    def _bind_inside(self, account: JID, request: Request) -> tuple[JID, list[Element]]:
        """Bind as XEP-0386 section 3.2 has it; nothing is said if that cannot be done."""
        try:
            # The same client gets the same address again, so its former session ends, as one
            # does whose resource is taken.
            jid = self._bind(account, self._accounts.resource(account, request))
        except StanzaError:
            return account, []
        enable = request.enable
        inside = [] if enable is None else [self.management.enable(jid, enable)]
        return jid, [make(f"{{{NS_BIND2}}}bound", None, *inside)]

    def _refuse(self, condition: str) -> None:
        tag = FAILURE if self._request is not None else f"{{{NS_SASL}}}failure"
        self._exchange = self._request = None
        self._tries += 1
        self._out += serialise(make(tag, None, make(f"{{{NS_SASL}}}{condition}")))
        if self._tries >= _MAX_TRIES:
            raise _StreamEndedError("policy-violation")

    def _on_bind(self, element: Element) -> None:
        assert self._account is not None
        tag = f"{{{NS_BIND}}}bind"
        try:
            iq = read_iq(element)
            if iq.type != "set" or iq.payload is None or iq.payload.tag != tag:
                # RFC 6120 section 7.1: nothing else before a resource is bound.
                raise _StreamEndedError("not-authorized")
            resource = iq.payload.findtext(f"{{{NS_BIND}}}resource") or ""
            jid = self._bind(self._account, resource.strip())
        except StanzaError as error:
            self._out += serialise(make_error_reply(element, error))
            return
        bound = make(tag, None, make(f"{{{NS_BIND}}}jid", text=str(jid)))
        self._out += serialise(make_iq("result", iq.id, None, bound))
        self._open(jid)

    def _open(self, jid: JID) -> None:
        self._jid = jid
        self.state = State.OPEN
        self._events.append(Bound())

    def _on_stanza(self, stanza: Element) -> None:
        if self.management.kept is not None:
            self.management.kept.received()
        self._events.append(StanzaReceived(stanza))

    def _on_enable(self, element: Element) -> None:
        assert self._jid is not None, "a stream that is open has its address"
        self._out += serialise(self.management.enable(self._jid, element))

    def _on_resume(self, element: Element) -> None:
        assert self._account is not None, "only who is logged in comes here"
        with self._counted(element):
            answer, resumed = self.management.resume(self._account, element)
        self._out += serialise(answer)
        if resumed:
            self._go_on()

    def _go_on(self) -> None:
        kept = self.management.kept
        assert kept is not None, "it was resumed"
        self._out += b"".join(kept.unacked)
        self._open(kept.jid)

    def _on_ack_request(self, _: Element) -> None:
        self._out += serialise(make(f"{{{sm.NS}}}a", {"h": str(self._counting().handled)}))

    def _on_ack(self, element: Element) -> None:
        counting = self._counting()
        with self._counted(element):
            counting.acknowledged(sm.read_h(element))

    def _counting(self) -> StreamManagement:
        if self.management.kept is None:
            raise _StreamEndedError("unsupported-stanza-type")
        return self.management.kept

    @contextmanager
    def _counted(self, element: Element) -> Iterator[None]:
        try:
            yield
        except RemoteProtocolError as error:
            detail = self.management.too_high(element)
            raise _StreamEndedError("undefined-condition", detail) from error
