"""Rows as the chunked back end takes them: how many at a time, rounded, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.reference.rows import embed_rows, positive_temperature

# 2^21 elements are 8 MB in fp32. The working set of a chunk then stays near the caches, and at
# M = 32768 a chunk still has 64 rows, enough for the matrix product to run at full speed.
TILE_ELEMENTS = 2**21
MIN_CHUNK_ROWS = 32


def chunk_rows(rows: int, columns: int | None = None) -> int:
    """Number of rows that are multiplied with all columns at a time.

    A buffer takes ``chunk_rows(M, N) * N`` numbers.

    Args:
        rows: M.
        columns: N, by default M.
    """
    return min(rows, max(MIN_CHUNK_ROWS, TILE_ELEMENTS // (columns or rows)))


def choose_temperature(tensor: Tensor | None, number: float) -> float | Tensor:
    """The temperature of an operator's two arguments: the tensor if there is one."""
    return positive_temperature(number if tensor is None else tensor)


def operands(
    z: Tensor, use_cosine_similarity: bool, eps: float, product_dtype: torch.dtype | None
) -> Tensor:
    """(M, D) rows of the product: rounded to the product's dtype, in the accumulation dtype."""
    rows = embed_rows(z, use_cosine_similarity, eps)
    return rows.to(product_dtype or z.dtype).to(rows.dtype)


def shift_of(largest: Tensor) -> Tensor:
    """(M,) similarity to subtract in each row: its largest one that counts, 0 without any."""
    return largest.masked_fill(largest == -torch.inf, 0.0)


def sum_of(log_sum: Tensor) -> Tensor:
    """(M,) sum of exponentials by which weights are divided: 1 without any, whose weight is 0."""
    return log_sum.exp().masked_fill(log_sum == -torch.inf, 1.0)


def take_positives(tile: Tensor, positives: Tensor) -> Tensor:
    """The similarities of positives in a tile, where -inf then takes their place.

    Args:
        tile: (chunk, N).
        positives: (chunk,) the columns of the positives. -1 stands for none, whose similarity is 0.
            Another number out of range gives NaN: on a GPU nobody could check it.
    """
    column = positives.clamp(0, tile.shape[1] - 1)[:, None]
    similarity = tile.gather(1, column)
    none = (positives == -1)[:, None]
    tile.scatter_(1, column, similarity.where(none, -torch.inf))
    known = (positives >= -1) & (positives < tile.shape[1])
    return similarity.masked_fill(none, 0.0).squeeze(1).masked_fill(~known, torch.nan)


def project(grad: Tensor, z: Tensor, eps: float) -> None:
    """Take a gradient back through the normalisation, in place.

    With u the unit row, the result is (grad - (grad . u) u) / norm, and 0 where the norm is <= eps.

    Args:
        grad: (M, D) gradient of the unit rows; becomes the gradient of the rows themselves.
        z: (M, D) the rows in the dtype of ``grad``, overwritten.
        eps: Lower bound on the norm used for normalisation.
    """
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    unit = z.div_(norm.clamp(min=eps))
    radial = (grad * unit).sum(dim=1, keepdim=True)
    grad.addcmul_(radial, unit, value=-1).div_(norm)
    grad.masked_fill_(norm <= eps, 0.0)
