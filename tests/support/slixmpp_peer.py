"""Another client: a program on slixmpp that sends and takes files, told by lines of JSON.

::

    python -m tests.support.slixmpp_peer JID PASSWORD HOST PORT CA_FILE DIRECTORY

Each line of its input is a file to send: ``to``, ``file``, ``name``, ``method`` ("s5b" or
"ibb"). Whatever is offered to it lands in the directory, under a number. Each line of its
output tells of something that has ended; see `Ended`. When its input ends, it logs out.

It runs on asyncio, and so in a process of its own. It takes slixmpp as it is, for the errors
of another client are what it is there for, but for three that keep its file transfer from
working at all: the handler of offers is a coroutine that nobody awaits, so is the acceptance,
and the ways offered must be given as the options of a form.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any, TypedDict

import slixmpp
from slixmpp.xmlstream.handler import CoroutineCallback
from slixmpp.xmlstream.matcher import StanzaPath

S5B = "http://jabber.org/protocol/bytestreams"
IBB = "http://jabber.org/protocol/ibb"
METHODS = {"s5b": S5B, "ibb": IBB}

# Nobody is asked here, and the other end is a program too.
ANSWER_TIMEOUT = 30  # seconds


class Ended(TypedDict):
    """What it tells.

    Attributes:
      event: ``online``, ``sent``, ``received`` or ``failed``.
      name: Of the file, as offered.
      file: Where it lies.
      size: As offered, bytes.
      md5: As offered, or empty.
      method: ``s5b`` or ``ibb``.
      port: Of the streamhost; 0 for in-band bytestreams.
      why: In the words of slixmpp, of what failed.
    """

    event: str
    name: str
    file: str
    size: int
    md5: str
    method: str
    port: int
    why: str


def tell(event: str, **more: object) -> None:
    """Say that something has ended."""
    ended = Ended(event=event, name="", file="", size=0, md5="", method="", port=0, why="")
    print(json.dumps({**ended, **more}), flush=True)  # noqa: T201 - for whoever started us


class Peer(slixmpp.ClientXMPP):
    """One account, logged in.

    Args:
      jid: Its full JID.
      password: Of the account.
      ca_file: Who signed the server's certificate.
      directory: For what it receives.
    """

    def __init__(self, jid: str, password: str, ca_file: str, directory: Path) -> None:
        super().__init__(jid, password)
        self.ca_certs = Path(ca_file)
        self._directory = directory
        self._count = 0
        for plugin in ("xep_0030", "xep_0096", "xep_0199"):
            self.register_plugin(plugin)
        self._offers: Any = self.plugin["xep_0095"]
        self._files: Any = self.plugin["xep_0096"]
        self._socks: Any = self.plugin["xep_0065"]
        self.remove_handler("SI Request")
        self.register_handler(
            CoroutineCallback(
                "SI Request", StanzaPath("iq@type=set/si"), self._offers._handle_request
            )
        )
        self.add_event_handler("session_start", self._start)
        self.add_event_handler("si_request", self._offered)

    async def _start(self, _: object) -> None:
        self.send_presence()
        await self.get_roster()
        tell("online")

    # --- As receiver

    async def _offered(self, iq: Any) -> None:
        sid, sender = iq["si"]["id"], iq["from"]
        offered = iq["si"]["file"]
        self._count += 1
        file = self._directory / f"{self._count}"
        told = {
            "name": offered["name"],
            "size": int(offered["size"]),
            "md5": offered["hash"],
            "file": str(file),
        }
        opened = asyncio.get_running_loop().create_future()
        await self._offers.accept(
            sender, sid, ifrom=iq["to"], stream_handler=lambda stream: _take(stream, opened)
        )
        method, port, ended, data = await opened
        await ended
        file.write_bytes(data)
        tell("received", method=method, port=port, **told)

    # --- As sender

    async def send_file(self, to: str, file: str, name: str, method: str) -> None:
        """Offer a file, and send it as the receiver has answered."""
        told: dict[str, object] = {"name": name, "file": file, "method": method}
        try:
            data = await asyncio.to_thread(Path(file).read_bytes)
            md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
            sid = self.new_id()
            answer = await self._files.request_file_transfer(
                to,
                sid=sid,
                name=name,
                size=len(data),
                hash=md5,
                methods=[{"value": METHODS[method]}],
                timeout=ANSWER_TIMEOUT,
            )
            chosen = answer["si"]["feature_neg"]["form"].get_values()["stream-method"]
            assert chosen == METHODS[method], chosen
            port = await (self._send_s5b if method == "s5b" else self._send_ibb)(to, sid, data)
        except Exception as error:
            tell("failed", why=repr(error), **told)
        else:
            tell("sent", size=len(data), md5=md5, port=port, **told)

    async def _send_s5b(self, to: str, sid: str, data: bytes) -> int:
        stream = await self._socks.handshake(to, sid=sid, timeout=ANSWER_TIMEOUT)
        assert stream is not None, "no streamhost"
        port: int = stream.transport.get_extra_info("peername")[1]
        await stream.write(data)
        # What is still in the buffer goes out first.
        stream.transport.close()
        return port

    async def _send_ibb(self, to: str, sid: str, data: bytes) -> int:
        stream = await self.plugin["xep_0047"].open_stream(
            slixmpp.JID(to), sid=sid, timeout=ANSWER_TIMEOUT
        )
        await stream.sendall(data, timeout=ANSWER_TIMEOUT)
        await stream.close(timeout=ANSWER_TIMEOUT)
        return 0


def _take(stream: Any, opened: asyncio.Future[tuple[Any, ...]]) -> None:
    """Collect what comes over a stream; said is where, when it ends, and the bytes."""
    data = bytearray()
    ended = asyncio.get_running_loop().create_future()
    if not hasattr(stream, "transport"):
        client = stream.xmpp

        def more(of: Any) -> None:
            if of is stream:
                data.extend(stream.read())

        def closed(of: Any) -> None:
            if of is stream and not ended.done():
                client.del_event_handler("ibb_stream_data", more)
                client.del_event_handler("ibb_stream_end", closed)
                ended.set_result(None)

        client.add_event_handler("ibb_stream_data", more)
        client.add_event_handler("ibb_stream_end", closed)
        opened.set_result(("ibb", 0, ended, data))
        return

    # slixmpp does not say to which of its streams an event belongs, so this one gets its own.
    def heard(event: str, what: Any) -> None:
        if event == "socks5_data":
            data.extend(what)
        elif event == "socks5_closed" and not ended.done():
            ended.set_result(None)

    stream.event = heard
    port = stream.transport.get_extra_info("peername")[1]
    opened.set_result(("s5b", port, ended, data))


async def _run(jid: str, password: str, host: str, port: str, ca: str, directory: str) -> None:
    peer = Peer(jid, password, ca, Path(directory))
    peer.connect(host, int(port))
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    sending = set()
    while line := await lines.readline():
        task = asyncio.create_task(peer.send_file(**json.loads(line)))
        sending.add(task)
        task.add_done_callback(sending.discard)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(peer.disconnect(), ANSWER_TIMEOUT)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(_run(*sys.argv[1:]))
