"""What is measured, against the definitions written out on whole arrays."""

from __future__ import annotations

import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from zoo import TOKENS, Encoder, Stacked

import fixup_init as fi
from fixup_init import taps
from fixup_init.gathering import Gathering
from fixup_init.models.resnet import cifar_resnet
from fixup_init.statistics import Layout, combined, gather, measure, norm, read, read_norm
from fixup_init.tracing import trace


def spelled_out(x: np.ndarray) -> dict[str, float]:
    """Of an array [examples, positions, channels] in float64."""
    x = x.astype(np.float64)
    n = len(x)
    variance = x.var()
    flat = x.reshape(n, -1)
    norms = np.linalg.norm(flat, axis=1)
    pairs = [
        flat[i] @ flat[j] / norms[i] / norms[j] for i, j in itertools.combinations(range(n), 2) if norms[i] * norms[j]
    ]
    return {
        "mean": x.mean(),
        "variance": variance,
        "squared_channel_mean": (x.mean((0, 1)) ** 2).mean(),
        "zeros": (x == 0).mean(),
        "example_cosine": float(np.mean(pairs)),
        "example_share": x.mean((1, 2)).var() / variance,
        "channel_share": x.mean((0, 1)).var() / variance,
        "position_share": x.mean((0, 2)).var() / variance,
    }


