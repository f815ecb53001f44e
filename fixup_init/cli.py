"""The command `fixup-init`: demo, inspect, analyze, compare, predict, check."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fixup_init as fi
from fixup_init import load, schemes
from fixup_init.analyze import CASES

__all__ = ["main"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A model of yours and what it takes."""

    spec: tyro.conf.Positional[str]
    """package.module:attribute or file.py:attribute: a model, or a function without arguments that makes one."""
    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SHAPE[:DTYPE]")]
    """Shapes of the model's inputs, such as 8,32,32,3 or 2,128:int32."""
    arg: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Keyword arguments of the model, such as train=True."""

    def read(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        return load.model(self.spec), load.inputs(self.input), load.keywords(self.arg)


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Print a model's residual structure, and what a scheme gives each parameter."""

    target: tyro.conf.OmitArgPrefixes[Target]
    scheme: str | None = None
    """Also print the plan of this scheme: fixup, he_normal, glorot, ..."""
    normalization: str = "kept"
    """kept, or removed: as if every normalization were taken out."""
    json: bool = False
    """Print JSON instead."""
    html: Path | None = None
    """Write a page with the structure as a picture, and the plan."""

    def run(self) -> int:
        model, inputs, kwargs = self.target.read()
        structure = fi.structure(model, *inputs, normalization=self.normalization, **kwargs)
        plan = None
        if self.scheme is not None:
            plan = fi.plan(model, *inputs, scheme=self.scheme, normalization=self.normalization, **kwargs)
        if self.json:
            data = structure.to_dict() if plan is None else {"structure": structure.to_dict(), "plan": _plan_data(plan)}
            print(json.dumps(data, indent=1, allow_nan=False))
        else:
            print(structure)
            if plan is not None:
                print(plan)
        if self.html is not None:
            from fixup_init.report.html import structure_html, write

            _wrote(write(self.html, structure_html(structure, plan, title=f"Structure: {structure.name}")))
        return 0


@dataclasses.dataclass(frozen=True)
class Output:
    """Where results go, beside the terminal."""

    json: bool = False
    """Print JSON instead of tables."""
    all: bool = False
    """Print every row; otherwise long models are folded."""
    html: Path | None = None
    """Write a page with interactive figures."""
    figure: Path | None = None
    """Write a figure: .png, .svg or .pdf."""
    csv: Path | None = None
    """Write every row as CSV."""
    tensorboard: Path | None = None
    """Write TensorBoard scalars into this directory."""

    def give(self, found: fi.Comparison, predicted: Sequence[fi.Propagation], structure: fi.Structure) -> None:
        if self.json:
            data = found.to_dict()
            if predicted:
                data["predicted"] = [one.to_dict() for one in predicted]
            print(json.dumps(data, indent=1, allow_nan=False))
        elif len(found) == 1 or self.all:
            beside = {one.label: one for one in predicted}
            print("\n".join(one.table(all_rows=self.all, predicted=beside.get(one.label)) for one in found))
        else:
            from fixup_init.report.text import comparison_table

            print(comparison_table(found, predicted=predicted))
        if self.csv is not None:
            _wrote(found.to_csv(self.csv))
        if self.tensorboard is not None:
            from fixup_init.report.tensorboard import to_tensorboard

            to_tensorboard(found, self.tensorboard)
            _wrote(self.tensorboard)
        if self.figure is not None:
            from fixup_init.report.figure import figure, save

            _wrote(save(figure(found, predicted=predicted or None), self.figure))
        if self.html is not None:
            from fixup_init.report.html import html, write

            title = f"Signal propagation: {structure.name}"
            _wrote(write(self.html, html(found, title=title, predicted=predicted or None, structure=structure)))


