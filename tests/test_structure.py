"""Structures against those worked out by hand, and properties that hold for every model."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from zoo import IMAGES, VECTORS, ZOO, Case, Plain, Stacked
from zoo_families import FAMILIES

import fixup_init as fi
from fixup_init.models.resnet import ResNet, cifar_resnet


@pytest.mark.parametrize("case", ZOO + FAMILIES, ids=lambda c: c.name)
def test_structure_is_exact(case: Case) -> None:
    s = fi.structure(case.make(), *case.inputs)
    assert s.num_branches == case.L
    assert tuple((b.depth, b.order, b.skip) for b in s.branches) == case.branches
    assert len(s.norms) == case.norms
    assert sum(bool(b.skip_weights) for b in s.branches) == case.projections
    assert (s.stem, s.head) == (case.stem, case.head)
    assert not s.undecided
    json.dumps(s.to_dict(), allow_nan=False)
    assert s.name in str(s)


def shape_of(s: fi.Structure) -> Any:
    """A structure without its names."""
    return [(b.depth, b.order, b.skip, b.repeats, len(b.weights)) for b in s.branches], [
        (layer.kind, layer.fan_in, layer.fan_out) for layer in s.layers
    ]


class Renamed(nn.Module):
    """The ResNet's blocks under names that say nothing, or the wrong thing."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        names = iter(self.names)
        x = nn.Conv(8, (3, 3), name=next(names))(x)
        for _ in range(3):
            y = nn.relu(nn.BatchNorm(use_running_average=False, name=next(names))(x))
            y = nn.Conv(8, (3, 3), name=next(names))(y)
            x = x + nn.Conv(8, (1, 1), name=next(names))(nn.relu(y))
        return nn.Dense(10, name=next(names))(x.mean((1, 2)))


def test_names_do_not_matter() -> None:
    plain = fi.structure(Renamed(tuple(f"module{k}" for k in range(11))), IMAGES)
    wrong = ("head", "conv", "norm", "skip", "dense", "fc", "shortcut", "proj", "bn", "stem", "branch")
    misleading = fi.structure(Renamed(wrong), IMAGES)
    assert plain.num_branches == 3
    assert shape_of(plain) == shape_of(misleading)
    assert (plain.stem, plain.head) == ("module0/kernel", "module10/kernel")
    assert (misleading.stem, misleading.head) == ("head/kernel", "branch/kernel")


@pytest.mark.parametrize("norm", ["batch", "none", "fixup"])
def test_jit_remat_and_scan_change_nothing(norm: str) -> None:
    def blocks(s: fi.Structure) -> list[Any]:
        return [(b.depth, b.order, b.skip) for b in s.branches for _ in range(b.repeats)]

    plain = fi.structure(cifar_resnet(20, norm=norm), IMAGES)
    for changed in ({"remat": True}, {"scan": True}, {"remat": True, "scan": True}):
        s = fi.structure(cifar_resnet(20, norm=norm, **changed), IMAGES)
        assert s.num_branches == plain.num_branches == 9
        assert blocks(s) == blocks(plain)
    jitted = nn.jit(ResNet)(stage_sizes=(3, 3, 3), norm=norm, shortcut="pad")
    assert shape_of(fi.structure(jitted, IMAGES)) == shape_of(plain)


@pytest.mark.parametrize("depth", [20, 38, 74])
def test_depth_counts(depth: int) -> None:
    assert fi.structure(cifar_resnet(depth, norm="none"), IMAGES).num_branches == (depth - 2) // 2


def test_batch_size_dtype_and_jit_change_nothing() -> None:
    model = cifar_resnet(20, norm="batch")
    small = shape_of(fi.structure(model, IMAGES))
    assert shape_of(fi.structure(model, jax.ShapeDtypeStruct((7, 32, 32, 3), jnp.float32))) == small
    assert shape_of(fi.structure(dataclasses.replace(model, dtype=jnp.bfloat16), IMAGES)) == small


