"""Measured drift against known results, and against direct computation."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import TOKENS, VECTORS, Decoder, Encoder, Stacked, plain_function

import fixup_init as fi
from fixup_init import blocks, compiled, cutting, taps
from fixup_init.models import resnet_nnx
from fixup_init.models.resnet import cifar_resnet
from fixup_init.tracing import trace


@pytest.fixture(scope="module")
def compared() -> fi.Comparison:
    return fi.compare(cifar_resnet(56, norm="batch"), jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32))


def test_he_without_normalization_about_doubles_a_block(compared: fi.Comparison) -> None:
    plain = compared["model, removed"]
    drift = plain.drift("forward")
    assert drift.verdict == "grows"
    sums = [r.forward.second_moment for r in plain.stream]
    inside_stages = [sums[k + 1] / sums[k] for k in range(26) if k not in (8, 17)]
    assert 1.6 < float(np.exp(np.mean(np.log(inside_stages)))) < 2.4
    assert "grows by a factor of" in plain.summary()


def test_batch_norm_is_bounded_and_fixup_flat(compared: fi.Comparison) -> None:
    assert compared["model, kept"].drift("forward").verdict in ("bounded", "flat")
    fixup = compared["fixup, removed"]
    for direction in ("forward", "backward"):
        assert fixup.drift(direction).verdict == "flat"
    assert "flat" in fixup.summary() and "bounded" in compared["model, kept"].summary()
    assert all(r.forward.second_moment == 0 for r in fixup.select("branch"))


def test_rows(compared: fi.Comparison) -> None:
    one = compared["model, kept"]
    assert len(one.select("sum")) == len(one.select("branch")) == 27
    assert len(one.select("weight")) == 56 and len(one.select("norm")) == 55
    assert len(one.select("nonlinearity")) == 55
    assert [r.block for r in one.select("sum")] == list(range(1, 28))
    assert one.rows[0].kind == "input" and one.rows[-1].kind == "output"
    assert {r.name for r in one.select("nonlinearity")} == {"relu"}


def test_statistics_are_those_of_the_arrays() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.Conv(6, (3, 3))(x)
            self.sow("seen", "h", h)
            a = nn.tanh(h)
            self.sow("seen", "a", a)
            return nn.Dense(3)(a.mean((1, 2)))

    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3)) + 0.5
    model = Net()
    variables = {"params": model.init(jax.random.key(0), x)["params"]}
    _, seen = model.apply(variables, x, mutable=["seen"])
    rows = {(r.kind, r.name): r.forward for r in fi.analyze(model, variables, x)}
    for (kind, name), array in {
        ("weight", "Conv_0/kernel"): seen["seen"]["h"][0],
        ("nonlinearity", "tanh"): seen["seen"]["a"][0],
    }.items():
        found = rows[kind, name]
        assert found.mean == pytest.approx(float(array.mean()), rel=1e-4)
        assert found.variance == pytest.approx(float(array.var()), rel=1e-4)
        channels = float((array.mean((0, 1, 2)) ** 2).mean())
        assert found.squared_channel_mean == pytest.approx(channels, rel=1e-4)


def _taps_of(model: Any, x: Any, variables: Any) -> tuple[Any, ...]:
    traced = trace(model, (x,), {})
    placed = taps.place(traced)
    axes = taps.layouts(traced.graph, placed)
    params, state = traced.application.separate(variables)
    flat = [*jax.tree.leaves((params, state)), jax.random.key(0), x]
    return traced, axes, dict(zip(traced.graph.program.inputs, flat, strict=True))


@pytest.mark.parametrize("norm", ["fixup", "batch", "none"])
def test_gradients_through_taps_are_exact(norm: str) -> None:
    """With zero branches, activations sit at 0, where a wrong interpreter would take 1/2 for the derivative of relu."""
    model = cifar_resnet(20, norm=norm)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = fi.init(model, jax.random.key(0), x)
    variables["params"]["fc"]["kernel"] = jax.random.normal(jax.random.key(2), (64, 10))
    variables["params"]["layer1_0"]["conv1"]["kernel"] *= 0  # so that a relu is given exact zeros
    traced, axes, values = _taps_of(model, x, variables)
    program = traced.graph.program

    def tapped(image: Any) -> Any:
        env = {**program.constants, **values, program.inputs[-1]: image}
        slots = {v: blocks.slot(traced.graph, v, layout) for v, layout in axes.items()}
        blocks._run(program.steps, env, axes, slots)
        return env[program.outputs[0]]

    def plain(image: Any) -> Any:
        mutable = [k for k in variables if k != "params"]
        return model.apply(variables, image, mutable=mutable)[0]

    probe = jax.random.normal(jax.random.key(3), (2, 10))
    with_taps, without = (jax.jit(jax.grad(lambda i, f=f: (f(i) * probe).sum()))(x) for f in (tapped, plain))
    np.testing.assert_array_equal(with_taps, without)
    assert with_taps.any()

    cut = cutting.cut(traced.graph, axes)
    env, _ = blocks.forward(traced.graph, cut, values)
    pulled = blocks.backward(traced.graph, cut, env, {program.outputs[0]: probe})
    np.testing.assert_allclose(pulled.cotangents[program.inputs[-1]], without, rtol=1e-4, atol=1e-6)


def test_a_custom_derivative_is_kept() -> None:
    @jax.custom_vjp
    def reverse(x: Any) -> Any:
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, ct: (-ct,))

    def apply(w: Any, x: Any) -> Any:
        return reverse(x @ w) * 1.0

    w = jax.random.normal(jax.random.key(0), (16, 4))
    x = jnp.ones((8, 16))
    traced = trace(fi.Function(apply, w), (x,), {})
    graph = traced.graph
    cut = cutting.cut(graph, {})
    env, _ = blocks.forward(graph, cut, dict(zip(graph.program.inputs, (w, x), strict=True)))
    pulled = blocks.backward(graph, cut, env, {graph.program.outputs[0]: jnp.ones((8, 4))})
    np.testing.assert_allclose(pulled.cotangents[graph.program.inputs[1]], -jnp.ones((8, 4)) @ w.T, rtol=1e-5)


def test_cotangents_are_those_of_the_arrays() -> None:
    model, x = plain_function(), jax.random.normal(jax.random.key(1), (8, 16))
    params = jax.tree.map(lambda s: jax.random.normal(jax.random.key(2), s.shape) * 0.2, model.params)
    key = jax.random.key(7)
    report = fi.analyze(model, params, x, probe="output", key=key)
    probe = jax.random.normal(jax.random.fold_in(key, 0), (8, 3))

    def from_stream(h: Any, start: int) -> Any:
        for w1, w2 in params["blocks"][start:]:
            h = h + jnp.tanh(jax.nn.relu(h) @ w1) @ w2
        return (h @ params["out"] * probe).sum()

    h = x @ params["in"]
    for k, (w1, w2) in enumerate(params["blocks"]):
        h = h + jnp.tanh(jax.nn.relu(h) @ w1) @ w2
        ct = jax.grad(from_stream)(h, k + 1)
        row = report.select("sum")[k].backward
        assert row is not None
        assert row.variance == pytest.approx(float(ct.var()), rel=1e-4)
        assert row.mean == pytest.approx(float(ct.mean()), rel=1e-3, abs=1e-6)


def test_scan_reports_every_pass() -> None:
    """A scanned network gives the rows of the same network unrolled."""
    loops, stacked = Stacked(False, nnx.Rngs(0)), Stacked(True, nnx.Rngs(0))
    blocks_ = [nnx.state(b, nnx.Param) for b in loops.blocks]
    nnx.update(stacked.blocks, jax.tree.map(lambda *a: jnp.stack(a), *blocks_))
    nnx.update(stacked.head, nnx.state(loops.head))
    x = jax.random.normal(jax.random.key(0), (8, 16))
    a, b = fi.analyze(loops, None, x), fi.analyze(stacked, None, x)
    assert [(r.kind, r.block, r.shape) for r in a] == [(r.kind, r.block, r.shape) for r in b]
    for p, q in zip(a, b, strict=True):
        assert q.forward.variance == pytest.approx(p.forward.variance, rel=1e-4)
        assert p.backward is not None and q.backward is not None
        assert q.backward.variance == pytest.approx(p.backward.variance, rel=1e-4)
    assert [r.repeat for r in b.select("sum")] == [0, 1, 2, 3]


def test_equal_blocks_compile_once() -> None:
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    model = cifar_resnet(20, norm="none")
    compiled._HELD.clear()
    fi.analyze(model, fi.init(model, jax.random.key(0), x, scheme="he"), x)
    known = compiled.held()
    deep = cifar_resnet(56, norm="none")
    fi.analyze(deep, fi.init(deep, jax.random.key(0), x, scheme="he"), x)
    assert compiled.held() == known


def test_what_is_compiled_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    model = cifar_resnet(20, norm="none")
    variables = fi.init(model, jax.random.key(0), x, scheme="he")
    whole = fi.analyze(model, variables, x)
    compiled._HELD.clear()
    monkeypatch.setattr(compiled, "LIMIT", 4)
    assert fi.analyze(model, variables, x) == whole
    assert compiled.held() == 4


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="counts the memory mappings of Linux")
def test_what_is_let_go_of_leaves_no_memory_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def mappings() -> int:
        return len(pathlib.Path("/proc/self/maps").read_text().splitlines())

    monkeypatch.setattr(compiled, "LIMIT", 4)
    x = jnp.ones((8, 8))
    before = mappings()
    for k in range(60):  # each maps three at least
        compiled.jitted(("test", k), lambda k=k: lambda x: jnp.tanh(x @ x + k).sum())(x).block_until_ready()
    assert mappings() < before + 60


def test_removed_normalization_is_the_plain_network() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    plain = cifar_resnet(20, norm="none")
    variables = plain.init(jax.random.key(0), x)
    normalized = cifar_resnet(20, norm="batch")
    full = normalized.init(jax.random.key(9), x)
    for name, sub in variables["params"].items():
        for part, leaf in sub.items():
            full["params"][name][part] = leaf
    a = fi.analyze(plain, variables, x)
    b = fi.analyze(normalized, full, x, normalization="removed")
    for p, q in zip(a, b, strict=True):
        assert p.kind == q.kind and q.forward.variance == pytest.approx(p.forward.variance, rel=1e-4)


@pytest.mark.parametrize("model, inputs", [
    (Encoder(), (jax.ShapeDtypeStruct((2, 12, 32), jnp.float32),)), (Decoder(gated=True), (TOKENS,)),
])  # fmt: skip
def test_transformers(model: Any, inputs: Any) -> None:
    report = fi.analyze(model, fi.init(model, jax.random.key(0), *inputs, scheme="he"), *inputs)
    assert len(report.select("sum")) == 4
    assert all(r.backward is not None and r.backward.second_moment > 0 for r in report.select("sum", "weight"))


def test_nnx_and_linen_measure_the_same() -> None:
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    linen = cifar_resnet(20, norm="batch")
    module = resnet_nnx.cifar_resnet(20, "batch", rngs=nnx.Rngs(0))
    variables = fi.init(linen, jax.random.key(4), x, scheme="he")
    fi.init(module, jax.random.key(4), x, scheme="he")
    a, b = fi.analyze(linen, variables, x), fi.analyze(module, None, x)
    for p, q in zip(a, b, strict=True):
        assert (p.kind, p.name) == (q.kind, q.name)
        assert q.forward.second_moment == pytest.approx(p.forward.second_moment, rel=1e-3)


def test_deep_signals_overflow_neither_in_the_statistics_nor_silently() -> None:
    def apply(scale: float) -> Any:
        def run(w: Any, x: Any) -> Any:
            for _ in range(30):
                x = (x @ w) * scale
            return x

        return run

    w, x = jnp.eye(16), jnp.ones((8, 16))
    big = fi.analyze(fi.Function(apply(10.0), w), None, x)
    assert big.rows[-1].forward.second_moment == pytest.approx(1e60, rel=1e-3)  # beyond float32's own range
    over = fi.analyze(fi.Function(apply(1e3), w), None, x)
    drift = over.drift("forward")
    assert drift.verdict == "overflows" and "overflows" in over.summary()
    assert math.isnan(over.rows[-1].forward.mean) and over.rows[-1].forward.finite == 0
    assert fi.Propagation.from_dict(over.to_dict()).rows[-1].forward.finite == 0


def test_keys_of_every_kind_make_the_same_noise() -> None:
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(x))

    x = jnp.ones((8, 16))
    variables = Noisy().init(jax.random.key(0), x)
    typed, raw, seed = (
        fi.analyze(Noisy(), variables, x, key=key) for key in (jax.random.key(5), jax.random.PRNGKey(5), 5)
    )
    other = fi.analyze(Noisy(), variables, x, key=6)
    assert typed == raw == seed
    assert typed != other


def test_probe() -> None:
    model, x = cifar_resnet(20, norm="fixup"), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    zero_head = fi.init(model, jax.random.key(0), x)
    report = fi.analyze(model, zero_head, x)
    assert report.probe == "input of the head"
    assert report.select("sum")[0].backward.second_moment > 0  # type: ignore[union-attr]
    at_output = fi.analyze(model, zero_head, x, probe="output")
    assert at_output.drift("backward").verdict == "zero"
    assert "zero" in at_output.summary()


def test_rows_behind_the_probe_have_no_measurement() -> None:
    """The trace meets the first head before a layer of the second; the probe starts at the inputs of both."""

    def net(w: Any, x: Any) -> Any:
        x = jax.nn.relu(x @ w["stem"])
        return x @ w["policy"], jax.nn.relu(x @ w["v"]) @ w["value"]

    square = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    model, x = fi.Function(net, dict.fromkeys(("stem", "policy", "v", "value"), square)), jnp.ones((8, 16))
    found = fi.analyze(model, fi.init(model, jax.random.key(0), x, scheme="he"), x, probe="head")
    assert found.probe == "input of the head"
    for r in found.rows:
        behind = r.name in ("policy", "value", "output")
        assert (r.backward is None) == behind
        assert (r.weight is None) == (behind or r.kind != "weight")
        assert behind or r.backward.second_moment > 0


def test_he_mlp_keeps_the_second_moment() -> None:
    """He et al. 2015, eq. 10: with relu and fan_in, the second moment of pre-activations stays."""
    width, depth = 512, 12

    def apply(params: Any, x: Any) -> Any:
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    model = fi.Function(apply, [jax.ShapeDtypeStruct((width, width), jnp.float32)] * depth)
    x = jax.random.normal(jax.random.key(0), (64, width))
    ends = []
    for seed in range(5):
        report = fi.analyze(model, fi.init(model, jax.random.key(seed), x, scheme="he"), x)
        weights = report.select("weight")
        ends.append(weights[-1].forward.second_moment / weights[0].forward.second_moment)
    assert float(np.mean(ends)) == pytest.approx(1, abs=0.25)


def test_measure_reports_progress() -> None:
    seen: list[tuple[str, int, int]] = []
    model, x = cifar_resnet(20, norm="none"), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    fi.analyze(model, model.init(jax.random.key(0), jnp.zeros(x.shape)), x, progress=lambda *a: seen.append(a))
    assert seen[-1][1] == seen[-1][2] and {s[0].split(": ")[1] for s in seen} == {"forward", "backward"}


def test_a_model_without_normalization_is_compared_once_a_scheme() -> None:
    compared = fi.compare(plain_function(), VECTORS, cases=[("he", "kept"), ("he", "removed"), ("fixup", "removed")])
    assert [one.label for one in compared] == ["he_normal_fan_in", "fixup"]


def test_several_models_are_compared_and_left_as_they_are() -> None:
    module = Stacked(False, nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(module))
    compared = fi.compare({"nnx": module, "plain": plain_function()}, VECTORS, cases=[("fixup", "kept")])
    assert [one.label for one in compared] == ["nnx, fixup", "plain, fixup"]
    assert all(one.drift("forward").verdict == "flat" for one in compared)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(module))
    with pytest.raises(KeyError, match="'nnx, fixup'"):
        compared["fixup"]
