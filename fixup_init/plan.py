"""A plan: what each parameter gets before any is drawn, and why. It prints, compares, and goes to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp

from fixup_init.structure import Parameter, Role

__all__ = ["Distribution", "Entry", "Plan"]

Distribution = Literal["normal", "truncated_normal", "uniform", "constant", "model"]
_DISTRIBUTIONS = ("normal", "truncated_normal", "uniform", "constant", "model")
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one parameter gets.

    Attributes:
      path: of the parameter leaf.
      shape: of the leaf.
      dtype: of the leaf.
      role: what the model does with it.
      distribution: "normal", "truncated_normal" (at two standard deviations) or "uniform", each of mean 0 and standard
        deviation `std`; "constant" (`value` everywhere); "model" (the model's own initializer).
      std: standard deviation of one entry; 0 for a constant, None where the model's own initializer decides.
      value: of a constant.
      reason: why, in words.
      rate: what the learning rate is multiplied by for this parameter (`fi.optimizer` applies it).
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    distribution: Distribution
    std: float | None
    value: float | None = None
    reason: str = ""
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.distribution not in _DISTRIBUTIONS:
            raise ValueError(
                f"distribution={self.distribution!r} for `{self.path}`: expected one of {', '.join(_DISTRIBUTIONS)}."
            )
        if self.distribution in _DISTRIBUTIONS[:3] and not (self.std is not None and 0 < self.std < math.inf):
            raise ValueError(
                f"std={self.std!r} for `{self.path}`: a {self.distribution} distribution needs a positive, finite "
                "standard deviation; for all zeros use distribution='constant', value=0."
            )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Entries in the order of the parameter tree; prints as a table.

    Attributes:
      scheme: name of the scheme that made it.
      num_branches: L of the structure it was made for.
      entries: one for each parameter leaf.
      notes: what the scheme could not do, in words.
    """

    scheme: str
    num_branches: int
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, path: str) -> Entry:
        for entry in self.entries:
            if entry.path == path:
                return entry
        raise KeyError(f"{path!r} is no parameter of this plan; {_near(path, [e.path for e in self.entries])}")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        from fixup_init.report.tree import plan_table

        return plan_table(self)

    def override(self, path: str, **changes: Any) -> Plan:
        """The plan with one entry changed.

        Args:
          path: of the parameter.
          **changes: fields of `Entry`: `distribution`, `std`, `value`, `reason`, `rate`. `value=0.0` alone makes it a
            constant.

        Example:
          >>> import jax, jax.numpy as jnp, fixup_init as fi
          >>> net = fi.Function(lambda w, x: x @ w["w"], {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)})
          >>> plan = fi.plan(net, jax.ShapeDtypeStruct((4, 8), jnp.float32), scheme="he_normal")
          >>> plan["w"].std, plan.override("w", std=0.1)["w"].std
          (0.5, 0.1)
        """
        old = self[path]
        if "value" in changes and "distribution" not in changes:
            changes |= {"distribution": "constant", "std": 0.0}
        elif changes.get("std") and "distribution" not in changes and old.distribution in ("constant", "model"):
            changes |= {"distribution": "normal", "value": None}
        changes.setdefault("reason", "set by hand")
        new = dataclasses.replace(old, **changes)
        return dataclasses.replace(self, entries=tuple(new if e is old else e for e in self.entries))

    def difference(self, other: Plan) -> tuple[tuple[Entry | None, Entry | None], ...]:
        """Pairs of entries (mine, other's) that draw differently; None where a plan lacks the path."""
        mine = {e.path: e for e in self.entries}
        theirs = {e.path: e for e in other.entries}

        def draw(e: Entry | None) -> Any:
            return e and (e.shape, e.dtype, e.distribution, e.std, e.value)

        paths = dict.fromkeys((*mine, *theirs))
        return tuple((mine.get(q), theirs.get(q)) for q in paths if draw(mine.get(q)) != draw(theirs.get(q)))

    def to_json(self) -> str:
        """JSON text; `Plan.from_json` reads it back."""
        return json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan in a JSON text.

        Raises:
          ValueError: the text is no plan of a version that this library reads.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
            if version != _VERSION:
                raise ValueError(f"version {version!r}; this library reads version {_VERSION}")
            entries = tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in data.pop("entries"))
            return Plan(**{**data, "notes": tuple(data["notes"])}, entries=entries)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"This is no plan in JSON: {error}. Write one with Plan.to_json().") from error


def constant(parameter: Parameter, value: float, reason: str) -> Entry:
    """Every entry the same; parameters of whole numbers (quantized kernels) stay the model's own."""
    if not jnp.issubdtype(parameter.dtype, jnp.inexact):
        return as_model(parameter, f"{parameter.dtype}, which no scheme sets: the model's own")
    return _entry(parameter, "constant", 0.0, value, reason)


def drawn(parameter: Parameter, distribution: Distribution, std: float, reason: str) -> Entry:
    """Random entries; parameters of whole numbers (quantized kernels) stay the model's own."""
    if not jnp.issubdtype(parameter.dtype, jnp.inexact):
        return as_model(parameter, f"{parameter.dtype}, which no scheme sets: the model's own")
    return _entry(parameter, distribution, std, None, reason)


def as_model(parameter: Parameter, reason: str) -> Entry:
    return _entry(parameter, "model", None, None, reason)


def _entry(
    parameter: Parameter, distribution: Distribution, std: float | None, value: float | None, reason: str
) -> Entry:
    return Entry(parameter.path, parameter.shape, parameter.dtype, parameter.role, distribution, std, value, reason)


def _near(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return f"nearest: {', '.join(map(repr, close))}."
