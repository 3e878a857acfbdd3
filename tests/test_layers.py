"""The rules of the map in `syncd`'s docstring, proved by reading every module's imports.

Each rule is a function from sources to faults, so that it is first shown to find something.
"""

from __future__ import annotations

import ast
import io
import tokenize
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parent.parent

# Which part of the map a module at the top belongs to; in a folder it is the folder's.
TOP = {
    "syncd": "map",
    "syncd.__main__": "daemon",
    "syncd.config": "config",
    "syncd.daemon": "daemon",
    "syncd.log": "daemon",
    "syncd.errors": "errors",
    "syncd.notify": "daemon",
    "syncd.cli.demo": "demo command",
}

# What each part may import beside itself, and beside `__version__` of the map.
MAY_IMPORT = {
    "map": set[str](),
    "errors": set[str](),
    "xmpp": {"errors"},
    "link": {"xmpp", "errors"},
    "sync": {"disk", "errors"},
    "control": {"errors"},
    "disk": {"errors"},
    "trust": {"errors"},
    "bytestreams": {"xmpp", "errors"},
    "transfer": {"xmpp", "disk", "trust", "bytestreams", "errors"},
    "settings": {"config", "xmpp", "errors"},
    "config": {"settings", "xmpp", "errors"},
    "cli": {"control", "config", "settings", "errors", "demo command"},
    "demo command": {"cli", "control", "config", "errors", "demo", "daemon"},
    "demo": {"xmpp", "transfer", "bytestreams", "errors"},
    "wiring": {
        "errors",
        "xmpp",
        "link",
        "disk",
        "sync",
        "control",
        "trust",
        "bytestreams",
        "transfer",
        "config",
    },
    "daemon": {
        "errors",
        "xmpp",
        "link",
        "disk",
        "sync",
        "control",
        "trust",
        "bytestreams",
        "transfer",
        "config",
        "wiring",
    },
}

# What a module that says this in its docstring keeps away from.
MARK = "Sans-IO"
IMPURE = {
    "asyncio", "os", "random", "secrets", "select", "socket", "ssl", "subprocess", "threading",
    "time", "trio",
}  # fmt: skip

# Where the protocols are decided; they may not lose the mark unnoticed.
SANS_IO = {
    "syncd.errors",
    "syncd.wiring.allowances",
    "syncd.control.messages",
    "syncd.control.summary",
    "syncd.sync.limits",
    "syncd.sync.plan",
    "syncd.sync.settle",
    "syncd.bytestreams.ibb",
    "syncd.bytestreams.proxies",
    "syncd.bytestreams.s5b",
    "syncd.transfer.si",
    "syncd.bytestreams.socks5",
    "syncd.link.contacts",
    "syncd.link.retry",
    "syncd.trust.handshake",
    "syncd.trust.kem",
    "syncd.trust.pins",
    "syncd.trust.receipt",
    "syncd.trust.seal",
    "syncd.trust.signing",
    "syncd.trust.words",
    "syncd.xmpp.caps",
    "syncd.xmpp.login",
    "syncd.xmpp.sm",
    "syncd.xmpp.disco",
    "syncd.xmpp.jid",
    "syncd.xmpp.sasl",
    "syncd.xmpp.stanza",
    "syncd.xmpp.stream",
    "syncd.xmpp.xml",
}

# Longer ones are rarely about one thing; the docstring of one that is says why, and this.
MAX_LINES = 400  # lines of code
LONGER = f"{MAX_LINES} lines"

# As many names as one takes in at a glance.
MAX_MODULES = 9  # of a folder

# Names that say nothing, and so attract everything.
EMPTY_NAMES = {"base", "common", "helper", "helpers", "manager", "misc", "util", "utils"}


