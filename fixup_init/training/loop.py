"""Training a classifier: one compiled step, a plain loop around it, and a record of what happened.

`fit` knows nothing of initialization schemes or of normalization. It takes a model, its variables and an optax
transform, whatever made them, so that networks are compared under the same data, the same order and the same budget.
It returns a `History`: the loss of every step, the test accuracy of every epoch, speed, and where the loss stopped
being finite, if it did.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, UInt8

from fixup_init.training.augment import AUGMENT, NO_AUGMENT, Augment, normalize, prepare
from fixup_init.training.data import Dataset, train_batches
from fixup_init.training.record import DivergenceError, Epoch, History, Progress, Recorder


@dataclass(frozen=True)
class _Forward:
    """A model as one hashable function, so that a second training of the same model compiles nothing.

    Variables that hold a `params` entry are Flax variables: their other collections (batch statistics) are updated in
    training. Any other tree is the parameters of a pure function.
    """

    apply: Callable[..., Any]
    collections: tuple[str, ...]
    is_flax: bool
    has_train: bool

    @classmethod
    def of(cls, model: Any, variables: PyTree) -> "_Forward":
        is_flax = isinstance(variables, Mapping) and "params" in variables
        collections = tuple(sorted(set(variables) - {"params"})) if is_flax else ()
        apply = getattr(model, "apply", model)
        has_train = "train" in inspect.signature(model if callable(model) else apply).parameters
        return cls(apply, collections, is_flax, has_train)

    def __call__(self, params: PyTree, collections: dict, x: Array, train: bool, key: Array) -> tuple[Array, dict]:
        flags = {"train": train} if self.has_train else {}
        if not self.is_flax:
            return self.apply(params, x, **flags), {}
        variables = {"params": params, **collections}
        if not (train and self.collections):
            return self.apply(variables, x, rngs={"dropout": key}, **flags), collections
        logits, updated = self.apply(variables, x, rngs={"dropout": key}, mutable=list(self.collections), **flags)
        return logits, dict(updated)


class _State(NamedTuple):
    params: PyTree
    collections: dict
    opt_state: PyTree
    step: Int[Array, ""]

    def variables(self, forward: _Forward) -> PyTree:
        return {"params": self.params, **self.collections} if forward.is_flax else self.params


class _Pixels(NamedTuple):
    mean: Float[Array, "channels"]
    std: Float[Array, "channels"]


@partial(jax.jit, static_argnames=("forward", "tx", "augment"), donate_argnames="state")
def _train_step(
    state: _State,
    images: UInt8[Array, "batch height width channels"],
    labels: Int[Array, "batch"],
    key: Array,
    pixels: _Pixels,
    *,
    forward: _Forward,
    tx: optax.GradientTransformation,
    augment: Augment,
) -> tuple[_State, tuple[Array, Array]]:
    """One update; returns the new state, the loss and the accuracy of the batch before the update."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    x, partners, lam = prepare(augment_key, images, labels, pixels.mean, pixels.std, augment)

    def mixed(score: Callable[[Array], Array]) -> Array:
        return lam * score(labels) + (1 - lam) * score(partners) if augment.mixup else score(labels)

    def loss_of(params: PyTree) -> tuple[Array, tuple[Array, dict]]:
        logits, collections = forward(params, state.collections, x, True, dropout_key)
        losses = mixed(lambda y: optax.softmax_cross_entropy_with_integer_labels(logits, y).mean())
        return losses, (mixed(lambda y: (logits.argmax(-1) == y).mean(dtype=jnp.float32)), collections)

    (loss, (accuracy, collections)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return _State(params, collections, opt_state, state.step + 1), (loss, accuracy)


@partial(jax.jit, static_argnames="forward")
def _test_step(
    params: PyTree,
    collections: dict,
    images: UInt8[Array, "batch height width channels"],
    labels: Int[Array, "batch"],
    counted: Float[Array, "batch"],
    pixels: _Pixels,
    *,
    forward: _Forward,
) -> Float[Array, "2"]:
    """Sums of the losses and of the right answers over the images that count."""
    logits, _ = forward(params, collections, normalize(images, *pixels), False, jax.random.key(0))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # `where`, not a product: a padding image must not turn the sum into nan.
    return jnp.stack([jnp.where(counted > 0, s, 0).sum() for s in (losses, logits.argmax(-1) == labels)])


def evaluate(model: Any, variables: PyTree, dataset: Dataset, *, batch_size: int = 256) -> tuple[float, float]:
    """Mean loss and accuracy over the whole test set; the last batch is padded, no image is left out."""
    forward = _Forward.of(model, variables)
    params, collections = _split(variables, forward)
    return _evaluate(forward, params, collections, dataset, batch_size)


def _evaluate(
    forward: _Forward, params: PyTree, collections: dict, dataset: Dataset, batch_size: int
) -> tuple[float, float]:
    count = len(dataset.test_images)
    size = math.ceil(count / math.ceil(count / batch_size))  # equal batches: less padding
    pixels, sums = _pixels(dataset), []
    for start in range(0, count, size):
        images, labels = dataset.test_images[start : start + size], dataset.test_labels[start : start + size]
        missing = size - len(images)
        images, labels = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))), np.pad(labels, (0, missing))
        counted = np.pad(np.ones(size - missing, np.float32), (0, missing))
        sums.append(_test_step(params, collections, images, labels, counted, pixels, forward=forward))
    loss, accuracy = (np.asarray(jax.device_get(sums), np.float64).sum(0) / count).tolist()
    return loss, accuracy


