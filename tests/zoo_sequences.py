"""Families of sequence, graph and control-flow models, small, each with its structure worked out by hand."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from zoo import SEQUENCE, TOKENS, VECTORS, Case
from zoo_language import TARGETS, attend, heads, joined
from zoo_vision import ATTENTION, MLP, bn, branch, case

import fixup_init as fi

NODES = jax.ShapeDtypeStruct((9, 5), jnp.float32)
EDGES = jax.ShapeDtypeStruct((20, 3), jnp.float32)
ENDS = jax.ShapeDtypeStruct((20,), jnp.int32)
ALIGNMENT = jax.ShapeDtypeStruct((5, 9, 6), jnp.float32)
RESIDUES = jax.ShapeDtypeStruct((9, 4), jnp.float32)
POINTS = jax.ShapeDtypeStruct((4, 30, 3), jnp.float32)
CHOICE = jax.ShapeDtypeStruct((), jnp.int32)
KEY = jax.eval_shape(lambda: jax.random.key(0))


class LSTMLanguage(nn.Module):
    """Stacked LSTMs with dropout (Zaremba et al. 2014); residual between layers from the second on as in GNMT."""

    residual: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for _ in range(3):
            y = nn.RNN(nn.OptimizedLSTMCell(32))(nn.Dropout(0.5, deterministic=False)(x))
            x = x + y if self.residual else y
        return nn.Dense(50, name="head")(x)


class AttentiveGRU(nn.Module):
    """A decoder's step: additive attention over the memory, then a GRU (Bahdanau et al. 2015)."""

    @nn.compact
    def __call__(self, state: Any, x: Any, memory: Any, keys: Any) -> Any:
        scores = nn.Dense(1, use_bias=False)(jnp.tanh(nn.Dense(32)(state)[:, None] + keys))
        context = jnp.sum(nn.softmax(scores, axis=1) * memory, 1)
        state, y = nn.GRUCell(32)(state, jnp.concatenate([x, context], -1))
        return state, jnp.concatenate([y, context, x], -1)


class Seq2Seq(nn.Module):
    """GRU encoder and decoder with attention; the decoder starts from the encoder's end (Bahdanau et al. 2015)."""

    @nn.compact
    def __call__(self, tokens: Any, targets: Any) -> Any:
        last, memory = nn.RNN(nn.GRUCell(32), return_carry=True)(nn.Embed(50, 32, name="stem")(tokens))
        state = jnp.tanh(nn.Dense(32, name="bridge")(last))
        keys = nn.Dense(32, name="keys")(memory)
        step = nn.scan(
            AttentiveGRU, variable_broadcast="params", split_rngs={"params": False}, in_axes=(1, nn.broadcast,
            nn.broadcast), out_axes=1,
        )()  # fmt: skip
        _, y = step(state, nn.Embed(50, 32, name="targets")(targets), memory, keys)
        return nn.Dense(50, name="head")(nn.tanh(nn.Dense(32)(y)))


class Mamba(nn.Module):
    """Selective state spaces (Gu & Dao 2023), by a scan or an associative one; u * d is their direct term."""

    associative: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        table = nn.Embed(50, 16, name="table")
        x = table(tokens)
        for k in range(2):
            x = x + self.mixer(nn.RMSNorm()(x), k)
        return table.attend(nn.RMSNorm()(x))

    def mixer(self, x: Any, k: int, inner: int = 32, n: int = 4, rank: int = 2) -> Any:
        u, z = jnp.split(nn.Dense(2 * inner, use_bias=False)(x), 2, -1)
        u = nn.silu(nn.Conv(inner, (4,), padding="CAUSAL", feature_group_count=inner)(u))
        dt, b, c = jnp.split(nn.Dense(rank + 2 * n, use_bias=False)(u), (rank, rank + n), -1)
        dt = nn.softplus(nn.Dense(inner)(dt))
        a = -jnp.exp(self.param(f"log_a{k}", nn.initializers.zeros, (inner, n)))
        d = self.param(f"d{k}", nn.initializers.ones, (inner,))

        def step(h: Any, at: Any) -> Any:
            dt, b, c, u = at
            h = jnp.exp(dt[..., None] * a) * h + (dt * u)[..., None] * b[:, None]
            return h, jnp.einsum("bdn,bn->bd", h, c)

        if self.associative:

            def combine(one: Any, two: Any) -> Any:
                return one[0] * two[0], two[0] * one[1] + two[1]

            pairs = jnp.exp(dt[..., None] * a), (dt * u)[..., None] * b[:, :, None]
            h = jax.lax.associative_scan(combine, pairs, axis=1)[1]
            y = jnp.einsum("btdn,btn->btd", h, c)
        else:
            h = jnp.zeros((x.shape[0], inner, n))
            y = jax.lax.scan(step, h, tuple(t.swapaxes(0, 1) for t in (dt, b, c, u)))[1].swapaxes(0, 1)
        return nn.Dense(16, use_bias=False)((y + u * d) * nn.silu(z))


