"""What a training leaves behind (`History`), what it says while it runs (`Progress`), and how it fails."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, PyTree

from fixup_init.plain import plain

Phase = Literal["compiling", "training", "evaluating", "done"]


@dataclass(frozen=True)
class Epoch:
    """One line of the record, written when the test set has been evaluated.

    Attributes:
      step: training steps done so far.
      epoch: passes over the training set so far; not whole where the training stopped inside one.
      train_loss: mean loss of the steps since the previous line.
      train_accuracy: the same for the accuracy; with mixup, each label counts by its weight.
      test_loss: mean loss of the whole test set.
      test_accuracy: accuracy on the whole test set, between 0 and 1.
      seconds: time since the start.
    """

    step: int
    epoch: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


@dataclass(frozen=True)
class History:
    """What happened in a training.

    Attributes:
      losses: the loss of each step, as long as it is finite.
      epochs: one record per evaluation.
      batch_size: images per step.
      images_per_second: training speed, without compilation (the first step) and evaluation.
      compile_seconds: time of the first step and of the first evaluation, nearly all of it compilation.
      seconds: time from start to end.
      diverged_at: the step, counted from 1, whose loss was not finite; None if there was none.
      message: why the training ended before its last step; None if it did not.
      variables: the variables after the last step (not in `to_dict`).
    """

    losses: tuple[float, ...]
    epochs: tuple[Epoch, ...]
    batch_size: int
    images_per_second: float
    compile_seconds: float
    seconds: float
    diverged_at: int | None
    message: str | None
    variables: PyTree = field(repr=False, compare=False)

    @property
    def test_accuracy(self) -> float | None:
        """The accuracy of the last evaluation; None if the loss stopped being finite before the first one."""
        return self.epochs[-1].test_accuracy if self.epochs else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the variables, ready for JSON: numbers that are not finite become None."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "variables"}
        record["epochs"] = plain(list(self.epochs))
        return record | {"losses": list(self.losses), "test_accuracy": self.test_accuracy}

    def to_json(self) -> str:
        """`to_dict` as a JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)


@dataclass(frozen=True)
class Progress:
    """Where a training stands, as `on_progress` is told a few times a second."""

    phase: Phase
    step: int
    steps: int
    epoch: float
    loss: float | None = None
    test_accuracy: float | None = None
    images_per_second: float | None = None


class DivergenceError(FloatingPointError):
    """The loss is not finite any more; `history` has the record up to there."""

    def __init__(self, message: str, history: History):
        super().__init__(message)
        self.history = history


class Recorder:
    """Grows with the training, tells of its progress and becomes its `History`."""

    def __init__(self, steps: int, per_epoch: int, batch_size: int, on_progress: Callable[[Progress], None]):
        self.steps, self.per_epoch, self.batch_size, self.on_progress = steps, per_epoch, batch_size, on_progress
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.epochs: list[Epoch] = []
        self.bad_loss = math.nan
        self.diverged_at: int | None = None
        self.message: str | None = None
        self.compile_seconds, self.train_seconds, self.timed_steps = 0.0, 0.0, 0
        self.started = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps done whose loss was finite."""
        return len(self.losses)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self.started

    @property
    def images_per_second(self) -> float:
        """Speed without the first step, or with it as long as there is no other."""
        if self.train_seconds == 0:
            return self.step * self.batch_size / max(self.compile_seconds, 1e-9)
        return self.timed_steps * self.batch_size / self.train_seconds

    def add_steps(self, metrics: Float[np.ndarray, "steps 2"], seconds: float) -> None:
        """Notes the losses and accuracies of steps that took `seconds`, up to the first loss that is not finite."""
        if self.step == 0:
            self.compile_seconds += seconds
        else:
            self.train_seconds, self.timed_steps = self.train_seconds + seconds, self.timed_steps + len(metrics)
        for loss, accuracy in metrics.tolist():
            if not math.isfinite(loss):
                self.bad_loss, self.diverged_at = loss, self.step + 1
                break
            self.losses.append(loss)
            self.accuracies.append(accuracy)

    def add_evaluation(self, test_loss: float, test_accuracy: float, seconds: float) -> Epoch:
        """Closes an epoch with the result on the test set, which took `seconds`."""
        since = self.epochs[-1].step if self.epochs else 0
        if not self.epochs:
            self.compile_seconds += seconds
        train_loss, train_accuracy = (sum(v[since:]) / (self.step - since) for v in (self.losses, self.accuracies))
        epoch = Epoch(
            self.step, self.step / self.per_epoch, train_loss, train_accuracy, test_loss, test_accuracy, self.seconds
        )
        self.epochs.append(epoch)
        return epoch

    def report(self, phase: Phase) -> None:
        """Tells how far the training is."""
        self.on_progress(
            Progress(
                phase=phase,
                step=self.step,
                steps=self.steps,
                epoch=self.step / self.per_epoch,
                loss=self.losses[-1] if self.losses else None,
                test_accuracy=self.epochs[-1].test_accuracy if self.epochs else None,
                images_per_second=self.images_per_second if self.train_seconds else None,
            )
        )

    def divergence_message(self, rate: float | Callable[[int], Any] | None) -> str:
        """Where the loss stopped being finite, what it was before, and what to try."""
        step = self.step + 1
        epoch, batch = self.step // self.per_epoch + 1, self.step % self.per_epoch + 1
        where = f"step {step} (epoch {epoch}, batch {batch} of {self.per_epoch})"
        if rate is not None:
            where += f", at learning rate {float(rate(self.step) if callable(rate) else rate):.3g}"
        before = "It was the first loss: look at the input and at the initialization"
        if self.losses:
            before = f"The loss before was {self.losses[-1]:.4g}, the first of all {self.losses[0]:.4g}"
        return (
            f"the loss is {self.bad_loss} in {where}. {before}. Try a smaller learning rate or a warmup; "
            "a network without normalization needs an initialization that fits its depth (Fixup)."
        )

    def history(self, variables: PyTree) -> History:
        """The record as it stands."""
        return History(
            losses=tuple(self.losses),
            epochs=tuple(self.epochs),
            batch_size=self.batch_size,
            images_per_second=self.images_per_second,
            compile_seconds=self.compile_seconds,
            seconds=self.seconds,
            diverged_at=self.diverged_at,
            message=self.message,
            variables=variables,
        )
