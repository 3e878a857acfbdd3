"""One login: which mechanism, what to say, and whether the server has proven itself. Sans-IO.

It speaks SASL as RFC 6120 section 6 has it, or SASL2 (XEP-0388) where the server offers that.
With SASL2 the login carries what shall come behind it (Bind 2, XEP-0386, and resumption), so
the stream is bound or resumed with the server's success: two round trips less at every
reconnection. Where the server has given us a token (FAST, XEP-0484), that logs us in instead of
the password, in one round trip; if the server does not take it, the password follows on the
same stream. Nothing is sent before TLS is complete (no 0-RTT), so tokens need no counter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from syncd.errors import AuthenticationError, OfflineError, RemoteProtocolError
from syncd.xmpp import sasl, sm
from syncd.xmpp.jid import JID
from syncd.xmpp.xml import local_name, make, namespace

if TYPE_CHECKING:
    from collections.abc import Iterable
    from xml.etree.ElementTree import Element


NS_SASL = "urn:ietf:params:xml:ns:xmpp-sasl"
NS_SASL_CB = "urn:xmpp:sasl-cb:0"

# RFC 4422 section 3.1 has 20; the longest in use has 18, of a binding 20.
MAX_MECHANISM = 64  # characters
NS_SASL2 = "urn:xmpp:sasl:2"
NS_BIND2 = "urn:xmpp:bind:0"
NS_FAST = "urn:xmpp:fast:0"

AUTHENTICATE = f"{{{NS_SASL2}}}authenticate"
CHALLENGE = f"{{{NS_SASL2}}}challenge"
RESPONSE = f"{{{NS_SASL2}}}response"
SUCCESS = f"{{{NS_SASL2}}}success"
FAILURE = f"{{{NS_SASL2}}}failure"
CONTINUE = f"{{{NS_SASL2}}}continue"

# Prosody's tokens have some 80 characters, ejabberd's fewer.
MAX_TOKEN = 4_096  # characters

_CHECK = "check account.jid and the password"
# Most servers do not say that the binding is what they miss: to do so is optional in RFC 5802.
_CHECK_BOTH = (
    f"{_CHECK}; if both are right, something between here and the server ends the TLS "
    "connection and starts another (a company's or a virus scanner's proxy, or one in front of "
    "the server): the server then has another certificate than the one seen here, which the "
    "proof of the password covers"
)

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
      tokens: Mechanisms for tokens (FAST).
    """

    mechanisms: frozenset[str]
    bind: bool
    enable: bool
    resume: bool
    tokens: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Success:
    """How the login ended.

    Attributes:
      data: The mechanism's last words.
      jid: Ours; full if bound.
      bound: A resource was bound.
      enabled: The server's ``<enabled/>`` for stream management.
      resumed: The server's ``<resumed/>``.
      token: A new one, to be used from now on.
    """

    data: bytes
    jid: JID
    bound: bool
    enabled: Element | None
    resumed: Element | None
    token: sasl.Token | None


def read_inline(features: Element) -> Inline | None:
    """Read what the server offers; None if it knows no SASL2."""
    authentication = features.find(f"{{{NS_SASL2}}}authentication")
    if authentication is None:
        return None
    bind = authentication.find(f"{{{NS_SASL2}}}inline/{{{NS_BIND2}}}bind")
    inner = [] if bind is None else bind.iterfind(f"{{{NS_BIND2}}}inline/{{{NS_BIND2}}}feature")
    return Inline(
        mechanisms=_names(authentication.iterfind(f"{{{NS_SASL2}}}mechanism")),
        bind=bind is not None,
        enable=any(element.get("var") == sm.NS for element in inner),
        resume=authentication.find(f"{{{NS_SASL2}}}inline/{{{sm.NS}}}sm") is not None,
        tokens=_names(
            authentication.iterfind(
                f"{{{NS_SASL2}}}inline/{{{NS_FAST}}}fast/{{{NS_FAST}}}mechanism"
            )
        ),
    )


def _names(elements: Iterable[Element]) -> frozenset[str]:
    return frozenset((element.text or "").strip()[:MAX_MECHANISM] for element in elements)


def make_authenticate(
    mechanism: str,
    initial: bytes,
    *,
    agent: str,
    bind: bool,
    enable: bool,
    resume: sm.StreamManagement | None,
    fast: Element | None = None,
) -> Element:
    """Build the login.

    Args:
      mechanism: As the server calls it.
      initial: The mechanism's first words.
      agent: A UUID that stays ours (section 2.3).
      bind: Ask for a resource of the server's choice.
      enable: Ask for stream management with it.
      resume: Ask to go on with this session; if that fails, the bind counts.
      fast: What is said about tokens (XEP-0484).
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
    if fast is not None:
        element.append(fast)
    return element


def read_success(element: Element, account: JID, mechanism: str = "") -> Success:
    """Read the server's ``<success/>``.

    Args:
      element: As it came.
      account: Ours.
      mechanism: Of a token, if one may come with it.

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
        token=read_token(element, account, mechanism) if mechanism else None,
    )


def read_token(success: Element, account: JID, mechanism: str) -> sasl.Token | None:
    """Read the token that came with a success (XEP-0484 section 3.3).

    Returns:
      None if there is none, or none that could ever be used: that costs us time, and no more.
    """
    element = success.find(f"{{{NS_FAST}}}token")
    if element is None:
        return None
    secret = element.get("token", "")
    try:
        expires = datetime.fromisoformat(element.get("expiry", ""))
    except ValueError:
        return None
    if not 0 < len(secret) <= MAX_TOKEN or expires.tzinfo is None:
        return None
    return sasl.Token(
        account=str(account.bare), mechanism=mechanism, secret=secret, expires=expires
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
      sasl2: This server has let us use SASL2 before; nothing else is used now.
      keeps_token: A token can be kept, so one is asked for.
      token: The one that is kept, and has not expired.
    """

    password: str
    nonce: str
    allow_plain: bool = False
    least: str = ""
    agent: str = ""
    sasl2: bool = False
    keeps_token: bool = False
    token: sasl.Token | None = None

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
      token: The one to be kept now; None if there is none, or the server takes it no more.
      caveat: What the user should know about the login, as a sentence; may be empty.

    Raises:
      AuthenticationError: There is no mechanism that may be used.
    """

    def __init__(
        self, jid: JID, credentials: Credentials, features: Element, end_point: bytes | None
    ) -> None:
        self._jid = jid
        self._credentials = credentials
        self._end_point = end_point
        self._offered = read_offered(features)
        self._former: sm.StreamManagement | None = None
        self.token = credentials.token
        self.inline = read_inline(features) if credentials.agent else None
        if self.inline is not None:
            self._offered = replace(self._offered, mechanisms=self.inline.mechanisms)
        elif credentials.agent and credentials.sasl2:
            raise AuthenticationError(
                "the server let us log in by SASL2 (XEP-0388) before, and now offers only the "
                "old way: somebody between may have removed it",
                hint="if the server's administrator changed that on purpose, delete the file "
                "login in the state directory",
            )
        # Whatever the token is for: nothing is sent to a server whose offer smells.
        self._choice = self._choose()
        self.caveat = self._choice.caveat
        self._token_mechanism = self._choose_for_token()
        self._proven = False
        self._proof: sasl.Scram | sasl.HashedToken | None = None
        if self.token is not None and self.token.mechanism == self._token_mechanism:
            self._use_token(self.token)
        else:
            self._use_password()

    def begin(self, former: sm.StreamManagement | None) -> Element:
        """The first words.

        Args:
          former: A session to go on with, if the server takes that inside the login.
        """
        self._former = former
        if self.inline is None:
            attributes = {"mechanism": self.mechanism}
            return make(f"{{{NS_SASL}}}auth", attributes, text=sasl.encode(self._initial))
        return make_authenticate(
            self.mechanism,
            self._initial,
            agent=self._credentials.agent,
            # A session that can only be resumed behind the login must not be replaced in it.
            bind=self.inline.bind and (former is None or self.inline.resume),
            enable=self.inline.enable,
            resume=former if self.inline.resume else None,
            fast=self._about_tokens(),
        )

    def challenged(self, element: Element) -> Element | sasl.KeyWanted:
        """Take a challenge.

        Returns:
          What to answer, or the key that the answer needs.

        Raises:
          AuthenticationError: The server is no good.
          RemoteProtocolError: It has no right to a challenge now.
        """
        if not isinstance(self._proof, sasl.Scram) or self._proven:
            raise RemoteProtocolError("the server sent a SASL challenge out of turn")
        if not self._proof.keyed:
            return self._proof.challenged(sasl.decode(element.text))
        # COMPAT(RFC 4422 section 3.7): the last data may come as a challenge before an
        # empty success.
        self._proof.finished(sasl.decode(element.text))
        self._proven = True
        return self._response(b"")

    def key_derived(self, key: bytes) -> Element | None:
        """The answer to the challenge that wanted this key; None if none did."""
        if not isinstance(self._proof, sasl.Scram) or self._proof.keyed:
            return None
        return self._response(self._proof.final(key))

    def refused(self, failure: Element) -> Element:
        """Take the server's refusal.

        Returns:
          The first words of the login by password, where only the token was refused: it may
          have expired, or been revoked, and says nothing about the password.

        Raises:
          AuthenticationError, OfflineError: What the refusal means.
        """
        error = read_failure(failure, self._jid, bound=self.mechanism.endswith("-PLUS"))
        if not isinstance(self._proof, sasl.HashedToken) or isinstance(error, OfflineError):
            raise error
        self.token = None
        if not _has_expired(failure):
            # If tokens never work here, the next login is not to stumble over another one.
            self._token_mechanism = ""
        self._use_password()
        return self.begin(self._former)

    def succeeded(self, element: Element) -> Success | None:
        """Take the server's success.

        Returns:
          What came with it; None without SASL2.

        Raises:
          AuthenticationError: The server has not proven that it knows the password, or the
            token.
          RemoteProtocolError: It answers another protocol than we speak.
        """
        if (namespace(element.tag) == NS_SASL2) != (self.inline is not None):
            raise RemoteProtocolError("the server let us in by another protocol than we used")
        success = None
        if self.inline is not None:
            # Without our asking, it renews the one that we used (XEP-0484 section 3.5).
            success = read_success(element, self._jid, self._token_mechanism)
        if not self._proven:
            assert self._proof is not None  # with PLAIN nothing is left to be proven
            data = sasl.decode(element.text) if success is None else success.data
            self._proof.finished(data)
        if success is not None and success.token is not None:
            self.token = success.token
        return success

    def _choose(self) -> sasl.Choice:
        bindings = self._offered.bindings
        plus = any(name.endswith("-PLUS") for name in self._offered.mechanisms)
        if self.inline is not None and plus and bindings is None:
            raise AuthenticationError(
                "the server offers channel binding but not for which channel: somebody "
                "between may have removed that (XEP-0440)",
                hint="look at the server's SASL configuration",
            )
        return sasl.choose(
            self._offered,
            end_point=self._end_point is not None,
            allow_plain=self._credentials.allow_plain,
            least=self._credentials.least,
        )

    def _choose_for_token(self) -> str:
        if self.inline is None or not self._credentials.keeps_token:
            return ""
        strongest = (self._choice.mechanism, self._credentials.least)
        return sasl.choose_for_token(
            self.inline.tokens,
            end_point=self._end_point is not None,
            must_bind=any(name.endswith("-PLUS") for name in strongest),
        )

    def _use_token(self, token: sasl.Token) -> None:
        binding = self._end_point if sasl.TOKEN_MECHANISMS[token.mechanism] else None
        self.mechanism = token.mechanism
        self._proof = sasl.HashedToken(token, self._jid.local, binding or b"")
        self._initial = self._proof.first()

    def _use_password(self) -> None:
        mechanism, flag = self._choice.mechanism, self._choice.gs2_flag
        self.mechanism = mechanism
        if mechanism == "PLAIN":
            self._proven = True  # PLAIN has no such proof; TLS must do
            self._proof = None
            self._initial = sasl.plain(self._jid.local, self._credentials.password)
            return
        binding = self._end_point if flag.startswith("p=") else None
        nonce = self._credentials.nonce
        self._proof = sasl.Scram(
            mechanism, self._jid.local, nonce, flag, binding or b"", self._offered
        )
        self._initial = self._proof.first()

    def _about_tokens(self) -> Element | None:
        if isinstance(self._proof, sasl.HashedToken):
            return make(f"{{{NS_FAST}}}fast")
        if self._token_mechanism:
            attributes = {"mechanism": self._token_mechanism}
            return make(f"{{{NS_FAST}}}request-token", attributes)
        return None

    def _response(self, data: bytes) -> Element:
        tag = f"{{{NS_SASL}}}response" if self.inline is None else RESPONSE
        return make(tag, text=sasl.encode(data))


def _has_expired(failure: Element) -> bool:
    return failure.find(f"{{{NS_SASL}}}credentials-expired") is not None


def read_failure(
    element: Element, jid: JID, *, bound: bool = False
) -> AuthenticationError | OfflineError:
    """Say what a refused login means (RFC 6120 section 6.5).

    Args:
      element: The server's ``<failure/>``.
      jid: Whose login it was.
      bound: The proof covered the certificate that we see, so that may be what is wrong.
    """
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
        hint=_CHECK_BOTH if bound else _CHECK,
    )


def read_offered(features: Element) -> sasl.Offered:
    """Read what can be used to log in (RFC 6120 section 6.3.3, XEP-0440)."""
    mechanisms = _names(features.iterfind(f"{{{NS_SASL}}}mechanisms/{{{NS_SASL}}}mechanism"))
    listed = features.find(f"{{{NS_SASL_CB}}}sasl-channel-binding")
    if listed is None:
        return sasl.Offered(mechanisms=mechanisms)
    bindings = frozenset(
        element.get("type", "")[:MAX_MECHANISM]
        for element in listed.iterfind(f"{{{NS_SASL_CB}}}channel-binding")
    )
    return sasl.Offered(mechanisms=mechanisms, bindings=bindings)
