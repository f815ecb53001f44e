"""What values can reach: an interval for each, from the intervals of what it was made of.

Intervals know nothing of how values depend on each other, but for x - max(x, ...), which is never positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fixup_init import jaxprs
from fixup_init.jaxprs import p
from fixup_init.moments.softmax import PASSED, walker
from fixup_init.moments.values import ANYWHERE, Reach, Value
from fixup_init.program import CARRY_IN, CARRY_OUT, IDENTITY, SLICE_IN, STACK_OUT, Op, Program

_DEPTH = 4  # steps up to which two values are looked through for being the same

_KEPT = frozenset({
    *PASSED, p.transpose_p, p.slice_p, p.dynamic_slice_p, p.rev_p, p.gather_p, p.reduce_max_p, p.reduce_min_p, p.sort_p,
    p.cummax_p, p.cummin_p, p.reduce_window_max_p, p.reduce_window_min_p, p.name_p, p.reduce_precision_p,
    jaxprs.SPLIT, jaxprs.TILE, CARRY_IN, CARRY_OUT, SLICE_IN, IDENTITY,
})  # fmt: skip
_HULL = frozenset({p.concatenate_p, p.pad_p})
_SUMS = frozenset({p.reduce_sum_p, p.cumsum_p, p.reduce_window_sum_p})
_RISING: dict[Any, Callable[[float], float]] = {
    p.exp_p: np.exp, p.exp2_p: np.exp2, p.expm1_p: np.expm1, p.log_p: np.log, p.log1p_p: np.log1p, p.sqrt_p: np.sqrt,
    p.tanh_p: np.tanh, p.logistic_p: lambda x: 1 / (1 + np.exp(-x)), p.floor_p: np.floor, p.ceil_p: np.ceil,
    p.cbrt_p: np.cbrt, p.atan_p: np.arctan, p.sinh_p: np.sinh,
}  # fmt: skip
_RANGES: dict[Any, Reach] = {
    p.sin_p: (-1.0, 1.0), p.cos_p: (-1.0, 1.0), p.erf_p: (-1.0, 1.0), p.erfc_p: (0.0, 2.0), p.sign_p: (-1.0, 1.0),
    p.lt_p: (0.0, 1.0), p.le_p: (0.0, 1.0), p.gt_p: (0.0, 1.0), p.ge_p: (0.0, 1.0), p.eq_p: (0.0, 1.0),
    p.ne_p: (0.0, 1.0), p.cosh_p: (1.0, math.inf), p.rsqrt_p: (0.0, math.inf),
}  # fmt: skip


def reach_of(value: Value) -> Reach:
    """The interval of a value; of a constant that of its entries."""
    if value.array is not None and value.array.size and value.array.dtype.kind in "fiub":
        x = value.array.astype(np.float64)
        return float(x.min()), float(x.max())
    return ANYWHERE if value.imaginary is not None else value.reach


class Bounds:
    """Intervals of the results of a program's operations."""

    def __init__(self, program: Program) -> None:
        self.maker = {v: op for op in program.ops for v in op.outputs}
        self.back = walker(self.maker)

    def of(self, op: Op, args: Sequence[Value], found: Callable[[int], Value]) -> Reach:
        """The interval of an operation's results; `found` gives a value by its number."""
        with np.errstate(all="ignore"):
            low, high = _interval(op, [reach_of(a) for a in args])
        if math.isnan(low) or math.isnan(high):
            return ANYWHERE
        if op.primitive is p.sub_p and high > 0 and self._is_less(op.inputs[0], op.inputs[1], found):
            high = 0.0
        return low, high

    def beside(self, op: Op) -> int | None:
        """Of x - max(x, y), the value y; None of anything else, and in a scan.

        There y is made of earlier such differences, whose dependence, pass after pass, is what counts for gradients.
        """
        if op.primitive is not p.sub_p or op.loop is not None:
            return None
        top = self.maker.get(op.inputs[1])
        if top is None or top.primitive is not p.max_p:
            return None
        return next((v for k, v in enumerate(top.inputs) if self._same(op.inputs[0], top.inputs[1 - k])), None)

    def _is_less(self, one: int, other: int, found: Callable[[int], Value]) -> bool:
        """Whether a value is at most another, the largest of that value and something else."""
        _, top = self.back(other)
        if top is None or top.primitive not in (p.max_p, p.reduce_max_p, p.cummax_p):
            return False
        below = self._less_positive(one, found)
        return any(self._same(v, w) for v in top.inputs for w in below) or any(
            self._is_less(w, v, found) for v in top.inputs for w in below[:1] if top.primitive is p.max_p
        )

    def _less_positive(self, value: int, found: Callable[[int], Value]) -> list[int]:
        """A value, and those that are larger as a positive value was taken off them."""
        value, op = self.back(value)
        chain = [value]
        while op is not None and op.primitive is p.sub_p and reach_of(found(op.inputs[1]))[0] >= 0:
            value, op = self.back(op.inputs[0])
            chain.append(value)
        return chain

    def _same(self, one: int, other: int, depth: int = _DEPTH) -> bool:
        """Whether two numbers are of one value, or of two that the same operations made."""
        (one, a), (other, b) = self.back(one), self.back(other)
        if one == other:
            return True
        if a is None or b is None or depth == 0 or a.primitive is not b.primitive or len(a.inputs) != len(b.inputs):
            return False
        alike = jaxprs.signature(a) == jaxprs.signature(b)
        return alike and all(self._same(v, w, depth - 1) for v, w in zip(a.inputs, b.inputs, strict=True))


