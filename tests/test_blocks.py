"""Block by block gives what the whole model gives: results, gradients and cotangents, for every family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import ZOO, Case
from zoo_families import FAMILIES

import fixup_init as fi
from fixup_init import blocks, cutting, taps
from fixup_init.measurement import prepare, run
from fixup_init.models.resnet import cifar_resnet
from fixup_init.propagation import NOT_RUN
from fixup_init.tracing import Traced, trace

# Batch norm over 8 entries a channel, or 2, amplifies a rounding a hundredfold and more over many blocks.
IN_FLOAT64 = ("resnet110-v1", "resnet50-v1", "pointnet")
# The same networks; NNX's batch norm has float32 statistics only, and Haiku's convolutions take float32 kernels only.
TWINS = ("resnet110-v1-nnx", "resnet50-v1-nnx", "haiku-resnet50-v1", "haiku-resnet50-v2")
QUICK = ("function", "time-conditioned", "densenet", "decoder-tied", "nnx-transformer", "layer-drop", "equinox-mlp")
CASES = {case.name: case for case in ZOO + FAMILIES}


def over_zoo(*left_out: str) -> Any:
    chosen = [case for name, case in CASES.items() if name not in left_out]
    marked = [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (c.name not in QUICK)) for c in chosen]
    return pytest.mark.parametrize("case", marked)


# Without optimizations XLA rounds a value in two ways where it is used twice, and its maximum equals no entry.
WITH_CARE = ("pointnet",)


@pytest.fixture(autouse=True)
def compiled_in_haste(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is compiled here runs once: a third of the time is saved."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not any(f"[{n}]" in request.node.name for n in WITH_CARE))
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def drawn(tree: Any, key: jax.Array, positive: bool = False) -> Any:
    """Any values: those of state may stand under a square root."""

    def one(k: int, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros(leaf.shape, leaf.dtype)
        x = jax.random.normal(jax.random.fold_in(key, k), leaf.shape) * 0.1
        return (jnp.abs(x) + 0.5 if positive else x).astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [one(k, leaf) for k, leaf in enumerate(leaves)])


def close(found: Any, whole: Any, largest: float = 0.0) -> None:
    """To float tolerance: sums in another order. In units of the array's largest entry, and of float32's resolution of
    the `largest` of all, since what cancels exactly, such as the gradient of a bias before a normalization, is nothing
    but rounding: some tens of terms, each rounded to eps, of the size of those that do not cancel."""
    whole = np.asarray(whole, np.complex128 if np.iscomplexobj(whole) else np.float64)
    size = max(np.abs(whole).max(initial=0), 1e-30)
    allowed = max(2e-4 * size, 32 * float(np.finfo(np.float32).eps) * largest)
    np.testing.assert_allclose(np.asarray(found), whole, rtol=0, atol=allowed)


@pytest.fixture
def wide(case: Case) -> Iterator[bool]:
    with jax.enable_x64(case.name in IN_FLOAT64):
        yield case.name in IN_FLOAT64


@over_zoo(*TWINS)
def test_blocks_give_what_the_whole_model_gives(case: Case, wide: bool) -> None:
    given = case.inputs
    if wide:
        given = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float64) for x in given)
    traced = trace(case.make(), given, {})
    application, program = traced.application, traced.graph.program
    params, state = drawn(application.params, jax.random.key(1)), drawn(application.state, jax.random.key(2), True)
    noise, inputs = drawn(application.noise, jax.random.key(3)), drawn(given, jax.random.key(4))
    arrays = [x for x in jax.tree.leaves(inputs) if hasattr(x, "shape")]
    setup = prepare(traced, params, "output")
    values = dict(zip(program.inputs, jax.tree.leaves((params, state, noise, arrays)), strict=True))
    env, _ = blocks.forward(traced.graph, setup.blocks, values)

    def apply(params: Any, *rest: Any) -> list[Any]:
        return [x for x in jax.tree.leaves(application.apply(params, *rest)) if isinstance(x, jax.Array)]

    # Operation by operation, as JAX evaluates a trace: compiling the whole of a deep network takes minutes.
    rest = (state, noise, tuple(arrays))
    whole = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(apply)(params, *rest))
    results, pull = jax.vjp(lambda params: whole(*jax.tree.leaves((params, *rest))), params)
    for v, result in zip(program.outputs, results, strict=True):
        close(env[v], result)
    probes = [
        jax.random.normal(jax.random.fold_in(jax.random.key(5), k), x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.inexact)
        else np.zeros(x.shape, jax.dtypes.float0)
        for k, x in enumerate(results)
    ]
    starts: dict[int, Any] = {}
    for v, probe in zip(program.outputs, probes, strict=True):
        if probe.dtype != jax.dtypes.float0:
            starts[v] = starts[v] + probe if v in starts else probe
    leaves = program.inputs[: len(jax.tree.leaves(params))]
    found = blocks.backward(traced.graph, setup.blocks, env, starts, gradients=leaves).gradients
    gradients = {
        v: g for v, g in zip(leaves, jax.tree.leaves(pull(probes)[0]), strict=True) if g.dtype != jax.dtypes.float0
    }
    largest = max(float(jnp.abs(g).max()) for g in gradients.values())
    for v, gradient in gradients.items():
        close(found.get(v, jnp.zeros(gradient.shape)), gradient, largest)


@over_zoo()
def test_every_family_is_analyzed(case: Case) -> None:
    """Linen, NNX, Haiku and Equinox alike."""
    model = case.make()
    traced = trace(model, case.inputs, {})
    params, state = (
        drawn(traced.application.params, jax.random.key(1)),
        drawn(traced.application.state, jax.random.key(2), True),
    )
    setup = prepare(traced, params, "output")
    made, _ = run(setup, params, state, jax.random.key(0), "drawn")
    assert len(made) == len(list(taps.unrolled(setup.taps)))
    ran = [row for row in made if row.note != NOT_RUN]
    assert all(row.forward is not None and row.forward.finite == 1 for row in ran)
    assert (len(ran) < len(made)) == (case.name == "switched")  # one of three experts runs
    assert any(row.backward is not None for row in made)


def test_a_loss_reads_results_that_no_activation_leads_to() -> None:
    """A temperature beside logits, as CLIP returns it."""
    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), {"w": jnp.ones((16, 3)), "t": jnp.zeros(())}
    model = fi.Function(lambda p, x: (x @ p["w"], jnp.exp(p["t"]) + 1), w)

    def loss(y: Any) -> Any:
        return (y[0] * y[1]).sum()

    found = fi.analyze(model, w, x, loss=loss)
    assert found.rows[-1].backward is not None and found.rows[-1].backward.mean == 2
    traced = trace(model, (jnp.ones((8, 16)),), {})
    setup = prepare(traced, w, "output")
    _, gradient = run(setup, w, None, jax.random.key(0), "loss", loss=loss, gradients=True)
    whole = jax.grad(lambda w: loss(model.apply(w, jnp.ones((8, 16)))))(w)
    jax.tree.map(np.testing.assert_allclose, gradient, whole)


@pytest.mark.parametrize("rows", [lambda x: x[:5], lambda x: jnp.pad(x, ((0, 3), (0, 0)))], ids=["slice", "pad"])
def test_examples_may_be_left_out_or_added(rows: Any) -> None:
    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
    model = fi.Function(lambda w, x: jax.nn.relu(rows(x @ w)) @ w, w)
    found = fi.analyze(model, fi.init(model, jax.random.key(0), x, scheme="he"), x)
    assert [r.kind for r in found.rows] == ["input", "weight", "nonlinearity", "weight", "output"]


def layers_of(traced: Traced) -> list[int]:
    return [b.layers for b in prepare(traced, traced.application.params, "output").blocks]


class Conditioned(nn.Module):
    """A source that every block reads."""

    depth: int = 20

    @nn.compact
    def __call__(self, x: Any, time: Any) -> Any:
        time = nn.silu(nn.Dense(16)(time))
        for _ in range(self.depth):
            x = x + nn.Dense(16)(nn.relu(nn.Dense(16)(x) + nn.Dense(16)(time)))
        return nn.Dense(3)(x)


def test_what_passes_by_many_layers_is_no_hindrance() -> None:
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32)
    traced = trace(Conditioned(), (x, x), {})
    assert max(layers_of(traced)) <= 4
    known = len(cutting._SIGNATURES)
    assert max(layers_of(trace(Conditioned(40), (x, x), {}))) <= 4
    assert len(cutting._SIGNATURES) == known


class Dense(nn.Module):
    """Every layer reads all before it."""

    depth: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        parts = [x]
        for _ in range(self.depth):
            parts.append(nn.relu(nn.Dense(8)(sum(parts[1:], parts[0]) + parts[-1])))
        return nn.Dense(3)(sum(parts[1:], parts[0]))


def test_equal_blocks_are_one() -> None:
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    shallow = prepare(trace(cifar_resnet(20, norm="batch"), (x,), {}), {}, "output").blocks
    deep = prepare(trace(cifar_resnet(110, norm="batch"), (x,), {}), {}, "output").blocks
    assert len(deep) == 4 * len(shallow) + 12 or len(deep) > 4 * len(shallow)
    assert {b.signature for b in deep} == {b.signature for b in shallow}
    assert max(b.layers for b in deep) <= 3


def test_rules_of_one_source_with_other_equations_are_other_blocks() -> None:
    """A custom derivative that closes over a number is written once and computes as many functions as it is given."""

    def scaled(by: float) -> Any:
        @jax.custom_jvp
        def f(x: Any) -> Any:
            return by * jnp.abs(x)

        f.defjvps(lambda t, ans, x: t * by)
        return f

    def net(w: Any, x: Any) -> Any:
        for k, by in enumerate((1.0, 2.0, 4.0)):
            x = scaled(by)(x @ w[k])
        return x

    model = fi.Function(net, [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * 3)
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    w = [jnp.eye(16)] * 3
    rows = fi.analyze(model, w, x).select("nonlinearity")
    moments = [r.forward.second_moment for r in rows if r.forward is not None]
    assert moments == pytest.approx([moments[0], 4 * moments[0], 64 * moments[0]])


def test_a_second_analysis_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    model = cifar_resnet(20, norm="batch")
    variables = fi.init(model, jax.random.key(0), x)
    first = fi.analyze(model, variables, x)
    with jax.log_compiles(), caplog.at_level("DEBUG"):
        assert fi.analyze(model, variables, x) == first
    assert not [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
