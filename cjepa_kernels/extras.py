"""Optional dependencies: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of this package brings it.

    Args:
        module: Name of the module to import, for example ``"yaml"``.
        extra: Extra of ``cjepa_kernels`` that installs it, for example ``"train"``.

    Returns:
        The imported module.

    Raises:
        ImportError: If the module is missing, with the extra and, for a clone, the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ImportError(
            f"{module!r} is needed here and is not installed: it comes with the extra [{extra}] of "
            f"cjepa_kernels (pip install --no-build-isolation '.[{extra}]' in a clone)"
        ) from error
