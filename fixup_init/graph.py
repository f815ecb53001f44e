"""Program -> Graph: which values are activations, which are parameters, and where the weight layers are.

A value is an *activation* if it depends on a model input; otherwise it is made of parameters, state (running
statistics), noise (random keys) and constants alone. Nodes are the model inputs and the operations on activations, in
trace order. A *weight layer* is a contraction of an activation with a value made of parameters: its identity is the
parameter's path, and its fan axes come from the equation that contracts it.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from fixup_init import jaxprs
from fixup_init.jaxprs import p
from fixup_init.program import CARRY_IN, IDENTITY, SHARD_IN, SLICE_IN, Loop, Op, Program

__all__ = [
    "COPIES",
    "Graph",
    "Layer",
    "Leaf",
    "Split",
    "ancestors",
    "build",
    "carried_by",
    "latest_common_ancestor",
    "reaches",
    "varying",
]

PARAM, STATE, INPUT, NOISE = 1, 2, 4, 8
_KINDS = {"param": PARAM, "state": STATE, "input": INPUT, "noise": NOISE}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array that the traced function takes."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    kind: Literal["param", "state", "input", "noise"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight layer: `fan_in` and `fan_out` count the kernel entries that meet one output and one input unit."""

    path: str
    kind: Literal["dense", "conv", "embedding"]
    fan_in: int
    fan_out: int
    node: int
    kernel: int  # value
    leaves: tuple[int, ...]  # parameter leaves that the kernel is made of, those that are it first
    kernels: tuple[int, ...]  # those that are it: one, or several that are joined (concatenated, added)
    factors: frozenset[int]  # those of them that enter as a matrix product with others: low-rank kernels
    channel: int  # axis of the output that holds its features
    features: int  # how many there are
    shifts: frozenset[int] = frozenset()  # leaves that are only added to the kernel, repeated: biases of what makes it


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """See the module docstring. Node k < len(inputs) is an input; node len(inputs) + i is `program.ops[i]`."""

    program: Program
    leaves: dict[int, Leaf]  # by value
    kind: list[int]
    node_of: dict[int, int]  # activation value -> node
    parents: dict[int, tuple[int, ...]]  # node -> its activation parents
    users: dict[int, list[int]]  # node -> nodes that use it
    origins: dict[int, tuple[int, ...]]  # value made of parameters and state -> its leaves
    maker: dict[int, int]  # value -> index of the op that makes it
    inputs: tuple[int, ...]
    layers: dict[int, Layer]  # by node
    outputs: tuple[int, ...]  # nodes
    regions: tuple[int, ...]  # nodes that are named and not entered
    made_by: list[Op | None]  # by node, None for an input
    rules: tuple[dict[Op, Any], dict[Op, Any]] = dataclasses.field(default_factory=lambda: ({}, {}))  # of `orders`

    def op(self, node: int) -> Op | None:
        return self.made_by[node] if node >= 0 else None

    def loop(self, node: int) -> Loop | None:
        """The scan that a node stands in."""
        op = self.op(node)
        return op.loop if op is not None else None

    def value(self, node: int) -> int:
        """The (first) value that a node makes."""
        op = self.op(node)
        return self.inputs[node] if op is None else op.outputs[0]

    def is_activation(self, value: int) -> bool:
        return bool(self.kind[value] & INPUT)

    def is_parameter(self, value: int) -> bool:
        """Whether a value is made of parameters or running statistics alone."""
        return bool(self.kind[value] & (PARAM | STATE)) and not self.kind[value] & INPUT

    def shape(self, node: int) -> tuple[int, ...]:
        return self.program.shape(self.value(node))

    def scope(self, node: int) -> str:
        op = self.op(node)
        return "" if op is None else op.scope

    def literal(self, value: int) -> float | None:
        """The number that a constant value holds everywhere, if it is one."""
        while value not in self.program.constants:
            k = self.maker.get(value)
            op = self.program.ops[k] if k is not None else None
            if op is None or not (op.primitive in COPIES or jaxprs.is_cast(op.primitive)):
                return None
            value = op.inputs[0]
        constant = self.program.constants[value]
        if np.ndim(constant) == 0:
            try:
                return float(constant)
            except (TypeError, ValueError):  # a key, or a complex number
                return None
        return None

    def behind(self, values: Iterable[int]) -> list[int]:
        """Indices of the ops that values not depending on inputs are made with, in order."""
        kind, maker, ops = self.kind, self.maker, self.program.ops
        found: set[int] = set()
        todo = [v for v in values if v in maker and not kind[v] & INPUT]
        while todo:
            k = maker[todo.pop()]
            if k not in found:
                found.add(k)
                todo += [v for v in ops[k].inputs if v in maker]
        return sorted(found)


