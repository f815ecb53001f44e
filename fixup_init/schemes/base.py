"""What a scheme is: Structure in, Plan out. It never sees a trace, an array or a framework."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from fixup_init.plan import Entry, Plan, as_model, constant
from fixup_init.structure import Parameter, Structure

__all__ = ["Scheme", "rest"]


@runtime_checkable
class Scheme(Protocol):
    """A rule that gives every parameter of a structure its distribution."""

    @property
    def name(self) -> str: ...

    def plan(self, structure: Structure) -> Plan: ...


def rest(parameter: Parameter) -> Entry:
    """What schemes agree on for parameters that are no kernels: biases 0, multipliers neutral, tables as the model."""
    match parameter.role:
        case "bias" | "norm_bias":
            return constant(parameter, 0.0, "additive: 0")
        case "norm_scale" | "multiplier":
            neutral = parameter.neutral
            if neutral is None:
                return as_model(parameter, "multiplies in a way that no one value undoes: the model's own")
            what = "scale of a normalization" if parameter.role == "norm_scale" else "multiplier"
            how = (
                "" if neutral == 1 else " (it enters as 1 + value)" if neutral == 0 else ", at which it multiplies by 1"
            )
            return constant(parameter, neutral, f"{what}: {neutral:g}{how}")
        case "embedding":
            return as_model(parameter, "embedding table, read one row at a time: the model's own")
        case "position":
            return as_model(parameter, "additive table over positions: the model's own")
        case "gain":
            return as_model(parameter, "makes a kernel together with others: the model's own")
        case "factor":
            return as_model(parameter, "one factor of a kernel that is a product of parameters: the model's own")
        case "unused":
            return as_model(parameter, "reaches no output: the model's own")
        case _:
            return as_model(parameter, "neither kernel, bias nor multiplier: the model's own")
