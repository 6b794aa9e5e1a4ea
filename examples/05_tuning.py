"""What temperature and weight do: the same features under several settings.

Read the gradient columns: a lower temperature puts the gradient on the hardest negatives, the
weight says how much of the whole gradient is contrastive. Full runs are compared by
``cjepa compare --config configs/cjepa.yaml loss.contrastive_temperature=0.07``.
"""

import torch

from cjepa_kernels import nt_xent

torch.manual_seed(0)
batch, dim = 128, 64
centre = torch.randn(dim)
z_i = centre + torch.randn(batch, dim)  # a common component, as untrained CLS tokens have
z_j = z_i + 0.7 * torch.randn(batch, dim)

print("temperature   loss   accuracy   gradient   share of the 10 hardest negatives")
for temperature in (0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0):
    leaf = z_i.clone().requires_grad_()
    out = nt_xent(leaf, z_j, temperature=temperature)
    out.loss.backward()
    unit = torch.nn.functional.normalize(torch.cat([z_i, z_j]), dim=1)
    logits = unit @ unit.T / temperature
    sample = torch.arange(2 * batch) % batch
    logits[sample[:, None] == sample] = -torch.inf
    hardest = logits.softmax(dim=1).topk(10).values.sum(dim=1).mean()
    print(
        f"{temperature:11}   {out.loss.item():5.2f}   {out.accuracy.item():8.2f}   "
        f"{leaf.grad.norm().item():8.4f}   {hardest.item():.2f}"
    )

print("\nweight   contrastive part of the loss, for a JEPA term of 0.25")
loss = nt_xent(z_i, z_j, temperature=0.1).loss.item()
for weight in (0.05, 0.1, 0.12, 0.2, 0.5):
    share = weight * loss / (0.25 + weight * loss)
    hint = "  <- the contrastive term dominates" if share > 0.5 else ""
    print(f"{weight:6}   {share:.0%}{hint}")
