"""Addresses: RFC 7622. Sans-IO."""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass

# RFC 7622 section 3.1: each part is at most 1023 bytes.
MAX_PART = 1023  # bytes
MAX_JID = 3 * MAX_PART + len("@/")  # bytes

# RFC 7622 section 3.3.1: what a localpart may not contain beyond PRECIS.
_FORBIDDEN_LOCAL = frozenset("\"&'/:<>@")

# RFC 7622 section 3.2 (ifqdn): letters, digits and hyphens, at most 63 bytes a label
# (RFC 1035 section 2.3.4). COMPAT(servers): underscores, which names inside a company have.
_ASCII_DOMAIN = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")


@dataclass(frozen=True, slots=True, order=True)
class JID:
    """A Jabber identifier, prepared, so that equal addresses compare equal.

    Make one by `JID.parse`; the constructor trusts its arguments.

    Attributes:
      local: Part before the ``@``, or empty.
      domain: The server.
      resource: Part behind the ``/``, or empty.
    """

    local: str
    domain: str
    resource: str = ""

    @staticmethod
    def parse(text: str) -> JID:
        """Read and prepare an address (RFC 7622 section 3).

        Raises:
          ValueError: It is not a JID; says why.
        """
        return _parse(text)

    @property
    def bare(self) -> JID:
        """The address without its resource."""
        return JID(self.local, self.domain) if self.resource else self

    def with_resource(self, resource: str) -> JID:
        """The same account at another resource; prepares it."""
        return JID(self.local, self.domain, _prepare_resource(resource))

    def __str__(self) -> str:
        text = f"{self.local}@{self.domain}" if self.local else self.domain
        return f"{text}/{self.resource}" if self.resource else text


# Every stanza carries one or two addresses, and they are nearly always the same few.
@functools.lru_cache(maxsize=512)
def _parse(text: str) -> JID:
    if len(text) > MAX_JID:
        raise ValueError(f"an address has at most {MAX_JID} bytes, this has {len(text)}")
    # RFC 7622 section 3.2: the resource is behind the first slash and may itself hold
    # "@" and "/", so it is cut off first; then the local part is before the first "@".
    rest, slash, resource = text.partition("/")
    if slash and not resource:
        raise ValueError(f"{text!r} ends in a slash: the resource is missing")
    local, at, domain = rest.partition("@")
    if not at:
        local, domain = "", rest
    elif not local:
        raise ValueError(f"{text!r} has nothing before the @")
    return JID(
        _prepare_local(local) if local else "",
        _prepare_domain(domain),
        _prepare_resource(resource) if resource else "",
    )


def _prepare_local(local: str) -> str:
    local = _precis("UsernameCaseMapped", local)
    # After the preparation, which turns a fullwidth @ or / into the real one.
    if bad := _FORBIDDEN_LOCAL.intersection(local):
        raise ValueError(f"the part before the @ may not contain {' '.join(sorted(bad))}")
    return _checked("part before the @", local)


def _prepare_resource(resource: str) -> str:
    return _checked("resource", _precis("OpaqueString", resource))


def _prepare_domain(domain: str) -> str:
    """Bring a domain into the one form that RFC 7622 section 3.2.1 compares: U-labels."""
    if domain.startswith("["):
        return _prepare_ip_literal(domain)
    prepared = domain.lower()
    if not prepared.isascii() or "xn--" in prepared:
        # Imported late: the tables cost memory, and nearly every JID is ASCII.
        # IDNA 2008; the built-in codec is IDNA 2003 and sends straße.de to strasse.de.
        import idna

        try:
            prepared = idna.decode(domain, uts46=True)
        except UnicodeError as error:
            raise ValueError(f"{domain!r} is not a domain name: {error}") from error
    prepared = prepared.removesuffix(".")
    if prepared.isascii() and not _ASCII_DOMAIN.fullmatch(prepared):
        raise ValueError(f"{domain!r} is not a domain name")
    return _checked("domain", prepared)


def _prepare_ip_literal(domain: str) -> str:
    # Without a zone: it means something on one machine only.
    if not domain.endswith("]") or "%" in domain:
        raise ValueError(f"{domain!r} is not an IPv6 address in brackets")
    try:
        return f"[{ipaddress.IPv6Address(domain[1:-1])}]"
    except ValueError as error:
        raise ValueError(f"{domain!r} is not an IPv6 address in brackets") from error


def _precis(profile: str, text: str) -> str:
    if text.isascii():
        if any(c < " " or c == "\x7f" for c in text):
            raise ValueError("control characters are not allowed in an address")
        if profile == "OpaqueString":
            return text
        if " " in text:
            raise ValueError("a space is not allowed before the @")
        return text.lower()
    # Imported late: the tables cost memory, and nearly every JID is ASCII.
    import precis_i18n

    try:
        return precis_i18n.get_profile(profile).enforce(text)
    except UnicodeError as error:
        raise ValueError(f"{text!r} is not allowed in an address: {error}") from error


def _checked(what: str, text: str) -> str:
    if not 0 < len(text.encode()) <= MAX_PART:
        raise ValueError(f"the {what} must have 1 to {MAX_PART} bytes")
    return text
