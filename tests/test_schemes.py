"""Plans against formulas worked by hand, and draws against plans."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo import IMAGES, LARGE, TOKENS, VECTORS, ZOO, Case, Decoder, NFNet, Stacked

import fixup_init as fi
from fixup_init.models import resnet_nnx
from fixup_init.models.resnet import cifar_resnet, imagenet_resnet


def test_resnet110_by_hand() -> None:
    """Zhang et al. 2019, Sec. 3: L = 54, m = 2, so std = sqrt(2 / (9 out)) 54^(-1/2) for a branch's first layer."""
    plan = fi.plan(cifar_resnet(110, norm="fixup"), IMAGES)
    assert plan.num_branches == 54
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(18):
            first, last = (plan[f"layer{stage}_{block}/conv{k}/kernel"] for k in (1, 2))
            assert first.distribution == "normal"
            assert first.std == pytest.approx(math.sqrt(2 / (9 * width)) * 54**-0.5, rel=1e-12)
            assert (last.distribution, last.value) == ("constant", 0.0)
    assert plan["conv1/kernel"].std == pytest.approx(math.sqrt(2 / (9 * 16)), rel=1e-12)
    assert plan["fc/kernel"].value == plan["fc/bias"].value == 0.0
    assert {e.value for e in plan if e.role == "multiplier"} == {1.0}
    assert {e.value for e in plan if e.role == "bias"} == {0.0}
    assert {e.rate for e in plan if e.role in ("bias", "multiplier")} == {0.1}
    assert {e.rate for e in plan if e.role == "kernel"} == {1.0}


def test_bottleneck_by_hand() -> None:
    """ImageNet ResNet-50: L = 16, m = 3, factor 16^(-1/4) = 1/2 for two layers; projections He."""
    plan = fi.plan(imagenet_resnet(50, norm="fixup"), LARGE)
    assert plan["layer2_0/conv1/kernel"].std == pytest.approx(math.sqrt(2 / 128) / 2)
    assert plan["layer2_0/conv2/kernel"].std == pytest.approx(math.sqrt(2 / (9 * 128)) / 2)
    assert plan["layer2_0/conv3/kernel"].value == 0.0
    assert plan["layer2_0/downsample/kernel"].std == pytest.approx(math.sqrt(2 / 512))
    assert "projection shortcut" in plan["layer2_0/downsample/kernel"].reason


def test_a_gated_branch_counts_three_factors() -> None:
    plan = fi.plan(Decoder(gated=True), TOKENS)
    scaled = [e.std for e in plan if "L^(-1/4)" in e.reason]
    assert scaled == [pytest.approx(math.sqrt(2 / 64) * 4 ** (-1 / 4))] * 4  # up and gate, two layers; L = 4, D = 3


def test_query_and_key_are_not_scaled() -> None:
    plan = fi.plan(Decoder(), TOKENS)
    name = "MultiHeadDotProductAttention_0"
    assert plan[f"{name}/value/kernel"].std == pytest.approx(math.sqrt(2 / 32) / 2)
    for part in ("query", "key"):
        assert plan[f"{name}/{part}/kernel"].std == pytest.approx(math.sqrt(2 / 32))
        assert "control path" in plan[f"{name}/{part}/kernel"].reason
    assert plan[f"{name}/out/kernel"].value == 0.0


def test_one_layer_branches_are_zero_alone() -> None:
    def apply(w: Any, x: Any) -> Any:
        for v in w["blocks"]:
            x = x + jax.nn.relu(x) @ v
        return x @ w["head"]

    square, out = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((16, 2), jnp.float32)
    plan = fi.plan(fi.Function(apply, {"blocks": [square] * 3, "head": out}), VECTORS)
    assert [plan[f"blocks/{k}"].value for k in range(3)] == [0.0] * 3


