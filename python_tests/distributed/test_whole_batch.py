"""SupCon, and NT-Xent with labels, over ranks: each rank computes what one process computes."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from overloads import BACKENDS
from ranks import Ranks, gradients_of
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cjepa_kernels import NTXentLoss, SupConLoss, nt_xent, sup_con

Pool = Callable[[int], Ranks]
FEATURES = 12
NOT_SLOW = [name for name in BACKENDS if name not in ("reference", "triton")]

# The labels of each rank's samples, and the views of a sample (0: rows that are no views).
BATCHES: dict[str, tuple[list[list[int]], int]] = {
    "one_rank": ([[4, 4, 2, 7, 2]], 0),
    "two": ([[0, 1, 2, 1, 0, 0], [1, 2, 0, 3, 1, 1]], 0),
    "ragged": ([[5, 5, -9], [-9, 5, 2, 2, 0, 5, 1, -9]], 0),
    "three": ([[0, 1], [1, 0, 1, 2, 0], [2]], 0),
    "class_of_one_rank": ([[0, 1, 2], [3, 4, 3, 4, 3], [0, 1]], 0),
    "pairs_over_ranks": ([[0, 1, 2, 3], [3, 1], [2, 0]], 0),
    "all_different": ([[0, 1, 2], [3], [4, 5]], 0),
    "views": ([[6, 5, 6], [5, 7]], 3),
    "two_views": ([[0, 1], [1, 2, 0, 2], [3]], 2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum_dot_product": {
        "reduction": "sum",
        "use_cosine_similarity": False,
        "temperature": 4.0,
    },
    "none_low_temperature": {"reduction": "none", "temperature": 0.02},
}
LOSSES: dict[str, Callable[..., Any]] = {
    "sup_con": sup_con,
    "views_of_samples": lambda z, _, **options: sup_con(z, **options),
    "nt_xent": lambda z, labels, **options: nt_xent(*z.unbind(1), labels=labels, **options),
    "dcl": lambda z, labels, **options: nt_xent(
        *z.unbind(1), labels=labels, decoupled=True, **options
    ),
}
# The losses of pairs take two views, of any batch.
OF_SUP_CON = [("sup_con", name) for name in BATCHES]
OF_VIEWS = [("views_of_samples", name) for name in ("views", "two_views")]
OF_PAIRS = [(loss, name) for loss in ("nt_xent", "dcl") for name in BATCHES if name != "views"]
CASES = [*OF_SUP_CON, *OF_VIEWS, *OF_PAIRS]


def shares(loss: str, name: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The embeddings and the labels of each rank."""
    labels, views = BATCHES[name]
    if loss in ("nt_xent", "dcl"):
        views = 2
    generator = torch.Generator().manual_seed(7)
    result = []
    for own in labels:
        shape = (len(own), views, FEATURES) if views else (len(own), FEATURES)
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        result.append((z.to(dtype), torch.tensor(own)))
    return result


def upstream_of(loss: Tensor, rank: int) -> Tensor:
    """Gradients that differ from loss to loss and from rank to rank; 1 for a reduced loss."""
    if loss.ndim == 0:
        return torch.ones_like(loss)
    return torch.rand(loss.shape, generator=torch.Generator().manual_seed(rank)).to(loss)


def rank_step(
    loss: str, name: str, dtype: torch.dtype, backend: Any, options: dict[str, Any]
) -> tuple[Any, Tensor, Tensor]:
    """Run on each rank: the result, and the gradients of its embeddings and the temperature."""
    options = dict(options)
    z, labels = shares(loss, name, dtype)[dist.get_rank()]
    temperature = torch.tensor(options.pop("temperature", 0.1), dtype=dtype).requires_grad_()
    out = LOSSES[loss](
        z.requires_grad_(),
        labels,
        temperature=temperature,
        backend=backend,
        group=dist.group.WORLD,
        **options,
    )
    gradients = torch.autograd.grad(
        out.loss, (z, temperature), upstream_of(out.loss, dist.get_rank())
    )
    return type(out)(*(value.detach() for value in out)), *gradients