def read_sources() -> dict[str, str]:
    """All modules of syncd, by name."""
    found = {}
    for file in sorted((ROOT / "syncd").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file.read_text(encoding="utf-8")
    return found


SOURCES = read_sources()


def is_package(name: str, sources: Mapping[str, str]) -> bool:
    return any(other.startswith(f"{name}.") for other in sources)


def imported(name: str, sources: Mapping[str, str]) -> set[str]:
    """Every module that a module imports, also inside functions and only for types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(sources[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                up = node.level - is_package(name, sources)
                home = name.split(".")
                start = ".".join([*home[: len(home) - up], *filter(None, [node.module])])
            for alias in node.names:
                # What is imported from a package may be a module of it.
                inner = f"{start}.{alias.name}"
                found.add(inner if inner in sources else start)
    return found


def part_of(name: str) -> str | None:
    if name in TOP:
        return TOP[name]
    folder = name.split(".")[1]
    return folder if folder in MAY_IMPORT and f"syncd.{folder}" not in TOP else None


def claims(name: str, sources: Mapping[str, str]) -> bool:
    """Whether a module says that it is sans-IO."""
    return MARK in (ast.get_docstring(ast.parse(sources[name])) or "")


# --- The rules


def layer_faults(sources: Mapping[str, str]) -> Iterator[str]:
    """Tell who imports whom against the map."""
    for name in sources:
        part = part_of(name)
        if part is None:
            yield f"{name} is on no layer: put it into a folder, or into TOP"
            continue
        for other in sorted(imported(name, sources)):
            if other.partition(".")[0] != "syncd" or other == "syncd":
                continue
            theirs = part_of(other)
            if theirs not in {part, *MAY_IMPORT[part]}:
                yield f"{name} ({part}) imports {other} ({theirs})"
            elif part == "demo" != theirs and other in sources and not claims(other, sources):
                yield f"{name} (demo) imports {other}, which is not sans-IO"


def purity_faults(sources: Mapping[str, str]) -> Iterator[str]:
    """Tell which modules say that they are sans-IO and are not, even by what they import."""
    for name in sources:
        # The map only explains the mark.
        if name == "syncd" or not claims(name, sources):
            continue
        for other in sorted(imported(name, sources)):
            if other.partition(".")[0] in IMPURE:
                yield f"{name} is sans-IO and imports {other}"
            if other in sources and other != "syncd" and not claims(other, sources):
                yield f"{name} is sans-IO and imports {other}, which is not"


def code_lines(source: str) -> int:
    """Count the lines that are neither blank, comment nor docstring."""
    strings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    empty = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER,
    }  # fmt: skip
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in empty
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - strings)


def size_faults(sources: Mapping[str, str]) -> Iterator[str]:
    """Tell which modules are too long, and which folders too full."""
    for name, source in sources.items():
        lines = code_lines(source)
        if lines > MAX_LINES and LONGER not in (ast.get_docstring(ast.parse(source)) or ""):
            yield f"{name} has {lines} lines of code, and its docstring does not say why"
    modules = sorted(
        name.rpartition(".")[0]
        for name in sources
        if not is_package(name, sources) and not name.endswith("__main__")
    )
    for folder, inside in groupby(modules):
        if (count := len(list(inside))) > MAX_MODULES:
            yield f"{folder} has {count} modules"


def form_faults(sources: Mapping[str, str]) -> Iterator[str]:
    """Tell which folders are more than their chapter, and which names say nothing."""
    for name, source in sources.items():
        tree = ast.parse(source)
        if ast.get_docstring(tree) is None:
            yield f"{name} has no docstring"
        if is_package(name, sources) and name != "syncd" and len(tree.body) > 1:
            yield f"{name} is a folder, and more than a docstring"
        if EMPTY_NAMES & set(name.rpartition(".")[2].split("_")):
            yield f"{name} has a name that says nothing"


def twin_faults(sources: Mapping[str, str], tests: set[str]) -> Iterator[str]:
    """Tell which modules lack their own test file.

    Args:
      sources: All modules.
      tests: The paths of all files below tests, with ``/``.
    """
    for name in sources:
        if is_package(name, sources) or name.endswith("__main__"):
            continue
        *folders, module = name.split(".")[1:]
        twin = "/".join([*folders, f"test_{module}.py"])
        if twin not in tests:
            yield f"{name} has no tests/{twin}"


# --- They hold


def assert_none(faults: Iterator[str]) -> None:
    """Fail with all of them, however many."""
    found = list(faults)
    assert found == [], "\n".join(["", *found])


def test_every_import_follows_the_map() -> None:
    assert_none(layer_faults(SOURCES))


def test_sans_io_modules_know_no_io() -> None:
    assert_none(purity_faults(SOURCES))


@pytest.mark.parametrize("name", sorted(SANS_IO))
def test_the_protocols_say_that_they_are_sans_io(name: str) -> None:
    assert name in SOURCES
    assert claims(name, SOURCES)


def test_modules_and_folders_stay_small() -> None:
    assert_none(size_faults(SOURCES))


def test_folders_are_chapters_and_names_speak() -> None:
    assert_none(form_faults(SOURCES))


def test_every_module_has_a_twin() -> None:
    tests = {
        file.relative_to(ROOT / "tests").as_posix() for file in (ROOT / "tests").rglob("*.py")
    }
    assert_none(twin_faults(SOURCES, tests))


# --- They can fail

SMALL = {
    "syncd": '"""Modules marked "Sans-IO" are pure."""',
    "syncd.errors": '"""E. Sans-IO."""',
    "syncd.xmpp": '"""X."""',
    "syncd.xmpp.jid": '"""J. Sans-IO."""\nfrom syncd.errors import SyncdError',
    "syncd.xmpp.session": '"""S."""\nimport trio\nfrom syncd import __version__',
    "syncd.transfer": '"""T."""',
    "syncd.transfer.si": '"""O. Sans-IO."""\nfrom syncd.xmpp import jid',
    "syncd.demo": '"""D."""',
    "syncd.demo.server": '"""V."""\nimport trio\nfrom syncd.transfer.si import SI',
}


def test_a_small_good_map_has_no_faults() -> None:
    tests = {
        f"{path}.py"
        for path in (
            "test_errors", "xmpp/test_jid", "xmpp/test_session", "transfer/test_si",
            "demo/test_server",
        )
    }  # fmt: skip
    rules = (layer_faults, purity_faults, size_faults, form_faults)
    assert [fault for rule in rules for fault in rule(SMALL)] == []
    assert list(twin_faults(SMALL, tests)) == []
    assert list(twin_faults(SMALL, tests - {"xmpp/test_jid.py"})) == [
        "syncd.xmpp.jid has no tests/xmpp/test_jid.py"
    ]


@pytest.mark.parametrize(
    "line",
    [
        "import syncd.transfer.si",
        "import syncd.transfer.si as si",
        "from syncd.transfer import si",
        "from syncd.transfer.si import SI",
        "from ..transfer import si",
        "from ..transfer.si import SI",
        "def late():\n    from syncd.transfer import si",
        "if TYPE_CHECKING:\n    from syncd.transfer.si import SI",
    ],
)
def test_an_import_against_the_map_is_found(line: str) -> None:
    sources = SMALL | {"syncd.xmpp.bad": f'"""B."""\n{line}'}
    assert list(layer_faults(sources)) == [
        "syncd.xmpp.bad (xmpp) imports syncd.transfer.si (transfer)"
    ]


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        (
            "syncd.new",
            '"""N."""',
            "syncd.new is on no layer: put it into a folder, or into TOP",
        ),
        (
            "syncd.new.part",
            '"""N."""',
            "syncd.new.part is on no layer: put it into a folder, or into TOP",
        ),
        (
            "syncd.demo.bad",
            '"""B."""\nfrom syncd.xmpp import session',
            "syncd.demo.bad (demo) imports syncd.xmpp.session, which is not sans-IO",
        ),
        (
            "syncd.cli.main",
            '"""M."""\nfrom syncd.demo import server',
            "syncd.cli.main (cli) imports syncd.demo.server (demo)",
        ),
        (
            "syncd.xmpp.bad",
            '"""B."""\nfrom syncd import daemon',
            "syncd.xmpp.bad (xmpp) imports syncd.daemon (daemon)",
        ),
    ],
)
def test_what_the_map_forbids_is_found(name: str, source: str, fault: str) -> None:
    known = SMALL | {"syncd.daemon": '"""D."""'}
    assert list(layer_faults(known | {name: source})) == [fault]


def test_the_demo_command_may_import_the_demo() -> None:
    demo = {"syncd.cli.demo": '"""D."""\nfrom syncd.demo import server'}
    assert list(layer_faults(SMALL | demo)) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("import os.path", "imports os.path"),
        ("from time import monotonic", "imports time"),
        ("def f():\n    import trio", "imports trio"),
        ("if TYPE_CHECKING:\n    import ssl", "imports ssl"),
        ("from . import session", "imports syncd.xmpp.session, which is not"),
    ],
)
def test_io_in_a_sans_io_module_is_found(line: str, fault: str) -> None:
    sources = SMALL | {"syncd.xmpp.bad": f'"""Bad. Sans-IO."""\n{line}'}
    assert list(purity_faults(sources)) == [f"syncd.xmpp.bad is sans-IO and {fault}"]


def test_only_code_is_counted() -> None:
    source = '''"""Docstring.

More."""

# Comment
X = 1  # counted

def f():
    """Docstring."""
    return """two
lines"""
'''
    assert code_lines(source) == 4


def test_a_module_that_is_too_long_is_found() -> None:
    long = "\n".join(["x = 1"] * (MAX_LINES + 1))
    sources = SMALL | {"syncd.xmpp.long": f'"""L."""\n{long}'}
    assert list(size_faults(sources)) == [
        "syncd.xmpp.long has 401 lines of code, and its docstring does not say why"
    ]
    excused = {"syncd.xmpp.long": f'"""More than {MAX_LINES} lines: one table."""\n{long}'}
    assert list(size_faults(SMALL | excused)) == []


def test_a_folder_that_is_too_full_is_found() -> None:
    crowd = {f"syncd.xmpp.m{number}": '"""M."""' for number in range(MAX_MODULES - 1)}
    assert list(size_faults(SMALL | crowd)) == ["syncd.xmpp has 10 modules"]


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("syncd.xmpp.bare", "x = 1", "syncd.xmpp.bare has no docstring"),
        (
            "syncd.xmpp",
            '"""X."""\nfrom syncd.xmpp.jid import JID',
            "syncd.xmpp is a folder, and more than a docstring",
        ),
        (
            "syncd.xmpp.xml_utils",
            '"""X."""',
            "syncd.xmpp.xml_utils has a name that says nothing",
        ),
    ],
)
def test_a_bad_form_is_found(name: str, source: str, fault: str) -> None:
    assert list(form_faults(SMALL | {name: source})) == [fault]
