"""Names on a command line -> models and inputs: `package.module:attribute`, `file.py:attribute`, `8,32,32,3`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["SpecError", "inputs", "keywords", "model"]


class SpecError(ValueError):
    """A model, an input or an argument on the command line that cannot be read."""


def model(spec: str) -> Any:
    """The model that `package.module:attribute` or `file.py:attribute` names.

    The attribute may be a model or a function (or class) without required arguments that makes one; dots go deeper.

    Raises:
      SpecError: the spec has no colon, or module or attribute are not there.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise SpecError(f"{spec!r}: expected package.module:attribute or file.py:attribute, such as nets.py:model.")
    found: Any = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise SpecError(f"{place} has no attribute {name!r}; it has {', '.join(public) or 'none'}.")
        found = getattr(found, name)
    return _made(found, spec)


def _made(found: Any, spec: str) -> Any:
    import flax.linen
    from flax import nnx

    from fixup_init.frameworks import Function

    if isinstance(found, (flax.linen.Module, nnx.Module, Function)) or not callable(found):
        return found
    try:
        return found()
    except TypeError as error:
        raise SpecError(
            f"{spec} is {found!r}, and calling it without arguments failed: {error}. Name a model, or a function "
            "without required arguments that returns one."
        ) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SpecError(f"There is no file {path}. Give a path from {Path.cwd()}, or package.module:attribute.")
    sys.path.insert(0, str(path.resolve().parent))  # its own imports, as when it is run as a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _from_package(name: str) -> ModuleType:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not f"{name}.".startswith(f"{error.name}."):
            raise
        raise SpecError(
            f"No module {error.name!r} is found. Install it, change to its directory, or give file.py:attribute."
        ) from error


def inputs(texts: Sequence[str]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes such as "8,32,32,3" (float32) or "2,128:int32".

    Example:
      >>> inputs(["8,32,32,3", "2,128:int32"])[1]
      ShapeDtypeStruct(shape=(2, 128), dtype=int32)
    """
    found = []
    for text in texts:
        sizes, _, dtype = text.partition(":")
        try:
            shape = tuple(int(n) for n in sizes.split(",") if n.strip())
            if any(n < 1 for n in shape):
                raise ValueError("sizes are at least 1")
            found.append(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or "float32")))
        except (ValueError, TypeError) as error:
            raise SpecError(
                f"--input {text!r}: {error}; expected sizes and maybe a dtype, such as 8,32,32,3 or 2,128:int32."
            ) from error
    return tuple(found)


def keywords(texts: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of the model, such as "train=True".

    Example:
      >>> keywords(["train=True", "mode=fast"])
      {'train': True, 'mode': 'fast'}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise SpecError(f"--arg {text!r}: expected name=value, such as train=True.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found
