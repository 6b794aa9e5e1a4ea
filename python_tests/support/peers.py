"""Stand-ins for other projects' losses, so that the documents' code runs without these projects."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cjepa_kernels.bench import formulas


class LightlyMemoryBank(nn.Module):
    """``NTXentLoss.memory_bank`` of lightly 1.6.0. It holds unit rows and overwrites the oldest."""

    bank: Tensor  # (K, D)
    bank_ptr: Tensor  # (1,) int64, index of the next row to write

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        rows = F.normalize(torch.randn(size), dim=1)
        self.register_buffer("bank", rows, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Overwrite the oldest rows. Rows beyond the end of the bank are dropped."""
        for row in rows:
            self.bank[self.bank_ptr] = row
            self.bank_ptr += 1
            if self.bank_ptr == len(self.bank):
                self.bank_ptr.zero_()
                break


class LightlyNTXentLoss(nn.Module):
    """``lightly.loss.NTXentLoss``."""

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.memory_bank = None if memory_bank_size is None else LightlyMemoryBank(memory_bank_size)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.memory_bank is None:
            loss: Tensor = formulas.lightly(out0, out1, temperature=self.temperature)
            return loss
        query, key = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        positive = (query * key).sum(dim=1, keepdim=True)  # (B, 1)
        negatives = query @ self.memory_bank.bank.clone().T  # (B, K)
        if query.requires_grad:
            self.memory_bank.push(key)
        logits = torch.cat([positive, negatives], dim=1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


class ClipLoss(nn.Module):
    """``open_clip.loss.ClipLoss`` of one process: cross-entropy along both sides of the logits."""

    def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        logits = logit_scale * image @ text.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


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


STAND_INS: dict[str, dict[str, type[nn.Module]]] = {
    "lightly.loss": {"NTXentLoss": LightlyNTXentLoss},
    "open_clip.loss": {"ClipLoss": ClipLoss},
    "src.losses": {"HJEPALoss": HJEPALoss, "ContrastiveJEPALoss": ContrastiveJEPALoss},
}


def stand_ins() -> dict[str, ModuleType]:
    """Modules by name, for ``sys.modules``, of the projects that are not installed."""
    modules = {}
    for name, classes in STAND_INS.items():
        package = name.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            modules[package] = ModuleType(package)
            modules[name] = ModuleType(name)
            vars(modules[name]).update(classes)
    return modules
