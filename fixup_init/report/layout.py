"""What the renderers share: folding, numbers and verdicts in words, and where a row lies on the depth axis."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import shutil
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal

from fixup_init.propagation import Direction, Drift, Propagation, Row, Statistics
from fixup_init.verdicts import Verdict, verdicts

__all__ = [
    "MARKS", "Line", "Pair", "Run", "axes_words", "fold", "line", "mean_share", "merged", "noted", "number", "pairs",
    "percent", "plural", "positions", "propagations", "render", "selection", "shape", "spaced", "state", "statistics",
    "terminal_width", "title", "unit", "verdicts_of", "words",
]  # fmt: skip

MARKS = {"error": "✖", "warning": "▲", "note": "●"}  # of a verdict, the gravest first


@dataclasses.dataclass(frozen=True)
class Run:
    """`period` items from `start` on, `count` times over."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count


def fold(keys: Sequence[Hashable], longest: int = 8) -> list[Run]:
    """Splits a sequence into runs of equal items, or of equal groups of up to `longest` items.

    The run that covers most is taken first, then what is left and right of it is split in the same way.

    Example:
      >>> [(r.start, r.period, r.count) for r in fold("xababababyzzz")]
      [(0, 1, 1), (1, 2, 4), (9, 1, 1), (10, 1, 3)]
    """
    numbers: dict[Hashable, int] = {}
    items = [numbers.setdefault(k, len(numbers)) for k in keys]
    runs, todo = [], [(0, len(items))]
    while todo:
        start, stop = todo.pop()
        if start == stop:
            continue
        run = _widest(items, start, stop, longest)
        if run is None:
            runs += [Run(k, 1, 1) for k in range(start, stop)]
        else:
            runs.append(run)
            todo += [(start, run.start), (run.stop, stop)]
    return sorted(runs, key=lambda r: r.start)


