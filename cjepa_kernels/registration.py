"""How an operator and its backward are registered with PyTorch: the same way for all of them.

``cjepa_kernels::<name>`` dispatches on the device: the compiled module registers itself for the
CPU, the Triton kernels are registered for CUDA, and ``CompositeExplicitAutograd`` is the chunked
path that serves every other device. The overloads ``<name>.chunked`` and ``<name>.triton`` have one
path alone, for those who ask for it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels.backends import HAS_TRITON

NAMESPACE = "cjepa_kernels"
OVERLOADS = ("", ".chunked", ".triton")
# Skips the registered autograd, which is Python code under every call. As in torch._library.
_below_autograd: Any = torch._C._AutoDispatchBelowAutograd
AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}

# Any: the methods of Library carry no annotations.
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_operators: dict[tuple[str, str], Any] = {}  # by name and overload, like the next
_functions: dict[tuple[str, str], Callable[..., Any]] = {}


Implementation = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Definition:
    """An operator with its backward, ``<name>_backward``, and what all back ends share of them.

    Attributes:
        name: Of the operator.
        schema: Arguments and results; autocast sets ``product_dtype``, if it is among them.
        schema_backward: The same of the backward.
        chunked: Implementations of the operator and of its backward in pure PyTorch.
        triton: The same in Triton.
        fake: Results of the operator without their values.
        fake_backward: The same of the backward.
        setup_context: ``(ctx, inputs, output)``: saves what the gradients need.
        gradients: ``(ctx, backward, *upstream)``: the gradient of every input, by the operator
            ``backward``; an upstream gradient is None where there is none. Of an input that is a
            list of tensors, the list of their gradients.
    """

    name: str
    schema: str
    schema_backward: str
    chunked: tuple[Implementation, Implementation]
    triton: tuple[Implementation, Implementation]
    fake: Callable[..., tuple[Tensor, ...]]
    fake_backward: Callable[..., tuple[Any, ...]]
    setup_context: Callable[[Any, Sequence[Any], tuple[Tensor, ...]], None]
    gradients: Callable[..., tuple[Any, ...]]


def operator(name: str, overload: str = "") -> Any:
    """The registered overload: ``operator("nt_xent")`` or ``operator("nt_xent", ".chunked")``."""
    return _operators[name, overload]


def call(name: str, overload: str, *args: Any) -> tuple[Tensor, ...]:
    """Call an operator with the least in between.

    The registered autograd is Python code under every call, most of a small batch's time. It
    serves torch.compile, torch.export and those who call the operator itself.
    """
    args = tuple(saveable(arg) for arg in args)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return operator(name, overload)(*args)  # type: ignore[no-any-return]
    return _functions[name, overload](*args)  # type: ignore[no-any-return]


def saveable(arg: Any) -> Any:
    """What autograd can save for a backward, in place of a tensor made under inference_mode.

    A copy, as the plain formulas keep one: nothing would notice that a bank was written to, under
    inference_mode again, before the backward. torch.compile cannot ask what a tensor is, and
    computes again in the backward what it takes for cheap, from the tensor that cannot be saved:
    there every tensor without a gradient goes through an operator. Lists do not: they hold the
    sides of the prediction loss, which is bound by memory, and a copy of each would be most of it.
    """
    if not torch.is_grad_enabled():
        return arg
    if torch.compiler.is_compiling():
        is_constant = isinstance(arg, Tensor) and not arg.requires_grad
        return _operators["copy", ""](arg) if is_constant else arg
    if isinstance(arg, list):
        return [saveable(x) for x in arg]
    return arg.clone() if isinstance(arg, Tensor) and arg.is_inference() else arg


def register(definition: Definition) -> None:
    """Define the operator and its backward, in every overload."""
    for overload in OVERLOADS:
        _register(definition, overload)


def register_plain(
    name: str, schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Define an operator without a gradient: in PyTorch, and where it is built in native code."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _operators[name, ""] = getattr(torch.ops.cjepa_kernels, name).default
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _register(definition: Definition, overload: str) -> None:
    forward, backward = f"{definition.name}{overload}", f"{definition.name}_backward{overload}"
    _library.define(forward + definition.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(backward + definition.schema_backward, tags=(torch.Tag.pt2_compliant_tag,))
    for name in (definition.name, f"{definition.name}_backward"):
        packet = getattr(torch.ops.cjepa_kernels, name)
        _operators[name, overload] = getattr(packet, overload.lstrip(".") or "default")
    implementations = definition.triton if overload == ".triton" else definition.chunked
    for schema, implementation in zip((forward, backward), implementations, strict=True):
        _library.impl(schema, implementation, "CompositeExplicitAutograd")
    if overload == "" and HAS_TRITON:
        for schema, implementation in zip((forward, backward), definition.triton, strict=True):
            _library.impl(schema, implementation, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{forward}", definition.fake, lib=_library)
    torch.library.register_fake(f"{NAMESPACE}::{backward}", definition.fake_backward, lib=_library)
    gradients = _make_gradients(definition, overload)
    torch.library.register_autograd(
        f"{NAMESPACE}::{forward}",
        gradients,
        setup_context=definition.setup_context,
        lib=_library,
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::{backward}", _make_no_double_backward(definition.name), lib=_library
    )
    takes_autocast = "product_dtype" in definition.schema
    for device_type, key in AUTOCAST_DEVICES.items() if takes_autocast else ():
        _library.impl(forward, _make_autocast(definition.name, overload, device_type), key)
    _functions[definition.name, overload] = _make_function(definition, overload, gradients)


def _make_gradients(definition: Definition, overload: str) -> Callable[..., tuple[Any, ...]]:
    backward = operator(f"{definition.name}_backward", overload)

    def quick_backward(*args: Any) -> Any:
        with _below_autograd():
            return backward(*args)

    def gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        # Who wants a second derivative meets the autograd that says that there is none.
        run = backward if torch.is_grad_enabled() else quick_backward
        return definition.gradients(ctx, run, *upstream)

    return gradients


def _make_no_double_backward(name: str) -> Callable[..., None]:
    def no_double_backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f'{name} has no second derivative in this back end; use backend="reference" for '
            "double backward"
        )

    return no_double_backward


def _make_autocast(name: str, overload: str, device_type: str) -> Callable[..., Any]:
    forward = operator(name, overload)
    position = [argument.name for argument in forward._schema.arguments].index("product_dtype")

    def autocast(*args: Any) -> Any:
        product_dtype = args[position]
        if product_dtype is None:
            product_dtype = torch.get_autocast_dtype(device_type)
            if args[0].dtype == torch.float64:
                product_dtype = torch.float64
        with torch.autocast(device_type, enabled=False):
            return forward(*args[:position], product_dtype, *args[position + 1 :])

    return autocast


def _make_function(
    definition: Definition, overload: str, gradients: Callable[..., tuple[Any, ...]]
) -> Callable[..., Any]:
    """The operator with its autograd, in the way that costs least per call."""
    operator_forward, setup_context = operator(definition.name, overload), definition.setup_context

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with _below_autograd():
                output = operator_forward(*args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(gradients)

    class FunctionOfLists(torch.autograd.Function):
        """Autograd sees no tensor in a list: they are taken apart on the way in and out."""

        @staticmethod
        def forward(ctx: Any, lengths: list[int], *flat: Any) -> Any:
            args = _unflatten(lengths, flat)
            with _below_autograd():
                output = operator_forward(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> Any:
            return None, *_flatten(gradients(ctx, *upstream))[1]

    def call_with_lists(*args: Any) -> Any:
        lengths, flat = _flatten(args)
        return FunctionOfLists.apply(lengths, *flat)  # type: ignore[no-untyped-call]

    Function.__name__ = FunctionOfLists.__name__ = definition.name
    return call_with_lists if "Tensor[]" in definition.schema else Function.apply


def _flatten(args: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """For each argument the length of its list, -1 for one that is none, and all that they hold."""
    lengths = [len(arg) if isinstance(arg, list) else -1 for arg in args]
    return lengths, [x for arg in args for x in (arg if isinstance(arg, list) else (arg,))]


def _unflatten(lengths: list[int], flat: Sequence[Any]) -> list[Any]:
    rest = iter(flat)
    return [[next(rest) for _ in range(n)] if n >= 0 else next(rest) for n in lengths]
