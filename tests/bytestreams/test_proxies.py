from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.bytestreams import proxies as module
from syncd.bytestreams.proxies import Policy, Probed, Proxies, Report
from syncd.bytestreams.s5b import Streamhost
from syncd.xmpp.jid import JID

NOW = 1_800_000_000.0
OWN = JID.parse("alice@example.org/laptop")
BOB = JID.parse("bob@example.net/desk")
CAROL = JID.parse("carol@example.net/phone")
OURS = JID.parse("proxy.example.org")
OTHER = JID.parse("streamer.example.org")
THEIRS = JID.parse("proxy.example.net")

NEAR = [Streamhost(OWN, f"192.168.1.{n}", 4000) for n in range(1, 5)]


def at(jid: JID, host: str = "203.0.113.7", port: int = 7777) -> Streamhost:
    return Streamhost(jid, host, port)


def make(policy: Policy = "auto") -> Proxies:
    """Knows of our server and of a peer's, and has asked neither."""
    return Proxies(policy, "example.org", ["example.net"])


def learn(known: Proxies, jid: JID, *hosts: str, latency: float | None = 0.1) -> None:
    """Let a proxy be found, and be tested at these addresses."""
    domain = jid.domain.partition(".")[2]
    known.found(domain, [*known._servers[domain].proxies, jid], NOW)
    known.tested(jid, [Probed(at(jid, host), latency, "no") for host in hosts], NOW)


def ready() -> Proxies:
    """Knows one proxy of our server and one of the peer's."""
    known = make()
    learn(known, OURS, "203.0.113.7")
    learn(known, THEIRS, "203.0.113.9")
    return known


def hosts(known: Proxies, peer: JID = BOB, direct: list[Streamhost] = NEAR) -> list[str]:
    return [each.host for each in known.choose(peer, direct, NOW)]


# --- What is to be found out


def test_servers_are_asked_first_and_then_their_proxies() -> None:
    known = make()
    assert known.due_servers(NOW) == ["example.org", "example.net"]
    assert known.next_due(NOW) == 0
    known.found("example.org", [OURS], NOW)
    known.found("example.net", [THEIRS], NOW)
    assert known.due_servers(NOW) == []
    assert known.due_proxies(NOW) == [OURS, THEIRS]
    assert (known.is_own(OURS), known.is_own(THEIRS)) == (True, False)


def test_what_is_known_is_looked_at_again_after_an_hour() -> None:
    known = ready()
    assert known.next_due(NOW) == module.REFRESH
    assert known.due_servers(NOW + module.REFRESH) == ["example.org", "example.net"]
    assert known.due_proxies(NOW + module.REFRESH) == [OURS, THEIRS]


def test_what_failed_is_looked_at_again_sooner() -> None:
    known = make()
    known.not_found("example.org", "it gave no answer", NOW)
    known.not_found("example.net", "it gave no answer", NOW)
    assert known.next_due(NOW) == module.RETRY_FIRST
    assert known.due_servers(NOW + module.RETRY_FIRST) == ["example.org"]
    learn(known, OURS, "203.0.113.7", latency=None)
    learn(known, THEIRS, "203.0.113.9")
    assert known.due_proxies(NOW + module.RETRY_FIRST) == [OURS]
    known.unusable(OURS, "nonsense", NOW)
    assert known.due_proxies(NOW + module.RETRY_FIRST) == []
    assert known.due_proxies(NOW + 2 * module.RETRY_FIRST) == [OURS]


def test_what_fails_again_and_again_is_looked_at_ever_more_rarely() -> None:
    known = ready()
    waits = []
    for _ in range(12):
        known.unusable(OURS, "remote-server-timeout", NOW)
        waits.append(known.next_due(NOW))
    assert waits[:4] == [2.0, 4.0, 8.0, 16.0]
    assert waits[-1] == module.RETRY
    learn(known, OURS, "203.0.113.7")
    known.unusable(OURS, "remote-server-timeout", NOW)
    assert known.next_due(NOW) == module.RETRY_FIRST


