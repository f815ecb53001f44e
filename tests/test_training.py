"""The training loop: what it computes, what it records, how it stops; and the example as a user runs it."""

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import fixup_init as fi
from fixup_init.models.resnet import cifar_resnet
from fixup_init.training import (
    NO_AUGMENT,
    Augment,
    Dataset,
    DivergenceError,
    Progress,
    evaluate,
    fit,
    learning_rate,
    load,
    progress_bar,
    sgd,
)
from fixup_init.training.augment import normalize
from fixup_init.training.data import train_batches

SGD = sgd(0.05)  # one object: a second training of the same model with it compiles nothing
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_resnet.py"


class Small(nn.Module):
    """A network that trains in a second, with batch statistics and dropout where asked for."""

    norm: bool = False
    dropout: float = 0.0
    classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def start(model: nn.Module, digits: Dataset):
    return model.init(jax.random.key(0), jnp.zeros((1, *digits.image_shape)), train=False)


def few(digits: Dataset, count: int) -> Dataset:
    """The first `count` images of each part."""
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    return dataclasses.replace(digits, **{part: getattr(digits, part)[:count] for part in parts})


# ------------------------------------------------------------------------------------------------ what is computed


def test_the_losses_are_those_of_a_loop_written_out(digits):
    """Three steps of momentum SGD with weight decay, by hand, on the batches that the seed gives."""
    model = Small()
    variables = start(model, digits)
    history = fit(
        model, variables, sgd(0.1, weight_decay=1e-2), digits, steps=3, batch_size=50, seed=7, augment=NO_AUGMENT
    )

    def loss_of(params, images, labels):
        logits = model.apply({"params": params}, normalize(images, digits.mean, digits.std))
        return -jax.nn.log_softmax(logits)[jnp.arange(50), labels].mean()

    params, momentum, losses = variables["params"], jax.tree.map(jnp.zeros_like, variables["params"]), []
    batches = train_batches(digits, 50, seed=7)
    for _ in range(3):
        images, labels = next(batches)
        loss, grads = jax.value_and_grad(loss_of)(params, jnp.asarray(images), labels)
        momentum = jax.tree.map(lambda m, g, p: 0.9 * m + g + 1e-2 * p, momentum, grads, params)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum)
        losses.append(float(loss))
    np.testing.assert_allclose(history.losses, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), history.variables["params"], params)


def test_a_small_network_learns_digits_and_the_record_is_whole(digits):
    model, seen = Small(norm=True), []
    variables = start(model, digits)
    history = fit(
        model, variables, SGD, digits, epochs=4, batch_size=64, on_epoch=lambda e, v: seen.append((e, v.keys()))
    )
    assert history.test_accuracy > 0.8 and history.diverged_at is None and history.message is None
    assert len(history.losses) == 4 * 22 and [e.step for e in history.epochs] == [22, 44, 66, 88]
    assert [e.epoch for e in history.epochs] == [1, 2, 3, 4]
    for epoch in history.epochs:
        np.testing.assert_allclose(epoch.train_loss, np.mean(history.losses[epoch.step - 22 : epoch.step]))
    assert history.epochs[-1].train_accuracy > history.epochs[0].train_accuracy
    assert history.images_per_second > 0 and history.seconds >= history.compile_seconds > 0
    assert [e for e, _ in seen] == list(history.epochs) and all(k == variables.keys() for _, k in seen)
    assert evaluate(model, history.variables, digits) == pytest.approx(
        (history.epochs[-1].test_loss, history.epochs[-1].test_accuracy), rel=1e-5
    )


def test_batch_statistics_are_updated_and_the_variables_that_came_in_are_left_alone(digits):
    model = Small(norm=True)
    variables = start(model, digits)
    before = jax.tree.map(np.array, variables)
    history = fit(model, variables, SGD, digits, steps=5, batch_size=64)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    assert jax.tree.structure(history.variables) == jax.tree.structure(variables)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, history.variables)
    assert all(jax.tree.leaves(moved))


