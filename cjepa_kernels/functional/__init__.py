"""The losses as functions: they check arguments, choose the back end and call the operator."""

from cjepa_kernels.definitions import (
    CrossLogSumExp,
    HierarchicalLoss,
    InfoNCEOutput,
    NTXentOutput,
    PairedLogSumExp,
    SelfLogSumExp,
    SupConOutput,
)
from cjepa_kernels.functional.cls_tokens import cls_tokens
from cjepa_kernels.functional.cross_logsumexp import (
    cross_logsumexp,
    pair_similarity,
    paired_logsumexp,
)
from cjepa_kernels.functional.hierarchy import hierarchical_prediction_loss
from cjepa_kernels.functional.info_nce import info_nce
from cjepa_kernels.functional.nt_xent import nt_xent
from cjepa_kernels.functional.prediction_loss import prediction_loss
from cjepa_kernels.functional.self_logsumexp import self_logsumexp
from cjepa_kernels.functional.sup_con import sup_con

__all__ = [
    "CrossLogSumExp",
    "HierarchicalLoss",
    "InfoNCEOutput",
    "NTXentOutput",
    "PairedLogSumExp",
    "SelfLogSumExp",
    "SupConOutput",
    "cls_tokens",
    "cross_logsumexp",
    "hierarchical_prediction_loss",
    "info_nce",
    "nt_xent",
    "pair_similarity",
    "paired_logsumexp",
    "prediction_loss",
    "self_logsumexp",
    "sup_con",
]
