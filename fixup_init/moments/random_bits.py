"""Random keys and bits, on their way to the uniform numbers that initializers and dropout are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.environment import Environment, NoRule, Rule
from fixup_init.moments.values import Value, gaussian, known, of_source, unit
from fixup_init.program import Op
from fixup_init.quadrature import Quantile

_KEYS = frozenset({p.random_seed_p, p.random_split_p, p.random_fold_in_p})


def drawn(op: Op, shapes: Sequence[tuple[int, ...]]) -> list[Value] | None:
    """Keys, of which nothing is kept, and random bits: the share of the largest number that they are."""
    if op.primitive in _KEYS:
        return [known(s, np.zeros((1,) * len(s))) for s in shapes]
    if op.primitive is p.random_bits_p:
        value = of_source(gaussian(shapes[0], 1 / 12, 0.5, Quantile.uniform()))
        value.bits = True
        return [value]
    return None


def equally_likely(shape: tuple[int, ...], n: int) -> Value:
    """Equally likely whole numbers below n, as what is left of random bits."""
    value = of_source(gaussian(shape, max((n * n - 1) / 12, 1e-12), (n - 1) / 2, Quantile.uniform()))
    value.rows = n
    return value


def of_bits(op: Op, args: list[Value]) -> Value:
    """Random bits on their way to a uniform number in [1, 2), as JAX makes it."""
    a = next(a for a in args if a.bits)
    if op.primitive in (p.shift_right_logical_p, p.or_p, p.and_p, p.xor_p, p.convert_element_type_p):
        return dataclasses.replace(a, array=None)
    if op.primitive is p.rem_p and args[0] is a and (n := args[1].number) is not None and n >= 1:
        return equally_likely(a.shape, round(n))
    raise NoRule(f"no rule for `{op.name}` of random bits")


def bitcast(env: Environment, op: Op, args: list[Value]) -> Value:
    if not args[0].bits or not jnp.issubdtype(op.params["new_dtype"], jnp.floating):
        raise NoRule("no rule for `bitcast_convert_type`")
    terms = [*args[0].terms, *unit(args[0].rank)]
    return Value(args[0].shape, terms)


def shift(env: Environment, op: Op, args: list[Value]) -> Value:
    if not args[0].bits:
        raise NoRule(f"no rule for `{op.name}`")
    return of_bits(op, args)


RULES: dict[Any, Rule] = {
    p.bitcast_convert_type_p: bitcast,
    p.shift_right_logical_p: shift,
    p.shift_left_p: shift,
    p.shift_right_arithmetic_p: shift,
}
