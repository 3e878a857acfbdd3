"""Every row of the table of what real clients do has a test that plays their bytes.

Each module here says in ``ROWS`` which rows its tests are about, and each of these tests says
so in its docstring; neither may forget the other.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

# In short; what is known of each client is in the docstrings.
TABLE = {
    1: "a <file/> in the answer is fatal to some",
    2: "types, values and white space of the form",
    3: "the same freedoms in what comes in",
    4: "no size, or one that no file has",
    5: "a message of SOCKS5 is one segment, or is not",
    6: "the address in a reply is anybody's",
    7: "a listener for one connection",
    8: "several handshakes for one stream",
    9: "at a proxy, who comes first is the target",
    10: "data before, or with, the answer",
    11: "five seconds for the opening",
    12: "dead streamhosts cost seconds, and only the first count",
    13: "no other way behind a failure, or one on the same sid",
    14: "silence",
    15: "how big a block may be",
    16: "blocks all at once, or one by one",
    17: "white space in base64",
    18: "numbers that do not begin again, or too early",
    19: "a close that is not answered, or comes early",
    20: "files without bytes",
    21: "ranges, honoured, ignored or by halves",
    22: "the sender closes; or the receiver does; and too much",
    23: "in which words it is refused",
    24: "refusals under another id",
    25: "what we can is asked for, also while we are busy",
    26: "addresses hashed in other ways",
    27: "the JID of a streamhost",
    28: "sids come again",
    29: "paths in place of names",
    30: "fast mode, other modes, addresses by the requester",
    31: "proxies have limits",
    32: "one transfer at a time",
    33: "no proxy has a half-close",
}

MODULES = sorted(Path(__file__).parent.glob("test_*.py"))


def declared(module: ast.Module) -> set[int]:
    """What a module says in ROWS."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROWS":
            rows: set[int] = ast.literal_eval(node.value)
            return rows
    return set()


def covered(module: ast.Module) -> dict[int, list[str]]:
    """The tests of a module, by the rows that their docstrings name."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for node in module.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node) or ""
        for named in re.findall(r"\b[Rr]ows? ((?:\d+(?:, | and )?)+)", text):
            for number in re.findall(r"\d+", named):
                found[int(number)].append(node.name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_says_which_rows_its_tests_are_about(path: Path) -> None:
    module = ast.parse(path.read_text())
    assert declared(module) == set(covered(module))


def test_every_row_has_a_test() -> None:
    tests: dict[int, list[str]] = defaultdict(list)
    for path in MODULES:
        for row, names in covered(ast.parse(path.read_text())).items():
            tests[row] += names
    assert set(range(1, 34)) == set(TABLE) == set(tests)
