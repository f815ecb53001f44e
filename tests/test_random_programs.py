"""Random residual programs whose structure is known by construction, and that it is found exactly.

A program is a chain of steps, and a branch of a residual step is a chain again. `Run` executes it in plain JAX;
`Walk` works out the structure from the same steps, without a graph. Left out are programs that can be read in another
way than they were written (`unclear`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import fixup_init as fi

INPUTS = (
    jax.ShapeDtypeStruct((2, 8, 8), jnp.float32),  # the stream: batch, tokens, features
    jax.ShapeDtypeStruct((2, 4), jnp.float32),  # a time, to condition on
    jax.ShapeDtypeStruct((2, 5, 6), jnp.float32),  # a memory, to attend to
    jax.eval_shape(lambda: jax.random.key(0)),
)


@dataclass_transform(frozen_default=True)
class Step:
    """What a program is made of."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True)(cls)


class Dense(Step):
    form: str = "matmul"  # or einsum, left (the kernel is the left operand), written (product and sum), conv, conv3
    bias: bool = False
    kernel: str = "plain"  # or halved, standardized, concatenated (of two), low_rank (w + a b)
    width: int = 8


class Act(Step):
    name: str = "relu"


class Norm(Step):
    form: str = "layer"
    affine: bool = True


class Gated(Step):
    """act(W1 y) * (W2 y), then W3."""

    act: str = "silu"
    width: int = 8


class Attention(Step):
    source: str = "self"  # or memory
    softmax: bool = True
    norms: bool = False
    causal: bool = False
    rotary: bool = False
    width: int = 8


class Condition(Step):
    """y + b, y (1 + s) + b or y s + b, where s and b are layers of the time or its embedding."""

    form: str = "add"  # film, scale
    source: str = "time"  # hidden (a layer and silu in front, in place), embedding (shared by the program)


class Op(Step):
    """Any other: see `Run.run_Op`."""

    kind: str


class Residual(Step):
    """Branches and a skip, summed."""

    branches: tuple[tuple[Any, ...], ...]
    skip: str = "identity"  # projection, flip, pad, pool
    factors: tuple[str, ...] = ("none",) * 3  # of the branches: none, constant, scalar, vector
    shared: tuple[Any, ...] = ()  # steps in front of all branches
    at: int = 0  # place of the skip among the terms
    skip_first: bool = True  # evaluated before the branches
    skip_factor: str = "none"
    minus: int = 0  # the term that is subtracted, none if 0
    scaled: bool = False  # the sum is divided by sqrt(2)
    call: str = "plain"  # jit, remat


class Toward(Step):
    """x + c (f(x) - x): a residual of branch f, unless c is an activation (a gate) or absent (straight-through)."""

    steps: tuple[Any, ...]
    factor: str = "constant"  # none, scalar, vector, gate


class Cond(Step):
    """One of several chains; the last one may return zeros."""

    arms: tuple[tuple[Any, ...], ...]
    zero: bool = False  # one more arm
    routed: bool = False  # by the stream and not by chance


class Loop(Step):
    steps: tuple[Any, ...]
    times: int = 2
    form: str = "scan"  # parameters of their own each time; or reuse: the same parameters again


class Net(Step):
    steps: tuple[Any, ...]
    stem: str = "dense"  # none, embedding
    head: str = "dense"  # none, pooled
    memory: tuple[Any, ...] = ()  # what encodes the memory


SETS_WIDTH = (Dense, Gated, Attention)
# Activations, and what factor they put on the order of their argument.
SLOPED = ("relu", "gelu", "silu", "tanh", "elu", "leaky_relu", "relu6", "hard_tanh", "mish", "soft_sign", "hard_swish")
ACTS: dict[str, tuple[Any, int]] = {
    **{name: (getattr(jax.nn, name), 1) for name in SLOPED},
    **{name: (getattr(jax.nn, name), 0) for name in ("sigmoid", "softplus", "squareplus", "softmax")},
    "erf_gelu": (lambda x: jax.nn.gelu(x, approximate=False), 1),
    "squared_relu": (lambda x: jnp.square(jax.nn.relu(x)), 2),
    "cubic": (lambda x: x + 0.04 * x**3, 1),
}


