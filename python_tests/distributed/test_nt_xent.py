"""Ranks with negatives from every rank get the results of one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from eager import textbook_nt_xent
from overloads import BACKENDS
from ranks import Ranks, gradients_of
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cjepa_kernels import NTXentLoss, NTXentOutput, nt_xent, triton
from cjepa_kernels.backends import Backend
from cjepa_kernels.reference import reduce

Pool = Callable[[int], Ranks]
FEATURES = 24
KERNELS = [name for name in BACKENDS if name != "reference"]
NOT_SLOW = [name for name in KERNELS if name != "triton"]  # Triton's interpreter is slow.
METRICS = ("accuracy", "positive_similarity", "negative_similarity")

# The shards are equal or of different sizes. A rank with one pair has no negative of its own.
BATCHES = pytest.mark.parametrize(
    "batches",
    [[5, 5], [3, 8], [4, 4, 4], [2, 5, 1], [3, 3, 3, 3], [1, 4, 2, 6]],
    ids=lambda batches: "+".join(map(str, batches)),
)
STRATEGIES = pytest.mark.parametrize("strategy", ["all_gather", "ring"])
# Kernels use a constant shift at 0.2 and running maxima at 0.01.
TEMPERATURES = pytest.mark.parametrize("temperature", [0.2, 0.01])


def shards(batches: list[int], dtype: torch.dtype, features: int = FEATURES) -> list[Tensor]:
    """Both views of each rank as one tensor (2, B_r, D)."""
    generator = torch.Generator().manual_seed(sum(batches) + features)
    result = []
    for batch in batches:
        z = torch.randn(2, batch, features, generator=generator, dtype=torch.float64)
        result.append(z.to(dtype))
    return result


class Encoder(nn.Module):
    """An encoder and its loss in one module, so that DDP averages all gradients."""

    def __init__(self, dtype: torch.dtype, temperature: float, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(FEATURES, FEATURES).to(dtype)
        # The temperature is in fp32 or fp64, like the loss.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.loss_fn = NTXentLoss(temperature, **options).to(wide)

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self.loss_fn(self.encoder(views[0]), self.encoder(views[1]))
        return result


def ddp_step(
    batches: list[int], dtype: torch.dtype, temperature: float, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run on each rank: loss and metrics, and the gradients that DDP has averaged."""
    model = Encoder(dtype, temperature, **options, distributed=True)
    parallel = DistributedDataParallel(model)
    out = parallel(shards(batches, dtype)[dist.get_rank()])
    out["loss"].sum().backward()
    return {name: value.detach() for name, value in out.items()}, gradients_of(model)