LAYOUTS = {
    "last": ((0, 1, 2), (5, 12, 6), Layout(2, 0, 5)),
    "channels-first": ((0, 2, 1), (5, 6, 12), Layout(1, 0, 5)),
    "time-first": ((1, 0, 2), (12, 5, 6), Layout(2, 1, 5)),
    "merged": ((0, 1, 2), (60, 6), Layout(1, 0, 5, 12)),
    "merged-behind": ((1, 0, 2), (60, 6), Layout(1, 0, 5)),
    "images": ((0, 1, 2), (5, 3, 4, 6), Layout(3, 0, 5)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_axes_are_told_apart(name: str) -> None:
    order, shape, layout = LAYOUTS[name]
    noise = np.random.default_rng(0)
    x = noise.normal(size=(5, 12, 6)) + noise.normal(size=(5, 1, 1)) + 2 * noise.normal(size=(1, 1, 6)) + 0.5
    x[noise.random(x.shape) < 0.1] = 0
    x[3] = 0  # an example that has no direction
    found = read(np.asarray(measure(jnp.asarray(x.transpose(order).reshape(shape), jnp.float32), layout)))
    for key, value in spelled_out(x).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert math.isnan(found.saturated)


def test_without_examples_or_channels() -> None:
    x = np.random.default_rng(0).normal(size=(7, 3))
    found = read(np.asarray(measure(jnp.asarray(x, jnp.float32), Layout(1))))
    assert found.variance == pytest.approx(x.var(), rel=1e-5) and math.isnan(found.example_cosine)
    assert found.channel_share == pytest.approx(x.mean(0).var() / x.var(), rel=1e-4)
    found = read(np.asarray(measure(jnp.asarray(x[:, 0], jnp.float32), Layout(0, 0, 7))))
    assert found.squared_channel_mean == pytest.approx(x[:, 0].mean() ** 2, rel=1e-4)
    assert found.example_share == pytest.approx(1, rel=1e-4)


def test_rank_falls_to_one_where_all_is_parallel() -> None:
    noise = jax.random.normal(jax.random.key(0), (32, 16, 64))
    full = read(np.asarray(measure(noise, Layout(2, 0, 32))))
    assert 25 < full.effective_rank <= 64 and abs(full.example_cosine) < 0.02
    line = read(np.asarray(measure(jnp.ones((32, 16, 1)) * noise[:1, :1], Layout(2, 0, 32))))
    assert line.effective_rank == pytest.approx(1, rel=1e-5) and line.example_cosine == pytest.approx(1, rel=1e-5)
    plane = jnp.zeros((64, 1, 8)).at[::2, 0, 0].set(1.0).at[1::2, 0, 5].set(-1.0)
    assert read(np.asarray(measure(plane, Layout(2, 0, 64)))).effective_rank == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_wide_whatever_the_dtype(dtype: Any, size: float) -> None:
    x = (size * jnp.linspace(-1, 1, 1000, dtype=jnp.float32).reshape(10, 100)).astype(dtype)
    found = read(np.asarray(measure(x, Layout(1, 0, 10))))
    parts = np.stack([np.asarray(x.real, np.float64), np.asarray(x.imag, np.float64)]) if x.dtype.kind == "c" else x
    assert found.finite == 1 and found.variance == pytest.approx(np.asarray(parts, np.float64).var(), rel=1e-5)


def test_one_entry_that_is_not_finite_is_counted() -> None:
    x = jnp.ones((4, 25)).at[1, 3].set(jnp.nan).at[2, 2].set(jnp.inf)
    found = read(np.asarray(measure(x, Layout(1, 0, 4))))
    assert found.finite == pytest.approx(0.98) and math.isnan(found.mean)


def large(value: float = 1.0) -> np.ndarray:
    """More entries than the costlier statistics look at; a number of them that has no exact inverse."""
    noise = np.random.default_rng(0)
    return value * (noise.normal(size=(12, 30, 35, 3)) + noise.normal(size=(12, 1, 1, 1)) + noise.normal(size=3) - 4)


@pytest.mark.parametrize("size", [1e-14, 1.0, 1e12])
def test_moments_of_a_large_array_are_those_of_all_entries(size: float) -> None:
    x = large(size)
    found = read(np.asarray(measure(jnp.asarray(x, jnp.float32), Layout(3, 0, 12))))
    assert found.finite == 1
    assert found.mean == pytest.approx(x.mean(), rel=1e-5)
    assert found.variance == pytest.approx(x.var(), rel=1e-5)
    assert found.squared_channel_mean == pytest.approx((x.mean((0, 1, 2)) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(("size", "shift"), [(1e-25, 0), (1e25, 0), (3e36, 0), (1, 1e3)])
def test_those_out_of_the_range_of_float32_are_of_some(size: float, shift: float) -> None:
    x = (large(size) + shift).astype(np.float32)
    found = read(np.asarray(measure(jnp.asarray(x), Layout(3, 0, 12))))
    exact = x.astype(np.float64)
    assert found.finite == 1 and found.mean == pytest.approx(exact.mean(), rel=0.02)
    assert found.variance == pytest.approx(exact.var(), rel=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_entry_of_a_large_array_that_is_not_finite_is_seen(bad: float) -> None:
    x = large()
    x[5, 17, 1, 2] = bad
    some = gather(jnp.asarray(x, jnp.float32), Layout(3, 0, 12)).some
    assert jnp.isfinite(some).all()  # not among those that are looked at
    found = read(np.asarray(measure(jnp.asarray(x, jnp.float32), Layout(3, 0, 12))))
    assert 0.99 < found.finite < 1 and math.isnan(found.variance)


def test_arrays_are_finished_together() -> None:
    """More of one shape than are finished at once, fewer of another, and those that differ in limits."""
    gathering, noise = Gathering(), np.random.default_rng(1)
    arrays = [jnp.asarray(noise.normal(size=(4, k % 3 + 5)), jnp.float32) for k in range(30)]
    layouts = [Layout(1, 0, 4, limits=(-1.0, 1.0) if k % 2 else None) for k in range(30)]
    for k, (x, layout) in enumerate(zip(arrays, layouts, strict=True)):
        gathering.add_array(k, x, layout)
    found = gathering.read()
    assert sorted(found) == list(range(30))
    for k, (x, layout) in enumerate(zip(arrays, layouts, strict=True)):
        np.testing.assert_allclose(found[k], measure(x, layout), rtol=1e-5, atol=1e-6)
        assert math.isnan(read(found[k]).saturated) == (layout.limits is None)


def test_parts_on_several_devices_are_combined() -> None:
    """Means and variances of the whole; a device on which an arm did not run does not count."""
    x = large().astype(np.float32) * np.array([1.0, 1e15, 1.0], np.float32)[:, None, None, None, None].repeat(12, 1)
    each = jnp.stack([*(measure(jnp.asarray(part), Layout(3, 0, 12)) for part in x), jnp.zeros(12)])
    found, exact = read(np.asarray(combined(each))), x.astype(np.float64)
    assert found.finite == 1 and found.mean == pytest.approx(exact.mean(), rel=1e-2)
    assert found.variance == pytest.approx(exact.var(), rel=2e-2)
    assert read(np.asarray(combined(jnp.zeros((3, 12))))).second_moment == 0


def test_norms_leave_float32() -> None:
    assert read_norm(np.asarray(norm(jnp.full((3, 4), 3e38), 0))) == pytest.approx(3e38 * 12**0.5, rel=1e-6)
    rows = np.asarray(norm(jnp.arange(6.0).reshape(2, 3), 1))
    assert [read_norm(rows[:, k]) for k in range(2)] == pytest.approx([5**0.5, 50**0.5])


# --- in models ----------------------------------------------------------------------------------------------------


class Acts(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for act in (nn.tanh, nn.sigmoid, nn.relu, nn.relu6, nn.hard_tanh, nn.gelu, nn.silu, nn.soft_sign):
            x = act(nn.Dense(8)(x))
        return nn.Dense(2)(x)


def test_limits_come_from_the_function_itself() -> None:
    placed = taps.place(trace(Acts(), (jax.ShapeDtypeStruct((2, 4), jnp.float32),), {}))
    limits = [t.limits for t in placed if t.kind == "nonlinearity"]
    assert limits == [(-1.0, 1.0), (0.0, 1.0), None, (0.0, 6.0), (-1.0, 1.0), None, None, None]


def test_the_guard_of_a_softmax_is_no_nonlinearity() -> None:
    x = jnp.ones((2, 3, 8))
    w = {"w": jnp.ones((8, 8))}
    model = fi.Function(lambda w, x: jax.nn.softmax(x @ w["w"], where=x > 0, axis=-1) @ jax.nn.relu(w["w"]), w)
    found = taps.place(trace(model, (x,), {}))
    assert [t.name for t in found if t.kind == "nonlinearity"] == []
    model = fi.Function(lambda w, x: jnp.maximum(x @ w["w"], 0.5) @ w["w"], w)
    assert [t.name for t in taps.place(trace(model, (x,), {})) if t.kind == "nonlinearity"] == ["max"]


def test_saturation_and_dead_units() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.tanh(nn.Dense(64, use_bias=False, kernel_init=nn.initializers.normal(10.0))(x))
            x = nn.relu(nn.Dense(64, bias_init=nn.initializers.constant(-100.0))(x))
            return nn.Dense(3)(x)

    x = jax.random.normal(jax.random.key(1), (128, 32))
    tanh, relu = fi.analyze(Net(), Net().init(jax.random.key(0), x), x).select("nonlinearity")
    assert tanh.forward is not None and relu.forward is not None
    assert tanh.forward.saturated > 0.9 and relu.forward.zeros == 1


def test_examples_are_followed_where_they_go() -> None:
    """Tokens are merged with examples for a layer, and taken apart again."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.Dense(16)(x.reshape(-1, 16)).reshape(x.shape)
            return nn.Dense(4)(y.mean(1))

    x = jax.random.normal(jax.random.key(1), (6, 5, 16)) + 3 * jax.random.normal(jax.random.key(2), (6, 1, 16))
    variables = Net().init(jax.random.key(0), x)
    row = fi.analyze(Net(), variables, x).select("weight")[0]
    y = np.asarray(x @ variables["params"]["Dense_0"]["kernel"])
    assert row.shape == (30, 16) and row.forward is not None
    for key, value in spelled_out(y).items():
        assert getattr(row.forward, key) == pytest.approx(value, rel=1e-3, abs=1e-5), key


def gradient_of(model: Any, variables: Any, x: Any, loss: Any) -> Any:
    return jax.grad(lambda p: loss(model.apply({**variables, "params": p}, x, mutable=True)[0]))(variables["params"])


def squares(y: Any) -> Any:
    return jnp.square(y - 1).mean()


@pytest.mark.parametrize("model, x", [
    (cifar_resnet(8, norm="batch"), jax.random.normal(jax.random.key(1), (4, 8, 8, 3))),
    (Encoder(True), jax.random.normal(jax.random.key(1), (4, 8, 32))),
])  # fmt: skip
def test_weights_and_their_gradients(model: Any, x: Any) -> None:
    variables = model.init(jax.random.key(0), x)
    gradient = gradient_of(model, variables, x, squares)
    rows = fi.analyze(model, variables, x, loss=squares).select("weight")
    flat = {
        "/".join(str(k.key) for k in path): (leaf, np.asarray(g))
        for (path, leaf), g in zip(
            jax.tree_util.tree_leaves_with_path(variables["params"]), jax.tree.leaves(gradient), strict=True
        )
    }
    assert len(rows) > 4
    for row in rows:
        leaf, g = flat[row.name]
        assert row.weight is not None
        assert row.weight.parameter_norm == pytest.approx(float(np.linalg.norm(leaf)), rel=1e-4)
        assert row.weight.gradient_norm == pytest.approx(float(np.linalg.norm(g)), rel=1e-3, abs=1e-7)


def test_a_scan_tells_the_gradient_of_every_pass() -> None:
    model, x = Stacked(True, nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (8, 16))
    report = fi.analyze(model, None, x, loss=squares)
    graph, state = nnx.split(model)
    gradient = jax.grad(lambda s: squares(nnx.merge(graph, s)(x)))(state)
    found = [r for r in report.select("weight") if r.repeat is not None]
    leaves = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(gradient)}
    for row in found:
        assert row.weight is not None
        gradient_norm = float(np.linalg.norm(leaves[row.name][...][row.repeat]))
        assert row.weight.gradient_norm == pytest.approx(gradient_norm, rel=1e-3)
    assert len({r.weight for r in found}) == 8


def test_a_parameter_with_several_uses_has_one_gradient() -> None:
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            table = nn.Embed(50, 16)
            x = table(tokens)
            for _ in range(3):
                x = x + nn.Dense(16)(nn.relu(nn.Dense(16)(x)))
            return table.attend(x)

    x = jax.random.randint(jax.random.key(1), TOKENS.shape, 0, 50)
    variables = Tied().init(jax.random.key(0), x)
    gradient = gradient_of(Tied(), variables, x, squares)["Embed_0"]["embedding"]
    rows = [r for r in fi.analyze(Tied(), variables, x, loss=squares) if r.name == "Embed_0/embedding" and r.weight]
    assert len(rows) == 2
    for row in rows:
        assert row.weight is not None
        assert row.weight.gradient_norm == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-4)


def test_steps_are_those_of_the_optimizer() -> None:
    """Under Fixup only the head moves at step 0, the ends of the branches at step 1, their fronts at step 2."""
    model, x = cifar_resnet(8, norm="fixup"), jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = fi.init(model, jax.random.key(0), x)
    optimizer = optax.sgd(0.1, momentum=0.9)
    found = fi.analyze(model, variables, x, loss=squares, steps=3, optimizer=optimizer)
    assert [one.label for one in found] == ["step 0", "step 1", "step 2", "step 3"]
    params, moments = variables["params"], optimizer.init(variables["params"])
    for k, one in enumerate(found):
        gradient = gradient_of(model, {**variables, "params": params}, x, squares)
        for row in one.select("weight"):
            *at, last = row.name.split("/")
            g = gradient
            for name in at:
                g = g[name]
            assert row.weight is not None
            assert row.weight.gradient_norm == pytest.approx(float(np.linalg.norm(g[last])), rel=2e-3, abs=1e-7)
        moved = {r.name.removesuffix("/kernel") for r in one.select("weight") if r.weight and r.weight.gradient_norm}
        still = {
            r.name.removesuffix("/kernel") for r in one.select("weight") if r.weight and not r.weight.gradient_norm
        }
        ends = {name for name in moved | still if name.endswith("/conv2")}
        assert moved == [{"fc"}, {"fc", "conv1", *ends}, moved | still][min(k, 2)]
        updates, moments = optimizer.update(gradient, moments, params)
        params = optax.apply_updates(params, updates)


def test_a_loss_that_is_no_number_is_named() -> None:
    x = jnp.ones((4, 4))
    variables = Acts().init(jax.random.key(0), x)
    with pytest.raises(fi.ModelError, match=r"loss= returned float32\[4\]: expected one floating number"):
        fi.analyze(Acts(), variables, x, loss=lambda y: y.sum(1))
    with pytest.raises(fi.ModelError, match="loss= failed on the result of Acts"):
        fi.analyze(Acts(), variables, x, loss=lambda y: y["logits"].sum())
    with pytest.raises(ValueError, match="steps=2 with optimizer=None: expected"):
        fi.analyze(Acts(), variables, x, steps=2)


def test_large_arrays_are_sampled_evenly() -> None:
    noise = np.random.default_rng(0)
    x = noise.normal(size=(16, 64, 48, 24)) + noise.normal(size=(16, 1, 1, 1)) + noise.normal(size=(1, 1, 1, 24))
    x += np.linspace(-2, 2, 64)[:, None, None]
    x[noise.random(x.shape) < 0.3] = 0
    found = read(np.asarray(measure(jnp.asarray(x, jnp.float32), Layout(3, 0, 16))))
    want = spelled_out(x.reshape(16, -1, 24))
    for key, value in want.items():
        exact = key in ("mean", "variance", "squared_channel_mean")
        assert getattr(found, key) == pytest.approx(value, rel=1e-4 if exact else 0.05), key
    assert (
        read(np.asarray(measure(jnp.asarray(x, jnp.float32).at[3, 7, 5, 2].set(jnp.nan), Layout(3, 0, 16)))).finite < 1
    )
