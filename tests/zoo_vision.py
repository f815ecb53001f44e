"""Families of vision models, small, each with its structure worked out by hand from its paper or reference source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from zoo import IMAGES, MEMORY, Case, StandardizedConv

LABELS = jax.ShapeDtypeStruct((2,), jnp.int32)
STEPS = jax.ShapeDtypeStruct((2,), jnp.float32)
LATENTS = jax.ShapeDtypeStruct((2, 24), jnp.float32)


def conv(x: Any, features: int, size: int = 3, stride: int = 1, groups: int = 1, name: str | None = None) -> Any:
    return nn.Conv(
        features, (size, size), (stride, stride), feature_group_count=groups, use_bias=False, name=name
    )(x)  # fmt: skip


def bn(x: Any) -> Any:
    return nn.BatchNorm(use_running_average=False)(x)


def depthwise(x: Any, size: int = 3, stride: int = 1) -> Any:
    return conv(x, x.shape[-1], size, stride, x.shape[-1])


def squeeze(x: Any, hidden: int, act: Any = nn.relu, gate: Any = nn.sigmoid) -> Any:
    return x * gate(nn.Conv(x.shape[-1], (1, 1))(act(nn.Conv(hidden, (1, 1))(x.mean((1, 2), keepdims=True)))))


def double(x: Any) -> Any:
    """Twice as large, by nearest neighbours."""
    return x.repeat(2, 1).repeat(2, 2)


def classify(x: Any) -> Any:
    return nn.Dense(10, name="head")(x.mean((1, 2)))


class ResNeXt(nn.Module):
    """Grouped bottlenecks, a projection at the start of each stage (Xie et al. 2017)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(bn(conv(x, 16, name="stem")))
        for features, stride in ((32, 1), (32, 1), (64, 2), (64, 1)):
            y = nn.relu(bn(conv(x, features // 2, 1)))
            y = nn.relu(bn(conv(y, features // 2, 3, stride, groups=4)))
            y = bn(conv(y, features, 1))
            if x.shape != y.shape:
                x = bn(conv(x, features, 1, stride))
            x = nn.relu(x + y)
        return classify(x)


class Xception(nn.Module):
    """Separable convolutions, a pooled branch beside a projection, then identity blocks (Chollet 2017)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def separable(x: Any, features: int) -> Any:
            return bn(conv(depthwise(x), features, 1))

        x = nn.relu(bn(conv(x, 16, stride=2, name="stem")))
        y = separable(nn.relu(separable(x, 24)), 24)
        x = nn.max_pool(y, (3, 3), (2, 2), "SAME") + bn(conv(x, 24, 1, 2))
        for _ in range(2):
            y = x
            for _ in range(3):
                y = separable(nn.relu(y), 24)
            x = x + y
        return classify(nn.relu(x))


class RegNetY(nn.Module):
    """Grouped bottlenecks of ratio 1 with squeeze-and-excitation (Radosavovic et al. 2020)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(bn(conv(x, 16, stride=2, name="stem")))
        for features, stride in ((24, 2), (24, 1), (56, 2)):
            y = nn.relu(bn(conv(x, features, 1)))
            y = nn.relu(bn(conv(y, features, 3, stride, groups=features // 8)))
            y = bn(conv(squeeze(y, x.shape[-1] // 4), features, 1))
            if x.shape != y.shape:
                x = bn(conv(x, features, 1, stride))
            x = nn.relu(x + y)
        return classify(x)


class WideResNet(nn.Module):
    """WRN-16-4 of an eighth the width, dropout between convolutions (Zagoruyko & Komodakis 2016)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = conv(x, 2, name="stem")
        for width, stride in ((8, 1), (8, 1), (16, 2), (16, 1), (32, 2), (32, 1)):
            y = nn.relu(bn(x))
            if x.shape[-1] != width:
                x = conv(y, width, 1, stride)
            y = nn.relu(bn(conv(y, width, 3, stride)))
            x = x + conv(nn.Dropout(0.3, deterministic=False)(y), width)
        return classify(nn.relu(bn(x)))


class VGG(nn.Module):
    """Plain convolutions with batch norm, dense layers with dropout (Simonyan & Zisserman 2015)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for k, widths in enumerate(((8,), (16,), (32, 32))):
            for j, width in enumerate(widths):
                x = nn.relu(bn(nn.Conv(width, (3, 3), name=f"conv{k}_{j}")(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.Dropout(0.5, deterministic=False)(nn.relu(nn.Dense(32)(x)))
        return nn.Dense(10, name="head")(x)


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions, no residual (Howard et al. 2017)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(bn(conv(x, 8, stride=2, name="stem")))
        for features, stride in ((16, 1), (32, 2), (32, 1)):
            x = nn.relu(bn(depthwise(x, 3, stride)))
            x = nn.relu(bn(conv(x, features, 1)))
        return classify(x)


class MobileNetV3(nn.Module):
    """Inverted bottlenecks with hard swish and a hard sigmoid gate (Howard et al. 2019), rows of V3-Small."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.hard_swish(bn(conv(x, 16, stride=2, name="stem")))
        for size, expanded, features, gated, act, stride in (
            (3, 16, 16, True, nn.relu, 2),
            (3, 72, 24, False, nn.relu, 2),
            (3, 88, 24, False, nn.relu, 1),
            (5, 96, 40, True, nn.hard_swish, 2),
            (5, 240, 40, True, nn.hard_swish, 1),
            (5, 240, 40, True, nn.hard_swish, 1),
        ):
            y = act(bn(conv(x, expanded, 1))) if expanded != x.shape[-1] else x
            y = act(bn(depthwise(y, size, stride)))
            if gated:
                y = squeeze(y, expanded // 4, gate=nn.hard_sigmoid)
            y = bn(conv(y, features, 1))
            x = x + y if x.shape == y.shape else y
        x = nn.hard_swish(bn(conv(x, 240, 1))).mean((1, 2))
        return nn.Dense(10, name="head")(nn.hard_swish(nn.Dense(64)(x)))


class EfficientNet(nn.Module):
    """MBConv with swish, squeeze-and-excitation and drop path (Tan & Le 2019)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.swish(bn(conv(x, 16, stride=2, name="stem")))
        for ratio, size, features, stride in ((1, 3, 8, 1), (6, 3, 16, 2), (6, 3, 16, 1), (6, 5, 24, 2), (6, 5, 24, 1)):
            y = nn.swish(bn(conv(x, ratio * x.shape[-1], 1))) if ratio > 1 else x
            y = nn.swish(bn(depthwise(y, size, stride)))
            y = bn(conv(squeeze(y, max(1, x.shape[-1] // 4), nn.swish), features, 1))
            if x.shape == y.shape:
                keep = jnp.floor(0.8 + jax.random.uniform(self.make_rng("dropout"), (x.shape[0], 1, 1, 1)))
                y = x + y / 0.8 * keep
            x = y
        return classify(nn.swish(bn(conv(x, 96, 1))))


class DenseNetBC(nn.Module):
    """Bottleneck layers whose outputs are concatenated, compressing transitions (Huang et al. 2017)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = conv(x, 16, name="stem")
        for block in range(2):
            for _ in range(2):
                y = conv(nn.relu(bn(x)), 32, 1)
                x = jnp.concatenate([x, conv(nn.relu(bn(y)), 8)], -1)
            if block == 0:
                x = nn.avg_pool(conv(nn.relu(bn(x)), x.shape[-1] // 2, 1), (2, 2), (2, 2))
        return classify(nn.relu(bn(x)))


class Inception(nn.Module):
    """Parallel convolutions and a pooling, concatenated (Szegedy et al. 2015), with batch norm."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def unit(x: Any, features: int, size: int) -> Any:
            return nn.relu(bn(conv(x, features, size)))

        x = nn.relu(bn(conv(x, 16, stride=2, name="stem")))
        for _ in range(2):
            pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME")
            x = jnp.concatenate(
                [unit(x, 8, 1), unit(unit(x, 8, 1), 16, 3), unit(unit(x, 4, 1), 8, 5), unit(pooled, 8, 1)], -1
            )
        return classify(x)


def shuffle(x: Any, groups: int) -> Any:
    b, h, w, c = x.shape
    return x.reshape(b, h, w, groups, c // groups).swapaxes(3, 4).reshape(b, h, w, c)


class ShuffleNetV1(nn.Module):
    """Grouped pointwise convolutions with a channel shuffle, residual or concatenated (Zhang et al. 2018)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(bn(conv(x, 12, stride=2, name="stem")))
        for stride in (2, 1, 1):
            features = x.shape[-1]
            y = shuffle(nn.relu(bn(conv(x, 12, 1, groups=3))), 3)
            y = bn(conv(bn(depthwise(y, 3, stride)), features, 1, groups=3))
            if stride == 1:
                x = nn.relu(x + y)
            else:
                x = nn.relu(jnp.concatenate([nn.avg_pool(x, (3, 3), (2, 2), "SAME"), y], -1))
        return classify(x)


class ShuffleNetV2(nn.Module):
    """Channels are split, half of them pass, the halves are concatenated and shuffled (Ma et al. 2018)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def right(x: Any, features: int, stride: int) -> Any:
            y = bn(depthwise(nn.relu(bn(conv(x, features, 1))), 3, stride))
            return nn.relu(bn(conv(y, features, 1)))

        x = nn.max_pool(nn.relu(bn(conv(x, 8, stride=2, name="stem"))), (3, 3), (2, 2), "SAME")
        left = nn.relu(bn(conv(bn(depthwise(x, 3, 2)), 12, 1)))
        x = shuffle(jnp.concatenate([left, right(x, 12, 2)], -1), 2)
        for _ in range(2):
            left, y = jnp.split(x, 2, -1)
            x = shuffle(jnp.concatenate([left, right(y, 12, 1)], -1), 2)
        return classify(nn.relu(bn(conv(x, 48, 1))))


class ViT(nn.Module):
    """Class token, position table, pre-norm encoder (Dosovitskiy et al. 2021); DeiT's distillation token and head."""

    distilled: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(32, (8, 8), (8, 8), name="stem")(x).reshape(x.shape[0], -1, 32)
        tokens = 2 if self.distilled else 1
        extra = self.param("tokens", nn.initializers.zeros, (1, tokens, 32))
        x = jnp.concatenate([jnp.tile(extra, (x.shape[0], 1, 1)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], 32))
        x = nn.Dropout(0.1, deterministic=False)(x)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(y, y)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        x = nn.LayerNorm()(x)
        if self.distilled:
            return nn.Dense(10)(x[:, 0]), nn.Dense(10)(x[:, 1])
        return nn.Dense(10, name="head")(x[:, 0])


class CaiT(nn.Module):
    """LayerScale, talking heads, and class attention late in the network (Touvron et al. 2021)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(32, (8, 8), (8, 8), name="stem")(x).reshape(x.shape[0], -1, 32)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], 32))
        for k in range(2):
            x = x + self.gamma(f"attention{k}") * self.talking_heads(nn.LayerNorm()(x))
            x = x + self.gamma(f"mlp{k}") * self.mlp(nn.LayerNorm()(x))
        c = jnp.tile(self.param("class", nn.initializers.normal(0.02), (1, 1, 32)), (x.shape[0], 1, 1))
        for k in range(2):
            u = nn.LayerNorm()(jnp.concatenate([c, x], 1))
            c = c + self.gamma(f"class_attention{k}") * nn.MultiHeadDotProductAttention(4)(u[:, :1], u)
            c = c + self.gamma(f"class_mlp{k}") * self.mlp(nn.LayerNorm()(c))
        return nn.Dense(10, name="head")(nn.LayerNorm()(jnp.concatenate([c, x], 1))[:, 0])

    def gamma(self, name: str) -> Any:
        return self.param(f"gamma_{name}", nn.initializers.constant(1e-5), (32,))

    def mlp(self, x: Any) -> Any:
        return nn.Dense(32)(nn.gelu(nn.Dense(128)(x)))

    def talking_heads(self, x: Any) -> Any:
        b, n, d = x.shape
        q, k, v = jnp.moveaxis(nn.Dense(3 * d)(x).reshape(b, n, 3, 4, d // 4), 2, 0)
        logits = jnp.einsum("bqhd,bkhd->bqkh", q * (d // 4) ** -0.5, k)
        weights = nn.Dense(4)(nn.softmax(nn.Dense(4)(logits), axis=2))
        return nn.Dense(d)(jnp.einsum("bqkh,bkhd->bqhd", weights, v).reshape(b, n, d))


class Swin(nn.Module):
    """Attention in shifted windows with a table of relative positions, patch merging (Liu et al. 2021)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.LayerNorm()(nn.Conv(16, (2, 2), (2, 2), name="stem")(x))
        for stage in range(2):
            for shift in (0, 2):
                x = x + self.attention(nn.LayerNorm()(x), f"table{stage}_{shift}", shift)
                x = x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))))
            if stage == 0:
                parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
                x = nn.Dense(2 * x.shape[-1], use_bias=False)(nn.LayerNorm()(jnp.concatenate(parts, -1)))
        return classify(nn.LayerNorm()(x))

    def attention(self, x: Any, table: str, shift: int, window: int = 4, heads: int = 2) -> Any:
        b, h, w, c = x.shape
        x = jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x = x.reshape(b, h // window, window, w // window, window, c).swapaxes(2, 3).reshape(-1, window**2, c)
        q, k, v = jnp.moveaxis(nn.Dense(3 * c)(x).reshape(-1, window**2, 3, heads, c // heads), (2, 3), (0, 2))
        logits = q * (c // heads) ** -0.5 @ k.swapaxes(-1, -2)
        at = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
        relative = at[:, :, None] - at[:, None, :] + window - 1
        biases = self.param(table, nn.initializers.normal(0.02), ((2 * window - 1) ** 2, heads))
        logits = logits + biases[relative[0] * (2 * window - 1) + relative[1]].transpose(2, 0, 1)
        if shift:
            cut = np.repeat([0, 1, 2], [h - window, window - shift, shift])
            region = (3 * cut[:, None] + cut[None]).reshape(h // window, window, w // window, window)
            region = region.swapaxes(1, 2).reshape(-1, window**2)
            mask = np.where(region[:, None] == region[:, :, None], 0.0, -100.0)
            n = mask.shape[0]
            logits = (logits.reshape(b, n, heads, window**2, -1) + mask[:, None]).reshape(logits.shape)
        x = (nn.softmax(logits) @ v).swapaxes(1, 2).reshape(-1, window**2, c)
        x = nn.Dense(c)(x).reshape(b, h // window, w // window, window, window, c).swapaxes(2, 3).reshape(b, h, w, c)
        return jnp.roll(x, (shift, shift), (1, 2)) if shift else x


class UNet(nn.Module):
    """Encoder and decoder with concatenated skips, no sum (Ronneberger et al. 2015), with batch norm."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def twice(x: Any, features: int, name: str | None = None) -> Any:
            return nn.relu(bn(conv(nn.relu(bn(conv(x, features, name=name))), features)))

        a = twice(x, 8, "stem")
        b = twice(nn.max_pool(a, (2, 2), (2, 2)), 16)
        x = twice(nn.max_pool(b, (2, 2), (2, 2)), 32)
        for skip in (b, a):
            x = nn.ConvTranspose(skip.shape[-1], (2, 2), (2, 2))(x)
            x = twice(jnp.concatenate([skip, x], -1), skip.shape[-1])
        return nn.Conv(2, (1, 1), name="head")(x)


def sinusoidal(t: Any, features: int) -> Any:
    angles = t[:, None] * jnp.exp(-np.log(10000.0) * jnp.arange(features // 2) / (features // 2 - 1))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class DDPM(nn.Module):
    """Residual blocks with a time embedding, attention at the lower resolution, concatenated skips (Ho et al. 2020)."""

    @nn.compact
    def __call__(self, x: Any, t: Any) -> Any:
        e = nn.Dense(64)(nn.swish(nn.Dense(64)(sinusoidal(t, 16))))
        hs = [nn.Conv(16, (3, 3), name="stem")(x)]
        hs.append(self.block(hs[-1], e, 16))
        hs.append(nn.Conv(16, (3, 3), (2, 2))(hs[-1]))
        hs.append(self.attention(self.block(hs[-1], e, 32)))
        h = self.block(self.attention(self.block(hs[-1], e, 32)), e, 32)
        for _ in range(2):
            h = self.attention(self.block(jnp.concatenate([h, hs.pop()], -1), e, 32))
        h = nn.Conv(32, (3, 3))(double(h))
        for _ in range(2):
            h = self.block(jnp.concatenate([h, hs.pop()], -1), e, 16)
        return nn.Conv(3, (3, 3), name="head")(nn.swish(nn.GroupNorm(8)(h)))

    def block(self, x: Any, e: Any, features: int) -> Any:
        h = nn.Conv(features, (3, 3))(nn.swish(nn.GroupNorm(8)(x)))
        h += nn.Dense(features)(nn.swish(e))[:, None, None]
        h = nn.Dropout(0.1, deterministic=False)(nn.swish(nn.GroupNorm(8)(h)))
        h = nn.Conv(features, (3, 3))(h)
        if x.shape[-1] != features:
            x = nn.Dense(features)(x)
        return x + h

    def attention(self, x: Any) -> Any:
        b, height, width, c = x.shape
        h = nn.GroupNorm(8)(x)
        q, k, v = (nn.Dense(c)(h) for _ in range(3))
        w = jnp.einsum("bhwc,bHWc->bhwHW", q, k) * c**-0.5
        w = nn.softmax(w.reshape(b, height, width, -1)).reshape(w.shape)
        return x + nn.Dense(c)(jnp.einsum("bhwHW,bHWc->bhwc", w, v))


class LatentDiffusion(nn.Module):
    """A spatial transformer: a residual around a projection, residual blocks with cross-attention, and a projection
    (Rombach et al. 2022)."""

    @nn.compact
    def __call__(self, x: Any, context: Any) -> Any:
        x = nn.Conv(32, (4, 4), (4, 4), name="stem")(x)
        for _ in range(2):
            h = nn.Conv(32, (1, 1))(nn.GroupNorm(8)(x)).reshape(x.shape[0], -1, 32)
            y = nn.LayerNorm()(h)
            h = nn.MultiHeadDotProductAttention(4)(y, y) + h
            h = nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h), context) + h
            a, gate = jnp.split(nn.Dense(256)(nn.LayerNorm()(h)), 2, -1)
            h = nn.Dense(32)(a * nn.gelu(gate)) + h
            x = x + nn.Conv(32, (1, 1))(h.reshape(x.shape))
        return nn.Conv(3, (3, 3), name="head")(nn.silu(nn.GroupNorm(8)(x)))


class DiT(nn.Module):
    """Transformer blocks whose norms and gates come from time and label, adaLN-Zero (Peebles & Xie 2023)."""

    @nn.compact
    def __call__(self, x: Any, t: Any, y: Any) -> Any:
        b, h, w, channels = x.shape
        x = nn.Conv(32, (4, 4), (4, 4), name="stem")(x).reshape(b, -1, 32)
        x = x + sinusoidal(jnp.arange(x.shape[1], dtype=jnp.float32), 32)
        c = nn.Dense(32)(nn.silu(nn.Dense(32)(sinusoidal(t, 16)))) + nn.Embed(11, 32)(y)

        def modulate(x: Any, shift: Any, scale: Any) -> Any:
            return nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + scale[:, None]) + shift[:, None]

        for _ in range(2):
            parts = jnp.split(nn.Dense(6 * 32, kernel_init=nn.initializers.zeros)(nn.silu(c)), 6, -1)
            z = modulate(x, *parts[:2])
            x = x + parts[2][:, None] * nn.MultiHeadDotProductAttention(4)(z, z)
            z = nn.Dense(32)(nn.gelu(nn.Dense(128)(modulate(x, *parts[3:5]))))
            x = x + parts[5][:, None] * z
        x = modulate(x, *jnp.split(nn.Dense(2 * 32)(nn.silu(c)), 2, -1))
        x = nn.Dense(4 * 4 * channels, name="head")(x).reshape(b, h // 4, w // 4, 4, 4, channels)
        return x.swapaxes(2, 3).reshape(b, h, w, channels)


class ConvVAE(nn.Module):
    """A variational autoencoder (Kingma & Welling 2014) with residual blocks in its decoder, as in VQGAN's."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.relu(nn.Conv(8, (4, 4), (2, 2), name="stem")(x))
        h = nn.relu(nn.Conv(16, (4, 4), (2, 2))(h))
        mean, logarithm = nn.Conv(4, (1, 1))(h), nn.Conv(4, (1, 1))(h)
        z = mean + jnp.exp(0.5 * logarithm) * jax.random.normal(self.make_rng("noise"), mean.shape)
        h = nn.Conv(16, (3, 3))(z)
        for _ in range(2):
            y = nn.Conv(16, (3, 3))(nn.swish(nn.GroupNorm(4)(h)))
            h = h + nn.Conv(16, (3, 3))(nn.swish(nn.GroupNorm(4)(y)))
            h = nn.Conv(16, (3, 3))(double(h))
        return nn.Conv(3, (3, 3))(nn.swish(nn.GroupNorm(4)(h))), mean, logarithm


class Generator(nn.Module):
    """Residual upsampling blocks whose batch norms are conditioned: on the class (Miyato & Koyama 2018), or on the
    latent itself through a small network (self-modulation, Chen et al. 2019). One table may hold scale and shift."""

    modulated: bool = False
    fused: bool = False

    @nn.compact
    def __call__(self, z: Any, label: Any = None) -> Any:
        def affine(features: int) -> Any:
            if self.modulated:
                return nn.Dense(features)(nn.relu(nn.Dense(32)(z)))[:, None, None]
            return nn.Embed(10, features)(label)[:, None, None]

        def conditional(x: Any) -> Any:
            x = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False)(x)
            if self.fused:
                scale, shift = jnp.split(affine(2 * x.shape[-1]), 2, -1)
            else:
                scale, shift = affine(x.shape[-1]), affine(x.shape[-1])
            return nn.relu(x * scale + shift)

        x = nn.Dense(4 * 4 * 32, name="stem")(z).reshape(-1, 4, 4, 32)
        for features in (16, 8):
            y = nn.Conv(features, (3, 3))(double(conditional(x)))
            y = nn.Conv(features, (3, 3))(conditional(y))
            x = nn.Conv(features, (1, 1))(double(x)) + y
        return jnp.tanh(nn.Conv(3, (3, 3), name="head")(nn.relu(bn(x))))


def pixel_shuffle(x: Any, r: int) -> Any:
    b, h, w, c = x.shape
    return x.reshape(b, h, w, r, r, c // r**2).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, -1)


class SRResNet(nn.Module):
    """Residual blocks inside a long skip (Ledig et al. 2017): batch norm and PReLU."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        first = x = nn.PReLU()(nn.Conv(16, (9, 9), name="stem")(x))
        for _ in range(2):
            x = x + bn(conv(nn.PReLU()(bn(conv(x, 16))), 16))
        x = first + bn(conv(x, 16))
        x = nn.PReLU()(pixel_shuffle(nn.Conv(64, (3, 3))(x), 2))
        return nn.Conv(3, (9, 9), name="head")(x)


class EDSR(nn.Module):
    """No norm, residuals scaled by 0.1, a long skip (Lim et al. 2017)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        first = x = nn.Conv(16, (3, 3), name="stem")(x - jnp.array([0.45, 0.44, 0.40]))
        for _ in range(3):
            x = x + nn.Conv(16, (3, 3))(nn.relu(nn.Conv(16, (3, 3))(x))) * 0.1
        x = nn.Conv(16, (3, 3))(x) + first
        x = pixel_shuffle(nn.Conv(64, (3, 3))(x), 2)
        return nn.Conv(3, (3, 3), name="head")(x) + jnp.array([0.45, 0.44, 0.40])


class RCAN(nn.Module):
    """Residual in residual with channel attention (Zhang et al. 2018)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        first = x = nn.Conv(16, (3, 3), name="stem")(x)
        for _ in range(2):
            start = x
            for _ in range(2):
                x = x + squeeze(nn.Conv(16, (3, 3))(nn.relu(nn.Conv(16, (3, 3))(x))), 4)
            x = start + nn.Conv(16, (3, 3))(x)
        x = first + nn.Conv(16, (3, 3))(x)
        return nn.Conv(3, (3, 3), name="head")(pixel_shuffle(nn.Conv(64, (3, 3))(x), 2))


class ESRGAN(nn.Module):
    """Dense blocks, scaled and nested in scaled residuals (Wang et al. 2018)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def dense(x: Any) -> Any:
            xs = [x]
            for _ in range(4):
                xs.append(nn.leaky_relu(nn.Conv(8, (3, 3))(jnp.concatenate(xs, -1)), 0.2))
            return nn.Conv(16, (3, 3))(jnp.concatenate(xs, -1)) * 0.2 + x

        first = x = nn.Conv(16, (3, 3), name="stem")(x)
        for _ in range(2):
            x = dense(dense(dense(x))) * 0.2 + x
        x = first + nn.Conv(16, (3, 3))(x)
        x = nn.leaky_relu(nn.Conv(16, (3, 3))(double(x)), 0.2)
        return nn.Conv(3, (3, 3), name="head")(nn.leaky_relu(nn.Conv(16, (3, 3))(x), 0.2))


class RevNet(nn.Module):
    """Two streams that are each other's branch (Gomez et al. 2017)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def f(x: Any) -> Any:
            return conv(nn.relu(bn(conv(nn.relu(bn(x)), 8))), 8)

        x1, x2 = jnp.split(conv(x, 16, name="stem"), 2, -1)
        for _ in range(2):
            x1 = x1 + f(x2)
            x2 = x2 + f(x1)
        return classify(nn.relu(bn(jnp.concatenate([x1, x2], -1))))


class SkipInit(nn.Module):
    """No norm; a scalar at zero ends each branch (De & Smith 2020)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(16, (3, 3), name="stem")(x)
        for k in range(3):
            y = nn.Conv(16, (3, 3))(nn.relu(nn.Conv(16, (3, 3))(nn.relu(x))))
            x = x + self.param(f"alpha{k}", nn.initializers.zeros, ()) * y
        return classify(nn.relu(x))


class NFResNet(nn.Module):
    """x + alpha f(x / beta) with standardized kernels, beta from analytic variances (Brock et al. 2021)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = StandardizedConv(16)(x)
        variance = 1.0
        for k, features in enumerate((32, 32, 32)):
            y = nn.relu(x / variance**0.5) * 1.7139588594436646
            if k == 0:
                x, variance = StandardizedConv(features)(y), 1.0
            y = nn.relu(StandardizedConv(features // 2)(y)) * 1.7139588594436646
            y = nn.relu(StandardizedConv(features // 2)(y)) * 1.7139588594436646
            x = x + 0.2 * StandardizedConv(features)(y)
            variance += 0.04
        return classify(nn.relu(x))


class FPN(nn.Module):
    """A feature pyramid (Lin et al. 2017): lateral projections are added to what comes down from coarser levels. Both
    terms of such a sum are outputs of one stream at different depths: neither is the other's skip."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        levels = []
        for k, features in enumerate((8, 16, 32)):
            x = nn.relu(nn.Conv(features, (3, 3), (2, 2), name=f"stage{k}")(x))
            levels.append(x)
        x = nn.Conv(16, (1, 1))(levels.pop())
        pyramid = [nn.Conv(16, (3, 3))(x)]
        while levels:
            x = nn.Conv(16, (1, 1))(levels.pop()) + double(x)
            pyramid.append(nn.Conv(16, (3, 3))(x))
        return tuple(pyramid)


class Impala(nn.Module):
    """An agent's residual torso with two heads, policy and value (Espeholt et al. 2018)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for k, features in enumerate((8, 16)):
            x = nn.Conv(features, (3, 3), name=f"section{k}")(x)
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            for _ in range(2):
                x = x + nn.Conv(features, (3, 3))(nn.relu(nn.Conv(features, (3, 3))(nn.relu(x))))
        x = nn.relu(x).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(5, name="policy")(x), nn.Dense(1, name="value")(x)[:, 0]


class FiLM(nn.Module):
    """Residual blocks modulated by a question (Perez et al. 2018); the skip starts behind a 1x1 convolution."""

    @nn.compact
    def __call__(self, x: Any, question: Any) -> Any:
        x = nn.relu(bn(nn.Conv(16, (3, 3), name="stem")(x)))
        films = jnp.split(nn.Dense(2 * 2 * 16, name="film")(question), 4, -1)
        for k in range(2):
            start = nn.relu(nn.Conv(16, (1, 1))(x))
            y = nn.Conv(16, (3, 3))(start)
            y = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False)(y)
            gamma, beta = films[2 * k : 2 * k + 2]
            x = start + nn.relu((1 + gamma[:, None, None]) * y + beta[:, None, None])
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(32)(x.max((1, 2)))))


class TiedAutoencoder(nn.Module):
    """The decoder's kernel is the encoder's, transposed (Vincent et al. 2010)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        shape = x.shape
        x = x.reshape(shape[0], -1)
        w = self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], 24))
        h = nn.sigmoid(x @ w + self.param("b", nn.initializers.zeros, (24,)))
        return nn.sigmoid(h @ w.T + self.param("c", nn.initializers.zeros, (x.shape[-1],))).reshape(shape)


class Siamese(nn.Module):
    """One residual tower on two images, compared by distance (Koch et al. 2015)."""

    @nn.compact
    def __call__(self, a: Any, b: Any) -> Any:
        stem, last = nn.Conv(16, (4, 4), (4, 4), name="stem"), nn.Dense(32, name="embedding")
        convs = [[nn.Conv(16, (3, 3)), nn.Conv(16, (3, 3))] for _ in range(2)]

        def tower(x: Any) -> Any:
            x = stem(x)
            for first, second in convs:
                x = x + second(nn.relu(first(nn.relu(x))))
            return nn.sigmoid(last(x.mean((1, 2))))

        return nn.Dense(1, name="head")(jnp.abs(tower(a) - tower(b)))


def case(
    name: str, make: Callable[[], Any], inputs: tuple[Any, ...], branches: tuple[tuple[int, float, str], ...],
    norms: int, stem: str | None = "stem/kernel", head: str | None = "head/kernel",
) -> Case:  # fmt: skip
    """A case in which each branch stands for one, and each projection for one layer."""
    projections = sum(skip == "projection" for _, _, skip in branches)
    return Case(name, make, inputs, len(branches), branches, norms, stem, head, projections)


def branch(depth: int, order: float, skip: str = "identity") -> tuple[tuple[int, float, str]]:
    return ((depth, order, skip),)


ATTENTION = MLP = branch(2, 2.0)

VISION: tuple[Case, ...] = (
    case("resnext", ResNeXt, (IMAGES,), (branch(3, 0.0, "projection") + branch(3, 0.0)) * 2, 1 + 4 * 3 + 2),
    case("xception", Xception, (IMAGES,), branch(4, 0.0, "projection") + branch(6, 0.0) * 2, 1 + 2 + 1 + 6),
    case("regnet-y", RegNetY, (IMAGES,), branch(5, 0.0, "projection") + branch(5, 0.0) + branch(5, 0.0, "projection"),
         1 + 3 * 3 + 2),
    case("wide-resnet", WideResNet, (IMAGES,), (branch(2, 1.0, "projection") + branch(2, 1.0)) * 3, 6 * 2 + 1),
    case("vgg", VGG, (IMAGES,), (), 4, "conv0_0/kernel"),
    case("mobilenet-v1", MobileNetV1, (IMAGES,), (), 1 + 3 * 2),
    case("mobilenet-v3", MobileNetV3, (IMAGES,), branch(3, 0.0) + branch(5, 0.0) * 2, 1 + 2 + 5 * 3 + 1),
    case("efficientnet", EfficientNet, (IMAGES,), branch(5, 0.0) * 2, 1 + 2 + 4 * 3 + 1),
    case("densenet-bc", DenseNetBC, (IMAGES,), (), 4 * 2 + 1 + 1),
    case("inception", Inception, (IMAGES,), (), 1 + 2 * 6),
    case("shufflenet-v1", ShuffleNetV1, (IMAGES,), branch(3, 0.0) * 2, 1 + 3 * 3),
    case("shufflenet-v2", ShuffleNetV2, (IMAGES,), (), 1 + 5 + 2 * 3 + 1),
    case("vit", ViT, (IMAGES,), (ATTENTION + MLP) * 2, 5),
    case("deit", lambda: ViT(distilled=True), (IMAGES,), (ATTENTION + MLP) * 2, 5, head=None),
    # Head mixing behind the softmax is a factor of the values. The first class attention is added to a parameter,
    # which is no sum of activations.
    case("cait", CaiT, (IMAGES,), (branch(4, 3.0) + MLP) * 2 + MLP + ATTENTION + MLP, 9),
    case("swin", Swin, (IMAGES,), (ATTENTION + MLP) * 4, 1 + 4 * 2 + 1 + 1),
    case("unet", UNet, (IMAGES,), (), 10),
    case("ddpm", DDPM, (IMAGES, STEPS),
         branch(2, 1.0) + branch(2, 1.0, "projection") + ATTENTION  # down
         + branch(2, 1.0) + ATTENTION + branch(2, 1.0)  # middle
         + (branch(2, 1.0, "projection") + ATTENTION) * 2 + branch(2, 1.0, "projection") * 2,  # up
         8 * 2 + 4 + 1),
    case("latent-diffusion", LatentDiffusion, (IMAGES, MEMORY),
         (ATTENTION * 2 + branch(2, 3.0) + branch(8, 2.0)) * 2, 9),
    # One dense layer makes both gates of a block: neither branch has it to itself.
    case("dit", DiT, (IMAGES, STEPS, LABELS), (ATTENTION + MLP) * 2, 5),
    # Mean and deviation are outputs too, and lead on to the decoder: states on the way, no heads.
    case("vae", ConvVAE, (IMAGES,), branch(2, 1.0) * 2, 5, head="Conv_10/kernel"),
    # The condition's kernels are the branch's own: scale and shift behind the last norm shrink with them.
    case("gan-class", Generator, (LATENTS, LABELS), branch(3, 2.0, "projection") * 2, 5),
    case("gan-class-fused", lambda: Generator(fused=True), (LATENTS, LABELS), branch(3, 2.0, "projection") * 2, 5),
    case("gan-modulated", lambda: Generator(modulated=True), (LATENTS,), branch(4, 3.0, "projection") * 2, 5),
    case("srresnet", SRResNet, (IMAGES,), branch(2, 0.0) * 2 + branch(5, 0.0), 5),
    case("edsr", EDSR, (IMAGES,), MLP * 3 + branch(7, 1.0), 0),
    case("rcan", RCAN, (IMAGES,), (branch(4, 2.0) * 2 + branch(9, 1.0)) * 2 + branch(19, 1.0), 0),
    # 0.2 f(x) + x, where f is itself a chain of residuals: it holds x, and does not vanish.
    case("esrgan", ESRGAN, (IMAGES,), (branch(5, 1.0) * 3 + branch(15, 0.0)) * 2 + branch(31, 1.0), 0),
    # From one stream's split to its sum the other stream's branch is passed too.
    case("revnet", RevNet, (IMAGES,), branch(2, 1.0) + branch(4, 1.0) * 3, 4 * 2 + 1),
    case("skipinit", SkipInit, (IMAGES,), MLP * 3, 0),
    case("nf-resnet", NFResNet, (IMAGES,), branch(3, 0.0, "projection") + branch(3, 0.0) * 2, 0,
         "StandardizedConv_0/w"),
    # The deeper stages go on to an output of their own: no branch beside a projection.
    case("fpn", FPN, (IMAGES,), (), 0, "stage0/kernel", None),
    case("impala", Impala, (IMAGES,), MLP * 4, 0, "section0/kernel", None),
    case("film", FiLM, (IMAGES, LATENTS), branch(1, 0.0) * 2, 3),
    case("tied-autoencoder", TiedAutoencoder, (IMAGES,), (), 0, "w", "w"),
    case("siamese", Siamese, (IMAGES, IMAGES), MLP * 4, 0),
)  # fmt: skip
