"""One finding."""

from __future__ import annotations

import dataclasses
from typing import Literal

from fixup_init.propagation import Direction

__all__ = ["Kind", "Severity", "Verdict"]

Severity = Literal["error", "warning", "note"]
Kind = Literal[
    "overflow", "zero_signal", "dead", "growth", "vanishing", "near_overflow", "rank_collapse", "mean_shift",
    "saturation", "zero_gradient", "gradient_scale", "prediction", "wide_axis",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One finding; `str` is a sentence with its advice.

    Attributes:
      kind: which rule found it.
      direction: of the signal, or of its gradient; None where it is about neither.
      severity: "error" (training cannot start), "warning" (it will suffer) or "note".
      text: what was found: numbers and names.
      rows: indices into `propagation.rows`, in the order in which the signal passes them.
      factor: how large the effect is; what it is a factor of stands in the text. None where there is none.
      advice: what would help, with scheme and layers; '' where nothing has to be done.
    """

    kind: Kind
    direction: Direction | None
    severity: Severity
    text: str
    rows: tuple[int, ...] = dataclasses.field(default=(), repr=False)  # thousands, in a deep network
    factor: float | None = None
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.text} {self.advice}".rstrip()
