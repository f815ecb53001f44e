"""Predicted drift against known results of mean-field theory, and against measurement."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from zoo_families import FAMILIES

import fixup_init as fi
from fixup_init import moments
from fixup_init.models.resnet import cifar_resnet
from fixup_init.predict import predict
from fixup_init.propagation import Propagation
from fixup_init.quadrature import gauss_hermite


def vectors(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class MLP(nn.Module):
    act: Callable[[Any], Any] = nn.relu
    depth: int = 6
    width: int = 512
    norm: Any = None

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(self.depth):
            x = nn.Dense(self.width)(x)
            x = self.act(x if self.norm is None else self.norm()(x))
        return nn.Dense(10)(x)


def batch_norm() -> nn.Module:
    return nn.BatchNorm(use_running_average=False)


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(256)(x)
        for _ in range(3):
            y = nn.RMSNorm()(x)
            x = x + nn.Dense(256)(nn.silu(nn.Dense(512)(y)) * nn.Dense(512)(y))
        return nn.Dense(10)(x)


class Encoder(nn.Module):
    heads_of: int = 256  # features
    causal: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        x = nn.Dense(256)(x)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4, qkv_features=4 * self.heads_of)(y, y, mask=mask)
            x = x + nn.Dense(256)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(x))))
        return nn.Dense(256)(x.mean(1))  # of many outputs, so that the probe's own noise is small


def seconds(one: Propagation, *kinds: Any) -> list[float]:
    return [r.forward.second_moment for r in (one.select(*kinds) if kinds else one.rows) if r.forward is not None]


# --- quadrature


def mish(x: Any) -> Any:
    return x * jnp.tanh(jax.nn.softplus(x))


def broken(x: Any) -> Any:
    """A user's own, with a jump in its derivative at an odd place."""
    return jnp.where(x > 0.37, 2 * x - 0.37, x)


@pytest.mark.parametrize("f", [jax.nn.gelu, jax.nn.silu, mish, jnp.tanh, jax.nn.relu, jax.nn.hard_swish, broken])
def test_quadrature_to_1e_7(f: Callable[[Any], Any]) -> None:
    mean, std = 0.3, 1.7

    def integral(g: Callable[[float], float]) -> float:
        kinks = [(k - mean) / std for k in (-3, 0, 0.37, 3)]
        edges = [-10.0, *kinks, 10.0]
        parts = [
            integrate.quad(lambda z: g(mean + std * z) * math.exp(-z * z / 2), a, b, epsabs=1e-12)[0]
            for a, b in itertools.pairwise(edges)
        ]
        return sum(parts) / math.sqrt(2 * math.pi)

    with jax.enable_x64(True):
        value = jax.jit(lambda x: f(jnp.asarray(x, jnp.float64)))
        slope = jax.jit(jax.grad(lambda x: f(jnp.asarray(x, jnp.float64))))
        exact = [
            integral(lambda x: float(value(x))), integral(lambda x: float(value(x)) ** 2),
            integral(lambda x: float(slope(x)) ** 2),
        ]  # fmt: skip
    assert gauss_hermite(f, mean, std) == pytest.approx(exact, rel=1e-7)


def test_quadrature_refuses_what_is_not_elementwise() -> None:
    with pytest.raises(ValueError, match="elementwise"):
        gauss_hermite(lambda x: x - x.mean())


# --- known results


def test_he_keeps_the_second_moment_of_relu() -> None:
    """He et al. 2015, eq. 10."""
    found = predict(MLP(), vectors(16, 64), scheme="he")
    assert seconds(found, "nonlinearity") == pytest.approx([1.0] * 6)
    assert seconds(found, "weight") == pytest.approx([2.0] * 7)


def test_he_without_normalization_about_doubles_a_block() -> None:
    net = cifar_resnet(56, norm="none")
    sums = seconds(predict(net, vectors(8, 32, 32, 3), scheme="he_normal_fan_out"), "sum")
    inside = [sums[k + 1] / sums[k] for k in range(26) if k not in (8, 17)]
    assert 1.8 < float(np.exp(np.mean(np.log(inside)))) < 2.4


def test_tanh_at_the_edge_of_chaos() -> None:
    """Schoenholz et al. 2017: q' = E tanh(sqrt(q) z)^2, which falls as 1 / (2 l) for sigma_w = 1."""
    found = seconds(predict(MLP(jnp.tanh, depth=40), vectors(4, 512), scheme="lecun"), "weight")
    z, w = np.polynomial.hermite_e.hermegauss(200)
    q = 1.0
    for k in range(1, 41):
        q = float(w @ np.tanh(math.sqrt(q) * z) ** 2 / w.sum())
        assert found[k] == pytest.approx(q, rel=1e-6)
    assert 40 * q == pytest.approx(0.5, rel=0.15)


