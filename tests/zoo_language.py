"""Families of language models, small, each with its structure worked out by hand from its paper or source."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from zoo import IMAGES, TOKENS, Case
from zoo_vision import ATTENTION, MLP, branch, case

TARGETS = jax.ShapeDtypeStruct((2, 7), jnp.int32)
TEXT = {name: TOKENS for name in ("input_ids", "token_type_ids", "attention_mask")}

GATED = branch(2, 3.0)


def attend(q: Any, k: Any, v: Any, bias: Any = 0.0) -> Any:
    """Softmax attention of (batch, position, head, feature)."""
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + bias)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def causal(n: int) -> Any:
    return jnp.where(jnp.tril(jnp.ones((n, n), bool)), 0.0, -1e9)


def heads(x: Any, n: int = 4, use_bias: bool = False) -> Any:
    return nn.DenseGeneral((n, 8), use_bias=use_bias)(x)


def joined(x: Any, features: int = 32, use_bias: bool = False) -> Any:
    return nn.DenseGeneral(features, axis=(-2, -1), use_bias=use_bias)(x)


class BERT(nn.Module):
    """Post-norm encoder; words, positions and segments summed, pooler (Devlin et al. 2019). Takes a dictionary; the
    mask is added to the logits, as in Hugging Face's."""

    @nn.compact
    def __call__(self, batch: Any) -> Any:
        ids = batch["input_ids"]
        x = nn.Embed(50, 32, name="words")(ids) + nn.Embed(16, 32, name="positions")(jnp.arange(ids.shape[1])[None])
        x = nn.LayerNorm()(x + nn.Embed(2, 32, name="segments")(batch["token_type_ids"]))
        bias = (1.0 - batch["attention_mask"][:, None, None].astype(x.dtype)) * -1e9
        for _ in range(2):
            x = nn.LayerNorm()(x + joined(attend(heads(x), heads(x), heads(x), bias)))
            x = nn.LayerNorm()(x + nn.Dense(32)(nn.gelu(nn.Dense(64)(x), approximate=False)))
        return nn.Dense(3, name="head")(jnp.tanh(nn.Dense(32, name="pooler")(x[:, 0])))


class T5(nn.Module):
    """Encoder and decoder with RMS norm, one table of relative biases for each, shared by its layers (Raffel et al.
    2020); tied and relu (1.0), or a head of its own and gated gelu (1.1)."""

    tied: bool = True

    @nn.compact
    def __call__(self, tokens: Any, targets: Any) -> Any:
        table = nn.Embed(50, 32, name="shared")
        memory = nn.RMSNorm()(self.stack(table(tokens), None))
        x = nn.RMSNorm()(self.stack(table(targets), memory))
        return table.attend(x * 32**-0.5) if self.tied else nn.Dense(50, use_bias=False, name="head")(x)

    def stack(self, x: Any, memory: Any) -> Any:
        n = x.shape[1]
        distance = np.clip(np.arange(n)[None] - np.arange(n)[:, None] + 8, 0, 15)
        name = "encoder_bias" if memory is None else "decoder_bias"
        bias = self.param(name, nn.initializers.normal(1.0), (16, 4))[distance].transpose(2, 0, 1)[None]
        bias = bias if memory is None else bias + causal(n)
        for _ in range(2):
            y = nn.RMSNorm()(x)
            x = x + joined(attend(heads(y), heads(y), heads(y), bias))
            if memory is not None:
                x = x + joined(attend(heads(nn.RMSNorm()(x)), heads(memory), heads(memory)))
            y = nn.RMSNorm()(x)
            h = nn.relu(nn.Dense(64)(y)) if self.tied else nn.gelu(nn.Dense(64)(y)) * nn.Dense(64)(y)
            x = x + nn.Dense(32, use_bias=False)(h)
        return x


