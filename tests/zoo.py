"""One table of models that properties run over: each with its structure worked out by hand from its source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import fixup_init as fi
from fixup_init.models import resnet_nnx
from fixup_init.models.resnet import cifar_resnet, imagenet_resnet

IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
LARGE = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
SEQUENCE = jax.ShapeDtypeStruct((2, 12, 32), jnp.float32)
MEMORY = jax.ShapeDtypeStruct((2, 9, 32), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 12), jnp.int32)
TIMES = jax.ShapeDtypeStruct((2, 8), jnp.float32)
VECTORS = jax.ShapeDtypeStruct((8, 16), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its inputs, and what `fi.structure` must find."""

    name: str
    make: Callable[[], Any]
    inputs: tuple[Any, ...]
    L: int
    branches: tuple[tuple[int, float, str], ...]  # (depth, order, skip) of each; a scan body's stand once
    norms: int
    stem: str | None
    head: str | None
    projections: int = 0


class Encoder(nn.Module):
    """A transformer encoder (Vaswani et al. 2017), layer norm before or after, maybe with cross-attention."""

    layers: int = 2
    pre: bool = True

    @nn.compact
    def __call__(self, x: Any, memory: Any = None) -> Any:
        for _ in range(self.layers):
            x = self.add(x, lambda y: nn.MultiHeadDotProductAttention(4)(y, y))
            if memory is not None:
                x = self.add(x, lambda y: nn.MultiHeadDotProductAttention(4)(y, memory))
            x = self.add(x, lambda y: nn.Dense(32)(nn.gelu(nn.Dense(128)(y))))
        return nn.Dense(10)(x.mean(1))

    def add(self, x: Any, branch: Callable[[Any], Any]) -> Any:
        return x + branch(nn.LayerNorm()(x)) if self.pre else nn.LayerNorm()(x + branch(x))


class Decoder(nn.Module):
    """A causal language model; parallel attention and feed-forward (GPT-J), SwiGLU (Shazeer 2020), tied head."""

    layers: int = 2
    parallel: bool = False
    gated: bool = False
    tied: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(50, 32, name="table")
        x = table(tokens) + self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], 32))
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            y = nn.RMSNorm()(x)
            attended = nn.MultiHeadDotProductAttention(4)(y, y, mask=mask)
            if not self.parallel:
                x = x + attended
                y = nn.RMSNorm()(x)
            hidden = nn.relu(nn.Dense(64)(y)) if not self.gated else nn.Dense(64)(y) * nn.silu(nn.Dense(64)(y))
            fed = nn.Dense(32)(hidden)
            x = x + attended + fed if self.parallel else x + fed
        x = nn.RMSNorm()(x)
        return table.attend(x) if self.tied else nn.Dense(50, name="head")(x)


class SqueezeExcite(nn.Module):
    """Residual blocks with a squeeze-and-excite gate (Hu et al. 2018)."""

    layers: int = 2

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(16, (3, 3))(x)
        for _ in range(self.layers):
            y = nn.Conv(16, (3, 3))(nn.relu(nn.Conv(16, (3, 3))(x)))
            gate = nn.sigmoid(nn.Dense(16)(nn.relu(nn.Dense(4)(y.mean((1, 2))))))
            x = x + y * gate[:, None, None]
        return nn.Dense(10)(x.mean((1, 2)))


class Recurrent(nn.Module):
    """Gates are no residual branches: LSTM with gates apart and fused, GRU."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32)(tokens)
        x = nn.RNN(nn.LSTMCell(32))(x)
        x = nn.RNN(nn.OptimizedLSTMCell(32))(x)
        x = nn.RNN(nn.GRUCell(32))(x)
        return nn.Dense(50)(x)


class Highway(nn.Module):
    """t h + (1 - t) x (Srivastava et al. 2015): both terms are gated."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            t = nn.sigmoid(nn.Dense(16)(x))
            x = t * nn.relu(nn.Dense(16)(x)) + (1 - t) * x
        return nn.Dense(3)(x)


class TimeConditioned(nn.Module):
    """Residual blocks of a diffusion network: the time embedding enters inside the branch."""

    @nn.compact
    def __call__(self, x: Any, t: Any) -> Any:
        e = nn.silu(nn.Dense(32, name="time")(t))
        h = nn.Conv(16, (3, 3), name="stem")(x)
        for _ in range(2):
            y = nn.Conv(16, (3, 3))(nn.silu(nn.GroupNorm(4)(h))) + nn.Dense(16)(e)[:, None, None]
            h = h + nn.Conv(16, (3, 3))(nn.silu(nn.GroupNorm(4)(y)))
        return nn.Conv(3, (3, 3), name="head")(h)