def test_preactivation_batch_norm_grows_linearly_and_resets() -> None:
    """He et al. 2016; the variance of the sums is linear within a stage (Hayou et al. 2021; De & Smith 2020)."""
    net = cifar_resnet(32, norm="batch", preactivation=True, shortcut="projection")
    sums = seconds(predict(net, vectors(16, 32, 32, 3), scheme="he_normal_fan_out"), "sum")
    for stage in range(3):
        steps = np.diff(sums[5 * stage : 5 * stage + 5])
        assert steps.max() / steps.min() < 1.15
    assert sums[5] < sums[4] / 2 and sums[10] < sums[9] / 2


def test_batch_norm_without_skips_explodes_gradients() -> None:
    """Yang et al. 2019: by pi / (pi - 1) a layer for relu and a large batch."""
    found = predict(MLP(depth=10, width=4096, norm=batch_norm), vectors(4096, 4096), scheme="he")
    gradients = [r.backward.second_moment for r in found.select("norm") if r.backward is not None]
    factors = [a / b for a, b in itertools.pairwise(gradients)]
    assert len(factors) == 9 and factors[0] == pytest.approx(math.pi / (math.pi - 1), rel=2e-3)


def test_softmax_of_two_scores() -> None:
    """E (a^2 + b^2) for a = sigmoid(d), d ~ N(0, 2 v)."""
    z, w = np.polynomial.hermite_e.hermegauss(100)
    a = 1 / (1 + np.exp(-math.sqrt(3.0) * z))
    assert moments.softmax_square(1.5, 2) == pytest.approx(float(w @ (a**2 + (1 - a) ** 2) / w.sum()), rel=1e-5)
    assert moments.softmax_square(0.0, 7) == pytest.approx(1 / 7)
    assert moments.softmax_square(1.0, 4096) == pytest.approx(math.e / 4096, rel=5e-3)


@pytest.mark.parametrize("variance, n", [(1.0, 16), (0.3, 3), (4.0, 8)])
def test_what_a_cotangent_meets_at_a_softmax(variance: float, n: int) -> None:
    """sum_k (a_k (g_k - sum_l a_l g_l))^2 for independent g."""
    scores = math.sqrt(variance) * np.random.default_rng(0).normal(size=(200_000, n))
    a = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    squares = np.square(a).sum(1)
    met = (squares - 2 * (a**3).sum(1) + squares**2).mean()
    assert moments.softmax_powers(variance, n) == pytest.approx((squares.mean(), met), rel=5e-3)


# --- sums of dependent values, borders, pooling: against numbers


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x + jax.nn.relu(x),
        lambda x: x - x.mean(1, keepdims=True),
        lambda x: jax.nn.relu(x).reshape(8, 4, 16).mean(1),
        lambda x: jnp.concatenate([x, jnp.zeros_like(x)], 1) ** 2,
        lambda x: x * (x > 0.5) + jnp.tanh(x) * 0.5,
        lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3), (1, 2), "SAME"),
        lambda x: jax.nn.softmax(x, -1) * 10,
        lambda x: (x.reshape(16, 32).T * 2)[3:20],
    ],
)
def test_programs_against_samples(f: Callable[[Any], Any]) -> None:
    net = fi.Function(lambda params, x: f(x), {})
    found = predict(net, vectors(8, 64)).rows[-1].forward
    x = jax.random.normal(jax.random.key(0), (4000, 8, 64))
    y = np.asarray(jax.vmap(f)(x), np.float64)
    assert found is not None
    assert found.mean == pytest.approx(y.mean(), abs=4e-3)
    assert found.second_moment == pytest.approx(np.square(y).mean(), rel=0.02)


def test_the_largest_score_may_have_another_use() -> None:
    """What a softmax takes off matters to nothing, unless it is read beside it."""

    def net(params: Any, x: Any) -> Any:
        largest = x.max(-1, keepdims=True)
        weights = jnp.exp(x - largest)
        return weights / weights.sum(-1, keepdims=True) + largest

    assert predict(fi.Function(net, {}), vectors(8, 64)).rows[-1].forward is not None