class GPT2(nn.Module):
    """Pre-norm decoder with one kernel for query, key and value, and a tied head (Radford et al. 2019)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        b, n = tokens.shape
        table = nn.Embed(50, 32, name="wte")
        x = table(tokens) + nn.Embed(16, 32, name="wpe")(jnp.arange(n)[None])
        for _ in range(2):
            q, k, v = jnp.split(nn.Dense(96)(nn.LayerNorm()(x)), 3, -1)
            y = attend(*(t.reshape(b, n, 4, 8) for t in (q, k, v)), causal(n)).reshape(b, n, 32)
            x = x + nn.Dense(32)(y)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return table.attend(nn.LayerNorm()(x))


def rotate(x: Any) -> Any:
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x, 2, -1)
    turned = jnp.concatenate([-b, a], -1)
    cos, sin = (jnp.tile(f(angles), 2) for f in (jnp.cos, jnp.sin))
    return x * cos + turned * sin


class NeoX(nn.Module):
    """Attention and feed-forward side by side, each with a norm of its own, rotary (Black et al. 2022)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            q, k, v = jnp.split(nn.DenseGeneral((4, 24))(y), 3, -1)
            y = joined(attend(rotate(q), rotate(k), v, causal(x.shape[1])))
            x = x + y + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(50, use_bias=False, name="head")(nn.LayerNorm()(x))


class LlamaBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        y = nn.RMSNorm()(x)
        q, k, v = rotate(heads(y)), rotate(heads(y, 2)), heads(y, 2)
        y = checkpoint_name(jax.nn.dot_product_attention(q, k, v, is_causal=True), "attended")
        x = x + joined(y)
        y = nn.RMSNorm()(x)
        return x + nn.Dense(32)(nn.silu(nn.Dense(64)(y)) * nn.Dense(64)(y)), None


class ScannedLlama(nn.Module):
    """Llama (Touvron et al. 2023) with JAX's own attention, its blocks under `nn.scan`, and remat as in MaxText."""

    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        saved = jax.checkpoint_policies.save_only_these_names("attended")
        block = nn.remat(LlamaBlock, prevent_cse=False, policy=saved) if self.remat else LlamaBlock
        x, _ = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()(x, None)
        return nn.Dense(50, use_bias=False, name="head")(nn.RMSNorm()(x))


class Adapted(nn.Module):
    """A pre-norm encoder whose dense layers have low-rank updates (LoRA, Hu et al. 2022), or whose branches end in
    small residual networks (adapters, Houlsby et al. 2019)."""

    low_rank: bool

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            q, k, v = (self.dense(y, 32).reshape(*y.shape[:2], 4, 8) for _ in range(3))
            x = x + self.adapt(self.dense(attend(q, k, v).reshape(y.shape), 32))
            x = x + self.adapt(self.dense(nn.gelu(self.dense(nn.LayerNorm()(x), 64)), 32))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x).mean(1))

    def dense(self, x: Any, features: int) -> Any:
        y = nn.Dense(features)(x)
        if not self.low_rank:
            return y
        down = nn.Dense(4, use_bias=False)(x)
        return y + 2.0 * nn.Dense(features, use_bias=False, kernel_init=nn.initializers.zeros)(down)

    def adapt(self, x: Any) -> Any:
        return x if self.low_rank else x + nn.Dense(32)(nn.gelu(nn.Dense(8)(x)))


