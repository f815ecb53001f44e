"""A structure in the order of its trace, for tree and drawing: what has weights, its numbers and its short names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from fixup_init.report.layout import Run, fold, number, plural
from fixup_init.structure import Arm, Branch, LayerInfo, NormInfo, Region, Structure, Undecided

__all__ = [
    "Item", "Stretch", "Within", "arms_words", "by_path", "columns", "common_home", "covered", "inner_arms",
    "layer_runs", "layer_words", "names_within", "norm_words", "numbers", "order_words", "outline", "reading_words",
    "region_words", "settle_words", "size_words", "stretches", "units", "unruled_words", "within", "within_words",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Item:
    """A branch with its numbers, or a weight layer outside of branches; `key` is what folding compares.

    Branches in different arms of a conditional have the same numbers, since one arm runs; the last number is L.
    """

    key: Hashable
    place: Literal["branch", "stem", "head", "layer"]
    paths: tuple[str, ...]
    branch: Branch | None = None
    layer: LayerInfo | None = None
    first: int = 0
    last: int = 0

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Arms of conditionals that it is in, outermost first."""
        return self.branch.arms if self.branch else self.layer.arms if self.layer else ()


def outline(structure: Structure) -> Iterator[Item]:
    """Everything with weights, in trace order."""
    layers = by_path(structure)
    order = {path: k for k, path in enumerate(layers)}
    inside = {q for b in structure.branches for q in (*b.weights, *b.skip_weights)}
    found: list[tuple[int, int, Item]] = []
    numbered = structure.numbers
    # Layers that branches share are in the trace once; their later branches stay behind the earlier ones. Branches of
    # one sum stay together.
    at, k = 0, 0
    for same in _sums(structure.branches):
        at = max([at, *(order[q] for b in same for q in b.weights)])
        for b in same:
            first, last = numbered[k]
            k += 1
            item = Item(_branch_key(b, layers), "branch", b.weights, branch=b, first=first, last=last)
            found.append((at, k, item))
    for k, layer in enumerate(layers.values()):
        if layer.path not in inside:
            place = "head" if layer.path in structure.heads else "stem" if layer.path in structure.stems else "layer"
            found.append((k, 0, Item((place, _layer_key(layer)), place, (layer.path,), layer=layer)))
    yield from (item for _, _, item in sorted(found, key=lambda f: f[:2]))


def _sums(branches: Iterable[Branch]) -> Iterator[tuple[Branch, ...]]:
    """Branches of one sum together; sums are numbered from 1."""
    for sum_, same in itertools.groupby(branches, key=lambda b: b.sum):
        own = tuple(same)
        yield from [own] if sum_ else [(b,) for b in own]


def units(items: Iterable[Item]) -> list[tuple[Item, ...]]:
    """Items, the branches of one sum together."""
    found: list[tuple[Item, ...]] = []
    for item in items:
        before = found[-1][-1].branch if found else None
        if item.branch is not None and before is not None and item.branch.sum and item.branch.sum == before.sum:
            found[-1] += (item,)
        else:
            found.append((item,))
    return found


def columns(same: Sequence[Sequence[Item]], keys: Sequence[Hashable]) -> list[tuple[Item, ...]]:
    """The branches of equal sums, those together that have one key."""
    runs = fold(keys, longest=1)
    return [tuple(unit[k] for unit in same for k in range(run.start, run.stop)) for run in runs]


def by_path(structure: Structure) -> dict[str, LayerInfo]:
    """Weight layers in trace order; the first use of a shared one."""
    layers: dict[str, LayerInfo] = {}
    for layer in structure.layers:
        layers.setdefault(layer.path, layer)
    return layers


def _layer_key(layer: LayerInfo) -> Hashable:
    return layer.kind, layer.fan_in, layer.fan_out, layer.repeats, _arms_key(layer.arms)


def _arms_key(arms: Sequence[Arm]) -> Hashable:
    return tuple((a.index, a.count) for a in arms)


