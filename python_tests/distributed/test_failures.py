"""If the arguments of a rank differ, or a rank is missing or dies, the others soon get an error."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks
from torch import Tensor

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    create_loss_from_config,
    info_nce,
    nt_xent,
    sup_con,
)
from cjepa_kernels.distributed import resolve_group
from cjepa_kernels.distributed.blocks import Blocks

Pool = Callable[[int], Ranks]
TIMEOUT = 3.0  # Seconds that a group waits for a rank that has died.
STRATEGIES = pytest.mark.parametrize("strategy", ["all_gather", "ring"])


def message_of(
    options: list[dict[str, Any]], inputs: list[tuple[tuple[int, ...], torch.dtype]]
) -> str:
    """Run on each rank: the error of nt_xent when each rank has its own arguments."""
    rank = dist.get_rank()
    shape, dtype = inputs[rank]
    z_i, z_j = torch.zeros(2, *shape, dtype=dtype)
    own_options = dict(options[rank])
    if own_options.pop("requires_grad", False):
        z_i.requires_grad_()
    try:
        nt_xent(z_i, z_j, group=dist.group.WORLD, **own_options)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("change", "shape", "dtype", "expected"),
    [
        ({}, (0, 4), torch.float32, "every rank must hold at least one pair, rank 1 has none"),
        ({}, (3, 5), torch.float32, "number of features.*rank 0 has 4.* and rank 1 has 5"),
        ({}, (3, 4), torch.float64, "dtype of z_i.*torch.float32 and rank 1 has torch.float64"),
        ({"temperature": 0.3}, (3, 4), torch.float32, "temperature.*rank 0 has 0.1 .* 0.3"),
        ({"eps": 1e-6}, (3, 4), torch.float32, "eps must be the same on every rank"),
        ({"reduction": "sum"}, (3, 4), torch.float32, "reduction.*has mean and rank 1 has sum"),
        ({"strategy": "ring"}, (3, 4), torch.float32, "strategy.*has auto and rank 1 has ring"),
        ({"use_cosine_similarity": False}, (3, 4), torch.float32, "use_cosine_similarity must be"),
        (
            {"requires_grad": True},
            (3, 4),
            torch.float32,
            "requires_grad.*False and rank 1 has True",
        ),
        (
            {"temperature": torch.tensor(0.1)},
            (3, 4),
            torch.float32,
            "whether temperature is a tensor",
        ),
        ({"backend": "reference"}, (3, 4), torch.float32, "whether backend is the reference"),
        ({}, (3, 0, 4), torch.float32, "every rank must hold at least one pair, rank 1 has none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_ranks_that_differ_are_named_on_every_rank(
    ranks: Pool, change: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, expected: str
) -> None:
    inputs = [((3, 4), torch.float32), (shape, dtype), ((3, 4), torch.float32)]
    messages = ranks(3).run(message_of, [{}, change, {}], inputs)
    assert len(set(messages)) == 1
    assert re.search(expected, messages[0]), messages[0]


def step_with_own_temperature() -> str:
    z = torch.randn(2, 4, 8)
    loss_fn = NTXentLoss(0.1, learnable_temperature=True, distributed=True)
    loss_fn.temperature = 0.1 + 0.2 * dist.get_rank()
    try:
        loss_fn(z[0], z[1])
    except ValueError as error:
        return str(error)
    return "no error"


def test_learnable_temperatures_that_drifted_apart(ranks: Pool) -> None:
    for message in ranks(2).run(step_with_own_temperature):
        expected = r"temperature must be .*rank 0 has 0\.0999\d* and rank 1 has 0\.2999"
        assert re.search(expected, message), message


@pytest.fixture
def ranks_that_may_die() -> Iterator[Ranks]:
    processes = Ranks(3, timeout=TIMEOUT)
    yield processes
    processes.close()


def step_with_a_death(strategy: str, when: str, ends: bool) -> None:
    """Run on each rank. Rank 1 dies before or during the forward, or before the backward.

    If ``ends`` is true, its process ends. Otherwise the function raises KeyboardInterrupt.
    """
    dies = dist.get_rank() == 1

    def leave(*_: Any, **__: Any) -> Any:
        if ends:
            os._exit(1)
        raise KeyboardInterrupt  # The package does not catch this exception.

    z = torch.randn(2, 4, 8, requires_grad=True)
    if dies and when == "before":
        leave()
    if dies and when == "forward":
        Blocks.rectangle = leave  # type: ignore[method-assign]
    out = nt_xent(z[0], z[1], group=dist.group.WORLD, strategy=strategy)  # type: ignore[arg-type]
    if dies and when == "between":
        leave()
    out.loss.backward()


@STRATEGIES
@pytest.mark.parametrize("when", ["before", "forward", "between"])
def test_a_rank_that_dies_fails_the_others(
    ranks_that_may_die: Ranks, strategy: str, when: str
) -> None:
    started = time.monotonic()
    results = ranks_that_may_die.attempt(step_with_a_death, strategy, when, True)
    # Each of the other ranks waits for the timeouts of a few exchanges at most.
    assert time.monotonic() - started < 15 * TIMEOUT
    direction = "backward" if when == "between" else "forward"
    for rank in (0, 2):
        assert isinstance(results[rank], RankError)
        assert f"rank {rank} of 3 cannot reach the others in the {direction}" in str(results[rank])
        assert "every rank must run every forward and backward" in str(results[rank])
    assert "has ended" in str(results[1])


def step_without_a_backward(strategy: str) -> None:
    z = torch.randn(2, 4, 8, requires_grad=True)
    out = nt_xent(z[0], z[1], group=dist.group.WORLD, strategy=strategy)  # type: ignore[arg-type]
    if dist.get_rank() == 1:
        time.sleep(2 * TIMEOUT)
        return
    out.loss.backward()


@STRATEGIES
def test_a_rank_without_a_backward_fails_the_others(
    ranks_that_may_die: Ranks, strategy: str
) -> None:
    results = ranks_that_may_die.attempt(step_without_a_backward, strategy)
    for rank in (0, 2):
        assert "cannot reach the others in the backward" in str(results[rank])


def double_backward(backend: str) -> str:
    z = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    out = nt_xent(z[0], z[1], group=dist.group.WORLD, backend=backend)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(out.loss, z, create_graph=True)
    try:
        gradient.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("auto", "nt_xent of a group has no second"), ("reference", "once_differentiable")],
)
def test_no_second_derivative(ranks: Pool, backend: str, expected: str) -> None:
    for message in ranks(2).run(double_backward, backend):
        assert expected in message


def test_errors_without_processes() -> None:
    z = torch.randn(3, 2)
    with pytest.raises(TypeError, match="a bool or a process group, got str"):
        NTXentLoss(distributed="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a bool or a process group, got int"):
        ContrastiveJEPALoss(HJEPALoss(), distributed=1)  # type: ignore[arg-type]
    for loss in (NTXentLoss, lambda **options: ContrastiveJEPALoss(HJEPALoss(), **options)):
        with pytest.raises(ValueError, match=r"strategy must be one of.*'rings'"):
            loss(strategy="rings")  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"strategy must be one of.*'rings'"):
        nt_xent(z, z, strategy="rings")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="group must be a process group or None, got str"):
        nt_xent(z, z, group="world")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gather_distributed: must be true or false, got 1"):
        create_loss_from_config({"type": "cjepa", "gather_distributed": 1})
    assert resolve_group(False) is None
    assert resolve_group(True) is None


def errors_within_a_group() -> list[str]:
    z = torch.randn(2, 3, 2)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    messages = []
    for options in ({"mask": mask}, {"backend": "reference", "strategy": "ring"}):
        try:
            nt_xent(z[0], z[1], group=dist.group.WORLD, **options)  # type: ignore[arg-type]
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_errors_within_a_group(ranks: Pool) -> None:
    for mask, reference in ranks(2).run(errors_within_a_group):
        assert "mask must be None with a group, got a tensor of shape" in mask
        assert (
            'strategy must be "auto" or "all_gather" with backend="reference", got "ring"'
            in reference
        )


# Of each type: the options of its configuration, and the loss of one process.
CONTRASTIVE: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "nt_xent": ({"strategy": "ring"}, lambda z, _: nt_xent(z[0], z[1])),
    "nt_xent_labels": ({}, lambda z, labels: nt_xent(z[0], z[1], labels=labels)),
    "dcl": ({"strategy": "ring"}, lambda z, _: nt_xent(z[0], z[1], decoupled=True)),
    "info_nce": (
        {"strategy": "ring"},
        lambda z, _: info_nce(z[0], z[1], temperature=0.1, symmetric=True),
    ),
    "sup_con_labels": ({}, lambda z, labels: sup_con(z.transpose(0, 1), labels)),
}
LABELS = torch.tensor([0, 1, 0, 2, 2, 1, 0, 3])


def losses_by_configuration(name: str) -> dict[str, Tensor]:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    levels = [torch.randn(4, n, 8, generator=generator) for n in (4, 2)]
    features = torch.randn(2, 4, 5, 8, generator=generator).requires_grad_()
    kind = name.removesuffix("_labels")
    loss_fn = create_loss_from_config(
        {
            "type": "cjepa",
            "contrastive_type": kind,
            "num_hierarchies": 2,
            "gather_distributed": True,
            "contrastive_on_context": True,
            **CONTRASTIVE[name][0],
        }
    )
    own = LABELS[4 * rank : 4 * rank + 4]
    labels = {"labels": own} if name.endswith("_labels") else {}
    out = loss_fn(levels, levels, features[0], features[1], **labels)
    out["loss"].backward()
    assert loss_fn.distributed is True
    if kind != "sup_con":
        assert loss_fn.contrastive.strategy == CONTRASTIVE[name][0].get("strategy", "auto")
    result = {key: out[key].detach() for key in ("loss", "contrastive_accuracy")}
    return {**result, "cls": features[:, :, 0].detach(), "grad": features.grad}


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_whole_loss_by_configuration(ranks: Pool, name: str) -> None:
    results = ranks(2).run(losses_by_configuration, name)
    z = torch.cat([result["cls"] for result in results], dim=1).requires_grad_()
    loss = 0.1 * CONTRASTIVE[name][1](z, LABELS).loss
    loss.backward()
    torch.testing.assert_close(torch.stack([result["loss"] for result in results]).mean(), loss)
    of_pairs = nt_xent(z[0], z[1], labels=LABELS if name.endswith("_labels") else None)
    for result, gradient in zip(results, z.grad.split(4, dim=1), strict=True):
        torch.testing.assert_close(result["grad"][:, :, 0] / 2, gradient)
        assert result["grad"][:, :, 1:].count_nonzero() == 0
        if name != "info_nce":
            assert result["contrastive_accuracy"] == of_pairs.accuracy
