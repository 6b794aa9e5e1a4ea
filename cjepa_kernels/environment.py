"""What environment variables say."""

from __future__ import annotations

import os


def read_mebibytes(variable: str, default: float) -> float:
    """Number of MiB that an environment variable gives.

    Raises:
        ValueError: The variable is set and no number, or negative.
    """
    value = os.environ.get(variable, str(default))
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise ValueError(f"{variable} must be a number of MiB, 0 or more, got {value!r}")
    return number
