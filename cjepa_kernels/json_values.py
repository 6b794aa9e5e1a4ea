"""Values as JSON can hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """The value with None, which JSON has, for NaN and infinity, which it lacks.

    Args:
        value: Plain values, mappings, lists and tuples, however nested.

    Returns:
        The same values; mappings are dictionaries and tuples are lists.

    Example:
        >>> finite({"loss": float("nan"), "sizes": (1, 2.5)})
        {'loss': None, 'sizes': [1, 2.5]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