def fit(
    model: Any,
    variables: PyTree,
    tx: optax.GradientTransformation,
    dataset: Dataset,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    augment: Augment | None = None,
    rate: float | optax.Schedule | None = None,
    evaluate_every: int = 1,
    max_seconds: float | None = None,
    on_divergence: str = "raise",
    on_progress: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[Epoch, PyTree], None] | None = None,
) -> History:
    """Trains a classifier and returns the record.

    The same arguments give the same batches, the same augmentation and, on the same machine, the same losses. The
    host waits for the device a few times a second only, yet a loss that is not finite is reported with its exact step.

    Args:
      model: a Flax Linen module, or a function `apply(params, images)`; called with `train=` where it has it.
      variables: its variables (or the function's parameters) at the start; they are left as they are.
      tx: the optimizer, over the parameters.
      dataset: what `load` returns.
      epochs: how many passes over the training set; or else
      steps: how many steps. One of the two is given.
      batch_size: images per step.
      seed: fixes the order of the images, the augmentation and dropout.
      augment: how images are varied; by default as `AUGMENT` says for the data set.
      rate: the learning rate or its schedule, used only to say it in a message (the one that counts is in `tx`).
      evaluate_every: epochs from one evaluation to the next; the end is always evaluated.
      max_seconds: stop after this time, inside an epoch if need be, and evaluate.
      on_divergence: `"raise"` a `DivergenceError` when the loss is not finite, or `"stop"` and note it in the record.
      on_progress: called a few times a second.
      on_epoch: called after each evaluation with its record and the variables (copy what is to outlive the call).

    Returns:
      The record; its `variables` are the trained ones.

    Raises:
      DivergenceError: the loss was not finite, and `on_divergence` is `"raise"`.
      ValueError: the arguments or the model do not fit the data.
    """
    forward = _Forward.of(model, variables)
    params, collections = _split(jax.tree.map(partial(jnp.array, copy=True), variables), forward)  # copies: donated
    batches = train_batches(dataset, batch_size, seed=seed)
    per_epoch = len(dataset.train_images) // batch_size
    steps = _count_steps(epochs, steps, per_epoch)
    if on_divergence not in ("raise", "stop"):
        raise ValueError(f"on_divergence is {on_divergence!r}, expected 'raise' or 'stop'")
    if evaluate_every < 1:
        raise ValueError(f"evaluate_every is {evaluate_every}, expected 1 or more epochs")
    _check_logits(forward, params, collections, dataset)
    augment = augment if augment is not None else AUGMENT.get(dataset.name, NO_AUGMENT)
    state = _State(params, collections, tx.init(params), jnp.zeros((), jnp.int32))
    step = partial(
        _train_step, key=jax.random.key(seed), pixels=_pixels(dataset), forward=forward, tx=tx, augment=augment
    )

    recorder = Recorder(steps, per_epoch, batch_size, on_progress or (lambda progress: None))
    recorder.report("compiling")
    groups = _run(step, state, batches, steps, per_epoch * evaluate_every)
    for state, metrics, seconds in groups:
        recorder.add_steps(metrics, seconds)
        recorder.report("training")
        if recorder.diverged_at is not None:
            recorder.message = recorder.divergence_message(rate)
            break
        late = max_seconds is not None and recorder.seconds > max_seconds and recorder.step < steps
        if late or recorder.step == steps or recorder.step % (per_epoch * evaluate_every) == 0:
            recorder.report("evaluating")
            mark = time.perf_counter()
            test_loss, test_accuracy = _evaluate(forward, state.params, state.collections, dataset, batch_size)
            epoch = recorder.add_evaluation(test_loss, test_accuracy, time.perf_counter() - mark)
            recorder.report("training")
            if on_epoch is not None:
                on_epoch(epoch, state.variables(forward))
        if late:
            recorder.message = f"stopped after {recorder.seconds:.0f} seconds, at step {recorder.step} of {steps}"
            break
    recorder.report("done")
    history = recorder.history(state.variables(forward))
    if history.diverged_at is not None and on_divergence == "raise":
        raise DivergenceError(str(history.message), history)
    return history


