"""What the targets have in common: run until the time is up, or something is found.

Each failure is shrunk by hypothesis, and printed with the seed that leads to it again. With
``--atheris`` the inputs are made by atheris instead, where that is installed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from typing import TYPE_CHECKING, TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import SearchStrategy

_T = TypeVar("_T")

# How many inputs belong to one seed.
ROUND = 500


def run(
    description: str | None,
    inputs: SearchStrategy[_T],
    check: Callable[[_T], None],
    one_input: Callable[[bytes], None],
) -> None:
    """Read the command line, and fuzz.

    Args:
      description: Of the target.
      inputs: What it takes.
      check: Tries one.
      one_input: Tries what a fuzzer made that knows bytes only.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--atheris", action="store_true", help="let atheris make the inputs")
    arguments = parser.parse_args()
    if arguments.atheris:
        atheris = importlib.import_module("atheris")
        atheris.Setup(sys.argv[:1], one_input)
        atheris.Fuzz()
    end, number = time.monotonic() + arguments.seconds, arguments.seed
    count = 0
    while time.monotonic() < end:
        try:
            count += _round(number, inputs, check)
        except BaseException:
            sys.stderr.write(f"\nFound with --seed {number}\n")
            raise
        number += 1
    sys.stdout.write(f"{count} inputs, seeds {arguments.seed} to {number - 1}: nothing found\n")


def _round(number: int, inputs: SearchStrategy[_T], check: Callable[[_T], None]) -> int:
    count = 0

    @seed(number)
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def fuzz(drawn: _T) -> None:
        nonlocal count
        count += 1
        check(drawn)

    fuzz()
    return count
