"""Families of models in Haiku, Equinox and NNX, small, each with its structure worked out by hand from its source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from zoo import IMAGES, LARGE, TOKENS, VECTORS, Case
from zoo_language import GATED
from zoo_sequences import KEY
from zoo_vision import ATTENTION, MLP, branch, case

import fixup_init as fi


def haiku(forward: Callable[..., Any], *inputs: Any) -> fi.Function:
    """A Haiku function of arrays; its state is zero, and dropout takes its key as the last input."""
    transformed = hk.transform_with_state(forward)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(transformed.init, key, *inputs)
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state)

    def apply(params: Any, *inputs: Any) -> Any:
        return transformed.apply(params, state, None, *inputs)[0]

    return fi.Function(apply, params)


def haiku_resnet(v2: bool) -> fi.Function:
    """Haiku's own ResNet-50 (He et al. 2016)."""
    return haiku(lambda x: hk.nets.ResNet50(10, resnet_v2=v2)(x, is_training=True), LARGE)


def haiku_mobilenet() -> fi.Function:
    """Haiku's own MobileNet v1 (Howard et al. 2017)."""
    return haiku(lambda x: hk.nets.MobileNetV1((1, 2, 1), (16, 32, 32), 10)(x, is_training=True), IMAGES)


def haiku_transformer(layers: int = 2) -> fi.Function:
    """The language model of Haiku's examples: pre-norm, causal and padding mask, dropout."""

    def forward(tokens: Any, key: Any) -> Any:
        keys = iter(jax.random.split(key, 2 * layers))

        def norm(x: Any) -> Any:
            return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

        init = hk.initializers.VarianceScaling(1.0)
        n = tokens.shape[1]
        mask = (tokens != 0)[:, None, None] * np.tril(np.ones((1, 1, n, n)))
        h = hk.Embed(50, 32)(tokens) + hk.get_parameter("positions", [n, 32], init=init)
        for _ in range(layers):
            y = norm(h)
            y = hk.MultiHeadAttention(4, 8, model_size=32, w_init=init)(y, y, y, mask=mask)
            h = h + hk.dropout(next(keys), 0.1, y)
            y = hk.Sequential([hk.Linear(128, w_init=init), jax.nn.gelu, hk.Linear(32, w_init=init)])(norm(h))
            h = h + hk.dropout(next(keys), 0.1, y)
        return hk.Linear(50, name="head")(norm(h))

    return haiku(forward, TOKENS, KEY)


def haiku_recurrent(cell: Any) -> fi.Function:
    """A Haiku LSTM, whose one kernel takes input and state side by side, or GRU."""

    def forward(tokens: Any) -> Any:
        x, core = hk.Embed(50, 32)(tokens), cell(32)
        x, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return hk.Linear(50, name="head")(x)

    return haiku(forward, TOKENS)


def haiku_vqvae() -> fi.Function:
    """The residual stack of Haiku's VQ-VAE example (van den Oord et al. 2017), with its quantizer."""

    def forward(x: Any) -> Any:
        def stack(h: Any, name: str) -> Any:
            for k in range(2):
                y = hk.Conv2D(8, 3, name=f"{name}_res3x3_{k}")(jax.nn.relu(h))
                h = h + hk.Conv2D(16, 1, name=f"{name}_res1x1_{k}")(jax.nn.relu(y))
            return jax.nn.relu(h)

        h = jax.nn.relu(hk.Conv2D(8, 4, stride=2, name="stem")(x))
        h = jax.nn.relu(hk.Conv2D(16, 4, stride=2, name="enc_2")(h))
        z = hk.Conv2D(4, 1, name="to_vq")(stack(hk.Conv2D(16, 3, name="enc_3")(h), "enc"))
        z = hk.nets.VectorQuantizerEMA(4, 16, 0.25, 0.99)(z, is_training=True)["quantize"]
        h = stack(hk.Conv2D(16, 3, name="dec_1")(z), "dec")
        h = jax.nn.relu(hk.Conv2DTranspose(8, 4, stride=2, name="dec_2")(h))
        return hk.Conv2DTranspose(3, 4, stride=2, name="head")(h)

    return haiku(forward, IMAGES)


