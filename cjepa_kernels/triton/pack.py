"""The operands of the products: rows normalised, rounded, interleaved and padded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cjepa_kernels.triton.common import LN2, read_scale, round_to_tf32

ROW_MULTIPLE = 128  # padded rows: a multiple of every tile's sides
PROGRAMS = 1024  # at most: each leaves one row of sums
BLOCK_ELEMENTS = 4096
WEIGHT_SCALE = 2.0**13
LARGEST_EXPONENT = 111  # of 2, with room for sums and for the scale of the weights
PLANES = 3  # bf16 numbers that hold the 24 bits of an fp32 one


@triton.jit
def load_rows(
    view_0, view_1, rows, columns, row_valid, column_valid,
    stride_0, feature_stride_0, stride_1, feature_stride_1, VIEWS: tl.constexpr,
):  # fmt: skip
    """Rows of the interleaved batch, in fp32: row r is row r // VIEWS of view r % VIEWS."""
    sample = (rows // VIEWS).to(tl.int64)[:, None]
    feature = columns.to(tl.int64)[None, :]
    valid = row_valid[:, None] & column_valid[None, :]
    first = valid
    if VIEWS == 2:
        first = valid & (rows % 2 == 0)[:, None]
    x = tl.load(view_0 + sample * stride_0 + feature * feature_stride_0, mask=first, other=0.0)
    x = x.to(tl.float32)
    if VIEWS == 2:
        second = valid & (rows % 2 == 1)[:, None]
        y = tl.load(view_1 + sample * stride_1 + feature * feature_stride_1, mask=second, other=0.0)
        x += y.to(tl.float32)
    return x


@triton.jit
def unit_rows(x, eps, COSINE: tl.constexpr):
    """x / max(|x|, eps), and |x|; the rows themselves without COSINE.

    Rounded correctly: the projection of a gradient that is nearly parallel to its row magnifies the
    error of a division of 2 units in the last place, which is Triton's own.
    """
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    if COSINE:
        x = tl.div_rn(x, tl.broadcast_to(tl.maximum(norm, eps)[:, None], x.shape))
    else:
        x += x - x  # inf becomes NaN, as the loss has to: its dot products may be -inf alone
    return x, norm


@triton.jit
def weigh(
    row, weights, shifts, pulls, saved_shift, log_sums, positive, grad, largest, temperature,
    rows, grad_stride, weight_scale,
    PAIRS: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr,
):  # fmt: skip
    """Per padded row, 0 beyond the rows: what multiplies its exponentials, their shift, its pull.

    PAIRS: w = g r / sum with r = sigmoid(LSE- - l_pos), pull = g r, rows interleaved; else
    w = g / sum. The largest |g| is left to the end (a gradient that is not PER_ROW altogether): no
    weight leaves its range because of a loss scale.
    """
    valid = row < rows
    at = row
    if PAIRS:
        at = (row % 2) * (rows // 2) + row // 2
    inverse_tau = (read_scale(temperature, TAU_TENSOR) * LN2).to(tl.float64)
    shift = tl.load(saved_shift + at, mask=valid, other=0.0)
    log_sum = tl.load(log_sums + at, mask=valid, other=0.0).to(tl.float64)
    g = tl.full(row.shape, 1.0, tl.float64)
    if PER_ROW:
        g = tl.load(grad + at.to(tl.int64) * grad_stride, mask=valid, other=0.0).to(tl.float64)
        top = tl.load(largest).to(tl.float64)
        g = tl.where(top > 0, g / top, g)
    none = log_sum == float("-inf")  # no negatives: r is 0, and nothing pulls
    if PAIRS:
        s = tl.load(positive + at, mask=valid, other=0.0)
        gap = (shift.to(tl.float64) - s) * inverse_tau + log_sum
        g = g / (1.0 + tl.exp(-gap))
        tl.store(pulls + row, tl.where(valid, g, 0.0).to(tl.float32))
    exponent = -log_sum
    if CONSTANT:  # the tiles' exponentials are relative to 1, whatever the saved ones are
        exponent += (1.0 - shift.to(tl.float64)) * inverse_tau
    w = tl.where(valid & ~none, g * tl.exp(tl.where(none, 0.0, exponent)), 0.0)
    tl.store(weights + row, (w * weight_scale).to(tl.float32))
    tl.store(shifts + row, shift)


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def pack_kernel(
    view_0, view_1, z, sums, squares, counter, rows, features, padded_rows,
    stride_0, feature_stride_0, stride_1, feature_stride_1, eps,
    weights, shifts, pulls, saved_shift, log_sums, positive, grad, largest, temperature,
    grad_stride, weight_scale,
    VIEWS: tl.constexpr, PLANES: tl.constexpr, COSINE: tl.constexpr, ROUND: tl.constexpr,
    TF32: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    WEIGH: tl.constexpr, PER_ROW: tl.constexpr, CONSTANT: tl.constexpr, TAU_TENSOR: tl.constexpr,
):  # fmt: skip
    """z: (PLANES * padded_rows, PADDED); sums: (programs, WIDTH), squares: (programs,).

    Each program takes every programs-th block of rows and leaves the sum of its rounded rows and of
    their squared norms, from which the mean similarity of all pairs follows. With WEIGH, for a
    backward, it leaves the weights of its rows.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(counter, 0)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for block in range(program, padded_rows // ROWS, tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        x = load_rows(
            view_0, view_1, row, column, row < rows, column < features,
            stride_0, feature_stride_0, stride_1, feature_stride_1, VIEWS,
        )  # fmt: skip
        unit, _ = unit_rows(x, eps, COSINE)
        unit = unit.to(ROUND).to(tl.float32)
        if TF32:
            unit = round_to_tf32(unit)
        total += tl.sum(unit, 0)
        square += tl.sum(unit * unit, 1)
        to = row.to(tl.int64)[:, None] * PADDED + column[None, :]
        plane = tl.cast(padded_rows, tl.int64) * PADDED
        if WEIGH:
            weigh(
                row, weights, shifts, pulls, saved_shift, log_sums, positive, grad, largest,
                temperature, rows, grad_stride, weight_scale, VIEWS == 2, PER_ROW, CONSTANT,
                TAU_TENSOR,
            )  # fmt: skip
        for p in tl.static_range(PLANES):  # each holds what the planes before it leave
            part = unit.to(z.dtype.element_ty)
            tl.store(z + p * plane + to, part, mask=(column < PADDED)[None, :])
            unit -= part.to(tl.float32)
    tl.store(sums + program * WIDTH + column, total)
    tl.store(squares + program, tl.sum(square, 0))


@dataclass(frozen=True)
class Temperature:
    """A number, or a tensor on the device that nobody may read on the host."""

    number: float
    tensor: Tensor | None

    @property
    def argument(self) -> Tensor | float:
        """What a kernel takes."""
        return self.number if self.tensor is None else self.tensor

    @property
    def is_tensor(self) -> bool:
        """Whether it takes a pointer."""
        return self.tensor is not None

    def constant_shift(self, cosine: bool) -> bool:
        """Whether exponents may all be taken relative to 1 / tau: |s| <= 1.02 and fp32 holds them.

        A tensor's running maxima serve every temperature.
        """
        exponent = 2.05 * math.log2(math.e) / self.number
        return self.tensor is None and cosine and exponent < LARGEST_EXPONENT


@dataclass(frozen=True)
class Upstream:
    """What a forward saved of one side's rows, and the gradient that reaches them.

    Attributes:
        shift, log_sum: (rows,) as saved; positive: the same of pairs, else None.
        grad: () or (rows,); largest: () the largest |grad|, or the scalar itself.
    """

    shift: Tensor
    log_sum: Tensor
    positive: Tensor | None
    grad: Tensor
    largest: Tensor
    temperature: Temperature
    constant: bool


@dataclass(frozen=True)
class Weights:
    """Per padded row: what multiplies its exponentials, their shift and, of pairs, its pull.

    Attributes:
        scale: Of the weights: the products with them are to be divided by it.
    """

    weight: Tensor
    shift: Tensor
    pull: Tensor
    scale: float


@dataclass(frozen=True)
class Packed:
    """Rows in the order of the tiles.

    Attributes:
        z: (planes * padded_rows, padded_features) operands of the product.
        sums: (programs, width) sums of rows; squares: (programs,) of their squared norms.
        counter: () zero, for the kernel whose last program finishes the work.
        weights: Of the rows, for a backward.
    """

    views: tuple[Tensor, ...]
    z: Tensor
    sums: Tensor
    squares: Tensor
    counter: Tensor
    rows: int
    features: int
    planes: int
    weights: Weights | None

    @property
    def padded_rows(self) -> int:
        return len(self.z) // self.planes

    @property
    def padded_features(self) -> int:
        return self.z.shape[1]


def round_up(x: int, multiple: int) -> int:
    """The next multiple of ``multiple``."""
    return (x + multiple - 1) // multiple * multiple


def view_arguments(views: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Both pointers (the same for one view) and four strides."""
    pair = (views[0], views[-1])
    return pair, (*pair[0].stride(), *pair[1].stride())


def element_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        dtype
    ]


def row_block(width: int) -> int:
    """Rows that a program of an elementwise kernel takes at a time."""
    return max(2, min(ROW_MULTIPLE, BLOCK_ELEMENTS // width))


def pack(
    views: tuple[Tensor, ...],
    *,
    cosine: bool,
    eps: float,
    rounded: torch.dtype,
    planes: int,
    tf32: bool,
    depth_multiple: int,
    upstream: Upstream | None = None,
) -> Packed:
    """Normalise, round and lay out one tensor, or two views interleaved.

    Args:
        views: One or two (B, D) tensors, any strides.
        cosine: Normalise rows.
        eps: Lower bound on the norm used for normalisation.
        rounded: dtype that the operands are rounded to.
        planes: 1, or 3 for fp32 operands as sums of three bf16 numbers.
        tf32: Round fp32 operands of one plane to tf32.
        depth_multiple: What the padded number of features must be a multiple of.
        upstream: For a backward: weigh the rows.
    """
    first = views[0]
    rows, features = len(views) * len(first), first.shape[1]
    padded_rows, padded = round_up(rows, ROW_MULTIPLE), round_up(features, depth_multiple)
    width = triton.next_power_of_2(padded)
    block = row_block(width)
    programs = min(PROGRAMS, padded_rows // block)
    dtype = torch.bfloat16 if planes > 1 else rounded
    z = first.new_empty(planes * padded_rows, padded, dtype=dtype)
    sums = first.new_empty(programs, width, dtype=torch.float32)
    squares = first.new_empty(programs, dtype=torch.float32)
    counter = first.new_empty((), dtype=torch.int32)
    weights = None
    arguments: tuple[Any, ...] = (z,) * 8 + (1.0, 0, 1.0)
    if upstream is not None:
        floats = [first.new_empty(padded_rows, dtype=torch.float32) for _ in range(3)]
        # fp16 has too few exponents for the probabilities of a large batch.
        scale = WEIGHT_SCALE if rounded == torch.float16 else 1.0
        weights = Weights(floats[0], floats[1], floats[2], scale)
        positive = upstream.shift if upstream.positive is None else upstream.positive
        per_row = upstream.grad.ndim == 1
        arguments = (
            *floats, upstream.shift, upstream.log_sum, positive, upstream.grad, upstream.largest,
            upstream.temperature.argument, upstream.grad.stride(0) if per_row else 0,
            scale,
        )  # fmt: skip
    pointers, strides = view_arguments(views)
    pack_kernel[(programs,)](
        *pointers, z, sums, squares, counter, rows, features, padded_rows, *strides, eps,
        *arguments,
        VIEWS=len(views), PLANES=planes, COSINE=cosine, ROUND=element_type(rounded),
        TF32=tf32,
        PADDED=padded, WIDTH=width, ROWS=block, WEIGH=upstream is not None,
        PER_ROW=upstream is not None and upstream.grad.ndim == 1,
        CONSTANT=upstream is not None and upstream.constant,
        TAU_TENSOR=upstream is not None and upstream.temperature.is_tensor, num_warps=4,
    )  # fmt: skip
    return Packed(views, z, sums, squares, counter, rows, features, planes, weights)
