"""The XML of a stream: bytes in, elements out; an element in, bytes out. Sans-IO.

An element is an `xml.etree.ElementTree.Element` with ``{namespace}name`` tags: a type that
everybody knows, and that xmlschema validates as it stands. The parser is expat with what
RFC 6120 section 11.1 forbids switched off, and with limits of our own, because expat alone
takes DTDs, comments, processing instructions, and a stanza of any size and depth.
"""

from __future__ import annotations

import xml.parsers.expat
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element
from xml.parsers.expat import errors as expat_errors

if TYPE_CHECKING:
    from collections.abc import Mapping

NS_CLIENT = "jabber:client"
NS_STREAMS = "http://etherx.jabber.org/streams"
NS_XML = "http://www.w3.org/XML/1998/namespace"

STREAM = f"{{{NS_STREAMS}}}stream"
LANG = f"{{{NS_XML}}}lang"

# Prosody's and Debian ejabberd's own ceiling for a stanza; ours stay under 8 KiB.
MAX_STANZA = 262_144  # bytes
# XEP-0030 results, the deepest that we read, nest 5 levels; data forms 7.
MAX_DEPTH = 32  # levels
# The most that any XEP we speak defines for one element is 9.
MAX_ATTRIBUTES = 64  # attributes of one element
# A roster of 2,000 contacts with a group each; what is larger is nothing that we asked for.
MAX_ELEMENTS = 8_192  # elements in one stanza
# libexpat keeps every distinct name and prefix for the life of the parser.
MAX_NAMES = 4_096  # names
# Its namespace included; the longest that any XEP defines has 80.
MAX_NAME = 1_024  # characters
# The limits are looked at between slices, so a stanza can pass them by one slice at most.
_SLICE = 16_384  # bytes
# XML 1.0 section 2.3; str.isspace takes much more.
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Opened:
    """The other end's stream header: its attributes, names as ``{namespace}name``."""

    attributes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Closed:
    """The other end's stream footer."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """The bytes are no stream that we take; nothing follows.

    Attributes:
      condition: The stream error to answer with (RFC 6120 section 4.9.3).
      text: What was wrong, for the log.
    """

    condition: str
    text: str


class _RefusedError(Exception):
    """Leaves expat's callbacks; never leaves this module."""

    def __init__(self, condition: str, text: str) -> None:
        super().__init__(text)
        self.malformed = Malformed(condition, text)


