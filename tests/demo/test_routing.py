"""Where stanzas go, with sessions that only remember what they were sent."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from syncd.demo import routing
from syncd.demo.faults import Faults, payload
from syncd.demo.presence import Session
from syncd.demo.routing import Router, make_info
from syncd.errors import ErrorType, StanzaError
from syncd.xmpp.jid import JID
from syncd.xmpp.sm import StreamManagement
from syncd.xmpp.stanza import IQ, read_error
from syncd.xmpp.xml import NS_CLIENT, make, serialise

if TYPE_CHECKING:
    from collections.abc import Callable
    from xml.etree.ElementTree import Element

    from syncd.xmpp.stanza import Iq

PROXY = JID("", "proxy.demo.example")
PING = "{urn:xmpp:ping}ping"


def parse(text: str) -> Element:
    return ET.fromstring(f"<stream xmlns='{NS_CLIENT}'>{text}</stream>")[0]


class World:
    """A router with clients, and what each has heard since last asked."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.changes = 0
        self.offers: list[str] = []
        self.router = Router(
            "demo.example",
            {"alice": {"bob": "both"}, "bob": {"alice": "both"}, "carol": {}},
            components={PROXY: self._component},
            inspect_offer=self._inspect,
            faults=self.faults,
            later=lambda seconds, call: self.timers.append((seconds, call)),
            token=lambda: "token",
            changed=self._changed,
        )
        self._heard: dict[JID, list[bytes]] = {}
        self.ended: list[tuple[str, str]] = []

    def _component(self, iq: Iq, sender: JID) -> Element | None:
        if iq.type == "set":
            raise StanzaError(ErrorType.AUTH, "forbidden")
        return make("{test}from", {"jid": str(sender)})

    def _inspect(self, iq: Iq, sender: JID, to: JID) -> None:
        assert iq.payload is not None
        self.offers.append(f"{sender} -> {to}: {iq.payload.tag}")
        if iq.payload.tag == "{test}bad":
            raise StanzaError(ErrorType.CANCEL, "not-allowed")

    def _changed(self) -> None:
        self.changes += 1

    def join(self, jid: str, priority: int | None = None) -> Session:
        address = JID.parse(jid)
        session = self.router.bind(
            address.bare,
            address.resource,
            send=lambda data: self._heard.setdefault(address, []).append(data),
            end=lambda condition: self.ended.append((jid, condition)),
            cut=lambda: None,
        )
        if priority is not None:
            text = f"<presence><priority>{priority}</priority></presence>"
            self.say(session, text)
            self._heard.clear()
        return session

    def say(self, session: Session, text: str) -> list[Element]:
        """Let a client send, and give what it is answered."""
        stanza = parse(text)
        self.router.route(session, stanza)
        return self.heard(session)

    def heard(self, session: Session) -> list[Element]:
        return [parse(stanza.decode()) for stanza in self._heard.pop(session.jid, [])]

    def condition(self, session: Session, text: str) -> str:
        """The condition of the only answer, which must be an error to the only request."""
        (reply,) = self.say(session, text)
        assert (reply.get("type"), reply.get("to")) == ("error", str(session.jid))
        return read_error(reply).condition


@pytest.fixture
def world() -> World:
    return World()


def request(to: str | None, tag: str = PING, kind: str = "get") -> str:
    attributes = {"type": kind, "id": "1", "to": to}
    return serialise(make(IQ, attributes, make(tag))).decode()


def test_an_iq_goes_to_its_full_address_with_its_senders(world: World) -> None:
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    assert world.say(alice, request("bob@demo.example/b")) == []
    (arrived,) = world.heard(bob)
    assert (arrived.get("from"), arrived.get("id")) == ("alice@demo.example/a", "1")
    assert arrived[0].tag == PING
    result = "<iq type='result' id='1' to='alice@demo.example/a'/>"
    world.say(bob, result)
    (answer,) = world.heard(alice)
    assert (answer.get("type"), answer.get("from")) == ("result", "bob@demo.example/b")


