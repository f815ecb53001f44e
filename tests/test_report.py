"""Trees, tables, figures and pages: what they say, that nothing breaks them, and that a browser draws the page."""

import csv
import dataclasses
import functools
import html as markup
import itertools
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import fixup_init as fi
from fixup_init.extras import require
from fixup_init.models.resnet import cifar_resnet, imagenet_resnet
from fixup_init.predict import predict
from fixup_init.propagation import Comparison, Propagation, Row, Statistics, Weight
from fixup_init.report.drawing import lay_out
from fixup_init.report.figure import figure, save
from fixup_init.report.html import TrainingRun, html, structure_html, write
from fixup_init.report.layout import fold, line, merged, number, pairs, positions, selection, words
from fixup_init.report.picture import Box, Node, Text
from fixup_init.report.svg import svg
from fixup_init.report.table import records, to_csv
from fixup_init.report.tensorboard import to_tensorboard
from fixup_init.report.text import comparison_table, propagation_table
from fixup_init.report.tree import plan_table, rich_tree, tree
from fixup_init.structure import Undecided
from fixup_init.verdicts import verdicts

ZERO, BAD = Statistics(0.0, 0.0, 0.0), Statistics(math.nan, math.nan, math.nan, 0.7)
X = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)


def propagation(label, blocks, growth=1.0, back=1.0, overflow=None, dead=0, zero_branches=False, scope="Net"):
    """A made-up network: the second moment grows by `growth` a block, that of the cotangent by `back`."""

    def row(kind, name, block, forward, backward):
        return Row(kind, name, scope, block, (8, 4, 4, 16), "float32", None, forward, backward)

    rows = [row("input", "input/0", 0, Statistics(0.0, 1.0, 0.0), Statistics(0.0, back**blocks, 0.0))]
    for k in range(1, blocks + 1):
        bad = overflow is not None and k >= overflow
        forward = BAD if bad else Statistics(0.5 * growth ** (k / 2), 2 * growth**k, growth**k)
        backward = ZERO if k <= dead else Statistics(0.0, back ** (blocks - k), 0.0)
        rows += [
            row("weight", f"layer_{k}/conv/kernel", k - 1, forward, backward),
            row("nonlinearity", "relu", k - 1, forward, backward),
            row("branch", f"branch {k}", k - 1, ZERO if zero_branches else forward, backward),
            row("sum", f"sum {k}", k, forward, backward),
        ]
    rows.append(row("output", "output", blocks, rows[-1].forward, Statistics(0.0, 1.0, 0.0)))
    return Propagation(label, "Net", blocks, tuple(rows))


def comparison(blocks):
    return Comparison((
        propagation("batch norm", blocks, 1.01, 1.02),
        propagation("no normalization, He", blocks, 2.0, 2.0),
        propagation("Fixup", blocks, zero_branches=True),
        propagation("half precision", blocks, 1.9, 1.5, overflow=blocks // 3 + 1, dead=blocks // 4),
    ))  # fmt: skip


def detailed(blocks):
    """`comparison` with every statistic known, norms of weights, and without the run that overflows."""

    def filled(s, k):
        share = k / (4 * blocks + 2)
        return dataclasses.replace(
            s, zeros=0.5, saturated=0.125 * (k % 2), example_cosine=share - 0.2, effective_rank=10 - 9 * share,
            example_share=0.6 * (1 - share), channel_share=0.3, position_share=0.05,
        )  # fmt: skip

    def row(r, k):
        weight = Weight(2.0, r.backward.second_moment**0.5) if r.kind == "weight" else None
        return dataclasses.replace(r, forward=filled(r.forward, k), backward=filled(r.backward, k), weight=weight)

    def one(p):
        return dataclasses.replace(p, rows=tuple(row(r, k) for k, r in enumerate(p.rows)))

    return Comparison(tuple(one(p) for p in comparison(blocks).propagations[:3]))


APPROXIMATE, UNKNOWN = "approximate: examples are not independent <b>here</b>", "unknown: no rule for softmax"


def prediction(one, scale=1.25):
    """A made-up prediction of a propagation: larger by `scale`, not known from the last branch to the last sum."""

    def row(r, k):
        if k >= len(one) - 3 and r.kind != "output":
            return dataclasses.replace(r, forward=None, backward=None, weight=None, note=UNKNOWN)
        forward, backward = (
            Statistics(s.mean, s.second_moment * scale - s.mean**2, math.nan) for s in (r.forward, r.backward)
        )
        note = APPROXIMATE if k == 3 else ""
        return dataclasses.replace(r, forward=forward, backward=backward, weight=None, note=note)

    rows = tuple(row(r, k) for k, r in enumerate(one.rows))
    return dataclasses.replace(one, kind="predicted", rows=rows, notes=("Widths are taken as large.",))


def trainings():
    steps, losses = tuple(range(1, 41)), tuple(2.3 * 0.93**k for k in range(40))
    return [
        TrainingRun("Fixup", 0, steps, losses, (20, 40), (0.8, 0.90), 0.90, 1000.0),
        TrainingRun("Fixup", 1, steps, losses, (20, 40), (0.8, 0.91), 0.91, 1001.0),
        TrainingRun(
            "no normalization, He", 0, (1, 2), (9.5, math.inf), (), (), None, None, "the loss is inf in step 2"
        ),
    ]


# ---- folding and numbers


@pytest.mark.parametrize(
    "items, runs",
    [
        ("", []),
        ("a", [(0, 1, 1)]),
        ("abab" * 30 + "z", [(0, 2, 60), (120, 1, 1)]),
        ("aaab", [(0, 1, 3), (3, 1, 1)]),
        ("xaabaabaaby", [(0, 1, 1), (1, 3, 3), (10, 1, 1)]),
    ],
)
def test_fold(items, runs):
    assert [(r.start, r.period, r.count) for r in fold(items)] == runs


def test_fold_covers_everything_once():
    rng = __import__("random").Random(0)
    for _ in range(200):
        items = [rng.choice("abc") for _ in range(rng.randrange(30))]
        runs = fold(items)
        assert [k for r in runs for k in range(r.start, r.stop)] == list(range(len(items)))
        for r in runs:
            assert all(items[k] == items[r.start + (k - r.start) % r.period] for k in range(r.start, r.stop))


def test_merged_names():
    assert merged(["a_1/k", "a_10/k", "a_2/k"]) == "a_{1,2..10}/k"
    assert merged([f"a_{k}/k" for k in (8, 10, 9)]) == "a_{8..10}/k"
    assert merged(["net/w", "net/b"]) == "net/w … b"
    assert merged(["same"]) == "same"
    assert number(math.inf) == "∞" and number(1.5e-8) == "1.5e-8" and number(2.36e49) == "2.36e49"


# ---- structure and plan


class Mlp(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(8)(x))
        return x


class Decoder(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(10, 8)(tokens)
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x))


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x) + nn.Dense(4)(x)


def test_tree_of_a_resnet():
    assert tree(fi.structure(cifar_resnet(20, norm="batch"), X), 80).splitlines() == [
        "ResNet  L = 9 residual branches, 20 weight layers",
        "├── stem  conv1/kernel  conv 27→144",
        "├── branches 1–3  layer1_{0..2} x 3",
        "│   conv1 conv 144→144; conv2 conv 144→144",
        "│   depth 2, order D = 0 (2 without norms), identity skip, 2 norms",
        "├── branch 4  layer2_0",
        "│   conv1 conv 144→288; conv2 conv 288→288",
        "│   depth 2, order D = 0 (2 without norms), reshape skip, 2 norms",
        "├── branches 5–6  layer2_{1..2} x 2",
        "│   conv1 conv 288→288; conv2 conv 288→288",
        "│   depth 2, order D = 0 (2 without norms), identity skip, 2 norms",
        "├── branch 7  layer3_0",
        "│   conv1 conv 288→576; conv2 conv 576→576",
        "│   depth 2, order D = 0 (2 without norms), reshape skip, 2 norms",
        "├── branches 8–9  layer3_{1..2} x 2",
        "│   conv1 conv 576→576; conv2 conv 576→576",
        "│   depth 2, order D = 0 (2 without norms), identity skip, 2 norms",
        "├── head  fc/kernel  dense 64→10",
        "└── norms  19 (statistics over axes 0, 1, 2 of the batch; with scale and bias)",
    ]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "model, x",
    [
        (Mlp(4), jax.ShapeDtypeStruct((2, 8), jnp.float32)),
        (Mlp(300), jax.ShapeDtypeStruct((2, 8), jnp.float32)),
        (cifar_resnet(302, norm="fixup"), X),
        (Decoder(40), jax.ShapeDtypeStruct((2, 5), jnp.int32)),
    ],
    ids=["mlp4", "mlp300", "resnet302", "decoder40"],
)
def test_trees_and_plans_fit_a_screen(model, x, width):
    text = tree(fi.structure(model, x), width)
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= width
    plan = plan_table(fi.plan(model, x, scheme="he_normal"), width)
    assert len(plan.splitlines()) <= 90 and max(map(len, plan.splitlines())) <= width
    assert "\x1b" not in text + plan


