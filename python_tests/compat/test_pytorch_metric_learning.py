"""``compat.pytorch_metric_learning`` has the losses of that library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peer_training import Model, assert_same_training
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor, nn

from cjepa_kernels.compat import labelled
from cjepa_kernels.compat.labelled import Classes, pair_blocks
from cjepa_kernels.compat.normalisation import EPS
from cjepa_kernels.compat.pytorch_metric_learning import NTXentLoss, SelfSupervisedLoss, SupConLoss
from cjepa_kernels.functional.sup_con import sup_con

metric_learning = pytest.importorskip(
    "pytorch_metric_learning", reason="pytorch-metric-learning is part of the extra [bench]"
)
losses, distances, reducers = (
    getattr(__import__(f"pytorch_metric_learning.{name}"), name)
    for name in ("losses", "distances", "reducers")
)
OURS: dict[str, Any] = {"NTXentLoss": NTXentLoss, "SupConLoss": SupConLoss}

# The labels of a batch of 10, with the classes that a loss may meet.
LABELS: dict[str, list[int]] = {
    "views": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
    "few_classes": [7, -3, 7, 7, -3, 7, 7, 0, 0, 7],
    "classes_of_one": [0, 1, 1, 2, 3, 3, 3, 4, 5, 6],
    "all_different": list(range(10)),
    "one_class": [5] * 10,
}


def of_classes(samples: Tensor, labels: Tensor) -> Tensor:
    """The samples around a centre of their class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(20, 12, generator=generator, dtype=samples.dtype)
    return samples + centres[labels]


