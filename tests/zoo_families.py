"""All families: models of many kinds, each with its structure worked out by hand."""

from __future__ import annotations

from zoo import Case
from zoo_frameworks import FRAMEWORKS
from zoo_language import LANGUAGE
from zoo_sequences import SEQUENCES
from zoo_vision import VISION

FAMILIES: tuple[Case, ...] = (*VISION, *LANGUAGE, *SEQUENCES, *FRAMEWORKS)
