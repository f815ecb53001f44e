"""The rule of all elementwise operations.

Sums and products are those of polynomials; a function of one source is a `Formula`, composed symbolically, and so is
its derivative. Of two sources a grid gives the joint distribution, and their function becomes a source of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from fixup_init import jaxprs, quadrature, running
from fixup_init.jaxprs import p
from fixup_init.moments import whole_numbers
from fixup_init.moments.bounds import reach_of
from fixup_init.moments.combining import combined, complement
from fixup_init.moments.distributions import drawn_at, draws
from fixup_init.moments.environment import Environment, NoRule
from fixup_init.moments.lattice import same, settled
from fixup_init.moments.polynomials import ALIKE, DEPENDENT, are_dependent, merged, resemble, scaled, second_of, times
from fixup_init.moments.random_bits import of_bits
from fixup_init.moments.rearranging import broadcasted
from fixup_init.moments.shares import shares
from fixup_init.moments.values import Node, Source, Term, Trait, Value, function_of, known, sources_of, unit
from fixup_init.program import IDENTITY, Op
from fixup_init.quadrature import FLAT, Formula, Quantile, X

_SAME = frozenset({
    p.copy_p, p.stop_gradient_p, p.name_p, IDENTITY, p.reduce_precision_p, p.sharding_constraint_p,
    p.device_put_p,
})  # fmt: skip
_TERMS = 24  # of a polynomial, before it becomes one source
_MASKED = -1e4  # a score below this is masked
_SINGULAR = frozenset({
    p.div_p, p.rsqrt_p, p.sqrt_p, p.log_p, p.log1p_p, p.pow_p, p.integer_pow_p, p.tan_p, p.atanh_p, p.acosh_p,
    p.erf_inv_p, p.lgamma_p, p.digamma_p, jaxprs.LOG2,
})  # fmt: skip
_POLE = 1e3  # times the mean square of samples
_EXPONENTIAL = frozenset({p.exp_p, p.exp2_p})
_BEYOND = 0.03  # of a second moment: what may come from values that are out of reach
_TAIL = 1e3  # times the mean square of samples: what is never drawn
ONE_SIGN = "approximate: sums of values of one sign, taken as log-normal"
_GRID = 96  # points for each of two values
_ORDER = 24  # of their Hermite expansion


def elementwise(env: Environment, op: Op, args: list[Value]) -> Value:
    """Entry by entry: sums and products of polynomials, functions of one source."""
    primitive: Any = op.primitive
    shape = env.program.shape(op.outputs[0])
    rank = len(shape)
    one = unit(rank)
    args = [_with_reach(_lifted(env, a, shape), a) for a in args]
    result: Value | None = None
    if any(a.bits for a in args):
        return of_bits(op, args)
    if (found := whole_numbers.compared(env, op, args, shape)) is not None:
        return found
    if (found := whole_numbers.unchanged(op, args)) is not None:
        return found
    if primitive is p.select_n_p and (k := args[0].number) is not None:
        case = args[1 + round(k)]
        return dataclasses.replace(case, slopes=dict(case.slopes))
    if primitive in _SAME or (
        primitive is p.convert_element_type_p and not _cuts(env.program.dtype(op.inputs[0]), op.params["new_dtype"])
    ):
        a = args[0]
        slopes = {} if primitive is p.stop_gradient_p else a.slopes
        result = dataclasses.replace(a, slopes=dict(slopes), array=None)
    elif primitive in (p.add_p, p.sub_p, p.add_jaxvals_p):
        sign = -1.0 if primitive is p.sub_p else 1.0
        terms = merged([*args[0].terms, *scaled(args[1].terms, sign)])
        slopes = _linear_slopes([(args[0], one), (args[1], scaled(one, sign))])
        result = _result(shape, terms, args, slopes)
        result.notes |= env.shared(args) | ({ALIKE} if resemble(args[0].terms, args[1].terms) else set())
    elif primitive is p.neg_p:
        slopes = _linear_slopes([(args[0], scaled(one, -1.0))])
        result = _result(shape, scaled(args[0].terms, -1.0), args, slopes)
    elif primitive is p.mul_p:
        result = _product(env, shape, args)
    elif primitive is p.div_p and (c := args[1]).is_constant and c.terms:
        inverse = 1.0 / sum((k for k, _ in c.terms), np.zeros((1,) * rank))
        slopes = _linear_slopes([(args[0], [(inverse, {})])])
        result = _result(shape, scaled(args[0].terms, inverse), args, slopes)
    elif primitive in (p.square_p, p.integer_pow_p) and op.params.get("y", 2) == 2 and _common(args) is None:
        result = _product(env, shape, [args[0], args[0]])
    if result is None:
        result = _function(env, op, args, shape)
        if (masked := _of_masked(env, op, args, result)) is not None:
            result, args = masked, [dataclasses.replace(a, visible=None) for a in args]
    call = env.calls.get(op.outputs[0])
    if call is not None and result.slopes:
        _by_rule(env, call, result)
    if len(result.terms) > _TERMS or any(len(t) > _TERMS for t in result.slopes.values()):
        env.collapse(result)
    _keep_mask(op, args, result)
    result.rows = max((a.rows for a in args), default=0) if primitive not in FLAT else 0
    return result


def _with_reach(lifted: Value, value: Value) -> Value:
    """The same entries, repeated or not, have the same interval."""
    if lifted is not value:
        lifted.reach = reach_of(value)
    return lifted


def _linear_slopes(parts: Iterable[tuple[Value, list[Term]]]) -> dict[Node, list[Term]]:
    """Slopes of a result whose slope in each argument is a polynomial."""
    found: dict[Node, list[Term]] = {}
    for value, factor in parts:
        for node, terms in value.slopes.items():
            made = times(terms, factor)
            if made:
                found[node] = merged([*found.get(node, []), *made])
    return found


def _result(shape: tuple[int, ...], terms: list[Term], args: Sequence[Value], slopes: dict[Node, list[Term]]) -> Value:
    """A value with the notes of those that it was made of."""
    tail = next((a.tail for a in args if a.tail), "")
    return Value(shape, terms, slopes, notes=frozenset().union(*(a.notes for a in args)), tail=tail)


def _lifted(env: Environment, value: Value, shape: tuple[int, ...]) -> Value:
    """An argument in the shape of the result: scalars, and axes of size 1, are repeated."""
    if value.shape == shape:
        return value
    rank = len(shape)
    if value.is_constant:
        c = sum((c for c, _ in value.terms), np.zeros((1,) * value.rank))
        c = c.reshape((1,) * (rank - value.rank) + c.shape)
        array = None if value.array is None else value.array.reshape((1,) * (rank - value.rank) + value.array.shape)
        return dataclasses.replace(value, shape=shape, terms=[(c, {})] if c.any() else [], array=array)
    result = broadcasted(env, value, shape, tuple(range(rank - value.rank, rank)))
    if value.array is not None:
        result.array = value.array.reshape((1,) * (rank - value.array.ndim) + value.array.shape)
    return result


def _keep_mask(op: Op, args: Sequence[Value], result: Value) -> None:
    """Scores that are masked stay so through sums and products."""
    seen = [a.visible for a in args if a.visible is not None]
    if op.primitive in (p.add_p, p.sub_p, p.add_jaxvals_p):
        for a in args:
            if a.array is not None and a.array.size > 1 and a.array.min() < _MASKED:
                seen.append(a.array > _MASKED)
                result.terms = next(b for b in args if b is not a).terms
    if seen:
        result.visible = functools.reduce(np.logical_and, seen)


def _of_masked(env: Environment, op: Op, args: Sequence[Value], result: Value) -> Value | None:
    """A function of masked scores: its value at minus infinity where they are masked; None where that is not finite."""
    hidden = [k for k, a in enumerate(args) if a.visible is not None]
    if len(hidden) != 1 or any(a.number is None for k, a in enumerate(args) if k not in hidden):
        return None
    casts = [env.program.dtype(v) for v in op.inputs]
    numbers = [
        jnp.asarray(-math.inf if k in hidden else a.number, d) for k, (a, d) in enumerate(zip(args, casts, strict=True))
    ]
    far = float(np.asarray(running.bind(op, numbers)[0], np.float64))
    mask = args[hidden[0]].visible
    if not math.isfinite(far) or mask is None:
        return None
    rank = len(result.shape)
    seen = known(
        result.shape, mask.reshape((1,) * (rank - mask.ndim) + mask.shape).astype(np.float32), profile=True
    ).terms
    terms = merged([*times(result.terms, seen), *scaled([*unit(rank), *scaled(seen, -1.0)], far)])
    return dataclasses.replace(
        result, terms=terms, slopes={node: times(slope, seen) for node, slope in result.slopes.items()}
    )


def _cuts(old: Any, new: Any) -> bool:
    """Whether a conversion takes real numbers to whole ones."""
    return not jnp.issubdtype(new, jnp.inexact) and jnp.issubdtype(old, jnp.inexact)


def _product(env: Environment, shape: tuple[int, ...], args: Sequence[Value]) -> Value:
    """The product of two polynomials."""
    left, right = args
    if len(left.terms) * len(right.terms) > _TERMS:
        env.collapse(left if len(left.terms) > len(right.terms) else right)
    terms = whole_numbers.with_picked(times(left.terms, right.terms))
    slopes = _linear_slopes([(left, list(right.terms)), (right, list(left.terms))])
    result = _result(shape, terms, args, slopes)
    result.notes |= env.shared(args)
    if any(len(f) > 1 for _, f in terms) and are_dependent(terms):
        result.notes |= {DEPENDENT}
    return result


def _common(args: Sequence[Value]) -> Source | None:
    """The one source of all arguments, where they are functions of it alone."""
    sources = {s for a in args for _, f in a.terms for s in f}
    plain = all(c.size == 1 for a in args for c, _ in a.terms)
    return next(iter(sources)) if len(sources) == 1 and plain else None


def _formula(value: Value) -> Formula:
    """A value that depends on one source alone, as a function of it."""
    coefficients = [float(c.ravel()[0]) for c, _ in value.terms]
    functions = [next(iter(f.values())) if f else quadrature.constant(1.0) for _, f in value.terms]
    return quadrature.weighted(coefficients, functions) if value.terms else quadrature.constant(0.0)


def _function(env: Environment, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value:
    """A function of one source; where there are several, of the sources that its arguments are made into."""
    rank = len(shape)
    if all(a.is_constant for a in args):  # with a profile
        arrays = np.broadcast_arrays(*(sum((c for c, _ in a.terms), np.zeros((1,) * rank)) for a in args))
        dtypes = [env.program.dtype(v) for v in op.inputs]
        found = running.bind(op, [jnp.asarray(x, d) for x, d in zip(arrays, dtypes, strict=True)])[0]
        return known(shape, np.asarray(found), profile=True)
    common = _common(args)
    if common is None:
        if op.primitive is p.select_n_p:
            return _selected(env, op, args, shape)
        if (gate := _gate(args)) is not None:
            return _gated(env, op, args, shape, gate)
        moving = [a for a in dict.fromkeys(args) if not a.is_constant]
        for a in moving:
            env.collapse(a)
        common = _common(args)
        if common is None and op.primitive is p.div_p:
            return _quotient(env, op, args, shape)
        if common is None and len(moving) == 2 and len(args) == 2:
            return _of_operation(env, op, args, shape)
        if common is None:
            raise NoRule(f"no rule for `{op.name}` of several values at once")
    casts = [env.program.dtype(v) for v in op.inputs]
    formulas = [_formula(a) for a in args]
    terms = function_of(common, quadrature.of_op(op, formulas, casts))
    _check_finite(op, terms, shape)
    notes, tail = set[str](), ""
    if op.primitive in _EXPONENTIAL:
        _check_bounds(op, args[0], terms, shape)
        notes = {ONE_SIGN} if common.assumed else notes
    if op.primitive in _EXPONENTIAL or any(a.tail for a in args):
        tail = _tail(op, args[0], terms, shape)
    parts = []
    if op.primitive not in FLAT:
        for k, a in enumerate(args):
            if a.slopes and jnp.issubdtype(casts[k], jnp.floating):
                parts.append((a, function_of(common, quadrature.slope(op, formulas, casts, k))))
    result = _result(shape, terms, args, _linear_slopes(parts))
    return dataclasses.replace(result, notes=result.notes | notes, tail=tail)


def _check_finite(op: Op, terms: Sequence[Term], shape: tuple[int, ...]) -> None:
    """An operation with a pole says so where the distribution of its argument, as it is known, reaches the pole.

    There an integral is not finite, or is all in the node that is nearest to the pole: far above the mean of samples.
    """
    if op.primitive not in _SINGULAR:
        return
    second = second_of(terms, len(shape), shape)
    finite = np.isfinite(second).all()
    if finite:
        drawn = draws(sources_of(terms))
        finite = same(second, len(shape)).mean() < _POLE * np.square(drawn_at(terms, drawn)).mean()
    if not finite:
        raise NoRule(f"`{op.name}` of a value that, as far as its distribution is known, reaches where it is infinite")


def _check_bounds(op: Op, value: Value, terms: Sequence[Term], shape: tuple[int, ...]) -> None:
    """An exponential of a value with an upper bound does not come from above it."""
    high = reach_of(value)[1]
    if not math.isfinite(high):
        return
    second = float(same(second_of(terms, len(shape), shape), len(shape)).mean())
    drawn = draws(sources_of(value.terms))
    x, squares = drawn_at(value.terms, drawn), np.square(drawn_at(terms, drawn))
    beyond = x > high + 1e-6 * max(float(np.abs(x).max()), 1e-30)
    outside = squares[beyond].sum() / max(squares.sum(), 1e-300)
    if outside > _BEYOND or second > (1 + _BEYOND) * math.exp(2 * min(high, 300.0)):
        raise NoRule(
            f"`{op.name}` of a value that is at most {high:.3g}, which its distribution, as far as it is known, exceeds"
        )


def _tail(op: Op, value: Value, terms: Sequence[Term], shape: tuple[int, ...]) -> str:
    """Why moments of a function of a value are not known, though the function is: all lies in a tail never drawn."""
    second = float(same(second_of(terms, len(shape), shape), len(shape)).mean())
    if second <= _TAIL * np.square(drawn_at(terms, draws(sources_of(terms)))).mean():
        return ""
    if any(not isinstance(n, Trait) for n in value.notes) or any(s.assumed for s in sources_of(value.terms)):
        return f"`{op.name}` of a value that is only known approximately, and whose tail is all that counts"
    return f"`{op.name}` of so wide a value that its moments lie in a tail that is never drawn"


def _gate(args: Sequence[Value]) -> Source | None:
    """The truth value that the one argument which is no number has in all its terms."""
    moving = [a for a in args if not a.is_constant]
    if len(moving) != 1 or any(a.number is None for a in args if a.is_constant):
        return None
    held = [{s for s, f in factors.items() if s.truth and f is X} for _, factors in moving[0].terms]
    shared = set.intersection(*held) if held else set()
    return min(shared, key=lambda s: s.number) if shared else None


def _gated(env: Environment, op: Op, args: list[Value], shape: tuple[int, ...], gate: Source) -> Value:
    """f(b y) = f(0) + b (f(y) - f(0)) for a truth value b, and the slope likewise."""
    rank = len(shape)
    k = next(k for k, a in enumerate(args) if not a.is_constant)
    whole = args[k]
    yes, no = function_of(gate), merged([*unit(rank), *scaled(function_of(gate), -1.0)])
    stub = Node(-1, shape, [])
    inner = [(c, {s: f for s, f in factors.items() if s is not gate}) for c, factors in whole.terms]
    bare = Value(shape, merged(inner), {stub: unit(rank)} if whole.slopes else {})
    casts = [env.program.dtype(v) for v in op.inputs]
    numbers = [jnp.asarray(0.0 if j == k else a.number, d) for j, (a, d) in enumerate(zip(args, casts, strict=True))]
    at_zero = float(np.asarray(running.bind(op, numbers)[0], np.float64))
    there = _function(env, op, [*args[:k], bare, *args[k + 1 :]], shape)
    if there.is_constant and there.array is not None:
        there = dataclasses.replace(there, array=None)
    terms = merged([*times(there.terms, yes), *scaled(no, at_zero)])
    slopes: dict[Node, list[Term]] = {}
    if stub in there.slopes and op.primitive not in FLAT:

        def along(x: Any) -> Any:
            return running.bind(op, [*numbers[:k], x, *numbers[k + 1 :]])[0]

        flat = float(jax.jvp(along, (numbers[k],), (jnp.ones_like(numbers[k]),))[1])
        slope = merged([*times(there.slopes[stub], yes), *scaled(no, flat)])
        slopes = _linear_slopes([(whole, slope)])
    return _result(shape, terms, [*args, there], slopes)


def _by_rule(env: Environment, call: Op, result: Value) -> None:
    """Takes the derivative that a call has of its own, where that differs from its body's: relu at 0."""
    outer = [env.read(v) for v in call.inputs]
    moving = [k for k, a in enumerate(outer) if a.slopes]
    common = _common(outer)
    if common is None or len(moving) != 1 or outer[moving[0]].slopes.keys() != result.slopes.keys():
        return
    (k,) = moving
    terms = [t for slopes in (outer[k].slopes, result.slopes) for terms in slopes.values() for t in terms]
    if any(c.size > 1 or set(f) - {common} for c, f in terms):
        return
    avals = [env.program.avals[v] for v in call.inputs]
    ruled = quadrature.slope_by_rule(call, [_formula(a) for a in outer], avals, k)
    if ruled is not None:
        result.slopes = _linear_slopes([(outer[k], function_of(common, ruled))])


