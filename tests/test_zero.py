"""What would not learn from zero does not start there: heads and ends of branches, against JAX's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fixup_init as fi
from fixup_init import zero
from fixup_init.tracing import trace

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 8))


def normalized(x: Any) -> Any:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def bilinear(x: Any) -> Any:
    a, b = jnp.split(x, 2, -1)
    return a * b


def scanned(x: Any) -> Any:
    return jax.lax.scan(lambda carry, row: (carry + nn.relu(row), row), jnp.zeros(8), x)[0]


BEHIND: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda x: x, "relu": nn.relu, "relu6": nn.relu6, "leaky relu": nn.leaky_relu, "gelu": nn.gelu,
    "silu": nn.silu, "elu": nn.elu, "selu": nn.selu, "tanh": nn.tanh, "sigmoid": nn.sigmoid, "softmax": nn.softmax,
    "log softmax": nn.log_softmax, "exp": jnp.exp, "abs": jnp.abs, "square": jnp.square, "cube": lambda x: x**3,
    "max": lambda x: jnp.maximum(x, 0), "relu beside": lambda x: nn.relu(x) + x, "glu": nn.glu, "bilinear": bilinear,
    "normalized": normalized, "hard swish": nn.hard_swish, "mean": lambda x: x.mean(-1), "relu of a mean": lambda x: (
        nn.relu(x.mean(-1))), "scaled": lambda x: 3 * x.T, "squared relu": lambda x: jnp.square(nn.relu(x)),
    "cast": lambda x: nn.relu(x.astype(jnp.bfloat16)), "sorted": lambda x: jnp.sort(x), "scan": scanned,
}  # fmt: skip


@pytest.mark.parametrize(("ends_in", "learns"), [("relu", False), ("nothing", True)])
@pytest.mark.parametrize("where", ["shared by passes", "sliced by passes", "in an arm"])
def test_zeros_inside_of_scans_and_conditionals(where: str, ends_in: str, learns: bool) -> None:
    def block(x: Any, w: Any) -> Any:
        return x + BEHIND[ends_in](nn.relu(x @ w["a"]) @ w["b"])

    def net(w: Any, x: Any) -> Any:
        if where == "shared by passes":
            x = jax.lax.scan(lambda x, _: (block(x, w), None), x, length=3)[0]
        elif where == "sliced by passes":
            x = jax.lax.scan(lambda x, own: (block(x, own), None), x, {k: w[k] for k in "ab"})[0]
        else:
            x = jax.lax.cond(x.sum() > 0, lambda: block(x, w), lambda: x)
        return x @ w["head"]

    shape = (3, 8, 8) if where == "sliced by passes" else (8, 8)
    leaves = dict.fromkeys("ab", jax.ShapeDtypeStruct(shape, jnp.float32))
    plan = fi.plan(fi.Function(net, {**leaves, "head": jax.ShapeDtypeStruct((8, 3), jnp.float32)}), X)
    assert (plan["b"].value == 0) == learns


def test_a_head_inside_of_a_scan_learns() -> None:
    """What a body returns has gone where nothing more is asked of it."""

    def net(w: Any, x: Any) -> Any:
        return jax.lax.scan(lambda h, row: (jnp.tanh(h + row @ w["in"]), h @ w["head"]), jnp.zeros(8), x)[1]

    plan = fi.plan(fi.Function(net, dict.fromkeys(("in", "head"), jax.ShapeDtypeStruct((8, 8), jnp.float32))), X)
    assert plan["head"].value == 0


class Ended(nn.Module):
    behind: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return self.behind(nn.Dense(8, name="head")(nn.relu(nn.Dense(16)(x))))


@pytest.mark.parametrize("name", BEHIND)
def test_what_learns_from_zero_is_what_has_a_gradient(name: str) -> None:
    model = Ended(BEHIND[name])
    variables = model.init(KEY, X)
    variables["params"]["head"] = jax.tree.map(jnp.zeros_like, variables["params"]["head"])
    out, pull = jax.vjp(lambda v: model.apply(v, X), variables)
    (gradient,) = pull(jax.random.normal(KEY, out.shape, out.dtype))
    gradient = np.asarray(gradient["params"]["head"]["kernel"])
    graph = trace(model, (X,), {}).graph
    leaf = next(v for v, leaf in graph.leaves.items() if leaf.path == "head/kernel")
    learns = bool(np.isfinite(gradient).all() and np.abs(gradient).max() > 0)
    assert zero.learns(graph, zero.uses(graph), leaf) == learns
    entry = fi.plan(model, X)["head/kernel"]
    assert (entry.value == 0) == learns
    assert learns or "not zero" in entry.reason


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda: nn.BatchNorm(use_running_average=False)])
def test_a_head_that_is_normalized_is_not_zero(norm: Any) -> None:
    entry = fi.plan(Ended(lambda x: norm()(x)), X)["head/kernel"]
    assert entry.std and "normalization" in entry.reason


class Branches(nn.Module):
    behind: Callable[[Any], Any]
    depth: int = 2

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(16)(x)
        for k in range(4):
            h = x
            for j in range(self.depth):
                h = nn.Dense(16, name=f"layer{k}{j}")(h if j == 0 else nn.tanh(h))
            x = x + self.behind(h)
        return nn.Dense(3)(x)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_branch_that_ends_in_relu_learns(depth: int) -> None:
    """Its last layer has the factor of the others; one of a single layer starts with L^(-1/2)."""
    model = Branches(nn.relu, depth)
    plan = fi.plan(model, X)
    std = np.sqrt(2 / 16) * 4 ** (-0.5 if depth == 1 else -1 / (2 * depth - 2))
    for k in range(4):
        last = plan[f"layer{k}{depth - 1}/kernel"]
        assert last.std == pytest.approx(std, rel=1e-12) and "no gradient" in last.reason
    variables = fi.init(model, KEY, X)
    variables["params"]["Dense_1"]["kernel"] += 0.1  # the head, which is zero
    gradient = jax.grad(lambda v: jnp.square(model.apply(v, X)).sum())(variables)
    assert all(np.abs(gradient["params"][f"layer{k}{depth - 1}"]["kernel"]).max() > 0 for k in range(4))


def test_a_scale_before_relu_is_not_zero() -> None:
    """Zero in the scale of batch norm would leave relu, and with it the branch, dead."""
    plan = fi.plan(Branches(lambda h: nn.relu(nn.BatchNorm(use_running_average=False)(h))), X)
    assert plan["BatchNorm_0/scale"].value == 1
    assert any("does not start at 0" in note for note in plan.notes)
    assert fi.plan(Branches(lambda h: nn.BatchNorm(use_running_average=False)(h)), X)["BatchNorm_0/scale"].value == 0


def test_zeros_that_stay_zero_are_told() -> None:
    """Set by hand, behind a relu: no gradient reaches them, which is no state of the first steps."""
    model = Branches(nn.relu)
    variables = fi.init(model, KEY, X, scheme="he_normal")
    for k in range(4):
        variables["params"][f"layer{k}1"]["kernel"] *= 0
    found = [v for v in fi.analyze(model, variables, X).verdicts() if "never leaves zero" in v.text]
    assert len(found) == 1 and found[0].severity == "warning" and "4 layers" in found[0].text
    well = fi.analyze(model, fi.init(model, KEY, X), X).verdicts()
    assert not any("never leaves zero" in v.text for v in well)
    ended = Ended(nn.relu)
    variables = ended.init(KEY, X)
    variables["params"]["head"]["kernel"] *= 0
    found = fi.analyze(ended, variables, X, loss=lambda y: jnp.square(y - 1).mean()).verdicts()
    assert any("never leaves zero" in v.text for v in found)
    variables = fi.init(Ended(jnp.tanh), KEY, X)
    found = fi.analyze(Ended(jnp.tanh), variables, X, loss=lambda y: jnp.square(y - 1).mean()).verdicts()
    assert not any("never leaves zero" in v.text for v in found)
