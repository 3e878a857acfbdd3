"""The XML of a stream: bytes in, elements out; an element in, bytes out. Sans-IO.

An element is an `xml.etree.ElementTree.Element` with ``{namespace}name`` tags: a type that
everybody knows, and that xmlschema validates as it stands. The parser is expat with what
RFC 6120 section 11.1 forbids switched off, and with limits of our own, because expat alone
takes DTDs, comments, processing instructions, and a stanza of any size and depth.
"""

from __future__ import annotations

import enum
import re
import xml.parsers.expat
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn
from xml.etree.ElementTree import Element
from xml.parsers.expat import errors as expat_errors

from syncd.errors import SyncdError

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
# Names that the stream has not used before. libexpat keeps every distinct name and prefix for
# the life of the parser, so behind a stanza with which there are more, a new parser goes on.
MAX_NAMES = 1_024  # names in one stanza
# Its namespace included; the longest that any XEP defines has 80.
MAX_NAME = 1_024  # characters
# CVE-2022-25235 and CVE-2022-25236: before it, bytes that are no UTF-8, and braces in the name
# of a namespace, let one stanza look like another.
MIN_EXPAT = (2, 4, 5)
# XML 1.0 section 2.3; str.isspace takes much more.
_SPACE = " \t\r\n"
_BOM = b"\xef\xbb\xbf"


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


class _Inside(enum.Enum):
    """Where between two ends of tags the cutter is."""

    TEXT = enum.auto()
    TAG = enum.auto()
    APOSTROPHES = enum.auto()
    QUOTES = enum.auto()
    CDATA = enum.auto()
    INSTRUCTION = enum.auto()


_STANZAS = frozenset(f"{{{NS_CLIENT}}}{name}" for name in ("iq", "message", "presence"))
_NO_SPACE = re.compile(rb"[^ \t\r\n]")
# None of these goes back over more than it must give up anyway, so each byte is looked at
# once. COMPAT(python < 3.11.5): only of single characters, never of groups, are possessive
# quantifiers right (gh-106052). The rest of a tag:
_TAG = rb"""(?:[^<>'"]++|'[^'<]*+'|"[^"<]*+")*>"""
_NAME = rb"(?:[^\s<>/:'\"]*+:)?(?:iq|message|presence)(?=[\s/>])"
# Text, and the whole tag behind it, if that is no CDATA or anything rarer.
_ONE = re.compile(rb"[^<]*+<(?![!?])" + _TAG)
# As many of them as there are, but none behind what may be the end of a stanza.
_REST = rb"(?:[^<]*+<(?![!?]|/" + _NAME + rb")" + _TAG + rb")*(?:[^<]*+</" + _TAG + rb")?"
_MANY = re.compile(_REST)
# The same from the start of a stanza, if that is not its end as well.
_STANZA = re.compile(rb"<" + _NAME + _TAG + rb"(?<!/>)" + _REST)
# What to look for next: XML 1.0 sections 3.1 (tags), 2.7 (CDATA), 2.6 and 2.8 (``<?xml?>``).
# A "<" inside a tag is no XML, quoted or not.
_EDGES = {
    _Inside.TAG: re.compile(rb"""[<>'"]"""),
    _Inside.APOSTROPHES: re.compile(rb"[<']"),
    _Inside.QUOTES: re.compile(rb'[<"]'),
    _Inside.CDATA: re.compile(rb"]]>"),
    _Inside.INSTRUCTION: re.compile(rb"\?>"),
}
# Where that leads; to the end of the tag if it is not here.
_BEHIND = {
    (_Inside.TAG, b"'"): _Inside.APOSTROPHES,
    (_Inside.TAG, b'"'): _Inside.QUOTES,
    (_Inside.APOSTROPHES, b"'"): _Inside.TAG,
    (_Inside.QUOTES, b'"'): _Inside.TAG,
}
# The longest of them: how far back an edge can begin that has only begun to arrive.
_OVERLAP = len("]]>") - 1  # bytes
_CDATA = b"<![CDATA["