@pytest.mark.parametrize(
    ("to", "condition"),
    [
        ("bob@demo.example/elsewhere", "service-unavailable"),
        ("nobody@demo.example/x", "service-unavailable"),
        ("bob@demo.example", "service-unavailable"),
        ("nobody@demo.example", "service-unavailable"),
        ("demo.example/x", "service-unavailable"),
        ("other.demo.example", "remote-server-not-found"),
        ("bob@elsewhere.example/b", "remote-server-not-found"),
        ("@", "jid-malformed"),
    ],
)
def test_requests_that_reach_nobody(world: World, to: str, condition: str) -> None:
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b", 0)
    assert world.condition(alice, request(to)) == condition
    assert world.heard(bob) == []


@pytest.mark.parametrize("kind", ["result", "error"])
@pytest.mark.parametrize("to", ["bob@demo.example/x", "demo.example", None, "@", "x.example"])
def test_an_answer_is_never_answered(world: World, kind: str, to: str | None) -> None:
    alice = world.join("alice@demo.example/a")
    assert world.say(alice, request(to, kind=kind)) == []


@pytest.mark.parametrize(
    "text",
    [
        "<iq type='get' to='demo.example'><ping xmlns='urn:xmpp:ping'/></iq>",
        "<iq type='take' id='1'><ping xmlns='urn:xmpp:ping'/></iq>",
        "<iq type='get' id='1'/>",
        "<iq type='set' id='1' to='bob@demo.example/b'><a/><b/></iq>",
    ],
)
def test_malformed_requests_are_refused(world: World, text: str) -> None:
    alice, _ = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    assert world.condition(alice, text) == "bad-request"


@pytest.mark.parametrize(
    ("to", "tag"),
    [
        (None, PING),
        ("alice@demo.example", PING),
        ("demo.example", PING),
        ("demo.example", "{http://jabber.org/protocol/disco#info}query"),
        (None, "{http://jabber.org/protocol/disco#info}query"),
        ("demo.example", "{http://jabber.org/protocol/disco#items}query"),
        (None, "{http://jabber.org/protocol/disco#items}query"),
        (None, "{jabber:iq:roster}query"),
    ],
)
def test_what_the_server_answers(world: World, to: str | None, tag: str) -> None:
    alice = world.join("alice@demo.example/a")
    (reply,) = world.say(alice, request(to, tag))
    assert (reply.get("type"), reply.get("id")) == ("result", "1")
    assert reply.get("from") == (to or "alice@demo.example")
    assert [child.tag for child in reply] == ([] if tag == PING else [tag])


def test_the_old_session_is_granted(world: World) -> None:
    alice = world.join("alice@demo.example/a")
    tag = "{urn:ietf:params:xml:ns:xmpp-session}session"
    (reply,) = world.say(alice, request(None, tag, "set"))
    assert reply.get("type") == "result"


@pytest.mark.parametrize("to", [None, "alice@demo.example", "demo.example"])
def test_the_server_knows_no_more(world: World, to: str | None) -> None:
    alice = world.join("alice@demo.example/a")
    assert world.condition(alice, request(to, "{test}other")) == "service-unavailable"


def test_the_servers_items_are_its_components(world: World) -> None:
    alice = world.join("alice@demo.example/a")
    ns = "http://jabber.org/protocol/disco#items"
    (reply,) = world.say(alice, request("demo.example", f"{{{ns}}}query"))
    items = [item.get("jid") for item in reply.iter(f"{{{ns}}}item")]
    assert items == ["proxy.demo.example"]


def test_components_answer_for_themselves(world: World) -> None:
    alice = world.join("alice@demo.example/a")
    (reply,) = world.say(alice, request("proxy.demo.example", "{test}q"))
    assert (reply.get("from"), reply[0].get("jid")) == (str(PROXY), "alice@demo.example/a")
    assert (
        world.condition(alice, request("proxy.demo.example", "{test}q", "set")) == "forbidden"
    )


