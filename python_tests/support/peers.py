"""Stand-ins for other projects' losses, so that the documents' code runs without these projects."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import peer_losses
from torch import Tensor, nn

from cjepa_kernels.bench import formulas


class HJEPALoss(nn.Module):
    """``src.losses.HJEPALoss`` of H-JEPA."""

    def __init__(
        self, loss_type: str, hierarchy_weights: list[float], num_hierarchies: int
    ) -> None:
        super().__init__()
        assert loss_type == "smoothl1"
        assert len(hierarchy_weights) == num_hierarchies
        self.weights = hierarchy_weights

    def forward(self, predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
        loss: Tensor = formulas.hjepa_prediction(predictions, targets, self.weights)
        return loss


class ContrastiveJEPALoss(nn.Module):
    """``src.losses.ContrastiveJEPALoss`` of H-JEPA."""

    def __init__(self, jepa_loss: nn.Module, contrastive_weight: float) -> None:
        super().__init__()
        self.jepa_loss, self.contrastive_weight = jepa_loss, contrastive_weight

    def forward(
        self,
        predictions: list[Tensor],
        targets: list[Tensor],
        context_features_i: Tensor,
        context_features_j: Tensor,
    ) -> dict[str, Tensor]:
        jepa = self.jepa_loss(predictions, targets)
        contrastive = formulas.four_blocks(context_features_i[:, 0], context_features_j[:, 0])
        return {"loss": jepa + self.contrastive_weight * contrastive}


STAND_INS: dict[str, dict[str, object]] = {
    "info_nce": {"InfoNCE": peer_losses.InfoNCE, "info_nce": peer_losses.info_nce},
    "lightly.loss": {"NTXentLoss": peer_losses.LightlyNTXentLoss},
    "open_clip.loss": {"ClipLoss": peer_losses.ClipLoss},
    "sentence_transformers.sentence_transformer.losses": {
        "MultipleNegativesRankingLoss": peer_losses.MultipleNegativesRankingLoss
    },
    "src.losses": {"HJEPALoss": HJEPALoss, "ContrastiveJEPALoss": ContrastiveJEPALoss},
}


def stand_ins() -> dict[str, ModuleType]:
    """Modules by name, for ``sys.modules``, of the projects that are not installed."""
    modules = {}
    for name, contents in STAND_INS.items():
        parts = name.split(".")
        if importlib.util.find_spec(parts[0]) is None:
            for depth in range(1, len(parts) + 1):
                path = ".".join(parts[:depth])
                modules[path] = ModuleType(path)
            vars(modules[name]).update(contents)
    return modules