def test_in_a_normalized_model_the_scale_is_zeroed() -> None:
    plan = fi.plan(cifar_resnet(20, norm="batch"), IMAGES)
    for block in ("layer1_0", "layer2_1", "layer3_2"):
        assert plan[f"{block}/norm2/scale"].value == 0.0
        assert "normalization or standardization hides" in plan[f"{block}/norm2/scale"].reason
        assert plan[f"{block}/norm1/scale"].value == 1.0
        for k in (1, 2):
            assert plan[f"{block}/conv{k}/kernel"].distribution == "normal"
            assert "a normalization hides its scale" in plan[f"{block}/conv{k}/kernel"].reason
    pre = fi.plan(cifar_resnet(20, norm="batch", preactivation=True), IMAGES)
    assert pre["layer1_0/conv2/kernel"].value == 0.0
    assert pre["layer1_0/norm2/scale"].value == 1.0


def test_standardized_kernels_leave_the_zero_to_the_multiplier() -> None:
    plan = fi.plan(NFNet(), IMAGES)
    assert [plan[f"skip{k}"].value for k in range(3)] == [0.0] * 3
    assert "hides its scale" in plan["StandardizedConv_1/w"].reason
    assert plan["StandardizedConv_1/gain"].distribution == "model"


def test_a_multiplier_that_enters_as_a_function_is_left_alone() -> None:
    def apply(p: Any, x: Any) -> Any:
        return x * jnp.exp(p["log"]) * (1 + p["offset"]) * p["plain"]

    model = fi.Function(apply, {k: jax.ShapeDtypeStruct((16,), jnp.float32) for k in ("log", "offset", "plain")})
    plan = fi.plan(model, VECTORS, scheme="he")
    assert plan["log"].distribution == "model"
    assert (plan["offset"].value, plan["plain"].value) == (0.0, 1.0)


def test_a_tied_head_is_not_erased() -> None:
    plan = fi.plan(Decoder(tied=True), TOKENS)
    assert plan["table/embedding"].distribution == "model"
    assert "tied" in plan["table/embedding"].reason


@pytest.mark.parametrize("case", ZOO, ids=lambda c: c.name)
def test_plan_covers_every_leaf(case: Case) -> None:
    model = case.make()
    s = fi.structure(model, *case.inputs)
    for scheme in ("fixup", "he", "model"):
        plan = fi.plan(model, *case.inputs, scheme=scheme)
        assert [e.path for e in plan] == [q.path for q in s.parameters]
        assert all(e.reason for e in plan)
        assert fi.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("family, gain2", [("he", 2.0), ("glorot", 1.0), ("lecun", 1.0)])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize("distribution", ["normal", "truncated_normal", "uniform"])
