"""C-JEPA in a plain PyTorch loop: two views, an EMA target encoder, masks drawn per view.

The smallest thing that has every part; ``cjepa train`` is the full program.
"""

import copy

import torch
from torch import Tensor, nn

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss

torch.manual_seed(0)
torch.set_num_threads(1)
PATCHES, PATCH_DIM, DIM, BATCH, VISIBLE = 16, 12, 32, 64, 10


class Encoder(nn.Module):
    """A small transformer over patches with a CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH_DIM, DIM)
        self.position = nn.Parameter(0.1 * torch.randn(PATCHES, DIM))
        self.cls = nn.Parameter(0.1 * torch.randn(1, 1, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 1, nn.LayerNorm(DIM), enable_nested_tensor=False)

    def forward(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        x = self.embed(patches) + self.position
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, DIM))
        return self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1))


encoder = Encoder()
target_encoder = copy.deepcopy(encoder).requires_grad_(False)
predictor = nn.Sequential(nn.Linear(2 * DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
loss_fn = ContrastiveJEPALoss(
    HJEPALoss(num_hierarchies=1, target_norm="layer"), contrastive_on_context=True
)
optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=2e-3)
scenes = torch.randn(512, PATCHES, PATCH_DIM)

for step in range(120):
    sample = scenes[torch.randint(len(scenes), (BATCH,))]
    # Two augmented views in one batch of 2B, so both go through one forward.
    views = torch.cat([sample + 0.3 * torch.randn_like(sample) for _ in range(2)])
    # A mask of its own for every image of every view: with one mask for both views the CLS token
    # learns to encode the mask, and the contrastive term is solved without looking at the image.
    order = torch.rand(2 * BATCH, PATCHES).argsort(dim=1)
    keep, hidden = order[:, :VISIBLE], order[:, VISIBLE:]

    context = encoder(views, keep)  # (2B, 1 + VISIBLE, DIM)
    with torch.no_grad():
        target = target_encoder(views)[:, 1:].gather(1, hidden[..., None].expand(-1, -1, DIM))
    query = encoder.position[hidden]  # (2B, PATCHES - VISIBLE, DIM)
    summary = context[:, 1:].mean(dim=1, keepdim=True).expand_as(query)
    prediction = predictor(torch.cat([summary, query], dim=-1))

    out = loss_fn([prediction], [target], context[:BATCH], context[BATCH:])
    optimizer.zero_grad()
    out["loss"].backward()
    optimizer.step()
    momentum = 0.99
    with torch.no_grad():
        for slow, fast in zip(target_encoder.parameters(), encoder.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)
    if step % 20 == 0 or step == 119:
        gap = out["contrastive_pos_sim"] - out["contrastive_neg_sim"]
        print(
            f"step {step:3}  loss {out['loss'].item():.4f}  jepa {out['jepa_loss'].item():.4f}  "
            f"contrastive {out['contrastive_loss'].item():.4f}  "
            f"accuracy {out['contrastive_accuracy'].item():.2f}  gap {gap.item():.3f}"
        )
