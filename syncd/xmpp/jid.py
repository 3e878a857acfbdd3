"""Addresses: RFC 7622. Sans-IO."""

from __future__ import annotations

import functools
from dataclasses import dataclass

# RFC 7622 section 3.1: each part is at most 1023 bytes.
MAX_PART = 1023  # bytes

# RFC 7622 section 3.3.1: what a localpart may not contain beyond PRECIS.
_FORBIDDEN_LOCAL = frozenset("\"&'/:<>@")


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
    # RFC 7622 section 3.2: the resource is behind the first slash and may itself hold
    # "@" and "/", so it is cut off first.
    rest, slash, resource = text.partition("/")
    local, at, domain = rest.rpartition("@")
    if slash and not resource:
        raise ValueError(f"{text!r} ends in a slash: the resource is missing")
    if at and not local:
        raise ValueError(f"{text!r} has nothing before the @")
    return JID(
        _prepare_local(local) if local else "",
        _prepare_domain(domain),
        _prepare_resource(resource) if resource else "",
    )


def _prepare_local(local: str) -> str:
    if bad := _FORBIDDEN_LOCAL.intersection(local):
        raise ValueError(f"the part before the @ may not contain {''.join(sorted(bad))}")
    return _checked("part before the @", _precis("UsernameCaseMapped", local))


def _prepare_resource(resource: str) -> str:
    return _checked("resource", _precis("OpaqueString", resource))


def _prepare_domain(domain: str) -> str:
    domain = domain.removesuffix(".")
    if domain.startswith("["):
        if not domain.endswith("]"):
            raise ValueError(f"the address {domain!r} lacks its closing bracket")
        return domain.lower()
    if domain.isascii():
        domain = domain.lower()
    else:
        # COMPAT(python): the built-in codec is IDNA 2003, which RFC 7622 replaced; only
        # its lower-casing and dot handling are used, the name stays a U-label.
        try:
            domain = domain.encode("idna").decode("idna")
        except UnicodeError as error:
            raise ValueError(f"{domain!r} is not a domain name: {error}") from error
    if not domain or any(c <= " " or c in '@/\\"<>&:' or c == "\x7f" for c in domain):
        raise ValueError(f"{domain!r} is not a domain name")
    return _checked("domain", domain)


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
