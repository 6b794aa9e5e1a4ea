"""Values of environment variables."""

from __future__ import annotations

import os
import re

# CJEPA_KEPT_MIB and CJEPA_CACHE_MIB; kDefaultMebibytes in csrc/cpu/constants.h as well. The
# exponentials of 8192 x 8192 similarities in fp32 fit.
DEFAULT_MEBIBYTES = 288.0
DEFAULT_WORKSPACE_MEBIBYTES = 256.0  # CJEPA_WORKSPACE_MIB

_problems: list[str] = []

_SWITCH = {"": None, "0": False, "1": True}
_MOST = 2**40  # MiB: more than any address space, and in bytes no more than C++'s size_t holds
# It is decimal, because csrc/cpu/memory.cpp reads the same text: no underscores, no inf, and no
# digits of other scripts.
_NUMBER = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


def read_mebibytes(variable: str, default: float = DEFAULT_MEBIBYTES) -> float:
    """Number of MiB that an environment variable gives.

    Args:
        variable: Its name.
        default: The number where it is unset or blank.

    Returns:
        A number from 0 to 2**40.

    Raises:
        ValueError: The variable is something else.
    """
    value = os.environ.get(variable, "")
    text = value.strip(" \t\n\v\f\r")
    if not text:
        return default
    number = float(text) if _NUMBER.fullmatch(text) else -1.0
    if not 0 <= number <= _MOST:
        raise ValueError(f"{variable} must be a number of MiB from 0 to 2**40, got {value[:80]!r}")
    return number


def read_switch(variable: str) -> bool | None:
    """What an environment variable that switches something on or off says.

    Args:
        variable: Its name.

    Returns:
        True for 1, False for 0, None where it is unset or blank.

    Raises:
        ValueError: The variable is something else.
    """
    value = os.environ.get(variable, "")
    text = value.strip(" \t\n\v\f\r")
    if text not in _SWITCH:
        raise ValueError(f"{variable} must be 0, 1 or unset, got {value[:80]!r}")
    return _SWITCH[text]


def read_when_imported(variable: str, default: float = DEFAULT_MEBIBYTES) -> float:
    """:func:`read_mebibytes`, but a mistake is kept for :func:`check_environment`.

    An exception here would leave the command line with a traceback, since its entry point imports
    the package before anything of ours can catch it.
    """
    try:
        return read_mebibytes(variable, default)
    except ValueError as error:
        note_problem(str(error))
        return default


def check_switch_when_imported(variable: str) -> None:
    """Read a switch, and keep a mistake for :func:`check_environment`."""
    try:
        read_switch(variable)
    except ValueError as error:
        note_problem(str(error))


def note_problem(message: str) -> None:
    """Keep a mistake in a variable that was read when the package was imported."""
    if message not in _problems:
        _problems.append(message)


def check_environment() -> None:
    """Raise if a variable that was read when the package was imported was wrong.

    Raises:
        ValueError: With all such mistakes.
    """
    if _problems:
        raise ValueError("; ".join(_problems))