def test_alternating_branches_are_folded_together():
    text = tree(fi.structure(Decoder(40), jax.ShapeDtypeStruct((2, 5), jnp.int32)), 100)
    assert "40 times  branches 1–80" in text and "branches 1, 3 … 79" in text and "branches 2, 4 … 80" in text
    assert "query dense 8→8, control" in text


def test_two_branches_are_both_named():
    text = tree(fi.structure(Decoder(2), jax.ShapeDtypeStruct((2, 5), jnp.int32)), 100)
    assert "branches 1, 3 " in text and "branches 2, 4 " in text and "…" not in text


def test_parallel_branches_are_below_their_sum():
    text = tree(pictured("parallel")[0], 100)
    assert "branches 1–4 x 2  2 parallel branches of one sum each" in text
    assert "branches 1, 3 " in text and "branches 2, 4 x 2" in text
    text = tree(pictured("paths")[0], 100)
    assert "branches 1–5 x 5  5 parallel branches of one sum" in text


def test_arms_are_said():
    structure, _ = pictured("arms")
    assert structure.num_branches == 9 and len(structure.branches) == 15
    text = tree(structure, 100)
    assert "branches 1, 4 … 7  blocks/{0..2}/one x 3  arm 1 of 3 of a conditional each" in text
    assert "branches 2, 5 … 8  blocks/{0..2}/two/1 x 3  arm 2 of 3" in text
    assert "plain x 3  dense 8→8  arm 3 of 3" in text
    # The last number is L: every arm begins with the same number.
    assert "branches 3, 6 … 9  blocks/{0..2}/after x 3" in text and "branches 1–9" in text
    text = tree(pictured("experts")[0], 100)
    assert "arm 1 of 3 of a conditional: 0/0 dense" in text and "arm 2 of 3 of a conditional: 1 dense" in text
    assert "arm 3 of 3 of a conditional: 2/{0..2} dense 8→8 x 3" in text


def test_regions_are_named():
    text = tree(pictured("loop")[0], 100)
    assert "not entered  while loop in scope Loop, takes solve, inject" in text
    assert "no rule for the order of while" in text


def test_what_is_undecided_is_said():
    structure = fi.structure(Two(), jax.ShapeDtypeStruct((2, 8), jnp.float32))
    text = tree(structure, 100)
    assert "undecided head  output 0: 2 weight layers feed the output" in text
    assert "Dense_0/kernel" in text and "no residual branches" in text
    structure, _ = pictured("open")
    text = tree(structure, 100)
    assert "undecided sum {1..3} x 3  Open: several terms without weights could be the skip" in text
    assert "term 0  no weight layers; as the skip: 2 branches of order 0 and 1" in text
    assert "term 2  g_{0..2}/kernel; as the skip: 2 branches of order 0" in text and '{"sum 1": 0}' in text
    settled = tree(structure.settle({"sum 1": 0, "sum 2": 0, "sum 3": None}), 100)
    assert "undecided" not in settled and "L = 7" in settled and "2 parallel branches of one sum" in settled


def test_colours_only_where_a_terminal_asks(monkeypatch):
    from rich.console import Console

    monkeypatch.setenv("FORCE_COLOR", "1")
    structure = fi.structure(cifar_resnet(20, norm="fixup"), X)
    assert "\x1b" not in str(structure) + str(fi.plan(cifar_resnet(20, norm="fixup"), X)) + str(comparison(5))
    console = Console(force_terminal=True, color_system="standard", width=100)
    with console.capture() as capture:
        console.print(rich_tree(structure))
    assert "\x1b[" in capture.get()


def test_names_are_no_markup():
    rows = tuple(propagation("[bold]x[/bold] [/]", 2))
    text = propagation_table(Propagation("[bold]x[/bold] [/]", "N", 2, rows), width=100)
    assert "[bold]x[/bold] [/]" in text


def test_plan_of_resnet_110_folds_to_stages():
    plan = fi.plan(cifar_resnet(110, norm="fixup"), X)
    text = plan_table(plan, 120)
    (row,) = [r for r in text.splitlines() if r.startswith("layer1_{0..17}/conv1/kernel")]
    assert row.split()[1:3] == ["18", "3×3×16×16"] and "branch {1..18} of 54, layer 1 of 2" in row
    edited = plan.override("layer1_3/conv1/kernel", std=0.5)
    assert "layer1_3/conv1/kernel" in plan_table(edited, 120) and "std 0.5" in plan_table(edited, 120)


def test_plan_notes_stand_below():
    plan = fi.plan(cifar_resnet(20, norm="fixup"), X)
    noted = type(plan)(plan.scheme, plan.num_branches, plan.entries, ("something [odd] was found",))
    assert plan_table(noted, 80).splitlines()[-1] == "Note: something [odd] was found"


# ---- the picture

SVG = "{http://www.w3.org/2000/svg}"


class Heads(nn.Module):
    """Two heads, and a layer that embeds a time."""

    @nn.compact
    def __call__(self, x, time):
        t = nn.Dense(16, name="time")(time)
        x = nn.Dense(16, name="stem")(x)
        for _ in range(3):
            x = x + nn.Dense(16)(nn.relu(nn.Dense(16)(x) + nn.Dense(16)(t)))
        return nn.Dense(10, name="classes")(x), nn.Dense(4, name="boxes")(x)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    """Two stacks of blocks, each a scan."""

    @nn.compact
    def __call__(self, x):
        for k in range(2):
            stack = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=12)
            x, _ = stack(name=f"stack_{k}")(x, None)
        return nn.Dense(3, name="head")(x)


class Deep(nn.Module):
    """Branches of many equal layers."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            y = x
            for _ in range(9):
                y = nn.Dense(8)(nn.relu(y))
            x = x + y
        return x


class Long(nn.Module):
    """Names that no box has room for."""

    @nn.compact
    def __call__(self, x):
        name = "ein_sehr_langer_Name_" * 6
        return x + nn.Dense(8, name=f"{name}b")(nn.relu(nn.Dense(8, name=name + "語" * 20)(x)))


class Parallel(nn.Module):
    """Attention and a perceptron beside each other."""

    @nn.compact
    def __call__(self, x):
        for k in range(2):
            y = nn.LayerNorm()(x)
            up, down = nn.Dense(16, name=f"up_{k}"), nn.Dense(8, name=f"down_{k}")
            x = x + nn.MultiHeadDotProductAttention(2, name=f"attention_{k}")(y) + down(nn.gelu(up(y)))
        return nn.Dense(3, name="head")(x)


class Paths(nn.Module):
    """Equal branches of one sum."""

    @nn.compact
    def __call__(self, x):
        return x + sum(nn.Dense(8)(nn.relu(nn.Dense(4)(x))) for _ in range(5))


class Open(nn.Module):
    """Sums that could be read in several ways."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="stem")(x)
        for k in range(3):
            x = x + nn.Dense(8, name=f"f_{k}")(nn.relu(x))
            x = x.mean(-1, keepdims=True) + x.max(-1, keepdims=True) + nn.Dense(8, name=f"g_{k}")(x)
        return nn.Dense(3, name="head")(x)


class Loop(nn.Module):
    """A while loop with weights."""

    @nn.compact
    def __call__(self, x):
        solve, inject = (self.param(n, nn.initializers.lecun_normal(), (8, 8)) for n in ("solve", "inject"))
        x = x + nn.Dense(8)(nn.relu(nn.Dense(16)(x)))
        x = x + jax.lax.while_loop(lambda z: jnp.sum(z) < 9, lambda z: jnp.tanh(z @ solve + x @ inject), x)
        return nn.Dense(3, name="head")(x)


def shaped(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def residual(weights):
    return lambda x: x + jax.nn.relu(x @ weights[0]) @ weights[1]


def arms():
    """A switch between one residual, two, and a layer with a residual that may be left out."""

    def apply(params, x, choice):
        for block in params["blocks"]:

            def two(x, block=block):
                return residual(block["two"][1])(residual(block["two"][0])(x))

            def maybe(x, block=block):
                return jax.lax.cond(choice > 5, residual(block["deep"]), lambda x: x, x @ block["plain"])

            x = residual(block["after"])(jax.lax.switch(choice, [residual(block["one"]), two, maybe], x))
        return x @ params["head"]

    pair = (shaped(8, 16), shaped(16, 8))
    block = {"one": pair, "two": [pair, pair], "plain": shaped(8, 8), "deep": pair, "after": pair}
    return fi.Function(apply, {"blocks": [block] * 3, "head": shaped(8, 3)})


def experts():
    """x + one of three experts, of different depth."""

    def apply(params, x, choice):
        for a, b, c in params["blocks"]:
            two = lambda x, w=a: jax.nn.relu(x @ w[0]) @ w[1]  # noqa: E731
            one = lambda x, w=b: jnp.tanh(x @ w)  # noqa: E731
            gated = lambda x, w=c: (jax.nn.silu(x @ w[0]) * (x @ w[1])) @ w[2]  # noqa: E731
            x = x + jax.lax.switch(choice, [two, one, gated], x)
        return x @ params["head"]

    w = shaped(8, 8)
    return fi.Function(apply, {"blocks": [((w, w), w, (w, w, w)) for _ in range(2)], "head": w})


CHOICE = jax.ShapeDtypeStruct((), jnp.int32)
ROW = jax.ShapeDtypeStruct((2, 8), jnp.float32)
PICTURED = {
    "mlp4": lambda: (Mlp(4), ROW),
    "mlp300": lambda: (Mlp(300), ROW),
    "resnet20": lambda: (cifar_resnet(20, norm="batch"), X),
    "resnet50": lambda: (imagenet_resnet(50, norm="fixup"), jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)),
    "resnet302": lambda: (cifar_resnet(302, norm="fixup"), X),
    "decoder40": lambda: (Decoder(40), jax.ShapeDtypeStruct((2, 5), jnp.int32)),
    "heads": lambda: (Heads(), ROW, ROW),
    "scanned": lambda: (Scanned(), jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)),
    "deep": lambda: (Deep(), ROW),
    "long": lambda: (Long(), ROW),
    "two": lambda: (Two(), ROW),
    "parallel": lambda: (Parallel(), shaped(2, 5, 8)),
    "paths": lambda: (Paths(), ROW),
    "open": lambda: (Open(), shaped(2, 5, 8)),
    "loop": lambda: (Loop(), ROW),
    "arms": lambda: (arms(), ROW, CHOICE),
    "experts": lambda: (experts(), ROW, CHOICE),
}


