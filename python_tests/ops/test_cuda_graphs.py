"""What torch.compile(mode="reduce-overhead") leaves out of its CUDA graphs, asked without a GPU.

The graphs of a training step are traced on the CPU and run again with fake tensors on a GPU that
need not exist. Inductor's own functions then say what it would leave out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss, NTXentLoss

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TEMPERATURES = (0.1, 0.2, 0.3)


class Step(NamedTuple):
    """A loss, what sets its number before a call, and the leaves that get a gradient."""

    loss: Callable[[], Tensor]
    set_number: Callable[[float], None]
    leaves: list[Tensor]


def nt_xent_step(learnable: bool) -> Step:
    z_i, z_j = (torch.randn(6, 8, device=CPU, requires_grad=True) for _ in range(2))
    module = NTXentLoss(learnable_temperature=learnable).to(CPU)

    def set_number(value: float) -> None:
        module.temperature = value

    return Step(lambda: module(z_i, z_j)["loss"], set_number, [z_i, z_j, *module.parameters()])


def levels() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Predictions, targets and masks of two levels."""
    predictions = [torch.randn(3, n, 8, device=CPU, requires_grad=True) for n in (4, 2)]
    targets = [torch.randn(3, n, 8, device=CPU) for n in (4, 2)]
    masks = [torch.rand(3, n, device=CPU) > 0.3 for n in (4, 2)]
    return predictions, targets, masks


def hjepa_step() -> Step:
    predictions, targets, masks = levels()
    module = HJEPALoss(hierarchy_weights=[1.0, 0.5], num_hierarchies=2)

    def set_number(value: float) -> None:
        module.smoothl1_beta = value

    return Step(lambda: module(predictions, targets, masks)["loss"], set_number, predictions)


def contrastive_step(learnable: bool) -> Step:
    predictions, targets, masks = levels()
    features = [torch.randn(3, 5, 8, device=CPU, requires_grad=True) for _ in range(2)]
    module = ContrastiveJEPALoss(HJEPALoss(hierarchy_weights=[1.0, 0.5], num_hierarchies=2))
    if learnable:
        module.contrastive = NTXentLoss(learnable_temperature=True).to(CPU)

    def set_number(value: float) -> None:
        module.contrastive.temperature = value

    def loss() -> Tensor:
        return module(predictions, targets, *features, masks=masks)["loss"]

    return Step(loss, set_number, [*predictions, *features, *module.parameters()])


STEPS = {
    "NTXentLoss": lambda: nt_xent_step(learnable=False),
    "NTXentLoss, learnable": lambda: nt_xent_step(learnable=True),
    "HJEPALoss": hjepa_step,
    "ContrastiveJEPALoss": lambda: contrastive_step(learnable=False),
    "ContrastiveJEPALoss, learnable": lambda: contrastive_step(learnable=True),
}
LEARNABLE = [name for name in STEPS if name.endswith("learnable")]
FLOATS = [name for name in STEPS if name not in LEARNABLE]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # Inductor would split a graph at an operator on the CPU. Without that it skips the whole graph
    # and gives the reason.
    with inductor_config.patch(graph_partition=False):
        yield


class OnGPU(Interpreter):
    """Runs a graph with fake tensors and notes the first node on each device."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.first: dict[torch.device, Node] = {}
        self.host_reads: list[Node] = []

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node.op == "output":
            return result
        node.meta["val"] = result
        devices = devices_of(result)
        for device in devices:
            self.first.setdefault(device, node)
        arguments = [argument.meta["val"] for argument in node.all_input_nodes]
        if GPU in devices and CPU in devices_of(arguments):
            self.host_reads.append(node)
        return result


def devices_of(values: object) -> set[torch.device]:
    return {value.device for value in tree_leaves(values) if isinstance(value, Tensor)}


def traced(step: Step, numbers: tuple[float, ...]) -> list[OnGPU]:
    """The forward and the backward of the last graph that these numbers give, on a fake GPU."""
    graphs: list[GraphModule] = []

    def keep(module: GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return make_boxed_func(module.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    compiled = torch.compile(step.loss, fullgraph=True, backend=backend)
    for number in numbers:
        step.set_number(number)
        torch.autograd.grad(compiled(), step.leaves)
    return [on_gpu(module) for module in graphs[-2:]]


def on_gpu(module: GraphModule) -> OnGPU:
    """The graph with its inputs on a fake GPU, except the numbers that the compiler passes in."""
    run = OnGPU(module)
    with FakeTensorMode(), torch.no_grad():
        inputs = []
        for node in module.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            device = CPU if value.dtype == torch.float64 else GPU
            size, stride = value.size(), value.stride()
            inputs.append(torch.empty_strided(size, stride, dtype=value.dtype, device=device))
        run.run(*inputs)
    return run


def reasons(run: OnGPU) -> list[str]:
    """Why Inductor would not record the graph."""
    unsafe = get_first_incompatible_cudagraph_node(run.module)
    found = [] if unsafe is None else [f"{unsafe.target} is not for CUDA graphs"]
    device = check_multiple_devices_or_any_cpu_nodes(dict(run.first))
    return found if device is None else [*found, device]


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_left_out_of_the_graphs(name: str) -> None:
    for run in traced(STEPS[name](), numbers=TEMPERATURES[:1]):
        assert "cjepa_kernels" in str(run.module.graph)
        assert reasons(run) == []


@pytest.mark.parametrize("name", LEARNABLE)
def test_a_schedule_of_a_learnable_temperature_stays_in_one_graph(name: str) -> None:
    """The temperature lies in the memory of the GPU, where a graph reads its present value."""
    step = STEPS[name]()
    for run in traced(step, numbers=TEMPERATURES):
        assert reasons(run) == []
    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step.loss, fullgraph=True, backend=counter)
    for temperature in TEMPERATURES:
        step.set_number(temperature)
        torch.testing.assert_close(compiled(), step.loss(), rtol=0.0, atol=0.0)
    assert counter.frame_count == 1


def test_a_schedule_without_training_the_temperature_stays_in_one_graph() -> None:
    module = NTXentLoss(learnable_temperature=True).to(CPU)
    module.requires_grad_(False)
    z_i, z_j = (torch.randn(6, 8, device=CPU, requires_grad=True) for _ in range(2))

    def set_number(value: float) -> None:
        module.temperature = value

    step = Step(lambda: module(z_i, z_j)["loss"], set_number, [z_i, z_j])
    runs = traced(step, numbers=TEMPERATURES)
    assert len(runs) == 2
    for run in runs:
        assert "nt_xent_dynamic" not in str(run.module.graph)
        assert reasons(run) == []


@pytest.mark.parametrize("name", FLOATS)
def test_a_number_that_changes_is_read_outside_of_the_graphs(name: str) -> None:
    """A graph would repeat the number of the run in which it was recorded."""
    for run in traced(STEPS[name](), numbers=TEMPERATURES):
        reads = [node for node in run.host_reads if "cjepa_kernels" in str(node.target)]
        assert reads
        for node in reads:
            target: Any = node.target
            assert torch.Tag.cudagraph_unsafe in target.tags, target
        assert any("is not for CUDA graphs" in reason for reason in reasons(run))


def test_a_number_on_the_host_is_a_reason() -> None:
    """The check itself sees a graph that would be skipped."""

    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones((), dtype=torch.float64, device=CPU)

    module = torch.export.export(Sum(), (torch.zeros(3, device=CPU),)).module()
    assert any("cpu device" in reason for reason in reasons(on_gpu(module)))