class StreamParser:
    """Turns the bytes of one stream into its header, its top-level elements and its footer.

    After STARTTLS and after SASL the stream starts anew, and so must its parser.

    Args:
      max_stanza: Limit for one top-level element, bytes.
    """

    def __init__(self, *, max_stanza: int = MAX_STANZA) -> None:
        self._max_stanza = max_stanza
        self._events: list[Opened | Element | Closed | Malformed] = []
        self._path: list[Element] = []  # from the top-level element to the open one
        self._opened = self._done = False
        self._elements = 0  # in the stanza so far
        self._names: set[str] = set()
        self._held = bytearray()
        self._fed = self._boundary = 0  # bytes given to expat; of these, in whole stanzas
        # "}" cannot occur in a name, so "uri}name" needs only its first brace. None: no
        # intern dictionary, it would grow with every distinct string.
        self._expat = xml.parsers.expat.ParserCreate("UTF-8", "}", None)
        # COMPAT(expat >= 2.6): holds a complete stanza back until more bytes come.
        if hasattr(self._expat, "SetReparseDeferralEnabled"):
            self._expat.SetReparseDeferralEnabled(False)
        self._expat.buffer_text = True
        # Prefixes are told as well, since a name with another prefix is another one to keep.
        self._expat.namespace_prefixes = True
        self._expat.StartNamespaceDeclHandler = self._on_prefix
        self._expat.XmlDeclHandler = self._on_declaration
        self._expat.StartElementHandler = self._on_start
        self._expat.EndElementHandler = self._on_end
        self._expat.CharacterDataHandler = self._on_text
        for forbidden in (
            "StartDoctypeDeclHandler",
            "EntityDeclHandler",
            "ProcessingInstructionHandler",
            "CommentHandler",
            "SkippedEntityHandler",
            "UnparsedEntityDeclHandler",
        ):
            setattr(self._expat, forbidden, _forbid)

    def feed(self, data: bytes) -> list[Opened | Element | Closed | Malformed]:
        """Take what has arrived.

        Args:
          data: Any cut of the stream's bytes.

        Returns:
          What these bytes complete. `Malformed` is always the last, and final.
        """
        if self._done:
            return []
        if not self._fed and not self._held:
            # COMPAT(servers): a line break behind <success/> may arrive as the first byte of
            # the new stream, where XML allows none.
            data = data.lstrip()
        if not self._opened and b"\0" in data:
            # Expat finds UTF-16 out by itself, whatever it was told; RFC 6120 section 11.6
            # knows UTF-8 only.
            self._end(Malformed("unsupported-encoding", "bytes that are no UTF-8"))
            return self._take()
        # A tag ends in ">", so nothing can be complete before one. Waiting for it keeps a
        # long token that arrives in small pieces from being scanned again for each (expat
        # before 2.6 starts over every time: CVE-2023-52425).
        self._held += data
        complete = self._held.rfind(b">") + 1 if b">" in data else 0
        if len(self._held) - complete > self._max_stanza:
            complete = len(self._held)
        if complete:
            data = bytes(self._held[:complete])
            del self._held[:complete]
            try:
                for start in range(0, len(data), _SLICE):
                    self._parse(data[start : start + _SLICE])
            except _RefusedError as refused:
                self._end(refused.malformed)
            except xml.parsers.expat.ExpatError as error:
                self._end(_malformed(error))
        return self._take()

    def _take(self) -> list[Opened | Element | Closed | Malformed]:
        events, self._events = self._events, []
        return events

    def _parse(self, data: bytes) -> None:
        if self._done:
            return
        if self._fed - self._boundary + len(data) > self._max_stanza + _SLICE:
            raise _RefusedError("policy-violation", f"a stanza over {self._max_stanza} bytes")
        self._fed += len(data)
        self._expat.Parse(data, False)

    def _end(self, event: Closed | Malformed) -> None:
        if not self._done:  # what stands behind the footer is not looked at
            self._events.append(event)
            self._done = True

    def _on_declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.upper() != "UTF-8":
            raise _RefusedError("unsupported-encoding", f"encoding {encoding}")

    def _on_prefix(self, prefix: str | None, _: str | None) -> None:
        self._remember(f"xmlns:{prefix}")

    def _remember(self, name: str) -> None:
        self._names.add(name)
        if len(self._names) > MAX_NAMES:
            raise _RefusedError("policy-violation", f"over {MAX_NAMES} different names")
        if len(name) > MAX_NAME:
            raise _RefusedError("policy-violation", f"a name over {MAX_NAME} characters")

    def _on_start(self, name: str, attributes: dict[str, str]) -> None:
        if len(attributes) > MAX_ATTRIBUTES:
            raise _RefusedError("policy-violation", f"over {MAX_ATTRIBUTES} attributes")
        self._remember(name)
        for key in attributes:
            self._remember(key)
        tag = _clark(name)
        attributes = {_clark(key): value for key, value in attributes.items()}
        if not self._opened:
            self._opened = True
            if tag != STREAM:
                raise _RefusedError("bad-format", f"the root element is {tag}")
            self._boundary = self._fed
            self._events.append(Opened(attributes))
            return
        if tag == STREAM:
            # Two parsers that disagree on where a stanza ends let one stanza hide in
            # another (CVE-2022-20917).
            raise _RefusedError("bad-format", "a stream inside the stream")
        if not self._path:
            self._elements = 0
        self._elements += 1
        if self._elements > MAX_ELEMENTS:
            raise _RefusedError("policy-violation", f"over {MAX_ELEMENTS} elements in a stanza")
        if len(self._path) >= MAX_DEPTH:
            raise _RefusedError("policy-violation", f"elements nested over {MAX_DEPTH} deep")
        element = Element(tag, attributes)
        if self._path:
            self._path[-1].append(element)
        self._path.append(element)

    def _on_end(self, name: str) -> None:
        if not self._path:
            self._end(Closed())
            return
        element = self._path.pop()
        if not self._path:
            self._boundary = self._fed
            self._events.append(element)

    def _on_text(self, text: str) -> None:
        if not self._path:
            if not text.strip(_SPACE):
                self._boundary = self._fed
                return
            raise _RefusedError("bad-format", "text between stanzas")
        element = self._path[-1]
        if len(element):
            element[-1].tail = (element[-1].tail or "") + text
        else:
            element.text = (element.text or "") + text


