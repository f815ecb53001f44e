"""Forms of calls and of kernels: what they hold is found, or named where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import fixup_init as fi

FLAG = jax.ShapeDtypeStruct((), jnp.int32)


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


VECTORS, IMAGES, TOKENS = shape(8, 16), shape(2, 8, 8, 16), shape(2, 12, dtype=jnp.int32)


def square(names: str) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: shape(16, 16) for name in names.split()}


def found(apply: Callable[..., Any], params: Any, *inputs: Any) -> fi.Structure:
    return fi.structure(fi.Function(apply, params), *(inputs or (VECTORS,)))


def branches(s: fi.Structure) -> list[tuple[int, float, str, int]]:
    return [(b.depth, b.order, b.skip, b.repeats) for b in s.branches]


def fans(s: fi.Structure) -> dict[str, tuple[int, int]]:
    return {layer.path: (layer.fan_in, layer.fan_out) for layer in s.layers}


def roles(s: fi.Structure) -> dict[str, str]:
    return {q.path: q.role for q in s.parameters}


PLAIN = square("stem up down head")


def block(p: Any, x: Any) -> Any:
    return x + jax.nn.relu(x @ p["up"]) @ p["down"]


def between(middle: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda p, x: middle(p, x @ p["stem"]) @ p["head"]


def test_data_parallel() -> None:
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def apply(p: Any, x: Any) -> Any:
        def local(p: Any, x: Any) -> Any:
            x = block(p, x @ p["stem"])
            x = x - jax.lax.psum(x.mean(0), "data") / 4
            return x @ p["head"]

        return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(p, x)

    s = found(apply, PLAIN)
    assert branches(s) == [(2, 2.0, "identity", 1)]
    assert (s.stem, s.head, s.regions) == ("stem", "head", ())
    assert set(fans(s).values()) == {(16, 16)}


def test_tensor_parallel_fans_are_global() -> None:
    """Columns of the first kernel and rows of the second lie on different devices."""
    mesh = AbstractMesh((4,), ("model",), axis_types=(AxisType.Auto,))
    params = {"up": shape(16, 64), "down": shape(64, 16), "head": shape(16, 3)}

    def apply(p: Any, x: Any) -> Any:
        def local(up: Any, down: Any, x: Any) -> Any:
            return jax.lax.psum(jax.nn.relu(x @ up) @ down, "model")

        specs = (P(None, "model"), P("model", None), P())
        split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        return (x + split(p["up"], p["down"], x)) @ p["head"]

    s = found(apply, params)
    assert branches(s) == [(2, 2.0, "identity", 1)]
    assert fans(s) == {"up": (16, 64), "down": (64, 16), "head": (16, 3)}


def test_a_composite_is_its_body() -> None:
    body = jax.lax.composite(lambda x, up, down: jax.nn.relu(x @ up) @ down, name="test.mlp")
    s = found(between(lambda p, x: x + body(x, p["up"], p["down"])), PLAIN)
    assert branches(s) == [(2, 2.0, "identity", 1)] and not s.regions


def test_a_kernel_is_named_and_not_entered() -> None:
    from jax.experimental import pallas as pl

    def double(x: Any, out: Any) -> None:
        out[...] = x[...] * 2.0

    call = pl.pallas_call(double, out_shape=shape(8, 16))
    s = found(between(lambda p, x: x + call(jax.nn.relu(x @ p["up"])) @ p["down"]), PLAIN)
    assert branches(s) == [(2, 2.0, "identity", 1)]
    assert [(r.primitive, r.parameters) for r in s.regions] == [("pallas_call", ())]


def test_a_while_loop_is_a_region_with_the_parameters_that_it_takes() -> None:
    def apply(p: Any, x: Any) -> Any:
        def step(carry: Any) -> Any:
            k, z = carry
            return k + 1, jnp.tanh(z @ p["loop"] + x)

        return jax.lax.while_loop(lambda carry: carry[0] < 10, step, (0, x @ p["stem"]))[1] @ p["head"]

    s = found(apply, square("stem loop head"))
    assert [(r.primitive, r.parameters) for r in s.regions] == [("while", ("loop",))]
    assert not s.branches and set(fans(s)) == {"stem", "head"}
    assert fi.Fixup().plan(s)["loop"].distribution == "model"


def test_arms_of_a_conditional() -> None:
    """Each of a switch's arms has residuals of its own; the one with most counts."""

    def apply(p: Any, x: Any, flag: Any) -> Any:
        def one(x: Any) -> Any:
            return x + jnp.tanh(x @ p["a"])

        def two(x: Any) -> Any:
            for up, down in ("bc", "de"):
                x = x + jax.nn.relu(x @ p[up]) @ p[down]
            return x

        x = jax.lax.switch(flag, [one, two, lambda x: x], x @ p["stem"])
        return jax.lax.cond(flag > 0, one, lambda x: x, x) @ p["head"]

    s = found(apply, square("stem a b c d e head"), VECTORS, FLAG)
    assert [(b.weights, [(a.index, a.count) for a in b.arms]) for b in s.branches] == [
        (("a",), [(0, 3)]), (("b", "c"), [(1, 3)]), (("d", "e"), [(1, 3)]), (("a",), [(1, 2)]),
    ]  # fmt: skip
    assert s.num_branches == 2 + 1
    assert {layer.path: len(layer.arms) for layer in s.layers} | {"a": 1} == {
        "stem": 0, "head": 0, **dict.fromkeys("abcde", 1)
    }  # fmt: skip