class RWKV(nn.Module):
    """Linear attention as a recurrence with decay, token shift, squared relu (Peng et al. 2023)."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.LayerNorm()(nn.Embed(50, 32, name="stem")(tokens))
        for k in range(2):
            x = x + self.time(nn.LayerNorm()(x), k)
            x = x + self.channels(nn.LayerNorm()(x), k)
        return nn.Dense(50, use_bias=False, name="head")(nn.LayerNorm()(x))

    def mixed(self, x: Any, name: str) -> Any:
        mix = self.param(f"mix_{name}", nn.initializers.constant(0.5), (32,))
        return x * mix + jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1] * (1 - mix)

    def time(self, x: Any, at: int) -> Any:
        k, v, r = (nn.Dense(32, use_bias=False)(self.mixed(x, f"time_{name}{at}")) for name in "kvr")
        w = -jnp.exp(self.param(f"decay{at}", nn.initializers.zeros, (32,)))
        first = self.param(f"first{at}", nn.initializers.zeros, (32,))

        def step(carry: Any, kv: Any) -> Any:
            (a, b, p), (k, v) = carry, kv
            q = jnp.maximum(p, first + k)
            e1, e2 = jnp.exp(p - q), jnp.exp(first + k - q)
            y = (e1 * a + e2 * v) / (e1 * b + e2)
            q = jnp.maximum(p + w, k)
            e1, e2 = jnp.exp(p + w - q), jnp.exp(k - q)
            return (e1 * a + e2 * v, e1 * b + e2, q), y

        zero = jnp.zeros((x.shape[0], 32))
        y = jax.lax.scan(step, (zero, zero, zero - 1e38), (k.swapaxes(0, 1), v.swapaxes(0, 1)))[1].swapaxes(0, 1)
        return nn.Dense(32, use_bias=False)(nn.sigmoid(r) * y)

    def channels(self, x: Any, at: int) -> Any:
        k = jnp.square(nn.relu(nn.Dense(64, use_bias=False)(self.mixed(x, f"channel_k{at}"))))
        r = nn.sigmoid(nn.Dense(32, use_bias=False)(self.mixed(x, f"channel_r{at}")))
        return r * nn.Dense(32, use_bias=False)(k)


class RetNet(nn.Module):
    """Retention without softmax: decay, group norm of each head, swish gate (Sun et al. 2023); recurrent or not."""

    recurrent: bool = False

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(50, 32, name="stem")(tokens)
        for _ in range(2):
            x = x + self.retention(nn.RMSNorm()(x))
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.RMSNorm()(x))))
        return nn.Dense(50, name="head")(nn.RMSNorm()(x))

    def retention(self, x: Any) -> Any:
        b, n, d = x.shape
        gamma = 1 - 2.0 ** (-5 - jnp.arange(4.0))
        q, k, v = heads(x), heads(x) * 8**-0.5, heads(x)
        if self.recurrent:

            def step(s: Any, at: Any) -> Any:
                q, k, v = at
                s = gamma[:, None, None] * s + k[..., :, None] * v[..., None, :]
                return s, jnp.einsum("bhk,bhkv->bhv", q, s)

            s = jnp.zeros((b, 4, 8, 8))
            y = jax.lax.scan(step, s, tuple(t.swapaxes(0, 1) for t in (q, k, v)))[1].swapaxes(0, 1)
        else:
            lag = jnp.arange(n)[:, None] - jnp.arange(n)[None]
            decay = jnp.where(lag >= 0, gamma[:, None, None] ** lag, 0.0)
            y = jnp.einsum("bhqk,bkhd->bqhd", jnp.einsum("bqhd,bkhd->bhqk", q, k) * decay, v)
        y = nn.RMSNorm(use_scale=False)(y).reshape(b, n, d)
        return nn.Dense(d, use_bias=False)(nn.swish(nn.Dense(d, use_bias=False)(x)) * y)


class GatedDelta(nn.Module):
    """Linear attention whose state forgets by a gate and is corrected by the delta rule (Yang et al. 2024): no stream
    runs through the state, whatever it is added to."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        def project(x: Any, features: int) -> Any:
            return nn.Dense(features, use_bias=False)(x).swapaxes(0, 1)

        def step(state: Any, now: Any) -> Any:
            q, k, v, b, a = now
            state = a[..., None] * state
            state = state + jnp.einsum("bk,bv->bkv", k, b * (v - jnp.einsum("bk,bkv->bv", k, state)))
            return state, jnp.einsum("bk,bkv->bv", q, state)

        x = nn.Embed(32, 16, name="stem")(tokens)
        for _ in range(2):
            h = nn.LayerNorm()(x)
            now = (*(project(h, 16) for _ in range(3)), *(nn.sigmoid(project(h, 1)) for _ in range(2)))
            _, out = jax.lax.scan(step, jnp.zeros((x.shape[0], 16, 16)), now)
            x = x + nn.Dense(16)(out.swapaxes(0, 1))
        return nn.Dense(4, name="head")(x)


