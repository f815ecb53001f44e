"""Arms of conditionals are measured as in a model without the conditional; a row says so where an arm did not run."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fixup_init as fi
from fixup_init.propagation import NOT_RUN, Row

X = jax.random.normal(jax.random.key(1), (16, 8))
BLOCKS = 3


def drawn() -> Any:
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def kernel(n: int, m: int) -> Any:
        return jax.random.normal(next(keys), (n, m)) * (2 / n) ** 0.5

    one = {str(k): {"a": kernel(32, 32), "b": kernel(32, 32)} for k in range(BLOCKS)}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(
        {"a": kernel(32, 32), "b": kernel(32, 32)} for _ in range(BLOCKS)
    ))  # fmt: skip
    return {"stem": kernel(8, 32), "head": kernel(32, 10), "one": one, "stacked": stacked}


def normalized(x: Any) -> Any:
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)


def residual(p: Any, x: Any) -> Any:
    return x + jax.nn.relu(normalized(x @ p["a"])) @ p["b"]


def plain(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"])


def conditional(p: Any, x: Any, flag: Any) -> Any:
    """Blocks below the flag run, the others are left out; in a scan they are plain instead."""
    x = x @ p["stem"]
    for k in range(BLOCKS):
        block = p["one"][str(k)]
        x = jax.lax.cond(flag > k, lambda x, block=block: residual(block, x), lambda x: x, x)

    def body(x: Any, at: Any) -> Any:
        block, k = at
        return jax.lax.cond(flag > k, lambda x: residual(block, x), lambda x: plain(block, x), x), None

    x, _ = jax.lax.scan(body, x, (p["stacked"], jnp.arange(BLOCKS)))
    return x @ p["head"]


def written_out(flag: int) -> Any:
    def apply(p: Any, x: Any) -> Any:
        x = x @ p["stem"]
        for k in range(min(flag, BLOCKS)):
            x = residual(p["one"][str(k)], x)
        for k in range(BLOCKS):
            block = jax.tree.map(lambda leaf, k=k: leaf[k], p["stacked"])
            x = residual(block, x) if flag > k else plain(block, x)
        return x @ p["head"]

    return apply


def numbers(row: Row) -> list[float]:
    """Of both directions; a scan that slices a parameter has a gradient of its own for each pass."""
    parts = [s for s in (row.forward, row.backward, row.weight) if s is not None]
    return [v for s in parts for v in dataclasses.astuple(s)]


def in_order(rows: tuple[Row, ...]) -> list[Row]:
    return [r for r in rows if r.kind != "branch"]  # a branch ends at its sum; in a scan the places differ


@pytest.mark.parametrize("normalization", ["kept", "removed", "affine"])
@pytest.mark.parametrize("flag", [0, 2, 5])
def test_what_runs_is_measured_as_without_the_conditional(flag: int, normalization: Any) -> None:
    p, key = drawn(), jax.random.key(3)
    ours = fi.analyze(fi.Function(conditional, p), p, X, jnp.int32(flag), normalization=normalization, key=key)
    theirs = fi.analyze(fi.Function(written_out(flag), p), p, X, normalization=normalization, key=key)
    ran = [r for r in in_order(ours.rows) if r.note != NOT_RUN]
    assert [(r.kind, r.block) for r in ran] == [(r.kind, r.block) for r in in_order(theirs.rows)]
    for mine, other in zip(ran, in_order(theirs.rows), strict=True):
        if mine.weight is not None and mine.repeat is not None:
            mine, other = (dataclasses.replace(r, weight=None) for r in (mine, other))
        assert numbers(mine) == pytest.approx(numbers(other), rel=2e-4, abs=1e-6, nan_ok=True), mine.name
    left_out = [r for r in ours.rows if r.note == NOT_RUN]
    assert all(r.forward is None and r.backward is None for r in left_out)
    assert ("one/2/a" in {r.name for r in left_out}) == (flag <= 2)
    assert not ours.unmeasured


def test_in_float64() -> None:
    """Statistics are float32 in both arms."""
    narrow_p = drawn()
    with jax.enable_x64(True):
        p, x = jax.tree.map(lambda a: a.astype(jnp.float64), (narrow_p, X))
        wide = fi.analyze(fi.Function(conditional, p), p, x, jnp.int32(2), key=jax.random.key(3))
    narrow = fi.analyze(fi.Function(conditional, narrow_p), narrow_p, X, jnp.int32(2), key=jax.random.key(3))
    for a, b in zip(wide.rows, narrow.rows, strict=True):
        assert a.dtype == "float64" and (a.forward is None) == (b.forward is None)
        if a.forward is not None and b.forward is not None:
            assert a.forward.variance == pytest.approx(b.forward.variance, rel=1e-4)


def test_a_layer_that_did_not_run_is_no_dead_layer() -> None:
    p = drawn()
    model = fi.Function(conditional, p)
    ours = fi.analyze(model, p, X, jnp.int32(2))
    assert any(r.name == "one/2/b" and r.weight is not None and r.weight.gradient_norm == 0 for r in ours.rows)
    assert not [v for v in ours.verdicts() if v.kind in ("zero_gradient", "dead")]
    assert NOT_RUN in str(ours)


def test_a_prediction_knows_the_arm_of_a_given_flag() -> None:
    p = drawn()
    model = fi.Function(conditional, p)
    measured = fi.analyze(model, p, X, jnp.int32(2))
    found = fi.predict(model, X, jnp.int32(2), scheme="he")
    assert [(r.kind, r.name, r.repeat) for r in found.rows] == [(r.kind, r.name, r.repeat) for r in measured.rows]
    blank = {r.name for r in found.rows if r.note == NOT_RUN}
    assert {"one/2/a", "one/2/b", "sum 3"} <= blank and not blank & {"one/1/a", "stem"}
    either = fi.predict(model, X, jax.ShapeDtypeStruct((), jnp.int32), scheme="he")  # 0 or 1
    assert next(r for r in either.rows if r.name == "one/0/a").forward is not None


def test_a_cotangent_that_no_way_leads_to_is_zero() -> None:
    """In a scan, where statistics are taken in place."""

    def apply(p: Any, x: Any) -> Any:
        def body(x: Any, block: Any) -> Any:
            y = jax.lax.stop_gradient(jnp.tanh(x @ block["a"]))
            return x + y @ block["b"], None

        return jax.lax.scan(body, x @ p["stem"], p["stacked"])[0] @ p["head"]

    p = drawn()
    rows = [r for r in fi.analyze(fi.Function(apply, p), p, X).rows if r.name == "stacked/a"]
    assert len(rows) == BLOCKS
    for row in rows:
        assert row.forward is not None and row.backward is not None and row.forward.variance > 0
        assert row.backward.second_moment == 0 and row.backward.finite == 1
