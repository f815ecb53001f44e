"""Propagation -> Verdicts: what the rows say in words, and what would help. One small function for each rule.

A rule reads numbers only. It stays silent where a figure is not known (NaN), and where what looks wrong is meant to be
so: zero branches and a zero head at initialization, and the linear growth of a sum of normalized branches.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from fixup_init.propagation import Direction, Propagation, Row, Statistics

__all__ = ["Kind", "Severity", "Verdict", "layers_of", "name_of", "passed", "verdicts"]

Severity = Literal["error", "warning", "note"]
Kind = Literal[
    "overflow", "zero_signal", "dead", "growth", "vanishing", "near_overflow", "rank_collapse", "mean_shift",
    "saturation", "zero_gradient", "gradient_scale", "prediction", "wide_axis",
]  # fmt: skip

# By so much a second moment may change, at the ends and as the median over blocks has it. A sum of n branches of equal
# size, as with batch norm (De & Smith 2020, Sec. 2), grows n-fold by nature: half of its blocks grow by less than
# 1 + 2/n, which makes e^2 = 7.4 in all. Growth by a factor a block leaves any bound.
STEADY = 16.0
# From a hundredfold second moment, tenfold magnitude, training at an ordinary rate suffers: a note becomes a warning.
STRONG = 100.0
# Half-precision values have a tail: of a million normal ones the largest is 5 standard deviations out.
HEADROOM = 8.0
# Of the second moment at the end of the stream. A wide relu MLP with He's variance, which trains, has 0.87 after 10
# layers, 0.95 after 20 and 0.99 after 60 (Cho & Saul 2009, the arc-cosine kernel iterated).
MEAN_SHARE, MEAN_SHARE_STRONG = 0.95, 0.99
# Mean cosine of the angle between examples, and where inputs must have been for the network to be the cause.
ALIKE, APART = 0.99, 0.9
# Effective rank of 64 vectors, start over end: skips lose directions slowly, layers without them with each product.
RANK_LOSS, RANK_LOSS_SKIPS = 4.0, 8.0
# relu passes half of its inputs at initialization; layers of 16 units and up stray by less than a fifth.
DEAD = 0.95
# tanh within 1 % of its range from a limit has at most a twenty-fifth of the derivative in its middle.
SATURATED, SATURATED_STRONG = 0.25, 0.5
# Of a layer's gradient norm over its parameter norm against the median layer: no one rate serves both.
GRADIENT_SCALE = 1000.0
# Of the stream's second moment; a branch below it is scaled down on purpose.
FAINT = 1e-3
# A gap that is worth telling; and by how many standard deviations it has to exceed what one network of finite width may
# stray. log q of a narrow network has the mean -s^2 / 2 (Hanin & Nica 2018), which counts besides.
PREDICTED, PREDICTED_STRONG = 1.5, 4.0
STRAYS = 3.0
# Of the logarithm of the whole growth: fifty blocks that triple the signal, each 3 % off, end 4 times apart, though
# theory has the growth right.
PREDICTED_SHARE = 0.1
# An axis holds most of the variance.
WIDE = 0.5

# Largest finite value by dtype.
_LARGEST = {
    "float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38, "float64": 1.7976e308, "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
}  # fmt: skip
_WHOLE = ("output", "loss")  # probes whose gradient passes the head
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


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


def verdicts(propagation: Propagation, predicted: Propagation | None = None) -> tuple[Verdict, ...]:
    """What a propagation says: what is wrong, where, by which factor, and what would help.

    Args:
      propagation: what `fi.analyze` or `fi.predict` returned.
      predicted: what `fi.predict` returned for the same model, inputs and scheme; where both are given they are
        compared.

    Returns:
      Verdicts, worst first; none for a network in order.

    Raises:
      ValueError: the rows of `predicted` are not those of `propagation`.

    Example:
      >>> from fixup_init.propagation import Propagation, Row, Statistics
      >>> rows = [Row("sum", f"sum {k + 1}", "", k + 1, (8, 16), "float32", None, Statistics(0.0, 2.0**k, 0.0))
      ...         for k in range(20)]
      >>> [(v.kind, v.severity, v.factor) for v in verdicts(Propagation("he", "net", 20, tuple(rows)))]
      [('growth', 'warning', 2.0)]
    """
    rules = [
        _overflow, _zero_signal, _dead, _drifts, _near_overflow, _rank_collapse, _mean_shift, _saturation,
        _zero_gradients, _gradient_scales, _wide_axis,
    ]  # fmt: skip
    found = [v for rule in rules for v in rule(propagation)]
    if predicted is not None:
        found += _prediction(propagation, predicted)
    return tuple(sorted(found, key=lambda v: _ORDER[v.severity]))


# --- growth of the stream -------------------------------------------------------------------------------------------


def _drifts(propagation: Propagation) -> Iterator[Verdict]:
    """Growth and vanishing of the stream a block, forward and backward."""
    for direction in _DIRECTIONS:
        rows = passed(propagation, direction)
        drift = dataclasses.replace(propagation, rows=tuple(propagation.rows[k] for k in sorted(rows))).drift(direction)
        if drift.blocks < 1 or not drift.factor:
            continue
        total = drift.last / drift.first
        # Both the ends and most blocks must say so: one wide layer is no trend, nor are resets at stages.
        steady = drift.blocks * math.log(drift.factor)
        size = min(abs(math.log(total)), abs(steady)) if math.log(total) * steady > 0 else 0.0
        sums = bool(propagation.select("sum"))
        if size <= math.log(STEADY):
            continue
        grows, strong = total > 1, size >= math.log(STRONG)
        unit = "block" if sums else "layer"
        what = "signal" if direction == "forward" else "gradient signal"
        a_block = drift.factor if grows else 1 / drift.factor
        does = ("explodes" if grows else "vanishes") if strong else "drifts"
        text = (
            f"The {what} {does}: its second moment {'grows' if grows else 'shrinks'} by "
            f"a factor of {a_block:.2f} a {unit}, from {drift.first:.3g} at {name_of(propagation.rows[rows[0]])} to "
            f"{drift.last:.3g} at {name_of(propagation.rows[rows[-1]])}, over {drift.blocks} {unit}"
            f"{'s' * (drift.blocks != 1)}{_by_stage(propagation, rows, direction)}."
        ) + (_ahead(propagation.rows[rows[-1]], drift.last, drift.factor, drift.blocks, unit) if grows else "")
        yield Verdict(
            "growth" if grows else "vanishing", direction, "warning" if strong else "note", text,
            rows, drift.factor, _against_drift(propagation, direction, grows),
        )  # fmt: skip


def passed(propagation: Propagation, direction: Direction) -> tuple[int, ...]:
    """The rows of the stream that are not zero, in the direction of the signal, up to where it is no longer finite."""
    stream = {id(r) for r in propagation.stream}
    order = [k for k in _order(propagation, direction) if id(propagation.rows[k]) in stream]
    finite = itertools.takewhile(lambda k: not _overflows(propagation.rows[k], direction), order)
    return tuple(k for k in finite if 0 < _moment(propagation.rows[k], direction) < math.inf)


def _by_stage(propagation: Propagation, rows: Sequence[int], direction: Direction) -> str:
    """Where: the growth within each stage of equal shape, and where the signal has changed tenfold."""
    words = ""
    first = _moment(propagation.rows[rows[0]], direction)
    tenfold = [k for k in rows if not 0.1 < _moment(propagation.rows[k], direction) / first < 10]
    if tenfold:
        words += f", tenfold by {name_of(propagation.rows[tenfold[0]])}"
    stages = [tuple(g) for _, g in itertools.groupby(rows, key=lambda k: propagation.rows[k].shape)]
    stages = [s for s in stages if len(s) > 1]
    if propagation.select("sum") and 1 < len(stages) <= 6:
        parts = []
        for stage in stages:
            moments = [_moment(propagation.rows[k], direction) for k in stage]
            factor = statistics.median(b / a for a, b in itertools.pairwise(moments))
            parts.append(
                f"{factor:.2f} from {name_of(propagation.rows[stage[0]])} to {name_of(propagation.rows[stage[-1]])}"
            )
        words += "; within stages by " + ", ".join(parts)
    return words


def _ahead(row: Row, last: float, factor: float, blocks: int, unit: str) -> str:
    """When the same growth leaves the range of the dtype, if that is within sight."""
    limit = _LARGEST.get(row.dtype)
    if limit is None or factor <= 1:
        return ""
    more = math.ceil((2 * math.log(limit / HEADROOM) - math.log(last)) / math.log(factor))
    if not 0 < more <= 100 * blocks:
        return ""
    return f" At this rate it leaves the range of {row.dtype} {more} {unit}{'s' * (more != 1)} further on."


def _against_drift(propagation: Propagation, direction: Direction, grows: bool) -> str:
    if not propagation.select("sum"):
        mode = "" if direction == "forward" else "_fan_out"
        layers = _listed(r.name for r in propagation.select("weight"))
        return f"{_init(_gain(propagation) + mode)} keeps the second moment from layer to layer ({layers})."
    branches = [r for r in propagation.select("branch") if r.forward is not None]
    if grows and branches and all(r.forward.second_moment == 0 for r in branches if r.forward):
        layers = _listed(r.name for r in propagation.select("weight") if r.weight and r.weight.parameter_norm > 0)
        return f"The branches are zero, so it comes from what lies on the skips: among {layers}."
    if grows:
        ends = [k for b in _rows_of(propagation, "branch") if (k := _before(propagation, b, "weight")) is not None]
        layers = _listed(propagation.rows[k].name for k in ends)
        return (
            f"{_init('fixup')} starts each branch at zero, by its last layer or the scale behind it ({layers}), and "
            "scales the layers before by L^(-1/(2m-2))."
        )
    return (
        "The skips shrink the stream: a constant that multiplies them in the model has to become 1; where they are "
        f"projections, {_init('he_normal')} keeps their second moment."
    )


def _gain(propagation: Propagation) -> str:
    """The family for a network without sums: LeCun where it is linear; He for relu, and for tanh, which bounds it."""
    return "he_normal" if propagation.select("nonlinearity") else "lecun_normal"


# --- range of the dtype ---------------------------------------------------------------------------------------------


def _overflow(propagation: Propagation) -> Iterator[Verdict]:
    """The first tap in each direction that is not finite, or beyond its dtype in a prediction."""
    for direction in _DIRECTIONS:
        order = _order(propagation, direction)
        bad = [k for k in order if _overflows(propagation.rows[k], direction)]
        if not bad:
            continue
        row = propagation.rows[bad[0]]
        s = _of(row, direction)
        assert s is not None
        before = [r for k in order[: order.index(bad[0])] if (r := propagation.rows[k]) and _rms(r, direction) > 0]
        largest = max(before, key=functools.partial(_rms, direction=direction), default=None)
        what = "signal" if direction == "forward" else "gradient signal"
        lost = "less than 1%" if s.finite > 0.99 else f"{1 - s.finite:.0%}"
        held = f"{lost} of its values are not finite" if s.finite < 1 else f"rms {_rms(row, direction):.3g}"
        text = f"The {what} overflows {row.dtype} first at {_where(propagation, bad[0])}: {held}"
        limit = _LARGEST.get(row.dtype, math.inf)
        if largest is not None:
            rms = _rms(largest, direction)
            text += f"; before it {name_of(largest)} has rms {rms:.3g}"
            if s.finite < 1 and rms**2 < limit**0.5:
                text += ", far from the limit: rather an undefined operation (0/0, log or root) than growth"
        text += f". {len(bad)} of {len(order)} taps are concerned."
        help_ = _against_drift(propagation, direction, True)
        if row.dtype in ("float16", "float8_e4m3fn", "float8_e5m2"):
            help_ += f" bfloat16 has the range of float32; {row.dtype} ends at {limit:g}."
        yield Verdict("overflow", direction, "error", text, tuple(bad), None, help_)


def _near_overflow(propagation: Propagation) -> Iterator[Verdict]:
    """Values whose tail reaches the limit of the dtype."""
    near = [
        k for k, r in enumerate(propagation.rows)
        if not _overflows(r, "forward") and _rms(r, "forward") * HEADROOM > _LARGEST.get(r.dtype, math.inf)
    ]  # fmt: skip
    if near:
        row = propagation.rows[near[0]]
        limit = _LARGEST[row.dtype]
        rms = _rms(row, "forward")
        text = (
            f"The signal comes close to the limit of {row.dtype}, {limit:g}, first at {_where(propagation, near[0])}"
            f": rms {rms:.3g}, so that values {limit / rms:.2g} standard deviations out overflow. {len(near)} of "
            f"{len(propagation)} taps are concerned."
        )
        advice = f"Compute {name_of(row)} in bfloat16 or float32. {_against_drift(propagation, 'forward', True)}"
        yield Verdict("near_overflow", "forward", "warning", text, tuple(near), limit / rms, advice)


# --- what the signal still says -------------------------------------------------------------------------------------


def _zero_signal(propagation: Propagation) -> Iterator[Verdict]:
    """A stream that is exactly zero from some row on, unless a zero head makes it so."""
    head = set(_zero_head(propagation))
    stream = {id(r) for r in propagation.stream}
    for direction in _DIRECTIONS:
        order = [
            k for k in _order(propagation, direction)
            if id(propagation.rows[k]) in stream and not math.isnan(_moment(propagation.rows[k], direction))
        ]  # fmt: skip
        last = max((i for i, k in enumerate(order) if _moment(propagation.rows[k], direction) != 0), default=-1)
        zero = order[last + 1 :]
        if not zero or (head and (direction == "backward" or set(zero) <= head)):
            continue
        what, where = "signal" if direction == "forward" else "gradient signal", name_of(propagation.rows[zero[0]])
        yield Verdict(
            "zero_signal", direction, "error",
            f"The {what} is exactly zero from {where}, block {propagation.rows[zero[0]].block}, on to the "
            f"{'output' if direction == 'forward' else 'input'}: {len(zero)} of {len(order)} values of the stream.",
            tuple(zero), 0.0,
            f"Look at {where} and the layers around it for zero kernels or dead units; {_init(_gain(propagation))} "
            "draws every kernel.",
        )  # fmt: skip


def _dead(propagation: Propagation) -> Iterator[Verdict]:
    """Nonlinearities that are off for nearly all units and data, though something enters them."""
    off = {k: _off(propagation, k) for k in _rows_of(propagation, "nonlinearity")}
    dead = [k for k, share in off.items() if share >= DEAD]
    if not dead:
        return
    shares = [off[k] for k in dead]
    whole = [k for k in dead if off[k] == 1]
    first = whole[0] if whole else dead[0]
    feeds = [f for k in dead if (f := _before(propagation, k, "weight")) is not None]
    if whole:
        text = (
            f"{_where(propagation, first)}, is dead: its output is zero for all units and all data. {len(whole)} of "
            f"{len(off)} nonlinearities are."
        )
    else:
        text = (
            f"{len(dead)} of {len(off)} nonlinearities are nearly dead: up to {max(shares):.1%} of their outputs are "
            f"zero, first at {_where(propagation, first)}."
        )
    advice = (
        f"Biases that are far below zero or kernels of one sign do this; {_init(_gain(propagation))} sets biases to 0 "
        f"and draws kernels of mean 0: {_listed(propagation.rows[f].name for f in feeds)}."
    )
    yield Verdict("dead", "forward", "error" if whole else "warning", text, tuple(dead), max(shares), advice)


def _off(propagation: Propagation, index: int) -> float:
    """Share of a nonlinearity's outputs that are zero, of those whose input is not (padded channels, zero branches)."""
    s, source = propagation.rows[index].forward, _before(propagation, index, "weight", "norm", "sum", "branch", "input")
    before = propagation.rows[source].forward if source is not None else None
    silent = before.zeros if before is not None and before.zeros == before.zeros else 0.0
    if s is None or silent == 1 or (before is not None and before.second_moment == 0):
        return math.nan
    return (s.zeros - silent) / (1 - silent)


