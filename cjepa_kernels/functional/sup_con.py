"""SupCon as a function: contrastive learning with labels, or with several views of a sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import EPS, TEMPERATURE, Reduction, SupConOutput
from cjepa_kernels.distributed.sup_con import agree, refuse
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
    group: dist.ProcessGroup | None = None,
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
        group: Take the positives and the negatives from every rank of this process group. With R
            ranks and A anchors that have a positive in all, rank r returns for ``mean``

                (R / A) * sum over its own anchors a of loss_a

            whose mean over the ranks is the loss of one process on the whole batch, and so is the
            gradient that DDP averages. ``sum`` and ``none`` cover this rank's anchors, the metrics
            and the number of anchors are global. Labels mean the same class on every rank. Ranks
            may hold different numbers of rows. Every rank gathers the rows of all ranks and
            computes all losses, so each does the work of the whole batch. Every rank has to take
            part in every forward and backward. Default: one process.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        SupConOutput. Rows of (B, V, D) are in the order of ``embeddings.flatten(0, 1)``.

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it. With a group the other
            ranks raise one too, as they do for an option that differs.
        RuntimeError: A back end that was asked for by name and is missing; a rank of the group that
            ended, or did not take part within the process group's timeout.

    Source: SupCon, arXiv 2004.11362, equation 2 (the mean outside of the logarithm).

    Example:
        >>> out = sup_con(torch.eye(4), torch.tensor([0, 0, 1, 1]), temperature=0.5)
        >>> round(out.loss.item(), 4), out.num_anchors.item()  # log 3: all rows are orthogonal
        (1.0986, 4)
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group or None, got {type(group).__name__}")
    try:
        check_backend(backend)
        temperature = checks.without_arrays(temperature, embeddings)
        checks.check_temperature(temperature)
        checks.check_reduction(reduction)
        checks.check_in_range("eps", eps)
        checks.check_bool("use_cosine_similarity", use_cosine_similarity)
        classes = _check_rows(embeddings, labels)
        checks.check_temperature_device(temperature, "embeddings", embeddings)
    except (TypeError, ValueError):
        # The other ranks must not wait for this one. Without a tensor its device is unknown.
        if group is not None and isinstance(embeddings, Tensor):
            refuse(embeddings.device, group)
        raise
    options: dict[str, Any] = {
        "temperature": checks.wide(checks.as_float_or_scalar(temperature)),
        "use_cosine_similarity": use_cosine_similarity,
        "eps": checks.as_float(eps),
        "reduction": reduction,
        "backend": backend,
    }
    views = embeddings.shape[1] if embeddings.ndim == 3 else 0
    if views:
        embeddings = embeddings.flatten(0, 1)
    if group is None:
        if classes is None:
            classes = _classes_of_views(embeddings, views)
        elif views:
            classes = classes.repeat_interleave(views)
        of_pairs = labels is None and views == 2
        return _sup_con(embeddings, classes, of_pairs=of_pairs, **options)
    of_group_eagerly = _sup_con_of_group
    # Without the condition disable() would import the compiler, which takes as long as torch.
    if torch.compiler.is_compiling():
        of_group_eagerly = torch.compiler.disable(_sup_con_of_group)  # type: ignore[no-untyped-call]
    return of_group_eagerly(embeddings, classes, views=views, group=group, **options)


def _check_rows(embeddings: Tensor, labels: Tensor | None) -> Tensor | None:
    """Raise for wrong embeddings or labels; returns the labels, checked, for each sample."""
    checks.check_floating_tensor("embeddings", embeddings)
    if embeddings.ndim not in (2, 3):
        raise ValueError(f"embeddings must be (M, D) or (B, V, D), got {tuple(embeddings.shape)}")
    if 0 in embeddings.shape:
        raise ValueError(
            f"embeddings must hold at least one row and one feature, got {tuple(embeddings.shape)}"
        )
    if labels is None:
        if embeddings.ndim == 2:
            raise ValueError(
                "labels must be given for embeddings (M, D); without labels the views of a sample "
                f"are positives, in embeddings (B, V, D), got {tuple(embeddings.shape)}"
            )
        return None
    of = "row" if embeddings.ndim == 2 else "sample"
    return checks.as_classes(labels, embeddings.shape[0], embeddings.device, of=of)


def _classes_of_views(z: Tensor, views: int) -> Tensor:
    """(M,) int64: the sample of each row, where the views of a sample follow each other."""
    samples = torch.arange(z.shape[0] // views, device=z.device)
    return samples.repeat_interleave(views)


def _sup_con_of_group(
    z: Tensor,
    classes: Tensor | None,
    *,
    views: int,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    backend: Backend,
    group: dist.ProcessGroup,
) -> SupConOutput:
    """SupCon of all ranks of a group, with checked arguments; every rank computes all losses.

    It is not compiled, because the numbers of rows of the ranks are known at run time only.

    Args:
        z: (M_r, D) rows of this rank.
        classes: Of its rows, or of its samples if there are views. None: the views of a sample.
        views: V, or 0 for rows that are no views of samples.
        temperature: Float or 0-dim tensor, in fp32 or fp64.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation.
        reduction: ``mean`` over the anchors that have a positive, ``sum``, or ``none``.
        backend: A checked name.
        group: The ranks.
    """
    if backend != "reference":
        ops.refuse_transforms("sup_con", (z, temperature))
    rows: dict[str, Any] = {"use_cosine_similarity": use_cosine_similarity, "eps": eps}
    needs_gradient = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (z, temperature)
    )
    whole = agree(
        z,
        views=views,
        has_labels=classes is not None,
        temperature=temperature,
        product_dtype=dispatch.product_dtype(z),
        is_reference=backend == "reference",
        needs_gradient=needs_gradient,
        reduction=reduction,
        group=group,
        **rows,
    )
    everything = whole.gather(ops.saveable(z))  # (M, D)
    if classes is None:
        of_all = _classes_of_views(everything, views)
    else:
        of_all = whole.gather(classes.repeat_interleave(views) if views else classes)
    out = _sup_con(
        everything,
        of_all,
        of_pairs=classes is None and views == 2,
        temperature=whole.share(temperature),
        reduction="none",
        backend=backend,
        **rows,
    )
    losses = whole.own_losses(out.loss)
    loss = whole.reduce(losses, reduction, out.num_anchors.clamp(min=1))
    return out._replace(loss=loss, lse=whole.own_rows(out.lse))


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
