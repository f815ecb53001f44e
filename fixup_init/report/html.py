"""Self-contained pages: a comparison (figures that can be searched with the pointer, tables, structure, training), or a
structure and its plan.

The page of a comparison carries its data as JSON, plotly.js, and a script that draws from the one with the other. Pages
ask nothing of the network (their content security policy forbids it).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fixup_init.extras import require
from fixup_init.files import replacing
from fixup_init.plain import plain
from fixup_init.plan import Plan
from fixup_init.propagation import Comparison, Propagation, Row, Statistics
from fixup_init.report.drawing import svg
from fixup_init.report.layout import number, positions, propagations, shape, spaced, title, words
from fixup_init.report.records import TrainingRun
from fixup_init.report.tree import plan_table, tree
from fixup_init.structure import Structure

__all__ = ["TrainingRun", "html", "structure_html", "write"]

_CURVE = 1500  # points that a loss curve is thinned to
_TREE, _TABLE = 110, 140  # columns of the structure tree, of the plan
_FIELDS = ("kind", "name", "scope", "block", "shape", "dtype", "depth", "forward", "backward")
_STATISTICS = ("mean", "variance", "second_moment", "squared_channel_mean", "finite")


def html(
    comparison: Comparison | Propagation,
    *,
    title: str,
    structure: Structure | None = None,
    training: Sequence[TrainingRun | Mapping[str, Any]] | None = None,
    table: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """One self-contained page with what a comparison shows.

    Args:
      comparison: what `fi.compare` or `fi.analyze` returned.
      title: heading of the page.
      structure: of the model, as a picture and as a tree.
      training: runs to draw curves of, records or plain data.
      table: further results; each mapping is a row, its keys are the column titles (those of the first row count).

    Returns:
      The text of the page; `write` puts it into a file.

    Raises:
      ImportError: plotly or jinja2 is not installed.
    """
    several = propagations(comparison)
    runs = [run if isinstance(run, TrainingRun) else TrainingRun.from_dict(run) for run in training or ()]
    return _environment().get_template("report.html.jinja").render(
        title=title,
        verdicts=[_verdict(one) for one in several],
        **_structure(structure, None),
        runs=_summaries(runs),
        table=_table(table or ()),
        data=plain({
            "fields": _FIELDS,
            "statistics": _STATISTICS,
            "propagations": [_propagation(one) for one in several],
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


def _verdict(one: Propagation) -> dict[str, Any]:
    drifts = [one.drift(direction) for direction in ("forward", "backward")]
    return {
        "label": one.label,
        "about": f"{one.model}, L = {one.num_branches}; gradients from a random probe at the {one.probe}",
        "drifts": [
            {"direction": d.direction, "verdict": d.verdict, "words": words(one, d), "first": number(d.first),
             "last": number(d.last)}
            for d in drifts
        ],
        "summary": one.summary(),
    }  # fmt: skip


def _propagation(one: Propagation) -> dict[str, Any]:
    return {
        "label": one.label,
        "stream": one.stream[0].kind if one.stream else "",
        "words": {d: words(one, one.drift(d)) for d in ("forward", "backward")},
        "rows": [_row(row, depth) for row, depth in zip(one.rows, positions(one), strict=True)],
    }


def _row(row: Row, depth: float) -> list[Any]:
    """In the order of `_FIELDS`."""
    return [
        row.kind, title(row), row.scope, row.block, shape(row.shape), row.dtype, round(depth, 4),
        _numbers(row.forward), _numbers(row.backward),
    ]  # fmt: skip


def _numbers(s: Statistics | None) -> list[float] | None:
    """In the order of `_STATISTICS`; six digits are more than any figure shows."""
    if s is None:
        return None
    return [float(f"{getattr(s, name):.6g}") for name in _STATISTICS]


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
