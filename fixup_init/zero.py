"""Whether a parameter that starts at zero would learn: relu, squares and the like pass no gradient at zero.

Everything that is zero with the parameter is followed through the steps of the program; where its gradient ends is seen
from the derivatives that JAX has at zero, custom ones included (relu's is 0, that of max(x, 0) is 1/2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax.numpy as jnp

from fixup_init import jaxprs, quadrature
from fixup_init.graph import COPIES, Graph
from fixup_init.jaxprs import p
from fixup_init.orders import PRODUCT
from fixup_init.program import Arms, Op, all_steps

__all__ = ["Uses", "learns", "uses"]

_SUMS = (p.add_p, p.sub_p)
_LINEAR = COPIES | {
    p.reduce_sum_p, p.neg_p, p.slice_p, p.rev_p, p.gather_p, p.dynamic_slice_p, p.pad_p, p.name_p, p.cumsum_p,
    jaxprs.SPLIT, jaxprs.UNSTACK, jaxprs.TILE,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Uses:
    """Where values of a program go, in scans, conditionals and shard_maps too.

    Attributes:
      readers: for each value the steps that read it, and as which of their inputs.
      ends: results of the program and of what runs inside of a step, of which nothing more is asked.
    """

    readers: Mapping[int, Sequence[tuple[Op, int]]]
    ends: frozenset[int]


def uses(graph: Graph) -> Uses:
    """Where the values of a model go."""
    found: dict[int, list[tuple[Op, int]]] = {}
    ends = set(graph.program.outputs)
    for step in all_steps(graph.program.steps):
        for k, v in enumerate(step.inputs):
            found.setdefault(v, []).append((step, k))
        if step.body is not None:
            ends.update(*step.body.results)
    return Uses(found, frozenset(ends))


def learns(graph: Graph, used: Uses, leaf: int) -> bool:
    """Whether a gradient reaches a parameter while that is zero.

    Args:
      graph: the model.
      used: of `uses`.
      leaf: the parameter.
    """
    zero: dict[int, None] = {}
    todo = [leaf]
    while todo:
        value = todo.pop()
        if value not in zero:
            zero[value] = None
            for step, k in used.readers.get(value, ()):
                todo.extend(_made_zero(graph, step, k, zero))
    alive = used.ends & zero.keys()
    grown = True
    while grown:
        before = len(alive)
        alive |= {v for v in zero if any(_passes(graph, s, k, zero, alive) for s, k in used.readers.get(v, ()))}
        grown = len(alive) > before
    return leaf in alive


def _made_zero(graph: Graph, step: Op, at: int, zero: Collection[int]) -> tuple[int, ...]:
    """Values that are zero since an input of a step is."""
    if step.body is not None:  # what is not given is read inside by its number
        skipped = len(step.inputs) - len(step.body.given)
        return () if isinstance(step.body, Arms) or at < skipped else (step.body.given[at - skipped],)
    if step.primitive in PRODUCT or (step.primitive is p.div_p and at == 0) or step.primitive in _LINEAR:
        return step.outputs
    others = [v for k, v in enumerate(step.inputs) if k != at and v not in zero]
    if step.primitive in _SUMS and all(graph.is_parameter(v) or graph.literal(v) == 0 for v in others):
        return step.outputs  # biases start at zero
    formula = _formula(graph, step, at)
    return step.outputs if formula is not None and _at_zero(formula) == 0 else ()


def _passes(graph: Graph, step: Op, at: int, zero: Collection[int], alive: Collection[int]) -> bool:
    """Whether a step hands a gradient to an input that is zero."""
    if step.body is not None:
        return any(v in alive for v in _made_zero(graph, step, at, zero))
    if any(v in zero and v not in alive for v in step.outputs):
        return False
    if not any(jnp.issubdtype(graph.program.dtype(v), jnp.inexact) for v in step.outputs):
        return False
    others = [v for k, v in enumerate(step.inputs) if k != at]
    if step.primitive in PRODUCT or (step.primitive is p.div_p and at == 0):
        return not any(v in zero for v in others)
    if step.primitive in _LINEAR:
        return True
    if not all(jnp.issubdtype(graph.program.dtype(v), jnp.floating) for v in (step.inputs[at], *step.outputs)):
        return True  # of complex numbers nothing is claimed
    if len(step.inputs) == 1 and not quadrature.is_elementwise(step.primitive):
        call = quadrature.slope_by_rule(step, [quadrature.X], [graph.program.avals[step.inputs[0]]], 0)
        return call is None or _at_zero(call) != 0
    formula = _formula(graph, step, at, slope=True)
    return formula is None or _at_zero(formula) != 0


def _formula(graph: Graph, step: Op, at: int, slope: bool = False) -> quadrature.Formula | None:
    """An elementwise operation as a function of one input, the others being numbers; or its derivative."""
    numbers = [graph.literal(v) for v in step.inputs]
    if not jnp.issubdtype(graph.program.dtype(step.inputs[at]), jnp.floating):
        return None
    if not quadrature.is_elementwise(step.primitive) or any(n is None for k, n in enumerate(numbers) if k != at):
        return None
    args = [quadrature.X if k == at else quadrature.constant(n or 0.0) for k, n in enumerate(numbers)]
    casts = [graph.program.dtype(v) for v in step.inputs]
    return quadrature.slope(step, args, casts, at) if slope else quadrature.of_op(step, args, casts)


def _at_zero(formula: quadrature.Formula) -> float:
    return quadrature.at(formula, 0.0)[0]