def _saturation(propagation: Propagation) -> Iterator[Verdict]:
    """Bounded nonlinearities at their limits; zeros (of relu6) count as off, not as saturated."""
    shares: dict[int, float] = {}
    for k in _rows_of(propagation, "nonlinearity"):
        s = propagation.rows[k].forward
        if s is not None and s.saturated == s.saturated:
            shares[k] = s.saturated - (s.zeros if s.zeros == s.zeros else 0.0)
    rows = tuple(k for k, share in shares.items() if share >= SATURATED)
    if not rows:
        return
    worst = max(rows, key=lambda k: shares[k])
    feeds = [f for k in rows if (f := _before(propagation, k, "weight")) is not None]
    text = (
        f"{len(rows)} of {len(shares)} bounded nonlinearities are saturated: {shares[worst]:.1%} of the outputs of "
        f"{_where(propagation, worst)}, lie within 1 % of a limit, where the derivative is near zero. The first is "
        f"{_where(propagation, rows[0])}."
    )
    advice = (
        f"{_init('lecun_normal')} gives pre-activations a second moment near 1: "
        f"{_listed(propagation.rows[f].name for f in feeds)}."
    )
    severity = "warning" if shares[worst] >= SATURATED_STRONG else "note"
    yield Verdict("saturation", "forward", severity, text, rows, shares[worst], advice)


