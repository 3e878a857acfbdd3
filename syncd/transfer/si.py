"""Stream initiation for files: offer, answer (XEP-0095, XEP-0096, XEP-0020). Sans-IO.

Between two syncds the offer also carries a childless ``<sync/>``, and when all bytes are out
the sender asks for the receipt: ``<finish/>`` with the length and the hash of the whole file,
answered by ``<receipt/>`` once the file is durable under its final name. A receipt that was
lost on the way is asked for again with the same question. A childless ``<seal/>`` in offer
and answer says that the bytes are encrypted from end to end; then the hash is as well, in
``<finish/>``, and stands nowhere in the ``<receipt/>``.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from syncd.errors import ErrorType, RemoteProtocolError, StanzaError
from syncd.xmpp.xml import make

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from xml.etree.ElementTree import Element

NS_SI = "http://jabber.org/protocol/si"
NS_FILE = "http://jabber.org/protocol/si/profile/file-transfer"
NS_FEATURE = "http://jabber.org/protocol/feature-neg"
NS_DATA = "jabber:x:data"
NS_SYNC = "urn:syncd:sync:1"
NS_SEAL = "urn:syncd:seal:1"
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
SEAL = f"{{{NS_SEAL}}}seal"

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
# A public key of the hybrid KEM in base64 has 1,624, what is sealed by it 1,600; the rest is
# short.
MAX_SEAL = 4_096  # characters of one attribute

# xs:integer; longer ones are larger than any file.
_INTEGER = re.compile(r"[ \t\r\n]*[+-]?[0-9]{1,24}[ \t\r\n]*")
_MD5 = re.compile(r"[0-9a-f]{32}")
_MD5_OF_NOTHING = "d41d8cd98f00b204e9800998ecf8427e"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """What one syncd tells another about an offered file.

    Attributes:
      folder: Id of the folder, the same at both ends; empty for the inbox.
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
      md5: Of the whole file, 32 hexadecimal digits in lower case, or empty.
      date: Time of the last change as XEP-0082 writes it, or empty; not looked at.
      sync: Present between two syncds.
      seal: Attributes of ``<seal/>``; None if the bytes are not sealed.
    """

    sid: str
    name: str
    size: int | None
    methods: tuple[str, ...]
    ranged: bool = False
    md5: str = ""
    date: str = ""
    sync: Sync | None = None
    seal: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the receiver takes.

    Attributes:
      method: One of the offered.
      offset: Where to begin, bytes.
      length: How much is wanted from there, bytes; None: all the rest.
      seal: Attributes of ``<seal/>``; None if the bytes are not sealed.
    """

    method: str
    offset: int = 0
    length: int | None = None
    seal: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The sender has sent everything; also the answer, when the file is durable.

    Attributes:
      sid: Of the offer.
      size: Length of the whole file, bytes.
      digest: BLAKE3 of the whole file, 32 bytes; empty if it must not be seen.
      seal: Attributes that stand there instead of the digest; None if the bytes were not
        sealed.
      beside: Of a receipt: another file stands where this one was to go, and both are kept.
    """

    sid: str
    size: int
    digest: bytes = b""
    seal: Mapping[str, str] | None = None
    beside: bool = False


def make_offer(offer: Offer) -> Element:
    """Build the ``<si/>`` of an offer.

    COMPAT(Smack, XMPPFramework, iris): ``<file/>`` then ``<feature/>``, one list-single field,
    name and size always there (0 too: Openfire refuses an offer without); many parsers go by
    position and crash on less, and on white space.
    """
    options = [make(OPTION, None, make(VALUE, text=method)) for method in offer.methods]
    field = make(FIELD, {"var": "stream-method", "type": "list-single"}, *options)
    si = make(
        SI,
        {"id": offer.sid, "profile": NS_FILE, "mime-type": "application/octet-stream"},
        make(
            FILE,
            {
                "name": offer.name,
                "size": offer.size,
                "hash": offer.md5 or None,
                "date": offer.date or None,
            },
            *([make(RANGE)] if offer.ranged else []),
        ),
        make(FEATURE, None, make(X, {"type": "form"}, field)),
    )
    if offer.sync is not None:
        sync = offer.sync
        si.append(
            make(SYNC, {"folder": sync.folder, "path": sync.path, "mtime-ns": sync.mtime_ns})
        )
    if offer.seal is not None:
        si.append(make(SEAL, dict(offer.seal)))
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
    size, md5 = _read_size(file.get("size")), _read_md5(file.get("hash", ""))
    if size is None and md5 == _MD5_OF_NOTHING:
        # COMPAT(QXmpp): a size of 0 is left out, and the stream then never ends. Smack leaves
        # it out as well, but gives no hash; there the stream ends at once.
        size = 0
    return Offer(
        sid=sid,
        name=name,
        size=size,
        methods=methods,
        ranged=file.find(RANGE) is not None,
        md5=md5,
        date=file.get("date", "")[:40],
        sync=_read_sync(si.find(SYNC)),
        seal=_read_seal(si),
    )


def folder_of(si: Element) -> str:
    """The id of the folder that an offer is for; empty if it names none.

    All that must be known of an offer to tell whether its sender may make one: nothing else
    of it has to be right for that.
    """
    sync = si.find(SYNC)
    return "" if sync is None else sync.get("folder", "")[: MAX_FOLDER + 1]


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


def _read_md5(text: str) -> str:
    # One that is no MD5 proves nothing, and is no reason to refuse the file.
    text = text.strip().lower()
    return text if _MD5.fullmatch(text) else ""


def _read_seal(si: Element) -> Mapping[str, str] | None:
    seal = si.find(SEAL)
    if seal is None:
        return None
    if any(len(value) > MAX_SEAL for value in seal.attrib.values()):
        raise _bad("a <seal/> that is too long")
    return dict(seal.attrib)


def _read_sync(sync: Element | None) -> Sync | None:
    if sync is None:
        return None
    folder, path = sync.get("folder", ""), sync.get("path", "")
    if len(folder) > MAX_FOLDER or not 0 < len(path) <= MAX_NAME:
        raise _bad("a <sync/> needs a path, and at most the id of a folder")
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
    COMPAT(Smack >= 4.4): a field that does not say its type counts as text there, and is not
    understood as a choice.
    COMPAT(Gajim): it ignores a length, so none is asked for.
    """
    attributes = {"var": "stream-method", "type": "list-single"}
    field = make(FIELD, attributes, make(VALUE, text=answer.method))
    si = make(SI, None, make(FEATURE, None, make(X, {"type": "submit"}, field)))
    if answer.offset:
        assert offer.ranged, "only a ranged offer can be answered with an offset"
        si.append(make(FILE, None, make(RANGE, {"offset": answer.offset})))
    if answer.seal is not None:
        si.append(make(SEAL, dict(answer.seal)))
    return si