class MemoryEfficient(nn.Module):
    """Attention by a scan over blocks of keys, softmax as it goes (Rabe & Staats 2021; Dao et al. 2022)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for _ in range(2):
            y = nn.RMSNorm()(x)
            x = x + joined(self.attend(heads(y), heads(y), heads(y)))
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.RMSNorm()(x))))
        return nn.Dense(50, name="head")(nn.RMSNorm()(x))

    def attend(self, q: Any, k: Any, v: Any, block: int = 4) -> Any:
        b, n, h, d = q.shape

        def step(carry: Any, kv: Any) -> Any:
            total, norm, most = carry
            k, v = kv
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * d**-0.5
            peak = jnp.maximum(most, logits.max(-1))
            weights = jnp.exp(logits - peak[..., None])
            decay = jnp.exp(most - peak)
            total = total * decay[..., None] + jnp.einsum("bhqk,bkhd->bhqd", weights, v)
            return (total, norm * decay + weights.sum(-1), peak), None

        blocks = tuple(jnp.moveaxis(t.reshape(b, n // block, block, h, d), 1, 0) for t in (k, v))
        start = jnp.zeros((b, h, n, d)), jnp.zeros((b, h, n)), jnp.full((b, h, n), -1e30)
        (total, norm, _), _ = jax.lax.scan(jax.checkpoint(step), start, blocks)
        return (total / norm[..., None]).swapaxes(1, 2)


class Gemma(nn.Module):
    """A norm before and after each branch, scaled embeddings, soft-capped logits, tied (Gemma 2, 2024)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(50, 32, name="table")
        x = table(tokens) * jnp.sqrt(32.0)
        for k in range(2):
            y = self.norm(x, f"a{k}")
            q, key, v = rotate(heads(y)), rotate(heads(y, 2)), heads(y, 2)
            logits = jnp.einsum("bqhd,bkhd->bhqk", q * 8**-0.5, jnp.repeat(key, 2, 2))
            weights = nn.softmax(50.0 * jnp.tanh(logits / 50.0) + causal(x.shape[1]))
            y = joined(jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(v, 2, 2)))
            x = x + self.norm(y, f"b{k}")
            y = self.norm(x, f"c{k}")
            y = nn.Dense(32, use_bias=False)(nn.gelu(nn.Dense(64, use_bias=False)(y)) * nn.Dense(64, use_bias=False)(y))
            x = x + self.norm(y, f"d{k}")
        return 30.0 * jnp.tanh(table.attend(self.norm(x, "last")) / 30.0)

    def norm(self, x: Any, name: str) -> Any:
        scale = self.param(name, nn.initializers.zeros, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + scale)


class Switch(nn.Module):
    """One expert for each token, dispatched by one-hot products with a capacity (Fedus et al. 2022)."""

    experts: int = 4

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for k in range(2):
            y = nn.RMSNorm()(x)
            x = x + joined(attend(heads(y), heads(y), heads(y)))
            x = x + self.feed_forward(nn.RMSNorm()(x), k)
        return nn.Dense(50, name="head")(nn.RMSNorm()(x))

    def feed_forward(self, x: Any, k: int) -> Any:
        shape, capacity = x.shape, 8
        x = x.reshape(-1, shape[-1])
        gates = nn.softmax(nn.Dense(self.experts, use_bias=False)(x))
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), self.experts)
        gate = jnp.sum(gates * chosen, -1)
        place = jnp.cumsum(chosen, 0) * chosen
        chosen = chosen * (place <= capacity)
        place = jnp.sum(place * chosen, -1) - 1
        dispatch = chosen[:, :, None] * jax.nn.one_hot(place.astype(jnp.int32), capacity)[:, None]
        wi = self.param(f"wi{k}", nn.initializers.lecun_normal(), (self.experts, 32, 64))
        wo = self.param(f"wo{k}", nn.initializers.lecun_normal(), (self.experts, 64, 32))
        h = nn.relu(jnp.einsum("ecd,edf->ecf", jnp.einsum("nec,nd->ecd", dispatch, x), wi))
        y = jnp.einsum("ecf,efd->ecd", h, wo)
        return jnp.einsum("ecd,nec->nd", y, dispatch * gate[:, None, None]).reshape(shape)


class Mixtral(nn.Module):
    """Two experts for each token, their softmax weights renormalized (Jiang et al. 2024)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for k in range(2):
            y = nn.RMSNorm()(x)
            x = x + joined(attend(heads(y), heads(y), heads(y)))
            y = nn.RMSNorm()(x)
            weights, chosen = jax.lax.top_k(nn.softmax(nn.Dense(4, use_bias=False)(y)), 2)
            weights = weights / weights.sum(-1, keepdims=True)
            gate = jnp.einsum("bsk,bske->bse", weights, jax.nn.one_hot(chosen, 4))
            w1, w2, w3 = (
                self.param(f"{name}_{k}", nn.initializers.lecun_normal(), shape)
                for name, shape in (("w1", (4, 32, 64)), ("w2", (4, 64, 32)), ("w3", (4, 32, 64)))
            )
            h = nn.silu(jnp.einsum("bsd,edf->bsef", y, w1)) * jnp.einsum("bsd,edf->bsef", y, w3)
            x = x + jnp.einsum("bsed,bse->bsd", jnp.einsum("bsef,efd->bsed", h, w2), gate)
        return nn.Dense(50, name="head")(nn.RMSNorm()(x))


class RaggedExperts(nn.Module):
    """Tokens sorted by expert, grouped matrix products, sorted back (MegaBlocks, Gale et al. 2023; MaxText)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for k in range(2):
            y = nn.RMSNorm()(x).reshape(-1, 32)
            gates = nn.softmax(nn.Dense(4, use_bias=False)(y))
            chosen = jnp.argmax(gates, -1)
            order = jnp.argsort(chosen)
            sizes = jnp.bincount(chosen, length=4)
            wi = self.param(f"wi{k}", nn.initializers.lecun_normal(), (4, 32, 64))
            wo = self.param(f"wo{k}", nn.initializers.lecun_normal(), (4, 64, 32))
            h = jax.lax.ragged_dot(nn.relu(jax.lax.ragged_dot(y[order], wi, sizes)), wo, sizes)
            h = h[jnp.argsort(order)] * jnp.max(gates, -1, keepdims=True)
            x = x + h.reshape(x.shape)
        return nn.Dense(50, name="head")(nn.RMSNorm()(x))


