"""Facts that every layer shares: dtypes, options, defaults, ranges, and the names of results.

Letters: B pairs, V views, M = V * B rows (V = 2 unless said otherwise), N columns of a rectangle of
similarities, D features, L levels of a hierarchy.

"fp32" in a comment beside a tensor means the accumulation dtype: fp64 for fp64 inputs, fp32 for
every other dtype.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
PredictionLossType = Literal["smoothl1", "mse", "huber"]
LOSS_TYPES: tuple[str, ...] = get_args(PredictionLossType)
TargetNorm = Literal["layer"]
Strategy = Literal["auto", "all_gather", "ring"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
ContrastiveType = Literal["nt_xent", "dcl", "info_nce", "sup_con"]
CONTRASTIVE_TYPES: tuple[str, ...] = get_args(ContrastiveType)

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes of inputs

# Defaults of the functions, the modules and the reference.
TEMPERATURE = 0.1
INFO_NCE_TEMPERATURE = 0.07
EPS = 1e-8
SMOOTHL1_BETA = 1.0
HUBER_DELTA = 1.0
JEPA_WEIGHT = 1.0
CONTRASTIVE_WEIGHT = 0.1

# The range of temperatures, eps and thresholds: fp32 holds these numbers and their inverses.
SMALLEST, LARGEST = 1e-30, 1e30
# The side of the square blocks into which the compiled module cuts S. It is large from
# LARGE_BLOCK_ROWS rows on. csrc/cpu/constants.h has the same numbers, and a test compares both.
SMALL_BLOCK, LARGE_BLOCK = 96, 192
LARGE_BLOCK_ROWS = 1536
LAYER_EPS = 1e-5  # the eps of LayerNorm, which is the default of F.layer_norm


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, sums, losses and metrics: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class NTXentOutput(NamedTuple):
    """Result of :func:`nt_xent`. Everything but ``loss`` is detached and stays on the device.

    Attributes:
        loss: () for ``mean`` and ``sum``, (M,) for ``none``; fp32 (fp64 for fp64 inputs).
        accuracy: () share of anchors whose positive beats every negative; a tie is a miss.
        positive_similarity: () mean similarity of positive pairs, not divided by temperature.
        negative_similarity: () mean similarity of negative pairs; NaN when there are none.
        lse: (M,) log-sum-exp of each anchor's logits, positive included, itself excluded.
    """

    loss: Tensor
    accuracy: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    lse: Tensor


class NTXentTerms(NamedTuple):
    """NT-Xent of the reference before any reduction. Only ``loss`` carries a gradient."""

    loss: Tensor  # (M,) fp32
    accuracy: Tensor  # () fp32
    positive_similarity: Tensor  # () fp32
    negative_similarity: Tensor  # () fp32
    lse: Tensor  # (M,) fp32


class NTXentForward(NamedTuple):
    """Results of the operator ``nt_xent``, in the order of its schema.

    ``shift`` and ``log_sum`` hold LSE- of a row, the log-sum-exp over its negatives, as
    LSE- = shift / tau + log_sum: the sum itself would be rounded at low temperature.
    """

    loss: Tensor  # () fp32, or (M,) for reduction="none"
    accuracy: Tensor  # () fp32
    positive_similarity: Tensor  # () fp32
    negative_similarity: Tensor  # () fp32
    lse: Tensor  # (M,) fp32, the positive included
    largest_negative: Tensor  # (M,) fp32, largest similarity of a negative, -inf without any
    shift: Tensor  # (M,) fp32, a similarity
    log_sum: Tensor  # (M,) fp32, log of the sum over the negatives of exp((s - shift) / tau)
    positive: Tensor  # (M,) fp32, similarity of the positive
    saved_for_backward: Tensor  # of the back end alone; empty unless the forward was asked to save


class NTXentBackward(NamedTuple):
    """Results of the operator ``nt_xent_backward``, in the order of its schema."""

    grad_z_i: Tensor  # (B, D), dtype of z_i
    grad_z_j: Tensor  # (B, D), dtype of z_j
    grad_temperature: Tensor  # (), dtype of the temperature tensor, fp32 without one


class InfoNCEOutput(NamedTuple):
    """Result of :func:`info_nce`. Everything but ``loss`` is detached and stays on the device.

    Attributes:
        loss: () for ``mean`` and ``sum``, (M,) for ``none``; fp32 (fp64 for fp64 inputs).
        accuracy: () share of queries whose positive beats every negative; a tie is a miss. With
            ``symmetric`` it is the mean of both directions.
        positive_similarity: () mean similarity of queries and their positives, not divided by
            temperature.
        negative_similarity: () mean similarity of queries and their negatives; NaN without any.
        lse: (M,) log-sum-exp of each query's logits, the positive included.
    """

    loss: Tensor
    accuracy: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    lse: Tensor


class SupConOutput(NamedTuple):
    """Result of :func:`sup_con`. Everything but ``loss`` is detached and stays on the device.

    There is no accuracy: it would take each anchor's nearest positive and nearest negative, and the
    sums over classes that make the loss cheap do not hold them.

    Attributes:
        loss: () for ``mean`` and ``sum``, (M,) for ``none``, 0 for an anchor without a positive;
            fp32 (fp64 for fp64 inputs).
        positive_similarity: () mean similarity of pairs of one class, not divided by temperature;
            NaN without any.
        negative_similarity: () mean similarity of pairs of different classes; NaN without any.
        lse: (M,) log-sum-exp of each anchor's logits, positives included, itself excluded; -inf for
            a row that is alone.
        num_anchors: () int64, the number of anchors with a positive.
    """

    loss: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor
    lse: Tensor
    num_anchors: Tensor


class CrossLogSumExp(NamedTuple):
    """Result of ``cross_logsumexp``: M rows against N columns, everything on the device.

    In fp32 (fp64 for fp64 inputs). Only the log-sum-exps carry a gradient.

    Attributes:
        row_lse: (M,) log-sum-exp of each row's logits, over all N columns.
        column_lse: (N,) log-sum-exp of each column's logits, over all M rows.
        row_max: (M,) each row's largest similarity, not divided by temperature.
        column_max: (N,) each column's largest similarity.
    """

    row_lse: Tensor
    column_lse: Tensor
    row_max: Tensor
    column_max: Tensor


class PairedLogSumExp(NamedTuple):
    """Result of ``paired_logsumexp``: M rows against N columns, everything on the device.

    The similarity of a row and its positive is in ``positive`` and ``mean_similarity``, and in none
    of the others. In fp32 (fp64 for fp64 inputs). The log-sum-exps and ``positive`` carry a
    gradient.

    Attributes:
        row_lse: (M,) log-sum-exp of each row's negative logits; -inf for a row without negatives.
        column_lse: (N,) log-sum-exp of each column's negative logits; -inf without negatives.
        row_max: (M,) each row's largest negative similarity, not divided by temperature; -inf
            without negatives.
        column_max: (N,) each column's largest negative similarity.
        positive: (M,) similarity of each row and its positive, not divided by temperature.
        mean_similarity: () mean of all M x N similarities.
    """

    row_lse: Tensor
    column_lse: Tensor
    row_max: Tensor
    column_max: Tensor
    positive: Tensor
    mean_similarity: Tensor


class CrossLogSumExpForward(NamedTuple):
    """Results of the operator ``cross_logsumexp``, in the order of its schema.

    For a row and for a column alike, lse = shift / tau + log_sum.
    """

    row_lse: Tensor  # (M,) fp32
    column_lse: Tensor  # (N,) fp32
    row_max: Tensor  # (M,) fp32, largest similarity
    column_max: Tensor  # (N,) fp32
    row_shift: Tensor  # (M,) fp32, a similarity
    row_log_sum: Tensor  # (M,) fp32, log of the sum of exp((s - shift) / tau)
    column_shift: Tensor  # (N,) fp32
    column_log_sum: Tensor  # (N,) fp32
    positive: Tensor  # (M,) fp32, similarity of the positive, 0 without one; (0,) without positives
    mean_similarity: Tensor  # () fp32, of all entries of S; (0,) without positives
    saved_for_backward: Tensor  # of the back end alone; empty unless the forward was asked to save


class CrossLogSumExpBackward(NamedTuple):
    """Results of the operator ``cross_logsumexp_backward``, in the order of its schema."""

    grad_x: Tensor  # (M, D), dtype of x, or (0, D) if it was not asked for
    grad_y: Tensor  # (N, D), dtype of y, or (0, D) if it was not asked for
    grad_temperature: Tensor  # (), dtype of the temperature tensor, fp32 without one


class SelfLogSumExp(NamedTuple):
    """Result of :func:`self_logsumexp`: each of M rows against the others, on their device.

    In fp32 (fp64 for fp64 inputs). ``lse`` and ``positive`` carry a gradient.

    Attributes:
        lse: (M,) log-sum-exp of each row's logits over the rows that count; -inf without any.
        largest: (M,) each row's largest similarity that counts, not divided by temperature; -inf
            without any.
        positive: (M,) similarity of each row and its positive, not divided by temperature; 0
            without one.
    """

    lse: Tensor
    largest: Tensor
    positive: Tensor


class SelfLogSumExpForward(NamedTuple):
    """Results of the operator ``self_logsumexp``, in the order of its schema.

    lse = shift / tau + log_sum.
    """

    lse: Tensor  # (M,) fp32, -inf for a row of which no entry counts
    largest: Tensor  # (M,) fp32, largest similarity that counts, -inf without any
    shift: Tensor  # (M,) fp32, a similarity
    log_sum: Tensor  # (M,) fp32, log of the sum of exp((s - shift) / tau)
    positive: Tensor  # (M,) fp32, similarity of the positive, 0 without one; (0,) without positives
    saved_for_backward: Tensor  # of the back end alone; empty unless the forward was asked to save


class SelfLogSumExpBackward(NamedTuple):
    """Results of the operator ``self_logsumexp_backward``, in the order of its schema."""

    grad_z_i: Tensor  # (B, D), dtype of z_i
    grad_z_j: Tensor  # (B, D), dtype of z_j, or (0, D) without one
    grad_temperature: Tensor  # (), dtype of the temperature tensor, fp32 without one


class ClassSimilarityForward(NamedTuple):
    """Results of the operator ``class_similarity``, in the order of its schema."""

    within: Tensor  # (M,) fp32, mean similarity of a row and the rest of its class, 0 without any
    across: Tensor  # () fp32, mean similarity of two rows of different classes, NaN without any


class ClassSimilarityBackward(NamedTuple):
    """Results of the operator ``class_similarity_backward``, in the order of its schema."""

    grad_z_i: Tensor  # (B, D), dtype of z_i
    grad_z_j: Tensor  # (B, D), dtype of z_j, or (0, D) without one


class PredictionLossForward(NamedTuple):
    """Results of the operator ``prediction_loss``, in the order of its schema."""

    loss: Tensor  # () fp32, sum of weight x level
    unweighted: Tensor  # () fp32, mean of the levels
    levels: Tensor  # (L,) fp32, or all errors of all levels, one after the other, for "none"
    statistics: Tensor  # (rows of all levels, 2) fp32, the numbers that normalise each row
    scales: Tensor  # (L,) fp32, the factor of each level's sum of errors


class PredictionLossBackward(NamedTuple):
    """Results of the operator ``prediction_loss_backward``, in the order of its schema."""

    grad_predictions: list[Tensor]  # of the shapes and dtypes of the predictions
    grad_targets: list[Tensor]  # of the targets, or empty if they were not asked for


class HierarchicalLoss(NamedTuple):
    """Losses of several levels.

    Attributes:
        loss: () sum of weight x level.
        unweighted: () mean of the levels.
        levels: One () tensor for each level. With ``reduction="none"`` each has its level's shape
            and is a part of one tensor; ``loss`` and ``unweighted`` are then taken from the means
            of the levels.
    """

    loss: Tensor
    unweighted: Tensor
    levels: tuple[Tensor, ...]