def test_arms_nest() -> None:
    def apply(p: Any, x: Any, flag: Any) -> Any:
        def inner(x: Any) -> Any:
            x = x + jnp.tanh(x @ p["a"])
            return jax.lax.cond(flag > 1, lambda x: x + jnp.tanh(x @ p["b"]), lambda x: x, x)

        return jax.lax.cond(flag > 0, inner, lambda x: x + jnp.tanh(x @ p["c"]), x @ p["stem"]) @ p["head"]

    s = found(apply, square("stem a b c head"), VECTORS, FLAG)
    assert {b.weights: len(b.arms) for b in s.branches} == {("a",): 1, ("b",): 2, ("c",): 1}
    assert s.num_branches == 2


def test_a_conditional_in_a_branch_has_alternatives() -> None:
    def apply(p: Any, x: Any, flag: Any) -> Any:
        x = x @ p["stem"]
        two = lambda x: jax.nn.relu(x @ p["a"]) @ p["b"]  # noqa: E731
        return (x + jax.lax.cond(flag > 0, two, lambda x: jnp.tanh(x @ p["c"]), x)) @ p["head"]

    (branch,) = found(apply, square("stem a b c head"), VECTORS, FLAG).branches
    assert sorted(branch.alternatives) == [("a", "b"), ("c",)]
    assert set(branch.last) == {"b", "c"} and branch.depth == 2
    plan = fi.plan(fi.Function(apply, square("stem a b c head")), VECTORS, FLAG)
    assert [plan[name].value for name in "bc"] == [0.0, 0.0] and plan["a"].std


def test_ensembles_and_experts_under_vmap() -> None:
    """A leading axis of members is in no fan, and no depth."""

    def ensemble(p: Any, x: Any) -> Any:
        return jax.vmap(lambda p: between(block)(p, x))(p)

    params = {k: shape(5, 16, 16) for k in PLAIN}
    s = found(ensemble, params)
    # vmap turns the axes of what is on the skip, and so it is named "reshape".
    assert [(b.depth, b.order, b.repeats) for b in s.branches] == [(2, 2.0, 1)] and s.num_branches == 1
    assert {fans(s)[k] for k in ("up", "down", "head")} == {(16, 16)} and {n.repeats for n in s.layers} == {1}

    def experts(p: Any, x: Any) -> Any:
        gates = jax.nn.softmax(x @ p["router"])
        y = jax.vmap(lambda up, down: jax.nn.relu(x @ up) @ down)(p["up"], p["down"])
        return (x + jnp.einsum("ebd,be->bd", y, gates)) @ p["head"]

    s = found(experts, {"router": shape(16, 3), "up": shape(3, 16, 16), "down": shape(3, 16, 16), "head": shape(16, 2)})
    (branch,) = s.branches
    assert (branch.depth, branch.order, branch.last) == (2, 2.0, ("down",))
    assert branch.roles["router"] == "control"  # experts are summed over: it multiplies no position of the stream
    assert fans(s)["down"] == (16, 16)


