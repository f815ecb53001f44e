"""Expectations of scalar functions of a Gaussian variable, to rounding: formulas, their kinks, Hermite expansions.

A `Formula` is an elementwise function of one variable as the trace holds it: evaluated with the trace's own primitives
in float64, differentiated with JAX's own rules. E f(x)^n for x ~ N(m, s^2) is a composite Gauss-Legendre sum whose
panels end where the function bends (relu, clip, and any that a user wrote: found by bisection), so that it converges as
it does for a smooth function. For a pair of correlation rho, E f(x) g(y) = sum_k a_k b_k rho^k with the coefficients of
normalized Hermite polynomials (Mehler 1866; Poole et al. 2016, arXiv:1606.05340, use the same pair map).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from fixup_init import jaxprs, running
from fixup_init.jaxprs import p
from fixup_init.program import IDENTITY, Op, Program

__all__ = ["X", "Formula", "Quantile", "constant", "expand", "gauss_hermite", "of_op", "paired", "product", "slope"]

ORDER = 48  # Hermite coefficients that are kept; the rest of the norm stands at 1.5 times that order
_REACH = 9.0  # standard deviations that a sum covers: what is left weighs 1e-18
_PANELS, _NODES = 36, 16
_SIZES = (1024, 8192, 65536)  # evaluations are padded to these, so that few shapes are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """An elementwise function of one variable, by what it is made of; equal functions have equal keys."""

    kind: str  # "x", "constant", "product", "sum", "op" or "slope" (of an operation in its argument `which`)
    args: tuple[Formula, ...] = ()
    value: float = 0.0
    op: Op | None = None
    which: int = 0
    casts: tuple[Any, ...] = ()  # dtypes of an operation's arguments
    key: int = 0


_keys: dict[Any, int] = {}


def _keyed(**fields: Any) -> Formula:
    op = fields.get("op")
    of = jaxprs.signature(op) if op is not None else None
    signature = (
        fields["kind"], tuple(a.key for a in fields.get("args", ())), fields.get("value", 0.0), of,
        fields.get("which", 0), tuple(map(str, fields.get("casts", ()))),
    )  # fmt: skip
    return Formula(**fields, key=_keys.setdefault(signature, len(_keys) + 1))


X = _keyed(kind="x")


def constant(value: float) -> Formula:
    """The function that is `value` everywhere."""
    return _keyed(kind="constant", value=float(value))


def product(left: Formula, right: Formula) -> Formula:
    """left(x) right(x)."""
    for a, b in ((left, right), (right, left)):
        if a.kind == "constant" and a.value == 1.0:
            return b
        if a.kind == "constant" and a.value == 0.0:
            return a
    if left.kind == right.kind == "constant":
        return constant(left.value * right.value)
    return _keyed(kind="product", args=tuple(sorted((left, right), key=lambda f: f.key)))


def weighted(coefficients: Sequence[float], functions: Sequence[Formula]) -> Formula:
    """The sum of functions, each times a number."""
    if len(functions) == 1 and coefficients[0] == 1.0:
        return functions[0]
    terms = tuple(product(constant(c), f) for c, f in zip(coefficients, functions, strict=True))
    return terms[0] if len(terms) == 1 else _keyed(kind="sum", args=terms)


def of_op(op: Op, args: Sequence[Formula], casts: Sequence[Any]) -> Formula:
    """An operation of the trace, applied to functions; `casts` are the dtypes that it takes."""
    return _keyed(kind="op", op=op, args=tuple(args), casts=tuple(casts))


def slope(op: Op, args: Sequence[Formula], casts: Sequence[Any], which: int) -> Formula:
    """The derivative of an operation in one of its arguments, as JAX has it, where the others are functions too."""
    return _keyed(kind="slope", op=op, args=tuple(args), casts=tuple(casts), which=which)


_rules: dict[Any, Program | None] = {}


def slope_by_rule(call: Op, args: Sequence[Formula], avals: Sequence[Any], which: int) -> Formula | None:
    """The derivative of a call with a rule of its own, where that is elementwise: relu's is 0 at 0.

    Args:
      call: a step of the program with a custom derivative.
      args: its arguments.
      avals: their shapes and dtypes.
      which: the argument that is varied.
    """
    key = (jaxprs.signature(call), tuple((a.shape, str(a.dtype)) for a in avals), which)
    if key not in _rules:

        def along(*xs: Any) -> Any:
            def one(x: Any) -> Any:
                return running.bind(call, [*xs[:which], x, *xs[which + 1 :]])[0]

            return jax.jvp(one, (xs[which],), (jnp.ones_like(xs[which]),))[1]

        try:
            closed, _ = jaxprs.jaxpr_of(along, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
            _rules[key] = jaxprs.flatten(closed)
        except Exception:  # a rule that does not go through here: its body's derivative is taken
            _rules[key] = None
    program = _rules[key]
    return _formula_of(program, args) if program is not None else None


def _formula_of(program: Program, args: Sequence[Formula]) -> Formula | None:
    env = dict(zip(program.inputs, args, strict=True))
    env |= {v: constant(float(c)) for v, c in program.constants.items() if np.ndim(c) == 0}
    for op in program.ops:
        if any(v not in env for v in op.inputs):
            return None
        if op.primitive is p.broadcast_in_dim_p and env[op.inputs[0]].kind == "constant":
            env[op.outputs[0]] = env[op.inputs[0]]
        elif is_elementwise(op.primitive):
            env[op.outputs[0]] = _simple(op, [env[v] for v in op.inputs], [program.dtype(v) for v in op.inputs])
        else:
            return None
    return env.get(program.outputs[0])


def evaluate(formula: Formula, x: np.ndarray) -> np.ndarray:
    """f(x) in float64, entry by entry."""
    flat = np.asarray(x, np.float64).ravel()
    found = []
    at = 0
    with jax.enable_x64(True), np.errstate(all="ignore"):
        while at < flat.size:
            size = next((s for s in _SIZES if s >= flat.size - at), _SIZES[-1])
            part = flat[at : at + size]
            padded = np.full(size, part[0])
            padded[: part.size] = part
            found.append(np.asarray(_evaluate(formula, padded, {}), np.float64)[: part.size])
            at += size
    return np.concatenate(found).reshape(np.shape(x)) if found else np.zeros(np.shape(x))


_numbers: dict[Any, tuple[float, ...]] = {}


def at(formula: Formula, *x: float) -> tuple[float, ...]:
    """f at some numbers; kept, as equal functions stand in many layers."""
    key = formula.key, x
    if key not in _numbers:
        _numbers[key] = tuple(map(float, evaluate(formula, np.array(x))))
    return _numbers[key]


def _evaluate(formula: Formula, x: np.ndarray, memo: dict[int, Any]) -> Any:
    if formula.key in memo:
        return memo[formula.key]
    match formula.kind:
        case "x":
            found: Any = x
        case "constant":
            found = np.full(x.shape, formula.value)
        case "product":
            left, right = (np.asarray(_evaluate(a, x, memo), np.float64) for a in formula.args)
            found = left * right
        case "sum":
            found = sum(np.asarray(_evaluate(a, x, memo), np.float64) for a in formula.args)
        case _:
            args = [_cast(_evaluate(a, x, memo), d) for a, d in zip(formula.args, formula.casts, strict=True)]
            assert formula.op is not None
            op = formula.op
            if op.primitive is p.convert_element_type_p:
                new = op.params["new_dtype"]
                found = _cast(np.trunc(args[0]) if _whole(new) else args[0], new)
            elif formula.kind == "op":
                found = running.bind(op, args)[0]
            else:
                which = formula.which

                def along(one: Any) -> Any:
                    return running.bind(op, [*args[:which], one, *args[which + 1 :]])[0]

                found = jax.jvp(along, (args[which],), (np.ones(x.shape),))[1]
    memo[formula.key] = found
    return found


def _cast(value: Any, dtype: Any) -> Any:
    wide = np.float64 if jnp.issubdtype(dtype, jnp.floating) else dtype
    return value if value.dtype == wide else np.asarray(value).astype(wide)


def _whole(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.integer))


@dataclasses.dataclass(frozen=True, eq=False)
class Quantile:
    """A distribution of mean 0 and variance 1, as a rising function t(z) of a standard normal; the Gaussian is None."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # where t begins, and where it ends (an atom)
    reach: float  # largest |t|
    zero: float | None = None  # the t of entries that are exactly zero, where these have a share

    def values(self, mean: Any, deviation: Any, z: np.ndarray) -> np.ndarray:
        """mean + deviation t(z), zero where it is that exactly."""
        t = self.forward(z)
        x = mean + deviation * t
        return x if self.zero is None else np.where(t == self.zero, 0.0, x)

    @functools.cached_property
    def mirrored(self) -> Quantile:
        """Of the negative of a value."""

        def inverse(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            low, high = self.inverse(-t)
            return -high, -low

        return Quantile(lambda z: -self.forward(-z), inverse, self.reach, None if self.zero is None else -self.zero)

    @staticmethod
    def of_samples(samples: np.ndarray, weights: np.ndarray | None = None) -> Quantile | None:
        """From draws; None where they are all the same."""
        order = np.argsort(samples, kind="stable")
        x = samples[order]
        first = int(np.searchsorted(x, 0.0))
        atom = np.searchsorted(x, 0.0, "right") - first > 8
        w = np.full(x.size, 1.0 / x.size) if weights is None else weights[order] / weights.sum()
        mean = w @ x
        deviation = math.sqrt(max(float(w @ (x - mean) ** 2), 0.0))
        if not deviation > 1e-12 * max(abs(mean), 1e-300):
            return None
        x = (x - mean) / deviation
        level = np.cumsum(w) - w / 2
        z = special.ndtri(np.clip(level, 1e-18, 1 - 1e-16))
        near = 1e-9 * max(abs(x[0]), abs(x[-1]))

        def inverse(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            low = np.searchsorted(x, at - near)
            high = np.searchsorted(x, at + near, "right") - 1
            between = np.interp(at, x, z)
            atom = high > low
            return np.where(atom, z[np.minimum(low, z.size - 1)], between), np.where(atom, z[high], between)

        reach = float(max(abs(x[0]), abs(x[-1])))
        return Quantile(lambda at: np.interp(at, z, x), inverse, reach, float(x[first]) if atom else None)

    @staticmethod
    @functools.lru_cache(4096)
    def of_chance(p: float) -> Quantile | None:
        """Of a truth value that is true with a chance; None where it is certain."""
        if not 0 < p < 1:
            return None
        low, high, edge = -math.sqrt(p / (1 - p)), math.sqrt((1 - p) / p), float(special.ndtri(1 - p))

        def inverse(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            at = np.full(np.shape(t), edge)
            return at, at

        return Quantile(lambda z: np.where(z < edge, low, high), inverse, max(-low, high), low)

    @staticmethod
    def positive(ratio: float) -> Quantile | None:
        """Log-normal, of a positive value whose deviation is at most `ratio` of its mean; None where it is certain."""
        return _lognormal(math.ceil(ratio * 1000) / 1000) if 0 < ratio < 1e6 else None

    @staticmethod
    @functools.cache
    def uniform() -> Quantile:
        """The uniform distribution on [-sqrt(3), sqrt(3)]."""
        width = math.sqrt(12.0)
        return Quantile(
            lambda z: (np.clip(special.ndtr(z), 2.0**-24, 1 - 2.0**-24) - 0.5) * width,  # as float32 has it
            lambda t: (special.ndtri(np.clip(t / width + 0.5, 1e-18, 1 - 1e-16)),) * 2,
            math.sqrt(3.0),
        )


@functools.lru_cache(4096)
def _lognormal(ratio: float) -> Quantile:
    variance = math.log1p(ratio**2)  # of the logarithm
    sigma = math.sqrt(variance)

    def inverse(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = (np.log(np.maximum(1 + ratio * t, 1e-300)) + variance / 2) / sigma
        return at, at

    return Quantile(lambda z: np.expm1(sigma * z - variance / 2) / ratio, inverse, math.expm1(_REACH * sigma) / ratio)


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1], and the matrix that gives a function's Legendre coefficients from its nodes."""
    x, w = np.polynomial.legendre.leggauss(_NODES)
    basis = np.polynomial.legendre.legvander(x, _NODES - 1)
    return x, w, (basis * w[:, None]).T * (np.arange(_NODES) + 0.5)[:, None]


_bends: dict[tuple[int, int], np.ndarray] = {}
_kinks: dict[int, list[float]] = {}


def bends(formula: Formula, reach: float) -> np.ndarray:
    """Where to cut [-reach, reach] so that a function is smooth between: its kinks and jumps, and where it is steep."""
    exponent = max(-60, min(60, math.ceil(math.log2(max(reach, 1e-18)))))
    if (formula.key, exponent) in _bends:
        return _bends[formula.key, exponent]
    if formula.kind in ("x", "constant"):
        return np.zeros(0)
    top = 2.0**exponent
    nodes, _, transform = _legendre()
    inner = (np.arange(64) - 31.5 + math.sqrt(2) / 8) / 33 * top  # no kink at a round number is hidden by an edge
    grid = np.concatenate([[-top], inner, [0.0, top]])
    grid.sort()
    kinks = _kinks.setdefault(formula.key, [])
    for _ in range(8):
        edges = np.unique(np.concatenate([grid, [k for k in kinks if abs(k) < top]]))
        low, high = edges[:-1], edges[1:]
        kept: list[float] = list(edges)
        floor, new = 0.0, []
        for level in range(60):
            middle, half = (low + high) / 2, (high - low) / 2
            values = evaluate(formula, middle[:, None] + half[:, None] * nodes)
            values = np.where(np.isfinite(values), values, 0.0)
            c = np.abs(values @ transform.T)
            largest = c.max(1)
            floor = max(floor, 1e-14 * float(np.median(largest))) if level == 0 else floor
            rough = (c[:, -3:].max(1) > 1e-9 * largest) & (c[:, -3:].max(1) > floor)
            small = half < 1e-11 * np.maximum(np.abs(middle), top * 2.0**-40)
            new += [float(m) for m in middle[rough & small]]
            low, high, middle = low[rough & ~small], high[rough & ~small], middle[rough & ~small]
            if not low.size or low.size > 2000:
                break
            kept += list(middle)
            low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
        if not new:
            break
        for k in new:
            nice = round(k, 8)
            k = nice if abs(k - nice) < 1e-9 else k
            if all(abs(k - old) > 1e-9 * max(1.0, abs(k)) for old in kinks):
                kinks.append(k)
    found = np.unique(np.concatenate([np.setdiff1d(kept, grid), [k for k in kinks if abs(k) < top], [0.0]]))
    if found.size > 400:  # rough everywhere: rounded to whole numbers, an oscillation
        found = found[:: found.size // 400 + 1]
    _bends[formula.key, exponent] = found
    return found


@dataclasses.dataclass(frozen=True)
class Expansion:
    """Functions at some (mean, deviation): `coefficients[f, row, k]` and `products[f, g, row]` = E f g."""

    coefficients: np.ndarray
    products: np.ndarray


_expansions: dict[Any, Any] = {}
_MOST_ROWS = 96


def expand(
    functions: Sequence[Formula], mean: np.ndarray, deviation: np.ndarray, quantile: Quantile | None = None
) -> Expansion:
    """Hermite coefficients and second moments of functions of x = mean + deviation t(z), row by row.

    Args:
      functions: of x.
      mean: of x, one for each row.
      deviation: standard deviation of x, likewise.
      quantile: t; the identity where it is None.
    """
    mean, deviation = np.asarray(mean, np.float64), np.asarray(deviation, np.float64)
    if quantile is None and mean.size == 1:
        key = (tuple(f.key for f in functions), float(f"{mean[0]:.12g}"), float(f"{deviation[0]:.12g}"))
        if key not in _expansions:
            if len(_expansions) > 20000:
                _expansions.clear()
            _expansions[key] = _expand(functions, mean, deviation, None)
        return _expansions[key]
    if mean.size <= _MOST_ROWS:
        return _expand(functions, mean, deviation, quantile)
    parts = [
        _expand(functions, mean[k : k + _MOST_ROWS], deviation[k : k + _MOST_ROWS], quantile)
        for k in range(0, mean.size, _MOST_ROWS)
    ]
    return Expansion(np.concatenate([e.coefficients for e in parts], 1), np.concatenate([e.products for e in parts], 2))


def _expand(
    functions: Sequence[Formula], mean: np.ndarray, deviation: np.ndarray, quantile: Quantile | None
) -> Expansion:
    nodes, weights, _ = _legendre()
    far = _REACH if quantile is None else quantile.reach
    reach = float(np.max(np.abs(mean) + far * deviation))
    cuts = np.unique(np.concatenate([bends(f, reach) for f in functions])) if reach > 0 else np.zeros(0)
    at = (cuts[None, :] - mean[:, None]) / np.maximum(deviation, 1e-300)[:, None]
    if quantile is not None:
        if quantile.zero is not None:
            at[:, cuts == 0] = quantile.zero
        at = np.concatenate(quantile.inverse(at), 1)
    grid = np.broadcast_to(np.linspace(-_REACH, _REACH, _PANELS + 1), (mean.size, _PANELS + 1))
    edges = np.sort(np.concatenate([grid, np.clip(at, -_REACH, _REACH)], 1), 1)
    used = (edges[:, 1:] - edges[:, :-1]).max(0) > 0  # panels of no width in every row are left out
    middle, half = (edges[:, 1:] + edges[:, :-1])[:, used] / 2, (edges[:, 1:] - edges[:, :-1])[:, used] / 2
    z = (middle[..., None] + half[..., None] * nodes).reshape(mean.size, -1)
    w = (half[..., None] * weights).reshape(mean.size, -1) * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    if quantile is None:
        x = mean[:, None] + deviation[:, None] * z
    else:
        x = quantile.values(mean[:, None], deviation[:, None], z)
    values = np.stack([evaluate(f, x) for f in functions])
    values = np.where(w > 0, values, 0.0)
    products = np.einsum("frn,grn,rn->fgr", values, values, w)
    coefficients = np.empty((len(functions), mean.size, ORDER + 1))
    before, now = np.zeros_like(z), np.ones_like(z)
    for k in range(ORDER + 1):  # normalized Hermite polynomials, their weight in w
        coefficients[:, :, k] = np.einsum("frn,rn->fr", values, w * now)
        before, now = now, (z * now - math.sqrt(k) * before) / math.sqrt(k + 1)
    return Expansion(coefficients, products)


def paired(expansion: Expansion, f: int, g: int, row: np.ndarray, other: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """E f(x) g(y) for Gaussian pairs of a correlation: sum_k a_k b_k rho^k, half of it with f and g exchanged.

    Args:
      expansion: of the functions.
      f: number of the first.
      g: number of the second.
      row: the row of x, for each pair.
      other: the row of y.
      rho: the correlation of the normals behind them.
    """
    a, b = expansion.coefficients[f], expansion.coefficients[g]
    rest = expansion.products[f, g] - (a * b).sum(-1)
    both = (a[row] * b[other] + a[other] * b[row]) / 2
    found = both[:, ORDER]
    for k in range(ORDER - 1, -1, -1):
        found = found * rho + both[:, k]
    return found + (rest[row] + rest[other]) / 2 * np.abs(rho) ** (1.5 * ORDER)


def latent(quantile: Quantile | None, rho: np.ndarray) -> np.ndarray:
    """The correlation of the normals behind two values of correlation rho."""
    if quantile is None:
        return rho
    key = id(quantile)
    if key not in _latent:
        a = _expand([X], np.zeros(1), np.ones(1), quantile)
        grid = np.linspace(-1.0, 1.0, 401)
        row = np.zeros(grid.size, int)
        image = paired(a, 0, 0, row, row, grid)
        _latent[key] = (quantile, grid, np.maximum.accumulate(image / image[-1]))
    _, grid, image = _latent[key]
    return np.interp(rho, image, grid)


_latent: dict[int, tuple[Quantile, np.ndarray, np.ndarray]] = {}


def gauss_hermite(function: Callable[[Any], Any], mean: float = 0.0, std: float = 1.0) -> tuple[float, float, float]:
    """(E f(x), E f(x)^2, E f'(x)^2) for x ~ N(mean, std^2), of any elementwise function, to 1e-7 and better.

    Args:
      function: of an array, entry by entry; traced by JAX, kinks and jumps allowed.
      mean: of x.
      std: of x.

    Returns:
      The three expectations.

    Raises:
      ValueError: the function is not elementwise, or takes or returns anything but one array.

    Example:
      >>> import jax
      >>> [round(e, 7) for e in gauss_hermite(jax.nn.relu)]
      [0.3989423, 0.5, 0.5]
    """
    closed, shape = jaxprs.jaxpr_of(function, jax.ShapeDtypeStruct((3,), jnp.float32))
    if getattr(shape, "shape", None) != (3,):
        raise ValueError(f"function={function!r} gives {shape}, not one number for each of its argument.")
    program = jaxprs.flatten(closed)
    env: dict[int, tuple[Formula, Formula]] = {program.inputs[0]: (X, constant(1.0))}
    env |= {v: (constant(float(c)), constant(0.0)) for v, c in program.constants.items() if np.ndim(c) == 0}
    for op in program.ops:
        if op.primitive is p.broadcast_in_dim_p and env[op.inputs[0]][0].kind == "constant":
            env[op.outputs[0]] = env[op.inputs[0]]
        elif not is_elementwise(op.primitive) or any(v not in env for v in op.inputs):
            raise ValueError(f"function={function!r} is not elementwise: it holds `{op.name}`.")
        else:
            args, inner = [env[v][0] for v in op.inputs], [env[v][1] for v in op.inputs]
            casts = [program.dtype(v) for v in op.inputs]
            env[op.outputs[0]] = _simple(op, args, casts), derivative(op, args, inner, casts)
    f, d = env[program.outputs[0]]
    e = expand([f, d], np.array([mean]), np.array([std]))
    return float(e.coefficients[0, 0, 0]), float(e.products[0, 0, 0]), float(e.products[1, 1, 0])


def _simple(op: Op, args: Sequence[Formula], casts: Sequence[Any]) -> Formula:
    if op.primitive in (p.copy_p, p.stop_gradient_p, p.name_p, IDENTITY, p.reduce_precision_p):
        return args[0]
    if op.primitive is p.convert_element_type_p and jnp.issubdtype(op.params["new_dtype"], jnp.floating):
        return args[0]
    return of_op(op, args, casts)


def derivative(op: Op, args: Sequence[Formula], inner: Sequence[Formula], casts: Sequence[Any]) -> Formula:
    """d/dx of an operation whose arguments have the derivatives `inner`."""
    if op.primitive in FLAT:
        return constant(0.0)
    if op.primitive in (p.copy_p, p.name_p, IDENTITY, p.reduce_precision_p):
        return inner[0]
    if op.primitive is p.convert_element_type_p:
        floating = all(jnp.issubdtype(d, jnp.floating) for d in (casts[0], op.params["new_dtype"]))
        return inner[0] if floating else constant(0.0)
    terms = [
        product(slope(op, args, casts, k), d) for k, d in enumerate(inner)
        if not (d.kind == "constant" and d.value == 0.0) and jnp.issubdtype(casts[k], jnp.floating)
    ]  # fmt: skip
    return weighted([1.0] * len(terms), terms) if terms else constant(0.0)


# Elementwise operations; those whose derivative is zero wherever it is defined.
FLAT = frozenset({
    p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p, p.and_p, p.or_p, p.not_p, p.xor_p, p.is_finite_p, p.sign_p,
    p.floor_p, p.ceil_p, p.round_p, p.stop_gradient_p, p.eq_to_p, p.lt_to_p, p.le_to_p,
})  # fmt: skip
SMOOTH = frozenset({
    p.add_p, p.sub_p, p.mul_p, p.div_p, p.neg_p, p.convert_element_type_p, p.copy_p, p.select_n_p, p.name_p,
    p.reduce_precision_p, IDENTITY, p.max_p, p.min_p, p.clamp_p, p.tanh_p, p.logistic_p, p.exp_p, p.exp2_p,
    p.expm1_p, p.log_p, p.log1p_p, p.erf_p, p.erfc_p, p.erf_inv_p, p.abs_p, p.square_p, p.sqrt_p, p.rsqrt_p, p.cbrt_p,
    p.integer_pow_p, p.pow_p, p.sin_p, p.cos_p, p.tan_p, p.sinh_p, p.cosh_p, p.asin_p, p.acos_p, p.atan_p, p.asinh_p,
    p.acosh_p, p.atanh_p, p.lgamma_p, p.digamma_p, p.atan2_p, p.nextafter_p, p.rem_p, p.add_jaxvals_p, jaxprs.LOG2,
})  # fmt: skip


def is_elementwise(primitive: Any) -> bool:
    """Whether an operation works entry by entry."""
    return primitive in FLAT or primitive in SMOOTH
