"""A TOML file read by a description of its keys, and all that is wrong with it said at once.

A `Key` names a key, the reader of its value, its default and what it does. A reader takes
what TOML gives and returns what the program wants, or raises `UnfitError` with a sentence:
expected what, found what. A `Report` collects those, each with its line, until
`Report.raise_if_any`: who corrects a file wants to correct it once.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import tomli

from syncd.errors import ConfigError

Reader = Callable[[object], Any]
"""Takes a value as TOML has it; returns it as the program wants it, or raises `UnfitError`."""

Place = tuple[str | int, ...]
"""The way to a value: table, index from 0 in an array of tables, key."""

# From a modem to more than any network card; what is slower lets every transfer stall.
MIN_RATE, MAX_RATE = 1 << 10, 1 << 40  # bytes per second

# The longest file that there can be.
MAX_COUNT = (1 << 63) - 1  # bytes

MAX_FILE = 1 << 20  # bytes; thousands of folders, and nothing that hurts

# Enough to recognise the value in its file, short enough for one line of a terminal.
MAX_SHOWN = 60  # characters


@dataclass(frozen=True, slots=True)
class Key:
    """What one key may hold.

    Attributes:
      name: As written in the file.
      read: Reader of its value.
      doc: What it does, in one sentence, with its unit.
      default: As TOML has it; None stands for "nothing", or for one that is worked out.
      required: There is no default.
    """

    name: str
    read: Reader
    _: KW_ONLY
    doc: str
    default: object = None
    required: bool = False


class UnfitError(ValueError):
    """A key cannot hold this value; every argument is a sentence of its own."""


class Report:
    """What is wrong with a file, and where.

    Args:
      where: The name of the file as the user knows it.
      text: What is in it; may be empty when only values are judged, then without lines.

    Attributes:
      data: The file as TOML has it.

    Raises:
      ConfigError: It is not TOML.
    """

    def __init__(self, *, where: str, text: str) -> None:
        self._where = where
        try:
            self.data: Mapping[str, Any] = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            raise ConfigError(
                f"{where}:{error.lineno}: not TOML: {error.msg} (column {error.colno})",
                hint='text stands in quotes: key = "value"',
            ) from None  # the cause holds the whole text, and with it maybe the password
        self._lines = _line_numbers(text)
        self._problems: list[tuple[int, str]] = []

    def problem(self, place: Place, *sentences: str) -> None:
        """Note what is wrong at a place; goes on."""
        line = self._line(place)
        self._problems += [(line, f"{self.at(place)}: {sentence}") for sentence in sentences]

    def raise_if_any(self) -> None:
        """End with everything noted so far, in the order of the file.

        Raises:
          ConfigError: There is something; one line for each.
        """
        if self._problems:
            lines = [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]
            raise ConfigError("\n".join(lines), hint=f"correct {self._where} and start again")

    def at(self, place: Place) -> str:
        """Words for a place: ``config.toml:12: [folder 1 "photos"] send_to``."""
        line = self._line(place)
        where = f"{self._where}:{line}" if line else self._where
        return f"{where}: {self._label(place)}"

    def _label(self, place: Place) -> str:
        table, *rest = place
        if not rest and isinstance(self.data.get(str(table)), str | int | float):
            return str(table)  # a key before the first table
        name = str(table)
        if rest and isinstance(index := rest[0], int):
            rest = rest[1:]
            name = f"{table} {index + 1}"
            with contextlib.suppress(LookupError, TypeError):  # without id the number must do
                name += f' "{self.data[str(table)][index]["id"]}"'
        return " ".join([f"[{name}]", *map(str, rest)])

    def _line(self, place: Place) -> int:
        """The line of a place or of the nearest thing around it, from 1; 0 if unknown."""
        for end in range(len(place), 0, -1):
            if line := self._lines.get(place[:end]):
                return line
        return 0


def read_text(file: Path) -> tuple[str, int]:
    """Read a configuration file; blocks.

    Returns:
      The text, and the mode bits of the file.

    Raises:
      ConfigError: It cannot be read, or is no text.
    """
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            data = opened.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}",
            hint="name another file with --config, or start from config.example.toml",
        ) from error
    if len(data) > MAX_FILE:
        raise ConfigError(f"{file} is longer than {MAX_FILE} bytes: not a configuration")
    try:
        # An editor of Windows may have put a mark in front.
        return data.decode("utf-8-sig"), mode
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: not UTF-8 text") from error


def check_table_names(report: Report, tables: Mapping[str, Iterable[Key]]) -> None:
    """Report what stands at the top of the file and is none of its tables."""
    for name, value in report.data.items():
        if name in tables:
            continue
        if isinstance(value, dict | list) and (close := nearest(name, tables)):
            report.problem((name,), f"unknown table; did you mean [{close}]?")
        elif owner := _owner(name, tables):
            report.problem((name,), f"unknown here; it belongs below [{owner}]")
        else:
            report.problem((name,), f"unknown; known tables: {', '.join(tables)}")


def read_table(
    report: Report, place: Place, data: object, tables: Mapping[str, Iterable[Key]]
) -> dict[str, Any]:
    """Read one table by the description that its name has in `tables`.

    Args:
      report: Takes what is wrong.
      place: Where the table stands; the first part is its name.
      data: The table as TOML has it.
      tables: All tables of the file, to say where a misplaced key belongs.

    Returns:
      Values by key. A key whose value is wrong is missing; one that is not in the file has
      its default.
    """
    if not isinstance(data, dict):
        report.problem(place, expected(f"one table [{place[0]}]", data))
        return {}
    keys = {key.name: key for key in tables[str(place[0])]}
    for name in data:
        if name not in keys:
            report.problem((*place, name), _unknown_key(name, keys, tables))
    values: dict[str, Any] = {}
    for key in keys.values():
        if key.name not in data and key.required:
            report.problem((*place, key.name), f"missing. {key.doc}")
        elif (value := data.get(key.name, key.default)) is None:
            values[key.name] = None
        else:
            try:
                values[key.name] = key.read(value)
            except UnfitError as error:
                report.problem((*place, key.name), *error.args)
    return values


def _unknown_key(name: str, keys: Iterable[str], tables: Mapping[str, Iterable[Key]]) -> str:
    if close := nearest(name, keys):
        return f"unknown key; did you mean {close}?"
    if owner := _owner(name, tables):
        return f"unknown here; it belongs below [{owner}]"
    return f"unknown key; known here: {', '.join(keys)}"


def _owner(name: str, tables: Mapping[str, Iterable[Key]]) -> str:
    owners = (table for table, keys in tables.items() if any(k.name == name for k in keys))
    return next(owners, "")


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, or nothing."""
    return next(iter(difflib.get_close_matches(name.lower(), list(known), n=1)), "")


