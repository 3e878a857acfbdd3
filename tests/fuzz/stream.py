"""One target for all that a server or a peer can say: the parser, the stream, the readers.

From the command line, for as long as wanted; each failure is shrunk, and printed with what is
needed to see it again::

    python -m tests.fuzz.stream --seconds 3600 [--seed 7]

`one_input` is the same for a fuzzer that knows bytes only, such as atheris, which is used by
``--atheris`` where it is installed.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, XMLPullParser

from hypothesis import strategies as st

from syncd.bytestreams import s5b
from syncd.errors import RemoteProtocolError, StanzaError
from syncd.link.contacts import Contacts
from syncd.transfer import schema, si
from syncd.xmpp import caps, disco
from syncd.xmpp.jid import JID
from syncd.xmpp.stanza import (
    IQ,
    PRESENCE,
    make_error_reply,
    read_error,
    read_from,
    read_iq,
    read_limits,
    read_stream_error,
)
from syncd.xmpp.stream import (
    Bound,
    ClientStream,
    KeyWanted,
    Resumed,
    StanzaReceived,
    State,
    StreamEnded,
    TLSWanted,
)
from syncd.xmpp.xml import Closed, Malformed, Opened, StreamParser, namespace, serialise
from tests.fuzz import loop
from tests.support.wire import (
    AUTHENTICATION,
    BIND_FEATURE,
    C_AUTH,
    C_BIND,
    C_HEADER,
    C_HEADER_SECURE,
    C_STARTTLS,
    LOGIN,
    MANAGED_LOGIN,
    NONCE,
    PASSWORD,
    S_BIND_FEATURES,
    S_BOUND,
    S_CHALLENGE,
    S_ENABLED,
    S_FOOTER,
    S_HEADER,
    S_PROCEED,
    S_STARTTLS_FEATURES,
    S_SUCCESS,
    SM_FEATURE,
    STARTTLS_FEATURE,
    ack,
    cut,
    features,
    mechanisms,
    new_stream,
    resumed,
    sasl,
    told,
    tree,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

S_MECHANISMS = features(mechanisms("SCRAM-SHA-1", "PLAIN"))

# What the login of RFC 5802 section 5 derives from the password.
KEY = hashlib.pbkdf2_hmac(
    "sha1", PASSWORD.encode(), base64.b64decode("QSXCR+Q6sek8bf92"), 4_096
)

# How a stream comes to where the input begins; None is the parser alone.
STARTS: dict[str, str | None] = {
    "parser": None,
    "header": f"C: {C_HEADER_SECURE}",
    "features": f"C: {C_HEADER_SECURE}\nS: {S_HEADER}",
    "starttls": f"C: {C_HEADER}\nS: {S_HEADER}{S_STARTTLS_FEATURES}\nC: {C_STARTTLS}",
    "auth": f"C: {C_HEADER_SECURE}\nS: {S_HEADER}{S_MECHANISMS}\nC: {C_AUTH}",
    "key": f"{C_HEADER_SECURE}\nS: {S_HEADER}{S_MECHANISMS}\nS: {S_CHALLENGE}",
    "after auth": f"{AUTHENTICATION}\nS: {S_HEADER}",
    "bind": f"{AUTHENTICATION}\nS: {S_HEADER}{S_BIND_FEATURES}\nC: {C_BIND}",
    "open": LOGIN,
    "managed": MANAGED_LOGIN,
}

OFFER = si.Offer(sid="a", name="b", size=5, methods=(si.BYTESTREAMS, si.IBB), ranged=True)
STREAMHOSTS = (s5b.Streamhost(JID.parse("a@b/c"), "192.0.2.1", 5),)
INFO = disco.make_info(disco.Identity("client", "pc", "x"), ["urn:a", "urn:b"])
PAYLOADS = (
    serialise(si.make_offer(OFFER)).decode(),
    serialise(si.make_answer(si.Answer(method=si.IBB, offset=3), OFFER)).decode(),
    serialise(si.make_finish(si.Finish(sid="a", size=3, digest=b"x" * 32))).decode(),
    serialise(si.make_receipt(si.Finish(sid="a", size=3, digest=b"x" * 32))).decode(),
    serialise(s5b.make_query("a", STREAMHOSTS)).decode(),
    serialise(s5b.make_used("a", STREAMHOSTS[0].jid)).decode(),
    serialise(INFO).decode(),
    "<query xmlns='http://jabber.org/protocol/disco#items'><item jid='a.b'/></query>",
    "<open xmlns='http://jabber.org/protocol/ibb' block-size='4096' sid='a'/>",
    "<error type='wait'><gone xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>",
    f"{serialise(caps.make_caps(INFO)).decode()}<priority>5</priority>",
)
# Whole pieces of conversations, in and out of turn.
PIECES = (
    S_HEADER,
    S_STARTTLS_FEATURES,
    S_MECHANISMS,
    features(BIND_FEATURE, SM_FEATURE, STARTTLS_FEATURE),
    S_PROCEED,
    S_CHALLENGE,
    S_SUCCESS,
    S_BOUND,
    S_ENABLED,
    S_FOOTER,
    ack(1),
    ack(2**32),
    resumed(0),
    "<r xmlns='urn:xmpp:sm:3'/>",
    "<failed xmlns='urn:xmpp:sm:3' h='1'/>",
    sasl("challenge", f"r={NONCE}x,s=QSXC,i=4096"),
    "<failure xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><not-authorized/></failure>",
    "<stream:error><conflict xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error>",
    *(f"<iq type='set' id='a' from='bob@example.org/pc'>{each}</iq>" for each in PAYLOADS),
    *(f"<iq type='result' id='a' from='bob@example.org/pc'>{each}</iq>" for each in PAYLOADS),
    *(f"<presence from='bob@example.org/pc'>{each}</presence>" for each in PAYLOADS),
)
# What means something to XML or to a reader.
MARKUP = (
    "<iq> </iq> <iq ' \" > /> < <a/> </a> <a> x <![CDATA[ ]]> <!-- --> <?x ?> <!D &lt; & ; &#0;"
    " &#x1F600; <presence> <message> </message > = \ufeff \u00e4 \0 \x1b \ud7ff \U0010ffff \n"
)
VALUES = (
    "type='set' type='' id='' id='a' from='@' from='a@b/c' sid='' size='-1' offset='9' -1 0 1e9"
    " +5 18446744073709551616 3.5 0x1 1_0 \u0663"
)
TOKENS = (
    *MARKUP.split(" "),
    *VALUES.split(" "),
    " ",
    " xmlns=''",
    " xmlns:a='urn:a'",
    " xmlns:xsi='http://www.w3.org/2001/XMLSchema-instance' xsi:type='xs:int'",
    "<fast xmlns='http://affinix.com/jabber/stream'/>",
    "x" * 300,
    "<a>" * 40,
)


# Attributes of any element, whether it has them already or not.
ATTRIBUTES = (
    " a='1'",
    " xmlns='urn:a'",
    " xml:lang='de'",
    " type='error'",
    " from='user@example.org'",
    " xmlns:xsi='http://www.w3.org/2001/XMLSchema-instance' xsi:type='xs:int'",
    " xmlns:xsi='http://www.w3.org/2001/XMLSchema-instance' xsi:nil='true'",
)
START_TAG = re.compile(r"<[a-z][^<>]*?(?=/?>)")
COUNT = re.compile(rb"<a xmlns='urn:xmpp:sm:3' h='(\d+)'/>")


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A piece of a conversation with something put in, cut out, or doubled."""
    text = draw(st.sampled_from(PIECES))
    for _ in range(draw(st.integers(0, 3))):
        ends = [match.end() for match in START_TAG.finditer(text)]
        in_tag = draw(st.booleans())
        if in_tag and ends:
            end = draw(st.sampled_from(ends))
            new = draw(st.sampled_from([*ATTRIBUTES, *(f">{each}" for each in PAYLOADS)]))
            text = text[:end] + new + text[end + new.startswith(">") :]
        else:
            here = draw(st.integers(0, len(text)))
            there = draw(st.integers(here, min(len(text), here + 12)))
            new = draw(st.sampled_from(["", *TOKENS, text[here:there] * 2]))
            text = text[:here] + new + text[there:]
    return text