def one_process(
    loss: str, name: str, dtype: torch.dtype, backend: Any, options: dict[str, Any]
) -> tuple[Any, Tensor, Tensor]:
    """The same of one process with the rows of all ranks."""
    options = dict(options)
    parts = shares(loss, name, dtype)
    z = torch.cat([z for z, _ in parts]).requires_grad_()
    temperature = torch.tensor(options.pop("temperature", 0.1), dtype=dtype).requires_grad_()
    out = LOSSES[loss](
        z,
        torch.cat([labels for _, labels in parts]),
        temperature=temperature,
        backend=backend,
        **options,
    )
    upstream = torch.ones_like(out.loss)
    if out.loss.ndim > 0:
        views = out.loss.numel() // len(z) if loss in ("nt_xent", "dcl") else 1
        of_ranks = []
        for rank, (own, _) in enumerate(parts):
            rows = own.flatten(0, -2).shape[0]
            of_ranks.append(upstream_of(out.loss[:rows], rank).view(views, -1))
        upstream = torch.cat(of_ranks, dim=1).flatten()
    return out, *torch.autograd.grad(out.loss, (z, temperature), upstream)


def in_order(loss: str, parts: list[Tensor]) -> Tensor:
    """The ranks' numbers of anchors in the order of one process."""
    views = 2 if loss in ("nt_xent", "dcl") else 1
    return torch.cat([part.view(views, -1) for part in parts], dim=1).flatten()


@pytest.mark.parametrize(("loss", "name"), CASES)
@pytest.mark.parametrize(
    ("option", "backend"), [*((option, "auto") for option in OPTIONS), ("mean", "reference")]
)
def test_ranks_equal_the_reference_of_one_process(
    ranks: Pool, loss: str, name: str, option: str, backend: Any
) -> None:
    options = OPTIONS[option]
    count = len(BATCHES[name][0])
    results = ranks(count).run(rank_step, loss, name, torch.float64, backend, options)
    truth, *expected = one_process(loss, name, torch.float64, "reference", options)
    reduction = options.get("reduction", "mean")
    scale = count if reduction == "mean" else 1
    losses = [out.loss for out, *_ in results]
    actual = in_order(loss, losses) if reduction == "none" else torch.stack(losses).sum() / scale
    floor = FLOOR_VALUE[torch.float64]
    assert relative_error(actual, truth.loss) <= floor
    assert relative_error(in_order(loss, [out.lse for out, *_ in results]), truth.lse) <= floor
    of_rows = torch.cat([gradient for _, gradient, _ in results]) / scale
    of_temperature = torch.stack([gradient for *_, gradient in results]).sum() / scale
    for gradient, exact in zip((of_rows, of_temperature), expected, strict=True):
        assert relative_error(gradient, exact) <= FLOOR_GRADIENT[torch.float64]
    for out, *_ in results:
        for metric in set(out._fields) - {"loss", "lse"}:
            value = getattr(out, metric)
            assert torch.equal(value, getattr(results[0][0], metric)) or value.isnan()
            torch.testing.assert_close(
                value, getattr(truth, metric), rtol=0, atol=METRIC[torch.float64], equal_nan=True
            )


