"""How findings name rows, layers and schemes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fixup_init.propagation import Direction, Propagation, Row
from fixup_init.verdicts.rows import row_before

__all__ = [
    "as_factor",
    "call_of",
    "family_for",
    "layer_count",
    "layers_have",
    "layers_of",
    "listed",
    "name_of",
    "place_of",
]


def name_of(row: Row) -> str:
    """The name of a row, with the pass through a scan body that it belongs to."""
    name = row.name or row.kind  # a tree of one parameter has no path
    return name if row.repeat is None else f"{name}, pass {row.repeat + 1}"


def place_of(propagation: Propagation, index: int) -> str:
    """A row and its block; nonlinearities and norms, whose names repeat, with the layer before."""
    row = propagation.rows[index]
    layer = row_before(propagation, index, "weight") if row.kind in ("nonlinearity", "norm") else None
    behind = f" behind {propagation.rows[layer].name}" if layer is not None else ""
    return f"{name_of(row)}{behind}, block {row.block}"


def layers_of(propagation: Propagation, index: int, direction: Direction) -> str:
    """The weight layers that the signal has just passed at a row of the stream: of the block before it, or behind."""
    row = propagation.rows[index]
    if row.kind == "weight":
        return row.name
    block = row.block - 1 if direction == "forward" else row.block
    return listed(r.name for r in propagation.select("weight") if r.block == block) or "no weight layer"


def listed(names: Iterable[str], at_most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    unique = [name for name in dict.fromkeys(names) if name]
    more = f" and {len(unique) - at_most} more" if len(unique) > at_most else ""
    return ", ".join(unique[:at_most]) + more


def layers_have(rows: Sequence[int]) -> str:
    return f"{layer_count(len(rows))} {'has' if len(rows) == 1 else 'have'}"


def layer_count(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def as_factor(ratio: float) -> str:
    if not 0 < ratio < math.inf:
        return "one of the two being zero"
    return f"a factor of {ratio:.3g}" if ratio >= 1 else f"a factor of 1/{1 / ratio:.3g}"


def call_of(scheme: str) -> str:
    return f'fi.init(model, key, *inputs, scheme="{scheme}")'


def family_for(propagation: Propagation) -> str:
    """The family for a network without sums: LeCun where it is linear; He for relu, and for tanh, which bounds it."""
    return "he_normal" if propagation.select("nonlinearity") else "lecun_normal"
