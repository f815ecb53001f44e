"""The learning rates that belong to a scheme, as an optax transform."""

from __future__ import annotations

from typing import Any

import jax
import optax

from fixup_init.frameworks.application import path_of
from fixup_init.plan import Plan

__all__ = ["optimizer", "scale_by_plan"]


def optimizer(tx: optax.GradientTransformation, plan: Plan) -> optax.GradientTransformation:
    """An optimizer whose learning rate follows a plan, leaf by leaf.

    The update of each leaf is multiplied by `plan[path].rate`: under Fixup biases and multipliers learn at a tenth of
    the rate (Zhang et al. 2019, Sec. 4), weight decay included, as separate parameter groups would.

    Args:
      tx: any optax optimizer, its learning rate included.
      plan: of `fi.plan` for the same model.

    Returns:
      An optax transform over the tree of parameters (in Linen, `variables["params"]`).

    Raises:
      ValueError: when it is initialized with a tree whose paths are not the plan's.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fixup_init as fi
      >>> from fixup_init.models.resnet import cifar_resnet
      >>> model, x = cifar_resnet(20, norm="fixup"), jnp.zeros((1, 32, 32, 3))
      >>> tx = fi.optimizer(optax.sgd(0.1, momentum=0.9), fi.plan(model, x))
      >>> params = fi.init(model, jax.random.key(0), x)["params"]
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> round(float(updates["bias1"][0]), 4), round(float(updates["conv1"]["kernel"][0, 0, 0, 0]), 4)
      (-0.01, -0.1)
    """
    return optax.chain(tx, scale_by_plan(plan))


def scale_by_plan(plan: Plan) -> optax.GradientTransformation:
    """Multiplies each update by its leaf's `rate`."""
    rates = {e.path: e.rate for e in plan.entries}

    def init(params: Any) -> optax.EmptyState:
        paths = {path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        if paths != set(rates):
            odd = sorted(paths ^ set(rates))
            raise ValueError(
                f"The parameters are not those of the plan: {len(odd)} paths are in one and not in the other, first "
                f"`{odd[0]}`. Give the tree that is trained (in Linen variables['params']) and the plan of that model."
            )
        return optax.EmptyState()

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, u: u * rates[path_of(path)], updates), state

    return optax.GradientTransformation(init, update)
