"""A propagation or a comparison as TensorBoard scalars, with depth in the place of training steps."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from fixup_init.extras import require
from fixup_init.propagation import Propagation, Row
from fixup_init.report.layout import propagations
from fixup_init.report.table import records

__all__ = ["to_tensorboard"]


def to_tensorboard(
    data: Propagation | Iterable[Propagation],
    directory: str | os.PathLike[str],
    *,
    by: Literal["block", "row"] = "block",
) -> Path:
    """Writes every statistic as a scalar over depth; each propagation is a run, so that TensorBoard overlays them.

    Args:
      data: what `fi.analyze`, `fi.predict` or `fi.compare` returned.
      directory: for `tensorboard --logdir`; each run gets a directory in it, named by its label. Event files that are
        there already stay, and TensorBoard shows them too.
      by: what stands for the step: "block", the rows of the stream counted from 1, with the weights of each block by
        their layer; or "row", the index of every row.

    Returns:
      The directory.

    Raises:
      ImportError: tensorboardX is not installed.
      ValueError: `by` is neither of the two.

    Example:
      >>> import tempfile
      >>> from fixup_init.propagation import Propagation, Row, Statistics
      >>> row = Row("sum", "sum 1", "Net", 1, (8, 16), "float32", None, Statistics(0.0, 2.0, 0.5))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     [p.name for p in to_tensorboard(Propagation("fixup, kept", "Net", 1, (row,)), folder).iterdir()]
      ['fixup_kept']
    """
    if by not in ("block", "row"):
        raise ValueError(f"by={by!r}: expected 'block' or 'row'.")
    writers = require("tensorboardX", "tensorboard")
    names: set[str] = set()
    for one in propagations(data):
        name = base = re.sub(r"[^\w.-]+", "_", f"{one.label}{' predicted' * (one.kind == 'predicted')}").strip("_.")
        again = 1
        while not name or name in names:
            again += 1
            name = f"{base or 'run'}_{again}"
        names.add(name)
        writer = writers.SummaryWriter(logdir=str(Path(directory) / name))
        try:
            for tag, value, step in _scalars(one, by):
                writer.add_scalar(tag, value, step)
        finally:
            writer.close()
    return Path(directory)


def _scalars(one: Propagation, by: str) -> Iterator[tuple[str, float, int]]:
    """Tags such as "forward/variance", with value and step; what is not known is left out."""
    found = records(one)
    stream = {id(r): k for k, r in enumerate(one.stream, 1)}
    layers = {id(r): k for k, r in enumerate(one.select("weight"), 1)}
    for index, (row, record) in enumerate(zip(one.rows, found, strict=True)):
        for group in ("forward", "backward", "weight"):
            step = index if by == "row" else _step(row, group, stream, layers)
            if step is None:
                continue
            for key, value in record.items():
                if key.startswith(f"{group}_") and math.isfinite(value):
                    yield f"{group}/{key.removeprefix(f'{group}_')}", value, step


def _step(row: Row, group: str, stream: dict[int, int], layers: dict[int, int]) -> int | None:
    return (layers if group == "weight" else stream).get(id(row))
