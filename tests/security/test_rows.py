"""The table: each known way in which software of this kind was broken, and what proves ours.

The rows are those of the review that this was built by; where ours does another thing than a
clause of theirs, that is said here as well. Tests of a row say so in their name
(``test_c07_...``), or in that of their module, wherever they are; what was shown elsewhere
under another name is listed here. A row that nothing can prove says why it does not apply.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

ROWS = {
    "C-01": "names that lead out of the folder",
    "C-02": "names and texts that act on a terminal or a log",
    "C-03": "symbolic links, and races with them",
    "C-04": "what nobody asked for",
    "C-05": "answers from somebody else",
    "C-06": "others that speak for our account",
    "C-07": "stanzas smuggled in stanzas",
    "C-08": "XML that explodes",
    "C-09": "long tokens, and stanzas that hang",
    "C-10": "STARTTLS stripped, or with something behind it",
    "C-11": "certificates for somebody else",
    "C-12": "a weaker login than could be",
    "C-13": "bytestreams taken by somebody else",
    "C-14": "bytes read on their way",
    "C-15": "floods",
    "C-16": "bytes changed on their way",
    "C-17": "base64 that is not",
    "C-18": "the control socket",
    "C-19": "archives that explode",
    "C-20": "names that become commands",
    "C-21": "secrets that are told",
    "C-22": "peers that take their time",
}

# What proves a row beside the tests that have it in their name.
PROVED_BY = {
    "C-01": [
        "disk/test_paths.py::test_hostile_paths_are_refused_for_good",
        "transfer/test_receiver.py::test_hostile_path_changes_nothing_anywhere",
        "transfer/test_receiver.py::test_path_that_only_looks_hostile_arrives_below_the_folder",
        "transfer/test_receiver.py::test_every_name_of_a_plain_client_arrives_in_the_inbox",
    ],
    "C-02": [
        "test_log.py::test_no_text_breaks_out_of_its_line",
        "test_notify.py::test_a_status_cannot_smuggle_in_another_state",
        "cli/test_output.py::test_nothing_a_peer_names_acts_on_the_terminal_or_as_markup",
        "cli/test_output.py::test_json_is_one_ascii_line_that_says_everything",
    ],
    "C-03": [
        "transfer/test_receiver.py::test_linked_directory_in_the_folder_is_never_written_through",
        "transfer/test_receiver.py"
        "::test_parent_that_becomes_a_link_in_the_last_instant_is_not_followed",
    ],
    "C-04": [
        "transfer/test_receiver.py::test_stranger_is_refused_and_leaves_no_trace",
        "transfer/test_receiver.py::test_only_who_was_accepted_can_open_and_finish",
        "transfer/test_receiver.py::test_no_more_transfers_than_can_be_kept_open",
        "bytestreams/test_inband.py::test_without_an_agreement_nothing_is_opened",
        "bytestreams/test_inband.py::test_a_stranger_cannot_speak_in_a_stream_of_others",
        "link/test_session.py::test_only_so_many_requests_are_handled_at_a_time",
        "link/test_contacts.py::test_peers_are_let_in_each_time_they_ask_and_strangers_never",
        "test_log.py::test_many_strangers_are_limited_together",
    ],
    "C-05": ["link/test_session.py::test_nobody_else_can_answer"],
    "C-06": [
        "link/test_client.py::test_a_roster_push_of_anybody_else_is_refused",
        "link/test_client.py::test_nothing_that_comes_in_a_message_counts",
        "link/test_peers.py::test_a_roster_push_of_anybody_else_does_not_count",
    ],
    "C-10": [
        "link/test_connect.py::test_a_server_without_tls_gets_no_credential",
        "link/test_connect.py::test_a_stanza_injected_behind_proceed_is_never_seen",
        "xmpp/test_stream.py::test_without_starttls_no_credential_ever_leaves",
    ],
    "C-11": [
        "link/test_tls.py::test_no_other_name_is_good",
        "link/test_tls.py::test_an_expired_certificate_is_told_with_the_date",
        "link/test_tls.py::test_what_is_older_than_tls_1_2_is_refused",
        "link/test_tls.py::test_another_certificate_than_the_named_one_shows_both",
        "link/test_connect.py::test_behind_a_wrong_certificate_no_credential_is_sent",
    ],
    "C-12": [
        "link/test_connect.py::test_the_login_is_bound_to_the_servers_certificate",
        "link/test_fast.py::test_who_weakens_the_offer_is_found_out",
        "xmpp/test_sasl.py::test_nothing_weaker_than_before_is_used",
        "xmpp/test_sasl.py::test_a_list_that_was_shortened_on_its_way_ends_the_login",
        "xmpp/test_sasl.py::test_a_server_that_does_not_know_the_password_is_an_impostor",
        "xmpp/test_sasl.py::test_the_server_may_ask_for_neither_too_little_nor_too_much_work",
    ],
    "C-13": [
        "bytestreams/test_sockets.py::test_nobody_is_let_in_without_being_expected",
        "bytestreams/test_sockets.py"
        "::test_the_last_connection_that_is_still_open_wins_and_the_others_are_closed",
    ],
    "C-14": [
        "transfer/test_sealing.py::test_nothing_of_the_file_is_seen_on_the_way",
        "transfer/test_sealing.py::test_finish_of_the_other_kind_than_its_transfer_is_refused",
        "transfer/test_sealing.py::test_where_it_is_required_nothing_goes_out_plain",
        "transfer/test_sealing.py::test_peer_that_has_shown_a_key_never_gets_plain_bytes_again",
        "trust/test_pins.py::test_another_key_is_a_stop_that_shows_both",
        "trust/test_receipt.py::test_a_guess_cannot_be_tried_on_a_signature",
        "trust/test_seal.py::test_every_bit_of_a_stream_matters",
        "trust/test_seal.py::test_a_stream_is_not_played_again",
    ],
    "C-15": [
        "bytestreams/test_sockets.py"
        "::test_a_flood_of_silent_connections_drops_the_oldest_and_shuts_nobody_out",
        "bytestreams/test_sockets.py::test_running_out_of_descriptors_pauses_the_listener",
        "link/test_session.py::test_one_peer_does_not_take_the_places_of_others",
        "wiring/test_allowances.py::test_no_more_than_the_quota_comes_in_any_day",
        "wiring/test_allowances.py::test_offers_beyond_any_disk_are_to_come_later",
        "transfer/test_receiver.py::test_offers_that_come_at_once_do_not_pass_the_limit",
    ],
    "C-16": [
        "transfer/test_receiver.py::test_byte_that_is_forged_on_the_way_is_found",
        "transfer/test_receiver.py::test_surplus_bytes_are_refused",
        "transfer/test_receiver.py::test_plain_client_that_sends_more_or_less_delivers_nothing",
        "transfer/test_sealing.py::test_byte_that_is_changed_on_the_way_delivers_nothing",
        "transfer/test_sealing.py::test_server_cannot_say_that_a_file_has_arrived",
        "transfer/test_sealing.py::test_finish_that_was_changed_on_the_way_delivers_nothing",
        "transfer/test_sealing.py::test_receipt_that_was_changed_on_the_way_confirms_nothing",
        "transfer/test_sealing.py::test_receipt_for_another_content_confirms_nothing",
        "trust/test_seal.py::test_a_stream_that_is_cut_anywhere_is_refused",
        "transfer/test_si.py::test_wrong_offers_are_refused_as_the_specification_wants",
    ],
    "C-17": ["bytestreams/test_inband.py::test_a_bad_block_ends_the_stream_for_both"],
    "C-18": [
        "control/test_server.py::test_only_the_owner_can_reach_the_socket",
        "control/test_server.py::test_an_oversized_message_is_dropped_and_others_are_served",
        "control/test_server.py::test_an_old_libzmq_is_refused",
        "control/test_server.py::test_what_is_not_our_socket_is_refused_and_left_alone",
        "test_daemon.py::test_a_second_daemon_of_the_same_socket_is_refused",
    ],
    "C-19": ["test_supply.py::test_no_data_becomes_code_and_no_shell_is_asked"],
    "C-20": [
        "settings/test_password.py::test_a_command_runs_without_a_shell",
        "test_supply.py::test_no_data_becomes_code_and_no_shell_is_asked",
    ],
    "C-21": [
        "settings/test_password.py::test_the_secret_is_never_shown",
        "link/test_fast.py::test_a_token_is_never_shown",
        "trust/test_identity.py::test_a_file_that_others_may_read_is_refused",
        "settings/test_places.py::test_a_password_that_others_may_read_warns",
        "test_config.py::test_who_else_may_read_an_inline_password_is_warned_of",
        "test_supply.py::test_every_version_is_exact",
    ],
    "C-22": [
        "link/test_session.py::test_who_gives_no_answer_is_not_waited_for_for_ever",
        "transfer/test_receiver.py::test_bytestream_that_is_never_opened_ends_the_transfer",
        "transfer/test_receiver.py"
        "::test_transfer_that_is_never_finished_ends_and_keeps_its_bytes",
        "transfer/test_pump.py::test_a_sender_that_falls_silent_is_given_up",
        "transfer/test_sender.py::test_silence_after_an_offer_has_an_end",
        "bytestreams/test_sockets.py::test_who_says_nothing_is_closed_after_five_seconds",
    ],
}

# Parts of rows for which there is nothing to prove, and why.
DOES_NOT_APPLY = {
    "C-07": "no differential fuzz against lxml, which neither syncd nor its tests depend on; "
    "what we read and write is compared with xml.etree instead, in xmpp/test_xml.py",
    "C-20": "no program is run for a file: there are no hooks; only password_command is run",
    "C-21": "there is no web interface; signed tags and an SBOM belong to a release",
}

# Clauses of the review that are not done as it has them, deliberately; by row. A row is proved
# as a whole, so what stands here would otherwise be taken for done.
NOT_DONE = {
    "C-01": {
        "paths between syncds become NFC": "two names that differ only in their normalisation "
        'are two files at the sender\'s, and stay two; names = "portable" declines the second',
        "no hidden file at the top of a folder": "a folder is delivered as it is, from whom it "
        "accepts; the name of a plain client's file does lose its dots",
    },
    "C-13": {
        "addresses are compared in constant time": "they are looked up in a dict whose hashing "
        "is keyed, and are themselves hashes over a sid of 128 random bits",
        "the listener is only open while offers live": "its port must be known before an offer "
        "goes out, as receivers wait 5 seconds; with no offer it refuses everybody",
        "one connection for an address": "Psi, Gajim and slixmpp open several at once and use "
        "one; four are kept until that one is known, and all others closed",
    },
    "C-15": {
        "a limit of files in a directory": "who is accepted may send as many files as its "
        "quota and rate of offers allow; how many a directory holds is for its file system",
    },
    "C-16": {
        "SHA-256, in the field of XEP-0300": "BLAKE3, which keeps up with disks, in our own "
        "<finish/>, where it can be sealed",
        "what came without a hash is marked": "files that have arrived are listed nowhere, so "
        "there is nothing to mark; its length is checked, and its MD5 if there is one",
    },
    "C-17": {
        "white space in base64 is refused": "Gajim sends it; it goes before the rest is judged",
    },
    "C-18": {
        "two sockets, one for reading and one for a group of administrators": "one, for its "
        "owner alone: who may read the names of all files may as well send them",
    },
    "C-21": {
        "dependencies are pinned by hash": "by their exact versions: the hashes differ by "
        "platform and Python, and a distribution builds its own; a release can carry them",
    },
}

_NAMED = re.compile(r"test_c(\d\d)_")


@cache
def functions(path: str) -> frozenset[str]:
    """The tests of a module."""
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


@cache
def named() -> dict[str, list[str]]:
    """The tests with a row in their name, or in that of their module; by row."""
    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.rglob("test_*.py")):
        path = file.relative_to(TESTS).as_posix()
        for name in sorted(functions(path)):
            if not name.startswith("test_"):
                continue
            if match := _NAMED.match(name) or _NAMED.match(file.name):
                found.setdefault(f"C-{match[1]}", []).append(f"{path}::{name}")
    return found


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_proved_or_does_not_apply(row: str) -> None:
    assert named().get(row, []) + PROVED_BY.get(row, []) or row in DOES_NOT_APPLY


@pytest.mark.parametrize("row", PROVED_BY)
def test_what_the_table_names_exists(row: str) -> None:
    for test in PROVED_BY[row]:
        path, _, name = test.partition("::")
        assert name in functions(path), test


def test_there_are_no_other_rows() -> None:
    assert {*named(), *PROVED_BY, *DOES_NOT_APPLY, *NOT_DONE} <= set(ROWS)
    assert list(ROWS) == [f"C-{number:02}" for number in range(1, 23)]


def test_what_is_here_names_its_row() -> None:
    here = Path(__file__)
    others = [file.name for file in sorted(here.parent.glob("test_*.py")) if file != here]
    assert [name for name in others if not _NAMED.match(name)] == []
