"""Both versions of FSDP train a learnable temperature as DDP does, on two gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, gradients_of
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cjepa_kernels import NTXentLoss

Result = dict[str, Any]


class Model(nn.Module):
    def __init__(self, shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(6, 4)
        self.loss_fn = NTXentLoss(
            0.2, learnable_temperature=True, temperature_shape=shape, distributed=True
        )

    def forward(self, views: Tensor) -> Tensor:
        loss: Tensor = self.loss_fn(self.encoder(views[0]), self.encoder(views[1]))["loss"]
        return loss


def own_views() -> Tensor:
    views = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(3))
    rank = dist.get_rank()
    return views[:, 4 * rank : 4 * rank + 4]


def ddp_step() -> tuple[Tensor, dict[str, Tensor]]:
    model = Model()
    # The wrapper must exist until the end, because it owns the hooks.
    parallel = DistributedDataParallel(model)
    loss = parallel(own_views())
    loss.backward()
    return loss.detach(), gradients_of(model)


def temperature_of(model: nn.Module) -> float:
    parameter: Any = model.loss_fn.log_temperature
    return float(parameter.full_tensor().detach().exp())


def fully_sharded_step() -> Result:
    """Run on each rank: a training step of FSDP2, and the temperature after each action."""
    result: Result = {}
    with torch.device("meta"):
        model = Model()
    fully_shard(model)
    result["repr"] = repr(model.loss_fn)  # This must not wait for other ranks.
    model.to_empty(device="cpu")
    model.loss_fn.reset_parameters()
    result["start"] = temperature_of(model)
    encoder_state = Model().encoder.state_dict()
    for name, parameter in model.encoder.named_parameters():
        sharded: Any = parameter.data
        sharded.copy_(
            distribute_tensor(encoder_state[name], sharded.device_mesh, sharded.placements)
        )
    loss = model(own_views())
    loss.backward()
    result["loss"] = loss.detach()
    result["gradients"] = {
        name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None
    }
    model.loss_fn.temperature = 0.5
    result["set"] = temperature_of(model)
    model.loss_fn.reset_parameters()
    result["reset"] = temperature_of(model)
    try:
        fully_shard(Model(()))
    except ValueError as error:
        result["scalar"] = str(error)
    return result


def wrapped_step() -> Result:
    """Run on each rank: a training step of FSDP1, and a state dict with a 0-dim temperature."""
    result: Result = {}
    model = Model()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    loss = wrapped(own_views())
    loss.backward()
    result["loss"], result["repr"] = loss.detach(), repr(model.loss_fn)
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        result["gradients"] = {k: g.clone() for k, g in gradients_of(model).items()}
    with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT):
        result["shape"] = wrapped.state_dict()["loss_fn.log_temperature"].shape
        other = Model(())
        other.loss_fn.temperature = 0.4
        wrapped.load_state_dict(other.state_dict())
    with FullyShardedDataParallel.summon_full_params(wrapped):
        result["loaded"] = float(model.loss_fn.temperature.detach())
    return result


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("step", [fully_sharded_step, wrapped_step])
def test_fsdp_trains_the_temperature_as_ddp_does(
    step: Callable[[], Result], ranks: Callable[[int], Ranks]
) -> None:
    expected = ranks(2).run(ddp_step)
    for (loss, gradients), result in zip(expected, ranks(2).run(step), strict=True):
        torch.testing.assert_close(result["loss"], loss)
        assert result["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(result["gradients"][name], gradient)
        assert gradients["loss_fn.log_temperature"].shape == (1,)
        # In FSDP1 one rank holds the number, and only that rank may print it.
        assert result["repr"].startswith(
            ("NTXentLoss(temperature=exp", "NTXentLoss(temperature=0.2")
        )
        if step is fully_sharded_step:
            assert "temperature=exp(log_temperature)" in result["repr"]
            assert result["start"] == result["reset"] == pytest.approx(0.2)
            assert result["set"] == pytest.approx(0.5)
            # FSDP2 refuses scalar parameters, which is why temperature_shape exists.
            assert "scalar parameters" in result["scalar"]
        else:
            assert result["shape"] == (1,)
            assert result["loaded"] == pytest.approx(0.4)
