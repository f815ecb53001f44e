"""Size of an update: how much one step of SGD changes what a network computes, at one depth after the other.

Fixup's claim (Zhang, Dauphin & Ma 2019, arXiv:1901.09321, Sec. 3.2): after initialization a step of rate eta changes
the network's function by Theta(eta), whatever the depth:

    f(x; theta - eta dl/dtheta) - f(x; theta) = Theta(eta)   as eta -> 0.

Each of L branches may then contribute Theta(eta / L), which gives the factor L^(-1/(2m-2)).

A head that starts at zero hides this: no gradient but its own is non-zero in the first step, so that the function of
every such network changes by eta |h|^2, h the input of the head. So a zero head is drawn here, with variance 1/fan_in.
Then the first step moves all that a scheme lets move at first: the stem, the shortcuts and the last layer of every
branch, L of them in the same direction. Layers behind a zero one follow a step later, by terms of order eta^2; `step`
measures there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fixup_init import blocks, cutting, schemes
from fixup_init.cutting import Block
from fixup_init.initialize import draw
from fixup_init.measurement import loss_cotangents, values_of
from fixup_init.plain import plain
from fixup_init.plan import Plan
from fixup_init.sample import typed_key
from fixup_init.schemes import Scheme
from fixup_init.structure import Structure, of_trace
from fixup_init.tracing import Traced, trace, uncollected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Size", "UpdateSize", "update_size"]

Loss = Callable[[Any], Any]
_VERSION = 1
FLAT = 3.0  # largest over smallest median, over depths, of what counts as one size


@dataclasses.dataclass(frozen=True)
class Size:
    """One network: |f(x; theta - eta g) - f(x; theta)| / eta, root mean square over examples; inf if it overflows."""

    depth: int
    scheme: str
    seed: int
    size: float


@dataclasses.dataclass(frozen=True)
class UpdateSize:
    """Update sizes by depth and scheme; `str` is a table and a summary.

    Attributes:
      model: name of the model.
      rate: eta.
      rows: one for each depth, scheme and seed.
    """

    model: str
    rate: float
    rows: tuple[Size, ...]

    def __iter__(self) -> Iterator[Size]:
        return iter(self.rows)

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(r.depth for r in self.rows))

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.scheme for r in self.rows))

    def sizes(self, scheme: str, depth: int) -> tuple[float, ...]:
        """Of all seeds.

        Raises:
          KeyError: nothing was measured for this scheme and depth.
        """
        found = tuple(r.size for r in self.rows if (r.scheme, r.depth) == (scheme, depth))
        if not found:
            raise KeyError(
                f"scheme={scheme!r}, depth={depth!r} was not measured; schemes: {', '.join(map(repr, self.schemes))}, "
                f"depths: {', '.join(map(str, self.depths))}."
            )
        return found

    def median(self, scheme: str, depth: int) -> float:
        """Over seeds."""
        return statistics.median(self.sizes(scheme, depth))

    def spread(self, scheme: str, depth: int) -> tuple[float, float]:
        """Smallest and largest over seeds."""
        sizes = self.sizes(scheme, depth)
        return min(sizes), max(sizes)

    def ratio(self, scheme: str) -> float:
        """Largest over smallest median, over depths: 1 where an update is of one size whatever the depth."""
        medians = [self.median(scheme, depth) for depth in self.depths]
        if not all(0 < m < math.inf for m in medians):
            return math.inf
        return max(medians) / min(medians)

    def is_flat(self, scheme: str, within: float = FLAT) -> bool:
        """Whether medians stay within a factor over all depths."""
        return self.ratio(scheme) <= within

    def summary(self) -> str:
        """A sentence for each scheme."""
        return "\n".join(self._sentence(scheme) for scheme in self.schemes)

    def _sentence(self, scheme: str) -> str:
        medians = {depth: self.median(scheme, depth) for depth in self.depths}
        over = f"over depths {min(medians)} to {max(medians)}"
        if bad := [depth for depth, m in medians.items() if not math.isfinite(m)]:
            finite = [f"{m:.3g} at {depth}" for depth, m in medians.items() if math.isfinite(m)]
            return f"{scheme}: the update overflows from depth {bad[0]} on ({', '.join(finite) or 'at every depth'})."
        if not all(medians.values()):
            where = next(depth for depth, m in medians.items() if not m)
            return f"{scheme}: the update is exactly zero at depth {where}: no gradient reaches any parameter."
        low, high = min(medians.values()), max(medians.values())
        flat = "flat" if self.is_flat(scheme) else "not flat"
        return (
            f"{scheme}: the size of an update is {flat}: {low:.3g} to {high:.3g} {over}, a factor of "
            f"{self.ratio(scheme):.3g}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data with a schema version; an overflow is None."""
        return {"version": _VERSION, **plain(self), "summary": self.summary()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> UpdateSize:
        """The update sizes in plain data.

        Raises:
          ValueError: it is none, or of another schema version.
        """
        try:
            if data["version"] != _VERSION:
                raise ValueError(f"version {data['version']!r}; this library reads version {_VERSION}")
            rows = tuple(Size(**{**r, "size": math.inf if r["size"] is None else r["size"]}) for r in data["rows"])
            return UpdateSize(data["model"], data["rate"], rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"This is no UpdateSize: {error}. Write one with UpdateSize.to_dict().") from error

    def figure(self) -> Figure:
        """Size over depth on logarithmic axes, a line for each scheme; `fixup_init.report.figure.save` writes it."""
        from fixup_init.report.update_size import figure

        return figure(self)

    def __str__(self) -> str:
        from fixup_init.report.update_size import table

        return table(self)


def update_size(
    build: Callable[[int], Any],
    *inputs: Any,
    depths: Sequence[int] = (10, 100, 1000, 10000),
    schemes: Sequence[str | Scheme] = ("fixup", "he_normal"),
    seeds: int | Sequence[int] = 3,
    rate: float = 1e-3,
    step: int = 0,
    head: Literal["drawn", "scheme"] = "drawn",
    loss: Loss | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **kwargs: Any,
) -> UpdateSize:
    """Measures how much one step of SGD changes a network's function, at one depth after the other.

    |f(x; theta - eta dl/dtheta) - f(x; theta)| / eta, with each parameter's rate as its plan has it (Fixup: a tenth for
    biases and multipliers). A zero head is drawn with variance 1/fan_in, since the first step would move nothing else
    (see the head of this module). Networks run block by block, and equal blocks compile once for all depths.

    Args:
      build: from a depth to a model, or to a tuple of a model and its inputs.
      *inputs: the model's own arguments, as for `fi.analyze`; abstract ones are drawn anew for each seed.
      depths: what `build` is called with.
      schemes: names or scheme objects; objects of one name are told apart by a number.
      seeds: for parameters, data and labels; a number n stands for 0 to n - 1.
      rate: eta; small enough for the change to be of first order, large enough for float32 to resolve it.
      step: how many updates come before the measured one, of the same rate and on the same data.
      head: "drawn" where the scheme sets it to zero, or as the "scheme" has it; then give a `step` from 2 on, by which
        every layer moves, and a `rate` as in training, which sets how far the zero layers have come.
      loss: from the model's result to one number; by default the mean cross-entropy over the last axis, with random
        labels.
      progress: called with (what, done, in all).
      **kwargs: the model's own keyword arguments.

    Returns:
      An `UpdateSize`.

    Raises:
      ValueError: no depth, scheme or seed, a rate that is not positive, a negative step, another `head`, or an output
        without classes and no `loss`.
      ModelError, StructureError: as `fi.init`.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> from fixup_init.checks import update_size
      >>> S = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> def build(depth):
      ...     def net(w, x):
      ...         for a, b in w["blocks"]:
      ...             x = x + jax.nn.relu(x @ a) @ b
      ...         return x @ w["head"]
      ...     return fi.Function(net, {"blocks": [(S(16, 16), S(16, 16))] * (depth // 2), "head": S(16, 10)})
      >>> sizes = update_size(build, S(8, 16), depths=(4, 40))
      >>> sizes.is_flat("fixup"), sizes.is_flat("he_normal")
      (True, False)

    References:
      Zhang, Dauphin & Ma 2019, Fixup Initialization (arXiv:1901.09321), Sec. 3.2 and 3.3.
    """
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    named = _named(schemes)
    if not (depths and named and numbers):
        raise ValueError(f"depths={depths!r}, schemes={schemes!r}, seeds={seeds!r}: expected at least one of each.")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate!r}: expected a positive number, such as 1e-3.")
    if step < 0 or head not in ("drawn", "scheme"):
        raise ValueError(f"step={step!r}, head={head!r}: expected a number from 0, and 'drawn' or 'scheme'.")
    rows: list[Size] = []
    name, count = "", len(depths) * len(named) * len(numbers)
    for depth in depths:
        made = build(depth)
        model, arguments = (made[0], (*made[1:], *inputs)) if isinstance(made, tuple) else (made, inputs)
        with uncollected():
            traced = trace(model, arguments, kwargs)
            structure = of_trace(traced)
        name = traced.application.name
        cut = cutting.cut(traced.graph, {})
        for label, scheme in named.items():
            plan = scheme.plan(structure)
            plan = _with_head(plan, structure) if head == "drawn" else plan
            for seed in numbers:
                rows.append(Size(depth, label, seed, _measure(traced, cut, plan, seed, rate, step, loss)))
                if progress is not None:
                    progress(f"update size: {label}, depth {depth}", len(rows), count)
    return UpdateSize(name, rate, tuple(rows))


