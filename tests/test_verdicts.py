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


def test_one_layer_of_another_scale() -> None:
    net = plain_mlp(6)
    params = fi.init(net, jax.random.key(0), spec(16, 64), scheme="he")
    params[2] = 1e-3 * params[2]
    params[3] = 1e3 * params[3]
    found = the(fi.analyze(net, params, spec(16, 64)), "gradient_scale")
    assert found.severity == "warning" and "2 of 6 layers" in found.text


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
