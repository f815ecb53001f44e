"""Data as JSON can say it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

__all__ = ["plain"]


def plain(x: Any) -> Any:
    """Dataclasses and mappings as dictionaries, sequences as lists, NaN and infinities as None.

    Example:
      >>> plain({"a": (1, float("inf"))})
      {'a': [1, None]}
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return [plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
