"""The operators under PyTorch's own checks, torch.compile and torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import AUTOCAST_LOSS, relative_error
from torch import Tensor, nn

from cjepa_kernels import ContrastiveJEPALoss, HJEPALoss, NTXentLoss, backends, nt_xent, ops

OVERLOADS = pytest.mark.parametrize("overload", ops.OVERLOADS, ids=["dispatched", "chunked"])


def sample_inputs(dtype: torch.dtype = torch.float64) -> list[tuple[Any, ...]]:
    """Arguments of the forward operator: one list feeds opcheck and gradcheck."""

    def z(batch: int, features: int) -> Tensor:
        return torch.randn(batch, features, dtype=dtype, requires_grad=True)

    mask = torch.rand(4, 4) < 0.4
    temperature = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    return [
        (z(3, 5), z(3, 5), None, None, 0.2, True, 1e-8, "mean", None, False),
        (z(4, 3), z(4, 3), mask, None, 0.5, True, 1e-8, "none", None, False),
        (z(4, 3), z(4, 3), mask, temperature, 1.0, True, 1e-8, "sum", None, False),
        (z(5, 2), z(5, 2), None, temperature, 1.0, False, 1e-8, "mean", None, False),
        (z(2, 4), z(2, 4), None, None, 0.1, True, 1e-8, "sum", None, False),
    ]


def with_kept_exponentials(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*inputs[:-1], True)


KEEPS = pytest.mark.skipif(not backends()["native"].available, reason="no compiled kernel here")
CASES = pytest.mark.parametrize("case", range(5))


@OVERLOADS
@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck_forward(overload: str, case: int, dtype: torch.dtype) -> None:
    torch.library.opcheck(ops.operator("nt_xent", overload), sample_inputs(dtype)[case])


@KEEPS
@CASES
def test_opcheck_with_kept_exponentials(case: int) -> None:
    inputs = with_kept_exponentials(sample_inputs()[case])
    out = ops.operator("nt_xent")(*inputs)
    assert out[-1].numel() == ops.kept_size(2 * len(inputs[0]))
    # Not the comparison of outputs: what no pair of rows stands for is left as it was in memory.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.operator("nt_xent"), inputs, test_utils=utilities)
    arguments = (torch.ones_like(out[0]), *inputs[:4], *out[-4:], *inputs[4:-1])
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(ops.operator("nt_xent_backward"), detached)


@CASES
def test_chunked_keeps_nothing(case: int) -> None:
    with pytest.raises(ValueError, match="keep must be False"):
        ops.operator("nt_xent", ".chunked")(*with_kept_exponentials(sample_inputs()[case]))


@OVERLOADS
@CASES
def test_opcheck_backward(overload: str, case: int) -> None:
    inputs = sample_inputs()[case]
    out = ops.operator("nt_xent", overload)(*inputs)
    arguments = (torch.ones_like(out[0]), *inputs[:4], *out[-4:], *inputs[4:-1])
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(ops.operator("nt_xent_backward", overload), detached)


@pytest.mark.parametrize(
    ("overload", "keep"), [("", False), pytest.param("", True, marks=KEEPS), (".chunked", False)]
)
@CASES
def test_gradcheck(overload: str, keep: bool, case: int) -> None:
    inputs = (*sample_inputs()[case][:-1], keep)
    operator = ops.operator("nt_xent", overload)

    def loss(z_i: Tensor, z_j: Tensor, temperature: Tensor | None) -> Tensor:
        result: Tensor = operator(z_i, z_j, inputs[2], temperature, *inputs[4:])[0]
        return result

    assert torch.autograd.gradcheck(loss, (inputs[0], inputs[1], inputs[3]))


def test_gradgradcheck_of_the_reference() -> None:
    z_i, z_j = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return nt_xent(a, b, temperature=0.5, backend="reference").loss

    assert torch.autograd.gradgradcheck(loss, (z_i, z_j))


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_double_backward_names_the_way_out(backend: Any) -> None:
    z_i, z_j = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    loss = nt_xent(z_i, z_j, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, z_i, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient.sum().backward()


class Model(nn.Module):
    """An encoder with the loss inside, as a user would compile or export it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 5)
        self.loss_fn = NTXentLoss(**options)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self.loss_fn(self.encoder(a), self.encoder(b))
        return result


@pytest.fixture
def fresh_compiler() -> None:
    """Every test compiles the same code: without this they would share its recompile limit."""
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", [{}, {"learnable_temperature": True}], ids=["fixed", "learnt"])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_compile_takes_the_whole_graph(backend: str, options: Any, dynamic: bool) -> None:
    model = Model(backend=backend, **options)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (4, 7):
        a, b = torch.randn(batch, 6), torch.randn(batch, 6)
        expected, actual = model(a, b), compiled(a, b)
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value)
        parameters = list(model.parameters())
        for x, y in zip(
            torch.autograd.grad(actual["loss"], parameters),
            torch.autograd.grad(expected["loss"], parameters),
            strict=True,
        ):
            torch.testing.assert_close(x, y)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_takes_c_jepa_with_features_that_carry_no_gradient() -> None:
    """Eagerly this warns; a warning must not break the graph."""
    loss_fn = ContrastiveJEPALoss(HJEPALoss(num_hierarchies=1))
    prediction, target = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
    features = torch.randn(2, 3, 5, 5)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    out = compiled([prediction], [target], None, None, features[0], features[1])
    with pytest.warns(UserWarning, match="carry no gradient"):
        expected = loss_fn([prediction], [target], None, None, features[0], features[1])
    torch.testing.assert_close(out["loss"], expected["loss"])


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_inductor_under_autocast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inductor's cache does not see a change of our operators' schemas.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Model()
    compiled = torch.compile(model, fullgraph=True)
    a, b = torch.randn(5, 6), torch.randn(5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = model(a, b)["loss"], compiled(a, b)["loss"]
    assert relative_error(actual, expected) < AUTOCAST_LOSS
    actual.backward()
    assert model.encoder.weight.grad.isfinite().all()


def test_export_keeps_the_operator() -> None:
    model = Model()
    example = (torch.randn(4, 6), torch.randn(4, 6))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch}, {0: batch}))
    assert "cjepa_kernels.nt_xent" in str(program.graph)
    other = (torch.randn(9, 6), torch.randn(9, 6))
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_meta_tensors_have_the_shapes_of_real_ones() -> None:
    for inputs in sample_inputs():
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in inputs]
        real_out, meta_out = ops.operator("nt_xent")(*inputs), ops.operator("nt_xent")(*meta)
        for real, fake in zip(real_out, meta_out, strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
