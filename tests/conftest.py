"""Shared by all tests: shapes in annotations are checked where arrays are handled."""

from __future__ import annotations

import pathlib
import sys

import jaxtyping

sys.path.insert(0, str(pathlib.Path(__file__).parent))
jaxtyping.install_import_hook(
    ["fixup_init.statistics", "fixup_init.sample", "fixup_init.training"], "beartype.beartype"
)