class Run:
    """Runs a program: first to learn the shapes of its parameters, then on them."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.facts: dict[str, tuple[str, int, int]] = {}  # kind and fans, by weight
        self.spans: dict[Any, Any] = {}  # end of the parameters of a scan, by their start and the scan
        self.lengths: list[int] = []
        self.leaves: dict[str, Any] | None = None
        self.taken = (0, 0)
        jax.eval_shape(lambda *a: self(None, *a), *INPUTS)

    def function(self) -> fi.Function:
        return fi.Function(self, {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in self.shapes.items()})

    def __call__(self, leaves: dict[str, Any] | None, x: Any, time: Any, memory: Any, key: Any) -> Any:
        self.leaves, self.taken, self.time, self.memory, self.key = leaves, (0, 0), time, memory, key
        if uses_embedding(self.net):
            self.embedding = jax.nn.silu(self.layer(time, 8, bias=True))
        self.memory = self.steps(self.net.memory, memory)
        if self.net.stem == "embedding":
            x = self.layer(jax.nn.one_hot(x.argmax(-1), 8), 8)
            self.facts[f"w{self.taken[0] - 1:03}"] = ("embedding", 1, 8)
        elif self.net.stem == "dense":
            x = self.layer(x, 8, bias=True)
        x = self.steps(self.net.steps, x)
        if self.net.head == "pooled":
            x = x.mean(1)
        return x if self.net.head == "none" else self.layer(x, 3)

    def take(self, shape: tuple[int, ...], kernel: bool = False) -> Any:
        weights, others = self.taken
        name = f"w{weights:03}" if kernel else f"p{others:03}"
        self.taken = (weights + kernel, others + (not kernel))
        if self.leaves is not None:
            return self.leaves[name]
        self.shapes.setdefault(name, (*self.lengths, *shape))
        return jnp.zeros(shape)

    def layer(self, x: Any, width: int, bias: bool = False, form: str = "matmul", kernel: str = "plain") -> Any:
        n = x.shape[-1]
        conv = form.startswith("conv") and x.ndim == 3
        field = 3 if form == "conv3" and conv else 1
        shape = (field, n, width) if conv else (n, width)
        first = self.taken[0]

        def take(width: int) -> Any:
            part = (*shape[:-1], width)
            return self.take(part[::-1] if form == "left" else part, kernel=True)

        if kernel == "concatenated":
            w = jnp.concatenate([take(width // 2), take(width // 2)], 0 if form == "left" else -1)
        elif kernel == "low_rank":
            a, b = shape[::-1] if form == "left" else shape[-2:]
            tall = field * a >= b  # the larger factor is a kernel, too
            w = take(width) + self.take((*shape[:-2], a, 2), kernel=tall) @ self.take((2, b), kernel=not tall)
        else:
            w = take(width)
        for k in range(first, self.taken[0]):
            self.facts[f"w{k:03}"] = ("conv" if conv else "dense", n * field, width * field)
        if kernel == "halved":
            w = w * 0.5
        elif kernel == "standardized":
            axes = tuple(range(w.ndim - 1))
            w = (w - w.mean(axes)) * jax.lax.rsqrt(w.var(axes) + 1e-4) * self.take(w.shape[-1:])
        if conv:
            y = jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
        elif form == "einsum":
            y = jnp.einsum("...i,io->...o", x, w)
        elif form == "written":
            y = (x[..., None] * w).sum(-2)
        elif form == "left":
            y = jnp.moveaxis(jnp.tensordot(w, x, ((1,), (x.ndim - 1,))), 0, -1)
        else:
            y = x @ w
        return y + self.take((width,)) if bias else y

    def steps(self, steps: Iterable[Any], x: Any, width: int | None = None) -> Any:
        """Runs a chain; `width` is that of its result, where given."""
        steps = tuple(steps)
        last = max((k for k, s in enumerate(steps) if isinstance(s, SETS_WIDTH)), default=None)
        for k, s in enumerate(steps):
            if width is not None and k == last:
                s = dataclasses.replace(s, width=width)
            x = getattr(self, f"run_{type(s).__name__}")(s, x)
        return x

    def run_Dense(self, s: Dense, x: Any) -> Any:
        return self.layer(x, s.width, s.bias, s.form, s.kernel)

    def run_Act(self, s: Act, x: Any) -> Any:
        return ACTS[s.name][0](x)

    def run_Norm(self, s: Norm, x: Any) -> Any:
        if s.form == "rms":
            x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        elif s.form == "l2":
            x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        elif s.form == "two_pass":
            mean = x.mean(-1, keepdims=True)
            x = (x - mean) / jnp.sqrt((x**2).mean(-1, keepdims=True) - mean**2 + 1e-6)
        elif s.form == "std":
            x = (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5)
        else:  # layer, instance, batch
            axes = {"layer": -1, "instance": 1, "batch": (0, 1)}[s.form]
            x = (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)
        return x * self.take(x.shape[-1:]) + self.take(x.shape[-1:]) if s.affine else x

    def run_Gated(self, s: Gated, x: Any) -> Any:
        gate = ACTS[s.act][0](self.layer(x, 12))
        return self.layer(gate * self.layer(x, 12), s.width)

    def run_Attention(self, s: Attention, x: Any) -> Any:
        def rotate(y: Any) -> Any:
            angle = jnp.arange(y.shape[1])[:, None] * jnp.ones(4)
            a, b = jnp.split(y, 2, -1)
            cos, sin = jnp.cos(angle), jnp.sin(angle)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        source = x if s.source == "self" else self.memory
        q, k, v = self.layer(x, 8), self.layer(source, 8), self.layer(source, 8)
        if s.norms:
            q, k = self.run_Norm(Norm("rms"), q), self.run_Norm(Norm("rms"), k)
        if s.rotary:
            q, k = rotate(q), rotate(k)
        scores = jnp.einsum("bqd,bkd->bqk", q, k) / 8**0.5
        if s.causal:
            scores = jnp.where(jnp.tri(*scores.shape[1:], dtype=bool), scores, -1e9 if s.softmax else 0.0)
        if s.softmax:
            scores = jax.nn.softmax(scores)
        return self.layer(jnp.einsum("bqk,bkd->bqd", scores, v), s.width)

    def run_Condition(self, s: Condition, x: Any) -> Any:
        width = x.shape[-1]
        c = self.embedding if s.source == "embedding" else self.time
        if s.source == "hidden":
            c = jax.nn.silu(self.layer(c, 8, bias=True))
        if s.form != "add":
            factor = self.layer(c, width, bias=True)[:, None]
            x = x * (1 + factor) if s.form == "film" else x * factor
        return x + self.layer(c, width)[:, None]

    def run_Op(self, s: Op, x: Any) -> Any:
        n = x.shape[-1]
        if s.kind in ("mask", "select"):  # dropout
            keep = jax.random.bernoulli(self.key, 0.8, x.shape)
            return jnp.where(keep, x / 0.8, 0.0) if s.kind == "select" else x * keep / 0.8
        if s.kind == "mean":  # over tokens, at every token
            return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)
        if s.kind == "time":
            return x + self.time.mean(-1)[:, None, None]
        if s.kind == "position":  # an additive table of parameters
            return x + self.take(x.shape[1:])
        if s.kind == "squeeze_excite":
            y = jax.nn.relu(self.layer(x.mean(1), 4, bias=True))
            return x * jax.nn.sigmoid(self.layer(y, n, bias=True))[:, None]
        if s.kind == "glu":
            a, b = jnp.split(self.layer(x, 2 * n, bias=True), 2, -1)
            return a * jax.nn.sigmoid(b)
        if s.kind == "parallel":
            return self.layer(x, n) + self.layer(x, n)
        if s.kind == "gate":
            t = jax.nn.sigmoid(self.layer(x, n, bias=True))
            return t * jax.nn.relu(self.layer(x, n)) + (1 - t) * x
        if s.kind == "mean_gate":
            return x * jax.nn.sigmoid(x.mean(1, keepdims=True))
        if s.kind == "centre":
            return x - x.mean(-1, keepdims=True)
        if s.kind == "sources":
            return self.layer(x, n) + self.layer(self.time, n)[:, None]
        if s.kind == "noise":
            mean, logarithm = self.layer(x, n), self.layer(x, n)
            return mean + jnp.exp(0.5 * logarithm) * jax.random.normal(self.key, mean.shape)
        if s.kind == "concatenate":
            return self.layer(jnp.concatenate([x, jax.nn.relu(self.layer(x, 4))], -1), n)
        if s.kind == "experts":
            gates = jax.nn.softmax(self.layer(x, 2))
            return gates[..., :1] * self.layer(x, n) + gates[..., 1:] * self.layer(x, n)
        assert s.kind == "dead"
        _ = x + self.layer(jax.nn.relu(self.layer(x, n)), n)
        return x

    def scaled(self, x: Any, factor: str) -> Any:
        if factor == "none":
            return x
        return x * (0.5 if factor == "constant" else self.take(() if factor == "scalar" else x.shape[-1:]))

    def run_Residual(self, s: Residual, x: Any) -> Any:
        if s.call != "plain":
            inner = dataclasses.replace(s, call="plain")
            return {"jit": jax.jit, "remat": jax.checkpoint}[s.call](lambda x: self.run_Residual(inner, x))(x)
        width = x.shape[-1] * (2 if s.skip == "pad" else 1)

        def pool(y: Any) -> Any:
            if s.skip != "pool":
                return y
            return y.reshape(y.shape[0], -1, 2 if y.shape[1] > 2 else 1, y.shape[-1]).mean(2)

        def skip() -> Any:
            y = x[:, ::-1] if s.skip == "flip" else pool(x)
            if s.skip == "pad":
                y = jnp.pad(y, ((0, 0), (0, 0), (0, width - y.shape[-1])))
            return self.scaled(self.layer(y, width, bias=True) if s.skip == "projection" else y, s.skip_factor)

        first = skip() if s.skip_first else None
        inner = self.steps(s.shared, x, x.shape[-1])
        terms = [self.scaled(pool(self.steps(b, inner, width)), f) for b, f in zip(s.branches, s.factors, strict=False)]
        terms.insert(s.at, first if s.skip_first else skip())
        total = terms[0]
        for k, term in enumerate(terms[1:], 1):
            total = total - term if k == s.minus else total + term
        return total / 2**0.5 if s.scaled else total

    def run_Toward(self, s: Toward, x: Any) -> Any:
        difference = self.steps(s.steps, x, x.shape[-1]) - x
        if s.factor == "gate":
            return x + jax.nn.sigmoid(self.layer(x, x.shape[-1], bias=True)) * difference
        return x + self.scaled(difference, s.factor)

    def run_Cond(self, s: Cond, x: Any) -> Any:
        arms = [functools.partial(self.steps, arm, width=x.shape[-1]) for arm in s.arms] + [jnp.zeros_like] * s.zero
        if s.routed:
            index = jnp.where(x.mean() > 0, len(arms) - 1, 0)
        else:
            index = jax.random.randint(self.key, (), 0, len(arms))
        return jax.lax.switch(index, arms, x)  # traces the arms in their order

    def run_Loop(self, s: Loop, x: Any) -> Any:
        start = self.taken
        if s.form == "reuse":
            for _ in range(s.times):
                self.taken = start
                x = self.steps(s.steps, x, x.shape[-1])
            return x
        if self.leaves is None:
            self.lengths.append(s.times)
            x = self.steps(s.steps, x, x.shape[-1])
            self.lengths.pop()
            self.spans[start, s] = self.taken
            return x
        outside = self.leaves
        end = self.spans[start, s]
        names = [f"w{k:03}" for k in range(start[0], end[0])] + [f"p{k:03}" for k in range(start[1], end[1])]

        def body(x: Any, slices: dict[str, Any]) -> Any:
            self.leaves, self.taken = {**outside, **slices}, start
            x = self.steps(s.steps, x, x.shape[-1])
            self.leaves = outside
            return x, None

        x, _ = jax.lax.scan(body, x, {n: outside[n] for n in names}, length=s.times)
        return x


# A branch as it is expected.
_FIELDS = "weights depth order order_without_norms skip skip_weights repeats norms arms alternatives"
Found = collections.namedtuple("Found", _FIELDS)


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of a value: in each branch around it its orders and its depth, and the last layers before it."""

    frames: tuple[tuple[float, float, int], ...] = ()  # (order, order without norms, depth)
    feeds: frozenset[int] = frozenset()
    above: frozenset[int] = frozenset()  # every layer that leads to it

    def change(self, order: Any, free: Any = None, depth: Any = lambda d: d) -> Flow:
        free = order if free is None else free
        return dataclasses.replace(self, frames=tuple((order(a), free(b), depth(c)) for a, b, c in self.frames))

    def opened(self) -> Flow:
        return dataclasses.replace(self, frames=(*self.frames, (0.0, 0.0, 0)))

    def closed(self) -> Flow:
        return dataclasses.replace(self, frames=self.frames[:-1])


