"""Fixup (Zhang, Dauphin & Ma 2019, arXiv:1901.09321, Sec. 3): residual learning without normalization.

1. The last layer of each residual branch, and the head, start at zero; where they would not learn from there (a relu
   behind passes no gradient, a normalization divides by them), as the other layers do.
2. Every other layer starts as usual (He, fan_out); inside a branch its standard deviation is multiplied by
   L^(-1/(2m-2)), L the number of branches and m the number of layers in one.
3. Biases start at 0, multipliers at 1; both learn at a tenth of the rate (Sec. 4 and the authors' code).

m is the order of the branch (`fixup_init.orders`), so that a gated MLP counts three factors and attention two. Where a
normalization follows a kernel, scaling it does nothing, and zeroing it would put a zero-variance tensor into the
normalization: the zero goes to the last parameter of the branch that multiplies it, the normalization's scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from fixup_init.plan import Entry, Plan, as_model, constant
from fixup_init.schemes.base import rest
from fixup_init.schemes.variance import Variance, he
from fixup_init.structure import Branch, Parameter, Structure, StructureError

__all__ = ["Fixup", "factor"]


def factor(num_branches: int, order: float) -> float:
    """L^(-1/(2m-2)), Fixup's factor for all but the last layer of a branch (Sec. 3, rule 2).

    Args:
      num_branches: L, residual branches of the network.
      order: m, weight layers in the branch; at least 2.

    Example:
      >>> round(factor(54, 2), 4), round(factor(16, 3), 4)
      (0.1361, 0.5)
    """
    if num_branches < 1 or order < 2:
        raise ValueError(
            f"num_branches={num_branches!r}, order={order!r}: expected L >= 1 and m >= 2. A branch of one layer has no "
            "factor; its only layer starts at zero."
        )
    return num_branches ** (-1.0 / (2 * order - 2))


@dataclasses.dataclass(frozen=True)
class Fixup:
    """Fixup for any structure.

    Args:
      base: the variance of a layer before Fixup's factor; the paper's is He with fan_out.
      head: "auto" zeroes the layers that outputs come from; a path names the head; None leaves it as any other layer.
      tied: what to do with a kernel that different branches claim in different ways: "error" or "first".
      undecided: what to do with sums that the graph leaves open: "error", "ignore" (they are no residuals), or
        decisions such as {"sum 1": 0}, by which term 0 is the skip (see `Structure.settle`).
      scalar_rate: what the learning rate of biases and multipliers is multiplied by.
    """

    base: Variance = dataclasses.field(default_factory=lambda: he("fan_out"))
    head: str | None = "auto"
    tied: str = "error"
    undecided: Literal["error", "ignore"] | Mapping[str, int | None] = "error"
    scalar_rate: float = 0.1

    @property
    def name(self) -> str:
        return "fixup"

    def plan(self, structure: Structure) -> Plan:
        if not isinstance(self.undecided, str):
            structure = structure.settle(self.undecided)
        parameters = {q.path: q for q in structure.parameters}
        heads = self._heads(structure, parameters)
        self._refuse_undecided(structure)
        L = structure.num_branches
        claims: dict[str, Entry] = {}
        asides: dict[str, Entry] = {}  # kernels in branches that the rule does not touch
        notes: list[str] = []

        def claim(entry: Entry) -> None:
            first = claims.setdefault(entry.path, entry)
            if (first.distribution, first.std, first.value) != (entry.distribution, entry.std, entry.value):
                if self.tied == "first":
                    return
                raise StructureError(
                    f"`{entry.path}` is shared, and its uses call for different scales: {first.reason!r} and "
                    f'{entry.reason!r}. Give Fixup(tied="first"), or another scheme and Plan.override.'
                )

        for branch, (first, last) in zip(structure.branches, structure.numbers, strict=True):
            where = f"branch {first}" + (f"-{last}" if last > first else "") + f" of {L}"
            for entry in self._asides(branch, where, parameters):
                if entry.path in branch.own:
                    asides.setdefault(entry.path, entry)
            for entry in self._branch(branch, where, L, parameters, notes):
                if entry.path in branch.own or entry.path not in branch.weights:
                    claim(entry)
        shortcuts = {path for b in structure.branches for path in b.skip_weights}
        for path in heads:
            parameter = parameters[path]
            if "embedding" in parameter.uses:
                claim(as_model(parameter, "head tied to the embedding table, which zeros would erase: the model's own"))
            elif parameter.not_zero and parameter.role == "kernel":
                claim(self.base.entry(parameter, prefix="head: ", suffix=f"; not zero: {parameter.not_zero}"))
            else:
                claim(constant(parameter, 0.0, "head: zero"))
        entries = []
        for q in structure.parameters:
            if q.path in claims:
                entries.append(claims[q.path])
            elif q.path in asides:
                entries.append(asides[q.path])
            elif q.role == "kernel":
                place = "projection shortcut: " if q.path in shortcuts else "outside of branches: "
                entries.append(self.base.entry(q, prefix=place))
            else:
                entries.append(rest(q))
        slow = {"bias", "multiplier"}
        entries = [dataclasses.replace(e, rate=self.scalar_rate) if e.role in slow else e for e in entries]
        if structure.unruled:
            notes.append(
                f"No rule for the order of {', '.join(structure.unruled)}: taken to keep that of their arguments."
            )
        if not heads:
            notes.append("No head was found: outputs come from residual sums. Nothing outside of branches is zero.")
        if not structure.branches:
            notes.append("No residual branch was found, so no kernel is scaled; only the head is zero.")
        return Plan(self.name, L, tuple(entries), tuple(notes))

    def _asides(self, branch: Branch, where: str, parameters: dict[str, Parameter]) -> list[Entry]:
        """Kernels of a branch whose scale does not reach its end."""
        entries = []
        for path in dict.fromkeys(branch.weights):
            if parameters[path].role == "kernel" and branch.shares[path] < 1:
                why = {"control": "on a control path", "gate": "a gate"}.get(
                    branch.roles[path], "a normalization hides its scale, so scaling would do nothing"
                )
                entries.append(self.base.entry(parameters[path], prefix=f"{where}: ", suffix=f"; {why}"))
        return entries

    def _branch(
        self, branch: Branch, where: str, L: int, parameters: dict[str, Parameter], notes: list[str]
    ) -> list[Entry]:
        """Entries for the kernels that are factors of one branch, and for what brings it to zero."""
        entries: list[Entry] = []
        factors = [path for path in dict.fromkeys(branch.weights) if branch.roles[path] == "value"]
        for k, path in enumerate(factors):
            q, m = parameters[path], branch.orders[path]
            place = f"{where}, layer {k + 1} of {len(factors)}: "
            if q.role not in ("kernel", "factor") or branch.shares[path] < 1:
                continue
            last = path in branch.last
            why = f"; last, but not zero: {q.not_zero}" if last else ""
            if last and not q.not_zero:
                entries.append(constant(q, 0.0, f"{place}last, zero"))
            elif q.role == "factor":
                continue
            elif last and m < 2:
                suffix = f" x L^(-1/2) = {L}^(-1/2){why}"
                entries.append(self.base.entry(q, L**-0.5, prefix=place, suffix=suffix))
            elif m < 2:
                entries.append(self.base.entry(q, prefix=place, suffix=f"; the branch has order {m:g}, no factor"))
            else:
                suffix = f" x L^(-1/{2 * m - 2:g}) = {L}^(-1/{2 * m - 2:g}){why}"
                entries.append(self.base.entry(q, factor(L, m), prefix=place, suffix=suffix))
        if not branch.weights:
            notes.append(f"{where} ({branch.scope}) has no weight to set to zero.")
        elif not branch.last or any(branch.shares[path] < 1 for path in branch.last):
            behind = branch.last[-1] if branch.last else branch.weights[-1]
            reason = f"{where}: zero here and not in `{behind}`, which a normalization or standardization hides"
            closing = [path for path in branch.closing if not parameters[path].not_zero]
            entries.extend(constant(parameters[path], 0.0, reason) for path in closing)
            if not branch.closing:
                notes.append(
                    f"{where} ({branch.scope}) has no parameter that multiplies its end: it cannot start at 0."
                )
            elif not closing:
                why = parameters[branch.closing[0]].not_zero
                notes.append(f"{where} ({branch.scope}) does not start at 0, by `{branch.closing[0]}`: {why}.")
        return entries

    def _heads(self, structure: Structure, parameters: dict[str, Parameter]) -> tuple[str, ...]:
        if self.head is None:
            return ()
        if self.head != "auto":
            if self.head not in parameters:
                raise StructureError(
                    f"head={self.head!r} is no parameter; the last weight layers are "
                    f"{', '.join(repr(layer.path) for layer in structure.layers[-3:])}."
                )
            return (self.head,)
        for u in structure.undecided:
            if u.what == "head":
                names = ", ".join(f"`{path}`" for term in u.terms for path in term)
                raise StructureError(
                    f"The head of {structure.name} is ambiguous: {u.why} ({u.where}): {names}. Name it with "
                    f"scheme=fi.Fixup(head={u.terms[-1][0]!r}), or leave all of them as they are with head=None."
                )
        return structure.heads

    def _refuse_undecided(self, structure: Structure) -> None:
        for u in structure.undecided:
            if u.what == "sum" and self.undecided != "ignore":
                terms = " + ".join("(" + (", ".join(t) or "no weights") + ")" for t in u.terms)
                raise StructureError(
                    f"{u.name!r} in {u.where or structure.name} cannot be decided: {u.why}: {terms}. Say which term is "
                    f"the skip, scheme=fi.Fixup(undecided={{{u.name!r}: 0}}) for the first, or that it is no residual, "
                    f"{{{u.name!r}: None}}."
                )