def _rank_collapse(propagation: Propagation) -> Iterator[Verdict]:
    """Examples that become alike with depth, or channel vectors that lose their directions though examples differ."""
    inputs = _rows_of(propagation, "input")
    stream = _unpooled(propagation)
    rows = [k for k in (*inputs, *stream) if _known(propagation.rows[k], "example_cosine", "effective_rank")]
    if len(rows) < 3:
        return
    layers = _ends(propagation) if propagation.select("sum") else [r.name for r in propagation.select("weight")]
    help_ = (
        f"{_init('fixup')} lets the skips dominate at the start: {_listed(layers)}."
        if propagation.select("sum")
        else f"A skip around these layers keeps their inputs apart, with {_init('fixup')}: {_listed(layers)}."
    )
    first, last = propagation.rows[rows[0]], propagation.rows[rows[-1]]
    start, end = _stats(first).example_cosine, _stats(last).example_cosine
    if end >= ALIKE and start <= APART:
        yield Verdict(
            "rank_collapse", "forward", "warning",
            f"Examples become alike with depth: the mean cosine of the angle between two goes from {start:.3f} at "
            f"{name_of(first)} to {end:.4f} at {name_of(last)}.",
            tuple(rows), (1 - start) / max(1 - end, 1e-12), help_,
        )  # fmt: skip
        return
    # Ranks compare at one shape. A direction that all vectors share (the mean behind relu) leaves a rank of 1/share^2.
    loss = RANK_LOSS_SKIPS if propagation.select("sum") else RANK_LOSS
    lost: dict[float, tuple[int, int]] = {}
    for shape in {propagation.rows[k].shape for k in rows}:
        same = [k for k in rows if propagation.rows[k].shape == shape]
        before, after = _stats(propagation.rows[same[0]]), _stats(propagation.rows[same[-1]])
        shared = max(after.example_cosine, _mean_share(after), 0.0)
        explained = min(before.effective_rank, 1 / shared**2 if shared else math.inf)
        if len(same) > 2 and after.effective_rank * loss <= explained:
            lost[explained / after.effective_rank] = same[0], same[-1]
    if lost:
        a, b = lost[max(lost)]
        before, after = _stats(propagation.rows[a]).effective_rank, _stats(propagation.rows[b]).effective_rank
        yield Verdict(
            "rank_collapse", "forward", "warning",
            f"The representation collapses with depth: the effective rank of channel vectors falls from {before:.3g} "
            f"at {name_of(propagation.rows[a])} to {after:.3g} at {name_of(propagation.rows[b])}.",
            tuple(k for k in rows if propagation.rows[k].shape == propagation.rows[a].shape), before / after, help_,
        )  # fmt: skip


