"""Complex numbers, as pairs of real values.

A function of complex numbers is one of their parts, written down in JAX and evaluated in the same domain: so products,
quotients, exponentials and contractions need no rule of their own, and what is linear is done to both parts. Only a
Fourier transform is not written so: it is a linear map along an axis (`linear`), of cosines and sines.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fixup_init import jaxprs, running
from fixup_init.jaxprs import p
from fixup_init.moments.combining import combined
from fixup_init.moments.elementwise import of_two
from fixup_init.moments.environment import Environment, NoRule
from fixup_init.moments.linear import Matrix, linear
from fixup_init.moments.values import Value, known, ones, unit
from fixup_init.program import CARRY_IN, CARRY_OUT, CHOOSE, IDENTITY, SLICE_IN, Op

Pair = tuple[Any, Any]  # the real and the imaginary part


def _power(y: int, a: Pair) -> Pair:
    found = a
    for _ in range(abs(y) - 1):
        found = _times(found, a)
    return found if y > 0 else _over((1.0, 0.0), found)


def _times(x: Pair, y: Pair) -> Pair:
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def _over(x: Pair, y: Pair) -> Pair:
    size = y[0] * y[0] + y[1] * y[1]
    above = _times(x, (y[0], -y[1]))
    return above[0] / size, above[1] / size


def _modulus(x: Pair) -> Any:
    return jnp.sqrt(x[0] * x[0] + x[1] * x[1])


def _exp(x: Pair) -> Pair:
    size = jnp.exp(x[0])
    return size * jnp.cos(x[1]), size * jnp.sin(x[1])


# What is done to both parts alike.
_ALIKE = frozenset({
    p.transpose_p, p.reshape_p, p.squeeze_p, p.broadcast_in_dim_p, p.slice_p, p.dynamic_slice_p, p.rev_p,
    p.concatenate_p, p.pad_p, p.reduce_sum_p, p.cumsum_p, p.gather_p, p.select_n_p, p.neg_p, p.add_p, p.sub_p,
    p.add_jaxvals_p, p.copy_p, p.stop_gradient_p, p.name_p, p.dynamic_update_slice_p, p.scatter_p, p.scatter_add_p,
    jaxprs.SPLIT, jaxprs.TILE, jaxprs.STACK, IDENTITY, CHOOSE, SLICE_IN,
})  # fmt: skip
_SAME = frozenset({CARRY_IN, CARRY_OUT})


def concerns(env: Environment, op: Op, args: Sequence[Value]) -> bool:
    """Whether an operation takes or gives complex numbers."""
    return any(jnp.issubdtype(env.program.dtype(v), jnp.complexfloating) for v in (*op.inputs, *op.outputs))


def imaginary(value: Value) -> Value:
    """The imaginary part, 0 where there is none."""
    return value.imaginary if value.imaginary is not None else known(value.shape, np.zeros((1,) * value.rank))


def of_parts(real: Value, imaginary: Value) -> Value:
    """A complex value; its notes are those of both parts."""
    return dataclasses.replace(real, imaginary=imaginary, array=None, notes=real.notes | imaginary.notes)


def complex_operation(
    env: Environment, op: Op, args: list[Value], apply: Callable[[Op, list[Value]], list[Value]],
    composed: Callable[[Any, Callable[..., Any], list[Value]], list[Value]],
) -> list[Value]:  # fmt: skip
    """The results of an operation that takes or gives complex numbers.

    Args:
      env: the values of the program.
      op: the operation.
      args: its arguments.
      apply: evaluates an operation on real values.
      composed: evaluates a JAX function of real arrays on values; its first argument names the function.
    """
    primitive: Any = op.primitive
    bad = next((a for a in args if a.unknown), None)
    if bad is not None and primitive is not CHOOSE:
        return [Value(env.program.shape(v), unknown=bad.unknown) for v in op.outputs]
    real = [dataclasses.replace(a, imaginary=None, array=None if a.imaginary is not None else a.array) for a in args]
    if primitive in _SAME:
        return [args[0]]
    if primitive is p.real_p:
        return [real[0]]
    if primitive is p.imag_p:
        return [imaginary(args[0])]
    if primitive is p.complex_p:
        return [of_parts(args[0], args[1])]
    if primitive is p.conj_p:
        return [of_parts(real[0], combined(real[0].shape, [(imaginary(args[0]), [(-ones(real[0].rank), {})])]))]
    if primitive is p.convert_element_type_p:
        new = jnp.issubdtype(op.params["new_dtype"], jnp.complexfloating)
        return [args[0] if new else real[0]]
    if primitive is p.fft_p:
        made = _transformed(env, op, args[0])
        return [dataclasses.replace(made, notes=made.notes | {FREQUENCIES})]
    parted = [jnp.issubdtype(env.program.dtype(v), jnp.inexact) for v in op.inputs]
    if primitive in _ALIKE:
        other = [imaginary(a) if part else a for a, part in zip(args, parted, strict=True)]
        return [of_parts(a, b) for a, b in zip(apply(op, real), apply(op, other), strict=True)]
    if primitive is p.abs_p and not imaginary(args[0]).is_constant:
        both = [real[0], imaginary(args[0])]
        for a in both:
            env.collapse(a)
        if not any(a.is_constant for a in both):
            return [of_two(env, lambda x, y: _modulus((x, y)), both, real[0].shape)]
    function = _written(op)
    if function is None:
        raise NoRule(f"no rule for `{op.name}` of complex numbers")
    parts = [part for a, r in zip(args, real, strict=True) for part in (r, imaginary(a))]
    made = composed((jaxprs.signature(op), tuple(a.shape for a in args)), function, parts)
    return [made[0]] if len(made) == 1 else [of_parts(*made)]


def _written(op: Op) -> Callable[..., Any] | None:
    """An operation as a function of the parts of its arguments."""
    primitive: Any = op.primitive

    def pairs(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *parts: function(*zip(parts[::2], parts[1::2], strict=True))

    if primitive in (p.dot_general_p, p.conv_general_dilated_p):
        real = dataclasses.replace(op, params={**op.params, "preferred_element_type": None})

        def bilinear(x: Pair, y: Pair) -> Pair:
            def of(a: Any, b: Any) -> Any:
                return running.bind(real, [a, b])[0]

            return of(x[0], y[0]) - of(x[1], y[1]), of(x[0], y[1]) + of(x[1], y[0])

        return pairs(bilinear)
    if primitive is p.integer_pow_p and op.params["y"] != 0:
        return pairs(functools.partial(_power, op.params["y"]))
    functions: dict[Any, Callable[..., Any]] = {
        p.mul_p: _times,
        p.div_p: _over,
        p.square_p: lambda x: _times(x, x),
        p.exp_p: _exp,
        p.abs_p: _modulus,
        p.log_p: lambda x: (jnp.log(_modulus(x)), jnp.arctan2(x[1], x[0])),
    }
    return pairs(functions[primitive]) if primitive in functions else None


@functools.lru_cache(256)
def _waves(n: int, out: int, scale: float) -> tuple[Matrix, Matrix]:
    """Cosines and sines, rows for frequencies."""
    angle = 2 * math.pi / n * np.outer(np.arange(out), np.arange(n))
    return Matrix(scale * np.cos(angle)), Matrix(scale * np.sin(angle))


@functools.lru_cache(256)
def _inverse_waves(n: int, given: int) -> tuple[Matrix, Matrix]:
    """Of real values from half of their frequencies: those in between stand for two."""
    twice = np.where((np.arange(given) == 0) | (2 * np.arange(given) == n), 1.0, 2.0) / n
    angle = 2 * math.pi / n * np.outer(np.arange(n), np.arange(given))
    return Matrix(np.cos(angle) * twice), Matrix(-np.sin(angle) * twice)


FREQUENCIES = "approximate: entries are taken as exchangeable before a Fourier transform, its parts as independent"
_LONGEST = 2048


def _transformed(env: Environment, op: Op, value: Value) -> Value:
    """The transform along the last axes, one after the other."""
    lengths = tuple(op.params["fft_lengths"])
    kind = str(getattr(op.params["fft_type"], "name", op.params["fft_type"])).upper()
    if max(lengths) > _LONGEST:
        raise NoRule(f"no rule for `fft` of more than {_LONGEST} entries")
    rank, real = value.rank, kind in ("RFFT", "IRFFT")
    axes = [rank - len(lengths) + k for k in range(len(lengths))]
    inverse = kind in ("IFFT", "IRFFT")
    parts: tuple[Value, Value | None] = dataclasses.replace(value, imaginary=None), value.imaginary
    order = axes if inverse else axes[::-1]  # the halved axis is the last, first on the way there, last on the way back
    for a in order:
        n = lengths[a - axes[0]]
        halved = real and a == axes[-1]
        if halved and inverse:
            cosines, sines = _inverse_waves(n, value.shape[a])
            shape = tuple(n if b == a else s for b, s in enumerate(parts[0].shape))
            made = [linear(env, parts[0], a, cosines)]
            made += [linear(env, parts[1], a, sines)] if parts[1] is not None else []
            return combined(shape, [(x, unit(rank)) for x in made])
        cosines, sines = _waves(n, n // 2 + 1 if halved else n, 1 / n if inverse else 1.0)
        parts = _rotated(env, parts, a, cosines, sines, -1.0 if inverse else 1.0)
    return of_parts(parts[0], parts[1] if parts[1] is not None else imaginary(parts[0]))


def _rotated(
    env: Environment, parts: tuple[Value, Value | None], axis: int, cosines: Matrix, sines: Matrix, sign: float
) -> tuple[Value, Value]:
    """(C - i sign S)(x + i y) along an axis."""
    x, y = parts
    one = unit(x.rank)
    shape = tuple(len(cosines.dense) if b == axis else s for b, s in enumerate(x.shape))
    real, other = [(linear(env, x, axis, cosines), one)], [(linear(env, x, axis, sines), [(-sign * ones(x.rank), {})])]
    if y is not None and (y.terms or not y.is_constant):
        real.append((linear(env, y, axis, sines), [(sign * ones(x.rank), {})]))
        other.append((linear(env, y, axis, cosines), one))
    return combined(shape, real), combined(shape, other)