def test_variance_family(family: str, gain2: float, mode: str, distribution: str) -> None:
    """A drawn kernel's standard deviation agrees with sqrt(gain^2 / n) within five standard errors."""
    w = jax.ShapeDtypeStruct((3, 3, 64, 96), jnp.float32)

    def apply(w: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    model, x = fi.Function(apply, w), jax.ShapeDtypeStruct((1, 8, 8, 64), jnp.float32)
    n = {"fan_in": 9 * 64, "fan_out": 9 * 96, "fan_avg": 9 * 80}[mode]
    drawn = fi.init(model, jax.random.key(1), x, scheme=f"{family}_{distribution}_{mode}")
    std, size = math.sqrt(gain2 / n), drawn.size
    kurtosis = {"normal": 3.0, "truncated_normal": 2.4, "uniform": 1.8}[distribution]  # <= that of the distribution
    error = std * math.sqrt((kurtosis - 1) / (4 * size))
    assert abs(float(drawn.std()) - std) < 5 * error
    assert abs(float(drawn.mean())) < 5 * std / math.sqrt(size)
    if distribution != "normal":
        bound = std * (math.sqrt(3) if distribution == "uniform" else 2 / 0.87962566103423978)
        assert float(jnp.abs(drawn).max()) <= bound * (1 + 1e-6)


def test_fixup_draws_follow_the_plan() -> None:
    variables = fi.init(cifar_resnet(110, norm="fixup"), jax.random.key(0), IMAGES)
    kernel = variables["params"]["layer3_7"]["conv1"]["kernel"]
    std = math.sqrt(2 / (9 * 64)) * 54**-0.5
    assert abs(float(kernel.std()) - std) < 5 * std / math.sqrt(2 * kernel.size)
    other = variables["params"]["layer3_8"]["conv1"]["kernel"]
    assert abs(float(np.corrcoef(kernel.ravel(), other.ravel())[0, 1])) < 5 / math.sqrt(kernel.size)
    # Blocks of one kernel are independent of each other too.
    a, b = kernel.ravel()[: 1 << 14], kernel.ravel()[1 << 14 : 1 << 15]
    assert abs(float(np.corrcoef(a, b)[0, 1])) < 5 / math.sqrt(a.size)


def test_init_returns_the_tree_of_model_init() -> None:
    model, key, x = cifar_resnet(20, norm="batch"), jax.random.key(0), jnp.zeros((2, 32, 32, 3))
    ours, theirs = fi.init(model, key, x), model.init(key, x)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), ours, theirs)
    assert all(jax.tree.leaves(same))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours["batch_stats"], theirs["batch_stats"]))


@pytest.mark.parametrize("kind", ["typed", "raw", "dictionary"])
def test_the_models_own_scheme_is_model_init(kind: str) -> None:
    model, x = Decoder(), jnp.zeros((2, 12), jnp.int32)
    key = {"typed": jax.random.key(3), "raw": jax.random.PRNGKey(3), "dictionary": {"params": jax.random.key(3)}}[kind]
    ours, theirs = fi.init(model, key, x, scheme="model"), model.init(key, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours, theirs)


