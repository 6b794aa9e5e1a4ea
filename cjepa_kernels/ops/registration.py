"""How an operator and its backward are registered with PyTorch: the same way for all of them.

``cjepa_kernels::<name>`` dispatches on the device: the compiled module registers itself for the
CPU, the Triton kernels are registered for CUDA, and ``CompositeExplicitAutograd`` is the chunked
path that serves every other device. The overloads ``<name>.chunked`` and ``<name>.triton`` have one
path alone, for those who ask for it by name.

``<name>_dynamic`` is the same operator with each number as a tensor on the CPU. torch.compile
recompiles for every new value of a number in a schema, but not for a new value of a tensor. The
operator reads the numbers when it runs and calls ``<name>`` with them. Its results, and the choices
that a kernel makes by a number, are therefore those of ``<name>``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
_numbers: dict[str, tuple[int, ...]] = {}  # by name: the positions of its numbers


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
    refuse_transforms(name, args)
    args = tuple(saveable(arg) for arg in args)
    if torch.compiler.is_compiling():
        return _call_compiled(name, overload, args)
    if not torch.is_grad_enabled():
        return operator(name, overload)(*args)  # type: ignore[no-any-return]
    return _functions[name, overload](*args)  # type: ignore[no-any-return]


def is_transformed() -> bool:
    """Whether torch.func transforms what runs now, or forward-mode derivatives may be taken."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(name: str, args: Sequence[Any]) -> None:
    """Raise under torch.func, and where an argument has a tangent, which would be lost."""
    if not is_transformed():
        return
    what = "cannot be transformed by torch.func (vmap, grad, jvp, hessian, ...)"
    if not torch._C._are_functorch_transforms_active():
        what = "has no forward-mode derivative"
        # No function of its own: torch.compile would trace it, and traced tensors show no tangent.
        dual = torch.compiler.is_compiling()
        for x in _flatten(args)[1]:
            if isinstance(x, Tensor) and not dual:
                dual = forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        if not dual:
            return
    raise RuntimeError(f'{name} {what} in this back end; use backend="reference"')


def _call_compiled(name: str, overload: str, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """A number that changed between calls is symbolic, and goes in as a tensor."""
    # Not at the top: the module imports SymPy. While a compiler runs it has been imported.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    def is_static(value: Any) -> bool:
        values = value if isinstance(value, (tuple, list)) else (value,)
        return all(has_static_value(number) for number in values)

    numbers = _numbers[name]
    if all(is_static(args[k]) for k in numbers):
        return operator(name, overload)(*args)  # type: ignore[no-any-return]
    tensors = [_as_tensor(arg) if k in numbers else arg for k, arg in enumerate(args)]
    return operator(f"{name}_dynamic", overload)(*tensors)  # type: ignore[no-any-return]


def _as_tensor(value: float | tuple[float, ...] | list[float]) -> Tensor:
    """A number as (), several as (L,): fp64 on the CPU."""
    if isinstance(value, (tuple, list)):
        return torch.stack([_as_tensor(number) for number in value])
    # A product, since the compiler turns a symbolic factor into a tensor, but not a fill value.
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def saveable(arg: Any) -> Any:
    """What autograd can save for a backward, in place of a tensor made under inference_mode.

    That is a copy, as the plain formulas keep one: nothing would notice that a bank was written to,
    under inference_mode again, before the backward. torch.compile cannot ask what a tensor is, and
    the backward of its graph computes cheap results again from the tensor that cannot be saved.
    There every tensor without a gradient is copied by an operator. Lists are not copied there: they
    hold the sides of the prediction loss, whose time is that of reading them.
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
    """Define the operator and its backward, in every overload and with numbers as tensors."""
    names = (definition.name, f"{definition.name}_backward")
    dynamic = replace(
        definition,
        name=f"{definition.name}_dynamic",
        schema=_numbers_as_tensors(definition.schema),
        schema_backward=_numbers_as_tensors(definition.schema_backward),
    )
    for overload in OVERLOADS:
        implementations = definition.triton if overload == ".triton" else definition.chunked
        gradients = _register(definition, overload, implementations)
        _functions[definition.name, overload] = _make_function(definition, overload, gradients)
        if overload == "" and HAS_TRITON:
            for name, implementation in zip(names, definition.triton, strict=True):
                _library.impl(name, implementation, "CUDA")
        _register(dynamic, overload, [_read_numbers(operator(name, overload)) for name in names])
    _numbers[definition.name] = _number_positions(operator(definition.name))


def register_plain(
    name: str, schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Define an operator without a gradient: in PyTorch, and where it is built in native code."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _operators[name, ""] = getattr(torch.ops.cjepa_kernels, name).default
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _numbers_as_tensors(schema: str) -> str:
    arguments, results = schema.split("->")
    return re.sub(r"\bfloat(\[\])? ", "Tensor ", arguments) + "->" + results


def _number_positions(operator: Any) -> tuple[int, ...]:
    """Which arguments are floats or lists of floats."""
    types = [str(argument.type) for argument in operator._schema.arguments]
    return tuple(k for k, of in enumerate(types) if of in ("float", "List[float]"))


def _read_numbers(operator: Any) -> Implementation:
    numbers = _number_positions(operator)

    def call_with_numbers(*args: Any) -> Any:
        return operator(*(arg.tolist() if k in numbers else arg for k, arg in enumerate(args)))

    return call_with_numbers


def _register(
    definition: Definition, overload: str, implementations: Sequence[Implementation]
) -> Callable[..., tuple[Any, ...]]:
    """Define one overload of an operator and of its backward; returns its gradients."""
    forward, backward = f"{definition.name}{overload}", f"{definition.name}_backward{overload}"
    _library.define(forward + definition.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(backward + definition.schema_backward, tags=(torch.Tag.pt2_compliant_tag,))
    for name in (definition.name, f"{definition.name}_backward"):
        packet = getattr(torch.ops.cjepa_kernels, name)
        _operators[name, overload] = getattr(packet, overload.lstrip(".") or "default")
    for schema, implementation in zip((forward, backward), implementations, strict=True):
        _library.impl(schema, implementation, "CompositeExplicitAutograd")
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
    return gradients


def _make_gradients(definition: Definition, overload: str) -> Callable[..., tuple[Any, ...]]:
    backward = operator(f"{definition.name}_backward", overload)
    has_lists = "Tensor[]" in definition.schema  # vmap knows no way to run these one by one

    def quick_backward(*args: Any) -> Any:
        with _below_autograd():
            return backward(*args)

    def gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        if has_lists and any(x is not None and _is_batched(x) for x in upstream):
            raise RuntimeError(
                f"{definition.name} takes one gradient at a time in this back end, not a batch of "
                '(is_grads_batched, vectorize); use backend="reference"'
            )
        # Who wants a second derivative meets the autograd that says that there is none.
        run = backward if torch.is_grad_enabled() else quick_backward
        return definition.gradients(ctx, run, *upstream)

    return gradients


def _is_batched(x: Tensor) -> bool:
    functorch: Any = torch._C._functorch
    return bool(functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x))


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