class TransformerXL(nn.Module):
    """Attention logits from content and from relative positions, each with a bias (Dai et al. 2019), post-norm."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        n = x.shape[1]
        angles = jnp.arange(n - 1, -1, -1.0)[:, None] / 10000 ** (jnp.arange(16) / 16)
        positions = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        u, v = (self.param(name, nn.initializers.normal(0.02), (4, 8)) for name in "uv")
        for _ in range(2):
            query, key, value = heads(x), heads(x), heads(x)
            content = jnp.einsum("bqhd,bkhd->bhqk", query + u, key)
            place = jnp.einsum("bqhd,khd->bhqk", query + v, heads(positions))
            b, h = place.shape[:2]
            place = jnp.pad(place, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(b, h, n + 1, n)[:, :, 1:]
            weights = nn.softmax((content + place) / 8**0.5 + causal(n))
            x = nn.LayerNorm()(x + joined(jnp.einsum("bhqk,bkhd->bqhd", weights, value)))
            x = nn.LayerNorm()(x + nn.Dense(32)(nn.relu(nn.Dense(64)(x))))
        return nn.Dense(50, name="head")(x)


class NormalizedTransformer(nn.Module):
    """Unit vectors on a sphere; each step goes part of the way to the branch (nGPT, Loshchilov et al. 2025)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for k in range(2):
            y = joined(attend(self.unit(heads(x)), self.unit(heads(x)), heads(x), causal(x.shape[1])))
            x = self.unit(x + self.rate(f"attention{k}") * (self.unit(y) - x))
            y = nn.Dense(32, use_bias=False)(nn.silu(nn.Dense(64)(x)) * nn.Dense(64)(x))
            x = self.unit(x + self.rate(f"mlp{k}") * (self.unit(y) - x))
        return nn.Dense(50, name="head")(x)

    def unit(self, x: Any) -> Any:
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def rate(self, name: str) -> Any:
        return self.param(name, nn.initializers.constant(0.05), (32,))


class GMLP(nn.Module):
    """A spatial gating unit: half the channels, normalized and mixed over positions, times the other (Liu et al.
    2021)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        n = x.shape[1]
        for _ in range(2):
            u, v = jnp.split(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))), 2, -1)
            v = nn.LayerNorm()(v).swapaxes(1, 2)
            v = nn.Dense(n, kernel_init=nn.initializers.normal(1e-6), bias_init=nn.initializers.ones)(v)
            x = x + nn.Dense(32)(u * v.swapaxes(1, 2))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x).mean(1))


class FNet(nn.Module):
    """Fourier transforms in place of attention, post-norm (Lee-Thorp et al. 2022)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.LayerNorm()(nn.Embed(50, 32, name="stem")(tokens))
        for _ in range(2):
            x = nn.LayerNorm()(x + jnp.fft.fft2(x, axes=(1, 2)).real)
            x = nn.LayerNorm()(x + nn.Dense(32)(nn.gelu(nn.Dense(64)(x))))
        return nn.Dense(3, name="head")(jnp.tanh(nn.Dense(32)(x[:, 0])))