class S4D(nn.Module):
    """Diagonal complex state spaces as long convolutions (Gu et al. 2022), post-norm, as in s4d.py."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(16, name="stem")(x)
        for k in range(2):
            x = nn.LayerNorm()(x + self.layer(x.swapaxes(1, 2), k).swapaxes(1, 2))
        return nn.Dense(10, name="head")(x.mean(1))

    def layer(self, u: Any, k: int, n: int = 4) -> Any:
        h, length = u.shape[1:]
        normal, constant = nn.initializers.normal, nn.initializers.constant
        dt = jnp.exp(self.param(f"log_dt{k}", normal(1.0), (h, 1)))
        c = self.param(f"c{k}", normal(0.7), (h, n, 2))
        c = c[..., 0] + 1j * c[..., 1]
        a = -jnp.exp(self.param(f"log_a{k}", constant(-0.7), (h, n)))
        a = a + 1j * self.param(f"a{k}", lambda _, shape: jnp.pi * jnp.ones(shape) * jnp.arange(n), (h, n))
        powers = jnp.exp((a * dt)[..., None] * jnp.arange(length))
        kernel = 2 * jnp.einsum("hn,hnl->hl", c * (jnp.exp(a * dt) - 1) / a, powers).real
        y = jnp.fft.irfft(jnp.fft.rfft(u, 2 * length) * jnp.fft.rfft(kernel, 2 * length), 2 * length)[..., :length]
        y = nn.gelu(y + u * self.param(f"d{k}", normal(1.0), (h, 1)))
        a, b = jnp.split(nn.Dense(2 * h)(y.swapaxes(1, 2)), 2, -1)
        return (a * nn.sigmoid(b)).swapaxes(1, 2)


class WaveNet(nn.Module):
    """Gated dilated convolutions, residual, and outputs of every block summed (van den Oord et al. 2016)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(16, (2,), padding="CAUSAL", name="stem")(x)
        total = 0.0
        for dilation in (1, 2, 4, 8):
            f, g = (nn.Conv(16, (2,), kernel_dilation=(dilation,), padding="CAUSAL")(x) for _ in range(2))
            z = jnp.tanh(f) * nn.sigmoid(g)
            total = total + nn.Conv(32, (1,))(z)
            x = x + nn.Conv(16, (1,))(z)
        return nn.Conv(32, (1,), name="head")(nn.relu(nn.Conv(32, (1,))(nn.relu(total))))


