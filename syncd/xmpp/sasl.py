"""SASL: SCRAM, PLAIN and hashed tokens, the client's side. Sans-IO.

SCRAM is RFC 5802 and RFC 7677, PLAIN is RFC 4616; the tokens of XEP-0484 prove themselves as
draft-schmaus-kitten-sasl-ht has it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import stringprep
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from syncd.errors import AuthenticationError

if TYPE_CHECKING:
    from datetime import datetime

# RFC 5802 section 5.1 and RFC 7677 section 4: fewer rounds make the server's answer cheap
# to guess; more would let a hostile server keep a core busy for seconds (35 ms per 100,000).
MIN_ITERATIONS = 4_096
MAX_ITERATIONS = 1_000_000
# Real salts have 16 to 32 bytes, real nonces 24 to 60 characters.
_MAX_MESSAGE = 4_096  # bytes

# RFC 5929 section 4: the only binding that can be computed on every TLS version. The stronger
# tls-exporter (RFC 9266) needs keying material that Python's ssl exports in no version so far
# (3.11 to 3.14 know tls-unique alone, see `ssl.CHANNEL_BINDING_TYPES`; cpython issues 82133
# and 95341), and reaching around it into OpenSSL is no way to become more secure.
END_POINT = "tls-server-end-point"

# A sentence names so many bindings; nobody has defined more (RFC 5929, RFC 9266).
MAX_SHOWN = 4

# Strongest first; the server's own order says nothing (Prosody's is random).
MECHANISMS = {
    "SCRAM-SHA-512": "sha512",
    "SCRAM-SHA-256": "sha256",
    "SCRAM-SHA-1": "sha1",
}

# How a token is used, and what that binds to; the best first. HT-SHA-256-EXPR would be better
# still, and waits for tls-exporter.
TOKEN_MECHANISMS = {
    "HT-SHA-256-ENDP": END_POINT,
    "HT-SHA-256-NONE": "",
}


@dataclass(frozen=True, slots=True)
class KeyWanted:
    """The salted password is needed; it takes milliseconds, so the driver may use a thread.

    Attributes:
      hash_name: As hashlib knows it.
      salt: The server's.
      iterations: The server's, within our bounds.
    """

    hash_name: str
    salt: bytes
    iterations: int

    def derive(self, password: str) -> bytes:
        """Compute the salted password, ``Hi`` in RFC 5802 section 2.2."""
        secret = prepare_password(password).encode()
        return hashlib.pbkdf2_hmac(self.hash_name, secret, self.salt, self.iterations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What the server offers, before the login.

    Attributes:
      mechanisms: Of SASL.
      bindings: Types of channel binding (XEP-0440); None if it does not say.
    """

    mechanisms: frozenset[str]
    bindings: frozenset[str] | None = None

    @property
    def protected(self) -> str:
        """What XEP-0474 hashes, so that nobody shortens the lists on their way to us."""
        text = "\x1e".join(sorted(self.mechanisms))
        if self.bindings is not None:
            text += "\x1f" + "\x1e".join(sorted(self.bindings))
        return text


@dataclass(frozen=True, slots=True)
class Choice:
    """How to log in.

    Attributes:
      mechanism: As the server calls it.
      gs2_flag: RFC 5802 section 6: ``p=...`` binds to the channel; ``y``: we could, and think
        that the server cannot; ``n``: we do not.
      caveat: What the user should know about it, as a sentence; may be empty.
    """

    mechanism: str
    gs2_flag: str = "n"
    caveat: str = ""