class Perceiver(nn.Module):
    """A latent array that attends to the input, again and again (Jaegle et al. 2021)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        z = jnp.tile(self.param("latents", nn.initializers.normal(0.02), (1, 6, 32)), (x.shape[0], 1, 1))
        for k in range(2):
            q, kv = nn.LayerNorm()(z), nn.LayerNorm()(x)
            z = z + nn.MultiHeadDotProductAttention(1, qkv_features=32, out_features=32, name=f"cross{k}")(q, kv)
            z = z + self.feed_forward(z)
            y = nn.LayerNorm()(z)
            z = z + nn.MultiHeadDotProductAttention(4)(y, y)
            z = z + self.feed_forward(z)
        return nn.Dense(10, name="head")(nn.LayerNorm()(z.mean(1)))

    def feed_forward(self, z: Any) -> Any:
        return nn.Dense(32)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(z))))


class ReZero(nn.Module):
    """x + alpha f(x) without norm, one alpha for a layer (Bachlechner et al. 2021)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for k in range(2):
            alpha = self.param(f"alpha{k}", nn.initializers.zeros, ())
            x = x + alpha * nn.MultiHeadDotProductAttention(4)(x, x)
            x = x + alpha * nn.Dense(32)(nn.relu(nn.Dense(64)(x)))
        return nn.Dense(50, name="head")(x)


class DeepNorm(nn.Module):
    """LN(alpha x + f(x)) (Wang et al. 2022)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        alpha = (2 * 2) ** 0.25
        for _ in range(2):
            x = nn.LayerNorm()(x * alpha + nn.MultiHeadDotProductAttention(4)(x, x))
            x = nn.LayerNorm()(x * alpha + nn.Dense(32)(nn.relu(nn.Dense(64)(x))))
        return nn.Dense(50, name="head")(x)


class Universal(nn.Module):
    """One layer, again and again (Dehghani et al. 2019); with adaptive computation each position halts by itself."""

    adaptive: bool = False
    steps: int = 3

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        norms, attention = [nn.LayerNorm(), nn.LayerNorm()], nn.MultiHeadDotProductAttention(4)
        up, down, halt = nn.Dense(64), nn.Dense(32), nn.Dense(1)
        halting, remainders, previous = jnp.zeros((*tokens.shape, 1)), jnp.zeros((*tokens.shape, 1)), jnp.zeros_like(x)
        for t in range(self.steps):
            x = x + jnp.sin(jnp.arange(x.shape[1])[:, None] + t + jnp.arange(32) / 32)
            if self.adaptive:
                p = nn.sigmoid(halt(x))
                running = (halting < 1.0).astype(x.dtype)
                halted = (halting + p * running > 0.99).astype(x.dtype) * running
                running = (halting + p * running <= 0.99).astype(x.dtype) * running
                halting = halting + p * running
                remainders = remainders + halted * (1 - halting)
                halting = halting + halted * remainders
                weight = p * running + halted * remainders
            y = norms[0](x)
            x = x + attention(y, y)
            x = x + down(nn.relu(up(norms[1](x))))
            if self.adaptive:
                previous = x * weight + previous * (1 - weight)
        return nn.Dense(50, name="head")(nn.LayerNorm()(previous if self.adaptive else x))


class CLIP(nn.Module):
    """Two towers that end in unit vectors, and a scale for their products (Radford et al. 2021); returns what
    open_clip's does: both vectors, and the scale."""

    @nn.compact
    def __call__(self, image: Any, text: Any) -> Any:
        x = nn.Conv(32, (8, 8), (8, 8), use_bias=False, name="patches")(image).reshape(image.shape[0], -1, 32)
        image = nn.Dense(16, use_bias=False)(self.tower(nn.LayerNorm()(x)).mean(1))
        text = nn.Dense(16, use_bias=False)(self.tower(nn.Embed(50, 32, name="words")(text))[:, -1])
        image, text = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (image, text))
        return image, text, jnp.exp(self.param("scale", nn.initializers.constant(2.66), ()))

    def tower(self, x: Any) -> Any:
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(4)(y, y)
            h = nn.Dense(64)(nn.LayerNorm()(x))
            x = x + nn.Dense(32)(h * nn.sigmoid(1.702 * h))
        return nn.LayerNorm()(x)


