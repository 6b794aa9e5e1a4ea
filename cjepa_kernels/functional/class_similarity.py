"""Mean similarities within and across the classes of a batch, for the losses that have labels."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import ClassSimilarityForward
from cjepa_kernels.functional import dispatch
from cjepa_kernels.ops import registry

_NAME = "class_similarity"


def class_similarity(
    z_i: Tensor,
    z_j: Tensor | None,
    classes: Tensor,
    *,
    use_cosine_similarity: bool,
    eps: float,
    backend: Backend,
) -> ClassSimilarityForward:
    """Mean similarities, of rows rounded as the operators of a back end round them.

    Args:
        z_i: (B, D) floating point, the first B of the M rows.
        z_j: (B, D), of the same dtype, the other rows; or None.
        classes: (B,) int64 on the same device. Rows k and B + k have the same class.
        use_cosine_similarity: Normalise the rows.
        eps: Lower bound on the norm used for normalisation.
        backend: A checked name.
    """
    if backend == "reference":
        z = z_i if z_j is None else torch.cat([z_i, z_j])
        with dispatch.without_autocast(z.device):
            return reference.class_similarity(
                ops.saveable(z),
                classes if z_j is None else classes.repeat(2),
                use_cosine_similarity=use_cosine_similarity,
                eps=eps,
            )
    overload = dispatch.choose_overload(backend, z_i.device)
    product_dtype = dispatch.product_dtype(z_i)
    rounded = product_dtype or z_i.dtype
    out: ClassSimilarityForward = ops.call(
        _NAME,
        # A back end that has no implementation of this operator leaves it to the dispatcher.
        overload if (_NAME, overload) in registry.functions else "",
        z_i=z_i,
        z_j=z_j,
        classes=classes,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        product_dtype=product_dtype,
        tf32=rounded == torch.float32 and dispatch.rounds_to_tf32(overload, z_i),
    )
    return out
