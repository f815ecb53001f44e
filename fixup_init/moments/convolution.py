"""Convolutions: sums over windows of products with the entries of a kernel.

Independent weights let only pairs of the same tap count; a kernel whose taps are correlated adds the others. Borders
are held as profiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fixup_init.jaxprs import p
from fixup_init.moments.distributions import distribution
from fixup_init.moments.environment import Environment, NoRule, Rule
from fixup_init.moments.lattice import Lattice, joined, settled
from fixup_init.moments.neighbours import of_windows
from fixup_init.moments.polynomials import kin_of, moments_of
from fixup_init.moments.values import Layer, Source, Value
from fixup_init.moments.windows import Window
from fixup_init.program import Op


def conv(env: Environment, op: Op, args: list[Value]) -> Value:
    """A convolution, strided, dilated or in groups."""
    value, kernel = args
    numbers = op.params["dimension_numbers"]
    shape = env.program.shape(op.outputs[0])
    if op.params["batch_group_count"] != 1:
        raise NoRule("no rule for `conv_general_dilated` with groups of the batch")
    x_spec, k_spec, o_spec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    rank = len(shape)
    mean, second = moments_of(value)
    k_mean, k_second = moments_of(kernel)
    flat_kernel = k_second.mean(tuple(range(kernel.rank, 2 * kernel.rank)))
    n = kernel.shape[k_spec[1]]
    lattice = second.transpose(*x_spec, *(rank + a for a in x_spec))  # batch, channel, positions
    windows = [
        Window.of(value.shape[x_spec[2 + k]], shape[o_spec[2 + k]], kernel.shape[k_spec[2 + k]],
                   op.params["window_strides"][k], op.params["padding"][k][0], op.params["lhs_dilation"][k],
                   op.params["rhs_dilation"][k])
        for k in range(rank - 2)
    ]  # fmt: skip

    def moment(channels: int, taps: int, outputs: int) -> float:
        """E w w' of kernel entries that differ in these."""
        mask = [0] * kernel.rank
        mask[k_spec[0]], mask[k_spec[1]] = outputs, channels
        for a in k_spec[2:]:
            mask[a] = taps if kernel.shape[a] > 1 else 0
        return float(flat_kernel[tuple(mask)])

    def through(x: Lattice, step: Callable[[Window, Lattice, int, int], Lattice]) -> Lattice:
        for k, window in enumerate(windows):
            x = step(window, x, 2 + k, rank)
        return x

    near, far = np.take(lattice, 0, 1).mean(rank), np.take(lattice, 1, 1).mean(rank)

    def with_channel(x: Lattice) -> Lattice:
        return np.expand_dims(np.expand_dims(x, rank), 1)

    made = []
    for outputs in (0, 1):
        same_tap = n * moment(0, 0, outputs) * near + n * (n - 1) * moment(1, 0, outputs) * far
        found = through(with_channel(same_tap), Window.aligned)
        if any(w.taps > 1 for w in windows):
            other = n * moment(0, 1, outputs) * near + n * (n - 1) * moment(1, 1, outputs) * far
            scale = abs(moment(0, 0, 0)) * n
            if max(abs(moment(0, 1, outputs)) * n, abs(moment(1, 1, outputs)) * n * n) > 1e-12 * scale:
                everywhere = with_channel(other)[:, :, *(np.s_[1:2] if w.size > 1 else np.s_[0:1] for w in windows)]
                everywhere = everywhere.mean(tuple(rank + 2 + k for k in range(rank - 2)), keepdims=True)
                everything = np.ones((1, 1) + (2,) * (rank - 2) + (1,) * rank)
                pairs = through(everything, Window.any_taps) - through(everything, Window.aligned)
                found = found + everywhere * pairs
        made.append(found)
    new = joined(made[0], made[1], 1)
    new_mean = mean.transpose(x_spec).mean(1, keepdims=True) * n * float(k_mean.mean())
    for k, window in enumerate(windows):
        new_mean = window.counted(new_mean, 2 + k)
    turn_back = [o_spec.index(a) for a in range(rank)]
    new = new.transpose(*turn_back, *(rank + a for a in turn_back))
    new_mean = new_mean.transpose(turn_back)
    kin = frozenset() if any(env.weights(op)) and not new_mean.any() else kin_of(value.terms) | kin_of(kernel.terms)
    quantile = None if n * math.prod(w.taps for w in windows) >= 4 else distribution(value.terms)
    source = Source(shape, new_mean, settled(new, shape), quantile, kin)
    features = kernel.shape[k_spec[0]] // op.params["feature_group_count"]

    def back(cotangent: Lattice) -> Lattice:
        x = cotangent.transpose(*o_spec, *(rank + a for a in o_spec))
        one, two = np.take(x, 0, 1).mean(rank), np.take(x, 1, 1).mean(rank)
        parts = [
            with_channel(features * moment(k, 0, 0) * one + features * (features - 1) * moment(k, 0, 1) * two)
            for k in (0, 1)
        ]
        both = joined(*(through(part, Window.transposed) for part in parts), axis=1)
        turned = [x_spec.index(a) for a in range(rank)]
        return settled(both.transpose(*turned, *(rank + a for a in turned)), value.shape)

    def to_kernel(cotangent: Lattice) -> Lattice:
        """Not followed: entries of a kernel are not exchangeable as those of its input."""
        del cotangent
        return np.full((2,) * kernel.rank + (1,) * kernel.rank, math.nan)

    layer = None
    if env.weights(op)[1]:
        layer = Layer(kernel.shape[k_spec[0]], (o_spec[1],), n, n * math.prod(w.taps for w in windows),
                      kin_of(kernel.terms))  # fmt: skip
        source.uses = frozenset((w, id(op)) for w in layer.weights)
    notes = of_windows(value, windows, is_sum=layer is None)
    return env.made(source, [(value, back), (kernel, to_kernel)], notes, layer=layer)


RULES: dict[Any, Rule] = {
    p.conv_general_dilated_p: conv,
}