def _combine(orders: Any, *flows: Flow) -> Flow:
    frames = zip(*(f.frames for f in flows), strict=True)
    return Flow(
        tuple((orders(f[0] for f in each), orders(f[1] for f in each), max(f[2] for f in each)) for each in frames),
        frozenset().union(*(f.feeds for f in flows)),
        frozenset().union(*(f.above for f in flows)),
    )


total = functools.partial(_combine, min)
product = functools.partial(_combine, sum)


class Walk:
    """Works out the structure of a program: sums take the least order, products add them, each layer adds one."""

    def __init__(self, net: Net) -> None:
        self.names = self.norms = self.switches = self.count = 0
        self.layers: list[tuple[str, ...]] = []  # in trace order, by the names of what each kernel is joined from
        self.arms: list[tuple[tuple[int, int, int], ...]] = []  # (conditional, arm, arms) around each layer
        self.arm: tuple[tuple[int, int, int], ...] = ()
        self.branches: list[Found] = []
        self.inside: set[int] = set()  # layers in branches and on skips
        self.split: Flow | None = None  # the first
        self.repeats = 1
        self.muted = False
        self.embedding = self.memory = Flow()
        if uses_embedding(net):
            self.embedding = self.layer(Flow())
        self.memory = self.steps(net.memory, Flow())
        x = Flow() if net.stem == "none" else self.layer(Flow())
        x = self.steps(net.steps, x)
        if net.head != "none":
            x = self.layer(x)
        last = set() if self.inside & x.feeds else x.feeds  # an output of a residual sum has no head
        self.open_heads = len(last) > 1
        self.heads = {w for k in last for w in self.layers[k]} if len(last) == 1 else set()
        free = [k for k in range(len(self.layers)) if k not in self.inside and not (len(last) == 1 and k in last)]
        stems = free[:1] if self.split is None else [k for k in free if k in self.split.above]
        self.stems = self.named(stems)

    def named(self, layers: Iterable[int]) -> tuple[str, ...]:
        return tuple(w for k in layers for w in self.layers[k])

    def layer(self, x: Flow, kernel: str = "plain") -> Flow:
        joined = 2 if kernel in ("concatenated", "low_rank") else 1
        names = tuple(f"w{k:03}" for k in range(self.names, self.names + joined))
        self.names += joined
        y = x.change(lambda d: d + (kernel != "standardized"), lambda d: d + 1, lambda c: c + 1)
        self.layers.append(names)
        self.arms.append(self.arm)
        this = frozenset({len(self.layers) - 1})
        return dataclasses.replace(y, feeds=this, above=x.above | this)

    def source(self, like: Flow, of: Flow | None = None) -> Flow:
        """A value from outside of every branch around `like`."""
        return dataclasses.replace(of or Flow(), frames=((0.0, 0.0, 0),) * len(like.frames))

    def steps(self, steps: Iterable[Any], x: Flow) -> Flow:
        for s in steps:
            x = getattr(self, f"walk_{type(s).__name__}")(s, x)
        return x

    def walk_Dense(self, s: Dense, x: Flow) -> Flow:
        return self.layer(x, s.kernel)

    def walk_Act(self, s: Act, x: Flow) -> Flow:
        return x.change(lambda d: ACTS[s.name][1] * d)

    def walk_Norm(self, s: Norm, x: Flow) -> Flow:
        self.norms += 1
        return x.change(lambda d: 0.0, lambda d: d)

    def walk_Gated(self, s: Gated, x: Flow) -> Flow:
        gate = self.walk_Act(Act(s.act), self.layer(x))
        return self.layer(product(gate, self.layer(x)))

    def walk_Attention(self, s: Attention, x: Flow) -> Flow:
        source = x if s.source == "self" else self.source(x, self.memory)
        q, k, v = self.layer(x), self.layer(source), self.layer(source)
        if s.norms:
            q, k = self.walk_Norm(Norm(), q), self.walk_Norm(Norm(), k)
        scores = product(q, k)
        if s.softmax:
            scores = scores.change(lambda d: 0.0)
        return self.layer(product(scores, v))

    def walk_Condition(self, s: Condition, x: Flow) -> Flow:
        c = self.source(x, self.embedding if s.source == "embedding" else None)
        if s.source == "hidden":
            c = self.layer(c)
        if s.form != "add":
            factor = self.layer(c)
            x = product(x, factor.change(lambda d: 0.0) if s.form == "film" else factor)
        return total(x, self.layer(c))

    def walk_Op(self, s: Op, x: Flow) -> Flow:
        if s.kind == "time":
            return total(x, self.source(x))
        if s.kind == "squeeze_excite":
            return product(x, self.layer(self.layer(x)).change(lambda d: 0.0))
        if s.kind == "glu":
            return self.layer(x)
        if s.kind == "parallel":
            return total(self.layer(x), self.layer(x))
        if s.kind == "gate":
            t = self.layer(x).change(lambda d: 0.0)
            return total(product(t, self.layer(x)), product(t, x))
        if s.kind == "sources":
            return total(self.layer(x), self.layer(self.source(x)))
        if s.kind == "noise":
            return total(self.layer(x), self.layer(x).change(lambda d: 0.0))
        if s.kind == "concatenate":
            return self.layer(total(x, self.layer(x)))
        if s.kind == "experts":
            gates = self.layer(x).change(lambda d: 0.0)
            return total(product(gates, self.layer(x)), product(gates, self.layer(x)))
        self.names += 2 * (s.kind == "dead")
        return x

    def walk_Residual(self, s: Residual, x: Flow) -> Flow:
        self.start(x)

        def skip() -> tuple[Flow, tuple[str, ...]]:
            if s.skip != "projection":
                return x, ()
            self.inside.add(len(self.layers))
            return self.layer(x), self.layers[-1]

        first = skip() if s.skip_first else None
        start, norms = len(self.layers), self.norms
        inner = self.steps(s.shared, x.opened())
        common, common_norms = range(start, len(self.layers)), self.norms - norms
        kind = "reshape" if s.skip in ("flip", "pad", "pool") else s.skip
        ends: list[Flow] = []
        found: list[Found] = []
        for branch in s.branches:
            start, norms = len(self.layers), self.norms
            y = self.steps(branch, inner)
            layers = (*common, *range(start, len(self.layers)))
            found.append(self.found(y, layers, self.norms - norms + common_norms, kind))
            ends.append(y.closed())
        skipped, names = first or skip()
        self.add([f._replace(skip_weights=names) for f in found])
        return total(skipped, *ends)

    def found(self, end: Flow, layers: Iterable[int], norms: int, skip: str) -> Found:
        self.inside.update(layers)
        alternatives: dict[tuple[int, int], dict[str, None]] = {}
        for k in layers:
            for switch, index, _ in self.arms[k][len(self.arm) :]:
                alternatives.setdefault((switch, index), {}).update(dict.fromkeys(self.layers[k]))
        order, free, depth = end.frames[-1]
        return Found(
            self.named(layers), depth, order, free, skip, (), self.repeats, norms, self.arm,
            tuple(tuple(alternatives[at]) for at in sorted(alternatives)),
        )  # fmt: skip

    def add(self, found: list[Found]) -> None:
        if not self.muted:
            self.branches += found
            self.count += self.repeats * len(found)

    def walk_Toward(self, s: Toward, x: Flow) -> Flow:
        if s.factor in ("none", "gate"):
            y = total(x, self.steps(s.steps, x))
            return total(x, product(y, self.layer(x).change(lambda d: 0.0))) if s.factor == "gate" else y
        self.start(x)
        start, norms = len(self.layers), self.norms
        y = self.steps(s.steps, x.opened())
        self.add([self.found(y, range(start, len(self.layers)), self.norms - norms, "identity")])
        return total(x, y.closed())

    def walk_Cond(self, s: Cond, x: Flow) -> Flow:
        switch, arm, count = self.switches, self.arm, self.count
        self.switches += 1
        ends, counts = [], []
        for k, steps in enumerate(s.arms):
            self.arm, self.count = (*arm, (switch, k, len(s.arms) + s.zero)), 0
            ends.append(self.steps(steps, x))
            counts.append(self.count)
        self.arm, self.count = arm, count + max(counts)
        y = total(*ends)
        return dataclasses.replace(y, feeds=y.feeds | x.feeds, above=y.above | x.above) if s.routed else y

    def start(self, x: Flow) -> None:
        """Notes the first split: in the arms of a conditional, a later one in the program may come first."""
        if self.split is None or x.above < self.split.above:
            self.split = x

    def walk_Loop(self, s: Loop, x: Flow) -> Flow:
        if s.form == "reuse":
            names = self.names
            for _ in range(s.times):
                self.names = names
                x = self.steps(s.steps, x)
            return x
        self.repeats *= s.times
        x = self.steps(s.steps, x)
        self.repeats //= s.times
        if x.frames:  # in a branch, the layers of every pass are in series
            kept = dict(vars(self))
            self.muted = True
            for _ in range(s.times - 1):
                self.layers, self.arms = list(kept["layers"]), list(kept["arms"])
                self.inside = set(kept["inside"])
                x = dataclasses.replace(self.steps(s.steps, x), feeds=x.feeds, above=x.above)
            vars(self).update(kept)
        return x