def _unpooled(propagation: Propagation) -> list[int]:
    """The stream without the layers behind a pooling, which makes examples alike where the data is noise."""
    rows = [k for k in passed(propagation, "forward") if len(propagation.rows[k].shape) > 1]
    return [k for k in rows if len(propagation.rows[k].shape) >= len(propagation.rows[rows[0]].shape)]


def _mean_shift(propagation: Propagation) -> Iterator[Verdict]:
    """A signal that is mostly the same for all inputs: squared channel means as a share of the second moment."""
    # A mean over fewer than 4 values is no mean: a batch of one vector has a share of 1.
    rows = [k for k in _unpooled(propagation) if math.prod(propagation.rows[k].shape[:-1]) >= 4]
    if len(rows) < 2:
        return
    shares = [_mean_share(_stats(propagation.rows[k])) for k in rows]
    inputs = [_mean_share(s) for r in propagation.select("input") if (s := r.forward) and s.second_moment > 0]
    start = max(min(inputs, default=shares[0]), 0.0)
    if not (shares[-1] >= MEAN_SHARE and 1 - shares[-1] <= 0.2 * (1 - start)):
        return
    first = next(k for k, share in zip(rows, shares, strict=True) if share >= MEAN_SHARE)
    text = (
        f"The mean shifts with depth: squared channel means are {shares[-1]:.1%} of the second moment at "
        f"{name_of(propagation.rows[rows[-1]])} ({start:.1%} at the input, above {MEAN_SHARE:.0%} from "
        f"{name_of(propagation.rows[first])} on): the rest, {1 - shares[-1]:.2g}, is all that depends on the input."
    )
    layers = _ends(propagation) or [r.name for r in propagation.select("weight")]
    advice = (
        f"{_init('fixup')} keeps the branches from adding to it at the start: {_listed(layers)}."
        if propagation.select("sum")
        else "A nonlinearity of mean zero (tanh) or a skip around the layers keeps it from building up: "
        f"{_listed(layers)}."
    )
    severity = "warning" if shares[-1] >= MEAN_SHARE_STRONG else "note"
    yield Verdict("mean_shift", "forward", severity, text, tuple(rows), shares[-1], advice)


