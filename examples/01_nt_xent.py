"""NT-Xent alone: two views of a batch in, loss and metrics out."""

import torch

from cjepa_kernels import NTXentLoss, backends, nt_xent

torch.manual_seed(0)
z_i = torch.randn(256, 128, requires_grad=True)  # embeddings of the first view
z_j = (z_i.detach() + 0.5 * torch.randn(256, 128)).requires_grad_()  # and of the second

# As a module: a dict with the loss and detached metrics.
loss_fn = NTXentLoss(temperature=0.1)
out = loss_fn(z_i, z_j)
out["loss"].backward()
for name, value in out.items():
    print(f"{name:20} {value.item():.4f}")
print(f"{'gradient norm':20} {z_i.grad.norm().item():.4f}")

# As a function: a named tuple, here with one loss per anchor and some pairs taken out of the
# negatives (samples 0 and 1 show the same object, say).
mask = torch.zeros(256, 256, dtype=torch.bool)
mask[0, 1] = True
per_anchor = nt_xent(z_i, z_j, temperature=0.1, mask=mask, reduction="none")
print(f"{'hardest anchor':20} {per_anchor.loss.argmax().item()} of {len(per_anchor.loss)}")

for name, status in backends().items():
    print(f"{name:10} {'available' if status.available else 'missing':10} {status.reason}")
