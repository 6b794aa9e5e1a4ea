"""The operators that are registered, by name and overload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import Tensor

arguments: dict[str, Any] = {}  # by operator: a named tuple class of its arguments
results: dict[str, Callable[..., Any]] = {}  # by operator: a named tuple class of its results
numbers: dict[str, tuple[int, ...]] = {}  # by operator: the positions of its numbers
tensors: dict[str, tuple[int, ...]] = {}  # by operator: those of its tensors and lists of tensors
operators: dict[tuple[str, str], Any] = {}  # by operator and overload: what torch.ops holds
# The same operators, with autograd that costs less per call.
functions: dict[tuple[str, str], Callable[..., Any]] = {}
dispatched: dict[str, str] = {}  # by type of device: the back end that the dispatcher runs there
only_dispatched: set[str] = set()  # back ends without overloads, which the dispatcher alone runs
# By back end: whether it rounds operands like this one to tf32. Without an entry it does not.
rounds_to_tf32: dict[str, Callable[[Tensor], bool]] = {}


def backend_of(overload: str, device_type: str) -> str:
    """The back end that an overload of the operators runs on a type of device."""
    return overload.lstrip(".") or dispatched.get(device_type, "chunked")


def operator(name: str, overload: str = "") -> Any:
    """The registered overload: ``operator("nt_xent")`` or ``operator("nt_xent", ".chunked")``."""
    return operators.get((name, overload)) or _refuse(name, overload)


def differentiable(name: str, overload: str) -> Any:
    """The function that calls the operator with the autograd that costs the least time."""
    return functions.get((name, overload)) or _refuse(name, overload)


def _refuse(name: str, overload: str) -> NoReturn:
    raise RuntimeError(f'the back end "{overload.lstrip(".")}" has no operator {name}')


def overloads() -> tuple[str, ...]:
    """The overloads of the operators: the dispatched one first, then one for each back end."""
    return tuple(sorted({overload for _, overload in functions}))


def flatten(args: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """The length of each list, -1 for an argument that is no list, and all elements in order."""
    lengths: list[int] = []
    elements: list[Any] = []
    for arg in args:
        if isinstance(arg, list):
            lengths.append(len(arg))
            elements += arg
        else:
            lengths.append(-1)
            elements.append(arg)
    return lengths, elements


def unflatten(lengths: list[int], flat: Sequence[Any]) -> list[Any]:
    """The arguments that :func:`flatten` took apart."""
    args: list[Any] = []
    start = 0
    for length in lengths:
        if length < 0:
            args.append(flat[start])
            start += 1
        else:
            args.append(list(flat[start : start + length]))
            start += length
    return args
