"""How a signal drifts with depth, as data: rows of statistics, and what they say in words."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fixup_init.plain import plain

if TYPE_CHECKING:
    from fixup_init.verdicts import Verdict

__all__ = ["NOT_RUN", "Comparison", "Drift", "Place", "Propagation", "Row", "Statistics", "Weight"]

RowKind = Literal["input", "weight", "nonlinearity", "norm", "branch", "sum", "output"]
Direction = Literal["forward", "backward"]
_VERSION = 2
NOT_RUN = "in an arm of a conditional that did not run"  # the note of such a row


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one array; NaN is a figure that is not known.

    Attributes:
      mean: over all entries. In an array of more than 16,384, this and the next two are those of some entries where the
        variance is less than a thousandth of the squared mean or squares leave float32; all others always are.
      variance: over all entries, around that mean.
      squared_channel_mean: mean over channels of the squared mean of a channel.
      finite: fraction of finite entries, below 1 if any is not finite; the other figures are NaN there.
      zeros: fraction of entries that are exactly zero.
      saturated: fraction of entries within 1 % of a limit of a nonlinearity that has two.
      example_cosine: mean cosine of the angle between two examples, in [-1/(n-1), 1]; 1 where all are alike.
      effective_rank: (sum of eigenvalues)^2 / (sum of their squares) of the second moments of at most 64 channel
        vectors, spread over examples and positions; 1 where all are parallel.
      example_share: of the variance, what the means of examples explain; likewise `channel_share` and `position_share`.
      spread: in a prediction, how far one network of this width may stray: the standard deviation of the logarithm of
        its second moment from seed to seed, at most.
    """

    mean: float
    variance: float
    squared_channel_mean: float
    finite: float = 1.0
    zeros: float = math.nan
    saturated: float = math.nan
    example_cosine: float = math.nan
    effective_rank: float = math.nan
    example_share: float = math.nan
    channel_share: float = math.nan
    position_share: float = math.nan
    spread: float = math.nan

    @property
    def second_moment(self) -> float:
        return self.variance + self.mean * self.mean  # not a power, which raises where it overflows

    @property
    def channel_variance(self) -> float:
        """Mean over channels of the variance within a channel."""
        return max(self.second_moment - self.squared_channel_mean, 0.0)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Norms of a layer's parameters and of their gradient; over all uses where a parameter has several.

    Attributes:
      parameter_norm: Euclidean norm.
      gradient_norm: of the gradient from the probe or loss.
    """

    parameter_norm: float
    gradient_norm: float

    @property
    def ratio(self) -> float:
        """Gradient norm over parameter norm; infinite for parameters that are zero, NaN where both are."""
        if self.parameter_norm:
            return self.gradient_norm / self.parameter_norm
        return math.inf if self.gradient_norm else math.nan


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row stands in the network, which the order of the trace does not tell.

    Attributes:
      unit: a number that passes through a scan body share where they use the same parameters.
      fed: whether a weight layer leads here (a weight layer counts itself).
      last: of a weight layer, whether no other follows it.
      in_series: False for weight layers, and passes, that run beside others: off the longest chain to an output.
    """

    unit: int
    fed: bool
    last: bool
    in_series: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """One tapped value.

    Attributes:
      kind: "input", "weight" (a layer's output), "nonlinearity", "norm", "branch" (its end, before the sum), "sum"
        (after it) or "output".
      name: parameter path of a weight layer, function name of a nonlinearity, scale of a norm, "branch 3", "sum 3".
      scope: where in the model, by module name; '' where the framework gives none.
      block: residual sums passed before this value; the stem is 0.
      shape: of the value.
      dtype: of the value.
      repeat: which pass through a scan body, from 0; None outside of scans.
      forward: statistics of the activation; None where a prediction does not know them, and in an arm of a conditional
        that did not run.
      backward: statistics of its cotangent; None where none was measured.
      weight: norms of the layer's kernel and its gradient, for measured rows of kind "weight".
      note: what to know about the row, in words; '' where there is nothing.
      place: where it stands in the network; None where that is not known, as in files of before.
    """

    kind: RowKind
    name: str
    scope: str
    block: int
    shape: tuple[int, ...]
    dtype: str
    repeat: int | None
    forward: Statistics | None
    backward: Statistics | None = None
    weight: Weight | None = None
    note: str = ""
    place: Place | None = None


