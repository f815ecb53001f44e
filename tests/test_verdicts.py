"""Verdicts: what must raise a warning, what must not, and that following the advice cures it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fixup_init as fi
from fixup_init.plain import plain
from fixup_init.propagation import Propagation, Row, Statistics, Weight
from fixup_init.report.layout import pairs
from fixup_init.verdicts import Verdict, verdicts
from fixup_init.verdicts.rows import HEADROOM

WIDTH = 32
VECTORS = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((4, 16, WIDTH), jnp.float32)


def spec(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def residual(blocks: int, dtype: Any = jnp.float32, gain: float = 1.0, skip: float = 1.0) -> fi.Function:
    """skip * x + gain * relu(x a) b."""

    def net(w: Any, x: Any) -> Any:
        x = x @ w["stem"]
        for a, b in w["blocks"]:
            x = skip * x + gain * (jax.nn.relu(x @ a) @ b)
        return x @ w["head"]

    square = spec(WIDTH, WIDTH, dtype=dtype)
    return fi.Function(
        net, {"stem": square, "blocks": [(square, square)] * blocks, "head": spec(WIDTH, 10, dtype=dtype)}
    )


def plain_mlp(layers: int, act: Callable[[Any], Any] = jax.nn.relu) -> fi.Function:
    def net(w: Any, x: Any) -> Any:
        for k in w[:-1]:
            x = act(x @ k)
        return x @ w[-1]

    return fi.Function(net, [spec(64, 64)] * (layers - 1) + [spec(64, 10)])


def attention(layers: int, skips: bool) -> fi.Function:
    """Single-head softmax attention; with skips and layer norm before each (pre-LN), or with neither."""

    def net(w: Any, x: Any) -> Any:
        for q, k, v, o in w["layers"]:
            y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) if skips else x
            scores = jax.nn.softmax((y @ q) @ (y @ k).swapaxes(-1, -2) / math.sqrt(WIDTH), -1)
            mixed = (scores @ (y @ v)) @ o
            x = x + mixed if skips else mixed
        return x @ w["head"]

    square = spec(WIDTH, WIDTH)
    return fi.Function(net, {"layers": [(square,) * 4] * layers, "head": spec(WIDTH, 10)})


def normalized(blocks: int) -> fi.Function:
    """x + BN(relu(x a) b): a sum of branches of equal size, which grows linearly (De & Smith 2020)."""

    def net(w: Any, x: Any) -> Any:
        for a, b in w["blocks"]:
            y = jax.nn.relu(x @ a) @ b
            x = x + (y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-5)
        return x @ w["head"]

    return fi.Function(net, {"blocks": [(spec(WIDTH, WIDTH),) * 2] * blocks, "head": spec(WIDTH, 10)})


def padded() -> fi.Function:
    """relu after the sum, and skips that pad channels with zeros: 29 of 32 at the end (He et al. 2015, option A)."""

    def net(w: Any, x: Any) -> Any:
        x = jax.nn.relu(x @ w["stem"])
        for a, b in w["blocks"]:
            y = jax.nn.relu(x @ a) @ b
            x = jax.nn.relu(jnp.pad(x, ((0, 0), (0, y.shape[1] - x.shape[1]))) + y)
        return x @ w["head"]

    blocks = [(spec(3, 3), spec(3, 3)), (spec(3, 32), spec(32, 32)), (spec(32, 32), spec(32, 32))]
    return fi.Function(net, {"stem": spec(WIDTH, 3), "blocks": blocks, "head": spec(32, 10)})


def pooled() -> fi.Function:
    """A pointwise network on positions, and a head behind their mean."""

    def net(w: Any, x: Any) -> Any:
        for k in w["layers"]:
            x = jax.nn.relu(x @ k)
        return x.mean(1) @ w["head"]

    return fi.Function(net, {"layers": [spec(4, 16), spec(16, 16), spec(16, 16)], "head": spec(16, 10)})


def shifted() -> Propagation:
    """What the data has in common is nothing that the network did."""
    model, x = residual(5), 5.0 + 0.3 * jax.random.normal(jax.random.key(1), VECTORS.shape)
    return fi.analyze(model, fi.init(model, jax.random.key(0), x, scheme="fixup"), x)


def measured(model: Any, x: Any, scheme: Any = "model", **kwargs: Any) -> Propagation:
    return fi.analyze(model, fi.init(model, jax.random.key(0), x, scheme=scheme), x, **kwargs)


def serious(propagation: Propagation) -> list[str]:
    """Verdicts that are more than a note."""
    return [f"{v.severity} {v.kind} {v.direction}: {v.text}" for v in verdicts(propagation) if v.severity != "note"]


def the(propagation: Propagation, kind: str, direction: str | None = None) -> Verdict:
    found = [v for v in verdicts(propagation) if v.kind == kind and direction in (None, v.direction)]
    assert found, f"no {kind} among {[(v.kind, v.direction, v.text) for v in verdicts(propagation)]}"
    _schemes_exist(found)
    return found[0]


def _schemes_exist(found: Any) -> None:
    for v in found:
        for name in re.findall(r'scheme="(\w+)"', v.advice):
            assert name in fi.schemes.NAMES
        assert "nan" not in v.text.split() and "  " not in v.text + v.advice
        assert not re.search(r"\b1 (layers|blocks|nonlinearities)\b", v.text)


# --- what must stay silent ------------------------------------------------------------------------------------------

QUIET: dict[str, Callable[[], Propagation]] = {
    "batch norm, 150 blocks in one stage: 150-fold, linear": lambda: measured(normalized(150), VECTORS, "he_normal"),
    "fixup, 50 blocks": lambda: measured(residual(50), VECTORS, "fixup"),
    "fixup with padded shortcuts": lambda: measured(padded(), VECTORS, "fixup"),
    "He, 3 blocks: 8-fold": lambda: measured(residual(3), VECTORS, "he_normal"),
    "He MLP, 10 layers": lambda: measured(plain_mlp(10), spec(16, 64), "he_normal"),
    "He MLP, 30 layers": lambda: measured(plain_mlp(30), spec(16, 64), "he_normal"),
    "tanh MLP": lambda: measured(plain_mlp(10, jnp.tanh), spec(16, 64), "lecun_normal"),
    "relu6, of which half is at its lower limit": lambda: measured(plain_mlp(10, jax.nn.relu6), spec(16, 64), "he"),
    "LayerScale: branches times 1e-5": lambda: measured(residual(6, gain=1e-5), VECTORS, "lecun_normal"),
    "pooling makes noise alike": lambda: measured(pooled(), spec(8, 4096, 4), "he_normal"),
    "data with a mean of its own": lambda: shifted(),
    "pre-LN attention": lambda: measured(attention(8, skips=True), TOKENS, "lecun_normal"),
}


@pytest.mark.parametrize("name", QUIET)
def test_a_network_in_order_raises_no_warning(name: str) -> None:
    propagation = QUIET[name]()
    assert serious(propagation) == []
    _schemes_exist(verdicts(propagation))


# --- what must not --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exploding() -> Propagation:
    return measured(residual(50), VECTORS, "he_normal")


def test_he_without_normalization_explodes_and_the_advice_helps(exploding: Propagation) -> None:
    for direction in ("forward", "backward"):
        found = the(exploding, "growth", direction)
        assert found.severity == "warning" and found.factor == pytest.approx(3, rel=0.15)  # 1 + 2: relu(x a) b doubles
        assert "50 blocks" not in found.text and "49 blocks" in found.text
        ends = (1, 50) if direction == "forward" else (50, 1)
        assert f"at sum {ends[0]} to " in found.text and f"at sum {ends[1]}," in found.text
        assert [exploding.rows[k].name for k in found.rows] == [f"sum {k}" for k in range(ends[0], ends[1] + (
            1 if direction == "forward" else -1), 1 if direction == "forward" else -1)]  # fmt: skip
        assert 'scheme="fixup"' in found.advice and "blocks/0/1" in found.advice and "47 more" in found.advice
    assert serious(measured(residual(50), VECTORS, "fixup")) == []


def test_growth_says_when_it_leaves_the_dtype(exploding: Propagation) -> None:
    text = the(exploding, "growth", "forward").text
    found = re.search(r"leaves the range of float32 (\d+) blocks further on", text)
    assert found is not None
    factor, last = the(exploding, "growth", "forward").factor, exploding.stream[-1].forward.second_moment  # type: ignore
    assert last * factor ** int(found[1]) > (3.4e38 / HEADROOM) ** 2 > last * factor ** (int(found[1]) - 1)


def test_stages_are_named() -> None:
    rows = [_sum(k, 2.0**k, (8, 4 * 2 ** (k // 9))) for k in range(27)]
    text = verdicts(_propagation(rows))[0].text
    assert "within stages by 2.00 from sum 1 to sum 9, 2.00 from sum 10 to sum 18, 2.00 from sum 19 to sum 27" in text
    assert "tenfold by sum 5" in text


def test_small_gains_vanish_and_the_advice_helps() -> None:
    net = plain_mlp(20, jnp.tanh)
    params = jax.tree.map(lambda w: 0.5 * w, fi.init(net, jax.random.key(0), spec(16, 64), scheme="lecun_normal"))
    found = the(fi.analyze(net, params, spec(16, 64)), "vanishing", "forward")
    assert found.severity == "warning" and found.factor == pytest.approx(0.25, rel=0.2)
    assert 'scheme="he_normal"' in found.advice
    assert serious(measured(net, spec(16, 64), "he_normal")) == []


def test_a_skip_below_one_vanishes() -> None:
    found = the(measured(residual(20, skip=0.5), VECTORS, "fixup"), "vanishing", "forward")
    assert found.factor == pytest.approx(0.25) and "constant that multiplies" in found.advice


def test_growth_of_zero_branches_is_sought_on_the_skips() -> None:
    found = the(measured(residual(20, skip=2.0), VECTORS, "fixup"), "growth", "forward")
    assert found.factor == pytest.approx(4) and "The branches are zero" in found.advice


def _biased(bias: float) -> Propagation:
    def net(w: Any, x: Any) -> Any:
        x = x @ w["stem"]
        for a, c, b in w["blocks"]:
            x = x + jax.nn.relu(x @ a + c) @ b
        return x @ w["head"]

    square = spec(WIDTH, WIDTH)
    net_ = fi.Function(
        net, {"stem": square, "blocks": [(square, spec(WIDTH), square)] * 4, "head": spec(WIDTH, 10)}
    )  # fmt: skip
    params = fi.init(net_, jax.random.key(0), VECTORS, scheme="lecun_normal")
    a, c, b = params["blocks"][1]
    params["blocks"][1] = (a, c + bias, b)
    return fi.analyze(net_, params, VECTORS)


def test_negative_biases_kill_relu() -> None:
    dead = _biased(-50.0)
    found = the(dead, "dead")
    assert found.severity == "error" and found.factor == 1
    assert "relu behind blocks/1/0, block 1, is dead" in found.text and "1 of 4 nonlinearities" in found.text
    assert [dead.rows[k].kind for k in found.rows] == ["nonlinearity"]
    assert verdicts(dead)[0] is not None and verdicts(dead)[0].severity == "error"
    assert "no zero branch" in the(dead, "zero_gradient").text  # not taken for a branch that is meant to be zero
    nearly = the(_biased(-2.5), "dead")
    assert nearly.severity == "warning" and 0.95 <= (nearly.factor or 0) < 1
    assert serious(_biased(0.0)) == []


def _online_softmax(start: float) -> fi.Function:
    """Attention over chunks of keys: exp(old - new) rescales what was summed, and is zero in the first pass."""

    def net(w: Any, x: Any) -> Any:
        q = x @ w["q"]
        chunks = [jnp.moveaxis((x @ w[n]).reshape(4, 4, 4, WIDTH), 1, 0) for n in "kv"]

        def step(state: Any, chunk: Any) -> Any:
            total, weight, largest = state
            k, v = chunk
            scores = jnp.einsum("bqd,bkd->bqk", q, k) / math.sqrt(WIDTH)
            new = jnp.maximum(largest, scores.max(-1, keepdims=True))
            shares, kept = jnp.exp(scores - new), jnp.exp(largest - new)
            return (total * kept + shares @ v, weight * kept + shares.sum(-1, keepdims=True), new), None

        zero = jnp.zeros((4, 16, 1))
        (total, weight, _), _ = jax.lax.scan(step, (jnp.zeros_like(q), zero, jnp.full_like(zero, start)), chunks)
        return x @ w["head"] + (total / weight) @ w["o"]

    square = spec(WIDTH, WIDTH)
    return fi.Function(net, {**dict.fromkeys("qkvo", square), "head": square})


@pytest.mark.parametrize("start", [-1e9, -math.inf])
def test_what_is_off_in_one_pass_of_a_scan_is_not_dead(start: float) -> None:
    found = measured(_online_softmax(start), TOKENS, "lecun_normal")
    off = [r.repeat for r in found.select("nonlinearity") if r.name == "exp" and r.forward and r.forward.zeros == 1]
    assert off == [0]
    assert not [v for v in verdicts(found) if v.kind == "dead"]


def test_a_dead_layer_in_a_scan_over_layers_is_dead() -> None:
    def net(w: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, k: (x + jax.nn.relu(x @ k[0] + k[1]) @ k[2], None), x, w["blocks"])[0] @ w["head"]

    blocks = (spec(4, WIDTH, WIDTH), spec(4, WIDTH), spec(4, WIDTH, WIDTH))
    model = fi.Function(net, {"blocks": blocks, "head": spec(WIDTH, 10)})
    params = fi.init(model, jax.random.key(0), VECTORS, scheme="lecun_normal")
    a, c, b = params["blocks"]
    params["blocks"] = (a, c.at[1].add(-50.0), b)
    found = the(fi.analyze(model, params, VECTORS), "dead")
    assert "relu, pass 2 behind" in found.text and "1 of 4 nonlinearities" in found.text


def test_what_no_layer_leads_to_is_not_dead() -> None:
    """A part of the data that is off, and what depends on constants alone, in a scan over time."""

    def net(w: Any, x: Any) -> Any:
        y = x @ w["a"] + jax.nn.relu(-jnp.abs(x))

        def step(state: Any, row: Any) -> Any:
            clock, h = state
            return (clock - 1, h + row + row * jax.nn.relu(clock)), None

        start = (-jnp.ones((4, WIDTH)), jnp.zeros((4, WIDTH)))
        return jax.lax.scan(step, start, jnp.moveaxis(y, 1, 0))[0][1] @ w["b"]

    found = measured(fi.Function(net, {"a": spec(WIDTH, WIDTH), "b": spec(WIDTH, 10)}), TOKENS, "lecun_normal")
    off = [r for r in found.select("nonlinearity") if r.forward and r.forward.zeros == 1]
    assert len(off) > 1
    assert not [v for v in verdicts(found) if v.kind == "dead"]


def test_an_indicator_of_indices_is_no_nonlinearity() -> None:
    """Expert choice routing gathers tokens by one_hot(top_k): 1 of as many entries as there are tokens is not zero."""

    def net(w: Any, x: Any) -> Any:
        shares, chosen = jax.lax.top_k(jax.nn.softmax(x @ w["router"], -1).T, 8)
        picks = jax.nn.one_hot(chosen, x.shape[0])
        y = jnp.einsum("ecn,nd->ecd", picks, x)
        y = jax.nn.relu(jnp.einsum("ecd,edf->ecf", y, w["up"]))
        return jnp.einsum("ecn,ec,ecf->nf", picks, shares, y) @ w["head"]

    shapes = {"router": spec(WIDTH, 4), "up": spec(4, WIDTH, 64), "head": spec(64, 10)}
    found = measured(fi.Function(net, shapes), spec(64, WIDTH), "he_normal")
    assert [r.name for r in found.select("nonlinearity")] == ["relu"]
    assert not [v for v in verdicts(found) if v.kind == "dead"]


def test_attention_without_skips_collapses() -> None:
    found = the(measured(attention(12, skips=False), TOKENS, "lecun_normal"), "rank_collapse")
    assert found.severity == "warning" and (found.factor or 0) > 4
    assert "falls from" in found.text and "layers/11/3" in found.text


def test_examples_become_alike() -> None:
    found = the(measured(plain_mlp(120), spec(16, 64), "he_normal"), "rank_collapse")
    assert "Examples become alike" in found.text


def test_the_mean_shifts() -> None:
    def net(w: Any, x: Any) -> Any:
        for a in w["layers"]:
            x = x + jax.nn.relu(0.1 * (x @ a) + 1.0)
        return x @ w["head"]

    model = fi.Function(net, {"layers": [spec(WIDTH, WIDTH)] * 20, "head": spec(WIDTH, 10)})
    found = the(measured(model, VECTORS, "lecun_normal"), "mean_shift")
    assert 0.95 < (found.factor or 0) < 1 and "at the input" in found.text


def test_large_weights_saturate_tanh_and_the_advice_helps() -> None:
    net = plain_mlp(6, jnp.tanh)
    params = jax.tree.map(lambda w: 10 * w, fi.init(net, jax.random.key(0), spec(16, 64), scheme="lecun_normal"))
    found = the(fi.analyze(net, params, spec(16, 64)), "saturation")
    assert found.severity == "warning" and "5 of 5 bounded nonlinearities" in found.text
    assert "The first is tanh behind 0, block 0." in found.text
    assert serious(measured(net, spec(16, 64), re.findall(r'scheme="(\w+)"', found.advice)[0])) == []


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_first_tap_that_overflows_is_named(dtype: Any) -> None:
    x = spec(16, WIDTH, dtype=dtype)
    model = residual(40, dtype, gain=1.0 if dtype == jnp.float16 else 300.0)
    found = the(measured(model, x, "he_normal"), "overflow", "forward")
    propagation = measured(model, x, "he_normal")
    first = next(k for k, r in enumerate(propagation.rows) if r.forward and r.forward.finite < 1)
    row = propagation.rows[first]
    assert found.severity == "error" and found.rows[0] == first
    assert f"overflows {row.dtype} first at {row.name}" in found.text and f", block {row.block}: " in found.text
    assert row.dtype == jnp.dtype(dtype).name
    assert "undefined operation" not in found.text
    assert ("bfloat16 has the range of float32" in found.advice) == (dtype == jnp.float16)
    assert the(propagation, "growth", "forward").severity == "warning"  # up to there
    assert serious(measured(model, x, "fixup")) == []


def test_an_undefined_operation_is_told_from_growth() -> None:
    def net(w: Any, x: Any) -> Any:
        return jnp.log(x @ w["a"]) @ w["b"]

    found = the(
        measured(fi.Function(net, {"a": spec(WIDTH, 64), "b": spec(64, 10)}), VECTORS, "he"), "overflow", "forward"
    )
    assert "undefined operation" in found.text and "first at log" in found.text


def test_values_near_the_limit() -> None:
    found = the(_propagation([_sum(0, 9000.0**2, dtype="float16")]), "near_overflow")
    assert found.severity == "warning" and found.factor == pytest.approx(65504 / 9000)
    assert "bfloat16" in found.advice
    for quiet in (_sum(0, 4000.0**2, dtype="float16"), _sum(0, 9000.0**2), _sum(0, 9000.0**2, dtype="bfloat16")):
        assert verdicts(_propagation([quiet])) == ()
    assert the(_propagation([_sum(0, 1e80)]), "overflow").severity == "error"  # a prediction beyond float32


def test_few_values_that_are_not_finite_are_not_none() -> None:
    rows = [_sum(0, 1.0), dataclasses.replace(_sum(1, 1.0), forward=Statistics(math.nan, math.nan, math.nan, 0.9999))]
    assert ": less than 1% of its values are not finite" in the(_propagation(rows), "overflow").text


# --- gradients of weights -------------------------------------------------------------------------------------------


def test_zero_gradients_of_fixup_are_expected_until_step_2() -> None:
    propagation = measured(residual(5), VECTORS, "fixup")
    assert serious(propagation) == []
    head, inside = [v for v in verdicts(propagation) if v.kind == "zero_gradient"]
    assert "(head) is zero" in head.text and "the head moves at step 0" in head.text
    assert {propagation.rows[k].name for k in head.rows} == {"stem", *(f"blocks/{k}/1" for k in range(5))}
    assert "zero gradient is expected until step 2" in inside.text
    assert {propagation.rows[k].name for k in inside.rows} == {f"blocks/{k}/0" for k in range(5)}


def test_a_prediction_knows_zero_gradients_by_cotangents() -> None:
    propagation = measured(residual(5), VECTORS, "fixup")
    without = dataclasses.replace(
        propagation, rows=tuple(dataclasses.replace(r, weight=None) for r in propagation.rows), kind="predicted"
    )
    found = [[(v.severity, v.rows) for v in verdicts(p) if v.kind == "zero_gradient"] for p in (propagation, without)]
    assert found[0] == found[1] and "predicted from the input of the head" in verdicts(without)[0].text


def test_seen_from_the_output_all_gradients_of_fixup_are_zero() -> None:
    propagation = measured(residual(5), VECTORS, "fixup", probe="output")
    assert serious(propagation) == []
    (found,) = [v for v in verdicts(propagation) if v.kind == "zero_gradient"]
    assert "11 layers of 12" in found.text and "until step 2" in found.text and len(found.rows) == 11


def test_without_a_zero_head_all_is_a_step_earlier() -> None:
    propagation = measured(residual(5), VECTORS, fi.Fixup(head=None))
    (only,) = [v for v in verdicts(propagation) if v.kind == "zero_gradient"]
    assert "zero gradient is expected until step 1" in only.text and only.severity == "note"


def test_the_steps_are_those_of_training() -> None:
    """What the words say, against three updates of SGD."""
    model = residual(3)
    plan = fi.plan(model, VECTORS)
    params = fi.init(model, jax.random.key(0), VECTORS)
    x = jax.random.normal(jax.random.key(1), VECTORS.shape)
    labels = jax.random.randint(jax.random.key(2), (16,), 0, 10)

    def loss(p: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(model.apply(p, x)), labels[:, None], 1).mean()

    moves = []
    for _ in range(3):
        gradient = jax.grad(loss)(params)
        moves.append([bool(jnp.any(g)) for g in (gradient["head"], gradient["stem"], *gradient["blocks"][1][::-1])])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    assert moves == [[True, False, False, False], [True, True, True, False], [True, True, True, True]]
    assert plan["blocks/1/1"].value == 0


def test_a_zero_multiplier_is_expected_too() -> None:
    def net(w: Any, x: Any) -> Any:
        x = x @ w["stem"]
        for a, b, scale in w["blocks"]:
            x = x + scale * (jax.nn.relu(x @ a) @ b)
        return x @ w["head"]

    square = spec(WIDTH, WIDTH)
    model = fi.Function(net, {"stem": square, "blocks": [(square, square, spec())] * 4, "head": spec(WIDTH, 10)})
    params = fi.init(model, jax.random.key(0), VECTORS, scheme="he")
    params["blocks"] = [(a, b, 0 * scale) for a, b, scale in params["blocks"]]
    propagation = fi.analyze(model, params, VECTORS)
    found = the(propagation, "zero_gradient")
    assert found.severity == "note" and len(found.rows) == 8 and "until step 1" in found.text
    assert serious(propagation) == []


def test_a_stopped_gradient_is_no_expected_zero() -> None:
    def net(w: Any, x: Any) -> Any:
        return jax.lax.stop_gradient(jax.nn.relu(x @ w["a"])) @ w["b"]

    propagation = measured(fi.Function(net, {"a": spec(WIDTH, 64), "b": spec(64, 10)}), VECTORS, "he")
    found = the(propagation, "zero_gradient")
    assert found.severity == "warning" and ": a. Such a layer does not learn" in found.text


def test_a_dead_stem_is_a_zero_signal() -> None:
    model = residual(3)
    params = fi.init(model, jax.random.key(0), VECTORS, scheme="he")
    params["stem"] = 0 * params["stem"]
    found = the(fi.analyze(model, params, VECTORS), "zero_signal", "forward")
    assert found.severity == "error" and "from sum 1, block 1, on to the output: 3 of 3" in found.text


def two_heads(w: Any, x: Any) -> Any:
    """Policy and value, the second with a layer of its own that the trace meets behind the first head."""
    x = x @ w["stem"]
    for a, b in w["blocks"]:
        x = x + jax.nn.relu(x @ a) @ b
    return jax.nn.relu(x @ w["p1"]) @ w["policy"], jax.nn.relu(jax.nn.relu(x @ w["v1"]) @ w["v2"]) @ w["value"]


TWO_HEADS = fi.Function(
    two_heads,
    {
        **dict.fromkeys(("stem", "p1", "v1", "v2"), spec(WIDTH, WIDTH)), "blocks": [(spec(WIDTH, WIDTH),) * 2] * 2,
        "policy": spec(WIDTH, 10), "value": spec(WIDTH, 1),
    },
)  # fmt: skip


def test_all_zero_heads_are_named_and_the_rest_is_said_of_what_they_hide() -> None:
    found = measured(TWO_HEADS, VECTORS, "fixup")
    assert found.probe == "input of the head"
    head = the(found, "zero_gradient")
    assert "The heads (policy, value) are zero" in head.text
    assert "for every layer that reaches the output only through it" in head.text
    assert {found.rows[k].name for k in head.rows} == {"stem", "blocks/0/1", "blocks/1/1", "p1", "v1", "v2"}
    assert serious(found) == []


def test_heads_of_a_network_without_sums_are_all_named() -> None:
    def net(w: Any, x: Any) -> Any:
        x = jax.nn.relu(x @ w["a"])
        return x @ w["policy"], x @ w["value"]

    model = fi.Function(net, {"a": spec(WIDTH, 64), "policy": spec(64, 10), "value": spec(64, 8)})
    params = fi.init(model, jax.random.key(0), VECTORS, scheme="he")
    params |= {n: 0 * params[n] for n in ("policy", "value")}
    text = the(fi.analyze(model, params, VECTORS, probe="output"), "zero_gradient").text
    assert "The heads (policy, value) are zero, so that 1 layer of 3 has a gradient" in text


def test_a_zero_head_beside_others_that_leaves_gradients_to_all_says_nothing() -> None:
    def net(w: Any, x: Any) -> Any:
        y = jax.nn.relu(x @ w["a"])
        return y @ w["linear"] + jnp.sin(y) @ w["spline"]

    model = fi.Function(net, {"a": spec(WIDTH, 64), "linear": spec(64, 10), "spline": spec(64, 10)})
    params = fi.init(model, jax.random.key(0), VECTORS, scheme="he")
    params["spline"] = 0 * params["spline"]
    assert not [v for v in verdicts(fi.analyze(model, params, VECTORS)) if v.kind == "zero_gradient"]


def test_one_layer_of_another_scale() -> None:
    net = plain_mlp(6)
    params = fi.init(net, jax.random.key(0), spec(16, 64), scheme="he")
    params[2] = 1e-3 * params[2]
    params[3] = 1e3 * params[3]
    found = the(fi.analyze(net, params, spec(16, 64)), "gradient_scale")
    assert found.severity == "warning" and "2 of 6 layers" in found.text


# --- layers beside others, and sums that alternate ------------------------------------------------------------------


def recommender(features: int) -> fi.Function:
    """Five embedding tables beside a tower, and a head behind the products of all of them (DLRM)."""

    def net(w: Any, x: Any, ids: Any) -> Any:
        for k in w["bottom"]:
            x = jax.nn.relu(x @ k)
        every = jnp.stack([x, *(table[ids[:, j]] for j, table in enumerate(w["tables"]))], 1)
        x = jnp.concatenate([x, jnp.einsum("bid,bjd->bij", every, every).reshape(x.shape[0], -1)], -1)
        for k in w["top"]:
            x = jax.nn.relu(x @ k)
        return x @ w["head"]

    tables, top = [spec(50, WIDTH)] * 5, [spec(WIDTH + 36, WIDTH), spec(WIDTH, WIDTH)]
    return fi.Function(
        net, {"bottom": [spec(8, WIDTH)], "tables": tables, "top": top, "head": spec(WIDTH, features)}
    )  # fmt: skip


def _recommended(features: int) -> Propagation:
    model, inputs = recommender(features), (spec(16, 8), spec(16, 5, dtype=jnp.int32))
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [math.sqrt(2 / s.shape[0]) * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, drawn)
    params["tables"] = [0.01 * t for t in params["tables"]]
    return fi.analyze(model, params, *inputs)


def test_layers_beside_others_are_no_depth() -> None:
    found = _recommended(8)
    assert [r.name for r in found.stream] == ["bottom/0", "top/0", "top/1", "head"]
    assert found.drift().blocks == 3
    assert not [v for v in verdicts(found) if v.kind in ("growth", "vanishing")]


def test_a_prediction_is_shown_along_the_measured_stream() -> None:
    model, x = attention(2, skips=False), TOKENS
    (pair,) = pairs(measured(model, x, "lecun_normal"), fi.predict(model, x, scheme="lecun_normal"))
    assert pair.predicted is not None
    assert [r.name for r in pair.predicted.stream] == [r.name for r in pair.own.stream]


def test_the_most_direct_of_parallel_layers_is_in_series() -> None:
    found = measured(attention(2, skips=False), TOKENS, "lecun_normal")
    assert [r.name for r in found.stream] == ["layers/0/2", "layers/0/3", "layers/1/2", "layers/1/3", "head"]


def test_passes_that_no_carry_joins_are_beside_each_other() -> None:
    def net(w: Any, x: Any, carried: bool) -> Any:
        x = jnp.moveaxis(x, 1, 0)
        if carried:
            return jax.lax.scan(lambda h, row: (jnp.tanh(h @ w["h"] + row @ w["x"]), None), x[0], x)[0] @ w["head"]
        return jax.lax.map(lambda row: row @ w["x"], x) @ w["head"]

    square = spec(WIDTH, WIDTH)
    weights = {"x": square, "head": square}
    beside = measured(fi.Function(lambda w, x: net(w, x, False), weights), TOKENS, "he")
    joined = measured(fi.Function(lambda w, x: net(w, x, True), {**weights, "h": square}), TOKENS, "he")
    assert [(r.name, r.repeat) for r in beside.stream] == [("x", 0), ("head", None)]
    assert [(r.name, r.repeat) for r in joined.stream] == [*(("h", k) for k in range(16)), ("head", None)]


def test_one_feature_tells_neither_angles_nor_means() -> None:
    kinds = [v.kind for v in verdicts(_recommended(1))]
    assert "rank_collapse" not in kinds and "mean_shift" not in kinds


def test_what_was_written_before_rows_had_places_is_read() -> None:
    found = _recommended(8)
    data = found.to_dict()
    for row in data["rows"]:
        del row["place"]
    old = Propagation.from_dict(data)
    assert len(old.stream) == 9 and {r.place for r in old.rows} == {None}
    assert Propagation.from_dict(found.to_dict()) == found


def _shaped(*shapes: int, moments: Callable[[int], float]) -> Propagation:
    return _propagation([_sum(k, moments(n), (8, n, 16)) for k, n in enumerate(shapes)])


def test_sums_of_shapes_that_alternate_are_read_apart() -> None:
    """Mixture of depths: a block on the tokens that a router chose, whose end is added to all of them."""
    still = _shaped(8, 16, 8, 16, 8, 16, moments=lambda n: 1.0 if n == 8 else 0.02)
    assert verdicts(still) == () and still.drift().verdict == "flat" and still.drift().blocks == 2
    assert [[r.name for r in part] for part in still.streams] == [
        ["sum 1", "sum 3", "sum 5"],
        ["sum 2", "sum 4", "sum 6"],
    ]
    rows = [_sum(k, 10.0**k, (8, 16 if k % 2 else 8, 16)) for k in range(6)]
    found = [v for v in verdicts(_propagation(rows)) if v.kind == "growth"]
    assert [v.rows for v in found] == [(0, 2, 4), (1, 3, 5)] and {v.factor for v in found} == {100.0}


@pytest.mark.parametrize("shapes", [(32, 32, 16, 16, 8, 8), (32, 16, 8, 16, 32), (8, 16, 8)])
def test_stages_and_a_u_net_are_one_stream(shapes: tuple[int, ...]) -> None:
    found = _shaped(*shapes, moments=lambda n: 1.0)
    assert found.streams == (found.stream,)


# --- theory, axes, and the data alone -------------------------------------------------------------------------------


def _sum(k: int, moment: float, shape: tuple[int, ...] = (8, 16), dtype: str = "float32", **more: Any) -> Row:
    return Row("sum", f"sum {k + 1}", "", k + 1, shape, dtype, None, Statistics(0.0, moment, 0.0, **more))


def _propagation(rows: list[Row], **more: Any) -> Propagation:
    return Propagation("test", "net", len(rows), tuple(rows), **more)


def test_measured_far_from_predicted() -> None:
    theory = _propagation([_sum(k, 1.0) for k in range(6)], kind="predicted")
    found = verdicts(_propagation([_sum(k, 1.0 if k < 3 else 2.0 * k) for k in range(6)]), theory)
    assert [v.kind for v in found] == ["prediction"]
    assert "at sum 4, block 4: 6 measured, 1 predicted" in found[0].text and found[0].rows == (3, 4, 5)
    assert (
        found[0].severity == "warning"
        and found[0].factor == 10
        and "most sum 6, block 6, by a factor of 10" in found[0].text
    )
    assert verdicts(_propagation([_sum(k, 1.3) for k in range(6)]), theory) == ()
    deep = [_propagation([_sum(k, growth**k) for k in range(50)]) for growth in (3.0, 3.1)]
    assert [v.severity for v in verdicts(deep[1], deep[0]) if v.kind == "prediction"] == ["note"]  # 3 % a block
    note = verdicts(_propagation([_sum(k, 0.4) for k in range(6)]), theory)[0]
    assert note.severity == "note" and "by a factor of 1/2.5" in note.text
    zero = verdicts(_propagation([*(_sum(k, 1.0) for k in range(5)), _sum(5, 0.0)]), theory)
    assert "one of the two being zero" in next(v for v in zero if v.kind == "prediction").text
    unknown = dataclasses.replace(theory, rows=tuple(dataclasses.replace(r, forward=None) for r in theory.rows))
    assert verdicts(_propagation([_sum(k, 9.0) for k in range(6)]), unknown) == ()


def narrow(width: int, depth: int) -> fi.Function:
    def apply(params: Any, x: Any) -> Any:
        for w in params:
            x = jax.nn.relu(x @ w)
        return x

    return fi.Function(apply, [spec(width, width)] * depth)


def test_a_narrow_network_strays_from_its_prediction() -> None:
    """Its second moments are off by more than 1.5 times for most seeds, as they must be; a wrong scheme is told."""
    net, x = narrow(16, 8), spec(8, 16)
    theory = fi.predict(net, x, scheme="he")
    apart = 0
    for seed in range(20):
        found = fi.analyze(net, fi.init(net, jax.random.key(seed), x, scheme="he"), x, key=jax.random.key(99 + seed))
        assert not [v for v in verdicts(found, theory) if v.kind == "prediction"]
        last = found.rows[-1].forward, theory.rows[-1].forward
        assert last[0] is not None and last[1] is not None
        apart += abs(math.log(last[0].second_moment / last[1].second_moment)) > math.log(1.5)
    assert apart >= 10
    for scheme in ("lecun", "he"):
        net = narrow(64, 16)
        params = fi.init(net, jax.random.key(0), spec(8, 64), scheme=scheme)
        params = params if scheme == "lecun" else [1.5 * w for w in params]
        found = [v for v in verdicts(fi.analyze(net, params, spec(8, 64)), fi.predict(net, spec(8, 64), scheme="he"))
                 if v.kind == "prediction"]  # fmt: skip
        assert [v.direction for v in found] == ["forward", "backward"]
        assert all(v.severity == "warning" and "widths of the layers on the way explain" in v.text for v in found)


def test_a_prediction_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one for one"):
        verdicts(_propagation([_sum(0, 1.0)]), _propagation([_sum(0, 1.0), _sum(1, 1.0)]))


@pytest.mark.parametrize(
    "axis, words",
    [("channel", "layer norm or group norm"), ("position", "instance norm"), ("example", "no normalization")],
)
def test_the_wide_axis(axis: str, words: str) -> None:
    shares = {f"{a}_share": 0.8 if a == axis else 0.05 for a in ("example", "channel", "position")}
    (found,) = verdicts(_propagation([_sum(k, 1.0, **shares) for k in range(3)]))
    assert (found.kind, found.severity) == ("wide_axis", "note") and found.factor == 0.8
    assert words in found.text and f"80% across {axis}s" in found.text and "the 3 residual sums" in found.text
    even = dict.fromkeys(shares, 0.3)
    assert verdicts(_propagation([_sum(k, 1.0, **even) for k in range(3)])) == ()


def test_what_enters_a_normalization_tells_the_axis() -> None:
    wide, narrow = {"channel_share": 0.9, "example_share": 0.0, "position_share": 0.0}, dict.fromkeys(
        ("channel_share", "example_share", "position_share"), 0.0
    )  # fmt: skip
    rows = [
        dataclasses.replace(_sum(0, 1.0, **wide), kind="weight", name="conv"),
        dataclasses.replace(_sum(0, 1.0, **narrow), kind="norm", name="scale"),
        _sum(1, 1.0, **narrow),
    ]
    (found,) = verdicts(_propagation(rows))
    assert "what enters the 1 normalization" in found.text and found.rows == (0,)


def test_unknown_figures_raise_nothing() -> None:
    rows = [
        Row("input", "x", "", 0, (8, 4), "float32", None, Statistics(0.0, 1.0, 0.0)),
        Row("weight", "w", "", 0, (8, 16), "float32", None, None),
        Row("nonlinearity", "relu", "", 0, (8, 16), "float32", None, None),
        Row("weight", "v", "", 0, (8, 16), "float32", None, None, weight=Weight(math.nan, math.nan)),
        Row("branch", "branch 1", "", 0, (8, 16), "float32", None, None),
        Row("sum", "sum 1", "", 1, (8, 16), "float32", None, None),
    ]
    assert verdicts(_propagation(rows)) == ()
    assert verdicts(_propagation([])) == ()


def test_no_rule_reads_names(exploding: Propagation) -> None:
    renamed = dataclasses.replace(
        exploding, rows=tuple(dataclasses.replace(r, name=f"n{k}") for k, r in enumerate(exploding.rows))
    )
    for a, b in zip(verdicts(exploding), verdicts(renamed), strict=True):
        assert dataclasses.replace(a, text="", advice="") == dataclasses.replace(b, text="", advice="")


def test_the_worst_comes_first_and_all_is_data(exploding: Propagation) -> None:
    order = [v.severity for v in verdicts(_biased(-50.0))]
    assert order == sorted(order, key=["error", "warning", "note"].index) and len(set(order)) > 1
    assert all(0 <= k < len(exploding) for v in verdicts(exploding) for k in v.rows)
    assert plain(verdicts(exploding)[0])["kind"] == "growth"


def test_rows_after_json_say_the_same(exploding: Propagation) -> None:
    assert verdicts(Propagation.from_dict(exploding.to_dict())) == verdicts(exploding)


def test_a_verdict_in_print_is_a_sentence() -> None:
    rows = [Row("sum", f"sum {k}", "", k, (8, 16), "float32", None, Statistics(0.0, 4.0**k, 0.0)) for k in range(20)]
    (one, *_) = verdicts(Propagation("he", "net", 20, tuple(rows)))
    assert str(one).startswith(f"{one.severity}: {one.text}") and str(one).endswith(one.advice)
    assert len(one.rows) > 10 and "rows=" not in repr(one)