def test_who_lies_about_its_address_is_thrown_out(world: World) -> None:
    alice = world.join("alice@demo.example/a")
    for text in ("bob@demo.example/b", "@"):
        world.say(alice, f"<message from='{text}' to='bob@demo.example'/>")
    assert world.ended == [("alice@demo.example/a", "invalid-from")] * 2
    world.say(alice, "<presence from='ALICE@demo.example'/>")
    world.say(alice, "<presence from='alice@demo.example/a'/>")
    assert len(world.ended) == 2


def test_requests_between_clients_are_inspected_and_may_be_refused(world: World) -> None:
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    world.say(alice, request("bob@demo.example/b", "{test}good", "set"))
    assert len(world.heard(bob)) == 1
    bad = request("bob@demo.example/b", "{test}bad", "set")
    assert world.condition(alice, bad) == "not-allowed"
    assert world.heard(bob) == []
    way = "alice@demo.example/a -> bob@demo.example/b"
    assert world.offers == [f"{way}: {{test}}good", f"{way}: {{test}}bad"]


@pytest.mark.parametrize(
    ("to", "kind", "expected"),
    [
        ("bob@demo.example/minus", "chat", ["minus"]),
        ("bob@demo.example", "chat", ["plus"]),
        ("bob@demo.example/gone", "normal", ["plus"]),
        ("bob@demo.example/gone", "headline", []),
        ("bob@demo.example", "headline", ["plus"]),
        ("bob@demo.example/gone", "error", []),
        ("carol@demo.example", "error", []),
        ("carol@demo.example", "headline", []),
    ],
)
def test_messages(world: World, to: str, kind: str, expected: list[str]) -> None:
    alice = world.join("alice@demo.example/a")
    bobs = [world.join("bob@demo.example/plus", 1), world.join("bob@demo.example/minus", -1)]
    assert world.say(alice, f"<message to='{to}' type='{kind}'/>") == []
    assert [bob.jid.resource for bob in bobs if world.heard(bob)] == expected


@pytest.mark.parametrize(
    ("to", "kind", "condition"),
    [
        ("carol@demo.example", "chat", "service-unavailable"),
        ("bob@demo.example", "groupchat", "service-unavailable"),
        ("carol@elsewhere.example", "chat", "remote-server-not-found"),
    ],
)
def test_messages_that_reach_nobody(world: World, to: str, kind: str, condition: str) -> None:
    alice, _ = world.join("alice@demo.example/a"), world.join("bob@demo.example/b", 0)
    assert world.condition(alice, f"<message to='{to}' type='{kind}'/>") == condition


def test_a_message_without_addressee_is_for_oneself(world: World) -> None:
    alice = world.join("alice@demo.example/a", 0)
    assert [stanza.tag for stanza in world.say(alice, "<message/>")] == [
        f"{{{NS_CLIENT}}}message"
    ]


def test_a_taken_resource_goes_to_the_newcomer(world: World) -> None:
    old, bob = world.join("alice@demo.example/a", 0), world.join("bob@demo.example/b", 0)
    new = world.join("alice@demo.example/a")
    assert world.ended == [("alice@demo.example/a", "conflict")]
    assert world.router.sessions.get(new.jid) is new
    assert [p.get("type") for p in world.heard(bob)] == ["unavailable"]
    world.router.unbind(old)
    assert world.router.sessions.get(new.jid) is new


def test_a_resource_is_made_up_or_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = JID.parse("alice@demo.example")

    def bind(resource: str) -> Session:
        return world.router.bind(
            account, resource, send=lambda _: None, end=lambda _: None, cut=lambda: None
        )

    assert bind("").jid == account.with_resource("token")
    with pytest.raises(StanzaError) as caught:
        bind("\x07")
    assert caught.value.condition == "bad-request"
    monkeypatch.setattr(routing, "MAX_RESOURCES", 1)
    with pytest.raises(StanzaError) as caught:
        bind("another")
    assert caught.value.condition == "resource-constraint"