@dataclasses.dataclass(frozen=True)
class Analyze:
    """Measure how the signal drifts with depth, forward and backward, and say what that means."""

    target: tyro.conf.OmitArgPrefixes[Target]
    output: tyro.conf.OmitArgPrefixes[Output]
    scheme: str = "model"
    """How parameters are drawn: model (by its own initializers), fixup, he_normal, ..."""
    normalization: str = "kept"
    """kept, removed, or affine: bypassed, but for scale and bias."""
    predict: bool = False
    """Set what theory predicts beside it."""
    seed: int = 0
    """For parameters, data and probe."""

    def run(self) -> int:
        return _compare(self.target, self.output, ((self.scheme, self.normalization),), self.predict, self.seed)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Measure the drift as the model is, without its normalization, and with Fixup instead, side by side."""

    target: tyro.conf.OmitArgPrefixes[Target]
    output: tyro.conf.OmitArgPrefixes[Output]
    predict: bool = False
    """Set what theory predicts beside each."""
    seed: int = 0
    """For parameters, data and probe."""

    def run(self) -> int:
        return _compare(self.target, self.output, CASES, self.predict, self.seed)


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predict the drift from shapes and a scheme alone; nothing runs and nothing is allocated."""

    target: tyro.conf.OmitArgPrefixes[Target]
    output: tyro.conf.OmitArgPrefixes[Output]
    scheme: str = "fixup"
    """model, fixup, he_normal, ..."""
    normalization: str = "kept"
    """kept, removed, or affine: bypassed, but for scale and bias."""

    def run(self) -> int:
        model, inputs, kwargs = self.target.read()
        one = fi.predict(model, *inputs, scheme=self.scheme, normalization=self.normalization, **kwargs)
        self.output.give(fi.Comparison((one,)), (), fi.structure(model, *inputs, **kwargs))
        return 0


@dataclasses.dataclass(frozen=True)
class Check:
    """Fail, with exit status 1, where the signal or its gradient grows, shrinks, overflows or dies."""

    target: tyro.conf.OmitArgPrefixes[Target]
    max_growth: float = 100.0
    """By how much the second moment of the stream may rise or fall; 100 is tenfold in magnitude."""
    scheme: str = "model"
    """How parameters are drawn: model (by its own initializers), fixup, he_normal, ..."""
    normalization: str = "kept"
    """kept, removed, or affine: bypassed, but for scale and bias."""
    strict: bool = False
    """Fail on every warning, too: mean shift, rank collapse, saturation, layers without gradient."""
    json: bool = False
    """Print JSON instead."""
    seed: int = 0
    """For parameters, data and probe."""

    def run(self) -> int:
        import jax

        model, inputs, kwargs = self.target.read()
        message = ""
        try:
            found = fi.checks.assert_stable(
                model, *inputs, max_growth=self.max_growth, scheme=self.scheme, normalization=self.normalization,
                strict=self.strict, key=jax.random.key(self.seed), **kwargs,
            )  # fmt: skip
            text = found.summary()
        except fi.checks.UnstableError as error:
            text = message = str(error)
        if self.json:
            print(json.dumps({"stable": not message, "text": text}, indent=1))
        else:
            print(text if message else f"Stable. {text}")
        return 1 if message else 0


def _compare(target: Target, output: Output, cases: Sequence[tuple[str, str]], predict: bool, seed: int) -> int:
    import jax

    model, inputs, kwargs = target.read()
    with bars() as progress:
        found = fi.compare(model, *inputs, cases=cases, key=jax.random.key(seed), progress=progress, **kwargs)
    structure = fi.structure(model, *inputs, **kwargs)
    labels = {one.label for one in found}
    predicted = []
    for scheme, normalization in cases if predict else ():
        name = schemes.find(scheme).name
        label = f"{name}, {normalization}" if structure.norms else name
        if label in labels:
            labels.remove(label)
            form = normalization if structure.norms else "kept"
            predicted.append(
                fi.predict(model, *inputs, scheme=scheme, normalization=form, probe="head", label=label, **kwargs)
            )
    output.give(found, predicted, structure)
    return 0


@dataclasses.dataclass(frozen=True)
class Demo:
    """Batch norm, nothing, and Fixup, on a deep ResNet and real digits: structure, drift, training, report."""

    depth: int = 56
    """Layers of the networks, 6n + 2."""
    epochs: int = 14
    """Passes over the 1,437 training images."""
    seeds: int = 1
    """Trainings of each network."""
    out: Path = Path("fixup-init-demo")
    """Directory for the report and its parts."""

    def run(self) -> int:
        from fixup_init.demo import demo

        demo(self.depth, self.epochs, self.seeds, self.out, Console(), bars)
        return 0


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Analyze, tyro.conf.subcommand("analyze")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Check, tyro.conf.subcommand("check")]
)


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on standard error, one for each thing that goes on; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
                if not console.is_terminal:
                    console.print(f"{what} ...")
            progress.update(tasks[what], completed=done, total=of)

        yield report


def main(args: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 where a check fails, or 2 where the input is at fault."""
    command = tyro.cli(Command, args=args, prog="fixup-init", description=__doc__)  # pyright: ignore
    try:
        return command.run()
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        print(f"fixup-init: {error}", file=sys.stderr)
        return 2


def _plan_data(plan: fi.Plan) -> Any:
    return json.loads(plan.to_json())


def _wrote(path: Path) -> None:
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
