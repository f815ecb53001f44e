"""What a parameter is by what it does: kernels of what makes a kernel or a factor, and values that undo a factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fixup_init as fi


class Made(nn.Module):
    """A stream that meets what parameters were made into."""

    use: Callable[[Any, Any], Any]
    shape: tuple[int, ...] = (16,)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3, name="head")(self.use(nn.Dense(16, name="stem")(x), self.param("p", nn.ones, self.shape)))


X = jax.ShapeDtypeStruct((4, 6, 8), jnp.float32)


def entry(use: Callable[[Any, Any], Any], shape: tuple[int, ...] = (16,), scheme: str = "fixup") -> Any:
    return fi.plan(Made(use, shape), X, scheme=scheme)["p"]


@pytest.mark.parametrize(
    ("use", "value"),
    [
        (lambda x, p: x * p, 1.0), (lambda x, p: x * (1 + p), 0.0), (lambda x, p: x * p * 4.0, 1.0),
        (lambda x, p: x * (p * 4.0), 0.25), (lambda x, p: x * (2 - p), 1.0), (lambda x, p: x / p, 1.0),
        (lambda x, p: x * (p / 4.0 + 0.5), 2.0), (lambda x, p: x * -p, -1.0),
        (lambda x, p: x / jnp.linalg.norm(x, axis=-1, keepdims=True) * (p * math.sqrt(16)), 0.25),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["fixup", "he_normal"])
def test_a_multiplier_starts_where_it_multiplies_by_one(use: Any, value: float, scheme: str) -> None:
    assert entry(use, scheme=scheme).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        (lambda x, p: (1 - p) * x + p * jnp.tanh(x), ()),  # at 1 nothing of x would be left
        (lambda x, p: x * jnp.exp(p), (16,)),
        (lambda x, p: x * (jnp.ones(5) @ p), (5, 16)),  # a hypernetwork
        (lambda x, p: jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * jnp.fft.rfft(p, axis=0), 6, axis=1), (6, 16)),  # a filter
        (lambda x, p: x[..., :1] * p, (16,)),  # a number times a vector: a layer
        (lambda x, p: jnp.sin(x.mean(-1, keepdims=True) * p), (16,)),  # random frequencies
    ],
)
@pytest.mark.parametrize("scheme", ["fixup", "he_normal"])
def test_what_is_no_multiplier_stays_as_the_model_has_it(use: Any, shape: tuple[int, ...], scheme: str) -> None:
    assert entry(use, shape, scheme).distribution == "model"


class Queries(nn.Module):
    """Attention from learned queries, as in DETR and the Set Transformer."""

    bias: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(16, name="stem")(x)
        q = nn.Dense(16, use_bias=self.bias, name="q")(self.param("queries", nn.initializers.normal(), (5, 16)))
        weights = nn.softmax(jnp.einsum("qd,bkd->bqk", q, nn.Dense(16, name="k")(x)) / 4)
        return nn.Dense(3, name="head")(weights @ nn.Dense(16, name="v")(x))


def test_the_bias_of_a_layer_on_learned_queries_is_no_kernel() -> None:
    with_bias, without = (fi.structure(Queries(bias), X) for bias in (True, False))
    assert [layer.path for layer in with_bias.layers] == [layer.path for layer in without.layers]
    roles = {q.path: q.role for q in with_bias.parameters}
    assert (roles["q/bias"], roles["q/kernel"], roles["queries"]) == ("bias", "factor", "factor")
    assert fi.plan(Queries(True), X)["q/bias"].value == 0
    assert fi.plan(Queries(True), X)["q/kernel"].distribution == "model"
