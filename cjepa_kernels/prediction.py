"""The prediction loss under its first import path; the code is in ``functional``."""

from cjepa_kernels.definitions import HierarchicalLoss
from cjepa_kernels.functional.hierarchy import PredictionOptions, hierarchical_prediction_loss
from cjepa_kernels.functional.prediction_loss import prediction_loss

__all__ = [
    "HierarchicalLoss",
    "PredictionOptions",
    "hierarchical_prediction_loss",
    "prediction_loss",
]
