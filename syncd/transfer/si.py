"""Stream initiation for files: offer, answer (XEP-0095, XEP-0096, XEP-0020). Sans-IO.

Between two syncds the offer also carries a childless ``<sync/>``, and when all bytes are out
the sender asks for the receipt: ``<finish/>`` with the length and the hash of the whole file,
answered by ``<receipt/>`` once the file is durable under its final name. A receipt that was
lost on the way is asked for again with the same question.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.errors import ErrorType, RemoteProtocolError, StanzaError
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import Sequence
    from xml.etree.ElementTree import Element

NS_SI = "http://jabber.org/protocol/si"
NS_FILE = "http://jabber.org/protocol/si/profile/file-transfer"
NS_FEATURE = "http://jabber.org/protocol/feature-neg"
NS_DATA = "jabber:x:data"
NS_SYNC = "urn:syncd:sync:1"
# The two methods (XEP-0096 section 3.1).
BYTESTREAMS = "http://jabber.org/protocol/bytestreams"
IBB = "http://jabber.org/protocol/ibb"

SI = f"{{{NS_SI}}}si"
FILE = f"{{{NS_FILE}}}file"
RANGE = f"{{{NS_FILE}}}range"
DESC = f"{{{NS_FILE}}}desc"
FEATURE = f"{{{NS_FEATURE}}}feature"
X = f"{{{NS_DATA}}}x"
FIELD = f"{{{NS_DATA}}}field"
OPTION = f"{{{NS_DATA}}}option"
VALUE = f"{{{NS_DATA}}}value"
SYNC = f"{{{NS_SYNC}}}sync"
FINISH = f"{{{NS_SYNC}}}finish"
RECEIPT = f"{{{NS_SYNC}}}receipt"

# What a peer must tell by disco#info before it gets an offer (XEP-0095 section 3.1).
REQUIRED_FEATURES = frozenset({NS_SI, NS_FILE})

# The largest offset that the kernel takes.
MAX_SIZE = 2**63 - 1  # bytes
# Ours have 32; the longest of a real client's has 36. ejabberd's proxy takes 128.
MAX_SID = 128  # characters
# PATH_MAX; one component is checked where it becomes a path.
MAX_NAME = 4_096  # characters
# Folder ids are at most this long in the configuration.
MAX_FOLDER = 64  # characters
# A client offers 2 methods; gloox 3 and an empty one.
MAX_METHODS = 16  # options

# xs:integer; longer ones are larger than any file.
_INTEGER = re.compile(r"[ \t\r\n]*[+-]?[0-9]{1,24}[ \t\r\n]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """What one syncd tells another about an offered file.

    Attributes:
      folder: Id of the folder, the same at both ends.
      path: Path below the folder, ``/`` between the components; not yet safe to use.
      mtime_ns: Time of the last change, nanoseconds since 1970.
    """

    folder: str
    path: str
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a sender proposes (XEP-0096 section 3).

    Attributes:
      sid: Also the sid of the bytestream that follows.
      name: File name as sent; not yet safe to use as a path.
      size: Length of the whole file, bytes; None if the sender does not say.
      methods: Namespaces of the bytestreams that the sender can do, in its order.
      ranged: The sender can begin in the middle.
      sync: Present between two syncds.
    """

    sid: str
    name: str
    size: int | None
    methods: tuple[str, ...]
    ranged: bool = False
    sync: Sync | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the receiver takes.

    Attributes:
      method: One of the offered.
      offset: Where to begin, bytes.
    """

    method: str
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The sender has sent everything; also the answer, when the file is durable.

    Attributes:
      sid: Of the offer.
      size: Length of the whole file, bytes.
      digest: BLAKE3 of the whole file, 32 bytes.
    """

    sid: str
    size: int
    digest: bytes


def make_offer(offer: Offer) -> Element:
    """Build the ``<si/>`` of an offer.

    COMPAT(Smack, XMPPFramework, iris): ``<file/>`` then ``<feature/>``, one list-single field,
    name and size always there; many parsers go by position and crash on less.
    """
    options = [make(OPTION, None, make(VALUE, text=method)) for method in offer.methods]
    field = make(FIELD, {"var": "stream-method", "type": "list-single"}, *options)
    si = make(
        SI,
        {"id": offer.sid, "profile": NS_FILE, "mime-type": "application/octet-stream"},
        make(
            FILE,
            {"name": offer.name, "size": offer.size},
            *([make(RANGE)] if offer.ranged else []),
        ),
        make(FEATURE, None, make(X, {"type": "form"}, field)),
    )
    if offer.sync is not None:
        sync = offer.sync
        si.append(
            make(SYNC, {"folder": sync.folder, "path": sync.path, "mtime-ns": sync.mtime_ns})
        )
    return si


def read_offer(si: Element) -> Offer:
    """Read the ``<si/>`` of an offer; what we do not know is ignored.

    Raises:
      StanzaError: It cannot be accepted, with the condition that XEP-0095 wants.
    """
    if si.get("profile") != NS_FILE:
        raise _bad("only files are taken here", app="bad-profile")
    sid, file = si.get("id", ""), si.find(FILE)
    if not 0 < len(sid) <= MAX_SID:
        raise _bad("an offer needs an id")
    if file is None:
        raise _bad("an offer needs a <file/>")
    name = file.get("name", "")
    if not 0 < len(name) <= MAX_NAME:
        raise _bad("an offer needs a file name")
    methods = _offered_methods(si)
    if not methods:
        raise _bad("an offer needs a stream method", app="no-valid-streams")
    return Offer(
        sid=sid,
        name=name,
        # COMPAT(Smack, QXmpp): a size of 0 is left out.
        size=_read_size(file.get("size")),
        methods=methods,
        ranged=file.find(RANGE) is not None,
        sync=_read_sync(si.find(SYNC)),
    )