class Plain(nn.Module):
    """No residual at all (VGG's form)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for width in (16, 32):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1))))


class Autoencoder(nn.Module):
    """Variational, with reparameterized noise: mean + noise * deviation is no residual."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(nn.Dense(32)(x))
        mean, logarithm = nn.Dense(8)(h), nn.Dense(8)(h)
        z = mean + jnp.exp(0.5 * logarithm) * jax.random.normal(self.make_rng("noise"), mean.shape)
        return nn.Dense(16)(nn.relu(nn.Dense(32)(z)))


class DenseBlocks(nn.Module):
    """Concatenation skips (Huang et al. 2017) are no sums."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(3):
            x = jnp.concatenate([x, nn.Conv(8, (3, 3))(nn.relu(nn.GroupNorm(4)(x)))], -1)
        return nn.Dense(10)(x.mean((1, 2)))


class PoolMixer(nn.Module):
    """A branch without weights that mixes (PoolFormer, Yu et al. 2022)."""

    layers: int = 2

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(16, (4, 4), (4, 4))(x)
        for _ in range(self.layers):
            y = nn.GroupNorm(1)(x)
            x = x + (nn.avg_pool(y, (3, 3), (1, 1), "SAME") - y)
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(64)(nn.GroupNorm(1)(x))))
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """Depthwise convolution, layer norm, two dense layers, LayerScale (Liu et al. 2022)."""

    layers: int = 3

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.LayerNorm()(nn.Conv(32, (4, 4), (4, 4))(x))
        for k in range(self.layers):
            y = nn.LayerNorm()(nn.Conv(32, (7, 7), feature_group_count=32)(x))
            y = nn.Dense(32)(nn.gelu(nn.Dense(128)(y)))
            x = x + y * self.param(f"scale{k}", nn.initializers.constant(1e-6), (32,))
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class ResponseNormalized(nn.Module):
    """ConvNeXt V2 (Woo et al. 2023): global response normalization, x + gamma x n(x) + beta, adds nothing to x."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(32, (4, 4), (4, 4))(x)
        for k in range(3):
            y = nn.gelu(nn.Dense(128)(nn.LayerNorm()(nn.Conv(32, (7, 7), feature_group_count=32)(x))))
            size = jnp.linalg.norm(y, axis=(1, 2), keepdims=True)
            gamma = self.param(f"gamma{k}", nn.initializers.zeros, (128,))
            beta = self.param(f"beta{k}", nn.initializers.zeros, (128,))
            y = y + gamma * (y * (size / (size.mean(-1, keepdims=True) + 1e-6))) + beta
            x = x + nn.Dense(32)(y)
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class StandardizedConv(nn.Module):
    """A convolution whose kernel is standardized (Brock et al. 2021)."""

    features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        w = self.param("w", nn.initializers.lecun_normal(), (3, 3, x.shape[-1], self.features))
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        mean, variance, n = w.mean((0, 1, 2)), w.var((0, 1, 2)), w[..., 0].size
        w = (w - mean) * jax.lax.rsqrt(jnp.maximum(variance * n, 1e-4)) * gain
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class NFNet(nn.Module):
    """Standardized kernels, squeeze-and-excite, and a multiplier that starts at zero."""

    layers: int = 3

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = StandardizedConv(16)(x)
        for k in range(self.layers):
            y = StandardizedConv(16)(nn.relu(StandardizedConv(16)(nn.relu(x) * 1.71)) * 1.71)
            gate = nn.sigmoid(nn.Dense(16)(nn.relu(nn.Dense(4)(y.mean((1, 2))))))
            x = x + 0.2 * (y * gate[:, None, None] * 2) * self.param(f"skip{k}", nn.initializers.zeros, ())
        return nn.Dense(10, name="head")(nn.relu(x).mean((1, 2)))