def test_inference_form_of_batch_norm() -> None:
    train = fi.structure(cifar_resnet(20, norm="batch"), IMAGES, train=True)
    test = fi.structure(cifar_resnet(20, norm="batch"), IMAGES, train=False)
    assert [n.scale for n in train.norms] == [n.scale for n in test.norms]
    assert {n.form for n in test.norms} == {"inference"}
    assert all(n.batch for n in (*train.norms, *test.norms))


def test_axes_of_normalizations() -> None:
    axes = {n: fi.structure(cifar_resnet(20, norm=n), IMAGES).norms[0] for n in ("batch", "instance", "layer")}
    assert axes["batch"].axes == (0, 1, 2) and axes["batch"].batch
    assert axes["instance"].axes == (1, 2) and not axes["instance"].batch
    assert axes["layer"].axes == (1, 2, 3) and not axes["layer"].batch


@pytest.mark.parametrize("form", ["stack", "unstack"])
def test_the_batch_is_followed_through_what_moves_its_axis(form: str) -> None:
    """Batch norm behind jnp.stack of two poolings (CBAM), and of slices along another axis."""

    def apply(params: Any, x: Any) -> Any:
        x = x @ params["w"]
        if form == "stack":
            y = jnp.stack([x.mean(-1), x.max(-1)], 1)
        else:
            y = sum(jnp.unstack(x, axis=1))
        y = y @ params["v"]
        y = y - y.mean(0)
        return y * jax.lax.rsqrt((y**2).mean(0) + 1e-5)

    shapes = {"w": (16, 8), "v": (6 if form == "stack" else 8, 4)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    s = fi.structure(fi.Function(apply, params), jax.ShapeDtypeStruct((4, 6, 16), jnp.float32))
    assert [n.batch for n in s.norms] == [True]


def test_removed_normalization_leaves_the_plain_network() -> None:
    removed = fi.structure(cifar_resnet(20, norm="batch"), IMAGES, normalization="removed")
    plain = fi.structure(cifar_resnet(20, norm="none"), IMAGES)
    assert not removed.norms
    assert removed.branches == tuple(
        dataclasses.replace(b, scope=r.scope) for b, r in zip(plain.branches, removed.branches, strict=True)
    )


@pytest.mark.parametrize("f", [jax.nn.log_softmax, lambda z: jax.nn.logsumexp(z, -1, keepdims=True) * z])
def test_a_logarithm_inside_of_a_log_sum_exp_is_no_nonlinearity(f: Any) -> None:
    model = fi.Function(lambda w, x: f(jnp.tanh(x @ w)), jax.ShapeDtypeStruct((16, 16), jnp.float32))
    rows = fi.predict(model, jax.ShapeDtypeStruct((8, 16), jnp.float32)).select("nonlinearity")
    assert [r.shape for r in rows] == [(8, 16)] and rows[0].name == "tanh"


def test_a_logarithm_from_which_what_was_taken_off_stays_off_is_a_nonlinearity() -> None:
    def apply(w: Any, x: Any) -> Any:
        return jnp.log(jnp.exp(x - x @ w).sum(-1, keepdims=True)) * x

    model = fi.Function(apply, jax.ShapeDtypeStruct((16, 16), jnp.float32))
    rows = fi.predict(model, jax.ShapeDtypeStruct((8, 16), jnp.float32)).select("nonlinearity")
    assert [r.name for r in rows] == ["log"]


def test_softmax_and_elementwise_sums_are_nothing() -> None:
    def apply(w: Any, x: Any) -> Any:
        return jax.nn.softmax(jax.nn.gelu(x @ w))

    s = fi.structure(fi.Function(apply, jax.ShapeDtypeStruct((16, 4), jnp.float32)), VECTORS)
    assert not s.norms and not s.branches


def by_hand(z: Any) -> Any:
    most = z.max(-1)
    return most + jnp.log(jnp.exp(z - most[..., None]).sum(-1))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: jax.nn.logsumexp(z, -1),
        by_hand,
        lambda z: optax.softmax_cross_entropy_with_integer_labels(z, jnp.zeros(z.shape[0], int)).mean(),
        lambda z: -jax.nn.log_softmax(z)[:, 0].mean(),
    ],
    ids=["logsumexp", "by hand", "optax", "log_softmax"],
)
def test_a_loss_is_no_branch(loss: Any) -> None:
    """m + log sum exp(x - m) shifts x and shifts it back; a pool that is added to its stream stays a branch."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"up": [shape((16, 16))] * 3, "head": shape((16, 4))}

    def logits(p: Any, x: Any) -> Any:
        for w in p["up"]:
            x = x + jax.nn.relu(x @ w)
        return x @ p["head"]

    s = fi.structure(fi.Function(lambda p, x: loss(logits(p, x)), params), VECTORS)
    assert s.num_branches == 3 and not s.undecided

    def pooled(p: Any, x: Any) -> Any:
        x = jax.nn.relu(x @ p["up"][0])
        return loss(logits(p, x + jnp.cumsum(jax.nn.relu(x - 1), -1)))

    assert fi.structure(fi.Function(pooled, params), VECTORS).num_branches == 4


@pytest.mark.parametrize("form", ["divide", "multiply", "l2", "rms", "two-pass"])
def test_home_made_normalizations(form: str) -> None:
    def apply(params: Any, x: Any) -> Any:
        x = x @ params["w"]
        mean = x.mean(-1, keepdims=True)
        if form == "divide":
            x = (x - mean) / (x.std(-1, keepdims=True) + 1e-5)
        elif form == "multiply":
            x = (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6)
        elif form == "l2":
            x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        elif form == "rms":
            x = x * (x**2).mean(-1, keepdims=True) ** -0.5
        else:
            x = (x - mean) / jnp.sqrt((x**2).mean(-1, keepdims=True) - mean**2)
        return (x * params["scale"]) @ params["v"]

    shapes = {"w": (16, 8), "scale": (8,), "v": (8, 2)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    s = fi.structure(fi.Function(apply, params), VECTORS)
    assert [(n.scale, n.axes, n.batch) for n in s.norms] == [("scale", (1,), False)]
    assert not s.branches


def test_dead_code_is_ignored() -> None:
    def apply(w: Any, x: Any) -> Any:
        _ = x + jax.nn.relu(x @ w["a"]) @ w["b"]
        return x @ w["c"]

    params = {k: jax.ShapeDtypeStruct((16, 16), jnp.float32) for k in "abc"}
    s = fi.structure(fi.Function(apply, params), VECTORS)
    assert s.num_branches == 0
    assert [q.role for q in s.parameters] == ["unused", "unused", "kernel"]


def test_fans_come_from_the_equation() -> None:
    class Fans(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(32, (3, 5), feature_group_count=4, name="grouped")(nn.Conv(16, (1, 1), name="pointwise")(x))
            x = nn.MultiHeadDotProductAttention(4, qkv_features=24, name="attention")(x.mean(1))
            return nn.Einsum((32, 5), "bsd,dk->bsk", name="einsum")(x)

    fans = {layer.path: (layer.fan_in, layer.fan_out) for layer in fi.structure(Fans(), IMAGES).layers}
    assert fans["pointwise/kernel"] == (3, 16)
    assert fans["grouped/kernel"] == (4 * 15, 8 * 15)
    assert fans["attention/query/kernel"] == (32, 24)  # (d, heads, head_dim)
    assert fans["attention/out/kernel"] == (24, 32)  # (heads, head_dim, d)
    assert fans["einsum/kernel"] == (32, 5)


def test_an_unknown_primitive_with_a_jaxpr_is_named() -> None:
    from jax.custom_derivatives import linear_call

    def apply(w: Any, x: Any) -> Any:
        return linear_call(lambda w, x: x @ w, lambda w, y: y @ w.T, w, x)

    with pytest.raises(fi.UnknownPrimitiveError, match="linear_call"):
        fi.structure(fi.Function(apply, _square("w")["w"]), VECTORS)


def test_nothing_is_allocated() -> None:
    before = {id(a) for a in jax.live_arrays()}
    fi.structure(cifar_resnet(20, norm="batch"), IMAGES)
    assert not [a for a in jax.live_arrays() if id(a) not in before and a.size > 1]


def test_plain_networks_and_scans_of_nnx() -> None:
    from flax import nnx

    assert fi.structure(Plain(), IMAGES).num_branches == 0
    scanned = fi.structure(Stacked(True, nnx.Rngs(0)), VECTORS)
    (branch,) = scanned.branches
    assert (branch.repeats, scanned.num_branches) == (4, 4)
    assert (scanned.layers[0].fan_in, scanned.layers[0].fan_out, scanned.layers[0].repeats) == (16, 64, 4)


def _square(*names: str) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct((16, 16), jnp.float32) for name in names}


def test_as_many_weights_on_each_side_are_parallel() -> None:
    def apply(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p["a"] + x @ p["b"]) @ p["head"]

    s = fi.structure(fi.Function(apply, _square("a", "b", "head")), VECTORS)
    assert s.num_branches == 0 and s.head == "head"


def test_a_gate_is_no_skip() -> None:
    """sigmoid(W1 x) c + W3 relu(W2 x): the term with fewer weights is no projection, it does not carry x."""

    def apply(p: Any, x: Any, c: Any) -> Any:
        return (jax.nn.sigmoid(x @ p["a"]) * c + jax.nn.relu(x @ p["b"]) @ p["c"]) @ p["head"]

    assert fi.structure(fi.Function(apply, _square("a", "b", "c", "head")), VECTORS, VECTORS).num_branches == 0


def test_a_scan_over_data_is_no_depth() -> None:
    def apply(p: Any, x: Any) -> Any:
        return jax.lax.map(lambda row: row + jax.nn.relu(row @ p["a"]) @ p["b"], x)

    s = fi.structure(fi.Function(apply, _square("a", "b")), VECTORS)
    assert [(b.depth, b.repeats) for b in s.branches] == [(2, 1)]
    assert s.num_branches == 1


class TwoLayers(nn.Module):
    """A residual branch of two layers; `act` between them, `layer` makes them."""

    act: Callable[[Any], Any] = nn.relu
    layer: Callable[[Any], Any] = lambda features: nn.Dense(features)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(16)(x)
        return nn.Dense(3)(x + self.layer(16)(self.act(self.layer(16)(x))))


@pytest.mark.parametrize(
    ("act", "order"),
    [
        (nn.relu, 2), (nn.silu, 2), (nn.gelu, 2), (jax.nn.mish, 2), (nn.sigmoid, 1), (nn.softplus, 1), (jnp.exp, 1),
        (lambda x: nn.softplus(x) - math.log(2), 2), (lambda x: jnp.exp(x) - 1, 2), (lambda x: nn.sigmoid(x) - 0.5, 2),
        (lambda x: jnp.log(0.5 * jnp.exp(x) + 0.5), 2), (lambda x: jnp.cosh(x) - 1, 3),
        (lambda x: 1 - nn.sigmoid(x), 1),
        (lambda x: jnp.where(x != 0, x, 1.0), 2), (lambda x: jnp.where(x == 0, 1.0, x), 2),
    ],
)  # fmt: skip
def test_the_order_of_a_function_is_how_it_vanishes_at_zero(act: Any, order: int) -> None:
    (branch,) = fi.structure(TwoLayers(act), jnp.ones((4, 8))).branches
    assert branch.order == order


@pytest.mark.parametrize("update", [True, False])
def test_spectral_normalization(update: bool) -> None:
    """It hides the scale of a kernel, and has statistics that a model starts with."""

    class Normalized(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.SpectralNorm(nn.Dense(self.features))(x, update_stats=update)

    model, x = TwoLayers(nn.relu, Normalized), jnp.ones((4, 8))
    (branch,) = fi.structure(model, x).branches
    assert (branch.order, branch.order_without_norms) == (0, 2)
    expected = model.init(jax.random.key(0), x)
    for scheme in ("model", "fixup"):
        drawn = fi.init(model, jax.random.key(0), x, scheme=scheme)
        assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, expected)
        model.apply(drawn, x, mutable=["batch_stats"])
