"""What the signal still says of its input: ranks, and its mean."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fixup_init.propagation import Propagation
from fixup_init.verdicts.rows import branch_ends, forward_of, is_known, mean_share_of, passed, rows_of
from fixup_init.verdicts.verdict import Verdict
from fixup_init.verdicts.words import call_of, listed, name_of

__all__ = [
    "ALIKE",
    "APART",
    "FEATURES",
    "MEAN_SHARE",
    "MEAN_SHARE_STRONG",
    "RANK_LOSS",
    "RANK_LOSS_SKIPS",
    "mean_shift",
    "rank_collapse",
]

# Of the second moment at the end of the stream. A wide relu MLP with He's variance, which trains, has 0.87 after 10
# layers, 0.95 after 20 and 0.99 after 60 (Cho & Saul 2009, the arc-cosine kernel iterated).
MEAN_SHARE, MEAN_SHARE_STRONG = 0.95, 0.99
# Mean cosine of the angle between examples, and where inputs must have been for the network to be the cause.
ALIKE, APART = 0.99, 0.9
# Effective rank of 64 vectors, start over end: skips lose directions slowly, layers without them with each product.
RANK_LOSS, RANK_LOSS_SKIPS = 4.0, 8.0
# With fewer features than these, neither a cosine nor a mean over channels says anything.
FEATURES = 4


def rank_collapse(propagation: Propagation) -> Iterator[Verdict]:
    """Examples that become alike with depth, or channel vectors that lose their directions though examples differ."""
    inputs = rows_of(propagation, "input")
    stream = _unpooled(propagation)
    rows = [k for k in (*inputs, *stream) if is_known(propagation.rows[k], "example_cosine", "effective_rank")]
    if len(rows) < 3:
        return
    layers = branch_ends(propagation) if propagation.select("sum") else [r.name for r in propagation.select("weight")]
    help_ = (
        f"{call_of('fixup')} lets the skips dominate at the start: {listed(layers)}."
        if propagation.select("sum")
        else f"A skip around these layers keeps their inputs apart, with {call_of('fixup')}: {listed(layers)}."
    )
    first, last = propagation.rows[rows[0]], propagation.rows[rows[-1]]
    start, end = forward_of(first).example_cosine, forward_of(last).example_cosine
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
        before, after = forward_of(propagation.rows[same[0]]), forward_of(propagation.rows[same[-1]])
        shared = max(after.example_cosine, mean_share_of(after), 0.0)
        explained = min(before.effective_rank, 1 / shared**2 if shared else math.inf)
        if len(same) > 2 and after.effective_rank * loss <= explained:
            lost[explained / after.effective_rank] = same[0], same[-1]
    if lost:
        a, b = lost[max(lost)]
        before, after = forward_of(propagation.rows[a]).effective_rank, forward_of(propagation.rows[b]).effective_rank
        yield Verdict(
            "rank_collapse", "forward", "warning",
            f"The representation collapses with depth: the effective rank of channel vectors falls from {before:.3g} "
            f"at {name_of(propagation.rows[a])} to {after:.3g} at {name_of(propagation.rows[b])}.",
            tuple(k for k in rows if propagation.rows[k].shape == propagation.rows[a].shape), before / after, help_,
        )  # fmt: skip


def _unpooled(propagation: Propagation) -> list[int]:
    """The stream without the layers behind a pooling, which makes examples alike where the data is noise, and without
    those of few features: the cosine of two numbers is 1 or -1."""
    rows = [k for k in passed(propagation, "forward") if len(propagation.rows[k].shape) > 1]
    rows = [k for k in rows if propagation.rows[k].shape[-1] >= FEATURES]
    return [k for k in rows if len(propagation.rows[k].shape) >= len(propagation.rows[rows[0]].shape)]


def mean_shift(propagation: Propagation) -> Iterator[Verdict]:
    """A signal that is mostly the same for all inputs: squared channel means as a share of the second moment."""
    # A mean over fewer than 4 values is no mean: a batch of one vector has a share of 1.
    rows = [k for k in _unpooled(propagation) if math.prod(propagation.rows[k].shape[:-1]) >= 4]
    if len(rows) < 2:
        return
    shares = [mean_share_of(forward_of(propagation.rows[k])) for k in rows]
    inputs = [mean_share_of(s) for r in propagation.select("input") if (s := r.forward) and s.second_moment > 0]
    start = max(min(inputs, default=shares[0]), 0.0)
    if not (shares[-1] >= MEAN_SHARE and 1 - shares[-1] <= 0.2 * (1 - start)):
        return
    first = next(k for k, share in zip(rows, shares, strict=True) if share >= MEAN_SHARE)
    text = (
        f"The mean shifts with depth: squared channel means are {shares[-1]:.1%} of the second moment at "
        f"{name_of(propagation.rows[rows[-1]])} ({start:.1%} at the input, above {MEAN_SHARE:.0%} from "
        f"{name_of(propagation.rows[first])} on): the rest, {1 - shares[-1]:.2g}, is all that depends on the input."
    )
    layers = branch_ends(propagation) or [r.name for r in propagation.select("weight")]
    advice = (
        f"{call_of('fixup')} keeps the branches from adding to it at the start: {listed(layers)}."
        if propagation.select("sum")
        else "A nonlinearity of mean zero (tanh) or a skip around the layers keeps it from building up: "
        f"{listed(layers)}."
    )
    severity = "warning" if shares[-1] >= MEAN_SHARE_STRONG else "note"
    yield Verdict("mean_shift", "forward", severity, text, tuple(rows), shares[-1], advice)
