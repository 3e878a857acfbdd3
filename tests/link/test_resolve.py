"""Against a real name server on loopback."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import TYPE_CHECKING

import dns.asyncresolver
import dns.rcode
import dns.resolver
import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import OfflineError
from syncd.link.resolve import (
    LOOKUP_TIMEOUT,
    MAX_TARGETS,
    Record,
    Target,
    TLSMode,
    find_server,
    order,
    to_ascii,
)
from tests.support.dns_server import Zone, name_server

if TYPE_CHECKING:
    from trio.testing import MockClock

CLIENT = "_xmpp-client._tcp.example.org"
DIRECT = "_xmpps-client._tcp.example.org"
ITSELF = Target("example.org", 5222, direct=False)

records = st.builds(
    Record,
    priority=st.integers(0, 3),
    weight=st.integers(0, 65_535) | st.integers(0, 3),
    host=st.sampled_from(["a.example.org", "b.example.org"]),
    port=st.integers(1, 65_535),
    direct=st.booleans(),
)


def record(name: str, priority: int = 10, weight: int = 0) -> Record:
    return Record(priority=priority, weight=weight, host=name, port=5222, direct=False)


def hosts(targets: list[Target]) -> list[str]:
    return [target.host for target in targets]


async def found(zone: Zone, tls: TLSMode = "auto") -> list[Target]:
    """Where the server of example.org is, by this zone."""
    async with name_server(zone) as server:
        return await find_server("example.org", tls, resolver=server.resolver)


# --- The order


@given(st.lists(records, max_size=MAX_TARGETS), st.randoms(use_true_random=False))
def test_every_record_is_tried_once_lowest_priority_first(
    given_records: list[Record], rng: random.Random
) -> None:
    targets = order(given_records, rng.random)
    expected = [Target(each.host, each.port, each.direct) for each in given_records]
    assert Counter(targets) == Counter(expected)
    left = list(given_records)
    for target in targets:
        best = min(each.priority for each in left)
        chosen = next(
            each
            for each in left
            if (each.host, each.port, each.direct, each.priority)
            == (target.host, target.port, target.direct, best)
        )
        left.remove(chosen)


@given(st.lists(records, min_size=MAX_TARGETS + 1, max_size=60))
def test_no_more_are_tried_than_the_limit(given_records: list[Record]) -> None:
    assert len(order(given_records, random.random)) == MAX_TARGETS


@pytest.mark.parametrize(
    ("point", "first"),
    # The sum is 4: five numbers, from 0 to 4, both included (RFC 2782).
    [
        (0.0, "none"),
        (0.19, "none"),
        (0.2, "one"),
        (0.39, "one"),
        (0.4, "three"),
        (0.99, "three"),
    ],
)
def test_the_running_sum_decides(point: float, first: str) -> None:
    """One number for each record, which orders equals, then one for each choice."""
    numbers = iter([0.2, 0.1, 0.3, point, 0.0, 0.0])
    given_records = [record("three", weight=3), record("one", weight=1), record("none")]
    assert hosts(order(given_records, lambda: next(numbers)))[0] == first


def test_the_load_spreads_by_weight() -> None:
    rng = random.Random(7)
    given_records = [record("a", weight=60), record("b", weight=30), record("c", weight=10)]
    firsts = Counter(order(given_records, rng.random)[0].host for _ in range(5_000))
    for host, share in {"a": 0.6, "b": 0.3, "c": 0.1}.items():
        assert firsts[host] / 5_000 == pytest.approx(share, abs=0.03)


def test_without_weights_everybody_has_the_same_chance() -> None:
    rng = random.Random(7)
    given_records = [record("a"), record("b"), record("c")]
    orders = Counter(tuple(hosts(order(given_records, rng.random))) for _ in range(3_000))
    assert set(orders) == set(itertools.permutations("abc"))
    assert min(orders.values()) > 400


# --- The look-up


async def test_both_services_are_one_set() -> None:
    """XEP-0368: mixed by priority."""
    zone = {
        CLIENT: ["5 0 5222 first.example.org.", "15 0 5222 third.example.org."],
        DIRECT: ["10 0 443 second.example.org.", "20 0 5223 fourth.example.org."],
    }
    assert await found(zone) == [
        Target("first.example.org", 5222, direct=False),
        Target("second.example.org", 443, direct=True),
        Target("third.example.org", 5222, direct=False),
        Target("fourth.example.org", 5223, direct=True),
    ]


@pytest.mark.parametrize(
    ("tls", "expected", "asked"),
    [
        ("starttls", Target("a.example.org", 5222, direct=False), [CLIENT]),
        ("direct", Target("b.example.org", 5223, direct=True), [DIRECT]),
    ],
)
async def test_only_what_will_do_is_asked_for(
    tls: TLSMode, expected: Target, asked: list[str]
) -> None:
    zone = {CLIENT: ["1 0 5222 a.example.org."], DIRECT: ["0 0 5223 b.example.org."]}
    async with name_server(zone) as server:
        assert await find_server("example.org", tls, resolver=server.resolver) == [expected]
    assert server.asked == asked


@pytest.mark.parametrize(
    "zone",
    [
        {},  # no such name
        {CLIENT: [], DIRECT: []},  # a name without such records
        {CLIENT: dns.rcode.Rcode.SERVFAIL, DIRECT: dns.rcode.Rcode.REFUSED},
    ],
)
@pytest.mark.parametrize(
    ("tls", "expected"),
    [
        ("auto", ITSELF),
        ("starttls", ITSELF),
        ("direct", Target("example.org", 5223, direct=True)),
    ],
)
async def test_without_records_it_is_the_domain_itself(
    zone: Zone, tls: TLSMode, expected: Target
) -> None:
    assert await found(zone, tls) == [expected]


@pytest.mark.parametrize("other", [dns.rcode.Rcode.SERVFAIL, dns.rcode.Rcode.NXDOMAIN, []])
async def test_one_answer_is_enough(other: list[str] | dns.rcode.Rcode) -> None:
    zone: Zone = {CLIENT: ["1 0 5222 a.example.org."], DIRECT: other}
    assert await found(zone) == [Target("a.example.org", 5222, direct=False)]


async def test_a_dot_says_not_by_this_service() -> None:
    zone = {CLIENT: ["1 0 5222 a.example.org."], DIRECT: ["0 0 0 ."]}
    assert await found(zone) == [Target("a.example.org", 5222, direct=False)]


@pytest.mark.parametrize(
    ("zone", "tls", "words"),
    [
        ({CLIENT: ["0 0 0 ."], DIRECT: ["0 0 0 ."]}, "auto", "it has no XMPP service"),
        ({CLIENT: ["0 0 0 ."]}, "auto", "it has no XMPP service"),
        ({DIRECT: ["0 0 0 ."]}, "auto", "it has no XMPP service"),
        (
            {DIRECT: ["0 0 0 ."], CLIENT: ["1 0 5222 a.example.org."]},
            "direct",
            'of the kind that account.tls = "direct" asks for',
        ),
        (
            {DIRECT: ["0 0 0 ."], CLIENT: dns.rcode.Rcode.SERVFAIL},
            "auto",
            "the name servers said only where the server of example.org is not",
        ),
    ],
)
async def test_who_says_no_is_not_asked_at_his_address(
    zone: Zone, tls: TLSMode, words: str
) -> None:
    """XEP-0368: MUST NOT perform A/AAAA fallback."""
    async with name_server(zone) as server:
        with pytest.raises(OfflineError, match=words) as caught:
            await find_server("example.org", tls, resolver=server.resolver)
    assert "account.server" in caught.value.hint


async def test_many_records_come_by_tcp_and_are_cut() -> None:
    names = [f"a-long-name-of-a-server-number-{number}.example.org" for number in range(40)]
    targets = await found({CLIENT: [f"{n} 0 5222 {name}." for n, name in enumerate(names)]})
    assert hosts(targets) == names[:MAX_TARGETS]


async def test_a_silent_name_server_is_given_up(autojump_clock: MockClock) -> None:
    """On the clock of trio: the resolver's own does not move here."""
    start = autojump_clock.current_time()
    assert await found({CLIENT: None, DIRECT: None}) == [ITSELF]
    assert autojump_clock.current_time() - start <= LOOKUP_TIMEOUT + 0.1