def test_our_server_that_has_no_proxy_yet_is_asked_again_soon() -> None:
    """It has just started, and its component is not there yet."""
    known = make()
    known.found("example.net", [THEIRS], NOW)
    learn(known, THEIRS, "203.0.113.9")
    waits = []
    for _ in range(12):
        known.found("example.org", [], NOW)
        waits.append(known.next_due(NOW))
    assert (waits[0], waits[-1]) == (module.RETRY_FIRST, module.RETRY)


def test_a_server_without_proxies_is_asked_again_ours_sooner() -> None:
    known = make()
    known.found("example.org", [], NOW)
    known.found("example.net", [], NOW)
    assert known.due_servers(NOW + module.RETRY_FIRST) == ["example.org"]


def test_a_proxy_that_was_lost_is_looked_at_at_once() -> None:
    known = ready()
    known.lost(OURS, "connection refused")
    assert known.due_proxies(NOW) == [OURS]
    assert hosts(known, direct=[]) == ["203.0.113.9"]


def test_a_refusal_is_respected_for_a_day_whatever_happens() -> None:
    known = ready()
    known.refused(OURS, "forbidden", NOW)
    known.expire()
    assert known.due_servers(NOW) == ["example.org", "example.net"]
    assert known.due_proxies(NOW) == [THEIRS]
    known.tested(THEIRS, [], NOW)
    later = NOW + module.REFUSED_FOR
    assert known.due_proxies(later - 1) == [THEIRS]
    assert known.due_proxies(later) == [OURS, THEIRS]


def test_a_clock_that_is_set_back_delays_nothing() -> None:
    known = ready()
    known.refused(THEIRS, "forbidden", NOW)
    long_ago = NOW - 10 * module.REFUSED_FOR
    assert known.due_servers(long_ago) == ["example.org", "example.net"]
    assert known.due_proxies(long_ago) == [OURS, THEIRS]
    assert known.next_due(long_ago) == 0


def test_a_configured_list_is_all_there_is() -> None:
    known = make((OTHER, THEIRS))
    assert known.due_servers(NOW) == []
    assert known.due_proxies(NOW) == [OTHER, THEIRS]
    for jid, host in ((THEIRS, "203.0.113.9"), (OTHER, "203.0.113.7")):
        known.tested(jid, [Probed(at(jid, host), 0.1)], NOW)
    assert known.is_own(THEIRS)
    assert hosts(known, direct=[]) == ["203.0.113.7", "203.0.113.9"]


def test_an_empty_list_switches_proxies_off() -> None:
    known = make(())
    assert (known.due_servers(NOW), known.due_proxies(NOW)) == ([], [])
    assert known.next_due(NOW) == module.REFRESH
    assert not known.usable(NOW)
    assert known.report(NOW) == ()
    assert hosts(known) == [each.host for each in NEAR]


def test_no_more_servers_and_proxies_than_fit() -> None:
    known = Proxies("auto", "example.org", [f"d{n}.example" for n in range(100)])
    assert len(known.due_servers(NOW)) == module.MAX_SERVERS
    known.found("example.org", [JID.parse(f"p{n}.example.org") for n in range(100)], NOW)
    assert len(known.due_proxies(NOW)) == module.MAX_FOUND


def test_a_proxy_that_its_server_no_longer_names_is_forgotten() -> None:
    known = ready()
    known.found("example.org", [OTHER], NOW)
    known.tested(OURS, [Probed(at(OURS), 0.1)], NOW)  # an answer that comes too late
    assert known.due_proxies(NOW) == [OTHER]
    assert hosts(known, direct=[]) == ["203.0.113.9"]
    assert repr(known) == "<Proxies known=2 reachable=1>"


