"""Initialization schemes: one paper, one file; each reads a Structure and returns a Plan."""

from __future__ import annotations

import difflib

from fixup_init.schemes.base import Scheme
from fixup_init.schemes.fixup import Fixup
from fixup_init.schemes.model import Model
from fixup_init.schemes.variance import NAMES as _VARIANCE
from fixup_init.schemes.variance import Variance, glorot, he, lecun

__all__ = ["NAMES", "Fixup", "Model", "Scheme", "Variance", "find", "glorot", "he", "lecun"]

NAMES: dict[str, Scheme] = {"fixup": Fixup(), "model": Model(), **_VARIANCE}


def find(scheme: str | Scheme) -> Scheme:
    """The scheme of a name, or the scheme object itself.

    Raises:
      ValueError: no scheme has this name.
      TypeError: neither a name nor a scheme.

    Example:
      >>> find("he_normal_fan_out").name
      'he_normal_fan_out'
    """
    if isinstance(scheme, str):
        if scheme not in NAMES:
            close = difflib.get_close_matches(scheme, NAMES, n=3, cutoff=0.3) or ["fixup"]
            raise ValueError(
                f"scheme={scheme!r} is not known; did you mean {' or '.join(map(repr, close))}? All names: "
                f"{', '.join(NAMES)}. A scheme object such as fi.Fixup(head=None) is taken too."
            )
        return NAMES[scheme]
    if isinstance(scheme, type) or not isinstance(scheme, Scheme):
        raise TypeError(
            f"scheme={scheme!r} is neither a name nor a scheme object (with .name and .plan(structure)); "
            'for instance scheme="fixup" or scheme=fi.Fixup().'
        )
    return scheme
