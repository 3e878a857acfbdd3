"""Requests under way, and what the server at the other end does with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from syncd.errors import SyncdError
from syncd.xmpp.disco import PING
from syncd.xmpp.stanza import ERROR, Iq

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from syncd.link.client import Client
    from syncd.link.session import Session
    from syncd.xmpp.jid import JID
    from tests.support.wire import Server


class Asked:
    """A request under way."""

    def __init__(self) -> None:
        self._done = trio.Event()
        self._outcome: Iq | SyncdError

    async def ask(
        self, who: Session | Client, to: JID | None, payload: Element, timeout: float
    ) -> None:
        try:
            self._outcome = await who.request("get", to, payload, timeout)
        except SyncdError as error:
            self._outcome = error
        self._done.set()

    async def answer(self) -> Iq:
        """Wait for the answer; raise the error if it is one."""
        await self._done.wait()
        if isinstance(self._outcome, SyncdError):
            raise self._outcome
        return self._outcome

    @property
    def done(self) -> bool:
        return self._done.is_set()


async def but_pings(server: Server) -> Element:
    """Read the next stanza that is no ping of the keep-alive; answer those."""
    while True:
        stanza = await server.stanza()
        if stanza.find(PING) is None:
            return stanza
        await server.answer(stanza)


def condition(stanza: Element) -> str:
    """The type and condition of a refusal."""
    error = stanza.find(ERROR)
    assert error is not None
    return f"{error.get('type')} {error[0].tag.partition('}')[2]}"


def refusal(request: Element, kind: str, name: str) -> str:
    """The server's refusal of a request."""
    origin = f" from='{request.get('to')}'" if request.get("to") else ""
    return (
        f"<iq type='error' id='{request.get('id')}'{origin}><error type='{kind}'>"
        f"<{name} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>"
    )


# Requests and their answers
