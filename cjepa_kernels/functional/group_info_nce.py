"""InfoNCE of a group of ranks, each of which multiplies its queries with the keys of all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import ops, reference
from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import InfoNCEOutput, Reduction
from cjepa_kernels.distributed.exchange import Exchange
from cjepa_kernels.distributed.gather import gather_rows, gather_trained_rows
from cjepa_kernels.distributed.info_nce import (
    OF,
    GroupBatch,
    agree,
    merge_columns,
    settings,
    sum_over_ranks,
)
from cjepa_kernels.functional import dispatch
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
            **rows,
        ),
        group,
    )
    query, key, temperature = (ops.saveable(x) for x in (query, key, temperature))
    if positives is None:
        positives = torch.arange(len(query), device=query.device)
    everything = gather_trained_rows(key, batch.columns, group, of=OF)  # (C, D) in fp32
    of_all_columns = positives + batch.own_columns.start
    if backend == "reference":
        with dispatch.without_autocast(query.device):
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
    (query,), product_dtype = widened(query)  # the gathered columns are wide already
    out = run_cross_logsumexp(
        query,
        everything,
        positives=of_all_columns,
        temperature=temperature,
        overload=dispatch.choose_overload(backend, query.device),
        product_dtype=product_dtype,
        **rows,
    )
    of_queries = positives.clamp(0, len(key) - 1)
    smooth: Candidates | None = None
    if label_smoothing > 0:
        queries, keys = (
            operand_rows(z, backend=backend, product_dtype=product_dtype, **rows)
            for z in (query, everything)
        )
        mean_query = queries.mean(dim=0)
        if symmetric:
            mean_query = sum_over_ranks(queries.sum(dim=0), group) / sum(batch.queries)
        smooth = Candidates(
            queries=queries,
            positives=keys[batch.own_columns][of_queries],
            mean_key=keys.mean(dim=0),
            mean_query=mean_query,
        )
    with dispatch.without_autocast(query.device):
        columns: Columns | None = None
        if symmetric:
            merged = merge_columns(
                out.column_lse,
                shift=out.column_shift,
                log_sum=out.column_log_sum,
                largest=out.column_max,
                features=query.shape[1],
                tau=temperature,
                batch=batch,
            )
            columns = Columns(*(number[of_queries] for number in merged))
        terms = query_terms(
            out, columns, smooth=smooth, tau=temperature, label_smoothing=label_smoothing
        )
        loss = _reduce_over_ranks(terms.losses, reduction, batch)
        with torch.no_grad():
            own_pairs = len(query) * len(everything)
            sums = torch.stack(
                [
                    terms.hits.sum(dtype=torch.float64),
                    out.positive.sum(dtype=torch.float64),
                    out.mean_similarity.double() * own_pairs,
                ]
            )
            hits, of_positives, of_all = sum_over_ranks(sums, group)
            pairs = sum(batch.queries)
            negatives = pairs * len(everything) - pairs
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


def _reduce_over_ranks(losses: Tensor, reduction: Reduction, batch: GroupBatch) -> Tensor:
    """The loss of this rank, whose mean over the ranks is the loss of the whole batch."""
    if reduction == "mean":
        return losses.sum() * (batch.ranks / sum(batch.queries))
    return reference.reduce(losses, reduction)
