"""The gate for requests from peers: our own XSDs, looked at by xmlschema.

It comes behind the parser's limits and before our own reading, and is never the only check.
The schemas of the XEPs themselves cannot serve: that of XEP-0095 does not load, that of
XEP-0096 refuses valid offers and allows negative sizes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from syncd.errors import ErrorType, StanzaError
from syncd.xmpp.xml import local_name, namespace

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    import xmlschema

_FILES = {
    "http://jabber.org/protocol/si": "si.xsd",
    "http://jabber.org/protocol/bytestreams": "bytestreams.xsd",
    "urn:syncd:sync:1": "sync.xsd",
}


@functools.cache
def _schema(name: str) -> xmlschema.XMLSchema:
    # Imported late: 0.2 s and 26 MiB, which the start of the daemon need not wait for.
    import xmlschema

    directory = Path(__file__).with_name("xsd")
    return xmlschema.XMLSchema(directory / name, allow="local", defuse="always")


def warm_up() -> None:
    """Load all schemas; blocks for a fraction of a second."""
    for name in _FILES.values():
        _schema(name)


def check(payload: Element) -> None:
    """Check the payload of a request.

    Args:
      payload: An ``<si/>``, a bytestream's ``<query/>``, or an element of our own.

    Raises:
      StanzaError: bad-request, with the reason: the peer broke the protocol.
    """
    schema = _schema(_FILES[namespace(payload.tag)])
    error = next(schema.iter_errors(payload), None)
    if error is not None:
        where = local_name(error.elem.tag) if error.elem is not None else "it"
        reason = " ".join((error.reason or error.message).split())[:200]
        raise StanzaError(ErrorType.MODIFY, "bad-request", f"<{where}/>: {reason}")
