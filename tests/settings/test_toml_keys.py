from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.errors import ConfigError
from syncd.settings.toml_keys import (
    MAX_FILE,
    Key,
    Report,
    UnfitError,
    argument_list,
    boolean,
    byte_count,
    byte_rate,
    check_table_names,
    list_of,
    number,
    one_of,
    path,
    read_table,
    read_text,
    secret,
    string,
    whole_number,
)

if TYPE_CHECKING:
    from syncd.settings.toml_keys import Reader

TABLES = {
    "kitchen": (
        Key("cook", string, required=True, doc="Who cooks."),
        Key("pots", whole_number(1, 9), default=4, doc="How many pots."),
        Key("door", path, doc="The door."),
    ),
    "guest": (Key("id", string, required=True, doc="Who comes."),),
}


def problems(text: str) -> str:
    """All that is wrong with a file that TABLES describe; empty when nothing is."""
    report = Report(where="menu.toml", text=text)
    check_table_names(report, TABLES)
    read_table(report, ("kitchen",), report.data.get("kitchen", {"cook": "Ann"}), TABLES)
    for index, guest in enumerate(report.data.get("guest", [])):
        read_table(report, ("guest", index), guest, TABLES)
    try:
        report.raise_if_any()
    except ConfigError as error:
        return str(error)
    return ""


def test_values_and_defaults_are_read() -> None:
    report = Report(where="menu.toml", text='[kitchen]\ncook = "Ann"')
    values = read_table(report, ("kitchen",), report.data["kitchen"], TABLES)
    assert values == {"cook": "Ann", "pots": 4, "door": None}
    report.raise_if_any()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[kitchen]\ncook = "A"', ""),
        (
            '[kitchen]\n\ncook = "A"\npot = 3',
            "menu.toml:4: [kitchen] pot: unknown key; did you mean pots?",
        ),
        (
            '[kitchen]\ncook = "A"\nspoon = 3',
            "menu.toml:3: [kitchen] spoon: unknown key; known here: cook, pots, door",
        ),
        (
            '[kitchen]\ncook = "A"\nid = "x"',
            "menu.toml:3: [kitchen] id: unknown here; it belongs below [guest]",
        ),
        ("[kitchen]\npots = 3", "menu.toml:1: [kitchen] cook: missing. Who cooks."),
        (
            '[kitchen]\ncook = "A"\npots = true',
            "menu.toml:3: [kitchen] pots: expected a whole number from 1 to 9, "
            "found true (a boolean)",
        ),
        ("[kitchn]", "menu.toml:1: [kitchn]: unknown table; did you mean [kitchen]?"),
        ("[[kitchn]]", "menu.toml:1: [kitchn]: unknown table; did you mean [kitchen]?"),
        ("[xyz]", "menu.toml:1: [xyz]: unknown; known tables: kitchen, guest"),
        ("pots = 3", "menu.toml:1: pots: unknown here; it belongs below [kitchen]"),
        ("[[kitchen]]", "menu.toml:1: [kitchen]: expected one table [kitchen], found a list"),
        (
            "kitchen = 3",
            "menu.toml:1: kitchen: expected one table [kitchen], found 3 (a whole number)",
        ),
        (
            '[[guest]]\nid = "Bob"\n[[guest]]\nid = "Carol"\nname = "C"',
            'menu.toml:5: [guest 2 "Carol"] name: unknown key; known here: id',
        ),
        ("[[guest]]", "menu.toml:1: [guest 1] id: missing. Who comes."),
        (
            "guest = [1]",
            "menu.toml:1: [guest 1]: expected one table [guest], found 1 (a whole number)",
        ),
    ],
)
def test_a_problem_is_named_with_its_place(text: str, problem: str) -> None:
    assert problems(text) == problem


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[kitchen] # of the house\r\ncook = 1\r\n", 2),
        ('["kitchen"]\n  "cook" = 1', 2),
        ("kitchen.cook = 1", 1),
        ("\n'kitchen' . cook = 1", 2),
        ("\nkitchen = {cook = 1}", 2),
        ('[kitchen]\npots = 3 # cook = "A"\ncook = 1', 3),
    ],
)
def test_the_line_is_found_in_every_writing(text: str, line: int) -> None:
    assert problems(text) == (
        f"menu.toml:{line}: [kitchen] cook: expected a string, found 1 (a whole number)"
    )


