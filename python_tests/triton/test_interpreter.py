"""Tests of each repair of Triton's interpreter. Run them with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") != "1":
    pytest.skip("TRITON_INTERPRET=1 runs kernels on CPU tensors", allow_module_level=True)

import triton
import triton.language as tl

from cjepa_kernels.triton import interpreter

interpreter.repair()


@triton.jit
def count_kernel(bounds, out):  # type: ignore[no-untyped-def]
    total = 0
    for i in range(tl.load(bounds), tl.load(bounds + 1)):
        total += i
    tl.store(out, total)


def test_range_takes_bounds_that_are_tensors() -> None:
    out = torch.zeros((), dtype=torch.int32)
    count_kernel[(1,)](torch.tensor([3, 7], dtype=torch.int32), out)
    assert out.item() == 3 + 4 + 5 + 6


@triton.jit
def product_kernel(a, b, c, out):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), tl.load(c + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_exact_up_to_the_last_rounding(dtype: torch.dtype) -> None:
    a, b, c = torch.randn(3, 16, 16)
    a, b = a.to(dtype), b.to(dtype)
    out = torch.empty(16, 16)
    product_kernel[(1,)](a, b, c, out)
    torch.testing.assert_close(out, (a.double() @ b.double() + c).float(), rtol=0, atol=0)


@triton.jit
def divide_kernel(x, out):  # type: ignore[no-untyped-def]
    tl.store(out, 1.0 / x)


def test_floats_are_numbers_of_fp32() -> None:
    out = torch.empty((), dtype=torch.float64)
    divide_kernel[(1,)](0.1, out)
    assert out.item() == (1 / torch.tensor(0.1)).item()


@triton.jit
def round_kernel(x, out):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 1024)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


def rounding_inputs() -> Tensor:
    """Numbers of random bits, among them ties, infinities and a NaN."""
    bits = torch.randint(-(2**31), 2**31, (1024,), dtype=torch.int64).to(torch.int32)
    bits[::4] = (bits[::4] & ~0xFFFF) | 0x8000  # These lie halfway between two bf16 numbers.
    x = bits.view(torch.float32).clone()
    x[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return x


def test_rounding_to_bf16_is_to_the_nearest_and_to_even() -> None:
    x = rounding_inputs()
    out = torch.empty(1024, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_tensors_keep_their_own_handle_shape_and_dtype() -> None:
    """They share attributes with earlier tensors of their type, and with no other."""
    types = {
        "first": tl.block_type(tl.float32, [16, 4]),
        "other_dtype": tl.block_type(tl.int32, [16, 4]),
        "same_type": tl.block_type(tl.float32, [16, 4]),
        "other_shape": tl.block_type(tl.float32, [tl.constexpr(4), tl.constexpr(16)]),
        "number": tl.float32,
        "pointer": tl.pointer_type(tl.float32),
    }
    tensors = [tl.tensor(handle, one) for handle, one in types.items()]
    assert [x.handle for x in tensors] == list(types)
    assert [x.type for x in tensors] == list(types.values())
    assert [[n.value for n in x.shape] for x in tensors] == [[16, 4]] * 3 + [[4, 16], [], []]
    assert [x.numel.value for x in tensors] == [64] * 4 + [1, 1]
    assert [x.dtype for x in tensors] == [one.scalar for one in types.values()]
    assert types["first"] == types["same_type"]
    assert types["first"] not in (types["other_dtype"], types["other_shape"])


def test_repairs_are_applied_once() -> None:
    builder = interpreter.interpreter.InterpreterBuilder
    before = builder.create_dot, builder.cast_impl, tl.tensor.__init__, tl.block_type.__init__
    interpreter.repair()
    after = builder.create_dot, builder.cast_impl, tl.tensor.__init__, tl.block_type.__init__
    assert after == before