def build(program: Program, leaves: Sequence[Leaf]) -> Graph:
    """The graph of a program whose inputs are described by `leaves`, in order."""
    kind = [0] * len(program.avals)
    by_value = dict(zip(program.inputs, leaves, strict=True))
    inputs = tuple(v for v, leaf in by_value.items() if leaf.kind == "input")
    node_of = {v: k for k, v in enumerate(inputs)}
    parents: dict[int, tuple[int, ...]] = {k: () for k in range(len(inputs))}
    users: dict[int, list[int]] = {k: [] for k in range(len(inputs))}
    origins: dict[int, tuple[int, ...]] = {}
    maker: dict[int, int] = {}
    layers: dict[int, Layer] = {}
    for v, leaf in by_value.items():
        kind[v] = _KINDS[leaf.kind]
        if leaf.kind in ("param", "state"):
            origins[v] = (v,)
    in_active_loop = _loops_with_activations(program, kind)
    primitives = {op.primitive for op in program.ops}
    contracting = _CONTRACTING | {q for q in primitives if jaxprs.is_ragged_dot(q)}
    closed = {q for q in primitives if jaxprs.opaque(q)}
    for k, op in enumerate(program.ops):
        bits = 0
        for v in op.inputs:
            bits |= kind[v]
        if (
            op.primitive is CARRY_IN
            and op.loop in in_active_loop
            and jnp.issubdtype(program.dtype(op.outputs[0]), jnp.inexact)
        ):
            bits |= INPUT
        for v in op.outputs:
            kind[v] = bits
            maker[v] = k
        if bits & INPUT:
            node = len(inputs) + k
            above = tuple(dict.fromkeys([node_of[v] for v in op.inputs if kind[v] & INPUT]))
            parents[node] = above
            users[node] = []
            for a in above:
                users[a].append(node)
            for v in op.outputs:
                node_of[v] = node
            if op.primitive not in contracting:
                continue
            layer = _weight_layer(program, op, node, kind, origins, by_value, maker)
            if layer is None and op.primitive is p.dot_general_p:
                layer = _chosen_kernel(program, op, node, layers, maker, len(inputs))
            if layer is not None:
                layers[node] = layer
        elif bits & (PARAM | STATE):
            found = tuple(dict.fromkeys(o for v in op.inputs for o in origins.get(v, ())))
            for v in op.outputs:
                origins[v] = found
    outputs = tuple(node_of[v] for v in program.outputs if v in node_of)
    made_by = [*(None for _ in inputs), *program.ops]
    regions = tuple(n for n in parents if (op := made_by[n]) and op.primitive in closed) if closed else ()
    return Graph(
        program, by_value, kind, node_of, parents, users, origins, maker, inputs, layers, outputs, regions, made_by
    )  # fmt: skip