MASKS = (Op("select"), Op("mask"))
MEAN, POSITION = Op("mean"), Op("position")


def parts(s: Any) -> tuple[tuple[Any, ...], ...]:
    """The chains in a step."""
    if isinstance(s, Residual):
        return (s.shared, *s.branches)
    if isinstance(s, Cond):
        return s.arms
    return (s.steps,) if isinstance(s, (Loop, Toward)) else ()


def every(steps: tuple[Any, ...]) -> Iterator[Any]:
    for s in steps:
        yield s
        for inner in parts(s):
            yield from every(inner)


def uses_embedding(net: Net) -> bool:
    return any(isinstance(s, Condition) and s.source == "embedding" for s in every((*net.memory, *net.steps)))


def uses_memory(steps: tuple[Any, ...]) -> bool:
    return any(isinstance(s, Attention) and s.source == "memory" for s in every(steps))


class Follow(Walk):
    """What becomes of the start of a chain, whose order and depth are 1, if layers add none."""

    def __init__(self, steps: tuple[Any, ...]) -> None:
        super().__init__(Net((), "none", "none"))
        self.muted = True
        self.below = 0  # how many layers have the start above them, and not only another source
        self.end = self.steps(steps, Flow(((1.0, 1.0, 1),)))

    def layer(self, x: Flow, kernel: str = "plain") -> Flow:
        self.layers.append(())
        self.arms.append(())
        self.below += x.frames[0][2]
        return x

    def walk_Condition(self, s: Condition, x: Flow) -> Flow:
        return x

    def walk_Op(self, s: Op, x: Flow) -> Flow:
        if s.kind in ("sources", "time"):
            return x if s.kind == "time" else self.layer(x)
        return super().walk_Op(s, x)