def test_the_largest_of_masked_scores() -> None:
    """Of 2, 3 and so on to 9 standard normal ones."""
    net = fi.Function(lambda p, x: jnp.where(jnp.tri(8, 64, 1, dtype=bool), x, -1e9).max(1), {})
    found = predict(net, vectors(8, 64)).rows[-1].forward
    x = np.random.default_rng(0).normal(size=(200_000, 9))
    largest = np.array([[y.mean(), np.square(y).mean()] for y in (x[:, :n].max(1) for n in range(2, 10))]).mean(0)
    assert found is not None and (found.mean, found.second_moment) == pytest.approx(largest, rel=0.01)


# --- what it says and what it refuses


def test_an_operation_without_a_rule_is_named() -> None:
    net = fi.Function(
        lambda p, x: jnp.linalg.svd(jax.nn.relu(x @ p["a"]), False)[2] @ p["b"],
        {"a": vectors(64, 64), "b": vectors(64, 8)},
    )
    first, *rest = predict(net, vectors(4, 64), scheme="he").select("weight", "nonlinearity", "output")
    assert first.forward is not None and first.backward is None and "backward unknown" in first.note
    assert rest[0].forward is not None
    assert rest[-1].forward is None and "`svd`" in rest[-1].note and rest[-1].note.startswith("unknown")


def test_a_norm_of_few_weights_is_never_negative() -> None:
    """Weight normalization: a sum of 12 squares is no Gaussian, whose root is not defined everywhere."""

    def apply(params: Any, x: Any) -> Any:
        return x @ (params["v"] / jnp.sqrt(jnp.square(params["v"]).sum(0)))

    found = predict(fi.Function(apply, {"v": vectors(12, 64)}), vectors(16, 12), scheme="lecun").rows[-1].forward
    assert found is not None and found.second_moment == pytest.approx(12 / 10, rel=0.03)  # E 1 / chi^2(12) = 1 / 10


def test_a_pole_is_named() -> None:
    net = fi.Function(lambda p, x: 1 / (x @ p["a"]), {"a": vectors(64, 64)})
    last = predict(net, vectors(4, 64), scheme="lecun").rows[-1]
    assert last.forward is None and last.note.startswith("unknown: `div`") and "infinite" in last.note


def test_rows_are_those_of_analyze() -> None:
    for case in (c for c in FAMILIES if c.name in ("vae", "neox")):
        model = case.make()
        rows = predict(model, *case.inputs, scheme="he").rows
        measured = fi.analyze(model, fi.init(model, jax.random.key(0), *case.inputs, scheme="he"), *case.inputs).rows
        for a, b in zip(rows, measured, strict=True):
            assert (a.kind, a.name, a.scope, a.block, a.shape, a.repeat) == (
                b.kind, b.name, b.scope, b.block, b.shape, b.repeat
            )  # fmt: skip
            assert a.forward is not None or a.note.startswith("unknown")


def test_a_plan_is_taken_and_checked() -> None:
    net, x = MLP(depth=1), vectors(16, 64)
    plan = fi.plan(net, x, scheme="he").override("Dense_0/kernel", std=1.0)
    found = predict(net, x, scheme=plan)
    assert found.kind == "predicted" and seconds(found, "weight")[0] == pytest.approx(64.0)
    with pytest.raises(ValueError, match="does not fit"):
        predict(MLP(depth=2), x, scheme=plan)
    with pytest.raises(ValueError, match="probe"):
        predict(net, x, probe="nowhere")  # pyright: ignore


def test_own_initializers_are_read() -> None:
    """Their programs are evaluated, random bits and all."""
    found = predict(nn.Dense(64, kernel_init=nn.initializers.truncated_normal(0.1)), vectors(16, 100), scheme="model")
    truncated = 0.87962566103423978  # standard deviation of a normal cut at two of its own
    assert seconds(found, "weight")[0] == pytest.approx(100 * (0.1 * truncated) ** 2, rel=1e-4)


def test_dropout_and_removed_normalization() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(8)(nn.Dropout(0.25, deterministic=False)(nn.LayerNorm()(3 * x)))

    x = vectors(16, 64)
    found = predict(Net(), x, scheme="lecun", rngs={"dropout": jax.random.key(0)})
    assert seconds(found, "weight")[-1] == pytest.approx(1 / 0.75, rel=1e-3)
    plain = predict(Net(), x, scheme="lecun", normalization="removed", rngs={"dropout": jax.random.key(0)})
    assert seconds(plain, "weight")[-1] == pytest.approx(9 / 0.75, rel=1e-3) and not plain.select("norm")


