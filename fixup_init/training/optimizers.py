"""The optimizer and the learning rates of the Fixup paper's image experiments, made of optax's parts."""

import optax


def learning_rate(kind: str, peak: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """The learning rate of each step.

    Args:
      kind: `"step"` divides by 10 after half and after three quarters of the steps, as the Fixup paper does on CIFAR-10
        (100 and 150 of 200 epochs); `"cosine"` falls to 0 along half a cosine; `"constant"` stays.
      peak: the highest rate.
      steps: steps of the whole training, with the warmup.
      warmup: steps of a linear rise from 0 to the peak at the beginning. Fixup needs none.

    Example:
      >>> rate = learning_rate("step", 0.1, steps=200)
      >>> [round(float(rate(step)), 4) for step in (0, 99, 101, 151)]
      [0.1, 0.1, 0.01, 0.001]
    """
    if not 0 <= warmup < max(steps, 1):
        raise ValueError(f"warmup is {warmup}, expected 0 or more, and fewer than the {steps} steps of the training")
    after = steps - warmup
    if kind == "step":
        # The marks are those of the whole training, which join_schedules counts from the end of the warmup.
        marks = {steps // 2 - warmup: 0.1, steps * 3 // 4 - warmup: 0.1}
        main = optax.piecewise_constant_schedule(peak, marks)
    elif kind == "cosine":
        main = optax.cosine_decay_schedule(peak, after)
    elif kind == "constant":
        main = optax.constant_schedule(peak)
    else:
        raise ValueError(f"unknown schedule {kind!r}; expected step, cosine or constant")
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup]) if warmup else main


def sgd(
    rate: float | optax.Schedule, *, momentum: float = 0.9, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """The optimizer of the paper's image experiments: SGD with momentum, weight decay added to the gradient."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=momentum))
