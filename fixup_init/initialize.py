"""`fi.plan` and `fi.init`: a model, its inputs and a scheme -> a plan, and parameters drawn from it."""

from __future__ import annotations

from typing import Any

import jax

from fixup_init import schemes
from fixup_init.plan import Plan
from fixup_init.sample import sample, typed_key
from fixup_init.schemes import Scheme
from fixup_init.structure import of_trace
from fixup_init.tracing import Traced, trace

__all__ = ["draw", "init", "plan"]


def plan(model: Any, *args: Any, scheme: str | Scheme = "fixup", normalization: str = "kept", **kwargs: Any) -> Plan:
    """What each parameter of a model gets under a scheme, and why; nothing is allocated.

    Args:
      model: a Flax Linen module, a Flax NNX module or `fi.Function(apply, params)`.
      *args: the model's own arguments after the key, arrays or `jax.ShapeDtypeStruct`.
      scheme: a name (`fi.schemes.NAMES`) or a scheme object.
      normalization: "kept", or "removed" to plan for the model with every normalization bypassed.
      **kwargs: the model's own keyword arguments.

    Returns:
      A `Plan`, one entry for each parameter leaf.

    Raises:
      ValueError: the scheme is not known.
      ModelError: the model cannot be traced on these inputs.
      StructureError: the scheme depends on something that the graph leaves open.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> from fixup_init.models.resnet import cifar_resnet
      >>> plan = fi.plan(cifar_resnet(110, norm="fixup"), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
      >>> plan["layer1_0/conv1/kernel"].reason
      'branch 1 of 54, layer 1 of 2: He fan_out, sqrt(2/144) x L^(-1/2) = 54^(-1/2)'
    """
    found = schemes.find(scheme)
    return found.plan(of_trace(trace(model, args, kwargs, normalization)))


def init(
    model: Any,
    key: Any,
    *args: Any,
    scheme: str | Scheme | Plan = "fixup",
    normalization: str = "kept",
    **kwargs: Any,
) -> Any:
    """Initializes a model by a scheme: a drop-in for `model.init(key, *args, **kwargs)`.

    The model is traced, never run. Each leaf has a key of its own, derived from its path, so that adding a layer
    changes no other layer.

    Args:
      model: a Flax Linen module, a Flax NNX module or `fi.Function(apply, params)`.
      key: a random key; for Linen also the dictionary of keys that `model.init` takes, for NNX also `nnx.Rngs`.
      *args: the model's own arguments after the key; `jax.ShapeDtypeStruct` will do.
      scheme: a name, a scheme object or a `Plan`.
      normalization: as for `fi.plan`.
      **kwargs: the model's own keyword arguments.

    Returns:
      Linen: the variables, the same tree that `model.init` returns. NNX: the module, updated in place. `Function`:
      parameters.

    Raises:
      ValueError, ModelError, StructureError: as `fi.plan`; ValueError also where a given plan does not fit the model.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> from fixup_init.models.resnet import cifar_resnet
      >>> model = cifar_resnet(20, norm="fixup")
      >>> variables = fi.init(model, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> float(model.apply(variables, jnp.ones((1, 32, 32, 3))).std())
      0.0
    """
    traced = trace(model, args, kwargs, normalization)
    planned = scheme if isinstance(scheme, Plan) else schemes.find(scheme).plan(of_trace(traced))
    return traced.application.combine(*draw(traced, planned, typed_key(key)))


def draw(traced: Traced, planned: Plan, key: Any) -> tuple[Any, Any]:
    """(params, state) of a traced model, drawn from a plan."""
    application = traced.application
    leaves = traced.graph.leaves.values()
    paths = [leaf.path for leaf in leaves if leaf.kind == "param"]
    shapes = {leaf.path: (leaf.shape, str(leaf.dtype)) for leaf in leaves if leaf.kind == "param"}
    entries = {e.path: e for e in planned.entries}
    if set(entries) != set(paths):
        odd = sorted(set(entries) ^ set(paths))
        raise ValueError(
            f"The plan does not fit {application.name}: {len(odd)} paths are in one and not in the other, first "
            f"{odd[0]!r}. Make the plan with fi.plan on this model and these inputs."
        )
    for path, shape in shapes.items():
        if (entries[path].shape, entries[path].dtype) != shape:
            raise ValueError(
                f"The plan does not fit {application.name}: `{path}` is {entries[path].dtype}"
                f"{list(entries[path].shape)} in the plan and {shape[1]}{list(shape[0])} in the model. Make the plan "
                "with fi.plan on these inputs."
            )
    drawn = sample([entries[path] for path in paths], key)
    n_state = len(jax.tree.leaves(application.state))
    wanted = [entries[path].distribution == "model" for path in paths] + [True] * n_state
    own = application.initial(key, wanted) if any(wanted) else [None] * len(wanted)
    flat = [drawn[path] if path in drawn else own[k] for k, path in enumerate(paths)]
    params = jax.tree.unflatten(jax.tree.structure(application.params), flat)
    state = jax.tree.unflatten(jax.tree.structure(application.state), own[len(paths) :])
    return params, state