# --- gradients of weights -------------------------------------------------------------------------------------------


def _zero_gradients(propagation: Propagation) -> Iterator[Verdict]:
    """Layers whose gradient is exactly zero: behind a zero branch or head as they should be, or for no such reason.

    A zero head leaves a gradient to nothing but itself in the first update; the second one reaches the stem, shortcuts
    and the last layers of branches; the layers before these move from the third on (Zhang et al. 2019, Sec. 3).
    """
    rows = propagation.rows
    head = _zero_head(propagation)
    weights = [k for k in _rows_of(propagation, "weight") if k not in head and rows[k].forward is not None]
    zero = [k for k in weights if _gradient(rows[k]) == 0]
    if head and propagation.probe in _WHOLE:
        ends = [k for k in zero if (w := rows[k].weight) is not None and w.parameter_norm == 0]
        first = f", {_listed(rows[k].name for k in ends)} among them" if ends else ""
        yield Verdict(
            "zero_gradient", "backward", "note",
            f"The head ({_listed(rows[k].name for k in head)}) is zero, so that {_layers(len(zero))} of "
            f"{len(weights) + len(head)} have a gradient of exactly zero at step 0. This is expected: the head moves "
            f"at step 0, what is outside of branches or at their ends from step 1 on{first}, and zero gradient is "
            "expected until step 2 for layers behind a zero one.",
            tuple(zero), None, 'To see the gradients behind the head, measure with probe="head".',
        )  # fmt: skip
        return
    dead = {k for v in _dead(propagation) if v.severity == "error" for k in v.rows}
    branches, inside = bool(propagation.select("branch")), []
    for k in zero:
        end = _after(propagation, k, "branch", stop="sum") if branches else None
        if end is not None and _moment(rows[end], "forward") == 0 and not any(k < d < end for d in dead):
            inside.append(k)
    wrong = [k for k in zero if k not in inside]
    if head:
        others = [k for k in weights if k < head[0] and _gradient(rows[k]) > 0]
        yield Verdict(
            "zero_gradient", "backward", "note",
            f"The head ({_listed(rows[k].name for k in head)}) is zero, so at step 0 the gradient of a loss is zero "
            f"for every other layer ({propagation.kind} from the {propagation.probe}, it is not). This is expected: "
            f"the head moves at step 0; from step 1 on {_layers(len(others))} outside of branches or at their ends "
            f"({_listed(rows[k].name for k in others)}).",
            tuple(others),
        )  # fmt: skip
    if inside:
        step = 1 if head else 0
        yield Verdict(
            "zero_gradient", "backward", "note",
            f"{_have(inside)} a gradient of exactly zero, in zero branches: {_listed(rows[k].name for k in inside)}. "
            f"This is expected: what holds a branch at zero moves at step {step}, and zero gradient is expected until "
            f"step {step + 1}, from which on they move.",
            tuple(inside),
        )  # fmt: skip
    if wrong:
        yield Verdict(
            "zero_gradient", "backward", "warning",
            f"{_have(wrong)} a gradient of exactly zero and no zero branch or head behind: "
            f"{_listed(rows[k].name for k in wrong)}. Such a layer does not learn.",
            tuple(wrong), 0.0,
            "Look behind the first of them for dead units, a saturated softmax, a stop_gradient or a zero kernel.",
        )  # fmt: skip


