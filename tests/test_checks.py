"""Checks on a user's own model: stability as a test, and the size of an update over depth."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from zoo import Stacked

import fixup_init as fi
from fixup_init import checks
from fixup_init.checks import Size, UpdateSize, assert_stable, update_size
from fixup_init.plan import Plan, drawn
from fixup_init.report.figure import save

WIDTH = 16
VECTORS = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32)


def spec(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def build(depth: int, dtype: Any = jnp.float32) -> fi.Function:
    """A residual network of `depth` layers, two in each branch."""

    def net(w: Any, x: Any) -> Any:
        x = x @ w["stem"]
        for a, b in w["blocks"]:
            x = x + jax.nn.relu(x @ a) @ b
        return x @ w["head"]

    square = jax.ShapeDtypeStruct((WIDTH, WIDTH), dtype)
    head = jax.ShapeDtypeStruct((WIDTH, 10), dtype)
    return fi.Function(net, {"stem": square, "blocks": [(square, square)] * (depth // 2), "head": head})


# --- assert_stable --------------------------------------------------------------------------------------------------


def test_a_stable_model_passes_and_is_returned() -> None:
    found = assert_stable(build(100), VECTORS, scheme="fixup", max_growth=2)
    assert isinstance(found, fi.Propagation) and found.num_branches == 50


def test_an_unstable_model_fails_and_the_message_names_layers() -> None:
    with pytest.raises(checks.UnstableError) as caught:
        assert_stable(build(40), VECTORS, scheme="he_normal", max_growth=10)
    message, found = str(caught.value), caught.value
    assert isinstance(found, AssertionError) and found.propagation.num_branches == 20
    assert {v.kind for v in found.verdicts} >= {"growth"}
    head, forward, backward, help_, advice = message.splitlines()
    assert head == "net is not stable with scheme='he_normal':"
    moments = [r.forward.second_moment for r in found.propagation.stream if r.forward]
    first = next(k for k, m in enumerate(moments) if m > 10 * moments[0])
    assert f"by a factor of {max(moments) / moments[0]:.3g}" in forward and "the limit is 10." in forward
    assert f"first at sum {first + 1} (blocks/{first}/0, blocks/{first}/1)" in forward
    assert "at sum 20 (blocks/19/0, blocks/19/1)" in forward
    # A cotangent at sum k has just passed the layers behind it.
    assert "to" in backward and "at sum 1 (blocks/1/0, blocks/1/1)" in backward
    assert help_ == "What helps:" and 'scheme="fixup"' in advice


def test_the_limit_decides() -> None:
    assert_stable(build(8), VECTORS, scheme="he_normal", max_growth=200)
    with pytest.raises(checks.UnstableError, match=r"the limit is 5\b"):
        assert_stable(build(8), VECTORS, scheme="he_normal", max_growth=5)


def test_a_vanishing_signal_fails() -> None:
    def net(w: Any, x: Any) -> Any:
        for k in w:
            x = jnp.tanh(x @ k)
        return x

    params = [0.3 * jnp.eye(WIDTH)] * 10
    with pytest.raises(checks.UnstableError, match="shrinks by a factor") as caught:
        assert_stable(fi.Function(net, params), VECTORS, variables=params)
    assert "with the given variables" in str(caught.value)


def test_errors_fail_whatever_the_limit() -> None:
    def net(w: Any, x: Any) -> Any:
        for k in w:
            x = (1e12 * x) @ k
        return x

    params = [jnp.eye(WIDTH)] * 4
    with pytest.raises(checks.UnstableError, match="overflows float32 first at 3") as caught:
        assert_stable(fi.Function(net, params), VECTORS, max_growth=math.inf)
    assert "- forward: the signal's" not in str(caught.value)


def _one_direction(w: Any, x: Any) -> Any:
    for k in w["layers"]:
        x = x @ k
    return x @ w["head"]


def test_strict_fails_on_warnings() -> None:
    line = jnp.zeros((WIDTH, WIDTH)).at[0].set(1.0) + 1e-3 * jnp.eye(WIDTH)
    params = {"layers": [line / 2] * 3, "head": jnp.eye(WIDTH)}
    model = fi.Function(_one_direction, params)
    assert_stable(model, VECTORS, max_growth=1e9)
    with pytest.raises(checks.UnstableError, match="- rank_collapse: "):
        assert_stable(model, VECTORS, max_growth=1e9, strict=True)


def test_sums_of_shapes_that_alternate_are_measured_apart() -> None:
    """A block on half of the tokens, whose end is added to all of them: the two sums differ by design."""

    def net(w: Any, x: Any) -> Any:
        for a, b in w["blocks"]:
            part = 10 * x[:, :4]
            part = part + jax.nn.relu(part @ a) @ b
            x = x + jnp.pad(0.01 * part, ((0, 0), (0, 4), (0, 0)))
        return x @ w["head"]

    model = fi.Function(net, {"blocks": [(spec(WIDTH, WIDTH),) * 2] * 3, "head": spec(WIDTH, 10)})
    found = assert_stable(model, spec(8, 8, WIDTH), scheme="lecun_normal", max_growth=10)
    assert [r.shape[1] for r in found.stream] == [4, 8] * 3


def test_after_updates() -> None:
    def loss(y: Any) -> Any:
        return jnp.square(y - 1).mean()

    assert_stable(build(20), VECTORS, scheme="fixup", steps=2, optimizer=optax.sgd(0.01), loss=loss)
    with pytest.raises(checks.UnstableError, match=r"scheme='fixup', after [12] steps?:"):
        assert_stable(build(20), VECTORS, scheme="fixup", steps=2, optimizer=optax.sgd(1e6), loss=loss)


def test_an_nnx_module_is_left_as_it_is() -> None:
    module = Stacked(False, nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(module))
    assert_stable(module, spec(8, 16), scheme="fixup")
    assert_stable(module, spec(8, 16))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(module))


def test_normalization_removed() -> None:
    def net(w: Any, x: Any) -> Any:
        for a, b in w:
            y = jax.nn.relu(x @ a) @ b
            x = x + (y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-5)
        return x

    model = fi.Function(net, [(spec(WIDTH, WIDTH),) * 2] * 12)
    assert_stable(model, VECTORS, scheme="he_normal")
    with pytest.raises(checks.UnstableError, match="grows"):
        assert_stable(model, VECTORS, scheme="he_normal", normalization="removed")


def test_stable_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="expected a factor above 1"):
        assert_stable(build(4), VECTORS, max_growth=0.5)
    with pytest.raises(ValueError, match="an optax optimizer"):
        assert_stable(build(4), VECTORS, steps=2)
    with pytest.raises(ValueError, match="both given"):
        assert_stable(build(4), VECTORS, scheme="fixup", variables={})


# --- update size ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes() -> UpdateSize:
    return update_size(build, VECTORS, depths=(10, 100, 1000), seeds=2)


def test_fixup_is_flat_over_depth_and_he_is_not(sizes: UpdateSize) -> None:
    """Zhang et al. 2019, Sec. 3: an update of Theta(eta), whatever the depth."""
    assert sizes.ratio("fixup") < 1.5 and sizes.is_flat("fixup")
    assert not sizes.is_flat("he_normal") and math.isinf(sizes.ratio("he_normal"))
    assert math.isinf(sizes.median("he_normal", 1000))
    flat, not_flat = sizes.summary().splitlines()
    assert flat.startswith("fixup: the size of an update is flat") and "overflows from depth" in not_flat


@pytest.mark.slow
def test_fixup_is_flat_to_ten_thousand_layers() -> None:
    sizes = update_size(build, VECTORS, seeds=2)
    assert sizes.depths == (10, 100, 1000, 10000)
    assert sizes.ratio("fixup") < 3 and not sizes.is_flat("he_normal")


class _OnlyZero:
    """Zero branch ends without Fixup's factor: L branches of equal size, so that the update grows with L."""

    name = "zero"

    def plan(self, structure: fi.Structure) -> Plan:
        plan = fi.Fixup().plan(structure)
        by_path = {q.path: q for q in structure.parameters}
        entries = tuple(
            drawn(by_path[e.path], "normal", WIDTH**-0.5, "no factor") if e.std else e for e in plan.entries
        )  # fmt: skip
        return Plan(self.name, plan.num_branches, entries)


