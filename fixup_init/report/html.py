"""Self-contained pages: a comparison (figures that can be searched with the pointer, tables, structure, training), or a
structure and its plan.

The page of a comparison carries its data as JSON, plotly.js, and a script that draws from the one with the other. Pages
ask nothing of the network (their content security policy forbids it).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fixup_init.extras import require
from fixup_init.files import replacing
from fixup_init.plain import plain
from fixup_init.plan import Plan
from fixup_init.propagation import Comparison, Propagation, Statistics
from fixup_init.report.layout import (
    MARKS,
    Pair,
    mean_share,
    noted,
    number,
    pairs,
    plural,
    positions,
    shape,
    spaced,
    title,
    verdicts_of,
    words,
)
from fixup_init.report.records import TrainingRun
from fixup_init.report.svg import svg
from fixup_init.report.tree import plan_table, tree
from fixup_init.structure import Structure
from fixup_init.verdicts import Verdict

__all__ = ["TrainingRun", "html", "structure_html", "write"]

_CURVE = 1500  # points that a loss curve is thinned to
_TREE, _TABLE = 110, 140  # columns of the structure tree, of the plan
_STATISTICS = (
    "mean", "variance", "second_moment", "squared_channel_mean", "channel_variance", "mean_share", "finite", "zeros",
    "saturated", "example_cosine", "effective_rank", "example_share", "channel_share", "position_share",
)  # fmt: skip
_WEIGHT = ("parameter_norm", "gradient_norm", "ratio")
_Values = Mapping[str, Sequence[float | None]]


def html(
    comparison: Comparison | Propagation,
    *,
    title: str,
    predicted: Propagation | Iterable[Propagation] | None = None,
    structure: Structure | None = None,
    training: Sequence[TrainingRun | Mapping[str, Any]] | None = None,
    table: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """One self-contained page with what a comparison shows.

    Args:
      comparison: what `fi.compare`, `fi.analyze` or `fi.predict` returned.
      title: heading of the page.
      predicted: predictions, drawn dashed over what was measured; those in `comparison` are too. One belongs to the
        propagation of its label, or to the only one, if they have the same rows.
      structure: of the model, as a picture and as a tree.
      training: runs to draw curves of, records or plain data.
      table: further results; each mapping is a row, its keys are the column titles (those of the first row count).

    Returns:
      The text of the page; `write` puts it into a file.

    Raises:
      ImportError: plotly or jinja2 is not installed.
    """
    several = pairs(comparison, predicted)
    texts = _Texts()
    found = [verdicts_of(pair) for pair in several]
    runs = [run if isinstance(run, TrainingRun) else TrainingRun.from_dict(run) for run in training or ()]
    return _environment().get_template("report.html.jinja").render(
        title=title,
        cards=[_card(pair, of) for pair, of in zip(several, found, strict=True)],
        notes=[
            {"run": k, "label": pair.own.label, "about": note, "rows": rows, "count": plural(len(rows), "row")}
            for k, pair in enumerate(several) for note, rows in noted(pair)
        ],
        **_structure(structure, None),
        runs=_summaries(runs),
        table=_table(table or ()),
        data=plain({
            "propagations": [_propagation(pair, texts) for pair in several],
            "texts": list(texts.index),
            "runs": [_run(run) for run in runs],
        }),
        plotly=require("plotly.offline", "report").get_plotlyjs(),
    )  # fmt: skip


def structure_html(structure: Structure, plan: Plan | None = None, *, title: str) -> str:
    """One self-contained page with a structure: its picture, its tree, and a plan for it.

    Args:
      structure: what `fi.structure` returned.
      plan: what `fi.plan` returned for the same model.
      title: heading of the page.

    Returns:
      The text of the page; `write` puts it into a file.

    Raises:
      ImportError: jinja2 is not installed.
    """
    return _environment().get_template("structure.html.jinja").render(title=title, **_structure(structure, plan))


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a page; the file appears whole or not at all.

    Args:
      path: where to; directories that are missing are made.
      text: what `html` returned.

    Returns:
      The path.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def _environment() -> Any:
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fixup_init", "report/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _structure(structure: Structure | None, plan: Plan | None) -> dict[str, str]:
    """What the section about a structure shows."""
    if structure is None:
        return {"tree": "", "drawing": "", "plan": ""}
    return {
        "tree": tree(structure, _TREE),
        "drawing": svg(structure, plan),
        "plan": plan_table(plan, _TABLE) if plan is not None else "",
    }


class _Texts:
    """Texts by number, so that each is written once."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.index.setdefault(text, len(self.index))