@functools.cache
def pictured(name):
    model, *inputs = PICTURED[name]()
    structure = fi.structure(model, *inputs)
    return structure, fi.plan(model, *inputs, scheme=fi.Fixup(head=None, undecided="ignore"))


def texts_of(mark):
    return mark.texts if isinstance(mark, Box) else (mark,) if isinstance(mark, Text) else ()


def words_of(picture):
    return [("".join(t for t, _ in text.parts)) for mark in picture.marks for text in texts_of(mark)]


def kinds_of(picture):
    return Counter(mark.kind for mark in picture.marks if not isinstance(mark, Text))


def titles_of(picture):
    return [mark.title for mark in picture.marks if isinstance(mark, Box | Node) and mark.title]


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", PICTURED)
def test_a_picture_shows_every_layer(name, planned):
    structure, plan = pictured(name)
    picture = lay_out(structure, plan if planned else None)
    said = titles_of(picture)
    layers = {x.path for x in structure.layers}
    folded = {q for q in layers if not any(q in title for title in said)}
    assert all(re.search(r"\d", q) for q in folded)  # only numbers are folded
    # What is in no title was folded into one: each of these stands for as many layers as it says.
    counted = sum(int(n) for title in said for n in re.findall(r" \((\d+) layers\)", title.splitlines()[0]))
    alone = sum(title.splitlines()[0] in layers for title in said)
    terms = {q for u in structure.undecided for term in u.terms for q in term}
    assert counted + alone == len(layers - terms) and len(folded - terms) <= counted
    assert picture.width <= 900 and picture.height < 2400


@pytest.mark.parametrize("name", PICTURED)
def test_a_picture_is_xml_that_stands_alone(name):
    structure, plan = pictured(name)
    text = svg(structure, plan)
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg" and root.get("role") == "img" and structure.name in root.get("aria-label")
    assert "id=" not in text and not re.search(r"href|url\(|@import|<script", text)
    assert len(text.encode()) < 40_000
    assert structure._repr_html_() == svg(structure)


@functools.cache
def font(name):
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    return FT2Font(f"{get_data_path()}/fonts/ttf/{name}.ttf")


def measured(text):
    """The width of a text in DejaVu, of which no character is narrower than in the usual fonts."""
    from matplotlib.ft2font import LoadFlags

    width = 0.0
    for part, style in text.parts:
        face = font({"m": "DejaVuSansMono"}.get(style, "DejaVuSans-Bold" if style in {"b", "t", "n"} else "DejaVuSans"))
        face.set_size({"q": 11.5, "m": 12, "t": 17, "s": 9, "n": 15}.get(style, 12.5), 72)
        width += sum(face.load_char(ord(c), flags=LoadFlags.NO_HINTING).linearHoriAdvance for c in part) / 65536
    return width


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("name", [n for n in PICTURED if n != "long"])
def test_texts_fit_their_boxes(name, planned):
    structure, plan = pictured(name)
    structure = dataclasses.replace(structure, name=structure.name * 40, unruled=("a_long_name_of_an_operation",) * 40)
    picture = lay_out(structure, plan if planned else None)
    for mark in picture.marks:
        left, right = (mark.x, mark.x + mark.width) if isinstance(mark, Box) else (0, picture.width)
        for text in texts_of(mark):
            width = measured(text)
            start = text.x - width * {"start": 0, "middle": 0.5, "end": 1}[text.anchor]
            assert width <= text.room and left <= start and start + width <= right, text
        rows = Counter(text.y for text in texts_of(mark) if text.anchor == "start")
        for y in rows:  # side by side
            row = sorted((t for t in texts_of(mark) if t.y == y), key=lambda t: t.x)
            assert all(a.x + measured(a) <= b.x for a, b in itertools.pairwise(row))


def test_repeats_are_bracketed():
    words = words_of(lay_out(pictured("resnet302")[0]))
    assert [w for w in words if w.startswith("× ")] == ["× 50", "× 49", "× 49"]
    assert [w.split("  ")[0] for w in words if w.startswith("branch")] == [
        "branches 1–50", "branch 51", "branches 52–100", "branch 101", "branches 102–150",
    ]  # fmt: skip
    words = words_of(lay_out(pictured("scanned")[0]))
    assert [w for w in words if w in ("× 2", "× 12", "scan")] == ["× 2", "× 12", "scan"]
    assert "× 9" in words_of(lay_out(pictured("deep")[0]))  # within a branch
    # What a plan draws in other ways is drawn apart.
    assert "× 8" in words_of(lay_out(*pictured("deep"))) and "zero" in words_of(lay_out(*pictured("deep")))
    structure, plan = pictured("resnet302")
    words = words_of(lay_out(structure, plan.override("layer1_3/conv1/kernel", std=0.5)))
    assert [w for w in words if w.startswith("× ")] == ["× 3", "× 46", "× 49", "× 49"] and "std 0.5" in words


def test_roles_skips_and_heads_are_marked():
    picture = lay_out(*pictured("decoder40"))
    kinds = kinds_of(picture)
    assert kinds["layer control"] == 2 and kinds["layer value"] == 4 and kinds["sum"] == 2
    assert "query  control" in words_of(picture)
    picture = lay_out(*pictured("resnet50"))
    kinds = kinds_of(picture)
    assert kinds["layer shortcut"] == 4 and kinds["product"] == kinds["sum"] == 8
    assert any("layer2_0/downsample/kernel" in title and "shortcut" in title for title in titles_of(picture))
    assert "std 0.0884 = He × L−1/4" in words_of(picture) and words_of(picture).count("zero") == 8
    assert kinds_of(lay_out(pictured("resnet20")[0]))["pill"] == 2
    assert "order D = 0 (2 without norms)" in " ".join(words_of(lay_out(pictured("resnet20")[0])))
    picture = lay_out(pictured("heads")[0])
    assert words_of(picture).count("head") == 2 and "output" not in words_of(picture)
    assert words_of(picture).count("beside") == 1 and "boxes/kernel" in words_of(picture)


