"""The ways that bytes can go, each as a configuration that leaves no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# What to write below [bytestreams].
WAYS: Mapping[str, str] = {
    "direct": "proxies = []\nibb = false\n",
    "proxy": "direct = false\nibb = false\n",
    "ibb": "direct = false\nproxies = []\n",
}