def decoder(layers: int) -> nn.Module:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.RMSNorm()(x)
            query, key, value = (nn.DenseGeneral((n, 128), use_bias=False)(y) for n in (64, 8, 8))
            key, value = (jnp.repeat(t, 8, 2) for t in (key, value))
            weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 128**0.5)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
            x = x + nn.DenseGeneral(8192, axis=(-2, -1), use_bias=False)(y)
            y = nn.RMSNorm()(x)
            up, gate = nn.Dense(28672, use_bias=False)(y), nn.silu(nn.Dense(28672, use_bias=False)(y))
            return x + nn.Dense(8192, use_bias=False)(up * gate)

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            x = nn.Embed(32000, 8192)(tokens)
            for _ in range(layers):
                x = Block()(x)
            return nn.Dense(32000, use_bias=False)(nn.RMSNorm()(x))

    return Decoder()


def test_seventy_billion_parameters() -> None:
    """80 layers of width 8192, in seconds and without an array."""
    before, start = len(jax.live_arrays()), time.perf_counter()
    found = predict(decoder(80), jax.ShapeDtypeStruct((1, 2048), jnp.int32), scheme="lecun")
    assert time.perf_counter() - start < 60
    assert len(found.select("sum")) == 160 and all(r.forward is not None for r in found.rows)
    assert all(r.backward is not None for r in found.rows)
    assert len(jax.live_arrays()) <= before + 2


# --- measured against predicted