def descending(steps: tuple[Any, ...]) -> int:
    """How many layers of a chain lie below its start."""
    return Follow(steps).below


def scales(steps: tuple[Any, ...]) -> bool:
    """Whether a chain goes to zero with its start, normalizations and what is added from elsewhere disregarded."""
    return Follow(steps).end.frames[0][1] >= 1


def sum_at_end(steps: tuple[Any, ...]) -> Any:
    """The last step of a chain if its last operation is a bare addition."""
    steps = living(steps)
    s = steps[-1] if steps else None
    if isinstance(s, Loop) and s.form == "reuse":
        return sum_at_end(s.steps)
    bare = isinstance(s, (Condition, Toward)) or (isinstance(s, Residual) and not s.scaled)
    sums = [Act("cubic"), *map(Op, ("time", "parallel", "gate", "sources", "noise", "experts"))]
    return s if bare or s in sums else None


def living(steps: tuple[Any, ...]) -> tuple[Any, ...]:
    """Without what nothing depends on."""
    return tuple(s for s in steps if any(t != Op("dead") and not isinstance(t, Loop) for t in every((s,))))


def is_state(chain: tuple[Any, ...]) -> bool:
    """Whether a chain returns a residual sum, shifted maybe."""
    return (
        bool(chain)
        and isinstance(chain[0], (Residual, Toward))
        and all(s in (*MASKS, POSITION) or (isinstance(s, Condition) and s.form == "add") for s in chain[1:])
    )


def is_chain(steps: tuple[Any, ...]) -> bool:
    """Whether a chain is residual sums alone, with activations between them maybe."""
    steps = living(steps)
    return (
        bool(steps)
        and isinstance(steps[0], (Residual, Toward))
        and all(isinstance(s, (Residual, Toward, Act)) or s in (*MASKS, POSITION) for s in steps)
    )


def is_fed(s: Any) -> bool:
    """Whether a step reads another source."""
    return (
        isinstance(s, Condition)
        or s in (Op("sources"), Op("time"))
        or (isinstance(s, Attention) and s.source == "memory")
    )


def linear(steps: tuple[Any, ...]) -> bool:
    """Whether a chain is a linear function of its start."""
    return all(
        isinstance(s, (Dense, Residual, Loop))
        or s in (*MASKS, MEAN, POSITION, *map(Op, ("time", "centre", "dead", "parallel", "sources")))
        or (isinstance(s, Condition) and s.form == "add")
        or (isinstance(s, Toward) and s.factor != "gate")
        for s in every(steps)
    )


def unclear(net: Net) -> Iterator[str]:
    """What in a program can be read in another way than it was written."""
    program = (*net.memory, *net.steps)
    sources = [s for s in every(program) if isinstance(s, Condition) or s in (Op("sources"), Op("time"))]
    if len(sources) > 1 and Op("time") in sources:
        yield "a source as it is, and a layer of it"
    for s in every(program):
        if isinstance(s, Residual):
            for b, f in zip(s.branches, s.factors, strict=False):
                yield from unclear_branch(s, (*s.shared, *b), f == "none" and s.skip != "pool")
            yield from unclear_order(s)
        elif isinstance(s, Toward):
            yield from unclear_branch(Residual((s.steps,)), s.steps, True)
        if isinstance(s, (Residual, Toward)) and any(
            is_chain(b) and any(map(is_chain, parts(living(b)[0]))) for b in parts(s)
        ):
            yield "an early state that is added at several depths"
        elif isinstance(s, Loop) and s.form == "scan" and s.times > 3 and any(map(multiplies, every(s.steps))):
            yield "an order that is multiplied in a loop"


def multiplies(s: Any) -> bool:
    return isinstance(s, Gated) or s == Act("squared_relu") or (isinstance(s, Attention) and not s.softmax)


