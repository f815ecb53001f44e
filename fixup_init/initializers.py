"""Fixup in the convention of `jax.nn.initializers`, for a model whose author writes `kernel_init=` by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from fixup_init.schemes.fixup import factor

__all__ = ["fixup"]


def fixup(
    num_branches: int,
    branch_depth: int = 2,
    *,
    last: bool = False,
    in_axis: int | Sequence[int] = -2,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
    dtype: Any = None,
) -> jax.nn.initializers.Initializer:
    """Fixup's initializer for a layer of a residual branch.

    std W = sqrt(2 / fan_out) L^(-1/(2m-2)) for all but the last layer of a branch, 0 for the last (Zhang et al. 2019,
    Sec. 3).

    Args:
      num_branches: L, residual branches of the network.
      branch_depth: m, weight layers in a branch.
      last: whether this is the last layer of its branch.
      in_axis: input axes of the kernel.
      out_axis: output axes of the kernel.
      batch_axis: axes that are neither, such as that of stacked layers.
      dtype: default dtype of the drawn array.

    Returns:
      `init(key, shape, dtype) -> array`.

    Raises:
      ValueError: L < 1, or m < 2 for a layer that is not the last.

    Example:
      >>> import jax, fixup_init as fi
      >>> first = fi.initializers.fixup(num_branches=54, branch_depth=2)
      >>> w = first(jax.random.key(0), (3, 3, 64, 64))
      >>> round(float(w.std() / (2 / (9 * 64)) ** 0.5 * 54**0.5), 2)
      1.0
    """
    if last:
        if num_branches < 1 or branch_depth < 1:
            raise ValueError(
                f"num_branches={num_branches!r}, branch_depth={branch_depth!r}: expected both to be at least 1."
            )
        return jax.nn.initializers.zeros
    variance = 2.0 * factor(num_branches, branch_depth) ** 2
    return jax.nn.initializers.variance_scaling(variance, "fan_out", "normal", in_axis, out_axis, batch_axis, dtype)