class Nested(nn.Module):
    """Branches around branches."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            y = x
            for _ in range(3):
                y = y + nn.Dense(8)(nn.relu(nn.Dense(16)(y)))
            x = x + nn.Dense(8)(y)
        return x


def test_a_branch_within_a_branch_is_drawn_once():
    structure = fi.structure(Nested(), ROW)
    assert [len(b.weights) for b in structure.branches] == [2, 2, 2, 7] * 2
    picture = lay_out(structure)
    kinds = kinds_of(picture)
    # Three branches of two layers, then one around them with a layer of its own.
    assert kinds["layer value"] == 7 and kinds["layer other"] == 1 and kinds["sum"] == 4
    assert any(w.startswith("branches 1–3, 5–7  drawn by themselves") for w in words_of(picture))
    assert "within it branches 1–3" in tree(structure, 100) and tree(structure, 100).count("within it") == 1


def test_a_role_that_is_not_known_is_shown():
    structure, _ = pictured("decoder40")
    b = structure.branches[0]
    odd = dataclasses.replace(b, roles={q: "odd" for q in b.roles})
    picture = lay_out(dataclasses.replace(structure, branches=(odd, *structure.branches[1:])))
    assert {"odd", "query … out  odd"} <= set(words_of(picture))
    assert any(title.startswith("MultiHeadDotProductAttention_0/query/kernel, ") for title in titles_of(picture))


def test_what_is_undecided_stands_in_the_picture():
    structure, _ = pictured("two")
    picture = lay_out(structure)
    assert [m.kind for m in picture.marks if isinstance(m, Node)] == ["undecided"]
    words = " ".join(words_of(picture))
    assert "undecided head  output 0 2 weight layers feed the output" in words and "Dense_1/kernel" in words
    structure, _ = pictured("mlp300")
    paths = [x.path for x in structure.layers]
    open_ = tuple(Undecided("sum", f"Mlp/{k}", ((paths[k],), (paths[k + 1],)), "why") for k in range(100, 200, 2))
    picture = lay_out(dataclasses.replace(structure, undecided=open_))
    assert [m.kind for m in picture.marks if isinstance(m, Node)] == ["undecided"]
    assert [w for w in words_of(picture) if w.startswith("× ")] == ["× 99", "× 50", "× 99"]


def test_what_is_settled_here_is_named_in_the_picture():
    picture = lay_out(pictured("open")[0])
    words = " ".join(words_of(picture))
    assert "undecided sum {1..3}" in words and "as the skip: 2 branches of order 0 and 1" in words
    assert '{"sum 1": 0}' in words


def test_parallel_branches_enter_one_sum():
    picture = lay_out(pictured("parallel")[0])
    kinds = kinds_of(picture)
    assert kinds["sum"] == kinds["dot"] == 1 and kinds["branch"] == 2
    assert "sum of branches 1–4; identity skip" in titles_of(picture) and "× 2" in words_of(picture)
    picture = lay_out(pictured("paths")[0])
    assert kinds_of(picture)["branch"] == 1 and "branches 1–5  5 in parallel" in words_of(picture)


def test_arms_are_framed():
    picture = lay_out(pictured("arms")[0])
    frames = [m for m in picture.marks if isinstance(m, Box) and m.kind == "arm"]
    assert len(frames) == 4 and "arm 3 of 3 of a conditional  one of its arms runs" in words_of(picture)
    inner = min(frames, key=lambda m: m.width)
    assert any(m.x < inner.x and m.y < inner.y and m.y + m.height > inner.y + inner.height for m in frames)
    boxes = [m for m in picture.marks if isinstance(m, Box) and m.kind == "branch"]
    held = [b for b in boxes for m in frames if m.y < b.y and m.y + m.height > b.y + b.height]
    assert len(boxes) == 5 and len({id(b) for b in held}) == 4
    picture = lay_out(pictured("experts")[0])
    assert kinds_of(picture)["arm"] == 3 and kinds_of(picture)["branch"] == 1


def test_regions_are_listed_in_the_picture():
    words = words_of(lay_out(pictured("loop")[0]))
    assert "while loop in Loop  takes solve, inject" in words
    assert any(w.startswith("No rule for the order of while") for w in words)


def test_names_are_no_markup_in_a_picture():
    structure, plan = pictured("resnet20")
    structure = dataclasses.replace(structure, name="</svg><script>&\x00\ud800")
    root = ET.fromstring(svg(structure, plan))
    assert "".join(root.find(f"{SVG}text").itertext()) == "</svg><script>&\ufffd\ufffd"


# ---- propagation tables


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("blocks", [1, 4, 27, 300])
def test_tables_fit(blocks, width):
    for text in (
        comparison_table(comparison(blocks), width),
        *(propagation_table(p, width=width) for p in comparison(blocks)),
    ):
        assert max(map(len, text.splitlines())) <= width and len(text.splitlines()) < 90, text
        assert "nan" not in text and "\x1b" not in text


def test_every_row_on_request():
    one = propagation("x", 100)
    folded, whole = propagation_table(one, width=100), propagation_table(one, all_rows=True, width=100)
    assert "all_rows=True" in folded and "all_rows" not in whole
    assert all(r.name in whole for r in one) and len(selection(one, 24)) <= 24
    assert [r.name for r in selection(one, 24)][:2] == ["input/0", "sum 1"]


def test_tables_say_what_overflows_and_dies():
    one = propagation("x", 100, 1.9, 1.5, overflow=35, dead=20)
    text = propagation_table(one, width=120)
    assert re.search(r"sum 35 .*70% finite", text) and re.search(r"sum 20 .* 0\n", text)
    assert "overflows at sum 35" in text and "zero from sum 20 on" in " ".join(text.split())
    table = comparison_table(Comparison((one,)), 80)
    assert "overflow\n" in table and "overflows at sum 35" in table


def test_words():
    four = comparison(27)
    assert [words(p, p.drift()) for p in four] == [
        "flat, ×1.01 a block", "grows ×2 a block", "flat, ×1 a block", "overflows at sum 10",
    ]  # fmt: skip
    unmeasured = Propagation("x", "N", 0, tuple(Row(**{**r.__dict__, "backward": None}) for r in four.propagations[0]))
    assert words(unmeasured, unmeasured.drift("backward")) == "not measured"
    assert "E[g" not in propagation_table(unmeasured, width=120)


def test_positions():
    one = propagation("x", 2)
    assert [(r.kind, round(x, 2)) for r, x in zip(one, positions(one), strict=True)][:6] == [
        ("input", 0.2), ("weight", 0.4), ("nonlinearity", 0.6), ("branch", 0.8), ("sum", 1.0), ("weight", 1.25),
    ]  # fmt: skip
    drawn = line(propagation("x", 9, overflow=5, dead=2), "backward")
    assert drawn.zeros == (1, 2) and math.isnan(drawn.y[0]) and drawn.where == "sum 2"
    assert line(propagation("x", 9, overflow=5), "forward").overflows == (5, 6, 7, 8, 9)


def test_pairs():
    three = detailed(4)
    fixup = prediction(three["Fixup"])
    found = pairs(three, [fixup])
    assert [(p.own.label, p.predicted is fixup) for p in found] == [
        ("batch norm", False), ("no normalization, He", False), ("Fixup", True),
    ]  # fmt: skip
    assert pairs(Comparison((fixup, *three)))[2].predicted is fixup
    # A lone one needs no label; another label among several, and other rows, stand alone.
    renamed = dataclasses.replace(fixup, label="theory")
    assert pairs(three["Fixup"], renamed)[0].predicted is renamed
    assert [p.own.label for p in pairs(three, renamed)][3:] == ["theory"]
    assert pairs(three, dataclasses.replace(fixup, label="Fixup, predicted"))[2].predicted is not None
    other = pairs(three["Fixup"], dataclasses.replace(fixup, probe="input of the head"))[0]
    assert found[2].notes == ["Prediction: Widths are taken as large."]
    assert other.notes[1].startswith("The measured gradients start at the output, the predicted ones at the input of")
    short = dataclasses.replace(fixup, rows=fixup.rows[1:])
    assert [p.predicted for p in pairs(three["Fixup"], short)] == [None, None]


@pytest.mark.parametrize("width", [80, 100, 140, 200])
@pytest.mark.parametrize("blocks", [4, 300])
def test_tables_with_predictions_fit(blocks, width):
    three = detailed(blocks)
    predictions = [prediction(p) for p in three]
    for one, theory in zip(three, predictions, strict=True):
        text = propagation_table(one, width=width, predicted=theory)
        assert max(map(len, text.splitlines())) <= width and "nan" not in text and "…" not in text
        heads = next(part for part in text.splitlines() if part.startswith("block")).split()
        assert heads.count("predicted") == 2 and heads[heads.index("predicted") - 1] == "E[x²]"
        assert ("variance" in heads) >= ("kind" in heads) == (width == 200)
        assert ("mean² share   cosine" in text) == (width > 80)
        assert f"{UNKNOWN} (2 rows, branch {blocks} to sum {blocks})" in " ".join(text.split())
    text = comparison_table(three, width, predictions)
    assert max(map(len, text.splitlines())) <= width
    assert sum(part.count("predicted") for part in text.splitlines() if part.startswith("block")) == 6


def test_what_was_not_measured_is_named():
    one = dataclasses.replace(propagation("x", 2), unmeasured=tuple(f"layer_{k}" for k in range(6)), notes=("A note.",))
    words = "which runs as a whole: layer_0, layer_1, layer_2, layer_3 and 2 more."
    for text in (propagation_table(one, width=200), html(one, title="t")):
        assert words in text and "A note." in text


def test_numbers_of_predictions_stand_beside_the_measured():
    one = detailed(4)["no normalization, He"]
    text = propagation_table(one, width=100, predicted=prediction(one, 2.0))
    assert re.search(r" 2   sum 2 +9 +18 ", text) and re.search(r" 4   sum 4 +36 +44%", text)
    assert "examples 33%" in propagation_table(one, width=100) and "examples 33%" not in text
    assert "Widths are taken as large." in text and APPROXIMATE in text
    alone = propagation_table(prediction(one, 2.0), width=100)
    assert "18 rows; predicted" in alone and "probe" not in alone
    table = comparison_table(Comparison((one,)), 80, prediction(one, 2.0))
    assert re.search(r"^ +2 +9 +18$", table, re.M) and re.search(r"^ +4 +36$", table, re.M)


def test_verdicts_stand_on_top():
    one = detailed(27)["no normalization, He"]
    text = propagation_table(one, width=100)
    found = verdicts(one)
    (worst,) = [v for v in found if v.kind == "growth" and v.direction == "forward"]
    first = text[: text.index("\nblock ")]
    assert f"▲ warning  {worst.text[:60]}" in first and " ".join(worst.advice.split()[:8]) in first
    table = comparison_table(detailed(27), 100)
    assert table.startswith("no normalization, He:\n▲ warning  The signal explodes")
    assert worst.advice[:30] not in table
    assert f"and {len(verdicts(comparison(300).propagations[1])) - 2} more;" in comparison_table(comparison(300), 100)


# ---- records, files for others


def test_records():
    three = detailed(4)
    theory = prediction(three["Fixup"])
    found = records(Comparison((*three, theory)))
    assert len(found) == 4 * 18 and len({tuple(r) for r in found}) == 1
    row, own = found[20], three.propagations[1].rows[2]
    assert (row["label"], row["source"], row["index"], row["name"]) == ("no normalization, He", "measured", 2, "relu")
    row, own = found[19], three.propagations[1].rows[1]
    assert row["forward_variance"] == own.forward.variance and row["backward_zeros"] == 0.5 and row["block"] == 0
    assert row["forward_second_moment"] == own.forward.second_moment and row["shape"] == "8×4×4×16"
    assert row["weight_ratio"] == own.weight.ratio and row["weight_parameter_norm"] == 2.0
    assert found[-2]["source"] == "predicted" and found[-2]["note"] == UNKNOWN
    assert math.isnan(found[-2]["forward_mean"]) and math.isnan(found[18]["weight_ratio"])
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(found)
    assert frame.shape == (72, len(row)) and frame["forward_variance"].dtype == float
    assert frame[frame.kind == "sum"].groupby("label")["forward_second_moment"].last()["no normalization, He"] == 36


def test_csv(tmp_path):
    one = detailed(2)["Fixup"]
    odd = dataclasses.replace(one, label='a, "b"\nc', rows=(dataclasses.replace(one.rows[0], name="語"), *one.rows[1:]))
    path = to_csv(odd, tmp_path / "new" / "rows.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(one) and {r["label"] for r in rows} == {odd.label} and rows[0]["name"] == "語"
    for read, record in zip(rows, records(odd), strict=True):
        for name, value in record.items():
            if isinstance(value, float):
                assert read[name] == "" if math.isnan(value) else float(read[name]) == value
            else:
                assert read[name] == ("" if value is None else str(value))
    with pytest.raises(UnicodeEncodeError):
        to_csv(dataclasses.replace(odd, label="\ud800"), path)
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"] and path.read_text("utf-8").count("語") == 1


def scalars(directory):
    """What TensorBoard would read: {tag: [(step, value)]}."""
    event = require("tensorboardX.proto.event_pb2", "tensorboard")
    found = {}
    for path in sorted(directory.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # records: length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            one = event.Event.FromString(data[at + 12 : at + 12 + length])
            for value in one.summary.value:
                found.setdefault(value.tag, []).append((one.step, value.simple_value))
            at += length + 16
    return found


def test_tensorboard(tmp_path, monkeypatch):
    three = detailed(3)
    he = three["no normalization, He"]
    logged = to_tensorboard(Comparison((*three, prediction(he))), tmp_path / "runs")
    names = sorted(p.name for p in logged.iterdir())
    assert names == ["Fixup", "batch_norm", "no_normalization_He", "no_normalization_He_predicted"]
    found = scalars(logged / "no_normalization_He")
    assert dict(found["forward/second_moment"]) == {1: 4.5, 2: 9, 3: 18}
    ratios = {k: r.weight.ratio for k, r in enumerate(he.select("weight"), 1)}
    assert dict(found["weight/ratio"]) == pytest.approx(ratios) and len(set(ratios.values())) == 3
    assert len(found) == 2 * 13 + 3
    # What is not known is left out.
    theory = scalars(logged / "no_normalization_He_predicted")
    assert [k for k, _ in theory["forward/variance"]] == [1, 2] and "forward/zeros" not in theory
    by_row = scalars(to_tensorboard(he, tmp_path / "rows", by="row") / "no_normalization_He")
    assert by_row["backward/mean"] == [(k, 0.0) for k in range(len(he))]
    same = to_tensorboard([he, he], tmp_path / "same")
    assert sorted(p.name for p in same.iterdir()) == ["no_normalization_He", "no_normalization_He_2"]
    with pytest.raises(ValueError, match="by='step': expected 'block' or 'row'"):
        to_tensorboard(he, tmp_path, by="step")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"`tensorboardX` is needed.*fixup_init\[tensorboard\]"):
        to_tensorboard(he, tmp_path)


# ---- figures


def test_a_prediction_alone():
    theory = prediction(detailed(4)["Fixup"])
    text = html(theory, title="t")
    assert "predicted from shapes and the plan" in text and "random probe" not in text and UNKNOWN in text
    (one,) = page_data(text)["propagations"]
    assert one["source"] == "predicted" and not one["paired"] and "zeros" not in one["forward"]
    drawn = figure(theory).axes[0]
    assert [x.get_linestyle() for x in drawn.lines] == ["--"] and drawn.get_legend().texts[
        0
    ].get_text() == "Fixup, predicted"


@pytest.mark.parametrize("blocks", [1, 300])
def test_predictions_are_dashed_and_shares_stacked(blocks, tmp_path):
    three = detailed(blocks)
    drawing = figure(three, predicted=[prediction(p) for p in three], channel_means=True, shares=True)
    assert len(drawing.axes) == 6
    forward = drawing.axes[0]
    labels = [t.get_text() for t in forward.get_legend().get_texts()]
    assert labels[1::2] == [f"{p.label}, predicted" for p in three] and len(labels) == 6
    lines = {x.get_label(): x for x in forward.lines if not x.get_label().startswith("_")}
    for own, theory in zip(labels[::2], labels[1::2], strict=True):
        assert lines[own].get_color() == lines[theory].get_color() and lines[own].get_linestyle() == "-"
        assert lines[theory].get_linestyle() == "--"
        assert len(lines[own].get_xdata()) == blocks and len(lines[theory].get_xdata()) == blocks - 1
        assert len(lines[own].get_markevery()) <= 40
    assert len({lines[x].get_marker() for x in labels[::2]}) == 3
    # Nothing is predicted of channel means, so nothing is drawn.
    assert len(drawing.axes[2].lines) == 3
    bands = drawing.axes[3].collections
    assert [b.get_label() for b in bands] == [
        "across examples", "across channels", "across positions", "in their combinations",
    ]  # fmt: skip
    assert bands[-1].get_paths()[0].vertices[:, 1].max() == pytest.approx(1)
    path = save(drawing, tmp_path / "all.png")
    assert path.stat().st_size < 400_000
    # No statistics of axes, no panels for them.
    assert len(figure(comparison(blocks), shares=True).axes) == 2


@pytest.mark.parametrize("blocks", [1, 4, 27, 163, 300])
def test_figure(blocks, tmp_path):
    drawing = figure(comparison(blocks), channel_means=blocks == 27)
    assert len(drawing.axes) == 2 + (blocks == 27)
    path = save(drawing, tmp_path / "new" / "drift.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000
    legend = [t.get_text() for t in drawing.axes[0].get_legend().get_texts()]
    if blocks > 4:
        assert "no normalization, He: grows ×2 a block" in legend
        assert "not finite" in [t.get_text() for t in drawing.axes[0].texts]
        assert "exactly 0" in [t.get_text() for t in drawing.axes[1].texts]
    assert "right to left" in drawing.axes[1].get_xlabel()


def test_a_lone_point_is_drawn():
    rows = propagation("x", 100, back=1.5, dead=99).rows
    (drawn,) = [x for x in figure(Propagation("x", "N", 100, rows)).axes[1].lines if x.get_label().startswith("x")]
    assert drawn.get_markevery() == [99]


def test_figure_formats(tmp_path):
    drawing = figure(comparison(4).propagations[0])
    assert b"<svg" in save(drawing, tmp_path / "a.svg").read_bytes()
    assert save(drawing, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match=r"\.jpg.*expected one of \.png, \.svg, \.pdf"):
        save(drawing, tmp_path / "a.jpg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pdf", "a.svg"]


def test_heavy_packages_are_imported_when_needed():
    code = """