def unclear_branch(s: Residual, chain: tuple[Any, ...], bare: bool) -> Iterator[str]:
    """`bare`: added as it is."""
    end = sum_at_end(chain) if bare else None
    below = descending(chain)
    if not below and (s.skip != "identity" or MEAN not in chain):
        yield "a branch without weights"
    if isinstance(end, Op) and living(chain)[0] == end:
        yield "a sum in a sum with the same start"
    if end == Op("noise"):
        yield "two parallel ends"
    if is_state(living(chain)):
        yield "a multiple of a state"
    if s.skip == "projection" and (linear(chain) or below < 2 or not scales(chain)):
        yield "a projection beside another linear map, a branch with as few weights, or one that does not scale"
    first = next(iter(living(chain)), None)
    if (
        s.skip == "projection"
        and isinstance(first, Residual)
        and first.skip == "projection"
        and any(map(is_fed, every(chain)))
    ):
        yield "projections of one start at several depths, beside another source"
    if s.minus and not below:
        yield "x - mean(x)"
    if s.shared and len(s.branches) > 1 and end:
        yield "a sum of what branches share beside another branch"


def unclear_order(s: Residual) -> Iterator[str]:
    """Terms before the skip are a sum of their own."""
    first = s.branches[: s.at]
    if len(first) > 1 and s.shared:
        counts = [descending(b) for b in first]
        if counts.count(min(counts)) < 2 or not min(counts) or any(map(linear, first)):
            yield "a residual, or one linear map, behind what branches share"
        if any(b[-1] in (Op("squeeze_excite"), Op("mean_gate"), Op("glu")) or sum_at_end(b) for b in first):
            yield "a mixture behind what branches share"


NORMS = ("layer", "rms", "l2", "two_pass", "std", "instance", "batch")
OPS = (
    "squeeze_excite", "mean", "time", "position", "glu", "parallel", "gate", "mean_gate", "centre", "sources", "noise",
    "concatenate", "experts", "dead",
)  # fmt: skip
_widths = st.sampled_from((4, 8, 16))
_dense = st.builds(
    Dense,
    st.sampled_from(("matmul", "matmul", "einsum", "left", "written", "conv", "conv3")),
    st.booleans(),
    st.sampled_from(("plain", "plain", "plain", "halved", "standardized", "concatenated", "low_rank")),
    _widths,
)
_act = st.builds(Act, st.sampled_from(("relu", "relu", "gelu", "silu", "tanh", *ACTS)))
_norm = st.builds(Norm, st.sampled_from(NORMS), st.booleans())
_weightless = st.one_of(_act, _norm, st.sampled_from(MASKS))
_plain_step = st.one_of(
    _dense,
    _dense,
    _weightless,
    _weightless,
    st.builds(Gated, st.sampled_from(("silu", "gelu", "sigmoid")), _widths),
    st.builds(
        Attention, st.sampled_from(("self", "memory")), st.sampled_from((True, True, False)),
        st.booleans(), st.booleans(), st.booleans(), _widths,
    ),
    st.builds(
        Condition, st.sampled_from(("add", "film", "scale")),
        st.sampled_from(("time", "hidden", "embedding")),
    ),
    st.builds(Op, st.sampled_from(OPS)),
    st.builds(Op, st.sampled_from(OPS)),
)  # fmt: skip