def test_the_seed_fixes_everything_and_another_one_changes_it(digits):
    model = Small(dropout=0.3)
    arguments = dict(steps=12, batch_size=32, augment=Augment(crop_padding=1, flip=False, mixup=1.0))
    runs = [fit(model, start(model, digits), SGD, digits, seed=seed, **arguments) for seed in (0, 0, 1)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].epochs[0].test_loss == runs[1].epochs[0].test_loss
    assert runs[0].losses[0] != runs[2].losses[0]


def test_training_in_one_go_or_with_more_evaluations_is_the_same(digits):
    """How often the host looks (epochs end a group of steps) must not show in the losses."""
    model = Small(norm=True)
    small = few(digits, 128)
    often, seldom = (
        fit(model, start(model, digits), SGD, small, epochs=6, batch_size=64, evaluate_every=n) for n in (1, 4)
    )
    assert often.losses == seldom.losses
    assert [e.epoch for e in seldom.epochs] == [4, 6], "the end is always evaluated"
    assert often.epochs[-1].test_accuracy == seldom.epochs[-1].test_accuracy


def test_every_test_image_counts_once_whatever_the_batch_size(digits):
    model = Small()
    variables = start(model, digits)
    logits = model.apply(variables, normalize(jnp.asarray(digits.test_images), digits.mean, digits.std), train=False)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, digits.test_labels).mean()
    accuracy = (logits.argmax(-1) == digits.test_labels).mean()
    for batch_size in (7, 64, 359, 360, 1000):
        assert evaluate(model, variables, digits, batch_size=batch_size) == pytest.approx(
            (float(loss), float(accuracy)), rel=1e-5
        )


def test_a_pure_function_trains_as_well(digits):
    def apply(params, x):
        return x.reshape(len(x), -1) @ params["w"] + params["b"]

    params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    history = fit(apply, params, SGD, digits, epochs=3, batch_size=64)
    assert history.losses[0] == pytest.approx(math.log(10), rel=1e-5)  # zero logits
    assert history.test_accuracy > 0.7 and history.variables.keys() == params.keys()


@pytest.mark.parametrize(("norm", "scheme"), [("batch", "he_normal_fan_out"), ("fixup", "fixup")])
def test_the_reference_networks_train_under_their_plan(digits, norm, scheme):
    model, x = cifar_resnet(8, norm=norm, width=8), jax.ShapeDtypeStruct((32, *digits.image_shape), jnp.float32)
    plan = fi.plan(model, x, train=True, scheme=scheme)
    variables = fi.init(model, jax.random.key(0), x, train=True, scheme=plan)
    history = fit(model, variables, fi.optimizer(SGD, plan), digits, epochs=8, batch_size=32)
    assert history.test_accuracy > 0.6 and history.losses[-1] < 0.6 * history.losses[0]


# ---------------------------------------------------------------------------------------------- how it stops


def exploding(digits: Dataset):
    """A linear network without normalization under a rate far too high."""
    model = Small()
    return model, start(model, digits), learning_rate("constant", 1e6, steps=60)


def test_a_loss_that_is_not_finite_raises_and_says_where(digits):
    model, variables, rate = exploding(digits)
    with pytest.raises(DivergenceError) as caught:
        fit(model, variables, sgd(rate), digits, steps=60, batch_size=64, rate=rate)
    history, message = caught.value.history, str(caught.value)
    step = history.diverged_at
    assert step is not None and len(history.losses) == step - 1 and all(map(math.isfinite, history.losses))
    assert f"step {step} (epoch {(step - 1) // 22 + 1}, batch {(step - 1) % 22 + 1} of 22)" in message
    assert "learning rate 1e+06" in message and f"{history.losses[-1]:.4g}" in message
    assert "smaller learning rate" in message and "Fixup" in message


def test_divergence_can_be_recorded_instead(digits):
    model, variables, rate = exploding(digits)
    history = fit(model, variables, sgd(rate), digits, steps=60, batch_size=64, on_divergence="stop")
    assert history.diverged_at == len(history.losses) + 1 <= 60 and "loss is" in history.message
    assert json.loads(history.to_json())["diverged_at"] == history.diverged_at


