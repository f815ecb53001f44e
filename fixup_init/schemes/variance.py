"""Variance scaling: the second moment of a signal kept through a layer, forward, backward or between.

Var W = gain^2 / n, with n = fan_in (forward), fan_out (backward) or their mean, and gain^2 = 2 for relu (He et al.
2015, arXiv:1502.01852, eq. 10 and 14), 1 for LeCun et al. 1998, Sec. 4.6; Glorot & Bengio 2010, eq. 12, is gain 1
with fan_avg.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fixup_init.plan import Distribution, Entry, Plan, as_model, drawn
from fixup_init.schemes.base import rest
from fixup_init.structure import LayerInfo, Parameter, Structure

__all__ = ["NAMES", "Variance", "glorot", "he", "lecun"]

Mode = Literal["fan_in", "fan_out", "fan_avg"]
_MODES = ("fan_in", "fan_out", "fan_avg")
_DISTRIBUTIONS = ("normal", "truncated_normal", "uniform")


@dataclasses.dataclass(frozen=True)
class Variance:
    """Every kernel with Var W = gain^2 / n; biases 0, multipliers 1.

    Args:
      family: name, for reasons and reports.
      gain2: gain^2, the factor that the nonlinearity calls for.
      mode: n is "fan_in", "fan_out" or "fan_avg".
      distribution: "normal", "truncated_normal" or "uniform".
    """

    family: str
    gain2: float
    mode: Mode
    distribution: Distribution = "normal"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"mode={self.mode!r}: expected one of {', '.join(_MODES)}.")
        if self.distribution not in _DISTRIBUTIONS:
            raise ValueError(f"distribution={self.distribution!r}: expected one of {', '.join(_DISTRIBUTIONS)}.")

    @property
    def name(self) -> str:
        return f"{self.family.lower()}_{self.distribution}_{self.mode}"

    def n(self, layer: LayerInfo) -> float:
        return {
            "fan_in": layer.fan_in, "fan_out": layer.fan_out, "fan_avg": (layer.fan_in + layer.fan_out) / 2
        }[self.mode]  # fmt: skip

    def std(self, layer: LayerInfo) -> float:
        """sqrt(gain^2 / n)."""
        return math.sqrt(self.gain2 / self.n(layer))

    def entry(self, parameter: Parameter, factor: float = 1.0, prefix: str = "", suffix: str = "") -> Entry:
        """A kernel's entry, its standard deviation times `factor`; `prefix` and `suffix` go around the reason."""
        fans = {self.n(layer) for layer in parameter.layers}
        if len(fans) > 1:
            return as_model(
                parameter, f"used by layers of different {self.mode} ({', '.join(f'{n:g}' for n in sorted(fans))}): "
                "the model's own",
            )  # fmt: skip
        layer = parameter.layers[0]
        reason = f"{prefix}{self.family} {self.mode}, sqrt({self.gain2:g}/{self.n(layer):g}){suffix}"
        return drawn(parameter, self.distribution, self.std(layer) * factor, reason)

    def plan(self, structure: Structure) -> Plan:
        entries = tuple(self.entry(q) if q.role == "kernel" else rest(q) for q in structure.parameters)
        return Plan(self.name, structure.num_branches, entries)


def he(mode: Mode = "fan_in", distribution: Distribution = "normal") -> Variance:
    """Var W = 2/n (He et al. 2015, eq. 10 forward, eq. 14 backward)."""
    return Variance("He", 2.0, mode, distribution)


def glorot(mode: Mode = "fan_avg", distribution: Distribution = "uniform") -> Variance:
    """Var W = 2/(fan_in + fan_out) (Glorot & Bengio 2010, eq. 12)."""
    return Variance("Glorot", 1.0, mode, distribution)


def lecun(mode: Mode = "fan_in", distribution: Distribution = "normal") -> Variance:
    """Var W = 1/fan_in (LeCun et al. 1998, Efficient BackProp, Sec. 4.6)."""
    return Variance("LeCun", 1.0, mode, distribution)


def _names() -> dict[str, Variance]:
    """he_normal, he_normal_fan_out, ..., and he, glorot, lecun for the papers' own choice."""
    named: dict[str, Variance] = {}
    for family in (he, glorot, lecun):
        named[family.__name__] = family()
        for distribution in _DISTRIBUTIONS:
            named[f"{family.__name__}_{distribution}"] = family(distribution=distribution)
            for mode in _MODES:
                named[f"{family.__name__}_{distribution}_{mode}"] = family(mode, distribution)  # pyright: ignore
    return named


NAMES = _names()