def _quotient(env: Environment, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value:
    """A polynomial times 1 / b, for a function b of one source."""
    above, below = args
    if (found := shares(env, shape, above, below)) is not None:
        return found
    base = _common([below])
    if base is None:
        raise NoRule("no rule for `div` by a constant array")
    casts = [env.program.dtype(v) for v in op.inputs]
    formulas = [quadrature.constant(1.0), _formula(below)]
    inverse = function_of(base, quadrature.of_op(op, formulas, casts))
    _check_finite(op, inverse, shape)
    slope = function_of(base, quadrature.slope(op, formulas, casts, 1))
    result = _result(
        shape, times(above.terms, inverse), args,
        _linear_slopes([(above, inverse), (below, times(above.terms, slope))]),
    )  # fmt: skip
    if are_dependent(result.terms):
        result.notes |= {DEPENDENT}
    return result


def _selected(env: Environment, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value:
    """p a + (1 - p) b, for a truth value p of its own."""
    which, *cases = args
    if len(cases) != 2:
        return _one_of(which, cases, shape)
    rank = len(shape)
    if which.array is not None and which.array.size > 1:
        for k, case in enumerate(cases):
            other = cases[1 - k]
            if (c := case.number) is not None and c < _MASKED:
                result = dataclasses.replace(other, slopes=dict(other.slopes), array=None)
                seen = which.array.astype(bool) if k == 0 else ~which.array.astype(bool)
                result.visible = seen if result.visible is None else result.visible & seen
                return result
    if not which.is_constant and len(which.terms) > 1:
        env.collapse(which)
    yes = list(which.terms)
    no = merged([*unit(rank), *scaled(yes, -1.0)])
    terms = merged([*times(cases[0].terms, no), *times(cases[1].terms, yes)])
    result = _result(shape, terms, args, _linear_slopes([(cases[0], no), (cases[1], yes)]))
    if are_dependent(terms):
        result.notes |= {DEPENDENT}
    return result


def _one_of(which: Value, cases: Sequence[Value], shape: tuple[int, ...]) -> Value:
    """One of several, case k where none before it was with the chance p_k / (p_k + p_k+1 + ...)."""
    found = whole_numbers.whole(which)
    if found is None:
        raise NoRule("no rule for `select_n` by such numbers")
    rank, shares = len(shape), found.up_to(len(cases))
    rest, left = unit(rank), float(shares.sum())
    parts: list[tuple[Value, list[Term]]] = []
    for k, case in enumerate(cases):
        share = float(shares[k] / left) if left > 1e-12 else 0.0
        here = unit(rank)
        if k < len(cases) - 1:
            second = found.rho * share + (1 - found.rho) * share**2
            here = function_of(whole_numbers.chosen(shape, np.full((1,) * rank, share), np.maximum(second, 0.0)))
        parts.append((case, times(rest, here)))
        rest, left = times(rest, complement(here, rank)), left - float(shares[k])
    return combined(shape, parts)


def _of_operation(env: Environment, op: Op, args: list[Value], shape: tuple[int, ...]) -> Value:
    """An operation on two values."""
    if any(_common([a]) is None for a in args):
        raise NoRule(f"no rule for `{op.name}` with a constant array")
    casts = [env.program.dtype(v) for v in op.inputs]
    return of_two(env, lambda *xs: running.bind(op, xs)[0], args, shape, casts, op.primitive in FLAT)


def of_two(
    env: Environment, function: Callable[..., Any], args: list[Value], shape: tuple[int, ...],
    casts: Sequence[Any] = (jnp.float32, jnp.float32), is_flat: bool = False,
) -> Value:  # fmt: skip
    """A function of two independent values of one source each, by their joint distribution."""
    sources = [_common([a]) for a in args]
    left, right = (s for s in sources if s is not None)
    rank = len(shape)
    z, w = np.polynomial.hermite_e.hermegauss(_GRID)
    w = w / w.sum()
    drawn, correlations = [], []
    for s in (left, right):
        m = float(s.mean.mean())
        v = max(float((same(s.second, rank) - s.mean**2).mean()), 1e-300)
        drawn.append(m + math.sqrt(v) * z if s.quantile is None else s.quantile.values(m, math.sqrt(v), z))
        rho = np.clip((s.second.mean(tuple(range(rank, 2 * rank)), keepdims=True) - m * m) / v, -1, 1)
        correlations.append(quadrature.latent(s.quantile, rho))
    a, b = np.meshgrid(*drawn, indexing="ij")
    flat = [jnp.asarray(x.ravel(), d) for x, d in zip((a, b), casts, strict=True)]
    f = np.asarray(function(*flat), np.float64).reshape(a.shape)
    basis = np.polynomial.hermite_e.hermevander(z, _ORDER) / np.sqrt(special.factorial(np.arange(_ORDER + 1)))
    c2 = np.square((basis * w[:, None]).T @ f @ (basis * w[:, None]))
    weight = np.outer(w, w)
    mean, q = float((weight * f).sum()), float((weight * f * f).sum())
    powers = [correlation[..., None] ** np.arange(_ORDER + 1) for correlation in correlations]
    second = np.einsum("...k,kl,...l->...", powers[0], c2, powers[1]) + 0.0
    second[(0,) * rank] = q
    quantile = Quantile.of_samples(f.ravel(), weight.ravel())
    source = Source(
        shape, np.full((1,) * rank, mean), settled(second, shape), quantile, left.relatives | right.relatives
    )
    parts = []
    if not is_flat:
        for k, value in enumerate(args):
            one = [jnp.zeros(f.size, jnp.asarray(x).dtype) for x in flat]
            one[k] = one[k] + 1
            d = np.asarray(jax.jvp(function, flat, one)[1], np.float64).reshape(f.shape)
            moment = float((weight * d * d).sum())
            parts.append((value, functools.partial(np.multiply, moment)))
    notes = {DEPENDENT} if left.relatives & right.relatives else set()
    return env.made(source, parts, notes)
