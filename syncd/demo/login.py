"""SASL, the server's side: SCRAM (RFC 5802, RFC 7677) and PLAIN (RFC 4616). Sans-IO."""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from syncd.errors import AuthenticationError
from syncd.xmpp import sasl
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULT_MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-1")

# RFC 7677 section 4: the least. A demo's password needs no more, and starts faster so.
ITERATIONS = 4_096
_SALT = 16  # bytes
# A client-first-message is a name of at most 1023 bytes and a nonce.
_MAX_MESSAGE = 4_096  # bytes


class LoginRefusedError(AuthenticationError):
    """The client is not logged in; it may try again.

    Args:
      condition: The defined condition (RFC 6120 section 6.5).
    """

    def __init__(self, condition: str) -> None:
        super().__init__(f"the login is refused [{condition}]")
        self.condition = condition


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
    """

    def __init__(
        self,
        domain: str,
        passwords: Mapping[str, str],
        *,
        token: Callable[[int], bytes],
        mechanisms: tuple[str, ...] = DEFAULT_MECHANISMS,
        refusal: Callable[[], str] = str,
    ) -> None:
        self.domain = domain
        self.mechanisms = mechanisms
        self.refusal = refusal
        jids = [JID.parse(f"{name}@{domain}") for name in passwords]
        self.names = frozenset(jid.local for jid in jids)
        # PLAIN is checked against the strongest.
        self._hashes = {m: sasl.MECHANISMS.get(m, "sha256") for m in mechanisms}
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

    def verifier(self, name: str, mechanism: str) -> Verifier:
        """What is kept for this account, or a decoy that no password fits."""
        hash_name = self._hashes[mechanism]
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


class Exchange:
    """One try to log in.

    Args:
      accounts: Who may.
      mechanism: As the client asked for.
      nonce: At least 128 random bits as printable ASCII without a comma.

    Attributes:
      name: Whose localpart; proven once a `Step` of success came out.

    Raises:
      LoginRefusedError: This mechanism is not offered.
    """

    def __init__(self, accounts: Accounts, mechanism: str, nonce: str) -> None:
        if mechanism not in accounts.mechanisms:
            raise LoginRefusedError("invalid-mechanism")
        self.name = ""
        self._accounts = accounts
        self._mechanism = mechanism
        self._nonce = nonce
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
        try:
            text = message.decode()
        except UnicodeDecodeError as error:
            raise LoginRefusedError("malformed-request") from error
        if self._mechanism == "PLAIN":
            return self._plain(text)
        return self._scram_final(text) if self._server_first else self._scram_first(text)

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
        # RFC 5802 section 7: gs2-cbind-flag "," [ authzid ] "," bare message. "p" would
        # bind the channel, which is not offered here; "y" knows that it is not.
        flag, _, rest = text.partition(",")
        authzid, _, bare = rest.partition(",")
        if flag not in ("n", "y"):
            raise LoginRefusedError("malformed-request")
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
        return Step("challenge", self._server_first.encode())

    def _scram_final(self, text: str) -> Step:
        without_proof, _, proof = text.rpartition(",p=")
        fields = _fields(without_proof)
        try:
            client_proof = base64.b64decode(proof, validate=True)
        except ValueError as error:
            raise LoginRefusedError("malformed-request") from error
        binding = base64.b64encode(self._gs2.encode()).decode()
        if fields.get("c") != binding or fields.get("r") != self._nonce:
            raise LoginRefusedError("malformed-request")
        kept = self._accounts.verifier(self.name, self._mechanism)
        hash_name = sasl.MECHANISMS[self._mechanism]
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
