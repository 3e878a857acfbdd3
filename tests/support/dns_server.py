"""A name server on loopback that knows what the test tells it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import trio

from tests.support.processes import free_ports

# RFC 1035 section 4.2.1: what is longer goes by TCP.
MAX_UDP = 512  # bytes

Zone = Mapping[str, Sequence[str] | dns.rcode.Rcode | None]
"""By name without the final dot: SRV records as text, an error, or None: it stays silent."""


@dataclass
class NameServer:
    """What was asked, and who asks.

    Attributes:
      resolver: Asks this server and no other.
      asked: Names, in order, without the final dot.
    """

    resolver: dns.asyncresolver.Resolver
    asked: list[str] = field(default_factory=list)


def respond(zone: Zone, query: dns.message.Message) -> dns.message.Message | None:
    """The answer to a query; None: no answer."""
    (question,) = query.question
    known = zone.get(
        question.name.to_text(omit_final_dot=True).lower(), dns.rcode.Rcode.NXDOMAIN
    )
    if known is None:
        return None
    response = dns.message.make_response(query)
    if isinstance(known, dns.rcode.Rcode):
        response.set_rcode(known)
    elif known:
        response.answer.append(dns.rrset.from_text_list(question.name, 60, "IN", "SRV", known))
    return response


@asynccontextmanager
async def name_server(zone: Zone) -> AsyncIterator[NameServer]:
    """Serve a zone by UDP, and by TCP on the same port."""
    udp = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    with udp:
        # One of the system's choice is free for UDP, but may be a connection's by TCP.
        (port,) = free_ports(1)
        await udp.bind(("127.0.0.1", port))
        (listener,) = await trio.open_tcp_listeners(port, host="127.0.0.1")
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers = ["127.0.0.1"]
        resolver.port = port
        server = NameServer(resolver)

        async def serve_udp() -> None:
            while True:
                data, sender = await udp.recvfrom(4_096)
                query = dns.message.from_wire(data)
                server.asked.append(query.question[0].name.to_text(omit_final_dot=True))
                response = respond(zone, query)
                if response is None:
                    continue
                if len(response.to_wire()) > MAX_UDP:
                    response.answer.clear()
                    response.flags |= dns.flags.TC
                await udp.sendto(response.to_wire(), sender)

        async def serve_tcp(stream: trio.SocketStream) -> None:
            async with stream:
                data = await stream.receive_some(4_096)
                response = respond(zone, dns.message.from_wire(bytes(data[2:])))
                assert response is not None
                wire = response.to_wire()
                await stream.send_all(len(wire).to_bytes(2, "big") + wire)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_udp)
            nursery.start_soon(trio.serve_listeners, serve_tcp, [listener])
            yield server
            nursery.cancel_scope.cancel()
