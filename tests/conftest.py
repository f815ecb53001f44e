"""Shared by all tests: shapes in annotations are checked where arrays are handled."""

from __future__ import annotations

import gc
import pathlib
import sys
from collections.abc import Iterator

import jax
import jaxtyping
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
jaxtyping.install_import_hook(
    ["fixup_init.statistics", "fixup_init.sample", "fixup_init.training"], "beartype.beartype"
)

_MAPS = pathlib.Path("/proc/self/maps")
_MOST = 30_000  # of the 65,530 mappings that Linux lets a process have: past those the compiler dies


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """What thousands of tests compile in one process is let go of in time."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST:
        jax.clear_caches()
        gc.collect()