def test_the_step_of_divergence_does_not_depend_on_how_often_the_host_looks(digits):
    """The host looks at every 100th of such quick steps or so, and at the 22 that end an epoch."""
    model = Small()

    def poison(count: int) -> optax.GradientTransformation:
        """Parameters turn into nan in update number `count`, so the loss does in the step after."""
        return optax.GradientTransformation(
            lambda params: jnp.zeros((), jnp.int32),
            lambda grads, n, params=None: (
                jax.tree.map(lambda g: jnp.where(n + 1 == count, jnp.nan, 0 * g), grads),
                n + 1,
            ),
        )

    for count in (1, 2, 30, 43, 44, 45):
        history = fit(model, start(model, digits), poison(count), digits, epochs=4, batch_size=64, on_divergence="stop")
        assert history.diverged_at == count + 1
        assert len(history.epochs) == count // 22


def test_a_first_loss_that_is_not_finite_points_at_the_initialization(digits):
    model = Small()
    variables = jax.tree.map(lambda leaf: leaf * jnp.inf, start(model, digits))
    history = fit(model, variables, sgd(0.1), digits, steps=5, on_divergence="stop")
    assert history.diverged_at == 1 and history.losses == () and history.test_accuracy is None
    assert "first loss" in history.message and "initialization" in history.message


