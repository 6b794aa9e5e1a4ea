"""Negatives from every rank: two processes train as one does with both their batches.

python examples/07_many_ranks.py                         # starts two processes by itself
torchrun --nproc_per_node=4 examples/07_many_ranks.py    # or as many as you like
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cjepa_kernels import NTXentLoss

BATCH, STEPS = 64, 20


def train() -> None:
    """What every rank runs, in a process group that exists already."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same initial weights on every rank
    encoder = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)))
    # strategy="auto" gathers the features of small batches and sends those of large ones round a
    # ring; no rank ever holds similarities. (A learnable temperature would belong into the module
    # that DDP wraps: its gradient has to be averaged, too.)
    loss_fn = NTXentLoss(temperature=0.2, distributed=True)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    own_samples = torch.Generator().manual_seed(dist.get_rank())
    for step in range(STEPS):
        sample = torch.randn(BATCH, 16, generator=own_samples)
        views = [sample + 0.3 * torch.randn(BATCH, 16, generator=own_samples) for _ in range(2)]
        z_i, z_j = encoder(torch.cat(views)).chunk(2)
        out = loss_fn(z_i, z_j)
        optimizer.zero_grad()
        out["loss"].backward()  # every rank has to run it: gradients of features travel too
        optimizer.step()
        if dist.get_rank() == 0 and step % 5 == 4:
            # The metrics are those of all ranks, the same on each.
            print(
                f"step {step + 1}: accuracy {out['accuracy']:.3f} of {dist.get_world_size()} ranks"
            )


def start(rank: int, store: str) -> None:
    """One of two processes, where torchrun did not start them."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        train()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as directory:
            mp.spawn(start, (os.path.join(directory, "store"),), nprocs=2)
