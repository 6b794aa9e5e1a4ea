"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), in which kernels run on CPU tensors.

Without the repairs the interpreter of Triton 3.6 with NumPy 2.4 stops with errors, gives wrong
results without an error, and takes 3 times as long.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy
import triton.language as tl
from triton.runtime import interpreter

_repaired = False


def repair() -> None:
    """Apply the repairs once."""
    global _repaired
    if _repaired:
        return
    _repaired = True
    _repair_numbers()
    _repair_range()
    _repair_products()
    _repair_rounding()
    _repair_speed()


def _repair_numbers() -> None:
    """Take a float as the fp32 number that a GPU's kernel gets; the interpreter keeps the fp64 one.

    It would compute with it in fp64, and 1 / tau would not be the number of the GPU.
    """
    convert = interpreter._implicit_cvt

    def convert_in_fp32(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(numpy.array([argument], "f4"), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = convert_in_fp32


def _repair_range() -> None:
    """Let ``range`` take tensors: int() of an array of one element is an error in NumPy 2.4."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # When the kernel ends, the scope puts back the method that was there before.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _repair_products() -> None:
    """Let ``tl.dot`` multiply bf16 as numbers; the interpreter multiplies their bits as integers.

    The sums are taken in fp64, so an entry does not depend on the shape of its tile.
    """
    builder = interpreter.InterpreterBuilder

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = numpy.matmul(_decode(a).astype("f8"), _decode(b).astype("f8"), dtype="f8")
        total = (product + d.data).astype(d.data.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    builder.create_dot = create_dot


def _decode(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(numpy.uint32) << 16).view(numpy.float32)
    return handle.data


def _repair_rounding() -> None:
    """Round to bf16 as the hardware does, to the nearest and ties to even; it cuts bits off."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar not in (tl.float32, tl.float64) or dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        bits = numpy.ascontiguousarray(source.data, dtype=numpy.float32).view(numpy.uint32)
        rounded = ((bits + (numpy.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(numpy.uint16)
        nan = numpy.isnan(source.data)
        return interpreter.TensorHandle(numpy.where(nan, 0x7FC0, rounded), tl.bfloat16)

    builder.cast_impl = cast_impl


def _repair_speed() -> None:
    _patch_once()
    _check_no_overflow()
    _remember_dtypes()
    _remember_types()


def _check_no_overflow() -> None:
    """Compute sums of integers once.

    The interpreter computes them a second time in int64 for an assertion about overflows, which it
    then leaves out, because its option ``debug`` is off.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_dtypes() -> None:
    """Keep NumPy's dtype of each type; the interpreter makes a table anew for each look-up."""
    find = interpreter._get_np_dtype
    found: dict[str, Any] = {}  # by the name of the type of one number

    def find_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    interpreter._get_np_dtype = find_once


def _remember_types() -> None:
    """Let tensors of one type share all attributes but the handle, which holds their numbers.

    Each operation makes a tensor, and each tensor made about ten objects that describe its shape.
    """
    make_tensor, make_type = tl.tensor.__init__, tl.block_type.__init__
    tensors: dict[str, dict[str, Any]] = {}  # attributes by the name of the type
    types: dict[tuple[Any, ...], dict[str, Any]] = {}  # those of a type by its name and shape

    def tensor_once(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, None, type)
            tensors[type.name] = self.__dict__.copy()
        self.__dict__.update(tensors[type.name], handle=handle)

    def type_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(length, "value", length) for length in shape))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = self.__dict__.copy()
        self.__dict__.update(types[key])

    tl.tensor.__init__ = tensor_once
    tl.block_type.__init__ = type_once


def _patch_once() -> None:
    """Patch Triton's language once for a kernel, not again for each function that it calls."""
    patch_language = interpreter._patch_lang
    replaced: set[str] = set()  # modules that are patched while a kernel runs

    @functools.cache
    def modules_of(function: Any) -> set[str]:
        return {m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core}

    def patch(function: Any) -> Any:
        modules = modules_of(function)
        if replaced and modules <= replaced:
            return interpreter._LangPatchScope()
        outermost = not replaced
        scope = patch_language(function)
        replaced.update(modules)
        if outermost:  # Only the patch of the kernel itself is taken back.
            restore = scope.restore

            def restore_and_forget() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch
