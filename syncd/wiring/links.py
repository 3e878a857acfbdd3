"""Joins the layers, which know nothing of each other, for one configuration.

The stream, the folders, the transfers and the keys each know only what they are handed: here
they are handed each other, as plain callables.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import syncd
from syncd.bytestreams import ibb, s5b
from syncd.bytestreams.discovery import Discovery, MemoryFile
from syncd.bytestreams.inband import BOUNDED, Inband
from syncd.bytestreams.outgoing import Requester
from syncd.bytestreams.proxies import Proxies
from syncd.control.escape import printable
from syncd.disk.partial import Identity
from syncd.errors import DeclinedError, OfflineError, StanzaError
from syncd.link import keyring
from syncd.link.client import Client
from syncd.link.connect import Account, Tokens
from syncd.link.contacts import Contacts
from syncd.sync.engine import Sent
from syncd.sync.journal import OUTSIDE, Arrival
from syncd.sync.plan import FileVersion
from syncd.transfer import pump, schema, si
from syncd.transfer.incoming import NOT_ACCEPTED, Inbox, Known, Present
from syncd.transfer.receiver import Receiver
from syncd.transfer.sender import Sender, Source, Target
from syncd.wiring.addresses import is_ours
from syncd.wiring.allowances import Allowances, Terms
from syncd.wiring.status import peers_of
from syncd.wiring.throttles import Throttles
from syncd.xmpp import disco
from syncd.xmpp.jid import JID

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from xml.etree.ElementTree import Element

    from syncd.bytestreams.sockets import Listener
    from syncd.config import Config
    from syncd.link.session import Handler
    from syncd.sync.engine import Engine
    from syncd.sync.plan import Delivery
    from syncd.transfer.incoming import Arriving, Incoming
    from syncd.transfer.pump import Progress
    from syncd.transfer.sealing import Seals
    from syncd.wiring.status import Transfers
    from syncd.xmpp.stanza import Iq, IqType

log = logging.getLogger("syncd")

IDENTITY = disco.Identity("client", "bot", "syncd")
# What we say we can do, beside in-band bytestreams; each is served by a handler below.
FEATURES = frozenset({si.NS_SI, si.NS_FILE, si.NS_FEATURE, si.BYTESTREAMS, si.NS_SYNC})

# Each costs a question and its refusal; a person has a handful of clients.
MAX_RESOURCES_TRIED = 4  # resources of a peer, in one attempt


class Links:
    """Joins the layers, which know nothing of each other, with plain callables.

    Args:
      config: The user's decisions.
      resource: For our full JID, unless the user fixed one.
      transfers: Where running transfers show themselves.
      seals: Decides what is sealed; None: nothing.
      throttles: Slow transfers down; None: not at all.

    Attributes:
      config: As given.
      peers: All who are configured.
      client: Our side of the stream.
      discovery: Looks for proxies.
      proxies: What is known of them.
      receiver: Takes files.
      sender: Sends them; set when it is known what we listen on.
      engine: Says which; likewise set from outside.
    """

    def __init__(
        self,
        config: Config,
        resource: str,
        transfers: Transfers,
        *,
        seals: Seals | None = None,
        throttles: Throttles | None = None,
    ) -> None:
        self.config = config
        self._seals = seals
        self._throttles = throttles or Throttles()
        self._transfers = transfers
        self._folders = {folder.id: folder for folder in config.folders}
        self._offered: dict[int, Delivery] = {}  # by the id of the source
        self._parallel = {peer.jid: peer.parallel for peer in config.peers}
        self.peers = peers = peers_of(config)
        self.inband = (
            Inband(self._request, max_block=lambda: ibb.MAX_BLOCK)
            if config.bytestreams.ibb
            else None
        )
        self.receiver = Receiver(
            own_jid=self.own_jid,
            inbox_for=self._inbox_for,
            known=self._known,
            arriving=self._arriving,
            watch=self._watch_incoming,
            inband=self.inband,
            throttle=self._throttles.down,
            seals=seals,
            allowance=Allowances(time.monotonic, _terms(config)).of,
            beside=self._beside,
            held=self._held,
            is_there=lambda jid: self.client.contacts.is_there(jid),
        )
        account = config.account
        jid, server = account.jid, account.server
        pin = keyring.read_pin(config.state_dir, jid)
        self.client = Client(
            Account(
                jid=jid if jid.resource else jid.with_resource(resource),
                password=account.password.read,
                server=(server.host, server.port) if server else None,
                tls=account.tls,
                ca_file=account.ca_file,
                allow_plain=account.allow_plain,
                fingerprint=account.certificate_fingerprint,
                least=pin.mechanism,
                sasl2=pin.sasl2,
                # A server that chooses the resource cannot keep the one that the user chose.
                agent="" if jid.resource else keyring.read_agent(config.state_dir),
                keep_agent=partial(keyring.write_agent, config.state_dir),
                tokens=Tokens(
                    read=partial(keyring.read_token, config.state_dir, jid),
                    write=partial(keyring.write_token, config.state_dir),
                ),
            ),
            Contacts(peers, required=si.REQUIRED_FEATURES, preferred=si.NS_SYNC),
            identity=IDENTITY,
            version=syncd.__version__,
            features=FEATURES
            | ({si.IBB} if self.inband else set())
            | ({si.NS_SEAL} if seals is not None and seals.can_seal else set()),
            handlers={
                si.SI: self.receiver.on_offer,
                s5b.TAG: self.receiver.on_bytestream,
                si.FINISH: self.receiver.on_finish,
            }
            | _handlers(self.inband),
            messages={ibb.DATA: self.inband.on_message} if self.inband else {},
            # One block that is refused, while those behind it are taken, ends a stream.
            bounded=BOUNDED,
            changed=self._contacts_changed,
            logged_in=lambda *pin: keyring.write_pin(config.state_dir, jid, keyring.Pin(*pin)),
        )
        self.proxies = Proxies(
            config.bytestreams.proxies, jid.domain, [peer.domain for peer in peers]
        )
        self.discovery = Discovery(
            self.proxies,
            own_domain=jid.domain,
            request=self._request,
            own_jid=self.own_jid,
            wait_online=self.client.wait_online,
            memory=MemoryFile(config.state_dir / "proxies.json"),
        )
        self._since = self.client.since
        self._syncds: frozenset[JID] = frozenset()
        self.engine: Engine
        self.sender: Sender

    def make_sender(self, listener: Listener | None) -> Sender:
        """Make the sending end.

        Args:
          listener: Where targets connect to, or None if direct connections are off.
        """
        return Sender(
            request=self._request,
            own_jid=self.own_jid,
            wait_online=self.client.wait_online,
            requester=Requester(
                request=self._request,
                own_jid=self.own_jid,
                listener=listener,
                advertised=lambda: self._streamhosts(listener) if listener else [],
                proxies=self.proxies,
                prepare=self.discovery.prepare,
            ),
            inband=self.inband,
            watch=self._watch_outgoing,
            throttle=self._throttles.up,
            seals=self._seals,
            answer_timeout=self.config.transfer.answer_timeout,
        )

    async def _request(
        self, kind: IqType, to: JID | None, payload: Element, timeout: float
    ) -> Iq:
        return await self.client.request(kind, to, payload, timeout)

    def own_jid(self) -> JID | None:
        """Our full JID while we are online."""
        return self.client.jid

    def _streamhosts(self, listener: Listener) -> list[tuple[str, int]]:
        """Where targets can connect to: as configured, else our own addresses."""
        advertised = self.config.bytestreams.advertise
        if advertised:
            return [(address.host, address.port or listener.port) for address in advertised]
        return [(host, listener.port) for host in listener.addresses()]

    def network_changed(self) -> None:
        """Go on from another address where the one that it hung on has gone."""
        self.client.network_changed(is_ours)
        if cut := pump.cut_lost(is_ours):
            log.info("%d bytestreams ended with the address that they came from", cut)

    async def send(self, delivery: Delivery) -> Sent:
        """Send one delivery of the engine's."""
        version = delivery.version
        # What a person sends outside any folder is known by its absolute path.
        outside = Path(version.path) if version.folder == OUTSIDE else None
        source = Source(
            root=outside.parent if outside else self._folders[version.folder].path,
            folder=version.folder,
            path=outside.name if outside else version.path,
            version=_identity(version),
        )
        self._offered[id(source)] = delivery
        try:
            return await self._send_to_one(source, delivery)
        finally:
            del self._offered[id(source)]

    async def _send_to_one(self, source: Source, delivery: Delivery) -> Sent:
        """Send to one of the peer's clients."""
        peer = JID.parse(delivery.peer)
        for _ in range(MAX_RESOURCES_TRIED):
            resource = self.client.contacts.choose(peer)
            assert resource.info is not None
            features = resource.info.features
            target = Target(
                jid=resource.jid,
                is_syncd=si.NS_SYNC in features,
                # The seal ends with a receipt, which only <sync/> has.
                can_seal={si.NS_SYNC, si.NS_SEAL} <= features,
            )
            try:
                sent = await self.sender.send(source, target)
            except OfflineError as error:
                if not isinstance(error.__cause__, StanzaError):
                    raise
                # The answer says that this client is not there; perhaps another one is.
                log.info("%s; trying the next client of %s", error, peer)
                self.client.gone(resource)
                continue
            outcome: Literal["delivered", "sent"] = "delivered" if sent.confirmed else "sent"
            where = ", where it is kept beside another file" if sent.beside else ""
            log.info("%s %s to %s%s", outcome, printable(source.path), target.jid, where)
            in_place = sent.confirmed and not sent.beside
            return Sent(outcome=outcome, digest=sent.digest.hex(), in_place=in_place)
        raise OfflineError(f"{peer} is offline, though its server says otherwise")

    def _watch_outgoing(
        self, target: Target, source: Source, progress: Progress
    ) -> contextlib.AbstractContextManager[None]:
        """Show a transfer from here, whose offer the peer has taken."""
        if (delivery := self._offered.get(id(source))) is not None:
            self.engine.answered(delivery)
        return self._transfers.watch(
            "send",
            peer=str(target.jid),
            folder=source.folder,
            path=source.path,
            size=source.version.size,
            progress=progress,
        )

    def _watch_incoming(self, incoming: Incoming) -> contextlib.AbstractContextManager[None]:
        return self._transfers.watch(
            "receive",
            peer=str(incoming.sender),
            folder=incoming.inbox.folder,
            path=incoming.path,
            size=incoming.size or 0,
            progress=incoming.progress,
        )

    def _contacts_changed(self) -> None:
        if self.client.since != self._since:
            self._since = self.client.since
            self.discovery.refresh()
        online = self.client.contacts.online()
        syncds = frozenset(peer for peer in online if self._is_syncd(peer))
        # A peer whose syncd comes while another client of theirs is there has come, too: what
        # is only for a syncd waits for nothing else.
        came, self._syncds = syncds - self._syncds, syncds
        # The engine knows peers as they are configured, a fixed resource included.
        if came:
            self.engine.set_online(frozenset(str(peer) for peer in online - came))
        self.engine.set_online(
            frozenset(str(peer) for peer in online), frozenset(str(peer) for peer in came)
        )

    def _is_syncd(self, peer: JID) -> bool:
        """Whether the client that would be sent to is one."""
        info = self.client.contacts.choose(peer).info
        return info is not None and si.NS_SYNC in info.features

    def limit_of(self, peer: str) -> int:
        """How many deliveries may run to a peer; a client not known to take more gets one."""
        jid = JID.parse(peer)
        try:
            several = self._is_syncd(jid)
        except OfflineError:
            several = False
        if not several:
            return 1
        return self._parallel.get(jid.bare) or self.config.transfer.parallel

    def _inbox_for(self, sender: JID, folder: str) -> Inbox:
        if folder:
            found = self._folders.get(folder)
            if found is not None and sender in found.accept_from:
                return Inbox(
                    root=found.path,
                    folder=folder,
                    portable=found.names == "portable",
                    hidden=found.accept_hidden,
                )
        elif self.config.inbox is not None and sender in self.config.inbox.accept_from:
            return Inbox(root=self.config.inbox.path, folder="")
        raise DeclinedError(NOT_ACCEPTED)

    async def _known(self, inbox: Inbox, path: str) -> Known | None:
        arrival = await self.engine.known_arrival(inbox.folder, path)
        return None if arrival is None else _known(arrival)

    async def _beside(self, inbox: Inbox, path: str) -> list[Present]:
        found = await self.engine.kept_beside(inbox.folder, path)
        return [Present(path=each.version.path, known=_known(each)) for each in found]

    async def _held(self, inbox: Inbox, path: str, sender: JID) -> Identity | None:
        if not inbox.folder:
            return None  # nothing goes out from the inbox
        version = await self.engine.held(inbox.folder, path, str(sender))
        return None if version is None else _identity(version)

    async def _arriving(self, arriving: Arriving) -> None:
        known = arriving.known
        version = FileVersion(
            folder=arriving.inbox.folder,
            path=arriving.path,
            size=known.identity.size,
            mtime_ns=known.identity.mtime_ns,
            inode=known.identity.inode,
        )
        await self.engine.arriving(
            Arrival(
                version=version,
                peer=str(known.peer),
                digest=known.digest.hex(),
                source_size=known.source_size,
                source_mtime_ns=known.source_mtime_ns,
                source_path=arriving.source_path,
            )
        )