def test_problems_come_together_and_in_the_order_of_the_file() -> None:
    assert problems("[[guest]]\nid = 1\nx = 2\n[kitchen]\npots = 0\n[what]") == (
        'menu.toml:2: [guest 1 "1"] id: expected a string, found 1 (a whole number)\n'
        'menu.toml:3: [guest 1 "1"] x: unknown key; known here: id\n'
        "menu.toml:4: [kitchen] cook: missing. Who cooks.\n"
        "menu.toml:5: [kitchen] pots: expected a whole number from 1 to 9, "
        "found 0 (a whole number)\n"
        "menu.toml:6: [what]: unknown; known tables: kitchen, guest"
    )


def test_values_can_be_judged_without_a_text() -> None:
    report = Report(where="menu.toml", text="")
    report.problem(("guest", 0, "id"), "is late", "is hungry")
    with pytest.raises(ConfigError) as caught:
        report.raise_if_any()
    assert str(caught.value) == (
        "menu.toml: [guest 1] id: is late\nmenu.toml: [guest 1] id: is hungry"
    )
    assert caught.value.hint == "correct menu.toml and start again"


def test_a_syntax_error_has_line_and_column() -> None:
    with pytest.raises(ConfigError) as caught:
        Report(where="menu.toml", text="[kitchen]\ncook = Ann\n")
    assert str(caught.value) == "menu.toml:2: not TOML: Invalid value (column 8)"
    assert caught.value.hint == 'text stands in quotes: key = "value"'


def test_a_syntax_error_does_not_carry_the_text() -> None:
    """Tomli's error holds all of it, and with it maybe a password."""
    with pytest.raises(ConfigError) as caught:
        Report(where="menu.toml", text="secret")
    assert caught.value.__suppress_context__


FITS: list[tuple[Reader, object, object]] = [
    (string, "x", "x"),
    (secret, "x", "x"),
    (boolean, False, False),
    (whole_number(1, 3), 3, 3),
    (byte_rate, 0, 0),
    (byte_rate, 1048576, 1 << 20),
    (byte_rate, "0", 0),
    (byte_rate, "2048", 2048),
    (byte_rate, "5 MiB", 5 << 20),
    (byte_rate, "1.5KiB/s", 1536),
    (byte_rate, "500 kB/s", 500_000),
    (byte_count, 0, 0),
    (byte_count, 1, 1),
    (byte_count, (1 << 63) - 1, (1 << 63) - 1),
    (byte_count, "2.5 GiB", 5 << 29),
    (number(0, 3, "hours"), 0, 0.0),
    (number(0, 3, "hours"), 2.5, 2.5),
    (one_of("on", "off"), "off", "off"),
    (list_of(string, example='["x"]'), ["b", "a"], ("b", "a")),
    (list_of(string, example='["x"]'), [], ()),
    (argument_list, ["echo", "a", "a", ""], ("echo", "a", "a", "")),
    (path, "~/x", Path("~/x")),
]


@pytest.mark.parametrize(("read", "value", "result"), FITS)
def test_a_fitting_value_is_read(read: Reader, value: object, result: object) -> None:
    assert read(value) == result