import sys
import fixup_init.report.figure, fixup_init.report.html
from fixup_init.propagation import Comparison
import fixup_init.report.table, fixup_init.report.tensorboard
assert not {"matplotlib", "plotly", "jinja2", "tensorboardX", "pandas"} & set(sys.modules)
fixup_init.report.figure.figure(Comparison(()))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- files and extras


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = write(tmp_path / "deep" / "page.html", "old")
    with pytest.raises(UnicodeEncodeError):
        write(path, "new \ud800")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]
    assert write(path, "new é").read_text(encoding="utf-8") == "new é"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'`jinja2` is needed.*python -m pip install "fixup_init\[report\]"'):
        html(comparison(2), title="t")
    with pytest.raises(ImportError, match="no_such_package"):
        require("no_such_package.part", "report")


# ---- the page


def page_data(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1], parse_constant=pytest.fail)


def test_page_data_round_trip():
    text = html(comparison(163), title="t", training=trainings())
    data = page_data(text)
    he = data["propagations"][1]
    row = {name: values[-2] for name, values in he["rows"].items()}
    texts = [data["texts"][row[name]] for name in ("kind", "name", "shape")]
    assert texts == ["sum", "sum 163", "8×4×4×16"] and row["depth"] == 163
    forward = {name: values[-2] for name, values in he["forward"].items()}
    expected = comparison(163).propagations[1].rows[-2].forward
    assert forward["second_moment"] == pytest.approx(expected.second_moment, 1e-4) and forward["second_moment"] > 1e49
    assert forward["mean_share"] == pytest.approx(expected.squared_channel_mean / expected.second_moment, 1e-4)
    assert forward["channel_variance"] == pytest.approx(expected.channel_variance, 1e-4)
    # What is known of no row is not there.
    assert "example_cosine" not in forward and data["propagations"][1]["predicted_forward"] == {}
    half = {name: values[-2] for name, values in data["propagations"][3]["forward"].items()}
    assert half.pop("finite") == 0.7 and set(half.values()) == {None}
    assert data["runs"][2]["loss"] == [9.5, None] and data["runs"][0]["steps"][-1] == 40
    assert len(text) < 8_000_000


