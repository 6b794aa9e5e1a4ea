"""The C-JEPA loss on tensors: three hierarchy levels of predictions and two views' features."""

import torch

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss

torch.manual_seed(0)
batch, patches, dim = 32, 16, 64

jepa = HJEPALoss(loss_type="smoothl1", hierarchy_weights=[1.0, 0.5, 0.25], num_hierarchies=3)
loss_fn = ContrastiveJEPALoss(
    jepa_loss=jepa,
    contrastive_weight=0.1,
    contrastive_temperature=0.1,
    contrastive_on_context=True,  # features of an EMA target encoder carry no gradient
)

levels = [patches, patches // 2, patches // 4]
predictions = [torch.randn(batch, n, dim, requires_grad=True) for n in levels]
targets = [torch.randn(batch, n, dim) for n in levels]
# What the context encoder returns for the two views: the CLS token at index 0, patches after it.
context_i = torch.randn(batch, 1 + patches, dim, requires_grad=True)
context_j = torch.randn(batch, 1 + patches, dim, requires_grad=True)

out = loss_fn(
    predictions=predictions,
    targets=targets,
    context_features_i=context_i,
    context_features_j=context_j,
)
out["loss"].backward()
print(loss_fn.get_loss_summary(out))
print(f"\ngradient at the CLS tokens:  {context_i.grad[:, 0].norm().item():.5f}")
print(f"gradient at the predictions: {predictions[0].grad.norm().item():.5f}")
