"""InfoNCE as a function: in-batch and extra negatives, one direction or both (CLIP)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend, check_backend
from cjepa_kernels.definitions import (
    EPS,
    INFO_NCE_TEMPERATURE,
    CrossLogSumExpForward,
    InfoNCEOutput,
    Reduction,
    Strategy,
)
from cjepa_kernels.distributed.info_nce import refuse
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.anchors import (
    Candidates,
    Columns,
    add_negatives,
    gap,
    query_terms,
    smoothed,
    softplus,
)
from cjepa_kernels.functional.cross_logsumexp import run_cross_logsumexp
from cjepa_kernels.functional.group_info_nce import info_nce_of_group
from cjepa_kernels.functional.operands import operand_rows, widened
from cjepa_kernels.reference.rows import positive_temperature

# From so many similarities on, constant negatives beside trained keys are multiplied apart.
CONSTANT_ENTRIES = 2**24


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    positives: Tensor | None = None,
    *,
    temperature: float | Tensor = INFO_NCE_TEMPERATURE,
    symmetric: bool = False,
    label_smoothing: float = 0.0,
    in_batch_negatives: bool = True,
    use_cosine_similarity: bool = True,
    eps: float = EPS,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | None = None,
    strategy: Strategy = "auto",
    backend: Backend = "auto",
) -> InfoNCEOutput:
    """InfoNCE of queries against keys, with its metrics, without the (M, N) similarity matrix.

    Each query has one key as its positive. All other keys, and all rows of ``negatives``, are its
    negatives. With s the similarities, the loss of query a is

        loss_a = log sum_b exp(s_ab / tau) - s_ap / tau,    p the key that is a's positive

    and is computed as softplus(LSE-_a - s_ap / tau), with LSE- over the negatives alone. It is
    therefore never negative and loses nothing to rounding when the positive dominates.

    Args:
        query: (M, D), M >= 1. fp64, fp32, bf16 or fp16.
        key: (N, D), N >= 1, same device. Two dtypes become the one that ``torch.promote_types``
            gives; gradients have each input's own.
        negatives: (K, D), K >= 0, more keys that are nobody's positive: hard negatives, a queue, a
            memory bank. Their rows may require a gradient. Default: none.
        positives: (M,) int64, for each query the row of ``key`` that is its positive. Several
            queries may share one unless ``symmetric``. Default: row a for query a, which needs
            N = M.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient of its shape. A tensor outside of that range gives NaN, because the host never
            reads it. Default 0.07.
        symmetric: The mean of both directions: each query among the keys, and each query's positive
            among the queries, as in CLIP. Keys that are nobody's positive, and ``negatives``, take
            part in the first direction only.
        label_smoothing: Share of the target, from 0 to below 1, that is spread over all keys (in
            the second direction over all queries). Default 0.
        in_batch_negatives: Whether the other keys are negatives of a query. With False only
            ``negatives`` are, as in MoCo and with a memory bank: a key is the positive of its
            query and nothing else. ``negatives`` must then be given, and ``symmetric`` be False.
            Default True.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        eps: Lower bound on the norm used for normalisation; a row below it gets a zero
            gradient. Default 1e-8.
        reduction: ``mean`` over the M queries, ``sum``, or ``none``.
        group: Take the keys and the ``negatives`` of every rank of this process group as negatives.
            With R ranks and M queries in all, rank r returns for ``mean``

                (R / M) * sum over its own queries a of loss_a

            whose mean over the ranks is the loss of one process on the whole batch, and so is the
            gradient that DDP averages. ``sum`` and ``none`` cover this rank's queries, the metrics
            are global. ``positives`` are rows of this rank's ``key``. Ranks may hold different
            numbers of rows. If all ranks hold the same queue, give each of them a share of it.
            Every rank has to take part in every forward and backward. Default: one process.
        strategy: How the ranks work together. ``all_gather``: every rank gathers the keys and the
            ``negatives`` of all ranks. ``ring``: they travel from rank to rank, and a rank holds
            those of at most two other ranks at a time. ``auto``: the all-gather, unless the keys
            and ``negatives`` of all ranks take more than 256 MiB.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.

    Returns:
        InfoNCEOutput. Without any negative the loss and its gradient are 0.

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it. Also
            ``strategy="ring"`` with ``in_batch_negatives=False``, and with a group and
            ``backend="reference"``, which has the all-gather alone. With a group the other
            ranks raise one too, as they do for an option that differs. On a GPU and under
            torch.compile the host does not read ``positives``. There a number out of range, or with
            ``symmetric`` a repeated one, makes the loss NaN. The compiled CPU kernels raise.
        RuntimeError: A back end that was asked for by name and is missing; a rank of the group that
            ended, or did not take part within the process group's timeout.

    Source: InfoNCE, arXiv 1807.03748, equation 4; both directions as in CLIP, arXiv 2103.00020;
    negatives from a queue alone as in MoCo, arXiv 1911.05722, equation 1.

    Example:
        >>> query, key = torch.eye(4), torch.eye(4)
        >>> out = info_nce(query, key, temperature=0.5)
        >>> round(out.loss.item(), 4), out.accuracy.item()
        (0.3408, 1.0)
    """
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a process group or None, got {type(group).__name__}")
    try:
        inputs, options = _checked(
            query,
            key,
            negatives,
            positives,
            temperature=temperature,
            symmetric=symmetric,
            label_smoothing=label_smoothing,
            in_batch_negatives=in_batch_negatives,
            use_cosine_similarity=use_cosine_similarity,
            eps=eps,
            reduction=reduction,
            backend=backend,
        )
        _check_strategy(
            strategy, group=group, in_batch_negatives=in_batch_negatives, backend=backend
        )
        if group is not None and not in_batch_negatives:
            raise ValueError(
                "group must be None with in_batch_negatives=False, got a group of "
                f"{group.size()} ranks: MomentumQueue(distributed=True) exchanges the keys when "
                "they are enqueued"
            )
    except (TypeError, ValueError):
        # The other ranks must not wait for this one. Without a tensor its device is unknown.
        if group is not None and isinstance(query, Tensor):
            refuse(query.device, group)
        raise
    if not in_batch_negatives:
        return _queue_info_nce(inputs, **options)
    options["symmetric"] = symmetric
    if group is None and _are_constant(inputs, **options):
        options["constant"] = inputs.negatives
    elif inputs.negatives is not None:
        inputs = inputs._replace(key=torch.cat([inputs.key, inputs.negatives]))
    if group is None:
        return _info_nce(inputs.query, inputs.key, inputs.positives, **options)
    of_group_eagerly = info_nce_of_group
    # Without the condition disable() would import the compiler, which takes as long as torch.
    if torch.compiler.is_compiling():
        of_group_eagerly = torch.compiler.disable(of_group_eagerly)  # type: ignore[no-untyped-call]
    return of_group_eagerly(
        inputs.query, inputs.key, inputs.positives, group=group, strategy=strategy, **options
    )


def _check_strategy(
    strategy: Strategy,
    *,
    group: dist.ProcessGroup | None,
    in_batch_negatives: bool,
    backend: Backend,
) -> None:
    """Raise for a strategy that is unknown, or that does not go together with other arguments."""
    checks.check_strategy(strategy)
    checks.check_ring_of_keys(strategy, in_batch_negatives=in_batch_negatives)
    if group is not None and strategy == "ring" and backend == "reference":
        raise ValueError(
            'strategy must be "auto" or "all_gather" with backend="reference", got "ring"'
        )


class _Inputs(NamedTuple):
    """The checked tensors, in one dtype."""

    query: Tensor  # (M, D)
    key: Tensor  # (N, D)
    negatives: Tensor | None  # (K, D)
    positives: Tensor | None  # (M,)


def _checked(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    positives: Tensor | None,
    *,
    temperature: float | Tensor,
    symmetric: bool,
    label_smoothing: float,
    in_batch_negatives: bool,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    backend: Backend,
) -> tuple[_Inputs, dict[str, Any]]:
    """The arguments of :func:`info_nce`: the tensors, and the options that all forms have."""
    check_backend(backend)
    temperature = checks.without_arrays(temperature, query)
    checks.check_temperature(temperature)
    checks.check_reduction(reduction)
    checks.check_in_range("eps", eps)
    checks.check_bool("use_cosine_similarity", use_cosine_similarity)
    checks.check_bool("symmetric", symmetric)
    checks.check_label_smoothing(label_smoothing)
    checks.check_in_batch_negatives(in_batch_negatives, symmetric=symmetric)
    if negatives is None and not in_batch_negatives:
        raise ValueError("negatives must be given with in_batch_negatives=False, got None")
    checks.check_rectangle(query, key, names=("query", "key"))
    checks.check_temperature_device(temperature, "query", query)
    if positives is None:
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                "positives must be given where query and key differ in their number of rows, got "
                f"{query.shape[0]} and {key.shape[0]}"
            )
    else:
        positives = checks.as_positives(positives, query, key)
        if symmetric:
            positives = checks.as_unique(positives, key.shape[0])
    query, key = checks.promote(query, key)
    if negatives is not None:
        checks.check_rectangle(query, negatives, names=("query", "negatives"))
        dtype = torch.promote_types(query.dtype, negatives.dtype)
        query, key, negatives = query.to(dtype), key.to(dtype), negatives.to(dtype)
    return _Inputs(query=query, key=key, negatives=negatives, positives=positives), {
        "temperature": checks.wide(checks.as_float_or_scalar(temperature)),
        "label_smoothing": checks.as_float(label_smoothing),
        "use_cosine_similarity": use_cosine_similarity,
        "eps": checks.as_float(eps),
        "reduction": reduction,
        "backend": backend,
    }


def _are_constant(inputs: _Inputs, *, label_smoothing: float, backend: Backend, **_: Any) -> bool:
    """Whether the negatives are multiplied apart from the keys, because they need no gradient.

    That saves the product for their gradient, for one more call of the operator. It was measured on
    a CPU alone, and there it pays from ``CONSTANT_ENTRIES`` on. In half precision it does not.
    """
    query, key, negatives, _positives = inputs
    if negatives is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return (
        key.requires_grad
        and not negatives.requires_grad
        and label_smoothing == 0
        and backend != "reference"
        and query.device.type == "cpu"
        and query.dtype.itemsize >= 4
        and query.shape[0] * negatives.shape[0] >= CONSTANT_ENTRIES
    )


def _info_nce(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    *,
    constant: Tensor | None = None,
    temperature: float | Tensor,
    symmetric: bool,
    label_smoothing: float,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    backend: Backend,
) -> InfoNCEOutput:
    """InfoNCE with checked arguments; ``key`` holds the further negatives too.

    Without ``positives``, key a is the positive of query a. ``constant`` are further negatives that
    need no gradient.
    """
    in_order = positives is None
    if positives is None:
        positives = torch.arange(query.shape[0], device=query.device)
    positives, temperature = ops.saveable(positives), ops.saveable(temperature)
    rows: dict[str, Any] = {"use_cosine_similarity": use_cosine_similarity, "eps": eps}
    if backend == "reference":
        with dispatch.without_autocast(query.device):
            return reference.info_nce(
                ops.saveable(query),
                ops.saveable(key),
                positives=positives,
                temperature=temperature,
                symmetric=symmetric,
                label_smoothing=label_smoothing,
                reduction=reduction,
                **rows,
            )
    overload = dispatch.choose_overload(backend, query.device)
    options: dict[str, Any] = {"temperature": temperature, "overload": overload, **rows}
    out = run_cross_logsumexp(query, key, positives=positives, **options)
    columns = key.shape[0]
    if constant is not None:
        columns += constant.shape[0]
        # No row has its positive here. With positives the operator gives the mean similarity.
        none = torch.full_like(positives, -1)
        more = run_cross_logsumexp(query, constant, positives=none, **options)
        with dispatch.without_autocast(query.device):
            out = add_negatives(out, more, features=query.shape[1], tau=temperature)
    of_queries = slice(query.shape[0]) if in_order else positives.clamp(0, key.shape[0] - 1)
    smooth: Candidates | None = None
    if label_smoothing > 0:
        queries, keys = (operand_rows(z, backend=backend, **rows) for z in (query, key))
        smooth = Candidates(
            queries=queries,
            positives=keys[of_queries],
            mean_key=keys.mean(dim=0),
            mean_query=queries.mean(dim=0),
        )
    with dispatch.without_autocast(query.device):
        terms = query_terms(
            out,
            _columns(out, of_queries) if symmetric else None,
            smooth=smooth,
            tau=temperature,
            label_smoothing=label_smoothing,
        )
        loss = reference.reduce(terms.losses, reduction)
        with torch.no_grad():
            pairs, all_pairs = query.shape[0], query.shape[0] * columns
            negatives = all_pairs - pairs
            total = out.mean_similarity * all_pairs - out.positive.sum()
            # A NaN makes the accuracy 0. Back ends may leave a NaN out of their maxima.
            hits = terms.hits.where(~out.mean_similarity.isnan(), 0.0)
            return InfoNCEOutput(
                loss=loss,
                accuracy=hits.mean(),
                positive_similarity=out.positive.mean(),
                negative_similarity=total / (negatives if negatives else math.nan),
                lse=terms.lse,
            )


def _columns(out: CrossLogSumExpForward, of_queries: slice | Tensor) -> Columns:
    """The columns that ``of_queries`` takes.

    A positive that is out of range has a similarity of NaN already, so it may take any column.
    """
    return Columns(
        lse=out.column_lse[of_queries],
        shift=out.column_shift[of_queries],
        log_sum=out.column_log_sum[of_queries],
        largest=out.column_max[of_queries],
    )


def _queue_info_nce(
    inputs: _Inputs,
    *,
    temperature: float | Tensor,
    label_smoothing: float,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    backend: Backend,
) -> InfoNCEOutput:
    """InfoNCE over ``negatives`` alone, with checked arguments.

    The positives are no part of the rectangle of queries and negatives, so a queue that needs no
    gradient costs no product in the backward.
    """
    query, key, negatives, positives = inputs
    assert negatives is not None  # _checked() makes sure of it
    temperature = ops.saveable(temperature)
    rows: dict[str, Any] = {"use_cosine_similarity": use_cosine_similarity, "eps": eps}
    if positives is not None:
        known = positives < key.shape[0]  # the others are out of range, and nobody could check them
        key = key[positives.clamp(0, key.shape[0] - 1)].where(known[:, None], torch.nan)  # (M, D)
    if backend == "reference":
        with dispatch.without_autocast(query.device):
            return reference.queue_info_nce(
                ops.saveable(query),
                ops.saveable(key),
                ops.saveable(negatives),
                temperature=temperature,
                label_smoothing=label_smoothing,
                reduction=reduction,
                **rows,
            )
    (query, key, negatives), product_dtype = widened(query, key, negatives)
    out: CrossLogSumExpForward | None = None
    if negatives.shape[0] > 0:
        out = run_cross_logsumexp(
            query,
            negatives,
            # No row has its positive here. With positives the operator gives the mean similarity.
            positives=torch.full((query.shape[0],), -1, device=query.device),
            temperature=temperature,
            overload=dispatch.choose_overload(backend, query.device),
            product_dtype=product_dtype,
            **rows,
        )
    rows |= {"backend": backend, "product_dtype": product_dtype}
    queries, keys = (operand_rows(z, **rows) for z in (query, key))
    others: Tensor | None = None
    if label_smoothing > 0 and out is not None:
        others = operand_rows(negatives, **rows)
    with dispatch.without_autocast(query.device):
        positive = (queries * keys).sum(dim=1)  # (M,)
        if out is None:
            return _without_negatives(positive + negatives.sum(), temperature, reduction)
        row_gap = gap(out.row_lse, positive, out.row_shift, out.row_log_sum, temperature)
        losses = softplus(row_gap)  # (M,)
        if others is not None:
            # Of the K + 1 candidates the mean is over, one is the positive itself.
            share = negatives.shape[0] / (negatives.shape[0] + 1)
            above = share * (positive - queries @ others.mean(dim=0))
            losses = smoothed(losses, above, label_smoothing, temperature)
        loss = reference.reduce(losses, reduction)
        with torch.no_grad():
            hits = positive > reference.with_rounding(out.row_max, query.shape[1])
            mean = positive.mean()
            # A NaN anywhere makes the accuracy 0. Kernels may leave a NaN out of their maxima.
            hits = hits & ~(mean + out.mean_similarity).isnan()
            return InfoNCEOutput(
                loss=loss,
                accuracy=hits.to(positive.dtype).mean(),
                positive_similarity=mean,
                negative_similarity=out.mean_similarity,
                lse=softplus(row_gap) + positive / temperature,
            )


def _without_negatives(
    positive: Tensor, tau: float | Tensor, reduction: Reduction
) -> InfoNCEOutput:
    """The result where a queue is empty: a loss of 0, with a gradient of 0 for every input."""
    tau = positive_temperature(tau)
    loss = reference.reduce(0 * (positive / tau), reduction)
    positive = positive.detach()
    return InfoNCEOutput(
        loss=loss,
        accuracy=(~positive.isnan()).all().to(positive.dtype),
        positive_similarity=positive.mean(),
        negative_similarity=positive.new_full((), torch.nan),
        lse=positive / tau,
    )