def equinox(make: Callable[[Any], Any], **vmap: Any) -> fi.Function:
    """An Equinox module of one example, over a batch."""
    model = eqx.filter_eval_shape(make, jax.random.key(0))
    params, static = eqx.partition(model, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def apply(params: Any, *inputs: Any) -> Any:
        return jax.vmap(eqx.combine(params, static), **vmap)(*inputs)

    return fi.Function(apply, params)


class EquinoxMLP(eqx.Module):
    """Residual blocks of two dense layers."""

    stem: eqx.nn.Linear
    blocks: list[eqx.nn.MLP]
    head: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        a, b, *rest = jax.random.split(key, 5)
        self.stem, self.head = eqx.nn.Linear(16, 24, key=a), eqx.nn.Linear(24, 3, key=b)
        self.blocks = [eqx.nn.MLP(24, 24, 48, 1, key=k) for k in rest]

    def __call__(self, x: Any) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class EquinoxBlock(eqx.Module):
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        a, b, c, d = jax.random.split(key, 4)
        self.norms = [eqx.nn.LayerNorm(32), eqx.nn.LayerNorm(32)]
        self.attention = eqx.nn.MultiheadAttention(4, 32, key=a)
        self.gate, self.up = eqx.nn.Linear(32, 64, key=b), eqx.nn.Linear(32, 64, key=c)
        self.down = eqx.nn.Linear(64, 32, key=d)

    def __call__(self, x: Any) -> Any:
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((x.shape[0],) * 2, bool)))

        def feed_forward(x: Any) -> Any:
            x = self.norms[1](x)
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

        return x + jax.vmap(feed_forward)(x)


class EquinoxTransformer(eqx.Module):
    """Pre-norm, causal, SwiGLU; its blocks in a list, or stacked and scanned over as in Equinox's documentation."""

    table: eqx.nn.Embedding
    blocks: Any
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    scanned: bool = eqx.field(static=True)

    def __init__(self, key: Any, scanned: bool = False, layers: int = 2) -> None:
        a, b, c = jax.random.split(key, 3)
        self.table, self.norm = eqx.nn.Embedding(50, 32, key=a), eqx.nn.LayerNorm(32)
        self.head = eqx.nn.Linear(32, 50, key=b)
        keys = jax.random.split(c, layers)
        self.blocks = eqx.filter_vmap(EquinoxBlock)(keys) if scanned else [EquinoxBlock(k) for k in keys]
        self.scanned = scanned

    def __call__(self, tokens: Any) -> Any:
        x = jax.vmap(self.table)(tokens)
        if self.scanned:
            stacked, static = eqx.partition(self.blocks, eqx.is_array)
            x, _ = jax.lax.scan(lambda x, p: (eqx.combine(p, static)(x), None), x, stacked)
        else:
            for block in self.blocks:
                x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


class EquinoxResNet(eqx.Module):
    """Convolutions, batch norm over a named axis, a projection where the width grows (He et al. 2016)."""

    stem: eqx.nn.Conv2d
    convs: list[list[eqx.nn.Conv2d]]
    norms: list[list[eqx.nn.BatchNorm]]
    head: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        keys = iter(jax.random.split(key, 16))

        def conv(n: int, m: int, size: int, stride: int = 1) -> Any:
            return eqx.nn.Conv2d(n, m, size, stride, padding=size // 2, use_bias=False, key=next(keys))

        widths = ((8, 8), (8, 16), (16, 16))
        self.stem, self.head = conv(3, 8, 3), eqx.nn.Linear(16, 10, key=next(keys))
        self.convs = [
            [conv(n, m, 3, m // n), conv(m, m, 3), *([conv(n, m, 1, m // n)] if n != m else [])] for n, m in widths
        ]
        self.norms = [[eqx.nn.BatchNorm(m, "batch", mode="batch") for _ in range(3)] for _, m in widths]

    def __call__(self, x: Any, state: Any) -> Any:
        x = self.stem(x)
        for (first, second, *projection), norms in zip(self.convs, self.norms, strict=True):
            y, state = norms[0](first(x), state)
            y, state = norms[1](second(jax.nn.relu(y)), state)
            for shortcut in projection:
                x, state = norms[2](shortcut(x), state)
            x = jax.nn.relu(x + y)
        return self.head(x.mean((1, 2))), state


def equinox_resnet() -> fi.Function:
    model, state = eqx.nn.make_with_state(EquinoxResNet)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params: Any, x: Any) -> Any:
        model = eqx.combine(params, static)
        x = x.transpose(0, 3, 1, 2)
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)[0]

    return fi.Function(apply, params)


class EquinoxGRU(eqx.Module):
    """A GRU cell scanned over a sequence; only its end is read."""

    table: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key: Any) -> None:
        a, b, c = jax.random.split(key, 3)
        self.table, self.cell = eqx.nn.Embedding(50, 32, key=a), eqx.nn.GRUCell(32, 24, key=b)
        self.head = eqx.nn.Linear(24, 3, key=c)

    def __call__(self, tokens: Any) -> Any:
        x = jax.vmap(self.table)(tokens)
        h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(24), x)
        return self.head(h)


class NNXBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(32, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.dropout(self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0])))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norms[1](x)))))