def test_only_addresses_that_may_lead_there_are_tested() -> None:
    """Openfire names every address of its machine, with the scopes that it uses itself."""
    named = [
        at(OURS, "fe80::1%eth0"),
        at(OURS, "169.254.1.1"),
        at(OURS, "127.0.0.1"),
        at(OURS, "172.17.0.1"),
        at(OURS, "proxy.example.org"),
        at(OURS, "203.0.113.7"),
        at(JID.parse("alice@example.org/laptop"), "203.0.113.8"),
        at(THEIRS, "203.0.113.9"),
    ]
    known = ready()
    assert [each.host for each in known.worth_testing(OURS, named)] == [
        "proxy.example.org",
        "172.17.0.1",
        "203.0.113.7",
        "127.0.0.1",
    ]
    assert [each.host for each in known.worth_testing(OURS, [at(OURS, "8.8.8.8"), *named])] == [
        "8.8.8.8",
        "proxy.example.org",
        "172.17.0.1",
        "203.0.113.7",
    ]


def test_nobody_elses_proxy_leads_to_this_machine() -> None:
    known = ready()
    named = [at(THEIRS, host) for host in ("127.0.0.1", "::1", "localhost", "10.0.0.5")]
    assert [each.host for each in known.worth_testing(THEIRS, named)] == ["10.0.0.5"]


# --- What is offered


def test_a_stranger_is_offered_our_addresses_and_a_proxy_at_the_third_place() -> None:
    assert hosts(ready()) == [
        "192.168.1.1",
        "192.168.1.2",
        "203.0.113.7",
        "203.0.113.9",
        "192.168.1.3",
    ]


def test_without_proxies_all_of_our_addresses_are_offered() -> None:
    assert hosts(make()) == [each.host for each in NEAR]


def test_only_what_can_be_reached_from_here_is_offered() -> None:
    known = make()
    learn(known, OURS, "10.0.0.5", latency=None)
    assert not known.usable(NOW)
    assert hosts(known) == [each.host for each in NEAR]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "fe80::1%eth0", "fe80::1", "224.0.0.1", ""])
def test_addresses_of_ours_that_lead_nowhere_are_not_offered(host: str) -> None:
    assert hosts(make(), direct=[at(OWN, host), *NEAR]) == [each.host for each in NEAR]


def test_the_loopback_is_offered_if_the_user_says_so() -> None:
    """The listener names it only if it is bound to it."""
    assert hosts(make(), direct=[at(OWN, "127.0.0.1")]) == ["127.0.0.1"]


def test_an_address_is_offered_once() -> None:
    assert hosts(make(), direct=[NEAR[0], NEAR[0], NEAR[1]]) == ["192.168.1.1", "192.168.1.2"]


def test_no_more_than_two_addresses_of_one_proxy_are_offered() -> None:
    known = make()
    learn(known, OURS, "10.0.0.5", "203.0.113.7", "2001:4860::1", "proxy.example.org")
    assert hosts(known, direct=[]) == ["2001:4860::1", "proxy.example.org"]


def test_proxies_can_be_left_out() -> None:
    known = ready()
    known.worked(BOB, OURS, NOW)
    assert known.choose(BOB, NEAR[:1], NOW, mediated=False) == (NEAR[0],)


def test_our_own_proxy_comes_before_a_faster_one_of_the_peers_server() -> None:
    known = make()
    learn(known, THEIRS, "203.0.113.9", latency=0.01)
    learn(known, OURS, "203.0.113.7", latency=0.5)
    assert hosts(known, direct=[]) == ["203.0.113.7", "203.0.113.9"]


def test_of_two_proxies_of_ours_the_faster_one_comes_first() -> None:
    known = make()
    learn(known, OURS, "203.0.113.7", latency=0.5)
    learn(known, OTHER, "203.0.113.8", latency=0.1)
    assert hosts(known, direct=[]) == ["203.0.113.8", "203.0.113.7"]


def test_a_proxy_that_often_fails_comes_behind_one_that_does_not() -> None:
    known = make()
    learn(known, OURS, "203.0.113.7", latency=0.1)
    learn(known, OTHER, "203.0.113.8", latency=0.5)
    known.failed(CAROL, [OURS], NOW)
    assert hosts(known, direct=[]) == ["203.0.113.8", "203.0.113.7"]
    known.worked(CAROL, OURS, NOW)
    assert hosts(known, direct=[]) == ["203.0.113.7", "203.0.113.8"]


