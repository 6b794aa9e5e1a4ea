"""Losses of other projects as plain formulas, with the constructors and forwards they have there.

They are our own writing, and ``python_tests/compat`` compares them with the projects where those
are installed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather


class ClipLoss(nn.Module):
    """``open_clip.ClipLoss`` 3.3.0."""

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        image, text = image_features, text_features
        images, texts = self._gather(image), self._gather(text)
        if not self.local_loss:
            image, text = images, texts
        labels = torch.arange(len(image))
        if self.local_loss:
            labels += self.rank * len(image)
        loss = torch.zeros(())
        for rows, others in ((image, texts), (text, images)):
            logits = logit_scale * rows @ others.T
            if logit_bias is not None:
                logits = logits + logit_bias
            loss = loss + F.cross_entropy(logits, labels) / 2
        return {"contrastive_loss": loss} if output_dict else loss

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks; without ``gather_with_grad`` those of others are constants."""
        if self.world_size == 1:
            return rows
        if self.gather_with_grad:
            return torch.cat(all_gather(rows))
        gathered = [torch.zeros_like(rows) for _ in range(self.world_size)]
        dist.all_gather(gathered, rows.detach())
        if not self.local_loss:
            gathered[self.rank] = rows
        return torch.cat(gathered)