inputs = st.tuples(
    st.one_of(st.sampled_from(["open", "managed"]), st.sampled_from(list(STARTS))),
    st.lists(st.one_of(mutated(), st.sampled_from(TOKENS)), max_size=12).map(
        lambda parts: "".join(parts).encode()
    ),
    st.lists(st.integers(1, 40), max_size=40),
)


def check(start: str, said: bytes, sizes: Sequence[int]) -> None:
    """Say something to a stream, and fail if anything but the promised happens.

    Args:
      start: A key of `STARTS`.
      said: By the server.
      sizes: How it is cut into reads; it is also tried whole and byte by byte.
    """
    run = run_parser if STARTS[start] is None else run_stream
    whole = run(start, cut(said, []))
    assert run(start, cut(said, [1] * len(said))) == whole
    assert run(start, cut(said, sizes)) == whole


def run_parser(_: str, reads: Iterable[bytes]) -> list[object]:
    """Let the parser alone read; what it makes of it."""
    parser = StreamParser(max_stanza=1_000)
    seen: list[object] = []
    for data in reads:
        events = parser.feed(data)
        assert len(parser._cutter) <= 1_000
        ended = bool(seen) and isinstance(seen[-1], Closed | Malformed)
        assert not (ended and events)
        for event in events:
            assert not (seen and isinstance(seen[-1], Closed | Malformed))
            assert isinstance(event, Opened) == (not seen) or isinstance(event, Malformed)
            seen.append(tree(event) if isinstance(event, Element) else event)
    return seen


