"""The gate for requests from peers: our own XSDs, looked at by xmlschema.

It comes behind the parser's limits and before our own reading, and is never the only check.
The schemas of the XEPs themselves cannot serve: that of XEP-0095 does not load, that of
XEP-0096 refuses valid offers and allows negative sizes.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from syncd.errors import ErrorType, StanzaError
from syncd.xmpp.xml import local_name, namespace

if TYPE_CHECKING:
    import xmlschema

_FILES = {
    "http://jabber.org/protocol/si": "si.xsd",
    "http://jabber.org/protocol/bytestreams": "bytestreams.xsd",
    "http://jabber.org/protocol/ibb": "ibb.xsd",
    "urn:syncd:sync:1": "sync.xsd",
}


# Real offers have 20 to 40, the longest lists of streamhosts some 130. Xmlschema takes 10 to 25
# us for each, also of those that no schema knows, and meanwhile nobody else is answered.
MAX_PARTS = 512  # elements and attributes of one payload

# Attributes with which a document tells its validator what to do: another type, other schemas.
_INSTRUCTIONS = "{http://www.w3.org/2001/XMLSchema-instance}"

# Where xmlschema's own objects lie in our memory, which its reasons tell, is nobody's business.
_ADDRESS = re.compile(r"(?: for)? <\S+ object at 0x[0-9a-f]+>")


@functools.cache
def _schema(name: str) -> xmlschema.XMLSchema:
    # Imported late: 0.2 s and 26 MiB, which the start of the daemon need not wait for.
    import xmlschema

    directory = Path(__file__).with_name("xsd")
    # No fallback: a peer that names XHTML shall not make it load the schemas of XHTML.
    return xmlschema.XMLSchema(
        directory / name, allow="local", defuse="always", use_fallback=False
    )


def warm_up() -> None:
    """Load all schemas; blocks for a fraction of a second."""
    for name in _FILES.values():
        _schema(name)


def check(payload: Element) -> None:
    """Check the payload of a request.

    Args:
      payload: An ``<si/>``, the ``<query/>`` or ``<open/>`` of a bytestream, or an element of
        our own.

    Raises:
      StanzaError: bad-request, with the reason: the peer broke the protocol.
    """
    parts = 0
    for element in payload.iter():
        parts += 1 + len(element.attrib)
        if parts > MAX_PARTS:
            raise _bad(payload, f"over {MAX_PARTS} elements and attributes")
        if any(name.startswith(_INSTRUCTIONS) for name in element.attrib):
            raise _bad(element, "an attribute that is for documents")
    schema = _schema(_FILES[namespace(payload.tag)])
    error = next(schema.iter_errors(payload), None)
    if error is not None:
        found = error.elem if isinstance(error.elem, Element) else payload
        raise _bad(found, error.reason or error.message)


def _bad(element: Element, reason: str) -> StanzaError:
    reason = " ".join(_ADDRESS.sub("", reason).split())
    text = f"<{local_name(element.tag)[:40]}/>: {reason[:200]}"
    return StanzaError(ErrorType.MODIFY, "bad-request", text)
