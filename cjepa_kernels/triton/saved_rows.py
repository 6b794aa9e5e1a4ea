"""Memory that the forward of NT-Xent saves for its backward: packed rows, and weights if known.

Everything lies in one tensor of bytes: the rows, then the weights. This module does not import
Triton, and torch.compile traces its functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cjepa_kernels.triton.configs import TILE
from cjepa_kernels.triton.operands import (
    depth_block,
    planes_of,
    round_up,
    rounded_dtype,
    stored_dtype,
)

LARGEST_NUMBER, LARGEST_DEPTH = 6, 64  # bytes of three planes, and features of a step, at most
WEIGHT_BYTES = 3 * 4  # of a row: three fp32 numbers, which ``pack.Weights`` describes


class Form(NamedTuple):
    """How saved rows lie in memory.

    Attributes:
        padded_rows: Rows, padded to whole tiles.
        padded_features: Features, padded to whole steps of the product.
        rounded: dtype to which the rows are rounded.
        planes: 3 if fp32 rows are held as sums of three bf16 numbers, else 1.
        has_weights: Whether weights follow the rows.
    """

    padded_rows: int
    padded_features: int
    rounded: torch.dtype
    planes: int
    has_weights: bool


def form_of(z_i: Tensor, product_dtype: torch.dtype | None, reduction: str) -> Form:
    """The form of what a forward saves.

    Without a reduction each row has an upstream gradient of its own, and only the backward can
    compute the weights.

    Args:
        z_i: (B, D), one of the two views.
        product_dtype: As the operator takes it.
        reduction: As the operator takes it.
    """
    pairs, features = z_i.shape
    rounded = rounded_dtype(z_i.dtype, product_dtype)
    planes = planes_of(rounded)
    return Form(
        padded_rows=round_up(2 * pairs, TILE),
        padded_features=round_up(features, depth_block(rounded, planes, features)),
        rounded=rounded,
        planes=planes,
        has_weights=reduction != "none",
    )


def row_bytes(form: Form) -> int:
    """Bytes of the rows."""
    itemsize = 4 if stored_dtype(form.rounded, form.planes) == torch.float32 else 2
    return form.planes * form.padded_rows * form.padded_features * itemsize


def saved_bytes(form: Form) -> int:
    """Bytes of the rows and their weights."""
    return row_bytes(form) + (WEIGHT_BYTES * form.padded_rows if form.has_weights else 0)


def fits(limit: int, z_i: Tensor, product_dtype: torch.dtype | None, reduction: str) -> bool:
    """Whether what a forward saves takes at most so many bytes.

    Args:
        limit: Bytes.
        z_i: As for :func:`form_of`, like the others.
        product_dtype: The same.
        reduction: The same.
    """
    pairs, features = z_i.shape
    # No form takes more than this. The bound spares small batches, which wait for the host, most of
    # the arithmetic.
    if (2 * pairs + TILE) * (LARGEST_NUMBER * (features + LARGEST_DEPTH) + WEIGHT_BYTES) <= limit:
        return True
    return saved_bytes(form_of(z_i, product_dtype, reduction)) <= limit


@dataclass(frozen=True)
class SavedRows:
    """The memory of what a forward saves.

    Attributes:
        memory: uint8, all of it: the operator's result ``kept``.
        form: How the rows lie in it.
    """

    memory: Tensor
    form: Form

    @property
    def z(self) -> Tensor:
        """(planes * padded rows, padded features) operands of the products."""
        form = self.form
        rows = self.memory[: row_bytes(form)].view(stored_dtype(form.rounded, form.planes))
        return rows.view(form.planes * form.padded_rows, form.padded_features)

    @property
    def weights(self) -> Tensor | None:
        """(3, padded rows) fp32, or None if only the backward can compute them."""
        if not self.form.has_weights:
            return None
        return self.memory[row_bytes(self.form) :].view(torch.float32).view(3, -1)