def test_page_asks_nothing_of_the_network():
    text = html(comparison(4), title="t")
    assert "default-src 'none'" in text
    own = text.replace(require("plotly.offline", "report").get_plotlyjs(), "")
    assert not re.search(r"https?://|@import|url\(", own)


def test_page_summarizes_trainings():
    *done, failed = trainings()
    text = html(comparison(4), title="t", training=[*done, failed.__dict__], table=[{"a": 1.23456, "b": None}])
    assert "<td>Fixup</td><td>0, 1</td>" in text and ">90.5%<" in text and ">90.0% to 91.0%<" in text
    assert "Seed 0: the loss is inf in step 2" in text and "<td>1.235</td><td>–</td>" in text
    with pytest.raises(ValueError, match=r"'losses'.*belong to no training run"):
        html(comparison(4), title="t", training=[{"losses": []}])
    with pytest.raises(ValueError, match="2 `steps` and 1 `loss`"):
        TrainingRun("x", 0, (1, 2), (0.5,), (), (), None)


EVIL = "</script><script>window.evil=1</script><img src=x onerror=window.evil=1>"


def test_names_cannot_inject_markup():
    evil = propagation(EVIL, 2, scope=EVIL)
    text = html(evil, title=EVIL, training=[TrainingRun(EVIL, 0, (1,), (1.0,), (1,), (0.5,), 0.5, None, EVIL)],
                table=[{EVIL: EVIL}])  # fmt: skip
    assert "<script>window.evil" not in text and "<img" not in text.replace(
        require("plotly.offline", "report").get_plotlyjs(), ""
    )
    assert page_data(text)["propagations"][0]["label"] == EVIL


@pytest.fixture
def browse(tmp_path):
    """Opens a page in headless Chromium; returns what the browser made of it after a script ran in it."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("Chromium is not installed: the page cannot be opened")

    def run(text, *options, script=""):
        path = write(tmp_path / "page.html", text.replace("</body>", f"<script>{script}</script></body>"))
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1400", "--virtual-time-budget=4000",
            *options, path.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    return run


# What a script in the page sees; `step` waits until all is drawn.
SEEN = """
const steps = [];
const step = async () => {
  while (document.documentElement.dataset.state === "drawing") await new Promise((done) => setTimeout(done, 20));
  const plot = document.getElementById("forward");
  steps.push({
    state: document.documentElement.dataset.state, error: document.getElementById("error").textContent,
    lines: ["forward", "backward", "loss", "accuracy"].map((id) => document.getElementById(id)?.data.length ?? null),
    drawn: plot.querySelectorAll(".trace.scatter path.js-line, .trace.scatter path.point").length,
    type: plot.layout.yaxis.type, sizes: plot.data[0].marker.size,
    legend: plot.data.filter((t) => t.showlegend).map((t) => t.name), hover: plot.data[0].hovertext[0],
    marks: plot.data.flatMap((t) => (Array.isArray(t.marker.symbol) ? t.marker.symbol : [])),
    rows: [...document.querySelectorAll("#rows tbody tr")].map((tr) => [...tr.cells].map((td) => td.textContent)),
    page: document.getElementById("page").textContent, evil: window.evil ?? null,
  });
};
const click = (selector) => document.querySelector(selector).click();
(async () => {
  await step();
  ACTIONS
  const seen = document.createElement("pre");
  seen.id = "seen";
  seen.textContent = JSON.stringify(steps);
  document.body.append(seen);
})();
"""


def seen(dom):
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.S)
    assert found, dom[-2000:]
    return json.loads(markup.unescape(found[1]))


def figures(row):
    """The second moment, as the page writes large numbers."""
    return f"{row.forward.second_moment:.3e}".replace("e+0", "e")


def test_the_page_is_drawn_and_clicked(browse):
    text = html(
        comparison(27), title="Drift", training=trainings(), structure=fi.structure(cifar_resnet(20, norm="fixup"), X)
    )
    actions = """
    click("input[name=kind][value=branch]");
    await step();
    click("#controls [name=scale][value=linear]");
    await step();
    click("#rows th:nth-child(7) button");
    click("#rows th:nth-child(7) button");
    await step();
    document.querySelector("#filters [name=text]").value = "SUM 27";
    document.querySelector("#filters [name=text]").dispatchEvent(new Event("input", { bubbles: true }));
    await step();
    """
    dom = browse(text, "--dump-dom", script=SEEN.replace("ACTIONS", actions))
    first, branches, linear, sorted_, filtered = seen(dom)
    for step in (first, branches, linear, sorted_, filtered):
        assert step["state"] == "ready" and step["error"] == ""
    # Four runs, and the marks of the one that overflows forward and dies backward.
    assert first["lines"] == [5, 5, 3, 3] and first["drawn"] > 80 and first["type"] == "log"
    assert first["marks"] == ["triangle-up-open"] * 18
    assert first["legend"][1] == "no normalization, He: grows ×2 a block"
    assert "sum 1" in first["hover"] and "shape 8×4×4×16" in first["hover"] and "variance" in first["hover"]
    assert branches["drawn"] > first["drawn"] + 80
    assert branches["marks"].count("triangle-down-open") == 27  # Fixup's branches end at zero
    assert linear["type"] == "linear" and "triangle-down-open" not in linear["marks"]
    # Folded: a line for each block, that of its sum.
    assert first["rows"][0][:5] == ["batch norm", "5", "1", "sum", "sum 1 (5 rows)"] and len(first["rows"]) == 100
    assert first["page"] == "440 rows in 112 blocks, page 1 of 2"
    best = sorted_["rows"][0]
    assert best[0] == "no normalization, He" and best[6] == figures(comparison(27).propagations[1].rows[-1])
    assert [r[4] for r in filtered["rows"]] == ["sum 27"] * 4 and filtered["page"] == "4 rows in 4 blocks, page 1 of 1"
    assert "layer1_{0..2} x 3" in dom


def test_a_deep_page_is_drawn(browse):
    blocks = 300
    (first,) = seen(browse(html(comparison(blocks), title="Drift"), "--dump-dom", script=SEEN.replace("ACTIONS", "")))
    assert (
        first["state"] == "ready"
        and first["drawn"] >= 4
        and first["page"].endswith(f"of {-(-4 * (blocks + 1) // 100)}")
    )


# Helpers for a script in the page; BODY returns what is seen.
PLAY = """
const plot = (id) => document.getElementById(id);
const wait = (time) => new Promise((done) => setTimeout(done, time));
const drawn = async () => {
  do { await wait(20); } while (document.documentElement.dataset.state === "drawing");
};
const one = (selector) => document.querySelector(selector);
const click = async (selector) => { one(selector).click(); await drawn(); };
const choose = async (selector, value) => {
  const select = one(selector);
  select.value = value;
  for (const type of ["input", "change"]) select.dispatchEvent(new Event(type, { bubbles: true }));
  await drawn();
};
const press = async (id, ...keys) => {
  for (const key of keys) {
    plot(id).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  }
  await drawn();
};
const traces = (id) => plot(id).data.map((t) => ({
  name: t.name, dash: t.line?.dash, colour: t.line?.color ?? t.marker?.color, last: t.y.at(-1),
  points: t.y.filter((y) => y !== null).length, fill: t.stackgroup ?? null, symbol: t.marker?.symbol ?? null,
}));
const table = () =>
  [...document.querySelectorAll("#rows tbody tr")].map((tr) => [...tr.cells].map((td) => td.textContent));