def single_step(
    batches: list[int], dtype: torch.dtype, temperature: float, learnable: bool, *, exact: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute a step in one process with the whole batch.

    ``exact`` asks for the float64 reference. Otherwise the textbook formula runs in ``dtype``.
    """
    model = Encoder(dtype, temperature, learnable_temperature=learnable, backend="reference")
    model = model.double() if exact else model
    views = torch.cat(shards(batches, dtype), dim=1)
    if exact:
        out = model(views.double())
    else:
        z_i, z_j = (model.encoder(view) for view in views)
        losses = textbook_nt_xent(z_i, z_j, temperature=model.loss_fn.temperature)
        # The textbook formula has no metrics, so the reference computes them from these features.
        of_rounded = nt_xent(z_i.double(), z_j.double(), backend="reference")
        out = {"loss": losses.mean(), **{name: getattr(of_rounded, name) for name in METRICS}}
    out["loss"].backward()
    return out, gradients_of(model)


@BATCHES
@STRATEGIES
@TEMPERATURES
@pytest.mark.parametrize(
    ("dtype", "learnable"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["fp32", "fp32_learnable", "bf16_learnable"],
)
def test_ddp_equals_one_process_on_the_whole_batch(
    ranks: Pool,
    batches: list[int],
    strategy: str,
    temperature: float,
    dtype: torch.dtype,
    learnable: bool,
) -> None:
    options = {"learnable_temperature": learnable, "strategy": strategy}
    results = ranks(len(batches)).run(
        ddp_step, batches, dtype=dtype, temperature=temperature, options=options
    )
    case = (batches, dtype, temperature, learnable)
    truth, exact = single_step(*case, exact=True)
    eager, gradients = single_step(*case, exact=False)

    def allowed(value: Tensor, expected: Tensor, floor: dict[torch.dtype, float]) -> float:
        return 2 * relative_error(value, expected) + floor[dtype]

    loss = torch.stack([out["loss"] for out, _ in results]).mean()
    assert relative_error(loss, truth["loss"]) <= allowed(eager["loss"], truth["loss"], FLOOR_VALUE)
    for out, averaged in results:
        for name in METRICS:
            assert torch.equal(out[name], results[0][0][name])
            assert (out[name] - eager[name]).abs() <= METRIC[dtype]
        assert averaged.keys() == exact.keys()
        for name, gradient in averaged.items():
            assert torch.equal(gradient, results[0][1][name])
            assert relative_error(gradient, exact[name]) <= allowed(
                gradients[name], exact[name], FLOOR_GRADIENT
            ), name


def group_step(
    batches: list[int],
    dtype: torch.dtype,
    backend: Backend,
    options: dict[str, Any],
    upstream: float = 1.0,
    features: int = FEATURES,
) -> tuple[NTXentOutput, Tensor, int]:
    """Run on each rank: the result of nt_xent, the views' gradient, the number of Triton calls."""
    launches: list[str] = []
    launch = triton._call

    def counted(module: str, name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        launches.append(name)
        return launch(module, name, args)

    triton._call = counted  # type: ignore[assignment]
    try:
        views = shards(batches, dtype, features)[dist.get_rank()].requires_grad_()
        out = nt_xent(views[0], views[1], group=dist.group.WORLD, backend=backend, **options)
        (upstream * out.loss).sum().backward()
    finally:
        triton._call = launch
    assert views.grad is not None
    return NTXentOutput(*(value.detach() for value in out)), views.grad, len(launches)


def check_group(
    results: list[tuple[NTXentOutput, Tensor, int]],
    batches: list[int],
    dtype: torch.dtype,
    options: dict[str, Any],
    features: int = FEATURES,
) -> None:
    """Compare values and the views' gradients with the float64 reference of the whole batch."""
    whole = torch.cat(shards(batches, dtype, features), dim=1)
    without_strategy = {name: value for name, value in options.items() if name != "strategy"}
    z = whole.double().requires_grad_()
    truth = nt_xent(z[0], z[1], backend="reference", **without_strategy)
    truth.loss.sum().backward()
    reduction = without_strategy.pop("reduction", "mean")
    rounded = (z if "eps" in without_strategy else whole).detach().clone().requires_grad_()
    # The textbook formula has no eps, so only the floor bounds the error with another eps.
    without_strategy.pop("eps", None)
    eager = reduce(textbook_nt_xent(rounded[0], rounded[1], **without_strategy), reduction)
    eager.sum().backward()
    assert z.grad is not None
    assert rounded.grad is not None

    def close(actual: Tensor, exact: Tensor, eager: Tensor | None, floor: dict[Any, float]) -> None:
        eager_error = 0.0 if eager is None or "eps" in options else relative_error(eager, exact)
        assert relative_error(actual, exact) <= 2 * eager_error + floor[dtype]

    def in_order(parts: list[Tensor]) -> Tensor:
        """Put the ranks' parts into the order of the whole batch."""
        return torch.cat([part.view(2, -1) for part in parts], dim=1).flatten()

    losses = [out.loss for out, *_ in results]
    loss = in_order(losses) if reduction == "none" else torch.stack(losses).sum()
    scale = len(batches) if reduction == "mean" else 1
    close(loss / scale, truth.loss, eager, FLOOR_VALUE)
    close(in_order([out.lse for out, *_ in results]), truth.lse, None, FLOOR_VALUE)
    gradient = torch.cat([grad for _, grad, _ in results], dim=1).double() / scale
    close(gradient, z.grad, rounded.grad, FLOOR_GRADIENT)
    for out, *_ in results:
        for name in METRICS:
            assert (getattr(out, name) - getattr(truth, name)).abs() <= METRIC[dtype]


@pytest.mark.parametrize(
    ("backend", "batches"),
    [
        (name, batches)
        for batches in ([3, 8], [2, 5, 1])
        for name in (KERNELS, NOT_SLOW)[len(batches) > 2]
    ],
    ids=str,
)
@STRATEGIES
@TEMPERATURES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_back_end(
    ranks: Pool,
    backend: Backend,
    strategy: str,
    temperature: float,
    dtype: torch.dtype,
    batches: list[int],
) -> None:
    options = {"temperature": temperature, "strategy": strategy}
    results = ranks(len(batches)).run(
        group_step, batches, dtype=dtype, backend=backend, options=options
    )
    check_group(results, batches, dtype, options)
    assert all((launches > 0) == (backend == "triton") for *_, launches in results)


@STRATEGIES
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "none"},
        {"use_cosine_similarity": False, "temperature": 30.0},
        {"use_cosine_similarity": False, "temperature": 30.0, "reduction": "none"},
        {"eps": 4.0},
    ],
    ids=["sum", "none", "dot", "dot_none", "eps"],
)
@pytest.mark.parametrize("batches", [[5, 5], [1, 4, 2, 6]], ids=["equal", "ragged"])
def test_options(ranks: Pool, strategy: str, options: dict[str, Any], batches: list[int]) -> None:
    options = {**options, "strategy": strategy}
    results = ranks(len(batches)).run(
        group_step, batches, dtype=torch.float32, backend="auto", options=options
    )
    check_group(results, batches, torch.float32, options)


