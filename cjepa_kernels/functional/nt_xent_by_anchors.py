"""NT-Xent with labels, and DCL: losses of anchors from the operator ``self_logsumexp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import NTXentOutput, Reduction
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.anchors import gap, softplus
from cjepa_kernels.functional.class_similarity import class_similarity
from cjepa_kernels.functional.self_logsumexp import run_self_logsumexp


def nt_xent_by_anchors(
    z_i: Tensor,
    z_j: Tensor,
    classes: Tensor | None,
    *,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    decoupled: bool,
    backend: Backend,
) -> NTXentOutput:
    """NT-Xent of one process, with checked arguments.

    Args:
        z_i: (B, D).
        z_j: (B, D), of the same dtype.
        classes: (B,) int64; samples of one class are no negatives of each other. None: all are.
        temperature: Float or 0-dim tensor.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation.
        reduction: ``mean`` over the 2B anchors, ``sum``, or ``none``.
        decoupled: Leave the positive out of the sum.
        backend: A checked name.
    """
    temperature = ops.saveable(checks.wide(temperature))
    rows: dict[str, Any] = {"use_cosine_similarity": use_cosine_similarity, "eps": eps}
    if backend == "reference":
        with dispatch.without_autocast(z_i.device):
            terms = reference.nt_xent(
                ops.saveable(z_i),
                ops.saveable(z_j),
                temperature=temperature,
                mask=None if classes is None else classes[:, None] == classes,
                decoupled=decoupled,
                **rows,
            )
        return NTXentOutput(reference.reduce(terms.loss, reduction), *terms[1:])
    out = run_self_logsumexp(
        z_i,
        z_j,
        classes=classes,
        temperature=temperature,
        overload=dispatch.choose_overload(backend, z_i.device),
        **rows,
    )
    with torch.no_grad():
        samples = torch.arange(z_i.shape[0], device=z_i.device) if classes is None else classes
        negative = class_similarity(z_i, z_j, samples, backend=backend, **rows).across
    with dispatch.without_autocast(z_i.device):
        difference = gap(out.lse, out.positive, out.shift, out.log_sum, temperature)  # (M,)
        losses = difference if decoupled else softplus(difference)
        loss = reference.reduce(losses, reduction)
    with torch.no_grad():
        # A row with a NaN or an infinity makes the accuracy 0, also that of classes without it.
        hits = (out.positive > out.largest) & ~out.positive.isnan().any()
        return NTXentOutput(
            loss=loss,
            accuracy=hits.to(loss.dtype).mean(),
            positive_similarity=out.positive.mean(),
            negative_similarity=negative,
            lse=softplus(difference) + out.positive / temperature,
        )


def check_negatives(pairs: int, labels: Tensor | None) -> None:
    """Raise if the host can see that an anchor of the decoupled loss has no negatives.

    Args:
        pairs: Number of pairs.
        labels: (B,) int64, or None.
    """
    without = (
        'decoupled must be False (and contrastive_type not "dcl") without negatives, whose '
        "log-sum-exp is -inf, got "
    )
    if pairs == 1:
        raise ValueError(f"{without}one pair")
    if labels is not None and checks.host_reads(labels) and (labels == labels[0]).all():
        raise ValueError(f"{without}labels that are all {int(labels[0])}")