@st.composite
def branches(draw: Any, depth: int, skip: str = "identity", shared: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    if skip == "identity" and draw(st.integers(0, 9)) == 9:
        return (*draw(st.lists(_weightless, max_size=1)), MEAN, *draw(st.lists(_weightless, max_size=1)))
    chain = tuple(draw(st.lists(steps(depth, False, True), min_size=1, max_size=4)))
    if not descending(chain):
        chain = (*chain, draw(_dense))
    elif is_state(living(chain)):
        chain = (draw(_dense), *chain)
    if skip == "projection":
        if linear((*shared, *chain)):
            chain = (*chain, draw(_act))
        if descending(chain) < 2:
            chain = (draw(_dense), *chain)
    return chain


@st.composite
def residuals(draw: Any, depth: int, free: bool, branch: bool = False) -> Residual:
    """A residual step; `depth` is how many more may lie inside, `free` whether it may change the shape."""
    skips = ("identity",) * 4 + ("projection", "projection", "flip") + (("pad", "pool") if free else ())
    skip = draw(st.sampled_from(skips))
    count = draw(st.sampled_from((1, 1, 1, 2, 3)))
    shared = tuple(draw(st.lists(st.one_of(_weightless, _weightless, _dense), max_size=1)))
    at = draw(st.integers(0, count))
    if at > 1 and shared and draw(st.booleans()):
        arms = [(draw(_dense), draw(_act)) for _ in range(count)]
    else:
        arms = [draw(branches(depth, skip, shared)) for _ in range(count)]
    if skip == "projection" and not all(scales((*shared, *b)) for b in arms):
        skip = "identity"
    factors = [draw(st.sampled_from(("none", "none", "constant", "scalar", "vector"))) for _ in arms]
    return Residual(
        tuple(arms), skip, tuple(factors), shared, at,
        draw(st.booleans()),
        draw(st.sampled_from(("none", "none", "none", "constant", "constant" if branch else "scalar"))),
        draw(st.sampled_from((0, 0, 0, 0, count, count, 1) if all(map(descending, arms)) else (0,))),
        draw(st.booleans()),
        draw(st.sampled_from(("plain", "plain", "jit", "remat"))),
    )  # fmt: skip


def steps(depth: int, free: bool, branch: bool = False) -> st.SearchStrategy[Any]:
    if not depth:
        return _plain_step
    inner = st.lists(steps(depth - 1, False, branch), min_size=1, max_size=3).map(tuple)
    blocks = residuals(depth - 1, free, branch)
    arms = st.lists(st.one_of(inner, inner, st.just(())), min_size=1, max_size=2).map(tuple)
    return st.one_of(
        _plain_step,
        _plain_step,
        *[blocks] * (6 if branch else 2),
        st.builds(Loop, inner, st.integers(2, 5)),
        st.builds(Loop, inner, st.integers(2, 3), st.just("reuse")),
        st.builds(
            Toward, branches(depth - 1, "none"), st.sampled_from(("constant", "scalar", "vector", "none", "gate"))
        ),
        st.builds(
            lambda arms, zero, routed: Cond(arms, zero or len(arms) < 2, routed),
            arms,
            st.booleans(),
            st.sampled_from((False, False, True)),
        ),
    )


@st.composite
def nets(draw: Any) -> Net:
    body = draw(st.lists(steps(3, True), max_size=4))
    if draw(st.integers(0, 7)):
        body.insert(draw(st.integers(0, len(body))), draw(residuals(2, True)))
    stem = draw(st.sampled_from(("dense", "dense", "none", "embedding")))
    net = Net(tuple(body), stem, draw(st.sampled_from(("dense", "dense", "pooled", "none"))))
    if uses_memory(net.steps) and draw(st.booleans()):
        memory = tuple(draw(st.lists(st.one_of(_dense, _norm, residuals(0, False)), max_size=2)))
        if not uses_memory(memory):
            net = dataclasses.replace(net, memory=memory)
    return net


def smaller(value: Any) -> Iterator[Any]:
    """A net, step or chain, made simpler in one place."""
    if isinstance(value, tuple):
        for k in range(len(value)):
            yield value[:k] + value[k + 1 :]
        for k, s in enumerate(value):
            for inner in parts(s):
                yield value[:k] + inner + value[k + 1 :]
            for t in smaller(s):
                yield (*value[:k], t, *value[k + 1 :])
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            now = getattr(value, field.name)
            if field.default is not dataclasses.MISSING and now != field.default:
                yield dataclasses.replace(value, **{field.name: field.default})
            if isinstance(now, tuple):
                for less in smaller(now):
                    if isinstance(value, Residual) and field.name == "branches":
                        more = {"at": min(value.at, len(less)), "minus": min(value.minus, len(less))}
                        yield dataclasses.replace(value, branches=less, **more)
                    elif field.name != "factors":
                        yield dataclasses.replace(value, **{field.name: less})


def _fits(net: Net) -> bool:
    """Whether a program is in the grammar, and can be read in one way only."""
    if (net.memory or uses_embedding(net)) and net.stem == "none":
        return False  # what is made before the stream starts is no part of a branch
    if net.memory and (not uses_memory(net.steps) or uses_embedding(Net(net.memory))):
        return False
    for s in every((*net.memory, *net.steps)):
        if isinstance(s, Residual):
            wide = s.skip != "pad" or all(any(isinstance(t, SETS_WIDTH) for t in b) for b in s.branches)
            if not (s.branches and all(s.branches) and 0 <= s.minus <= len(s.branches) and wide):
                return False
        elif not (any(s.arms) and len(s.arms) + s.zero > 1 if isinstance(s, Cond) else all(parts(s))):
            return False
    return not any(unclear(net))


def check(net: Net) -> None:
    expected = Walk(net)
    run = Run(net)
    found = fi.structure(run.function(), *INPUTS)
    branches = [Found(*(getattr(b, name) for name in Found._fields)) for b in found.branches]
    branches = [b._replace(arms=tuple(map(dataclasses.astuple, b.arms))) for b in branches]
    assert branches == expected.branches
    assert found.num_branches == expected.count
    assert len(found.norms) == expected.norms
    layers = [(w, *run.facts[w]) for names in expected.layers for w in names]
    assert [(layer.path, layer.kind, layer.fan_in, layer.fan_out) for layer in found.layers] == layers
    assert list(found.stems) == list(dict.fromkeys(expected.stems))
    assert set(found.heads) == expected.heads
    assert [u.what for u in found.undecided] == ["head"] * expected.open_heads
    assert not found.unruled


def fails(net: Net) -> bool:
    try:
        check(net)
    except Exception:
        return True
    return False


def _examine(net: Net) -> None:
    assume(_fits(net))
    if fails(net):
        while (less := next((n for n in smaller(net) if _fits(n) and fails(n)), None)) is not None:
            net = less
        print(net)
        check(net)


def _property(examples: int, derandomize: bool) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    how = settings(
        max_examples=examples, derandomize=derandomize, deadline=None, database=None,
        suppress_health_check=checks, phases=(Phase.generate,), report_multiple_bugs=False,
    )  # fmt: skip
    return lambda test: how(given(nets())(test))


@_property(300, True)
def test_random_programs(net: Net) -> None:
    _examine(net)


@pytest.mark.slow
@_property(3000, True)
def test_many_random_programs(net: Net) -> None:
    _examine(net)