def test_a_proxy_that_only_this_machine_reaches_comes_last() -> None:
    known = make()
    learn(known, OURS, "127.0.0.1", latency=0.001)
    learn(known, THEIRS, "203.0.113.9")
    assert hosts(known, direct=[]) == ["203.0.113.9", "127.0.0.1"]


def test_the_way_that_worked_for_a_peer_comes_first() -> None:
    known = ready()
    known.worked(BOB, JID.parse("proxy.example.net/node-7"), NOW)
    assert known.prefers_proxy(BOB, NOW)
    assert hosts(known) == [
        "203.0.113.9",
        "192.168.1.1",
        "192.168.1.2",
        "203.0.113.7",
        "192.168.1.3",
    ]
    assert hosts(known, CAROL)[0] == "192.168.1.1"
    known.worked(BOB, None, NOW, host="192.168.1.4")
    assert hosts(known)[:2] == ["192.168.1.4", "192.168.1.1"]


def test_another_client_of_a_peer_is_at_the_same_place() -> None:
    known = ready()
    known.worked(BOB, OURS, NOW)
    assert known.prefers_proxy(BOB.with_resource("other"), NOW)


def test_a_direct_connection_gets_another_chance_after_a_day() -> None:
    known = ready()
    known.worked(BOB, OURS, NOW)
    assert known.prefers_proxy(BOB, NOW + module.TRUSTED_FOR - 1)
    assert not known.prefers_proxy(BOB, NOW + module.TRUSTED_FOR)


def test_where_no_direct_connection_led_anywhere_a_proxy_comes_first_for_an_hour() -> None:
    known = ready()
    known.failed(BOB, [None], NOW)
    assert known.prefers_proxy(BOB, NOW)
    assert hosts(known)[0] == "203.0.113.7"
    assert not known.prefers_proxy(BOB, NOW + module.FAILED_FOR)


def test_a_proxy_that_failed_for_a_peer_comes_last_for_that_peer_for_an_hour() -> None:
    known = ready()
    known.worked(BOB, OURS, NOW)
    known.failed(BOB, [OURS, OURS], NOW)
    assert hosts(known, direct=[]) == ["203.0.113.9", "203.0.113.7"]
    later = known.choose(BOB, [], NOW + module.FAILED_FOR)
    assert later[0].host == "203.0.113.7"


def test_where_everything_failed_it_begins_as_with_a_stranger() -> None:
    known = ready()
    known.failed(BOB, [None, OURS, THEIRS], NOW)
    assert not known.prefers_proxy(BOB, NOW)
    assert hosts(known)[0] == "192.168.1.1"


def test_a_busy_proxy_comes_last_for_a_moment() -> None:
    known = ready()
    known.busy(JID.parse("proxy.example.org/node"), NOW)
    assert hosts(known, direct=[]) == ["203.0.113.9", "203.0.113.7"]
    assert known.choose(BOB, [], NOW + module.BUSY_FOR)[0].host == "203.0.113.7"


def test_a_proxy_that_refused_is_not_offered() -> None:
    known = ready()
    known.refused(JID.parse("proxy.example.org/node"), "forbidden", NOW)
    assert hosts(known, direct=[]) == ["203.0.113.9"]


def test_news_of_a_proxy_that_nobody_names_any_more_is_dropped() -> None:
    known = ready()
    before = known.dump()
    known.refused(OTHER, "forbidden", NOW)
    known.unusable(OTHER, "nonsense", NOW)
    known.lost(OTHER, "connection refused")
    known.busy(OTHER, NOW)
    assert known.dump() == before


def test_only_so_many_peers_and_ways_are_remembered() -> None:
    known = ready()
    for number in range(2 * module.MAX_PEERS):
        known.worked(JID.parse(f"p{number}@example.net/r"), OURS, NOW)
    assert len(known._peers) == module.MAX_PEERS
    known.failed(BOB, [JID.parse(f"p{n}.example") for n in range(100)], NOW)
    assert len(known._peers[BOB.bare].failed) == module.MAX_FAILED


# --- In words