def _gradient(row: Row) -> float:
    """Norm of a layer's gradient; where it is not known, 0 if no cotangent arrives."""
    if row.weight is not None:
        return row.weight.gradient_norm
    return _rms(row, "backward")


def _gradient_scales(propagation: Propagation) -> Iterator[Verdict]:
    """Layers whose gradient over parameter norm is orders away from the others': one rate cannot serve both."""
    branches = bool(propagation.select("branch"))
    ratios = {
        k: r.weight.ratio
        for k, r in enumerate(propagation.rows)
        if r.weight is not None and 0 < r.weight.ratio < math.inf and not (branches and _is_faint(propagation, k))
    }
    if len(ratios) < 3:
        return
    middle = statistics.median(ratios.values())
    far = {k: ratio for k, ratio in ratios.items() if not 1 / GRADIENT_SCALE < ratio / middle < GRADIENT_SCALE}
    if far:
        worst = max(far, key=lambda k: abs(math.log(far[k] / middle)))
        text = (
            f"Gradient norm over parameter norm differs by orders between layers: {middle:.3g} for the median layer, "
            f"{ratios[worst]:.3g} for {propagation.rows[worst].name}. {len(far)} of {len(ratios)} layers are more than "
            f"{GRADIENT_SCALE:g} times away from the median: {_listed(propagation.rows[k].name for k in far)}."
        )
        advice = (
            f"{_init('fixup' if propagation.select('sum') else _gain(propagation))} balances layers at the start; an "
            "optimizer that scales each update (Adam) or rates by layer serve what remains."
        )
        yield Verdict("gradient_scale", "backward", "warning", text, tuple(far), ratios[worst] / middle, advice)


def _is_faint(propagation: Propagation, index: int) -> bool:
    """Whether a layer is in a branch that is meant to start near zero, as with LayerScale (Touvron et al. 2021)."""
    end = _after(propagation, index, "branch", stop="sum")
    total = _after(propagation, index, "sum", stop="output")
    if end is None or total is None:
        return False
    rows = propagation.rows
    return _moment(rows[end], "forward") < FAINT * _moment(rows[total], "forward")


# --- theory, and which axis varies ----------------------------------------------------------------------------------


