"""The operands of the matrix products: rows normalised, rounded, interleaved and padded.

``kernels/pack.py`` holds the kernel, and ``kernels/weights.py`` derives the weights of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.kernels.pack import pack_kernel
from cjepa_kernels.triton.kernels.weights import (
    attraction_kernel,
    positive_weights_kernel,
    weights_kernel,
)
from cjepa_kernels.triton.operands import round_up, stored_dtype
from cjepa_kernels.triton.recording import new_zeros, run_kernel
from cjepa_kernels.triton.saved_rows import SavedRows
from cjepa_kernels.triton.temperature import Temperature

PROGRAMS = 1024  # The kernel runs at most this many programs. Each leaves one row of sums.
BLOCK_ELEMENTS = 4096  # elements of whole rows that a program takes at a time
WEIGHT_SCALE = 2.0**13  # of fp16 weights, which have too few exponents for a large batch

_ELEMENT_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Upstream:
    """What a forward saved of the rows of one side, and the gradient that reaches them.

    Attributes:
        shift: (rows,) fp32, as the forward returned it.
        log_sum: (rows,) fp32, as the forward returned it.
        positive: (rows,) fp32, as the forward of NT-Xent returned it; None elsewhere.
        grad: () or (rows,).
        largest_grad: () the largest |grad|, or ``grad`` itself if that is one number.
        temperature: The temperature.
        constant: Whether the backward's exponentials are relative to 1 / tau.
    """

    shift: Tensor
    log_sum: Tensor
    positive: Tensor | None
    grad: Tensor
    largest_grad: Tensor
    temperature: Temperature
    constant: bool


@dataclass(frozen=True)
class Weights:
    """The weights of rows for a backward; ``kernels/weights.py`` defines them.

    Attributes:
        weight: (padded rows,) fp32, w_a times ``scale``.
        shift: (padded rows,) fp32, the shift of the row's exponentials.
        positive: (padded rows,) fp32, the positive's weight w+_a; not written without positives.
        scale: Products with the weights must be divided by it.
    """

    weight: Tensor
    shift: Tensor
    positive: Tensor
    scale: float

    @staticmethod
    def of(numbers: Tensor, rounded: torch.dtype) -> Weights:
        """Weights in the memory of ``numbers``: (3, padded rows) fp32.

        Args:
            numbers: The memory.
            rounded: dtype of the operands, which the weights must suit.
        """
        weight, shift, positive = numbers.unbind()
        return Weights(weight, shift, positive, weight_scale(rounded))


@dataclass(frozen=True)
class Packed:
    """Rows in the order of the tiles.

    Attributes:
        views: The one or two tensors that were packed.
        z: (planes * padded rows, padded features) operands of the products.
        feature_sums: (programs, width) fp32 sums of rows. Only a forward needs them, so rows that a
            forward saved have none.
        squared_norms: (programs,) fp32 sums of the rows' squared norms; the same holds for them.
        counter: () int32 zero. The kernel whose last program finishes the work counts with it.
        rows: Rows of all views.
        features: Features of the views.
        planes: 3 if fp32 rows are held as sums of three bf16 numbers, else 1.
        weights: Weights of the rows, for a backward.
    """

    views: tuple[Tensor, ...]
    z: Tensor
    feature_sums: Tensor
    squared_norms: Tensor
    counter: Tensor
    rows: int
    features: int
    planes: int
    weights: Weights | None

    @property
    def padded_rows(self) -> int:
        return self.z.shape[0] // self.planes

    @property
    def padded_features(self) -> int:
        return self.z.shape[1]


def weights_of(packed: Packed) -> Weights:
    """The weights of rows that were packed for a backward."""
    if packed.weights is None:
        raise ValueError("rows have no weights: pack the rows with `upstream` before a backward")
    return packed.weights


def cdiv(x: int, y: int) -> int:
    """x / y rounded up. ``triton.cdiv`` takes 2 us, because it also serves kernels."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The smallest power of 2 that is not below x; ``triton.next_power_of_2`` takes 2 us."""
    return 1 << (x - 1).bit_length()


