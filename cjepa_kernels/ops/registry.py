"""The operators that are registered, by name and overload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

arguments: dict[str, Any] = {}  # by operator: a named tuple class of its arguments
results: dict[str, Callable[..., Any]] = {}  # by operator: a named tuple class of its results
numbers: dict[str, tuple[int, ...]] = {}  # by operator: the positions of its numbers
operators: dict[tuple[str, str], Any] = {}  # by operator and overload: what torch.ops holds
functions: dict[tuple[str, str], Callable[..., Any]] = {}  # the same with a quicker autograd


def operator(name: str, overload: str = "") -> Any:
    """The registered overload: ``operator("nt_xent")`` or ``operator("nt_xent", ".chunked")``."""
    if (name, overload) not in operators:
        raise RuntimeError(f'the back end "{overload.lstrip(".")}" has no operator {name}')
    return operators[name, overload]


def overloads() -> tuple[str, ...]:
    """The overloads of the operators: the dispatched one first, then one for each back end."""
    return tuple(sorted({overload for _, overload in functions}))


def flatten(args: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """The length of each list, -1 for an argument that is no list, and all elements in order."""
    lengths = [len(arg) if isinstance(arg, list) else -1 for arg in args]
    return lengths, [x for arg in args for x in (arg if isinstance(arg, list) else (arg,))]


def unflatten(lengths: list[int], flat: Sequence[Any]) -> list[Any]:
    """The arguments that :func:`flatten` took apart."""
    rest = iter(flat)
    return [[next(rest) for _ in range(n)] if n >= 0 else next(rest) for n in lengths]