def said(known: Proxies, now: float = NOW) -> list[tuple[str, bool, str]]:
    return [(str(each.jid), each.usable, each.text) for each in known.report(now)]


def test_an_internal_address_is_told_with_who_must_mend_it() -> None:
    """What stood behind the 404 of everybody who ever tried this through a router."""
    known = make()
    known.found("example.org", [OURS], NOW)
    known.tested(OURS, [Probed(at(OURS, "10.0.0.5"), None, "connection timed out")], NOW)
    assert known.report(NOW) == (
        Report(
            jid=OURS,
            usable=False,
            text="proxy.example.org names 10.0.0.5:7777, which cannot be reached from here: "
            "connection timed out",
            hint="its administrator must set the proxy's external address (Openfire: "
            "xmpp.proxy.externalip; Prosody: proxy65_address; ejabberd: hostname of "
            "mod_proxy65) and open its port",
        ),
    )


def test_every_other_state_has_its_sentence() -> None:
    known = make()
    assert said(known) == []
    known.not_found("example.org", "example.org gave no answer for 10 s", NOW)
    assert said(known) == [
        (
            "example.org",
            False,
            "example.org did not say whether it has a proxy: "
            "example.org gave no answer for 10 s",
        )
    ]
    known.found("example.org", [], NOW)
    [report] = known.report(NOW)
    assert report.text == "example.org offers no proxy for file transfers"
    assert "bytestreams.proxies" in report.hint
    known.found("example.org", [OURS], NOW)
    assert said(known) == [("proxy.example.org", False, "proxy.example.org is being looked at")]
    known.tested(OURS, [], NOW)
    [report] = known.report(NOW)
    assert "names no address that leads anywhere outside" in report.text
    assert "proxy65_address" in report.hint
    known.unusable(OURS, "the proxy did not say", NOW)
    assert said(known)[0][2] == "proxy.example.org cannot be used: the proxy did not say"
    known.refused(OURS, "forbidden", NOW)
    assert said(known)[0][2] == "proxy.example.org does not serve this account [forbidden]"
    known.tested(OURS, [Probed(at(OURS), 0.1)], NOW)
    assert said(known) == [
        ("proxy.example.org", True, "proxy.example.org can be reached at 203.0.113.7:7777")
    ]
    known.tested(OURS, [Probed(at(OURS, "127.0.0.1"), 0.1)], NOW)
    [report] = known.report(NOW)
    assert report.text.endswith("at 127.0.0.1:7777, but only from this machine")
    assert "proxy65_address" in report.hint


def test_a_peers_proxy_does_not_hide_that_ours_has_none() -> None:
    known = make()
    known.found("example.org", [], NOW)
    learn(known, THEIRS, "203.0.113.9")
    assert [(jid, usable) for jid, usable, _ in said(known)] == [
        ("example.org", False),
        ("proxy.example.net", True),
    ]
    assert known.report(NOW)[0].hint == ""


# --- Between two runs


def test_what_was_learned_outlives_a_restart() -> None:
    known = ready()
    known.worked(BOB, THEIRS, NOW)
    known.worked(CAROL, None, NOW, host="192.168.1.3")
    again = make()
    again.restore(known.dump())
    assert hosts(again) == hosts(known)
    assert hosts(again, CAROL) == hosts(known, CAROL)
    assert again.due_servers(NOW) == ["example.org", "example.net"]
    assert again.due_proxies(NOW) == [OURS, THEIRS]
    assert again.dump() == known.dump()


def test_a_refusal_outlives_a_restart_too() -> None:
    known = ready()
    known.refused(OURS, "forbidden", NOW)
    again = make()
    again.restore(known.dump())
    assert again.due_proxies(NOW) == [THEIRS]
    assert again.due_proxies(NOW + module.REFUSED_FOR) == [OURS, THEIRS]


def test_what_the_user_no_longer_wants_is_not_remembered() -> None:
    again = make((OTHER,))
    again.restore(ready().dump())
    assert again.due_proxies(NOW) == [OTHER]
    assert not again.usable(NOW)