def test_members_that_share_their_input_fan_out_together() -> None:
    """The cotangent of an input that members share is a sum over all of them; behind it each is on its own."""

    def apply(p: Any, x: Any) -> Any:
        return jax.vmap(lambda up, down: jax.nn.relu(x @ up) @ down)(p["up"], p["down"]).mean(0)

    s = found(apply, {"up": shape(5, 16, 16), "down": shape(5, 16, 3)})
    assert fans(s) == {"up": (16, 5 * 16), "down": (16, 3)}


def test_experts_by_ragged_products() -> None:
    def apply(p: Any, x: Any, sizes: Any) -> Any:
        x = x @ p["stem"]
        y = jax.lax.ragged_dot(jax.nn.relu(jax.lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)
        return (x + y) @ p["head"]

    params = {"stem": shape(16, 16), "up": shape(3, 16, 32), "down": shape(3, 32, 16), "head": shape(16, 2)}
    s = found(apply, params, VECTORS, shape(3, dtype=jnp.int32))
    assert branches(s) == [(2, 2.0, "identity", 1)]
    assert fans(s)["up"] == (16, 32) and fans(s)["down"] == (32, 16)
    plan = fi.Fixup().plan(s)
    assert plan["up"].std == pytest.approx((2 / 32) ** 0.5) and plan["down"].value == 0.0


def test_custom_derivatives_are_their_bodies() -> None:
    @jax.custom_jvp
    def act(x: Any) -> Any:
        return jnp.maximum(x, 0.0)

    act.defjvp(lambda primals, tangents: (act(*primals), tangents[0]))

    @jax.custom_vjp
    def dense(x: Any, w: Any) -> Any:
        return x @ w

    dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    s = found(between(lambda p, x: x + dense(act(dense(x, p["up"])), p["down"])), PLAIN)
    assert branches(s) == [(2, 2.0, "identity", 1)] and set(fans(s)) == set(PLAIN)


def test_nested_scans_multiply() -> None:
    params = {"stem": shape(16, 16), "up": shape(3, 4, 16, 16), "down": shape(3, 4, 16, 16), "head": shape(16, 2)}

    def run(p: Any, x: Any) -> Any:
        def stage(x: Any, w: Any) -> Any:
            return jax.lax.scan(lambda x, w: (x + jax.nn.relu(x @ w[0]) @ w[1], None), x, w)[0], None

        return jax.lax.scan(stage, x, (p["up"], p["down"]))[0]

    s = found(between(run), params)
    assert branches(s) == [(2, 2.0, "identity", 12)] and s.num_branches == 12
    assert {layer.path: layer.repeats for layer in s.layers} == {"stem": 1, "up": 12, "down": 12, "head": 1}
    assert fi.Fixup().plan(s)["up"].std == pytest.approx((2 / 16) ** 0.5 * 12**-0.5)


def test_scans_over_encoder_and_decoder() -> None:
    """The decoder's layers read what the encoder's scan returned."""
    stack = {k: shape(4, 16, 16) for k in ("a", "b", "c", "d", "e")}
    params = {"stem": shape(16, 16), "other": shape(16, 16), "head": shape(16, 2), **stack}

    def apply(p: Any, x: Any, y: Any) -> Any:
        def encode(x: Any, w: Any) -> Any:
            return x + jax.nn.relu(x @ w[0]) @ w[1], None

        memory, _ = jax.lax.scan(encode, x @ p["stem"], (p["a"], p["b"]))

        def decode(y: Any, w: Any) -> Any:
            y = y + jax.nn.softmax(y @ memory.T) @ (memory @ w[0])
            return y + jax.nn.relu(y @ w[1]) @ w[2], None

        return jax.lax.scan(decode, y @ p["other"], (p["c"], p["d"], p["e"]))[0] @ p["head"]

    s = found(apply, params, VECTORS, VECTORS)
    assert [(b.weights, b.repeats) for b in s.branches] == [(("a", "b"), 4), (("c",), 4), (("d", "e"), 4)]
    assert s.num_branches == 12 and set(s.stems) >= {"stem"} and s.head == "head"


def open_sum(p: Any, x: Any) -> Any:
    """Two terms without weights that mix: either could be the skip."""
    x = x @ p["stem"]
    for up, down in ("ab", "cd"):
        x = x.mean(1, keepdims=True) * jnp.ones(16) + x.max(1, keepdims=True) * jnp.ones(16) + (
            jax.nn.relu(x @ p[up]) @ p[down]
        )  # fmt: skip
    return x @ p["head"]


OPEN = fi.Function(open_sum, square("stem a b c d head"))


def test_an_undecided_sum_is_named() -> None:
    s = fi.structure(OPEN, VECTORS)
    assert s.num_branches == 0 and [u.what for u in s.undecided] == ["sum", "sum"]
    first, second = s.undecided
    assert (first.name, second.name) == ("sum 1", "sum 2")
    assert sorted(first.terms) == [(), (), ("a", "b")] and sorted(second.terms) == [(), (), ("c", "d")]
    assert first.why == "several terms without weights could be the skip"
    with pytest.raises(fi.StructureError, match=r"'sum 1'.*could be the skip.*undecided=.*'sum 1': 0") as error:
        fi.plan(OPEN, VECTORS)
    assert "(a, b)" in str(error.value) and "None" in str(error.value)


def test_an_undecided_sum_is_settled() -> None:
    s = fi.structure(OPEN, VECTORS)
    skip = s.undecided[0].terms.index(())
    both = fi.plan(OPEN, VECTORS, scheme=fi.Fixup(undecided={"sum 1": skip, "sum 2": skip}))
    assert both.num_branches >= 2
    assert [both[name].value for name in "bd"] == [0.0, 0.0]
    assert both["a"].std == pytest.approx((2 / 16) ** 0.5 * both.num_branches**-0.5)
    one = fi.plan(OPEN, VECTORS, scheme=fi.Fixup(undecided={"sum 1": None, "sum 2": skip}))
    assert one["a"].reason.startswith("outside of branches") and one["d"].value == 0.0
    none = fi.plan(OPEN, VECTORS, scheme=fi.Fixup(undecided={"sum 1": None, "sum 2": None}))
    assert none.num_branches == 0 and all(none[name].std for name in "abcd")
    assert fi.plan(OPEN, VECTORS, scheme=fi.Fixup(undecided="ignore")).difference(none) == ()
    with pytest.raises(fi.StructureError, match="'sum 2'"):
        fi.plan(OPEN, VECTORS, scheme=fi.Fixup(undecided={"sum 1": skip}))


@pytest.mark.parametrize("wrong", [{"sum 3": 0}, {"sum 1": 3}, {"block": None}])
def test_a_wrong_decision_says_which_there_are(wrong: Any) -> None:
    with pytest.raises(fi.StructureError, match=r"'sum 1' \(terms 0 to 2\), 'sum 2' \(terms 0 to 2\)"):
        fi.plan(OPEN, VECTORS, scheme=fi.Fixup(undecided=wrong))


def test_roles_of_weights() -> None:
    def apply(p: Any, x: Any) -> Any:
        y = jax.nn.relu(x @ p["up"]) @ p["down"]  # squeeze and excite
        x = x @ p["shortcut"] + y * jax.nn.sigmoid(jax.nn.relu(y.mean(1, keepdims=True) @ p["g1"]) @ p["g2"])
        w = jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).swapaxes(1, 2))
        return (x + (w @ (x @ p["v"])) @ p["o"]) @ p["head"]

    squeeze, attention = found(apply, square("up down shortcut g1 g2 q k v o head"), shape(2, 12, 16)).branches
    assert squeeze.roles == {"up": "value", "down": "value", "g1": "gate", "g2": "gate", "shortcut": "shortcut"}
    assert squeeze.skip == "projection" and squeeze.skip_weights == ("shortcut",)
    assert attention.roles == {"q": "control", "k": "control", "v": "value", "o": "value"}
    assert attention.last == ("o",) and squeeze.last == ("down",)


