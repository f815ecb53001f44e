"""Trains a CIFAR ResNet, with normalization or without, on digits, Fashion-MNIST or CIFAR-10.

    python examples/train_resnet.py                              # digits, Fixup, depth 20: 98.3 % in 15 s on 2 cores
    python examples/train_resnet.py --norm batch                 # the same with batch norm: 98.9 % in 16 s
    python examples/train_resnet.py --norm none --depth 56       # neither: 10.0 %, which is chance, in 31 s
    python examples/train_resnet.py --data cifar10 --epochs 4 --schedule cosine      # 70.5 % in 16 minutes on 2 cores
    python examples/train_resnet.py --data cifar10 --depth 110 --mixup 1             # the paper's run, for a GPU

Digits (8x8, real handwriting) come with scikit-learn and need no download. The other two are read from --data-dir, or
downloaded. Standard output gets one line of JSON with the result; --json writes the loss of every step as well.

The network, its initialization and its optimizer go together: with --norm fixup the plan of the Fixup scheme says what
each parameter gets, and the scalars that take the place of normalization learn at a tenth of the rate.

Needs: python -m pip install "fixup_init[examples]"
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

import fixup_init as fi
from fixup_init.files import replacing
from fixup_init.models.resnet import cifar_resnet
from fixup_init.training import (
    AUGMENT,
    Augment,
    DataFileError,
    Epoch,
    History,
    fit,
    learning_rate,
    load,
    progress_bar,
    sgd,
)


@dataclass(frozen=True)
class Recipe:
    """What depends on the data set unless the command line says otherwise."""

    epochs: int
    batch_size: int
    lr: float
    schedule: Literal["step", "cosine", "constant"]
    crop: int
    flip: bool


# CIFAR-10 has the paper's settings. Digits take small batches, since with 1,437 images the number of steps is what
# counts, and a smaller rate with them: at 0.1 a deep Fixup network can die. A cosine ends at zero after any number of
# epochs. Crops and mirror images are those of `fixup_init.training.AUGMENT`, where the reasons are.
RECIPES = {
    "digits": Recipe(12, 32, 0.04, "cosine", AUGMENT["digits"].crop_padding, AUGMENT["digits"].flip),
    "fashion-mnist": Recipe(
        10, 128, 0.1, "cosine", AUGMENT["fashion-mnist"].crop_padding, AUGMENT["fashion-mnist"].flip
    ),
    "cifar10": Recipe(200, 128, 0.1, "step", AUGMENT["cifar10"].crop_padding, AUGMENT["cifar10"].flip),
}


@dataclass(frozen=True)
class Settings:
    """What to train, on what, and for how long. `None` leaves it to the data set's recipe."""

    norm: Literal["fixup", "batch", "group", "instance", "layer", "none"] = "fixup"
    """What stands after each convolution."""
    depth: int = 20
    """Layers of the network: 6n + 2."""
    width: int = 16
    """Channels of the first stage."""
    data: Literal["digits", "fashion-mnist", "cifar10"] = "digits"
    """The data set."""
    data_dir: Path | None = None
    """Where its official files are, or shall be; the cache directory of the system otherwise."""
    scheme: str | None = None
    """Initialization: "fixup", "model" (the network's own), "he_normal" ...; by default the one for --norm."""
    epochs: int | None = None
    """Passes over the training set."""
    batch_size: int | None = None
    """Images per step."""
    lr: float | None = None
    """The highest learning rate."""
    schedule: Literal["step", "cosine", "constant"] | None = None
    """How the learning rate falls; "step" divides by 10 at 50% and 75% of the steps."""
    warmup: int = 0
    """Steps of linear warmup. Fixup needs none."""
    weight_decay: float = 1e-4
    """Added to the gradient of every parameter, times the parameter."""
    crop: int | None = None
    """Pixels of black padding before a random crop; 0 is without."""
    flip: bool | None = None
    """Whether half of the images are mirrored."""
    mixup: float = 0.0
    """alpha of mixup; 0 is without, the paper's long runs have 1."""
    seed: int = 0
    """Fixes initialization, order and augmentation."""
    max_minutes: float | None = None
    """Stop after so many minutes, wherever the training is then, and evaluate."""
    json: Path | None = None
    """File for settings, result and the whole history."""
    checkpoint_dir: Path | None = None
    """Directory for the variables after each of the last three epochs, as Orbax checkpoints."""

    def recipe(self) -> Recipe:
        """The recipe of the data set, with what the command line says in its place."""
        given = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        return replace(RECIPES[self.data], **{name: value for name, value in given.items() if value is not None})


