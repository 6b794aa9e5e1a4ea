"""Negatives from every rank: equal to one process on the whole batch (gloo processes)."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor, nn

from cjepa_kernels import NTXentLoss, nt_xent
from cjepa_kernels.distributed import resolve_group


def data(batches: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, batch, 6, generator=generator, dtype=torch.float64) for batch in batches]


def make_encoder(loss_options: dict[str, Any]) -> nn.ModuleDict:
    torch.manual_seed(1)
    encoder = nn.Linear(6, 5, dtype=torch.float64)
    return nn.ModuleDict({"encoder": encoder, "loss": NTXentLoss(0.2, **loss_options)})


class Step(nn.Module):
    """Encoder and loss as one module, so that DDP averages the temperature's gradient too."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        parts = make_encoder(options).double()
        self.encoder, self.loss_fn = parts["encoder"], parts["loss"]

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self.loss_fn(self.encoder(views[0]), self.encoder(views[1]))
        return result


def worker(rank: int, path: str, batches: list[int], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=rank,
        world_size=len(batches),
        timeout=timedelta(seconds=60),
    )
    try:
        model = nn.parallel.DistributedDataParallel(Step({**options, "distributed": True}))
        out = model(data(batches)[rank])
        loss = out["loss"].sum()
        loss.backward()
        gradients = {name: p.grad for name, p in model.module.named_parameters()}
        torch.save({"out": out, "gradients": gradients}, os.path.join(path, f"{rank}.pt"))
    except ValueError as error:
        Path(path, f"{rank}.error").write_text(str(error))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("batches", "options"),
    [
        ([4, 4], {}),
        ([3, 7], {"learnable_temperature": True}),
        ([2, 5, 1], {"backend": "chunked", "learnable_temperature": True}),
        ([3, 2], {"backend": "reference", "use_cosine_similarity": False}),
        ([3, 2], {"reduction": "sum"}),
        ([3, 2], {"reduction": "none"}),
    ],
    ids=["equal", "ragged", "three_ranks", "reference_dot", "sum", "none"],
)
def test_equals_one_process_on_the_whole_batch(
    batches: list[int], options: dict[str, Any], tmp_path: Path
) -> None:
    mp.spawn(worker, (str(tmp_path), batches, options), nprocs=len(batches))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(batches))]

    whole = Step(options)
    views = torch.cat(data(batches), dim=1)
    expected = whole(views)
    expected["loss"].sum().backward()
    losses = [rank["out"]["loss"].detach() for rank in ranks]
    if options.get("reduction") == "none":
        own = [loss.unflatten(0, (2, -1)) for loss in losses]
        torch.testing.assert_close(torch.cat(own, dim=1).flatten(), expected["loss"].detach())
    else:
        total = torch.stack(losses).sum()
        mean = total if options.get("reduction") == "sum" else total / len(batches)
        assert relative_error(mean, expected["loss"]) <= FLOOR_VALUE[torch.float64]
    # DDP averages: sum and none carry no factor R, so their gradients come out divided by R.
    scale = 1 if options.get("reduction", "mean") == "mean" else 1 / len(batches)
    for rank in ranks:
        for name in ("accuracy", "positive_similarity", "negative_similarity"):
            assert torch.equal(rank["out"][name], ranks[0]["out"][name])
            torch.testing.assert_close(rank["out"][name], expected[name])
        for name, parameter in whole.named_parameters():
            gradient = rank["gradients"][name]
            assert (
                relative_error(gradient, scale * parameter.grad)
                <= 10 * FLOOR_GRADIENT[torch.float64]
            ), name


def test_a_rank_without_pairs_is_named_on_every_rank(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path), [2, 0], {}), nprocs=2)
    for rank in (0, 1):
        assert "rank 1 has none" in (tmp_path / f"{rank}.error").read_text()


def test_errors_without_processes() -> None:
    z = torch.randn(3, 2)
    with pytest.raises(RuntimeError, match="init_process_group"):
        NTXentLoss(distributed=True)(z, z)
    with pytest.raises(TypeError, match="a bool or a process group, got str"):
        NTXentLoss(distributed="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"strategy must be one of.*'rings'"):
        NTXentLoss(strategy="rings")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"strategy must be one of.*'rings'"):
        nt_xent(z, z, strategy="rings")  # type: ignore[arg-type]
    assert resolve_group(False) is None


def test_mask_and_group_exclude_each_other(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        z_i, z_j = torch.randn(2, 3, 2)
        with pytest.raises(ValueError, match="mask must be None with a group"):
            nt_xent(z_i, z_j, mask=torch.zeros(3, 3, dtype=torch.bool), group=dist.group.WORLD)
        alone = nt_xent(z_i, z_j, group=dist.group.WORLD)
        torch.testing.assert_close(alone, nt_xent(z_i, z_j))
        NTXentLoss(distributed=dist.group.WORLD)(z_i, z_j)
    finally:
        dist.destroy_process_group()
