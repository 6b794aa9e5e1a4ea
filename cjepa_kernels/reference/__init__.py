"""Ground truth: every formula of the package in plain PyTorch autograd.

It is written to be read and compared with, not to be fast. Tests compare every back end with these
functions in float64. They support double backward.

The letters are those of ``definitions``; a is an anchor (one row) and pos(a) its positive.
"""

from cjepa_kernels.definitions import FLOATING, CrossLogSumExp, NTXentTerms, accumulation_dtype
from cjepa_kernels.reference.class_similarity import class_similarity
from cjepa_kernels.reference.cross_logsumexp import cross_logsumexp, paired_logsumexp
from cjepa_kernels.reference.info_nce import info_nce, queue_info_nce
from cjepa_kernels.reference.nt_xent import nt_xent, nt_xent_logits
from cjepa_kernels.reference.prediction_loss import prediction_loss
from cjepa_kernels.reference.rows import (
    embed_rows,
    normalize_rows,
    positive_temperature,
    raise_to_bound,
    reduce,
    reduce_counted,
    round_operands,
    scale_of_rows,
    with_rounding,
)
from cjepa_kernels.reference.self_logsumexp import self_logsumexp
from cjepa_kernels.reference.sup_con import sup_con

__all__ = [
    "FLOATING",
    "CrossLogSumExp",
    "NTXentTerms",
    "accumulation_dtype",
    "class_similarity",
    "cross_logsumexp",
    "embed_rows",
    "info_nce",
    "normalize_rows",
    "nt_xent",
    "nt_xent_logits",
    "paired_logsumexp",
    "positive_temperature",
    "prediction_loss",
    "queue_info_nce",
    "raise_to_bound",
    "reduce",
    "reduce_counted",
    "round_operands",
    "scale_of_rows",
    "self_logsumexp",
    "sup_con",
    "with_rounding",
]
