"""The tropical domain: how fast a value vanishes as some of its factors shrink.

Multiply chosen values by c and let c go to 0: every other value behaves as c^D, and D, its *order*, is computed with
exponents alone. Products add orders, sums take the minimum (the slower term stays), a division subtracts, a root
halves; relu, tanh and every reshaping keep the order; exp and sigmoid tend to a constant, order 0. Zero has order
infinity (so has a NaN, which only guards), and neither a literal epsilon nor an additive parameter counts.

A chain of m weight layers has order m, so Fixup's rule (Zhang et al. 2019, Sec. 3) generalizes from m to D.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fixup_init import jaxprs, quadrature
from fixup_init.graph import COPIES, Graph
from fixup_init.jaxprs import p
from fixup_init.program import CARRY_IN, CARRY_OUT, CHOOSE, IDENTITY, SHARD_IN, SHARD_OUT, SLICE_IN, STACK_OUT, Loop, Op

__all__ = ["ADDITIVE", "SQUASH", "Order", "has_rule", "orders"]

Order = float | np.ndarray  # an exponent, or a vector of them

EPSILON = 1.001e-3  # a literal up to this size, added or compared, is a guard against division by zero

KEEP = frozenset({
    p.broadcast_in_dim_p, p.reshape_p, p.transpose_p, p.convert_element_type_p, p.squeeze_p, p.copy_p, p.slice_p,
    p.rev_p, p.gather_p, p.dynamic_slice_p, p.pad_p, p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.cumsum_p,
    p.cummax_p, p.cummin_p, p.reduce_window_sum_p, p.reduce_window_max_p, p.reduce_window_min_p, p.reduce_window_p,
    p.reduce_p, p.neg_p, p.abs_p, p.real_p, p.imag_p, p.conj_p, p.reduce_precision_p, p.fft_p, p.stop_gradient_p,
    p.sharding_constraint_p, p.name_p, p.top_k_p, p.approx_top_k_p, p.device_put_p,
    p.tanh_p, p.sin_p, p.tan_p, p.asin_p, p.atan_p, p.sinh_p, p.asinh_p, p.atanh_p, p.erf_p, p.erf_inv_p, p.expm1_p,
    p.log1p_p, jaxprs.SPLIT, jaxprs.UNSTACK, jaxprs.TILE, p.psum_p, p.all_gather_p, p.ppermute_p, p.pmax_p, p.pmin_p,
    CARRY_IN, CARRY_OUT, SLICE_IN, STACK_OUT, IDENTITY, SHARD_IN,
    SHARD_OUT, p.all_to_all_p, p.ragged_all_to_all_p, p.cumlogsumexp_p, p.cumprod_p,
    p.reduce_prod_p,
})  # fmt: skip
LEAST = frozenset({
    p.add_p, p.sub_p, p.max_p, p.min_p, p.concatenate_p, p.dynamic_update_slice_p, p.complex_p, p.atan2_p,
    p.scatter_p, p.scatter_add_p, p.scatter_max_p,
    p.scatter_min_p, jaxprs.SCATTER_SUB, p.add_jaxvals_p, p.rem_p, jaxprs.STACK,
})  # fmt: skip
_UPDATES = frozenset({p.dynamic_update_slice_p, p.scatter_p})
_SCATTERS = frozenset({p.scatter_p, p.scatter_add_p, p.scatter_max_p, p.scatter_min_p, jaxprs.SCATTER_SUB})
ADDITIVE = frozenset({p.add_p, p.sub_p, p.concatenate_p, jaxprs.STACK})
PRODUCT = frozenset({p.mul_p, p.dot_general_p, p.conv_general_dilated_p, p.scatter_mul_p})
# A constant is left when the argument vanishes.
SQUASH = frozenset({
    p.exp_p, p.exp2_p, p.logistic_p, p.erfc_p, p.cos_p, p.cosh_p, p.acos_p, p.log_p, p.lgamma_p, jaxprs.LOG2,
})  # fmt: skip
# Whole numbers, truth values and noise: nothing shrinks.
_DISCRETE = frozenset({
    p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p, p.and_p, p.or_p, p.not_p, p.xor_p, p.is_finite_p, p.sign_p,
    p.floor_p, p.ceil_p, p.round_p, p.argmax_p, p.argmin_p, p.iota_p, p.reduce_and_p, p.reduce_or_p, p.random_bits_p,
    p.random_split_p, p.random_fold_in_p, p.random_seed_p, p.shift_left_p, p.shift_right_logical_p,
    p.shift_right_arithmetic_p, p.bitcast_convert_type_p, p.axis_index_p, p.rng_bit_generator_p,
    p.rng_uniform_p, p.threefry2x32_p, p.population_count_p, p.clz_p, p.reduce_xor_p,
})  # fmt: skip
_POWERS = frozenset({p.integer_pow_p, p.pow_p, p.square_p, p.sqrt_p, p.rsqrt_p, p.cbrt_p})
_OTHERS = frozenset({p.select_n_p, p.clamp_p, p.div_p, p.sort_p, CHOOSE})
_RULED = KEEP | LEAST | PRODUCT | SQUASH | _DISCRETE | _POWERS | _OTHERS


def has_rule(op: Op) -> bool:
    """Whether the order of an operation's result is known; any other keeps its arguments' least, and is to be named."""
    return op.primitive in _RULED or op.primitive in jaxprs.collectives() or jaxprs.is_ragged_dot(op.primitive)


def orders(
    graph: Graph,
    ops: Iterable[int],
    seeds: Mapping[int, Order],
    transparent: Mapping[int, Sequence[int]] | None = None,
    arms: Mapping[int, np.ndarray] | None = None,
    far: bool = False,
    inside: bool = False,
) -> dict[int, Order]:
    """Orders of the values that `ops` make.

    Args:
      graph: the model.
      ops: indices into `graph.program.ops`, in order.
      seeds: orders given to values (the factors that shrink have 1); any other value from outside has 0. A seed may be
        a vector: then so is every order that it reaches, one entry for each question asked at once.
      transparent: for a normalization's result, the value that it normalizes, and that value less its mean: the order
        of the first that is known passes through.
      inside: a term of a sum that neither is a seed nor was made by `ops` does not count. In vectors NaN says that a
        value does not depend on what the entry asks for, and does not count either.
      far: for factors that grow instead: no constant that is added counts.
      arms: for a conditional, by its number, the arm that runs in each entry; -1 where any may, and the least counts.

    Returns:
      The order of every value made, the seeds included.
    """
    known: dict[int, Order] = dict(seeds)
    made = [graph.program.ops[k] for k in ops]
    _run(made, known, _Question(graph, seeds, transparent or {}, arms or {}, far, inside))
    return known


@dataclasses.dataclass(slots=True, eq=False)
class _Question:
    """What `orders` was asked."""

    graph: Graph
    seeds: Mapping[int, Order]
    transparent: Mapping[int, Sequence[int]]
    arms: Mapping[int, np.ndarray]
    far: bool
    inside: bool


def _run(made: Sequence[Op], known: dict[int, Order], asked: _Question) -> None:
    """Adds to `known` the orders of what some operations make."""
    rules, seeds, transparent = asked.graph.rules[asked.far], asked.seeds, asked.transparent
    at = 0
    for k, op in enumerate(made):
        if k < at:
            continue
        if op.primitive is CARRY_IN and op.loop is not None and (body := _body(made, k)):
            at = k + body
            _again(made[k:at], op.loop, known, asked)
            continue
        rule = rules.get(op)
        if rule is None:
            rule = rules[op] = _rule(asked.graph, op, asked.far)
        found = rule(known, asked)
        for v in op.outputs:
            if v not in seeds:
                passed = transparent.get(v)
                known[v] = found if passed is None else next((known[s] for s in passed if s in known), 0.0)


def _body(made: Sequence[Op], at: int) -> int:
    """How many operations, from the first carry of a scan on, are in its body; 0 where what follows is no result of
    the scan, so that all of this is inside of it."""
    loop = made[at].loop
    assert loop is not None
    n = at
    while n < len(made) and _within(made[n].loop, loop):
        n += 1
    ends = {out for _, out in loop.carries}
    leaves = any(op.primitive is CARRY_OUT and op.inputs[0] in ends for op in made[n:])
    leaves |= any(op.primitive is STACK_OUT and any(op.inputs[0] in o.outputs for o in made[at:n]) for op in made[n:])
    return n - at if leaves else 0


def _within(loop: Loop | None, outer: Loop) -> bool:
    while loop is not None and loop is not outer:
        loop = loop.parent
    return loop is outer


_PASSES = 3


def _again(body: Sequence[Op], loop: Loop, known: dict[int, Order], asked: _Question) -> None:
    """Runs the body of a scan as often as it shows how its carries go on, and goes on with that."""
    starts = [op for op in body if op.primitive is CARRY_IN and op.loop is loop]
    rest = [op for op in body if op not in starts]
    passes = min(_PASSES, loop.length)
    _run(starts, known, asked)
    history: list[list[Order]] = []
    for done in range(1, passes + 1):
        _run(rest, known, asked)
        history.append([known.get(out, 0.0) for _, out in loop.carries])
        if done < passes:
            known.update((carry, known[out]) for carry, out in loop.carries if carry in known and out in known)
    if loop.length > _PASSES:
        for (_, out), before, now in zip(loop.carries, *history[-2:], strict=True):
            if out in known:
                with np.errstate(invalid="ignore"):
                    grown = np.nan_to_num(np.subtract(now, before), nan=0.0, posinf=0.0, neginf=0.0)
                    found = now + (loop.length - _PASSES) * np.maximum(grown, 0.0)
                known[out] = found if isinstance(now, np.ndarray) else float(found)


def _least(values: Sequence[Order]) -> Order:
    if len(values) == 1:
        return values[0]
    vectors = [v for v in values if isinstance(v, np.ndarray)]
    if not vectors:
        return min(values)
    numbers = [v for v in values if not isinstance(v, np.ndarray)]
    least = functools.reduce(np.fmin, vectors)
    return np.minimum(least, min(numbers)) if numbers else least  # NaN, not dependent, stays NaN


def _product(left: Order, right: Order) -> Order:
    if not isinstance(right, np.ndarray):
        return left + right if right else left
    if not isinstance(left, np.ndarray):
        return left + right if left else right
    both = left + right
    return np.where(np.isnan(both), np.fmin(left, right), both)  # that which is no NaN, if one is


Rule = Callable[[Mapping[int, Order], _Question], Order]  # the order of an operation's result, from those known


def _rule(graph: Graph, op: Op, far: bool) -> Rule:
    """What an operation does to orders. What does not depend on the question asked is found here, once."""
    primitive = op.primitive

    def given(value: int, guard: bool = False) -> _Given:
        """A value and its order where it comes from outside."""
        if graph.kind[value]:
            return value, 0.0
        number = graph.literal(value)
        if number == 0 or number != number or (guard and number is not None and (far or abs(number) <= EPSILON)):
            return value, math.inf
        return value, 0.0

    if primitive in KEEP or primitive is p.sort_p:
        return _kept(*given(op.inputs[0]))
    if not far and primitive in _SHIFTED and (vanishing := _vanishing(graph, op)) is not None:
        return _raised(given(vanishing[0]), vanishing[1])
    if primitive in PRODUCT:
        return _multiplied(given(op.inputs[0]), given(op.inputs[1]))
    if primitive in LEAST:
        inputs = op.inputs
        if primitive is p.dynamic_update_slice_p:
            inputs = inputs[:2]
        elif primitive in _SCATTERS:
            inputs = (inputs[0], inputs[2])
        if primitive in _UPDATES and _is_store(graph, inputs[0]):
            inputs = inputs[1:]
        if primitive in (p.max_p, p.min_p):  # a bound that zero keeps is far away: relu6, hard tanh
            inputs = tuple(v for v in inputs if not _slack(graph, primitive, v)) or inputs
        elif primitive in ADDITIVE and (active := frozenset(filter(graph.is_activation, inputs))):
            # Additive parameters do not count.
            return _added([given(v, True) for v in inputs if not graph.is_parameter(v)], active)
        return _lesser([given(v, True) for v in inputs])
    if primitive is p.select_n_p:
        chosen = _at_zero(graph, op.inputs[0]) if len(op.inputs) == 3 else None
        return _selected([given(v) for v in (op.inputs[1:] if chosen is None else [op.inputs[1 + chosen]])])
    if primitive is p.clamp_p:
        return _kept(*given(op.inputs[1]))
    if primitive is CHOOSE:
        return _chosen([given(v) for v in op.inputs[:-1]], op.params["switch"])
    if primitive is p.div_p:
        return _divided(given(op.inputs[0]), given(op.inputs[1]))
    power = _power(graph, op)
    if power is not None:
        return _raised(given(op.inputs[0]), power)
    if primitive in SQUASH:
        return _squashed(*given(op.inputs[0]))
    if primitive in _DISCRETE:
        return _constant
    if jaxprs.is_ragged_dot(primitive):
        return _multiplied(given(op.inputs[0]), given(op.inputs[1]))
    if primitive in jaxprs.collectives():
        return _kept(*given(op.inputs[0]))
    return _unruled([given(v) for v in op.inputs], [graph.is_activation(v) for v in op.inputs])


_Given = tuple[int, float]  # a value, and its order where it comes from outside


def _constant(known: Mapping[int, Order], asked: _Question) -> Order:
    return 0.0


def _kept(value: int, given: float) -> Rule:
    return lambda known, asked: known.get(value, given)


def _multiplied(left: _Given, right: _Given) -> Rule:
    (a, a_given), (b, b_given) = left, right
    return lambda known, asked: _product(known.get(a, a_given), known.get(b, b_given))


def _lesser(terms: list[_Given]) -> Rule:
    return lambda known, asked: _least([known.get(v, given) for v, given in terms])


def _added(terms: list[_Given], activations: frozenset[int]) -> Rule:
    """Of a sum of activations; a term that was not asked for does not count `inside`."""

    def rule(known: Mapping[int, Order], asked: _Question) -> Order:
        counted = terms
        if asked.inside:
            own = [t for t in terms if isinstance(known.get(t[0]), np.ndarray)]
            own = own or [t for t in terms if t[0] in known and t[0] in activations]
            if own:
                counted = own + [t for t in terms if t[0] not in activations]
        return _least([known.get(v, given) for v, given in counted]) if counted else 0.0

    return rule


def _selected(terms: list[_Given]) -> Rule:
    def rule(known: Mapping[int, Order], asked: _Question) -> Order:
        found = [known.get(v, given) for v, given in terms]
        if asked.inside:
            found = [x for x in found if isinstance(x, np.ndarray)] or found
        return _least(found)

    return rule


def _chosen(results: list[_Given], switch: int) -> Rule:
    def rule(known: Mapping[int, Order], asked: _Question) -> Order:
        found = [known.get(v, given) for v, given in results]
        least = _least(found)
        if switch not in asked.arms:
            return least
        runs = asked.arms[switch]
        return np.select([runs == k for k in range(len(found))], found, least)

    return rule


def _divided(above: _Given, below: _Given) -> Rule:
    (a, a_given), (b, b_given) = above, below

    def rule(known: Mapping[int, Order], asked: _Question) -> Order:
        over, under = known.get(a, a_given), known.get(b, b_given)
        if isinstance(under, np.ndarray):
            return _product(over, np.where(np.isinf(under), 0.0, -under))
        return over - under if math.isfinite(under) else over

    return rule


def _raised(base: _Given, power: float) -> Rule:
    value, given = base

    def rule(known: Mapping[int, Order], asked: _Question) -> Order:
        x = known.get(value, given)
        if isinstance(x, np.ndarray):
            found = power * np.where(np.isinf(x) & (power < 0), 0.0, x) if power else np.zeros_like(x)
            return np.where(np.isnan(x), np.nan, found)
        return power * x if power and (math.isfinite(x) or power > 0) else 0.0

    return rule


def _squashed(value: int, given: float) -> Rule:
    def rule(known: Mapping[int, Order], asked: _Question) -> Order:
        x = known.get(value, given)
        return np.where(np.isnan(x), np.nan, 0.0) if isinstance(x, np.ndarray) else 0.0

    return rule


def _unruled(terms: list[_Given], activations: list[bool]) -> Rule:
    def rule(known: Mapping[int, Order], asked: _Question) -> Order:
        pairs = zip(terms, activations, strict=True)
        streams = [known.get(v, given) for (v, given), active in pairs if active or v in known]
        return _least(streams) if streams else 0.0

    return rule


_SHIFTED = SQUASH | {p.add_p, p.sub_p}
_LONGEST = 24  # operations in such a function


def _vanishing(graph: Graph, op: Op) -> tuple[int, float] | None:
    """A value of which a result is an elementwise function that is zero at zero though a part of it is not, as those of
    softplus(x) - log 2, e^x - 1 and log(e^x / 2 + 1 / 2) are; and the power with which it vanishes."""
    if op.primitive not in SQUASH and all(graph.literal(v) is None for v in op.inputs):
        return None
    if not graph.is_activation(op.outputs[0]) or not jnp.issubdtype(graph.program.dtype(op.outputs[0]), jnp.floating):
        return None
    made: list[Op] = []
    todo = {op.outputs[0]}
    while todo and len(made) < _LONGEST:
        value = max(todo)
        step = graph.program.ops[graph.maker[value]] if value in graph.maker else None
        if step is None or not quadrature.is_elementwise(step.primitive) or len(step.outputs) > 1:
            return None
        if any(not graph.is_activation(v) and graph.literal(v) is None for v in step.inputs):
            return None
        made.append(step)
        todo = (todo - {value}) | {v for v in step.inputs if graph.is_activation(v)}
        if len(todo) == 1:
            (root,) = todo
            if power := _power_at_zero(_formula(graph, made[::-1], root)):
                return root, power
    return None


def _formula(graph: Graph, made: Sequence[Op], root: int) -> quadrature.Formula:
    env = {root: quadrature.X}
    for op in made:
        args = [env[v] if v in env else quadrature.constant(graph.literal(v) or 0.0) for v in op.inputs]
        env[op.outputs[0]] = quadrature.of_op(op, args, [graph.program.dtype(v) for v in op.inputs])
    return env[made[-1].outputs[0]]


def _power_at_zero(formula: quadrature.Formula) -> float:
    """k of f(x) ~ x^k near 0; 0 where f(0) is not 0, or not known."""
    zero, *near = map(abs, quadrature.at(formula, 0.0, 0.01, -0.01, 0.02, -0.02))
    one, two = max(near[:2]), max(near[2:])
    vanishes = zero < 1e-6 and 1e-6 < one < 1 and math.isfinite(two)
    return max(round(math.log2(two / one)), 0) if vanishes else 0.0


_COMPARISONS = {p.lt_p: operator.lt, p.le_p: operator.le, p.gt_p: operator.gt, p.ge_p: operator.ge}


def _at_zero(graph: Graph, predicate: int) -> bool | None:
    """What a comparison gives as its argument vanishes: with a number other than zero (hard tanh, written with where),
    or whether it is equal to any."""
    k = graph.maker.get(predicate)
    op = graph.program.ops[k] if k is not None else None
    if op is not None and op.primitive in (p.eq_p, p.ne_p):
        left, right = op.inputs
        if left == right:
            return op.primitive is p.eq_p  # is it no number?
        floating = jnp.issubdtype(graph.program.dtype(left), jnp.floating)
        guard = floating and (graph.literal(left) is not None) != (graph.literal(right) is not None)
        return op.primitive is p.ne_p if guard else None  # small is not zero: a guard of a division
    if op is None or op.primitive not in _COMPARISONS:
        return None
    left, right = (0.0 if graph.is_activation(v) else None if graph.kind[v] else graph.literal(v) for v in op.inputs)
    if left is None or right is None or left == right:
        return None
    return bool(_COMPARISONS[op.primitive](left, right))


def _is_store(graph: Graph, value: int) -> bool:
    """Whether an array that is written into comes from outside as it is: a cache."""
    while (k := graph.maker.get(value)) is not None and graph.program.ops[k].primitive in COPIES | _UPDATES:
        value = graph.program.ops[k].inputs[0]
    return value in graph.leaves


def _slack(graph: Graph, primitive: Any, value: int) -> bool:
    number = None if graph.kind[value] else graph.literal(value)
    return number is not None and (number < 0 if primitive is p.max_p else number > 0)


def _power(graph: Graph, op: Op) -> float | None:
    """The exponent of a power, None for another operation."""
    primitive: Any = op.primitive
    if primitive is p.integer_pow_p:
        return float(op.params["y"])
    if primitive is p.pow_p:
        return graph.literal(op.inputs[1])
    return {p.square_p: 2.0, p.sqrt_p: 0.5, p.rsqrt_p: -0.5, p.cbrt_p: 1 / 3}.get(primitive)
