"""`fi.predict` on every model of the zoo: each row is finite, or names the operation that stops it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from zoo import ZOO, Case
from zoo_families import FAMILIES

import fixup_init as fi
from fixup_init.predict import predict

CASES = {case.name: case for case in (*ZOO, *FAMILIES)}
# Models of which something is unknown, and why. It may only become shorter.
EXCEEDS = "`exp` of a value that is at most 0, which its distribution, as far as it is known, exceeds"
UNKNOWN: dict[str, set[str]] = {
    "gat": {"an exponential inside of a softmax"},
    "rwkv": {EXCEEDS},
    "memory-efficient": {EXCEEDS},
}
# Models whose tables are only shapes: a scheme that leaves these to the model's own initializers cannot know them.
ABSTRACT = (
    "haiku-transformer", "haiku-lstm", "haiku-gru", "equinox-transformer", "equinox-scan", "equinox-gru",
    "nnx-transformer",
)  # fmt: skip
QUICK = ("layer-drop", "switched", "gin", "gat", "mixtral", "ragged-experts", "haiku-vqvae")


def planned(case: Case, model: Any) -> fi.Plan:
    plan = fi.plan(model, *case.inputs, scheme="he")
    if case.name in ABSTRACT:
        for entry in plan.entries:
            plan = plan.override(entry.path, std=1.0) if entry.distribution == "model" else plan
    return plan


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in CASES])
def test_every_row_is_finite_or_says_why(name: str) -> None:
    case = CASES[name]
    model = case.make()
    reasons: set[str] = set()
    for row in predict(model, *case.inputs, scheme=planned(case, model)).rows:
        for statistics in (row.forward, row.backward):
            if statistics is not None:
                numbers = statistics.mean, statistics.variance, statistics.squared_channel_mean
                assert all(map(math.isfinite, numbers)) and statistics.variance >= 0
        found = re.findall(r"(backward )?unknown: ([^;]*)", row.note)
        assert (row.forward is None) == any(not way for way, _ in found)
        assert row.backward is not None or found
        reasons |= {why for _, why in found}
    assert reasons == UNKNOWN.get(name, set())


def test_tables_that_are_only_shapes_are_named() -> None:
    case = CASES["haiku-gru"]
    rows = predict(case.make(), *case.inputs, scheme="he").rows
    assert all("the model's own `embed/embeddings`" in row.note for row in rows)