def choose(offered: Offered, *, end_point: bool, allow_plain: bool, least: str = "") -> Choice:
    """Pick the strongest mechanism that both ends know.

    Args:
      offered: What the server lists.
      end_point: We know the hash of its certificate, so we can bind to the channel.
      allow_plain: The user takes PLAIN; the stream is inside TLS already.
      least: The strongest that this server has let us use before.

    Raises:
      AuthenticationError: There is none, or only weaker ones than before.
    """
    choice = _choose_scram(offered, end_point=end_point)
    if choice is None and "PLAIN" in offered.mechanisms:
        if not allow_plain:
            raise AuthenticationError(
                "the server offers no SCRAM, only PLAIN, which shows it the password",
                hint="enable SCRAM on the server, or set account.allow_plain = true",
            )
        choice = Choice("PLAIN")
    if choice is None:
        listed = ", ".join(sorted(offered.mechanisms)) or "none at all"
        raise AuthenticationError(
            f"the server offers no way to log in that syncd knows (it lists: {listed})",
            hint="enable SCRAM-SHA-256 or SCRAM-SHA-1 on the server",
        )
    if strength(choice.mechanism) < strength(least):
        raise AuthenticationError(
            f"the server let us log in by {least} before, and now offers at best "
            f"{choice.mechanism}: somebody between may want to learn the password",
            hint="if the server's administrator changed that on purpose, delete the file "
            "login in the state directory",
        )
    return choice


def _choose_scram(offered: Offered, *, end_point: bool) -> Choice | None:
    announced = any(name.endswith("-PLUS") for name in offered.mechanisms)
    if offered.bindings is not None and not announced:
        raise AuthenticationError(
            "the server lists channel bindings but no mechanism that uses them: somebody "
            "between may have removed it (XEP-0440)",
            hint="look at the server's SASL configuration",
        )
    # COMPAT(ejabberd 23.01): offers -PLUS without saying for which binding, and takes only
    # one that TLS 1.3 does not define. So only what is listed is used, and where -PLUS is
    # offered "y" would be a lie that ends the login.
    can_bind = end_point and END_POINT in (offered.bindings or ())
    for mechanism in MECHANISMS:
        if can_bind and f"{mechanism}-PLUS" in offered.mechanisms:
            return Choice(f"{mechanism}-PLUS", f"p={END_POINT}")
    # COMPAT(prosody 13): lists tls-exporter alone unless its administrator enables the one that
    # every server must list. XEP-0440 section 4 has us abort then, as somebody between may
    # have changed the list; that would lock out whoever runs Prosody as it comes. Where a
    # server has bound us once, `choose` takes nothing less, whatever is listed.
    listed = offered.bindings
    caveat = _unbound(listed) if listed is not None and END_POINT not in listed else ""
    for mechanism in MECHANISMS:
        if mechanism in offered.mechanisms:
            return Choice(mechanism, "y" if end_point and not announced else "n", caveat)
    return None


def _unbound(listed: frozenset[str]) -> str:
    shown = ", ".join(sorted(map(ascii, listed))[:MAX_SHOWN]) or "it names none"
    return (
        f"the server binds logins to the connection only in ways that syncd does not know "
        f"({shown}), so nobody would notice a man in the middle with a certificate of his own: "
        f"enable {END_POINT} on the server"
    )


def choose_for_token(offered: frozenset[str], *, end_point: bool, must_bind: bool) -> str:
    """Pick how a token shall be used (XEP-0484 section 3.2).

    Args:
      offered: What the server lists for tokens.
      end_point: We know the hash of its certificate, so we can bind to the channel.
      must_bind: Only what binds to the channel will do.

    Returns:
      The mechanism; empty if there is none.
    """
    for mechanism, binding in TOKEN_MECHANISMS.items():
        # Who hears a proof that binds to nothing can repeat it, so it is the last resort.
        if mechanism in offered and (end_point if binding else not must_bind):
            return mechanism
    return ""


def strength(mechanism: str) -> int:
    """Compare mechanisms: what binds to the channel is stronger than what does not."""
    if mechanism == "PLAIN":
        return 1
    name = mechanism.removesuffix("-PLUS")
    if name not in MECHANISMS:
        return 0
    rank = 2 + list(reversed(MECHANISMS)).index(name)
    return rank + len(MECHANISMS) * (name != mechanism)


def plain(username: str, password: str) -> bytes:
    """The one message of PLAIN (RFC 4616 section 2)."""
    return f"\0{username}\0{password}".encode()


