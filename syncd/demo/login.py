"""The login, the server's side. Sans-IO.

SCRAM (RFC 5802, RFC 7677) with and without channel binding, PLAIN (RFC 4616), the tokens of
XEP-0484, and what a client asks for inside SASL2 (XEP-0388).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from syncd.errors import AuthenticationError
from syncd.xmpp import sasl, sm
from syncd.xmpp.jid import JID
from syncd.xmpp.login import (
    MAX_MECHANISM,
    NS_BIND2,
    NS_FAST,
    NS_SASL,
    NS_SASL2,
    NS_SASL_CB,
    SUCCESS,
)
from syncd.xmpp.xml import make, namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from xml.etree.ElementTree import Element

DEFAULT_MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-1")

# RFC 7677 section 4: the least. A demo's password needs no more, and starts faster so.
ITERATIONS = 4_096
_SALT = 16  # bytes
# A client-first-message is a name of at most 1023 bytes and a nonce.
_MAX_MESSAGE = 4_096  # bytes
# XEP-0388 names no limits; these are seen in the resource.
_MAX_TAG = 64  # characters

# Prosody's mod_sasl2_fast: three weeks, and a new one when a day has gone by.
TOKEN_LIFETIME = timedelta(days=21)
ROTATE_AFTER = timedelta(days=1)
# What one account may make the server remember.
MAX_AGENTS = 64  # installations of clients
_SECRET = 32  # bytes
# As much of a hash as makes two clients of one account differ.
_RESOURCE = 16  # characters


class LoginRefusedError(AuthenticationError):
    """The client is not logged in; it may try again.

    Args:
      condition: The defined condition (RFC 6120 section 6.5).
    """

    def __init__(self, condition: str) -> None:
        super().__init__(f"the login is refused [{condition}]")
        self.condition = condition


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What the server can beside RFC 6120; all of it may be left out.

    Attributes:
      bindings: Channel bindings that it lists (XEP-0440); with any, each SCRAM is offered with
        -PLUS as well. Only tls-server-end-point can be listed.
      protected: SCRAM covers the list of mechanisms (XEP-0474).
      sasl2: SASL2 (XEP-0388).
      bind2: Bind 2 (XEP-0386) inside it.
      tokens: Mechanisms for tokens (XEP-0484) inside it.
      managed: Stream management with resumption (XEP-0198), also inside SASL2 and Bind 2.
    """

    bindings: tuple[str, ...] = ()
    protected: bool = False
    sasl2: bool = False
    bind2: bool = False
    tokens: tuple[str, ...] = ()
    managed: bool = False


NOTHING_MORE = Abilities()
# By the book of today: what a new client may expect of a new server.
EVERYTHING = Abilities(
    bindings=(sasl.END_POINT,),
    protected=True,
    sasl2=True,
    bind2=True,
    tokens=tuple(sasl.TOKEN_MECHANISMS),
    managed=True,
)


@dataclass(frozen=True, slots=True)
class Verifier:
    """What is kept of a password: it proves one, and cannot log in (RFC 5802 section 3)."""

    salt: bytes
    iterations: int
    stored_key: bytes
    server_key: bytes


@dataclass(frozen=True, slots=True)
class Step:
    """The server's next message.

    Attributes:
      kind: The SASL element that carries it.
      data: What it carries.
    """

    kind: Literal["challenge", "success"]
    data: bytes


def make_verifier(hash_name: str, password: str, salt: bytes) -> Verifier:
    """Derive what the server keeps of a password."""
    salted = sasl.KeyWanted(hash_name, salt, ITERATIONS).derive(password)
    client_key = hmac.digest(salted, b"Client Key", hash_name)
    stored_key = hashlib.new(hash_name, client_key).digest()
    return Verifier(salt, ITERATIONS, stored_key, hmac.digest(salted, b"Server Key", hash_name))