async def test_silence_about_one_service_does_not_lose_the_other(
    autojump_clock: MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # the answer comes in real time
    zone = {CLIENT: ["1 0 5222 a.example.org."], DIRECT: None}
    assert await found(zone) == [Target("a.example.org", 5222, direct=False)]


async def test_domains_are_asked_for_as_idna_2008_has_them() -> None:
    """IDNA 2003 would ask for the server of strasse.example."""
    name = "_xmpp-client._tcp.xn--strae-oqa.example"
    async with name_server({name: ["1 0 5222 a.example."]}) as server:
        targets = await find_server("straße.example", "starttls", resolver=server.resolver)
    assert server.asked == [name]
    assert hosts(targets) == ["a.example"]


@pytest.mark.parametrize(
    ("domain", "host"),
    [("192.0.2.1", "192.0.2.1"), ("[2001:db8::1]", "2001:db8::1")],
)
async def test_an_address_is_not_looked_up(domain: str, host: str) -> None:
    async with name_server({}) as server:
        targets = await find_server(domain, "auto", resolver=server.resolver)
    assert targets == [Target(host, 5222, direct=False)]
    assert server.asked == []


async def test_a_name_too_long_for_the_dns_is_not_looked_up() -> None:
    domain = ".".join(["x" * 63] * 4)
    async with name_server({}) as server:
        targets = await find_server(domain, "auto", resolver=server.resolver)
    assert hosts(targets) == [domain]
    assert server.asked == []


async def test_by_default_the_name_servers_of_the_system_are_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with name_server({CLIENT: ["1 0 5222 a.example.org."]}) as server:
        monkeypatch.setattr(dns.asyncresolver, "Resolver", lambda: server.resolver)
        assert hosts(await find_server("example.org", "auto")) == ["a.example.org"]


async def test_a_system_without_name_servers_may_still_know_the_domain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By /etc/hosts, which the connection asks."""

    def no_configuration() -> None:
        raise dns.resolver.NoResolverConfiguration

    monkeypatch.setattr(dns.asyncresolver, "Resolver", no_configuration)
    assert await find_server("example.org", "auto") == [ITSELF]


# --- Names


@pytest.mark.parametrize(
    ("domain", "name"),
    [
        ("example.org", "example.org"),
        ("[::1]", "::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("münchen.example", "xn--mnchen-3ya.example"),
        ("straße.example", "xn--strae-oqa.example"),
    ],
)
def test_names_for_the_dns(domain: str, name: str) -> None:
    assert to_ascii(domain) == name


def test_a_name_that_cannot_be_in_the_dns_is_told_as_such() -> None:
    with pytest.raises(OfflineError, match="is no name that the DNS could know") as caught:
        to_ascii("ü" * 70 + ".example")
    assert caught.value.hint == "mend account.jid"


def test_targets_read_as_people_write_them() -> None:
    assert str(Target("a.example.org", 5222, direct=False)) == "a.example.org:5222"
    assert str(Target("::1", 5223, direct=True)) == "[::1]:5223"
