"""InfoNCE of a group of ranks, each of which multiplies its queries with the keys of all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import (
    CrossLogSumExpForward,
    InfoNCEOutput,
    Reduction,
    Strategy,
    accumulation_dtype,
)
from cjepa_kernels.distributed.blocks import Options
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.gather import gather_rows, gather_trained_rows
from cjepa_kernels.distributed.info_nce import (
    OF,
    GroupBatch,
    OwnColumns,
    agree,
    merge_columns,
    settings,
    sum_over_ranks,
)
from cjepa_kernels.distributed.info_nce_ring import choose_strategy, ring_logsumexp
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.anchors import Candidates, Columns, query_terms
from cjepa_kernels.functional.cross_logsumexp import run_cross_logsumexp
from cjepa_kernels.functional.operands import operand_rows, widened


def info_nce_of_group(
    query: Tensor,
    key: Tensor,
    positives: Tensor | None,
    *,
    temperature: float | Tensor,
    symmetric: bool,
    label_smoothing: float,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    backend: Backend,
    group: dist.ProcessGroup,
    strategy: Strategy,
) -> InfoNCEOutput:
    """InfoNCE of all ranks of a group, with checked arguments.

    It is not compiled, because the numbers of rows of the ranks are known at run time only.
    """
    rows: dict[str, Any] = {"use_cosine_similarity": use_cosine_similarity, "eps": eps}
    if backend != "reference":
        ops.refuse_transforms("info_nce", (query, key, temperature))
    rounded = dispatch.product_dtype(query)
    needs_gradient = [
        torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad
        for x in (query, key, temperature)
    ]
    batch = agree(
        query,
        len(key),
        settings(
            query,
            temperature=temperature,
            needs_gradient=needs_gradient,
            product_dtype=rounded,
            is_reference=backend == "reference",
            symmetric=symmetric,
            label_smoothing=label_smoothing,
            reduction=reduction,
            strategy=strategy,
            **rows,
        ),
        group,
    )
    query, key, temperature = (ops.saveable(x) for x in (query, key, temperature))
    if positives is None:
        positives = torch.arange(len(query), device=query.device)
    of_all_columns = positives + batch.own_columns.start
    if backend == "reference":
        with dispatch.without_autocast(query.device):
            everything = gather_trained_rows(key, batch.columns, group, of=OF)  # (C, D) in fp32
            whole = reference.info_nce(
                gather_trained_rows(query, batch.queries, group, of=OF),
                everything,
                positives=gather_rows(of_all_columns, batch.queries, Exchange(group, of=OF)),
                temperature=temperature,
                symmetric=symmetric,
                label_smoothing=label_smoothing,
                reduction="none",
                **rows,
            )
            own = batch.own_queries
            loss = _reduce_over_ranks(whole.loss[own], reduction, batch)
            return whole._replace(loss=loss, lse=whole.lse[own])
    by_ring = choose_strategy(strategy, batch, key) == "ring"
    (query,), product_dtype = widened(query)
    products: dict[str, Any] = {
        "temperature": temperature,
        "overload": dispatch.choose_overload(backend, query.device),
        "product_dtype": product_dtype,
        **rows,
    }
    if by_ring:  # the columns of this rank in fp32, else those of all ranks
        columns_here = key.to(accumulation_dtype(key.dtype))
        out = _run_ring(query, columns_here, positives, dtype=key.dtype, batch=batch, **products)
    else:
        columns_here = gather_trained_rows(key, batch.columns, group, of=OF)
        out = run_cross_logsumexp(query, columns_here, positives=of_all_columns, **products)
    of_queries = positives.clamp(0, len(key) - 1)
    smooth: Candidates | None = None
    if label_smoothing > 0:
        queries, keys = (
            operand_rows(z, backend=backend, product_dtype=product_dtype, **rows)
            for z in (query, columns_here)
        )
        mean_key = keys.mean(dim=0)
        if by_ring:
            mean_key = sum_over_ranks(keys.sum(dim=0), group) / sum(batch.columns)
        mean_query = queries.mean(dim=0)
        if symmetric:
            mean_query = sum_over_ranks(queries.sum(dim=0), group) / sum(batch.queries)
        smooth = Candidates(
            queries=queries,
            positives=(keys if by_ring else keys[batch.own_columns])[of_queries],
            mean_key=mean_key,
            mean_query=mean_query,
        )
    with dispatch.without_autocast(query.device):
        columns: Columns | None = None
        if symmetric:
            merged = OwnColumns(
                lse=out.column_lse,
                shift=out.column_shift,
                log_sum=out.column_log_sum,
                largest=out.column_max,
            )
            if not by_ring:
                merged = merge_columns(
                    **merged._asdict(), features=query.shape[1], tau=temperature, batch=batch
                )
            columns = Columns(*(number[of_queries] for number in merged))
        terms = query_terms(
            out, columns, smooth=smooth, tau=temperature, label_smoothing=label_smoothing
        )
        loss = _reduce_over_ranks(terms.losses, reduction, batch)
        with torch.no_grad():
            columns_of_all = sum(batch.columns)
            sums = torch.stack(
                [
                    terms.hits.sum(dtype=torch.float64),
                    out.positive.sum(dtype=torch.float64),
                    out.mean_similarity.double() * (len(query) * columns_of_all),
                ]
            )
            hits, of_positives, of_all = sum_over_ranks(sums, group)
            pairs = sum(batch.queries)
            negatives = pairs * columns_of_all - pairs
            # A NaN of any rank makes the accuracy 0. Kernels may leave a NaN out of their maxima.
            hits = hits.where(~of_all.isnan(), 0.0)
            metrics = [
                hits / pairs,
                of_positives / pairs,
                (of_all - of_positives) / (negatives if negatives else math.nan),
            ]
            accuracy, positive_similarity, negative_similarity = (
                metric.to(terms.losses.dtype) for metric in metrics
            )
    return InfoNCEOutput(
        loss=loss,
        accuracy=accuracy,
        positive_similarity=positive_similarity,
        negative_similarity=negative_similarity,
        lse=terms.lse,
    )


def _run_ring(
    query: Tensor,
    columns: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    overload: str,
    product_dtype: torch.dtype | None,
    dtype: torch.dtype,
    batch: GroupBatch,
) -> CrossLogSumExpForward:
    """As :func:`run_cross_logsumexp`, over the columns of all ranks, which travel in ``dtype``."""
    tensor, number = checks.split_temperature(temperature)
    options = Options(
        temperature=number,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        reduction="none",
        product_dtype=product_dtype,
        overload=overload,
        save_for_backward=False,
        needs_gradient=torch.is_grad_enabled(),
        strategy="ring",
        decoupled=True,
    )
    return ring_logsumexp(
        query,
        columns,
        positives=ops.saveable(positives),
        temperature=tensor,
        options=options,
        dtype=dtype,
        batch=batch,
    )


def _reduce_over_ranks(losses: Tensor, reduction: Reduction, batch: GroupBatch) -> Tensor:
    """The loss of this rank, whose mean over the ranks is the loss of the whole batch."""
    if reduction == "mean":
        return losses.sum() * (batch.ranks / sum(batch.queries))
    return reference.reduce(losses, reduction)
