"""`fi.checks.assert_stable`: what the verdicts say of a model, as a test that a user puts in their own suite."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from fixup_init import schemes
from fixup_init.analyze import analyze, over_steps
from fixup_init.initialize import draw
from fixup_init.measurement import measure
from fixup_init.plan import Plan
from fixup_init.propagation import Direction, Propagation
from fixup_init.sample import typed_key
from fixup_init.schemes import Scheme
from fixup_init.structure import of_trace
from fixup_init.tracing import check_normalization, trace, without_normalization
from fixup_init.verdicts import Verdict, layers_of, name_of, parts, verdicts

__all__ = ["UnstableError", "assert_stable"]


class UnstableError(AssertionError):
    """A model whose signal is not stable; `propagation` holds the measurement and `verdicts` what it says."""

    def __init__(self, message: str, propagation: Propagation, found: tuple[Verdict, ...]) -> None:
        super().__init__(message)
        self.propagation = propagation
        self.verdicts = found


def assert_stable(
    model: Any,
    *inputs: Any,
    max_growth: float = 100.0,
    scheme: str | Scheme | Plan = "model",
    variables: Any = None,
    normalization: str = "kept",
    strict: bool = False,
    steps: int | None = None,
    optimizer: Any = None,
    loss: Any = None,
    key: Any = None,
    **kwargs: Any,
) -> Propagation:
    """Fails where a model's signal or its gradient grows, shrinks, overflows or dies on the way through the network.

    The second moment of the stream (the residual sums; the weight layers in series where there are none) may rise
    above its first value, or fall below it, by `max_growth`; forward from the stem and backward from the head. Where
    sums of several shapes alternate, each shape is a stream of its own. Whatever the limit, values that are not
    finite, a stream that is exactly zero and dead layers fail.

    Args:
      model: as for `fi.analyze`.
      *inputs: the model's own arguments; a `jax.ShapeDtypeStruct` stands for random data.
      max_growth: the factor; 100 is tenfold in magnitude. A sum of n normalized branches grows n-fold by nature.
      scheme: how parameters are drawn: by the model's own initializers, or by a name, scheme or plan.
      variables: parameters to test instead of drawn ones.
      normalization: "kept", or "removed" to bypass every normalization.
      strict: fails on every warning, too: mean shift, rank collapse, saturation, layers that get no gradient.
      steps: how many updates to test after as well, with `optimizer` and `loss` as for `fi.analyze`.
      optimizer: an `optax.GradientTransformation`.
      loss: from the model's result to one number.
      key: for parameters, data and probe; `jax.random.key(0)` by default.
      **kwargs: the model's own keyword arguments.

    Returns:
      The `Propagation` that was measured (after the last step).

    Raises:
      UnstableError: it is not stable; the message names the first layers that are concerned and the worst, and what
        would help.
      ValueError: `max_growth` is not above 1, both `scheme` and `variables` are given, or `steps` without an optimizer.
      ModelError, DataError: as `fi.analyze`.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> from fixup_init.checks import assert_stable
      >>> from fixup_init.models.resnet import cifar_resnet
      >>> x = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
      >>> assert_stable(cifar_resnet(20, norm="fixup"), x, scheme="fixup").num_branches
      9

    References:
      De & Smith 2020 (arXiv:2002.10444), Sec. 2, on linear growth; Zhang et al. 2019 (arXiv:1901.09321), Sec. 2, on
      exponential growth without normalization.
    """
    if not max_growth > 1:
        raise ValueError(f"max_growth={max_growth!r}: expected a factor above 1, such as 100.")
    if steps is not None and (steps < 0 or optimizer is None):
        raise ValueError(f"steps={steps!r}, optimizer={optimizer!r}: expected a number from 0 and an optax optimizer.")
    if variables is not None and scheme != "model":
        raise ValueError(f"scheme={scheme!r} and variables were both given: leave out one, or draw with fi.init.")
    key = typed_key(0 if key is None else key)
    other = jax.random.fold_in(key, 1)
    if variables is not None:
        what = "the given variables"
        measured = analyze(
            model, variables, *inputs, normalization=normalization, steps=steps, optimizer=optimizer, loss=loss,
            key=other, **kwargs,
        )  # fmt: skip
    else:  # drawn beside the model, so that an NNX module stays as it is
        what = f"scheme={scheme if isinstance(scheme, str) else getattr(scheme, 'name', 'a plan')!r}"
        check_normalization(normalization)
        traced = without_normalization(trace(model, inputs, kwargs), normalization, run=True)
        plan = scheme if isinstance(scheme, Plan) else schemes.find(scheme).plan(of_trace(traced))
        params, state = draw(traced, plan, key)
        name = traced.application.name
        measured = (
            measure(traced, params, state, "auto", other, name, loss=loss)
            if steps is None
            else over_steps(traced, params, state, other, loss, steps, optimizer, None)
        )
    if isinstance(measured, Propagation):
        check(measured, max_growth, strict, what)
        return measured
    for k, one in enumerate(measured):
        check(one, max_growth, strict, f"{what}, after {k} step{'s' * (k != 1)}")
    return measured.propagations[-1]


@dataclasses.dataclass(frozen=True)
class Excess:
    """Where a stream leaves its limits: rows by index, and the worst ratio to its first second moment."""

    direction: Direction
    start: int
    first: int
    worst: int
    ratio: float


def check(propagation: Propagation, max_growth: float, strict: bool, what: str) -> None:
    """Raises UnstableError where a propagation is not stable."""
    excesses = [e for d in ("forward", "backward") if (e := excess(propagation, d, max_growth)) is not None]
    every = verdicts(propagation)
    serious = [v for v in every if v.severity == "error" or (strict and v.severity == "warning")]
    other = [v for v in serious if not (excesses and v.kind in ("growth", "vanishing"))]
    if not excesses and not other:
        return
    lines = [f"{propagation.model} is not stable with {what}:"]
    lines += [f"- {_sentence(propagation, e, max_growth)}" for e in excesses]
    lines += [f"- {v.kind}: {v.text}" for v in other]
    directions = {e.direction for e in excesses}
    advice = [
        v.advice for v in every if v in other or (v.direction in directions and v.kind in ("growth", "vanishing"))
    ]
    if not any(advice):
        advice = [
            'fi.init(model, key, *inputs, scheme="fixup") bounds the stream of a residual network, scheme="he_normal" '
            "that of a plain one; or raise max_growth."
        ]
    lines += ["What helps:", *(f"- {a}" for a in dict.fromkeys(advice) if a)]
    raise UnstableError("\n".join(lines), propagation, every)


def excess(propagation: Propagation, direction: Direction, max_growth: float) -> Excess | None:
    """Where the second moment of the stream rises above its first value, or falls below it, by more than a factor."""
    found = [e for rows in parts(propagation, direction) if (e := _excess(propagation, direction, rows, max_growth))]
    return max(found, key=lambda e: abs(math.log(e.ratio)), default=None)


def _excess(propagation: Propagation, direction: Direction, rows: tuple[int, ...], max_growth: float) -> Excess | None:
    moments = [s.second_moment for k in rows if (s := getattr(propagation.rows[k], direction)) is not None]
    ratios = [m / moments[0] for m in moments]
    far = [i for i, r in enumerate(ratios) if not 1 / max_growth <= r <= max_growth]
    if not far:
        return None
    worst = max(far, key=lambda i: abs(math.log(ratios[i])))
    return Excess(direction, rows[0], rows[far[0]], rows[worst], ratios[worst])


def _sentence(propagation: Propagation, found: Excess, max_growth: float) -> str:
    rows = propagation.rows
    start, first, worst = (
        getattr(rows[k], found.direction).second_moment for k in (found.start, found.first, found.worst)
    )
    what = "the signal's second moment" if found.direction == "forward" else "the gradient signal's second moment"
    grows = found.ratio > 1
    size = found.ratio if grows else 1 / found.ratio
    return (
        f"{found.direction}: {what} {'grows' if grows else 'shrinks'} by a factor of {size:.3g}, from {start:.3g} at "
        f"{name_of(rows[found.start])} to {worst:.3g} at {name_of(rows[found.worst])} ("
        f"{layers_of(propagation, found.worst, found.direction)}); the limit is {max_growth:g}. It is passed first at "
        f"{name_of(rows[found.first])} ({layers_of(propagation, found.first, found.direction)}), with {first:.3g}."
    )
