"""The table of rules: what is done with each operation that is not elementwise."""

from __future__ import annotations

from typing import Any

from fixup_init.moments import (
    conditionals,
    contraction,
    convolution,
    gather,
    joining,
    loops,
    ordering,
    pooling,
    random_bits,
    rearranging,
    reductions,
    scatter,
)
from fixup_init.moments.environment import Rule

RULES: dict[Any, Rule] = {
    **conditionals.RULES,
    **contraction.RULES,
    **convolution.RULES,
    **gather.RULES,
    **joining.RULES,
    **loops.RULES,
    **ordering.RULES,
    **pooling.RULES,
    **random_bits.RULES,
    **rearranging.RULES,
    **reductions.RULES,
    **scatter.RULES,
}
