"""``compat.lightly`` has the losses of lightly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peer_losses
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peer_training import SOURCES, Model, assert_same_training, peer
from ranks import Ranks
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor, nn

from cjepa_kernels.compat.lightly import DCLLoss, DCLWLoss, NTXentLoss

FORMULAS = {
    "NTXentLoss": peer_losses.LightlyNTXentLoss,
    "DCLLoss": peer_losses.LightlyDCLLoss,
    "DCLWLoss": peer_losses.LightlyDCLWLoss,
}
OURS = {"NTXentLoss": NTXentLoss, "DCLLoss": DCLLoss, "DCLWLoss": DCLWLoss}


def first_view_alone(x: Tensor, y: Tensor) -> Tensor:
    """Weights with a gradient that are others with the views swapped."""
    return 1 + x[:, 0] ** 2


def both_views(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    loss: Tensor = loss_fn(model.towers[0](samples), model.towers[1](others))
    return loss


def momentum_keys(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    """As MoCo is trained; the bank changes twice before the backward."""
    loss: Tensor = loss_fn(model.towers[0](samples), model.towers[1](others).detach())
    swapped: Tensor = loss_fn(model.towers[1](others), model.towers[0](samples))
    return loss + swapped


@pytest.mark.parametrize(
    ("name", "options", "step"),
    [
        ("NTXentLoss", {}, both_views),
        ("NTXentLoss", {"memory_bank_size": (25, 8)}, momentum_keys),
        ("DCLLoss", {"temperature": 0.3}, both_views),
        ("DCLLoss", {"temperature": 0.3, "weight_fn": first_view_alone}, both_views),
        ("DCLWLoss", {"temperature": 0.3, "sigma": 0.4}, both_views),
    ],
    ids=["nt_xent", "memory_bank", "dcl", "weighted_dcl", "dclw"],
)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_fifty_steps(source: str, name: str, options: dict[str, Any], step: Any) -> None:
    theirs = peer(source, "lightly.loss", name, FORMULAS[name])(**options).double()
    ours = OURS[name](**options).double()
    if "memory_bank_size" in options:
        rows = F.normalize(torch.randn(25, 8, dtype=torch.float64), dim=1)
        for loss_fn in (ours, theirs):
            loss_fn.memory_bank.bank.copy_(rows)
    assert_same_training(ours, theirs, step)
    if "memory_bank_size" in options:
        assert relative_error(ours.memory_bank.bank, theirs.memory_bank.bank) <= 1e-11
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


def test_the_bank() -> None:
    loss_fn = NTXentLoss(memory_bank_size=(25, 8))
    assert loss_fn.state_dict() == {}
    bank = loss_fn.memory_bank
    torch.testing.assert_close(bank.bank.norm(dim=1), torch.ones(25))
    before = bank.bank.clone()
    keys = torch.randn(10, 8)
    with torch.no_grad():
        loss_fn(torch.randn(10, 8, requires_grad=True), keys)
    loss_fn(torch.randn(10, 8), keys)
    assert torch.equal(bank.bank, before)
    positions = []
    for _ in range(4):
        loss_fn(torch.randn(10, 8, requires_grad=True), keys)
        positions.append(int(bank.bank_ptr))
    assert positions == [10, 20, 0, 10]
    assert torch.equal(bank.bank[10:20], F.normalize(keys, dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_bank_is_that_of_lightly(source: str, dtype: torch.dtype) -> None:
    ours = NTXentLoss(memory_bank_size=(25, 16)).to(dtype)
    lightly_loss = peer(source, "lightly.loss", "NTXentLoss", peer_losses.LightlyNTXentLoss)
    lightly = lightly_loss(memory_bank_size=(25, 16)).to(dtype)
    assert ours.temperature == lightly.temperature == 0.5
    # In fp64 too the rows must have norm 1.
    lightly.memory_bank.bank.copy_(F.normalize(lightly.memory_bank.bank, dim=1))
    ours.memory_bank.bank.copy_(lightly.memory_bank.bank)
    encoder = nn.Linear(32, 16, dtype=dtype)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)

    def compare(*, query_has_gradient: bool = True) -> None:
        results = []
        views = torch.randn(2, 10, 32, dtype=dtype)
        for loss_fn in (lightly, ours):
            optimizer.zero_grad()
            z_i, z_j = encoder(views[0]), encoder(views[1])
            # The bank changes twice before backward.
            loss = loss_fn(z_i, z_j.detach()) + loss_fn(z_j, z_i)
            if query_has_gradient:
                loss.backward()
            results.append((loss.detach(), encoder.weight.grad))
        (loss, gradient), (our_loss, our_gradient) = results
        assert relative_error(our_loss, loss) <= FLOOR_VALUE[dtype]
        if query_has_gradient:
            assert relative_error(our_gradient, gradient) <= FLOOR_GRADIENT[dtype]
        assert relative_error(ours.memory_bank.bank, lightly.memory_bank.bank) <= FLOOR_VALUE[dtype]
        assert ours.memory_bank.bank_ptr == lightly.memory_bank.bank_ptr

    positions = []
    for _ in range(5):
        compare()
        optimizer.step()
        positions.append(int(ours.memory_bank.bank_ptr))
    # Of the third ten rows only five fit, up to the last row of the bank.
    assert positions == [20, 10, 0, 20, 10]
    ours.eval()
    lightly.eval()
    before = ours.memory_bank.bank.clone()
    with torch.no_grad():
        compare(query_has_gradient=False)
    assert torch.equal(ours.memory_bank.bank, before)
    compare()
    assert not torch.equal(ours.memory_bank.bank, before)


@pytest.mark.parametrize("source", SOURCES)
def test_a_bank_of_one_row(source: str) -> None:
    """The log-sum-exp is a single logit, which is near 0 if row and query are orthogonal."""
    lightly_loss = peer(source, "lightly.loss", "NTXentLoss", peer_losses.LightlyNTXentLoss)
    for seed in range(30):
        torch.manual_seed(seed)
        ours = NTXentLoss(memory_bank_size=(1, 16))
        lightly = lightly_loss(memory_bank_size=(1, 16)).double()
        lightly.memory_bank.bank.copy_(ours.memory_bank.bank)
        z_i, z_j = torch.randn(2, 3, 16)
        with torch.no_grad():
            expected = lightly(z_i.double(), z_j.double())
            assert relative_error(ours(z_i, z_j), expected) <= FLOOR_VALUE[torch.float32] / 2


def test_half_precision_keys_go_into_the_bank() -> None:
    loss_fn = NTXentLoss(memory_bank_size=(4, 8))
    query, key = torch.randn(2, 4, 8).bfloat16()
    loss_fn(query.requires_grad_(), key).backward()
    assert loss_fn.memory_bank.bank.dtype == torch.float32
    assert torch.equal(loss_fn.memory_bank.bank, F.normalize(key.float(), dim=1))


def on_a_rank(make: Any, options: dict[str, Any]) -> list[Tensor]:
    """The loss of a rank, the gradients of its views, and its bank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    views = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).requires_grad_()
    loss_fn = make(gather_distributed=True, **options).double()
    loss = loss_fn(views[0], views[1])
    if "memory_bank_size" not in options:
        return [loss.detach(), *torch.autograd.grad(loss, views)]
    return [loss_fn.memory_bank.bank[:8].clone(), loss_fn.memory_bank.bank_ptr.clone()]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("NTXentLoss", {}),
        ("NTXentLoss", {"memory_bank_size": (11, 6)}),
        ("DCLLoss", {}),
        ("DCLWLoss", {}),
    ],
    ids=["nt_xent", "memory_bank", "dcl", "dclw"],
)
@pytest.mark.parametrize("source", SOURCES)
def test_two_ranks(
    source: str, name: str, options: dict[str, Any], ranks: Callable[[int], Ranks]
) -> None:
    theirs = peer(source, "lightly.loss", name, FORMULAS[name])
    actual = ranks(2).run(on_a_rank, OURS[name], options)
    expected = ranks(2).run(on_a_rank, theirs, options)
    for of_ours, of_theirs in zip(actual, expected, strict=True):
        for ours, value in zip(of_ours, of_theirs, strict=True):
            assert relative_error(ours, value) <= FLOOR_GRADIENT[torch.float64]