def of_labels(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    labels = torch.tensor(LABELS["few_classes"] + LABELS["classes_of_one"])
    rows = of_classes(torch.cat([samples, others]), labels)
    loss: Tensor = loss_fn(
        torch.cat([model.towers[0](rows[:15]), model.towers[1](rows[15:])]), labels
    )
    return loss


def against_references(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    labels = torch.tensor(LABELS["few_classes"])
    ref_labels = torch.tensor([*LABELS["few_classes"], 0, 1, 1])
    loss: Tensor = loss_fn(
        embeddings=model.towers[0](of_classes(samples, labels)),
        labels=labels,
        ref_emb=model.towers[1](of_classes(torch.cat([others, samples[:3]]), ref_labels)),
        ref_labels=ref_labels,
    )
    return loss


@pytest.mark.parametrize("step", [of_labels, against_references])
@pytest.mark.parametrize("name", OURS)
def test_fifty_steps(name: str, step: Any) -> None:
    assert_same_training(OURS[name](temperature=0.3), getattr(losses, name)(temperature=0.3), step)


def two_views(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    loss: Tensor = loss_fn(model.towers[0](samples), model.towers[1](others))
    return loss


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "one_direction"])
@pytest.mark.parametrize("name", OURS)
def test_fifty_steps_of_two_views(name: str, symmetric: bool) -> None:
    ours = SelfSupervisedLoss(OURS[name](temperature=0.3), symmetric=symmetric)
    theirs = losses.SelfSupervisedLoss(getattr(losses, name)(temperature=0.3), symmetric=symmetric)
    assert_same_training(ours, theirs, two_views)


def loss_and_gradients(
    loss_fn: nn.Module,
    labels: Tensor,
    ref_labels: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The gradients are those of the rows and of the reference rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(labels), 6, generator=generator).to(dtype).requires_grad_()
    if ref_labels is None:
        loss = loss_fn(rows, labels)
        return [loss.detach(), *torch.autograd.grad(loss, rows)]
    refs = torch.randn(len(ref_labels), 6, generator=generator).to(dtype).requires_grad_()
    loss = loss_fn(rows, labels, ref_emb=refs, ref_labels=ref_labels)
    gradients = torch.autograd.grad(loss, (rows, refs), materialize_grads=True)
    return [loss.detach(), *gradients]


REFERENCES: dict[str, list[int] | None] = {
    "within": None,
    "same_classes": [0, 1, 2, 3, 4, 5, 7],
    "several": [7, 7, -3, -3, 1, 1, 1, 99],
    "others": [100, 101, 102],
    "one": [5],
}


@pytest.mark.parametrize("of_references", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("of_rows", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", OURS)
def test_any_labels(name: str, of_rows: list[int], of_references: list[int] | None) -> None:
    labels = torch.tensor(of_rows)
    ref_labels = None if of_references is None else torch.tensor(of_references)
    actual = loss_and_gradients(OURS[name](), labels, ref_labels)
    expected = loss_and_gradients(getattr(losses, name)(), labels, ref_labels)
    assert actual[0] >= 0
    for ours, theirs in zip(actual, expected, strict=True):
        theirs = theirs.where(theirs.abs() > 1e-15, 0.0)  # rounding errors where it is 0
        assert relative_error(ours, theirs) <= FLOOR_GRADIENT[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_references", [None, LABELS["few_classes"]], ids=["within", "refs"])
@pytest.mark.parametrize("name", OURS)
def test_half_and_single_precision(
    name: str, of_references: list[int] | None, dtype: torch.dtype
) -> None:
    labels = torch.tensor(LABELS["few_classes"])
    arguments = (labels, None if of_references is None else torch.tensor(of_references))
    theirs = getattr(losses, name)()
    ours = loss_and_gradients(OURS[name](), *arguments, dtype=dtype)
    plain, exact = (loss_and_gradients(theirs, *arguments, dtype=d) for d in (dtype, torch.float64))
    assert [x.dtype for x in ours] == [torch.float32, *(x.dtype for x in plain[1:])]
    for i, (actual, eager, expected) in enumerate(zip(ours, plain, exact, strict=True)):
        floor = (FLOOR_GRADIENT if i else FLOOR_VALUE)[dtype]
        assert relative_error(actual, expected) <= 2 * relative_error(eager, expected) + floor


@pytest.mark.parametrize("name", OURS)
def test_a_temperature_that_is_trained(name: str) -> None:
    gradients = []
    for make in (OURS[name], getattr(losses, name)):
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        rows = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).double()
        loss = make(temperature=temperature)(rows, torch.tensor(LABELS["few_classes"]))
        gradients.append(torch.autograd.grad(loss, temperature)[0])
    assert relative_error(*gradients) <= FLOOR_GRADIENT[torch.float64]


@pytest.mark.parametrize("copied", [False, True], ids=["same_tensor", "copied"])
@pytest.mark.parametrize("themselves", [False, True], ids=["others", "themselves"])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", OURS)
def test_references_of_the_same_samples(
    name: str, labels: list[int], themselves: bool, copied: bool
) -> None:
    """The library leaves row k and row k out where both labels are the same tensor."""
    of_rows = torch.tensor(labels)
    of_refs = of_rows.clone() if copied else of_rows
    results = []
    for make in (OURS[name], getattr(losses, name)):
        generator = torch.Generator().manual_seed(0)
        rows, refs = torch.randn(2, 10, 6, generator=generator, dtype=torch.float64)
        rows.requires_grad_()
        loss = make()(rows, of_rows, ref_emb=rows if themselves else refs, ref_labels=of_refs)
        results.append((loss.detach(), torch.autograd.grad(loss, rows)[0]))
    for actual, expected in zip(*results, strict=True):
        expected = expected.where(expected.abs() > 1e-15, 0.0)
        assert relative_error(actual, expected) <= FLOOR_GRADIENT[torch.float64]


@pytest.mark.parametrize("count", [10, 3])
@pytest.mark.parametrize("name", OURS)
def test_labels_of_references_that_are_not_given(name: str, count: int) -> None:
    """The library then compares the rows with themselves, whatever these labels are."""
    labels = torch.tensor(LABELS["few_classes"])
    rows = torch.randn(10, 6, dtype=torch.float64)
    losses_of = [
        make()(rows, labels, ref_labels=labels[:count].clone())
        for make in (OURS[name], getattr(losses, name))
    ]
    assert relative_error(*losses_of) <= FLOOR_VALUE[torch.float64]


@pytest.mark.parametrize("normalised", [True, False], ids=["cosine", "dot_product"])
@pytest.mark.parametrize("name", OURS)
def test_distances_that_are_known(name: str, normalised: bool) -> None:
    labels = torch.tensor(LABELS["few_classes"])
    distance = distances.DotProductSimilarity(normalize_embeddings=normalised)
    options = {"distance": distance, "temperature": 2.0}
    ours, theirs = (
        loss_and_gradients(make(**options), labels, None)
        for make in (OURS[name], getattr(losses, name))
    )
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_error(actual, expected) <= FLOOR_GRADIENT[torch.float64]
    assert OURS[name](distance=distances.CosineSimilarity()).use_cosine_similarity


@pytest.mark.parametrize("temperature", [0.05, 0.02, 0.005])
@pytest.mark.parametrize("name", OURS)
def test_aligned_pairs_lose_no_digits(name: str, temperature: float) -> None:
    """With one positive each and orthogonal classes, the loss is log(1 + 6 exp(-1 / tau))."""
    rows, labels = torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2)
    refs = {"ref_emb": torch.eye(4), "ref_labels": torch.arange(4)}
    for count, options in ((6, {}), (3, refs)):
        loss = OURS[name](temperature=temperature)(rows, labels, **options)
        expected = count * torch.tensor(-1 / temperature, dtype=torch.float64).exp()
        expected = expected.log1p().float()
        if name == "SupConLoss" and expected < 2**-24:
            expected = expected * 0  # AvgNonZeroReducer leaves them out
        assert relative_error(loss, expected) <= FLOOR_VALUE[torch.float32]


def pairs_of_references(
    rows: Tensor, labels: Tensor, refs: Tensor, ref_labels: Tensor, temperature: float
) -> Tensor:
    """NT-Xent of rows and reference rows, with a softplus that does not cancel."""
    logits = F.normalize(rows, dim=1) @ F.normalize(refs, dim=1).T / temperature
    is_pair = labels[:, None] == ref_labels
    lse = logits.masked_fill(is_pair, -torch.inf).logsumexp(dim=1, keepdim=True)
    return -F.logsigmoid(logits - lse)[is_pair].mean()


@pytest.mark.parametrize("temperature", [0.01, 0.005])
def test_several_positives_at_a_low_temperature(temperature: float) -> None:
    """The log-sum-exp and the similarity are large, and only their difference counts."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, of: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=of)

        labels = torch.randint(6, (60,), generator=generator)
        ref_labels = torch.randint(6, (80,), generator=generator)
        centres = normal(24) + 0.2 * normal(6, 24)
        rows = [centres[of] + 0.05 * normal(len(of), 24) for of in (labels, ref_labels)]
        leaves = [z.requires_grad_() for z in rows]
        exact = [z.detach().double().requires_grad_() for z in rows]
        ours = NTXentLoss(temperature)(leaves[0], labels, ref_emb=leaves[1], ref_labels=ref_labels)
        eager, truth = (
            pairs_of_references(x, labels, y, ref_labels, temperature) for x, y in (leaves, exact)
        )
        assert relative_error(ours, truth) <= (
            2 * relative_error(eager, truth) + FLOOR_VALUE[torch.float32]
        )
        actual, plain, expected = (
            torch.cat(torch.autograd.grad(loss, of))
            for loss, of in ((ours, leaves), (eager, leaves), (truth, exact))
        )
        assert relative_error(actual, expected) <= (
            2 * relative_error(plain, expected) + FLOOR_GRADIENT[torch.float32]
        )


def test_sup_con_is_not_below_its_bound() -> None:
    """With two aligned positives the loss is log 2, and the rounding of 1 / tau may go below."""
    labels = torch.arange(4).repeat_interleave(3)
    for seed in range(8):
        rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        assert SupConLoss(0.005)(rows.repeat_interleave(3, 0), labels) >= torch.tensor(2.0).log()


def test_sup_con_within_the_batch_is_that_of_the_package() -> None:
    """The same bits: sums of classes in an order of their own would take memory, and differ."""
    labels = torch.tensor(LABELS["few_classes"])
    rows = torch.randn(10, 6).requires_grad_()
    ours = SupConLoss()(rows, labels)
    expected = sup_con(rows, labels, eps=EPS).loss
    assert torch.equal(ours, expected)
    gradient, expected = (torch.autograd.grad(loss, rows)[0] for loss in (ours, expected))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("at_once", [1, 7, 2**22])
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_every_pair_is_in_one_block(
    labels: list[int], within: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelled, "PAIRS_AT_ONCE", at_once)
    rows = torch.tensor(labels)
    keys = rows if within else torch.tensor([5, 5, 7, 0, 0, 0, 11])
    found = []
    for row_numbers, key_numbers in pair_blocks(Classes.of(rows, None if within else keys)):
        assert row_numbers.shape[1] == 1 or len(key_numbers[0]) * row_numbers.shape[1] <= at_once
        found += [
            (int(a), int(b))
            for block_a, block_b in zip(row_numbers, key_numbers, strict=True)
            for a in block_a
            for b in block_b
            if a >= 0 and b >= 0 and not (within and a == b)
        ]
    is_pair = rows[:, None] == keys
    if within:
        is_pair.fill_diagonal_(False)
    assert sorted(found) == [tuple(pair) for pair in is_pair.nonzero().tolist()]


@pytest.mark.parametrize("at_once", [1, 5])
def test_blocks_do_not_change_the_loss(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor(LABELS["few_classes"])
    expected = loss_and_gradients(NTXentLoss(), labels, None)
    monkeypatch.setattr(labelled, "PAIRS_AT_ONCE", at_once)
    for actual, whole in zip(loss_and_gradients(NTXentLoss(), labels, None), expected, strict=True):
        assert relative_error(actual, whole) <= FLOOR_GRADIENT[torch.float64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "Temperature must be positive"),
        ({"distance": distances.LpDistance()}, "distance must be .* LpDistance"),
        ({"distance": distances.CosineSimilarity(power=2)}, "distance must be .* power=1"),
        ({"reducer": reducers.ThresholdReducer(low=0.1)}, "reducer must be .* ThresholdReducer"),
        ({"collect_stats": True}, "collect_stats must not be True, got True"),
        (
            {"embedding_regularizer": nn.Identity()},
            "embedding_regularizer .* got Identity",
        ),
    ],
    ids=["temperature", "distance", "power", "reducer", "stats", "regularizer"],
)
@pytest.mark.parametrize("name", OURS)
def test_what_is_not_covered_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OURS[name](**options)


def test_defaults_may_be_given() -> None:
    NTXentLoss(reducer=reducers.MeanReducer(), collect_stats=False, embedding_reg_weight=2)
    SupConLoss(reducer=reducers.AvgNonZeroReducer())
    with pytest.raises(TypeError, match=r"^NTXentLoss.* unexpected keyword argument 'margin'"):
        NTXentLoss(margin=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, "labels must be given with embeddings, got None"),
        ({"labels": torch.arange(3)}, r"labels must be \(4,\), one for each row .* got \(3,\)"),
        (
            {"indices_tuple": (torch.arange(2),) * 3},
            "indices_tuple .* got tuple: .* miners",
        ),
        ({"ref_emb": torch.ones(3, 4)}, "ref_labels must be given with ref_emb, got None"),
        ({"ref_emb": torch.ones(3, 5)}, "embeddings and ref_emb must have the same D"),
    ],
    ids=["none", "shape", "miner", "ref_labels", "features"],
)
def test_a_wrong_call_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NTXentLoss()(**{"embeddings": torch.eye(4), "labels": torch.arange(4), **arguments})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("ref_emb", "error", "message"),
    [
        (torch.ones(3, 4), ValueError, "embeddings and ref_emb must have the same shape"),
        (torch.arange(4), TypeError, "ref_emb must be the embeddings .* row k of embeddings"),
    ],
    ids=["rows", "labels"],
)
def test_two_views_that_do_not_fit_are_named(
    ref_emb: Tensor, error: type[Exception], message: str, symmetric: bool
) -> None:
    with pytest.raises(error, match=message):
        SelfSupervisedLoss(NTXentLoss(), symmetric=symmetric)(torch.eye(4), ref_emb)


@pytest.mark.parametrize("name", OURS)
def test_the_device_of_the_temperature_is_named(name: str) -> None:
    loss_fn = OURS[name](temperature=torch.tensor(0.1, device="meta"))
    with pytest.raises(ValueError, match="temperature must be on the device of embeddings, cpu"):
        loss_fn(torch.eye(4), torch.arange(4).repeat(2)[:4] % 2)


def test_other_losses_are_not_wrapped() -> None:
    with pytest.raises(ValueError, match="loss must be NTXentLoss or SupConLoss of cjepa_kernels"):
        SelfSupervisedLoss(losses.TripletMarginLoss())


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_give_nan(name: str, value: float) -> None:
    rows, labels = torch.randn(6, 5), torch.tensor([0, 0, 1, 1, 1, 2])
    rows[1, 0] = value
    assert getattr(losses, name)()(rows, labels).isnan()
    rows.requires_grad_()
    loss = OURS[name]()(rows, labels)
    assert loss.isnan()
    assert torch.autograd.grad(loss, rows)[0].isnan().any()