def _loops_with_activations(program: Program, kind: list[int]) -> set[Any]:
    """Loops that any activation enters: a carry that starts as a constant is an activation there."""
    if all(op.loop is None for op in program.ops):
        return set()
    bits = list(kind)
    active: set[Any] = set()
    for op in program.ops:
        b = 0
        for v in op.inputs:
            b |= bits[v]
        if op.loop in active:
            b |= INPUT if op.primitive is CARRY_IN else 0
        for v in op.outputs:
            bits[v] = b
        loop = op.loop
        while b & INPUT and loop is not None:
            active.add(loop)
            loop = loop.parent
    return active


# Operations that a weight layer can be, beside products with groups of rows.
_CONTRACTING = frozenset({p.dot_general_p, p.conv_general_dilated_p, p.gather_p, p.reduce_sum_p})


def _weight_layer(
    program: Program, op: Op, node: int, kind: list[int], origins: dict[int, tuple[int, ...]], leaves: dict[int, Leaf],
    maker: dict[int, int],
) -> Layer | None:  # fmt: skip
    def weight(value: int) -> bool:
        return bool(kind[value] & PARAM) and not kind[value] & INPUT

    def whole(value: int) -> tuple[int, ...]:
        """The shape of a kernel, all devices' parts together."""
        parts = _parts(program, maker, value)
        return tuple(n * k for n, k in zip(program.shape(value), parts, strict=True))

    kind_: Any = "dense"
    if op.primitive is p.dot_general_p:
        contract, batch = op.params["dimension_numbers"]
        sides = [s for s in (0, 1) if weight(op.inputs[s])]
        if not sides or not contract[0]:  # nothing is summed: a product entry by entry
            return None
        side = sides[0]
        kernel = op.inputs[side]
        shape, contracted = whole(kernel), contract[side]
        fan_in = math.prod(shape[a] for a in contracted)
        fan_out = math.prod(n for a, n in enumerate(shape) if a not in contracted and a not in batch[side])
        rank = len(program.shape(op.outputs[0]))
        free = len(shape) - len(contracted) - len(batch[side])
        channel = rank - 1 if side == 1 or not free else len(batch[0]) + free - 1
        features = math.prod(n for a, n in enumerate(shape) if a not in contracted)
        if _one_hot(program, maker, op.inputs[1 - side]):
            fan_in, kind_ = 1, "embedding"
    elif op.primitive is p.conv_general_dilated_p:
        kernel = op.inputs[1]
        if not weight(kernel):
            return None
        out_axis, in_axis, *space = op.params["dimension_numbers"].rhs_spec
        shape = whole(kernel)
        field = math.prod(shape[a] for a in space)
        groups = op.params["feature_group_count"] * op.params["batch_group_count"]
        fan_in, fan_out = shape[in_axis] * field, shape[out_axis] // groups * field
        channel = op.params["dimension_numbers"].out_spec[1]
        kind_ = "conv"
        features = shape[out_axis]
    elif op.primitive is p.gather_p:
        kernel = op.inputs[0]
        if not weight(kernel) or len(program.shape(kernel)) < 2:
            return None
        shape = whole(kernel)
        fan_in, fan_out = 1, math.prod(shape[1:])  # one row is read: a product with a one-hot vector
        features = fan_out
        channel = len(program.shape(op.outputs[0])) - 1
        kind_ = "embedding"
    elif op.primitive is p.reduce_sum_p:
        found = _written_out(program, op, maker, weight)
        if found is None:
            return None
        kernel, fan_in, fan_out = found
        features, channel = fan_out, len(program.shape(op.outputs[0])) - 1
    else:  # a product of each group of rows with a matrix of its own
        kernel = op.inputs[1]  # (groups, in, out)
        if not weight(kernel):
            return None
        _, fan_in, fan_out = whole(kernel)
        features, channel = fan_out, len(program.shape(op.outputs[0])) - 1
    made_of = [o for o in origins[kernel] if leaves[o].kind == "param"]
    kernels, factors, shifts = tuple(made_of), frozenset(), frozenset()
    if len(made_of) > 1:
        size = {o: math.prod(leaves[o].shape) for o in made_of}
        factors = _factors(program, kernel, origins, leaves, maker)
        joined, added = _joined(program, kernel, maker, size)
        shifts = frozenset(added - joined - factors)
        made_of.sort(key=lambda o: (o not in joined, o in factors, -size[o]))
        kernels = tuple(o for o in made_of if o in joined)
    return Layer(
        leaves[made_of[0]].path, kind_, fan_in, fan_out, node, kernel, tuple(made_of), kernels, factors, channel,
        features, shifts,
    )  # fmt: skip