class Accounts:
    """Who may log in, and how.

    Args:
      domain: The server's.
      passwords: By localpart; not kept.
      mechanisms: Names out of `sasl.MECHANISMS`, or PLAIN, in the order of the offer.
      token: Gives that many random bytes.
      refusal: Gives the condition with which every login is refused, or an empty string.
      abilities: What else the server can.
      end_point: Hash of its certificate (RFC 5929 section 4).
      now: The time, aware; tokens expire by it.

    Attributes:
      tokens: Those that are given out.
    """

    def __init__(
        self,
        domain: str,
        passwords: Mapping[str, str],
        *,
        token: Callable[[int], bytes],
        mechanisms: tuple[str, ...] = DEFAULT_MECHANISMS,
        refusal: Callable[[], str] = str,
        abilities: Abilities = NOTHING_MORE,
        end_point: bytes = b"",
        now: Callable[[], datetime] = lambda: datetime.fromtimestamp(0, UTC),
    ) -> None:
        self.domain = domain
        self.refusal = refusal
        self.abilities = abilities
        self.end_point = end_point
        self.tokens = Tokens(token, now)
        self._token = token
        self._secret = token(_SECRET)
        jids = [JID.parse(f"{name}@{domain}") for name in passwords]
        self.names = frozenset(jid.local for jid in jids)
        # PLAIN is checked against the strongest.
        self._hashes = {m: sasl.MECHANISMS.get(m, "sha256") for m in mechanisms}
        plus = [f"{m}-PLUS" for m in mechanisms if m in sasl.MECHANISMS]
        self.mechanisms = (*(plus if abilities.bindings else ()), *mechanisms)
        # An unknown name gets as far as a known one with a wrong password.
        decoy = base64.b64encode(token(_SALT)).decode()
        self._verifiers = {
            (name, hash_name): make_verifier(hash_name, password, token(_SALT))
            for name, password in (
                *zip((jid.local for jid in jids), passwords.values(), strict=True),
                ("", decoy),
            )
            for hash_name in set(self._hashes.values())
        }

    @property
    def protection(self) -> str:
        """What SCRAM covers of the offer (XEP-0474 section 5.1), with SASL2 and without."""
        bindings = self.abilities.bindings
        return sasl.Offered(
            mechanisms=frozenset(self.mechanisms),
            bindings=frozenset(bindings) if bindings else None,
        ).protected

    def resource(self, account: JID, request: Request) -> str:
        """Choose the resource of an installation of a client (XEP-0386 section 3.2.1).

        Always the same, and no hint at which installation it is.
        """
        secret = request.agent.encode() if request.agent else self._token(_SECRET)
        hashed = hmac.digest(self._secret, secret + str(account).encode(), "sha256")
        return f"{request.tag or 'client'}/{hashed.hex()[:_RESOURCE]}"

    def verifier(self, name: str, mechanism: str) -> Verifier:
        """What is kept for this account, or a decoy that no password fits."""
        hash_name = self._hashes[mechanism.removesuffix("-PLUS")]
        known = name if name in self.names else ""
        return self._verifiers[known, hash_name]

    def prepare(self, name: str, authzid: str) -> str:
        """The localpart that is meant.

        Raises:
          LoginRefusedError: It is none, or somebody else's name is asked for.
        """
        try:
            jid = JID.parse(f"{name}@{self.domain}")
        except ValueError as error:
            raise LoginRefusedError("not-authorized") from error
        if authzid and authzid != str(jid):
            raise LoginRefusedError("invalid-authzid")
        return jid.local


@dataclass(slots=True)
class _Issued:
    """One token, as the server keeps it."""

    mechanism: str
    secret: str
    issued: datetime
    expires: datetime


@dataclass(slots=True)
class _Slots:
    """The tokens of one installation of a client (XEP-0484 section 5.1)."""

    current: _Issued | None = None
    new: _Issued | None = None