def test_without_the_factor_the_update_grows_with_depth() -> None:
    sizes = update_size(build, VECTORS, depths=(10, 100, 1000), schemes=[_OnlyZero()], seeds=1)
    small, middle, large = (sizes.median("zero", depth) for depth in sizes.depths)
    assert large / middle == pytest.approx(10, rel=0.3) and middle / small > 4


@pytest.mark.parametrize("step, head", [(0, "drawn"), (2, "drawn"), (2, "scheme")])
def test_an_update_is_that_of_sgd(step: int, head: Any) -> None:
    """Against jax.grad of the whole network and a loop over steps."""
    model, rate = build(6), 0.05

    def loss(y: Any) -> Any:
        return jnp.square(y - 1).sum(-1).mean()

    (row,) = update_size(
        build, VECTORS, depths=(6,), schemes=("fixup",), seeds=[3], rate=rate, step=step, head=head, loss=loss
    ).rows
    plan = fi.plan(model, VECTORS)
    if head == "drawn":
        plan = plan.override("head", std=WIDTH**-0.5)
    params = fi.init(model, jax.random.key(3), VECTORS, scheme=plan)
    x = jax.random.normal(jax.random.fold_in(jax.random.key(3), 1000), VECTORS.shape)
    for _ in range(step + 1):
        before = model.apply(params, x)
        gradient = jax.grad(lambda p: loss(model.apply(p, x)))(params)
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
    change = np.linalg.norm(np.asarray(model.apply(params, x) - before, np.float64), axis=-1)  # pyright: ignore
    assert row.size == pytest.approx(math.sqrt(np.square(change).mean()) / rate, rel=1e-3)
    assert row == Size(6, "fixup", 3, row.size)