def ragged_dcl() -> Tensor:
    """The loss of a rank of DCL, with one pair on rank 0 and five on rank 1."""
    views = ragged_views()[dist.get_rank()]
    return DCLLoss(gather_distributed=True)(views[0], views[1])


def ragged_views() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 6, 8, generator=generator, dtype=torch.float64).split([1, 5], dim=1)


def test_dcl_of_ranks_with_different_numbers_of_pairs(ranks: Callable[[int], Ranks]) -> None:
    """lightly's formula needs as many pairs on every rank."""
    whole = torch.cat(ragged_views(), dim=1)
    mean = torch.stack(ranks(2).run(ragged_dcl)).mean()
    assert relative_error(mean, DCLLoss()(whole[0], whole[1])) <= FLOOR_VALUE[torch.float64]


def ragged_dclw() -> str:
    """The error of a rank of DCLW, which needs as many pairs on every rank."""
    views = ragged_views()[dist.get_rank()]
    with pytest.raises(ValueError, match="every rank must hold as many rows") as error:
        DCLWLoss(gather_distributed=True)(views[0], views[1])
    return str(error.value)


def test_ranks_with_different_numbers_of_pairs_are_an_error(ranks: Callable[[int], Ranks]) -> None:
    for message in ranks(2).run(ragged_dclw):
        assert message.endswith("got [1, 5] rows of ranks 0 to 1")


@pytest.mark.parametrize("name", OURS)
def test_gathering_without_a_group_is_one_process(name: str) -> None:
    views = torch.randn(2, 5, 4)
    assert torch.equal(OURS[name](gather_distributed=True)(*views), OURS[name]()(*views))


