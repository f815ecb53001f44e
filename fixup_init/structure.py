"""What a model is: its residual branches, weight layers, normalizations, stem and head, as data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from fixup_init import jaxprs, zero
from fixup_init.branch import Branch as BranchNodes
from fixup_init.branch import arms_of
from fixup_init.graph import COPIES, Graph, ancestors, carried_by, varying
from fixup_init.jaxprs import p
from fixup_init.orders import has_rule
from fixup_init.plain import plain
from fixup_init.program import CARRY_IN, Loop, Op
from fixup_init.residual import Residual
from fixup_init.residual import Undecided as UndecidedNodes
from fixup_init.terms import MIXING
from fixup_init.tracing import Traced, trace, uncollected

__all__ = [
    "Arm", "Branch", "LayerInfo", "NormInfo", "Parameter", "Region", "Structure", "StructureError", "Undecided",
    "of_trace", "structure",
]  # fmt: skip

Role = Literal[
    "kernel", "embedding", "factor", "gain", "norm_scale", "norm_bias", "multiplier", "bias", "position", "other",
    "unused",
]  # fmt: skip


class StructureError(ValueError):
    """Something in a model's structure cannot be decided, and what was asked depends on it."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """Arm `index` of `count` of a conditional (`lax.cond`, `lax.switch`), of which one runs; `switch` numbers it."""

    switch: int
    index: int
    count: int


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """A weight layer: the path of its kernel and the fans of its equation (receptive field and groups included).

    `repeats` says how often it stands in the depth of the network (under scan), `arms` which arms of conditionals it is
    in, outermost first.
    """

    path: str
    kind: Literal["dense", "conv", "embedding"]
    fan_in: int
    fan_out: int
    repeats: int = 1
    scope: str = ""
    arms: tuple[Arm, ...] = ()


@dataclasses.dataclass(frozen=True)
class NormInfo:
    """A normalization: its scale and bias (paths), the axes of its statistics, and whether they include the batch."""

    scale: str | None
    bias: str | None
    axes: tuple[int, ...]
    batch: bool
    form: Literal["train", "inference"]
    scope: str = ""