@pytest.mark.parametrize(("loss", "name"), [("sup_con", "three"), ("dcl", "ragged")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", NOT_SLOW)
def test_ranks_have_the_bits_of_one_process(
    ranks: Pool, loss: str, name: str, dtype: torch.dtype, backend: Any
) -> None:
    options = {"reduction": "none"}
    results = ranks(len(BATCHES[name][0])).run(rank_step, loss, name, dtype, backend, options)
    expected, gradient, _ = one_process(loss, name, dtype, backend, options)
    assert torch.equal(in_order(loss, [out.loss for out, *_ in results]), expected.loss)
    assert torch.equal(torch.cat([gradient for _, gradient, _ in results]), gradient)
    for out, *_ in results:
        assert torch.equal(out.negative_similarity, expected.negative_similarity)


def test_no_positive_on_any_rank(ranks: Pool) -> None:
    results = ranks(3).run(rank_step, "sup_con", "all_different", torch.float32, "auto", {})
    for out, gradient, of_temperature in results:
        assert out.loss == 0
        assert out.num_anchors == 0
        assert not gradient.any()
        assert of_temperature == 0


def accuracy_step(samples: int, bad: int | None) -> Tensor:
    return accuracy_of(shares("nt_xent", "three", torch.float32), samples, bad, dist.get_rank())


def accuracy_of(
    parts: list[tuple[Tensor, Tensor]], samples: int, bad: int | None, rank: int | None
) -> Tensor:
    """C-JEPA's accuracy beside SupCon, of a rank or of one process.

    Args:
        parts: The pairs and labels of each rank.
        samples: From how many samples it is taken.
        bad: The rank that has a row with an infinity.
        rank: This rank, or None for one process.
    """
    module = importlib.import_module("cjepa_kernels.functional.view_accuracy")
    if bad is not None:
        parts[bad][0][0, 0, 0] = torch.inf
    if rank is not None:
        parts = parts[rank : rank + 1]
    z, labels = (torch.cat(side) for side in zip(*parts, strict=True))
    before, module.SAMPLES = module.SAMPLES, samples
    try:
        accuracy: Tensor = module.view_accuracy(
            z[:, 0],
            z[:, 0] + 3 * z[:, 1],
            labels,
            use_cosine_similarity=True,
            eps=1e-8,
            backend="auto",
            group=None if rank is None else dist.group.WORLD,
        )
    finally:
        module.SAMPLES = before
    return accuracy


@pytest.mark.parametrize("samples", [1, 3, 4, 256])
def test_the_accuracy_beside_sup_con_is_that_of_one_process(ranks: Pool, samples: int) -> None:
    parts = shares("nt_xent", "three", torch.float32)
    expected = accuracy_of(parts, samples, None, None)
    assert samples == 1 or 0 < expected < 1
    for accuracy in ranks(3).run(accuracy_step, samples, None):
        assert torch.equal(accuracy, expected)


def test_a_row_that_is_not_finite_makes_the_accuracy_zero_everywhere(ranks: Pool) -> None:
    assert ranks(3).run(accuracy_step, 256, 2) == [0, 0, 0]


class Model(nn.Module):
    """An encoder and its loss in one module, so that DDP averages all gradients."""

    def __init__(self, loss: str, distributed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Linear(FEATURES, FEATURES)
        options: dict[str, Any] = {"learnable_temperature": True, "distributed": distributed}
        self.loss_fn = copy.deepcopy(
            SupConLoss(0.2, **options)
            if loss == "sup_con"
            else NTXentLoss(0.2, decoupled=loss == "dcl", **options)
        )
        self.to(dtype)

    def forward(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        z = self.encoder(embeddings)
        if isinstance(self.loss_fn, SupConLoss):
            result: Any = self.loss_fn(z, labels)
        else:
            result = self.loss_fn(*z.unbind(1), labels=labels)
        return result


def ddp_step(loss: str, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    dtype = torch.float32 if autocast else torch.float64
    model: Any = DistributedDataParallel(Model(loss, True, dtype))
    z, labels = shares(loss, "ragged", dtype)[dist.get_rank()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(z, labels)
    out["loss"].backward()
    gradients = gradients_of(model)
    return out["loss"].detach(), {name.split("module.")[-1]: g for name, g in gradients.items()}


@pytest.mark.parametrize(
    ("loss", "autocast"),
    [("sup_con", False), ("dcl", False), ("sup_con", True)],
    ids=["sup_con", "dcl", "autocast"],
)
def test_ddp_averages_to_one_process(ranks: Pool, loss: str, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float64
    parts = shares(loss, "ragged", dtype)
    model = Model(loss, False, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(*(torch.cat(side) for side in zip(*parts, strict=True)))["loss"]
    expected.backward()
    truth = gradients_of(model)
    results = ranks(2).run(ddp_step, loss, autocast)
    mean = torch.stack([loss for loss, _ in results]).mean()
    # The products of the loss round as those of one process do, those of the encoder's backward
    # do not.
    assert relative_error(mean, expected.detach()) <= FLOOR_VALUE[dtype]
    floor = FLOOR_GRADIENT[torch.bfloat16 if autocast else dtype]
    for _, gradients in results:
        assert gradients.keys() == truth.keys()
        for parameter, gradient in gradients.items():
            assert relative_error(gradient, truth[parameter]) <= floor, parameter


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_the_exchange_is_left_out_of_a_compiled_graph() -> None:
    z, labels = shares("sup_con", "one_rank", torch.float64)[0]
    results = []
    for distributed in (False, True):
        model: Any = torch.compile(Model("sup_con", distributed, z.dtype), backend="aot_eager")
        loss = model(z, labels)["loss"]
        loss.backward()
        results.append((loss.detach(), *gradients_of(model).values()))
    torch.testing.assert_close(*results, rtol=0, atol=FLOOR_GRADIENT[z.dtype])


def message_of(loss: str, changes: list[dict[str, Any]]) -> str:
    """Run on each rank: the error of the loss when each rank has its own arguments."""
    change = dict(changes[dist.get_rank()])
    z = torch.ones(change.pop("shape", (3, 2, 4)), dtype=change.pop("dtype", torch.float32))
    labels = change.pop("labels", torch.tensor([0, 1, 0]))
    z.requires_grad_(change.pop("requires_grad", False))
    arguments = (z,) if loss == "sup_con" else tuple(z.unbind(1))
    function = sup_con if loss == "sup_con" else nt_xent
    try:
        function(*arguments, labels=labels, group=dist.group.WORLD, **change)
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("loss", "change", "expected"),
    [
        ("sup_con", {"shape": (3, 2, 5)}, "the number of features must .* 4 and rank 1 has 5"),
        ("sup_con", {"shape": (3, 3, 4)}, "the number of views of embeddings .* 2 and .* has 3"),
        ("sup_con", {"shape": (3, 4)}, "the number of views of embeddings .* 2 and .* has 0"),
        ("sup_con", {"labels": None}, "whether labels are given must be the same on every rank"),
        ("sup_con", {"dtype": torch.float64}, "the dtype of embeddings must be the same"),
        ("sup_con", {"requires_grad": True}, "requires_grad of embeddings or temperature must be"),
        ("sup_con", {"reduction": "sum"}, "reduction must be .* has mean and rank 1 has sum"),
        ("nt_xent", {"labels": None}, "whether labels are given must be the same on every rank"),
        ("nt_xent", {"decoupled": True}, "decoupled must be the same on every rank"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ranks_that_differ_are_named_on_every_rank(
    ranks: Pool, loss: str, change: dict[str, Any], expected: str
) -> None:
    messages = ranks(3).run(message_of, loss, [{}, change, {}])
    assert len(set(messages)) == 1
    assert re.search(expected, messages[0]), messages[0]


@pytest.mark.parametrize(
    ("loss", "change", "expected"),
    [
        ("sup_con", {"labels": torch.ones(3)}, "labels must be a tensor of integers, got .*float"),
        ("sup_con", {"labels": torch.ones(2, dtype=torch.int64)}, r"labels must be \(3,\)"),
        ("sup_con", {"shape": (3, 4), "labels": None}, "labels must be given for embeddings"),
        ("sup_con", {"shape": (0, 2, 4)}, "embeddings must hold at least one row"),
        ("sup_con", {"temperature": -1.0}, "Temperature must be positive"),
        ("nt_xent", {"labels": torch.ones(3)}, "labels must be a tensor of integers"),
        ("nt_xent", {"labels": torch.ones(2, dtype=torch.int64)}, r"labels must be \(3,\)"),
        ("nt_xent", {"strategy": "ring"}, "strategy must be .* with labels and a group, got"),
        ("nt_xent", {"mask": torch.ones(3, 3, dtype=torch.bool)}, "labels must be None with a"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_rank_that_refuses_its_arguments_stops_the_others(
    ranks: Pool, loss: str, change: dict[str, Any], expected: str
) -> None:
    messages = ranks(3).run(message_of, loss, [{}, change, {}])
    assert re.search(expected, messages[1]), messages[1]
    for message in (messages[0], messages[2]):
        assert "rank 1 raised an error for its own" in message


def test_a_class_that_is_everything_has_no_negatives(ranks: Pool) -> None:
    change = {"labels": torch.tensor([7, 7, 7]), "decoupled": True}
    for message in ranks(2).run(message_of, "nt_xent", [change] * 2):
        assert 'decoupled must be False (and contrastive_type not "dcl") without' in message
        assert "labels that are all 7" in message
    different = {"labels": torch.tensor([8, 8, 8]), "decoupled": True}
    assert ranks(2).run(message_of, "nt_xent", [change, different]) == ["no error"] * 2


def test_mistakes_in_one_process() -> None:
    z, labels = torch.randn(4, 6), torch.tensor([0, 0, 1, 1])
    with pytest.raises(TypeError, match="group must be a process group or None, got str"):
        sup_con(z, labels, group="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="distributed must be a bool or a process group, got int"):
        SupConLoss(distributed=1)  # type: ignore[arg-type]
    loss_fn = SupConLoss(distributed=True)  # one process without a group
    assert torch.equal(loss_fn(z, labels)["loss"], SupConLoss()(z, labels)["loss"])
