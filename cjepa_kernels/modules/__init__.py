"""The losses as ``torch.nn.Module``."""

from cjepa_kernels.modules.contrastive_jepa import ContrastiveJEPALoss
from cjepa_kernels.modules.hjepa import HJEPALoss
from cjepa_kernels.modules.info_nce import InfoNCELoss
from cjepa_kernels.modules.nt_xent import NTXentLoss

__all__ = ["ContrastiveJEPALoss", "HJEPALoss", "InfoNCELoss", "NTXentLoss"]
