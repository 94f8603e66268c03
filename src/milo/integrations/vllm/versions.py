"""Which vLLM this plugin serves on. Imports no vLLM, so that `milo serve` may ask too.

vLLM's layers and loaders change with every minor version, and most of what a plugin may get wrong is silent. So
versions are listed that the loading tests have passed with (`tests/integrations/test_vllm.py`), and others are refused.
"""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

OLDEST, NEWEST = (0, 26), (0, 33)  # minor versions, all of them between tried
RANGE = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)


def supported(version: str) -> bool:
    """Whether the loading tests have passed with this version of vLLM."""
    try:
        release = Version(version).release
    except InvalidVersion:
        return False
    return OLDEST <= (*release, 0)[:2] <= NEWEST