const texts = (selector) => [...document.querySelectorAll(selector)].map((x) => x.textContent);
(async () => {
  await drawn();
  const found = await (async () => { BODY })().catch((error) => ({ failed: String(error.stack) }));
  const seen = document.createElement("pre");
  seen.id = "seen";
  found.error = document.getElementById("error").textContent;
  found.state = document.documentElement.dataset.state;
  seen.textContent = JSON.stringify(found);
  document.body.append(seen);
})();
"""


def play(browse, text, body, *options):
    found = seen(browse(text, "--dump-dom", *options, script=PLAY.replace("BODY", body)))
    assert found.get("failed") is None and found["error"] == "" and found["state"] == "ready", found
    return found


def test_predictions_lie_over_what_was_measured(browse):
    three = detailed(9)
    text = html(three, title="t", predicted=[prediction(p) for p in three])
    assert "Where theory does not hold" in text and "Prediction: Widths are taken as large." in text
    found = play(
        browse,
        text,
        """
        const first = { forward: traces("forward"), backward: traces("backward") };
        const hover = plot("forward").data[0].hovertext[8], dashed = plot("forward").data[3].hovertext[0];
        await click("input[name=source][value=predicted]");
        const measured = traces("forward").length;
        await click("input[name=source][value=predicted]");
        await click("input[name=source][value=measured]");
        const predicted = traces("forward").map((t) => t.dash), spp = traces("spp-mean").length;
        await click("#notes a.of");
        return { first, hover, dashed, measured, predicted, rows: table(), only: one("#only").textContent,
          head: texts("#rows th"), notes: texts("#notes tbody tr"), spp };
        """,
    )
    for lines, blocks in ((found["first"]["forward"], 8), (found["first"]["backward"], 8)):
        assert [t["dash"] for t in lines] == ["solid"] * 3 + ["dash"] * 3
        assert [t["colour"] for t in lines[:3]] == [t["colour"] for t in lines[3:]]
        assert len({t["colour"] for t in lines}) == 3
        assert [t["points"] for t in lines] == [9] * 3 + [blocks] * 3
        assert lines[4]["name"] == "no normalization, He, predicted"
    he = three["no normalization, He"].select("sum")
    assert found["first"]["forward"][1]["last"] == he[-1].forward.second_moment
    assert found["first"]["forward"][4]["last"] == 1.25 * he[-2].forward.second_moment
    for part in ("<b>sum 9</b>", "variance across", "examples", "zeros 50%", "cosine", "effective rank", UNKNOWN):
        assert part in found["hover"]
    assert "predicted" in found["dashed"] and "sum 1" in found["dashed"]
    assert found["measured"] == 3 and found["predicted"] == ["dash"] * 3
    # The note, which is no markup, leads to its row.
    assert APPROXIMATE in found["notes"][0] and found["only"].startswith(f"Only the rows of: {APPROXIMATE}")
    (row,) = [dict(zip(found["head"], r, strict=True)) for r in found["rows"]]
    assert row["name"] == "branch 1" and row["note"] == APPROXIMATE
    assert float(row["predicted E[x²]"]) == pytest.approx(1.25 * float(row["E[x²]"]), 1e-3)
    assert found["spp"] == 0  # of channel means nothing is predicted


def test_a_real_network(browse, tmp_path):
    """Measured and predicted, all the way to the page."""
    model, x = cifar_resnet(8, norm="batch", width=4), jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
    one = fi.analyze(model, fi.init(model, jax.random.key(0), x, scheme="he_normal"), x, label="kept")
    theory = predict(model, x, scheme="he_normal", label="kept")
    text = propagation_table(one, width=100, predicted=theory)
    assert re.search(r"E\[x²\] +predicted .* E\[g²\] +predicted", text)
    assert "nan" not in text and max(map(len, text.splitlines())) <= 100
    assert len(figure(one, predicted=theory, channel_means=True, shares=True).axes) == 4
    found = records(Comparison((one, theory)))
    assert len(found) == 2 * len(one) and sum(r["weight_ratio"] > 0 for r in found) == len(one.select("weight"))
    assert to_csv(one, tmp_path / "rows.csv").read_text("utf-8").count("\n") == len(one) + 1
    found = play(
        browse,
        html(one, title="t", predicted=theory, structure=fi.structure(model, x)),
        """
        const lines = traces("forward"), shares = traces("shares-forward").map((t) => t.name);
        const spp = traces("spp-mean").map((t) => t.dash), rows = table();
        return { lines, shares, spp, rows, said: texts(".verdicts .text"), all: texts("[name=quantity] option") };
        """,
    )
    measured, predicted = found["lines"]
    assert (measured["dash"], predicted["dash"]) == ("solid", "dash")
    for drawn, p in ((measured, one), (predicted, theory)):
        assert drawn["points"] == 3
        assert drawn["last"] == pytest.approx(p.select("sum")[-1].forward.second_moment, 1e-3)
    assert found["spp"] == ["solid", "dash"] and len(found["shares"]) == 4 and len(found["all"]) >= 14
    assert [r[4] for r in found["rows"]] == [r.name for r in one] and found["said"] == [
        v.text for v in verdicts(one, theory)
    ]


def test_every_statistic_is_drawn(browse):
    three = detailed(9)
    found = play(
        browse,
        html(three, title="t"),
        """
        const seen = {};
        for (const { value } of [...one("[name=quantity]").options]) {
          await choose("[name=quantity]", value);
          const { type } = plot("forward").layout.yaxis;
          seen[value] = { type, traces: traces("forward"), backward: !plot("backward").hidden };
        }
        await choose("[name=quantity]", "example_cosine");
        await click("#controls [name=scale][value=log]");
        const cosine = traces("forward");
        await choose("#sharing [name=run]", "2");
        return { seen, cosine, shares: traces("shares-forward"), link: one("nav [data-of=shares]") !== null,
          spp: ["spp-mean", "spp-variance", "spp-branch"].map(traces), sources: one("#sources").hidden };
        """,
    )
    seen_ = found["seen"]
    assert list(seen_) == [
        *("second_moment", "variance", "mean", "squared_channel_mean", "channel_variance", "mean_share", "zeros"),
        *("saturated", "example_cosine", "effective_rank", "example_share", "channel_share", "position_share"),
        *("ratio", "gradient_norm", "parameter_norm"),
    ]
    linear = {*list(seen_)[5:13]}
    he = three["no normalization, He"]
    last, weight = he.select("sum")[-1].forward, he.select("weight")[-1].weight
    for name, one in seen_.items():
        expected = (
            last.squared_channel_mean / last.second_moment if name == "mean_share"
            else getattr(weight if hasattr(weight, name) else last, name)
        )  # fmt: skip
        drawn = [t for t in one["traces"] if t["name"] and t["name"].startswith("no norm")]
        shown = [t["last"] for t in drawn]
        assert shown == [pytest.approx(expected, 1e-3)], (name, one)
        assert one["backward"] == (not hasattr(weight, name))  # norms of weights have no direction
        assert one["type"] == ("linear" if name in linear else "log"), name
    # A cosine may be negative: a mark at the lower edge of a logarithmic axis.
    assert any("triangle-down-open" in (t["symbol"] or []) for t in found["cosine"])
    assert [t["name"] for t in found["shares"]] == [
        "across examples", "across channels", "across positions", "in their combinations",
    ]  # fmt: skip
    s = three["Fixup"].select("sum")[-1].forward
    assert [t["last"] for t in found["shares"]] == pytest.approx(
        [s.example_share, 0.3, 0.05, 0.65 - s.example_share], abs=1e-4
    )
    assert {t["fill"] for t in found["shares"]} == {"shares"} and found["link"] and found["sources"]
    mean, variance, branch = found["spp"]
    assert mean[1]["last"] == pytest.approx(last.squared_channel_mean, 1e-3)
    assert variance[1]["last"] == pytest.approx(last.channel_variance, 1e-3)
    # Fixup's branches end at zero, which is marked.
    assert [t["name"] for t in branch[:3]] == [p.label for p in three] and branch[2]["points"] == 0 and len(branch) == 4


def test_verdicts_lead_to_their_rows(browse):
    three = detailed(27)
    he = three["no normalization, He"]
    (growth,) = [v for v in verdicts(he) if v.kind == "growth" and v.direction == "forward"]
    found = play(
        browse,
        html(three, title="t"),
        """
        const cards = texts(".card h2"), severities = texts(".severity"), advice = texts(".advice");
        const said = texts(".verdicts .text");
        const k = said.findIndex((x) => x.startsWith("The signal explodes"));
        document.querySelectorAll(".verdicts li")[k].querySelector("a").click();
        await drawn();
        const circles = traces("forward").at(-1), branch = traces("spp-mean").length;
        const marked = { rows: table(), only: one("#only").textContent, circles, hash: location.hash };
        await click("#only button");
        const again = traces("forward").length;
        return { cards, severities, advice, said, marked, again, branch, page: one("#page").textContent };
        """,
    )
    assert found["cards"] == [p.label for p in three]
    assert found["said"] == [v.text for p in three for v in verdicts(p)]
    assert "▲ warning" in found["severities"] and growth.advice in found["advice"]
    marked = found["marked"]
    assert len(marked["rows"]) == len(growth.rows) and marked["only"].startswith(f"Only the rows of: {growth.text}")
    assert {r[0] for r in marked["rows"]} == {he.label} and marked["hash"] == "#every"
    assert [r[4] for r in marked["rows"]] == [he.rows[k].name for k in sorted(growth.rows)]
    assert marked["circles"]["symbol"] == "circle-open" and marked["circles"]["points"] == len(growth.rows)
    # The rings are gone, and never were in figures of other rows.
    assert found["again"] == found["branch"] == 3 and "blocks" in found["page"]


def test_zoom_and_keyboard(browse):
    found = play(
        browse,
        html(detailed(27), title="t"),
        """
        const range = () => [...plot("forward").layout.xaxis.range];
        const start = range();
        // Drag over the middle third.
        const box = one("#forward .nsewdrag"), r = box.getBoundingClientRect();
        const fire = (target, type, part) => target.dispatchEvent(new MouseEvent(type, {
          bubbles: true, cancelable: true, view: window, button: 0, buttons: 1,
          clientX: r.left + part * r.width, clientY: r.top + r.height / 2,
        }));
        fire(box, "mousedown", 1 / 3);
        for (const part of [0.4, 0.5, 0.6, 2 / 3]) fire(document, "mousemove", part);
        fire(document, "mouseup", 2 / 3);
        await wait(600);
        const dragged = range();
        await click("#reset");
        const reset = range();
        await press("forward", "ArrowRight", "ArrowRight", "ArrowDown");
        const read = plot("forward").nextElementSibling.textContent;
        await wait(200);
        const hover = texts("#forward .hoverlayer text").join(" ");
        await press("forward", "End");
        const last = plot("forward").nextElementSibling.textContent;
        await press("forward", "+");
        const zoomed = range();
        await press("forward", "0");
        return { start, dragged, reset, read, hover, last, zoomed, home: range(),
          focus: [...document.querySelectorAll(".figure")].map((x) => x.tabIndex),
          live: plot("forward").nextElementSibling.getAttribute("aria-live") };
        """,
    )
    a, b = found["start"]
    assert 0 < a < 1 and 27 < b < 28 and found["reset"] == found["home"] == [a, b]
    assert found["dragged"] == pytest.approx([a + (b - a) / 3, b - (b - a) / 3], abs=0.3)
    assert found["read"].startswith("sum 2; sum; residual sums passed: 2") and "no normalization, He" in found["read"]
    assert "sum 2" in found["hover"] and "no normalization, He" in found["hover"]
    assert found["last"].startswith("sum 27;") and found["zoomed"][0] > 5
    assert set(found["focus"]) == {0} and found["live"] == "polite"


def test_the_table_is_folded_sorted_and_filtered(browse):
    three = detailed(27)
    found = play(
        browse,
        html(three, title="t"),
        """
        const folded = table();
        await click("#rows tbody tr:nth-child(2) button");
        const open = table().slice(0, 8), expanded = one("#rows tbody tr:nth-child(2) button").ariaExpanded;
        await click("#rows tbody tr:nth-child(2) button");
        const closed = table().length;
        await click("#filters [name=fold]");
        const flat = { rows: table(), page: one("#page").textContent };
        await choose("#filters [name=kind]", "weight");
        const heads = texts("#rows th");
        const at = heads.indexOf("ratio") + 1;
        await click(`#rows th:nth-child(${at}) button`);
        const up = table().map((r) => r[at - 1]), sort = one(`#rows th:nth-child(${at})`).ariaSort;
        await click("#next");
        return { folded, open, expanded, closed, flat, up, sort, at, second: table().length, heads };
        """,
    )
    assert len(found["folded"]) == found["closed"] == 3 * 28
    assert found["folded"][1][4] == "sum 2 (4 rows)" and found["folded"][27][4] == "output"
    assert found["expanded"] == "true"
    assert [r[4] for r in found["open"][1:]] == [
        "sum 2 (4 rows)", "layer_2/conv/kernel", "relu", "branch 2", "sum 2", "sum 3 (4 rows)", "sum 4 (4 rows)",
    ]  # fmt: skip
    assert len(found["flat"]["rows"]) == 100 and found["flat"]["page"] == "330 rows, page 1 of 4"
    ratios = sorted(r.weight.ratio for p in three for r in p.select("weight"))
    assert [float(x) for x in found["up"]] == pytest.approx(ratios[:100], 1e-3) and found["sort"] == "ascending"
    assert len(ratios) == 81 == found["second"]
    across = found["flat"]["rows"][1][found["heads"].index("variance across")]
    assert re.fullmatch(r"examples \d+%, channels 30%, combinations \d+%, positions 5%", across)


def test_a_narrow_page_does_not_scroll_sideways(browse):
    three = detailed(4)
    frame = '<iframe style="width:400px;height:5000px;border:0" srcdoc="@"></iframe>'
    script = """<script>
    const check = () => document.documentElement.dataset.state === "ready" ? parent.postMessage({
      wide: document.scrollingElement.scrollWidth, room: innerWidth,
      over: [...document.querySelectorAll("main *")].filter((x) => !x.closest(".scroll, svg") &&
        x.getBoundingClientRect().right > innerWidth + 1).map((x) => x.outerHTML.slice(0, 80)),
    }, "*") : setTimeout(check, 20);
    check();
    </script></body>"""
    inner = html(three, title="t" * 200, predicted=[prediction(p) for p in three]).replace("</body>", script)
    text = f"<!DOCTYPE html><body>{frame.replace('@', markup.escape(inner))}</body>"
    found = seen(
        browse(
            text,
            "--dump-dom",
            script="""
            addEventListener("message", ({ data }) => {
              const seen = document.createElement("pre");
              seen.id = "seen";
              seen.textContent = JSON.stringify(data);
              document.body.replaceChildren(seen);
            });
            """,
        )
    )
    assert found["room"] == 400 == found["wide"] and found["over"] == [], found


def test_a_lone_point_is_drawn_on_the_page(browse):
    (first,) = seen(
        browse(html(propagation("x", 100, overflow=2), title="t"), "--dump-dom", script=SEEN.replace("ACTIONS", ""))
    )
    assert first["sizes"] == [5] + [0] * 99


def test_injected_names_do_not_run(browse):
    actions = """
    click("input[name=kind][value=weight]");
    await step();
    const forward = document.getElementById("forward");
    forward.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    const said = forward.nextElementSibling.textContent;
    if (said.split("onerror=window.evil=1>").length !== 5) throw Error(said); // name, scope, note, label
    click("#notes a.of");
    await step();
    """
    one = propagation(EVIL, 3, scope=EVIL)
    one = dataclasses.replace(one, notes=(EVIL,), rows=tuple(dataclasses.replace(r, name=EVIL, note=EVIL) for r in one))
    text = html(
        one,
        title=EVIL,
        predicted=dataclasses.replace(one, kind="predicted"),
        training=[TrainingRun(EVIL, 0, (1,), (1.0,), (1,), (0.5,), 0.5)],
    )
    steps = seen(browse(text, "--dump-dom", script=SEEN.replace("ACTIONS", actions)))
    assert len(steps) == 3
    for step in steps:
        assert step["state"] == "ready" and step["evil"] is None and step["rows"][0][0] == EVIL


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_screenshot(browse, tmp_path, theme):
    shot = tmp_path / f"{theme}.png"
    browse(
        html(comparison(27), title="Drift"),
        f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={int(theme == 'light')}",
    )
    from matplotlib.image import imread

    picture = imread(shot)[..., :3]
    assert picture.shape[:2] == (1400, 1200)
    assert (picture[2, 2].mean() > 0.9) == (theme == "light")
    assert (
        len({tuple(c) for c in (picture[::7, ::7].reshape(-1, 3) * 15).round().tolist()}) > 12
    )  # lines of every colour


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_in_a_browser(browse, tmp_path, theme):
    structure, plan = pictured("decoder40")
    text = structure_html(structure, plan, title=EVIL)
    assert "default-src 'none'" in text and "<script" not in text.replace("<script>window.evil", "")
    script = """
    const over = [...document.querySelectorAll("svg g")].filter((g) => g.querySelector("rect")).flatMap((g) => {
      const box = g.querySelector("rect").getBoundingClientRect();
      return [...g.querySelectorAll("text")].filter((t) => {
        const r = t.getBoundingClientRect();
        return r.left < box.left || r.right > box.right || r.top < box.top || r.bottom > box.bottom;
      }).map((t) => t.textContent);
    });
    const seen = document.createElement("pre");
    seen.id = "seen";
    seen.textContent = JSON.stringify({
      over, boxes: document.querySelectorAll("svg rect").length, evil: window.evil ?? null,
      colour: getComputedStyle(document.querySelector("svg text")).fill,
      plan: document.body.textContent.includes("Plan fixup"),
    });
    document.body.append(seen);
    """
    # The page's own policy forbids scripts; this one measures.
    open_ = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    setting = f"--blink-settings=preferredColorScheme={int(theme == 'light')}"
    found = seen(browse(open_, "--dump-dom", setting, script=script))
    assert found["over"] == [] and found["boxes"] > 10 and found["evil"] is None and found["plan"]
    assert found["colour"] == {"light": "rgb(27, 31, 36)", "dark": "rgb(231, 234, 238)"}[theme]
    shot = tmp_path / "shot.png"
    browse(text, f"--screenshot={shot}", setting)
    from matplotlib.image import imread

    picture = imread(shot)[..., :3]
    assert (picture[2, 2].mean() > 0.9) == (theme == "light")
    assert len({tuple(c) for c in (picture[::3, ::3].reshape(-1, 3) * 31).round().tolist()}) > 8