def _widest(items: list[int], start: int, stop: int, longest: int) -> Run | None:
    """The repetition that covers most of items[start:stop]; of equals the one of shorter period, then the first."""
    best: Run | None = None
    for period in range(1, min(longest, (stop - start) // 2) + 1):
        same = 0  # items before k that equal the one a period later
        for k in range(stop - period - 1, start - 1, -1):
            same = same + 1 if items[k] == items[k + period] else 0
            count = same // period + 1
            size = best.period * best.count if best else 0
            if count > 1 and (
                period * count > size or (best and period == best.period and period * count == size and k < best.start)
            ):
                best = Run(k, period, count)
    return best


_DIGITS = re.compile(r"(\d+)")


def merged(texts: Iterable[str]) -> str:
    """Texts that differ in numbers only, as one.

    Example:
      >>> merged(["layer1_0/conv", "layer1_2/conv", "layer1_1/conv"]), merged(["stem", "neck", "head"])
      ('layer1_{0..2}/conv', 'stem … head')
      >>> merged(["branch 1", "branch 3", "branch 5"])
      'branch {1,3..5}'
    """
    texts = list(texts)
    tokens = [_DIGITS.split(t) for t in texts]
    if len({tuple(t[::2]) for t in tokens}) > 1:
        home = texts[0].rpartition("/")[0]
        return f"{texts[0]} … {texts[-1].removeprefix(f'{home}/') if home else texts[-1]}"
    parts = []
    for k, column in enumerate(zip(*tokens, strict=True)):
        values = sorted(set(column), key=int) if k % 2 else [column[0]]
        if len(values) == 1:
            parts.append(values[0])
        else:
            gaps = int(values[-1]) - int(values[0]) >= len(values)
            start = f"{values[0]},{values[1]}" if gaps and len(values) > 2 else values[0]
            parts.append("{" + (",".join(values) if gaps and len(values) == 2 else f"{start}..{values[-1]}") + "}")
    return "".join(parts)


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits; a dash for what is not there.

    Example:
      >>> number(0.0), number(1234567.0), number(1.9e49), number(float("nan")), number(None)
      ('0', '1.23e6', '1.9e49', '–', '–')
    """
    if x is None or x != x:
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    text = f"{x:.{digits}g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def shape(sizes: Iterable[int]) -> str:
    """A shape as `8×32×32×3`, or `scalar`."""
    return "×".join(map(str, sizes)) or "scalar"


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def unit(propagation: Propagation, plural: bool = False) -> str:
    """What the depth axis counts."""
    name = "residual sum" if propagation.select("sum") else "weight layer"
    return name + "s" * plural


def words(propagation: Propagation, drift: Drift) -> str:
    """A verdict in a few words, for legends and tables."""
    each = "block" if propagation.select("sum") else "layer"
    if drift.verdict == "zero":
        return f"zero from {drift.where} on" if drift.where else "not measured"
    if drift.verdict == "overflows":
        return f"overflows at {drift.where}"
    if drift.verdict == "vanishes" and drift.factor:
        return f"shrinks ×{number(drift.factor)} a {each}"
    if drift.verdict == "grows":
        return f"grows ×{number(drift.factor)} a {each}"
    return f"{drift.verdict}, ×{number(drift.factor)} a {each}"


def statistics(row: Row, direction: Direction) -> Statistics | None:
    return row.forward if direction == "forward" else row.backward


def propagations(data: Propagation | Iterable[Propagation] | None) -> tuple[Propagation, ...]:
    """None, one or several, as several."""
    if data is None:
        return ()
    return (data,) if isinstance(data, Propagation) else tuple(data)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A propagation and the prediction that belongs to it, row for row.

    Attributes:
      own: what is shown; a prediction where nothing measured belongs to it.
      predicted: its prediction, if there is one.
    """

    own: Propagation
    predicted: Propagation | None = None

    @property
    def rows(self) -> list[tuple[Row, Row | None]]:
        """Each row with its prediction."""
        if self.predicted is None:
            return [(row, None) for row in self.own.rows]
        return list(zip(self.own.rows, self.predicted.rows, strict=True))

    @property
    def notes(self) -> list[str]:
        """What to know about the whole."""
        found = list(self.own.notes)
        if hidden := self.own.unmeasured:
            names = ", ".join(hidden[:4]) + (f" and {len(hidden) - 4} more" if len(hidden) > 4 else "")
            found.append(f"Not measured, inside of a platform_dependent, which runs as a whole: {names}.")
        if self.predicted is None:
            return found
        found += [f"Prediction: {note}" for note in self.predicted.notes]
        if self.own.probe != self.predicted.probe:
            found.append(
                f"The measured gradients start at the {self.own.probe}, the predicted ones at the "
                f"{self.predicted.probe}: they cannot be compared."
            )
        return found

    def note(self, row: Row, predicted: Row | None) -> str:
        """What to know about a row: of the measurement, then of the prediction."""
        return "; ".join(dict.fromkeys(n for n in (row.note, predicted.note if predicted else "") if n))


def pairs(
    data: Propagation | Iterable[Propagation], predicted: Propagation | Iterable[Propagation] | None = None
) -> tuple[Pair, ...]:
    """Propagations with the predictions that belong to them.

    A prediction belongs to the measured propagation that has its label (or its label without an end ", predicted") and
    the same rows; where only one of each is given, the rows are enough. A prediction that belongs to none stands alone.

    Args:
      data: what `fi.analyze`, `fi.compare` or `fi.predict` returned.
      predicted: predictions for them, beside those in `data`.
    """
    given = propagations(data)
    own = [one for one in given if one.kind == "measured"]
    waiting = [one for one in (*given, *propagations(predicted)) if one.kind == "predicted"]
    lone = len(own) == len(waiting) == 1
    found = []
    for one in own:
        rows = [_identity(r) for r in one.rows]
        names = {one.label, f"{one.label}, predicted"}
        fits = (p for p in waiting if (lone or p.label in names) and [_identity(r) for r in p.rows] == rows)
        mine = next(fits, None)
        waiting = [p for p in waiting if p is not mine]
        found.append(Pair(one, mine))
    return (*found, *map(Pair, waiting))


def _identity(row: Row) -> tuple[Hashable, ...]:
    return row.kind, row.name, row.repeat


def verdicts_of(pair: Pair) -> tuple[Verdict, ...]:
    """The verdicts on a propagation, the gravest first."""
    return verdicts(pair.own, pair.predicted)


def noted(pair: Pair) -> list[tuple[str, list[int]]]:
    """Each note once, with the indices of its rows."""
    found: dict[str, list[int]] = {}
    for k, (row, predicted) in enumerate(pair.rows):
        if note := pair.note(row, predicted):
            found.setdefault(note, []).append(k)
    return list(found.items())


def positions(propagation: Propagation) -> list[float]:
    """Where each row lies on the depth axis: stream rows at 1, 2, ..., the others evenly between their neighbours."""
    stream = {id(r) for r in propagation.stream}
    result: list[float] = []
    waiting, passed = 0, 0
    for row in propagation.rows:
        waiting += 1
        if id(row) in stream:
            result += [passed + k / waiting for k in range(1, waiting)] + [passed + 1.0]
            waiting, passed = 0, passed + 1
    return result + [passed + k / (waiting + 1) for k in range(1, waiting + 1)]


@dataclasses.dataclass(frozen=True)
class Line:
    """The stream's second moment over depth, for a figure with a logarithmic axis.

    Attributes:
      label: of the propagation.
      words: its verdict.
      x: depth of each measured row.
      y: its second moment; NaN where it is zero or not finite.
      zeros: depths at which it is zero.
      overflows: depths at which it is not finite.
      where: name of the row that overflows or becomes zero first, in the direction of the signal.
    """

    label: str
    words: str
    x: tuple[int, ...]
    y: tuple[float, ...]
    zeros: tuple[int, ...]
    overflows: tuple[int, ...]
    where: str | None


def line(propagation: Propagation, direction: Direction) -> Line:
    """The stream of a propagation in one direction."""
    points = [(k, s) for k, r in enumerate(propagation.stream, 1) if (s := statistics(r, direction)) is not None]
    known = [(k, s.second_moment, how) for k, s in points if (how := state(s)) != "unknown"]
    drift = propagation.drift(direction)
    return Line(
        label=propagation.label,
        words=words(propagation, drift),
        x=tuple(k for k, _, _ in known),
        y=tuple(m if how == "number" else math.nan for _, m, how in known),
        zeros=tuple(k for k, _, how in known if how == "zero"),
        overflows=tuple(k for k, _, how in known if how == "overflow"),
        where=drift.where,
    )


def state(s: Statistics) -> Literal["number", "zero", "overflow", "unknown"]:
    """What the second moment is."""
    if s.finite < 1 or math.isinf(s.second_moment):
        return "overflow"
    if math.isnan(s.second_moment):
        return "unknown"
    return "number" if s.second_moment > 0 else "zero"


def mean_share(s: Statistics) -> float:
    """The squared channel means as a share of the second moment; NaN where that is zero or not known."""
    return s.squared_channel_mean / s.second_moment if s.second_moment else math.nan


def percent(x: float | None) -> str:
    """A share as a whole percentage; a dash for what is not known.

    Example:
      >>> percent(0.123), percent(0.004), percent(0.0), percent(float("nan"))
      ('12%', '<1%', '0%', '–')
    """
    if x is None or x != x:
        return "–"
    return "<1%" if 0 < x < 0.005 else f"{100 * x:.0f}%"


def axes_words(s: Statistics) -> str:
    """Which axes the variance lies across, the largest share first; '' where none is known.

    Example:
      >>> axes_words(Statistics(0.0, 1.0, 0.2, example_share=0.25, channel_share=0.5))
      'channels 50%, examples 25%, combinations 25%'
    """
    shares = (("examples", s.example_share), ("channels", s.channel_share), ("positions", s.position_share))
    known = [x for x in shares if x[1] == x[1]]
    if not known:
        return ""
    known.append(("combinations", max(0.0, 1 - sum(x for _, x in known))))
    return ", ".join(f"{name} {percent(x)}" for name, x in sorted(known, key=lambda x: -x[1]))


def spaced(count: int, at_most: int) -> list[int]:
    """Indices from first to last, evenly spaced.

    Example:
      >>> spaced(5, 10), spaced(100, 4)
      ([0, 1, 2, 3, 4], [0, 33, 66, 99])
    """
    if count <= at_most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (at_most - 1)) for k in range(at_most)})