def _forbid(*_: object) -> None:
    raise _RefusedError("restricted-xml", "XML that RFC 6120 section 11.1 forbids")


def _malformed(error: xml.parsers.expat.ExpatError) -> Malformed:
    match expat_errors.messages.get(error.code):
        case expat_errors.XML_ERROR_UNDEFINED_ENTITY:
            return Malformed("restricted-xml", "an entity other than the five of XML")
        case expat_errors.XML_ERROR_UNBOUND_PREFIX:
            return Malformed("bad-namespace-prefix", "a prefix that is not declared")
        case text:
            return Malformed("not-well-formed", text or str(error))


def _clark(name: str) -> str:
    """``uri}name`` or ``uri}name}prefix``, as expat tells it, as ``{uri}name``."""
    uri, brace, rest = name.partition("}")
    return f"{{{uri}}}{rest.partition('}')[0]}" if brace else name


def make(
    tag: str,
    attributes: Mapping[str, str | int | None] | None = None,
    *children: Element,
    text: str | None = None,
) -> Element:
    """Build an element.

    Args:
      tag: ``{namespace}name``.
      attributes: Those whose value is None are left out.
      children: Child elements, in order.
      text: Text in front of the children.
    """
    element = Element(
        tag,
        {name: str(value) for name, value in (attributes or {}).items() if value is not None},
    )
    element.text = text
    element.extend(children)
    return element


def namespace(tag: str) -> str:
    """The namespace of a ``{namespace}name``, or an empty string."""
    return tag[1:].partition("}")[0] if tag.startswith("{") else ""


def local_name(tag: str) -> str:
    """The name of a ``{namespace}name`` without its namespace."""
    return tag.rpartition("}")[2]


def serialise(element: Element, outer: str = NS_CLIENT) -> bytes:
    """Write an element as UTF-8, without prefixes and without added white space.

    Args:
      element: What to write; its own tail is left out.
      outer: The default namespace where it will stand.

    Raises:
      ValueError: It holds a character that XML cannot carry (our own misuse: texts from
        outside are checked where they come in).
    """
    parts: list[str] = []
    _write(element, outer, parts)
    return "".join(parts).encode()


def _write(element: Element, outer: str, parts: list[str]) -> None:
    name, ns = local_name(element.tag), namespace(element.tag)
    parts.append(f"<{name}")
    if ns != outer:
        parts.append(f" xmlns='{_escape(ns)}'")
    for number, (key, value) in enumerate(element.attrib.items()):
        key_ns, key_name = namespace(key), local_name(key)
        if key_ns == NS_XML:
            key_name = f"xml:{key_name}"
        elif key_ns:
            parts.append(f" xmlns:a{number}='{_escape(key_ns)}'")
            key_name = f"a{number}:{key_name}"
        parts.append(f" {key_name}='{_escape(value)}'")
    if not element.text and not len(element):
        parts.append("/>")
        return
    parts.append(">")
    if element.text:
        parts.append(_escape(element.text))
    for child in element:
        _write(child, ns, parts)
        if child.tail:
            parts.append(_escape(child.tail))
    parts.append(f"</{name}>")


_ESCAPES = {
    **{code: f"&#{code};" for code in (0x09, 0x0A, 0x0D)},  # else attributes lose them
    ord("&"): "&amp;",
    ord("<"): "&lt;",
    ord(">"): "&gt;",
    ord("'"): "&apos;",
    ord('"'): "&quot;",
}
# XML 1.0 section 2.2: everything else below U+0020, and these three, cannot be written at all.
_ILLEGAL = frozenset(
    [*(chr(code) for code in range(0x20) if code not in (0x09, 0x0A, 0x0D)), "\ufffe", "\uffff"]
)


def is_writable(text: str) -> bool:
    """Whether XML can carry this text: no control characters, no lone surrogates."""
    return _ILLEGAL.isdisjoint(text) and not any("\ud800" <= c <= "\udfff" for c in text)


def _escape(text: str) -> str:
    if not is_writable(text):
        raise ValueError(f"XML cannot carry {text!r}")
    return text.translate(_ESCAPES)
