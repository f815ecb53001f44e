"""The table of rules: what is done with each operation that is not elementwise."""

from __future__ import annotations

from typing import Any

from fixup_init import jaxprs
from fixup_init.moments import (
    conditionals,
    contraction,
    convolution,
    cumulative,
    gather,
    joining,
    loops,
    ordering,
    pooling,
    ragged,
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
    **cumulative.RULES,
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


def rule_of(primitive: Any) -> Rule | None:
    """The rule of an operation, if there is one."""
    if jaxprs.is_ragged_dot(primitive):  # no public module names it
        return ragged.ragged_dot
    return RULES.get(primitive)