def _named(given: Sequence[str | Scheme]) -> dict[str, Scheme]:
    if isinstance(given, str):
        given = [given]
    found: dict[str, Scheme] = {}
    for one in given:
        scheme = schemes.find(one)
        label = one if isinstance(one, str) else scheme.name
        names = itertools.chain([label], (f"{label} {k}" for k in itertools.count(2)))
        found[next(n for n in names if n not in found)] = scheme
    return found


def _with_head(plan: Plan, structure: Structure) -> Plan:
    """The plan with a zero head drawn (LeCun et al. 1998, Sec. 4.6)."""
    fans = {layer.path: layer.fan_in for layer in structure.layers}
    heads = {e.path for e in plan if e.path in structure.heads and e.distribution == "constant" and e.value == 0}
    entries = tuple(
        dataclasses.replace(
            e, distribution="normal", std=fans[e.path] ** -0.5, value=None, reason="head, drawn to let others move"
        )
        if e.path in heads
        else e
        for e in plan
    )
    return dataclasses.replace(plan, entries=entries)


def _measure(
    traced: Traced, cut: Sequence[Block], plan: Plan, seed: int, rate: float, step: int, loss: Loss | None
) -> float:
    graph = traced.graph
    key = typed_key(seed)
    values = values_of(traced, *draw(traced, plan, key), key)
    rates = {e.path: rate * e.rate for e in plan}
    loss = loss or functools.partial(_cross_entropy, key=jax.random.fold_in(key, 1))
    before, after = {}, blocks.forward(graph, cut, values)[0]
    for _ in range(step + 1):
        before = after
        gradient = _gradient(traced, cut, before, loss)
        values |= {v: _moved(values[v], g, rates[graph.leaves[v].path]) for v, g in gradient.items()}
        after, _ = blocks.forward(graph, cut, values)
    return _distance(traced, before, after) / rate


