"""Losses of anchors from the log-sum-exp over negatives and the similarity of the positive."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.definitions import CrossLogSumExpForward
from cjepa_kernels.distributed.blocks import merge_rows, rows_of
from cjepa_kernels.reference.rows import positive_temperature, with_rounding


def gap(
    lse: Tensor, positive: Tensor, shift: Tensor, log_sum: Tensor, tau: float | Tensor
) -> Tensor:
    """LSE- - s / tau of each anchor, exact at low temperature too.

    LSE- and s / tau are of the size of 1 / tau, and so is the rounding of their difference. The
    value is therefore that of (shift - s) / tau + log_sum, in which nothing large is rounded, and
    the gradient is that of the difference.

    Args:
        lse: (M,) LSE- with a gradient.
        positive: (M,) similarity s with a gradient.
        shift: (M,) with ``log_sum`` the parts of LSE-, as the operators return them.
        log_sum: (M,); -inf for an anchor without negatives, whose result is -inf.
        tau: Temperature, a number or 0-dim.

    Returns:
        (M,)
    """
    difference = lse - positive / tau
    with torch.no_grad():
        exact = (shift - positive) / tau + log_sum
        correction = (exact - difference).masked_fill(log_sum == -torch.inf, 0.0)
    return difference + correction


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); ``F.softplus`` is x itself from 20 on, which fp64 can tell apart."""
    return -F.logsigmoid(-x)


def add_negatives(
    out: CrossLogSumExpForward, more: CrossLogSumExpForward, *, features: int, tau: float | Tensor
) -> CrossLogSumExpForward:
    """The rows' numbers over the negatives of both, and their mean similarity over all entries.

    The columns' numbers stay those of ``out``. The gradient of a row's LSE- goes to both in the
    shares that they have in its sum. The shares come from shifts and log-sums, because exp(LSE-)
    would be rounded at low temperature.

    Args:
        out: The rows against their keys.
        more: The same rows against further negatives, without positives.
        features: D.
        tau: Temperature, a number or 0-dim.
    """
    with torch.no_grad():
        exact = positive_temperature(tau.double()) if isinstance(tau, Tensor) else tau
        parts = [
            rows_of(out.row_shift, out.row_log_sum, out.row_max),
            rows_of(more.row_shift, more.row_log_sum, with_rounding(more.row_max, features)),
        ]
        merged = merge_rows(parts[0], parts[1], exact)  # (M, 3)
        shares = [
            ((part[:, 0] - merged[:, 0]) / exact + part[:, 1] - merged[:, 1])
            .exp()
            .masked_fill(part[:, 1] == -torch.inf, 0.0)
            .to(out.row_lse.dtype)
            for part in parts
        ]
        counts = out.column_lse.shape[0], more.column_lse.shape[0]
        similarity = out.mean_similarity * counts[0] + more.mean_similarity * counts[1]
        shift, log_sum, largest = merged.to(out.row_lse.dtype).unbind(1)
    # The value is not LSE-, which ``gap`` takes from shift and log_sum. The gradient is its own.
    row_lse = shares[0] * out.row_lse.masked_fill(out.row_log_sum == -torch.inf, 0.0)
    return out._replace(
        row_lse=row_lse + shares[1] * more.row_lse,
        row_shift=shift,
        row_log_sum=log_sum,
        row_max=largest,
        mean_similarity=similarity / sum(counts),
    )


class Columns(NamedTuple):
    """Numbers of the columns of the positives, in the order of the queries, each (M,)."""

    lse: Tensor
    shift: Tensor
    log_sum: Tensor
    largest: Tensor  # largest similarity of a negative


class Candidates(NamedTuple):
    """What label smoothing needs of the rows of the product."""

    queries: Tensor  # (M, D)
    positives: Tensor  # (M, D) the positive of each query
    mean_key: Tensor  # (D,) over all candidates of the queries
    mean_query: Tensor  # (D,) over all candidates of the keys


class QueryTerms(NamedTuple):
    """Numbers of each query."""

    losses: Tensor  # (M,)
    hits: Tensor  # (M,) 1 where the positive beats every negative
    lse: Tensor  # (M,) the positive included, detached


def query_terms(
    out: CrossLogSumExpForward,
    columns: Columns | None,
    *,
    smooth: Candidates | None,
    tau: float | Tensor,
    label_smoothing: float,
) -> QueryTerms:
    """The losses that follow from the numbers of each row and, for both directions, each column."""
    positive = out.positive
    row_gap = gap(out.row_lse, positive, out.row_shift, out.row_log_sum, tau)
    losses = softplus(row_gap)  # (M,)
    hits = (positive > out.row_max).to(positive.dtype)
    if columns is not None:
        column_gap = gap(columns.lse, positive, columns.shift, columns.log_sum, tau)
        losses = (losses + softplus(column_gap)) / 2
        hits = (hits + (positive > columns.largest)) / 2
    if smooth is not None:
        # (M,) difference of the positive's similarity and the mean; 0 if there is no negative
        above = positive - smooth.queries @ smooth.mean_key
        above = above.masked_fill(out.row_log_sum == -torch.inf, 0.0)
        if columns is not None:
            of_keys = positive - smooth.positives @ smooth.mean_query
            above = (above + of_keys.masked_fill(columns.log_sum == -torch.inf, 0.0)) / 2
        losses = smoothed(losses, above, label_smoothing, tau)
    with torch.no_grad():
        lse = softplus(row_gap) + positive / tau
    return QueryTerms(losses=losses, hits=hits, lse=lse)


def smoothed(losses: Tensor, above: Tensor, smoothing: float, tau: float | Tensor) -> Tensor:
    """The losses with label smoothing.

    Args:
        losses: (M,) losses without it.
        above: (M,) similarity of the positive minus the mean of all candidates.
        smoothing: Share of the target that is spread.
        tau: Temperature.
    """
    loss = losses + smoothing * above / tau
    # The exact loss is not negative. Rounding may leave less than 0 where it is 0.
    return loss + (loss.detach().clamp(min=0) - loss.detach())
