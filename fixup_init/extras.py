"""Packages that only parts of the library need: imported where they are used, or an error says how to get them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional package.

    Args:
      module: its name for `import`, such as "plotly.offline".
      extra: the extra of this library that installs it, such as "report".

    Returns:
      The module.

    Raises:
      ImportError: it is not installed; the message says what to run.

    Example:
      >>> require("json", "report").dumps([1])
      '[1]'
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if getattr(error, "name", None) not in (package, module):
            raise  # it is installed, and something inside it fails
        raise ImportError(
            f'`{package}` is needed here and is not installed; run: python -m pip install "fixup_init[{extra}]"',
            name=package,
        ) from error