def kernel(form: str, p: Any) -> Any:
    match form:
        case "concatenate":
            return jnp.concatenate([p["a"], p["b"]], 1)
        case "complex":
            return jax.lax.complex(p["a"], p["b"])
        case "low rank addition":
            return p["w"] + p["a"] @ p["b"]
        case "low rank":
            return p["a"] @ p["b"]
        case _:
            return p["w"].astype(jnp.float32) * p["scale"]


KERNELS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "concatenate": ({"a": shape(16, 12), "b": shape(16, 4)}, {"a": "kernel", "b": "kernel"}),
    "complex": (square("a b"), {"a": "kernel", "b": "kernel"}),
    "low rank addition": (
        {"w": shape(16, 16), "a": shape(16, 2), "b": shape(2, 16)}, {"w": "kernel", "a": "factor", "b": "factor"},
    ),
    "low rank": ({"a": shape(16, 2), "b": shape(2, 16)}, {"a": "factor", "b": "factor"}),
    "int8": (
        {"w": shape(16, 16, dtype=jnp.int8), "scale": shape(16)}, {"w": "kernel", "scale": "gain"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", KERNELS)
def test_kernels_of_several_leaves(form: str) -> None:
    params, expected = KERNELS[form]
    params = params | square("stem up head")

    def apply(p: Any, x: Any) -> Any:
        x = x @ p["stem"]
        y = jax.nn.relu(x @ p["up"])
        return (x + (y @ kernel(form, p)).real) @ p["head"]

    s = found(apply, params)
    assert branches(s) == [(2, 2.0, "identity", 1)]
    assert {k: roles(s)[k] for k in expected} == expected
    made = {layer.path for layer in s.layers} & set(expected)
    assert made and {fans(s)[k] for k in made} == {(16, 16)}
    plan = fi.Fixup().plan(s)
    if form == "int8":
        assert plan["w"].distribution == "model" and "int8" in plan["w"].reason
        assert all(fi.schemes.find(name).plan(s)["w"].distribution == "model" for name in ("he_normal", "lecun_normal"))
    elif form in ("concatenate", "complex"):
        assert [plan[k].value for k in "ab"] == [0.0, 0.0]
    elif form == "low rank addition":
        assert plan["w"].value == 0.0 and 0.0 in (plan["a"].value, plan["b"].value)


def test_one_hot_products_are_embeddings() -> None:
    def apply(p: Any, tokens: Any) -> Any:
        return block(p, jax.nn.one_hot(tokens, 50) @ p["table"]) @ p["head"]

    s = found(apply, {"table": shape(50, 16), **square("up down head")}, TOKENS)
    assert roles(s)["table"] == "embedding" and s.stem == "table"
    assert [layer.kind for layer in s.layers] == ["embedding", "dense", "dense", "dense"]


@pytest.mark.parametrize("form", ["rows", "columns", "vector"])
def test_products_written_out(form: str) -> None:
    def dense(x: Any, w: Any) -> Any:
        if form == "rows":
            return (x[..., :, None] * w).sum(-2)
        if form == "columns":
            return (x[..., None, :] * w.T).sum(-1)
        return jax.vmap(lambda x: (x[:, None] * w).sum(0))(x)

    s = found(between(lambda p, x: x + dense(jax.nn.relu(dense(x, p["up"])), p["down"])), PLAIN)
    assert branches(s) == [(2, 2.0, "identity", 1)]
    assert set(fans(s).values()) == {(16, 16)} and roles(s)["down"] == "kernel"


def test_fans_of_transposed_convolutions() -> None:
    """As those of a convolution with a stride: strides count in neither fan."""

    def apply(p: Any, x: Any) -> Any:
        x = jax.lax.conv_transpose(x, p["up"], (2, 2), "SAME")
        return jax.lax.conv(x.transpose(0, 3, 1, 2), p["down"].transpose(3, 2, 0, 1), (1, 1), "SAME")

    s = found(apply, {"up": shape(4, 4, 16, 8), "down": shape(3, 3, 8, 3)}, IMAGES)
    assert fans(s)["down"] == (8 * 9, 3 * 9)
    assert fans(s)["up"] == (16 * 16, 8 * 16)


NORMS: dict[str, tuple[tuple[int, ...], bool]] = {
    "batch": ((0, 1, 2), True),
    "instance": ((1, 2), False),
    "layer": ((3,), False),
    "group": ((1, 2, 4), False),
    "vmap": ((1, 2, 3), False),
    "time-major": ((1,), True),
}


@pytest.mark.parametrize("form", NORMS)
def test_axes_of_statistics(form: str) -> None:
    def normalized(x: Any, axes: Any) -> Any:
        return (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)

    def apply(p: Any, x: Any) -> Any:
        x = x @ p["stem"]
        if form == "group":
            y = normalized(x.reshape(2, 8, 8, 4, 4), (1, 2, 4)).reshape(x.shape)
        elif form == "vmap":
            y = jax.vmap(lambda x: normalized(x, (0, 1, 2)))(x)
        elif form == "time-major":  # (time, batch, features)
            y = normalized(x.mean(2).swapaxes(0, 1), (1,))
        else:
            y = normalized(x, NORMS[form][0])
        return (y * p["scale"]) @ p["head"]

    s = found(apply, {**square("stem head"), "scale": shape(16)}, IMAGES)
    assert [(n.axes, n.batch, n.scale) for n in s.norms] == [(*NORMS[form], "scale")]


def test_local_response_normalization() -> None:
    """x / (k + a sum of neighbours' squares)^0.75 divides large x by a statistic of x."""

    def apply(p: Any, x: Any) -> Any:
        x = x @ p["stem"]
        squares = jax.lax.reduce_window(x**2, 0.0, jax.lax.add, (1, 1, 1, 5), (1, 1, 1, 1), "SAME")
        x = x / (2.0 + 1e-4 * squares) ** 0.75
        return (x + jax.nn.relu(x @ p["up"]) @ p["down"]) @ p["head"]

    s = found(apply, PLAIN, IMAGES)
    assert [(n.axes, n.batch, n.scale) for n in s.norms] == [((3,), False, None)]
    assert branches(s) == [(2, 2.0, "identity", 1)]


def test_straight_through_is_no_residual() -> None:
    """z + stop_gradient(q(z) - z) is q(z)."""

    def apply(p: Any, x: Any) -> Any:
        x = x @ p["stem"]
        nearest = p["codes"][jnp.argmin(((x[:, None] - p["codes"]) ** 2).sum(-1), 1)]
        x = x + jax.lax.stop_gradient(nearest - x)
        return block(p, x) @ p["head"]

    s = found(apply, {**PLAIN, "codes": shape(20, 16)})
    assert [b.weights for b in s.branches] == [("up", "down")]


def test_paths_of_different_depth_end_in_zero() -> None:
    """All that is added at the end of a branch starts at zero, the longer path too."""

    def apply(p: Any, x: Any) -> Any:
        x = x @ p["stem"]
        h = jax.nn.relu(x @ p["u"])
        return (x + jnp.tanh(h @ p["w"] + jax.nn.relu(h @ p["a"]) @ p["b"])) @ p["head"]

    model = fi.Function(apply, square("stem u w a b head"))
    drawn = fi.init(model, jax.random.key(0), VECTORS)
    assert [float(np.abs(drawn[k]).max()) for k in "wb"] == [0.0, 0.0]
    assert float(np.abs(drawn["a"]).max()) > 0


def test_a_state_that_starts_empty_is_a_stream_where_layers_refine_it() -> None:
    def refined(p: Any, x: Any) -> Any:
        def step(flow: Any, _: Any) -> Any:
            return flow + jax.nn.relu((x + flow) @ p["a"]) @ p["b"], None

        return jax.lax.scan(step, jnp.zeros_like(x), None, length=4)[0] @ p["head"]

    def remembered(p: Any, x: Any) -> Any:
        def step(state: Any, k: Any) -> Any:
            state = state + k[:, None] * (k - k @ state)[None]
            return state, k @ state

        return jax.lax.scan(step, jnp.zeros((16, 16)), x @ p["a"])[1] @ p["head"]

    s = found(refined, square("a b head"))
    assert [(b.depth, b.repeats) for b in s.branches] == [(2, 4)] and s.num_branches == 4
    assert not found(remembered, square("a head")).branches
