"""One login: which mechanism, what to say, and whether the server has proven itself. Sans-IO.

It speaks SASL as RFC 6120 section 6 has it, or SASL2 (XEP-0388) where the server offers that.
With SASL2 the login carries what shall come behind it (Bind 2, XEP-0386, and resumption), so
the stream is bound or resumed with the server's success: two round trips less at every
reconnection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from syncd.errors import AuthenticationError, OfflineError, RemoteProtocolError
from syncd.xmpp import sasl, sm
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import local_name, make, namespace

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


NS_SASL = "urn:ietf:params:xml:ns:xmpp-sasl"
NS_SASL_CB = "urn:xmpp:sasl-cb:0"

# RFC 4422 section 3.1 has 20; the longest in use has 18, of a binding 20.
MAX_MECHANISM = 64  # characters
NS_SASL2 = "urn:xmpp:sasl:2"
NS_BIND2 = "urn:xmpp:bind:0"

AUTHENTICATE = f"{{{NS_SASL2}}}authenticate"
CHALLENGE = f"{{{NS_SASL2}}}challenge"
RESPONSE = f"{{{NS_SASL2}}}response"
SUCCESS = f"{{{NS_SASL2}}}success"
FAILURE = f"{{{NS_SASL2}}}failure"
CONTINUE = f"{{{NS_SASL2}}}continue"

# What others may see of us in the resource (XEP-0386 section 3.2.1); no host name.
TAG = "syncd"
SOFTWARE = "syncd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inline:
    """What the server takes inside the login.

    Attributes:
      mechanisms: Of SASL, for this way to log in.
      bind: Bind 2.
      enable: Stream management, with Bind 2.
      resume: Resumption of a session.
    """

    mechanisms: frozenset[str]
    bind: bool
    enable: bool
    resume: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Success:
    """How the login ended.

    Attributes:
      data: The mechanism's last words.
      jid: Ours; full if bound.
      bound: A resource was bound.
      enabled: The server's ``<enabled/>`` for stream management.
      resumed: The server's ``<resumed/>``.
    """

    data: bytes
    jid: JID
    bound: bool
    enabled: Element | None
    resumed: Element | None


def read_inline(features: Element) -> Inline | None:
    """Read what the server offers; None if it knows no SASL2."""
    authentication = features.find(f"{{{NS_SASL2}}}authentication")
    if authentication is None:
        return None
    bind = authentication.find(f"{{{NS_SASL2}}}inline/{{{NS_BIND2}}}bind")
    inner = [] if bind is None else bind.iterfind(f"{{{NS_BIND2}}}inline/{{{NS_BIND2}}}feature")
    return Inline(
        mechanisms=frozenset(
            (element.text or "").strip()
            for element in authentication.iterfind(f"{{{NS_SASL2}}}mechanism")
        ),
        bind=bind is not None,
        enable=any(element.get("var") == sm.NS for element in inner),
        resume=authentication.find(f"{{{NS_SASL2}}}inline/{{{sm.NS}}}sm") is not None,
    )


def make_authenticate(
    mechanism: str,
    initial: bytes,
    *,
    agent: str,
    bind: bool,
    enable: bool,
    resume: sm.StreamManagement | None,
) -> Element:
    """Build the login.

    Args:
      mechanism: As the server calls it.
      initial: The mechanism's first words.
      agent: A UUID that stays ours (section 2.3).
      bind: Ask for a resource of the server's choice.
      enable: Ask for stream management with it.
      resume: Ask to go on with this session; if that fails, the bind counts.
    """
    element = make(
        AUTHENTICATE,
        {"mechanism": mechanism},
        make(f"{{{NS_SASL2}}}initial-response", text=sasl.encode(initial)),
        make(
            f"{{{NS_SASL2}}}user-agent",
            {"id": agent},
            make(f"{{{NS_SASL2}}}software", text=SOFTWARE),
        ),
    )
    if resume is not None:
        attributes = {"h": str(resume.handled), "previd": resume.id}
        element.append(make(f"{{{sm.NS}}}resume", attributes))
    if bind:
        wanted = make(f"{{{NS_BIND2}}}bind", None, make(f"{{{NS_BIND2}}}tag", text=TAG))
        if enable:
            wanted.append(make(f"{{{sm.NS}}}enable", {"resume": "true"}))
        element.append(wanted)
    return element


def read_success(element: Element, account: JID) -> Success:
    """Read the server's ``<success/>``.

    Raises:
      RemoteProtocolError: It names no JID of the account.
    """
    text = (element.findtext(f"{{{NS_SASL2}}}authorization-identifier") or "").strip()
    try:
        jid = JID.parse(text)
    except ValueError as error:
        raise RemoteProtocolError(f"the server let in nobody that we know: {error}") from error
    bound = element.find(f"{{{NS_BIND2}}}bound")
    if jid.bare != account.bare or (bound is not None and not jid.resource):
        raise RemoteProtocolError(f"the server let in {jid}, not {account.bare}")
    return Success(
        data=sasl.decode(element.findtext(f"{{{NS_SASL2}}}additional-data")),
        jid=jid,
        bound=bound is not None,
        enabled=bound.find(f"{{{sm.NS}}}enabled") if bound is not None else None,
        resumed=element.find(f"{{{sm.NS}}}resumed"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """With what to log in, and by what not.

    Attributes:
      password: Used for PLAIN only; SCRAM's key is derived by the driver.
      nonce: For SCRAM: at least 128 random bits as printable ASCII without a comma.
      allow_plain: SASL PLAIN may be used (and only inside TLS).
      least: The strongest mechanism that this server has let us use before; nothing weaker is
        used now.
      agent: A UUID that stays ours: log in by SASL2 where that is offered, and let the server
        choose the resource; empty: log in as RFC 6120 has it.
    """

    password: str
    nonce: str
    allow_plain: bool = False
    least: str = ""
    agent: str = ""

    def __repr__(self) -> str:
        return "<Credentials>"  # never a secret in a traceback


class Login:
    """One login, from the server's features to its success.

    Args:
      jid: Whose.
      credentials: With what.
      features: The server's.
      end_point: Hash of the server's certificate (RFC 5929 section 4), for channel binding.

    Attributes:
      mechanism: The one that is used.
      inline: What goes inside the login; None without SASL2.

    Raises:
      AuthenticationError: There is no mechanism that may be used.
    """

    def __init__(
        self, jid: JID, credentials: Credentials, features: Element, end_point: bytes | None
    ) -> None:
        offered = read_offered(features)
        self.inline = read_inline(features) if credentials.agent else None
        if self.inline is not None:
            offered = replace(offered, mechanisms=self.inline.mechanisms)
        choice = sasl.choose(
            offered,
            end_point=end_point is not None,
            allow_plain=credentials.allow_plain,
            least=credentials.least,
        )
        self.mechanism = choice.mechanism
        self._jid = jid
        self._agent = credentials.agent
        self._scram: sasl.Scram | None = None
        if choice.mechanism == "PLAIN":
            self._proven = True  # PLAIN has no such proof; TLS must do
            self._initial = sasl.plain(jid.local, credentials.password)
        else:
            self._proven = False
            binding = end_point if choice.gs2_flag.startswith("p=") else None
            self._scram = sasl.Scram(
                choice.mechanism,
                jid.local,
                credentials.nonce,
                choice.gs2_flag,
                binding or b"",
                offered,
            )
            self._initial = self._scram.first()

    def begin(self, former: sm.StreamManagement | None) -> Element:
        """The first words.

        Args:
          former: A session to go on with, if the server takes that inside the login.
        """
        if self.inline is None:
            attributes = {"mechanism": self.mechanism}
            return make(f"{{{NS_SASL}}}auth", attributes, text=sasl.encode(self._initial))
        return make_authenticate(
            self.mechanism,
            self._initial,
            agent=self._agent,
            bind=self.inline.bind,
            enable=self.inline.enable,
            resume=former if self.inline.resume else None,
        )

    def challenged(self, element: Element) -> Element | sasl.KeyWanted:
        """Take a challenge.

        Returns:
          What to answer, or the key that the answer needs.

        Raises:
          AuthenticationError: The server is no good.
          RemoteProtocolError: It has no right to a challenge now.
        """
        if self._scram is None or self._proven:
            raise RemoteProtocolError("the server sent a SASL challenge out of turn")
        if not self._scram.keyed:
            return self._scram.challenged(sasl.decode(element.text))
        # COMPAT(RFC 4422 section 3.7): the last data may come as a challenge before an
        # empty success.
        self._scram.finished(sasl.decode(element.text))
        self._proven = True
        return self._response(b"")

    def key_derived(self, key: bytes) -> Element | None:
        """The answer to the challenge that wanted this key; None if none did."""
        if self._scram is None or self._scram.keyed:
            return None
        return self._response(self._scram.final(key))

    def succeeded(self, element: Element) -> Success | None:
        """Take the server's success.

        Returns:
          What came with it; None without SASL2.

        Raises:
          AuthenticationError: The server has not proven that it knows the password.
          RemoteProtocolError: It answers another protocol than we speak.
        """
        if (namespace(element.tag) == NS_SASL2) != (self.inline is not None):
            raise RemoteProtocolError("the server let us in by another protocol than we used")
        success = None if self.inline is None else read_success(element, self._jid)
        if not self._proven:
            assert self._scram is not None  # with PLAIN nothing is left to be proven
            data = sasl.decode(element.text) if success is None else success.data
            self._scram.finished(data)
        return success

    def _response(self, data: bytes) -> Element:
        tag = f"{{{NS_SASL}}}response" if self.inline is None else RESPONSE
        return make(tag, text=sasl.encode(data))


def read_failure(element: Element, jid: JID) -> AuthenticationError | OfflineError:
    """Say what a refused login means (RFC 6120 section 6.5)."""
    names = [local_name(child.tag) for child in element if namespace(child.tag) == NS_SASL]
    conditions = [name for name in names if name != "text"]
    condition = conditions[0][:40] if conditions else "not-authorized"
    texts = [child.text or "" for child in element if local_name(child.tag) == "text"]
    text = "".join(texts[:1]).strip()[:200]
    if condition == "temporary-auth-failure":
        return OfflineError(f"the server cannot log us in just now: {text} [{condition}]")
    return AuthenticationError(
        f"the server refused the login of {jid.bare} [{condition}]"
        + (f": {text}" if text else ""),
        hint="check account.jid and the password",
    )


def read_offered(features: Element) -> sasl.Offered:
    """Read what can be used to log in (RFC 6120 section 6.3.3, XEP-0440)."""
    mechanisms = frozenset(
        (element.text or "").strip()[:MAX_MECHANISM]
        for element in features.iterfind(f"{{{NS_SASL}}}mechanisms/{{{NS_SASL}}}mechanism")
    )
    listed = features.find(f"{{{NS_SASL_CB}}}sasl-channel-binding")
    if listed is None:
        return sasl.Offered(mechanisms=mechanisms)
    bindings = frozenset(
        element.get("type", "")[:MAX_MECHANISM]
        for element in listed.iterfind(f"{{{NS_SASL_CB}}}channel-binding")
    )
    return sasl.Offered(mechanisms=mechanisms, bindings=bindings)