class _Cutter:
    """Cuts a stream behind each of its tags, however its bytes arrive.

    Expat scans a token anew whenever more of it arrives (CVE-2023-52425); since 2.6 it may
    wait until there is twice as much, but then it keeps complete ones waiting as well. So it
    gets whole tags only, and each with its last byte. It alone judges what they mean: what is
    cut wrongly here is malformed there.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._start = 0  # of what was not taken yet
        self._seen = 0  # up to here it has no end
        self._inside = _Inside.TEXT

    def __len__(self) -> int:
        """How many bytes wait for their end."""
        return len(self._held) - self._start

    def put(self, data: bytes) -> None:
        """Add what has arrived."""
        del self._held[: self._start]
        self._seen -= self._start
        self._start = 0
        self._held += data

    def skip_space(self) -> bytes:
        """Drop white space in front of a tag, and return the three bytes behind it.

        Only between stanzas: where a tag may begin, and nothing of it was looked at.
        """
        first = _NO_SPACE.search(self._held, self._start)
        self.skip((first.start() if first else len(self._held)) - self._start)
        return bytes(self._held[self._start : self._start + len(_BOM)])

    def skip(self, count: int) -> None:
        """Drop so many bytes."""
        self._start += count
        self._seen = max(self._seen, self._start)

    def take(self, limit: int, several: re.Pattern[bytes]) -> bytes | None:
        """Take the next tag with the text in front of it; None if its end is not there yet.

        Args:
          limit: How many bytes to look at; so what is found does not depend on the reads.
          several: What else to take than one; it may match nothing.

        Raises:
          _RefusedError: It is one of those that a stream may not contain.
        """
        end = min(len(self._held), self._start + limit)
        if self._inside is _Inside.TEXT:
            for tags in (several, _ONE):
                whole = tags.match(self._held, self._seen, end)
                if whole is not None and whole.end() > self._seen:
                    return self._cut(whole.end())
            self._begin(end)
            if self._inside is _Inside.TEXT:
                return None
        while edge := _EDGES[self._inside].search(self._held, self._seen, end):
            self._seen = edge.end()
            self._inside = _BEHIND.get((self._inside, edge[0]), _Inside.TEXT)
            if self._inside is _Inside.TEXT:
                return self._cut(edge.end())
        self._seen = max(self._seen, end - _OVERLAP)
        return None

    def _begin(self, end: int) -> None:
        """Enter the tag that is not whole yet, if enough of it is there to tell its kind."""
        start = self._held.find(b"<", self._seen, end)
        self._seen = end if start < 0 else start
        opening = bytes(self._held[self._seen : min(end, self._seen + len(_CDATA))])
        if opening == _CDATA:
            self._inside = _Inside.CDATA
        elif _CDATA.startswith(opening):
            return
        elif opening.startswith(b"<!"):
            _forbid()
        else:
            is_tag = opening[1:2] != b"?"
            self._inside = _Inside.TAG if is_tag else _Inside.INSTRUCTION
        self._seen += len(opening) if self._inside is _Inside.CDATA else 1

    def _cut(self, end: int) -> bytes:
        tag = bytes(self._held[self._start : end])
        self._start = self._seen = end
        return tag


def check_expat(version: tuple[int, int, int] = xml.parsers.expat.version_info) -> None:
    """See to it that no stanza can hide in another by a fault of libexpat's.

    Args:
      version: Of libexpat; Python comes with its own, or uses the system's.

    Raises:
      SyncdError: It is too old; the administrator must update it.
    """
    if version < MIN_EXPAT:
        raise SyncdError(
            f"libexpat {'.'.join(map(str, version))} is too old to read XMPP with: its known "
            f"holes are closed in {'.'.join(map(str, MIN_EXPAT))}",
            hint="update libexpat, or Python if that brings its own",
        )


class StreamParser:
    """Turns the bytes of one stream into its header, its top-level elements and its footer.

    After STARTTLS and after SASL the stream starts anew, and so must its parser.

    Args:
      max_stanza: Limit for one top-level element, and for the header, bytes.

    Raises:
      SyncdError: There is no parser here that could be trusted; see `check_expat`.
    """

    def __init__(self, *, max_stanza: int = MAX_STANZA) -> None:
        check_expat()
        self._max_stanza = max_stanza
        self._events: list[Opened | Element | Closed | Malformed] = []
        self._path: list[Element] = []  # from the top-level element to the open one
        self._opened = self._done = False
        self._cutter = _Cutter()
        self._size = 0  # bytes given to expat of what is not complete
        self._elements = 0  # in the stanza so far
        self._names: dict[str, str] = {}  # expat's to ours; expat keeps as many
        self._known = self._replayed = 0  # of them, before this stanza; before the first
        self._root = ""  # the name of the header
        self._prefixes: dict[str | None, str | None] = {}  # what it declares
        self._expat = self._new_expat()

    def feed(self, data: bytes) -> list[Opened | Element | Closed | Malformed]:
        """Take what has arrived.

        Args:
          data: Any cut of the stream's bytes.

        Returns:
          What these bytes complete. `Malformed` is always the last, and final.
        """
        if self._done:
            return []
        self._cutter.put(data)
        try:
            self._advance()
        except _RefusedError as refused:
            self._end(refused.malformed)
        except xml.parsers.expat.ExpatError as error:
            self._end(_malformed(error))
        events, self._events = self._events, []
        return events

    def _advance(self) -> None:
        while not self._done:
            if not self._path and not self._skip_space():
                return
            room = self._max_stanza - self._size
            several = _STANZA
            if self._path:
                several = _MANY if self._path[0].tag in _STANZAS else _ONE
            tags = self._cutter.take(room, several)
            if tags is None:
                if len(self._cutter) > room:
                    raise _RefusedError(
                        "policy-violation", f"a stanza over {self._max_stanza} bytes"
                    )
                return
            self._size += len(tags)
            self._expat.Parse(tags, False)
            if not self._path and self._opened:
                self._size, self._known = 0, len(self._names)
                if self._known - self._replayed > MAX_NAMES and not self._done:
                    self._expat = self._new_expat()

    def _skip_space(self) -> bool:
        """Skip what stands between stanzas; whether something follows that may be one.

        Whatever else it is, and not even a stream (an alert of TLS, an answer of HTTP), is
        told by its first byte: its sender waits for us, and no ">" will come.
        """
        head = self._cutter.skip_space()
        while head and not self._opened and not self._size and _BOM.startswith(head):
            # COMPAT(servers): a mark of the byte order, which RFC 6120 section 11.6 forbids.
            if head != _BOM:
                return False
            self._cutter.skip(len(_BOM))
            head = self._cutter.skip_space()
        if not self._opened and (head[:1] in (b"\0", b"\xfe", b"\xff") or head[:2] == b"<\0"):
            # Expat finds UTF-16 out by itself, whatever it was told; RFC 6120 section 11.6
            # knows UTF-8 only.
            raise _RefusedError("unsupported-encoding", "bytes that are no UTF-8")
        if head and not head.startswith(b"<"):
            if self._opened and head >= b" ":
                raise _RefusedError("bad-format", "text between stanzas")
            raise _RefusedError("not-well-formed", "bytes that are no XML")
        return bool(head)

    def _end(self, event: Closed | Malformed) -> None:
        self._events.append(event)
        self._done = True
        self._cutter = _Cutter()  # what came behind it is not kept

    def _new_expat(self) -> xml.parsers.expat.XMLParserType:
        """Make a parser that stands between stanzas, or before the header."""
        # "}" cannot occur in a name, so "uri}name" needs only its first brace. None: no
        # intern dictionary, it would grow with every distinct string.
        new = xml.parsers.expat.ParserCreate("UTF-8", "}", None)
        # COMPAT(expat >= 2.6): may hold a complete stanza back until more bytes come.
        if hasattr(new, "SetReparseDeferralEnabled"):
            new.SetReparseDeferralEnabled(False)
        new.buffer_text = True
        # Prefixes are told as well, since a name with another prefix is another one to keep.
        new.namespace_prefixes = True
        self._names.clear()
        if self._opened:
            new.Parse(self._header(), False)
            self._names.update((f"xmlns:{prefix}", "") for prefix in self._prefixes)
        self._known = self._replayed = len(self._names)
        new.StartNamespaceDeclHandler = self._on_prefix
        new.XmlDeclHandler = self._on_declaration
        new.StartElementHandler = self._on_start
        new.EndElementHandler = self._on_end
        new.CharacterDataHandler = self._on_text
        for forbidden in (
            "StartDoctypeDeclHandler",
            "EntityDeclHandler",
            "ProcessingInstructionHandler",
            "CommentHandler",
            "SkippedEntityHandler",
            "UnparsedEntityDeclHandler",
        ):
            setattr(new, forbidden, _forbid)
        return new

    def _header(self) -> str:
        """A header that means to what stands behind it what the other end's own meant."""
        declared = (
            f" {f'xmlns:{prefix}' if prefix else 'xmlns'}='{_escape(uri or '')}'"
            for prefix, uri in self._prefixes.items()
        )
        return f"<{self._root}{''.join(declared)}>"

    def _on_declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.upper() != "UTF-8":
            raise _RefusedError("unsupported-encoding", f"encoding {encoding[:40]}")

    def _on_prefix(self, prefix: str | None, uri: str | None) -> None:
        if not self._opened:
            self._prefixes[prefix] = uri
        name = f"xmlns:{prefix}"
        if name not in self._names:
            self._learn(name)

    def _learn(self, name: str) -> str:
        """The ``{namespace}name`` of a name of expat's that is new to it."""
        if len(name) > MAX_NAME:
            raise _RefusedError("policy-violation", f"a name over {MAX_NAME} characters")
        if len(self._names) - self._known >= MAX_NAMES:
            raise _RefusedError("policy-violation", f"over {MAX_NAMES} new names in a stanza")
        self._names[name] = tag = _clark(name)
        return tag

    def _on_start(self, name: str, attributes: dict[str, str]) -> None:
        if len(attributes) > MAX_ATTRIBUTES:
            raise _RefusedError("policy-violation", f"over {MAX_ATTRIBUTES} attributes")
        learned = self._names
        tag = learned.get(name) or self._learn(name)
        attributes = {
            learned.get(key) or self._learn(key): value for key, value in attributes.items()
        }
        if not self._opened:
            self._opened = True
            if tag != STREAM:
                raise _RefusedError("bad-format", f"the root element is {tag[:80]}")
            _, _, prefix = name.removeprefix(f"{NS_STREAMS}}}").partition("}")
            self._root = f"{prefix}:stream" if prefix else "stream"
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
            self._events.append(element)

    def _on_text(self, text: str) -> None:
        if not self._path:
            # Only <![CDATA[]]> leads here, see _skip_space.
            if text.strip(_SPACE):
                raise _RefusedError("bad-format", "text between stanzas")
            return
        element = self._path[-1]
        if len(element):
            element[-1].tail = (element[-1].tail or "") + text
        else:
            element.text = (element.text or "") + text


