"""Mean similarities within and across classes in plain PyTorch autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.definitions import EPS, ClassSimilarityForward
from cjepa_kernels.reference.rows import embed_rows


def class_similarity(
    z: Tensor,
    classes: Tensor,
    *,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
) -> ClassSimilarityForward:
    """The mean similarity of each row and the rest of its class, and of rows of two classes.

    Args:
        z: (M, D).
        classes: (M,) int64, any numbers.
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.

    Returns:
        ClassSimilarityForward; ``across`` is detached.
    """
    rows = embed_rows(z, use_cosine_similarity, eps)
    return means_of_classes(rows @ rows.T, classes)


def means_of_classes(similarity: Tensor, classes: Tensor) -> ClassSimilarityForward:
    """The means of ``class_similarity`` from all similarities.

    Args:
        similarity: (M, M).
        classes: (M,) int64, any numbers.
    """
    same = classes[:, None] == classes
    other = same & ~torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    others = other.sum(dim=1)
    return ClassSimilarityForward(
        within=similarity.where(other, 0.0).sum(dim=1) / others.clamp(min=1),
        across=similarity.detach().masked_fill(same, 0.0).sum() / (~same).sum(),
    )