def _branch_key(b: Branch, layers: dict[str, LayerInfo]) -> Hashable:
    return (
        tuple((_layer_key(layers[q]), b.roles.get(q)) for q in b.weights),
        tuple(_layer_key(layers[q]) for q in b.skip_weights),
        (b.depth, b.order, b.order_without_norms, b.skip, b.repeats, b.norms, _arms_key(b.arms)),
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


Within = Mapping[frozenset[str], Sequence[Item]]


def within(items: Iterable[Item]) -> Within:
    """Branches within branches, by the weights of the outer one: their weights are some of its weights, not all."""
    found = [i for i in items if i.branch is not None]
    users: dict[str, list[tuple[int, Item]]] = {}
    for k, item in enumerate(found):
        for path in set(item.paths):
            users.setdefault(path, []).append((k, item))
    result: dict[frozenset[str], list[Item]] = {}
    for item in found:
        mine = frozenset(item.paths)
        others = dict(o for path in mine for o in users[path])
        inner = [o for _, o in sorted(others.items(), key=lambda f: f[0]) if frozenset(o.paths) < mine]
        if inner:
            result[mine] = inner
    return result


def covered(item: Item, inner: Within) -> set[str]:
    """The weights of a branch that belong to branches within it."""
    return {q for other in inner.get(frozenset(item.paths), ()) for q in other.paths}


def within_words(items: Sequence[Item], inner: Within, run: Run) -> str:
    """`branches 1–3, 5–7`: the branches within equal ones, in whose weights they are `run`."""
    spans = []
    for item in items:
        weights = set(item.paths[run.start : run.stop])
        spans.append(_spans(w for w in inner[frozenset(item.paths)] if weights.intersection(w.paths)))
    texts = [", ".join(map(_span, own)) if len(own) < 3 else f"{_span(own[0])} … {_span(own[-1])}" for own in spans]
    texts = list(dict.fromkeys(texts))
    words = ", ".join(texts[:2]) + (f" … {texts[-1]}" if len(texts) > 2 else "")
    return f"branch{'' if words.isdigit() else 'es'} {words}"


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Weights of a branch in a row: those of branches within it, or own ones, in an arm of a conditional maybe."""

    runs: tuple[Run, ...]
    inside: bool
    arms: tuple[Arm, ...]


def stretches(
    item: Item, layers: Mapping[str, LayerInfo], inner: Within, keys: Callable[[str], Hashable] = lambda path: None
) -> list[Stretch]:
    """The weights of a branch, folded; those of branches within it are one run."""
    b = item.branch
    assert b is not None
    hidden, arms = covered(item, inner), inner_arms(b, layers)
    found = []
    shown = itertools.groupby(range(len(b.weights)), lambda k: (b.weights[k] in hidden, arms.get(b.weights[k], ())))
    for (inside, around), group in shown:
        own = list(group)
        part = dataclasses.replace(b, weights=b.weights[own[0] : own[-1] + 1])
        runs = [Run(0, len(own), 1)] if inside else layer_runs(part, layers, keys)
        found.append(Stretch(tuple(dataclasses.replace(r, start=r.start + own[0]) for r in runs), inside, around))
    return found


def inner_arms(b: Branch, layers: Mapping[str, LayerInfo]) -> dict[str, tuple[Arm, ...]]:
    """For the weights in conditionals within a branch: in which arms they are."""
    around = {a.switch for a in b.arms}
    return {q: tuple(a for a in layers[q].arms if a.switch not in around) for own in b.alternatives for q in own}


def arms_words(arms: Sequence[Sequence[Arm]], several: Sequence[int] = ()) -> str:
    """`arm 1 of 2 of a conditional`, of one thing or of equal ones; `several` are switches to tell apart by number."""
    if not arms or not arms[0]:
        return ""
    words = []
    for level in range(len(arms[0]) - 1, -1, -1):
        a = arms[0][level]
        switches = {own[level].switch for own in arms}
        of = "a conditional"
        if len(switches) > 1:
            of = f"{len(switches)} conditionals"
        elif len(several) > 1 and a.switch in several:
            of = f"conditional {list(several).index(a.switch) + 1}"
        words.append(f"arm {a.index + 1} of {a.count} of {of}")
    each = len(arms) > 1 and len({own[-1].switch for own in arms}) == len(arms)
    if each:
        words[0] = f"arm {arms[0][-1].index + 1} of {arms[0][-1].count} of a conditional each"
    return " in ".join(words)


def reading_words(undecided: Undecided, term: int) -> str:
    """What there is if a term is the skip: `the skip of 2 branches, order D = 0 and 1`."""
    if term >= len(undecided.readings):
        return ""
    found = undecided.readings[term]
    if not found:
        return "as the skip: no branch"
    orders = list(dict.fromkeys(number(b.order) for b in found))
    listed = " and ".join(filter(None, [", ".join(orders[:-1]), orders[-1]]))
    return f"as the skip: {len(found)} branch{'es' * (len(found) > 1)} of order {listed}"


def settle_words(names: Sequence[str]) -> str:
    """How to settle undecided sums."""
    return (
        f'{{"{names[0]}": 0}} makes term 0 the skip, None in its place says that it is no residual: '
        "Structure.settle(…), or for a plan fi.Fixup(undecided=…)"
    )


_REGIONS = {"while": "while loop", "pallas_call": "Pallas kernel", "custom_linear_solve": "linear solver"}


def region_words(region: Region) -> str:
    return _REGIONS.get(region.primitive, region.primitive)


def unruled_words(structure: Structure) -> str:
    """Operations without a rule for orders; '' where there are none."""
    if not structure.unruled:
        return ""
    return f"no rule for the order of {', '.join(structure.unruled)}: taken to keep that of what it takes"


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
    """`branch 3`, `branches 3–20`, `branches 1, 3` or `branches 1, 3 … 95`."""
    if all(i.branch is None for i in items):
        return plural(len(items), "layer")
    spans = _spans(items)
    words = [_span(span) for span in spans]
    if len(words) > 2:
        words = [*words[:1], f"{words[1]} … {words[-1]}"]
    return f"branch{'' if spans[0][0] == spans[-1][1] else 'es'} {', '.join(words)}"


def _spans(items: Iterable[Item]) -> list[tuple[int, int]]:
    """The numbers of branches, neighbours joined."""
    spans: list[tuple[int, int]] = []
    for first, last in sorted((i.first, i.last) for i in items if i.branch is not None):
        if spans and first <= spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], max(spans[-1][1], last))
        else:
            spans.append((first, last))
    return spans


def _span(span: tuple[int, int]) -> str:
    return f"{span[0]}" if span[0] == span[1] else f"{span[0]}–{span[1]}"


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
