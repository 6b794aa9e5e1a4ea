"""The rows whose products a back end takes, for what is computed beside the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import accumulation_dtype
from cjepa_kernels.functional import dispatch


def operand_rows(
    z: Tensor,
    *,
    use_cosine_similarity: bool,
    eps: float,
    backend: Backend,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows normalised and rounded as the operators of a back end do it.

    The gradient is that of the rows before rounding, as in the back ends.

    Args:
        z: (M, D) floating point, of the dtype that both sides have in the operator.
        use_cosine_similarity: Normalise the rows.
        eps: Lower bound on the norm used for normalisation.
        backend: A checked name.
        product_dtype: The dtype to which the operators round. Default: autocast's, or that of z.

    Returns:
        (M, D) in fp32 (fp64 for fp64).
    """
    rounded: torch.dtype | None = None
    tf32 = False
    if backend != "reference":
        rounded = product_dtype or dispatch.product_dtype(z) or z.dtype  # autocast is still on
        overload = dispatch.choose_overload(backend, z.device)
        tf32 = rounded == torch.float32 and dispatch.rounds_to_tf32(overload, z)
    with dispatch.without_autocast(z.device):
        rows = reference.embed_rows(ops.saveable(z), use_cosine_similarity, eps)
        if rounded is None:
            return rows
        operands = reference.round_operands(rows.detach(), rounded, tf32=tf32)
        return rows + (operands - rows.detach())


def widened(*sides: Tensor) -> tuple[list[Tensor], torch.dtype | None]:
    """The sides in the accumulation dtype, and the dtype to which the product rounds them.

    The gradient of a query then comes in parts that are not rounded to half precision before they
    are added. The parts nearly cancel where a negative is close to the positive.
    """
    dtype = sides[0].dtype
    wide = accumulation_dtype(dtype)
    product_dtype = dispatch.product_dtype(sides[0]) or (None if dtype == wide else dtype)
    return [side.to(wide) for side in sides], product_dtype