def view_arguments(views: tuple[Tensor, ...]) -> dict[str, Any]:
    """Pointers and strides of both views as the kernels name them; one view is passed twice."""
    first, last = views[0], views[-1]
    stride_0, feature_stride_0 = first.stride()
    stride_1, feature_stride_1 = last.stride()
    return {
        "view_0": first,
        "view_1": last,
        "stride_0": stride_0,
        "feature_stride_0": feature_stride_0,
        "stride_1": stride_1,
        "feature_stride_1": feature_stride_1,
    }


def row_block(width: int) -> int:
    """Rows that a program of an elementwise kernel takes at a time."""
    return max(2, min(TILE, BLOCK_ELEMENTS // width))


def weight_scale(rounded: torch.dtype) -> float:
    """The factor that weights carry for operands of a dtype."""
    return WEIGHT_SCALE if rounded == torch.float16 else 1.0


def _weigh_arguments(
    upstream: Upstream | None, weights: Weights | None, unused: Tensor
) -> dict[str, Any]:
    """The kernel's arguments for the weights; if there are none, it does not use ``unused``."""
    if upstream is None or weights is None:
        return {
            "weight_out": unused,
            "shift_out": unused,
            "positive_weight_out": unused,
            "saved_shift": unused,
            "saved_log_sum": unused,
            "saved_positive": unused,
            "grad": unused,
            "largest_grad": unused,
            "temperature": 1.0,
            "grad_stride": 0,
            "weight_scale": 1.0,
            "PAIRS": False,
            "PER_ROW": False,
            "CONSTANT": False,
            "TAU_TENSOR": False,
        }
    per_row = upstream.grad.ndim == 1
    return {
        "weight_out": weights.weight,
        "shift_out": weights.shift,
        "positive_weight_out": weights.positive,
        "saved_shift": upstream.shift,
        "saved_log_sum": upstream.log_sum,
        "saved_positive": upstream.shift if upstream.positive is None else upstream.positive,
        "grad": upstream.grad,
        "largest_grad": upstream.largest_grad,
        "temperature": upstream.temperature.argument,
        "grad_stride": upstream.grad.stride(0) if per_row else 0,
        "weight_scale": weights.scale,
        "PAIRS": upstream.positive is not None,
        "PER_ROW": per_row,
        "CONSTANT": upstream.constant,
        "TAU_TENSOR": upstream.temperature.is_tensor,
    }


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
    out: Tensor | None = None,
) -> Packed:
    """Normalise, round and lay out one tensor, or two views interleaved.

    Args:
        views: One or two (B, D) tensors, any strides.
        cosine: Normalise the rows.
        eps: Lower bound on the norm used for normalisation.
        rounded: dtype to which the operands are rounded.
        planes: 1, or 3 for fp32 operands as sums of three bf16 numbers.
        tf32: Round fp32 operands of one plane to tf32.
        depth_multiple: The padded number of features is a multiple of it.
        upstream: For a backward: compute the weights of the rows.
        out: Memory of the result ``z``; by default it gets memory of its own.
    """
    first = views[0]
    rows, features = len(views) * first.shape[0], first.shape[1]
    padded_rows, padded_features = round_up(rows, TILE), round_up(features, depth_multiple)
    width = next_power_of_2(padded_features)
    block = row_block(width)
    programs = min(PROGRAMS, padded_rows // block)
    weights = None
    if upstream is not None:
        weight, shift, positive = (
            first.new_empty(padded_rows, dtype=torch.float32) for _ in range(3)
        )
        weights = Weights(
            weight=weight, shift=shift, positive=positive, scale=weight_scale(rounded)
        )
    if out is None:
        out = first.new_empty(
            planes * padded_rows, padded_features, dtype=stored_dtype(rounded, planes)
        )
    packed = Packed(
        views=views,
        z=out,
        feature_sums=first.new_empty(programs, width, dtype=torch.float32),
        squared_norms=first.new_empty(programs, dtype=torch.float32),
        counter=first.new_empty((), dtype=torch.int32),
        rows=rows,
        features=features,
        planes=planes,
        weights=weights,
    )
    run_kernel(
        pack_kernel, programs,
        **view_arguments(views), z=packed.z, feature_sums=packed.feature_sums,
        squared_norms=packed.squared_norms, counter=packed.counter, rows=rows, features=features,
        padded_rows=padded_rows, eps=eps, **_weigh_arguments(upstream, weights, packed.z),
        WEIGH=upstream is not None, VIEWS=len(views), PLANES=planes, COSINE=cosine,
        ROUND=_ELEMENT_TYPES[rounded], TF32=tf32, PADDED=padded_features, WIDTH=width, ROWS=block,
        num_warps=4,
    )  # fmt: skip
    return packed


def weigh_positives(
    packed: Packed,
    grad: Tensor,
    *,
    largest_grad: Tensor,
    temperature: Temperature,
    in_products: bool,
) -> None:
    """Compute the weights of positives, into those of the packed rows.

    Args:
        packed: The rows, with weights.
        grad: (rows,) upstream gradients of the similarities of the rows' positives.
        largest_grad: () the number by which all weights are divided.
        temperature: The temperature.
        in_products: Whether the products add the positives, and not ``finish_kernel``.
    """
    weights = weights_of(packed)
    run_kernel(
        positive_weights_kernel, cdiv(packed.rows, TILE), grad=grad, stride=grad.stride(0),
        largest_grad=largest_grad, temperature=temperature.argument, rows=packed.rows,
        weight_scale=weights.scale if in_products else -1.0, weight_out=weights.positive,
        VIEWS=len(packed.views), TAU_TENSOR=temperature.is_tensor, ROWS=TILE, num_warps=4,
    )  # fmt: skip


def attraction(
    packed: Packed, class_weights: Tensor, grad: Tensor, *, largest_grad: Tensor
) -> Tensor:
    """(padded rows,) fp32: what each row of a view subtracts from the coefficients of its class.

    Args:
        packed: The rows, with weights, to which the result is relative.
        class_weights: (rows,) 1 / (number of other rows in the class), or 0.
        grad: (rows,) upstream gradients of the log-sum-exps.
        largest_grad: () the number by which all weights are divided.
    """
    out = packed.z.new_empty(packed.padded_rows, dtype=torch.float32)
    run_kernel(
        attraction_kernel, packed.padded_rows // TILE, grad=grad, stride=grad.stride(0),
        largest_grad=largest_grad, class_weights=class_weights, rows=packed.rows,
        weight_scale=weights_of(packed).scale, weight_out=out, ROWS=TILE, num_warps=4,
    )  # fmt: skip
    return out


def restore(views: tuple[Tensor, ...], saved: SavedRows, upstream: Upstream) -> Packed:
    """The rows that a forward saved, with their weights.

    The forward has saved the weights too if the upstream gradient is one number. Gradients of rows
    are known in the backward only, so this function then computes the weights.

    Args:
        views: The tensors that the forward packed.
        saved: What it saved.
        upstream: As for ``pack``.
    """
    form, first = saved.form, views[0]
    # The kernel that computes weights clears the counter. Without it, the counter is only read for
    # the gradient of a temperature.
    clear = form.has_weights and upstream.temperature.is_tensor
    counter = (
        new_zeros(first, dtype=torch.int32) if clear else first.new_empty((), dtype=torch.int32)
    )
    numbers = saved.weights
    if numbers is None:
        numbers = first.new_empty(3, form.padded_rows, dtype=torch.float32)
    weights = Weights.of(numbers, form.rounded)
    rows = len(views) * first.shape[0]
    if not form.has_weights:
        run_kernel(
            weights_kernel, form.padded_rows // TILE, counter=counter, rows=rows,
            **_weigh_arguments(upstream, weights, saved.z), VIEWS=len(views), ROWS=TILE,
            num_warps=4,
        )  # fmt: skip
    return Packed(
        views=views,
        z=saved.z,
        feature_sums=counter.new_empty(0),
        squared_norms=counter.new_empty(0),
        counter=counter,
        rows=rows,
        features=first.shape[1],
        planes=form.planes,
        weights=weights,
    )