UNFIT: list[tuple[Reader, object, tuple[str, ...]]] = [
    (string, "", ("expected a string, found an empty string",)),
    (string, 1.5, ("expected a string, found 1.5 (a number)",)),
    (string, {"a": 1}, ("expected a string, found a table",)),
    (secret, 12345, ("expected a string, found a whole number",)),
    (secret, "", ("expected a string, found an empty string",)),
    (boolean, "yes", ('expected true or false, found "yes" (a string)',)),
    (boolean, 1, ("expected true or false, found 1 (a whole number)",)),
    (
        whole_number(1, 3),
        4.0,
        ("expected a whole number from 1 to 3, found 4.0 (a number)",),
    ),
    (
        number(0, 3, "hours"),
        math.nan,
        ("expected a number of hours from 0 to 3, found nan (a number)",),
    ),
    (
        number(0, 3, "hours"),
        True,
        ("expected a number of hours from 0 to 3, found true (a boolean)",),
    ),
    (
        number(0, 3, "hours"),
        "2",
        ('expected a number of hours from 0 to 3, found "2" (a string)',),
    ),
    (
        one_of("red", "green", "blue"),
        "gren",
        ('expected "red", "green" or "blue", found "gren"; did you mean "green"?',),
    ),
    (one_of("red", "blue"), "x", ('expected "red" or "blue", found "x"',)),
    (one_of("red", "blue"), 7, ('expected "red" or "blue", found 7 (a whole number)',)),
    (
        list_of(string, example='["x"]'),
        "x",
        ('expected a list such as ["x"], found "x" (a string)',),
    ),
    (
        list_of(string, example='["x"]'),
        [1, "a", "a", []],
        (
            "item 1: expected a string, found 1 (a whole number)",
            'item 3: "a" is in the list twice',
            "item 4: expected a string, found an empty list",
        ),
    ),
    (
        list_of(string, example='["x"]', least=1),
        [],
        ('expected a list such as ["x"], found an empty list',),
    ),
    (
        argument_list,
        "pass show xmpp",
        (
            'expected a list of strings, the program first, such as ["pass", "show", "xmpp"]; '
            "found a string",
        ),
    ),
    (
        argument_list,
        [],
        (
            'expected a list of strings, the program first, such as ["pass", "show", "xmpp"]; '
            "found an empty list",
        ),
    ),
    (
        argument_list,
        ["", "x"],
        ("expected a program and its arguments, found an empty name or a NUL",),
    ),
    *(
        (
            byte_rate,
            value,
            (
                "expected bytes per second (1 KiB to 1 TiB) such as 1048576 or "
                f'"5 MiB", or 0 for no limit, found {found}',
            ),
        )
        for value, found in [
            (1023, "1023 (a whole number)"),
            (-1, "-1 (a whole number)"),
            (1 << 41, "2199023255552 (a whole number)"),
            (True, "true (a boolean)"),
            (2.5e6, "2500000.0 (a number)"),
            ("5 mib", '"5 mib" (a string)'),
            ("-5 MiB", '"-5 MiB" (a string)'),
            ("0.1 B", '"0.1 B" (a string)'),
            ("5 miB", '"5 miB" (a string)'),
            ("5 TiB", '"5 TiB" (a string)'),
            ("", "an empty string"),
        ]
    ),
    *(
        (
            byte_count,
            value,
            (f'expected bytes such as 1048576 or "10 GiB", or 0 for no limit, found {found}',),
        )
        for value, found in [
            (-1, "-1 (a whole number)"),
            (1 << 63, "9223372036854775808 (a whole number)"),
            (False, "false (a boolean)"),
            ("5 MiB/s", '"5 MiB/s" (a string)'),
            ("0.5", '"0.5" (a string)'),
            ("999999999999999 TiB", '"999999999999999 TiB" (a string)'),
        ]
    ),
    (path, "a\0b", ("expected a path, found a NUL in it",)),
]


@pytest.mark.parametrize(("read", "value", "sentences"), UNFIT)
def test_an_unfit_value_is_refused_in_words(
    read: Reader, value: object, sentences: tuple[str, ...]
) -> None:
    with pytest.raises(UnfitError) as caught:
        read(value)
    assert caught.value.args == sentences


def test_a_date_is_called_one() -> None:
    assert problems("[kitchen]\ncook = 2024-02-29") == (
        "menu.toml:2: [kitchen] cook: expected a string, found 2024-02-29 (a date or time)"
    )


def test_a_long_value_is_cut() -> None:
    with pytest.raises(UnfitError) as caught:
        boolean("x" * 1000)
    assert caught.value.args == (f'expected true or false, found "{"x" * 58}… (a string)',)


@given(st.text("[]kitchen.gues\"'=#{}1,\n \r\t", max_size=60))
def test_no_text_breaks_the_search_for_lines(text: str) -> None:
    """Whatever tomli takes, every value in it gets a line that exists, or none."""
    try:
        report = Report(where="menu.toml", text=text)
    except ConfigError:
        return
    lines = text.count("\n") + 1
    assert all(1 <= report._line((name,)) <= lines for name in report.data)


def test_a_file_is_read_with_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("a = 1\n")
    file.chmod(0o640)
    text, mode = read_text(file)
    assert text == "a = 1\n"
    assert mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = 1\nb = '\xff'\n", "{}:2: not UTF-8 text"),
        (b"#" * (MAX_FILE + 1), "{} is longer than 1048576 bytes: not a configuration"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_text(file)
    assert str(caught.value) == message.format(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(tmp_path / "config.toml")
    assert str(caught.value) == (
        f"{tmp_path}/config.toml cannot be read: No such file or directory"
    )
    assert caught.value.hint == (
        "name another file with --config, or start from config.example.toml"
    )
