"""A structure in the order of its trace, for tree and drawing: what has weights, its numbers and its short names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Literal

from fixup_init.report.layout import Run, fold, number, plural
from fixup_init.structure import Branch, LayerInfo, NormInfo, Structure

__all__ = [
    "Item", "by_path", "common_home", "layer_runs", "layer_words", "names_within", "norm_words", "numbers",
    "order_words", "outline", "size_words",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    """A branch with its numbers, or a weight layer outside of branches; `key` is what folding compares."""

    key: Hashable
    place: Literal["branch", "stem", "head", "layer"]
    paths: tuple[str, ...]
    branch: Branch | None = None
    layer: LayerInfo | None = None
    first: int = 0
    last: int = 0


def outline(structure: Structure) -> Iterator[Item]:
    """Everything with weights, in trace order."""
    layers = by_path(structure)
    order = {path: k for k, path in enumerate(layers)}
    inside = {q for b in structure.branches for q in (*b.weights, *b.skip_weights)}
    found: list[tuple[int, int, Item]] = []
    at, number = 0, 1
    for k, b in enumerate(structure.branches, 1):
        # Layers that branches share are in the trace once; their later branches stay behind the earlier ones.
        at = max([at, *(order[q] for q in b.weights)])
        last = number + b.repeats - 1
        item = Item(_branch_key(b, layers), "branch", b.weights, branch=b, first=number, last=last)
        found.append((at, k, item))
        number = last + 1
    for k, layer in enumerate(layers.values()):
        if layer.path not in inside:
            place = "head" if layer.path in structure.heads else "stem" if layer.path in structure.stems else "layer"
            found.append((k, 0, Item((place, _layer_key(layer)), place, (layer.path,), layer=layer)))
    yield from (item for _, _, item in sorted(found, key=lambda f: f[:2]))


def by_path(structure: Structure) -> dict[str, LayerInfo]:
    """Weight layers in trace order; the first use of a shared one."""
    layers: dict[str, LayerInfo] = {}
    for layer in structure.layers:
        layers.setdefault(layer.path, layer)
    return layers


def _layer_key(layer: LayerInfo) -> Hashable:
    return layer.kind, layer.fan_in, layer.fan_out, layer.repeats


def _branch_key(b: Branch, layers: dict[str, LayerInfo]) -> Hashable:
    return (
        tuple((_layer_key(layers[q]), b.roles.get(q)) for q in b.weights),
        tuple(_layer_key(layers[q]) for q in b.skip_weights),
        (b.depth, b.order, b.order_without_norms, b.skip, b.repeats, b.norms),
    )


def _norm_key(norm: NormInfo) -> tuple[object, ...]:
    return norm.axes, norm.batch, norm.form, norm.scale is not None, norm.bias is not None


def layer_runs(
    branch: Branch, layers: Mapping[str, LayerInfo], keys: Callable[[str], Hashable] = lambda path: None
) -> list[Run]:
    """The weight layers of a branch, folded where more than two in a row are equal, `keys` of their paths included."""
    found = [(_layer_key(layers[q]), branch.roles.get(q), keys(q)) for q in branch.weights]
    folded = []
    for run in fold(found, longest=4):
        folded += [run] if run.count > 2 else [Run(k, 1, 1) for k in range(run.start, run.stop)]
    return folded


def layer_words(layer: LayerInfo, scans: bool = True) -> str:
    repeats = f" in a scan of {layer.repeats}" if scans and layer.repeats > 1 else ""
    return f"{layer.kind} {layer.fan_in}→{layer.fan_out}{repeats}"


def order_words(branch: Branch) -> str:
    """`order D = 0 (2 without norms)`."""
    order = f"order D = {number(branch.order)}"
    if branch.order_without_norms != branch.order:
        order += f" ({number(branch.order_without_norms)} without norms)"
    return order


_AFFINE = {
    (True, True): "with scale and bias",
    (True, False): "with scale",
    (False, True): "with bias",
    (False, False): "without scale and bias",
}


def norm_words(norms: Sequence[NormInfo]) -> str:
    """How many normalizations of each kind there are."""
    kinds: dict[tuple[object, ...], list[NormInfo]] = {}
    for norm in norms:
        kinds.setdefault(_norm_key(norm), []).append(norm)
    parts = []
    for same in kinds.values():
        n = same[0]
        how = "stored statistics"
        if n.form == "train":
            axes = f" over {'axis' if len(n.axes) == 1 else 'axes'} {', '.join(map(str, n.axes))}" if n.axes else ""
            how = f"statistics{axes} of {'the batch' if n.batch else 'each example'}"
        parts.append(f"{len(same)} ({how}; {_AFFINE[n.scale is not None, n.bias is not None]})")
    return "; ".join(parts)


def size_words(structure: Structure) -> str:
    count = structure.num_branches
    branches = f"L = {count} residual {'branch' if count == 1 else 'branches'}" if count else "no residual branches"
    return f"{branches}, {plural(sum(x.repeats for x in structure.layers), 'weight layer')}"


def numbers(items: Sequence[Item]) -> str:
    """`branch 3`, `branches 3–20` or `branches 1, 3 … 95`."""
    own = [i for i in items if i.branch is not None]
    if not own:
        return plural(len(items), "layer")
    first, last = own[0].first, own[-1].last
    if first == last:
        return f"branch {first}"
    if any(b.first > a.last + 1 for a, b in itertools.pairwise(own)):
        return f"branches {first}, {own[1].first} … {last}"
    return f"branches {first}–{last}"


def common_home(paths: Sequence[str]) -> str:
    """The longest common beginning of paths, in whole names: where a branch lies."""
    common: list[str] = []
    for names in zip(*(q.split("/")[:-1] for q in paths), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return "/".join(common)


def names_within(paths: Sequence[str], home: str) -> list[str]:
    """Paths within `home`, less their last name if it is the same for all: `conv1` and `conv2`, without `/kernel`."""
    inner = [q.removeprefix(f"{home}/") for q in paths]
    ends = {q.rpartition("/")[2] for q in inner}
    return [q.rpartition("/")[0] for q in inner] if len(ends) == 1 else inner