@dataclasses.dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
      weights: its weight layers, parameter paths in trace order.
      own: those of them that no earlier branch holds; the others are in a residual inside of it, or in another stream.
      depth: weight layers in series (the longest chain).
      order: D, the branch behaves as c^D when all its kernels are multiplied by c and c goes to 0.
      order_without_norms: D with its normalizations disregarded.
      skip: what lies beside it.
      repeats: how many branches of the network this one stands for (a scan body stands for its length).
      roles: for each weight, "value" (a factor of what passes through it, normalizations disregarded), "gate" (it is
        not, and its result multiplies the branch position by position), "control" (it is not, and steers otherwise,
        as queries and keys do) or "shortcut" (it is on the skip).
      last: the latest value layers that bring the branch to zero together, normalizations disregarded.
      shares: for each weight, the order along the paths through it: 0 on a control path, and where a normalization
        follows.
      orders: for each weight, the order where it runs: that of its arm, in a conditional; else `order`.
      closing: parameters nearest the end, kernels apart, that multiply the branch: a norm's scale, a multiplier.
      norms: how many normalizations it holds.
      scope: where the sum is, by name; '' where the framework gives no names.
      arms: the arms of conditionals that the whole residual is in, outermost first.
      alternatives: where the branch holds a conditional, the weights of each of its arms; one arm runs.
      sum: number of the sum that it ends in; branches of one sum are parallel.
      regions: operations in it that are named and not entered.
    """

    weights: tuple[str, ...]
    own: tuple[str, ...]
    depth: int
    order: float
    order_without_norms: float
    skip: Literal["identity", "projection", "reshape"]
    skip_weights: tuple[str, ...]
    repeats: int
    roles: dict[str, Literal["value", "control", "gate", "shortcut"]]
    last: tuple[str, ...]
    shares: dict[str, float]
    orders: dict[str, float]
    closing: tuple[str, ...]
    norms: int
    scope: str = ""
    arms: tuple[Arm, ...] = ()
    alternatives: tuple[tuple[str, ...], ...] = ()
    sum: int = 0
    regions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Region:
    """An operation that is named and not entered: a while loop, a solver, a hand-written kernel."""

    primitive: str
    scope: str
    parameters: tuple[str, ...]  # paths of those that it takes


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter leaf and what the model does with it.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      dtype: of the leaf.
      role: the first of its uses.
      uses: all of them.
      layers: the weight layers that it is a kernel of.
      neutral: the value at which a multiplier does nothing.
      not_zero: of heads and what ends a branch, why it may not start at zero, in words; '' where it may.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: Role
    uses: tuple[Role, ...]
    layers: tuple[LayerInfo, ...] = ()
    neutral: float | None = None
    not_zero: str = ""


@dataclasses.dataclass(frozen=True)
class Undecided:
    """Something that the graph leaves open.

    Attributes:
      what: "sum" or "head".
      where: its scope, or the output.
      terms: the parameter paths of each term.
      why: in words.
      name: of a sum, for `Structure.settle`: "sum 1" is the first that is undecided.
      readings: of a sum, for each term the branches that there are if that term is the skip.
      position: how many branches come before it.
    """

    what: Literal["sum", "head"]
    where: str
    terms: tuple[tuple[str, ...], ...]
    why: str
    name: str = ""
    readings: tuple[tuple[Branch, ...], ...] = ()
    position: int = 0


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of a model; prints as a tree.

    Attributes:
      name: the model's.
      branches: residual branches in trace order.
      layers: weight layers in trace order.
      norms: normalizations in trace order.
      stems: weight layers before the first split; `stem` is the first of them.
      heads: the weight layers that outputs come from directly, outside every branch; `head` if there is just one.
      parameters: every parameter leaf, in the order of the tree.
      undecided: what the graph leaves open.
      unruled: operations in branches, by name, that have no rule for orders and are taken to keep it.
      regions: operations that are named and not entered.
    """

    name: str
    branches: tuple[Branch, ...]
    layers: tuple[LayerInfo, ...]
    norms: tuple[NormInfo, ...]
    stems: tuple[str, ...]
    heads: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    undecided: tuple[Undecided, ...] = ()
    unruled: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()

    @property
    def num_branches(self) -> int:
        """L, the number of residual branches, repeats counted; of a conditional's arms the one with most."""
        return max((last for _, last in self.numbers), default=0)

    @property
    def numbers(self) -> tuple[tuple[int, int], ...]:
        """First and last number, from 1 to L, of each branch; every arm of a conditional begins with the same."""
        found: dict[int, tuple[int, int]] = {}

        def number_from(start: int, branches: Sequence[tuple[int, tuple[Arm, ...]]]) -> int:
            arms_of: dict[int, dict[int, list[tuple[int, tuple[Arm, ...]]]]] = {}
            for k, arms in branches:
                if arms:
                    arms_of.setdefault(arms[0].switch, {}).setdefault(arms[0].index, []).append((k, arms[1:]))
            for k, arms in branches:
                if not arms:
                    found[k] = (start, start + self.branches[k].repeats - 1)
                    start += self.branches[k].repeats
                elif own := arms_of.pop(arms[0].switch, None):
                    start = max(number_from(start, arm) for arm in own.values())
            return start

        number_from(1, [(k, b.arms) for k, b in enumerate(self.branches)])
        return tuple(found[k] for k in range(len(self.branches)))

    def settle(self, decisions: Mapping[str, int | None]) -> Structure:
        """The structure with undecided sums decided.

        Args:
          decisions: for a sum's name ("sum 1"), which of its terms is the skip (0 is the first), or None for a sum that
            is no residual.

        Raises:
          StructureError: there is no such sum or no such term.
        """
        named = {u.name: u for u in self.undecided if u.what == "sum"}
        for name, term in decisions.items():
            if name not in named or (term is not None and not 0 <= term < len(named[name].terms)):
                open_ = ", ".join(f"{n!r} (terms 0 to {len(u.terms) - 1})" for n, u in named.items()) or "none"
                raise StructureError(
                    f"{{{name!r}: {term!r}}} settles no undecided sum of {self.name}; these are undecided: {open_}."
                )
        branches: list[Branch] = []
        settled = sorted((named[n].position, k, n) for k, n in enumerate(decisions))
        at = 0
        for position, _, name in settled:
            branches += self.branches[at:position]
            term = decisions[name]
            branches += () if term is None else named[name].readings[term]
            at = position
        branches += self.branches[at:]
        rest = tuple(u for u in self.undecided if u.what == "head" or u.name not in decisions)
        return dataclasses.replace(self, branches=tuple(branches), undecided=rest)

    @property
    def stem(self) -> str | None:
        return self.stems[0] if self.stems else None

    @property
    def head(self) -> str | None:
        return self.heads[0] if len(self.heads) == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with a version."""
        return {"version": 1, "num_branches": self.num_branches, "stem": self.stem, "head": self.head} | plain(self)

    def __str__(self) -> str:
        from fixup_init.report.tree import tree

        return tree(self)

    def _repr_html_(self) -> str:
        from fixup_init.report.svg import svg

        return svg(self)


def structure(model: Any, *args: Any, normalization: str = "kept", **kwargs: Any) -> Structure:
    """Finds the residual structure of a model by tracing it; nothing is allocated and nothing runs.

    Args:
      model: a Flax Linen module, a Flax NNX module or `fi.Function(apply, params)`.
      *args: the model's own arguments after the key, arrays or `jax.ShapeDtypeStruct`.
      normalization: "kept", or "removed" for the structure that is left when every normalization is bypassed.
      **kwargs: the model's own keyword arguments; `method=` and `rngs=` as in Flax.

    Returns:
      A `Structure`.

    Raises:
      ModelError: the model cannot be traced on these inputs, or returns no array.

    Example:
      >>> import jax, jax.numpy as jnp, fixup_init as fi
      >>> from fixup_init.models.resnet import cifar_resnet
      >>> s = fi.structure(cifar_resnet(20, norm="none"), jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32))
      >>> s.num_branches, s.branches[0].depth, s.branches[0].order
      (9, 2, 2.0)
    """
    with uncollected():
        return of_trace(trace(model, args, kwargs, normalization))


def of_trace(traced: Traced) -> Structure:
    """The structure in a trace."""
    graph = traced.graph
    repeats = functools.partial(_repeats, graph, {})
    layers = {n: _layer_infos(graph, n, repeats(n)) for n in graph.layers}
    sums = sorted(s.sum for s in (*traced.residuals, *traced.undecided))
    names = _Names(graph, layers, frozenset(graph.node_of[n.core] for n in traced.norms),
                   {v: k for k, v in enumerate(sums, 1)}, _owners(traced.residuals))  # fmt: skip
    branches = tuple(
        _branch(names, residual, branch, repeats(graph.node_of[residual.sum]))
        for residual in traced.residuals
        for branch in residual.branches
    )
    in_branches = {n for r in traced.residuals for b in r.branches for n in b.layers}
    in_branches |= {n for r in traced.residuals for n in r.skip_layers}
    heads, open_heads = _heads(traced, in_branches)
    stems = [n for n in sorted(layers) if n not in in_branches and n not in heads]
    if traced.residuals:
        before = ancestors(graph, [min(r.split for r in traced.residuals)]) or set()
        stems = [n for n in stems if n in before]
    else:
        stems = stems[:1]
    undecided = [
        _undecided(names, traced.residuals, u, k, repeats(graph.node_of[u.sum]))
        for k, u in enumerate(traced.undecided, 1)
    ]
    undecided += [
        Undecided(
            "head", f"output {k}", tuple(names.paths([n]) for n in nodes),
            f"{len(nodes)} weight layers feed the output and no one of them is last",
        )
        for k, nodes in open_heads
    ]  # fmt: skip
    return Structure(
        name=traced.application.name,
        branches=branches,
        layers=tuple(info for infos in layers.values() for info in infos),
        norms=tuple(_norm_info(traced, n) for n in traced.norms),
        stems=names.paths(stems),
        heads=names.paths(heads),
        parameters=_parameters(
            traced, layers, _not_zero(traced, [*heads, *(n for _, nodes in open_heads for n in nodes)])
        ),
        undecided=tuple(undecided),
        unruled=tuple(sorted(_unruled(traced))),
        regions=_regions(graph),
    )


@dataclasses.dataclass(frozen=True)
class _Names:
    """What nodes and values are called in a structure."""

    graph: Graph
    layers: dict[int, tuple[LayerInfo, ...]]  # by node
    norms: frozenset[int]  # nodes
    sums: dict[int, int]  # number by value
    owner: dict[int, int]  # the end of the first branch that holds a layer, by its node

    def paths(self, nodes: Iterable[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(info.path for n in nodes for info in self.layers[n]))


def _owners(residuals: Iterable[Residual]) -> dict[int, int]:
    found: dict[int, int] = {}
    for residual in residuals:
        for branch in residual.branches:
            for n in branch.layers:
                found.setdefault(n, branch.end)
    return found


def _undecided(
    names: _Names, residuals: tuple[Residual, ...], found: UndecidedNodes, number: int, repeats: int
) -> Undecided:  # fmt: skip
    return Undecided(
        what="sum",
        where=names.graph.scope(names.graph.node_of[found.sum]),
        terms=tuple(names.paths(t) for t in found.terms),
        why=found.why,
        name=f"sum {number}",
        readings=tuple(tuple(_branch(names, r, b, repeats) for b in r.branches) for r in found.readings),
        position=sum(len(r.branches) for r in residuals if r.sum < found.sum),
    )


def _arms(graph: Graph, node: int) -> tuple[Arm, ...]:
    return tuple(Arm(a.switch, a.index, a.count) for a in reversed(arms_of(graph, node).values()))


def _regions(graph: Graph) -> tuple[Region, ...]:
    found = []
    for node in graph.regions:
        op = graph.op(node)
        assert op is not None
        leaves = dict.fromkeys(o for v in op.inputs for o in graph.origins.get(v, ()))
        paths = tuple(graph.leaves[o].path for o in leaves if graph.leaves[o].kind == "param")
        found.append(Region(op.name, op.scope, paths))
    return tuple(found)


def _layer_infos(graph: Graph, node: int, repeats: int) -> tuple[LayerInfo, ...]:
    """A weight layer, once for each parameter that its kernel is joined from."""
    layer = graph.layers[node]
    return tuple(
        LayerInfo(
            graph.leaves[v].path, layer.kind, layer.fan_in, layer.fan_out, repeats, graph.scope(node),
            _arms(graph, node),
        )
        for v in layer.kernels
    )  # fmt: skip


def _branch(names: _Names, residual: Residual, branch: BranchNodes, repeats: int) -> Branch:
    graph = names.graph
    leaves = graph.leaves
    skips = names.paths(residual.skip_layers)
    roles: dict[str, Any] = {info.path: role for n, role in branch.roles.items() for info in names.layers[n]}
    roles |= dict.fromkeys(skips, "shortcut")
    return Branch(
        weights=tuple(info.path for n in branch.layers for info in names.layers[n]),
        own=names.paths(n for n in branch.layers if names.owner.get(n, branch.end) == branch.end),
        depth=branch.depth,
        order=branch.order,
        order_without_norms=branch.free_order,
        skip=residual.skip,
        skip_weights=skips,
        repeats=repeats,
        roles=roles,
        last=names.paths(branch.last),
        shares={leaves[v].path: order for v, order in branch.shares.items()},
        orders={leaves[v].path: order for v, order in branch.in_arms.items()},
        closing=tuple(leaves[v].path for v in branch.closing),
        norms=len(branch.nodes & names.norms),
        scope=graph.scope(graph.node_of[residual.sum]),
        arms=_arms(graph, graph.node_of[residual.sum]),
        alternatives=_alternatives(graph, residual, branch),
        sum=names.sums[residual.sum],
        regions=tuple(op.name for n in graph.regions if n in branch.nodes and (op := graph.op(n))),
    )


def _alternatives(graph: Graph, residual: Residual, branch: BranchNodes) -> tuple[tuple[str, ...], ...]:
    around = arms_of(graph, graph.node_of[residual.sum])
    found: dict[tuple[int, int], dict[str, None]] = {}
    for n in branch.layers:
        for switch, arm in arms_of(graph, n).items():
            if switch not in around:
                paths = (graph.leaves[v].path for v in graph.layers[n].kernels)
                found.setdefault((switch, arm.index), {}).update(dict.fromkeys(paths))
    return tuple(tuple(found[at]) for at in sorted(found))


def _unruled(traced: Traced) -> set[str]:
    ops = (traced.graph.op(n) for r in traced.residuals for b in r.branches for n in b.nodes)
    return {op.name for op in ops if op is not None and not has_rule(op)}


def _norm_info(traced: Traced, norm: Any) -> NormInfo:
    leaves = traced.graph.leaves
    return NormInfo(
        scale=leaves[norm.scale[0]].path if norm.scale else None,
        bias=leaves[norm.bias[0]].path if norm.bias else None,
        axes=norm.axes,
        batch=norm.batch,
        form=norm.form,
        scope=traced.graph.scope(traced.graph.node_of[norm.core]),
    )


def _repeats(graph: Graph, carried: dict[Loop, frozenset[int]], node: int) -> int:
    """How many times a node stands in the depth of the network: the length of each scan whose carry runs through it.

    `carried` remembers the nodes on the carry of each scan.
    """
    op = graph.op(node)
    loop = op.loop if op is not None else None
    repeats = 1
    while loop is not None:
        if loop not in carried:
            carried[loop] = carried_by(graph, loop)
        if node in carried[loop]:
            repeats *= loop.length
        loop = loop.parent
    return repeats


def _leads_to_layers(graph: Graph) -> set[int]:
    """Nodes behind which there are weight layers."""
    found: set[int] = set()
    leading = set(graph.layers)
    for node in sorted(graph.users, reverse=True):
        if not leading.isdisjoint(graph.users[node]):
            found.add(node)
            leading.add(node)
    return found


def _heads(traced: Traced, in_branches: set[int]) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """The last weight layer of each output, and the outputs that several layers outside of branches feed."""
    graph = traced.graph
    leads = _leads_to_layers(graph)
    heads: list[int] = []
    unclear: list[tuple[int, list[int]]] = []
    for k, output in enumerate(graph.outputs):
        seen, todo, found = {output}, [output], []
        while todo:
            n = todo.pop()
            if n in graph.layers:
                found.append(n)
                continue
            for a in graph.parents[n]:
                if a not in seen:
                    seen.add(a)
                    todo.append(a)
        if any(n in in_branches for n in found) or all(n in leads for n in found):
            continue  # a backbone: it ends in a residual sum; or a state on the way
        if len(found) == 1:
            heads.extend(n for n in found if n not in heads)
        else:
            unclear.append((k, sorted(found)))
    return heads, unclear


def _not_zero(traced: Traced, heads: Iterable[int]) -> dict[int, str]:
    """Of the parameters that a scheme might set to zero, those that must not be, and why."""
    graph = traced.graph
    ends = {v for r in traced.residuals for b in r.branches for v in b.closing}
    ends |= {v for r in traced.residuals for b in r.branches for n in b.last for v in graph.layers[n].kernels}
    last = {v: n for n in heads for v in graph.layers[n].kernels}
    used = zero.uses(graph)
    cores = {norm.core for norm in traced.norms if norm.form == "train"}
    hidden = {n for n in last.values() if cores and cores & graph.program.following([graph.value(n)])}
    found = {v: _HIDDEN for v, n in last.items() if n in hidden}
    return found | {v: _STUCK for v in (*ends, *last) if v not in found and not zero.learns(graph, used, v)}


_HIDDEN = "a normalization behind it divides by its scale"
_STUCK = "what is behind it passes no gradient at zero"


def _parameters(
    traced: Traced, layers: dict[int, tuple[LayerInfo, ...]], not_zero: Mapping[int, str]
) -> tuple[Parameter, ...]:
    graph = traced.graph
    uses: dict[int, dict[Role, None]] = {v: {} for v, leaf in graph.leaves.items() if leaf.kind == "param"}
    of_layer: dict[int, list[LayerInfo]] = {v: [] for v in uses}
    neutral: dict[int, float | None] = {}
    for node, layer in graph.layers.items():
        own: Role = "embedding" if layer.kind == "embedding" else "kernel"
        for v in layer.leaves:
            part: Role = "bias" if v in layer.shifts else "gain"
            uses[v]["factor" if v in layer.factors else own if v in layer.kernels else part] = None
            of_layer[v].append(layers[node][0])
    in_norms: dict[int, Role] = {}
    for norm in traced.norms:
        for v in norm.scale:
            in_norms[v] = "norm_scale"
        for v in norm.bias:
            in_norms[v] = "norm_bias"
    for node, op in enumerate(graph.made_by):
        if op is None or node not in graph.parents or node in graph.layers:
            continue
        for value in op.inputs:
            for v in graph.origins.get(value, ()):
                if v not in uses:
                    continue
                role = in_norms.get(v) or _role(graph, node, value, v)
                uses[v][role] = None
                if role in ("norm_scale", "multiplier"):
                    found = _neutral(graph, value, v)
                    neutral[v] = found if neutral.get(v, found) == found else None  # lerp: (1 - a) x + a y
    parameters = []
    for v, found in uses.items():
        leaf = graph.leaves[v]
        roles = tuple(found) or ("unused",)
        role = min(roles, key=_PRIORITY.index)
        parameters.append(
            Parameter(
                leaf.path,
                leaf.shape,
                str(leaf.dtype),
                role,
                roles,
                tuple(of_layer[v]),
                neutral.get(v),
                not_zero.get(v, ""),
            )
        )
    return tuple(parameters)


_PRIORITY: list[Role] = [
    "kernel", "embedding", "factor", "gain", "norm_scale", "norm_bias", "multiplier", "position", "bias", "other",
    "unused",
]  # fmt: skip


def _role(graph: Graph, node: int, value: int, leaf: int) -> Role:
    op = graph.op(node)
    assert op is not None
    if op.primitive in (p.mul_p, p.div_p):
        # One arm of a piecewise function (PReLU) is a slope, and a row of a kernel that is written out is a tap: no
        # multipliers of the stream.
        piecewise = any(
            (o := graph.op(u)) is not None and o.primitive in (p.select_n_p, p.max_p, p.min_p)
            and sum(graph.is_activation(v) for v in o.inputs[o.primitive is p.select_n_p :]) > 1
            for u in graph.users[node]
        )  # fmt: skip
        apart = _is_made(graph, value, leaf) or _scales_difference(graph, node) or _makes_features(graph, op, value)
        return "other" if piecewise or apart else "multiplier"
    if op.primitive in (p.add_p, p.sub_p):
        return "position" if _is_table(graph, node, value, leaf) else "bias"
    return "other"


def _scales_difference(graph: Graph, node: int) -> bool:
    """x + a (f(x) - x): a says how far to go; at 1 nothing of x would be left."""
    above = [graph.op(a) for a in graph.parents[node]]
    return any(
        o is not None and o.primitive is p.sub_p and all(graph.is_activation(v) for v in o.inputs)
        and any(graph.node_of[v] in graph.parents.get(u, ()) for u in graph.users[node] for v in o.inputs)
        for o in above
    )  # fmt: skip


_MAKING = MIXING | {p.slice_p, p.dynamic_slice_p, p.gather_p, jaxprs.SPLIT, jaxprs.UNSTACK}


def _is_made(graph: Graph, value: int, leaf: int) -> bool:
    """Whether a value is cut out of a parameter, by hand and not by a scan, or made with it as a kernel: a filter, what
    a hypernetwork returns."""
    made = [graph.program.ops[k] for k in graph.behind([value])]
    return any(o.primitive in _MAKING and any(leaf in graph.origins.get(v, ()) for v in o.inputs) for o in made)


def _is_table(graph: Graph, node: int, value: int, leaf: int) -> bool:
    """Whether an additive parameter varies over more than the features of the layer before it."""
    made = [v for k in graph.behind([value]) for v in graph.program.ops[k].outputs if leaf in graph.origins.get(v, ())]
    # What it was cut down to before it was repeated, in one pass of a scan.
    size = min(math.prod(shape) for shape in (graph.leaves[leaf].shape, *map(graph.program.shape, (*made, value))))
    if max((n for n in graph.program.shape(value)), default=1) == size:
        return False  # a vector
    while len(graph.parents[node]) == 1:
        node = graph.parents[node][0]
        if node in graph.layers:
            return size > graph.layers[node].features
    return True


def _makes_features(graph: Graph, op: Op, value: int) -> bool:
    """Whether a factor varies where the stream is repeated: x w with a vector w for each number x is a layer."""
    program = graph.program
    streams = [v for v in op.inputs if graph.is_activation(v)]
    return any(varying(program, graph.maker, value) - varying(program, graph.maker, v) for v in streams)


def _neutral(graph: Graph, value: int, leaf: int) -> float | None:
    """The leaf at which a factor `shift + scale * leaf` is 1; None for any other function of it."""
    known: dict[int, tuple[float, float]] = {leaf: (0.0, 1.0)}
    for k in graph.behind([value]):
        op = graph.program.ops[k]
        own = [v for v in op.inputs if v in known]
        if not own:
            continue
        (shift, scale), others = known[own[0]], [v for v in op.inputs if v is not own[0]]
        number = graph.literal(others[0]) if others else None
        if op.primitive in COPIES or op.primitive in (p.slice_p, p.stop_gradient_p, CARRY_IN):
            found = shift, scale
        elif op.primitive is p.neg_p:
            found = -shift, -scale
        elif op.primitive is p.mul_p and len(own) == 1:
            by = 1.0 if number is None else number  # another parameter, at its neutral value
            found = shift * by, scale * by
        elif op.primitive is p.div_p and number and op.inputs[0] == own[0]:
            found = shift / number, scale / number
        elif op.primitive is p.add_p and number is not None:
            found = shift + number, scale
        elif op.primitive is p.sub_p and number is not None:
            sign = 1.0 if op.inputs[0] == own[0] else -1.0
            found = sign * (shift - number), sign * scale
        else:
            return None
        known |= dict.fromkeys(op.outputs, found)
    shift, scale = known.get(value, (0.0, 0.0))
    return (1 - shift) / scale if scale else None
