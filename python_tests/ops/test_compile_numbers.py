"""torch.compile makes at most two graphs when a number, as of a schedule, changes each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from overloads import OVERLOADS
from sample_inputs import (
    cross_inputs,
    cross_logsumexp_inputs,
    in_order,
    nt_xent_inputs,
    sample_inputs,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    cross_logsumexp,
    nt_xent,
    ops,
    prediction_loss,
)

pytestmark = pytest.mark.usefixtures("kernels_only")

# Kernels use a constant shift at high temperatures and running maxima below 0.01. The last value
# shows that the choice for the first values does not stay in the graph.
SCHEDULE = [0.5 - 0.025 * step for step in range(19)] + [0.004]
Loss = Callable[[], Tensor]
Case = tuple[Loss, Callable[[float], None], list[Tensor]]


class Numbers:
    """A number that a closure reads. Dynamo sees it as an attribute of an object."""

    value = 0.3


def function_case(name: str) -> Case:
    number = Numbers()
    x, y = (torch.randn(5, 4, requires_grad=True) for _ in range(2))

    def set_number(value: float) -> None:
        number.value = value

    def loss() -> Tensor:
        value = number.value
        if name == "nt_xent temperature":
            return nt_xent(x, y, temperature=value).loss
        if name == "nt_xent eps":
            return nt_xent(x, y, eps=value).loss
        if name == "cross_logsumexp temperature":
            out = cross_logsumexp(x, y, temperature=value)
            return out.row_lse.sum() + out.column_lse.square().sum()
        if name == "cross_logsumexp eps":
            return cross_logsumexp(x, y, eps=value).row_lse.sum()
        if name == "smoothl1_beta":
            return prediction_loss(x, y, smoothl1_beta=value)
        if name == "huber_delta":
            return prediction_loss(x, y, loss_type="huber", huber_delta=value)
        assert name == "prediction_loss eps"
        return prediction_loss(x, y, eps=value)

    return loss, set_number, [x, y]


def module_case(name: str, convert: Callable[[float], Any] = float) -> Case:
    """A step of C-JEPA whose number, or numbers, are set as ``convert`` returns them."""
    module: Any = ContrastiveJEPALoss(HJEPALoss(hierarchy_weights=[1.0, 0.5], num_hierarchies=2))
    levels = [torch.randn(3, n, 4, requires_grad=True) for n in (4, 2)]
    targets = [torch.randn(3, n, 4) for n in (4, 2)]
    features = [torch.randn(3, 5, 4, requires_grad=True) for _ in range(2)]

    def set_number(value: float) -> None:
        if name == "NTXentLoss.temperature":
            module.contrastive.temperature = value
        elif name == "contrastive_weight":
            module.contrastive_weight = value
        else:
            module.contrastive.temperature = convert(value)
            module.contrastive.eps = convert(value / 2)
            module.jepa_weight, module.contrastive_weight = convert(3 * value), convert(4 * value)
            module.jepa_loss.smoothl1_beta = convert(2 * value)
            module.jepa_loss.eps = convert(value / 3)
            module.jepa_loss.hierarchy_weights = [value, 2 * value]

    def loss() -> Tensor:
        return cast(Tensor, module(levels, targets, *features)["loss"])

    return loss, set_number, [*levels, *features]


FUNCTIONS = [
    "nt_xent temperature", "nt_xent eps", "cross_logsumexp temperature", "cross_logsumexp eps",
    "smoothl1_beta", "huber_delta", "prediction_loss eps",
]  # fmt: skip
MODULES = ["NTXentLoss.temperature", "contrastive_weight", "every number of C-JEPA"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compare(actual: Tensor, expected: Tensor, leaves: list[Tensor], **tolerances: float) -> None:
    torch.testing.assert_close(actual, expected, **tolerances)
    for a, b in zip(
        torch.autograd.grad(actual, leaves, allow_unused=True),
        torch.autograd.grad(expected, leaves, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerances)


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_a_schedule_takes_two_graphs(name: str) -> None:
    """The first graph holds the number as a constant. The second one takes any number."""
    loss, set_number, leaves = (function_case if name in FUNCTIONS else module_case)(name)
    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    values = []
    for number in SCHEDULE:
        set_number(number)
        actual, expected = compiled(), loss()
        compare(actual, expected, leaves, rtol=0.0, atol=0.0)
        values.append(expected.item())
    assert counter.frame_count == 2
    if not name.endswith("eps"):  # eps changes only rows that are shorter than it
        assert len(set(values)) == len(SCHEDULE)


def test_an_argument_takes_two_graphs_whatever_the_batch() -> None:
    def loss(z_i: Tensor, z_j: Tensor, temperature: float) -> Tensor:
        return nt_xent(z_i, z_j, temperature=temperature).loss

    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for batch, temperature in zip(range(3, 23), SCHEDULE, strict=True):
        leaves = [torch.randn(batch, 4, requires_grad=True) for _ in range(2)]
        compare(compiled(*leaves, temperature), loss(*leaves, temperature), leaves, rtol=0, atol=0)
    assert counter.frame_count == 2


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_numbers_of_numpy_take_two_graphs(kind: str) -> None:
    """The compiler treats numbers of NumPy as arrays."""
    numpy = pytest.importorskip("numpy")
    leaves = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]

    def loss(temperature: float) -> Tensor:
        out = cross_logsumexp(*leaves, temperature=temperature)
        return nt_xent(*leaves, temperature=temperature).loss + out.row_lse.sum()

    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for temperature in numpy.array(SCHEDULE[-5:], dtype=kind):
        compare(compiled(temperature), loss(temperature), leaves, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["int", "numpy"])
def test_attributes_of_any_kind_of_number_take_two_graphs(kind: str) -> None:
    convert: Any = int if kind == "int" else pytest.importorskip("numpy").float32
    loss, set_number, leaves = module_case("every number of C-JEPA", convert)
    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for number in range(6, 36, 6):  # a half and a third of them are whole numbers too
        set_number(float(number))
        compare(compiled(), loss(), leaves, rtol=0.0, atol=0.0)
    assert counter.frame_count == 2


@pytest.mark.parametrize("learnable", [False, True], ids=["float", "learnable"])
def test_a_temperature_set_in_the_compiled_function_takes_two_graphs(learnable: bool) -> None:
    loss_fn, (z_i, z_j) = NTXentLoss(learnable_temperature=learnable), torch.randn(2, 5, 4)

    def step(temperature: float) -> Tensor:
        loss_fn.temperature = temperature
        return cast(Tensor, loss_fn(z_i, z_j)["loss"])

    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for temperature in SCHEDULE[-5:]:
        actual = compiled(temperature)
        if learnable:
            torch.testing.assert_close(loss_fn.temperature, torch.tensor(temperature))
        else:
            assert loss_fn.temperature == temperature
        torch.testing.assert_close(actual, step(temperature), rtol=0.0, atol=0.0)
    assert counter.frame_count == 2


def test_a_weight_that_is_zero_at_times_takes_three_graphs() -> None:
    """A weight of 0 leaves out its term, which needs another graph."""
    loss, set_number, leaves = module_case("contrastive_weight")
    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for number in (0.0, 0.1, 0.2, 0.0, 0.3):
        set_number(number)
        compare(compiled(), loss(), leaves, rtol=0.0, atol=0.0)
    assert counter.frame_count <= 3


def test_inductor_takes_a_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor's cache does not see a change of our operators' schemas.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    leaves = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]

    def loss(z_i: Tensor, z_j: Tensor, temperature: float) -> Tensor:
        return nt_xent(z_i, z_j, temperature=temperature).loss

    counter: Any = CompileCounterWithBackend("inductor")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    # This process compiles, because others start slowly. The setting has no value until someone
    # reads it, so monkeypatch would delete it at the end.
    with torch._inductor.config.patch(compile_threads=1):
        for temperature in (0.5, 0.2, 0.1, 0.004):
            compare(compiled(*leaves, temperature), loss(*leaves, temperature), leaves)
    assert counter.frame_count == 2


def test_autocast_takes_a_schedule() -> None:
    leaves = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]

    def loss(temperature: float) -> Tensor:
        with torch.autocast(leaves[0].device.type, dtype=torch.bfloat16):
            return nt_xent(*leaves, temperature=temperature).loss

    counter: Any = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for temperature in SCHEDULE[-4:]:
        compare(compiled(temperature), loss(temperature), leaves, rtol=0.0, atol=0.0)
    assert counter.frame_count == 2


def test_a_bad_number_of_a_schedule_is_refused() -> None:
    z = torch.randn(2, 5, 4)

    def loss(temperature: float) -> Tensor:
        return nt_xent(*z, temperature=temperature).loss

    compiled = torch.compile(loss, backend="aot_eager")
    for temperature in SCHEDULE[:3]:
        compiled(temperature)
    for bad in (-0.1, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Temperature must be positive"):
            compiled(bad)


def test_export_keeps_the_number() -> None:
    class Model(torch.nn.Module):
        def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
            return nt_xent(z_i, z_j, temperature=0.3).loss

    z = torch.randn(2, 5, 4)
    program = torch.export.export(Model(), tuple(z))
    assert "nt_xent.default" in str(program.graph)
    assert "dynamic" not in str(program.graph)
    torch.testing.assert_close(program.module()(*z), Model()(*z))


def as_tensors(name: str, inputs: dict[str, Any]) -> list[Any]:
    """The arguments of ``<name>_dynamic``, in order, made from those of ``<name>``."""
    numbers = [str(a.type) == "float" for a in ops.operator(name)._schema.arguments]
    return [
        torch.tensor(value, dtype=torch.float64, device="cpu") if number else value
        for value, number in zip(in_order(name, inputs), numbers, strict=True)
    ]


@OVERLOADS
def test_numbers_as_tensors_give_the_same_bits(overload: str) -> None:
    """In every back end, and at temperatures for which a kernel works in different ways."""
    z_i, z_j = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    for temperature in (0.2, 0.004):
        for name, inputs in (
            ("nt_xent", nt_xent_inputs(z_i, z_j, temperature=temperature)),
            ("cross_logsumexp", cross_logsumexp_inputs(z_i, z_j, temperature=temperature)),
        ):
            expected = tuple(ops.run(name, overload, **inputs))
            dynamic = ops.operator(f"{name}_dynamic", overload)
            actual = dynamic(*as_tensors(name, inputs))
            torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)
            torch.testing.assert_close(
                torch.autograd.grad(actual[0].sum(), (z_i, z_j)),
                torch.autograd.grad(expected[0].sum(), (z_i, z_j)),
                rtol=0.0,
                atol=0.0,
            )


@pytest.mark.parametrize("name", ["nt_xent", "cross_logsumexp"])
def test_opcheck_of_numbers_as_tensors(name: str) -> None:
    inputs = {"nt_xent": sample_inputs, "cross_logsumexp": cross_inputs}[name]()[1]
    torch.library.opcheck(ops.operator(f"{name}_dynamic"), as_tensors(name, inputs))


def test_opcheck_of_the_prediction_loss_with_numbers_as_tensors() -> None:
    levels = [torch.randn(3, n, 4, requires_grad=True) for n in (4, 2)]
    targets = [torch.randn(3, n, 4) for n in (4, 2)]
    inputs = {
        "predictions": levels,
        "targets": targets,
        "masks": [],
        "weights": torch.tensor([1.0, 0.5], dtype=torch.float64),
        "loss_type": "smoothl1",
        "normalization": "l2",
        "threshold": torch.tensor(0.7, dtype=torch.float64),
        "eps": torch.tensor(1e-8, dtype=torch.float64),
        "reduction": "mean",
    }
    torch.library.opcheck(
        ops.operator("prediction_loss_dynamic"), in_order("prediction_loss", inputs)
    )


def test_a_training_step_with_a_compiled_loss_takes_a_schedule() -> None:
    pytest.importorskip("lightning")
    from train_experiments import tiny

    from cjepa_kernels.train.data.batches import IndexedImages
    from cjepa_kernels.train.loop.module import CJEPAModule

    module = CJEPAModule(tiny(), (1, 8, 8), torch.zeros(1), torch.ones(1), total_steps=8)
    eager = CJEPAModule(tiny(), (1, 8, 8), torch.zeros(1), torch.ones(1), total_steps=8)
    counter: Any = CompileCounterWithBackend("aot_eager")
    module.loss.compile(fullgraph=True, backend=counter)
    images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    for step, temperature in enumerate(SCHEDULE[:6]):
        losses = []
        for model in (module, eager):
            model.loss.contrastive.temperature = temperature
            model.loss.contrastive_weight = 0.1 * (step + 1)
            batch = model.on_after_batch_transfer(IndexedImages(images, torch.arange(8)), 0)
            loss = model.training_step(batch, step)["loss"]
            loss.backward()
            losses.append(loss)
        torch.testing.assert_close(*losses)
    for a, b in zip(module.parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)
    assert counter.frame_count <= 2