class NormalizedConv(nn.Module):
    """A causal convolution with a weight norm (Salimans & Kingma 2016)."""

    features: int
    dilation: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        v = self.param("v", nn.initializers.normal(0.01), (3, x.shape[-1], self.features))
        g = self.param("g", nn.initializers.ones, (self.features,))
        w = g * v / jnp.sqrt(jnp.sum(v**2, (0, 1)))
        x = jnp.pad(x, ((0, 0), (2 * self.dilation, 0), (0, 0)))
        numbers = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(x, w, (1,), "VALID", None, (self.dilation,), numbers)
        return y + self.param("b", nn.initializers.zeros, (self.features,))


class TCN(nn.Module):
    """Dilated causal convolutions, weight norm, relu at the end of the branch and behind the sum (Bai et al. 2018)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for k, features in enumerate((24, 24, 24)):
            y = x
            for _ in range(2):
                y = nn.Dropout(0.2, deterministic=False)(nn.relu(NormalizedConv(features, 2**k)(y)))
            x = nn.relu(y + (nn.Conv(features, (1,))(x) if x.shape[-1] != features else x))
        return nn.Dense(10, name="head")(x[:, -1])


def layer_drop() -> fi.Function:
    """Whole blocks are skipped at random, by `lax.cond` (LayerDrop, Fan et al. 2020)."""

    def apply(params: Any, x: Any, key: Any) -> Any:
        x = x @ params["stem"]
        for k, (up, down) in zip(jax.random.split(key, 3), params["blocks"], strict=True):

            def block(x: Any, up: Any = up, down: Any = down) -> Any:
                return x + jax.nn.relu(x @ up) @ down

            x = jax.lax.cond(jax.random.bernoulli(k, 0.8), block, lambda x: x, x)
        return x @ params["head"]

    blocks = [(_shape(16, 32), _shape(32, 16)) for _ in range(3)]
    return fi.Function(apply, {"stem": _shape(16, 16), "blocks": blocks, "head": _shape(16, 3)})


def switched() -> fi.Function:
    """x + one of three experts: of two layers, of one, and a gated one, by `lax.switch`."""

    def apply(params: Any, x: Any, choice: Any) -> Any:
        x = x @ params["stem"]
        for a, b, c in params["blocks"]:

            def two(x: Any, w: Any = a) -> Any:
                return jax.nn.relu(x @ w[0]) @ w[1]

            def one(x: Any, w: Any = b) -> Any:
                return jnp.tanh(x @ w)

            def gated(x: Any, w: Any = c) -> Any:
                return (jax.nn.silu(x @ w[0]) * (x @ w[1])) @ w[2]

            x = x + jax.lax.switch(choice, [two, one, gated], x)
        return x @ params["head"]

    w = _shape(16, 16)
    return fi.Function(apply, {"stem": w, "blocks": [((w, w), w, (w, w, w)) for _ in range(2)], "head": w})


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Evoformer(nn.Module):
    """Alignment rows with a pair bias and gates, outer product mean, triangle products (Jumper et al. 2021)."""

    @nn.compact
    def __call__(self, alignment: Any, target: Any) -> Any:
        m = nn.Dense(32, name="stem")(alignment) + nn.Dense(32, name="row")(target)[None]
        z = nn.Dense(16, name="left")(target)[:, None] + nn.Dense(16, name="right")(target)[None]
        for _ in range(2):
            y = nn.LayerNorm()(m)
            bias = nn.Dense(4, use_bias=False)(nn.LayerNorm()(z)).transpose(2, 0, 1)
            m = m + joined(attend(heads(y), heads(y), heads(y), bias) * nn.sigmoid(heads(y)))
            m = m + nn.Dense(32)(nn.relu(nn.Dense(64)(nn.LayerNorm()(m))))
            y = nn.LayerNorm()(m)
            outer = jnp.einsum("sic,sjd->ijcd", nn.Dense(4)(y), nn.Dense(4)(y)) / m.shape[0]
            z = z + nn.Dense(16)(outer.reshape(*outer.shape[:2], -1))
            y = nn.LayerNorm()(z)
            a, b = (nn.Dense(16)(y) * nn.sigmoid(nn.Dense(16)(y)) for _ in range(2))
            gate = nn.sigmoid(nn.Dense(16)(y))
            z = z + nn.Dense(16)(nn.LayerNorm()(jnp.einsum("ikc,jkc->ijc", a, b))) * gate
            z = z + nn.Dense(16)(nn.relu(nn.Dense(64)(nn.LayerNorm()(z))))
        return nn.Dense(3, name="head")(z)


class GAT(nn.Module):
    """Attention over a graph's edges: a softmax over each node's neighbours (Velickovic et al. 2018)."""

    @nn.compact
    def __call__(self, nodes: Any, senders: Any, receivers: Any) -> Any:
        x, n = nn.Dense(16, name="stem")(nodes), nodes.shape[0]
        for _ in range(2):
            h = nn.Dense(16, use_bias=False)(x)
            logits = nn.leaky_relu(nn.Dense(1)(h)[senders] + nn.Dense(1)(h)[receivers], 0.2)
            most = jax.ops.segment_max(logits, receivers, n)
            weights = jnp.exp(logits - most[receivers])
            weights = weights / jax.ops.segment_sum(weights, receivers, n)[receivers]
            x = x + nn.elu(jax.ops.segment_sum(weights * h[senders], receivers, n))
        return nn.Dense(4, name="head")(x)


class PointNet(nn.Module):
    """A transformation predicted as the identity and a correction, then one pool over points (Qi et al. 2017)."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def network(x: Any, first: str | None = None) -> Any:
            x = nn.relu(bn(nn.Dense(16, name=first)(x)))
            return nn.relu(bn(nn.Dense(32)(x)))

        turn = nn.Dense(9)(network(x, "stem").max(1)).reshape(-1, 3, 3) + jnp.eye(3)
        x = network(x @ turn)
        turn = nn.Dense(32 * 32)(network(x).max(1)).reshape(-1, 32, 32) + jnp.eye(32)
        return nn.Dense(10, name="head")(network(x @ turn).max(1))