def read_answer(si: Element | None, offer: Offer) -> Answer:
    """Read the answer to our offer.

    COMPAT(Smack <= 4.3): answers with two values; what we offered first counts, and it opens
    its ears for either.

    Raises:
      RemoteProtocolError: It chooses nothing that was offered, or an impossible range.
    """
    values = _offered_methods(si) if si is not None else ()
    chosen = [method for method in offer.methods if method in values]
    if si is None or not chosen:
        raise RemoteProtocolError("the peer accepted the file but chose no way to get it")
    span = si.find(f"{FILE}/{RANGE}")
    offset = _number(span.get("offset", "0")) if span is not None else 0
    end = MAX_SIZE if offer.size is None else offer.size
    if offset is None or not 0 <= offset <= end:
        raise RemoteProtocolError("the peer asks for a part of the file that does not exist")
    length = _read_length(span, end - offset)
    try:
        seal = _read_seal(si)
    except StanzaError as error:
        raise RemoteProtocolError(f"the peer answered with {error.text}") from error
    return Answer(method=chosen[0], offset=offset, length=length, seal=seal)


def _read_length(span: Element | None, left: int) -> int | None:
    if span is None or span.get("length") is None:
        return None
    length = _number(span.get("length", ""))
    if length is None or length < 0:
        raise RemoteProtocolError("the peer asks for a part of the file that does not exist")
    # Kopete asks for all the rest in numbers; who asks for more than there is gets what is.
    return None if length >= left else length


def make_finish(finish: Finish) -> Element:
    """Build the question for the receipt."""
    return _make_end(FINISH, finish)


def make_receipt(receipt: Finish) -> Element:
    """Build the receipt: this file is durable here."""
    return _make_end(RECEIPT, receipt)


def read_finish(element: Element) -> Finish:
    """Read the question for a receipt.

    Raises:
      StanzaError: It is malformed.
    """
    finish = _read_end(element)
    if finish is None:
        raise _bad("a <finish/> needs sid, size, and either blake3 or sealed and signature")
    return finish


def read_receipt(element: Element | None) -> Finish:
    """Read a receipt.

    Raises:
      RemoteProtocolError: It is none.
    """
    receipt = _read_end(element) if element is not None and element.tag == RECEIPT else None
    if receipt is None:
        raise RemoteProtocolError("the peer's receipt is malformed")
    return receipt


def _make_end(tag: str, finish: Finish) -> Element:
    attributes: dict[str, str | int | None] = {
        "sid": finish.sid,
        "size": finish.size,
        "blake3": base64.b64encode(finish.digest).decode() or None,
        **(finish.seal or {}),
        "beside": "true" if finish.beside else None,
    }
    return make(tag, attributes)


def _read_end(element: Element) -> Finish | None:
    sid, hashed = element.get("sid", ""), element.get("blake3")
    # The hash in one way and not in the other: nobody shall have to choose which one counts.
    sealed = {"sealed", "signature"} if element.tag == FINISH else {"signature"}
    seal = {name: element.attrib[name] for name in sealed if name in element.attrib}
    try:
        size = _read_size(element.get("size"))
        digest = base64.b64decode((hashed or "")[:64], validate=True)
    except (StanzaError, ValueError):  # ValueError: no base64, or not even ASCII
        return None
    if size is None or not 0 < len(sid) <= MAX_SID:
        return None
    if hashed is not None and (len(digest) != 32 or seal):
        return None
    if hashed is None and (seal.keys() != sealed or max(map(len, seal.values())) > MAX_SEAL):
        return None
    return Finish(
        sid=sid,
        size=size,
        digest=digest,
        seal=seal or None,
        beside=element.get("beside") == "true",
    )


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