class Experts(nn.Module):
    """Soft mixtures of experts: inside a branch, and as a sum of its own, which is none."""

    residual: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        gates = nn.softmax(nn.Dense(2)(x))
        if not self.residual:
            return nn.Dense(5, name="head")(gates[..., :1] * nn.Dense(32)(x) + gates[..., 1:] * nn.Dense(32)(x))
        experts = jnp.stack([nn.Dense(32)(nn.relu(nn.Dense(64)(x))) for _ in range(2)], -1)
        return nn.Dense(5, name="head")(x + jnp.einsum("bsde,bse->bsd", experts, gates))


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021)."""

    layers: int = 2

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(32, (8, 8), (8, 8))(x).reshape(x.shape[0], -1, 32)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(64)(y))).swapaxes(1, 2)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(1))


class Conformer(nn.Module):
    """Half-step feed-forward, attention, gated convolution with batch norm (Gulati et al. 2020)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def feed_forward(x: Any) -> Any:
            return nn.Dense(32)(nn.silu(nn.Dense(128)(nn.LayerNorm()(x))))

        x = x + 0.5 * feed_forward(x)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(4)(y, y)
        a, b = jnp.split(nn.Dense(64)(nn.LayerNorm()(x)), 2, -1)
        y = nn.Conv(32, (7,), feature_group_count=32)(a * nn.sigmoid(b))
        x = x + nn.Dense(32)(nn.silu(nn.BatchNorm(use_running_average=False)(y)))
        x = x + 0.5 * feed_forward(x)
        return nn.Dense(10, name="head")(nn.LayerNorm()(x))


class Discriminator(nn.Module):
    """Scaled residuals with a projection (StyleGAN2)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.leaky_relu(nn.Conv(16, (1, 1))(x), 0.2)
        for features in (32, 64):
            y = nn.leaky_relu(nn.Conv(x.shape[-1], (3, 3))(x), 0.2)
            y = nn.leaky_relu(nn.Conv(features, (3, 3), (2, 2))(y), 0.2)
            x = (y + nn.Conv(features, (1, 1), (2, 2), use_bias=False)(x)) / jnp.sqrt(2.0)
        return nn.Dense(1, name="head")(x.reshape(x.shape[0], -1))


class Llama(nn.Module):
    """RMS norm, rotary embedding, query-key norm, grouped queries, SwiGLU."""

    layers: int = 2

    @nn.compact
    def __call__(self, x: Any) -> Any:
        angles = jnp.arange(x.shape[1])[:, None] * jnp.exp(-jnp.arange(4) / 4.0)
        cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

        def rotate(t: Any) -> Any:
            a, b = jnp.split(t, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        x = nn.Dense(32, name="stem")(x)
        for _ in range(self.layers):
            y = nn.RMSNorm()(x)
            q, k, v = (nn.DenseGeneral((heads, 8), use_bias=False)(y) for heads in (4, 2, 2))
            q, k = nn.RMSNorm()(rotate(q)), jnp.repeat(nn.RMSNorm()(rotate(k)), 2, 2)
            weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(v, 2, 2))
            x = x + nn.DenseGeneral(32, axis=(-2, -1), use_bias=False)(y)
            y = nn.RMSNorm()(x)
            x = x + nn.Dense(32)(nn.silu(nn.Dense(64)(y)) * nn.Dense(64)(y))
        return nn.Dense(5, name="head")(x)


class MobileNet(nn.Module):
    """Inverted bottlenecks with batch norm and relu6 (Sandler et al. 2018)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def conv(x: Any, features: int, size: int = 1, stride: int = 1, groups: int = 1) -> Any:
            x = nn.Conv(features, (size, size), (stride, stride), feature_group_count=groups, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=False)(x)

        x = nn.relu6(conv(x, 16, 3))
        for stride, features in ((1, 16), (2, 24), (1, 24)):
            y = nn.relu6(conv(x, 6 * x.shape[-1]))
            y = conv(nn.relu6(conv(y, y.shape[-1], 3, stride, y.shape[-1])), features)
            x = x + y if x.shape == y.shape else y
        return nn.Dense(10)(x.mean((1, 2)))