def euler() -> fi.Function:
    """An ordinary differential equation in steps of one length, by `lax.fori_loop` (Chen et al. 2018)."""

    def apply(params: Any, x: Any) -> Any:
        def step(k: Any, x: Any) -> Any:
            t = jnp.full_like(x[:, :1], k / 4)
            return x + 0.25 * (jnp.tanh(jnp.concatenate([x, t], 1) @ params["up"]) @ params["down"])

        return jax.lax.fori_loop(0, 4, step, x @ params["stem"]) @ params["head"]

    shapes = {"stem": (16, 16), "up": (17, 32), "down": (32, 16), "head": (16, 3)}
    return fi.Function(apply, {k: _shape(*v) for k, v in shapes.items()})


class GIN(nn.Module):
    """Sums over neighbours, a network of two layers, and a residual (Xu et al. 2019; Dwivedi et al. 2020)."""

    @nn.compact
    def __call__(self, nodes: Any, senders: Any, receivers: Any) -> Any:
        x = nn.Dense(16, name="stem")(nodes)
        for k in range(3):
            near = jax.ops.segment_sum(x[senders], receivers, x.shape[0])
            y = (1 + self.param(f"eps{k}", nn.initializers.zeros, ())) * x + near
            x = x + nn.relu(bn(nn.Dense(16)(nn.relu(bn(nn.Dense(16)(y))))))
        return nn.Dense(4, name="head")(x.mean(0))