def test_the_end_is_told_unless_it_is_to_be_forgotten(world: World) -> None:
    alice, bob = world.join("alice@demo.example/a", 0), world.join("bob@demo.example/b", 0)
    world.router.unbind(alice)
    assert [p.get("type") for p in world.heard(bob)] == ["unavailable"]
    alice = world.join("alice@demo.example/a", 0)
    world.faults.forget_presence = True
    world.router.unbind(alice)
    assert world.heard(bob) == []
    assert world.router.sessions.get(alice.jid) is None


def test_stanzas_are_dropped_doubled_and_delayed(world: World) -> None:
    alice, bob = world.join("alice@demo.example/a"), world.join("bob@demo.example/b")
    text = request("bob@demo.example/b")
    world.faults.drop(payload(PING), times=1)
    world.faults.duplicate(payload(PING), times=1)
    world.faults.delay(payload(PING), 3.0, times=1)
    counts = []
    for _ in range(4):
        world.say(alice, text)
        counts.append(len(world.heard(bob)))
    assert counts == [0, 2, 0, 1]
    ((seconds, deliver),) = world.timers
    deliver()
    assert (seconds, len(world.heard(bob))) == (3.0, 1)


def test_answers_of_the_server_can_be_dropped_and_delayed(world: World) -> None:
    alice = world.join("alice@demo.example/a")
    server = JID("", "demo.example")
    world.faults.drop(lambda _, sender, __: sender == server, times=1)
    world.faults.delay(lambda _, sender, __: sender == server, 1.0, times=1)
    assert world.say(alice, request("demo.example")) == []
    assert world.say(alice, request("demo.example")) == []
    world.timers[0][1]()
    assert [reply.get("type") for reply in world.heard(alice)] == ["result"]


def test_each_copy_of_a_presence_meets_the_faults(world: World) -> None:
    alice, bob = world.join("alice@demo.example/a", 0), world.join("bob@demo.example/b", 0)
    rule = world.faults.drop(lambda _, __, to: to == bob.jid)
    assert len(world.say(alice, "<presence/>")) == 1
    assert (world.heard(bob), rule.hits) == ([], 1)


def test_a_delayed_presence_of_a_dead_session_is_lost(world: World) -> None:
    alice, bob = world.join("alice@demo.example/a", 0), world.join("bob@demo.example/b", 0)
    world.faults.delay(lambda stanza, _, to: to == bob.jid and not len(stanza), 1.0, times=1)
    world.say(alice, "<presence to='bob@demo.example/b'/>")
    world.router.unbind(alice)
    world.heard(bob)
    world.timers[0][1]()
    assert world.heard(bob) == []


def test_info_names_an_identity_and_the_features() -> None:
    assert serialise(make_info("proxy", "bytestreams", "P", "x")) == (
        b"<query xmlns='http://jabber.org/protocol/disco#info'>"
        b"<identity category='proxy' type='bytestreams' name='P'/>"
        b"<feature var='http://jabber.org/protocol/disco#info'/><feature var='x'/></query>"
    )


def test_who_waits_is_told_of_every_change(world: World) -> None:
    alice = world.join("alice@demo.example/a", 0)
    assert world.changes == 2
    world.router.unbind(alice)
    assert world.changes == 3


# Sessions that outlive their connection (XEP-0198)