def _card(pair: Pair, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What stands on top of the page about one propagation."""
    one = pair.own
    drifts = [one.drift(direction) for direction in ("forward", "backward")]
    about = f"{one.model}, L = {one.num_branches}"
    if one.kind == "predicted":
        about += "; predicted from shapes and the plan"
    elif any(r.backward is not None for r in one):
        about += f"; gradients from {'a random probe at the ' if one.probe in _PROBES else ''}{one.probe}"
    return {
        "label": one.label,
        "about": about,
        "drifts": [
            {"direction": d.direction, "verdict": d.verdict, "words": words(one, d), "first": number(d.first),
             "last": number(d.last)}
            for d in drifts
        ],
        "verdicts": [
            {"mark": MARKS[v.severity], "severity": v.severity, "text": v.text, "advice": v.advice,
             "rows": list(v.rows), "count": plural(len(v.rows), "row")}
            for v in verdicts
        ],
        "notes": pair.notes,
    }  # fmt: skip


_PROBES = ("output", "input of the head")


def _propagation(pair: Pair, texts: _Texts) -> dict[str, Any]:
    """Columns of numbers; texts by their number in `texts`; columns without any value are left out."""
    one, rows = pair.own, pair.own.rows
    other = pair.predicted.rows if pair.predicted is not None else ()
    weights = {name: [None if r.weight is None else getattr(r.weight, name) for r in rows] for name in _WEIGHT}
    return {
        "label": one.label,
        "source": one.kind,
        "paired": pair.predicted is not None,
        "stream": one.stream[0].kind if one.stream else "",
        "words": {d: words(one, one.drift(d)) for d in ("forward", "backward")},
        "rows": {
            "kind": [texts(r.kind) for r in rows],
            "name": [texts(title(r)) for r in rows],
            "scope": [texts(r.scope) for r in rows],
            "shape": [texts(shape(r.shape)) for r in rows],
            "dtype": [texts(r.dtype) for r in rows],
            "note": [texts(pair.note(row, predicted)) for row, predicted in pair.rows],
            "block": [r.block for r in rows],
            "depth": [round(depth, 3) for depth in positions(one)],
        },
        "forward": _columns([r.forward for r in rows]),
        "backward": _columns([r.backward for r in rows]),
        "weight": _known(weights),
        "predicted_forward": _columns([r.forward for r in other]),
        "predicted_backward": _columns([r.backward for r in other]),
    }


def _columns(found: Sequence[Statistics | None]) -> _Values:
    return _known({name: [None if s is None else _statistic(s, name) for s in found] for name in _STATISTICS})


def _statistic(s: Statistics, name: str) -> float:
    return mean_share(s) if name == "mean_share" else getattr(s, name)


def _known(columns: _Values) -> _Values:
    """Columns that hold a number; infinities as the largest float, since JSON has none; five digits."""
    rounded = {name: [_rounded(x) for x in values] for name, values in columns.items()}
    return {name: values for name, values in rounded.items() if any(x is not None for x in values)}


def _rounded(x: float | None) -> float | None:
    if x is None or math.isnan(x):
        return None
    if math.isinf(x):
        return math.copysign(sys.float_info.max, x)
    short = float(f"{x:.5g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short


def _run(run: TrainingRun) -> dict[str, Any]:
    chosen = spaced(len(run.steps), _CURVE)
    return {
        "label": run.label, "seed": run.seed, "note": run.note,
        "steps": [run.steps[k] for k in chosen], "loss": [run.loss[k] for k in chosen],
        "epochs_steps": list(run.epochs_steps), "accuracy": list(run.accuracy),
    }  # fmt: skip


def _summaries(runs: Iterable[TrainingRun]) -> list[dict[str, str]]:
    """A row for each label: seeds, accuracy (mean and range over seeds), speed, notes."""
    labels: dict[str, list[TrainingRun]] = {}
    for run in runs:
        labels.setdefault(run.label, []).append(run)
    return [
        {
            "label": label,
            "seeds": ", ".join(str(run.seed) for run in same),
            "steps": _range([run.steps[-1] if run.steps else 0 for run in same], "{:,.0f}"),
            "accuracy": _mean([run.final_accuracy for run in same]),
            "range": _range([run.final_accuracy for run in same], "{:.1%}"),
            "speed": _range([run.images_per_second for run in same], "{:,.0f}"),
            "notes": _notes(same),
        }
        for label, same in labels.items()
    ]


def _notes(runs: Sequence[TrainingRun]) -> str:
    """Each note once, with the seeds that it is about."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        if run.note:
            seeds.setdefault(run.note, []).append(str(run.seed))
    return " ".join(f"Seed{'s' * (len(own) > 1)} {', '.join(own)}: {note}" for note, own in seeds.items())


def _mean(values: Iterable[float | None]) -> str:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return f"{sum(known) / len(known):.1%}" if known else "–"


def _range(values: Iterable[float | None], form: str) -> str:
    known = [v for v in values if v is not None and math.isfinite(v)]
    texts = dict.fromkeys(form.format(v) for v in ((min(known), max(known)) if known else ()))
    return " to ".join(texts) or "–"


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(rows[0]) if rows else []
    return {"columns": columns, "rows": [[_cell(row.get(c)) for c in columns] for row in rows]}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return number(value, 4) if isinstance(value, float) else str(value)
