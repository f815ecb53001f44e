"""A propagation or a comparison as flat records, for pandas and spreadsheets."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fixup_init.files import replacing
from fixup_init.propagation import Propagation, Row, Statistics
from fixup_init.report.layout import propagations, shape

__all__ = ["records", "to_csv"]

_STATISTICS = (*(f.name for f in dataclasses.fields(Statistics)), "second_moment", "channel_variance")
_WEIGHT = ("parameter_norm", "gradient_norm", "ratio")


def records(data: Propagation | Iterable[Propagation]) -> list[dict[str, Any]]:
    """One flat dictionary for each row, all with the same keys.

    Args:
      data: what `fi.analyze`, `fi.predict` or `fi.compare` returned.

    Returns:
      Dictionaries that `pandas.DataFrame` takes: `label`, `model`, `source` ("measured" or "predicted"), `index`,
      `kind`, `name`, `scope`, `block`, `shape`, `dtype`, `repeat`, each statistic as `forward_...` and `backward_...`,
      `weight_parameter_norm`, `weight_gradient_norm`, `weight_ratio` and `note`. What is not known is NaN; `repeat` is
      None outside of scans.

    Example:
      >>> from fixup_init.propagation import Propagation, Row, Statistics
      >>> row = Row("sum", "sum 1", "Net", 1, (8, 16), "float32", None, Statistics(0.0, 2.0, 0.5))
      >>> (one,) = records(Propagation("fixup", "Net", 1, (row,)))
      >>> one["label"], one["name"], one["shape"], one["forward_variance"], one["backward_variance"]
      ('fixup', 'sum 1', '8×16', 2.0, nan)
    """
    return [_record(one, k, row) for one in propagations(data) for k, row in enumerate(one.rows)]


def to_csv(data: Propagation | Iterable[Propagation], path: str | os.PathLike[str]) -> Path:
    """Writes the records as comma-separated values in UTF-8; the file appears whole or not at all.

    Args:
      data: what `fi.analyze`, `fi.predict` or `fi.compare` returned.
      path: where to; directories that are missing are made.

    Returns:
      The path. The first line names the columns; what is not known is empty.

    Example:
      >>> import tempfile
      >>> from fixup_init.propagation import Propagation
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     to_csv(Propagation("fixup", "Net", 0, ()), f"{folder}/rows.csv").read_text()[:18]
      'label,model,source'
    """
    nothing = Propagation("", "", 0, ())
    columns = list(_record(nothing, 0, Row("input", "", "", 0, (), "", None, None)))
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for record in records(data):
            writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()})
    return Path(path)


def _record(one: Propagation, index: int, row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "label": one.label, "model": one.model, "source": one.kind, "index": index, "kind": row.kind, "name": row.name,
        "scope": row.scope, "block": row.block, "shape": shape(row.shape), "dtype": row.dtype, "repeat": row.repeat,
    }  # fmt: skip
    for direction, s in (("forward", row.forward), ("backward", row.backward)):
        values |= {f"{direction}_{name}": math.nan if s is None else getattr(s, name) for name in _STATISTICS}
    values |= {f"weight_{name}": math.nan if row.weight is None else getattr(row.weight, name) for name in _WEIGHT}
    return {**values, "note": row.note}
