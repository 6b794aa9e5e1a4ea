"""The definition of an operator, and the names by which its backward follows from it."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from torch import Tensor

from cjepa_kernels.ops import registry
from cjepa_kernels.ops.registry import operator

Implementation = Callable[..., tuple[Any, ...]]
Implementations = tuple[Implementation, Implementation]  # of an operator, and of its backward


@dataclass(frozen=True)
class Definition:
    """An operator with its backward, ``<name>_backward``, and what all back ends share of them.

    Names in the schemas connect both directions. The arguments of the backward stand in this order:

    - ``grad_<result>``, the upstream gradient of a result. A result without one is not
      differentiable.
    - Tensors, each by the name that it has among the forward's arguments or results. The forward
      saves them.
    - Other arguments of the forward, by the same names.
    - ``of_<input>``, a bool: whether the gradient of that input is needed.

    The results of the backward are ``grad_<input>``; that of a tensor ``<number>_tensor``, which
    takes the place of a number, is ``grad_<number>``.

    Attributes:
        name: Name of the operator.
        schema: Arguments and results. Autocast sets ``product_dtype``, if it is an argument.
        schema_backward: Arguments and results of the backward, as described above.
        results: Named tuple of the results, in the order of the schema.
        results_backward: The same of the backward.
        fake: Results without their values, of a named tuple of the arguments.
        fake_backward: The same of the backward.
        fake_of_overload: Results of the operator that depend on the overload, by their names in
            ``results``: of the arguments and the overload.
        complete: ``(saved, *upstream)``: the upstream gradients as the backward takes them.
            ``saved`` holds the saved tensors by name. An upstream gradient may be None, but not all
            of them are.
        flags: The backward's bools by name, with the input that each of them is about, unless that
            follows from the name.
        implementations: By back end, of the operator and of its backward.
    """

    name: str
    schema: str
    schema_backward: str
    results: Callable[..., Any]
    results_backward: Callable[..., Any]
    fake: Callable[[Any], tuple[Tensor, ...]]
    fake_backward: Callable[[Any], tuple[Any, ...]]
    fake_of_overload: Callable[[Any, str], dict[str, Tensor]] | None = None
    complete: Callable[..., tuple[Tensor | None, ...]] | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    implementations: dict[str, Implementations] = field(default_factory=dict)


@dataclass(frozen=True)
class Binding:
    """Positions by which the arguments of a backward follow from the forward.

    They are found once, by the names in the schemas.

    Attributes:
        arguments: Named tuple of the forward's arguments.
        arguments_backward: Named tuple of the backward's arguments.
        saved: Named tuple of the saved tensors.
        upstream: Positions of the differentiable results.
        not_differentiable: Positions of the other results.
        saved_positions: Positions of the saved tensors in the arguments followed by the results.
        options: Positions of the arguments that the backward takes and that are no tensors.
        lists: Positions of the arguments that are lists of tensors.
        flags: For each flag, the position of the input that it is about.
        inputs: For each result of the backward, the position of its input.
    """

    arguments: Any
    arguments_backward: Any
    saved: Any
    upstream: tuple[int, ...]
    not_differentiable: tuple[int, ...]
    saved_positions: tuple[int, ...]
    options: tuple[int, ...]
    lists: tuple[int, ...]
    flags: tuple[int, ...]
    inputs: tuple[int, ...]


def named_arguments(name: str, schema: Any) -> Any:
    """A named tuple of the arguments of a schema."""
    return namedtuple(name, [argument.name for argument in schema.arguments])


def bind(definition: Definition) -> Binding:
    """Find the arguments of the backward among the arguments and results of the forward."""
    forward = operator(definition.name)._schema
    backward = operator(f"{definition.name}_backward")._schema
    arguments = [argument.name for argument in forward.arguments]
    results = [result.name for result in forward.returns]
    is_tensor = ["Tensor" in str(argument.type) for argument in forward.arguments]
    everything = arguments + results
    upstream: list[int] = []
    saved: list[int] = []
    options: list[int] = []
    flags: list[int] = []
    for argument in backward.arguments:
        name = argument.name
        if name.removeprefix("grad_") in results and name not in everything:
            upstream.append(results.index(name.removeprefix("grad_")))
            in_order = not (saved or options or flags)
        elif name in results or (name in arguments and is_tensor[arguments.index(name)]):
            saved.append(everything.index(name))
            in_order = not (options or flags)
        elif name in arguments:
            options.append(arguments.index(name))
            in_order = not flags
        elif (of := definition.flags.get(name, name.removeprefix("of_"))) in arguments:
            flags.append(arguments.index(of))
            in_order = True
        else:
            raise ValueError(
                f"{definition.name}_backward takes {name}, which is neither an upstream gradient, "
                "nor an argument or result of the forward, nor a flag that an input is needed"
            )
        if not in_order:
            raise ValueError(
                f"{definition.name}_backward takes {name} too late: upstream gradients come first, "
                "then saved tensors, then other arguments, then flags"
            )
    inputs = []
    for result in backward.returns:
        name = result.name.removeprefix("grad_")
        in_place_of_a_number = f"{name}_tensor"
        of = in_place_of_a_number if in_place_of_a_number in arguments else name
        inputs.append(arguments.index(of))
    return Binding(
        arguments=registry.arguments[definition.name],
        arguments_backward=registry.arguments[f"{definition.name}_backward"],
        saved=namedtuple(f"{definition.name}_saved", [everything[k] for k in saved]),
        upstream=tuple(upstream),
        not_differentiable=tuple(k for k in range(len(results)) if k not in upstream),
        saved_positions=tuple(saved),
        options=tuple(options),
        lists=tuple(k for k, a in enumerate(forward.arguments) if str(a.type) == "List[Tensor]"),
        flags=tuple(flags),
        inputs=tuple(inputs),
    )


def take(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the elements at these positions: of a tuple as a tuple."""
    if len(positions) < 2:  # itemgetter takes at least one position, and of one gives no tuple
        start = positions[0] if positions else 0
        return itemgetter(slice(start, start + len(positions)))
    return itemgetter(*positions)
