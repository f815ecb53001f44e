"""`fixup-init demo`: what normalization hides, on one deep ResNet and real digits, in a few minutes.

Three networks of the same depth: with batch norm, with nothing in its place, and with Fixup. The demo prints their
structure, measures how the signal drifts, trains all three with the same budget and writes a report.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import fixup_init as fi
from fixup_init.files import replacing
from fixup_init.models.resnet import ResNet, cifar_resnet

__all__ = ["NETWORKS", "Network", "demo"]

# Small, so that three trainings fit into two minutes. The rate of 0.1 in the paper is for CIFAR-10 in batches of 128;
# with 32 digits a step, 0.04 is where both batch norm and Fixup train.
WIDTH, BATCH, RATE, DECAY = 8, 32, 0.04, 1e-4


@dataclasses.dataclass(frozen=True)
class Network:
    """One of the three: its label, what stands in the place of normalization, and how it is initialized."""

    label: str
    norm: str
    scheme: str

    def model(self, depth: int) -> ResNet:
        return cifar_resnet(depth, norm=self.norm, width=WIDTH)


NETWORKS = (
    Network("batch norm", "batch", "he_normal_fan_out"),
    Network("no normalization, He", "none", "he_normal_fan_out"),
    Network("Fixup", "fixup", "fixup"),
)


def demo(
    depth: int,
    epochs: int,
    seeds: int,
    out: Path,
    console: Console,
    bars: Callable[[], AbstractContextManager[Callable[[str, int, int], None]]],
) -> dict[str, Any]:
    """Runs the demo.

    Args:
      depth: layers of each network, 6n + 2.
      epochs: passes over the training images.
      seeds: trainings of each network.
      out: directory for `report.html`, `drift.png` and `result.json`.
      console: where to print.
      bars: progress bars for the measurements.

    Returns:
      What `result.json` holds: drift and accuracy of each network.
    """
    from fixup_init.report.figure import figure, save
    from fixup_init.report.html import html, write
    from fixup_init.report.records import TrainingRun
    from fixup_init.training import load

    data = load("digits")
    batch = jax.ShapeDtypeStruct((BATCH, *data.image_shape), jnp.float32)
    structure = fi.structure(NETWORKS[0].model(depth), batch)
    console.rule("1. Structure, found by tracing")
    console.print(str(structure), highlight=False, markup=False, soft_wrap=True)

    console.rule("2. Drift with depth")
    images = (jnp.asarray(data.train_images[:BATCH], jnp.float32) - data.mean) / data.std
    with bars() as progress:
        measured = []
        for network in NETWORKS:
            model = network.model(depth)
            variables = fi.init(model, jax.random.key(0), batch, scheme=network.scheme)
            measured.append(fi.analyze(model, variables, images, probe="head", label=network.label, progress=progress))
    comparison = fi.Comparison(tuple(measured))
    console.print(str(comparison), highlight=False, markup=False, soft_wrap=True)

    console.rule(f"3. Training, {epochs} epochs each")
    runs = [
        TrainingRun.of(network.label, seed, train(network, depth, epochs, seed, data))
        for network in NETWORKS
        for seed in range(seeds)
    ]
    table = [_line(network, comparison, runs) for network in NETWORKS]
    for line in table:
        console.print("  ".join(f"{key}: {value}" for key, value in line.items()), highlight=False, soft_wrap=True)

    figure_path = save(figure(comparison), out / "drift.png")
    title = f"What normalization hides: ResNet-{depth} on digits"
    page = write(out / "report.html", html(comparison, title=title, structure=structure, training=runs, table=table))
    result = {"depth": depth, "epochs": epochs, "networks": table, "drift": comparison.to_dict()}
    with replacing(out / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False))
    console.rule("4. Report")
    console.print(f"{page}\n{figure_path}\n{out / 'result.json'}", highlight=False, soft_wrap=True)
    return result


def train(network: Network, depth: int, epochs: int, seed: int, data: Any) -> Any:
    """One training; divergence is recorded, not raised."""
    from fixup_init.training import fit, learning_rate, progress_bar, sgd

    model = network.model(depth)
    batch = jax.ShapeDtypeStruct((BATCH, *data.image_shape), jnp.float32)
    plan = fi.plan(model, batch, scheme=network.scheme)
    variables = fi.init(model, jax.random.key(seed), batch, scheme=plan)
    steps = epochs * (len(data.train_images) // BATCH)
    rate = learning_rate("cosine", RATE, steps)
    tx = fi.optimizer(sgd(rate, momentum=0.9, weight_decay=DECAY), plan)
    with progress_bar() as bar:
        return fit(
            model, variables, tx, data, steps=steps, batch_size=BATCH, seed=seed, rate=rate, on_divergence="stop",
            on_progress=bar(f"{network.label}, seed {seed}"),
        )  # fmt: skip


def _line(network: Network, comparison: fi.Comparison, runs: list[Any]) -> dict[str, Any]:
    accuracies = [r.final_accuracy for r in runs if r.label == network.label and r.final_accuracy is not None]
    stopped = [r for r in runs if r.label == network.label and r.note]
    drift = comparison[network.label].drift("forward")
    return {
        "network": network.label,
        "signal": drift.verdict if drift.factor is None else f"{drift.verdict}, x {drift.factor:.2f} a block",
        "test accuracy": ", ".join(f"{a:.1%}" for a in accuracies) or "none",
        "stopped": f"{len(stopped)} of {len([r for r in runs if r.label == network.label])}",
    }