@dataclasses.dataclass(frozen=True)
class Drift:
    """The trend of the stream's second moment in one direction.

    Attributes:
      direction: "forward" (from stem to head) or "backward" (from head to stem).
      blocks: residual sums between `first` and `last`.
      first: second moment where the signal starts.
      last: where it ends.
      factor: the growth a block, the median over blocks (a stage that changes the width is one of many); None where it
        is not defined.
      verdict: "flat" (all within a factor of 2, or within 16 and unchanged by most blocks), "bounded" (the end within
        16 of the start, or the factor of a block within 16 over all blocks: linear growth), "grows", "vanishes",
        "overflows" or "zero".
      where: name of the row in which it overflows or becomes zero, if it does.
    """

    direction: Direction
    blocks: int
    first: float
    last: float
    factor: float | None
    verdict: Literal["flat", "bounded", "grows", "vanishes", "overflows", "zero"]
    where: str | None = None


@dataclasses.dataclass(frozen=True)
class Propagation:
    """Measured drift of one model; `str` is a table and a summary.

    Attributes:
      label: what was measured, for legends: "batch norm", "fixup".
      model: name of the model.
      num_branches: L.
      rows: in trace order.
      probe: where the backward pass starts: "output", or "input of the head".
      unmeasured: what lies inside of a `jax.lax.platform_dependent`, which runs as a whole: weights and sums by name.
      kind: "measured" on arrays, or "predicted" from shapes and the plan.
      notes: what to know about the whole, in words.
    """

    label: str
    model: str
    num_branches: int
    rows: tuple[Row, ...]
    probe: str = "output"
    unmeasured: tuple[str, ...] = ()
    kind: Literal["measured", "predicted"] = "measured"
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, *kinds: RowKind) -> tuple[Row, ...]:
        """Rows of these kinds, in order."""
        return tuple(r for r in self.rows if r.kind in kinds)

    @property
    def stream(self) -> tuple[Row, ...]:
        """The rows that drift with depth is read from: residual sums, or where there are none weight layers in series.

        Where it is not known which layers are in series, it is every one.
        """
        sums = self.select("sum")
        return sums or tuple(r for r in self.select("weight") if r.place is None or r.place.in_series)

    @property
    def streams(self) -> tuple[tuple[Row, ...], ...]:
        """The stream in parts whose rows follow each other: one, or one for each shape where sums of some shapes
        alternate, as those of all tokens do with those of the tokens that a router chose; the last part ends last."""
        stream = self.stream
        runs = [shape for shape, _ in itertools.groupby(r.shape for r in stream)]
        if not _alternate(runs):
            return (stream,)
        return tuple(tuple(r for r in stream if r.shape == shape) for shape in dict.fromkeys(reversed(runs)))[::-1]

    def drift(self, direction: Direction = "forward") -> Drift:
        """The trend of the stream; where it has parts, of the one that ends last."""
        rows = self.streams[-1] if direction == "forward" else self.streams[-1][::-1]
        measured = [
            (_place(r), s) for r in rows
            if (s := r.forward if direction == "forward" else r.backward) is not None
            and (s.finite < 1 or s.second_moment == s.second_moment)
        ]  # fmt: skip
        if not measured:
            return Drift(direction, 0, math.nan, math.nan, None, "zero")
        first, last = measured[0][1].second_moment, measured[-1][1].second_moment
        blocks = len(measured) - 1
        for name, s in measured:
            if s.finite < 1 or not math.isfinite(s.second_moment):
                return Drift(direction, blocks, first, last, None, "overflows", name)
            if s.second_moment == 0:
                return Drift(direction, blocks, first, last, None, "zero", name)
        moments = [s.second_moment for _, s in measured]
        ratio, spread = last / first, max(moments) / min(moments)
        factor = statistics.median(b / a for a, b in itertools.pairwise(moments)) if blocks else 1.0
        if spread <= 2 or (spread <= 16 and abs(factor - 1) <= 0.01):
            verdict = "flat"
        elif min(abs(math.log(ratio)), blocks * abs(math.log(factor))) <= math.log(16):
            verdict = "bounded"
        else:
            verdict = "grows" if ratio > 1 else "vanishes"
        return Drift(direction, blocks, first, last, factor, verdict)

    def summary(self) -> str:
        """What the rows say, in words."""
        return " ".join(_sentence(self, self.drift(d)) for d in ("forward", "backward"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data with a schema version; non-finite numbers are None."""
        return {"version": _VERSION, **plain(self), "summary": self.summary()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Propagation:
        """The propagation in plain data.

        Raises:
          ValueError: it is none, or of another schema version.
        """
        try:
            data = dict(data)
            if (version := data.pop("version")) != _VERSION:
                raise ValueError(f"version {version!r}; this library reads version {_VERSION}")
            data.pop("summary", None)
            rows = tuple(
                Row(**{**r, "shape": tuple(r["shape"]), "forward": _numbers(Statistics, r["forward"]),
                       "backward": _numbers(Statistics, r["backward"]), "weight": _numbers(Weight, r["weight"]),
                       "place": None if r.get("place") is None else Place(**r["place"])})
                for r in data.pop("rows")
            )  # fmt: skip
            unmeasured, notes = tuple(data.pop("unmeasured")), tuple(data.pop("notes"))
            return Propagation(**data, rows=rows, unmeasured=unmeasured, notes=notes)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"This is no Propagation: {error}. Write one with Propagation.to_dict().") from error

    def verdicts(self, predicted: Propagation | None = None) -> tuple[Verdict, ...]:
        """What the rows show, worst first; see `fi.verdicts`."""
        from fixup_init.verdicts import verdicts

        return verdicts(self, predicted)

    def records(self) -> list[dict[str, Any]]:
        """The rows as flat dictionaries, for `pandas.DataFrame`."""
        from fixup_init.report.table import records

        return records(self)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes the records as CSV."""
        from fixup_init.report.table import to_csv

        return to_csv(self, path)

    def table(self, *, all_rows: bool = False, predicted: Propagation | None = None, width: int | None = None) -> str:
        """The rows as text: blocks that are alike folded, or all; measured beside predicted."""
        from fixup_init.report.text import propagation_table

        return propagation_table(self, all_rows=all_rows, width=width, predicted=predicted)

    def __str__(self) -> str:
        return self.table()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several propagations side by side."""

    propagations: tuple[Propagation, ...]

    def __iter__(self) -> Iterator[Propagation]:
        return iter(self.propagations)

    def __len__(self) -> int:
        return len(self.propagations)

    def __getitem__(self, label: str) -> Propagation:
        for one in self.propagations:
            if one.label == label:
                return one
        raise KeyError(f"{label!r} was not compared; labels: {', '.join(repr(q.label) for q in self.propagations)}.")

    def summary(self) -> str:
        """A paragraph for each."""
        return "\n".join(f"{one.label}: {one.summary()}" for one in self.propagations)

    def records(self) -> list[dict[str, Any]]:
        """The rows of all as flat dictionaries, for `pandas.DataFrame`."""
        from fixup_init.report.table import records

        return records(self)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes the records as CSV."""
        from fixup_init.report.table import to_csv

        return to_csv(self, path)

    def to_dict(self) -> dict[str, Any]:
        return {"version": _VERSION, "propagations": [one.to_dict() for one in self.propagations]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Comparison:
        """The comparison in plain data.

        Raises:
          ValueError: it is none, or of another schema version.
        """
        if not isinstance(data, dict) or "propagations" not in data:
            raise ValueError("This is no Comparison: expected `propagations`. Write one with Comparison.to_dict().")
        return Comparison(tuple(Propagation.from_dict(one) for one in data["propagations"]))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        from fixup_init.report.text import comparison_table

        return comparison_table(self)


_N = TypeVar("_N", "Statistics", "Weight")


def _alternate(runs: Sequence[tuple[int, ...]]) -> bool:
    """Whether two shapes take turns (a b a b). Stages do not, nor do those of a U-Net, which come back in reverse."""
    again = [shape for shape, count in collections.Counter(runs).items() if count > 1]
    return any(
        sum(1 for _ in itertools.groupby(shape for shape in runs if shape in pair)) > 3
        for pair in itertools.combinations(again, 2)
    )


def _place(row: Row) -> str:
    return row.name if row.repeat is None else f"{row.name}, pass {row.repeat + 1}"


def _sentence(propagation: Propagation, drift: Drift) -> str:
    what = "The signal" if drift.direction == "forward" else "The gradient signal"
    unit = "block" if propagation.select("sum") else "layer"
    if drift.first != drift.first and drift.verdict == "zero":
        return f"{what} was not measured."
    span = f"{drift.blocks} {unit}{'s' * (drift.blocks != 1)}"
    ends = f"second moment {drift.first:.3g} to {drift.last:.3g} over {span}"
    way = "" if drift.direction == "forward" else ", head to stem"
    match drift.verdict:
        case "flat":
            return f"{what} is flat: {ends}{way}."
        case "bounded":
            return f"{what} stays bounded: {ends}{way}."
        case "grows":
            return f"{what} grows by a factor of {drift.factor:.2f} a {unit}: {ends}{way}."
        case "vanishes":
            return f"{what} shrinks by a factor of {1 / (drift.factor or math.nan):.2f} a {unit}: {ends}{way}."
        case "overflows":
            return f"{what} overflows at {drift.where}: it holds values that are not finite in its dtype."
        case _:
            return f"{what} is exactly zero from {drift.where} on."


def _numbers(kind: type[_N], data: dict[str, Any] | None) -> _N | None:
    return None if data is None else kind(**{k: math.nan if v is None else v for k, v in data.items()})
