"""The model's own initializers, as a scheme: what a user has before choosing one."""

from __future__ import annotations

import dataclasses

from fixup_init.plan import Plan, as_model
from fixup_init.structure import Structure

__all__ = ["Model"]


@dataclasses.dataclass(frozen=True)
class Model:
    """Every parameter as the model draws it."""

    @property
    def name(self) -> str:
        return "model"

    def plan(self, structure: Structure) -> Plan:
        entries = tuple(as_model(q, "the model's own initializer") for q in structure.parameters)
        return Plan(self.name, structure.num_branches, entries)
