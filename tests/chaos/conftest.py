"""Where the real server lacks, these tests cannot run."""

from __future__ import annotations

import os

import pytest

from tests.support import servers


@pytest.fixture(autouse=True)
def _prosody_is_there() -> None:
    if lack := servers.missing("prosody"):
        # Where it is to be there, its absence is a fault and must not pass for green.
        if os.environ.get("CI"):
            pytest.fail(lack, pytrace=False)
        pytest.skip(lack)
