"""The operands of the products: rows normalised, rounded, interleaved and padded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cjepa_kernels.triton.kernels.pack import pack_kernel

ROW_MULTIPLE = 128  # padded rows: a multiple of every tile's sides
PROGRAMS = 1024  # at most: each leaves one row of sums
BLOCK_ELEMENTS = 4096
WEIGHT_SCALE = 2.0**13
LARGEST_EXPONENT = 111  # of 2, with room for sums and for the scale of the weights
LARGEST_LOGITS = 2.05  # tau times the largest exponent in base e, with a constant shift
PLANES = 3  # bf16 numbers that hold the 24 bits of an fp32 one


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
        exponent = LARGEST_LOGITS * math.log2(math.e) / self.number
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
