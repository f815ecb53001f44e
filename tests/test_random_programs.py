"""Random residual programs whose structure is known by construction, and that it is found exactly.

A program is a chain of steps, and a branch of a residual step is a chain again. `Run` executes it in plain JAX;
`Walk` works out the structure from the same steps, without a graph. `unclear` says which programs are left out, since
they can be read in another way than they were written: a projection beside a branch with as few weights or beside
another linear map, x + c (x + f(x)), what branches share before their own sum, `y + d u` with a parameter d inside of a
branch. `open_questions` are those that the library reads in another way today, and should not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

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


def step(cls: type) -> Any:
    return dataclasses.dataclass(frozen=True)(cls)


@step
class Dense:
    form: str = "matmul"  # or einsum, left (the kernel is the left operand), written (product and sum), conv, conv3
    bias: bool = False
    kernel: str = "plain"  # or halved, standardized, concatenated (of two), low_rank (w + a b)
    width: int = 8


@step
class Act:
    name: str


@step
class Norm:
    form: str
    affine: bool = True


@step
class Gated:
    """act(W1 y) * (W2 y), then W3."""

    act: str = "silu"
    width: int = 8


@step
class Glu:
    """One layer, split in two, one half gating the other."""

    width: int = 8


@step
class Attention:
    source: str = "self"  # or memory
    softmax: bool = True
    norms: bool = False
    causal: bool = False
    rotary: bool = False
    width: int = 8


@step
class SqueezeExcite:
    pass


@step
class Mask:
    form: str  # select, product


@step
class Mix:
    """The mean over tokens at every token."""


@step
class Condition:
    """y + b, y (1 + s) + b or y s + b, where s and b are layers of the time or its embedding; or the time as it is."""

    form: str = "add"  # film, scale, raw
    source: str = "time"  # hidden (a layer and silu in front, in place), embedding (shared by the program)


@step
class Position:
    """An additive table of parameters."""


@step
class Decoy:
    kind: str


@step
class Residual:
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


@step
class Toward:
    """x + c (f(x) - x): a residual of branch f, unless c is an activation (a gate) or absent (straight-through)."""

    steps: tuple[Any, ...]
    factor: str = "constant"  # none, scalar, vector, gate


@step
class Cond:
    """One of several chains; the last one may return zeros."""

    arms: tuple[tuple[Any, ...], ...]
    zero: bool = False  # one more arm
    routed: bool = False  # by the stream and not by chance


@step
class Scan:
    steps: tuple[Any, ...]
    length: int = 2


@step
class Reuse:
    """The same steps with the same parameters again."""

    steps: tuple[Any, ...]
    times: int = 2


@step
class Net:
    steps: tuple[Any, ...]
    stem: str = "dense"  # none, embedding
    head: str = "dense"  # none, pooled
    memory: tuple[Any, ...] = ()  # what encodes the memory


SETS_WIDTH = (Dense, Gated, Glu, Attention)
# What an activation makes of the order of its argument.
ACTS: dict[str, tuple[Any, Any]] = {
    "relu": (jax.nn.relu, lambda d: d),
    "gelu": (jax.nn.gelu, lambda d: d),
    "erf_gelu": (lambda x: jax.nn.gelu(x, approximate=False), lambda d: d),
    "silu": (jax.nn.silu, lambda d: d),
    "tanh": (jnp.tanh, lambda d: d),
    "elu": (jax.nn.elu, lambda d: d),
    "leaky_relu": (jax.nn.leaky_relu, lambda d: d),
    "relu6": (jax.nn.relu6, lambda d: d),
    "hard_tanh": (jax.nn.hard_tanh, lambda d: d),
    "mish": (jax.nn.mish, lambda d: d),
    "soft_sign": (jax.nn.soft_sign, lambda d: d),
    "hard_swish": (jax.nn.hard_swish, lambda d: d),
    "squareplus": (jax.nn.squareplus, lambda d: 0.0),
    "squared_relu": (lambda x: jnp.square(jax.nn.relu(x)), lambda d: 2 * d),
    "cubic": (lambda x: x + 0.04 * x**3, lambda d: d),
    "sigmoid": (jax.nn.sigmoid, lambda d: 0.0),
    "softplus": (jax.nn.softplus, lambda d: 0.0),
    "softmax": (jax.nn.softmax, lambda d: 0.0),
}


class Run:
    """Runs a program: first to learn the shapes of its parameters, then on them."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.facts: dict[str, tuple[str, int, int]] = {}  # kind and fans, by weight
        self.spans: dict[Any, Any] = {}  # parameters of a scan: end by start and body; of a conditional: every start
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
            w = take(width) + self.take((*shape[:-2], a, 2), kernel=field * a >= b) @ self.take(
                (2, b), kernel=field * a < b
            )
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
        axes = {"instance": (1,), "batch": (0, 1)}.get(s.form, (-1,))
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
            mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
        if s.affine:
            x = x * self.take(x.shape[-1:]) + self.take(x.shape[-1:])
        return x

    def run_Gated(self, s: Gated, x: Any) -> Any:
        gate = ACTS[s.act][0](self.layer(x, 12))
        return self.layer(gate * self.layer(x, 12), s.width)

    def run_Glu(self, s: Glu, x: Any) -> Any:
        a, b = jnp.split(self.layer(x, 2 * s.width, bias=True), 2, -1)
        return a * jax.nn.sigmoid(b)

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

    def run_SqueezeExcite(self, s: SqueezeExcite, x: Any) -> Any:
        y = jax.nn.relu(self.layer(x.mean(1), 4, bias=True))
        return x * jax.nn.sigmoid(self.layer(y, x.shape[-1], bias=True))[:, None]

    def run_Mask(self, s: Mask, x: Any) -> Any:
        keep = jax.random.bernoulli(self.key, 0.8, x.shape)
        return jnp.where(keep, x / 0.8, 0.0) if s.form == "select" else x * keep / 0.8

    def run_Mix(self, s: Mix, x: Any) -> Any:
        return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)

    def run_Condition(self, s: Condition, x: Any) -> Any:
        width = x.shape[-1]
        if s.form == "raw":
            return x + self.time.mean(-1)[:, None, None]
        c = self.embedding if s.source == "embedding" else self.time
        if s.source == "hidden":
            c = jax.nn.silu(self.layer(c, 8, bias=True))
        if s.form != "add":
            factor = self.layer(c, width, bias=True)[:, None]
            x = x * (1 + factor) if s.form == "film" else x * factor
        return x + self.layer(c, width)[:, None]

    def run_Position(self, s: Position, x: Any) -> Any:
        return x + self.take(x.shape[1:])

    def run_Decoy(self, s: Decoy, x: Any) -> Any:
        n = x.shape[-1]
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

    def run_Residual(self, s: Residual, x: Any) -> Any:
        body = {"plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint}[s.call]
        return body(lambda x: self.residual(s, x))(x)

    def scaled(self, x: Any, factor: str) -> Any:
        if factor == "none":
            return x
        return x * (0.5 if factor == "constant" else self.take(() if factor == "scalar" else x.shape[-1:]))

    def residual(self, s: Residual, x: Any) -> Any:
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
        start = self.taken
        starts = self.spans.setdefault((start, s), [])
        if self.leaves is None:
            for arm in s.arms:
                starts.append(self.taken)
                self.steps(arm, x, x.shape[-1])
            starts.append(self.taken)
            return x

        def run(k: int, x: Any) -> Any:
            self.taken = starts[k]
            return self.steps(s.arms[k], x, x.shape[-1])

        arms = [functools.partial(run, k) for k in range(len(s.arms))] + [jnp.zeros_like] * s.zero
        if s.routed:
            index = jnp.where(x.mean() > 0, len(arms) - 1, 0)
        else:
            index = jax.random.randint(self.key, (), 0, len(arms))
        x = jax.lax.cond(index == 1, arms[1], arms[0], x) if len(arms) == 2 else jax.lax.switch(index, arms, x)
        self.taken = starts[-1]
        return x

    def run_Scan(self, s: Scan, x: Any) -> Any:
        start = self.taken
        if self.leaves is None:
            self.lengths.append(s.length)
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

        x, _ = jax.lax.scan(body, x, {n: outside[n] for n in names}, length=s.length)
        return x

    def run_Reuse(self, s: Reuse, x: Any) -> Any:
        start = self.taken
        for _ in range(s.times):
            self.taken = start
            x = self.steps(s.steps, x, x.shape[-1])
        return x


@dataclasses.dataclass(frozen=True)
class Found:
    """A branch as it is expected."""

    weights: tuple[str, ...]
    depth: int
    order: float
    order_without_norms: float
    skip: str
    skip_weights: tuple[str, ...]
    repeats: int
    norms: int
    arms: tuple[tuple[int, int, int], ...] = ()
    alternatives: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Flow:
    """What is known of a value: in each branch around it its orders and its depth, and the last layers before it."""

    frames: tuple[tuple[float, float, int], ...] = ()  # (order, order without norms, depth)
    feeds: frozenset[int] = frozenset()
    above: frozenset[int] = frozenset()  # every layer that leads to it

    def change(self, order: Any = None, free: Any = None, depth: Any = None) -> Flow:
        same = (lambda d: d) if order is None else order
        free = same if free is None else free
        return dataclasses.replace(
            self, frames=tuple((same(a), free(b), c if depth is None else depth(c)) for a, b, c in self.frames)
        )

    def opened(self) -> Flow:
        return dataclasses.replace(self, frames=(*self.frames, (0.0, 0.0, 0)))

    def closed(self) -> Flow:
        return dataclasses.replace(self, frames=self.frames[:-1])


def _combine(flows: Iterable[Flow], orders: Any) -> Flow:
    flows = tuple(flows)
    return Flow(
        tuple(
            (orders(f[0] for f in each), orders(f[1] for f in each), max(f[2] for f in each))
            for each in zip(*(f.frames for f in flows), strict=True)
        ),
        frozenset().union(*(f.feeds for f in flows)),
        frozenset().union(*(f.above for f in flows)),
    )


def total(*flows: Flow) -> Flow:
    return _combine(flows, min)


def product(*flows: Flow) -> Flow:
    return _combine(flows, sum)


class Walk:
    """Works out the structure of a program: sums take the least order, products add them, each layer adds one."""

    def __init__(self, net: Net) -> None:
        self.names = 0
        self.layers: list[tuple[str, ...]] = []  # in trace order, by the names of what each kernel is joined from
        self.arms: list[tuple[tuple[int, int, int], ...]] = []  # (conditional, arm, arms) around each layer
        self.arm: tuple[tuple[int, int, int], ...] = ()
        self.switches = self.count = 0
        self.norms = 0
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

    def normalized(self, x: Flow) -> Flow:
        self.norms += 1
        return x.change(lambda d: 0.0, lambda d: d)

    def steps(self, steps: Iterable[Any], x: Flow) -> Flow:
        for s in steps:
            x = getattr(self, f"walk_{type(s).__name__}")(s, x)
        return x

    def walk_Dense(self, s: Dense, x: Flow) -> Flow:
        return self.layer(x, s.kernel)

    def walk_Act(self, s: Act, x: Flow) -> Flow:
        return x.change(ACTS[s.name][1])

    def walk_Norm(self, s: Norm, x: Flow) -> Flow:
        return self.normalized(x)

    def walk_Gated(self, s: Gated, x: Flow) -> Flow:
        gate = self.walk_Act(Act(s.act), self.layer(x))
        return self.layer(product(gate, self.layer(x)))

    def walk_Glu(self, s: Glu, x: Flow) -> Flow:
        return self.layer(x)

    def walk_Attention(self, s: Attention, x: Flow) -> Flow:
        source = x if s.source == "self" else self.source(x, self.memory)
        q, k, v = self.layer(x), self.layer(source), self.layer(source)
        if s.norms:
            q, k = self.normalized(q), self.normalized(k)
        scores = product(q, k)
        if s.softmax:
            scores = scores.change(lambda d: 0.0)
        return self.layer(product(scores, v))

    def walk_SqueezeExcite(self, s: SqueezeExcite, x: Flow) -> Flow:
        return product(x, self.layer(self.layer(x)).change(lambda d: 0.0))

    def walk_Mask(self, s: Mask, x: Flow) -> Flow:
        return x

    def walk_Mix(self, s: Mix, x: Flow) -> Flow:
        return x

    def walk_Condition(self, s: Condition, x: Flow) -> Flow:
        if s.form == "raw":
            return total(x, self.source(x))
        c = self.source(x, self.embedding if s.source == "embedding" else None)
        if s.source == "hidden":
            c = self.layer(c)
        if s.form != "add":
            factor = self.layer(c)
            x = product(x, factor.change(lambda d: 0.0) if s.form == "film" else factor)
        return total(x, self.layer(c))

    def walk_Position(self, s: Position, x: Flow) -> Flow:
        return x

    def walk_Decoy(self, s: Decoy, x: Flow) -> Flow:
        if s.kind == "parallel":
            return total(self.layer(x), self.layer(x))
        if s.kind == "gate":
            t = self.layer(x).change(lambda d: 0.0)
            return total(product(t, self.layer(x)), product(t, x))
        if s.kind in ("mean_gate", "centre"):
            return x
        if s.kind == "sources":
            return total(self.layer(x), self.layer(self.source(x)))
        if s.kind == "noise":
            return total(self.layer(x), self.layer(x).change(lambda d: 0.0))
        if s.kind == "concatenate":
            return self.layer(total(x, self.layer(x)))
        if s.kind == "experts":
            gates = self.layer(x).change(lambda d: 0.0)
            return total(product(gates, self.layer(x)), product(gates, self.layer(x)))
        assert s.kind == "dead"
        self.names += 2
        return x

    def walk_Residual(self, s: Residual, x: Flow) -> Flow:
        self.start(x)
        skips: list[tuple[Flow, int, int]] = []

        def skip() -> None:
            start = len(self.layers)
            y = self.layer(x) if s.skip == "projection" else x
            self.inside.update(range(start, len(self.layers)))
            skips.append((y, start, len(self.layers)))

        if s.skip_first:
            skip()
        start, norms = len(self.layers), self.norms
        inner = self.steps(s.shared, x.opened())
        common, common_norms = range(start, len(self.layers)), self.norms - norms
        self.inside.update(common)
        ends: list[Flow] = []
        found: list[Found] = []
        for branch in s.branches:
            start, norms = len(self.layers), self.norms
            y = self.steps(branch, inner)
            layers = (*common, *range(start, len(self.layers)))
            kind = {"flip": "reshape", "pad": "reshape", "pool": "reshape"}.get(s.skip, s.skip)
            found.append(self.found(y, layers, self.norms - norms + common_norms, kind))
            ends.append(y.closed())
        if not s.skip_first:
            skip()
        ((skipped, start, end),) = skips
        self.add(dataclasses.replace(f, skip_weights=self.named(range(start, end))) for f in found)
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

    def add(self, found: Iterable[Found]) -> None:
        if not self.muted:
            before = len(self.branches)
            self.branches += found
            self.count += self.repeats * (len(self.branches) - before)

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

    def walk_Scan(self, s: Scan, x: Flow) -> Flow:
        self.repeats *= s.length
        x = self.steps(s.steps, x)
        self.repeats //= s.length
        if x.frames:  # in a branch, the layers of every pass are in series
            kept = dict(vars(self))
            self.muted = True
            for _ in range(s.length - 1):
                self.layers, self.arms = list(kept["layers"]), list(kept["arms"])
                self.inside = set(kept["inside"])
                x = dataclasses.replace(self.steps(s.steps, x), feeds=x.feeds, above=x.above)
            vars(self).update(kept)
        return x

    def walk_Reuse(self, s: Reuse, x: Flow) -> Flow:
        names = self.names
        for _ in range(s.times):
            self.names = names
            x = self.steps(s.steps, x)
        return x


def parts(s: Any) -> tuple[tuple[Any, ...], ...]:
    """The chains in a step."""
    if isinstance(s, Residual):
        return (s.shared, *s.branches)
    if isinstance(s, Cond):
        return s.arms
    return (s.steps,) if isinstance(s, (Scan, Reuse, Toward)) else ()


def every(steps: tuple[Any, ...]) -> Iterator[Any]:
    for s in steps:
        yield s
        for inner in parts(s):
            yield from every(inner)


def uses_embedding(net: Net) -> bool:
    return any(
        isinstance(s, Condition) and s.form != "raw" and s.source == "embedding"
        for s in every((*net.memory, *net.steps))
    )


def uses_memory(steps: tuple[Any, ...]) -> bool:
    return any(isinstance(s, Attention) and s.source == "memory" for s in every(steps))


def descending(steps: tuple[Any, ...]) -> int:
    """How many layers of a chain lie below its start; those of another source are not among them."""
    count = 0
    for s in steps:
        if isinstance(s, Attention):
            count += 4 if s.source == "self" else 2
        elif isinstance(s, Decoy):
            count += {"parallel": 2, "gate": 2, "sources": 1, "noise": 2, "concatenate": 2, "experts": 3}.get(s.kind, 0)
        else:
            count += {Dense: 1, Gated: 3, Glu: 1, SqueezeExcite: 2}.get(type(s), 0)
            count += (s.times if isinstance(s, Reuse) else 1) * sum(map(descending, parts(s)))
            count += isinstance(s, Toward) and s.factor == "gate"
            count += isinstance(s, Residual) and s.skip == "projection"
    return count


def sum_at_end(steps: tuple[Any, ...]) -> Any:
    """The last step of a chain if its last operation is a bare addition."""
    s = steps[-1] if steps else None
    if s == Decoy("dead"):
        return sum_at_end(steps[:-1])
    if isinstance(s, Reuse):
        return sum_at_end(s.steps)
    if isinstance(s, Residual):
        return None if s.scaled else s
    if isinstance(s, (Condition, Toward)) or s == Act("cubic"):
        return s
    return s if isinstance(s, Decoy) and s.kind in ("parallel", "gate", "sources", "noise", "experts") else None


def scales(steps: tuple[Any, ...]) -> bool:
    """Whether a chain goes to zero with its start, normalizations and what is added from elsewhere disregarded."""
    return Follow().steps(steps, Flow(((0.0, 1.0, 0),))).frames[0][1] >= 1


class Follow(Walk):
    """Orders in the start of a chain alone."""

    def __init__(self) -> None:
        super().__init__(Net((), "none", "none"))
        self.muted = True

    def layer(self, x: Flow, kernel: str = "plain") -> Flow:
        self.layers.append(())
        self.arms.append(())
        return x

    def walk_Condition(self, s: Condition, x: Flow) -> Flow:
        return x

    def walk_Decoy(self, s: Decoy, x: Flow) -> Flow:
        return x if s.kind == "sources" else super().walk_Decoy(s, x)


def linear(steps: tuple[Any, ...]) -> bool:
    """Whether a chain is a linear function of its start."""
    return all(
        isinstance(s, (Dense, Mask, Mix, Position, Residual, Reuse, Scan))
        or (isinstance(s, Condition) and s.form in ("add", "raw"))
        or (isinstance(s, Toward) and s.factor != "gate")
        or (isinstance(s, Decoy) and s.kind in ("centre", "dead", "parallel", "sources"))
        for s in every(steps)
    )


@dataclasses.dataclass(frozen=True)
class Sum:
    """What Residual and Toward have in common."""

    whole: Any
    chain: tuple[Any, ...]  # one of its branches
    shared: tuple[Any, ...]
    bare: bool  # added as it is

    @property
    def end(self) -> Any:
        """The sum that the branch ends in."""
        return sum_at_end(self.chain) if self.bare else None


def sums(steps: tuple[Any, ...]) -> Iterator[Sum]:
    for s in every(steps):
        if isinstance(s, Toward):
            yield Sum(s, s.steps, (), True)
        elif isinstance(s, Residual):
            for b, f in zip(s.branches, s.factors, strict=False):
                yield Sum(s, b, s.shared, f == "none" and s.skip != "pool")


def unclear(net: Net) -> set[str]:
    """What in a program can be read in another way than it was written."""
    found: set[str] = set()
    program = (*net.memory, *net.steps)
    for s in sums(program):
        before = [t for t in (*s.shared, *s.chain) if t != Decoy("dead")]
        skip = s.whole.skip if isinstance(s.whole, Residual) else ""
        if not descending((*s.shared, *s.chain)) and (skip != "identity" or Mix() not in s.chain):
            found.add("a branch without weights")
        if before and isinstance(before[0], Decoy) and s.end == before[0]:
            found.add("a sum in a sum with the same start")
        if _is_state(before):
            found.add("a multiple of a state")
        if s.end == Decoy("noise"):
            found.add("two parallel ends")
        if skip == "projection" and linear((*s.shared, *s.chain)):
            found.add("one linear map in several terms")
        if skip == "projection" and (descending((*s.shared, *s.chain)) < 2 or not scales((*s.shared, *s.chain))):
            found.add("a projection beside a branch with as few weights, or one that does not scale")
    for s in every(program):
        if isinstance(s, Residual):
            found |= _unclear_order(s)
        elif isinstance(s, Cond) and (not any(s.arms) or len(s.arms) + s.zero < 2):
            found.add("no conditional")
        elif isinstance(s, Scan) and s.length > 3 and any(map(_multiplies, every(s.steps))):
            found.add("an order that is multiplied in a loop")
    return found


def _is_state(chain: list[Any]) -> bool:
    if len(chain) == 1 and isinstance(chain[0], Reuse):
        return chain[0].times == 1 and _is_state(list(chain[0].steps))
    return (
        bool(chain)
        and isinstance(chain[0], (Residual, Toward))
        and all(isinstance(s, (Mask, Position)) for s in chain[1:])
    )


def _multiplies(s: Any) -> bool:
    return s == Act("squared_relu") or isinstance(s, Gated) or (isinstance(s, Attention) and not s.softmax)


def _unclear_order(s: Residual) -> set[str]:
    """What depends on the order in which terms are summed: those before the skip are a sum of their own."""
    found: set[str] = set()
    if s.minus and not all(descending((*s.shared, *b)) for b in s.branches):
        found.add("x - mean(x)")
    first = s.branches[: s.at]
    if len(first) > 1 and s.shared:
        counts = [descending(b) for b in first]
        if counts.count(min(counts)) < 2 or not min(counts) or any(map(linear, first)):
            found.add("a residual, or one linear map, behind what branches share")
        if any(isinstance(b[-1], (Glu, SqueezeExcite)) or sum_at_end(b) for b in first):
            found.add("a mixture behind what branches share")
    return found


# What is read otherwise by the library today, by tag of `open_questions`.
OPEN = frozenset({
    "a difference before the skip",
    "a difference of linear maps",
    "a formula at the end of a branch",
    "a layer of a source in a loop",
    "a projection beside several branches",
    "a scan of the split",
    "a source as it is, and a layer of it",
    "a split that is repeated over tokens",
    "a sum of what branches share beside another branch",
    "activations written as products at parallel ends",
    "an activation of a state",
    "an interpolation at the end of a branch",
    "conditions at the end of a branch",
    "several branches in a sum that goes on in another",
})  # fmt: skip


def open_questions(net: Net) -> set[str]:
    found: set[str] = set()
    program = (*net.memory, *net.steps)
    conditions = [s for _, s in _neighbours(program) if isinstance(s, Condition) or s == Decoy("sources")]
    if len(conditions) > 1 and any(isinstance(s, Condition) and s.form == "raw" for s in conditions):
        found.add("a source as it is, and a layer of it")
    for s in sums(program):
        several = isinstance(s.whole, Residual) and len(s.whole.branches) > 1
        chain = [t for t in (*s.shared, *s.chain) if t != Decoy("dead")]
        if s.end == Act("cubic"):
            found.add("a formula at the end of a branch")
        if isinstance(s.end, Toward):
            found.add("an interpolation at the end of a branch")
        film = isinstance(s.end, Condition) and s.end.form in ("film", "scale")
        if film or (len(conditions) > 1 and (isinstance(s.end, Condition) or s.end == Decoy("sources"))):
            found.add("conditions at the end of a branch")
        if several and s.shared and s.end:
            found.add("a sum of what branches share beside another branch")
        if isinstance(s.end, Residual) and len(s.end.branches) > 1:
            found.add("several branches in a sum that goes on in another")
        if several and s.whole.skip == "projection":
            found.add("a projection beside several branches")
        if isinstance(chain[0], (Residual, Toward, Reuse, Cond)) and all(
            isinstance(t, (Act, Mask, Position)) for t in chain[1:]
        ):
            found.add("an activation of a state")
        for scan in every(s.chain):
            if isinstance(scan, Scan) and any(
                isinstance(t, Condition) or t == Decoy("sources") or (isinstance(t, Attention) and t.source == "memory")
                for t in every(scan.steps)
            ):
                found.add("a layer of a source in a loop")
    for before, s in _neighbours(program):
        if isinstance(s, Scan) and before == "start of a branch":
            found.add("a scan of the split")
        end = sum_at_end((before,))
        if isinstance(end, Residual) and len(end.branches) > 1 and isinstance(s, Condition):
            found.add("several branches in a sum that goes on in another")
        if isinstance(s, (Residual, Toward)) and before == Mix():
            found.add("a split that is repeated over tokens")
    for s in every(program):
        if not isinstance(s, Residual):
            continue
        if s.minus and s.minus < s.at:
            found.add("a difference before the skip")
        if 0 < s.minus < len(s.branches) and any(linear((*s.shared, *b)) for b in s.branches):
            found.add("a difference of linear maps")
        ends = [b[-1].name for b in s.branches[: s.at] if isinstance(b[-1], Act)]
        if s.shared and s.at > 1 and set(ends) & {"silu", "gelu", "erf_gelu", "mish", "hard_swish", "squared_relu"}:
            found.add("activations written as products at parallel ends")
    return found


def _neighbours(steps: tuple[Any, ...], before: Any = "") -> Iterator[tuple[Any, Any]]:
    """Steps, with what runs before them."""
    for s in steps:
        yield before, s
        if isinstance(s, (Residual, Toward)):
            shared = s.shared if isinstance(s, Residual) else ()
            yield from _neighbours(shared, "start of a branch")
            for chain in s.branches if isinstance(s, Residual) else (s.steps,):
                yield from _neighbours(chain, shared[-1] if shared else "start of a branch")
            before = s
        elif isinstance(s, Cond):
            for arm in s.arms:
                yield from _neighbours(arm, before)
            before = ""
        elif isinstance(s, Scan):
            yield from _neighbours(s.steps)
            before = ""
        elif isinstance(s, Reuse):
            yield from _neighbours(s.steps * 2, before)
            before = s
            while isinstance(before, Reuse):
                before = before.steps[-1]
        elif s != Decoy("dead"):
            before = s


FACTORS = ("none", "none", "constant", "scalar", "vector")
NORMS = ("layer", "rms", "l2", "two_pass", "std", "instance", "batch")
DECOYS = ("parallel", "gate", "mean_gate", "centre", "sources", "noise", "concatenate", "experts", "dead")
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
_weightless = st.one_of(_act, _norm, st.builds(Mask, st.sampled_from(("select", "product"))))
_plain_step = st.one_of(
    _dense,
    _dense,
    _weightless,
    _weightless,
    st.builds(Gated, st.sampled_from(("silu", "gelu", "sigmoid")), _widths),
    st.builds(Glu, _widths),
    st.builds(
        Attention, st.sampled_from(("self", "memory")), st.sampled_from((True, True, False)),
        st.booleans(), st.booleans(), st.booleans(), _widths,
    ),
    st.just(SqueezeExcite()),
    st.just(Mix()),
    st.builds(
        Condition, st.sampled_from(("add", "add", "film", "film", "scale", "raw")),
        st.sampled_from(("time", "hidden", "embedding")),
    ),
    st.just(Position()),
    st.builds(Decoy, st.sampled_from(DECOYS)),
)  # fmt: skip


@st.composite
def branches(draw: Any, depth: int, skip: str = "identity", shared: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    if skip == "identity" and draw(st.integers(0, 9)) == 9:
        return (*draw(st.lists(_weightless, max_size=1)), Mix(), *draw(st.lists(_weightless, max_size=1)))
    chain = tuple(draw(st.lists(steps(depth, False, True), min_size=1, max_size=4)))
    if not descending(chain):
        chain = (*chain, draw(_dense))
    elif _is_state([s for s in chain if s != Decoy("dead")]):
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
    factors = [draw(st.sampled_from(FACTORS)) for _ in arms]
    factors = ["constant" if sum_at_end(b) == Decoy("noise") else f for b, f in zip(arms, factors, strict=True)]
    minus = draw(st.sampled_from((0, 0, 0, 0, count, count, 1)))
    if minus and not all(descending((*shared, *b)) for b in arms):
        minus = 0
    return Residual(
        tuple(arms), skip, tuple(factors), shared, at,
        draw(st.booleans()),
        draw(st.sampled_from(("none", "none", "none", "constant", "constant" if branch else "scalar"))),
        minus,
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
        st.builds(Scan, inner, st.integers(2, 5)),
        st.builds(Reuse, inner, st.integers(2, 3)),
        st.builds(
            Toward, branches(depth - 1, "none"), st.sampled_from(("constant", "scalar", "vector", "none", "gate"))
        ),
        st.builds(_conditional, arms, st.booleans(), st.sampled_from((False, False, True))),
    )


def _conditional(arms: tuple[tuple[Any, ...], ...], zero: bool, routed: bool) -> Cond:
    """A conditional of at least two arms."""
    arms = arms if any(arms) else ((Act("relu"),), *arms[1:])
    return Cond(arms if zero or len(arms) > 1 else (*arms, ()), zero, routed)


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
                yield dataclasses.replace(value, **{field.name: field.default})  # pyright: ignore[reportArgumentType]
            if isinstance(now, tuple):
                for less in smaller(now):
                    if isinstance(value, Residual) and field.name == "branches":
                        more = {"at": min(value.at, len(less)), "minus": min(value.minus, len(less))}
                        yield dataclasses.replace(value, branches=less, **more)
                    elif field.name != "factors":
                        yield dataclasses.replace(value, **{field.name: less})  # pyright: ignore[reportArgumentType]


def _fits(net: Net) -> bool:
    """Whether a program is in the grammar, and can be read in one way only."""
    if (net.memory or uses_embedding(net)) and net.stem == "none":
        return False  # what is made before the stream starts is no part of a branch
    if net.memory and (not uses_memory(net.steps) or uses_embedding(Net(net.memory))):
        return False
    for s in every((*net.memory, *net.steps)):
        if not all(parts(s)[1:] if isinstance(s, Residual) else parts(s)) and not isinstance(s, Cond):
            return False
        if isinstance(s, Residual) and not (s.branches and 0 <= s.minus <= len(s.branches)):
            return False
        if (
            isinstance(s, Residual)
            and s.skip == "pad"
            and any(not set(map(type, b)) & {*SETS_WIDTH} for b in s.branches)
        ):
            return False
    return not unclear(net) and not open_questions(net) & OPEN


def check(net: Net) -> None:
    expected = Walk(net)
    run = Run(net)
    found = fi.structure(run.function(), *INPUTS)
    branches = [
        Found(
            b.weights, b.depth, b.order, b.order_without_norms, b.skip, b.skip_weights, b.repeats, b.norms,
            tuple((a.switch, a.index, a.count) for a in b.arms), b.alternatives,
        )
        for b in found.branches
    ]  # fmt: skip
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
    if not fails(net):
        return
    while (less := next((n for n in smaller(net) if _fits(n) and fails(n)), None)) is not None:
        net = less
    print(net)
    check(net)


def _property(examples: int, derandomize: bool) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

    def decorate(test: Any) -> Any:
        return settings(
            max_examples=examples, derandomize=derandomize, deadline=None, database=None,
            suppress_health_check=checks, phases=(Phase.generate,), report_multiple_bugs=False,
        )(given(nets())(test))  # fmt: skip

    return decorate


@_property(200, True)
def test_random_programs(net: Net) -> None:
    _examine(net)


@pytest.mark.slow
@_property(3000, False)
def test_many_random_programs(net: Net) -> None:
    _examine(net)