def _joined(program: Program, kernel: int, maker: dict[int, int], size: dict[int, int]) -> tuple[set[int], set[int]]:
    """The parameters that a kernel is: several where they are added, concatenated or two parts of complex numbers; of
    a product the one with the largest, since the other is its gain. And those that are repeated and added on the way:
    the bias of a layer that makes queries of learned ones is no part of the kernel that they are."""
    known: dict[int, set[int]] = {}
    shifts: set[int] = set()

    def visit(value: int) -> set[int]:
        if value in size:
            return {value}
        k = maker.get(value)
        if k is None:
            return set()
        op = program.ops[k]
        if value not in known:
            known[value] = set()
            found = {v: own for v in op.inputs if (own := visit(v))}
            if op.primitive in (p.add_p, p.sub_p) and len(found) > 1:
                varies = {v: varying(program, maker, v) for v in found}
                whole = set().union(*varies.values())
                for v in [v for v in found if varies[v] < whole]:
                    shifts.update(found.pop(v))
            parts = list(found.values())
            if op.primitive in _JOINING:
                known[value] = set().union(*parts)
            elif parts:
                known[value] = max(parts, key=lambda found: max(size[o] for o in found))
        return known[value]

    return visit(kernel), shifts


def _written_out(
    program: Program, op: Op, maker: dict[int, int], weight: Callable[[int], bool]
) -> tuple[int, int, int] | None:  # fmt: skip
    """(kernel, fan_in, fan_out) of a product with a kernel that is written as a multiplication and a sum."""
    value = op.inputs[0]
    while (k := maker.get(value)) is not None and program.ops[k].primitive in (p.convert_element_type_p, p.copy_p):
        value = program.ops[k].inputs[0]
    if k is None or program.ops[k].primitive is not p.mul_p:
        return None
    sides = [v for v in program.ops[k].inputs if weight(v)]
    if len(sides) != 1:
        return None
    (kernel,) = sides
    (stream,) = (v for v in program.ops[k].inputs if v != kernel)
    shape = program.shape(kernel)
    summed = set(op.params["axes"])
    varies, carried = varying(program, maker, kernel), varying(program, maker, stream)
    if not summed & varies & carried or len(varies) < 2:
        return None
    fan_in = math.prod(shape[a] for a in summed & varies)
    fan_out = math.prod(shape[a] for a in varies - summed if a not in carried)
    return kernel, fan_in, fan_out


def varying(program: Program, maker: dict[int, int], value: int) -> set[int]:
    """The axes along which a value is not just repeated."""
    shape = program.shape(value)
    axes = {a for a, n in enumerate(shape) if n > 1}
    k = maker.get(value)
    op = program.ops[k] if k is not None else None
    if op is not None and op.primitive is p.broadcast_in_dim_p:
        inner = varying(program, maker, op.inputs[0])
        return {a for i, a in enumerate(op.params["broadcast_dimensions"]) if i in inner}
    if op is not None and op.primitive in (p.convert_element_type_p, p.copy_p):
        return varying(program, maker, op.inputs[0])
    return axes


