"""Properties that hold whatever the model: what changes nothing in a structure, and what plans and Fixup promise."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from zoo import IMAGES, SEQUENCE, TOKENS, VECTORS, ZOO, Case, ConvNeXt, Decoder, Encoder, Llama, Mixer, MLPBlock
from zoo_families import FAMILIES
from zoo_frameworks import NNX, EquinoxTransformer, NNXTransformer, equinox, haiku_transformer

import fixup_init as fi
from fixup_init import tracing
from fixup_init.frameworks.application import path_of
from fixup_init.models.resnet import cifar_resnet

CASES = {c.name: c for c in ZOO + FAMILIES}
LARGE = tuple(
    name for name in CASES
    if any(big in name for big in ("resnet56", "resnet110", "resnet50", "equinox-resnet", "nnx-recurrent"))
)  # fmt: skip
# One of each kind, for properties that the ordinary run cannot afford for all.
QUICK = (
    "resnet20-v1", "resnet20-v2", "encoder-post", "decoder-tied", "squeeze-excite", "highway", "time-conditioned",
    "densenet", "poolformer", "nfnet", "experts", "conformer", "discriminator", "mobilenet-v2", "shared-depth",
    "function", "cait", "dit", "vae", "gan-class", "rcan", "esrgan", "fpn", "bert", "llama-scan-remat", "lora",
    "mixtral", "transformer-xl", "ngpt", "perceiver", "lstm-residual", "mamba", "rwkv", "s4d", "tcn", "layer-drop",
    "switched", "evoformer", "gat", "euler", "mesh-graph-net", "haiku-transformer", "haiku-vqvae", "equinox-scan",
    "nnx-transformer", "nnx-inverted",
)  # fmt: skip


def over(quick: tuple[str, ...] | None = None) -> Any:
    """Runs a test for every model; those that are large, or not in `quick`, are slow."""

    def marks(name: str) -> list[Any]:
        return [pytest.mark.slow] * (name in LARGE or (quick is not None and name not in quick))

    cases = [pytest.param(case, id=name, marks=marks(name)) for name, case in CASES.items()]
    return pytest.mark.parametrize("case", cases)


def concrete(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def pure(case: Case) -> fi.Function:
    return _pure(case.name)


@functools.cache
def _pure(name: str) -> fi.Function:
    """A model of any framework as a function of its parameters and inputs; state is zero, noise has one key."""
    case = CASES[name]
    model = case.make()
    if isinstance(model, fi.Function):
        return model
    if isinstance(model, nn.Module):
        variables = jax.eval_shape(model.init, jax.random.key(0), *case.inputs)
        state = {k: v for k, v in variables.items() if k != "params"}

        def apply(params: Any, *inputs: Any) -> Any:
            given = {"params": params, **jax.tree.map(concrete, state)}
            return model.apply(given, *inputs, mutable=list(state), rngs={"params": jax.random.key(0)})[0]

        return fi.Function(apply, variables["params"])
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def merged(params: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, params, jax.tree.map(concrete, rest))(*inputs)

    return fi.Function(merged, params)


def reference(case: Case) -> fi.Structure:
    return _reference(case.name)


@functools.cache
def _reference(name: str) -> fi.Structure:
    return fi.structure(CASES[name].make(), *CASES[name].inputs)


def comparable(s: fi.Structure, names: Mapping[str, str] | None = None, without: tuple[str, ...] = ()) -> Any:
    """A structure as data, parameters by path, their paths replaced by `names`; scopes and dtypes left out."""
    left_out = {"scope", "where", "name", "dtype", *without}

    def bare(x: Any) -> Any:
        if isinstance(x, dict):
            return {(names or {}).get(k, k): bare(v) for k, v in x.items() if k not in left_out}
        if isinstance(x, list):
            return [bare(v) for v in x]
        return (names or {}).get(x, x) if isinstance(x, str) else x

    data = bare(s.to_dict())
    data["parameters"].sort(key=lambda q: q["path"])
    return data


def unnamed(s: fi.Structure) -> Any:
    """A structure without its names."""
    return (
        [(b.depth, b.order, b.order_without_norms, b.skip, b.repeats, len(b.weights), len(b.last), b.norms, b.sum)
         for b in s.branches],
        [(layer.kind, layer.fan_in, layer.fan_out, layer.repeats) for layer in s.layers],
        [(n.axes, n.batch, n.form, n.scale is None, n.bias is None) for n in s.norms],
        sorted((q.role, q.uses, q.shape, str(q.neutral)) for q in s.parameters),
    )  # fmt: skip


def renamed(model: fi.Function, seed: int) -> tuple[fi.Function, dict[str, str]]:
    """The model with parameters m0, m1, ... in random order, and the names that these had."""
    found, tree = jax.tree_util.tree_flatten_with_path(model.params)
    order = random.Random(seed).sample(range(len(found)), len(found))
    params = {f"m{k}": leaf for k, (_, leaf) in zip(order, found, strict=True)}

    def apply(params: Any, *inputs: Any) -> Any:
        return model.apply(jax.tree.unflatten(tree, [params[f"m{k}"] for k in order]), *inputs)

    return fi.Function(apply, params), {f"m{k}": path_of(path) for k, (path, _) in zip(order, found, strict=True)}


@over()
def test_names_change_nothing(case: Case) -> None:
    model, names = renamed(pure(case), seed=len(case.name))
    assert comparable(fi.structure(model, *case.inputs), names) == comparable(reference(case))


@over(QUICK)
@pytest.mark.parametrize("call", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_calls_change_nothing(case: Case, call: Callable[[Any], Any]) -> None:
    model = pure(case)
    s = fi.structure(fi.Function(call(model.apply), model.params), *case.inputs)
    assert comparable(s) == comparable(reference(case))


def is_array(x: Any) -> bool:
    return bool(x.shape) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


# Inputs whose axes depend on each other.
RESIZED = {
    "evoformer": lambda n: (jax.ShapeDtypeStruct((n, 9, 6), jnp.float32), jax.ShapeDtypeStruct((9, 4), jnp.float32))
}
ONE_EXAMPLE = {
    "equinox-resnet": "of one example there are no batch statistics",
}


def resized(case: Case, change: Callable[[int], int]) -> Any:
    """The inputs with another leading axis: examples, or nodes and edges."""
    if case.name in RESIZED:
        return RESIZED[case.name](change(5))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((change(x.shape[0]), *x.shape[1:]), x.dtype) if is_array(x) else x, case.inputs
    )


@over(QUICK)
def test_batch_size_changes_nothing(case: Case) -> None:
    s = fi.structure(case.make(), *resized(case, lambda n: n + 3))
    assert comparable(s) == comparable(reference(case))


@over(("resnet20-v1", "mixer", "decoder", "gan-class", "haiku-gru", "equinox-resnet"))
def test_a_batch_of_one_changes_nothing(case: Case) -> None:
    if case.name in ONE_EXAMPLE:
        pytest.skip(ONE_EXAMPLE[case.name])
    examples = {x.shape[0] for x in jax.tree.leaves(case.inputs) if is_array(x)} == {2}
    s = fi.structure(case.make(), *resized(case, lambda n: 1 if examples else n - 1))
    assert comparable(s) == comparable(reference(case))


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype) if x.dtype == jnp.float32 else x, tree)


FIXED = dict.fromkeys(
    ("recurrent", "lstm-language", "lstm-residual", "seq2seq", "nnx-recurrent"), "its carry is float32"
)
REFUSED = {
    "bfloat16": {
        "llama-scan": "nn.scan checks the dtypes of parameters",
        "llama-scan-remat": "nn.scan checks the dtypes of parameters",
        "s4d": "there is no Fourier transform of bfloat16",
        "haiku-vqvae": "its code book is state, in float32",
    },
    "float64": {
        **FIXED,
        "equinox-resnet": "Equinox's state keeps its dtypes",
        **{name: "NNX's running statistics are float32" for name in CASES if name.endswith(("-nnx", "nnx-inverted"))},
    },
}


@over(QUICK)
@pytest.mark.parametrize("dtype", REFUSED)
def test_dtype_changes_nothing(case: Case, dtype: str) -> None:
    if case.name in REFUSED[dtype]:
        pytest.skip(REFUSED[dtype][case.name])
    model = pure(case)
    expected = comparable(reference(case))
    with jax.enable_x64(True) if dtype == "float64" else jax.default_matmul_precision(None):
        s = fi.structure(fi.Function(model.apply, cast(model.params, dtype)), *cast(case.inputs, dtype))
    assert comparable(s) == expected


IDENTITIES: dict[str, Callable[[Any], Any]] = {
    "times one": lambda x: x * 1.0,
    "plus zero": lambda x: x + 0.0,
    "reshape": lambda x: x.reshape(-1).reshape(x.shape),
    "transpose": lambda x: x.T.T,
    "squeeze": lambda x: jnp.squeeze(x[None], 0),
    "barrier": jax.lax.optimization_barrier,
    "cast": lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
    "copy": jnp.copy,
    "jit": lambda x: jax.jit(lambda x: x)(x),
}


def through(tree: Any, identity: Callable[[Any], Any]) -> Any:
    return jax.tree.map(lambda x: identity(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree)


@over(QUICK)
def test_identities_around_a_model_change_nothing(case: Case) -> None:
    """On its inputs and outputs."""
    model = pure(case)

    def apply(params: Any, *inputs: Any) -> Any:
        for identity in IDENTITIES.values():
            inputs = through(inputs, identity)
        outputs = model.apply(params, *inputs)
        for identity in IDENTITIES.values():
            outputs = through(outputs, identity)
        return outputs

    assert comparable(fi.structure(fi.Function(apply, model.params), *case.inputs)) == comparable(reference(case))


@over(QUICK)
@pytest.mark.parametrize("name", ["squeeze", "cast"])
def test_identities_of_parameters_change_nothing(case: Case, name: str) -> None:
    model = pure(case)

    def apply(params: Any, *inputs: Any) -> Any:
        return model.apply(through(params, IDENTITIES[name]), *inputs)

    assert comparable(fi.structure(fi.Function(apply, model.params), *case.inputs)) == comparable(reference(case))


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_in_a_residual_network_change_nothing(name: str) -> None:
    """On stream, skip and branch; what reshapes on the skip is named so."""
    w = {k: jax.ShapeDtypeStruct((16, 16), jnp.float32) for k in ("stem", "a", "b", "c", "d", "head")}
    w |= {k: jax.ShapeDtypeStruct((16,), jnp.float32) for k in ("scale", "bias")}

    def apply(on: Callable[[Any], Any], p: Any, x: Any) -> Any:
        x = on(on(x) @ p["stem"])
        for up, down in ("ab", "cd"):
            y = on(jax.nn.relu(on(on(x) @ p[up] + p["bias"])))
            x = on(on(x) + on(on(y @ p[down]) * p["scale"]))
        return on(x) @ p["head"]

    plain = fi.structure(fi.Function(functools.partial(apply, lambda x: x), w), VECTORS)
    s = fi.structure(fi.Function(functools.partial(apply, IDENTITIES[name]), w), VECTORS)
    assert plain.num_branches == 2
    assert comparable(s, without=("skip",)) == comparable(plain, without=("skip",))
    assert {b.skip for b in s.branches} == {"reshape" if name in ("reshape", "transpose") else "identity"}


LAYOUTS = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}


def convolutional(layout: str, norm: str, form: str) -> tuple[fi.Function, Any]:
    """A residual network of convolutions in plain JAX: "v1", "v2" (pre-activation) or "bottleneck"."""
    last = layout == "NHWC"
    image = (1, 2) if last else (2, 3)
    params: dict[str, jax.ShapeDtypeStruct] = {}

    def add(name: str, *shape: int) -> None:
        params[name] = jax.ShapeDtypeStruct(shape, jnp.float32)

    blocks = [(16, 16, 1), (16, 32, 2), (32, 32, 1)]
    add("stem", *((3, 3, 3, 16) if last else (16, 3, 3, 3)))
    for k, (n, m, _) in enumerate(blocks):
        inner = m // 2 if form == "bottleneck" else m
        rows = [(1, n, inner), (3, inner, inner), (1, inner, m)] if form == "bottleneck" else [(3, n, m), (3, m, m)]
        for j, (size, i, o) in enumerate(rows):
            add(f"w{k}{j}", *((size, size, i, o) if last else (o, i, size, size)))
            for s in ("scale", "bias"):
                add(f"{s}{k}{j}", i if form == "v2" else o)
        if n != m:
            add(f"w{k}p", *((1, 1, n, m) if last else (m, n, 1, 1)))
    add("head", 32, 10)

    def conv(x: Any, w: Any, stride: int = 1) -> Any:
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=LAYOUTS[layout])

    def normalized(x: Any, scale: Any, bias: Any) -> Any:
        shape = x.shape
        axes = {"batch": (0, *image), "layer": (1, 2, 3)}.get(norm)
        if norm == "group":
            b, c = shape[0], shape[3 if last else 1]
            x = x.reshape(*shape[:3], 4, c // 4) if last else x.reshape(b, 4, c // 4, *shape[2:])
            axes = (1, 2, 4) if last else (2, 3, 4)
        x = (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)
        x = x.reshape(shape)
        return x * scale + bias if last else x * scale[:, None, None] + bias[:, None, None]

    def apply(p: Any, x: Any) -> Any:
        x = conv(x, p["stem"])
        for k, (n, m, stride) in enumerate(blocks):
            y = x
            layers = 3 if form == "bottleneck" else 2
            for j in range(layers):
                at = stride if j == layers - 2 else 1
                if form == "v2":
                    y = conv(jax.nn.relu(normalized(y, p[f"scale{k}{j}"], p[f"bias{k}{j}"])), p[f"w{k}{j}"], at)
                else:
                    y = normalized(conv(y, p[f"w{k}{j}"], at), p[f"scale{k}{j}"], p[f"bias{k}{j}"])
                    y = jax.nn.relu(y) if j + 1 < layers else y
            x = (conv(x, p[f"w{k}p"], stride) if n != m else x) + y
            x = x if form == "v2" else jax.nn.relu(x)
        return x.mean(image) @ p["head"]

    return fi.Function(apply, params), jax.ShapeDtypeStruct((2, 16, 16, 3) if last else (2, 3, 16, 16), jnp.float32)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
@pytest.mark.parametrize("form", ["v1", "v2", "bottleneck"])
def test_layout_changes_nothing(form: str, norm: str) -> None:
    first, last = (fi.structure(*convolutional(layout, norm, form)) for layout in ("NCHW", "NHWC"))
    assert last.num_branches == 3 and [b.skip for b in last.branches] == ["identity", "projection", "identity"]
    assert comparable(first, without=("axes", "shape")) == comparable(last, without=("axes", "shape"))
    axes = {"batch": ((0, 2, 3), (0, 1, 2)), "layer": ((1, 2, 3), (1, 2, 3)), "group": ((2, 3, 4), (1, 2, 4))}
    assert ({n.axes for n in first.norms}, {n.axes for n in last.norms}) == tuple({a} for a in axes[norm])


DEEPER: dict[str, tuple[Callable[[int], Any], Any]] = {
    "resnet-v1": (lambda n: cifar_resnet(6 * n + 2, norm="batch"), IMAGES),
    "resnet-fixup": (lambda n: cifar_resnet(6 * n + 2, norm="fixup"), IMAGES),
    "encoder": (lambda n: Encoder(n), SEQUENCE),
    "encoder-post": (lambda n: Encoder(n, pre=False), SEQUENCE),
    "decoder": (lambda n: Decoder(n), TOKENS),
    "decoder-parallel": (lambda n: Decoder(n, parallel=True, gated=True, tied=True), TOKENS),
    "llama": (lambda n: Llama(n), SEQUENCE),
    "mixer": (lambda n: Mixer(n), IMAGES),
    "convnext": (lambda n: ConvNeXt(n), IMAGES),
    "haiku-transformer": (lambda n: haiku_transformer(n), (TOKENS, jax.eval_shape(lambda: jax.random.key(0)))),
    "equinox-transformer": (lambda n: equinox(lambda key: EquinoxTransformer(key, layers=n)), TOKENS),
    "equinox-scan": (lambda n: equinox(lambda key: EquinoxTransformer(key, True, layers=n)), TOKENS),
}


@pytest.mark.parametrize("name", DEEPER)
def test_twice_the_depth_has_twice_the_branches(name: str) -> None:
    make, inputs = DEEPER[name]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    once, twice = (fi.structure(make(n), *inputs) for n in (2, 4))
    assert twice.num_branches == 2 * once.num_branches > 0

    def kinds(s: fi.Structure) -> list[Any]:
        return [(b.depth, b.order, b.skip != "projection") for b in s.branches for _ in range(b.repeats)]

    assert sorted(kinds(twice)) == sorted(2 * kinds(once))


class LinenMLP(nn.Module):
    """The Linen twin of `NNXMLP`."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = x + nn.Dense(16)(nn.relu(nn.Dense(64)(x)))
        return nn.Dense(3)(x)


class NNXMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([MLPBlock(rngs) for _ in range(3)])
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LinenTransformer(nn.Module):
    """The Linen twin of `NNXTransformer`."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(50, 32)
        x = table(tokens)
        for _ in range(2):
            drop = nn.Dropout(0.1, deterministic=False)
            y = nn.LayerNorm()(x)
            x = x + drop(nn.MultiHeadDotProductAttention(4)(y, mask=nn.make_causal_mask(x[..., 0])))
            x = x + drop(nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x)))))
        return table.attend(nn.LayerNorm()(x))


TWINS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Any]] = {
    "mlp": (LinenMLP, lambda: nnx.eval_shape(lambda: NNXMLP(NNX(0))), VECTORS),
    "transformer": (LinenTransformer, lambda: nnx.eval_shape(lambda: NNXTransformer(False, NNX(0))), TOKENS),
    **{name: (CASES[name].make, CASES[f"{name}-nnx"].make, IMAGES) for name in ("resnet20-v1", "resnet20-v2")},
}


@pytest.mark.parametrize("name", TWINS)
def test_linen_and_nnx_twins_are_alike(name: str) -> None:
    linen, module, inputs = TWINS[name]
    assert unnamed(fi.structure(linen(), inputs)) == unnamed(fi.structure(module(), inputs))


@over()
@pytest.mark.parametrize("normalization", ["kept", "removed"])
def test_a_plan_covers_every_parameter(case: Case, normalization: str) -> None:
    """Nothing in these models is left open, so that Fixup asks for no option."""
    s = reference(case)
    if normalization == "removed" and s.norms:
        s = fi.structure(case.make(), *case.inputs, normalization="removed")
    for scheme in ("fixup", "he_normal", "glorot_uniform", "lecun_normal"):
        plan = fi.schemes.find(scheme).plan(s)
        assert [(e.path, e.shape, e.dtype) for e in plan] == [(q.path, q.shape, q.dtype) for q in s.parameters]
        assert all(e.reason for e in plan)


MEASURED = ("squeeze-excite", "function", "s4d", "equinox-mlp", "lora")
# Branches that no parameter can bring to zero, or not without leaving them dead.
NEVER_ZERO = {
    "esrgan": "0.2 f(x) + x, where f is itself a chain of residuals: it holds x",
    "film": "a shift from the question is added at the end of the branch",
    "fnet": "a branch without parameters",
    "gin": "relu is last, and passes no gradient at zero",
    "tcn": "relu is last, and passes no gradient at zero",
}
# Streams that the model itself rescales.
RESCALED = {
    "deepnorm": "alpha x + f(x), alpha = sqrt(2)",
    "fnet": "its branches are not zero",
    "gin": "its branches are not zero, and sum over neighbours",
    "resnet20-v2": "shortcuts that pool and pad",
    "resnet20-v2-nnx": "shortcuts that pool and pad",
    "resnet56-v2": "shortcuts that pool and pad",
    "resnet56-v2-nnx": "shortcuts that pool and pad",
    "resnet110-v2": "shortcuts that pool and pad",
    "resnet110-v2-nnx": "shortcuts that pool and pad",
}
NOT_MEASURED = {
    "haiku-vqvae": "its code book is state, and zero here",
}


def first_sums(traced: tracing.Traced) -> list[int]:
    """For each residual the first of its stream: the one that others follow with no layer between."""
    graph = traced.graph
    sums = {graph.node_of[r.sum]: k for k, r in enumerate(traced.residuals)}
    first: list[int] = []
    for k, residual in enumerate(traced.residuals):
        node = residual.split if residual.skip != "projection" else graph.node_of[residual.sum]
        while node not in sums and node not in graph.layers and len(graph.parents[node]) == 1:
            (node,) = graph.parents[node]
        first.append(first[sums[node]] if sums.get(node, k) < k else k)
    return first


@over(MEASURED)
def test_under_fixup_branches_are_zero_and_streams_even(case: Case) -> None:
    """Normalizations disregarded; a projection's sum begins a stream of its own."""
    if case.name in NOT_MEASURED or not case.branches:
        pytest.skip(NOT_MEASURED.get(case.name, "no residual branches"))
    model = pure(case)
    plan = fi.plan(model, *case.inputs, normalization="removed")
    for e in plan:
        if e.distribution == "model":  # a Function has no initializers
            plan = plan.override(e.path, std=1.0 if e.role == "embedding" else 0.05)
    params = fi.init(model, jax.random.key(0), *case.inputs, scheme=plan, normalization="removed")
    rows = fi.analyze(model, params, *case.inputs, normalization="removed", probe="output").rows
    ends = [row.forward.second_moment for row in rows if row.kind == "branch"]
    assert ends and (not any(ends) or case.name in NEVER_ZERO)
    streams: dict[int, list[float]] = {}
    first = first_sums(tracing.trace(model, case.inputs, {}, "removed"))
    for row in rows:
        if row.kind == "sum":
            streams.setdefault(first[int(row.name.split()[1]) - 1], []).append(row.forward.second_moment)
    assert [row.forward.second_moment for row in rows if row.kind == "sum"][-1] > 0
    even = all(stream[0] / 4 <= value <= stream[0] * 4 for stream in streams.values() for value in stream)
    assert even != (case.name in RESCALED)
