"""Registration of an operator and its backward with PyTorch, in the same way for all of them.

``cjepa_kernels::<name>`` is one operator with a kernel for each device: the compiled module
registers its own for the CPU, the Triton kernels are registered for CUDA, and the chunked back end
serves every other device. Each back end also has an overload, ``<name>.<back end>``, which always
runs that back end.

``<name>_dynamic`` is the same operator with each number as a tensor on the CPU. torch.compile
recompiles for every new value of a number in a schema, but not for a new value of a tensor. The
operator reads the numbers when it runs and calls ``<name>`` with them. Its results, and the choices
that a kernel makes by a number, are therefore those of ``<name>``. A CUDA graph would record the
numbers of its first run and repeat them for ever, so this operator has the tag that keeps it out of
CUDA graphs.

CONTRIBUTING.md adds an operator as an example. It takes one file in ``ops`` with a ``Definition``,
one file in the folder of each back end, one line in ``ops/__init__.py``, and one line in the
``OPERATORS`` of each back end.

It adds a back end as well: a folder whose ``OPERATORS`` maps the name of an operator to its
implementations in both directions, its name and a check of this machine in ``backends.py``, a call
of :func:`register_backend` in ``ops/__init__.py``, and its layer in the test of the imports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels.ops import registry
from cjepa_kernels.ops.definition import (
    Binding,
    Definition,
    Implementation,
    Implementations,
    bind,
    named_arguments,
    take,
)
from cjepa_kernels.ops.registry import flatten, operator, unflatten
from cjepa_kernels.triton.planned import raise_original

NAMESPACE = "cjepa_kernels"
# This guard skips the registered autograd, which is Python code under every call. torch._library
# uses it too.
_below_autograd: Any = torch._C._AutoDispatchBelowAutograd
AUTOCAST_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU"}
DEVICE_TYPES = {"CPU": "cpu", "CUDA": "cuda", "XPU": "xpu"}  # by dispatch key

# Any: the methods of Library carry no annotations.
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_definitions: dict[str, Definition] = {}
_bindings: dict[str, Binding] = {}


def define(definition: Definition) -> None:
    """Define an operator and its backward, which get their implementations by register_backend.

    Args:
        definition: The operator.
    """
    names = (definition.name, f"{definition.name}_backward")
    _definitions[definition.name] = definition
    _define_schemas(definition, "")
    results = (definition.results, definition.results_backward)
    for name, result in zip(names, results, strict=True):
        registry.arguments[name] = named_arguments(name, operator(name)._schema)
        registry.results[name] = result
    registry.numbers[definition.name] = _number_positions(operator(definition.name))
    registry.tensors[definition.name] = _tensor_positions(operator(definition.name))
    _bindings[definition.name] = bind(definition)
    _define_overload(definition, "")


def register_backend(
    backend: str,
    operators: Mapping[str, Implementations],
    *,
    dispatch_key: str | None = None,
    register_dispatched: Callable[[str, str, Implementation, str], None] | None = None,
    rounds_to_tf32: Callable[[Tensor], bool] | None = None,
) -> None:
    """Make a back end's implementations the overload ``.<back end>`` of the operators.

    Args:
        backend: Name of the back end.
        operators: By the name of an operator, its implementation and that of its backward. They
            take the arguments of the schema by position and return the results as a tuple.
        dispatch_key: PyTorch's dispatcher runs this back end for tensors of this key, so
            ``backend="auto"`` takes it there. ``"CUDA"`` stands for GPUs, and
            ``"CompositeExplicitAutograd"`` for every device without a key of its own.
        register_dispatched: Registers what the dispatcher runs, from the name and the schema of one
            direction, its implementation and the key. By default it is the implementation itself.
        rounds_to_tf32: Whether the back end rounds operands like its argument to tf32. By default
            it never does.
    """
    device_type = DEVICE_TYPES.get(dispatch_key or "")
    if device_type is not None:
        registry.dispatched[device_type] = backend
    if rounds_to_tf32 is not None:
        registry.rounds_to_tf32[backend] = rounds_to_tf32
    for name, implementations in operators.items():
        definition = _definitions[name]
        definition.implementations[backend] = implementations
        overload = f".{backend}"
        _define_schemas(definition, overload)
        for direction, schema, implementation in zip(
            (name, f"{name}_backward"),
            (definition.schema, definition.schema_backward),
            implementations,
            strict=True,
        ):
            _library.impl(direction + overload, implementation, "CompositeExplicitAutograd")
            if dispatch_key is None:
                continue
            if register_dispatched is None:
                _library.impl(direction, implementation, dispatch_key)
            else:
                register_dispatched(direction, schema, implementation, dispatch_key)
        _define_overload(definition, overload)


def register_compiled(backend: str, device_type: str) -> None:
    """Note that a compiled module has given the dispatcher its kernels for a type of device.

    The back end has no overloads. The dispatcher alone runs it.

    Args:
        backend: Name of the back end.
        device_type: For example ``"cpu"``.
    """
    registry.dispatched[device_type] = backend
    registry.only_dispatched.add(backend)


def register_plain(
    name: str, schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Define an operator without a gradient, in PyTorch; the compiled module may have one too."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    registry.operators[name, ""] = getattr(torch.ops.cjepa_kernels, name).default
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _define_schemas(definition: Definition, overload: str, *tags: torch.Tag) -> None:
    """Define the schemas of an overload, in both directions, with these tags and a usual one."""
    schemas = (definition.schema, definition.schema_backward)
    for name, schema in zip((definition.name, f"{definition.name}_backward"), schemas, strict=True):
        _library.define(name + overload + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        packet = getattr(torch.ops.cjepa_kernels, name)
        registry.operators[name, overload] = getattr(packet, overload.lstrip(".") or "default")


def _define_overload(definition: Definition, overload: str) -> None:
    """Register the parts of an overload that back ends share, and its ``_dynamic`` variant."""
    name = definition.name
    binding = _bindings[name]
    gradients = _register_shared(definition, overload, binding)
    registry.functions[name, overload] = _make_function(definition, overload, binding, gradients)
    dynamic = replace(
        definition,
        name=f"{name}_dynamic",
        schema=_numbers_as_tensors(definition.schema),
        schema_backward=_numbers_as_tensors(definition.schema_backward),
    )
    _define_schemas(dynamic, overload, torch.Tag.cudagraph_unsafe)
    for suffix in ("", "_backward"):
        implementation = _read_numbers(operator(name + suffix, overload))
        key = "CompositeExplicitAutograd"
        _library.impl(f"{dynamic.name}{suffix}{overload}", implementation, key)
    _register_shared(dynamic, overload, binding)


def _numbers_as_tensors(schema: str) -> str:
    arguments, results = schema.split("->")
    return re.sub(r"\bfloat(\[\])? ", "Tensor ", arguments) + "->" + results


def _number_positions(operator: Any) -> tuple[int, ...]:
    """Which arguments are floats or lists of floats."""
    types = [str(argument.type) for argument in operator._schema.arguments]
    return tuple(k for k, of in enumerate(types) if of in ("float", "List[float]"))


def _tensor_positions(operator: Any) -> tuple[int, ...]:
    """Which arguments are tensors, or None in place of one, or lists of tensors."""
    arguments = operator._schema.arguments
    return tuple(k for k, argument in enumerate(arguments) if "Tensor" in str(argument.type))


def _read_numbers(operator: Any) -> Implementation:
    """The implementation of ``<name>_dynamic``: it reads its numbers and calls the operator."""
    numbers = _number_positions(operator)

    def call_with_numbers(*args: Any) -> Any:
        return operator(*(arg.tolist() if k in numbers else arg for k, arg in enumerate(args)))

    return call_with_numbers


def _register_shared(
    definition: Definition, overload: str, binding: Binding
) -> Callable[..., tuple[Any, ...]]:
    """Register fakes, autograd and autocast of an overload; returns its gradients."""
    forward, backward = f"{definition.name}{overload}", f"{definition.name}_backward{overload}"
    fakes = (definition.fake, definition.fake_backward)
    arguments = (binding.arguments, binding.arguments_backward)
    for name, fake, of in zip((forward, backward), fakes, arguments, strict=True):
        named_fake = _make_fake(fake, of)
        if name == forward and definition.fake_of_overload is not None:
            named_fake = _make_fake_of_overload(definition, overload, of)
        torch.library.register_fake(f"{NAMESPACE}::{name}", named_fake, lib=_library)
    gradients = _make_gradients(definition, overload, binding)
    torch.library.register_autograd(
        f"{NAMESPACE}::{forward}",
        gradients,
        setup_context=_make_setup_context(binding),
        lib=_library,
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::{backward}", _make_no_double_backward(definition.name), lib=_library
    )
    takes_autocast = "product_dtype" in definition.schema
    for device_type, key in AUTOCAST_DEVICES.items() if takes_autocast else ():
        _library.impl(forward, _make_autocast(definition.name, overload, device_type), key)
    return gradients


def _make_fake(fake: Callable[[Any], tuple[Any, ...]], arguments: Any) -> Callable[..., Any]:
    def named_fake(*args: Any, **kwargs: Any) -> Any:
        # A plain tuple, as the dispatcher returns for an operator.
        return tuple(fake(arguments(*args, **kwargs)))

    return named_fake


def _make_fake_of_overload(
    definition: Definition, overload: str, arguments: Any
) -> Callable[..., Any]:
    """The fake of an operator of which some results depend on the overload."""
    fake: Any = definition.fake
    of_overload: Any = definition.fake_of_overload

    def named_fake(*args: Any, **kwargs: Any) -> Any:
        given = arguments(*args, **kwargs)
        return tuple(fake(given)._replace(**of_overload(given, overload)))

    return named_fake


def _make_setup_context(
    binding: Binding,
) -> Callable[[Any, Sequence[Any], tuple[Tensor, ...]], None]:
    """The function by which a forward saves the arguments of its backward."""
    take_saved, take_options = take(binding.saved_positions), take(binding.options)
    take_not_differentiable = take(binding.not_differentiable)

    def setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, ...]) -> None:
        saved = take_saved((*inputs, *output))
        if binding.lists:
            ctx.lengths = [len(inputs[k]) for k in binding.lists]
            ctx.needs = [True] * len(inputs)  # autograd counts the tensors of lists one by one
            for k in binding.flags:
                ctx.needs[k] = _requires_grad(inputs[k])
            ctx.saved_lengths, flat = flatten(saved)
            ctx.save_for_backward(*flat)
        else:
            ctx.save_for_backward(*saved)
        ctx.options = take_options(inputs)
        ctx.mark_non_differentiable(*take_not_differentiable(output))
        ctx.set_materialize_grads(False)

    return setup_context


def _requires_grad(tensors: Tensor | Sequence[Tensor]) -> bool:
    """Whether a tensor, or any tensor of a list, requires a gradient."""
    if isinstance(tensors, Tensor):
        return tensors.requires_grad
    return any(tensor.requires_grad for tensor in tensors)


def _make_backward(
    definition: Definition, overload: str, binding: Binding
) -> Callable[..., tuple[Any, ...] | None]:
    """The function that runs the backward: of a context, the upstream gradients and the flags.

    It returns None if there is no upstream gradient.
    """
    backward = operator(f"{definition.name}_backward", overload)
    complete = definition.complete

    def run(*args: Any) -> Any:
        # A second derivative meets the registered autograd, which says that there is none.
        if torch.is_grad_enabled():
            return backward(*args)
        try:
            with _below_autograd():
                return backward(*args)
        except RuntimeError as error:
            raise_original(error)

    def run_backward(ctx: Any, upstream: Sequence[Tensor | None], flags: Sequence[bool]) -> Any:
        for x in upstream:
            if x is not None:
                break
        else:
            return None
        saved = ctx.saved_tensors
        if binding.lists:
            saved = unflatten(ctx.saved_lengths, saved)
        if complete is not None:
            upstream = complete(binding.saved(*saved), *upstream)
        return run(*upstream, *saved, *ctx.options, *flags)

    return run_backward


def _make_gradients(
    definition: Definition, overload: str, binding: Binding
) -> Callable[..., tuple[Any, ...]]:
    """The function that gives each input its gradient, for the registered autograd."""
    run_backward = _make_backward(definition, overload, binding)
    take_upstream, take_flags = take(binding.upstream), take(binding.flags)
    inputs, lists = binding.inputs, binding.lists
    nothing = (None,) * len(binding.arguments._fields)

    def gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        grads = run_backward(ctx, take_upstream(upstream), take_flags(needs))
        if grads is None:
            return nothing
        of_inputs: list[Any] = list(nothing)
        for k, grad in zip(inputs, grads, strict=True):
            if needs[k]:
                of_inputs[k] = grad
        return tuple(of_inputs)

    def gradients_of_lists(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        # vmap has no way to run an operator with lists for one gradient at a time.
        if any(x is not None and _is_batched(x) for x in upstream):
            raise RuntimeError(
                f"{definition.name} takes one gradient at a time in this back end, not a batch of "
                '(is_grads_batched, vectorize); use backend="reference"'
            )
        of_inputs: list[Any] = list(nothing)
        for k, length in zip(lists, ctx.lengths, strict=True):
            of_inputs[k] = [None] * length
        grads = run_backward(ctx, take_upstream(upstream), take_flags(ctx.needs))
        if grads is not None:
            for k, grad in zip(inputs, grads, strict=True):
                if ctx.needs[k]:
                    of_inputs[k] = grad
        return tuple(of_inputs)

    return gradients_of_lists if lists else gradients


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
    definition: Definition,
    overload: str,
    binding: Binding,
    gradients: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """The operator with its autograd, in the way that costs the least time per call."""
    operator_forward = operator(definition.name, overload)

    def run_forward(args: Sequence[Any]) -> Any:
        try:
            with _below_autograd():
                return operator_forward(*args)
        except RuntimeError as error:
            raise_original(error)

    if binding.lists:
        return _make_function_of_lists(definition.name, run_forward, binding, gradients)
    run_backward = _make_backward(definition, overload, binding)
    inputs, upstream = binding.inputs, binding.upstream
    take_inputs, take_differentiable = take(inputs), take(upstream)
    take_saved, take_options = take(binding.saved_positions), take(binding.options)
    take_flags = take([inputs.index(k) for k in binding.flags])

    class Function(torch.autograd.Function):
        """Autograd sees the inputs and results that can have a gradient, because each costs time.

        ``args`` are all arguments. ``results`` is an empty list, which gets all results.
        """

        @staticmethod
        def forward(ctx: Any, args: Sequence[Any], results: list[Tensor], *_: Any) -> Any:
            output = run_forward(args)
            ctx.save_for_backward(*take_saved((*args, *output)))
            ctx.options = take_options(args)
            ctx.set_materialize_grads(False)
            results += output
            return take_differentiable(output)

        @staticmethod
        def backward(ctx: Any, *grads_of_results: Tensor | None) -> Any:
            needs = ctx.needs_input_grad[2:]
            grads = run_backward(ctx, grads_of_results, take_flags(needs))
            if grads is None:
                return (None,) * (2 + len(inputs))
            return None, None, *[g if need else None for g, need in zip(grads, needs, strict=True)]

    def call(*args: Any) -> list[Tensor]:
        results: list[Tensor] = []
        differentiable = Function.apply(args, results, *take_inputs(args))  # type: ignore[no-untyped-call]
        for k, result in zip(upstream, differentiable, strict=True):
            results[k] = result
        return results

    Function.__name__ = definition.name
    return call


def _make_function_of_lists(
    name: str,
    run_forward: Callable[[Sequence[Any]], Any],
    binding: Binding,
    gradients: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """The same for an operator that takes lists of tensors.

    Autograd sees no tensor inside a list, so lists are taken apart on the way in and out.
    """
    setup_context = _make_setup_context(binding)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lengths: list[int], *flat: Any) -> Any:
            args = unflatten(lengths, flat)
            output = run_forward(args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> Any:
            return None, *flatten(gradients(ctx, *upstream))[1]

    def call(*args: Any) -> Any:
        lengths, flat = flatten(args)
        return Function.apply(lengths, *flat)  # type: ignore[no-untyped-call]

    Function.__name__ = name
    return call