def _prediction(propagation: Propagation, predicted: Propagation) -> Iterator[Verdict]:
    """Measured second moments far from the predicted ones, and the row in which the two part."""
    theirs = [(r.kind, r.name) for r in predicted.rows]
    if [(r.kind, r.name) for r in propagation.rows] != theirs:
        raise ValueError(
            f"predicted={predicted.label!r} has {len(predicted)} rows and propagation={propagation.label!r} "
            f"{len(propagation)}, or others: expected one for one. Give fi.predict the model, inputs and "
            "normalization= of fi.analyze."
        )
    for direction in _DIRECTIONS:
        ratios, allowed = dict[int, float](), dict[int, float]()
        for k in _order(propagation, direction):
            mine, other = _moment(propagation.rows[k], direction), _moment(predicted.rows[k], direction)
            if math.isfinite(mine) and math.isfinite(other) and (mine or other):
                ratios[k] = mine / other if other else math.inf
                allowed[k] = _strays(predicted.rows[k], direction)
        far = [k for k, ratio in ratios.items() if not 1 / allowed[k] <= ratio <= allowed[k]]
        if not far:
            continue
        beyond = {k: abs(math.log(ratios[k])) if 0 < ratios[k] < math.inf else math.inf for k in far}
        worst = max(far, key=lambda k: beyond[k] - math.log(allowed[k]))
        first, what = far[0], "second moment" if direction == "forward" else "second moment of the gradient"
        size = beyond[worst]
        text = (
            f"The measured {what} parts from the predicted one at {_where(propagation, first)}: "
            f"{_moment(propagation.rows[first], direction):.3g} measured, "
            f"{_moment(predicted.rows[first], direction):.3g} predicted. {len(far)} of {len(ratios)} rows are further "
            f"apart than the widths of the layers on the way explain, which is {allowed[first]:.3g} times there; most "
            f"{_where(propagation, worst)}, by {_times(ratios[worst])}, where they explain {allowed[worst]:.3g}."
        )
        advice = (
            "Look whether parameters are those of the scheme that was predicted, and measure with other keys. Where it "
            "stays, what the prediction takes as independent at that row is not, and the measurement is right."
        )
        stream = [_moment(propagation.rows[k], direction) for k in passed(propagation, direction)]
        grown = abs(math.log(max(stream) / min(stream))) if stream else 0.0
        strong = size > max(math.log(PREDICTED_STRONG * allowed[worst] / PREDICTED), PREDICTED_SHARE * grown)
        severity = "warning" if strong else "note"
        yield Verdict("prediction", direction, severity, text, tuple(far), ratios[worst], advice)


def _strays(row: Row, direction: Direction) -> float:
    """How many times one network of finite width may lie above or below a predicted second moment."""
    s = _of(row, direction)
    spread = s.spread if s is not None and s.spread == s.spread else 0.0
    return max(PREDICTED, math.exp(min(STRAYS * spread + spread**2 / 2, 700.0)))


def _wide_axis(propagation: Propagation) -> Iterator[Verdict]:
    """The axis that holds most of the variance of what normalizations see (or, without them, of the sums)."""
    entering = [k - 1 for k in _rows_of(propagation, "norm") if k and propagation.rows[k - 1].kind in ("weight", "sum")]
    rows = [
        k
        for k in entering or _rows_of(propagation, "sum")
        if _known(propagation.rows[k], *(f"{axis}_share" for axis in _AXES))
    ]
    if not rows:
        return
    medians = {
        axis: statistics.median(getattr(_stats(propagation.rows[k]), f"{axis}_share") for k in rows) for axis in _AXES
    }
    widest = max(medians, key=lambda axis: medians[axis])
    if medians[widest] < WIDE:
        return
    shares = ", ".join(f"{share:.0%} across {axis}s" for axis, share in medians.items())
    where = f"what enters the {len(rows)} normalizations" if entering else f"the {len(rows)} residual sums"
    text = f"Most variance of {where} lies across {widest}s (medians: {shares}). {_AXES[widest]}"
    yield Verdict("wide_axis", "forward", "note", text, tuple(rows), medians[widest])


# Statistics over an axis that holds most of the variance are nearly those over all axes, and cost no batch.
_AXES = {
    "example": "Only statistics over the batch see it: no normalization within an example stands in for batch norm.",
    "channel": "Statistics over the channels of one example see most of it: layer norm or group norm is the cheap "
    "alternative to batch norm for the scale; what differs between channels for all examples alike stays.",
    "position": "Statistics over the positions of one example see most of it: instance norm is the cheap alternative "
    "to batch norm.",
}  # fmt: skip


# --- reading rows ---------------------------------------------------------------------------------------------------


def _of(row: Row, direction: Direction) -> Statistics | None:
    return row.forward if direction == "forward" else row.backward


def _stats(row: Row) -> Statistics:
    assert row.forward is not None
    return row.forward


