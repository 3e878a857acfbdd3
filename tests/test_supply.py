"""What syncd is made of: code that is there to be read, and packages that are written down."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "syncd").rglob("*.py"))

# Turn data into code; or unpack what a peer sent, which may be small and become large.
NEVER_IMPORTED = {
    *("code", "codeop", "dill", "imp", "marshal", "pickle", "pickletools", "runpy", "shelve"),
    *("bz2", "gzip", "lzma", "tarfile", "zipfile", "yaml"),
}
NEVER_CALLED = {
    *("__import__", "compile", "eval", "exec", "execfile"),
    *("os.popen", "os.system", "pty.spawn", "importlib.import_module"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
    *("asyncio.create_subprocess_shell", "tempfile.mktemp"),
    *("zlib.decompress", "zlib.decompressobj"),  # its checksums are welcome
}

by_module = pytest.mark.parametrize(
    "module", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES]
)


def faults(source: str) -> list[str]:
    """What a module imports or calls that none of ours may."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                imported = [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                imported = [module]
                found += [
                    f"{module}.{alias.name}"
                    for alias in names
                    if f"{module}.{alias.name}" in NEVER_CALLED
                ]
            case ast.Call(func=function, keywords=keywords):
                imported = []
                if (name := ast.unparse(function)) in NEVER_CALLED:
                    found.append(name)
                found += [
                    f"{name}(shell)"
                    for keyword in keywords
                    if keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
                ]
            case _:
                continue
        found += [name for name in imported if name.split(".")[0] in NEVER_IMPORTED]
    return found


@by_module
def test_no_data_becomes_code_and_no_shell_is_asked(module: Path) -> None:
    assert faults(module.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("eval(x)", ["eval"]),
        ("import pickle", ["pickle"]),
        ("from os import system", ["os.system"]),
        ("from zipfile import ZipFile", ["zipfile"]),
        ("import zlib; zlib.adler32(x); zlib.decompress(x)", ["zlib.decompress"]),
        ("os.system('ls')", ["os.system"]),
        ("subprocess.run('ls', shell=True)", ["subprocess.run(shell)"]),
        ("subprocess.run('ls', shell=wanted)", ["subprocess.run(shell)"]),
        ("subprocess.run(['ls'], shell=False)", []),
        ("re.compile('x'); import zmq", []),
    ],
)
def test_what_is_forbidden_is_found(source: str, expected: list[str]) -> None:
    assert expected == faults(source)


def test_every_dependency_is_written_down_with_its_reason() -> None:
    """In docs/dependencies.md, and nothing there that is no dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {re.split(r"[<>=!~;\[ ]", line)[0] for line in project["dependencies"]}
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    table = text.split("\n## Directly\n")[1].split("\n## ")[0].split("|---|")[-1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()[1:]
        if line.startswith("|")
    ]
    assert needed == {row[0] for row in rows}
    assert [row for row in rows if len(row) != 5 or not all(row)] == []


def test_every_version_is_exact() -> None:
    """So that the tests run with what was audited, and with nothing newer."""
    lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
