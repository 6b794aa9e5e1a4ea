"""Dropping it into an existing trainer: one line changes, the numbers do not.

``Trainer`` stands for code that exists already: its loss is a callable of two embeddings.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cjepa_kernels import nt_xent


def usual_nt_xent(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The formula most projects carry: it builds the (2B, 2B) matrix several times over."""
    z = F.normalize(torch.cat([z_i, z_j]), dim=1)
    logits = z @ z.T / 0.1
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z_i)))


class Trainer:
    """SimCLR in a few lines."""

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 16))
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=0.1)
        self.loss_fn = loss_fn

    def fit(self, data: Tensor, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x = data[torch.randint(len(data), (64,))]
            views = [self.encoder(x + 0.2 * torch.randn_like(x)) for _ in range(2)]
            loss = self.loss_fn(*views)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


torch.manual_seed(1)
data = torch.randn(1000, 20)
before = Trainer(usual_nt_xent).fit(data, steps=50)
after = Trainer(lambda z_i, z_j: nt_xent(z_i, z_j, temperature=0.1).loss).fit(data, steps=50)
for step in (0, 10, 25, 49):
    print(f"step {step:2}  usual {before[step]:.6f}  cjepa_kernels {after[step]:.6f}")
largest = max(abs(a - b) for a, b in zip(before, after, strict=True))
print(f"largest difference over 50 steps: {largest:.1e}")