class Link:
    """One connection of a session, as the router sees it."""

    def __init__(self, managed: StreamManagement) -> None:
        self.heard: list[bytes] = []
        self.ends: list[str] = []
        self.replaced = 0
        self.managed = managed

    def take_over(self) -> None:
        self.replaced += 1

    def session(self, account: JID) -> Session:
        return Session(
            account,
            self.heard.append,
            self.ends.append,
            lambda: None,
            self.take_over,
            lambda: self.managed,
        )

    def bind(self, world: World, jid: str) -> Session:
        address = JID.parse(jid)
        ours = self.session(address)
        return world.router.bind(
            address.bare,
            address.resource,
            send=ours.send,
            end=ours.end,
            cut=ours.cut,
            replaced=ours.replaced,
            managed=ours.managed,
        )


def managed(jid: str, ident: str) -> StreamManagement:
    kept = StreamManagement(JID.parse(jid))
    kept.id = ident
    return kept


def test_a_session_is_handed_over(world: World) -> None:
    kept = managed("alice@demo.example/a", "s1")
    old, new = Link(kept), Link(kept)
    session = old.bind(world, "alice@demo.example/a")
    account = session.jid.bare
    bob = world.join("bob@demo.example/b")
    handed = world.router.resume(account, "s1", new.session(account))
    assert handed == (session, kept)
    assert (old.replaced, new.replaced) == (1, 0)
    world.say(bob, "<message to='alice@demo.example/a'/>")
    assert (len(old.heard), len(new.heard)) == (0, 1)


@pytest.mark.parametrize(
    ("ident", "account", "previous"),
    [
        ("s1", "alice@demo.example", "s2"),
        ("s1", "bob@demo.example", "s1"),
        ("", "alice@demo.example", ""),
    ],
)
def test_a_session_that_is_not_there_is_not_handed_over(
    world: World, ident: str, account: str, previous: str
) -> None:
    link = Link(managed("alice@demo.example/a", ident))
    link.bind(world, "alice@demo.example/a")
    world.join("alice@demo.example/unmanaged")
    with pytest.raises(StanzaError, match="no such session"):
        world.router.resume(JID.parse(account), previous, link.session(JID.parse(account)))
    assert link.replaced == 0


def test_fault_forget_sessions(world: World) -> None:
    link = Link(managed("alice@demo.example/a", "s1"))
    session = link.bind(world, "alice@demo.example/a")
    world.faults.forget_sessions = True
    with pytest.raises(StanzaError):
        world.router.resume(session.jid.bare, "s1", link.session(session.jid.bare))


def test_who_never_comes_back_is_gone_and_the_senders_are_told(world: World) -> None:
    kept = managed("alice@demo.example/a", "s1")
    session = Link(kept).bind(world, "alice@demo.example/a")
    bob = world.join("bob@demo.example/b")
    for text in (
        "<iq type='get' id='1' from='bob@demo.example/b'><q xmlns='x'/></iq>",
        "<message id='2' from='bob@demo.example/b'/>",
        "<presence from='bob@demo.example/b'/>",
        "<iq type='result' id='3' from='bob@demo.example/b'/>",
        "<message id='4' from='gone@demo.example/x'/>",
        "<iq type='get' id='5'><q xmlns='x'/></iq>",
    ):
        kept.sent(text.encode())
    world.router.keep(session, 600)
    ((seconds, expire),) = world.timers
    assert seconds == 600
    assert world.heard(bob) == []
    expire()
    assert len(world.router.sessions) == 1
    told = world.heard(bob)
    assert [(e.get("type"), e.get("id"), e.get("from")) for e in told] == [
        ("error", "1", "alice@demo.example/a"),
        ("error", "2", "alice@demo.example/a"),
    ]
    expire()
    assert world.heard(bob) == []


def test_who_comes_back_in_time_stays(world: World) -> None:
    kept = managed("alice@demo.example/a", "s1")
    link = Link(kept)
    session = link.bind(world, "alice@demo.example/a")
    world.router.keep(session, 600)
    world.router.resume(session.jid.bare, "s1", link.session(session.jid.bare))
    ((_, expire),) = world.timers
    expire()
    assert len(world.router.sessions) == 1