def train(settings: Settings) -> tuple[dict[str, Any], History]:
    """Runs the training; returns the result line and the whole record."""
    recipe = settings.recipe()
    dataset = load(settings.data, settings.data_dir)
    model = cifar_resnet(settings.depth, norm=settings.norm, num_classes=dataset.num_classes, width=settings.width)
    images = jax.ShapeDtypeStruct((recipe.batch_size, *dataset.image_shape), jnp.float32)
    # He by fan_out is what Fixup scales, and what the ResNets of both papers start from.
    scheme = settings.scheme or ("fixup" if settings.norm == "fixup" else "he_normal_fan_out")
    plan = fi.plan(model, images, train=True, scheme=scheme)
    variables = fi.init(model, jax.random.key(settings.seed), images, train=True, scheme=plan)

    steps = recipe.epochs * (len(dataset.train_images) // recipe.batch_size)
    rate = learning_rate(recipe.schedule, recipe.lr, steps, settings.warmup)
    tx = fi.optimizer(sgd(rate, momentum=0.9, weight_decay=settings.weight_decay), plan)

    checkpoints = nullcontext() if settings.checkpoint_dir is None else open_checkpoints(settings.checkpoint_dir)
    with progress_bar() as bar, checkpoints as manager:
        history = fit(
            model,
            variables,
            tx,
            dataset,
            steps=steps,
            batch_size=recipe.batch_size,
            seed=settings.seed,
            augment=Augment(recipe.crop, recipe.flip, settings.mixup),
            rate=rate,
            max_seconds=None if settings.max_minutes is None else 60 * settings.max_minutes,
            on_divergence="stop",
            on_progress=bar(f"ResNet-{settings.depth} {settings.norm}"),
            on_epoch=None if manager is None else saver(manager),
        )
    used = {**asdict(settings), **asdict(recipe), "scheme": scheme}
    return summary(used, variables["params"], history), history


def summary(used: dict[str, Any], params: Any, history: History) -> dict[str, Any]:
    """The result line: settings, size, losses, accuracy, speed."""
    epochs = history.to_dict()["epochs"]
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in used.items()},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "steps": len(history.losses),
        "train_loss": epochs[-1]["train_loss"] if epochs else None,
        "test_loss": epochs[-1]["test_loss"] if epochs else None,
        "test_accuracy": history.test_accuracy,
        "images_per_second": round(history.images_per_second, 1),
        "compile_seconds": round(history.compile_seconds, 1),
        "seconds": round(history.seconds, 1),
        "diverged_at": history.diverged_at,
        "message": history.message,
    }


def open_checkpoints(directory: Path) -> Any:
    """An Orbax manager that keeps the last three."""
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(directory.expanduser().absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=3))


def saver(manager: Any) -> Callable[[Epoch, Any], None]:
    """Saves the variables after an evaluation, under the number of the step."""
    import orbax.checkpoint as ocp

    def save(epoch: Epoch, variables: Any) -> None:
        manager.save(epoch.step, args=ocp.args.StandardSave(variables))

    return save


def main(settings: Settings) -> int:
    """Trains, prints the result as one line of JSON, and returns the exit status."""
    try:
        result, history = train(settings)
    except (DataFileError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if history.message is not None:
        print(history.message, file=sys.stderr)
    if settings.json is not None:
        with replacing(settings.json) as temporary:
            temporary.write_text(
                json.dumps({"result": result, "history": history.to_dict()}, indent=1, allow_nan=False)
            )
    print(json.dumps(result, allow_nan=False))
    return 0 if history.diverged_at is None else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