class MeshGraphNet(nn.Module):
    """Edges and nodes, each with a residual network that ends in a norm (Pfaff et al. 2021)."""

    @nn.compact
    def __call__(self, nodes: Any, edges: Any, senders: Any, receivers: Any) -> Any:
        def network(x: Any, name: str | None = None) -> Any:
            x = nn.relu(nn.Dense(16, name=name)(x))
            return nn.LayerNorm()(nn.Dense(16)(x))

        v, e = network(nodes, "stem"), network(edges)
        for _ in range(2):
            e = e + network(jnp.concatenate([e, v[senders], v[receivers]], -1))
            v = v + network(jnp.concatenate([v, jax.ops.segment_sum(e, receivers, v.shape[0])], -1))
        return nn.Dense(2, name="head")(nn.relu(nn.Dense(16)(v)))


SEQUENCES: tuple[Case, ...] = (
    case("lstm-language", LSTMLanguage, (TOKENS,), (), 0, "stem/embedding"),
    # One step's chain counts: input to gates to output; tanh keeps the order, the gates have none.
    case("lstm-residual", lambda: LSTMLanguage(residual=True), (TOKENS,), branch(1, 1.0) * 3, 0, "stem/embedding"),
    case("seq2seq", Seq2Seq, (TOKENS, TARGETS), (), 0, "stem/embedding"),
    # In, depthwise, to dt, dt, out; the direct term, two kernels deep, is the slowest: in, depthwise, z, out.
    case("mamba", Mamba, (TOKENS,), branch(5, 4.0) * 2, 3, "table/embedding", "table/embedding"),
    case("mamba-associative", lambda: Mamba(associative=True), (TOKENS,), branch(5, 4.0) * 2, 3, "table/embedding",
         "table/embedding"),
    case("rwkv", RWKV, (TOKENS,), (branch(2, 2.0) + branch(2, 3.0)) * 2, 6, "stem/embedding"),
    case("retnet", RetNet, (TOKENS,), (branch(2, 2.0) + MLP) * 2, 7, "stem/embedding"),
    case("retnet-recurrent", lambda: RetNet(recurrent=True), (TOKENS,), (branch(2, 2.0) + MLP) * 2, 7,
         "stem/embedding"),
    # Query times key times value, and out.
    case("gated-delta", GatedDelta, (TOKENS,), branch(2, 4.0) * 2, 2, "stem/embedding"),
    case("s4d", S4D, (SEQUENCE,), branch(1, 1.0) * 2, 2),
    # The last block's residual leads nowhere.
    case("wavenet", WaveNet, (SEQUENCE,), MLP * 3, 0),
    # A normalized kernel does not shrink.
    case("tcn", TCN, (SEQUENCE,), branch(2, 0.0, "projection") + branch(2, 0.0) * 2, 0, None),
    case("layer-drop", layer_drop, (VECTORS, KEY), MLP * 3, 0, "stem", "head"),
    case("switched", switched, (VECTORS, CHOICE), branch(2, 1.0) * 2, 0, "stem", "head"),
    # From the pair's split to its sum lies all that it biased: bias, out, transition (2), outer product (2). So too
    # from the alignment's split to its next: outer product (2), triangle (2), transition (2), bias, out.
    case("evoformer", Evoformer, (ALIGNMENT, RESIDUES),
         ATTENTION + MLP + branch(6, 3.0) + branch(2, 1.0) + MLP
         + branch(8, 2.0) + MLP + branch(6, 3.0) + branch(2, 1.0) + MLP, 14),
    case("gat", GAT, (NODES, ENDS, ENDS), branch(2, 1.0) * 2, 0),
    case("pointnet", PointNet, (POINTS,), (), 8),
    Case("euler", euler, (VECTORS,), 4, MLP, 0, "stem", "head"),
    case("gin", GIN, (NODES, ENDS, ENDS), branch(2, 0.0) * 3, 6),
    # Edges and nodes are each other's branch: but for the first edges, each passes the other's network.
    case("mesh-graph-net", MeshGraphNet, (NODES, EDGES, ENDS, ENDS), branch(2, 0.0) + branch(4, 0.0) * 3, 6),
)  # fmt: skip