def _interval(op: Op, args: Sequence[Reach]) -> Reach:
    """By intervals alone."""
    primitive: Any = op.primitive
    first = args[0] if args else ANYWHERE
    if primitive in _KEPT:
        return first
    if primitive in _HULL:
        return _hull(args)
    if primitive in _RISING:
        low, high = (float(_RISING[primitive](x)) for x in first)
        return (-math.inf if math.isnan(low) else low), high
    if primitive is p.ne_p and op.inputs[0] == op.inputs[1]:  # is it no number?
        return 0.0, 0.0
    if primitive in _RANGES:
        return _RANGES[primitive]
    if primitive in _SUMS:  # the sign is kept, and so is 0
        return (0.0 if first[0] >= 0 else -math.inf), (0.0 if first[1] <= 0 else math.inf)
    if primitive in (p.add_p, p.add_jaxvals_p):
        return args[0][0] + args[1][0], args[0][1] + args[1][1]
    if primitive is p.sub_p:
        return args[0][0] - args[1][1], args[0][1] - args[1][0]
    if primitive is p.neg_p:
        return -first[1], -first[0]
    if primitive is p.mul_p:
        return _square(first) if op.inputs[0] == op.inputs[1] else _product(*args)
    if primitive is p.div_p and args[1][0] >= 0:
        return _product(first, (1 / np.float64(args[1][1]), 1 / np.float64(args[1][0])))
    if primitive is p.square_p or (primitive is p.integer_pow_p and op.params["y"] == 2):
        return _square(first)
    if primitive is p.integer_pow_p and op.params["y"] % 2 == 0:
        return 0.0, math.inf
    if primitive is p.abs_p:
        low, high = sorted(map(abs, first))
        return (0.0 if first[0] <= 0 <= first[1] else low), high
    if primitive is p.max_p:
        return max(a[0] for a in args), max(a[1] for a in args)
    if primitive is p.min_p:
        return min(a[0] for a in args), min(a[1] for a in args)
    if primitive is p.clamp_p:
        return min(max(args[1][0], first[0]), args[2][1]), min(max(args[1][1], first[0]), args[2][1])
    if primitive is p.select_n_p:
        return args[1 + int(first[0])] if first[0] == first[1] else _hull(args[1:])
    if primitive in (p.cumprod_p, p.reduce_prod_p) and first[0] >= 0:
        return 0.0, (1.0 if first[1] <= 1 else math.inf)
    return ANYWHERE


def stacked(op: Op, parts: Sequence[Value]) -> Reach:
    """Of the results of the passes of a scan."""
    assert op.primitive is STACK_OUT
    return _hull([reach_of(a) for a in parts])


def _hull(args: Sequence[Reach]) -> Reach:
    return min(a[0] for a in args), max(a[1] for a in args)


def _square(one: Reach) -> Reach:
    low, high = sorted((one[0] ** 2, one[1] ** 2)) if math.isfinite(one[0] * one[1]) else (0.0, math.inf)
    return (0.0 if one[0] <= 0 <= one[1] else low), high


def _product(one: Reach, other: Reach) -> Reach:
    ends = [0.0 if a == 0 or b == 0 else float(a) * float(b) for a in one for b in other]
    return min(ends), max(ends)
