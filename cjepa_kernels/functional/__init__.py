"""The losses as functions: they check arguments, choose the back end and call the operator."""

from cjepa_kernels.definitions import CrossLogSumExp, HierarchicalLoss, NTXentOutput
from cjepa_kernels.functional.cls_tokens import cls_tokens
from cjepa_kernels.functional.cross_logsumexp import cross_logsumexp, pair_similarity
from cjepa_kernels.functional.hierarchy import hierarchical_prediction_loss
from cjepa_kernels.functional.nt_xent import nt_xent
from cjepa_kernels.functional.prediction_loss import prediction_loss

__all__ = [
    "CrossLogSumExp",
    "HierarchicalLoss",
    "NTXentOutput",
    "cls_tokens",
    "cross_logsumexp",
    "hierarchical_prediction_loss",
    "nt_xent",
    "pair_similarity",
    "prediction_loss",
]