def title(row: Row) -> str:
    """The name of a row, with the pass through a scan body that it belongs to."""
    return row.name if row.repeat is None else f"{row.name}, pass {row.repeat + 1}"


def selection(propagation: Propagation, at_most: int) -> list[Row]:
    """All rows if they fit, else the inputs, evenly spaced rows of the stream, the first bad ones and the outputs."""
    if len(propagation) <= at_most:
        return list(propagation.rows)
    stream = propagation.stream
    chosen = {id(stream[k]) for k in spaced(len(stream), at_most - 4)}
    chosen |= {id(r) for r in propagation.select("input", "output")}
    for direction in ("forward", "backward"):
        rows = stream if direction == "forward" else stream[::-1]
        bad = [r for r in rows if (s := statistics(r, direction)) is not None and state(s) in ("zero", "overflow")]
        chosen |= {id(r) for r in bad[:1]}
    return [r for r in propagation.rows if id(r) in chosen]


def terminal_width() -> int:
    """Columns of the terminal, between 80 and 140; 100 where there is none."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 80), 140)


def render(*renderables: Any, width: int | None = None) -> str:
    """Text of rich renderables, without colours and without blanks at the ends of lines."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out, width=width or terminal_width(), color_system=None, force_terminal=False, force_jupyter=False,
        force_interactive=False, highlight=False, markup=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    for one in renderables:
        console.print(one)
    return "\n".join(part.rstrip() for part in out.getvalue().splitlines()).strip("\n")
