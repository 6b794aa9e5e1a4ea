"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), in which kernels run on CPU tensors.

Without them it fails, is silently wrong, or takes half as long again: 3.6 with NumPy 2.4.
"""

from __future__ import annotations

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
    _repair_range()
    _repair_products()
    _repair_rounding()
    _repair_speed()


def _repair_range() -> None:
    """``range`` on tensor bounds: NumPy 2.4 makes int() of an array of one element an error."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # The scope restores the method that was there.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _repair_products() -> None:
    """``tl.dot`` of bf16, whose bit patterns it multiplies as integers.

    Products are summed in float64, so that an entry does not depend on the shape of its tile.
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
    """fp32 and fp64 to bf16: it truncates, where hardware rounds to the nearest, ties to even."""
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
    """Functions called by a kernel: each call replaces the whole language again, with the same."""
    patch_language = interpreter._patch_lang
    replaced: set[str] = set()  # modules, as long as a kernel runs

    def patch(function: Any) -> Any:
        modules = {m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core}
        if replaced and modules <= replaced:
            return interpreter._LangPatchScope()
        outermost = not replaced
        scope = patch_language(function)
        replaced.update(modules)
        if outermost:  # the only one that is restored
            restore = scope.restore

            def restore_and_forget() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch
