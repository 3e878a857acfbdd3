"""The client's side of an XMPP stream, from header to footer (RFC 6120). Sans-IO.

Rule 1: everything that decides what may come next lives in this file. Rule 2: this file
opens no socket, reads no clock and makes no random number.

The driver gives `receive_data` what it reads (``b""`` when the other end has hung up), writes
what `data_to_send` returns, and acts on the events. What the server does wrong is the last
event, `StreamEnded`, never an exception; the answer to it is already in `data_to_send`.

::

    HEADER ──<stream>──▶ FEATURES ──<features>──┬─ no TLS yet ─▶ STARTTLS ─<proceed/>─▶ TLS
       ▲                                        │                                       │
       │                                        ├─ not logged in ─▶ AUTH ─<success/>─┐   │
       ├── new parser, new header ◀─────────────┼────────────────────────────────────┘   │
       ├── tls_started() ◀──────────────────────┼────────────────────────────────────────┘
       │                                        ├─ else ─▶ BIND ─result─▶ OPEN ─▶ CLOSED
       │                                        │           ▲              ▲
       │                                        │       <failed/>          │
       │                                        └─ former session ─▶ RESUME ─<resumed/>
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.errors import (
    AuthenticationError,
    OfflineError,
    RemoteProtocolError,
    StanzaError,
    SyncdError,
)
from syncd.xmpp import login, sasl, sm
from syncd.xmpp.jid import JID
from syncd.xmpp.login import NS_SASL, Login
from syncd.xmpp.sm import StreamManagement
from syncd.xmpp.stanza import (
    IQ,
    MESSAGE,
    PRESENCE,
    Limits,
    make_iq,
    read_error,
    read_limits,
    read_stream_error,
    write_stream_error,
)
from syncd.xmpp.xml import (
    MAX_STANZA,
    NS_CLIENT,
    NS_STREAMS,
    Closed,
    Malformed,
    Opened,
    Outgoing,
    StreamParser,
    local_name,
    make,
    namespace,
    serialise,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from xml.etree.ElementTree import Element

    from syncd.xmpp.login import Credentials

NS_TLS = "urn:ietf:params:xml:ns:xmpp-tls"
NS_BIND = "urn:ietf:params:xml:ns:xmpp-bind"

FEATURES = f"{{{NS_STREAMS}}}features"
ERROR = f"{{{NS_STREAMS}}}error"

# Before the login the server is a stranger. Prosody allows 10,000 bytes then.
MAX_STANZA_BEFORE_LOGIN = 16_384  # bytes
# The only iq before the stream is open, so its id need not be random.
_BIND_ID = "bind"


class State(enum.Enum):
    """Where the stream is; see the drawing at the top."""

    HEADER = enum.auto()
    FEATURES = enum.auto()
    STARTTLS = enum.auto()
    TLS = enum.auto()
    AUTH = enum.auto()
    RESUME = enum.auto()
    BIND = enum.auto()
    OPEN = enum.auto()
    CLOSED = enum.auto()


@dataclass(frozen=True, slots=True)
class TLSWanted:
    """Start TLS on the connection, then call `ClientStream.tls_started`."""


@dataclass(frozen=True, slots=True)
class KeyWanted:
    """Derive the key from the password, then call `ClientStream.key_derived`."""

    key: sasl.KeyWanted


@dataclass(frozen=True, slots=True)
class Bound:
    """The stream is open for stanzas.

    Attributes:
      jid: Our full JID, as the server decided.
    """

    jid: JID


@dataclass(frozen=True, slots=True)
class Resumed:
    """The former session goes on: nothing is lost, and everything else is as it was."""


@dataclass(frozen=True, slots=True)
class StanzaReceived:
    """An iq, message or presence."""

    stanza: Element


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """Nothing follows; write what is queued, then close the connection.

    Attributes:
      error: Why; None when both ends closed the stream in peace.
    """

    error: SyncdError | None


Event = TLSWanted | KeyWanted | Bound | Resumed | StanzaReceived | StreamEnded


class ClientStream:
    """One stream, from connection to connection's end.

    Args:
      jid: Whose stream; the resource, if any, is asked for.
      credentials: How to log in.
      secure: The connection is inside TLS already (direct TLS, XEP-0368).
      end_point: Then the hash of the server's certificate (RFC 5929 section 4), for channel
        binding; None if it cannot be had.
      resume: Of a former session, whose connection broke; `Bound` instead of `Resumed` then
        tells that the server has forgotten it.

    Attributes:
      jid: The full JID once bound.
      state: See above.
      sm: What makes this session resumable (XEP-0198); None if nothing does.
      limits: What the server has said that it takes.
    """

    def __init__(
        self,
        jid: JID,
        credentials: Credentials,
        *,
        secure: bool,
        end_point: bytes | None = None,
        resume: StreamManagement | None = None,
    ) -> None:
        self.jid = jid
        self.state = State.HEADER
        self.sm: StreamManagement | None = None
        self.limits = Limits()
        self._former = resume
        self._counting = False  # the server has enabled stream management: its stanzas count
        self._credentials = credentials
        self._login: Login | None = None
        self._secure = secure
        self._end_point = end_point
        self._authenticated = False
        self._closing = False  # our footer is out
        self._can_enable = False  # the server offers stream management
        self._out = Outgoing()
        self._events: list[Event] = []
        # RFC 6120: which element may come in which state. What is not here ends the stream.
        self._table: dict[tuple[State, str], Callable[[Element], None]] = {
            # section 4.3.2: features follow every header
            (State.FEATURES, FEATURES): self._on_features,
            # section 5.4.2
            (State.STARTTLS, f"{{{NS_TLS}}}proceed"): self._on_proceed,
            (State.STARTTLS, f"{{{NS_TLS}}}failure"): self._on_tls_failure,
            # section 6.4
            (State.AUTH, f"{{{NS_SASL}}}challenge"): self._on_challenge,
            (State.AUTH, f"{{{NS_SASL}}}success"): self._on_success,
            (State.AUTH, f"{{{NS_SASL}}}failure"): self._on_failure,
            # XEP-0388 section 2
            (State.AUTH, login.CHALLENGE): self._on_challenge,
            (State.AUTH, login.SUCCESS): self._on_success,
            (State.AUTH, login.FAILURE): self._on_failure,
            (State.AUTH, login.CONTINUE): self._on_continue,
            (State.OPEN, FEATURES): self._on_late_features,
            # XEP-0198 section 5
            (State.RESUME, f"{{{sm.NS}}}resumed"): self._on_resumed,
            (State.RESUME, f"{{{sm.NS}}}failed"): self._on_resume_failed,
            # section 7
            (State.BIND, IQ): self._on_bind_result,
            # section 8
            **{
                (State.OPEN, tag): self._on_stanza
                for tag in (IQ, MESSAGE, PRESENCE)
            },
            # XEP-0198 sections 3 and 4
            (State.OPEN, f"{{{sm.NS}}}enabled"): self._on_enabled,
            (State.OPEN, f"{{{sm.NS}}}failed"): self._on_enable_failed,
            (State.OPEN, f"{{{sm.NS}}}r"): self._on_ack_request,
            (State.OPEN, f"{{{sm.NS}}}a"): self._on_ack,
            # section 4.9: an error may come at any time
            **{(state, ERROR): self._on_stream_error for state in State},
        }  # fmt: skip
        self._parser = StreamParser()
        self._restart()

    def receive_data(self, data: bytes) -> list[Event]:
        """Take what the connection gave.

        Args:
          data: Any cut of the server's bytes; ``b""`` when it has hung up.

        Returns:
          What has happened, in order; `StreamEnded` is always the last.
        """
        if not data:
            self._end(None if self._closing else OfflineError("the server hung up"))
        for item in self._parser.feed(data):
            if self.state is State.CLOSED:
                break
            parser = self._parser
            try:
                self._receive(item)
            except SyncdError as error:
                self._abort(error)
            # A restarted stream begins with what comes next. Bytes already read behind
            # <proceed/> or <success/> were never protected by what it started, so they are
            # dropped (the injection of CVE-2011-0411).
            if self._parser is not parser or self.state is State.TLS:
                break
        events, self._events = self._events, []
        return events

    def data_to_send(self, most: int | None = None) -> bytes:
        """Take the bytes that are to be written now, in order.

        Args:
          most: Where to stop, bytes, but never inside of an element; None: take all.
        """
        return self._out.take(most)

    @property
    def queued(self) -> int:
        """How many bytes `data_to_send` would take."""
        return len(self._out)

    @property
    def closing(self) -> bool:
        """Whether our footer is queued or out."""
        return self._closing

    @property
    def is_open(self) -> bool:
        """Whether stanzas may be sent."""
        return self.state is State.OPEN and not self._closing

    def send(self, stanza: Element) -> None:
        """Queue a stanza; the stream must be open.

        Raises:
          StanzaError: It is longer than the server takes.
        """
        assert self.is_open, f"cannot send in state {self.state.name}, or behind our footer"
        data = serialise(stanza)
        self.limits.check(data)
        self._out.put(data)
        if self.sm is not None:
            if self.sm.sent(data):
                self._out.put(serialise(make(f"{{{sm.NS}}}r")))
            if self.sm.full:
                self._abort(RemoteProtocolError("the server acknowledges nothing any more"))

    def send_later(self, stanza: Element) -> None:
        """Queue a stanza for the stream that resumes this one, whose connection broke.

        Raises:
          StanzaError: It is longer than the server takes.
        """
        assert self.sm is not None, "no stream can resume this one"
        data = serialise(stanza)
        self.limits.check(data)
        self.sm.sent(data)

    def keep_alive(self) -> None:
        """Queue a space: a sign of life that nobody answers (RFC 6120 section 4.6.1)."""
        if self.is_open:
            self._out.put(b" ")

    def close(self) -> None:
        """Queue our footer; the server's footer, or its hanging up, ends the stream."""
        if self.sm is not None and self._counting and self.is_open:
            # XEP-0198 section 4: what we have handled need not come back to who sent it.
            self._out.put(serialise(self.sm.make_answer()))
        self._say_footer()

    def tls_started(self, end_point: bytes | None = None) -> None:
        """The connection is inside TLS, and the certificate is good.

        Args:
          end_point: As for the constructor.
        """
        assert self.state is State.TLS
        self._secure, self._end_point = True, end_point
        self._restart()

    def key_derived(self, key: bytes) -> None:
        """Go on with the key that `KeyWanted` asked for."""
        if self.state is State.AUTH and self._login is not None:
            response = self._login.key_derived(key)
            if response is not None:
                self._out.put(serialise(response))

    @property
    def mechanism(self) -> str:
        """The SASL mechanism that logs us in; empty before that is decided."""
        return self._login.mechanism if self._login else ""

    @property
    def sasl2(self) -> bool:
        """Whether SASL2 logs us in."""
        return self._login is not None and self._login.inline is not None

    @property
    def caveat(self) -> str:
        """What the user should know about how we log in, as a sentence; may be empty."""
        return self._login.caveat if self._login else ""

    @property
    def token(self) -> sasl.Token | None:
        """The token to be kept now, instead of the one that was given; None: drop that."""
        return self._login.token if self._login else self._credentials.token

    def _restart(self) -> None:
        # With SASL2 the parser that begins inside TLS stays the one of the open stream.
        known = self._authenticated or (self._secure and self._credentials.agent)
        limit = MAX_STANZA if known else MAX_STANZA_BEFORE_LOGIN
        self._parser = StreamParser(max_stanza=limit)
        self.state = State.HEADER
        # RFC 6120 section 4.7.1: `from` only where nobody can read along.
        sender = f" from='{self.jid.bare}'" if self._secure else ""
        self._out.put(
            f"<?xml version='1.0'?><stream:stream to='{self.jid.domain}'{sender} version='1.0'"
            f" xml:lang='en' xmlns='{NS_CLIENT}' xmlns:stream='{NS_STREAMS}'>".encode()
        )

    def _receive(self, item: Opened | Element | Closed | Malformed) -> None:
        match item:
            case Opened(attributes):
                # RFC 6120 section 4.7.5: no version means a server older than 1.0.
                if not attributes.get("version", "").startswith("1."):
                    raise RemoteProtocolError("the server speaks no XMPP 1.0")
                self.state = State.FEATURES
            case Malformed(condition, text):
                self._out.put(write_stream_error(condition))
                raise RemoteProtocolError(
                    f"the server sent no proper XMPP: {text} [{condition}]"
                )
            case Closed():
                self.close()
                self._end(None if self._authenticated else OfflineError("the server hung up"))
            case element:
                handler = self._table.get((self.state, element.tag))
                if handler is None:
                    self._unexpected(element)
                else:
                    handler(element)

    def _unexpected(self, element: Element) -> None:
        if self.state is State.OPEN and namespace(element.tag) != NS_CLIENT:
            return  # COMPAT(servers): elements of extensions that we did not enable
        self._out.put(write_stream_error("unsupported-stanza-type"))
        raise RemoteProtocolError(
            f"the server sent <{local_name(element.tag)[:40]}/> while in {self.state.name}"
        )

    def _on_features(self, features: Element) -> None:
        self.limits = read_limits(features)
        if not self._secure:
            # RFC 6120 section 5.3.1. Never a credential outside TLS, whatever is offered.
            if features.find(f"{{{NS_TLS}}}starttls") is None:
                raise RemoteProtocolError(
                    "the server offers no STARTTLS, and syncd never logs in without TLS",
                    hint='enable TLS on the server, or set account.tls = "direct" if this is '
                    "its port for direct TLS",
                )
            self._out.put(serialise(make(f"{{{NS_TLS}}}starttls")))
            self.state = State.STARTTLS
        elif not self._authenticated:
            self._authenticate(features)
        elif features.find(f"{{{NS_BIND}}}bind") is not None:
            self._can_enable = features.find(f"{{{sm.NS}}}sm") is not None
            if self._can_enable and self._former is not None:
                previous = {"h": str(self._former.handled), "previd": self._former.id}
                self._out.put(serialise(make(f"{{{sm.NS}}}resume", previous)))
                self.state = State.RESUME
            else:
                self._bind()
        else:
            raise RemoteProtocolError("the server offers no resource binding")

    def _bind(self) -> None:
        bind = make(f"{{{NS_BIND}}}bind")
        if self.jid.resource:
            bind.append(make(f"{{{NS_BIND}}}resource", text=self.jid.resource))
        self._out.put(serialise(make_iq("set", _BIND_ID, None, bind)))
        self.state = State.BIND

    def _authenticate(self, features: Element) -> None:
        self._login = Login(self.jid, self._credentials, features, self._end_point)
        self._out.put(serialise(self._login.begin(self._former)))
        self.state = State.AUTH

    def _on_proceed(self, _: Element) -> None:
        self.state = State.TLS
        self._events.append(TLSWanted())

    def _on_tls_failure(self, _: Element) -> None:
        raise RemoteProtocolError(
            "the server could not start TLS",
            hint="look at its log; is its certificate in place?",
        )

    def _on_challenge(self, element: Element) -> None:
        assert self._login is not None
        answer = self._login.challenged(element)
        if isinstance(answer, sasl.KeyWanted):
            self._events.append(KeyWanted(answer))
        else:
            self._out.put(serialise(answer))

    def _on_success(self, element: Element) -> None:
        assert self._login is not None
        success = self._login.succeeded(element)
        self._authenticated = True
        if success is None:
            self._restart()
        elif success.resumed is not None and self._former is not None:
            self._on_resumed(success.resumed)
        else:
            assert self._login.inline is not None, "only SASL2 has such a success"
            if self._login.inline.resume:
                self._forget(element.find(f"{{{sm.NS}}}failed"))
            # Without Bind 2 the features come next, and the bind by RFC 6120 with them.
            self.state = State.FEATURES
            if success.bound:
                self._bound_inside(success)

    def _bound_inside(self, success: login.Success) -> None:
        self.jid = success.jid
        self.state = State.OPEN
        self._events.append(Bound(success.jid))
        if success.enabled is not None:
            self.sm, self._counting = StreamManagement(success.jid), True
            self.sm.enabled(success.enabled)

    def _on_continue(self, _: Element) -> None:
        raise AuthenticationError(
            "the server wants more than a password to let us in",
            hint="give this account a way to log in that needs no second step",
        )

    def _on_late_features(self, features: Element) -> None:
        """With SASL2 they come behind the bind; there is nothing left to choose."""
        self.limits = read_limits(features)

    def _on_failure(self, element: Element) -> None:
        assert self._login is not None
        self._out.put(serialise(self._login.refused(element)))

    def _on_bind_result(self, iq: Element) -> None:
        if iq.get("type") == "error":
            self._on_bind_refused(read_error(iq))
            return
        text = iq.findtext(f"{{{NS_BIND}}}bind/{{{NS_BIND}}}jid")
        if iq.get("id") != _BIND_ID or iq.get("type") != "result" or text is None:
            raise RemoteProtocolError("the server did not bind a resource")
        try:
            jid = JID.parse(text)
        except ValueError as error:
            raise RemoteProtocolError(f"the server bound no JID: {error}") from error
        if not jid.resource or jid.bare != self.jid.bare:
            raise RemoteProtocolError(
                f"the server bound {jid}, not a resource of {self.jid.bare}"
            )
        self.jid = jid
        self.state = State.OPEN
        self._events.append(Bound(jid))
        if self._can_enable:
            # Our stanzas count from here on (XEP-0198 section 3), the server's from its answer.
            self.sm = StreamManagement(jid)
            self._out.put(serialise(make(f"{{{sm.NS}}}enable", {"resume": "true"})))

    def _on_bind_refused(self, error: StanzaError) -> None:
        # Section 7.7.2.2: the server keeps our resource for another client that has it. Nobody
        # can have the one that the server makes up.
        if error.condition != "conflict" or not self.jid.resource:
            text = error.text or "the server gives us no resource"
            raise StanzaError(error.type, error.condition, text)
        self.jid = self.jid.bare
        self._bind()

    def _on_stanza(self, stanza: Element) -> None:
        if self.sm is not None and self._counting:
            self.sm.received()
        self._events.append(StanzaReceived(stanza))

    def _on_enabled(self, element: Element) -> None:
        if self.sm is None or self._counting:
            raise RemoteProtocolError("the server enabled stream management out of turn")
        self._counting = True
        self.sm.enabled(element)

    def _on_enable_failed(self, _: Element) -> None:
        self.sm = None

    def _on_ack_request(self, _: Element) -> None:
        # Section 4: soon, so not behind what the server does not read; it counts up, so the
        # last answer is one to all requests before. Behind our footer nothing is said.
        if self.sm is not None and self.is_open:
            self._out.put_first(serialise(self.sm.make_answer()))

    def _on_ack(self, element: Element) -> None:
        if self.sm is not None:
            self._acknowledged(self.sm, element)

    def _acknowledged(self, managed: StreamManagement, element: Element) -> None:
        h = sm.read_h(element)
        try:
            managed.acknowledged(h)
        except RemoteProtocolError:
            # XEP-0198 section 6. Who counts otherwise now would do so after a resumption.
            managed.id = ""
            counts = {"h": str(h), "send-count": str(managed.sent_count)}
            too_high = make(f"{{{sm.NS}}}handled-count-too-high", counts)
            self._out.put(write_stream_error("undefined-condition", too_high))
            raise

    def _on_resumed(self, element: Element) -> None:
        assert self._former is not None
        self.sm, self.jid, self._counting = self._former, self._former.jid, True
        self._acknowledged(self.sm, element)
        self.state = State.OPEN
        for data in self.sm.unacked:
            self._out.put(data)
        self._out.put(serialise(make(f"{{{sm.NS}}}r")))
        self._events.append(Resumed())

    def _on_resume_failed(self, element: Element) -> None:
        # XEP-0198 section 5: binding on the same stream is what to do now.
        self._forget(element)
        self._bind()

    def _forget(self, failed: Element | None) -> None:
        if self._former is not None:
            self._former.forgotten(failed)
            self._former = None

    def _on_stream_error(self, element: Element) -> None:
        raise read_stream_error(element)

    def _say_footer(self) -> None:
        if self.state is not State.CLOSED and not self._closing:
            self._closing = True
            self._out.put(b"</stream:stream>")

    def _abort(self, error: SyncdError) -> None:
        self._say_footer()
        self._end(error)

    def _end(self, error: SyncdError | None) -> None:
        if self.state is not State.CLOSED:
            self.state = State.CLOSED
            self._events.append(StreamEnded(error))