# --- Readers


def string(value: object) -> str:
    """Read text that is not empty."""
    if not isinstance(value, str) or not value:
        raise UnfitError(expected("a string", value))
    return value


def secret(value: object) -> str:
    """Read text that must never be shown."""
    if not isinstance(value, str) or not value:
        raise UnfitError(f"expected a string, found {_kind(value)}")
    return value


def boolean(value: object) -> bool:
    """Read a yes or no."""
    if not isinstance(value, bool):
        raise UnfitError(expected("true or false", value))
    return value


def whole_number(low: int, high: int) -> Reader:
    """Make a reader of whole numbers between two limits, both included."""

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UnfitError(expected(f"a whole number from {low} to {high}", value))
        return value

    return read


def byte_rate(value: object) -> int:
    """Read a speed: bytes per second, or text such as ``"5 MiB"`` or ``"500 kB/s"``.

    Returns:
      Bytes per second; 0 stands for no limit.
    """
    rate: float = -1
    if isinstance(value, int) and not isinstance(value, bool):
        rate = value
    elif isinstance(value, str) and (found := _RATE.fullmatch(value)):
        rate = float(found[1]) * _UNITS[found[2] or "B"]
    if rate and not MIN_RATE <= rate <= MAX_RATE:
        what = 'bytes per second (1 KiB to 1 TiB) such as 1048576 or "5 MiB", or 0 for no limit'
        raise UnfitError(expected(what, value))
    return int(rate)


def byte_count(value: object) -> int:
    """Read a length: bytes, or text such as ``"10 GiB"``.

    Returns:
      Bytes; 0 stands for no limit.
    """
    count: float = -1
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str) and (found := _COUNT.fullmatch(value)):
        count = float(found[1]) * _UNITS[found[2] or "B"]
    if not 0 <= count <= MAX_COUNT or 0 < count < 1:
        what = 'bytes such as 1048576 or "10 GiB", or 0 for no limit'
        raise UnfitError(expected(what, value))
    return int(count)


_UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_AMOUNT = rf"([0-9]{{1,15}}(?:\.[0-9]{{1,9}})?)[ ]?({'|'.join(_UNITS)})?"
_RATE = re.compile(rf"{_AMOUNT}(?:/s)?")
_COUNT = re.compile(_AMOUNT)


def number(low: float, high: float, unit: str) -> Reader:
    """Make a reader of numbers between two limits, both included."""

    def read(value: object) -> float:
        # The comparison is false for nan, which TOML has.
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and low <= value <= high
        ):
            return float(value)
        raise UnfitError(expected(f"a number of {unit} from {low:g} to {high:g}", value))

    return read


def one_of(*choices: str) -> Reader:
    """Make a reader of words out of a list."""
    listed = " or ".join([", ".join(f'"{c}"' for c in choices[:-1]), f'"{choices[-1]}"'])

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            sentence = expected(listed, value, text=True)
            close = nearest(value, choices) if isinstance(value, str) else ""
            raise UnfitError(f'{sentence}; did you mean "{close}"?' if close else sentence)
        return value

    return read


def list_of(read_item: Reader, *, example: str, least: int = 0) -> Reader:
    """Make a reader of lists without doubles; it judges every item, not only the first."""

    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise UnfitError(expected(f"a list such as {example}", value))
        items: list[Any] = []
        wrong: list[str] = []
        for position, raw in enumerate(value, 1):
            try:
                item = read_item(raw)
            except UnfitError as error:
                wrong += [f"item {position}: {sentence}" for sentence in error.args]
                continue
            if item in items:
                wrong.append(f"item {position}: {_shown(raw)} is in the list twice")
            items.append(item)
        if wrong:
            raise UnfitError(*wrong)
        if len(items) < least:
            raise UnfitError(expected(f"a list such as {example}", value))
        return tuple(items)

    return read


def argument_list(value: object) -> tuple[str, ...]:
    """Read a program and its arguments, which may be alike or empty."""
    if not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        raise UnfitError(
            'expected a list of strings, the program first, such as ["pass", "show", "xmpp"]; '
            f"found {_kind(value)}"
        )
    if not value[0] or any("\0" in v for v in value):
        raise UnfitError("expected a program and its arguments, found an empty name or a NUL")
    return tuple(value)


def path(value: object) -> Path:
    """Read a path; `~` and relative ones are still to be resolved."""
    text = string(value)
    if "\0" in text:
        raise UnfitError("expected a path, found a NUL in it")
    return Path(text)


# --- Words


def expected(what: str, value: object, *, text: bool = False) -> str:
    """Say what a key wants, and what it got.

    Args:
      what: In words.
      value: As TOML has it.
      text: A string is wanted, so it need not be said that this is one.
    """
    if isinstance(value, dict | list) or value == "":
        return f"expected {what}, found {_kind(value)}"
    if text and isinstance(value, str):
        return f"expected {what}, found {_shown(value)}"
    return f"expected {what}, found {_shown(value)} ({_kind(value)})"


def _shown(value: object) -> str:
    if isinstance(value, str | bool):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def _kind(value: object) -> str:
    match value:
        case bool():
            return "a boolean"
        case str():
            return "a string" if value else "an empty string"
        case int():
            return "a whole number"
        case float():
            return "a number"
        case list():
            return "a list" if value else "an empty list"
        case dict():
            return "a table"
        case _:  # TOML has nothing else
            return "a date or time"


# --- Lines

_NAME = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_DOTTED = rf"{_NAME}(?:[ \t]*\.[ \t]*{_NAME})*"
_HEADER = re.compile(rf"[ \t]*(\[\[?)[ \t]*({_DOTTED})[ \t]*\]\]?[ \t]*(?:#.*)?")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")


def _line_numbers(text: str) -> dict[Place, int]:
    """Find the line of every table and key, from 1.

    tomli does not tell, so this looks for what begins like a table or a key. Lines inside
    a multi-line string may look so, too: the text is TOML already, so the worst that comes
    of it is a line number that is off.
    """
    lines: dict[Place, int] = {}
    table: Place = ()
    counts: dict[Place, int] = {}
    for number_, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.fullmatch(line.rstrip("\r")):
            table = _names(header[2])
            if header[1] == "[[":
                lines.setdefault(table, number_)
                counts[table] = counts.get(table, -1) + 1
                table = (*table, counts[table])
            lines.setdefault(table, number_)
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault((*table, *_names(assignment[1])), number_)
    return lines


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(name.strip("\"'") for name in re.findall(_NAME, dotted))
