"""NT-Xent as a function: it checks the arguments, flattens, and calls the operator."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import (
    EPS,
    TEMPERATURE,
    NTXentForward,
    NTXentOutput,
    Reduction,
    Strategy,
)
from cjepa_kernels.distributed.nt_xent import refuse
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.group_nt_xent import nt_xent_of_group
from cjepa_kernels.functional.nt_xent_by_anchors import check_negatives, nt_xent_by_anchors


def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor = TEMPERATURE,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    decoupled: bool = False,
    group: dist.ProcessGroup | None = None,
    strategy: Strategy = "auto",
    backend: Backend = "auto",
) -> NTXentOutput:
    """NT-Xent of two views, with its metrics, without the (2B, 2B) similarity matrix.

    Args:
        z_i: (B, D), or (B, N, D) which counts as B*N pairs. fp64, fp32, bf16 or fp16.
        z_j: Same shape and device; ``z_j[k]`` is the positive of ``z_i[k]``. Two dtypes become
            the one that ``torch.promote_types`` gives; gradients have each input's own.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient of its shape. A tensor outside of that range gives NaN, because the host never
            reads it. Default 0.1.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
        reduction: ``mean`` over the 2B anchors, ``sum``, or ``none``.
        mask: (B, B) bool (B*N for 3-D inputs); True takes the pair of samples (k, l) out of the
            negatives, in all four blocks of views and both ways. The diagonal is ignored.
        labels: Integers, any numbers: samples of equal label are no negatives of each other. (B,),
            for 3-D inputs also (B, N), where (B,) holds for all N pairs of a sample. It does what
            the mask of equal labels does, in memory that grows with B.
        decoupled: Leave the positive out of the sum over the negatives (DCL): the loss of anchor a
            is LSE-_a - s_a / tau. It may be negative, and has no minimum.
        group: Take the negatives from every rank of this process group. With R ranks and M rows
            in all, rank r returns for ``mean``

                (R / M) * sum over its own anchors a of loss_a

            whose mean over the ranks is the loss of one process on the whole batch, and so is the
            gradient that DDP averages. ``sum`` and ``none`` cover this rank's anchors, the metrics
            are global. Ranks may hold different numbers of pairs. Labels mean the same class on
            every rank. Every rank has to take part in every forward and backward.
        strategy: How the ranks work together. ``all_gather``: every rank gathers the features of
            all, quick for small batches. ``ring``: shards travel from rank to rank while the one
            before is worked on, each pair of shards is multiplied once, and memory grows with this
            rank's rows. ``auto`` chooses by size. With ``labels`` there is the all-gather alone,
            and every rank computes the losses of all ranks.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        NTXentOutput.

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it. ``mask`` with ``labels``,
            ``decoupled`` or a group; ``strategy="ring"`` with ``labels``; ``decoupled`` if a
            sample has no negatives. On a GPU and under torch.compile the host does not read the
            labels, and the loss is then -inf. With a group also, on all ranks alike, a rank
            without pairs or one that asks for something else. If one rank refuses its own
            arguments, the others raise an error that names this rank.
        RuntimeError: A back end that was asked for by name and is missing; a rank of the group that
            ended, or did not take part within the process group's timeout.

    Source: SimCLR, arXiv 2002.05709, equation 1; ``decoupled`` as in DCL, arXiv 2110.06848,
    equation 6.

    Example:
        >>> z_i, z_j = torch.eye(4), torch.eye(4)
        >>> out = nt_xent(z_i, z_j, temperature=0.5)
        >>> round(out.loss.item(), 4), out.accuracy.item()
        (0.5944, 1.0)
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group or None, got {type(group).__name__}")
    try:
        check_backend(backend)
        temperature = checks.without_arrays(temperature, z_i)
        checks.check_temperature(temperature)
        checks.check_reduction(reduction)
        checks.check_in_range("eps", eps)
        checks.check_strategy(strategy)
        checks.check_bool("use_cosine_similarity", use_cosine_similarity)
        checks.check_bool("decoupled", decoupled)
        # Under a group, a rank without pairs is an error that every rank explains.
        checks.check_views(z_i, z_j, allow_empty=group is not None)
        _check_combination(mask=mask, labels=labels, decoupled=decoupled)
        if group is not None:
            _check_group(mask=mask, labels=labels, strategy=strategy, backend=backend)
        if labels is not None:
            labels = classes_of_pairs(labels, z_i)
        if z_i.ndim == 3:
            z_i, z_j = z_i.flatten(0, 1), z_j.flatten(0, 1)
        if mask is not None:
            checks.check_negatives_mask(mask, z_i)
        checks.check_temperature_device(temperature, "z_i", z_i)
    except (TypeError, ValueError):
        # The other ranks must not wait for this one. Without a tensor its device is unknown.
        if group is not None and isinstance(z_i, Tensor):
            refuse(z_i.device, group)
        raise
    temperature, eps = checks.as_float_or_scalar(temperature), checks.as_float(eps)
    z_i, z_j = checks.promote(z_i, z_j)
    if group is not None:
        of_group_eagerly = nt_xent_of_group
        # Without the condition disable() would import the compiler, which takes as long as torch.
        if torch.compiler.is_compiling():
            of_group_eagerly = torch.compiler.disable(nt_xent_of_group)  # type: ignore[no-untyped-call]
        return of_group_eagerly(
            z_i,
            z_j,
            labels,
            temperature=temperature,
            use_cosine_similarity=use_cosine_similarity,
            eps=eps,
            reduction=reduction,
            decoupled=decoupled,
            group=group,
            strategy=strategy,
            backend=backend,
        )
    if labels is not None or decoupled:
        if decoupled:
            check_negatives(z_i.shape[0], labels)
        return nt_xent_by_anchors(
            z_i,
            z_j,
            labels,
            temperature=temperature,
            use_cosine_similarity=use_cosine_similarity,
            eps=eps,
            reduction=reduction,
            decoupled=decoupled,
            backend=backend,
        )
    return _nt_xent(
        z_i,
        z_j,
        temperature=temperature,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        reduction=reduction,
        mask=mask,
        backend=backend,
    )