def _terms(config: Config) -> dict[JID, Terms]:
    return {
        peer.jid: Terms(max_file=peer.max_file, quota=peer.quota, max_files=peer.max_files)
        for peer in config.peers
    }


def _known(arrival: Arrival) -> Known:
    return Known(
        peer=JID.parse(arrival.peer),
        identity=_identity(arrival.version),
        source_size=arrival.source_size,
        source_mtime_ns=arrival.source_mtime_ns,
        digest=bytes.fromhex(arrival.digest),
    )


def _identity(version: FileVersion) -> Identity:
    return Identity(version.size, version.mtime_ns, version.inode)


def kept_name(file: Path, make: Callable[[], str]) -> str:
    """A name that is made once and stays ours.

    Args:
      file: Where it is kept.
      make: Makes one, of letters, digits and dashes.
    """
    try:
        name = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        name = ""
    if not re.fullmatch("[A-Za-z0-9-]{1,64}", name):
        name = make()
        # Where it cannot be kept, another one is made next time.
        with contextlib.suppress(OSError):
            file.write_text(f"{name}\n", encoding="ascii")
    return name


def _handlers(inband: Inband | None) -> dict[str, Handler]:
    """What answers the requests of in-band bytestreams."""
    if inband is None:
        return {}

    def on_open(iq: Iq) -> Awaitable[None]:
        # Who is not expected is refused without the work of the schema.
        if iq.payload is not None and inband.expects(iq.sender, iq.payload.get("sid", "")):
            schema.check(iq.payload)
        return inband.on_open(iq)

    return {ibb.OPEN: on_open, ibb.DATA: inband.on_data, ibb.CLOSE: inband.on_close}


def new_resource() -> str:
    """A resource for our full JID."""
    # ASCII, because clients hash it in different encodings.
    return f"syncd-{secrets.token_hex(4)}"
