"""The losses as ``torch.nn.Module``, and a queue of negatives for them."""

from cjepa_kernels.modules.contrastive_jepa import ContrastiveJEPALoss
from cjepa_kernels.modules.hjepa import HJEPALoss
from cjepa_kernels.modules.info_nce import InfoNCELoss
from cjepa_kernels.modules.momentum_queue import MomentumQueue
from cjepa_kernels.modules.nt_xent import NTXentLoss
from cjepa_kernels.modules.sup_con import SupConLoss

__all__ = [
    "ContrastiveJEPALoss",
    "HJEPALoss",
    "InfoNCELoss",
    "MomentumQueue",
    "NTXentLoss",
    "SupConLoss",
]