def _run(
    step: Callable[..., Any], state: _State, batches: Iterator, steps: int, per_evaluation: int
) -> Iterator[tuple[_State, Float[np.ndarray, "steps 2"], float]]:
    """Takes the steps, and hands back, a few at a time, the state, their losses and accuracies, and their seconds.

    Waiting for each loss would leave the device idle between steps, so the host fetches those of a quarter of a second
    together. The first step, which is compiled, comes alone, and no group goes past an evaluation.
    """
    done, size = 0, 1
    while done < steps:
        size = min(size, steps - done, per_evaluation - done % per_evaluation)
        mark, metrics = time.perf_counter(), []
        for _ in range(size):
            state, of_step = step(state, *next(batches))
            metrics.append(of_step)
        fetched = np.asarray(jax.device_get(metrics), np.float64)
        seconds = time.perf_counter() - mark
        yield state, fetched, seconds
        done, size = done + size, int(np.clip(0.25 * size / seconds, 1, 100))


def _count_steps(epochs: int | None, steps: int | None, per_epoch: int) -> int:
    if (epochs is None) == (steps is None):
        raise ValueError(f"epochs is {epochs} and steps is {steps}; give one of them")
    count = steps if steps is not None else (epochs or 0) * per_epoch
    if count < 1:
        raise ValueError(f"a training of {count} steps (epochs={epochs}, steps={steps}); expected 1 or more")
    return count


def _split(variables: PyTree, forward: _Forward) -> tuple[PyTree, dict]:
    """The parameters, which the optimizer updates, and the other collections, which the model updates itself."""
    if not forward.is_flax:
        return variables, {}
    return variables["params"], {name: variables[name] for name in forward.collections}


def _pixels(dataset: Dataset) -> _Pixels:
    # A channel that is constant in training carries nothing: divide by 1, not by 0.
    std = np.where(dataset.std > 0, dataset.std, 1.0)
    return _Pixels(jnp.asarray(dataset.mean, jnp.float32), jnp.asarray(std, jnp.float32))


def _check_logits(forward: _Forward, params: PyTree, collections: dict, dataset: Dataset) -> None:
    """Tells a user whose model does not fit the data so, before anything is compiled."""
    images = jax.ShapeDtypeStruct((2, *dataset.image_shape), jnp.float32)
    call = partial(forward, train=False, key=jax.random.key(0))
    logits = jax.eval_shape(call, params, collections, images)[0]
    expected = (2, dataset.num_classes)
    if getattr(logits, "shape", None) != expected:
        found = getattr(logits, "shape", f"a {type(logits).__name__}")
        raise ValueError(
            f"the model turns images of shape {images.shape} into {found}, expected logits of shape {expected} for "
            f"{dataset.name}; give the model num_classes={dataset.num_classes} outputs"
        )