def test_the_size_does_not_depend_on_a_small_rate() -> None:
    found = [update_size(build, VECTORS, depths=(20,), schemes=("fixup",), seeds=1, rate=r) for r in (1e-2, 1e-4)]
    assert found[0].median("fixup", 20) == pytest.approx(found[1].median("fixup", 20), rel=0.05)


def test_rates_of_the_plan_are_kept() -> None:
    """Fixup's biases learn at a tenth of the rate (Sec. 4)."""

    def net(w: Any, x: Any) -> Any:
        return (x + jax.nn.relu(x @ w["a"] + w["c"]) @ w["b"] + w["d"]) @ jnp.eye(WIDTH)

    model = fi.Function(
        net, {"a": spec(WIDTH, WIDTH), "b": spec(WIDTH, WIDTH), "c": spec(WIDTH), "d": spec(WIDTH)}
    )  # fmt: skip
    fast, slow = (
        update_size(lambda _: model, VECTORS, depths=(1,), schemes=[fi.Fixup(scalar_rate=r)], seeds=1).rows[0].size
        for r in (1.0, 0.1)
    )
    assert fast > slow > 0


def test_a_zero_head_alone_moves_only_itself() -> None:
    """Why the head is drawn: with it at zero, networks of every depth and scheme change alike in the first step."""
    sizes = update_size(build, VECTORS, depths=(10, 100), schemes=("fixup", _OnlyZero()), seeds=1, head="scheme")
    assert sizes.median("fixup", 100) == pytest.approx(sizes.median("zero", 100), rel=1)
    assert max(sizes.ratio(s) for s in sizes.schemes) < 1.1


def test_build_may_give_inputs_too() -> None:
    a = update_size(lambda depth: (build(depth), VECTORS), depths=(4,), schemes=("fixup",), seeds=1)
    assert a == update_size(build, VECTORS, depths=(4,), schemes=("fixup",), seeds=1)


def test_schemes_of_one_name_are_told_apart() -> None:
    sizes = update_size(build, VECTORS, depths=(4,), schemes=[fi.Fixup(), fi.Fixup(head=None)], seeds=1)
    assert sizes.schemes == ("fixup", "fixup 2")


def test_table_json_and_figure(sizes: UpdateSize, tmp_path: Any) -> None:
    text = " ".join(str(sizes).split())  # however wide the terminal is
    assert "overflow" in text and "1000" in text and "median of 2 seeds" in text
    assert " ".join(sizes.summary().split()) in text
    data = json.loads(sizes.to_json())
    assert UpdateSize.from_dict(data) == sizes
    with pytest.raises(ValueError, match="version 99"):
        UpdateSize.from_dict(data | {"version": 99})
    figure = sizes.figure()
    (axis,) = figure.axes
    labels = [t.get_text() for t in axis.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels[0].startswith("fixup: within a factor of 1.") and labels[1] == "he_normal: not finite"
    line = axis.get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), [sizes.median("fixup", d) for d in sizes.depths])
    assert save(figure, tmp_path / "sizes.png").stat().st_size > 10_000


def test_words_for_what_is_not_flat() -> None:
    grows = UpdateSize("net", 1e-3, tuple(Size(d, "s", 0, float(d)) for d in (10, 100)))
    assert grows.summary() == (
        "s: the size of an update is not flat: 10 to 100 over depths 10 to 100, a factor of 10."
    )  # fmt: skip
    still = UpdateSize("net", 1e-3, (Size(10, "s", 0, 0.0),))
    assert "exactly zero at depth 10" in still.summary() and math.isinf(still.ratio("s"))
    with pytest.raises(KeyError, match="was not measured"):
        still.median("fixup", 10)


def test_progress_and_arguments() -> None:
    seen: list[tuple[str, int, int]] = []
    update_size(build, VECTORS, depths=(4, 6), schemes=("fixup",), seeds=2, progress=lambda *a: seen.append(a))
    assert seen[-1] == ("update size: fixup, depth 6", 4, 4)
    for wrong in ({"depths": ()}, {"schemes": ()}, {"seeds": 0}, {"rate": 0.0}, {"step": -1}, {"head": "zero"}):
        with pytest.raises(ValueError, match="expected"):
            update_size(build, VECTORS, **({"depths": (4,)} | wrong))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Give loss="):
        update_size(lambda _: fi.Function(lambda w, x: x @ w, spec(WIDTH, 1)), VECTORS, depths=(1,), schemes=("he",))