GOOD = json.loads(ready().dump())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        json.dumps(GOOD | {"servers": {"example.org": ["@"]}}).encode(),
        json.dumps(GOOD | {"peers": [["", "", "", 0.0]]}).encode(),
        json.dumps(GOOD | {"proxies": 7}).encode(),
        b" " * (module.MAX_MEMORY + 1),
    ],
)
def test_a_broken_memory_is_none(data: bytes) -> None:
    known = ready()
    before = known.dump()
    with pytest.raises(ValueError, match=r"."):
        known.restore(data)
    assert known.dump() == before


@given(st.binary(max_size=200))
def test_no_bytes_are_a_memory_by_chance(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        make().restore(data)


def test_an_address_that_cannot_be_is_left_out() -> None:
    data = json.loads(ready().dump())
    data["proxies"][0]["hosts"] = [
        ["proxy.example.org", "203.0.113.7", port, 0.1] for port in (0, 65_536, 1)
    ]
    known = make()
    known.restore(json.dumps(data).encode())
    assert [str(each) for each in known.choose(BOB, [], NOW)] == [
        "203.0.113.7:1",
        "203.0.113.9:7777",
    ]


# --- Whatever happens

PROXIES = [OURS, OTHER, THEIRS, JID.parse("proxy2.example.net")]
PEERS = [BOB, CAROL]
addresses = st.sampled_from(
    ["203.0.113.7", "10.0.0.5", "127.0.0.1", "2001:4860::1", "proxy.example.org", "fe80::1"]
)
latencies = st.one_of(st.none(), st.floats(0, 5))
times = st.floats(NOW - 200_000, NOW + 200_000)
ways = st.sampled_from([*PROXIES, None])
steps = st.one_of(
    st.tuples(st.just("tested"), st.sampled_from(PROXIES), addresses, latencies, times),
    st.tuples(st.just("refused"), st.sampled_from(PROXIES), times),
    st.tuples(st.just("busy"), st.sampled_from(PROXIES), times),
    st.tuples(st.just("lost"), st.sampled_from(PROXIES)),
    st.tuples(st.just("worked"), st.sampled_from(PEERS), ways, times),
    st.tuples(st.just("failed"), st.sampled_from(PEERS), ways, times),
)
near = st.lists(
    st.builds(
        Streamhost,
        st.just(OWN),
        st.sampled_from(["192.168.1.1", "fe80::2%eth0", "198.51.100.3", "0.0.0.0"]),
        st.integers(4000, 4002),
    ),
    max_size=8,
)


def lived(history: list[tuple[object, ...]]) -> Proxies:
    """Proxies after some history."""
    known = make()
    known.found("example.org", PROXIES[:2], NOW)
    known.found("example.net", PROXIES[2:], NOW)
    for step in history:
        match step:
            case "tested", JID() as jid, str(host), (None | float()) as latency, float(now):
                known.tested(jid, [Probed(at(jid, host), latency, "no")], now)
            case "refused", JID() as jid, float(now):
                known.refused(jid, "forbidden", now)
            case "busy", JID() as jid, float(now):
                known.busy(jid, now)
            case "lost", JID() as jid:
                known.lost(jid, "no")
            case "worked", JID() as peer, (None | JID()) as via, float(now):
                known.worked(peer, via, now)
            case "failed", JID() as peer, (None | JID()) as via, float(now):
                known.failed(peer, [via], now)
            case _:
                raise AssertionError(step)
    return known


@given(st.lists(steps, max_size=20), near, st.sampled_from(PEERS), times)
def test_an_offer_is_always_one_that_real_targets_can_work_with(
    history: list[tuple[object, ...]], direct: list[Streamhost], peer: JID, now: float
) -> None:
    known = lived(history)
    offer = known.choose(peer, direct, now)
    assert len(offer) <= module.MAX_STREAMHOSTS
    assert len({(each.host, each.port) for each in offer}) == len(offer)
    assert not {"0.0.0.0", "fe80::2%eth0"} & {each.host for each in offer}
    assert known.usable(now) == any(each.jid != OWN for each in offer[:3])
    able = [each for each in direct if each.host not in ("0.0.0.0", "fe80::2%eth0")]
    assert bool(able) == any(each.jid == OWN for each in offer)
    assert all(each.jid == OWN for each in known.choose(peer, direct, now, mediated=False))
    assert known.choose(peer, direct, now) == offer


@given(st.lists(steps, max_size=20), st.sampled_from(PEERS), st.sampled_from(PROXIES))
def test_what_just_failed_for_a_peer_is_behind_all_else_that_did_not(
    history: list[tuple[object, ...]], peer: JID, proxy: JID
) -> None:
    known = lived(history)
    known.failed(peer, [proxy], NOW)
    ranked = known._ranked(known._peers[peer.bare], NOW)
    failed = known._peers[peer.bare].failed
    good = [jid for jid in ranked if not NOW < failed.get(jid, 0) <= NOW + module.FAILED_FOR]
    assert ranked[: len(good)] == good
    assert proxy not in good


@given(st.lists(steps, max_size=20), near, st.sampled_from(PEERS))
def test_what_worked_first_comes_first(
    history: list[tuple[object, ...]], direct: list[Streamhost], peer: JID
) -> None:
    known = lived(history)
    known.tested(OTHER, [Probed(at(OTHER, "203.0.113.8"), 5.0)], NOW)
    known._proxies[OTHER].busy_until = 0
    known.worked(peer, OTHER, NOW)
    assert known.choose(peer, direct, NOW)[0].jid == OTHER


@given(st.lists(steps, max_size=20), near, st.sampled_from(PEERS))
def test_memory_keeps_what_worked_and_forgets_what_failed(
    history: list[tuple[object, ...]], direct: list[Streamhost], peer: JID
) -> None:
    known = lived([step for step in history if step[0] not in ("failed", "busy")])
    again = make()
    again.restore(known.dump())
    assert again.choose(peer, direct, NOW) == known.choose(peer, direct, NOW)
    assert again.prefers_proxy(peer, NOW) == known.prefers_proxy(peer, NOW)


# --- Ways that carry nothing


def one_proxy() -> Proxies:
    known = make()
    learn(known, OURS, "203.0.113.7")
    return known


def test_a_way_that_carries_nothing_is_left_out_for_an_hour() -> None:
    known = one_proxy()
    known.swallowed(BOB, None, NOW)
    assert known.swallows_direct(BOB, NOW)
    assert [each.jid for each in known.choose(BOB, NEAR[:1], NOW)] == [OURS]
    assert not known.swallows_direct(CAROL, NOW)
    later = NOW + module.FAILED_FOR
    assert not known.swallows_direct(BOB, later)
    assert {each.jid for each in known.choose(BOB, NEAR[:1], later)} == {OURS, NEAR[0].jid}


def test_a_proxy_that_carries_nothing_is_left_out_and_then_everything_is_tried() -> None:
    known = one_proxy()
    known.swallowed(BOB, OURS, NOW)
    assert [each.jid for each in known.choose(BOB, NEAR[:1], NOW)] == [NEAR[0].jid]
    assert (known.usable(NOW), known.usable(NOW, BOB), known.usable(NOW, CAROL)) == (
        True,
        False,
        True,
    )
    known.swallowed(BOB, None, NOW)
    assert {each.jid for each in known.choose(BOB, NEAR[:1], NOW)} == {OURS, NEAR[0].jid}
    assert [each.jid for each in known.choose(BOB, [], NOW)] == [OURS]


def test_a_way_that_works_after_all_is_as_good_as_any() -> None:
    known = one_proxy()
    known.swallowed(BOB, OURS, NOW)
    known.worked(BOB, OURS, NOW)
    assert known.usable(NOW, BOB)
    assert known.prefers_proxy(BOB, NOW)


def test_ways_that_carry_nothing_are_no_more_than_those_that_fail() -> None:
    known = one_proxy()
    for number in range(100):
        known.swallowed(BOB, JID.parse(f"p{number}.example"), NOW)
    assert len(known._peers[BOB.bare].swallowed) <= module.MAX_FAILED + 1