def test_initial_state_comes_without_a_forward_pass() -> None:
    class Loud(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            jax.debug.callback(lambda v: calls.append(v), x.sum())
            return nn.Dense(4)(nn.BatchNorm(use_running_average=False)(x))

    calls: list[Any] = []
    fi.init(Loud(), jax.random.key(0), jnp.ones((2, 3)))
    jax.effects_barrier()
    assert not calls


def test_adding_a_layer_changes_no_other() -> None:
    key = jax.random.key(0)
    short = fi.init(cifar_resnet(20, norm="none"), key, IMAGES, scheme="he")["params"]
    long = fi.init(cifar_resnet(32, norm="none"), key, IMAGES, scheme="he")["params"]
    for path in ("conv1", "layer1_0", "layer3_2"):
        jax.tree.map(np.testing.assert_array_equal, short[path], long[path])


def test_nnx_is_updated_in_place_and_agrees_with_linen() -> None:
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    module = resnet_nnx.cifar_resnet(20, "none", rngs=nnx.Rngs(0))
    returned = fi.init(module, nnx.Rngs(5), x)
    assert returned is module
    assert not module.fc.kernel[...].any() and not module.layer1_0.conv2.kernel[...].any()
    linen_plan, nnx_plan = fi.plan(cifar_resnet(20, norm="none"), x), fi.plan(module, x)
    assert {e.path: e for e in linen_plan} == {e.path: e for e in nnx_plan}
    params = fi.init(cifar_resnet(20, norm="none"), nnx.Rngs(5).params(), x)["params"]
    np.testing.assert_array_equal(params["layer2_0"]["conv1"]["kernel"], module.layer2_0.conv1.kernel[...])


def test_scanned_kernels_have_the_fans_of_one_layer() -> None:
    plan = fi.plan(Stacked(True, nnx.Rngs(0)), VECTORS)
    assert plan["blocks/up/kernel"].shape == (4, 16, 64)
    assert plan["blocks/up/kernel"].std == pytest.approx(math.sqrt(2 / 64) * 4**-0.5)
    assert plan["blocks/down/kernel"].value == 0.0


def test_bf16_parameters() -> None:
    def apply(w: Any, x: Any) -> Any:
        return x.astype(jnp.bfloat16) @ w

    w = fi.init(
        fi.Function(apply, jax.ShapeDtypeStruct((16, 512), jnp.bfloat16)), jax.random.key(0), VECTORS, scheme="he"
    )
    assert w.dtype == jnp.bfloat16
    assert float(w.astype(jnp.float32).std()) == pytest.approx(math.sqrt(2 / 16), rel=0.02)


def test_kernel_init_convention() -> None:
    """In a model whose author writes kernel_init, the same distribution as fi.plan gives."""
    init = fi.initializers.fixup(num_branches=54, branch_depth=2)
    drawn = init(jax.random.key(0), (3, 3, 64, 64), jnp.float32)
    std = math.sqrt(2 / (9 * 64)) * 54**-0.5
    assert abs(float(drawn.std()) - std) < 5 * std / math.sqrt(2 * drawn.size)
    assert not fi.initializers.fixup(54, 2, last=True)(jax.random.key(0), (3, 3, 64, 64), jnp.float32).any()
    with pytest.raises(ValueError, match="m >= 2"):
        fi.initializers.fixup(num_branches=54, branch_depth=1)


def test_plans_are_edited_by_path_and_compared() -> None:
    plan = fi.plan(cifar_resnet(20, norm="fixup"), IMAGES)
    edited = plan.override("fc/kernel", std=0.01).override("conv1/kernel", value=0.0)
    assert [a.path for a, _ in plan.difference(edited) if a] == ["conv1/kernel", "fc/kernel"]
    variables = fi.init(cifar_resnet(20, norm="fixup"), jax.random.key(0), IMAGES, scheme=edited)
    assert float(variables["params"]["fc"]["kernel"].std()) == pytest.approx(0.01, rel=0.15)
    assert not variables["params"]["conv1"]["kernel"].any()
    with pytest.raises(KeyError, match="nearest: 'fc/kernel'"):
        plan["fc/kernl"]
    with pytest.raises(ValueError, match="no plan in JSON"):
        fi.Plan.from_json('{"version": 99}')
    with pytest.raises(ValueError, match="does not fit"):
        fi.init(cifar_resnet(32, norm="fixup"), jax.random.key(0), IMAGES, scheme=plan)


def test_fixup_output_is_zero_and_branches_are_zero() -> None:
    """Rule 1: with the last layers and the head at zero, the network's function starts at zero."""
    for model, x in ((cifar_resnet(20, norm="fixup"), IMAGES), (Decoder(), TOKENS)):
        variables = fi.init(model, jax.random.key(0), x)
        inputs = jnp.ones(x.shape, x.dtype)
        assert not model.apply(variables, inputs).any()


def test_init_under_jit_and_vmap() -> None:
    """A drop-in for `model.init` also where that is jitted (for sharding) or mapped over keys (for ensembles)."""
    model, x = cifar_resnet(8, norm="batch"), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    plain = fi.init(model, jax.random.key(1), x)
    jitted = jax.jit(lambda key: fi.init(model, key, x))(jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, jitted)
    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.vmap(lambda key: fi.init(model, key, x))(keys)
    one = fi.init(model, keys[2], x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2], b, rtol=1e-6), many, one)


def test_operations_without_a_rule_are_named() -> None:
    def apply(p: Any, x: Any) -> Any:
        return (x + jax.scipy.special.i0e(x @ p["a"]) @ p["b"]) @ p["head"]

    shapes = {"a": (16, 16), "b": (16, 16), "head": (16, 2)}
    model = fi.Function(apply, {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()})
    assert fi.structure(model, VECTORS).unruled == ("bessel_i0e",)
    assert "No rule for the order of bessel_i0e" in fi.plan(model, VECTORS).notes[0]