def test_time_runs_out_inside_an_epoch_and_the_end_is_evaluated(digits):
    model = Small()
    history = fit(model, start(model, digits), SGD, digits, epochs=10_000, batch_size=16, max_seconds=3.0)
    assert 3 <= history.seconds < 20 and "stopped after" in history.message
    assert history.epochs[-1].step == len(history.losses) and history.test_accuracy > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "epochs is None and steps is None; give one"),
        ({"epochs": 1, "steps": 1}, "epochs is 1 and steps is 1; give one"),
        ({"epochs": 0}, "training of 0 steps"),
        ({"steps": 1, "batch_size": 2000}, "batch_size is 2000, expected 1 to 1437"),
        ({"steps": 1, "evaluate_every": 0}, "evaluate_every is 0"),
        ({"steps": 1, "on_divergence": "ignore"}, "on_divergence is 'ignore', expected 'raise' or 'stop'"),
    ],
)
def test_arguments_that_make_no_training_are_refused(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(Small(), start(Small(), digits), sgd(0.1), digits, **arguments)


def test_a_model_with_another_number_of_classes_is_refused_before_anything_is_compiled(digits):
    model = Small(classes=7)
    with pytest.raises(
        ValueError, match=r"into \(2, 7\), expected logits of shape \(2, 10\) for digits; give the model"
    ):
        fit(model, start(model, digits), sgd(0.1), digits, steps=1)


# --------------------------------------------------------------------------------------------- rates, record, bar


def test_the_rate_falls_at_half_and_at_three_quarters_with_or_without_warmup():
    for warmup in (0, 20):
        rate = learning_rate("step", 0.1, steps=200, warmup=warmup)
        values = [float(rate(step)) for step in (99, 100, 149, 150, 199)]
        np.testing.assert_allclose(values, [0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)
    assert float(rate(0)) == 0 and float(rate(10)) == pytest.approx(0.05)


def test_the_cosine_ends_at_zero_and_the_constant_stays():
    cosine = learning_rate("cosine", 0.4, steps=100, warmup=20)
    assert float(cosine(20)) == pytest.approx(0.4) and float(cosine(60)) == pytest.approx(0.2)
    assert float(cosine(100)) == pytest.approx(0, abs=1e-7)
    assert learning_rate("constant", 0.4, steps=100)(73) == 0.4


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="unknown schedule 'linear'; expected step, cosine or constant"):
        learning_rate("linear", 0.1, steps=10)
    with pytest.raises(ValueError, match="warmup is 10, expected 0 or more, and fewer than the 10 steps"):
        learning_rate("step", 0.1, steps=10, warmup=10)


def test_the_record_goes_to_json_without_the_variables(digits):
    model = Small()
    history = fit(model, start(model, digits), SGD, few(digits, 64), epochs=2, batch_size=32)
    record = json.loads(history.to_json())
    assert record == json.loads(json.dumps(history.to_dict())) and "variables" not in record
    assert record["losses"] == list(history.losses) and record["epochs"][1]["step"] == 4
    assert record["test_accuracy"] == history.test_accuracy
    worse = dataclasses.replace(history.epochs[0], test_loss=math.inf)
    assert dataclasses.replace(history, epochs=(worse,)).to_dict()["epochs"][0]["test_loss"] is None


def test_progress_is_told_from_the_first_compilation_to_the_end(digits):
    model, told = Small(), []
    fit(model, start(model, digits), SGD, digits, epochs=2, batch_size=64, on_progress=told.append)
    assert told[0] == Progress("compiling", 0, 44, 0.0) and told[-1].phase == "done" and told[-1].step == 44
    assert {p.phase for p in told} == {"compiling", "training", "evaluating", "done"}
    steps = [p.step for p in told]
    assert steps == sorted(steps) and all(p.steps == 44 for p in told)
    assert told[-1].images_per_second > 0 and told[-1].test_accuracy is not None


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_loss_accuracy_and_speed(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    with progress_bar(console) as bar:
        show = bar("ResNet-20")
        show(Progress("compiling", 0, 100, 0.0))
        show(Progress("training", 50, 100, 1.0, loss=1.25, images_per_second=1234.0))
        show(Progress("evaluating", 100, 100, 2.0, loss=0.5, images_per_second=1300.0))
        show(Progress("training", 100, 100, 2.0, loss=0.5, test_accuracy=0.987, images_per_second=1300.0))
        show(Progress("done", 100, 100, 2.0, loss=0.5, test_accuracy=0.987, images_per_second=1300.0))
    text = console.file.getvalue()
    for part in ("ResNet-20", "compiling", "loss 0.5000", "accuracy 98.7%", "1,300 images/s"):
        assert part in text
    assert terminal == ("1,234 images/s" in text), "a log file gets a line for each evaluation, a terminal all"
    assert terminal or text.count("\n") == 2


# ------------------------------------------------------------------------------------------------- the example


def run_example(arguments: str, *more: str | Path, expect: int = 0) -> tuple[dict, str]:
    command = [sys.executable, "-W", "error", str(EXAMPLE), *arguments.split(), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, done.stderr


def test_the_example_trains_and_leaves_its_files(tmp_path):
    written, checkpoints = tmp_path / "new" / "run.json", tmp_path / "checkpoints"
    result, progress = run_example(
        "--depth 8 --width 4 --epochs 1 --batch-size 128 --mixup 0.5 --seed 3 --json",
        *(written, "--checkpoint-dir", checkpoints),
    )
    assert (result["norm"], result["scheme"], result["seed"], result["steps"]) == ("fixup", "fixup", 3, 11)
    assert result["parameters"] > 0 and result["diverged_at"] is None and result["images_per_second"] > 0
    assert 0 <= result["test_accuracy"] <= 1 and "step 11 of 11" in progress
    record = json.loads(written.read_text())
    assert record["result"] == result and len(record["history"]["losses"]) == 11
    assert list(written.parent.iterdir()) == [written], "no temporary file stays"
    assert (checkpoints / "11").is_dir()


def test_the_example_reports_divergence_with_status_1():
    result, message = run_example("--norm none --depth 8 --width 4 --epochs 1 --lr 1e8", expect=1)
    assert result["diverged_at"] > 1 and result["scheme"] == "he_normal_fan_out"
    assert f"step {result['diverged_at']} " in message and "at learning rate" in message


def test_the_example_turns_a_missing_file_into_one_line(tmp_path):
    result, message = run_example("--data cifar10 --data-dir", tmp_path / "typo", expect=1)
    assert result == {} and message.startswith(f"error: {tmp_path / 'typo'}: no such directory")
    assert "Traceback" not in message