def _offered_methods(si: Element) -> tuple[str, ...]:
    # COMPAT(QXmpp, gloox, gabble): by namespace and name only; types are missing or wrong,
    # an empty value is none.
    values = [
        (value.text or "").strip()
        for field in si.iterfind(f"{FEATURE}/{X}/{FIELD}")
        if field.get("var") == "stream-method"
        for value in field.iter(VALUE)
    ]
    return tuple(value for value in values[:MAX_METHODS] if value)


def _read_sync(sync: Element | None) -> Sync | None:
    if sync is None:
        return None
    folder, path = sync.get("folder", ""), sync.get("path", "")
    if not 0 < len(folder) <= MAX_FOLDER or not 0 < len(path) <= MAX_NAME:
        raise _bad("a <sync/> needs folder and path")
    return Sync(folder=folder, path=path, mtime_ns=_read_time(sync.get("mtime-ns", "")))


def _read_time(text: str) -> int:
    value = _number(text)
    # A time before 1970 or beyond 2262 is a clock gone wrong; no file system agrees on it.
    if value is None or not 0 <= value <= MAX_SIZE:
        raise _bad("mtime-ns must be nanoseconds since 1970")
    return value


def make_answer(answer: Answer, offer: Offer) -> Element:
    """Build the ``<si/>`` that accepts an offer.

    COMPAT(Smack, XMPPFramework): ``<file/>`` in the result is fatal to them, so it is there
    only to begin in the middle, and only if ``<range/>`` was offered; ``<feature/>`` first.
    """
    field = make(FIELD, {"var": "stream-method"}, make(VALUE, text=answer.method))
    si = make(SI, None, make(FEATURE, None, make(X, {"type": "submit"}, field)))
    if answer.offset:
        assert offer.ranged, "only a ranged offer can be answered with an offset"
        si.append(make(FILE, None, make(RANGE, {"offset": answer.offset})))
    return si


def read_answer(si: Element | None, offer: Offer) -> Answer:
    """Read the answer to our offer.

    COMPAT(Smack <= 4.3): answers with two values; the first that we offered counts.

    Raises:
      RemoteProtocolError: It chooses nothing that was offered, or an impossible range.
    """
    values = _offered_methods(si) if si is not None else ()
    chosen = [value for value in values if value in offer.methods]
    if si is None or not chosen:
        raise RemoteProtocolError("the peer accepted the file but chose no way to get it")
    span = si.find(f"{FILE}/{RANGE}")
    offset = _number(span.get("offset", "0")) if span is not None else 0
    end = MAX_SIZE if offer.size is None else offer.size
    if offset is None or not 0 <= offset <= end:
        raise RemoteProtocolError("the peer asks for a part of the file that does not exist")
    return Answer(method=chosen[0], offset=offset)


def make_finish(finish: Finish) -> Element:
    """Build the question for the receipt."""
    return _make_digest(FINISH, finish)


def make_receipt(receipt: Finish) -> Element:
    """Build the receipt: this file is durable here."""
    return _make_digest(RECEIPT, receipt)


def read_finish(element: Element) -> Finish:
    """Read the question for a receipt.

    Raises:
      StanzaError: It is malformed.
    """
    digest = _read_digest(element)
    if digest is None:
        raise _bad("a <finish/> needs sid, size and blake3")
    return digest


def read_receipt(element: Element | None) -> Finish:
    """Read a receipt.

    Raises:
      RemoteProtocolError: It is none.
    """
    digest = _read_digest(element) if element is not None and element.tag == RECEIPT else None
    if digest is None:
        raise RemoteProtocolError("the peer's receipt is malformed")
    return digest


def _make_digest(tag: str, finish: Finish) -> Element:
    blake3 = base64.b64encode(finish.digest).decode()
    return make(tag, {"sid": finish.sid, "size": finish.size, "blake3": blake3})


def _read_digest(element: Element) -> Finish | None:
    sid = element.get("sid", "")
    try:
        size = _read_size(element.get("size"))
        digest = base64.b64decode(element.get("blake3", "")[:64], validate=True)
    except (StanzaError, ValueError):  # ValueError: no base64, or not even ASCII
        return None
    if size is None or len(digest) != 32 or not 0 < len(sid) <= MAX_SID:
        return None
    return Finish(sid=sid, size=size, digest=digest)


def choose_method(offer: Offer, ours: Sequence[str]) -> str:
    """Pick the method: the first of ours that the sender can do as well.

    Raises:
      StanzaError: There is none (XEP-0095 section 4.2).
    """
    for method in ours:
        if method in offer.methods:
            return method
    raise _bad("none of these stream methods works here", app="no-valid-streams")


def _read_size(text: str | None) -> int | None:
    """Read a length; None if there is none that can be read.

    Raises:
      StanzaError: It is negative, or larger than any file.
    """
    size = _number(text) if text is not None else None
    if size is not None and not 0 <= size <= MAX_SIZE:
        raise _bad(f"a size of {size} bytes")
    return size


def _number(text: str) -> int | None:
    # Not by int() alone, which also takes 1_000 and the digits of every script.
    return int(text) if _INTEGER.fullmatch(text) else None


def _bad(text: str, *, app: str = "") -> StanzaError:
    # XEP-0095 section 4.2: bad-request with si's own condition where there is one.
    kind = ErrorType.CANCEL if app == "no-valid-streams" else ErrorType.MODIFY
    return StanzaError(kind, "bad-request", text, app=f"{{{NS_SI}}}{app}" if app else "")
