"""How the package calls its operators: by names, with little Python in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cjepa_kernels.ops import registry
from cjepa_kernels.ops.registry import differentiable, flatten, operator
from cjepa_kernels.triton.planned import raise_original


def run(name: str, overload: str, **arguments: Any) -> Any:
    """Call an operator or a backward by the names of its arguments, with the registered autograd.

    Args:
        name: Name of the operator, for example ``"nt_xent"`` or ``"nt_xent_backward"``.
        overload: An empty string lets the dispatcher choose; ``".chunked"`` is a back end.
        **arguments: All arguments of the schema.

    Returns:
        The results as the definition's named tuple.
    """
    outputs = operator(name, overload)(*registry.arguments[name](**arguments))
    return registry.results[name](*outputs)


def call(name: str, overload: str, *args: Any, **named: Any) -> Any:
    """Call an operator with its gradient, with as little Python in between as possible.

    The registered autograd is Python code under every call and takes most of a small batch's time.
    It serves torch.compile, torch.export and direct calls of the operator.

    Args:
        name: Name of the operator.
        overload: An empty string lets the dispatcher choose; ``".chunked"`` is a back end.
        *args: The first arguments of the schema.
        **named: The other arguments of the schema.

    Returns:
        The results as the definition's named tuple.
    """
    if named:
        args = registry.arguments[name](*args, **named)
    if is_transformed():
        refuse_transforms(name, args)
    if torch.compiler.is_compiling():
        outputs = _call_compiled(name, overload, tuple(saveable(arg) for arg in args))
    elif not torch.is_grad_enabled():
        try:
            outputs = operator(name, overload)(*args)
        except RuntimeError as error:
            raise_original(error)
    else:
        for k in registry.tensors[name]:
            arg = args[k]
            if arg is not None and _is_of_inference(arg):
                args = tuple(_saveable_eagerly(x) for x in args)
                break
        outputs = differentiable(name, overload)(*args)
    return registry.results[name](*outputs)


def is_transformed() -> bool:
    """Whether torch.func transforms the current call, or a forward-mode level is open."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(name: str, args: Sequence[Any]) -> None:
    """Raise under torch.func, and where an argument has a tangent, which would be lost."""
    if not is_transformed():
        return
    what = "cannot be transformed by torch.func (vmap, grad, jvp, hessian, ...)"
    if not torch._C._are_functorch_transforms_active():
        what = "has no forward-mode derivative"
        # This loop is no function of its own, because torch.compile would trace that function and
        # a traced tensor does not show its tangent.
        dual = torch.compiler.is_compiling()
        for x in flatten(args)[1]:
            if isinstance(x, Tensor) and not dual:
                dual = forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        if not dual:
            return
    raise RuntimeError(f'{name} {what} in this back end; use backend="reference"')


def saveable(arg: Any) -> Any:
    """An argument that autograd can save for a backward.

    Autograd cannot save a tensor that was made under inference_mode, so it is copied, as the plain
    formulas copy it: autograd would not notice if a memory bank were written to, under
    inference_mode again, before the backward. torch.compile cannot tell such tensors apart, and the
    backward of its graph computes cheap results again from the tensor that cannot be saved. Under
    torch.compile an operator therefore copies every tensor without a gradient. It does not copy
    lists: they hold the sides of the prediction loss, whose time is that of reading them.
    """
    if not torch.is_grad_enabled():
        return arg
    if torch.compiler.is_compiling():
        is_constant = isinstance(arg, Tensor) and not arg.requires_grad
        return operator("copy")(arg) if is_constant else arg
    return _saveable_eagerly(arg)


def _is_of_inference(arg: Tensor | Sequence[Tensor]) -> bool:
    """Whether a tensor, or any tensor of a list, was made under inference_mode."""
    if isinstance(arg, Tensor):
        return arg.is_inference()
    return any(tensor.is_inference() for tensor in arg)


def _saveable_eagerly(arg: Any) -> Any:
    """The same where autograd is on and nothing is compiled."""
    if isinstance(arg, Tensor):
        return arg.clone() if arg.is_inference() else arg
    return [_saveable_eagerly(x) for x in arg] if isinstance(arg, list) else arg


def _call_compiled(name: str, overload: str, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Call the operator, or ``<name>_dynamic`` if a number changed between calls.

    Such a number is symbolic for torch.compile.
    """
    # This import is not at the top because it imports SymPy. A running compiler has imported SymPy
    # already.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    def is_static(value: Any) -> bool:
        values = value if isinstance(value, (tuple, list)) else (value,)
        return all(has_static_value(number) for number in values)

    numbers = registry.numbers[name]
    if all(is_static(args[k]) for k in numbers):
        return operator(name, overload)(*args)  # type: ignore[no-any-return]
    tensors = [_as_tensor(arg) if k in numbers else arg for k, arg in enumerate(args)]
    return operator(f"{name}_dynamic", overload)(*tensors)  # type: ignore[no-any-return]


def _as_tensor(value: float | tuple[float, ...] | list[float]) -> Tensor:
    """A number as (), several as (L,): fp64 on the CPU."""
    if isinstance(value, (tuple, list)):
        return torch.stack([_as_tensor(number) for number in value])
    # It is a product because the compiler can turn a symbolic factor into a tensor, but not a
    # symbolic fill value.
    return torch.ones((), dtype=torch.float64, device="cpu") * value
