"""Tests that need a GPU: CUDA graphs, determinism, and a host that never waits for the GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cjepa_kernels import backends, nt_xent

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