class Tokens:
    """The tokens that are given out, two at most to each installation of a client.

    Args:
      token: Gives that many random bytes.
      now: The time, aware.
    """

    def __init__(self, token: Callable[[int], bytes], now: Callable[[], datetime]) -> None:
        self._token = token
        self._now = now
        self._slots: dict[str, dict[str, _Slots]] = {}

    def issue(self, name: str, agent: str, mechanism: str) -> dict[str, str]:
        """Make a token; the one in use stays good until this one is used.

        Returns:
          The attributes of the element that carries it.
        """
        agents = self._slots.setdefault(name, {})
        slots = agents.pop(agent, _Slots())
        if len(agents) >= MAX_AGENTS:
            del agents[next(iter(agents))]  # whoever has asked longest ago
        agents[agent] = slots
        now = self._now()
        secret = base64.urlsafe_b64encode(self._token(_SECRET)).decode()
        slots.new = _Issued(mechanism, secret, now, now + TOKEN_LIFETIME)
        expiry = slots.new.expires.isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"token": secret, "expiry": expiry}

    def check(
        self, name: str, agent: str, mechanism: str, proof: bytes, binding: bytes
    ) -> tuple[bytes, bool]:
        """Check the proof of a token.

        Returns:
          The server's own proof, and whether it is time for another token.

        Raises:
          LoginRefusedError: It is none of this client's, or has expired.
        """
        slots = self._slots.get(name, {}).get(agent, _Slots())
        for kept in (slots.new, slots.current):
            if kept is None or not hmac.compare_digest(
                proof, hmac.digest(kept.secret.encode(), b"Initiator" + binding, "sha256")
            ):
                continue
            if kept.mechanism != mechanism:
                raise LoginRefusedError("not-authorized")
            if kept.expires <= self._now():
                raise LoginRefusedError("credentials-expired")
            slots.new, slots.current = (None if kept is slots.new else slots.new), kept
            answer = hmac.digest(kept.secret.encode(), b"Responder" + binding, "sha256")
            return answer, self._now() - kept.issued > ROTATE_AFTER
        raise LoginRefusedError("not-authorized")

    def answer(self, name: str, request: Request, *, rotate: bool) -> list[Element]:
        """Do what a client that has logged in asked for.

        Args:
          name: Whose localpart.
          request: What was asked for.
          rotate: The token that was used is to be replaced.

        Returns:
          What goes into the success.
        """
        if request.invalidate:
            self._slots.get(name, {}).pop(request.agent, None)
            rotate = False
        mechanism = request.token or (request.mechanism if rotate else "")
        if not mechanism:
            return []
        return [make(f"{{{NS_FAST}}}token", self.issue(name, request.agent, mechanism))]


def make_offer(accounts: Accounts, hidden: frozenset[str]) -> list[Element]:
    """List the ways to log in, as stream features.

    Args:
      accounts: Who may, and how.
      hidden: Mechanisms, bindings and namespaces that are left out.
    """
    able = accounts.abilities

    def names(ns: str, listed: tuple[str, ...]) -> list[Element]:
        return [make(f"{{{ns}}}mechanism", text=name) for name in listed if name not in hidden]

    features = [make(f"{{{NS_SASL}}}mechanisms", None, *names(NS_SASL, accounts.mechanisms))]
    if bindings := [name for name in able.bindings if name not in hidden]:
        listed = (make(f"{{{NS_SASL_CB}}}channel-binding", {"type": b}) for b in bindings)
        features.append(make(f"{{{NS_SASL_CB}}}sasl-channel-binding", None, *listed))
    if not able.sasl2:
        return features
    inline = []
    if able.bind2:
        managed = [make(f"{{{NS_BIND2}}}feature", {"var": sm.NS})] if able.managed else []
        inner = [make(f"{{{NS_BIND2}}}inline", None, *managed)] if managed else []
        inline.append(make(f"{{{NS_BIND2}}}bind", None, *inner))
    if able.managed:
        inline.append(make(f"{{{sm.NS}}}sm"))
    if able.tokens:
        inline.append(make(f"{{{NS_FAST}}}fast", None, *names(NS_FAST, able.tokens)))
    seen = [feature for feature in inline if namespace(feature.tag) not in hidden]
    inside = [make(f"{{{NS_SASL2}}}inline", None, *seen)] if seen else []
    ways = (*names(NS_SASL2, accounts.mechanisms), *inside)
    return [*features, make(f"{{{NS_SASL2}}}authentication", None, *ways)]


