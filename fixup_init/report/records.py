"""What the report page needs to know of a training, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["TrainingRun"]


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """One training, with one seed.

    Attributes:
      label: what was trained; runs of one label are drawn in one colour and summed up in one row.
      seed: of initialization and data order.
      steps: the step, counted from 1, of each entry of `loss`.
      loss: training loss.
      epochs_steps: the step of each entry of `accuracy`.
      accuracy: on the test set, between 0 and 1.
      final_accuracy: the last of them; None if the training failed before its first evaluation.
      images_per_second: speed; None if it is not known.
      note: what went wrong, in words.
    """

    label: str
    seed: int
    steps: tuple[int, ...]
    loss: tuple[float, ...]
    epochs_steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    final_accuracy: float | None
    images_per_second: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for steps, values in (("steps", "loss"), ("epochs_steps", "accuracy")):
            if len(getattr(self, steps)) != len(getattr(self, values)):
                raise ValueError(
                    f"Run {self.label!r}, seed {self.seed}, has {len(getattr(self, steps))} `{steps}` and "
                    f"{len(getattr(self, values))} `{values}`: expected as many of the one as of the other."
                )

    @staticmethod
    def of(label: str, seed: int, history: Any) -> TrainingRun:
        """The run that a `fixup_init.training.History` tells of."""
        return TrainingRun(
            label=label,
            seed=seed,
            steps=tuple(range(1, len(history.losses) + 1)),
            loss=tuple(history.losses),
            epochs_steps=tuple(epoch.step for epoch in history.epochs),
            accuracy=tuple(epoch.test_accuracy for epoch in history.epochs),
            final_accuracy=history.test_accuracy,
            images_per_second=history.images_per_second,
            note=history.message or "",
        )

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TrainingRun:
        """The run in plain data, such as read from JSON."""
        names = {f.name for f in dataclasses.fields(TrainingRun)}
        if odd := set(data) - names:
            raise ValueError(f"{sorted(odd)} belong to no training run; expected {', '.join(sorted(names))}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return TrainingRun(**values)