def _forbid(*_: object) -> NoReturn:
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


class Outgoing:
    """What is to be written to a stream: whole elements, so that each may be the last."""

    def __init__(self) -> None:
        self._queue: deque[bytes] = deque()
        self._first = b""
        self._size = 0

    def __len__(self) -> int:
        """How many bytes wait."""
        return self._size

    def put(self, data: bytes) -> None:
        """Add an element, or several, behind all others."""
        self._queue.append(data)
        self._size += len(data)

    def put_first(self, data: bytes) -> None:
        """Put an element in front of all others, and in the place of the last that was."""
        self._size += len(data) - len(self._first)
        self._first = data

    def take(self, most: int | None = None) -> bytes:
        """Take all, or only as many as make up so many bytes."""
        parts, taken = [self._first], len(self._first)
        self._first = b""
        while self._queue and (most is None or taken < most):
            parts.append(self._queue.popleft())
            taken += len(parts[-1])
        self._size -= taken
        return b"".join(parts)


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
# XML 1.0 section 2.2: what cannot be written at all, not even as a reference.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def is_writable(text: str) -> bool:
    """Whether XML can carry this text: no control characters, no lone surrogates."""
    return _ILLEGAL.search(text) is None


def _escape(text: str) -> str:
    if not is_writable(text):
        raise ValueError(f"XML cannot carry {text!r}")
    return text.translate(_ESCAPES)