def ratios(model: Any, x: Any, scheme: str, seeds: int, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds of the measured second moment at every tap, over the predicted; and its standard error."""
    theory = predict(model, x, scheme=scheme, **kwargs)
    found = []
    for seed in range(seeds):
        variables = fi.init(model, jax.random.key(seed), x, scheme=scheme)
        rows = fi.analyze(model, variables, x, key=jax.random.key(100 + seed), **kwargs).rows
        found.append([s.second_moment if s else math.nan for r in rows for s in (r.forward, r.backward)])
    predicted = np.array([s.second_moment if s else math.nan for r in theory.rows for s in (r.forward, r.backward)])
    with np.errstate(all="ignore"):
        ratio = np.array(found) / predicted
    ratio[(np.array(found) == 0) & (predicted == 0)] = 1.0
    return ratio.mean(0), ratio.std(0) / math.sqrt(seeds)


IMAGES = vectors(16, 8, 8, 3)  # ResNets of widths 64, 128 and 256: of 256 to 1024, one took 4 minutes
TABLE = {
    "mlp relu": (MLP(), vectors(64, 256), "he"),
    "mlp gelu": (MLP(nn.gelu), vectors(64, 256), "lecun"),
    "mlp tanh": (MLP(jnp.tanh), vectors(64, 256), "lecun"),
    "mlp relu, batch norm": (MLP(norm=batch_norm), vectors(64, 256), "he"),
    "mlp gelu, layer norm": (MLP(nn.gelu, norm=nn.LayerNorm), vectors(64, 256), "lecun"),
    "gated mlp": (Gated(), vectors(64, 256), "lecun"),
    "transformer": (Encoder(), vectors(8, 16, 256), "lecun"),
}
RESNETS = {
    f"resnet {norm}{', pre-activation' * pre}": (
        cifar_resnet(depth, norm=norm, width=64, shortcut="projection", preactivation=pre, num_classes=256),
        IMAGES,
        scheme,
    )
    for norm, pre, depth, scheme in (
        ("batch", False, 14, "he_normal_fan_out"),
        ("batch", True, 8, "he_normal_fan_out"),
        ("none", False, 8, "he_normal_fan_out"),
        ("none", True, 8, "he_normal_fan_out"),
        ("fixup", False, 8, "fixup"),
        ("fixup", True, 8, "fixup"),
        ("group", False, 8, "he_normal_fan_out"),
    )
}


@pytest.mark.parametrize("name", ["mlp gelu", "mlp relu, batch norm", "gated mlp"])
def test_measured_against_predicted(name: str) -> None:
    mean, error = ratios(*TABLE[name], seeds=3)
    assert np.isfinite(mean).all()
    assert (np.abs(mean - 1) < 0.06 + 3 * error).all()


@functools.cache
def over_ten_seeds(name: str) -> tuple[np.ndarray, np.ndarray]:
    return ratios(*{**TABLE, **RESNETS}[name], seeds=10)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("name", [*TABLE, *RESNETS])
def test_measured_against_predicted_over_ten_seeds(name: str, way: str) -> None:
    mean, error = (x[("forward", "backward").index(way) :: 2] for x in over_ten_seeds(name))
    known = np.isfinite(mean)
    print(
        f"\n{name}, {way}: {mean[known].min():.3f} to {mean[known].max():.3f}, error at most {error[known].max():.3f}"
    )
    assert known.mean() > 0.9, f"only {known.sum()} of {known.size} taps are predicted"
    assert (np.abs(mean - 1) < 0.05 + 2.5 * error)[known].all()


def queries_and_keys(features: int) -> tuple[np.ndarray, list[str]]:
    """Measured over predicted gradients of queries and keys over ten seeds, and the notes of these rows."""
    model, x = Encoder(features), vectors(8, 16, 256)
    rows = predict(model, x, scheme="lecun").rows
    at = [k for k, r in enumerate(rows) if "query" in r.name or "key" in r.name]
    return ratios(model, x, "lecun", seeds=10)[0][1::2][at], [rows[k].note for k in at]


@pytest.mark.slow
def test_alike_keys_of_narrow_heads() -> None:
    """Two of 16 tokens are alike by 1/8 in heads of 64 features, which leaves a term of order 16/64; rows say so."""
    (narrow, notes), (wide, _) = queries_and_keys(64), queries_and_keys(1024)
    print(f"\nheads of 64: {narrow}, of 1024: {wide}")
    assert 1.03 < narrow.mean() < 1.15 and abs(wide.mean() - 1) < 0.04
    assert all("gradient approximate" in note and "features of a head" in note for note in notes)


@pytest.mark.slow
def test_causal_attention() -> None:
    """The first token has one key, the last has all: what a token gets and gives depends on its place. What the keys of
    the second block get is not known well, and their row says so."""
    model, x = Encoder(causal=True), vectors(8, 16, 256)
    rows = predict(model, x, scheme="lecun").rows
    mean, error = ratios(model, x, "lecun", seeds=10)
    apart = [k for k, r in enumerate(rows) if "Attention_1/key" in r.name]
    for way, first in (("forward", 0), ("backward", 1)):
        m, e = mean[first::2], error[first::2]
        print(f"\ncausal, {way}: {m.min():.3f} to {m.max():.3f}, error at most {e.max():.3f}")
        off = np.abs(m - 1) >= 0.05 + 2.5 * e
        assert [k for k in np.flatnonzero(off) if k not in apart] == []
    (key,) = apart
    assert 0.7 < mean[2 * key + 1] < 1 and "gradient approximate" in rows[key].note


PLACES = np.arange(16)
MASKS = {
    "causal": PLACES[None] <= PLACES[:, None],
    "window": np.abs(PLACES[:, None] - PLACES[None]) < 3,
    "padding": (PLACES[None] < np.array([4, 8, 12, 16, 16, 16, 3, 9])[:, None])[:, None, None, :],
    "nothing for the first": PLACES[None] < PLACES[:, None],
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "padding")) for n in MASKS])
def test_masks(name: str) -> None:
    """Gradients of tokens depend on which others see them; a row that sees nothing has equal scores."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            y = nn.LayerNorm()(nn.Dense(256)(x))
            mask = jnp.asarray(MASKS[name]).reshape(-1, 1, *MASKS[name].shape[-2:])
            return x + nn.MultiHeadDotProductAttention(4, qkv_features=1024)(y, y, mask=mask)

    mean, error = ratios(Net(), vectors(8, 16, 256), "lecun", seeds=4)
    assert np.isfinite(mean).all()
    assert (np.abs(mean - 1) < 0.05 + 2.5 * error).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_each_pass_of_a_scan_has_its_constant(reverse: bool) -> None:
    """Scales and switches that a scan reads beside the layers; a scan from the end reads the last ones first. One seed:
    within 15 %, where a wrong entry is off by more than twice."""
    keys = jax.random.split(jax.random.key(0), 3)
    p = {"stem": jax.random.normal(keys[0], (256, 256)) / 16, "w": jax.random.normal(keys[1], (4, 256, 256)) / 16}
    scales, runs = jnp.array([0.0, 1.0, 5.0, 2.0]), jnp.array([True, True, True, False])

    def apply(p: Any, x: Any) -> Any:
        def body(x: Any, at: Any) -> Any:
            w, scale, run = at
            x = jax.lax.cond(run, lambda x: x + scale * jnp.tanh(x @ w), lambda x: x, x)
            return x, None

        return jax.lax.scan(body, x @ p["stem"], (p["w"], scales, runs), reverse=reverse)[0]

    x = jax.random.normal(keys[2], (128, 256))
    measured, predicted = fi.analyze(fi.Function(apply, p), p, x), predict(fi.Function(apply, p), x, scheme="lecun")
    assert len(measured.rows) == len(predicted.rows)
    for mine, other in zip(measured.rows, predicted.rows, strict=True):
        for a, b in ((mine.forward, other.forward), (mine.backward, other.backward)):
            assert (a is None) == (b is None), (mine.name, mine.repeat)
            if a is not None and b is not None:
                assert a.second_moment == pytest.approx(b.second_moment, rel=0.15, abs=1e-9), (mine.name, mine.repeat)
    order = [3, 2, 1, 0] if reverse else [0, 1, 2, 3]
    rows = [r for r in measured.rows if r.name == "w"]
    norms = [float(jnp.linalg.norm(p["w"][k])) for k in order]
    assert [r.weight.parameter_norm for r in rows if r.weight] == pytest.approx(norms, rel=1e-5)
    assert [r.forward is None for r in rows] == [k == 3 for k in order]


def test_masks_over_too_many_tokens_say_so() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.MultiHeadDotProductAttention(4)(x, x, mask=nn.make_causal_mask(x[..., 0]))

    few, many = (predict(Net(), vectors(1, n, 64), scheme="lecun").rows[-1].note for n in (256, 257))
    assert "a mask shows" not in few and "a mask shows" in many


def test_where_attention_is_approximate_rows_say_so() -> None:
    rows = {r.name.split("/", 1)[-1]: r.note for r in predict(Encoder(), vectors(4, 16, 64), scheme="lecun").rows[:9]}
    assert "gradient approximate" in rows["query/kernel"] and "gradient approximate" in rows["key/kernel"]
    assert rows["value/kernel"] == "" and "tokens that are alike" in rows["out/kernel"]


@pytest.mark.parametrize("norm", [batch_norm, lambda: nn.GroupNorm(32)])
def test_gradients_behind_few_directions(norm: Callable[[], nn.Module]) -> None:
    """Two positions a side, two channels a group: what borders and a channel have in common is most of the variance."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return norm()(nn.Conv(64, (3, 3), use_bias=False)(nn.relu(x)))

    x = vectors(32, 2, 2, 256)
    mean, error = (a[1::2][1] for a in ratios(Net(), x, "he", seeds=6))
    assert abs(mean - 1) < 0.03 + 2 * error


@pytest.mark.slow
def test_group_norm_converges_with_width() -> None:
    """Groups of two channels leave up to a tenth, at the stem over 24 seeds: borders are held as more directions than
    they are. Of eight channels, in a first stage 256 wide, nothing of it is seen."""
    net = cifar_resnet(8, norm="group", width=256, shortcut="projection", num_classes=256)
    mean, error = ratios(net, IMAGES, "he_normal_fan_out", seeds=4)
    print(f"\n{np.nanmin(mean[1::2]):.3f} to {np.nanmax(mean[1::2]):.3f} backward")
    assert np.nanmax(np.abs(mean - 1) - 2 * error) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES, ids=lambda c: c.name)
def test_every_family(case: Any) -> None:
    for row in predict(case.make(), *case.inputs, scheme="he").rows:
        if row.forward is None:
            assert row.note.startswith("unknown: ")
        else:
            assert math.isfinite(row.forward.second_moment)
            assert row.backward is not None or "backward unknown" in row.note or "int" in row.dtype


# --- what can be, and what cannot


def steps(x: Any) -> Any:
    """Positive, behind random weights."""
    return nn.softplus(nn.Dense(128, name="dt")(x) - 3.0)


class Decays(nn.Module):
    """exp of cumulative sums of negative values: never above 1."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(128, name="head")(jnp.exp(jnp.cumsum(-8 * steps(x), 1)))


class SegmentSums(nn.Module):
    """The same from each position to each later one, as Mamba-2 has it."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        sums = jnp.cumsum(jnp.moveaxis(-8 * steps(x), -1, 1), -1)
        sums = jnp.where(jnp.tri(x.shape[1], dtype=bool), sums[..., :, None] - sums[..., None, :], -jnp.inf)
        return jnp.einsum("bdts,bsd->btd", jnp.exp(sums), nn.Dense(128, name="v")(x))


class Stabilized(nn.Module):
    """exp(i - max(f, i)), which is at most 1, as in an mLSTM; once, or in a scan."""

    scan: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        v, i, f = nn.Dense(256)(x), nn.Dense(256)(x), nn.log_sigmoid(nn.Dense(256)(x) + 3)
        if not self.scan:
            return nn.Dense(256)(jnp.exp(i - jnp.maximum(f, i)) * v)

        def step(most: Any, at: Any) -> Any:
            v, i, f = at
            new = jnp.maximum(f + most, i)
            return new, jnp.exp(i - new) * v

        passes = tuple(jnp.moveaxis(a, 1, 0) for a in (v, i, f))
        return nn.Dense(256)(jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(v[:, 0]), passes)[1], 0, 1))


def test_differences_from_the_larger_of_two() -> None:
    """Before, i and max(f, i) were independent, and the exponential 7 instead of 0.7."""
    net, x = Stabilized(False), vectors(16, 8, 256)
    mean, error = ratios(net, x, "lecun", seeds=4, probe="output")
    assert np.isfinite(mean).all() and (np.abs(mean - 1) < 0.12 + 3 * error).all()


def test_exponentials_of_sums_of_one_sign_stay_below_one() -> None:
    x = vectors(4, 16, 128)
    found = predict(Decays(), x, scheme="lecun", probe="output")
    row = next(r for r in found.rows if r.name == "exp")
    assert row.forward is not None and row.forward.second_moment < 1
    assert "one sign" in row.note and "one sign" in found.rows[-1].note
    mean, _ = ratios(Decays(), x, "lecun", seeds=3, probe="output")
    assert abs(mean[0::2] - 1).max() < 0.25  # before: 0 to infinity


@pytest.mark.parametrize("net", [SegmentSums(), Stabilized(True)])
def test_exponentials_that_cannot_be_so_large_are_not_known(net: nn.Module) -> None:
    found = predict(net, vectors(4, 16, 128), scheme="lecun", probe="output").rows
    assert any(r.forward is None and "`exp` of a value" in r.note for r in found)
    for row in found:
        assert row.forward is None or row.forward.second_moment < 100
        assert row.backward is None or row.backward.second_moment < 100


def test_exponentials_of_masked_values_are_zero_there() -> None:
    """A softmax aside: a quarter of the entries is left."""
    net = fi.Function(lambda p, x: jnp.exp(jnp.where(jnp.arange(64) < 16, 0.5 * x, -jnp.inf)), {})
    found = predict(net, vectors(8, 64)).rows
    assert found[-1].forward is not None and found[0].backward is not None
    assert found[-1].forward.second_moment == pytest.approx(math.exp(0.5) / 4, rel=1e-3)
    assert found[0].backward.second_moment == pytest.approx(math.exp(0.5) / 16, rel=1e-3)


def test_moments_beyond_the_range_of_floats_are_not_known() -> None:
    net = fi.Function(lambda p, x: jnp.exp(30 * x) @ p["w"], {"w": vectors(64, 64)})
    last = predict(net, vectors(4, 64), scheme="he").rows[-1]
    assert last.forward is None and last.note.startswith("unknown")


# --- what is made of one value in several ways


def swish_by_hand(h: Any) -> Any:
    return h * nn.sigmoid(h) + jnp.tanh(h)


def chebyshev(h: Any) -> Any:
    t = jnp.tanh(h)
    found = [jnp.ones_like(t), t]
    for _ in range(3):
        found.append(2 * t * found[-1] - found[-2])
    return jnp.concatenate(found[1:], -1)


def root_mean_square(h: Any) -> Any:
    return h + nn.RMSNorm()(h)


def layer_norm(h: Any) -> Any:
    return h + nn.LayerNorm()(h)


class Between(nn.Module):
    """A function between two layers."""

    f: Callable[[Any], Any]
    width: int = 256

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(256)(self.f(nn.Dense(self.width, name="first")(x)))


def notes(found: Propagation) -> dict[str, str]:
    return {r.name: r.note for r in found.rows}


@pytest.mark.parametrize("f", [swish_by_hand, chebyshev, root_mean_square, layer_norm])
def test_gradients_of_what_is_used_twice(f: Callable[[Any], Any]) -> None:
    """One cotangent that comes back by several ways is one, not several that are independent: before, 10 % to half of
    a gradient were missing, and the sum with a layer norm forward too."""
    mean, error = ratios(Between(f), vectors(16, 8, 256), "lecun", seeds=4, probe="output")
    assert np.isfinite(mean).all()
    assert (np.abs(mean - 1) < 0.05 + 2.5 * error).all()
    assert not any(notes(predict(Between(f), vectors(16, 8, 256), scheme="lecun")).values())


@pytest.mark.parametrize("f", [lambda h: h + nn.relu(nn.LayerNorm()(h)), lambda h: h - 0.5 * nn.RMSNorm()(h)])
def test_copies_that_are_not_known_say_so(f: Callable[[Any], Any]) -> None:
    found = notes(predict(Between(f), vectors(16, 8, 256), scheme="lecun", probe="output"))
    assert "gradient approximate: parts of it" in found["first/kernel"]


def test_sums_of_copies_say_so() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.Dense(128, name="first")(x)
            one, other = (nn.LayerNorm()(h + nn.Dense(128)(h)) for _ in range(2))
            return nn.Dense(32)(one + other)

    found = notes(predict(Net(), vectors(16, 128), scheme="lecun", probe="output"))
    assert "made of it without weights" in found["output"] and "gradient approximate: parts" in found["first/kernel"]


def test_notes_on_values_reach_the_gradients_that_pass_them() -> None:
    """A slope that depends on what is approximate, a rule that is, and no more than these."""
    found = notes(predict(Decays(), vectors(4, 16, 128), scheme="lecun", probe="output"))
    assert all("gradient approximate: sums of values of one sign" in found[name] for name in ("dt/kernel", "logaddexp"))
    assert found["head/kernel"].startswith("approximate: sums of values of one sign")

    def gated(h: Any) -> Any:
        z, f = jnp.split(h, 2, -1)
        z, f = jnp.tanh(z), nn.sigmoid(f)
        return jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (f, (1 - f) * z), axis=1)[1]

    found = notes(predict(Between(gated), vectors(4, 8, 256), scheme="lecun", probe="output"))
    assert "gradient approximate" in found["first/kernel"] and "approximate" in found["output"]


def test_gradients_of_extremes_say_so() -> None:
    def ranged(h: Any) -> Any:
        low, high = h.min(1, keepdims=True), h.max(1, keepdims=True)
        return (h - low) / (high - low + 1e-5)

    found = notes(predict(Between(ranged), vectors(8, 32, 64), scheme="lecun", probe="output"))
    assert "gradient approximate" in found["first/kernel"]


@pytest.mark.parametrize("alone", [True, False])
def test_gradients_of_squares_under_a_root(alone: bool) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            squares = nn.Dense(256)(x) ** 2
            lengths = jnp.sqrt(squares.sum(-1, keepdims=True) + 1e-8)
            y = nn.Dense(256)(lengths - jnp.linspace(14, 18, 128))
            return y if alone else y + nn.Dense(256)(squares)

    x = vectors(256, 256)
    mean, error = ratios(Net(), x, "lecun", seeds=6, probe="output")
    at = next(k for k, r in enumerate(predict(Net(), x, scheme="lecun").rows) if r.name == "integer_pow")
    assert np.isfinite(mean).all()
    assert abs(mean[2 * at + 1] - 1) < 0.1 + 3 * error[2 * at + 1]  # before: infinite


def test_a_parameter_that_is_used_several_times_is_named() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            shared = nn.Dense(64, name="shared")
            return nn.Dense(32, name="last")(shared(x) + shared(0.9 * x))

    found = predict(Net(), vectors(16, 64), scheme="lecun", probe="output").rows
    assert "`shared/kernel` is used several times" in found[-1].note
    assert "gradient approximate" in found[0].note

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            table = nn.Embed(64, 64)
            return table.attend(nn.Dense(64)(table(tokens)))

    tied = predict(Tied(), jax.ShapeDtypeStruct((4, 8), jnp.int32), scheme="lecun").rows
    assert not any("several times" in r.note for r in tied)


def resized(x: Any) -> Any:
    return jax.image.resize(x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "bilinear")


def smooth(x: Any) -> Any:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME")


NEIGHBOURS = {
    "repeated, averaged": lambda x: nn.avg_pool(x.repeat(2, 1).repeat(2, 2), (2, 2), (2, 2)),
    "nearest, averaged": lambda x: nn.avg_pool(
        jax.image.resize(x, (*(4, 16, 16), x.shape[3]), "nearest"), (2, 2), (2, 2)
    ),
    "averaged twice": lambda x: smooth(nn.relu(smooth(x))),
    "resized twice": lambda x: resized(resized(x)),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_averages_over_neighbours_that_are_alike_say_so(name: str) -> None:
    found = notes(predict(Between(NEIGHBOURS[name], 32), vectors(4, 8, 8, 64), scheme="lecun", probe="output"))
    assert "neighbours that are alike" in found["output"]
    assert "gradient approximate: a sum over neighbours" in found["first/kernel"]


@pytest.mark.parametrize("f", [lambda x: nn.avg_pool(nn.avg_pool(x, (2, 2), (2, 2)), (2, 2), (2, 2)), resized, smooth])
def test_averages_over_neighbours_that_are_not_alike_say_nothing(f: Callable[[Any], Any]) -> None:
    found = predict(Between(f, 32), vectors(4, 8, 8, 64), scheme="lecun", probe="output")
    assert not any(notes(found).values())