class NNXTransformer(nnx.Module):
    """A causal language model with dropout and a tied head."""

    def __init__(self, remat: bool, rngs: nnx.Rngs) -> None:
        self.remat = remat
        self.table = nnx.Embed(50, 32, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(32, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.table(tokens)
        for block in self.blocks:
            x = nnx.remat(NNXBlock.__call__)(block, x) if self.remat else block(x)
        return self.table.attend(self.norm(x))


class NNXInverted(nnx.Module):
    """Inverted bottlenecks (Sandler et al. 2018) with squeeze-and-excitation."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def conv(n: int, m: int, size: int = 1, groups: int = 1) -> Any:
            return nnx.Conv(n, m, (size, size), feature_group_count=groups, use_bias=False, rngs=rngs)

        self.stem = conv(3, 16, 3)
        self.convs = nnx.List([nnx.List([conv(16, 64), conv(64, 64, 3, 64), conv(64, 16)]) for _ in range(2)])
        self.gates = nnx.List([nnx.List([conv(64, 8), conv(8, 64)]) for _ in range(2)])
        self.norms = nnx.List([nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in (64, 64, 16)]) for _ in range(2)])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = self.stem(x)
        for convs, gates, norms in zip(self.convs, self.gates, self.norms, strict=True):
            y = nnx.relu6(norms[1](convs[1](nnx.relu6(norms[0](convs[0](x))))))
            y = y * nnx.sigmoid(gates[1](nnx.relu(gates[0](y.mean((1, 2), keepdims=True)))))
            x = x + norms[2](convs[2](y))
        return self.head(x.mean((1, 2)))


class NNXRecurrent(nnx.Module):
    """An LSTM and a GRU, unrolled by `nnx.RNN`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table, self.head = nnx.Embed(50, 32, rngs=rngs), nnx.Linear(16, 50, rngs=rngs)
        self.cells = nnx.List(
            [nnx.RNN(nnx.OptimizedLSTMCell(32, 24, rngs=rngs)), nnx.RNN(nnx.GRUCell(24, 16, rngs=rngs))]
        )

    def __call__(self, tokens: Any) -> Any:
        x = self.table(tokens)
        for cell in self.cells:
            x = cell(x)
        return self.head(x)


def _bottlenecks(order: float) -> tuple[tuple[int, float, str], ...]:
    return tuple((3, order, "projection" if k in (0, 3, 7, 13) else "identity") for k in range(16))


RESNET = branch(2, 0.0) + branch(2, 0.0, "projection") + branch(2, 0.0)
NNX = nnx.Rngs

FRAMEWORKS: tuple[Case, ...] = (
    case("haiku-resnet50-v1", lambda: haiku_resnet(False), (LARGE,), _bottlenecks(0.0), 1 + 16 * 3 + 4,
         "res_net50/~/initial_conv/w", "res_net50/~/logits/w"),
    case("haiku-resnet50-v2", lambda: haiku_resnet(True), (LARGE,), _bottlenecks(1.0), 16 * 3 + 1,
         "res_net50/~/initial_conv/w", "res_net50/~/logits/w"),
    case("haiku-mobilenet-v1", haiku_mobilenet, (IMAGES,), (), 1 + 3 * 2, "mobile_net_v1/conv2_d/w",
         "mobile_net_v1/logits/w"),
    case("haiku-transformer", haiku_transformer, (TOKENS, KEY), (ATTENTION + MLP) * 2, 5, "embed/embeddings",
         "head/w"),
    case("haiku-lstm", lambda: haiku_recurrent(hk.LSTM), (TOKENS,), (), 0, "embed/embeddings", "head/w"),
    case("haiku-gru", lambda: haiku_recurrent(hk.GRU), (TOKENS,), (), 0, "embed/embeddings", "head/w"),
    # Straight-through: z + stop_gradient(quantized - z) is no residual.
    case("haiku-vqvae", haiku_vqvae, (IMAGES,), MLP * 4, 0, "stem/w", "head/w"),
    case("equinox-mlp", lambda: equinox(EquinoxMLP), (VECTORS,), MLP * 3, 0, "stem/weight", "head/weight"),
    case("equinox-transformer", lambda: equinox(EquinoxTransformer), (TOKENS,), (ATTENTION + GATED) * 2, 5,
         "table/weight", "head/weight"),
    Case("equinox-scan", lambda: equinox(lambda key: EquinoxTransformer(key, True)), (TOKENS,), 4, ATTENTION + GATED,
         3, "table/weight", "head/weight"),
    case("equinox-resnet", equinox_resnet, (IMAGES,), RESNET, 7, "stem/weight", "head/weight"),
    case("equinox-gru", lambda: equinox(EquinoxGRU), (TOKENS,), (), 0, "table/weight", "head/weight"),
    case("nnx-transformer", lambda: nnx.eval_shape(lambda: NNXTransformer(False, NNX(0))), (TOKENS,),
         (ATTENTION + MLP) * 2, 5, "table/embedding", "table/embedding"),
    case("nnx-transformer-remat", lambda: NNXTransformer(True, NNX(0)), (TOKENS,), (ATTENTION + MLP) * 2, 5,
         "table/embedding", "table/embedding"),
    case("nnx-inverted", lambda: nnx.eval_shape(lambda: NNXInverted(NNX(0))), (IMAGES,), branch(5, 0.0) * 2, 6),
    case("nnx-recurrent", lambda: NNXRecurrent(NNX(0)), (TOKENS,), (), 0, "table/embedding"),
)  # fmt: skip
