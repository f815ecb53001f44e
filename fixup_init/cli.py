"""The command `fixup-init`: demo, inspect, analyze."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fixup_init as fi
from fixup_init import load

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
class Analyze:
    """Measure how the signal drifts with depth: as the model is, without its normalization, and with Fixup."""

    target: tyro.conf.OmitArgPrefixes[Target]
    seed: int = 0
    """For parameters, data and probe."""
    json: bool = False
    """Print JSON instead of tables."""
    html: Path | None = None
    """Write a page with interactive figures."""
    figure: Path | None = None
    """Write a figure: .png, .svg or .pdf."""

    def run(self) -> int:
        import jax

        model, inputs, kwargs = self.target.read()
        with bars() as progress:
            comparison = fi.compare(model, *inputs, key=jax.random.key(self.seed), progress=progress, **kwargs)
        if self.json:
            print(comparison.to_json())
        else:
            print(comparison)
        structure = fi.structure(model, *inputs, **kwargs)
        if self.figure is not None:
            from fixup_init.report.figure import figure, save

            _wrote(save(figure(comparison), self.figure))
        if self.html is not None:
            from fixup_init.report.html import html, write

            _wrote(
                write(self.html, html(comparison, title=f"Signal propagation: {structure.name}", structure=structure))
            )
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
    """Runs the command line; returns the exit status: 0, or 2 where the input is at fault."""
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