class Scram:
    """The client of one SCRAM exchange.

    Args:
      mechanism: A key of `MECHANISMS`, or one with ``-PLUS`` behind it.
      username: The localpart.
      nonce: At least 128 random bits as printable ASCII without a comma.
      gs2_flag: See `Choice`.
      binding: The channel's data, for a flag ``p=...``.
      offered: What the server offered; compared with what it says that it did, if it says so
        (XEP-0474).
    """

    def __init__(
        self,
        mechanism: str,
        username: str,
        nonce: str,
        gs2_flag: str = "n",
        binding: bytes = b"",
        offered: Offered | None = None,
    ) -> None:
        self._hash = MECHANISMS[mechanism.removesuffix("-PLUS")]
        self._nonce = nonce
        self._gs2 = f"{gs2_flag},,"
        self._binding = binding
        self._offered = offered
        name = username.replace("=", "=3D").replace(",", "=2C")
        self._first_bare = f"n={name},r={nonce}"
        self._server_first = ""
        self._server_nonce = ""
        self._server_signature = b""

    @property
    def keyed(self) -> bool:
        """Whether our proof is out, so that only the server's is missing."""
        return bool(self._server_signature)

    def first(self) -> bytes:
        """The client-first-message."""
        return (self._gs2 + self._first_bare).encode()

    def challenged(self, message: bytes) -> KeyWanted:
        """Take the server-first-message.

        Raises:
          AuthenticationError: It is no such message, or asks for too little or too much.
        """
        if self._server_first:
            # A second proof for another salt would only help whoever guesses the password.
            raise AuthenticationError("the server sent a second SCRAM challenge")
        fields = _fields(message)
        self._server_first = message.decode()
        self._server_nonce = fields.get("r", "")
        if not self._server_nonce.startswith(self._nonce) or self._server_nonce == self._nonce:
            raise AuthenticationError("the server did not answer our nonce: no SCRAM server")
        try:
            iterations = int(fields["i"])
            salt = base64.b64decode(fields["s"], validate=True)
        except (KeyError, ValueError) as error:
            raise AuthenticationError("the server's SCRAM challenge is malformed") from error
        if not MIN_ITERATIONS <= iterations <= MAX_ITERATIONS or not salt:
            raise AuthenticationError(
                f"the server asks for {iterations} SCRAM iterations; "
                f"syncd takes {MIN_ITERATIONS} to {MAX_ITERATIONS}",
                hint="raise or lower the iteration count on the server",
            )
        if "h" in fields and self._offered is not None:
            self._check_offer(fields["h"])
        return KeyWanted(self._hash, salt, iterations)

    def _check_offer(self, claimed: str) -> None:
        """Compare the lists we saw with those that the server sent (XEP-0474 section 5.2)."""
        assert self._offered is not None
        seen = hashlib.new(self._hash, self._offered.protected.encode()).digest()
        if not hmac.compare_digest(claimed.encode(), base64.b64encode(seen)):
            raise AuthenticationError(
                "the server's list of ways to log in was changed on its way to us",
                hint="somebody between you and the server is trying to weaken the login; "
                "do not log in from this network until you know who",
            )

    def final(self, salted_password: bytes) -> bytes:
        """The client-final-message (RFC 5802 section 3)."""
        channel = base64.b64encode(self._gs2.encode() + self._binding).decode()
        without_proof = f"c={channel},r={self._server_nonce}"
        auth = f"{self._first_bare},{self._server_first},{without_proof}".encode()
        client_key = self._hmac(salted_password, b"Client Key")
        signature = self._hmac(hashlib.new(self._hash, client_key).digest(), auth)
        proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        self._server_signature = self._hmac(self._hmac(salted_password, b"Server Key"), auth)
        return f"{without_proof},p={base64.b64encode(proof).decode()}".encode()

    def finished(self, message: bytes) -> None:
        """Check the server-final-message: only who knows the password can make it.

        Raises:
          AuthenticationError: The server does not know the password, so it is an impostor.
        """
        try:
            signature = base64.b64decode(_fields(message).get("v", ""), validate=True)
        except ValueError:
            signature = b""
        if not self._server_signature or not hmac.compare_digest(
            signature, self._server_signature
        ):
            raise AuthenticationError(
                "the server could not prove that it knows the password",
                hint="somebody may be posing as your server; do not log in elsewhere with "
                "this password until you know why",
            )

    def _hmac(self, key: bytes, data: bytes) -> bytes:
        return hmac.digest(key, data, self._hash)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What the server takes instead of the password, once it has given it (XEP-0484).

    Attributes:
      account: The bare JID that it lets in.
      mechanism: The only one that it may be used with, a key of `TOKEN_MECHANISMS`.
      secret: As good as the password.
      expires: When the server takes it no more; aware.
    """

    account: str
    mechanism: str
    secret: str = field(repr=False)
    expires: datetime


class HashedToken:
    """The client of one exchange of a token's mechanism: one message each way.

    Args:
      token: With what.
      username: The localpart.
      binding: The channel's data, if the mechanism binds to it.
    """

    def __init__(self, token: Token, username: str, binding: bytes) -> None:
        self._secret = token.secret.encode()
        self._username = username
        self._binding = binding

    def first(self) -> bytes:
        """The one message."""
        return self._username.encode() + b"\0" + self._proof(b"Initiator")

    def finished(self, message: bytes) -> None:
        """Check the server's answer: only who knows the token can make it.

        Raises:
          AuthenticationError: The server does not know the token, so it is an impostor.
        """
        if not hmac.compare_digest(message, self._proof(b"Responder")):
            raise AuthenticationError(
                "the server could not prove that it knows the token it gave us",
                hint="somebody may be posing as your server; if you are sure that nobody is, "
                "delete the file token in the state directory",
            )

    def _proof(self, role: bytes) -> bytes:
        return hmac.digest(self._secret, role + self._binding, "sha256")


def _fields(message: bytes) -> dict[str, str]:
    """Split ``a=x,b=y``; the first of each letter counts."""
    if len(message) > _MAX_MESSAGE:
        raise AuthenticationError("the server's SCRAM message is too long")
    try:
        text = message.decode()
    except UnicodeDecodeError as error:
        raise AuthenticationError("the server's SCRAM message is not UTF-8") from error
    fields: dict[str, str] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        fields.setdefault(key, value)
    if "m" in fields:
        # RFC 5802 section 5.1: a mandatory extension that we do not know ends it.
        raise AuthenticationError("the server demands a SCRAM extension that syncd lacks")
    return fields


def decode(text: str | None) -> bytes:
    """Read the base64 of a SASL element; ``=`` stands for empty (RFC 6120 section 6.4.2).

    Raises:
      AuthenticationError: It is no base64.
    """
    text = (text or "").strip()
    try:
        return b"" if text == "=" else base64.b64decode(text, validate=True)
    except ValueError as error:  # binascii.Error, or not even ASCII
        raise AuthenticationError("the server's SASL message is no base64") from error


def encode(data: bytes) -> str:
    """Write the base64 of a SASL element."""
    return base64.b64encode(data).decode() or "="


def prepare_password(password: str) -> str:
    """SASLprep (RFC 4013): the same password typed on another keyboard gives the same bytes.

    Raises:
      AuthenticationError: It holds a character that is not allowed in a password.
    """
    if password.isascii() and password.isprintable():
        return password
    mapped = "".join(
        " " if stringprep.in_table_c12(c) else c
        for c in password
        if not stringprep.in_table_b1(c)
    )
    text = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
    forbidden = (
        stringprep.in_table_c12,
        stringprep.in_table_c21_c22,
        stringprep.in_table_c3,
        stringprep.in_table_c4,
        stringprep.in_table_c5,
        stringprep.in_table_c6,
        stringprep.in_table_c7,
        stringprep.in_table_c8,
        stringprep.in_table_c9,
    )
    if not text or any(test(c) for c in text for test in forbidden):
        raise AuthenticationError(
            "the password holds a character that SASLprep (RFC 4013) forbids",
            hint="choose a password without control characters",
        )
    if any(stringprep.in_table_d1(c) for c in text) and (
        any(stringprep.in_table_d2(c) for c in text)
        or not (stringprep.in_table_d1(text[0]) and stringprep.in_table_d1(text[-1]))
    ):
        raise AuthenticationError("the password mixes right-to-left and left-to-right text")
    return text