def run_stream(start: str, reads: Iterable[bytes]) -> list[object]:
    """Let a stream read; what it made of it, and what it answered.

    It ends where the stream begins anew or waits for its driver: what was read together with
    that is dropped, or answered later, so there the reads do matter.
    """
    script = STARTS[start]
    assert script is not None
    stream = new_stream(secure=start != "starttls")
    begin(stream, script)
    parser = stream._parser
    contacts = Contacts([JID.parse("bob@example.org")], required=frozenset(), preferred="")
    seen: list[object] = []
    out, length = b"", 0
    for data in reads:
        length += len(data)
        for event in stream.receive_data(data):
            assert not (seen and str(seen[-1]).startswith("ended")), "an event behind the end"
            seen += told([event])
            match event:
                case KeyWanted(key):
                    assert 4_096 <= key.iterations <= 1_000_000
                    return seen
                case StanzaReceived(stanza):
                    seen += read(stanza, contacts)
                case TLSWanted() | Bound() | Resumed() | StreamEnded():
                    pass
        out += stream.data_to_send()
        assert len(out) <= 2_000 + 50 * length
        if stream._parser is not parser or stream.state is State.TLS:
            break
    assert_well_formed(out)
    # Of our counts (XEP-0198) the last stands for all that were asked for in one read, and in
    # front of what else that led to; so the reads do not change the last of all.
    counts = [int(count) for count in COUNT.findall(out)]
    assert counts == sorted(counts)
    return [*seen, counts[-1:], COUNT.sub(b"", out)]


def begin(stream: ClientStream, script: str) -> None:
    """Lead a stream through a script like `play` does, only faster."""
    for line in filter(None, map(str.strip, script.splitlines())):
        who, _, text = line.partition(": ")
        if who == "S":
            for event in stream.receive_data(text.encode()):
                if isinstance(event, KeyWanted):
                    stream.key_derived(KEY)
    stream.data_to_send()


def assert_well_formed(out: bytes) -> None:
    """Read what the stream sent as a server would, with a parser that is not ours."""
    for part in out.split(b"<?xml version='1.0'?>"):
        server: XMLPullParser[Element] = XMLPullParser()
        if not part.startswith(b"<stream:stream"):
            server.feed(C_HEADER)
        server.feed(part)


# What reads a payload, and the only errors with which it may refuse.
Errors = tuple[type[Exception], ...]
READERS: tuple[tuple[Callable[[Element], object], Errors], ...] = (
    (si.read_offer, (StanzaError,)),
    (lambda e: si.read_answer(e, OFFER), (RemoteProtocolError,)),
    (si.read_finish, (StanzaError,)),
    (si.read_receipt, (RemoteProtocolError,)),
    (s5b.read_query, (StanzaError,)),
    (lambda e: s5b.read_used(e, STREAMHOSTS), (RemoteProtocolError,)),
    (s5b.read_addresses, (RemoteProtocolError,)),
    (disco.read_info, ()),
    (disco.read_items, ()),
    (caps.verification, ()),
    (lambda e: caps.Capabilities().answered(None, e), ()),
    (read_limits, ()),
    (read_stream_error, ()),
    (read_from, (StanzaError,)),
    (lambda e: schema.check(e) if namespace(e.tag) in schema._FILES else None, (StanzaError,)),
)


def read(stanza: Element, contacts: Contacts) -> list[object]:
    """Give a stanza to all who read stanzas; what they made of it."""
    results: list[object] = [attempt(read_from, stanza, (StanzaError,))]
    results.append(attempt(caps.read_caps, stanza, ()))
    results.append(attempt(read_error, stanza, ()))
    if stanza.tag == PRESENCE:
        results.append(attempt(contacts.presence_received, stanza, (StanzaError,)))
        assert len(contacts.online()) <= 1
    if stanza.tag == IQ:
        results.append(attempt(read_iq, stanza, (StanzaError,)))
        refusal = make_error_reply(stanza, read_error(stanza))
        assert len(serialise(refusal)) <= 10_000 + 10 * len(serialise(stanza))
    for child in stanza:
        results += [attempt(reader, child, errors) for reader, errors in READERS]
    return results


def attempt(reader: Callable[[Element], object], element: Element, errors: Errors) -> str:
    """What a reader makes of an element, or why it refuses."""
    try:
        return type(reader(element)).__name__
    except errors as refused:
        text = str(refused)
    assert len(text) <= 2_000
    return text


def one_input(data: bytes) -> None:
    """The same for a fuzzer that makes bytes: where to begin, the reads, what is said."""
    names = list(STARTS)
    if len(data) >= 4:
        check(names[data[0] % len(names)], data[4:], [size + 1 for size in data[1:4]] * 20)


if __name__ == "__main__":
    loop.run(__doc__, inputs, lambda drawn: check(*drawn), one_input)