def _gradient(traced: Traced, cut: Sequence[Block], env: Mapping[int, Any], loss: Loss) -> dict[int, Any]:
    """Of the loss in every parameter that it depends on, by value."""
    parameters = [v for v in traced.graph.program.inputs if traced.graph.leaves[v].kind == "param"]
    return blocks.backward(traced.graph, cut, env, loss_cotangents(traced, env, loss), gradients=parameters).gradients


@jax.jit
def _moved(parameter: Any, gradient: Any, rate: Any) -> Any:
    return parameter - (rate * gradient).astype(parameter.dtype)


def _cross_entropy(result: Any, key: Any) -> Any:
    """Mean over all but the last axis, with random labels."""
    arrays = [a for a in jax.tree.leaves(result) if isinstance(a, jax.Array)]
    floating = [a for a in arrays if jnp.issubdtype(a.dtype, jnp.floating)]
    if not floating or floating[0].ndim < 1 or floating[0].shape[-1] < 2:
        shapes = ", ".join(str(tuple(a.shape)) for a in floating) or "no floating array"
        raise ValueError(
            f"The model returned {shapes}: cross-entropy expects scores of two classes or more along the last axis. "
            "Give loss=, a function from the model's result to one number."
        )
    logits = floating[0]
    labels = jax.random.randint(key, logits.shape[:-1], 0, logits.shape[-1])
    scores = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -1)
    return -jnp.take_along_axis(scores, labels[..., None], -1).mean()


def _distance(traced: Traced, before: Mapping[int, Any], after: Mapping[int, Any]) -> float:
    """Root mean square over examples of the norm of the change of all outputs, in double precision."""
    total, examples = 0.0, 1
    for v in dict.fromkeys(traced.graph.program.outputs):
        if traced.graph.is_activation(v) and jnp.issubdtype(traced.graph.program.dtype(v), jnp.floating):
            change = np.asarray(after[v], np.float64) - np.asarray(before[v], np.float64)
            examples = max(examples, change.shape[0] if change.ndim > 1 else 1)
            total += float(np.square(change).sum())
    return math.sqrt(total / examples) if math.isfinite(total) else math.inf