def _moment(row: Row, direction: Direction) -> float:
    s = _of(row, direction)
    return math.nan if s is None else s.second_moment


def _rms(row: Row, direction: Direction) -> float:
    moment = _moment(row, direction)
    return math.sqrt(moment) if moment >= 0 else math.nan


def _mean_share(s: Statistics) -> float:
    return s.squared_channel_mean / s.second_moment if s.second_moment > 0 else math.nan


def _overflows(row: Row, direction: Direction) -> bool:
    s = _of(row, direction)
    return s is not None and (s.finite < 1 or _rms(row, direction) > _LARGEST.get(row.dtype, math.inf))


def _known(row: Row, *figures: str) -> bool:
    return row.forward is not None and not any(math.isnan(getattr(row.forward, name)) for name in figures)


def _order(propagation: Propagation, direction: Direction) -> list[int]:
    """All rows in the direction of the signal."""
    order = list(range(len(propagation)))
    return order if direction == "forward" else order[::-1]


def _rows_of(propagation: Propagation, *kinds: str) -> list[int]:
    return [k for k, r in enumerate(propagation.rows) if r.kind in kinds]


def _before(propagation: Propagation, index: int, *kinds: str) -> int | None:
    """The nearest row before one, of these kinds."""
    return next((k for k in range(index - 1, -1, -1) if propagation.rows[k].kind in kinds), None)


def _after(propagation: Propagation, index: int, kind: str, stop: str) -> int | None:
    """The nearest row after one, of this kind, but not beyond one of kind `stop`."""
    for k in range(index + 1, len(propagation)):
        if propagation.rows[k].kind == kind:
            return k
        if propagation.rows[k].kind == stop:
            return None
    return None


def _zero_head(propagation: Propagation) -> tuple[int, ...]:
    """Zero layers behind the last sum (or, without sums, the last layer), which hold the output at zero."""
    sums = _rows_of(propagation, "sum")
    weights = [k for k in _rows_of(propagation, "weight") if not sums or k > sums[-1]]
    if not sums:
        weights = weights[-1:]
    zero = [k for k in weights if (w := propagation.rows[k].weight) is not None and w.parameter_norm == 0]
    if zero:
        return tuple(zero)
    # Where norms are not known (the probe is behind the head, or a prediction): what gives zero, though it is fed.
    fed = [
        k for k in (sums or _rows_of(propagation, "weight")[:-1])[-1:] if _moment(propagation.rows[k], "forward") > 0
    ]
    return tuple(k for k in weights if fed and _moment(propagation.rows[k], "forward") == 0)


def _ends(propagation: Propagation) -> list[str]:
    """The last layer of each branch."""
    ends = (_before(propagation, k, "weight") for k in _rows_of(propagation, "branch"))
    return [propagation.rows[k].name for k in ends if k is not None]


# --- words ----------------------------------------------------------------------------------------------------------


def name_of(row: Row) -> str:
    """The name of a row, with the pass through a scan body that it belongs to."""
    name = row.name or row.kind  # a tree of one parameter has no path
    return name if row.repeat is None else f"{name}, pass {row.repeat + 1}"


def _where(propagation: Propagation, index: int) -> str:
    """A row and its block; nonlinearities and norms, whose names repeat, with the layer before."""
    row = propagation.rows[index]
    layer = _before(propagation, index, "weight") if row.kind in ("nonlinearity", "norm") else None
    behind = f" behind {propagation.rows[layer].name}" if layer is not None else ""
    return f"{name_of(row)}{behind}, block {row.block}"


def layers_of(propagation: Propagation, index: int, direction: Direction) -> str:
    """The weight layers that the signal has just passed at a row of the stream: of the block before it, or behind."""
    row = propagation.rows[index]
    if row.kind == "weight":
        return row.name
    block = row.block - 1 if direction == "forward" else row.block
    return _listed(r.name for r in propagation.select("weight") if r.block == block) or "no weight layer"


def _listed(names: Iterable[str], at_most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    unique = [name for name in dict.fromkeys(names) if name]
    more = f" and {len(unique) - at_most} more" if len(unique) > at_most else ""
    return ", ".join(unique[:at_most]) + more


def _have(rows: Sequence[int]) -> str:
    return f"{_layers(len(rows))} {'has' if len(rows) == 1 else 'have'}"


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count != 1)}"


def _times(ratio: float) -> str:
    if not 0 < ratio < math.inf:
        return "one of the two being zero"
    return f"a factor of {ratio:.3g}" if ratio >= 1 else f"a factor of 1/{1 / ratio:.3g}"


def _init(scheme: str) -> str:
    return f'fi.init(model, key, *inputs, scheme="{scheme}")'
