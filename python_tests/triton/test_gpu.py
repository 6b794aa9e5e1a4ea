"""Tests that need a GPU: CUDA graphs, determinism, and a host that never waits for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import FLOOR_GRADIENT, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss, NTXentLoss, backends, nt_xent

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)
if not backends()["triton"].available:
    pytest.skip(backends()["triton"].reason, allow_module_level=True)

SIZES = [(64, 128), (2048, 256), (5000, 768)]


def step(z: Tensor, temperature: float | Tensor = 0.1) -> list[Tensor]:
    """All outputs and the gradient."""
    out = nt_xent(z[0], z[1], temperature=temperature, backend="triton")
    return [*out, torch.autograd.grad(out.loss, z)[0]]


def inputs(batch: int, features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, batch, features, device="cuda").to(dtype).requires_grad_()


@pytest.mark.parametrize(("batch", "features"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_same_bits_every_time(batch: int, features: int, dtype: torch.dtype) -> None:
    z = inputs(batch, features, dtype)
    first = step(z)
    for _ in range(3):
        for value, expected in zip(step(z), first, strict=True):
            assert torch.equal(value, expected) or (value.isnan() & expected.isnan()).all()


@pytest.mark.parametrize(("batch", "features"), SIZES)
def test_a_graph_replays_the_step_on_new_inputs(batch: int, features: int) -> None:
    z = inputs(batch, features)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(z)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step(z)
    with torch.no_grad():
        z.copy_(torch.randn_like(z))
    graph.replay()
    for value, expected in zip(recorded, step(z), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class BothTerms(nn.Module):
    """The loss of C-JEPA, with the views as CLS tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1))
        self.contrastive = self.loss.contrastive

    def forward(self, z_i: Tensor, z_j: Tensor) -> dict[str, Tensor]:
        levels = [z.unflatten(0, (-1, 4)) for z in (z_i, z_j.detach())]
        result: dict[str, Tensor] = self.loss(levels[:1], levels[1:], z_i[:, None], z_j[:, None])
        return result


# A test compiles for seconds, and make gpu-check has little time for this file. C-JEPA's loss also
# holds the operators of NT-Xent and of H-JEPA's loss.
RECORDED = {
    "NT-Xent, learnable": lambda: NTXentLoss(learnable_temperature=True),
    "NT-Xent, a schedule on the device": lambda: NTXentLoss(
        learnable_temperature=True
    ).requires_grad_(False),
    "C-JEPA": BothTerms,
}


def compare_steps(module: Any, temperatures: list[float]) -> int:
    """Compare compiled and eager steps on new inputs each time; the number of CUDA graphs."""
    z_i, z_j = (
        torch.randn(256, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)
    )
    leaves = [z_i, z_j, *(p for p in module.parameters() if p.requires_grad)]
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    contrastive = getattr(module, "contrastive", module)
    for temperature in temperatures:
        with torch.no_grad():
            for z in (z_i, z_j):
                z.copy_(torch.randn_like(z))
        if isinstance(contrastive, NTXentLoss):
            contrastive.temperature = temperature
        results = []
        for function in (compiled, module):
            loss = function(z_i, z_j)["loss"]
            grads = torch.autograd.grad(loss, leaves)
            # The next step writes to the memory of this one's results.
            results.append([x.detach().clone() for x in (loss, *grads)])
        for actual, expected in zip(*results, strict=True):
            # Inductor's exp may round a learnable temperature in another way. An old temperature
            # changes gradients by a tenth and more.
            assert relative_error(actual, expected) <= FLOOR_GRADIENT[torch.bfloat16]
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else int(manager.new_graph_id().id)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", RECORDED)
def test_compiled_steps_are_recorded(name: str) -> None:
    """No graph is skipped, and what is replayed follows the inputs and a learnable temperature."""
    module: Any = RECORDED[name]().cuda()
    on_device = getattr(module, "log_temperature", None) is not None
    temperatures = [0.1, 0.1, 0.1, 0.2, 0.3] if on_device else [0.1] * 5
    assert compare_steps(module, temperatures) >= 2  # the forward and the backward
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("fresh_compiler")
def test_a_number_that_changes_is_not_replayed() -> None:
    compare_steps(NTXentLoss().cuda(), [0.5 - 0.05 * k for k in range(8)])


@pytest.mark.parametrize("temperature", ["number", "tensor"])
def test_the_host_never_waits(temperature: str) -> None:
    z = inputs(2048, 256)
    tau = 0.1 if temperature == "number" else torch.tensor(0.1, device="cuda")
    step(z, tau)  # This call compiles the kernels.
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(z, tau)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_several_streams_do_not_disturb_each_other() -> None:
    batches = [inputs(600 + 100 * k, 128) for k in range(3)]
    expected = [step(z) for z in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    results = []
    for z, stream in zip(batches, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(step(z))
    torch.cuda.synchronize()
    for result, truth in zip(results, expected, strict=True):
        for value, exact in zip(result, truth, strict=True):
            assert torch.equal(value, exact)


def test_offsets_beyond_two_to_the_31st() -> None:
    """If M D is above 2^31, the last rows are packed correctly too."""
    rows, features = 2**21 + 128, 1024
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    from cjepa_kernels.triton.launch import Operands

    z = torch.zeros(rows, features, device="cuda", dtype=torch.bfloat16)
    z[:, 0] = 1
    z[-1, 1] = 1
    packed = Operands.of(z.dtype, None).pack((z,), cosine=True, eps=1e-8)
    assert packed.z[rows - 1, 1].item() == pytest.approx(0.5**0.5, rel=4e-3)
    assert packed.z[rows - 1, 2:].count_nonzero().item() == 0