@pytest.mark.parametrize("temperature", [0.05, 0.008])
def test_dcl_of_aligned_pairs(temperature: float) -> None:
    """The loss of NT-Xent underflows here, and that of DCL is far below 0."""
    views = torch.eye(6).repeat(2, 1, 1)
    loss = DCLLoss(temperature)(*views)
    expected = torch.log(torch.tensor(10.0)) - 1 / temperature
    assert relative_error(loss, expected) <= FLOOR_VALUE[torch.float32]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (NTXentLoss, {"temperature": -0.5}, "Temperature must be positive"),
        (NTXentLoss, {"temperature": 1e-9}, "temperature must be at least 1e-08"),
        (NTXentLoss, {"memory_bank_size": 4096}, "memory_bank_size must be 0 or .* got 4096"),
        (NTXentLoss, {"memory_bank_size": (-1, 8)}, r"memory_bank_size .* got \(-1, 8\)"),
        (NTXentLoss, {"memory_bank_size": ()}, "memory_bank_size must be"),
        (NTXentLoss, {"memory_bank_size": None}, "memory_bank_size must be 0 or .* got None"),
        (NTXentLoss, {"memory_bank_size": (4.0, 8)}, r"memory_bank_size .* got \(4.0, 8\)"),
        (DCLLoss, {"temperature": 0.0}, "Temperature must be positive"),
        (DCLWLoss, {"sigma": 0.0}, "sigma must be positive"),
    ],
    ids=["negative", "small", "int", "below_0", "empty", "none", "float", "dcl", "sigma"],
)
def test_what_is_wrong_is_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("name", OURS)
def test_gathering_is_a_bool(name: str) -> None:
    with pytest.raises(TypeError, match="gather_distributed must be True or False, got 'yes'"):
        OURS[name](gather_distributed="yes")


@pytest.mark.parametrize(
    "loss_fn",
    [NTXentLoss(), NTXentLoss(memory_bank_size=(6, 4)), DCLLoss(), DCLWLoss()],
    ids=["nt_xent", "memory_bank", "dcl", "dclw"],
)
@pytest.mark.parametrize(
    ("out0", "out1", "error", "message"),
    [
        (torch.eye(4), torch.ones(3, 4), ValueError, "out0 and out1 must have the same shape"),
        (torch.eye(4), torch.arange(4), TypeError, "out1 must be the embeddings .* row k of out0"),
        (torch.eye(4), torch.eye(4).long(), TypeError, "out1 must be of fp64"),
        (torch.ones(4), torch.ones(4), ValueError, "out0 and out1 must be"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), ValueError, r"out0 and out1 must be \(B, D\)"),
        (torch.ones(0, 4), torch.ones(0, 4), ValueError, "out0 and out1 must hold at least one"),
    ],
    ids=["rows", "labels", "int", "1d", "3d", "empty"],
)
def test_views_that_are_wrong_are_named(
    loss_fn: nn.Module, out0: Tensor, out1: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss_fn(out0, out1)


@pytest.mark.parametrize("make", [NTXentLoss, DCLLoss])
def test_the_device_of_the_temperature_is_named(make: Any) -> None:
    loss_fn = make(torch.tensor(0.5, device="meta"))
    with pytest.raises(ValueError, match="temperature must be on the device of out0, cpu"):
        loss_fn(torch.eye(4), torch.eye(4))


def test_a_bank_of_other_features_is_named() -> None:
    message = r"memory_bank_size must be \(rows, 4\) .* got \(6, 5\)"
    with pytest.raises(ValueError, match=message):
        NTXentLoss(memory_bank_size=(6, 5))(torch.eye(4), torch.eye(4))


@pytest.mark.parametrize("length", [0.0, 1e-13], ids=["zeros", "below_eps"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NTXentLoss, peer_losses.LightlyNTXentLoss),
        (partial(NTXentLoss, memory_bank_size=(8, 4)), None),
        (DCLLoss, peer_losses.LightlyDCLLoss),
        (DCLWLoss, peer_losses.LightlyDCLWLoss),
    ],
    ids=["nt_xent", "bank", "dcl", "dclw"],
)
def test_a_row_of_zeros_gets_no_gradient(ours: Any, theirs: Any, length: float) -> None:
    """The gradient of ``F.normalize`` divides it by 1e-12. Everything else is the same."""
    theirs = theirs or partial(peer_losses.LightlyNTXentLoss, memory_bank_size=(8, 4))
    rows = torch.randn(2, 6, 4)
    rows[0, 2] = rows[1, 4] = torch.tensor([length, 0.0, 0.0, 0.0])
    results = []
    for make in (ours, theirs):
        torch.manual_seed(1)  # of the bank
        leaf = rows.clone().requires_grad_()
        loss = make()(*leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        results.append((loss, gradient[0, [0, 1, 3, 4, 5]], gradient[0, 2]))
    (loss, of_others, of_row), (their_loss, of_theirs, their_row) = results
    assert relative_error(loss, their_loss) <= FLOOR_VALUE[torch.float32]
    assert relative_error(of_others, of_theirs) <= FLOOR_GRADIENT[torch.float32]
    assert (of_row == 0).all()
    assert their_row.abs().max() > 1e9


def test_dcl_of_one_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="two pairs or more, got one"):
        DCLLoss()(torch.ones(1, 3), torch.ones(1, 3))
