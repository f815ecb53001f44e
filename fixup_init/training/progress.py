"""A progress bar for one training or several, drawn by rich: step, loss, accuracy and images per second."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from fixup_init.training.record import Progress


@contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[str], Callable[[Progress], None]]]:
    """Draws bars while trainings run.

    Where the output is no terminal (a log file), a line for each evaluation is written instead.

    Args:
      console: where to draw; standard error by default, so that standard output is left to results.

    Yields:
      A function that adds a bar with a description, and returns what `fit` takes as `on_progress`.

    Example:
      with progress_bar() as bar:
          history = fit(model, variables, tx, dataset, epochs=10, on_progress=bar("ResNet-20"))
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),  # what is left of the line
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal, expand=True) as bars:

        def add(description: str) -> Callable[[Progress], None]:
            task, before = bars.add_task(description, total=None, status="starting"), ["start"]

            def on_progress(progress: Progress) -> None:
                text = status(progress)
                bars.update(task, total=progress.steps, completed=progress.step, status=text, refresh=True)
                told = progress.phase == "compiling" or before[0] == "evaluating"
                if told and not console.is_terminal:
                    console.print(f"{description}: step {progress.step} of {progress.steps}  {text}", soft_wrap=True)
                before[0] = progress.phase

            return on_progress

        yield add


def status(progress: Progress) -> str:
    """The figures of one moment in words.

    Example:
      >>> status(Progress("training", 10, 100, 0.5, loss=1.5, test_accuracy=0.75, images_per_second=812.0))
      'loss 1.500  accuracy 75.0%  812 images/s'
    """
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:#.4g}")
    if progress.test_accuracy is not None:
        parts.append(f"accuracy {progress.test_accuracy:.1%}")
    if progress.phase in ("compiling", "evaluating"):
        parts.append(progress.phase)
    elif progress.images_per_second is not None:
        parts.append(f"{progress.images_per_second:,.0f} images/s")
    return "  ".join(parts)
