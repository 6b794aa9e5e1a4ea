"""SupCon in plain PyTorch autograd, with several M x M matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.definitions import EPS, TEMPERATURE, Reduction, SupConOutput
from cjepa_kernels.reference.class_similarity import means_of_classes
from cjepa_kernels.reference.rows import (
    embed_rows,
    logsumexp_without,
    positive_temperature,
    raise_to_bound,
    reduce_counted,
)


def sup_con(
    z: Tensor,
    classes: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    reduction: Reduction = "mean",
) -> SupConOutput:
    """SupCon of anchors whose positives are the other rows of their class.

    loss_a = LSE_a - mean of the logits of a's positives, where LSE runs over all other rows. With
    one positive, this is softplus(LSE-_a - l_pos) with LSE- over the rows without the positive.

    Args:
        z: (M, D).
        classes: (M,) int64, any numbers.
        temperature: Float or 0-dim tensor; a tensor outside of 1e-30 to 1e30 gives NaN.
        use_cosine_similarity: Cosine of the rows if true, else their dot product.
        eps: Lower bound on the norm used for normalisation.
        reduction: ``mean`` over the anchors with a positive, ``sum`` or ``none``.

    Returns:
        SupConOutput.

    Source: SupCon, arXiv 2004.11362, equation 2.
    """
    embedded = embed_rows(z, use_cosine_similarity, eps)
    similarity = embedded @ embedded.T  # (M, M)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    is_positive = (classes[:, None] == classes) & ~itself
    positives = is_positive.sum(dim=1)  # (M,)
    alone = positives == 1
    # Of the same similarities as the log-sum-exps: in tight classes the gradients of both cancel.
    of_classes = means_of_classes(similarity, classes)
    logit = of_classes.within / positive_temperature(temperature)  # (M,)
    lse = logsumexp_without(
        similarity / positive_temperature(temperature),
        itself | (is_positive & alone[:, None]),
        dim=1,
    )
    losses = torch.where(alone, -F.logsigmoid(logit - lse), lse - logit)
    losses = raise_to_bound(losses, positives).where(positives > 0, 0.0)
    losses = losses.masked_fill(embedded.isnan().any(), torch.nan)
    tau = positive_temperature(temperature)
    if isinstance(tau, Tensor):
        losses = losses.masked_fill(tau.isnan(), torch.nan)
    loss = reduce_counted(losses, positives > 0, reduction)
    with torch.no_grad():
        return SupConOutput(
            loss=loss,
            positive_similarity=(of_classes.within * positives).sum() / positives.sum(),
            negative_similarity=of_classes.across,
            lse=torch.where(alone, torch.logaddexp(lse, logit), lse),
            num_anchors=(positives > 0).sum(),
        )
