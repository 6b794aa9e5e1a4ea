"""SupCon of a group of ranks: what the ranks compare before they exchange rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels.definitions import Reduction
from cjepa_kernels.distributed import group as ranks_of_group
from cjepa_kernels.distributed.group import YES_OR_NO, Setting, shared_settings
from cjepa_kernels.distributed.whole_batch import WholeBatch

OF = "SupCon"  # for errors
SETTINGS = 11  # the number of settings that the ranks compare


def agree(
    z: Tensor,
    *,
    views: int,
    has_labels: bool,
    temperature: float | Tensor,
    product_dtype: torch.dtype | None,
    is_reference: bool,
    needs_gradient: bool,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    group: dist.ProcessGroup,
) -> WholeBatch:
    """Exchange the numbers of rows, and check that all ranks have the same options.

    Args:
        z: (M_r, D) rows of this rank, those of all views of its samples.
        views: V, or 0 for rows that are no views of samples.
        has_labels: Whether samples have labels.
        temperature: A number, or a 0-dim tensor.
        product_dtype: The dtype to which autocast rounds the operands of the product.
        is_reference: Whether the back end is the reference.
        needs_gradient: Whether the rows or the temperature need a gradient.
        use_cosine_similarity: Cosine similarity, else the dot product.
        eps: Lower bound on the norm used for normalisation.
        reduction: ``mean``, ``sum`` or ``none``.
        group: The ranks.

    Raises:
        ValueError: On all ranks alike, if a rank refused its arguments or has another option.
        RuntimeError: A rank ended, or did not take part before the timeout.
    """
    settings = shared_settings(
        "embeddings",
        z,
        temperature=temperature,
        product_dtype=product_dtype,
        is_reference=is_reference,
        needs_gradient=needs_gradient,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        reduction=reduction,
    )
    settings += [
        Setting("the number of views of embeddings (0 without views)", views),
        Setting("whether labels are given", has_labels, YES_OR_NO),
    ]
    if len(settings) != SETTINGS:
        raise RuntimeError(f"expected {SETTINGS} settings, got {len(settings)}")
    ranks = ranks_of_group.agree(z, settings, group, row="row", of=OF)
    return WholeBatch(ranks, group, OF)


def refuse(device: torch.device, group: dist.ProcessGroup) -> None:
    """Tell the other ranks, which are in :func:`agree`, that this rank refuses its arguments."""
    ranks_of_group.refuse(device, group, settings=SETTINGS, of=OF)