def make_success(data: bytes, jid: JID, results: list[Element]) -> Element:
    """Build the success of SASL2 (XEP-0388 section 2.6.1).

    Args:
      data: The mechanism's last words.
      jid: The client's; full if a resource was bound.
      results: Of what it asked for inside.
    """
    success = make(SUCCESS)
    if data:
        text = sasl.encode(data)
        success.append(make(f"{{{NS_SASL2}}}additional-data", text=text))
    success.append(make(f"{{{NS_SASL2}}}authorization-identifier", text=str(jid)))
    success.extend(results)
    return success


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asks for inside SASL2.

    Attributes:
      mechanism: To log in by.
      initial: Its first message; empty if that comes later.
      agent: Which installation of which client it is; empty if it does not say.
      bind: A resource is wanted (Bind 2).
      tag: The readable part of that.
      enable: The ``<enable/>`` inside, if any.
      resume: The ``<resume/>``, if any.
      fast: It logs in by a token.
      invalidate: That shall be good no more afterwards.
      token: The mechanism for which a token is wanted; empty: none is.
    """

    mechanism: str
    initial: str
    agent: str = ""
    bind: bool = False
    tag: str = ""
    enable: Element | None = None
    resume: Element | None = None
    fast: bool = False
    invalidate: bool = False
    token: str = ""


def read_request(element: Element, abilities: Abilities) -> Request:
    """Read an ``<authenticate/>``; what the server cannot is not seen.

    Raises:
      LoginRefusedError: It makes no sense.
    """
    agent = element.find(f"{{{NS_SASL2}}}user-agent")
    ident = "" if agent is None else agent.get("id", "")
    try:
        if ident and uuid.UUID(ident).version != 4:
            raise LoginRefusedError("malformed-request")
    except ValueError as error:
        raise LoginRefusedError("malformed-request") from error
    bind = element.find(f"{{{NS_BIND2}}}bind") if abilities.bind2 else None
    fast = element.find(f"{{{NS_FAST}}}fast") if abilities.tokens else None
    wanted = element.find(f"{{{NS_FAST}}}request-token") if abilities.tokens else None
    token = "" if wanted is None else wanted.get("mechanism", "")
    managed = abilities.managed
    return Request(
        mechanism=element.get("mechanism", "")[:MAX_MECHANISM],
        initial=element.findtext(f"{{{NS_SASL2}}}initial-response") or "",
        agent=ident,
        bind=bind is not None,
        tag=(bind.findtext(f"{{{NS_BIND2}}}tag") or "")[:_MAX_TAG] if bind is not None else "",
        enable=bind.find(f"{{{sm.NS}}}enable") if bind is not None and managed else None,
        resume=element.find(f"{{{sm.NS}}}resume") if managed else None,
        fast=fast is not None,
        invalidate=fast is not None and fast.get("invalidate") in ("true", "1"),
        token=token if token in abilities.tokens and ident else "",
    )


class Exchange:
    """One try to log in.

    Args:
      accounts: Who may.
      mechanism: As the client asked for.
      nonce: At least 128 random bits as printable ASCII without a comma.
      agent: Whose token it is, if it logs in by one; None: it does not.

    Attributes:
      name: Whose localpart; proven once a `Step` of success came out.
      rotate: The token that was used is to be replaced.

    Raises:
      LoginRefusedError: This mechanism is not offered.
    """

    def __init__(
        self, accounts: Accounts, mechanism: str, nonce: str, agent: str | None = None
    ) -> None:
        offered = accounts.mechanisms if agent is None else accounts.abilities.tokens
        if mechanism not in offered:
            raise LoginRefusedError("invalid-mechanism")
        self.name = ""
        self.rotate = False
        self._accounts = accounts
        self._mechanism = mechanism
        self._nonce = nonce
        self._agent = agent
        self._gs2 = self._first_bare = self._server_first = ""

    def receive(self, message: bytes) -> Step:
        """Take the client's next message.

        Raises:
          LoginRefusedError: The client does not know the password, or makes no sense.
        """
        if refusal := self._accounts.refusal():
            raise LoginRefusedError(refusal)
        if not message:
            # RFC 6120 section 6.4.2: a client may leave its first message for later.
            return Step("challenge", b"")
        if len(message) > _MAX_MESSAGE:
            raise LoginRefusedError("malformed-request")
        if self._agent is not None:
            return self._token(message, self._agent)
        try:
            text = message.decode()
        except UnicodeDecodeError as error:
            raise LoginRefusedError("malformed-request") from error
        if self._mechanism == "PLAIN":
            return self._plain(text)
        return self._scram_final(text) if self._server_first else self._scram_first(text)

    def _token(self, message: bytes, agent: str) -> Step:
        name, zero, proof = message.partition(b"\0")
        try:
            self.name = self._accounts.prepare(name.decode(), "")
        except UnicodeDecodeError as error:
            raise LoginRefusedError("malformed-request") from error
        if not zero:
            raise LoginRefusedError("malformed-request")
        bound = bool(sasl.TOKEN_MECHANISMS[self._mechanism])
        binding = self._accounts.end_point if bound else b""
        answer, self.rotate = self._accounts.tokens.check(
            self.name, agent, self._mechanism, proof, binding
        )
        return Step("success", answer)

    def _plain(self, text: str) -> Step:
        parts = text.split("\0")
        if len(parts) != 3:
            raise LoginRefusedError("malformed-request")
        authzid, name, password = parts
        self.name = self._accounts.prepare(name, authzid)
        kept = self._accounts.verifier(self.name, self._mechanism)
        try:
            given = make_verifier("sha256", password, kept.salt)
        except AuthenticationError as error:
            raise LoginRefusedError("not-authorized") from error
        if not hmac.compare_digest(given.stored_key, kept.stored_key):
            raise LoginRefusedError("not-authorized")
        return Step("success", b"")

    def _scram_first(self, text: str) -> Step:
        # RFC 5802 section 7: gs2-cbind-flag "," [ authzid ] "," bare message.
        flag, _, rest = text.partition(",")
        authzid, _, bare = rest.partition(",")
        self._check_flag(flag)
        fields = _fields(bare)
        if "m" in fields or not fields.get("n") or not fields.get("r"):
            raise LoginRefusedError("malformed-request")
        self.name = self._accounts.prepare(
            _unescape(fields["n"]), _unescape(authzid.removeprefix("a="))
        )
        kept = self._accounts.verifier(self.name, self._mechanism)
        self._gs2, self._first_bare = f"{flag},{authzid},", bare
        self._nonce = fields["r"] + self._nonce
        salt = base64.b64encode(kept.salt).decode()
        self._server_first = f"r={self._nonce},s={salt},i={kept.iterations}"
        if self._accounts.abilities.protected:
            offer = hashlib.new(self._hash_name, self._accounts.protection.encode())
            self._server_first += f",h={base64.b64encode(offer.digest()).decode()}"
        return Step("challenge", self._server_first.encode())

    def _check_flag(self, flag: str) -> None:
        """Judge what the client says about channel binding (RFC 5802 section 6)."""
        bindings = self._accounts.abilities.bindings
        if self._mechanism.endswith("-PLUS"):
            good = flag.removeprefix("p=") in bindings and flag.startswith("p=")
        elif bindings and flag == "y":
            # It has seen no -PLUS, and there is one: somebody between took it away.
            raise LoginRefusedError("not-authorized")
        else:
            good = flag in ("n", "y")
        if not good:
            raise LoginRefusedError("malformed-request")

    @property
    def _hash_name(self) -> str:
        return sasl.MECHANISMS[self._mechanism.removesuffix("-PLUS")]

    def _scram_final(self, text: str) -> Step:
        without_proof, _, proof = text.rpartition(",p=")
        fields = _fields(without_proof)
        try:
            client_proof = base64.b64decode(proof, validate=True)
        except ValueError as error:
            raise LoginRefusedError("malformed-request") from error
        channel = self._accounts.end_point if self._gs2.startswith("p=") else b""
        binding = base64.b64encode(self._gs2.encode() + channel).decode()
        if fields.get("c") != binding or fields.get("r") != self._nonce:
            raise LoginRefusedError("malformed-request")
        kept = self._accounts.verifier(self.name, self._mechanism)
        hash_name = self._hash_name
        auth = f"{self._first_bare},{self._server_first},{without_proof}".encode()
        signature = hmac.digest(kept.stored_key, auth, hash_name)
        if len(client_proof) != len(signature):
            raise LoginRefusedError("not-authorized")
        client_key = bytes(a ^ b for a, b in zip(client_proof, signature, strict=True))
        stored_key = hashlib.new(hash_name, client_key).digest()
        if not hmac.compare_digest(stored_key, kept.stored_key):
            raise LoginRefusedError("not-authorized")
        verification = hmac.digest(kept.server_key, auth, hash_name)
        return Step("success", b"v=" + base64.b64encode(verification))


def _fields(text: str) -> dict[str, str]:
    return dict(part.partition("=")[::2] for part in text.split(","))


def _unescape(name: str) -> str:
    """Undo RFC 5802 section 5.1: ``=2C`` is a comma, ``=3D`` an equals sign."""
    return name.replace("=2C", ",").replace("=3D", "=")