def _chosen_kernel(
    program: Program, op: Op, node: int, layers: dict[int, Layer], maker: dict[int, int], first: int
) -> Layer | None:
    """A contraction with kernels that were read from a table of kernels, one for each row: experts. The layer is the
    contraction and not the reading, which is taken from `layers`."""
    contract, batch = op.params["dimension_numbers"]
    for side in (0, 1):
        value = op.inputs[side]
        while (k := maker.get(value)) is not None and program.ops[k].primitive in COPIES:
            value = program.ops[k].inputs[0]
        table = layers.get(first + k) if k is not None else None
        if table is None or table.kind != "embedding" or len(program.shape(table.kernel)) < 3:
            continue
        shape = program.shape(op.inputs[side])
        fan_in = math.prod(shape[a] for a in contract[side])
        fan_out = math.prod(n for a, n in enumerate(shape) if a not in contract[side] and a not in batch[side])
        if fan_in * fan_out != table.fan_out:
            continue
        assert k is not None
        del layers[first + k]
        channel = len(program.shape(op.outputs[0])) - 1
        return dataclasses.replace(
            table, kind="dense", fan_in=fan_in, fan_out=fan_out, node=node, channel=channel, features=fan_out
        )
    return None


def _factors(
    program: Program, kernel: int, origins: dict[int, tuple[int, ...]], leaves: dict[int, Leaf], maker: dict[int, int]
) -> frozenset[int]:
    """Parameters of a kernel that are multiplied with others as matrices before an activation meets them."""

    def behind(value: int) -> set[int]:
        return {o for o in origins.get(value, ()) if leaves[o].kind == "param"}

    found: set[int] = set()
    seen, todo = set(), [kernel]
    while todo:
        k = maker.get(todo.pop())
        if k is None or k in seen:
            continue
        seen.add(k)
        made = program.ops[k]
        todo.extend(made.inputs)
        if made.primitive is p.dot_general_p:
            left, right = behind(made.inputs[0]), behind(made.inputs[1])
            if left and right and not left & right:
                found |= left | right
    return frozenset(found)


def _parts(program: Program, maker: dict[int, int], value: int) -> tuple[int, ...]:
    """Into how many parts a shard_map cut each axis of a value, where it reached its use as it was."""
    whole = (1,) * len(program.shape(value))
    while (k := maker.get(value)) is not None:
        op = program.ops[k]
        if op.primitive is SHARD_IN:
            return op.params["parts"]
        if op.primitive not in (p.convert_element_type_p, p.copy_p, IDENTITY, *jaxprs.collectives()):
            return whole
        value = op.inputs[0]
    return whole


def _one_hot(program: Program, maker: dict[int, int], value: int) -> bool:
    """Whether a value holds truth values as numbers, index == position: a row is read, not a sum formed."""
    while (k := maker.get(value)) is not None:
        op = program.ops[k]
        if op.primitive is p.eq_p:
            return True
        if op.primitive not in COPIES:
            return False
        value = op.inputs[0]
    return False


def carried_by(graph: Graph, loop: Loop) -> frozenset[int]:
    """Nodes of a scan body on a path from a carry to a carry."""
    starts = {graph.node_of[c] for c, _ in loop.carries if c in graph.node_of}
    ends = [graph.node_of[o] for _, o in loop.carries if o in graph.node_of]
    low = min(starts, default=0)
    back, todo = set(ends), list(ends)
    while todo:
        for a in graph.parents[todo.pop()]:
            if a >= low and a not in back:
                back.add(a)
                todo.append(a)
    below = set(starts)
    for n in sorted(back):
        if any(a in below for a in graph.parents[n]):
            below.add(n)
    return frozenset(below & back)


@dataclasses.dataclass(frozen=True)
class Split:
    """The latest common ancestor of some terms, and what lies between."""

    node: int
    colors: dict[int, int]  # node after the split -> bit mask of the terms that it leads to


_BUDGET = 48  # nodes to walk before asking whether the ancestors of one term are few
_FEW = 96