def _check_combination(*, mask: Tensor | None, labels: Tensor | None, decoupled: bool) -> None:
    """Raise for arguments that do not go together."""
    if labels is not None and mask is not None:
        raise ValueError(
            f"labels must be None with a mask, got {checks.described(labels)}: both name pairs "
            "that are no negatives"
        )
    if decoupled and mask is not None:
        raise ValueError(
            f"decoupled must be False with a mask, got {decoupled}: labels, which name classes of "
            "samples in place of pairs, go with decoupled=True"
        )


def _check_group(
    *, mask: Tensor | None, labels: Tensor | None, strategy: Strategy, backend: Backend
) -> None:
    """Raise for arguments that do not go together with a group."""
    if mask is not None:
        raise ValueError(
            f"mask must be None with a group, got {checks.described(mask)}: it names pairs of one "
            "rank only"
        )
    if strategy == "ring" and backend == "reference":
        raise ValueError(
            'strategy must be "auto" or "all_gather" with backend="reference", got "ring"'
        )
    if strategy == "ring" and labels is not None:
        raise ValueError(
            'strategy must be "auto" or "all_gather" with labels and a group, got "ring"'
        )


def classes_of_pairs(labels: Tensor, z_i: Tensor) -> Tensor:
    """The checked labels: (B,) int64, or (B * N,) for 3-D views, before these are flattened."""
    if z_i.ndim == 2 or not isinstance(labels, Tensor) or labels.ndim != 2:
        classes = checks.as_classes(labels, z_i.shape[0], z_i.device, of="sample")
        return classes if z_i.ndim == 2 else classes.repeat_interleave(z_i.shape[1])
    if labels.shape != z_i.shape[:2]:
        raise ValueError(
            f"labels must be ({z_i.shape[0]},) or {tuple(z_i.shape[:2])}, got {tuple(labels.shape)}"
        )
    return checks.as_classes(labels.flatten(), labels.numel(), z_i.device, of="pair")


def _nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    *,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    mask: Tensor | None,
    backend: Backend,
) -> NTXentOutput:
    """NT-Xent of one process, with checked arguments."""
    if backend == "reference":
        with dispatch.without_autocast(z_i.device):
            terms = reference.nt_xent(
                ops.saveable(z_i),
                ops.saveable(z_j),
                temperature=ops.saveable(temperature),
                use_cosine_similarity=use_cosine_similarity,
                eps=eps,
                mask=ops.saveable(mask),
            )
        return NTXentOutput(
            loss=reference.reduce(terms.loss, reduction),
            accuracy=terms.accuracy,
            positive_similarity=terms.positive_similarity,
            negative_similarity=terms.negative_similarity,
            lse=terms.lse,
        )
    tensor, number = checks.split_temperature(temperature)
    overload = dispatch.choose_overload(backend, z_i.device)
    product_dtype = dispatch.product_dtype(z_i)
    out: NTXentForward = ops.call(
        "nt_xent",
        overload,
        z_i=z_i,
        z_j=z_j,
        mask=mask,
        temperature_tensor=tensor,
        temperature=number,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        reduction=reduction,
        product_dtype=product_dtype,
        keep=dispatch.saves_for_backward(
            lambda limit: ops.saves_at_most(limit, overload, z_i, product_dtype, reduction),
            z_i,
            z_j,
            tensor,
        ),
    )
    return NTXentOutput(
        loss=out.loss,
        accuracy=out.accuracy,
        positive_similarity=out.positive_similarity,
        negative_similarity=out.negative_similarity,
        lse=out.lse,
    )
