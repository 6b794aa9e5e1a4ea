"""SupCon as a function: contrastive learning with labels, or with several views of a sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import EPS, TEMPERATURE, Reduction, SupConOutput
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.anchors import gap, softplus
from cjepa_kernels.functional.class_similarity import class_similarity
from cjepa_kernels.functional.self_logsumexp import run_self_logsumexp


def sup_con(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> SupConOutput:
    """SupCon of a batch, with its metrics, without the (M, M) similarity matrix.

    Each row is an anchor, and its positives are the other rows of its class. With s the
    similarities and P(a) the positives of a, the loss of an anchor is

        loss_a = log sum_(b != a) exp(s_ab / tau) - mean over p in P(a) of s_ap / tau

    It is never below log |P(a)|, its exact lower bound. An anchor with one positive has the loss
    softplus(LSE-_a - s_ap / tau), with LSE- over the rows that are neither a nor p, which loses
    nothing to rounding when the positive dominates. Anchors without a positive have no loss and
    are left out of the mean; they are negatives of the others. If no anchor has a positive, the
    loss and its gradient are 0.

    Args:
        embeddings: (M, D) with labels, or (B, V, D), V views of B samples. fp64, fp32, bf16 or
            fp16.
        labels: Integers on the same device, any numbers: (M,), or (B,) for (B, V, D). Without
            labels, which needs (B, V, D), the positives of a view are the other views of its
            sample; for V = 2 this is NT-Xent.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient of its shape. A tensor outside of that range gives NaN, because the host never
            reads it. Default 0.1.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
        reduction: ``mean`` over the anchors that have a positive, ``sum``, or ``none``.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        SupConOutput. Rows of (B, V, D) are in the order of ``embeddings.flatten(0, 1)``.

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: SupCon, arXiv 2004.11362, equation 2 (the mean outside of the logarithm).

    Example:
        >>> out = sup_con(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=0.5)
        >>> round(out.loss.item(), 4), out.num_anchors.item()  # log 3: all rows are orthogonal
        (1.0986, 4)
    """
    check_backend(backend)
    temperature = checks.without_arrays(temperature, embeddings)
    checks.check_temperature(temperature)
    checks.check_reduction(reduction)
    checks.check_in_range("eps", eps)
    checks.check_bool("use_cosine_similarity", use_cosine_similarity)
    checks.check_floating_tensor("embeddings", embeddings)
    if embeddings.ndim not in (2, 3):
        raise ValueError(f"embeddings must be (M, D) or (B, V, D), got {tuple(embeddings.shape)}")
    if 0 in embeddings.shape:
        raise ValueError(
            f"embeddings must hold at least one row and one feature, got {tuple(embeddings.shape)}"
        )
    checks.check_temperature_device(temperature, "embeddings", embeddings)
    samples, device = embeddings.shape[0], embeddings.device
    of_pairs = False  # whether it is known without a look at labels that classes have two rows
    if labels is not None:
        classes = checks.as_classes(
            labels, samples, device, of="row" if embeddings.ndim == 2 else "sample"
        )
    elif embeddings.ndim == 3:
        classes, of_pairs = torch.arange(samples, device=device), embeddings.shape[1] == 2
    else:
        raise ValueError(
            "labels must be given for embeddings (M, D); without labels the views of a sample are "
            f"positives, in embeddings (B, V, D), got {tuple(embeddings.shape)}"
        )
    if embeddings.ndim == 3:
        classes = classes.repeat_interleave(embeddings.shape[1])
        embeddings = embeddings.flatten(0, 1)
    return _sup_con(
        embeddings,
        classes,
        of_pairs=of_pairs,
        temperature=checks.wide(checks.as_float_or_scalar(temperature)),
        use_cosine_similarity=use_cosine_similarity,
        eps=checks.as_float(eps),
        reduction=reduction,
        backend=backend,
    )


def _sup_con(
    z: Tensor,
    classes: Tensor,
    *,
    of_pairs: bool,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    backend: Backend,
) -> SupConOutput:
    """SupCon with checked arguments; ``of_pairs`` says that every class has two rows."""
    temperature = ops.saveable(temperature)
    rows: dict[str, Any] = {"use_cosine_similarity": use_cosine_similarity, "eps": eps}
    if backend == "reference":
        with dispatch.without_autocast(z.device):
            return reference.sup_con(
                ops.saveable(z), classes, temperature=temperature, reduction=reduction, **rows
            )
    positives = _find_positives(classes)
    is_sole, counts = positives.number == 1, positives.number > 0
    several: dict[str, Any] = {}  # of anchors with several positives
    of_classes = class_similarity(z.detach(), None, classes, backend=backend, **rows)
    if not of_pairs:
        attracted = positives.number > 1
        share = positives.number.to(of_classes.within.dtype).reciprocal()
        several = {
            "classes": classes,
            "class_means": of_classes.within.where(attracted, 0.0),
            "class_weights": share.where(attracted, 0.0),
        }
    out = run_self_logsumexp(
        z,
        None,
        positives=positives.sole,
        temperature=temperature,
        overload=dispatch.choose_overload(backend, z.device),
        **several,
        **rows,
    )
    with dispatch.without_autocast(z.device):
        of_pair = softplus(gap(out.lse, out.positive, out.shift, out.log_sum, temperature))
        losses = torch.where(is_sole, of_pair, out.lse)
        losses = reference.raise_to_bound(losses, positives.number).where(counts, 0.0)
        losses = losses.masked_fill(out.lse.isnan(), torch.nan)  # of anchors without positives too
        loss = reference.reduce_counted(losses, counts, reduction)
    with torch.no_grad():
        mean = torch.where(is_sole, out.positive, of_classes.within)  # (M,)
        # The log-sum-exp over all positives and negatives.
        lse = torch.where(
            is_sole, of_pair + mean / temperature, out.shift / temperature + out.log_sum
        )
        return SupConOutput(
            loss=loss,
            positive_similarity=(mean * positives.number).sum() / positives.number.sum(),
            negative_similarity=of_classes.across,
            lse=lse,
            num_anchors=counts.sum(),
        )


class _Positives(NamedTuple):
    number: Tensor  # (M,) int64, of the other rows in a row's class
    sole: Tensor  # (M,) int64, the other row of a class of two, else -1


def _find_positives(classes: Tensor) -> _Positives:
    """The positives of each row, in tensors whose sizes are known: no device is waited for."""
    rows = classes.shape[0]
    ordered, order = classes.sort(stable=True)
    first = torch.searchsorted(ordered, classes)  # (M,)
    count = torch.searchsorted(ordered, classes, right=True) - first - 1
    number = torch.arange(rows, device=classes.device)
    # In a class of two, the other row is the sum of both numbers without the row's own.
    second = (first + 1).clamp(max=rows - 1)
    other = order[first] + order[second] - number
    return _Positives(count, other.where(count == 1, checks.NO_POSITIVE))