@STRATEGIES
@TEMPERATURES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batches", [[101, 101], [70, 150, 97]], ids=["two", "three"])
def test_more_than_a_tile(
    ranks: Pool, strategy: str, temperature: float, dtype: torch.dtype, batches: list[int]
) -> None:
    options = {"temperature": temperature, "strategy": strategy}
    results = ranks(len(batches)).run(
        group_step, batches, dtype=dtype, backend="auto", options=options, features=67
    )
    check_group(results, batches, dtype, options, features=67)


@pytest.mark.parametrize("batches", [[4], [3, 2], [2, 5, 1]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_reference_of_a_group(ranks: Pool, batches: list[int], reduction: str) -> None:
    options = {"reduction": reduction}
    results = ranks(len(batches)).run(
        group_step, batches, dtype=torch.float64, backend="reference", options=options
    )
    check_group(results, batches, torch.float64, options)


@STRATEGIES
def test_a_loss_scale_changes_no_bit_of_the_gradient(ranks: Pool, strategy: str) -> None:
    run = ranks(3).run
    options = {"temperature": 0.05, "strategy": strategy}
    args = ([2, 5, 1], torch.float32, "auto", options)
    for (_, gradient, _), (_, scaled, _) in zip(
        run(group_step, *args), run(group_step, *args, 2.0**16), strict=True
    ):
        assert torch.equal(gradient * 2.0**16, scaled)


@STRATEGIES
@pytest.mark.parametrize("backend", NOT_SLOW)
def test_the_same_bits_on_every_run(ranks: Pool, strategy: str, backend: Backend) -> None:
    args = ([2, 5, 1], torch.float32, backend, {"strategy": strategy})
    first, second = (ranks(3).run(group_step, *args) for _ in range(2))
    for (out, gradient, _), (second_out, second_gradient, _) in zip(first, second, strict=True):
        assert all(map(torch.equal, out, second_out))
        assert torch.equal(gradient, second_gradient)


def collapsed_step(strategy: str, backend: Backend, features: int) -> tuple[Tensor, Tensor]:
    row = torch.randn(features, generator=torch.Generator().manual_seed(3))
    z = row.expand(2, 1 + 2 * dist.get_rank(), features)
    out = nt_xent(z[0], z[1], group=dist.group.WORLD, strategy=strategy, backend=backend)
    return out.accuracy, out.loss


@STRATEGIES
@pytest.mark.parametrize(
    ("backend", "features"),
    [(name, 64) for name in KERNELS] + [(name, f) for name in NOT_SLOW for f in (3, 515)],
)
def test_a_collapsed_encoder_reports_no_hit(
    ranks: Pool, strategy: str, backend: Backend, features: int
) -> None:
    """A tie with a row of another rank is a miss too."""
    results = ranks(3).run(collapsed_step, strategy, backend, features)
    for accuracy, _ in results:
        assert accuracy == 0
    mean = torch.stack([loss for _, loss in results]).mean()
    torch.testing.assert_close(mean, torch.tensor(17.0).log())  # 17 is M - 1.


def step_with_a_nan(strategy: str, temperature: float) -> tuple[Tensor, Tensor]:
    z = shards([3, 4], torch.float32)[dist.get_rank()]
    if dist.get_rank() == 1:
        z[0, 2, 1] = float("nan")
    z.requires_grad_()
    out = nt_xent(z[0], z[1], temperature=temperature, group=dist.group.WORLD, strategy=strategy)  # type: ignore[call-overload]
    out.loss.backward()
    return out.loss.detach(), z.grad


@STRATEGIES
@TEMPERATURES
def test_a_nan_reaches_the_loss_of_every_rank(
    ranks: Pool, strategy: str, temperature: float
) -> None:
    for loss, gradient in ranks(2).run(step_with_a_nan, strategy, temperature):
        assert loss.isnan()
        assert gradient.isnan().any()


def accumulated_steps(strategy: str) -> dict[str, Tensor]:
    """Run on each rank: a step on two batches. The ranks exchange no gradients after the first."""
    model = Encoder(torch.float64, 0.2, strategy=strategy, distributed=True)
    parallel = DistributedDataParallel(model)
    for batches in ([4, 2, 3], [1, 5, 2]):
        views = shards(batches, torch.float64)[dist.get_rank()]
        if batches[0] == 4:
            with parallel.no_sync():
                parallel(views)["loss"].backward()
        else:
            parallel(views)["loss"].backward()
    return gradients_of(model)


@STRATEGIES
def test_gradient_accumulation_and_no_sync(ranks: Pool, strategy: str) -> None:
    expected = [
        single_step(batches, torch.float64, 0.2, False, exact=True)[1]
        for batches in ([4, 2, 3], [1, 5, 2])
    ]
    for gradients in ranks(3).run(accumulated_steps, strategy):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[0][name] + expected[1][name])


def frozen_step(strategy: str, frozen: int) -> tuple[Tensor, ...]:
    views = list(shards([4, 2, 3], torch.float64)[dist.get_rank()])
    views[1 - frozen].requires_grad_()
    out = nt_xent(views[0], views[1], group=dist.group.WORLD, strategy=strategy)  # type: ignore
    out.loss.backward()
    assert views[frozen].grad is None
    assert views[1 - frozen].grad is not None
    return out.loss.detach(), views[1 - frozen].grad


@STRATEGIES
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side(ranks: Pool, strategy: str, frozen: int) -> None:
    views = list(torch.cat(shards([4, 2, 3], torch.float64), dim=1))
    views[1 - frozen].requires_grad_()
    loss = nt_xent(views[0], views[1]).loss
    loss.backward()
    results = ranks(3).run(frozen_step, strategy, frozen)
    torch.testing.assert_close(torch.stack([loss for loss, _ in results]).mean(), loss)
    gradient = torch.cat([gradient for _, gradient in results]) / 3
    torch.testing.assert_close(gradient, views[1 - frozen].grad)


def step_of_parts(strategy: str, autocast: bool, compiled: bool) -> tuple[Tensor, Tensor]:
    z = shards([4, 2, 3], torch.float32)[dist.get_rank()].requires_grad_()

    def loss(z: Tensor) -> Tensor:
        out = nt_xent(2 * z[0], z[1], group=dist.group.WORLD, strategy=strategy)  # type: ignore
        return 3 * out.loss

    with torch.autocast("cpu", enabled=autocast):
        value = (torch.compile(loss, backend="eager") if compiled else loss)(z)
    value.backward()
    return value.detach(), z.grad


@STRATEGIES
@pytest.mark.parametrize(
    ("autocast", "compiled"), [(True, False), (False, True)], ids=["autocast", "compile"]
)
def test_autocast_and_compile(ranks: Pool, strategy: str, autocast: bool, compiled: bool) -> None:
    z = torch.cat(shards([4, 2, 3], torch.float32), dim=1).requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        value = 3 * nt_xent(2 * z[0], z[1]).loss
    value.backward()
    results = ranks(3).run(step_of_parts, strategy, autocast, compiled)
    torch.testing.assert_close(torch.stack([value for value, _ in results]).mean(), value)
    gradient = torch.cat([gradient for _, gradient in results], dim=1) / 3
    dtype = torch.bfloat16 if autocast else torch.float32
    assert relative_error(gradient, z.grad) <= FLOOR_GRADIENT[dtype]


def evaluate(strategy: str) -> Tensor:
    with torch.no_grad():
        z = shards([4, 2], torch.float64)[dist.get_rank()]
        return nt_xent(z[0], z[1], group=dist.group.WORLD, strategy=strategy).loss  # type: ignore


@STRATEGIES
def test_without_gradients(ranks: Pool, strategy: str) -> None:
    z = torch.cat(shards([4, 2], torch.float64), dim=1)
    loss = torch.stack(ranks(2).run(evaluate, strategy)).mean()
    torch.testing.assert_close(loss, nt_xent(z[0], z[1]).loss)


def step_of_a_subgroup() -> tuple[Tensor, Tensor] | None:
    group = dist.new_group([1, 3])  # Every rank has to make this call.
    if dist.get_rank() not in (1, 3):
        return None
    z = shards([4, 2], torch.float64)[dist.get_rank(group)].requires_grad_()
    loss_fn = NTXentLoss(0.2, distributed=group, strategy="ring")
    loss = loss_fn(z[0], z[1])["loss"]
    loss.backward()
    return loss.detach(), z.grad


def test_some_of_the_ranks_as_a_group(ranks: Pool) -> None:
    results = [result for result in ranks(4).run(step_of_a_subgroup) if result is not None]
    z = torch.cat(shards([4, 2], torch.float64), dim=1).requires_grad_()
    loss = nt_xent(z[0], z[1], temperature=0.2).loss
    loss.backward()
    torch.testing.assert_close(torch.stack([loss for loss, _ in results]).mean(), loss)
    torch.testing.assert_close(torch.cat([g for _, g in results], dim=1) / 2, z.grad)


@pytest.fixture
def group_of_one(tmp_path: Any) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["auto", "all_gather", "ring"])
@pytest.mark.parametrize("batch", [1, 6])
def test_a_group_of_one(group_of_one: Any, strategy: Any, batch: int) -> None:
    gradients = []
    for group in (None, group_of_one):
        z = shards([batch], torch.float64)[0].requires_grad_()
        out = nt_xent(z[0], z[1], group=group, strategy=strategy)
        out.loss.backward()
        gradients.append((*(value.detach() for value in out), z.grad))
    torch.testing.assert_close(*gradients, equal_nan=True)


def temperature_step(strategy: str, dtype: torch.dtype) -> Tensor:
    views = shards([1, 9], torch.float32)[dist.get_rank()]
    temperature = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    out = nt_xent(
        views[0],
        views[1],
        temperature=temperature,
        group=dist.group.WORLD,
        strategy=strategy,  # type: ignore[arg-type]
    )
    out.loss.backward()
    assert temperature.grad is not None
    return temperature.grad


@STRATEGIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_gradient_of_a_temperature_of_another_dtype(
    ranks: Pool, strategy: str, dtype: torch.dtype
) -> None:
    views = torch.cat(shards([1, 9], torch.float64), dim=1)
    temperature = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    nt_xent(views[0], views[1], temperature=temperature, backend="reference").loss.backward()
    gradients = ranks(2).run(temperature_step, strategy, dtype)
    assert {gradient.dtype for gradient in gradients} == {dtype}
    mean = torch.stack(gradients).double().mean()
    # Each rank rounds its gradient once to the temperature's dtype.
    floor = 10 * FLOOR_GRADIENT[torch.float32] + torch.finfo(dtype).eps / 2
    assert relative_error(mean, temperature.grad) <= floor
