"""Contrastive-JEPA losses: JEPA prediction plus NT-Xent, with memory that grows with the batch."""

from cjepa_kernels._version import __version__
from cjepa_kernels.backends import BackendStatus, backends
from cjepa_kernels.config import create_cjepa_loss_from_config, create_loss_from_config
from cjepa_kernels.definitions import (
    CrossLogSumExp,
    InfoNCEOutput,
    NTXentOutput,
    PairedLogSumExp,
    SelfLogSumExp,
    SupConOutput,
)
from cjepa_kernels.functional import (
    cross_logsumexp,
    info_nce,
    nt_xent,
    pair_similarity,
    paired_logsumexp,
    prediction_loss,
    self_logsumexp,
    sup_con,
)
from cjepa_kernels.modules import (
    ContrastiveJEPALoss,
    HJEPALoss,
    InfoNCELoss,
    MomentumQueue,
    NTXentLoss,
    SupConLoss,
)

__all__ = [
    "BackendStatus",
    "ContrastiveJEPALoss",
    "CrossLogSumExp",
    "HJEPALoss",
    "InfoNCELoss",
    "InfoNCEOutput",
    "MomentumQueue",
    "NTXentLoss",
    "NTXentOutput",
    "PairedLogSumExp",
    "SelfLogSumExp",
    "SupConLoss",
    "SupConOutput",
    "__version__",
    "backends",
    "create_cjepa_loss_from_config",
    "create_loss_from_config",
    "cross_logsumexp",
    "info_nce",
    "nt_xent",
    "pair_similarity",
    "paired_logsumexp",
    "prediction_loss",
    "self_logsumexp",
    "sup_con",
]