class StochasticDepth(nn.Module):
    """Branches that are dropped at random (Huang et al. 2016), in a network that shares its layers over depth."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm, up, down = nn.LayerNorm(), nn.Dense(64, name="up"), nn.Dense(32, name="down")
        for _ in range(3):
            keep = jax.random.bernoulli(self.make_rng("dropout"), 0.8, (x.shape[0], 1, 1))
            x = x + jnp.where(keep, down(nn.gelu(up(norm(x)))) / 0.8, 0.0)
        return nn.Dense(3, name="head")(x)


class MLPBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.down = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.down(nnx.relu(self.up(x)))


class Stacked(nnx.Module):
    """NNX blocks in a list, or stacked with nnx.vmap and run by nnx.scan."""

    def __init__(self, scanned: bool, rngs: nnx.Rngs) -> None:
        self.scanned = scanned
        if scanned:
            self.blocks = nnx.vmap(lambda r: MLPBlock(r), in_axes=0, out_axes=0)(rngs.split(4))
        else:
            self.blocks = nnx.List([MLPBlock(rngs) for _ in range(4)])
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        if self.scanned:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(x)


def plain_function() -> fi.Function:
    """A pre-activation residual network in plain JAX."""

    def apply(params: Any, x: Any) -> Any:
        x = x @ params["in"]
        for w1, w2 in params["blocks"]:
            x = x + jnp.tanh(jax.nn.relu(x) @ w1) @ w2
        return x @ params["out"]

    def w(n: int, m: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, m), jnp.float32)

    params = {"in": w(16, 24), "blocks": [(w(24, 48), w(48, 24)) for _ in range(5)], "out": w(24, 3)}
    return fi.Function(apply, params)


def _resnets() -> list[Case]:
    cases = []
    for depth, n in ((20, 3), (56, 9), (110, 18)):
        for pre in (False, True):
            v = "v2" if pre else "v1"
            skips = ["reshape" if k in (n, 2 * n) else "identity" for k in range(3 * n)]
            order = 1.0 if pre else 0.0
            norms = 6 * n + 1
            branches = tuple((2, order, s) for s in skips)
            cases.append(
                Case(f"resnet{depth}-{v}", lambda d=depth, p=pre: cifar_resnet(d, norm="batch", preactivation=p),
                     (IMAGES,), 3 * n, branches, norms, "conv1/kernel", "fc/kernel")
            )  # fmt: skip
            cases.append(
                Case(f"resnet{depth}-{v}-nnx",
                     lambda d=depth, p=pre: nnx.eval_shape(
                         lambda: resnet_nnx.cifar_resnet(d, "batch", preactivation=p, rngs=nnx.Rngs(0))),
                     (IMAGES,), 3 * n, branches, norms, "conv1/kernel", "fc/kernel")
            )  # fmt: skip
    for pre in (False, True):
        v = "v2" if pre else "v1"
        skips = ["projection" if k in (0, 3, 7, 13) else "identity" for k in range(16)]
        branches = tuple((3, 1.0 if pre else 0.0, s) for s in skips)
        norms = 16 * 3 + 1 + (0 if pre else 4)
        cases.append(
            Case(f"resnet50-{v}", lambda p=pre: imagenet_resnet(50, norm="batch", preactivation=p), (LARGE,), 16,
                 branches, norms, "conv1/kernel", "fc/kernel", projections=4)
        )  # fmt: skip
        cases.append(
            Case(f"resnet50-{v}-nnx",
                 lambda p=pre: nnx.eval_shape(
                     lambda: resnet_nnx.imagenet_resnet(50, "batch", preactivation=p, rngs=nnx.Rngs(0))),
                 (LARGE,), 16, branches, norms, "conv1/kernel", "fc/kernel", projections=4)
        )  # fmt: skip
    return cases


ATTENTION, MLP, GATED = (2, 2.0, "identity"), (2, 2.0, "identity"), (2, 3.0, "identity")

ZOO: tuple[Case, ...] = (
    *_resnets(),
    Case("resnet110-fixup", lambda: cifar_resnet(110, norm="fixup"), (IMAGES,), 54,
         tuple((2, 2.0, "reshape" if k in (18, 36) else "identity") for k in range(54)), 0, "conv1/kernel",
         "fc/kernel"),
    Case("resnet50-fixup", lambda: imagenet_resnet(50, norm="fixup"), (LARGE,), 16,
         tuple((3, 3.0, "projection" if k in (0, 3, 7, 13) else "identity") for k in range(16)), 0, "conv1/kernel",
         "fc/kernel", projections=4),
    *(Case(f"resnet20-{norm}", lambda n=norm: cifar_resnet(20, norm=n), (IMAGES,), 9,
           tuple((2, 0.0, "reshape" if k in (3, 6) else "identity") for k in range(9)), 19, "conv1/kernel", "fc/kernel")
      for norm in ("group", "instance", "layer")),
    Case("encoder-pre", lambda: Encoder(), (SEQUENCE,), 4, (ATTENTION, MLP) * 2, 4, None, "Dense_4/kernel"),
    Case("encoder-post", lambda: Encoder(pre=False), (SEQUENCE,), 4, (ATTENTION, MLP) * 2, 4, None, "Dense_4/kernel"),
    Case("cross-attention", lambda: Encoder(), (SEQUENCE, MEMORY), 6, (ATTENTION, ATTENTION, MLP) * 2, 6, None,
         "Dense_4/kernel"),
    Case("decoder", lambda: Decoder(), (TOKENS,), 4, (ATTENTION, MLP) * 2, 5, "table/embedding", "head/kernel"),
    Case("decoder-parallel", lambda: Decoder(parallel=True), (TOKENS,), 4, (ATTENTION, MLP) * 2, 3, "table/embedding",
         "head/kernel"),
    Case("decoder-gated", lambda: Decoder(gated=True), (TOKENS,), 4, (ATTENTION, GATED) * 2, 5, "table/embedding",
         "head/kernel"),
    Case("decoder-tied", lambda: Decoder(tied=True), (TOKENS,), 4, (ATTENTION, MLP) * 2, 5, "table/embedding",
         "table/embedding"),
    Case("squeeze-excite", lambda: SqueezeExcite(), (IMAGES,), 2, ((4, 2.0, "identity"),) * 2, 0, "Conv_0/kernel",
         "Dense_4/kernel"),
    Case("recurrent", lambda: Recurrent(), (TOKENS,), 0, (), 0, "Embed_0/embedding", "Dense_0/kernel"),
    Case("highway", lambda: Highway(), (VECTORS,), 0, (), 0, "Dense_0/kernel", "Dense_6/kernel"),
    Case("time-conditioned", lambda: TimeConditioned(), (IMAGES, TIMES), 2, ((2, 1.0, "identity"),) * 2, 4,
         "stem/kernel", "head/kernel"),
    Case("plain", lambda: Plain(), (IMAGES,), 0, (), 0, "Conv_0/kernel", "Dense_0/kernel"),
    Case("autoencoder", lambda: Autoencoder(), (VECTORS,), 0, (), 0, "Dense_0/kernel", "Dense_3/kernel"),
    Case("densenet", lambda: DenseBlocks(), (IMAGES,), 0, (), 3, "Conv_0/kernel", "Dense_0/kernel"),
    Case("poolformer", lambda: PoolMixer(), (IMAGES,), 4, ((0, 0.0, "identity"), (2, 2.0, "identity")) * 2, 4,
         "Conv_0/kernel", "Dense_4/kernel"),
    Case("convnext-v2", lambda: ResponseNormalized(), (IMAGES,), 3, ((3, 2.0, "identity"),) * 3, 7, "Conv_0/kernel",
         "Dense_6/kernel"),
    Case("convnext", lambda: ConvNeXt(), (IMAGES,), 3, ((3, 2.0, "identity"),) * 3, 5, "Conv_0/kernel",
         "Dense_6/kernel"),
    Case("nfnet", lambda: NFNet(), (IMAGES,), 3, ((4, 0.0, "identity"),) * 3, 0, "StandardizedConv_0/w", "head/kernel"),
    Case("experts", lambda: Experts(True), (SEQUENCE,), 1, ((2, 2.0, "identity"),), 0, None, "head/kernel"),
    Case("mixture", lambda: Experts(False), (SEQUENCE,), 0, (), 0, "Dense_0/kernel", "head/kernel"),
    Case("mixer", lambda: Mixer(), (IMAGES,), 4, (MLP,) * 4, 5, "Conv_0/kernel", "head/kernel"),
    Case("conformer", lambda: Conformer(), (SEQUENCE,), 4, (MLP, ATTENTION, (3, 1.0, "identity"), MLP), 6, None,
         "head/kernel"),
    Case("discriminator", lambda: Discriminator(), (IMAGES,), 2, ((2, 2.0, "projection"),) * 2, 0, "Conv_0/kernel",
         "head/kernel", projections=2),
    Case("llama", lambda: Llama(), (SEQUENCE,), 4, (ATTENTION, GATED) * 2, 8, "stem/kernel", "head/kernel"),
    Case("mobilenet-v2", lambda: MobileNet(), (IMAGES,), 2, ((3, 0.0, "identity"),) * 2, 10, "Conv_0/kernel",
         "Dense_0/kernel"),
    Case("shared-depth", lambda: StochasticDepth(), (SEQUENCE,), 3, (MLP,) * 3, 3, None, "head/kernel"),
    Case("nnx-list", lambda: Stacked(False, nnx.Rngs(0)), (VECTORS,), 4, (MLP,) * 4, 0, None, "head/kernel"),
    Case("nnx-scan", lambda: Stacked(True, nnx.Rngs(0)), (VECTORS,), 4, (MLP,), 0, None, "head/kernel"),
    Case("function", plain_function, (VECTORS,), 5, (MLP,) * 5, 0, "in", "out"),
)  # fmt: skip