LANGUAGE: tuple[Case, ...] = (
    case("bert", BERT, (TEXT,), (ATTENTION + MLP) * 2, 5, "words/embedding"),
    case("t5-tied", T5, (TOKENS, TARGETS), (ATTENTION + MLP) * 2 + (ATTENTION * 2 + MLP) * 2, 4 + 1 + 6 + 1,
         "shared/embedding", "shared/embedding"),
    case("t5-gated", lambda: T5(tied=False), (TOKENS, TARGETS), (ATTENTION + GATED) * 2 + (ATTENTION * 2 + GATED) * 2,
         4 + 1 + 6 + 1, "shared/embedding"),
    case("gpt2", GPT2, (TOKENS,), (ATTENTION + MLP) * 2, 5, "wte/embedding", "wte/embedding"),
    case("neox", NeoX, (TOKENS,), (ATTENTION + MLP) * 2, 5, "stem/embedding"),
    Case("llama-scan", ScannedLlama, (TOKENS,), 8, ATTENTION + GATED, 3, "stem/embedding", "head/kernel"),
    Case("llama-scan-remat", lambda: ScannedLlama(remat=True), (TOKENS,), 8, ATTENTION + GATED, 3, "stem/embedding",
         "head/kernel"),
    # A low-rank update is another way to write one kernel, no branch of its own; it stands in its chain with two.
    case("lora", lambda: Adapted(True), (TOKENS,), branch(4, 2.0) * 4, 5, "stem/embedding"),
    case("adapters", lambda: Adapted(False), (TOKENS,), (MLP + branch(4, 2.0)) * 4, 5, "stem/embedding"),
    case("memory-efficient", MemoryEfficient, (TOKENS,), (ATTENTION + MLP) * 2, 5, "stem/embedding"),
    case("gemma", Gemma, (TOKENS,), branch(2, 0.0) * 4, 9, "table/embedding", "table/embedding"),
    # The router decides what enters the experts: it stands before them, as a gate does behind.
    case("switch", Switch, (TOKENS,), (ATTENTION + branch(3, 2.0)) * 2, 5, "stem/embedding"),
    # Softmax weights of the chosen experts, renormalized, are a softmax over the chosen: no norm.
    case("mixtral", Mixtral, (TOKENS,), (ATTENTION + GATED) * 2, 5, "stem/embedding"),
    case("ragged-experts", RaggedExperts, (TOKENS,), branch(3, 2.0) * 2, 3, "stem/embedding"),
    # The kernel of positions is contracted with the query: behind it, before the output.
    case("transformer-xl", TransformerXL, (TOKENS,), (branch(3, 2.0) + MLP) * 2, 4, "stem/embedding"),
    # x + a (f - x): the branch ends in a norm and holds the stream.
    case("ngpt", NormalizedTransformer, (TOKENS,), branch(2, 0.0) * 4, 12, "stem/embedding"),
    case("gmlp", GMLP, (TOKENS,), branch(3, 3.0) * 2, 5, "stem/embedding"),
    case("fnet", FNet, (TOKENS,), (branch(0, 0.0) + MLP) * 2, 5, "stem/embedding"),
    # The first cross-attention is added to a parameter: no sum of activations, and the norm of latents no norm of one.
    case("perceiver", Perceiver, (IMAGES,), MLP + ATTENTION + MLP + ATTENTION + MLP + ATTENTION + MLP, 10,
         "cross0/key/kernel"),
    case("rezero", ReZero, (TOKENS,), (ATTENTION + MLP) * 2, 0, "stem/embedding"),
    case("deepnorm", DeepNorm, (TOKENS,), (ATTENTION + MLP) * 2, 4, "stem/embedding"),
    case("universal", Universal, (TOKENS,), (ATTENTION + MLP) * 3, 7, "stem/embedding"),
    case("universal-adaptive", lambda: Universal(adaptive=True), (TOKENS,), (ATTENTION + MLP) * 3, 7, "stem/embedding"),
    case("clip", CLIP, (IMAGES, TOKENS), (ATTENTION + MLP) * 4, 1 + 2 * 5 + 2, "patches/kernel", None),
)  # fmt: skip