class _Walk:
    """A walk back from some terms at once, latest node first."""

    def __init__(self, graph: Graph, terms: Sequence[int]) -> None:
        self._graph = graph
        self._everyone = (1 << len(terms)) - 1
        self._open = [0] * len(terms)
        self._colors: dict[int, int] = {}
        self._heap: list[int] = []
        self._passed: dict[int, int] = {}
        for t, node in enumerate(terms):
            self._reach(node, 1 << t)

    def _reach(self, node: int, mask: int) -> None:
        before = self._colors.get(node)
        if before is None:
            heapq.heappush(self._heap, -node)
            before = 0
        self._colors[node] = before | mask
        for t in _bits(mask & ~before):
            self._open[t] += 1

    def on(self, budget: int | None = None) -> Split | bool:
        """Goes on until one node leads to every term (its split), no node can (False), or the budget ends (True)."""
        graph, colors = self._graph, self._colors
        steps = 0
        while self._heap:
            node = -self._heap[0]
            mask = colors[node]
            if mask == self._everyone:
                return Split(node, self._passed)
            if steps == budget:
                return True
            steps += 1
            heapq.heappop(self._heap)
            self._passed[node] = mask
            for above in graph.parents[node]:
                self._reach(above, mask)
            for t in _bits(mask):
                self._open[t] -= 1
                if not self._open[t]:
                    return False  # every path back from this term has ended
        return False


@functools.lru_cache(1024)
def _bits(mask: int) -> tuple[int, ...]:
    return tuple(t for t in range(mask.bit_length()) if mask >> t & 1)


def latest_common_ancestor(
    graph: Graph, terms: Sequence[int], hopeless: Callable[[int], bool] = lambda split: False
) -> Split | None:
    """Walks back from all terms at once, latest node first, until one node leads to every term.

    A node counts as its own ancestor. The walk touches only nodes between the split and the terms. Where it is long
    and one of two terms has few ancestors (a time embedding that is added in every block), the split is found among
    those; then `hopeless(split)` may end the search before what lies between is walked.

    Returns:
      The split, or None where no node leads to every term or the search was ended.
    """
    walk = _Walk(graph, terms)
    found = walk.on(_BUDGET)
    if found is True:
        if len(terms) == 2:
            pairs = zip(terms, terms[::-1], strict=True)
            sides = [(sorted(few, reverse=True), other) for t, other in pairs if (few := ancestors(graph, [t], _FEW))]
            if sides:
                few, other = min(sides, key=lambda side: len(side[0]))
                split = next((a for a in few if reaches(graph, a, other)), None)
                if split is None or hopeless(split):
                    return None
        found = walk.on()
    return found if isinstance(found, Split) else None


def ancestors(graph: Graph, nodes: Iterable[int], most: float = math.inf) -> set[int] | None:
    """Nodes and all that leads to them, or None where these are more than `most`."""
    seen, todo = set(nodes), list(nodes)
    while todo:
        for a in graph.parents[todo.pop()]:
            if a not in seen:
                seen.add(a)
                todo.append(a)
        if len(seen) > most:
            return None
    return seen


def reaches(graph: Graph, node: int, descendant: int) -> bool:
    """Whether a node leads to another; looks at its latest users first, since streams are long and conditions wide."""
    heap: list[tuple[int, int, int]] = []
    seen = {node}

    def push(source: int, k: int) -> None:
        if k >= 0:
            heapq.heappush(heap, (-graph.users[source][k], source, k))

    push(node, bisect.bisect_right(graph.users[node], descendant) - 1)
    while heap:
        user, source, k = heapq.heappop(heap)
        push(source, k - 1)
        if -user == descendant:
            return True
        if -user not in seen:
            seen.add(-user)
            push(-user, bisect.bisect_right(graph.users[-user], descendant) - 1)
    return node == descendant


_JOINING = frozenset({p.add_p, p.sub_p, p.concatenate_p, p.complex_p, jaxprs.STACK, p.dynamic_update_slice_p})
COPIES = frozenset({
    p.broadcast_in_dim_p, p.reshape_p, p.convert_element_type_p, p.squeeze_p, p.transpose_p, p.copy_p,
    SLICE_IN, SHARD_IN, IDENTITY,
})  # fmt: skip
