"""`fi.analyze` and `fi.compare`: the measured drift of a model, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from fixup_init import frameworks, schemes
from fixup_init.frameworks import ModelError
from fixup_init.frameworks.application import path_of
from fixup_init.initialize import draw
from fixup_init.measurement import Loss, Probe, Progress, measure, prepare, run
from fixup_init.propagation import Comparison, Propagation
from fixup_init.sample import typed_key
from fixup_init.schemes import Scheme
from fixup_init.structure import of_trace
from fixup_init.tracing import Traced, check_normalization, trace, uncollected, without_normalization

__all__ = ["CASES", "analyze", "compare", "over_steps"]

# (scheme, normalization): normalized; the same with normalization taken out; and with Fixup instead.
CASES: tuple[tuple[str, str], ...] = (("model", "kept"), ("model", "removed"), ("fixup", "removed"))


@overload
def analyze(
    model: Any, variables: Any, *args: Any, normalization: str = ..., probe: Probe = ..., loss: Loss | None = ...,
    steps: None = None, optimizer: Any = ..., key: Any = ..., label: str | None = ..., progress: Progress | None = ...,
    **kwargs: Any,
) -> Propagation: ...  # fmt: skip


@overload
def analyze(
    model: Any, variables: Any, *args: Any, normalization: str = ..., probe: Probe = ..., loss: Loss | None = ...,
    steps: int, optimizer: Any, key: Any = ..., label: str | None = ..., progress: Progress | None = ...,
    **kwargs: Any,
) -> Comparison: ...  # fmt: skip


@uncollected()
def analyze(
    model: Any,
    variables: Any,
    *args: Any,
    normalization: str = "kept",
    probe: Probe = "auto",
    loss: Loss | None = None,
    steps: int | None = None,
    optimizer: Any = None,
    key: Any = None,
    label: str | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Propagation | Comparison:
    """Measures how a signal and its cotangent drift through a model.

    The forward pass runs on the given inputs; the backward pass starts from a standard normal probe instead of a loss,
    because a zero head makes every gradient of a loss zero. Both run block by block (`fixup_init.blocks`).

    Args:
      model: a Flax Linen module, a Flax NNX module or `fi.Function(apply, params)`.
      variables: what `fi.init` or `model.init` returned; for an NNX module or a `Function` None stands for its own.
      *args: the model's own arguments; a `jax.ShapeDtypeStruct` stands for standard normal data (floating) or uniform
        integers of that shape.
      normalization: "kept", "removed" to bypass every normalization, or "affine" to leave its scale and bias.
      probe: where the backward pass starts: "output", "head" (the input of the head) or "auto" (the input of the head
        where its kernel is zero, else the output).
      loss: a function from the model's result to one number; its gradient is the probe then.
      steps: how many updates to measure after as well. Their gradient is that of the loss, or of the probe at the
        output; the data stays the same.
      optimizer: the `optax.GradientTransformation` that makes the updates.
      key: for data, probe and the model's own noise (dropout); `jax.random.key(0)` by default.
      label: name of the result; the model's name by default.
      progress: called with (what, done, in all) as blocks finish.
      **kwargs: the model's own keyword arguments.

    Returns:
      A `Propagation`; with `steps` a `Comparison` of the model as it is ("step 0") and after each update.

    Raises:
      ModelError: the model cannot be traced on these inputs, the variables are not its own, or the loss fails.
      DataError: an input holds values that are not finite.
      ValueError: `steps` is negative, or without an optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> from fixup_init.models.resnet import cifar_resnet
      >>> model, x = cifar_resnet(20, norm="fixup"), jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
      >>> fi.analyze(model, fi.init(model, jax.random.key(0), x), x).drift("forward").verdict
      'flat'
    """
    check_normalization(normalization)
    if steps is not None and (steps < 0 or optimizer is None):
        raise ValueError(
            f"steps={steps!r} with optimizer={optimizer!r}: expected a number of updates, from 0, and an optax "
            "optimizer that makes them, such as optax.sgd(0.1)."
        )
    traced = without_normalization(trace(model, args, kwargs), normalization, run=True)
    if variables is None:
        n = len(jax.tree.leaves((traced.application.params, traced.application.state)))
        own = traced.application.initial(jax.random.key(0), [True] * n)
        tree = jax.tree.structure((traced.application.params, traced.application.state))
        params, state = jax.tree.unflatten(tree, own)
    else:
        params, state = _separate(traced, variables)
    key = typed_key(0 if key is None else key)
    label = label or traced.application.name
    if steps is None:
        return measure(traced, params, state, probe, key, label, progress, loss)
    return over_steps(traced, params, state, key, loss, steps, optimizer, progress)


def over_steps(
    traced: Traced, params: Any, state: Any, key: Any, loss: Loss | None, steps: int, optimizer: Any,
    progress: Progress | None,
) -> Comparison:  # fmt: skip
    import optax

    setup = prepare(traced, params, "output")
    moments = optimizer.init(params)
    measured = []
    for k in range(steps + 1):
        one, gradient = run(setup, params, state, key, f"step {k}", progress, loss, gradients=k < steps)
        measured.append(one)
        if k < steps:
            updates, moments = optimizer.update(gradient, moments, params)
            params = optax.apply_updates(params, updates)
    return Comparison(tuple(measured))


@uncollected()
def compare(
    model: Any,
    *args: Any,
    cases: Sequence[tuple[str | Scheme, str]] = CASES,
    key: Any = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Comparison:
    """Measures a model (or several) under several schemes, with normalization kept or removed, side by side.

    Every case draws its parameters from the same key, sees the same data and starts its backward pass at the input of
    the head, so that curves can be laid over each other.

    Args:
      model: a model, or a dictionary of label and model.
      *args: the model's own arguments, as for `fi.analyze`.
      cases: pairs (scheme, normalization); by default the model's own initialization with its normalization, the
        same without, and Fixup without. For a model without normalizations each scheme counts once.
      key: for parameters, data and probe; `jax.random.key(0)` by default.
      progress: called with (what, done, in all).
      **kwargs: the model's own keyword arguments.

    Returns:
      A `Comparison`; its labels are such as "model, kept" or "fixup, removed".

    Raises:
      ModelError, StructureError, DataError, ValueError: as `fi.init` and `fi.analyze`.
    """
    key = typed_key(0 if key is None else key)
    models = model if isinstance(model, Mapping) else {"": model}
    for _, normalization in cases:
        check_normalization(normalization)
    measured = []
    for name, one in models.items():
        kept = trace(one, args, kwargs)
        forms = {n: without_normalization(kept, n, run=True) for _, n in cases}
        wanted = [(schemes.find(scheme), normalization) for scheme, normalization in cases]
        if not kept.norms:  # nothing to remove: each scheme once
            wanted = list({scheme.name: (scheme, "kept") for scheme, _ in wanted}.values())
        for found, normalization in wanted:
            traced = forms[normalization] if kept.norms else kept
            params, state = draw(traced, found.plan(of_trace(traced)), key)
            label = ", ".join(s for s in (name, found.name, normalization if kept.norms else "") if s)
            measured.append(measure(traced, params, state, "head", key, label, progress))
    return Comparison(tuple(measured))


def _separate(traced: Traced, variables: Any) -> tuple[Any, Any]:
    """(params, state) of the user's variables, checked against what the model takes on these inputs."""
    application = traced.application
    try:
        params, state = application.separate(variables)
    except Exception as error:
        raise ModelError(
            f"variables={type(variables).__name__} are not those of {application.name}: {error}. Give what "
            "fi.init(model, key, *inputs) or the framework's own init returned."
        ) from error
    used = {v for op in traced.graph.program.ops for v in op.inputs} | set(traced.graph.program.outputs)
    needed = {leaf.path for v, leaf in traced.graph.leaves.items() if leaf.kind == "param" or v in used}
    checked = []
    for what, expected, given in (("parameters", application.params, params), ("state", application.state, state)):
        want, have = _flat(expected), _flat(given)
        odd = sorted(path for path in want if path in needed and path not in have)
        odd += sorted(path for path in have if path not in want and what == "parameters")
        if odd:
            where = "missing from the variables" if odd[0] in want else "in the variables, but not in the model"
            raise ModelError(
                f"The variables' {what} are not those of {application.name} on inputs "
                f"({frameworks.describe(application.inputs.abstract)}): {len(odd)} differ, first `{odd[0]}`, {where}. "
                "Make them with fi.init(model, key, *inputs) on the same model."
            )
        for path, leaf in want.items():
            if path in have and tuple(np.shape(have[path])) != tuple(leaf.shape):
                raise ModelError(
                    f"`{path}` of the variables has shape {tuple(np.shape(have[path]))}; {application.name} on inputs "
                    f"({frameworks.describe(application.inputs.abstract)}) expects {tuple(leaf.shape)}. Give inputs of "
                    "the shape that the variables were made for, or make them anew with fi.init."
                )
        filled = [have[path] if path in have else jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in want.items()]
        checked.append(jax.tree.unflatten(jax.tree.structure(expected), filled))
    return checked[0], checked[1]


def _flat(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
