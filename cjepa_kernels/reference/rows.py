"""Rows, temperatures and reductions as every formula of the reference uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.definitions import LARGEST, SMALLEST, Reduction, accumulation_dtype


def normalize_rows(z: Tensor, eps: float) -> Tensor:
    """Divide rows by max(norm, eps); a row with norm <= eps is a constant (zero gradient).

    Args:
        z: (..., D) floating point.
        eps: Lower bound on the norm used for normalisation.

    Returns:
        (..., D) in fp32 (fp64 for fp64): unit rows, so their products are cosines.
    """
    z = z.to(accumulation_dtype(z.dtype))
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    regular = norm > eps
    # The inner where keeps 0 / 0 out of the branch that is not taken, whose gradient would be NaN.
    return torch.where(regular, z / torch.where(regular, norm, 1.0), z.detach() / eps)


def scale_of_rows(z: Tensor) -> Tensor:
    """A power of two for each row that keeps the squares of its elements from overflowing.

    The factor is 1 for rows whose largest element is at most 2^50. It brings larger rows to about
    2^40: their squares do not overflow, and the eps of a LayerNorm is still negligible beside them.

    Args:
        z: (..., D) in fp32 or fp64.

    Returns:
        (..., 1) like z, detached.
    """
    largest = z.detach().abs().amax(dim=-1, keepdim=True)
    large = (largest > 2.0**50) & largest.isfinite()
    exponent = torch.frexp(largest.where(large, 2.0**39)).exponent
    return torch.ldexp(torch.ones_like(largest), (40 - exponent).to(z.dtype))


def embed_rows(z: Tensor, use_cosine_similarity: bool, eps: float) -> Tensor:
    """The M rows whose inner products are the similarities s.

    An infinity becomes NaN in both modes: by the division by the norm for cosine similarity, and
    by an explicit term for the dot product.

    Returns:
        (M, D) in fp32 (fp64 for fp64).
    """
    if use_cosine_similarity:
        return normalize_rows(z, eps)
    z = z.to(accumulation_dtype(z.dtype))
    return z + (z - z).detach()


def round_operands(rows: Tensor, dtype: torch.dtype, *, tf32: bool) -> Tensor:
    """Operands of a product: rounded to a dtype or to tf32, in the accumulation dtype.

    Args:
        rows: (M, D) in fp32 or fp64.
        dtype: The dtype to which a back end rounds.
        tf32: Round fp32 to the 10 bits of mantissa that the GPU's tensor cores take.
    """
    if tf32:  # as round_to_tf32 in triton/kernels/operands.py
        bits = (rows.view(torch.int32) + 0x1000) & ~0x1FFF
        return torch.where(rows == rows, bits.view(torch.float32), rows)
    return rows.to(dtype).to(rows.dtype)


def positive_temperature(temperature: float | Tensor) -> float | Tensor:
    """NaN in place of a tensor temperature out of range, without reading it on the host."""
    if isinstance(temperature, Tensor):
        valid = (temperature >= SMALLEST) & (temperature <= LARGEST)
        return torch.where(valid, temperature, float("nan"))
    return temperature


def with_rounding(largest: Tensor, features: int) -> Tensor:
    """The largest similarity of a negative, raised by the rounding of a product.

    A positive from another product than its negatives may differ by that much from a negative that
    is the same row. Within it a negative ties with the positive, and so the positive is no hit.

    Args:
        largest: Similarities in fp32 or fp64; -inf stays -inf.
        features: D, the number of terms of a product.
    """
    rounding: float = torch.finfo(largest.dtype).eps * features**0.5
    return largest + rounding * largest.abs().masked_fill(largest == -torch.inf, 0.0)


def mark_unknown(similarity: Tensor, positives: Tensor, columns: int) -> Tensor:
    """The similarities of positives, NaN for a positive that is neither a column nor -1.

    Args:
        similarity: (M,)
        positives: (M,) int64.
        columns: How many columns there are.
    """
    return similarity.masked_fill((positives < -1) | (positives >= columns), torch.nan)


def logsumexp_without(logits: Tensor, excluded: Tensor, dim: int) -> Tensor:
    """Log-sum-exp over the entries that are not excluded; over none it is -inf, without a gradient.

    Args:
        logits: (M, N).
        excluded: (M, N) bool.
        dim: The dimension that is summed over.

    Returns:
        (M,) or (N,)
    """
    anything = ~excluded.all(dim=dim, keepdim=True)
    # Over nothing the gradient would be NaN. So the entries stay here, and the result is replaced.
    lse = torch.logsumexp(logits.masked_fill(excluded & anything, -torch.inf), dim=dim)
    return torch.where(anything.squeeze(dim), lse, -torch.inf)


def reduce(loss: Tensor, reduction: Reduction) -> Tensor:
    """Apply ``mean``, ``sum`` or ``none`` to per-element losses."""
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


def raise_to_bound(losses: Tensor, positives: Tensor) -> Tensor:
    """SupCon losses of anchors, at least log of the number of positives, their exact lower bound.

    Rounding may leave less. The gradient stays as it is.

    Args:
        losses: (M,)
        positives: (M,) int64, the number of each anchor's positives.
    """
    bound = positives.clamp(min=1).to(losses.dtype).log()
    return losses + (bound - losses.detach()).clamp(min=0)


def reduce_counted(loss: Tensor, counts: Tensor, reduction: Reduction) -> Tensor:
    """Apply a reduction to the losses that count; the others are 0 already.

    Args:
        loss: (M,)
        counts: (M,) bool. If nothing counts, the mean is 0.
        reduction: ``mean`` over the losses that count, ``sum`` or ``none``.
    """
    if reduction == "mean":
        return loss.sum() / counts.sum().clamp(min=1)
    return reduce(loss, reduction)
